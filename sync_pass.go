package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// A full pass over all users: for an operator, for an administrator, and once a day. It finds
// everything before it changes anything, so that the wrong realm is noticed. It is the work of
// one task: a pass whose instance has died is begun anew by another, under the same id.

const (
	syncPage     = 500             // users that Keycloak lists at once: see usersPage
	syncDaily    = 24 * time.Hour  // between two full passes
	syncPause    = 5 * time.Minute // before one that has failed is tried again
	minChanges   = 10              // destructive changes that are never too many
	syncExamples = 10              // of each class in a report
)

// destructive are the classes that count against SYNC_MAX_SHARE.
var destructive = []difference{diffDisabled, diffMissing, diffDeleted, diffUnknown}

// errAborted ends a pass that would change too much; its detail says so.
var errAborted = errors.New("too many changes at once")

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

// counts returns how many differences were found, how many of them are repaired, and how many
// are destructive.
func (run syncRun) counts() (found, repaired, changes int) {
	for d, class := range run.Differences {
		found, repaired = found+class.Found, repaired+class.Repaired
		if slices.Contains(destructive, d) {
			changes += class.Found
		}
	}
	return found, repaired, changes
}

// due is when the daily pass after this one is due.
func (run syncRun) due() time.Time {
	if run.Status == "failed" {
		return run.EndedAt.Add(syncPause)
	}
	return run.StartedAt.Add(syncDaily)
}

// pass is a full pass at work.
type pass struct {
	*server
	task  task
	run   syncRun
	out   io.Writer               // where it shows how far it is
	users int                     // that the store with more of them has
	found map[string][]difference // of users, by id in Keycloak
}

// runSync makes a full pass that has begun. Killed anywhere, it has repaired some users and
// left the others as they were; whoever gets the task then begins it anew.
func (s *server) runSync(ctx context.Context, t task, run syncRun, out io.Writer) (syncRun, error) {
	p := pass{server: s, task: t, run: run, out: out, found: map[string][]difference{}}
	p.run.Differences, p.run.Checked = map[difference]*syncClass{}, 0
	err := p.scan(ctx)
	if err == nil {
		err = p.checkLimit()
	}
	if err == nil && !run.DryRun {
		err = p.repair(ctx)
	}
	if errors.Is(err, errLocked) || err != nil && s.stopping.Load() { // another goes on
		return p.run, err
	}
	ctx, cancel := detached(ctx, flowTime)
	defer cancel()
	err = p.end(ctx, err)
	return p.run, err
}

// scan compares all users, page by page, and looks at those that differ once more, one by one.
// Those that come or go meanwhile may be missed, and are found by their events.
func (p *pass) scan(ctx context.Context) error {
	missing, err := p.store.activeKeycloakIDs(ctx)
	if err == nil {
		p.run.Total, err = p.kc.countUsers(ctx)
	}
	if err != nil {
		return err
	}
	p.users = max(len(missing), p.run.Total)
	for first, more := 0, true; more; first += syncPage {
		page, err := p.list(ctx, first, syncPage)
		if err == nil {
			err = p.scanPage(ctx, page, missing)
		}
		if err != nil {
			return err
		}
		more = len(page) == syncPage
	}
	_, err = p.each(ctx, slices.Sorted(maps.Keys(missing)), p.look)
	return err
}

// scanPage compares a page of Keycloak's users, and takes them out of those that may be missing.
func (p *pass) scanPage(ctx context.Context, page []keycloakUser, missing map[string]bool) error {
	var ids, differ []string
	for _, ku := range page {
		ids = append(ids, ku.id())
		delete(missing, ku.id())
	}
	local, err := p.store.usersByKeycloakID(ctx, ids)
	if err != nil {
		return err
	}
	for _, ku := range page {
		if len(compare(local[ku.id()], &ku).Differences) > 0 {
			differ = append(differ, ku.id())
		}
	}
	p.run.Checked += len(page)
	if _, err = p.each(ctx, differ, p.look); err == nil {
		err = p.progress(ctx)
	}
	return err
}

