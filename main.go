// Auth-service lets people register themselves in front of Keycloak, and signs
// them in.
//
//	auth-service              serve until SIGTERM
//	auth-service jobs         do once what is due in the queue, for an outside cron
//	auth-service migrate      bring the schema to this version, as the owner of the tables
//	auth-service grant-admin EMAIL    make a user an administrator
//	auth-service sync [-dry-run]      make both stores agree on all users; exit 3 if they differ then
//	auth-service doctor [-fix]        check this deployment, and fix the realm; exit 1 if something is wrong; see -h
//	auth-service healthcheck  exit 0 if the service on this machine is alive
//	auth-service version
//
// Everything is configured by environment variables: see config. Keycloak owns
// identity and passwords, PostgreSQL authorization, status and audit; the service
// keeps the two in sync, in the order of writes that registration.go describes.
//
// The route table in handlers.go is the index of the program. docs/design.md has a reading order,
// the order of writes of each flow, and what happens if the process dies between two of them.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof" // #nosec G108 -- on the management listener, and for this machine only
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // a few megabytes more of heap for a tenth less CPU
	}
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "auth-service:", err)
		if errors.Is(err, errDiffer) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

// run does what args say. It is what tests start.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	actor := "cli:" + cmp.Or(getenv("SUDO_USER"), getenv("USER"), getenv("LOGNAME"), "unknown")
	var do func(s *server) error
	switch command := strings.Join(args, " "); {
	case command == "version":
		_, err := fmt.Fprintln(stdout, version())
		return err
	case len(args) > 0 && args[0] == "doctor":
		return runDoctor(ctx, args[1:], getenv, stdout)
	case len(args) == 0:
		do = func(s *server) error { return s.serve(ctx) }
	case command == "healthcheck":
		do = (*server).healthcheck
	case command == "migrate":
		do = func(s *server) error { return s.migrate(ctx, true) }
	case command == "jobs":
		do = func(s *server) error { return s.workUntilIdle(ctx) }
	case command == "sync", command == "sync -dry-run":
		do = func(s *server) error { return s.syncCommand(ctx, command != "sync", actor, stdout) }
	case len(args) == 2 && args[0] == "grant-admin":
		do = func(s *server) error { return s.grantAdmin(ctx, args[1], actor, stdout) }
	default:
		return fmt.Errorf("unknown command %q; see the package comment in main.go", args)
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return fmt.Errorf("the configuration is wrong:\n%w", err)
	}
	s, err := newServer(ctx, cfg, newLogger(stderr, cfg))
	if err != nil {
		return err
	}
	defer s.store.pool.Close()
	return do(s)
}

// server holds every dependency of the service.
type server struct {
	cfg             config
	log             *slog.Logger
	store           *store
	kc              *keycloak
	verifier        *verifier
	origins         *http.CrossOriginProtection // from which the cookie is taken
	metrics         *metrics
	now             func() time.Time // a field, so that a test can move it
	openAPIDocument []byte
	handle          func(context.Context, task) (time.Time, error) // does the work of a task: handleTask
	wake            chan struct{}                                  // a worker may find something due
	dropWarned      minutely                                       // about refusals that are not audited
	busyWarned      minutely                                       // about requests refused because too much waits
	stopping        atomic.Bool                                    // told by /readyz, so that the load balancer looks away
	certificate     atomic.Pointer[tls.Certificate]                // of the public listener, the last one that was good
	health          struct {                                       // the last answer
		sync.Mutex
		at   time.Time
		last healthOut
	}
}

// minutely is for warnings that would come in floods: the minute of the last one.
type minutely struct{ atomic.Int64 }

// again says whether it is time for another.
func (m *minutely) again(now time.Time) bool {
	minute := now.Unix() / 60
	return m.Swap(minute) != minute
}

// newServer connects to nothing yet: the service starts while Keycloak or
// PostgreSQL is down.
func newServer(ctx context.Context, cfg config, log *slog.Logger) (*server, error) {
	st, err := openStore(ctx, cfg.DatabaseURL, log)
	if err != nil {
		return nil, err
	}
	origins := http.NewCrossOriginProtection()
	for _, origin := range append([]string{origin(cfg.PublicURL)}, cfg.CORSOrigins...) {
		if err := origins.AddTrustedOrigin(origin); err != nil {
			return nil, fmt.Errorf("CORS_ALLOWED_ORIGINS: %w", err)
		}
	}
	now := func() time.Time { return time.Now().Truncate(time.Microsecond) } // as exact as PostgreSQL keeps it
	m := newMetrics()
	st.registrations = m.registrations
	kc := newKeycloak(cfg, m)
	s := &server{cfg: cfg, log: log, store: st, kc: kc, verifier: newVerifier(cfg, kc, now), origins: origins,
		metrics: m, now: now, wake: make(chan struct{}, 1)}
	s.handle = s.handleTask
	m.watch(s)
	return s, nil
}

