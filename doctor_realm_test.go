package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// brokenSetting is a setting of the realm that is not as it must be.
type brokenSetting struct {
	broken string
	breaks func() (restore func())
	wrong  string // what the doctor says, "path: is → must" or the path alone; "" if it will do
}

// namesAndFixes breaks each setting in turn. -fix names it and nothing else, sets it, and finds it set.
func (w *env) namesAndFixes(settings []brokenSetting) {
	admin := asAdmin(w.TB, services.AdminUser, services.AdminPassword)
	for _, c := range settings {
		w.Run(c.broken, func() {
			defer c.breaks()()
			args := admin
			if c.wrong != "" {
				args = append(admin, "-fix")
			}
			var found []string
			for _, f := range w.doctor(nil, args...) {
				switch leaf := fmt.Sprintf("%s: %s → %s", f.Name, f.Is, f.Must); {
				case f.Status != "wrong" && f.Status != "fixed":
				case strings.Contains(c.wrong, leaf):
					found = append(found, leaf)
				default:
					found = append(found, f.Name)
				}
			}
			if diff := cmp.Diff(c.wrong, strings.Join(found, "; ")); diff != "" {
				w.Errorf("fixed, or wrong and left to the operator (-want +got):\n%s", diff)
			}
		})
	}
	w.finds(w.doctor(nil, admin...), nil, nil) // all is put back
}

// set breaks one field of a representation.
func (w *env) set(path, field string, value any) func() func() {
	return func() func() { return w.edit(path, func(rep map[string]any) { rep[field] = value }) }
}

// serviceRole grants (POST) or revokes (DELETE) a role of the service account.
func (w *env) serviceRole(role, method string) func() func() {
	return func() func() {
		var account struct{ ID string }
		w.keycloakAdmin("GET", "/clients/"+w.clientID("backend-admin")+"/service-account-user", nil, &account)
		management, known := w.clientID("realm-management"), map[string]any{}
		w.keycloakAdmin("GET", "/clients/"+management+"/roles/"+role, nil, &known)
		path := "/users/" + account.ID + "/role-mappings/clients/" + management
		w.keycloakAdmin(method, path, []any{known}, nil)
		return func() {
			w.keycloakAdmin(map[string]string{"POST": "DELETE", "DELETE": "POST"}[method], path, []any{known}, nil)
		}
	}
}

