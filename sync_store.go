package main

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// syncUser is a user as sync looks at it.
type syncUser struct {
	user
	Due                 bool // Keycloak does not have all of it yet: settleUser brings it there
	NamesDue, EnableDue bool // these among it, see owedUser
}

const syncUserColumns = userColumns + `, due_at is not null, names_due, enable_due`

// syncUser returns the user with an id in Keycloak, or errNotFound.
func (st *store) syncUser(ctx context.Context, keycloakID string) (syncUser, error) {
	return one[syncUser](ctx, st.pool, `select `+syncUserColumns+` from users where keycloak_id = $1`, keycloakID)
}

// syncUsers returns the users that are here of some of Keycloak, by id there. Those that are
// on their way here are known: by a registration that is not settled, or an invitation.
func (st *store) syncUsers(ctx context.Context, page []keycloakUser) (here map[string]syncUser, known map[string]bool, err error) {
	var ids, registrations, users []string
	for _, ku := range page {
		ids = append(ids, ku.id())
		registrations, users = append(registrations, ku.attribute(attrRegistrationID)), append(users, ku.attribute(attrUserID))
	}
	rows, _ := st.pool.Query(ctx, `select `+syncUserColumns+` from users where keycloak_id = any($1)`, ids)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[syncUser])
	if err != nil {
		return nil, nil, storeError(err)
	}
	here, known = map[string]syncUser{}, map[string]bool{}
	for _, u := range list {
		here[u.KeycloakID] = u
	}
	rows, _ = st.pool.Query(ctx, `
		select registration_id from user_registrations where registration_id = any($1) and (status = 'pending' or due_at is not null)
		union all select user_id from users where user_id = any($2) and keycloak_id = 'unborn:' || user_id`, registrations, users)
	open, err := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, ku := range page {
		known[ku.id()] = slices.Contains(open, ku.attribute(attrRegistrationID)) || slices.Contains(open, ku.attribute(attrUserID))
	}
	return here, known, storeError(err)
}

// taken says whether another live user has the address or username that u should have.
func (st *store) taken(ctx context.Context, u user) (taken bool, err error) {
	err = st.pool.QueryRow(ctx, `select exists (select from users where deleted_at is null and keycloak_id <> $1
		and (lower(email) = lower($2) or lower(username) = lower($3)))`, u.KeycloakID, u.Email, u.Username).Scan(&taken)
	return taken, storeError(err)
}

// registrationOfUser returns the registration that has a user in hand, or errNotFound.
func (st *store) registrationOfUser(ctx context.Context, id userID) (registration, error) {
	return st.oneRegistration(ctx, `where user_id = $1 and status <> 'verified'`, id)
}

// liveKeycloakIDs calls f with the id in Keycloak of every live user that has one.
func (st *store) liveKeycloakIDs(ctx context.Context, f func(id string)) error {
	after := ""
	for {
		rows, _ := st.pool.Query(ctx, `select keycloak_id from users where keycloak_id > $1 and is_active and keycloak_id not like 'unborn:%' order by keycloak_id limit 10000`, after)
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

// oweUser makes it due to bring Keycloak's user, which has these claims, to where ours is,
// and revokes the tokens that say something else. errRace: u has changed.
func (st *store) oweUser(ctx context.Context, c caller, u user, has map[string][]string, now time.Time) (user, error) {
	err := st.tx(ctx, func(tx pgx.Tx) (err error) {
		u, err = one[user](ctx, tx, `update users set due_at = coalesce(due_at, $3), updated_at = $3 where user_id = $1 and updated_at = $2
			returning `+userColumns, u.ID, u.UpdatedAt, now)
		if errors.Is(err, errNotFound) {
			err = errRace
		}
		if err != nil {
			return err
		}
		if err := revoke(ctx, tx, u.revocation()); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.assert", Target: string(u.ID), Network: u.NetworkID,
			Details: map[string]any{"role": u.Role, "network_id": u.NetworkID, "station_id": u.StationID, "is_active": u.IsActive, "keycloak": has}})
	})
	return u, err
}

