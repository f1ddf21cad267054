package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"flag"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// another starts one more instance in the same env, with settings of its own.
// It ends with the test, or with what end returns.
func (w *env) another(settings map[string]string) (v *env, end func() error) {
	w.Helper()
	mine := *w
	v = &mine
	v.vars, v.ends = maps.Clone(w.vars), nil
	maps.Copy(v.vars, settings)
	var err error
	if v.url, err = v.start(context.WithoutCancel(w.Context())); err != nil {
		w.Fatal(err)
	}
	end = sync.OnceValue(v.ends[0])
	w.Cleanup(func() {
		if err := end(); err != nil {
			w.Error(err)
		}
	})
	return v, end
}

// idle is a server that is not connected to anything.
func idle(t testing.TB, log *slog.Logger, changes map[string]string) *server {
	t.Helper()
	cfg, err := loadConfig(environment(changes))
	if err != nil {
		t.Fatal(err)
	}
	s, err := newServer(t.Context(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.store.pool.Close)
	return s
}

// Whatever is wrong with a request is a problem whose type can be looked up.
func TestProblems(t *testing.T) {
	w := sharedEnv(t)
	const jsonType, ok = "application/json", `{"token":"unknown"}` // refused as a token, so it was understood
	post := func(contentType, body string) call {
		return call{method: "POST", path: cancelPath, body: body, header: map[string]string{"Content-Type": contentType}}
	}
	type row struct {
		name   string
		call   call
		status int
		slug   string
		allow  string
	}
	rows := []row{
		{"unknown path", call{path: "/api/v1/nothing"}, 404, "not-found", ""},
		{"unknown path", call{method: "POST", path: "/registe", body: "{}"}, 404, "not-found", ""},
		{"unknown method", call{path: registerPath}, 405, "method-not-allowed", "POST"},
		{"unknown method", call{method: "HEAD", path: registerPath}, 405, "", "POST"},
		{"unknown method of an alias", call{method: "PUT", path: "/verify"}, 405, "method-not-allowed", "POST"},
		{"unknown method", call{method: "DELETE", path: "/health"}, 405, "method-not-allowed", "GET, HEAD"},
		{"unknown method of a page", call{method: "PATCH", path: "/account/verify"}, 405, "method-not-allowed", "GET, HEAD, POST"},
		{"no CORS", call{method: "OPTIONS", path: registerPath}, 405, "method-not-allowed", "POST"},
		{"JSON", post(jsonType, ok), 400, "invalid-token", ""},
		{"JSON", post("Application/JSON; charset=utf-8", " \r\n\t"+ok+"\n"), 400, "invalid-token", ""},
		{"largest body", post(jsonType, ok+strings.Repeat(" ", maxBody-len(ok))), 400, "invalid-token", ""},
		{"too large", post(jsonType, ok+strings.Repeat(" ", maxBody-len(ok)+1)), 413, "payload-too-large", ""},
	}
	for _, contentType := range []string{"", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/problem+json", "application/json;;", "*/*"} {
		rows = append(rows, row{"Content-Type " + contentType, post(contentType, ok), 415, "unsupported-media-type", ""})
	}
	for _, body := range []string{"", " ", "{", "null", "[]", `"x"`, "1", "[" + ok + "]", ok + "x", ok + ok, ok + ",", "\ufeff" + ok, `{"token":"` + "\xff" + `"}`,
		"{\"token\":\"a\x00\"}", `{'token':"a"}`, `{token:"a"}`, `{"token":NaN}`, `{"token":"a",}`, `{"token":"\x"}`, strings.Repeat(`{"token":`, 1500),
		strings.Repeat("[", maxBody)} {
		rows = append(rows, row{"body " + body[:min(len(body), 50)], post(jsonType, body), 400, "invalid-request", ""})
	}
	for body, want := range map[string]string{
		`{"TOKEN":"unknown"}`:                               `[{"field":"TOKEN","detail":"is not known"},{"field":"token","detail":"is required"}]`,
		`{"token":"unknown","tOken":"b"}`:                   `[{"field":"tOken","detail":"is not known"}]`,
		`{"token":"unknown","token":"b"}`:                   `[{"field":"token","detail":"is there twice"}]`,
		`{"token":"unknown","tok\u0065n":"b"}`:              `[{"field":"token","detail":"is there twice"}]`,
		`{"token":null}`:                                    `[{"field":"token","detail":"must be a string"}]`,
		`{"token":["unknown"]}`:                             `[{"field":"token","detail":"must be a string"}]`,
		`{"token":1e999}`:                                   `[{"field":"token","detail":"must be a string"}]`,
		`{"token":"\u0000"}`:                                `[{"field":"token","detail":"has a character that is not allowed: U+0000"}]`,
		`{"token":"unknown","a":1,"b":{"c":[]}}`:            `[{"field":"a","detail":"is not known"},{"field":"b","detail":"is not known"}]`,
		`{"token":"t","` + strings.Repeat("x", 51) + `":1}`: `[{"field":"request","detail":"has a field that is not known"}]`,
	} {
		r := post(jsonType, body)
		rows = append(rows, row{"fields of " + body, r, 400, "invalid-request", ""})
		got, _ := json.Marshal(w.do(r).JSON["errors"])
		var g, x any
		if json.Unmarshal(got, &g) != nil || json.Unmarshal([]byte(want), &x) != nil || !cmp.Equal(g, x) {
			t.Errorf("%s: %s, want %s", body, got, want)
		}
	}
	for _, r := range rows {
		w.Log(r.name)
		a := w.do(r.call)
		w.wants(a, r.status, r.slug)
		if a.Header.Get("Allow") != r.allow {
			t.Errorf("Allow: %q", a.Header.Get("Allow"))
		}
	}
	for slug, p := range problems {
		a := w.get("/problems/" + slug)
		if a.Status != 200 || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") || !strings.Contains(string(a.Body), p.Title) {
			t.Errorf("%s does not resolve: %v", p.Type, a)
		}
	}
	if a := w.get("/problems/unheard-of"); a.Status != 404 || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") {
		t.Error(a)
	}
}

func TestRequestID(t *testing.T) {
	w := sharedEnv(t)
	for id, kept := range map[string]bool{"abcd.EF-7_": true, strings.Repeat("x", 64): true, "": false, "abcdefg": false, strings.Repeat("x", 65): false,
		"abc defgh": false, "<script>alert": false, "äöüäöüäöü": false, `"},{"evil":"`: false} {
		for _, path := range []string{"/api/v1/nothing", "/", "/health"} {
			a := w.do(call{path: path, header: map[string]string{"X-Request-Id": id}})
			got := a.Header.Get("X-Request-Id")
			if (got == id) != kept || !requestIDPattern.MatchString(got) || a.Status == 404 && a.text("request_id") != got {
				t.Errorf("%s with %q: %q", path, id, got)
			}
			if err := w.logs.waitFor(5*time.Second, func(text string) bool { return strings.Contains(text, `"request_id":"`+got+`"`) }); err != nil {
				t.Errorf("%s is not in the log: %v", got, err)
			}
		}
	}
}

func TestHeaders(t *testing.T) {
	w := sharedEnv(t)
	const noStore = "no-store"
	for path, cache := range map[string]string{"/": noStore, "/account/register": noStore, "/account/verify?token=x": noStore, registerPath: noStore,
		"/api/v1/nothing": noStore, "/problems/not-found": noStore, "/health": noStore, "/static/style.css": "public, max-age=31536000, immutable",
		"/api-docs/openapi.json": "public, max-age=60", "/swagger-ui": noStore, "//evil.example/x": noStore} {
		h, opener := w.get(path).Header, "same-origin"
		if path == "/swagger-ui" { // it opens the window of a sign-in
			opener = "unsafe-none"
		}
		for name, want := range map[string]string{"Cache-Control": cache, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin",
			"Cross-Origin-Opener-Policy": opener, "Strict-Transport-Security": "", "Access-Control-Allow-Origin": "", "Set-Cookie": "", "Server": ""} {
			if h.Get(name) != want {
				t.Errorf("%s: %s: %q, want %q", path, name, h.Get(name), want)
			}
		}
		policy := h.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'; ") || strings.Contains(policy, "unsafe") || !strings.Contains(policy, "frame-ancestors 'none'") {
			t.Errorf("%s: %s", path, policy)
		}
		if to := h.Get("Location"); strings.HasPrefix(to, "//") || strings.Contains(to, "://") {
			t.Errorf("%s leads to %s", path, to)
		}
	}
	if a := w.do(call{path: "/api-docs/openapi.json", header: map[string]string{"If-None-Match": w.get("/api-docs/openapi.json").Header.Get("ETag")}}); a.Status != 304 {
		t.Errorf("the document with its ETag: %d", a.Status)
	}
	// Swagger UI's own elements are allowed by their hashes, and its files are there.
	ui := w.get("/swagger-ui")
	inline := regexp.MustCompile(`(?s)<(?:script|style)>(.*?)</`).FindAllSubmatch(ui.Body, -1)
	for _, m := range inline {
		sum := sha256.Sum256(m[1])
		if hash := "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(ui.Header.Get("Content-Security-Policy"), hash) {
			t.Errorf("%s is not allowed: %s", hash, m[1])
		}
	}
	files := regexp.MustCompile(`(?:src|href)="([^"]+)"`).FindAllSubmatch(ui.Body, -1)
	for _, m := range files {
		if a := w.get(string(m[1])); a.Status != 200 {
			t.Errorf("%s: %d", m[1], a.Status)
		}
	}
	if ui.Status != 200 || len(inline) < 2 || len(files) < 3 || bytes.Contains(ui.Body, []byte(`="http`)) {
		t.Errorf("%v", ui)
	}
}

func TestCORS(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(map[string]string{"CORS_ALLOWED_ORIGINS": "https://app.example,https://admin.example", "PUBLIC_URL": "https://auth.example"})
	ask := func(method, wanted string) map[string]string {
		return map[string]string{"Access-Control-Request-Method": method, "Access-Control-Request-Headers": wanted}
	}
	for _, c := range []struct {
		name    string
		w       *env
		origin  string
		headers map[string]string // of a preflight
		allowed bool
	}{
		{"preflight", v, "https://app.example", ask("POST", "authorization,content-type"), true},
		{"preflight of the other", v, "https://admin.example", ask("DELETE", "authorization"), true},
		{"preflight of a frontend that traces", v, "https://app.example", ask("POST", "baggage,sentry-trace,traceparent,tracestate,x-request-id"), true},
		{"preflight of a stranger", v, "https://evil.example", ask("POST", "content-type"), false},
		{"preflight of a subdomain", v, "https://x.app.example", ask("POST", "content-type"), false},
		{"preflight without TLS", v, "http://app.example", ask("POST", "content-type"), false},
		{"preflight of null", v, "null", ask("POST", "content-type"), false},
		{"preflight, not configured", w, "https://app.example", ask("POST", "content-type"), false},
		{"request", v, "https://app.example", nil, true},
		{"request of a stranger", v, "https://evil.example", nil, false},
		{"request, not configured", w, "https://app.example", nil, false},
	} {
		r := call{method: "POST", path: cancelPath, json: body{"token": "unknown"}, header: map[string]string{"Origin": c.origin}}
		if c.headers != nil {
			r.method, r.json = "OPTIONS", nil
			maps.Copy(r.header, c.headers)
		}
		a := c.w.do(r)
		want, credentials := "", ""
		if c.allowed {
			want, credentials = c.origin, "true"
		}
		if a.Header.Get("Access-Control-Allow-Origin") != want || a.Header.Get("Access-Control-Allow-Credentials") != credentials {
			t.Errorf("%s: %d %v", c.name, a.Status, a.Header)
		}
		if c.headers == nil {
			c.w.wants(a, 400, "invalid-token") // CORS keeps nobody out, browsers do
			if exposed := a.Header.Get("Access-Control-Expose-Headers"); c.allowed && !strings.Contains(strings.ToLower(exposed), "retry-after") {
				t.Errorf("%s: exposed: %s", c.name, exposed)
			}
		} else if c.allowed != (a.Status/100 == 2) {
			t.Errorf("%s: %v", c.name, a)
		}
	}
	if got := v.get("/").Header.Get("Strict-Transport-Security"); got != "max-age=31536000" {
		t.Errorf("behind https: Strict-Transport-Security: %q", got)
	}
}

var proxies = map[string]string{"TRUSTED_PROXIES": "10.0.0.0/8,2001:db8:ffff::/48,::1/128"}

func TestClientAddress(t *testing.T) {
	s := idle(t, slog.New(slog.DiscardHandler), proxies)
	for _, c := range []struct {
		peer string
		xff  []string
		want string
		net  string // what limits count it as
	}{
		{"198.51.100.1:1234", nil, "198.51.100.1", "198.51.100.1"},
		{"198.51.100.1:1234", []string{"203.0.113.1"}, "198.51.100.1", "198.51.100.1"}, // nobody we trust says so
		{"10.0.0.1:1", []string{"203.0.113.1"}, "203.0.113.1", "203.0.113.1"},
		{"[::ffff:10.0.0.1]:1", []string{"203.0.113.1"}, "203.0.113.1", "203.0.113.1"},
		{"10.0.0.1:1", []string{"192.0.2.9, 203.0.113.1"}, "203.0.113.1", "203.0.113.1"},
		{"10.0.0.1:1", []string{"192.0.2.9", "203.0.113.1, 10.0.0.2", "10.0.0.3"}, "203.0.113.1", "203.0.113.1"}, // several lines, several proxies
		{"10.0.0.1:1", nil, "10.0.0.1", "10.0.0.1"},
		{"10.0.0.1:1", []string{"10.0.0.2"}, "10.0.0.2", "10.0.0.2"},
		{"10.0.0.1:1", []string{"unknown"}, "10.0.0.1", "10.0.0.1"},
		{"10.0.0.1:1", []string{"192.0.2.9, unknown, 10.0.0.2"}, "10.0.0.2", "10.0.0.2"},
		{"10.0.0.1:1", []string{"192.0.2.9,"}, "10.0.0.1", "10.0.0.1"},
		{"10.0.0.1:1", []string{" 203.0.113.1:443 "}, "203.0.113.1", "203.0.113.1"},
		{"10.0.0.1:1", []string{"[2001:db8:1:2:3::4]:443"}, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"},
		{"[2001:db8:ffff::1]:1", []string{"2001:db8:1:2:3::4"}, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"},
		{"10.0.0.1:1", []string{"::ffff:203.0.113.1"}, "203.0.113.1", "203.0.113.1"},
		{"[fe80::1%eth0]:1", nil, "fe80::1", "fe80::/64"},
		{"[::1]:1", []string{"fe80::1%evil"}, "fe80::1", "fe80::/64"},
	} {
		addr := s.clientAddress(&http.Request{RemoteAddr: c.peer, Header: http.Header{"X-Forwarded-For": c.xff}})
		if addr.String() != c.want || network(addr) != c.net {
			t.Errorf("%s %q: %s, %s; want %s, %s", c.peer, c.xff, addr, network(addr), c.want, c.net)
		}
	}
	// The same through the running service, which trusts its neighbour or nobody.
	w := sharedEnv(t)
	v, _ := w.another(map[string]string{"TRUSTED_PROXIES": ""})
	for want, instance := range map[string]*env{"198.51.100.7": w, "127.0.0.1": v} {
		a := instance.do(call{method: "POST", path: cancelPath, json: body{"token": "unknown"}, from: "203.0.113.9, 198.51.100.7"})
		if got := w.value(`select ip_address from audit_log where request_id = $1`, a.text("request_id")); got != want {
			t.Errorf("recorded %s, want %s", got, want)
		}
	}
}

func FuzzClientAddress(f *testing.F) {
	s := idle(f, slog.New(slog.DiscardHandler), proxies)
	for _, xff := range []string{"203.0.113.1", "a, 10.0.0.1", "[::1]:80", "::ffff:10.0.0.1,1.2.3.4", ",,", "fe80::1%x"} {
		f.Add("10.0.0.1:1", xff)
		f.Add("203.0.113.5:1", xff)
	}
	f.Fuzz(func(t *testing.T, peer, xff string) {
		r := &http.Request{RemoteAddr: peer, Header: http.Header{"X-Forwarded-For": {xff}}}
		got := s.clientAddress(r)
		peerAddr, err := netip.ParseAddrPort(peer)
		if err != nil {
			return
		}
		from := peerAddr.Addr().Unmap().WithZone("")
		switch {
		case !got.IsValid() || got.Zone() != "" || got.Is4In6():
			t.Errorf("%q %q: %v", peer, xff, got)
		case !s.trusts(from) && got != from:
			t.Errorf("%q is believed: %v", peer, got)
		case got != from:
			// What the client has put before the address found changes nothing.
			r.Header["X-Forwarded-For"] = []string{"192.0.2.66, junk, " + xff}
			if again := s.clientAddress(r); again != got && !s.trusts(got) {
				t.Errorf("%q %q: %v, and with more to its left %v", peer, xff, got, again)
			}
		}
	})
}

// Every budget is exact: from a /64 as many requests as it says, over all aliases,
// however many come at once.
func TestBudgets(t *testing.T) {
	w := sharedEnv(t)
	w.quick = true
	routes := idle(t, slog.New(slog.DiscardHandler), nil).routes()
	for _, rt := range routes {
		if rt.Limit.N == 0 {
			if method, _ := anyPath(rt); method != "GET" {
				t.Errorf("%s has no budget", rt.Pattern)
			}
			continue
		}
		method, path := anyPath(rt)
		paths := append(strings.Fields(rt.Aliases), path)
		prefix := strings.TrimSuffix(newAddress(), ":1")
		var refused atomic.Int64
		var all sync.WaitGroup
		const more = 7
		for worker := range 8 {
			all.Go(func() {
				for i := worker; i < rt.Limit.N+more; i += 8 {
					r := call{method: method, path: paths[i%len(paths)], from: prefix + ":" + strconv.FormatInt(int64(i+1), 16),
						header: map[string]string{"Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}}
					if rt.status == 0 {
						r.form = map[string][]string{"x": {"y"}}
						delete(r.header, "Content-Type")
					}
					switch a, err := w.send(w.url, r); {
					case err != nil:
						t.Error(err)
					case a.Status == 429:
						refused.Add(1)
						if wait, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || wait < 1 || wait > 61 { // its clock was read before the window began
							t.Errorf("%s: Retry-After: %v", rt.Pattern, a.Header)
						}
					case a.Status == 200 || a.Status >= 500:
						t.Errorf("%s: %v", rt.Pattern, a)
					}
				}
			})
		}
		all.Wait()
		if refused.Load() != more {
			t.Errorf("%s: %d refused of %d, want %d", rt.Pattern, refused.Load(), rt.Limit.N+more, more)
		}
	}
}

func TestHealth(t *testing.T) {
	w := sharedEnv(t)
	kc, err := newKeycloakProxy(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	pg, err := newPostgresProxy(w.pg.target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kc.close(); pg.close() })
	v, _ := w.another(map[string]string{"KEYCLOAK_URL": kc.url(), "DATABASE_URL": strings.Replace(w.vars["DATABASE_URL"], w.pg.addr, pg.addr, 1), "JOB_INTERVAL": "0s"})
	status := "/api/v1/registrations/" + w.register(newEmail()).text("registration_id")
	healthy := func(word, database, keycloak string, code, ready int) {
		t.Helper()
		var a answer
		w.eventually("health "+word, time.Minute, func() bool { a = v.get("/health"); return a.text("status") == word })
		checks, _ := a.JSON["checks"].(body)
		for name, want := range map[string]string{"database": database, "keycloak": keycloak} {
			check, _ := checks[name].(body)
			if ms, ok := check["latency_ms"].(float64); check["status"] != want || !ok || ms < 0 {
				t.Errorf("%s: %v", name, a)
			}
		}
		if a.Status != code || a.text("version") == "" {
			t.Error(a)
		}
		if r := v.management404("/readyz"); r.Status != ready {
			t.Errorf("readyz: %v", r)
		}
		if l := v.management404("/livez"); l.Status != 200 {
			t.Errorf("livez: %v", l)
		}
	}
	unavailable := func(list ...attempt) {
		t.Helper()
		v.try(list...)
		if a := v.form("/account/register", map[string]string{"email": newEmail()}); a.Status != 503 || a.Header.Get("Retry-After") == "" ||
			!strings.Contains(string(a.Body), problemUnavailable.Title) {
			t.Error(a)
		}
	}
	healthy("ok", "ok", "ok", 200, 200)
	kc.close()
	healthy("degraded", "ok", "down", 200, 200)
	unavailable(attempt{"register", registerPath, body{"email": newEmail()}, 503, "unavailable"},
		attempt{"login", loginPath, body{"email": newEmail(), "password": password}, 503, "unavailable"})
	v.wants(v.get(status), 200, "")
	if err := kc.open(); err != nil {
		t.Fatal(err)
	}
	pg.close()
	healthy("down", "down", "ok", 503, 200)
	unavailable(attempt{"register", registerPath, body{"email": newEmail()}, 503, "unavailable"},
		attempt{"login", loginPath, body{"email": newEmail(), "password": password}, 503, "unavailable"},
		attempt{"verify", verifyPath, body{"token": "unknown"}, 503, "unavailable"})
	v.wants(v.get(status), 503, "unavailable")
	if a := v.get("/"); a.Status != 200 {
		t.Error(a)
	}
	if err := pg.open(); err != nil {
		t.Fatal(err)
	}
	healthy("ok", "ok", "ok", 200, 200)
}

// management404 asks the management listener; the public one must not know the path.
func (w *env) management404(path string) answer {
	w.Helper()
	w.wants(w.get(path), 404, "not-found")
	a, err := w.send("http://"+w.management, call{path: path})
	if err != nil {
		w.Fatal(err)
	}
	return a
}

func TestManagement(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	w.register(email)
	w.wants(w.get("/api/v1/nothing-"+email), 404, "not-found")
	for path, want := range map[string]string{"/livez": "ok", "/readyz": "ok", "/debug/pprof/": "goroutine", "/debug/pprof/goroutine?debug=1": "net/http",
		"/metrics": "go_goroutines "} {
		if a := w.management404(path); a.Status != 200 || !strings.Contains(string(a.Body), want) {
			t.Errorf("%s: %v", path, a)
		}
	}
	metrics := string(w.management404("/metrics").Body)
	for _, want := range []string{`auth_http_request_duration_seconds_count{method="POST",route="/api/v1/register",status="2xx"}`,
		`auth_http_request_duration_seconds_count{method="GET",route="none",status="4xx"}`, `auth_keycloak_call_duration_seconds_count{operation="create_user",outcome="ok"}`,
		`auth_tasks_total{kind="sweep",outcome="ok"}`, "auth_task_oldest_due_seconds ", `auth_tasks_due{kind="REG"}`, "process_resident_memory_bytes"} {
		if !strings.Contains(metrics, "\n"+want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	promtool(t, metrics, "check", "metrics")
	peers := map[string]int{"127.0.0.1:1": 200, "[::1]:1": 200, "[::ffff:127.0.0.1]:1": 200, "192.0.2.1:1": 404, "[2001:db8::1]:1": 404, "": 404}
	for peer, status := range peers { // profiles are for this machine only
		answer, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/debug/pprof/cmdline", nil)
		r.RemoteAddr = peer
		idle(t, slog.New(slog.DiscardHandler), nil).managementHandler().ServeHTTP(answer, r)
		if answer.Code != status {
			t.Errorf("pprof for %s: %d", peer, answer.Code)
		}
	}
	for secret := range strings.FieldsFuncSeq(w.secrets.String()+email+"\nREG-\nUSR-", func(r rune) bool { return r == '\n' }) {
		if strings.Contains(metrics, secret) {
			t.Errorf("/metrics holds %q", secret)
		}
	}
}

func TestPanics(t *testing.T) {
	var log bytes.Buffer
	s := idle(t, slog.New(logHandler{slog.NewJSONHandler(&log, nil)}), nil)
	serve := func(h http.HandlerFunc) (rec *httptest.ResponseRecorder, panicked any) {
		defer func() { panicked = recover() }()
		rec = httptest.NewRecorder()
		s.withRequest(sentOrNewID, s.withLog(h)).ServeHTTP(rec, httptest.NewRequest("GET", "/x?token=s3cret", nil))
		return rec, nil
	}
	rec, p := serve(func(http.ResponseWriter, *http.Request) { panic("boom") })
	id := rec.Header().Get("X-Request-Id")
	if p != nil || rec.Code != 500 || rec.Header().Get("Content-Type") != "application/problem+json" || strings.Contains(rec.Body.String(), "boom") ||
		!strings.Contains(rec.Body.String(), `"type":"/problems/internal"`) || !strings.Contains(rec.Body.String(), id) {
		t.Errorf("%v %d %v %s", p, rec.Code, rec.Header(), rec.Body)
	}
	if text := log.String(); !strings.Contains(text, "boom") || !strings.Contains(text, "http_test.go") || !strings.Contains(text, id) || strings.Contains(text, "s3cret") {
		t.Errorf("the log: %s", text)
	}
	if rec, p = serve(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("half")); panic("boom") }); p != nil || rec.Body.String() != "half" {
		t.Errorf("%v %s", p, rec.Body)
	}
	if _, p = serve(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }); p != http.ErrAbortHandler {
		t.Errorf("an aborted answer: %v", p)
	}
}

// The document is what clients generate their code from: it changes knowingly.
// go test -run OpenAPI -update
func TestOpenAPI(t *testing.T) {
	s := idle(t, slog.New(slog.DiscardHandler), map[string]string{"PUBLIC_URL": "https://auth.example.org",
		"KEYCLOAK_PUBLIC_URL": "https://sso.example.org"})
	routes := s.routes()
	got, err := document(s.cfg, routes)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/openapi.json"
	if *update {
		if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if diff := cmp.Diff(strings.Split(string(bytes.TrimSpace(want)), "\n"), strings.Split(string(got), "\n")); err != nil || diff != "" {
		t.Errorf("%s (-golden +now): %v\n%s", golden, err, diff)
	}
	doc, err := openapi3.NewLoader().LoadFromData(got)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Errorf("OpenAPI %s", doc.OpenAPI)
	}
	documented := 0
	for _, item := range doc.Paths.Map() {
		documented += len(item.Operations())
	}
	names := map[string]bool{}
	for _, rt := range routes {
		if rt.in == nil && rt.Summary == "" {
			continue // a page
		}
		documented--
		method, path, _ := strings.Cut(rt.Pattern, " ")
		operation := doc.Paths.Find(path).GetOperation(method)
		if operation == nil || operation.Summary == "" || operation.OperationID != rt.Name || names[rt.Name] || len(operation.Tags) != 1 {
			t.Errorf("%s is not documented: %+v", rt.Pattern, operation)
			continue
		}
		names[rt.Name] = true
		for _, alias := range strings.Fields(rt.Aliases) {
			if !strings.Contains(operation.Description, alias) {
				t.Errorf("%s does not mention %s", rt.Pattern, alias)
			}
		}
		for _, p := range rt.problems {
			if r := operation.Responses.Status(p.Status); r == nil || !strings.Contains(*r.Value.Description, p.slug()) {
				t.Errorf("%s does not mention %s", rt.Pattern, p.slug())
			}
		}
		if operation.RequestBody == nil {
			continue
		}
		examples := body{}
		for name, property := range operation.RequestBody.Value.Content.Get("application/json").Schema.Value.Properties {
			if examples[name] = property.Value.Example; property.Value.Example == nil && len(property.Value.Examples) > 0 {
				examples[name] = property.Value.Examples[0]
			}
			if examples[name] == nil && name != "key" {
				t.Errorf("%s: %s has no example", rt.Pattern, name)
			}
		}
		in := reflect.New(reflect.TypeOf(rt.in))
		if alternatives := inputOf(in.Interface()).either; alternatives != nil {
			for _, name := range slices.Concat(alternatives[1:]...) { // the first one is enough
				delete(examples, name)
			}
		}
		encoded, _ := json.Marshal(examples)
		if err := readJSON(encoded, in.Interface()); err != nil {
			t.Errorf("%s refuses its own example %s: %v", rt.Pattern, encoded, asProblem(err).Errors)
		}
	}
	if documented != 2 { // and the two pages of the code flow
		t.Errorf("%d operations are in the document and not in the table", documented)
	}
}

// anyPath is a request that a route answers, with ids that nothing has.
func anyPath(rt route) (method, path string) {
	method, path, found := strings.Cut(rt.Pattern, " ")
	if !found { // any method
		method, path = "GET", rt.Pattern
	}
	return method, strings.NewReplacer("{$}", "", "{slug}", "not-found", "{name}", "style.css", "{path...}", "any/path", "{registration_id}", string(newRegistrationID()),
		"{session_id}", string(newSessionID())).Replace(path)
}

// Every route and alias of the table is there for its method, and for HEAD where it is a GET.
func TestRoutes(t *testing.T) {
	w := sharedEnv(t)
	for _, rt := range idle(t, slog.New(slog.DiscardHandler), nil).routes() {
		method, path := anyPath(rt)
		for _, path := range append(strings.Fields(rt.Aliases), path) {
			for _, method := range []string{method, strings.Replace(method, "GET", "HEAD", 1)} {
				if a := w.do(call{method: method, path: path}); a.Status == 405 || a.slug() == "not-found" || a.Status >= 500 {
					t.Errorf("%s %s: %v", method, path, a)
				}
			}
		}
	}
}

// TestSubcommands runs the subcommands as an operator does.
func TestSubcommands(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // jobs are run by the command alone
	command := func(args ...string) (string, error) {
		var out bytes.Buffer
		env := func(name string) string {
			if name == "MANAGEMENT_ADDR" {
				return w.management
			}
			return w.vars[name]
		}
		err := run(context.Background(), args, env, &out, io.MultiWriter(&out, w.logs))
		return out.String(), err
	}
	if out, err := command("healthcheck"); err != nil {
		t.Errorf("healthcheck: %v %s", err, out)
	}
	if out, err := command("version"); err != nil || strings.TrimSpace(out) == "" {
		t.Errorf("version: %v %q", err, out)
	}
	if out, err := command("nonsense"); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("an unknown command: %v %s", err, out)
	}
	email := newEmail()
	w.mail.Close()
	a := w.register(email)
	if a.text("verification_email") != "queued" {
		t.Errorf("without SMTP: %v", a)
	}
	if err := w.mail.Restart(); err != nil {
		t.Fatal(err)
	}
	w.tasksDue()
	if out, err := command("jobs"); err != nil {
		t.Errorf("jobs: %v %s", err, out)
	}
	w.readMail(email, 1)
}

// A connection that is reset in the middle of a statement is an outage, not a fault of ours.
func TestResetByDatabase(t *testing.T) {
	w := sharedEnv(t)
	proxy, err := newPostgresProxy(w.pg.target)
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.close()
	address, err := url.Parse(w.vars["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	address.Host = proxy.addr
	st, err := openStore(t.Context(), secret(address.String()), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer st.pool.Close()
	answer := make(chan error, 1)
	go func() {
		_, err := one[struct{ Slept string }](t.Context(), st.pool, `select pg_sleep(4)::text`)
		answer <- err
	}()
	w.eventually("it runs", time.Minute, func() bool {
		return w.value(`select count(*)::text from pg_stat_activity where query like 'select pg_sleep(4)%'`) == "1"
	})
	proxy.mu.Lock()
	for _, conn := range proxy.conns {
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	proxy.mu.Unlock()
	if err := <-answer; asProblem(err).Status != 503 {
		t.Errorf("%v is answered with %d", err, asProblem(err).Status)
	}
}

// A pool whose connections are all in use is an outage to those who wait for one,
// not a defect.
func TestBusyDatabase(t *testing.T) {
	w := sharedEnv(t)
	st, err := openStore(t.Context(), secret(w.vars["DATABASE_URL"]+"&pool_max_conns=1"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer st.pool.Close()
	held, err := st.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, one := st.registration(ctx, newRegistrationID())
	many := st.hit(ctx, time.Now(), onLogin.of("ada"))
	tx := st.purge(ctx, time.Now())
	for _, err := range []error{one, many, tx} {
		if p := asProblem(err); p.Status != 503 || p.Wait == 0 {
			t.Errorf("%v is answered with %d", err, p.Status)
		}
	}
}
