package main

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"auth-service/templates"

	"github.com/a-h/templ"
)

// The pages for people. A GET changes nothing, so that mail scanners may open links as
// often as they like; the button on the page is a POST, and confirms only with a password.

// show is a page that is always the same.
func show(p templ.Component) operation {
	return page(func(context.Context, caller, *http.Request) (view, error) { return view{Status: 200, Page: p}, nil })
}

// registerPage is the form, or the sentence that only people who are invited get an account.
func (s *server) registerPage() templ.Component {
	if s.cfg.Registration == invitedOnly {
		return templates.Message(templates.Refused(problemView(problemRegistrationClosed), "", ""))
	}
	return templates.Register(templates.RegisterForm{})
}

func (s *server) registerForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	out, err := submit(ctx, c, r, s.register)
	if err == nil {
		return mailedTo(out.Email, string(out.VerificationEmail)), nil
	}
	status, wrong, err := s.mistakes(ctx, c, "register", err)
	form := templates.RegisterForm{Person: personIn(r), Mistakes: wrong}
	return view{Status: status, Page: templates.Register(form)}, err
}

// mailedTo leads to the page that says that a mail is on its way.
func mailedTo(email, mail string) view {
	return goOn("/account/mailed?" + url.Values{"email": {email}, "mail": {mail}}.Encode())
}

// mailedPage says where a mail went. mail is sent or queued after a registration, else the mail was asked for again:
// the page is the same for every address then.
func (s *server) mailedPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	email, wrong := mailAddress(r.FormValue("email"))
	if wrong != "" {
		return goOn("/account/resend"), nil
	}
	switch mail := mailState(r.FormValue("mail")); mail {
	case mailSent, mailQueued:
		return view{Status: 200, Page: templates.Registered(email, mail == mailQueued)}, nil
	}
	return view{Status: 200, Page: templates.Message(templates.Resent(email))}, nil
}

// personIn reads what a form says of a person.
func personIn(r *http.Request) templates.Person {
	return templates.Person{Email: r.PostFormValue("email"), Username: r.PostFormValue("username"),
		FirstName: r.PostFormValue("first_name"), LastName: r.PostFormValue("last_name"), Phone: r.PostFormValue("phone")}
}

// submit reads a form into the input of an operation, checks it as decode does, and calls the
// operation. required are fields that the page wants, though the operation can do without them.
func submit[I, O any](ctx context.Context, c caller, r *http.Request, f func(context.Context, caller, I) (O, error),
	required ...string) (out O, err error) {
	var in I
	form := inputOf(&in)
	for name, field := range form.fields {
		if text := r.PostFormValue(name); strings.TrimSpace(text) != "" {
			field.given = true
			field.setText(text)
		}
	}
	for _, name := range required {
		if strings.TrimSpace(r.PostFormValue(name)) == "" {
			form.fields[name].wrong = "is required"
		}
	}
	if err := form.check(); err != nil {
		return out, err
	}
	return f(ctx, c, in)
}

// mistakes returns the status of a refused form and what the form says when it is shown again.
// It returns err itself if no other input would help: that problem has its own page.
func (s *server) mistakes(ctx context.Context, c caller, action string, err error) (int, templates.Mistakes, error) {
	p := asProblem(err)
	wrong := templates.Mistakes{Problem: p.Detail, Fields: map[string]string{}}
	for _, e := range p.Errors {
		wrong.Fields[e.Field] = e.Detail
	}
	otherMail := errors.Is(p, problemRegistrationClosed) && s.cfg.Registration != invitedOnly
	if errors.Is(p, problemInvalidCode) || errors.Is(p, problemUserExists) || otherMail {
		s.recordRefusal(ctx, c, action, p)
	} else if !errors.Is(p, problemInvalidRequest) {
		return 0, wrong, err
	}
	return p.Status, wrong, nil
}

// linkToken reads the token out of a link, also out of one that a mail program has mangled: cut the line, escaped it
// once more, or taken along what stands behind it. It has a token's length, so what follows is not its own. Of a link
// whose token can't be read it returns something that is nobody's token.
func linkToken(r *http.Request) string {
	query := linkNoise.ReplaceAllStringFunc(r.URL.RawQuery, func(escaped string) string {
		plain, _ := url.QueryUnescape(escaped)
		return strings.TrimSpace(plain)
	})
	if found := tokenInLink.FindStringSubmatch(query); found != nil {
		return found[1] + found[2]
	}
	return ""
}

