package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/Nerzal/gocloak/v13"
)

// PostgreSQL and Keycloak are kept in sync: for role and scope PostgreSQL wins; for e-mail,
// username, names and "verified" Keycloak does; for "active" the stricter side wins, and only
// restore enables again. What this service changes it pushes itself. Sync finds what others
// have changed in Keycloak: within seconds by its events, and once a day by a full pass, which
// needs no events. A user whose registration is open belongs to its registration alone. Sync
// never deletes an account: only its own person does, at Keycloak, and is then erased.

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
	diffVerified: "Only one store has the address as confirmed: Keycloak's answer is written to PostgreSQL.",
	diffRole: "Role, scope or user id differ: PostgreSQL's are written to Keycloak. What Keycloak had is in the " +
		"audit log (user.overwrite), and may have been right if this database was restored.",
	diffDisabled: "Disabled in Keycloak: deleted in PostgreSQL. Only restore undoes that.",
	diffMissing:  "Not in Keycloak: deleted in PostgreSQL.",
	diffDeleted: "Deleted in PostgreSQL and enabled in Keycloak: disabled in Keycloak. If this database was " +
		"restored, the user may have been restored since.",
	diffUnknown: "Only in Keycloak: imported as a user without scope. What Keycloak says of it is in the audit log " +
		"(user.import).",
	diffConflict: "Another user has its address or username in PostgreSQL, or it has no address, or something too " +
		"long: left as it is, for an administrator.",
	diffUnread: "A store has failed for this user alone: not compared.",
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
	case local.Registration != "", local.erased(), remote == nil && !local.IsActive:
		return comparison{Local: *local}
	case remote == nil:
		gone := *local
		gone.IsActive = false
		return comparison{[]difference{diffMissing}, gone, false}
	}
	profile := remote.profileOf(*local)
	c := comparison{Local: profile}
	c.Local.IsVerified = remote.verified()
	c.Local.IsActive = local.IsActive && remote.enabled()
	for _, d := range []struct {
		class        difference
		differ, push bool
	}{
		{diffProfile, profile != *local, false},
		{diffVerified, c.Local.IsVerified != local.IsVerified, false},
		{diffDisabled, c.Local.IsActive != local.IsActive, false},
		{diffRole, !remote.hasClaims(*local), true},
		{diffDeleted, !local.IsActive && remote.enabled(), true},
	} {
		if d.differ {
			c.Differences, c.Push = append(c.Differences, d.class), c.Push || d.push
		}
	}
	return c
}

// profileOf is u with Keycloak's e-mail address, username and names, in the form in which they are stored. Addresses
// and usernames that differ in case only are the same: Keycloak has them in lower case.
func (ku keycloakUser) profileOf(u user) user {
	if email, _ := mailAddress(gocloak.PString(ku.Email)); !strings.EqualFold(email, u.Email) {
		u.Email = email
	}
	if username := gocloak.PString(ku.Username); !strings.EqualFold(username, u.Username) {
		u.Username = username
	}
	u.FirstName, u.LastName = plainText(gocloak.PString(ku.FirstName)), plainText(gocloak.PString(ku.LastName))
	return u
}

// imported is a user that only Keycloak has, as PostgreSQL should have it: without scope,
// whatever Keycloak says. Its user id may not be one, or another's.
func (ku keycloakUser) imported() user {
	u := ku.profileOf(user{ID: userID(ku.attribute(attrUserID)), KeycloakID: ku.id(), Role: roleUser,
		Source: sourceInternal, IsVerified: ku.verified(), IsActive: ku.enabled() || ku.awaitsVerification()})
	if registrationIDPattern.MatchString(ku.attribute(attrRegistrationID)) {
		u.Source = sourceWeb
	}
	return u
}

// inspection is a user in both stores; nil: that store has none.
type inspection struct {
	local  *user
	remote *keycloakUser
	reg    *registration // by which a user came whom only Keycloak has
	comparison
}

