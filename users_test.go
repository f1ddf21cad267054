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

// colleague is somebody who is signed in, with a role and a scope.
type colleague struct {
	*world
	user
	signIn answer // or the latest refresh
}

// asks sends a request with the access token.
func (c *colleague) asks(method, path string, in any) answer {
	c.Helper()
	r := authorized(c.signIn.text("access_token"), method, path)
	r.json = in
	return c.do(r)
}

// changes patches a user, and returns it.
func (c *colleague) changes(id userID, in body) user {
	c.Helper()
	a := c.asks("PATCH", usersPath+"/"+string(id), in)
	c.wants(a, 200, "")
	return shown(a)
}

// invites creates a user that no one else is.
func (c *colleague) invites(in body) user {
	c.Helper()
	a := c.asks("POST", usersPath, changed(body{"email": newEmail()}, in))
	c.wants(a, 201, "")
	return shown(a)
}

// principal is whom the access token speaks for.
func (c *colleague) principal() principal {
	return principal{UserID: c.ID, Roles: []string{c.Role}, NetworkID: c.NetworkID, StationID: c.StationID}
}

// shown is the user that an answer shows.
func shown(a answer) (u user) {
	json.Unmarshal(a.Body, &u)
	return u
}

// colleague signs an account in.
func (w *world) colleague(email string) *colleague {
	w.Helper()
	c := &colleague{world: w, signIn: w.signsIn(email)}
	a := c.asks("GET", usersPath+"/me", nil)
	w.wants(a, 200, "")
	c.user = shown(a)
	return c
}

// hires makes an administrator give a new account a role and a scope, and signs it in.
func (c *colleague) hires(role, network, station string) *colleague {
	c.Helper()
	email, _, _ := c.member()
	c.changes(userID(c.value(`select user_id from users where email = $1`, email)), body{"role": role, "network_id": network, "station_id": station})
	return c.world.colleague(email)
}

// list returns all pages of a list of users.
func (c *colleague) list(query string) (all []user) {
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
// instance, the next ones carry it, and it is on record.
func TestChangeOfRole(t *testing.T) {
	w := inSharedWorld(t)
	v, _ := w.another(nil)
	admin := w.boss()
	c := admin.hires("user", "", "")
	before := admin.changes(c.ID, body{"first_name": "Ada", "phone": "+4930123456", "photo": "https://cdn.example/ada.jpg"})
	validates := func(token, demand string, status int) {
		t.Helper()
		for _, at := range []*world{w, v} {
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
	for _, at := range []*world{w, v} { // at once
		w.wants(at.do(bearing(validatePath+"?role=operator&network_id=N1&station_id=S1", c.signIn.text("access_token"))), 200, "")
	}
	w.wants(c.asks("GET", usersPath+"/me", nil), 200, "")
	recorded := func(a answer, want string) {
		t.Helper()
		if got := w.value(`select concat_ws(' ', actor, action, target, outcome, network_id, details) from audit_log where request_id = $1`, a.Header.Get("X-Request-Id")); got != want {
			t.Errorf("on record is\n%s, not\n%s", got, want)
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
func TestDeleteAndRestore(t *testing.T) {
	w := inSharedWorld(t)
	v, _ := w.another(nil)
	admin := w.boss()
	c := admin.hires("operator", "N1", "S1")
	path := usersPath + "/" + string(c.ID)
	other := w.signsIn(c.Email)
	a := admin.asks("DELETE", path, nil)
	w.wants(a, 204, "")
	w.ended("user deleted", c.signIn)
	w.ended("user deleted", other)
	for _, at := range []*world{w, v} {
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
	c = w.colleague(c.Email)
	w.wants(c.asks("GET", validatePath+"?role=operator&network_id=N1&station_id=S1", nil), 200, "")
	for _, one := range []struct {
		answer
		want string
	}{
		{a, fmt.Sprintf(`%s session.end %s ok user deleted, %[1]s user.delete %[2]s ok {"is_active": {"after": false, "before": true}}`, admin.ID, c.ID)},
		{again, ""}, {twice, ""},
		{back, fmt.Sprintf(`%s user.restore %s ok {"is_active": {"after": true, "before": false}}`, admin.ID, c.ID)},
	} {
		if got := w.value(`select coalesce(string_agg(concat_ws(' ', actor, action, target, outcome, nullif(reason, ''), case action when 'session.end' then null else details end), ', ' order by action), '')
			from audit_log where request_id = $1`, one.Header.Get("X-Request-Id")); got != one.want {
			t.Errorf("on record is\n%s, not\n%s", got, one.want)
		}
	}
}

// TestManagedSessions has what a manager sees and ends of others.
func TestManagedSessions(t *testing.T) {
	w := inSharedWorld(t)
	network := "N-" + gonanoid.Must(8)
	admin := w.boss()
	partner, c := admin.hires("partner", network, ""), admin.hires("user", network, "")
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
	for _, of := range []*colleague{admin, partner} {
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
