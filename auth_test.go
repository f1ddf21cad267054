package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// member is an account with a username, verified, and its id in Keycloak.
func (w *env) member() (email, username, id string) {
	w.Helper()
	email = newEmail()
	username = "m-" + email[:10]
	w.wants(w.post(registerPath, body{"email": email, "username": username}), 201, "")
	w.confirms(w.readMail(email, 1))
	return email, username, w.value(`select keycloak_id from users where email = $1`, email)
}

func TestLogin(t *testing.T) {
	w := sharedEnv(t)
	email, username, id := w.member()
	for _, b := range []body{{"email": email}, {"username": username}, {"email": strings.ToUpper(email)}, {"username": email}, {"username": strings.ToUpper(username)}} {
		b["password"] = password
		a := w.do(call{method: "POST", path: loginPath, json: b, from: "192.0.2.7", header: map[string]string{"User-Agent": "t\xff" + strings.Repeat("é", 400)}})
		w.wants(a, 200, "")

		session, userID := a.text("session_id"), w.value(`select user_id from users where email = $1`, email)
		if diff := cmp.Diff(body{"user_id": userID, "email": email, "username": username, "roles": []any{"user"}, "network_id": "", "station_id": ""},
			a.JSON["user"]); diff != "" || !regexp.MustCompile(`^SES-[\w-]{16}$`).MatchString(session) {
			t.Errorf("session %s, user %s", session, diff)
		}
		if a.text("token_type") != "Bearer" || !lasts(a.JSON["expires_in"], 300) || !lasts(a.JSON["refresh_expires_in"], 86400) ||
			!slices.Contains(strings.Fields(a.text("scope")), "openid") || a.text("id_token") == "" {
			t.Error(a)
		}
		payload, err := base64.RawURLEncoding.DecodeString(strings.Split(a.text("access_token"), ".")[1])
		var claims map[string]any
		if err != nil || json.Unmarshal(payload, &claims) != nil {
			t.Fatalf("%s %v", payload, err)
		}
		if exp, iat := claims["exp"].(float64), claims["iat"].(float64); !lasts(exp-iat, 300) || iat < float64(time.Now().Unix()-10) {
			t.Errorf("iat %v, exp %v", iat, exp)
		}
		wantClaims := map[string]any{"sub": id, "user_id": userID, "roles": []any{"user"}, "network_id": "X", "station_id": "X",
			"iss": w.vars["KEYCLOAK_PUBLIC_URL"] + "/realms/" + w.realm, "typ": "Bearer", "azp": "auth-client", "aud": "auth-client"}
		for name, want := range wantClaims {
			if diff := cmp.Diff(want, claims[name]); diff != "" {
				t.Errorf("claim %s: %s", name, diff)
			}
		}
		if _, has := claims["realm_access"]; has {
			t.Error("realm roles are in the token")
		}

		var row struct {
			Hash, SID, Address, Agent string
			Seconds                   float64
			Logged                    bool
		}
		if err := w.pool.QueryRow(t.Context(), `
			select token_hash, keycloak_session_id, ip_address, s.user_agent, round(extract(epoch from s.expires_at - s.created_at))::float8, last_login_at = s.created_at
			from sessions s join users using (user_id) join refresh_tokens using (session_id)
			where session_id = $1 and ended_at is null and user_id = $2`, session, userID).
			Scan(&row.Hash, &row.SID, &row.Address, &row.Agent, &row.Seconds, &row.Logged); err != nil {
			t.Fatal(err)
		}
		if row.Hash != digest(a.text("refresh_token")) || row.SID != claims["sid"] || row.Address != "192.0.2.7" || !row.Logged ||
			!lasts(row.Seconds, 86400) || row.Agent != "t"+strings.Repeat("é", 149) {
			t.Errorf("session row: %+v", row)
		}
		if got := w.value(`select concat_ws(' ', actor, target, outcome, ip_address, request_id) from audit_log
			where action = 'login' and details->>'session_id' = $1`, session); got != userID+" "+userID+" ok 192.0.2.7 "+a.Header.Get("X-Request-Id") {
			t.Errorf("audit: %s", got)
		}
	}
}

