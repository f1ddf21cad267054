package main

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	refreshPath, logoutPath  = "/api/v1/auth/refresh", "/api/v1/auth/logout"
	sessionsPath, forgotPath = "/api/v1/auth/sessions", "/api/v1/auth/password/forgot"
)

func refreshing(token string) call {
	return call{method: "POST", path: refreshPath, json: body{"refresh_token": token}}
}

func loggingOut(token string) call {
	return call{method: "POST", path: logoutPath, json: body{"refresh_token": token}}
}

func forgetting(email string) call {
	return call{method: "POST", path: forgotPath, json: body{"email": email}}
}

// authorized is a request with an access token.
func authorized(token, method, path string) call {
	r := bearing(path, token)
	r.method = method
	return r
}

// as sends a request with an access token.
func (w *env) as(a answer, method, path string) answer {
	w.Helper()
	return w.do(authorized(a.text("access_token"), method, path))
}

// signedIn is a new account's sign-in.
func (w *env) signedIn() (email string, a answer) {
	w.Helper()
	email = newEmail()
	w.account(email)
	return email, w.signsIn(email)
}

func (w *env) signsIn(email string) answer {
	w.Helper()
	a := w.login(email, password)
	w.wants(a, 200, "")
	return a
}

// session signs a new account in, for the tables of faults and crashes: Token is the
// refresh token, Key the access token, Code the session.
func (w *env) session(email string) link {
	w.Helper()
	w.account(email)
	a := w.signsIn(email)
	return link{Token: a.text("refresh_token"), Access: a.text("access_token"), Code: a.text("session_id")}
}

// refreshed is the answer to a refresh token that must be good.
func (w *env) refreshed(before answer) answer {
	w.Helper()
	a := w.do(refreshing(before.text("refresh_token")))
	w.wants(a, 200, "")
	return a
}

// graceEnds stands in for waiting until it is over for the used tokens of a session.
func (w *env) graceEnds(a answer) {
	w.Helper()
	w.exec(`update refresh_tokens set used_at = used_at - interval '10 seconds', answer_until = answer_until - interval '10 seconds'
		where session_id = $1`, a.text("session_id"))
}

// sid is Keycloak's id of a session.
func (w *env) sid(a answer) string {
	w.Helper()
	return w.value(`select keycloak_session_id from sessions where session_id = $1`, a.text("session_id"))
}

// lockEnds stands in for waiting until the lock of an exchange ends by itself.
func (w *env) lockEnds(a answer) {
	w.Helper()
	w.exec(`update tasks set locked_until = now() where task_id = $1`, "token:"+digest(a.text("refresh_token")))
}

// ended fails unless a session has ended for this reason in both stores, which is
// audited, and its tokens are dead.
func (w *env) ended(reason string, list ...answer) {
	w.Helper()
	id := list[0].text("session_id")
	if got := w.value(`select coalesce(ended_reason, 'it lives') from sessions where session_id = $1`, id); got != reason {
		w.Fatalf("%s has not ended for %q: %s", id, reason, got)
	}
	if slices.Contains(w.keycloakSessions(), w.sid(list[0])) {
		w.Errorf("%s lives in Keycloak", id)
	}
	w.value(`select audit_id from audit_log where details->'sessions' ? $1 and outcome = 'ok' and reason = $2`, id, reason)
	for _, a := range list {
		w.wants(w.do(refreshing(a.text("refresh_token"))), 401, "invalid-token")
	}
}

// names fails unless the answer is that this one field is wrong.
func (w *env) names(a answer, field string) {
	w.Helper()
	w.wants(a, 400, "invalid-request")
	if errs, _ := a.JSON["errors"].([]any); len(errs) != 1 || errs[0].(body)["field"] != field {
		w.Errorf("%s is not named: %v", field, a)
	}
}

func TestRefresh(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	email, first := w.signedIn()
	other := w.signsIn(email)
	second := w.refreshed(first)

	now := maps.Clone(first.JSON) // as login without user, and three new tokens
	delete(now, "user")
	for _, name := range []string{"access_token", "refresh_token", "id_token"} {
		if now[name] = second.JSON[name]; second.text(name) == "" || second.text(name) == first.text(name) {
			t.Errorf("%s is no new one", name)
		}
	}
	for name, want := range map[string]float64{"expires_in": 300, "refresh_expires_in": 86400} {
		if now[name] = second.JSON[name]; !lasts(now[name], want) {
			t.Errorf("%s: %v", name, now[name])
		}
	}
	if diff := cmp.Diff(now, second.JSON); diff != "" {
		t.Error(diff)
	}
	w.wants(w.as(second, "GET", "/api/v1/auth/me"), 200, "")
	session := first.text("session_id")
	if got := w.value(`select string_agg(concat_ws(' ', token_hash, used_at is not null, answer is not null), ', ' order by used_at)
		from refresh_tokens where session_id = $1`, session); got != digest(first.text("refresh_token"))+" t t, "+digest(second.text("refresh_token"))+" f f" {
		t.Error(got)
	}
	if got := w.value(`select concat_ws(' ', last_used_at > created_at, extract(epoch from expires_at - last_used_at) > 86390)
		from sessions where session_id = $1`, session); got != "t t" {
		t.Errorf("last_used_at, expires_at: %s", got)
	}
	if got := w.value(`select count(*)::text from tasks where task_id in ($1, $2)`, "token:"+digest(first.text("refresh_token")), session); got != "0" {
		t.Errorf("%s tasks are left of the exchange", got)
	}

	// The same answer within the grace time, from whichever instance, also of the one before the last.
	third := w.refreshed(second)
	asked := w.kc.count("refresh")
	for _, instance := range []*env{w, v, w} {
		for _, c := range []struct{ old, now answer }{{first, second}, {second, third}} {
			if a := instance.refreshed(c.old); string(a.Body) != string(c.now.Body) {
				t.Errorf("another answer: %v, not %v", a, c.now)
			}
		}
	}
	if n := w.kc.count("refresh") - asked; n != 0 {
		t.Errorf("Keycloak was asked %d times more", n)
	}

	// After it that is theft.
	user := w.value(`select user_id from users where email = $1`, email)
	theft := func(old, newest answer) {
		t.Helper()
		w.graceEnds(newest)
		counted := w.reuses()
		a := w.do(refreshing(old.text("refresh_token")))
		w.wants(a, 401, "token-reused")
		w.ended("token-reused", newest, old)
		if n := w.reuses() - counted; n != 1 || !strings.HasPrefix(a.Header.Get("WWW-Authenticate"), "Bearer") {
			t.Errorf("auth_refresh_token_reuse_total: %d more; %v", n, a.Header)
		}
		if got := w.value(`select string_agg(concat_ws(' ', actor, action, outcome, reason, target), ', ' order by at, audit_id) from audit_log where request_id = $1`,
			a.text("request_id")); got != "anonymous session.end ok token-reused "+user+", anonymous refresh refused token-reused "+user {
			t.Error(got)
		}
	}
	theft(second, w.refreshed(third))
	first = w.signsIn(email)
	theft(first, w.refreshed(w.refreshed(w.refreshed(first)))) // three rotations old
	w.refreshed(other)                                         // the person's other session lives on
}

