package main

import (
	"cmp"
	"io"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is the real binary, to be killed.
type process struct {
	*exec.Cmd
	url   string
	ended chan error
}

// spawn starts the binary with the env's variables and settings of its own, and
// returns when it takes tokens.
func (w *env) spawn(binary string, settings map[string]string) *process {
	w.Helper()
	p := &process{Cmd: exec.Command(binary), ended: make(chan error, 1)}
	env := maps.Clone(w.vars)
	maps.Copy(env, settings)
	for name, value := range env {
		p.Env = append(p.Env, name+"="+value)
	}
	logs := new(buffer)
	p.Stderr = io.MultiWriter(logs, w.logs)
	if err := p.Start(); err != nil {
		w.Fatal(err)
	}
	go func() { p.ended <- p.Wait() }()
	w.Cleanup(func() { p.Process.Kill() }) // has ended, unless the test has failed
	p.url = w.listening(logs)
	if err := logs.waitFor(30*time.Second, func(text string) bool { return strings.Contains(text, "revocations: read") }); err != nil {
		w.Fatal(err)
	}
	return p
}

// end sends a signal and waits for the process's end.
func (w *env) end(p *process, signal syscall.Signal) {
	w.Helper()
	p.Process.Signal(signal)
	select {
	case err := <-p.ended:
		if (err == nil) != (signal == syscall.SIGTERM) {
			w.Fatalf("%v: the process ended with %v", signal, err)
		}
	case <-time.After(30 * time.Second):
		w.Fatalf("%v: the process does not end", signal)
	}
}

// locksEnd stands in for the time after which the locks of a dead process end.
func (w *env) locksEnd() {
	w.Helper()
	w.exec(`update tasks set locked_until = now() where locked_until > now() and task_id not like 'job:%'`)
}

// withoutSync keeps events and full passes from repairing what a task must repair.
func (w *env) withoutSync() {
	w.Helper()
	w.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id in ('job:events', 'job:sync')`)
}

// registrationOf is the id of an address's pending or verified registration, or "".
func (w *env) registrationOf(email string) string {
	w.Helper()
	return w.value(`select coalesce(max(registration_id), '') from user_registrations where lower(email) = lower($1)`, email)
}

// repairs are what the queue has audited for a registration and a user.
func (w *env) repairs(registration, user string) string {
	w.Helper()
	return w.value(`select coalesce(string_agg(trim(action || ' ' || reason), ', ' order by at, action), '') from audit_log
		where actor in ('system:registrations', 'system:sync') and (target in ($1, $2) or details->>'registration_id' = $1)`, registration, user)
}

// crash is a window between two writes in which the process dies: registration.go, user.go
// and session.go name them.
type crash struct {
	window  string
	before  func(w *env, email string) link
	do      func(email string, l link) call // the process dies in it; nil: in a worker of the queue
	at      string                          // the call to Keycloak at which it dies: before it, or …
	after   bool                            // … after it
	lock    string                          // or rather when it next wants this table
	event   bool                            // Keycloak's event makes the task
	repairs string                          // audited, by the queue
	ends    func(w *env, email string, l link)
}

// TestCrash kills the process in every window between two writes, and starts a new
// one, which brings both stores together again.
func TestCrash(t *testing.T) {
	t.Parallel() // processes that die, one after the other
	if testing.Short() {
		t.Skip("the crash matrix")
	}
	// The instance in this process runs no jobs: it answers what is asked besides.
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "RESEND_COOLDOWN": "1ms"})
	w.withoutSync()
	admin := w.administrator()
	for _, c := range slices.Concat(registrationCrashes(), endCrashes(), sessionCrashes(), invitationCrashes(admin), userCrashes(admin)) {
		t.Run(c.window, func(t *testing.T) {
			w := *w
			w.TB = t
			w.die(program(t), c)
		})
	}
}

// die lets the process die in a window, and checks what a new one makes of it.
func (w *env) die(binary string, c crash) {
	w.Helper()
	email, l := newEmail(), link{}
	if c.before != nil {
		l = c.before(w, email)
	}
	registration := w.registrationOf(email)
	var r call
	if c.do != nil {
		r = c.do(email, l)
	} else {
		w.due(registration)
		w.tasksDue()
	}
	w.dieAt(binary, c.at, c.after, c.lock, r)
	registration = cmp.Or(registration, w.registrationOf(email))
	w.locksEnd()
	w.straysDie()
	if c.event {
		w.exec(`insert into tasks (task_id, due_at) select 'kc:' || keycloak_id, now() from users where user_id = $1 on conflict do nothing`, l.Code)
	}
	repairer := w.spawn(binary, map[string]string{"JOB_INTERVAL": "50ms"})
	w.waitUntilIdle()
	if got := w.repairs(registration, l.Code); got != c.repairs {
		w.Errorf("the queue has audited %q, not %q", got, c.repairs)
	}
	c.ends(w, email, l)
	w.end(repairer, syscall.SIGTERM)
}

// confirmable: the newest mail's code opens the account.
func confirmable(w *env, email string, _ link) {
	w.Helper()
	l := w.lastMail(email)
	w.wants(w.do(typing(email, l.Code)), 200, "")
	if a := w.do(verifying(l)); a.Status != 200 || a.JSON["already_verified"] != true {
		w.Errorf("the link says %v", a)
	}
	w.wants(w.do(signingIn(email, password)), 200, "")
}

// confirmed: the registration is verified, and a second confirmation changes nothing.
func confirmed(w *env, email string, l link) {
	w.Helper()
	for _, r := range []call{verifying(l), typing(email, l.Code)} {
		if a := w.do(r); a.Status != 200 || a.JSON["already_verified"] != true {
			w.Errorf("not verified already: %v", a)
		}
	}
	w.wants(w.do(signingIn(email, password)), 200, "")
}

// over: the registration has ended unverified, and its address is free.
func over(slug string) func(w *env, email string, l link) {
	return func(w *env, email string, l link) {
		w.Helper()
		w.wants(w.do(verifying(l)), 410, slug)
		w.register(email)
	}
}

func register(email string, _ link) call { return registering(email) }
func verify(_ string, l link) call       { return verifying(l) }
func cancel(_ string, l link) call       { return cancelling(l) }

// resendable is registered, with the registration's id as the code.
func resendable(w *env, email string) link {
	w.Helper()
	l := registered(w, email)
	l.Code = w.registrationOf(email)
	return l
}

func resend(_ string, l link) call { return resending(l.Code) }

func registrationCrashes() []crash {
	const created, mailed, verified = "user.create, registration.mail", "registration.mail", "registration.verified"
	return []crash{
		{window: "R1", do: register, at: "create_user", repairs: created, ends: confirmable},
		{window: "R2", do: register, at: "create_user", after: true, repairs: created, ends: confirmable},
		{window: "R2, at our row", do: register, at: "create_user", after: true, lock: "users", repairs: created, ends: confirmable},
		{window: "R3", do: register, at: "create_user", after: true, lock: "rate_limits", repairs: mailed, ends: confirmable},
		{window: "R4, enabled or not", do: register, at: "prepare_mail", repairs: mailed, ends: confirmable},
		{window: "R4, enabled, no mail", do: register, at: "send_mail", repairs: mailed, ends: confirmable},
		{window: "R4, mailed", do: register, at: "send_mail", after: true, repairs: mailed, ends: confirmable},
		{window: "R4, mailed, enabled", do: register, at: "disable_user", repairs: mailed, ends: confirmable},
		{window: "R5", do: register, at: "disable_user", after: true, repairs: mailed, ends: confirmable},
		{window: "R5, sent", do: register, at: "disable_user", after: true, lock: "tasks", ends: confirmable}, // PostgreSQL goes on alone
		{window: "R4, again, before the code", before: resendable, do: resend, at: "prepare_mail", repairs: mailed, ends: confirmable},
		{window: "R4, again, no mail", before: resendable, do: resend, at: "send_mail", repairs: mailed, ends: confirmable},
		{window: "R4, again, enabled", before: resendable, do: resend, at: "disable_user", repairs: mailed, ends: confirmable},
		{window: "R5, again", before: resendable, do: resend, at: "disable_user", after: true, repairs: mailed, ends: confirmable},
		{window: "V1", before: registered, do: verify, at: "get_user", ends: confirmable},
		{window: "V2", before: registered, do: verify, at: "activate_user", ends: confirmable},
		{window: "V3", before: registered, do: verify, at: "activate_user", after: true, repairs: verified, ends: confirmed},
		{window: "V3, at the audit log", before: registered, do: verify, at: "activate_user", after: true, lock: "audit_log",
			repairs: verified, ends: confirmed},
	}
}

// endCrashes are those of registrations that end unverified.
func endCrashes() []crash {
	const ended = "registration.expired expired, user.remove"
	expiring := func(w *env, email string) link {
		l := registered(w, email)
		w.expire(email)
		return l
	}
	cancelled, expired := over("verification-cancelled"), over("verification-expired")
	return []crash{
		{window: "E1, cancelled", before: registered, do: cancel, at: "delete_user", ends: cancelled},
		{window: "E2, cancelled", before: registered, do: cancel, at: "delete_user", after: true, ends: cancelled},
		{window: "E2, cancelled, at our row", before: registered, do: cancel, at: "delete_user", after: true, lock: "user_registrations", ends: cancelled},
		{window: "E1, expired", before: expiring, do: verify, at: "delete_user", ends: expired},
		{window: "E2, expired", before: expiring, do: verify, at: "delete_user", after: true, ends: expired},
		{window: "E1, in the queue", before: expiring, at: "delete_user", repairs: ended, ends: expired},
		{window: "E2, in the queue", before: expiring, at: "delete_user", after: true, repairs: ended, ends: expired},
	}
}

func sessionCrashes() []crash {
	account := func(w *env, email string) link { w.account(email); return link{} }
	session := func(w *env, email string) link { return w.session(email) }
	lostAnswer := func(w *env, email string) link {
		l := w.session(email)
		w.wants(w.do(refreshing(l.Token)), 200, "")
		w.ages(answer{JSON: body{"session_id": l.Code}}, "20 minutes")
		return l
	}
	signIn := func(email string, _ link) call { return signingIn(email, password) }
	refresh := func(_ string, l link) call { return refreshing(l.Token) }
	logout := func(_ string, l link) call { return loggingOut(l.Token) }
	all := func(_ string, l link) call { return authorized(l.Access, "DELETE", sessionsPath) }
	signsIn := func(w *env, email string, _ link) { w.wants(w.do(signingIn(email, password)), 200, "") }
	goesOn := func(w *env, _ string, l link) {
		a := w.do(refreshing(l.Token)) // the client tries again
		w.wants(a, 200, "")
		w.refreshed(a)
	}
	isOver := func(reason string) func(w *env, _ string, l link) {
		return func(w *env, _ string, l link) {
			w.ended(reason, answer{JSON: body{"session_id": l.Code, "refresh_token": l.Token}})
			w.wants(w.do(loggingOut(l.Token)), 204, "")
		}
	}
	return []crash{
		{window: "L1", before: account, do: signIn, at: "token", after: true, ends: signsIn},
		{window: "F1", before: session, do: refresh, at: "refresh", ends: goesOn},
		{window: "F2", before: session, do: refresh, at: "refresh", after: true, ends: goesOn},
		{window: "F2, at our row", before: session, do: refresh, at: "refresh", after: true, lock: "refresh_tokens", ends: goesOn},
		{window: "F2, of an answer that was lost", before: lostAnswer, do: refresh, at: "refresh", after: true, ends: goesOn},
		{window: "S1", before: session, do: logout, at: "end_session", ends: isOver("logout")},
		{window: "S2", before: session, do: logout, at: "end_session", after: true, ends: isOver("logout")},
		{window: "S1, all", before: session, do: all, at: "get_user", ends: isOver("own")},
		{window: "S1, all, at their end", before: session, do: all, at: "end_sessions", ends: isOver("own")},
		{window: "S2, all", before: session, do: all, at: "end_sessions", after: true, ends: isOver("own")},
		{window: "S1, in the queue", before: undone("end_session", session, logout), at: "end_session", ends: isOver("logout")},
		{window: "S2, in the queue", before: undone("end_session", session, logout), at: "end_session", after: true, ends: isOver("logout")},
	}
}

// undone does something while a call to Keycloak is lost: the rest of it is left to the queue.
func undone(at string, before func(*env, string) link, do func(string, link) call) func(*env, string) link {
	return func(w *env, email string) link {
		w.Helper()
		l := before(w, email)
		w.kc.on("^"+at+" ", lost)
		defer w.kc.on("^"+at+" ", 0)
		if a := w.do(do(email, l)); a.Status/100 != 2 {
			w.Fatal(a)
		}
		return l
	}
}

// manages is a request of the administrator whose access token the link has, about the user
// whose id it has as its code.
func manages(method, path string, in body) func(string, link) call {
	return func(email string, l link) call {
		by := answer{JSON: body{"access_token": l.Access}}
		switch {
		case in == nil:
			return managing(by, method, "/"+l.Code+path, nil)
		case method == "POST": // somebody new
			in := changed(in, body{"email": email})
			return managing(by, method, path, in)
		}
		return managing(by, method, "/"+l.Code+path, in)
	}
}

func invitationCrashes(admin string) []crash {
	manager := func(w *env, _ string) link { return link{Access: w.signsIn(admin).text("access_token")} }
	stranger := func(w *env, email string) link { registered(w, email); return manager(w, email) }
	invite := manages("POST", "", body{"role": "operator", "network_id": "N1"})
	invited := func(w *env, email string, l link) {
		w.agree(w.userOf(email))
		confirmable(w, email, l)
		if got := w.value(`select concat_ws(' ', role, network_id, source) from users where email = $1`, email); got != "operator N1 internal" {
			w.Errorf("it is a %s", got)
		}
	}
	const created, mailed = "user.create, registration.mail", "registration.mail"
	return []crash{
		{window: "R1, invited", before: manager, do: invite, at: "create_user", repairs: created, ends: invited},
		{window: "R2, invited", before: manager, do: invite, at: "create_user", after: true, repairs: created, ends: invited},
		{window: "R3, invited", before: manager, do: invite, at: "create_user", after: true, lock: "rate_limits", repairs: mailed, ends: invited},
		{window: "R4, invited", before: manager, do: invite, at: "send_mail", repairs: mailed, ends: invited},
		{window: "R5, invited", before: manager, do: invite, at: "disable_user", after: true, repairs: mailed, ends: invited},
		{window: "R4, invited after a registration", before: stranger, do: invite, at: "prepare_mail", repairs: mailed, ends: invited},
		{window: "R4, in the queue", before: undone("send_mail", manager, invite), at: "send_mail", repairs: mailed, ends: invited},
		{window: "R5, in the queue", before: undone("send_mail", manager, invite), at: "disable_user", after: true, repairs: mailed, ends: invited},
	}
}

func userCrashes(admin string) []crash {
	joined := func(w *env, email string) link {
		by := w.signsIn(admin)
		a := w.joined(by, email)
		return link{Access: by.text("access_token"), Code: w.userOf(email), Token: a.text("refresh_token"), URL: a.text("session_id")}
	}
	assign, rename := manages("PATCH", "", body{"role": "partner", "network_id": "N2"}), manages("PATCH", "", body{"first_name": "Grace"})
	remove, restore := manages("DELETE", "", nil), manages("POST", "/restore", nil)
	removed := func(w *env, email string) link {
		l := joined(w, email)
		w.wants(w.do(remove(email, l)), 204, "")
		return l
	}
	is := func(want string) func(w *env, _ string, l link) {
		return func(w *env, _ string, l link) {
			w.agree(l.Code)
			if got := w.value(`select concat_ws(' ', role, network_id, first_name) from users where user_id = $1`, l.Code); got != want {
				w.Errorf("it is %q, not %q", got, want)
			}
		}
	}
	gone := func(w *env, email string, l link) {
		w.agree(l.Code)
		w.ended("user.delete", answer{JSON: body{"session_id": l.URL, "refresh_token": l.Token}})
		w.wants(w.do(signingIn(email, password)), 403, "account-disabled")
	}
	erase := manages("DELETE", "?erase=true", nil)
	erased := func(w *env, email string, l link) {
		w.erased(user{ID: userID(l.Code), Email: email})
		w.register(email)
	}
	const overwritten = "user.overwrite"
	return []crash{
		{window: "X1", before: joined, do: erase, at: "delete_user", ends: erased},
		{window: "X1, deleted before", before: removed, do: erase, at: "delete_user", ends: erased},
		{window: "X2", before: joined, do: erase, at: "delete_user", after: true, ends: erased},
		{window: "X2, at our row", before: joined, do: erase, at: "delete_user", after: true, lock: "users", ends: erased},
		{window: "U1", before: joined, do: assign, at: "get_user", repairs: overwritten, ends: is("partner N2")},
		{window: "U1, at the push", before: joined, do: assign, at: "push_user", repairs: overwritten, ends: is("partner N2")},
		{window: "U2", before: joined, do: assign, at: "push_user", after: true, ends: is("partner N2")},
		{window: "U1, in the queue", before: undone("push_user", joined, assign), at: "push_user", ends: is("partner N2")},
		{window: "U1, names", before: joined, do: rename, at: "push_user", ends: is("user ")},
		{window: "U2, names", before: joined, do: rename, at: "push_user", after: true, event: true, repairs: "user.sync", ends: is("user  Grace")},
		{window: "U1, deleted", before: joined, do: remove, at: "get_user", repairs: overwritten, ends: gone},
		{window: "U1, deleted, at the push", before: joined, do: remove, at: "push_user", repairs: overwritten, ends: gone},
		{window: "U2, deleted", before: joined, do: remove, at: "push_user", after: true, ends: gone},
		{window: "S1, deleted", before: joined, do: remove, at: "end_sessions", ends: gone},
		{window: "S2, deleted", before: joined, do: remove, at: "end_sessions", after: true, ends: gone},
		{window: "U1, restored", before: removed, do: restore, at: "push_user", after: true, event: true, repairs: overwritten, ends: gone},
	}
}

// dieAt sends a request to a process of its own and kills that at a point between
// two writes. Without a request it dies in a worker.
func (w *env) dieAt(binary, at string, after bool, lock string, r call) {
	w.Helper()
	there, release := w.kc.holdAt("^"+at+" ", after)
	w.Cleanup(release) // not before its client is known to be gone, or the call would be made
	interval := "0"
	if r.path == "" {
		interval = "50ms"
	}
	p := w.spawn(binary, map[string]string{"JOB_INTERVAL": interval})
	answered := make(chan answer, 1)
	if r.path != "" {
		go func() { a, _ := w.send(p.url, r); answered <- a }()
	}
	select {
	case <-there:
	case a := <-answered:
		w.Fatalf("it did not come to %s: %v\n%s", at, a, regexp.MustCompile(".*"+a.text("request_id")+".*").FindString(w.logs.String()))
	case <-time.After(20 * time.Second):
		w.Fatalf("it did not come to %s", at)
	}
	if lock != "" {
		tx, err := w.pool.Begin(w.Context())
		if err == nil {
			defer tx.Rollback(w.Context())
			_, err = tx.Exec(w.Context(), `lock table `+lock+` in access exclusive mode`)
		}
		if err != nil {
			w.Fatal(err)
		}
		release()
		w.eventually("it waits for "+lock, time.Minute, func() (waits bool) {
			w.pool.QueryRow(w.Context(), `select exists (select from pg_locks where not granted and relation = $1::regclass)`, lock).Scan(&waits)
			return waits
		})
	}
	w.end(p, syscall.SIGKILL)
}
