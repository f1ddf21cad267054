package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// database is one of a test's own, with an idle server in front of it. The server connects as
// the superuser, who can also do what rights forbid.
type database struct {
	testing.TB
	*server
	pool *pgxpool.Pool
	url  string
	logs *buffer
}

// emptyDatabase has no schema yet.
func emptyDatabase(t testing.TB) *database {
	t.Helper()
	name := "test_" + gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
	url, err := services.CreateDatabase(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := services.DropDatabase(context.Background(), name); err != nil {
			t.Error(err)
		}
	})
	d := &database{TB: t, url: url, logs: new(buffer)}
	d.server = idle(t, newLogger(d.logs, config{}), map[string]string{"DATABASE_URL": url})
	d.pool = d.store.pool
	return d
}

func newDatabase(t testing.TB) *database {
	t.Helper()
	d := emptyDatabase(t)
	d.must(d.server.migrate(t.Context(), false))
	return d
}

func (d *database) must(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

func (d *database) exec(sql string, args ...any) {
	d.Helper()
	if _, err := d.pool.Exec(d.Context(), sql, args...); err != nil {
		d.Fatalf("%s: %v", sql, err)
	}
}

func (d *database) value(sql string, args ...any) (text string) {
	d.Helper()
	d.must(d.pool.QueryRow(d.Context(), sql, args...).Scan(&text))
	return text
}

func (d *database) list(sql string, args ...any) string {
	d.Helper()
	return column(d, d.pool, sql, args...)
}

func (w *env) list(sql string, args ...any) string {
	w.Helper()
	return column(w, w.pool, sql, args...)
}

// column is the lines of a query that has one column.
func column(t testing.TB, pool *pgxpool.Pool, sql string, args ...any) string {
	t.Helper()
	rows, _ := pool.Query(t.Context(), sql, args...)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return strings.Join(lines, "\n")
}

// inOneSession runs statements in a session that ends with them.
func (d *database) inOneSession(sql string) {
	d.Helper()
	conn, err := pgx.Connect(d.Context(), d.url)
	d.must(err)
	defer conn.Close(d.Context())
	if _, err := conn.Exec(d.Context(), sql); err != nil {
		d.Fatalf("%s: %v", sql, err)
	}
}

// write writes n audit entries, a second apart.
func (d *database) write(n int, at time.Time) {
	d.Helper()
	c := caller{Actor: "USR-0123456789abcdef", Address: "192.0.2.7", UserAgent: "test", RequestID: "request-1"}
	for i := range n {
		d.must(d.store.audit(d.Context(), c, at.Add(time.Duration(i)*time.Second), entry{
			Action: "user.update", Target: "USR-fedcba9876543210", Reason: "test", Network: "NET-1",
			Details: map[string]any{"role": map[string]any{"before": "user", "after": "operator"}, "n": i}}))
	}
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

// Nobody changes the audit log by mistake, not even the owner of the tables.
func TestAppendOnly(t *testing.T) {
	d := newDatabase(t)
	now := time.Now()
	later := now.AddDate(1, 0, 0)
	d.exec(`select audit_log_month($1)`, later)
	d.write(3, now)
	d.write(1, later)
	before := d.list(`select a::text from audit_log a order by 1`)
	tables := []string{"audit_log", now.UTC().Format("audit_log_2006_01"), later.UTC().Format("audit_log_2006_01")}
	for _, table := range tables {
		refuses(t, d.pool, "audit_log is append-only",
			"update "+table+" set reason = ''",
			"update "+table+" set reason = reason",
			"delete from "+table,
			"truncate "+table,
			"with gone as (delete from "+table+" returning 1) select count(*) from gone",
			"merge into "+table+" using (select 1) x on true when matched then delete")
	}
	refuses(t, d.pool, "audit_log is append-only", "truncate audit_log cascade", "truncate users, audit_log cascade",
		"update only "+tables[1]+" set at = at + interval '40 days'",
		"insert into "+tables[1]+" select * from "+tables[1]+" on conflict (audit_id, at) do update set reason = 'x'")
	if diff := cmp.Diff(before, d.list(`select a::text from audit_log a order by 1`)); diff != "" || strings.Count(before, "\n") != 3 {
		t.Error(diff)
	}
	d.write(1, now) // more may come
}

// Months begin and end in UTC, and have a partition before they begin.
func TestMonths(t *testing.T) {
	d := newDatabase(t)
	months := func() string {
		return d.list(`select relname from pg_inherits join pg_class on pg_class.oid = inhrelid
			where inhparent = 'audit_log'::regclass order by 1`)
	}
	var want []string
	for n := range monthsAhead + 1 {
		now := time.Now().UTC()
		want = append(want, time.Date(now.Year(), now.Month()+time.Month(n), 1, 0, 0, 0, 0, time.UTC).Format("audit_log_2006_01"))
	}
	if diff := cmp.Diff(strings.Join(want, "\n"), months()); diff != "" {
		t.Error(diff)
	}
	// The time zone of the session makes no difference, nor do instances at once.
	d.inOneSession(`set timezone = 'Pacific/Kiritimati'; select audit_log_month('2035-12-31T23:59:59.999999Z')`)
	d.inOneSession(`set timezone = 'America/Los_Angeles'; select audit_log_month('2036-01-01T00:00:00Z')`)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := d.store.makeMonths(t.Context(), time.Date(2036, 2, 29, 12, 0, 0, 0, time.UTC)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	want = append(want, "audit_log_2035_12", "audit_log_2036_01", "audit_log_2036_02", "audit_log_2036_03",
		"audit_log_2036_04", "audit_log_2036_05")
	if diff := cmp.Diff(strings.Join(want, "\n"), months()); diff != "" {
		t.Error(diff)
	}
	east, west := time.FixedZone("east", 14*3600), time.FixedZone("west", -5*3600)
	for _, c := range []struct {
		at        time.Time
		partition string
	}{
		{at: time.Date(2035, 12, 1, 0, 0, 0, 0, time.UTC), partition: "audit_log_2035_12"},
		{at: time.Date(2035, 12, 31, 23, 59, 59, 999999000, time.UTC), partition: "audit_log_2035_12"},
		{at: time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC), partition: "audit_log_2036_01"},
		{at: time.Date(2036, 1, 1, 13, 59, 59, 0, east), partition: "audit_log_2035_12"},
		{at: time.Date(2036, 3, 1, 14, 0, 0, 0, east), partition: "audit_log_2036_03"},
		{at: time.Date(2036, 2, 29, 23, 59, 59, 0, time.UTC), partition: "audit_log_2036_02"},
		{at: time.Date(2036, 5, 31, 23, 59, 59, 999999000, time.UTC), partition: "audit_log_2036_05"},
		{at: time.Date(2036, 2, 29, 19, 0, 0, 0, west), partition: "audit_log_2036_03"},
	} {
		d.write(1, c.at)
		if got := d.value(`select tableoid::regclass::text from audit_log where at = $1`, c.at); got != c.partition {
			t.Errorf("%v is in %s, not in %s", c.at, got, c.partition)
		}
	}
	if err := d.store.audit(t.Context(), caller{Actor: "test"}, time.Date(2036, 6, 1, 0, 0, 0, 0, time.UTC), entry{Action: "test"}); err == nil {
		t.Error("an entry without a partition for its month is written")
	}
}

// A month that is too old goes as a whole, by the statement in README.
func TestRetention(t *testing.T) {
	d := newDatabase(t)
	for n := range 2 {
		month := time.Date(2026, time.Month(1+n), 1, 0, 0, 0, 0, time.UTC)
		d.exec(`select audit_log_month($1::timestamptz)`, month)
		d.write(3, month)
	}
	drop := regexp.MustCompile("(?m)^drop table audit_log_2026_01;$").FindString(operatingManual(t))
	if drop == "" {
		t.Fatal("README does not say how")
	}
	d.exec(drop)
	if got := d.list(`select distinct to_char(at at time zone 'UTC', 'YYYY-MM') from audit_log`); got != "2026-02" {
		t.Errorf("the audit log has %q", got)
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

// Users are found by a text also where PostgreSQL has no index for it.
func TestSearchIndexIsOptional(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare string // as the superuser; ROLE is who migrates
		warning string // "": the index is there
	}{
		{name: "the role may create extensions", prepare: `grant create on database DB to ROLE`},
		{name: "the role may not", warning: "permission denied to create extension"},
		{name: "somebody has created it", prepare: `create extension pg_trgm`},
		{name: "in a schema out of sight", prepare: `create schema extensions; create extension pg_trgm schema extensions;
			grant usage on schema extensions to ROLE`},
		{name: "in a schema of somebody else's", prepare: `create schema extensions; create extension pg_trgm schema extensions`,
			warning: "permission denied for schema extensions"},
		{name: "refused by the provider", prepare: `grant create on database DB to ROLE; create function no() returns event_trigger
			language plpgsql as $no$ begin raise 'it is not allow-listed' using errcode = 'XX000'; end $no$;
			create event trigger no on ddl_command_start when tag in ('CREATE EXTENSION') execute function no()`,
			warning: "it is not allow-listed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := emptyDatabase(t)
			role := "test_role_" + gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
			d.exec(strings.NewReplacer("ROLE", role, "DB", d.pool.Config().ConnConfig.Database).Replace(
				`create role ROLE login password 's3cret'; grant create on schema public to ROLE; ` + c.prepare))
			t.Cleanup(func() { d.dropRole(role) })
			url := regexp.MustCompile(`//.*@`).ReplaceAllString(d.url, "//"+role+":s3cret@")
			logs := new(buffer)
			s := idle(t, newLogger(logs, config{}), map[string]string{"DATABASE_URL": url})
			d.must(s.migrate(t.Context(), false))
			warned := strings.Contains(logs.String(), "the search for users works without its index: "+c.warning) &&
				strings.Contains(logs.String(), "As a superuser: create extension pg_trgm. Then: auth-service migrate")
			if has := d.value(`select (to_regclass('users_by_text') is not null)::text`); has != map[bool]string{true: "true", false: "false"}[c.warning == ""] ||
				warned != (c.warning != "") {
				t.Errorf("the index is there: %s, the log: %s", has, logs)
			}
			d.exec(`insert into users (user_id, keycloak_id, email, username, first_name) values ('USR-a', 'a', 'a@x.test', 'a', 'Ada'), ('USR-b', 'b', 'b@x.test', 'b', '100%')`)
			for text, want := range map[string]string{"ADA": "USR-a", "x.test": "USR-b USR-a", "0%": "USR-b", "%": "USR-b", "_": ""} {
				found, err := s.store.users(t.Context(), principal{Roles: []string{roleAdmin}}, usersIn{pageIn: pageIn{Limit: 9}, Query: text}, cursor{At: time.Now().AddDate(1, 0, 0)})
				d.must(err)
				var ids []string
				for _, u := range found {
					ids = append(ids, string(u.ID))
				}
				if got := strings.Join(ids, " "); got != want {
					t.Errorf("%q finds %q, not %q", text, got, want)
				}
			}
		})
	}
}

// dropRole ends a role that owns something in this database only.
func (d *database) dropRole(role string) {
	conn, err := pgx.Connect(context.Background(), d.url)
	if err == nil {
		defer conn.Close(context.Background())
		_, err = conn.Exec(context.Background(), `drop owned by `+role+` cascade; drop role `+role)
	}
	if err != nil {
		d.Error(err)
	}
}

// productionRoles is a database with the two roles that README describes.
type productionRoles struct {
	*testing.T
	owner, service       string // roles
	ownerURL, serviceURL string
	asOwner, asService   *pgxpool.Pool
	superURL             string
}

func (p *productionRoles) command(url string, args ...string) error {
	return run(p.Context(), args, environment(map[string]string{"DATABASE_URL": url}), io.Discard, io.Discard)
}

func (p *productionRoles) change(sql string) {
	p.Helper()
	if _, err := p.asOwner.Exec(p.Context(), sql); err != nil {
		p.Fatal(err)
	}
}

func (p *productionRoles) migrate() {
	p.Helper()
	if err := p.command(p.ownerURL, "migrate"); err != nil {
		p.Fatal(err)
	}
}

// newProductionRoles sets PostgreSQL up by the SQL in README. Roles are of all databases, and
// schema.sql names one: for this test, which is not parallel, both have other names.
func newProductionRoles(t *testing.T) *productionRoles {
	_, section, _ := strings.Cut(operatingManual(t), "### Production roles in PostgreSQL")
	block := regexp.MustCompile("(?s)```sql\n(.*?)```").FindStringSubmatch(section)
	if block == nil {
		t.Fatal("README has no SQL")
	}
	id := gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 10)
	db, former := "test_"+id, schemaSQL
	p := &productionRoles{T: t, owner: "test_owner_" + id, service: "test_service_" + id, superURL: services.DatabaseURL(db)}
	schemaSQL = strings.ReplaceAll(schemaSQL, "auth_service", p.service)
	super, err := pgxpool.New(t.Context(), services.DatabaseURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the last: the env needs its database until it has ended
		schemaSQL = former
		if err := services.DropDatabase(context.Background(), db); err != nil {
			t.Error(err)
		}
		if _, err := super.Exec(context.Background(), "drop role "+p.service+"; drop role "+p.owner); err != nil {
			t.Error(err)
		}
		super.Close()
	})
	passwords := map[string]string{}
	for statement := range strings.SplitSeq(strings.TrimSpace(block[1]), ";\n") {
		if m := regexp.MustCompile(`create role (\w+) login password '(.*)'`).FindStringSubmatch(statement); m != nil {
			passwords[m[1]] = m[2]
		}
		statement = strings.NewReplacer("auth_owner", p.owner, "auth_service", p.service, "database auth", "database "+db).Replace(statement)
		if _, err := super.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	open := func(role, name string) (string, *pgxpool.Pool) {
		url := regexp.MustCompile(`//.*@`).ReplaceAllString(p.superURL, "//"+role+":"+passwords[name]+"@")
		pool, err := pgxpool.New(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		return url, pool
	}
	p.ownerURL, p.asOwner = open(p.owner, "auth_owner")
	p.serviceURL, p.asService = open(p.service, "auth_service")
	return p
}

// The service runs by the role that README makes for it: it does all that it must, and can't
// change the audit log.
func TestProductionRoles(t *testing.T) {
	p := newProductionRoles(t)
	p.migrations()
	entries := p.theWholeWay()
	p.cannotChange(entries)
}

// migrations: the service can't make or change the schema, and says who can.
func (p *productionRoles) migrations() {
	cannot := func(when string) {
		p.Helper()
		for _, args := range [][]string{{"migrate"}, {"jobs"}} {
			if err := p.command(p.serviceURL, args...); err == nil || !strings.Contains(err.Error(), `run "auth-service migrate" as the owner`) {
				p.Errorf("%s: %v: %v", when, args, err)
			}
		}
	}
	cannot("no schema")
	p.migrate()
	p.change(`update schema_version set version = version - 1`)
	cannot("an older schema")
	p.migrate()
	p.change(`revoke all on all tables in schema public from ` + p.service)
	if err := p.command(p.serviceURL, "jobs"); err == nil || !strings.Contains(err.Error(), `run "auth-service migrate" as the owner`) {
		p.Errorf("a role that has come later: %v", err)
	}
	p.migrate()
}

// theWholeWay does something of everything as the service, and returns how to count the entries.
func (p *productionRoles) theWholeWay() func() string {
	w := newEnv(p.T, map[string]string{"DATABASE_URL": p.serviceURL})
	w.pool.Close()
	var err error
	if w.pool, err = pgxpool.New(p.Context(), p.superURL); err != nil {
		p.Fatal(err)
	}
	root, ada := newEmail(), newEmail()
	w.account(root)
	if out, err := w.operate("grant-admin", root); err != nil {
		p.Fatalf("%v %s", err, out)
	}
	admin := w.signsIn(root)
	w.account(ada)
	w.signsIn(ada)
	user := "/api/v1/users/" + w.idOf(ada)
	w.wants(w.patched(admin, ada, body{"role": "operator", "network_id": "NET-1", "station_id": "STA-1"}), 200, "")
	w.wants(w.as(admin, "DELETE", user), 204, "")
	w.wants(w.as(admin, "POST", user+"/restore"), 200, "")
	w.wants(w.login(ada, "a wrong password"), 401, "invalid-credentials")
	if a := w.as(admin, "GET", auditPath+"?target="+w.idOf(ada)); a.Status != 200 || len(a.JSON["items"].([]any)) != 8 {
		p.Errorf("user.create, login, user.update, session.end, user.delete, session.end, user.restore and a refusal: %v", a)
	}
	w.waitUntilIdle()
	s := idle(p.T, slog.New(slog.DiscardHandler), map[string]string{"DATABASE_URL": p.serviceURL})
	if err := s.store.makeMonths(p.Context(), time.Now().AddDate(0, 2, 0)); err != nil { // the first of what no migration has made
		p.Error(err)
	}
	if got := w.value(`select tableowner from pg_tables where tablename = $1`, lastMonth()); got != p.owner {
		p.Errorf("%s is %s's", lastMonth(), got)
	}
	return func() string { return w.value(`select count(*)::text from audit_log`) }
}

// lastMonth is the partition that was made last, by the service.
func lastMonth() string {
	now := time.Now().UTC()
	return now.AddDate(0, 0, 1-now.Day()).AddDate(0, monthsAhead+2, 0).Format("audit_log_2006_01")
}

// cannotChange: audit entries stay as they are, and more can be written.
func (p *productionRoles) cannotChange(entries func() string) {
	now, month := time.Now().UTC().Format("audit_log_2006_01"), lastMonth()
	const columns = `audit_id, at, actor, action, target, outcome`
	before := entries()
	refuses(p.T, p.asService, `SQLSTATE (42501|25006)`,
		"update audit_log set reason = 'x'", "delete from audit_log", "truncate audit_log",
		"update "+now+" set reason = 'x'", "delete from "+now, "truncate "+now,
		"insert into "+now+" ("+columns+") values ('AUD-x', now(), 'a', 'b', 'c', 'ok')",
		"insert into audit_log ("+columns+") select "+columns+" from audit_log on conflict (audit_id, at) do update set reason = 'x'",
		"merge into audit_log using (select 1) x on true when matched then delete",
		"alter table audit_log add column x int", "alter table audit_log drop constraint valid_outcome",
		"alter table audit_log owner to "+p.service, "alter table audit_log disable trigger all",
		"alter table "+now+" disable trigger audit_log_keeps_rows", "drop trigger audit_log_keeps_rows on audit_log",
		"alter table audit_log detach partition "+now,
		"create table mine partition of audit_log for values from ('1999-01-01') to ('1999-02-01')",
		"drop table audit_log", "drop table "+now, "drop function audit_log_is_append_only cascade",
		"create or replace function audit_log_is_append_only() returns trigger language plpgsql as $$ begin return old; end $$",
		"create or replace function audit_log_month(at timestamptz) returns void language sql as $$ $$",
		"create table mine (x int)", "create temporary table mine (x int)", "create schema mine",
		"create rule mine as on insert to audit_log do instead nothing",
		"set session_replication_role = replica", "set role "+p.owner,
		"begin; lock table audit_log in access exclusive mode", "update schema_version set version = 0")
	if after := entries(); after != before {
		p.Errorf("%s entries, then %s", before, after)
	}
	refuses(p.T, p.asOwner, "audit_log is append-only", "update audit_log set reason = 'x'",
		"delete from "+month+"; delete from audit_log", "truncate "+month)
	if _, err := p.asService.Exec(p.Context(), "insert into audit_log ("+columns+") values ('AUD-0123456789abcdef', now(), 'a', 'b', 'c', 'ok')"); err != nil {
		p.Error(err)
	}
}
