package main

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"auth-service/templates"

	"github.com/jub0bs/cors"

	gonanoid "github.com/matoous/go-nanoid/v2"
)

// caller is who does something, for every flow and every audit entry. Workers are callers, too.
type caller struct {
	principal        // of the access token; zero for everybody else
	Actor     string // anonymous, USR-…, system:sync
	Address   string // of the client, "" for loops
	UserAgent string
	RequestID string
	Language  string // chosen by ?lang=, or Accept-Language as sent; for mails
}

const anonymous = "anonymous"

// system is the caller of a worker.
func system(name string) caller { return caller{Actor: "system:" + name} }

// request is what is known of the request that a context belongs to. A worker's context has none.
type request struct {
	ID     string
	Client netip.Addr  // its address
	Trace  http.Header // traceparent and tracestate as they came; nil: none, or not well-formed
}

type requestKey struct{}

// requestOf returns the request of a context; the zero one is a worker's.
func requestOf(ctx context.Context) request {
	q, _ := ctx.Value(requestKey{}).(request)
	return q
}

// clientNetwork is who sent the request, as limits count it.
func clientNetwork(ctx context.Context) string { return network(requestOf(ctx).Client) }

// requestIDPattern is what a request id from outside must look like to be kept:
// it ends up in logs and in the audit log.
var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{8,64}$`)

// traceparentPattern is version 00 of W3C Trace Context §3.2: the ids of the trace and of the caller's span.
var traceparentPattern = regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)

// traceOf returns the trace context of a request. One that is not well-formed counts for nothing, nor does an id that
// is all zeros. A tracestate of more than 512 characters need not go on (§3.3.1.5).
func traceOf(h http.Header) http.Header {
	parent := h["Traceparent"]
	if len(parent) != 1 || !traceparentPattern.MatchString(parent[0]) ||
		strings.Trim(parent[0][3:35], "0") == "" || strings.Trim(parent[0][36:52], "0") == "" {
		return nil
	}
	trace := http.Header{"Traceparent": parent}
	if state := strings.Join(h["Tracestate"], ","); state != "" && len(state) <= 512 {
		trace.Set("Tracestate", state)
	}
	return trace
}

// sentID is the id that a request brings along, if it is well-formed, or "".
func sentID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); requestIDPattern.MatchString(id) {
		return id
	}
	return ""
}

func sentOrNewID(r *http.Request) string {
	if id := sentID(r); id != "" {
		return id
	}
	return gonanoid.Must()
}

// withRequest finds out once what belongs to a request: its id, which the answer has, too, its client, and its trace.
func (s *server) withRequest(idOf func(*http.Request) string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := idOf(r)
		if id != "" {
			w.Header().Set("X-Request-Id", id)
		}
		q := request{id, s.clientAddress(r), traceOf(r.Header)}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, q)))
	})
}

// logHandler puts the ids of the request and of its trace into every line that is logged with a request's context.
type logHandler struct{ slog.Handler }

func (h logHandler) Handle(ctx context.Context, rec slog.Record) error {
	q := requestOf(ctx)
	if q.ID != "" {
		rec.AddAttrs(slog.String("request_id", q.ID))
	}
	if parent := q.Trace.Get("Traceparent"); parent != "" {
		rec.AddAttrs(slog.String("trace_id", parent[3:35]), slog.String("span_id", parent[36:52])) // of the caller
	}
	return h.Handler.Handle(ctx, rec)
}

func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return logHandler{h.Handler.WithAttrs(attrs)}
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	var h slog.Handler = slog.NewJSONHandler(w, options)
	if cfg.LogFormat == "text" {
		h = slog.NewTextHandler(w, options)
	}
	return slog.New(logHandler{h}).With("service.version", version())
}

// statusWriter remembers the status that was answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = cmp.Or(w.status, status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	return w.ResponseWriter.Write(b)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// routeOf is the route of a request without its method, as OpenTelemetry has http.route. Unknown paths are the client's
// choice: they are no label.
func routeOf(r *http.Request) string {
	return cmp.Or(r.Pattern[strings.Index(r.Pattern, " ")+1:], "none")
}

// methodOf is the method of a request, as OpenTelemetry has http.request.method: one that a client makes up is _OTHER.
func methodOf(r *http.Request) string {
	switch r.Method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE":
		return r.Method
	}
	return "_OTHER"
}

// withLog logs and measures every request by its route pattern: the URL may hold
// a token. A panic becomes a 500 like any other unexpected error.
func (s *server) withLog(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		sw := &statusWriter{ResponseWriter: w}
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.metrics.panics.Inc()
				s.log.ErrorContext(r.Context(), "panic", "http.route", routeOf(r), "http.request.method", methodOf(r),
					"panic", p, "stack", string(debug.Stack()))
				if sw.status == 0 {
					s.writeProblem(sw, r, problemInternal)
				}
			}
			sw.status = cmp.Or(sw.status, http.StatusOK) // nothing written: net/http does
			route, method, class := routeOf(r), methodOf(r), strconv.Itoa(sw.status/100)+"xx"
			took, level := time.Since(start), slog.LevelInfo
			if route == validatePath || route == envoyPath {
				s.metrics.validations[class].Observe(took.Seconds())
				level = slog.LevelDebug // one for each request of an application: that one's log has it
			} else {
				s.metrics.requests.WithLabelValues(route, method, class).Observe(took.Seconds())
			}
			if !s.log.Enabled(r.Context(), level) {
				return
			}
			s.log.Log(r.Context(), level, "request", "http.route", route, "http.request.method", method,
				"http.response.status_code", sw.status, "http.server.request.duration", took.Seconds(),
				"client.address", requestOf(r.Context()).Client.String())
		}()
		next.ServeHTTP(sw, r)
	})
}

var noStore = []string{"no-store"}

// withSecurityHeaders sets what every answer to people has.
func withSecurityHeaders(https bool, next http.Handler) http.Handler {
	headers := http.Header{
		"Cache-Control":              noStore,
		"Content-Security-Policy":    {templates.Policy}, // Swagger UI has its own
		"Cross-Origin-Opener-Policy": {"same-origin"},
		"Referrer-Policy":            {"same-origin"}, // the verification page's URL holds the token
		"X-Content-Type-Options":     {"nosniff"},
		"X-Frame-Options":            {"DENY"},
	}
	if https {
		headers.Set("Strict-Transport-Security", "max-age=31536000")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), headers)
		next.ServeHTTP(w, r)
	})
}

// newCORS allows the configured frontends, with credentials: the refresh token
// of the code flow is a cookie.
func newCORS(origins []string) (*cors.Middleware, error) {
	if len(origins) == 0 {
		return new(cors.Middleware), nil // passes everything on, allows nothing
	}
	return cors.NewMiddleware(cors.Config{
		Origins:      origins,
		Credentialed: true,
		Methods:      []string{"GET", "POST", "PATCH", "DELETE"},
		RequestHeaders: []string{"Authorization", "Baggage", "Content-Type", "Sentry-Trace", "Traceparent", "Tracestate",
			"X-Request-Id"},
		ResponseHeaders: []string{"Location", "Retry-After", "WWW-Authenticate", "X-Request-Id"},
		MaxAgeInSeconds: 600,
	})
}

// clientAddress is the rightmost address that no trusted proxy has added. What
// stands further left in X-Forwarded-For is whatever the client liked to send.
func (s *server) clientAddress(r *http.Request) netip.Addr {
	addr, _ := hopAddress(r.RemoteAddr)
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, hop := range slices.Backward(hops) {
		if !s.trusts(addr) {
			break
		}
		next, err := hopAddress(hop)
		if err != nil {
			break // of a trusted proxy that wrote something else ("unknown") its own address is what we know
		}
		addr = next
	}
	return addr
}

// hopAddress reads an address with or without a port.
func hopAddress(hop string) (netip.Addr, error) {
	hop = strings.TrimSpace(hop)
	ap, err := netip.ParseAddrPort(hop)
	addr := ap.Addr()
	if err != nil {
		addr, err = netip.ParseAddr(hop)
	}
	return addr.Unmap().WithZone(""), err
}

func (s *server) trusts(addr netip.Addr) bool {
	return slices.ContainsFunc(s.cfg.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// network is what limits count an address as: an IPv6 client has a whole /64.
func network(addr netip.Addr) string {
	if addr.Is6() {
		return netip.PrefixFrom(addr, 64).Masked().String()
	}
	return addr.String()
}

// caller is who sent the request.
func (s *server) caller(r *http.Request) caller {
	agent := r.UserAgent()
	agent = strings.ToValidUTF8(agent[:min(len(agent), 300)], "")
	p, _ := r.Context().Value(principalKey{}).(principal)
	q := requestOf(r.Context())
	return caller{
		principal: p,
		Actor:     cmp.Or(string(p.UserID), anonymous),
		Address:   q.Client.String(),
		UserAgent: strings.ReplaceAll(agent, "\x00", ""), // PostgreSQL has no NUL in text
		RequestID: q.ID,
		Language:  cmp.Or(s.chosenLanguage(r), r.Header.Get("Accept-Language")),
	}
}

// detached keeps a flow going when its client hangs up: what was begun in two
// stores is brought to an end, within d.
func detached(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

const (
	languageCookie = "language" // what a browser has chosen by ?lang=
	keepLanguage   = 365 * 24 * time.Hour
)

// chosenLanguage is the language that somebody has chosen, by ?lang= now or by a cookie earlier, or "".
func (s *server) chosenLanguage(r *http.Request) string {
	if lang := r.URL.Query().Get("lang"); s.cfg.site.Has(lang) {
		return lang
	}
	cookie, err := r.Cookie(s.hostCookie(languageCookie, "", 0).Name)
	if err != nil || !s.cfg.site.Has(cookie.Value) {
		return ""
	}
	return cookie.Value
}
