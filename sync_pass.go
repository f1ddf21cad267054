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

// A full pass over all users: for an operator, for an administrator, and once a day. It finds
// everything before it changes anything, so that the wrong realm is noticed. It is the work of
// one task: a pass whose instance has died is begun anew by another.

const (
	syncPage     = 500             // users that Keycloak lists at once: see usersPage
	syncDaily    = 24 * time.Hour  // between two full passes
	syncPause    = 5 * time.Minute // before one that has failed is tried again
	minChanges   = 10              // destructive changes that are never too many
	syncExamples = 10              // of each class in a report
)

// destructive are the classes that count against SYNC_MAX_SHARE.
var destructive = []difference{diffDisabled, diffMissing, diffDeleted, diffUnknown}

// aborted says why a pass has changed nothing.
type aborted string

func (a aborted) Error() string { return string(a) }

// errStopping ends a pass whose instance is stopped: another goes on with it.
var errStopping = fmt.Errorf("%w: the instance is stopping", errUnavailable)

// syncRun is a full pass: its progress and its report.
type syncRun struct {
	ID          syncID                    `json:"sync_id" example:"SYN-V1StGXR8_Z5jdHi6"`
	DryRun      bool                      `json:"dry_run"`
	Status      string                    `json:"status" enum:"running,done,aborted,failed" description:"aborted: too many changes at once, nothing was changed."`
	StartedBy   string                    `json:"started_by" example:"USR-V1StGXR8_Z5jdHi6"`
	StartedAt   time.Time                 `json:"started_at"`
	EndedAt     *time.Time                `json:"ended_at" nullable:"true"`
	Checked     int                       `json:"checked" description:"Users of Keycloak that were compared."`
	Total       int                       `json:"total" description:"Users that Keycloak had at the start."`
	Differences map[difference]*syncClass `json:"differences" description:"By class."`
	Detail      string                    `json:"detail" description:"Why it was aborted or has failed."`

	planned    map[string][]difference // of users, by id in Keycloak
	maxChanges int                     // destructive changes that it may make
}

// syncClass is what a run has found of one class of differences.
type syncClass struct {
	Description string   `json:"description" description:"What the difference is, and what is done about it."`
	Found       int      `json:"found"`
	Repaired    int      `json:"repaired"`
	Examples    []string `json:"examples" description:"Ids of users, or in Keycloak of those unknown in PostgreSQL."`
}

// location is where its progress is.
func (run syncRun) location() string { return "/api/v1/sync/" + string(run.ID) }

// add counts what was found of a user.
func (run *syncRun) add(keycloakID, name string, found ...difference) {
	for _, d := range found {
		if run.Differences[d] == nil {
			run.Differences[d] = &syncClass{Description: descriptions[d], Examples: []string{}}
		}
		class := run.Differences[d]
		if class.Found++; len(class.Examples) < syncExamples {
			class.Examples = append(class.Examples, name)
		}
	}
	if len(found) > 0 {
		run.planned[keycloakID] = found
	}
}

func (run syncRun) found() (n int) {
	for _, class := range run.Differences {
		n += class.Found
	}
	return n
}

func (run syncRun) remaining() (n int) {
	for _, class := range run.Differences {
		n += class.Found - class.Repaired
	}
	return n
}

// checkLimit returns the error of a run that would disable or import more than the configured
// share of users, as it happens with the wrong realm.
func (run syncRun) checkLimit() error {
	changes := 0
	for _, d := range destructive {
		if class := run.Differences[d]; class != nil {
			changes += class.Found
		}
	}
	if changes <= run.maxChanges {
		return nil
	}
	return aborted(fmt.Sprintf("At least %d users would be disabled or imported, and SYNC_MAX_SHARE allows %d. Is this the right realm? Nothing was changed.",
		changes, run.maxChanges))
}

// setLimit reads how many users the realm has, and how many a run may disable or import.
func (s *server) setLimit(ctx context.Context, run *syncRun) error {
	local, err := s.store.countUsers(ctx)
	if err == nil {
		run.Total, err = s.kc.countUsers(ctx)
	}
	run.maxChanges = max(minChanges, max(local, run.Total)*s.cfg.SyncMaxShare/100)
	if s.cfg.SyncMaxShare == 100 { // those missing and those unknown may be more than all
		run.maxChanges = math.MaxInt
	}
	return err
}

