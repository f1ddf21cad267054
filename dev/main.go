// Command dev runs the service with everything it needs on this machine:
//
//	go run ./dev
//
// PostgreSQL, Keycloak with the realm of keycloak/realm.json, a mail catcher
// whose inbox opens in a browser, and the service. What is missing is
// installed, or the one command to install it is printed. State is kept in
// dev/.run; Ctrl-C ends everything, -reset forgets what was stored.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"auth-service/dev/mail"
	"auth-service/dev/preview"
	"auth-service/dev/stack"
	"auth-service/templates"

	envparse "github.com/caarlos0/env/v11"
)

// The development realm, its database and the secret of its service account.
// The secret is no secret: it guards a Keycloak on loopback.
const (
	realm         = "myrealm"
	database      = "auth_db"
	backendSecret = "dev-backend-secret"
)

type options struct {
	postgresPort, keycloakPort, smtpPort, inboxPort, port int
	reset, noService                                      bool
	keycloak                                              string
}

// publicURL is where people reach the service.
func (o options) publicURL() string { return fmt.Sprintf("http://localhost:%d", o.port) }

func main() {
	var o options
	flag.IntVar(&o.postgresPort, "postgres-port", 6200, "port of PostgreSQL")
	flag.IntVar(&o.keycloakPort, "keycloak-port", 5080, "port of Keycloak")
	flag.StringVar(&o.keycloak, "keycloak", stack.KeycloakVersion, "version of Keycloak; another one has a state of its own")
	flag.IntVar(&o.smtpPort, "smtp-port", 1025, "port of the mail catcher")
	flag.IntVar(&o.inboxPort, "inbox-port", 8025, "port of the inbox, for the browser")
	flag.IntVar(&o.port, "port", 3000, "port of the service")
	flag.BoolVar(&o.reset, "reset", false, "forget everything that earlier runs stored")
	flag.BoolVar(&o.noService, "no-service", false, "start all but the service")
	flag.Parse()

	ctx, cancel := context.WithCancelCause(context.Background())
	go awaitEnd(cancel)
	err := run(ctx, o)
	exit := (*exec.ExitError)(nil)
	switch {
	case errors.Is(err, errAsked):
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		fmt.Fprintln(os.Stderr, "dev:", err)
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "dev:", err)
		os.Exit(1)
	}
}

// errAsked is the cause of an end that somebody wanted.
var errAsked = errors.New("interrupted")

// awaitEnd ends the stack in order at the first signal, or when `go run` is
// killed, which tells us nothing but leaves us orphaned. At the second signal
// it ends this process; the kernel then ends the children.
func awaitEnd(cancel context.CancelCauseFunc) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	select {
	case <-signals:
	case <-stack.ParentGone():
	}
	cancel(errAsked)
	<-signals
	os.Exit(130)
}

