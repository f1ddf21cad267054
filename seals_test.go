package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// record is a database of a test's own, and a server in front of it that nobody calls. It
// is the superuser's, who can also do what the triggers forbid.
type record struct {
	testing.TB
	*server
	pool *pgxpool.Pool
	url  string
	logs *buffer
}

// emptyRecord has no schema yet.
func emptyRecord(t testing.TB) *record {
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
	logs := new(buffer)
	s := idle(t, slog.New(slog.NewTextHandler(logs, nil)), map[string]string{"DATABASE_URL": url})
	return &record{t, s, s.store.pool, url, logs}
}

func newRecord(t testing.TB) *record {
	t.Helper()
	r := emptyRecord(t)
	r.must(r.server.migrate(t.Context(), false))
	return r
}

func (r *record) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *record) exec(sql string, args ...any) {
	r.Helper()
	if _, err := r.pool.Exec(r.Context(), sql, args...); err != nil {
		r.Fatalf("%s: %v", sql, err)
	}
}

func (r *record) value(sql string, args ...any) (text string) {
	r.Helper()
	r.must(r.pool.QueryRow(r.Context(), sql, args...).Scan(&text))
	return text
}

// command runs the program as an operator does.
func (r *record) command(args ...string) (string, error) {
	var out bytes.Buffer
	err := run(r.Context(), args, environment(map[string]string{"DATABASE_URL": r.url, "USER": "tester"}), &out, io.Discard)
	return out.String(), err
}

// write puts n entries on record, a second apart.
func (r *record) write(n int, at time.Time) {
	r.Helper()
	for i := range n {
		r.must(r.store.audit(r.Context(), caller{Actor: "USR-0123456789abcdef", Address: "192.0.2.7", UserAgent: "test", RequestID: "request-1"},
			at.Add(time.Duration(i)*time.Second), entry{Action: "user.update", Target: "USR-fedcba9876543210", Reason: "test", Network: "NET-1",
				Details: map[string]any{"role": map[string]any{"before": "user", "after": "operator"}, "n": i}}))
	}
}

