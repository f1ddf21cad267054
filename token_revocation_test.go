package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// administrator is an account that grant-admin has made one.
func (w *env) administrator() (email string) {
	w.Helper()
	email = newEmail()
	w.account(email)
	if err := run(w.Context(), []string{"grant-admin", email}, func(name string) string { return w.vars[name] }, io.Discard, w.logs); err != nil {
		w.Fatal(err)
	}
	return email
}

// managing is a request about users in the name of whoever signed in.
func managing(by answer, method, path string, in any) call {
	r := authorized(by.text("access_token"), method, "/api/v1/users"+path)
	r.json = in
	return r
}

// passes says whether the instance lets an access token pass. It must be able to tell.
func (w *env) passes(a answer) bool {
	w.Helper()
	got := w.do(bearing(validatePath, a.text("access_token")))
	if got.Status != 200 {
		w.wants(got, 401, "unauthorized")
	}
	return got.Status == 200
}

// revoked fails unless the access tokens count no more: within a second, but not on a busy machine. TestFleetRevocations
// takes the time.
func (w *env) revoked(list ...answer) {
	w.Helper()
	for i, a := range list {
		w.eventually(fmt.Sprintf("token %d counts no more", i), 5*time.Second, func() bool { return !w.passes(a) })
	}
}

// revokedUser is somebody who has signed in twice.
type revokedUser struct {
	id            string
	first, second answer
}

// operatorBefore is what it was before something changes.
var operatorBefore = body{"role": "operator", "network_id": "N1", "station_id": "S1"}

// revocationCause is something that makes tokens untrue or ends their sessions, or does not.
type revocationCause struct {
	cause  string
	do     func(v revokedUser)
	tokens string // that are revoked: both, first, none …
	ends   bool   // … with their sessions
	undo   func(v revokedUser)
	login  string // a problem, while it is not undone
}

func (w *env) revocationCauses(admin answer) []revocationCause {
	const both, first, none = "both", "first", "none"
	manage := func(method, path string, in any) func(revokedUser) {
		return func(v revokedUser) {
			w.Helper()
			if a := w.do(managing(admin, method, strings.NewReplacer("{id}", v.id, "{session}", v.first.text("session_id")).Replace(path), in)); a.Status/100 != 2 {
				w.Fatal(a)
			}
		}
	}
	patch := func(in body) func(revokedUser) { return manage("PATCH", "/{id}", in) }
	listed := func(v revokedUser) {
		w.wants(w.as(v.second, "GET", sessionsPath), 200, "")
		w.eventually("its task has ended it", time.Minute, func() bool {
			return w.value(`select (ended_at is not null)::text from sessions where session_id = $1`, v.first.text("session_id")) == "true"
		})
	}
	return []revocationCause{
		{"deleted", manage("DELETE", "/{id}", nil), both, true, manage("POST", "/{id}/restore", nil), "account-disabled"},
		{"demoted", patch(body{"role": "user"}), both, false, patch(operatorBefore), ""},
		{"promoted", patch(body{"role": "partner"}), both, false, patch(operatorBefore), ""},
		{"another network", patch(body{"network_id": "N2"}), both, false, patch(operatorBefore), ""},
		{"no network", patch(body{"network_id": ""}), both, false, patch(operatorBefore), ""},
		{"another station", patch(body{"station_id": "S2"}), both, false, patch(operatorBefore), ""},
		{"role and scope as they were", patch(operatorBefore), none, false, nil, ""},
		{"another name", patch(body{"first_name": "Grace", "phone": "+4930123456"}), none, false, nil, ""},
		{"one session, by its owner", func(v revokedUser) {
			w.wants(w.as(v.second, "DELETE", sessionsPath+"/"+v.first.text("session_id")), 204, "")
		}, first, true, nil, ""},
		{"all sessions, by their owner", func(v revokedUser) { w.wants(w.as(v.second, "DELETE", sessionsPath), 204, "") }, both, true, nil, ""},
		{"one session, managed", manage("DELETE", "/{id}/sessions/{session}", nil), first, true, nil, ""},
		{"all sessions, managed", manage("DELETE", "/{id}/sessions", nil), both, true, nil, ""},
		{"logout", func(v revokedUser) { w.wants(w.do(loggingOut(v.first.text("refresh_token"))), 204, "") }, first, true, nil, ""},
		{"refresh token used again", func(v revokedUser) {
			next := w.refreshed(w.refreshed(v.first))
			w.graceEnds(next)
			w.wants(w.do(refreshing(v.first.text("refresh_token"))), 401, "token-reused")
			w.revoked(next)
		}, first, true, nil, ""},
		{"ended in Keycloak, found by a list", func(v revokedUser) {
			w.keycloakAdmin("DELETE", "/sessions/"+w.sid(v.first), nil, nil)
			listed(v)
		}, first, true, nil, ""},
		{"ended in Keycloak, found by a refresh", func(v revokedUser) {
			w.keycloakAdmin("DELETE", "/sessions/"+w.sid(v.first), nil, nil)
			w.wants(w.do(refreshing(v.first.text("refresh_token"))), 401, "invalid-token")
		}, first, true, nil, ""},
	}
}

