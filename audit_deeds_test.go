package main

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// deeds does one of everything, over HTTP, and looks at what the audit log has of it. People
// are called by their names; in entries, too, the names stand for the ids.
type deeds struct {
	*env
	domain string            // of everybody's address
	names  map[string]string // by id
	tokens map[string]answer // by name, of the latest sign-in
	seen   int               // entries that were looked at
}

// deed is a request, and all entries that it leaves, in order.
type deed struct {
	name   string
	before func()      // has to happen first
	do     func() call // is made after that
	status int
	signIn string // who is signed in by it
	want   []string
}

// TestEveryDeedIsAudited: of each deed the audit log has exactly its entries, and the log has
// each of them, too.
func TestEveryDeedIsAudited(t *testing.T) {
	t.Parallel()
	d := &deeds{env: newEnv(t, map[string]string{"RESEND_LIMIT": "3", "CORS_ALLOWED_ORIGINS": app}), names: map[string]string{}, tokens: map[string]answer{}}
	d.domain = gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 8) + ".test"
	d.noEvents() // what is changed in Keycloak here is found by who signs in
	d.eventually("the daily sync is over", time.Minute, func() bool { return d.value(`select count(*)::text from audit_log where action = 'sync.end'`) == "1" })
	d.registrations()
	d.refusedRegistrations()
	d.endedRegistrations()
	d.signIns()
	d.sessions()
	d.invitations()
	d.changes()
	d.managedSessions()
	d.syncs()
	d.deletions()
	if got := d.value(`select count(*)::text from audit_log`); got != fmt.Sprint(d.seen) { // and nothing else has happened
		t.Errorf("%s entries, %d were looked at", got, d.seen)
	}
	stored := storedEntries(t, d.list(entriesAsJSON))
	d.eventually("all are logged", time.Minute, func() bool { return len(loggedEntries(t, d.logs.String())) >= len(stored) })
	if diff := cmp.Diff(stored, loggedEntries(t, d.logs.String())); diff != "" {
		t.Errorf("-stored +logged\n%s", diff)
	}
	d.straysDie()
}

func (d *deeds) mail(name string) string { return name + "@" + d.domain }

func (d *deeds) path(name string) string { return "/api/v1/users/" + d.idOf(d.mail(name)) }

// learn asks who has which id by now.
func (d *deeds) learn() {
	d.Helper()
	rows, _ := d.pool.Query(d.Context(), `select user_id, split_part(email, '@', 1) from users union all
		select registration_id, 'reg:' || split_part(email, '@', 1) from user_registrations where email <> ''`)
	var id, name string
	if _, err := pgx.ForEachRow(rows, []any{&id, &name}, func() error { d.names[id] = name; return nil }); err != nil {
		d.Fatal(err)
	}
}

// entries are lines like "login ada > ada ok @NET-1 {…}"; "USR" is somebody unknown.
func (d *deeds) entries(condition string, args ...any) string {
	d.Helper()
	lines := d.list(`select concat_ws(' ', action, actor, '>', nullif(target, ''), outcome, nullif(reason, ''), nullif('@' || network_id, '@'), nullif(details::text, '{}'))
		from audit_log where `+condition+` order by at, ctid`, args...)
	d.learn()
	return regexp.MustCompile(`(USR|REG|SES|SYN)-[\w-]{16}`).ReplaceAllStringFunc(lines, func(id string) string {
		if name := d.names[id]; name != "" {
			return name
		}
		return id[:3]
	})
}

// exactly fails unless these entries, and no others, fulfil a condition.
func (d *deeds) exactly(what, condition string, arg any, want ...string) {
	d.Helper()
	if diff := cmp.Diff(strings.Join(want, "\n"), d.entries(condition, arg)); diff != "" {
		d.Errorf("%s: -want +audited\n%s", what, diff)
	}
	d.seen += len(want)
}

