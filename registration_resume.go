package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// lockPending locks a registration that waits for its confirmation. One whose time is over
// expires now. If it is not pending, its problem is returned, and there is no lock.
func (s *server) lockPending(ctx context.Context, c caller, reg registration) (registration, task, error) {
	if reg.State != pending {
		return reg, task{}, reg.over()
	}
	t, err := s.store.lock(ctx, string(reg.ID), lockTime, s.now)
	if err != nil {
		return reg, t, err
	}
	reg, err = s.store.registration(ctx, reg.ID)
	if err == nil && reg.State == pending && !s.now().Before(reg.ExpiresAt) {
		if err = s.resumeNow(ctx, c, t); err == nil {
			reg, err = s.store.registration(ctx, reg.ID)
		}
		return reg, t, cmp.Or(err, reg.over(), errLocked)
	}
	if errors.Is(err, errNotFound) { // it has ended long ago
		err = problemVerificationCancelled
	}
	if err = cmp.Or(err, reg.over()); err != nil {
		s.release(ctx, t, never, err)
	}
	return reg, t, err
}

// over is the problem of a registration that is not pending any more.
func (reg registration) over() error {
	switch reg.State {
	case pending:
		return nil
	case verified:
		return problemAlreadyVerified.withTarget(string(reg.ID))
	case expired:
		p := problemVerificationExpired.withTarget(string(reg.ID))
		if reg.Source == sourceInternal {
			p.Detail, p.retry = "The time to accept this invitation is over. Please ask for a new one.", "/"
		}
		return p
	}
	return problemVerificationCancelled.withTarget(string(reg.ID))
}

// awaitingUser returns Keycloak's user of a locked registration that can be mailed. One that Keycloak
// does not have, or not like that, is resumed, and the client tries again. An error ends the lock.
func (s *server) awaitingUser(ctx context.Context, c caller, t task, reg registration) (keycloakUser, error) {
	ku, err := s.kc.user(ctx, reg.KeycloakID)
	switch {
	case errors.Is(err, errNotFound), err == nil && !ku.awaitsVerification(): // not created yet, deleted, or verified
		_ = s.resumeNow(ctx, c, t) // else its task does it
		err = problemUnavailable.retryAfter(time.Second).withCause(err)
	case err != nil:
		s.release(ctx, t, never, err)
	}
	return ku, err
}

// create creates Keycloak's user of a pending registration (R2) and attaches it (R3).
// errConflict: an account has the address, or the username that is wished for.
func (s *server) create(ctx context.Context, c caller, t task, reg registration, token string) (
	registration, keycloakUser, error) {
	if !strings.EqualFold(reg.Username, defaultUsername(reg.Email, reg.UserID)) {
		if _, err := s.kc.userByUsername(ctx, reg.Username); !errors.Is(err, errNotFound) {
			return reg, keycloakUser{}, cmp.Or(err, errConflict)
		}
	}
	ku, err := s.kc.createUser(ctx, reg, token) // R2
	if errors.Is(err, errConflict) {
		if err = s.clearWay(ctx, reg.Email); err == nil {
			ku, err = s.kc.createUser(ctx, reg, token)
		}
	}
	if err != nil {
		return reg, ku, err
	}
	// Dying here (R2) leaves a user in Keycloak that PostgreSQL does not know: resume finds it
	// by the registration's id.
	reg, err = s.attach(ctx, c, t, reg, ku) // R3
	return reg, ku, err
}

// attach does R3, with the ids and the token that Keycloak's user carries.
func (s *server) attach(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) (
	registration, error) {
	reg.KeycloakID, reg.UserID = ku.id(), userID(ku.attribute(attrUserID))
	reg.TokenHash = digest(cmp.Or(ku.attribute(attrToken), newToken())) // V3 has removed it: nobody's
	return reg, s.store.attachKeycloakUser(ctx, c, t, reg, s.now())
}

// clearWay deletes Keycloak's user of a registration that has ended (E2 is still to be done), or of a user who is being
// erased, if that is what has the address. Otherwise it returns errConflict.
func (s *server) clearWay(ctx context.Context, email string) error {
	ku, err := s.kc.userByLogin(ctx, email)
	if errors.Is(err, errNotFound) { // gone at this moment
		return nil
	} else if err != nil {
		return err
	}
	if u, err := s.store.userByKeycloakID(ctx, ku.id()); err == nil && u.erased() { // X2 is still to be done
		return s.doNow(ctx, kcTask(ku.id()))
	}
	reg, err := s.store.registration(ctx, registrationID(ku.attribute(attrRegistrationID)))
	switch {
	case errors.Is(err, errNotFound), err == nil && !ku.awaitsVerification(), reg.State == pending, reg.State == verified:
		return errConflict
	case err != nil:
		return err
	}
	return s.doNow(ctx, string(reg.ID)) // by its task: Keycloak answers 500 to one of two who delete a user at once
}

