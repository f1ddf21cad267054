package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"auth-service/templates"

	"github.com/google/go-cmp/cmp"
)

// What holds for every request, whatever it asks for.

var update = flag.Bool("update", false, "write the golden files anew")

// TestErrors sends what must be refused, and looks at the whole problem.
func TestErrors(t *testing.T) {
	w := inSharedWorld(t)
	const secret = "very-secret-value"
	jsonBody := map[string]string{"Content-Type": "application/json"}
	long := `{"email":"` + strings.Repeat("a", maxBody) + `"}`
	for _, test := range []struct {
		name   string
		call   call
		status int
		slug   string
		fields string // the wrong fields, in order
	}{
		{"unknown path", call{path: "/nope"}, 404, "not-found", ""},
		{"unknown path of the API", call{method: "POST", path: "/api/v1/nope"}, 404, "not-found", ""},
		{"method", call{method: "DELETE", path: "/api/v1/register"}, 405, "method-not-allowed", ""},
		{"method of a page", call{method: "PUT", path: "/account/verify"}, 405, "method-not-allowed", ""},
		{"too large", call{method: "POST", path: "/api/v1/register", body: long, header: jsonBody}, 413, "payload-too-large", ""},
		{"no content type", call{method: "POST", path: "/api/v1/register", body: "{}"}, 415, "unsupported-media-type", ""},
		{"form", call{method: "POST", path: "/api/v1/register", form: url.Values{"email": {"a@b.test"}}}, 415, "unsupported-media-type", ""},
		{"almost JSON", call{method: "POST", path: "/api/v1/register", body: "{}", header: map[string]string{"Content-Type": "application/jsonx"}}, 415, "unsupported-media-type", ""},
		{"charset", call{method: "POST", path: "/api/v1/register", body: "{}", header: map[string]string{"Content-Type": "application/json; charset=utf-8"}}, 400, "invalid-request", "email"},
		{"empty", call{method: "POST", path: "/api/v1/register", header: jsonBody}, 400, "invalid-request", ""},
		{"malformed", call{method: "POST", path: "/api/v1/register", body: `{"email":`, header: jsonBody}, 400, "invalid-request", ""},
		{"an array", call{method: "POST", path: "/api/v1/register", body: `[]`, header: jsonBody}, 400, "invalid-request", ""},
		{"null", call{method: "POST", path: "/api/v1/register", body: `null`, header: jsonBody}, 400, "invalid-request", ""},
		{"a second value", call{method: "POST", path: "/api/v1/register", body: `{"email":"a@b.test"} {}`, header: jsonBody}, 400, "invalid-request", ""},
		{"byte order mark", call{method: "POST", path: "/api/v1/register", body: "\ufeff{}", header: jsonBody}, 400, "invalid-request", ""},
		{"invalid UTF-8", call{method: "POST", path: "/api/v1/register", body: "{\"email\":\"\xff@b.test\"}", header: jsonBody}, 400, "invalid-request", ""},
		{"all at once", call{method: "POST", path: "/api/v1/register", json: map[string]any{"email": secret, "username": 7, "first_name": strings.Repeat("x", 101),
			"phone": secret, "locale": "???", "unknown": secret}}, 400, "invalid-request", "email first_name locale phone unknown username"},
		{"other case", call{method: "POST", path: "/api/v1/register", json: map[string]any{"EMAIL": "a@b.test"}}, 400, "invalid-request", "EMAIL email"},
		{"twice", call{method: "POST", path: "/api/v1/register", body: `{"email":"a@b.test","email":"c@d.test"}`, header: jsonBody}, 400, "invalid-request", "email"},
		{"NUL", call{method: "POST", path: "/api/v1/register", json: map[string]any{"email": "a@b.test", "first_name": "a\x00b"}}, 400, "invalid-request", "first_name"},
		{"neither", call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{}}, 400, "invalid-request", "token"},
		{"both", call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"token": "x", "email": "a@b.test", "code": "123456"}}, 400, "invalid-request", "token"},
		{"bad key", call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"token": "x", "key": "a&b"}}, 400, "invalid-request", "key"},
		{"bad code", call{method: "POST", path: "/verify", json: map[string]any{"email": "a@b.test", "code": "12"}}, 400, "invalid-request", "code"},
		{"bad id", call{method: "POST", path: "/verify/resend", json: map[string]any{"registration_id": "x"}}, 400, "invalid-request", "registration_id"},
		{"bad id in the path", call{path: "/api/v1/registrations/x"}, 404, "not-found", ""},
		{"no password", call{method: "POST", path: "/auth/login", json: map[string]any{"email": "a@b.test"}}, 400, "invalid-request", "password"},
		{"no name", call{method: "POST", path: "/auth/login", json: map[string]any{"password": "x"}}, 400, "invalid-request", "username"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := *w
			w.TB = t
			a := w.do(test.call)
			w.wants(a, test.status, test.slug)
			var fields []string
			list, _ := a.JSON["errors"].([]any)
			for _, e := range list {
				fields = append(fields, e.(map[string]any)["field"].(string))
			}
			if got := strings.Join(fields, " "); sorted(got) != sorted(test.fields) {
				t.Errorf("wrong fields %q, want %q: %s", got, test.fields, a.Body)
			}
			if bytes.Contains(a.Body, []byte(secret)) {
				t.Errorf("the answer quotes what was sent: %s", a.Body)
			}
			if test.status == 405 && a.Header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if page := w.get(a.text("type")); page.Status != 200 || !strings.HasPrefix(page.Header.Get("Content-Type"), "text/html") {
				t.Errorf("%s does not resolve: %d", a.text("type"), page.Status)
			}
		})
	}
}