// all does them one after the other.
func (d *deeds) all(list ...deed) {
	d.Helper()
	for _, deed := range list {
		if deed.before != nil {
			deed.before()
		}
		d.learn() // who is gone afterwards
		r := deed.do()
		request := "request-" + gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
		header := map[string]string{"X-Request-Id": request, "User-Agent": "agent of " + deed.name}
		maps.Copy(header, r.header)
		if r.header = header; r.from == "" {
			r.from = newAddress()
		}
		a := d.do(r)
		if a.Status != deed.status {
			d.Fatalf("%s: %v\n%s", deed.name, a, regexp.MustCompile("(?m)^.*"+request+".*$").FindAllString(d.logs.String(), -1))
		}
		if deed.signIn != "" {
			d.tokens[deed.signIn] = a
		}
		d.exactly(deed.name, `request_id = $1`, request, deed.want...)
		if got := d.list(`select concat_ws(' ', ip_address, user_agent) from audit_log where request_id = $1 and (ip_address, user_agent) <> ($2, $3)
			and actor not like 'system:%'`, // what a task does in a request is nobody's
			request, r.from, header["User-Agent"]); got != "" {
			d.Errorf("%s: address or user agent is another: %s", deed.name, got)
		}
	}
}

// as is a request of who is signed in. In the path, {ada} is the user and [ada] the session.
func (d *deeds) as(name, method, path string, json any) func() call {
	return func() call {
		path := regexp.MustCompile(`\{\w+\}`).ReplaceAllStringFunc(path, func(user string) string { return d.path(strings.Trim(user, "{}")) })
		path = regexp.MustCompile(`\[\w+\]`).ReplaceAllStringFunc(path, func(user string) string { return d.tokens[strings.Trim(user, "[]")].text("session_id") })
		r := authorized(d.tokens[name].text("access_token"), method, path)
		r.json = json
		return r
	}
}

func posts(path string, b body) func() call {
	return func() call { return call{method: "POST", path: path, json: b} }
}

func (d *deeds) registers(name string) func() call {
	return posts(registerPath, body{"email": d.mail(name)})
}

func (d *deeds) verifies(name string) func() call {
	return func() call { return verifying(d.lastMail(d.mail(name))) }
}

func (d *deeds) cancels(name string) func() call {
	return func() call { return cancelling(d.lastMail(d.mail(name))) }
}

// guesses types a wrong code.
func (d *deeds) guesses(name string) func() call {
	return func() call { return typing(d.mail(name), other(d.lastMail(d.mail(name)).Code)) }
}

func (d *deeds) resends(name string) func() call {
	return func() call {
		return resending(d.value(`select registration_id from user_registrations where email = $1`, d.mail(name)))
	}
}

func (d *deeds) logsIn(name, password string) func() call {
	return posts(loginPath, body{"email": d.mail(name), "password": password})
}

// cooled lets the next mail to somebody go out.
func (d *deeds) cooled(name string) func() { return func() { d.minuteLater(d.mail(name)) } }

// inKeycloak changes somebody there.
func (d *deeds) inKeycloak(name string, change body) func() {
	return func() { d.keycloakAdmin("PUT", "/users/"+d.keycloakID(d.mail(name)), change, nil) }
}

// limited comes from an address whose budget is used up.
func (d *deeds) limited(budget limit, do func() call) func() call {
	return func() call {
		r := do()
		r.from = newAddress()
		d.exec(`insert into rate_limits (key, hits, resets_at) values ($1, $2, now() + interval '1 minute')`,
			budget.of(network(netip.MustParseAddr(r.from))).Key, budget.N)
		return r
	}
}

// registered are the entries of a registration.
func (d *deeds) registered(name string) []string {
	return []string{"registration.begin anonymous > reg:" + name + ` ok {"role": "user", "source": "web"}`,
		`user.create anonymous > ` + name + ` ok {"role": "user", "source": "web", "network_id": "", "station_id": "", "registration_id": "reg:` + name + `"}`,
		"registration.mail anonymous > reg:" + name + " ok"}
}

// verified is the entry of a confirmed registration.
func (d *deeds) verified(name string) string {
	return `registration.verified anonymous > reg:` + name + ` ok {"user_id": "` + name + `"}`
}

