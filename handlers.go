package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"time"

	"auth-service/templates"

	"github.com/a-h/templ"
)

// maxBody is the largest request body, in bytes.
const maxBody = 16 << 10

// access says who may call a route.
type access int

const (
	signedIn access = iota // whoever has a valid access token
	public                 // everybody
	gateways               // everybody; it is answered by gateway, before all that people need
)

// managed is what a route that manages one user may answer.
var managed = []problem{problemForbidden, problemAccountNotVerified, problemUserNotFound}

// route is one line of the program's index.
type route struct {
	Pattern string // "POST /api/v1/register"
	Aliases string // other paths, space separated
	Access  access
	Limit   limit  // of one client address
	Name    string // operation id, and action of the audit entries of refusals
	Summary string // "" = not in the OpenAPI document
	operation
}

// operation is what a route does, made by op or page.
type operation struct {
	Tag      string
	in, out  any // for the document
	status   int
	problems []problem
	handle   func(s *server, rt route) http.Handler
}

// routes is the index of the service: it feeds the mux and the OpenAPI document.
func (s *server) routes() []route { return append(s.apiRoutes(), s.pageRoutes()...) }

func (s *server) apiRoutes() []route {
	return []route{
		{"POST /api/v1/register", "/register /api/v1/auth/register", public, onRegister,
			"register", "Register", op("Registration", 201, s.register, problemRegistrationClosed, problemUserExists,
				problemResendLimit)},
		{"POST /api/v1/register/verify", "/verify", public, onVerify,
			"verify", "Confirm the e-mail address", op("Registration", 200, s.verify, problemUserExists, problemInvalidToken,
				problemInvalidCode, problemVerificationExpired, problemVerificationCancelled, problemTooManyAttempts)},
		{"POST /api/v1/register/resend", "/verify/resend", public, onResend,
			"resend", "Send the mail again", op("Registration", 200, s.resend, problemRegistrationNotFound,
				problemAlreadyVerified, problemVerificationExpired, problemResendTooSoon, problemResendLimit)},
		{"POST /api/v1/register/cancel", "", public, onVerify,
			"cancel", "Cancel: this was not me", op("Registration", 200, s.cancel, problemInvalidToken,
				problemAlreadyVerified, problemVerificationExpired)},
		{"GET /api/v1/registrations/{registration_id}", "", public, onStatus,
			"registrationStatus", "Status of a registration", op("Registration", 200, s.status, problemRegistrationNotFound)},

		{"POST /api/v1/auth/login", "/auth/login", public, onLogin,
			"login", "Sign in with a password", op("Signing in", 200, s.login, problemInvalidCredentials,
				problemOTPRequired, problemAccountNotVerified, problemAccountDisabled, problemAccountSetupRequired)},
		{"POST /api/v1/auth/password/forgot", "", public, onForgot,
			"forgotPassword", "Forgot the password", op("Signing in", 202, s.forgotPassword)},
		{"POST /api/v1/auth/refresh", "", public, onRefresh,
			"refresh", "Exchange a refresh token", op("Signing in", 200, s.refresh, problemInvalidRefreshToken,
				problemTokenReused, problemForbidden)},
		{"POST /api/v1/auth/logout", "", public, onRefresh,
			"logout", "Sign out", op("Signing in", 204, s.logout, problemForbidden)},
		{"GET /api/v1/auth/sessions", "", signedIn, onAccount,
			"sessions", "Where I am signed in", op("Signing in", 200, s.ownSessions)},
		{"DELETE /api/v1/auth/sessions/{session_id}", "", signedIn, onAccount,
			"endSession", "Sign out somewhere", op("Signing in", 204, s.endOwnSession, problemNotFound)},
		{"DELETE /api/v1/auth/sessions", "", signedIn, onAccount,
			"endSessions", "Sign out everywhere", op("Signing in", 204, s.endOwnSessions)},
		{"GET /api/v1/auth/me", "", signedIn, onAccount,
			"me", "Who am I", op("Signing in", 200, s.me, problemAccountDisabled)},
		{"GET /api/v1/users", "", signedIn, onUsers, "users", "List users", op("Users", 200, s.users)},
		{"POST /api/v1/users", "", signedIn, onUsers,
			"createUser", "Invite a user", op("Users", 201, s.createUser, problemForbidden, problemUserExists,
				problemResendLimit)},
		{"GET /api/v1/users/{user_id}", "", signedIn, onUsers,
			"user", "One user", op("Users", 200, s.user, problemUserNotFound)},
		{"PATCH /api/v1/users/{user_id}", "", signedIn, onUsers,
			"patchUser", "Change a user", op("Users", 200, s.patchUser,
				append(managed, problemLastAdmin, problemAddressUnproven)...)},
		{"DELETE /api/v1/users/{user_id}", "", signedIn, onUsers,
			"deleteUser", "Delete or erase a user", op("Users", 204, s.deleteUser, append(managed, problemLastAdmin)...)},
		{"POST /api/v1/users/{user_id}/restore", "", signedIn, onUsers,
			"restoreUser", "Restore a deleted user",
			op("Users", 200, s.restoreUser, append(managed, problemUserExists, problemUserGone)...)},
		{"GET /api/v1/users/{user_id}/sessions", "", signedIn, onUsers,
			"userSessions", "Where a user is signed in", op("Users", 200, s.userSessions, managed...)},
		{"DELETE /api/v1/users/{user_id}/sessions/{session_id}", "", signedIn, onUsers,
			"endUserSession", "Sign a user out somewhere",
			op("Users", 204, s.endUserSession, append(managed, problemNotFound)...)},
		{"DELETE /api/v1/users/{user_id}/sessions", "", signedIn, onUsers,
			"endUserSessions", "Sign a user out everywhere", op("Users", 204, s.endUserSessions, managed...)},
		{"GET /api/v1/audit", "", signedIn, onUsers,
			"auditEntries", "The audit log", op("Audit", 200, s.auditEntries, problemForbidden)},
		{"POST /api/v1/sync", "", signedIn, onUsers,
			"startSync", "Make both stores agree", op("Sync", 202, s.startSync, problemForbidden, problemSyncRunning)},
		{"GET /api/v1/sync/{sync_id}", "", signedIn, onUsers,
			"syncStatus", "Progress and report of a sync", op("Sync", 200, s.syncStatus, problemForbidden, problemNotFound)},

		{"GET " + validatePath, "", gateways, unlimited, "validate", "May this token pass (for gateways)", validateOp()},
		{envoyPath, "", gateways, unlimited, "validateEnvoy", "", operation{}},

		{"GET /health", "", public, unlimited,
			"health", "Health of the service and its two stores", op("Service", 200, s.checkHealth)},
		{"GET /api-docs/openapi.json", "", public, unlimited, "openapi", "", plain(s.openAPI)},
		{"GET /swagger-ui", "/swagger-ui/", public, unlimited, "swaggerUI", "", plain(swaggerUI(s.cfg))},
	}
}

