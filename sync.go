package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/Nerzal/gocloak/v13"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// PostgreSQL and Keycloak are kept in step: for role and scope PostgreSQL wins; for e-mail,
// username, names and "verified" Keycloak does; for "active" the stricter side wins, and
// only restore enables again. What this service changes is in step by itself (settleUser);
// sync finds what others have changed in Keycloak: at once by its events, and by a full
// pass now and then, which needs no events. A user with something due, or in the middle of
// its registration, is in other hands. No account is ever deleted.

// difference is a class of what the two stores may not agree on.
type difference string

const (
	diffProfile  difference = "profile"
	diffVerified difference = "verified"
	diffRole     difference = "role_or_scope"
	diffDisabled difference = "disabled_in_keycloak"
	diffMissing  difference = "missing_in_keycloak"
	diffDeleted  difference = "deleted_here"
	diffUnknown  difference = "unknown_here"
	diffConflict difference = "conflict"
)

// meanings say of each class what it is, what is done, and what nobody can know.
var meanings = map[difference]string{
	diffProfile:  "E-mail address, username or names differ: Keycloak's come here.",
	diffVerified: "One store has the address as confirmed, the other has not: Keycloak's answer comes here.",
	diffRole:     "Role, scope or user id differ: ours go to Keycloak. What it had is on record (user.assert), and may have been right if this database was restored.",
	diffDisabled: "Disabled in Keycloak: deleted here. Only restore undoes that.",
	diffMissing:  "Not in Keycloak: deleted here.",
	diffDeleted:  "Deleted here and enabled in Keycloak: disabled there. If this database was restored, it may have been restored since: nobody knows.",
	diffUnknown:  "Only in Keycloak: taken over as a user without scope. What Keycloak says of role and scope is on record (user.take_over).",
	diffConflict: "Another user has its address or username here, or it has no address: left as it is, for an administrator.",
}

// syncAction is how a change that follows Keycloak is on record.
const syncAction = "user.sync"

// differences lists how a user here differs from Keycloak's.
func differences(u syncUser, ku keycloakUser) (all []difference) {
	switch {
	case u.Due:
		return nil
	case u.Registering && ku.verified():
		return []difference{diffVerified}
	case u.Registering:
		return nil
	}
	if now := ku.profileOf(u.user); now.Email != u.Email || now.Username != u.Username || now.FirstName != u.FirstName || now.LastName != u.LastName {
		all = append(all, diffProfile)
	}
	if u.IsVerified != ku.verified() {
		all = append(all, diffVerified)
	}
	if !ku.hasClaims(u.user) {
		all = append(all, diffRole)
	}
	if u.IsActive && !ku.enabled() {
		all = append(all, diffDisabled)
	} else if !u.IsActive && ku.enabled() {
		all = append(all, diffDeleted)
	}
	return all
}

// profileOf is u with Keycloak's e-mail address, username and names. Addresses and
// usernames that differ in case only are the same: Keycloak has them in lower case.
func (ku keycloakUser) profileOf(u user) user {
	if email := gocloak.PString(ku.Email); !strings.EqualFold(email, u.Email) {
		u.Email = email
	}
	if username := gocloak.PString(ku.Username); !strings.EqualFold(username, u.Username) {
		u.Username = username
	}
	u.FirstName, u.LastName = gocloak.PString(ku.FirstName), gocloak.PString(ku.LastName)
	return u
}

// registers says whether Keycloak's user is one that waits for its confirmation: an account
// has lost the mail's secrets, also if it has a new address that is not confirmed.
func (ku keycloakUser) registers() bool { return !ku.verified() && ku.attribute(attrToken) != "" }

