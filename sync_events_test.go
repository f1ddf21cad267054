package main

import (
	"fmt"
	"html"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestSyncEvents: what others change in Keycloak arrives within seconds.
func TestSyncEvents(t *testing.T) {
	t.Parallel()        // it waits for Keycloak most of the time
	w := newEnv(t, nil) // with JOB_INTERVAL=1s
	w.Run("e-mail and names", w.eventsProfile)
	w.Run("Keycloak's cache is late", w.eventsStale)
	w.Run("disabled", w.eventsDisabled)
	w.Run("created and deleted", w.eventsDeleted)
	w.Run("a role", w.eventsRole)
	w.Run("by the person", w.eventsPerson)
}

// arrives waits until the row of a user in Keycloak fulfils a condition.
func (w *env) arrives(id, condition string, args ...any) {
	w.Helper()
	w.eventually(condition, time.Minute, func() bool {
		return w.value(`select (exists (select from users where keycloak_id = $1 and `+condition+`))::text`,
			append([]any{id}, args...)...) == "true"
	})
}

func (w *env) eventsProfile() {
	email, next := newEmail(), newEmail()
	w.account(email)
	id := w.keycloakID(email)
	w.keycloakAdmin("PUT", "/users/"+id, body{"email": next, "firstName": "Grace"}, nil)
	w.arrives(id, `email = $2 and first_name = 'Grace'`, next)
	w.keycloakAdmin("PUT", "/users/"+id, body{"email": newEmail(), "emailVerified": false}, nil)
	w.arrives(id, `not is_verified`)
	w.keycloakAdmin("PUT", "/users/"+id, body{"emailVerified": true}, nil)
	w.arrives(id, `is_verified`)
}

// eventsStale: Keycloak commits a change, and its event, before it drops the user from its cache. One read in a hundred
// right after the event is stale (seen with a loop of 1,500 changes).
func (w *env) eventsStale() {
	email := newEmail()
	w.account(email)
	id := w.keycloakID(email)
	w.keycloakAdmin("PUT", "/users/"+id, body{"firstName": "Grace"}, nil)
	w.arrives(id, `first_name = 'Grace'`)
	w.kc.on("get_user .*"+id, stale)
	w.keycloakAdmin("PUT", "/users/"+id, body{"firstName": "Ada"}, nil)
	read := w.kc.count("list_events")
	w.eventually("the event is read", time.Minute, func() bool { return w.kc.count("list_events") > read+4 })
	w.waitUntilIdle()
	w.kc.on("get_user .*"+id, 0)
	w.arrives(id, `first_name = 'Ada'`)
}

func (w *env) eventsDisabled() {
	email, a := w.signedIn()
	id, user := w.keycloakID(email), w.userOf(email)
	w.keycloakAdmin("PUT", "/users/"+id, body{"enabled": false}, nil)
	w.arrives(id, `not is_active`)
	w.wants(w.do(refreshing(a.text("refresh_token"))), 401, "invalid-token")
	w.keycloakAdmin("PUT", "/users/"+id, body{"enabled": true}, nil) // only restore does
	w.eventually("disabled again in Keycloak", time.Minute,
		func() bool { return w.fromKeycloak(id)["enabled"] == false })
	w.value(`select audit_id from audit_log where actor = 'system:sync' and action = 'user.sync' and target = $1`, user)
	w.wants(w.as(w.signsIn(w.administrator()), "POST", "/api/v1/users/"+user+"/restore"), 200, "")
	w.signsIn(email)
}

func (w *env) eventsDeleted() {
	email := w.createsUser(body{"attributes": body{attrRoles: []string{roleAdmin}}})
	id := w.inKeycloak(email)[0]
	w.arrives(id, `email = $2 and role = 'user'`, email)
	w.eventually("Keycloak has its role", time.Minute, func() bool { return len(w.outOfSync()) == 0 })
	w.keycloakAdmin("DELETE", "/users/"+id, nil, nil)
	w.arrives(id, `not is_active`)
	admin := w.signsIn(w.administrator())
	w.wants(w.as(admin, "POST", "/api/v1/users/"+w.userOf(email)+"/restore"), 409, "user-gone")
	w.wants(w.do(managing(admin, "POST", "", body{"email": email})), 201, "") // anew
}

func (w *env) eventsRole() {
	email, before := w.signedIn()
	id := w.keycloakID(email)
	w.edits(id, body{attrRoles: []string{roleAdmin}})
	meanwhile := w.refreshed(before)
	w.eventually("reverted", time.Minute, func() bool {
		return cmp.Equal(w.fromKeycloak(id)["attributes"].(body)[attrRoles], []any{roleUser})
	})
	if slices.Equal(unpacked(meanwhile.text("access_token"), 1)["roles"].([]any), []any{roleAdmin}) {
		w.eventually("the token is refused", 5*time.Second, func() bool {
			return w.do(bearing(validatePath, meanwhile.text("access_token"))).Status == 401
		})
	}
	w.wants(w.do(bearing(validatePath, w.refreshed(meanwhile).text("access_token"))), 200, "")
}

func (w *env) eventsPerson() {
	email := newEmail()
	w.account(email)
	id := w.keycloakID(email)
	w.keycloakAdmin("PUT", "/users/"+id, body{"requiredActions": []string{"UPDATE_PROFILE"}}, nil)
	p := w.person()
	a := p.fillsIn(p.visit(p.begins("/"), call{}), url.Values{"username": {email}, "password": {password}})
	p.fillsIn(p.visit(a.Header.Get("Location"), call{}),
		url.Values{"username": {email}, "email": {email}, "firstName": {"Grace"}, "lastName": {"Hopper"}})
	w.arrives(id, `first_name = 'Grace' and last_name = 'Hopper'`)
	w.straysDie()
}

// fillsIn sends the form of a page of Keycloak.
func (p *person) fillsIn(page answer, form url.Values) answer {
	p.Helper()
	action := formAction.FindSubmatch(page.Body)
	if action == nil {
		p.Fatalf("there is no form: %v", page)
	}
	return p.visit(html.UnescapeString(string(action[1])), call{method: "POST", form: form})
}

// TestSyncEventsFaults has events read by hand: no instance runs jobs.
func TestSyncEventsFaults(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.command("jobs") // from now on
	w.Run("our own", w.eventsOwn)
	w.Run("a user whom Keycloak does not show", w.eventsNotShown)
	w.Run("names, while our change is pending", w.eventsPending)
	w.Run("a cursor in the future", w.eventsFuture)
	w.Run("more than a page", w.eventsPages)
}

func (w *env) eventsOwn() {
	w.account(newEmail())
	looked := w.kc.count("get_user")
	w.command("jobs")
	if n := w.kc.count("get_user") - looked; n != 0 {
		w.Errorf("%d users were looked at", n)
	}
}

func (w *env) firstName(email string) string {
	w.Helper()
	return w.value(`select coalesce(first_name, '') from users where email = $1`, email)
}

// eventsNotShown has Keycloak fail for one user: the others go on.
func (w *env) eventsNotShown() {
	broken, other := newEmail(), newEmail()
	for _, email := range []string{broken, other} {
		w.account(email)
		w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"firstName": "Grace"}, nil)
	}
	fault := "^get_user .*" + w.keycloakID(broken)
	w.kc.on(fault, failing)
	w.command("jobs")
	task := w.value(`select concat_ws(' ', attempts, last_error) from tasks where task_id = $1`,
		kcTask(w.keycloakID(broken)))
	if got := w.firstName(broken) + w.firstName(other); got != "Grace" || task != "1 unavailable" {
		w.Errorf("the names are %q, the task is %s", got, task)
	}
	w.kc.on(fault, 0)
	w.command("jobs")
	if got := w.firstName(broken); got != "Grace" {
		w.Errorf("the name is %q", got)
	}
}

