package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
)

// passEnv is an env in which both stores have six hundred users: two pages.
type passEnv struct {
	*env
	seeds
	admin string // whose address it is
}

const passUsers = 600

func newPasses(t *testing.T, settings map[string]string, edit func(s seeds, users []body)) *passEnv {
	s := newSeeds()
	users := s.inKeycloak(0, passUsers)
	if edit != nil {
		edit(s, users)
	}
	p := &passEnv{env: newEnv(t, settings, users...), seeds: s}
	s.inPostgreSQL(p.env, 0, passUsers)
	p.admin = p.administrator()
	return p
}

// begins asks for a full pass; each administrator's request has a token of its own, as they
// end while a test is slow.
func (p *passEnv) begins(dry bool) call {
	p.Helper()
	return p.asksFor(p.signsIn(p.admin), dry)
}

func (p *passEnv) asksFor(a answer, dry bool) call {
	r := authorized(a.text("access_token"), "POST", "/api/v1/sync")
	r.json = body{"dry_run": dry}
	return r
}

// ended waits for the end of a full pass. While PostgreSQL is away there is no answer.
func (p *passEnv) ended(id string) (a answer) {
	p.Helper()
	admin := p.signsIn(p.admin)
	p.eventually("the pass has ended", 90*time.Second, func() bool {
		a = p.as(admin, "GET", "/api/v1/sync/"+id)
		return a.Status == 200 && a.text("status") != "running"
	})
	return a
}

// passTask ends the lock of a dead process on the full pass, and makes it due.
func (p *passEnv) passTask() {
	p.Helper()
	p.exec(`update tasks set due_at = now(), locked_by = null, locked_until = null where task_id = 'job:sync'`)
}

// TestSyncPass has full passes by hand and by the clock; no instance runs jobs.
func TestSyncPass(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	p := newPasses(t, map[string]string{"JOB_INTERVAL": "0"}, func(_ seeds, users []body) {
		for i := range 60 {
			users[i]["firstName"] = "Grace"
			users[60+i]["attributes"].(body)[attrRoles] = []string{roleAdmin}
		}
	})
	p.Run("who may", p.whoMay)
	p.Run("the command is killed again and again", p.commandKilled)
	p.Run("once a day", p.onceADay)
	p.Run("killed, begun anew", p.begunAnew)
	p.Run("stopped, taken on", p.takenOn)
	p.Run("too many at once", p.tooMany)
	p.Run("the wrong realm", p.wrongRealm)
	p.Run("a user whom Keycloak does not show", p.notCompared)
}

func (p *passEnv) whoMay() {
	_, other := p.signedIn()
	admin := p.signsIn(p.admin)
	p.wants(p.do(p.asksFor(other, true)), 403, "forbidden")
	p.wants(p.as(other, "GET", "/api/v1/sync/SYN-0123456789abcdef"), 403, "forbidden")
	p.wants(p.do(call{method: "POST", path: "/api/v1/sync", json: body{}}), 401, "unauthorized")
	p.wants(p.as(admin, "GET", "/api/v1/sync/SYN-0123456789abcdef"), 404, "not-found")
	p.wants(p.as(admin, "GET", "/api/v1/sync/SYN-0"), 404, "not-found")
}

