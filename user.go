package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// The roles, from the least to the greatest.
const (
	roleUser     = "user"
	roleOperator = "operator"
	rolePartner  = "partner"
	roleAdmin    = "admin"
)

var roles = []string{roleUser, roleOperator, rolePartner, roleAdmin}

// action is what somebody does with a user.
type action string

const (
	actRead     action = "read"
	actEdit     action = "edit"     // names, phone, photo
	actAssign   action = "assign"   // role, network, station
	actCreate   action = "create"   // an internal user
	actDelete   action = "delete"   // and restore
	actErase    action = "erase"    // for good
	actSessions action = "sessions" // see and end them
)

// Where a user comes from.
const (
	sourceWeb      = "web"      // registered itself
	sourceInternal = "internal" // created by somebody
)

// may is the whole rule of role and scope: whether p may do something with u, as u is
// and as it will be. It returns nil, problemForbidden, or problemUserNotFound for
// somebody whom p may not see at all.
func (p principal) may(do action, u user) error {
	self := p.UserID == u.ID
	network := u.NetworkID != "" && u.NetworkID == p.NetworkID
	station := network && u.StationID != "" && u.StationID == p.StationID
	admin, partner, operator := p.is(roleAdmin), p.is(rolePartner) && network, p.is(roleOperator) && station
	manages := admin || partner && (u.Role == roleUser || u.Role == roleOperator)
	switch {
	case do == actCreate && !manages:
		return problemForbidden // no user exists yet, so 403 reveals nothing
	case !self && !admin && !partner && !operator:
		return problemUserNotFound
	case do == actRead, do == actEdit && self, do == actSessions && self:
		return nil
	case self && (do == actAssign || do == actDelete || do == actErase):
		return problemForbidden.withDetail("Nobody changes their own role or scope, or deletes themselves.")
	case !manages, do == actErase && !admin:
		return problemForbidden
	case u.Registration != "" && do != actDelete && do != actErase: // its registration alone may change it
		return problemAccountNotVerified.withDetail("The e-mail address of this account is not confirmed yet.")
	}
	return nil
}

// principal is the user as an access token that was issued now would say.
func (u user) principal() principal {
	return principal{UserID: u.ID, Subject: u.KeycloakID, Roles: []string{u.Role},
		NetworkID: u.NetworkID, StationID: u.StationID}
}

type usersIn struct {
	pageIn
	Role           string `query:"role" enum:"user,admin,partner,operator" description:"Only users with this role."`
	NetworkID      string `query:"network_id" maxLength:"32"`
	StationID      string `query:"station_id" maxLength:"32"`
	Source         string `query:"source" enum:"web,internal" description:"web: registered themselves; internal: created by somebody."`
	Query          string `query:"q" as:"search" minLength:"3" maxLength:"100" description:"A part of the e-mail address, username or name. Behind an @ it is a domain, in either spelling."`
	IncludeDeleted bool   `query:"include_deleted"`
}

// users lists whom the caller may see, the latest first.
func (s *server) users(ctx context.Context, c caller, in usersIn) (listOut[user], error) {
	return pageOf(in.pageIn, func(before cursor) ([]user, error) { return s.store.users(ctx, c.principal, in, before) },
		func(u user) (user, cursor) { return u, cursor{u.CreatedAt, string(u.ID)} })
}

type userIn struct {
	ID userID `path:"user_id" pattern:"^(me|USR-[A-Za-z0-9_-]{16})$" example:"USR-V1StGXR8_Z5jdHi6" description:"Or me."`
}

// user shows one user; "me" is the caller.
func (s *server) user(ctx context.Context, c caller, in userIn) (user, error) {
	return s.target(ctx, c, in.ID, actRead)
}

// target returns the user that a request is about, if the caller may do that with it.
func (s *server) target(ctx context.Context, c caller, id userID, do action) (user, error) {
	if id == "me" {
		id = c.UserID
	}
	u, err := s.store.user(ctx, id)
	if errors.Is(err, errNotFound) || err == nil && u.erased() {
		return u, problemUserNotFound.withTarget(string(id))
	} else if err != nil {
		return u, err
	}
	var refused problem
	if errors.As(c.may(do, u), &refused) {
		return u, refused.withTarget(string(id))
	}
	return u, nil
}

