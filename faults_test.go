package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestFaults loses every call to Keycloak, or its answer, in every operation. The
// answer is one that the contract allows, nothing stays half done once the fault
// is over, and the person who tries again succeeds.
func TestFaults(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "RESEND_LIMIT": "100", "JOB_INTERVAL": "0"})
	w.restarted(map[string]string{"JOB_INTERVAL": "200ms"}, func() {
		// Tokens that hardly live make the service account fetch one for every call.
		w.keycloakAdmin("PUT", "", map[string]any{"accessTokenLifespan": 20}, nil)
		w.noEvents() // nor for itself, and the operation with it
	})

	// Afterwards the person, or the next one with that address, gets in.
	getsIn := func(w *env, email string) {
		w.wants(w.do(verifying(w.lastMail(email))), 200, "")
		if password != "" {
			w.wants(w.do(signingIn(email, password)), 200, "")
		}
	}
	startsAnew := func(w *env, email string) {
		w.wants(w.do(registering(email)), 201, "")
		w.settle()
		getsIn(w, email)
	}
	session := func(w *env, email string) link { return w.session(email) }
	sessions := func(live string) func(w *env, email string) { // and the same in Keycloak: settle
		return func(w *env, email string) {
			if got := w.value(`select count(*)::text from sessions join users using (user_id) where email = $1 and ended_at is null`, email); got != live {
				w.Errorf("%s sessions live, not %s", got, live)
			}
		}
	}
	admin := w.administrator()
	manager := func(w *env, _ string) link {
		w.exec(`delete from rate_limits where key = $1`, loginLimit(admin).Key)
		return link{Access: w.signsIn(admin).text("access_token")}
	}
	joined := func(w *env, email string) link {
		l := manager(w, "")
		w.joined(answer{JSON: body{"access_token": l.Access}}, email)
		l.Code = w.userOf(email)
		return l
	}
	managed := func(l link, method, path string, in any) call {
		return managing(answer{JSON: body{"access_token": l.Access}}, method, path, in)
	}
	for _, op := range []struct {
		name    string
		calls   string // to Keycloak
		before  func(w *env, email string) link
		try     func(email string, l link) call
		success int
		slug    string // of success, if that is a refusal
		after   func(w *env, email string)
	}{
		{name: "register", calls: "service_token create_user enable_user send_mail disable_user",
			try: func(email string, _ link) call { return registering(email) }, success: 201, after: getsIn},
		{name: "register without password", calls: "create_user enable_user send_mail disable_user",
			try: func(email string, _ link) call { return registering(email) }, success: 201, after: getsIn},
		{name: "replace", calls: "service_token get_user delete_user create_user", before: registered,
			try: func(email string, _ link) call { return registering(email) }, success: 201, after: getsIn},
		{name: "register after a creation without answer", calls: "find_user delete_user create_user",
			before: func(w *env, email string) link {
				w.kc.on("create_user", applied)
				defer w.kc.on("create_user", 0)
				w.wants(w.do(registering(email)), 503, "unavailable")
				return link{}
			},
			try: func(email string, _ link) call { return registering(email) }, success: 201, after: getsIn},
		{name: "verify", calls: "service_token get_user activate_user", before: registered,
			try: func(_ string, l link) call { return verifying(l) }, success: 200, after: getsIn},
		{name: "verify by code", calls: "service_token get_user activate_user", before: registered,
			try: func(email string, l link) call { return typing(email, l.Code) }, success: 200, after: getsIn},
		{name: "resend", calls: "service_token get_user set_code send_mail disable_user", before: registered,
			try: func(email string, _ link) call { return resending(email) }, success: 200,
			after: func(w *env, email string) {
				w.wants(w.do(typing(email, w.lastMail(email).Code)), 200, "")
			}},
		{name: "cancel", calls: "service_token get_user delete_user", before: registered,
			try: func(_ string, l link) call { return cancelling(l) }, success: 200, after: startsAnew},
		{name: "expire", calls: "service_token get_user delete_user",
			before: func(w *env, email string) link {
				l := registered(w, email)
				w.expire(email)
				return l
			},
			try: func(_ string, l link) call { return verifying(l) }, success: 410, slug: "verification-expired", after: startsAnew},
		{name: "login", calls: "token",
			before: func(w *env, email string) link { w.account(email); return link{} },
			try:    func(email string, _ link) call { return signingIn(email, password) }, success: 200,
			after: func(w *env, email string) {}},
		{name: "refresh", calls: "refresh", before: session,
			try: func(_ string, l link) call { return refreshing(l.Token) }, success: 200, after: sessions("1")},
		{name: "logout", calls: "service_token end_session", before: session,
			try: func(_ string, l link) call { return loggingOut(l.Token) }, success: 204, after: sessions("0")},
		{name: "end of a session", calls: "service_token end_session", before: session,
			try:     func(_ string, l link) call { return authorized(l.Access, "DELETE", sessionsPath+"/"+l.Code) },
			success: 204, after: sessions("0")},
		{name: "end of all sessions", calls: "service_token end_session", before: session,
			try:     func(_ string, l link) call { return authorized(l.Access, "DELETE", sessionsPath) },
			success: 204, after: sessions("0")},
		{name: "create a user", calls: "service_token create_user send_mail",
			before: manager, try: func(email string, l link) call { return managed(l, "POST", "", body{"email": email}) }, success: 201,
			after: func(w *env, email string) {
				w.agree(w.userOf(email))
				w.invitations(email, 1, 2) // nobody can know that the first one was sent
			}},
		{name: "change a user", calls: "service_token get_user assign_user", before: joined,
			try: func(_ string, l link) call {
				return managed(l, "PATCH", "/"+l.Code, body{"role": "partner", "network_id": "N2"})
			}, success: 200,
			after: func(w *env, email string) {
				w.agree(w.userOf(email))
				if claims := unpacked(w.signsIn(email).text("access_token"), 1); fmt.Sprintf("%v %v", claims["roles"], claims["network_id"]) != "[partner] N2" {
					w.Errorf("the token says %v", claims)
				}
			}},
		{name: "delete a user", calls: "service_token end_session get_user assign_user", before: joined,
			try: func(_ string, l link) call { return managed(l, "DELETE", "/"+l.Code, nil) }, success: 204,
			after: func(w *env, email string) {
				w.agree(w.userOf(email))
				sessions("0")(w, email)
				w.wants(w.do(signingIn(email, password)), 403, "account-disabled")
			}},
		{name: "restore a user", calls: "get_user assign_user",
			before: func(w *env, email string) link {
				l := joined(w, email)
				w.wants(w.do(managed(l, "DELETE", "/"+l.Code, nil)), 204, "")
				return l
			},
			try: func(_ string, l link) call { return managed(l, "POST", "/"+l.Code+"/restore", nil) }, success: 200,
			after: func(w *env, email string) {
				w.agree(w.userOf(email))
				w.wants(w.do(signingIn(email, password)), 200, "")
			}},
	} {
		for name := range strings.FieldsSeq(op.calls) {
			for _, f := range []fault{lost, applied} {
				t.Run(fmt.Sprintf("%s/%s %v", op.name, name, f), func(t *testing.T) {
					w := *w
					w.TB = t
					email, l := newEmail(), link{}
					if op.before != nil {
						l = op.before(&w, email)
					}
					w.kc.on("^"+name+" ", f)
					before := w.kc.count(name)
					a := w.do(op.try(email, l))
					w.kc.on("^"+name+" ", 0)
					if w.kc.count(name) == before {
						t.Fatalf("%s is not called", name)
					}
					if a.Status != 503 {
						w.wants(a, op.success, op.slug)
					} else {
						w.wants(a, 503, "unavailable")
						w.wants(w.do(op.try(email, l)), op.success, op.slug)
					}
					w.straysDie()
					w.settle()
					op.after(&w, email)
					w.settle()
				})
			}
		}
	}
}

