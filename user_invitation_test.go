package main

import (
	"cmp"
	"fmt"
	"html"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"auth-service/dev/mail"
)

var actionLink = regexp.MustCompile(`https?://[^\s"<>]*/login-actions/action-token\?key=[^\s"<>]*`)

// readInvitation is Keycloak's link in an invitation, which is ours and in a language.
func (w *env) readInvitation(m mail.Message, language string) string {
	w.Helper()
	says := map[string]string{"en": "has been created for you", "de": "ein Konto für Sie angelegt"}[language]
	link := actionLink.FindString(m.Text)
	for _, part := range []string{m.Text, m.HTML} {
		if !strings.Contains(part, says) || !strings.Contains(part, "action-token?key=") || strings.Contains(part, "/account/verify") {
			w.Errorf("it is no invitation in %q: %s\n%s", language, m.Subject, part)
		}
	}
	if !strings.HasPrefix(link, services.KeycloakURL+"/realms/"+w.realm+"/") || !strings.Contains(m.HTML, `<html lang="`+language+`"`) {
		w.Fatalf("no link to Keycloak: %s", m.Text)
	}
	w.secrets.add(link[strings.Index(link, "key="):])
	return link
}

var infoLink = regexp.MustCompile(`(?s)id="kc-info-message".*?<a href="([^"]+)"`)

// choosesPassword follows an action link through Keycloak's pages to the service's.
func (p *person) choosesPassword(link string) {
	p.Helper()
	a := p.visit(link, call{})
	for range 8 {
		if to := a.Header.Get("Location"); to != "" {
			a = p.visit(to, call{})
		} else if form := formAction.FindSubmatch(a.Body); form != nil && strings.Contains(string(a.Body), "password-new") {
			a = p.visit(html.UnescapeString(string(form[1])), call{method: "POST", form: url.Values{"password-new": {password}, "password-confirm": {password}}})
		} else if on := infoLink.FindSubmatch(a.Body); on != nil {
			to := html.UnescapeString(string(on[1]))
			if _, path, ours := strings.Cut(to, "localhost:3000"); ours { // the default of PUBLIC_URL
				p.wants(p.visit(path, call{}), 200, "")
				return
			}
			a = p.visit(to, call{})
		} else {
			break
		}
	}
	p.Fatalf("the link leads to %v", a)
}

// invitationSettled waits until the loop has done all for a user.
func (w *env) invitationSettled(id userID) {
	w.Helper()
	w.eventually("it is settled", 20*time.Second, func() bool {
		return w.value(`select (due_at is null and not invitation_due)::text from users where user_id = $1`, id) == "true"
	})
}

// Who is invited chooses a password by the mail's link, which proves the address; before
// that nobody can sign in.
func TestInvitation(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	for _, c := range []struct {
		language, header string
		in               body
		lost             bool // the mail
	}{
		{"en", "", body{"role": "operator", "network_id": "N1", "station_id": "S1", "first_name": "Ada"}, false},
		{"de", "en", body{"locale": "de-CH"}, true},
		{"de", "de-AT,en;q=0.5", nil, false},
	} {
		in := changed(body{"email": newEmail()}, c.in)
		a := w.do(call{method: "POST", path: usersPath, json: in, auth: []string{"Bearer " + admin.signIn.text("access_token")}, header: map[string]string{"Accept-Language": c.header}})
		w.wants(a, 201, "")
		u := shown(a)
		m := w.receive(u.Email, 1)
		link := w.readInvitation(m, c.language)
		sameLinks(t, m)
		w.wants(w.login(u.Email, password), 401, "invalid-credentials") // there is none
		w.keycloakAdmin("PUT", "/users/"+u.KeycloakID+"/reset-password", body{"type": "password", "value": password, "temporary": false}, nil)
		w.wants(w.login(u.Email, password), 403, "account-setup-required") // not even with one
		w.wants(w.post(resendPath, body{"email": u.Email}), 404, "registration-not-found")
		if c.lost {
			w.minuteLater(u.Email)
			if a := w.do(forgetting(strings.ToUpper(u.Email))); a.Status != 202 {
				t.Error(a)
			}
			if again := w.readInvitation(w.receive(u.Email, 2), c.language); again == link {
				t.Error("it has the same link")
			} else {
				link = again
			}
			w.eventually("it is on record", 10*time.Second, func() bool {
				return w.value(`select count(*)::text from audit_log where action = 'password.forgot' and target = $1 and outcome = 'ok'`, u.ID) == "1"
			})
		}
		if got := shown(admin.asks("GET", usersPath+"/"+string(u.ID), nil)); got.IsVerified || got.LastLoginAt != nil {
			t.Errorf("verified before the link is followed: %+v", got)
		}
		p := w.person()
		p.choosesPassword(link)
		it := w.testUser(u.Email)
		if !it.IsVerified || it.LastLoginAt == nil || it.Role != u.Role || it.NetworkID != u.NetworkID || it.Source != "internal" {
			t.Errorf("signed in: %+v", it.user)
		}
		claims := unpacked(it.signIn.text("access_token"), 1)
		if got := fmt.Sprint(claims["user_id"], claims["roles"], claims["network_id"], claims["station_id"]); got != fmt.Sprint(u.ID, []string{u.Role},
			cmp.Or(u.NetworkID, noScope), cmp.Or(u.StationID, noScope)) {
			t.Errorf("claims: %s", got)
		}
		a = w.person().visit(link, call{})
		if a.Status != 400 || strings.Contains(string(a.Body), "password-new") {
			t.Errorf("the link works twice: %v", a)
		}
		if got := w.value(`select string_agg(concat_ws(' ', actor, action, outcome), ', ' order by at, ctid) from audit_log where target = $1 and action like 'user.%'`, u.ID); !regexp.MustCompile(
			fmt.Sprintf(`^%s user.create ok, %[1]s user.invite ok, (anonymous user.verified|system:sync user.sync) ok$`, admin.ID)).MatchString(got) { // whoever comes first
			t.Errorf("on record is %s", got)
		}
		w.minuteLater(u.Email)
		w.exec(`update rate_limits set resets_at = now() where key = $1`, "reset:"+tokenHash(u.Email))
		n := len(w.mail.To(u.Email))
		w.do(forgetting(u.Email)) // from now on it is a forgotten password
		if m := w.receive(u.Email, n+1); strings.Contains(m.Text, "created for you") || strings.Contains(m.Text, "für Sie angelegt") || !actionLink.MatchString(m.Text) {
			t.Errorf("%s\n%s", m.Subject, m.Text)
		}
	}
}

