package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// list is the lines of a query that has one column, or the error that it ends with.
func (r *record) list(sql string, args ...any) string {
	r.Helper()
	rows, _ := r.pool.Query(r.Context(), sql, args...)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	r.must(err)
	return strings.Join(lines, "\n")
}

// refuses fails unless every statement is refused with words like these.
func refuses(t *testing.T, pool *pgxpool.Pool, words string, statements ...string) {
	t.Helper()
	for _, sql := range statements {
		if _, err := pool.Exec(t.Context(), sql); err == nil || !regexp.MustCompile(words).MatchString(err.Error()) {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

// Nobody changes what is on record by mistake, not even the owner of the tables.
func TestAppendOnly(t *testing.T) {
	r := newRecord(t)
	now := time.Now()
	later := now.AddDate(1, 0, 0)
	r.exec(`select audit_log_month($1)`, later)
	r.write(3, now)
	r.write(1, later)
	r.seal(now.Add(time.Hour))
	before := r.list(`select a::text from audit_log a union all select s::text from audit_seals s`)
	tables := []string{"audit_log", now.UTC().Format("audit_log_2006_01"), later.UTC().Format("audit_log_2006_01"), "audit_seals"}
	for _, table := range tables {
		column := "reason"
		if table == "audit_seals" {
			column = "hash"
		}
		refuses(t, r.pool, "audit_log is append-only",
			"update "+table+" set "+column+" = ''",
			"update "+table+" set "+column+" = "+column,
			"delete from "+table,
			"truncate "+table,
			"with gone as (delete from "+table+" returning 1) select count(*) from gone",
			"merge into "+table+" using (select 1) x on true when matched then delete")
	}
	refuses(t, r.pool, "audit_log is append-only", "truncate audit_log cascade", "truncate users, audit_log cascade",
		"update only "+tables[1]+" set at = at + interval '40 days'",
		"insert into "+tables[1]+" select * from "+tables[1]+" on conflict (audit_id, at) do update set reason = 'x'")
	if after := r.list(`select a::text from audit_log a union all select s::text from audit_seals s`); after != before || r.value(`select count(*)::text from audit_log`) != "4" {
		t.Error(cmp.Diff(before, after))
	}
	r.write(1, now) // more may come
	r.fits()
}

// Months begin and end in UTC, and have a partition before they begin.
func TestMonths(t *testing.T) {
	r := newRecord(t)
	months := func() string {
		return r.list(`select relname from pg_inherits join pg_class on pg_class.oid = inhrelid where inhparent = 'audit_log'::regclass order by 1`)
	}
	var want []string
	for n := range monthsAhead + 1 {
		now := time.Now().UTC()
		want = append(want, time.Date(now.Year(), now.Month()+time.Month(n), 1, 0, 0, 0, 0, time.UTC).Format("audit_log_2006_01"))
	}
	if got := months(); got != strings.Join(want, "\n") {
		t.Errorf("%v", got)
	}
	// Wherever whoever makes them thinks to be.
	r.inOneSession(`set timezone = 'Pacific/Kiritimati'; select audit_log_month('2035-12-31T23:59:59.999999Z')`)
	r.inOneSession(`set timezone = 'America/Los_Angeles'; select audit_log_month('2036-01-01T00:00:00Z')`)
	var all sync.WaitGroup
	for range 8 { // instances at once
		all.Go(func() {
			if err := r.store.makeMonths(t.Context(), time.Date(2036, 2, 29, 12, 0, 0, 0, time.UTC)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	want = append(want, "audit_log_2035_12", "audit_log_2036_01", "audit_log_2036_02", "audit_log_2036_03", "audit_log_2036_04", "audit_log_2036_05")
	if got := months(); got != strings.Join(want, "\n") {
		t.Errorf("%v", got)
	}
	east := time.FixedZone("east", 14*3600)
	for at, partition := range map[time.Time]string{
		time.Date(2035, 12, 1, 0, 0, 0, 0, time.UTC):                         "audit_log_2035_12",
		time.Date(2035, 12, 31, 23, 59, 59, 999999000, time.UTC):             "audit_log_2035_12",
		time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC):                          "audit_log_2036_01",
		time.Date(2036, 1, 1, 13, 59, 59, 0, east):                           "audit_log_2035_12",
		time.Date(2036, 3, 1, 14, 0, 0, 0, east):                             "audit_log_2036_03",
		time.Date(2036, 2, 29, 23, 59, 59, 0, time.UTC):                      "audit_log_2036_02",
		time.Date(2036, 5, 31, 23, 59, 59, 999999000, time.UTC):              "audit_log_2036_05",
		time.Date(2036, 2, 29, 19, 0, 0, 0, time.FixedZone("west", -5*3600)): "audit_log_2036_03",
	} {
		r.write(1, at)
		if got := r.value(`select tableoid::regclass::text from audit_log order by number desc limit 1`); got != partition {
			t.Errorf("%v is in %s, not in %s", at, got, partition)
		}
	}
	// Without its month an entry can't be written, nor can what it records happen.
	if err := r.store.audit(t.Context(), caller{Actor: "test"}, time.Date(2036, 6, 1, 0, 0, 0, 0, time.UTC), entry{Action: "test"}); err == nil {
		t.Error("an entry has no partition and is written")
	}
}

// What is too old goes, a month at once, by the statement of docs/operating.md.
func TestRetention(t *testing.T) {
	r := newRecord(t)
	january := time.Date(2026, 1, 31, 23, 0, 0, 0, time.UTC)
	for n := range 4 {
		r.exec(`select audit_log_month($1::timestamptz)`, time.Date(2026, time.Month(1+n), 1, 0, 0, 0, 0, time.UTC))
	}
	for n := range 4 { // one seal has entries of two months
		r.write(3, january.Add(time.Duration(n)*20*time.Minute))
	}
	r.write(2, january.AddDate(0, 1, 20))
	r.seal(january.AddDate(1, 0, 0))
	drop := regexp.MustCompile("(?m)^drop table audit_log_2026_01;$").FindString(operatingManual(t))
	if drop == "" {
		t.Fatal("docs/operating.md does not say how")
	}
	if got := r.fits(); !strings.HasPrefix(got, "14 entries in 1 seals fit") || strings.Contains(got, "removed") {
		t.Error(got)
	}
	hash := r.value(`select hash from audit_seals`)
	r.exec(drop)
	if got := r.fits(hash); !strings.HasPrefix(got, "5 entries in 1 seals fit") || !strings.Contains(got, "\n9 entries from before February 2026 were removed with their month.\n") {
		t.Error(got)
	}
	missing := r.value(`select audit_id from audit_log order by number offset 3 limit 1`)
	r.exec(`drop table audit_log_2026_03`) // not the oldest
	if out, err := r.command("audit", "verify"); err == nil || err.Error() != missing+" is missing" {
		t.Errorf("a month in between: %v %s", err, out)
	}
}

func operatingManual(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// countedExactly fails unless refusals are on record one by one up to the bounds of each
// minute, and all others as numbers.
func (r *record) countedExactly(total int) {
	r.Helper()
	if got := r.list(`select concat_ws(' ', date_trunc('minute', at), action, reason, actor, ip_address, count(*)) from audit_log
		where outcome = 'refused' and not details ? 'count' group by date_trunc('minute', at), action, reason, actor, ip_address having count(*) > $1`, refusalsOfOne); got != "" {
		r.Errorf("too many of one:\n%s", got)
	}
	if got := r.list(`select concat_ws(' ', date_trunc('minute', at), action, reason, count(*)) from audit_log
		where outcome = 'refused' and not details ? 'count' group by date_trunc('minute', at), action, reason having count(*) > $1`, refusalsOfAll); got != "" {
		r.Errorf("too many of all:\n%s", got)
	}
	if got := r.value(`select sum(coalesce((details->>'count')::int, 1))::text from audit_log where outcome = 'refused'`); got != fmt.Sprint(total) {
		r.Errorf("%s refusals are on record, not %d:\n%s", got, total, r.list(`select concat_ws(' ', action, reason, actor, ip_address, details, count(*)) from audit_log
			group by action, reason, actor, ip_address, details`))
	}
	if got := r.value(`select count(*)::text from audit_floods`); got != "0" {
		r.Errorf("%s counters are left", got)
	}
}

// A flood of refusals does not become one of entries, and none is forgotten.
func TestFloods(t *testing.T) {
	// at once, by several instances, as one refusal each
	flood := func(r *record, at time.Time, refusals ...caller) {
		r.Helper()
		var all sync.WaitGroup
		work := make(chan caller)
		for range 8 {
			all.Go(func() {
				for c := range work {
					if err := r.store.auditRefusal(t.Context(), c, at, entry{Action: "login", Target: "USR-0123456789abcdef", Reason: "invalid-credentials"}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for _, c := range refusals {
			work <- c
		}
		close(work)
		all.Wait()
	}
	from := func(n int, actor string, address ...string) (list []caller) {
		for range n {
			for _, a := range address {
				list = append(list, caller{Actor: actor, Address: a, UserAgent: "flood", RequestID: "request-1"})
			}
		}
		return list
	}
	var many []string
	for i := range 60 {
		many = append(many, fmt.Sprintf("198.51.100.%d", i))
	}
	noon := time.Date(time.Now().Year(), time.Now().Month(), 1, 12, 0, 30, 0, time.UTC)
	const oneByOne = `select count(*)::text from audit_log where not details ? 'count'`
	const counts = `select concat_ws(' ', actor, ip_address, details->>'count', details->>'minute', action, outcome, reason, target) from audit_log where details ? 'count' order by 1`
	minute := noon.Truncate(time.Minute).Format(time.RFC3339)
	for _, c := range []struct {
		name     string
		refusals []caller
		oneByOne string
		counts   string
	}{
		{"just as many as are recorded", from(refusalsOfOne, "anonymous", "192.0.2.1"), "10", ""},
		{"one more", from(refusalsOfOne+1, "anonymous", "192.0.2.1"), "10", "anonymous 192.0.2.1 1 " + minute},
		{"from two addresses", from(20, "anonymous", "192.0.2.1", "192.0.2.2"), "20", "anonymous 192.0.2.1 10 " + minute + "\nanonymous 192.0.2.2 10 " + minute},
		{"from one network", from(20, "anonymous", "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:0:1::3"), "10", "anonymous 2001:db8::/64 50 " + minute},
		{"of two users", append(from(15, "USR-a", "192.0.2.1"), from(15, "anonymous", "192.0.2.1")...), "20", "USR-a 192.0.2.1 5 " + minute + "\nanonymous 192.0.2.1 5 " + minute},
		{"from nowhere", from(15, "anonymous", ""), "10", "anonymous invalid IP 5 " + minute},
		{"from many addresses", from(6, "anonymous", many...), "300", "anonymous 60 " + minute},
	} {
		r := newRecord(t)
		r.TB = t
		flood(r, noon, c.refusals...)
		if got := r.value(oneByOne); got != c.oneByOne {
			t.Errorf("%s: %s are recorded one by one, not %s", c.name, got, c.oneByOne)
		}
		r.must(r.store.endFloods(t.Context(), noon.Add(time.Minute))) // instances' clocks differ: not yet
		if got := r.list(counts); got != "" {
			t.Errorf("%s: too soon: %s", c.name, got)
		}
		r.must(r.store.endFloods(t.Context(), noon.Add(2*time.Minute)))
		r.must(r.store.endFloods(t.Context(), noon.Add(2*time.Minute))) // once
		if got := strings.ReplaceAll(r.list(counts), " login refused invalid-credentials ", ""); strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(c.counts), " ") {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.counts)
		}
		r.countedExactly(len(c.refusals))
	}

	t.Run("one after the other", func(t *testing.T) { // the next minute begins anew, and a late one is not lost
		r := newRecord(t)
		flood(r, noon, from(15, "anonymous", "192.0.2.1")...)
		flood(r, noon.Add(time.Minute), from(15, "anonymous", "192.0.2.1")...)
		r.must(r.store.endFloods(t.Context(), noon.Add(2*time.Minute)))
		flood(r, noon, from(15, "anonymous", "192.0.2.1")...)
		r.must(r.store.endFloods(t.Context(), noon.Add(3*time.Minute)))
		if got := r.value(oneByOne); got != "30" {
			t.Errorf("%s are recorded one by one", got)
		}
		if got := r.value(`select string_agg(details->>'count', ' ') from audit_log where details ? 'count'`); got != "5 5 5" {
			t.Errorf("counts: %s", got)
		}
	})
	t.Run("of everybody, when an instance dies, and others go on at once", func(t *testing.T) {
		r := newRecord(t)
		many = many[:50]
		flood(r, noon, from(12, "anonymous", many...)...) // 500 within the bound of one, of which 300 within that of all
		r.exec(`insert into audit_floods select $1, 'login', 'invalid-credentials', 'anonymous', '203.0.113.' || i, 11 from generate_series(1, 3 * $2::int) i`,
			noon.Truncate(time.Minute), floodBatch)
		err := r.store.endFloods(t.Context(), noon.AddDate(50, 0, 0)) // dies: there is no such month
		if err == nil || r.value(`select count(*)::text from audit_log where details ? 'count'`) != "0" ||
			r.value(`select count(*)::text from audit_floods`) != fmt.Sprint(len(many)+1+3*floodBatch) {
			t.Errorf("%v; something of it is left", err)
		}
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				if err := r.store.endFloods(t.Context(), noon.Add(2*time.Minute)); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		r.countedExactly(12*len(many) + 3*floodBatch) // of those that were put there only what is beyond ten
		if got := r.value(`select details->>'count' from audit_log where details ? 'count' and ip_address = ''`); got != "200" {
			t.Errorf("of everybody: %s", got)
		}
	})
}

// A thousand requests from one address that all fail.
func TestFloodOfLogins(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	v, _ := w.another(nil)
	r := &record{TB: t, pool: w.pool}
	const n = 1000
	instances, from := []string{w.url, v.url}, newAddress()
	answers := map[string]int{}
	for range n / 10 {
		var calls []call
		for range 10 {
			calls = append(calls, call{method: "POST", path: loginPath, json: body{"email": newEmail(), "password": "a wrong password"}, from: from})
		}
		for what, m := range tally(w.at(instances, calls...)) {
			answers[what] += m
		}
	}
	if answers["401 invalid-credentials"] <= refusalsOfOne || answers["429 too-many-requests"] < n/2 || answers["401 invalid-credentials"]+answers["429 too-many-requests"] != n {
		t.Errorf("answers: %v", answers)
	}
	s := idle(t, slog.New(slog.DiscardHandler), map[string]string{"DATABASE_URL": w.vars["DATABASE_URL"]})
	r.must(s.store.endFloods(t.Context(), time.Now().Add(2*time.Minute)))
	r.countedExactly(n)
	if got := r.value(`select (count(*) <= 3 * 2 * ($1 + 1))::text from audit_log where outcome = 'refused'`, refusalsOfOne); got != "true" { // of two kinds, in three minutes at most
		t.Error("there are more entries than that")
	}
}

// TestProductionRoles sets PostgreSQL up as docs/operating.md says, and runs the service by the
// role that is meant for it. Roles are of all databases, and schema.sql names one: for this
// test, which is not parallel, both names are others.
func TestProductionRoles(t *testing.T) {
	_, section, _ := strings.Cut(operatingManual(t), "### Production roles in PostgreSQL")
	block := regexp.MustCompile("(?s)```sql\n(.*?)```").FindStringSubmatch(section)
	if block == nil {
		t.Fatal("docs/operating.md has no SQL")
	}
	id := gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
	owner, service, db := "test_owner_"+id, "test_service_"+id, "test_"+id
	former := schemaSQL
	schemaSQL = strings.ReplaceAll(schemaSQL, "auth_service", service)
	super, err := pgxpool.New(t.Context(), services.DatabaseURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the last: the env needs its database until it has ended
		schemaSQL = former
		if err := services.DropDatabase(context.Background(), db); err != nil {
			t.Error(err)
		}
		if _, err := super.Exec(context.Background(), "drop role "+service+"; drop role "+owner); err != nil {
			t.Error(err)
		}
		super.Close()
	})
	passwords := map[string]string{}
	for statement := range strings.SplitSeq(strings.TrimSpace(block[1]), ";\n") {
		if m := regexp.MustCompile(`create role (\w+) login password '(.*)'`).FindStringSubmatch(statement); m != nil {
			passwords[m[1]] = m[2]
		}
		statement = strings.NewReplacer("auth_owner", owner, "auth_service", service, "database auth", "database "+db).Replace(statement)
		if _, err := super.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	urlAs := func(role, name string) string {
		return regexp.MustCompile(`//.*@`).ReplaceAllString(services.DatabaseURL(db), "//"+role+":"+passwords[name]+"@")
	}
	ownerURL, serviceURL := urlAs(owner, "auth_owner"), urlAs(service, "auth_service")
	command := func(url string, args ...string) error {
		return run(t.Context(), args, environment(map[string]string{"DATABASE_URL": url}), io.Discard, io.Discard)
	}
	open := func(url string) *pgxpool.Pool {
		pool, err := pgxpool.New(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		return pool
	}
	asOwner, asService := open(ownerURL), open(serviceURL)

	// The service can't make or change the schema, and says who can.
	cannot := func(when string) {
		t.Helper()
		for _, args := range [][]string{{"migrate"}, {"jobs"}} {
			if err := command(serviceURL, args...); err == nil || !strings.Contains(err.Error(), `run "auth-service migrate" as the owner`) {
				t.Errorf("%s: %v: %v", when, args, err)
			}
		}
	}
	change := func(sql string) {
		t.Helper()
		if _, err := asOwner.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	migrate := func() {
		t.Helper()
		if err := command(ownerURL, "migrate"); err != nil {
			t.Fatal(err)
		}
	}
	cannot("no schema")
	migrate()
	change(`update schema_version set sha256 = 'an older one'`)
	cannot("an older schema")
	migrate()
	change(`revoke all on all tables in schema public from ` + service)
	if err := command(serviceURL, "jobs"); err == nil || !strings.Contains(err.Error(), `run "auth-service migrate" as the owner`) {
		t.Errorf("a role that has come later: %v", err)
	}
	migrate()

	// The whole way, with all jobs.
	w := newEnv(t, map[string]string{"DATABASE_URL": serviceURL})
	w.pool.Close()
	if w.pool, err = pgxpool.New(t.Context(), services.DatabaseURL(db)); err != nil {
		t.Fatal(err)
	}
	root, ada := newEmail(), newEmail()
	w.account(root)
	if out, err := w.operate("grant-admin", root); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	admin := w.signsIn(root)
	w.account(ada)
	w.signsIn(ada)
	user := "/api/v1/users/" + w.value(`select user_id from users where email = $1`, ada)
	patch := authorized(admin.text("access_token"), "PATCH", user)
	patch.json = body{"role": "operator", "network_id": "NET-1", "station_id": "STA-1"}
	w.wants(w.do(patch), 200, "")
	w.wants(w.as(admin, "DELETE", user), 204, "")
	w.wants(w.as(admin, "POST", user+"/restore"), 200, "")
	w.wants(w.login(ada, "a wrong password"), 401, "invalid-credentials")
	if a := w.as(admin, "GET", "/api/v1/audit?target="+strings.TrimPrefix(user, "/api/v1/users/")); a.Status != 200 || len(a.JSON["items"].([]any)) != 7 {
		t.Errorf("user.create, login, user.update, session.end, user.delete, user.restore and a refusal: %v", a)
	}
	w.settle()
	s := idle(t, slog.New(slog.DiscardHandler), map[string]string{"DATABASE_URL": serviceURL})
	s.now = func() time.Time { return time.Now().AddDate(0, 2, 0) } // the first of what no migration has made
	for _, err := range []error{s.sealAudit(t.Context()), s.store.makeMonths(t.Context(), s.now()), s.store.endFloods(t.Context(), s.now()), command(serviceURL, "audit", "verify")} {
		if err != nil {
			t.Error(err)
		}
	}
	month := time.Now().UTC().AddDate(0, 0, 1-time.Now().UTC().Day()).AddDate(0, monthsAhead+2, 0).Format("audit_log_2006_01")
	if got := w.value(`select tableowner from pg_tables where tablename = $1`, month); got != owner {
		t.Errorf("%s is %s's", month, got)
	}
	if seals := w.value(`select count(*)::text from audit_seals`); seals != "1" {
		t.Errorf("%s seals", seals)
	}

	// What is on record stays.
	now := time.Now().UTC().Format("audit_log_2006_01")
	const columns = `audit_id, at, actor, action, target, outcome`
	before := w.value(`select count(*)::text from audit_log`)
	refuses(t, asService, `SQLSTATE (42501|25006)`,
		"update audit_log set reason = 'x'", "delete from audit_log", "truncate audit_log", "update audit_seals set hash = 'x'", "delete from audit_seals", "truncate audit_seals",
		"update "+now+" set reason = 'x'", "delete from "+now, "truncate "+now, "insert into "+now+" ("+columns+") values ('AUD-x', now(), 'a', 'b', 'c', 'ok')",
		"insert into audit_log (number, "+columns+") values (1, 'AUD-x', now(), 'a', 'b', 'c', 'ok')",
		"insert into audit_log ("+columns+") select "+columns+" from audit_log on conflict (audit_id, at) do update set reason = 'x'",
		"merge into audit_log using (select 1) x on true when matched then delete",
		"alter table audit_log add column x int", "alter table audit_log drop constraint valid_outcome", "alter table audit_log owner to "+service,
		"alter table audit_log disable trigger all", "alter table "+now+" disable trigger audit_log_keeps_rows", "alter table audit_seals disable trigger all",
		"drop trigger audit_log_keeps_rows on audit_log", "drop trigger audit_seals_keep_rows on audit_seals",
		"alter table audit_log detach partition "+now, "create table mine partition of audit_log for values from ('1999-01-01') to ('1999-02-01')",
		"drop table audit_log", "drop table "+now, "drop table audit_seals", "drop function audit_log_is_append_only cascade", "drop sequence audit_numbers cascade",
		"create or replace function audit_log_is_append_only() returns trigger language plpgsql as $$ begin return old; end $$",
		"create or replace function audit_log_month(at timestamptz) returns void language sql as $$ $$",
		"create table mine (x int)", "create temporary table mine (x int)", "create schema mine", "create rule mine as on insert to audit_log do instead nothing",
		"alter sequence audit_numbers restart", "select setval('audit_numbers', 1)", "set session_replication_role = replica", "set role "+owner,
		"begin; lock table audit_log in access exclusive mode", "update schema_version set sha256 = 'x'")
	if after := w.value(`select count(*)::text from audit_log`); after != before {
		t.Errorf("%s entries, then %s", before, after)
	}
	refuses(t, asOwner, "audit_log is append-only", "update audit_log set reason = 'x'", "delete from "+month+"; delete from audit_log", "truncate "+month)
	if _, err := asService.Exec(t.Context(), "insert into audit_log ("+columns+") values ('AUD-0123456789abcdef', now(), 'a', 'b', 'c', 'ok')"); err != nil { // and may grow
		t.Error(err)
	}
}

// operate runs a subcommand as an operator does, beside the service.
func (w *env) operate(args ...string) (string, error) {
	var out bytes.Buffer
	env := maps.Clone(w.vars)
	env["USER"] = "tester"
	err := run(w.Context(), args, func(name string) string { return env[name] }, &out, w.logs)
	return out.String(), err
}

// patched changes a user by another's token.
func (w *env) patched(by answer, email string, change body) answer {
	w.Helper()
	r := authorized(by.text("access_token"), "PATCH", "/api/v1/users/"+w.idOf(email))
	r.json = change
	return w.do(r)
}

func (w *env) idOf(email string) string {
	w.Helper()
	return w.value(`select user_id from users where email = lower($1)`, email)
}

// appointed signs a new account in whom an administrator has given a role and a scope.
func (w *env) appointed(by answer, role, network, station string) (email string, a answer) {
	w.Helper()
	email = newEmail()
	w.account(email)
	w.wants(w.patched(by, email, body{"role": role, "network_id": network, "station_id": station}), 200, "")
	return email, w.signsIn(email)
}

const auditPath = "/api/v1/audit"

// trail is the ids of the entries on a page, and the cursor of the next one.
func (w *env) trail(who answer, query url.Values) (ids []string, next string) {
	w.Helper()
	a := w.as(who, "GET", auditPath+"?"+query.Encode())
	w.wants(a, 200, "")
	for _, item := range a.JSON["items"].([]any) {
		ids = append(ids, item.(body)["audit_id"].(string))
	}
	return ids, a.text("next_cursor")
}

func TestAuditTrail(t *testing.T) {
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // nothing is recorded but what is asked for here
	root := newEmail()
	w.account(root)
	if out, err := w.operate("grant-admin", root); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	admin := w.signsIn(root)
	_, partner := w.appointed(admin, "partner", "NET-1", "")
	_, other := w.appointed(admin, "partner", "NET-2", "")
	_, aimless := w.appointed(admin, "partner", "", "STA-1")
	_, operator := w.appointed(admin, "operator", "NET-1", "STA-1")
	_, local := w.appointed(admin, "admin", "NET-1", "")
	stray, user := w.appointed(admin, "user", "", "")
	ada, adas := w.appointed(admin, "user", "NET-1", "STA-1")

	for name, c := range map[string]struct {
		who    answer
		status int
		slug   string
	}{
		"admin": {admin, 200, ""}, "an admin with a network": {local, 200, ""}, "partner": {partner, 200, ""}, "nobody": {answer{}, 401, "unauthorized"},
		"partner without a network": {aimless, 403, "forbidden"}, "operator": {operator, 403, "forbidden"}, "user": {adas, 403, "forbidden"},
	} {
		t.Log(name)
		r := authorized(c.who.text("access_token"), "GET", auditPath)
		if c.who.JSON == nil {
			r.auth = nil
		}
		w.wants(w.do(r), c.status, c.slug)
	}

	// Who sees an entry: the network of whom it is about, or else of who has done it.
	type deed struct {
		name string
		done answer
		seen string // by which partners
	}
	deeds := []deed{
		{"of its own user", w.patched(admin, ada, body{"first_name": "Ada"}), "NET-1"},
		{"by itself", w.patched(partner, ada, body{"last_name": "L."}), "NET-1"},
		{"of somebody in no network, by somebody in one", w.patched(local, stray, body{"first_name": "S."}), ""},
		{"moved: of the network that it left", w.patched(admin, ada, body{"network_id": "NET-2"}), "NET-1"},
		{"moved from none: of the one that it is in", w.patched(admin, stray, body{"network_id": "NET-2"}), "NET-2"},
		{"moved to none", w.patched(admin, stray, body{"network_id": ""}), "NET-2"},
		{"of another's by now", w.patched(admin, ada, body{"first_name": "Ada A."}), "NET-2"},
		{"refused: of who was refused", w.patched(partner, ada, body{"first_name": "A."}), "NET-1"},
		{"refused, who is in no network", w.patched(user, ada, body{"first_name": "A."}), ""},
		{"refused, who is known by the name only", w.login(ada, "a wrong password"), "NET-2"},
		{"refused, who is not known", w.login(newEmail(), "a wrong password"), ""},
		{"about nobody", w.as(operator, "GET", auditPath), "NET-1"},
		{"a sign-in", w.signsIn(ada), "NET-2"},
	}
	for _, d := range deeds {
		id := d.done.Header.Get("X-Request-Id")
		entry := w.value(`select audit_id from audit_log where request_id = $1`, id)
		if got := w.value(`select network_id from audit_log where request_id = $1`, id); got != d.seen {
			t.Errorf("%s is of %q, not %q", d.name, got, d.seen)
		}
		for network, who := range map[string]answer{"": admin, "NET-1": partner, "NET-2": other} {
			ids, _ := w.trail(who, url.Values{"limit": {"200"}})
			if sees := slices.Contains(ids, entry); sees != (network == "" || network == d.seen) {
				t.Errorf("%s: the partner of %q sees it: %v", d.name, network, sees)
			}
		}
	}
	a := w.as(admin, "GET", auditPath+"?limit=1&target="+w.idOf(stray)+"&action=user.update")
	entry := a.JSON["items"].([]any)[0].(body)
	want := body{"audit_id": entry["audit_id"], "at": entry["at"], "actor": w.idOf(root), "action": "user.update", "target": w.idOf(stray), "outcome": "ok", "reason": "",
		"network_id": "NET-2", "ip_address": entry["ip_address"], "user_agent": "Go-http-client/1.1", "request_id": deeds[5].done.Header.Get("X-Request-Id"),
		"details": body{"network_id": body{"before": "NET-2", "after": ""}}}
	if diff := cmp.Diff(want, entry); diff != "" || !strings.HasSuffix(entry["at"].(string), "Z") {
		t.Error(diff)
	}

	// Every filter, alone and with the others, means what it says.
	ofTime := func(offset int) string {
		return w.value(`select to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') from audit_log order by at offset $1 limit 1`, offset)
	}
	early, late := ofTime(15), ofTime(40)
	moved, err := time.Parse(time.RFC3339Nano, early)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := moved.In(time.FixedZone("", -5*3600)).Format(time.RFC3339Nano)
	seen := map[int]int{}
	for _, actor := range []string{"", w.idOf(root), "anonymous", "cli:tester", "USR-nobody"} {
		for _, target := range []string{"", w.idOf(ada)} {
			for _, action := range []string{"", "user.update", "login"} {
				for _, outcome := range []string{"", "ok", "refused", "failed"} {
					for _, times := range [][2]string{{"", ""}, {early, ""}, {"", late}, {early, late}, {elsewhere, late}, {late, early}} {
						query := url.Values{"limit": {"200"}}
						for name, value := range map[string]string{"actor": actor, "target": target, "action": action, "outcome": outcome, "from": times[0], "to": times[1]} {
							if value != "" {
								query.Set(name, value)
							}
						}
						who, network := admin, ""
						if len(seen)%2 == 1 {
							who, network = partner, "NET-1"
						}
						ids, _ := w.trail(who, query)
						want := (&record{TB: t, pool: w.pool}).list(`select audit_id from audit_log where $1 in ('', actor) and $2 in ('', target) and $3 in ('', action) and $4 in ('', outcome)
							and at >= coalesce(nullif($5, '')::timestamptz, '-infinity') and at < coalesce(nullif($6, '')::timestamptz, 'infinity') and $7 in ('', network_id)
							order by at desc, audit_id desc`, actor, target, action, outcome, times[0], times[1], network)
						if strings.Join(ids, "\n") != want {
							t.Errorf("%s of %q: %v, want\n%s", query.Encode(), network, ids, want)
						}
						seen[len(ids)]++
					}
				}
			}
		}
	}
	if len(seen) < 10 || seen[0] == 0 {
		t.Errorf("the filters leave %v", seen)
	}
	for query, field := range map[string]string{
		"from=yesterday": "from", "from=2026-13-01T00:00:00Z": "from", "to=2026-01-01": "to", "to=1700000000": "to", "to=2026-01-01T00:00:00": "to",
		"outcome=perhaps": "outcome", "outcome=OK": "outcome", "limit=0": "limit", "limit=201": "limit", "limit=-1": "limit", "limit=many": "limit", "cursor=x": "cursor",
		"cursor=" + cursorText("1 x"): "cursor", "actor=%ff": "actor", "target=a%00b": "target", "action=" + strings.Repeat("x", 51): "action", "actor=" + strings.Repeat("x", 101): "actor",
	} {
		t.Log(query)
		w.names(w.as(admin, "GET", auditPath+"?"+query), field)
	}
	for _, query := range []string{"limit=0&outcome=perhaps&from=x&to=y", "to=y&limit=many&outcome=perhaps&from=x"} { // all at once
		got := ""
		for _, e := range w.as(admin, "GET", auditPath+"?"+query).JSON["errors"].([]any) {
			got += e.(body)["field"].(string) + " "
		}
		if got != "from limit outcome to " {
			t.Errorf("%s names %s", query, got)
		}
	}

	// Page after page, while more is recorded, and though some are of one moment.
	page := url.Values{"action": {"test.paging"}}
	more := func(n int) {
		w.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome, network_id)
			select 'AUD-' || substr(md5(random()::text), 1, 16), date_trunc('second', now()) + i / 4 * interval '1 microsecond', 'test', 'test.paging', '', 'ok', 'NET-' || 1 + i % 2
			from generate_series(1, $1::int) i`, n)
	}
	more(450)
	for limit, pages := range map[string]int{"200": 3, "50": 9, "7": 65, "": 9} {
		for network, who := range map[string]answer{"": admin, "NET-1": partner} {
			want := strings.Split((&record{TB: t, pool: w.pool}).list(`select audit_id from audit_log where action = 'test.paging' and $1 in ('', network_id)
				order by at desc, audit_id desc`, network), "\n")
			if page.Del("limit"); limit != "" {
				page.Set("limit", limit)
			}
			page.Del("cursor")
			var got []string
			n := 0
			for ; n == 0 || page.Get("cursor") != ""; n++ {
				ids, next := w.trail(who, page)
				got = append(got, ids...)
				page.Set("cursor", next)
				w.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome, network_id) values ('AUD-' || substr(md5(random()::text), 1, 16),
					now() + interval '1 second', 'test', 'test.paging', '', 'ok', 'NET-1')`)
			}
			if !slices.Equal(got, want) {
				t.Errorf("limit %s: %d entries on %d pages, not %d", limit, len(got), n, len(want))
			}
			if network == "" && n < pages {
				t.Errorf("limit %s: %d pages", limit, n)
			}
		}
	}
}

// TestAuditEntries does one of everything, and looks at what is on record of it: exactly
// that, and from whom it came.
func TestAuditEntries(t *testing.T) {
	w := newEnv(t, map[string]string{"RESEND_LIMIT": "3", "CORS_ALLOWED_ORIGINS": app})
	w.noEvents() // what is changed in Keycloak here is found by who signs in
	id := strings.ToLower(gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 8))
	mail := func(name string) string { return name + "@" + id + ".test" }
	// Ids are told by the names of those whose they are.
	names := map[string]string{}
	learn := func() {
		rows, _ := w.pool.Query(t.Context(), `select user_id, split_part(email, '@', 1) from users union all
			select registration_id, 'reg:' || split_part(email, '@', 1) from user_registrations`)
		var known, name string
		if _, err := pgx.ForEachRow(rows, []any{&known, &name}, func() error { names[known] = name; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	told := func(lines string) string {
		learn()
		return regexp.MustCompile(`(USR|REG|SES|SYN)-[\w-]{16}`).ReplaceAllStringFunc(lines, func(id string) string {
			return map[bool]string{true: names[id], false: id[:3]}[names[id] != ""]
		})
	}
	const line = `concat_ws(' ', action, actor, '>', nullif(target, ''), outcome, nullif(reason, ''), nullif('@' || network_id, '@'), nullif(details::text, '{}'))`
	entries := func(condition string, args ...any) string {
		return told((&record{TB: t, pool: w.pool}).list(`select `+line+` from audit_log where `+condition+` order by number`, args...))
	}
	lines := 0
	// exact fails unless these entries, and no others, are on record of a request.
	exact := func(what, condition string, arg any, want []string) {
		t.Helper()
		if diff := cmp.Diff(strings.Join(want, "\n"), entries(condition, arg)); diff != "" {
			t.Errorf("%s: -want +on record\n%s", what, diff)
		}
		lines += len(want)
	}
	links := map[string]link{}
	tokens := map[string]answer{}
	const wrong = "a wrong password"
	user := func(name string) string { return "/api/v1/users/" + w.idOf(mail(name)) }
	as := func(name, method, path string, json any) func() call {
		return func() call {
			r := authorized(tokens[name].text("access_token"), method, strings.ReplaceAll(path, "{ada}", user("ada")))
			r.json = json
			return r
		}
	}
	posts := func(path string, b body) func() call {
		return func() call { return call{method: "POST", path: path, json: b} }
	}
	registers := func(name string) func() call {
		return posts(registerPath, body{"email": mail(name), "password": password})
	}
	logsIn := func(name, password string) func() call {
		return posts(loginPath, body{"email": mail(name), "password": password})
	}
	cooled := func(name string) { w.minuteLater(mail(name)) }
	keycloak := func(name string, change body) {
		w.keycloakAdmin("PUT", "/users/"+w.value(`select keycloak_id from users where email = $1`, mail(name)), change, nil)
	}
	const began, created, mailed = "registration.begin anonymous > reg:%s ok", `user.create anonymous > %s ok {"role": "user", "source": "web", "registration_id": "reg:%[1]s"}`, "registration.mail anonymous > reg:%s ok"
	of := func(name string, formats ...string) (want []string) {
		for _, f := range formats {
			want = append(want, fmt.Sprintf(f, name))
		}
		return want
	}
	verified := func(name string) string {
		return `registration.verified anonymous > reg:` + name + ` ok {"user_id": "` + name + `"}`
	}
	full := func(budget budget) func(r *call) { // the budget of the caller's address is used up
		return func(r *call) {
			r.from = newAddress()
			w.exec(`insert into rate_limits (key, hits, resets_at) values ($1, $2, now() + interval '1 minute')`,
				"address:"+budget.Name+":"+network(netip.MustParseAddr(r.from)), budget.N)
		}
	}
	nothing := func() {}
	step := func(name string, before func(), do func() call, status int, want ...string) {
		t.Helper()
		before()
		learn()
		r := do()
		request := "request-" + gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
		header := map[string]string{"X-Request-Id": request, "User-Agent": "agent of " + name}
		maps.Copy(header, r.header)
		if r.header = header; r.from == "" {
			r.from = newAddress()
		}
		a := w.do(r)
		if a.Status != status {
			t.Fatalf("%s: %v\n%s", name, a, regexp.MustCompile("(?m)^.*"+request+".*$").FindAllString(w.logs.String(), -1))
		}
		if a.text("access_token") != "" && a.text("session_id") != "" {
			tokens[name] = a
		}
		if strings.HasSuffix(r.path, "/forgot") && len(want) > 0 { // it is answered before it is done
			w.eventually("it is on record", 10*time.Second, func() bool { return entries(`request_id = $1`, request) != "" })
		}
		exact(name, `request_id = $1`, request, want)
		if got := w.value(`select count(*)::text from audit_log where request_id = $1 and (ip_address, user_agent) <> ($2, $3)`, request, r.from, header["User-Agent"]); got != "0" {
			t.Errorf("%s: address or user agent is another: %s", name, w.value(`select concat_ws(' ', ip_address, user_agent) from audit_log where request_id = $1 limit 1`, request))
		}
	}
	limited := func(spend func(*call), do func() call) func() call {
		return func() call { r := do(); spend(&r); return r }
	}

	// Registration.
	step("register", nothing, registers("ada"), 201, of("ada", began, created, mailed)...)
	replaced := []string{`registration.cancelled anonymous > reg:ada ok replaced {"user_id": "ada"}`, "registration.begin anonymous > reg:ada ok",
		`user.remove anonymous > ada ok {"registration_id": "reg:ada"}`}
	step("replace", func() { cooled("ada") }, registers("ada"), 201, append(replaced, of("ada", created, mailed)...)...)
	resend := posts(resendPath, body{"email": mail("ada")})
	step("resend, too soon", nothing, resend, 429, "resend anonymous > reg:ada refused resend-too-soon")
	step("resend", func() { cooled("ada") }, resend, 200, "registration.resend anonymous > reg:ada ok", "registration.mail anonymous > reg:ada ok")
	step("resend again", func() { cooled("ada") }, resend, 200, "registration.resend anonymous > reg:ada ok", "registration.mail anonymous > reg:ada ok")
	step("resend, too often", func() { cooled("ada") }, resend, 429, "resend anonymous > reg:ada refused resend-limit")
	step("resend, unknown", nothing, posts(resendPath, body{"email": mail("nobody")}), 404, "resend anonymous > refused registration-not-found")
	links["ada"] = w.lastMail(mail("ada"))
	guess := posts(verifyPath, body{"email": mail("ada"), "code": other(w.readMail(mail("ada"), 4).Code)})
	step("verify, wrong code", nothing, guess, 400, "verify anonymous > reg:ada refused invalid-code")
	step("verify, too many codes", func() { w.exec(`update user_registrations set code_attempts = $1`, codeAttempts) }, guess, 429, "verify anonymous > reg:ada refused too-many-attempts")
	step("verify, unknown address", nothing, posts(verifyPath, body{"email": mail("nobody"), "code": "123456"}), 400, "verify anonymous > refused invalid-code")
	step("verify, unknown token", nothing, posts(verifyPath, body{"token": "x"}), 400, "verify anonymous > refused invalid-token")
	step("verify, not well-formed", nothing, posts(verifyPath, body{"token": 1}), 400)
	step("sign-in, not verified", nothing, logsIn("ada", password), 403, "login anonymous > reg:ada refused account-not-verified")
	step("verify", nothing, func() call { return verifying(links["ada"]) }, 200, verified("ada"))
	step("verify again", nothing, func() call { return verifying(links["ada"]) }, 200)
	step("resend, verified", nothing, resend, 409, "resend anonymous > reg:ada refused already-verified")
	step("cancel, verified", nothing, func() call { return cancelling(links["ada"]) }, 409, "cancel anonymous > reg:ada refused already-verified")
	step("register, known", nothing, registers("ada"), 409, "register anonymous > refused user-exists")
	step("register, known, by the form", nothing, func() call {
		return call{method: "POST", path: "/account/register", form: url.Values{"email": {mail("ada")}, "password": {password}}, header: map[string]string{"Sec-Fetch-Site": "same-origin"}}
	}, 409, "register anonymous > refused user-exists")
	step("register, by another site's form", nothing, func() call {
		return call{method: "POST", path: "/account/register", form: url.Values{"email": {mail("eve")}}, header: map[string]string{"Sec-Fetch-Site": "cross-site"}}
	}, 403, "register anonymous > refused forbidden")
	step("register, no JSON", nothing, func() call { return call{method: "POST", path: registerPath, body: "{}"} }, 415, "register anonymous > refused unsupported-media-type")
	step("register, too large", nothing, posts(registerPath, body{"email": strings.Repeat("x", maxBody)}), 413, "register anonymous > refused payload-too-large")
	step("register, known to Keycloak", func() {
		w.keycloakAdmin("POST", "/users", body{"username": mail("kim"), "enabled": true, "email": mail("kim"), "emailVerified": true,
			"credentials": []body{{"type": "password", "value": password}}}, nil)
	}, registers("kim"), 409, "registration.begin anonymous > reg:kim ok", `registration.cancelled anonymous > reg:kim ok user-exists {"user_id": "USR"}`, "register anonymous > refused user-exists")
	step("sign-in, known to Keycloak only", nothing, logsIn("kim", password), 200, `user.take_over system:sync > kim ok {"role": "user", "source": "internal", "keycloak": {}, "is_active": true}`, `login kim > kim ok {"session_id": "SES"}`)
	step("register, refused by Keycloak", nothing, posts(registerPath, body{"email": mail("lee"), "password": "short"}), 400,
		"registration.begin anonymous > reg:lee ok", `registration.cancelled anonymous > reg:lee ok invalid-request {"user_id": "USR"}`)
	step("register", nothing, registers("bob"), 201, of("bob", began, created, mailed)...)
	step("cancel, unknown", nothing, posts(cancelPath, body{"token": "x"}), 400, "cancel anonymous > refused invalid-token")
	links["bob"] = w.readMail(mail("bob"), 1)
	cancel := func() call { return cancelling(links["bob"]) }
	step("cancel", nothing, cancel, 200, `registration.cancelled anonymous > reg:bob ok not_me {"user_id": "bob"}`, `user.remove anonymous > bob ok {"registration_id": "reg:bob"}`)
	step("cancel again", nothing, cancel, 200)
	step("verify, cancelled", nothing, func() call { return verifying(links["bob"]) }, 410, "verify anonymous > reg:bob refused verification-cancelled")
	step("register", nothing, registers("cay"), 201, of("cay", began, created, mailed)...)
	links["cay"] = w.readMail(mail("cay"), 1)
	reg := w.value(`select registration_id from user_registrations where email = $1`, mail("cay"))
	w.expire(mail("cay"))
	w.exec(`update user_registrations set due_at = now() where registration_id = $1`, reg)
	w.eventually("expired", 20*time.Second, func() bool { return strings.Contains(entries(`details->>'registration_id' = $1`, reg), "user.remove") })
	exact("expired", `target = $1 and actor like 'system:%' and (ip_address, user_agent, request_id) = ('', '', '')`, reg,
		[]string{`registration.expired system:repair > reg:cay ok expired {"user_id": "cay"}`})
	exact("expired", `details->>'registration_id' = $1 and actor like 'system:%'`, reg, []string{`user.remove system:repair > cay ok {"registration_id": "reg:cay"}`})
	step("verify, expired", nothing, func() call { return verifying(links["cay"]) }, 410, "verify anonymous > reg:cay refused verification-expired")
	step("register, limited", nothing, limited(full(onRegister), registers("zoe")), 429, "register anonymous > refused too-many-requests")
	step("status, limited: a GET", nothing, limited(full(onStatus), func() call { return call{path: "/api/v1/registrations/" + reg} }), 429,
		"registrationStatus anonymous > refused too-many-requests")
	step("status", nothing, func() call { return call{path: "/api/v1/registrations/" + reg} }, 200)
	step("status, unknown: a GET", nothing, func() call { return call{path: "/api/v1/registrations/" + string(newRegistrationID())} }, 404)

	// Signing in.
	in := `login ada > ada ok {"session_id": "SES"}`
	step("ada", nothing, logsIn("ada", password), 200, in)
	step("sign-in, unknown", nothing, logsIn("nobody", wrong), 401, "login anonymous > refused invalid-credentials")
	step("sign-in, wrong password", nothing, logsIn("ada", wrong), 401, "login anonymous > ada refused invalid-credentials")
	step("sign-in, new password wanted", func() { keycloak("ada", body{"requiredActions": []string{"UPDATE_PASSWORD"}}) }, logsIn("ada", password), 403,
		"login anonymous > ada refused account-setup-required")
	step("sign-in, disabled in Keycloak", func() { keycloak("ada", body{"requiredActions": []string{}, "enabled": false}) }, logsIn("ada", password), 403,
		"login anonymous > ada refused account-disabled")
	step("sign-in, disabled here", func() {
		keycloak("ada", body{"enabled": true})
		w.exec(`update users set is_active = false, deleted_at = now() where email = $1`, mail("ada"))
	}, logsIn("ada", password), 403, "login anonymous > ada refused account-disabled")
	step("me, disabled: a GET", nothing, as("ada", "GET", "/api/v1/auth/me", nil), 403, "me ada > refused account-disabled")
	w.exec(`update users set is_active = true, deleted_at = null where email = $1`, mail("ada"))
	step("sign-in, too often for the account", func() {
		w.exec(`update rate_limits set hits = 20, resets_at = now() + interval '1 minute' where key = $1`, loginLimit(mail("ada")).Key)
	}, logsIn("ada", password), 429, "login anonymous > refused too-many-requests")
	w.exec(`update rate_limits set resets_at = now() where key = $1`, loginLimit(mail("ada")).Key)
	step("sign-in, too often from there", nothing, limited(full(onLogin), logsIn("ada", password)), 429, "login anonymous > refused too-many-requests")
	step("code flow, forged", nothing, func() call { return call{path: "/auth/callback?state=x&code=y"} }, 400, "login anonymous > refused sign-in-incomplete")
	step("code flow, too often: a GET", nothing, limited(full(onSignIn), func() call { return call{path: "/auth/login"} }), 429, "signInPage anonymous > refused too-many-requests")

	// Sessions.
	former := tokens["ada"]
	step("refresh", nothing, func() call { return refreshing(former.text("refresh_token")) }, 200)
	step("refresh, reused", func() { w.graceEnds(former) }, func() call { return refreshing(former.text("refresh_token")) }, 401,
		`session.end anonymous > ada ok token-reused {"sessions": ["SES"]}`, "refresh anonymous > ada refused token-reused")
	step("refresh, ended", nothing, func() call { return refreshing(former.text("refresh_token")) }, 401, "refresh anonymous > refused invalid-token")
	step("refresh, another site", nothing, func() call {
		return call{method: "POST", path: refreshPath, header: map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Cookie": "refresh_token=x"}}
	}, 403, "refresh anonymous > refused forbidden")
	step("ada", nothing, logsIn("ada", password), 200, in)
	out := func() call { return loggingOut(tokens["ada"].text("refresh_token")) }
	step("logout", nothing, out, 204, `logout ada > ada ok logout {"sessions": ["SES"]}`)
	step("logout again", nothing, out, 204)
	step("sessions, revoked token: a GET", func() {
		w.eventually("revoked", 5*time.Second, func() bool { return w.as(tokens["ada"], "GET", sessionsPath).Status == 401 })
	}, as("ada", "GET", sessionsPath, nil), 401)
	step("sessions, revoked token", nothing, as("ada", "DELETE", sessionsPath, nil), 401, "endSessions anonymous > refused unauthorized")
	step("ada", nothing, logsIn("ada", password), 200, in)
	step("own session, another's", nothing, as("ada", "DELETE", sessionsPath+"/SES-0123456789abcdef", nil), 404, "endSession ada > refused not-found")
	step("own session", nothing, func() call { return as("ada", "DELETE", sessionsPath+"/"+tokens["ada"].text("session_id"), nil)() }, 204,
		`session.end ada > ada ok own {"sessions": ["SES"]}`)
	step("ada", nothing, logsIn("ada", password), 200, in)
	step("ada", nothing, logsIn("ada", password), 200, in)
	step("own sessions", nothing, as("ada", "DELETE", sessionsPath, nil), 204, `session.end ada > ada ok own {"sessions": ["SES", "SES"]}`)
	step("ada", nothing, logsIn("ada", password), 200, in)
	w.keycloakAdmin("DELETE", "/sessions/"+w.sid(tokens["ada"]), nil, nil)
	w.sessionsDue()
	session := tokens["ada"].text("session_id")
	w.eventually("ended in Keycloak", 20*time.Second, func() bool { return entries(`details->'sessions' ? $1`, session) != "" })
	exact("ended in Keycloak", `details->'sessions' ? $1`, session, []string{`session.end system:sessions > ada ok keycloak {"sessions": ["SES"]}`})
	step("forgot password", nothing, func() call { return forgetting(mail("ada")) }, 202, "password.forgot anonymous > ada ok")
	step("forgot password, too soon", nothing, func() call { return forgetting(mail("ada")) }, 202, "forgotPassword anonymous > refused too-many-requests")
	step("forgot password, unknown", nothing, func() call { return forgetting(mail("nobody")) }, 202)

	// Users.
	step("register", nothing, registers("root"), 201, of("root", began, created, mailed)...)
	links["root"] = w.readMail(mail("root"), 1)
	step("verify", nothing, func() call { return verifying(links["root"]) }, 200, verified("root"))
	for range 2 { // the second time changes nothing
		if said, err := w.operate("grant-admin", mail("root")); err != nil {
			t.Fatalf("%v %s", err, said)
		}
	}
	if _, err := w.operate("grant-admin", mail("nobody")); err == nil {
		t.Error("nobody is an administrator")
	}
	exact("grant-admin", `actor = $1 and (ip_address, user_agent, request_id) = ('', '', '')`, "cli:tester",
		[]string{`user.grant_admin cli:tester > root ok {"role": {"after": "admin", "before": "user"}}`})
	step("root", nothing, logsIn("root", password), 200, `login root > root ok {"session_id": "SES"}`)
	invite := body{"email": mail("ina"), "username": "ina-" + id, "role": "operator", "network_id": "NET-1", "station_id": "STA-1"}
	step("create", nothing, as("root", "POST", "/api/v1/users", invite), 201,
		`user.create root > ina ok @NET-1 {"role": "operator", "source": "internal", "network_id": "NET-1", "station_id": "STA-1"}`, "user.invite root > ina ok @NET-1")
	step("create, known", nothing, as("root", "POST", "/api/v1/users", invite), 409, "createUser root > refused user-exists")
	step("create, refused by Keycloak", func() {
		w.keycloakAdmin("POST", "/users", body{"username": mail("kay"), "email": mail("kay")}, nil)
	}, as("root", "POST", "/api/v1/users", body{"email": mail("kay"), "network_id": "NET-1"}), 409,
		`user.create root > USR ok @NET-1 {"role": "user", "source": "internal", "network_id": "NET-1", "station_id": ""}`, "user.remove root > USR ok keycloak @NET-1", "createUser root > refused user-exists")
	step("create, no token", nothing, posts("/api/v1/users", invite), 401, "createUser anonymous > refused unauthorized")
	step("ina", func() {
		keycloak("ina", body{"emailVerified": true, "requiredActions": []string{}, "credentials": []body{{"type": "password", "value": password}}})
	}, logsIn("ina", password), 200, "user.verified anonymous > ina ok @NET-1", `login ina > ina ok @NET-1 {"session_id": "SES"}`)
	step("patch", nothing, as("root", "PATCH", "{ada}", body{"role": "partner", "network_id": "NET-1", "first_name": "Ada", "phone": "+4930123456"}), 200,
		`user.update root > ada ok @NET-1 {"role": {"after": "partner", "before": "user"}, "phone": "changed", "first_name": "changed", "network_id": {"after": "NET-1", "before": ""}}`)
	step("patch, the same", nothing, as("root", "PATCH", "{ada}", body{"role": "partner"}), 200)
	step("ada", nothing, logsIn("ada", password), 200, `login ada > ada ok @NET-1 {"session_id": "SES"}`)
	step("patch, own role", nothing, as("ada", "PATCH", "{ada}", body{"role": "admin"}), 403, "patchUser ada > ada refused forbidden @NET-1")
	step("patch, too high", nothing, func() call { return as("ada", "PATCH", user("ina"), body{"role": "partner"})() }, 403, "patchUser ada > ina refused forbidden @NET-1")
	step("patch, unseen", nothing, func() call { return as("ada", "PATCH", user("root"), body{"first_name": "R."})() }, 404, "patchUser ada > root refused user-not-found @NET-1")
	step("read, unseen: a GET", nothing, func() call { return as("ada", "GET", user("root"), nil)() }, 404, "user ada > root refused user-not-found @NET-1")
	step("read, unknown: a GET", nothing, as("ada", "GET", "/api/v1/users/USR-0123456789abcdef", nil), 404, "user ada > USR refused user-not-found @NET-1")
	step("read, seen", nothing, func() call { return as("ada", "GET", user("ina"), nil)() }, 200)
	step("create, too high", nothing, as("ada", "POST", "/api/v1/users", body{"email": mail("zoe"), "role": "admin"}), 403, "createUser ada > refused forbidden @NET-1")
	step("trail, not allowed: a GET", nothing, as("ina", "GET", auditPath, nil), 403, "auditTrail ina > refused forbidden @NET-1")
	step("trail", nothing, as("ada", "GET", auditPath, nil), 200)
	step("users, limited: a GET", nothing, limited(full(onUsers), as("root", "GET", "/api/v1/users", nil)), 429, "users anonymous > refused too-many-requests")
	step("managed session", nothing, func() call {
		return as("root", "DELETE", user("ada")+"/sessions/"+tokens["ada"].text("session_id"), nil)()
	}, 204, `session.end root > ada ok managed @NET-1 {"sessions": ["SES"]}`)
	step("managed session, ended", nothing, func() call {
		return as("root", "DELETE", user("ada")+"/sessions/"+tokens["ada"].text("session_id"), nil)()
	}, 404, "endUserSession root > refused not-found")
	step("ada", nothing, logsIn("ada", password), 200, `login ada > ada ok @NET-1 {"session_id": "SES"}`)
	step("managed sessions", nothing, as("root", "DELETE", "{ada}/sessions", nil), 204, `session.end root > ada ok managed @NET-1 {"sessions": ["SES"]}`)
	step("managed sessions, none", nothing, as("root", "DELETE", "{ada}/sessions", nil), 204)
	step("ada", nothing, logsIn("ada", password), 200, `login ada > ada ok @NET-1 {"session_id": "SES"}`)
	step("patch, moved", nothing, as("root", "PATCH", "{ada}", body{"network_id": "NET-2", "station_id": "STA-2"}), 200,
		`user.update root > ada ok @NET-1 {"network_id": {"after": "NET-2", "before": "NET-1"}, "station_id": {"after": "STA-2", "before": ""}}`)
	step("kim", nothing, logsIn("kim", password), 200, `login kim > kim ok {"session_id": "SES"}`)
	step("sync, not allowed", nothing, as("kim", "POST", "/api/v1/sync", body{}), 403, "startSync kim > refused forbidden")
	w.wants(w.do(as("root", "POST", "/api/v1/sync", body{"dry_run": true})()), 202, "")
	ended := func() bool { return w.value(`select count(*)::text from audit_log where action = 'sync.end'`) == "2" }
	w.eventually("the daily sync and that", 20*time.Second, ended)
	exact("sync", `action like $1`, "sync.%", []string{`sync.begin system:sync > SYN ok {"dry_run": false}`, `sync.end system:sync > SYN ok done {"found": 0, "repaired": 0}`,
		`sync.begin root > SYN ok {"dry_run": true}`, `sync.end root > SYN ok done {"found": 1, "repaired": 0}`}) // kay, whom only Keycloak has
	step("delete", nothing, as("root", "DELETE", "{ada}", nil), 204, `session.end root > ada ok user deleted @NET-2 {"sessions": ["SES"]}`,
		`user.delete root > ada ok @NET-2 {"is_active": {"after": false, "before": true}}`)
	step("delete again", nothing, as("root", "DELETE", "{ada}", nil), 204)
	step("restore", nothing, as("root", "POST", "{ada}/restore", nil), 200, `user.restore root > ada ok @NET-2 {"is_active": {"after": true, "before": false}}`)
	step("delete, oneself", nothing, func() call { return as("root", "DELETE", user("root"), nil)() }, 403, "deleteUser root > root refused forbidden")
	step("patch", nothing, as("root", "PATCH", "{ada}", body{"role": "admin"}), 200, `user.update root > ada ok @NET-2 {"role": {"after": "admin", "before": "partner"}}`)
	step("ada", nothing, logsIn("ada", password), 200, `login ada > ada ok @NET-2 {"session_id": "SES"}`)
	step("delete, an administrator", nothing, func() call { return as("ada", "DELETE", user("root"), nil)() }, 204, `session.end ada > root ok user deleted {"sessions": ["SES"]}`,
		`user.delete ada > root ok {"is_active": {"after": false, "before": true}}`)
	step("restore an administrator", nothing, func() call { return as("ada", "POST", user("root")+"/restore", nil)() }, 200,
		`user.restore ada > root ok {"is_active": {"after": true, "before": false}}`)
	step("delete, who is not there", nothing, as("ada", "DELETE", "/api/v1/users/USR-0123456789abcdef", nil), 404, "deleteUser ada > USR refused user-not-found @NET-2")

	if said, err := w.operate("audit", "verify"); err != nil {
		t.Errorf("%v %s", err, said)
	}
	exact("audit verify", `action = $1`, "audit.verify", []string{`audit.verify cli:tester > ok ` + w.value(`select details::text from audit_log where action = 'audit.verify'`)})
	if got := w.value(`select count(*)::text from audit_log`); got != fmt.Sprint(lines) { // and nothing else has happened
		t.Errorf("%s entries, %d were looked at", got, lines)
	}
	w.straysDie()
}
