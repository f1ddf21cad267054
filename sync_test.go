package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// seeds are users that both stores have, made in great number at once: zz0000@seed.test,
// an operator of NET-1 and STA-1, zz0001@seed.test, a user, and so on in turn. The value is
// what their ids in Keycloak begin with.
type seeds string

func newSeeds() seeds {
	return seeds(gonanoid.MustGenerate("0123456789abcdef", 8) + "-0000-4000-8000-")
}

func (s seeds) keycloakID(n int) string { return fmt.Sprintf("%s%012d", s, n) }
func (s seeds) userID(n int) string     { return fmt.Sprintf("USR-%016d", n) }

// inKeycloak are those from first to before last, as Keycloak imports them.
func (s seeds) inKeycloak(first, last int) (users []body) {
	for n := first; n < last; n++ {
		role, network, station := roleUser, noScope, noScope
		if n%2 == 0 {
			role, network, station = roleOperator, "NET-1", "STA-1"
		}
		users = append(users, body{"id": s.keycloakID(n), "username": fmt.Sprintf("zz%04d", n),
			"email":     fmt.Sprintf("zz%04d@seed.test", n),
			"firstName": "First", "lastName": "Last", "enabled": true, "emailVerified": true,
			"attributes": body{attrUserID: []string{s.userID(n)}, attrRoles: []string{role},
				attrNetworkID: []string{network},
				attrStationID: []string{station}}})
	}
	return users
}

