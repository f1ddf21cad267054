package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

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
	diffProfile  difference = "profile"              // e-mail address, username or names: Keycloak's come here
	diffVerified difference = "verified"             // is the address confirmed: so does Keycloak's answer
	diffRole     difference = "role_or_scope"        // or user_id: ours go to Keycloak
	diffDisabled difference = "disabled_in_keycloak" // the user is deleted here
	diffMissing  difference = "missing_in_keycloak"  // likewise
	diffDeleted  difference = "deleted_here"         // but enabled in Keycloak: disabled there
	diffUnknown  difference = "unknown_here"         // only in Keycloak: taken over
	diffConflict difference = "conflict"             // unknown here, and another user has its address or username, or it has none
)

// mass are the differences that a wrong realm makes in great number.
var mass = []difference{diffDisabled, diffMissing, diffDeleted, diffUnknown}

const (
	syncPage     = 500              // users that Keycloak lists at once: see usersPage
	syncBeat     = time.Minute      // a run that has shown no progress for so long is over
	syncDaily    = 24 * time.Hour   // between two full passes
	syncOverlap  = 10 * time.Second // an event may become visible so long after its time
	syncFew      = 10               // changes that are never too many at once
	syncExamples = 10               // of each class in a report
)

// differences lists how a user here differs from Keycloak's.
func differences(u syncUser, ku keycloakUser) (all []difference) {
	switch {
	case u.Due:
		return nil
	case u.registering() && ku.verified():
		return []difference{diffVerified}
	case u.registering():
		return nil
	}
	if now := ku.profileOf(u.user); now.Email != u.Email || now.Username != u.Username || now.FirstName != u.FirstName || now.LastName != u.LastName {
		all = append(all, diffProfile)
	}
	if u.IsVerified != ku.verified() {
		all = append(all, diffVerified)
	}
	for name, value := range attributesOf(u.user) {
		if ku.Attributes == nil || !slices.Equal((*ku.Attributes)[name], value) {
			all = append(all, diffRole)
			break
		}
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
	text := func(p *string) string {
		if p == nil {
			return ""
		}
		return *p
	}
	if email := text(ku.Email); !strings.EqualFold(email, u.Email) {
		u.Email = email
	}
	if username := text(ku.Username); !strings.EqualFold(username, u.Username) {
		u.Username = username
	}
	u.FirstName, u.LastName = text(ku.FirstName), text(ku.LastName)
	return u
}

// reconcile brings one user into step, whatever the difference is by now. It may be
// repeated, and dies nowhere with anything lost: what has changed here is due in Keycloak
// in the same transaction (U1). errConflict: the user can't be taken over, or can't have
// the address that it has in Keycloak.
func (s *server) reconcile(ctx context.Context, c caller, keycloakID string) error {
	ku, err := s.kc.user(ctx, keycloakID)
	missing := errors.Is(err, errNotFound)
	if err != nil && !missing {
		return err
	}
	u, err := s.store.syncUser(ctx, keycloakID)
	switch {
	case errors.Is(err, errNotFound) && missing:
		return nil
	case errors.Is(err, errNotFound):
		return s.takeOver(ctx, c, ku)
	case err != nil:
		return err
	case u.Due:
		_, err = s.settleUser(ctx, c, u.ID)
		return err
	case u.registering(): // the repair loop concludes, or creates again
		return s.store.wakeRegistration(ctx, u.ID, s.now())
	}
	found := differences(u, ku)
	_, err = s.changeUser(ctx, c, u.ID, "user.sync", func(u user) (user, error) {
		now := s.now()
		if !missing {
			u = ku.profileOf(u)
			u.IsVerified = ku.verified()
		}
		if u.IsActive && (missing || !ku.enabled()) {
			u.IsActive, u.DeletedAt = false, &now
		}
		return u, nil
	})
	if err != nil && asProblem(err).slug() == problemUserExists.slug() {
		return errConflict
	}
	if err == nil && (slices.Contains(found, diffRole) || slices.Contains(found, diffDeleted)) {
		if err = s.store.oweUser(ctx, c, u.ID, s.now()); err == nil {
			_, err = s.settleUser(ctx, c, u.ID)
		}
	}
	return err
}

// takeOver makes an account of somebody whom only Keycloak knows: a user without scope,
// whatever Keycloak says. A registration that this database does not know, because it was
// restored, goes on where it was.
func (s *server) takeOver(ctx context.Context, c caller, ku keycloakUser) error {
	u := ku.profileOf(user{ID: userID(ku.attribute(attrUserID)), KeycloakID: ku.id(), Role: roleUser, Source: sourceInternal,
		IsVerified: ku.verified(), IsActive: true, CreatedAt: s.now(), UpdatedAt: s.now()})
	if !userIDPattern.MatchString(string(u.ID)) {
		u.ID = newUserID()
	}
	reg := registration{ID: registrationID(ku.attribute(attrRegistrationID)), Email: u.Email, Username: u.Username, FirstName: u.FirstName,
		LastName: u.LastName, State: pending, KeycloakID: u.KeycloakID, UserID: u.ID, Locale: ku.attribute(attrLocale), WithPassword: true,
		TokenHash: tokenHash(ku.attribute(attrToken)), CodeHash: codeHash(ku.attribute(attrToken), ku.attribute(attrCode))}
	reg.CreatedAt = s.now()
	if ku.CreatedTimestamp != nil {
		reg.CreatedAt = time.UnixMilli(*ku.CreatedTimestamp).UTC()
	}
	reg.ExpiresAt = reg.CreatedAt.Add(s.cfg.VerificationTTL)
	switch {
	case u.Email == "":
		return errConflict
	case reg.ID == "": // created in Keycloak
	case ku.verified():
		reg.State, u.Source = verified, sourceWeb
	default:
		u.Source = sourceWeb
	}
	if now := s.now(); !ku.enabled() && (u.Source == sourceInternal || u.IsVerified) {
		u.IsActive, u.DeletedAt = false, &now
	}
	if err := s.store.takeOver(ctx, c, u, reg, s.now()); err != nil {
		return err
	}
	_, err := s.settleUser(ctx, c, u.ID)
	return err
}

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
	return errors.Join(err, s.store.leaveSyncPlace(ctx, place))
}

