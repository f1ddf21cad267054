package main

import (
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// branded serves the pages of a service that has a brand, without its stores.
func branded(t *testing.T, changes map[string]string) func(path string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	handler, err := idle(t, slog.New(slog.DiscardHandler), changes).handler()
	if err != nil {
		t.Fatal(err)
	}
	return func(path string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Accept", "text/html")
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w
	}
}

// TestBrand: the operator's name, logo, colour, legal pages and sentences are on every page, also that of an error.
func TestBrand(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"logo.svg": `<svg xmlns="http://www.w3.org/2000/svg"/>`,
		"fi.json": `{"Sign in": "Kirjaudu"}`, "de.json": `{"Sign in": "Einloggen"}`, "en.json": `{"Sign in": "Log in"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get := branded(t, map[string]string{"APP_NAME": "Müller & <Söhne>", "APP_LOGO_FILE": filepath.Join(dir, "logo.svg"),
		"APP_COLOR": "#a4133c", "PRIVACY_URL": "https://m.example/privacy?a=1&b=2", "LANGUAGES_DIR": dir})
	for _, path := range []string{"/", "/nothing"} {
		page := get(path).Body.String()
		for _, want := range []string{"– Müller &amp; &lt;Söhne&gt;</title>", `<img src="/static/logo?v=`, `rel="icon" href="/static/icon?v=`,
			`<a href="https://m.example/privacy?a=1&amp;b=2">Privacy</a>`} {
			if !strings.Contains(page, want) {
				t.Errorf("%s lacks %s:\n%s", path, want, page)
			}
		}
		if strings.Contains(page, "Terms of use") {
			t.Errorf("%s links terms that there are not", path)
		}
	}
	for language, want := range map[string]string{"en": ">Log in<", "de": ">Einloggen<", "fi": ">Kirjaudu<", "fr": ">Se connecter<"} {
		if page := get("/", "Accept-Language", language).Body.String(); !strings.Contains(page, want) {
			t.Errorf("%s lacks %s:\n%s", language, want, page)
		}
	}
	for path, want := range map[string][2]string{"/static/logo": {"image/svg+xml", "<svg"}, "/favicon.ico": {"image/svg+xml", "<svg"},
		"/static/style.css": {"text/css; charset=utf-8", "--accent:#a4133c"}, "/robots.txt": {"text/plain; charset=utf-8", "Disallow: /"}} {
		a := get(path)
		if a.Code != 200 || a.Header().Get("Content-Type") != want[0] || !strings.Contains(a.Body.String(), want[1]) {
			t.Errorf("%s: %d %v %s", path, a.Code, a.Header(), a.Body)
		}
	}
	if a := get("/.well-known/change-password"); a.Code != 303 || a.Header().Get("Location") != "/auth/login?action=password" {
		t.Errorf("%d %v", a.Code, a.Header())
	}
	if style := branded(t, nil)("/static/style.css").Body.String(); strings.Contains(style, "--accent:#a4133c") {
		t.Error("one site has the colour of another")
	}
}

// TestLanguageSwitch: ?lang= chooses a language that stays, for the mails of a registration, too; the switch keeps what
// else the address has.
func TestLanguageSwitch(t *testing.T) {
	get := branded(t, nil)
	a := get("/account/resend?email=a@b.example&lang=ar", "Accept-Language", "de")
	for _, want := range []string{`<html lang="ar" dir="rtl">`, `<a href="?email=a%40b.example&amp;lang=de" lang="de" hreflang="de">Deutsch</a>`} {
		if !strings.Contains(a.Body.String(), want) {
			t.Errorf("it lacks %s:\n%s", want, a.Body)
		}
	}
	cookie := a.Result().Cookies()[0]
	for _, c := range []struct{ path, cookie, want string }{
		{"/", cookie.Value, "ar"}, {"/", "", "de"}, {"/", "xx", "de"}, {"/?lang=xx", "", "de"}, {"/?lang=fr", cookie.Value, "fr"},
	} {
		page := get(c.path, "Accept-Language", "de-AT,en;q=0.5", "Cookie", cookie.Name+"="+c.cookie).Body.String()
		if want := `<html lang="` + c.want + `"`; !strings.Contains(page, want) {
			t.Errorf("%+v: not %s", c, want)
		}
	}
	w := sharedEnv(t)
	if a := w.do(call{path: "/auth/login?lang=ar"}); !strings.Contains(a.Header.Get("Location"), "ui_locales=ar") {
		t.Errorf("Keycloak is not told the language: %v", a.Header)
	}
	if a := w.form("/account/register", nil); a.Status != 400 || strings.Contains(string(a.Body), "?lang=") {
		t.Errorf("a switch that loses what was typed: %v", a)
	}
	email := newEmail()
	r := call{method: "POST", path: "/account/register", form: map[string][]string{"email": {email}},
		header: map[string]string{"Sec-Fetch-Site": "same-origin", "Cookie": cookie.Name + "=de", "Accept-Language": "en"}}
	led := w.do(r)
	if led.Status != 303 || !strings.HasPrefix(led.Header.Get("Location"), "/account/mailed?") {
		t.Fatal(led)
	}
	link := w.readMail(email, 1)
	if page := w.do(call{path: "/account/verify?token=" + link.Token}); !strings.Contains(string(page.Body), `<html lang="de"`) {
		t.Errorf("the page of the mail is not in its language: %s", page.Body)
	}
	for path, location := range map[string]string{led.Header.Get("Location"): "", "/account/mailed?email=x": "/account/resend"} {
		if a := w.do(call{path: path}); a.Header.Get("Location") != location {
			t.Errorf("%s: %v", path, a)
		}
	}
}