// takeOver inserts a user that only Keycloak had, with these claims, and its registration,
// if it came by one that is not known here. Tokens that say something else are revoked.
// errConflict: a live user has the address or username, or somebody registers with it.
func (st *store) takeOver(ctx context.Context, c caller, u user, reg registration, has map[string][]string) error {
	now := u.CreatedAt
	err := st.tx(ctx, func(tx pgx.Tx) error {
		due := &now
		if reg.State == pending { // a user to be brought into step; this one's registration has its own due_at
			due = nil
		}
		if _, err := tx.Exec(ctx, `
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, is_verified, role, source,
				is_active, deleted_at, created_at, updated_at, due_at)
			values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12, $13)`,
			u.ID, u.KeycloakID, u.Email, u.Username, nullString(u.FirstName), nullString(u.LastName), u.IsVerified, u.Role, u.Source,
			u.IsActive, u.DeletedAt, now, due); err != nil {
			return err
		}
		if reg.ID != "" {
			if _, err := tx.Exec(ctx, `
				insert into user_registrations (registration_id, email, username, first_name, last_name, verification_token, verification_code,
					status, keycloak_id, user_id, expires_at, verified_at, created_at, locale, with_password, mail_state, due_at)
				values ($1, $2, $3, $4, $5, $6, $7, $8::text, $9, $10, $11, case when $8::text = 'verified' then $12::timestamptz end, $13, $14, $15, 'sent',
					case when $8::text = 'pending' then $12::timestamptz end) on conflict (registration_id) do nothing`,
				reg.ID, reg.Email, reg.Username, nullString(reg.FirstName), nullString(reg.LastName), reg.TokenHash, nullString(reg.CodeHash),
				reg.State, reg.KeycloakID, u.ID, reg.ExpiresAt, now, reg.CreatedAt, reg.Locale, reg.WithPassword); err != nil {
				return err
			}
		}
		if err := revoke(ctx, tx, u.revocation()); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.take_over", Target: string(u.ID),
			Details: map[string]any{"source": u.Source, "role": u.Role, "is_active": u.IsActive, "keycloak": has}})
	})
	if errors.Is(err, errRace) { // somebody registers with the address
		err = errConflict
	}
	return err
}

// syncPlace is how far Keycloak's events have been applied, and by whom they are now.
type syncPlace struct {
	At     [len(eventSources)]int64 // of the latest event of each source, milliseconds since 1970
	Events []string                 // ids of the latest ones: those of a short time may come again
	Left   []string                 // users who had an event, and for whom a store failed
	Owner  string
}

// takeSyncPlace makes the caller the only one who applies events, for syncBeat. It begins
// now where there was none, or a little earlier, as clocks differ. errNotFound: another does.
func (st *store) takeSyncPlace(ctx context.Context, owner string, now time.Time) (p syncPlace, err error) {
	err = st.pool.QueryRow(ctx, `
		insert into sync_place as p (at, user_at, events, owner, until) values ($3, $3, '{}', $1, $4)
		on conflict (only_row) do update set owner = $1, until = $4 where p.owner is null or p.until <= $2
		returning at, user_at, events, left_users, owner`, owner, now, now.Add(-syncBeat).UnixMilli(), now.Add(syncBeat)).
		Scan(&p.At[0], &p.At[1], &p.Events, &p.Left, &p.Owner)
	return p, storeError(err)
}

// keepSyncPlace is a sign of life of who applies events. errLeaseLost: it came too late.
func (st *store) keepSyncPlace(ctx context.Context, owner string, now time.Time) error {
	tag, err := st.pool.Exec(ctx, `update sync_place set until = $2 where owner = $1`, owner, now.Add(syncBeat))
	if err == nil && tag.RowsAffected() == 0 {
		return errLeaseLost
	}
	return storeError(err)
}

// leaveSyncPlace records the place and lets another go on.
func (st *store) leaveSyncPlace(ctx context.Context, p syncPlace) error {
	_, err := st.pool.Exec(ctx, `update sync_place set at = $2, user_at = $3, events = $4, left_users = $5, owner = null where owner = $1`,
		p.Owner, p.At[0], p.At[1], p.Events, p.Left)
	return storeError(err)
}