func (s *server) applyEvents(ctx context.Context, place *syncPlace) error {
	events, err := s.kc.userEvents(ctx, place.At-syncOverlap.Milliseconds())
	if err != nil {
		return err
	}
	next := syncPlace{At: place.At, Owner: place.Owner}
	var users []string
	for _, e := range events {
		next.At = max(next.At, e.At)
		if !slices.Contains(place.Events, e.ID) && !slices.Contains(users, e.UserID) {
			users = append(users, e.UserID)
		}
	}
	for _, e := range events {
		if e.At >= next.At-syncOverlap.Milliseconds() {
			next.Events = append(next.Events, e.ID)
		}
	}
	if len(users) > syncFew {
		run := syncRun{}
		for _, id := range users {
			if err := s.inspect(ctx, &run, id); err != nil {
				return err
			}
		}
		if err := s.tooMany(ctx, run); err != nil {
			return err
		}
	}
	for _, id := range users {
		if err := s.reconcile(ctx, system("sync"), id); errors.Is(err, errUnavailable) {
			return err
		} else if err != nil {
			s.log.WarnContext(ctx, "a user is not in step", "keycloak_id", id, "error", err)
		}
	}
	*place = next
	return nil
}

// syncRun is a full pass: its progress and its report.
type syncRun struct {
	ID          syncID                    `json:"sync_id" example:"SYN-V1StGXR8_Z5jdHi6"`
	DryRun      bool                      `json:"dry_run"`
	Status      string                    `json:"status" enum:"running,done,stopped,failed" description:"stopped: too many changes at once, nothing was changed."`
	StartedAt   time.Time                 `json:"started_at"`
	EndedAt     *time.Time                `json:"ended_at" nullable:"true"`
	Checked     int                       `json:"checked" description:"Users of Keycloak that were looked at."`
	Total       int                       `json:"total" description:"Users that Keycloak had at the start."`
	Differences map[difference]*syncClass `json:"differences" description:"By class."`
	Detail      string                    `json:"detail" description:"Why it was stopped or has failed."`

	planned []string // ids in Keycloak of the users that differ
}

// syncClass is what a run has found of one class of differences.
type syncClass struct {
	Found    int      `json:"found"`
	Repaired int      `json:"repaired"`
	Examples []string `json:"examples" description:"Ids of users, or in Keycloak of those unknown here."`
}

// note counts what was found of a user.
func (run *syncRun) note(keycloakID, name string, found ...difference) {
	for _, d := range found {
		if run.Differences == nil {
			run.Differences = map[difference]*syncClass{}
		}
		if run.Differences[d] == nil {
			run.Differences[d] = &syncClass{Examples: []string{}}
		}
		class := run.Differences[d]
		if class.Found++; len(class.Examples) < syncExamples {
			class.Examples = append(class.Examples, name)
		}
	}
	if len(found) > 0 {
		run.planned = append(run.planned, keycloakID)
	}
}

