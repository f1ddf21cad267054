package main

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"strings"
	"time"

	"golang.org/x/text/secure/precis"
)

// The life of a registration. It is written in two stores, in this order: our intent first,
// Keycloak second, our conclusion third. Each step may be repeated. Where the process may die
// between two of them, the comments name the window (R1 … R4, V3, E1, E2). One function
// repairs all of them: resume.
//
// What is typed before the address is proven counts for nothing, so that nobody owns the
// account of somebody else's address. The password comes with the proof.

const (
	doubtTime   = 10 * time.Minute // how long a creation without an answer may still arrive in Keycloak
	refusalTime = time.Hour        // how long a mail is refused before it is given up
)

// state is a registration's status as PostgreSQL spells it.
type state string

const (
	pending   state = "pending"
	verified  state = "verified"
	expired   state = "expired"
	cancelled state = "cancelled"
)

// mailState says whether Keycloak has taken the verification mail.
type mailState string

const (
	mailSent   mailState = "sent"
	mailQueued mailState = "queued" // the task keeps trying
	mailFailed mailState = "failed" // refused for good; the person may ask for another
)

// registration is one person's attempt to open an account. It only moves forward:
//
//	pending ─▶ verified
//	   ├─────▶ expired
//	   └─────▶ cancelled
//
// An invitation is a registration that has role and scope already.
type registration struct {
	ID            registrationID
	Email         string // compared without case; empty, like all personal data, when it has ended unverified
	Username      string // wished for; reserved by the confirmation
	FirstName     string
	LastName      string
	Phone         string
	TokenHash     string
	CodeHash      string
	State         state
	KeycloakID    string // empty until R3, and again after E3
	UserID        userID // empty until R3, and again after E1
	ResendCount   int
	ExpiresAt     time.Time // meaningful only while pending
	CreatedAt     time.Time
	Locale        string // of the mails
	Mail          mailState
	MailRefusedAt *time.Time // since when Keycloak's mail server refuses its mails
	Source        string     // sourceWeb, or sourceInternal: an invitation
	Role          string
	NetworkID     string
	StationID     string
	CreatedBy     string // user id of who has invited
}

// user is the users row of the registration, as far as Keycloak is to have it.
func (reg registration) user() user {
	return user{ID: reg.UserID, KeycloakID: reg.KeycloakID, Role: reg.Role, NetworkID: reg.NetworkID,
		StationID: reg.StationID}
}

// personalData is how somebody who gets an account wants to be called.
type personalData struct {
	Username  string `json:"username,omitempty" as:"username" minLength:"3" maxLength:"100" pattern:"^[^<>&\"'\\s$%!#?§,;:*~/\\\\|^=\\[\\]{}()\\x60]+$" example:"ada" description:"If none is chosen: the e-mail address, or the user id where Keycloak does not take that as a username."`
	FirstName string `json:"first_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Ada"`
	LastName  string `json:"last_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Lovelace"`
	Phone     string `json:"phone,omitempty" as:"phone" minLength:"1" pattern:"^\\+[ ()./-]*[1-9]([ ()./-]*[0-9]){6,14}[ ()./-]*$" example:"+4930123456" description:"With the country code. Stored in the form of E.164: without blanks, brackets and the like."`
}

// profile is what is known of somebody who gets an account.
type profile struct {
	Email string `json:"email" required:"true" maxLength:"255" format:"email" example:"ada@example.com"`
	personalData
	Locale string `json:"locale,omitempty" maxLength:"20" pattern:"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$" mismatch:"is not a language tag, like de or en" example:"en" description:"Language of the mails (BCP 47). Default: from Accept-Language."`
}

type registerIn struct{ profile }

// hints say what is to be done instead of sending a field that is not known.
func (registerIn) hints() map[string]string {
	return map[string]string{"password": "is chosen with the confirmation, not with the registration"}
}

type registerOut struct {
	RegistrationID    registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Email             string         `json:"email" example:"ada@example.com"`
	Username          string         `json:"username" example:"ada"`
	Status            string         `json:"status" enum:"pending_verification"`
	VerificationEmail mailState      `json:"verification_email" enum:"sent,queued" description:"queued: the mail could not be handed over now, the service keeps trying."`
	ExpiresAt         time.Time      `json:"expires_at"`
	ResendAvailableAt time.Time      `json:"resend_available_at"`
}

func (out registerOut) location() string {
	return "/api/v1/registrations/" + string(out.RegistrationID)
}

