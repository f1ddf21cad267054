package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"html"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// app is the origin of a frontend that may use the code flow.
const app = "https://app.example"

// codeFlowEnv is an env for browsers. It runs no jobs: sync would reconcile what a test
// changes in one store only.
func codeFlowEnv(t *testing.T) *env {
	return newEnv(t, map[string]string{"CORS_ALLOWED_ORIGINS": app + ",https://admin.example:8443", "PUBLIC_URL": "http://localhost:3000", "JOB_INTERVAL": "0"})
}

// person has a browser that shows nothing. Cookies are carried by hand: Go's jar keeps
// Secure ones from http://localhost, browsers don't.
type person struct {
	*env
	from    string
	cookies map[string]*http.Cookie // by name; no two hosts have the same
}

func (w *env) person() *person { return &person{w, newAddress(), map[string]*http.Cookie{}} }

// visit follows no redirect. What begins with / or PUBLIC_URL is the service.
func (p *person) visit(address string, r call) answer {
	p.Helper()
	base, path := p.url, strings.TrimPrefix(address, p.vars["PUBLIC_URL"])
	if rest, ok := strings.CutPrefix(path, services.KeycloakURL); ok {
		base, path = services.KeycloakURL, rest
	}
	var cookies []string
	for _, c := range p.cookies {
		if strings.HasPrefix(path, c.Path) {
			cookies = append(cookies, c.Name+"="+c.Value)
		}
	}
	header := map[string]string{"Cookie": strings.Join(cookies, "; "), "User-Agent": "person"}
	maps.Copy(header, r.header)
	r.path, r.from, r.header = path, p.from, header
	a, err := p.send(base, r)
	if err != nil {
		p.Fatal(err)
	}
	for _, line := range a.Header.Values("Set-Cookie") {
		c, err := http.ParseSetCookie(line)
		if err != nil {
			p.Fatal(err)
		}
		if p.cookies[c.Name] = c; c.MaxAge < 0 {
			delete(p.cookies, c.Name)
		} else if base == p.url {
			p.secrets.add(c.Value)
		}
	}
	if base == p.url {
		p.checkDocumented(r, a)
	}
	return a
}

// asks calls the API from a page of app.
func (p *person) asks(what string) answer {
	p.Helper()
	return p.visit("/api/v1/auth/"+what, call{method: "POST", header: map[string]string{"Origin": app}})
}

// begins starts to sign in and returns the page of Keycloak where this goes on.
func (p *person) begins(returnTo string) string {
	p.Helper()
	a := p.visit("/auth/login?return_to="+url.QueryEscape(returnTo), call{})
	location := a.Header.Get("Location")
	if a.Status != 303 || !strings.HasPrefix(location, services.KeycloakURL+"/realms/"+p.realm+"/protocol/openid-connect/auth?") {
		p.Fatalf("it leads to %q: %v", location, a)
	}
	return location
}

var formAction = regexp.MustCompile(`<form [^>]*action="([^"]+)"`)

// signsIn fills in Keycloak's form, unless Keycloak knows the browser, and returns the
// query of the callback that it leads to.
func (p *person) signsIn(keycloak, login string) url.Values {
	p.Helper()
	a := p.visit(keycloak, call{})
	if form := formAction.FindSubmatch(a.Body); form != nil {
		a = p.visit(html.UnescapeString(string(form[1])), call{method: "POST", form: url.Values{"username": {login}, "password": {password}}})
	}
	callback, err := url.Parse(a.Header.Get("Location"))
	if err != nil || !strings.HasPrefix(callback.String(), p.vars["PUBLIC_URL"]+"/auth/callback?") {
		p.Fatalf("Keycloak leads to %q: %v", callback, a)
	}
	p.secrets.add(callback.Query().Get("code"), callback.Query().Get("state"))
	return callback.Query()
}

func (p *person) comesBack(query url.Values) answer {
	p.Helper()
	return p.visit("/auth/callback?"+query.Encode(), call{})
}

// isBack fails unless the sign-in led there.
func (p *person) isBack(a answer, location string) {
	p.Helper()
	if a.Status != 303 || a.Header.Get("Location") != location || len(a.Body) > 0 || p.cookies["refresh_token"] == nil {
		p.Fatalf("it led to %q with %v: %v", a.Header.Get("Location"), p.cookies, a)
	}
}