// Without a mail server, or without Keycloak, the invitation waits and goes out once.
func TestInvitationQueued(t *testing.T) {
	w := newEnv(t, nil)
	w.another(nil) // two loops
	admin := w.admin()
	for _, c := range []struct {
		name         string
		away, back   func() error
		hasKeycloak  bool
		thenDeletion bool
	}{
		{"no mail server", w.mail.Close, w.mail.Restart, true, false},
		{"no Keycloak", w.kc.close, w.kc.open, false, false},
		{"no mail server, and deleted meanwhile", w.mail.Close, w.mail.Restart, true, true},
	} {
		w.Run(c.name, func() {
			c.away()
			a := admin.asks("POST", usersPath, body{"email": newEmail(), "role": "operator", "network_id": "N1"})
			w.wants(a, 201, "")
			u := shown(a)
			path := usersPath + "/" + string(u.ID)
			got := admin.asks("GET", path, nil)
			w.wants(got, 200, "")
			if a.text("invitation_email") != "queued" || (u.KeycloakID != "") != c.hasKeycloak || got.text("keycloak_id") != u.KeycloakID {
				t.Errorf("created: %v\nread: %v", a, got)
			}
			if c.thenDeletion {
				w.wants(admin.asks("DELETE", path, nil), 204, "")
			}
			if err := c.back(); err != nil {
				w.Fatal(err)
			}
			if c.thenDeletion {
				w.usersDue()
				w.eventually("it is settled", 20*time.Second, func() bool {
					return w.value(`select (due_at is null)::text from users where user_id = $1`, u.ID) == "true"
				})
				if n := len(w.mail.To(u.Email)); n != 0 {
					t.Errorf("%d mails to who is deleted", n)
				}
				w.wants(admin.asks("POST", path+"/restore", nil), 200, "")
			}
			w.usersDue()
			w.invitationSettled(u.ID)
			link := w.readInvitation(w.receive(u.Email, 1), "en")
			w.check()
			if n := len(w.mail.To(u.Email)); n != 1 {
				t.Errorf("%d mails", n)
			}
			w.person().choosesPassword(link)
			if it := w.testUser(u.Email); it.Role != "operator" || it.KeycloakID == "" {
				t.Errorf("signed in: %+v", it.user)
			}
		})
	}
}

// An address gets ten mails a day, whatever for. Who is refused here uses none up.
func TestInvitationLimit(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	u := admin.invites(nil)
	day := mailsADay(u.Email).Key
	for range 3 {
		w.wants(admin.asks("POST", usersPath, body{"email": u.Email}), 409, "user-exists")
	}
	if hits := w.value(`select hits::text from rate_limits where key = $1`, day); hits != "1" {
		t.Errorf("%s mails were counted", hits)
	}
	email := newEmail()
	w.exec(`insert into rate_limits (key, hits, resets_at) values ($1, $2 - 1, now() + interval '1 hour')`, mailsADay(email).Key, mailsPerDay)
	tenth := admin.invites(body{"email": email})
	w.wants(admin.asks("DELETE", usersPath+"/"+string(tenth.ID), nil), 204, "")
	w.keycloakAdmin("PUT", "/users/"+tenth.KeycloakID, body{"email": newEmail()}, nil) // so that the address is free
	a := admin.asks("POST", usersPath, body{"email": strings.ToUpper(email), "username": "x-" + email[:8]})
	w.wants(a, 429, "resend-limit")
	if got := w.value(`select concat_ws(' ', actor, action, outcome, reason) from audit_log where request_id = $1`, a.text("request_id")); got != string(admin.ID)+" createUser refused resend-limit" {
		t.Errorf("on record is %s", got)
	}
	if n := w.value(`select count(*)::text from users where lower(email) = lower($1)`, email); n != "1" {
		t.Errorf("%s users are left", n)
	}
}
