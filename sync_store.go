package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// usersByKeycloakID returns the users with these ids in Keycloak.
func (st *store) usersByKeycloakID(ctx context.Context, ids []string) (map[string]*user, error) {
	rows, _ := st.pool.Query(ctx, `select `+userColumns+` from users where keycloak_id = any($1)`, ids)
	list, err := pgx.CollectRows(rows, pgx.RowToAddrOfStructByPos[user])
	users := map[string]*user{}
	for _, u := range list {
		users[u.KeycloakID] = u
	}
	return users, storeError(err)
}

// activeKeycloakIDs returns the id in Keycloak of every active user.
func (st *store) activeKeycloakIDs(ctx context.Context) (map[string]bool, error) {
	rows, _ := st.pool.Query(ctx, `select keycloak_id from users where is_active`)
	ids, id := map[string]bool{}, ""
	_, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		ids[id] = true
		return nil
	})
	return ids, storeError(err)
}

// conflicts says whether PostgreSQL can't have a user as Keycloak has it: without an address, with
// something too long, as Keycloak's imports know no limits, or, if it is active, with the address
// or username of another who is.
func (st *store) conflicts(ctx context.Context, u user) (conflict bool, err error) {
	err = st.pool.QueryRow(ctx, `
		select $2 = '' or length($2) > 255 or greatest(length($3), length($4), length($5)) > 100
			or $6 and exists (select from users where deleted_at is null and keycloak_id <> $1
				and (lower(email) = lower($2) or lower(username) = lower($3)))`,
		u.KeycloakID, u.Email, u.Username, u.FirstName, u.LastName, u.IsActive).Scan(&conflict)
	return conflict, storeError(err)
}

