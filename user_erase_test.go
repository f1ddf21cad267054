package main

import (
	"net/url"
	"testing"
	"time"
)

// erases asks an administrator to erase a user.
func (c *testUser) erases(id userID) answer {
	c.Helper()
	return c.asks("DELETE", usersPath+"/"+string(id)+"?erase=true", nil)
}

// traces are the tables that have one of some words in any column.
func (w *env) traces(words ...string) string {
	w.Helper()
	return w.value(`
		select coalesce(string_agg(distinct name, ' '), '') from (
			select 'users', u::text from users u union all select 'user_registrations', r::text from user_registrations r
			union all select 'sessions', s::text from sessions s union all select 'refresh_tokens', t::text from refresh_tokens t
			union all select 'tasks', t::text from tasks t union all select 'audit_log', a::text from audit_log a
			union all select 'sync_runs', r::text from sync_runs r union all select 'rate_limits', l::text from rate_limits l
		) t (name, row) where row ilike any($1)`, words)
}

// erased fails unless nothing is left of a user in either store.
func (w *env) erased(u user, more ...string) {
	w.Helper()
	words := []string{"%" + u.Email + "%"}
	for _, word := range append(more, u.Username, u.FirstName, u.LastName, u.Phone) {
		if word != "" {
			words = append(words, "%"+word+"%")
		}
	}
	if got := w.traces(words...); got != "" {
		w.Errorf("%s still has something of %s", got, u.Email)
	}
	if got := w.value(`select concat((select count(*) from users where user_id = $1), (select count(*) from user_registrations where user_id = $1),
		(select count(*) from sessions where user_id = $1))`, string(u.ID)); got != "000" {
		w.Errorf("rows of %s are left: %s", u.ID, got)
	}
	var found []seenUser
	w.keycloakAdmin("GET", "/users?search="+url.QueryEscape(u.Email), nil, &found)
	if len(found) > 0 {
		w.Errorf("Keycloak still has %+v", found)
	}
}

// Erasing leaves ids in the audit log and nothing else; the address is free at once.
func TestErase(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.admin()
	partner := admin.invited("partner", "N1", "")
	for name, before := range map[string]func(c *testUser){
		"live":    func(*testUser) {},
		"deleted": func(c *testUser) { w.wants(admin.asks("DELETE", usersPath+"/"+string(c.ID), nil), 204, "") },
		"an administrator": func(c *testUser) {
			admin.changes(c.ID, body{"role": "admin"})
		},
		"gone in Keycloak": func(c *testUser) { w.keycloakAdmin("DELETE", "/users/"+c.KeycloakID, nil, nil) },
	} {
		c := admin.invited("user", "N1", "")
		c.changes(c.ID, body{"first_name": "Wilhelmine", "last_name": "Zauberlinde", "phone": "+4930987654321", "photo": "https://cdn.example/wz.jpg"})
		c.user = shown(c.asks("GET", usersPath+"/me", nil))
		w.wants(partner.erases(c.ID), 403, "forbidden")
		w.wants(c.erases(c.ID), 403, "forbidden")
		w.post("/api/v1/auth/password/forgot", body{"email": c.Email})
		w.login(c.Email, "a wrong password")
		before(c)
		w.wants(admin.erases(c.ID), 204, "")
		w.erased(c.user, "Zauberlinde", "4930987654321", "wz.jpg")
		w.eventually(name+": its token is dead", 2*time.Second, func() bool { return w.do(bearing(validatePath, c.signIn.text("access_token"))).Status == 401 })
		w.wants(w.do(refreshing(c.signIn.text("refresh_token"))), 401, "invalid-token")
		w.wants(w.login(c.Email, password), 401, "invalid-credentials")
		w.wants(admin.asks("GET", usersPath+"/"+string(c.ID), nil), 404, "user-not-found")
		w.wants(admin.asks("POST", usersPath+"/"+string(c.ID)+"/restore", nil), 404, "user-not-found")
		w.wants(admin.erases(c.ID), 404, "user-not-found")
		if got := w.value(`select concat_ws(' ', actor, outcome, network_id, details) from audit_log where action = 'user.erase' and target = $1 and outcome = 'ok'`,
			string(c.ID)); got != string(admin.ID)+` ok N1 {"keycloak_id": "`+c.KeycloakID+`"}` {
			t.Errorf("%s: audited is %s", name, got)
		}
		w.register(c.Email) // the same person, again, at once, with its mail
		w.confirms(w.readMail(c.Email, len(w.mail.To(c.Email))))
		if again := w.testUser(c.Email); again.ID == c.ID || again.Role != "user" || again.FirstName != "" {
			t.Errorf("%s: %+v", name, again.user)
		}
	}
	w.wants(admin.erases(admin.ID), 403, "forbidden")
}

// What is pending is cancelled; the last administrator stays.
func TestErasePendingAndLast(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.admin()
	pending := newEmail()
	w.register(pending)
	u := user{ID: userID(w.userOf(pending)), Email: pending}
	w.wants(admin.erases(u.ID), 204, "")
	w.erased(u)
	other := admin.invited("user", "", "")
	admin.changes(other.ID, body{"role": "admin"})
	other = w.testUser(other.Email)
	w.exec(`update users set is_verified = false where user_id = $1`, string(other.ID)) // whose token still works
	w.wants(other.erases(admin.ID), 409, "last-admin")
	w.exec(`update users set is_verified = true where user_id = $1`, string(other.ID))
	w.wants(other.erases(admin.ID), 204, "")
	w.erased(admin.user)
}

// While Keycloak is away the person is erased in PostgreSQL and signs in no more. As soon as Keycloak is back somebody
// may register with the address; events and full passes bring nothing back.
func TestEraseKeycloakAway(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.admin()
	for _, f := range []fault{lost, applied} {
		c := admin.invited("user", "", "")
		w.during("delete_user", f, func() { w.wants(admin.erases(c.ID), 204, "") })
		if got := w.traces("%" + c.Email + "%"); got != "" {
			t.Errorf("%s has it", got)
		}
		if a := w.login(c.Email, password); a.Status/100 != 4 {
			t.Errorf("it signs in: %v", a)
		}
		w.wants(admin.asks("GET", usersPath+"/"+string(c.ID), nil), 404, "user-not-found")
		if found := admin.list("include_deleted=true&q=" + c.Email); len(found) > 0 {
			t.Errorf("it is listed: %v", found)
		}
		if found, _, out, err := w.sync(nil, "-dry-run"); err != nil || len(found) > 0 {
			t.Errorf("%v %v: %s", found, err, out)
		}
		w.register(c.Email)
		w.confirms(w.readMail(c.Email, 2))
		w.tasksDue()
		w.waitUntilIdle()
		if got := w.value(`select count(*)::text from users where user_id = $1`, string(c.ID)); got != "0" {
			t.Errorf("%s rows are left", got)
		}
	}
}
