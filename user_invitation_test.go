package main

import (
	"cmp"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"
)

// An invitation is a registration that has role and scope already. Who is invited confirms it
// and chooses the password; before that nobody can sign in.

// sees asks for a user who is there.
func (c *testUser) sees(id userID) user {
	c.Helper()
	a := c.asks("GET", usersPath+"/"+string(id), nil)
	c.wants(a, 200, "")
	return shown(a)
}

// registrationOfUser is the id of the registration that a user has come by.
func (w *env) registrationOfUser(id userID) string {
	w.Helper()
	return w.value(`select registration_id from user_registrations where user_id = $1`, id)
}

func TestInvitation(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	for _, c := range []struct {
		language, header string
		in               body
		says             string
	}{
		{"en", "", body{"role": "operator", "network_id": "N1", "station_id": "S1", "first_name": "Ada"}, "was prepared for this e-mail address"},
		{"de", "en", body{"locale": "de-CH"}, "Für diese E-Mail-Adresse wurde ein Konto bei"},
		{"de", "de-AT,en;q=0.5", nil, "Für diese E-Mail-Adresse wurde ein Konto bei"},
	} {
		a := w.do(call{method: "POST", path: usersPath, json: changed(body{"email": newEmail()}, c.in), header: map[string]string{"Accept-Language": c.header},
			auth: []string{"Bearer " + admin.signIn.text("access_token")}})
		w.wants(a, 201, "")
		u := shown(a)
		m := w.receive(u.Email, 1)
		for _, part := range []string{m.Text, m.HTML} {
			if !strings.Contains(part, c.says) || strings.Contains(part, "Ada") || strings.Contains(part, "/login-actions/") {
				t.Errorf("it is no invitation in %q: %s\n%s", c.language, m.Subject, part)
			}
		}
		sameLinks(t, m)
		l := w.readLink(m)
		w.wants(w.login(u.Email, password), 403, "account-not-verified")
		if u.IsVerified || !u.IsActive || u.Source != "internal" || admin.sees(u.ID) != u || w.keycloakUsers()[w.registrationOfUser(u.ID)].Enabled {
			t.Errorf("not confirmed: %+v\nread: %+v", u, admin.sees(u.ID))
		}
		status := w.get("/api/v1/registrations/" + w.registrationOfUser(u.ID))
		if expires, err := time.Parse(time.RFC3339, status.text("expires_at")); err != nil || time.Until(expires) < 167*time.Hour || time.Until(expires) > 168*time.Hour {
			t.Errorf("it expires: %v", status)
		}
		if !strings.HasPrefix(string(u.ID), "USR-") || w.confirms(l).text("user_id") != string(u.ID) {
			t.Errorf("another user than %s has confirmed", u.ID)
		}
		it := w.testUser(u.Email)
		if !it.IsVerified || it.LastLoginAt == nil || it.Role != u.Role || it.NetworkID != u.NetworkID || it.Source != "internal" || it.FirstName != u.FirstName {
			t.Errorf("signed in: %+v", it.user)
		}
		claims := unpacked(it.signIn.text("access_token"), 1)
		if got := fmt.Sprint(claims["user_id"], claims["roles"], claims["network_id"], claims["station_id"]); got != fmt.Sprint(u.ID, []string{u.Role},
			cmp.Or(u.NetworkID, noScope), cmp.Or(u.StationID, noScope)) {
			t.Errorf("claims: %s", got)
		}
		if got := w.value(`select string_agg(concat_ws(' ', actor, action, outcome), ', ' order by at, ctid) from audit_log where target in ($1, $2) and action not like 'login%'`,
			u.ID, w.registrationOfUser(u.ID)); got != fmt.Sprintf("%s registration.begin ok, %[1]s user.create ok, %[1]s registration.mail ok, anonymous login refused, anonymous registration.verified ok", admin.ID) &&
			got != fmt.Sprintf("%s registration.begin ok, %[1]s user.create ok, %[1]s registration.mail ok, anonymous registration.verified ok", admin.ID) {
			t.Errorf("audited are %s", got)
		}
	}
}

