package main

import (
	"net/url"
	"time"

	cdpnetwork "github.com/chromedp/cdproto/network"
	cdppage "github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"
)

// hasAuthenticator gives the tab a device that keeps passkeys, whose owner has shown a finger and names what it makes.
func (b *browser) hasAuthenticator() {
	b.Helper()
	_, err := chromedp.Call(b.ctx, webauthn.Enable, webauthn.EnableParams{})
	b.must(err)
	_, err = chromedp.Call(b.ctx, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{
		Options: &webauthn.VirtualAuthenticatorOptions{Protocol: "ctap2", Transport: "internal", HasResidentKey: true,
			HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true}})
	b.must(err)
	questions := chromedp.Events(b.ctx, cdppage.JavascriptDialogOpening)
	go func() {
		for _, err := range questions {
			if err != nil {
				return
			}
			chromedp.Call(b.ctx, cdppage.HandleJavaScriptDialog, cdppage.HandleJavaScriptDialogParams{Accept: true, PromptText: "laptop"})
		}
	}()
}

// scenarioPasskey adds a passkey, signs out, and signs in by it. Keycloak's pages of passkeys need scripts.
func scenarioPasskey(b *browser) {
	email := newEmail()
	b.account(email)
	b.open("/account/signed-in", 200, "You are signed in", "Delete the account")
	b.scripts(true)
	b.hasAuthenticator()
	b.arrive(chromedp.Click(labelled("Add a passkey")), 200, anything)
	b.signsIn(email, "Passkey Registration")
	b.photograph("keycloak-passkey")
	b.arrive(chromedp.Click(chromedp.CSS("#registerWebAuthn")), 200, "You are signed in")
	user := b.userOf(email)
	b.eventually("it is on record", time.Minute, func() bool {
		return b.value(`select count(*)::text from audit_log where action = 'credential.change' and target = $1`, user) == "1"
	})

	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders,
		cdpnetwork.SetExtraHTTPHeadersParams{Headers: cdpnetwork.Headers{}}) // CORS would ask for them
	b.must(err)
	type answer struct {
		Status int
		Token  string `json:"access_token"`
		Email  string
	}
	b.arrive(chromedp.Navigate(b.frontend+"/app"), 200, "App")
	if got := evaluate[answer](b, `ask("POST", "refresh")`); got.Status != 200 {
		b.Errorf("the session in which the passkey was added has ended: %v", got)
	}
	if got := evaluate[answer](b, `ask("POST", "logout")`); got.Status != 204 {
		b.Fatalf("logout: %v", got)
	}
	// Keycloak's page asks the browser for a passkey at once, and this device does not hesitate.
	b.must(chromedp.Do(b.ctx, chromedp.Navigate(b.vars["PUBLIC_URL"]+"/auth/login?return_to="+url.QueryEscape(b.frontend+"/app?by-passkey")),
		chromedp.WaitVisible(chromedp.Search(`//h1[.="App"]`))))
	var signIns []struct{ Details map[string]string }
	b.keycloakAdmin("GET", "/events?type=LOGIN&max=1&user="+b.keycloakID(email), nil, &signIns) // the latest
	if by := signIns[0].Details; by["credential_type"] != "webauthn-passwordless" || by["web_authn_authenticator_user_verification_checked"] != "true" {
		b.Errorf("Keycloak has let the person in by %v", by)
	}
	got := evaluate[answer](b, `ask("POST", "refresh")`)
	if me := evaluate[answer](b, `ask("GET", "me", "`+got.Token+`")`); got.Status != 200 || me.Email != email {
		b.Errorf("refresh %v, me %v", got, me)
	}
	if n := b.value(`select count(*)::text from audit_log where action = 'login' and outcome = 'ok' and target = $1`, user); n != "2" {
		b.Errorf("%s sign-ins are on record", n)
	}
}