// register begins a registration, or goes on with the one that the address has already: then
// nothing that is typed now changes it, and a mail goes out only if the cooldown is over.
func (s *server) register(ctx context.Context, c caller, in registerIn) (registerOut, error) {
	reg, err := s.newRegistration(c, in.profile, sourceWeb)
	if err == nil {
		err = s.cfg.mayRegister(in.Email)
	}
	if err == nil {
		err = s.store.hitAddress(ctx, in.Email, s.now())
	}
	if err == nil {
		reg, err = s.open(ctx, c, reg, s.registerAgain)
	}
	if err != nil {
		return registerOut{}, registerError(err)
	}
	return registerOut{reg.ID, reg.Email, reg.Username, "pending_verification", reg.Mail, reg.ExpiresAt.UTC(),
		s.resendAvailableAt(ctx, reg)}, nil
}

// open begins a registration or an invitation. If the address has a pending registration, it goes on
// with that one by again, which is given both.
func (s *server) open(ctx context.Context, c caller, wanted registration,
	again func(ctx context.Context, c caller, has, wanted registration) (registration, error)) (registration, error) {
	for {
		reg, err := s.store.registrationByEmail(ctx, wanted.Email)
		switch {
		case err == nil && reg.State == pending:
			reg, err = again(ctx, c, reg, wanted)
		case err == nil, errors.Is(err, errNotFound):
			reg, err = s.begin(ctx, c, wanted)
		}
		raced := errors.Is(err, errRace) || errors.Is(err, problemAlreadyVerified) ||
			errors.Is(err, problemVerificationExpired) || errors.Is(err, problemVerificationCancelled)
		if !raced { // else it has begun, or ended, at this moment
			return reg, err
		}
	}
}

// newRegistration is a registration of what was typed, by somebody without role and scope.
func (s *server) newRegistration(c caller, p profile, source string) (registration, error) {
	var err error
	if p.Username, err = ownUsername(p.Username, p.Email); err != nil {
		return registration{}, err
	}
	id := newUserID()
	return registration{ID: newRegistrationID(), UserID: id, Email: p.Email, State: pending, Mail: mailQueued,
		Username:  cmp.Or(p.Username, defaultUsername(p.Email, id)),
		FirstName: p.FirstName, LastName: p.LastName, Phone: p.Phone, Locale: s.cfg.site.Match(p.Locale, c.Language),
		Source: source, Role: roleUser, CreatedAt: s.now(), ExpiresAt: s.now().Add(s.cfg.lifetime(source))}, nil
}

// lifetime is how long a registration waits for its confirmation.
func (cfg config) lifetime(source string) time.Duration {
	if source == sourceInternal {
		return cfg.InvitationTTL
	}
	return cfg.VerificationTTL
}

// ownUsername returns a wished username as it is compared (RFC 8265 §3.3), so that none looks like another's. It
// refuses another's address and user ids: people sign in with the former, and the latter are the defaults.
func ownUsername(username, email string) (string, error) {
	if username == "" {
		return "", nil
	}
	mapped, err := precis.UsernameCaseMapped.String(username)
	switch {
	case err == nil && mapped == strings.ToLower(email):
		return email, nil
	case err != nil:
		return "", invalid(fieldError{"username", "has a character that is not allowed"})
	case strings.Contains(mapped, "@"):
		return "", invalid(fieldError{"username", "must not be another e-mail address"})
	case strings.HasPrefix(mapped, "usr-"):
		return "", invalid(fieldError{"username", "must not begin like a user id"})
	}
	return mapped, nil
}

// defaultUsername is that of who has chosen none.
func defaultUsername(email string, id userID) string {
	if plainUsername.MatchString(email) {
		return email
	}
	return string(id)
}

// plainUsername is an address that Keycloak takes as a username: it refuses some
// characters that addresses may have (o'neil@…), and more than 100 of them.
var plainUsername = regexp.MustCompile(`^[A-Za-z0-9._@+-]{3,100}$`)

// registerError is what the person who registers is told about err.
func registerError(err error) error {
	var r rejected
	switch {
	case errors.As(err, &r):
		return invalid(r.Fields...)
	case errors.Is(err, errConflict):
		return problemUserExists
	}
	return err
}

