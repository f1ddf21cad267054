package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// faultedOperation is what somebody does, and the calls to Keycloak that it makes.
type faultedOperation struct {
	name    string
	calls   string // to Keycloak
	before  func(w *env, email string) link
	try     func(email string, l link) call
	success int
	slug    string // of success, if that is a refusal
	after   func(w *env, email string)
}

// TestFaults loses every call to Keycloak, or its answer, in every operation. The
// answer is one that the contract allows, nothing stays half done once the fault
// is over, and the person who tries again succeeds.
func TestFaults(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "RESEND_LIMIT": "100", "JOB_INTERVAL": "0"})
	w.withoutSync() // or the service account asks for a token for it, and the operation need not
	w.restarted(map[string]string{"JOB_INTERVAL": "200ms"}, func() {
		// Tokens that hardly live make the service account fetch one for every call.
		w.keycloakAdmin("PUT", "", map[string]any{"accessTokenLifespan": 20}, nil)
	})
	for _, op := range slices.Concat(registrationOperations(), sessionOperations(), userOperations(w.administrator())) {
		for name := range strings.FieldsSeq(op.calls) {
			for _, f := range []fault{lost, applied} {
				t.Run(fmt.Sprintf("%s/%s %v", op.name, name, f), func(t *testing.T) {
					w := *w
					w.TB = t
					w.fails(op, name, f)
				})
			}
		}
	}
}

// fails tries an operation while a call to Keycloak fails, and again if that was refused.
func (w *env) fails(op faultedOperation, name string, f fault) {
	w.Helper()
	email, l := newEmail(), link{}
	if op.before != nil {
		l = op.before(w, email)
	}
	w.kc.on("^"+name+" ", f)
	before := w.kc.count(name)
	a := w.do(op.try(email, l))
	w.kc.on("^"+name+" ", 0)
	if w.kc.count(name) == before {
		w.Fatalf("%s is not called", name)
	}
	if a.Status != 503 {
		w.wants(a, op.success, op.slug)
	} else {
		w.wants(a, 503, "unavailable")
		w.wants(w.do(op.try(email, l)), op.success, op.slug)
	}
	w.straysDie()
	w.waitUntilIdle()
	op.after(w, email)
	w.waitUntilIdle()
}

func registrationOperations() []faultedOperation {
	const mailing = " send_mail disable_user"
	getsIn := func(w *env, email string) { // the person, or the next one with that address
		w.wants(w.do(verifying(w.lastMail(email))), 200, "")
		w.wants(w.do(signingIn(email, password)), 200, "")
	}
	startsAnew := func(w *env, email string) {
		w.wants(w.do(registering(email)), 201, "")
		w.waitUntilIdle()
		getsIn(w, email)
	}
	unanswered := func(w *env, email string) link {
		w.kc.on("^create_user ", applied)
		defer w.kc.on("^create_user ", 0)
		w.wants(w.do(registering(email)), 503, "unavailable")
		return link{}
	}
	expiring := func(w *env, email string) link {
		l := registered(w, email)
		w.expire(email)
		return l
	}
	byCode := func(email string, l link) call { return typing(email, l.Code) }
	return []faultedOperation{
		{name: "register", calls: "service_token create_user prepare_mail" + mailing, try: register, success: 201, after: getsIn},
		{name: "register again", calls: "service_token get_user prepare_mail" + mailing, before: registered, try: register, success: 201, after: getsIn},
		{name: "register after a creation without answer", calls: "create_user prepare_mail" + mailing, before: unanswered,
			try: register, success: 201, after: getsIn},
		{name: "verify", calls: "service_token get_user activate_user", before: registered, try: verify, success: 200, after: getsIn},
		{name: "verify by code", calls: "service_token get_user activate_user", before: registered, try: byCode, success: 200, after: getsIn},
		{name: "resend", calls: "service_token get_user prepare_mail" + mailing, before: resendable, try: resend, success: 200,
			after: func(w *env, email string) { w.wants(w.do(typing(email, w.lastMail(email).Code)), 200, "") }},
		{name: "cancel", calls: "service_token get_user delete_user", before: registered, try: cancel, success: 200, after: startsAnew},
		{name: "expire", calls: "service_token get_user delete_user", before: expiring, try: verify,
			success: 410, slug: "verification-expired", after: startsAnew},
	}
}