// Whatever makes a token untrue or ends its session revokes it, and nothing else.
func TestRevocations(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "200ms"})
	_, bystander := w.signedIn()
	admin := w.signsIn(w.administrator())
	for _, c := range w.revocationCauses(admin) {
		w.Run(c.cause, func() { w.revokes(c, bystander, admin) })
	}
}

// revokes fails unless a cause revokes what it should.
func (w *env) revokes(c revocationCause, bystander, admin answer) {
	w.Helper()
	email := newEmail()
	w.account(email)
	v := revokedUser{id: w.value(`select user_id from users where email = $1`, email)}
	w.wants(w.do(managing(admin, "PATCH", "/"+v.id, operatorBefore)), 200, "")
	v.first, v.second = w.signsIn(email), w.signsIn(email)
	if !w.passes(v.first) || !w.passes(v.second) { // issued right after a change, whatever the clocks say
		w.Fatal("a token that is true does not pass")
	}
	c.do(v)
	old := map[string][]answer{"both": {v.first, v.second}, "first": {v.first}}[c.tokens]
	w.revoked(old...)
	var fresh []answer
	for i, session := range []answer{v.first, v.second} {
		gone := i < len(old)
		switch {
		case !gone && !w.passes(session):
			w.Errorf("the token of session %d was revoked, too", i)
		case gone && c.ends:
			w.wants(w.do(refreshing(session.text("refresh_token"))), 401, "invalid-token")
		default: // the session goes on, with a token that says what is true
			fresh = append(fresh, w.refreshed(session))
		}
	}
	if c.login != "" {
		w.wants(w.login(email, password), 403, c.login)
	} else {
		fresh = append(fresh, w.signsIn(email))
	}
	for i, a := range append(fresh, bystander, admin) {
		if !w.passes(a) {
			w.Errorf("token %d does not pass, and is true", i)
		}
	}
	if c.undo == nil {
		return
	}
	c.undo(v)
	if c.ends { // its session does not come back
		a := w.signsIn(email)
		w.eventually("a new token passes", time.Second, func() bool { return w.passes(a) })
		w.revoked(old...)
		return
	}
	w.revoked(fresh...)
	for _, a := range old { // what it says is true again
		w.eventually("the first token passes again", time.Second, func() bool { return w.passes(a) })
	}
}

// newRevocations has read the table, and found these, at a time.
func newRevocations(read time.Time, found ...revocation) *revocations {
	w := &revocations{of: map[string]received{}, next: make(chan struct{})}
	w.add(read, found...)
	return w
}