type patchUserIn struct {
	userIn
	FirstName *string `json:"first_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Grace"`
	LastName  *string `json:"last_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Hopper"`
	Phone     *string `json:"phone,omitempty" as:"phone" pattern:"^(\\+[ ()./-]*[1-9]([ ()./-]*[0-9]){6,14}[ ()./-]*)?$" example:"+4930123456" description:"Empty: none."`
	Photo     *string `json:"photo,omitempty" maxLength:"2000" pattern:"^(https://[^\\s\"'<>]+)?$" mismatch:"must be an https URL" example:"https://cdn.example.com/grace.jpg"`
	Role      *string `json:"role,omitempty" enum:"user,admin,partner,operator" example:"operator"`
	NetworkID *string `json:"network_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"NET-1" description:"Empty: none."`
	StationID *string `json:"station_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"STA-7" description:"Empty: none."`
}

// apply returns u as the request wants it, if the caller may change that.
func (in patchUserIn) apply(c caller, u user) (user, error) {
	before := u
	if err := c.may(actEdit, u); err != nil {
		return u, err
	}
	for _, change := range []struct {
		field *string
		value *string
	}{{&u.FirstName, in.FirstName}, {&u.LastName, in.LastName}, {&u.Phone, in.Phone}, {&u.Photo, in.Photo},
		{&u.Role, in.Role}, {&u.NetworkID, in.NetworkID}, {&u.StationID, in.StationID}} {
		if change.value != nil {
			*change.field = *change.value
		}
	}
	if u.Role == before.Role && u.NetworkID == before.NetworkID && u.StationID == before.StationID {
		return u, nil
	}
	if err := c.may(actAssign, before); err != nil {
		return u, err
	}
	if c.may(actAssign, u) != nil { // as it will be: nobody gives away what they don't have
		return u, problemForbidden
	}
	if !u.IsVerified && u.Role != roleUser { // it may be somebody else's address
		return u, problemAddressUnproven
	}
	return u, nil
}

// patchUser changes what it is given: names in Keycloak first; then U1 our row, with the
// revocation of tokens that say something else, U2 Keycloak's attributes.
func (s *server) patchUser(ctx context.Context, c caller, in patchUserIn) (user, error) {
	before, err := s.target(ctx, c, in.ID, actEdit)
	if err != nil {
		return before, err
	}
	after, err := in.apply(c, before)
	if err != nil {
		return before, targeted(err, before.ID)
	}
	change := func(u user) (user, error) { return in.apply(c, u) }
	if after.FirstName == before.FirstName && after.LastName == before.LastName {
		return s.changeUser(ctx, c, before.ID, "user.update", change)
	}
	return s.changeKeycloakFirst(ctx, c, before, "user.update", func(ku *keycloakUser) {
		ku.FirstName, ku.LastName = cmp.Or(in.FirstName, ku.FirstName), cmp.Or(in.LastName, ku.LastName)
	}, change)
}

// targeted is the problem of err, with the user that it is about, for the audit log.
func targeted(err error, id userID) error {
	err = registerError(err)
	if refused := (problem{}); errors.As(err, &refused) {
		return refused.withTarget(string(id))
	}
	return err
}

type deleteUserIn struct {
	userIn
	Erase bool `query:"erase" description:"For good, of an administrator: the user is deleted in Keycloak, and all personal data with it; the address is free again."`
}

// deleteUser marks a user as deleted and ends its sessions; Keycloak's user is disabled, and removed only by eraseUser.
// Of somebody who has not confirmed yet it cancels the registration, which leaves nothing.
func (s *server) deleteUser(ctx context.Context, c caller, in deleteUserIn) (noContent, error) {
	do := actDelete
	if in.Erase {
		do = actErase
	}
	u, err := s.target(ctx, c, in.ID, do)
	if err == nil && u.Registration != "" {
		var reg registration
		if reg, err = s.store.registration(ctx, u.Registration); err == nil {
			err = s.cancelPending(ctx, c, reg, "deleted")
		}
		over := errors.Is(err, problemVerificationExpired) || errors.Is(err, problemVerificationCancelled)
		confirmed := errors.Is(err, errNotFound) || errors.Is(err, problemAlreadyVerified)
		switch {
		case err == nil, over:
			return noContent{}, nil
		case confirmed: // at this moment
			err = nil
		}
	}
	if err == nil && in.Erase {
		return noContent{}, s.eraseUser(ctx, c, u)
	}
	if err == nil {
		_, err = s.changeUser(ctx, c, u.ID, "user.delete", func(u user) (user, error) {
			if now := s.now(); u.IsActive {
				u.IsActive, u.DeletedAt = false, &now
			}
			return u, c.may(actDelete, u)
		})
	}
	return noContent{}, err
}

