package main

import (
	"fmt"
	"net/netip"
	"testing"
)

// usesUp leaves nothing of a limit.
func (w *env) usesUp(l rateLimit) {
	w.exec(`insert into rate_limits (key, hits, resets_at) values ($1, $2, now() + interval '1 minute')
		on conflict (key) do update set hits = excluded.hits, resets_at = excluded.resets_at`, l.Key, l.N)
}

// While the mail can't be delivered a registration can't be guessed at: the attempts start
// anew only with a code that was really mailed (S13).
func TestCodesWithoutMail(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	email := newEmail()
	id := w.register(email).text("registration_id")
	l := w.readMail(email, 1)
	for range codesTried.N {
		w.wants(w.do(typing(email, other(l.Code))), 400, "invalid-code")
	}
	w.mail.Close()
	for range 3 {
		w.minuteLater(email)
		a := w.do(resending(id))
		if w.wants(a, 200, ""); a.text("verification_email") != "queued" {
			t.Fatal(a)
		}
		w.tasksDue()
		if out, err := w.operate("jobs"); err != nil {
			t.Fatal(err, out)
		}
		w.wants(w.do(typing(email, other(l.Code))), 429, "too-many-attempts")
		w.wants(w.do(typing(email, l.Code)), 429, "too-many-attempts")
	}
	if n := w.value(`select hits::text from rate_limits where key = $1`, mailsADay.of(mailbox(email)).Key); n != "1" {
		t.Errorf("%s mails are counted today", n)
	}
	if err := w.mail.Restart(); err != nil {
		t.Fatal(err)
	}
	w.minuteLater(email)
	w.tasksDue()
	if out, err := w.operate("jobs"); err != nil {
		t.Fatal(err, out)
	}
	next := w.readMail(email, 2)
	for range codesTried.N - 1 {
		w.wants(w.do(typing(email, other(next.Code))), 400, "invalid-code")
	}
	w.wants(w.do(typing(email, next.Code)), 200, "")
}

// A right code is no guess: whoever sends it with passwords that Keycloak refuses may go on.
func TestRightCodeWrongPassword(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	r := typing(email, registered(w, email).Code)
	right := r.json
	for range codesTried.N + 1 {
		r.json = changed(right.(map[string]any), body{"password": "short"})
		w.wants(w.do(r), 400, "invalid-request")
	}
	r.json = right
	w.wants(w.do(r), 200, "")
}

// Wrong codes of one client are limited over all addresses; right ones cost nothing, and
// others are not touched (S13).
func TestWrongCodesOfAClient(t *testing.T) {
	w := sharedEnv(t)
	from := newAddress()
	limit := wrongCodes.of(network(netip.MustParseAddr(from)))
	guess := func(email, code string) call {
		r := typing(email, code)
		r.from = from
		return r
	}
	guesses := 0
	for range 3 {
		email := newEmail()
		l := registered(w, email)
		for range 3 {
			w.wants(w.do(guess(email, other(l.Code))), 400, "invalid-code")
			guesses++
		}
	}
	for ; guesses < limit.N-1; guesses++ {
		w.wants(w.do(guess(newEmail(), "123456")), 400, "invalid-code")
	}
	right := newEmail()
	w.wants(w.do(guess(right, registered(w, right).Code)), 200, "")
	if hits := w.value(`select hits::text from rate_limits where key = $1`, limit.Key); hits != fmt.Sprint(limit.N-1) {
		t.Errorf("%s wrong codes are counted, not %d", hits, limit.N-1)
	}
	w.wants(w.do(guess(newEmail(), "123456")), 400, "invalid-code")
	next := newEmail()
	l := registered(w, next)
	w.wants(w.do(guess(next, l.Code)), 429, "too-many-attempts")
	byLink := verifying(l)
	byLink.from = from
	w.wants(w.do(typing(next, other(l.Code))), 400, "invalid-code") // from elsewhere
	w.wants(w.do(byLink), 200, "")
}

// What has ended goes: personal data at once, the row after 30 days, unless Keycloak has
// something of it still (D15).
func TestEndedRegistrationsGo(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	jobs := func() {
		t.Helper()
		w.due("job:sweep")
		if out, err := w.operate("jobs"); err != nil {
			t.Fatal(err, out)
		}
	}
	cancel := func(email string) { w.wants(w.do(cancelling(w.readMail(email, 1))), 200, "") }
	expire := func(email string) {
		w.expire(email)
		w.due(w.value(`select registration_id from user_registrations where email = $1`, email))
		jobs()
	}
	confirm := func(email string) { w.confirms(w.readMail(email, 1)) }
	type row struct{ id, left string }
	var rows []row
	for _, c := range []struct {
		end  func(email string)
		days int
		left string
	}{{cancel, 31, "0"}, {expire, 31, "0"}, {cancel, 29, "1"}, {expire, 29, "1"}, {confirm, 31, "1"}, {func(string) {}, 31, "1"}} {
		email := newEmail()
		a := w.post(registerPath, body{"email": email, "username": "u-" + email[:8], "first_name": "Ada", "last_name": "Lovelace", "phone": "+4930123456"})
		w.wants(a, 201, "")
		id := a.text("registration_id")
		c.end(email)
		got := w.value(`select status || ' ' || concat(email, username, first_name, last_name, phone, ip_address, user_agent) from user_registrations where registration_id = $1`, id)
		if ended := got == "cancelled " || got == "expired "; ended != (c.left == "0" || c.days == 29) {
			t.Errorf("what is left of it: %s", got)
		}
		w.exec(`update user_registrations set created_at = created_at - $2::interval, ended_at = ended_at - $2::interval where registration_id = $1`, id, fmt.Sprint(c.days, " days"))
		rows = append(rows, row{id, c.left})
	}
	jobs()
	for i, r := range rows {
		if n := w.value(`select count(*)::text from user_registrations where registration_id = $1`, r.id); n != r.left {
			t.Errorf("row %d is there %s times, not %s", i, n, r.left)
		}
	}
	// Keycloak is away when it ends: its row stays until Keycloak has nothing of it.
	email := newEmail()
	id := w.register(email).text("registration_id")
	l := w.readMail(email, 1)
	w.kc.on("^delete_user ", lost)
	w.wants(w.do(cancelling(l)), 200, "")
	w.exec(`update user_registrations set ended_at = ended_at - interval '31 days' where registration_id = $1`, id)
	w.tasksDue()
	jobs()
	w.value(`select registration_id from user_registrations where registration_id = $1`, id)
	w.kc.on("^delete_user ", 0)
	w.tasksDue()
	jobs()
	jobs()
	if n := w.value(`select count(*)::text from user_registrations where registration_id = $1`, id); n != "0" {
		t.Errorf("it is there %s times", n)
	}
}
