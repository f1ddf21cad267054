package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

// fault is what happens to a call on its way to Keycloak.
type fault int

const (
	lost    fault = iota + 1 // it never arrives
	applied                  // it arrives, and the answer is lost
	failing                  // Keycloak answers that it has failed
	stale                    // Keycloak answers about a user what it has answered before, from its cache
)

func (f fault) String() string { return [...]string{"", "lost", "applied", "failing", "stale"}[f] }

// keycloakProxy is a reverse proxy in front of the real Keycloak. Closed, it refuses
// connections like a server that is stopped. Patterns are regular expressions for
// a call's name and request, "send_mail PUT /admin/realms/…": see callName.
type keycloakProxy struct {
	instead  atomic.Pointer[proxyAnswer] // what it answers to all calls itself; nil: it asks Keycloak
	forwards atomic.Bool                 // hand on who the client is: Keycloak wants TLS of addresses that are not private
	mu       sync.Mutex
	addr     string
	server   *http.Server
	proxy    *httputil.ReverseProxy

	faults  map[string]fault
	users   map[string][]byte // the last answer of each get_user
	holds   []*hold
	calls   []string
	came    []time.Time   // when, each of the calls
	blocked chan struct{} // calls wait here; nil: they don't
}

// hold stops one call, before Keycloak has seen it or after it was done.
type hold struct {
	pattern  string
	after    bool
	there    chan struct{} // closed when the call is there
	released chan struct{}
}

type callKey struct{}

func newKeycloakProxy(target string) (*keycloakProxy, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	g := &keycloakProxy{addr: "127.0.0.1:0", faults: map[string]fault{}, users: map[string][]byte{}}
	g.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // Keycloak's issuer is the address that it was called at
			if g.forwards.Load() {
				r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			ctx := resp.Request.Context()
			call := ctx.Value(callKey{}).(string)
			if !g.wait(ctx, call, true) || g.fault(call) == applied {
				return errors.New("the answer is lost")
			}
			if strings.HasPrefix(call, "get_user ") {
				return g.fromCache(call, resp)
			}
			return nil
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	return g, g.open()
}

// fromCache keeps the answer of a get_user, or answers what was kept.
func (g *keycloakProxy) fromCache(call string, resp *http.Response) error {
	body, err := io.ReadAll(resp.Body)
	isStale := g.fault(call) == stale
	g.mu.Lock()
	defer g.mu.Unlock()
	if isStale {
		body = g.users[call]
		resp.Header.Set("Content-Length", strconv.Itoa(len(body)))
	}
	g.users[call], resp.Body = body, io.NopCloser(bytes.NewReader(body))
	return err
}

func (g *keycloakProxy) url() string { return "http://" + g.addr }

func (g *keycloakProxy) open() error {
	l, err := net.Listen("tcp", g.addr)
	if err != nil {
		return err
	}
	g.addr = l.Addr().String()
	g.server = &http.Server{Handler: g}
	go g.server.Serve(l)
	return nil
}

func (g *keycloakProxy) close() error { return g.server.Close() }

// on makes a fault of all calls that match, until it is 0 again.
func (g *keycloakProxy) on(pattern string, f fault) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.faults[pattern] = f
}

func (g *keycloakProxy) fault(call string) fault {
	g.mu.Lock()
	defer g.mu.Unlock()
	for pattern, f := range g.faults {
		if f != 0 && regexp.MustCompile(pattern).MatchString(call) {
			return f
		}
	}
	return 0
}

// count is how often a call was made.
func (g *keycloakProxy) count(name string) int { return len(g.times(name)) }

// called are all calls that were made.
func (g *keycloakProxy) called() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.calls)
}

// times is when a call was made.
func (g *keycloakProxy) times(name string) (times []time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, call := range g.calls {
		if strings.HasPrefix(call, name+" ") {
			times = append(times, g.came[i])
		}
	}
	return times
}

// holdAt stops the next call that matches: before Keycloak sees it, or after it is
// done and only the answer is missing. There is closed when it has come so far.
// A call whose client dies meanwhile is dropped.
func (g *keycloakProxy) holdAt(pattern string, after bool) (there <-chan struct{}, release func()) {
	h := &hold{pattern, after, make(chan struct{}), make(chan struct{})}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holds = append(g.holds, h)
	return h.there, sync.OnceFunc(func() { close(h.released) })
}

// wait waits at the first hold that matches; false: the client is gone.
func (g *keycloakProxy) wait(ctx context.Context, call string, after bool) bool {
	g.mu.Lock()
	i := slices.IndexFunc(g.holds, func(h *hold) bool {
		return h.after == after && regexp.MustCompile(h.pattern).MatchString(call)
	})
	if i < 0 {
		g.mu.Unlock()
		return true
	}
	h := g.holds[i]
	g.holds = slices.Delete(g.holds, i, i+1)
	g.mu.Unlock()
	close(h.there)
	select {
	case <-h.released:
		return true
	case <-ctx.Done():
		return false
	}
}