// resumeNow resumes a registration in a request that has its lock, and ends the lock.
func (s *server) resumeNow(ctx context.Context, c caller, t task) error {
	next, err := s.resume(ctx, c, t)
	s.release(ctx, t, next, err)
	return err
}

// resume brings a locked registration to where it should be, whatever has happened to the
// process that moved it before. It is the repairer of every crash window, the expiry, and the
// one who sends queued mails. It returns when the registration needs it again.
func (s *server) resume(ctx context.Context, c caller, t task) (next time.Time, err error) {
	reg, err := s.store.registration(ctx, registrationID(t.ID))
	if errors.Is(err, errNotFound) || err == nil && reg.State == verified {
		return never, nil
	} else if err != nil {
		return never, err
	}
	ku, err := s.keycloakUserOf(ctx, reg)
	missing := errors.Is(err, errNotFound)
	if err != nil && !missing {
		return never, err
	}
	switch {
	case reg.State != pending && missing && reg.KeycloakID == "" && s.now().Before(reg.CreatedAt.Add(doubtTime)):
		return s.now().Add(time.Minute), nil // R2: a lost creation may still arrive
	case reg.State != pending && ku.verified(): // an account by now: nobody deletes it
		return never, s.store.detachKeycloakUser(ctx, t, reg.ID)
	case reg.State != pending: // E2, E3
		return never, s.deleteFromKeycloak(ctx, t, reg, ku)
	case ku.verified(): // V3
		return never, s.resumeVerified(ctx, c, t, reg, ku)
	case !s.now().Before(reg.ExpiresAt):
		return never, s.end(ctx, c, t, reg, ku, expired, "expired")
	case missing && reg.KeycloakID != "": // deleted in Keycloak
		return never, s.end(ctx, c, t, reg, ku, cancelled, "no_keycloak_user")
	case missing: // R1
		reg.UserID = newUserID() // R3 would have stored the former one
		reg, ku, err = s.create(ctx, c, t, reg, newToken())
	case !ku.awaitsVerification(): // an administrator of Keycloak has removed what the link is compared with
		return never, s.end(ctx, c, t, reg, ku, cancelled, "no_token")
	case reg.KeycloakID == "": // R2
		reg, err = s.attach(ctx, c, t, reg, ku)
	}
	if errors.Is(err, errConflict) || errors.As(err, new(rejected)) {
		return never, s.end(ctx, c, t, reg, ku, cancelled, reasonOf(err))
	}
	if err == nil && ku.enabled() { // R4: the mail window was left open
		err = s.closeMailWindow(ctx, t, reg)
	}
	if err == nil && reg.Mail == mailQueued {
		_, next, err = s.mail(ctx, c, t, reg, ku, false)
		return next, err
	}
	return reg.ExpiresAt, err
}

// end expires or cancels a registration: E1 our row, E2 Keycloak's user, E3 nothing is left.
func (s *server) end(ctx context.Context, c caller, t task, reg registration, ku keycloakUser,
	to state, reason string) error {
	if err := s.store.endRegistration(ctx, c, t, reg, to, reason, s.now()); err != nil { // E1
		return err
	}
	// Dying here (E1) leaves a user in Keycloak: the next resume deletes it.
	return s.deleteFromKeycloak(ctx, t, reg, ku)
}

// deleteFromKeycloak deletes the user of an ended registration, if Keycloak has it (E2), and
// records that nothing is left (E3).
func (s *server) deleteFromKeycloak(ctx context.Context, t task, reg registration, ku keycloakUser) error {
	ours := ku.id() == reg.KeycloakID || ku.attribute(attrRegistrationID) == string(reg.ID)
	if ku.id() != "" && ours { // nobody else's
		if err := s.kc.deleteUser(ctx, ku.id()); err != nil {
			return err
		}
	}
	// Dying here (E2) leaves the id of a user that is gone: the next resume removes it.
	return s.store.detachKeycloakUser(ctx, t, reg.ID)
}

// keycloakUserOf finds Keycloak's user of a registration, also if the answer to its creation
// was lost, or returns errNotFound.
func (s *server) keycloakUserOf(ctx context.Context, reg registration) (keycloakUser, error) {
	if reg.KeycloakID == "" {
		return s.kc.userOfRegistration(ctx, reg.ID)
	}
	return s.kc.user(ctx, reg.KeycloakID)
}