var (
	linkNoise = regexp.MustCompile(`\+|%[0-9A-Fa-f]{2}`)
	// The token, also behind 3D (quoted-printable, RFC 2045 §6.7) or a bracket; else what stands there.
	tokenInLink = regexp.MustCompile(`(?i)token=(?:(?:3D)?[^\w&;-]{0,3}([A-Z0-9_-]{32})|([^&]*))`)
)

// verifyPage is where the mail's link leads. Without a token it takes the code.
func (s *server) verifyPage(ctx context.Context, _ caller, r *http.Request) (view, error) {
	return s.showVerify(ctx, 200, templates.VerifyForm{
		Token: linkToken(r), Person: templates.Person{Email: r.FormValue("email")}})
}

// showVerify shows the form that confirms an address. It is filled in as the person has
// sent it; with a link that was just opened (200), as the person has registered.
func (s *server) showVerify(ctx context.Context, status int, form templates.VerifyForm) (view, error) {
	locale := ""
	if form.Token != "" {
		reg, err := s.pendingByToken(ctx, form.Token)
		if err != nil || reg.State == verified {
			return view{Status: 200, Page: templates.Message(templates.Verified(reg.Email)), Locale: reg.Locale}, err
		}
		if status == 200 {
			form.Person = templates.Person{FirstName: reg.FirstName, LastName: reg.LastName, Phone: reg.Phone}
			if !strings.Contains(reg.Username, "@") && !strings.HasPrefix(reg.Username, "USR-") { // nobody's choice
				form.Username = reg.Username
			}
		}
		form.Email, form.Invited, locale = reg.Email, reg.Source == sourceInternal, reg.Locale
	}
	return view{Status: status, Page: templates.Verify(form), Locale: locale}, nil
}

// pendingByToken returns the registration that a link opens, pending or verified,
// and the problem of any other one.
func (s *server) pendingByToken(ctx context.Context, token string) (registration, error) {
	reg, err := s.store.registrationByToken(ctx, digest(token))
	if errors.Is(err, errNotFound) {
		return reg, problemInvalidToken
	}
	if reg.State == pending && !s.now().Before(reg.ExpiresAt) { // a GET changes nothing; the task will
		reg.State = expired
	}
	if refused := (problem{}); err == nil && reg.State != verified && errors.As(reg.over(), &refused) {
		err = refused.withTarget("") // who looks at a page is refused nothing that is worth an audit entry
	}
	return reg, err
}

// verifyForm wants a password, unlike its operation: a mail scanner that presses the
// button has none, and confirms nothing.
func (s *server) verifyForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	form := templates.VerifyForm{Token: r.PostFormValue("token"), Person: personIn(r)}
	required := []string{"password", "email", "code"}
	if form.Token != "" { // then the form has the address only for password managers
		r.PostForm.Del("email")
		required = required[:1]
	}
	_, err := submit(ctx, c, r, s.verify, required...)
	if err == nil {
		return goOn("/account/verified"), nil
	}
	status, wrong, err := s.mistakes(ctx, c, "verify", err)
	if err != nil {
		return view{}, err
	}
	if status == 409 { // the address was free when it was registered
		wrong.Fields["username"] = "is taken already"
	}
	form.Mistakes = wrong
	return s.showVerify(ctx, status, form)
}

func (s *server) resendPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	return view{Status: 200, Page: templates.Resend(templates.ResendForm{Email: r.FormValue("email")})}, nil
}

func (s *server) resendForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	email := r.PostFormValue("email")
	_, err := submit(ctx, c, r, s.resend, "email")
	if err == nil {
		return mailedTo(email, ""), nil
	}
	status, wrong, err := s.mistakes(ctx, c, "resend", err)
	return view{Status: status, Page: templates.Resend(templates.ResendForm{Email: email, Mistakes: wrong})}, err
}

func (s *server) cancelPage(ctx context.Context, _ caller, r *http.Request) (view, error) {
	token := linkToken(r)
	reg, err := s.pendingByToken(ctx, token)
	if err == nil && reg.State == verified {
		err = problemAlreadyVerified
	}
	return view{Status: 200, Page: templates.Cancel(templates.CancelView{
		Email: reg.Email, Token: token, Invited: reg.Source == sourceInternal}), Locale: reg.Locale}, err
}

func (s *server) cancelForm(ctx context.Context, c caller, r *http.Request) (view, error) {
	_, err := submit(ctx, c, r, s.cancel)
	return goOn("/account/cancelled"), err
}

// problemPage explains a problem type, so that the type of every error resolves.
func (s *server) problemPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	p, ok := problems[r.PathValue("slug")]
	if !ok {
		return view{}, problemNotFound
	}
	return view{Status: 200, Page: templates.Problem(problemView(p))}, nil
}