// block makes all calls wait, until the returned function is called: a server
// that hangs.
func (g *keycloakProxy) block() (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	blocked := make(chan struct{})
	g.blocked = blocked
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.blocked = nil
		close(blocked)
	}
}

func (g *keycloakProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	call := callName(r, string(body)) + " " + r.Method + " " + r.URL.Path
	g.mu.Lock()
	g.calls, g.came = append(g.calls, call), append(g.came, time.Now())
	blocked := g.blocked
	g.mu.Unlock()
	if blocked != nil {
		select {
		case <-blocked:
		case <-r.Context().Done():
		}
	}
	if !g.wait(r.Context(), call, false) || r.Context().Err() != nil || g.fault(call) == lost {
		panic(http.ErrAbortHandler)
	}
	if own := g.instead.Load(); own != nil {
		own.ServeHTTP(w, r)
		return
	}
	if g.fault(call) == failing {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusInternalServerError)
		io.WriteString(w, `{"error":"unknown_error"}`)
		return
	}
	g.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callKey{}, call)))
}

// callName is what keycloak.go calls a request.
func callName(r *http.Request, body string) string {
	has := func(part string) bool { return strings.Contains(body, part) }
	switch path := r.URL.Path; {
	case strings.HasSuffix(path, "/token") && has("client_credentials"):
		return "service_token"
	case strings.HasSuffix(path, "/token") && has("grant_type=refresh_token"):
		return "refresh"
	case strings.HasSuffix(path, "/token") && has("grant_type=authorization_code"):
		return "code"
	case strings.HasSuffix(path, "/token"):
		return "token"
	case strings.HasSuffix(path, "/certs"):
		return "signing_keys"
	case strings.HasSuffix(path, "-email"):
		return "send_mail"
	case strings.Contains(path, "/sessions/"):
		return "end_session"
	case strings.HasSuffix(path, "/logout"):
		return "end_sessions"
	case strings.HasSuffix(path, "/sessions"):
		return "user_sessions"
	case strings.HasSuffix(path, "/users/count"):
		return "count_users"
	case strings.HasSuffix(path, "events"):
		return "list_events"
	case strings.HasSuffix(path, "/users") && r.URL.Query().Has("first"):
		return "list_users"
	case strings.HasSuffix(path, "/users"):
		return map[string]string{"POST": "create_user", "GET": "find_user"}[r.Method]
	case !strings.Contains(path, "/users/"):
		return "other"
	case r.Method != "PUT":
		return map[string]string{"GET": "get_user", "DELETE": "delete_user"}[r.Method]
	case has(`"emailVerified":true`) && has(attrRegistrationID):
		return "activate_user"
	case has(attrCode):
		return "prepare_mail"
	case has(`"attributes"`):
		return "push_user"
	}
	return "disable_user"
}

// postgresProxy is a TCP proxy in front of PostgreSQL.
type postgresProxy struct {
	addr, target string
	mu           sync.Mutex
	listener     net.Listener
	conns        []net.Conn
	hole         *sync.RWMutex // of the connections that are made now: nothing passes while it is locked
	holes        []*sync.RWMutex
	trips        func(statements []string) // if not nil: is told of each round trip
}

func newPostgresProxy(target string) (*postgresProxy, error) {
	p := &postgresProxy{addr: "127.0.0.1:0", target: target, hole: new(sync.RWMutex)}
	return p, p.open()
}

func (p *postgresProxy) open() error {
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.addr, p.listener = l.Addr().String(), l
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.carry(conn)
		}
	}()
	return nil
}

func (p *postgresProxy) carry(conn net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		conn.Close()
		return
	}
	p.mu.Lock()
	p.conns = append(p.conns, conn, server)
	hole, sent := p.hole, io.Reader(conn)
	if p.trips != nil {
		copied, to := io.Pipe()
		sent = io.TeeReader(conn, to)
		go readTrips(copied, p.trips)
	}
	p.mu.Unlock()
	go func() { io.Copy(valve{server, hole}, sent); server.Close() }()
	io.Copy(valve{conn, hole}, server)
	conn.Close()
}

// readTrips reads what a client sends, and tells what it wants in each round trip: the client waits after a Sync.
func readTrips(from io.Reader, tell func(statements []string)) {
	defer io.Copy(io.Discard, from)
	client := pgproto3.NewBackend(from, nil)
	if _, err := client.ReceiveStartupMessage(); err != nil {
		return
	}
	_ = client.SetAuthType(pgproto3.AuthTypeSASL)
	texts, statements := map[string]string{}, []string{}
	for {
		message, err := client.Receive()
		if err != nil {
			return
		}
		switch m := message.(type) {
		case *pgproto3.SASLInitialResponse:
			_ = client.SetAuthType(pgproto3.AuthTypeSASLContinue)
		case *pgproto3.Parse:
			texts[m.Name] = m.Query
		case *pgproto3.Bind:
			statements = append(statements, plainSQL(texts[m.PreparedStatement]))
		case *pgproto3.Query:
			tell([]string{m.String})
		case *pgproto3.Sync:
			tell(statements)
			statements = nil
		}
	}
}

