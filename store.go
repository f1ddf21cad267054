package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed schema.sql
var schemaSQL string

// schemaVersion is the version of schema.sql. It grows with each change of that file.
const schemaVersion = 1

// What a store method may return beside its result.
var (
	errNotFound    = errors.New("no such row")
	errConflict    = errors.New("a unique value exists already")
	errRace        = errors.New("another registration of that address came first")
	errUnavailable = errors.New("a store is not available") // PostgreSQL or Keycloak: see the wrapped cause
)

// store is PostgreSQL. One method is one statement or one transaction. Times
// come from the caller, so that a test can move them.
type store struct{ pool *pgxpool.Pool }

// openStore prepares the pool and does not connect: the service starts while
// PostgreSQL is down.
func openStore(ctx context.Context, url secret) (*store, error) {
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
	cfg.ConnConfig.RuntimeParams["application_name"] = "auth-service"
	cfg.ConnConfig.RuntimeParams["statement_timeout"] = "5000"
	cfg.ConnConfig.RuntimeParams["timezone"] = "UTC"
	cfg.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID,
			Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}}) // the driver's own choice is this machine's zone
		return nil
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &store{pool}, nil
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
				pg_advisory_xact_lock(7203)`); err != nil { // rows may have to be copied
				return err
			}
			if _, err := tx.Exec(ctx, schemaSQL); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `
				insert into schema_version (version, applied_at) values ($1, now())
				on conflict (only_row) do update set version = excluded.version, applied_at = excluded.applied_at`, schemaVersion)
			return err
		})
	}
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		return fmt.Errorf("the schema is not this version's, or not for this role; run \"auth-service migrate\" as the owner of the tables: %s", pg.Message)
	}
	return storeError(err)
}

func (st *store) ping(ctx context.Context) error { return storeError(st.pool.Ping(ctx)) }

// querier is what a pool and a transaction have in common.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// one returns the single row of a query as a T, its columns in the order of T's fields,
// or errNotFound.
func one[T any](ctx context.Context, q querier, sql string, args ...any) (T, error) {
	rows, _ := q.Query(ctx, sql, args...)
	row, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[T])
	return row, storeError(err)
}

// tx runs f in a transaction; an error of f rolls it back.
func (st *store) tx(ctx context.Context, f func(tx pgx.Tx) error) error {
	return storeError(pgx.BeginFunc(ctx, st.pool, f))
}

// storeError translates the driver's errors into ours. Unknown to the driver
// means that there was no answer: the server is away, or the time was up.
func storeError(err error) error {
	var pg *pgconn.PgError
	switch {
	case err == nil, errors.Is(err, errNotFound), errors.Is(err, errConflict), errors.Is(err, errRace),
		errors.Is(err, errUnavailable), errors.As(err, new(problem)):
		return err
	case errors.Is(err, pgx.ErrNoRows):
		return errNotFound
	case errors.As(err, &pg) && pg.Code == "23505": // unique_violation; pg.Detail would hold the value
		if pg.ConstraintName == "one_pending_registration_per_email" {
			return errRace
		}
		return fmt.Errorf("%w: %s", errConflict, pg.ConstraintName)
	case errors.As(err, &pg):
		switch pg.Code[:2] {
		case "08", "40", "53", "57": // connection, deadlock, resources (too many clients), operator (shutdown, starting up, timeout)
			return fmt.Errorf("%w: postgresql: %s", errUnavailable, pg.Message)
		}
		if pg.Code == "42P01" { // undefined_table: migrate has not come through yet
			return fmt.Errorf("%w: postgresql: the schema is not there yet", errUnavailable)
		}
		return fmt.Errorf("postgresql: %s (%s %s)", pg.Message, pg.Code, pg.ConstraintName)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), // while waiting for a connection
		pgconn.Timeout(err), pgconn.SafeToRetry(err), errors.As(err, new(*pgconn.ConnectError)),
		strings.Contains(err.Error(), "conn closed"), strings.Contains(err.Error(), "unexpected EOF"):
		return fmt.Errorf("%w: postgresql: %w", errUnavailable, err)
	}
	return err
}

// rateLimit is at most N hits of a key in a window that begins with the first one.
type rateLimit struct {
	Key     string
	N       int
	Window  time.Duration
	Problem problem // what the client is told
}

// hit counts one hit, exactly, over all instances. Over the limit it counts
// nothing and returns the limit's problem with the time until the window ends.
func hit(ctx context.Context, q querier, l rateLimit, now time.Time) error {
	var hits int
	var resets time.Time
	if err := q.QueryRow(ctx, `
		insert into rate_limits as r (key, hits, resets_at) values ($1, 1, $2)
		on conflict (key) do update set
			hits = case when r.resets_at <= $3 then 1 else least(r.hits + 1, $4 + 1) end,
			resets_at = case when r.resets_at <= $3 then excluded.resets_at else r.resets_at end
		returning hits, resets_at`, l.Key, now.Add(l.Window), now, l.N).Scan(&hits, &resets); err != nil {
		return storeError(err)
	}
	if hits > l.N {
		return l.Problem.retryAfter(resets.Sub(now))
	}
	return nil
}

func (st *store) hit(ctx context.Context, l rateLimit, now time.Time) error {
	return hit(ctx, st.pool, l, now)
}

// peek says what hit would, and counts nothing.
func (st *store) peek(ctx context.Context, l rateLimit, now time.Time) error {
	var resets time.Time
	err := storeError(st.pool.QueryRow(ctx, `select resets_at from rate_limits where key = $1 and hits >= $2 and resets_at > $3`,
		l.Key, l.N, now).Scan(&resets))
	if errors.Is(err, errNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	return l.Problem.retryAfter(resets.Sub(now))
}

// refund takes hits back.
func refund(ctx context.Context, q querier, limits ...rateLimit) error {
	keys := []string{}
	for _, l := range limits {
		keys = append(keys, l.Key)
	}
	_, err := q.Exec(ctx, `update rate_limits set hits = hits - 1 where key = any($1) and hits > 0`, keys)
	return storeError(err)
}

// purgeLimits removes counters whose window is over.
func (st *store) purgeLimits(ctx context.Context, now time.Time) error {
	_, err := st.pool.Exec(ctx, `delete from rate_limits where key = any(array(
		select key from rate_limits where resets_at < $1 order by resets_at limit 10000 for update skip locked))`, now)
	return storeError(err)
}

// filter is the condition of a list. An index has the columns that a row must equal before
// the time, so that no row is passed over; where a column with few values is not asked
// for, each of its values has a scan of its own, and the list merges them.
type filter struct {
	conditions []string
	args       []any
	scans      []string
}

func newFilter() *filter { return &filter{scans: []string{""}} }

// and adds a condition; each ? in it is one of the values.
func (f *filter) and(condition string, values ...any) {
	for _, value := range values {
		f.args = append(f.args, value)
		condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(f.args)), 1)
	}
	f.conditions = append(f.conditions, condition)
}

// is required a value, unless it is empty.
func (f *filter) is(column, value string) {
	if value != "" {
		f.and(column+" = ?", value)
	}
}

// inOrder reads a list, in one round trip. PostgreSQL is to run along the list's index: where
// it expects few rows it would rather collect all there are and sort them.
func inOrder[T any](ctx context.Context, st *store, sql string, args []any, settings ...string) (list []T, err error) {
	var b pgx.Batch
	b.Queue(`begin`)
	for _, setting := range append(settings, `enable_sort = off`) {
		b.Queue(`set local ` + setting)
	}
	b.Queue(sql, args...).Query(func(rows pgx.Rows) (err error) {
		list, err = pgx.CollectRows(rows, pgx.RowToStructByPos[T])
		return err
	})
	b.Queue(`commit`)
	return list, storeError(st.pool.SendBatch(ctx, &b).Close())
}

// among is like is for a column with few values.
func (f *filter) among(column, value string, values ...string) {
	if value != "" {
		f.is(column, value)
		return
	}
	var scans []string
	for _, scan := range f.scans {
		for _, value := range values {
			scans = append(scans, scan+" and "+column+" = '"+value+"'")
		}
	}
	f.scans = scans
}

// list selects the first rows of a table that fulfil the condition.
func (f *filter) list(columns, table, order string, limit int) string {
	var scans []string
	for _, scan := range f.scans {
		scans = append(scans, fmt.Sprintf(`(select * from %s where %s order by %s limit %d)`, table, strings.Join(f.conditions, " and ")+scan, order, limit))
	}
	return fmt.Sprintf(`select %s from (%s) %s order by %s limit %d`, columns, strings.Join(scans, " union all "), table, order, limit)
}

func nullString(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}
