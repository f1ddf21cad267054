package main

import (
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"

	"github.com/google/go-cmp/cmp"
)

// promtool runs Prometheus' own tool.
func promtool(t testing.TB, stdin string, args ...string) {
	t.Helper()
	tool, err := stack.FindOrInstall(t.Context(), nil, stack.Promtool)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool[0], args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool %v: %v\n%s", args, err, out)
	}
}

// sample is the value of a series, which must be there.
func sample(t testing.TB, metrics, series string) float64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(metrics)
	if m == nil {
		t.Fatalf("/metrics lacks %s", series)
	}
	value, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// metricsOf is /metrics of a server that has not been asked for anything yet.
func metricsOf(t testing.TB, s *server) string {
	t.Helper()
	if _, err := s.handler(); err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	s.managementHandler().ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	return answer.Body.String()
}

// Whatever rules, dashboard and documents name is there before the first event, and what is there is documented.
func TestMetricNames(t *testing.T) {
	t.Parallel()
	texts, text := documents(t), metricsOf(t, newDatabase(t).server)
	measured := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z_]+)[{ ]`).FindAllStringSubmatch(text, -1) {
		measured[m[1]] = true
	}
	for _, path := range []string{"deploy/prometheus-rules.yaml", "deploy/prometheus-rules-test.yaml", "deploy/grafana.json"} {
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[path] = string(file)
	}
	for path, text := range texts {
		for _, name := range regexp.MustCompile(`\bauth_[a-z_]+_[a-z]+\b`).FindAllString(text, -1) {
			if !measured[name] && !measured[name+"_count"] && !slices.Contains([]string{"auth_service", "auth_owner", "auth_request"}, name) {
				t.Errorf("%s: there is no metric %s", path, name)
			}
		}
	}
	for name := range measured {
		if base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, ""); strings.HasPrefix(name, "auth_") {
			if !strings.Contains(texts["docs/operating.md"], "`"+base+"`") {
				t.Errorf("docs/operating.md lacks %s", base)
			}
		} else if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s has no prefix", name)
		}
	}
	if sample(t, text, fmt.Sprintf(`auth_build_info{goversion=%q,version=%q}`, goVersion(t), version())) != 1 {
		t.Error("auth_build_info is not 1")
	}
}

func goVersion(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOVERSION").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// Each alert has its section in the runbook, and each section its alert.
func TestAlertsAreDocumented(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("deploy/prometheus-rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var alerts, sections []string
	for _, m := range regexp.MustCompile(`- alert: (\w+)[^#]*runbook: docs/operating.md#(\w+)\n`).FindAllStringSubmatch(string(file), -1) {
		alerts = append(alerts, m[1])
		if m[2] != strings.ToLower(m[1]) {
			t.Errorf("%s leads to %s", m[1], m[2])
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^#### (Auth\w+)$`).FindAllStringSubmatch(documents(t)["docs/operating.md"], -1) {
		sections = append(sections, m[1])
	}
	if diff := cmp.Diff(alerts, sections); diff != "" || len(alerts) < 10 {
		t.Errorf("-alerts +sections\n%s", diff)
	}
}

// A real Prometheus scrapes a real instance, evaluates the rules, and finds something for each query of the dashboard,
// before anything has happened.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.verifier.revoked.add(time.Now())
	metricsOf(t, d.server)
	service := httptest.NewServer(d.managementHandler())
	t.Cleanup(service.Close)
	api := startPrometheus(t, service.Listener.Addr().String())

	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	evaluated := func() bool {
		api("rules", &rules)
		return len(rules.Groups) == 1 && !slices.ContainsFunc(rules.Groups[0].Rules,
			func(r struct{ Name, Health, LastError, State string }) bool { return r.Health == "unknown" })
	}
	for end := time.Now().Add(time.Minute); !evaluated(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not evaluated: %+v", rules)
		}
	}
	for _, r := range rules.Groups[0].Rules {
		if r.Health != "ok" || r.State == "firing" {
			t.Errorf("%+v", r)
		}
	}
	file, err := os.ReadFile("deploy/grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(file, &board); err != nil {
		t.Fatal(err)
	}
	for _, p := range board.Panels {
		for _, q := range p.Targets {
			query := strings.NewReplacer("$__rate_interval", "1m", "$__range", "1h").Replace(q.Expr)
			query, _, _ = strings.Cut(query, " > 0") // what has not happened is not drawn
			var found struct{ Result []any }
			for end := time.Now().Add(30 * time.Second); len(found.Result) == 0; time.Sleep(50 * time.Millisecond) {
				if api("query?query="+url.QueryEscape(query), &found); time.Now().After(end) {
					t.Fatalf("%s: %s finds nothing", p.Title, query)
				}
			}
		}
	}
}

