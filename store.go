package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
)

//go:embed schema.sql
var schemaSQL string

// schemaVersion is the version of schema.sql. It grows with each change of that file.
const schemaVersion = 4

// What a store method may return beside its result.
var (
	errNotFound    = errors.New("no such row")
	errConflict    = errors.New("a unique value exists already")
	errRace        = errors.New("another registration of that address came first")
	errChanged     = errors.New("the row has been changed meanwhile")
	errUnavailable = errors.New("a store is not available") // PostgreSQL or Keycloak: see the wrapped cause
)

// store is PostgreSQL. One method is one statement or one transaction. Times
// come from the caller, so that a test can move them.
type store struct {
	pool          *pgxpool.Pool
	log           *slog.Logger           // has the audit entries, too
	registrations *prometheus.CounterVec // those about registrations are counted, too
}

// openStore prepares the pool and does not connect: the service starts while
// PostgreSQL is down. A server that takes no writes is none to it: of several hosts
// it takes the one that does, and closes connections that turn out not to.
func openStore(ctx context.Context, url secret, log *slog.Logger) (*store, error) {
	cfg, err := pgxpool.ParseConfig(string(url))
	if err != nil {
		return nil, errors.New("DATABASE_URL can't be parsed") // the cause may quote the password
	}
	if !strings.Contains(string(url), "pool_max_conns") {
		cfg.MaxConns = 16
	}
	if cfg.ConnConfig.ConnectTimeout == 0 || cfg.ConnConfig.ConnectTimeout > 10*time.Second {
		cfg.ConnConfig.ConnectTimeout = 3 * time.Second
	}
	if cfg.ConnConfig.DefaultQueryExecMode != pgx.QueryExecModeCacheStatement { // a pooler is in between
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe // prepares nothing, and knows all types
	}
	cfg.ConnConfig.RuntimeParams["application_name"] = "auth-service" // these two PgBouncer knows, and refuses others
	cfg.ConnConfig.RuntimeParams["timezone"] = "UTC"
	cfg.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	keep := cfg.ConnConfig.OnPgError
	cfg.ConnConfig.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		return err.Code != "25006" && keep(conn, err) // read_only_sql_transaction
	}
	cfg.ConnConfig.Tracer = statementTimeout(5 * time.Second)
	cfg.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID,
			Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}}) // the driver's own choice is this machine's zone
		return nil
	}
	cfg.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		if n.SeverityUnlocalized == "WARNING" {
			log.Warn("postgresql: warning", "message", n.Message)
		}
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &store{pool: pool, log: log}, nil
}

// statementTimeout bounds each statement, the wait for a commit included. When it is over, the driver closes
// the connection and asks the server to cancel. It is no setting of the server's, because a pooler lets none through.
type statementTimeout time.Duration

type cancelKey struct{}

// TraceBatchStart bounds a batch like one statement.
func (d statementTimeout) TraceBatchStart(ctx context.Context, c *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return d.TraceQueryStart(ctx, c, pgx.TraceQueryStartData{})
}

func (d statementTimeout) TraceBatchEnd(ctx context.Context, c *pgx.Conn, _ pgx.TraceBatchEndData) {
	d.TraceQueryEnd(ctx, c, pgx.TraceQueryEndData{})
}

func (statementTimeout) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

// TraceQueryStart returns the context that the driver uses for the statement.
func (d statementTimeout) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(d))
	return context.WithValue(ctx, cancelKey{}, cancel)
}

func (statementTimeout) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	if cancel, ok := ctx.Value(cancelKey{}).(context.CancelFunc); ok {
		cancel()
	}
}

// migrate brings the schema to this version, once however many instances start
// at the same time. A schema that is current costs one query and takes no lock,
// unless it is to be applied again, for a role that has come since. A newer one is left alone.
func (st *store) migrate(ctx context.Context, again bool) error {
	have := 0
	var pg *pgconn.PgError
	err := st.pool.QueryRow(ctx, `select version from schema_version`).Scan(&have)
	if errors.Is(err, pgx.ErrNoRows) || errors.As(err, &pg) && pg.Code == "42P01" { // undefined_table
		err = nil
	}
	if err == nil && (have < schemaVersion || again && have == schemaVersion) {
		err = pgx.BeginFunc(ctx, st.pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `select set_config('lock_timeout', '3s', true), set_config('statement_timeout', '0', true),
				pg_advisory_xact_lock(7203)`); err != nil { // the role may have a statement_timeout
				return err
			}
			if _, err := tx.Conn().PgConn().Exec(ctx, schemaSQL).ReadAll(); err != nil { // past statementTimeout
				return err
			}
			_, err := tx.Exec(ctx, `
				insert into schema_version (version, applied_at) values ($1, now())
				on conflict (only_row) do update set version = excluded.version, applied_at = excluded.applied_at`, schemaVersion)
			return err
		})
	}
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		return fmt.Errorf("the schema is not this version's, or not for this role; "+
			"run \"auth-service migrate\" as the owner of the tables, who may create in the schema: %s", pg.Message)
	}
	return storeError(err)
}