// fill puts many entries on record.
func (r *record) fill(n int, at time.Time) {
	r.Helper()
	_, err := r.pool.Exec(r.Context(), `set statement_timeout = 0`)
	r.must(err)
	r.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome, ip_address, user_agent, request_id, details)
		select 'AUD-' || lpad(i::text, 16, '0'), $2::timestamptz + i * interval '1 microsecond', 'USR-0123456789abcdef', 'login', 'USR-0123456789abcdef', 'ok',
			'192.0.2.7', 'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)', 'V1StGXR8_Z5jdHi6B-myT', '{"session_id": "SES-V1StGXR8_Z5jdHi6"}'
		from generate_series(1, $1::int) i`, n, at)
}

// seals says which entries, by their place in the record, each seal ends with.
func (r *record) seals() string {
	r.Helper()
	return r.value(`select coalesce(string_agg((select count(*) from audit_log where number <= last_number)::text, ' ' order by seal_id), '') from audit_seals`)
}

// seal is sealAudit at a time.
func (r *record) seal(at time.Time) {
	r.Helper()
	r.now = func() time.Time { return at }
	r.must(r.sealAudit(r.Context()))
}

// fits fails unless the record, with the seal of a hash, is as it was, and returns what is said of it.
func (r *record) fits(known ...string) string {
	r.Helper()
	out, err := r.command(append([]string{"audit", "verify"}, known...)...)
	if err != nil {
		r.Fatalf("%v %s", err, out)
	}
	return out
}

func TestSeals(t *testing.T) {
	noon := time.Now().UTC().Truncate(time.Second).Add(-time.Hour)
	t.Run("in batches, in order, what is old enough", func(t *testing.T) {
		r := newRecord(t)
		if got := newRecord(t).fits(); got != "0 entries in 0 seals fit; 0 are not sealed yet.\n" {
			t.Errorf("nothing: %q", got)
		}
		r.fill(2*sealBatch+1, noon)
		last := noon.Add((2*sealBatch + 1) * time.Microsecond)
		for _, c := range []struct {
			at   time.Time
			want string
		}{{noon.Add(sealAfter), ""}, {noon.Add(sealAfter + 7*time.Microsecond), "7"}, {noon.Add(sealAfter + 7*time.Microsecond), "7"},
			{last.Add(sealAfter - time.Microsecond), "7 1007 2000"}, {last.Add(sealAfter), "7 1007 2000 2001"}} {
			r.seal(c.at)
			if got := r.seals(); got != c.want {
				t.Fatalf("%v after the first: %q, want %q", c.at.Sub(noon), got, c.want)
			}
		}
		hash := r.value(`select hash from audit_seals where seal_id = 4`)
		for i := range 2 { // each verification is on record itself
			if got, want := r.fits(hash), fmt.Sprintf("2001 entries in 4 seals fit; %d are not sealed yet.\nThe last seal is %s\n", i, hash); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		}
		if !strings.Contains(r.logs.String(), "seal=4 entries=1 hash="+hash) {
			t.Errorf("the log does not witness %s", hash)
		}
	})
	t.Run("a young entry keeps the later ones", func(t *testing.T) {
		r := newRecord(t)
		for _, age := range []time.Duration{3 * time.Minute, time.Minute, 3 * time.Minute} { // instances' clocks differ
			r.write(1, noon.Add(-age))
		}
		r.seal(noon)
		if got := r.seals(); got != "1" {
			t.Errorf("sealed: %q", got)
		}
		r.seal(noon.Add(time.Minute))
		if got := r.seals(); got != "1 3" {
			t.Errorf("sealed: %q", got)
		}
		r.fits()
	})
	t.Run("transactions that overtake each other", func(t *testing.T) {
		r := newRecord(t)
		r.write(1, noon)
		ctx := t.Context()
		slow, err := r.pool.Begin(ctx)
		r.must(err)
		r.must(writeAudit(ctx, slow, caller{Actor: "slow"}, noon.Add(time.Second), entry{Action: "test"}))
		lost, err := r.pool.Begin(ctx)
		r.must(err)
		r.must(writeAudit(ctx, lost, caller{Actor: "lost"}, noon.Add(time.Second), entry{Action: "test"}))
		r.must(lost.Rollback(ctx)) // its number is never used
		r.write(1, noon.Add(time.Second))
		r.seal(noon.Add(sealAfter))
		if got := r.seals(); got != "1" {
			t.Errorf("sealed while a transaction is open: %q", got)
		}
		r.must(slow.Commit(ctx))
		r.seal(noon.Add(sealAfter + time.Second))
		if got := r.seals(); got != "1 3" {
			t.Errorf("sealed: %q", got)
		}
		if out := r.fits(); !strings.HasPrefix(out, "3 entries in 2 seals fit") {
			t.Error(out)
		}
	})
	t.Run("several instances at once", func(t *testing.T) {
		r := newRecord(t)
		r.fill(5*sealBatch+5, noon)
		var all sync.WaitGroup
		for range 6 {
			s := idle(t, r.log, map[string]string{"DATABASE_URL": r.url})
			s.now = func() time.Time { return noon.Add(time.Hour) }
			all.Go(func() {
				if err := s.sealAudit(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if got := r.seals(); got != "1000 2000 3000 4000 5000 5005" {
			t.Errorf("sealed: %q", got)
		}
		if n := strings.Count(r.logs.String(), "the record is sealed"); n != 6 {
			t.Errorf("the log has %d seals", n)
		}
		r.fits()
	})
}

// Whoever has all rights in the database can change the record, but not unnoticed by
// those who know the hash of a seal.
func TestTampering(t *testing.T) {
	r := newRecord(t)
	noon := time.Now().UTC().Truncate(time.Second).Add(-time.Hour)
	for i := range 4 { // 1 2 3, 4 5 6, 7 8 9 in seals, 10 11 12 not yet
		r.write(3, noon.Add(time.Duration(i)*time.Hour))
		r.seal(noon.Add(time.Duration(min(i, 2))*time.Hour + 10*time.Minute))
	}
	if got := r.seals(); got != "3 6 9" {
		t.Fatalf("sealed: %q", got)
	}
	r.exec(`create table log_copy as select * from audit_log; create table seals_copy as select * from audit_seals`)
	e := func(n int) string {
		return r.value(`select audit_id from log_copy order by number offset $1 limit 1`, n-1)
	}
	hash := func(id int) string { return r.value(`select hash from seals_copy where seal_id = $1`, id) }
	const triggers = `set session_replication_role = replica;`
	set := func(what string) string {
		return triggers + `update audit_log set ` + what + ` where audit_id = '` + e(5) + `'`
	}
	type row struct {
		name, sql string
		reseal    bool   // what is there afterwards
		known     string // hash
		want      string // "": it fits
	}
	rows := []row{
		{name: "nothing"},
		{name: "nothing, with the last seal's hash", known: hash(3)},
		{name: "nothing, with an earlier one's", known: hash(1)},
		{name: "another's hash", known: digest("x"), want: "the seal " + digest("x") + " is not there"},
		{name: "no hash at all", known: strings.Repeat("x", 1000), want: "the seal " + strings.Repeat("x", 1000) + " is not there"},
		{name: "entries that are not sealed yet", sql: triggers + `delete from audit_log where number > 10`},
		{name: "audit_id", sql: set(`audit_id = 'AUD-another'`), want: "AUD-another was added after its batch was sealed"},
		{name: "at", sql: set(`at = at + interval '1 microsecond'`), want: e(5) + " was altered"},
		{name: "at, in another month", sql: set(`at = at + interval '40 days'`), want: e(5) + " was altered"},
		{name: "number", sql: set(`number = 1000`), want: e(5) + " is missing"},
		{name: "number of an earlier one", sql: set(`number = 0`), want: e(5) + " was added after its batch was sealed"},
		{name: "details", sql: set(`details = details || '{"n": 2}'`), want: e(5) + " was altered"},
		{name: "details that are none", sql: set(`details = '[]'`), want: "seal 2 has an entry that can't be read any more"},
		{name: "outcome", sql: set(`outcome = 'failed'`), want: e(5) + " was altered"},
		{name: "swapped numbers", sql: triggers + `update audit_log set number = case audit_id when '` + e(5) + `' then 6 else 5 end where number in (5, 6)`,
			want: e(5) + " is missing"},
		{name: "swapped over two seals", sql: triggers + `update audit_log set number = case audit_id when '` + e(3) + `' then 7 else 3 end where number in (3, 7)`,
			want: e(7) + " was added after its batch was sealed"},
		{name: "deleted, the first", sql: triggers + `delete from audit_log where number = 1`, want: e(1) + " is missing"},
		{name: "deleted, the last", sql: triggers + `delete from audit_log where number = 9`, want: e(9) + " is missing"},
		{name: "deleted, all", sql: triggers + `delete from audit_log`, want: e(1) + " is missing"},
		{name: "inserted", want: "AUD-new was added after its batch was sealed",
			sql: `insert into audit_log (audit_id, number, at, actor, action, target, outcome) select 'AUD-new', 5, now(), 'a', 'b', 'c', 'ok'`},
		{name: "inserted before all", want: "AUD-new was added after its batch was sealed",
			sql: `insert into audit_log (audit_id, number, at, actor, action, target, outcome) select 'AUD-new', -5, now(), 'a', 'b', 'c', 'ok'`},
		{name: "manifest", sql: triggers + `update audit_seals set manifest = replace(manifest, '` + e(5) + `', 'AUD-another') where seal_id = 2`,
			want: "seal 2 was altered, or the one before it was"},
		{name: "manifest and hash", want: "seal 2 has a line that is none of an entry", sql: triggers + `update audit_seals set manifest = replace(manifest, 'Z ', 'z ') where seal_id = 2;
			update audit_seals set hash = encode(sha256(manifest::bytea), 'hex') where seal_id = 2`},
		{name: "manifest with a line less, and hash", want: e(6) + " was added after its batch was sealed", sql: triggers + `
			update audit_seals set manifest = left(manifest, position('` + e(6) + `' in manifest) - 1) where seal_id = 2;
			update audit_seals set hash = encode(sha256(manifest::bytea), 'hex') where seal_id = 2`},
		{name: "hash", sql: triggers + `update audit_seals set hash = '` + digest("x") + `' where seal_id = 2`, want: "seal 2 was altered, or the one before it was"},
		{name: "hash of the last", sql: triggers + `update audit_seals set hash = '` + digest("x") + `' where seal_id = 3`, want: "seal 3 was altered, or the one before it was"},
		{name: "last number", sql: triggers + `update audit_seals set last_number = 7 where seal_id = 2`, want: "seal 2 was altered, or the one before it was"},
		{name: "id of a seal", sql: triggers + `update audit_seals set seal_id = 4 where seal_id = 3`, want: "seal 4 was altered, or the one before it was"},
		{name: "seal deleted, the first", sql: triggers + `delete from audit_seals where seal_id = 1`, want: "seal 2 was altered, or the one before it was"},
		{name: "seal deleted, in the middle", sql: triggers + `delete from audit_seals where seal_id = 2`, want: "seal 3 was altered, or the one before it was"},
		{name: "seal deleted, the last", sql: triggers + `delete from audit_seals where seal_id = 3`},
		{name: "seal deleted, the last, with its hash", sql: triggers + `delete from audit_seals where seal_id = 3`, known: hash(3), want: "the seal " + hash(3) + " is not there"},
		{name: "seal added", want: "seal 4 was altered, or the one before it was",
			sql: `insert into audit_seals select 4, now(), 12, 'x', encode(sha256('x'), 'hex')`},
		{name: "all written anew", sql: set(`actor = 'nobody'`) + `; delete from audit_seals where seal_id > 1`, reseal: true},
		{name: "all written anew, with the hash of what was not", sql: set(`actor = 'nobody'`) + `; delete from audit_seals where seal_id > 1`, reseal: true, known: hash(1)},
		{name: "all written anew, with the hash", sql: set(`actor = 'nobody'`) + `; delete from audit_seals where seal_id > 1`, reseal: true, known: hash(2),
			want: "the seal " + hash(2) + " is not there"},
		{name: "another partition", sql: `create table another partition of audit_log for values from ('1999-01-01') to ('1999-02-01')`, want: "partition another is not one of the record"},
		{name: "nothing any more", sql: `drop table another`},
	}
	for _, column := range []string{"actor", "action", "target", "reason", "network_id", "ip_address", "user_agent", "request_id"} {
		rows = append(rows, row{name: column, sql: set(column + ` = 'x'`), want: e(5) + " was altered"},
			row{name: column + ", left out", sql: set(column + ` = ''`), want: e(5) + " was altered"})
	}
	for _, column := range strings.Split(auditColumns, ", ") {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.name == column }) {
			t.Errorf("%s is never altered", column)
		}
	}
	for _, c := range rows {
		if c.sql != "" {
			r.inOneSession(c.sql)
		}
		if c.reseal {
			r.seal(noon.Add(2*time.Hour + 10*time.Minute))
		}
		args := []string{"audit", "verify"}
		if c.known != "" {
			args = append(args, c.known)
		}
		out, err := r.command(args...)
		switch {
		case c.want == "" && (err != nil || !strings.Contains(out, " fit; ")):
			t.Errorf("%s: it does not fit: %v %s", c.name, err, out)
		case c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
		// That it was looked at is on record itself.
		said, what := r.value(`select concat_ws(' ', actor, outcome, reason) from audit_log where action = 'audit.verify'`), "cli:tester ok"
		if c.want != "" {
			what = "cli:tester failed misfit"
		}
		if strings.TrimSpace(said) != what {
			t.Errorf("%s: on record is %q, not %q", c.name, said, what)
		}
		r.inOneSession(triggers + `delete from audit_log; insert into audit_log select * from log_copy;
			delete from audit_seals; insert into audit_seals select * from seals_copy`)
	}
}

// inOneSession runs statements in a session that ends with them.
func (r *record) inOneSession(sql string) {
	r.Helper()
	conn, err := pgx.Connect(r.Context(), r.url)
	r.must(err)
	defer conn.Close(r.Context())
	if _, err := conn.Exec(r.Context(), sql); err != nil {
		r.Fatalf("%s: %v", sql, err)
	}
}

// A manifest may be anything: it is refused, and never more.
func FuzzManifest(f *testing.F) {
	r := newRecord(f)
	noon := time.Now().UTC().Truncate(time.Second).Add(-time.Hour)
	r.write(2, noon)
	r.seal(noon.Add(time.Hour))
	made, err := one[auditSeal](f.Context(), r.pool, `select seal_id, last_number, hash, manifest from audit_seals`)
	r.must(err)
	lines := strings.SplitAfter(made.Manifest, "\n")
	old := "AUD-old 1999-01-01T00:00:00Z x\n"
	for _, s := range []string{made.Manifest, made.Manifest + made.Manifest, lines[0], lines[0] + "\n\n", lines[0] + lines[2] + lines[1], lines[0] + lines[1],
		lines[0] + " " + lines[1], "", "\n", lines[0] + old, lines[0] + old + lines[1] + lines[2], lines[0] + "AUD-x", lines[0] + "  ", lines[0] + "AUD-x 9999-12-31T23:59:59Z",
		lines[0] + lines[1] + lines[2] + "AUD-x 2026-01-01T00:00:00Z x\n", strings.ReplaceAll(made.Manifest, "\n", "\r\n"), lines[0] + strings.Repeat("x", 100000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, manifest string) {
		report := sealReport{first: noon.AddDate(0, -1, 0)}
		err := r.store.verifySeal(t.Context(), &report, auditSeal{1, made.LastNumber, digest(manifest), manifest})
		if err == nil && report.entries != 2 {
			t.Errorf("%q fits: %+v", manifest, report)
		}
		if m := (misfit{}); err != nil && (!errors.As(err, &m) || m.what == "" || m.how == "") {
			t.Errorf("%q: %v", manifest, err)
		}
	})
}

// BenchmarkSeal seals and verifies a record of 100,000 entries. MB is the most that the
// verification has in use: it is that of a seal, however long the record.
func BenchmarkSeal(b *testing.B) {
	const entries = 100_000
	noon := time.Now().UTC().Truncate(time.Second).Add(-time.Hour)
	for b.Loop() {
		r := newRecord(b)
		r.fill(entries, noon)
		start := time.Now()
		r.seal(noon.Add(time.Hour))
		b.ReportMetric(time.Since(start).Seconds(), "s-seal")

		done, most := make(chan struct{}), make(chan uint64)
		go func() {
			var peak, least uint64 = 0, math.MaxUint64
			for tick := time.NewTicker(10 * time.Millisecond); ; {
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				peak, least = max(peak, m.HeapAlloc), min(least, m.HeapAlloc)
				select {
				case <-tick.C:
				case <-done:
					most <- peak - least
					return
				}
			}
		}()
		start = time.Now()
		if out := r.fits(); !strings.HasPrefix(out, fmt.Sprintf("%d entries in %d seals fit", entries, entries/sealBatch)) {
			b.Error(out)
		}
		b.ReportMetric(time.Since(start).Seconds(), "s-verify")
		close(done)
		peak := float64(<-most) / 1e6
		b.ReportMetric(peak, "MB")
		if peak > 50 {
			b.Errorf("the verification has taken %.0f MB", peak)
		}
	}
}
