package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// mailLimits are the limits of an address. They count mails that were handed over.
func mailLimits(email string, cooldown time.Duration) []rateLimit {
	return []rateLimit{{"mail:" + tokenHash(strings.ToLower(email)), 1, cooldown, problemResendTooSoon}, mailsADay(email)}
}

func mailsADay(email string) rateLimit {
	return rateLimit{"mail-day:" + tokenHash(strings.ToLower(email)), mailsPerDay, 24 * time.Hour, problemResendLimit}
}

// lockOrExpire locks a registration that waits for its confirmation. One whose time is
// over expires now. Those that are not pending are returned without a lock.
func (s *server) lockOrExpire(ctx context.Context, c caller, reg registration) (registration, task, error) {
	if reg.State != pending {
		return reg, task{}, nil
	}
	t, err := s.store.lock(ctx, string(reg.ID), lockTime, s.now)
	if err != nil {
		return reg, t, err
	}
	reg, err = s.store.registration(ctx, reg.ID)
	switch {
	case errors.Is(err, errNotFound): // it has ended long ago
		reg.State = cancelled
		fallthrough
	case err == nil && reg.State != pending:
		s.unlock(ctx, t, nil)
		return reg, t, nil
	case err != nil:
		s.unlock(ctx, t, err)
		return reg, t, err
	case s.now().Before(reg.ExpiresAt):
		return reg, t, nil
	}
	failed := s.resumeNow(ctx, c, t)
	if reg, err = s.store.registration(ctx, reg.ID); err == nil && reg.State == pending {
		err = cmp.Or(failed, errLocked)
	}
	return reg, t, err
}

// create creates Keycloak's user of a pending registration (R2) and attaches it (R3).
// errConflict: an account has the address, or the username that is wished for.
func (s *server) create(ctx context.Context, c caller, t task, reg registration, token, code string) (registration, error) {
	if !strings.EqualFold(reg.Username, defaultUsername(reg.Email, reg.UserID)) {
		if _, err := s.kc.userByUsername(ctx, reg.Username); err == nil {
			return reg, errConflict
		} else if !errors.Is(err, errNotFound) {
			return reg, err
		}
	}
	id, err := s.kc.createUser(ctx, reg, token, code) // R2
	if errors.Is(err, errConflict) {
		if err = s.clearWay(ctx, reg.Email); err == nil {
			id, err = s.kc.createUser(ctx, reg, token, code)
		}
	}
	if err != nil {
		return reg, err
	}
	reg.KeycloakID = id
	// Dying here (R2) leaves a user in Keycloak that PostgreSQL does not know: resume finds it
	// by the registration's id.
	return reg, s.store.attachKeycloakUser(ctx, c, t, reg, s.now()) // R3
}

// clearWay deletes Keycloak's user of a registration that has ended, if that is what has the
// address (E2 is still to be done). Otherwise it returns errConflict.
func (s *server) clearWay(ctx context.Context, email string) error {
	ku, err := s.kc.userByLogin(ctx, email)
	if errors.Is(err, errNotFound) { // gone at this moment
		return nil
	} else if err != nil {
		return err
	}
	reg, err := s.store.registration(ctx, registrationID(ku.attribute(attrRegistrationID)))
	if errors.Is(err, errNotFound) || err == nil && (!ku.awaitsVerification() || reg.State == pending || reg.State == verified) {
		return errConflict
	} else if err != nil {
		return err
	}
	return s.doNow(ctx, string(reg.ID)) // its task deletes it: Keycloak answers 500 to one of two who delete a user at once
}

