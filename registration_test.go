package main

import "testing"

func TestRegisterVerifyLogin(t *testing.T) {
	w := inSharedWorld(t)
	email := newEmail()
	a := w.post("/api/v1/register", map[string]any{"email": email, "password": password, "first_name": "Ada", "locale": "en"})
	w.wants(a, 201, "")
	w.wants(w.login(email, password), 403, "account-not-verified")
	l := w.readMail(email, 1)
	w.wants(w.post("/api/v1/register/verify", map[string]any{"token": l.Token}), 200, "")
	w.wants(w.login(email, password), 200, "")
}