func TestDoctorRealm(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	policy := "length(10) and maxLength(128) and notUsername and notEmail and passwordBlacklist(common.txt)"
	w.namesAndFixes([]brokenSetting{
		{"verify email off", w.set("", "verifyEmail", false), "realm.verifyEmail: false → true"},
		{"login with email off", w.set("", "loginWithEmailAllowed", false), "realm.loginWithEmailAllowed: false → true"},
		{"duplicate emails", func() func() {
			return w.edit("", func(rep map[string]any) { // Keycloak does not have both
				rep["loginWithEmailAllowed"], rep["duplicateEmailsAllowed"] = false, true
			})
		}, "realm.duplicateEmailsAllowed: true → false; realm.loginWithEmailAllowed: false → true"},
		{"user registration", w.set("", "registrationAllowed", true), "realm.registrationAllowed: true → false"},
		{"email as username", w.set("", "registrationEmailAsUsername", true), "realm.registrationEmailAsUsername: true → false"},
		{"no edit username", w.set("", "editUsernameAllowed", false), "realm.editUsernameAllowed: false → true"},
		{"brute force", w.set("", "bruteForceProtected", false), "realm.bruteForceProtected: false → true"},
		{"permanent lockout", w.set("", "permanentLockout", true), "realm.permanentLockout: true → false"},
		{"another failure factor", w.set("", "failureFactor", 5), ""},
		{"rotation off", w.set("", "revokeRefreshToken", false), "realm.revokeRefreshToken: false → true"},
		{"max reuse 0", w.set("", "refreshTokenMaxReuse", 0), "realm.refreshTokenMaxReuse: 0 → 1"},
		{"max reuse 2", w.set("", "refreshTokenMaxReuse", 2), "realm.refreshTokenMaxReuse: 2 → 1"},
		{"long access tokens", w.set("", "accessTokenLifespan", 7200), "realm.accessTokenLifespan: 7200 → 300"},
		{"short access tokens", w.set("", "accessTokenLifespan", 60), ""},
		{"plain HTTP", w.set("", "sslRequired", "none"), "realm.sslRequired: none → external"},
		{"no languages", w.set("", "internationalizationEnabled", false), "realm.internationalizationEnabled: false → true"},
		{"another language", w.set("", "supportedLocales", []string{"fr"}), ""},
		{"another name", w.set("", "displayName", "Shop"), ""},
		{"short passwords", w.set("", "passwordPolicy", strings.Replace(policy, "length(10)", "length(6)", 1)),
			"realm.passwordPolicy: " + strings.Replace(policy, "length(10)", "length(6)", 1) + " → " + policy},
		{"a rule of its own", w.set("", "passwordPolicy", "upperCase(1)"),
			"realm.passwordPolicy: upperCase(1) → upperCase(1) and " + policy},
		{"stricter passwords", w.set("", "passwordPolicy", "upperCase(1) and "+strings.Replace(policy, "8", "12", 1)), ""},
		{"no SMTP", w.set("", "smtpServer", map[string]any{}),
			"realm.smtpServer.from: nothing → set by the operator; realm.smtpServer.host: nothing → set by the operator"},
		{"Keycloak's theme", w.set("", "emailTheme", "keycloak"), "realm.emailTheme: keycloak → auth-service"},
		{"no theme", w.set("", "emailTheme", ""), "realm.emailTheme: nothing → auth-service"},
		{"no login theme", w.set("", "loginTheme", ""), "realm.loginTheme: nothing → auth-service"},
		{"the operator's login theme", w.set("", "loginTheme", "example"), ""},
		{"RS512", w.set("", "defaultSignatureAlgorithm", "RS512"), "realm.defaultSignatureAlgorithm: RS512 → RS256"},
		{"HS256", w.set("", "defaultSignatureAlgorithm", "HS256"), "realm.defaultSignatureAlgorithm: HS256 → RS256"},
		{"passkeys without a PIN", w.set("", "webAuthnPolicyPasswordlessUserVerificationRequirement", "preferred"),
			"realm.webAuthnPolicyPasswordlessUserVerificationRequirement: preferred → required"},
		{"no passkeys", w.set("", "webAuthnPolicyPasswordlessPasskeysEnabled", false), ""},
		{"realm disabled", w.set("", "enabled", false), "realm.enabled: false → true"},
	})
}