func (s *server) pageRoutes() []route {
	return []route{
		{"GET /auth/login", "", public, onSignIn, "signInPage", "", page(s.signInPage)},
		{"GET /.well-known/change-password", "", public, unlimited, "changePassword", "", page(changePassword)},
		{"GET /auth/callback", "", public, onSignIn, "login", "", page(s.callbackPage)},
		{"GET /account/signed-in", "", public, unlimited, "signedInPage", "", show(templates.Message(templates.SignedIn()))},

		{"GET /{$}", "", public, unlimited, "home", "", show(templates.Home(s.cfg.Registration == invitedOnly))},
		{"GET /account/register", "", public, unlimited, "registerPage", "", show(s.registerPage())},
		{"POST /account/register", "", public, onRegister, "register", "", page(s.registerForm)},
		{"GET /account/mailed", "", public, unlimited, "mailedPage", "", page(s.mailedPage)},
		{"GET /account/verify", "", public, unlimited, "verifyPage", "", page(s.verifyPage)},
		{"POST /account/verify", "", public, onVerify, "verify", "", page(s.verifyForm)},
		{"GET /account/resend", "", public, unlimited, "resendPage", "", page(s.resendPage)},
		{"POST /account/resend", "", public, onResend, "resend", "", page(s.resendForm)},
		{"GET /account/cancel", "", public, unlimited, "cancelPage", "", page(s.cancelPage)},
		{"POST /account/cancel", "", public, onVerify, "cancel", "", page(s.cancelForm)},
		{"GET /account/verified", "", public, unlimited, "verifiedPage", "", show(templates.Message(templates.Verified("")))},
		{"GET /account/cancelled", "", public, unlimited,
			"cancelledPage", "", show(templates.Message(templates.Cancelled()))},
		{"GET /account/address", "", public, unlimited, "addressPage", "", page(s.addressPage)},
		{"GET /account/ready", "", public, unlimited, "readyPage", "", show(templates.Message(templates.PasswordSet()))},
		{"GET /problems/{slug}", "", public, unlimited, "problemPage", "", page(s.problemPage)},
		{"GET /static/{name}", "/favicon.ico /robots.txt", public, unlimited, "asset", "", plain(s.asset)},
	}
}