// overwrite revokes the tokens that say something else than what is true of a user, and audits
// what Keycloak had, unless the task has failed before (O1).
func (st *store) overwrite(ctx context.Context, c caller, t task, id userID, has map[string][]string,
	now time.Time) error {
	return st.tx(ctx, func(tx *txn) {
		u, err := one[user](ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, id)
		tx.check(err)
		tx.revoke(u.revocation())
		if t.Attempts == 0 {
			tx.audit(c, now, entry{Action: "user.overwrite", Target: string(u.ID), Network: u.NetworkID,
				Details: map[string]any{"role": u.Role, "network_id": u.NetworkID, "station_id": u.StationID,
					"is_active": u.IsActive, "keycloak": has}})
		}
	})
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
			values ($1, $2, $3, $4, nullif($5, ''), nullif($6, ''), $7, $8, $9, $10, $11, $12, $12)`,
			u.ID, u.KeycloakID, u.Email, u.Username, u.FirstName, u.LastName, u.IsVerified,
			u.Role, u.Source, u.IsActive, u.DeletedAt, now)
		if reg.ID != "" {
			tx.exec(`
				insert into user_registrations (registration_id, email, username, first_name, last_name, user_id,
					keycloak_id, verified_at, verification_token, verification_code, status, expires_at, created_at,
					locale, mail_state)
				select $1, email, username, first_name, last_name, user_id,
					keycloak_id, case when is_verified then created_at end, $3, $4, $5, $6::timestamptz,
					$7::timestamptz, $8, 'sent' from users where user_id = $2
				on conflict (registration_id) do nothing`,
				reg.ID, u.ID, reg.TokenHash, reg.CodeHash, reg.State, reg.ExpiresAt, reg.CreatedAt, reg.Locale)
		}
		if reg.State == pending {
			tx.check(enqueue(ctx, tx, reg.ExpiresAt, string(reg.ID)))
		}
		tx.revoke(u.revocation())
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

// takeEvents enqueues the tasks of users that were changed, audits the events that are worth it,
// and moves the cursor. A change of a credential ends all sessions that were begun before, but for that in which the
// person has made it, and is told to the user. Whoever has deleted its account is erased (X1). It returns errLocked.
func (st *store) takeEvents(ctx context.Context, t task, next syncCursor, events []keycloakEvent, changed []string,
	now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`update sync_cursor set admin_at = $1, user_at = $2, event_ids = $3`, next.At[0], next.At[1], next.IDs)
		rows, _ := tx.Query(ctx, `
			select coalesce(u.user_id, ''), exists (select from sessions s where s.keycloak_session_id = e.session_id)
				or exists (select from audit_log a, to_timestamp(e.ms / 1000.0) t
					where a.at between t - $2::interval and t + $2::interval
						and a.action = 'login' and a.outcome = 'refused' and (a.target = u.user_id or a.ip_address = e.address))
			from rows from (jsonb_to_recordset($1) as ("userId" text, "sessionId" text, "ipAddress" text, "time" bigint))
				with ordinality e (keycloak_id, session_id, address, ms, n)
			left join users u on u.keycloak_id = e.keycloak_id order by n`, events, tokenLeeway)
		known, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct {
			User string
			Ours bool
		}])
		tx.check(err)
		for i, of := range known {
			c, entry, worth := events[i].audited(of.User, of.Ours)
			if worth && entry.Outcome == "refused" { // a flood of them at Keycloak is not one here
				ofOne, _ := refusalLimits(c, entry)
				err := hit(ctx, tx, now, ofOne)
				if worth = !errors.Is(err, problemTooManyRequests); worth {
					tx.check(err)
				}
			}
			if worth {
				tx.audit(c, now, entry)
			}
			switch id, e := userID(of.User), events[i]; {
			case id == "":
			case e.Type == deleteAccount:
				changed = append(changed, tx.eraseUser(c, id, now))
			case worth && entry.Action == credentialChange:
				at := time.UnixMilli(e.At).Truncate(time.Second) // as tokens and sessions have it
				changed = append(changed, tx.notBefore(id, at, at, e.Details.CodeID), noticeTask(e.UserID))
			}
		}
		tx.check(enqueue(ctx, tx, now, changed...)) // last, as all lock the user before its task
	})
}

const syncColumns = `sync_id, dry_run, status, started_by, started_at, ended_at, checked, total, differences, detail`

// syncRun returns a full pass, or errNotFound.
func (st *store) syncRun(ctx context.Context, id syncID) (syncRun, error) {
	return one[syncRun](ctx, st.pool, `select `+syncColumns+` from sync_runs where sync_id = $1`, id)
}

// lastSync returns the full pass that is running, or else the last one that was no dry run, or
// errNotFound.
func (st *store) lastSync(ctx context.Context) (syncRun, error) {
	return one[syncRun](ctx, st.pool, `select `+syncColumns+` from sync_runs where sync_id = coalesce(
		(select sync_id from sync_runs where status = 'running'),
		(select sync_id from sync_runs where not dry_run order by started_at desc limit 1))`)
}

// beginSync begins a full pass. errConflict, with that one: a pass has not ended yet.
func (st *store) beginSync(ctx context.Context, c caller, dryRun bool, now time.Time) (syncRun, error) {
	run := syncRun{ID: newSyncID(), DryRun: dryRun, Status: "running", StartedBy: c.Actor, StartedAt: now,
		Differences: map[difference]*syncClass{}}
	err := st.tx(ctx, func(tx *txn) {
		tx.exec(`insert into sync_runs (sync_id, dry_run, status, started_by, started_at) values ($1, $2, $3, $4, $5)`,
			run.ID, dryRun, run.Status, run.StartedBy, now)
		tx.check(enqueue(ctx, tx, now, "job:sync"))
		tx.audit(c, now, entry{Action: "sync.begin", Target: string(run.ID),
			Details: map[string]any{"dry_run": dryRun}})
	})
	if errors.Is(err, errConflict) {
		if open, lookup := st.lastSync(ctx); lookup == nil {
			return open, err
		}
	}
	return run, err
}

// saveSync records a full pass's progress, or its end, which is audited.
func (st *store) saveSync(ctx context.Context, run syncRun) error {
	return st.tx(ctx, func(tx *txn) {
		saved := tx.changed(`
			update sync_runs set checked = $2, total = $3, differences = $4, detail = $5, status = $6, ended_at = $7
			where sync_id = $1 and status = 'running'`,
			run.ID, run.Checked, run.Total, run.Differences, run.Detail, run.Status, run.EndedAt)
		if saved == 0 || run.EndedAt == nil {
			return
		}
		outcome := "ok"
		if run.Status != "done" {
			outcome = "failed"
		}
		found, repaired, _ := run.counts()
		tx.audit(caller{Actor: run.StartedBy}, *run.EndedAt, entry{Action: "sync.end", Target: string(run.ID),
			Outcome: outcome, Reason: run.Status, Details: map[string]any{"found": found, "repaired": repaired}})
	})
}
