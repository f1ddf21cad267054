package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// state is a registration's status as PostgreSQL spells it.
type state string

const (
	pending   state = "pending"
	verified  state = "verified"
	expired   state = "expired"
	cancelled state = "cancelled"
)

// mailState says whether Keycloak has taken the verification mail.
type mailState string

const (
	mailSent   mailState = "sent"
	mailQueued mailState = "queued" // the repair loop keeps trying
)

// registration is one person's attempt to open an account. It only moves forward:
//
//	pending ─▶ verified
//	   ├─────▶ expired
//	   └─────▶ cancelled
type registration struct {
	ID           registrationID
	Email        string // as typed; compared without case
	Username     string
	FirstName    string
	LastName     string
	Phone        string
	TokenHash    string
	CodeHash     string
	State        state
	KeycloakID   string // empty until R3, and again after E3
	UserID       userID // empty until R3
	ResendCount  int
	ExpiresAt    time.Time // meaningful only while pending
	CreatedAt    time.Time
	Locale       string // of the mails
	WithPassword bool   // false: the person chooses it on Keycloak's page
	Mail         mailState
	MailedAt     time.Time // zero until the first mail went out
	CodeAttempts int
	Lease        string `db:"-"` // set while this caller holds it; see takeLease
}

func (reg registration) key() string { return string(reg.ID) }

const registrationColumns = `registration_id, email, username, coalesce(first_name, ''), coalesce(last_name, ''),
	coalesce(phone, ''), verification_token, coalesce(verification_code, ''), status, coalesce(keycloak_id, ''),
	coalesce(user_id, ''), resend_count, expires_at, created_at, locale, with_password, mail_state,
	coalesce(mailed_at, 'epoch'), code_attempts`

// oneRegistration returns the first registration of a query, or errNotFound.
func (st *store) oneRegistration(ctx context.Context, where string, args ...any) (registration, error) {
	return one[registration](ctx, st.pool, `select `+registrationColumns+` from user_registrations `+where, args...)
}

// registration returns one registration by its id, or errNotFound.
func (st *store) registration(ctx context.Context, id registrationID) (registration, error) {
	return st.oneRegistration(ctx, `where registration_id = $1`, id)
}

// registrationByToken returns the registration that the link's token belongs to.
//
// It returns errNotFound for a token that never existed; a registration that
// has since been verified, has expired or was cancelled is returned as it is,
// so that the answer can say which.
func (st *store) registrationByToken(ctx context.Context, hash string) (registration, error) {
	return st.oneRegistration(ctx, `where verification_token = $1`, hash)
}

// registrationByEmail returns the pending registration of an address, else its
// latest one, else errNotFound.
func (st *store) registrationByEmail(ctx context.Context, email string) (registration, error) {
	return st.oneRegistration(ctx, `where lower(email) = lower($1)
		order by status = 'pending' desc, created_at desc limit 1`, email)
}

// registrationByLogin returns the pending registration that someone who signs
// in with this e-mail address or username must mean, or errNotFound.
func (st *store) registrationByLogin(ctx context.Context, login string) (registration, error) {
	return st.oneRegistration(ctx, `where status = 'pending' and registration_id in (
			select registration_id from user_registrations where lower(email) = lower($1) and status = 'pending'
			union all
			select r.registration_id from users u join user_registrations r on r.user_id = u.user_id
			where lower(u.username) = lower($1) and u.deleted_at is null and r.status = 'pending')
		limit 1`, login)
}

// takeLease makes the caller the only one who may move the registration, until
// the deadline, and returns the row as it is then. errLeaseLost: another has it.
func (st *store) takeLease(ctx context.Context, id registrationID, owner string, now time.Time) (registration, error) {
	reg, err := one[registration](ctx, st.pool, `
		update user_registrations set lease_owner = $2, due_at = $4
		where registration_id = $1 and (lease_owner is null or due_at <= $3)
		returning `+registrationColumns, id, owner, now, now.Add(leaseTime))
	if errors.Is(err, errNotFound) {
		return reg, errLeaseLost
	}
	reg.Lease = owner
	return reg, err
}

// holds says whether the caller still has the lease.
func (st *store) holds(ctx context.Context, reg registration, now time.Time) (held bool, err error) {
	err = st.pool.QueryRow(ctx, `select coalesce(lease_owner = $2 and due_at > $3, false) from user_registrations where registration_id = $1`,
		reg.ID, reg.Lease, now).Scan(&held)
	return held, storeError(err)
}

// takeDue leases one registration that the repair loop must look at, due before
// the loop's start, or returns errNotFound. Instances that ask at the same time get
// different ones.
func (st *store) takeDue(ctx context.Context, owner string, start, now time.Time) (registration, error) {
	reg, err := one[registration](ctx, st.pool, `
		update user_registrations set lease_owner = $1, due_at = $3
		where registration_id = (select registration_id from user_registrations where due_at <= $2
			order by due_at limit 1 for update skip locked)
		returning `+registrationColumns, owner, start, now.Add(leaseTime))
	reg.Lease = owner
	return reg, err
}