func TestDoctorEventsAndActions(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	action := func(alias string) func() func() {
		return w.set("/authentication/required-actions/"+alias, "enabled", false)
	}
	tooFew := slices.DeleteFunc(slices.Clone(userEventTypes), func(t string) bool { return t == "UPDATE_EMAIL" })
	const roles = "realm.users[service-account-backend-admin].clientRoles.realm-management"
	backend := "/clients/" + w.clientID("backend-admin")
	w.namesAndFixes([]brokenSetting{
		{"no events", w.set("/events/config", "eventsEnabled", false), "realm.eventsEnabled: false → true"},
		{"no admin events", w.set("/events/config", "adminEventsEnabled", false), "realm.adminEventsEnabled: false → true"},
		{"representations", w.set("/events/config", "adminEventsDetailsEnabled", true),
			"realm.adminEventsDetailsEnabled: true → false"},
		{"events of an hour", w.set("/events/config", "eventsExpiration", 3600), "realm.eventsExpiration: 3600 → 2592000"},
		{"events for ever", w.set("/events/config", "eventsExpiration", 0), ""},
		{"admin events of an hour", func() func() {
			return w.edit("", func(rep map[string]any) { rep["attributes"].(map[string]any)["adminEventsExpiration"] = "3600" })
		}, "realm.attributes.adminEventsExpiration: 3600 → 2592000"},
		{"a type too few", w.set("/events/config", "enabledEventTypes", tooFew), "realm.enabledEventTypes"},
		{"exactly the types", w.set("/events/config", "enabledEventTypes", userEventTypes), ""},
		{"no VERIFY_EMAIL", action("VERIFY_EMAIL"), "realm.requiredActions[VERIFY_EMAIL].enabled: false → true"},
		{"no UPDATE_PASSWORD", action("UPDATE_PASSWORD"), "realm.requiredActions[UPDATE_PASSWORD].enabled: false → true"},
		{"no manage-users", w.serviceRole("manage-users", "DELETE"), roles},
		{"no view-users", w.serviceRole("view-users", "DELETE"), roles},
		{"no view-events", w.serviceRole("view-events", "DELETE"), roles},
		{"a role too many", w.serviceRole("manage-realm", "POST"), roles},
		{"people sign in to the backend client", w.set(backend, "directAccessGrantsEnabled", true),
			"realm.clients[backend-admin].directAccessGrantsEnabled: true → false"},
		{"backend client disabled", w.set(backend, "enabled", false),
			"realm.clients[backend-admin].enabled: false → true"},
	})
}

func TestDoctorClient(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	client := "/clients/" + w.clientID("auth-client")
	attribute := func(name, value string) func() func() {
		return func() func() {
			return w.edit(client, func(rep map[string]any) { rep["attributes"].(map[string]any)[name] = value })
		}
	}
	const p = "realm.clients[auth-client]."
	const ready, callback = `"http://localhost:3000/account/*"`, `"http://localhost:3000/auth/callback"`
	const tried = `"http://localhost:3000/swagger-ui/oauth2-redirect.html"`
	w.namesAndFixes([]brokenSetting{
		{"client disabled", w.set(client, "enabled", false), p + "enabled: false → true"},
		{"confidential", w.set(client, "publicClient", false), p + "publicClient: false → true"},
		{"no password grant", w.set(client, "directAccessGrantsEnabled", false), p + "directAccessGrantsEnabled: false → true"},
		{"no code flow", w.set(client, "standardFlowEnabled", false), p + "standardFlowEnabled: false → true"},
		{"implicit flow", w.set(client, "implicitFlowEnabled", true), p + "implicitFlowEnabled: true → false"},
		{"full scope", w.set(client, "fullScopeAllowed", true), p + "fullScopeAllowed: true → false"},
		{"no callback", w.set(client, "redirectUris", []string{"http://localhost:3000/account/*"}),
			p + "redirectUris: [" + ready + "] → [" + ready + "," + callback + "," + tried + "]"},
		{"no ready page", w.set(client, "redirectUris", []string{"http://localhost:3000/auth/callback"}),
			p + "redirectUris: [" + callback + "] → [" + callback + "," + ready + "," + tried + "]"},
		{"another host", w.set(client, "redirectUris", []string{"http://localhost:3001/*"}),
			p + `redirectUris: ["http://localhost:3001/*"] → ["http://localhost:3001/*",` + callback + "," + ready + "," + tried + "]"},
		{"relative addresses", func() func() {
			return w.edit(client, func(rep map[string]any) {
				rep["rootUrl"], rep["redirectUris"] = "http://localhost:3000", []string{"/auth/callback", "/account/*", "/swagger-ui/*"}
			})
		}, ""},
		{"another name", w.set(client, "name", "Shop"), ""},
		{"no PKCE", attribute("pkce.code.challenge.method", ""),
			p + "attributes.pkce.code.challenge.method: nothing → S256"},
		{"plain PKCE", attribute("pkce.code.challenge.method", "plain"),
			p + "attributes.pkce.code.challenge.method: plain → S256"},
		{"no refresh tokens", attribute("use.refresh.tokens", "false"), p + "attributes.use.refresh.tokens: false → true"},
		{"the client's long lifespan", attribute("access.token.lifespan", "7200"),
			p + "attributes.access.token.lifespan: 7200 → nothing"},
		{"the client's short lifespan", attribute("access.token.lifespan", "60"), ""},
		{"the client's algorithm", attribute("access.token.signed.response.alg", "HS256"),
			p + "attributes.access.token.signed.response.alg: HS256 → nothing"},
		{"no basic scope", func() func() {
			path := client + "/default-client-scopes/" + w.find("/client-scopes", "basic")
			w.keycloakAdmin("DELETE", path, nil, nil)
			return func() { w.keycloakAdmin("PUT", path, nil, nil) }
		}, p + "defaultClientScopes"},
	})
}

