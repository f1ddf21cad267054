package preview

import (
	"auth-service/templates"

	"github.com/a-h/templ"
)

// A Sample is one page in one state, with invented data.
type Sample struct {
	Name string // "register-errors", a path segment
	Page templ.Component
}

// Samples returns every page in every state. Handler shows them at /preview/{name}, and the tests look at each in a
// browser.
func Samples() []Sample {
	const (
		email = "ada.lovelace@example.com"
		token = "6qS3jXr8vN2kT0wYbE5hCg"
		id    = "01K6ZJ8M4V7Q2X9N5T3B"
	)
	long := "wilhelmine.charlotte.von-hohenfels-langenburg+registrierung@stadtwerke-donaudampfschifffahrt.example.com"
	samples := []Sample{
		{"home", templates.Home()},
		{"register", templates.Register(templates.RegisterForm{})},
		{"register-errors", templates.Register(templates.RegisterForm{
			Email: "ada.lovelace@", Username: "al", FirstName: "Ada", Phone: "030 123456",
			Errors: map[string]string{
				"email":    "is not a valid e-mail address",
				"username": "must have at least 3 characters",
				"phone":    "is not a valid phone number; write it with the country code, like +4930123456",
				"password": "is too weak",
			},
		})},
		{"register-exists", templates.Register(templates.RegisterForm{
			Email: long, FirstName: "Wilhelmine", LastName: "von Hohenfels-Langenburg",
			Problem: "An account with this e-mail address or username exists already.",
		})},
		{"registered", templates.Registered(templates.RegisteredView{Email: email})},
		{"registered-queued", templates.Registered(templates.RegisteredView{Email: long, Queued: true})},
		{"verify", templates.Verify(templates.VerifyView{Email: email, Token: token, Key: "key"})},
		{"verify-long", templates.Verify(templates.VerifyView{Email: long, Token: token})},
		{"code", templates.Code(templates.CodeForm{Email: email})},
		{"code-errors", templates.Code(templates.CodeForm{Email: "ada", Errors: map[string]string{
			"email": "is not a valid e-mail address", "code": "must be six digits",
		}})},
		{"code-wrong", templates.Code(templates.CodeForm{Email: email, Problem: "The e-mail address or the code is wrong."})},
		{"resend", templates.Resend(templates.ResendForm{})},
		{"resend-errors", templates.Resend(templates.ResendForm{Errors: map[string]string{"email": "is required"}})},
		{"cancel", templates.Cancel(templates.CancelView{Email: email, Token: token})},
		{"verified", templates.Message(templates.Verified(templates.VerifiedView{Email: email, SignInURL: "/auth/login"}))},
		{"verified-password", templates.Message(templates.Verified(templates.VerifiedView{Email: email, SetPasswordURL: "https://id.example.com/"}))},
		{"verified-password-mailed", templates.Message(templates.Verified(templates.VerifiedView{Email: email, PasswordMailed: true}))},
		{"verified-already", templates.Message(templates.Verified(templates.VerifiedView{Email: email, Already: true, SignInURL: "/auth/login"}))},
		{"password-set", templates.Message(templates.PasswordSet())},
		{"signed-in", templates.Message(templates.SignedIn())},
		{"resent", templates.Message(templates.Resent(email, false))},
		{"resent-queued", templates.Message(templates.Resent(email, true))},
		{"cancelled", templates.Message(templates.Cancelled())},
	}
	for _, problem := range []struct {
		Slug, Title string
		Status      int
		Text        string
	}{
		{"verification-expired", "Verification expired", 410,
			"The time to confirm this registration is over. Please register again."},
		{"verification-cancelled", "Registration cancelled", 410,
			"This registration was cancelled or replaced by a newer one."},
		{"invalid-token", "Invalid link or token", 400,
			"This link is not valid. It may be incomplete or belong to a newer mail."},
		{"invalid-code", "Wrong code", 400, "The e-mail address or the code is wrong."},
		{"too-many-attempts", "Too many attempts", 429,
			"The code was entered wrongly too often. The link in the mail still works, or ask for a new mail."},
		{"resend-too-soon", "Too soon", 429, "A mail was sent a moment ago. Please wait before asking for another."},
		{"resend-limit", "Too many mails", 429, "No more mails can be sent for this registration or address today."},
		{"registration-not-found", "No registration", 404, "There is no open registration for this."},
		{"already-verified", "Already confirmed", 409, "This address is confirmed already. You can sign in."},
		{"user-exists", "Account exists", 409, "An account with this e-mail address or username exists already."},
		{"sign-in-incomplete", "Sign-in not completed", 400,
			"This sign-in is over already. Perhaps the page was loaded twice."},
		{"account-disabled", "Account disabled", 403, "This account is disabled."},
		{"account-not-verified", "Account not verified", 403,
			"The e-mail address of this account is not confirmed yet. Look into your mailbox."},
		{"account-setup-required", "Account setup required", 403,
			"This account is not known here yet. Please ask an administrator."},
		{"invalid-request", "Invalid request", 400,
			"return_to must be a path of this site or begin with an origin that is allowed."},
		{"too-many-requests", "Too many requests", 429, "Please wait a moment and try again."},
		{"unavailable", "Temporarily unavailable", 503,
			"The service can't do this right now. Nothing is lost; please try again in a moment."},
		{"internal", "Something went wrong", 500,
			"This is our fault. Please try again; if it stays, tell us the request id."},
		{"not-found", "Not found", 404, "There is nothing at this address."},
	} {
		p := templates.ProblemView(problem)
		samples = append(samples,
			Sample{"refused-" + p.Slug, templates.Message(templates.Refused(p, id, "/account/verify"))},
			Sample{"problem-" + p.Slug, templates.Problem(p)})
	}
	return samples
}
