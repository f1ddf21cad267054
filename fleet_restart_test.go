package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"
)

// builtProgram is the path of the program, which is built once.
var builtProgram = sync.OnceValues(func() (string, error) {
	path := filepath.Join(programDir, "auth-service")
	out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, out)
	}
	return path, err
})

// program is that path.
func program(t testing.TB) string {
	t.Helper()
	path, err := builtProgram()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestRollingRestart restarts each of two instances behind a real nginx, under load: no request fails. As
// docs/operating.md says, the upstream follows what /readyz of the instances says.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	w.quick = true
	dir := t.TempDir()
	upstream := filepath.Join(dir, "upstream.conf")
	var instances []*process
	var settings []map[string]string
	var pairs []string
	for range 2 {
		port, management := stack.FreePort(), fmt.Sprintf("127.0.0.1:%d", stack.FreePort())
		settings = append(settings, map[string]string{"SERVER_PORT": fmt.Sprint(port), "MANAGEMENT_ADDR": management, "SHUTDOWN_DELAY": "5s"})
		pairs = append(pairs, fmt.Sprintf("127.0.0.1:%d=%s", port, management))
		instances = append(instances, w.spawn(program(t), settings[len(settings)-1]))
	}
	w.follow(upstream, "true", pairs...)() // once, so that nginx has something to begin with
	address, reload := w.startNginx("", "server 127.0.0.1:3000;", "include "+upstream+";", "X-Forwarded-For $remote_addr", "X-Forwarded-For $proxy_add_x_forwarded_for")
	t.Cleanup(w.follow(upstream, reload, pairs...))

	requests, stop := w.load(address)
	for i, p := range instances {
		begun := requests.Load()
		w.end(p, syscall.SIGTERM)
		alone := requests.Load()
		w.spawn(program(t), settings[i])
		w.eventually("both are ready", time.Minute, func() bool {
			list, err := os.ReadFile(upstream)
			return err == nil && strings.Count(string(list), "server") == 2
		})
		t.Logf("instance %d: %d requests while it stopped, %d while it started", i+1, alone-begun, requests.Load()-alone)
	}
	stop()
	if requests.Load() < 100 {
		t.Errorf("only %d requests", requests.Load())
	}
}

// follow runs deploy/nginx-upstream.sh until end is called, and returns when it has written the file.
func (w *env) follow(file, reload string, pairs ...string) (end func()) {
	w.Helper()
	if _, err := stack.FindOrInstall(w.Context(), nil, stack.Curl); err != nil {
		w.Fatal(err)
	}
	cmd := exec.Command("deploy/nginx-upstream.sh", append([]string{file}, pairs...)...)
	cmd.Env = append(os.Environ(), "INTERVAL=0.2", "TIMEOUT=30", "RELOAD="+reload) // on a busy machine
	log := new(buffer)
	cmd.Stdout, cmd.Stderr = log, log
	child, err := stack.Spawn(cmd, syscall.SIGTERM)
	if err == nil {
		err = child.Await(w.Context(), func(context.Context) error { _, err := os.Stat(file); return err })
	}
	if err != nil {
		w.Fatalf("%v\n%s", err, log)
	}
	return func() { child.End(syscall.SIGTERM, 5*time.Second) }
}

// load sends 200 requests a second, or as many as the machine answers, until stop is called: checks of tokens, and for
// one in five of them a refresh or a sign-in. Each that fails is an error of the test.
func (w *env) load(address string) (requests *atomic.Int64, stop func()) {
	w.Helper()
	requests = new(atomic.Int64)
	var late atomic.Int64 // a busy machine: Keycloak did not answer in time, which the service says itself
	send := func(r call) answer {
		r.header = map[string]string{"Connection": "close"} // a reload of nginx closes connections that are kept
		a, err := w.send(address, r)
		switch requests.Add(1); {
		case err == nil && a.slug() == "unavailable" && r.path != validatePath:
			late.Add(1)
		case err != nil || a.Status != 200:
			w.Errorf("%s: %v %v", r.path, a, err)
		}
		return a
	}
	ctx, cancel := context.WithCancel(w.Context())
	var all sync.WaitGroup
	every := func(pause time.Duration, f func(i int)) {
		all.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for i := 1; ctx.Err() == nil; i++ {
				f(i)
				<-tick.C
			}
		})
	}
	var people []answer
	for range 10 {
		_, a := w.signedIn()
		people = append(people, a)
	}
	start := time.Now()
	for _, a := range people {
		email, token := a.JSON["user"].(body)["email"].(string), a.text("access_token")
		every(62*time.Millisecond, func(int) { send(bearing(validatePath, token)) })
		every(250*time.Millisecond, func(i int) {
			r := refreshing(a.text("refresh_token"))
			if i%8 == 0 {
				r = signingIn(email, password)
			}
			if next := send(r); next.Status == 200 {
				a = next
			}
		})
	}
	return requests, func() {
		cancel()
		all.Wait()
		w.Logf("%d requests, %.0f a second; of %d Keycloak was late", requests.Load(), float64(requests.Load())/time.Since(start).Seconds(), late.Load())
	}
}
