package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
)

// What a request or job costs PostgreSQL must not grow with the tables. So the service
// does everything that it can do twice, with few rows and with many, while PostgreSQL
// writes down the plan of each statement and how many blocks it has looked at.

// seededTables fill the tables: $1 and $2 are the first and last number of the rows. The shares
// are those of a service in use. Nothing of it is due, and Keycloak has nothing of it. What
// a filter finds few of is the oldest, so that whoever walks there in time's order is late.
var seededTables = []struct{ table, sql string }{
	{"users", `
		insert into users (user_id, keycloak_id, email, username, first_name, last_name, is_verified, role, network_id, station_id,
			source, is_active, deleted_at, created_at, updated_at)
		select id('USR', i), md5('kc' || i), md5('mail' || i) || '@example.test', md5('name' || i), 'Ada', left(md5('last' || i), 8), r(i, 1, 100) < 80,
			case when i between 4 and 6 then 'admin' when r(i, 2, 100) = 0 then 'partner' when r(i, 2, 100) < 3 then 'operator' else 'user' end,
			case when i < 4 then 'NET-few' when r(i, 3, 10) < 4 then '' else 'NET-' || r(i, 4, 100) end,
			case when i < 4 then 'STA-few' when r(i, 3, 10) < 4 then '' else 'STA-' || r(i, 4, 1000) end,
			case when i < 4 or r(i, 5, 20) = 0 then 'internal' else 'web' end, d is null, d, t, t
		from generate_series($1::int, $2) i, lateral (select now() - (2000000 - i) * interval '10 seconds' as t) at,
			lateral (select case when i > 6 and r(i, 6, 10) = 0 then t end as d) deleted`},
	{"user_registrations", `
		insert into user_registrations (registration_id, email, username, verification_token, verification_code, status, keycloak_id, user_id,
			expires_at, verified_at, created_at, mail_state, mailed_at, ended_at)
		select id('REG', i), case when ended then '' else md5('mail' || i) || '@example.test' end, case when ended then '' else md5('name' || i) end,
			md5('token' || i), 'a', s, case when not ended then md5('kc' || i) end, case when not ended then id('USR', i) end,
			now() + interval '1 year', case when s = 'verified' then now() end, t, 'sent', case when not ended then t end,
			case when ended then now() - r(i, 2, 20) * interval '1 day' end
		from generate_series($1::int, $2) i, lateral (select now() - (2000000 - i) * interval '10 seconds' as t) at,
			lateral (select case when r(i, 1, 100) < 80 then 'verified' when r(i, 1, 100) < 95 then 'expired'
				when r(i, 1, 100) < 98 then 'cancelled' else 'pending' end as s) status,
			lateral (select s in ('expired', 'cancelled') as ended) over`},
	{"tasks", ` -- of registrations that wait for their confirmation
		insert into tasks (task_id, due_at) select id('REG', i), now() + interval '1 year' from generate_series($1::int, $2) i`},
	{"sessions", ` -- one in ten is of the same user, a machine that signs in anew for each thing it does
		insert into sessions (session_id, user_id, keycloak_session_id, ip_address, user_agent, created_at, last_used_at, expires_at, ended_at, ended_reason)
		select id('SES', i), id('USR', case when i % 10 = 1 then 1 else i end), md5('sid' || i), '192.0.2.7', 'curl', t, t, t + interval '1 year',
			case when i % 20 > 0 then t end, case when i % 20 > 0 then 'logout' end
		from generate_series($1::int, $2) i, lateral (select now() - (2000000 - i) * interval '1 second' as t) at`},
	{"refresh_tokens", `
		insert into refresh_tokens (token_hash, session_id, used_at, answer)
		select md5('token' || i) || md5('hash' || i), id('SES', greatest(i / 20, 1) * 20), case when i % 20 > 0 then now() + interval '1 year' end,
			case when i % 50 = 1 then 'sealed'::bytea end
		from generate_series($1::int, $2) i`},
	{"revocations", `
		insert into revocations (at, keycloak_session_id, user_id, role, network_id, station_id, is_active)
		select now() - interval '5 minutes' - r(i, 1, 1200) * interval '1 second', case when i % 2 = 0 then md5('sid' || i) else '' end, id('USR', i), 'user', '', '', true
		from generate_series($1::int, $2) i`},
	{"audit_log", `
		insert into audit_log (audit_id, at, actor, action, target, outcome, reason, network_id, ip_address, user_agent, request_id, details)
		select id('AUD', i), case when i < 4 then now() - interval '150 days' else now() - interval '10 minutes' - n * interval '12 seconds' end,
			case when r(i, 1, 100) < 60 then id('USR', r(i, 2, 100000)) when r(i, 1, 100) < 90 then 'anonymous' else 'system:registrations' end,
			case when i < 4 then 'user.grant_admin' else (array['login', 'login', 'login', 'logout', 'session.end', 'registration.begin', 'registration.mail',
				'registration.verified', 'user.create', 'user.update'])[1 + r(i, 3, 10)] end, id('USR', r(i, 4, 100000)),
			case when i < 4 then 'failed' when r(i, 5, 10) = 0 then 'refused' else 'ok' end, '',
			case when i < 4 then 'NET-few' when r(i, 6, 10) < 4 then '' else 'NET-' || r(i, 7, 100) end, '192.0.2.7', 'curl', md5('request' || i), '{"session_id": "SES-V1StGXR8_Z5jdHi6"}'
		from generate_series($1::int, $2) i, lateral (select (i * 7919::bigint) % 1000003 as n) number`},
	{"rate_limits", `
		insert into rate_limits (key, hits, resets_at) select 'mail:' || md5('key' || i), 1, now() + r(i, 1, 86400) * interval '1 second' + interval '1 hour'
		from generate_series($1::int, $2) i`},
	{"sync_runs", ` -- one a day, and ten dry ones before each
		insert into sync_runs (sync_id, dry_run, status, started_by, started_at, ended_at, checked, total)
		select id('SYN', i), i % 10 > 0, 'done', 'system:sync', t, t, i, i
		from generate_series($1::int, $2) i, lateral (select now() - interval '2 days' - (2000000 - i) * interval '1 hour' as t) at`},
}

