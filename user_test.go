package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

const usersPath = "/api/v1/users"

// testUser is somebody who is signed in, with a role and a scope.
type testUser struct {
	*env
	user
	signIn answer // or the latest refresh
}

// asks sends a request with the access token.
func (c *testUser) asks(method, path string, in any) answer {
	c.Helper()
	r := authorized(c.signIn.text("access_token"), method, path)
	r.json = in
	return c.do(r)
}

// changes patches a user, and returns it.
func (c *testUser) changes(id userID, in body) user {
	c.Helper()
	a := c.asks("PATCH", usersPath+"/"+string(id), in)
	c.wants(a, 200, "")
	return shown(a)
}

// invites invites somebody that no one else is.
func (c *testUser) invites(in body) user {
	c.Helper()
	a := c.asks("POST", usersPath, changed(body{"email": newEmail()}, in))
	c.wants(a, 201, "")
	return shown(a)
}

// admits invites somebody who confirms the invitation.
func (c *testUser) admits(in body) user {
	c.Helper()
	u := c.invites(in)
	c.confirms(c.lastMail(u.Email))
	if err := c.pool.QueryRow(c.Context(), `select is_verified, username, updated_at from users where user_id = $1`, u.ID).
		Scan(&u.IsVerified, &u.Username, &u.UpdatedAt); err != nil {
		c.Fatal(err)
	}
	return u
}

// principal is whom the access token speaks for.
func (c *testUser) principal() principal {
	return principal{UserID: c.ID, Roles: []string{c.Role}, NetworkID: c.NetworkID, StationID: c.StationID}
}

// shown is the user that an answer shows.
func shown(a answer) (u user) {
	json.Unmarshal(a.Body, &u)
	return u
}

// testUser signs an account in.
func (w *env) testUser(email string) *testUser {
	w.Helper()
	c := &testUser{env: w, signIn: w.signsIn(email)}
	a := c.asks("GET", usersPath+"/me", nil)
	w.wants(a, 200, "")
	c.user = shown(a)
	return c
}

// invited makes an administrator give a new account a role and a scope, and signs it in.
func (c *testUser) invited(role, network, station string) *testUser {
	c.Helper()
	email, _, _ := c.member()
	c.changes(userID(c.value(`select user_id from users where email = $1`, email)), body{"role": role, "network_id": network, "station_id": station})
	return c.env.testUser(email)
}

// list returns all pages of a list of users.
func (c *testUser) list(query string) (all []user) {
	c.Helper()
	for cursor := ""; ; {
		a := c.asks("GET", usersPath+"?"+query+"&cursor="+cursor, nil)
		c.wants(a, 200, "")
		var page listOut[user]
		if err := json.Unmarshal(a.Body, &page); err != nil {
			c.Fatal(err)
		}
		if all = append(all, page.Items...); page.NextCursor == nil {
			return all
		}
		cursor = *page.NextCursor
	}
}

func ids(list []user) (all []string) {
	for _, u := range list {
		all = append(all, string(u.ID))
	}
	return all
}

