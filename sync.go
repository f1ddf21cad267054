package main

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"auth-service/templates"

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
	diffUnread   difference = "not_compared"
)

// meanings say of each class what it is, what is done, and what nobody can know.
var meanings = map[difference]string{
	diffProfile:  "E-mail address, username or names differ: Keycloak's come here.",
	diffVerified: "One store has the address as confirmed, the other has not: Keycloak's answer comes here.",
	diffRole:     "Role, scope or user id differ: ours go to Keycloak. What it had is on record (user.assert), and may have been right if this database was restored.",
	diffDisabled: "Disabled in Keycloak: deleted here. Only restore undoes that.",
	diffMissing:  "Not in Keycloak: deleted here.",
	diffDeleted:  "Deleted here and enabled in Keycloak: disabled there. If this database was restored, it may have been restored since: nobody knows.",
	diffUnknown:  "Only in Keycloak: taken over as a user without scope. What Keycloak says of role and scope is on record (user.take_over). A registration that has ended here ends there.",
	diffConflict: "Another user has its address or username here, or it has no address, or something too long: left as it is, for an administrator.",
	diffUnread:   "A store has failed for this user alone: not compared.",
}

// syncAction is how a change that follows Keycloak is on record.
const syncAction = "user.sync"

// differences lists how a user here differs from Keycloak's, also if that is due and will
// be gone in a moment.
func differences(u syncUser, ku keycloakUser) (all []difference) {
	switch {
	case u.RegistrationOpen && ku.verified():
		return []difference{diffVerified}
	case u.RegistrationOpen:
		return nil
	}
	now := u.following(ku)
	if now.Email != u.Email || now.Username != u.Username || now.FirstName != u.FirstName || now.LastName != u.LastName {
		all = append(all, diffProfile)
	}
	if now.IsVerified != u.IsVerified {
		all = append(all, diffVerified)
	}
	if !ku.hasClaims(u.user) {
		all = append(all, diffRole)
	}
	if now.IsActive != u.IsActive {
		all = append(all, diffDisabled)
	} else if !u.IsActive && ku.enabled() {
		all = append(all, diffDeleted)
	}
	return all
}