// beginSync begins a full pass, unless one runs, or the last one that was to repair was
// begun after since, or has failed after failed: errConflict, with that one.
func (st *store) beginSync(ctx context.Context, c caller, dryRun bool, now, since, failed time.Time) (run syncRun, err error) {
	if err := st.endKilledSync(ctx, now); err != nil {
		return run, err
	}
	run = syncRun{ID: newSyncID(), DryRun: dryRun, Status: "running", StartedAt: now, Differences: map[difference]*syncClass{}}
	err = st.tx(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock(7207)`); err != nil {
			return err
		}
		last, err := one[struct {
			ID        syncID
			Status    string
			StartedAt time.Time
			EndedAt   *time.Time
		}](ctx, tx, `
			select sync_id, status, started_at, ended_at from sync_runs where status = 'running' union all
			(select sync_id, status, started_at, ended_at from sync_runs where not dry_run order by started_at desc limit 1)
			order by ended_at desc nulls first limit 1`)
		switch {
		case errors.Is(err, errNotFound):
		case err != nil:
			return err
		case last.Status == "running", last.Status == "failed" && last.EndedAt.After(failed), last.Status != "failed" && last.StartedAt.After(since):
			run.ID = last.ID
			return errConflict
		}
		if _, err := tx.Exec(ctx, `insert into sync_runs (sync_id, dry_run, status, started_at, seen_at) values ($1, $2, 'running', $3, $3)`,
			run.ID, dryRun, now); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "sync.begin", Target: string(run.ID), Details: map[string]any{"dry_run": dryRun}})
	})
	return run, err
}

// endKilledSync records the end of a run that has shown no progress for syncBeat.
func (st *store) endKilledSync(ctx context.Context, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		var killed string
		err := tx.QueryRow(ctx, `update sync_runs set status = 'failed', ended_at = $1, detail = 'It was killed.' where status = 'running' and seen_at < $2
			returning sync_id`, now, now.Add(-syncBeat)).Scan(&killed)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		} else if err != nil {
			return err
		}
		return writeAudit(ctx, tx, system("sync"), now, entry{Action: "sync.end", Target: killed, Outcome: "failed", Reason: "killed"})
	})
}

// saveSync records a run's progress. errLeaseLost: it was given up.
func (st *store) saveSync(ctx context.Context, run syncRun, now time.Time) error {
	return saveSync(ctx, st.pool, run, now)
}

func saveSync(ctx context.Context, q querier, run syncRun, now time.Time) error {
	tag, err := q.Exec(ctx, `
		update sync_runs set checked = $2, total = $3, differences = $4, detail = $5, status = $6, ended_at = $7, seen_at = $8
		where sync_id = $1 and status = 'running'`, run.ID, run.Checked, run.Total, run.Differences, run.Detail, run.Status, run.EndedAt, now)
	if err == nil && tag.RowsAffected() == 0 {
		return errLeaseLost
	}
	return storeError(err)
}

// endSync records a run's end.
func (st *store) endSync(ctx context.Context, c caller, run syncRun, now time.Time) error {
	outcome := "ok"
	if run.Status != "done" {
		outcome = "failed"
	}
	return st.tx(ctx, func(tx pgx.Tx) error {
		if err := saveSync(ctx, tx, run, now); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "sync.end", Target: string(run.ID), Outcome: outcome, Reason: run.Status,
			Details: map[string]any{"found": run.found(), "repaired": run.found() - run.remain()}})
	})
}

// syncRun returns a run, or errNotFound.
func (st *store) syncRun(ctx context.Context, id syncID) (run syncRun, err error) {
	var report []byte
	err = st.pool.QueryRow(ctx, `select sync_id, dry_run, status, started_at, ended_at, checked, total, differences, detail from sync_runs where sync_id = $1`, id).
		Scan(&run.ID, &run.DryRun, &run.Status, &run.StartedAt, &run.EndedAt, &run.Checked, &run.Total, &report, &run.Detail)
	if err == nil {
		err = json.Unmarshal(report, &run.Differences)
	}
	return run, storeError(err)
}