// isTold fails unless the answer is a page that says so and leads to another try.
func (p *person) isTold(a answer, status int, title, sentence, again string) {
	p.Helper()
	page := html.UnescapeString(string(a.Body))
	for _, want := range []string{"<h1>" + title + "</h1>", "<p>" + sentence + "</p>", `<a class="button primary" href="` + again + `">`} {
		if !strings.Contains(page, want) {
			p.Errorf("the page lacks %s:\n%s", want, page)
		}
	}
	if a.Status != status || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") || (a.Header.Get("Retry-After") != "") != (status == 503) {
		p.Errorf("got %v", a)
	}
	if set := a.Header.Values("Set-Cookie"); len(set) > 0 {
		p.Errorf("it sets %v", set)
	}
}

// live is how many sessions an account has, here and in Keycloak.
func (w *env) live(id string) string {
	w.Helper()
	var sessions []any
	w.keycloakAdmin("GET", "/users/"+id+"/sessions", nil, &sessions)
	return fmt.Sprintf("%s %d", w.value(`select count(*)::text from sessions join users using (user_id) where keycloak_id = $1 and ended_at is null`, id), len(sessions))
}

func TestCodeFlow(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, _, id := w.member()
	p := w.person()
	const after = app + "/after?x=1&y=%20#top"
	keycloak := p.begins(after)
	u, _ := url.Parse(keycloak)
	q, browser := u.Query(), p.cookies["sign_in"]
	for name, want := range map[string]string{"response_type": "code", "client_id": "auth-client", "redirect_uri": "http://localhost:3000/auth/callback",
		"scope": "openid", "code_challenge_method": "S256", "state": derived(q.Get("state")), "nonce": derive(browser.Value, "nonce", q.Get("state")),
		"code_challenge": oauth2.S256ChallengeFromVerifier(derive(browser.Value, "verifier", q.Get("state")))} {
		if got := q.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	shape := func(c *http.Cookie) string {
		return fmt.Sprintln(c.Domain, c.Path, c.HttpOnly, c.Secure, c.SameSite == http.SameSiteLaxMode)
	}
	if shape(browser) != " / true true true\n" || browser.MaxAge != 600 || !browserSecret.MatchString(browser.Value) || strings.Contains(keycloak, browser.Value) {
		t.Errorf("sign_in: %v", browser)
	}

	query := p.signsIn(keycloak, email)
	a := p.comesBack(query)
	p.isBack(a, after)
	first := p.cookies["refresh_token"]
	if shape(first) != " / true true true\n" || !lasts(float64(first.MaxAge), 86400) {
		t.Errorf("refresh_token: %v", first)
	}
	session := w.value(`select session_id from sessions join refresh_tokens using (session_id) where token_hash = $1 and ip_address = $2 and user_agent = 'person'`,
		digest(first.Value), p.from)
	if got := w.value(`select concat_ws(' ', action, outcome, details->>'session_id') from audit_log where request_id = $1`, a.Header.Get("X-Request-Id")); got != "login ok "+session {
		t.Errorf("audit: %s", got)
	}

	// Whoever loads the page again is told so, and stays signed in.
	const over = "This sign-in is over already. Perhaps the page was loaded twice."
	p.isTold(p.comesBack(query), 400, "Sign-in not completed", over, "/auth/login?return_to="+url.QueryEscape(after))
	a = p.asks("refresh")
	w.wants(a, 200, "")
	second := p.cookies["refresh_token"]
	if a.JSON["refresh_token"] != nil || second.Value == first.Value || shape(second) != shape(first) || a.text("session_id") != session {
		t.Errorf("refreshed: %v %v", a, second)
	}
	me := w.do(call{path: "/api/v1/auth/me", header: map[string]string{"Authorization": "Bearer " + a.text("access_token")}})
	if w.wants(me, 200, ""); me.text("email") != email {
		t.Errorf("it is the token of %v", me)
	}

	// Keycloak knows the browser now: another tab needs no password, and both come
	// back. It is one session, the one whose token the cookie has.
	one, other := p.begins("/a"), p.begins("/b")
	p.isBack(p.comesBack(p.signsIn(other, "")), "http://localhost:3000/b")
	p.isBack(p.comesBack(p.signsIn(one, "")), "http://localhost:3000/a")
	if got := w.live(id); got != "1 1" {
		t.Errorf("sessions here and in Keycloak: %s", got)
	}
	if got := w.value(`select string_agg(concat_ws(' ', outcome, reason, details), ', ') from audit_log where action = 'session.end'
		and details->'sessions' ? $1`, session); got != `ok replaced {"sessions": ["`+session+`"]}` {
		t.Errorf("audit: %s", got)
	}

	w.wants(p.asks("logout"), 204, "")
	if p.cookies["refresh_token"] != nil || w.live(id) != "0 0" {
		t.Errorf("after the logout: %v, sessions %s", p.cookies, w.live(id))
	}
	p.cookies["refresh_token"] = second // somebody has kept it
	w.wants(p.asks("refresh"), 401, "invalid-token")
	if a := p.visit(p.begins("/"), call{}); !formAction.Match(a.Body) {
		t.Errorf("Keycloak knows the browser still: %v", a)
	}

	// However often the callback is loaded at once, it counts once.
	p = w.person()
	query = p.signsIn(p.begins("/"), email)
	tab := call{path: "/auth/callback?" + query.Encode(), header: map[string]string{"Cookie": "sign_in=" + p.cookies["sign_in"].Value}}
	if counts := tally(w.at([]string{w.url}, slices.Repeat([]call{tab}, 6)...)); counts["303"] != 1 || counts["400"] != 5 || w.live(id) != "1 1" {
		t.Errorf("%v, sessions %s", counts, w.live(id))
	}
}

// derived is a state if its MAC may be one.
func derived(state string) string {
	return regexp.MustCompile(`^[\w-]{60,}\.[\w-]{43}$`).FindString(state)
}

// What the page says to a browser that comes back in another way than the right one.
const (
	afterApp   = app + "/after?x=1"
	incomplete = "The sign-in did not come to an end. Please try again."
	notBegun   = "This sign-in was not begun in this browser."
	tooLong    = "This sign-in took too long."
)

// spoil changes the browser, or what it comes back with.
type spoil = func(p *person, q url.Values)

// spoiled is a sign-in that does not come to its end.
type spoiled struct {
	name     string
	asked    string // of Keycloak, "name=value", instead of what the service says
	spoil    spoil  // before the callback
	sentence string
	slug     string // "": sign-in-incomplete
	ended    bool   // Keycloak's session, too; else nobody has tokens of it
}

// spoiledSignIns are those of an account; only Keycloak knows the stranger.
func (w *env) spoiledSignIns(email, stranger string) []spoiled {
	nothing := func(*person, url.Values) {}
	with := func(name, value string) spoil { return func(_ *person, q url.Values) { q.Set(name, value) } }
	without := func(name string) spoil { return func(_ *person, q url.Values) { q.Del(name) } }
	cookie := func(value string) spoil {
		return func(p *person, _ url.Values) { p.cookies["sign_in"].Value = value }
	}
	state := func(change func(state, browser string) string) spoil {
		return func(p *person, q url.Values) { q.Set("state", change(q.Get("state"), p.cookies["sign_in"].Value)) }
	}
	signed := func(content string) spoil {
		return state(func(_, browser string) string {
			encoded := base64.RawURLEncoding.EncodeToString([]byte(content))
			return encoded + "." + derive(browser, "state", encoded)
		})
	}
	old := func(age time.Duration) spoil {
		return state(func(_, browser string) string { return newSignIn(browser, afterApp, time.Now().Add(-age)).state })
	}
	here := func(set string) spoil {
		return func(*person, url.Values) { w.exec(`update users set `+set+` where email = $1`, email) }
	}
	return []spoiled{
		{name: "no state", spoil: without("state"), sentence: notBegun},
		{name: "altered state", spoil: state(func(s, _ string) string { return "x" + s[1:] }), sentence: notBegun},
		{name: "altered MAC", spoil: state(func(s, _ string) string { return s + "x" }), sentence: notBegun},
		{name: "no MAC", spoil: state(func(s, _ string) string { return s[:strings.Index(s, ".")+1] }), sentence: notBegun},
		{name: "no cookie", spoil: func(p *person, _ url.Values) { delete(p.cookies, "sign_in") }, sentence: notBegun},
		{name: "another browser's cookie", spoil: cookie(newToken()), sentence: notBegun},
		{name: "no browser's cookie", spoil: cookie("x"), sentence: notBegun},
		{name: "no secret", spoil: func(p *person, q url.Values) {
			q.Set("state", newSignIn("", afterApp, time.Now()).state)
			p.cookies["sign_in"].Value = ""
		}, sentence: notBegun},
		{name: "the browser's own rubbish", spoil: signed("rubbish"), sentence: notBegun},
		{name: "the browser's own time", spoil: signed("a b " + afterApp), sentence: tooLong},
		{name: "too late", spoil: old(signInTime + 2*time.Second), sentence: tooLong},
		{name: "not too late, but another's code", spoil: old(signInTime - time.Minute), sentence: incomplete},
		{name: "another tab's code", spoil: func(p *person, q url.Values) { q.Set("code", p.signsIn(p.begins("/"), "").Get("code")) }, sentence: incomplete},
		{name: "another browser's code", spoil: func(_ *person, q url.Values) {
			other := w.person()
			q.Set("code", other.signsIn(other.begins("/"), stranger).Get("code"))
		}, sentence: incomplete},
		{name: "wrong code", spoil: with("code", "rubbish"), sentence: incomplete},
		{name: "long code", spoil: with("code", strings.Repeat("x", 5000)), sentence: incomplete},
		{name: "no code", spoil: without("code"), sentence: incomplete},
		{name: "another realm", spoil: with("iss", services.KeycloakURL+"/realms/master"), sentence: incomplete},
		{name: "no issuer", spoil: without("iss"), sentence: incomplete},
		{name: "cancelled", spoil: with("error", "access_denied"), sentence: "The sign-in was cancelled."},
		{name: "too long on Keycloak's page", spoil: with("error", "temporarily_unavailable"), sentence: incomplete}, // authentication_expired
		{name: "another verifier", asked: "code_challenge=" + oauth2.S256ChallengeFromVerifier("x"), spoil: nothing, sentence: incomplete},
		{name: "another nonce", asked: "nonce=x", spoil: nothing, sentence: incomplete, ended: true},
		{name: "no nonce", asked: "nonce=", spoil: nothing, sentence: incomplete, ended: true},
		{name: "deleted here", spoil: here("is_active = false, deleted_at = now()"), sentence: "This account is disabled.", slug: "account-disabled", ended: true},
		{name: "all well again", spoil: nothing},
	}
}

// The browser comes back in every way but the right one.
func TestCodeFlowRefused(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, username, id := w.member()
	w.keycloakAdmin("POST", "/users", body{"username": "k" + username, "enabled": true, "email": "k" + email, "emailVerified": true,
		"credentials": []body{{"type": "password", "value": password}}}, nil)
	stranger := w.userID("k" + username) // only Keycloak knows
	for _, c := range w.spoiledSignIns(email, "k"+username) {
		w.Run(c.name, func() { w.refuses(c, email, id, stranger) })
	}
}

// refuses fails unless the person is told, and nothing is left of the sign-in.
func (w *env) refuses(c spoiled, email, id, stranger string) {
	w.Helper()
	visitor := w.person()
	keycloak := visitor.begins(afterApp)
	if name, value, ok := strings.Cut(c.asked, "="); ok {
		keycloak = regexp.MustCompile(`\b`+name+`=[^&]*`).ReplaceAllString(keycloak, name+"="+value)
	}
	query := visitor.signsIn(keycloak, email)
	c.spoil(visitor, query)
	a := visitor.comesBack(query)
	w.exec(`update users set is_active = true, deleted_at = null where email = $1`, email)

	p, sessions := problems[cmp.Or(c.slug, "sign-in-incomplete")], "0 1"
	audit, again := "login refused "+p.slug(), "/auth/login?return_to="+url.QueryEscape(afterApp)
	switch {
	case c.sentence == notBegun:
		again = "/auth/login"
	case c.sentence == "":
		audit, sessions = "login ok ", "1 1"
	}
	if c.sentence == "" {
		visitor.isBack(a, afterApp)
	} else {
		visitor.isTold(a, p.Status, p.Title, c.sentence, again)
	}
	if c.ended {
		sessions = "0 0"
	}
	if got := w.live(id); got != sessions {
		w.Errorf("sessions here and in Keycloak: %s, want %s", got, sessions)
	}
	if got := w.value(`select coalesce(string_agg(action || ' ' || outcome || ' ' || reason, ', '), '') from audit_log where request_id = $1`,
		a.Header.Get("X-Request-Id")); got != audit {
		w.Errorf("audit: %q, want %q", got, audit)
	}
	for _, user := range []string{id, stranger} {
		if c.sentence != "" { // Keycloak still knows the browser
			w.keycloakAdmin("POST", "/users/"+user+"/logout", nil, nil)
		}
	}
}

// userID is Keycloak's id of a user.
func (w *env) userID(username string) string {
	w.Helper()
	var found []seenUser
	w.keycloakAdmin("GET", "/users?exact=true&username="+username, nil, &found)
	return found[0].ID
}

// A server is away when the browser comes back. There is a way on, and it works once
// the outage is over.
func TestCodeFlowOutages(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, _, id := w.member()
	const title, sentence = "Temporarily unavailable", "The service can't do this right now. Nothing is lost; please try again in a moment."
	const again = "/auth/login?return_to=%2Fafter"
	for _, c := range []struct {
		name     string
		begin    func()
		end      func() error
		reload   bool   // the way on is the callback itself
		sessions string // here and in Keycloak
	}{
		{"Keycloak is stopped", func() { w.kc.close() }, w.kc.open, false, "0 1"},
		{"Keycloak's answer is lost", func() { w.kc.on("^(code|token) ", applied) }, func() error { w.kc.on("^(code|token) ", 0); return nil }, false, "0 1"},
		{"PostgreSQL is stopped", func() { w.pg.close() }, w.pg.open, true, "0 1"},
		{"PostgreSQL stops while Keycloak answers", func() {
			there, release := w.kc.holdAt("^(code|token) ", true)
			go func() { <-there; w.pg.close(); release() }()
		}, w.pg.open, false, "0 0"},
	} {
		w.Run(c.name, func() {
			p := w.person()
			query := p.signsIn(p.begins("/after"), email)
			c.begin()
			a := p.comesBack(query)
			next := again
			if c.reload {
				next = "/auth/callback?" + query.Encode()
			}
			p.isTold(a, 503, title, sentence, next)
			if err := c.end(); err != nil {
				w.Fatal(err)
			}
			if got := w.live(id); got != c.sessions {
				w.Errorf("sessions here and in Keycloak: %s, want %s", got, c.sessions)
			}
			if audit := w.value(`select count(*)::text from audit_log where request_id = $1`, a.Header.Get("X-Request-Id")); audit != "0" {
				w.Error("an outage is audited as a refusal")
			}
			w.eventually("the way on is open", time.Minute, func() bool { a = p.visit(next, call{}); return a.Status == 303 })
			if !c.reload {
				a = p.comesBack(p.signsIn(a.Header.Get("Location"), email))
			}
			p.isBack(a, "http://localhost:3000/after")
			if w.wants(p.asks("logout"), 204, ""); w.live(id) != "0 0" {
				w.Errorf("sessions after the logout: %s", w.live(id))
			}
		})
	}
}

// The ID token is of this sign-in, or it counts for nothing.
func TestIDToken(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, _, _ := w.member()
	cfg, err := loadConfig(func(name string) string { return w.vars[name] })
	if err != nil {
		t.Fatal(err)
	}
	kc := newKeycloak(cfg, newMetrics())
	verifierAt := func(cfg config, later time.Duration) *verifier {
		v := newVerifier(cfg, kc, func() time.Time { return time.Now().Add(later) })
		v.refreshKeys(t.Context())
		return v
	}
	right, elsewhere, otherRealm := verifierAt(cfg, 0), cfg, cfg
	elsewhere.AuthClientID, otherRealm.KeycloakPublicURL = "other-client", "https://id.example"
	const nonce = "the nonce of this sign-in"
	challenge := oauth2.GenerateVerifier()
	code := w.person().signsIn(kc.oauth().AuthCodeURL("state", oidc.Nonce(nonce), oauth2.S256ChallengeOption(challenge)), email).Get("code")
	token, err := kc.redeem(t.Context(), code, challenge)
	if err != nil {
		t.Fatal(err)
	}
	id := token.Extra("id_token").(string)
	w.secrets.add(token.AccessToken, token.RefreshToken, id)
	byPassword := w.login(email, password)
	defer func() {
		if claims, err := readClaims(token.AccessToken); err != nil || kc.endSession(t.Context(), claims.SessionID) != nil {
			t.Error("the session stays in Keycloak")
		}
	}()
	for _, c := range []struct {
		name, id, access, nonce string
		verifier                *verifier
		good                    bool
	}{
		{"right", id, token.AccessToken, nonce, right, true},
		{"within the leeway", id, token.AccessToken, nonce, verifierAt(cfg, 5*time.Minute+tokenLeeway-10*time.Second), true},
		{"another nonce", id, token.AccessToken, nonce + "x", right, false},
		{"no nonce", byPassword.text("id_token"), byPassword.text("access_token"), nonce, right, false},
		{"another access token", id, byPassword.text("access_token"), nonce, right, false}, // at_hash
		{"an access token", token.AccessToken, token.AccessToken, nonce, right, false},
		{"a refresh token", token.RefreshToken, token.AccessToken, nonce, right, false},
		{"none", "", token.AccessToken, nonce, right, false},
		{"altered", id[:len(id)-8] + "AAAAAAAA", token.AccessToken, nonce, right, false},
		{"too late", id, token.AccessToken, nonce, verifierAt(cfg, 5*time.Minute+tokenLeeway+time.Second), false},
		{"another client's", id, token.AccessToken, nonce, verifierAt(elsewhere, 0), false},
		{"another realm's", id, token.AccessToken, nonce, verifierAt(otherRealm, 0), false},
	} {
		shown := (&oauth2.Token{AccessToken: c.access}).WithExtra(map[string]any{"id_token": c.id})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := c.verifier.idToken(ctx, shown, c.nonce); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
		cancel()
	}
}

const own = "https://auth.example"

var (
	allowed   = []string{app, "http://localhost:5173"}
	ownConfig = config{PublicURL: own, CORSOrigins: allowed}
)

// Where one may want to return to, and where that leads ("" = refused).
var returnTargets = map[string]string{
	"/": own + "/", "/a/b?c=d#e": own + "/a/b?c=d#e", "/%2F%2Fevil.example": own + "/%2F%2Fevil.example", "/%5Cevil.example": own + "/%5Cevil.example",
	"/.//evil.example": own + "/.//evil.example", "/a//b@c:d": own + "/a//b@c:d", "/javascript:alert(1)": own + "/javascript:alert(1)",
	app: app, app + "/": app + "/", app + "/a?b=" + own + "#c": app + "/a?b=" + own + "#c", app + "?a": app + "?a", app + "#a": app + "#a",
	app + "//evil.example": app + "//evil.example", "http://localhost:5173/x": "http://localhost:5173/x",
	"/" + strings.Repeat("x", maxReturnTo-1): own + "/" + strings.Repeat("x", maxReturnTo-1),

	"/" + strings.Repeat("x", maxReturnTo): "", "//evil.example": "", "///evil.example": "", `/\evil.example`: "", `\\evil.example`: "", `\/evil.example`: "",
	"/\t/evil.example": "", "/\n/evil.example": "", "\t//evil.example": "", " //evil.example": "", "/\r\nSet-Cookie:a=b": "", "/ a": "", "/\x00": "", "/ä": "", "/\xff": "",
	"http://evil.example": "", "https://evil.example/" + app: "", "https:evil.example": "", "https:/evil.example": "", "evil.example": "", "a/b": "", "?a": "", "#a": "", ".": "",
	app + ".evil.example": "", app + "@evil.example": "", app + ":443@evil.example": "", app + ":443/": "", app + ":x@evil.example": "", app + `\@evil.example`: "",
	"https://user@app.example/": "", "https://app.exampleevil": "", "http://app.example": "", "HTTPS://app.example": "", "https://APP.example": "", "http://localhost:51730": "",
	"javascript:alert(1)": "", "data:text/html,x": "", "java\nscript:alert(1)": "", "%2F%2Fevil.example": "", "https%3A%2F%2Fapp.example": "", "null": "",
}

func TestReturnTo(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(map[string]string{"PUBLIC_URL": own, "CORS_ALLOWED_ORIGINS": strings.Join(allowed, ",")})
	cookie := regexp.MustCompile(`^__Host-sign_in=[\w-]{32}; Path=/; Max-Age=600; HttpOnly; Secure; SameSite=Lax$`) // of https
	for returnTo, want := range returnTargets {
		if got, ok := ownConfig.returnURL(returnTo); got != want || ok != (want != "") {
			t.Errorf("%q leads to %q, want %q", returnTo, got, want)
		}
		a := v.get("/auth/login?return_to=" + url.QueryEscape(returnTo))
		if want != "" {
			if a.Status != 303 || !strings.HasPrefix(a.Header.Get("Location"), services.KeycloakURL+"/realms/") || !cookie.MatchString(a.Header.Get("Set-Cookie")) {
				t.Errorf("%q leads to %q with %v", returnTo, a.Header.Get("Location"), a.Header)
			}
		} else if a.Status != 400 || !strings.Contains(string(a.Body), "return_to must be a path of this site") || len(a.Header.Values("Set-Cookie")) > 0 {
			t.Errorf("%q: %v", returnTo, a)
		}
	}
}

// A person comes back where the longest return_to leads, where none was given, and
// when its origin is no longer allowed.
func TestReturned(t *testing.T) {
	t.Parallel()
	w := codeFlowEnv(t)
	email, _, _ := w.member()
	p := w.person()
	long := "/" + strings.Repeat("x", maxReturnTo-1)
	p.isBack(p.comesBack(p.signsIn(p.begins(long), email)), "http://localhost:3000"+long)
	p.isBack(p.comesBack(p.signsIn(p.begins(""), "")), "http://localhost:3000/account/signed-in")
	query := p.signsIn(p.begins(app+"/after"), email)
	p.env, _ = w.another(map[string]string{"CORS_ALLOWED_ORIGINS": "https://admin.example:8443"})
	p.isBack(p.comesBack(query), "http://localhost:3000/account/signed-in")
}

var asBrowsersRead = regexp.MustCompile(`(?i)^([a-z][a-z0-9+.-]*:)?(/*)([^/?#]*@)?([^/?#]*)`)

// browserOrigin is the origin that a browser on a page of own would go to (WHATWG URL
// Standard §4.4), "" for what is neither http nor https.
func browserOrigin(location string) string {
	location = strings.TrimFunc(location, func(r rune) bool { return r <= ' ' })
	m := asBrowsersRead.FindStringSubmatch(strings.NewReplacer("\t", "", "\n", "", "\r", "", `\`, "/").Replace(location))
	switch scheme := strings.ToLower(cmp.Or(m[1], "https:")); {
	case scheme == "https:" && len(m[2]) < 2: // relative, as "https:evil.example" is
		return own
	case scheme == "https:", scheme == "http:":
		return scheme + "//" + strings.ToLower(m[4])
	}
	return ""
}

func FuzzReturnURL(f *testing.F) {
	for returnTo := range returnTargets {
		f.Add(returnTo)
	}
	origins := append([]string{own}, allowed...)
	f.Fuzz(func(t *testing.T, returnTo string) {
		target, ok := ownConfig.returnURL(returnTo)
		if !ok {
			return
		}
		u, err := url.Parse(target)
		if err == nil && (!slices.Contains(origins, u.Scheme+"://"+u.Host) || u.User != nil) || // Go reads less than browsers do
			!slices.Contains(origins, browserOrigin(target)) || !slices.Contains(origins, browserOrigin(returnTo)) ||
			strings.ContainsFunc(target, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Errorf("%q leads to %q", returnTo, target)
		}
	})
}

// Whatever a browser sends, even signed with its own secret, is a sign-in or refused.
func FuzzState(f *testing.F) {
	f.Add("secret", "MSAyIDM.x", "/after")
	f.Add("secret", "rubbish", "")
	f.Add("", "1 99999999999 /", "a b c")
	f.Fuzz(func(t *testing.T, browser, state, returnTo string) {
		now := time.Now()
		flow := newSignIn(browser, returnTo, now)
		again, err := resumeSignIn(browser, flow.state, now)
		if browser == "" && err == nil || browser != "" && (err != nil || again != flow) {
			t.Errorf("%q %q: %v, %v", browser, returnTo, again, err)
		}
		encoded := base64.RawURLEncoding.EncodeToString([]byte(state))
		resumeSignIn(browser, state+"."+derive(browser, "state", state), now) // it must not panic
		resumeSignIn(browser, encoded+"."+derive(browser, "state", encoded), now)
		for what, refused := range map[string]func() (signIn, error){
			"unsigned":          func() (signIn, error) { return resumeSignIn(browser, state, now) },
			"another browser's": func() (signIn, error) { return resumeSignIn(browser+"x", flow.state, now) },
			"late":              func() (signIn, error) { return resumeSignIn(browser, flow.state, now.Add(signInTime+time.Second)) },
		} {
			if _, err := refused(); err == nil {
				t.Errorf("%s: %q %q is accepted", what, browser, state)
			}
		}
	})
}