// seed adds the rows of these numbers to each table.
func (w *env) seed(first, last int) {
	w.Helper()
	w.exec(`
		create or replace function r(i bigint, salt int, n int) returns int language sql immutable as 'select abs(hashint8extended(i, salt) % n)::int';
		create or replace function id(kind text, i bigint) returns text language sql immutable as $$ select kind || '-' || left(md5(kind || i), 16) $$;
		select audit_log_month(now() - n * interval '1 month') from generate_series(0, 6) n`)
	var all sync.WaitGroup
	for _, s := range seededTables {
		all.Go(func() {
			err := pgx.BeginFunc(w.Context(), w.pool, func(tx pgx.Tx) error { return seedTable(w.Context(), tx, s.table, s.sql, first, last) })
			if err == nil {
				_, err = w.pool.Exec(w.Context(), `vacuum analyze `+s.table)
			}
			if err != nil {
				w.Errorf("%s: %v", s.table, err)
			}
		})
	}
	all.Wait()
	if w.Failed() {
		w.FailNow()
	}
}

// seedTable makes the table's indexes anew, which is faster than to add to them, and leaves
// out its foreign keys.
func seedTable(ctx context.Context, tx pgx.Tx, table, sql string, first, last int) error {
	rows, _ := tx.Query(ctx, `select format('drop index %s', indexrelid::regclass), replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON ') from pg_index
		where indrelid = $1::regclass and not exists (select from pg_constraint where conindid = indexrelid)`, table)
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct{ Drop, Create string }])
	if err != nil {
		return err
	}
	before, after := []string{`set local session_replication_role = replica; set local maintenance_work_mem = '256MB'`}, []string{}
	for _, index := range indexes {
		before, after = append(before, index.Drop), append(after, index.Create)
	}
	if _, err := tx.Exec(ctx, strings.Join(before, "; ")); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, sql, first, last); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, strings.Join(after, "; "))
	return err
}

