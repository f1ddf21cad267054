package main

import (
	"cmp"
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

const sessionColumns = `session_id, keycloak_session_id, user_id, ip_address, user_agent, created_at, last_used_at,
	case when origin = 'service' then expires_at end, ended_at is not null, origin`

// addSession stores the sign-in of an account (L2). A browser that Keycloak knew already comes back with the same
// session of Keycloak: the new one replaces ours, whose token its cookie has lost. errNotFound: the account may not
// sign in any more.
func (st *store) addSession(
	ctx context.Context, c caller, id userID, keycloakID string, t tokenResponse, now time.Time,
) error {
	c.Actor = string(id)
	return st.tx(ctx, func(tx *txn) {
		ended, err := one[struct{ Replaced []string }](ctx, tx, `
			with u as (
				update users set last_login_at = $5::timestamptz where user_id = $2 and is_active and is_verified
				returning user_id),
			replaced as (
				update sessions s set ended_at = $5::timestamptz, ended_reason = 'replaced' from u
				where s.user_id = u.user_id and keycloak_session_id = $3::text and ended_at is null
				returning session_id),
			deleted as (delete from refresh_tokens where session_id in (select session_id from replaced)),
			s as (
				insert into sessions (session_id, user_id, keycloak_session_id, ip_address, user_agent, created_at,
					last_used_at, expires_at)
				select $1::text, user_id, $3::text, $4::text, $8::text, $5::timestamptz, $5::timestamptz, $6::timestamptz from u),
			t as (insert into refresh_tokens (token_hash, session_id) select $7::text, $1::text from u)
			select array(select session_id from replaced) from u`,
			t.SessionID, id, keycloakID, c.Address, now, t.expiry(now), digest(t.RefreshToken), c.UserAgent)
		tx.check(err)
		tx.audit(c, now, entry{Action: "login", Target: c.Actor, Details: map[string]any{"session_id": t.SessionID}})
		if ids := ended.Replaced; len(ids) > 0 {
			details := map[string]any{"sessions": ids}
			tx.audit(c, now, entry{Action: "session.end", Target: c.Actor, Reason: "replaced", Details: details})
		}
	})
}

// refreshToken is a refresh token of a live session that somebody has shown, and whose it is.
type refreshToken struct {
	Session     sessionID
	UsedAt      *time.Time // nil: not yet
	Answer      []byte     // sealed; nil before it was used and when it is over
	AnswerUntil *time.Time // nil: it was given none, or that is over
	user
}

// refreshTokenSQL finds no token that never belonged to a session that lives, nor one whose user is not active, or that
// was used and whose session has ended in Keycloak since.
const refreshTokenSQL = `
	select session_id, used_at, answer, answer_until, u.* from refresh_tokens t join sessions s using (session_id),
		lateral (select ` + userColumns + ` from users where users.user_id = s.user_id and is_active) u
	where token_hash = $1 and ended_at is null and (used_at is null or answer_until > $2 or expires_at > $2)`

// refreshToken returns what is known of a token, or errNotFound.
func (st *store) refreshToken(ctx context.Context, hash string, now time.Time) (refreshToken, error) {
	return one[refreshToken](ctx, st.pool, refreshTokenSQL, hash, now)
}

// lockToken is refreshToken that locks the token for the caller if it is unused (F1). errLocked: another has it.
func (st *store) lockToken(ctx context.Context, hash string, now time.Time) (t task, known refreshToken, err error) {
	t = task{ID: "token:" + hash, lockedBy: gonanoid.Must()}
	var locked func() (struct{ Attempts, Revision int }, error)
	var found func() (refreshToken, error)
	err = st.tx(ctx, func(tx *txn) {
		locked = later[struct{ Attempts, Revision int }](tx, lockSQL(
			commit(st.pool)+`, (select from refresh_tokens where token_hash = $5 and used_at is null) unused`),
			t.ID, t.lockedBy, now, now.Add(rotationLock), hash)
		found = later[refreshToken](tx, refreshTokenSQL, hash, now) // a statement of its own: it sees what came before
	})
	if err != nil {
		return t, known, err
	}
	known, err = found()
	_, another := locked()
	switch unused := err == nil && known.UsedAt == nil; {
	case unused && another != nil:
		err = errLocked
	case !unused && another == nil: // while this waited it was exchanged, or its session has ended
		err = cmp.Or(finish(ctx, st.pool, t, never), err)
	}
	return t, known, err
}

// session returns one session, ended or not, or errNotFound.
func (st *store) session(ctx context.Context, id sessionID) (session, error) {
	return one[session](ctx, st.pool, `select `+sessionColumns+` from sessions where session_id = $1`, id)
}

// lastAnswer is the answer that is given again to the token that was shown last, until it is used.
type lastAnswer struct {
	TokenHash string
	Sealed    []byte
	Grace     time.Duration // for which the answers before it are still given
}

// rotate records the exchange of an unused token for the next one (F3), and ends the lock. It returns errNotFound when
// the session has ended, and errLocked.
func (st *store) rotate(
	ctx context.Context, t task, hash string, next tokenResponse, now time.Time, a lastAnswer,
) error {
	var outcome func() (struct{ Locked, Live bool }, error)
	err := st.tx(ctx, func(tx *txn) {
		outcome = later[struct{ Locked, Live bool }](tx, `
			with lock as (delete from tasks where task_id = $6 and locked_by = $7 returning task_id),
			s as (
				update sessions set last_used_at = $4, expires_at = $5 from lock where session_id = $1 and ended_at is null
				returning session_id),
			used as (
				update refresh_tokens t set used_at = $4 from s where t.session_id = s.session_id and token_hash = $2
					and used_at is null
				returning t.session_id),
			next as (
				insert into refresh_tokens (token_hash, session_id) select $3, session_id from used returning session_id)
			select exists (select from lock), exists (select from next)`,
			next.SessionID, hash, digest(next.RefreshToken), now, next.expiry(now), t.ID, t.lockedBy)
		tx.exec(`
			update refresh_tokens set
				used_at = case when token_hash = $2 then $4 else used_at end,
				answer = case when token_hash = $2 then $3 else answer end,
				answer_until = case when token_hash = $2 then greatest($5, $4::timestamptz + $6::interval)
					else least(answer_until, used_at + $6::interval) end
			where session_id = $1 and (answer is not null or token_hash = $2)
				and exists (select from refresh_tokens where token_hash = $7)`,
			next.SessionID, a.TokenHash, a.Sealed, now, next.expiry(now), a.Grace, digest(next.RefreshToken))
	})
	if err != nil {
		return err
	}
	switch was, _ := outcome(); { // a row is there in any case
	case !was.Locked: // nothing was written
		return errLocked
	case !was.Live: // nothing but the end of the lock
		return errNotFound
	}
	return nil
}

// sessions returns the live sessions of a user, the latest first.
func (st *store) sessions(ctx context.Context, id userID, before cursor, limit int, now time.Time) ([]session, error) {
	rows, _ := st.pool.Query(ctx, `select `+sessionColumns+` from sessions
		where user_id = $1 and ended_at is null and expires_at > $2 and (created_at, session_id) < ($3, $4)
		order by created_at desc, session_id desc limit $5`, id, now, before.At, before.ID, limit)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[session])
	return list, storeError(err)
}

