package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// problem is an error with a public half, the members of RFC 9457 §3.1, and a
// private one. Anything else that an operation returns is a 500.
type problem struct {
	Type      problemType  `json:"type" required:"true" example:"/problems/invalid-request" description:"Resolves to a page that explains it."`
	Title     string       `json:"title" required:"true" example:"Invalid request"`
	Status    int          `json:"status" required:"true" example:"400"`
	Detail    string       `json:"detail" required:"true" example:"Some fields are wrong."`
	RequestID string       `json:"request_id" example:"V1StGXR8_Z5jdHi6B-myT" description:"That of X-Request-Id; empty for a gateway that has sent none."`
	Errors    []fieldError `json:"errors,omitempty" description:"Only for invalid-request: one entry for each wrong field."`

	Wait      time.Duration `json:"-"` // Retry-After; zero: none
	challenge string        // the error of WWW-Authenticate (RFC 6750 §3.1); "": none
	retry     string        // where a person may try again; "": the same page
	cookie    *http.Cookie  // to be set; nil: none
	target    string        // the id that the audit entry of the refusal names
	err       error         // the cause, for the log
}

// problemType is the address of the page that explains a problem, /problems/{slug}.
type problemType string

// fieldError says what is wrong with a field; it never quotes the value.
type fieldError struct {
	Field  string `json:"field" required:"true" example:"email"`
	Detail string `json:"detail" required:"true" example:"is required"`
}

// problems are the types by slug, for /problems/{slug}. Of two with one slug it has the first.
var problems = map[string]problem{}

func newProblem(status int, slug, title, detail string) problem {
	p := problem{Type: problemType("/problems/" + slug), Title: title, Status: status, Detail: detail}
	if _, has := problems[slug]; !has {
		problems[slug] = p
	}
	return p
}

// Every problem type of the service. Those that a route may answer are listed with it.
var (
	problemInvalidRequest = newProblem(400, "invalid-request", "Invalid request", "Some fields are wrong.")
	problemInvalidToken   = newProblem(400, "invalid-token", "Invalid link or token",
		"This link is not valid. It may be incomplete, or too old.")
	problemSignInIncomplete = newProblem(400, "sign-in-incomplete", "Sign-in not completed",
		"The sign-in did not come to an end. Please try again.")
	problemInvalidCode        = newProblem(400, "invalid-code", "Wrong code", "The e-mail address or the code is wrong.")
	problemUnauthorized       = newProblem(401, "unauthorized", "Not signed in", "A valid access token is needed.")
	problemInvalidAccessToken = problemUnauthorized.withDetail(
		"The access token is not valid or has expired.").withChallenge("invalid_token")
	problemInvalidRefreshToken = newProblem(401, "invalid-token", "Invalid link or token",
		"The refresh token is not valid, or its session has ended. Please sign in again.")
	problemTokenReused = newProblem(401, "token-reused", "Token reused",
		"This refresh token was used before. To be safe, the session was ended. Please sign in again.")
	problemInvalidCredentials = newProblem(401, "invalid-credentials", "Sign-in failed",
		"The username, the e-mail address or the password is wrong.")
	problemOTPRequired = newProblem(401, "otp-required", "One-time code needed",
		"This account has a one-time code. Please send it along with the password.")
	problemForbidden          = newProblem(403, "forbidden", "Not allowed", "You are not allowed to do this.")
	problemAccountNotVerified = newProblem(403, "account-not-verified", "Account not verified",
		"The e-mail address of this account is not confirmed yet. Look into your mailbox.")
	problemAccountDisabled      = newProblem(403, "account-disabled", "Account disabled", "This account is disabled.")
	problemAccountSetupRequired = newProblem(403, "account-setup-required", "Account setup required",
		"This account is not set up completely.")
	problemAccountUnfit = problemAccountSetupRequired.withDetail(
		"This account does not fit in here: another one may have its e-mail address or username. " +
			"Please ask an administrator.")
	problemRegistrationClosed = newProblem(403, "registration-closed", "Registration closed",
		"Only people who are invited get an account here.")
	problemNotFound             = newProblem(404, "not-found", "Not found", "There is nothing at this address.")
	problemRegistrationNotFound = newProblem(404, "registration-not-found", "No registration",
		"There is no open registration for this.")
	problemUserNotFound = newProblem(404, "user-not-found", "No such user",
		"There is no such user, or none that you may see.")
	problemMethodNotAllowed = newProblem(405, "method-not-allowed", "Method not allowed",
		"This address does not know that method; Allow lists those it knows.")
	problemUserExists = newProblem(409, "user-exists", "Account exists",
		"An account with this e-mail address or username exists already.")
	problemAddressUnproven = newProblem(409, "address-unproven", "Address not confirmed",
		"The e-mail address of this account is not confirmed. Until it is, the account gets no role.")
	problemLastAdmin = newProblem(409, "last-admin", "Last administrator",
		"This is the last active administrator. Make somebody else one first.")
	problemUserGone = newProblem(409, "user-gone", "User gone",
		"Keycloak does not have this user any more. Please invite the person anew.")
	problemSyncRunning     = newProblem(409, "sync-running", "Sync is running", "A sync is running already.")
	problemAlreadyVerified = newProblem(409, "already-verified", "Already confirmed",
		"This address is confirmed already. You can sign in.")
	problemVerificationExpired = newProblem(410, "verification-expired", "Verification expired",
		"The time to confirm this registration is over. Please register again.")
	problemVerificationCancelled = newProblem(410, "verification-cancelled", "Registration cancelled",
		"This registration was cancelled.")
	problemPayloadTooLarge = newProblem(413, "payload-too-large", "Too large",
		"The request body is larger than 16 KiB.")
	problemUnsupportedMediaType = newProblem(415, "unsupported-media-type", "Unsupported media type",
		"The request body must be application/json.")
	problemTooManyAttempts = newProblem(429, "too-many-attempts", "Too many attempts",
		"The code was entered wrongly too often. The link in the mail still works, or ask for a new mail.")
	problemResendTooSoon = newProblem(429, "resend-too-soon", "Too soon",
		"A mail was sent a moment ago. Please wait before asking for another.")
	problemResendLimit = newProblem(429, "resend-limit", "Too many mails",
		"No more mails can be sent for this registration or address today.")
	problemTooManyRequests = newProblem(429, "too-many-requests", "Too many requests",
		"Please wait a moment and try again.")
	problemInternal = newProblem(500, "internal", "Something went wrong",
		"This is our fault. Please try again; if it stays, tell us the request id.")
	problemUnavailable = newProblem(503, "unavailable", "Temporarily unavailable",
		"The service can't do this right now. Nothing is lost; please try again in a moment.")
)