// What follows from a change: the old access tokens are dead in a second, at every
// instance, the next ones carry it, and it is audited.
func TestChangeOfRole(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	admin := w.admin()
	c := admin.invited("user", "", "")
	before := admin.changes(c.ID, body{"first_name": "Ada", "phone": "+4930123456", "photo": "https://cdn.example/ada.jpg"})
	validates := func(token, demand string, status int) {
		t.Helper()
		for _, at := range []*env{w, v} {
			at.eventually(fmt.Sprint(status), time.Second, func() bool { return at.do(bearing(validatePath+demand, token)).Status == status })
		}
	}
	old := c.signIn
	validates(old.text("access_token"), "?role=user", 200) // names change no token

	a := admin.asks("PATCH", usersPath+"/"+string(c.ID), body{"role": "operator", "network_id": "N1", "station_id": "S1", "last_name": "Lovelace"})
	w.wants(a, 200, "")
	want := before
	want.Role, want.NetworkID, want.StationID, want.LastName, want.UpdatedAt = "operator", "N1", "S1", "Lovelace", shown(a).UpdatedAt
	if diff := cmp.Diff(want, shown(a)); diff != "" || !want.UpdatedAt.After(before.UpdatedAt) {
		t.Error(diff)
	}
	validates(old.text("access_token"), "", 401)
	c.signIn = w.refreshed(old)
	claims := unpacked(c.signIn.text("access_token"), 1)
	if got := fmt.Sprint(claims["user_id"], claims["roles"], claims["network_id"], claims["station_id"]); got != fmt.Sprint(c.ID, []string{"operator"}, "N1", "S1") {
		t.Errorf("claims: %s", got)
	}
	for _, at := range []*env{w, v} { // at once
		w.wants(at.do(bearing(validatePath+"?role=operator&network_id=N1&station_id=S1", c.signIn.text("access_token"))), 200, "")
	}
	w.wants(c.asks("GET", usersPath+"/me", nil), 200, "")
	recorded := func(a answer, want string) {
		t.Helper()
		if got := w.value(`select concat_ws(' ', actor, action, target, outcome, network_id, details) from audit_log where request_id = $1`, a.Header.Get("X-Request-Id")); got != want {
			t.Errorf("audited is\n%s, not\n%s", got, want)
		}
	}
	recorded(a, fmt.Sprintf(`%s user.update %s ok N1 {"role": {"after": "operator", "before": "user"}, "last_name": "changed", `+
		`"network_id": {"after": "N1", "before": ""}, "station_id": {"after": "S1", "before": ""}}`, admin.ID, c.ID))

	a = admin.asks("PATCH", usersPath+"/"+string(c.ID), body{"station_id": "", "first_name": "", "last_name": "", "phone": "", "photo": ""})
	w.wants(a, 200, "")
	validates(c.signIn.text("access_token"), "", 401)
	c.signIn = w.refreshed(c.signIn)
	if claims = unpacked(c.signIn.text("access_token"), 1); claims["station_id"] != "X" || claims["network_id"] != "N1" {
		t.Errorf("claims: %v", claims)
	}
	validates(c.signIn.text("access_token"), "?role=operator&network_id=N1", 200)
	recorded(a, fmt.Sprintf(`%s user.update %s ok N1 {"phone": "changed", "photo": "changed", "last_name": "changed", "first_name": "changed", `+
		`"station_id": {"after": "", "before": "S1"}}`, admin.ID, c.ID))
	for _, same := range []body{{}, {"station_id": "", "role": "operator", "first_name": ""}, {"first_name": nil, "role": nil, "network_id": nil}} {
		b := admin.asks("PATCH", usersPath+"/"+string(c.ID), same)
		if diff := cmp.Diff(a.JSON, b.JSON, cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "last_login_at" }, cmp.Ignore())); diff != "" {
			t.Errorf("%v has changed something: %s", same, diff)
		}
		w.wants(b, 200, "")
		if n := w.value(`select count(*)::text from audit_log where request_id = $1`, b.Header.Get("X-Request-Id")); n != "0" {
			t.Errorf("%v: %s entries for no change", same, n)
		}
	}
	validates(c.signIn.text("access_token"), "?role=operator&network_id=N1", 200)
}

// Whoever is deleted is out at once, and can come back.
// Who is deleted while confirming is deleted.
func TestDeletedWhileConfirming(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	admin := w.admin()
	email := newEmail()
	w.register(email)
	l := w.readMail(email, 1)
	id := w.idOf(email)
	there, release := w.kc.holdAt("^activate_user ", true)
	confirmed := make(chan answer, 1)
	go func() { a, _ := w.send(w.url, verifying(l)); confirmed <- a }()
	<-there
	deleted := make(chan answer, 1)
	go func() { a, _ := w.send(w.url, managing(admin.signIn, "DELETE", "/"+id, nil)); deleted <- a }()
	w.eventually("the deletion waits for the confirmation", time.Minute, func() bool { return w.kc.count("activate_user") > 0 })
	release()
	w.wants(<-confirmed, 200, "")
	a := <-deleted
	for a.Status == 503 { // it came first and has waited for a second
		a = w.do(managing(admin.signIn, "DELETE", "/"+id, nil))
	}
	w.wants(a, 204, "")
	w.wants(w.login(email, password), 403, "account-disabled")
}

