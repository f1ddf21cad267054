package main

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"strings"
	"time"
)

// user is an account, as PostgreSQL knows it and as the API shows it.
type user struct {
	ID           userID         `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	KeycloakID   string         `json:"keycloak_id" example:"5f2f4c0e-8a55-4c43-9a5e-2f6d7f6f3c11"`
	Email        string         `json:"email" example:"ada@example.com"`
	Username     string         `json:"username" example:"ada"`
	FirstName    string         `json:"first_name" example:"Ada"`
	LastName     string         `json:"last_name" example:"Lovelace"`
	Phone        string         `json:"phone" example:"+4930123456"`
	Photo        string         `json:"photo"`
	IsVerified   bool           `json:"is_verified"`
	Role         string         `json:"role" enum:"user,admin,partner,operator"`
	NetworkID    string         `json:"network_id" description:"Empty: none."`
	StationID    string         `json:"station_id" description:"Empty: none."`
	Source       string         `json:"source" enum:"web,internal"`
	IsActive     bool           `json:"is_active"`
	LastLoginAt  *time.Time     `json:"last_login_at" nullable:"true"`
	CreatedAt    time.Time      `json:"created_at"`
	UpdatedAt    time.Time      `json:"updated_at"`
	DeletedAt    *time.Time     `json:"deleted_at" nullable:"true"`
	NotBefore    *time.Time     `json:"-"` // sessions begun before are still to be ended in Keycloak
	KeptSession  string         `json:"-"` // of Keycloak: the one of these that stays; "" = none
	Registration registrationID `json:"-"` // that is pending; "" also if only a new address is unconfirmed
}

// erased says that nothing is left of the user but its ids, until Keycloak's user is deleted, too.
func (u user) erased() bool { return u.Email == "" }

const userColumns = `user_id, keycloak_id, email, username, coalesce(first_name, ''), coalesce(last_name, ''),
	coalesce(phone, ''), coalesce(photo, ''), is_verified, role, network_id, station_id, source, is_active,
	last_login_at, created_at, updated_at, deleted_at, not_before, kept_session, coalesce((select registration_id
		from user_registrations r where not is_verified and r.user_id = users.user_id and r.status = 'pending' limit 1), '')`

// user returns one user, deleted or not, or errNotFound.
func (st *store) user(ctx context.Context, id userID) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where user_id = $1`, id)
}

// userByEmail returns the live user with an address, or errNotFound.
func (st *store) userByEmail(ctx context.Context, email string) (user, error) {
	return one[user](ctx, st.pool, `
		select `+userColumns+` from users where lower(email) = lower($1) and deleted_at is null`, email)
}

