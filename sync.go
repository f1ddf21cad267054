package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"auth-service/templates"

	"github.com/Nerzal/gocloak/v13"
)

// PostgreSQL and Keycloak are kept in sync: for role and scope PostgreSQL wins; for e-mail,
// username, names and "verified" Keycloak does; for "active" the stricter side wins, and only
// restore enables again. What this service changes it pushes itself. Sync finds what others
// have changed in Keycloak: within seconds by its events, and once a day by a full pass, which
// needs no events. A user whose registration is open belongs to its registration alone. Sync
// never deletes an account.

// difference is a class of what the two stores may not agree on.
type difference string

const (
	diffProfile  difference = "profile"
	diffVerified difference = "verified"
	diffRole     difference = "role_or_scope"
	diffDisabled difference = "disabled_in_keycloak"
	diffMissing  difference = "missing_in_keycloak"
	diffDeleted  difference = "deleted_in_postgresql"
	diffUnknown  difference = "unknown_in_postgresql"
	diffConflict difference = "conflict"
	diffUnread   difference = "not_compared"
)

// descriptions are for the report of a full pass.
var descriptions = map[difference]string{
	diffProfile:  "E-mail address, username or names differ: Keycloak's are written to PostgreSQL.",
	diffVerified: "One store has the address as confirmed, the other has not: Keycloak's answer is written to PostgreSQL.",
	diffRole:     "Role, scope or user id differ: PostgreSQL's are written to Keycloak. What Keycloak had is in the audit log (user.overwrite), and may have been right if this database was restored.",
	diffDisabled: "Disabled in Keycloak: deleted in PostgreSQL. Only restore undoes that.",
	diffMissing:  "Not in Keycloak: deleted in PostgreSQL.",
	diffDeleted:  "Deleted in PostgreSQL and enabled in Keycloak: disabled in Keycloak. If this database was restored, the user may have been restored since.",
	diffUnknown:  "Only in Keycloak: imported as a user without scope. What Keycloak says of role and scope is in the audit log (user.import).",
	diffConflict: "Another user has its address or username in PostgreSQL, or it has no address, or something too long: left as it is, for an administrator.",
	diffUnread:   "A store has failed for this user alone: not compared.",
}

// syncAction is the audit action of a change that applies Keycloak's.
const syncAction = "user.sync"

// comparison is how a user differs in the two stores, and what makes them agree.
type comparison struct {
	Differences []difference
	Local       user // as PostgreSQL should have it; DeletedAt is left to whoever writes it
	Push        bool // Keycloak must get role, scope and state of Local
}

