package main

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// localUsers returns the users of PostgreSQL that are those of a page of Keycloak, by id in
// Keycloak, and which of the page belong to a registration that is not over.
func (st *store) localUsers(ctx context.Context, page []keycloakUser) (local map[string]user, registering map[string]bool, err error) {
	var ids, registrations []string
	for _, ku := range page {
		ids = append(ids, ku.id())
		if !ku.verified() && ku.attribute(attrRegistrationID) != "" {
			registrations = append(registrations, ku.attribute(attrRegistrationID))
		}
	}
	rows, _ := st.pool.Query(ctx, `select `+userColumns+` from users where keycloak_id = any($1)`, ids)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[user])
	if err != nil {
		return nil, nil, storeError(err)
	}
	local, registering = map[string]user{}, map[string]bool{}
	for _, u := range list {
		local[u.KeycloakID] = u
	}
	if len(registrations) == 0 {
		return local, registering, nil
	}
	rows, _ = st.pool.Query(ctx, `select registration_id from user_registrations where registration_id = any($1)
		and (status = 'pending' or status <> 'verified' and keycloak_id is not null)`, registrations)
	open, err := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, id := range open {
		registering[id] = true
	}
	return local, registering, storeError(err)
}

// taken says whether another live user has the address or username that u should have.
func (st *store) taken(ctx context.Context, u user) (taken bool, err error) {
	err = st.pool.QueryRow(ctx, `select exists (select from users where deleted_at is null and keycloak_id <> $1
		and (lower(email) = lower($2) or lower(username) = lower($3)))`, u.KeycloakID, u.Email, u.Username).Scan(&taken)
	return taken, storeError(err)
}

// liveKeycloakIDs calls f with the id in Keycloak of every live user.
func (st *store) liveKeycloakIDs(ctx context.Context, f func(id string)) error {
	after := ""
	for {
		rows, _ := st.pool.Query(ctx, `select keycloak_id from users where keycloak_id > $1 and is_active order by keycloak_id limit 10000`, after)
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil || len(ids) == 0 {
			return storeError(err)
		}
		for _, id := range ids {
			f(id)
		}
		after = ids[len(ids)-1]
	}
}

func (st *store) countUsers(ctx context.Context) (n int, err error) {
	err = st.pool.QueryRow(ctx, `select count(*) from users where is_active`).Scan(&n)
	return n, storeError(err)
}

// overwrite revokes the tokens that say something else than what is true of a user, and audits
// what Keycloak had, if asked to (O1). It returns the user as it is now.
func (st *store) overwrite(ctx context.Context, c caller, u user, has map[string][]string, audited bool, now time.Time) (user, error) {
	err := st.tx(ctx, func(tx *txn) {
		var err error
		u, err = one[user](ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, u.ID)
		tx.check(err)
		tx.check(revoke(ctx, tx, u.revocation()))
		if audited {
			tx.audit(c, now, entry{Action: "user.overwrite", Target: string(u.ID), Network: u.NetworkID, Details: map[string]any{
				"role": u.Role, "network_id": u.NetworkID, "station_id": u.StationID, "is_active": u.IsActive, "keycloak": has}})
		}
	})
	return u, err
}

// importUser inserts a user that only Keycloak had, with these claims, and its registration,
// if it came by one that is not known here. Tokens that say something else are revoked.
// errConflict: a live user has the address or username, or somebody registers with it.
func (st *store) importUser(ctx context.Context, c caller, u user, reg registration, has map[string][]string) error {
	now := u.CreatedAt
	err := st.tx(ctx, func(tx *txn) {
		tx.exec(`
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, is_verified, role, source,
				is_active, deleted_at, created_at, updated_at)
			values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12)`,
			u.ID, u.KeycloakID, u.Email, u.Username, nullString(u.FirstName), nullString(u.LastName), u.IsVerified, u.Role, u.Source,
			u.IsActive, u.DeletedAt, now)
		if reg.ID != "" {
			tx.exec(`
				insert into user_registrations (registration_id, email, username, first_name, last_name, verification_token, verification_code,
					status, keycloak_id, user_id, expires_at, verified_at, created_at, locale, mail_state)
				values ($1, $2, $3, $4, $5, $6, $7, $8::text, $9, $10, $11, case when $8::text = 'verified' then $12::timestamptz end, $13, $14, 'sent')
				on conflict (registration_id) do nothing`,
				reg.ID, reg.Email, reg.Username, nullString(reg.FirstName), nullString(reg.LastName), reg.TokenHash, nullString(reg.CodeHash),
				reg.State, reg.KeycloakID, u.ID, reg.ExpiresAt, now, reg.CreatedAt, reg.Locale)
		}
		if reg.State == pending {
			tx.check(enqueue(ctx, tx, reg.ExpiresAt, string(reg.ID)))
		}
		tx.check(revoke(ctx, tx, u.revocation()))
		tx.audit(c, now, entry{Action: "user.import", Target: string(u.ID),
			Details: map[string]any{"source": u.Source, "role": u.Role, "is_active": u.IsActive, "keycloak": has}})
	})
	if errors.Is(err, errRace) { // somebody registers with the address
		err = errConflict
	}
	return err
}

// syncCursor is how far Keycloak's events have been read.
type syncCursor struct {
	At  [len(eventSources)]int64 // of the latest event of each source, milliseconds since 1970
	IDs []string                 // of the latest events: those of a short time are read again
}

