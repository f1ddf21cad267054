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
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Nerzal/gocloak/v13"
	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

type loginIn struct {
	Username string `json:"username,omitempty" as:"login" maxLength:"255" example:"ada"`
	Email    string `json:"email,omitempty" as:"login" maxLength:"255" example:"ada@example.com" description:"Instead of username."`
	Password string `json:"password" required:"true" maxLength:"128" format:"password" example:"correct horse battery"`
	OTP      string `json:"otp,omitempty" as:"digits" pattern:"^[0-9]{4,10}$" mismatch:"must be the digits of a one-time code" example:"492039" description:"The one-time code of an account that has one."`
}

func (loginIn) either() [][]string { return [][]string{{"username"}, {"email"}} }

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

// login signs a person in: L1 Keycloak's tokens, L2 our session. No tokens are handed out without their row.
func (s *server) login(ctx context.Context, c caller, in loginIn) (out loginOut, err error) {
	defer func() { s.metrics.signIns.WithLabelValues("password", cmp.Or(asProblem(err).slug(), "ok")).Inc() }()
	name := cmp.Or(in.Username, in.Email)
	account, err := accountByLogin(ctx, s.store.pool, name, clientNetwork(ctx), s.now())
	if err != nil {
		return loginOut{}, err
	}
	if strings.Contains(name, "xn--") { // Keycloak may have the domain in its other spelling
		if u, err := s.kc.userByLogin(ctx, name); err == nil {
			name = gocloak.PString(u.Username)
		}
	}
	token, err := s.checkPassword(ctx, account, name, in) // L1
	if err != nil {
		return loginOut{}, s.loginError(ctx, name, account.ID, in.OTP != "", err)
	}
	return s.openSession(ctx, c, token, "") // L2
}

// checkLock is longer than a check of a password takes. Dying meanwhile holds up the account for as long.
const checkLock = 10 * time.Second

// checkPassword has Keycloak check a password (L1). The checks of one account are lined up: however many guess at
// the same time, each failure is counted before the next password is compared. Failures count, not attempts. Those of
// others do not keep the owner out: neither their limits nor Keycloak's lock count for a client that the account has
// signed in from before.
func (s *server) checkPassword(
	ctx context.Context, account loginAccount, name string, in loginIn,
) (*oauth2.Token, error) {
	client, key := clientNetwork(ctx), cmp.Or(account.ID, name)
	t, err := s.store.lock(ctx, "login:"+digest(strings.ToLower(key)), checkLock, s.now)
	if err != nil {
		return nil, err
	}
	defer s.release(ctx, t, never, nil)
	failures := []rateLimit{failuresOfOne.of(key, client), failuresOfAll.of(key)}
	if account.Known {
		failures = failures[:1]
	}
	if err := s.store.peek(ctx, s.now(), failures...); err != nil {
		return nil, err
	}
	token, err := s.kc.signIn(ctx, name, in.Password, in.OTP)
	if errors.Is(err, errInvalidCredentials) && account.Known {
		var locked bool // by Keycloak's guard, whose answer is the same
		if locked, err = s.kc.unlock(ctx, account.KeycloakID); err != nil {
			return nil, err
		}
		if err = errInvalidCredentials; locked {
			token, err = s.kc.signIn(ctx, name, in.Password, in.OTP)
		}
	}
	if errors.Is(err, errInvalidCredentials) {
		if failed := s.store.hit(ctx, s.now(), failures...); failed != nil {
			return nil, failed
		}
	}
	return token, err
}