// reconcile brings one user into step, whatever the difference is by now. It may be
// repeated, and dies nowhere with anything lost: what has changed here is due in Keycloak
// in the same transaction (U1). errConflict: the user can't be taken over, or can't have
// the address that it has in Keycloak.
func (s *server) reconcile(ctx context.Context, c caller, keycloakID string) error {
	for {
		u, err := s.store.syncUser(ctx, keycloakID)
		here := !errors.Is(err, errNotFound)
		if err != nil && here {
			return err
		}
		if u.Due { // ours goes first, or it would look like a difference
			if _, err := s.settleUser(ctx, c, u.ID); err != nil {
				return err
			}
			continue
		}
		ku, err := s.kc.user(ctx, keycloakID) // after ours: what is changed here meanwhile is noticed
		missing := errors.Is(err, errNotFound)
		switch {
		case err != nil && !missing:
			return err
		case !here && missing:
			return nil
		case !here:
			return s.takeOver(ctx, c, ku)
		case u.Registering:
			return s.settleRegistration(ctx, c, u.ID)
		}
		if err = s.follow(ctx, c, u, ku, missing); !errors.Is(err, errRace) {
			return err
		}
	}
}

// settleRegistration does what the repair loop would do: it concludes, or ends what is
// missing in Keycloak.
func (s *server) settleRegistration(ctx context.Context, c caller, id userID) error {
	reg, err := s.store.registrationOfUser(ctx, id)
	if err == nil {
		reg, err = s.lease(ctx, reg.ID)
	}
	if errors.Is(err, errNotFound) { // it is over
		return nil
	} else if err != nil {
		return err
	}
	return s.settle(ctx, c, reg)
}

// follow does here what was done to an account in Keycloak, and undoes there what only
// this service may do. errRace: the account was changed here meanwhile.
func (s *server) follow(ctx context.Context, c caller, u syncUser, ku keycloakUser, missing bool) error {
	apply := func(profile bool) error {
		_, err := s.changeUser(ctx, c, u.ID, syncAction, func(now user) (user, error) {
			at := s.now()
			if !now.UpdatedAt.Equal(u.UpdatedAt) {
				return now, errRace
			}
			if !missing && profile {
				now = ku.profileOf(now)
			}
			if !missing {
				now.IsVerified = ku.verified()
			}
			if now.IsActive && (missing || !ku.enabled()) {
				now.IsActive, now.DeletedAt = false, &at
			}
			return now, nil
		})
		if err != nil && asProblem(err).slug() == problemUserExists.slug() {
			return errConflict
		}
		return err
	}
	conflict := !missing && gocloak.PString(ku.Email) == ""
	err := apply(!conflict)
	if errors.Is(err, errConflict) { // the address waits; who was disabled doesn't
		conflict, err = true, apply(false)
	}
	if err == nil && !missing && (!ku.hasClaims(u.user) || !u.IsActive && ku.enabled()) {
		if err = s.store.oweUser(ctx, c, u.ID, ku.claims(), s.now()); err == nil {
			_, err = s.settleUser(ctx, c, u.ID)
		}
	}
	if err == nil && conflict {
		return errConflict
	}
	return err
}

// takeOver makes an account of somebody whom only Keycloak knows: a user without scope,
// whatever Keycloak says. A registration that this database does not know, because it was
// restored, goes on where it was.
func (s *server) takeOver(ctx context.Context, c caller, ku keycloakUser) error {
	now := s.now()
	u := ku.profileOf(user{ID: userID(ku.attribute(attrUserID)), KeycloakID: ku.id(), Role: roleUser, Source: sourceInternal,
		IsVerified: ku.verified(), IsActive: true, CreatedAt: now, UpdatedAt: now})
	if u.Email == "" {
		return errConflict
	}
	if !userIDPattern.MatchString(string(u.ID)) {
		u.ID = newUserID()
	}
	if !ku.enabled() && !ku.registers() {
		u.IsActive, u.DeletedAt = false, &now
	}
	var reg registration
	if id := registrationID(ku.attribute(attrRegistrationID)); id != "" {
		u.Source = sourceWeb
		reg = s.registrationOf(u, ku)
		reg.ID = id
	}
	if err := s.store.takeOver(ctx, c, u, reg, ku.claims(), now); err != nil {
		return err
	}
	_, err := s.settleUser(ctx, c, u.ID)
	return err
}

