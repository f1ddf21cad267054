package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// fault is what happens to a call on its way to Keycloak.
type fault int

const (
	lost    fault = iota + 1 // it never arrives
	applied                  // it arrives, and the answer is lost
)

func (f fault) String() string { return [...]string{"", "lost", "applied"}[f] }

// keycloakProxy is a reverse proxy in front of the real Keycloak. Closed, it refuses
// connections like a server that is stopped. Patterns are regular expressions for
// a call's name and request, "send_mail PUT /admin/realms/…": see callName.
type keycloakProxy struct {
	mu     sync.Mutex
	addr   string
	server *http.Server
	proxy  *httputil.ReverseProxy

	faults  map[string]fault
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
	g := &keycloakProxy{addr: "127.0.0.1:0", faults: map[string]fault{}}
	g.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // Keycloak's issuer is the address that it was called at
		},
		ModifyResponse: func(resp *http.Response) error {
			ctx := resp.Request.Context()
			call := ctx.Value(callKey{}).(string)
			if !g.wait(ctx, call, true) || g.fault(call) == applied {
				return errors.New("the answer is lost")
			}
			return nil
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	return g, g.open()
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
		return "set_code"
	case has(`"attributes"`):
		return "assign_user"
	case has(`"enabled":true`):
		return "enable_user"
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
	hole := p.hole
	p.mu.Unlock()
	go func() { io.Copy(valve{server, hole}, conn); server.Close() }()
	io.Copy(valve{conn, hole}, server)
	conn.Close()
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

func registering(email, password string) call {
	return call{method: "POST", path: "/api/v1/register", json: map[string]any{"email": email, "password": password}}
}

func verifying(l link) call {
	return call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"token": l.Token}}
}

func typing(email, code string) call {
	return call{method: "POST", path: "/api/v1/register/verify", json: map[string]any{"email": email, "code": code}}
}

func resending(email string) call {
	return call{method: "POST", path: "/api/v1/register/resend", json: map[string]any{"email": email}}
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

// settle waits until the repair loops have done everything, also the mails. It
// stands in for waiting until they are due (retryTime), not for a lease's end.
func (w *env) settle() {
	w.Helper()
	var wrong []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		wrong = w.violations()
		var queued, busy, owed int
		if err := w.pool.QueryRow(w.Context(), `select count(*) filter (where status = 'pending' and mail_state = 'queued'),
			count(*) filter (where lease_owner is not null or due_at <= now()), (select count(due_at) from users) from user_registrations`).Scan(&queued, &busy, &owed); err != nil {
			w.Fatal(err)
		}
		if len(wrong) == 0 && queued == 0 && busy == 0 && owed == 0 {
			return
		}
		wrong = append(wrong, fmt.Sprintf("%d mails are queued, %d registrations due or leased, %d users not settled", queued, busy, owed))
		if len(wrong) > 1 || queued > 0 || owed > 0 {
			w.usersDue()
			w.exec(`update user_registrations set due_at = now() where due_at > now() and lease_owner is null
				and due_at < now() + interval '1 hour'`)
			w.exec(`update sessions set due_at = now() where due_at > now() and ended_at is not null`)
		}
	}
	w.Fatalf("not repaired: %s", strings.Join(wrong, "\n"))
}

// registered registers an address and reads the mail.
func registered(w *env, email, password string) link {
	w.Helper()
	w.wants(w.do(registering(email, password)), 201, "")
	return w.readMail(email, 1)
}

// lastMail is what the newest mail to an address says.
func (w *env) lastMail(email string) link {
	w.Helper()
	return w.readMail(email, max(1, len(w.mail.To(email))))
}

