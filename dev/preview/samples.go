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
	ada := templates.Person{Email: email, Username: "ada", FirstName: "Ada", LastName: "Lovelace", Phone: "+4930123456"}
	wilhelmine := templates.Person{Email: long, FirstName: "Wilhelmine", LastName: "von Hohenfels-Langenburg"}
	wrong := func(fields map[string]string) templates.Mistakes {
		return templates.Mistakes{Problem: "Some fields are wrong.", Fields: fields}
	}
	taken := templates.Mistakes{Problem: "An account with this e-mail address or username exists already."}
	samples := []Sample{
		{"home", templates.Home(false)},
		{"home-invited", templates.Home(true)},
		{"register", templates.Register(templates.RegisterForm{})},
		{"register-errors", templates.Register(templates.RegisterForm{
			Person: templates.Person{Email: "ada.lovelace@", Username: "al", FirstName: "Ada", Phone: "030 123456"},
			Mistakes: wrong(map[string]string{
				"email":    "is not a valid e-mail address",
				"username": "must have at least 3 characters",
				"phone":    "is not a valid phone number; write it with the country code, like +4930123456",
			}),
		})},
		{"register-exists", templates.Register(templates.RegisterForm{Person: wilhelmine, Mistakes: taken})},
		{"registered", templates.Registered(email, false)},
		{"registered-queued", templates.Registered(long, true)},
		{"verify", templates.Verify(templates.VerifyForm{Token: token, Person: ada})},
		{"verify-long", templates.Verify(templates.VerifyForm{Token: token, Person: wilhelmine})},
		{"verify-errors", templates.Verify(templates.VerifyForm{Token: token, Person: ada,
			Mistakes: wrong(map[string]string{"password": "must have at least 8 characters"})})},
		{"verify-errors-in-details", templates.Verify(templates.VerifyForm{Token: token, Person: ada,
			Mistakes: wrong(map[string]string{"password": "is required",
				"first_name": "has a character that is not allowed"})})},
		{"verify-taken", templates.Verify(templates.VerifyForm{Token: token, Person: ada,
			Mistakes: templates.Mistakes{Problem: taken.Problem, Fields: map[string]string{"username": "is taken already"}}})},
		{"invitation", templates.Verify(templates.VerifyForm{Token: token, Invited: true, Person: ada})},
		{"invitation-errors", templates.Verify(templates.VerifyForm{Token: token, Invited: true, Person: ada,
			Mistakes: wrong(map[string]string{"password": "must not be equal to the email"})})},
		{"invitation-expired", templates.Message(templates.Refused(templates.ProblemView{Slug: "verification-expired",
			Title: "Verification expired", Status: 410,
			Text: "The time to accept this invitation is over. Please ask for a new one."}, id, "/"))},
		{"code", templates.Verify(templates.VerifyForm{Person: templates.Person{Email: email}})},
		{"code-errors", templates.Verify(templates.VerifyForm{Person: templates.Person{Email: "ada"},
			Mistakes: wrong(map[string]string{"email": "is not a valid e-mail address", "code": "must be six digits",
				"password": "is required", "phone": "is not a valid phone number"})})},
		{"code-wrong", templates.Verify(templates.VerifyForm{Person: ada,
			Mistakes: templates.Mistakes{Problem: "The e-mail address or the code is wrong."}})},
		{"resend", templates.Resend(templates.ResendForm{})},
		{"resend-errors", templates.Resend(templates.ResendForm{Mistakes: wrong(map[string]string{"email": "is required"})})},
		{"resent", templates.Message(templates.Resent(email))},
		{"cancel", templates.Cancel(templates.CancelView{Email: email, Token: token})},
		{"cancel-invitation", templates.Cancel(templates.CancelView{Email: email, Token: token, Invited: true})},
		{"cancelled", templates.Message(templates.Cancelled())},
		{"verified", templates.Message(templates.Verified(""))},
		{"verified-already", templates.Message(templates.Verified(email))},
		{"password-set", templates.Message(templates.PasswordSet())},
		{"new-address", templates.Message(templates.NewAddress("http://localhost:5080/realms/myrealm/login-actions/action-token?key=x"))},
		{"signed-in", templates.Message(templates.SignedIn())},
	}
	return append(samples, refusals(id)...)
}

// refusals are the pages of problems, and those that explain them.
func refusals(requestID string) (samples []Sample) {
	for _, problem := range []struct {
		Slug, Title string
		Status      int
		Text        string
	}{
		{"verification-expired", "Verification expired", 410,
			"The time to confirm this registration is over. Please register again."},
		{"verification-cancelled", "Registration cancelled", 410,
			"This registration was cancelled."},
		{"invalid-token", "Invalid link or token", 400,
			"This link is not valid. It may be incomplete, or too old."},
		{"too-many-attempts", "Too many attempts", 429,
			"The code was entered wrongly too often. The link in the mail still works, or ask for a new mail."},
		{"resend-limit", "Too many mails", 429, "No more mails can be sent for this registration or address today."},
		{"already-verified", "Already confirmed", 409, "This address is confirmed already. You can sign in."},
		{"sign-in-incomplete", "Sign-in not completed", 400,
			"This sign-in is over already. Perhaps the page was loaded twice."},
		{"account-disabled", "Account disabled", 403, "This account is disabled."},
		{"account-not-verified", "Account not verified", 403,
			"The e-mail address of this account is not confirmed yet. Look into your mailbox."},
		{"account-setup-required", "Account setup required", 403,
			"This account does not fit in here: another one may have its e-mail address or username. " +
				"Please ask an administrator."},
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
			Sample{"refused-" + p.Slug, templates.Message(templates.Refused(p, requestID, "/account/verify"))},
			Sample{"problem-" + p.Slug, templates.Problem(p)})
	}
	return samples
}
