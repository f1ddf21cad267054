package main

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// user is an account, as PostgreSQL knows it and as the API shows it.
type user struct {
	ID               userID     `json:"user_id" example:"USR-V1StGXR8_Z5jdHi6"`
	KeycloakID       string     `json:"keycloak_id" example:"5f2f4c0e-8a55-4c43-9a5e-2f6d7f6f3c11" description:"Empty while Keycloak does not have the user."`
	Email            string     `json:"email" example:"ada@example.com"`
	Username         string     `json:"username" example:"ada"`
	FirstName        string     `json:"first_name" example:"Ada"`
	LastName         string     `json:"last_name" example:"Lovelace"`
	Phone            string     `json:"phone" example:"+4930123456"`
	Photo            string     `json:"photo"`
	IsVerified       bool       `json:"is_verified"`
	Role             string     `json:"role" enum:"user,admin,partner,operator"`
	NetworkID        string     `json:"network_id" description:"Empty: none."`
	StationID        string     `json:"station_id" description:"Empty: none."`
	Source           string     `json:"source" enum:"web,internal"`
	IsActive         bool       `json:"is_active"`
	LastLoginAt      *time.Time `json:"last_login_at" nullable:"true"`
	CreatedAt        time.Time  `json:"created_at"`
	UpdatedAt        time.Time  `json:"updated_at"`
	DeletedAt        *time.Time `json:"deleted_at" nullable:"true"`
	RegistrationOpen bool       `json:"-"` // the life of a registration has it in hand; not so if only a new address is unconfirmed
}

// unborn is what the keycloak_id of a user begins with that Keycloak does not have yet.
const unborn = "unborn:"

const userColumns = `user_id, regexp_replace(keycloak_id, '^unborn:.*', ''), email, username, coalesce(first_name, ''), coalesce(last_name, ''), coalesce(phone, ''),
	coalesce(photo, ''), is_verified, role, network_id, station_id, source, is_active, last_login_at, created_at, updated_at, deleted_at,
	source = 'web' and not is_verified and 0 < (select count(*) from user_registrations r where r.user_id = users.user_id and r.status <> 'verified')`

// user returns one user, deleted or not, or errNotFound.
func (st *store) user(ctx context.Context, id userID) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where user_id = $1`, id)
}

// userByEmail returns the live user with an address, or errNotFound.
func (st *store) userByEmail(ctx context.Context, email string) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where lower(email) = lower($1) and deleted_at is null`, email)
}

// userByKeycloakID returns the user whose tokens have this sub, deleted or not,
// or errNotFound.
func (st *store) userByKeycloakID(ctx context.Context, id string) (user, error) {
	return one[user](ctx, st.pool, `select `+userColumns+` from users where keycloak_id = $1`, id)
}