// valve is a connection to which nothing passes while the hole is locked.
type valve struct {
	net.Conn
	hole *sync.RWMutex
}

func (v valve) Write(b []byte) (int, error) {
	v.hole.RLock()
	defer v.hole.RUnlock()
	return v.Conn.Write(b)
}

// swallow makes the proxy a black hole: connections stand and new ones are accepted, and
// nothing comes through. When end is called new ones are good; nobody hears of the others
// again.
func (p *postgresProxy) swallow() (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hole.Lock()
	p.holes = append(p.holes, p.hole)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.hole = new(sync.RWMutex)
	}
}

// close refuses connections and cuts those that there are.
func (p *postgresProxy) close() error {
	err := p.listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		conn.Close()
	}
	for _, hole := range p.holes {
		hole.Unlock()
	}
	p.conns, p.holes = nil, nil
	return err
}

// What a person does, as a request.

func registering(email string) call {
	return call{method: "POST", path: "/api/v1/register", json: map[string]any{"email": email}}
}

func verifying(l link) call {
	return call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"token": l.Token, "password": password}}
}

func typing(email, code string) call {
	return call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"email": email, "code": code, "password": password}}
}

func resending(id string) call {
	return call{method: "POST", path: "/api/v1/register/resend", json: map[string]any{"registration_id": id}}
}

func cancelling(l link) call {
	return call{method: "POST", path: "/api/v1/register/cancel", json: map[string]any{"token": l.Token}}
}

func signingIn(email, password string) call {
	return call{method: "POST", path: "/api/v1/auth/login", json: map[string]any{"email": email, "password": password}}
}

// exec runs SQL past the service.
func (w *env) exec(sql string, args ...any) {
	w.Helper()
	if _, err := w.pool.Exec(w.Context(), sql, args...); err != nil {
		w.Fatalf("%s: %v", sql, err)
	}
}

// expire stands in for waiting until the time to confirm is over.
func (w *env) expire(email string) {
	w.Helper()
	w.exec(`update user_registrations set expires_at = now() where lower(email) = lower($1) and status = 'pending'`, email)
}

// waitUntilIdle waits until the queue has done everything, also the mails. It stands in for waiting
// until tasks are due, not for the end of a lock. A registration that has ended and is not in
// Keycloak is looked for there for some minutes more: that is not waited for.
func (w *env) waitUntilIdle() {
	w.Helper()
	var wrong []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		wrong = w.violations()
		queued := w.value(`select count(*)::text from user_registrations where status = 'pending' and mail_state = 'queued'`)
		open := w.value(`select coalesce(string_agg(concat_ws(' ', task_id, attempts, last_error), ', '), '') from tasks
			where task_id not like 'job:%' and (locked_until > now() or due_at < now() + interval '1 hour')
				and not exists (select from user_registrations r where r.registration_id = task_id and status <> 'pending' and keycloak_id is null)`)
		if len(wrong) == 0 && queued == "0" && open == "" {
			return
		}
		wrong = append(wrong, queued+" mails are queued; tasks: "+open)
		w.tasksDue()
	}
	w.Fatalf("not repaired: %s", strings.Join(wrong, "\n"))
}

// tasksDue makes tasks due that wait for another try.
func (w *env) tasksDue() {
	w.Helper()
	w.exec(`update tasks set due_at = now() where due_at > now() and due_at < now() + interval '1 hour' and locked_by is null and task_id not like 'job:%'`)
}

// registered registers an address and reads the mail.
func registered(w *env, email string) link {
	w.Helper()
	w.wants(w.do(registering(email)), 201, "")
	return w.readMail(email, 1)
}

// lastMail is what the newest mail to an address says.
func (w *env) lastMail(email string) link {
	w.Helper()
	return w.readMail(email, max(1, len(w.mail.To(email))))
}

// Run is a subtest that shares the env.
func (w *env) Run(name string, f func()) {
	t := w.TB.(*testing.T)
	t.Run(name, func(t *testing.T) {
		defer func(tb testing.TB) { w.TB = tb }(w.TB)
		w.TB = t
		f()
	})
}

// other is a wrong code.
func other(code string) string {
	return code[:5] + string('0'+(code[5]-'0'+1)%10)
}

// within sends requests in parallel and fails if an answer takes longer than d.
func (w *env) within(d time.Duration, calls ...call) []answer {
	w.Helper()
	answers := make([]answer, len(calls))
	var all sync.WaitGroup
	for i, r := range calls {
		all.Go(func() {
			start := time.Now()
			answers[i] = w.do(r)
			if took := time.Since(start); took > d {
				w.Errorf("%s took %v: %v", r.path, took, answers[i])
			}
		})
	}
	all.Wait()
	return answers
}