// endSession ends one live session of a user, and returns it. From here on its refresh token is unknown, and its
// task ends it in Keycloak. errNotFound: the user has no such session.
func (st *store) endSession(
	ctx context.Context, c caller, user userID, id sessionID, reason string, now time.Time,
) (ended session, err error) {
	err = st.tx(ctx, func(tx *txn) {
		list := tx.endSessions(c, user, reason, now, string(id))
		if len(list) == 0 {
			tx.check(errNotFound)
			return
		}
		ended = list[0]
		tx.check(enqueue(ctx, tx, now.Add(pushDelay), string(id))) // the request tries first
	})
	return ended, err
}

// endAllSessions ends all sessions of a user, and revokes the access tokens that were issued before, also those of
// sessions that were begun at Keycloak. errNotFound: there is no such user.
func (st *store) endAllSessions(ctx context.Context, c caller, user userID, reason string, now time.Time) error {
	return st.tx(ctx, func(tx *txn) {
		task := tx.endAllSessions(c, user, reason, now)
		tx.check(enqueue(ctx, tx, now.Add(pushDelay), task)) // the request tries first
		if len(tx.entries) == 0 {                            // those that were begun at Keycloak have no row
			tx.audit(c, now, entry{Action: "session.end", Target: string(user), Reason: reason})
		}
	})
}