// accountByLogin returns the id of the live user that an e-mail address or a username
// belongs to, or "".
func (st *store) accountByLogin(ctx context.Context, login string) (string, error) {
	id, err := one[struct{ ID string }](ctx, st.pool, `
		select coalesce(min(user_id), '') from users where deleted_at is null and (lower(email) = lower($1) or lower(username) = lower($1))`, login)
	return id.ID, err
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
		where (created_at, user_id) < ($1, $2)
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

// addUser inserts an internal user that Keycloak does not have yet (I1). errConflict:
// a live user has the address or username, or somebody registers with the address.
// problemResendLimit: it gets no more mails today.
func (st *store) addUser(ctx context.Context, c caller, u user, locale string) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, phone, role, network_id, station_id,
				source, created_at, updated_at, created_by, locale, invitation_due, due_at)
			select $1, $2, $3::varchar, $4, $5, $6, $7, $8, $9, $10, 'internal', $11, $11, $12, $13, true, $14
			where not exists (select from user_registrations where lower(email) = lower($3::varchar) and status = 'pending')`,
			u.ID, unborn+string(u.ID), u.Email, u.Username, nullString(u.FirstName), nullString(u.LastName), nullString(u.Phone),
			u.Role, u.NetworkID, u.StationID, u.CreatedAt, string(c.UserID), locale, u.CreatedAt.Add(time.Minute))
		if err == nil && tag.RowsAffected() == 0 {
			err = errConflict
		}
		if err == nil { // an invitation is a mail to whoever is named
			err = hit(ctx, tx, mailsADay(u.Email), u.CreatedAt)
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
		return writeAudit(ctx, tx, c, now, entry{Action: "user.remove", Target: string(u.ID), Reason: "keycloak", Network: u.NetworkID})
	})
}

// changeUser changes a user, records what has changed, and revokes the tokens that say
// something else; those of a deleted user with its sessions, which it returns (U1).
//
// It returns errNotFound, errConflict when the address or username is another's by now,
// problemLastAdmin, or the error of change.
func (st *store) changeUser(ctx context.Context, c caller, id userID, action string, change func(user) (user, error), now time.Time) (u user, ended []session, err error) {
	err = st.tx(ctx, func(tx pgx.Tx) error {
		before, err := one[user](ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, id)
		if err != nil {
			return err
		}
		if u, err = change(before); err != nil || u == before {
			return err
		}
		if before.isActiveAdmin() && !u.isActiveAdmin() && action != syncAction { // what has happened elsewhere has happened
			if err := onlyAdmin(ctx, tx, id); err != nil {
				return err
			}
		}
		u.UpdatedAt = now
		if _, err := tx.Exec(ctx, `
			update users set first_name = $2, last_name = $3, phone = $4, photo = $5, role = $6, network_id = $7, station_id = $8,
				is_active = $9, deleted_at = $10, updated_at = $11, updated_by = $12, due_at = coalesce(due_at, $13),
				enable_due = $9 and (enable_due or not is_active), email = $14, username = $15, is_verified = $16, names_due = names_due or $17
			where user_id = $1`,
			id, nullString(u.FirstName), nullString(u.LastName), nullString(u.Phone), nullString(u.Photo), u.Role, u.NetworkID, u.StationID,
			u.IsActive, u.DeletedAt, now, nullString(string(c.UserID)), now.Add(time.Minute),
			u.Email, u.Username, u.IsVerified,
			action != syncAction && (u.FirstName != before.FirstName || u.LastName != before.LastName)); err != nil {
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
			if err := revoke(ctx, tx, u.revocation()); err != nil {
				return err
			}
		}
		if before.IsVerified != u.IsVerified {
			changed["is_verified"] = map[string]any{"before": before.IsVerified, "after": u.IsVerified}
		}
		// Of personal data the audit log has that it was changed, not what it was: it can't be erased.
		for name, values := range map[string][2]string{"first_name": {before.FirstName, u.FirstName}, "last_name": {before.LastName, u.LastName},
			"phone": {before.Phone, u.Phone}, "photo": {before.Photo, u.Photo}, "email": {before.Email, u.Email}, "username": {before.Username, u.Username}} {
			if values[0] != values[1] {
				changed[name] = "changed"
			}
		}
		if !u.IsActive {
			if ended, err = endSessions(ctx, tx, c, id, "", entry{Action: "session.end", Reason: "user deleted"}, now); err != nil {
				return err
			}
		}
		return writeAudit(ctx, tx, c, now, entry{Action: action, Target: string(id), Network: before.NetworkID, Details: changed})
	})
	return u, ended, err
}

// isActiveAdmin says whether u is an administrator who can act.
func (u user) isActiveAdmin() bool { return u.Role == roleAdmin && u.IsActive && u.IsVerified }

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
		return problemLastAdmin.withTarget(string(id))
	}
	return err
}

// owedUser is a user and what Keycloak does not have of it yet.
type owedUser struct {
	user
	Due        bool   // something is owed
	Invitation bool   // its mail
	Enable     bool   // it was restored
	Names      bool   // changed here; otherwise Keycloak's are right
	Locale     string // of the invitation
	Lease      string // whose the row is until due_at
}

func (u owedUser) key() string { return string(u.ID) }

const owedUserColumns = userColumns + `, due_at is not null, invitation_due, enable_due, names_due, locale, coalesce(lease_owner, '')`

// leaseUser makes the caller the only one who may settle a user that owes something, for
// leaseTime. It returns the user as it is, with another's Lease if another has it.
// errNotFound: there is no such user.
func (st *store) leaseUser(ctx context.Context, id userID, owner string, now time.Time) (owedUser, error) {
	u, err := one[owedUser](ctx, st.pool, `
		update users set lease_owner = $2, due_at = $4
		where user_id = $1 and due_at is not null and (lease_owner is null or lease_owner = $2 or due_at <= $3)
		returning `+owedUserColumns, id, owner, now, now.Add(leaseTime))
	if errors.Is(err, errNotFound) {
		return one[owedUser](ctx, st.pool, `select `+owedUserColumns+` from users where user_id = $1`, id)
	}
	return u, err
}

// takeDueUser is takeDue for users.
func (st *store) takeDueUser(ctx context.Context, owner string, start, now time.Time) (owedUser, error) {
	return one[owedUser](ctx, st.pool, `
		update users set lease_owner = $1, due_at = $3
		where user_id = (select user_id from users where due_at <= $2 order by due_at limit 1 for update skip locked)
		returning `+owedUserColumns, owner, start, now.Add(leaseTime))
}

// bornUser records the id that Keycloak has given a user (I3).
func (st *store) bornUser(ctx context.Context, u user) error {
	_, err := st.pool.Exec(ctx, `update users set keycloak_id = $2 where user_id = $1 and keycloak_id = $3`, u.ID, u.KeycloakID, unborn+string(u.ID))
	return storeError(err)
}

// invited records that Keycloak has taken the invitation (I4).
func (st *store) invited(ctx context.Context, c caller, id userID, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `update users set invitation_due = false where user_id = $1 and invitation_due`, id)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.invite", Target: string(id)})
	})
}

// userSettled records that Keycloak has all of u (U3). It changes nothing and says so if
// u is not all there is any more, or the lease is another's.
func (st *store) userSettled(ctx context.Context, u owedUser) (bool, error) {
	tag, err := st.pool.Exec(ctx, `update users set due_at = null, lease_owner = null, enable_due = false, names_due = false
		where user_id = $1 and lease_owner = $2 and updated_at = $3`, u.ID, u.Lease, u.UpdatedAt)
	return tag.RowsAffected() == 1, storeError(err)
}

// releaseUser lets the loop try again at a time.
func (st *store) releaseUser(ctx context.Context, u owedUser, due time.Time) error {
	_, err := st.pool.Exec(ctx, `update users set lease_owner = null, due_at = $3 where user_id = $1 and lease_owner = $2`, u.ID, u.Lease, due)
	return storeError(err)
}

// renewRevocation renews the revocation of tokens that say something else than what is true
// of a user, since Keycloak goes on issuing them. The row is locked, as in changeUser: the
// later revocation counts, and must not be of what was true before.
func (st *store) renewRevocation(ctx context.Context, id userID) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		u, err := one[user](ctx, tx, `select `+userColumns+` from users where user_id = $1 for update`, id)
		if errors.Is(err, errNotFound) { // Keycloak has refused to create it
			return nil
		} else if err != nil {
			return err
		}
		return revoke(ctx, tx, u.revocation())
	})
}

// confirmUser makes an invited user verified: Keycloak lets in only whose address is.
func (st *store) confirmUser(ctx context.Context, c caller, id userID, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `update users set is_verified = true, updated_at = $2 where user_id = $1 and source = 'internal' and not is_verified`, id, now)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.verified", Target: string(id)})
	})
}