// lasts says whether a lifetime is what the realm is set to: Keycloak, and we after
// it, count whole seconds down from the moment that a request came.
func lasts(seconds any, want float64) bool {
	n, ok := seconds.(float64)
	return ok && n <= want && n > want-10
}

// What Keycloak and PostgreSQL may say about somebody who wants to sign in.
func TestLoginRefused(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // sync would reconcile what is changed in one store only
	email, username, id := w.member()
	user := func(change body) { w.keycloakAdmin("PUT", "/users/"+id, change, nil) }
	const wrong = "a wrong password"
	w.secrets.add(wrong)
	ofDisabled := attempt{status: 401, slug: "invalid-credentials"}
	if olderKeycloak() { // it says so whatever the password
		ofDisabled = attempt{status: 403, slug: "account-disabled"}
	}
	here := func(set string) { w.exec(`update users set `+set+` where email = $1`, email) }
	nobody := func() {}
	for _, c := range []struct {
		name     string
		before   func()
		login    string
		password string
		status   int
		slug     string
		detail   string
		after    func()
	}{
		{"unknown", nobody, newEmail(), password, 401, "invalid-credentials", "", nobody},
		{"wrong password", nobody, email, wrong, 401, "invalid-credentials", "", nobody},
		{"wrong password, by username", nobody, username, wrong, 401, "invalid-credentials", "", nobody},
		{"right password in capitals", nobody, email, strings.ToUpper(password), 401, "invalid-credentials", "", nobody},
		{"new password wanted", func() { user(body{"requiredActions": []string{"UPDATE_PASSWORD"}}) }, email, password,
			403, "account-setup-required", "new password", nobody},
		{"new password wanted, by username", nobody, username, password, 403, "account-setup-required", "new password", nobody},
		{"new password wanted, wrong one given", nobody, email, wrong, 401, "invalid-credentials", "", nobody},
		{"one-time code wanted", func() { user(body{"requiredActions": []string{"CONFIGURE_TOTP"}}) }, email, password,
			403, "account-setup-required", "one-time-code app", nobody},
		{"something unheard of wanted", func() { user(body{"requiredActions": []string{"delete_credential"}}) }, email, password,
			403, "account-setup-required", "has to be set up", func() { user(body{"requiredActions": []string{}}) }},
		{"disabled in Keycloak", func() { user(body{"enabled": false}) }, email, password, 403, "account-disabled", "", nobody},
		{"disabled in Keycloak, wrong password", nobody, email, wrong, ofDisabled.status, ofDisabled.slug, "", func() { user(body{"enabled": true}) }},
		{"deleted here", func() { here(`is_active = false, deleted_at = now()`) }, email, password, 403, "account-disabled", "", nobody},
		{"deleted here, wrong password", nobody, email, wrong, 401, "invalid-credentials", "", func() { here(`is_active = true, deleted_at = null`) }},
		{"all well again", nobody, email, password, 200, "", "", nobody},
		{"locked", func() {
			w.eventually("locked", time.Minute, func() bool { // Keycloak counts a moment later
				w.token(url.Values{"grant_type": {"password"}, "username": {username}, "password": {wrong}}) // past the service, which allows fewer
				var status struct{ Disabled bool }
				w.keycloakAdmin("GET", "/attack-detection/brute-force/users/"+id, nil, &status)
				return status.Disabled
			})
		}, username, password, 401, "invalid-credentials", "", func() { w.keycloakAdmin("DELETE", "/attack-detection/brute-force/users/"+id, nil, nil) }},
		{"unlocked", nobody, username, password, 200, "", "", nobody},
		{"pending", func() {
			w.wants(w.post(registerPath, body{"email": "p" + email, "username": "p" + username}), 201, "")
		}, "p" + email, password, 403, "account-not-verified", "", nobody},
		{"pending, by the username that is not reserved yet", nobody, "p" + username, password, 401, "invalid-credentials", "", nobody},
		{"pending, in capitals", nobody, strings.ToUpper("p" + email), password, 403, "account-not-verified", "", nobody},
		{"only in Keycloak", func() {
			w.keycloakAdmin("POST", "/users", body{"username": "k" + username, "enabled": true, "email": "k" + email, "emailVerified": true,
				"credentials": []body{{"type": "password", "value": password}}}, nil)
		}, "k" + username, password, 200, "", "", nobody},
	} {
		t.Log(c.name)
		c.before()
		a := w.do(call{method: "POST", path: loginPath, json: body{"username": c.login, "password": c.password}})
		w.wants(a, c.status, c.slug)
		if !strings.Contains(a.text("detail"), c.detail) {
			t.Errorf("%s: %v", c.name, a)
		}
		if c.slug == "account-not-verified" && a.text("title") != "Account not verified" {
			t.Error(a)
		}
		if c.status == 401 && !strings.HasPrefix(a.Header.Get("WWW-Authenticate"), "Bearer") {
			t.Errorf("WWW-Authenticate: %q", a.Header.Get("WWW-Authenticate"))
		}
		if c.slug != "" {
			if got := w.value(`select action || ' ' || outcome || ' ' || reason from audit_log where request_id = $1`, a.text("request_id")); got != "login refused "+c.slug {
				t.Errorf("%s: audit: %s", c.name, got)
			}
		}
		c.after()
	}
	// Whoever got no tokens has no session, in Keycloak as little as here.
	var users []seenUser
	w.keycloakAdmin("GET", "/users?search=*"+email+"*", nil, &users)
	if len(users) != 3 { // the member, the pending one, the one that only Keycloak has
		t.Errorf("Keycloak has %v", users)
	}
	for _, u := range users {
		var sessions []any
		w.keycloakAdmin("GET", "/users/"+u.ID+"/sessions", nil, &sessions)
		if here := w.value(`select count(*)::text from sessions s join users using (user_id) where keycloak_id = $1`, u.ID); here != fmt.Sprint(len(sessions)) {
			t.Errorf("%s: %d sessions in Keycloak, %s here", u.Username, len(sessions), here)
		}
	}
}