// planKinds are for any values, or made for those of each call: PostgreSQL may take either.
var planKinds = []string{"force_generic_plan", "force_custom_plan"}

// statementPlan builds a env with an instance for each kind of plan. PostgreSQL logs the plans
// of all that they do.
func statementPlan(t testing.TB) (w *env, instances []string) {
	t.Helper()
	w = uncheckedEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.vars["DATABASE_URL"] += "&" + url.Values{"plan_cache_mode": planKinds[:1], "session_preload_libraries": {"auto_explain"},
		"auto_explain.log_min_duration": {"0"}, "auto_explain.log_analyze": {"on"}, "auto_explain.log_buffers": {"on"}, "auto_explain.log_timing": {"off"},
		"auto_explain.log_nested_statements": {"on"}, "auto_explain.log_format": {"json"}}.Encode()
	for _, kind := range planKinds {
		w.planKind(kind)
		instance, err := w.start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		instances = append(instances, instance)
	}
	w.url = instances[0]
	return w, instances
}

// planKind decides for what is started from now on.
func (w *env) planKind(kind string) {
	w.vars["DATABASE_URL"] = regexp.MustCompile(`force_\w+_plan`).ReplaceAllString(w.vars["DATABASE_URL"], kind)
}

// cost is what a statement has cost, over all of its calls.
type cost struct {
	blocks int             // of the worst
	times  []float64       // ms
	scans  map[string]bool // tables that it went through
	worst  node
}

func (c cost) median() float64 { slices.Sort(c.times); return c.times[len(c.times)/2] }

// explained is a plan as auto_explain logs it.
type explained struct {
	Text string `json:"Query Text"`
	Plan node
}

type node struct {
	Type     string `json:"Node Type"`
	Relation string `json:"Relation Name"`
	Index    string `json:"Index Name"`
	Subplan  string `json:"Subplan Name"`
	Hit      int    `json:"Shared Hit Blocks"`
	Read     int    `json:"Shared Read Blocks"`
	Plans    []node
}

var seeded = regexp.MustCompile(`^(users|user_registrations|sessions|refresh_tokens|revocations|audit_log.*|rate_limits|sync_runs|tasks)$`)

// wholePass are statements of a full pass of sync, which goes through all users.
var wholePass = regexp.MustCompile(`^select keycloak_id from users where is_active$`)

// blocks are those that a statement has looked at. A part of it that changes something and
// that nothing reads from is done after the rest.
func (n node) blocks() int {
	sum := n.Hit + n.Read
	for _, child := range n.Plans {
		if strings.HasPrefix(child.Subplan, "CTE ") && child.Type == "ModifyTable" {
			sum += child.Hit + child.Read
		}
	}
	return sum
}

// String is the outline of a plan.
func (n node) String() string {
	text := strings.TrimSpace(n.Type+" "+cmp.Or(n.Index, n.Relation)) + fmt.Sprintf(" %d", n.Hit+n.Read)
	for _, child := range n.Plans {
		text += "\n" + strings.ReplaceAll(child.String(), "\n", "\n  ")
	}
	return text
}

// scans adds the tables that were read from end to end; an empty month is, and so may be this one if it has just begun.
func (n node) scans(found map[string]bool) {
	most := 10
	if n.Relation == time.Now().UTC().Format("audit_log_2006_01") {
		most = pageBlocks
	}
	if n.Type == "Seq Scan" && n.Hit+n.Read > most && seeded.MatchString(n.Relation) {
		found[n.Relation] = true
	}
	for _, child := range n.Plans {
		child.scans(found)
	}
}

