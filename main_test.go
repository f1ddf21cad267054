package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"auth-service/dev/mail"
	"auth-service/dev/stack"
	"auth-service/templates"

	"github.com/jackc/pgx/v5/pgxpool"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// The tests speak HTTP to the program that run starts, as a client would, with a
// real PostgreSQL, a real Keycloak and a real SMTP server behind it.

var (
	services   *stack.Stack // PostgreSQL and Keycloak, for all tests of the package
	programDir string       // see program

	// largeRealms are deleted when all tests have ended. While others write, H2 reads all users of a realm once
	// more for each row that it deletes with them: of two thousand users that takes minutes.
	largeRealms struct {
		sync.Mutex
		names []string
	}
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	go func() {
		<-stack.ParentGone()
		os.Exit(1) // the stack dies with us
	}()
	if flag.Parse(); flag.Lookup("test.fuzz").Value.String() != "" {
		return m.Run() // without a stack
	}
	start := time.Now()
	var err error
	if programDir, err = os.MkdirTemp("", "auth-service-test-"); err != nil {
		log.Print(err)
		return 1
	}
	defer os.RemoveAll(programDir)
	services, err = stack.Use(ctx, stack.Options{Test: true, Keycloak: os.Getenv("KEYCLOAK_VERSION"), PublicURL: linkedURL, Progress: func(s string) {
		fmt.Fprintf(os.Stderr, "%4.0f s  %s\n", time.Since(start).Seconds(), s)
	}})
	if err != nil {
		log.Print(err)
		return 1
	}
	defer services.Stop()
	flag.Set("test.parallel", "3") // those that are parallel wait for Keycloak most of the time
	code := m.Run()
	if sharedTestEnv.w != nil {
		sharedTestEnv.w.close()
	}
	for _, realm := range largeRealms.names {
		if err := services.DeleteRealm(context.Background(), realm); err != nil {
			log.Print(err)
			code = 1
		}
	}
	return code
}

// olderKeycloak says whether the tests run against 26.4 or 26.5.
func olderKeycloak() bool {
	return regexp.MustCompile(`^26\.[45]\.`).MatchString(os.Getenv("KEYCLOAK_VERSION"))
}

// linkedURL is where the links on Keycloak's pages lead to; startChromium finds a service there.
const linkedURL = "http://accounts.test"

const backendSecret = "test-backend-secret"

// password is what every test user chooses; check looks for it in logs and audit.
const password = "correct horse battery staple"

// env is a realm, a database and a mail server of a test's own, with one or more
// instances of the service in front of them.
type env struct {
	testing.TB
	realm      string
	large      bool // the realm has many users
	db         string
	pool       *pgxpool.Pool
	mail       *mail.Catcher
	kc         *keycloakProxy // between the service and Keycloak, where faults are made
	pg         *postgresProxy // between the service and PostgreSQL
	vars       map[string]string
	url        string  // of the first instance
	management string  // listener of the latest instance
	logs       *buffer // of all instances
	secrets    *buffer // what must not be in them: passwords, tokens, codes, one a line
	ends       []func() error
	quick      bool // don't check answers against the OpenAPI document
}

// sharedTestEnv is for all tests that can live together: they differ in the
// addresses that they register. Tests that need settings or faults of their own
// build their own env.
var sharedTestEnv struct {
	sync.Mutex
	w           *env
	uses, users int // in all, and by tests that run
}

// sharedUses is after how many tests there is a new one: at the end of each test everything in it is checked.
const sharedUses = 20

// sharedEnv returns the shared env for a test, and checks the invariants at
// its end.
func sharedEnv(t testing.TB) *env {
	t.Helper()
	shared := &sharedTestEnv
	shared.Lock()
	defer shared.Unlock()
	if shared.w != nil && shared.uses >= sharedUses && shared.users == 0 {
		shared.w.close()
		shared.w = nil
	}
	if shared.w == nil {
		var err error
		if shared.w, err = build(t.Context(), nil, nil); err != nil {
			t.Fatal(err)
		}
		shared.uses = 0
	}
	w := *shared.w
	w.TB = t
	shared.uses, shared.users = shared.uses+1, shared.users+1
	t.Cleanup(func() {
		w.check()
		shared.Lock()
		defer shared.Unlock()
		shared.users--
	})
	return &w
}

// newEnv builds a env with settings of its own, and users that Keycloak has.
func newEnv(t testing.TB, settings map[string]string, users ...body) *env {
	t.Helper()
	w := uncheckedEnv(t, settings, users...)
	t.Cleanup(w.check)
	return w
}