// openSession stores the session of fresh tokens (L2) and makes the answer. Without its row a session is ended again
// in Keycloak. The nonce is that of a code flow.
func (s *server) openSession(
	ctx context.Context, c caller, token *oauth2.Token, nonce string,
) (out loginOut, err error) {
	claims, err := readClaims(token.AccessToken)
	sid, _ := token.Extra("session_state").(string) // also where the claims can't be read
	// Dying here (L1) leaves a session in Keycloak that nobody has the tokens of; it dies of idleness.
	defer func() {
		if err != nil {
			err = errors.Join(err, s.kc.endSession(ctx, cmp.Or(claims.SessionID, sid)))
		}
	}()
	switch {
	case err != nil:
		return out, err
	case claims.SessionID == "" || token.RefreshToken == "":
		return out, problemTokenClaims.withCause(errors.New("keycloak: tokens without sid or without a refresh token"))
	case newTokenResponse(token, "").RefreshExpiresIn == 0: // no list of Keycloak has it, so "sign out" would miss it
		return out, problemSessionEndless
	}
	if nonce != "" {
		if err := s.verifier.idToken(ctx, token, nonce); errors.Is(err, errUnavailable) {
			return out, err
		} else if err != nil {
			return out, problemSignInIncomplete.withCause(err)
		}
	}
	u, err := s.accountOf(ctx, claims.Subject)
	if err != nil {
		return out, err
	}
	if token, err = s.matching(ctx, token, u); err == nil {
		out.tokenResponse = newTokenResponse(token, newSessionID())
		out.User = loginUser{u.ID, u.Email, u.Username, []string{u.Role}, u.NetworkID, u.StationID}
		err = s.store.addSession(ctx, c, u.ID, claims.SessionID, out.tokenResponse, s.now())
	}
	if errors.Is(err, errInvalidGrant) || errors.Is(err, errNotFound) { // disabled at this moment
		err = problemAccountDisabled.withTarget(string(u.ID))
	}
	return out, err
}

// matching returns tokens that say what is true of u in PostgreSQL. If somebody has changed that in Keycloak, the
// user is reconciled and the tokens are exchanged.
func (s *server) matching(ctx context.Context, token *oauth2.Token, u user) (*oauth2.Token, error) {
	claims, err := readClaims(token.AccessToken)
	if err != nil || claims.UserID == u.ID && !u.revocation().revokes(claims.principal()) {
		return token, err
	}
	if err := s.doNow(ctx, kcTask(u.KeycloakID)); err != nil && !errors.Is(err, errConflict) {
		return token, err
	}
	if token, err = s.kc.refresh(ctx, token.RefreshToken); err != nil {
		return token, err
	}
	claims, err = readClaims(token.AccessToken)
	if err == nil && (claims.UserID == "" || len(claims.Roles) == 0 || claims.NetworkID == "" || claims.StationID == "") {
		err = problemTokenClaims.withCause(errors.New("keycloak: tokens without user_id, roles, network_id or station_id"))
	}
	return token, err
}

// accountOf returns the account that Keycloak has just let in, if it is one in PostgreSQL, too. Somebody whom only
// Keycloak has is imported. A verification that died between the two stores (V3) is concluded first.
func (s *server) accountOf(ctx context.Context, subject string) (user, error) {
	u, err := s.store.userByKeycloakID(ctx, subject)
	if err == nil && u.Registration != "" {
		if err = s.doNow(ctx, string(u.Registration)); err != nil {
			return u, err
		}
		u, err = s.store.userByKeycloakID(ctx, subject)
	}
	var unfit error
	// Created in Keycloak; or it has a new address, confirmed in Keycloak.
	if errors.Is(err, errNotFound) || err == nil && u.IsActive && !u.IsVerified {
		if unfit = s.doNow(ctx, kcTask(subject)); unfit != nil && !errors.Is(unfit, errConflict) {
			return u, unfit
		}
		u, err = s.store.userByKeycloakID(ctx, subject) // also if another sign-in was faster
	}
	switch {
	case errors.Is(err, errNotFound) && unfit != nil:
		return u, problemAccountUnfit
	case errors.Is(err, errNotFound): // it is gone again, or its registration has just ended
		return u, problemAccountSetupRequired
	case err != nil:
		return u, err
	case !u.IsActive:
		return u, problemAccountDisabled.withTarget(string(u.ID)) // the stricter store wins
	case !u.IsVerified:
		return u, problemAccountNotVerified.withTarget(string(u.ID))
	}
	return u, nil
}

