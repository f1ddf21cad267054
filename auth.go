package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/oauth2"
)

// loginLimit bounds the attempts on one account, from wherever they come. Keycloak
// locks an account after wrong passwords; this keeps the guessing away from it.
func loginLimit(login string) rateLimit {
	return rateLimit{addressKey("login", login), 20, time.Minute, problemTooManyRequests}
}

type loginIn struct {
	Username string `json:"username,omitempty" maxLength:"255" example:"ada"`
	Email    string `json:"email,omitempty" maxLength:"255" example:"ada@example.com" description:"Instead of username."`
	Password string `json:"password" required:"true" maxLength:"128" format:"password" example:"correct horse battery"`
}

type loginOut struct {
	tokenResponse
	User loginUser `json:"user"`
}

type loginUser struct {
	UserID    userID   `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	Email     string   `json:"email" example:"ada@example.com"`
	Username  string   `json:"username" example:"ada"`
	Roles     []string `json:"roles" example:"[\"user\"]"`
	NetworkID string   `json:"network_id"`
	StationID string   `json:"station_id"`
}

// login signs a person in: L1 Keycloak's tokens, L2 our session. No tokens are
// handed out without their row.
func (s *server) login(ctx context.Context, c caller, in loginIn) (loginOut, error) {
	name := in.Username
	if name == "" {
		name = in.Email
	}
	if (in.Username == "") == (in.Email == "") {
		return loginOut{}, invalid(fieldError{"username", "is required, or else email"})
	}
	if err := s.store.hit(ctx, loginLimit(name), s.now()); err != nil {
		return loginOut{}, err
	}
	token, err := s.kc.signIn(ctx, name, in.Password) // L1
	if err != nil {
		return loginOut{}, s.loginError(ctx, name, err)
	}
	return s.openSession(ctx, c, token, "") // L2
}

// openSession stores the session of fresh tokens (L2) and makes the answer. Without
// its row a session is ended again in Keycloak. The nonce is that of a code flow.
func (s *server) openSession(ctx context.Context, c caller, token *oauth2.Token, nonce string) (out loginOut, err error) {
	claims, err := readClaims(token.AccessToken)
	if err == nil && claims.SessionID == "" {
		err = errors.New("keycloak's access token: sid is missing")
	}
	if err != nil {
		return loginOut{}, err
	}
	// Dying here (L1) leaves a session in Keycloak that nobody has the tokens of; it
	// dies of idleness.
	defer func() {
		if err != nil {
			err = errors.Join(err, s.kc.endSession(ctx, claims.SessionID))
		}
	}()
	if nonce != "" {
		if err := s.verifier.idToken(ctx, token, nonce); errors.Is(err, errUnavailable) {
			return loginOut{}, err
		} else if err != nil {
			return loginOut{}, problemSignInIncomplete.withCause(err)
		}
	}
	if token.RefreshToken == "" {
		return loginOut{}, errors.New("keycloak issues no refresh tokens; see the client's setting \"use refresh tokens\"")
	}
	out = loginOut{tokenResponse: newTokenResponse(token, newSessionID())}
	row := session{ID: out.SessionID, KeycloakID: claims.SessionID,
		ExpiresAt: s.now().Add(time.Duration(out.RefreshExpiresIn) * time.Second)}
	u, err := s.store.addSession(ctx, c, claims.Subject, row, tokenHash(out.RefreshToken), s.now())
	if errors.Is(err, errNotFound) {
		if _, err = s.accountOf(ctx, claims.Subject); err == nil {
			u, err = s.store.addSession(ctx, c, claims.Subject, row, tokenHash(out.RefreshToken), s.now())
		}
	}
	if err == nil && !claims.match(u) {
		row.UserID = u.ID
		if out.tokenResponse, err = s.exchangeFirst(ctx, c, row, u, token.RefreshToken); err != nil { // nobody has its tokens
			_, ended := s.signOut(ctx, c, u, row.ID, entry{Action: "session.end", Reason: "unfinished"})
			if errors.Is(err, problemInvalidRefreshToken) { // disabled at this moment
				err = problemAccountDisabled.withTarget(string(u.ID))
			}
			return loginOut{}, errors.Join(err, ended)
		}
	}
	out.User = loginUser{u.ID, u.Email, u.Username, []string{u.Role}, u.NetworkID, u.StationID}
	return out, err
}

// exchangeFirst replaces fresh tokens that do not say what is true of the user in PostgreSQL.
func (s *server) exchangeFirst(ctx context.Context, c caller, row session, u user, token string) (tokenResponse, error) {
	t, err := s.store.lock(ctx, "token:"+tokenHash(token), rotationLock, s.now)
	if err != nil {
		return tokenResponse{}, err
	}
	answer, err := s.rotate(ctx, c, t, row, u, token)
	if err != nil {
		s.release(ctx, t, never, nil)
	}
	return answer, err
}

// accountOf returns the account that Keycloak has just let in, if it is one in PostgreSQL, too.
// Somebody whom only Keycloak has is imported. A verification that died between the two stores
// (V3) is concluded first.
func (s *server) accountOf(ctx context.Context, subject string) (user, error) {
	u, err := s.store.userByKeycloakID(ctx, subject)
	if err == nil && u.RegistrationOpen {
		var reg registration
		if reg, err = s.store.openRegistrationOf(ctx, u.ID); err == nil {
			err = s.doNow(ctx, string(reg.ID))
		}
		if err != nil && !errors.Is(err, errNotFound) {
			return u, err
		}
		u, err = s.store.userByKeycloakID(ctx, subject)
	}
	// Created in Keycloak; or it has a new address, confirmed in Keycloak.
	if errors.Is(err, errNotFound) || err == nil && u.IsActive && !u.IsVerified {
		unfit := s.doNow(ctx, kcTask(subject))
		if unfit != nil && !errors.Is(unfit, errConflict) {
			return u, unfit
		}
		u, err = s.store.userByKeycloakID(ctx, subject) // also if another sign-in was faster
		if errors.Is(err, errNotFound) && unfit != nil {
			return u, problemAccountUnfit
		}
	}
	switch {
	case errors.Is(err, errNotFound): // it is gone again, or its registration has just ended
		return u, problemAccountSetupRequired
	case err != nil:
		return u, err
	case !u.IsActive:
		return u, problemAccountDisabled.withTarget(string(u.ID)) // the stricter store wins
	case u.IsVerified:
		return u, nil
	}
	return u, problemAccountNotVerified.withTarget(string(u.ID))
}

// loginError says why Keycloak has let nobody in. An account that waits for its
// confirmation is disabled in Keycloak, whatever the password, and only not fully
// set up while its mail is being sent.
func (s *server) loginError(ctx context.Context, name string, err error) error {
	wrong := errors.Is(err, errInvalidCredentials)
	if !wrong && !errors.Is(err, errAccountDisabled) && !errors.Is(err, errSetupRequired) {
		return err
	}
	account, lookup := s.store.accountByLogin(ctx, name) // whether there is one or not: that takes as long
	if lookup != nil {
		return lookup
	} else if wrong {
		return problemInvalidCredentials.withTarget(account)
	}
	reg, lookup := s.store.registrationByLogin(ctx, name)
	if lookup == nil {
		return problemAccountNotVerified.withTarget(string(reg.ID))
	} else if !errors.Is(lookup, errNotFound) {
		return lookup
	}
	if errors.Is(err, errAccountDisabled) {
		return problemAccountDisabled.withTarget(account)
	}
	u, lookup := s.kc.userByLogin(ctx, name)
	if lookup != nil {
		return lookup
	}
	return setupRequired(u)
}

// setupRequired says what Keycloak still wants from a person whose password is right.
func setupRequired(u keycloakUser) problem {
	p := problemAccountSetupRequired.withTarget(u.attribute(attrUserID))
	sentences := map[string]string{
		"UPDATE_PASSWORD":                "A new password has to be chosen first. Follow the link in your mail, or ask for a new one with \"forgot password\".",
		"CONFIGURE_TOTP":                 "A one-time-code app has to be set up first. Please sign in on the sign-in server's page.",
		"VERIFY_EMAIL":                   "The e-mail address has to be confirmed first. Please sign in on the sign-in server's page.",
		"UPDATE_PROFILE":                 "The profile has to be completed first. Please sign in on the sign-in server's page.",
		"VERIFY_PROFILE":                 "The profile has to be completed first. Please sign in on the sign-in server's page.",
		"TERMS_AND_CONDITIONS":           "The terms have to be accepted first. Please sign in on the sign-in server's page.",
		"webauthn-register":              "A security key has to be set up first. Please sign in on the sign-in server's page.",
		"webauthn-register-passwordless": "A passkey has to be set up first. Please sign in on the sign-in server's page.",
	}
	if u.RequiredActions != nil {
		for _, action := range *u.RequiredActions {
			if sentence, ok := sentences[action]; ok {
				return p.withDetail(sentence)
			}
		}
	}
	return p.withDetail("Something has to be set up first. Please sign in on the sign-in server's page.")
}

// readClaims reads a token that has just come from Keycloak's token endpoint itself;
// no signature is needed to know its origin (OpenID Connect Core §3.1.3.7).
func readClaims(token string) (tokenClaims, error) {
	var c tokenClaims
	signed, err := jose.ParseSignedCompact(token, tokenAlgorithms)
	if err == nil {
		c, err = claimsOf(signed)
	}
	if err == nil && c.Subject == "" {
		err = errors.New("sub is missing")
	}
	if err != nil {
		return c, fmt.Errorf("keycloak's access token: %w", err)
	}
	return c, nil
}

// me is the account of the access token, as PostgreSQL knows it now.
func (s *server) me(ctx context.Context, c caller, _ struct{}) (user, error) {
	u, err := s.store.user(ctx, c.UserID)
	switch {
	case errors.Is(err, errNotFound): // the token's account is gone
		return u, problemInvalidAccessToken
	case err == nil && !u.IsActive:
		return u, problemAccountDisabled
	}
	return u, err
}

type forgotIn struct {
	Email string `json:"email" required:"true" maxLength:"255" format:"email" example:"ada@example.com"`
}

// resetLifespan is how long Keycloak's link to choose a new password works.
const resetLifespan = time.Hour

// forgotPassword has Keycloak mail its link to choose a new password. The answer is the
// same, and comes as fast, whether there is such an account or not, and when a limit
// stands against the mail.
func (s *server) forgotPassword(ctx context.Context, c caller, in forgotIn) (noContent, error) {
	for _, l := range []rateLimit{{addressKey("reset", in.Email), 1, s.cfg.ResendCooldown, problemTooManyRequests}, mailsADay(in.Email)} {
		var limited problem
		if err := s.store.hit(ctx, l, s.now()); errors.As(err, &limited) {
			s.recordRefusal(ctx, c, "forgotPassword", limited)
			return noContent{}, nil
		} else if err != nil {
			return noContent{}, err
		}
	}
	s.background.Go(func() { // dying meanwhile loses the mail; the person asks again
		ctx, cancel := detached(ctx, mailTimeout+keycloakTimeout)
		defer cancel()
		u, err := s.kc.userByLogin(ctx, in.Email)
		if errors.Is(err, errNotFound) || err == nil && (!u.enabled() || u.awaitsVerification()) {
			return
		}
		if err == nil {
			actions := choosePassword
			if !u.verified() { // a new address: the link proves it
				actions = []string{"VERIFY_EMAIL", "UPDATE_PASSWORD"}
			}
			err = s.kc.sendMail(ctx, u.id(), u.attribute(attrLocale), resetLifespan, actions)
		}
		if err == nil {
			err = s.store.audit(ctx, c, s.now(), entry{Action: "password.forgot", Target: u.attribute(attrUserID)})
		}
		if err != nil {
			s.log.ErrorContext(ctx, "a mail to choose a new password was not sent", "error", err)
		}
	})
	return noContent{}, nil
}

// The code flow (OpenID Connect Core §3.1 with PKCE, RFC 7636). Nothing of it is
// stored: the browser has a secret in a cookie, and whatever else must be known at its
// return is in the state, or made of both.
const (
	signInTime     = 10 * time.Minute // to sign in on Keycloak's page
	afterSignIn    = "/account/signed-in"
	maxReturnTo    = 2000
	signInCookie   = "sign_in"
	hostOnlyPrefix = "__Host-" // no other host of the domain can set it (RFC 6265bis §4.1.3.2); wants https
)

// signIn is one sign-in by the code flow, bound to the browser that began it.
type signIn struct {
	browser  string // secret, in the cookie
	state    string
	returnTo string
}

// derive makes a value that only this browser and this sign-in have: the state's own
// MAC, the nonce and the verifier of PKCE, 43 characters each.
func derive(browser, purpose, state string) string {
	mac := hmac.New(sha256.New, []byte(browser))
	fmt.Fprintf(mac, "%s %s", purpose, state)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// newSignIn begins a sign-in. The state says when it ends and where it leads.
func newSignIn(browser, returnTo string, now time.Time) signIn {
	content := fmt.Sprintf("%s %d %s", newToken(), now.Add(signInTime).Unix(), returnTo)
	state := base64.RawURLEncoding.EncodeToString([]byte(content))
	return signIn{browser, state + "." + derive(browser, "state", state), returnTo}
}

// resumeSignIn reads the state that Keycloak has sent back. It fails for one of another
// browser, one that was altered, and one that took too long.
func resumeSignIn(browser, state string, now time.Time) (signIn, error) {
	notBegun := problemSignInIncomplete.withDetail("This sign-in was not begun in this browser.")
	encoded, mac, _ := strings.Cut(state, ".")
	if browser == "" || !sameSecret(mac, derive(browser, "state", encoded)) {
		return signIn{}, notBegun
	}
	content, err := base64.RawURLEncoding.DecodeString(encoded)
	parts := strings.SplitN(string(content), " ", 3)
	if err != nil || len(parts) < 3 { // whoever has the browser knows its secret, and can sign anything
		return signIn{}, notBegun
	}
	ends, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil || now.Unix() > ends {
		return signIn{browser, state, parts[2]}, problemSignInIncomplete.withDetail("This sign-in took too long.")
	}
	return signIn{browser, state, parts[2]}, nil
}

// returnURL is where the browser goes after signing in: an origin that is allowed and
// what follows it. It is put together from the allowed origin itself, so whatever
// returnTo contains, it leads nowhere else.
func returnURL(returnTo, own string, allowed []string) (string, bool) {
	if len(returnTo) > maxReturnTo || strings.ContainsFunc(returnTo, func(r rune) bool { return r <= ' ' || r == '\\' || r >= 0x7f }) {
		return "", false // browsers drop tabs and line breaks, and take \ for /
	}
	if strings.HasPrefix(returnTo, "/") && !strings.HasPrefix(returnTo, "//") {
		return own + returnTo, true
	}
	for _, origin := range allowed {
		rest, ok := strings.CutPrefix(returnTo, origin)
		if ok && (rest == "" || strings.ContainsRune("/?#", rune(rest[0]))) {
			return origin + rest, true
		}
	}
	return "", false
}

func (s *server) signInCookieName() string {
	if s.cfg.https() {
		return hostOnlyPrefix + signInCookie
	}
	return signInCookie
}

var browserSecret = regexp.MustCompile(`^[A-Za-z0-9_-]{32}$`)

// browserOf returns the secret of the browser's cookie, or "".
func (s *server) browserOf(r *http.Request) string {
	if cookie, err := r.Cookie(s.signInCookieName()); err == nil && browserSecret.MatchString(cookie.Value) {
		return cookie.Value
	}
	return ""
}

// signInPage sends the browser to Keycloak.
func (s *server) signInPage(_ context.Context, _ caller, r *http.Request) (view, error) {
	returnTo := cmp.Or(r.FormValue("return_to"), afterSignIn)
	if _, ok := returnURL(returnTo, origin(s.cfg.PublicURL), s.cfg.CORSOrigins); !ok {
		return view{}, problemInvalidRequest.withDetail("return_to must be a path of this site or begin with an origin that is allowed.")
	}
	flow := newSignIn(cmp.Or(s.browserOf(r), newToken()), returnTo, s.now())
	return view{Status: http.StatusSeeOther,
		Location: s.kc.oauth().AuthCodeURL(flow.state, oidc.Nonce(derive(flow.browser, "nonce", flow.state)),
			oauth2.S256ChallengeOption(derive(flow.browser, "verifier", flow.state))),
		Cookie: &http.Cookie{Name: s.signInCookieName(), Value: flow.browser, MaxAge: int(signInTime.Seconds()), Path: "/",
			HttpOnly: true, Secure: true, SameSite: http.SameSiteLaxMode}}, nil
}

// callbackPage is where Keycloak sends the browser back to: L0 the state, once; L1
// Keycloak's tokens for the code; L2 our session. The refresh token goes into a cookie,
// the access token nowhere: the frontend asks refresh for one.
func (s *server) callbackPage(ctx context.Context, c caller, r *http.Request) (view, error) {
	flow, err := resumeSignIn(s.browserOf(r), r.FormValue("state"), s.now()) // L0
	if err == nil {
		used := problemSignInIncomplete.withDetail("This sign-in is over already. Perhaps the page was loaded twice.")
		err = s.store.hit(ctx, rateLimit{"sign-in:" + tokenHash(flow.state), 1, 2 * signInTime, used}, s.now())
	}
	if err != nil {
		return view{}, signInAgain(flow, err)
	}
	out, err := s.finishSignIn(ctx, c, r, flow)
	if err != nil {
		return view{}, signInAgain(flow, err)
	}
	target, ok := returnURL(flow.returnTo, origin(s.cfg.PublicURL), s.cfg.CORSOrigins)
	if !ok { // an origin that is no longer allowed
		target = origin(s.cfg.PublicURL) + afterSignIn
	}
	return view{Status: http.StatusSeeOther, Location: target, Cookie: refreshCookie(out.RefreshToken, out.RefreshExpiresIn)}, nil
}

// finishSignIn reads what Keycloak says (RFC 6749 §4.1.2, RFC 9207) and redeems the code.
func (s *server) finishSignIn(ctx context.Context, c caller, r *http.Request, flow signIn) (loginOut, error) {
	switch code := r.FormValue("error"); {
	case code == "access_denied":
		return loginOut{}, problemSignInIncomplete.withDetail("The sign-in was cancelled.")
	case code != "": // temporarily_unavailable: the page was open for too long
		return loginOut{}, problemSignInIncomplete.withCause(errors.New("keycloak answers with an error"))
	case r.FormValue("code") == "", r.FormValue("iss") != s.verifier.issuer:
		return loginOut{}, problemSignInIncomplete.withCause(errors.New("the answer comes from another issuer"))
	}
	token, err := s.kc.redeem(ctx, r.FormValue("code"), derive(flow.browser, "verifier", flow.state)) // L1
	if errors.Is(err, errInvalidGrant) {
		return loginOut{}, problemSignInIncomplete.withCause(err)
	} else if err != nil {
		return loginOut{}, err
	}
	return s.openSession(ctx, c, token, derive(flow.browser, "nonce", flow.state)) // L2
}

// signInAgain is err with the way to another try.
func signInAgain(flow signIn, err error) problem {
	p := asProblem(err)
	if p.Status < http.StatusTooManyRequests {
		p.Wait = 0 // a used state never comes back: another try need not wait
	}
	p.retry = "/auth/login"
	if flow.returnTo != "" {
		p.retry += "?return_to=" + url.QueryEscape(flow.returnTo)
	}
	return p
}
