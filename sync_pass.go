package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// A full pass over all users: for an operator, for an administrator, and once a day. It
// finds everything before it changes anything, so that the wrong realm can be noticed.

const (
	syncPage     = 500             // users that Keycloak lists at once: see usersPage
	syncBeat     = time.Minute     // whoever has shown no progress for so long was killed
	syncDaily    = 24 * time.Hour  // between two full passes
	syncPause    = 5 * time.Minute // before one that has failed is tried again
	syncFew      = 10              // changes that are never too many at once
	syncExamples = 10              // of each class in a report
)

// mass are the differences that the wrong realm makes in great number.
var mass = []difference{diffDisabled, diffMissing, diffDeleted, diffUnknown}

// stopped says why a sync has changed nothing.
type stopped string

func (s stopped) Error() string { return string(s) }

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

	planned map[string][]difference // of users, by id in Keycloak
	most    int                     // users that it may disable or take over
}

// syncClass is what a run has found of one class of differences.
type syncClass struct {
	Meaning  string   `json:"meaning" description:"What the difference is, and what is done about it."`
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
			run.Differences[d] = &syncClass{Meaning: meanings[d], Examples: []string{}}
		}
		class := run.Differences[d]
		if class.Found++; len(class.Examples) < syncExamples {
			class.Examples = append(class.Examples, name)
		}
	}
	if len(found) > 0 {
		if run.planned == nil {
			run.planned = map[string][]difference{}
		}
		run.planned[keycloakID] = found
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

// syncLimit reads how many users the realm has, and how many a run may disable or take over.
func (s *server) syncLimit(ctx context.Context, run *syncRun) error {
	ours, err := s.store.countUsers(ctx)
	if err == nil {
		run.Total, err = s.kc.countUsers(ctx)
	}
	run.most = max(syncFew, max(ours, run.Total)*s.cfg.SyncMaxShare/100)
	if s.cfg.SyncMaxShare == 100 { // those missing and those unknown may be more than all
		run.most = math.MaxInt
	}
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
	return stopped(fmt.Sprintf("At least %d users would be disabled or taken over, and SYNC_MAX_SHARE allows %d. Is this the right realm? Nothing was changed.",
		changes, run.most))
}

// survey looks at all users, page by page, and inspects those that differ. Those that come
// or go meanwhile may be missed, and are found by their events.
func (s *server) survey(ctx context.Context, run *syncRun, progress func(*syncRun) error) error {
	if err := s.syncLimit(ctx, run); err != nil {
		return err
	}
	type listed struct {
		users []keycloakUser
		err   error
	}
	list := func(first int) <-chan listed {
		page := make(chan listed, 1)
		go func() {
			users, err := s.list(ctx, first, syncPage)
			page <- listed{users, err}
		}()
		return page
	}
	seen := map[[16]byte]bool{}
	coming := list(0)
	for first := 0; coming != nil; {
		page := <-coming
		if page.err != nil {
			return page.err
		}
		coming = nil
		if len(page.users) == syncPage { // Keycloak goes on while this one is compared
			first += syncPage
			coming = list(first)
		}
		users := slices.DeleteFunc(page.users, func(ku keycloakUser) bool { // moved by one that came
			id := shortDigest(ku.id())
			moved := seen[id]
			seen[id] = true
			return moved
		})
		run.Checked += len(users)
		differ, err := s.differing(ctx, users)
		if err == nil {
			err = s.inspectAll(ctx, run, differ, progress)
		}
		if err = errors.Join(err, progress(run)); err != nil {
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
	return s.inspectAll(ctx, run, missing, progress)
}

// differing returns those of a page that seem to differ. The page was read before our rows.
func (s *server) differing(ctx context.Context, page []keycloakUser) (ids []string, err error) {
	here, known, err := s.store.syncUsers(ctx, page)
	for _, ku := range page {
		u, ok := here[ku.id()]
		if ok && len(differences(u, ku)) > 0 || !ok && !known[ku.id()] {
			ids = append(ids, ku.id())
		}
	}
	return ids, err
}

// inspect notes how one user differs.
func (s *server) inspect(ctx context.Context, run *syncRun, keycloakID string) error {
	ku, err := s.kc.user(ctx, keycloakID)
	missing := errors.Is(err, errNotFound)
	if err != nil && !missing {
		return err
	}
	ku.ID = &keycloakID
	here, known, err := s.store.syncUsers(ctx, []keycloakUser{ku})
	if err != nil {
		return err
	}
	u, ok := here[keycloakID]
	var found []difference
	now := s.newcomer(ku)
	switch {
	case ok && missing && u.IsActive:
		found = []difference{diffMissing}
	case ok && !missing:
		found, now = differences(u, ku), u.following(ku)
	case !ok && !missing && !known[keycloakID]: // otherwise the repair loop adopts or deletes it
		found = []difference{diffUnknown}
	}
	for i, d := range found {
		if d == diffProfile || d == diffUnknown {
			conflict, err := s.conflicts(ctx, now)
			if err != nil {
				return err
			}
			if conflict {
				found[i] = diffConflict
			}
		}
	}
	run.note(keycloakID, cmp.Or(string(u.ID), keycloakID), found...)
	return nil
}

// inspectAll inspects one after the other: with the wrong realm that ends early.
func (s *server) inspectAll(ctx context.Context, run *syncRun, keycloakIDs []string, progress func(*syncRun) error) error {
	failed, err := s.eachUser(ctx, keycloakIDs, func(ctx context.Context, id string) error { return s.inspect(ctx, run, id) }, func() error {
		if err := progress(run); err != nil || run.DryRun {
			return err
		}
		return run.tooMany()
	})
	for id := range failed {
		run.note(id, id, diffUnread)
	}
	return err
}

// repairAll reconciles the users that a survey has found.
func (s *server) repairAll(ctx context.Context, c caller, run *syncRun, progress func(*syncRun) error) error {
	_, err := s.eachUser(ctx, slices.Sorted(maps.Keys(run.planned)), func(ctx context.Context, id string) error {
		err := s.reconcile(ctx, c, id)
		if err == nil {
			for _, d := range run.planned[id] {
				run.Differences[d].Repaired++
			}
		}
		return err
	}, func() error { return progress(run) })
	return err
}

// runSync makes a full pass that has begun. Killed anywhere, it has repaired some users and
// left the others as they were.
func (s *server) runSync(ctx context.Context, c caller, run syncRun, show func(syncRun)) (syncRun, error) {
	progress := func(run *syncRun) error {
		show(*run)
		if s.stopping.Load() {
			return problemUnavailable.withDetail("The instance was stopped.")
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
	var why stopped
	switch {
	case errors.As(err, &why):
		run.Detail = string(why)
		if !run.DryRun {
			run.Status = "stopped"
		}
	case err != nil:
		run.Status, run.Detail = "failed", asProblem(err).Detail
		s.log.ErrorContext(ctx, "a sync has failed", "sync", run.ID, "error", err)
	}
	for d, class := range run.Differences {
		if !run.DryRun { // which leaves everything as it is
			s.metrics.synced.WithLabelValues(string(d), "repaired").Add(float64(class.Repaired))
			s.metrics.synced.WithLabelValues(string(d), "left").Add(float64(class.Found - class.Repaired))
		}
	}
	s.log.InfoContext(ctx, "a sync has ended", "sync", run.ID, "status", run.Status, "checked", run.Checked, "found", run.found(), "left", run.remain())
	now := s.now()
	run.EndedAt = &now
	ctx, cancel := detached(ctx, flowTime) // also if it was stopped
	defer cancel()
	if err := s.store.endSync(ctx, c, run, now); err != nil {
		s.log.ErrorContext(ctx, "the end of a sync is not on record", "sync", run.ID, "error", err)
	}
	show(run)
	return run, err
}

// syncDaily makes a full pass when the last one was a day ago.
func (s *server) syncDaily(ctx context.Context) error {
	run, err := s.store.beginSync(ctx, system("sync"), false, s.now(), s.now().Add(-syncDaily), s.now().Add(-syncPause))
	if errors.Is(err, errConflict) {
		return nil // one runs, or was done
	} else if err != nil {
		return err
	}
	_, err = s.runSync(ctx, system("sync"), run, func(syncRun) {})
	return err
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
		return syncRun{}, problemSyncRunning.withTarget(string(run.ID))
	} else if err != nil {
		return syncRun{}, err
	}
	ctx = context.WithoutCancel(ctx)
	answer := run
	answer.Differences = map[difference]*syncClass{} // the pass writes into its own
	s.background.Go(func() { s.runSync(ctx, c, run, func(syncRun) {}) })
	return answer, nil
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
	c := caller{Actor: "cli:" + operator}
	run, err := s.store.beginSync(ctx, c, dryRun, s.now(), s.now(), s.now())
	if errors.Is(err, errConflict) {
		return fmt.Errorf("a sync is running already: %s", run.ID)
	} else if err != nil {
		return err
	}
	run, _ = s.runSync(ctx, c, run, func(run syncRun) {
		fmt.Fprintf(out, "\r%d of %d users looked at, %d differences, %d repaired", run.Checked, run.Total, run.found(), run.found()-run.remain())
	})
	fmt.Fprintf(out, "\n%s %s\n", run.Status, run.Detail)
	for _, d := range slices.Sorted(maps.Keys(run.Differences)) {
		class := run.Differences[d]
		fmt.Fprintf(out, "%-22s %6d found %6d repaired  %s\n    %s\n", d, class.Found, class.Repaired, strings.Join(class.Examples, " "), class.Meaning)
	}
	switch {
	case run.Status != "done":
		return errors.New("the sync was not completed")
	case run.remain() > 0:
		return errDiffer
	}
	return nil
}