// uncheckedEnv is newEnv for what is seeded and fulfils no invariant, or is too much to check.
func uncheckedEnv(t testing.TB, settings map[string]string, users ...body) *env {
	t.Helper()
	w, err := build(t.Context(), settings, users)
	if err != nil {
		t.Fatal(err)
	}
	w.TB = t
	t.Cleanup(w.close)
	return w
}

func build(ctx context.Context, settings map[string]string, users []body) (*env, error) {
	ctx = context.WithoutCancel(ctx) // the shared env outlives the test that builds it
	name := "test-" + strings.ToLower(gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10))
	w := &env{realm: name, large: len(users) > 1000, db: strings.ReplaceAll(name, "-", "_"), logs: new(buffer), secrets: new(buffer)}
	var err error
	if w.mail, err = mail.Start("127.0.0.1:0"); err != nil {
		return nil, err
	}
	_, smtpPort, _ := strings.Cut(w.mail.Addr(), ":")
	if err := services.CreateRealm(ctx, w.realm, map[string]string{"REALM": w.realm, "SMTP_PORT": smtpPort,
		"KEYCLOAK_BACKEND_CLIENT_SECRET": backendSecret, "PUBLIC_URL": cmp.Or(settings["PUBLIC_URL"], "http://localhost:3000")}, users...); err != nil {
		return nil, err
	}
	dbURL, err := services.CreateDatabase(ctx, w.db)
	if err != nil {
		return nil, err
	}
	if w.pool, err = pgxpool.New(ctx, dbURL); err != nil {
		return nil, err
	}
	if w.kc, err = newKeycloakProxy(services.KeycloakURL); err != nil {
		return nil, err
	}
	parsed, err := url.Parse(dbURL)
	if err != nil {
		return nil, err
	}
	if w.pg, err = newPostgresProxy(parsed.Host); err != nil {
		return nil, err
	}
	if settings["KEYCLOAK_URL"] == "" { // benchmarks go to both servers without a proxy in between
		parsed.Host = w.pg.addr
	}
	w.vars = map[string]string{
		"DATABASE_URL": parsed.String(), "KEYCLOAK_URL": w.kc.url(), "KEYCLOAK_PUBLIC_URL": services.KeycloakURL, "KEYCLOAK_REALM": w.realm,
		"KEYCLOAK_AUTH_CLIENT_ID": "auth-client", "KEYCLOAK_BACKEND_CLIENT_ID": "backend-admin",
		"KEYCLOAK_BACKEND_CLIENT_SECRET": backendSecret, "SERVER_HOST": "127.0.0.1", "SERVER_PORT": "0",
		"MANAGEMENT_ADDR": "127.0.0.1:0", "TRUSTED_PROXIES": "127.0.0.0/8", "LOG_LEVEL": "debug",
		"JOB_INTERVAL": "1s", "SHUTDOWN_DELAY": "0",
	}
	maps.Copy(w.vars, settings)
	w.secrets.add(password, backendSecret)
	w.url, err = w.start(ctx)
	return w, err
}

// start starts one more instance of the service, in this process, and returns its
// address as soon as it answers and its schema is there.
func (w *env) start(ctx context.Context) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	logs := new(buffer)
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return w.vars[name] }, io.Discard, io.MultiWriter(logs, w.logs))
	}()
	w.ends = append(w.ends, func() error { cancel(); return <-ended })
	var line struct{ Address, Management string }
	if err := logs.waitFor(30*time.Second, func(text string) bool {
		m := regexp.MustCompile(`(?m)^.*"msg":"listening".*$`).FindString(text)
		return json.Unmarshal([]byte(m), &line) == nil && strings.Contains(text, "revocations: read")
	}); err != nil {
		return "", fmt.Errorf("the service did not start: %w\n%s", err, logs)
	}
	w.management = line.Management
	return "http://" + line.Address, nil
}

// restarted has do done while no instance runs; the next one has these settings.
func (w *env) restarted(settings map[string]string, do func()) {
	w.Helper()
	for _, end := range w.ends {
		if err := end(); err != nil {
			w.Fatal(err)
		}
	}
	w.ends = nil
	do()
	maps.Copy(w.vars, settings)
	var err error
	if w.url, err = w.start(context.WithoutCancel(w.Context())); err != nil {
		w.Fatal(err)
	}
}