// inPostgreSQL writes their rows.
func (s seeds) inPostgreSQL(w *env, first, last int) {
	w.Helper()
	w.exec(`insert into users (user_id, keycloak_id, email, username, first_name, last_name, is_verified, role,
		network_id, station_id, source)
		select 'USR-' || lpad(n::text, 16, '0'), $1 || lpad(n::text, 12, '0'), 'ZZ' || lpad(n::text, greatest(4,
			length(n::text)), '0') || '@seed.test',
			'zz' || lpad(n::text, greatest(4, length(n::text)), '0'), 'First', 'Last', true,
				case when n % 2 = 0 then 'operator' else 'user' end,
			case when n % 2 = 0 then 'NET-1' else '' end, case when n % 2 = 0 then 'STA-1' else '' end, 'internal'
		from generate_series($2::int, $3::int - 1) n`, string(s), first, last)
	w.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome)
		select 'AUD-' || lpad(n::text, 16, '0'), now(), 'system:seed', 'user.create', 'USR-' || lpad(n::text, 16,
			'0'), 'ok'
		from generate_series($1::int, $2::int - 1) n`, first, last)
}

// keycloakUsersByID are all users of Keycloak, by id.
func (w *env) keycloakUsersByID() map[string]body {
	w.Helper()
	users := map[string]body{}
	for first := 0; ; first += 100 {
		var page []body
		w.keycloakAdmin("GET", fmt.Sprintf("/users?briefRepresentation=false&first=%d&max=100", first), nil, &page)
		for _, u := range page {
			users[u["id"].(string)] = u
		}
		if len(page) < 100 {
			return users
		}
	}
}

// localUsers are all users of PostgreSQL, by id in Keycloak.
func (w *env) localUsers() map[string]body {
	w.Helper()
	rows, _ := w.pool.Query(w.Context(), `select to_jsonb(u) from users u`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[body])
	if err != nil {
		w.Fatal(err)
	}
	users := map[string]body{}
	for _, u := range list {
		users[u["keycloak_id"].(string)] = u
	}
	return users
}

// outOfSync lists the users that the two stores don't agree on, but for those that wait for
// their confirmation.
func (w *env) outOfSync() (wrong []string) {
	w.Helper()
	local, remote := w.localUsers(), w.keycloakUsersByID()
	text := func(v any) string { s, _ := v.(string); return strings.ToLower(s) }
	for id := range remote {
		if local[id] == nil {
			wrong = append(wrong, "unknown in PostgreSQL: "+id)
		}
	}
	for id, u := range local {
		ku := remote[id]
		switch waits := u["is_verified"] == false; {
		case waits && ku != nil && ku["enabled"] == false:
			continue
		case ku == nil:
			if u["is_active"] == true {
				wrong = append(wrong, "missing in Keycloak: "+id)
			}
			continue
		}
		scope := func(name string) []any {
			if u[name] == "" {
				return []any{noScope}
			}
			return []any{u[name]}
		}
		want := body{"email": text(u["email"]), "username": text(u["username"]), "first": text(u["first_name"]),
			"last": text(u["last_name"]), "verified": u["is_verified"], "enabled": u["is_active"], attrUserID: []any{u["user_id"]},
			attrRoles: []any{u["role"]}, attrNetworkID: scope("network_id"), attrStationID: scope("station_id")}
		got := body{"email": text(ku["email"]), "username": text(ku["username"]), "first": text(ku["firstName"]),
			"last": text(ku["lastName"]), "verified": ku["emailVerified"], "enabled": ku["enabled"]}
		attributes, _ := ku["attributes"].(body)
		for _, name := range []string{attrUserID, attrRoles, attrNetworkID, attrStationID} {
			got[name] = attributes[name]
		}
		if diff := cmp.Diff(want, got); diff != "" {
			wrong = append(wrong, fmt.Sprintf("%s, in PostgreSQL (-) and in Keycloak (+): %s", id, diff))
		}
	}
	return wrong
}

// sync is the command; found and repaired are its report by class.
func (w *env) sync(settings map[string]string, args ...string) (found, repaired map[difference]int, out string, err error) {
	w.Helper()
	var stdout bytes.Buffer
	env := maps.Clone(w.vars)
	maps.Copy(env, settings)
	err = run(w.Context(), append([]string{"sync"}, args...), func(name string) string { return env[name] }, &stdout,
		w.logs)
	found, repaired = map[difference]int{}, map[difference]int{}
	line := regexp.MustCompile(`(?m)^(\w+) +(\d+) found +(\d+) repaired`)
	for _, m := range line.FindAllStringSubmatch(stdout.String(), -1) {
		found[difference(m[1])], _ = strconv.Atoi(m[2])
		repaired[difference(m[1])], _ = strconv.Atoi(m[3])
	}
	return found, repaired, stdout.String(), err
}

// command runs another subcommand, which must succeed. For "jobs" it stands in for waiting until
// the events are read again, and until tasks are tried again.
func (w *env) command(args ...string) {
	w.Helper()
	if args[0] == "jobs" {
		w.exec(`update tasks set due_at = now() where locked_by is null and (task_id = 'job:events'
			or task_id like 'kc:%')`)
	}
	if err := run(w.Context(), args, func(name string) string { return w.vars[name] }, new(bytes.Buffer),
		w.logs); err != nil {
		w.Fatalf("%v: %v", args, err)
	}
}

// buildBinary builds the service, for tests that kill it.
func buildBinary(t testing.TB) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "auth-service")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// keycloakID is the id in Keycloak of the user with an address.
func (w *env) keycloakID(email string) string {
	w.Helper()
	return w.value(`select keycloak_id from users where lower(email) = lower($1)`, email)
}

// fromKeycloak is Keycloak's user with an id.
func (w *env) fromKeycloak(id string) (ku body) {
	w.Helper()
	w.keycloakAdmin("GET", "/users/"+id, nil, &ku)
	return ku
}

// edits changes attributes in Keycloak, as an administrator there does.
func (w *env) edits(id string, attributes body) {
	w.Helper()
	ku := w.fromKeycloak(id)
	maps.Copy(ku["attributes"].(body), attributes)
	w.keycloakAdmin("PUT", "/users/"+id, ku, nil)
}

// createsUser creates a confirmed user in Keycloak, as an administrator there does, and returns
// its address.
func (w *env) createsUser(change body) (email string) {
	w.Helper()
	email = newEmail()
	u := body{"username": email, "email": email, "enabled": true, "emailVerified": true,
		"credentials": []body{{"type": "password", "value": password, "temporary": false}}}
	maps.Copy(u, change)
	w.keycloakAdmin("POST", "/users", u, nil)
	return email
}

// noEvents keeps those of Keycloak from being applied.
func (w *env) noEvents() {
	w.Helper()
	w.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = 'job:events'`)
}

// makesDue makes the registrations of an address due.
func (w *env) makesDue(email string) {
	w.Helper()
	w.exec(`update tasks set due_at = now() where task_id = (select registration_id from user_registrations
		where email = $1)`, email)
}

// inKeycloak returns the ids of Keycloak's users who have an address.
func (w *env) inKeycloak(email string) (ids []string) {
	w.Helper()
	var users []body
	w.keycloakAdmin("GET", "/users?exact=true&email="+url.QueryEscape(email), nil, &users)
	for _, u := range users {
		ids = append(ids, u["id"].(string))
	}
	return ids
}

