package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// session is a sign-in, see schema.sql.
type session struct {
	ID         sessionID
	KeycloakID string // claim sid
	UserID     userID
	Address    string // of the sign-in
	UserAgent  string
	CreatedAt  time.Time
	LastUsedAt time.Time
	ExpiresAt  time.Time // when Keycloak lets the refresh token die
	Ended      bool
}

func (s session) key() string { return string(s.ID) }

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
	err := st.tx(ctx, func(tx pgx.Tx) (err error) {
		if a, err = one[account](ctx, tx, `
		with u as (
			update users set last_login_at = $5::timestamptz where keycloak_id = $8 and is_active and is_verified
			returning `+userColumns+`),
		replaced as (
			update sessions set ended_at = $5::timestamptz, ended_reason = 'replaced', due_at = null from u
			where sessions.user_id = u.user_id and keycloak_session_id = $2::text and ended_at is null
			returning session_id),
		forgotten as (
			delete from refresh_tokens where session_id in (select session_id from replaced)),
		s as (
			insert into sessions (session_id, user_id, keycloak_session_id, ip_address, user_agent,
				created_at, last_used_at, expires_at, due_at)
			select $1::text, user_id, $2::text, $3::text, $4::text, $5::timestamptz, $5::timestamptz, $6::timestamptz, $7::timestamptz from u),
		t as (
			insert into refresh_tokens (token_hash, session_id) select $9::text, $1::text from u)
		select *, array(select session_id from replaced) from u`,
			string(s.ID), s.KeycloakID, c.Address, c.UserAgent, now, s.ExpiresAt, s.due(now), subject, refreshHash); err != nil {
			return err
		}
		return auditLogin(ctx, tx, c, now, a.ID, s.ID, a.Replaced)
	})
	return a.user, err
}

// refreshToken is a refresh token that somebody has shown, and its session.
type refreshToken struct {
	session
	Of     user      // whose; only what is in claims
	UsedAt time.Time // zero: not yet
	Answer []byte    // sealed; nil before it was used and some time after the grace time
	Leased bool      // the caller is the one who exchanges it
}

// takeRefreshToken returns what is known of a token, and makes the caller the one
// who exchanges it if it is good and nobody else does that already. errNotFound: it
// never belonged to a session that lives.
func (st *store) takeRefreshToken(ctx context.Context, hash string, now time.Time) (refreshToken, error) {
	var t refreshToken
	err := st.pool.QueryRow(ctx, `
		with leased as (
			update refresh_tokens set leased_until = $3
			where token_hash = $1 and used_at is null and (leased_until is null or leased_until <= $2)
				and exists (select from sessions s join users u using (user_id)
					where s.session_id = refresh_tokens.session_id and s.ended_at is null and u.is_active)
			returning session_id)
		select s.session_id, s.keycloak_session_id, s.user_id, s.expires_at, s.ended_at is not null or not u.is_active,
			coalesce(t.used_at, 'epoch'), t.answer, exists (select from leased), u.keycloak_id, u.role, u.network_id, u.station_id
		from refresh_tokens t join sessions s using (session_id) join users u using (user_id) where t.token_hash = $1`, hash, now, now.Add(rotationLease)).
		Scan(&t.ID, &t.KeycloakID, &t.UserID, &t.ExpiresAt, &t.Ended, &t.UsedAt, &t.Answer, &t.Leased,
			&t.Of.KeycloakID, &t.Of.Role, &t.Of.NetworkID, &t.Of.StationID)
	t.Of.ID = t.UserID
	return t, storeError(err)
}

// sessionOf returns the session that a refresh token belongs to, or errNotFound.
func (st *store) sessionOf(ctx context.Context, hash string) (session, error) {
	return one[session](ctx, st.pool, `select `+sessionColumns+` from sessions
		where session_id = (select session_id from refresh_tokens where token_hash = $1)`, hash)
}