// What is wrong with the tokens that the realm issues: only its administrator can do something about it.
var (
	problemTokenAlgorithm = unusable("The sign-in server's access tokens have a form or a signature algorithm " +
		"that is not accepted here. Please tell an administrator, who can run auth-service doctor.")
	problemTokenClaims = unusable("The sign-in server's access tokens lack claims that are needed here, as " +
		"lightweight ones do. Please tell an administrator, who can run auth-service doctor.")
	problemTokenLong = unusable("The access token of this account is longer than is accepted here: it lists too " +
		"many groups or roles. Please tell an administrator.")
	problemSessionEndless = unusable("The sign-in server gives sessions without an end (offline_access). " +
		"Please tell an administrator, who can run auth-service doctor.")
)

func unusable(detail string) problem {
	return problemUnavailable.withDetail(detail).retryAfter(time.Minute)
}

func (p problem) Error() string {
	if p.err != nil {
		return p.slug() + ": " + p.err.Error()
	}
	return p.slug()
}

func (p problem) Unwrap() error { return p.err }

// Is makes problems of one type the same for errors.Is, whatever they say of the case.
func (p problem) Is(target error) bool {
	t, ok := target.(problem)
	return ok && t.Type == p.Type
}

func (p problem) slug() string { return strings.TrimPrefix(string(p.Type), "/problems/") }

// What may be said of the case: its cause, for the log; the id of whom it concerns, for the audit
// log; the error in the challenge (RFC 6750 §3.1); another detail; how long to wait.
func (p problem) withCause(err error) problem             { p.err = err; return p }
func (p problem) withTarget(target string) problem        { p.target = target; return p }
func (p problem) withChallenge(oauthError string) problem { p.challenge = oauthError; return p }
func (p problem) withCookie(c *http.Cookie) problem       { p.cookie = c; return p }
func (p problem) withDetail(detail string) problem        { p.Detail = detail; return p }
func (p problem) retryAfter(d time.Duration) problem      { p.Wait = max(d, time.Second); return p }

// invalid is invalid-request with the wrong fields.
func invalid(fields ...fieldError) problem {
	p := problemInvalidRequest
	p.Errors = fields
	return p
}

// asProblem is what the client is told about err: its problem, 503 for a store
// that is away, else 500; nil is the zero problem.
func asProblem(err error) problem {
	var p problem
	switch {
	case err == nil, errors.As(err, &p):
	case errors.Is(err, errBusy), errors.Is(err, errLocked):
		p = problemUnavailable.retryAfter(2 * time.Second).withCause(err)
	case errors.Is(err, errUnavailable):
		p = problemUnavailable.retryAfter(5 * time.Second).withCause(err)
	default:
		p = problemInternal.withCause(err)
	}
	if p.Status == http.StatusTooManyRequests {
		p.Wait = max(p.Wait, time.Second)
	}
	return p
}

// report logs a problem that is ours, once, with its cause, counts it, and
// completes it for the client.
func (s *server) report(r *http.Request, err error) problem {
	p := asProblem(err)
	s.metrics.problems.WithLabelValues(p.slug()).Inc()
	switch {
	case errors.Is(err, errBusy): // a flood is one line a minute
		if s.busyWarned.again(s.now()) {
			s.log.WarnContext(r.Context(), "request refused, too much is waiting", "http.route", routeOf(r),
				"http.request.method", methodOf(r), "error", err)
		}
	case p.Status >= 500:
		s.log.ErrorContext(r.Context(), "request failed", "http.route", routeOf(r),
			"http.request.method", methodOf(r), "problem", p.slug(), "error", err)
	}
	p.RequestID = requestOf(r.Context()).ID
	return p
}

// setProblemHeaders sets what belongs to a problem besides its body.
func setProblemHeaders(h http.Header, p problem) {
	if p.cookie != nil {
		h.Add("Set-Cookie", p.cookie.String())
	}
	if p.Wait > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(p.Wait.Seconds()))))
	}
	switch {
	case p.challenge != "":
		h.Set("WWW-Authenticate",
			fmt.Sprintf(`Bearer realm="auth-service", error=%q, error_description=%q`, p.challenge, p.Detail))
	case p.Status == http.StatusUnauthorized: // without an error, since nothing was presented
		h.Set("WWW-Authenticate", `Bearer realm="auth-service"`)
	}
}

// writeProblem answers an API request with err.
func (s *server) writeProblem(w http.ResponseWriter, r *http.Request, err error) {
	p := s.report(r, err)
	setProblemHeaders(w.Header(), p)
	body, _ := json.Marshal(p) // strings and a number
	respond(w, p.Status, problemContent, body)
}