func (d *deeds) registrations() {
	resent := []string{"registration.resend anonymous > reg:ada ok", "registration.mail anonymous > reg:ada ok"}
	d.all([]deed{
		{name: "register", do: d.registers("ada"), status: 201, want: d.registered("ada")},
		{name: "register again, too soon", do: d.registers("ada"), status: 201},
		{name: "register again", before: d.cooled("ada"), do: d.registers("ada"), status: 201, want: resent},
		{name: "resend, too soon", do: d.resends("ada"), status: 429, want: []string{"resend anonymous > reg:ada refused resend-too-soon"}},
		{name: "resend", before: d.cooled("ada"), do: d.resends("ada"), status: 200, want: resent},
		{name: "resend, too often", before: d.cooled("ada"), do: d.resends("ada"), status: 429, want: []string{"resend anonymous > reg:ada refused resend-limit"}},
		{name: "resend, unknown", do: func() call { return resending(string(newRegistrationID())) }, status: 404,
			want: []string{"resend anonymous > refused registration-not-found"}},
		{name: "resend, unknown address", do: posts(resendPath, body{"email": d.mail("nobody")}), status: 200, want: []string{"registration.resend anonymous > refused registration-not-found"}},
		{name: "verify, wrong code", before: func() { d.readMail(d.mail("ada"), 3) }, do: d.guesses("ada"), status: 400,
			want: []string{"verify anonymous > reg:ada refused invalid-code"}},
		{name: "verify, too many codes", before: func() { d.usesUp(codesTried.of(d.mail("ada"))) }, do: d.guesses("ada"), status: 429,
			want: []string{"verify anonymous > reg:ada refused too-many-attempts"}},
		{name: "verify, unknown address", do: posts(verifyPath, body{"email": d.mail("nobody"), "code": "123456"}), status: 400,
			want: []string{"verify anonymous > refused invalid-code"}},
		{name: "verify, unknown token", do: posts(verifyPath, body{"token": "x"}), status: 400, want: []string{"verify anonymous > refused invalid-token"}},
		{name: "verify, not well-formed", do: posts(verifyPath, body{"token": 1}), status: 400},
		{name: "sign-in, not verified", do: d.logsIn("ada", password), status: 403, want: []string{"login anonymous > reg:ada refused account-not-verified"}},
		{name: "verify, refused by Keycloak", do: func() call {
			return call{method: "POST", path: verifyPath, json: body{"token": d.lastMail(d.mail("ada")).Token, "password": "short"}}
		}, status: 400},
		{name: "verify", do: d.verifies("ada"), status: 200, want: []string{d.verified("ada")}},
		{name: "verify again", do: d.verifies("ada"), status: 200},
		{name: "resend, verified", do: d.resends("ada"), status: 409, want: []string{"resend anonymous > reg:ada refused already-verified"}},
		{name: "cancel, verified", do: d.cancels("ada"), status: 409, want: []string{"cancel anonymous > reg:ada refused already-verified"}},
	}...)
}

func (d *deeds) refusedRegistrations() {
	form := func(site, name string) func() call {
		return func() call {
			return call{method: "POST", path: "/account/register", form: url.Values{"email": {d.mail(name)}},
				header: map[string]string{"Sec-Fetch-Site": site}}
		}
	}
	onlyInKeycloak := func() {
		d.keycloakAdmin("POST", "/users", body{"username": d.mail("kim"), "enabled": true, "email": d.mail("kim"), "emailVerified": true,
			"credentials": []body{{"type": "password", "value": password}}}, nil)
	}
	d.all([]deed{
		{name: "register, known", do: d.registers("ada"), status: 409, want: []string{"register anonymous > refused user-exists"}},
		{name: "register, known, by the form", do: form("same-origin", "ada"), status: 409, want: []string{"register anonymous > refused user-exists"}},
		{name: "register, by another site's form", do: form("cross-site", "eve"), status: 403, want: []string{"register anonymous > refused forbidden"}},
		{name: "register, no JSON", do: func() call { return call{method: "POST", path: registerPath, body: "{}"} }, status: 415,
			want: []string{"register anonymous > refused unsupported-media-type"}},
		{name: "register, too large", do: posts(registerPath, body{"email": strings.Repeat("x", maxBody)}), status: 413,
			want: []string{"register anonymous > refused payload-too-large"}},
		{name: "register, known to Keycloak", before: onlyInKeycloak, do: d.registers("kim"), status: 409, want: []string{
			`registration.begin anonymous > REG ok {"role": "user", "source": "web"}`, `registration.cancelled anonymous > REG ok user-exists {"user_id": "USR"}`,
			"register anonymous > refused user-exists"}},
		{name: "sign-in, known to Keycloak only", do: d.logsIn("kim", password), status: 200, want: []string{
			`user.import system:sync > kim ok {"role": "user", "source": "internal", "keycloak": {}, "is_active": true}`, `login kim > kim ok {"session_id": "SES"}`}},
		{name: "register, limited", do: d.limited(onRegister, d.registers("zoe")), status: 429, want: []string{"register anonymous > refused too-many-requests"}},
	}...)
}