// holder is whom the tables of revocations are about.
var holder = principal{UserID: "USR-a", SessionID: "s1", Roles: []string{roleOperator}, NetworkID: "N", StationID: "S"}

// isNow is what is true of holder, with a change.
func isNow(number int64, change func(*revocation)) revocation {
	r := revocation{UserID: holder.UserID, Role: roleOperator, NetworkID: "N", StationID: "S", Active: true, Number: number}
	change(&r)
	return r
}

// issued is when holder's token was.
var issued = time.Now().Truncate(time.Second)

// before says that tokens of a user that were issued earlier count no more.
func before(id userID, number int64, at time.Time) revocation {
	return revocation{UserID: id, NotBefore: &at, Number: number}
}

func same(*revocation)      {}
func demoted(r *revocation) { r.Role = roleUser }

// What is known of a user and a session decides alone: no clock, and not the order in
// which it was received.
func TestRevocationsCheck(t *testing.T) {
	for name, c := range map[string]struct {
		received []revocation
		passes   bool
	}{
		"nothing":                        {nil, true},
		"its session":                    {[]revocation{{SessionID: "s1", Number: 1}}, false},
		"another session":                {[]revocation{{SessionID: "s2", Number: 1}}, true},
		"its session, then a user":       {[]revocation{{SessionID: "s1", Number: 1}, isNow(2, same)}, false},
		"as it says":                     {[]revocation{isNow(1, same)}, true},
		"another user":                   {[]revocation{isNow(1, func(r *revocation) { r.UserID, r.Active = "USR-b", false })}, true},
		"another role":                   {[]revocation{isNow(1, demoted)}, false},
		"another network":                {[]revocation{isNow(1, func(r *revocation) { r.NetworkID = "" })}, false},
		"another station":                {[]revocation{isNow(1, func(r *revocation) { r.StationID = "S2" })}, false},
		"deleted":                        {[]revocation{isNow(1, func(r *revocation) { r.Active = false })}, false},
		"issued before":                  {[]revocation{before(holder.UserID, 1, issued.Add(time.Second))}, false},
		"issued at that time":            {[]revocation{before(holder.UserID, 1, issued)}, true},
		"another's issued before":        {[]revocation{before("USR-b", 1, issued.Add(time.Second))}, true},
		"issued before, then as it says": {[]revocation{before(holder.UserID, 1, issued.Add(time.Second)), isNow(2, same)}, false},
		"demoted and back":               {[]revocation{isNow(1, demoted), isNow(2, same)}, true},
		"the same, received late":        {[]revocation{isNow(2, same), isNow(1, demoted)}, true},
		"twice the same, received twice": {[]revocation{isNow(1, same), isNow(2, demoted), isNow(1, same), isNow(2, demoted)}, false},
	} {
		seen := time.Now()
		w := newRevocations(time.Time{})
		for _, one := range c.received { // each look finds one
			w.add(time.Time{}, one)
		}
		if err := w.check(t.Context(), verifiedToken{holder, issued, seen, time.Time{}}); !errors.Is(err, errUnavailable) {
			t.Errorf("%s, nothing read: %v", name, err)
		}
		w.add(time.Now())
		for how, w := range map[string]*revocations{"by one look": newRevocations(time.Now(), c.received...), "one by one": w} {
			if err := w.check(t.Context(), verifiedToken{holder, issued, seen, time.Time{}}); (err == nil) != c.passes || errors.Is(err, errUnavailable) {
				t.Errorf("%s, received %s: %v", name, how, err)
			}
		}
		two := holder
		two.Roles = []string{roleOperator, roleUser}
		if err := w.check(t.Context(), verifiedToken{two, issued, seen, time.Time{}}); err == nil && w.of[string(holder.UserID)].Number > 0 {
			t.Errorf("%s: two roles are not one", name)
		}
	}
}

