package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html"
	"maps"
	"math/rand/v2"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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
		users = append(users, body{"id": s.keycloakID(n), "username": fmt.Sprintf("zz%04d", n), "email": fmt.Sprintf("zz%04d@seed.test", n),
			"firstName": "First", "lastName": "Last", "enabled": true, "emailVerified": true,
			"attributes": body{attrUserID: []string{s.userID(n)}, attrRoles: []string{role}, attrNetworkID: []string{network}, attrStationID: []string{station}}})
	}
	return users
}

// here writes their rows.
func (s seeds) here(w *env, first, last int) {
	w.Helper()
	w.exec(`insert into users (user_id, keycloak_id, email, username, first_name, last_name, is_verified, role, network_id, station_id, source)
		select 'USR-' || lpad(n::text, 16, '0'), $1 || lpad(n::text, 12, '0'), 'ZZ' || lpad(n::text, greatest(4, length(n::text)), '0') || '@seed.test', 'zz' || lpad(n::text, greatest(4, length(n::text)), '0'), 'First', 'Last',
			true, case when n % 2 = 0 then 'operator' else 'user' end, case when n % 2 = 0 then 'NET-1' else '' end, case when n % 2 = 0 then 'STA-1' else '' end, 'internal'
		from generate_series($2::int, $3::int - 1) n`, string(s), first, last)
	w.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome)
		select 'AUD-' || lpad(n::text, 16, '0'), now(), 'system:seed', 'user.create', 'USR-' || lpad(n::text, 16, '0'), 'ok' from generate_series($1::int, $2::int - 1) n`, first, last)
}

// seen is all that a store has of users: by id in Keycloak.
func (w *env) seenInKeycloak() map[string]body {
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

func (w *env) seenHere() map[string]body {
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
	here, there := w.seenHere(), w.seenInKeycloak()
	text := func(v any) string { s, _ := v.(string); return strings.ToLower(s) }
	for id := range there {
		if here[id] == nil {
			wrong = append(wrong, "unknown here: "+id)
		}
	}
	for id, u := range here {
		ku := there[id]
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
		want := body{"email": text(u["email"]), "username": text(u["username"]), "first": text(u["first_name"]), "last": text(u["last_name"]),
			"verified": u["is_verified"], "enabled": u["is_active"], attrUserID: []any{u["user_id"]}, attrRoles: []any{u["role"]},
			attrNetworkID: scope("network_id"), attrStationID: scope("station_id")}
		got := body{"email": text(ku["email"]), "username": text(ku["username"]), "first": text(ku["firstName"]), "last": text(ku["lastName"]),
			"verified": ku["emailVerified"], "enabled": ku["enabled"]}
		attributes, _ := ku["attributes"].(body)
		for _, name := range []string{attrUserID, attrRoles, attrNetworkID, attrStationID} {
			got[name] = attributes[name]
		}
		if diff := cmp.Diff(want, got); diff != "" {
			wrong = append(wrong, fmt.Sprintf("%s, here (-) and in Keycloak (+): %s", id, diff))
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
	err = run(w.Context(), append([]string{"sync"}, args...), func(name string) string { return env[name] }, &stdout, w.logs)
	found, repaired = map[difference]int{}, map[difference]int{}
	for _, m := range regexp.MustCompile(`(?m)^(\w+) +(\d+) found +(\d+) repaired`).FindAllStringSubmatch(stdout.String(), -1) {
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
		w.exec(`update tasks set due_at = now() where locked_by is null and (task_id = 'job:events' or task_id like 'kc:%')`)
	}
	if err := run(w.Context(), args, func(name string) string { return w.vars[name] }, new(bytes.Buffer), w.logs); err != nil {
		w.Fatalf("%v: %v", args, err)
	}
}

// A drift of every class among two thousand users is found and repaired, and nobody else
// is touched.
func TestSync(t *testing.T) {
	const n = 2000
	s := newSeeds()
	users := s.inKeycloak(0, n)
	attribute := func(name string, values ...string) func(body, int) {
		return func(ku body, _ int) { ku["attributes"].(body)[name] = values }
	}
	set := func(name string, value any) func(body, int) { return func(ku body, _ int) { ku[name] = value } }
	gone, none := func(ku body, _ int) { clear(ku) }, func(body, int) {}
	here := func(set string) func(int) string {
		return func(int) string { return `update users set ` + set + ` where user_id = $1` }
	}
	const deleted = `is_active = false, deleted_at = now()`
	absent := func(int) string { return `delete from users where user_id = $1` }
	drifts := []struct {
		name  string
		users int
		there func(ku body, n int)
		here  func(n int) string // SQL for the user $1; nil: none
		found []difference
	}{
		{"e-mail", 12, func(ku body, n int) { ku["email"] = fmt.Sprintf("new%d@seed.test", n) }, nil, []difference{diffProfile}},
		{"username", 3, func(ku body, n int) { ku["username"] = fmt.Sprintf("zznew%d", n) }, nil, []difference{diffProfile}},
		{"first name", 3, set("firstName", "Grace"), nil, []difference{diffProfile}},
		{"last name", 3, set("lastName", nil), nil, []difference{diffProfile}},
		{"verified there", 4, none, here(`is_verified = false`), []difference{diffVerified}},
		{"unconfirmed there", 4, set("emailVerified", false), nil, []difference{diffVerified}},
		{"disabled there", 5, set("enabled", false), nil, []difference{diffDisabled}},
		{"deleted there", 5, gone, nil, []difference{diffMissing}},
		{"created there", 4, attribute(attrRoles, roleAdmin), absent, []difference{diffUnknown}},
		{"created there without attributes", 4, set("attributes", nil), absent, []difference{diffUnknown}},
		{"created there, not confirmed", 2, set("emailVerified", false), absent, []difference{diffUnknown}},
		{"created there, disabled", 2, set("enabled", false), absent, []difference{diffUnknown}},
		{"created there without an address", 3, set("email", nil), absent, []difference{diffConflict}},
		{"role edited", 4, attribute(attrRoles, roleAdmin), nil, []difference{diffRole}},
		{"role added", 2, attribute(attrRoles, roleUser, roleAdmin), nil, []difference{diffRole}},
		{"role removed", 2, attribute(attrRoles), nil, []difference{diffRole}},
		{"network edited", 2, attribute(attrNetworkID, "NET-2"), nil, []difference{diffRole}},
		{"station removed", 2, attribute(attrStationID), nil, []difference{diffRole}},
		{"user_id edited", 2, attribute(attrUserID, "USR-aaaaaaaaaaaaaaaa"), nil, []difference{diffRole}},
		{"attributes removed", 2, set("attributes", nil), nil, []difference{diffRole}},
		{"deleted here", 5, none, here(deleted), []difference{diffDeleted}},
		{"deleted here, disabled there", 2, set("enabled", false), here(deleted), nil},
		{"deleted here, role edited there", 2, func(ku body, n int) { attribute(attrRoles, roleAdmin)(ku, n); ku["enabled"] = false }, here(deleted), []difference{diffRole}},
		{"deleted on both sides", 2, gone, here(deleted), nil},
		{"several", 2, func(ku body, n int) {
			ku["email"], ku["enabled"] = fmt.Sprintf("new%d@seed.test", n), false
			attribute(attrRoles, roleAdmin)(ku, n)
		}, nil, []difference{diffProfile, diffDisabled, diffRole}},
		{"an address that the next one has given up", 1, func(ku body, n int) { ku["email"] = fmt.Sprintf("zz%04d@seed.test", n+1) }, nil, []difference{diffConflict}},
		{"the next one", 1, func(ku body, n int) { ku["email"] = fmt.Sprintf("new%d@seed.test", n) }, nil, []difference{diffProfile}},
		{"without an address there, with the next one's", 1, set("email", nil),
			func(n int) string {
				return fmt.Sprintf(`update users set email = 'zz%04d@seed.test' where user_id = $1`, n+1)
			}, []difference{diffConflict}},
		{"created there, with a taken address", 1, none, absent, []difference{diffConflict}},
		{"in capitals there", 3, none, here(`email = upper(email), username = upper(username)`), nil},
	}
	var sql []string // with $1
	var whose []string
	found, drifted := map[difference]int{}, map[string]string{} // by class; by id in Keycloak, the name
	examples := map[difference][]string{}
	i := 0
	for _, d := range drifts {
		for range d.users {
			d.there(users[i], i)
			if d.here != nil {
				sql, whose = append(sql, d.here(i)), append(whose, s.userID(i))
			}
			for _, class := range d.found {
				found[class]++
				examples[class] = append(examples[class], s.userID(i), s.keycloakID(i))
			}
			if len(d.found) > 0 {
				drifted[s.keycloakID(i)] = d.name
			}
			i++
		}
	}
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}, slices.DeleteFunc(users, func(ku body) bool { return len(ku) == 0 })...)
	s.here(w, 0, n)
	for i := range sql {
		w.exec(sql[len(sql)-1-i], whose[len(sql)-1-i]) // those first whose address the one before takes
	}
	pendingOne, between, ended := newEmail(), newEmail(), newEmail() // these are their registrations' alone
	for _, email := range []string{pendingOne, between, ended} {
		registered(w, email)
	}
	w.keycloakAdmin("PUT", "/users/"+w.value(`select keycloak_id from users where email = $1`, between), body{"enabled": true, "emailVerified": true}, nil) // V3
	w.exec(`with e as (update user_registrations set status = 'expired', ended_at = now(), user_id = null, email = '', username = '', phone = null,
			first_name = null, last_name = null, ip_address = null, user_agent = null where email = $1 returning registration_id, keycloak_id), -- E1
		u as (delete from users where email = $1)
		insert into audit_log (audit_id, at, actor, action, target, outcome) select 'AUD-expired', now(), 'system:expiry', 'registration.expired', registration_id, 'ok' from e`, ended)
	audited := func() string {
		return w.value(`select count(*)::text from audit_log where action not like 'sync.%'`)
	}

	hereBefore, thereBefore, auditBefore := w.seenHere(), w.seenInKeycloak(), audited()
	same := func(when string, but map[string]string) {
		t.Helper()
		ignore := func(users map[string]body) map[string]body {
			users = maps.Clone(users)
			for id := range but {
				delete(users, id)
			}
			return users
		}
		if diff := cmp.Diff(ignore(hereBefore), ignore(w.seenHere())); diff != "" {
			t.Errorf("%s has changed users here: %s", when, diff)
		}
		if diff := cmp.Diff(ignore(thereBefore), ignore(w.seenInKeycloak())); diff != "" {
			t.Errorf("%s has changed users in Keycloak: %s", when, diff)
		}
	}
	wants := func(what string, want, got any) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: wanted (-), got (+): %s", what, diff)
		}
	}

	w.Run("dry", func() {
		got, repaired, out, err := w.sync(nil, "-dry-run")
		if !errors.Is(err, errDiffer) {
			w.Errorf("it ends with %v: %s", err, out)
		}
		wants("found", found, got)
		wants("repaired", map[difference]int{}, withoutZero(repaired))
		for class, all := range examples {
			line := regexp.MustCompile(`(?m)^` + string(class) + ` .* repaired +(.*)$`).FindStringSubmatch(out)
			if line == nil {
				continue // wanted above
			}
			for _, name := range strings.Fields(line[1]) {
				if !slices.Contains(all, name) {
					w.Errorf("%s is no example of %s", name, class)
				}
			}
			if got := len(strings.Fields(line[1])); got != min(found[class], syncExamples) {
				w.Errorf("%d examples of %s", got, class)
			}
		}
		same("a dry run", nil)
		wants("entries", auditBefore, audited())
	})
	if t.Failed() {
		return
	}
	w.Run("repair", func() {
		got, repaired, out, err := w.sync(nil)
		if !errors.Is(err, errDiffer) { // there are conflicts
			w.Errorf("it ends with %v: %s", err, out)
		}
		wants("found", found, got)
		left := maps.Clone(found)
		left[diffConflict] = 1 // of six: the address that was given up
		wants("repaired", left, repaired)
		same("a sync", drifted)
		untouched := w.value(`select count(*)::text from audit_log where action like 'user.%' and actor <> 'system:seed' and target = any($1)`, func() (ids []string) {
			for i := range n {
				if drifted[s.keycloakID(i)] == "" {
					ids = append(ids, s.userID(i))
				}
			}
			return ids
		}())
		wants("entries about users in sync", "0", untouched)
		twice := w.value(`select coalesce(string_agg(target || ' ' || action, ', '), '') from (
			select target, action from audit_log where action in ('user.sync', 'user.import', 'user.overwrite') group by 1, 2 having count(*) > 1) x`)
		wants("entries for the same", "", twice)
	})
	w.Run("what became of them", func() {
		after, kept := w.seenHere(), w.seenInKeycloak()
		for id, before := range thereBefore {
			ku := kept[id]
			if ku == nil {
				w.Errorf("%s was deleted in Keycloak", drifted[id])
			} else if before["enabled"] == false && ku["enabled"] == true {
				w.Errorf("%s was enabled in Keycloak", drifted[id])
			}
		}
		for id, name := range drifted {
			u, before := after[id], hereBefore[id]
			if strings.HasPrefix(name, "created") && u != nil {
				if u["role"] != roleUser || u["network_id"] != "" || u["station_id"] != "" || u["source"] != sourceInternal ||
					u["is_active"] != (name != "created there, disabled") || u["is_verified"] != (name != "created there, not confirmed") {
					w.Errorf("%s: %v", name, u)
				}
			}
			if before == nil {
				continue
			}
			for _, name := range []string{"user_id", "role", "network_id", "station_id"} {
				wants(drifted[id]+", "+name, before[name], u[name])
			}
			if before["is_active"] == false && u["is_active"] == true {
				w.Errorf("%s was restored", name)
			}
		}
	})
	w.Run("again", func() {
		got, _, out, err := w.sync(nil)
		if !errors.Is(err, errDiffer) {
			w.Errorf("it ends with %v: %s", err, out)
		}
		wants("found", map[difference]int{diffConflict: 5}, got)
		if wrong := w.outOfSync(); len(wrong) != 7 { // and the two registrations that are not over
			w.Errorf("%d are out of sync: %s", len(wrong), strings.Join(wrong, "\n"))
		}
	})
	w.Run("when nothing is in conflict any more", func() {
		for id, name := range drifted {
			if strings.Contains(name, "without an address") {
				w.keycloakAdmin("PUT", "/users/"+id, body{"email": newEmail()}, nil)
			}
		}
		w.exec(`update tasks set due_at = now() where task_id like 'REG-%'`)
		w.command("jobs")
		if _, _, out, err := w.sync(nil); err != nil {
			w.Errorf("it ends with %v: %s", err, out)
		}
		if wrong := w.outOfSync(); len(wrong) > 0 {
			w.Error(strings.Join(wrong, "\n"))
		}
		if got, _, _, err := w.sync(nil, "-dry-run"); err != nil || len(got) > 0 {
			w.Errorf("found %v, %v", got, err)
		}
	})
}

func withoutZero(counts map[difference]int) map[difference]int {
	maps.DeleteFunc(counts, func(_ difference, n int) bool { return n == 0 })
	return counts
}

// keycloakID is the id in Keycloak of the user with an address.
func (w *env) keycloakID(email string) string {
	w.Helper()
	return w.value(`select keycloak_id from users where lower(email) = lower($1)`, email)
}

// edits changes attributes in Keycloak, as an administrator there does.
func (w *env) edits(id string, attributes body) {
	w.Helper()
	var ku body
	w.keycloakAdmin("GET", "/users/"+id, nil, &ku)
	maps.Copy(ku["attributes"].(body), attributes)
	w.keycloakAdmin("PUT", "/users/"+id, ku, nil)
}

// What others change in Keycloak arrives within seconds.
func TestSyncEvents(t *testing.T) {
	w := newEnv(t, nil) // with JOB_INTERVAL=1s
	arrives := func(what, sql string, args ...any) {
		w.Helper()
		w.eventually(what, 10*time.Second, func() bool { return w.value(sql, args...) == "t" })
	}
	w.Run("e-mail and names", func() {
		email, id, next := newEmail(), "", newEmail()
		w.account(email)
		id = w.keycloakID(email)
		w.keycloakAdmin("PUT", "/users/"+id, body{"email": next, "firstName": "Grace"}, nil)
		arrives("both", `select case when email = $2 and first_name = 'Grace' then 't' else 'f' end from users where keycloak_id = $1`, id, next)
		w.keycloakAdmin("PUT", "/users/"+id, body{"email": newEmail(), "emailVerified": false}, nil)
		arrives("not confirmed", `select case when is_verified then 'f' else 't' end from users where keycloak_id = $1`, id)
		w.keycloakAdmin("PUT", "/users/"+id, body{"emailVerified": true}, nil)
		arrives("confirmed again", `select case when is_verified then 't' else 'f' end from users where keycloak_id = $1`, id)
	})
	w.Run("a new address, confirmed at the sign-in", func() {
		email := newEmail()
		w.account(email)
		id := w.keycloakID(email)
		w.exec(`update users set is_verified = false where keycloak_id = $1`, id)
		w.signsIn(email)
	})
	w.Run("disabled", func() {
		email, a := w.signedIn()
		id := w.keycloakID(email)
		w.keycloakAdmin("PUT", "/users/"+id, body{"enabled": false}, nil)
		arrives("disabled here", `select case when is_active then 'f' else 't' end from users where keycloak_id = $1`, id)
		w.wants(w.do(refreshing(a.text("refresh_token"))), 401, "invalid-token")
		w.keycloakAdmin("PUT", "/users/"+id, body{"enabled": true}, nil) // only restore does
		w.eventually("disabled there again", 10*time.Second, func() bool { return w.seenInKeycloak()[id]["enabled"] == false })
		w.value(`select audit_id from audit_log where actor = 'system:sync' and action = 'user.sync' and target = (select user_id from users where keycloak_id = $1)`, id)
		admin := w.signsIn(w.administrator())
		w.wants(w.as(admin, "POST", "/api/v1/users/"+w.value(`select user_id from users where keycloak_id = $1`, id)+"/restore"), 200, "")
		w.signsIn(email)
	})
	w.Run("deleted", func() {
		created := newEmail()
		w.keycloakAdmin("POST", "/users", body{"username": created, "email": created, "enabled": true, "emailVerified": true,
			"attributes": body{attrRoles: []string{roleAdmin}}}, nil)
		arrives("imported", `select case when exists (select from users where email = $1 and role = 'user') then 't' else 'f' end`, created)
		id := w.keycloakID(created)
		if wrong := w.outOfSync(); len(wrong) > 0 {
			w.Error(strings.Join(wrong, "\n"))
		}
		w.keycloakAdmin("DELETE", "/users/"+id, nil, nil)
		arrives("deleted in PostgreSQL", `select case when not is_active then 't' else 'f' end from users where keycloak_id = $1`, id)
		admin := w.signsIn(w.administrator())
		w.wants(w.as(admin, "POST", "/api/v1/users/"+w.value(`select user_id from users where keycloak_id = $1`, id)+"/restore"), 409, "user-gone")
		w.wants(w.do(managing(admin, "POST", "", body{"email": created})), 201, "") // anew
	})
	w.Run("a role", func() {
		email, before := w.signedIn()
		id := w.keycloakID(email)
		w.edits(id, body{attrRoles: []string{roleAdmin}})
		meanwhile := w.refreshed(before)
		w.eventually("reverted", 10*time.Second, func() bool {
			attributes := w.seenInKeycloak()[id]["attributes"].(body)
			return cmp.Equal(attributes[attrRoles], []any{roleUser})
		})
		if slices.Equal(unpacked(meanwhile.text("access_token"), 1)["roles"].([]any), []any{roleAdmin}) {
			w.eventually("the token is refused", 2*time.Second, func() bool {
				return w.do(bearing(validatePath, meanwhile.text("access_token"))).Status == 401
			})
		}
		w.wants(w.do(bearing(validatePath, w.refreshed(meanwhile).text("access_token"))), 200, "")
	})
	w.Run("by the person", func() {
		email := newEmail()
		w.account(email)
		id := w.keycloakID(email)
		w.keycloakAdmin("PUT", "/users/"+id, body{"requiredActions": []string{"UPDATE_PROFILE"}}, nil)
		p := w.person()
		a := p.visit(p.begins("/"), call{})
		a = p.visit(html.UnescapeString(string(formAction.FindSubmatch(a.Body)[1])), call{method: "POST", form: url.Values{"username": {email}, "password": {password}}})
		a = p.visit(a.Header.Get("Location"), call{})
		p.visit(html.UnescapeString(string(formAction.FindSubmatch(a.Body)[1])), call{method: "POST",
			form: url.Values{"username": {email}, "email": {email}, "firstName": {"Grace"}, "lastName": {"Hopper"}}})
		arrives("the names", `select case when first_name = 'Grace' and last_name = 'Hopper' then 't' else 'f' end from users where keycloak_id = $1`, id)
		w.straysDie()
	})
}

// Nothing is lost and nothing done twice, whoever dies; our own changes are no news.
func TestSyncEventsOnce(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "auth-service")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "SYNC_MAX_SHARE": "100"}, newSeeds().inKeycloak(0, 1)...)
	w.command("jobs") // from now on
	w.Run("our own", func() {
		w.account(newEmail())
		looked := w.kc.count("get_user")
		w.command("jobs")
		if n := w.kc.count("get_user") - looked; n != 0 {
			w.Errorf("%d users were looked at", n)
		}
	})
	const n = 120 // more than a page of events
	s := newSeeds()
	w.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": s.inKeycloak(1, 1+n)}, nil) // which tells of no user
	var edits sync.WaitGroup
	for part := range 4 { // some in the same millisecond
		edits.Go(func() {
			for i := part; i < n; i += 4 {
				w.keycloakAdmin("PUT", "/users/"+s.keycloakID(1+i), body{"firstName": "Ada"}, nil)
			}
		})
	}
	edits.Wait()
	for kill := range 6 {
		if kill > 0 {
			for i := range 20 {
				w.keycloakAdmin("PUT", "/users/"+s.keycloakID(1+20*kill+i), body{"firstName": fmt.Sprint("Grace ", kill)}, nil)
			}
		}
		p := w.spawn(binary, map[string]string{"JOB_INTERVAL": "20ms"})
		q := w.spawn(binary, map[string]string{"JOB_INTERVAL": "20ms"})
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		w.end(p, syscall.SIGKILL)
		w.end(q, syscall.SIGKILL)
		w.exec(`update tasks set locked_until = now() where locked_until is not null`) // the locks of the dead have ended
	}
	v, _ := w.another(map[string]string{"JOB_INTERVAL": "50ms"})
	w.another(map[string]string{"JOB_INTERVAL": "50ms"})
	v.eventually("all are here", 60*time.Second, func() bool {
		return w.value(`select count(*)::text from users where keycloak_id like $1 || '%'`, string(s)) == fmt.Sprint(n)
	})
	v.eventually("all are in sync", 20*time.Second, func() bool { return len(w.outOfSync()) == 0 })
	if got := w.value(`select coalesce(string_agg(n || ' ' || action, ', '), '') from (
		select target, action, count(*) n from audit_log where action in ('user.import', 'user.sync', 'user.overwrite') group by 1, 2 having count(*) > 1) x`); got != "" {
		w.Errorf("done twice: %s", got)
	}
}

// Whoever signs in and is known to Keycloak only gets the right claims at once.
func TestSyncSignIn(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "CORS_ALLOWED_ORIGINS": app, "PUBLIC_URL": "http://localhost:3000"})
	create := func(change body) string {
		w.Helper()
		email := newEmail()
		u := body{"username": email, "email": email, "enabled": true, "emailVerified": true, "attributes": body{attrRoles: []string{roleAdmin}},
			"credentials": []body{{"type": "password", "value": password, "temporary": false}}}
		maps.Copy(u, change)
		w.keycloakAdmin("POST", "/users", u, nil)
		return email
	}
	says := func(email string, a answer) {
		w.Helper()
		claims := unpacked(a.text("access_token"), 1)
		want := body{"user_id": w.value(`select user_id from users where email = $1`, email), "roles": []any{roleUser}, "network_id": noScope, "station_id": noScope}
		for name, value := range want {
			if diff := cmp.Diff(value, claims[name]); diff != "" {
				w.Errorf("%s: %s", name, diff)
			}
		}
		w.wants(w.do(bearing(validatePath, a.text("access_token"))), 200, "")
	}
	w.Run("by password", func() {
		email := create(nil)
		a := w.signsIn(email)
		says(email, a)
		says(email, w.refreshed(a))
	})
	w.Run("by the code flow", func() {
		email := create(nil)
		p := w.person()
		p.isBack(p.comesBack(p.signsIn(p.begins(app), email)), app)
		a := p.asks("refresh")
		w.wants(a, 200, "")
		says(email, a)
	})
	w.Run("an edited role", func() {
		email := newEmail()
		w.account(email)
		w.edits(w.keycloakID(email), body{attrRoles: []string{roleAdmin}, attrNetworkID: []string{"NET-1"}})
		says(email, w.signsIn(email))
	})
	w.Run("what fails leaves no session", func() {
		email := create(nil)
		w.kc.on("^refresh ", lost)
		w.wants(w.login(email, password), 503, "unavailable")
		w.kc.on("^refresh ", 0)
		says(email, w.signsIn(email))
	})
	w.Run("a taken address", func() {
		email := create(nil)
		other := newEmail()
		w.account(other)
		w.exec(`update users set email = $1 where email = $2`, email, other)
		w.wants(w.login(email, password), 403, "account-setup-required")
		p := w.person()
		p.isTold(p.comesBack(p.signsIn(p.begins(app), email)), 403, "Account setup required",
			"This account does not fit in here: another one may have its e-mail address or username. Please ask an administrator.", "/auth/login?return_to="+url.QueryEscape(app))
		w.exec(`update users set email = $1 where email = $2`, other, email)
		says(email, w.signsIn(email))
	})
	w.Run("disabled", func() {
		w.wants(w.login(create(body{"enabled": false}), password), 403, "account-disabled")
	})
	w.Run("disabled meanwhile", func() {
		email := newEmail()
		w.account(email)
		w.edits(w.keycloakID(email), body{attrRoles: []string{roleAdmin}})
		there, release := w.kc.holdAt("^get_user ", false)
		got := make(chan answer)
		go func() { got <- w.login(email, password) }()
		<-there
		w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"enabled": false}, nil)
		release()
		w.wants(<-got, 403, "account-disabled")
		if got := w.value(`select actor from audit_log where action = 'user.sync' and target = $1`, w.userOf(email)); got != "system:sync" {
			w.Errorf("it is on record as done by %s", got)
		}
	})
	w.Run("deleted meanwhile", func() {
		email := create(nil)
		there, release := w.kc.holdAt("^get_user ", false)
		got := make(chan answer)
		go func() { got <- w.login(email, password) }()
		<-there
		w.keycloakAdmin("DELETE", "/users/"+w.inKeycloak(email)[0], nil, nil)
		release()
		w.wants(<-got, 403, "account-setup-required")
	})
	imports := func(change body) string { // which Keycloak does not look into
		w.Helper()
		email := newEmail()
		u := body{"username": email, "email": email, "enabled": true, "emailVerified": true,
			"credentials": []body{{"type": "password", "value": password, "temporary": false}}}
		maps.Copy(u, change)
		w.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": []body{u}}, nil)
		return email
	}
	w.Run("what Keycloak itself would refuse", func() {
		email := imports(body{"firstName": "<Ada>"})
		for range 2 {
			w.wants(w.login(email, password), 403, "account-setup-required")
		}
		w.keycloakAdmin("PUT", "/users/"+w.inKeycloak(email)[0], body{"firstName": "Ada"}, nil)
		says(email, w.signsIn(email))
	})
	w.Run("ids and a locale that are none of ours", func() {
		email := imports(body{"attributes": body{attrLocale: []string{"de-Latn-DE-1996-x-something"}, attrUserID: []string{"7"},
			attrRegistrationID: []string{"7"}}})
		says(email, w.signsIn(email))
		w.edits(w.keycloakID(email), body{attrRegistrationID: []string{}})
		email = imports(body{"attributes": body{attrLocale: []string{"de-Latn-DE-1996-x-something"}, attrRegistrationID: []string{string(newRegistrationID())}}})
		says(email, w.signsIn(email))
	})
	w.Run("a name that is too long", func() {
		email := imports(body{"firstName": strings.Repeat("Ä", 101)})
		w.wants(w.login(email, password), 403, "account-setup-required")
		if found, _, out, err := w.sync(nil); !errors.Is(err, errDiffer) || found[diffConflict] != 1 {
			w.Errorf("%v: %s", err, out)
		}
		w.keycloakAdmin("PUT", "/users/"+w.inKeycloak(email)[0], body{"firstName": strings.Repeat("Ä", 100)}, nil)
		says(email, w.signsIn(email))
	})
}

// A full pass is one at a time, shows how far it is, and may end anywhere.
func TestSyncRuns(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "auth-service")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const n = 600 // two pages
	s := newSeeds()
	users := s.inKeycloak(0, n)
	for i := range 60 {
		users[i]["firstName"] = "Grace"
		users[60+i]["attributes"].(body)[attrRoles] = []string{roleAdmin}
	}
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}, users...)
	s.here(w, 0, n)
	admin := w.signsIn(w.administrator())
	start := func(w *env, dry bool) call {
		return call{method: "POST", path: "/api/v1/sync", json: body{"dry_run": dry}, auth: []string{"Bearer " + admin.text("access_token")}}
	}
	status := func(id string) answer { return w.as(admin, "GET", "/api/v1/sync/"+id) }
	ends := func(id string) answer {
		w.Helper()
		var a answer
		w.eventually("its end", 60*time.Second, func() bool { a = status(id); return a.text("status") != "running" })
		return a
	}
	w.Run("who may", func() {
		_, other := w.signedIn()
		r := start(w, true)
		r.auth = []string{"Bearer " + other.text("access_token")}
		w.wants(w.do(r), 403, "forbidden")
		w.wants(w.as(other, "GET", "/api/v1/sync/SYN-0123456789abcdef"), 403, "forbidden")
		w.wants(w.do(call{method: "POST", path: "/api/v1/sync", json: body{}}), 401, "unauthorized")
		w.wants(status("SYN-0123456789abcdef"), 404, "not-found")
		w.wants(status("SYN-0"), 404, "not-found")
	})
	w.Run("killed again and again", func() {
		env := func() (all []string) {
			for name, value := range w.vars {
				all = append(all, name+"="+value)
			}
			return all
		}()
		kills := 0
		for ; ; kills++ {
			cmd := exec.Command(binary, "sync")
			cmd.Env, cmd.Stderr = env, w.logs
			if err := cmd.Start(); err != nil {
				w.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			timeout := time.Duration(200+rand.IntN(600)) * time.Millisecond
			if kills == 6 {
				timeout = time.Minute
			}
			select {
			case err := <-ended:
				if err != nil {
					w.Errorf("it ends with %v", err)
				}
			case <-time.After(timeout):
				cmd.Process.Kill()
				<-ended
				w.exec(`update tasks set locked_until = now() where locked_until is not null`) // its locks have ended
				w.exec(`update sync_runs set status = 'failed', ended_at = now() where status = 'running'`)
				continue
			}
			break
		}
		w.command("jobs") // what was due
		if wrong := w.outOfSync(); len(wrong) > 0 {
			w.Errorf("after %d kills: %s", kills, strings.Join(wrong, "\n"))
		}
		if got := w.value(`select count(*)::text || ' ' || count(distinct target) from audit_log where action = 'user.sync'`); got != "60 60" {
			w.Errorf("user.sync is on record (times, users) %s", got)
		}
		w.Logf("%d kills", kills)
		if found, _, _, err := w.sync(nil, "-dry-run"); err != nil || len(found) > 0 {
			w.Errorf("%v %v", found, err)
		}
	})
	w.Run("once a day", func() {
		runs := func() string { return w.value(`select count(*)::text from sync_runs where not dry_run`) }
		before := runs()
		again := func() {
			w.exec(`update tasks set due_at = now() where task_id = 'job:sync'`)
			w.command("jobs")
		}
		again()
		if runs() != before {
			w.Error("twice a day")
		}
		w.exec(`update sync_runs set started_at = started_at - interval '25 hours', ended_at = ended_at - interval '25 hours'`)
		again()
		if runs() == before {
			w.Error("not once a day")
		}
		last := w.value(`update sync_runs set status = 'running', ended_at = null
			where started_at = (select max(started_at) from sync_runs where not dry_run) returning sync_id`)
		before = runs()
		w.exec(`update tasks set due_at = now() where task_id = 'job:sync'`)
		w.command("jobs")
		if a := status(last); a.text("status") != "done" || runs() != before {
			w.Errorf("killed, and now %s, %s instead of %s runs", a, runs(), before)
		}
	})
	w.Run("too many at once", func() {
		w.exec(`update users set is_active = false, deleted_at = now() where keycloak_id like $1 || '%' and keycloak_id > $2`, string(s), s.keycloakID(n-80))
		before := w.seenHere()
		_, _, out, err := w.sync(nil)
		if err == nil || errors.Is(err, errDiffer) || !strings.Contains(out, "aborted At least 61 users would be disabled or imported, and SYNC_MAX_SHARE allows 60.") {
			w.Errorf("%v: %s", err, out)
		}
		if diff := cmp.Diff(before, w.seenHere()); diff != "" {
			w.Error(diff)
		}
		if _, repaired, out, err := w.sync(map[string]string{"SYNC_MAX_SHARE": "100"}); err != nil || repaired[diffDeleted] != 79 {
			w.Errorf("%v: %s", err, out)
		}
	})
	w.Run("the wrong realm", func() {
		empty := newEnv(w.TB, map[string]string{"JOB_INTERVAL": "0"})
		looked := empty.kc.count("get_user")
		_, _, out, err := w.sync(map[string]string{"KEYCLOAK_REALM": empty.realm, "KEYCLOAK_URL": empty.kc.url()})
		if err == nil || !strings.Contains(out, "aborted") {
			w.Errorf("%v: %s", err, out)
		}
		if n := empty.kc.count("get_user") - looked; n > 70 {
			w.Errorf("it took %d calls to notice", n)
		}
	})
	v, _ := w.another(map[string]string{"JOB_INTERVAL": "100ms"})
	w.Run("one at a time, and how far it is", func() {
		first, release := w.kc.holdAt("^list_users ", false)
		answers := w.at([]string{w.url, v.url}, start(w, true), start(w, true), start(w, false))
		if got := tally(answers); got["202"] != 1 || got["409 sync-running"] != 2 {
			w.Fatalf("%v", got)
		}
		i := slices.IndexFunc(answers, func(a answer) bool { return a.Status == 202 })
		id := answers[i].text("sync_id")
		if got := answers[i].Header.Get("Location"); got != "/api/v1/sync/"+id {
			w.Errorf("Location: %s", got)
		}
		<-first
		second, releaseSecond := w.kc.holdAt("^list_users ", false)
		release()
		<-second
		w.eventually("its progress", 10*time.Second, func() bool {
			a := status(id)
			return a.text("status") == "running" && a.JSON["checked"] == float64(syncPage) && a.JSON["total"] == float64(n+2)
		})
		releaseSecond()
		if a := ends(id); a.text("status") != "done" || a.JSON["checked"] != float64(n+2) {
			w.Errorf("at the end: %v", a)
		}
	})
	for _, outage := range []struct {
		name       string
		begin, end func() error
		status     string
	}{{"Keycloak", w.kc.close, w.kc.open, "failed"}, {"PostgreSQL", w.pg.close, w.pg.open, "done"}} { // the latter is begun anew
		w.Run(outage.name+" is lost in the middle", func() {
			there, release := w.kc.holdAt("^list_users ", false)
			a := w.do(start(w, true))
			w.wants(a, 202, "")
			<-there
			if err := outage.begin(); err != nil {
				w.Fatal(err)
			}
			release()
			if outage.name == "Keycloak" {
				ends(a.text("sync_id"))
			} else if err := w.logs.waitFor(40*time.Second, func(text string) bool {
				return regexp.MustCompile(`"task: (failed, will retry|lock not released[^"]*)","task":"job:sync"`).MatchString(text)
			}); err != nil {
				w.Error(err)
			}
			if err := outage.end(); err != nil {
				w.Fatal(err)
			}
			w.exec(`update tasks set due_at = now(), locked_until = null, locked_by = null where task_id = 'job:sync'`) // the lock has ended
			if a := ends(a.text("sync_id")); a.text("status") != outage.status {
				w.Errorf("it is %v", a)
			}
		})
	}
	w.Run("Keycloak is lost for a moment", func() {
		w.kc.on("^list_users ", lost)
		calls := w.kc.count("list_users")
		a := w.do(start(w, true))
		w.wants(a, 202, "")
		w.eventually("a call that fails", 20*time.Second, func() bool { return w.kc.count("list_users") > calls })
		w.kc.on("^list_users ", 0)
		if a := ends(a.text("sync_id")); a.text("status") != "done" {
			w.Errorf("it has failed: %v", a)
		}
	})
}

