package main

import (
	"bytes"
	"cmp"
	"fmt"
	"strings"
	"testing"
	"time"
)

// grantAdmin is the subcommand, run by grace.
func (w *world) grantAdmin(email string) (string, error) {
	var out bytes.Buffer
	err := run(w.Context(), []string{"grant-admin", email}, func(name string) string {
		return cmp.Or(map[string]string{"SUDO_USER": "grace"}[name], w.env[name])
	}, &out, w.logs)
	return out.String(), err
}

// boss is a new administrator.
func (w *world) boss() *colleague {
	w.Helper()
	email, _, _ := w.member()
	if out, err := w.grantAdmin(email); err != nil {
		w.Fatal(out, err)
	}
	return w.colleague(email)
}

// TestGrantAdmin runs the subcommand for whom it is, and for whom it is not.
func TestGrantAdmin(t *testing.T) {
	w := inSharedWorld(t)
	admin := w.boss()
	pending, gone, invited := newEmail(), admin.hires("user", "", ""), admin.invites(nil)
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
	c := admin.hires("operator", "N1", "S1")
	out, err := w.grantAdmin(strings.ToUpper(c.Email))
	if want := fmt.Sprintf("%s (%s) is an administrator now.\n", c.Email, c.ID); err != nil || out != want {
		t.Errorf("%v, and it says %q", err, out)
	}
	if got := w.value(`select concat_ws(' ', actor, outcome, details) from audit_log where action = 'user.grant_admin' and target = $1`, string(c.ID)); got != `operator:grace ok {"role": {"after": "admin", "before": "operator"}}` {
		t.Errorf("on record is %s", got)
	}
	w.eventually("the old token is dead", time.Second, func() bool { return c.asks("GET", usersPath+"/me", nil).Status == 401 })
	c = w.colleague(c.Email)
	w.wants(c.asks("GET", usersPath+"/"+string(admin.ID), nil), 200, "")
	if _, err := w.grantAdmin(c.Email); err != nil { // who is one already
		t.Error(err)
	}
	w.wants(c.asks("GET", usersPath+"/me", nil), 200, "")
}