// scan compares all users, page by page, and looks at those that differ once more, one by one.
// Those that come or go meanwhile may be missed, and are found by their events.
func (s *server) scan(ctx context.Context, run *syncRun, progress func() error) error {
	if err := s.setLimit(ctx, run); err != nil {
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
			err = s.checkEach(ctx, run, differ, progress)
		}
		if err = errors.Join(err, progress()); err != nil {
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
	return s.checkEach(ctx, run, missing, progress)
}

// differing returns those of a page that seem to differ. The page was read before our rows.
func (s *server) differing(ctx context.Context, page []keycloakUser) (ids []string, err error) {
	local, registering, err := s.store.localUsers(ctx, page)
	for _, ku := range page {
		u, known := local[ku.id()]
		var of *user
		if known {
			of = &u
		} else if registering[ku.attribute(attrRegistrationID)] {
			continue
		}
		if len(compare(of, &ku).Differences) > 0 {
			ids = append(ids, ku.id())
		}
	}
	return ids, err
}

// check adds how one user differs to a run.
func (s *server) check(ctx context.Context, run *syncRun, keycloakID string) error {
	local, remote, err := s.bothUsers(ctx, keycloakID)
	if err != nil {
		return err
	}
	want := compare(local, remote)
	for i, d := range want.Differences {
		if d == diffProfile || d == diffUnknown {
			conflict, err := s.conflicts(ctx, want.Local)
			if err != nil {
				return err
			}
			if conflict {
				want.Differences[i] = diffConflict
			}
		}
	}
	name := keycloakID
	if local != nil {
		name = string(local.ID)
	}
	run.add(keycloakID, name, want.Differences...)
	return nil
}

// checkEach checks one after the other: with the wrong realm that ends early.
func (s *server) checkEach(ctx context.Context, run *syncRun, keycloakIDs []string, progress func() error) error {
	failed, err := s.eachUser(ctx, keycloakIDs, func(ctx context.Context, id string) error { return s.check(ctx, run, id) }, func() error {
		if err := progress(); err != nil || run.DryRun {
			return err
		}
		return run.checkLimit()
	})
	for id := range failed {
		run.add(id, id, diffUnread)
	}
	return err
}

// repair reconciles the users that a scan has found. Those that fail are left to their tasks.
func (s *server) repair(ctx context.Context, run *syncRun, progress func() error) error {
	_, err := s.eachUser(ctx, slices.Sorted(maps.Keys(run.planned)), func(ctx context.Context, id string) error {
		t, err := s.store.lock(ctx, kcTask(id), lockTime, s.now)
		if err == nil {
			err = s.reconcile(ctx, caller{Actor: run.StartedBy}, t)
			s.release(ctx, t, never, err)
		}
		if err == nil {
			for _, d := range run.planned[id] {
				run.Differences[d].Repaired++
			}
		}
		return err
	}, progress)
	return err
}

// eachUser does something with one user after the other, and again with those in conflict
// while that helps: an address may be free then. A failure holds up nobody: those who failed
// are returned. It ends if Keycloak fails for all.
func (s *server) eachUser(ctx context.Context, users []string, do func(ctx context.Context, id string) error, progress func() error) (map[string]error, error) {
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
			if err := progress(); err != nil {
				return nil, err
			}
			if err == nil {
				delete(failed, id)
				continue
			}
			failed[id] = err
			s.log.WarnContext(ctx, "sync: user failed", "keycloak_id", id, "error", err)
			if errors.Is(err, errConflict) {
				conflicts = append(conflicts, id)
			} else if _, err := s.list(ctx, 0, 1); err != nil {
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
	ctx, cancel := context.WithTimeout(ctx, flowTime) // less than lockTime
	defer cancel()
	for try := 1; ; try++ {
		if users, err = s.kc.usersPage(ctx, first, limit); !errors.Is(err, errUnavailable) || try == 3 {
			return users, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// runSync makes a full pass that has begun. Killed anywhere, it has repaired some users and
// left the others as they were; whoever gets the task then begins it anew.
func (s *server) runSync(ctx context.Context, t task, run syncRun, show func(syncRun)) (syncRun, error) {
	run.Differences, run.planned, run.Checked = map[difference]*syncClass{}, map[string][]difference{}, 0
	progress := func() error {
		show(run)
		if s.stopping.Load() {
			return errStopping
		}
		return cmp.Or(s.store.extend(ctx, t, s.now()), s.store.saveSync(ctx, s.store.pool, run))
	}
	err := s.scan(ctx, &run, progress)
	if err == nil {
		err = run.checkLimit()
	}
	if err == nil && !run.DryRun {
		err = s.repair(ctx, &run, progress)
	}
	if errors.Is(err, errStopping) || errors.Is(err, errLocked) {
		return run, err
	}
	run.Status = "done"
	var why aborted
	switch {
	case errors.As(err, &why):
		run.Detail = string(why)
		if !run.DryRun {
			run.Status = "aborted"
		}
	case err != nil:
		run.Status, run.Detail = "failed", asProblem(err).Detail
		s.log.ErrorContext(ctx, "sync: full pass failed", "sync", run.ID, "error", err)
	}
	for d, class := range run.Differences {
		if !run.DryRun { // which leaves everything as it is
			s.metrics.synced.WithLabelValues(string(d), "repaired").Add(float64(class.Repaired))
			s.metrics.synced.WithLabelValues(string(d), "remaining").Add(float64(class.Found - class.Repaired))
		}
	}
	s.log.InfoContext(ctx, "sync: full pass done", "sync", run.ID, "status", run.Status, "checked", run.Checked, "found", run.found(), "remaining", run.remaining())
	now := s.now()
	run.EndedAt = &now
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	show(run)
	return run, s.store.endSync(ctx, run, now)
}

// syncTask makes the full pass that was asked for, or the daily one, and returns when the next
// one is due.
func (s *server) syncTask(ctx context.Context, t task) (time.Time, error) {
	run, err := s.store.lastSync(ctx, `status = 'running'`)
	if errors.Is(err, errNotFound) {
		var next time.Time
		if next, err = s.nextSync(ctx); err != nil || s.now().Before(next) {
			return next, err
		}
		run, err = s.store.beginSync(ctx, system("sync"), false, s.now())
	}
	if err == nil {
		_, err = s.runSync(ctx, t, run, func(syncRun) {})
	}
	if err != nil {
		return never, err
	}
	return s.nextSync(ctx)
}

// nextSync is when the daily pass is due.
func (s *server) nextSync(ctx context.Context) (time.Time, error) {
	last, err := s.store.lastSync(ctx, `not dry_run and status <> 'running'`)
	switch {
	case errors.Is(err, errNotFound):
		return s.now(), nil
	case err != nil:
		return never, err
	case last.Status == "failed":
		return last.EndedAt.Add(syncPause), nil
	}
	return last.StartedAt.Add(syncDaily), nil
}

type startSyncIn struct {
	DryRun bool `json:"dry_run,omitempty" example:"true" description:"Only report."`
}

// startSync asks the queue for a full pass.
func (s *server) startSync(ctx context.Context, c caller, in startSyncIn) (syncRun, error) {
	if !c.is(roleAdmin) {
		return syncRun{}, problemForbidden
	}
	run, err := s.store.beginSync(ctx, c, in.DryRun, s.now())
	if errors.Is(err, errConflict) {
		return syncRun{}, problemSyncRunning.withTarget(string(run.ID))
	}
	s.wakeWorker()
	return run, err
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

// syncCommand makes a full pass for an operator, in this process.
func (s *server) syncCommand(ctx context.Context, dryRun bool, operator string, out io.Writer) error {
	t, err := s.store.lock(ctx, "job:sync", lockTime, s.now)
	var run syncRun
	if err == nil {
		run, err = s.store.beginSync(ctx, caller{Actor: "cli:" + operator}, dryRun, s.now())
	}
	if errors.Is(err, errLocked) || errors.Is(err, errConflict) {
		err = errors.New("a full pass is running already")
	}
	if err != nil {
		return errors.Join(err, finish(ctx, s.store.pool, t, s.now()))
	}
	run, err = s.runSync(ctx, t, run, func(run syncRun) {
		fmt.Fprintf(out, "\r%d of %d users compared, %d differences, %d repaired", run.Checked, run.Total, run.found(), run.found()-run.remaining())
	})
	s.release(ctx, t, s.now(), err) // the daily pass finds out when it is due
	fmt.Fprintf(out, "\n%s %s\n", run.Status, run.Detail)
	for _, d := range slices.Sorted(maps.Keys(run.Differences)) {
		class := run.Differences[d]
		fmt.Fprintf(out, "%-22s %6d found %6d repaired  %s\n    %s\n", d, class.Found, class.Repaired, strings.Join(class.Examples, " "), class.Description)
	}
	switch {
	case run.Status != "done":
		return errors.New("the full pass was not completed")
	case run.remaining() > 0:
		return errDiffer
	}
	return nil
}