// list returns a page of Keycloak's users. A pass is long, and need not end by one call
// that has failed for the moment.
func (p *pass) list(ctx context.Context, first, limit int) (users []keycloakUser, err error) {
	ctx, cancel := context.WithTimeout(ctx, flowTime) // less than lockTime
	defer cancel()
	for range 3 {
		if users, err = p.kc.usersPage(ctx, first, limit); !errors.Is(err, errUnavailable) {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return users, err
}

// look counts how one user differs, but only once: a user moves to the next page when another
// comes.
func (p *pass) look(ctx context.Context, keycloakID string) error {
	in, err := p.inspect(ctx, keycloakID)
	name, found := keycloakID, in.Differences
	if in.local != nil {
		name = string(in.local.ID)
	}
	if err != nil {
		found = []difference{diffUnread}
	}
	if len(found) == 0 || p.found[keycloakID] != nil {
		return err
	}
	p.found[keycloakID] = found
	for _, d := range found {
		class := p.run.Differences[d]
		if class == nil {
			class = &syncClass{Description: descriptions[d], Examples: []string{}}
			p.run.Differences[d] = class
		}
		if class.Found++; len(class.Examples) < syncExamples {
			class.Examples = append(class.Examples, name)
		}
	}
	return err
}

// repair reconciles the users that were found, and again those that fail while that helps: an
// address may be free then. The others are left to their tasks.
func (p *pass) repair(ctx context.Context) (err error) {
	left := slices.Sorted(maps.Keys(p.found))
	for before := -1; err == nil && len(left) != before; {
		before = len(left)
		left, err = p.each(ctx, left, func(ctx context.Context, id string) error {
			t, err := p.store.lock(ctx, kcTask(id), lockTime, p.now)
			if err != nil {
				return err
			}
			err = p.reconcile(ctx, caller{Actor: p.run.StartedBy}, t)
			p.release(ctx, t, never, err)
			for _, d := range p.found[id] {
				if err == nil {
					p.run.Differences[d].Repaired++
				}
			}
			return err
		})
	}
	return err
}

// each does something with one user after the other, and returns those for whom it has failed.
// They hold up nobody, unless Keycloak fails for all.
func (p *pass) each(ctx context.Context, ids []string, do func(context.Context, string) error) ([]string, error) {
	var failed []string
	var err error
	for _, id := range ids {
		one, cancel := detached(ctx, flowTime)
		failure := do(one, id)
		cancel()
		if failure != nil {
			p.log.WarnContext(ctx, "sync: user failed", "keycloak_id", id, "error", failure)
			failed = append(failed, id)
		}
		if failure != nil && !errors.Is(failure, errConflict) {
			_, err = p.list(ctx, 0, 1)
		}
		if err = cmp.Or(err, p.progress(ctx)); err != nil { // with the wrong realm that is early
			return failed, err
		}
	}
	return failed, nil
}

// progress shows and records how far the pass is, keeps its lock, and returns why it must not
// go on.
func (p *pass) progress(ctx context.Context) error {
	found, repaired, _ := p.run.counts()
	fmt.Fprintf(p.out, "\r%d of %d users compared, %d differences, %d repaired",
		p.run.Checked, p.run.Total, found, repaired)
	err := cmp.Or(p.store.extend(ctx, p.task, p.now()), p.store.saveSync(ctx, p.run))
	if err == nil && !p.run.DryRun {
		err = p.checkLimit()
	}
	return err
}

// checkLimit ends a pass that would disable or import more than SYNC_MAX_SHARE of the users, as
// it happens with the wrong realm. 100 is no limit: those missing and those unknown may be more
// than all.
func (p *pass) checkLimit() error {
	_, _, changes := p.run.counts()
	allowed := max(minChanges, p.users*p.cfg.SyncMaxShare/100)
	if changes <= allowed || p.cfg.SyncMaxShare == 100 {
		return nil
	}
	p.run.Detail = fmt.Sprintf("At least %d users would be disabled or imported, and SYNC_MAX_SHARE allows %d. "+
		"Is this the right realm? Nothing was changed.", changes, allowed)
	return errAborted
}

// end records the end of a pass, by its outcome. A dry run leaves everything as it is anyway.
func (p *pass) end(ctx context.Context, err error) error {
	run, now := &p.run, p.now()
	run.Status, run.EndedAt = "done", &now
	switch {
	case errors.Is(err, errAborted) && !run.DryRun:
		run.Status = "aborted"
	case err != nil && !errors.Is(err, errAborted):
		run.Status, run.Detail = "failed", asProblem(err).Detail
		p.log.ErrorContext(ctx, "sync: full pass failed", "sync", run.ID, "error", err)
	}
	found, repaired, _ := run.counts()
	p.log.InfoContext(ctx, "sync: full pass done", "sync", run.ID, "status", run.Status, "checked", run.Checked,
		"found", found, "remaining", found-repaired)
	if !run.DryRun {
		p.metrics.passes.WithLabelValues(run.Status).Inc()
		for d, class := range run.Differences {
			p.metrics.synced.WithLabelValues(string(d), "repaired").Add(float64(class.Repaired))
			p.metrics.synced.WithLabelValues(string(d), "remaining").Add(float64(class.Found - class.Repaired))
		}
	}
	return p.store.saveSync(ctx, *run)
}

// syncTask makes the full pass that was asked for, or the daily one when it is due.
func (s *server) syncTask(ctx context.Context, t task) (time.Time, error) {
	run, err := s.store.lastSync(ctx)
	if err != nil && !errors.Is(err, errNotFound) {
		return never, err
	}
	if run.Status != "running" {
		if s.now().Before(run.due()) {
			return run.due(), nil
		}
		if run, err = s.store.beginSync(ctx, system("sync"), false, s.now()); err != nil {
			return never, err
		}
	}
	_, err = s.runSync(ctx, t, run, io.Discard)
	return s.now(), err // it finds out when the next one is due
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

// sync is the command: it makes a full pass for an operator, in this process. A pass of the same kind that is
// running without a lock is begun anew instead: its process has died. A terminal shows how far it is.
func (in *invocation) sync(ctx context.Context) error {
	t, err := in.store.lock(ctx, "job:sync", lockTime, in.now)
	var run syncRun
	if err == nil {
		run, err = in.store.beginSync(ctx, caller{Actor: in.actor}, in.dryRun, in.now())
		if errors.Is(err, errConflict) && run.Status == "running" && run.DryRun == in.dryRun {
			err = nil
		}
	}
	if errors.Is(err, errLocked) || errors.Is(err, errConflict) {
		err = errors.New("a full pass is running already")
	}
	if err != nil {
		return errors.Join(err, finish(ctx, in.store.pool, t, in.now()))
	}
	progress := io.Discard
	if f, ok := in.stderr.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			progress = f
		}
	}
	run, err = in.runSync(ctx, t, run, progress)
	in.release(ctx, t, in.now(), err) // the daily pass finds out when it is due
	fmt.Fprintln(progress)
	text := fmt.Sprintf("%s %s\n", run.Status, run.Detail)
	for _, d := range slices.Sorted(maps.Keys(run.Differences)) {
		class := run.Differences[d]
		text += fmt.Sprintf("%-22s %6d found %6d repaired  %s\n    %s\n", d, class.Found, class.Repaired,
			strings.Join(class.Examples, " "), class.Description)
	}
	err = in.print(run, text)
	switch found, repaired, _ := run.counts(); {
	case err != nil:
		return err
	case run.Status != "done":
		return errors.New("the full pass was not completed")
	case found > repaired:
		return errDiffer
	}
	return nil
}