// TestFaults loses every call to Keycloak, or its answer, in every operation. The
// answer is one that the contract allows, nothing stays half done once the fault
// is over, and the person who tries again succeeds.
func TestFaults(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "RESEND_LIMIT": "100", "JOB_INTERVAL": "0"})
	w.restarted(map[string]string{"JOB_INTERVAL": "200ms"}, func() {
		// Tokens that hardly live make the service account fetch one for every call.
		w.keycloakAdmin("PUT", "", map[string]any{"accessTokenLifespan": 20}, nil)
		w.noEvents() // nor for itself, and the operation with it
	})

	// Afterwards the person, or the next one with that address, gets in.
	getsIn := func(w *env, email, password string) {
		w.wants(w.do(verifying(w.lastMail(email))), 200, "")
		if password != "" {
			w.wants(w.do(signingIn(email, password)), 200, "")
		}
	}
	startsAnew := func(w *env, email, password string) {
		w.wants(w.do(registering(email, password)), 201, "")
		w.settle()
		getsIn(w, email, password)
	}
	session := func(w *env, email, _ string) link { return w.session(email) }
	sessions := func(live string) func(w *env, email, password string) { // and the same in Keycloak: settle
		return func(w *env, email, _ string) {
			if got := w.value(`select count(*)::text from sessions join users using (user_id) where email = $1 and ended_at is null`, email); got != live {
				w.Errorf("%s sessions live, not %s", got, live)
			}
		}
	}
	admin := w.administrator()
	manager := func(w *env, _, _ string) link {
		w.exec(`delete from rate_limits where key = $1`, loginLimit(admin).Key)
		return link{Key: w.signsIn(admin).text("access_token")}
	}
	joined := func(w *env, email, password string) link {
		l := manager(w, "", "")
		w.joined(answer{JSON: body{"access_token": l.Key}}, email)
		l.Code = w.userOf(email)
		return l
	}
	managed := func(l link, method, path string, in any) call {
		return managing(answer{JSON: body{"access_token": l.Key}}, method, path, in)
	}
	for _, op := range []struct {
		name     string
		calls    string // to Keycloak
		password string
		before   func(w *env, email, password string) link
		try      func(email, password string, l link) call
		success  int
		slug     string // of success, if that is a refusal
		after    func(w *env, email, password string)
	}{
		{name: "register", calls: "service_token create_user enable_user send_mail disable_user", password: password,
			try: func(email, password string, _ link) call { return registering(email, password) }, success: 201, after: getsIn},
		{name: "register without password", calls: "create_user enable_user send_mail disable_user",
			try: func(email, _ string, _ link) call { return registering(email, "") }, success: 201, after: getsIn},
		{name: "replace", calls: "service_token get_user delete_user create_user", before: registered,
			try: func(email, _ string, _ link) call { return registering(email, "") }, success: 201, after: getsIn},
		{name: "register after a creation without answer", calls: "find_user delete_user create_user",
			before: func(w *env, email, password string) link {
				w.kc.on("create_user", applied)
				defer w.kc.on("create_user", 0)
				w.wants(w.do(registering(email, password)), 503, "unavailable")
				return link{}
			},
			try: func(email, _ string, _ link) call { return registering(email, "") }, success: 201, after: getsIn},
		{name: "verify", calls: "service_token get_user activate_user", password: password, before: registered,
			try: func(_, _ string, l link) call { return verifying(l) }, success: 200, after: getsIn},
		{name: "verify by code", calls: "service_token get_user activate_user", password: password, before: registered,
			try: func(email, _ string, l link) call { return typing(email, l.Code) }, success: 200, after: getsIn},
		{name: "resend", calls: "service_token get_user set_code send_mail disable_user", before: registered,
			try: func(email, _ string, _ link) call { return resending(email) }, success: 200,
			after: func(w *env, email, _ string) {
				w.wants(w.do(typing(email, w.lastMail(email).Code)), 200, "")
			}},
		{name: "cancel", calls: "service_token get_user delete_user", before: registered,
			try: func(_, _ string, l link) call { return cancelling(l) }, success: 200, after: startsAnew},
		{name: "expire", calls: "service_token get_user delete_user",
			before: func(w *env, email, password string) link {
				l := registered(w, email, password)
				w.expire(email)
				return l
			},
			try: func(_, _ string, l link) call { return verifying(l) }, success: 410, slug: "verification-expired", after: startsAnew},
		{name: "login", calls: "token", password: password,
			before: func(w *env, email, password string) link { w.account(email); return link{} },
			try:    func(email, password string, _ link) call { return signingIn(email, password) }, success: 200,
			after: func(w *env, email, password string) {}},
		{name: "refresh", calls: "refresh", before: session,
			try: func(_, _ string, l link) call { return refreshing(l.Token) }, success: 200, after: sessions("1")},
		{name: "logout", calls: "service_token end_session", before: session,
			try: func(_, _ string, l link) call { return loggingOut(l.Token) }, success: 204, after: sessions("0")},
		{name: "end of a session", calls: "service_token end_session", before: session,
			try:     func(_, _ string, l link) call { return authorized(l.Key, "DELETE", sessionsPath+"/"+l.Code) },
			success: 204, after: sessions("0")},
		{name: "end of all sessions", calls: "service_token end_session", before: session,
			try:     func(_, _ string, l link) call { return authorized(l.Key, "DELETE", sessionsPath) },
			success: 204, after: sessions("0")},
		{name: "create a user", calls: "service_token create_user send_mail",
			before: manager, try: func(email, _ string, l link) call { return managed(l, "POST", "", body{"email": email}) }, success: 201,
			after: func(w *env, email, _ string) {
				w.agree(w.userOf(email))
				w.invitations(email, 1, 2) // nobody can know that the first one was sent
			}},
		{name: "change a user", calls: "service_token get_user assign_user", before: joined,
			try: func(_, _ string, l link) call {
				return managed(l, "PATCH", "/"+l.Code, body{"role": "partner", "network_id": "N2"})
			}, success: 200,
			after: func(w *env, email, password string) {
				w.agree(w.userOf(email))
				if claims := unpacked(w.signsIn(email).text("access_token"), 1); fmt.Sprintf("%v %v", claims["roles"], claims["network_id"]) != "[partner] N2" {
					w.Errorf("the token says %v", claims)
				}
			}},
		{name: "delete a user", calls: "service_token end_session get_user assign_user", before: joined, password: password,
			try: func(_, _ string, l link) call { return managed(l, "DELETE", "/"+l.Code, nil) }, success: 204,
			after: func(w *env, email, password string) {
				w.agree(w.userOf(email))
				sessions("0")(w, email, password)
				w.wants(w.do(signingIn(email, password)), 403, "account-disabled")
			}},
		{name: "restore a user", calls: "get_user assign_user", password: password,
			before: func(w *env, email, password string) link {
				l := joined(w, email, password)
				w.wants(w.do(managed(l, "DELETE", "/"+l.Code, nil)), 204, "")
				return l
			},
			try: func(_, _ string, l link) call { return managed(l, "POST", "/"+l.Code+"/restore", nil) }, success: 200,
			after: func(w *env, email, password string) {
				w.agree(w.userOf(email))
				w.wants(w.do(signingIn(email, password)), 200, "")
			}},
	} {
		for name := range strings.FieldsSeq(op.calls) {
			for _, f := range []fault{lost, applied} {
				t.Run(fmt.Sprintf("%s/%s %v", op.name, name, f), func(t *testing.T) {
					w := *w
					w.TB = t
					email, l := newEmail(), link{}
					if op.before != nil {
						l = op.before(&w, email, op.password)
					}
					w.kc.on("^"+name+" ", f)
					before := w.kc.count(name)
					a := w.do(op.try(email, op.password, l))
					w.kc.on("^"+name+" ", 0)
					if w.kc.count(name) == before {
						t.Fatalf("%s is not called", name)
					}
					if a.Status != 503 {
						w.wants(a, op.success, op.slug)
					} else {
						w.wants(a, 503, "unavailable")
						w.wants(w.do(op.try(email, op.password, l)), op.success, op.slug)
					}
					w.straysDie()
					w.settle()
					op.after(&w, email, op.password)
					w.settle()
				})
			}
		}
	}
}