// reuses is what the metric says.
func (w *env) reuses() (n int) {
	w.Helper()
	text := string(w.management404("/metrics").Body)
	if _, err := fmt.Sscan(regexp.MustCompile(`(?m)^auth_refresh_token_reuse_total (\d+)$`).FindStringSubmatch(text)[1], &n); err != nil {
		w.Fatal(err)
	}
	return n
}

func TestRefreshRefused(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // sync would reconcile what is changed in one store only
	email, first := w.signedIn()
	token := first.text("refresh_token")
	typed := func(contentType, body string) call {
		return call{method: "POST", body: body, header: map[string]string{"Content-Type": contentType}}
	}
	good := fmt.Sprintf(`{"refresh_token":%q}`, token)
	for _, c := range []struct {
		name   string
		call   call
		status int
		slug   string
		field  string
	}{
		{"garbage", refreshing("garbage"), 401, "invalid-token", ""},
		{"access token", refreshing(first.text("access_token")), 401, "invalid-token", ""},
		{"ID token", refreshing(first.text("id_token")), 401, "invalid-token", ""},
		{"cut short", refreshing(token[:len(token)-1]), 401, "invalid-token", ""},
		{"with a blank", refreshing(token[:20] + " " + token[20:]), 401, "invalid-token", ""},
		{"its hash", refreshing(digest(token)), 401, "invalid-token", ""},
		{"of the session", refreshing(first.text("session_id")), 401, "invalid-token", ""},
		{"no body and no cookie", call{method: "POST"}, 401, "invalid-token", ""},
		{"a form", typed("application/x-www-form-urlencoded", "refresh_token="+token), 415, "unsupported-media-type", ""},
		{"plain text", typed("text/plain", good), 415, "unsupported-media-type", ""},
		{"nothing", typed("application/json", ""), 401, "invalid-token", ""},
		{"not JSON", typed("application/json", "x"), 400, "invalid-request", ""},
		{"no token", refreshing(""), 400, "invalid-request", "refresh_token"},
		{"no member", typed("application/json", "{}"), 400, "invalid-request", "refresh_token"},
		{"null", typed("application/json", `{"refresh_token":null}`), 400, "invalid-request", "refresh_token"},
		{"a number", typed("application/json", `{"refresh_token":1}`), 400, "invalid-request", "refresh_token"},
		{"too long", refreshing(strings.Repeat("x", 8193)), 400, "invalid-request", "refresh_token"},
		{"unknown member", typed("application/json", strings.Replace(good, "}", `,"cookie":"x"}`, 1)), 400, "invalid-request", "cookie"},
	} {
		for _, path := range []string{refreshPath, logoutPath} {
			c.call.path = path
			a := w.do(c.call)
			if path == logoutPath && c.slug == "invalid-token" { // its session has ended, as far as anybody can tell
				w.wants(a, 204, "")
				continue
			}
			w.wants(a, c.status, c.slug)
			if c.field != "" {
				w.names(a, c.field)
			}
			if recorded := w.value(`select count(*)::text from audit_log where request_id = $1 and action = $2 and outcome = 'refused' and reason = $3`,
				a.text("request_id"), path[len("/api/v1/auth/"):], c.slug); recorded != map[bool]string{true: "0", false: "1"}[c.status == 400] {
				t.Errorf("%s: %s refusals are audited", c.name, recorded)
			}
		}
	}
	w.exec(`update users set is_active = false, deleted_at = now() where email = $1`, email) // the stricter store wins
	w.wants(w.do(refreshing(token)), 401, "invalid-token")
	w.exec(`update users set is_active = true, deleted_at = null where email = $1`, email)
	w.wants(w.do(call{method: "POST", path: refreshPath, body: good, header: map[string]string{"Content-Type": "application/json"}}), 200, "")
}