// eventsPending changes names in Keycloak while our change of the role has not reached it.
func (w *env) eventsPending() {
	email := newEmail()
	w.account(email)
	id, user := w.keycloakID(email), w.userOf(email)
	admin := w.signsIn(w.administrator())
	w.kc.on("^push_user ", lost)
	w.wants(w.do(managing(admin, "PATCH", "/"+user, body{"role": roleOperator, "network_id": "N1",
		"station_id": "S1"})), 200, "")
	w.keycloakAdmin("PUT", "/users/"+id, body{"email": email, "username": email, "firstName": "Grace",
		"lastName": "Hopper"}, nil)
	w.command("jobs") // has the names, and can't push
	w.kc.on("^push_user ", 0)
	w.command("jobs")
	if got := w.value(`select concat_ws(' ', first_name, last_name, role, network_id, station_id) from users
		where user_id = $1`, user); got != "Grace Hopper operator N1 S1" {
		w.Errorf("PostgreSQL has %s", got)
	}
	w.agree(user)
	if got := w.value(`select string_agg(action, ' ' order by at) from audit_log where target = $1
		and action like 'user.%'`, user); got != "user.create user.update user.sync" {
		w.Errorf("audited: %s", got)
	}
}

func (w *env) eventsFuture() {
	email := newEmail()
	w.account(email)
	w.exec(`update sync_cursor set admin_at = $1, user_at = $1`, time.Now().Add(time.Hour).UnixMilli())
	w.command("jobs")
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"firstName": "Grace"}, nil)
	w.command("jobs")
	if got := w.firstName(email); got != "Grace" {
		w.Errorf("the name is %s", got)
	}
}