// TestLeftUndone has faults that nobody comes back to: only the repair loop is left.
func TestLeftUndone(t *testing.T) {
	t.Parallel() // it waits for loops
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "JOB_INTERVAL": "200ms"})
	w.noEvents() // or whom only Keycloak has is taken over
	during := func(call string, f fault, do func()) {
		w.Helper()
		w.kc.on("^"+call+" ", f)
		defer w.kc.on("^"+call+" ", 0)
		do()
	}
	w.Run("verified in Keycloak, the answer lost", func() {
		email := newEmail()
		l := registered(w, email, password)
		during("activate_user", applied, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.settle()
		w.wants(w.do(signingIn(email, password)), 200, "")
	})
	w.Run("a wrong code before the mail window is closed", func() {
		email := newEmail()
		during("disable_user", lost, func() { w.register(email) })
		w.wants(w.do(typing(email, "x"+w.readMail(email, 1).Code[1:])), 400, "invalid-request")
		w.wants(w.do(typing(email, other(w.readMail(email, 1).Code))), 400, "invalid-code")
		w.settle()
	})
	w.Run("an outage before the mail window is closed", func() {
		email := newEmail()
		during("disable_user", lost, func() { w.register(email) })
		l := w.readMail(email, 1)
		during("get_user", lost, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.settle()
		w.wants(w.do(verifying(l)), 200, "")
	})
	w.Run("a creation without answer, a registration after it, and an outage", func() {
		email := newEmail()
		during("create_user", lost, func() { w.wants(w.do(registering(email, password)), 503, "unavailable") })
		w.register(email)
		l := w.readMail(email, 1)
		during("find_user", lost, func() { w.wants(w.do(registering(email, password)), 503, "unavailable") })
		w.wants(w.do(verifying(l)), 200, "") // it was not replaced, and nobody holds it
	})
	w.Run("a sign-out, and nobody to end it in Keycloak", func() {
		l := w.session(newEmail())
		during("end_session", lost, func() { w.wants(w.do(loggingOut(l.Token)), 204, "") })
		w.settle()
	})
	w.Run("mails that were certainly not sent cost nothing", func() {
		email := newEmail()
		registered(w, email, password)
		during("set_code", lost, func() {
			for range 3 {
				a := w.do(resending(email))
				w.wants(a, 200, "")
				if a.text("verification_email") != "queued" {
					w.Errorf("not queued: %v", a)
				}
			}
		})
		w.settle()
		var hits int
		if err := w.pool.QueryRow(w.Context(), `select hits from rate_limits where key = $1`, mailsADay(email).Key).Scan(&hits); err != nil || hits != 2 {
			w.Errorf("%d mails were counted, not 2 (%v)", hits, err)
		}
	})

	admin := w.signsIn(w.administrator())
	manage := func(method, path string, in any, status int) answer {
		w.Helper()
		a := w.do(managing(admin, method, path, in))
		w.wants(a, status, "")
		return a
	}
	queued := func(email, call string, f fault) (path string) {
		w.Helper()
		during(call, f, func() {
			a := manage("POST", "", body{"email": email, "role": "operator"}, 201)
			if path = "/" + a.text("user_id"); a.text("invitation_email") != "queued" {
				w.Errorf("not queued: %v", a)
			}
		})
		return path
	}
	w.Run("a user created in Keycloak, the answer lost, and changed since", func() {
		email := newEmail()
		path := queued(email, "create_user", applied)
		during("find_user", lost, func() { manage("PATCH", path, body{"role": "partner", "network_id": "N1", "first_name": "Grace"}, 200) })
		w.settle()
		w.agree(path[1:])
		w.invitations(email, 1)
	})
	for _, f := range []struct {
		call  string
		fault fault
	}{{"create_user", lost}, {"create_user", applied}} {
		w.Run("a user deleted before we know that Keycloak has it, "+f.call, func() {
			email := newEmail()
			path := queued(email, f.call, f.fault)
			during("find_user", lost, func() { manage("DELETE", path, nil, 204) })
			w.settle()
			w.agree(path[1:])
			w.invitations(email, 0)
			manage("POST", path+"/restore", nil, 200)
			w.agree(path[1:])
			w.invitations(email, 1)
		})
	}
	w.Run("a user whom Keycloak does not want", func() {
		here := func(email string) string { return w.value(`select count(*)::text from users where email = $1`, email) }
		email, late := newEmail(), newEmail()
		w.keycloakAdmin("POST", "/users", body{"username": "x" + email, "email": email}, nil)
		a := w.do(managing(admin, "POST", "", body{"email": email}))
		w.wants(a, 409, "user-exists")
		if got := w.value(`select string_agg(concat_ws(' ', action, outcome, nullif(reason, '')), ', ' order by at, audit_id) from audit_log where request_id = $1`,
			a.text("request_id")); here(email) != "0" || got != "user.create ok, user.remove ok keycloak, createUser refused user-exists" {
			w.Errorf("%s rows, and on record: %s", here(email), got)
		}
		path := queued(late, "create_user", lost)
		w.keycloakAdmin("POST", "/users", body{"username": "x" + late, "email": late}, nil)
		w.settle()
		if got := w.value(`select concat_ws(' ', actor, reason) from audit_log where target = $1 and action = 'user.remove'`, path[1:]); here(late) != "0" || got != "system:users keycloak" {
			w.Errorf("%s rows, and on record: %s", here(late), got)
		}
		w.wants(w.do(managing(admin, "GET", path, nil)), 404, "user-not-found")
		if n := len(w.mail.To(email)) + len(w.mail.To(late)); n > 0 {
			w.Errorf("%d mails", n)
		}
	})
	w.Run("the lease of a process that has died", func() {
		email := newEmail()
		path := queued(email, "send_mail", lost)
		w.exec(`update users set lease_owner = 'dead', due_at = now() + interval '1 hour' where user_id = $1`, path[1:])
		runs := func() (n int) {
			fmt.Sscan(regexp.MustCompile(`(?m)^job_runs_total\{job="users",outcome="ok"\} (\d+)$`).FindStringSubmatch(string(w.management404("/metrics").Body))[1], &n)
			return n
		}
		before := runs()
		w.eventually("the loop runs", 10*time.Second, func() bool { return runs() > before+2 })
		w.invitations(email, 0) // it may still live
		w.exec(`update users set due_at = now() where user_id = $1`, path[1:])
		w.settle()
		w.agree(path[1:])
		w.invitations(email, 1)
	})
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

// TestOutages takes Keycloak, the mail server and PostgreSQL away.
func TestOutages(t *testing.T) {
	t.Parallel() // it waits for what is away
	w := newEnv(t, nil)
	const patience = 5*time.Second + 200*time.Millisecond // the answer itself has 5 s
	account := newEmail()
	session := w.session(account)
	health := func(status int, word string) {
		w.Helper()
		w.eventually("health is "+word, 15*time.Second, func() bool {
			a := w.get("/health")
			return a.Status == status && a.text("status") == word
		})
	}
	refused := func(calls ...call) {
		w.Helper()
		for _, a := range w.within(patience, calls...) {
			w.wants(a, 503, "unavailable")
		}
	}
	for _, outage := range []struct {
		name       string
		begin, end func()
		health     string
	}{
		{"Keycloak is stopped", func() { w.kc.close() }, func() { w.kc.open() }, "degraded"},
		{"PostgreSQL is stopped", func() { w.pg.close() }, func() { w.pg.open() }, "down"},
	} {
		w.Run(outage.name, func() {
			a, b, c, fresh := newEmail(), newEmail(), newEmail(), newEmail()
			first, second := registered(w, a, password), registered(w, b, password)
			registered(w, c, password)
			leaving := w.signsIn(account)
			outage.begin()
			refused(registering(fresh, password), verifying(first), typing(b, second.Code), resending(c), signingIn(account, password), refreshing(session.Token))
			if outage.health == "down" {
				refused(loggingOut(leaving.text("refresh_token")), forgetting(account),
					authorized(session.Key, "GET", sessionsPath), authorized(session.Key, "DELETE", sessionsPath))
			} else {
				for _, r := range []call{loggingOut(leaving.text("refresh_token")), authorized(session.Key, "DELETE", sessionsPath+"/"+leaving.text("session_id"))} {
					w.wants(w.do(r), map[string]int{"POST": 204, "DELETE": 404}[r.method], map[string]string{"DELETE": "not-found"}[r.method])
				}
			}
			health(map[string]int{"degraded": 200, "down": 503}[outage.health], outage.health)
			outage.end()
			health(200, "ok")
			w.wants(w.do(registering(fresh, password)), 201, "")
			w.wants(w.do(verifying(first)), 200, "")
			w.wants(w.do(typing(b, second.Code)), 200, "")
			w.wants(w.do(resending(c)), 429, "resend-too-soon") // and not: limited by the try
			w.wants(w.do(signingIn(account, password)), 200, "")
			w.wants(w.do(loggingOut(leaving.text("refresh_token"))), 204, "")
			session.Token = w.do(refreshing(session.Token)).text("refresh_token")
			w.settle()
		})
	}
	w.Run("Keycloak hangs", func() {
		a, b, fresh := newEmail(), newEmail(), newEmail()
		first, second := registered(w, a, password), registered(w, b, password)
		leaving := w.signsIn(account).text("refresh_token")
		calls := []call{registering(fresh, password), verifying(first), typing(b, second.Code), resending(b), signingIn(account, password), refreshing(session.Token)}
		for len(calls) < 20 {
			calls = append(calls, registering(newEmail(), password), signingIn(account, password), registering(newEmail(), ""))
		}
		release := w.kc.block()
		refused(calls...)
		w.wants(w.within(patience, loggingOut(leaving))[0], 204, "")
		release()
		w.wants(w.do(refreshing(session.Token)), 200, "")
		w.wants(w.do(registering(fresh, password)), 201, "")
		w.wants(w.do(verifying(first)), 200, "")
		w.settle()
	})
	w.Run("the mail server is stopped", func() {
		w.mail.Close()
		email := newEmail()
		if a := w.register(email); a.text("verification_email") != "queued" {
			w.Errorf("not queued: %v", a)
		}
		for range 3 { // tries that fail
			tried := w.kc.count("send_mail")
			w.exec(`update user_registrations set due_at = now() where mail_state = 'queued' and lease_owner is null`)
			w.eventually("another try", 10*time.Second, func() bool { return w.kc.count("send_mail") > tried })
			w.eventually("its end", 10*time.Second, func() (over bool) {
				w.pool.QueryRow(w.Context(), `select not exists (select from user_registrations where lease_owner is not null)`).Scan(&over)
				return over
			})
		}
		if err := w.mail.Restart(); err != nil {
			w.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
		defer cancel()
		m, err := w.mail.WaitFor(ctx, email, 1) // by itself
		if err != nil {
			w.Fatal(err)
		}
		var hits int
		if err := w.pool.QueryRow(w.Context(), `select hits from rate_limits where key = $1`, mailsADay(email).Key).Scan(&hits); err != nil || hits != 1 {
			w.Errorf("%d mails were counted, not 1 (%v)", hits, err)
		}
		w.wants(w.do(typing(email, w.readLink(m).Code)), 200, "")
	})
	w.Run("the mail window is left open, and the next mail must wait", func() {
		email := newEmail()
		w.kc.on("^send_mail ", applied)
		w.kc.on("^disable_user ", lost)
		w.register(email)
		w.kc.on("^send_mail ", 0)
		w.kc.on("^disable_user ", 0)
		w.exec(`update user_registrations set due_at = now() where mail_state = 'queued' and lease_owner is null`)
		w.check() // disabled long before the cooldown's end
		w.wants(w.do(typing(email, w.readMail(email, 1).Code)), 200, "")
	})
	w.Run("both are down at the start", func() {
		w.kc.close()
		w.pg.close()
		ended := w.startBlind()
		defer ended()
		health(503, "down")
		w.pg.open()
		health(200, "degraded")
		w.kc.open()
		health(200, "ok")
		w.account(newEmail())
	})
}

// startBlind starts an instance without waiting for its schema, and makes it the
// one that is spoken to, until the returned function ends it.
func (w *env) startBlind() (end func()) {
	w.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	logs, ended := new(buffer), make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return w.vars[name] }, io.Discard, io.MultiWriter(logs, w.logs))
	}()
	url, management := w.url, w.management
	w.url = w.listening(logs)
	return func() {
		w.url, w.management = url, management
		cancel()
		if err := <-ended; err != nil {
			w.Error(err)
		}
	}
}

// listening waits until an instance says where it listens.
func (w *env) listening(logs *buffer) (url string) {
	w.Helper()
	var line struct{ Address, Management string }
	if err := logs.waitFor(30*time.Second, func(text string) bool {
		return json.Unmarshal([]byte(regexp.MustCompile(`(?m)^.*"msg":"listening".*$`).FindString(text)), &line) == nil
	}); err != nil {
		w.Fatalf("the service did not start: %v\n%s", err, logs)
	}
	w.management = line.Management
	return "http://" + line.Address
}
