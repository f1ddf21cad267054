package main

import (
	"bytes"
	"testing"
)

func TestSyncSmoke(t *testing.T) {
	w := newWorld(t, nil)
	email := newEmail()
	w.account(email)
	for i := range 12 {
		_ = i
		w.admin("POST", "/users", body{"username": newEmail()[:12], "email": newEmail(), "enabled": true, "emailVerified": true,
			"attributes":  body{"roles": []string{"admin"}},
			"credentials": []body{{"type": "password", "value": password}}}, nil)
	}
	made := newEmail()
	w.admin("POST", "/users", body{"username": made, "email": made, "enabled": true, "emailVerified": true, "attributes": body{"roles": []string{"admin"}},
		"credentials": []body{{"type": "password", "value": password}}}, nil)
	a := w.login(made, password)
	t.Log(a)
	t.Log(w.do(call{path: "/api/v1/auth/validate", auth: []string{"Bearer " + a.text("access_token")}}).Header)
	var out bytes.Buffer
	env := func(name string) string { return w.env[name] }
	t.Log(run(t.Context(), []string{"sync", "-dry-run"}, env, &out, &out), out.String())
	out.Reset()
	t.Log(run(t.Context(), []string{"sync"}, env, &out, &out), out.String())
}

func TestDoctorSmoke(t *testing.T) {
	w := newWorld(t, nil)
	var out bytes.Buffer
	env := func(name string) string { return w.env[name] }
	t.Log(run(t.Context(), []string{"doctor"}, env, &out, &out), out.String())
	out.Reset()
	t.Log(run(t.Context(), []string{"doctor", "-admin-user", services.AdminUser, "-admin-password", services.AdminPassword}, env, &out, &out), out.String())
}