// An invitation is spent with the confirmation: whoever finds its mail later sets no password,
// and as long as it is open nobody chooses one by another way (S12).
func TestInvitationIsSpent(t *testing.T) {
	w := sharedEnv(t)
	u := w.admin().invites(nil)
	old := w.readMail(u.Email, 1)
	w.wants(w.do(forgetting(u.Email)), 202, "") // it is no account yet
	w.confirms(old)
	const chosen = "another horse battery staple"
	w.secrets.add(chosen)
	w.keycloakAdmin("PUT", "/users/"+u.KeycloakID+"/reset-password", body{"type": "password", "value": chosen, "temporary": false}, nil)
	for _, r := range []call{verifying(old), typing(u.Email, old.Code)} {
		a := w.do(r)
		if w.wants(a, 200, ""); a.JSON["already_verified"] != true || a.JSON["set_password_mailed"] != false {
			t.Error(a)
		}
		w.wants(w.login(u.Email, password), 401, "invalid-credentials")
		w.wants(w.login(u.Email, chosen), 200, "")
	}
	w.eventually("the change of the password is told", time.Minute, func() bool { return len(w.mail.To(u.Email)) > 1 })
	if mails := w.mail.To(u.Email); len(mails) != 2 || !strings.Contains(mails[1].Text, "was changed just now") {
		t.Errorf("%d mails: %+v", len(mails), mails)
	}
}

// A stranger who knows the address of somebody invited has no second mail sent at once. Who is
// invited again hears of it at once, in the language of the second invitation.
func TestInvitationCooldown(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.admin()
	email := newEmail()
	invite := func(locale string) {
		w.wants(w.do(managing(admin.signIn, "POST", "", body{"email": email, "locale": locale})), 201, "")
	}
	invite("en")
	w.readMail(email, 1)
	for range 2 {
		w.wants(w.post(resendPath, body{"email": email}), 200, "")
		w.wants(w.post(registerPath, body{"email": email}), 201, "")
	}
	w.waitUntilIdle()
	if n := len(w.mail.To(email)); n != 1 {
		t.Errorf("%d mails", n)
	}
	invite("de")
	if m := w.receive(email, 2); !strings.Contains(m.Text, "Für diese E-Mail-Adresse wurde ein Konto") {
		t.Errorf("it is in another language: %s", m.Text)
	}
}

// Whose invitation has expired asks for a new one: an account of one's own would have neither role nor scope.
func TestInvitationExpired(t *testing.T) {
	w := sharedEnv(t)
	u := w.admin().invites(nil)
	l := w.readMail(u.Email, 1)
	w.expire(u.Email)
	for range 2 { // before and after it was ended
		page := w.get("/account/verify?token=" + l.Token)
		if body := string(page.Body); page.Status != 410 || !strings.Contains(body, "Please ask for a new one") || strings.Contains(body, "/account/register") {
			t.Errorf("%d %s", page.Status, body)
		}
		w.wants(w.do(verifying(l)), 410, "verification-expired")
	}
}

// Without a mail server the invitation waits and goes out once. While Keycloak is away nobody
// is invited, and nothing stays of it.
func TestInvitationQueued(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	w.another(nil) // the workers of two instances
	admin := w.admin()
	for _, deleted := range []bool{false, true} {
		w.Run(fmt.Sprint("no mail server, deleted meanwhile: ", deleted), func() {
			w.mail.Close()
			a := admin.asks("POST", usersPath, body{"email": newEmail(), "role": "operator", "network_id": "N1"})
			w.wants(a, 201, "")
			u := shown(a)
			if a.text("invitation_email") != "queued" || u.KeycloakID == "" || admin.sees(u.ID) != u {
				t.Errorf("created: %v", a)
			}
			if deleted {
				w.wants(admin.asks("DELETE", usersPath+"/"+string(u.ID), nil), 204, "")
			}
			if err := w.mail.Restart(); err != nil {
				w.Fatal(err)
			}
			w.waitUntilIdle()
			if deleted {
				w.wants(admin.asks("GET", usersPath+"/"+string(u.ID), nil), 404, "user-not-found")
				if n := len(w.mail.To(u.Email)); n != 0 {
					t.Errorf("%d mails to who is deleted", n)
				}
				return
			}
			w.confirms(w.readMail(u.Email, 1))
			if it := w.testUser(u.Email); it.Role != "operator" || len(w.mail.To(u.Email)) != 1 {
				t.Errorf("signed in: %+v; %d mails", it.user, len(w.mail.To(u.Email)))
			}
		})
	}
	w.Run("no Keycloak", func() {
		email := newEmail()
		w.kc.close()
		w.wants(admin.asks("POST", usersPath, body{"email": email}), 503, "unavailable")
		if err := w.kc.open(); err != nil {
			w.Fatal(err)
		}
		if n := w.value(`select (select count(*) from users where email = $1) + (select count(*) from user_registrations where email = $1)`+"||''", email); n != "0" {
			t.Errorf("%s rows are left", n)
		}
		w.check()
		admin.invites(body{"email": email})
		w.readMail(email, 1)
	})
}

