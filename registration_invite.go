package main

import (
	"cmp"
	"context"
)

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

// createUser invites somebody: a registration that has role and scope already. The person
// confirms it and chooses the password like everybody.
func (s *server) createUser(ctx context.Context, c caller, in createUserIn) (createUserOut, error) {
	role := cmp.Or(in.Role, roleUser)
	if err := c.may(actCreate, user{Role: role, NetworkID: in.NetworkID, StationID: in.StationID}); err != nil {
		return createUserOut{}, err
	}
	reg, err := s.newRegistration(c, in.profile, sourceInternal)
	if err == nil {
		err = s.store.hit(ctx, s.now(), invitations.of(string(c.UserID)))
	}
	if err == nil {
		reg.CreatedBy, reg.Role, reg.NetworkID, reg.StationID = string(c.UserID), role, in.NetworkID, in.StationID
		reg, err = s.open(ctx, c, reg, s.inviteAgain)
	}
	if err != nil {
		return createUserOut{}, registerError(err)
	}
	u, err := s.store.user(ctx, reg.UserID)
	return createUserOut{u, reg.Mail}, err
}

// inviteAgain makes the pending registration of an address the invitation, whoever has begun
// it: what a stranger has typed does not stand in the way. It is mailed again.
func (s *server) inviteAgain(ctx context.Context, c caller, reg, wanted registration) (registration, error) {
	if err := s.store.peek(ctx, s.now(), mailDay(reg.Email, sourceInternal)); err != nil {
		return reg, err
	}
	reg, t, err := s.lockPending(ctx, c, reg)
	if err != nil {
		return reg, err
	}
	ku, err := s.awaitingUser(ctx, c, t, reg)
	if err != nil {
		return reg, err
	}
	if reg.Source == sourceInternal && c.may(actAssign, reg.user()) != nil { // another's invitation
		s.release(ctx, t, never, problemUserExists)
		return reg, problemUserExists
	}
	if wanted.Username == string(wanted.UserID) { // the default of an address that is no username
		wanted.Username = string(reg.UserID)
	}
	wanted.ID, wanted.UserID, wanted.KeycloakID, wanted.TokenHash = reg.ID, reg.UserID, reg.KeycloakID, reg.TokenHash
	wanted.Email, wanted.ResendCount, wanted.CreatedAt = reg.Email, reg.ResendCount, reg.CreatedAt
	if err := s.store.reinvite(ctx, c, t, wanted, s.now()); err != nil {
		s.release(ctx, t, never, err)
		return reg, err
	}
	// Dying here leaves the invitation queued: resume mails it, and Keycloak gets role and scope with it.
	reg, next, err := s.mail(ctx, c, t, wanted, ku, false)
	s.release(ctx, t, next, err)
	return reg, nil
}
