package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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
	diffProfile  difference = "profile"              // e-mail address, username or names: Keycloak's come here
	diffVerified difference = "verified"             // is the address confirmed: so does Keycloak's answer
	diffRole     difference = "role_or_scope"        // or user_id: ours go to Keycloak
	diffDisabled difference = "disabled_in_keycloak" // the user is deleted here
	diffMissing  difference = "missing_in_keycloak"  // likewise
	diffDeleted  difference = "deleted_here"         // but enabled in Keycloak: disabled there
	diffUnknown  difference = "unknown_here"         // only in Keycloak: taken over
	diffConflict difference = "conflict"             // unknown here or changed there, and another user has its address or username, or it has no address
)

// mass are the differences that a wrong realm makes in great number.
var mass = []difference{diffDisabled, diffMissing, diffDeleted, diffUnknown}

const (
	syncPage     = 250              // users that Keycloak lists at once: see usersPage
	syncBeat     = time.Minute      // a run that has shown no progress for so long is over
	syncDaily    = 24 * time.Hour   // between two full passes
	syncPause    = 5 * time.Minute  // before a daily one that has failed is tried again
	syncOverlap  = 10 * time.Second // an event may become visible so long after its time
	syncFew      = 10               // changes that are never too many at once
	syncExamples = 10               // of each class in a report
	syncAction   = "user.sync"      // on record
)

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
		if err == nil && u.Due { // ours goes first, or it would look like a difference
			if _, err = s.settleUser(ctx, c, u.ID); err == nil {
				u, err = s.store.syncUser(ctx, keycloakID)
			}
		}
		here := !errors.Is(err, errNotFound)
		if err != nil && here {
			return err
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
	if found := differences(u, ku); err == nil && !missing && (slices.Contains(found, diffRole) || slices.Contains(found, diffDeleted)) {
		if err = s.store.oweUser(ctx, c, u.ID, s.now()); err == nil {
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
	if err := s.store.takeOver(ctx, c, u, reg, now); err != nil {
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
	if errors.As(err, new(problem)) { // stopped: the place stays ours for a while, so that nobody counts so many users at once again
		return err
	}
	return errors.Join(err, s.store.leaveSyncPlace(context.WithoutCancel(ctx), place))
}

func (s *server) applyEvents(ctx context.Context, place *syncPlace) error {
	events, latest, err := s.kc.userEvents(ctx, place.At-syncOverlap.Milliseconds())
	if err != nil {
		return err
	}
	next := syncPlace{At: max(place.At, latest), Events: []string{}, Owner: place.Owner}
	var users []string
	for _, e := range events {
		if !slices.Contains(place.Events, e.ID) && !slices.Contains(users, e.UserID) {
			users = append(users, e.UserID)
		}
		if e.At >= next.At-syncOverlap.Milliseconds() {
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
	for _, id := range users {
		if err := errors.Join(s.inspect(ctx, &run, id), s.store.keepSyncPlace(ctx, owner, s.now())); err != nil {
			return err
		}
		if err := run.tooMany(); err != nil {
			return err
		}
	}
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

	planned []planned
	most    int // users that it may disable or take over
}

// planned is a user that differs, or that a survey does not show to be in step.
type planned struct {
	keycloakID string
	found      []difference
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
		run.planned = append(run.planned, planned{keycloakID, found})
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

// limit reads how many users the realm has, and how many a run may disable or take over.
func (s *server) limit(ctx context.Context, run *syncRun) error {
	ours, err := s.store.countUsers(ctx)
	if err == nil {
		run.Total, err = s.kc.countUsers(ctx)
	}
	run.most = max(syncFew, max(ours, run.Total)*s.cfg.SyncMaxShare/100)
	return err
}

// tooMany is the error of a run that would disable or take over more than the configured
// share of users, as it happens with the wrong realm.
func (run syncRun) tooMany() error {
	changes := 0
	for _, d := range mass {
		if class := run.Differences[d]; class != nil {
			changes += class.Found
		}
	}
	if changes <= run.most {
		return nil
	}
	return problemSyncStopped.saying(fmt.Sprintf("At least %d users would be disabled or taken over, and SYNC_MAX_SHARE allows %d. Is this the right realm? Nothing was changed.",
		changes, run.most))
}

// inspect notes how one user differs.
func (s *server) inspect(ctx context.Context, run *syncRun, keycloakID string) error {
	ku, err := s.kc.user(ctx, keycloakID)
	if err == nil {
		return s.compare(ctx, run, []keycloakUser{ku})
	} else if !errors.Is(err, errNotFound) {
		return err
	}
	u, err := s.store.syncUser(ctx, keycloakID)
	switch {
	case errors.Is(err, errNotFound), err == nil && (u.Due || !u.IsActive):
		return nil
	case err == nil && u.Registering: // no account yet: its registration ends
		run.planned = append(run.planned, planned{keycloakID, nil})
	case err == nil:
		run.note(keycloakID, string(u.ID), diffMissing)
	}
	return err
}

// compare notes how users of Keycloak differ from ours.
func (s *server) compare(ctx context.Context, run *syncRun, page []keycloakUser) error {
	var ids, registrations []string
	for _, ku := range page {
		ids, registrations = append(ids, ku.id()), append(registrations, ku.attribute(attrRegistrationID))
	}
	ours, registered, err := s.store.syncUsers(ctx, ids, registrations)
	if err != nil {
		return err
	}
	found := make([][]difference, len(page))
	var claims []claim
	for i, ku := range page {
		u, here := ours[ku.id()]
		switch {
		case here:
			found[i] = differences(u, ku)
		case !registered[ku.attribute(attrRegistrationID)]: // otherwise the repair loop adopts or deletes it
			found[i] = []difference{diffUnknown}
		}
		lives := ku.enabled() && (!here || u.IsActive) || !here && ku.registers()
		if lives && (slices.Contains(found[i], diffProfile) || slices.Contains(found[i], diffUnknown)) {
			claims = append(claims, claim{ku.id(), gocloak.PString(ku.Email), gocloak.PString(ku.Username)})
		}
	}
	taken := map[string]bool{}
	if len(claims) > 0 {
		if taken, err = s.store.taken(ctx, claims); err != nil {
			return err
		}
	}
	for i, ku := range page {
		name := cmp.Or(string(ours[ku.id()].ID), ku.id())
		for j, d := range found[i] {
			if (d == diffProfile || d == diffUnknown) && (taken[ku.id()] || gocloak.PString(ku.Email) == "") {
				found[i][j] = diffConflict
			}
		}
		run.note(ku.id(), name, found[i]...)
	}
	return nil
}

// survey compares all users, page by page. Those that come or go meanwhile may be missed,
// and are found by their events; none is reported as missing that is there.
func (s *server) survey(ctx context.Context, run *syncRun, progress func(*syncRun) error) error {
	if err := s.limit(ctx, run); err != nil {
		return err
	}
	seen := map[[16]byte]bool{}
	for first, last := 0, false; !last; first += syncPage {
		page, err := s.kc.usersPage(ctx, first, syncPage)
		if err != nil {
			return err
		}
		last = len(page) < syncPage
		page = slices.DeleteFunc(page, func(ku keycloakUser) bool { return seen[shortDigest(ku.id())] }) // moved by one that came
		for _, ku := range page {
			seen[shortDigest(ku.id())] = true
		}
		run.Checked += len(page)
		if err := errors.Join(s.compare(ctx, run, page), progress(run)); err != nil {
			return err
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
	for _, id := range missing { // each is asked for: with the wrong realm that ends early
		err := errors.Join(s.inspect(ctx, run, id), progress(run))
		if err == nil && !run.DryRun {
			err = run.tooMany()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// repairAll reconciles the users that a survey has found. Those in conflict have another
// try when the others are done: the address may be free then. One that can't be repaired
// holds up nobody.
func (s *server) repairAll(ctx context.Context, c caller, run *syncRun, progress func(*syncRun) error) error {
	todo := run.planned
	for range 2 {
		var again []planned
		for i, p := range todo {
			err := s.reconcile(ctx, c, p.keycloakID)
			switch {
			case errors.Is(err, errUnavailable):
				return err
			case errors.Is(err, errConflict):
				again = append(again, p)
			case err != nil:
				s.log.WarnContext(ctx, "a user is not in step", "keycloak_id", p.keycloakID, "error", err)
			default:
				for _, d := range p.found {
					run.Differences[d].Repaired++
				}
			}
			if i%10 == 0 {
				if err := progress(run); err != nil {
					return err
				}
			}
		}
		todo = again
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
	if err == nil {
		err = run.tooMany()
	}
	if err == nil && !run.DryRun {
		err = s.repairAll(ctx, c, &run, progress)
	}
	run.Status = "done"
	if p := asProblem(err); err != nil && p.slug() == problemSyncStopped.slug() {
		run.Detail = p.Detail
		if !run.DryRun {
			run.Status = "stopped"
		}
	} else if err != nil {
		run.Status, run.Detail = "failed", p.Title+"."
		s.log.ErrorContext(ctx, "a sync has failed", "sync", run.ID, "error", err)
	}
	now := s.now()
	run.EndedAt = &now
	ctx, cancel := detached(ctx, flowTime) // also if it was stopped
	defer cancel()
	if err := s.store.endSync(ctx, c, run, now); err != nil {
		s.log.ErrorContext(ctx, "the end of a sync is not on record", "sync", run.ID, "error", err)
	}
	show(run)
	return run
}

// syncDaily makes a full pass when the last one was a day ago.
func (s *server) syncDaily(ctx context.Context) error {
	run, err := s.store.beginSync(ctx, system("sync"), false, s.now(), s.now().Add(-syncDaily), s.now().Add(-syncPause))
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
	run, err := s.store.beginSync(ctx, c, in.DryRun, s.now(), s.now(), s.now())
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
	run, err := s.store.beginSync(ctx, c, dryRun, s.now(), s.now(), s.now())
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