func TestDoctorMappers(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	models := "/clients/" + w.clientID("auth-client") + "/protocol-mappers/models"
	mapper := func(name string, change func(mapper, config map[string]any)) func() func() {
		return func() func() {
			all := []map[string]any{}
			w.keycloakAdmin("GET", models, nil, &all)
			w.edit(models+"/"+w.find(models, name), func(rep map[string]any) { change(rep, rep["config"].(map[string]any)) })
			return func() { // each of them as it was, whatever it is called now
				for _, m := range all {
					w.keycloakAdmin("PUT", models+"/"+m["id"].(string), m, nil)
				}
			}
		}
	}
	configured := func(name, field, value string) func() func() {
		return mapper(name, func(_, config map[string]any) { config[field] = value })
	}
	without := func(name string) func() func() {
		return func() func() {
			w.keycloakAdmin("DELETE", models+"/"+w.find(models, name), nil, nil)
			return func() {}
		}
	}
	const p, missing = "realm.clients[auth-client].protocolMappers", ": nothing → as in keycloak/realm.json"
	w.namesAndFixes([]brokenSetting{
		{"no user_id", without("user_id"), p + "[user_id]" + missing},
		{"no roles", without("roles"), p + "[roles]" + missing},
		{"no network_id", without("network_id"), p + "[network_id]" + missing},
		{"no station_id", without("station_id"), p + "[station_id]" + missing},
		{"no audience", without("audience"), p + "[audience]" + missing},
		{"another audience", configured("audience", "included.client.audience", "account"),
			p + "[audience].config.included.client.audience: account → auth-client"},
		{"audience not in the access token", configured("audience", "access.token.claim", "false"),
			p + "[audience].config.access.token.claim: false → true"},
		{"claim not in the access token", configured("user_id", "access.token.claim", "false"),
			p + "[user_id].config.access.token.claim: false → true"},
		{"claim not in the ID token", configured("user_id", "id.token.claim", "false"), ""},
		{"another attribute", configured("network_id", "user.attribute", "station_id"),
			p + "[network_id].config.user.attribute: station_id → network_id"},
		{"another claim", configured("station_id", "claim.name", "station"),
			p + "[station_id].config.claim.name: station → station_id"},
		{"one role", configured("roles", "multivalued", "false"), p + "[roles].config.multivalued: false → true"},
		{"many ids", configured("user_id", "multivalued", "true"), p + "[user_id].config.multivalued: true → nothing"},
		{"a number", configured("user_id", "jsonType.label", "long"), p + "[user_id].config.jsonType.label: long → String"},
		{"another name of a mapper", mapper("user_id", func(m, _ map[string]any) { m["name"] = "the user" }), ""},
	})
}