// commandKilled kills the command, each time a little later, until it comes through.
func (p *passEnv) commandKilled() {
	binary := buildBinary(p.TB)
	kills, failures := 0, 0
	for done := false; !done; {
		cmd := exec.Command(binary, "sync")
		for name, value := range p.vars {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		cmd.Stderr = p.logs
		if err := cmd.Start(); err != nil {
			p.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		timeout := time.Duration(200+rand.IntN(600)) * time.Millisecond
		if kills == 6 {
			timeout = 2 * time.Minute
		}
		select {
		case err := <-ended:
			if done = err == nil; !done {
				failures++
			}
			if failures > 3 { // Keycloak may be slow: it still does what the dead have asked for
				p.Fatalf("it ends with %v", err)
			}
		case <-time.After(timeout):
			cmd.Process.Kill()
			<-ended
			kills++
			p.exec(`update tasks set locked_until = now() where locked_until is not null`) // its locks have ended
		}
	}
	p.command("jobs") // what was due
	if wrong := p.outOfSync(); len(wrong) > 0 {
		p.Errorf("after %d kills: %s", kills, strings.Join(wrong, "\n"))
	}
	if got := p.value(`select count(*)::text || ' ' || count(distinct target) from audit_log
		where action = 'user.sync'`); got != "60 60" {
		p.Errorf("user.sync is audited (times, users) %s", got)
	}
	p.Logf("%d kills", kills)
	if found, _, _, err := p.sync(nil, "-dry-run"); err != nil || len(found) > 0 {
		p.Errorf("%v %v", found, err)
	}
}

func (p *passEnv) onceADay() {
	runs := func() string {
		p.passTask()
		p.command("jobs")
		return p.value(`select count(*)::text from sync_runs where not dry_run`)
	}
	before := runs()
	if runs() != before {
		p.Error("twice a day")
	}
	p.exec(`update sync_runs set started_at = started_at - interval '25 hours',
		ended_at = ended_at - interval '25 hours'`)
	if runs() == before {
		p.Error("not once a day")
	}
}

// begunAnew ends an instance in the middle of a pass; another makes it, under the same id.
func (p *passEnv) begunAnew() { p.endedInPass(syscall.SIGKILL) }
func (p *passEnv) takenOn()   { p.endedInPass(syscall.SIGTERM) }

func (p *passEnv) endedInPass(signal syscall.Signal) {
	first, release := p.kc.holdAt("^list_users ", false)
	a := p.do(p.begins(false))
	p.wants(a, 202, "")
	id := a.text("sync_id")
	dead := p.spawn(buildBinary(p.TB), map[string]string{"JOB_INTERVAL": "100ms"})
	<-first
	second, releaseSecond := p.kc.holdAt("^list_users ", false)
	release()
	<-second // the first page is compared
	p.end(dead, signal)
	releaseSecond()
	if a := p.as(p.signsIn(p.admin), "GET", "/api/v1/sync/"+id); a.text("status") != "running" {
		p.Errorf("it is %v", a)
	}
	runs := p.value(`select count(*)::text from sync_runs`)
	p.passTask()
	p.command("jobs")
	a = p.as(p.signsIn(p.admin), "GET", "/api/v1/sync/"+id)
	if a.text("status") != "done" || a.JSON["checked"] != a.JSON["total"] || a.JSON["checked"].(float64) < passUsers {
		p.Errorf("it is %v", a)
	}
	if got := p.value(`select count(*)::text from sync_runs`); got != runs {
		p.Errorf("%s runs, not %s", got, runs)
	}
	if got := p.value(`select string_agg(action, ' ' order by at) from audit_log where target = $1`,
		id); got != "sync.begin sync.end" {
		p.Errorf("audited: %s", got)
	}
}

func (p *passEnv) tooMany() {
	p.exec(`update users set is_active = false, deleted_at = now() where keycloak_id like $1 || '%'
		and keycloak_id > $2`,
		string(p.seeds), p.seeds.keycloakID(passUsers-80))
	before := p.localUsers()
	_, _, out, err := p.sync(nil)
	if err == nil || errors.Is(err, errDiffer) ||
		!strings.Contains(out, "aborted At least 61 users would be disabled or imported, and SYNC_MAX_SHARE allows 60.") {
		p.Errorf("%v: %s", err, out)
	}
	if diff := cmp.Diff(before, p.localUsers()); diff != "" {
		p.Error(diff)
	}
	if _, repaired, out, err := p.sync(map[string]string{"SYNC_MAX_SHARE": "100"}); err != nil ||
		repaired[diffDeleted] != 79 {
		p.Errorf("%v: %s", err, out)
	}
}

func (p *passEnv) wrongRealm() {
	empty := newEnv(p.TB, map[string]string{"JOB_INTERVAL": "0"})
	looked := empty.kc.count("get_user")
	_, _, out, err := p.sync(map[string]string{"KEYCLOAK_REALM": empty.realm, "KEYCLOAK_URL": empty.kc.url()})
	if err == nil || !strings.Contains(out, "aborted") {
		p.Errorf("%v: %s", err, out)
	}
	if n := empty.kc.count("get_user") - looked; n > 70 {
		p.Errorf("it took %d calls to notice", n)
	}
}

// notCompared has Keycloak fail for one user: that one is reported, the others go on.
func (p *passEnv) notCompared() {
	broken, other := p.seeds.keycloakID(1), p.seeds.keycloakID(2)
	for _, id := range []string{broken, other} {
		p.edits(id, body{attrRoles: []string{roleAdmin}})
	}
	p.kc.on("^get_user .*"+broken, failing)
	found, repaired, out, err := p.sync(nil)
	if !errors.Is(err, errDiffer) || !strings.Contains(out, descriptions[diffUnread]) || !strings.Contains(out,
		broken) {
		p.Errorf("%v: %s", err, out)
	}
	if diff := cmp.Diff(map[difference]int{diffUnread: 1, diffRole: 1}, found); diff != "" ||
		repaired[diffRole] != 1 || repaired[diffUnread] != 0 {
		p.Errorf("%s\n%s", diff, out)
	}
	p.kc.on("^get_user .*"+broken, 0)
	if found, repaired, out, err := p.sync(nil); err != nil || found[diffRole] != 1 || repaired[diffRole] != 1 {
		p.Errorf("%v: %s", err, out)
	}
}

// TestSyncPassQueue has full passes as the work of instances.
func TestSyncPassQueue(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	p := newPasses(t, map[string]string{"JOB_INTERVAL": "0"}, nil)
	v, _ := p.another(map[string]string{"JOB_INTERVAL": "100ms"})
	p.eventually("the daily pass is over", 60*time.Second, func() bool {
		return p.value(`select count(*)::text from sync_runs where status = 'done'`) == "1"
	})
	p.Run("one at a time, and how far it is", func() { p.oneAtATime(v) })
	p.Run("Keycloak is lost in the middle", p.keycloakLost)
	p.Run("PostgreSQL is lost in the middle", p.postgresLost)
	p.Run("Keycloak is lost for a moment", p.keycloakLostForAMoment)
}

func (p *passEnv) oneAtATime(v *env) {
	first, release := p.kc.holdAt("^list_users ", false)
	answers := p.at([]string{p.url, v.url}, p.begins(true), p.begins(true), p.begins(false))
	if got := tally(answers); got["202"] != 1 || got["409 sync-running"] != 2 {
		p.Fatalf("%v", got)
	}
	a := answers[slices.IndexFunc(answers, func(a answer) bool { return a.Status == 202 })]
	id := a.text("sync_id")
	if got := a.Header.Get("Location"); got != "/api/v1/sync/"+id {
		p.Errorf("Location: %s", got)
	}
	<-first
	second, releaseSecond := p.kc.holdAt("^list_users ", false)
	release()
	<-second
	admin := p.signsIn(p.admin)
	p.eventually("its progress", time.Minute, func() bool {
		a := p.as(admin, "GET", "/api/v1/sync/"+id)
		return a.text("status") == "running" && a.JSON["checked"] == float64(syncPage) &&
			a.JSON["total"] == float64(passUsers+1)
	})
	releaseSecond()
	if a := p.ended(id); a.text("status") != "done" || a.JSON["checked"] != float64(passUsers+1) {
		p.Errorf("at the end: %v", a)
	}
}

// inTheMiddle begins a dry run, and returns its id when it lists users.
func (p *passEnv) inTheMiddle() (id string, release func()) {
	there, release := p.kc.holdAt("^list_users ", false)
	a := p.do(p.begins(true))
	p.wants(a, 202, "")
	<-there
	return a.text("sync_id"), release
}

func (p *passEnv) keycloakLost() {
	id, release := p.inTheMiddle()
	if err := p.kc.close(); err != nil {
		p.Fatal(err)
	}
	release()
	ended := func() bool { return p.value(`select status from sync_runs where sync_id = $1`, id) != "running" }
	p.eventually("the pass has ended", 60*time.Second, ended)
	if err := p.kc.open(); err != nil {
		p.Fatal(err)
	}
	if a := p.ended(id); a.text("status") != "failed" {
		p.Errorf("it is %v", a)
	}
}

// postgresLost: nobody can say how it went, so it is begun anew.
func (p *passEnv) postgresLost() {
	id, release := p.inTheMiddle()
	if err := p.pg.close(); err != nil {
		p.Fatal(err)
	}
	release()
	if err := p.logs.waitFor(60*time.Second, func(text string) bool {
		return regexp.MustCompile(`"task: lock not released[^\n]*"task":"job:sync"`).MatchString(text)
	}); err != nil {
		p.Error(err)
	}
	if err := p.pg.open(); err != nil {
		p.Fatal(err)
	}
	p.eventually("PostgreSQL answers", time.Minute, func() bool { return p.login(p.admin, password).Status == 200 })
	p.passTask() // its lock has ended
	if a := p.ended(id); a.text("status") != "done" {
		p.Errorf("it is %v", a)
	}
}

func (p *passEnv) keycloakLostForAMoment() {
	r := p.begins(true)
	p.kc.on("^list_users ", lost)
	calls := p.kc.count("list_users")
	a := p.do(r)
	p.wants(a, 202, "")
	p.eventually("a call that fails", time.Minute, func() bool { return p.kc.count("list_users") > calls })
	p.kc.on("^list_users ", 0)
	if a := p.ended(a.text("sync_id")); a.text("status") != "done" {
		p.Errorf("it has failed: %v", a)
	}
}

// restored is an env whose database is put back to a copy that is older than Keycloak.
type restored struct {
	*env
	emails  map[string]string // of accounts, by what becomes of them
	moved   string            // address
	links   []link            // of registrations that are pending at the end
	session answer            // begun after the copy
}

// TestSyncRestored: a copy of the database that is older than Keycloak is put back.
func TestSyncRestored(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	r := &restored{env: newEnv(t, map[string]string{"JOB_INTERVAL": "0", "SYNC_MAX_SHARE": "100"}),
		emails: map[string]string{}}
	r.changes()
	found, repaired, out, err := r.sync(nil)
	t.Logf("%v\n%s", err, out)
	want := map[difference]int{diffUnknown: 4, diffProfile: 1, diffRole: 2, diffDisabled: 1, diffMissing: 1,
		diffDeleted: 1}
	for class, n := range want {
		if found[class] != n || repaired[class] != n {
			t.Errorf("%s: found %d, repaired %d, not %d", class, found[class], repaired[class], n)
		}
	}
	if !strings.Contains(out, descriptions[diffRole]) || !strings.Contains(out, descriptions[diffDeleted]) {
		t.Errorf("it does not say what it can't know: %s", out)
	}
	r.command("jobs")
	if found, _, out, err := r.sync(nil); err != nil || len(found) > 0 {
		t.Errorf("the second finds %s %v", out, err)
	}
	if wrong := r.outOfSync(); len(wrong) > 0 {
		t.Error(strings.Join(wrong, "\n"))
	}
	r.outcomes()
}

func (r *restored) id(name string) string { return r.userOf(r.emails[name]) }

// changes makes accounts, a copy of the database, and changes after it, and puts the copy back.
func (r *restored) changes() {
	for _, name := range []string{"stays", "moves", "promoted", "demoted", "deleted", "signs in", "restored",
		"deleted in Keycloak"} {
		r.emails[name] = newEmail()
		r.account(r.emails[name])
	}
	admin := r.signsIn(r.administrator())
	r.command("grant-admin", r.emails["demoted"])
	r.wants(r.as(admin, "DELETE", "/api/v1/users/"+r.id("restored")), 204, "")
	pending, mailedAgain := newEmail(), newEmail()
	before := registered(r.env, pending)
	registered(r.env, mailedAgain)
	r.wants(r.do(loggingOut(admin.text("refresh_token"))), 204, "")

	r.copyDatabase(r.db, r.db+"_copy")
	admin = r.signsIn(r.value(`select email from users where role = 'admin' and email <> $1`, r.emails["demoted"]))
	for _, name := range []string{"new", "newer"} {
		r.emails[name] = newEmail()
		r.account(r.emails[name])
	}
	after := registered(r.env, newEmail())
	r.register(newEmail())
	r.minuteLater(mailedAgain)
	r.exec(`delete from rate_limits`)
	r.register(mailedAgain)
	r.links = []link{before, after, r.readMail(mailedAgain, 2)}
	r.moved = newEmail()
	r.keycloakAdmin("PUT", "/users/"+r.keycloakID(r.emails["moves"]), body{"email": r.moved}, nil)
	r.keycloakAdmin("DELETE", "/users/"+r.keycloakID(r.emails["deleted in Keycloak"]), nil, nil)
	r.wants(r.do(managing(admin, "PATCH", "/"+r.id("promoted"), body{"role": roleOperator, "network_id": "NET-1",
		"station_id": "STA-1"})), 200, "")
	r.wants(r.do(managing(admin, "PATCH", "/"+r.id("demoted"), body{"role": roleUser})), 200, "")
	r.wants(r.as(admin, "DELETE", "/api/v1/users/"+r.id("deleted")), 204, "")
	r.wants(r.as(admin, "POST", "/api/v1/users/"+r.id("restored")+"/restore"), 200, "")
	r.session = r.signsIn(r.emails["signs in"])
	r.copyDatabase(r.db+"_copy", r.db)
}

func (r *restored) outcomes() {
	r.wants(r.do(refreshing(r.session.text("refresh_token"))), 401, "invalid-token")
	r.straysDie()
	for _, l := range r.links {
		r.wants(r.do(verifying(l)), 200, "")
	}
	for _, name := range []string{"new", "newer", "stays", "signs in"} {
		r.signsIn(r.emails[name])
	}
	r.signsIn(r.moved)
	r.wants(r.login(r.emails["deleted"], password), 403, "account-disabled")
	r.wants(r.login(r.emails["restored"], password), 403, "account-disabled") // nobody knows any more
	role := func(name string) string {
		return r.value(`select role || network_id from users where email = $1`, r.emails[name])
	}
	if got := role("promoted") + " " + role("demoted"); got != "user admin" {
		r.Errorf("the roles are not those of the copy: %s", got)
	}
	got := r.value(`select details->>'keycloak' from audit_log where action = 'user.overwrite' and target = $1`,
		r.id("promoted"))
	if !strings.Contains(got, roleOperator) || !strings.Contains(got, "NET-1") {
		r.Errorf("what Keycloak had is audited as %s", got)
	}
}

// copyDatabase makes a database of another's content, in its place, while no instance runs.
func (w *env) copyDatabase(from, to string) {
	w.Helper()
	w.restarted(nil, func() {
		w.pool.Reset()
		c, err := pgx.Connect(w.Context(), services.DatabaseURL("postgres"))
		if err != nil {
			w.Fatal(err)
		}
		defer c.Close(w.Context())
		w.eventually("the copy", time.Minute, func() bool {
			for _, sql := range []string{"drop database if exists " + to + " with (force)",
				"select pg_terminate_backend(pid) from pg_stat_activity where datname = '" + from + "'",
				fmt.Sprintf("create database %s template %s", to, from)} {
				if _, err := c.Exec(w.Context(), sql); err != nil {
					w.Logf("%s: %v", sql, err)
					return false
				}
			}
			return true
		})
	})
	if strings.HasSuffix(to, "_copy") {
		w.Cleanup(func() { services.DropDatabase(context.Background(), to) })
	}
}
