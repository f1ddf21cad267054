package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// administers runs statements in another database than the env's.
func (w *env) administers(statements ...string) {
	w.Helper()
	conn, err := pgx.Connect(w.Context(), services.DatabaseURL("postgres"))
	if err != nil {
		w.Fatal(err)
	}
	defer conn.Close(w.Context())
	for _, sql := range statements {
		if _, err := conn.Exec(w.Context(), strings.ReplaceAll(sql, "DB", w.db)); err != nil {
			w.Fatalf("%s: %v", sql, err)
		}
	}
}

// TestReadOnly: a PostgreSQL that takes no writes for a while, as a standby does, or a provider's when its disk is
// full, is away for so long.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	account := newEmail()
	session := w.session(account)
	w.Run("every connection", func() {
		w.outage("down", account, &session, func() {
			w.administers(`alter database DB set default_transaction_read_only = on`,
				`select pg_terminate_backend(pid) from pg_stat_activity where datname = 'DB' and application_name = 'auth-service'`)
		}, func() {
			w.administers(`alter database DB reset default_transaction_read_only`)
			w.pool.Reset()
		})
	})
	w.Run("connections that were good when they were opened", func() {
		const size = 3
		st, err := openStore(w.Context(), secret(w.vars["DATABASE_URL"]+fmt.Sprint("&pool_max_conns=", size)), slog.New(slog.DiscardHandler))
		if err != nil {
			w.Fatal(err)
		}
		defer st.pool.Close()
		var conns []*pgxpool.Conn
		for range size {
			conn, err := st.pool.Acquire(w.Context())
			if err == nil {
				_, err = conn.Exec(w.Context(), `set default_transaction_read_only = on`) // as when the configuration is loaded anew
			}
			if err != nil {
				w.Fatal(err)
			}
			conns = append(conns, conn)
		}
		for _, conn := range conns {
			conn.Release()
		}
		ping := func() error { return st.ping(w.Context()) }
		write := func() error { return st.enqueue(w.Context(), time.Now(), "token:probe") }
		for i, do := range []func() error{ping, write, ping} {
			if err := do(); asProblem(err).Status != 503 {
				w.Errorf("connection %d: %v", i, err)
			}
		}
		for range size {
			if err := write(); err != nil {
				w.Errorf("it is still used: %v", err)
			}
		}
	})
}

// Whoever's lock has become another's changes nothing, in whichever way the driver sends statements, and the
// connection stays good.
func TestLostLock(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	for _, mode := range []string{"cache_describe", "cache_statement", "exec", "simple_protocol"} {
		url, _ := url.Parse(d.url)
		q := url.Query()
		q.Set("default_query_exec_mode", mode)
		q.Set("pool_max_conns", "1")
		url.RawQuery = q.Encode()
		st, err := openStore(t.Context(), secret(url.String()), d.log)
		if err != nil {
			t.Fatal(err)
		}
		defer st.pool.Close()
		earlier := func() time.Time { return time.Now().Add(-time.Hour) }
		lost, err := st.lock(t.Context(), "token:"+mode, time.Minute, earlier)
		d.must(err)
		held, err := st.lock(t.Context(), "token:"+mode, time.Minute, time.Now)
		d.must(err)
		write := func(tx *txn) { tx.exec(`insert into rate_limits values ($1, 1, now())`, mode) }
		for range 2 {
			if err := st.locked(t.Context(), lost, write); !errors.Is(err, errLocked) {
				t.Errorf("%s: %v", mode, err)
			}
		}
		if got := d.value(`select count(*)::text from rate_limits where key = $1`, mode); got != "0" {
			t.Errorf("%s: something was written all the same", mode)
		}
		d.must(st.locked(t.Context(), held, write))
		if n := st.pool.Stat().NewConnsCount(); n != 1 {
			t.Errorf("%s: it took %d connections", mode, n)
		}
	}
}

