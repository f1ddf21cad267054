package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// doctor runs "doctor -json" with other settings, and returns what it found. Its exit status
// fits that, and it tells no secret.
func (w *env) doctor(settings map[string]string, args ...string) []finding {
	w.Helper()
	var out bytes.Buffer
	env := maps.Clone(w.vars)
	maps.Copy(env, settings)
	getenv := func(name string) string { return env[name] }
	err := run(w.Context(), append([]string{"doctor", "-json"}, args...), getenv, &out, &out)
	var findings []finding
	if err := json.Unmarshal(out.Bytes(), &findings); err != nil {
		w.Fatalf("%v: %s", err, &out)
	}
	unhealthy := len(named(findings, "wrong"))+len(named(findings, "planned")) > 0
	if unhealthy != errors.Is(err, errUnhealthy) || unhealthy != (err != nil) {
		w.Errorf("ends with %v: %s", err, &out)
	}
	for _, secret := range []string{backendSecret, "s3cret", "eyJ"} {
		if strings.Contains(out.String(), secret) {
			w.Errorf("it tells %q: %s", secret, &out)
		}
	}
	for _, f := range findings {
		if f.Status == "wrong" && f.Fix == "" {
			w.Errorf("%s is wrong, and the report does not say what to do", f.Name)
		}
	}
	return findings
}

// named are the names of the findings with a status.
func named(findings []finding, status string) (names []string) {
	for _, f := range findings {
		if f.Status == status {
			names = append(names, f.Name)
		}
	}
	return names
}

// finds compares the names of what is wrong and of what could not be checked.
func (w *env) finds(findings []finding, wrong, unknown []string) {
	w.Helper()
	if diff := cmp.Diff(wrong, named(findings, "wrong")) + cmp.Diff(unknown, named(findings, "unknown")); diff != "" {
		w.Errorf("wrong, unknown (-want +got):\n%s\n%+v", diff, findings)
	}
}

// asAdmin are the arguments with Keycloak's administrator.
func asAdmin(t testing.TB, user, password string) []string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-admin-user", user, "-admin-password-file", file}
}

func TestDoctorHealthy(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	before := w.everything()
	w.finds(w.doctor(nil, admin...), nil, nil)
	w.finds(w.doctor(nil), nil, []string{"realm"})
	fixing := w.doctor(nil, append(admin, "-fix")...)
	w.finds(fixing, nil, nil)
	if fixed := named(fixing, "fixed"); len(fixed) > 0 {
		t.Errorf("-fix has set %v", fixed)
	}
	text := func(args ...string) string {
		var out bytes.Buffer
		getenv := func(name string) string { return w.vars[name] }
		if err := run(t.Context(), append([]string{"doctor"}, args...), getenv, &out, &out); err != nil {
			t.Errorf("doctor %q: %v", args, err)
		}
		return out.String()
	}
	if text := text(admin...); !strings.Contains(text, "ok       realm\n") || strings.Contains(text, "unknown") {
		t.Error(text)
	}
	if text := text(); strings.Count(text, "unknown ") != 1 || !strings.Contains(text, "→ Give an administrator of Keycloak") {
		t.Error(text)
	}
	if diff := cmp.Diff(before, w.everything()); diff != "" {
		t.Errorf("it has changed something (-before +after):\n%s", diff)
	}
}

