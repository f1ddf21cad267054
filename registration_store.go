package main

import (
	"context"
	"errors"
	"time"
)

const registrationColumns = `registration_id, email, username, coalesce(first_name, ''), coalesce(last_name, ''),
	coalesce(phone, ''), verification_token, coalesce(verification_code, ''), status, coalesce(keycloak_id, ''),
	coalesce(user_id, ''), resend_count, expires_at, created_at, locale, mail_state, mail_refused_at,
	source, role, network_id, station_id, coalesce(created_by, '')`

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

// registrationByEmail returns the pending registration of an address, else the latest that
// was verified, else errNotFound. Those that have ended otherwise have no address any more.
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

// addRegistration inserts a pending registration, and locks its task for the caller (R1).
//
// It returns errConflict when an account has the address or username, and errRace when the
// address has a pending registration.
func (st *store) addRegistration(ctx context.Context, c caller, reg registration, now time.Time) (t task, err error) {
	err = st.tx(ctx, func(tx *txn) {
		tx.exec(`
			insert into user_registrations (registration_id, email, username, first_name, last_name, phone,
				verification_token, status, expires_at, created_at, ip_address, user_agent,
				locale, mail_state, source, role, network_id, station_id, created_by)
			values ($1, $2, $3, nullif($4, ''), nullif($5, ''), nullif($6, ''), $7, 'pending', $8, $9, $10, $11, $12,
				'queued', $13, $14, $15, $16, nullif($17, ''))`,
			reg.ID, reg.Email, reg.Username, reg.FirstName, reg.LastName, reg.Phone, reg.TokenHash, reg.ExpiresAt, now,
			c.Address, c.UserAgent, reg.Locale, reg.Source, reg.Role, reg.NetworkID, reg.StationID, reg.CreatedBy)
		taken := later[struct{ ID userID }](tx, `select user_id from users where deleted_at is null
			and (lower(email) = lower($1) or lower(username) in (lower($1), lower($2))) limit 1`, reg.Email, reg.Username)
		if reg.Source == sourceInternal {
			tx.reset(mailsOfCooldown.of(mailbox(reg.Email))) // it waits for nobody's mail
		}
		t, err = tryLock(ctx, tx, string(reg.ID), lockTime, now)
		tx.check(err)
		if _, err := taken(); err == nil {
			tx.check(errConflict)
		}
		tx.audit(c, now, entry{Action: "registration.begin", Target: string(reg.ID), Network: reg.NetworkID,
			Details: map[string]any{"source": reg.Source, "role": reg.Role}})
	})
	return t, err
}

// attachKeycloakUser records what Keycloak has accepted (R3): the users row, its ids and the
// hash of the token that its user carries. Until the confirmation the username is the one
// that Keycloak has. Repeating it changes nothing. It returns errConflict when a live user has
// the address, and errLocked.
func (st *store) attachKeycloakUser(ctx context.Context, c caller, t task, reg registration, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`
			insert into users (user_id, keycloak_id, email, username, first_name, last_name, phone, source, role,
				network_id, station_id, created_at, updated_at, created_by)
			values ($1, $2, $3, $4, nullif($5, ''), nullif($6, ''), nullif($7, ''), $8, $9, $10, $11, $12, $12,
				nullif($13, '')) on conflict (user_id) do nothing`,
			reg.UserID, reg.KeycloakID, reg.Email, defaultUsername(reg.Email, reg.UserID), reg.FirstName, reg.LastName,
			reg.Phone, reg.Source, reg.Role, reg.NetworkID, reg.StationID, now, reg.CreatedBy)
		tx.exec(`
			update user_registrations set keycloak_id = $2, user_id = $3, verification_token = $4
			where registration_id = $1`, reg.ID, reg.KeycloakID, reg.UserID, reg.TokenHash)
		tx.audit(c, now, entry{Action: "user.create", Target: string(reg.UserID), Network: reg.NetworkID,
			Details: map[string]any{"registration_id": reg.ID, "source": reg.Source, "role": reg.Role,
				"network_id": reg.NetworkID, "station_id": reg.StationID}})
	})
}