// monthsAhead is how many months to come have their partition already: an instance that runs
// no jobs makes them only when it starts.
const monthsAhead = 3

// makeMonths makes the partitions of the audit log, up to monthsAhead.
func (st *store) makeMonths(ctx context.Context, now time.Time) error {
	_, err := st.pool.Exec(ctx, `
		select audit_log_month($1::timestamptz + n * interval '1 month') from generate_series(0, $2::int) n`,
		now, monthsAhead)
	return storeError(err)
}

// ping asks PostgreSQL whether it takes writes.
func (st *store) ping(ctx context.Context) error {
	_, err := st.pool.Exec(ctx, `delete from tasks where false`) // writes nothing, and a read-only server refuses it
	return storeError(err)
}

// querier is what a pool and a transaction have in common.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// one returns the single row of a query as a T, its columns in the order of T's fields,
// or errNotFound.
func one[T any](ctx context.Context, q querier, sql string, args ...any) (T, error) {
	rows, _ := q.Query(ctx, sql, args...)
	row, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[T])
	return row, storeError(err)
}

// txn is a transaction of store.tx. A change reads as the list of what it writes: statements wait until the outcome of
// one is asked for, or until the commit, and go out together (PostgreSQL's pipeline). So a transaction costs as many
// round trips as it has questions (one, changed), and one. Its first error rolls it back, and nothing is written after
// that.
type txn struct {
	conn    *pgxpool.Conn
	ctx     context.Context
	waiting *pgx.Batch
	err     error
	entries []*auditEntry // written in it
}

// exec writes something.
func (tx *txn) exec(sql string, args ...any) { tx.waiting.Queue(sql, args...) }

// Exec is exec, for what is done in the pool, too. How many rows there were is not known yet.
func (tx *txn) Exec(_ context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	tx.exec(sql, args...)
	return pgconn.CommandTag{}, nil
}

// changed is exec that asks how many rows there were.
func (tx *txn) changed(sql string, args ...any) int64 { return tx.ask(sql, args...).RowsAffected() }

func (tx *txn) ask(sql string, args ...any) pgconn.CommandTag {
	if tx.err != nil {
		return pgconn.CommandTag{}
	}
	rows, _ := tx.Query(tx.ctx, sql, args...)
	rows.Close()
	tx.check(rows.Err())
	return rows.CommandTag()
}

// later is one that does not ask yet: the row is there after the next question, or after the commit.
func later[T any](tx *txn, sql string, args ...any) func() (T, error) {
	var row T
	var missing error
	tx.waiting.Queue(sql, args...).Query(func(rows pgx.Rows) (err error) {
		row, err = pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[T])
		if errors.Is(err, pgx.ErrNoRows) {
			missing, err = errNotFound, nil
		}
		return err
	})
	return func() (T, error) { return row, missing }
}

// check keeps the first error.
func (tx *txn) check(err error) { tx.err = cmp.Or(tx.err, err) }

// Query sends what waits, and the statement with it.
func (tx *txn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	sent := tx.waiting
	tx.waiting = new(pgx.Batch)
	before := sent.QueuedQueries
	sent.Queue(sql, args...)
	results := tx.conn.SendBatch(ctx, sent)
	for _, q := range before {
		if q.Fn == nil {
			q.Fn = func(r pgx.BatchResults) error { _, err := r.Exec(); return err }
		}
		tx.check(q.Fn(results))
	}
	rows, err := results.Query()
	return lastRows{rows, results}, err
}

// lastRows are those of the last statement that was sent: the connection is free when they are closed.
type lastRows struct {
	pgx.Rows
	sent pgx.BatchResults
}

func (r lastRows) Close() {
	r.Rows.Close()
	_ = r.sent.Close() // an error is that of a statement, which was read
}

// tx runs f in a transaction. The audit entries that f writes are logged after the commit, so that
// there is evidence outside the database, and nothing that was rolled back. If the process dies in
// between, an entry has no line. The request id comes from the context.
func (st *store) tx(ctx context.Context, f func(tx *txn)) error {
	tx := txn{ctx: ctx, waiting: new(pgx.Batch)}
	tx.waiting.Queue(`begin`)
	err := st.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		tx.conn = conn
		if f(&tx); tx.err == nil {
			if tx.ask(`commit`).String() == "ROLLBACK" { // an error that nobody has checked
				tx.check(pgx.ErrTxCommitRollback)
			}
		}
		if tx.err != nil && conn.Conn().PgConn().TxStatus() != 'I' {
			_, _ = conn.Exec(ctx, `rollback`) // the pool closes a connection that is left in a transaction
		}
		return tx.err
	})
	if err != nil {
		return storeError(err)
	}
	for _, e := range tx.entries {
		st.log.InfoContext(ctx, "audit: entry written", "audit", true, "audit_id", string(e.ID), "actor", e.Actor,
			"action", e.Action, "target", e.Target, "outcome", e.Outcome, "reason", e.Reason,
			"network_id", e.NetworkID, "ip_address", e.Address, "details", e.Details)
		if step, ok := strings.CutPrefix(e.Action, "registration."); ok && e.Outcome == "ok" {
			st.registrations.WithLabelValues(step).Inc()
		}
	}
	return nil
}