func sessionOperations() []faultedOperation {
	account := func(w *env, email string) link { w.account(email); return link{} }
	session := func(w *env, email string) link { return w.session(email) }
	live := func(n string) func(w *env, email string) { // and the same in Keycloak: waitUntilIdle compares
		return func(w *env, email string) {
			if got := w.value(`select count(*)::text from sessions join users using (user_id) where email = $1 and ended_at is null`, email); got != n {
				w.Errorf("%s sessions live, not %s", got, n)
			}
		}
	}
	return []faultedOperation{
		{name: "login", calls: "token", before: account, success: 200,
			try:   func(email string, _ link) call { return signingIn(email, password) },
			after: func(*env, string) {}},
		{name: "refresh", calls: "refresh", before: session, success: 200, after: live("1"),
			try: func(_ string, l link) call { return refreshing(l.Token) }},
		{name: "logout", calls: "service_token end_session", before: session, success: 204, after: live("0"),
			try: func(_ string, l link) call { return loggingOut(l.Token) }},
		{name: "end of a session", calls: "service_token end_session", before: session, success: 204, after: live("0"),
			try: func(_ string, l link) call { return authorized(l.Access, "DELETE", sessionsPath+"/"+l.Code) }},
		{name: "end of all sessions", calls: "service_token get_user user_sessions end_sessions", before: session, success: 204, after: live("0"),
			try: func(_ string, l link) call { return authorized(l.Access, "DELETE", sessionsPath) }},
	}
}

func userOperations(admin string) []faultedOperation {
	const mailing = " send_mail disable_user"
	manager := func(w *env, _ string) link {
		return link{Access: w.signsIn(admin).text("access_token")}
	}
	stranger := func(w *env, email string) link { registered(w, email); return manager(w, email) }
	joined := func(w *env, email string) link {
		w.joined(answer{JSON: body{"access_token": manager(w, email).Access}}, email)
		l := manager(w, email) // whose token lives long enough
		l.Code = w.userOf(email)
		return l
	}
	invite := manages("POST", "", body{"role": "operator", "network_id": "N1"})
	remove, restore := manages("DELETE", "", nil), manages("POST", "/restore", nil)
	removed := func(w *env, email string) link {
		l := joined(w, email)
		w.wants(w.do(remove(email, l)), 204, "")
		return l
	}
	says := func(claims string) func(w *env, email string) { // of the next token
		return func(w *env, email string) {
			w.agree(w.userOf(email))
			c := unpacked(w.signsIn(email).text("access_token"), 1)
			if got := fmt.Sprintf("%v %v", c["roles"], c["network_id"]); got != claims {
				w.Errorf("the token says %s", got)
			}
		}
	}
	invited := func(w *env, email string) {
		w.agree(w.userOf(email))
		w.invitations(email, 1, 2, 3) // nobody can know whether the first one was sent
		w.confirms(w.lastMail(email))
		says("[operator] N1")(w, email)
	}
	renamed := func(w *env, email string) {
		w.agree(w.userOf(email))
		if got := w.value(`select first_name from users where email = $1`, email); got != "Grace" {
			w.Errorf("the name is %s", got)
		}
	}
	gone := func(w *env, email string) {
		w.agree(w.userOf(email))
		w.wants(w.do(signingIn(email, password)), 403, "account-disabled")
	}
	return []faultedOperation{
		{name: "invite", calls: "service_token create_user prepare_mail" + mailing, before: manager, try: invite, success: 201, after: invited},
		{name: "invite after a registration", calls: "service_token get_user prepare_mail" + mailing, before: stranger, try: invite, success: 201, after: invited},
		{name: "change role and scope", calls: "service_token get_user push_user", before: joined,
			try: manages("PATCH", "", body{"role": "partner", "network_id": "N2"}), success: 200, after: says("[partner] N2")},
		{name: "change names", calls: "service_token get_user push_user", before: joined,
			try: manages("PATCH", "", body{"first_name": "Grace"}), success: 200, after: renamed},
		{name: "delete", calls: "service_token get_user push_user user_sessions end_sessions", before: joined, try: remove, success: 204, after: gone},
		{name: "restore", calls: "service_token get_user user_sessions push_user", before: removed, try: restore, success: 200, after: says("[user] X")},
	}
}

