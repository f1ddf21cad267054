package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"auth-service/templates"
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
	actSessions action = "sessions" // see and end them
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
		return problemForbidden // there is nobody yet who could be unseen
	case !self && !admin && !partner && !operator:
		return problemUserNotFound
	case do == actRead, do == actEdit && self, do == actSessions && self:
		return nil
	case self && (do == actAssign || do == actDelete):
		return problemForbidden.saying("Nobody changes their own role or scope, or deletes themselves.")
	case !manages:
		return problemForbidden
	}
	return nil
}

type usersIn struct {
	pageIn
	Role           string `query:"role" enum:"user,admin,partner,operator" description:"Only users with this role."`
	NetworkID      string `query:"network_id" maxLength:"32"`
	StationID      string `query:"station_id" maxLength:"32"`
	Source         string `query:"source" enum:"web,internal" description:"web: registered themselves; internal: created by somebody."`
	Query          string `query:"q" minLength:"3" maxLength:"100" description:"A part of the e-mail address, username or name."`
	IncludeDeleted bool   `query:"include_deleted"`
}

// users lists whom the caller may see, the latest first.
func (s *server) users(ctx context.Context, c caller, in usersIn) (listOut[user], error) {
	before, err := parseCursor(in.Cursor)
	if err != nil {
		return listOut[user]{}, err
	}
	list, err := s.store.users(ctx, c.principal, in, before)
	if err != nil {
		return listOut[user]{}, err
	}
	return listOf(list, in.Limit, func(u user) (user, cursor) { return u, cursor{u.CreatedAt, string(u.ID)} }), nil
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
	if errors.Is(err, errNotFound) {
		return u, problemUserNotFound
	} else if err != nil {
		return u, err
	}
	return u, c.may(do, u)
}

type createUserIn struct {
	profile
	Role      string `json:"role,omitempty" enum:"user,admin,partner,operator" example:"operator" description:"Default: user."`
	NetworkID string `json:"network_id,omitempty" maxLength:"32" pattern:"^[A-Za-z0-9_.-]+$" example:"NET-1"`
	StationID string `json:"station_id,omitempty" maxLength:"32" pattern:"^[A-Za-z0-9_.-]+$" example:"STA-7"`
}

type createUserOut struct {
	user
	Invitation mailState `json:"invitation_email" enum:"sent,queued" description:"queued: the mail could not be handed over now, the service keeps trying."`
}

func (out createUserOut) location() string { return "/api/v1/users/" + string(out.ID) }

// createUser makes an account for somebody: I1 our row, I2 Keycloak's user, I3 its id,
// I4 the invitation. The person chooses the password by the invitation's link, which
// also proves the address; before that nobody can sign in.
func (s *server) createUser(ctx context.Context, c caller, in createUserIn) (createUserOut, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	u := user{ID: newUserID(), Email: in.Email, Username: in.Username, FirstName: in.FirstName, LastName: in.LastName, Phone: in.Phone,
		Role: cmp.Or(in.Role, roleUser), NetworkID: in.NetworkID, StationID: in.StationID, Source: "internal",
		IsVerified: true, IsActive: true, CreatedAt: s.now(), UpdatedAt: s.now()}
	u.KeycloakID = unborn + string(u.ID)
	u.Username = cmp.Or(u.Username, defaultUsername(u.Email, u.ID))
	if err := c.may(actCreate, u); err != nil {
		return createUserOut{}, err
	}
	if err := s.store.addUser(ctx, c, u, templates.Language(c.Language, in.Locale)); err != nil { // I1
		return createUserOut{}, registerError(err)
	}
	// Dying from here on (I1 … I4) leaves a row that is due: settleUser.
	out, err := s.settleUser(ctx, u.ID)
	if errors.Is(err, errConflict) || errors.As(err, new(rejected)) {
		return createUserOut{}, registerError(errors.Join(err, s.store.dropUser(ctx, c, u, s.now())))
	}
	if err != nil {
		s.log.WarnContext(ctx, "an invitation is queued", "user", u.ID, "error", err)
		return createUserOut{u, mailQueued}, nil
	}
	return createUserOut{out, mailSent}, nil
}

