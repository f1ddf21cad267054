package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/oauth2"
)

// How a refresh token is exchanged.
const (
	cookiesTried = 4                // of the same name: each is looked up
	rotationTime = 6 * time.Second  // the most that an exchange may take, Keycloak's part included
	rotationLock = 10 * time.Second // longer: a holder who is slower has given up before another begins
)

// session is a sign-in, see schema.sql.
type session struct {
	ID         sessionID  `json:"session_id" example:"SES-V1StGXR8_Z5jdHi6"`
	Current    bool       `json:"current" db:"-" description:"The session of the access token that asks."`
	KeycloakID string     `json:"-"` // claim sid
	UserID     userID     `json:"-"`
	Address    string     `json:"ip_address" example:"192.0.2.7" description:"Of the sign-in."`
	UserAgent  string     `json:"user_agent" description:"Of the sign-in."`
	CreatedAt  time.Time  `json:"created_at"`
	LastUsedAt time.Time  `json:"last_used_at" description:"The sign-in or the latest refresh."`
	ExpiresAt  *time.Time `json:"expires_at" nullable:"true" description:"When it ends unless it is used; null: Keycloak alone knows."`
	Ended      bool       `json:"-"`
	Origin     string     `json:"origin" enum:"service,keycloak" description:"keycloak: begun on Keycloak's own pages, or by its token endpoint."`
}

// tokenResponse is a token response (RFC 6749 §5.1) with what the service adds to it.
type tokenResponse struct {
	AccessToken      string    `json:"access_token"`
	RefreshToken     string    `json:"refresh_token,omitempty" description:"Absent if it is in the cookie."`
	IDToken          string    `json:"id_token"`
	TokenType        string    `json:"token_type" enum:"Bearer"`
	ExpiresIn        int       `json:"expires_in" example:"300" description:"Seconds."`
	RefreshExpiresIn int       `json:"refresh_expires_in" example:"1800" description:"Seconds."`
	Scope            string    `json:"scope" example:"openid email profile"`
	SessionID        sessionID `json:"session_id" example:"SES-V1StGXR8_Z5jdHi6"`
}

func newTokenResponse(t *oauth2.Token, id sessionID) tokenResponse {
	seconds := func(name string) int { n, _ := t.Extra(name).(float64); return int(n) }
	out := tokenResponse{AccessToken: t.AccessToken, RefreshToken: t.RefreshToken, TokenType: "Bearer",
		ExpiresIn: seconds("expires_in"), RefreshExpiresIn: seconds("refresh_expires_in"), SessionID: id}
	out.IDToken, _ = t.Extra("id_token").(string)
	out.Scope, _ = t.Extra("scope").(string)
	return out
}

// expiry is when Keycloak lets the refresh token die.
func (t tokenResponse) expiry(now time.Time) time.Time {
	return now.Add(time.Duration(t.RefreshExpiresIn) * time.Second)
}

// hostCookie keeps a secret of the browser away from scripts. Over https no other host of the domain can
// set it (RFC 6265bis §4.1.3.2).
func (s *server) hostCookie(name, value string, seconds int) *http.Cookie {
	if s.cfg.https() {
		name = "__Host-" + name
	}
	return &http.Cookie{Name: name, Value: value, MaxAge: seconds, Path: "/",
		HttpOnly: true, Secure: true, SameSite: http.SameSiteLaxMode}
}

// refreshCookie keeps the refresh token of the code flow.
func (s *server) refreshCookie(token string, seconds int) *http.Cookie {
	return s.hostCookie("refresh_token", token, seconds)
}

// refreshIn is a refresh token: the holder's in the body, or else that of the browser's cookie, if it has one.
type refreshIn struct {
	RefreshToken string   `json:"refresh_token" required:"true" maxLength:"8192" example:"eyJhbGciOiJIUzUxMiJ9.eyJ0eXAiOiJSZWZyZXNoIn0.c2lnbmF0dXJl" description:"Without a body the cookie counts."`
	Cookie       string   `cookie:"refresh_token" description:"Set by /auth/callback, over https as __Host-refresh_token. Only from an allowed origin."`
	cookies      []string // all of that name: another page of the domain may have set one, too
}

func (in *refreshIn) setCookies(tokens []string) { in.RefreshToken, in.cookies = tokens[0], tokens }

// fromCookie says whether the token is the cookie's, and not the body's.
func (in refreshIn) fromCookie() bool { return len(in.cookies) > 0 && in.RefreshToken == in.cookies[0] }