// loginError says why Keycloak has let nobody in. An account that waits for its confirmation has no password yet: to
// Keycloak any is wrong, until 26.5 the account is disabled, and it is not fully set up while its mail is being sent.
// Keycloak's answer to a missing one-time code is that to a wrong password: so somebody who sends none is asked for it,
// whatever the password.
func (s *server) loginError(ctx context.Context, name, account string, otp bool, err error) error {
	wrong, disabled := errors.Is(err, errInvalidCredentials), errors.Is(err, errAccountDisabled)
	if !wrong && !disabled && !errors.Is(err, errSetupRequired) {
		return err
	}
	reg, lookup := s.store.registrationByLogin(ctx, name)
	switch {
	case lookup == nil:
		return problemAccountNotVerified.withTarget(string(reg.ID))
	case !errors.Is(lookup, errNotFound):
		return lookup
	case disabled:
		return problemAccountDisabled.withTarget(account)
	case wrong && otp:
		return problemInvalidCredentials.withTarget(account)
	}
	u, lookup := s.kc.userByLogin(ctx, name)
	switch {
	case lookup != nil && !(wrong && errors.Is(lookup, errNotFound)):
		return lookup
	case wrong && gocloak.PBool(u.Totp):
		return problemOTPRequired.withTarget(account)
	case wrong:
		return problemInvalidCredentials.withTarget(account)
	}
	detail := "Something has to be set up" + onSignInPage
	if u.RequiredActions != nil {
		for _, action := range slices.Backward(*u.RequiredActions) { // the first one counts
			detail = cmp.Or(setupDetails[action], detail)
		}
	}
	return problemAccountSetupRequired.withTarget(u.attribute(attrUserID)).withDetail(detail)
}

// setupDetails are what Keycloak still wants of a person whose password is right, by required action.
var setupDetails = map[string]string{
	"UPDATE_PASSWORD": "A new password has to be chosen first. Follow the link in your mail, or ask for a new one " +
		"with \"forgot password\".",

	"CONFIGURE_TOTP":                 "A one-time-code app has to be set up" + onSignInPage,
	"VERIFY_EMAIL":                   "The e-mail address has to be confirmed" + onSignInPage,
	"UPDATE_PROFILE":                 "The profile has to be completed" + onSignInPage,
	"VERIFY_PROFILE":                 "The profile has to be completed" + onSignInPage,
	"TERMS_AND_CONDITIONS":           "The terms have to be accepted" + onSignInPage,
	"webauthn-register":              "A security key has to be set up" + onSignInPage,
	"webauthn-register-passwordless": "A passkey has to be set up" + onSignInPage,
}

const onSignInPage = " first. Please sign in on the sign-in server's page."

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

// forgotPassword has Keycloak mail its link to choose a new password. The answer is the same, and comes as fast,
// whether there is such an account or not, and when a limit stands against the mail: the queue does the rest.
func (s *server) forgotPassword(ctx context.Context, c caller, in forgotIn) (noContent, error) {
	err := s.store.hitAddress(ctx, in.Email, s.now())
	if err == nil {
		err = s.store.requestReset(ctx, c, in.Email, s.now())
		s.wakeWorker()
	}
	return noContent{}, err
}

// mailReset mails a user the link to choose a new password, within the limits of mails that were handed over.
func (s *server) mailReset(ctx context.Context, u keycloakUser) error {
	claim := []rateLimit{resetOfCooldown.within(s.cfg.ResendCooldown).of(u.id()), resetsADay.of(u.id())}
	if err := s.store.hit(ctx, s.now(), claim...); errors.Is(err, problemTooManyRequests) {
		s.log.InfoContext(ctx, "password: reset mail not sent, too many", "keycloak_id", u.id())
		return nil
	} else if err != nil {
		return err
	}
	err := s.kc.sendMail(ctx, u.id(), u.attribute(attrLocale), resetLifespan, choosePassword)
	if err != nil {
		err = errors.Join(err, refund(ctx, s.store.pool, claim...))
	}
	return err
}

// The code flow (OpenID Connect Core §3.1 with PKCE, RFC 7636). Nothing of it is stored: the browser has a secret in
// a cookie, and whatever else must be known at its return is in the state, or made of both.
const (
	signInTime  = 10 * time.Minute // to sign in on Keycloak's page
	afterSignIn = "/account/signed-in"
	maxReturnTo = 2000
	maxCode     = 1000 // of Keycloak's, which have 110 characters
)