// eventsPages has more events than Keycloak lists at once. The next page begins with the last
// event of the one before.
func (w *env) eventsPages() {
	const users, n = 4, eventsPage/4 + 5
	var all sync.WaitGroup
	for range users {
		paths := w.credentials(n)
		all.Go(func() {
			for _, path := range paths {
				w.keycloakAdmin("DELETE", path, nil, nil)
			}
		})
	}
	all.Wait()
	w.command("jobs")
	if got := w.credentialChanges(); got != fmt.Sprint(users*n, " ", users*n) {
		w.Errorf("audited (times, events) %s, not %d", got, users*n)
	}
}

// credentials imports a user with n one-time codes in Keycloak, and returns their paths: to
// remove one is an event that costs little.
func (w *env) credentials(n int) (paths []string) {
	w.Helper()
	email := newEmail()
	code := body{"type": "otp", "secretData": `{"value":"secret"}`,
		"credentialData": `{"subType":"totp","digits":6,"counter":0,"period":30,"algorithm":"HmacSHA1"}`}
	w.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": []body{{"username": email,
		"email":   email,
		"enabled": true, "emailVerified": true, "credentials": slices.Repeat([]body{code}, n)}}}, nil)
	id := w.inKeycloak(email)[0]
	var list []struct{ ID string }
	w.keycloakAdmin("GET", "/users/"+id+"/credentials", nil, &list)
	for _, c := range list {
		paths = append(paths, "/users/"+id+"/credentials/"+c.ID)
	}
	return paths
}

// credentialChanges says how many are audited, and of how many events.
func (w *env) credentialChanges() string {
	w.Helper()
	return w.value(`select count(*)::text || ' ' || count(distinct details->>'event') from audit_log
		where action = 'credential.change'`)
}

// TestSyncEventsOnce: nothing is lost and nothing done twice, whoever dies.
func TestSyncEventsOnce(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	binary := buildBinary(t)
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "SYNC_MAX_SHARE": "100"}, newSeeds().inKeycloak(0, 1)...)
	w.command("jobs") // from now on
	const n, rounds = 120, 6
	credentials := w.credentials(rounds)
	s := newSeeds()
	w.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": s.inKeycloak(1, 1+n)},
		nil) // which tells of no user
	var edits sync.WaitGroup
	for part := range 4 { // some in the same millisecond
		edits.Go(func() {
			for i := part; i < n; i += 4 {
				w.keycloakAdmin("PUT", "/users/"+s.keycloakID(1+i), body{"firstName": "Ada"}, nil)
			}
		})
	}
	edits.Wait()
	for kill := range rounds {
		w.keycloakAdmin("DELETE", credentials[kill], nil, nil)
		for i := range 20 {
			w.keycloakAdmin("PUT", "/users/"+s.keycloakID(1+20*kill+i), body{"firstName": fmt.Sprint("Grace ",
				kill)}, nil)
		}
		w.killed(binary, kill)
	}
	edited := time.Now()
	v, _ := w.another(map[string]string{"JOB_INTERVAL": "50ms"})
	w.another(map[string]string{"JOB_INTERVAL": "50ms"})
	v.eventually("all are in PostgreSQL", 90*time.Second, func() bool {
		return w.value(`select count(*)::text from users where keycloak_id like $1 || '%'`, string(s)) == fmt.Sprint(n)
	})
	v.eventually("all are in sync", 60*time.Second, func() bool { return len(w.outOfSync()) == 0 })
	v.eventually("nobody is looked at again", 2*eventsOverlap, func() bool { return time.Since(edited) > eventsOverlap+5*time.Second })
	v.waitUntilIdle()
	if got := w.value(`select coalesce(string_agg(n || ' ' || action, ', '), '') from (select target, action,
		count(*) n from audit_log
		where action in ('user.import', 'user.sync', 'user.overwrite') group by 1, 2
			having count(*) > 1) x`); got != "" {
		w.Errorf("done twice: %s", got)
	}
	if got := w.credentialChanges(); got != fmt.Sprint(rounds, " ", rounds) {
		w.Errorf("changes of credentials are audited (times, events) %s, not %d", got, rounds)
	}
}