// costs are the statements of a walk by their text.
func (w *env) costs(walk func()) map[string]cost {
	w.Helper()
	path := filepath.Join(services.Dir, "postgres.log")
	before, err := os.Stat(path)
	if err != nil {
		w.Fatal(err)
	}
	walk()
	log, err := os.ReadFile(path)
	if err != nil {
		w.Fatal(err)
	}
	all := map[string]cost{}
	for _, m := range loggedPlan.FindAllSubmatch(log[before.Size():], -1) {
		var e explained
		if err := json.Unmarshal(m[2], &e); err != nil {
			w.Fatalf("%v\n%s", err, m[0])
		}
		text := plainSQL(e.Text)
		c := all[text]
		if c.scans == nil {
			c.scans = map[string]bool{}
		}
		ms, _ := strconv.ParseFloat(string(m[1]), 64)
		c.times = append(c.times, ms)
		e.Plan.scans(c.scans)
		if blocks := e.Plan.blocks(); blocks >= c.blocks {
			c.blocks, c.worst = blocks, e.Plan
		}
		all[text] = c
	}
	return all
}

var loggedPlan = regexp.MustCompile(`LOG:  duration: ([\d.]+) ms  plan:\n((?:\t.*\n)+)`)

// plainSQL is a statement in one line.
func plainSQL(text string) string { return strings.Join(strings.Fields(text), " ") }

// statements are the patterns of all SQL in the source: every raw string that begins like
// SQL, with whatever is put together with it.
func statements(t testing.TB) map[string]*regexp.Regexp {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	begins, found, set := regexp.MustCompile("^`\\s*(select|insert|update|delete|with|where)\\s"), map[string]*regexp.Regexp{}, token.NewFileSet()
	var pattern func(ast.Expr) string
	pattern = func(e ast.Expr) string {
		switch e := e.(type) {
		case *ast.BinaryExpr:
			return pattern(e.X) + pattern(e.Y)
		case *ast.BasicLit:
			text, _ := strconv.Unquote(e.Value)
			return regexp.MustCompile(`%[sd]`).ReplaceAllString(regexp.QuoteMeta(plainSQL(text)), ".*")
		}
		return ".*"
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			e, ok := n.(ast.Expr)
			first := e
			for binary, ok := first.(*ast.BinaryExpr); ok; binary, ok = first.(*ast.BinaryExpr) {
				first = binary.X
			}
			if literal, isLiteral := first.(*ast.BasicLit); ok && isLiteral && begins.MatchString(literal.Value) {
				found[set.Position(e.Pos()).String()] = regexp.MustCompile(pattern(e))
				return false
			}
			return true
		})
	}
	return found
}

// lists are the paths of a list with every combination of its filters' values.
func lists(t testing.TB, path string, in any, values map[string][]string) []string {
	t.Helper()
	queries := []string{path + "?"}
	for _, field := range reflect.VisibleFields(reflect.TypeOf(in)) {
		name := field.Tag.Get("query")
		if name == "" || name == "limit" {
			continue
		}
		if values[name] == nil {
			t.Fatalf("no test filters %s by %s", path, name)
		}
		var longer []string
		for _, query := range queries {
			for _, value := range values[name] {
				if longer = append(longer, query); value != "" {
					longer[len(longer)-1] += name + "=" + url.QueryEscape(value) + "&"
				}
			}
		}
		queries = longer
	}
	return queries
}

// readers are who reads lists, by role, and a user of whom they read.
type readers struct {
	signIns map[string]answer
	user    string
}