// reinvite makes a pending registration an invitation with this role and scope, and asks for
// its mail.
func (st *store) reinvite(ctx context.Context, c caller, t task, reg registration, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`
			update user_registrations set source = 'internal', role = $2, network_id = $3, station_id = $4, created_by = $5,
				expires_at = $6, mail_state = 'queued', username = $7, first_name = nullif($8, ''),
				last_name = nullif($9, ''), phone = nullif($10, ''), locale = $11, mail_refused_at = null
			where registration_id = $1`, reg.ID, reg.Role, reg.NetworkID, reg.StationID, reg.CreatedBy, reg.ExpiresAt,
			reg.Username, reg.FirstName, reg.LastName, reg.Phone, reg.Locale)
		tx.reset(mailsOfCooldown.of(mailbox(reg.Email))) // it waits for nobody's mail
		tx.exec(`
			update users set source = 'internal', role = $2, network_id = $3, station_id = $4, created_by = $5, updated_at = $6,
				first_name = nullif($7, ''), last_name = nullif($8, ''), phone = nullif($9, '')
			where user_id = $1`, reg.UserID, reg.Role, reg.NetworkID, reg.StationID, reg.CreatedBy, now,
			reg.FirstName, reg.LastName, reg.Phone)
		tx.audit(c, now, entry{Action: "user.invite", Target: string(reg.UserID), Network: reg.NetworkID,
			Details: map[string]any{"registration_id": reg.ID, "role": reg.Role,
				"network_id": reg.NetworkID, "station_id": reg.StationID}})
	})
}

// endRegistration expires or cancels a pending registration (E1). Its personal data go, and
// with them the users row, which nobody has signed in to. From here on its task deletes
// its user in Keycloak (E2).
func (st *store) endRegistration(ctx context.Context, c caller, t task, reg registration,
	to state, reason string, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`
			update user_registrations set status = $2, ended_at = $3, user_id = null, mail_state = 'sent',
				email = '', username = '', first_name = null, last_name = null, phone = null, ip_address = null, user_agent = null
			where registration_id = $1`, reg.ID, to, now)
		if tx.changed(`delete from users where user_id = $1`, reg.UserID) == 1 { // else it never came as far as R3
			tx.audit(c, now, entry{Action: "user.remove", Target: string(reg.UserID), Network: reg.NetworkID,
				Details: map[string]any{"registration_id": reg.ID}})
		}
		tx.audit(c, now, entry{Action: "registration." + string(to), Target: string(reg.ID), Reason: reason,
			Network: reg.NetworkID, Details: map[string]any{"user_id": reg.UserID}})
	})
}

// detachKeycloakUser records that Keycloak has nothing of an ended registration any more (E3).
func (st *store) detachKeycloakUser(ctx context.Context, t task, id registrationID) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`update user_registrations set keycloak_id = null where registration_id = $1`, id)
	})
}

// prepareVerified keeps what the confirmation brings along and Keycloak will not have: the
// phone number, and the code under a key that outlives V3.
func (st *store) prepareVerified(ctx context.Context, t task, reg registration) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`update user_registrations set verification_code = $2, phone = nullif($3, '') where registration_id = $1`,
			reg.ID, reg.CodeHash, reg.Phone)
	})
}

// markVerified makes the registration verified and its user an account, with what Keycloak has
// of it now (V4). Its task is done; what else differs is reconciled. It returns errLocked, and
// errConflict when a live user has the username.
func (st *store) markVerified(ctx context.Context, c caller, t task, reg registration, differs bool,
	now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.exec(`
			update user_registrations set status = 'verified', verified_at = $2, mail_state = 'sent', username = $3,
				first_name = nullif($4, ''), last_name = nullif($5, '') where registration_id = $1`,
			reg.ID, now, reg.Username, reg.FirstName, reg.LastName)
		tx.exec(`
			update users set is_verified = true, updated_at = $2, username = $3, first_name = nullif($4, ''),
				last_name = nullif($5, ''), phone = nullif($6, '') where user_id = $1`,
			reg.UserID, now, reg.Username, reg.FirstName, reg.LastName, reg.Phone)
		tx.audit(c, now, entry{Action: "registration.verified", Target: string(reg.ID), Network: reg.NetworkID,
			Details: map[string]any{"user_id": reg.UserID}})
		if differs {
			tx.check(enqueue(ctx, tx, now, kcTask(reg.KeycloakID)))
		}
		tx.check(finish(ctx, tx, t, never))
	})
}

