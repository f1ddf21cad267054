package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/oauth2"
)

// loginLimit bounds the attempts on one account, from wherever they come. Keycloak
// locks an account after wrong passwords; this keeps the guessing away from it.
func loginLimit(login string) limit {
	return limit{"login:" + tokenHash(strings.ToLower(login)), 20, time.Minute, problemTooManyRequests}
}

type loginIn struct {
	Username string `json:"username,omitempty" maxLength:"255" example:"ada"`
	Email    string `json:"email,omitempty" maxLength:"255" example:"ada@example.com" description:"Instead of username."`
	Password string `json:"password" required:"true" maxLength:"128" format:"password" example:"correct horse battery"`
}

type loginOut struct {
	tokens
	User loginUser `json:"user"`
}

// tokens is a token response (RFC 6749 §5.1) with what the service adds to it.
type tokens struct {
	AccessToken      string    `json:"access_token"`
	RefreshToken     string    `json:"refresh_token,omitempty"`
	IDToken          string    `json:"id_token"`
	TokenType        string    `json:"token_type" enum:"Bearer"`
	ExpiresIn        int       `json:"expires_in" example:"300" description:"Seconds."`
	RefreshExpiresIn int       `json:"refresh_expires_in" example:"1800" description:"Seconds."`
	Scope            string    `json:"scope" example:"openid email profile"`
	SessionID        sessionID `json:"session_id" example:"SES-V1StGXR8_Z5jdHi6"`
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
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
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
	out, err := s.openSession(ctx, c, token) // L2
	if err != nil {
		// Dying here (L1) leaves a session in Keycloak that nobody has the tokens of;
		// it dies of idleness.
		if claims, e := readClaims(token.AccessToken); e == nil {
			err = errors.Join(err, s.kc.endSession(ctx, claims.SessionID))
		}
	}
	return out, err
}

// openSession stores the session of fresh tokens and makes the answer.
func (s *server) openSession(ctx context.Context, c caller, token *oauth2.Token) (loginOut, error) {
	claims, err := readClaims(token.AccessToken)
	if err != nil {
		return loginOut{}, err
	}
	out := loginOut{tokens: tokens{AccessToken: token.AccessToken, RefreshToken: token.RefreshToken, TokenType: "Bearer",
		ExpiresIn: extraSeconds(token, "expires_in"), RefreshExpiresIn: extraSeconds(token, "refresh_expires_in"),
		SessionID: newSessionID()}}
	out.IDToken, _ = token.Extra("id_token").(string)
	out.Scope, _ = token.Extra("scope").(string)
	row := session{ID: out.SessionID, KeycloakID: claims.SessionID, RefreshHash: tokenHash(token.RefreshToken),
		ExpiresAt: s.now().Add(time.Duration(out.RefreshExpiresIn) * time.Second)}
	u, err := s.store.addSession(ctx, c, claims.Subject, row, s.now())
	if errors.Is(err, errNotFound) {
		if _, err = s.accountOf(ctx, c, claims.Subject); err == nil {
			u, err = s.store.addSession(ctx, c, claims.Subject, row, s.now())
		}
	}
	out.User = loginUser{u.ID, u.Email, u.Username, []string{u.Role}, u.NetworkID, u.StationID}
	return out, err
}

// accountOf returns the account that Keycloak has just let in, if it is one here,
// too. A verification that died between the two stores (V3) is finished first.
func (s *server) accountOf(ctx context.Context, c caller, subject string) (user, error) {
	u, err := s.store.userByKeycloakID(ctx, subject)
	if errors.Is(err, errNotFound) {
		return u, problemAccountSetupRequired.saying("This account is not known here yet. Please ask an administrator.")
	} else if err != nil {
		return u, err
	}
	if !u.IsActive {
		return u, problemAccountDisabled.about(string(u.ID)) // the stricter store wins
	}
	if u.IsVerified {
		return u, nil
	}
	reg, err := s.store.registrationByLogin(ctx, u.Email)
	if err == nil {
		if reg, err = s.touch(ctx, c, reg); err == nil && reg.State == pending {
			err = s.settle(ctx, c, reg)
		}
	}
	if err != nil && !errors.Is(err, errNotFound) {
		return u, err
	}
	if u, err = s.store.userByKeycloakID(ctx, subject); err == nil && !u.IsVerified {
		err = problemAccountNotVerified.about(string(u.ID))
	}
	return u, err
}

// loginError says why Keycloak has let nobody in. An account that waits for its
// confirmation is disabled in Keycloak, whatever the password, and only not fully
// set up while its mail is being sent.
func (s *server) loginError(ctx context.Context, name string, err error) error {
	switch {
	case errors.Is(err, errInvalidCredentials):
		return problemInvalidCredentials
	case !errors.Is(err, errAccountDisabled) && !errors.Is(err, errSetupRequired):
		return err
	}
	reg, lookup := s.store.registrationByLogin(ctx, name)
	if lookup == nil {
		return problemAccountNotVerified.about(string(reg.ID))
	} else if !errors.Is(lookup, errNotFound) {
		return lookup
	}
	if errors.Is(err, errAccountDisabled) {
		return problemAccountDisabled
	}
	u, lookup := s.kc.userByLogin(ctx, name)
	if lookup != nil {
		return lookup
	}
	return setupRequired(u)
}

// setupRequired says what Keycloak still wants from a person whose password is right.
func setupRequired(u keycloakUser) problem {
	p := problemAccountSetupRequired.about(u.attribute(attrUserID))
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
				return p.saying(sentence)
			}
		}
	}
	return p.saying("Something has to be set up first. Please sign in on the sign-in server's page.")
}

// claims of an access token, as far as they are used here.
type claims struct {
	Subject   string `json:"sub"`
	SessionID string `json:"sid"`
}

// readClaims reads a token that has just come from Keycloak's token endpoint itself;
// no signature is needed to know its origin (OpenID Connect Core §3.1.3.7).
func readClaims(token string) (claims, error) {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("keycloak's access token is not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	if err == nil && (c.Subject == "" || c.SessionID == "") {
		err = errors.New("sub or sid is missing")
	}
	if err != nil {
		return c, fmt.Errorf("keycloak's access token: %w", err)
	}
	return c, nil
}

func extraSeconds(token *oauth2.Token, name string) int {
	n, _ := token.Extra(name).(float64)
	return int(n)
}
