package main

import (
	"fmt"
	"io"
	"maps"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fleet starts two more instances, and a load balancer that gives each request to the next
// of the three: that is who is spoken to from now on.
func (w *env) fleet() (instances []*env) {
	w.Helper()
	first := *w
	instances = append(instances, &first)
	for range 2 {
		v, _ := w.another(nil)
		instances = append(instances, v)
	}
	var next atomic.Uint64
	balancer := httptest.NewServer(&httputil.ReverseProxy{Transport: client.Transport, Rewrite: func(r *httputil.ProxyRequest) {
		target, err := url.Parse(instances[next.Add(1)%uint64(len(instances))].url)
		if err != nil {
			panic(err)
		}
		r.SetURL(target)
		r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
		r.SetXForwarded()
	}})
	w.Cleanup(balancer.Close)
	w.url = balancer.URL
	return instances
}

// userOf is the id of the user with an address.
func (w *env) userOf(email string) string {
	w.Helper()
	return w.value(`select user_id from users where lower(email) = lower($1)`, email)
}

// TestFleet has three instances behind a load balancer: they keep one set of limits, do
// each task once, and never fall behind each other.
func TestFleet(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.withoutSync() // which would reconcile what a task must
	w.restarted(map[string]string{"JOB_INTERVAL": "50ms"}, func() {})
	instances := w.fleet()
	w.Run("forty sign-ins of an account", func() { w.fleetSignIns() })
	w.Run("two hundred requests from an address", func() { w.fleetRequests() })
	w.Run("mails of an address", func() { w.fleetMails() })
	w.Run("each registration expires once", func() { w.fleetExpiry() })
	admin := w.signsIn(w.administrator())
	w.Run("each invitation is mailed once, and each change made once", func() { w.fleetInvitations(admin) })
	w.Run("two changes of a user", func() { w.fleetChanges(admin, instances) })
	w.Run("a change of a user whose lock another holds", func() { w.fleetLocked(admin) })
}

// fleetSignIns guesses forty times at once, at all instances, and goes on: five guesses are compared, however long
// each takes, and the owner, who comes from elsewhere, signs in a moment later (S8, S10).
func (w *env) fleetSignIns() {
	email, _ := w.signedIn()
	asked := w.kc.count("token")
	guess := signingIn(email, "a wrong password")
	guess.from = newAddress()
	got := map[string]int{}
	for calls := slices.Repeat([]call{guess}, 40); got["429 too-many-requests"] == 0 && !w.Failed(); calls = calls[:1] {
		for answer, n := range tally(w.at([]string{w.url}, calls...)) {
			got[answer] += n // 503 unavailable: it has waited in line for a second
		}
		if asked := w.kc.count("token") - asked; asked > failuresOfOne.N || asked != got["401 invalid-credentials"] {
			w.Errorf("%d have reached Keycloak: %v", asked, got)
		}
	}
	if got["401 invalid-credentials"] != failuresOfOne.N {
		w.Errorf("%v", got)
	}
	w.signsIn(email)
}

func (w *env) fleetRequests() {
	var calls []call
	for i, prefix := range slices.Repeat([]string{strings.TrimSuffix(newAddress(), ":1")}, 200) {
		calls = append(calls, forgetting("nobody"))
		calls[i].from = fmt.Sprintf("%s:%x", prefix, i+1)
	}
	if got := tally(w.at([]string{w.url}, calls...)); got["400 invalid-request"] != onForgot.N || got["429 too-many-requests"] != 200-onForgot.N {
		w.Errorf("%v", got)
	}
}

// fleetMails asks for mails to an address as often as the limits allow, and more often.
func (w *env) fleetMails() {
	email := newEmail()
	id := w.register(email).text("registration_id")
	got := tally(w.at([]string{w.url}, slices.Repeat([]call{resending(id)}, 20)...))
	if got["429 resend-too-soon"]+got["503 unavailable"] != 20 {
		w.Errorf("within the cooldown: %v", got)
	}
	w.minuteLater(email)
	got = tally(w.at([]string{w.url}, slices.Repeat([]call{resending(id)}, 20)...))
	if got["200"] != 1 || got["429 resend-too-soon"]+got["503 unavailable"] != 19 {
		w.Errorf("after it: %v", got)
	}
	for n := len(w.mail.To(email)); n < 5; n++ { // RESEND_LIMIT: with the first one
		w.minuteLater(email)
		w.wants(w.do(resending(id)), 200, "")
	}
	w.minuteLater(email)
	w.wants(w.do(resending(id)), 429, "resend-limit")
	if n := len(w.mail.To(email)); n != 5 {
		w.Errorf("%d mails", n)
	}
	w.wants(w.do(verifying(w.lastMail(email))), 200, "")
}

func (w *env) fleetExpiry() {
	var ids []string
	for range 12 {
		email := newEmail()
		registered(w, email)
		ids = append(ids, w.registrationOf(email))
	}
	deleted := w.kc.count("delete_user")
	w.exec(`update user_registrations set expires_at = now() where registration_id = any($1)`, ids)
	w.exec(`update tasks set due_at = now() where task_id = any($1)`, ids)
	w.waitUntilIdle()
	if got := w.value(`select concat_ws(' ', count(*) filter (where action = 'registration.expired'), count(*) filter (where action = 'user.remove'), count(distinct target))
		from audit_log where action in ('registration.expired', 'user.remove') and outcome = 'ok'`); got != "12 12 24" {
		w.Errorf("audited: %s", got)
	}
	if deleted = w.kc.count("delete_user") - deleted; deleted != 12 {
		w.Errorf("%d users were deleted in Keycloak", deleted)
	}
}

func (w *env) fleetInvitations(admin answer) {
	w.mail.Close()
	var emails []string
	for range 12 {
		email := newEmail()
		emails = append(emails, email)
		a := w.do(managing(admin, "POST", "", body{"email": email, "first_name": "Ada"}))
		if w.wants(a, 201, ""); a.text("invitation_email") != "queued" {
			w.Errorf("not queued: %v", a)
		}
	}
	if err := w.mail.Restart(); err != nil {
		w.Fatal(err)
	}
	w.waitUntilIdle()
	for _, email := range emails {
		w.invitations(email, 1)
		w.confirms(w.lastMail(email))
	}
	w.kc.on("^push_user ", lost)
	for _, email := range emails {
		w.wants(w.do(managing(admin, "PATCH", "/"+w.userOf(email), body{"network_id": "N1"})), 200, "")
	}
	w.kc.on("^push_user ", 0)
	pushed := w.kc.count("push_user")
	w.waitUntilIdle()
	if pushed = w.kc.count("push_user") - pushed; pushed != 12 {
		w.Errorf("%d changes have reached Keycloak", pushed)
	}
	for _, email := range emails {
		w.agree(w.userOf(email))
	}
}

// fleetChanges: the older state never overtakes the newer one, however slow Keycloak is.
func (w *env) fleetChanges(admin answer, instances []*env) {
	for _, after := range []bool{false, true} {
		email := newEmail()
		w.joined(admin, email)
		id := w.userOf(email)
		there, release := w.kc.holdAt("^push_user ", after)
		answers := make([]answer, 2)
		var all sync.WaitGroup
		change := func(i int, in body) {
			all.Go(func() {
				var err error
				if answers[i], err = w.send(instances[i].url, managing(admin, "PATCH", "/"+id, in)); err != nil {
					w.Error(err)
				}
			})
		}
		change(0, body{"role": "operator", "network_id": "N1", "station_id": "S1"})
		<-there
		change(1, body{"role": "partner", "station_id": ""})
		w.eventually("the second one is in PostgreSQL", time.Minute, func() bool { return w.value(`select role from users where user_id = $1`, id) == "partner" })
		release()
		start := time.Now()
		all.Wait()
		if took := time.Since(start); took > 3*time.Second {
			w.Errorf("they wait for each other: %v", took)
		}
		for _, a := range answers {
			w.wants(a, 200, "")
		}
		w.waitUntilIdle()
		w.agree(id)
		if got := w.value(`select concat_ws(' ', role, network_id, station_id) from users where user_id = $1`, id); got != "partner N1 " {
			w.Error(got)
		}
	}
}

// fleetLocked changes a user whose lock an instance has taken into its grave: the answer comes
// within about a second, and the task pushes the change when the lock has ended.
func (w *env) fleetLocked(admin answer) {
	email := newEmail()
	w.joined(admin, email)
	id := w.userOf(email)
	w.waitUntilIdle()
	w.exec(`insert into tasks (task_id, due_at, locked_by, locked_until) select 'kc:' || keycloak_id, now(), 'dead', now() + interval '1 minute'
		from users where user_id = $1`, id)
	pushed := w.kc.count("push_user")
	a := w.within(lockWait+time.Second, managing(admin, "PATCH", "/"+id, body{"role": "operator", "network_id": "N1", "station_id": "S1"}))[0]
	w.wants(a, 200, "")
	if a.text("role") != "operator" || w.kc.count("push_user") != pushed {
		w.Errorf("%v, and Keycloak has it although another holds the lock", a)
	}
	w.locksEnd()
	w.waitUntilIdle()
	w.agree(id)
}

// An instance of an older version beside a newer schema changes nothing, and works.
func TestOlderInstance(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	w.exec(`update schema_version set version = version + 1; drop index users_by_time`)
	v, _ := w.another(nil)
	if err := run(t.Context(), []string{"migrate"}, func(name string) string { return w.vars[name] }, io.Discard, w.logs); err != nil {
		t.Error(err)
	}
	if got := w.value(`select concat_ws(' ', version, to_regclass('users_by_time') is null) from schema_version`); got != fmt.Sprint(schemaVersion+1, " t") {
		t.Errorf("the schema is the older one's again: %s", got)
	}
	v.account(newEmail())
	w.exec(`update schema_version set version = $1`, schemaVersion-1)
	w.another(nil)
	if got := w.value(`select concat_ws(' ', version, to_regclass('users_by_time') is null) from schema_version`); got != fmt.Sprint(schemaVersion, " f") {
		t.Errorf("an older schema was not brought up to date: %s", got)
	}
}

// TestFleetRevocations measures how long after its answer a change is known to all three,
// also when they have just lost every connection to PostgreSQL. It fails beyond a second.
func TestFleetRevocations(t *testing.T) { // alone, as it takes the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // no job finds the broken connections first
	instances := w.fleet()
	admin := w.signsIn(w.administrator())
	// What is done before, and the request that revokes the tokens of a sign-in.
	causes := map[string]func(id string, a answer) (call, []answer){
		"deleted": func(id string, a answer) (call, []answer) { return managing(admin, "DELETE", "/"+id, nil), []answer{a} },
		"demoted": func(id string, a answer) (call, []answer) {
			return managing(admin, "PATCH", "/"+id, body{"role": "user"}), []answer{a}
		},
		"scope": func(id string, a answer) (call, []answer) {
			return managing(admin, "PATCH", "/"+id, body{"network_id": "N2"}), []answer{a}
		},
		"sessions": func(id string, a answer) (call, []answer) {
			return managing(admin, "DELETE", "/"+id+"/sessions", nil), []answer{a}
		},
		"own": func(_ string, a answer) (call, []answer) {
			return authorized(a.text("access_token"), "DELETE", sessionsPath), []answer{a}
		},
		"logout": func(_ string, a answer) (call, []answer) { return loggingOut(a.text("refresh_token")), []answer{a} },
		"reuse": func(_ string, a answer) (call, []answer) {
			next := w.refreshed(w.refreshed(a))
			w.graceEnds(next)
			return refreshing(a.text("refresh_token")), []answer{a, next}
		},
	}
	passes := func(v *env, a answer) bool {
		got, err := w.send(v.url, bearing(validatePath, a.text("access_token")))
		if err != nil || got.Status != 200 && got.Status != 401 {
			w.Errorf("%v %v", got, err)
		}
		return got.Status == 200
	}
	worst := map[string]time.Duration{}
	round := func(mode string, cut func()) {
		type victim struct {
			cause, id string
			change    call
			tokens    []answer
		}
		var victims []victim
		for cause, prepare := range causes {
			email := newEmail()
			w.account(email)
			v := victim{cause: cause, id: w.userOf(email)}
			w.wants(w.do(managing(admin, "PATCH", "/"+v.id, body{"role": "operator", "network_id": "N1"})), 200, "")
			v.change, v.tokens = prepare(v.id, w.signsIn(email))
			for _, instance := range instances {
				for _, a := range v.tokens {
					instance.eventually("the token passes", time.Second, func() bool { return passes(instance, a) })
				}
			}
			victims = append(victims, v)
		}
		cut()
		for _, v := range victims {
			var a answer
			w.eventually("the change is made", time.Minute, func() bool {
				a = w.do(v.change)
				return a.Status != 503
			})
			answered := time.Now()
			if a.Status/100 != 2 && a.slug() != "token-reused" {
				w.Fatal(v.cause, a)
			}
			took := make([]time.Duration, len(instances))
			var all sync.WaitGroup
			for i, instance := range instances {
				all.Go(func() {
					for _, a := range v.tokens {
						for passes(instance, a) && time.Since(answered) < 5*time.Second {
							time.Sleep(3 * time.Millisecond)
						}
					}
					took[i] = time.Since(answered)
				})
			}
			all.Wait()
			most := time.Second
			if mode != "as usual" { // new connections are opened
				most = 3 * time.Second
			}
			if slowest := slices.Max(took); slowest > most {
				w.Errorf("%s, %s: the instances know after %v", mode, v.cause, took)
			}
			worst[mode+", "+v.cause] = max(worst[mode+", "+v.cause], slices.Max(took))
		}
		for _, v := range victims {
			if v.cause == "deleted" {
				w.wants(w.do(managing(admin, "POST", "/"+v.id+"/restore", nil)), 200, "")
			}
		}
	}
	for range 2 {
		round("as usual", func() {})
	}
	for range 2 {
		round("connections cut", func() {
			for _, v := range instances { // so that there are many, and none has been idle
				w.at([]string{v.url}, slices.Repeat([]call{authorized(admin.text("access_token"), "GET", mePath)}, 32)...)
			}
			w.exec(`select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'auth-service'`)
		})
	}
	for _, name := range slices.Sorted(maps.Keys(worst)) {
		w.Logf("%-26s known everywhere after at most %v", name, worst[name].Round(time.Millisecond))
	}
}

// invited is the id of a user whom an administrator has just invited.
func (w *env) invited(admin answer, email string) (id string) {
	w.Helper()
	a := w.do(managing(admin, "POST", "", body{"email": email}))
	if w.wants(a, 201, ""); a.text("invitation_email") != "sent" {
		w.Fatal(a)
	}
	return a.text("user_id")
}

// joined is the sign-in of somebody who was invited and has confirmed.
func (w *env) joined(admin answer, email string) answer {
	w.Helper()
	w.invited(admin, email)
	w.confirms(w.lastMail(email))
	return w.signsIn(email)
}

// invitations fails unless an address got as many mails, all of them the service's.
func (w *env) invitations(email string, mails ...int) {
	w.Helper()
	list := w.mail.To(email)
	if !slices.Contains(mails, len(list)) {
		w.Errorf("%s got %d mails, not %v", email, len(list), mails)
	}
	for _, m := range list {
		w.readLink(m)
	}
	if got := w.value(`select count(*)::text from audit_log join user_registrations on target = registration_id
		where lower(email) = lower($1) and action = 'registration.mail' and outcome = 'ok'`, email); len(list) > 0 && got == "0" {
		w.Errorf("%s: no mail is audited", email)
	}
}

// agree fails unless Keycloak's user is as PostgreSQL's: role, scope, names, and whether it may
// sign in; and there is no second one.
func (w *env) agree(id string) {
	w.Helper()
	local := w.value(`select concat_ws('|', keycloak_id, lower(username), role, coalesce(nullif(network_id, ''), 'X'), coalesce(nullif(station_id, ''), 'X'),
		coalesce(first_name, ''), coalesce(last_name, ''), (is_active and is_verified)::text) from users where user_id = $1`, id)
	var list []struct {
		ID, Username, FirstName, LastName string
		Enabled                           bool
		Attributes                        map[string][]string
	}
	w.keycloakAdmin("GET", "/users?briefRepresentation=false&q="+attrUserID+":"+id, nil, &list)
	if len(list) != 1 {
		w.Fatalf("Keycloak has %d users %s", len(list), id)
	}
	u := list[0]
	remote := []string{u.ID, u.Username}
	for _, name := range []string{attrRoles, attrNetworkID, attrStationID} {
		remote = append(remote, strings.Join(u.Attributes[name], ","))
	}
	remote = append(remote, u.FirstName, u.LastName, fmt.Sprint(u.Enabled))
	if got := strings.Join(remote, "|"); got != local {
		w.Errorf("%s: Keycloak has %s\nand PostgreSQL %s", id, got, local)
	}
}