// lists reads the lists along each scope's index: with filters that many rows pass, or the
// index has, or that find a single row. The others are rareFilters.
func (r readers) lists(w *env) {
	w.Helper()
	middle := func(kind string, days int) string {
		return cursor{time.Now().AddDate(0, 0, -days), kind + "-0000000000000000"}.String()
	}
	month := func(n int) string { return time.Now().AddDate(0, -n, 0).Format(time.RFC3339) }
	single := w.value(`select left(email, 12) from users where user_id = id('USR', 7)`)
	for role, paths := range map[string][]string{
		"admin": slices.Concat(
			lists(w, "/api/v1/users", usersIn{}, map[string][]string{"cursor": {"", middle("USR", 230)}, "role": {"", "user"},
				"network_id": {"", "NET-7", "NET-few"}, "station_id": {""}, "source": {"", "web"}, "q": {"", "example", single}, "include_deleted": {"", "true"}}),
			lists(w, "/api/v1/users", usersIn{}, map[string][]string{"cursor": {""}, "role": {""}, "network_id": {"NET-7"},
				"station_id": {"STA-107"}, "source": {"", "web"}, "q": {""}, "include_deleted": {"", "true"}}),
			lists(w, "/api/v1/audit", auditIn{}, map[string][]string{"cursor": {"", middle("AUD", 70)}, "actor": {"", "anonymous", r.user},
				"target": {"", r.user}, "action": {"", "login"}, "outcome": {"", "ok"}, "from": {"", month(4)}, "to": {"", month(1)}})),
		"partner": slices.Concat(
			lists(w, "/api/v1/users", usersIn{}, map[string][]string{"cursor": {""}, "role": {"", "user"}, "network_id": {""},
				"station_id": {"", "STA-107"}, "source": {""}, "q": {"", "example"}, "include_deleted": {"", "true"}}),
			lists(w, "/api/v1/audit", auditIn{}, map[string][]string{"cursor": {""}, "actor": {"", r.user}, "target": {"", r.user},
				"action": {""}, "outcome": {"", "ok"}, "from": {""}, "to": {""}})),
		"operator": {"/api/v1/users", "/api/v1/users?role=user"},
		"user":     {"/api/v1/users"},
	} {
		for _, path := range paths {
			w.wants(w.as(r.signIns[role], "GET", path), 200, "")
		}
	}
}

// rareFilters have no index: PostgreSQL walks along that of the scope and passes over the rows
// that don't fit, or reads all of the scope and sorts it. Who asks so rarely can wait for
// milliseconds; an index for each combination would cost every write.
var rareFilters = []struct{ role, path, why string }{
	{role: "admin", path: "/api/v1/users?role=admin", why: "few have that role"},
	{role: "admin", path: "/api/v1/users?role=operator&source=internal", why: "each is rare, both are rarer"},
	{role: "admin", path: "/api/v1/users?station_id=STA-107", why: "a station is looked for in its network"},
	{role: "admin", path: "/api/v1/users?station_id=STA-few&include_deleted=true&q=example", why: "the same, and the text is everybody's"},
	{role: "partner", path: "/api/v1/users?role=admin", why: "its network has none: all of it is read"},
	{role: "admin", path: "/api/v1/audit?action=user.grant_admin", why: "three of all entries, the oldest"},
	{role: "admin", path: "/api/v1/audit?outcome=failed", why: "the same three"},
	{role: "admin", path: "/api/v1/audit?actor=anonymous&action=user.grant_admin", why: "the actor has a third of all entries, few are of that action"},
	{role: "partner", path: "/api/v1/audit?action=login", why: "a third of its network's entries"},
	{role: "partner", path: "/api/v1/audit?actor=anonymous&outcome=failed", why: "neither the network nor the actor has few"},
}

// doEverything has the service do all that it can do.
func (w *env) doEverything(instances []string) readers {
	w.Helper()
	w.doCommands()
	email := w.doRegistrations()
	w.doSessions(email)
	admin := w.doSignIns(email)
	signIns := map[string]answer{"admin": admin}
	for _, role := range []string{"partner", "operator", "user"} {
		email := newEmail()
		w.wants(w.do(managing(admin, "POST", "", body{"email": email, "role": role, "network_id": "NET-7", "station_id": "STA-7"})), 201, "")
		w.confirms(w.readMail(email, 1))
		signIns[role] = w.signsIn(email)
	}
	user := w.doUsers(admin, signIns["user"])

	// Lists. Their plans are made for the values of each call, never generic ones.
	signIns["user"] = w.signsIn(w.value(`select email from users where user_id = $1`, user))
	reading := readers{signIns, user}
	w.url = instances[slices.Index(planKinds, "force_custom_plan")]
	reading.lists(w)
	w.url = instances[0]
	w.wants(w.get("/health"), 200, "")

	w.doTasks(signIns["user"].text("session_id"), email)
	w.operates("doctor")
	w.wants(w.as(admin, "GET", "/api/v1/sync/"+w.value(`select sync_id from sync_runs order by started_at desc limit 1`)), 200, "")
	return reading
}