// resumeVerified concludes a registration that Keycloak has as verified: after V3, or because
// an administrator of Keycloak has confirmed the address.
func (s *server) resumeVerified(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) (err error) {
	if reg.KeycloakID == "" {
		reg, err = s.attach(ctx, c, t, reg, ku)
	}
	if err == nil && !ku.activated() {
		found := ku
		ku, err = s.makeAccount(ctx, t, reg, found, "")
		if errors.Is(err, errConflict) { // nobody is there to choose another username
			reg.Username = defaultUsername(reg.Email, reg.UserID)
			ku, err = s.makeAccount(ctx, t, reg, found, "")
		}
	}
	if err == nil {
		_, err = s.markVerified(ctx, c, t, reg, ku)
	}
	return err
}

// errMailQueued says that a mail could not be handed over now. The person need not do anything.
var errMailQueued = errors.New("the mail stays queued")

// mail hands one mail with a new code to Keycloak: the first one, a queued one, or one that was
// asked for (resend). Keycloak mails only to enabled users, so the user is enabled for a moment;
// its required action VERIFY_EMAIL keeps everybody from getting a token meanwhile.
//
// It returns what has become of the registration, and when its task is due next. errMailQueued:
// the task must try again. A limit's problem is returned only for a mail that was asked for.
func (s *server) mail(ctx context.Context, c caller, t task, reg registration, ku keycloakUser, resend bool) (
	registration, time.Time, error) {
	code, before := newCode(), reg
	reg.Mail, reg.CodeHash = mailQueued, codeHash(ku.attribute(attrToken), code)
	if resend {
		reg.ResendCount, reg.ExpiresAt = reg.ResendCount+1, s.now().Add(s.cfg.lifetime(reg.Source))
	}
	err := s.store.claimMail(ctx, c, t, reg, resend, s.cfg.ResendCooldown, s.now())
	if limited := (problem{}); errors.As(err, &limited) && !resend {
		return before, s.now().Add(limited.Wait), nil
	} else if err != nil {
		return before, never, err
	}
	// Dying from here on (R4) leaves the mail queued and the user perhaps enabled: resume sends
	// it and disables.
	if err = s.kc.prepareMail(ctx, ku, reg, code); err != nil {
		err = errors.Join(errMailNotSent, err)
	} else {
		lifespan := reg.ExpiresAt.Sub(s.now()).Round(time.Minute)
		err = s.kc.sendMail(ctx, reg.KeycloakID, reg.Locale, lifespan, verifyEmail)
	}
	next := reg.ExpiresAt
	if open := s.closeMailWindow(ctx, t, reg); open != nil {
		next = s.now().Add(retryPause(0))
		s.log.WarnContext(ctx, "registration: user not disabled after its mail, will retry",
			"registration", reg.ID, "error", open)
	}
	if err == nil {
		s.metrics.mails.WithLabelValues("sent").Inc()
		reg.Mail = mailSent
		return reg, next, s.store.mailHandedOver(ctx, c, t, reg, s.now()) // R5
	}
	s.metrics.mails.WithLabelValues("failed").Inc()
	s.log.WarnContext(ctx, "registration: mail queued", "registration", reg.ID, "error", err)
	if errors.Is(err, errMailNotSent) || errors.Is(err, errNotFound) { // certainly not sent
		givenUp, failed := s.store.mailRefused(ctx, c, reg, s.cfg.ResendCooldown, s.now())
		if givenUp && failed == nil {
			reg.Mail = mailFailed
			return reg, next, nil
		}
	}
	return reg, never, fmt.Errorf("%w: %w", errMailQueued, err)
}

// closeMailWindow disables the user again, whatever has happened, unless somebody
// else has verified the registration because this flow was slower than its lock.
func (s *server) closeMailWindow(ctx context.Context, t task, reg registration) error {
	ctx, cancel := detached(ctx, 10*time.Second)
	defer cancel()
	var err error
	for range 2 {
		if lost := s.store.extend(ctx, t, s.now()); lost != nil { // Keycloak knows whether somebody has
			var ku keycloakUser
			if ku, err = s.kc.user(ctx, reg.KeycloakID); err != nil {
				continue
			} else if ku.verified() {
				return nil
			}
		}
		if err = s.kc.disable(ctx, reg.KeycloakID); err == nil {
			return nil
		}
	}
	return err
}
