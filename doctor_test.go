package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// doctor runs "doctor -json" with other settings, and returns what it found. Its exit status
// fits that, and it tells no secret.
func (w *world) doctor(settings map[string]string, args ...string) []finding {
	w.Helper()
	var out bytes.Buffer
	env := maps.Clone(w.env)
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
	w := newWorld(t, map[string]string{"JOB_INTERVAL": "0s"})
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
		env := func(name string) string { return w.env[name] }
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
	w.admin("GET", "/clients?clientId=auth-client", nil, &clients)
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
			w.admin("GET", path, nil, &was)
			w.admin("DELETE", path, nil, nil)
			return func() { w.admin("POST", models, was, nil) }
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
			w.admin("GET", "/clients/"+w.clientID("backend-admin")+"/service-account-user", nil, &account)
			realmManagement, known := w.clientID("realm-management"), map[string]any{}
			w.admin("GET", "/clients/"+realmManagement+"/roles/"+role, nil, &known)
			path := "/users/" + account.ID + "/role-mappings/clients/" + realmManagement
			w.admin(method, path, []any{known}, nil)
			return func() {
				w.admin(map[string]string{"POST": "DELETE", "DELETE": "POST"}[method], path, []any{known}, nil)
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
			w.admin("DELETE", path, nil, nil)
			return func() { w.admin("PUT", path, nil, nil) }
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
func (w *world) edit(path string, change func(map[string]any)) (mend func()) {
	w.Helper()
	was, is := map[string]any{}, map[string]any{}
	w.admin("GET", path, nil, &was)
	encoded, _ := json.Marshal(was)
	if err := json.Unmarshal(encoded, &is); err != nil {
		w.Fatal(err)
	}
	change(is)
	w.admin("PUT", path, is, nil)
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
		w.admin("PUT", path, was, nil)
	}
}

// find is the id of something with a name in a list of Keycloak's.
func (w *world) find(path, name string) string {
	w.Helper()
	var list []struct{ ID, Name string }
	w.admin("GET", path, nil, &list)
	for _, e := range list {
		if e.Name == name {
			return e.ID
		}
	}
	w.Fatalf("%s has no %s", path, name)
	return ""
}

func (w *world) clientID(name string) string {
	w.Helper()
	var list []struct{ ID string }
	w.admin("GET", "/clients?clientId="+name, nil, &list)
	return list[0].ID
}

// everything is what both stores hold, but for the time of Keycloak's sign-in events.
func (w *world) everything() map[string]any {
	w.Helper()
	all := map[string]any{}
	for name, path := range map[string]string{"realm": "", "clients": "/clients", "users": "/users?briefRepresentation=false",
		"profile": "/users/profile", "events": "/events/config", "admin events": "/admin-events", "components": "/components",
		"sessions": "/client-session-stats"} {
		var rep any
		w.admin("GET", path, nil, &rep)
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