// during does something while a call to Keycloak fails.
func (w *env) during(call string, f fault, do func()) {
	w.Helper()
	w.kc.on("^"+call+" ", f)
	defer w.kc.on("^"+call+" ", 0)
	do()
}

// mailsCounted is how many mails an address has got out of its day's.
func (w *env) mailsCounted(email string) string {
	w.Helper()
	return w.value(`select sum(hits)::text from rate_limits where key = any($1)`,
		[]string{mailsADay.of(mailbox(email)).Key, invitesADay.of(mailbox(email)).Key})
}

// TestLeftUndone has faults that nobody comes back to: only the queue is left.
func TestLeftUndone(t *testing.T) {
	t.Parallel() // it waits for workers
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "JOB_INTERVAL": "200ms"})
	w.withoutSync() // or whom only Keycloak has is imported
	w.leftConfirmations()
	w.leftRegistrations()
	w.leftInvitations()
}

func (w *env) leftConfirmations() {
	w.Run("verified in Keycloak, the answer lost", func() {
		email := newEmail()
		l := registered(w, email)
		w.during("activate_user", applied, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.waitUntilIdle()
		w.wants(w.do(signingIn(email, password)), 200, "")
	})
	w.Run("verified in Keycloak, the answer lost, and sent again with another password", func() {
		email := newEmail()
		l := registered(w, email)
		w.during("activate_user", applied, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.wants(w.post(verifyPath, body{"token": l.Token, "password": "not " + password, "first_name": "Mallory"}), 200, "")
		w.wants(w.do(signingIn(email, "not "+password)), 401, "invalid-credentials")
		w.wants(w.do(signingIn(email, password)), 200, "")
	})
	w.Run("a wrong code before the mail window is closed", func() {
		email := newEmail()
		w.during("disable_user", lost, func() { w.register(email) })
		w.wants(w.do(typing(email, other(w.readMail(email, 1).Code))), 400, "invalid-code")
		w.waitUntilIdle()
	})
	w.Run("an outage before the mail window is closed", func() {
		email := newEmail()
		w.during("disable_user", lost, func() { w.register(email) })
		l := w.readMail(email, 1)
		w.during("get_user", lost, func() { w.wants(w.do(verifying(l)), 503, "unavailable") })
		w.waitUntilIdle()
		w.wants(w.do(verifying(l)), 200, "")
	})
	w.Run("a sign-out, and nobody to end it in Keycloak", func() {
		l := w.session(newEmail())
		w.during("end_session", lost, func() { w.wants(w.do(loggingOut(l.Token)), 204, "") })
		w.waitUntilIdle()
	})
}

func (w *env) leftRegistrations() {
	for _, f := range []fault{lost, applied} {
		w.Run("a creation without answer, "+f.String(), func() {
			email := newEmail()
			w.during("create_user", f, func() { w.wants(w.do(registering(email)), 503, "unavailable") })
			w.waitUntilIdle() // nothing of it is left
			w.register(email)
			l := w.readMail(email, 1)
			w.during("get_user", lost, func() { w.wants(w.do(registering(email)), 503, "unavailable") })
			w.wants(w.do(verifying(l)), 200, "")
		})
	}
	w.Run("mails that were certainly not sent cost nothing", func() {
		email := newEmail()
		id := resendable(w, email).Code
		w.during("prepare_mail", lost, func() {
			for range 3 {
				a := w.do(resending(id))
				w.wants(a, 200, "")
				if a.text("verification_email") != "queued" {
					w.Errorf("not queued: %v", a)
				}
			}
		})
		w.waitUntilIdle()
		if n := w.mailsCounted(email); n != "2" {
			w.Errorf("%s mails were counted, not 2", n)
		}
	})
	w.Run("the lock of a process that has died", func() {
		email := newEmail()
		w.during("send_mail", lost, func() { w.register(email) })
		id := w.registrationOf(email)
		w.exec(`update tasks set locked_by = 'dead', locked_until = now() + interval '1 hour', due_at = now() where task_id = $1`, id)
		w.exec(`insert into tasks (task_id, due_at) values ('token:probe', now())`)
		w.eventually("a worker does what is due", time.Minute, func() bool {
			return w.value(`select count(*)::text from tasks where task_id = 'token:probe'`) == "0"
		})
		if n := len(w.mail.To(email)); n != 0 { // the other may still live
			w.Errorf("%d mails", n)
		}
		w.exec(`update tasks set locked_until = now() where task_id = $1`, id)
		w.waitUntilIdle()
		w.wants(w.do(verifying(w.readMail(email, 1))), 200, "")
	})
}

func (w *env) leftInvitations() {
	admin := w.signsIn(w.administrator())
	rows := func(email string) string {
		return w.value(`select concat_ws(' ', (select count(*) from users where email = $1), (select count(*) from user_registrations where email = $1))`, email)
	}
	for _, f := range []fault{lost, applied} {
		w.Run("an invitation while Keycloak is away, "+f.String(), func() {
			email := newEmail()
			w.during("create_user", f, func() { w.wants(w.do(managing(admin, "POST", "", body{"email": email})), 503, "unavailable") })
			w.waitUntilIdle()
			if got := rows(email); got != "0 0" {
				w.Errorf("users and registrations: %s", got)
			}
			w.invited(admin, email)
		})
	}
	w.Run("an invitation that is deleted, and stays in Keycloak for a while", func() {
		email := newEmail()
		id := w.invited(admin, email)
		l := w.lastMail(email)
		w.during("delete_user", lost, func() { w.wants(w.do(managing(admin, "DELETE", "/"+id, nil)), 204, "") })
		w.wants(w.do(verifying(l)), 410, "verification-cancelled")
		w.wants(w.do(managing(admin, "GET", "/"+id, nil)), 404, "user-not-found")
		w.waitUntilIdle()
		w.invited(admin, email) // the address is free
	})
	w.Run("an account that only Keycloak has", func() {
		email := newEmail()
		w.keycloakAdmin("POST", "/users", body{"username": "x" + email, "email": email}, nil)
		a := w.do(managing(admin, "POST", "", body{"email": email}))
		w.wants(a, 409, "user-exists")
		if got := w.value(`select string_agg(concat_ws(' ', action, outcome, nullif(reason, '')), ', ' order by at, action) from audit_log where request_id = $1`,
			a.text("request_id")); rows(email) != "0 0" || got != "registration.begin ok, registration.cancelled ok user-exists, createUser refused user-exists" {
			w.Errorf("%s rows, and audited: %s", rows(email), got)
		}
		if n := len(w.mail.To(email)); n > 0 {
			w.Errorf("%d mails", n)
		}
	})
}

// TestMailRefused: an address that the mail server refuses for good is given up, and holds up
// nobody. While the server refuses everybody, nothing is given up.
func TestMailRefused(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "50ms"})
	email := newEmail()
	w.mail.Refuse(email)
	a := w.register(email)
	id := a.text("registration_id")
	shows := func(state mailState) bool {
		return w.get("/api/v1/registrations/"+id).text("verification_email") == string(state)
	}
	if a.text("verification_email") != "queued" || !shows(mailQueued) {
		t.Errorf("not queued: %v", a)
	}
	tries := func() {
		t.Helper()
		tried := w.kc.count("send_mail")
		w.due(id)
		w.eventually("another try", time.Minute, func() bool {
			return w.kc.count("send_mail") > tried && w.value(`select (locked_by is null)::text from tasks where task_id = $1`, id) == "true"
		})
	}
	tries()
	if !shows(mailQueued) || w.mailsCounted(email) != "0" {
		t.Errorf("refused once, and %s mails are counted", w.mailsCounted(email))
	}
	w.exec(`update user_registrations set mail_refused_at = mail_refused_at - $2::interval where registration_id = $1`, id, refusalTime) // stands in for waiting
	tries()
	if !shows(mailQueued) {
		t.Error("given up, although the server has sent no other mail since")
	}
	if a := w.within(5*time.Second, registering(newEmail()))[0]; a.text("verification_email") != "sent" {
		t.Errorf("another's mail waits: %v", a)
	}
	tries()
	if !shows(mailFailed) {
		t.Error("not given up")
	}
	if got := w.value(`select concat_ws(' ', outcome, reason) from audit_log where target = $1 and action = 'registration.mail'`, id); got != "failed refused" {
		t.Errorf("audited: %s", got)
	}
	if got := w.value(`select (due_at = expires_at)::text from tasks join user_registrations on task_id = registration_id where task_id = $1`, id); got != "true" {
		t.Error("it is tried again before it expires")
	}
	w.mail.Accept(email)
	w.wants(w.do(resending(id)), 200, "")
	w.wants(w.do(verifying(w.readMail(email, 1))), 200, "")
}