// killed has two instances read events, and kills both: in every other round while Keycloak's
// answer is on its way.
func (w *env) killed(binary string, round int) {
	there, release := (<-chan struct{})(nil), func() {}
	if round%2 == 1 {
		there, release = w.kc.holdAt("^list_events ", true)
	}
	p := w.spawn(binary, map[string]string{"JOB_INTERVAL": "20ms"})
	q := w.spawn(binary, map[string]string{"JOB_INTERVAL": "20ms"})
	if there != nil {
		<-there
	} else {
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
	}
	w.end(p, syscall.SIGKILL)
	w.end(q, syscall.SIGKILL)
	release()
	w.exec(`update tasks set locked_until = now() where locked_until is not null`) // the locks of the dead have ended
}

// TestSyncEventsAudited: what happens at Keycloak itself is in the audit log once, with who did
// it to whom; what this service does is not in it again.
func TestSyncEventsAudited(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "PUBLIC_URL": "http://localhost:3000",
		"CORS_ALLOWED_ORIGINS": app})
	deeds := []struct {
		name string
		do   func(email string)
		want string // the entries: actor > target, action, outcome, reason, type of the event
	}{
		{name: "sign-in by this service", do: func(email string) { w.signsIn(email) }},
		{name: "failed sign-in by this service", do: func(email string) {
			w.wants(w.login(email, "wrong"), 401, "invalid-credentials")
		}},
		{name: "sign-in by the code flow", do: w.signsInByCodeFlow},
		{name: "direct grant", do: w.grants, want: "user > user keycloak.login ok LOGIN"},
		{name: "sign-in page", do: w.signsInAtKeycloak, want: "user > user keycloak.login ok LOGIN"},
		{name: "failed sign-in page", do: w.failsAtKeycloak,
			want: "anonymous > user keycloak.login refused invalid-credentials LOGIN_ERROR"},
		{name: "administrator's reset", do: w.resetByAdmin, want: "keycloak:admin > user credential.change ok ADMIN"},
		{name: "administrator's removal", do: w.removedByAdmin,
			want: "keycloak:admin > user credential.change ok ADMIN"},
		{name: "forgotten password", do: w.choosesByLink, want: "user > user credential.change ok UPDATE_CREDENTIAL"},
		{name: "forgotten password, Keycloak's own link", do: w.choosesByKeycloaksLink,
			want: "user > user credential.change ok UPDATE_CREDENTIAL, user > user keycloak.login ok LOGIN"},
		{name: "password changed at the sign-in", do: w.choosesAtSignIn,
			want: "user > user credential.change ok UPDATE_CREDENTIAL, user > user keycloak.login ok LOGIN"},
	}
	var emails []string
	for range deeds {
		email := newEmail()
		w.account(email)
		emails = append(emails, email)
	}
	w.command("jobs") // what has made the accounts
	for i, deed := range deeds {
		w.Run(deed.name, func() { deed.do(emails[i]) })
	}
	w.failsAtKeycloak("nobody")
	last := w.inKeycloak(w.createsUser(nil))[0] // without a row: its task is locked
	w.exec(`insert into tasks (task_id, due_at, locked_by, locked_until) values ($1, now(), 'another', 'infinity')`,
		kcTask(last))
	w.grants(w.fromKeycloak(last)["email"].(string))
	w.eventually("all events are read", time.Minute, func() bool {
		w.command("jobs")
		return w.value(`select coalesce(string_agg(concat_ws(' ', actor, action, target), ', '), '') from audit_log
			where details->>'keycloak_id' = $1`, last) == "anonymous keycloak.login "
	})
	w.command("jobs") // comes to them again
	for i, deed := range deeds {
		if got := w.atKeycloak(w.userOf(emails[i])); got != deed.want {
			w.Errorf("%s: audited %q, not %q", deed.name, got, deed.want)
		}
	}
	if got := w.value(`select string_agg(actor || ' ' || outcome, ', ') from audit_log
		where action = 'keycloak.login' and target = '' and not details ? 'keycloak_id'`); got != "anonymous refused" {
		w.Errorf("nobody's sign-in is audited as %s", got)
	}
	w.exec(`update tasks set locked_by = null, locked_until = null where task_id = $1`, kcTask(last))
	w.command("jobs")
	w.straysDie()
}