// tokens are those to try: that of the body, or all of cookies.
func (in refreshIn) tokens() []string {
	if in.fromCookie() {
		return in.cookies
	}
	return []string{in.RefreshToken}
}

type refreshOut struct {
	tokenResponse
	noContent
}

type noContent struct{ setCookie *http.Cookie }

func (out noContent) cookie() *http.Cookie { return out.setCookie }

// refresh exchanges a refresh token for the next one: F1 our lock of the token, F2 Keycloak's tokens, F3 our row of
// them. Whoever shows the old one within the grace time gets the same answer, so that two tabs do no harm. Later it is
// theft (RFC 9700 §4.14.2), unless the next one was never used: then its answer was lost, and the next one is
// exchanged for the client. From then on that one is nobody's: whoever shows it has it from elsewhere, and ends the
// session. So if a client and a thief both go on, the session ends for both.
func (s *server) refresh(ctx context.Context, c caller, in refreshIn) (refreshOut, error) {
	var out refreshOut
	var err error
	for _, token := range in.tokens() {
		if out.tokenResponse, err = s.exchange(ctx, c, token); !errors.Is(err, problemInvalidRefreshToken) {
			break
		}
	}
	var refused problem
	switch cookie := in.fromCookie(); {
	case cookie && err == nil:
		out.setCookie = s.refreshCookie(out.RefreshToken, out.RefreshExpiresIn)
		out.RefreshToken = ""
	case cookie && errors.As(err, &refused) && refused.Status == http.StatusUnauthorized: // it would be refused for ever
		return out, refused.withCookie(s.refreshCookie("", -1))
	}
	return out, err
}

// exchange returns the answer to a refresh token, however many ask for it at once.
func (s *server) exchange(ctx context.Context, c caller, token string) (out tokenResponse, err error) {
	for unused := token; ; {
		var t task
		var known refreshToken
		err = patiently(ctx, func() (err error) {
			t, known, err = s.store.lockToken(ctx, digest(unused), s.now()) // F1
			return err
		})
		switch {
		case errors.Is(err, errNotFound):
			return out, problemInvalidRefreshToken
		case err != nil:
			return out, err
		case known.UsedAt == nil:
			if out, err = s.rotate(ctx, c, t, known, unused, token); err != nil {
				s.release(ctx, t, never, nil)
			}
			return out, err
		case unused != token: // another has exchanged it
			unused = token
			continue
		}
		out, err = s.answered(ctx, c, known, token)
		if err != nil || s.now().Before(known.UsedAt.Add(s.cfg.RefreshGrace)) {
			return out, err
		}
		unused = out.RefreshToken
		s.log.InfoContext(ctx, "session: answer lost, its refresh token is exchanged", "session", known.Session)
	}
}

// answered returns the answer that a used token was given. If that is over, the token is one that was stolen, or that
// was stolen from: the session ends.
func (s *server) answered(
	ctx context.Context, c caller, known refreshToken, token string,
) (out tokenResponse, err error) {
	if known.AnswerUntil != nil && s.now().Before(*known.AnswerUntil) {
		plain, err := openSealed(token, known.Answer)
		if err == nil {
			err = json.Unmarshal(plain, &out)
		}
		return out, err
	}
	err = s.endSessions(ctx, c, known.user, known.Session, problemTokenReused.slug())
	if err == nil {
		s.metrics.reuse.Inc()
	} else if !errors.Is(err, problemNotFound) {
		return out, err
	}
	return out, problemTokenReused.withTarget(string(known.user.ID))
}

// rotate asks Keycloak for the next tokens in exchange for an unused one, and keeps its answer, sealed by a key that
// only the holder of the token that was shown can make. Dying after F2 loses an answer of Keycloak: the client's next
// try gets another when the lock has ended, as refreshTokenMaxReuse 1 allows once. If the tokens have to be exchanged
// once more to say what is true in PostgreSQL, dying then ends the session.
func (s *server) rotate(
	ctx context.Context, c caller, t task, known refreshToken, unused, shown string,
) (tokenResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, rotationTime)
	defer cancel()
	next, err := s.kc.refresh(ctx, unused) // F2
	if err == nil {
		next, err = s.matching(ctx, next, known.user)
	}
	if errors.Is(err, errInvalidGrant) { // ended by idleness, its maximum or an administrator
		s.log.InfoContext(ctx, "session: ended in Keycloak", "session", known.Session, "error", err)
		err = s.endSessions(ctx, c, known.user, known.Session, "keycloak")
		if err == nil || errors.Is(err, problemNotFound) {
			err = problemInvalidRefreshToken.withTarget(string(known.user.ID))
		}
	}
	if err != nil {
		return tokenResponse{}, err
	}
	answer := newTokenResponse(next, known.Session)
	plain, err := json.Marshal(answer) // #nosec G117 -- to be sealed
	if err == nil {
		err = s.store.rotate(ctx, t, digest(unused), answer, s.now(), // F3
			lastAnswer{digest(shown), seal(shown, plain), s.cfg.RefreshGrace})
	}
	if errors.Is(err, errNotFound) { // the session has just ended
		err = problemInvalidRefreshToken
	}
	return answer, err
}

