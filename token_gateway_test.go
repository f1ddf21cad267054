package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"

	"github.com/google/go-cmp/cmp"
)

// Gateways get the headers of the contract, and nothing of what people need.
func TestGatewayHeaders(t *testing.T) {
	w := sharedEnv(t)
	email, _, _ := w.member()
	token := "Bearer " + w.login(email, password).text("access_token")
	identity := "X-Auth-Network-Id X-Auth-Roles X-Auth-Station-Id X-Auth-Subject X-Auth-User-Id"
	for _, c := range []struct {
		method, path, token string
		status              int
		headers             string
	}{
		{"GET", validatePath, token, 200, identity},
		{"HEAD", validatePath, token, 200, identity},
		{"GET", validatePath, "", 401, "Www-Authenticate Content-Type"},
		{"GET", validatePath, token + "x", 401, "Www-Authenticate Content-Type"},
		{"GET", validatePath + "?role=admin", token, 403, "Www-Authenticate Content-Type"},
		{"GET", validatePath + "?rule=admin", token, 400, "Content-Type"},
		{"GET", "/api/v1/auth/%76alidate?role=admin", token, 403, "Www-Authenticate Content-Type"},
		{"POST", validatePath, token, 405, "Allow Content-Type"},
		{"OPTIONS", validatePath, "", 405, "Allow Content-Type"},
		{"GET", envoyPath, token, 200, identity},
		{"PATCH", envoyPath + "a//../b?role=admin", token, 200, identity},
		{"PATCH", envoyPath, "", 401, "Www-Authenticate Content-Type"},
	} {
		for _, id := range []string{"", "a-gateways-id", "not well-formed"} {
			a := w.do(call{method: c.method, path: c.path, header: map[string]string{"Authorization": c.token, "X-Request-Id": id, "Origin": "https://a.example"}})
			want := append(strings.Fields(c.headers), "Cache-Control", "Date")
			if c.method != "HEAD" {
				want = append(want, "Content-Length")
			}
			if id == "a-gateways-id" {
				want = append(want, "X-Request-Id")
			}
			slices.Sort(want)
			got := slices.Sorted(maps.Keys(a.Header))
			if got := a.Header.Get("X-Request-Id"); got != "" && got != id {
				t.Errorf("%s %s: another id than was sent: %q", c.method, c.path, got)
			}
			if diff := cmp.Diff(want, got); a.Status != c.status || diff != "" || a.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s %s %q: %d %s", c.method, c.path, id, a.Status, diff)
			}
		}
	}
}

