package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"

	"github.com/jackc/pgx/v5/pgxpool"
)

// standby is a primary of a test's own with a synchronous standby.
type standby struct {
	url     string // of both
	primary *stack.Child
	promote func()
}

// newStandby makes the two from the stack's programs. What the primary commits, the standby has.
func newStandby(t testing.TB) standby {
	t.Helper()
	initdb, err := stack.FindOrInstall(t.Context(), nil, stack.PostgreSQL)
	if err == nil {
		initdb[0], err = filepath.EvalSymlinks(initdb[0])
	}
	owner, unknown := stack.Unprivileged()
	if err != nil || unknown != nil {
		t.Fatal(err, unknown)
	}
	program := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(filepath.Dir(initdb[0]), name), args...)
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: owner}
		return cmd
	}
	finish := func(cmd *exec.Cmd) {
		t.Helper()
		if err := stack.Run(t.Context(), cmd); err != nil {
			t.Fatal(err)
		}
	}
	url := func(hosts string) string { return "postgres://postgres@" + hosts + "/postgres?sslmode=disable" }
	server := func(data string) (*stack.Child, string) {
		port := fmt.Sprint(stack.FreePort())
		return serving(t, url("127.0.0.1:"+port), program("postgres", "-D", data, "-p", port, "-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=", "-c", "fsync=off")), "127.0.0.1:" + port
	}
	dir := servable(t)
	finish(program("initdb", "-D", dir+"/1", "-U", "postgres", "-A", "trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"))
	primary, first := server(dir + "/1")
	finish(program("pg_basebackup", "-d", url(first), "-D", dir+"/2", "-R", "-c", "fast", "--no-sync"))
	_, second := server(dir + "/2")
	exec := func(host string, statements ...string) {
		t.Helper()
		pool, err := pgxpool.New(t.Context(), url(host))
		if err != nil {
			t.Fatal(err)
		}
		defer pool.Close()
		for _, sql := range statements {
			if _, err := pool.Exec(t.Context(), sql); err != nil {
				t.Fatalf("%s: %v", sql, err)
			}
		}
	}
	exec(first, `alter system set synchronous_standby_names = '*'`, `select pg_reload_conf()`, `create table proves_it ()`)
	return standby{url(first + "," + second), primary, func() { exec(second, `select pg_promote()`) }}
}

// promises are what clients were told in 2xx answers: queries that must each say true.
type promises struct {
	sync.Mutex
	kept  map[string][]any // arguments of the query
	count map[string]int   // answers, by what was asked and status
}

// add notes an answer, and what it promises if it is a success.
func (p *promises) add(what string, a answer, query string, args ...any) {
	p.Lock()
	defer p.Unlock()
	success := a.Status/100 == 2
	if success {
		a.Status = 200
	}
	p.count[fmt.Sprint(what, " ", a.Status)]++
	if success {
		p.kept[query+fmt.Sprint(args...)] = append([]any{query}, args...)
	}
}

// awaits waits until each of these is answered so once more.
func (p *promises) awaits(w *env, status int, kinds ...string) {
	w.Helper()
	p.Lock()
	before := maps.Clone(p.count)
	p.Unlock()
	for _, kind := range kinds {
		key := fmt.Sprint(kind, " ", status)
		w.eventually(key, time.Minute, func() bool {
			p.Lock()
			defer p.Unlock()
			return p.count[key] > before[key]
		})
	}
}

// TestFailover kills the primary under a load of registrations, sign-ins, refreshes and changes, and promotes its
// standby: nothing acknowledged is lost, nothing is answered with 500, and all is well again within seconds.
func TestFailover(t *testing.T) {
	t.Parallel()
	pair := newStandby(t)
	w := newEnv(t, map[string]string{"DATABASE_URL": pair.url, "JOB_INTERVAL": "200ms", "REFRESH_GRACE": "1m"})
	w.pool.Close()
	var err error
	if w.pool, err = pgxpool.New(t.Context(), pair.url+"&target_session_attrs=read-write"); err != nil {
		t.Fatal(err)
	}
	told := &promises{kept: map[string][]any{}, count: map[string]int{}}
	load, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	for _, client := range []func(*promises){w.registers, w.registers, w.signsInAgain(newEmail()),
		w.refreshes(w.session(newEmail()).Token), w.changes(newEmail())} {
		clients.Go(func() {
			every(load, 20*time.Millisecond, slog.New(slog.DiscardHandler), "", func(context.Context) error { client(told); return nil })
		})
	}
	kinds := []string{"register", "login", "refresh", "change"}
	told.awaits(w, 200, kinds...)
	pair.primary.End(syscall.SIGKILL, 10*time.Second)
	told.awaits(w, 503, kinds...)
	w.healthy(503, "down")
	pair.promote()
	promoted := time.Now()
	w.healthy(200, "ok")
	told.awaits(w, 200, "change")
	if took := time.Since(promoted); took > 10*time.Second {
		t.Errorf("PostgreSQL was promoted %v ago", took)
	}
	told.awaits(w, 200, kinds...) // Keycloak may be slow, too
	stop()
	clients.Wait()
	for key := range told.count {
		if !strings.HasSuffix(key, " 200") && !strings.HasSuffix(key, " 503") {
			t.Errorf("answered: %s", key)
		}
	}
	t.Logf("answers: %v", told.count)
	for _, kept := range told.kept {
		if got := w.value(kept[0].(string), kept[1:]...); got != "true" {
			t.Errorf("acknowledged and lost: %v", kept)
		}
	}
	w.locksEnd()
	w.straysDie()
	w.waitUntilIdle()
}

// loads sends a request of the load.
func (w *env) loads(r call) answer {
	a, err := w.send(w.url, r)
	if err != nil || a.Status == 500 {
		w.Errorf("%s: %v %v", r.path, a, err)
	}
	return a
}

func (w *env) registers(told *promises) {
	a := w.loads(registering(newEmail()))
	told.add("register", a, `select exists (select from user_registrations join users using (user_id)
		where registration_id = $1 and status = 'pending' and not is_verified)::text`, a.text("registration_id"))
}

func (w *env) signsInAgain(email string) func(*promises) {
	w.account(email)
	return func(told *promises) {
		a := w.loads(signingIn(email, password))
		told.add("login", a, `select (ended_at is null)::text from sessions where session_id = $1`, a.text("session_id"))
	}
}

// refreshes exchanges token after token, and one whose answer was lost once more.
func (w *env) refreshes(token string) func(*promises) {
	return func(told *promises) {
		a := w.loads(refreshing(token))
		if a.Status == 200 {
			token = a.text("refresh_token")
		}
		told.add("refresh", a, `select exists (select from refresh_tokens where token_hash = $1)::text`, digest(token))
	}
}

// changes changes the phone number of one's own, up and up.
func (w *env) changes(email string) func(*promises) {
	by, n := w.session(email), 100000
	return func(told *promises) {
		n++
		r, phone := authorized(by.Access, "PATCH", usersPath+"/me"), fmt.Sprint("+49301", n)
		r.json = body{"phone": phone}
		told.add("change", w.loads(r), `select (phone >= $2)::text from users where email = $1`, email, phone)
	}
}