// endAllSessions allows for clocks that differ: all sessions that Keycloak has now are to be ended, and a token that
// it issues right after this is good at once. Those of the last seconds are revoked by their session. It returns the
// task that ends them in Keycloak.
func (tx *txn) endAllSessions(c caller, user userID, reason string, now time.Time) (task string) {
	// First, as all lock the user before its sessions.
	task = tx.notBefore(user, now.Add(tokenLeeway), now.Add(-tokenLeeway), "")
	tx.endSessions(c, user, reason, now)
	return task
}

// notBefore says that what a user began before a time of Keycloak's clock counts no more: access tokens from now on,
// sessions when the task has ended them, which it returns. One session of Keycloak may be kept ("": none). Refresh
// tokens that were handed out of it before count no more either: they may be a thief's, and the person comes back and
// gets the next one.
func (tx *txn) notBefore(user userID, begun, issued time.Time, kept string) (task string) {
	of, err := one[struct{ KeycloakID string }](tx.ctx, tx, `
		update users set not_before = greatest(not_before, $2),
			kept_session = case when not_before > $2 then kept_session else $3 end
		where user_id = $1 returning keycloak_id`, user, begun, kept)
	tx.check(err)
	tx.exec(`delete from refresh_tokens where session_id in (
		select session_id from sessions where keycloak_session_id = $1 and created_at < $2)`, kept, begun.Add(-tokenLeeway))
	tx.revoke(revocation{UserID: user, NotBefore: &issued})
	return kcTask(of.KeycloakID)
}

// clearNotBefore records that Keycloak has ended what was begun before the user's not-before.
func (st *store) clearNotBefore(ctx context.Context, u user) error {
	_, err := st.pool.Exec(ctx, `
		update users set not_before = null, kept_session = '' where user_id = $1 and not_before = $2`, u.ID, u.NotBefore)
	return storeError(err)
}

// endKeycloakSessions ends those of our sessions that are some of Keycloak's, and revokes the access tokens of these.
func (st *store) endKeycloakSessions(
	ctx context.Context, c caller, user userID, reason string, now time.Time, ids []string,
) error {
	return st.tx(ctx, func(tx *txn) {
		tx.endSessions(c, user, reason, now, ids...)
		for _, id := range ids {
			tx.revoke(revocation{SessionID: id})
		}
	})
}

// endSessions ends live sessions of a user, given by our ids or Keycloak's, or all, and returns them.
func (tx *txn) endSessions(c caller, user userID, reason string, now time.Time, ids ...string) []session {
	rows, _ := tx.Query(tx.ctx, `
		update sessions set ended_at = $2, ended_reason = $3
		where user_id = $1 and ended_at is null
			and ($4::text[] is null or session_id = any($4) or keycloak_session_id = any($4))
		returning `+sessionColumns, user, now, reason, ids)
	ended, err := pgx.CollectRows(rows, pgx.RowToStructByPos[session])
	tx.check(err)
	if len(ended) == 0 {
		return nil
	}
	ids = nil
	for _, s := range ended {
		tx.revoke(revocation{SessionID: s.KeycloakID})
		ids = append(ids, string(s.ID))
	}
	tx.exec(`delete from refresh_tokens where session_id = any($1)`, ids)
	e := entry{Action: "session.end", Target: string(user), Reason: reason, Details: map[string]any{"sessions": ids}}
	if reason == "logout" {
		e.Action = reason
	}
	tx.audit(c, now, e)
	return ended
}

// addKeycloakSessions gives sessions that were begun at Keycloak a row, so that they can be listed and ended like
// others. Their id is made of Keycloak's: two who list at once make one row.
func (st *store) addKeycloakSessions(ctx context.Context, user userID, live []keycloakSession) error {
	_, err := st.pool.Exec(ctx, `
		with live as (
			select * from jsonb_to_recordset($2) as l (id text, key text, address text, started timestamptz, used timestamptz)),
		used as (
			update sessions s set last_used_at = l.used from live l
			where s.user_id = $1 and s.keycloak_session_id = l.id and s.origin = 'keycloak' and s.ended_at is null)
		insert into sessions (session_id, user_id, keycloak_session_id, ip_address, user_agent, created_at, last_used_at,
			expires_at, origin)
		select l.key, $1, l.id, l.address, '', l.started, l.used, l.started + interval '30 days', 'keycloak'
		from live l where not exists (select from sessions s where s.user_id = $1 and s.keycloak_session_id = l.id)
		on conflict (session_id) do nothing`, user, live)
	return storeError(err)
}
