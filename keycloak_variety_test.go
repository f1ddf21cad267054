package main

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestOddIDs: ids of Keycloak's users need not be UUIDs. Those of user-storage providers are f:<component>:<any text>,
// and those of imported users are whatever the import says, which stands in for them here.
func TestOddIDs(t *testing.T) {
	t.Parallel()
	odd := body{"id": "x:y:z/../ü? a=%2e#;+", "username": "odd", "email": "odd@example.test", "enabled": true, "emailVerified": true,
		"credentials": []body{{"type": "password", "value": password}}}
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "50ms"}, odd)
	id := odd["id"].(string)
	path := "/users/" + url.PathEscape(id)
	admin := w.signsIn(w.administrator())
	a := w.signsIn("odd@example.test") // it is imported
	user := a.JSON["user"].(map[string]any)["user_id"].(string)
	if got := w.do(authorized(a.text("access_token"), "GET", "/api/v1/auth/validate")).Header.Get("X-Auth-Subject"); got != id {
		t.Errorf("the subject is %q", got)
	}
	a = w.refreshed(a)
	w.wants(w.do(managing(admin, "PATCH", "/"+user, body{"role": roleOperator})), 200, "")
	w.revoked(a) // the role was changed
	if got := w.refreshed(a); unpacked(got.text("access_token"), 1)["roles"].([]any)[0] != roleOperator {
		t.Error("Keycloak does not know the new role")
	}
	w.wants(w.do(forgetting("odd@example.test")), 202, "")
	w.eventually("a mail to choose a password", time.Minute, func() bool { return len(w.mail.To("odd@example.test")) == 1 })
	w.wants(w.do(managing(admin, "DELETE", "/"+user+"/sessions", nil)), 204, "")
	var sessions []any
	if w.keycloakAdmin("GET", path+"/sessions", nil, &sessions); len(sessions) > 0 {
		t.Errorf("sessions go on in Keycloak: %v", sessions)
	}
	w.wants(w.do(managing(admin, "DELETE", "/"+user, nil)), 204, "")
	var ku body
	if w.keycloakAdmin("GET", path, nil, &ku); ku["enabled"] != false {
		t.Errorf("it is not disabled: %v", ku)
	}
	w.keycloakAdmin("DELETE", path, nil, nil)
	w.command("sync")
}

// TestPathOf: an id is one segment of a path, or nobody's.
func TestPathOf(t *testing.T) {
	for id, want := range map[string]string{
		"0b6c-45c5": "users/0b6c-45c5", "f:0b6c:ada@x.test": "users/f:0b6c:ada@x.test", "f:0b6c:a/../b": "users/f:0b6c:a%2F..%2Fb",
		"a?b#c%2F": "users/a%3Fb%23c%252F", "ü ;": "users/%C3%BC%20%3B", "": "", ".": "", "..": "", "a\n": "", "a\x00": "", "a\u0085": "",
		strings.Repeat("a", 255): "users/" + strings.Repeat("a", 255), strings.Repeat("a", 256): "",
	} {
		if got := pathOf("users", id); got != want {
			t.Errorf("%q: %q", id, got)
		}
	}
}

// addKey gives the realm a key for EdDSA.
func (w *env) addKey(curve, priority string) {
	w.Helper()
	w.keycloakAdmin("POST", "/components", body{"name": curve, "providerId": "eddsa-generated", "providerType": "org.keycloak.keys.KeyProvider",
		"config": body{"priority": []string{priority}, "enabled": []string{"true"}, "active": []string{"true"}, "eddsaEllipticCurveKey": []string{curve}}}, nil)
}

// TestUnknownKindsOfKeys: a key of a kind that is not known does not keep the others from being used.
func TestUnknownKindsOfKeys(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	token := w.session(newEmail()).Access
	w.addKey("Ed448", "1")
	w.restarted(nil, func() {}) // it fetches the keys anew
	w.wants(w.do(authorized(token, "GET", "/api/v1/auth/validate")), 200, "")
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	w.finds(w.doctor(nil, admin...), nil, nil)
	defer w.set("", "defaultSignatureAlgorithm", "EdDSA")()() // signed with that key from now on
	w.finds(w.doctor(nil, admin...), []string{"Keycloak: signing key"}, nil)
	w.addKey("Ed25519", "1000")
	w.finds(w.doctor(nil, admin...), nil, nil)
}