// rollBack ends a registration whose R2 or R3 has failed, so that nothing is half done.
// Whatever Keycloak may have of it, if its answer was lost, the task deletes.
func (s *server) rollBack(ctx context.Context, c caller, t task, reg registration, cause error) {
	reason := "keycloak"
	switch {
	case errors.Is(cause, errConflict):
		reason = problemUserExists.slug()
	case errors.As(cause, new(rejected)):
		reason = problemInvalidRequest.slug()
	}
	err := s.store.endRegistration(ctx, c, t, reg, cancelled, reason, s.now()) // E1
	switch {
	case err != nil:
		s.log.ErrorContext(ctx, "registration: rolled back later", "registration", reg.ID, "error", err)
		s.release(ctx, t, never, err)
	case errors.Is(cause, errUnavailable): // Keycloak may have it or not: the client does not wait
		s.release(ctx, t, s.now(), nil)
	case reg.KeycloakID == "": // refused
		s.release(ctx, t, never, nil)
	default:
		s.release(ctx, t, never, s.deleteFromKeycloak(ctx, t, reg, reg.KeycloakID))
	}
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
	end := func(to state, reason string) (time.Time, error) {
		if err := s.store.endRegistration(ctx, c, t, reg, to, reason, s.now()); err != nil { // E1
			return never, err
		}
		// Dying here (E1) leaves a user in Keycloak: the next resume deletes it.
		return never, s.deleteFromKeycloak(ctx, t, reg, ku.id())
	}
	switch {
	case reg.State != pending && missing && reg.KeycloakID == "" && s.now().Before(reg.CreatedAt.Add(doubtTime)):
		return s.now().Add(time.Minute), nil // R2: a lost creation may still arrive
	case reg.State != pending && !missing && ku.verified(): // an account by now: nobody deletes it
		return never, s.store.detachKeycloakUser(ctx, t, reg.ID)
	case reg.State != pending: // E2, E3
		return never, s.deleteFromKeycloak(ctx, t, reg, ku.id())
	case !missing && ku.verified(): // V3
		return never, s.resumeVerified(ctx, c, t, reg, ku)
	case !s.now().Before(reg.ExpiresAt):
		return end(expired, "expired")
	case missing && reg.KeycloakID != "": // deleted in Keycloak
		return end(cancelled, "no_keycloak_user")
	case missing: // R1
		return s.createAgain(ctx, c, t, reg, end)
	case !ku.awaitsVerification(): // an administrator of Keycloak has removed what the link is compared with
		return end(cancelled, "no_token")
	}
	if reg.KeycloakID == "" { // R2
		if reg, err = s.attachFound(ctx, c, t, reg, ku); errors.Is(err, errConflict) {
			return end(cancelled, problemUserExists.slug())
		} else if err != nil {
			return never, err
		}
	}
	if ku.enabled() { // R4: the mail window was left open
		if err := s.closeMailWindow(ctx, t, reg); err != nil {
			return never, err
		}
	}
	if reg.Mail == mailQueued {
		_, next, err = s.sendAgain(ctx, c, t, reg, ku, false)
		return next, err
	}
	return reg.ExpiresAt, nil
}

// keycloakUserOf finds Keycloak's user of a registration, also if the answer to its creation
// was lost, or returns errNotFound.
func (s *server) keycloakUserOf(ctx context.Context, reg registration) (keycloakUser, error) {
	if reg.KeycloakID == "" {
		return s.kc.userOfRegistration(ctx, reg.ID)
	}
	return s.kc.user(ctx, reg.KeycloakID)
}

// attachFound does R3 for a user that was found in Keycloak, with the ids and secrets that
// Keycloak's user carries.
func (s *server) attachFound(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) (registration, error) {
	reg.KeycloakID, reg.UserID = ku.id(), userID(ku.attribute(attrUserID))
	token := cmp.Or(ku.attribute(attrToken), newToken()) // V3 has removed it: nobody's
	reg.TokenHash, reg.CodeHash = tokenHash(token), codeHash(token, ku.attribute(attrCode))
	return reg, s.store.attachKeycloakUser(ctx, c, t, reg, s.now())
}

// createAgain goes on after R1 with new secrets.
func (s *server) createAgain(ctx context.Context, c caller, t task, reg registration, end func(state, string) (time.Time, error)) (time.Time, error) {
	token, code := newToken(), newCode()
	reg.UserID, reg.TokenHash, reg.CodeHash = newUserID(), tokenHash(token), codeHash(token, code)
	created, err := s.create(ctx, c, t, reg, token, code) // R2, R3
	switch {
	case errors.Is(err, errUnavailable):
		return never, err
	case err != nil && created.KeycloakID != "": // R3 was refused: the next resume finds the user
		return never, err
	case err != nil:
		return end(cancelled, "keycloak")
	}
	_, next, err := s.sendFirst(ctx, c, t, created, code)
	return next, err
}

// resumeVerified concludes a registration that Keycloak has as verified: after V3, or because
// an administrator of Keycloak has confirmed the address.
func (s *server) resumeVerified(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) (err error) {
	if reg.KeycloakID == "" {
		if reg, err = s.attachFound(ctx, c, t, reg, ku); err != nil {
			return err
		}
	}
	if !ku.activated() {
		reg.CodeHash = codeHash(reg.TokenHash, ku.attribute(attrCode))
		if err = s.store.prepareVerified(ctx, t, reg); err == nil {
			err = s.kc.activate(ctx, ku, reg, "")
		}
		if errors.Is(err, errConflict) { // nobody is there to choose another username
			reg.Username = defaultUsername(reg.Email, reg.UserID)
			err = s.kc.activate(ctx, ku, reg, "")
		}
		if err != nil {
			return err
		}
		ku.Username = &reg.Username
	}
	return s.concludeFound(ctx, c, t, reg, ku)
}

