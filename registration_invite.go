package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
	if err := c.may(actCreate, user{Role: cmp.Or(in.Role, roleUser), NetworkID: in.NetworkID, StationID: in.StationID}); err != nil {
		return createUserOut{}, err
	}
	reg, err := s.newRegistration(c, in.profile, s.cfg.InvitationTTL)
	if err != nil {
		return createUserOut{}, err
	}
	reg.Source, reg.CreatedBy = sourceInternal, string(c.UserID)
	reg.Role, reg.NetworkID, reg.StationID = cmp.Or(in.Role, roleUser), in.NetworkID, in.StationID
	for {
		begun, err := s.begin(ctx, c, reg)
		if errors.Is(err, errRace) {
			begun, err = s.inviteAgain(ctx, c, reg)
		}
		if errors.Is(err, errRace) { // it ends at this moment
			continue
		} else if err != nil {
			return createUserOut{}, registerError(err)
		}
		u, err := s.store.user(ctx, begun.UserID)
		return createUserOut{u, begun.Mail}, err
	}
}

// inviteAgain makes the pending registration of an address the invitation, whoever has begun
// it: what a stranger has typed does not stand in the way. It is mailed again. errRace: there
// is none.
func (s *server) inviteAgain(ctx context.Context, c caller, invited registration) (registration, error) {
	reg, err := s.store.registrationByEmail(ctx, invited.Email)
	if errors.Is(err, errNotFound) {
		return reg, errRace
	}
	if err == nil {
		err = s.store.peek(ctx, mailsADay(invited.Email), s.now())
	}
	if err != nil {
		return reg, err
	}
	reg, t, err := s.lockOrExpire(ctx, c, reg)
	if err != nil {
		return reg, err
	} else if reg.State != pending {
		return reg, errRace
	}
	ku, err := s.kc.user(ctx, reg.KeycloakID)
	switch {
	case errors.Is(err, errNotFound), err == nil && !ku.awaitsVerification(): // not created yet, deleted, or verified
		s.resumeNow(ctx, c, t)
		err = fmt.Errorf("%w: its registration was not complete", errUnavailable)
	case err == nil && reg.Source == sourceInternal && c.may(actAssign, reg.user()) != nil: // another's invitation
		err = problemUserExists
	}
	if err != nil {
		s.unlock(ctx, t, err)
		return reg, err
	}
	reg.Source, reg.CreatedBy, reg.ExpiresAt, reg.Mail = sourceInternal, invited.CreatedBy, invited.ExpiresAt, mailQueued
	reg.Role, reg.NetworkID, reg.StationID = invited.Role, invited.NetworkID, invited.StationID
	reg.Username, reg.FirstName, reg.LastName, reg.Phone = invited.Username, invited.FirstName, invited.LastName, invited.Phone
	if reg.Username == string(invited.UserID) { // the default of an address that is no username
		reg.Username = string(reg.UserID)
	}
	if err := s.store.reinvite(ctx, c, t, reg, s.now()); err != nil {
		s.unlock(ctx, t, err)
		return reg, err
	}
	// Dying here leaves the invitation queued: resume mails it, and Keycloak gets role and scope with it.
	reg, next, err := s.sendAgain(ctx, c, t, reg, ku, false)
	if err != nil || reg.Mail != mailSent {
		s.release(ctx, t, next, err)
	}
	return reg, nil
}