// run starts everything, waits for the end and stops everything. It returns
// why it ended.
func run(ctx context.Context, o options) error {
	began := time.Now()
	say := func(s string) { fmt.Printf("[%5.1fs] %s\n", time.Since(began).Seconds(), s) }
	for _, p := range []struct {
		port       int
		what, flag string
	}{{o.smtpPort, "the mail catcher", "-smtp-port"}, {o.inboxPort, "the inbox", "-inbox-port"}, {o.port, "the service", "-port"}} {
		if err := stack.CheckPort(p.port, p.what, p.flag); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	built := make(chan string, 1)
	go func() {
		if o.noService {
			return
		}
		binary, err := build(ctx)
		if err != nil {
			cancel(err)
			return
		}
		say("the service is built")
		built <- binary
	}()

	s, err := stack.Start(ctx, stack.Options{PostgresPort: o.postgresPort, KeycloakPort: o.keycloakPort,
		Keycloak: o.keycloak, PublicURL: o.publicURL(), Reset: o.reset, Progress: say})
	if err != nil {
		return err
	}
	defer func() {
		say("stopping Keycloak and PostgreSQL")
		s.Stop()
	}()
	catcher, err := mail.StartIn(fmt.Sprintf("127.0.0.1:%d", o.smtpPort), filepath.Join(s.Dir, "mail"))
	if err != nil {
		return err
	}
	defer catcher.Close()
	pages := http.NewServeMux()
	pages.Handle("/", catcher.Inbox())
	var brand templates.Brand
	if err := envparse.Parse(&brand); err != nil {
		return err
	}
	site, err := templates.NewSite(brand)
	if err != nil {
		return err
	}
	previews := preview.Handler(site, func(ctx context.Context) error {
		return preview.SendMails(ctx, s, o.smtpPort, "auth-service", site.Codes())
	})
	for _, path := range []string{"/preview", "/preview/", "/static/"} {
		pages.Handle(path, previews)
	}
	inbox := &http.Server{Addr: fmt.Sprintf("127.0.0.1:%d", o.inboxPort), Handler: pages, ReadHeaderTimeout: 10 * time.Second}
	go func() { cancel(inbox.ListenAndServe()) }()
	defer inbox.Close()

	env, err := prepare(ctx, s, o, say)
	if err != nil {
		return err
	}
	service := &stack.Child{} // without the service: one that never ends
	if !o.noService {
		select {
		case binary := <-built:
			say("starting the service")
			service, err = startService(binary, env)
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		defer service.End(syscall.SIGTERM, 20*time.Second)
		if err := service.Await(ctx, func(context.Context) error { return healthy(o.port) }); err != nil {
			return err
		}
	}
	addresses(s, o, began)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-service.Done():
		return service.Err()
	case <-s.Postgres.Done():
		return errors.New("PostgreSQL has ended by itself, see " + s.Postgres.Log)
	case <-s.Keycloak.Done():
		return errors.New("the Keycloak server has ended by itself, see " + s.Keycloak.Log)
	}
}

// build compiles the service, while the stack starts.
func build(ctx context.Context) (string, error) {
	root, err := stack.Repository()
	if err != nil {
		return "", err
	}
	binary := filepath.Join(root, "dev", ".run", "auth-service")
	cmd := exec.Command("go", "build", "-o", binary, ".")
	cmd.Dir = root
	if err := stack.Run(ctx, cmd); err != nil {
		return "", fmt.Errorf("the service does not build: %w", err)
	}
	return binary, nil
}

// prepare creates database and realm, and returns the service's environment.
func prepare(ctx context.Context, s *stack.Stack, o options, say func(string)) (map[string]string, error) {
	databaseURL, err := s.CreateDatabase(ctx, database)
	if err != nil {
		return nil, err
	}
	publicURL := o.publicURL()
	current, err := s.EnsureRealm(ctx, realm, map[string]string{
		"KEYCLOAK_BACKEND_CLIENT_SECRET": backendSecret,
		"KEYCLOAK_AUTH_CLIENT_SECRET":    os.Getenv("KEYCLOAK_AUTH_CLIENT_SECRET"),
		"AUTH_CLIENT_PUBLIC":             strconv.FormatBool(os.Getenv("KEYCLOAK_AUTH_CLIENT_SECRET") == ""),
		"SMTP_HOST":                      "127.0.0.1",
		"SMTP_PORT":                      strconv.Itoa(o.smtpPort),
		"PUBLIC_URL":                     publicURL,
		"APP_ORIGIN":                     publicURL,
	})
	if err != nil {
		return nil, err
	}
	say("database " + database + " and realm " + realm + " are there")
	if !current {
		say("NOTE: keycloak/realm.json or a port has changed since the realm was imported; the realm is still the old one")
		say("NOTE: go run ./dev -reset imports it again, and forgets all users")
	}
	return map[string]string{
		"DATABASE_URL":                   databaseURL,
		"KEYCLOAK_URL":                   s.KeycloakURL,
		"KEYCLOAK_REALM":                 realm,
		"KEYCLOAK_AUTH_CLIENT_ID":        "auth-client",
		"KEYCLOAK_BACKEND_CLIENT_ID":     "backend-admin",
		"KEYCLOAK_BACKEND_CLIENT_SECRET": backendSecret,
		"SERVER_PORT":                    strconv.Itoa(o.port),
		"PUBLIC_URL":                     publicURL,
		"LOG_FORMAT":                     "text",
		"SHUTDOWN_DELAY":                 "0",
	}, nil
}

// startService runs the service with env, except for what our own environment
// sets already. Its log goes to the terminal.
func startService(binary string, env map[string]string) (*stack.Child, error) {
	cmd := exec.Command(binary)
	cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdout, os.Stderr, os.Environ()
	for name, value := range env {
		_, set := os.LookupEnv(name)
		_, fromFile := os.LookupEnv(name + "_FILE")
		if !set && !fromFile {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	return stack.Spawn(cmd, syscall.SIGKILL)
}

// healthy returns nil when the service at port reports that all is well.
func healthy(port int) error {
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/health", port))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var health struct{ Status string }
	if err := json.NewDecoder(resp.Body).Decode(&health); err != nil {
		return err
	}
	if health.Status != "ok" {
		return errors.New("the service is " + health.Status)
	}
	return nil
}

// addresses prints where everything is.
func addresses(s *stack.Stack, o options, began time.Time) {
	service := fmt.Sprintf("http://localhost:%d", o.port)
	if !o.noService {
		fmt.Printf(`
  Service          %[1]s
  Register         %[1]s/account/register
  Swagger UI       %[1]s/swagger-ui
`, service)
	}
	fmt.Printf(`
  Inbox            http://localhost:%[1]d   (receives on port %[2]d)
  Previews         http://localhost:%[1]d/preview   (every page and every mail)
  Keycloak         %[3]s/admin   (%[4]s / %[5]s, realm %[6]s)
  PostgreSQL       %[7]s

  ready after %.1[8]f s; Ctrl-C ends everything

`, o.inboxPort, o.smtpPort, s.KeycloakURL, s.AdminUser, s.AdminPassword, realm, s.DatabaseURL(database), time.Since(began).Seconds())
}