// A stranger registers the address of who is to be invited: the invitation takes the
// registration over, and nothing of what the stranger typed stays. An administrator may end it,
// too (S9).
func TestInvitationOfARegistration(t *testing.T) {
	w := sharedEnv(t)
	admin, email := w.admin(), newEmail()
	a := w.post(registerPath, body{"email": email, "username": "evil-" + email[:8], "first_name": "Evil", "last_name": "Stranger", "phone": "+4930123456"})
	w.wants(a, 201, "")
	id, stranger := a.text("registration_id"), w.readMail(email, 1)
	a = admin.asks("POST", usersPath, body{"email": strings.ToUpper(email), "first_name": "Ada", "role": "operator", "network_id": "N1", "station_id": "S1"})
	w.wants(a, 201, "") // within the cooldown
	u := shown(a)
	if w.registrationOfUser(u.ID) != id || a.text("invitation_email") != "sent" || u.Source != "internal" || u.Role != "operator" || u.FirstName != "Ada" || u.LastName != "" || u.Phone != "" {
		t.Errorf("invited: %v", a)
	}
	if got := w.value(`select concat_ws(' ', source, role, network_id, station_id, created_by, expires_at > now() + interval '167 hours', username like 'evil%') from user_registrations where registration_id = $1`, id); got != fmt.Sprintf("internal operator N1 S1 %s t f", admin.ID) {
		t.Errorf("the registration is %s", got)
	}
	m := w.receive(email, 2)
	if l := w.readLink(m); !strings.Contains(m.Text, "was prepared for this e-mail address") || l.Token != stranger.Token || l.Code == stranger.Code {
		t.Errorf("the mail has %v, the first had %v:\n%s", l, stranger, m.Text)
	}
	if again := w.do(registering(email)); again.text("registration_id") != id { // it changes nothing any more
		t.Error(again)
	}
	w.confirms(w.lastMail(email))
	it := w.testUser(email)
	if it.ID != u.ID || it.Role != "operator" || it.FirstName != "Ada" || it.LastName != "" || strings.HasPrefix(it.Username, "evil") {
		t.Errorf("signed in: %+v", it.user)
	}
	w.wants(admin.asks("POST", usersPath, body{"email": email}), 409, "user-exists") // by now

	other := newEmail()
	id = w.register(other).text("registration_id")
	l := w.readMail(other, 1)
	pending := usersPath + "/" + w.idOf(other)
	w.wants(it.asks("DELETE", pending, nil), 404, "user-not-found") // whom it does not see
	a = admin.asks("DELETE", pending, nil)
	w.wants(a, 204, "")
	w.wants(w.do(verifying(l)), 410, "verification-cancelled")
	if _, there := w.keycloakUsers()[id]; there {
		t.Error("Keycloak has it still")
	}
	if got := w.value(`select string_agg(concat_ws(' ', actor, action, outcome, nullif(reason, '')), ', ' order by at, ctid) from audit_log where request_id = $1`,
		a.Header.Get("X-Request-Id")); got != fmt.Sprintf("%s user.remove ok, %[1]s registration.cancelled ok deleted", admin.ID) {
		t.Errorf("audited are %s", got)
	}
	w.wants(admin.asks("DELETE", pending, nil), 404, "user-not-found")
	admin.invites(body{"email": other})
}