// eraseUser deletes a user, deleted before or not, and all personal data for good: X1 what PostgreSQL has of it, X2
// Keycloak's user, X3 the row that was left of ours. The audit log keeps its ids. While Keycloak is away the user
// can't sign in, and its task does the rest.
func (s *server) eraseUser(ctx context.Context, c caller, u user) error {
	err := s.store.eraseUser(ctx, c, u.ID, s.now()) // X1
	if errors.Is(err, errNotFound) {
		err = problemUserNotFound
	}
	if err != nil {
		return targeted(err, u.ID)
	}
	// Dying here (X1) leaves a user in Keycloak: the task deletes it.
	if err := s.doNow(ctx, kcTask(u.KeycloakID)); err != nil {
		s.log.WarnContext(ctx, "user: not erased in Keycloak, will retry", "user", u.ID, "error", err)
	}
	return nil
}

// finishErasure deletes Keycloak's user, if it is still there (X2), and then the row of ours (X3).
func (s *server) finishErasure(ctx context.Context, t task, u user) error {
	if err := s.kc.deleteUser(ctx, u.KeycloakID); err != nil {
		return err
	}
	// Dying here (X2) leaves a row without personal data: the task removes it.
	return s.store.removeErased(ctx, t, u.ID)
}

// restoreUser undoes deleteUser, in Keycloak first. The person signs in anew; one whom
// Keycloak has lost can't, and is invited anew instead.
func (s *server) restoreUser(ctx context.Context, c caller, in userIn) (user, error) {
	u, err := s.target(ctx, c, in.ID, actDelete)
	if err != nil || u.IsActive {
		return u, err
	}
	u.IsActive = true
	conflict, err := s.store.conflicts(ctx, u)
	if err == nil && conflict {
		err = errConflict
	}
	if err == nil { // what was begun before must not come back to life
		err = s.endSessions(ctx, c, u, "", "user.restore")
	}
	if err != nil {
		return u, targeted(err, u.ID)
	}
	return s.changeKeycloakFirst(ctx, c, u, "user.restore", func(ku *keycloakUser) { ku.Enabled = &u.IsActive },
		func(u user) (user, error) {
			u.IsActive, u.DeletedAt = true, nil
			return u, c.may(actDelete, u)
		})
}

// changeKeycloakFirst changes a user in Keycloak, which may refuse that, and then in PostgreSQL. It
// holds the lock of the user's task: if the process dies in between, or PostgreSQL refuses, the task
// makes both stores agree.
func (s *server) changeKeycloakFirst(ctx context.Context, c caller, u user, action string, edit func(*keycloakUser),
	change func(user) (user, error)) (user, error) {
	t, err := s.store.lock(ctx, kcTask(u.KeycloakID), lockTime, s.now)
	if err != nil {
		return u, err
	}
	var ku keycloakUser
	now, err := s.store.user(ctx, u.ID) // another may have changed it before we had the lock
	if err == nil {
		ku, err = s.kc.user(ctx, u.KeycloakID)
	}
	if err == nil {
		err = registerError(s.kc.push(ctx, ku, now, edit))
	}
	if err != nil {
		s.release(ctx, t, never, err)
		if errors.Is(err, errNotFound) {
			err = problemUserGone
		}
		return u, targeted(err, u.ID)
	}
	after, push, err := s.store.changeUser(ctx, c, u.ID, action, change, s.now())
	next := never
	if err != nil { // Keycloak has what PostgreSQL has not
		next = s.now()
	}
	s.release(ctx, t, next, nil)
	return s.changed(ctx, u.ID, after, push, err)
}