type patchUserIn struct {
	userIn
	FirstName *string `json:"first_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Grace"`
	LastName  *string `json:"last_name,omitempty" maxLength:"100" pattern:"^[^<>&\"$%!#?§;*~/\\\\|^=\\[\\]{}()]*$" example:"Hopper"`
	Phone     *string `json:"phone,omitempty" pattern:"^(\\+[1-9][0-9]{6,14})?$" mismatch:"is not a valid phone number; write it with the country code, like +4930123456" example:"+4930123456"`
	Photo     *string `json:"photo,omitempty" maxLength:"2000" pattern:"^(https://[^\\s\"'<>]+)?$" mismatch:"must be an https URL" example:"https://cdn.example.com/grace.jpg"`
	Role      *string `json:"role,omitempty" enum:"user,admin,partner,operator" example:"operator"`
	NetworkID *string `json:"network_id,omitempty" maxLength:"32" pattern:"^[A-Za-z0-9_.-]*$" example:"NET-1" description:"Empty: none."`
	StationID *string `json:"station_id,omitempty" maxLength:"32" pattern:"^[A-Za-z0-9_.-]*$" example:"STA-7" description:"Empty: none."`
}

// patchUser changes what it is given: U1 our row, with the withdrawal of tokens that say
// something else, U2 Keycloak's attributes, U3 settled.
func (s *server) patchUser(ctx context.Context, c caller, in patchUserIn) (user, error) {
	return s.changeUser(ctx, c, in.ID, "user.update", func(u user) (user, error) {
		before := u
		for _, change := range []struct {
			field *string
			value *string
		}{{&u.FirstName, in.FirstName}, {&u.LastName, in.LastName}, {&u.Phone, in.Phone}, {&u.Photo, in.Photo},
			{&u.Role, in.Role}, {&u.NetworkID, in.NetworkID}, {&u.StationID, in.StationID}} {
			if change.value != nil {
				*change.field = *change.value
			}
		}
		do := actEdit
		if in.Role != nil || in.NetworkID != nil || in.StationID != nil {
			do = actAssign
		}
		if err := c.may(do, before); err != nil {
			return u, err
		}
		if err := c.may(do, u); err != nil { // as it will be: nobody gives away what they don't have
			return u, problemForbidden
		}
		return u, nil
	})
}

// deleteUser marks a user as deleted and ends its sessions; Keycloak's user is disabled,
// never removed.
func (s *server) deleteUser(ctx context.Context, c caller, in userIn) (noContent, error) {
	_, err := s.changeUser(ctx, c, in.ID, "user.delete", func(u user) (user, error) {
		now := s.now()
		u.IsActive, u.DeletedAt = false, &now
		return u, c.may(actDelete, u)
	})
	return noContent{}, err
}

// restoreUser undoes deleteUser. The person signs in anew.
func (s *server) restoreUser(ctx context.Context, c caller, in userIn) (user, error) {
	return s.changeUser(ctx, c, in.ID, "user.restore", func(u user) (user, error) {
		u.IsActive, u.DeletedAt = true, nil
		return u, c.may(actDelete, u)
	})
}