// operates runs a subcommand, which must succeed.
func (w *env) operates(args ...string) {
	w.Helper()
	if out, err := w.operate(args...); err != nil {
		w.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// stranger is an account that only Keycloak has.
func (w *env) stranger(attributes body) {
	w.Helper()
	email := newEmail()
	w.keycloakAdmin("POST", "/users", body{"username": email, "email": email, "enabled": true, "emailVerified": true, "attributes": attributes}, nil)
}

// doCommands migrates, and makes a full pass, which is aborted, since Keycloak has few of the
// users. What events tell later is done by the tasks.
func (w *env) doCommands() {
	w.Helper()
	w.operates("migrate")
	w.stranger(nil)
	for _, kind := range planKinds {
		w.planKind(kind)
		if _, _, out, err := w.sync(map[string]string{"SYNC_MAX_SHARE": "0"}); err == nil || !strings.Contains(out, "aborted") {
			w.Fatalf("%v: %s", err, out)
		}
	}
	w.operates("jobs") // events from now on
	w.stranger(nil)
	w.stranger(body{attrRegistrationID: []string{string(newRegistrationID())}})
}

func (w *env) doRegistrations() (email string) {
	w.Helper()
	email = newEmail()
	id := w.register(email).text("registration_id")
	w.wants(w.login(email, password), 403, "account-not-verified")
	w.wants(w.do(resending(id)), 429, "resend-too-soon")
	w.minuteLater(email)
	w.wants(w.do(resending(id)), 200, "")
	l := w.readMail(email, 2)
	w.wants(w.do(typing(email, other(l.Code))), 400, "invalid-code")
	w.wants(w.do(typing(email, l.Code)), 200, "")
	w.wants(w.do(verifying(l)), 200, "")
	w.wants(w.do(typing(newEmail(), "123456")), 400, "invalid-code")
	again := newEmail()
	w.register(again)
	w.minuteLater(again)
	w.register(again)
	w.wants(w.do(cancelling(w.readMail(again, 2))), 200, "")
	byAddress := newEmail()
	w.register(byAddress)
	w.minuteLater(byAddress)
	w.wants(w.post(resendPath, body{"email": byAddress}), 200, "")
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"firstName": "Grace"}, nil)
	w.edits(w.keycloakID(email), body{attrRoles: []string{roleAdmin}})
	late := newEmail()
	id = w.register(late).text("registration_id")
	w.wants(w.get("/api/v1/registrations/"+id), 200, "")
	w.expire(late)
	w.during("prepare_mail", lost, func() { w.register(newEmail()) }) // its mail is queued
	w.wants(w.do(registering(email)), 409, "user-exists")
	return email
}

func (w *env) doSessions(email string) {
	w.Helper()
	a := w.signsIn(email)
	w.during("refresh", lost, func() { w.wants(w.do(refreshing(a.text("refresh_token"))), 503, "unavailable") })
	next := w.refreshed(a)
	w.refreshed(a)
	w.refreshed(next)
	w.exec(`update refresh_tokens set used_at = used_at - interval '5 minutes' where session_id = $1`, a.text("session_id"))
	w.wants(w.do(refreshing(a.text("refresh_token"))), 401, "token-reused")
	w.wants(w.do(loggingOut(w.signsIn(email).text("refresh_token"))), 204, "")
	w.during("end_session", lost, func() { w.wants(w.do(loggingOut(w.signsIn(email).text("refresh_token"))), 204, "") })
	a = w.signsIn(email)
	w.wants(w.as(a, "GET", "/api/v1/auth/me"), 200, "")
	w.direct(email, password)
	w.eventually("a session of Keycloak is listed", time.Minute, func() bool {
		return len(w.as(a, "GET", sessionsPath).JSON["items"].([]any)) > 1
	})
	w.wants(w.as(a, "DELETE", sessionsPath+"/"+a.text("session_id")), 204, "")
	w.wants(w.as(w.signsIn(email), "DELETE", sessionsPath), 204, "")
	w.wants(w.do(forgetting(email)), 202, "")
	w.command("jobs")
	if _, err := w.mail.WaitFor(w.Context(), email, 3); err != nil {
		w.Fatal(err)
	}
}