// deleteFromKeycloak deletes the user of an ended registration (E2; id "": it has none) and
// records that nothing is left (E3).
func (s *server) deleteFromKeycloak(ctx context.Context, t task, reg registration, id string) error {
	if id != "" {
		if err := s.kc.deleteUser(ctx, id); err != nil {
			return err
		}
	}
	// Dying here (E2) leaves the id of a user that is gone: the next resume removes it.
	return s.store.detachKeycloakUser(ctx, t, reg.ID)
}

// sendFirst sends the mail of a user who was just created and is disabled (R4).
func (s *server) sendFirst(ctx context.Context, c caller, t task, reg registration, code string) (registration, time.Time, error) {
	claim := mailClaim{CodeHash: reg.CodeHash, ExpiresAt: reg.ExpiresAt}
	return s.mail(ctx, c, t, reg, claim, func() error { return s.kc.setEnabled(ctx, reg.KeycloakID, true) })
}

// sendAgain sends a mail with a new code: a queued one, or one asked for (resend).
func (s *server) sendAgain(ctx context.Context, c caller, t task, reg registration, ku keycloakUser, resend bool) (registration, time.Time, error) {
	code := newCode()
	claim := mailClaim{Resend: resend, CodeHash: codeHash(ku.attribute(attrToken), code), ExpiresAt: reg.ExpiresAt}
	if resend {
		claim.ExpiresAt = s.now().Add(s.lifetime(reg.Source))
	}
	return s.mail(ctx, c, t, reg, claim, func() error { return s.kc.prepareMail(ctx, ku, reg, code) })
}

// lifetime is how long a registration waits for its confirmation.
func (s *server) lifetime(source string) time.Duration {
	if source == sourceInternal {
		return s.cfg.InvitationTTL
	}
	return s.cfg.VerificationTTL
}

// errMailQueued says that a mail could not be handed over now. The person need not do anything.
var errMailQueued = errors.New("the mail stays queued")

// mail hands one mail to Keycloak. Keycloak mails only to enabled users, so the user is
// enabled for a moment; its required action VERIFY_EMAIL keeps everybody from getting a token
// meanwhile.
//
// It returns what has become of the registration, and when its task is due next. A mail that
// was sent ends the lock, all else leaves it to the caller. errMailQueued: the task must try
// again. A limit's problem is returned only for a mail that was asked for.
func (s *server) mail(ctx context.Context, c caller, t task, reg registration, claim mailClaim, enable func() error) (registration, time.Time, error) {
	cooldown := s.cfg.ResendCooldown
	if reg.Source == sourceInternal && !claim.Resend {
		cooldown = 0 // who is invited again has waited for nothing
	}
	err := s.store.claimMail(ctx, c, t, reg, claim, cooldown, s.now())
	if limited := (problem{}); errors.As(err, &limited) && !claim.Resend {
		return reg, s.now().Add(limited.Wait), nil
	} else if err != nil {
		return reg, never, err
	}
	if reg.Mail, reg.ExpiresAt = mailQueued, claim.ExpiresAt; claim.Resend {
		reg.ResendCount++
	}
	// Dying from here on (R4) leaves the mail queued and the user perhaps enabled: resume sends
	// it and disables.
	if err = enable(); err != nil {
		err = errors.Join(errMailNotSent, err)
	} else {
		err = s.kc.sendMail(ctx, reg.KeycloakID, reg.Locale, reg.ExpiresAt.Sub(s.now()).Round(time.Minute), verifyEmail)
	}
	next := reg.ExpiresAt
	if disabled := s.closeMailWindow(ctx, t, reg); disabled != nil {
		next = s.now().Add(retryPause(0))
		s.log.WarnContext(ctx, "registration: user not disabled after its mail, will retry", "registration", reg.ID, "error", disabled)
	}
	if err == nil {
		s.metrics.mails.WithLabelValues("sent").Inc()
		reg.Mail = mailSent
		return reg, next, s.store.mailHandedOver(ctx, c, t, reg, next, s.now()) // R5
	}
	s.metrics.mails.WithLabelValues("failed").Inc()
	s.log.WarnContext(ctx, "registration: mail queued", "registration", reg.ID, "error", err)
	if errors.Is(err, errMailNotSent) || errors.Is(err, errNotFound) { // certainly not sent
		givenUp, failed := s.store.mailRefused(ctx, c, reg, cooldown, s.now())
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
		if err = s.kc.setEnabled(ctx, reg.KeycloakID, false); err == nil {
			return nil
		}
	}
	return err
}