func (run syncRun) found() (n int) {
	for _, class := range run.Differences {
		n += class.Found
	}
	return n
}

// remain says how many differences are left.
func (run syncRun) remain() (n int) {
	for _, class := range run.Differences {
		n += class.Found - class.Repaired
	}
	return n
}

// tooMany is the error of a run that would disable or take over more than the configured
// share of users, as it happens with the wrong realm.
func (s *server) tooMany(ctx context.Context, run syncRun) error {
	ours, err := s.store.countUsers(ctx)
	if err != nil {
		return err
	}
	changes := 0
	for _, d := range mass {
		if class := run.Differences[d]; class != nil {
			changes += class.Found
		}
	}
	if most := max(syncFew, max(ours, run.Total)*s.cfg.SyncMaxShare/100); changes > most {
		return problemSyncStopped.saying(fmt.Sprintf("%d users would be disabled or taken over, more than %d (SYNC_MAX_SHARE=%d). Is this the right realm? Nothing was changed.",
			changes, most, s.cfg.SyncMaxShare))
	}
	return nil
}

// inspect notes how one user differs.
func (s *server) inspect(ctx context.Context, run *syncRun, keycloakID string) error {
	ku, err := s.kc.user(ctx, keycloakID)
	missing := errors.Is(err, errNotFound)
	if err != nil && !missing {
		return err
	}
	ours, known, err := s.store.syncUsers(ctx, []string{keycloakID}, []string{ku.attribute(attrRegistrationID)})
	if err != nil {
		return err
	}
	u, here := ours[keycloakID]
	switch {
	case missing && here && u.IsActive && !u.Due && !u.registering():
		run.note(keycloakID, string(u.ID), diffMissing)
	case !missing:
		run.compare(ku, u, here, known[ku.attribute(attrRegistrationID)])
	}
	return nil
}

// compare notes how a user of Keycloak differs from ours, if there is one here.
func (run *syncRun) compare(ku keycloakUser, u syncUser, here, registered bool) {
	switch {
	case here:
		run.note(u.KeycloakID, string(u.ID), differences(u, ku)...)
	case !registered: // otherwise the repair loop adopts or deletes it
		run.note(ku.id(), ku.id(), diffUnknown)
	}
}

// survey compares all users, page by page. Those that come or go meanwhile may be missed,
// and are found by their events; none is reported as missing that is there.
func (s *server) survey(ctx context.Context, run *syncRun, progress func(*syncRun) error) (err error) {
	if run.Total, err = s.kc.countUsers(ctx); err != nil {
		return err
	}
	seen := map[[16]byte]bool{}
	for first := 0; ; first += syncPage {
		page, err := s.kc.usersPage(ctx, first, syncPage)
		if err != nil {
			return err
		}
		var ids, registrations []string
		for _, ku := range page {
			ids, registrations = append(ids, ku.id()), append(registrations, ku.attribute(attrRegistrationID))
			seen[shortDigest(ku.id())] = true
		}
		ours, registered, err := s.store.syncUsers(ctx, ids, registrations)
		if err != nil {
			return err
		}
		for _, ku := range page {
			u, here := ours[ku.id()]
			run.compare(ku, u, here, registered[ku.attribute(attrRegistrationID)])
		}
		run.Checked += len(page)
		if err := progress(run); err != nil || len(page) < syncPage {
			if err != nil {
				return err
			}
			break
		}
	}
	var missing []string
	if err := s.store.liveKeycloakIDs(ctx, func(id string) {
		if !seen[shortDigest(id)] {
			missing = append(missing, id)
		}
	}); err != nil {
		return err
	}
	for _, id := range missing {
		if err := errors.Join(s.inspect(ctx, run, id), progress(run)); err != nil {
			return err
		}
	}
	return nil
}

