// Auth-service lets people register themselves in front of Keycloak, and signs
// them in.
//
// "auth-service -h" is the manual of its commands, which are the table in commands.
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
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof" // #nosec G108 -- on the management listener, and for this machine only
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
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
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "auth-service:", err)
		switch {
		case errors.Is(err, errUsage):
			os.Exit(2)
		case errors.Is(err, errDiffer):
			os.Exit(3)
		}
		os.Exit(1)
	}
}

// errUsage ends the program with status 2.
var errUsage = errors.New("use -h for help")

// command is one that the program knows.
type command struct {
	use, flags, does string // use: the name, and an argument, which may be left out if it is in brackets
	server           bool   // it needs the configuration, and the server that follows from it
	run              func(*invocation, context.Context) error
}

// commands are all there are: what is parsed, and help, follow from them.
var commands = []command{
	{"serve", "", "serve until SIGTERM; also without a command", true, (*invocation).serve},
	{"jobs", "", "do once what is due in the queue, for an outside cron", true, (*invocation).workUntilIdle},
	{"migrate", "", "bring the schema to this version, as the owner of the tables", true,
		func(in *invocation, ctx context.Context) error { return in.migrate(ctx, true) }},
	{"grant-admin EMAIL", "", "make a user an administrator", true, (*invocation).grantAdmin},
	{"sync", "dry-run json", "make both stores agree on all users; exit 3 if they differ then", true, (*invocation).sync},
	{"doctor", "json admin-user admin-password-file fix dry-run",
		"check this deployment, and fix the realm; exit 1 if something is wrong", false, (*invocation).doctor},
	{"healthcheck", "", "exit 0 if the service on this machine is alive", true, (*invocation).healthcheck},
	{"version", "json", "print the version", false, (*invocation).version},
	{"help [COMMAND]", "", "list the commands, or the flags of one", false, (*invocation).help},
}

// invocation is a command that was called.
type invocation struct {
	*server                                // nil for commands that need none
	all                          []command // for help
	args                         []string  // without the flags
	getenv                       func(string) string
	actor                        string // for the audit log
	stdout, stderr               io.Writer
	json, dryRun, fix            bool
	adminUser, adminPasswordFile string
}

// dashed are flags that are commands.
var dashed = map[string]string{"-h": "help", "--h": "help", "-help": "help", "--help": "help", "-version": "version",
	"--version": "version"}

// run does what args say. It is what tests start. A command that was interrupted has failed.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		args = []string{"serve"}
	}
	if len(args) == 2 && cmp.Or(dashed[args[0]], args[0]) == "help" {
		args = []string{args[1], "-h"}
	}
	name := cmp.Or(dashed[args[0]], args[0])
	i := slices.IndexFunc(commands, func(c command) bool { return strings.HasPrefix(c.use+" ", name+" ") })
	if i < 0 {
		return fmt.Errorf("there is no command %q; %w", name, errUsage)
	}
	actor := "cli:" + cmp.Or(getenv("SUDO_USER"), getenv("USER"), getenv("LOGNAME"), "unknown")
	c, in := commands[i], &invocation{all: commands, getenv: getenv, actor: actor, stdout: stdout, stderr: stderr}
	if err := in.parse(c, args[1:]); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if c.server {
		cfg, err := loadConfig(getenv)
		if err != nil {
			return fmt.Errorf("the configuration is wrong:\n%w", err)
		}
		if in.server, err = newServer(ctx, cfg, newLogger(stderr, cfg)); err != nil {
			return err
		}
		defer in.store.pool.Close()
	}
	err := c.run(in, ctx)
	if ctx.Err() != nil && name != "serve" {
		err = errors.Join(context.Cause(ctx), err)
	}
	return err
}

// parse reads flags and arguments. It returns flag.ErrHelp after it has printed the flags.
func (in *invocation) parse(c command, args []string) error {
	var all, flags flag.FlagSet
	all.BoolVar(&in.json, "json", false, "report in JSON")
	all.BoolVar(&in.dryRun, "dry-run", false, "change nothing: only report what would be changed")
	all.BoolVar(&in.fix, "fix", false, "set the realm's settings as keycloak/realm.json has them; needs an administrator")
	all.StringVar(&in.adminUser, "admin-user", "", "the `name` of an administrator of Keycloak's realm master")
	all.StringVar(&in.adminPasswordFile, "admin-password-file", "", "the `file` with the administrator's password")
	for name := range strings.FieldsSeq(c.flags) {
		f := all.Lookup(name)
		flags.Var(f.Value, name, f.Usage)
	}
	flags.SetOutput(io.Discard)
	err := flags.Parse(args)
	in.args = flags.Args()
	_, arg, _ := strings.Cut(c.use, " ")
	switch most := min(len(arg), 1); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(in.stdout, "auth-service %s\n%s\n", c.use, c.does)
		flags.SetOutput(in.stdout)
		flags.PrintDefaults()
		return err
	case err != nil:
		return fmt.Errorf("%w; %w", err, errUsage)
	case len(in.args) > most:
		return fmt.Errorf("unexpected argument %q; %w", in.args[most], errUsage)
	case len(in.args) < most && arg[0] != '[':
		return fmt.Errorf("%s is missing; %w", arg, errUsage)
	}
	return nil
}

func (in *invocation) help(context.Context) error {
	text := "auth-service COMMAND\n\n"
	for _, c := range in.all {
		text += fmt.Sprintf("%-18s %s\n", c.use, c.does)
	}
	return in.print(nil, text+"\n\"auth-service COMMAND -h\" shows the flags of a command. README.md lists the "+
		"environment variables\nthat configure the service, docs/operating.md says more.\n")
}

func (in *invocation) version(context.Context) error {
	build := map[string]string{"version": version(), "go": runtime.Version()}
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			build["commit"] = s.Value
		}
	}
	return in.print(build, version()+"\n")
}

// print writes the text, or with -json v.
func (in *invocation) print(v any, text string) error {
	if in.json {
		encoded, _ := json.MarshalIndent(v, "", "  ") // nothing here that JSON can't say
		text = string(encoded) + "\n"
	}
	_, err := io.WriteString(in.stdout, text)
	return err
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
	now             func() time.Time                               // a field, so that a test can move it
	openAPIDocument func() ([]byte, error)                         // made when it is asked for
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
func (s *server) healthcheck(context.Context) error {
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