// registrationOf is the registration that a user of Keycloak came by, as far as Keycloak
// knows it.
func (s *server) registrationOf(u user, ku keycloakUser) registration {
	reg := registration{Email: u.Email, Username: u.Username, FirstName: u.FirstName, LastName: u.LastName, State: verified,
		KeycloakID: u.KeycloakID, UserID: u.ID, Locale: ku.attribute(attrLocale), CreatedAt: u.CreatedAt, WithPassword: true,
		TokenHash: tokenHash(newToken())} // nobody's: the mail's is known no more
	if ku.CreatedTimestamp != nil {
		reg.CreatedAt = time.UnixMilli(*ku.CreatedTimestamp).UTC()
	}
	reg.ExpiresAt = reg.CreatedAt.Add(s.cfg.VerificationTTL)
	if ku.registers() {
		token := ku.attribute(attrToken)
		reg.State, reg.TokenHash, reg.CodeHash = pending, tokenHash(token), codeHash(token, ku.attribute(attrCode))
		reg.WithPassword = ku.RequiredActions == nil || !slices.Contains(*ku.RequiredActions, "UPDATE_PASSWORD")
	}
	return reg
}

const (
	eventsInterval = 5 * time.Second  // the longest pause between two looks at the events
	eventsOverlap  = 10 * time.Second // an event may become visible so long after its time
)

// syncEvents applies what Keycloak's events say since the last time. Instances do it one
// at a time. The place is written when all is done, so that dying loses no event; one that
// comes twice finds no difference the second time.
func (s *server) syncEvents(ctx context.Context) error {
	place, err := s.store.takeSyncPlace(ctx, gonanoid.Must(), s.now())
	if errors.Is(err, errNotFound) { // another instance is at it
		return nil
	} else if err != nil {
		return err
	}
	err = s.applyEvents(ctx, &place)
	if errors.As(err, new(stopped)) { // the place stays ours for a while: nobody need count so many users again at once
		return err
	}
	return errors.Join(err, s.store.leaveSyncPlace(context.WithoutCancel(ctx), place))
}

func (s *server) applyEvents(ctx context.Context, place *syncPlace) error {
	events, latest, err := s.kc.userEvents(ctx, place.At-eventsOverlap.Milliseconds())
	if err != nil {
		return err
	}
	next := syncPlace{At: max(place.At, latest), Events: []string{}, Owner: place.Owner}
	var users []string
	for _, e := range events {
		if !slices.Contains(place.Events, e.ID) && !slices.Contains(users, e.UserID) {
			users = append(users, e.UserID)
		}
		if e.At >= next.At-eventsOverlap.Milliseconds() {
			next.Events = append(next.Events, e.ID)
		}
	}
	if err := s.notTooMany(ctx, users, place.Owner); err != nil {
		return err
	}
	for _, id := range users {
		err := s.reconcile(ctx, system("sync"), id)
		if err != nil && !errors.Is(err, errUnavailable) {
			s.log.WarnContext(ctx, "a user is not in step", "keycloak_id", id, "error", err)
			err = nil
		}
		if err = errors.Join(err, s.store.keepSyncPlace(ctx, place.Owner, s.now())); err != nil {
			return err
		}
	}
	*place = next
	return nil
}

// notTooMany is tooMany for users that have an event.
func (s *server) notTooMany(ctx context.Context, users []string, owner string) error {
	if len(users) <= syncFew {
		return nil
	}
	run := syncRun{}
	if err := s.limit(ctx, &run); err != nil {
		return err
	}
	return s.inspectAll(ctx, &run, users, func(*syncRun) error { return s.store.keepSyncPlace(ctx, owner, s.now()) })
}
