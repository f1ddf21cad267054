package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"auth-service/templates"

	gonanoid "github.com/matoous/go-nanoid/v2"
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

// Where a user comes from.
const (
	sourceWeb      = "web"      // registered itself
	sourceInternal = "internal" // created by somebody
)

// invitationTime is how long an invitation's link works. A later one comes with "forgot
// password".
const invitationTime = 7 * 24 * time.Hour

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
		return problemForbidden.withDetail("Nobody changes their own role or scope, or deletes themselves.")
	case !manages:
		return problemForbidden
	case u.RegistrationOpen: // its registration's flow has it in hand
		return problemAccountNotVerified.withDetail("The e-mail address of this account is not confirmed yet.")
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
	if errors.Is(err, errNotFound) {
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

type createUserIn struct {
	profile
	Role      string `json:"role,omitempty" enum:"user,admin,partner,operator" example:"operator" description:"Default: user."`
	NetworkID string `json:"network_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"NET-1"`
	StationID string `json:"station_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"STA-7"`
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
	if err := ownUsername(in.profile); err != nil {
		return createUserOut{}, err
	}
	u := user{ID: newUserID(), Email: in.Email, Username: in.Username, FirstName: in.FirstName, LastName: in.LastName, Phone: in.Phone,
		Role: cmp.Or(in.Role, roleUser), NetworkID: in.NetworkID, StationID: in.StationID, Source: sourceInternal, IsActive: true, CreatedAt: s.now(), UpdatedAt: s.now()}
	u.Username = cmp.Or(u.Username, defaultUsername(u.Email, u.ID))
	if err := c.may(actCreate, u); err != nil {
		return createUserOut{}, err
	}
	if err := s.store.addUser(ctx, c, u, templates.Language(c.Language, in.Locale)); err != nil { // I1
		return createUserOut{}, registerError(err)
	}
	// Dying from here on (I1 … I4) leaves a row that is due: settleUser.
	out, err := s.settleUser(ctx, c, u.ID)
	if errors.Is(err, errConflict) || errors.As(err, new(rejected)) {
		return createUserOut{}, registerError(err)
	} else if err != nil {
		s.log.WarnContext(ctx, "an invitation is queued", "user", u.ID, "error", err)
		u.KeycloakID = out.KeycloakID
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
	NetworkID *string `json:"network_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"NET-1" description:"Empty: none."`
	StationID *string `json:"station_id,omitempty" maxLength:"32" pattern:"^([A-WYZa-z0-9_.-]|[A-Za-z0-9_.-]{2,})?$" mismatch:"must be letters, digits, and _ . - only; X alone stands for none" example:"STA-7" description:"Empty: none."`
}

// patchUser changes what it is given: U1 our row, with the revocation of tokens that say
// something else, U2 Keycloak's attributes, U3 settled.
func (s *server) patchUser(ctx context.Context, c caller, in patchUserIn) (user, error) {
	return s.changeUser(ctx, c, in.ID, "user.update", func(u user) (user, error) {
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
		return u, nil
	})
}

// deleteUser marks a user as deleted and ends its sessions; Keycloak's user is disabled,
// never removed.
func (s *server) deleteUser(ctx context.Context, c caller, in userIn) (noContent, error) {
	_, err := s.changeUser(ctx, c, in.ID, "user.delete", func(u user) (user, error) {
		if now := s.now(); u.IsActive {
			u.IsActive, u.DeletedAt = false, &now
		}
		return u, c.may(actDelete, u)
	})
	return noContent{}, err
}

// restoreUser undoes deleteUser. The person signs in anew; one whom Keycloak has lost
// can't, and is invited anew instead.
func (s *server) restoreUser(ctx context.Context, c caller, in userIn) (user, error) {
	u, err := s.target(ctx, c, in.ID, actDelete)
	if err != nil {
		return u, err
	}
	if _, err := s.kc.user(ctx, u.KeycloakID); errors.Is(err, errNotFound) && u.KeycloakID != "" { // else its creation is due
		return u, problemUserGone.withTarget(string(u.ID))
	}
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
	var refused problem
	u, ended, err := s.store.changeUser(ctx, c, id, action, change, s.now()) // U1
	switch {
	case errors.Is(err, errNotFound):
		return u, problemUserNotFound.withTarget(string(id))
	case errors.Is(err, errConflict): // restored, and another has the address or username by now
		return u, problemUserExists.withTarget(string(id))
	case errors.As(err, &refused):
		return u, refused.withTarget(string(id))
	case err != nil:
		return u, err
	}
	// Dying here (U1) leaves Keycloak with the former role: the row is due.
	s.settleSessions(ctx, ended)
	settled, err := s.settleUser(ctx, c, id)
	if err != nil {
		s.log.WarnContext(ctx, "a change will reach Keycloak later", "user", id, "error", err)
		return u, nil
	}
	return settled, nil
}

// settleUser brings Keycloak's user to where ours is, and returns it as it is then. One
// at a time does that, so that an older state never overtakes a newer one.
func (s *server) settleUser(ctx context.Context, c caller, id userID) (user, error) {
	lease := gonanoid.Must()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		u, err := s.store.leaseUser(ctx, id, lease, s.now())
		switch {
		case err != nil || !u.Due:
			return u.user, err
		case u.Lease == lease:
			return s.settleLeased(ctx, c, u)
		}
		select {
		case <-ctx.Done():
			return u.user, errBusy
		case <-time.After(pause):
		}
	}
}

// settleLeased brings Keycloak's user to where ours is, and says that this is all (U3).
func (s *server) settleLeased(ctx context.Context, c caller, u owedUser) (user, error) {
	err := s.bringUser(ctx, c, &u)
	if err != nil {
		return u.user, errors.Join(err, s.store.releaseUser(ctx, u, s.now().Add(retryTime)), s.store.renewRevocation(ctx, u.ID))
	}
	if settled, err := s.store.userSettled(ctx, u); settled || err != nil { // U3
		return u.user, err
	}
	if err := s.store.releaseUser(ctx, u, s.now()); err != nil { // changed meanwhile by another
		return u.user, err
	}
	return s.settleUser(ctx, c, u.ID)
}

// bringUser does whatever is owed to Keycloak, whatever has happened before: it creates the
// user (I2, I3) or gives it our role, scope and names (U2), and sends the invitation (I4).
func (s *server) bringUser(ctx context.Context, c caller, u *owedUser) (err error) {
	if u.KeycloakID == "" {
		u.KeycloakID, err = s.kc.createInvited(ctx, u.user, u.Locale) // I2
		if errors.Is(err, errConflict) || errors.As(err, new(rejected)) {
			return errors.Join(err, s.store.dropUser(ctx, c, u.user, s.now()))
		} else if err != nil {
			return err
		}
		if err = s.store.bornUser(ctx, u.user); err != nil { // I3
			return err
		}
	} else if err = s.kc.assign(ctx, u.user, u.Enable, u.Names); errors.Is(err, errNotFound) && !u.IsActive { // U2
		return nil // nothing is owed to a user that is gone in Keycloak, once sync has deleted it here
	} else if err != nil {
		return err
	}
	if u.Invitation && u.IsActive {
		if err = s.kc.sendMail(ctx, u.KeycloakID, u.Locale, invitationTime, invitation); err != nil {
			return err
		}
		return s.store.invited(ctx, c, u.ID, s.now()) // I4
	}
	return nil
}

// settleUsers settles the users whose change has not reached Keycloak.
func (s *server) settleUsers(ctx context.Context) error {
	start := s.now()
	return eachDue(ctx, s.log, func() (owedUser, error) {
		return s.store.takeDueUser(ctx, gonanoid.Must(), start, s.now())
	}, func(ctx context.Context, u owedUser) error {
		_, err := s.settleLeased(ctx, system("users"), u)
		return err
	})
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
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	u, err := s.target(ctx, c, id, actSessions)
	if err != nil {
		return noContent{}, err
	}
	return noContent{}, s.endSession(ctx, c, u.ID, session, "managed")
}

// grantAdmin makes a user who has registered an administrator: the first one, or the
// next after all have been lost. It is the act of whoever may run the program.
func (s *server) grantAdmin(ctx context.Context, email, operator string, out io.Writer) error {
	u, err := s.store.userByEmail(ctx, email)
	if errors.Is(err, errNotFound) || err == nil && !u.IsVerified {
		return fmt.Errorf("nobody with a confirmed account has the address %s", email)
	} else if err != nil {
		return err
	}
	u, err = s.changeUser(ctx, caller{Actor: "cli:" + operator}, u.ID, "user.grant_admin", func(u user) (user, error) {
		u.Role = roleAdmin
		return u, nil
	})
	if err == nil {
		_, err = fmt.Fprintf(out, "%s (%s) is an administrator now.\n", u.Email, u.ID)
	}
	return err
}