// userByKeycloakID returns the user whose tokens have this sub, deleted or not,
// or errNotFound.
func (st *store) userByKeycloakID(ctx context.Context, id string) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where keycloak_id = $1`, id)
}

// loginAccount is the live user whom a sign-in is about, if there is one.
type loginAccount struct {
	ID, KeycloakID string
	Known          bool // the account has signed in from the client's network lately
}

// accountByLogin finds the live user that an e-mail address or a username belongs to. It takes as long if there is
// none.
func accountByLogin(ctx context.Context, q querier, login, client string, now time.Time) (loginAccount, error) {
	return one[loginAccount](ctx, q, `
		select coalesce(min(user_id), ''), coalesce(min(keycloak_id), ''), exists (select from sessions s
			where s.user_id = min(users.user_id) and s.created_at > $3
				and case when s.origin = 'service' and (ip_address like '%_._%' or ip_address like '%:%')
					then ip_address::inet <<= $2::inet end)
		from users where deleted_at is null and (lower(email) = lower($1) or lower(username) = lower($1))`,
		login, client, now.Add(-keepEnded))
}

// requestReset asks the queue to mail a link to choose a password to the account of an address, if there is one that
// has proven it. It is audited in any case. Strangers may have used up the day's mails: a client from whose network the
// account has signed in before gets them again, some times a day.
func (st *store) requestReset(ctx context.Context, c caller, email string, now time.Time) error {
	return st.tx(ctx, func(tx *txn) {
		account, err := accountByLogin(ctx, tx, email, clientNetwork(ctx), now)
		tx.check(err)
		if account.Known && hit(ctx, tx, now, resetReserve.of(account.ID)) == nil {
			tx.reset(resetsADay.of(account.KeycloakID))
		}
		u, err := one[user](ctx, tx, `select `+userColumns+` from users
			where lower(email) = lower($1) and deleted_at is null and is_verified`, email)
		if err == nil {
			err = enqueue(ctx, tx, now, "reset:"+u.KeycloakID)
		} else if errors.Is(err, errNotFound) {
			err = nil
		}
		tx.check(err)
		tx.audit(c, now, entry{Action: "password.forgot", Target: string(u.ID)})
	})
}

// users returns whom p may see, filtered, the latest first.
func (st *store) users(ctx context.Context, p principal, in usersIn, before cursor) ([]user, error) {
	var network, station string // "": all
	self := false
	switch {
	case p.is(roleAdmin):
	case p.is(rolePartner) && p.NetworkID != "":
		network = p.NetworkID
	case p.is(roleOperator) && p.NetworkID != "" && p.StationID != "":
		network, station = p.NetworkID, p.StationID
	default:
		self = true
	}
	text := strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(strings.ToLower(in.Query))
	return list[user](ctx, st, `
		select `+userColumns+` from users
		where (created_at, user_id) < ($1, $2) and email <> ''
			and ($3 = '' or network_id = $3) and ($4 = '' or station_id = $4) and (not $5 or user_id = $6)
			and ($7 = '' or network_id = $7) and ($8 = '' or station_id = $8)
			and ($9 = '' or role = $9) and ($10 = '' or source = $10) and ($11 or is_active)
			and ($12 = '' or `+userText+` like '%' || $12 || '%')
		order by created_at desc, user_id desc limit $13`,
		before.At, before.ID, network, station, self, p.UserID,
		in.NetworkID, in.StationID, in.Role, in.Source, in.IncludeDeleted, text, in.Limit+1)
}

// userText is what a search looks at, as the index users_by_text has it.
const userText = `lower(email || ' ' || username || ' ' || coalesce(first_name, '') || ' ' || coalesce(last_name, ''))`

// changeUser changes a user and what follows from that (U1): the audit entry, the revocation of
// tokens that say something else, the end of a deleted or unproven user's sessions, and the task that
// brings role, scope and state to Keycloak.
//
// It says whether Keycloak must be told. It returns errNotFound, errConflict when the address or
// username is another's by now, problemLastAdmin, or the error of change.
func (st *store) changeUser(ctx context.Context, c caller, id userID, action string,
	change func(user) (user, error), now time.Time) (u user, push bool, err error) {
	err = st.tx(ctx, func(tx *txn) {
		before, err := one[user](ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, id)
		if err == nil {
			u, err = change(before)
		}
		if err != nil || u == before {
			tx.check(err)
			return
		}
		fromKeycloak := action == syncAction // what was done there is done, and need not be brought there
		if before.isActiveAdmin() && !u.isActiveAdmin() && !fromKeycloak {
			tx.check(onlyAdmin(ctx, tx, id))
		}
		u.UpdatedAt = now
		tx.exec(`
			update users set first_name = nullif($2, ''), last_name = nullif($3, ''), phone = nullif($4, ''),
				photo = nullif($5, ''), role = $6, network_id = $7, station_id = $8, is_active = $9, deleted_at = $10,
				updated_at = $11, updated_by = nullif($12, ''), email = $13, username = $14, is_verified = $15
			where user_id = $1`, id, u.FirstName, u.LastName, u.Phone, u.Photo, u.Role, u.NetworkID, u.StationID,
			u.IsActive, u.DeletedAt, now, c.UserID, u.Email, u.Username, u.IsVerified)
		changed := changes(before, u)
		was, is := before.revocation(), u.revocation()
		if was != is {
			tx.revoke(is)
			if push = !fromKeycloak; push {
				tx.check(enqueue(ctx, tx, now.Add(pushDelay), kcTask(u.KeycloakID)))
			}
		}
		if was.Active && !is.Active {
			tx.endAllSessions(c, id, action, now)
			push = true
		}
		newAddress := u.IsVerified && (u.Email != before.Email || !before.IsVerified)
		if fromKeycloak && newAddress {
			tx.check(enqueue(ctx, tx, now, noticeTask(u.KeycloakID)))
		}
		tx.audit(c, now, entry{Action: action, Target: string(id), Network: before.NetworkID, Details: changed})
	})
	return u, push, err
}

// eraseUser deletes all that PostgreSQL has of a user but its ids, and asks for the rest (X1). It returns
// errNotFound, and problemLastAdmin.
func (st *store) eraseUser(ctx context.Context, c caller, id userID, now time.Time) error {
	return st.tx(ctx, func(tx *txn) {
		task := tx.eraseUser(c, id, now)
		tx.check(enqueue(ctx, tx, now.Add(pushDelay), task)) // the request tries first
	})
}

// eraseUser returns the task that does the rest. Once is enough: events come again after a crash. Whoever has deleted
// its own account in Keycloak is gone, the last administrator, too.
func (tx *txn) eraseUser(c caller, id userID, now time.Time) (task string) {
	u, err := one[user](tx.ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, id)
	if tx.check(err); err != nil || u.erased() {
		return kcTask(u.KeycloakID)
	}
	if u.isActiveAdmin() && c.Actor != string(id) {
		tx.check(onlyAdmin(tx.ctx, tx, u.ID))
	}
	tx.audit(c, now, entry{Action: "user.erase", Target: string(u.ID), Network: u.NetworkID,
		Details: map[string]any{"keycloak_id": u.KeycloakID}})
	tx.endAllSessions(c, u.ID, "user.erase", now)
	tx.exec(`delete from refresh_tokens where session_id in (select session_id from sessions where user_id = $1)`, u.ID)
	tx.exec(`delete from sessions where user_id = $1`, u.ID)
	tx.exec(`delete from user_registrations where user_id = $1`, u.ID)
	tx.exec(`
		update users set email = '', username = '', first_name = null, last_name = null, phone = null, photo = null,
			is_active = false, deleted_at = coalesce(deleted_at, $2), updated_at = $2, updated_by = nullif($3, ''),
			last_login_at = null
		where user_id = $1`, u.ID, now, c.UserID)
	u.IsActive = false
	tx.revoke(u.revocation())
	for _, l := range mailLimits(u.Email, sourceWeb, day) {
		tx.reset(l)
	}
	tx.reset(mailDay(u.Email, sourceInternal))
	tx.reset(codesTried.of(u.Email))
	return kcTask(u.KeycloakID)
}

// removeErased removes what eraseUser has left (X3).
func (st *store) removeErased(ctx context.Context, t task, id userID) error {
	return st.locked(ctx, t, func(tx *txn) { tx.exec(`delete from users where user_id = $1 and email = ''`, id) })
}

// changes is what the audit log says of a change. Of personal data it says that they were
// changed, not what they were: the audit log can't be erased.
func changes(before, after user) map[string]any {
	changed := map[string]any{}
	was, is := reflect.ValueOf(before), reflect.ValueOf(after)
	for i := range was.NumField() {
		name, a, b := was.Type().Field(i).Tag.Get("json"), was.Field(i).Interface(), is.Field(i).Interface()
		switch {
		case a == b:
		case slices.Contains([]string{"role", "network_id", "station_id", "is_active", "is_verified"}, name):
			changed[name] = map[string]any{"before": a, "after": b}
		case slices.Contains([]string{"first_name", "last_name", "phone", "photo", "email", "username"}, name):
			changed[name] = "changed"
		}
	}
	return changed
}

// isActiveAdmin says whether u is an administrator who can act.
func (u user) isActiveAdmin() bool { return u.Role == roleAdmin && u.IsActive && u.IsVerified }

// onlyAdmin returns problemLastAdmin if there is no administrator but id. Changes of
// administrators wait for each other here; whoever waits locks nothing that the other
// one needs.
func onlyAdmin(ctx context.Context, tx *txn, id userID) error {
	tx.exec(`select pg_advisory_xact_lock(7204)`)
	if tx.changed(`
		select from users where role = 'admin' and is_active and is_verified and user_id <> $1 limit 1`, id) == 0 {
		return problemLastAdmin.withTarget(string(id))
	}
	return nil
}