// A token that differs from what was read may be newer than that. It waits for a look at the table
// that begins after its arrival, and for no other.
func TestRevocationsWait(t *testing.T) {
	for name, c := range map[string]struct {
		before, found []revocation
		late          bool // the look began before the token came
		passes, waits bool
	}{
		"it is newer":                     {[]revocation{isNow(1, demoted)}, []revocation{isNow(2, same)}, false, true, true},
		"its user was restored":           {[]revocation{isNow(1, func(r *revocation) { r.Active = false })}, []revocation{isNow(2, same)}, false, true, true},
		"it is older":                     {[]revocation{isNow(1, demoted)}, nil, false, false, true},
		"yet another change":              {[]revocation{isNow(1, demoted)}, []revocation{isNow(2, func(r *revocation) { r.Role = roleAdmin })}, false, false, true},
		"newer, found by a look before":   {[]revocation{isNow(1, demoted)}, []revocation{isNow(2, same)}, true, true, true},
		"older, and a look of before":     {[]revocation{isNow(1, demoted)}, nil, true, false, true},
		"it says what was read":           {[]revocation{isNow(1, same)}, nil, false, true, false},
		"its session has ended":           {[]revocation{{SessionID: "s1", Number: 1}}, nil, false, false, false},
		"nothing is known of its user":    {nil, nil, false, true, false},
		"ended while it waits for a look": {[]revocation{isNow(1, demoted)}, []revocation{isNow(2, same), {SessionID: "s1", Number: 3}}, false, false, true},
	} {
		w := newRevocations(time.Now(), c.before...)
		seen := time.Now()
		checked := make(chan error, 1)
		go func() { checked <- w.check(t.Context(), verifiedToken{holder, issued, seen, time.Time{}}) }()
		waits := false
		select {
		case err := <-checked:
			checked <- err
		case <-time.After(50 * time.Millisecond):
			waits = true
		}
		read := time.Now()
		if c.late {
			read = seen.Add(-time.Millisecond)
		}
		w.add(read, c.found...)
		err := <-checked
		took := time.Since(seen)
		if (err == nil) != c.passes || errors.Is(err, errUnavailable) || waits != c.waits {
			t.Errorf("%s: %v; it waits: %v", name, err, waits)
		}
		if gaveUp := c.late && !c.passes; gaveUp != (took >= revocationWait) || took > 10*revocationWait {
			t.Errorf("%s: it took %v", name, took)
		}
		if took := time.Now(); !c.late && w.check(t.Context(), verifiedToken{holder, issued, seen, time.Time{}}) != nil && time.Since(took) > revocationWait {
			t.Errorf("%s: the second time it is refused after %v", name, time.Since(took))
		}
	}
}

// Revocations are kept for as long as a token may live.
func TestRevocationsForgotten(t *testing.T) {
	for since, kept := range map[time.Duration]int{0: 2, tokenLife: 2, tokenLife + revocationLag + time.Second: 0} {
		w := newRevocations(time.Now(), revocation{SessionID: "s1", Number: 1}, isNow(2, same))
		for key, r := range w.of {
			w.of[key] = received{r.revocation, time.Now().Add(-since)}
		}
		if w.add(time.Now()); len(w.of) != kept {
			t.Errorf("%d are kept after %v", len(w.of), since)
		}
	}
}

// A token with a user's new role is good at once, also if this instance knows only an earlier change.
func TestRevocationNewer(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.admin()
	path := usersPath + "/" + string(admin.invited("user", "", "").ID)
	c := w.testUser(shown(admin.asks("GET", path, nil)).Email)
	for i := range 6 {
		old := w.signsIn(c.Email)
		admin.changes(c.ID, body{"role": roleOperator, "network_id": fmt.Sprint("N", i)})
		w.revoked(old) // this one it knows
		if i%2 == 0 {
			admin.changes(c.ID, body{"role": rolePartner})
		} else {
			w.wants(admin.asks("DELETE", path, nil), 204, "")
			w.revocationsRead()
			w.wants(admin.asks("POST", path+"/restore", nil), 200, "")
		}
		if fresh := w.signsIn(c.Email); !w.passes(fresh) {
			t.Errorf("round %d: a token that says what is true does not pass", i)
		}
		if w.passes(old) {
			t.Errorf("round %d: the old one does", i)
		}
	}
}