// close ends everything that belongs to the env.
func (w *env) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var errs []error
	for _, end := range w.ends {
		errs = append(errs, end())
	}
	w.pool.Close()
	errs = append(errs, w.kc.close(), w.pg.close(), w.mail.Close(),
		services.DropDatabase(ctx, w.db))
	if w.large {
		largeRealms.Lock()
		largeRealms.names = append(largeRealms.names, w.realm)
		largeRealms.Unlock()
	} else {
		errs = append(errs, services.DeleteRealm(ctx, w.realm))
	}
	if err := errors.Join(errs...); err != nil && w.TB != nil {
		w.Errorf("the env did not end well: %v", err)
	}
}

// buffer is what several goroutines write and a test waits for.
type buffer struct {
	mu      sync.Mutex
	b       bytes.Buffer
	changed chan struct{}
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// add appends lines.
func (b *buffer) add(lines ...string) { fmt.Fprintln(b, strings.Join(lines, "\n")) }

// waitFor returns as soon as the text fulfils a condition.
func (b *buffer) waitFor(timeout time.Duration, fulfils func(string) bool) error {
	end := time.After(timeout)
	for {
		b.mu.Lock()
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		text, changed := b.b.String(), b.changed
		b.mu.Unlock()
		if fulfils(text) {
			return nil
		}
		select {
		case <-changed:
		case <-end:
			return fmt.Errorf("not seen in %v", timeout)
		}
	}
}

// eventually waits until a condition that lies outside this process holds.
func (w *env) eventually(what string, timeout time.Duration, holds func() bool) {
	w.Helper()
	for end := time.Now().Add(timeout); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("not in %v: %s", timeout, what)
		}
	}
}

// answer is what the service has answered.
type answer struct {
	Status int
	Header http.Header
	Body   []byte
	JSON   map[string]any
}

func (a answer) text(name string) string { s, _ := a.JSON[name].(string); return s }

// slug is the problem type.
func (a answer) slug() string { return strings.TrimPrefix(a.text("type"), "/problems/") }

func (a answer) String() string { return fmt.Sprintf("%d %s", a.Status, a.Body) }

// call is one request; the zero value is a GET.
type call struct {
	method string
	path   string
	json   any    // encoded as the body
	body   string // or the body itself
	form   url.Values
	auth   []string // Authorization, each a header of its own
	header map[string]string
	from   string // the client's address; default: one of its own
}

// do sends a request and returns the answer, checked against the OpenAPI document.
func (w *env) do(r call) answer {
	w.Helper()
	a, err := w.send(w.url, r)
	if err != nil {
		w.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	if !w.quick {
		w.checkDocumented(r, a)
	}
	return a
}

func (w *env) post(path string, body any) answer {
	w.Helper()
	return w.do(call{method: "POST", path: path, json: body})
}

func (w *env) get(path string) answer {
	w.Helper()
	return w.do(call{method: "GET", path: path})
}

// form sends a form like a browser does, from a page of the service, and goes where it is led.
func (w *env) form(path string, values map[string]string) answer {
	w.Helper()
	form := url.Values{}
	for name, value := range values {
		form.Set(name, value)
	}
	a := w.do(call{method: "POST", path: path, form: form, header: map[string]string{"Sec-Fetch-Site": "same-origin"}})
	if a.Status == http.StatusSeeOther {
		return w.get(a.Header.Get("Location"))
	}
	return a
}

// site is what pages have in common, without a brand.
var site = func() *templates.Site {
	s, err := templates.NewSite(templates.Brand{})
	if err != nil {
		panic(err)
	}
	return s
}()

var client = &http.Client{
	Timeout:       60 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 100},
}