func TestDoctorUserProfile(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	profile := func(change func(attributes []any) []any) func() func() {
		return func() func() {
			return w.edit("/users/profile", func(rep map[string]any) { rep["attributes"] = change(rep["attributes"].([]any)) })
		}
	}
	attribute := func(name string, change func(a, validations map[string]any)) func() func() {
		return profile(func(attributes []any) []any {
			a := attributes[indexOf(attributes, map[string]any{"name": name})].(map[string]any)
			change(a, a["validations"].(map[string]any))
			return attributes
		})
	}
	undeclared := func(name string) brokenSetting {
		return brokenSetting{name + " undeclared", profile(func(attributes []any) []any {
			return slices.DeleteFunc(attributes, func(a any) bool { return a.(map[string]any)["name"] == name })
		}), "realm.userProfile.attributes[" + name + "]: nothing → as in keycloak/realm.json"}
	}
	permitted := func(name, what string, who ...string) func() func() {
		return attribute(name, func(a, _ map[string]any) { a["permissions"].(map[string]any)[what] = who })
	}
	options := func(options ...string) func() func() {
		return attribute("roles", func(_, v map[string]any) { v["options"] = map[string]any{"options": options} })
	}
	length := func(name string, max int) func() func() {
		return attribute(name, func(_, v map[string]any) { v["length"] = map[string]any{"max": max} })
	}
	const p, known = "realm.userProfile.attributes", ".validations.options.options"
	users := map[string]any{"roles": []string{"user"}}
	settings := []brokenSetting{
		{"roles of one's own", permitted("roles", "edit", "admin", "user"),
			p + `[roles].permissions.edit: ["admin","user"] → ["admin"]`},
		{"a network of one's own", permitted("network_id", "edit", "user"),
			p + `[network_id].permissions.edit: ["user"] → ["admin"]`},
		{"the token on view", permitted("email_verify_token", "view", "admin", "user"),
			p + `[email_verify_token].permissions.view`},
		{"a username of one's own", permitted("username", "edit", "admin", "user"), p + `[username].permissions.edit`},
		{"names are the user's", permitted("lastName", "edit", "user"),
			p + `[lastName].permissions.edit: ["user"] → ["user","admin"]`},
		{"names are the administrator's", permitted("lastName", "edit", "admin"), ""},
		{"one role only", attribute("roles", func(a, _ map[string]any) { a["multivalued"] = false }),
			p + "[roles].multivalued: false → true"},
		{"many networks", attribute("network_id", func(a, _ map[string]any) { a["multivalued"] = true }),
			p + "[network_id].multivalued: true → nothing"},
		{"any role", attribute("roles", func(_, v map[string]any) { delete(v, "options") }), p + "[roles]" + known},
		{"an unknown role", options(append([]string{"root"}, roles...)...), p + "[roles]" + known},
		{"a role too few", options(roles[1:]...), p + "[roles]" + known},
		{"roles in another order", options(slices.Sorted(slices.Values(roles))...), ""},
		{"long names", length("lastName", 255), p + "[lastName].validations.length.max: 255 → 100"},
		{"short names", length("lastName", 50), ""},
		{"any address", attribute("email", func(_, v map[string]any) { delete(v, "email") }),
			p + "[email].validations.email: nothing → as in keycloak/realm.json"},
		{"names required", attribute("lastName", func(a, _ map[string]any) { a["required"] = users }),
			p + `[lastName].required: {"roles":["user"]} → nothing`},
		{"another one required", profile(func(attributes []any) []any {
			return append(attributes, map[string]any{"name": "shoe_size", "required": users,
				"permissions": map[string]any{"view": []string{"admin"}, "edit": []string{"admin"}}})
		}), p + `[shoe_size].required: {"roles":["user"]} → nothing`},
	}
	for _, name := range []string{"firstName", "locale", attrUserID, attrRoles, attrNetworkID, attrStationID, attrRegistrationID,
		attrURL, attrToken, attrCode, attrKind} {
		settings = append(settings, undeclared(name))
	}
	w.namesAndFixes(settings)
}