// cookieOrigins are where a request with the cookie may come from, and whether it counts: see cookieEnv.
var cookieOrigins = []struct {
	name    string
	headers map[string]string
	allowed bool
}{
	{"own origin", map[string]string{"Origin": "https://auth.example"}, true},
	{"own page", map[string]string{"Sec-Fetch-Site": "same-origin"}, true},
	{"listed origin", map[string]string{"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}, true},
	{"neither header", nil, false},
	{"another origin", map[string]string{"Origin": "https://evil.example"}, false},
	{"another site", map[string]string{"Sec-Fetch-Site": "cross-site"}, false},
	{"another host of the site", map[string]string{"Sec-Fetch-Site": "same-site"}, false},
	{"another origin that claims", map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, false},
	{"a subdomain", map[string]string{"Origin": "https://x.app.example", "Sec-Fetch-Site": "same-site"}, false},
	{"without TLS", map[string]string{"Origin": "http://app.example"}, false},
	{"another port", map[string]string{"Origin": "https://app.example:8443"}, false},
	{"an opaque origin", map[string]string{"Origin": "null", "Sec-Fetch-Site": "cross-site"}, false},
	{"an opaque origin, old browser", map[string]string{"Origin": "null"}, false},
}

// cookieEnv is an instance at an origin with TLS, and a frontend that may use its cookie.
func cookieEnv(t *testing.T) *env {
	t.Helper()
	w, _ := sharedEnv(t).another(map[string]string{"PUBLIC_URL": "https://auth.example", "CORS_ALLOWED_ORIGINS": "https://app.example"})
	return w
}

// withCookie is a request of a browser.
func withCookie(path, token string, headers map[string]string) call {
	r := call{method: "POST", path: path, header: map[string]string{"Cookie": "theme=dark; __Host-refresh_token=" + token}}
	maps.Copy(r.header, headers)
	return r
}

// cookieSet is the cookie that an answer sets, or nil.
func (w *env) cookieSet(a answer) *http.Cookie {
	w.Helper()
	cookies := (&http.Response{Header: a.Header}).Cookies()
	if len(cookies) == 0 {
		return nil
	}
	c := cookies[0]
	if len(cookies) > 1 || c.Name != "__Host-refresh_token" || c.Path != "/" || !c.HttpOnly || !c.Secure ||
		c.SameSite != http.SameSiteLaxMode || c.Domain != "" {
		w.Errorf("Set-Cookie: %v", cookies)
	}
	w.secrets.add(c.Value)
	return c
}

// The cookie of the code flow counts only from an origin that is allowed.
func TestRefreshCookie(t *testing.T) {
	w := cookieEnv(t)
	_, first := w.signedIn()
	session, token := first.text("session_id"), first.text("refresh_token")
	for _, o := range cookieOrigins {
		asked := w.kc.count("refresh")
		a := w.do(withCookie(refreshPath, token, o.headers))
		c := w.cookieSet(a)
		unused := w.value(`select token_hash from refresh_tokens where session_id = $1 and used_at is null`, session)
		if !o.allowed {
			w.wants(a, 403, "forbidden")
			w.wants(w.do(withCookie(logoutPath, token, o.headers)), 403, "forbidden")
			if c != nil || unused != digest(token) || w.kc.count("refresh") != asked {
				t.Errorf("%s: something was exchanged: %v", o.name, a)
			}
			continue
		}
		w.wants(a, 200, "")
		if c == nil || !lasts(float64(c.MaxAge), 86400) || unused != digest(c.Value) || a.text("access_token") == "" || a.text("session_id") != session {
			t.Fatalf("%s: %v %v", o.name, c, a)
		}
		if _, there := a.JSON["refresh_token"]; there || strings.Contains(string(a.Body), c.Value) {
			t.Errorf("%s: the token is in the body: %v", o.name, a)
		}
		again := w.do(withCookie(refreshPath, token, o.headers))
		if string(again.Body) != string(a.Body) || w.cookieSet(again).String() != c.String() {
			t.Errorf("%s: another answer: %v %v", o.name, again, again.Header)
		}
		token = c.Value
	}
}

// Without a token in the body the cookie counts; else the body's token wins.
func TestRefreshCookieAndBody(t *testing.T) {
	w := cookieEnv(t)
	email, first := w.signedIn()
	token, own := first.text("refresh_token"), cookieOrigins[0].headers
	w.wants(w.do(withCookie(refreshPath, "garbage", own)), 401, "invalid-token")
	w.wants(w.do(withCookie(refreshPath, "", own)), 401, "invalid-token") // an empty one is none
	plain := withCookie(refreshPath, token, own)
	plain.header["Content-Type"], plain.body = "text/plain", "{}"
	w.wants(w.do(plain), 415, "unsupported-media-type")
	empty := withCookie(refreshPath, token, own)
	empty.json = body{}
	a := w.do(empty)
	w.wants(a, 200, "")
	token = w.cookieSet(a).Value

	other := w.signsIn(email)
	both := withCookie(refreshPath, token, own)
	both.json = body{"refresh_token": other.text("refresh_token")}
	a = w.do(both)
	if w.wants(a, 200, ""); a.text("session_id") != other.text("session_id") || a.text("refresh_token") == "" || w.cookieSet(a) != nil {
		t.Error(a)
	}
	other = a
	both.path, both.json = logoutPath, body{"refresh_token": other.text("refresh_token")}
	w.wants(w.do(both), 204, "")
	w.ended("logout", other)
	w.wants(w.do(withCookie(refreshPath, token, own)), 200, "") // what nobody has ended
}

// A logout clears the cookie.
func TestLogoutCookie(t *testing.T) {
	w := cookieEnv(t)
	email, lives := w.signedIn()
	for _, o := range cookieOrigins {
		if !o.allowed {
			continue
		}
		other := w.signsIn(email)
		a := w.do(withCookie(logoutPath, other.text("refresh_token"), o.headers))
		if c := w.cookieSet(a); a.Status != 204 || c == nil || c.MaxAge != -1 || c.Value != "" {
			t.Errorf("%s: not cleared: %v %v", o.name, a, a.Header)
		}
		w.ended("logout", other)
	}
	w.wants(w.do(withCookie(refreshPath, lives.text("refresh_token"), cookieOrigins[0].headers)), 200, "") // what nobody has ended
	if a := w.do(withCookie(logoutPath, "garbage", cookieOrigins[0].headers)); a.Status != 204 || w.cookieSet(a) == nil {
		t.Errorf("an unknown cookie is not cleared: %v", a)
	}
}

// What overtakes an exchange while Keycloak answers it.
func TestRefreshOvertaken(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	during := func(old answer, do func()) answer {
		there, release := w.kc.holdAt("^refresh ", true)
		answered := make(chan answer, 1)
		go func() {
			a, err := w.send(w.url, refreshing(old.text("refresh_token")))
			if err != nil {
				t.Error(err)
			}
			answered <- a
		}()
		<-there
		do()
		release()
		return <-answered
	}
	_, first := w.signedIn()
	w.wants(during(first, func() { w.wants(w.do(loggingOut(first.text("refresh_token"))), 204, "") }), 401, "invalid-token")
	w.ended("logout", first)

	email, first := w.signedIn()
	w.wants(during(first, func() { w.wants(w.as(w.signsIn(email), "DELETE", sessionsPath), 204, "") }), 401, "invalid-token")
	w.ended("own", first)

	// Slower than its lock: both have exchanged the token. The answer of the faster counts.
	_, first = w.signedIn()
	var faster answer
	slower := during(first, func() { w.lockEnds(first); faster = v.refreshed(first) })
	w.wants(slower, 503, "unavailable")
	if again := w.refreshed(first); string(again.Body) != string(faster.Body) {
		t.Errorf("%v\n%v", again, faster)
	}
	w.refreshed(faster)

	// Keycloak has done it, and PostgreSQL can't be told: the next try, when the lock has ended, gets another.
	_, first = w.signedIn()
	w.wants(during(first, func() { w.pg.close() }), 503, "unavailable")
	if err := w.pg.open(); err != nil {
		t.Fatal(err)
	}
	w.lockEnds(first)
	w.eventually("PostgreSQL is back", time.Minute, func() bool { return w.get("/health").text("status") == "ok" })
	w.refreshed(w.refreshed(first))
}

// Who shows a token that is being exchanged waits a moment for that answer, and no longer.
func TestRefreshWaits(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	v, _ := w.another(nil)
	_, first := w.signedIn()
	there, release := w.kc.holdAt("^refresh ", true)
	answers := make(chan answer, 2)
	show := func(at *env) {
		a, err := at.send(at.url, refreshing(first.text("refresh_token")))
		if err != nil {
			t.Error(err)
		}
		answers <- a
	}
	go show(w)
	<-there
	start := time.Now()
	for _, a := range v.within(3*time.Second, refreshing(first.text("refresh_token")), refreshing(first.text("refresh_token"))) {
		w.wants(a, 503, "unavailable")
	}
	if took := time.Since(start); took < lockWait {
		t.Errorf("they have waited for %v only", took)
	}
	since := w.value(`select clock_timestamp()::text`)
	go show(v)
	w.eventually("another waits", 5*time.Second, func() bool {
		return w.value(`select count(*)::text from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
			and query = 'commit' and query_start > $1::timestamptz`, since) != "0"
	})
	release()
	one, two := <-answers, <-answers
	w.wants(one, 200, "")
	w.wants(two, 200, "")
	if string(one.Body) != string(two.Body) || w.kc.count("refresh") != 1 {
		t.Errorf("Keycloak was asked %d times\n%v\n%v", w.kc.count("refresh"), one, two)
	}
	w.refreshed(one)
}

// TestSessionsPages: sessions that Keycloak has ended leave no gap in a page of those that live.
func TestSessionsPages(t *testing.T) {
	w := sharedEnv(t)
	email, lives := w.signedIn()
	for range 2 {
		w.keycloakAdmin("DELETE", "/sessions/"+w.sid(w.signsIn(email)), nil, nil)
	}
	a := w.as(lives, "GET", "/api/v1/auth/sessions?limit=1")
	w.wants(a, 200, "")
	if items := a.JSON["items"].([]any); len(items) != 1 || items[0].(body)["session_id"] != lives.text("session_id") || a.JSON["next_cursor"] != nil {
		t.Errorf("%v", a)
	}
}

// TestEndedInKeycloak: what has ended in Keycloak ends in PostgreSQL, when its token is shown or when it is listed; an
// outage ends nothing.
func TestEndedInKeycloak(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "200ms"})
	w.noEvents() // what ends a session here is that Keycloak has it no more
	admin := w.admin()
	_, lives := w.signedIn()
	user := func(email string) string {
		return "/users/" + w.value(`select keycloak_id from users where email = $1`, email)
	}
	listed := func(email string) int {
		w.Helper()
		a := admin.asks("GET", usersPath+"/"+w.idOf(email)+"/sessions", nil)
		w.wants(a, 200, "")
		return len(a.JSON["items"].([]any))
	}
	isListed := func(email string, a answer) { // it has ended, and somebody looks
		w.Helper()
		if n := listed(email); n != 0 {
			w.Errorf("%d sessions are listed that Keycloak has not", n)
		}
		w.eventually("its task ends it", time.Minute, func() bool {
			return w.value(`select (ended_at is not null)::text from sessions where session_id = $1`, a.text("session_id")) == "true"
		})
		w.ended("keycloak", a)
		w.value(`select audit_id from audit_log where actor = 'system:sessions' and details->'sessions' ? $1`, a.text("session_id"))
	}
	nothing := func(string, answer) {}
	for _, c := range []struct {
		name       string
		end, after func(email string, a answer)
		silent     bool // Keycloak has the session still
	}{
		{"an administrator ends the session", func(_ string, a answer) { w.keycloakAdmin("DELETE", "/sessions/"+w.sid(a), nil, nil) }, nothing, false},
		{"an administrator signs the user out", func(email string, _ answer) { w.keycloakAdmin("POST", user(email)+"/logout", nil, nil) }, nothing, false},
		{"an administrator disables the user", func(email string, _ answer) { w.keycloakAdmin("PUT", user(email), body{"enabled": false}, nil) },
			func(email string, _ answer) { w.keycloakAdmin("PUT", user(email), body{"enabled": true}, nil) }, true},
		{"an administrator deletes the user", func(email string, _ answer) { w.keycloakAdmin("DELETE", user(email), nil, nil) },
			func(email string, a answer) {
				w.exec(`with s as (delete from sessions where session_id = $2), r as (delete from user_registrations where email = $1)
					delete from users where email = $1`, email, a.text("session_id"))
			}, false},
	} {
		w.Run(c.name, func() {
			email, a := w.signedIn()
			c.end(email, a)
			refused := w.do(refreshing(a.text("refresh_token")))
			w.wants(refused, 401, "invalid-token")
			w.ended("keycloak", a)
			if got := w.value(`select string_agg(action || ' ' || outcome, ', ' order by at, audit_id) from audit_log where request_id = $1`,
				refused.text("request_id")); got != "session.end ok, refresh refused" {
				w.Error(got)
			}
			c.after(email, a)
			if c.silent {
				return
			}
			email, a = w.signedIn()
			c.end(email, a)
			isListed(email, a)
			c.after(email, a)
		})
	}
	w.Run("an outage", func() {
		w.kc.on("^(user_sessions|refresh) ", lost)
		email := w.value(`select email from users join sessions using (user_id) where session_id = $1`, lives.text("session_id"))
		for range 2 {
			w.wants(w.do(refreshing(lives.text("refresh_token"))), 503, "unavailable")
			if n := listed(email); n != 1 {
				w.Errorf("%d sessions are listed", n)
			}
		}
		w.kc.on("^(user_sessions|refresh) ", 0)
		if n := listed(email); n != 1 {
			w.Errorf("%d sessions are listed", n)
		}
		w.wants(w.do(loggingOut(w.refreshed(lives).text("refresh_token"))), 204, "")
	})
	w.Run("nobody uses it", func() {
		_, a := w.signedIn()
		email, b := w.signedIn()
		w.keycloakAdmin("PUT", "", body{"ssoSessionIdleTimeout": 1}, nil)
		w.eventually("both are too idle", time.Minute, func() bool { return len(w.keycloakSessions()) == 0 })
		w.wants(w.do(refreshing(a.text("refresh_token"))), 401, "invalid-token")
		w.ended("keycloak", a)
		isListed(email, b)
		isListed(admin.Email, admin.signIn)
	})
}