func sorted(words string) string {
	list := strings.Fields(words)
	for i := range list { // a handful
		for j := range i {
			if list[i] < list[j] {
				list[i], list[j] = list[j], list[i]
			}
		}
	}
	return strings.Join(list, " ")
}

func TestEveryProblemHasAPage(t *testing.T) {
	w := inSharedWorld(t)
	for slug, p := range problems {
		a := w.get("/problems/" + slug)
		if a.Status != 200 || !bytes.Contains(a.Body, []byte(p.Title)) {
			t.Errorf("%s: %v", slug, a.Status)
		}
	}
	if a := w.get("/problems/nope"); a.Status != 404 {
		t.Errorf("an unknown problem: %d", a.Status)
	}
}

func TestHeaders(t *testing.T) {
	w := inSharedWorld(t)
	for path, want := range map[string]map[string]string{
		"/account/register":        {"Cache-Control": "no-store", "Content-Security-Policy": templates.Policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"},
		"/api/v1/register":         {"Cache-Control": "no-store", "X-Frame-Options": "DENY"},
		"/static/style.css":        {"Cache-Control": "public, max-age=31536000, immutable", "Content-Type": "text/css; charset=utf-8"},
		"/api-docs/openapi.json":   {"Content-Type": "application/json"},
		"/account/verify?token=no": {"Cache-Control": "no-store", "Vary": "Accept-Language"},
	} {
		a := w.get(path)
		for name, value := range want {
			if got := a.Header.Get(name); got != value {
				t.Errorf("%s: %s is %q, want %q", path, name, got, value)
			}
		}
	}
	policy := w.get("/swagger-ui").Header.Get("Content-Security-Policy")
	if strings.Contains(policy, "unsafe") || !strings.Contains(policy, "'sha256-") {
		t.Errorf("the policy of Swagger UI is %q", policy)
	}
	for sent, kept := range map[string]bool{"0123456789-abc.DEF_": true, "short": false, "with blank in it": false, strings.Repeat("x", 65): false} {
		a := w.do(call{path: "/health", header: map[string]string{"X-Request-Id": sent}})
		if got := a.Header.Get("X-Request-Id"); (got == sent) != kept || got == "" {
			t.Errorf("request id %q became %q", sent, got)
		}
	}
	if a := w.do(call{path: "/api-docs/openapi.json", header: map[string]string{"If-None-Match": w.get("/api-docs/openapi.json").Header.Get("ETag")}}); a.Status != 304 {
		t.Errorf("the document with its ETag: %d", a.Status)
	}
}

func TestCORS(t *testing.T) {
	const app = "https://app.example.test"
	w := newWorld(t, map[string]string{"CORS_ALLOWED_ORIGINS": app})
	preflight := func(w *world, origin string) string {
		return w.do(call{method: "OPTIONS", path: "/api/v1/register", header: map[string]string{"Origin": origin,
			"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}}).Header.Get("Access-Control-Allow-Origin")
	}
	if got := preflight(w, app); got != app {
		t.Errorf("the configured origin gets %q", got)
	}
	if got := preflight(w, "https://evil.example.test"); got != "" {
		t.Errorf("another origin gets %q", got)
	}
	a := w.do(call{method: "POST", path: "/api/v1/register", json: map[string]any{}, header: map[string]string{"Origin": app}})
	if a.Header.Get("Access-Control-Allow-Origin") != app || a.Header.Get("Access-Control-Allow-Credentials") != "true" {
		t.Errorf("an error can't be read by the frontend: %v", a.Header)
	}
	if got := preflight(inSharedWorld(t), app); got != "" {
		t.Errorf("without configuration an origin gets %q", got)
	}
}

// TestOpenAPI compares the document with its golden file, and with the routes.
func TestOpenAPI(t *testing.T) {
	w := inSharedWorld(t)
	got := w.get("/api-docs/openapi.json").Body
	golden := filepath.Join("testdata", "openapi.json")
	if *update {
		if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(strings.TrimSpace(string(want)), "\n"), strings.Split(string(got), "\n")); diff != "" {
		t.Errorf("the document has changed; if that is right: go test -run TestOpenAPI -update .\n%s", diff)
	}
	var doc struct {
		Paths map[string]map[string]struct {
			OperationID string `json:"operationId"`
			Summary     string
			Tags        []string
			Responses   map[string]any
		}
		Components struct {
			Schemas map[string]struct {
				Required   []string
				Properties map[string]struct{ Examples []any }
			}
		}
	}
	if err := json.Unmarshal(got, &doc); err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, rt := range new(server).routes() {
		method, path, _ := strings.Cut(rt.Pattern, " ")
		op, ok := doc.Paths[path][strings.ToLower(method)]
		if isAPI := strings.HasPrefix(path, "/api/") || path == "/health"; isAPI != ok {
			t.Errorf("%s: documented is %v", rt.Pattern, ok)
		} else if ok && (op.OperationID == "" || ids[op.OperationID] || op.Summary == "" || len(op.Tags) == 0 || len(op.Responses) < 2) {
			t.Errorf("%s is described as %+v", rt.Pattern, op)
		}
		ids[op.OperationID] = true
	}
	// What the document shows as an example is a request that passes.
	for schema, in := range map[string]any{"RegisterIn": new(registerIn), "ResendIn": new(resendIn), "CancelIn": new(cancelIn), "LoginIn": new(loginIn)} {
		body := map[string]any{}
		for name, p := range doc.Components.Schemas[schema].Properties {
			if len(p.Examples) > 0 {
				body[name] = p.Examples[0]
			}
		}
		encoded, _ := json.Marshal(body)
		wrong, err := decodeJSON(encoded, in)
		if wrong = append(wrong, checkFields(in, wrong)...); err != nil || len(wrong) > 0 || len(body) == 0 {
			t.Errorf("the example of %s, %s: %v %v", schema, encoded, wrong, err)
		}
	}
}

// TestHealth follows /health and the management listener through the absence of
// each store.
func TestHealth(t *testing.T) {
	w := newWorld(t, nil)
	manage := func(path string) (int, string) {
		resp, err := client.Get("http://" + w.management + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	becomes := func(status int, word string, ready int) {
		t.Helper()
		w.eventually("/health says "+word, 10*time.Second, func() bool {
			a := w.get("/health")
			code, _ := manage("/readyz")
			return a.Status == status && a.text("status") == word && code == ready
		})
		if code, _ := manage("/livez"); code != 200 {
			t.Errorf("/livez is %d", code)
		}
	}
	becomes(200, "ok", 200)
	w.kc.close()
	becomes(200, "degraded", 200)
	w.pg.close()
	becomes(503, "down", 503)
	if err := w.kc.open(); err != nil {
		t.Fatal(err)
	}
	if err := w.pg.open(); err != nil {
		t.Fatal(err)
	}
	becomes(200, "ok", 200)
	w.account(newEmail())
	code, text := manage("/metrics")
	for _, want := range []string{`http_request_duration_seconds_count{method="POST",route="POST /api/v1/register",status="2xx"} 1`,
		`keycloak_call_duration_seconds_count{operation="create_user",outcome="ok"} 1`, `verification_mails_total{outcome="sent"} 1`,
		`job_runs_total{job="repair",outcome="unavailable"}`, `problems_total`, "go_goroutines"} {
		if code != 200 || want != "problems_total" && !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	for secret := range strings.FieldsFuncSeq(w.secrets.String(), func(r rune) bool { return r == '\n' }) {
		if strings.Contains(text, secret) {
			t.Errorf("metrics hold %q", secret)
		}
	}
	if code, _ := manage("/debug/pprof/goroutine?debug=1"); code != 200 {
		t.Errorf("pprof is %d", code)
	}
}

func TestAddressLimit(t *testing.T) {
	w := inSharedWorld(t)
	from := newAddress()
	for i := range onResend.N + 1 {
		a := w.do(call{method: "POST", path: "/verify/resend", json: map[string]any{"email": newEmail()},
			from: strings.TrimSuffix(from, "1") + fmt.Sprintf("%x", i+1)}) // a /64 is one client
		if i < onResend.N {
			w.wants(a, 404, "registration-not-found")
		} else {
			w.wants(a, 429, "too-many-requests")
		}
	}
	w.wants(w.do(call{method: "POST", path: "/verify/resend", json: map[string]any{"email": newEmail()}}), 404, "registration-not-found")
}

func TestClientAddress(t *testing.T) {
	s := &server{cfg: config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}}}
	for _, test := range []struct {
		remote, forwarded, want string
	}{
		{"192.0.2.1:1", "", "192.0.2.1"},
		{"192.0.2.1:1", "198.51.100.1", "192.0.2.1"}, // not trusted
		{"10.0.0.1:1", "198.51.100.1", "198.51.100.1"},
		{"10.0.0.1:1", "203.0.113.9, 198.51.100.1", "198.51.100.1"}, // what the client sent is to the left
		{"10.0.0.1:1", "198.51.100.1, 10.0.0.2", "198.51.100.1"},
		{"10.0.0.1:1", "10.0.0.3, 10.0.0.2", "10.0.0.3"},
		{"10.0.0.1:1", "unknown", "10.0.0.1"},
		{"10.0.0.1:1", "198.51.100.1:4711", "198.51.100.1"},
		{"[::1]:1", "[2001:db8::1]:4711", "2001:db8::1"},
		{"[::1]:1", "2001:db8::1", "2001:db8::1"},
		{"[::ffff:10.0.0.1]:1", "198.51.100.1", "198.51.100.1"},
		{"10.0.0.1:1", "", "10.0.0.1"},
	} {
		r := &http.Request{RemoteAddr: test.remote, Header: http.Header{}}
		if test.forwarded != "" {
			r.Header.Set("X-Forwarded-For", test.forwarded)
		}
		if got := s.clientAddress(r).String(); got != test.want {
			t.Errorf("%s, %q: %s, want %s", test.remote, test.forwarded, got, test.want)
		}
	}
}

func FuzzClientAddress(f *testing.F) {
	for _, seed := range []string{"", "198.51.100.1", "a, b, 10.0.0.1", "[::1]:1,fe80::1%eth0", ",,,"} {
		f.Add(seed)
	}
	s := &server{cfg: config{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	f.Fuzz(func(t *testing.T, forwarded string) {
		untrusted := s.clientAddress(&http.Request{RemoteAddr: "192.0.2.1:1", Header: http.Header{"X-Forwarded-For": {forwarded}}})
		trusted := s.clientAddress(&http.Request{RemoteAddr: "10.0.0.1:1", Header: http.Header{"X-Forwarded-For": {forwarded}}})
		if untrusted.String() != "192.0.2.1" || !trusted.IsValid() || network(trusted) == "" {
			t.Errorf("%q: %v, %v", forwarded, untrusted, trusted)
		}
	})
}

func FuzzDecodeJSON(f *testing.F) {
	for _, seed := range []string{`{"email":"a@b.test"}`, `{"EMAIL":1,"email":null}`, `{}{}`, `[1]`, "{\"email\":\"\u0000\"}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var in registerIn
		wrong, err := decodeJSON(body, &in)
		if err != nil || len(append(wrong, checkFields(&in, wrong)...)) > 0 {
			return
		}
		// What passes is an object with nothing but our fields, and an address that mail can be sent to.
		var object map[string]json.RawMessage
		if json.Unmarshal(body, &object) != nil || !validEmail(in.Email) || strings.ContainsAny(in.Email, " \r\n,;<>") {
			t.Errorf("%q passes as %+v", body, in)
		}
	})
}

func TestValidEmail(t *testing.T) {
	for email, want := range map[string]bool{
		"ada@example.com": true, "o'neil+tag@sub.example.co": true, "a.b@exämple.test": true,
		"": false, "ada": false, "ada@example": false, " ada@example.com": false, "ada@example.com ": false, "Ada <ada@example.com>": false,
		`"a b"@example.com`: false, "a@[127.0.0.1]": false, "ä@example.com": false, "a@b@example.com": false, "a@example.com.": false,
		"a@example.com\r\nBcc: x@example.com": false, strings.Repeat("a", 65) + "@example.com": false,
	} {
		if got := validEmail(email); got != want {
			t.Errorf("%q: %v", email, got)
		}
	}
}

// TestPanic: a defect in a handler is a 500 like any other, and is on record.
func TestPanic(t *testing.T) {
	var logs bytes.Buffer
	s := &server{log: slog.New(logHandler{slog.NewJSONHandler(&logs, nil)}), metrics: newMetrics()}
	h := withRequestID(s.withLog(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("a defect") })))
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
	if rec.Code != 500 || !strings.Contains(rec.Body.String(), "/problems/internal") || strings.Contains(rec.Body.String(), "defect") {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
	if id := rec.Header().Get("X-Request-Id"); !strings.Contains(logs.String(), "a defect") || !strings.Contains(logs.String(), id) {
		t.Errorf("the log does not say what happened: %s", &logs)
	}
}

// TestTLS serves HTTPS when a certificate is configured.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	w := newWorld(t, map[string]string{"TLS_CERT_FILE": write("cert.pem", "CERTIFICATE", der), "TLS_KEY_FILE": write("key.pem", "PRIVATE KEY", keyDER)})
	pool := x509.NewCertPool()
	cert, _ := x509.ParseCertificate(der)
	pool.AddCert(cert)
	https := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 10 * time.Second}
	resp, err := https.Get(strings.Replace(w.url, "http://", "https://", 1) + "/health")
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	resp.Body.Close()
}

// TestGracefulStop: a request in flight is answered, new ones are not accepted.
func TestGracefulStop(t *testing.T) {
	w := newWorld(t, nil)
	release := w.kc.block()
	answered := make(chan answer, 1)
	go func() {
		a, _ := w.send(w.url, call{method: "POST", path: "/auth/login", json: map[string]any{"email": "a@b.test", "password": password}})
		answered <- a
	}()
	w.eventually("the login has reached Keycloak", 5*time.Second, func() bool { return w.kc.count("token") > 0 })
	stopped, end := make(chan error, 1), w.ends[0]
	w.ends = nil
	go func() { stopped <- end() }()
	w.eventually("no new connections", 5*time.Second, func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	release()
	if a := <-answered; a.Status != 401 {
		t.Errorf("the request in flight got %v", a)
	}
	if err := <-stopped; err != nil {
		t.Errorf("the service stopped with %v", err)
	}
}

// TestSubcommands runs the subcommands as an operator does.
func TestSubcommands(t *testing.T) {
	w := newWorld(t, map[string]string{"JOB_INTERVAL": "0"})
	command := func(args ...string) (string, error) {
		var out bytes.Buffer
		env := func(name string) string {
			if name == "MANAGEMENT_ADDR" {
				return w.management
			}
			return w.env[name]
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
	if _, err := w.pool.Exec(t.Context(), `update user_registrations set due_at = now()`); err != nil { // stands in for waiting
		t.Fatal(err)
	}
	if out, err := command("jobs"); err != nil {
		t.Errorf("jobs: %v %s", err, out)
	}
	w.readMail(email, 1)
}