// Who is invited once more is mailed at once, and the new role and scope count. Whose
// invitation the caller may not manage is not touched.
func TestInvitationAgain(t *testing.T) {
	w := sharedEnv(t)
	admin, email := w.admin(), newEmail()
	one, two := admin.invited("partner", "N-1-"+email[:8], ""), admin.invited("partner", "N-2-"+email[:8], "")
	u := one.invites(body{"email": email, "role": "user", "network_id": one.NetworkID})
	first := w.readMail(email, 1)
	for _, c := range []struct {
		by     *testUser
		in     body
		status int
		slug   string
	}{
		{two, body{"role": "user", "network_id": two.NetworkID}, 409, "user-exists"},
		{one, body{"role": "operator", "network_id": one.NetworkID, "station_id": "S1"}, 201, ""},
		{one, body{"role": "partner", "network_id": one.NetworkID}, 403, "forbidden"},
		{admin, body{"role": "partner", "network_id": two.NetworkID, "last_name": "Hopper"}, 201, ""},
		{one, body{"role": "user", "network_id": one.NetworkID}, 409, "user-exists"}, // by now
		{two, body{"role": "user", "network_id": two.NetworkID}, 409, "user-exists"}, // it may not manage partners
	} {
		before := admin.sees(u.ID)
		a := c.by.asks("POST", usersPath, changed(c.in, body{"email": email}))
		w.wants(a, c.status, c.slug)
		after := admin.sees(u.ID)
		want := before
		if c.status == 201 {
			want = after
			want.Role, want.NetworkID = c.in["role"].(string), c.in["network_id"].(string)
			if got := w.value(`select concat_ws(' ', actor, action, target, outcome, details->>'role') from audit_log where request_id = $1 and action like 'user.%'`,
				a.Header.Get("X-Request-Id")); got != fmt.Sprintf("%s user.invite %s ok %s", c.by.ID, u.ID, want.Role) || shown(a) != after {
				t.Errorf("audited is %s, answered %v", got, a)
			}
		}
		if after != want {
			t.Errorf("%v by %s: it is %+v\nwant %+v", c.in, c.by.NetworkID, after, want)
		}
	}
	if n := len(w.mail.To(email)); n != 3 {
		t.Errorf("%d mails", n)
	}
	w.check() // Keycloak has role and scope already
	last := w.readMail(email, 3)
	w.wants(w.do(typing(email, first.Code)), 400, "invalid-code") // the newest counts
	w.wants(w.do(typing(email, last.Code)), 200, "")
	if it := w.testUser(email); it.Role != "partner" || it.NetworkID != two.NetworkID || it.LastName != "Hopper" {
		t.Errorf("signed in: %+v", it.user)
	}
}

// A username is reserved, and looked at by Keycloak, with the confirmation: whoever confirms
// may choose another.
func TestInvitedUsername(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	wished := "wished-" + newEmail()[:8]
	one, two := admin.invites(body{"username": wished}), admin.invites(body{"username": wished})
	w.confirms(w.readMail(one.Email, 1))
	taken := verifying(w.readMail(two.Email, 1))
	w.wants(w.do(taken), 409, "user-exists")
	foreign := maps.Clone(taken.json.(map[string]any))
	foreign["username"] = "\u0430dmin-x" // not a Latin a
	w.names(w.post(verifyPath, foreign), "username")
	w.wants(w.login(two.Email, password), 403, "account-not-verified") // nothing has changed
	foreign["username"] = wished + "-2"
	w.wants(w.post(verifyPath, foreign), 200, "")
	for _, c := range []struct{ user, username string }{{one.Email, wished}, {two.Email, wished + "-2"}} {
		if it := w.testUser(c.user); it.Username != c.username {
			t.Errorf("it is %q, not %q", it.Username, c.username)
		}
	}
}

// An address gets ten invitations a day. Who is refused uses none up, and changes nothing.
func TestInvitationLimit(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	u := admin.invites(nil)
	day := invitesADay.of(mailbox(u.Email)).Key
	again := body{"email": strings.ToUpper(u.Email), "role": "operator"}
	w.exec(`update rate_limits set hits = $2 - 1 where key = $1`, day, invitesADay.N)
	w.wants(admin.asks("POST", usersPath, again), 201, "")
	again["role"] = "admin"
	a := admin.asks("POST", usersPath, again)
	w.wants(a, 429, "resend-limit")
	if got := w.value(`select concat_ws(' ', actor, action, outcome, reason) from audit_log where request_id = $1`, a.text("request_id")); got != string(admin.ID)+" createUser refused resend-limit" {
		t.Errorf("audited is %s", got)
	}
	if got := w.value(`select concat(role, ' ', (select hits from rate_limits where key = $2)) from users where user_id = $1`, u.ID, day); got != "operator 10" || len(w.mail.To(u.Email)) != 2 {
		t.Errorf("role, hits: %s; %d mails", got, len(w.mail.To(u.Email)))
	}
	email := newEmail()
	w.exec(`insert into rate_limits (key, hits, resets_at) values ($1, $2, now() + interval '1 hour')`, invitesADay.of(mailbox(email)).Key, invitesADay.N)
	w.wants(admin.asks("POST", usersPath, body{"email": email}), 429, "resend-limit")
	if n := w.value(`select count(*)::text from users where lower(email) = lower($1)`, email); n != "0" {
		t.Errorf("%s users are left", n)
	}
}
