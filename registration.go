package main

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"strings"
	"time"

	"auth-service/templates"
)

// The life of a registration. It is written in two stores, in this order: our intent first,
// Keycloak second, our conclusion third. Each step may be repeated. Where the process may die
// between two of them, the comments name the window (R1 … R4, V3, E1, E2). One function
// repairs all of them: resume.
//
// What is typed before the address is proven counts for nothing, so that nobody owns the
// account of somebody else's address. The password comes with the proof.

const (
	doubtTime    = 10 * time.Minute // how long a creation without an answer may still arrive in Keycloak
	refusalTime  = time.Hour        // how long a mail is refused before it is given up
	mailsPerDay  = 10               // to one address
	codeAttempts = 5                // per code that was mailed
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
	return user{ID: reg.UserID, KeycloakID: reg.KeycloakID, Role: reg.Role, NetworkID: reg.NetworkID, StationID: reg.StationID}
}

// profile is what is known of somebody who gets an account.
type profile struct {
	Email     string `json:"email" required:"true" maxLength:"255" format:"email" example:"ada@example.com"`
	Username  string `json:"username,omitempty" minLength:"3" maxLength:"100" pattern:"^[^<>&\"'\\s$%!#?§,;:*~/\\\\|^=\\[\\]{}()\\x60]+$" example:"ada" description:"Default: the e-mail address, or the user id where Keycloak does not take that as a username."`
	FirstName string `json:"first_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Ada"`
	LastName  string `json:"last_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Lovelace"`
	Phone     string `json:"phone,omitempty" pattern:"^\\+[1-9][0-9]{6,14}$" mismatch:"is not a valid phone number; write it with the country code, like +4930123456" example:"+4930123456" description:"E.164, with the country code."`
	Locale    string `json:"locale,omitempty" maxLength:"20" pattern:"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$" mismatch:"is not a language tag, like de or en" example:"en" description:"Language of the mails (BCP 47). Default: from Accept-Language."`
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
	VerificationEmail mailState      `json:"verification_email" enum:"sent,queued,failed" description:"queued: the mail could not be handed over now, the service keeps trying."`
	ExpiresAt         time.Time      `json:"expires_at"`
	ResendAvailableAt time.Time      `json:"resend_available_at"`
}

func (out registerOut) location() string {
	return "/api/v1/registrations/" + string(out.RegistrationID)
}

// register begins a registration, or goes on with the one that the address has already: then
// nothing that is typed now changes it, and a mail goes out only if the cooldown is over.
func (s *server) register(ctx context.Context, c caller, in registerIn) (registerOut, error) {
	reg, err := s.newRegistration(c, in.profile, s.cfg.VerificationTTL)
	for err == nil {
		var begun registration
		if begun, err = s.registerAgain(ctx, c, in.Email); errors.Is(err, errRace) {
			begun, err = s.begin(ctx, c, reg)
		}
		if errors.Is(err, errRace) { // another request was faster
			err = nil
			continue
		}
		if err == nil {
			return registerOut{begun.ID, begun.Email, begun.Username, "pending_verification", begun.Mail, begun.ExpiresAt.UTC(),
				s.resendAvailableAt(ctx, begun)}, nil
		}
	}
	return registerOut{}, registerError(err)
}

// newRegistration is a registration of what was typed, without secrets yet.
func (s *server) newRegistration(c caller, p profile, ttl time.Duration) (registration, error) {
	if err := ownUsername(p.Username, p.Email); err != nil {
		return registration{}, err
	}
	id := newUserID()
	return registration{ID: newRegistrationID(), UserID: id, Email: p.Email, Username: cmp.Or(p.Username, defaultUsername(p.Email, id)),
		FirstName: p.FirstName, LastName: p.LastName, Phone: p.Phone, State: pending, ExpiresAt: s.now().Add(ttl), CreatedAt: s.now(),
		Mail: mailQueued, Locale: templates.Language(c.Language, p.Locale), Source: sourceWeb, Role: roleUser}, nil
}

// ownUsername refuses another's address as the username: people sign in with either.
func ownUsername(username, email string) error {
	if strings.Contains(username, "@") && !strings.EqualFold(username, email) {
		return invalid(fieldError{"username", "must not be another e-mail address"})
	}
	return nil
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
	if err := s.store.peek(ctx, mailsADay(reg.Email), s.now()); err != nil {
		return reg, err
	}
	token, code := newToken(), newCode()
	reg.TokenHash, reg.CodeHash = tokenHash(token), codeHash(token, code)
	t, err := s.store.addRegistration(ctx, c, reg, s.now()) // R1
	if err != nil {
		return reg, err
	}
	// Dying here (R1) leaves a pending row that Keycloak does not know: resume creates its user.
	if reg, err = s.create(ctx, c, t, reg, token, code); err != nil { // R2, R3
		s.rollBack(ctx, c, t, reg, err)
		return reg, err
	}
	// Dying here (R3) leaves the mail queued: resume sends it.
	reg, next, err := s.sendFirst(ctx, c, t, reg, code) // R4, R5
	if err != nil || reg.Mail != mailSent {
		s.release(ctx, t, next, err)
	}
	return reg, nil
}

// registerAgain goes on with the pending registration of an address. errRace: there is none.
func (s *server) registerAgain(ctx context.Context, c caller, email string) (registration, error) {
	reg, err := s.store.registrationByEmail(ctx, email)
	if errors.Is(err, errNotFound) || err == nil && reg.State != pending {
		return reg, errRace
	} else if err != nil {
		return reg, err
	}
	waits := reg.Mail == mailQueued || s.now().Before(s.resendAvailableAt(ctx, reg))
	if waits && s.now().Before(reg.ExpiresAt) {
		return reg, nil
	}
	again, err := s.resendTo(ctx, c, reg)
	switch {
	case errors.Is(err, errLocked), errors.Is(err, problemResendTooSoon): // another request sends it
		return reg, nil
	case errors.Is(err, problemVerificationExpired), errors.Is(err, problemAlreadyVerified), errors.Is(err, problemRegistrationNotFound):
		return reg, errRace
	}
	return again, err
}

