package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// payload reads the claims of a token without judging it.
func (w *world) payload(token string) map[string]any {
	w.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		w.Fatalf("not a token: %q", token)
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims map[string]any
	if err == nil {
		err = json.Unmarshal(raw, &claims)
	}
	if err != nil {
		w.Fatal(err)
	}
	return claims
}

// TestLogin signs in by address and by name, and looks at the tokens, the session
// and the record.
func TestLogin(t *testing.T) {
	w := inSharedWorld(t)
	email := newEmail()
	name, _, _ := strings.Cut(email, "@")
	w.wants(w.post("/register", map[string]any{"email": email, "username": name, "password": password}), 201, "")
	w.wants(w.post("/verify", map[string]any{"token": w.readMail(email, 1).Token}), 200, "")
	before := time.Now().Add(-time.Second)
	for _, in := range []map[string]any{
		{"email": email}, {"username": name}, {"username": email}, {"email": strings.ToUpper(email)}, {"username": strings.ToUpper(name)},
	} {
		in["password"] = password
		a := w.do(call{method: "POST", path: "/api/v1/auth/login", json: in, header: map[string]string{"User-Agent": "a test"}, from: "198.51.100.7"})
		w.wants(a, 200, "")
		user, _ := a.JSON["user"].(map[string]any)
		claims := w.payload(a.text("access_token"))
		for claim, want := range map[string]any{
			"user_id": user["user_id"], "roles": []any{"user"}, "network_id": "X", "station_id": "X", "typ": "Bearer",
			"azp": "auth-client", "aud": "auth-client", "iss": services.KeycloakURL + "/realms/" + w.realm,
		} {
			if fmt.Sprint(claims[claim]) != fmt.Sprint(want) {
				t.Errorf("claim %s is %v, want %v", claim, claims[claim], want)
			}
		}
		if claims["sub"] == nil || claims["iat"] == nil || claims["exp"].(float64)-claims["iat"].(float64) != a.JSON["expires_in"] {
			t.Errorf("sub, iat or exp: %v", claims)
		}
		if user["email"] != email || user["username"] != name || user["network_id"] != "" || fmt.Sprint(user["roles"]) != "[user]" ||
			a.text("token_type") != "Bearer" || a.text("refresh_token") == "" || w.payload(a.text("id_token"))["sub"] != claims["sub"] {
			t.Errorf("the answer: %v", a)
		}
		var sid, address, agent, hash string
		var lastLogin, expires time.Time
		if err := w.pool.QueryRow(t.Context(), `select s.keycloak_session_id, s.ip_address, s.user_agent, s.refresh_hash, s.expires_at, u.last_login_at
			from sessions s join users u using (user_id) where session_id = $1 and u.user_id = $2`, a.text("session_id"), user["user_id"]).
			Scan(&sid, &address, &agent, &hash, &expires, &lastLogin); err != nil {
			t.Fatal(err)
		}
		if sid != claims["sid"] || address != "198.51.100.7" || agent != "a test" || hash != tokenHash(a.text("refresh_token")) ||
			lastLogin.Before(before) || time.Until(expires) < time.Minute {
			t.Errorf("the session: %s %s %s %s %v %v", sid, address, agent, hash, lastLogin, expires)
		}
		w.audited("login", fmt.Sprint(user["user_id"]), "ok", "")
	}
	w.wants(w.login(email, "wrong horse"), 401, "invalid-credentials")
}

// audited fails the test if the trail has no such entry.
func (w *world) audited(action, target, outcome, reason string) {
	w.Helper()
	var n int
	if err := w.pool.QueryRow(w.Context(), `select count(*) from audit_log where action = $1 and ($2 = '' or target = $2) and outcome = $3 and reason = $4`,
		action, target, outcome, reason).Scan(&n); err != nil || n == 0 {
		w.Errorf("no audit entry %s of %s: %s %s %v", action, target, outcome, reason, err)
	}
}

