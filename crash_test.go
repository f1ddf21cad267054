package main

import (
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
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
	if err := logs.waitFor(30*time.Second, func(text string) bool { return strings.Contains(text, "the revocations are read") }); err != nil {
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

// leasesEnd stands in for the time after which a dead process's lease ends.
func (w *env) leasesEnd() {
	w.Helper()
	w.exec(`update user_registrations set due_at = now() where lease_owner is not null`)
	w.exec(`update refresh_tokens set leased_until = now() where leased_until is not null`)
	w.exec(`update users set due_at = now() where due_at is not null`)
}

// latest is the id and state of an address's latest registration.
func (w *env) latest(email string) (id, status string) {
	w.Helper()
	if err := w.pool.QueryRow(w.Context(), `select registration_id, status from user_registrations
		where lower(email) = lower($1) order by created_at desc limit 1`, email).Scan(&id, &status); err != nil {
		w.Fatal(err)
	}
	return id, status
}

// repairs are what the repair loop has put on record for an address.
func (w *env) repairs(email string) []string {
	w.Helper()
	rows, _ := w.pool.Query(w.Context(), `
		select trim(action || ' ' || reason) from audit_log where actor = 'system:repair' and (target in
			(select registration_id from user_registrations where lower(email) = lower($1)) or details->>'registration_id' in
			(select registration_id from user_registrations where lower(email) = lower($1)))
			or actor = 'system:users' and target in (select user_id from users where lower(email) = lower($1)) order by at, audit_id`, email)
	actions, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		w.Fatal(err)
	}
	return actions
}

// TestCrash kills the process in every window between two writes, and starts a new
// one, which brings both stores together again: registration.go names the windows.
func TestCrash(t *testing.T) {
	t.Parallel() // processes that die, one after the other
	if testing.Short() {
		t.Skip("the crash matrix")
	}
	binary := filepath.Join(t.TempDir(), "auth-service")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The instance in this process runs no jobs: it answers what is asked besides.
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "RESEND_COOLDOWN": "1ms"})

	verified := func(w *env, email string) link { w.account(email); return link{} }
	register := func(email string, _ link) call { return registering(email) }
	verify := func(_ string, l link) call { return verifying(l) }
	cancel := func(_ string, l link) call { return cancelling(l) }
	resend := func(email string, _ link) call { return resending(email) }

	session := func(w *env, email string) link { return w.session(email) }
	refresh := func(_ string, l link) call { return refreshing(l.Token) }
	logout := func(_ string, l link) call { return loggingOut(l.Token) }
	leaving := func(w *env, email string) link { // while Keycloak is away
		l := w.session(email)
		w.kc.on("^end_session ", lost)
		defer w.kc.on("^end_session ", 0)
		w.wants(w.do(loggingOut(l.Token)), 204, "")
		return l
	}

	admin := w.administrator()
	manager := func(w *env, _ string) link { return link{Access: w.signsIn(admin).text("access_token")} }
	managed := func(method string, in any) func(string, link) call {
		return func(email string, l link) call {
			if method == "POST" {
				return managing(answer{JSON: body{"access_token": l.Access}}, method, "", body{"email": email, "role": "operator", "network_id": "N1"})
			}
			return managing(answer{JSON: body{"access_token": l.Access}}, method, "/"+l.Code, in)
		}
	}
	invite, assign, remove := managed("POST", nil), managed("PATCH", body{"role": "partner", "network_id": "N2"}), managed("DELETE", nil)
	invited := func(w *env, email string) link {
		admin := w.signsIn(admin)
		return link{Access: admin.text("access_token"), Code: w.invited(admin, email)}
	}
	joined := func(w *env, email string) link {
		admin := w.signsIn(admin)
		a := w.joined(admin, email)
		return link{Access: admin.text("access_token"), Code: w.userOf(email), Token: a.text("refresh_token"), URL: a.text("session_id")}
	}
	undone := func(at string, before func(*env, string) link, do func(string, link) call) func(*env, string) link {
		return func(w *env, email string) link { // while Keycloak is away
			l := before(w, email)
			w.kc.on("^"+at+" ", lost)
			defer w.kc.on("^"+at+" ", 0)
			if a := w.do(do(email, l)); a.Status/100 != 2 {
				w.Fatal(a)
			}
			return l
		}
	}

	// What must have become of it.
	isInvited := func(mails int) func(*env, string, link) {
		return func(w *env, email string, _ link) {
			w.agree(w.userOf(email))
			w.invitations(email, mails)
		}
	}
	isPartner := func(w *env, email string, l link) {
		w.agree(l.Code)
		if got := w.value(`select role || network_id from users where user_id = $1`, l.Code); got != "partnerN2" {
			w.Errorf("it is a %s", got)
		}
	}
	isGone := func(w *env, email string, l link) {
		w.agree(l.Code)
		w.ended("user deleted", answer{JSON: body{"session_id": l.URL, "refresh_token": l.Token}})
		w.wants(w.do(signingIn(email, password)), 403, "account-disabled")
	}
	goesOn := func(w *env, _ string, l link) {
		a := w.do(refreshing(l.Token)) // the client tries again
		w.wants(a, 200, "")
		w.refreshed(a)
	}
	isOver := func(w *env, _ string, l link) {
		w.ended("logout", answer{JSON: body{"session_id": l.Code, "refresh_token": l.Token}})
		w.wants(w.do(loggingOut(l.Token)), 204, "")
		w.eventually("the loop has done its part", 10*time.Second, func() bool {
			w.tasksDue()
			return w.value(`select (due_at is null)::text from sessions where session_id = $1`, l.Code) == "true"
		})
	}
	opens := func(w *env, email string, _ link) {
		l := w.lastMail(email)
		w.wants(w.do(typing(email, l.Code)), 200, "") // the newest mail's
		w.wants(w.do(verifying(l)), 200, "")
		if password != "" {
			w.wants(w.do(signingIn(email, password)), 200, "")
		}
	}
	is := func(status string) func(*env, string, link) {
		return func(w *env, email string, l link) {
			if id, got := w.latest(email); got != status {
				w.Fatalf("%s is %s, not %s", id, got, status)
			}
			switch status {
			case "verified":
				a := w.do(verifying(l))
				w.wants(a, 200, "")
				if a.JSON["already_verified"] != true {
					w.Errorf("not verified already: %v", a)
				}
				w.wants(w.do(signingIn(email, password)), 200, "")
			case "expired":
				w.wants(w.do(verifying(l)), 410, "verification-expired")
				w.register(email) // the address is free
			case "cancelled":
				if l.Token != "" {
					w.wants(w.do(verifying(l)), 410, "verification-cancelled")
				}
				w.register(email)
			}
		}
	}
	for _, c := range []struct {
		window  string
		before  func(w *env, email string) link
		do      func(email string, l link) call // the process dies in it; nil: in the repair loop
		at      string                          // the call to Keycloak at which it dies: before it, or …
		after   bool                            // … after it
		lock    string                          // or rather when it next wants this table
		repairs string                          // on record, by the loop
		ends    func(w *env, email string, l link)
	}{
		{"R1, password gone", nil, register, "create_user", false, "", "registration.cancelled no_keycloak_user", is("cancelled")},
		{"R1, no password", nil, register, "create_user", false, "", "user.create, registration.mail", opens},
		{"R2", nil, register, "create_user", true, "", "user.create, registration.mail", opens},
		{"R2, no password", nil, register, "create_user", true, "", "user.create, registration.mail", opens},
		{"R3", nil, register, "create_user", true, "rate_limits", "registration.mail", opens},
		{"R4, enabled or not", nil, register, "enable_user", false, "", "registration.mail", opens},
		{"R4, enabled, no mail", nil, register, "send_mail", false, "", "registration.mail", opens},
		{"R4, mailed, enabled", nil, register, "disable_user", false, "", "registration.mail", opens},
		{"R4, mailed, enabled, no password", nil, register, "disable_user", false, "", "registration.mail", opens},
		{"R5", nil, register, "disable_user", true, "", "registration.mail", opens},
		{"R5, at the audit trail", nil, register, "disable_user", true, "audit_log", "registration.mail", opens},
		{"C1, replaced, no password", registered, register, "delete_user", false, "", "user.remove, user.create, registration.mail", opens},
		{"C1, replaced, password gone", registered, register, "delete_user", false, "",
			"user.remove, registration.cancelled no_keycloak_user", is("cancelled")},
		{"C2, replaced, no password", registered, register, "delete_user", true, "",
			"user.remove, user.create, registration.mail", opens},
		{"C1, cancelled", registered, cancel, "delete_user", false, "", "user.remove", is("cancelled")},
		{"C2, cancelled", registered, cancel, "delete_user", true, "", "user.remove", is("cancelled")},
		{"V2", registered, verify, "activate_user", false, "", "", opens},
		{"V3", registered, verify, "activate_user", true, "", "registration.verified", is("verified")},
		{"V3, at the audit trail", registered, verify, "activate_user", true, "audit_log", "registration.verified", is("verified")},
		{"E1", expiring(registered), verify, "delete_user", false, "", "user.remove", is("expired")},
		{"E2", expiring(registered), verify, "delete_user", true, "", "user.remove", is("expired")},
		{"E1, in the loop", expiring(registered), nil, "delete_user", false, "",
			"registration.expired expired, user.remove", is("expired")},
		{"M1", registered, resend, "set_code", false, "", "registration.mail", opens},
		{"M2", registered, resend, "send_mail", false, "", "registration.mail", opens},
		{"M3", registered, resend, "disable_user", false, "", "registration.mail", opens},
		{"M3, disabled", registered, resend, "disable_user", true, "", "registration.mail", opens},
		{"L1", verified, func(email string, _ link) call { return signingIn(email, password) }, "token", true, "", "",
			func(w *env, email string, _ link) { w.wants(w.do(signingIn(email, password)), 200, "") }},
		{"F1", session, refresh, "refresh", false, "", "", goesOn},
		{"F2", session, refresh, "refresh", true, "", "", goesOn},
		{"S1", session, logout, "end_session", false, "", "", isOver},
		{"S2", session, logout, "end_session", true, "", "", isOver},
		{"S1, in the loop", leaving, nil, "end_session", false, "", "", isOver},
		{"S2, in the loop", leaving, nil, "end_session", true, "", "", isOver},
		{"I1", manager, invite, "create_user", false, "", "user.invite", isInvited(1)},
		{"I1, looked for", manager, invite, "create_user", false, "", "user.invite", isInvited(1)},
		{"I2", manager, invite, "create_user", true, "", "user.invite", isInvited(1)},
		{"I2, at our row", manager, invite, "create_user", true, "users", "user.invite", isInvited(1)},
		{"I3", manager, invite, "send_mail", false, "", "user.invite", isInvited(1)},
		{"I4", manager, invite, "send_mail", true, "", "user.invite", isInvited(2)}, // nobody can know that it was sent
		{"I4, at the audit trail", manager, invite, "send_mail", true, "audit_log", "user.invite", isInvited(2)},
		{"I3, in the loop", undone("send_mail", manager, invite), nil, "send_mail", false, "", "user.invite", isInvited(1)},
		{"I4, in the loop", undone("send_mail", manager, invite), nil, "send_mail", true, "", "user.invite", isInvited(2)},
		{"U1", invited, assign, "get_user", false, "", "", isPartner},
		{"U2", invited, assign, "assign_user", false, "", "", isPartner},
		{"U3", invited, assign, "assign_user", true, "", "", isPartner},
		{"U3, at our row", invited, assign, "assign_user", true, "users", "", isPartner},
		{"U2, in the loop", undone("assign_user", invited, assign), nil, "assign_user", false, "", "", isPartner},
		{"U1, deleted", joined, remove, "end_session", false, "", "", isGone},
		{"U1, deleted, signed out", joined, remove, "end_session", true, "", "", isGone},
		{"U2, deleted", joined, remove, "assign_user", false, "", "", isGone},
		{"U3, deleted", joined, remove, "assign_user", true, "", "", isGone},
	} {
		t.Run(c.window, func(t *testing.T) {
			w := *w
			w.TB = t
			email, l := newEmail(), link{}
			if c.before != nil {
				l = c.before(&w, email)
			}
			w.dieAt(binary, c.at, c.after, c.lock, func() call {
				if c.do == nil {
					return call{}
				}
				return c.do(email, l)
			}())
			w.leasesEnd()
			w.straysDie()
			repairer := w.spawn(binary, map[string]string{"JOB_INTERVAL": "50ms"})
			w.settle()
			if got := strings.Join(w.repairs(email), ", "); got != c.repairs {
				t.Errorf("the loop's record is %q, not %q", got, c.repairs)
			}
			c.ends(&w, email, l)
			w.end(repairer, syscall.SIGTERM)
		})
	}
}