// outageTime is how long a request may take while a store is away.
const outageTime = 2 * keycloakTimeout // the answer itself has half of it; the rest is for a busy machine

// TestOutages takes Keycloak, the mail server and PostgreSQL away.
func TestOutages(t *testing.T) {
	t.Parallel() // it waits for what is away
	w := newEnv(t, nil)
	account := newEmail()
	session := w.session(account)
	w.Run("Keycloak is stopped", func() {
		w.outage("degraded", account, &session, func() { w.kc.close() }, func() { w.kc.open() })
	})
	w.Run("PostgreSQL is stopped", func() {
		w.outage("down", account, &session, func() { w.pg.close() }, func() { w.pg.open() })
	})
	w.Run("Keycloak hangs", func() { w.keycloakHangs(account, session) })
	w.Run("PostgreSQL hangs", func() {
		end := w.pg.swallow()
		w.healthy(503, "down")
		w.goesOn(session)
		end()
		if err := errors.Join(w.pg.close(), w.pg.open()); err != nil { // what hangs is over
			w.Fatal(err)
		}
		w.healthy(200, "ok")
	})
	w.Run("the mail server is stopped", func() { w.mailServerStopped() })
	w.Run("the mail window is left open, and the next mail must wait", func() {
		email := newEmail()
		w.during("send_mail", applied, func() { w.during("disable_user", lost, func() { w.register(email) }) })
		w.due(w.registrationOf(email))
		w.check() // disabled long before the cooldown's end
		w.wants(w.do(typing(email, w.readMail(email, 1).Code)), 200, "")
	})
	w.Run("both are down at the start", func() {
		w.kc.close()
		w.pg.close()
		ended := w.startBlind()
		defer ended()
		w.healthy(503, "down")
		w.pg.open()
		w.healthy(200, "degraded")
		w.kc.open()
		w.healthy(200, "ok")
		w.account(newEmail())
	})
}

