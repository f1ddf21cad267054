package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

const sessionColumns = `session_id, keycloak_session_id, user_id, ip_address, user_agent, created_at, last_used_at, expires_at,
	ended_at is not null`

// addSession stores the sign-in of the account with this sub (L2), and returns the account.
// A browser that Keycloak knew already comes back with the same session of Keycloak: the new
// one replaces ours, whose token its cookie has lost. errNotFound: there is no account that
// may sign in.
func (st *store) addSession(ctx context.Context, c caller, subject string, s session, refreshHash string, now time.Time) (user, error) {
	type account struct {
		user
		Replaced []string // sessions
	}
	var a account
	err := st.tx(ctx, func(tx *txn) {
		var err error
		a, err = one[account](ctx, tx, `
		with u as (
			update users set last_login_at = $5::timestamptz where keycloak_id = $7 and is_active and is_verified
			returning `+userColumns+`),
		replaced as (
			update sessions set ended_at = $5::timestamptz, ended_reason = 'replaced' from u
			where sessions.user_id = u.user_id and keycloak_session_id = $2::text and ended_at is null
			returning session_id),
		forgotten as (
			delete from refresh_tokens where session_id in (select session_id from replaced)),
		s as (
			insert into sessions (session_id, user_id, keycloak_session_id, ip_address, user_agent,
				created_at, last_used_at, expires_at)
			select $1::text, user_id, $2::text, $3::text, $4::text, $5::timestamptz, $5::timestamptz, $6::timestamptz from u),
		t as (
			insert into refresh_tokens (token_hash, session_id) select $8::text, $1::text from u)
		select *, array(select session_id from replaced) from u`,
			string(s.ID), s.KeycloakID, c.Address, c.UserAgent, now, s.ExpiresAt, subject, refreshHash)
		tx.check(err)
		c.Actor = string(a.ID)
		tx.audit(c, now, entry{Action: "login", Target: c.Actor, Details: map[string]any{"session_id": s.ID}})
		if len(a.Replaced) > 0 {
			tx.audit(c, now, entry{Action: "session.end", Target: c.Actor, Reason: "replaced", Details: map[string]any{"sessions": a.Replaced}})
		}
	})
	return a.user, err
}

// refreshToken is a refresh token that somebody has shown, and its session.
type refreshToken struct {
	session
	Of     user      // whose; only what is in claims
	UsedAt time.Time // zero: not yet
	Answer []byte    // sealed; nil before it was used and some time after the grace time
}

func (t refreshToken) used() bool { return !t.UsedAt.IsZero() }

// refreshToken returns what is known of a token. errNotFound: it never belonged to a session
// that lives.
func (st *store) refreshToken(ctx context.Context, hash string) (refreshToken, error) {
	var t refreshToken
	var used *time.Time
	err := st.pool.QueryRow(ctx, `
		select s.session_id, s.keycloak_session_id, s.user_id, s.expires_at, s.ended_at is not null or not u.is_active,
			t.used_at, t.answer, u.keycloak_id, u.role, u.network_id, u.station_id
		from refresh_tokens t join sessions s using (session_id) join users u using (user_id) where t.token_hash = $1`, hash).
		Scan(&t.ID, &t.KeycloakID, &t.UserID, &t.ExpiresAt, &t.Ended, &used, &t.Answer,
			&t.Of.KeycloakID, &t.Of.Role, &t.Of.NetworkID, &t.Of.StationID)
	if t.Of.ID = t.UserID; used != nil {
		t.UsedAt = *used
	}
	return t, storeError(err)
}

// session returns one session, ended or not, or errNotFound.
func (st *store) session(ctx context.Context, id sessionID) (session, error) {
	return one[session](ctx, st.pool, `select `+sessionColumns+` from sessions where session_id = $1`, id)
}

// rotate records the exchange of a token for the next one (F3), and ends the lock. It returns
// errNotFound when the session has ended, and errLocked.
func (st *store) rotate(ctx context.Context, t task, s session, hash, nextHash string, answer []byte, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		if tx.exec(`
			with s as (
				update sessions set last_used_at = $5, expires_at = $6 where session_id = $1 and ended_at is null
				returning session_id),
			used as (
				update refresh_tokens t set used_at = $5, answer = $4 from s
				where t.token_hash = $2 and t.used_at is null
				returning t.session_id)
			insert into refresh_tokens (token_hash, session_id) select $3, session_id from used`,
			s.ID, hash, nextHash, answer, now, s.ExpiresAt) == 0 {
			tx.check(errNotFound)
		}
		tx.check(finish(ctx, tx, t, never))
	})
}

// sessions returns the live sessions of a user, the latest first.
func (st *store) sessions(ctx context.Context, user userID, before cursor, limit int, now time.Time) ([]session, error) {
	rows, _ := st.pool.Query(ctx, `
		select `+sessionColumns+` from sessions
		where user_id = $1 and ended_at is null and expires_at > $2 and (created_at, session_id) < ($3, $4)
		order by created_at desc, session_id desc limit $5`, user, now, before.At, before.ID, limit)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[session])
	return list, storeError(err)
}

// endSessions ends one live session of a user, or all (id ""), and returns them. From
// here on their refresh tokens are unknown, and their tasks end them in Keycloak.
func (st *store) endSessions(ctx context.Context, c caller, user userID, id sessionID, e entry, now time.Time) ([]session, error) {
	var ended []session
	err := st.tx(ctx, func(tx *txn) { ended = tx.endSessions(c, user, id, e, now) })
	return ended, err
}

func (tx *txn) endSessions(c caller, user userID, id sessionID, e entry, now time.Time) []session {
	rows, _ := tx.Query(tx.ctx, `
		update sessions set ended_at = $3, ended_reason = $4
		where user_id = $1 and ($2 = '' or session_id = $2) and ended_at is null
		returning `+sessionColumns, user, string(id), now, e.Reason)
	ended, err := pgx.CollectRows(rows, pgx.RowToStructByPos[session])
	tx.check(err)
	if len(ended) == 0 {
		return nil
	}
	ids := []string{}
	for _, s := range ended {
		ids = append(ids, string(s.ID))
		tx.check(revoke(tx.ctx, tx, revocation{SessionID: s.KeycloakID}))
	}
	tx.exec(`delete from refresh_tokens where session_id = any($1)`, ids)
	tx.check(enqueue(tx.ctx, tx, now.Add(pushDelay), ids...)) // the request tries first
	e.Target, e.Details = string(user), map[string]any{"sessions": ids}
	tx.audit(c, now, e)
	return ended
}