func (d *deeds) endedRegistrations() {
	status := func(id string) func() call {
		return func() call { return call{path: "/api/v1/registrations/" + id} }
	}
	d.all([]deed{
		{name: "register", do: d.registers("bob"), status: 201, want: d.registered("bob")},
		{name: "cancel, unknown", do: posts(cancelPath, body{"token": "x"}), status: 400, want: []string{"cancel anonymous > refused invalid-token"}},
		{name: "cancel", do: d.cancels("bob"), status: 200, want: []string{
			`user.remove anonymous > bob ok {"registration_id": "reg:bob"}`, `registration.cancelled anonymous > reg:bob ok not_me {"user_id": "bob"}`}},
		{name: "cancel again", do: d.cancels("bob"), status: 200},
		{name: "verify, cancelled", do: d.verifies("bob"), status: 410, want: []string{"verify anonymous > reg:bob refused verification-cancelled"}},
		{name: "register", do: d.registers("cay"), status: 201, want: d.registered("cay")},
	}...)
	reg := d.value(`select registration_id from user_registrations where email = $1`, d.mail("cay"))
	d.readMail(d.mail("cay"), 1)
	const byTasks = `target = $1 and actor like 'system:%' and (ip_address, user_agent, request_id) = ('', '', '')`
	d.all([]deed{{name: "resend by address", before: d.cooled("cay"), do: posts(resendPath, body{"email": d.mail("cay")}), status: 200,
		want: []string{"registration.resend anonymous > reg:cay ok"}}}...)
	d.readMail(d.mail("cay"), 2)
	d.eventually("mailed", time.Minute, func() bool { return d.entries(byTasks, reg) != "" })
	d.exactly("resent", byTasks, reg, "registration.mail system:registrations > reg:cay ok")
	d.learn()
	d.expire(d.mail("cay"))
	d.due(reg)
	d.eventually("expired", time.Minute, func() bool { return strings.Contains(d.entries(byTasks, reg), "expired") })
	d.exactly("expired", byTasks+` and action like '%.expired'`, reg, `registration.expired system:registrations > reg:cay ok expired {"user_id": "cay"}`)
	d.exactly("expired", `details->>'registration_id' = $1 and actor like 'system:%'`, reg, `user.remove system:registrations > cay ok {"registration_id": "reg:cay"}`)
	d.all([]deed{
		{name: "verify, expired", do: d.verifies("cay"), status: 410, want: []string{"verify anonymous > reg:cay refused verification-expired"}},
		{name: "status, limited: a GET", do: d.limited(onStatus, status(reg)), status: 429, want: []string{"registrationStatus anonymous > refused too-many-requests"}},
		{name: "status", do: status(reg), status: 200},
		{name: "status, unknown: a GET", do: status(string(newRegistrationID())), status: 404},
	}...)
}

// in is the entry of somebody's sign-in, with the network.
func in(name string, network ...string) string {
	return strings.Join(append([]string{"login", name, ">", name, "ok"}, append(network, `{"session_id": "SES"}`)...), " ")
}