// serve runs the listeners and loops until ctx ends. Then it says that it is not ready and serves on for
// SHUTDOWN_DELAY, until nobody sends requests any more; then it closes the listeners and lets requests in
// flight finish.
func (s *server) serve(ctx context.Context) error {
	handler, err := s.handler()
	if err == nil && s.cfg.TLSCertFile != "" {
		err = s.readCertificate(ctx)
	}
	if err != nil {
		return err
	}
	public, err1 := net.Listen("tcp", net.JoinHostPort(s.cfg.Host, fmt.Sprint(s.cfg.Port)))
	management, err2 := net.Listen("tcp", s.cfg.ManagementAddr)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	quiet := slog.NewLogLogger(s.log.Handler(), slog.LevelDebug) // TLS handshakes that fail and the like
	listener := func(handler http.Handler, writeTimeout time.Duration) *http.Server {
		return &http.Server{Handler: handler, ErrorLog: quiet, ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout: 15 * time.Second, WriteTimeout: writeTimeout, IdleTimeout: s.cfg.IdleTimeout, MaxHeaderBytes: 32 << 10}
	}
	api := listener(s.closeWhileStopping(handler), flowTime+20*time.Second)
	mgmt := listener(s.managementHandler(), time.Minute) // a profile takes half of it

	loops, stopLoops := context.WithCancel(context.WithoutCancel(ctx)) // it ends after stopping is set
	var running sync.WaitGroup
	running.Go(func() { s.verifier.keepKeys(loops) })
	running.Go(func() {
		s.migrateOnce(loops)
		running.Go(func() { every(loops, revocationPoll, s.log, "revocations", s.pollRevocations) })
		if s.cfg.JobInterval > 0 {
			for range workers {
				running.Go(func() { s.work(loops) })
			}
		}
	})
	serve := api.Serve
	if s.cfg.TLSCertFile != "" {
		running.Go(func() { every(loops, certificatePoll, s.log, "certificate", s.readCertificate) })
		api.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.currentCertificate}
		serve = func(l net.Listener) error { return api.ServeTLS(l, "", "") }
	}
	failed := make(chan error, 2)
	go func() { failed <- mgmt.Serve(management) }()
	go func() { failed <- serve(public) }()
	s.log.Info("listening", "address", public.Addr().String(), "management", management.Addr().String())

	select {
	case err = <-failed:
	case <-ctx.Done():
		s.stopping.Store(true)
		s.log.Info("stopping: not ready any more", "delay", s.cfg.ShutdownDelay.String())
		select {
		case err = <-failed:
		case <-time.After(s.cfg.ShutdownDelay):
		}
	}
	s.log.Info("stopping: requests in flight may finish")
	stopLoops()
	grace, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	err = errors.Join(err, api.Shutdown(grace), mgmt.Shutdown(grace))
	running.Wait()
	return err
}