// drift is what others have done to some of the seeds.
type drift struct {
	name   string
	users  int
	remote func(ku body, n int) // to the user as Keycloak imports it; nil: nothing
	sql    func(n int) string   // to the row of the user $1; nil: nothing
	found  []difference
}

// drifts has every class of differences, and what only looks like one.
func drifts() []drift {
	keycloakHas := func(name string, value any) func(body, int) { return func(ku body, _ int) { ku[name] = value } }
	attribute := func(name string, values ...string) func(body, int) {
		return func(ku body, _ int) { ku["attributes"].(body)[name] = values }
	}
	address := func(ku body, n int) { ku["email"] = fmt.Sprintf("new%d@seed.test", n) }
	asAdmin := attribute(attrRoles, roleAdmin)
	gone := func(ku body, _ int) { clear(ku) }
	rowHas := func(set string) func(int) string {
		return func(int) string { return `update users set ` + set + ` where user_id = $1` }
	}
	deleted := rowHas(`is_active = false, deleted_at = now()`)
	none := func(int) string { return `delete from users where user_id = $1` }
	profile, role, unknown := []difference{diffProfile}, []difference{diffRole}, []difference{diffUnknown}
	conflict := []difference{diffConflict}
	return []drift{
		{name: "e-mail", users: 12, remote: address, found: profile},
		{name: "username", users: 3, remote: func(ku body, n int) { ku["username"] = fmt.Sprintf("zznew%d", n) },
			found: profile},
		{name: "first name", users: 3, remote: keycloakHas("firstName", "Grace"), found: profile},
		{name: "last name", users: 3, remote: keycloakHas("lastName", nil), found: profile},
		{name: "verified in Keycloak", users: 4, sql: rowHas(`is_verified = false`), found: []difference{diffVerified}},
		{name: "not verified in Keycloak", users: 4, remote: keycloakHas("emailVerified", false),
			found: []difference{diffVerified}},
		{name: "disabled in Keycloak", users: 5, remote: keycloakHas("enabled", false),
			found: []difference{diffDisabled}},
		{name: "deleted in Keycloak", users: 5, remote: gone, found: []difference{diffMissing}},
		{name: "created in Keycloak", users: 4, remote: asAdmin, sql: none, found: unknown},
		{name: "created without attributes", users: 4, remote: keycloakHas("attributes", nil), sql: none,
			found: unknown},
		{name: "created, not verified", users: 2, remote: keycloakHas("emailVerified", false), sql: none,
			found: unknown},
		{name: "created, disabled", users: 2, remote: keycloakHas("enabled", false), sql: none, found: unknown},
		{name: "created without an address", users: 3, remote: keycloakHas("email", nil), sql: none, found: conflict},
		{name: "role edited", users: 4, remote: asAdmin, found: role},
		{name: "role added", users: 2, remote: attribute(attrRoles, roleUser, roleAdmin), found: role},
		{name: "role removed", users: 2, remote: attribute(attrRoles), found: role},
		{name: "network edited", users: 2, remote: attribute(attrNetworkID, "NET-2"), found: role},
		{name: "station removed", users: 2, remote: attribute(attrStationID), found: role},
		{name: "user_id edited", users: 2, remote: attribute(attrUserID, "USR-aaaaaaaaaaaaaaaa"), found: role},
		{name: "attributes removed", users: 2, remote: keycloakHas("attributes", nil), found: role},
		{name: "deleted in PostgreSQL", users: 5, sql: deleted, found: []difference{diffDeleted}},
		{name: "deleted in PostgreSQL, disabled in Keycloak", users: 2, remote: keycloakHas("enabled", false),
			sql: deleted},
		{name: "deleted in PostgreSQL, role edited in Keycloak", users: 2, sql: deleted, found: role,
			remote: func(ku body, n int) {
				asAdmin(ku, n)
				ku["enabled"] = false
			}},
		{name: "deleted in both stores", users: 2, remote: gone, sql: deleted},
		{name: "several", users: 2, found: []difference{diffProfile, diffDisabled, diffRole}, remote: func(ku body,
			n int) {
			address(ku, n)
			asAdmin(ku, n)
			ku["enabled"] = false
		}},
		{name: "an address that the next one has given up", users: 1, found: conflict,
			remote: func(ku body, n int) { ku["email"] = fmt.Sprintf("zz%04d@seed.test", n+1) }},
		{name: "the next one", users: 1, remote: address, found: profile},
		{name: "without an address, with the next one's in PostgreSQL", users: 1, remote: keycloakHas("email", nil),
			found: conflict,
			sql: func(n int) string {
				return fmt.Sprintf(`update users set email = 'zz%04d@seed.test' where user_id = $1`, n+1)
			}},
		{name: "created with a taken address", users: 1, sql: none, found: conflict},
		{name: "in capitals in PostgreSQL", users: 3, sql: rowHas(`email = upper(email), username = upper(username)`)},
	}
}