// handler is the whole HTTP interface: the routes, and what wraps all of them.
func (s *server) handler() (http.Handler, error) {
	mux := http.NewServeMux()
	routes := s.routes()
	s.openAPIDocument = sync.OnceValues(func() ([]byte, error) { return document(s.cfg, routes) })
	for _, rt := range routes {
		if rt.Access == gateways {
			continue
		}
		method, _, _ := strings.Cut(rt.Pattern, " ")
		h := rt.handle(s, rt)
		if rt.Access == signedIn {
			h = s.authenticated(rt, h)
		}
		h = s.limited(rt, h)
		patterns := []string{rt.Pattern}
		for alias := range strings.FieldsSeq(rt.Aliases) {
			patterns = append(patterns, method+" "+alias)
		}
		for _, pattern := range patterns {
			mux.Handle(pattern, h)
		}
		s.metrics.addRoute(rt.Name, patterns...)
	}
	corsMiddleware, err := newCORS(s.cfg.CORSOrigins)
	if err != nil {
		return nil, err
	}
	api := withSecurityHeaders(s.cfg.https(), corsMiddleware.Wrap(s.orProblem(mux)))
	return s.gateway(s.withRequest(sentOrNewID, s.withLog(api))), nil
}

// orProblem answers what the mux does not know with a problem, and a browser with its page; the mux itself
// would answer in plain text.
func (s *server) orProblem(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, pattern := mux.Handler(r)
		answer := recorder{header: http.Header{}}
		if pattern == "" {
			h.ServeHTTP(&answer, r)
			w.Header().Add("Vary", "Accept")
		}
		write := s.writeProblem
		if strings.Contains(r.Header.Get("Accept"), "text/html") {
			write = s.writeProblemPage
		}
		switch answer.status {
		case http.StatusMethodNotAllowed:
			w.Header().Set("Allow", answer.header.Get("Allow"))
			write(w, r, problemMethodNotAllowed)
		case http.StatusNotFound:
			write(w, r, problemNotFound)
		default: // also a path that the mux cleans
			mux.ServeHTTP(w, r)
		}
	})
}

// recorder keeps what a handler would answer.
type recorder struct {
	header http.Header
	status int
	bytes.Buffer
}

func (rec *recorder) Header() http.Header    { return rec.header }
func (rec *recorder) WriteHeader(status int) { rec.status = status }