// Nobody asks Keycloak for a session until it is listed or refreshed, however many there are:
// a list costs one call, and the end of all two, however many they are.
func TestSessionsCostCalls(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	email := newEmail()
	w.account(email)
	var all []answer
	for range 6 {
		all = append(all, w.signsIn(email))
	}
	calls := func() string {
		return fmt.Sprint(w.kc.count("user_sessions"), w.kc.count("end_session"), w.kc.count("end_sessions"))
	}
	w.exec(`update sessions set created_at = created_at - interval '2 hours', last_used_at = last_used_at - interval '2 hours'`)
	if out, err := w.operate("jobs"); err != nil {
		t.Fatal(err, out)
	}
	if got := calls(); got != "0 0 0" || w.value(`select count(*)::text from tasks where task_id like 'SES-%'`) != "0" {
		t.Errorf("live sessions cost calls: %s", got)
	}
	if a := w.as(all[0], "GET", sessionsPath); len(a.JSON["items"].([]any)) != len(all) || calls() != "1 0 0" {
		t.Errorf("the list costs calls: %s; %v", calls(), a)
	}
	w.wants(w.as(all[0], "DELETE", sessionsPath+"/"+all[5].text("session_id")), 204, "")
	if got := calls(); got != "1 1 0" {
		t.Errorf("the end of one costs calls: %s", got)
	}
	w.wants(w.as(all[0], "DELETE", sessionsPath), 204, "")
	if got := calls(); got != "2 1 1" {
		t.Errorf("the end of all costs calls: %s", got)
	}
	for _, a := range all[:5] {
		w.ended("own", a)
	}
	if got := w.value(`select count(*)::text from tasks where task_id like 'SES-%'`); got != "0" {
		t.Errorf("%s tasks are left", got)
	}
}

