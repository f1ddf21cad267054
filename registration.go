package main

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"strings"
	"time"

	"auth-service/templates"

	gonanoid "github.com/matoous/go-nanoid/v2"
)

// The life of a registration. It is written in two stores, in this order: our
// intent first, Keycloak second, our conclusion third. Each step may be repeated,
// and where the process may die between two of them the comments name the window
// (R1 … R5, V3, E1, E2, C1, M1 … M3). One function repairs all of them: settle.

const (
	leaseTime    = 60 * time.Second // a flow must be over by then: see flowTime
	flowTime     = 40 * time.Second
	leaseWait    = time.Second      // how long a request waits for another one's lease; a call to Keycloak may follow
	retryTime    = 20 * time.Second // until the repair loop tries again what has failed
	doubtTime    = 10 * time.Minute // how long a creation without an answer may still arrive in Keycloak
	mailsPerDay  = 10               // to one address
	codeAttempts = 5                // per code
)

// registerLimit bounds how often one address is registered, whoever does it.
func registerLimit(email string) rateLimit {
	return rateLimit{"register:" + tokenHash(strings.ToLower(email)), 5, 10 * time.Minute, problemTooManyRequests}
}

// profile is what is known of somebody who gets an account.
type profile struct {
	Email     string `json:"email" required:"true" maxLength:"255" format:"email" example:"ada@example.com"`
	Username  string `json:"username,omitempty" minLength:"3" maxLength:"100" pattern:"^[^<>&\"'\\s$%!#?§,;:*~/\\\\|^=\\[\\]{}()\\x60]+$" example:"ada" description:"Default: the e-mail address, or the user id where that is longer than 100 characters."`
	FirstName string `json:"first_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Ada"`
	LastName  string `json:"last_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Lovelace"`
	Phone     string `json:"phone,omitempty" pattern:"^\\+[1-9][0-9]{6,14}$" mismatch:"is not a valid phone number; write it with the country code, like +4930123456" example:"+4930123456" description:"E.164, with the country code."`
	Locale    string `json:"locale,omitempty" maxLength:"20" pattern:"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$" mismatch:"is not a language tag, like de or en" example:"en" description:"Language of the mails (BCP 47). Default: from Accept-Language."`
}

