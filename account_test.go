package main

import (
	"net/url"
	"strings"
	"testing"
	"time"
)

// follows goes where Keycloak leads, until that is a page or the service.
func (p *person) follows(a answer) answer {
	p.Helper()
	for a.Status/100 == 3 && strings.HasPrefix(a.Header.Get("Location"), services.KeycloakURL) {
		a = p.visit(a.Header.Get("Location"), call{})
	}
	return a
}

// manages follows the link of an action to its page of Keycloak, and signs in where Keycloak wants that.
func (p *person) manages(action, returnTo, login string) answer {
	p.Helper()
	a := p.follows(p.visit("/auth/login?"+url.Values{"action": {action}, "return_to": {returnTo}}.Encode(), call{}))
	if strings.Contains(string(a.Body), "kc-form-login") {
		a = p.follows(p.fillsIn(a, url.Values{"username": {login}, "password": {password}}))
	}
	return a
}

// decides sends the form of a page of Keycloak, and returns the query of the callback that this leads to.
func (p *person) decides(page answer, form url.Values) url.Values {
	p.Helper()
	a := p.follows(p.fillsIn(page, form))
	back, err := url.Parse(a.Header.Get("Location"))
	if err != nil || back.Path != "/auth/callback" {
		p.Fatalf("Keycloak leads to %q: %v", back, a)
	}
	p.secrets.add(back.Query().Get("code"), back.Query().Get("state"))
	return back.Query()
}

// Each action has its page of Keycloak. Whoever cancels comes back signed in, whether Keycloak knew the browser or not.
func TestAccountActions(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, _, id := w.member()
	known := w.person()
	for action, heading := range map[string]string{"password": "Update password", "email": "Update email", "passkey": "Passkey Registration",
		"otp": "Mobile Authenticator Setup", "delete": "Delete account confirmation"} {
		for _, p := range []*person{w.person(), known} {
			page := p.manages(action, afterApp, email)
			if page.Status != 200 || !strings.Contains(string(page.Body), heading) {
				t.Fatalf("%s leads to %v", action, page)
			}
			query := p.decides(page, url.Values{"cancel-aia": {"true"}})
			if got := query.Get("kc_action_status"); got != "cancelled" {
				t.Errorf("%s was %s", action, got)
			}
			p.isBack(p.comesBack(query), afterApp)
			w.wants(p.asks("refresh"), 200, "")
		}
	}
	if got := w.fromKeycloak(id)["email"]; got != email {
		t.Errorf("the address is %v", got)
	}
	w.edit("/authentication/required-actions/CONFIGURE_TOTP", func(rep map[string]any) { rep["enabled"] = false })
	p := w.person() // an operator has switched it off: the person just comes back
	back, _ := url.Parse(p.manages("otp", afterApp, email).Header.Get("Location"))
	p.secrets.add(back.Query().Get("code"), back.Query().Get("state"))
	p.isBack(p.comesBack(back.Query()), afterApp)
	for _, action := range []string{"UPDATE_PASSWORD", "Password", "profile", " "} {
		a := w.get("/auth/login?action=" + url.QueryEscape(action))
		if a.Status != 400 || !strings.Contains(string(a.Body), "action must be one of") || len(a.Header.Values("Set-Cookie")) > 0 {
			t.Errorf("%q: %v", action, a)
		}
	}
}

// laterThan waits until Keycloak, whose times have seconds, takes what happens now for later.
func (w *env) laterThan(second time.Time) {
	w.Helper()
	w.eventually("their second is over", 3*time.Second, func() bool { return time.Since(second.Truncate(time.Second)) > time.Second })
}