// changeUser changes a user: U1 our row, with everything that follows from it, U2 Keycloak's.
// While Keycloak is away the change stands in PostgreSQL, where it counts, and the task brings
// it to Keycloak.
func (s *server) changeUser(ctx context.Context, c caller, id userID, action string,
	change func(user) (user, error)) (user, error) {
	u, push, err := s.store.changeUser(ctx, c, id, action, change, s.now()) // U1
	return s.changed(ctx, id, u, push, err)
}

// changed does what follows from a change of a user (U1).
func (s *server) changed(ctx context.Context, id userID, u user, push bool, err error) (user, error) {
	switch {
	case errors.Is(err, errNotFound):
		return u, problemUserNotFound.withTarget(string(id))
	case err != nil:
		return u, targeted(err, id)
	}
	// Dying here (U1) leaves Keycloak with the former role: the task pushes ours.
	if push {
		s.pushNow(ctx, u)
	}
	return u, nil
}

// pushDelay is when the task of a change is due: the request tries first.
const pushDelay = 10 * time.Second

// kcTask is the task that reconciles the user with an id in Keycloak.
func kcTask(keycloakID string) string { return "kc:" + keycloakID }

// pushNow brings role, scope and state of a user to Keycloak, and the end of its sessions (U2, S2). After
// a failure the task tries again.
func (s *server) pushNow(ctx context.Context, u user) {
	t, err := s.store.lock(ctx, kcTask(u.KeycloakID), lockTime, s.now)
	if err == nil {
		var ku keycloakUser
		if u, err = s.store.user(ctx, u.ID); err == nil { // another may have changed it meanwhile
			ku, err = s.kc.user(ctx, u.KeycloakID)
		}
		if err == nil {
			err = s.push(ctx, ku, u)
		}
		if errors.Is(err, errNotFound) {
			err = nil // gone in Keycloak: sync notices
		}
		s.release(ctx, t, never, err)
	}
	if err != nil {
		s.log.WarnContext(ctx, "user: push to Keycloak failed, will retry", "user", u.ID, "error", err)
	}
}

// push brings role, scope and state of a user to Keycloak, and ends its sessions there. The caller holds the
// lock of the user's task: of two changes of a user at the same moment Keycloak loses one.
func (s *server) push(ctx context.Context, ku keycloakUser, u user) error {
	err := s.kc.push(ctx, ku, u, nil)
	if err == nil && u.NotBefore != nil {
		err = s.endBefore(ctx, u)
	}
	return err
}

// userSessions lists where a user is signed in.
func (s *server) userSessions(ctx context.Context, c caller, in struct {
	userIn
	pageIn
}) (listOut[session], error) {
	u, err := s.target(ctx, c, in.ID, actSessions)
	if err != nil {
		return listOut[session]{}, err
	}
	return s.sessionsOf(ctx, c, u, in.pageIn)
}

// endUserSession signs a user out somewhere.
func (s *server) endUserSession(ctx context.Context, c caller, in struct {
	userIn
	sessionIn
}) (noContent, error) {
	return s.endManaged(ctx, c, in.userIn.ID, in.sessionIn.ID)
}

// endUserSessions signs a user out everywhere.
func (s *server) endUserSessions(ctx context.Context, c caller, in userIn) (noContent, error) {
	return s.endManaged(ctx, c, in.ID, "")
}

func (s *server) endManaged(ctx context.Context, c caller, id userID, session sessionID) (noContent, error) {
	u, err := s.target(ctx, c, id, actSessions)
	if err != nil {
		return noContent{}, err
	}
	return noContent{}, s.endSessions(ctx, c, u, session, "managed")
}

// grantAdmin is the command: it makes a user who has registered an administrator: the first one, or the
// next after all have been lost. It is the act of whoever may run the program.
func (in *invocation) grantAdmin(ctx context.Context) error {
	email, _ := mailAddress(plainText(in.args[0]))
	u, err := in.store.userByEmail(ctx, email)
	if errors.Is(err, errNotFound) || err == nil && !u.IsVerified {
		return fmt.Errorf("nobody with a confirmed account has the address %s", email)
	} else if err != nil {
		return err
	}
	u, err = in.changeUser(ctx, caller{Actor: in.actor}, u.ID, "user.grant_admin", func(u user) (user, error) {
		u.Role = roleAdmin
		return u, nil
	})
	if err == nil {
		_, err = fmt.Fprintf(in.stdout, "%s (%s) is an administrator now.\n", u.Email, u.ID)
	}
	return err
}