func (d *deeds) signIns() {
	const wrong = "a wrong password"
	active := func(yes bool) func() {
		return func() {
			d.exec(`update users set is_active = $2, deleted_at = case when not $2 then now() end where email = $1`, d.mail("ada"), yes)
		}
	}
	d.all([]deed{
		{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada")}},
		{name: "sign-in, unknown", do: d.logsIn("nobody", wrong), status: 401, want: []string{"login anonymous > refused invalid-credentials"}},
		{name: "sign-in, wrong password", do: d.logsIn("ada", wrong), status: 401, want: []string{"login anonymous > ada refused invalid-credentials"}},
		{name: "sign-in, new password wanted", before: d.inKeycloak("ada", body{"requiredActions": []string{"UPDATE_PASSWORD"}}),
			do: d.logsIn("ada", password), status: 403, want: []string{"login anonymous > ada refused account-setup-required"}},
		{name: "sign-in, disabled in Keycloak", before: d.inKeycloak("ada", body{"requiredActions": []string{}, "enabled": false}),
			do: d.logsIn("ada", password), status: 403, want: []string{"login anonymous > ada refused account-disabled"}},
		{name: "enabled there, disabled in PostgreSQL", before: active(false), do: func() call {
			d.inKeycloak("ada", body{"enabled": true})()
			return d.logsIn("ada", password)()
		}, status: 403, want: []string{"login anonymous > ada refused account-disabled"}},
		{name: "me, disabled: a GET", do: d.as("ada", "GET", "/api/v1/auth/me", nil), status: 403, want: []string{"me ada > refused account-disabled"}},
		{name: "sign-in, too often for the account", before: func() { active(true)(); d.usesUp(failuresOfAll.of(d.idOf(d.mail("ada")))) }, do: d.logsIn("ada", password), status: 429,
			want: []string{"login anonymous > refused too-many-requests"}},
		{name: "sign-in, too often from there", before: func() { d.exec(`delete from rate_limits where key = $1`, failuresOfAll.of(d.idOf(d.mail("ada"))).Key) }, do: d.limited(onLogin, d.logsIn("ada", password)), status: 429,
			want: []string{"login anonymous > refused too-many-requests"}},
		{name: "code flow, forged", do: func() call { return call{path: "/auth/callback?state=x&code=y"} }, status: 400,
			want: []string{"login anonymous > refused sign-in-incomplete"}},
		{name: "code flow, too often: a GET", do: d.limited(onSignIn, func() call { return call{path: "/auth/login"} }), status: 429,
			want: []string{"signInPage anonymous > refused too-many-requests"}},
		{name: "forgot password", do: func() call { return forgetting(d.mail("ada")) }, status: 202, want: []string{"password.forgot anonymous > ada ok"}},
		{name: "forgot password, too soon", do: func() call { return forgetting(d.mail("ada")) }, status: 202,
			want: []string{"password.forgot anonymous > ada ok"}},
		{name: "forgot password, unknown", do: func() call { return forgetting(d.mail("nobody")) }, status: 202,
			want: []string{"password.forgot anonymous > ok"}},
	}...)
}

func (d *deeds) sessions() {
	former := d.tokens["ada"]
	refreshes := func() call { return refreshing(former.text("refresh_token")) }
	logsOut := func() call { return loggingOut(d.tokens["ada"].text("refresh_token")) }
	again := deed{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada")}}
	crossSite := map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Cookie": "refresh_token=x"}
	d.all([]deed{
		{name: "refresh", do: refreshes, status: 200},
		{name: "refresh, reused", before: func() { d.refreshed(d.refreshed(former)); d.graceEnds(former) }, do: refreshes, status: 401, want: []string{
			`session.end anonymous > ada ok token-reused {"sessions": ["SES"]}`, "refresh anonymous > ada refused token-reused"}},
		{name: "refresh, ended", do: refreshes, status: 401, want: []string{"refresh anonymous > refused invalid-token"}},
		{name: "refresh, another site", do: func() call { return call{method: "POST", path: refreshPath, header: crossSite} }, status: 403,
			want: []string{"refresh anonymous > refused forbidden"}},
		again,
		{name: "logout", do: logsOut, status: 204, want: []string{`logout ada > ada ok logout {"sessions": ["SES"]}`}},
		{name: "logout again", do: logsOut, status: 204},
		{name: "sessions, revoked token: a GET", do: d.as("ada", "GET", sessionsPath, nil), status: 401, before: func() {
			d.eventually("revoked", 5*time.Second, func() bool { return d.env.as(d.tokens["ada"], "GET", sessionsPath).Status == 401 })
		}},
		{name: "sessions, revoked token", do: d.as("ada", "DELETE", sessionsPath, nil), status: 401, want: []string{"endSessions anonymous > refused unauthorized"}},
		again,
		{name: "own session, another's", do: d.as("ada", "DELETE", sessionsPath+"/SES-0123456789abcdef", nil), status: 404,
			want: []string{"endSession ada > refused not-found"}},
		{name: "own session", do: d.as("ada", "DELETE", sessionsPath+"/[ada]", nil), status: 204, want: []string{`session.end ada > ada ok own {"sessions": ["SES"]}`}},
		again, again,
		{name: "own sessions", do: d.as("ada", "DELETE", sessionsPath, nil), status: 204, want: []string{`session.end ada > ada ok own {"sessions": ["SES", "SES"]}`}},
		again,
	}...)
	d.keycloakAdmin("DELETE", "/sessions/"+d.sid(d.tokens["ada"]), nil, nil)
	d.wants(d.env.as(d.tokens["ada"], "GET", sessionsPath), 200, "")
	session := d.tokens["ada"].text("session_id")
	d.eventually("ended in Keycloak", time.Minute, func() bool { return d.entries(`details->'sessions' ? $1`, session) != "" })
	d.exactly("ended in Keycloak", `details->'sessions' ? $1`, session, `session.end system:sessions > ada ok keycloak {"sessions": ["SES"]}`)
}

func (d *deeds) invitations() {
	d.all([]deed{
		{name: "register", do: d.registers("root"), status: 201, want: d.registered("root")},
		{name: "verify", do: d.verifies("root"), status: 200, want: []string{d.verified("root")}},
	}...)
	for range 2 { // the second time changes nothing
		if said, err := d.operate("grant-admin", d.mail("root")); err != nil {
			d.Fatalf("%v %s", err, said)
		}
	}
	if _, err := d.operate("grant-admin", d.mail("nobody")); err == nil {
		d.Error("nobody is an administrator")
	}
	d.exactly("grant-admin", `actor = $1 and (ip_address, user_agent, request_id) = ('', '', '')`, "cli:tester",
		`user.grant_admin cli:tester > root ok {"role": {"after": "admin", "before": "user"}}`)
	const role = `"role": "operator", "source": "internal"`
	invite := body{"email": d.mail("ina"), "username": "ina-" + d.domain[:8], "role": "operator", "network_id": "NET-1", "station_id": "STA-1"}
	d.all([]deed{
		{name: "sign-in", do: d.logsIn("root", password), status: 200, signIn: "root", want: []string{in("root")}},
		{name: "create", do: d.as("root", "POST", "/api/v1/users", invite), status: 201, want: []string{
			`registration.begin root > reg:ina ok @NET-1 {` + role + `}`,
			`user.create root > ina ok @NET-1 {` + role + `, "network_id": "NET-1", "station_id": "STA-1", "registration_id": "reg:ina"}`,
			"registration.mail root > reg:ina ok @NET-1"}},
		{name: "create again", do: d.as("root", "POST", "/api/v1/users", invite), status: 201, want: []string{
			`user.invite root > ina ok @NET-1 {"role": "operator", "network_id": "NET-1", "station_id": "STA-1", "registration_id": "reg:ina"}`,
			"registration.mail root > reg:ina ok @NET-1"}},
		{name: "create, known to Keycloak", before: func() {
			d.keycloakAdmin("POST", "/users", body{"username": d.mail("kay"), "email": d.mail("kay")}, nil)
		}, do: d.as("root", "POST", "/api/v1/users", body{"email": d.mail("kay"), "network_id": "NET-1"}), status: 409, want: []string{
			`registration.begin root > REG ok @NET-1 {"role": "user", "source": "internal"}`,
			`registration.cancelled root > REG ok user-exists @NET-1 {"user_id": "USR"}`, "createUser root > refused user-exists"}},
		{name: "create, no token", do: posts("/api/v1/users", invite), status: 401, want: []string{"createUser anonymous > refused unauthorized"}},
		{name: "change, not confirmed", do: d.as("root", "PATCH", "{ina}", body{"first_name": "Ina"}), status: 403, want: []string{
			"patchUser root > ina refused account-not-verified"}},
		{name: "the invited confirms", do: d.verifies("ina"), status: 200, want: []string{
			`registration.verified anonymous > reg:ina ok @NET-1 {"user_id": "ina"}`}},
		{name: "create, known", do: d.as("root", "POST", "/api/v1/users", invite), status: 409, want: []string{"createUser root > refused user-exists"}},
		{name: "the invited signs in", do: d.logsIn("ina", password), status: 200, signIn: "ina", want: []string{in("ina", "@NET-1")}},
		{name: "create, and delete before it is confirmed", do: d.as("root", "POST", "/api/v1/users", body{"email": d.mail("eve")}), status: 201, want: []string{
			`registration.begin root > reg:eve ok {"role": "user", "source": "internal"}`,
			`user.create root > eve ok {"role": "user", "source": "internal", "network_id": "", "station_id": "", "registration_id": "reg:eve"}`,
			"registration.mail root > reg:eve ok"}},
		{name: "delete, not confirmed", do: d.as("root", "DELETE", "{eve}", nil), status: 204, want: []string{
			`user.remove root > eve ok {"registration_id": "reg:eve"}`, `registration.cancelled root > reg:eve ok deleted {"user_id": "eve"}`}},
	}...)
}

func (d *deeds) changes() {
	d.all([]deed{
		{name: "patch", do: d.as("root", "PATCH", "{ada}", body{"role": "partner", "network_id": "NET-1", "first_name": "Ada", "phone": "+4930123456"}), status: 200, want: []string{
			`user.update root > ada ok @NET-1 {"role": {"after": "partner", "before": "user"}, "phone": "changed", "first_name": "changed", "network_id": {"after": "NET-1", "before": ""}}`}},
		{name: "patch, the same", do: d.as("root", "PATCH", "{ada}", body{"role": "partner"}), status: 200},
		{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada", "@NET-1")}},
		{name: "patch, own role", do: d.as("ada", "PATCH", "{ada}", body{"role": "admin"}), status: 403, want: []string{"patchUser ada > ada refused forbidden @NET-1"}},
		{name: "patch, too high", do: d.as("ada", "PATCH", "{ina}", body{"role": "partner"}), status: 403, want: []string{"patchUser ada > ina refused forbidden @NET-1"}},
		{name: "patch, unseen", do: d.as("ada", "PATCH", "{root}", body{"first_name": "R."}), status: 404, want: []string{"patchUser ada > root refused user-not-found @NET-1"}},
		{name: "read, unseen: a GET", do: d.as("ada", "GET", "{root}", nil), status: 404, want: []string{"user ada > root refused user-not-found @NET-1"}},
		{name: "read, unknown: a GET", do: d.as("ada", "GET", "/api/v1/users/USR-0123456789abcdef", nil), status: 404,
			want: []string{"user ada > USR refused user-not-found @NET-1"}},
		{name: "read, seen", do: d.as("ada", "GET", "{ina}", nil), status: 200},
		{name: "create, too high", do: d.as("ada", "POST", "/api/v1/users", body{"email": d.mail("zoe"), "role": "admin"}), status: 403,
			want: []string{"createUser ada > refused forbidden @NET-1"}},
		{name: "audit log, not allowed: a GET", do: d.as("ina", "GET", auditPath, nil), status: 403, want: []string{"auditEntries ina > refused forbidden @NET-1"}},
		{name: "audit log", do: d.as("ada", "GET", auditPath, nil), status: 200},
		{name: "users, limited: a GET", do: d.limited(onUsers, d.as("root", "GET", "/api/v1/users", nil)), status: 429,
			want: []string{"users anonymous > refused too-many-requests"}},
	}...)
}

func (d *deeds) managedSessions() {
	const end = `session.end root > ada ok managed @NET-1 {"sessions": ["SES"]}`
	d.all([]deed{
		{name: "managed session", do: d.as("root", "DELETE", "{ada}/sessions/[ada]", nil), status: 204, want: []string{end}},
		{name: "managed session, ended", do: d.as("root", "DELETE", "{ada}/sessions/[ada]", nil), status: 404, want: []string{"endUserSession root > refused not-found"}},
		{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada", "@NET-1")}},
		{name: "managed sessions", do: d.as("root", "DELETE", "{ada}/sessions", nil), status: 204, want: []string{end}},
		{name: "managed sessions, none", do: d.as("root", "DELETE", "{ada}/sessions", nil), status: 204, want: []string{"session.end root > ada ok managed @NET-1"}},
		{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada", "@NET-1")}},
		{name: "patch, moved", do: d.as("root", "PATCH", "{ada}", body{"network_id": "NET-2", "station_id": "STA-2"}), status: 200, want: []string{
			`user.update root > ada ok @NET-1 {"network_id": {"after": "NET-2", "before": "NET-1"}, "station_id": {"after": "STA-2", "before": ""}}`}},
	}...)
}

func (d *deeds) syncs() {
	d.all([]deed{
		{name: "sign-in", do: d.logsIn("kim", password), status: 200, signIn: "kim", want: []string{in("kim")}},
		{name: "sync, not allowed", do: d.as("kim", "POST", "/api/v1/sync", body{}), status: 403, want: []string{"startSync kim > refused forbidden"}},
	}...)
	d.wants(d.do(d.as("root", "POST", "/api/v1/sync", body{"dry_run": true})()), 202, "")
	ended := func() bool { return d.value(`select count(*)::text from audit_log where action = 'sync.end'`) == "2" }
	d.eventually("the daily sync and that", time.Minute, ended)
	d.exactly("sync", `action like $1`, "sync.%", `sync.begin system:sync > SYN ok {"dry_run": false}`, `sync.end system:sync > SYN ok done {"found": 0, "repaired": 0}`,
		`sync.begin root > SYN ok {"dry_run": true}`, `sync.end root > SYN ok done {"found": 1, "repaired": 0}`) // kay, whom only Keycloak has
}

func (d *deeds) deletions() {
	d.all([]deed{
		{name: "delete", do: d.as("root", "DELETE", "{ada}", nil), status: 204, want: []string{
			`session.end root > ada ok user.delete @NET-2 {"sessions": ["SES"]}`, `user.delete root > ada ok @NET-2 {"is_active": {"after": false, "before": true}}`}},
		{name: "delete again", do: d.as("root", "DELETE", "{ada}", nil), status: 204},
		{name: "restore", do: d.as("root", "POST", "{ada}/restore", nil), status: 200, want: []string{
			"session.end root > ada ok user.restore @NET-2", `user.restore root > ada ok @NET-2 {"is_active": {"after": true, "before": false}}`}},
		{name: "delete, oneself", do: d.as("root", "DELETE", "{root}", nil), status: 403, want: []string{"deleteUser root > root refused forbidden"}},
		{name: "patch", do: d.as("root", "PATCH", "{ada}", body{"role": "admin"}), status: 200, want: []string{
			`user.update root > ada ok @NET-2 {"role": {"after": "admin", "before": "partner"}}`}},
		{name: "sign-in", do: d.logsIn("ada", password), status: 200, signIn: "ada", want: []string{in("ada", "@NET-2")}},
		{name: "delete, an administrator", before: func() {
			d.eventually("what ada is now is known", time.Second, func() bool { return d.passes(d.tokens["ada"]) })
		}, do: d.as("ada", "DELETE", "{root}", nil), status: 204, want: []string{
			`session.end ada > root ok user.delete {"sessions": ["SES"]}`, `user.delete ada > root ok {"is_active": {"after": false, "before": true}}`}},
		{name: "restore an administrator", do: d.as("ada", "POST", "{root}/restore", nil), status: 200, want: []string{
			"session.end ada > root ok user.restore", `user.restore ada > root ok {"is_active": {"after": true, "before": false}}`}},
		{name: "delete, who is not there", do: d.as("ada", "DELETE", "/api/v1/users/USR-0123456789abcdef", nil), status: 404,
			want: []string{"deleteUser ada > USR refused user-not-found @NET-2"}},
	}...)
}
