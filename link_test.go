package main

import (
	"strings"
	"testing"
)

// Mail programs mangle links. What can be read out of one safely opens the page; else a sentence says how to go on.
func TestMangledLink(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	w.register(email)
	token := w.readMail(email, 1).Token
	escaped := strings.NewReplacer("-", "%2D", "_", "%5f").Replace(token)
	for _, c := range []struct {
		query string
		opens bool
	}{
		{"token=" + token, true},
		{"token=" + token + "&amp;utm_source=mail", true},
		{"utm=1&amp;token=" + token, true},
		{"utm=1;token=" + token, true},
		{"token=" + token + "%", true},
		{"token=" + token + "%3E", true},
		{"token=" + token + ">", true},
		{"token=" + token + ").", true},
		{"token=" + token + "%E2%80%9D,", true},
		{"token=" + token + "=", true},
		{"token=3D" + token, true},
		{"TOKEN=" + token, true},
		{"token=" + escaped, true},
		{"token=%3C" + token + "%3e", true},
		{"token=" + token[:16] + "%20" + token[16:], true},
		{"token=" + token[:16] + "%0D%0A+" + token[16:], true},
		{"token=%20" + token, true},
		{"token=" + token[:16] + "%zz" + token[16:], false},
		{"token=" + token[:31], false},
		{"token=" + strings.ToLower(token), strings.ToLower(token) == token},
		{"token=%", false},
		{"token=%&x", false},
	} {
		for path, shows := range map[string]string{"/account/verify?": "Confirm your e-mail address", "/account/cancel?": "You did not register?"} {
			status := 200
			if !c.opens {
				status, shows = 400, "You can enter your address and the code from the mail instead."
			}
			a := w.do(call{path: path + c.query})
			if a.Status != status || !strings.Contains(string(a.Body), shows) || strings.Contains(string(a.Body), "request body") ||
				c.opens != strings.Contains(string(a.Body), token) {
				t.Errorf("%s%s: %v", path, c.query, a)
			}
		}
	}
	for _, query := range []string{"%zz&email=x", "token=", "token", ""} {
		if a := w.do(call{path: "/account/verify?" + query}); a.Status != 200 || !strings.Contains(string(a.Body), "Enter your code") {
			t.Errorf("%s: %v", query, a)
		}
	}
	w.unconfirmed(email)
}

// A browser gets a page where there is nothing, with the same status; everybody else the problem.
func TestUnknownAddressInBrowser(t *testing.T) {
	w := sharedEnv(t)
	const browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
	for _, c := range []struct {
		method, path string
		status       int
		title        map[string]string
	}{
		{"GET", "/no/such/page", 404, map[string]string{"en": "There is nothing at this address.", "de": "Unter dieser Adresse gibt es nichts."}},
		{"GET", "/account/verify/", 404, map[string]string{"en": "Not found", "de": "Nicht gefunden"}},
		{"GET", "/api/v1/nothing", 404, map[string]string{"en": "Not found", "de": "Nicht gefunden"}},
		{"GET", "/api/v1/auth/login", 405, map[string]string{"en": "Method not allowed", "de": "Methode nicht erlaubt"}},
		{"POST", "/account/ready", 405, map[string]string{"en": "Method not allowed", "de": "Methode nicht erlaubt"}},
	} {
		for language, title := range c.title {
			a := w.do(call{method: c.method, path: c.path, header: map[string]string{"Accept": browser, "Accept-Language": language}})
			if a.Status != c.status || a.Header.Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(string(a.Body), title) ||
				!strings.Contains(string(a.Body), `href="/"`) || (c.status == 405) != (a.Header.Get("Allow") != "") ||
				!strings.Contains(strings.Join(a.Header.Values("Vary"), ","), "Accept,") {
				t.Errorf("%s %s: %v %v", c.method, c.path, a, a.Header)
			}
		}
		for _, accept := range []string{"", "*/*", "application/json", "application/problem+json"} {
			a := w.do(call{method: c.method, path: c.path, header: map[string]string{"Accept": accept}})
			w.wants(a, c.status, map[int]string{404: "not-found", 405: "method-not-allowed"}[c.status])
		}
	}
}