// Sessions that have ended or expired go after 30 days, with their tokens. Live ones stay.
func TestOldSessionsGo(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	email := newEmail()
	w.account(email)
	age := func(set string, days int) answer {
		a := w.signsIn(email)
		if strings.Contains(set, "ended_at") {
			w.wants(w.do(loggingOut(a.text("refresh_token"))), 204, "")
		}
		w.exec(`update sessions set `+set+` where session_id = $1`, a.text("session_id"), fmt.Sprint(days, " days"))
		return a
	}
	const past = "expires_at = now() - $2::interval"
	live := w.signsIn(email)
	gone := []answer{age(past+", ended_at = now() - $2::interval", 31), age(past, 31)}
	kept := []answer{age(past+", ended_at = now() - $2::interval", 29), age(past, 29), age("ended_at = now() - $2::interval", 31), live}
	w.due("job:sweep")
	if out, err := w.operate("jobs"); err != nil {
		t.Fatal(err, out)
	}
	for left, list := range map[string][]answer{"0": gone, "1": kept} {
		for i, a := range list {
			if n := w.value(`select count(*)::text from sessions where session_id = $1`, a.text("session_id")); n != left {
				t.Errorf("of those of which %s should be left, session %d is there %s times", left, i, n)
			}
		}
	}
	w.refreshed(live)
	w.exec(`update sessions set expires_at = now() + interval '1 day' where ended_at is null`) // Keycloak has those that only seem to have expired
	w.straysDie()
}