// doSignIns makes an account an administrator, and signs it in.
func (w *env) doSignIns(email string) (admin answer) {
	w.Helper()
	w.operates("grant-admin", email)
	return w.signsIn(email)
}

// doUsers manages users, and returns one of them.
func (w *env) doUsers(admin, signIn answer) (id string) {
	w.Helper()
	send := func(method, path string, in any) answer {
		w.Helper()
		return w.do(managing(admin, method, path, in))
	}
	stranger := newEmail()
	w.register(stranger)
	w.wants(send("POST", "", body{"email": stranger, "role": "operator"}), 201, "") // it becomes an invitation
	w.wants(send("DELETE", "/"+w.userOf(stranger), nil), 204, "")
	elsewhere := "only-in-keycloak-" + strings.ReplaceAll(stranger, "@", ".")
	w.keycloakAdmin("POST", "/users", body{"username": elsewhere, "email": newEmail()}, nil)
	w.wants(send("POST", "", body{"email": newEmail(), "username": elsewhere}), 409, "user-exists")
	one := "/" + w.value(`select user_id from sessions where session_id = $1`, signIn.text("session_id"))
	w.wants(send("PATCH", one, body{"first_name": "Grace"}), 200, "")
	w.during("push_user", lost, func() { w.wants(send("PATCH", one, body{"station_id": "STA-9"}), 200, "") })
	w.wants(send("PATCH", one, body{"station_id": "STA-8"}), 200, "")
	w.wants(send("DELETE", one+"/sessions/"+signIn.text("session_id"), nil), 204, "")
	w.wants(send("DELETE", one, nil), 204, "")
	w.wants(send("POST", one+"/restore", nil), 200, "")
	machine := "/" + w.value(`select id('USR', 1)`)
	w.wants(send("GET", machine, nil), 200, "")
	w.wants(send("GET", machine+"/sessions", nil), 200, "")
	w.wants(send("DELETE", machine+"/sessions", nil), 204, "")
	second := newEmail()
	w.account(second)
	w.operates("grant-admin", second)
	secondID := "/" + w.value(`select user_id from users where email = $1`, second)
	w.wants(send("DELETE", secondID, nil), 204, "")
	w.wants(send("DELETE", secondID+"?erase=true", nil), 204, "")
	w.wants(send("GET", "/USR-0000000000000000", nil), 404, "user-not-found")
	return strings.TrimPrefix(one, "/")
}

// doTasks does what is in the queue, and what recurs, by each kind of plan.
func (w *env) doTasks(session, email string) {
	w.Helper()
	for _, kind := range planKinds {
		w.planKind(kind)
		w.tasksDue()
		w.exec(`update tasks set due_at = now() where task_id in (select registration_id from user_registrations where status = 'pending' and expires_at <= now())
			or task_id in ('job:events', 'job:sweep')`)
		w.exec(`insert into revocations (at, keycloak_session_id, user_id, role, network_id, station_id, is_active) values (now() - interval '2 hours', '', '', '', '', '', true)`)
		w.exec(`update refresh_tokens set used_at = now() - interval '5 minutes' where session_id = $1 and answer is not null`, session)
		w.exec(`update rate_limits set resets_at = resets_at + interval '1 hour' where resets_at < now() + interval '1 hour'`) // of all this itself, how slow it ever was
		w.exec(`insert into rate_limits values ($1, 1, now())`, "ended:"+kind)
		w.edits(w.keycloakID(email), body{attrRoles: []string{roleUser}})
		w.operates("jobs")
	}
	if a, err := w.send("http://"+w.management, call{path: "/metrics"}); err != nil || a.Status != 200 {
		w.Fatalf("%v %v", a, err)
	}
}