// What is read after a while is what has come meanwhile, at most what a token can live.
func TestRevocationsRead(t *testing.T) {
	w := sharedEnv(t)
	ages := []time.Duration{62 * time.Minute, 59 * time.Minute, 30 * time.Minute, 3 * time.Minute, 30 * time.Second}
	mark := newEmail()
	sid := func(age time.Duration) string { return mark + " " + age.String() }
	s := idle(t, slog.New(slog.DiscardHandler), map[string]string{"DATABASE_URL": w.vars["DATABASE_URL"]})
	for away, known := range map[time.Duration]int{0: 4, time.Second: 1, 20 * time.Minute: 2, 40 * time.Minute: 3, 5 * time.Hour: 4} {
		w.exec(`delete from revocations where keycloak_session_id like $1 || '%'`, mark)
		for _, age := range ages {
			w.exec(`insert into revocations (at, keycloak_session_id, user_id, role, network_id, station_id, is_active)
				values (now() - $1::interval, $2, '', '', '', '', false)`, age, sid(age))
		}
		s.verifier.revoked.of, s.verifier.revoked.read = map[string]received{}, time.Time{}
		if away > 0 {
			s.verifier.revoked.read = time.Now().Add(-away)
		}
		if err := s.pollRevocations(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, age := range ages {
			if _, received := s.verifier.revoked.of[sid(age)]; received != (i >= len(ages)-known) {
				t.Errorf("%v after the last look (0: the first one): one of %v ago is known: %v", away, age, received)
			}
		}
	}
	if err := s.store.purge(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	left := w.value(`select string_agg(keycloak_session_id, ', ' order by at) from revocations where keycloak_session_id like $1 || '%'`, mark)
	if strings.Count(left, ",") != 3 || strings.Contains(left, sid(ages[0])) {
		t.Errorf("left is %s", left)
	}
}

// Whoever may only connect to the database forges and hides nothing: who sends what to whom
// on a channel of PostgreSQL does not matter.
func TestRevocationsForged(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	role := "test_stranger_" + gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
	w.exec(`create role ` + role + ` login password 'stranger'`)
	t.Cleanup(func() {
		if _, err := w.pool.Exec(context.Background(), `drop role `+role); err != nil {
			t.Error(err)
		}
	})
	u, err := url.Parse(services.DatabaseURL(w.db))
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "stranger")
	stranger, err := pgx.Connect(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close(context.Background())
	_, good := w.signedIn()
	_, out := w.signedIn()
	claims := unpacked(good.text("access_token"), 1)
	notify := func() {
		t.Helper()
		for _, channel := range []string{"revocations", "withdrawals"} {
			for _, payload := range []string{"", "x", `{"SessionID":"` + w.sid(good) + `","Number":99}`,
				fmt.Sprintf(`{"UserID":%q,"Role":"admin","Active":false,"Number":99}`, claims["user_id"])} {
				if _, err := stranger.Exec(t.Context(), `select pg_notify($1, $2)`, channel, payload); err != nil {
					t.Error(err)
				}
			}
		}
	}
	for _, sql := range []string{`insert into revocations (keycloak_session_id, user_id, role, network_id, station_id, is_active) values ('x', '', '', '', '', true)`,
		`delete from revocations`, `update revocations set at = 'epoch'`, `do $$ begin lock table revocations; end $$`} {
		if _, err := stranger.Exec(t.Context(), sql); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v", sql, err)
		}
	}
	notify()
	w.revocationsRead()
	if !w.passes(good) {
		t.Error("a revocation was forged")
	}
	w.wants(w.do(loggingOut(out.text("refresh_token"))), 204, "")
	notify()
	w.revoked(out)
	if n := w.value(`select count(*)::text from pg_stat_activity where datname = current_database() and query ilike 'listen %'`); n != "0" {
		t.Errorf("%s connections listen", n)
	}
	if metrics := string(w.management404("/metrics").Body); strings.Contains(metrics, "channel_up") {
		t.Error("there is a metric of a channel")
	}
}

// revocationsRead waits until the table is read once more.
func (w *env) revocationsRead() {
	w.Helper()
	since := w.value(`select clock_timestamp()::text`)
	w.eventually("the table is read", 5*time.Second, func() bool {
		return w.value(`select coalesce(max(query_start) > $1::timestamptz, false)::text from pg_stat_activity
			where datname = current_database() and query like '%from revocations%' and pid <> pg_backend_pid()`, since) == "true"
	})
}

// While PostgreSQL is away an instance keeps what it knows, and it learns the rest as soon as
// PostgreSQL is back.
func TestRevocationOutages(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	// Nothing happens to the instance that makes the changes.
	safe, _ := w.another(map[string]string{"DATABASE_URL": strings.Replace(w.vars["DATABASE_URL"], w.pg.addr, w.pg.target, 1)})
	by := safe.signsIn(w.administrator())
	open := func() {
		if err := w.pg.open(); err != nil {
			w.Fatal(err)
		}
	}
	promote := func(email string) {
		w.Helper()
		w.wants(safe.do(managing(by, "PATCH", "/"+w.idOf(email), body{"role": "operator"})), 200, "")
	}
	failures := func() int { return strings.Count(w.logs.String(), "revocations: failed, will retry") }
	var heal func()
	for _, c := range []struct {
		name    string
		cut     func()
		heals   func() // nil: the service does it alone
		timeout time.Duration
	}{
		{"every connection is cut", func() {
			w.at([]string{w.url}, slices.Repeat([]call{authorized(by.text("access_token"), "GET", mePath)}, 32)...) // none has been idle
			w.pg.close()
			open()
		}, nil, 3 * time.Second},
		{"PostgreSQL is away", func() { w.pg.close() }, open, 3 * time.Second},
		{"nothing comes through any more", func() { heal = w.pg.swallow() }, func() { heal() }, 10 * time.Second}, // a look has 5 s
	} {
		w.Run(c.name, func() {
			victim, old := safe.signedIn() // the other one may have broken connections in its pool
			other, good := safe.signedIn()
			_, out := safe.signedIn()
			w.wants(safe.do(loggingOut(out.text("refresh_token"))), 204, "")
			w.revoked(out)
			before := failures()
			c.cut()
			if c.heals != nil {
				w.eventually("it is noticed", time.Minute, func() bool { return failures() > before })
			}
			promote(victim)
			if c.heals != nil {
				safe.revoked(old)
				if !w.passes(old) || w.passes(out) { // nobody can have told it, and it forgets nothing
					w.Error("PostgreSQL is not away at all")
				}
				c.heals()
			}
			start := time.Now()
			w.eventually("the old token counts no more", c.timeout, func() bool { return !w.passes(old) })
			w.Logf("known after %v", time.Since(start))
			if !w.passes(good) || w.passes(out) {
				w.Error("another's token was revoked, or a revocation forgotten")
			}
			promote(other)
			w.revoked(good)
		})
	}
	w.pg.close() // what hangs in the hole would hold up the end
	open()
}

// An instance that starts lets nobody pass before it knows what was revoked.
func TestRevocationsAtStart(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	admin := w.signsIn(w.administrator())
	_, out := w.signedIn()
	w.wants(w.do(loggingOut(out.text("refresh_token"))), 204, "")
	email, demoted := w.signedIn()
	w.wants(w.do(managing(admin, "PATCH", "/"+w.value(`select user_id from users where email = $1`, email), body{"role": "operator"})), 200, "")
	v, _ := w.another(nil)
	for i, a := range []answer{out, demoted} {
		if v.passes(a) {
			t.Errorf("after a restart token %d passes", i)
		}
	}
	if !v.passes(admin) {
		t.Error("a good one does not")
	}
	tx, err := w.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	for _, c := range []struct {
		name, says string
		begin, end func() error
	}{
		{"PostgreSQL is away", "the revocations have not been read yet", w.pg.close, w.pg.open},
		{"the table is locked", "the revocations have not been read yet", func() error {
			_, err := tx.Exec(t.Context(), `lock table revocations in access exclusive mode`)
			return err
		}, func() error { return tx.Rollback(t.Context()) }},
	} {
		w.Run(c.name, func() {
			if err := c.begin(); err != nil {
				w.Fatal(err)
			}
			late := *w
			defer late.startBlind()()
			for range 3 {
				for _, a := range []answer{admin, out, demoted} {
					late.wants(late.do(bearing(validatePath, a.text("access_token"))), 503, "unavailable")
				}
			}
			late.wants(late.do(bearing(validatePath, "garbage")), 401, "unauthorized")
			late.eventually("it is not ready", time.Minute, func() bool {
				a := late.management404("/readyz")
				return a.Status == 503 && strings.TrimSpace(string(a.Body)) == c.says
			})
			if err := c.end(); err != nil {
				w.Fatal(err)
			}
			status := func(a answer) int { return late.do(bearing(validatePath, a.text("access_token"))).Status }
			late.eventually("it lets the good one pass", time.Minute, func() bool {
				if status(out) == 200 || status(demoted) == 200 {
					late.Fatal("one that was revoked passes")
				}
				return status(admin) == 200
			})
			for i, a := range []answer{out, demoted} {
				if late.passes(a) {
					t.Errorf("token %d passes", i)
				}
			}
			late.eventually("it is ready", time.Minute, func() bool { return late.management404("/readyz").Status == 200 })
		})
	}

	// Whatever is asked, it is answered from memory.
	w.kc.close()
	w.pg.close()
	w.quick = true
	for range 1000 {
		if !w.passes(admin) || w.passes(out) || w.passes(demoted) {
			t.Fatal("another answer")
		}
	}
	if err := errors.Join(w.kc.open(), w.pg.open()); err != nil {
		t.Fatal(err)
	}
}

// A change that does not reach Keycloak renews what is revoked by the row as it is then,
// not as it was when the change began.
func TestRevocationOvertaken(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	admin, email := w.signsIn(w.administrator()), newEmail()
	w.account(email)
	id := w.userOf(email)
	change := func(role string) <-chan answer {
		answered := make(chan answer, 1)
		go func() {
			a, err := w.send(w.url, managing(admin, "PATCH", "/"+id, body{"role": role, "network_id": "N1"}))
			if err != nil {
				w.Error(err)
			}
			answered <- a
		}()
		return answered
	}
	const push = "^push_user "
	there, fail := w.kc.holdAt(push, false)
	first := change("operator")
	<-there
	second := change("partner") // it waits for the first one a moment, and leaves the rest to the task
	w.eventually("the second one is ours", time.Minute, func() bool { return w.value(`select role from users where user_id = $1`, id) == "partner" })
	w.wants(<-second, 200, "")
	w.kc.on(push, lost)
	fail()
	w.wants(<-first, 200, "")
	w.kc.on(push, 0)
	a := w.signsIn(email)
	if claims := unpacked(a.text("access_token"), 1); claims["roles"].([]any)[0] != "partner" {
		t.Fatalf("the token says %v", claims)
	}
	for range 3 { // also after the table was read again
		if !w.passes(a) {
			t.Fatal("a token that says what is true does not pass")
		}
		w.revocationsRead()
	}
	if out, err := w.operate("jobs"); err != nil {
		t.Fatal(err, out)
	}
}