// openRegistrations returns the registrations of an address that are not settled:
// ended ones that still owe Keycloak a deletion, then the pending one.
func (st *store) openRegistrations(ctx context.Context, email string) ([]registrationID, error) {
	rows, _ := st.pool.Query(ctx, `
		select registration_id from user_registrations where lower(email) = lower($1) and due_at is not null
		order by status = 'pending'`, email)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[registrationID])
	return ids, storeError(err)
}

// release ends the lease and says when the repair loop must look again; the zero
// time means never, the registration is settled. It does nothing to a lease that
// has become another's.
func (st *store) release(ctx context.Context, reg registration, due time.Time) error {
	_, err := st.pool.Exec(ctx, `
		update user_registrations set lease_owner = null, due_at = $3
		where registration_id = $1 and lease_owner = $2`, reg.ID, reg.Lease, nullTime(due))
	return storeError(err)
}

// addRegistration inserts a pending registration under the caller's lease and, in
// the same transaction, cancels the one that it replaces (C1, R1).
//
// It returns errConflict when a user has the address or username, errRace when
// another registration of that address came first, and errLeaseLost when the one
// to replace is no longer the caller's.
func (st *store) addRegistration(ctx context.Context, c caller, reg, replaced registration, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		if replaced.ID != "" {
			if err := moveRegistration(ctx, tx, c, replaced, cancelled, "replaced", now); err != nil {
				return err
			}
		}
		// An unverified user with this address belongs to a registration of this
		// address, which is or will be replaced. Anybody else is in the way.
		var taken bool
		if err := tx.QueryRow(ctx, `
			select exists (select from users where deleted_at is null
				and (lower(email) = lower($1) or lower(username) = lower($2))
				and (is_verified or source = 'internal' or lower(email) <> lower($1)))`,
			reg.Email, reg.Username).Scan(&taken); err != nil {
			return err
		}
		if taken {
			return errConflict
		}
		if _, err := tx.Exec(ctx, `
			insert into user_registrations (registration_id, email, username, first_name, last_name, phone,
				verification_token, verification_code, status, expires_at, created_at, ip_address, user_agent,
				locale, with_password, mail_state, lease_owner, due_at)
			values ($1, $2, $3, $4, $5, $6, $7, $8, 'pending', $9, $10, $11, $12, $13, $14, 'queued', $15, $16)`,
			reg.ID, reg.Email, reg.Username, nullString(reg.FirstName), nullString(reg.LastName), nullString(reg.Phone),
			reg.TokenHash, reg.CodeHash, reg.ExpiresAt, now, c.Address, c.UserAgent,
			reg.Locale, reg.WithPassword, reg.Lease, now.Add(leaseTime)); err != nil {
			return err // the only unique value that can exist is the address of a pending registration
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "registration.begin", Target: string(reg.ID)})
	})
}

