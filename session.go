package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"golang.org/x/oauth2"
)

// How a refresh token is exchanged.
const (
	rotationTime  = 6 * time.Second  // the most that an exchange may take, Keycloak's part included
	rotationLease = 10 * time.Second // longer: a holder who is slower has given up before another begins
	rotationWait  = 5 * time.Second  // for another request's exchange of the same token
	sessionCheck  = 30 * time.Minute // between two looks at whether Keycloak still has an idle session
)

// due is when the loop must look at a live session again.
func (s session) due(now time.Time) time.Time {
	if next := now.Add(sessionCheck); next.Before(s.ExpiresAt) {
		return next
	}
	return s.ExpiresAt
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

// refreshCookie keeps the refresh token of the code flow away from scripts.
func refreshCookie(token string, seconds int) *http.Cookie {
	return &http.Cookie{Name: "refresh_token", Value: token, MaxAge: seconds, Path: "/api/v1/auth",
		HttpOnly: true, Secure: true, SameSite: http.SameSiteLaxMode}
}

// refreshIn is a refresh token: the holder's in the body, or else that of the browser's
// cookie, if it has one.
type refreshIn struct {
	RefreshToken string `json:"refresh_token" required:"true" maxLength:"8192" example:"eyJhbGciOiJIUzUxMiJ9.eyJ0eXAiOiJSZWZyZXNoIn0.c2lnbmF0dXJl" description:"Without a body the cookie counts."`
	Cookie       string `cookie:"refresh_token" description:"Set by /auth/callback. Only from an allowed origin."`
}

func (in *refreshIn) setCookie(token string) { in.RefreshToken, in.Cookie = token, token }

// fromCookie says whether the token is the cookie's, and not the body's.
func (in refreshIn) fromCookie() bool { return in.Cookie != "" && in.RefreshToken == in.Cookie }

type refreshOut struct {
	tokenResponse
	setCookie *http.Cookie
}

func (out refreshOut) cookie() *http.Cookie { return out.setCookie }

// refresh exchanges a refresh token for the next one: F1 our lease of the token, F2
// Keycloak's tokens, F3 our record of them. Whoever shows the old one within the grace
// time gets the same answer, so that two tabs or a lost answer end no session; later
// it is theft (RFC 9700 §4.14.2).
func (s *server) refresh(ctx context.Context, c caller, in refreshIn) (refreshOut, error) {
	ctx, cancel := detached(ctx, rotationTime+rotationWait)
	defer cancel()
	answer, err := s.exchange(ctx, c, in.RefreshToken)
	out := refreshOut{tokenResponse: answer}
	if err == nil && in.fromCookie() {
		out.setCookie = refreshCookie(answer.RefreshToken, answer.RefreshExpiresIn)
		out.RefreshToken = ""
	}
	return out, err
}

// exchange returns the answer to a refresh token, however many ask for it at once.
func (s *server) exchange(ctx context.Context, c caller, token string) (tokenResponse, error) {
	for timeout, pause := time.Now().Add(rotationWait), 10*time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		t, err := s.store.takeRefreshToken(ctx, tokenHash(token), s.now()) // F1
		used := t.UsedAt.Unix() > 0
		switch {
		case errors.Is(err, errNotFound), err == nil && t.Ended:
			return tokenResponse{}, problemInvalidRefreshToken
		case err != nil:
			return tokenResponse{}, err
		case t.Leased:
			answer, err := s.rotate(ctx, c, t.session, t.Of, token)
			if !errors.Is(err, errLeaseLost) {
				return answer, err
			} // the session has just ended, or we were too slow: look again
		case used && s.now().Before(t.UsedAt.Add(s.cfg.RefreshGrace)):
			var answer tokenResponse
			plain, err := openSealed(token, t.Answer)
			if err == nil {
				err = json.Unmarshal(plain, &answer)
			}
			return answer, err
		case used:
			n, err := s.signOut(ctx, c, t.UserID, t.ID, entry{Action: "session.end", Reason: problemTokenReused.slug()})
			s.metrics.reuse.Add(float64(n))
			if err != nil {
				return tokenResponse{}, err
			}
			return tokenResponse{}, problemTokenReused.withTarget(string(t.UserID))
		case time.Now().After(timeout):
			return tokenResponse{}, errBusy
		default: // somebody else exchanges it
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

// rotate asks Keycloak for the next tokens and keeps its answer for the grace time,
// sealed by a key that only the holder of the old token can make. Dying after F2 loses
// an answer of Keycloak: the client's next try gets another when the lease has ended, as
// refreshTokenMaxReuse 1 allows once. Tokens that do not say what is true of u here, since
// somebody has changed that in Keycloak, are replaced at once; dying then ends the session.
func (s *server) rotate(ctx context.Context, c caller, session session, u user, token string) (tokenResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, rotationTime)
	defer cancel()
	next, err := s.kc.refresh(ctx, token) // F2
	if err == nil {
		if claims, _ := readClaims(next.AccessToken); !claims.match(u) {
			if err = s.reconcile(ctx, c, u.KeycloakID); err == nil || errors.Is(err, errConflict) {
				next, err = s.kc.refresh(ctx, next.RefreshToken)
			}
		}
	}
	switch {
	case errors.Is(err, errInvalidGrant): // ended by idleness, its maximum or an administrator
		s.log.InfoContext(ctx, "a session has ended in Keycloak", "session", session.ID, "error", err)
		if _, err := s.signOut(ctx, c, session.UserID, session.ID, entry{Action: "session.end", Reason: "keycloak"}); err != nil {
			return tokenResponse{}, err
		}
		return tokenResponse{}, problemInvalidRefreshToken.withTarget(string(session.UserID))
	case err != nil:
		return tokenResponse{}, errors.Join(err, s.store.releaseRefreshToken(context.WithoutCancel(ctx), tokenHash(token)))
	}
	answer := newTokenResponse(next, session.ID)
	plain, err := json.Marshal(answer)
	if err != nil {
		return tokenResponse{}, err
	}
	session.ExpiresAt = s.now().Add(time.Duration(answer.RefreshExpiresIn) * time.Second)
	return answer, s.store.rotate(ctx, session, tokenHash(token), tokenHash(answer.RefreshToken), seal(token, plain), s.now()) // F3
}

// signOut ends one session of a user, or all (id ""), and says how many: S1 ours, S2
// Keycloak's. While Keycloak is away the end stands, and the loop owes Keycloak its
// part.
func (s *server) signOut(ctx context.Context, c caller, user userID, id sessionID, e entry) (int, error) {
	ended, err := s.store.endSessions(ctx, c, user, id, e, s.now()) // S1
	if err != nil {
		return 0, err // perhaps it was committed and only the answer is lost: then the loop does S2
	}
	// Dying here (S1) leaves sessions in Keycloak: checkSessions ends them.
	s.settleSessions(ctx, ended)
	return len(ended), nil
}

// settleSessions does what is owed to Keycloak for ended sessions, or leaves it to the loop.
func (s *server) settleSessions(ctx context.Context, ended []session) {
	for _, session := range ended {
		if err := s.settleSession(ctx, session); err != nil {
			s.log.WarnContext(ctx, "a session will end in Keycloak later", "session", session.ID, "error", err)
		}
	}
}

// settleSession does what is owed to Keycloak for an ended session (S2).
func (s *server) settleSession(ctx context.Context, session session) error {
	if err := s.kc.endSession(ctx, session.KeycloakID); err != nil {
		return err
	}
	return s.store.sessionDue(ctx, session.ID, time.Time{})
}

// checkSessions keeps our sessions true: those that Keycloak has ended end here, and
// those that have ended here end in Keycloak.
func (s *server) checkSessions(ctx context.Context) error {
	start := s.now()
	return eachDue(ctx, s.log, func() (session, error) {
		return s.store.takeDueSession(ctx, start, s.now().Add(retryTime))
	}, s.checkSession)
}

func (s *server) checkSession(ctx context.Context, session session) error {
	if session.Ended {
		return s.settleSession(ctx, session)
	}
	reason := "expired"
	if s.now().Before(session.ExpiresAt) {
		u, err := s.store.user(ctx, session.UserID)
		if err != nil {
			return err
		}
		lives, err := s.kc.hasSession(ctx, u.KeycloakID, session.KeycloakID)
		if err != nil {
			return err
		}
		if lives {
			return s.store.sessionDue(ctx, session.ID, session.due(s.now()))
		}
		reason = "keycloak"
	}
	_, err := s.store.endSessions(ctx, system("sessions"), session.UserID, session.ID, entry{Action: "session.end", Reason: reason}, s.now())
	if err != nil {
		return err
	}
	return s.store.sessionDue(ctx, session.ID, time.Time{}) // what has ended in Keycloak need not end there
}

type noContent struct{ setCookie *http.Cookie }

func (out noContent) cookie() *http.Cookie { return out.setCookie }

// logout ends the session of a refresh token, here and in Keycloak. An unknown token
// is one whose session has ended.
func (s *server) logout(ctx context.Context, c caller, in refreshIn) (noContent, error) {
	ctx, cancel := detached(ctx, rotationTime)
	defer cancel()
	out := noContent{}
	if in.fromCookie() {
		out.setCookie = refreshCookie("", -1)
	}
	session, err := s.store.sessionOf(ctx, tokenHash(in.RefreshToken))
	if errors.Is(err, errNotFound) {
		return out, nil
	} else if err != nil {
		return out, err
	}
	c.Actor = string(session.UserID)
	_, err = s.signOut(ctx, c, session.UserID, session.ID, entry{Action: "logout", Reason: "logout"})
	return out, err
}

type sessionOut struct {
	ID         sessionID `json:"session_id" example:"SES-V1StGXR8_Z5jdHi6"`
	Current    bool      `json:"current" description:"The session of the access token that asks."`
	Address    string    `json:"ip_address" example:"192.0.2.7" description:"Of the sign-in."`
	UserAgent  string    `json:"user_agent" description:"Of the sign-in."`
	CreatedAt  time.Time `json:"created_at"`
	LastUsedAt time.Time `json:"last_used_at" description:"The sign-in or the latest refresh."`
	ExpiresAt  time.Time `json:"expires_at" description:"When it ends unless it is used."`
}

// ownSessions lists where the caller is signed in.
func (s *server) ownSessions(ctx context.Context, c caller, in pageIn) (listOut[sessionOut], error) {
	return s.sessionsOf(ctx, c, c.UserID, in)
}

func (s *server) sessionsOf(ctx context.Context, c caller, user userID, in pageIn) (listOut[sessionOut], error) {
	return pageOf(in, func(before cursor) ([]session, error) {
		return s.store.sessions(ctx, user, before, in.Limit+1, s.now())
	},
		func(session session) (sessionOut, cursor) {
			return sessionOut{session.ID, session.KeycloakID == c.SessionID, session.Address, session.UserAgent,
				session.CreatedAt, session.LastUsedAt, session.ExpiresAt}, cursor{session.CreatedAt, string(session.ID)}
		})
}

type sessionIn struct {
	ID sessionID `path:"session_id" pattern:"^SES-[A-Za-z0-9_-]{16}$" example:"SES-V1StGXR8_Z5jdHi6"`
}

// endOwnSession signs the caller out somewhere. Another's session is not found.
func (s *server) endOwnSession(ctx context.Context, c caller, in sessionIn) (noContent, error) {
	ctx, cancel := detached(ctx, rotationTime)
	defer cancel()
	return noContent{}, s.endSession(ctx, c, c.UserID, in.ID, "own")
}

// endOwnSessions signs the caller out everywhere.
func (s *server) endOwnSessions(ctx context.Context, c caller, _ struct{}) (noContent, error) {
	ctx, cancel := detached(ctx, rotationTime)
	defer cancel()
	return noContent{}, s.endSession(ctx, c, c.UserID, "", "own")
}

// endSession ends one session of a user, which must be there, or all (id "").
func (s *server) endSession(ctx context.Context, c caller, user userID, id sessionID, reason string) error {
	n, err := s.signOut(ctx, c, user, id, entry{Action: "session.end", Reason: reason})
	if err == nil && n == 0 && id != "" {
		err = problemNotFound
	}
	return err
}