func TestDeleteAndRestore(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	admin := w.admin()
	c := admin.invited("operator", "N1", "S1")
	path := usersPath + "/" + string(c.ID)
	other := w.signsIn(c.Email)
	a := admin.asks("DELETE", path, nil)
	w.wants(a, 204, "")
	w.ended("user.delete", c.signIn)
	w.ended("user.delete", other)
	for _, at := range []*env{w, v} {
		at.eventually("the access token is dead", time.Second, func() bool { return at.do(bearing(validatePath, c.signIn.text("access_token"))).Status == 401 })
	}
	w.wants(w.login(c.Email, password), 403, "account-disabled")
	deleted := shown(admin.asks("GET", path, nil))
	if deleted.IsActive || deleted.DeletedAt == nil || time.Since(*deleted.DeletedAt) > time.Minute {
		t.Errorf("deleted: %+v", deleted)
	}
	for query, want := range map[string]bool{"": false, "include_deleted=false": false, "include_deleted=true": true} {
		if got := slices.Contains(ids(admin.list("q="+c.Email+"&"+query)), string(c.ID)); got != want {
			t.Errorf("with %q it is listed: %v", query, got)
		}
	}
	again := admin.asks("DELETE", path, nil)
	w.wants(again, 204, "")
	if diff := cmp.Diff(deleted, shown(admin.asks("GET", path, nil))); diff != "" {
		t.Error(diff)
	}
	admin.changes(c.ID, body{"first_name": "Gone"}) // brings nobody back
	w.wants(w.login(c.Email, password), 403, "account-disabled")

	back := admin.asks("POST", path+"/restore", nil)
	w.wants(back, 200, "")
	if u := shown(back); !u.IsActive || u.DeletedAt != nil || u.Role != "operator" || u.NetworkID != "N1" {
		t.Errorf("restored: %v", back)
	}
	twice := admin.asks("POST", path+"/restore", nil)
	w.wants(twice, 200, "")
	w.wants(w.do(refreshing(other.text("refresh_token"))), 401, "invalid-token")
	w.wants(w.do(bearing(validatePath, c.signIn.text("access_token"))), 401, "unauthorized") // its session has ended
	c = w.testUser(c.Email)
	w.wants(c.asks("GET", validatePath+"?role=operator&network_id=N1&station_id=S1", nil), 200, "")
	for _, one := range []struct {
		answer
		want string
	}{
		{a, fmt.Sprintf(`%s session.end %s ok user.delete, %[1]s user.delete %[2]s ok {"is_active": {"after": false, "before": true}}`, admin.ID, c.ID)},
		{again, ""}, {twice, ""},
		{back, fmt.Sprintf(`%s session.end %s ok user.restore, %[1]s user.restore %[2]s ok {"is_active": {"after": true, "before": false}}`, admin.ID, c.ID)},
	} {
		if got := w.value(`select coalesce(string_agg(concat_ws(' ', actor, action, target, outcome, nullif(reason, ''), case action when 'session.end' then null else details end), ', ' order by action), '')
			from audit_log where request_id = $1`, one.Header.Get("X-Request-Id")); got != one.want {
			t.Errorf("audited is\n%s, not\n%s", got, one.want)
		}
	}
}

// TestManagedSessions has what a manager sees and ends of others.
func TestManagedSessions(t *testing.T) {
	w := sharedEnv(t)
	network := "N-" + gonanoid.Must(8)
	admin := w.admin()
	partner, c := admin.invited("partner", network, ""), admin.invited("user", network, "")
	path := usersPath + "/" + string(c.ID) + "/sessions"
	var all []answer
	for range 3 {
		all = append(all, w.signsIn(c.Email))
	}
	sessions := func(query string) (got []string) {
		t.Helper()
		a := partner.asks("GET", path+query, nil)
		w.wants(a, 200, "")
		for _, item := range a.JSON["items"].([]any) {
			if got = append(got, item.(body)["session_id"].(string)); item.(body)["current"] != false {
				t.Errorf("it is not the partner's: %v", item)
			}
		}
		return got
	}
	id := func(a answer) string { return a.text("session_id") }
	if diff := cmp.Diff([]string{id(all[2]), id(all[1]), id(all[0]), id(c.signIn)}, sessions("")); diff != "" {
		t.Error(diff)
	}
	if got := sessions("?limit=1"); len(got) != 1 || got[0] != id(all[2]) {
		t.Error(got)
	}
	w.names(partner.asks("GET", path+"?limit=0", nil), "limit")
	for _, bad := range []string{id(partner.signIn), id(admin.signIn), string(newSessionID()), "SES-1", "x"} {
		w.wants(partner.asks("DELETE", path+"/"+bad, nil), 404, "not-found")
	}
	for _, of := range []*testUser{admin, partner} {
		w.wants(c.asks("GET", usersPath+"/"+string(of.ID)+"/sessions", nil), 404, "user-not-found")
		w.wants(c.asks("DELETE", usersPath+"/"+string(of.ID)+"/sessions/"+id(of.signIn), nil), 404, "user-not-found")
	}
	w.wants(partner.asks("DELETE", path+"/"+id(all[1]), nil), 204, "")
	w.wants(partner.asks("DELETE", path+"/"+id(all[1]), nil), 404, "not-found")
	w.ended("managed", all[1])
	w.wants(c.asks("GET", usersPath+"/me/sessions", nil), 200, "") // the others live
	w.wants(partner.asks("DELETE", path, nil), 204, "")
	for _, a := range []answer{all[0], all[2], c.signIn} {
		w.ended("managed", a)
	}
	w.wants(partner.asks("DELETE", path, nil), 204, "")
	w.eventually("the access token is dead", time.Second, func() bool { return c.asks("GET", usersPath+"/me", nil).Status == 401 })
	w.wants(w.as(w.signsIn(c.Email), "GET", usersPath+"/me"), 200, "")
	w.wants(partner.asks("GET", usersPath+"/me", nil), 200, "")
}

