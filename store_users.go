package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// user is an account, as PostgreSQL knows it and as the API shows it.
type user struct {
	ID          userID     `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	KeycloakID  string     `json:"keycloak_id" example:"5f2f4c0e-8a55-4c43-9a5e-2f6d7f6f3c11"`
	Email       string     `json:"email" example:"ada@example.com"`
	Username    string     `json:"username" example:"ada"`
	FirstName   string     `json:"first_name" example:"Ada"`
	LastName    string     `json:"last_name" example:"Lovelace"`
	Phone       string     `json:"phone" example:"+4930123456"`
	Photo       string     `json:"photo"`
	IsVerified  bool       `json:"is_verified"`
	Role        string     `json:"role" enum:"user,admin,partner,operator"`
	NetworkID   string     `json:"network_id" description:"Empty: none."`
	StationID   string     `json:"station_id" description:"Empty: none."`
	Source      string     `json:"source" enum:"web,internal"`
	IsActive    bool       `json:"is_active"`
	LastLoginAt *time.Time `json:"last_login_at" nullable:"true"`
	CreatedAt   time.Time  `json:"created_at"`
	UpdatedAt   time.Time  `json:"updated_at"`
	DeletedAt   *time.Time `json:"deleted_at" nullable:"true"`
}

const userColumns = `user_id, keycloak_id, email, username, coalesce(first_name, ''), coalesce(last_name, ''), coalesce(phone, ''),
	coalesce(photo, ''), is_verified, role, network_id, station_id, source, is_active, last_login_at, created_at, updated_at, deleted_at`

// user returns one user, deleted or not, or errNotFound.
func (st *store) user(ctx context.Context, id userID) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where user_id = $1`, id)
}

// userByEmail returns the live user with an address, or errNotFound.
func (st *store) userByEmail(ctx context.Context, email string) (user, error) {
	rows, _ := st.pool.Query(ctx, `select `+userColumns+` from users where lower(email) = lower($1) and deleted_at is null`, email)
	u, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[user])
	return u, storeError(err)
}

// userByKeycloakID returns the user whose tokens have this sub, deleted or not,
// or errNotFound.
func (st *store) userByKeycloakID(ctx context.Context, id string) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where keycloak_id = $1`, id)
}

// users returns whom p may see, filtered, the latest first.
func (st *store) users(ctx context.Context, p principal, in usersIn, before cursor) ([]user, error) {
	where, args := []string{"(created_at, user_id) < ($1, $2)"}, []any{before.At, before.ID, in.Limit + 1}
	and := func(condition string, value any) {
		args = append(args, value)
		where = append(where, strings.ReplaceAll(condition, "?", fmt.Sprintf("$%d", len(args))))
	}
	switch {
	case p.is(roleAdmin):
	case p.is(rolePartner) && p.NetworkID != "":
		and("network_id = ?", p.NetworkID)
	case p.is(roleOperator) && p.NetworkID != "" && p.StationID != "":
		and("network_id = ?", p.NetworkID)
		and("station_id = ?", p.StationID)
	default:
		and("user_id = ?", p.UserID)
	}
	for _, filter := range []struct{ column, value string }{{"role", in.Role}, {"network_id", in.NetworkID}, {"station_id", in.StationID}, {"source", in.Source}} {
		if filter.value != "" {
			and(filter.column+" = ?", filter.value)
		}
	}
	if in.Query != "" {
		and(userText+" like '%' || ? || '%'", strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(strings.ToLower(in.Query)))
	}
	if !in.IncludeDeleted {
		where = append(where, "deleted_at is null")
	}
	rows, _ := st.pool.Query(ctx, `select `+userColumns+` from users where `+strings.Join(where, " and ")+`
		order by created_at desc, user_id desc limit $3`, args...)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[user])
	return list, storeError(err)
}

// userText is what a search looks at, as the index users_by_text has it.
const userText = `lower(email || ' ' || username || ' ' || coalesce(first_name, '') || ' ' || coalesce(last_name, ''))`

// addUser inserts an internal user that Keycloak does not have yet (I1). errConflict:
// a live user has the address or username, or somebody registers with the address.
func (st *store) addUser(ctx context.Context, c caller, u user, locale string) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, phone, is_verified, role, network_id, station_id,
				source, created_at, updated_at, created_by, locale, invitation_due, due_at)
			select $1, $2, $3, $4, $5, $6, $7, true, $8, $9, $10, 'internal', $11, $11, $12, $13, true, $14
			where not exists (select from user_registrations where lower(email) = lower($3) and status = 'pending')`,
			u.ID, u.KeycloakID, u.Email, u.Username, nullString(u.FirstName), nullString(u.LastName), nullString(u.Phone),
			u.Role, u.NetworkID, u.StationID, u.CreatedAt, string(c.UserID), locale, u.CreatedAt.Add(time.Minute))
		if err == nil && tag.RowsAffected() == 0 {
			err = errConflict
		}
		if err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, u.CreatedAt, entry{Action: "user.create", Target: string(u.ID),
			Details: map[string]any{"source": "internal", "role": u.Role, "network_id": u.NetworkID, "station_id": u.StationID}})
	})
}