// begin writes a new registration: R1 our pending row, R2 Keycloak's disabled user, R3 the
// users row, R4 the mail, R5 its state. What fails before R3 leaves nothing behind; from R3
// on the registration stands, and resume goes on with it. errRace: the address has one.
func (s *server) begin(ctx context.Context, c caller, reg registration) (registration, error) {
	if err := s.store.peek(ctx, s.now(), mailDay(reg.Email, reg.Source)); err != nil {
		return reg, err
	}
	token := newToken()
	reg.TokenHash = digest(token)
	t, err := s.store.addRegistration(ctx, c, reg, s.now()) // R1
	if err != nil {
		return reg, err
	}
	// Dying here (R1) leaves a pending row that Keycloak does not know: resume creates its user.
	reg, ku, err := s.create(ctx, c, t, reg, token) // R2, R3
	if err != nil {
		next, failed := never, s.end(ctx, c, t, reg, ku, cancelled, reasonOf(err))
		if errors.Is(err, errUnavailable) { // Keycloak may have it or not: the client does not wait
			next = s.now()
		}
		s.release(ctx, t, next, failed)
		return reg, err
	}
	// Dying here (R3) leaves the mail queued: resume sends it.
	reg, next, err := s.mail(ctx, c, t, reg, ku, false) // R4, R5
	s.release(ctx, t, next, err)
	return reg, nil
}

// reasonOf is why a registration could not begin, for the audit log.
func reasonOf(err error) string {
	switch {
	case errors.Is(err, errConflict):
		return problemUserExists.slug()
	case errors.As(err, new(rejected)):
		return problemInvalidRequest.slug()
	}
	return "keycloak"
}

// registerAgain goes on with a pending registration: it is mailed again, unless that is too soon or
// another request does so.
func (s *server) registerAgain(ctx context.Context, c caller, reg, _ registration) (registration, error) {
	waits := reg.Mail == mailQueued || s.now().Before(s.resendAvailableAt(ctx, reg))
	if waits && s.now().Before(reg.ExpiresAt) {
		return reg, nil
	}
	again, err := s.resendTo(ctx, c, reg)
	if errors.Is(err, errLocked) || errors.Is(err, problemResendTooSoon) {
		return reg, nil
	}
	return again, err
}

// resendAvailableAt is when the address may get another mail.
func (s *server) resendAvailableAt(ctx context.Context, reg registration) time.Time {
	var limited problem
	_ = errors.As(s.store.peek(ctx, s.now(), mailLimits(reg.Email, reg.Source, s.cfg.ResendCooldown)...), &limited)
	return s.now().Add(limited.Wait).UTC().Truncate(time.Second)
}

type resendIn struct {
	RegistrationID registrationID `json:"registration_id,omitempty" pattern:"^REG-[A-Za-z0-9_-]{16}$" mismatch:"is not the id of a registration" example:"REG-V1StGXR8_Z5jdHi6"`
	Email          string         `json:"email,omitempty" maxLength:"255" format:"email" example:"ada@example.com" description:"Instead of registration_id."`
}

func (resendIn) either() [][]string { return [][]string{{"registration_id"}, {"email"}} }

type resendOut struct {
	RegistrationID    registrationID `json:"registration_id,omitempty" example:"REG-V1StGXR8_Z5jdHi6"`
	Status            string         `json:"status" enum:"pending_verification,accepted" description:"accepted: the answer to an e-mail address, whatever is known of it."`
	VerificationEmail mailState      `json:"verification_email,omitempty" enum:"sent,queued"`
	ResendCount       *int           `json:"resend_count,omitempty" example:"1"`
	ExpiresAt         *time.Time     `json:"expires_at,omitempty"`
	ResendAvailableAt *time.Time     `json:"resend_available_at,omitempty"`
}

// resend mails the same link and a new code; the time to confirm begins anew. To an address
// the answer is the same, whatever is known of it: its mail is left to the queue.
func (s *server) resend(ctx context.Context, c caller, in resendIn) (resendOut, error) {
	if in.Email != "" {
		err := s.store.hitAddress(ctx, in.Email, s.now())
		if err == nil {
			err = s.store.requestResend(ctx, c, in.Email, s.cfg, s.now())
			s.wakeWorker()
		}
		return resendOut{Status: "accepted"}, err
	}
	reg, err := s.store.registration(ctx, in.RegistrationID)
	if err == nil {
		reg, err = s.resendTo(ctx, c, reg)
	}
	if errors.Is(err, errNotFound) || errors.Is(err, problemVerificationCancelled) {
		err = problemRegistrationNotFound
	}
	if err != nil {
		return resendOut{}, err
	}
	expires, available := reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg)
	return resendOut{reg.ID, "pending_verification", reg.Mail, &reg.ResendCount, &expires, &available}, nil
}