// resendAvailableAt is when the address may get another mail.
func (s *server) resendAvailableAt(ctx context.Context, reg registration) time.Time {
	at := s.now()
	for _, l := range mailLimits(reg.Email, s.cfg.ResendCooldown) {
		var limited problem
		if errors.As(s.store.peek(ctx, l, s.now()), &limited) {
			at = s.now().Add(limited.Wait)
		}
	}
	return at.UTC().Truncate(time.Second)
}

type resendIn struct {
	RegistrationID registrationID `json:"registration_id,omitempty" pattern:"^REG-[A-Za-z0-9_-]{16}$" mismatch:"is not the id of a registration" example:"REG-V1StGXR8_Z5jdHi6"`
	Email          string         `json:"email,omitempty" maxLength:"255" format:"email" example:"ada@example.com" description:"Instead of registration_id."`
}

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
	if (in.RegistrationID == "") == (in.Email == "") {
		return resendOut{}, invalid(fieldError{"registration_id", "is required, or else email"})
	}
	if in.Email != "" {
		err := s.store.requestResend(ctx, c, in.Email, s.cfg, s.now())
		s.wakeWorker()
		return resendOut{Status: "accepted"}, err
	}
	reg, err := s.store.registration(ctx, in.RegistrationID)
	if errors.Is(err, errNotFound) {
		err = problemRegistrationNotFound
	}
	if err == nil {
		reg, err = s.resendTo(ctx, c, reg)
	}
	if err != nil {
		return resendOut{}, err
	}
	expires, available := reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg)
	return resendOut{reg.ID, "pending_verification", reg.Mail, &reg.ResendCount, &expires, &available}, nil
}

// resendTo sends the mail of a registration once more, because somebody has asked for it.
func (s *server) resendTo(ctx context.Context, c caller, reg registration) (registration, error) {
	reg, t, err := s.lockOrExpire(ctx, c, reg)
	if err != nil {
		return reg, err
	}
	switch reg.State {
	case pending:
	case verified:
		return reg, problemAlreadyVerified.withTarget(string(reg.ID))
	case expired:
		return reg, problemVerificationExpired.withTarget(string(reg.ID))
	default:
		return reg, problemRegistrationNotFound
	}
	if reg.ResendCount+1 >= s.cfg.ResendLimit {
		err = problemResendLimit.retryAfter(reg.ExpiresAt.Sub(s.now())).withTarget(string(reg.ID))
		s.unlock(ctx, t, err)
		return reg, err
	}
	ku, err := s.kc.user(ctx, reg.KeycloakID)
	if err == nil && !ku.awaitsVerification() {
		err = errNotFound
	}
	if errors.Is(err, errNotFound) { // not created yet, deleted, or verified already
		s.resumeNow(ctx, c, t)
		return reg, problemUnavailable.retryAfter(time.Second).withCause(err)
	} else if err != nil {
		s.unlock(ctx, t, err)
		return reg, err
	}
	reg, next, err := s.sendAgain(ctx, c, t, reg, ku, true)
	switch limited := (problem{}); {
	case errors.As(err, &limited):
		s.unlock(ctx, t, err)
		return reg, limited.withTarget(string(reg.ID))
	case errors.Is(err, errMailQueued):
		s.release(ctx, t, next, err)
		return reg, nil
	case err != nil:
		s.unlock(ctx, t, err)
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
	reg, err := s.store.registrationByToken(ctx, tokenHash(in.Token))
	if errors.Is(err, errNotFound) {
		return cancelOut{}, problemInvalidToken
	}
	if err == nil {
		reg, err = s.cancelOpen(ctx, c, reg, "not_me")
	}
	return cancelOut{reg.ID, "cancelled"}, err
}

// cancelOpen cancels a registration, for its person or for an administrator. While Keycloak is
// away the cancellation stands, and its task deletes Keycloak's user later.
func (s *server) cancelOpen(ctx context.Context, c caller, reg registration, reason string) (registration, error) {
	reg, t, err := s.lockOrExpire(ctx, c, reg)
	if err != nil {
		return reg, err
	}
	switch reg.State {
	case verified:
		return reg, problemAlreadyVerified.withTarget(string(reg.ID))
	case expired:
		return reg, problemVerificationExpired.withTarget(string(reg.ID))
	case cancelled:
		return reg, nil
	}
	ku, err := s.keycloakUserOf(ctx, reg)
	if err == nil && ku.verified() { // V3: it is an account already
		s.resumeNow(ctx, c, t)
		return reg, problemAlreadyVerified.withTarget(string(reg.ID))
	}
	if err := s.store.endRegistration(ctx, c, t, reg, cancelled, reason, s.now()); err != nil { // E1
		s.unlock(ctx, t, err)
		return reg, err
	}
	s.resumeNow(ctx, c, t) // E2, E3
	return reg, nil
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
	word := map[state]string{pending: "pending_verification", verified: "active", expired: "verification_expired", cancelled: "cancelled"}[reg.State]
	if reg.State == pending && !s.now().Before(reg.ExpiresAt) {
		word = "verification_expired" // a GET changes nothing; the task will
	}
	return statusOut{reg.ID, word, reg.Mail, reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg), reg.ResendCount}, nil
}