// syncCursor returns the cursor. Where there is none it begins a little earlier than now, as
// clocks differ.
func (st *store) syncCursor(ctx context.Context, now time.Time) (c syncCursor, err error) {
	err = st.pool.QueryRow(ctx, `
		insert into sync_cursor as c (admin_at, user_at, event_ids) values ($1, $1, '{}')
		on conflict (only_row) do update set admin_at = c.admin_at
		returning admin_at, user_at, event_ids`, now.Add(-time.Minute).UnixMilli()).Scan(&c.At[0], &c.At[1], &c.IDs)
	return c, storeError(err)
}

// takeEvents enqueues the users that events have changed, audits the events that are worth it,
// and moves the cursor. It returns errLocked.
func (st *store) takeEvents(ctx context.Context, t task, next syncCursor, events []keycloakEvent, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		var changed, users, sids []string
		for _, e := range events {
			if e.changesUser() {
				changed = append(changed, kcTask(e.UserID))
			}
			users, sids = append(users, e.UserID), append(sids, e.SessionID)
		}
		if len(changed) > 0 {
			tx.check(enqueue(ctx, tx, now, changed...))
		}
		known, err := knownIDs(ctx, tx, `select keycloak_id, user_id from users where keycloak_id = any($1)`, users)
		tx.check(err)
		ours, err := knownIDs(ctx, tx, `select keycloak_session_id, min(session_id) from sessions where keycloak_session_id = any($1) group by 1`, sids)
		tx.check(err)
		for _, e := range events {
			c, entry, worth := e.audited(known[e.UserID], ours[e.SessionID] != "")
			if !worth {
				continue
			}
			if entry.Outcome == "refused" { // a flood of them at Keycloak is not one here
				ofOne, _ := refusalLimits(c, entry)
				err := hit(ctx, tx, ofOne, now)
				if errors.Is(err, problemTooManyRequests) {
					continue
				}
				tx.check(err)
			}
			tx.audit(c, now, entry)
		}
		tx.exec(`update sync_cursor set admin_at = $1, user_at = $2, event_ids = $3`, next.At[0], next.At[1], next.IDs)
	})
}

// knownIDs returns pairs of ids.
func knownIDs(ctx context.Context, q querier, sql string, ids []string) (map[string]string, error) {
	known := map[string]string{}
	rows, _ := q.Query(ctx, sql, ids)
	var from, to string
	_, err := pgx.ForEachRow(rows, []any{&from, &to}, func() error {
		known[from] = to
		return nil
	})
	return known, storeError(err)
}

// beginSync begins a full pass. errConflict, with that one: a pass has not ended yet.
func (st *store) beginSync(ctx context.Context, c caller, dryRun bool, now time.Time) (syncRun, error) {
	run := syncRun{ID: newSyncID(), DryRun: dryRun, Status: "running", StartedBy: c.Actor, StartedAt: now, Differences: map[difference]*syncClass{}}
	err := st.tx(ctx, func(tx *txn) {
		tx.exec(`insert into sync_runs (sync_id, dry_run, status, started_by, started_at) values ($1, $2, 'running', $3, $4)`,
			run.ID, dryRun, run.StartedBy, now)
		tx.check(enqueue(ctx, tx, now, "job:sync"))
		tx.audit(c, now, entry{Action: "sync.begin", Target: string(run.ID), Details: map[string]any{"dry_run": dryRun}})
	})
	if errors.Is(err, errConflict) {
		if open, lookup := st.lastSync(ctx, `status = 'running'`); lookup == nil {
			return open, err
		}
	}
	return run, err
}

// saveSync records a run's progress.
func (st *store) saveSync(ctx context.Context, q querier, run syncRun) error {
	_, err := q.Exec(ctx, `
		update sync_runs set checked = $2, total = $3, differences = $4, detail = $5, status = $6, ended_at = $7
		where sync_id = $1 and status = 'running'`, run.ID, run.Checked, run.Total, run.Differences, run.Detail, run.Status, run.EndedAt)
	return storeError(err)
}

// endSync records a run's end.
func (st *store) endSync(ctx context.Context, run syncRun, now time.Time) error {
	outcome := "ok"
	if run.Status != "done" {
		outcome = "failed"
	}
	return st.tx(ctx, func(tx *txn) {
		tx.check(st.saveSync(ctx, tx, run))
		tx.audit(caller{Actor: run.StartedBy}, now, entry{Action: "sync.end", Target: string(run.ID), Outcome: outcome, Reason: run.Status,
			Details: map[string]any{"found": run.found(), "repaired": run.found() - run.remaining()}})
	})
}

// syncRun returns a run, or errNotFound.
func (st *store) syncRun(ctx context.Context, id syncID) (syncRun, error) {
	return st.lastSync(ctx, `sync_id = $1`, id)
}

// lastSync returns the latest run that fulfils a condition, or errNotFound.
func (st *store) lastSync(ctx context.Context, where string, args ...any) (run syncRun, err error) {
	var report []byte
	err = st.pool.QueryRow(ctx, `select sync_id, dry_run, status, started_by, started_at, ended_at, checked, total, differences, detail
		from sync_runs where `+where+` order by started_at desc limit 1`, args...).
		Scan(&run.ID, &run.DryRun, &run.Status, &run.StartedBy, &run.StartedAt, &run.EndedAt, &run.Checked, &run.Total, &report, &run.Detail)
	if err == nil {
		err = json.Unmarshal(report, &run.Differences)
	}
	return run, storeError(err)
}