// inspect compares a user. Keycloak is asked first: what is changed in PostgreSQL meanwhile is
// noticed. A profile that PostgreSQL can't have is a conflict, and left as it is.
func (s *server) inspect(ctx context.Context, keycloakID string) (in inspection, err error) {
	if in.remote, err = orNone(s.kc.user(ctx, keycloakID)); err == nil {
		in.local, err = orNone(s.store.userByKeycloakID(ctx, keycloakID))
	}
	if err != nil {
		return in, err
	}
	in.comparison = compare(in.local, in.remote)
	if in.local == nil && in.Local.Source == sourceWeb {
		in.reg, err = orNone(s.store.registration(ctx, registrationID(in.remote.attribute(attrRegistrationID))))
		if err != nil || in.reg != nil && !in.remote.verified() &&
			(in.reg.State == pending || in.reg.State != verified && in.reg.KeycloakID != "") {
			in.comparison = comparison{} // R2, E2: it belongs to its registration
		}
	}
	if len(in.Differences) == 0 || in.Differences[0] != diffProfile && in.Differences[0] != diffUnknown {
		return in, err
	}
	conflict, err := s.store.conflicts(ctx, in.Local)
	if conflict {
		in.Differences[0] = diffConflict
	}
	if u := in.local; conflict && u != nil {
		in.Local.Email, in.Local.Username = u.Email, u.Username
		in.Local.FirstName, in.Local.LastName = u.FirstName, u.LastName
	}
	return in, err
}

// formerAddress says whether the username is the address that the user had until now. Its next owner would be taken
// for this user.
func (in inspection) formerAddress() bool {
	if in.local == nil || in.remote == nil || in.local.Registration != "" {
		return false
	}
	username, email := gocloak.PString(in.remote.Username), gocloak.PString(in.remote.Email)
	return email != "" && strings.EqualFold(username, in.local.Email) && !strings.EqualFold(username, email)
}

// orNone returns nil for what was not found.
func orNone[T any](v T, err error) (*T, error) {
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	return &v, err
}

// reconcile makes both stores agree on the user of a locked task, whatever the difference is by
// now: PostgreSQL gets what Keycloak says; then Keycloak gets role, scope and state: O1 audit
// entry and revocation of tokens that say something else, O2 Keycloak. It may be repeated and
// loses nothing wherever it dies. errConflict: the user can't be imported, or can't have the
// address that it has in Keycloak; the rest was done.
func (s *server) reconcile(ctx context.Context, c caller, t task) error {
	for {
		in, err := s.inspect(ctx, strings.TrimPrefix(t.ID, "kc:"))
		conflict := slices.Contains(in.Differences, diffConflict)
		switch {
		case err != nil:
		case in.local != nil && in.local.erased():
			return s.finishErasure(ctx, t, *in.local)
		case in.formerAddress():
			if err = s.kc.rename(ctx, *in.remote, in.local.ID); err == nil {
				continue
			}
		case in.local != nil:
			err = s.apply(ctx, c, *in.local, in.Local)
		case len(in.Differences) > 0 && !conflict:
			err = s.importUser(ctx, c, in)
		}
		if errors.Is(err, errChanged) {
			continue
		}
		if err == nil && in.Push && in.local != nil {
			err = s.store.overwrite(ctx, c, t, in.local.ID, in.remote.claims(), s.now()) // O1
		}
		if err == nil && in.local != nil && in.remote != nil && (len(in.Differences) > 0 || in.local.NotBefore != nil) {
			var u user
			if u, err = s.store.user(ctx, in.local.ID); err == nil {
				err = s.push(ctx, *in.remote, u) // O2
			}
		}
		if err == nil && conflict {
			err = errConflict
		}
		return err
	}
}

// apply writes what Keycloak says of a user to PostgreSQL. It returns errChanged.
func (s *server) apply(ctx context.Context, c caller, local, want user) error {
	if want == local {
		return nil
	}
	now := s.now()
	if local.IsActive && !want.IsActive {
		want.DeletedAt = &now
	}
	_, _, err := s.store.changeUser(ctx, c, local.ID, syncAction, func(before user) (user, error) {
		if !before.UpdatedAt.Equal(local.UpdatedAt) {
			return before, errChanged
		}
		return want, nil
	}, now)
	return err
}

