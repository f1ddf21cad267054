package main

import (
	"fmt"
	"html"
	"maps"
	"net/url"
	"strings"
	"testing"

	"auth-service/templates"
)

// TestProblemPages renders the page of each problem in German: nothing English is left.
func TestProblemPages(t *testing.T) {
	for slug, p := range problems {
		var page strings.Builder
		if err := templates.Problem(problemView(p)).Render(site.Context(t.Context(), "de", nil), &page); err != nil {
			t.Fatal(err)
		}
		body, example, _ := strings.Cut(page.String(), "<pre") // the example is English
		for _, text := range []string{p.Title, p.Detail} {
			if strings.Contains(html.UnescapeString(body), text) || !strings.Contains(html.UnescapeString(example), text) {
				t.Errorf("/problems/%s: de.json lacks %q", slug, text)
			}
		}
	}
}

// TestVerifyForm confirms by the forms, which want a password and keep what was typed.
func TestVerifyForm(t *testing.T) {
	w := sharedEnv(t)
	type form = map[string]string
	for _, by := range []string{"link", "code"} {
		email, username := newEmail(), newEmail()[:8]
		w.submit("/account/register", form{"email": " " + email + " ", "first_name": "Ada", "phone": "+49 30 123456"}, 200,
			"Look into your mailbox", "/account/verify?email=")
		w.submit("/account/register", form{"email": email}, 200, "Look into your mailbox") // the form sent twice
		l := w.readMail(email, 1)
		proof := form{"token": l.Token}
		if by == "code" {
			proof = form{"email": email, "code": l.Code[:3] + " " + l.Code[3:]}
		}
		with := func(more form) form {
			maps.Copy(more, proof)
			return more
		}
		w.submit("/account/verify", with(form{}), 400, "Password is required")
		w.submit("/account/verify", with(form{"password": "   "}), 400, "Password is required")
		w.submit("/account/verify", with(form{"password": "short", "first_name": "Augusta"}), 400,
			"Password must have at least", `value="Augusta"`, `value="`+email+`"`)
		w.submit("/account/verify", with(form{"password": password, "username": "<x>", "phone": "030"}), 400,
			"<details open>", "User name has a character that is not allowed", "Phone number is not a valid phone number",
			`value="030"`)
		w.unconfirmed(email)
		w.submit("/account/verify", with(form{"password": password, "username": username, "first_name": "Augusta"}), 200,
			"Your address is confirmed")
		w.submit("/account/verify", with(form{"password": "another " + password}), 200, "Your address is confirmed")
		w.wants(w.login(username, password), 200, "")
		got := w.value(`select first_name || ' ' || phone from users where email = $1`, email)
		if got != "Augusta +4930123456" {
			t.Errorf("by %s: %s", by, got)
		}
	}
}

// TestTakenUsername names the field that can be changed, and the same link works again.
func TestTakenUsername(t *testing.T) {
	w := sharedEnv(t)
	username := newEmail()[:8]
	for i, status := range []int{200, 409} {
		email := newEmail()
		w.submit("/account/register", map[string]string{"email": email, "username": fmt.Sprint(username, i)}, 200)
		form := map[string]string{"token": w.readMail(email, 1).Token, "password": password, "username": username}
		if w.submit("/account/verify", form, status); status == 409 {
			w.submit("/account/verify", form, 409, "<details open>", "User name is taken already", `value="`+username+`"`)
			form["username"] += "2"
			w.submit("/account/verify", form, 200, "Your address is confirmed")
		}
	}
}

// TestResendForm says the same for every address.
func TestResendForm(t *testing.T) {
	w := sharedEnv(t)
	pending, verified := newEmail(), newEmail()
	w.account(verified)
	w.submit("/account/register", map[string]string{"email": pending}, 200)
	w.readMail(pending, 1)
	w.minuteLater(pending)
	for _, email := range []string{newEmail(), verified, pending, pending} { // the last one within the cooldown
		w.submit("/account/resend", map[string]string{"email": email}, 200, "If a registration is waiting")
	}
	w.readMail(pending, 2)
	w.submit("/account/resend", map[string]string{"email": "x"}, 400, "is not a valid e-mail address", `value="x"`)
	w.submit("/account/resend", nil, 400, "E-mail address is required")
}

// unconfirmed checks that a registration waits for its confirmation, in both stores.
func (w *env) unconfirmed(email string) {
	w.Helper()
	var found []seenUser
	w.keycloakAdmin("GET", "/users?exact=true&email="+url.QueryEscape(email), nil, &found)
	status := w.value(`select status from user_registrations where email = $1`, email)
	if len(found) != 1 || found[0].Enabled || found[0].EmailVerified || status != "pending" {
		w.Errorf("it is %s, and in Keycloak: %+v", status, found)
	}
}

// submit sends a form and checks the status of the page and what it shows; the password it never shows.
func (w *env) submit(path string, values map[string]string, status int, shows ...string) {
	w.Helper()
	a := w.form(path, values)
	body := strings.ReplaceAll(html.UnescapeString(string(a.Body)), "<wbr>", "") // an address may break behind its @
	if a.Status != status || a.Header.Get("Content-Type") != "text/html; charset=utf-8" ||
		strings.Contains(body, password) {
		w.Errorf("%s %v: got %v, want %d", path, values, a, status)
	}
	for _, text := range shows {
		if !strings.Contains(body, text) {
			w.Errorf("%s %v does not show %q:\n%s", path, values, text, body)
		}
	}
}