// signIn is one sign-in by the code flow, bound to the browser that began it.
type signIn struct {
	browser  string // secret, in the cookie
	state    string
	returnTo string
}

func (flow signIn) nonce() string    { return derive(flow.browser, "nonce", flow.state) }
func (flow signIn) verifier() string { return derive(flow.browser, "verifier", flow.state) } // of PKCE

// derive makes a value that only this browser and this sign-in have, of 43 characters.
func derive(browser, purpose, state string) string {
	mac := hmac.New(sha256.New, []byte(browser))
	fmt.Fprintf(mac, "%s %s", purpose, state)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// newSignIn begins a sign-in. The state says when it ends and where it leads, and has a MAC.
func newSignIn(browser, returnTo string, now time.Time) signIn {
	content := fmt.Appendf(nil, "%s %d %s", newToken(), now.Add(signInTime).Unix(), returnTo)
	state := base64.RawURLEncoding.EncodeToString(content)
	return signIn{browser, state + "." + derive(browser, "state", state), returnTo}
}

// resumeSignIn reads the state that Keycloak has sent back. It fails for one of another browser, one that was
// altered, and one that took too long.
func resumeSignIn(browser, state string, now time.Time) (signIn, error) {
	encoded, mac, _ := strings.Cut(state, ".")
	content, err := base64.RawURLEncoding.DecodeString(encoded)
	parts := strings.SplitN(string(content), " ", 3)
	if browser == "" || !sameSecret(mac, derive(browser, "state", encoded)) || err != nil || len(parts) < 3 {
		return signIn{}, problemSignInIncomplete.withDetail("This sign-in was not begun in this browser.")
	}
	flow := signIn{browser, state, parts[2]}
	if ends, err := strconv.ParseInt(parts[1], 10, 64); err != nil || now.Unix() > ends {
		return flow, problemSignInIncomplete.withDetail("This sign-in took too long.")
	}
	return flow, nil
}

// returnURL is where the browser goes after signing in: an origin that is allowed and what follows it. It is put
// together from the allowed origin itself, so whatever returnTo contains, it leads nowhere else.
func (cfg config) returnURL(returnTo string) (string, bool) {
	// Browsers drop tabs and line breaks, and take \ for /.
	odd := func(r rune) bool { return r <= ' ' || r == '\\' || r >= 0x7f }
	if len(returnTo) > maxReturnTo || strings.ContainsFunc(returnTo, odd) {
		return "", false
	}
	if strings.HasPrefix(returnTo, "/") && !strings.HasPrefix(returnTo, "//") {
		return origin(cfg.PublicURL) + returnTo, true
	}
	for _, origin := range cfg.CORSOrigins {
		rest, ok := strings.CutPrefix(returnTo, origin)
		if ok && (rest == "" || strings.ContainsRune("/?#", rune(rest[0]))) {
			return origin + rest, true
		}
	}
	return "", false
}

// signInCookie keeps the secret of a browser.
func (s *server) signInCookie(secret string) *http.Cookie {
	return s.hostCookie("sign_in", secret, int(signInTime.Seconds()))
}

var browserSecret = regexp.MustCompile(`^[A-Za-z0-9_-]{32}$`)

// browserOf returns the secret of the browser's cookie, or "".
func (s *server) browserOf(r *http.Request) string {
	if cookie, err := r.Cookie(s.signInCookie("").Name); err == nil && browserSecret.MatchString(cookie.Value) {
		return cookie.Value
	}
	return ""
}

// accountActions are what people do with their own account on Keycloak's pages, by the name that a link of an
// application has for it (application-initiated actions of Keycloak).
var accountActions = map[string]string{ // #nosec G101 -- names
	"password": "UPDATE_PASSWORD",
	"email":    "UPDATE_EMAIL",
	"passkey":  "webauthn-register-passwordless",
	"otp":      "CONFIGURE_TOTP",
	"delete":   "delete_account",
}

// signInPage sends the browser to Keycloak: to sign in, and then to do something with the account, if it says so.
func (s *server) signInPage(_ context.Context, c caller, r *http.Request) (view, error) {
	action := r.FormValue("action")
	if action != "" && accountActions[action] == "" {
		detail := "action must be one of delete, email, otp, passkey, password."
		return view{}, problemInvalidRequest.withDetail(detail)
	}
	returnTo := cmp.Or(r.FormValue("return_to"), afterSignIn)
	if _, ok := s.cfg.returnURL(returnTo); !ok {
		detail := "return_to must be a path of this site or begin with an origin that is allowed."
		return view{}, problemInvalidRequest.withDetail(detail)
	}
	flow := newSignIn(cmp.Or(s.browserOf(r), newToken()), returnTo, s.now())
	options := []oauth2.AuthCodeOption{oidc.Nonce(flow.nonce()), oauth2.S256ChallengeOption(flow.verifier()),
		oauth2.SetAuthURLParam("ui_locales", s.cfg.site.Match(c.Language))}
	if action != "" {
		options = append(options, oauth2.SetAuthURLParam("kc_action", accountActions[action]))
	}
	location := s.kc.oauth().AuthCodeURL(flow.state, options...)
	return view{Status: http.StatusSeeOther, Location: location, Cookie: s.signInCookie(flow.browser)}, nil
}

// changePassword is where password managers send people (W3C, A Well-Known URL for Changing Passwords).
func changePassword(context.Context, caller, *http.Request) (view, error) {
	return goOn("/auth/login?action=password"), nil
}

// callbackPage is where Keycloak sends the browser back to: L0 the state, once; L1 Keycloak's tokens for the code; L2
// our session. The refresh token goes into a cookie, the access token nowhere: the frontend asks refresh for one.
func (s *server) callbackPage(ctx context.Context, c caller, r *http.Request) (view, error) {
	flow, err := resumeSignIn(s.browserOf(r), r.FormValue("state"), s.now()) // L0
	var out loginOut
	if err == nil {
		out, err = s.finishSignIn(ctx, c, r, flow)
	}
	s.metrics.signIns.WithLabelValues("code", cmp.Or(asProblem(err).slug(), "ok")).Inc()
	if err != nil {
		p := asProblem(err)
		if p.Status < http.StatusTooManyRequests {
			p.Wait = 0 // a used state never comes back: another try need not wait
		}
		p.retry = "/auth/login"
		if flow.returnTo != "" {
			p.retry += "?return_to=" + url.QueryEscape(flow.returnTo)
		}
		return view{}, p
	}
	target, ok := s.cfg.returnURL(flow.returnTo)
	if !ok { // an origin that is no longer allowed
		target = origin(s.cfg.PublicURL) + afterSignIn
	}
	cookie := s.refreshCookie(out.RefreshToken, out.RefreshExpiresIn)
	return view{Status: http.StatusSeeOther, Location: target, Cookie: cookie}, nil
}

// finishSignIn reads what Keycloak says (RFC 6749 §4.1.2, RFC 9207) and redeems the code.
func (s *server) finishSignIn(ctx context.Context, c caller, r *http.Request, flow signIn) (loginOut, error) {
	used := problemSignInIncomplete.withDetail("This sign-in is over already. Perhaps the page was loaded twice.")
	err := s.store.hit(ctx, s.now(), limit{"state", 1, 2 * signInTime, used}.of(flow.state))
	if err != nil {
		return loginOut{}, err
	}
	code := r.FormValue("code")
	switch refused := r.FormValue("error"); {
	case refused == "access_denied":
		return loginOut{}, problemSignInIncomplete.withDetail("The sign-in was cancelled.")
	case refused != "": // temporarily_unavailable: the page was open for too long
		return loginOut{}, problemSignInIncomplete.withCause(errors.New("keycloak answers with an error"))
	case code == "", len(code) > maxCode, r.FormValue("iss") != s.verifier.issuer:
		return loginOut{}, problemSignInIncomplete.withCause(errors.New("the answer comes from another issuer"))
	}
	token, err := s.kc.redeem(ctx, code, flow.verifier()) // L1
	if errors.Is(err, errInvalidGrant) {
		err = problemSignInIncomplete.withCause(err)
	}
	if err != nil {
		return loginOut{}, err
	}
	return s.openSession(ctx, c, token, flow.nonce()) // L2
}