// drifted is an env in which both stores have two thousand users, and drifts are among them.
type drifted struct {
	*env
	seeds
	found         map[difference]int
	examples      map[difference][]string
	names         map[string]string // of the drifts, by id in Keycloak of their users
	local, remote map[string]body   // the users before
	entries       string            // of the audit log before
}

const driftedUsers = 2000

func newDrifted(t *testing.T) *drifted {
	d := &drifted{seeds: newSeeds(), found: map[difference]int{}, examples: map[difference][]string{},
		names: map[string]string{}}
	users := d.seeds.inKeycloak(0, driftedUsers)
	var sql, whose []string
	i := 0
	for _, drift := range drifts() {
		for range drift.users {
			if drift.remote != nil {
				drift.remote(users[i], i)
			}
			if drift.sql != nil {
				sql, whose = append(sql, drift.sql(i)), append(whose, d.seeds.userID(i))
			}
			for _, class := range drift.found {
				d.found[class]++
				d.examples[class] = append(d.examples[class], d.seeds.userID(i), d.seeds.keycloakID(i))
			}
			if len(drift.found) > 0 {
				d.names[d.seeds.keycloakID(i)] = drift.name
			}
			i++
		}
	}
	d.env = newEnv(t, map[string]string{"JOB_INTERVAL": "0"}, slices.DeleteFunc(users,
		func(ku body) bool { return len(ku) == 0 })...)
	d.inPostgreSQL(d.env, 0, driftedUsers)
	for i := len(sql) - 1; i >= 0; i-- { // those first whose address the one before takes
		d.exec(sql[i], whose[i])
	}
	d.registers()
	d.local, d.remote, d.entries = d.localUsers(), d.keycloakUsersByID(), d.auditEntries()
	return d
}

// registers has registrations in three states. They are their tasks' alone.
func (d *drifted) registers() {
	pending, confirmed, ended := newEmail(), newEmail(), newEmail()
	for _, email := range []string{pending, confirmed, ended} {
		registered(d.env, email)
	}
	d.keycloakAdmin("PUT", "/users/"+d.env.keycloakID(confirmed), body{"enabled": true, "emailVerified": true},
		nil) // V3
	d.exec(`with e as (update user_registrations set status = 'expired', ended_at = now(), user_id = null,
		email = '', username = '', phone = null,
			first_name = null, last_name = null, ip_address = null, user_agent = null where email = $1
				returning registration_id, keycloak_id), -- E1
		u as (delete from users where email = $1)
		insert into audit_log (audit_id, at, actor, action, target, outcome)
			select 'AUD-expired', now(), 'system:expiry', 'registration.expired', registration_id, 'ok' from e`, ended)
}

func (d *drifted) auditEntries() string {
	return d.value(`select count(*)::text from audit_log where action not like 'sync.%'`)
}

// equal fails unless both values are the same.
func (d *drifted) equal(what string, want, got any) {
	d.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		d.Errorf("%s: wanted (-), got (+): %s", what, diff)
	}
}

// unchanged fails if users have changed in one of the stores, but for these.
func (d *drifted) unchanged(but map[string]string) {
	d.Helper()
	others := func(users map[string]body) map[string]body {
		users = maps.Clone(users)
		for id := range but {
			delete(users, id)
		}
		return users
	}
	d.equal("users in PostgreSQL", others(d.local), others(d.localUsers()))
	d.equal("users in Keycloak", others(d.remote), others(d.keycloakUsersByID()))
}

// TestSync has drifts of every class among two thousand users: they are found and repaired, and
// nobody else is touched.
func TestSync(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	d := newDrifted(t)
	d.Run("a dry run reports", d.dryRun)
	if t.Failed() {
		return
	}
	d.Run("repair", d.repairs)
	d.Run("what became of them", d.outcomes)
	d.Run("what is left", d.conflictsStay)
	d.Run("when nothing is in conflict any more", d.conflictsEnd)
}