// limited counts the request against the limit of its client's address.
func (s *server) limited(rt route, next http.Handler) http.Handler {
	if rt.Limit.N == 0 {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 4*time.Second) // a PostgreSQL that hangs is like one that is away
		defer cancel()
		if err := s.store.hit(ctx, s.now(), rt.Limit.of(clientNetwork(ctx))); err != nil {
			s.refuse(w, r, rt, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// refuse answers with err, on a page or in JSON as the route does. It audits every 403 and 429, every
// rejected write but those that are not well-formed, and what is refused about somebody (a target).
func (s *server) refuse(w http.ResponseWriter, r *http.Request, rt route, err error) {
	p := asProblem(err)
	reads := (r.Method == http.MethodGet || r.Method == http.MethodHead) && rt.Name != "login" // the callback signs in
	told := p.Status == http.StatusForbidden || p.Status == http.StatusTooManyRequests || p.target != ""
	if p.Status < 500 && p.slug() != problemInvalidRequest.slug() && (told || !reads) {
		s.recordRefusal(r.Context(), s.caller(r), rt.Name, p)
	}
	if rt.status == 0 { // a page, which says its status itself
		s.writeProblemPage(w, r, err)
		return
	}
	s.writeProblem(w, r, err)
}

// op adapts a typed operation to HTTP: it decodes and checks the input, calls, and encodes the
// answer or the problem. status is that of success.
func op[I, O any](tag string, status int, f func(context.Context, caller, I) (O, error),
	problems ...problem) operation {
	handle := func(s *server, rt route) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := detached(r.Context(), flowTime)
			defer cancel()
			var in I
			var out O
			err := s.decode(w, r, &in)
			if err == nil && rt.Access == signedIn { // the body may have come slowly: the token must be good by now
				_, err = s.bearer(r)
			}
			if err == nil {
				out, err = f(ctx, s.caller(r), in)
			}
			if err != nil {
				s.refuse(w, r, rt, err)
				return
			}
			s.writeJSON(w, r, status, out)
		})
	}
	return operation{tag, *new(I), *new(O), status, problems, handle}
}

// writeJSON encodes first, so that an answer is whole or an error. The answer may bring a cookie,
// its Location, or a status of its own.
func (s *server) writeJSON(w http.ResponseWriter, r *http.Request, status int, out any) {
	if c, ok := out.(interface{ cookie() *http.Cookie }); ok && c.cookie() != nil {
		http.SetCookie(w, c.cookie())
	}
	if _, empty := out.(noContent); empty {
		w.WriteHeader(status)
		return
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(out); err != nil {
		s.writeProblem(w, r, err)
		return
	}
	if l, ok := out.(interface{ location() string }); ok {
		w.Header().Set("Location", l.location())
	}
	if other, ok := out.(interface{ statusCode() int }); ok {
		status = other.statusCode()
	}
	respond(w, status, "application/json", body.Bytes())
}

// respond writes an answer that is whole.
func respond(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client has hung up
}

// view is a page and its status, or where the browser goes instead.
type view struct {
	Status   int
	Page     templ.Component
	Locale   string // the page's language, unless the browser has chosen one; "": what it prefers
	Location string
	Cookie   *http.Cookie
}

// goOn sends the browser on. After a form that was taken, to load the next page again sends nothing again.
func goOn(path string) view { return view{Status: http.StatusSeeOther, Location: path} }

// page adapts a function that makes a page. Forms come from this origin only (Sec-Fetch-Site, Origin), which is that
// of PUBLIC_URL: a proxy may have rewritten Host.
func page(f func(context.Context, caller, *http.Request) (view, error)) operation {
	return operation{handle: func(s *server, rt route) http.Handler {
		protection := http.NewCrossOriginProtection()
		_ = protection.AddTrustedOrigin(origin(s.cfg.PublicURL)) // newServer has tried that
		protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.refuse(w, r, rt, problemForbidden)
		}))
		return protection.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := detached(r.Context(), flowTime)
			defer cancel()
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			var v view
			err := r.ParseForm()
			if err != nil && r.Method == http.MethodPost {
				err = bodyError(err)
			} else { // of a link that was mangled, what can be read
				v, err = f(ctx, s.caller(r), r)
			}
			if err != nil {
				s.refuse(w, r, rt, err)
				return
			}
			s.writePage(w, r, v)
		}))
	}}
}