// A real nginx with the example's configuration, between clients, an application and
// the service.
func TestNginx(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	nobody, user, operator, admin := visitor{}, w.visitor("user", noScope), w.visitor("operator", "NET-1"), w.visitor("admin", noScope)
	u, a := strings.Split(user.token, "."), strings.Split(admin.token, ".")
	forger := visitor{token: u[0] + "." + a[1] + "." + u[2]}
	stranger := visitor{token: "eyJhbGciOiJSUzI1NiIsImtpZCI6Im5ldyJ9." + u[1] + "." + u[2]} // {"alg":"RS256","kid":"new"}
	toService, err := newPostgresProxy(strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	w.quick = true
	w.url, _ = w.startNginx(toService.addr)
	insufficient := problemForbidden.withChallenge("insufficient_scope")

	for _, c := range []struct {
		as         visitor
		path, seen string // by the application
		refusal    problem
	}{
		{nobody, "/public/x?y=%2f", "/public/x?y=%2f", problem{}},
		{nobody, "/", "", problemUnauthorized},
		{forger, "/admin/", "", problemInvalidAccessToken},
		{user, "/?role=admin&x", "/?role=admin&x", problem{}}, // the client's query required nothing
		{user, "/admin/?role=user", "", insufficient},
		{user, "/networks/X/", "", insufficient}, // "X" is no network
		{operator, "/networks/NET-2/?network_id=NET-1", "", insufficient},
		{operator, "/networks/NET-1", "/networks/NET-1", problem{}},
		{admin, "/networks/NET-1/", "/networks/NET-1/", problem{}},
		// The application gets the path that was checked, not the client's spelling.
		{nobody, "/admin/..%2fpublic/", "/public/", problem{}},
		{user, "/admin/..%2f?x", "/?x", problem{}},
		{user, "/public/%2e%2e/admin/", "", insufficient},
		{admin, "/public/..%2fadmin/x%20y", "/admin/x%20y", problem{}},
		{operator, "/networks/NET-1/..%2FNET-2/", "", insufficient},
		{operator, "/networks/NET-2/..%2FNET-1/%0d%0aX-Auth-Roles:%20admin%3f", "/networks/NET-1/%0D%0AX-Auth-Roles:%20admin%3F", problem{}},
	} {
		start := time.Now()
		a := w.do(c.as.call("POST", c.path))
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s took %v: the service has waited for a body", c.path, took)
		}
		if c.seen == "" { // the very words of the service
			header := http.Header{}
			setProblemHeaders(header, c.refusal)
			c.refusal.RequestID = a.text("request_id")
			words, _ := json.Marshal(c.refusal)
			w.wants(a, c.refusal.Status, c.refusal.slug())
			if diff := cmp.Diff(string(words), string(a.Body)) + cmp.Diff(header["Www-Authenticate"], a.Header["Www-Authenticate"]); diff != "" {
				t.Errorf("%s: %s", c.path, diff)
			}
			continue
		}
		want := body{"path": c.seen, "body": 100_000.0, "X-Forwarded-For": "127.0.0.1"}
		if !strings.HasPrefix(c.seen, "/public/") {
			maps.Copy(want, c.as.identity)
		}
		if diff := cmp.Diff(want, body(a.JSON)); a.Status != 200 || diff != "" {
			t.Errorf("%s: %d %s", c.path, a.Status, diff)
		}
	}
	for path, status := range map[string]int{"/admin": 301, "/networks/a%26role=user/": 404, "/networks/": 404, "/_validate/admin": 404,
		"/account/register": 200, "/static/style.css": 200, "/swagger-ui": 200, "/problems/forbidden": 200, "/api/v1/nothing": 404,
		"/admin;a/x": 400, "/public/..;/admin/x": 400, "/public/..%5cadmin/x": 400, "/public/%3b": 400} { // S21
		if a := w.do(admin.call("GET", path)); a.Status != status {
			t.Errorf("%s: %v", path, a)
		}
	}
	w.wants(w.do(signingIn("nobody@example.test", password)), 401, "invalid-credentials")
	if got := w.value(`select ip_address from audit_log where action = 'login' and outcome = 'refused'`); got != "127.0.0.1" {
		t.Errorf("the client's own X-Forwarded-For was believed: %s", got)
	}

	w.kc.close()
	w.pg.close()
	w.wants(w.do(operator.call("GET", "/networks/NET-1/")), 200, "")
	w.wants(w.do(stranger.call("GET", "/")), 503, "unavailable") // Keycloak may have a new key: the service's 503
	toService.close()
	w.wants(w.do(admin.call("GET", "/admin/")), 503, "unavailable")
	w.wants(w.do(nobody.call("GET", "/public/")), 200, "")
	if err := errors.Join(toService.open(), w.kc.open(), w.pg.open()); err != nil {
		t.Fatal(err)
	}
	w.wants(w.do(admin.call("GET", "/admin/")), 200, "")
}

// Behind a proxy that rewrites Host, forms and the cookie of a browser that knows no Sec-Fetch-Site count if they
// come from PUBLIC_URL.
func TestRewrittenHost(t *testing.T) {
	w := *sharedEnv(t)
	v, _ := w.another(map[string]string{"PUBLIC_URL": "https://Accounts.Example.com:443"})
	_, a := w.signedIn()
	v.url, _ = v.startNginx(strings.TrimPrefix(v.url, "http://"), "proxy_set_header Host $http_host;", "") // nginx sends "auth"
	for origin, want := range map[string]string{"https://accounts.example.com": "303 200", "https://evil.example": "403 403", "null": "403 403"} {
		headers := map[string]string{"Origin": origin}
		form := v.do(call{method: "POST", path: "/account/register", form: url.Values{"email": {newEmail()}}, header: headers})
		cookie := v.do(withCookie(refreshPath, a.text("refresh_token"), headers))
		if got := fmt.Sprint(form.Status, " ", cookie.Status); got != want {
			t.Errorf("%s: form and cookie are answered %s, want %s", origin, got, want)
		}
	}
}