func (d *drifted) dryRun() {
	found, repaired, out, err := d.sync(nil, "-dry-run")
	if !errors.Is(err, errDiffer) {
		d.Errorf("it ends with %v: %s", err, out)
	}
	d.equal("found", d.found, found)
	maps.DeleteFunc(repaired, func(_ difference, n int) bool { return n == 0 })
	d.equal("repaired", map[difference]int{}, repaired)
	for class, all := range d.examples {
		line := regexp.MustCompile(`(?m)^` + string(class) + ` .* repaired +(.*)$`).FindStringSubmatch(out)
		if line == nil {
			continue // wanted above
		}
		examples := strings.Fields(line[1])
		for _, name := range examples {
			if !slices.Contains(all, name) {
				d.Errorf("%s is no example of %s", name, class)
			}
		}
		if len(examples) != min(d.found[class], syncExamples) {
			d.Errorf("%d examples of %s", len(examples), class)
		}
	}
	d.unchanged(nil)
	d.equal("audit entries", d.entries, d.auditEntries())
}

func (d *drifted) repairs() {
	found, repaired, out, err := d.sync(nil)
	if !errors.Is(err, errDiffer) { // there are conflicts
		d.Errorf("it ends with %v: %s", err, out)
	}
	d.equal("found", d.found, found)
	want := maps.Clone(d.found)
	want[diffConflict] = 1 // of six: the address that was given up
	d.equal("repaired", want, repaired)
	d.unchanged(d.names)
	var others []string
	for i := range driftedUsers {
		if d.names[d.seeds.keycloakID(i)] == "" {
			others = append(others, d.seeds.userID(i))
		}
	}
	d.equal("audit entries about users in sync", "0",
		d.value(`select count(*)::text from audit_log where action like 'user.%' and actor <> 'system:seed'
			and target = any($1)`, others))
	d.equal("audited twice", "", d.value(`select coalesce(string_agg(target || ' ' || action, ', '), '') from (
		select target, action from audit_log where action in ('user.sync', 'user.import', 'user.overwrite')
			group by 1, 2 having count(*) > 1) x`))
}

func (d *drifted) outcomes() {
	local, remote := d.localUsers(), d.keycloakUsersByID()
	for id, before := range d.remote {
		ku := remote[id]
		if ku == nil {
			d.Errorf("%s was deleted in Keycloak", d.names[id])
		} else if before["enabled"] == false && ku["enabled"] == true {
			d.Errorf("%s was enabled in Keycloak", d.names[id])
		}
	}
	for id, name := range d.names {
		u, before := local[id], d.local[id]
		if strings.HasPrefix(name, "created") && u != nil {
			want := body{"role": roleUser, "network_id": "", "station_id": "", "source": sourceInternal,
				"is_active": name != "created, disabled", "is_verified": name != "created, not verified"}
			for column, value := range want {
				d.equal(name+", "+column, value, u[column])
			}
		}
		if before == nil {
			continue
		}
		for _, column := range []string{"user_id", "role", "network_id", "station_id"} {
			d.equal(name+", "+column, before[column], u[column])
		}
		if before["is_active"] == false && u["is_active"] == true {
			d.Errorf("%s was restored", name)
		}
	}
}

func (d *drifted) conflictsStay() {
	found, _, out, err := d.sync(nil)
	if !errors.Is(err, errDiffer) {
		d.Errorf("it ends with %v: %s", err, out)
	}
	d.equal("found", map[difference]int{diffConflict: 5}, found)
	if wrong := d.outOfSync(); len(wrong) != 7 { // and the two registrations that are not over
		d.Errorf("%d are out of sync: %s", len(wrong), strings.Join(wrong, "\n"))
	}
}

func (d *drifted) conflictsEnd() {
	for id, name := range d.names {
		if strings.Contains(name, "without an address") {
			d.keycloakAdmin("PUT", "/users/"+id, body{"email": newEmail()}, nil)
		}
	}
	d.exec(`update tasks set due_at = now() where task_id like 'REG-%'`)
	d.command("jobs")
	if _, _, out, err := d.sync(nil); err != nil {
		d.Errorf("it ends with %v: %s", err, out)
	}
	if wrong := d.outOfSync(); len(wrong) > 0 {
		d.Error(strings.Join(wrong, "\n"))
	}
	if found, _, _, err := d.sync(nil, "-dry-run"); err != nil || len(found) > 0 {
		d.Errorf("found %v, %v", found, err)
	}
}