// startPrometheus starts one with our rules, and returns how to ask its API.
func startPrometheus(t testing.TB, target string) (api func(path string, data any)) {
	t.Helper()
	prometheus, err := stack.FindOrInstall(t.Context(), nil, stack.Prometheus)
	if err != nil {
		t.Fatal(err)
	}
	rules, _ := filepath.Abs("deploy/prometheus-rules.yaml")
	dir, addr, log := t.TempDir(), fmt.Sprintf("127.0.0.1:%d", stack.FreePort()), new(buffer)
	config := fmt.Sprintf(`{global: {scrape_interval: 1500ms, scrape_timeout: 1500ms, evaluation_interval: 500ms}, rule_files: [%q],
		scrape_configs: [{job_name: auth-service, static_configs: [{targets: [%q]}]}]}`, rules, target)
	if err := os.WriteFile(dir+"/prometheus.yml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prometheus[0], "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data", "--web.listen-address="+addr)
	cmd.Stderr = log
	ask := func(path string, data any) error {
		resp, err := client.Get("http://" + addr + "/api/v1/" + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		answer := struct {
			Status, Error string
			Data          any
		}{Data: data}
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
			return fmt.Errorf("%s: %s %s %w", path, resp.Status, answer.Error, err)
		}
		return nil
	}
	child, err := stack.Spawn(cmd, syscall.SIGTERM)
	if err == nil {
		t.Cleanup(func() { child.End(syscall.SIGTERM, 10*time.Second) })
		err = child.Await(t.Context(), func(context.Context) error { return ask("rules", nil) })
	}
	if err != nil {
		t.Fatalf("prometheus: %v\n%s", err, log)
	}
	return func(path string, data any) {
		t.Helper()
		if err := ask(path, data); err != nil {
			t.Fatal(err)
		}
	}
}

// Every operation that a call to Keycloak is measured as is in keycloakOperations, so that its series exist before the
// first call, and there is none that nobody makes.
func TestKeycloakOperations(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var parsed []*ast.File
	takes := map[string]int{} // function → where its parameter "operation" is
	used := map[string]bool{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, f)
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok {
				i := 0
				for _, field := range fn.Type.Params.List {
					for _, param := range field.Names {
						if param.Name == "operation" {
							takes[fn.Name.Name] = i
						}
						i++
					}
				}
			}
		}
	}
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if method, ok := call.Fun.(*ast.SelectorExpr); ok && takes[method.Sel.Name] > 0 {
					name, ok := call.Args[takes[method.Sel.Name]].(*ast.BasicLit)
					if ok && strings.ToUpper(name.Value) != name.Value { // the administrator's api is asked GET
						used[strings.Trim(name.Value, `"`)] = true
					}
				}
			}
			return true
		})
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(used)), keycloakOperations); diff != "" {
		t.Errorf("-used +listed\n%s", diff)
	}
}

// What registrations and sign-ins come to is counted, each once.
func TestFunnel(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(map[string]string{"JOB_INTERVAL": "0"})
	confirmed, given, late := newEmail(), newEmail(), newEmail()
	v.account(confirmed)
	v.register(given)
	v.wants(v.post(cancelPath, body{"token": v.readMail(given, 1).Token}), 200, "")
	v.register(late)
	v.exec(`update user_registrations set expires_at = now() where email = $1`, late)
	v.wants(v.post("/api/v1/register/verify", body{"token": v.readMail(late, 1).Token, "password": password}), 410, "verification-expired")
	v.wants(v.login(confirmed, password), 200, "")
	v.wants(v.login(confirmed, "wrong"), 401, "invalid-credentials")
	v.wants(v.login(given, password), 401, "invalid-credentials")
	if a := v.get("/auth/callback?state=unknown"); a.Status != 400 {
		t.Error(a)
	}
	text := string(v.management404("/metrics").Body)
	for series, want := range map[string]float64{`auth_registrations_total{step="begin"}`: 3, `auth_registrations_total{step="mail"}`: 3,
		`auth_registrations_total{step="resend"}`: 0, `auth_registrations_total{step="verified"}`: 1, `auth_registrations_total{step="expired"}`: 1,
		`auth_registrations_total{step="cancelled"}`: 1, `auth_verification_mails_total{outcome="sent"}`: 3,
		`auth_sign_ins_total{flow="password",outcome="ok"}`: 1, `auth_sign_ins_total{flow="password",outcome="invalid-credentials"}`: 2,
		`auth_sign_ins_total{flow="code",outcome="ok"}`:                 0,
		`auth_sign_ins_total{flow="code",outcome="sign-in-incomplete"}`: 1} {
		if got := sample(t, text, series); got != want {
			t.Errorf("%s is %v, not %v", series, got, want)
		}
	}
}