// TestTokensThatDoNotFit: a realm whose tokens this service can't use. The sign-in says so, the doctor finds it.
func TestTokensThatDoNotFit(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	email, _, _ := w.member()
	admin := asAdmin(t, services.AdminUser, services.AdminPassword)
	client := "/clients/" + w.clientID("auth-client")
	offline := w.find("/client-scopes", offlineScope)
	attribute := func(name, value string) func() {
		return func() { w.edit(client, func(rep map[string]any) { rep["attributes"].(map[string]any)[name] = value }) }
	}
	const p = "realm.clients[auth-client]."
	for _, c := range []struct {
		name   string
		breaks func()
		detail string
		wrong  string
	}{
		{"lightweight", attribute("client.use.lightweight.access.token.enabled", "true"), "lack claims", p + "attributes.client.use.lightweight.access.token.enabled"},
		{"no refresh tokens", attribute("use.refresh.tokens", "false"), "lack claims", p + "attributes.use.refresh.tokens"},
		{"an algorithm", attribute("access.token.signed.response.alg", "HS512"), "algorithm", p + "attributes.access.token.signed.response.alg"},
		{"offline", func() { w.keycloakAdmin("PUT", client+"/default-client-scopes/"+offline, nil, nil) }, "without an end", p + "defaultClientScopes"},
	} {
		w.Run(c.name, func() {
			c.breaks()
			a := w.login(email, password)
			w.wants(a, 503, "unavailable")
			if !strings.Contains(a.text("detail"), c.detail) || !strings.Contains(a.text("detail"), "administrator") {
				t.Errorf("%s: the detail is %q", c.name, a.text("detail"))
			}
			w.finds(w.doctor(nil, admin...), []string{c.wrong}, nil)
			w.finds(w.doctor(nil, append(admin, "-fix")...), nil, nil)
			w.wants(w.login(email, password), 200, "")
		})
	}
	w.Run("offline, for those who ask for it", func() {
		w.keycloakAdmin("PUT", client+"/optional-client-scopes/"+offline, nil, nil)
		w.finds(w.doctor(nil, admin...), []string{p + "optionalClientScopes"}, nil)
		w.finds(w.doctor(nil, append(admin, "-fix")...), nil, nil)
	})
	w.Run("another subject", func() {
		mapper := body{"name": "pair", "protocol": "openid-connect", "protocolMapper": "oidc-sha256-pairwise-sub-mapper", "config": body{}}
		w.keycloakAdmin("POST", client+"/protocol-mappers/models", mapper, nil)
		w.wants(w.login(email, password), 403, "account-setup-required")
		w.finds(w.doctor(nil, admin...), []string{"Keycloak: subject"}, nil)
		models := client + "/protocol-mappers/models"
		w.keycloakAdmin("DELETE", models+"/"+w.find(models, "pair"), nil, nil)
	})
	w.waitUntilIdle() // sessions that were refused have ended in Keycloak, too
}