// endSessions ends one session of a user, or all (id ""), in both stores: S1 ours, S2 Keycloak's. All means those
// that were begun at Keycloak, too, and every access token that was issued before. While Keycloak is away the end
// stands, and the task ends them there later. problemNotFound: the user has no such session.
func (s *server) endSessions(ctx context.Context, c caller, u user, id sessionID, reason string) error {
	if id == "" {
		err := s.store.endAllSessions(ctx, c, u.ID, reason, s.now()) // S1
		if errors.Is(err, errNotFound) {
			return problemInvalidAccessToken // the token's account is gone
		}
		if err == nil {
			s.pushNow(ctx, u)
		}
		return err // perhaps it was committed and only the answer is lost: then the task does S2
	}
	ended, err := s.store.endSession(ctx, c, u.ID, id, reason, s.now()) // S1
	if errors.Is(err, errNotFound) {
		return problemNotFound
	} else if err != nil {
		return err
	}
	// Dying here (S1) leaves a session in Keycloak: its task ends it.
	if err = s.kc.endSession(ctx, ended.KeycloakID); err == nil { // S2
		err = s.store.dequeue(ctx, string(id))
	}
	if err != nil {
		s.log.WarnContext(ctx, "session: end in Keycloak failed, will retry", "session", id, "error", err)
	}
	return nil
}

// endBefore ends the sessions of a user in Keycloak that were begun before its not-before, and what PostgreSQL has of
// them: their access tokens first (S2). The caller holds the lock of the user's task.
func (s *server) endBefore(ctx context.Context, u user) error {
	live, err := s.kc.sessions(ctx, u.KeycloakID)
	var old []string
	for _, session := range live {
		if session.Started.Before(*u.NotBefore) && session.ID != u.KeptSession {
			old = append(old, session.ID)
		}
	}
	if err == nil && len(old) > 0 {
		err = s.store.endKeycloakSessions(ctx, system("sessions"), u.ID, "not_before", s.now(), old)
	}
	if err != nil {
		return err
	}
	if len(old) == len(live) {
		err, old = s.kc.logOut(ctx, u.KeycloakID), nil // one call, and offline sessions, which no list has
	}
	for _, id := range old {
		err = cmp.Or(err, s.kc.endSession(ctx, id))
	}
	if err == nil {
		err = s.kc.endOffline(ctx, u.KeycloakID)
	}
	if err == nil {
		err = s.store.clearNotBefore(ctx, u)
	}
	return err
}

// noticeTask is the task that mails a user that its way to sign in was changed.
func noticeTask(keycloakID string) string { return "notice:" + keycloakID }

// notify mails a user that a credential or its address was changed, in Keycloak's mail, which asks for nothing. Whoever
// has chosen a new password is not kept out by failures with the former one.
func (s *server) notify(ctx context.Context, u keycloakUser) error {
	_, err := s.kc.unlock(ctx, u.id())
	if err == nil {
		err = s.kc.sendMail(ctx, u.id(), u.attribute(attrLocale), resetLifespan, securityNotice)
	}
	return err
}

// mailTries is how often a mail is tried that Keycloak's mail server refuses: about half an hour.
const mailTries = 8

// mailTask mails the user whose id in Keycloak ends the task's. One without a proven address gets no mail.
func (s *server) mailTask(
	ctx context.Context, t task, mail func(context.Context, keycloakUser) error,
) (time.Time, error) {
	_, id, _ := strings.Cut(t.ID, ":")
	u, err := s.kc.user(ctx, id)
	if errors.Is(err, errNotFound) || err == nil && (!u.enabled() || !u.verified()) {
		return never, nil
	}
	if err == nil {
		err = mail(ctx, u)
	}
	if errors.Is(err, errMailNotSent) && t.Attempts >= mailTries {
		s.log.WarnContext(ctx, "mail: refused, given up", "task", t.ID)
		err = nil
	}
	return never, err
}