// atKeycloak are the entries about a user that come from Keycloak's events.
func (w *env) atKeycloak(user string) string {
	w.Helper()
	text := w.value(`select coalesce(string_agg(concat_ws(' ', actor, '>', target, action, outcome, nullif(reason,
		''), details->>'type'), ', ' order by action), '')
		from audit_log where details ? 'event' and target = $1`, user)
	return strings.ReplaceAll(text, user, "user")
}

func (w *env) signsInByCodeFlow(email string) {
	p := w.person()
	p.isBack(p.comesBack(p.signsIn(p.begins(app), email)), app)
}

// grants is a direct grant at Keycloak, past this service.
func (w *env) grants(email string) {
	w.Helper()
	w.grant(url.Values{"grant_type": {"password"}, "username": {email}, "password": {password}})
}

// signsInAtKeycloak does not come back to this service.
func (w *env) signsInAtKeycloak(email string) {
	p := w.person()
	p.signsIn(p.begins(app), email)
}

func (w *env) failsAtKeycloak(email string) {
	p := w.person()
	p.fillsIn(p.visit(p.begins(app), call{}), url.Values{"username": {email}, "password": {"wrong"}})
}

func (w *env) resetByAdmin(email string) {
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email)+"/reset-password", body{"type": "password",
		"value": password + "2"}, nil)
}

func (w *env) removedByAdmin(email string) {
	path := "/users/" + w.keycloakID(email) + "/credentials"
	var list []struct{ ID string }
	w.keycloakAdmin("GET", path, nil, &list)
	w.keycloakAdmin("DELETE", path+"/"+list[0].ID, nil, nil)
}

// choosesByLink follows the link of this service's forgotten password.
func (w *env) choosesByLink(email string) {
	w.wants(w.do(forgetting(email)), 202, "")
	w.command("jobs") // mails it
	w.person().chooses(w.resetLink(email, 2))
}

// resetLink is the link of Keycloak in the n-th mail to an address.
func (w *env) resetLink(email string, n int) string {
	w.Helper()
	m, err := w.mail.WaitFor(w.Context(), email, n)
	if err != nil {
		w.Fatal(err)
	}
	link := regexp.MustCompile(`https?://\S+/login-actions/action-token\?\S+`).FindString(m.Text)
	if link == "" {
		w.Fatalf("the mail has no link:\n%s", m.Text)
	}
	return link
}

// chooses goes from a link of Keycloak to its form, and chooses a password.
func (p *person) chooses(link string) {
	p.Helper()
	a := p.visit(link, call{})
	for range 5 {
		body := string(a.Body)
		next := regexp.MustCompile(`href="([^"]*/login-actions/[^"]*key=[^"]*)"`).FindStringSubmatch(body)
		switch {
		case a.Header.Get("Location") != "":
			a = p.visit(a.Header.Get("Location"), call{})
		case strings.Contains(body, "password-new"):
			p.fillsIn(a, url.Values{"password-new": {password + "2"}, "password-confirm": {password + "2"}})
			return
		case next != nil: // "click here to proceed"
			a = p.visit(html.UnescapeString(next[1]), call{})
		default:
			p.Fatalf("there is no form: %v", a)
		}
	}
}

// choosesByKeycloaksLink asks for a link on Keycloak's own page.
func (w *env) choosesByKeycloaksLink(email string) {
	p := w.person()
	a := p.visit(p.begins(app), call{})
	forgot := regexp.MustCompile(`href="([^"]*reset-credentials[^"]*)"`).FindSubmatch(a.Body)
	if forgot == nil {
		w.Fatalf("the page has no such link: %v", a)
	}
	p.fillsIn(p.visit(services.KeycloakURL+html.UnescapeString(string(forgot[1])), call{}),
		url.Values{"username": {email}})
	p.chooses(w.resetLink(email, 2))
}

func (w *env) choosesAtSignIn(email string) {
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"requiredActions": []string{"UPDATE_PASSWORD"}}, nil)
	p := w.person()
	a := p.fillsIn(p.visit(p.begins(app), call{}), url.Values{"username": {email}, "password": {password}})
	p.chooses(a.Header.Get("Location"))
}