// following is u as it should be here after what was done in Keycloak.
func (u syncUser) following(ku keycloakUser) user {
	now := ku.profileOf(u.user)
	if u.NamesDue {
		now.FirstName, now.LastName = u.FirstName, u.LastName
	}
	now.IsVerified = ku.verified()
	now.IsActive = u.IsActive && (ku.enabled() || u.EnableDue)
	return now
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

// awaitsVerification says whether Keycloak's user is one that waits for its confirmation: an account
// has lost the mail's secrets, also if it has a new address that is not confirmed.
func (ku keycloakUser) awaitsVerification() bool {
	return !ku.verified() && ku.attribute(attrToken) != ""
}

// reconcile brings one user into step, whatever the difference is by now. It may be
// repeated, and dies nowhere with anything lost: what has changed here is due in Keycloak
// in the same transaction (U1). errConflict: the user can't be taken over, or can't have
// the address that it has in Keycloak.
func (s *server) reconcile(ctx context.Context, c caller, keycloakID string) error {
	if c.Actor == anonymous { // who signs in has not done what is found then
		c.Actor = system("sync").Actor
	}
	var stuck error // why ours does not get there, though Keycloak answers
	for settled := false; ; {
		u, err := s.store.syncUser(ctx, keycloakID)
		here := !errors.Is(err, errNotFound)
		if err != nil && here {
			return err
		}
		if u.Due && stuck == nil { // ours goes first, or it would look like a difference
			if _, stuck = s.settleUser(ctx, c, u.ID); again(stuck) {
				return stuck
			}
			continue
		}
		if u.RegistrationOpen && !settled { // what the repair loop would do
			if err := s.settleRegistration(ctx, c, u.ID); err != nil {
				return err
			}
			settled = true
			continue
		}
		ku, err := s.kc.user(ctx, keycloakID) // after ours: what is changed here meanwhile is noticed
		missing := errors.Is(err, errNotFound)
		switch {
		case err != nil && !missing:
			return err
		case u.RegistrationOpen, !here && missing:
			return nil
		case !here:
			return s.takeOver(ctx, c, ku)
		}
		if err = s.follow(ctx, c, u, ku, missing); errors.Is(err, errRace) {
			continue
		}
		if err == nil && stuck != nil { // unless nothing is owed any more
			if u, err = s.store.syncUser(ctx, keycloakID); u.Due {
				err = errors.Join(err, stuck)
			}
		}
		return err
	}
}

// again says whether err means that the same may succeed in a moment.
func again(err error) bool {
	return err != nil && asProblem(err).Status == http.StatusServiceUnavailable
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
	var err error
	asserted := !u.Due && !missing && (!ku.hasClaims(u.user) || !u.IsActive && ku.enabled())
	if asserted {
		if u.user, err = s.store.oweUser(ctx, c, u.user, ku.claims(), s.now()); err != nil {
			return err
		}
	}
	now, conflict := u.user, false
	if missing {
		now.IsActive = false
	} else {
		if now = u.following(ku); now != u.user {
			if conflict, err = s.conflicts(ctx, now); err != nil {
				return err
			}
		}
		if conflict { // the profile waits; who was disabled doesn't
			now.Email, now.Username, now.FirstName, now.LastName = u.Email, u.Username, u.FirstName, u.LastName
		}
	}
	if u.IsActive && !now.IsActive {
		at := s.now()
		now.DeletedAt = &at
	}
	if now != u.user {
		_, err = s.changeUser(ctx, c, u.ID, syncAction, func(before user) (user, error) {
			if !before.UpdatedAt.Equal(u.UpdatedAt) {
				return before, errRace
			}
			return now, nil
		})
	}
	if err == nil && asserted {
		_, err = s.settleUser(ctx, c, u.ID)
	}
	if err == nil && conflict || errors.Is(err, problemUserExists) { // taken at this moment
		err = errConflict
	}
	return err
}

// conflicts says whether a user can't have the address, username or names that it should have.
func (s *server) conflicts(ctx context.Context, u user) (bool, error) {
	if !u.fits() || !u.IsActive {
		return !u.fits(), nil
	}
	return s.store.taken(ctx, u)
}

// fits says whether u can be here: Keycloak's imports know no limits.
func (u user) fits() bool {
	return u.Email != "" && utf8.RuneCountInString(u.Email) <= 255 && utf8.RuneCountInString(u.Username) <= 100 &&
		utf8.RuneCountInString(u.FirstName) <= 100 && utf8.RuneCountInString(u.LastName) <= 100
}

// newcomer is a user that only Keycloak knows, as it should be here: without scope, whatever
// Keycloak says.
func (s *server) newcomer(ku keycloakUser) user {
	now := s.now()
	u := ku.profileOf(user{ID: userID(ku.attribute(attrUserID)), KeycloakID: ku.id(), Role: roleUser, Source: sourceInternal,
		IsVerified: ku.verified(), IsActive: ku.enabled() || ku.awaitsVerification(), CreatedAt: now, UpdatedAt: now})
	if !u.IsActive {
		u.DeletedAt = &now
	}
	if registrationIDPattern.MatchString(ku.attribute(attrRegistrationID)) {
		u.Source = sourceWeb
	}
	return u
}

// takeOver makes an account of somebody whom only Keycloak knows. A registration that this
// database does not know, because it was restored, goes on where it was; one that it knows
// is settled.
func (s *server) takeOver(ctx context.Context, c caller, ku keycloakUser) error {
	u := s.newcomer(ku)
	if !u.fits() {
		return errConflict
	}
	switch owner, err := s.store.user(ctx, u.ID); {
	case err == nil && owner.KeycloakID == "": // I2: its id is not here yet
		_, err = s.settleUser(ctx, c, owner.ID)
		return err
	case err != nil && !errors.Is(err, errNotFound):
		return err
	case err == nil, !userIDPattern.MatchString(string(u.ID)):
		u.ID = newUserID()
	}
	var reg registration
	if u.Source == sourceWeb {
		id := registrationID(ku.attribute(attrRegistrationID))
		known, err := s.store.registration(ctx, id)
		if err == nil && (known.State == pending || known.State != verified && ku.awaitsVerification()) { // R2, or ended: E2
			if known, err = s.lease(ctx, id); err == nil {
				err = s.settle(ctx, c, known)
			}
			return err
		} else if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
		reg = s.registrationOf(u, ku)
		reg.ID = id
	}
	if err := s.store.takeOver(ctx, c, u, reg, ku.claims()); err != nil {
		return err
	}
	_, err := s.settleUser(ctx, c, u.ID)
	return err
}

// registrationOf is the registration that a user of Keycloak came by, as far as Keycloak
// knows it.
func (s *server) registrationOf(u user, ku keycloakUser) registration {
	reg := registration{Email: u.Email, Username: u.Username, FirstName: u.FirstName, LastName: u.LastName, State: verified,
		KeycloakID: u.KeycloakID, UserID: u.ID, Locale: templates.Language("", ku.attribute(attrLocale)), CreatedAt: u.CreatedAt, WithPassword: true,
		TokenHash: tokenHash(newToken())} // nobody's: the mail's is known no more
	if ku.CreatedTimestamp != nil {
		reg.CreatedAt = time.UnixMilli(*ku.CreatedTimestamp).UTC()
	}
	reg.ExpiresAt = reg.CreatedAt.Add(s.cfg.VerificationTTL)
	if ku.awaitsVerification() {
		token := ku.attribute(attrToken)
		reg.State, reg.TokenHash, reg.CodeHash = pending, tokenHash(token), codeHash(token, ku.attribute(attrCode))
		reg.WithPassword = ku.RequiredActions == nil || !slices.Contains(*ku.RequiredActions, "UPDATE_PASSWORD")
	}
	return reg
}

const (
	eventsInterval = 5 * time.Second  // the longest pause between two looks at the events
	eventsOverlap  = 10 * time.Second // an event may become visible so long after its time
	eventsRetries  = 5                // of users for whom a store has failed, at each look: each may take long
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
	alive := func() error { return s.store.keepSyncPlace(ctx, place.Owner, s.now()) }
	next := syncPlace{Owner: place.Owner, Events: []string{}}
	var events []userEvent
	for source := range eventSources {
		found, latest, err := s.kc.userEvents(ctx, source, place.At[source]-eventsOverlap.Milliseconds(), alive)
		if err != nil {
			return err
		}
		events = append(events, found...)
		next.At[source] = min(max(place.At[source], latest), s.now().UnixMilli()) // a place in the future would lose all until then
	}
	slices.SortStableFunc(events, func(a, b userEvent) int { return cmp.Compare(a.At, b.At) })
	seen, queued := map[string]bool{}, map[string]bool{}
	for _, id := range place.Events {
		seen[id] = true
	}
	var users []string
	for _, e := range events {
		if !seen[e.ID] && !queued[e.UserID] {
			users, queued[e.UserID] = append(users, e.UserID), true
		}
		if e.At >= next.At[e.Source]-eventsOverlap.Milliseconds() {
			next.Events = append(next.Events, e.ID)
		}
	}
	if err := s.notTooMany(ctx, users, alive); err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(place.Left), func(id string) bool { return queued[id] })
	retried := min(len(left), eventsRetries)
	failed, err := s.eachUser(ctx, slices.Concat(users, left[:retried]),
		func(ctx context.Context, id string) error { return s.reconcile(ctx, system("sync"), id) }, alive)
	if err != nil {
		return err
	}
	next.Left = left[retried:]
	moment := slices.ContainsFunc(slices.Collect(maps.Values(failed)), again)
	for id, err := range failed { // others are for the full pass to tell of
		if again(err) || moment && errors.Is(err, errConflict) { // which may be with one of those
			next.Left = append(next.Left, id)
		}
	}
	*place = next
	return nil
}