// Tasks that are due are counted by kind. The oldest one says how long.
func TestQueueState(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(`delete from tasks`)
	now := d.server.now()
	d.server.now = func() time.Time { return now }
	d.exec(`insert into tasks (task_id, due_at, revision, locked_until) values ('REG-a', $1, 1, null), ('kc:b', $2, 1, null),
		('kc:c', $2, 1, null), ('SES-locked', $1, 1, $3), ('job:sync', $3, 1, null)`, now.Add(-90*time.Second), now.Add(-time.Minute), now.Add(time.Minute))
	text := metricsOf(t, d.server)
	for series, want := range map[string]float64{`auth_task_oldest_due_seconds`: 90, `auth_tasks_due{kind="REG"}`: 1, `auth_tasks_due{kind="kc"}`: 2,
		`auth_tasks_due{kind="SES"}`: 0, `auth_tasks_due{kind="sync"}`: 0} {
		if got := sample(t, text, series); got != want {
			t.Errorf("%s is %v, not %v", series, got, want)
		}
	}
	d.exec(`delete from tasks`)
	if got := sample(t, metricsOf(t, d.server), "auth_task_oldest_due_seconds"); got != 0 {
		t.Errorf("nothing is due, for %v s", got)
	}
}

// The times of the keys and of the revocations stand still while their store is away.
func TestReadTimes(t *testing.T) {
	kc, err := newKeycloakProxy(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	s := idle(t, slog.New(slog.DiscardHandler), map[string]string{"KEYCLOAK_URL": kc.url(), "KEYCLOAK_REALM": sharedEnv(t).realm})
	expect := func(when string, keys, revocations time.Time) {
		t.Helper()
		text := metricsOf(t, s)
		for series, want := range map[string]time.Time{"auth_signing_keys_read_timestamp_seconds": keys, "auth_revocations_read_timestamp_seconds": revocations} {
			if got := time.UnixMilli(int64(sample(t, text, series) * 1000)); got.Sub(want).Abs() > time.Second {
				t.Errorf("%s: %s is %v, not %v", when, series, got, want)
			}
		}
	}
	never := time.Unix(0, 0)
	expect("at the start", never, never)
	s.verifier.refreshKeys(t.Context())
	read, long := s.verifier.keys.Load().asked, time.Now().Add(-time.Hour)
	s.verifier.revoked.add(long)
	expect("once read", read, long)
	if err := kc.close(); err != nil {
		t.Fatal(err)
	}
	s.verifier.keys.Load().read = long
	s.verifier.refreshKeys(t.Context())
	if s.verifier.keys.Load().err == nil {
		t.Error("Keycloak is away, and its keys were read")
	}
	expect("Keycloak is away", long, long)
}

// A request's trace context is in its log lines, and goes on to Keycloak with each of its calls.
func TestTracing(t *testing.T) {
	w := sharedEnv(t)
	kc, err := newKeycloakProxy(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kc.close() })
	came := new(buffer) // one line for each call
	front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		came.add(fmt.Sprintf("%s%v%v", r.URL.Path, r.Header["Traceparent"], r.Header["Tracestate"]))
		kc.ServeHTTP(rw, r)
	}))
	t.Cleanup(front.Close)
	v, _ := w.another(map[string]string{"KEYCLOAK_URL": front.URL, "JOB_INTERVAL": "0"})
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for _, c := range []struct {
		name, parent, state, want string
	}{
		{"none", "", "a=1", "[][]"},
		{"well-formed", parent, "a=1,b=2", "[" + parent + "][a=1,b=2]"},
		{"not well-formed", strings.ToUpper(parent), "a=1", "[][]"},
	} {
		before := len(came.String())
		r := registering(newEmail())
		r.header = map[string]string{"Tracestate": c.state}
		if c.parent != "" {
			r.header["Traceparent"] = c.parent
		}
		a := v.do(r)
		v.wants(a, 201, "")
		calls := regexp.MustCompile(`(?m)^/admin/.*$`).FindAllString(came.String()[before:], -1)
		if len(calls) < 4 || slices.ContainsFunc(calls, func(call string) bool { return !strings.HasSuffix(call, c.want) }) {
			t.Errorf("%s: %q", c.name, calls)
		}
		lines := regexp.MustCompile(`(?m)^.*`+a.Header.Get("X-Request-Id")+`.*$`).FindAllString(w.logs.String(), -1)
		for _, line := range lines {
			if strings.Contains(line, `"trace_id":"4bf92f3577b34da6a3ce929d0e0e4736","span_id":"00f067aa0ba902b7"`) != (c.parent == parent) {
				t.Errorf("%s: %s", c.name, line)
			}
		}
		if len(lines) < 3 { // audit entries, the request
			t.Errorf("%s: %q", c.name, lines)
		}
	}
}