// TestLeftUndone has faults that nobody comes back to: only the repair loop is left.
func TestLeftUndone(t *testing.T) {
	t.Parallel() // it waits for loops
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "JOB_INTERVAL": "200ms"})
	w.noEvents() // or whom only Keycloak has is taken over
	during := func(call string, f fault, do func()) {
		w.Helper()
		w.kc.on("^"+call+" ", f)
		defer w.kc.on("^"+call+" ", 0)
		do()
	}
	w.Run("verified in Keycloak, the answer lost", func() {
		email := newEmail()
		l := registered(w, email)
		during("activate_user", applied, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.settle()
		w.wants(w.do(signingIn(email, password)), 200, "")
	})
	w.Run("a wrong code before the mail window is closed", func() {
		email := newEmail()
		during("disable_user", lost, func() { w.register(email) })
		w.wants(w.do(typing(email, "x"+w.readMail(email, 1).Code[1:])), 400, "invalid-request")
		w.wants(w.do(typing(email, other(w.readMail(email, 1).Code))), 400, "invalid-code")
		w.settle()
	})
	w.Run("an outage before the mail window is closed", func() {
		email := newEmail()
		during("disable_user", lost, func() { w.register(email) })
		l := w.readMail(email, 1)
		during("get_user", lost, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.settle()
		w.wants(w.do(verifying(l)), 200, "")
	})
	w.Run("a creation without answer, a registration after it, and an outage", func() {
		email := newEmail()
		during("create_user", lost, func() { w.wants(w.do(registering(email)), 503, "unavailable") })
		w.register(email)
		l := w.readMail(email, 1)
		during("find_user", lost, func() { w.wants(w.do(registering(email)), 503, "unavailable") })
		w.wants(w.do(verifying(l)), 200, "") // it was not replaced, and nobody holds it
	})
	w.Run("a sign-out, and nobody to end it in Keycloak", func() {
		l := w.session(newEmail())
		during("end_session", lost, func() { w.wants(w.do(loggingOut(l.Token)), 204, "") })
		w.settle()
	})
	w.Run("mails that were certainly not sent cost nothing", func() {
		email := newEmail()
		registered(w, email)
		during("set_code", lost, func() {
			for range 3 {
				a := w.do(resending(email))
				w.wants(a, 200, "")
				if a.text("verification_email") != "queued" {
					w.Errorf("not queued: %v", a)
				}
			}
		})
		w.settle()
		var hits int
		if err := w.pool.QueryRow(w.Context(), `select hits from rate_limits where key = $1`, mailsADay(email).Key).Scan(&hits); err != nil || hits != 2 {
			w.Errorf("%d mails were counted, not 2 (%v)", hits, err)
		}
	})

	admin := w.signsIn(w.administrator())
	manage := func(method, path string, in any, status int) answer {
		w.Helper()
		a := w.do(managing(admin, method, path, in))
		w.wants(a, status, "")
		return a
	}
	queued := func(email, call string, f fault) (path string) {
		w.Helper()
		during(call, f, func() {
			a := manage("POST", "", body{"email": email, "role": "operator"}, 201)
			if path = "/" + a.text("user_id"); a.text("invitation_email") != "queued" {
				w.Errorf("not queued: %v", a)
			}
		})
		return path
	}
	w.Run("a user created in Keycloak, the answer lost, and changed since", func() {
		email := newEmail()
		path := queued(email, "create_user", applied)
		during("find_user", lost, func() { manage("PATCH", path, body{"role": "partner", "network_id": "N1", "first_name": "Grace"}, 200) })
		w.settle()
		w.agree(path[1:])
		w.invitations(email, 1)
	})
	for _, f := range []struct {
		call  string
		fault fault
	}{{"create_user", lost}, {"create_user", applied}} {
		w.Run("a user deleted before we know that Keycloak has it, "+f.call, func() {
			email := newEmail()
			path := queued(email, f.call, f.fault)
			during("find_user", lost, func() { manage("DELETE", path, nil, 204) })
			w.settle()
			w.agree(path[1:])
			w.invitations(email, 0)
			manage("POST", path+"/restore", nil, 200)
			w.agree(path[1:])
			w.invitations(email, 1)
		})
	}
	w.Run("a user whom Keycloak does not want", func() {
		here := func(email string) string { return w.value(`select count(*)::text from users where email = $1`, email) }
		email, late := newEmail(), newEmail()
		w.keycloakAdmin("POST", "/users", body{"username": "x" + email, "email": email}, nil)
		a := w.do(managing(admin, "POST", "", body{"email": email}))
		w.wants(a, 409, "user-exists")
		if got := w.value(`select string_agg(concat_ws(' ', action, outcome, nullif(reason, '')), ', ' order by at, audit_id) from audit_log where request_id = $1`,
			a.text("request_id")); here(email) != "0" || got != "user.create ok, user.remove ok keycloak, createUser refused user-exists" {
			w.Errorf("%s rows, and on record: %s", here(email), got)
		}
		path := queued(late, "create_user", lost)
		w.keycloakAdmin("POST", "/users", body{"username": "x" + late, "email": late}, nil)
		w.settle()
		if got := w.value(`select concat_ws(' ', actor, reason) from audit_log where target = $1 and action = 'user.remove'`, path[1:]); here(late) != "0" || got != "system:users keycloak" {
			w.Errorf("%s rows, and on record: %s", here(late), got)
		}
		w.wants(w.do(managing(admin, "GET", path, nil)), 404, "user-not-found")
		if n := len(w.mail.To(email)) + len(w.mail.To(late)); n > 0 {
			w.Errorf("%d mails", n)
		}
	})
	w.Run("the lease of a process that has died", func() {
		email := newEmail()
		path := queued(email, "send_mail", lost)
		w.exec(`update users set lease_owner = 'dead', due_at = now() + interval '1 hour' where user_id = $1`, path[1:])
		runs := func() (n int) {
			fmt.Sscan(regexp.MustCompile(`(?m)^job_runs_total\{job="users",outcome="ok"\} (\d+)$`).FindStringSubmatch(string(w.management404("/metrics").Body))[1], &n)
			return n
		}
		before := runs()
		w.eventually("the loop runs", 10*time.Second, func() bool { return runs() > before+2 })
		w.invitations(email, 0) // it may still live
		w.exec(`update users set due_at = now() where user_id = $1`, path[1:])
		w.settle()
		w.agree(path[1:])
		w.invitations(email, 1)
	})
}

// TestOutages takes Keycloak, the mail server and PostgreSQL away.
func TestOutages(t *testing.T) {
	t.Parallel() // it waits for what is away
	w := newEnv(t, nil)
	const patience = 5*time.Second + 200*time.Millisecond // the answer itself has 5 s
	account := newEmail()
	session := w.session(account)
	health := func(status int, word string) {
		w.Helper()
		w.eventually("health is "+word, 15*time.Second, func() bool {
			a := w.get("/health")
			return a.Status == status && a.text("status") == word
		})
	}
	refused := func(calls ...call) {
		w.Helper()
		for _, a := range w.within(patience, calls...) {
			w.wants(a, 503, "unavailable")
		}
	}
	for _, outage := range []struct {
		name       string
		begin, end func()
		health     string
	}{
		{"Keycloak is stopped", func() { w.kc.close() }, func() { w.kc.open() }, "degraded"},
		{"PostgreSQL is stopped", func() { w.pg.close() }, func() { w.pg.open() }, "down"},
	} {
		w.Run(outage.name, func() {
			a, b, c, fresh := newEmail(), newEmail(), newEmail(), newEmail()
			first, second := registered(w, a), registered(w, b)
			registered(w, c)
			leaving := w.signsIn(account)
			outage.begin()
			refused(registering(fresh), verifying(first), typing(b, second.Code), resending(c), signingIn(account, password), refreshing(session.Token))
			if outage.health == "down" {
				refused(loggingOut(leaving.text("refresh_token")), forgetting(account),
					authorized(session.Access, "GET", sessionsPath), authorized(session.Access, "DELETE", sessionsPath))
			} else {
				for _, r := range []call{loggingOut(leaving.text("refresh_token")), authorized(session.Access, "DELETE", sessionsPath+"/"+leaving.text("session_id"))} {
					w.wants(w.do(r), map[string]int{"POST": 204, "DELETE": 404}[r.method], map[string]string{"DELETE": "not-found"}[r.method])
				}
			}
			health(map[string]int{"degraded": 200, "down": 503}[outage.health], outage.health)
			outage.end()
			health(200, "ok")
			w.wants(w.do(registering(fresh)), 201, "")
			w.wants(w.do(verifying(first)), 200, "")
			w.wants(w.do(typing(b, second.Code)), 200, "")
			w.wants(w.do(resending(c)), 429, "resend-too-soon") // and not: limited by the try
			w.wants(w.do(signingIn(account, password)), 200, "")
			w.wants(w.do(loggingOut(leaving.text("refresh_token"))), 204, "")
			session.Token = w.do(refreshing(session.Token)).text("refresh_token")
			w.settle()
		})
	}
	w.Run("Keycloak hangs", func() {
		a, b, fresh := newEmail(), newEmail(), newEmail()
		first, second := registered(w, a), registered(w, b)
		leaving := w.signsIn(account).text("refresh_token")
		calls := []call{registering(fresh), verifying(first), typing(b, second.Code), resending(b), signingIn(account, password), refreshing(session.Token)}
		for len(calls) < 20 {
			calls = append(calls, registering(newEmail()), signingIn(account, password), registering(newEmail()))
		}
		release := w.kc.block()
		refused(calls...)
		w.wants(w.within(patience, loggingOut(leaving))[0], 204, "")
		release()
		w.wants(w.do(refreshing(session.Token)), 200, "")
		w.wants(w.do(registering(fresh)), 201, "")
		w.wants(w.do(verifying(first)), 200, "")
		w.settle()
	})
	w.Run("the mail server is stopped", func() {
		w.mail.Close()
		email := newEmail()
		if a := w.register(email); a.text("verification_email") != "queued" {
			w.Errorf("not queued: %v", a)
		}
		for range 3 { // tries that fail
			tried := w.kc.count("send_mail")
			w.exec(`update user_registrations set due_at = now() where mail_state = 'queued' and lease_owner is null`)
			w.eventually("another try", 10*time.Second, func() bool { return w.kc.count("send_mail") > tried })
			w.eventually("its end", 10*time.Second, func() (over bool) {
				w.pool.QueryRow(w.Context(), `select not exists (select from user_registrations where lease_owner is not null)`).Scan(&over)
				return over
			})
		}
		if err := w.mail.Restart(); err != nil {
			w.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
		defer cancel()
		m, err := w.mail.WaitFor(ctx, email, 1) // by itself
		if err != nil {
			w.Fatal(err)
		}
		var hits int
		if err := w.pool.QueryRow(w.Context(), `select hits from rate_limits where key = $1`, mailsADay(email).Key).Scan(&hits); err != nil || hits != 1 {
			w.Errorf("%d mails were counted, not 1 (%v)", hits, err)
		}
		w.wants(w.do(typing(email, w.readLink(m).Code)), 200, "")
	})
	w.Run("the mail window is left open, and the next mail must wait", func() {
		email := newEmail()
		w.kc.on("^send_mail ", applied)
		w.kc.on("^disable_user ", lost)
		w.register(email)
		w.kc.on("^send_mail ", 0)
		w.kc.on("^disable_user ", 0)
		w.exec(`update user_registrations set due_at = now() where mail_state = 'queued' and lease_owner is null`)
		w.check() // disabled long before the cooldown's end
		w.wants(w.do(typing(email, w.readMail(email, 1).Code)), 200, "")
	})
	w.Run("both are down at the start", func() {
		w.kc.close()
		w.pg.close()
		ended := w.startBlind()
		defer ended()
		health(503, "down")
		w.pg.open()
		health(200, "degraded")
		w.kc.open()
		health(200, "ok")
		w.account(newEmail())
	})
}

// startBlind starts an instance without waiting for its schema, and makes it the
// one that is spoken to, until the returned function ends it.
func (w *env) startBlind() (end func()) {
	w.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	logs, ended := new(buffer), make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return w.vars[name] }, io.Discard, io.MultiWriter(logs, w.logs))
	}()
	url, management := w.url, w.management
	w.url = w.listening(logs)
	return func() {
		w.url, w.management = url, management
		cancel()
		if err := <-ended; err != nil {
			w.Error(err)
		}
	}
}

// listening waits until an instance says where it listens.
func (w *env) listening(logs *buffer) (url string) {
	w.Helper()
	var line struct{ Address, Management string }
	if err := logs.waitFor(30*time.Second, func(text string) bool {
		return json.Unmarshal([]byte(regexp.MustCompile(`(?m)^.*"msg":"listening".*$`).FindString(text)), &line) == nil
	}); err != nil {
		w.Fatalf("the service did not start: %v\n%s", err, logs)
	}
	w.management = line.Management
	return "http://" + line.Address
}