// stockRealm creates a realm as Keycloak makes it of a name.
func stockRealm(t *testing.T, name string) {
	t.Helper()
	token, err := services.AdminToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", services.KeycloakURL+"/admin/realms",
		strings.NewReader(`{"realm":"`+name+`","enabled":true}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatal(resp.Status)
	}
}

// A realm of which only the name was given, and what its owners have made in it, is fixed by one
// command; what they have made stays.
func TestDoctorFixesAStockRealm(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := uncheckedEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	if err := services.DeleteRealm(t.Context(), w.realm); err != nil {
		t.Fatal(err)
	}
	stockRealm(t, w.realm)
	w.keycloakAdmin("POST", "/clients", body{"clientId": "shop", "redirectUris": []string{"https://shop.example/*"}}, nil)
	w.keycloakAdmin("POST", "/users", body{"username": "ann", "email": "ann@shop.example", "enabled": true}, nil)
	w.edit("/users/profile", func(rep map[string]any) {
		rep["attributes"] = append(rep["attributes"].([]any),
			body{"name": "shoe_size", "permissions": body{"view": []string{"user"}, "edit": []string{"user"}}})
	})
	owned := func() (owned []any) {
		var users, shop []any
		var profile map[string]any
		w.keycloakAdmin("GET", "/users?briefRepresentation=true", nil, &users)
		for _, u := range objects(users) {
			delete(u, "userProfileMetadata") // 26.4 has it here, too
		}
		w.keycloakAdmin("GET", "/clients?clientId=shop", nil, &shop)
		w.keycloakAdmin("GET", "/users/profile", nil, &profile)
		attributes := objects(profile["attributes"])
		i := slices.IndexFunc(attributes, func(a map[string]any) bool { return a["name"] == "shoe_size" })
		return append(append(users, shop...), attributes[i])
	}
	before, theirs := w.everything(), owned()

	planned := named(w.doctor(nil, append(admin, "-fix", "-dry-run")...), "planned")
	if diff := cmp.Diff(before, w.everything()); diff != "" {
		t.Errorf("-dry-run has changed something (-before +after):\n%s", diff)
	}
	smtp := []string{"realm.smtpServer.from", "realm.smtpServer.host"}
	findings := w.doctor(nil, append(admin, "-fix")...)
	w.finds(findings, smtp, nil) // those are the operator's
	if diff := cmp.Diff(planned, named(findings, "fixed")); diff != "" || len(planned) < 20 {
		t.Errorf("-dry-run has not told all that -fix has done (-planned +fixed):\n%s", diff)
	}
	again := w.doctor(nil, append(admin, "-fix")...)
	w.finds(again, smtp, nil)
	if fixed := named(again, "fixed"); len(fixed) > 0 {
		t.Errorf("the second -fix has set %v", fixed)
	}
	w.edit("", func(rep map[string]any) {
		rep["smtpServer"] = body{"host": "mail.example", "from": "no-reply@example.test"}
	})
	w.finds(w.doctor(nil, admin...), nil, nil)
	w.finds(w.doctor(nil), nil, []string{"realm"})
	if diff := cmp.Diff(theirs, owned()); diff != "" {
		t.Errorf("what was there before (-before +after):\n%s", diff)
	}
}

// A -fix that fails on its way says so, and what it has done all the same; the next one does the rest.
func TestDoctorFixInterrupted(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	const profile, realm = "realm.userProfile.attributes[locale]", "realm.verifyEmail" // written in this order
	for _, c := range []struct {
		name         string
		fault        fault
		fixed, wrong []string
	}{
		{"lost", lost, nil, []string{"-fix", profile, realm}},
		{"applied, but the answer is lost", applied, []string{profile}, []string{"-fix", realm}},
	} {
		w.Run(c.name, func() {
			w.edit("/users/profile", func(rep map[string]any) {
				isLocale := func(a any) bool { return a.(map[string]any)["name"] == "locale" }
				rep["attributes"] = slices.DeleteFunc(rep["attributes"].([]any), isLocale)
			})
			w.edit("", func(rep map[string]any) { rep["verifyEmail"] = false })
			w.kc.on("PUT .*/users/profile$", c.fault)
			findings := w.doctor(nil, append(admin, "-fix")...)
			w.kc.on("PUT .*/users/profile$", 0)
			w.finds(findings, c.wrong, nil)
			if diff := cmp.Diff(c.fixed, named(findings, "fixed")); diff != "" {
				w.Errorf("fixed (-want +got):\n%s", diff)
			}
			w.finds(w.doctor(nil, append(admin, "-fix")...), nil, nil)
		})
	}
}

// What the doctor says when a server, a password, an address or a clock is wrong.
func TestDoctorFaults(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	ofPostgreSQL := []string{"PostgreSQL: version", "PostgreSQL: clock", "PostgreSQL: schema", "PostgreSQL: privileges", "PostgreSQL: audit log"}
	ofKeycloak := []string{"Keycloak: issuer", "Keycloak: themes", "realm", "Keycloak: auth client", "Keycloak: service account", "Keycloak: clock", "Keycloak: signing key"}
	account := "realm.users[service-account-nobody]"
	database := func(change func(*url.URL)) map[string]string {
		u, err := url.Parse(w.vars["DATABASE_URL"])
		if err != nil {
			t.Fatal(err)
		}
		change(u)
		return map[string]string{"DATABASE_URL": u.String()}
	}
	old := w.db + "_old"
	if _, err := services.CreateDatabase(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := services.DropDatabase(context.Background(), old); err != nil {
			t.Error(err)
		}
	})

	for _, c := range []struct {
		fault          string
		settings       map[string]string
		args           []string
		wrong, unknown []string
	}{
		{"Keycloak is down", map[string]string{"KEYCLOAK_URL": "http://127.0.0.1:1"}, admin, []string{"Keycloak: reachable"}, ofKeycloak},
		{"wrong realm", map[string]string{"KEYCLOAK_REALM": "nowhere"}, admin, []string{"Keycloak: reachable"}, ofKeycloak},
		{"wrong secret", map[string]string{"KEYCLOAK_BACKEND_CLIENT_SECRET": "s3cret"}, nil,
			[]string{"Keycloak: service account"}, []string{"Keycloak: themes", "realm", "Keycloak: clock", "Keycloak: signing key"}},
		{"wrong secret, as an administrator", map[string]string{"KEYCLOAK_BACKEND_CLIENT_SECRET": "s3cret"}, admin,
			[]string{"Keycloak: service account"}, []string{"Keycloak: clock", "Keycloak: signing key"}},
		{"wrong backend client", map[string]string{"KEYCLOAK_BACKEND_CLIENT_ID": "nobody"}, admin,
			[]string{"realm.clients[nobody]", account, "Keycloak: service account"}, []string{"Keycloak: clock", "Keycloak: signing key"}},
		{"wrong client", map[string]string{"KEYCLOAK_AUTH_CLIENT_ID": "nobody"}, admin, []string{"realm.clients[nobody]", "Keycloak: auth client"}, nil},
		{"wrong issuer", map[string]string{"KEYCLOAK_PUBLIC_URL": "https://id.example"}, admin, []string{"Keycloak: issuer"}, nil},
		{"another PUBLIC_URL", map[string]string{"PUBLIC_URL": "https://people.example"}, admin,
			[]string{"realm.clients[auth-client].redirectUris"}, nil},
		{"wrong administrator", nil, asAdmin(t, services.AdminUser, "s3cret"), []string{"administrator"}, []string{"Keycloak: themes", "realm"}},
		{"PostgreSQL is down", database(func(u *url.URL) { u.Host = "127.0.0.1:1" }), admin, []string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"wrong password of PostgreSQL", database(func(u *url.URL) { u.User = url.UserPassword(u.User.Username(), "s3cret") }), admin,
			[]string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"no such database", database(func(u *url.URL) { u.Path = "/nowhere" }), admin, []string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"an empty database", database(func(u *url.URL) { u.Path = "/" + old }), admin,
			[]string{"PostgreSQL: schema"}, []string{"PostgreSQL: privileges", "PostgreSQL: audit log"}},
		{"several", map[string]string{"KEYCLOAK_PUBLIC_URL": "https://id.example", "DATABASE_URL": "host=127.0.0.1 port=1 password=s3cret"}, admin,
			[]string{"PostgreSQL: reachable", "Keycloak: issuer"}, ofPostgreSQL},
		{"no variables", map[string]string{"DATABASE_URL": "", "KEYCLOAK_BACKEND_CLIENT_SECRET": "", "SERVER_PORT": "70000"}, nil,
			[]string{"variables", "variables", "variables"}, nil},
		{"a secret in an unreadable address", map[string]string{"DATABASE_URL": "postgres://auth:s3cret@db:port/auth"}, nil, []string{"variables"}, nil},
	} {
		w.Run(c.fault, func() { w.finds(w.doctor(c.settings, c.args...), c.wrong, c.unknown) })
	}
	w.Run("old schema", func() {
		w.exec(`update schema_version set version = version - 1`)
		defer w.exec(`update schema_version set version = version + 1`)
		w.finds(w.doctor(nil, admin...), []string{"PostgreSQL: schema"}, []string{"PostgreSQL: privileges", "PostgreSQL: audit log"})
	})
}

// It is the service's clock that is moved here, which is the same to both servers.
func TestDoctorClocks(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	cfg, err := loadConfig(func(name string) string { return w.vars[name] })
	if err != nil {
		t.Fatal(err)
	}
	for ahead, want := range map[time.Duration][]string{
		time.Minute: {"PostgreSQL: clock", "Keycloak: clock"}, -time.Minute: {"PostgreSQL: clock", "Keycloak: clock"}, 5 * time.Second: nil,
	} {
		s, err := newServer(t.Context(), cfg, newLogger(io.Discard, cfg))
		if err != nil {
			t.Fatal(err)
		}
		s.now = func() time.Time { return time.Now().Add(ahead) }
		d := &doctor{invocation: &invocation{server: s}}
		d.checkAll(t.Context())
		s.store.pool.Close()
		if wrong := named(d.findings, "wrong"); !slices.Equal(wrong, want) {
			t.Errorf("%v ahead: %v", ahead, wrong)
		}
	}
}

// A Keycloak without the theme's files, or with those of the mails alone, is one whose list of themes lacks it.
func TestDoctorMissesTheTheme(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	u, err := url.Parse(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	proxy, missing := httputil.NewSingleHostReverseProxy(u), ""
	proxy.ModifyResponse = func(resp *http.Response) error {
		text, err := io.ReadAll(resp.Body)
		if strings.HasSuffix(resp.Request.URL.Path, "/serverinfo") {
			_, list, _ := bytes.Cut(text, []byte(`"`+missing+`":[{"name"`)) // a part of text, and so is name
			_, name, _ := bytes.Cut(list, []byte(`"auth-ser`))
			copy(name, "ving") // as long as vice
		}
		resp.Body = io.NopCloser(bytes.NewReader(text))
		return err
	}
	server := httptest.NewServer(proxy)
	defer server.Close()
	for _, missing = range []string{"login", "email"} {
		w.finds(w.doctor(map[string]string{"KEYCLOAK_URL": server.URL}), []string{"Keycloak: themes"}, []string{"realm"})
	}
}

func TestDoctorArguments(t *testing.T) {
	out := new(bytes.Buffer)
	doctor := func(args ...string) error {
		out.Reset()
		return run(t.Context(), append([]string{"doctor"}, args...), environment(nil), out, out)
	}
	admin := asAdmin(t, "a", "s3cret")
	for _, args := range [][]string{{"-colour"}, {"now"}, {"-admin-user", "a"}, {"-admin-password-file", "a"},
		{"-admin-user", "a", "-admin-password-file", "/does/not/exist"}, {"-admin-user", "a", "-admin-password", "s3cret"},
		{"-fix"}, {"-dry-run"}, append(admin, "-dry-run")} {
		if err := doctor(args...); err == nil || errors.Is(err, errUnhealthy) || strings.Contains(err.Error()+out.String(), "s3cret") {
			t.Errorf("%v: %v, %s", args, err, out)
		}
	}
	if err := doctor("-h"); err != nil || !strings.Contains(out.String(), "-admin-password-file") {
		t.Errorf("-h: %v, %s", err, out)
	}
}

// A role with the privileges that schema.sql grants to auth_service, and each of them taken away.
func TestDoctorPrivileges(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	role := w.db + "_role"
	w.exec(`create role ` + role + ` login password 's3cret-role'`)
	t.Cleanup(func() {
		ctx := context.Background()
		_, err := w.pool.Exec(ctx, `drop owned by `+role)
		_, err2 := w.pool.Exec(ctx, `drop role `+role)
		if err := errors.Join(err, err2); err != nil {
			t.Error(err)
		}
	})
	found := func() map[string]finding {
		u, err := url.Parse(w.vars["DATABASE_URL"])
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(role, "s3cret-role")
		findings := map[string]finding{}
		for _, f := range w.doctor(map[string]string{"DATABASE_URL": u.String()}) {
			if strings.HasPrefix(f.Name, "PostgreSQL: ") && f.Status != "ok" {
				findings[f.Name] = f
			}
		}
		return findings
	}
	_, grants, _ := strings.Cut(schemaSQL, "where rolname = 'auth_service'")
	grants, _, _ = strings.Cut(strings.TrimPrefix(grants, ") then"), "end if")
	grants = strings.ReplaceAll(grants, "auth_service", role)
	w.exec(grants)
	if got := found(); len(got) > 0 {
		t.Errorf("with the grants of schema.sql: %v", got)
	}
	needed := neededPrivileges()
	if len(needed) < 20 {
		t.Errorf("schema.sql grants %v only", needed)
	}
	for _, privilege := range needed {
		w.exec(`revoke ` + privilege + ` from ` + role)
		want := map[string]finding{"PostgreSQL: privileges": {Name: "PostgreSQL: privileges", Status: "wrong",
			Detail: "the role lacks " + privilege, Fix: roleFix}}
		if privilege == "select on schema_version" {
			want["PostgreSQL: schema"] = finding{Name: "PostgreSQL: schema", Status: "unknown",
				Detail: "could not check: the role may not read schema_version", Fix: roleFix}
		}
		if diff := cmp.Diff(want, found()); diff != "" {
			t.Errorf("without %s (-want +got):\n%s", privilege, diff)
		}
		w.exec(grants)
	}
	w.exec(`grant delete on audit_log to ` + role)
	if got := found(); len(got) != 1 || got["PostgreSQL: audit log"].Status != "warn" {
		t.Errorf("with a privilege too many: %v", got)
	}
}

// The privileges are those that the program's statements need.
func TestPrivilegesFitStatements(t *testing.T) {
	statement := regexp.MustCompile(`(insert) into (\w+)|(delete) from (\w+)|(update) (\w+)(?: as)?(?: \w+)?\s+set\b`)
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	needed := neededPrivileges()
	for _, source := range sources {
		text, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		for _, m := range statement.FindAllStringSubmatch(string(text), -1) {
			parts := slices.DeleteFunc(m[1:], func(s string) bool { return s == "" })
			if parts[1] != "schema_version" && !slices.Contains(needed, parts[0]+" on "+parts[1]) { // that is the owner's to write
				t.Errorf("%s: %q, and schema.sql does not grant it", source, m[0])
			}
		}
	}
}
