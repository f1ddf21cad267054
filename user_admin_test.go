package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// grantAdmin is the subcommand, run by grace.
func (w *env) grantAdmin(email string) (string, error) {
	var out bytes.Buffer
	err := run(w.Context(), []string{"grant-admin", email}, func(name string) string {
		return cmp.Or(map[string]string{"SUDO_USER": "grace"}[name], w.vars[name])
	}, &out, w.logs)
	return out.String(), err
}

// admin is a new administrator.
func (w *env) admin() *testUser {
	w.Helper()
	email, _, _ := w.member()
	if out, err := w.grantAdmin(email); err != nil {
		w.Fatal(out, err)
	}
	return w.testUser(email)
}

// TestGrantAdmin runs the subcommand for whom it is, and for whom it is not.
func TestGrantAdmin(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	pending, gone, invited := newEmail(), admin.invited("user", "", ""), admin.invites(nil)
	w.register(pending)
	w.wants(admin.asks("DELETE", usersPath+"/"+string(gone.ID), nil), 204, "")
	count := `select count(*)::text from audit_log where action = 'user.grant_admin'`
	before := w.value(count)
	for _, email := range []string{newEmail(), pending, gone.Email, invited.Email, "", "%", "not an address"} {
		if out, err := w.grantAdmin(email); err == nil || out != "" || !strings.Contains(err.Error(), email) {
			t.Errorf("%q: %v, and it says %q", email, err, out)
		}
	}
	if after := w.value(count); after != before {
		t.Errorf("%s entries before, %s after", before, after)
	}
	if n := w.value(`select count(*)::text from users where email = any($1) and role = 'admin'`, []string{pending, gone.Email, invited.Email}); n != "0" {
		t.Errorf("%s are administrators", n)
	}
	c := admin.invited("operator", "N1", "S1")
	out, err := w.grantAdmin(strings.ToUpper(c.Email))
	if want := fmt.Sprintf("%s (%s) is an administrator now.\n", c.Email, c.ID); err != nil || out != want {
		t.Errorf("%v, and it says %q", err, out)
	}
	if got := w.value(`select concat_ws(' ', actor, outcome, details) from audit_log where action = 'user.grant_admin' and target = $1`, string(c.ID)); got != `cli:grace ok {"role": {"after": "admin", "before": "operator"}}` {
		t.Errorf("audited is %s", got)
	}
	w.eventually("the old token is dead", time.Second, func() bool { return c.asks("GET", usersPath+"/me", nil).Status == 401 })
	c = w.testUser(c.Email)
	w.wants(c.asks("GET", usersPath+"/"+string(admin.ID), nil), 200, "")
	if _, err := w.grantAdmin(c.Email); err != nil { // who is one already
		t.Error(err)
	}
	w.wants(c.asks("GET", usersPath+"/me", nil), 200, "")
}

// Of two administrators who demote or delete each other at the same moment exactly one
// stays, whichever instance each asks.
func TestLastAdmin(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	v, _ := w.another(nil)
	staying, other := w.admin(), w.admin()
	gate, err := w.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Release()
	outcomes := map[string]int{}
	for round := range 12 {
		against := func(by, whom *testUser) call {
			r := authorized(by.signIn.text("access_token"), "DELETE", usersPath+"/"+string(whom.ID))
			if round%3 < 2 || by == other && round%2 == 0 {
				r.method, r.json = "PATCH", body{"role": []string{"user", "partner"}[round%2]}
			}
			return r
		}
		wait := round%4 != 0
		var door sync.WaitGroup
		asking, answered := context.WithCancel(t.Context())
		if wait { // both wait at the door, each with the other one's row: whatever their speed
			if _, err := gate.Exec(t.Context(), `select pg_advisory_lock(7204)`); err != nil {
				t.Fatal(err)
			}
			door.Go(func() {
				for n := ""; n != "2" && asking.Err() == nil; time.Sleep(5 * time.Millisecond) {
					w.pool.QueryRow(w.Context(), `select count(*)::text from pg_locks where locktype = 'advisory' and objid = 7204 and not granted`).Scan(&n)
				}
				gate.Exec(w.Context(), `select pg_advisory_unlock(7204)`)
			})
		}
		answers := w.at([]string{w.url, v.url}, against(staying, other), against(other, staying))
		answered()
		door.Wait()
		won := 0
		for i, a := range answers {
			switch {
			case a.Status/100 == 2:
				won++
				if i == 1 {
					staying, other = other, staying
				}
			case a.slug() == "last-admin":
				if got := w.value(`select concat_ws(' ', outcome, reason, target) from audit_log where request_id = $1`, a.text("request_id")); !strings.HasPrefix(got, "refused last-admin USR-") {
					t.Errorf("audited is %q", got)
				}
			case wait, a.slug() != "unauthorized" && a.slug() != "forbidden": // not too late for its token
				t.Errorf("round %d: %v", round, a)
			}
			outcomes[strings.TrimSpace(fmt.Sprint(a.Status, " ", a.slug()))]++
		}
		if n := w.value(`select count(*)::text from users where role = 'admin' and is_active`); won != 1 || n != "1" {
			t.Fatalf("round %d: %d have won, %s are left: %v", round, won, n, answers)
		}
		w.wants(staying.asks("POST", usersPath+"/"+string(other.ID)+"/restore", nil), 200, "")
		staying.changes(other.ID, body{"role": "admin"})
		other = w.testUser(other.Email)
	}
	t.Log(outcomes)
}