// healthy waits until /health says this.
func (w *env) healthy(status int, word string) {
	w.Helper()
	w.eventually("health is "+word, 15*time.Second, func() bool {
		a := w.get("/health")
		return a.Status == status && a.text("status") == word
	})
}

// goesOn fails unless the probes and the check of a token are answered as if nothing were away.
func (w *env) goesOn(session link) {
	w.Helper()
	management := *w
	management.url, management.quick = "http://"+w.management, true
	for _, a := range append(management.within(keycloakTimeout/2, call{path: "/livez"}, call{path: "/readyz"}),
		w.within(keycloakTimeout/2, bearing(validatePath, session.Access))...) {
		if a.Status != 200 {
			w.Error(a)
		}
	}
}

// refused fails unless all requests are refused in time.
func (w *env) refused(calls ...call) {
	w.Helper()
	for _, a := range w.within(outageTime, calls...) {
		w.wants(a, 503, "unavailable")
	}
}

// outage takes a store away: what needs it is refused, and works when it is back.
func (w *env) outage(health, account string, session *link, begin, end func()) {
	w.Helper()
	a, b, c, fresh := newEmail(), newEmail(), newEmail(), newEmail()
	first, second, third := registered(w, a), registered(w, b), resendable(w, c)
	leaving := w.signsIn(account)
	begin()
	w.refused(registering(fresh), verifying(first), typing(b, second.Code), resending(third.Code), signingIn(account, password), refreshing(session.Token))
	if health == "down" {
		w.refused(loggingOut(leaving.text("refresh_token")), forgetting(account), authorized(session.Access, "GET", sessionsPath),
			authorized(session.Access, "DELETE", sessionsPath), call{method: "POST", path: resendPath, json: body{"email": c}})
	} else {
		w.wants(w.do(loggingOut(leaving.text("refresh_token"))), 204, "")
		w.wants(w.do(authorized(session.Access, "DELETE", sessionsPath+"/"+leaving.text("session_id"))), 404, "not-found")
		w.wants(w.post(resendPath, body{"email": c}), 200, "")
	}
	w.healthy(map[string]int{"degraded": 200, "down": 503}[health], health)
	w.goesOn(*session)
	end()
	w.healthy(200, "ok")
	w.wants(w.do(registering(fresh)), 201, "")
	w.wants(w.do(verifying(first)), 200, "")
	w.wants(w.do(typing(b, second.Code)), 200, "")
	w.wants(w.do(resending(third.Code)), 429, "resend-too-soon") // and not: limited by the try
	w.wants(w.do(signingIn(account, password)), 200, "")
	w.wants(w.do(loggingOut(leaving.text("refresh_token"))), 204, "")
	session.Token = w.do(refreshing(session.Token)).text("refresh_token")
	w.waitUntilIdle()
}