// claimMail takes one mail out of the limits of the address, before it is sent: at most one in
// a cooldown, and so many a day. It returns a limit's problem with the time to wait,
// and has then changed nothing; or errLocked.
func (st *store) claimMail(ctx context.Context, c caller, t task, reg registration, resend bool,
	cooldown time.Duration, now time.Time) error {
	return st.locked(ctx, t, func(tx *txn) {
		tx.check(hit(ctx, tx, now, mailLimits(reg.Email, reg.Source, cooldown)...))
		tx.exec(`
			update user_registrations set mail_state = 'queued', verification_code = $2, expires_at = $3,
				resend_count = resend_count + $4::boolean::integer
			where registration_id = $1`, reg.ID, reg.CodeHash, reg.ExpiresAt, resend)
		if resend {
			tx.audit(c, now, entry{Action: "registration.resend", Target: string(reg.ID), Network: reg.NetworkID})
		}
	})
}

// requestResend asks the queue for another mail to an address, if it has a registration that
// may get one now. It is audited in any case: so it takes as long.
func (st *store) requestResend(ctx context.Context, c caller, email string, cfg config, now time.Time) error {
	reg, err := st.oneRegistration(ctx, `where lower(email) = lower($1) and status = 'pending' and expires_at > $2
		and mail_state <> 'queued' and resend_count + 1 < $3`, email, now, cfg.ResendLimit)
	if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	limited := st.peek(ctx, now, mailLimits(email, reg.Source, cfg.ResendCooldown)...)
	if limited != nil && !errors.As(limited, new(problem)) {
		return limited
	}
	return st.tx(ctx, func(tx *txn) {
		e := entry{Action: "registration.resend", Target: string(reg.ID), Network: reg.NetworkID}
		queued := err == nil && limited == nil
		if queued {
			tx.check(enqueue(ctx, tx, now, string(reg.ID))) // first, as all lock the task before the registration
			queued = tx.changed(`
				update user_registrations set mail_state = 'queued', resend_count = resend_count + 1, expires_at = $2
				where registration_id = $1 and status = 'pending'`, reg.ID, now.Add(cfg.lifetime(reg.Source))) == 1
		}
		if !queued {
			e.Outcome, e.Reason = "refused", problemRegistrationNotFound.slug()
		}
		tx.audit(c, now, e)
	})
}

// mailHandedOver records that Keycloak has taken the mail (R5). The code in it may be guessed
// as often as any. A flow that was too slow for its lock changes nothing: another goes on, and
// the mail is out all the same.
func (st *store) mailHandedOver(ctx context.Context, c caller, t task, reg registration, now time.Time) error {
	err := st.locked(ctx, t, func(tx *txn) {
		tx.exec(`
			update user_registrations set mail_state = 'sent', mailed_at = $2, mail_refused_at = null
			where registration_id = $1`, reg.ID, now)
		tx.reset(codesTried.of(reg.Email))
		tx.audit(c, now, entry{Action: "registration.mail", Target: string(reg.ID), Network: reg.NetworkID})
	})
	if errors.Is(err, errLocked) {
		return nil
	}
	return err
}

// mailRefused records that Keycloak's mail server has refused a mail, and gives its claim back.
// It reports whether the mail is given up: refused for refusalTime, while others went out.
func (st *store) mailRefused(ctx context.Context, c caller, reg registration, cooldown time.Duration, now time.Time) (
	givenUp bool, err error) {
	err = st.tx(ctx, func(tx *txn) {
		tx.check(refund(ctx, tx, mailLimits(reg.Email, reg.Source, cooldown)...))
		mail, err := one[struct{ GivenUp bool }](ctx, tx, `
			update user_registrations set mail_refused_at = coalesce(mail_refused_at, $2),
				mail_state = case when mail_refused_at <= $3
					and mail_refused_at < (select max(mailed_at) from user_registrations) then 'failed' else 'queued' end
			where registration_id = $1 and status = 'pending'
			returning mail_state = 'failed'`, reg.ID, now, now.Add(-refusalTime))
		tx.check(err)
		if givenUp = mail.GivenUp; givenUp {
			tx.audit(c, now, entry{Action: "registration.mail", Target: string(reg.ID), Outcome: "failed",
				Reason: "refused", Network: reg.NetworkID})
		}
	})
	return givenUp, err
}
