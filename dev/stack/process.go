package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Child is a running program that does not outlive us, however we end.
type Child struct {
	PID  int
	name string
	done chan struct{} // closed when it has ended
	err  error         // how it ended; to be read after done
}

// Spawn starts cmd in a process group of its own, so that Ctrl-C in the
// terminal reaches only us and we can end our children in order. When we die,
// even of SIGKILL, the kernel sends it deathSignal.
func Spawn(cmd *exec.Cmd, deathSignal syscall.Signal) (*Child, error) {
	c := &Child{name: cmd.Path, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(c.done)
		// The death signal is sent when the thread that started the child
		// ends. So this goroutine keeps its thread until the child is gone.
		runtime.LockOSThread()
		dieWithUs(cmd, deathSignal)
		err := cmd.Start()
		started <- err
		if err == nil {
			c.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	c.PID = cmd.Process.Pid
	return c, nil
}

// Done is closed when the program has ended; Err then says how.
func (c *Child) Done() <-chan struct{} { return c.done }

// Err is how the program ended, and never nil: what we wait for should not
// end by itself. It wraps an *exec.ExitError if the exit code is not 0.
func (c *Child) Err() error {
	<-c.done
	if c.err == nil {
		return fmt.Errorf("%s has ended", c.name)
	}
	return fmt.Errorf("%s has ended: %w", c.name, c.err)
}

// Await calls ask until it returns nil. It gives up when the child ends or
// ctx does, and then the child is gone.
func (c *Child) Await(ctx context.Context, ask func(context.Context) error) error {
	for {
		if ask(ctx) == nil {
			return nil
		}
		select {
		case <-c.done:
			return c.Err()
		case <-ctx.Done():
			c.End(syscall.SIGKILL, 0)
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// End sends sig, waits, and kills what has not ended after the patience.
func (c *Child) End(sig syscall.Signal, patience time.Duration) {
	select {
	case <-c.done:
		return // its process id may be somebody else's by now
	default:
	}
	syscall.Kill(c.PID, sig)
	select {
	case <-c.done:
	case <-time.After(patience):
		syscall.Kill(-c.PID, syscall.SIGKILL)
		<-c.done
	}
}

// Run runs a program to its end; the error has the end of its output.
func Run(ctx context.Context, cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	c, err := Spawn(cmd, syscall.SIGTERM)
	if err != nil {
		return err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		c.End(syscall.SIGTERM, 20*time.Second)
		return context.Cause(ctx)
	}
	if c.err != nil {
		return fmt.Errorf("%w\n%s", c.Err(), lastLines(out.String()))
	}
	return nil
}

// lastLines is the part of a program's output that most likely says what went wrong.
func lastLines(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	return "  | " + strings.Join(lines[max(0, len(lines)-15):], "\n  | ")
}

// A Server is PostgreSQL or Keycloak. A test can stop and start it; it comes
// back on the same port with its data.
type Server struct {
	Name string
	Port int
	Log  string // path of its log

	start      func(context.Context) (*Child, error) // returns when it answers
	stopSignal syscall.Signal

	mu    sync.Mutex
	child *Child
}

// errNotOurs is returned for the servers of a stack that another process runs.
var errNotOurs = errors.New("this server belongs to another process; Options.Alone gives you your own")

// Start starts the server and returns when it answers. A running one is left
// alone. The error shows the end of the server's log.
func (s *Server) Start(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.start == nil {
		return errNotOurs
	}
	if s.child != nil {
		select {
		case <-s.child.done:
		default:
			return nil
		}
	}
	s.child, err = s.start(ctx)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%s did not start: %w", s.Name, err)
		if log, _ := os.ReadFile(s.Log); len(log) > 0 {
			err = fmt.Errorf("%w\nThe end of %s:\n%s", err, s.Log, lastLines(string(log)))
		}
	}
	return err
}

// Stop ends the server as an administrator would and waits for it.
func (s *Server) Stop() error { return s.end(s.stopSignal) }

// Kill ends the server as a power cut would.
func (s *Server) Kill() error { return s.end(syscall.SIGKILL) }

func (s *Server) end(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.start == nil {
		return errNotOurs
	}
	if s.child != nil {
		s.child.End(sig, 20*time.Second)
	}
	return nil
}

// Done is closed when the server that runs now has ended; nil for one that is
// not ours.
func (s *Server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.child == nil {
		return nil
	}
	return s.child.done
}

// ParentGone is closed when the process that started us has ended. `go run`
// and `go test` are such parents: when they are killed, nobody tells us.
func ParentGone() <-chan struct{} {
	gone := make(chan struct{})
	parent := os.Getppid()
	go func() {
		for os.Getppid() == parent {
			time.Sleep(200 * time.Millisecond)
		}
		close(gone)
	}()
	return gone
}