type registerIn struct {
	profile
	Password string `json:"password,omitempty" maxLength:"128" format:"password" example:"correct horse battery" description:"Handed to Keycloak and kept nowhere else. Without it the person chooses one on Keycloak's page after verification."`
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

// register begins a registration: R1 our pending row, R2 Keycloak's disabled user,
// R3 our users row, R4 the mail, R5 its state. What fails before R3 leaves nothing
// behind; from R3 on the registration stands, and settle goes on with it.
func (s *server) register(ctx context.Context, c caller, in registerIn) (registerOut, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	if err := ownUsername(in.profile); err != nil {
		return registerOut{}, err
	}
	if err := s.store.hit(ctx, registerLimit(in.Email), s.now()); err != nil {
		return registerOut{}, err
	}
	if err := s.store.peek(ctx, mailsADay(in.Email), s.now()); err != nil {
		return registerOut{}, err
	}
	token, code := newToken(), newCode()
	reg := registration{
		ID: newRegistrationID(), UserID: newUserID(), Email: in.Email, Username: in.Username,
		FirstName: in.FirstName, LastName: in.LastName, Phone: in.Phone,
		TokenHash: tokenHash(token), CodeHash: codeHash(token, code), State: pending,
		ExpiresAt: s.now().Add(s.cfg.VerificationTTL), Mail: mailQueued,
		Locale: templates.Language(c.Language, in.Locale), WithPassword: in.Password != "",
	}
	reg.Username = cmp.Or(reg.Username, defaultUsername(reg.Email, reg.UserID))
	reg, err := s.begin(ctx, c, reg) // R1
	if err != nil {
		return registerOut{}, err
	}
	// Dying here (R1) leaves a pending row that Keycloak does not know: settle.
	reg.KeycloakID, err = s.kc.createUser(ctx, reg, token, code, in.Password) // R2
	if err != nil {
		s.abandon(ctx, c, reg, err)
		return registerOut{}, registerError(err)
	}
	// Dying here (R2) leaves a user in Keycloak that we do not know: settle finds
	// it by the registration's id.
	if err := s.store.adopt(ctx, c, reg, s.now()); err != nil { // R3
		s.abandon(ctx, c, reg, err)
		return registerOut{}, registerError(err)
	}
	// Dying here (R3) leaves the mail queued: settle.
	reg, err = s.sendFirst(ctx, c, reg, code) // R4, R5
	if err != nil {
		s.log.ErrorContext(ctx, "the verification mail is queued", "registration", reg.ID, "error", err)
	}
	return registerOut{reg.ID, reg.Email, reg.Username, "pending_verification", reg.Mail, reg.ExpiresAt.UTC(),
		s.resendAvailableAt(ctx, reg)}, nil
}

// ownUsername refuses another's address as the username: people sign in with either.
func ownUsername(p profile) error {
	if strings.Contains(p.Username, "@") && !strings.EqualFold(p.Username, p.Email) {
		return invalid(fieldError{"username", "must not be another e-mail address"})
	}
	return nil
}

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

// begin writes the pending row (R1). A pending registration of the same address is
// cancelled in the same transaction (C1), then deleted from Keycloak (C2); an ended
// one that still owes Keycloak a deletion is settled first.
func (s *server) begin(ctx context.Context, c caller, reg registration) (registration, error) {
	for {
		var replaced registration
		open, err := s.store.openRegistrations(ctx, reg.Email)
		if err != nil {
			return reg, err
		}
		for _, id := range open {
			earlier, err := s.lease(ctx, id)
			if err != nil {
				return reg, err
			}
			if earlier.State == pending {
				user, err := s.userOf(ctx, earlier)
				if errors.Is(err, errUnavailable) {
					s.letGo(ctx, earlier)
					return reg, err // while Keycloak is away, what there is stays as it is
				}
				if !user.activated() { // else V3 has happened
					replaced = earlier
					continue
				}
			}
			if err := s.settle(ctx, c, earlier); err != nil {
				return reg, err
			}
		}
		reg.Lease = gonanoid.Must()
		err = s.store.addRegistration(ctx, c, reg, replaced, s.now())
		if err == nil && replaced.ID != "" {
			// Dying here (C1) leaves a cancelled row with a user in Keycloak: settle.
			err = s.settle(ctx, c, withState(replaced, cancelled)) // C2
			if err != nil {
				s.abandon(ctx, c, reg, err)
			}
			return reg, err
		}
		if err == nil {
			return reg, nil
		}
		if replaced.ID != "" {
			s.letGo(ctx, replaced)
		}
		if !errors.Is(err, errRace) && !errors.Is(err, errLeaseLost) {
			return reg, registerError(err)
		} // else somebody registered the same address at this moment: replace theirs
	}
}

// abandon ends a registration whose R2 or R3 has failed, so that nothing is half
// done. Whatever Keycloak may have of it, if its answer was lost, settle deletes.
func (s *server) abandon(ctx context.Context, c caller, reg registration, cause error) {
	reason := "keycloak"
	switch {
	case errors.Is(cause, errConflict):
		reason = problemUserExists.slug()
	case errors.As(cause, new(rejected)):
		reason = problemInvalidRequest.slug()
	}
	err := s.store.endRegistration(ctx, c, reg, cancelled, reason, s.now())
	switch reg = withState(reg, cancelled); {
	case err != nil:
	case errors.Is(cause, errUnavailable):
		s.letGo(ctx, reg) // Keycloak may have it or not: the loop looks, the client doesn't wait
	case reg.KeycloakID == "":
		err = s.store.deleteUnverifiedUser(ctx, c, reg, s.now())
	default:
		err = s.settle(ctx, c, reg)
	}
	if err != nil {
		s.log.ErrorContext(ctx, "an abandoned registration is left to the repair loop", "registration", reg.ID, "error", err)
	}
}

func withState(reg registration, st state) registration { reg.State = st; return reg }

// lease makes this flow the only one that moves the registration, waiting a moment
// for another one to finish. It returns the row as it is then.
func (s *server) lease(ctx context.Context, id registrationID) (registration, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseWait)
	defer cancel()
	owner := gonanoid.Must()
	for {
		reg, err := s.store.takeLease(ctx, id, owner, s.now())
		if !errors.Is(err, errLeaseLost) {
			return reg, err
		}
		select {
		case <-ctx.Done():
			return reg, problemUnavailable.retryAfter(2 * time.Second).withCause(err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// touch leases a registration that waits for its confirmation. One whose time is
// over expires at this first touch; the others are returned without a lease.
func (s *server) touch(ctx context.Context, c caller, reg registration) (registration, error) {
	if reg.State != pending {
		return reg, nil
	}
	reg, err := s.lease(ctx, reg.ID)
	if err != nil {
		return reg, err
	}
	if reg.State != pending {
		s.letGo(ctx, reg)
		return reg, nil
	}
	if s.now().Before(reg.ExpiresAt) {
		return reg, nil
	}
	if err := s.settle(ctx, c, reg); err != nil {
		return reg, err
	}
	return s.store.registration(ctx, reg.ID)
}

// letGo ends the lease of a flow that stops early. The repair loop looks soon,
// whatever the row says: an answer of Keycloak may be lost, or a window still open.
func (s *server) letGo(ctx context.Context, reg registration) {
	due := s.now().Add(retryTime)
	if reg.State == verified {
		due = time.Time{}
	}
	if err := s.store.release(ctx, reg, due); err != nil {
		s.log.ErrorContext(ctx, "a lease was not released; it ends by itself", "registration", reg.ID, "error", err)
	}
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

type cancelIn struct {
	Token string `json:"token" required:"true" maxLength:"100" example:"p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx" description:"From the link."`
}

type cancelOut struct {
	RegistrationID registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Status         string         `json:"status" enum:"cancelled"`
}

// cancel is "this was not me": C1 our row, C2 Keycloak's user, E3 ours.
func (s *server) cancel(ctx context.Context, c caller, in cancelIn) (cancelOut, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	reg, err := s.store.registrationByToken(ctx, tokenHash(in.Token))
	if errors.Is(err, errNotFound) {
		return cancelOut{}, problemInvalidToken
	}
	if err == nil {
		reg, err = s.touch(ctx, c, reg)
	}
	if err != nil {
		return cancelOut{}, err
	}
	switch reg.State {
	case pending:
		if user, err := s.userOf(ctx, reg); err == nil && user.activated() { // V3
			return cancelOut{}, errors.Join(s.settle(ctx, c, reg), problemAlreadyVerified.withTarget(string(reg.ID)))
		}
		if err := s.store.endRegistration(ctx, c, reg, cancelled, "not_me", s.now()); err != nil {
			return cancelOut{}, err
		}
		if err := s.settle(ctx, c, withState(reg, cancelled)); err != nil && !errors.Is(err, errUnavailable) {
			return cancelOut{}, err
		} // while Keycloak is away the cancellation stands, and the repair loop deletes
	case verified:
		return cancelOut{}, problemAlreadyVerified.withTarget(string(reg.ID))
	case expired:
		return cancelOut{}, problemVerificationExpired.withTarget(string(reg.ID))
	}
	return cancelOut{reg.ID, "cancelled"}, nil
}

type statusIn struct {
	ID registrationID `path:"registration_id" pattern:"^REG-[A-Za-z0-9_-]{16}$" example:"REG-V1StGXR8_Z5jdHi6"`
}

type statusOut struct {
	RegistrationID    registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	Status            string         `json:"status" enum:"pending_verification,active,verification_expired,cancelled"`
	VerificationEmail mailState      `json:"verification_email" enum:"sent,queued"`
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
		word = "verification_expired" // a GET changes nothing; the loop will
	}
	return statusOut{reg.ID, word, reg.Mail, reg.ExpiresAt.UTC(), s.resendAvailableAt(ctx, reg), reg.ResendCount}, nil
}

// settle brings a leased registration to where it should be, whatever has happened
// to the process that moved it before, and ends the lease. It is the repairer of
// every crash window, the expiry, and the one who sends queued mails.
func (s *server) settle(ctx context.Context, c caller, reg registration) error {
	user, err := s.userOf(ctx, reg)
	known := err == nil
	if err != nil && !errors.Is(err, errNotFound) {
		s.letGo(ctx, reg)
		return err
	}
	if reg.State == pending && known && reg.KeycloakID == "" { // R2
		if reg, err = s.adopted(ctx, c, reg, user); errors.Is(err, errConflict) {
			return s.end(ctx, c, reg, cancelled, problemUserExists.slug())
		} else if err != nil {
			return err
		}
	}
	if reg.State == pending && known && user.enabled() && !user.verified() { // R4, M1 … M3: the mail window was left open
		if err := s.closeMailWindow(ctx, reg); err != nil {
			s.letGo(ctx, reg)
			return err
		}
	}
	switch {
	case reg.State == verified:
		return s.store.release(ctx, reg, time.Time{})

	case reg.State != pending && !known && reg.KeycloakID == "" && s.now().Before(reg.CreatedAt.Add(doubtTime)):
		return s.store.release(ctx, reg, s.now().Add(time.Minute)) // R2: a lost creation may still arrive

	case reg.State != pending: // E2, C2: Keycloak's user goes, then E3 ours
		if known && !user.activated() {
			if err := s.kc.deleteUser(ctx, user.id()); err != nil {
				s.letGo(ctx, reg)
				return err
			}
		}
		// Dying here (E2) leaves a users row: the next settle removes it.
		return s.store.deleteUnverifiedUser(ctx, c, reg, s.now())

	case known && user.verified(): // V3
		return s.finish(ctx, c, reg, user)

	case !s.now().Before(reg.ExpiresAt): // E1
		return s.end(ctx, c, reg, expired, "expired")

	case !known && (reg.KeycloakID != "" || reg.WithPassword): // deleted in Keycloak; or R1, and the password is gone
		return s.end(ctx, c, reg, cancelled, "no_keycloak_user")

	case !known: // R1, no password
		return s.createAgain(ctx, c, reg)

	case !user.awaitsVerification(): // an administrator of Keycloak has removed what the link is compared with
		return s.end(ctx, c, reg, cancelled, "no_token")

	case reg.Mail == mailQueued: // R3, R4, M1 … M3
		_, err := s.sendAgain(ctx, c, reg, user, false)
		return err
	}
	return s.store.release(ctx, reg, reg.ExpiresAt)
}

// createAgain goes on after R1 for a registration without a password: what the
// person has typed is all there.
func (s *server) createAgain(ctx context.Context, c caller, reg registration) error {
	token, code := newToken(), newCode()
	reg.UserID, reg.TokenHash, reg.CodeHash = newUserID(), tokenHash(token), codeHash(token, code)
	var err error
	reg.KeycloakID, err = s.kc.createUser(ctx, reg, token, code, "") // R2
	switch {
	case errors.Is(err, errUnavailable):
		s.letGo(ctx, reg)
		return err
	case err != nil:
		return s.end(ctx, c, reg, cancelled, "keycloak")
	}
	if err = s.store.adopt(ctx, c, reg, s.now()); err == nil { // R3
		_, err = s.sendFirst(ctx, c, reg, code)
	}
	return err
}

// userOf finds Keycloak's user of a registration, also if we have missed the
// answer to its creation.
func (s *server) userOf(ctx context.Context, reg registration) (keycloakUser, error) {
	if reg.State == verified {
		return keycloakUser{}, nil
	}
	if reg.KeycloakID == "" {
		return s.kc.userOfRegistration(ctx, reg.ID)
	}
	return s.kc.user(ctx, reg.KeycloakID)
}

// adopted does R3 for a user that was found in Keycloak, with the ids and secrets that
// Keycloak's user carries.
func (s *server) adopted(ctx context.Context, c caller, reg registration, user keycloakUser) (registration, error) {
	reg.KeycloakID, reg.UserID = user.id(), userID(user.attribute(attrUserID))
	token := cmp.Or(user.attribute(attrToken), newToken()) // V3 has removed it: nobody's
	reg.TokenHash, reg.CodeHash = tokenHash(token), codeHash(token, user.attribute(attrCode))
	return reg, s.store.adopt(ctx, c, reg, s.now())
}

// end expires or cancels a pending registration, in both stores.
func (s *server) end(ctx context.Context, c caller, reg registration, to state, reason string) error {
	if err := s.store.endRegistration(ctx, c, reg, to, reason, s.now()); err != nil { // E1
		return err
	}
	// Dying here (E1) leaves a user in Keycloak and a users row: the next settle.
	return s.settle(ctx, c, withState(reg, to))
}

// repair settles what is due: expired registrations, queued mails, and whatever a
// dead process has left. Instances share the work.
func (s *server) repair(ctx context.Context) error {
	start := s.now()
	return eachDue(ctx, s.log, func() (registration, error) {
		return s.store.takeDue(ctx, gonanoid.Must(), start, s.now())
	}, func(ctx context.Context, reg registration) error {
		return s.settle(ctx, system("repair"), reg)
	})
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