// changeUser changes a user in both stores. While Keycloak is away the change stands
// here, where it counts, and settleUser owes Keycloak its part.
func (s *server) changeUser(ctx context.Context, c caller, id userID, action string, change func(user) (user, error)) (user, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	if id == "me" {
		id = c.UserID
	}
	u, ended, err := s.store.changeUser(ctx, c, id, action, change, s.now()) // U1
	switch {
	case errors.Is(err, errNotFound):
		return u, problemUserNotFound
	case errors.Is(err, errConflict): // restored, and another has the address or username by now
		return u, problemUserExists.about(string(id))
	case err != nil:
		return u, err
	}
	// Dying here (U1) leaves Keycloak with the former role: the row is due.
	for _, session := range ended {
		if err := s.settleSession(ctx, session); err != nil {
			s.log.WarnContext(ctx, "a session will end in Keycloak later", "session", session.ID, "error", err)
		}
	}
	if settled, err := s.settleUser(ctx, id); err == nil {
		return settled, nil
	} else {
		s.log.WarnContext(ctx, "a change will reach Keycloak later", "user", id, "error", err)
	}
	return u, nil
}

// unborn is what the id of a user begins with that Keycloak does not have yet.
const unborn = "unborn:"

// settleUser brings Keycloak's user to where ours is, whatever has happened before: it
// creates it (I2), gives it our role, scope and names (U2), and sends the invitation
// that is owed (I4). It returns the user as it is then.
func (s *server) settleUser(ctx context.Context, id userID) (user, error) {
	for {
		u, owed, err := s.store.owedUser(ctx, id)
		if err != nil {
			return u, err
		}
		if strings.HasPrefix(u.KeycloakID, unborn) {
			if u.KeycloakID, err = s.kc.createInvited(ctx, u, owed.Locale); err != nil { // I2; finds the one that a lost answer has created
				return u, err
			}
			if err = s.store.bornUser(ctx, u); err != nil { // I3
				return u, err
			}
		} else if err = s.kc.assign(ctx, u, owed.Enable); err != nil { // U2
			return u, err
		}
		if owed.Invitation {
			if err = s.kc.sendMail(ctx, u.KeycloakID, owed.Locale, s.cfg.VerificationTTL, true); err != nil { // I4
				return u, err
			}
		}
		settled, err := s.store.userSettled(ctx, u) // U3
		if settled || err != nil {
			return u, err
		} // changed meanwhile by another: once more
	}
}

// settleUsers settles the users whose change has not reached Keycloak.
func (s *server) settleUsers(ctx context.Context) error {
	start := s.now()
	for ctx.Err() == nil {
		id, err := s.store.takeDueUser(ctx, start, s.now().Add(time.Minute))
		if errors.Is(err, errNotFound) {
			return nil
		}
		if err == nil {
			_, err = s.settleUser(ctx, id)
		}
		if err != nil {
			return fmt.Errorf("user %s: %w", id, err)
		}
	}
	return nil
}

// userSessions lists where a user is signed in.
func (s *server) userSessions(ctx context.Context, c caller, in struct {
	userIn
	pageIn
}) (listOut[sessionOut], error) {
	u, err := s.target(ctx, c, in.ID, actSessions)
	if err != nil {
		return listOut[sessionOut]{}, err
	}
	return s.sessionsOf(ctx, c, u.ID, in.pageIn)
}

// endUserSessions signs a user out everywhere.
func (s *server) endUserSessions(ctx context.Context, c caller, in userIn) (noContent, error) {
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	u, err := s.target(ctx, c, in.ID, actSessions)
	if err == nil {
		_, err = s.signOut(ctx, c, u.ID, "", entry{Action: "session.end", Reason: "managed"})
	}
	return noContent{}, err
}

// grantAdmin makes a user who has registered an administrator: the first one, or the
// next after all have been lost. It is the act of whoever may run the program.
func (s *server) grantAdmin(ctx context.Context, email, operator string) (user, error) {
	u, err := s.store.userByEmail(ctx, email)
	if errors.Is(err, errNotFound) || err == nil && !u.IsVerified {
		return u, fmt.Errorf("nobody with a confirmed account has the address %s", email)
	} else if err != nil {
		return u, err
	}
	return s.changeUser(ctx, caller{Actor: "operator:" + operator}, u.ID, "user.grant_admin", func(u user) (user, error) {
		u.Role = roleAdmin
		return u, nil
	})
}
