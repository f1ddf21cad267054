package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/Nerzal/gocloak/v13"
	"golang.org/x/oauth2"
)

// proxyAnswer is what a reverse proxy in front of Keycloak answers itself.
type proxyAnswer struct {
	name   string
	status int
	header map[string]string
	body   string
}

func (p proxyAnswer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header()["Content-Type"] = nil // or net/http guesses one
	for name, value := range p.header {
		w.Header().Set(name, value)
	}
	w.WriteHeader(p.status)
	io.WriteString(w, p.body)
}

var (
	asText  = map[string]string{"Content-Type": "text/plain; charset=utf-8"}
	asHTML  = map[string]string{"Content-Type": "text/html"}
	asJSON  = map[string]string{"Content-Type": "application/json"}
	toLogin = map[string]string{"Content-Type": "text/html", "Location": "/login"}
)

// proxyAnswers are what proxies, gateways and firewalls say.
var proxyAnswers = []proxyAnswer{
	{"404 as text", 404, asText, "404 page not found\n"},
	{"404 as JSON", 404, asJSON, `{"status":404,"error":"Not Found","path":"/"}`},
	{"a page", 200, asHTML, "<h1>We are moving</h1>"},

	{"404 as a page", 404, asHTML, "<h1>404 Not Found</h1>"},
	{"404 without a body", 404, nil, ""},
	{"404 as other JSON", 404, asJSON, `{"message":"no Route matched with those values"}`},
	{"404 of another realm", 404, asJSON, `{"error":"Realm not found."}`},
	{"400 as a page", 400, asHTML, "<h1>400 Bad Request</h1>"},
	{"401 as JSON", 401, asJSON, `{"message":"Unauthorized"}`},
	{"403 as a page", 403, asHTML, "<h1>403 Forbidden</h1>"},
	{"403 of Keycloak, without the role", 403, asJSON, `{"error":"HTTP 403 Forbidden"}`},
	{"409 as JSON", 409, asJSON, `{"message":"Conflict"}`},
	{"429 as text", 429, asText, "slow down"},
	{"429 without a body", 429, nil, ""},
	{"500 as a page", 500, asHTML, "<h1>Internal Server Error</h1>"},
	{"502 as JSON", 502, asJSON, `[]`},
	{"503 without a body", 503, nil, ""},
	{"200 without a body", 200, nil, ""},
	{"JSON", 200, asJSON, `{"status":"ok"}`},
	{"a redirect to a page", 307, toLogin, ""},
}

// TestProxyAnswers: whatever a proxy says in Keycloak's place, to whichever call, is an outage.
func TestProxyAnswers(t *testing.T) {
	t.Parallel()
	proxy, err := newKeycloakProxy(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.close()
	k := newKeycloak(config{KeycloakURL: proxy.url(), KeycloakRealm: "any", AuthClientID: "auth-client", site: site}, newMetrics())
	only := func(_ any, err error) error { return err }
	user := keycloakUser{gocloak.User{ID: gocloak.StringP("7bce-45c5")}}
	calls := map[string]func(context.Context) error{
		"create": func(ctx context.Context) error { return only(k.createUser(ctx, registration{}, "token")) },
		"get":    func(ctx context.Context) error { return only(k.user(ctx, "7bce-45c5")) },
		"find":   func(ctx context.Context) error { return only(k.userByLogin(ctx, "ada@example.test")) },
		"update": func(ctx context.Context) error { return k.update(ctx, "push_user", user) },
		"delete": func(ctx context.Context) error { return k.deleteUser(ctx, "7bce-45c5") },
		"mail": func(ctx context.Context) error {
			return k.sendMail(ctx, "7bce-45c5", "en", time.Hour, verifyEmail)
		},
		"sessions": func(ctx context.Context) error { return only(k.sessions(ctx, "7bce-45c5")) },
		"end":      func(ctx context.Context) error { return k.endSession(ctx, "7bce-45c5") },
		"log out":  func(ctx context.Context) error { return k.logOut(ctx, "7bce-45c5") },
		"list":     func(ctx context.Context) error { return only(k.usersPage(ctx, 0, 10)) },
		"count":    func(ctx context.Context) error { return only(k.countUsers(ctx)) },
		"sign in":  func(ctx context.Context) error { return only(k.signIn(ctx, "ada", password, "")) },
		"refresh":  func(ctx context.Context) error { return only(k.refresh(ctx, "token")) },
		"redeem":   func(ctx context.Context) error { return only(k.redeem(ctx, "code", "verifier")) },
		"ping":     k.ping,
	}
	for _, answer := range proxyAnswers {
		proxy.instead.Store(&answer)
		for name, call := range calls {
			k.service.Store(&oauth2.Token{AccessToken: "token", Expiry: time.Now().Add(time.Hour)})
			if err := call(t.Context()); !errors.Is(err, errUnavailable) || errors.Is(err, errNotFound) || errors.Is(err, errConflict) {
				t.Errorf("%s: to %s: %v", answer.name, name, err)
			}
		}
	}
}

// TestOnlyKeycloakSpeaks has a proxy answer in Keycloak's place for a while: nobody is missing, no registration is
// cancelled, no session has ended, and afterwards all goes on.
func TestOnlyKeycloakSpeaks(t *testing.T) {
	t.Parallel() // it waits for the queue most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "50ms"})
	account, admin := newEmail(), w.signsIn(w.administrator())
	session := w.session(account)
	for _, answer := range proxyAnswers[:3] {
		w.Run(answer.name, func() { w.proxyAnswers(answer, account, &session, admin) })
	}
}

func (w *env) proxyAnswers(answer proxyAnswer, account string, session *link, admin answer) {
	w.Helper()
	waiting, over := newEmail(), w.signsIn(account)
	w.register(waiting)
	var tasks []string
	asking := authorized(admin.text("access_token"), "POST", "/api/v1/sync")
	asking.json = body{}
	w.outage("degraded", account, session, func() {
		w.kc.instead.Store(&answer)
		w.wants(w.do(loggingOut(over.text("refresh_token"))), 204, "")
		live := w.do(authorized(session.Access, "GET", sessionsPath))
		w.wants(live, 200, "")
		run := w.do(asking)
		w.wants(run, 202, "")
		tasks = []string{w.registrationOf(waiting), over.text("session_id"), kcTask(w.keycloakID(account)), "job:events"}
		w.exec(`insert into tasks (task_id, due_at) select id, now() from unnest($1::text[]) id
			on conflict (task_id) do update set due_at = now() where tasks.locked_by is null`, tasks)
		w.eventually("all was tried", time.Minute, func() bool {
			return w.value(`select concat_ws(' ', count(*), (select status from sync_runs where sync_id = $2))
				from tasks where task_id = any($1) and attempts > 0`, tasks, run.text("sync_id")) == "4 failed"
		})
		if got := w.value(`select string_agg(distinct last_error, ' ') from tasks where task_id = any($1)`, tasks); got != "unavailable" {
			w.Errorf("the tasks have failed with %q", got)
		}
	}, func() {
		w.kc.instead.Store(nil)
		w.exec(`update tasks set due_at = now() where task_id = any($1)`, tasks)
	})
	if got := w.value(`select concat_ws(' ', status, keycloak_id is not null) from user_registrations where email = $1`, waiting); got != "pending t" {
		w.Errorf("the registration that waits is %q", got)
	}
	if got := w.value(`select count(*)::text from users where deleted_at is not null`); got != "0" {
		w.Errorf("%s users count as missing", got)
	}
	w.wants(w.do(verifying(w.readMail(waiting, 1))), 200, "")
}