// resendTo sends the mail of a registration once more, because somebody has asked for it.
func (s *server) resendTo(ctx context.Context, c caller, reg registration) (registration, error) {
	reg, t, err := s.lockPending(ctx, c, reg)
	if err != nil {
		return reg, err
	}
	if reg.ResendCount+1 >= s.cfg.ResendLimit {
		err = problemResendLimit.retryAfter(reg.ExpiresAt.Sub(s.now())).withTarget(string(reg.ID))
		s.release(ctx, t, never, err)
		return reg, err
	}
	ku, err := s.awaitingUser(ctx, c, t, reg)
	if err != nil {
		return reg, err
	}
	reg, next, err := s.mail(ctx, c, t, reg, ku, true)
	s.release(ctx, t, next, err)
	if limited := (problem{}); errors.As(err, &limited) {
		return reg, limited.withTarget(string(reg.ID))
	} else if errors.Is(err, errMailQueued) {
		return reg, nil
	}
	return reg, err
}

type cancelIn struct {
	Token string `json:"token" required:"true" maxLength:"100" example:"p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx" description:"From the link."`
}

type cancelOut struct {
	RegistrationID registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Status         string         `json:"status" enum:"cancelled"`
}

// cancel is "this was not me": E1 our row, E2 Keycloak's user, E3 nothing is left.
func (s *server) cancel(ctx context.Context, c caller, in cancelIn) (cancelOut, error) {
	reg, err := s.store.registrationByToken(ctx, digest(in.Token))
	if errors.Is(err, errNotFound) {
		return cancelOut{}, problemInvalidToken
	}
	if err == nil {
		err = s.cancelPending(ctx, c, reg, "not_me")
	}
	if errors.Is(err, problemVerificationCancelled) { // again
		err = nil
	}
	return cancelOut{reg.ID, "cancelled"}, err
}

// cancelPending cancels a registration, for its person or for an administrator. While Keycloak is
// away the cancellation stands, and its task deletes Keycloak's user later.
func (s *server) cancelPending(ctx context.Context, c caller, reg registration, reason string) error {
	reg, t, err := s.lockPending(ctx, c, reg)
	if err != nil {
		return err
	}
	ku, err := s.keycloakUserOf(ctx, reg)
	if err == nil && ku.verified() { // V3: it is an account already
		_ = s.resumeNow(ctx, c, t) // else its task does it
		return problemAlreadyVerified.withTarget(string(reg.ID))
	}
	if err := s.store.endRegistration(ctx, c, t, reg, cancelled, reason, s.now()); err != nil { // E1
		s.release(ctx, t, never, err)
		return err
	}
	_ = s.resumeNow(ctx, c, t) // E2, E3; else its task does it
	return nil
}

type statusIn struct {
	ID registrationID `path:"registration_id" pattern:"^REG-[A-Za-z0-9_-]{16}$" example:"REG-V1StGXR8_Z5jdHi6"`
}

type statusOut struct {
	RegistrationID    registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Status            string         `json:"status" enum:"pending_verification,active,verification_expired,cancelled"`
	VerificationEmail mailState      `json:"verification_email" enum:"sent,queued,failed" description:"failed: the mail server has refused it for good."`
	ExpiresAt         time.Time      `json:"expires_at"`
	ResendAvailableAt time.Time      `json:"resend_available_at"`
	ResendCount       int            `json:"resend_count" example:"0"`
}

// status tells whoever knows the id how far a registration has come: neither who
// it is nor what became of the account.
func (s *server) status(ctx context.Context, _ caller, in statusIn) (statusOut, error) {
	reg, err := s.store.registration(ctx, in.ID)
	if errors.Is(err, errNotFound) {
		return statusOut{}, problemRegistrationNotFound
	} else if err != nil {
		return statusOut{}, err
	}
	word := map[state]string{pending: "pending_verification", verified: "active", expired: "verification_expired",
		cancelled: "cancelled"}[reg.State]
	if reg.State == pending && !s.now().Before(reg.ExpiresAt) {
		word = "verification_expired" // a GET changes nothing; the task will
	}
	return statusOut{reg.ID, word, reg.Mail, reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg), reg.ResendCount}, nil
}
