// Package stack runs what the service needs, on one machine and without
// Docker: PostgreSQL and Keycloak. `go run ./dev` and the tests use it.
//
// Everything it keeps is in the state directory, dev/.run: the unpacked
// Keycloak, both servers' data and logs, a lock, and stack.json with the
// addresses of the stack that runs. A lock on that directory means that one
// stack uses it at a time; it goes with the process that holds it.
package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Options say how a stack is started. The zero value takes free ports.
type Options struct {
	StateDir     string       // default: dev/.run of the repository
	Keycloak     string       // its version; default: KeycloakVersion. Another one has a state of its own
	PostgresPort int          // 0 = a free one
	KeycloakPort int          // 0 = a free one
	PublicURL    string       // of the service, for the links on Keycloak's pages
	Test         bool         // PostgreSQL needs not survive a power cut
	Alone        bool         // Use never shares a running stack; for tests that stop servers
	Reset        bool         // forget both servers' data first; Keycloak stays unpacked
	Progress     func(string) // hears what is going on; may be called by several goroutines
}

// A Stack is a running PostgreSQL and Keycloak.
type Stack struct {
	KeycloakURL   string // http://localhost:port, also the beginning of every token's issuer
	AdminUser     string // of Keycloak's realm master
	AdminPassword string
	Postgres      *Server
	Keycloak      *Server
	Root          string // of the repository
	Dir           string // the state directory
	Attached      bool   // another process runs it; Stop does nothing

	options Options
	say     func(string)
	lock    *os.File
}

// running is the content of stack.json.
type running struct {
	PID          int    `json:"pid"`
	PostgresPort int    `json:"postgres_port"`
	KeycloakPort int    `json:"keycloak_port"`
	KeycloakURL  string `json:"keycloak_url"`
}

// errLocked is returned by Start when another process has the state directory.
var errLocked = errors.New("the state directory is in use")

