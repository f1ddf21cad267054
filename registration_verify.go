package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strings"

	"auth-service/templates"

	"github.com/Nerzal/gocloak/v13"
)

type verifyIn struct {
	Token        string `json:"token,omitempty" maxLength:"100" example:"p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx" description:"From the link."`
	Email        string `json:"email,omitempty" maxLength:"255" format:"email" example:"ada@example.com" description:"With code, instead of token."`
	Code         string `json:"code,omitempty" as:"digits" pattern:"^[0-9]{6}$" mismatch:"must be six digits" example:"042917"`
	Password     string `json:"password,omitempty" maxLength:"128" format:"password" example:"correct horse battery" description:"Handed to Keycloak and kept nowhere else. Without it Keycloak mails its own link to choose one."`
	personalData        // corrects what was typed at the registration
}

func (verifyIn) either() [][]string { return [][]string{{"token"}, {"email", "code"}} }

type verifyOut struct {
	RegistrationID    registrationID `json:"registration_id" example:"REG-V1StGXR8_Z5jdHi6"`
	UserID            userID         `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	Email             string         `json:"email" example:"ada@example.com"`
	Username          string         `json:"username" example:"ada"`
	Status            string         `json:"status" enum:"active"`
	AlreadyVerified   bool           `json:"already_verified"`
	SetPasswordMailed bool           `json:"set_password_mailed" description:"Keycloak has mailed its own link to choose the password, since none was sent."`
}

// verify confirms an address by the link's token, or by the address and its code, and makes
// the registration an account. Both stores must agree. V1 our row, V2 Keycloak's user, V3
// Keycloak's account with password, username and names in one call, V4 ours. It signs nobody in.
func (s *server) verify(ctx context.Context, c caller, in verifyIn) (verifyOut, error) {
	reg, err := s.registrationOf(ctx, c, in) // V1
	if err != nil {
		return verifyOut{}, err
	}
	reg, t, err := s.lockPending(ctx, c, reg)
	already := errors.Is(err, problemAlreadyVerified)
	switch {
	case already && in.Token == "" && !reg.hasCode("", in.Code):
		err = s.refuseCode(ctx, in.Email, reg.ID)
	case already:
		err = nil
	case err == nil:
		reg, err = s.activate(ctx, c, t, reg, in) // V2, V3, V4
	}
	if err != nil {
		return verifyOut{}, err
	}
	mailed := !already && in.Password == "" && s.mailPasswordLink(ctx, reg)
	return verifyOut{reg.ID, reg.UserID, reg.Email, reg.Username, "active", already, mailed}, nil
}

// registrationOf finds the registration that the token or the address belongs to. For a
// code it counts the attempt, also for an address that nobody has registered: the
// two must look alike from outside.
func (s *server) registrationOf(ctx context.Context, c caller, in verifyIn) (registration, error) {
	if in.Token != "" {
		reg, err := s.store.registrationByToken(ctx, digest(in.Token))
		if errors.Is(err, errNotFound) {
			err = problemInvalidToken
		}
		return reg, err
	}
	err := s.store.hit(ctx, s.now(), wrongCodes.of(clientNetwork(ctx))) // given back if the code is right
	if err != nil {
		return registration{}, err
	}
	reg, err := s.store.registrationByEmail(ctx, in.Email)
	unknown := errors.Is(err, errNotFound)
	if err == nil || unknown { // counted before it is compared: two hundred parallel guesses are two hundred
		err = s.store.hit(ctx, s.now(), codesTried.of(in.Email))
	}
	switch {
	case errors.Is(err, problemTooManyAttempts): // after the cooldown a new code may be had
		err = problemTooManyAttempts.retryAfter(s.cfg.ResendCooldown).withTarget(string(reg.ID))
	case err == nil && unknown:
		err = s.refuseCode(ctx, in.Email, "")
	}
	return reg, err
}

// refuseCode refuses a code for an address that waits for none. It takes the steps that a wrong code takes: V1, a lock,
// and V2 with a user that Keycloak has, this service's own. So the time says nothing.
func (s *server) refuseCode(ctx context.Context, email string, id registrationID) error {
	t, err := s.store.lock(ctx, "code:"+digest(strings.ToLower(email)), lockTime, s.now)
	if err != nil {
		return err
	}
	self, err := s.kc.ownID(ctx)
	if err == nil {
		_, err = s.kc.user(ctx, self)
	}
	s.release(ctx, t, never, nil)
	return cmp.Or(err, error(problemInvalidCode.withTarget(string(id))))
}

// activate makes a locked registration an account in both stores, and ends the lock.
func (s *server) activate(ctx context.Context, c caller, t task, reg registration, in verifyIn) (
	_ registration, err error) {
	defer func() {
		if err != nil {
			s.release(ctx, t, never, err)
		}
	}()
	ku, err := s.provenUser(ctx, c, t, reg, in) // V2
	if err == nil && !ku.verified() {           // else V3 has happened: what remains is our conclusion
		in.Username, err = ownUsername(in.Username, reg.Email)
		reg.Username, reg.Phone = cmp.Or(in.Username, reg.Username), cmp.Or(in.Phone, reg.Phone)
		reg.FirstName, reg.LastName = cmp.Or(in.FirstName, reg.FirstName), cmp.Or(in.LastName, reg.LastName)
		if err == nil {
			err = s.checkInviter(ctx, c, t, reg, ku)
		}
		if err == nil {
			ku, err = s.makeAccount(ctx, t, reg, ku, in.Password) // V3
		}
	}
	if err != nil {
		return reg, registerError(err) // refused: nothing has changed in Keycloak
	}
	// Dying here (V3) leaves an account in Keycloak that is pending in PostgreSQL: a second
	// click, a sign-in or the task finds it verified and concludes.
	if reg, err = s.markVerified(ctx, c, t, reg, ku); err != nil { // V4
		return reg, err
	}
	return reg, nil
}

// checkInviter cancels an invitation whose sender may not send it any more. Otherwise an administrator who was deleted
// could come back by it.
func (s *server) checkInviter(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) error {
	if reg.Source != sourceInternal {
		return nil
	}
	by, err := s.store.user(ctx, userID(reg.CreatedBy))
	if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	if err == nil && by.IsActive && by.principal().may(actCreate, reg.user()) == nil {
		return nil
	}
	err = s.end(ctx, c, t, reg, ku, cancelled, "inviter")
	return cmp.Or(err, error(problemVerificationCancelled.withTarget(string(reg.ID))))
}

// provenUser returns Keycloak's user of a locked registration if the token or code is the one
// that it carries (V2), in both stores.
func (s *server) provenUser(ctx context.Context, c caller, t task, reg registration, in verifyIn) (
	keycloakUser, error) {
	wrongCode := problemInvalidCode.withTarget(string(reg.ID))
	ku, err := s.kc.user(ctx, reg.KeycloakID)
	if errors.Is(err, errNotFound) { // not created yet, or deleted by an administrator
		if err = s.resumeNow(ctx, c, t); err == nil {
			reg, err = s.store.registration(ctx, reg.ID)
		}
		return ku, cmp.Or(err, reg.over(), error(wrongCode)) // if it is pending, it has another code now
	}
	if err != nil {
		return ku, err
	}
	token := ku.attribute(attrToken)
	if in.Token != "" {
		if !ku.verified() && !sameSecret(token, in.Token) {
			err = problemInvalidToken.withTarget(string(reg.ID))
		}
		return ku, err
	}
	if !reg.hasCode(token, in.Code) || !ku.verified() && !sameSecret(ku.attribute(attrCode), in.Code) {
		return ku, wrongCode
	}
	// A right code is no guess.
	return ku, refund(ctx, s.store.pool, wrongCodes.of(clientNetwork(ctx)), codesTried.of(reg.Email))
}

// hasCode says whether a code is the registration's. The key of its hash is the link's token, which only
// Keycloak has, and from V3 on the hash of that.
func (reg registration) hasCode(token, code string) bool {
	return sameSecret(reg.CodeHash, codeHash(token, code)) || sameSecret(reg.CodeHash, codeHash(reg.TokenHash, code))
}

// makeAccount makes Keycloak's user an account, as the registration says (V3). V3 removes the token,
// which is the key of the code's hash. So the code gets another key first: whoever sends it again is
// told that the address is confirmed.
func (s *server) makeAccount(ctx context.Context, t task, reg registration, ku keycloakUser, password string) (
	keycloakUser, error) {
	reg.CodeHash = codeHash(reg.TokenHash, ku.attribute(attrCode))
	if err := s.store.prepareVerified(ctx, t, reg); err != nil {
		return ku, err
	}
	return s.kc.activate(ctx, ku, reg, password)
}

// markVerified makes a registration verified in PostgreSQL, with the names that Keycloak has (V4). What
// else differs is reconciled afterwards. If somebody has the username in PostgreSQL, though Keycloak
// has accepted it, the full pass reports the conflict.
func (s *server) markVerified(ctx context.Context, c caller, t task, reg registration, ku keycloakUser) (
	registration, error) {
	reg.Username = gocloak.PString(ku.Username)
	reg.FirstName, reg.LastName = plainText(gocloak.PString(ku.FirstName)), plainText(gocloak.PString(ku.LastName))
	differs := !ku.enabled() || !ku.hasClaims(reg.user())
	err := s.store.markVerified(ctx, c, t, reg, differs, s.now())
	if errors.Is(err, errConflict) {
		reg.Username = string(reg.UserID)
		err = s.store.markVerified(ctx, c, t, reg, differs, s.now())
	}
	return reg, err
}

// addressPage is where the mail of a new address leads to. Keycloak changes the address when its link is opened; so
// the mail has ours, which changes nothing when a scanner opens it.
func (s *server) addressPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	if r.URL.Query().Get("key") == "" {
		return view{}, problemInvalidToken
	}
	link := s.cfg.issuer() + "/login-actions/action-token?" + r.URL.Query().Encode()
	return view{Status: 200, Page: templates.Message(templates.NewAddress(link))}, nil
}

// mailPasswordLink has Keycloak mail its own link to choose a password. Without it the person
// asks for one by "forgot password".
func (s *server) mailPasswordLink(ctx context.Context, reg registration) bool {
	err := s.kc.sendMail(ctx, reg.KeycloakID, reg.Locale, resetLifespan, choosePassword)
	if err != nil {
		s.log.WarnContext(ctx, "registration: link to choose a password not mailed", "registration", reg.ID, "error", err)
	}
	return err == nil
}