// TestLoginRefused has a row for each answer of Keycloak's password grant, each
// beside the login of the same person that works.
func TestLoginRefused(t *testing.T) {
	w := inSharedWorld(t)
	for _, test := range []struct {
		name      string
		meanwhile func(id, email string) // what happens to the account
		password  string
		status    int
		slug      string
		detail    string
	}{
		{"wrong password", nil, "wrong horse battery", 401, "invalid-credentials", ""},
		{"disabled by an administrator", func(id, _ string) { w.admin("PUT", "/users/"+id, map[string]any{"enabled": false}, nil) },
			password, 403, "account-disabled", ""},
		{"disabled, wrong password", func(id, _ string) { w.admin("PUT", "/users/"+id, map[string]any{"enabled": false}, nil) },
			"wrong horse battery", 403, "account-disabled", ""},
		{"must change the password", func(id, _ string) {
			w.admin("PUT", "/users/"+id, map[string]any{"requiredActions": []string{"UPDATE_PASSWORD"}}, nil)
		}, password, 403, "account-setup-required", "A new password has to be chosen first."},
		{"must set up an app", func(id, _ string) {
			w.admin("PUT", "/users/"+id, map[string]any{"requiredActions": []string{"CONFIGURE_TOTP"}}, nil)
		}, password, 403, "account-setup-required", "A one-time-code app has to be set up first."},
		{"must do something, wrong password", func(id, _ string) {
			w.admin("PUT", "/users/"+id, map[string]any{"requiredActions": []string{"CONFIGURE_TOTP"}}, nil)
		}, "wrong horse battery", 401, "invalid-credentials", ""},
		{"locked after wrong passwords", func(_, email string) {
			for range 12 {
				w.login(email, "wrong horse battery")
			}
		}, password, 401, "invalid-credentials", ""},
		{"deleted in Keycloak", func(id, _ string) { w.admin("DELETE", "/users/"+id, nil, nil) }, password, 401, "invalid-credentials", ""},
		{"deleted here", func(_, email string) {
			w.exec(`update users set is_active = false, deleted_at = now() where email = $1`, email)
		}, password, 403, "account-disabled", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := *w
			w.TB = t
			email := newEmail()
			w.account(email)
			a := w.login(email, password)
			w.wants(a, 200, "")
			id := w.payload(a.text("access_token"))["sub"].(string)
			if test.meanwhile != nil {
				test.meanwhile(id, email)
			}
			a = w.login(email, test.password)
			w.wants(a, test.status, test.slug)
			if !strings.HasPrefix(a.text("detail"), test.detail) {
				t.Errorf("detail %q, want %q", a.text("detail"), test.detail)
			}
			w.audited("login", "", "refused", test.slug)
			// The oracle must not see an administrator's work as our mistake.
			w.exec(`delete from sessions where user_id in (select user_id from users where email = $1)`, email)
			w.exec(`delete from user_registrations where email = $1`, email)
			w.exec(`delete from users where email = $1`, email)
			if test.name != "deleted in Keycloak" {
				w.admin("DELETE", "/users/"+id, nil, nil)
			}
		})
	}
	w.wants(w.login(newEmail(), password), 401, "invalid-credentials")
	unknownHere := newEmail()
	w.admin("POST", "/users", map[string]any{"username": unknownHere, "email": unknownHere, "enabled": true, "emailVerified": true,
		"credentials": []map[string]any{{"type": "password", "value": password}}}, nil)
	w.wants(w.login(unknownHere, password), 403, "account-setup-required")
}

// TestLoginPending: nobody signs in before the address is confirmed, whatever the
// password; the account is named neither by address nor by name.
func TestLoginPending(t *testing.T) {
	w := inSharedWorld(t)
	email := newEmail()
	name, _, _ := strings.Cut(email, "@")
	w.wants(w.post("/register", map[string]any{"email": email, "username": name, "password": password}), 201, "")
	for _, in := range []map[string]any{{"email": email, "password": password}, {"username": name, "password": password}, {"email": email, "password": "wrong"}} {
		a := w.post("/auth/login", in)
		w.wants(a, 403, "account-not-verified")
		if a.text("title") != "Account not verified" {
			t.Errorf("title %q", a.text("title"))
		}
	}
	l := w.readMail(email, 1)
	w.wants(w.post("/api/v1/register/cancel", map[string]any{"token": l.Token}), 200, "")
	w.wants(w.login(email, password), 401, "invalid-credentials")
}

// TestLoginLimits: per account, from wherever the attempts come, and per address.
func TestLoginLimits(t *testing.T) {
	w := inSharedWorld(t)
	email := newEmail()
	l := loginLimit(email)
	for range l.N {
		w.wants(w.login(email, "wrong"), 401, "invalid-credentials")
	}
	w.wants(w.login(strings.ToUpper(email), "wrong"), 429, "too-many-requests")
	w.audited("login", "", "refused", "too-many-requests")

	from := newAddress()
	for i := range onLogin.N + 1 {
		a := w.do(call{method: "POST", path: "/auth/login", json: map[string]any{"email": newEmail(), "password": "wrong"}, from: from})
		if i < onLogin.N {
			w.wants(a, 401, "invalid-credentials")
		} else {
			w.wants(a, 429, "too-many-requests")
		}
	}
}
