package stack

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The development database's superuser. It listens on loopback only.
const (
	postgresUser     = "postgres"
	postgresPassword = "password"
)

// newPostgres prepares the data directory and describes how to start the server.
func (s *Stack) newPostgres(ctx context.Context, initdb string, port int) (*Server, error) {
	initdb, err := filepath.EvalSymlinks(initdb)
	if err != nil {
		return nil, err
	}
	owner, err := Unprivileged()
	if err != nil {
		return nil, err
	}
	data, err := s.postgresData(owner)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		err := during(s.say, "creating a PostgreSQL cluster", func() error { return createCluster(ctx, initdb, data, owner) })
		if err != nil {
			return nil, err
		}
	}
	awaitFormerPostgres(data)
	if port, err = choosePort(port, "PostgreSQL", "-postgres-port"); err != nil {
		return nil, err
	}

	args := []string{"-D", data, "-p", strconv.Itoa(port), "-c", "listen_addresses=127.0.0.1",
		"-c", "unix_socket_directories=", "-c", "max_connections=200"}
	if s.options.Test {
		args = append(args, "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")
	}
	binary := filepath.Join(filepath.Dir(initdb), "postgres")
	return &Server{Name: "PostgreSQL", Port: port, Log: s.file("postgres.log"), stopSignal: syscall.SIGINT,
		start: func(ctx context.Context) (*Child, error) {
			return s.startPostgres(ctx, binary, args, owner)
		}}, nil
}

// startPostgres starts the server and waits until it takes connections. After
// a SIGKILL its own children need a moment to notice; until then the shared
// memory is in use and a new server refuses to start, so it is tried again.
func (s *Stack) startPostgres(ctx context.Context, binary string, args []string, owner *syscall.Credential) (*Child, error) {
	path := s.file("postgres.log")
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		log, err := os.Create(path)
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(binary, args...)
		cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
		child, err := Spawn(cmd, syscall.SIGINT)
		log.Close()
		if err != nil {
			return nil, err
		}
		err = child.Await(ctx, func(ctx context.Context) error {
			return s.withDatabase(ctx, "postgres", func(*pgx.Conn) error { return nil })
		})
		if err == nil {
			return child, nil
		}
		said, _ := os.ReadFile(path)
		if !strings.Contains(string(said), "shared memory block") || ctx.Err() != nil || time.Now().After(deadline) {
			return nil, err
		}
	}
}

// Unprivileged is who runs PostgreSQL, which refuses to run as root; nil means
// ourselves.
func Unprivileged() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, errors.New("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
		}
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// postgresData is the cluster's directory: in the state directory, or below
// /var/tmp if the owner can't get there, as in a clone below /root.
func (s *Stack) postgresData(owner *syscall.Credential) (string, error) {
	probe := exec.Command("/bin/true")
	probe.Dir = s.Dir
	probe.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
	if owner == nil || probe.Run() == nil {
		return s.file("postgres"), nil
	}
	dir := fmt.Sprintf("/var/tmp/auth-service-%x", sha256.Sum256([]byte(s.Dir)))[:40]
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	// /var/tmp is everybody's: a directory that somebody else put there is refused.
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() || info.Sys().(*syscall.Stat_t).Uid != 0 {
		return "", fmt.Errorf("%s is not a directory of root's; please remove it", dir)
	}
	return filepath.Join(dir, "postgres"), nil
}

// createCluster runs initdb in a temporary directory and renames it, so that
// a cluster is there whole or not at all.
func createCluster(ctx context.Context, initdb, data string, owner *syscall.Credential) error {
	half := data + ".half"
	if err := os.RemoveAll(half); err != nil {
		return err
	}
	if err := os.Mkdir(half, 0o700); err != nil {
		return err
	}
	password := data + ".password"
	if err := os.WriteFile(password, []byte(postgresPassword), 0o600); err != nil {
		return err
	}
	defer os.Remove(password)
	if owner != nil {
		for _, path := range []string{half, password} {
			if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
	}
	cmd := exec.Command(initdb, "-D", half, "-U", postgresUser, "--pwfile="+password, "--auth=scram-sha-256",
		"--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
	if err := Run(ctx, cmd); err != nil {
		return err
	}
	return os.Rename(half, data)
}

// awaitFormerPostgres waits for a server of the same data directory that is
// still shutting down because its parent was killed, and removes the pid file
// that a killed one left, which could name a stranger by now. We hold the
// state directory's lock: nobody else has a right to run one.
func awaitFormerPostgres(data string) {
	pidFile := filepath.Join(data, "postmaster.pid")
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		content, err := os.ReadFile(pidFile)
		if err != nil {
			return
		}
		line, _, _ := strings.Cut(string(content), "\n")
		pid, _ := strconv.Atoi(line)
		if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || cwd != data {
			os.Remove(pidFile)
			return
		}
		if time.Since(start) > 10*time.Second {
			syscall.Kill(pid, syscall.SIGQUIT)
		}
	}
}

// DatabaseURL is the connection string of a database of the stack.
func (s *Stack) DatabaseURL(name string) string {
	return fmt.Sprintf("postgres://%s:%s@127.0.0.1:%d/%s?sslmode=disable", postgresUser, postgresPassword, s.Postgres.Port, name)
}

// CreateDatabase creates an empty database and returns its URL. One that
// exists is left as it is. What a test creates is called test_…: should the
// test be killed, the next start drops it.
func (s *Stack) CreateDatabase(ctx context.Context, name string) (string, error) {
	err := s.withDatabase(ctx, "postgres", func(c *pgx.Conn) error {
		_, err := c.Exec(ctx, "create database "+pgx.Identifier{name}.Sanitize())
		if exists := (*pgconn.PgError)(nil); errors.As(err, &exists) && exists.Code == "42P04" {
			return nil
		}
		return err
	})
	return s.DatabaseURL(name), err
}

// DropDatabase drops a database, whoever is connected to it.
func (s *Stack) DropDatabase(ctx context.Context, name string) error {
	return s.withDatabase(ctx, "postgres", func(c *pgx.Conn) error {
		_, err := c.Exec(ctx, "drop database if exists "+pgx.Identifier{name}.Sanitize()+" with (force)")
		return err
	})
}

// dropLeftovers drops the databases of tests that were killed.
func (s *Stack) dropLeftovers(ctx context.Context) error {
	var names []string
	err := s.withDatabase(ctx, "postgres", func(c *pgx.Conn) error {
		rows, _ := c.Query(ctx, `select datname from pg_database where datname like 'test\_%'`)
		var err error
		names, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	for _, name := range names {
		err = errors.Join(err, s.DropDatabase(ctx, name))
	}
	return err
}

// withDatabase calls f with a connection to the named database.
func (s *Stack) withDatabase(ctx context.Context, name string, f func(*pgx.Conn) error) error {
	c, err := pgx.Connect(ctx, s.DatabaseURL(name))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	return f(c)
}
