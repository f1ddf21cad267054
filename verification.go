package main

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"time"
)

// mailLimits are the budgets of an address. They count mails, not registrations,
// so that replacing a registration is no way around them.
func mailLimits(email string, cooldown time.Duration) []rateLimit {
	return []rateLimit{{"mail:" + tokenHash(strings.ToLower(email)), 1, cooldown, problemResendTooSoon}, mailsADay(email)}
}

func mailsADay(email string) rateLimit {
	return rateLimit{"mail-day:" + tokenHash(strings.ToLower(email)), mailsPerDay, 24 * time.Hour, problemResendLimit}
}

// sendFirst sends the mail of a user who was just created and is disabled (R4).
func (s *server) sendFirst(ctx context.Context, c caller, reg registration, code string) (registration, error) {
	claim := mailClaim{CodeHash: reg.CodeHash, ExpiresAt: reg.ExpiresAt}
	return s.mail(ctx, c, reg, claim, func() error { return s.kc.setEnabled(ctx, reg.KeycloakID, true) })
}

// sendAgain sends a mail with a new code: a queued one, or one asked for (resend).
func (s *server) sendAgain(ctx context.Context, c caller, reg registration, user keycloakUser, resend bool) (registration, error) {
	code := newCode()
	claim := mailClaim{Resend: resend, CodeHash: codeHash(user.attribute(attrToken), code), ExpiresAt: reg.ExpiresAt}
	if resend {
		claim.ExpiresAt = s.now().Add(s.cfg.VerificationTTL)
	}
	return s.mail(ctx, c, reg, claim, func() error { return s.kc.setCode(ctx, user, code) })
}

// mail hands one mail to Keycloak and ends the lease. Keycloak mails only to
// enabled users, so the user is enabled for a moment; its required action
// VERIFY_EMAIL keeps everybody from getting a token meanwhile.
//
// The returned registration says what has become of it. A mail that could not be
// sent stays queued, which is not an error unless the person asked for it (resend)
// and a limit stands against it.
func (s *server) mail(ctx context.Context, c caller, reg registration, claim mailClaim, enable func() error) (registration, error) {
	var limited problem
	err := s.store.claimMail(ctx, c, reg, claim, s.cfg.ResendCooldown, s.now())
	if errors.As(err, &limited) && !claim.Resend {
		return reg, s.store.release(ctx, reg, s.now().Add(limited.Wait)) // stays queued until the limit is over
	} else if err != nil {
		s.letGo(ctx, reg)
		return reg, err
	}
	if reg.Mail, reg.ExpiresAt = mailQueued, claim.ExpiresAt; claim.Resend {
		reg.ResendCount++
	}
	// Dying from here on (M1 … M3, R4) leaves the mail queued and the user perhaps
	// enabled: settle sends it and disables.
	if err = enable(); err != nil {
		err = errors.Join(errMailNotSent, err)
	} else {
		actions := choosePassword
		if reg.WithPassword {
			actions = verifyEmail
		}
		err = s.kc.sendMail(ctx, reg.KeycloakID, reg.Locale, reg.ExpiresAt.Sub(s.now()).Round(time.Minute), actions)
	}
	disabled := s.closeMailWindow(ctx, reg)
	if err == nil {
		s.metrics.mails.WithLabelValues("sent").Inc()
		reg.Mail = mailSent
		due := reg.ExpiresAt
		if disabled != nil {
			due = s.now().Add(retryTime)
		}
		return reg, s.store.mailHandedOver(ctx, c, reg, due, s.now()) // R5
	}
	if errors.Is(err, errMailNotSent) || errors.Is(err, errNotFound) { // certainly not sent
		err = errors.Join(err, s.store.refundMail(ctx, reg.Email, s.cfg.ResendCooldown))
	}
	s.metrics.mails.WithLabelValues("failed").Inc()
	s.log.WarnContext(ctx, "a verification mail stays queued", "registration", reg.ID, "error", errors.Join(err, disabled))
	return reg, s.store.release(ctx, reg, s.now().Add(retryTime))
}