func (w *env) send(base string, r call) (answer, error) {
	var a answer
	body := r.body
	contentType := ""
	if r.json != nil {
		encoded, err := json.Marshal(r.json)
		if err != nil {
			return a, err
		}
		body, contentType = string(encoded), "application/json"
	}
	if r.form != nil {
		body, contentType = r.form.Encode(), "application/x-www-form-urlencoded"
	}
	if r.method == "" {
		r.method = "GET"
	}
	req, err := http.NewRequest(r.method, base+r.path, strings.NewReader(body))
	if err != nil {
		return a, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if r.from == "" {
		r.from = newAddress()
		if w.vars["KEYCLOAK_URL"] == services.KeycloakURL { // without a proxy, Keycloak knows who the client is
			r.from = privateAddress()
		}
	}
	if !strings.HasPrefix(base, services.KeycloakURL) {
		req.Header.Set("X-Forwarded-For", r.from)
	}
	for _, credentials := range r.auth {
		req.Header.Add("Authorization", credentials)
	}
	for name, value := range r.header {
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	a.Status, a.Header = resp.StatusCode, resp.Header
	if a.Body, err = io.ReadAll(resp.Body); err != nil {
		return a, err
	}
	if strings.Contains(resp.Header.Get("Content-Type"), "json") && r.method != "HEAD" {
		err = json.Unmarshal(a.Body, &a.JSON)
	}
	for _, name := range []string{"access_token", "refresh_token", "id_token"} {
		if token := a.text(name); token != "" {
			w.secrets.add(token)
		}
	}
	return a, err
}

// privateAddress is one of those that Keycloak lets in without TLS.
func privateAddress() string {
	return fmt.Sprintf("10.%d.%d.%d", rand.IntN(256), rand.IntN(256), rand.IntN(256))
}

// newAddress is a client address that nobody else has, so that limits of one test
// don't meet another's.
func newAddress() string {
	var parts []string
	for range 4 {
		parts = append(parts, gonanoid.MustGenerate("0123456789abcdef", 4))
	}
	return netip.MustParseAddr("2001:db8:" + parts[0] + ":" + parts[1] + "::1").String() // as the service spells it
}

// newEmail is an address that nobody has registered yet.
func newEmail() string {
	return gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 12) + "@example.test"
}

// link is what the person reads in the mail.
type link struct {
	Token, Code, URL string
	Access           string // token of whoever acts, in tables of deeds
}

var (
	linkPattern = regexp.MustCompile(`https?://[^\s"<>]*/account/verify\?[^\s"<>]*`)
	codePattern = regexp.MustCompile(`(?m)^\s*(\d{6})\s*$`)
)

// readMail waits for the n-th mail to an address and reads its link and code.
func (w *env) readMail(email string, n int) link {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 30*time.Second)
	defer cancel()
	m, err := w.mail.WaitFor(ctx, email, n)
	if err != nil {
		w.Fatal(err)
	}
	return w.readLink(m)
}

func (w *env) readLink(m mail.Message) link {
	w.Helper()
	found, code := linkPattern.FindString(m.Text), codePattern.FindStringSubmatch(m.Text)
	if found == "" || code == nil {
		w.Fatalf("the mail has no link or no code:\n%s", m.Text)
	}
	u, err := url.Parse(found)
	if err != nil {
		w.Fatal(err)
	}
	l := link{Token: u.Query().Get("token"), Code: code[1], URL: found}
	w.secrets.add(l.Token)
	return l
}

// register registers an address and returns the answer.
func (w *env) register(email string) answer {
	w.Helper()
	a := w.post("/api/v1/register", map[string]any{"email": email})
	if a.Status != 201 {
		w.Fatalf("register: %v", a)
	}
	return a
}

// account registers and verifies an address.
func (w *env) account(email string) {
	w.Helper()
	w.register(email)
	w.confirms(w.readMail(email, 1))
}

// confirms opens the mail's link and chooses the password.
func (w *env) confirms(l link) answer {
	w.Helper()
	a := w.post("/api/v1/register/verify", map[string]any{"token": l.Token, "password": password})
	if a.Status != 200 {
		w.Fatalf("verify: %v", a)
	}
	return a
}

func (w *env) login(email, password string) answer {
	w.Helper()
	return w.post("/api/v1/auth/login", map[string]any{"email": email, "password": password})
}

// wants fails the test if the answer is not this status and problem ("" = none).
func (w *env) wants(a answer, status int, slug string) {
	w.Helper()
	if a.Status != status || a.slug() != slug {
		cause := regexp.MustCompile(`.*"request failed".*` + a.Header.Get("X-Request-Id") + `.*`).FindString(w.logs.String())
		w.Fatalf("got %v\nwant %d %s\n%s", a, status, slug, cause)
	}
	if slug == "" {
		return
	}
	if got := a.Header.Get("Content-Type"); got != "application/problem+json" {
		w.Errorf("Content-Type is %q", got)
	}
	people := a.Header.Get("Content-Security-Policy") != "" // gateways get back the id that they have sent
	if id := a.text("request_id"); id != a.Header.Get("X-Request-Id") || people && id == "" {
		w.Errorf("request_id %q, header %q", a.text("request_id"), a.Header.Get("X-Request-Id"))
	}
	if (status == 429 || status == 503) != (a.Header.Get("Retry-After") != "") {
		w.Errorf("status %d with Retry-After %q", status, a.Header.Get("Retry-After"))
	}
}