// TestUserRequests is the contract of each request: what is wrong is named, what is right
// is done as it says.
func TestUserRequests(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	long, pending, null := strings.Repeat("x", 101), newEmail(), (*string)(nil)
	w.wants(w.post(registerPath, body{"email": pending, "username": "p-" + pending[:8]}), 201, "")
	unverified := userID(w.value(`select user_id from users where email = $1`, pending))
	elsewhere := newEmail()
	w.keycloakAdmin("POST", "/users", body{"email": elsewhere, "username": "k-" + elsewhere[:8], "enabled": true}, nil)
	gone := admin.admits(body{"username": "g-" + pending[:8]})
	w.wants(admin.asks("DELETE", usersPath+"/"+string(gone.ID), nil), 204, "")
	u := admin.admits(body{"username": "U-" + pending[:8]})
	one, nobody, create := usersPath+"/"+string(u.ID), usersPath+"/"+string(newUserID()), func(in body) body { return changed(body{"email": newEmail()}, in) }
	person := []string{"Ada-Augusta", "King-Noel", "+4930987654", "https://cdn.example/a%20b.jpg?x=1"}
	w.secrets.add(append(person, u.Email, u.Username, gone.Email)...) // the record and the log have ids, and nothing personal

	for _, r := range []struct {
		name, method, path string
		in                 any
		status             int
		slug               string // or the fields of invalid-request
	}{
		{"create: the least", "POST", usersPath, create(nil), 201, ""},
		{"create: all", "POST", usersPath, create(body{"username": "a-" + gonanoid.MustGenerate("abcdef", 8), "first_name": "Ada", "last_name": "Lovelace", "phone": "+4930123456",
			"role": "partner", "network_id": "NET_1.a-b", "station_id": "STA-7", "locale": "de-AT"}), 201, ""},
		{"create: its address as username", "POST", usersPath, body{"email": "N" + pending, "username": "n" + pending}, 201, ""},
		{"create: empty", "POST", usersPath, create(body{"network_id": "", "station_id": "", "first_name": "", "last_name": ""}), 201, ""},
		{"create: null, and empty where that is no value", "POST", usersPath, create(body{"username": null, "role": null, "network_id": null, "first_name": null, "phone": "", "locale": ""}),
			400, "first_name locale network_id phone role username"},
		{"create: nothing", "POST", usersPath, body{}, 400, "email"},
		{"create: everything wrong", "POST", usersPath, body{"email": "ada", "username": "a", "first_name": "<b>", "last_name": long, "phone": "030", "role": "chief",
			"network_id": "N 1", "station_id": strings.Repeat("S", 33), "locale": "german", "password": password, "photo": "https://x.example/"},
			400, "email first_name last_name locale network_id password phone photo role station_id username"},
		{"create: wrong types", "POST", usersPath, body{"email": 1, "role": []string{"user"}, "network_id": 7}, 400, "email network_id role"},
		{"create: X is none in tokens", "POST", usersPath, create(body{"network_id": "X", "station_id": "X"}), 400, "network_id station_id"},
		{"create: x is one", "POST", usersPath, create(body{"network_id": "x", "station_id": "XX"}), 201, ""},
		{"create: another's address as username", "POST", usersPath, create(body{"username": u.Email}), 400, "username"},
		{"create: address taken here", "POST", usersPath, body{"email": strings.ToUpper(u.Email)}, 409, "user-exists"},
		{"create: username taken here", "POST", usersPath, create(body{"username": strings.ToUpper(u.Username)}), 409, "user-exists"},
		{"create: address taken in Keycloak", "POST", usersPath, body{"email": strings.ToUpper(elsewhere)}, 409, "user-exists"},
		{"create: username taken in Keycloak", "POST", usersPath, create(body{"username": "K-" + elsewhere[:8]}), 409, "user-exists"},
		{"create: username of a registration, which reserves none", "POST", usersPath, create(body{"username": "P-" + pending[:8]}), 201, ""},
		{"create: address of who is deleted", "POST", usersPath, body{"email": gone.Email}, 409, "user-exists"},
		{"register: address of who was invited", "POST", registerPath, body{"email": u.Email}, 409, "user-exists"},
		{"register: username of who was invited", "POST", registerPath, body{"email": newEmail(), "username": u.Username}, 409, "user-exists"},

		{"change: all", "PATCH", one, body{"first_name": person[0], "last_name": person[1], "phone": person[2], "photo": person[3], "role": "operator", "network_id": "N1", "station_id": "S1"}, 200, ""},
		{"change: null is as absent", "PATCH", one, body{"first_name": nil, "photo": nil, "role": nil, "network_id": nil}, 200, ""},
		{"change: everything wrong", "PATCH", one, body{"first_name": "a\u0000", "last_name": "{}", "phone": "12", "photo": "http://cdn.example/a.jpg", "role": "Admin", "network_id": "N/1", "station_id": long,
			"email": "new@example.test", "username": "new", "is_active": false, "user_id": "USR-1"},
			400, "email first_name is_active last_name network_id phone photo role station_id user_id username"},
		{"change: another than in the path", "PATCH", one, body{"user_id": admin.ID, "first_name": "Grace"}, 400, "user_id"},
		{"change: no role is none", "PATCH", one, body{"role": ""}, 400, "role"},
		{"change: X is none in tokens", "PATCH", one, body{"network_id": "X", "station_id": "X"}, 400, "network_id station_id"},
		{"change: a photo that is a script", "PATCH", one, body{"photo": "javascript:alert(1)"}, 400, "photo"},
		{"change: wrong types", "PATCH", one, body{"first_name": 1, "role": true, "station_id": []string{}}, 400, "first_name role station_id"},
		{"change: empty clears", "PATCH", one, body{"first_name": "", "last_name": "", "phone": "", "photo": "", "network_id": "", "station_id": ""}, 200, ""},

		{"list: a wrong role", "GET", usersPath + "?role=chief&source=mail", nil, 400, "role source"},
		{"list: a short search", "GET", usersPath + "?q=ab", nil, 400, "q"},
		{"list: a short search in two bytes each", "GET", usersPath + "?q=%C3%A4%C3%B6", nil, 400, "q"},
		{"list: long ones", "GET", usersPath + "?q=" + long + "&network_id=" + long[:33], nil, 400, "network_id q"},
		{"list: no number, no truth", "GET", usersPath + "?limit=x&include_deleted=maybe", nil, 400, "include_deleted limit"},
		{"list: limit 0", "GET", usersPath + "?limit=0", nil, 400, "limit"},
		{"list: a foreign cursor", "GET", usersPath + "?cursor=abc", nil, 400, "cursor"},
		{"list: a typo", "GET", usersPath + "?network=N1&rolle=user", nil, 400, "network rolle"},
		{"list: twice", "GET", usersPath + "?role=user&role=admin", nil, 400, "role"},

		{"nobody: read", "GET", nobody, nil, 404, "user-not-found"},
		{"nobody: change", "PATCH", nobody, body{"first_name": "A"}, 404, "user-not-found"},
		{"nobody: delete", "DELETE", nobody, nil, 404, "user-not-found"},
		{"nobody: restore", "POST", nobody + "/restore", nil, 404, "user-not-found"},
		{"nobody: sessions", "GET", nobody + "/sessions", nil, 404, "user-not-found"},
		{"nobody: end sessions", "DELETE", nobody + "/sessions", nil, 404, "user-not-found"},
		{"no id: read", "GET", usersPath + "/ada", nil, 404, "not-found"},
		{"no id: change", "PATCH", usersPath + "/USR-1", body{"first_name": "A"}, 404, "not-found"},
		{"no id: delete", "DELETE", usersPath + "/REG-0123456789abcdef", nil, 404, "not-found"},
		{"no id: restore", "POST", usersPath + "/ME/restore", nil, 404, "not-found"},
		{"no id: sessions", "GET", usersPath + "/%00/sessions", nil, 404, "not-found"},

		{"not confirmed: read", "GET", usersPath + "/" + string(unverified), nil, 200, ""},
		{"not confirmed: change", "PATCH", usersPath + "/" + string(unverified), body{"first_name": "A"}, 403, "account-not-verified"},
		{"not confirmed: assign", "PATCH", usersPath + "/" + string(unverified), body{"role": "admin"}, 403, "account-not-verified"},
		{"not confirmed: restore, who is not deleted", "POST", usersPath + "/" + string(unverified) + "/restore", nil, 200, ""},
		{"not confirmed: sessions", "GET", usersPath + "/" + string(unverified) + "/sessions", nil, 403, "account-not-verified"},
		{"not confirmed: delete cancels the registration", "DELETE", usersPath + "/" + string(unverified), nil, 204, ""},
		{"not confirmed: it is gone", "GET", usersPath + "/" + string(unverified), nil, 404, "user-not-found"},

		{"me: read", "GET", usersPath + "/me", nil, 200, ""},
		{"me: change", "PATCH", usersPath + "/me", body{"first_name": "Grace"}, 200, ""},
		{"me: delete", "DELETE", usersPath + "/me", nil, 403, "forbidden"},
		{"me: restore", "POST", usersPath + "/me/restore", nil, 403, "forbidden"},
		{"me: sessions", "GET", usersPath + "/me/sessions", nil, 200, ""},
		{"me: no session", "DELETE", usersPath + "/me/sessions/SES-1", nil, 404, "not-found"},
		{"nobody: no session", "DELETE", usersPath + "/USR-1/sessions/SES-0123456789abcdef", nil, 404, "not-found"},
		{"me: a session", "DELETE", usersPath + "/me/sessions/" + w.signsIn(admin.Email).text("session_id"), nil, 204, ""},
		{"create: where nothing is", "PUT", usersPath, create(nil), 405, "method-not-allowed"},
	} {
		w.Run(r.name, func() {
			w.answered(admin.asks(r.method, r.path, r.in), r.in, r.status, r.slug)
		})
	}
	w.wants(w.get(usersPath), 401, "unauthorized")
	for _, r := range []call{{method: "POST", path: usersPath, body: "email=a"}, {method: "PATCH", path: one, body: "{}", header: map[string]string{"Content-Type": "text/plain"}}} {
		r.auth = []string{"Bearer " + admin.signIn.text("access_token")}
		w.wants(w.do(r), 415, "unsupported-media-type")
	}
	w.wants(admin.asks("PATCH", one, body{"first_name": strings.Repeat("x", maxBody)}), 413, "payload-too-large")
}