// closeMailWindow disables the user again, whatever has happened, unless somebody
// else has verified the registration because this flow was slower than its lease.
func (s *server) closeMailWindow(ctx context.Context, reg registration) error {
	ctx, cancel := detached(ctx, 10*time.Second)
	defer cancel()
	var err error
	for range 2 {
		if held, lost := s.store.holds(ctx, reg, s.now()); lost != nil || !held { // Keycloak knows whether somebody has
			var user keycloakUser
			if user, err = s.kc.user(ctx, reg.KeycloakID); err != nil {
				continue
			} else if user.verified() {
				return nil
			}
		}
		if err = s.kc.setEnabled(ctx, reg.KeycloakID, false); err == nil {
			return nil
		}
	}
	return err
}

type verifyIn struct {
	Token string `json:"token,omitempty" maxLength:"100" example:"p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx" description:"From the link."`
	Key   string `json:"key,omitempty" maxLength:"4096" description:"From the link, if it has one: the way to the page where the password is chosen."`
	Email string `json:"email,omitempty" maxLength:"255" format:"email" example:"ada@example.com" description:"With code, instead of token."`
	Code  string `json:"code,omitempty" pattern:"^[0-9]{6}$" mismatch:"must be six digits" example:"042917"`
}

type verifyOut struct {
	RegistrationID  registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	UserID          userID         `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	Email           string         `json:"email" example:"ada@example.com"`
	Status          string         `json:"status" enum:"active"`
	AlreadyVerified bool           `json:"already_verified"`
	SetPasswordURL  *string        `json:"set_password_url" nullable:"true" description:"Where the person chooses a password; null if there is one, or if the way there was mailed."`
	PasswordMailed  bool           `json:"set_password_mailed" description:"Keycloak has mailed a link to choose the password: the address was confirmed by the code, and the way there is only in mails."`
}

// verify confirms an address by the link's token, or by the address and its code.
// Both stores must agree. V1 our row, V2 Keycloak's user, V3 Keycloak's account,
// V4 ours. It signs nobody in.
func (s *server) verify(ctx context.Context, c caller, in verifyIn) (verifyOut, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	if (in.Token == "") == (in.Code == "" || in.Email == "") {
		return verifyOut{}, invalid(fieldError{"token", "is required, or else email and code"})
	}
	if !actionKeyPattern.MatchString(in.Key) {
		return verifyOut{}, invalid(fieldError{"key", "is not a key of a link"})
	}
	reg, err := s.lookUp(ctx, in) // V1
	if err != nil {
		return verifyOut{}, err
	}
	if reg, err = s.touch(ctx, c, reg); err != nil {
		return verifyOut{}, err
	}
	switch reg.State {
	case pending:
		user, err := s.checkedUser(ctx, c, reg, in) // V2
		if err == nil {
			err = s.finish(ctx, c, reg, user) // V3, V4
		}
		if err != nil {
			return verifyOut{}, err
		}
		return s.verifyAnswer(ctx, reg, in, false), nil
	case verified:
		if in.Token == "" && !sameSecret(reg.CodeHash, codeHash(reg.TokenHash, in.Code)) {
			return verifyOut{}, problemInvalidCode.withTarget(string(reg.ID))
		}
		return s.verifyAnswer(ctx, reg, in, true), nil
	case expired:
		return verifyOut{}, problemVerificationExpired.withTarget(string(reg.ID))
	}
	return verifyOut{}, problemVerificationCancelled.withTarget(string(reg.ID))
}

// lookUp finds the registration that the token or the address belongs to. For a
// code it counts the attempt, also for an address that nobody has registered: the
// two must look alike from outside.
func (s *server) lookUp(ctx context.Context, in verifyIn) (registration, error) {
	if in.Token != "" {
		reg, err := s.store.registrationByToken(ctx, tokenHash(in.Token))
		if errors.Is(err, errNotFound) {
			err = problemInvalidToken
		}
		return reg, err
	}
	reg, err := s.store.registrationByEmail(ctx, in.Email)
	if err != nil && !errors.Is(err, errNotFound) {
		return reg, err
	}
	if reg.State != pending && reg.State != verified {
		key := "code:" + tokenHash(strings.ToLower(in.Email))
		err := s.store.hit(ctx, rateLimit{key, codeAttempts, 24 * time.Hour, problemTooManyAttempts}, s.now())
		if errors.As(err, new(problem)) {
			err = problemTooManyAttempts.retryAfter(s.cfg.ResendCooldown)
		} else if err == nil {
			err = problemInvalidCode
		}
		return reg, err
	}
	allowed, err := s.store.countCodeAttempt(ctx, reg.ID)
	if err == nil && !allowed {
		err = problemTooManyAttempts.retryAfter(s.cfg.ResendCooldown).withTarget(string(reg.ID)) // by then a new code may be had
	}
	return reg, err
}

// checkedUser returns Keycloak's user of a leased registration if the token or
// code is the one that it carries (V2), in both stores. Otherwise it ends the lease.
func (s *server) checkedUser(ctx context.Context, c caller, reg registration, in verifyIn) (keycloakUser, error) {
	user, err := s.kc.user(ctx, reg.KeycloakID)
	if errors.Is(err, errNotFound) {
		// Not created yet, or deleted by an administrator: settle knows.
		err = s.settle(ctx, c, reg)
		if err == nil {
			reg, err = s.store.registration(ctx, reg.ID)
		}
		switch {
		case err != nil:
			return user, err
		case reg.State == pending: // it is created now, with another code
			return user, problemInvalidCode.withTarget(string(reg.ID))
		}
		return user, problemVerificationCancelled.withTarget(string(reg.ID))
	}
	token := user.attribute(attrToken)
	switch {
	case err != nil:
	case user.verified(): // V3 had happened: what remains is our conclusion
		if in.Token == "" && !sameSecret(reg.CodeHash, codeHash(reg.TokenHash, in.Code)) {
			err = problemInvalidCode.withTarget(string(reg.ID))
		}
	case in.Token != "" && !sameSecret(token, in.Token):
		err = problemInvalidToken.withTarget(string(reg.ID))
	case in.Token == "" && !(sameSecret(user.attribute(attrCode), in.Code) &&
		(sameSecret(reg.CodeHash, codeHash(token, in.Code)) || sameSecret(reg.CodeHash, codeHash(reg.TokenHash, in.Code)))):
		err = problemInvalidCode.withTarget(string(reg.ID))
	}
	if err != nil {
		s.letGo(ctx, reg)
	}
	return user, err
}

// finish makes a leased registration an account in both stores. V3 removes the
// token and with it the key of the code's hash; so the code gets another key
// first, or who sends it again could not be told that all is well. An account that is
// disabled was disabled since, and stays so.
func (s *server) finish(ctx context.Context, c caller, reg registration, user keycloakUser) error {
	var err error
	if code := user.attribute(attrCode); code != "" {
		err = s.store.rekeyCode(ctx, reg, codeHash(reg.TokenHash, code))
	}
	if err == nil && !user.activated() {
		err = s.kc.activate(ctx, user) // V3
	}
	if err != nil {
		s.letGo(ctx, reg)
		return err
	}
	// Dying here (V3) leaves an account in Keycloak that is pending here: a second
	// click, a sign-in or the repair loop finds it verified and goes on.
	if err := s.store.conclude(ctx, c, reg, s.now()); err != nil { // V4
		return err
	}
	// What was changed in Keycloak while it waited comes here, or goes there, now.
	if err := s.reconcile(ctx, c, reg.KeycloakID); err != nil {
		s.log.WarnContext(ctx, "a user is not in step", "keycloak_id", reg.KeycloakID, "error", err)
	}
	return nil
}

func (s *server) verifyAnswer(ctx context.Context, reg registration, in verifyIn, already bool) verifyOut {
	out := verifyOut{reg.ID, reg.UserID, reg.Email, "active", already, s.setPasswordURL(reg, in.Key), false}
	if !reg.WithPassword && in.Key == "" && !already {
		// Verified by the code: the key is only in the mail. Keycloak mails its own link.
		err := s.kc.sendMail(ctx, reg.KeycloakID, reg.Locale, s.cfg.VerificationTTL, choosePassword)
		if out.PasswordMailed = err == nil; err != nil {
			s.log.WarnContext(ctx, "the mail to choose a password was not sent", "registration", reg.ID, "error", err)
		}
	}
	return out
}

// setPasswordURL is Keycloak's page for those who have registered without a
// password, if their link had the key to it; else nil.
func (s *server) setPasswordURL(reg registration, key string) *string {
	if reg.WithPassword || key == "" || !actionKeyPattern.MatchString(key) {
		return nil
	}
	url := s.kc.passwordURL(key)
	return &url
}

// actionKeyPattern is what a key of Keycloak's links looks like, a JWT; or nothing.
var actionKeyPattern = regexp.MustCompile(`^[A-Za-z0-9._-]*$`)

type resendIn struct {
	RegistrationID registrationID `json:"registration_id,omitempty" pattern:"^REG-[A-Za-z0-9_-]{16}$" mismatch:"is not the id of a registration" example:"REG-V1StGXR8_Z5jdHi6"`
	Email          string         `json:"email,omitempty" maxLength:"255" format:"email" example:"ada@example.com" description:"Instead of registration_id."`
}

type resendOut struct {
	RegistrationID    registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Status            string         `json:"status" enum:"pending_verification"`
	VerificationEmail mailState      `json:"verification_email" enum:"sent,queued"`
	ResendCount       int            `json:"resend_count" example:"1"`
	ExpiresAt         time.Time      `json:"expires_at"`
	ResendAvailableAt time.Time      `json:"resend_available_at"`
}

// resend mails the same link and a new code; the time to confirm begins anew.
func (s *server) resend(ctx context.Context, c caller, in resendIn) (resendOut, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	if (in.RegistrationID == "") == (in.Email == "") {
		return resendOut{}, invalid(fieldError{"registration_id", "is required, or else email"})
	}
	var reg registration
	var err error
	if in.RegistrationID != "" {
		reg, err = s.store.registration(ctx, in.RegistrationID)
	} else {
		reg, err = s.store.registrationByEmail(ctx, in.Email)
	}
	if err == nil {
		reg, err = s.touch(ctx, c, reg)
	}
	if err != nil && !errors.Is(err, errNotFound) {
		return resendOut{}, err
	}
	switch reg.State {
	case pending:
	case verified:
		return resendOut{}, problemAlreadyVerified.withTarget(string(reg.ID))
	case expired:
		return resendOut{}, problemVerificationExpired.withTarget(string(reg.ID))
	default: // unknown, or cancelled: there is none
		return resendOut{}, problemRegistrationNotFound
	}
	if reg.ResendCount+1 >= s.cfg.ResendLimit {
		s.letGo(ctx, reg)
		return resendOut{}, problemResendLimit.retryAfter(reg.ExpiresAt.Sub(s.now())).withTarget(string(reg.ID))
	}
	user, err := s.kc.user(ctx, reg.KeycloakID)
	if err != nil || !user.awaitsVerification() {
		// Unfinished, deleted, spoilt, or verified already: settle knows, if Keycloak answers.
		if !errors.Is(err, errUnavailable) {
			return resendOut{}, errors.Join(s.settle(ctx, c, reg), problemUnavailable.retryAfter(time.Second).withCause(err))
		}
		s.letGo(ctx, reg)
		return resendOut{}, err
	}
	reg, err = s.sendAgain(ctx, c, reg, user, true)
	if limited := (problem{}); errors.As(err, &limited) {
		return resendOut{}, limited.withTarget(string(reg.ID))
	} else if err != nil {
		return resendOut{}, err
	}
	return resendOut{reg.ID, "pending_verification", reg.Mail, reg.ResendCount, reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg)}, nil
}