// visitor is who asks, and what the application has to learn of them.
type visitor struct {
	token    string
	identity body
}

// visitor signs somebody in who has a role and a network.
func (w *env) visitor(role, network string) visitor {
	w.Helper()
	email, _, id := w.member()
	var user body
	w.keycloakAdmin("GET", "/users/"+id, nil, &user)
	maps.Copy(user["attributes"].(body), body{attrRoles: []string{role}, attrNetworkID: []string{network}})
	w.keycloakAdmin("PUT", "/users/"+id, user, nil)
	w.exec(`update users set role = $2, network_id = coalesce(nullif($3, 'X'), '') where keycloak_id = $1`, id, role, network)
	identity := body{"X-Auth-Subject": id, "X-Auth-Roles": role, "X-Auth-User-Id": w.value(`select user_id from users where keycloak_id = $1`, id)}
	if network != noScope {
		identity["X-Auth-Network-Id"] = network
	}
	return visitor{w.login(email, password).text("access_token"), identity}
}

// call has the token, and claims to be somebody else.
func (v visitor) call(method, path string) call {
	header := map[string]string{"X_Auth_Roles": "admin"}
	for _, name := range []string{"User-Id", "Subject", "Roles", "Network-Id", "Station-Id"} {
		header["X-Auth-"+name] = "admin"
	}
	if v.token != "" {
		header["Authorization"] = "Bearer " + v.token
	}
	return call{method: method, path: path, header: header, body: strings.Repeat("x", 100_000)}
}

// echo is the application: it answers with what it was sent.
func echo(rw http.ResponseWriter, r *http.Request) {
	content, _ := io.ReadAll(r.Body)
	seen := body{"path": r.RequestURI, "body": len(content)}
	for name, values := range r.Header {
		if strings.Contains(strings.ToLower(name), "auth") && name != "Authorization" || name == "X-Forwarded-For" {
			seen[name] = strings.Join(values, " and ")
		}
	}
	rw.Header().Set("Content-Type", "application/json")
	json.NewEncoder(rw).Encode(seen)
}

// startNginx starts the example, in which only addresses and directories are replaced and what changes has in pairs,
// in front of echo and the service. It returns its address, and the command that reloads it.
func (w *env) startNginx(service string, changes ...string) (address, reload string) {
	w.Helper()
	application := httptest.NewServer(http.HandlerFunc(echo))
	w.Cleanup(application.Close)
	dir, addr := w.TempDir(), fmt.Sprintf("127.0.0.1:%d", stack.FreePort())
	nginx, err1 := stack.FindOrInstall(w.Context(), nil, stack.Nginx)
	example, err2 := os.ReadFile("examples/nginx/nginx.conf")
	conf := strings.NewReplacer(append(changes, "listen 80;", "listen "+addr+";", "127.0.0.1:3000", service, "127.0.0.1:8080", application.Listener.Addr().String(),
		"/var/log/nginx/", "", "http {", "http { client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;")...)
	if err := errors.Join(err1, err2, os.WriteFile(dir+"/nginx.conf", []byte(conf.Replace(string(example))), 0o600)); err != nil {
		w.Fatal(err)
	}
	log := new(buffer)
	directives := "daemon off; pid nginx.pid;"
	if os.Getuid() == 0 { // its workers may read the directory
		directives += " user root;"
	}
	args := []string{"-p", dir, "-c", "nginx.conf", "-e", "stderr", "-g", directives}
	cmd := exec.Command(nginx[0], args...)
	cmd.Stderr = log
	child, err := stack.Spawn(cmd, syscall.SIGTERM)
	if err == nil {
		w.Cleanup(func() { child.End(syscall.SIGTERM, 10*time.Second) })
		err = child.Await(w.Context(), func(context.Context) error { _, err := w.send("http://"+addr, call{path: "/"}); return err })
	}
	if err != nil {
		w.Fatalf("nginx: %v\n%s", err, log)
	}
	return "http://" + addr, fmt.Sprintf("kill -HUP %d", child.PID)
}