// adopt records what Keycloak has accepted (R3): the users row, its ids and the
// hashes of the secrets that its user carries. Repeating it changes nothing.
// errConflict: a live user has the address or username; errLeaseLost.
func (st *store) adopt(ctx context.Context, c caller, reg registration, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, phone, created_at, updated_at)
			values ($1, $2, $3, $4, $5, $6, $7, $8, $8) on conflict (user_id) do nothing`,
			reg.UserID, reg.KeycloakID, reg.Email, reg.Username, nullString(reg.FirstName), nullString(reg.LastName),
			nullString(reg.Phone), now); err != nil {
			return err
		}
		if err := leased(ctx, tx, reg, `
			update user_registrations set keycloak_id = $3, user_id = $4, verification_token = $5, verification_code = $6
			where registration_id = $1 and lease_owner = $2 and status = 'pending'`,
			reg.KeycloakID, reg.UserID, reg.TokenHash, reg.CodeHash); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.create", Target: string(reg.UserID),
			Details: map[string]any{"registration_id": reg.ID, "source": "web", "role": "user"}})
	})
}

// leased makes a change that only the holder of the lease may make: $1 is the
// registration, $2 the holder. No row means errLeaseLost.
func leased(ctx context.Context, q querier, reg registration, sql string, args ...any) error {
	tag, err := q.Exec(ctx, sql, append([]any{reg.ID, reg.Lease}, args...)...)
	if err == nil && tag.RowsAffected() == 0 {
		return errLeaseLost
	}
	return storeError(err)
}

// moveRegistration is every step forward out of pending but verification: the
// state and its audit entry, in the caller's transaction. From here on the repair
// loop owes Keycloak a deletion (E2, C2). It returns errLeaseLost.
func moveRegistration(ctx context.Context, tx pgx.Tx, c caller, reg registration, to state, reason string, now time.Time) error {
	if err := leased(ctx, tx, reg, `
		update user_registrations set status = $3, mail_state = 'sent'
		where registration_id = $1 and lease_owner = $2 and status = 'pending'`, to); err != nil {
		return err
	}
	return writeAudit(ctx, tx, c, now, entry{Action: "registration." + string(to), Target: string(reg.ID), Reason: reason,
		Details: map[string]any{"user_id": reg.UserID}})
}

// endRegistration expires or cancels a leased pending registration (E1, C1).
func (st *store) endRegistration(ctx context.Context, c caller, reg registration, to state, reason string, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error { return moveRegistration(ctx, tx, c, reg, to, reason, now) })
}

// deleteUnverifiedUser removes the users row of an ended registration, after Keycloak has
// deleted its user (E3). Nothing is owed any more.
func (st *store) deleteUnverifiedUser(ctx context.Context, c caller, reg registration, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		if err := leased(ctx, tx, reg, `
			update user_registrations set keycloak_id = null, user_id = null, lease_owner = null, due_at = null
			where registration_id = $1 and lease_owner = $2 and status in ('expired', 'cancelled')`); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `delete from users where user_id = $1 and not is_verified`, reg.UserID)
		if err != nil || tag.RowsAffected() == 0 {
			return err // no row: the registration never came as far as R3
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "user.remove", Target: string(reg.UserID),
			Details: map[string]any{"registration_id": reg.ID}})
	})
}

// rekeyCode replaces the code's hash, or returns errLeaseLost.
func (st *store) rekeyCode(ctx context.Context, reg registration, codeHash string) error {
	return leased(ctx, st.pool, reg, `
		update user_registrations set verification_code = $3
		where registration_id = $1 and lease_owner = $2 and status = 'pending'`, codeHash)
}

// conclude makes the registration verified and its user an account (V4). It
// returns errLeaseLost.
func (st *store) conclude(ctx context.Context, c caller, reg registration, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		if err := leased(ctx, tx, reg, `
			update user_registrations set status = 'verified', verified_at = $3, mail_state = 'sent',
				lease_owner = null, due_at = null
			where registration_id = $1 and lease_owner = $2 and status = 'pending'`, now); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `update users set is_verified = true, updated_at = $2 where user_id = $1`, reg.UserID, now); err != nil {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "registration.verified", Target: string(reg.ID),
			Details: map[string]any{"user_id": reg.UserID}})
	})
}

// countCodeAttempt counts a guess before it is compared, so that two hundred
// parallel guesses count as two hundred. It reports whether this one may be made.
func (st *store) countCodeAttempt(ctx context.Context, id registrationID) (bool, error) {
	tag, err := st.pool.Exec(ctx, `
		update user_registrations set code_attempts = code_attempts + 1
		where registration_id = $1 and code_attempts < $2`, id, codeAttempts)
	return tag.RowsAffected() == 1, storeError(err)
}

// mailClaim is the right to send one mail.
type mailClaim struct {
	Resend    bool      // count it as asked for by the person, and begin the time anew
	CodeHash  string    // of the code that the mail will show
	ExpiresAt time.Time // of the registration, from this mail on
}

// claimMail takes one mail out of the budgets of the address, before it is sent:
// at most one in a cooldown, at most mailsPerDay a day. It returns a limited error
// with the time to wait, and has then changed nothing; or errLeaseLost.
func (st *store) claimMail(ctx context.Context, c caller, reg registration, m mailClaim, cooldown time.Duration, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		for _, l := range mailLimits(reg.Email, cooldown) {
			if err := hit(ctx, tx, l, now); err != nil {
				return err
			}
		}
		resend := 0
		if m.Resend {
			resend = 1
		}
		if err := leased(ctx, tx, reg, `
			update user_registrations set mail_state = 'queued', verification_code = $3, code_attempts = 0, expires_at = $4,
				resend_count = resend_count + $5
			where registration_id = $1 and lease_owner = $2 and status = 'pending'`,
			m.CodeHash, m.ExpiresAt, resend); err != nil || !m.Resend {
			return err
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "registration.resend", Target: string(reg.ID)})
	})
}

// mailHandedOver records that Keycloak has taken the mail (R5) and ends the lease.
func (st *store) mailHandedOver(ctx context.Context, c caller, reg registration, due, now time.Time) error {
	return st.tx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			update user_registrations set mail_state = 'sent', mailed_at = $3, lease_owner = null, due_at = $4
			where registration_id = $1 and lease_owner = $2 and status = 'pending'`, reg.ID, reg.Lease, now, due)
		if err != nil || tag.RowsAffected() == 0 {
			return err // no row: too slow, another concludes; the mail is out all the same
		}
		return writeAudit(ctx, tx, c, now, entry{Action: "registration.mail", Target: string(reg.ID)})
	})
}

// refundMail gives a claim back for a mail that was certainly not sent.
func (st *store) refundMail(ctx context.Context, email string, cooldown time.Duration) error {
	keys := []string{}
	for _, l := range mailLimits(email, cooldown) {
		keys = append(keys, l.Key)
	}
	_, err := st.pool.Exec(ctx, `update rate_limits set hits = hits - 1 where key = any($1) and hits > 0`, keys)
	return storeError(err)
}