func (w *env) keycloakHangs(account string, session link) {
	a, b, fresh := newEmail(), newEmail(), newEmail()
	first, second := registered(w, a), resendable(w, b)
	leaving := w.signsIn(account).text("refresh_token")
	calls := []call{registering(fresh), verifying(first), typing(b, w.lastMail(b).Code), resending(second.Code), signingIn(account, password), refreshing(session.Token)}
	for len(calls) < 20 {
		calls = append(calls, registering(newEmail()), signingIn(account, password), registering(newEmail()))
	}
	release := w.kc.block()
	w.goesOn(session)
	w.refused(calls...)
	w.goesOn(session)
	w.wants(w.within(outageTime, loggingOut(leaving))[0], 204, "")
	release()
	w.wants(w.do(refreshing(session.Token)), 200, "")
	w.wants(w.do(registering(fresh)), 201, "")
	w.wants(w.do(verifying(first)), 200, "")
	w.waitUntilIdle()
}

func (w *env) mailServerStopped() {
	w.mail.Close()
	email := newEmail()
	a := w.register(email)
	id := a.text("registration_id")
	if a.text("verification_email") != "queued" {
		w.Errorf("not queued: %v", a)
	}
	for range 3 { // tries that fail
		tried := w.kc.count("send_mail")
		w.due(id)
		w.eventually("another try", time.Minute, func() bool {
			return w.kc.count("send_mail") > tried && w.value(`select (locked_by is null)::text from tasks where task_id = $1`, id) == "true"
		})
	}
	if err := w.mail.Restart(); err != nil {
		w.Fatal(err)
	}
	w.due(id)
	l := w.readMail(email, 1)
	w.waitUntilIdle()
	if n := w.mailsCounted(email); n != "1" {
		w.Errorf("%s mails were counted, not 1", n)
	}
	w.wants(w.do(typing(email, l.Code)), 200, "")
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
