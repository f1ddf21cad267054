package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// invoked runs the program with these variables alone, and returns what it says and its exit code.
func invoked(t testing.TB, variables map[string]string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := commandLine(t, variables, args...)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return out.String(), log.String(), cmd.ProcessState.ExitCode()
}

// commandLine is the program with arguments and these variables alone.
func commandLine(t testing.TB, variables map[string]string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Env = []string{}
	for name, value := range variables {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// TestCommandLine calls the program as people do who have set no variable.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	var list []string // the commands as help has them
	for _, c := range commands {
		list = append(list, regexp.QuoteMeta(fmt.Sprintf("%-18s %s\n", c.use, c.does)))
	}
	general := `(?s)^auth-service COMMAND\n\n` + strings.Join(list, "") + `.*README\.md.*docs/operating\.md`
	const help = "; use -h for help\n$"
	const wrong = `^auth-service: the configuration is wrong:\n(.*\n)*DATABASE_URL is required\n`
	const unhealthy = "^auth-service: something is wrong with this deployment\n$"
	syncs, build := `(?s)^auth-service sync\n.*-dry-run.*-json`, `^\{(?s).*"go": "go1.*"version": "`
	file := filepath.Join(t.TempDir(), "none")
	for args, want := range map[string]struct {
		code           int
		stdout, stderr string
	}{
		"-h": {0, general, "^$"}, "--h": {0, general, "^$"}, "help": {0, general, "^$"},
		"-help": {0, general, "^$"}, "--help": {0, general, "^$"},
		"sync -h": {0, syncs, "^$"}, "sync --help": {0, syncs, "^$"}, "sync -dry-run -h": {0, syncs, "^$"},
		"help sync": {0, syncs, "^$"}, "-h sync": {0, syncs, "^$"},
		"serve -h":       {0, `^auth-service serve\n`, "^$"},
		"jobs --help":    {0, `^auth-service jobs\n`, "^$"},
		"migrate -help":  {0, `^auth-service migrate\n`, "^$"},
		"grant-admin -h": {0, `^auth-service grant-admin EMAIL\n`, "^$"},
		"healthcheck -h": {0, `^auth-service healthcheck\n`, "^$"},
		"doctor -h":      {0, `(?s)^auth-service doctor\n.*-admin-password-file.*-admin-user.*-dry-run.*-fix.*-json`, "^$"},
		"version -h":     {0, `^auth-service version\n`, "^$"},
		"help --help":    {0, `^auth-service help \[COMMAND\]\n`, "^$"},
		"version":        {0, `^\S+\n$`, "^$"},
		"-version":       {0, `^\S+\n$`, "^$"},
		"--version":      {0, `^\S+\n$`, "^$"},
		"version -json":  {0, build, "^$"}, "version --json": {0, build, "^$"}, "--version -json": {0, build, "^$"},

		"nonsense":               {2, "^$", `^auth-service: there is no command "nonsense"` + help},
		"-nonsense":              {2, "^$", `^auth-service: there is no command "-nonsense"` + help},
		"-sync":                  {2, "^$", `no command "-sync"` + help},
		"h":                      {2, "^$", `no command "h"` + help},
		" ":                      {2, "^$", `no command ""` + help},
		"help nonsense":          {2, "^$", `no command "nonsense"` + help},
		"help sync doctor":       {2, "^$", `unexpected argument "doctor"` + help},
		"help -json":             {2, "^$", `no command "-json"` + help},
		"sync -nonsense":         {2, "^$", `not defined: -nonsense` + help},
		"sync -fix":              {2, "^$", `not defined: -fix` + help},
		"sync -dry-run=perhaps":  {2, "^$", `-dry-run.*` + help},
		"sync dry-run":           {2, "^$", `unexpected argument "dry-run"` + help},
		"jobs now":               {2, "^$", `unexpected argument "now"` + help},
		"version 2":              {2, "^$", `unexpected argument "2"` + help},
		"grant-admin":            {2, "^$", `EMAIL is missing` + help},
		"grant-admin a@b.test c": {2, "^$", `unexpected argument "c"` + help},
		"doctor -fix":            {2, "^$", `-fix needs both.*` + help},
		"doctor --dry-run":       {2, "^$", `-dry-run needs -fix` + help},
		"doctor -admin-user":     {2, "^$", `needs an argument: -admin-user` + help},
		"doctor -admin-user a":   {2, "^$", `-admin-password-file belong together.*` + help},

		"doctor -admin-user a -admin-password-file " + file: {1, "^$", "^auth-service: -admin-password-file: .*" + file},
		"": {1, "^$", wrong}, "serve": {1, "^$", wrong}, "jobs": {1, "^$", wrong}, "migrate": {1, "^$", wrong},
		"healthcheck":          {1, "^$", wrong},
		"grant-admin a@b.test": {1, "^$", wrong}, "sync -json": {1, "^$", wrong}, "sync --json": {1, "^$", wrong},
		"sync -dry-run": {1, "^$", wrong}, "sync --dry-run": {1, "^$", wrong}, "sync --dry-run=true": {1, "^$", wrong},
		"doctor":        {1, "wrong    variables: DATABASE_URL is required\n", unhealthy},
		"doctor --json": {1, `^\[\n.*\n *"name": "variables"`, unhealthy},
	} {
		words := strings.Split(args, " ")
		if args == "" {
			words = nil
		}
		stdout, stderr, code := invoked(t, nil, words...)
		if code != want.code || !regexp.MustCompile(want.stdout).MatchString(stdout) ||
			!regexp.MustCompile(want.stderr).MatchString(stderr) {
			t.Errorf("%q ends with %d, not %d: %q, %q", args, code, want.code, stdout, stderr)
		}
	}
}

// Help that can't be written has not been given.
func TestCommandOutputLost(t *testing.T) {
	t.Parallel()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range [][]string{{"-h"}, {"version"}, {"version", "-json"}, {"doctor", "-json"}} {
		if err := run(t.Context(), args, environment(nil), full, io.Discard); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// What was interrupted has not succeeded, although it has come to its end.
func TestCommandInterrupted(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancelCause(t.Context())
	ends := func() {}
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { ends() }))
	defer server.Close()
	check := func() error {
		settings := environment(map[string]string{"MANAGEMENT_ADDR": server.Listener.Addr().String()})
		return run(ctx, []string{"healthcheck"}, settings, io.Discard, io.Discard)
	}
	if err := check(); err != nil {
		t.Error(err)
	}
	signal := errors.New("signal received")
	ends = func() { interrupt(signal) }
	if err := check(); !errors.Is(err, signal) {
		t.Errorf("interrupted, it ends with %v", err)
	}
}

// TestSyncReport runs full passes by the program, whose report is what the API says of them.
func TestSyncReport(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	admin := w.admin()
	_, _, id := w.member()
	w.edits(id, body{attrRoles: []string{roleAdmin}})
	reports := func(stdout string) (run answer) {
		t.Helper()
		var report body
		if err := json.Unmarshal([]byte(stdout), &report); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		if run = admin.asks("GET", "/api/v1/sync/"+text(report["sync_id"]), nil); run.Status != 200 {
			t.Fatal(run)
		}
		if diff := cmp.Diff(run.JSON, report); diff != "" {
			t.Errorf("-API +command:\n%s", diff)
		}
		return run
	}
	for _, c := range []struct {
		args            []string
		found, repaired float64
		code            int
	}{{[]string{"-dry-run", "--json"}, 1, 0, 3}, {[]string{"-json"}, 1, 1, 0}} {
		stdout, stderr, code := invoked(t, w.vars, append([]string{"sync"}, c.args...)...)
		class, _ := reports(stdout).JSON["differences"].(body)[string(diffRole)].(body)
		if code != c.code || class["found"] != c.found || class["repaired"] != c.repaired {
			t.Errorf("%v: %d, %s", c.args, code, stdout)
		}
		if strings.Contains(stderr, "compared") {
			t.Errorf("%v: nobody watches, and it says %q", c.args, stderr)
		}
	}
	w.showsProgress()

	// A second one at the same time has no report; the first one is interrupted.
	first, release := w.kc.holdAt("^list_users ", false)
	defer release()
	cmd := commandLine(t, w.vars, "sync", "-json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-first
	if out, says, code := invoked(t, w.vars, "sync", "-json"); code != 1 || out != "" ||
		!strings.Contains(says, "a full pass is running already") {
		t.Errorf("the second one: %d, %q, %q", code, out, says)
	}
	cmd.Process.Signal(syscall.SIGINT)
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 ||
		!strings.Contains(stderr.String(), "auth-service: interrupt signal received\n") {
		t.Errorf("interrupted: %v, %s", cmd.ProcessState, &stderr)
	}
	if run := reports(stdout.String()); run.text("status") != "failed" {
		t.Errorf("interrupted: %v", run)
	}
}

// showsProgress has passes show a terminal, and nobody else, how far they are.
func (w *env) showsProgress() {
	w.Helper()
	terminal, err := exec.LookPath("script") // of util-linux
	if err != nil {
		w.Fatal(err)
	}
	report := filepath.Join(w.TempDir(), "report")
	cmd := exec.Command(terminal, "-qec", fmt.Sprintf("%s sync -json > %s", program(w), report), "/dev/null")
	cmd.Env = commandLine(w, w.vars).Env
	shown, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(shown), "\r2 of 2 users compared, 0 differences, 0 repaired") {
		w.Errorf("%v: %q", err, shown)
	}
	if text, err := os.ReadFile(report); err != nil || !json.Valid(text) {
		w.Errorf("%v: %q", err, text)
	}
	if stdout, stderr, code := invoked(w, w.vars, "sync"); code != 0 || stdout != "done \n" ||
		strings.Contains(stderr, "compared") {
		w.Errorf("without a terminal: %d, %q, %q", code, stdout, stderr)
	}
}