// endSessionTask ends a session in Keycloak that has ended in PostgreSQL (S2).
func (s *server) endSessionTask(ctx context.Context, t task) (time.Time, error) {
	session, err := s.store.session(ctx, sessionID(t.ID))
	if err == nil && session.Ended {
		err = s.kc.endSession(ctx, session.KeycloakID)
	}
	if errors.Is(err, errNotFound) {
		err = nil
	}
	return never, err
}

// logout ends the session of a refresh token, in both stores. An unknown token is one whose session has ended.
func (s *server) logout(ctx context.Context, c caller, in refreshIn) (noContent, error) {
	out := noContent{}
	if in.fromCookie() {
		out.setCookie = s.refreshCookie("", -1)
	}
	for _, token := range in.tokens() {
		known, err := s.store.refreshToken(ctx, digest(token), s.now())
		if err == nil {
			c.Actor = string(known.user.ID)
			err = s.endSessions(ctx, c, known.user, known.Session, "logout")
		}
		if err != nil && !errors.Is(err, errNotFound) && !errors.Is(err, problemNotFound) {
			return out, err
		}
	}
	return out, nil
}

// account is the caller's, as its token knows it.
func (c caller) account() user { return user{ID: c.UserID, KeycloakID: c.Subject} }

// ownSessions lists where the caller is signed in.
func (s *server) ownSessions(ctx context.Context, c caller, in pageIn) (listOut[session], error) {
	return s.sessionsOf(ctx, c, c.account(), in)
}

// sessionsOf lists the live sessions of a user, also those that were begun at Keycloak. Those that Keycloak has ended
// end in PostgreSQL first. While Keycloak is away the list is what PostgreSQL knows.
func (s *server) sessionsOf(ctx context.Context, c caller, u user, in pageIn) (listOut[session], error) {
	if err := s.compareSessions(ctx, u); err != nil {
		s.log.WarnContext(ctx, "session: not compared with Keycloak", "user", u.ID, "error", err)
	}
	return pageOf(in, func(before cursor) ([]session, error) {
		return s.store.sessions(ctx, u.ID, before, in.Limit+1, s.now())
	}, func(row session) (session, cursor) {
		row.Current = row.KeycloakID == c.SessionID
		return row, cursor{row.CreatedAt, string(row.ID)}
	})
}

// compareSessions ends the sessions of a user in PostgreSQL that Keycloak has ended, and adds those that were begun
// there. Keycloak is asked last: a session has its row after Keycloak has begun it.
func (s *server) compareSessions(ctx context.Context, u user) error {
	rows, err := s.store.sessions(ctx, u.ID, latest, 1000, s.now())
	if err != nil {
		return err
	}
	live, err := s.kc.sessions(ctx, u.KeycloakID)
	if err != nil {
		return err
	}
	var gone []string
	for _, row := range rows {
		if !slices.ContainsFunc(live, func(l keycloakSession) bool { return l.ID == row.KeycloakID }) {
			gone = append(gone, row.KeycloakID)
		}
	}
	if len(gone) > 0 {
		err = s.store.endKeycloakSessions(ctx, system("sessions"), u.ID, "keycloak", s.now(), gone)
	}
	// One that has just begun may be about to get its row.
	young := func(l keycloakSession) bool { return l.Started.After(s.now().Add(-eventsSettle)) }
	if live = slices.DeleteFunc(live, young); err == nil && len(live) > 0 {
		err = s.store.addKeycloakSessions(ctx, u.ID, live)
	}
	return err
}

type sessionIn struct {
	ID sessionID `path:"session_id" pattern:"^SES-[A-Za-z0-9_-]{16}$" example:"SES-V1StGXR8_Z5jdHi6"`
}

// endOwnSession signs the caller out somewhere. Another's session is not found.
func (s *server) endOwnSession(ctx context.Context, c caller, in sessionIn) (noContent, error) {
	return noContent{}, s.endSessions(ctx, c, c.account(), in.ID, "own")
}

// endOwnSessions signs the caller out everywhere.
func (s *server) endOwnSessions(ctx context.Context, c caller, _ struct{}) (noContent, error) {
	return noContent{}, s.endSessions(ctx, c, c.account(), "", "own")
}