// Without an administrator, what the service account is shown is checked all the same.
func TestDoctorAsTheServiceAccount(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	for wrong, breaks := range map[string]func() func(){
		"realm.defaultSignatureAlgorithm":                                         w.set("", "defaultSignatureAlgorithm", "RS512"),
		"realm.adminEventsDetailsEnabled":                                         w.set("/events/config", "adminEventsDetailsEnabled", true),
		"realm.users[service-account-backend-admin].clientRoles.realm-management": w.serviceRole("manage-realm", "POST"),
	} {
		restore := breaks()
		w.finds(w.doctor(nil), []string{wrong}, []string{"realm"})
		restore()
	}
}

// Each leaf of realm.json that is changed is either found or a matter of taste.
func TestRealmLeaves(t *testing.T) {
	t.Parallel()
	cfg := config{PublicURL: "https://id.example", KeycloakRealm: "people",
		AuthClientID: "front", BackendClientID: "back", BackendClientSecret: `s"cret`}
	load := func() map[string]any {
		realm, err := wantedRealm(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return realm
	}
	encoded, _ := json.Marshal(load())
	if s := string(encoded); strings.Contains(s, "${A") || strings.Contains(s, "localhost") || strings.Contains(s, "auth-client") {
		t.Errorf("placeholders are left: %s", s)
	}
	live, leaves := load(), 0
	var change func(path string, v any, set func(any))
	change = func(path string, v any, set func(any)) {
		switch v := v.(type) {
		case map[string]any:
			for _, key := range slices.Sorted(maps.Keys(v)) {
				change(path+"."+key, v[key], func(to any) { v[key] = to })
			}
			return
		case []any:
			if list := objects(v); len(list) > 0 {
				for i, e := range list {
					change(path+"["+strconv.Itoa(i)+"]", e, func(to any) { v[i] = to })
				}
				return
			}
		}
		leaves++
		var found []finding
		other := any("something else")
		if list, ok := v.([]any); ok && len(list) > 0 {
			other = list[:0]
		}
		set(other)
		merge("realm", live, load(), &found)
		set(v)
		taste := slices.ContainsFunc(tastes, func(s string) bool { return strings.Contains(path, s) })
		if len(found) == 0 && !taste {
			t.Errorf("nothing is found when %s changes", path)
		}
	}
	change("realm", live, nil)
	if leaves < 150 {
		t.Errorf("realm.json has %d leaves", leaves)
	}
}

// tastes are parts of the paths of leaves that may have any value.
var tastes = []string{"displayName", "rememberMe", "resetPasswordAllowed", "supportedLocales", "defaultLocale",
	"ssoSession", "actionToken", "failureFactor", "Seconds", "quickLogin", "eventsListeners",
	".name", ".description", ".secret", "optionalClientScopes", "post.logout", "oauth2.device", "oidc.ciba",
	"id.token.claim", "userinfo.token", "introspection.token", "length.min", "webOrigins", "smtpServer",
	"PasswordlessPasskeysEnabled", "PasswordlessRequireResidentKey", "loginTheme"}

// Values beside those of realm.json, at both sides of their bounds.
func TestLeeways(t *testing.T) {
	life, day := int(tokenLife.Seconds()), int(syncDaily.Seconds())
	for _, c := range []struct {
		leaf     string
		is, must any
		ok       bool
	}{
		{"accessTokenLifespan", float64(life), 300.0, true},
		{"accessTokenLifespan", float64(life + 1), 300.0, false},
		{"accessTokenLifespan", 0.0, 300.0, false},
		{"clients[a].attributes.access.token.lifespan", strconv.Itoa(life), nil, true},
		{"clients[a].attributes.access.token.lifespan", strconv.Itoa(life + 1), nil, false},
		{"eventsExpiration", float64(day - 1), 2592000.0, false},
		{"eventsExpiration", 100000.0, 2592000.0, true},
		{"attributes.adminEventsExpiration", nil, "2592000", true},
		{"sslRequired", "none", "external", false},
		{"sslRequired", "all", "external", true},
		{"passwordPolicy", "length(10) and notEmail(undefined)", "length(10) and notEmail", true},
		{"passwordPolicy", "maxLength(64)", "length(10)", false},
		{"passwordPolicy", "length(9) and upperCase(1)", "length(10)", false},
		{"passwordPolicy", "length(12)", "length(10)", true},
		{"userProfile.attributes[username].validations.length.max", 101.0, 100.0, false},
		{"clients[a].protocolMappers[b].config.claim.name", "name", "user_id", false},
		{"clients[a.b].name", "x", "y", true},
		{"verifyEmail", "true", true, true},
		{"permanentLockout", nil, false, true},
		{"clients[a].redirectUris", []any{"https://a.example/*"}, []any{"https://a.example/auth/callback"}, true},
		{"clients[a].redirectUris", []any{"https://a.example.org/*"}, []any{"https://a.example/auth/callback"}, false},
	} {
		var found []finding
		if merge("realm."+c.leaf, c.is, c.must, &found); (len(found) == 0) != c.ok {
			t.Errorf("%s: %v beside %v: %v", c.leaf, c.is, c.must, found)
		}
	}
	for algorithm := range tokenAlgorithms {
		var found []finding
		if merge("realm.defaultSignatureAlgorithm", algorithm, "RS256", &found); len(found) > 0 {
			t.Errorf("%v", found)
		}
	}
}

// edit changes a representation in Keycloak, until it is restored.
func (w *env) edit(path string, change func(map[string]any)) (restore func()) {
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
		for _, theme := range []string{"emailTheme", "loginTheme"} {
			if is[theme] != nil && was[theme] == nil {
				was[theme] = ""
			}
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

// What people can't do with their own account is a warning: it is for the operator to say.
func TestDoctorOwnAccount(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	const actions = "/authentication/required-actions/"
	var realm struct{ DefaultRole struct{ ID string } }
	w.keycloakAdmin("GET", "", nil, &realm)
	var deletes any
	w.keycloakAdmin("GET", "/clients/"+w.clientID("account")+"/roles/delete-account", nil, &deletes)
	for name, c := range map[string]struct {
		breaks func() func()
		warns  string
	}{
		"all well":         {func() func() { return func() {} }, ""},
		"passkeys":         {w.set("", "webAuthnPolicyPasswordlessPasskeysEnabled", false), "Keycloak: passkeys"},
		"one-time codes":   {w.set(actions+"CONFIGURE_TOTP", "enabled", false), "Keycloak: own account: otp"},
		"no deletion":      {w.set(actions+"delete_account", "enabled", false), "Keycloak: own account: delete"},
		"nobody's passkey": {w.set(actions+"webauthn-register-passwordless", "enabled", false), "Keycloak: own account: passkey"},
		"nobody may": {func() func() {
			path := "/roles-by-id/" + realm.DefaultRole.ID + "/composites"
			w.keycloakAdmin("DELETE", path, []any{deletes}, nil)
			return func() { w.keycloakAdmin("POST", path, []any{deletes}, nil) }
		}, "Keycloak: own account: delete"},
	} {
		w.Run(name, func() {
			defer c.breaks()()
			found := w.doctor(nil, asAdmin(w.TB, services.AdminUser, services.AdminPassword)...)
			w.finds(found, nil, nil)
			var warned []string
			for _, f := range found {
				if strings.HasPrefix(f.Name, "Keycloak: ") && f.Status == "warn" {
					_, what, _ := strings.Cut(f.Detail, "account: ")
					warned = append(warned, strings.TrimSuffix(f.Name+": "+what, ": "))
				}
			}
			if got := strings.Join(warned, "; "); got != c.warns {
				w.Errorf("it warns of %q, not %q", got, c.warns)
			}
		})
	}
}