// Start starts a stack of our own and returns when it answers. The caller
// stops it. The first start on a machine takes about a minute.
func Start(ctx context.Context, o Options) (*Stack, error) {
	s, err := newStack(o)
	if err != nil {
		return nil, err
	}
	if err := s.takeLock(); err != nil {
		return nil, err
	}
	if err := s.startServers(ctx); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// Use returns the stack that runs on the state directory, waiting for it if it
// is just starting. If there is none it starts one. With Options.Alone it
// starts one next to it instead.
func Use(ctx context.Context, o Options) (*Stack, error) {
	for waiting := false; ; waiting = true {
		s, err := Start(ctx, o)
		if !errors.Is(err, errLocked) {
			return s, err
		}
		if s, err = newStack(o); err != nil {
			return nil, err
		}
		if o.Alone && filepath.Base(s.Dir) != "alone" {
			o.StateDir = filepath.Join(s.Dir, "alone")
			continue
		}
		if !o.Alone && s.attach(ctx) == nil {
			s.say("using the stack that runs already")
			return s, nil
		}
		if !waiting {
			s.say("waiting for the stack that another process uses")
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// newStack finds the repository and prepares the state directory.
func newStack(o Options) (*Stack, error) {
	root, err := Repository()
	if err != nil {
		return nil, err
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Keycloak == "" {
		o.Keycloak = KeycloakVersion
	}
	if o.StateDir == "" {
		o.StateDir = filepath.Join(root, "dev", ".run")
		if o.Keycloak != KeycloakVersion {
			o.StateDir = filepath.Join(o.StateDir, o.Keycloak)
		}
	}
	dir, err := filepath.Abs(o.StateDir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	return &Stack{Root: root, Dir: dir, say: o.Progress, options: o, AdminUser: "admin", AdminPassword: "admin"}, nil
}

// Repository is the directory of the module that the working directory is in.
func Repository() (string, error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil || !strings.HasSuffix(string(mod), "go.mod\n") {
		return "", errors.New("this must be run inside the repository")
	}
	return filepath.Dir(string(mod)), nil
}

// takeLock makes the state directory ours until we end.
func (s *Stack) takeLock() error {
	lock, err := os.OpenFile(filepath.Join(s.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		holder, _ := os.ReadFile(filepath.Join(s.Dir, "lock"))
		return fmt.Errorf("a stack runs already (%w: %s, process %s); stop it first", errLocked, s.Dir, holder)
	}
	s.lock = lock
	if err := lock.Truncate(0); err != nil {
		return err
	}
	_, err = fmt.Fprint(lock, os.Getpid())
	return err
}

// startServers starts PostgreSQL and Keycloak side by side. When one fails the
// other is not waited for.
func (s *Stack) startServers(ctx context.Context) error {
	os.Remove(s.file("stack.json"))
	if s.options.Reset {
		if err := s.reset(); err != nil {
			return err
		}
	}
	tools, err := FindOrInstall(ctx, s.say, PostgreSQL, Java, Maven)
	if err != nil {
		return err
	}
	if s.Postgres, err = s.newPostgres(ctx, tools[0], s.options.PostgresPort); err != nil {
		return err
	}
	if s.Keycloak, err = s.newKeycloak(tools[1], tools[2], s.options.KeycloakPort); err != nil {
		return err
	}
	s.KeycloakURL = fmt.Sprintf("http://localhost:%d", s.Keycloak.Port)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var both sync.WaitGroup
	for _, server := range []*Server{s.Postgres, s.Keycloak} {
		both.Go(func() {
			err := during(s.say, "starting "+server.Name, func() error { return server.Start(ctx) })
			if err != nil {
				cancel(err)
				return
			}
			s.say(fmt.Sprintf("%s answers on port %d", server.Name, server.Port))
		})
	}
	both.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := errors.Join(s.dropLeftovers(ctx), s.deleteLeftovers(ctx)); err != nil {
		return err
	}
	return s.announce()
}

// announce writes stack.json, which says that the stack is ready and where.
func (s *Stack) announce() error {
	content, err := json.MarshalIndent(running{os.Getpid(), s.Postgres.Port, s.Keycloak.Port, s.KeycloakURL}, "", "  ")
	if err != nil {
		return err
	}
	half := s.file("stack.json.half")
	if err := os.WriteFile(half, content, 0o644); err != nil {
		return err
	}
	return os.Rename(half, s.file("stack.json"))
}

// attach takes the addresses of the running stack and asks whether it answers.
func (s *Stack) attach(ctx context.Context) error {
	content, err := os.ReadFile(s.file("stack.json"))
	if err != nil {
		return err
	}
	var r running
	if err := json.Unmarshal(content, &r); err != nil {
		return err
	}
	s.Attached = true
	s.KeycloakURL = r.KeycloakURL
	s.Postgres = &Server{Name: "PostgreSQL", Port: r.PostgresPort}
	s.Keycloak = &Server{Name: "Keycloak", Port: r.KeycloakPort}
	return errors.Join(
		s.withDatabase(ctx, "postgres", func(*pgx.Conn) error { return nil }),
		answers(ctx, s.KeycloakURL+"/realms/master"))
}

// Stop ends Keycloak and PostgreSQL, in this order, and gives the state
// directory free. A stack that another process runs is left alone.
func (s *Stack) Stop() {
	if s.lock == nil {
		return
	}
	os.Remove(s.file("stack.json"))
	for _, server := range []*Server{s.Keycloak, s.Postgres} {
		if server != nil {
			server.Stop()
		}
	}
	s.lock.Close()
	s.lock = nil
}

// reset removes the servers' data and the mails; the unpacked Keycloak stays.
func (s *Stack) reset() error {
	owner, err := Unprivileged()
	if err != nil {
		return err
	}
	data, err := s.postgresData(owner)
	if err != nil {
		return err
	}
	awaitFormerPostgres(data)
	gone, _ := filepath.Glob(s.file("realm-*.sha256"))
	for _, path := range append(gone, data, s.file("keycloak-data"), s.file("mail")) {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return nil
}

// file is a path in the state directory.
func (s *Stack) file(name string) string { return filepath.Join(s.Dir, name) }

// answers asks for a URL and returns an error unless the status is 200.
func answers(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", url, resp.Status)
	}
	return nil
}

// during says what goes on, and says so again now and then until f returns.
func during(say func(string), what string, f func() error) error {
	if say == nil {
		return f()
	}
	say(what)
	start, done := time.Now(), make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Second):
				say(fmt.Sprintf("still %s (%d s)", what, int(time.Since(start).Seconds())))
			}
		}
	}()
	return f()
}