// servable is a directory that whoever runs PostgreSQL may read and write.
func servable(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// serving starts a server that does not run as root, and waits until a connection to it can be opened.
func serving(t testing.TB, url string, cmd *exec.Cmd) *stack.Child {
	t.Helper()
	owner, err := stack.Unprivileged()
	if err != nil {
		t.Fatal(err)
	}
	log := new(buffer)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = "/", log, log, &syscall.SysProcAttr{Credential: owner}
	child, err := stack.Spawn(cmd, syscall.SIGINT)
	if err == nil {
		t.Cleanup(func() { child.End(syscall.SIGINT, 10*time.Second) })
		err = child.Await(t.Context(), func(ctx context.Context) error {
			conn, err := pgx.Connect(ctx, url)
			if err == nil {
				err = conn.Close(ctx)
			}
			return err
		})
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd.Path, err, log)
	}
	return child
}

// pooled starts Debian's PgBouncer in front of PostgreSQL, in transaction mode with so many connections to it, and
// returns the connection string that docs/operating.md has for it.
func (w *env) pooled(size int) string {
	w.Helper()
	pgbouncer, err := stack.FindOrInstall(w.Context(), nil, stack.PgBouncer)
	if err != nil {
		w.Fatal(err)
	}
	direct, err := url.Parse(services.DatabaseURL(w.db))
	if err != nil {
		w.Fatal(err)
	}
	password, _ := direct.User.Password()
	path, port := filepath.Join(servable(w), "pgbouncer.ini"), stack.FreePort()
	if err := os.WriteFile(path, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%s user=%s password=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = %d
`, direct.Port(), direct.User.Username(), password, port, size), 0o644); err != nil {
		w.Fatal(err)
	}
	direct.Host = fmt.Sprintf("127.0.0.1:%d", port)
	pooled := direct.String() + "&default_query_exec_mode=cache_describe"
	serving(w, pooled, exec.Command(pgbouncer[0], path))
	return pooled
}

// TestPgBouncer has several clients do what the contract has, through a pooler in transaction mode that gives each
// statement any of a few connections.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "100ms"})
	w.restarted(map[string]string{"DATABASE_URL": w.pooled(2)}, func() {
		w.exec(`drop schema public cascade; create schema public`) // migrates through the pooler, too
	})
	by := w.signsIn(w.administrator())
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() { w.uses(by) })
	}
	all.Wait()
	w.waitUntilIdle()
	for line := range strings.Lines(w.logs.String()) {
		if strings.Contains(line, `"level":"ERROR"`) || strings.Contains(line, `"level":"WARN"`) {
			w.Error(line)
		}
	}
}

// uses is one person's way through the contract, and an administrator's.
func (w *env) uses(by answer) {
	email, cancelled, invited := newEmail(), newEmail(), newEmail()
	registered(w, email)
	w.wants(w.do(typing(email, other(w.lastMail(email).Code))), 400, "invalid-code")
	w.wants(w.do(typing(email, w.lastMail(email).Code)), 200, "")
	id := w.do(registering(cancelled)).text("registration_id")
	w.wants(w.do(resending(id)), 429, "resend-too-soon")
	w.wants(w.get("/api/v1/registrations/"+id), 200, "")
	w.wants(w.do(cancelling(w.readMail(cancelled, 1))), 200, "")

	w.wants(w.do(signingIn(email, "a wrong password")), 401, "invalid-credentials")
	a := w.signsIn(email)
	w.wants(w.as(a, "GET", mePath), 200, "")
	next := w.refreshed(w.refreshed(a))
	another := w.signsIn(email)
	w.wants(w.as(next, "GET", sessionsPath), 200, "")
	w.wants(w.do(loggingOut(another.text("refresh_token"))), 204, "")
	w.wants(w.do(forgetting(email)), 202, "")

	w.joined(by, invited)
	user := w.userOf(invited)
	w.wants(w.do(managing(by, "PATCH", "/"+user, body{"role": "operator", "network_id": "N1", "station_id": "S1"})), 200, "")
	for _, query := range []string{"?limit=2", "?q=" + invited[:6], "?network_id=N1&role=operator&source=internal&include_deleted=true", "/" + user + "/sessions"} {
		w.wants(w.do(managing(by, "GET", query, nil)), 200, "")
	}
	w.wants(w.as(by, "GET", auditPath+"?limit=3&action=login"), 200, "")
	w.wants(w.do(managing(by, "DELETE", "/"+user, nil)), 204, "")
	w.wants(w.do(managing(by, "POST", "/"+user+"/restore", nil)), 200, "")
	w.eventually("the first tokens are revoked", time.Minute, func() bool { return !w.passes(another) })
	run := authorized(by.text("access_token"), "POST", "/api/v1/sync")
	run.json = body{"dry_run": true}
	if a := w.do(run); a.Status != 409 { // another's is running
		w.wants(a, 202, "")
	}
	w.wants(w.as(next, "DELETE", sessionsPath), 204, "")
}

// TestStatementTimeout: a statement that takes too long is an outage, and PostgreSQL stops working at it, also behind
// a pooler, where it can't be told how long.
func TestStatementTimeout(t *testing.T) {
	t.Parallel()
	w := sharedEnv(t)
	var both sync.WaitGroup
	for name, url := range map[string]string{"direct": w.vars["DATABASE_URL"], "pooled": w.pooled(1)} {
		both.Go(func() {
			st, err := openStore(w.Context(), secret(url), slog.New(slog.DiscardHandler))
			if err != nil {
				w.Error(err)
				return
			}
			defer st.pool.Close()
			_, err = one[struct{ Slept string }](w.Context(), st.pool, `select pg_sleep(60)::text as `+name)
			if asProblem(err).Status != 503 {
				w.Errorf("%s: %v", name, err)
			}
			w.eventually("it has ended there", time.Minute, func() bool {
				return w.value(`select count(*)::text from pg_stat_activity where state = 'active' and query like 'select pg_sleep(60)%`+name+`'`) == "0"
			})
			if err := st.ping(w.Context()); err != nil {
				w.Errorf("%s, the next one: %v", name, err)
			}
		})
	}
	both.Wait()
}

// TestOutageCodes has PostgreSQL raise errors: some pass by themselves, some are defects, and no connection is always
// an outage.
func TestOutageCodes(t *testing.T) {
	t.Parallel()
	d := emptyDatabase(t)
	for status, codes := range map[int]string{
		503: "08006 25006 26000 0A000 40001 40P01 42P01 42P05 42703 42883 53100 53200 53300 55P03 57014 57P01 58000 58030",
		500: "22001 22P02 23502 23514 25P02 28000 42501 42601 55000 P0001 XX000",
	} {
		for code := range strings.FieldsSeq(codes) {
			_, err := d.pool.Exec(t.Context(), `do $$ begin raise exception using errcode = '`+code+`'; end $$`)
			if got := asProblem(storeError(err)).Status; got != status {
				t.Errorf("%v: %d", err, got)
			}
		}
	}
	for what, change := range map[string][2]string{"another password": {":password@", ":wrong@"}, "another role": {"//postgres:", "//nobody:"},
		"no such database": {"/test_", "/nowhere_"}, "nobody listens": {fmt.Sprint(":", services.Postgres.Port), ":1"}} {
		st, err := openStore(t.Context(), secret(strings.Replace(d.url, change[0], change[1], 1)+"&default_query_exec_mode=exec"), slog.New(slog.DiscardHandler))
		d.must(err)
		if err := st.ping(t.Context()); asProblem(err).Status != 503 {
			t.Errorf("%s: %v", what, err)
		}
		if mode := st.pool.Config().ConnConfig.DefaultQueryExecMode; mode != pgx.QueryExecModeCacheDescribe {
			t.Errorf("behind a pooler: %v", mode)
		}
		st.pool.Close()
	}
}