// A copy of the database opens nothing, and what is kept for the grace time goes.
func TestCopyOfSessions(t *testing.T) {
	w := sharedEnv(t)
	_, first := w.signedIn()
	second := w.refreshed(first)
	session := first.text("session_id")
	copied := w.value(`select (select string_agg(t::text, E'\n') from refresh_tokens t) || (select string_agg(s::text, E'\n') from sessions s) ||
		(select string_agg(a::text, E'\n') from audit_log a) || (select string_agg(u::text, E'\n') from users u)`)
	if !strings.Contains(copied, digest(first.text("refresh_token"))) {
		t.Error("the copy does not even have the token's hash")
	}
	for _, a := range []answer{first, second} {
		for _, name := range []string{"access_token", "refresh_token", "id_token"} {
			for _, part := range append(strings.Split(a.text(name), "."), a.text(name)) {
				if strings.Contains(copied, part) || strings.Contains(copied, hex.EncodeToString([]byte(part))) {
					t.Errorf("the copy holds a part of the %s", name)
				}
			}
		}
	}
	var sealed []byte
	if err := w.pool.QueryRow(t.Context(), `select answer from refresh_tokens where session_id = $1 and answer is not null`, session).Scan(&sealed); err != nil {
		t.Fatal(err)
	}
	for key, opens := range map[string]bool{first.text("refresh_token"): true, second.text("refresh_token"): false, second.text("access_token"): false,
		digest(first.text("refresh_token")): false, session: false, "": false} {
		if plain, err := openSealed(key, sealed); (err == nil && strings.Contains(string(plain), second.text("refresh_token"))) != opens {
			t.Errorf("%.20s… opens the answer: %v", key, err)
		}
	}
	w.exec(`update refresh_tokens set answer_until = now() - interval '61 seconds' where session_id = $1`, session) // the sweep leaves a minute for clocks
	w.due("job:sweep")                                                                                              // another test may have put it off
	w.eventually("the answer is forgotten", time.Minute, func() bool {
		return w.value(`select count(answer)::text from refresh_tokens where session_id = $1`, session) == "0"
	})
	w.refreshed(second)
}

func TestLogout(t *testing.T) {
	w := sharedEnv(t)
	email, first := w.signedIn()
	other := w.signsIn(email)
	second := w.refreshed(first)
	w.wants(w.do(loggingOut(second.text("access_token"))), 204, "") // nobody's refresh token
	second, first = w.refreshed(second), second
	a := w.do(loggingOut(second.text("refresh_token")))
	if w.wants(a, 204, ""); len(a.Body) > 0 || a.Header.Get("Set-Cookie") != "" {
		t.Error(a, a.Header)
	}
	w.ended("logout", second, first) // first is within its grace time
	if got := w.value(`select concat_ws(' ', action, outcome, reason, actor = target, ip_address <> '') from audit_log
		where request_id = $1 and actor = (select user_id from users where email = $2)`, a.Header.Get("X-Request-Id"), email); got != "logout ok logout t t" {
		t.Error(got)
	}
	a = w.do(loggingOut(second.text("refresh_token")))
	w.wants(a, 204, "")
	if n := w.value(`select count(*)::text from audit_log where request_id = $1`, a.Header.Get("X-Request-Id")); n != "0" {
		t.Errorf("nothing has ended, and %s audit entries say so", n)
	}
	w.refreshed(other)

	third := w.signsIn(email)
	fourth := w.refreshed(third)
	w.graceEnds(fourth)
	w.wants(w.do(loggingOut(third.text("refresh_token"))), 204, "") // whoever holds a used one may end it, too
	w.ended("logout", fourth)

	// Keycloak away: it ends there later.
	last := w.signsIn(email)
	sid := w.sid(last)
	w.kc.on("^end_session ", lost)
	tried := w.kc.count("end_session")
	w.wants(w.do(loggingOut(last.text("refresh_token"))), 204, "")
	w.wants(w.do(refreshing(last.text("refresh_token"))), 401, "invalid-token")
	w.eventually("its task tries", time.Minute, func() bool { w.tasksDue(); return w.kc.count("end_session") > tried+1 })
	if !slices.Contains(w.keycloakSessions(), sid) {
		t.Error("it has ended in Keycloak, which was away")
	}
	w.kc.on("^end_session ", 0)
	w.eventually("its task ends it", time.Minute, func() bool { w.tasksDue(); return !slices.Contains(w.keycloakSessions(), sid) })
	w.ended("logout", last)
}

