package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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
	err := run(w.Context(), append([]string{"doctor", "-json"}, args...), func(name string) string { return env[name] }, &out, &out)
	var findings []finding
	if err := json.Unmarshal(out.Bytes(), &findings); err != nil {
		w.Fatalf("%v: %s", err, &out)
	}
	if wrong := len(named(findings, "wrong")) > 0; wrong != (err != nil) || wrong && !errors.Is(err, errUnwell) {
		w.Errorf("ends with %v: %s", err, &out)
	}
	for _, secret := range []string{backendSecret, "s3cret", "eyJ"} {
		if strings.Contains(out.String(), secret) {
			w.Errorf("it tells %q: %s", secret, &out)
		}
	}
	for _, f := range findings {
		if f.Status == "wrong" && f.Mend == "" {
			w.Errorf("how to mend %s?", f.Name)
		}
	}
	return findings
}

// named are the findings with a status.
func named(findings []finding, status string) (names []string) {
	for _, f := range findings {
		if f.Status == status {
			names = append(names, f.Name)
		}
	}
	return names
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

// names of all settings, and of those that only an administrator can see.
func realmSettings() (all, hidden []string) {
	for _, part := range realmParts {
		all = append(all, part.names()...)
		if part.administrator {
			hidden = append(hidden, part.names()...)
		}
	}
	return all, hidden
}

func TestDoctor(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	_, hidden := realmSettings()
	wants := func(findings []finding, wrong, unknown []string) {
		w.Helper()
		if diff := cmp.Diff(wrong, named(findings, "wrong")) + cmp.Diff(unknown, named(findings, "unknown")); diff != "" {
			w.Errorf("(-want +got):\n%s\n%+v", diff, findings)
		}
	}

	w.Run("healthy", func() {
		before := w.everything()
		wants(w.doctor(nil, admin...), nil, nil)
		wants(w.doctor(nil), nil, hidden)
		var with, without bytes.Buffer
		env := func(name string) string { return w.vars[name] }
		if err := run(t.Context(), append([]string{"doctor"}, admin...), env, &with, &with); err != nil {
			t.Error(err)
		}
		if err := run(t.Context(), []string{"doctor"}, env, &without, &without); err != nil {
			t.Error(err)
		}
		if text := with.String(); !regexp.MustCompile(`(?m)^ok       realm: verify email$`).MatchString(text) || strings.Contains(text, "unknown") {
			t.Error(text)
		}
		if text := without.String(); strings.Count(text, "unknown ") != 1 || !strings.Contains(text, "settings, from") ||
			!strings.Contains(text, "→ Give an administrator of Keycloak") || strings.Contains(text, "verify email\n") {
			t.Error(text)
		}
		if diff := cmp.Diff(before, w.everything()); diff != "" {
			t.Errorf("it has changed something (-before +after):\n%s", diff)
		}
	})

	var clients []struct{ ID string }
	w.keycloakAdmin("GET", "/clients?clientId=auth-client", nil, &clients)
	client := "/clients/" + clients[0].ID
	set := func(path, field string, value any) func() func() {
		return func() func() { return w.edit(path, func(rep map[string]any) { rep[field] = value }) }
	}
	clientAttribute := func(name, value string) func() func() {
		return func() func() {
			return w.edit(client, func(rep map[string]any) { rep["attributes"].(map[string]any)[name] = value })
		}
	}
	mapper := func(name string, change func(mapper, config map[string]any)) func() func() {
		return func() func() {
			path := client + "/protocol-mappers/models/" + w.find(client+"/protocol-mappers/models", name)
			return w.edit(path, func(rep map[string]any) { change(rep, rep["config"].(map[string]any)) })
		}
	}
	configured := func(name, field, value string) func() func() {
		return mapper(name, func(_, config map[string]any) { config[field] = value })
	}
	noMapper := func(name string) func() func() {
		return func() func() {
			models := client + "/protocol-mappers/models"
			path, was := models+"/"+w.find(models, name), map[string]any{}
			w.keycloakAdmin("GET", path, nil, &was)
			w.keycloakAdmin("DELETE", path, nil, nil)
			return func() { w.keycloakAdmin("POST", models, was, nil) }
		}
	}
	profile := func(change func(attributes []any) []any) func() func() {
		return func() func() {
			return w.edit("/users/profile", func(rep map[string]any) { rep["attributes"] = change(rep["attributes"].([]any)) })
		}
	}
	attribute := func(name string, change func(map[string]any)) func() func() {
		return profile(func(attributes []any) []any {
			for _, a := range attributes {
				if a := a.(map[string]any); a["name"] == name {
					change(a)
				}
			}
			return attributes
		})
	}
	undeclared := func(name string) func() func() {
		return profile(func(attributes []any) []any {
			return slices.DeleteFunc(attributes, func(a any) bool { return a.(map[string]any)["name"] == name })
		})
	}
	permitted := func(name, what string, who ...string) func() func() {
		return attribute(name, func(a map[string]any) { a["permissions"].(map[string]any)[what] = who })
	}
	serviceRole := func(role, method string) func() func() {
		return func() func() {
			var account struct{ ID string }
			w.keycloakAdmin("GET", "/clients/"+w.clientID("backend-admin")+"/service-account-user", nil, &account)
			realmManagement, known := w.clientID("realm-management"), map[string]any{}
			w.keycloakAdmin("GET", "/clients/"+realmManagement+"/roles/"+role, nil, &known)
			path := "/users/" + account.ID + "/role-mappings/clients/" + realmManagement
			w.keycloakAdmin(method, path, []any{known}, nil)
			return func() {
				w.keycloakAdmin(map[string]string{"POST": "DELETE", "DELETE": "POST"}[method], path, []any{known}, nil)
			}
		}
	}
	action := func(alias string) func() func() {
		return set("/authentication/required-actions/"+alias, "enabled", false)
	}
	without := func(type_ string) []string {
		return slices.DeleteFunc(slices.Clone(userEventTypes), func(t string) bool { return t == type_ })
	}

	for _, c := range []struct {
		broken string
		breaks func() (mend func())
		wrong  string
	}{
		{"verify email off", set("", "verifyEmail", false), "realm: verify email"},
		{"login with email off", set("", "loginWithEmailAllowed", false), "realm: login with email"},
		{"duplicate emails", func() func() {
			return w.edit("", func(rep map[string]any) { rep["loginWithEmailAllowed"], rep["duplicateEmailsAllowed"] = false, true })
		}, "realm: login with email, realm: duplicate emails"}, // Keycloak does not have both
		{"user registration", set("", "registrationAllowed", true), "realm: user registration"},
		{"email as username", set("", "registrationEmailAsUsername", true), "realm: email as username"},
		{"edit username", set("", "editUsernameAllowed", true), "realm: edit username"},
		{"brute force", set("", "bruteForceProtected", false), "realm: brute force detection"},
		{"rotation off", set("", "revokeRefreshToken", false), "realm: revoke refresh token"},
		{"max reuse 0", set("", "refreshTokenMaxReuse", 0), "realm: refresh token max reuse"},
		{"max reuse 2", set("", "refreshTokenMaxReuse", 2), "realm: refresh token max reuse"},
		{"long access tokens", set("", "accessTokenLifespan", 7200), "realm: access token lifespan"},
		{"plain HTTP", set("", "sslRequired", "none"), "realm: require SSL"},
		{"no languages", set("", "internationalizationEnabled", false), "realm: internationalization"},
		{"no SMTP", set("", "smtpServer", map[string]any{}), "realm: SMTP"},
		{"Keycloak's theme", set("", "emailTheme", "keycloak"), "realm: email theme"},
		{"no theme", set("", "emailTheme", ""), "realm: email theme"},
		{"RS512", set("", "defaultSignatureAlgorithm", "RS512"), "Keycloak: algorithm"},
		{"HS256", set("", "defaultSignatureAlgorithm", "HS256"), "Keycloak: algorithm"},
		{"realm disabled", set("", "enabled", false), "Keycloak: service account"},

		{"no events", set("/events/config", "eventsEnabled", false), "events: user events"},
		{"no admin events", set("/events/config", "adminEventsEnabled", false), "events: admin events"},
		{"representations", set("/events/config", "adminEventsDetailsEnabled", true), "events: no representations"},
		{"events of an hour", set("/events/config", "eventsExpiration", 3600), "events: expiration"},
		{"events for ever", set("/events/config", "eventsExpiration", 0), ""},
		{"admin events of an hour", func() func() {
			return w.edit("", func(rep map[string]any) { rep["attributes"].(map[string]any)["adminEventsExpiration"] = "3600" })
		}, "realm: admin events' expiration"},
		{"a type too few", set("/events/config", "enabledEventTypes", without("UPDATE_EMAIL")), "events: event types"},
		{"exactly the types", set("/events/config", "enabledEventTypes", userEventTypes), ""},

		{"client disabled", set(client, "enabled", false), "client: enabled"},
		{"confidential", set(client, "publicClient", false), "client: client authentication"},
		{"no password grant", set(client, "directAccessGrantsEnabled", false), "client: direct access grants"},
		{"no code flow", set(client, "standardFlowEnabled", false), "client: standard flow"},
		{"implicit flow", set(client, "implicitFlowEnabled", true), "client: implicit flow"},
		{"full scope", set(client, "fullScopeAllowed", true), "client: full scope"},
		{"no callback", set(client, "redirectUris", []string{"http://localhost:3000/account/*"}), "client: redirect to /auth/callback"},
		{"no ready page", set(client, "redirectUris", []string{"http://localhost:3000/auth/callback"}), "client: redirect to /account/ready"},
		{"another host", set(client, "redirectUris", []string{"http://localhost:3001/*"}),
			"client: redirect to /auth/callback, client: redirect to /account/ready"},
		{"relative addresses", func() func() {
			return w.edit(client, func(rep map[string]any) {
				rep["rootUrl"], rep["redirectUris"] = "http://localhost:3000", []string{"/auth/callback", "/account/*"}
			})
		}, ""},
		{"no PKCE", clientAttribute("pkce.code.challenge.method", ""), "client: PKCE"},
		{"plain PKCE", clientAttribute("pkce.code.challenge.method", "plain"), "client: PKCE"},
		{"no refresh tokens", clientAttribute("use.refresh.tokens", "false"), "client: refresh tokens"},
		{"the client's lifespan", clientAttribute("access.token.lifespan", "7200"), "client: access token lifespan"},
		{"the client's algorithm", clientAttribute("access.token.signed.response.alg", "HS256"), "client: access token algorithm"},
		{"no basic scope", func() func() {
			path := client + "/default-client-scopes/" + w.find("/client-scopes", "basic")
			w.keycloakAdmin("DELETE", path, nil, nil)
			return func() { w.keycloakAdmin("PUT", path, nil, nil) }
		}, "client: claim sub"},

		{"no user_id", noMapper("user_id"), "client: claim user_id"},
		{"no roles", noMapper("roles"), "client: claim roles"},
		{"no network_id", noMapper("network_id"), "client: claim network_id"},
		{"no station_id", noMapper("station_id"), "client: claim station_id"},
		{"no audience", noMapper("audience"), "client: claim aud"},
		{"another audience", configured("audience", "included.client.audience", "account"), "client: claim aud"},
		{"audience not in the access token", configured("audience", "access.token.claim", "false"), "client: claim aud"},
		{"claim not in the access token", configured("user_id", "access.token.claim", "false"), "client: claim user_id"},
		{"another attribute", configured("network_id", "user.attribute", "station_id"), "client: claim network_id"},
		{"another claim", configured("station_id", "claim.name", "station"), "client: claim station_id"},
		{"one role", configured("roles", "multivalued", "false"), "client: claim roles"},
		{"many ids", configured("user_id", "multivalued", "true"), "client: claim user_id"},
		{"a number", configured("user_id", "jsonType.label", "long"), "client: claim user_id"},
		{"another name of a mapper", mapper("user_id", func(m, _ map[string]any) { m["name"] = "the user" }), ""},

		{"user_id undeclared", undeclared("user_id"), "user profile: user_id"},
		{"roles undeclared", undeclared("roles"), "user profile: roles"},
		{"network_id undeclared", undeclared("network_id"), "user profile: network_id"},
		{"station_id undeclared", undeclared("station_id"), "user profile: station_id"},
		{"registration_id undeclared", undeclared("registration_id"), "user profile: registration_id"},
		{"email_verify_url undeclared", undeclared("email_verify_url"), "user profile: email_verify_url"},
		{"email_verify_token undeclared", undeclared("email_verify_token"), "user profile: email_verify_token"},
		{"email_verify_code undeclared", undeclared("email_verify_code"), "user profile: email_verify_code"},
		{"firstName undeclared", undeclared("firstName"), "user profile: firstName"},
		{"locale undeclared", undeclared("locale"), "user profile: locale"},
		{"roles of one's own", permitted("roles", "edit", "admin", "user"), "user profile: roles"},
		{"a network of one's own", permitted("network_id", "edit", "user"), "user profile: network_id"},
		{"the token on view", permitted("email_verify_token", "view", "admin", "user"), "user profile: email_verify_token"},
		{"names are the user's", permitted("lastName", "edit", "user"), "user profile: lastName"},
		{"one role only", attribute("roles", func(a map[string]any) { a["multivalued"] = false }), "user profile: roles"},
		{"any role", attribute("roles", func(a map[string]any) { delete(a["validations"].(map[string]any), "options") }),
			"user profile: known roles only"},
		{"an unknown role", attribute("roles", func(a map[string]any) {
			a["validations"] = map[string]any{"options": map[string]any{"options": append([]string{"root"}, roles...)}}
		}), "user profile: known roles only"},
		{"a role too few", attribute("roles", func(a map[string]any) {
			a["validations"] = map[string]any{"options": map[string]any{"options": roles[1:]}}
		}), "user profile: known roles only"},
		{"names required", attribute("lastName", func(a map[string]any) { a["required"] = map[string]any{"roles": []string{"user"}} }),
			"user profile: nothing else is required"},
		{"another one required", profile(func(attributes []any) []any {
			return append(attributes, map[string]any{"name": "shoe_size", "required": map[string]any{},
				"permissions": map[string]any{"view": []string{"admin"}, "edit": []string{"admin"}}})
		}), "user profile: nothing else is required"},

		{"no VERIFY_EMAIL", action("VERIFY_EMAIL"), "required actions: verify email"},
		{"no UPDATE_PASSWORD", action("UPDATE_PASSWORD"), "required actions: update password"},

		{"no manage-users", serviceRole("manage-users", "DELETE"), "Keycloak: service account's roles"},
		{"no view-users", serviceRole("view-users", "DELETE"), "Keycloak: service account's roles"},
		{"no view-events", serviceRole("view-events", "DELETE"), "Keycloak: service account's roles"},
		{"a role too many", serviceRole("manage-realm", "POST"), "Keycloak: service account's roles"},
	} {
		w.Run(c.broken, func() {
			mend := c.breaks()
			defer mend()
			wrong := named(w.doctor(nil, admin...), "wrong")
			if diff := cmp.Diff(c.wrong, strings.Join(wrong, ", ")); diff != "" {
				w.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	wants(w.doctor(nil, admin...), nil, nil) // all is put back
}

// edit changes a representation in Keycloak, until it is mended.
func (w *env) edit(path string, change func(map[string]any)) (mend func()) {
	w.Helper()
	was, is := map[string]any{}, map[string]any{}
	w.keycloakAdmin("GET", path, nil, &was)
	encoded, _ := json.Marshal(was)
	if err := json.Unmarshal(encoded, &is); err != nil {
		w.Fatal(err)
	}
	change(is)
	w.keycloakAdmin("PUT", path, is, nil)
	return func() {
		if before, ok := was["attributes"].(map[string]any); ok { // Keycloak keeps those that are not listed
			for name := range is["attributes"].(map[string]any) {
				if _, ok := before[name]; !ok {
					before[name] = ""
				}
			}
		}
		if is["rootUrl"] != nil && was["rootUrl"] == nil {
			was["rootUrl"] = ""
		}
		if is["emailTheme"] != nil && was["emailTheme"] == nil {
			was["emailTheme"] = ""
		}
		w.keycloakAdmin("PUT", path, was, nil)
	}
}

// find is the id of something with a name in a list of Keycloak's.
func (w *env) find(path, name string) string {
	w.Helper()
	var list []struct{ ID, Name string }
	w.keycloakAdmin("GET", path, nil, &list)
	for _, e := range list {
		if e.Name == name {
			return e.ID
		}
	}
	w.Fatalf("%s has no %s", path, name)
	return ""
}

func (w *env) clientID(name string) string {
	w.Helper()
	var list []struct{ ID string }
	w.keycloakAdmin("GET", "/clients?clientId="+name, nil, &list)
	return list[0].ID
}

// everything is what both stores hold, but for the time of Keycloak's sign-in events.
func (w *env) everything() map[string]any {
	w.Helper()
	all := map[string]any{}
	for name, path := range map[string]string{"realm": "", "clients": "/clients", "users": "/users?briefRepresentation=false",
		"profile": "/users/profile", "events": "/events/config", "admin events": "/admin-events", "components": "/components",
		"sessions": "/client-session-stats"} {
		var rep any
		w.keycloakAdmin("GET", path, nil, &rep)
		all[name] = rep
	}
	rows, _ := w.pool.Query(w.Context(), `select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace`)
	for rows.Next() {
		var table string
		if err := rows.Scan(&table); err != nil {
			w.Fatal(err)
		}
		all[table] = nil
	}
	for name, v := range all {
		if v == nil {
			all[name] = w.value(`select coalesce(string_agg(t::text, E'\n' order by t::text), '') from ` + name + ` t`)
		}
	}
	return all
}

// What the doctor says when a server, a password, an address or a clock is wrong.
func TestDoctorFaults(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	all, hidden := realmSettings()
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	ofPostgreSQL := []string{"PostgreSQL: version", "PostgreSQL: clock", "PostgreSQL: schema", "PostgreSQL: rights", "PostgreSQL: record"}
	ofToken := []string{"Keycloak: algorithm", "Keycloak: clock", "Keycloak: service account's roles"}
	ofKeycloak := append([]string{"Keycloak: issuer", "Keycloak: service account"}, ofToken...)
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
		{"Keycloak is down", map[string]string{"KEYCLOAK_URL": "http://127.0.0.1:1"}, admin,
			[]string{"Keycloak: reachable"}, slices.Concat(ofKeycloak, all)},
		{"wrong realm", map[string]string{"KEYCLOAK_REALM": "nowhere"}, admin, []string{"Keycloak: reachable"}, slices.Concat(ofKeycloak, all)},
		{"wrong secret", map[string]string{"KEYCLOAK_BACKEND_CLIENT_SECRET": "s3cret"}, nil,
			[]string{"Keycloak: service account"}, slices.Concat(ofToken, all)},
		{"wrong secret, as an administrator", map[string]string{"KEYCLOAK_BACKEND_CLIENT_SECRET": "s3cret"}, admin,
			[]string{"Keycloak: service account"}, ofToken},
		{"wrong backend client", map[string]string{"KEYCLOAK_BACKEND_CLIENT_ID": "nobody"}, admin, []string{"Keycloak: service account"}, ofToken},
		{"wrong client", map[string]string{"KEYCLOAK_AUTH_CLIENT_ID": "nobody"}, admin,
			[]string{"client"}, slices.DeleteFunc(slices.Clone(hidden), func(name string) bool { return !strings.HasPrefix(name, "client: ") })},
		{"wrong issuer", map[string]string{"KEYCLOAK_PUBLIC_URL": "https://id.example"}, admin, []string{"Keycloak: issuer"}, nil},
		{"another PUBLIC_URL", map[string]string{"PUBLIC_URL": "https://people.example"}, admin,
			[]string{"client: redirect to /auth/callback", "client: redirect to /account/ready"}, nil},
		{"wrong administrator", nil, asAdmin(t, services.AdminUser, "s3cret"), []string{"administrator"}, hidden},
		{"PostgreSQL is down", database(func(u *url.URL) { u.Host = "127.0.0.1:1" }), admin, []string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"wrong password of PostgreSQL", database(func(u *url.URL) { u.User = url.UserPassword(u.User.Username(), "s3cret") }), admin,
			[]string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"no such database", database(func(u *url.URL) { u.Path = "/nowhere" }), admin, []string{"PostgreSQL: reachable"}, ofPostgreSQL},
		{"an empty database", database(func(u *url.URL) { u.Path = "/" + old }), admin,
			[]string{"PostgreSQL: schema"}, []string{"PostgreSQL: rights", "PostgreSQL: record"}},
		{"several", map[string]string{"KEYCLOAK_PUBLIC_URL": "https://id.example", "DATABASE_URL": "host=127.0.0.1 port=1 password=s3cret"}, admin,
			[]string{"PostgreSQL: reachable", "Keycloak: issuer"}, ofPostgreSQL},
		{"no variables", map[string]string{"DATABASE_URL": "", "KEYCLOAK_BACKEND_CLIENT_SECRET": "", "SERVER_PORT": "70000"}, nil,
			[]string{"variables", "variables", "variables"}, nil},
		{"a secret in an unreadable address", map[string]string{"DATABASE_URL": "postgres://auth:s3cret@db:port/auth"}, nil, []string{"variables"}, nil},
	} {
		w.Run(c.fault, func() {
			findings := w.doctor(c.settings, c.args...)
			if diff := cmp.Diff(c.wrong, named(findings, "wrong")) + cmp.Diff(c.unknown, named(findings, "unknown")); diff != "" {
				w.Errorf("(-want +got):\n%s\n%+v", diff, findings)
			}
		})
	}

	w.Run("old schema", func() {
		w.exec(`update schema_version set sha256 = 'of last year'`)
		defer w.exec(`update schema_version set sha256 = $1`, digest(schemaSQL))
		if wrong := named(w.doctor(nil), "wrong"); !slices.Equal(wrong, []string{"PostgreSQL: schema"}) {
			w.Error(wrong)
		}
	})
	w.Run("clocks", func() { // it is ours that is moved, which is the same to both
		cfg, err := loadConfig(func(name string) string { return w.vars[name] })
		if err != nil {
			w.Fatal(err)
		}
		for ahead, want := range map[time.Duration][]string{
			time.Minute: {"PostgreSQL: clock", "Keycloak: clock"}, -time.Minute: {"PostgreSQL: clock", "Keycloak: clock"}, 5 * time.Second: nil,
		} {
			s, err := newServer(w.Context(), cfg, newLogger(io.Discard, cfg))
			if err != nil {
				w.Fatal(err)
			}
			s.now = func() time.Time { return time.Now().Add(ahead) }
			d := &doctor{s: s}
			d.check(w.Context(), "", "")
			s.store.pool.Close()
			if wrong := named(d.findings, "wrong"); !slices.Equal(wrong, want) {
				w.Errorf("%v ahead: %v", ahead, wrong)
			}
		}
	})
	w.Run("arguments", func() {
		out := new(bytes.Buffer)
		doctor := func(args ...string) error {
			out.Reset()
			return run(w.Context(), append([]string{"doctor"}, args...), environment(nil), out, out)
		}
		for _, args := range [][]string{{"-colour"}, {"now"}, {"-admin-user", "a"}, {"-admin-password-file", "a"},
			{"-admin-user", "a", "-admin-password-file", "/does/not/exist"}, {"-admin-user", "a", "-admin-password", "s3cret"}} {
			if err := doctor(args...); err == nil || errors.Is(err, errUnwell) || strings.Contains(err.Error()+out.String(), "s3cret") {
				w.Errorf("%v: %v, %s", args, err, out)
			}
		}
		if err := doctor("-h"); err != nil || !strings.Contains(out.String(), "-admin-password-file") {
			w.Errorf("-h: %v, %s", err, out)
		}
	})
}

// A role with the rights that schema.sql gives to auth_service, and each of them taken away.
func TestDoctorRights(t *testing.T) {
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
	lacking := func(what string) map[string]finding {
		return map[string]finding{"PostgreSQL: rights": {"PostgreSQL: rights", "wrong", "the role lacks " + what, roleAdvice}}
	}

	_, grants, _ := strings.Cut(schemaSQL, "where rolname = 'auth_service'")
	grants, _, _ = strings.Cut(strings.TrimPrefix(grants, ") then"), "end if")
	w.exec(strings.ReplaceAll(grants, "auth_service", role))
	if got := found(); len(got) > 0 {
		t.Errorf("with the grants of schema.sql: %v", got)
	}
	for table, actions := range rights {
		for action := range strings.SplitSeq(actions, ", ") {
			w.exec(`revoke ` + action + ` on ` + table + ` from ` + role)
			want := lacking(action + " on " + table)
			if table == "schema_version" {
				want["PostgreSQL: schema"] = finding{"PostgreSQL: schema", "unknown", "could not check: the role may not read schema_version", roleAdvice}
			}
			if diff := cmp.Diff(want, found()); diff != "" {
				t.Errorf("without %s on %s (-want +got):\n%s", action, table, diff)
			}
			w.exec(`grant ` + action + ` on ` + table + ` to ` + role)
		}
	}
	w.exec(`revoke delete on revocations from ` + role)
	if diff := cmp.Diff(lacking("delete on revocations"), found()); diff != "" {
		t.Error(diff)
	}
	w.exec(strings.ReplaceAll(grants, "auth_service", role))
	w.exec(`grant delete on audit_log to ` + role)
	if got := found(); len(got) != 1 || got["PostgreSQL: record"].Status != "advice" {
		t.Errorf("with a right too many: %v", got)
	}
	w.exec(`revoke delete on audit_log from ` + role)
}

// The rights are those that the program's statements need.
func TestRightsFitStatements(t *testing.T) {
	statement := regexp.MustCompile(`(insert) into (\w+)|(delete) from (\w+)|(update) (\w+)(?: as)?(?: \w+)?\s+set\b`)
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
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
			if source == "store.go" && parts[1] == "schema_version" {
				continue // that is the owner's to write
			}
			if needed, ok := rights[parts[1]]; !ok || !strings.Contains(needed, parts[0]) {
				t.Errorf("%s: %q, and rights has %q", source, m[0], needed)
			}
		}
	}
}

// Whatever keycloak/realm.json says is either a matter of taste or has a rule: without it, or
// turned around, the doctor objects.
func TestRealmRulesAreComplete(t *testing.T) {
	file, err := os.ReadFile("keycloak/realm.json")
	if err != nil {
		t.Fatal(err)
	}
	const ours = "clients.0."
	taste := []string{"realm", "displayName", "enabled", // the service account could not sign in
		"resetPasswordAllowed", "rememberMe", "supportedLocales", "defaultLocale", "passwordPolicy", "permanentLockout",
		"failureFactor", "waitIncrementSeconds", "maxFailureWaitSeconds", "maxDeltaTimeSeconds", "quickLoginCheckMilliSeconds",
		"ssoSessionIdleTimeout", "ssoSessionMaxLifespan", "actionTokenGeneratedByAdminLifespan", "actionTokenGeneratedByUserLifespan",
		"eventsExpiration", "eventsListeners", "attributes.adminEventsExpiration", // without them events stay for ever
		"smtpServer.port", "smtpServer.fromDisplayName", "smtpServer.ssl", "smtpServer.starttls", "smtpServer.auth",
		ours + "clientId", ours + "name", ours + "description", ours + "protocol", ours + "serviceAccountsEnabled", ours + "baseUrl",
		ours + "webOrigins", ours + "optionalClientScopes", ours + "redirectUris.2", ours + "attributes.post.logout.redirect.uris",
		ours + "attributes.oauth2.device.authorization.grant.enabled", ours + "attributes.oidc.ciba.grant.enabled",
		ours + "defaultClientScopes.1", ours + "defaultClientScopes.2", ours + "defaultClientScopes.3", ours + "defaultClientScopes.4"}
	elsewhere := []string{"clients.1", "users"} // the service account, seen by its token
	tasteOfMapper := []string{"name", "protocol", "id.token.claim", "userinfo.token.claim", "introspection.token.claim"}

	load := func() (rep, profile map[string]any) {
		text := bytes.ReplaceAll(file, []byte("${APP_ORIGIN:http://localhost:3000}"), []byte("https://app.example"))
		text = regexp.MustCompile(`\$\{[A-Z_]+:([^}]*)\}`).ReplaceAll(text, []byte("$1"))
		if err := json.Unmarshal(text, &rep); err != nil {
			t.Fatal(err)
		}
		provider := rep["components"].(map[string]any)["org.keycloak.userprofile.UserProfileProvider"].([]any)[0].(map[string]any)
		config := provider["config"].(map[string]any)["kc.user.profile.config"].([]any)[0].(string)
		if err := json.Unmarshal([]byte(config), &profile); err != nil {
			t.Fatal(err)
		}
		delete(rep, "components")
		rep["id"] = "imported"
		rep["clients"].([]any)[0].(map[string]any)["enabled"] = true // Keycloak's default, like all event types
		return rep, profile
	}
	objections := func(rep, profile map[string]any) (names []string) {
		v := realmView{cfg: config{PublicURL: "http://localhost:3000", AuthClientID: "auth-client"}}
		for into, from := range map[any]any{&v.Realm: rep, &v.Events: rep, &v.Profile: profile, &v.Clients: rep["clients"]} {
			text, err := json.Marshal(from)
			if err == nil {
				err = json.Unmarshal(text, into)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if v.Events.EnabledEventTypes == nil {
			v.Events.EnabledEventTypes = userEventTypes
		}
		v.Client = v.Clients[0]
		for _, part := range realmParts {
			for i, rule := range part.rules {
				if part.name != "email theme" && part.name != "required actions" && !rule.fine(v) {
					names = append(names, part.names()[i])
				}
			}
		}
		return names
	}
	rep, profile := load()
	if wrong := objections(rep, profile); len(wrong) > 0 {
		t.Fatalf("keycloak/realm.json: %v", wrong)
	}

	var walk func(path string, v any, set func(any))
	walk = func(path string, v any, set func(any)) {
		if slices.Contains(taste, path) || slices.Contains(elsewhere, path) || path == "id" {
			return
		}
		if strings.Contains(path, ".protocolMappers.") &&
			slices.ContainsFunc(tasteOfMapper, func(s string) bool { return strings.HasSuffix(path, "."+s) }) {
			return
		}
		switch v := v.(type) {
		case map[string]any:
			for name := range v {
				walk(strings.TrimPrefix(path+"."+name, "."), v[name], func(to any) { v[name] = to })
			}
			return
		case []any:
			for i := range v {
				walk(path+"."+strconv.Itoa(i), v[i], func(to any) { v[i] = to })
			}
			return
		case bool:
			set(!v)
		case string:
			set(map[string]string{"external": "none", "true": "false", "false": "true"}[v]) // else: empty
		case float64:
			set(v * 1000)
		}
		if len(objections(rep, profile)) == 0 {
			t.Errorf("no rule objects to another %s, and it is no matter of taste", path)
		}
		set(v)
	}
	walk("", rep, nil)
	for i, a := range profile["attributes"].([]any) {
		attributes := profile["attributes"].([]any)
		profile["attributes"] = slices.Delete(slices.Clone(attributes), i, i+1)
		if len(objections(rep, profile)) == 0 {
			t.Errorf("no rule misses the attribute %s", a.(map[string]any)["name"])
		}
		profile["attributes"] = attributes
	}
}

func TestDoctorMissesTheTheme(t *testing.T) {
	i := slices.IndexFunc(realmParts, func(p realmPart) bool { return p.name == "email theme" })
	for themes, want := range map[string]bool{`{}`: false, `{"email":[{"name":"base"}],"login":[{"name":"auth-service"}]}`: false,
		`{"email":[{"name":"base"},{"name":"auth-service","locales":["en"]}]}`: true} {
		var v realmView
		if err := json.Unmarshal([]byte(`{"themes":`+themes+`}`), &v.Server); err != nil {
			t.Fatal(err)
		}
		if got := realmParts[i].rules[0].fine(v); got != want {
			t.Errorf("%s: %v", themes, got)
		}
	}
}