// dieAt sends a request to a process of its own and kills that at a point between
// two writes. Without a request it dies in its repair loop.
func (w *env) dieAt(binary, at string, after bool, lock string, r call) {
	w.Helper()
	there, release := w.kc.holdAt("^"+at+" ", after)
	w.Cleanup(release) // not before its client is known to be gone, or the call would be made
	interval := "0"
	if r.path == "" {
		interval = "50ms"
		w.exec(`update user_registrations set due_at = expires_at where status = 'pending'`)
		w.usersDue()
	}
	p := w.spawn(binary, map[string]string{"JOB_INTERVAL": interval})
	answered := make(chan answer, 1)
	if r.path != "" {
		go func() { a, _ := w.send(p.url, r); answered <- a }()
	}
	select {
	case <-there:
	case a := <-answered:
		w.Fatalf("it did not come to %s: %v", at, a)
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
		w.eventually("it waits for "+lock, 10*time.Second, func() (waits bool) {
			w.pool.QueryRow(w.Context(), `select exists (select from pg_locks where not granted and relation = $1::regclass)`, lock).Scan(&waits)
			return waits
		})
	}
	w.end(p, syscall.SIGKILL)
}

// expiring lets the time of a registration run out.
func expiring(before func(*env, string) link) func(*env, string) link {
	return func(w *env, email string) link {
		l := before(w, email)
		w.expire(email)
		return l
	}
}