// runSync makes a full pass that has begun. Killed anywhere, it has repaired some users and
// left the others as they were.
func (s *server) runSync(ctx context.Context, c caller, run syncRun, show func(syncRun)) syncRun {
	progress := func(run *syncRun) error {
		show(*run)
		if s.stopping.Load() {
			return errors.New("the instance was stopped")
		}
		return s.store.saveSync(ctx, *run, s.now())
	}
	err := s.survey(ctx, &run, progress)
	if err == nil && !run.DryRun {
		err = s.tooMany(ctx, run)
	}
	for i, id := range run.planned {
		if err != nil || run.DryRun {
			break
		}
		before := syncRun{}
		if err = s.inspect(ctx, &before, id); err != nil {
			break
		}
		switch err = s.reconcile(ctx, c, id); {
		case errors.Is(err, errConflict):
			run.note(id, id, diffConflict)
			err = nil
		case err == nil:
			for d := range before.Differences {
				if class := run.Differences[d]; class != nil {
					class.Repaired++
				}
			}
		}
		if err == nil && i%10 == 0 {
			err = progress(&run)
		}
	}
	run.Status = "done"
	if p := asProblem(err); err != nil && p.slug() == problemSyncStopped.slug() {
		run.Status, run.Detail = "stopped", p.Detail
	} else if err != nil {
		run.Status, run.Detail = "failed", p.Title+"."
		s.log.ErrorContext(ctx, "a sync has failed", "sync", run.ID, "error", err)
	}
	now := s.now()
	run.EndedAt = &now
	if err := s.store.endSync(ctx, c, run, now); err != nil {
		s.log.ErrorContext(ctx, "the end of a sync is not on record", "sync", run.ID, "error", err)
	}
	return run
}

// syncDaily makes a full pass when the last one was a day ago.
func (s *server) syncDaily(ctx context.Context) error {
	run, err := s.store.beginSync(ctx, system("sync"), false, s.now(), s.now().Add(-syncDaily))
	if errors.Is(err, errConflict) {
		return nil // one runs, or was done
	} else if err != nil {
		return err
	}
	if run = s.runSync(ctx, system("sync"), run, func(syncRun) {}); run.Status != "done" {
		return fmt.Errorf("%s: %s", run.Status, run.Detail)
	}
	return nil
}

type startSyncIn struct {
	DryRun bool `json:"dry_run,omitempty" example:"true" description:"Only report."`
}

// location is where its progress is.
func (run syncRun) location() string { return "/api/v1/sync/" + string(run.ID) }

// startSync begins a full pass; this instance makes it after the answer.
func (s *server) startSync(ctx context.Context, c caller, in startSyncIn) (syncRun, error) {
	if !c.is(roleAdmin) {
		return syncRun{}, problemForbidden
	}
	run, err := s.store.beginSync(ctx, c, in.DryRun, s.now(), s.now())
	if errors.Is(err, errConflict) {
		return syncRun{}, problemSyncRunning.about(string(run.ID))
	} else if err != nil {
		return syncRun{}, err
	}
	ctx = context.WithoutCancel(ctx)
	s.background.Go(func() { s.runSync(ctx, c, run, func(syncRun) {}) })
	return run, nil
}

type syncIn struct {
	ID syncID `path:"sync_id" pattern:"^SYN-[A-Za-z0-9_-]{16}$" example:"SYN-V1StGXR8_Z5jdHi6"`
}

// syncStatus shows how far a full pass is, or its report.
func (s *server) syncStatus(ctx context.Context, c caller, in syncIn) (syncRun, error) {
	if !c.is(roleAdmin) {
		return syncRun{}, problemForbidden
	}
	run, err := s.store.syncRun(ctx, in.ID)
	if errors.Is(err, errNotFound) {
		err = problemNotFound
	}
	return run, err
}

// errDiffer ends the program with status 3.
var errDiffer = errors.New("the two stores differ")

// syncCommand makes a full pass for an operator.
func (s *server) syncCommand(ctx context.Context, dryRun bool, operator string, out io.Writer) error {
	c := caller{Actor: "operator:" + operator}
	run, err := s.store.beginSync(ctx, c, dryRun, s.now(), s.now())
	if errors.Is(err, errConflict) {
		return fmt.Errorf("a sync is running already: %s", run.ID)
	} else if err != nil {
		return err
	}
	run = s.runSync(ctx, c, run, func(run syncRun) {
		fmt.Fprintf(out, "\r%d of %d users looked at, %d differences, %d repaired", run.Checked, run.Total, run.found(), run.found()-run.remain())
	})
	fmt.Fprintf(out, "\n%s %s\n", run.Status, run.Detail)
	for _, d := range slices.Sorted(maps.Keys(run.Differences)) {
		class := run.Differences[d]
		fmt.Fprintf(out, "%-22s %6d found %6d repaired  %s\n", d, class.Found, class.Repaired, strings.Join(class.Examples, " "))
	}
	switch {
	case run.Status != "done":
		return errors.New("the sync was not completed")
	case run.remain() > 0:
		return errDiffer
	}
	return nil
}
