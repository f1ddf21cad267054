package main

import (
	"fmt"
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

// usersDue stands in for waiting until the loop tries again what is owed to Keycloak.
func (w *env) usersDue() {
	w.Helper()
	w.exec(`update users set due_at = now() where due_at > now() and lease_owner is null`)
}

// TestFleet has three instances behind a load balancer: they keep one set of limits, do
// each job once, and never fall behind each other.
func TestFleet(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.restarted(map[string]string{"JOB_INTERVAL": "50ms"}, func() {
		w.exec(`insert into sync_runs (sync_id, dry_run, status, started_at, seen_at) values ('SYN-today', false, 'done', now(), now())`) // so none is on record
	})
	instances := w.fleet()

	w.Run("two hundred sign-ins of an account", func() {
		email, _ := w.signedIn()
		w.exec(`delete from rate_limits where key = $1`, loginLimit(email).Key)
		asked := w.kc.count("token")
		got := tally(w.at([]string{w.url}, slices.Repeat([]call{signingIn(email, password)}, 200)...))
		if asked = w.kc.count("token") - asked; asked != 20 || got["429 too-many-requests"] != 180 || got["200"]+got["503 unavailable"] != 20 {
			w.Errorf("%d have reached Keycloak: %v", asked, got)
		}
		w.straysDie()
	})

	w.Run("two hundred requests from an address", func() {
		var calls []call
		for i, prefix := range slices.Repeat([]string{strings.TrimSuffix(newAddress(), ":1")}, 200) {
			calls = append(calls, forgetting("nobody"))
			calls[i].from = fmt.Sprintf("%s:%x", prefix, i+1)
		}
		if got := tally(w.at([]string{w.url}, calls...)); got["400 invalid-request"] != onForgot.N || got["429 too-many-requests"] != 200-onForgot.N {
			w.Errorf("%v", got)
		}
	})

	w.Run("each registration expires once", func() {
		var emails []string
		for range 12 {
			emails = append(emails, newEmail())
			registered(w, emails[len(emails)-1])
		}
		deleted := w.kc.count("delete_user")
		w.exec(`update user_registrations set expires_at = now(), due_at = now() where email = any($1)`, emails)
		w.settle()
		if got := w.value(`select concat_ws(' ', count(*) filter (where action = 'registration.expired'), count(*) filter (where action = 'user.remove'), count(distinct target))
			from audit_log where action in ('registration.expired', 'user.remove') and outcome = 'ok'`); got != "12 12 24" {
			w.Errorf("on record: %s", got)
		}
		if deleted = w.kc.count("delete_user") - deleted; deleted != 12 {
			w.Errorf("%d users were deleted in Keycloak", deleted)
		}
	})

	admin := w.signsIn(w.administrator())
	w.Run("each invitation is mailed once, and each change made once", func() {
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
		w.settle()
		w.kc.on("^assign_user ", lost)
		for _, email := range emails {
			w.wants(w.do(managing(admin, "PATCH", "/"+w.userOf(email), body{"network_id": "N1"})), 200, "")
		}
		w.kc.on("^assign_user ", 0)
		assigned := w.kc.count("assign_user")
		w.settle()
		if assigned = w.kc.count("assign_user") - assigned; assigned != 12 {
			w.Errorf("%d changes have reached Keycloak", assigned)
		}
		for _, email := range emails {
			w.agree(w.userOf(email))
			if n := len(w.mail.To(email)); n != 1 {
				w.Errorf("%s got %d mails", email, n)
			}
		}
		if got := w.value(`select concat_ws(' ', count(*), count(distinct target)) from audit_log where action = 'user.invite' and outcome = 'ok'`); got != "12 12" {
			w.Errorf("on record: %s", got)
		}
	})

	// The older state never overtakes the newer one, however slow Keycloak is.
	w.Run("two changes of a user", func() {
		for _, after := range []bool{false, true} {
			id := w.invited(admin, newEmail())
			there, release := w.kc.holdAt("^assign_user ", after)
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
			change(0, body{"role": "operator", "network_id": "N1", "station_id": "S1", "first_name": "Grace"})
			<-there
			change(1, body{"role": "partner", "station_id": "", "last_name": "Hopper"})
			w.eventually("the second one is ours", 10*time.Second, func() bool { return w.value(`select role from users where user_id = $1`, id) == "partner" })
			release()
			start := time.Now()
			all.Wait()
			if took := time.Since(start); took > 3*time.Second {
				w.Errorf("they wait for each other: %v", took)
			}
			for _, a := range answers {
				w.wants(a, 200, "")
			}
			w.settle()
			w.agree(id)
			if got := w.value(`select concat_ws(' ', role, network_id, station_id, first_name, last_name) from users where user_id = $1`, id); got != "partner N1  Grace Hopper" {
				w.Error(got)
			}
		}
	})
}

// TestFleetRevocations measures how long after its answer a change is known to all three,
// also when they have just lost every connection to PostgreSQL. It fails beyond a second.
func TestFleetRevocations(t *testing.T) {
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
			next := w.refreshed(a)
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
			w.eventually("the change is made", 10*time.Second, func() bool {
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
			if slowest := slices.Max(took); slowest > time.Second {
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
	channelsUp := func() {
		for _, v := range instances {
			w.eventually("the channel is up", 15*time.Second, func() bool {
				a, err := w.send("http://"+v.management, call{path: "/metrics"})
				return err == nil && strings.Contains(string(a.Body), "\nwithdrawal_channel_up 1\n")
			})
		}
	}
	for range 2 {
		round("as usual", func() {})
	}
	for range 2 {
		channelsUp()
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

// invited is the id of a user that an administrator has just created.
func (w *env) invited(admin answer, email string) (id string) {
	w.Helper()
	a := w.do(managing(admin, "POST", "", body{"email": email}))
	if w.wants(a, 201, ""); a.text("invitation_email") != "sent" {
		w.Fatal(a)
	}
	return a.text("user_id")
}

// joined is the sign-in of a user whom an administrator has created, with an e-mail
// address that was confirmed and a password as if by the invitation's link.
func (w *env) joined(admin answer, email string) answer {
	w.Helper()
	id := w.invited(admin, email)
	w.keycloakAdmin("PUT", "/users/"+w.value(`select keycloak_id from users where user_id = $1`, id), body{"emailVerified": true, "requiredActions": []string{},
		"credentials": []body{{"type": "password", "value": password}}}, nil)
	return w.signsIn(email)
}

// invitations fails unless a user was invited once, by as many mails.
func (w *env) invitations(email string, mails ...int) {
	w.Helper()
	n := len(w.mail.To(email))
	if !slices.Contains(mails, n) {
		w.Errorf("%s got %d mails, not %v", email, n, mails)
	}
	for _, m := range w.mail.To(email) {
		if !strings.Contains(m.Text, "/login-actions/action-token?key=") {
			w.Errorf("no invitation:\n%s", m.Text)
		}
	}
	if got := w.value(`select concat_ws(' ', count(*), (select invitation_due from users where user_id = $1)) from audit_log
		where target = $1 and action = 'user.invite' and outcome = 'ok'`, w.userOf(email)); n > 0 && got != "1 f" {
		w.Errorf("%s: invitations on record, and still due: %s", email, got)
	}
}

// agree fails unless Keycloak's user is as ours: role, scope, names, and whether it may
// sign in; and there is no second one.
func (w *env) agree(id string) {
	w.Helper()
	ours := w.value(`select concat_ws('|', keycloak_id, lower(username), role, coalesce(nullif(network_id, ''), 'X'), coalesce(nullif(station_id, ''), 'X'),
		coalesce(first_name, ''), coalesce(last_name, ''), is_active::text, (due_at is null)::text) from users where user_id = $1`, id)
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
	theirs := []string{u.ID, u.Username}
	for _, name := range []string{attrRoles, attrNetworkID, attrStationID} {
		theirs = append(theirs, strings.Join(u.Attributes[name], ","))
	}
	theirs = append(theirs, u.FirstName, u.LastName, fmt.Sprint(u.Enabled), "true")
	if got := strings.Join(theirs, "|"); got != ours {
		w.Errorf("%s: Keycloak has %s\nand we %s", id, got, ours)
	}
}