// compare compares a user of PostgreSQL with that of Keycloak. nil: that store has none.
func compare(local *user, remote *keycloakUser) comparison {
	switch {
	case local == nil && remote == nil:
		return comparison{}
	case local == nil:
		return comparison{[]difference{diffUnknown}, remote.imported(), true}
	case local.RegistrationOpen:
		return comparison{Local: *local}
	case remote == nil && local.IsActive:
		gone := *local
		gone.IsActive = false
		return comparison{[]difference{diffMissing}, gone, false}
	case remote == nil:
		return comparison{Local: *local}
	}
	merged := remote.profileOf(*local)
	merged.IsVerified = remote.verified()
	merged.IsActive = local.IsActive && remote.enabled()
	c := comparison{Local: merged}
	found := func(d difference, differs bool) bool {
		if differs {
			c.Differences = append(c.Differences, d)
		}
		return differs
	}
	found(diffProfile, merged.Email != local.Email || merged.Username != local.Username ||
		merged.FirstName != local.FirstName || merged.LastName != local.LastName)
	found(diffVerified, merged.IsVerified != local.IsVerified)
	found(diffDisabled, merged.IsActive != local.IsActive)
	overwrite := found(diffRole, !remote.hasClaims(*local))
	disable := found(diffDeleted, !local.IsActive && remote.enabled())
	c.Push = overwrite || disable
	return c
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

// imported is a user that only Keycloak has, as PostgreSQL should have it: without scope,
// whatever Keycloak says. Its user id may not be one, or another's.
func (ku keycloakUser) imported() user {
	u := ku.profileOf(user{ID: userID(ku.attribute(attrUserID)), KeycloakID: ku.id(), Role: roleUser, Source: sourceInternal,
		IsVerified: ku.verified(), IsActive: ku.enabled() || ku.awaitsVerification()})
	if registrationIDPattern.MatchString(ku.attribute(attrRegistrationID)) {
		u.Source = sourceWeb
	}
	return u
}

// fits says whether u can be in PostgreSQL: Keycloak's imports know no limits.
func (u user) fits() bool {
	return u.Email != "" && utf8.RuneCountInString(u.Email) <= 255 && utf8.RuneCountInString(u.Username) <= 100 &&
		utf8.RuneCountInString(u.FirstName) <= 100 && utf8.RuneCountInString(u.LastName) <= 100
}

// conflicts says whether a user can't have the address, username or names that it should have.
func (s *server) conflicts(ctx context.Context, u user) (bool, error) {
	if !u.fits() || !u.IsActive {
		return !u.fits(), nil
	}
	return s.store.taken(ctx, u)
}

// bothUsers returns the user of both stores with an id in Keycloak; nil: that store has none.
func (s *server) bothUsers(ctx context.Context, keycloakID string) (local *user, remote *keycloakUser, err error) {
	ku, err := s.kc.user(ctx, keycloakID)
	if err == nil {
		remote = &ku
	} else if !errors.Is(err, errNotFound) {
		return nil, nil, err
	}
	u, err := s.store.userByKeycloakID(ctx, keycloakID) // after Keycloak's: what is changed here meanwhile is noticed
	if err == nil {
		local = &u
	} else if !errors.Is(err, errNotFound) {
		return nil, nil, err
	}
	return local, remote, nil
}

// reconcile makes both stores agree on the user of a locked task, whatever the difference is by
// now. It may be repeated and loses nothing wherever it dies. errConflict: the user can't be
// imported, or can't have the address that it has in Keycloak; the rest was done.
func (s *server) reconcile(ctx context.Context, c caller, t task) error {
	keycloakID := strings.TrimPrefix(t.ID, "kc:")
	for {
		local, remote, err := s.bothUsers(ctx, keycloakID)
		switch {
		case err != nil, local == nil && remote == nil:
			return err
		case local == nil:
			return s.importUser(ctx, c, *remote)
		}
		want := compare(local, remote)
		conflicted, err := s.apply(ctx, c, *local, want.Local)
		if errors.Is(err, errRace) { // changed by another meanwhile
			continue
		}
		if err == nil && want.Push {
			err = s.overwrite(ctx, c, t, *local, *remote)
		}
		if err == nil && conflicted {
			err = errConflict
		}
		return err
	}
}

// apply writes what Keycloak says of a user to PostgreSQL. A profile that another user stands
// in the way of is left as it is, and reported. errRace: the row has been changed meanwhile.
func (s *server) apply(ctx context.Context, c caller, local, want user) (conflicted bool, err error) {
	if want == local {
		return false, nil
	}
	if conflicted, err = s.conflicts(ctx, want); err != nil {
		return false, err
	}
	if conflicted { // who was disabled does not wait for that
		want.Email, want.Username, want.FirstName, want.LastName = local.Email, local.Username, local.FirstName, local.LastName
	}
	if local.IsActive && !want.IsActive {
		now := s.now()
		want.DeletedAt = &now
	}
	u, effect, err := s.store.changeUser(ctx, c, local.ID, syncAction, func(before user) (user, error) {
		if !before.UpdatedAt.Equal(local.UpdatedAt) {
			return before, errRace
		}
		return want, nil
	}, s.now())
	if errors.Is(err, errConflict) { // taken at this moment
		return true, nil
	}
	if err == nil && len(effect.ended) > 0 {
		s.endInKeycloak(ctx, u.KeycloakID, "", effect.ended)
	}
	return conflicted, err
}

// overwrite gives Keycloak's user our role, scope and state: O1 audit entry and revocation of
// tokens that say something else, O2 Keycloak. A task that has failed before is audited already.
func (s *server) overwrite(ctx context.Context, c caller, t task, local user, remote keycloakUser) error {
	u, err := s.store.overwrite(ctx, c, local, remote.claims(), t.Attempts == 0, s.now()) // O1
	if err != nil {
		return err
	}
	return s.kc.push(ctx, remote, u, nil) // O2
}

// importUser makes an account of somebody whom only Keycloak has. A registration that this
// database does not know, because it was restored, goes on where it was; one that it knows has
// a task of its own.
func (s *server) importUser(ctx context.Context, c caller, ku keycloakUser) error {
	u := ku.imported()
	if !u.fits() {
		return errConflict
	}
	var reg registration
	if u.Source == sourceWeb {
		id := registrationID(ku.attribute(attrRegistrationID))
		known, err := s.store.registration(ctx, id)
		switch {
		case errors.Is(err, errNotFound):
			reg = s.registrationFrom(u, ku)
			reg.ID = id
		case err != nil:
			return err
		case known.State != verified && !ku.verified(): // R2, or ended: E2
			return s.store.enqueue(ctx, s.now(), string(id))
		}
	}
	switch _, err := s.store.user(ctx, u.ID); {
	case err == nil, !userIDPattern.MatchString(string(u.ID)):
		u.ID = newUserID()
	case !errors.Is(err, errNotFound):
		return err
	}
	if u.CreatedAt = s.now(); !u.IsActive {
		u.DeletedAt = &u.CreatedAt
	}
	reg.UserID = u.ID
	if err := s.store.importUser(ctx, c, u, reg, ku.claims()); err != nil {
		return err
	}
	if reg.State == pending {
		return nil
	}
	return s.kc.push(ctx, ku, u, nil) // dying before this leaves the task, which pushes
}

// registrationFrom is the registration that a user of Keycloak came by, as far as Keycloak
// knows it.
func (s *server) registrationFrom(u user, ku keycloakUser) registration {
	reg := registration{Email: u.Email, Username: u.Username, FirstName: u.FirstName, LastName: u.LastName, State: verified,
		KeycloakID: u.KeycloakID, Locale: templates.Language("", ku.attribute(attrLocale)), CreatedAt: s.now(),
		Mail: mailSent, Source: sourceWeb, Role: roleUser, TokenHash: tokenHash(newToken())} // nobody's: the mail's is not known any more
	if ku.CreatedTimestamp != nil {
		reg.CreatedAt = time.UnixMilli(*ku.CreatedTimestamp).UTC()
	}
	reg.ExpiresAt = reg.CreatedAt.Add(s.cfg.VerificationTTL)
	if ku.awaitsVerification() {
		token := ku.attribute(attrToken)
		reg.State, reg.TokenHash, reg.CodeHash = pending, tokenHash(token), codeHash(token, ku.attribute(attrCode))
	}
	return reg
}

// reconcileTask is reconcile for the queue. A conflict may be over when another user has moved
// on; what stays is left to the full pass, which reports it.
func (s *server) reconcileTask(ctx context.Context, t task) (time.Time, error) {
	err := s.reconcile(ctx, system("sync"), t)
	if errors.Is(err, errConflict) && t.Attempts >= 3 {
		s.log.WarnContext(ctx, "sync: user left in conflict", "task", t.ID)
		return never, nil
	}
	return never, err
}

const (
	eventsInterval = 5 * time.Second  // between two looks at the events
	eventsOverlap  = 10 * time.Second // an event may become visible so long after its time
	eventsSettle   = 3 * time.Second  // how long a sign-in by this service may take to get its row
)

// readEvents reads Keycloak's events since the last time, in order. It enqueues the users that
// were changed and audits what has happened at Keycloak itself, in the transaction that moves
// the cursor: after a crash events are read again, and those that were read are known by id.
func (s *server) readEvents(ctx context.Context, t task) (time.Time, error) {
	cursor, err := s.store.syncCursor(ctx, s.now())
	if err != nil {
		return never, err
	}
	next := syncCursor{IDs: []string{}}
	var events []keycloakEvent
	for source := range eventSources {
		found, latest, err := s.kc.events(ctx, source, cursor.At[source]-eventsOverlap.Milliseconds(), func() error {
			return s.store.extend(ctx, t, s.now())
		})
		if err != nil {
			return never, err
		}
		next.At[source] = min(max(cursor.At[source], latest), s.now().UnixMilli()) // one in the future would lose all until then
		for _, e := range found {
			if e.Type == "LOGIN" && e.At > s.now().Add(-eventsSettle).UnixMilli() {
				continue // it comes again
			}
			if !slices.Contains(cursor.IDs, e.ID) {
				events = append(events, e)
			}
			if e.At >= next.At[source]-eventsOverlap.Milliseconds() {
				next.IDs = append(next.IDs, e.ID)
			}
		}
	}
	slices.SortStableFunc(events, func(a, b keycloakEvent) int { return int(a.At - b.At) })
	if err := s.store.takeEvents(ctx, t, next, events, s.now()); err != nil {
		return never, err
	}
	if len(events) > 0 {
		s.wakeWorker()
	}
	return s.now().Add(min(eventsInterval, max(s.cfg.JobInterval, time.Second))), nil
}