// A changed password ends all sessions but that in which it was changed. What was handed out of that one before, does end.
func TestOwnPassword(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	w.command("jobs") // from now on
	for name, comesBack := range map[string]bool{"comes back": true, "does not come back": false} {
		w.Run(name, func() {
			email, _, _ := w.member()
			p := w.person()
			p.isBack(p.comesBack(p.signsIn(p.begins("/"), email)), "http://localhost:3000/")
			before := p.cookies["refresh_token"]
			early := p.asks("refresh")
			w.wants(early, 200, "")
			ours, theirs := w.signsIn(email), w.direct(email, password)
			w.exec(`update sessions set created_at = created_at - interval '1 minute'`) // longer ago than clocks differ
			w.laterThan(time.Now())
			query := p.decides(p.manages("password", "/after", email), url.Values{"password-new": {password + "2"}, "password-confirm": {password + "2"}})
			if comesBack {
				p.isBack(p.comesBack(query), "http://localhost:3000/after")
			}
			w.command("jobs")
			w.revoked(ours, theirs, early)
			w.isOver(theirs)
			if !comesBack { // perhaps it was a page of somebody else's: what is here goes on with a fresh sign-in
				w.wants(p.asks("refresh"), 401, "invalid-token")
				p.isBack(p.comesBack(p.signsIn(p.begins("/after"), "")), "http://localhost:3000/after") // Keycloak knows the browser
			}
			for range 2 {
				again := p.asks("refresh")
				w.wants(again, 200, "")
				if !w.passes(again) {
					w.Error("the token of the session is refused")
				}
			}
			p.cookies["refresh_token"] = before
			w.wants(p.asks("refresh"), 401, "invalid-token")
			if n := w.value(`select count(*)::text from users where email = $1 and not_before is not null`, email); n != "0" {
				w.Error("something is left to end")
			}
		})
	}
	w.straysDie()
}

// deletesItself deletes the person's account on Keycloak's page.
func (p *person) deletesItself(email string) {
	p.Helper()
	a := p.follows(p.fillsIn(p.manages("delete", "/", email), url.Values{}))
	if a.Status != 200 || p.value(`select count(*)::text from users where email = $1`, email) == "0" {
		p.Fatalf("Keycloak says %v", a)
	}
}

// Whoever deletes the account at Keycloak is erased here, whatever comes first, and once.
func TestDeletesItself(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	w.command("jobs") // from now on
	for name, meanwhile := range map[string]func(u *testUser){
		"by the event": func(*testUser) {},
		"sync comes first": func(u *testUser) {
			if _, repaired, out, err := w.sync(nil); err != nil || repaired[diffMissing] != 1 {
				w.Fatalf("%v %v: %s", repaired, err, out)
			}
			w.value(`select user_id from users where user_id = $1 and not is_active`, string(u.ID))
		},
		"deleted by an administrator meanwhile": func(u *testUser) {
			w.exec(`update users set is_active = false, deleted_at = now() where user_id = $1`, string(u.ID))
		},
		"the last administrator": func(u *testUser) {
			if _, err := w.grantAdmin(u.Email); err != nil {
				w.Fatal(err)
			}
		},
	} {
		w.Run(name, func() {
			email, _, _ := w.member()
			u := w.testUser(email)
			u.changes(u.ID, body{"first_name": "Wilhelmine", "last_name": "Zauberlinde", "phone": "+4930987654321"})
			u.user = shown(u.asks("GET", usersPath+"/me", nil))
			w.person().deletesItself(email)
			meanwhile(u)
			w.command("jobs")
			w.exec(`update sync_cursor set event_ids = '{}', user_at = user_at - 60000`)
			w.command("jobs") // the events again, as after a crash
			w.erased(u.user, "Zauberlinde", "4930987654321")
			w.wants(w.do(refreshing(u.signIn.text("refresh_token"))), 401, "invalid-token")
			w.eventually("its token is dead", 2*time.Second, func() bool { return w.do(bearing(validatePath, u.signIn.text("access_token"))).Status == 401 })
			if got := w.value(`select string_agg(concat_ws(' ', actor, outcome, ip_address <> '', details), ', ') from audit_log where action = 'user.erase' and target = $1`,
				string(u.ID)); got != string(u.ID)+` ok t {"keycloak_id": "`+u.KeycloakID+`"}` {
				w.Errorf("audited is %s", got)
			}
			w.register(email) // the address is free
		})
	}
	w.straysDie()
}

// The page for people without an application shows all that an account can be asked for.
func TestSignedInPage(t *testing.T) {
	w := sharedEnv(t)
	page := string(w.get(afterSignIn).Body)
	for action := range accountActions {
		if !strings.Contains(page, `href="/auth/login?action=`+action+`"`) {
			t.Errorf("%s is not linked", action)
		}
	}
}