// manySessions are five live sessions of a new account, the latest first, two of one moment, and one that has ended;
// another has expired. The fourth is that of me, who asks.
func (w *env) manySessions() (email string, all []answer, gone, me answer) {
	w.Helper()
	email = newEmail()
	w.account(email)
	for i := range 5 {
		a := w.do(call{method: "POST", path: loginPath, json: body{"email": email, "password": password}, from: fmt.Sprintf("192.0.2.%d", i),
			header: map[string]string{"User-Agent": fmt.Sprintf("browser %d", i)}})
		w.wants(a, 200, "")
		all = append([]answer{a}, all...)
	}
	gone = w.signsIn(email)
	w.wants(w.do(loggingOut(gone.text("refresh_token"))), 204, "")
	expired := w.signsIn(email)
	w.exec(`update sessions set expires_at = now() where session_id = $1`, expired.text("session_id"))
	w.exec(`update sessions set created_at = (select created_at from sessions where session_id = $1) where session_id = $2`, sessionOf(all[1]), sessionOf(all[2]))
	if sessionOf(all[1]) < sessionOf(all[2]) { // of the same moment: by id
		all[1], all[2] = all[2], all[1]
	}
	return email, all, gone, w.refreshed(all[3])
}

func sessionOf(a answer) string { return a.text("session_id") }

// sessionPages reads the caller's sessions, so many at a time (0: the default). There are five.
func (w *env) sessionPages(me answer, limit int) (got []answer) {
	w.Helper()
	for cursor := ""; ; {
		path := sessionsPath + "?cursor=" + cursor
		if limit > 0 {
			path += fmt.Sprintf("&limit=%d", limit)
		}
		a := w.as(me, "GET", path)
		w.wants(a, 200, "")
		items := a.JSON["items"].([]any)
		for _, item := range items {
			got = append(got, answer{JSON: item.(body)})
		}
		cursor = a.text("next_cursor")
		if full := len(items) == limit && len(got) < 5; full != (cursor != "") || full != (a.JSON["next_cursor"] != nil) {
			w.Fatalf("limit %d: %v", limit, a)
		}
		if cursor == "" {
			return got
		}
	}
}

// The live sessions are listed, the latest first, in pages.
func TestSessions(t *testing.T) {
	w := sharedEnv(t)
	_, all, _, me := w.manySessions()
	for _, limit := range []int{0, 1, 2, 3, 4, 5, 6, 200} {
		got := w.sessionPages(me, limit)
		if len(got) != 5 {
			t.Fatalf("limit %d: %d sessions", limit, len(got))
		}
		for i, s := range got {
			row := w.value(`select concat_ws('|', session_id, ip_address, user_agent, created_at, last_used_at, expires_at) from sessions where session_id = $1`, sessionOf(all[i]))
			times := []string{}
			for _, name := range []string{"created_at", "last_used_at", "expires_at"} {
				at, err := time.Parse(time.RFC3339, s.text(name))
				if err != nil || !strings.HasSuffix(s.text(name), "Z") {
					t.Errorf("%s: %v", name, err)
				}
				times = append(times, w.value(`select $1::timestamptz::text`, at))
			}
			if show := strings.Join(append([]string{sessionOf(s), s.text("ip_address"), s.text("user_agent")}, times...), "|"); show != row ||
				s.JSON["current"] != (sessionOf(s) == sessionOf(me)) || len(s.JSON) != 8 {
				t.Errorf("limit %d, %d: %v\nwant %s", limit, i, s.JSON, row)
			}
		}
	}
	w.wants(w.as(me, "DELETE", sessionsPath), 204, "") // Keycloak has the one that only seems to have expired
}

func TestSessionsRefused(t *testing.T) {
	w := sharedEnv(t)
	_, me := w.signedIn()
	for query, field := range map[string]string{"limit=0": "limit", "limit=201": "limit", "limit=-1": "limit", "limit=x": "limit", "limit=1.5": "limit",
		"limit=99999999999999999999": "limit", "cursor=x": "cursor", "cursor=!": "cursor", "cursor=" + strings.Repeat("a", 201): "cursor",
		"cursor=" + cursorText("1"): "cursor", "cursor=" + cursorText("x SES-0123456789abcdef"): "cursor", "cursor=" + cursorText("1 SES-"): "cursor",
		"cursor=" + cursorText("9223372036854775807 SES-0123456789abcdef"): "cursor", "cursor=" + cursorText("-9223372036854775808 SES-0123456789abcdef"): "cursor"} {
		w.names(w.as(me, "GET", sessionsPath+"?"+query), field)
	}
	w.wants(w.get(sessionsPath), 401, "unauthorized")
	w.wants(w.do(call{method: "DELETE", path: sessionsPath + "/" + sessionOf(me)}), 401, "unauthorized")
	w.wants(w.do(call{method: "DELETE", path: sessionsPath}), 401, "unauthorized")

}