// A copy of the database that is older than Keycloak is put back.
func TestSyncRestored(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "SYNC_MAX_SHARE": "100"})
	accounts := map[string]string{} // what becomes of them, address
	for _, name := range []string{"stays", "moves", "promoted", "demoted", "deleted", "signs in", "restored", "deleted there"} {
		accounts[name] = newEmail()
		w.account(accounts[name])
	}
	id := func(name string) string {
		return w.value(`select user_id from users where lower(email) = $1`, accounts[name])
	}
	admin := w.signsIn(w.administrator())
	w.command("grant-admin", accounts["demoted"])
	w.wants(w.as(admin, "DELETE", "/api/v1/users/"+id("restored")), 204, "")
	pendingBefore, replaced := newEmail(), newEmail()
	before := registered(w, pendingBefore)
	registered(w, replaced)
	w.wants(w.do(loggingOut(admin.text("refresh_token"))), 204, "")

	w.copyDatabase(w.db, w.db+"_copy")
	admin = w.signsIn(w.value(`select email from users where role = 'admin' and email <> $1`, accounts["demoted"]))
	for _, name := range []string{"new", "newer"} {
		accounts[name] = newEmail()
		w.account(accounts[name])
	}
	pendingAfter := newEmail()
	after := registered(w, pendingAfter)
	unknown := newEmail()
	w.register(unknown)
	w.minuteLater(replaced)
	w.exec(`delete from rate_limits`)
	w.register(replaced)
	latest := w.readMail(replaced, 2)
	moved := newEmail()
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(accounts["moves"]), body{"email": moved}, nil)
	w.keycloakAdmin("DELETE", "/users/"+w.keycloakID(accounts["deleted there"]), nil, nil)
	patch := authorized(admin.text("access_token"), "PATCH", "/api/v1/users/"+id("promoted"))
	patch.json = body{"role": roleOperator, "network_id": "NET-1", "station_id": "STA-1"}
	w.wants(w.do(patch), 200, "")
	patch = authorized(admin.text("access_token"), "PATCH", "/api/v1/users/"+id("demoted"))
	patch.json = body{"role": roleUser}
	w.wants(w.do(patch), 200, "")
	w.wants(w.as(admin, "DELETE", "/api/v1/users/"+id("deleted")), 204, "")
	w.wants(w.as(admin, "POST", "/api/v1/users/"+id("restored")+"/restore"), 200, "")
	session := w.signsIn(accounts["signs in"])

	w.copyDatabase(w.db+"_copy", w.db)
	found, repaired, out, err := w.sync(nil)
	t.Logf("%v\n%s", err, out)
	for class, n := range map[difference]int{diffUnknown: 4, diffProfile: 1, diffRole: 2, diffDisabled: 1, diffMissing: 1, diffDeleted: 1} {
		if found[class] != n || repaired[class] != n {
			t.Errorf("%s: found %d, repaired %d, not %d", class, found[class], repaired[class], n)
		}
	}
	w.command("jobs")
	if found, _, out, err := w.sync(nil); err != nil || len(found) > 0 {
		t.Errorf("the second finds %s %v", out, err)
	}
	if wrong := w.outOfSync(); len(wrong) > 0 {
		t.Error(strings.Join(wrong, "\n"))
	}
	w.wants(w.do(refreshing(session.text("refresh_token"))), 401, "invalid-token")
	w.straysDie()
	for _, l := range []link{before, after, latest} {
		w.wants(w.do(verifying(l)), 200, "")
	}
	for _, name := range []string{"new", "newer", "stays", "signs in"} {
		w.signsIn(accounts[name])
	}
	w.signsIn(moved)
	w.wants(w.login(accounts["deleted"], password), 403, "account-disabled")
	w.wants(w.login(accounts["restored"], password), 403, "account-disabled") // nobody knows any more
	if got := w.value(`select role || network_id from users where email = $1`, accounts["promoted"]) + " " +
		w.value(`select role from users where email = $1`, accounts["demoted"]); got != "user admin" {
		t.Errorf("the roles are not those of the copy: %s", got)
	}
	if got := w.value(`select details->>'keycloak' from audit_log where action = 'user.overwrite' and target = $1`, id("promoted")); !strings.Contains(got, roleOperator) || !strings.Contains(got, "NET-1") {
		t.Errorf("what Keycloak had is on record as %s", got)
	}
	if !strings.Contains(out, descriptions[diffRole]) || !strings.Contains(out, descriptions[diffDeleted]) {
		t.Errorf("it does not say what it can't know: %s", out)
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
		w.eventually("the copy", 20*time.Second, func() bool {
			for _, sql := range []string{"drop database if exists " + to + " with (force)",
				"select pg_terminate_backend(pid) from pg_stat_activity where datname = '" + from + "'",
				"create database " + to + " template " + from} {
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

// noEvents keeps those of Keycloak from being applied.
func (w *env) noEvents() {
	w.Helper()
	w.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = 'job:events'`)
}

// What sync must not do, and what it must not forget.
func TestSyncRules(t *testing.T) {
	s := newSeeds()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "RESEND_COOLDOWN": "1ms"}, s.inKeycloak(0, 12)...)
	v, _ := w.another(nil)
	admin := w.signsIn(w.administrator())
	fromKeycloak := func(id string) (ku body) {
		w.Helper()
		w.keycloakAdmin("GET", "/users/"+id, nil, &ku)
		return ku
	}
	confirmed := func(email string, enabled bool) { // as V3 leaves it, but for enabled
		w.Helper()
		id := w.keycloakID(email)
		ku := fromKeycloak(id)
		for _, name := range []string{attrURL, attrToken, attrCode} {
			delete(ku["attributes"].(body), name)
		}
		maps.Copy(ku, body{"emailVerified": true, "enabled": enabled, "requiredActions": []string{},
			"credentials": []body{{"type": "password", "value": password, "temporary": false}}})
		w.keycloakAdmin("PUT", "/users/"+id, ku, nil)
	}
	row := func(email string) string {
		w.Helper()
		return w.value(`select coalesce(min(case when is_active then 'active' else 'deleted' end || case when is_verified then '' else ', not confirmed' end
			), 'none') from users where lower(email) = lower($1)`, email)
	}
	is := func(email, want string) {
		w.Helper()
		if got := row(email); got != want {
			w.Errorf("%s is %s, not %s", email, got, want)
		}
	}
	finds := func(settings map[string]string, want map[difference]int) {
		w.Helper()
		found, repaired, out, err := w.sync(settings)
		if diff := cmp.Diff(want, found); diff != "" || err != nil || !maps.Equal(found, repaired) {
			w.Errorf("%v: found %s\n%s", err, diff, out)
		}
	}
	stopped := func() {
		w.Helper()
		before := w.seenHere()
		if _, _, out, err := w.sync(nil); err == nil || !strings.Contains(out, "aborted") {
			w.Errorf("%v: %s", err, out)
		}
		if diff := cmp.Diff(before, w.seenHere()); diff != "" {
			w.Error(diff)
		}
	}

	w.Run("a limit of 100 % is none", func() {
		s.here(w, 100, 112)
		stopped()
		finds(map[string]string{"SYNC_MAX_SHARE": "100"}, map[difference]int{diffUnknown: 12, diffMissing: 12})
	})
	for how, do := range map[string]func(string, link){
		"by its task":       func(email string, _ link) { w.settleNow(email); w.command("jobs") },
		"by another click":  func(_ string, l link) { w.wants(w.do(verifying(l)), 200, ""); w.command("jobs") },
		"when it is denied": func(_ string, l link) { w.wants(w.do(cancelling(l)), 409, "already-verified"); w.command("jobs") },
		"when it is begun again": func(email string, _ link) {
			w.do(registering(email))
			w.settleNow(email)
			w.command("jobs")
		},
		"when a mail is asked for": func(email string, _ link) {
			w.do(resending(w.registrationOf(email)))
			w.settleNow(email)
			w.command("jobs")
		},
	} {
		w.Run("confirmed and disabled in Keycloak, "+how, func() {
			email := newEmail()
			l := registered(w, email)
			confirmed(email, false)
			do(email, l)
			is(email, "deleted")
			if fromKeycloak(w.keycloakID(email))["enabled"] != false {
				w.Error("it was enabled")
			}
		})
		w.Run("confirmed in Keycloak, "+how, func() {
			email := newEmail()
			l := registered(w, email)
			confirmed(email, true)
			do(email, l)
			is(email, "active")
			w.signsIn(email)
		})
	}
	w.Run("confirmed in Keycloak before its id was here", func() {
		var emails []string
		for range 2 {
			email := newEmail()
			emails = append(emails, email)
			registered(w, email)
			confirmed(email, true)
			w.exec(`update user_registrations set keycloak_id = null, user_id = null where email = $1`, email)
			w.exec(`delete from users where email = $1`, email)
			w.settleNow(email)
		}
		w.command("jobs")
		for _, email := range emails {
			is(email, "active")
			w.signsIn(email)
		}
	})
	w.Run("a registration whose token is removed in Keycloak", func() {
		for _, mailed := range []bool{true, false} {
			email := newEmail()
			if !mailed {
				w.mail.Close()
			}
			w.register(email)
			w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"email": email, "username": email, "attributes": body{}}, nil)
			if !mailed {
				if err := w.mail.Restart(); err != nil {
					w.Fatal(err)
				}
			}
			id := w.registrationOf(email)
			w.wants(w.do(resending(id)), 503, "unavailable")
			w.wants(w.do(resending(id)), 404, "registration-not-found")
			is(email, "none")
		}
	})
	w.Run("confirmed by another while its mail is sent", func() {
		email := newEmail()
		there, release := w.kc.holdAt("^send_mail ", true)
		got := make(chan answer)
		go func() { got <- w.do(registering(email)) }()
		<-there
		id := w.registrationOf(email)
		w.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = $1`, id) // ours has ended
		confirmed(email, true)
		release()
		<-got
		if fromKeycloak(w.keycloakID(email))["enabled"] != true {
			w.Error("it was disabled")
		}
		w.exec(`update tasks set locked_by = null, locked_until = null, due_at = now() where task_id = $1`, id)
		w.command("jobs")
		is(email, "active")
	})
	w.Run("a code for a registration that Keycloak does not have yet", func() {
		email := newEmail()
		l := registered(w, email)
		w.keycloakAdmin("DELETE", "/users/"+w.keycloakID(email), nil, nil)
		w.exec(`update user_registrations set keycloak_id = null, user_id = null, mail_state = 'queued' where email = $1`, email) // R1
		w.exec(`delete from users where email = $1`, email)
		w.wants(w.do(typing(email, other(l.Code))), 400, "invalid-code")
		w.wants(w.do(verifying(w.readMail(email, 2))), 200, "")
	})
	w.Run("an address that is not confirmed yet is managed", func() {
		email, _ := w.signedIn()
		w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"email": "new-" + email, "emailVerified": false}, nil)
		w.command("jobs")
		is("new-"+email, "active, not confirmed")
		w.wants(w.do(forgetting("new-"+email)), 202, "")
		w.eventually("the mail", 20*time.Second, func() bool { return len(w.mail.To("new-"+email)) == 1 })
		path := "/" + w.userOf("new-"+email)
		w.wants(w.do(managing(admin, "PATCH", path, body{"role": "operator", "network_id": "N1", "station_id": "S1"})), 200, "")
		w.wants(w.do(managing(admin, "DELETE", path+"/sessions", nil)), 204, "")
		w.wants(w.do(managing(admin, "DELETE", path, nil)), 204, "")
		w.wants(w.do(managing(admin, "POST", path+"/restore", nil)), 200, "")
		w.keycloakAdmin("PUT", "/users/"+w.keycloakID("new-"+email), body{"emailVerified": true}, nil)
		w.command("jobs")
		is("new-"+email, "active")
	})
	w.Run("a registration that has ended", func() {
		email := newEmail()
		l := registered(w, email)
		id := w.keycloakID(email)
		ku := fromKeycloak(id)
		w.wants(w.do(cancelling(l)), 200, "")
		delete(ku, "id")
		w.keycloakAdmin("POST", "/users", ku, nil) // as a restored Keycloak has it
		finds(nil, map[difference]int{diffUnknown: 1})
		w.command("jobs") // its task deletes it
		is(email, "none")
		if left := w.inKeycloak(email); len(left) > 0 {
			w.Errorf("in Keycloak %v is left", left)
		}
		maps.Copy(ku, body{"emailVerified": true, "enabled": true, "requiredActions": []string{}})
		w.keycloakAdmin("POST", "/users", ku, nil)
		finds(nil, map[difference]int{diffUnknown: 1}) // and an account is never deleted
		is(email, "active")
		w.keycloakAdmin("DELETE", "/users/"+w.keycloakID(email), nil, nil)
		w.exec(`delete from users where email = $1`, email)
	})
	w.Run("a refresh says what is true here", func() {
		email, a := w.signedIn()
		w.edits(w.keycloakID(email), body{attrRoles: []string{roleAdmin}, attrNetworkID: []string{"NET-1"}})
		a = w.refreshed(a)
		if claims := unpacked(a.text("access_token"), 1); fmt.Sprintf("%v %v", claims["roles"], claims["network_id"]) != "[user] X" {
			w.Errorf("the token says %v", claims)
		}
		w.wants(w.do(bearing(validatePath, w.refreshed(a).text("access_token"))), 200, "")
	})
	w.Run("several sign-ins of one whom only Keycloak knows", func() {
		for range 4 {
			email := newEmail()
			w.keycloakAdmin("POST", "/users", body{"username": email, "email": email, "enabled": true, "emailVerified": true,
				"credentials": []body{{"type": "password", "value": password, "temporary": false}}}, nil)
			for _, a := range w.at([]string{w.url, v.url}, signingIn(email, password), signingIn(email, password), signingIn(email, password)) {
				w.wants(a, 200, "")
			}
		}
	})
	w.Run("what changes during a dry run is no difference", func() {
		email := newEmail()
		l := registered(w, email)
		there, release := w.kc.holdAt("^list_users ", true)
		ended := make(chan string)
		go func() {
			found, _, out, err := w.sync(nil, "-dry-run")
			ended <- fmt.Sprint(len(found), err, out)
		}()
		<-there
		w.wants(w.do(verifying(l)), 200, "")
		release()
		if got := <-ended; !strings.HasPrefix(got, "0 <nil>") {
			w.Error(got)
		}
	})
	w.Run("addresses that others have given up", func() {
		var ids, emails []string
		for range 4 {
			email := newEmail()
			w.account(email)
			ids, emails = append(ids, w.keycloakID(email)), append(emails, newEmail())
		}
		becomes := func(who int, email string) { w.keycloakAdmin("PUT", "/users/"+ids[who], body{"email": email}, nil) }
		for who := range 3 {
			becomes(who, emails[who+1])
		}
		w.command("jobs")
		for who := range 3 {
			becomes(3-who, newEmail()) // looked at first, when the address is not free here
		}
		for who := range 4 {
			becomes(who, emails[who])
		}
		for range 3 { // a conflict is tried again
			w.command("jobs")
		}
		if got := w.value(`select string_agg(email, ' ' order by created_at) from users where keycloak_id = any($1)`, ids); got != strings.Join(emails, " ") {
			w.Errorf("they have %s", got)
		}
	})
	w.Run("a registration in other hands", func() {
		email := newEmail()
		registered(w, email)
		id := w.registrationOf(email)
		w.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = $1`, id)
		w.keycloakAdmin("DELETE", "/users/"+w.keycloakID(email), nil, nil)
		w.command("jobs")
		is(email, "active, not confirmed")
		w.exec(`update tasks set locked_by = null, locked_until = null, due_at = now() where task_id = $1`, id)
		w.command("jobs")
		is(email, "none")
	})
	w.Run("a cursor in the future", func() {
		email := newEmail()
		w.account(email)
		w.exec(`update sync_cursor set admin_at = $1, user_at = $1`, time.Now().Add(time.Hour).UnixMilli())
		w.command("jobs")
		w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"firstName": "Grace"}, nil)
		w.command("jobs")
		if got := w.value(`select first_name from users where email = $1`, email); got != "Grace" {
			w.Errorf("the name is %s", got)
		}
	})
}

// settleNow makes the registrations of an address due.
func (w *env) settleNow(email string) {
	w.Helper()
	w.exec(`update tasks set due_at = now() where task_id = (select registration_id from user_registrations where email = $1)`, email)
}

// inKeycloak returns the ids of the users there who have an address.
func (w *env) inKeycloak(email string) (ids []string) {
	w.Helper()
	var users []body
	w.keycloakAdmin("GET", "/users?exact=true&email="+url.QueryEscape(email), nil, &users)
	for _, u := range users {
		ids = append(ids, u["id"].(string))
	}
	return ids
}