// dropUser removes an internal user that Keycloak has refused to create.
func (st *store) dropUser(ctx context.Context, c caller, u user, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `delete from users where user_id = $1 and keycloak_id = $2`, u.ID, unborn+string(u.ID))
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.remove", Target: string(u.ID), Reason: "keycloak"})
	})
}

// changeUser changes a user, records what has changed, and withdraws the tokens that say
// something else; those of a deleted user with its sessions, which it returns (U1).
//
// It returns errNotFound, errConflict when the address or username is another's by now,
// problemLastAdmin, or the error of change.
func (st *store) changeUser(ctx context.Context, c caller, id userID, action string, change func(user) (user, error), now time.Time) (u user, ended []session, err error) {
	err = st.tx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `select `+userColumns+` from users where user_id = $1 for update`, id)
		before, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[user])
		if err != nil {
			return err
		}
		if u, err = change(before); err != nil {
			return err
		}
		if before.governs() && !u.governs() {
			if err := onlyAdmin(ctx, tx, id); err != nil {
				return err
			}
		}
		u.UpdatedAt = now
		if _, err := tx.Exec(ctx, `
			update users set first_name = $2, last_name = $3, phone = $4, photo = $5, role = $6, network_id = $7, station_id = $8,
				is_active = $9, deleted_at = $10, updated_at = $11, updated_by = $12, due_at = $13, enable_due = $9 and not is_active
			where user_id = $1`,
			id, nullString(u.FirstName), nullString(u.LastName), nullString(u.Phone), nullString(u.Photo), u.Role, u.NetworkID, u.StationID,
			u.IsActive, u.DeletedAt, now, nullString(string(c.UserID)), now.Add(time.Minute)); err != nil {
			return err
		}
		changed := map[string]any{}
		for name, values := range map[string][2]any{"role": {before.Role, u.Role}, "network_id": {before.NetworkID, u.NetworkID},
			"station_id": {before.StationID, u.StationID}, "is_active": {before.IsActive, u.IsActive}} {
			if values[0] != values[1] {
				changed[name] = map[string]any{"before": values[0], "after": values[1]}
			}
		}
		if len(changed) > 0 {
			if err := withdraw(ctx, tx, withdrawal{UserID: id, Role: u.Role, NetworkID: u.NetworkID, StationID: u.StationID, Active: u.IsActive}); err != nil {
				return err
			}
		}
		// Of personal data the record has that it was changed, not what it was: it can't be erased.
		for name, values := range map[string][2]string{"first_name": {before.FirstName, u.FirstName}, "last_name": {before.LastName, u.LastName},
			"phone": {before.Phone, u.Phone}, "photo": {before.Photo, u.Photo}} {
			if values[0] != values[1] {
				changed[name] = "changed"
			}
		}
		if !u.IsActive {
			if ended, err = endSessions(ctx, tx, c, id, "", entry{Action: "session.end", Reason: "user deleted"}, now); err != nil {
				return err
			}
		}
		return writeAudit(ctx, tx, c, now, entry{Action: action, Target: string(id), Details: changed})
	})
	return u, ended, err
}

// governs says whether u is an administrator who can act.
func (u user) governs() bool { return u.Role == roleAdmin && u.IsActive && u.IsVerified }