func (s *server) writePage(w http.ResponseWriter, r *http.Request, v view) {
	if v.Location != "" {
		http.SetCookie(w, v.Cookie)
		w.Header().Set("Location", v.Location)
		w.WriteHeader(v.Status)
		return
	}
	site, chosen := s.cfg.site, s.chosenLanguage(r)
	if chosen != "" && r.URL.Query().Has("lang") {
		http.SetCookie(w, s.hostCookie(languageCookie, chosen, int(keepLanguage.Seconds())))
	}
	var body bytes.Buffer
	ctx := site.Context(r.Context(), site.Match(chosen, v.Locale, r.Header.Get("Accept-Language")), r)
	if err := v.Page.Render(ctx, &body); err != nil {
		s.writeProblem(w, r, err)
		return
	}
	w.Header().Add("Vary", "Accept-Language, Cookie")
	respond(w, v.Status, "text/html; charset=utf-8", body.Bytes())
}

// writeProblemPage shows err to a person, with a way on.
func (s *server) writeProblemPage(w http.ResponseWriter, r *http.Request, err error) {
	p := s.report(r, err)
	setProblemHeaders(w.Header(), p)
	retry := p.retry
	if retry == "" && r.Method == http.MethodGet && !strings.HasPrefix(r.URL.Path, "//") { // another host
		retry = r.URL.RequestURI()
	}
	refused := templates.Refused(problemView(p), p.RequestID, retry)
	s.writePage(w, r, view{Status: p.Status, Page: templates.Message(refused)})
}

func problemView(p problem) templates.ProblemView {
	return templates.ProblemView{Slug: p.slug(), Title: p.Title, Status: p.Status, Text: p.Detail}
}

// plain adapts a handler that needs neither decoding nor encoding.
func plain(h http.HandlerFunc) operation {
	return operation{status: 200, handle: func(*server, route) http.Handler { return h }}
}

// asset answers with a file that pages ask for. It may be kept: its address has its hash. Browsers and robots ask for
// some by a fixed address.
func (s *server) asset(w http.ResponseWriter, r *http.Request) {
	name, cache := r.PathValue("name"), "public, max-age=31536000, immutable"
	if name == "" {
		name, cache = r.URL.Path[1:], "public, max-age=86400"
	}
	a, ok := s.cfg.site.Assets[name]
	if !ok {
		s.writeProblem(w, r, problemNotFound)
		return
	}
	w.Header().Set("Content-Type", a.Type)
	w.Header().Set("Cache-Control", cache)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.Content))
}

type healthOut struct {
	Status  string                 `json:"status" enum:"ok,degraded,down" description:"degraded: Keycloak is away; down: the database is."`
	Version string                 `json:"version"`
	Checks  map[string]healthCheck `json:"checks" description:"database and keycloak"`
}

type healthCheck struct {
	Status    string  `json:"status" enum:"ok,down"`
	LatencyMS float64 `json:"latency_ms"`
}

// statusCode is 503 only when the service can do nothing, so that a load balancer keeps an
// instance whose Keycloak is away.
func (h healthOut) statusCode() int {
	if h.Status == "down" {
		return http.StatusServiceUnavailable
	}
	return http.StatusOK
}

// checkHealth asks both stores, at most once a second, so that asking it often costs them nothing.
func (s *server) checkHealth(ctx context.Context, _ caller, _ struct{}) (healthOut, error) {
	s.health.Lock()
	defer s.health.Unlock()
	if time.Since(s.health.at) < time.Second {
		return s.health.last, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	probe := func(ping func(context.Context) error) healthCheck {
		start, status := time.Now(), "ok"
		if ping(ctx) != nil {
			status = "down"
		}
		return healthCheck{status, float64(time.Since(start).Microseconds()) / 1000}
	}
	var database, keycloak healthCheck
	var both sync.WaitGroup
	both.Go(func() { database = probe(s.store.ping) })
	both.Go(func() { keycloak = probe(s.kc.ping) })
	both.Wait()
	status := "ok"
	if database.Status != "ok" {
		status = "down"
	} else if keycloak.Status != "ok" {
		status = "degraded"
	}
	out := healthOut{status, version(), map[string]healthCheck{"database": database, "keycloak": keycloak}}
	s.health.at, s.health.last = time.Now(), out
	return out, nil
}