// TestLoginLimits: failures count, not attempts. Who guesses is stopped for a minute, and the owner signs in from
// elsewhere; only guesses from many places stop everybody, for a minute at most (S8).
func TestLoginLimits(t *testing.T) {
	w := sharedEnv(t)
	email, username, _ := w.member()
	id := w.idOf(email)
	from := newAddress()
	try := func(login, password string) answer {
		r := signingIn(login, password)
		r.from = from
		return w.do(r)
	}
	for range 2 * failuresOfOne.N {
		w.wants(try(email, password), 200, "")
	}
	for i := range failuresOfOne.N { // by address or by username, with or without capitals
		w.wants(try([]string{email, strings.ToUpper(email), username}[i%3], "a wrong password"), 401, "invalid-credentials")
	}
	a := try(email, password)
	w.wants(a, 429, "too-many-requests")
	if wait, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || wait < 1 || wait > 60 {
		t.Errorf("Retry-After: %v", a.Header)
	}
	w.wants(w.login(email, password), 200, "")
	w.usesUp(failuresOfAll.of(id))
	elsewhere := signingIn(email, password)
	elsewhere.from = newAddress()
	w.wants(w.do(elsewhere), 429, "too-many-requests")
	w.exec(`update rate_limits set resets_at = now() where key = any($1)`,
		[]string{failuresOfAll.of(id).Key, failuresOfOne.of(id, network(netip.MustParseAddr(from))).Key})
	w.wants(w.do(elsewhere), 200, "")
}
