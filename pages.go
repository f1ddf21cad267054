package main

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"auth-service/templates"
)

// The pages for people. A GET changes nothing, so that mail scanners may open
// links as often as they like; the button on the page is a POST.

func (s *server) homePage(context.Context, caller, *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Home()}, nil
}

func (s *server) registerPage(context.Context, caller, *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Register(templates.RegisterForm{})}, nil
}

func (s *server) registerForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	in := registerIn{profile: profile{
		Email: trimmed(r, "email"), Username: trimmed(r, "username"),
		FirstName: trimmed(r, "first_name"), LastName: trimmed(r, "last_name"), Phone: unspaced(r, "phone")}}
	out, err := registerOut{}, checked(&in)
	if err == nil {
		out, err = s.register(ctx, c, in)
	}
	if p := asProblem(err); err != nil && (p.Status == 400 || p.Status == 409) {
		form := templates.RegisterForm{Email: in.Email, Username: in.Username, FirstName: in.FirstName,
			LastName: in.LastName, Phone: in.Phone, Errors: byField(p)}
		if p.Status == 409 {
			form.Problem = p.Detail
			s.recordRefusal(ctx, c, "register", p)
		}
		return view{Status: p.Status, Page: templates.Register(form)}, nil
	} else if err != nil {
		return view{}, err
	}
	return view{Status: 201, Page: templates.Registered(templates.RegisteredView{Email: out.Email, Queued: out.VerificationEmail == mailQueued})}, nil
}

// trimmed is a field as its person meant it; unspaced is for numbers, which people
// type and paste in groups.
func trimmed(r *http.Request, name string) string { return strings.TrimSpace(r.PostFormValue(name)) }
func unspaced(r *http.Request, name string) string {
	return strings.Join(strings.Fields(r.PostFormValue(name)), "")
}

// checked is what decode does for JSON.
func checked(in any) error {
	if wrong := checkFields(in, nil); len(wrong) > 0 {
		return invalid(wrong...)
	}
	return nil
}

func byField(p problem) map[string]string {
	errs := map[string]string{}
	for _, e := range p.Errors {
		errs[e.Field] = e.Detail
	}
	return errs
}

// verifyPage is where the mail's link leads. Without a token it takes the code.
func (s *server) verifyPage(ctx context.Context, _ caller, r *http.Request) (view, error) {
	token := r.FormValue("token")
	if token == "" {
		return view{Status: 200, Page: templates.Code(templates.CodeForm{Email: r.FormValue("email")})}, nil
	}
	reg, err := s.pendingByToken(ctx, token)
	if err != nil {
		return view{}, err
	}
	if reg.State == verified {
		return verifiedPage(templates.VerifiedView{Email: reg.Email, Already: true, SignInURL: "/auth/login"}, nil), nil
	}
	return view{Status: 200, Page: templates.Verify(templates.VerifyView{Email: reg.Email, Token: token, Key: r.FormValue("key")})}, nil
}

// pendingByToken returns the registration that a link opens, pending or verified,
// and the problem of any other one.
func (s *server) pendingByToken(ctx context.Context, token string) (registration, error) {
	reg, err := s.store.registrationByToken(ctx, tokenHash(token))
	switch {
	case errors.Is(err, errNotFound):
		err = problemInvalidToken
	case err != nil:
	case reg.State == cancelled:
		err = problemVerificationCancelled
	case reg.State == expired, reg.State == pending && !s.now().Before(reg.ExpiresAt):
		err = problemVerificationExpired
	}
	return reg, err
}

func (s *server) verifyForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	in := verifyIn{Token: r.PostFormValue("token"), Password: r.PostFormValue("password"),
		Email: trimmed(r, "email"), Code: unspaced(r, "code")}
	out, err := verifyOut{}, checked(&in)
	if err == nil && in.Token == "" && (in.Email == "" || in.Code == "") {
		err = invalid(missing(map[string]string{"email": in.Email, "code": in.Code})...)
	}
	if err == nil {
		out, err = s.verify(ctx, c, in)
	}
	if p := asProblem(err); err != nil && in.Token == "" && p.Status == 400 {
		form := templates.CodeForm{Email: in.Email, Errors: byField(p)}
		if p.slug() == problemInvalidCode.slug() {
			form.Problem = p.Detail
			s.recordRefusal(ctx, c, "verify", p)
		}
		return view{Status: p.Status, Page: templates.Code(form)}, nil
	} else if err != nil {
		return view{}, err
	}
	return verifiedPage(templates.VerifiedView{Email: out.Email, Already: out.AlreadyVerified, SignInURL: "/auth/login"}, nil), nil
}

func verifiedPage(v templates.VerifiedView, setPasswordURL *string) view {
	if setPasswordURL != nil {
		v.SetPasswordURL = *setPasswordURL
	}
	return view{Status: 200, Page: templates.Message(templates.Verified(v))}
}

func missing(values map[string]string) (wrong []fieldError) {
	for name, value := range values {
		if value == "" {
			wrong = append(wrong, fieldError{name, "is required"})
		}
	}
	return wrong
}

func (s *server) resendPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Resend(templates.ResendForm{Email: r.FormValue("email")})}, nil
}

func (s *server) resendForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	in := resendIn{Email: trimmed(r, "email")}
	out, err := resendOut{}, checked(&in)
	if err == nil && in.Email == "" {
		err = invalid(fieldError{"email", "is required"})
	}
	if err == nil {
		out, err = s.resend(ctx, c, in)
	}
	if p := asProblem(err); err != nil && p.Status == 400 {
		return view{Status: 400, Page: templates.Resend(templates.ResendForm{Email: in.Email, Errors: byField(p)})}, nil
	} else if err != nil {
		return view{}, err
	}
	return view{Status: 200, Page: templates.Message(templates.Resent(in.Email, out.VerificationEmail == mailQueued))}, nil
}

func (s *server) cancelPage(ctx context.Context, _ caller, r *http.Request) (view, error) {
	reg, err := s.pendingByToken(ctx, r.FormValue("token"))
	if err != nil {
		return view{}, err
	}
	if reg.State == verified {
		return view{}, problemAlreadyVerified
	}
	return view{Status: 200, Page: templates.Cancel(templates.CancelView{Email: reg.Email, Token: r.FormValue("token")})}, nil
}

func (s *server) cancelForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	in := cancelIn{Token: r.PostFormValue("token")}
	err := checked(&in)
	if err == nil {
		_, err = s.cancel(ctx, c, in)
	}
	if err != nil {
		return view{}, err
	}
	return view{Status: 200, Page: templates.Message(templates.Cancelled())}, nil
}

// readyPage is where Keycloak sends people who have chosen their password.
func (s *server) readyPage(context.Context, caller, *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Message(templates.PasswordSet())}, nil
}

// signedInPage is where people come who began to sign in here.
func (s *server) signedInPage(context.Context, caller, *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Message(templates.SignedIn())}, nil
}

// problemPage explains a problem type, so that the type of every error resolves.
func (s *server) problemPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	p, ok := problems[r.PathValue("slug")]
	if !ok {
		return view{}, problemNotFound
	}
	return view{Status: 200, Page: templates.Problem(problemView(p))}, nil
}