// pageBlocks are those of a full page of a list, each row in another one.
const pageBlocks = 51

func TestPlans(t *testing.T) {
	t.Parallel()
	const few, many = 1000, 50_000
	w, instances := statementPlan(t)
	w.seed(1, few)
	before := w.costs(func() { w.doEverything(instances) })
	w.seed(few+1, many)
	var reading readers
	after := w.costs(func() { reading = w.doEverything(instances) })
	for where, pattern := range statements(t) {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(after)), pattern.MatchString) {
			t.Errorf("%s: nothing in doEverything makes the service do %s", where, pattern)
		}
	}
	for text, c := range after {
		if wholePass.MatchString(text) {
			continue
		}
		if len(c.scans) > 0 {
			t.Errorf("%v is read from end to end: %s\n%v", c.scans, text, c.worst)
		}
		if b := before[text].blocks; c.blocks > 2*(b+pageBlocks) { // an index is a level deeper, a page of a list is full
			t.Errorf("%d blocks, and %d with %d times as many rows: %s\n%v", b, c.blocks, many/few, text, c.worst)
		}
	}
	w.url = instances[slices.Index(planKinds, "force_custom_plan")]
	for _, rare := range rareFilters {
		for text, c := range w.costs(func() { w.wants(w.as(reading.signIns[rare.role], "GET", rare.path), 200, "") }) {
			if c.blocks > 2*many { // an index entry and its row
				t.Errorf("%s (%s): %d blocks, more than to look at each row once: %s\n%v", rare.path, rare.why, c.blocks, text, c.worst)
			}
		}
	}
}

// BenchmarkRows prints what each statement costs with 1,000 and with 1,000,000 rows in each
// table: of a list the filters that make the most of a difference. x is how many times as many
// blocks, where a page of a list counts as one that was full before.
func BenchmarkRows(b *testing.B) {
	const few, many = 1000, 1_000_000
	w, instances := statementPlan(b)
	w.quick = true
	w.seed(1, few)
	before := w.costs(func() { w.doEverything(instances) })
	start := time.Now()
	w.seed(few+1, many)
	fmt.Printf("the rows took %v\n", time.Since(start).Round(time.Second))
	after := w.costs(func() { w.doEverything(instances) })

	type line struct {
		text          string
		before, after cost
		x             float64
	}
	worst, patterns := map[string]line{}, statements(b)
	for text, c := range after {
		was, ok := before[text]
		if !ok {
			continue
		}
		name, longest := "PostgreSQL", 0 // a foreign key, a function of the schema
		for where, pattern := range patterns {
			if length := len(pattern.String()); length > longest && pattern.MatchString(text) {
				name, longest = where, length
			}
		}
		if name == "PostgreSQL" {
			name += ": " + text
		}
		x := float64(c.blocks) / float64(max(was.blocks, pageBlocks))
		if x >= worst[name].x {
			worst[name] = line{text, was, c, x}
		}
	}
	lines := slices.SortedFunc(maps.Values(worst), func(a, b line) int { return cmp.Compare(b.x, a.x) })
	var out strings.Builder
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "blocks\tof %d\tx\tms\tof %d\tx\t  statement\n", many, many)
	for _, l := range lines {
		slow, fast := l.after.median(), l.before.median()
		fmt.Fprintf(table, "%d\t%d\t%.1f\t%.2f\t%.2f\t%.1f\t  %.150s\n", l.before.blocks, l.after.blocks, l.x, fast, slow, slow/fast, l.text)
	}
	table.Flush()
	fmt.Print(&out) // the log of a benchmark has ten lines
	b.ReportMetric(lines[0].x, "x-at-most")
	b.ReportMetric(0, "ns/op")
}
