package main

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"maps"
	"math"
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
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	gonanoid "github.com/matoous/go-nanoid/v2"
)

// caller is who does something, for every flow and every audit entry. Workers are callers, too.
type caller struct {
	principal        // of the access token; zero for everybody else
	Actor     string // anonymous, USR-…, system:sync
	Address   string // of the client, "" for loops
	UserAgent string
	RequestID string
	Language  string // Accept-Language as sent, for mails and pages
}

const anonymous = "anonymous"

// system is the caller of a worker.
func system(name string) caller { return caller{Actor: "system:" + name} }

// metrics are what Prometheus sees. Labels are bounded: route pattern, method,
// status class, operation; never a path, a user or an error's text.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.HistogramVec
	keycloak *prometheus.HistogramVec
	problems *prometheus.CounterVec
	panics   prometheus.Counter
	tasks    *prometheus.CounterVec
	mails    *prometheus.CounterVec
	reuse    prometheus.Counter
	synced   *prometheus.CounterVec
	dropped  *prometheus.CounterVec
}

func newMetrics(st *store, now func() time.Time) *metrics {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	f := promauto.With(reg)
	seconds := func(name, help string, labels ...string) *prometheus.HistogramVec {
		return f.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help,
			Buckets: []float64{.002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}}, labels)
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{Name: "database_connections_in_use", Help: "Of the pool."},
		func() float64 { return float64(st.pool.Stat().AcquiredConns()) })
	f.NewGaugeFunc(prometheus.GaugeOpts{Name: "task_oldest_due_seconds",
		Help: "How long the oldest task that is due has waited; NaN: PostgreSQL does not say."}, func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		age, err := st.oldestTask(ctx, now())
		if err != nil {
			return math.NaN()
		}
		return age.Seconds()
	})
	return &metrics{
		registry: reg,
		requests: seconds("http_request_duration_seconds", "Time to answer a request.", "route", "method", "status"),
		keycloak: seconds("keycloak_call_duration_seconds", "Time of calls to Keycloak.", "operation", "outcome"),
		problems: counter("problems_total", "Errors answered to clients, by problem type.", "type"),
		panics:   counter("panics_total", "Handlers that panicked.").WithLabelValues(),
		tasks:    counter("tasks_total", "Tasks of the queue that were done or have failed.", "kind", "outcome"),
		mails:    counter("verification_mails_total", "Verification mails handed to Keycloak.", "outcome"),
		reuse:    counter("refresh_token_reuse_total", "Sessions ended because of an old token.").WithLabelValues(),
		synced:   counter("sync_differences_total", "Differences that full passes found.", "class", "outcome"),
		dropped:  counter("audit_refusals_dropped_total", "Refusals that were too many to be audited.", "action"),
	}
}

type (
	requestIDKey struct{}
	clientKey    struct{} // of the client's address
)

// requestIDPattern is what a request id from outside must look like to be kept:
// it ends up in logs and in the audit log.
var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{8,64}$`)

// withRequestID gives every request and response an X-Request-Id.
func withRequestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-Id")
		if !requestIDPattern.MatchString(id) {
			id = gonanoid.Must()
		}
		w.Header().Set("X-Request-Id", id)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id)))
	})
}

// withClient tells Keycloak's events and its guard, and those who wait for a key, whose request it is.
func (s *server) withClient(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), clientKey{}, s.clientAddress(r))))
	})
}

// clientOf is the address of the client whose request a context is of; invalid: it is a worker's.
func clientOf(ctx context.Context) netip.Addr {
	addr, _ := ctx.Value(clientKey{}).(netip.Addr)
	return addr
}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// logHandler puts the request id into every line that is logged with a request's context.
type logHandler struct{ slog.Handler }

func (h logHandler) Handle(ctx context.Context, rec slog.Record) error {
	if id := requestID(ctx); id != "" {
		rec.AddAttrs(slog.String("request_id", id))
	}
	return h.Handler.Handle(ctx, rec)
}

func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return logHandler{h.Handler.WithAttrs(attrs)}
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.LogFormat == "text" {
		return slog.New(logHandler{slog.NewTextHandler(w, options)})
	}
	return slog.New(logHandler{slog.NewJSONHandler(w, options)})
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
				s.log.ErrorContext(r.Context(), "panic", "route", r.Pattern, "panic", p, "stack", string(debug.Stack()))
				if sw.status == 0 {
					s.writeProblem(sw, r, problemInternal)
				}
			}
			route := cmp.Or(r.Pattern, "none") // unknown paths and methods are the client's choice: not a label
			method, _, ok := strings.Cut(route, " ")
			if !ok {
				method = "" // of a route for all methods
			}
			sw.status = cmp.Or(sw.status, http.StatusOK) // nothing written: net/http does
			took := time.Since(start)
			s.metrics.requests.WithLabelValues(route, method, strconv.Itoa(sw.status/100)+"xx").Observe(took.Seconds())
			level := slog.LevelInfo
			if strings.Contains(route, validatePath) || strings.HasPrefix(route, envoyPath) {
				level = slog.LevelDebug // one for each request of an application: that one's log has it
			}
			if !s.log.Enabled(r.Context(), level) {
				return
			}
			s.log.Log(r.Context(), level, "request", "route", route, "method", method, "status", sw.status,
				"ms", took.Milliseconds(), "client", s.clientAddress(r).String())
		}()
		next.ServeHTTP(sw, r)
	})
}

// withSecurityHeaders sets what every answer has.
func withSecurityHeaders(https bool, next http.Handler) http.Handler {
	headers := http.Header{
		"Cache-Control":              {"no-store"},
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
		Origins:         origins,
		Credentialed:    true,
		Methods:         []string{"GET", "POST", "PATCH", "DELETE"},
		RequestHeaders:  []string{"Authorization", "Content-Type", "X-Request-Id"},
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
		next, err := hopAddress(hop)
		if err != nil || !s.trusts(addr) {
			break // of a trusted proxy that wrote something else ("unknown") its own address is what we know
		}
		addr = next
	}
	return addr
}

// hopAddress reads an address with or without a port.
func hopAddress(hop string) (netip.Addr, error) {
	hop = strings.TrimSpace(hop)
	addr, err := netip.ParseAddr(hop)
	if ap, e := netip.ParseAddrPort(hop); e == nil {
		addr, err = ap.Addr(), nil
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
	return caller{
		principal: p,
		Actor:     cmp.Or(string(p.UserID), anonymous),
		Address:   s.clientAddress(r).String(),
		UserAgent: strings.ReplaceAll(agent, "\x00", ""), // PostgreSQL has no NUL in text
		RequestID: requestID(r.Context()),
		Language:  r.Header.Get("Accept-Language"),
	}
}

// detached keeps a flow going when its client hangs up: what was begun in two
// stores is brought to an end, within d.
func detached(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}