// onlyAdmin returns problemLastAdmin if there is no administrator but id. Changes of
// administrators wait for each other here; whoever waits locks nothing that the other
// one needs.
func onlyAdmin(ctx context.Context, tx pgx.Tx, id userID) error {
	if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock(7204)`); err != nil {
		return err
	}
	var others bool
	err := tx.QueryRow(ctx, `select exists (select from users where role = 'admin' and is_active and is_verified and user_id <> $1)`, id).Scan(&others)
	if err == nil && !others {
		return problemLastAdmin.about(string(id))
	}
	return err
}

// owed is what Keycloak does not have yet of a user.
type owed struct {
	Invitation bool
	Enable     bool // it was restored
	Locale     string
}

// owedUser returns a user and what is owed to it.
func (st *store) owedUser(ctx context.Context, id userID) (u user, o owed, err error) {
	if u, err = st.user(ctx, id); err != nil {
		return u, o, err
	}
	err = st.pool.QueryRow(ctx, `select invitation_due, enable_due, locale from users where user_id = $1`, id).Scan(&o.Invitation, &o.Enable, &o.Locale)
	return u, o, storeError(err)
}

// bornUser records the id that Keycloak has given a user (I3).
func (st *store) bornUser(ctx context.Context, u user) error {
	_, err := st.pool.Exec(ctx, `update users set keycloak_id = $2 where user_id = $1 and keycloak_id = $3`, u.ID, u.KeycloakID, unborn+string(u.ID))
	return storeError(err)
}

// userSettled records that Keycloak has all of u (U3), and says whether that is still
// all there is.
func (st *store) userSettled(ctx context.Context, u user) (bool, error) {
	tag, err := st.pool.Exec(ctx, `update users set due_at = null, invitation_due = false, enable_due = false
		where user_id = $1 and updated_at = $2`, u.ID, u.UpdatedAt)
	return tag.RowsAffected() == 1, storeError(err)
}

// takeDueUser is takeDueSession for users.
func (st *store) takeDueUser(ctx context.Context, start, retry time.Time) (id userID, err error) {
	err = st.pool.QueryRow(ctx, `
		update users set due_at = $2
		where user_id = (select user_id from users where due_at <= $1 order by due_at limit 1 for update skip locked)
		returning user_id`, start, retry).Scan(&id)
	return id, storeError(err)
}

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

const sessionColumns = `session_id, keycloak_session_id, user_id, ip_address, user_agent, created_at, last_used_at, expires_at,
	ended_at is not null`

// addSession stores the sign-in of the account with this sub (L2), in one round
// trip, and returns the account. A browser that Keycloak knew already comes back with
// the same session of Keycloak: the new one replaces ours, whose token its cookie has
// lost. errNotFound: there is no account that may sign in.
func (st *store) addSession(ctx context.Context, c caller, subject string, s session, refreshHash string, now time.Time) (user, error) {
	return one[user](ctx, st.pool, `
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
			insert into refresh_tokens (token_hash, session_id) select $11::text, $1::text from u),
		a as (
			insert into audit_log (audit_id, at, actor, action, target, outcome, ip_address, user_agent, request_id, details)
			select $9::text, $5::timestamptz, user_id, 'login', user_id, 'ok', $3::text, $4::text, $10::text,
				jsonb_build_object('session_id', $1::text) from u),
		b as (
			insert into audit_log (audit_id, at, actor, action, target, outcome, reason, ip_address, user_agent, request_id, details)
			select $12::text, $5::timestamptz, user_id, 'session.end', user_id, 'ok', 'replaced', $3::text, $4::text, $10::text,
				jsonb_build_object('sessions', array(select session_id from replaced)) from u where exists (select from replaced))
		select * from u`,
		string(s.ID), s.KeycloakID, c.Address, c.UserAgent, now, s.ExpiresAt, s.due(now), subject, newAuditID(), c.RequestID, refreshHash, newAuditID())
}

// refreshToken is a refresh token that somebody has shown, and its session.
type refreshToken struct {
	session
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
			coalesce(t.used_at, 'epoch'), t.answer, exists (select from leased)
		from refresh_tokens t join sessions s using (session_id) join users u using (user_id) where t.token_hash = $1`, hash, now, now.Add(rotationLease)).
		Scan(&t.ID, &t.KeycloakID, &t.UserID, &t.ExpiresAt, &t.Ended, &t.UsedAt, &t.Answer, &t.Leased)
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

// forgetAnswers removes what was kept for the grace time.
func (st *store) forgetAnswers(ctx context.Context, usedBefore time.Time) error {
	_, err := st.pool.Exec(ctx, `update refresh_tokens set answer = null where answer is not null and used_at < $1`, usedBefore)
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
		if err := withdraw(ctx, tx, withdrawal{SessionID: s.KeycloakID}); err != nil {
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