// TestLargeTokens: a large access token is accepted as far as the server reads.
func TestLargeTokens(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	email, _, _ := w.member()
	models := "/clients/" + w.clientID("auth-client") + "/protocol-mappers/models"
	adds := func(kind string, config body) {
		config["access.token.claim"] = "true"
		w.keycloakAdmin("POST", models, body{"name": kind, "protocol": "openid-connect", "protocolMapper": kind, "config": config}, nil)
	}
	adds("oidc-hardcoded-claim-mapper", body{"claim.name": "large", "claim.value": strings.Repeat("g", 20_000)})
	a := w.login(email, password)
	w.wants(a, 200, "")
	if n := len(a.text("access_token")); n < 24<<10 {
		t.Errorf("the token has %d bytes only", n)
	}
	w.wants(w.do(authorized(a.text("access_token"), "GET", "/api/v1/auth/me")), 200, "")
	w.wants(w.do(authorized(a.text("access_token"), "GET", "/api/v1/auth/validate")), 200, "")
	w.edit(models+"/"+w.find(models, "oidc-hardcoded-claim-mapper"), func(rep map[string]any) {
		rep["config"].(map[string]any)["claim.value"] = strings.Repeat("g", 30_000)
	})
	a = w.login(email, password)
	w.wants(a, 503, "unavailable")
	if !strings.Contains(a.text("detail"), "too many groups") {
		t.Errorf("the detail is %q", a.text("detail"))
	}
	adds("oidc-group-membership-mapper", body{"claim.name": "groups", "full.path": "true"})
	found := w.doctor(nil, asAdmin(t, services.AdminUser, services.AdminPassword)...)
	w.finds(found, nil, nil)
	if !slices.Contains(named(found, "warn"), "Keycloak: token size") {
		t.Errorf("no warning: %v", found)
	}
}

// TestAdoption walks the commands of docs/keycloak.md through a realm that has users already, and that nobody has made for this service.
func TestAdoption(t *testing.T) {
	t.Parallel()
	w := uncheckedEnv(t, map[string]string{"JOB_INTERVAL": "0s"})
	const secret = "DJmQfC73VGFhw7D4QJ8A"
	var users []body
	for i := range 50 {
		name := fmt.Sprintf("user%02d", i)
		u := body{"username": name, "email": name + "@old.test", "enabled": i%10 != 9, "emailVerified": true,
			"credentials": []body{{"type": "password", "value": password}}}
		if i%2 == 0 {
			u["firstName"], u["lastName"] = "Ada", "Lovelace"
		}
		if i == 1 {
			u["credentials"] = append(u["credentials"].([]body), body{"type": "otp", "secretData": `{"value":"` + secret + `"}`,
				"credentialData": `{"subType":"totp","digits":6,"counter":0,"period":30,"algorithm":"HmacSHA1"}`})
		}
		users = append(users, u)
	}
	w.restarted(nil, func() {
		if err := services.DeleteRealm(t.Context(), w.realm); err != nil {
			t.Fatal(err)
		}
		stockRealm(t, w.realm)
		w.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": users}, nil)
		_, smtpPort, _ := strings.Cut(w.mail.Addr(), ":") // the operator's own
		w.edit("", func(rep map[string]any) {
			rep["smtpServer"] = body{"host": "127.0.0.1", "port": smtpPort, "from": "no-reply@old.test"}
		})
		admin := asAdmin(t, services.AdminUser, services.AdminPassword)
		if wrong := named(w.doctor(nil, admin...), "wrong"); len(wrong) < 20 {
			t.Errorf("the doctor finds only %v", wrong)
		}
		w.finds(w.doctor(nil, append(admin, "-fix")...), nil, nil)
		w.finds(w.doctor(nil, admin...), nil, nil)
		share := map[string]string{"SYNC_MAX_SHARE": "100"}
		if found, repaired, out, err := w.sync(share, "-dry-run"); !errors.Is(err, errDiffer) || found[diffUnknown] != 50 || len(found) > 1 || repaired[diffUnknown] > 0 {
			t.Errorf("%v: %s", err, out)
		}
		if _, repaired, out, err := w.sync(share); err != nil || repaired[diffUnknown] != 50 {
			t.Errorf("%v: %s", err, out)
		}
	})
	if got := w.value(`select concat_ws(' ', count(*), count(*) filter (where is_active), count(*) filter (where is_verified), count(*) filter (where first_name = 'Ada')) from users`); got != "50 45 50 25" {
		t.Errorf("all, active, verified, with names: %s", got)
	}
	w.wants(w.login("user00@old.test", password), 200, "")
	w.wants(w.login("user01@old.test", password), 401, "otp-required")
	in := body{"username": "user01", "password": password, "otp": oneTimeCode(secret, time.Now())}
	w.wants(w.post(loginPath, in), 200, "")
	w.wants(w.login("user09@old.test", password), 403, "account-disabled")
	w.account(newEmail())
	if _, _, out, err := w.sync(nil, "-dry-run"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