// notTooMany is tooMany for users that have an event.
func (s *server) notTooMany(ctx context.Context, users []string, alive func() error) error {
	if len(users) <= syncFew {
		return nil
	}
	run := syncRun{}
	if err := s.syncLimit(ctx, &run); err != nil {
		return err
	}
	return s.inspectAll(ctx, &run, users, func(*syncRun) error { return alive() })
}

// eachUser does something with one user after the other, and again with those in conflict
// while that helps: an address may be free then. A failure holds up nobody: those who failed
// are returned. It ends if Keycloak fails for all.
func (s *server) eachUser(ctx context.Context, users []string, do func(ctx context.Context, id string) error, alive func() error) (map[string]error, error) {
	failed := map[string]error{}
	for before := -1; len(users) != before; {
		before = len(users)
		var conflicts []string
		for _, id := range users {
			err := func() error {
				ctx, cancel := detached(ctx, flowTime)
				defer cancel()
				return do(ctx, id)
			}()
			if err := alive(); err != nil {
				return nil, err
			}
			if err == nil {
				delete(failed, id)
				continue
			}
			failed[id] = err
			s.log.WarnContext(ctx, "a user is not in step", "keycloak_id", id, "error", err)
			if errors.Is(err, errConflict) {
				conflicts = append(conflicts, id)
				continue
			}
			if _, err := s.list(ctx, 0, 1); err != nil {
				return nil, err
			}
			if err := alive(); err != nil {
				return nil, err
			}
		}
		users = conflicts
	}
	return failed, nil
}

// list returns a page of Keycloak's users. A pass is long, and need not end by one call
// that has failed for the moment.
func (s *server) list(ctx context.Context, first, limit int) (users []keycloakUser, err error) {
	ctx, cancel := context.WithTimeout(ctx, flowTime) // less than syncBeat
	defer cancel()
	for try := 1; ; try++ {
		if users, err = s.kc.usersPage(ctx, first, limit); !again(err) || try == 3 {
			return users, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