// locked is tx in which the caller's lock of a task can't become another's. It returns errLocked: PostgreSQL itself
// fails then, by a division, and does nothing of what is sent along.
func (st *store) locked(ctx context.Context, t task, f func(tx *txn)) error {
	return st.tx(ctx, func(tx *txn) {
		tx.exec(`select 1 / count(*) from (select from tasks where task_id = $1 and locked_by = $2 for update) mine`,
			t.ID, t.lockedBy)
		f(tx)
	})
}

// list reads a page of a list. Its statement has all filters, also those that are not used.
// So PostgreSQL must plan each call for its values: it does so for an unnamed statement.
func list[T any](ctx context.Context, st *store, sql string, args ...any) ([]T, error) {
	rows, _ := st.pool.Query(ctx, sql, append([]any{pgx.QueryExecModeCacheDescribe}, args...)...)
	page, err := pgx.CollectRows(rows, pgx.RowToStructByPos[T])
	return page, storeError(err)
}

// outages are the SQLSTATEs, or classes of them, of a server that can't do now what it does at other times.
var outages = []string{
	"08", "40", "57", // connection; deadlock; shutdown, timeout
	"53", "58", // disk full, out of memory, too many clients; the disk fails
	"25006", "0A000", // read-only; a standby has no unlogged tables, and a statement was prepared before a migration
	"26000", "42P05", // a prepared statement that is another connection's: see docs/operating.md, PgBouncer
	"42P01", "42703", "42883", // no such table, column, function: migrate has not come through yet
	"55P03", // somebody holds the lock for longer than a lock_timeout
}

// storeError translates the driver's errors into ours. Unknown to the driver
// means that there was no answer: the server is away, or the time was up.
func storeError(err error) error {
	var pg *pgconn.PgError
	switch {
	case err == nil, errors.Is(err, errUnavailable), errors.As(err, new(problem)):
		return err
	case errors.Is(err, pgx.ErrNoRows):
		return errNotFound
	case errors.As(err, &pg) && pg.Code == "22012": // division_by_zero: see locked
		return errLocked
	case errors.As(err, &pg) && pg.Code == "23505": // unique_violation; pg.Detail would hold the value
		if pg.ConstraintName == "one_pending_registration_per_email" {
			return errRace
		}
		return fmt.Errorf("%w: %s", errConflict, pg.ConstraintName)
	case errors.As(err, &pg) && !errors.As(err, new(*pgconn.ConnectError)):
		err = fmt.Errorf("postgresql: %s (%s)", pg.Message, strings.TrimSpace(pg.Code+" "+pg.ConstraintName))
		passes := func(code string) bool { return strings.HasPrefix(pg.Code, code) }
		if pg.Severity == "FATAL" || slices.ContainsFunc(outages, passes) {
			err = fmt.Errorf("%w: %w", errUnavailable, err)
		}
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), // while waiting for a connection
		pgconn.SafeToRetry(err), errors.As(err, new(*pgconn.ConnectError)), errors.As(err, new(net.Error)), // reset, timeout
		strings.Contains(err.Error(), "conn closed"), strings.Contains(err.Error(), "unexpected EOF"):
		return fmt.Errorf("%w: postgresql: %w", errUnavailable, err)
	}
	return err
}

// purge deletes what is over, a part of it at a time: limits, answers to refresh tokens, revocations
// of tokens that have expired, and, 30 days after their end, sessions, and registrations that are
// not in Keycloak any more.
func (st *store) purge(ctx context.Context, now time.Time) error {
	var failed error
	for sql, before := range map[string]time.Time{
		`delete from rate_limits where key = any(array(
			select key from rate_limits where resets_at < $1 order by resets_at limit 10000 for update skip locked))`: now,
		`update refresh_tokens set answer = null where token_hash = any(array(
			select token_hash from refresh_tokens where answer is not null and answer_until < $1
			order by answer_until limit 10000 for update skip locked))`: now.Add(-time.Minute), // clocks differ
		`delete from revocations where revocation_id = any(array(
			select revocation_id from revocations where at < $1
			order by at limit 10000 for update skip locked))`: now.Add(-tokenLife),
		`delete from user_registrations where registration_id = any(array(
			select registration_id from user_registrations where ended_at < $1 and keycloak_id is null
			order by ended_at limit 1000 for update skip locked))`: now.Add(-keepEnded),
		`with old as (
			select session_id from sessions where expires_at < $1 and coalesce(ended_at, expires_at) < $1
			order by expires_at limit 1000 for update skip locked),
		tokens as (
			delete from refresh_tokens where session_id in (select session_id from old))
		delete from sessions where session_id in (select session_id from old)`: now.Add(-keepEnded),
	} {
		_, err := st.pool.Exec(ctx, sql, before)
		failed = errors.Join(failed, storeError(err))
	}
	return failed
}