// Whoever is signed in ends one of their sessions, and then all.
func TestSessionsEnd(t *testing.T) {
	w := sharedEnv(t)
	_, stranger := w.signedIn()
	mine, all, gone, me := w.manySessions()
	for _, one := range []string{sessionOf(stranger), sessionOf(gone), sessionOf(me) + "x", strings.ToLower(sessionOf(me)), "USR-0123456789abcdef", "x", "%00", sessionOf(me) + "%20"} {
		w.wants(w.as(me, "DELETE", sessionsPath+"/"+one), 404, "not-found")
	}
	w.wants(w.as(me, "DELETE", sessionsPath+"/"+sessionOf(all[0])), 204, "")
	w.wants(w.as(me, "DELETE", sessionsPath+"/"+sessionOf(all[0])), 404, "not-found")
	w.ended("own", all[0])
	all[3] = w.refreshed(me)
	if got := w.as(me, "GET", sessionsPath).JSON["items"].([]any); len(got) != 4 {
		t.Errorf("four are left: %v", got)
	}
	a := w.as(me, "DELETE", sessionsPath)
	w.wants(a, 204, "")
	for _, s := range all[1:] {
		w.ended("own", s)
	}
	if got := w.value(`select concat_ws(' ', action, outcome, actor = target, jsonb_array_length(details->'sessions')) from audit_log where request_id = $1`,
		a.Header.Get("X-Request-Id")); got != "session.end ok t 5" { // the expired one, too
		t.Error(got)
	}
	w.eventually("the token of an ended session counts no more", time.Second, func() bool { return w.as(me, "DELETE", sessionsPath).Status == 401 })
	w.refreshed(stranger)
	w.signsIn(mine)
}

func cursorText(plain string) string { return base64.RawURLEncoding.EncodeToString([]byte(plain)) }

func FuzzCursor(f *testing.F) {
	for _, plain := range []string{"0 SES-0123456789abcdef", "1700000000000000 USR-0123456789abcdef", "-1 AUD-0123456789abcdef", "9223372036854775807 SES-0123456789abcdef", "x", " "} {
		f.Add(cursorText(plain))
	}
	f.Add("")
	f.Add("=")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseCursor(text)
		if err != nil {
			if p := (problem{}); !errors.As(err, &p) || p.Status != 400 || len(p.Errors) != 1 || p.Errors[0].Field != "cursor" {
				t.Error(err)
			}
			return
		}
		if again, err := parseCursor(c.String()); text != "" && (err != nil || again != c) {
			t.Errorf("%q is %v, and then %v %v", text, c, again, err)
		}
		if year := c.At.Year(); year < 1 || year > 9999 { // what PostgreSQL and RFC 3339 can say
			t.Errorf("%q is of the year %d", text, year)
		}
	})
}

// TestForgotPassword: one answer, whoever asks for whom; a mail for those who have an account, within limits of its
// own that count mails, and not requests (S6).
func TestForgotPassword(t *testing.T) {
	w := sharedEnv(t)
	pending, disabled, unproven, known := newEmail(), newEmail(), newEmail(), newEmail()
	w.register(pending)
	w.readMail(pending, 1)
	for _, email := range []string{disabled, unproven, known} {
		w.account(email)
	}
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(disabled), body{"enabled": false}, nil)
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(unproven), body{"emailVerified": false}, nil)
	forget := func(email string) {
		t.Helper()
		if a := w.do(forgetting(email)); a.Status != 202 || len(a.Body) > 0 {
			t.Errorf("%v", a)
		}
		w.eventually("it is done", time.Minute, func() bool {
			return w.value(`select count(*)::text from tasks where task_id like 'reset:%'`) == "0"
		})
	}
	link := regexp.MustCompile(`https?://[^\s"<>]*/login-actions/action-token\?key=[^\s"<>]*`)
	mailed := func(email string, n int) {
		t.Helper()
		m := w.receive(email, n)
		found := link.FindString(m.Text)
		if !strings.HasPrefix(found, services.KeycloakURL+"/realms/"+w.realm+"/") || !strings.Contains(m.HTML, "action-token?key=") {
			t.Fatalf("no link:\n%s", m.Text)
		}
		w.secrets.add(found[strings.Index(found, "key="):])
		if page, err := w.send(found, call{}); err != nil || page.Status != 200 || !strings.Contains(string(page.Body), "kc-info-message") {
			t.Errorf("Keycloak's page: %v %v", page, err)
		}
	}
	nobody := newEmail()
	for _, email := range []string{nobody, pending, disabled, unproven} {
		forget(email)
	}
	w.wants(w.post(registerPath, body{"email": nobody}), 201, "") // ten requests for it would not stand in the way either
	forget(strings.ToUpper(known))
	mailed(known, 2)
	forget(known) // too soon
	id := w.keycloakID(known)
	cooled := func() {
		w.exec(`update rate_limits set resets_at = now() where key = $1`, resetOfCooldown.of(id).Key)
	}
	cooled()
	if hits := w.value(`select hits::text from rate_limits where key = $1`, resetsADay.of(id).Key); hits != "1" {
		t.Errorf("%s mails were counted", hits)
	}
	w.usesUp(resetsADay.of(id))
	forget(known) // too many
	w.exec(`update rate_limits set hits = hits - 1 where key = $1`, resetsADay.of(id).Key)
	cooled()
	forget(known)
	mailed(known, 3)
	for email, n := range map[string]int{known: 3, pending: 1, disabled: 1, unproven: 1} {
		if got := len(w.mail.To(email)); got != n {
			t.Errorf("%d mails instead of %d", got, n)
		}
	}
	for _, bad := range []string{"", "ada", "ada@", "a@b\u0000.cd", "Ada <a@b.cd>", strings.Repeat("a", 250) + "@b.cd"} {
		w.names(w.do(forgetting(bad)), "email")
	}
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(disabled), body{"enabled": true}, nil)
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(unproven), body{"emailVerified": true}, nil)
}