// releaseRefreshToken lets others exchange a token whose exchange came to nothing.
func (st *store) releaseRefreshToken(ctx context.Context, hash string) error {
	_, err := st.pool.Exec(ctx, `update refresh_tokens set leased_until = null where token_hash = $1 and used_at is null`, hash)
	return storeError(err)
}

// rotate records the exchange of a token for the next one (F3). errLeaseLost: it was
// exchanged by another, or the session has ended.
func (st *store) rotate(ctx context.Context, s session, hash, nextHash string, answer []byte, now time.Time) error {
	tag, err := st.pool.Exec(ctx, `
		with s as (
			update sessions set last_used_at = $5, expires_at = $6, due_at = $7 where session_id = $1 and ended_at is null
			returning session_id),
		used as (
			update refresh_tokens t set used_at = $5, answer = $4, leased_until = null from s
			where t.token_hash = $2 and t.used_at is null
			returning t.session_id)
		insert into refresh_tokens (token_hash, session_id) select $3, session_id from used`,
		s.ID, hash, nextHash, answer, now, s.ExpiresAt, s.due(now))
	if err == nil && tag.RowsAffected() == 0 {
		return errLeaseLost
	}
	return storeError(err)
}

// purgeAnswers removes what was kept for the grace time.
func (st *store) purgeAnswers(ctx context.Context, usedBefore time.Time) error {
	_, err := st.pool.Exec(ctx, `update refresh_tokens set answer = null where token_hash = any(array(
		select token_hash from refresh_tokens where answer is not null and used_at < $1 order by used_at limit 10000 for update skip locked))`, usedBefore)
	return storeError(err)
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
// here on their refresh tokens are unknown, and the loop owes Keycloak their end.
func (st *store) endSessions(ctx context.Context, c caller, user userID, id sessionID, e entry, now time.Time) ([]session, error) {
	var ended []session
	err := st.tx(ctx, func(tx pgx.Tx) (err error) {
		ended, err = endSessions(ctx, tx, c, user, id, e, now)
		return err
	})
	return ended, err
}

func endSessions(ctx context.Context, tx pgx.Tx, c caller, user userID, id sessionID, e entry, now time.Time) ([]session, error) {
	rows, _ := tx.Query(ctx, `
		update sessions set ended_at = $3, ended_reason = $4, due_at = $3
		where user_id = $1 and ($2 = '' or session_id = $2) and ended_at is null
		returning `+sessionColumns, user, string(id), now, e.Reason)
	ended, err := pgx.CollectRows(rows, pgx.RowToStructByPos[session])
	if err != nil || len(ended) == 0 {
		return nil, err
	}
	ids := []string{}
	for _, s := range ended {
		ids = append(ids, string(s.ID))
		if err := revoke(ctx, tx, revocation{SessionID: s.KeycloakID}); err != nil {
			return nil, err
		}
	}
	if _, err := tx.Exec(ctx, `delete from refresh_tokens where session_id = any($1)`, ids); err != nil {
		return nil, err
	}
	e.Target, e.Details = string(user), map[string]any{"sessions": ids}
	return ended, writeAudit(ctx, tx, c, now, e)
}

// takeDueSession returns a session that the loop must look at, due before the loop's
// start, and makes it due again at retry; or errNotFound. Instances that ask at the
// same time get different ones.
func (st *store) takeDueSession(ctx context.Context, start, retry time.Time) (session, error) {
	return one[session](ctx, st.pool, `
		update sessions set due_at = $2
		where session_id = (select session_id from sessions where due_at <= $1 order by due_at limit 1 for update skip locked)
		returning `+sessionColumns, start, retry)
}

// sessionDue says when the loop must look at a live session again. The zero time is for
// an ended one and means never: neither overwrites what another has done meanwhile.
func (st *store) sessionDue(ctx context.Context, id sessionID, due time.Time) error {
	_, err := st.pool.Exec(ctx, `
		update sessions set due_at = $2
		where session_id = $1 and (ended_at is null) = ($2::timestamptz is not null)`, id, nullTime(due))
	return storeError(err)
}