// answered fails unless a request about users is answered by this status and problem (of
// invalid-request: its fields), and a change as it was asked for.
func (w *env) answered(a answer, asked any, status int, slug string) {
	w.Helper()
	if status == 400 {
		w.wants(a, 400, "invalid-request")
		var fields []string
		for _, e := range a.JSON["errors"].([]any) {
			fields = append(fields, e.(body)["field"].(string))
		}
		slices.Sort(fields)
		if got := strings.Join(fields, " "); got != slug {
			w.Errorf("named are %s: %v", got, a)
		}
		return
	}
	w.wants(a, status, slug)
	in, _ := asked.(body)
	for name, value := range in {
		if name == "username" && status == 201 {
			continue // it is reserved by the confirmation
		}
		if got, has := a.JSON[name]; status < 300 && value != nil && has && got != value {
			w.Errorf("%s is %v, not %v", name, got, value)
		}
	}
	if id := a.text("user_id"); status == 201 && (a.Header.Get("Location") != usersPath+"/"+id || a.text("invitation_email") != "sent" ||
		a.text("source") != "internal" || a.JSON["is_verified"] != false || a.text("keycloak_id") == "" || a.text("role") == "") {
		w.Errorf("created: %v %v", a.Header, a)
	}
}

// TestUserList filters, searches and pages.
func TestUserList(t *testing.T) {
	w := sharedEnv(t)
	admin, tag := w.admin(), gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
	network := "N-" + tag
	var all []user
	for i, in := range []body{
		{"role": "user", "station_id": "S1", "first_name": "Zoë", "last_name": "100 " + tag},
		{"role": "operator", "station_id": "S1", "last_name": tag + " O'Neil"},
		{"role": "operator", "station_id": "S2", "username": "under_score-" + tag},
		{"role": "partner", "username": "underXscore-" + tag},
		{"role": "user", "station_id": "S2"},
	} {
		all = append([]user{admin.admits(changed(in, body{"network_id": network, "email": fmt.Sprintf("%s-%d@Example.test", tag, i)}))}, all...)
	}
	web := admin.invited("user", network, "S1")
	all = append([]user{web.user}, all...)
	w.wants(admin.asks("DELETE", usersPath+"/"+string(all[1].ID), nil), 204, "") // the last one that was invited
	for query, want := range map[string]string{
		"": "0 2 3 4 5", "include_deleted=true": "0 1 2 3 4 5", "role=operator": "3 4", "role=partner": "2", "role=admin": "",
		"station_id=S1": "0 4 5", "station_id=S2": "3", "station_id=S2&include_deleted=true": "1 3", "station_id=": "0 2 3 4 5",
		"source=web": "0", "source=internal": "2 3 4 5", "role=user&source=internal&station_id=S1": "5",
		"q=" + tag: "2 3 4 5", "q=" + strings.ToUpper(tag): "2 3 4 5", "q=zo%C3%AB": "5", "q=ZO%C3%8B+100": "5", "q=o'neil": "4", "q=-3%40example": "2",
		"q=under_score": "3", "q=underxscore": "2", "q=%25%25%25": "", "q=100%25": "", "q=%5C%5C%5C": "", "q=" + tag + "&role=partner": "2",
	} {
		var numbers []string
		for _, u := range admin.list("network_id=" + network + "&" + query) {
			numbers = append(numbers, fmt.Sprint(slices.Index(ids(all), string(u.ID))))
		}
		if got := strings.Join(numbers, " "); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	w.exec(`update users set created_at = (select created_at from users where user_id = $1) where user_id = $2`, all[3].ID, all[4].ID)
	if all[3].ID < all[4].ID { // of the same moment: by id
		all[3], all[4] = all[4], all[3]
	}
	for limit := 1; limit <= 7; limit++ {
		if diff := cmp.Diff(ids(all), ids(admin.list(fmt.Sprintf("network_id=%s&include_deleted=true&limit=%d", network, limit)))); diff != "" {
			t.Errorf("limit %d: %s", limit, diff)
		}
	}
	a := admin.asks("GET", usersPath+"?network_id="+network+"&limit=5", nil)
	if w.wants(a, 200, ""); a.JSON["next_cursor"] != nil {
		t.Errorf("a page that is full and the last: %v", a)
	}
	if got := shown(admin.asks("GET", usersPath+"/"+string(all[2].ID), nil)); cmp.Diff(all[2], got) != "" {
		t.Error(cmp.Diff(all[2], got))
	}
}

// Whoever is deleted comes back only while nobody else has the address.
func TestRestoreTaken(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // sync would reconcile what is changed in one store only
	admin := w.admin()
	gone := admin.admits(body{"username": "gone-" + gonanoid.MustGenerate("abcdef", 8)})
	path := usersPath + "/" + string(gone.ID)
	w.wants(admin.asks("DELETE", path, nil), 204, "")
	w.keycloakAdmin("PUT", "/users/"+gone.KeycloakID, body{"email": newEmail()}, nil) // somebody gives the address away in Keycloak
	other := admin.admits(body{"email": strings.ToUpper(gone.Email), "username": gone.Username + "x"})
	a := admin.asks("POST", path+"/restore", nil)
	w.wants(a, 409, "user-exists")
	if got := w.value(`select concat_ws(' ', actor, action, target, outcome, reason) from audit_log where request_id = $1`, a.text("request_id")); got != fmt.Sprintf("%s restoreUser %s refused user-exists", admin.ID, gone.ID) {
		t.Errorf("audited is %s", got)
	}
	if u := shown(admin.asks("GET", path, nil)); u.IsActive {
		t.Errorf("it is back: %+v", u)
	}
	w.wants(admin.asks("DELETE", usersPath+"/"+string(other.ID), nil), 204, "")
	w.wants(admin.asks("POST", path+"/restore", nil), 200, "")
	w.wants(admin.asks("POST", usersPath+"/"+string(other.ID)+"/restore", nil), 409, "user-exists")
}

// Two names are changed at the same moment: the later call does not undo the earlier one in Keycloak.
func TestNamesAtOnce(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	u := admin.invited("user", "", "")
	rename := func(in body) <-chan answer {
		answered := make(chan answer, 1)
		r := authorized(admin.signIn.text("access_token"), "PATCH", usersPath+"/"+string(u.ID))
		r.json = in
		go func() {
			a, _ := w.send(w.url, r)
			answered <- a
		}()
		return answered
	}
	there, release := w.kc.holdAt("^push_user ", false)
	first := rename(body{"last_name": "Hopper"})
	<-there
	second := rename(body{"first_name": "Grace"})
	w.eventually("the second one waits for the first", time.Minute, func() bool {
		return w.value(`select count(*)::text from pg_stat_activity where query like '%insert into tasks%'
			and datname = current_database() and state_change > now() - interval '100 ms'`) != "0"
	})
	release()
	w.wants(<-first, 200, "")
	w.wants(<-second, 200, "")
	a := admin.asks("GET", usersPath+"/"+string(u.ID), nil)
	var ku body
	w.keycloakAdmin("GET", "/users/"+u.KeycloakID, nil, &ku)
	if got := shown(a); got.FirstName+" "+got.LastName != "Grace Hopper" ||
		ku["firstName"] != "Grace" || ku["lastName"] != "Hopper" {
		t.Errorf("in PostgreSQL %s %s, in Keycloak %v %v", got.FirstName, got.LastName, ku["firstName"], ku["lastName"])
	}
}

// Whoever changes a user at the same time: Keycloak ends up with the last of it, and
// nobody waits for what is over.
func TestChangesAtOnce(t *testing.T) {
	w := newEnv(t, nil)
	v, _ := w.another(nil)
	admin := w.admin()
	c := admin.invited("user", "", "")
	change := func(in body) call {
		r := authorized(admin.signIn.text("access_token"), "PATCH", usersPath+"/"+string(c.ID))
		r.json = in
		return r
	}
	// One more change while Keycloak is told of the first.
	there, release := w.kc.holdAt("^push_user ", false)
	first := make(chan answer, 1)
	go func() {
		a, _ := w.send(w.url, change(body{"role": "operator"}))
		first <- a
	}()
	<-there
	second := make(chan answer, 1)
	go func() {
		a, _ := w.send(v.url, change(body{"network_id": "N1"}))
		second <- a
	}()
	w.eventually("the second one is here", time.Minute, func() bool {
		return w.value(`select network_id from users where user_id = $1`, c.ID) == "N1"
	})
	start := time.Now()
	release()
	w.wants(<-first, 200, "")
	w.wants(<-second, 200, "")
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("they waited for %v", took)
	}
	w.check()

	var calls []call
	for i := range 24 {
		calls = append(calls, change([]body{{"role": roles[i%3]}, {"network_id": fmt.Sprint("N", i%4)}, {"station_id": fmt.Sprint("S", i%5)}, {"first_name": string(rune('A' + i))}}[i%4]))
	}
	for _, a := range w.patient([]string{w.url, v.url}, calls...) {
		w.wants(a, 200, "")
	}
	w.check()
	u := shown(admin.asks("GET", usersPath+"/"+string(c.ID), nil))
	claims := unpacked(w.signsIn(c.Email).text("access_token"), 1)
	if got := fmt.Sprint(claims["roles"], claims["network_id"], claims["station_id"]); got != fmt.Sprint([]string{u.Role}, u.NetworkID, u.StationID) {
		t.Errorf("claims %s of %+v", got, u)
	}

	// While Keycloak is away a change counts here already, and reaches it later.
	gone := admin.invited("user", "", "")
	w.kc.close()
	w.wants(w.do(change(body{"role": "partner", "network_id": "N9"})), 200, "")
	w.wants(admin.asks("DELETE", usersPath+"/"+string(gone.ID), nil), 204, "")
	w.eventually("the token is dead", time.Second, func() bool { return gone.asks("GET", usersPath+"/me", nil).Status == 401 })
	if err := w.kc.open(); err != nil {
		t.Fatal(err)
	}
	w.tasksDue()
	w.check()
	if claims = unpacked(w.signsIn(c.Email).text("access_token"), 1); fmt.Sprint(claims["roles"], claims["network_id"]) != "[partner]N9" {
		t.Errorf("claims: %v", claims)
	}
	w.ended("user.delete", gone.signIn)
	w.wants(w.login(gone.Email, password), 403, "account-disabled")
}