// closeWhileStopping closes each connection after its request while the service stops (RFC 9112 §9.6): a client that
// keeps it might send the next request just when Shutdown closes it.
func (s *server) closeWhileStopping(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.stopping.Load() {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

const (
	drainTime       = flowTime + 5*time.Second // for requests in flight, when the service stops
	certificatePoll = time.Second
)

// readCertificate reads the certificate and its key, which may have been renewed. Of files that are broken or do not
// fit together it returns the error, and the last good pair stays.
func (s *server) readCertificate(context.Context) error {
	pair, err := tls.LoadX509KeyPair(s.cfg.TLSCertFile, s.cfg.TLSKeyFile)
	if err == nil {
		s.certificate.Store(&pair)
	}
	return err
}

func (s *server) currentCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.certificate.Load(), nil
}

// handleTask does the work of a locked task, and returns when it must be done again. The flows have it as a
// field, s.handle: they say that a task must be done, and do not call back.
func (s *server) handleTask(ctx context.Context, t task) (time.Time, error) {
	if t.ID == "job:sync" {
		return s.syncTask(ctx, t)
	}
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	switch t.kind() {
	case "REG":
		return s.resume(ctx, system("registrations"), t)
	case "SES":
		return s.endSessionTask(ctx, t)
	case "notice":
		return s.mailTask(ctx, t, s.notify)
	case "reset":
		return s.mailTask(ctx, t, s.mailReset)
	case "kc":
		return s.reconcileTask(ctx, t)
	case "events":
		return s.readEvents(ctx, t)
	case "sweep":
		return s.now().Add(max(s.cfg.JobInterval, time.Second)), s.sweep(ctx)
	}
	return never, nil // token, login, code: whoever held the lock has died
}

// recurring are the tasks that are always there.
var recurring = []string{"job:events", "job:sync", "job:sweep"}

const keepEnded = 30 * 24 * time.Hour // ended registrations and sessions

// sweep deletes what is over, and makes the partitions of the months to come.
func (s *server) sweep(ctx context.Context) error {
	return errors.Join(s.store.purge(ctx, s.now()), s.store.makeMonths(ctx, s.now()))
}

// workUntilIdle does what is due now. A recurring task must not be due again before the end,
// however short a pause the instances make.
func (s *server) workUntilIdle(ctx context.Context) error {
	s.cfg.JobInterval = max(s.cfg.JobInterval, 30*time.Second)
	err := s.migrate(ctx, false)
	for found := true; found && err == nil; {
		found, err = s.workOnce(ctx)
	}
	return err
}

// every runs f now and then at each interval, until ctx ends. Of failures in a row it logs the first.
func every(ctx context.Context, interval time.Duration, log *slog.Logger, name string, f func(context.Context) error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for failed := false; ctx.Err() == nil; {
		err := f(ctx)
		if err != nil && !failed && ctx.Err() == nil {
			log.Warn(name+": failed, will retry", "error", err)
		}
		failed = err != nil
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// migrate brings the schema up to date, and what must always be there.
func (s *server) migrate(ctx context.Context, again bool) error {
	if err := s.store.migrate(ctx, again); err != nil {
		return err
	}
	return errors.Join(s.store.makeMonths(ctx, s.now()), s.store.enqueue(ctx, s.now(), recurring...))
}

// migrateOnce migrates as soon as PostgreSQL answers.
func (s *server) migrateOnce(ctx context.Context) {
	ctx, done := context.WithCancel(ctx)
	defer done()
	every(ctx, time.Second, s.log, "migrate", func(ctx context.Context) error {
		err := s.migrate(ctx, false)
		if err == nil {
			s.log.Info("schema: current")
			done()
		}
		return err
	})
}

// managementHandler asks neither PostgreSQL nor Keycloak: their absence takes no instance out of
// service. Profiles are for this machine only.
func (s *server) managementHandler() http.Handler {
	mux := http.NewServeMux()
	say := func(w http.ResponseWriter, status int, text string) {
		respond(w, status, "text/plain; charset=utf-8", []byte(text+"\n"))
	}
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) { say(w, 200, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case s.stopping.Load():
			say(w, 503, "stopping")
		case s.verifier.keys.Load().byID == nil:
			say(w, 503, "Keycloak's keys have not been read yet")
		case s.verifier.revoked.lastRead().IsZero():
			say(w, 503, "the revocations have not been read yet")
		default:
			say(w, 200, "ok")
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/debug/pprof/", func(w http.ResponseWriter, r *http.Request) {
		if peer, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || !peer.Addr().Unmap().IsLoopback() {
			http.NotFound(w, r)
			return
		}
		http.DefaultServeMux.ServeHTTP(w, r) // where net/http/pprof is, and nothing else
	})
	return mux
}

// healthcheck asks the management listener of this machine, for Docker.
func (s *server) healthcheck() error {
	host, port, _ := net.SplitHostPort(s.cfg.ManagementAddr) // loadConfig has tried that
	if addr, err := netip.ParseAddr(host); err == nil && addr.IsUnspecified() {
		host = "" // this machine, to Dial; it may have no IPv6
	}
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(host, port))
	}
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DialContext: dial}} // without a proxy
	resp, err := client.Get("http://management/livez")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the service answers %s", resp.Status)
	}
	return nil
}

// release is set by the build of the container: -ldflags "-X main.release=v1.2.3".
var release string

// version is what the build was told, else what Go has made of the commit.
func version() string {
	info, _ := debug.ReadBuildInfo()
	return cmp.Or(release, info.Main.Version, "unknown")
}