// importUser makes an account of somebody whom only Keycloak has. A registration that this
// database does not know, because it was restored, goes on where it was. Dying before the push
// leaves the task, which pushes.
func (s *server) importUser(ctx context.Context, c caller, in inspection) error {
	u, now, reg := in.Local, s.now(), registration{}
	switch {
	case in.reg != nil && in.reg.State != verified && !in.remote.verified(): // ended: E2
		return s.store.enqueue(ctx, now, string(in.reg.ID))
	case in.reg == nil && u.Source == sourceWeb:
		reg = s.lostRegistration(*in.remote)
	}
	switch _, err := s.store.user(ctx, u.ID); {
	case err == nil, !userIDPattern.MatchString(string(u.ID)):
		u.ID = newUserID()
	case !errors.Is(err, errNotFound):
		return err
	}
	if u.CreatedAt = now; !u.IsActive {
		u.DeletedAt = &now
	}
	err := s.store.importUser(ctx, c, u, reg, in.remote.claims())
	if err == nil && reg.State != pending {
		err = s.kc.push(ctx, *in.remote, u, nil)
	}
	return err
}

// lostRegistration is the registration by which a user of Keycloak came, as far as Keycloak
// knows it.
func (s *server) lostRegistration(ku keycloakUser) registration {
	token := cmp.Or(ku.attribute(attrToken), newToken()) // nobody's: Keycloak does not know the mail's any more
	reg := registration{ID: registrationID(ku.attribute(attrRegistrationID)), State: verified,
		TokenHash: digest(token), CodeHash: codeHash(token, ku.attribute(attrCode)),
		Locale:    s.cfg.site.Match(ku.attribute(attrLocale)),
		CreatedAt: time.UnixMilli(gocloak.PInt64(ku.CreatedTimestamp))}
	if ku.awaitsVerification() {
		reg.State = pending
	}
	reg.ExpiresAt = reg.CreatedAt.Add(s.cfg.VerificationTTL)
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

// readEvents reads Keycloak's events since the last time. It enqueues the users that were
// changed and audits what has happened at Keycloak itself, in the transaction that moves the
// cursor: after a crash events are read again, and those that were read are known by id.
func (s *server) readEvents(ctx context.Context, t task) (time.Time, error) {
	start := s.now()
	cursor, err := s.store.syncCursor(ctx, start)
	if err != nil {
		return never, err
	}
	known := map[string]bool{} // events that were taken before, or come twice
	for _, id := range cursor.IDs {
		known[id] = true
	}
	next := syncCursor{At: cursor.At, IDs: []string{}}
	events, changed := []keycloakEvent{}, []string{} // changed: tasks of users
	for source := range eventSources {
		found, err := s.kc.events(ctx, source, cursor.At[source]-eventsOverlap.Milliseconds(), func() error {
			return s.store.extend(ctx, t, s.now())
		})
		if err != nil {
			return never, err
		}
		if len(found) > 0 { // this service's own, too, or they would be read again and again
			next.At[source] = max(next.At[source], found[len(found)-1].At)
		}
		next.At[source] = min(next.At[source], start.UnixMilli()) // one in the future would lose all until then
		for _, e := range found {
			// A user is looked at for as long as its event is read: Keycloak commits before it drops the user from
			// its caches, and for an instant answers what was before.
			if !e.own && e.changesUser() && (!known[e.ID] || e.At > start.Add(-eventsOverlap).UnixMilli()) {
				changed = append(changed, kcTask(e.UserID))
			}
			switch {
			case e.own, strings.HasPrefix(e.Type, "LOGIN") && e.At > start.Add(-eventsSettle).UnixMilli():
				continue // a sign-in comes again
			case !known[e.ID]:
				known[e.ID] = true
				events = append(events, e)
			}
			if e.At >= next.At[source]-eventsOverlap.Milliseconds() {
				next.IDs = append(next.IDs, e.ID)
			}
		}
	}
	if err := s.store.takeEvents(ctx, t, next, events, changed, s.now()); err != nil {
		return never, err
	}
	if len(events)+len(changed) > 0 {
		s.wakeWorker()
	}
	return s.now().Add(min(eventsInterval, max(s.cfg.JobInterval, time.Second))), nil
}
