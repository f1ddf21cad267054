package main

import (
	"encoding/json"
	"html"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/oauth2"
)

// A mobile app signs people in with the client of examples/mobile, in the system's browser (RFC 8252). Its tokens count
// at this service, its session is listed, and ends with all others.
func TestMobileClient(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	example, err := os.ReadFile("examples/mobile/client.json")
	if err != nil {
		t.Fatal(err)
	}
	w.keycloakAdmin("POST", "/clients", json.RawMessage(example), nil)
	email := newEmail()
	w.account(email)
	endpoint := services.KeycloakURL + "/realms/" + w.realm + "/protocol/openid-connect/"
	client := oauth2.Config{ClientID: "mobile-app", RedirectURL: "https://app.example.com/signed-in",
		Scopes: []string{"openid"}, Endpoint: oauth2.Endpoint{
			AuthURL: endpoint + "auth", TokenURL: endpoint + "token", AuthStyle: oauth2.AuthStyleInParams}}

	phone, verifier := w.person(), oauth2.GenerateVerifier()
	page := phone.visit(client.AuthCodeURL("state", oauth2.S256ChallengeOption(verifier)), call{})
	form := formAction.FindSubmatch(page.Body)
	if form == nil {
		t.Fatal(page)
	}
	credentials := url.Values{"username": {email}, "password": {password}}
	signedIn := phone.visit(html.UnescapeString(string(form[1])), call{method: "POST", form: credentials})
	link, err := url.Parse(signedIn.Header.Get("Location"))
	if err != nil || !strings.HasPrefix(link.String(), client.RedirectURL+"?") {
		t.Fatalf("it leads to %v: %v", link, signedIn)
	}
	token, err := client.Exchange(t.Context(), link.Query().Get("code"), oauth2.VerifierOption(verifier))
	if err != nil {
		t.Fatal(err)
	}
	token.Expiry = time.Now().Add(-time.Hour)
	if token, err = client.TokenSource(t.Context(), token).Token(); err != nil {
		t.Fatal(err)
	}
	w.secrets.add(token.AccessToken, token.RefreshToken)
	ask := func(method, path string) answer {
		t.Helper()
		return w.do(call{method: method, path: path, auth: []string{"Bearer " + token.AccessToken}})
	}
	if me := ask("GET", "/api/v1/auth/me"); me.Status != 200 || me.text("email") != email {
		t.Fatal(me)
	}
	w.wants(ask("GET", validatePath), 200, "")
	w.wants(w.post(refreshPath, body{"refresh_token": token.RefreshToken}), 401, "invalid-token") // it is Keycloak's
	w.eventually("the session is listed", time.Minute, func() bool {
		list := string(ask("GET", "/api/v1/auth/sessions").Body)
		return strings.Contains(list, `"current":true`) && strings.Contains(list, `"origin":"keycloak"`)
	})
	w.wants(ask("DELETE", "/api/v1/auth/sessions"), 204, "")
	w.eventually("its access token is revoked", time.Minute, func() bool {
		return ask("GET", "/api/v1/auth/me").Status == 401
	})
	token.Expiry = time.Now().Add(-time.Hour)
	if _, err := client.TokenSource(t.Context(), token).Token(); err == nil {
		t.Error("the session goes on")
	}
}