func TestTraceContext(t *testing.T) {
	t.Parallel()
	const trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	for _, c := range []struct {
		name, state string
		parents     []string
		kept        bool
	}{
		{"sampled", "", []string{"00-" + trace + "-" + span + "-01"}, true},
		{"not sampled", "", []string{"00-" + trace + "-" + span + "-00"}, true},
		{"none", "", nil, false},
		{"empty", "", []string{""}, false},
		{"two", "", []string{"00-" + trace + "-" + span + "-01", "00-" + trace + "-" + span + "-01"}, false},
		{"version ff", "", []string{"ff-" + trace + "-" + span + "-01"}, false},
		{"a later version", "", []string{"01-" + trace + "-" + span + "-01"}, false},
		{"something behind it", "", []string{"00-" + trace + "-" + span + "-01-x"}, false},
		{"a line behind it", "", []string{"00-" + trace + "-" + span + "-01\n"}, false},
		{"capitals", "", []string{"00-" + strings.ToUpper(trace) + "-" + span + "-01"}, false},
		{"trace of zeros", "", []string{"00-" + strings.Repeat("0", 32) + "-" + span + "-01"}, false},
		{"span of zeros", "", []string{"00-" + trace + "-" + strings.Repeat("0", 16) + "-01"}, false},
		{"too short", "", []string{"00-" + trace[1:] + "-" + span + "-01"}, false},
	} {
		if got := traceOf(http.Header{"Traceparent": c.parents}); (got != nil) != c.kept || c.kept && got.Get("Traceparent") != c.parents[0] {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	h := http.Header{"Traceparent": {"00-" + trace + "-" + span + "-01"}, "Tracestate": {"a=1", "b=2"}}
	if got := traceOf(h).Get("Tracestate"); got != "a=1,b=2" {
		t.Errorf("tracestate is %q", got)
	}
	h["Tracestate"] = []string{strings.Repeat("a", 513)}
	if got := traceOf(h); got == nil || got.Get("Tracestate") != "" {
		t.Errorf("a tracestate that is too long: %v", got)
	}
}

// The line of a request has the fields that docs/operating.md says it has, whatever the client has made up.
func TestRequestLog(t *testing.T) {
	w := sharedEnv(t)
	documented := map[string]bool{}
	_, table, _ := strings.Cut(documents(t)["docs/operating.md"], "### The log\n")
	table, _, _ = strings.Cut(table, "### Tracing\n")
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(table, -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			documented[name[1]] = true
		}
	}
	for _, c := range []struct {
		call          call
		route, method string
		status        float64
	}{
		{call{path: "/problems/not-found?token=secret"}, "/problems/{slug}", "GET", 200},
		{call{method: "HEAD", path: "/health"}, "/health", "HEAD", 200},
		{call{path: "/nothing/secret"}, "none", "GET", 404},
		{call{method: "BREW", path: "/api/v1/auth/ext-authz/secret", header: map[string]string{"X-Request-Id": "envoys-id"}}, "/api/v1/auth/ext-authz/", "_OTHER", 401},
		{call{method: "POST", path: "/verify", json: body{}}, "/verify", "POST", 400},
	} {
		a, err := w.send(w.url, call{method: c.call.method, path: c.call.path, json: c.call.json, header: c.call.header, from: "192.0.2.77"})
		if err != nil {
			t.Fatal(err)
		}
		line := map[string]any{}
		w.eventually("the line of the request", 5*time.Second, func() bool {
			text := regexp.MustCompile(`(?m)^.*"msg":"request".*` + a.Header.Get("X-Request-Id") + `.*$`).FindString(w.logs.String())
			return json.Unmarshal([]byte(text), &line) == nil
		})
		if took, ok := line["http.server.request.duration"].(float64); !ok || took <= 0 || took > 60 {
			t.Errorf("%s: took %v", c.call.path, line["http.server.request.duration"])
		}
		for name := range line {
			if !documented[name] {
				t.Errorf("docs/operating.md lacks the field %s", name)
			}
		}
		got := body{"route": line["http.route"], "method": line["http.request.method"], "status": line["http.response.status_code"],
			"client": line["client.address"], "version": line["service.version"]}
		if diff := cmp.Diff(body{"route": c.route, "method": c.method, "status": c.status, "client": "192.0.2.77", "version": version()}, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", c.call.path, diff)
		}
	}
}
