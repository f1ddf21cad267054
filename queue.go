package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// The work queue. A task is work on one thing that one worker at a time must do: now, later,
// again after a failure, every so often, or after a crash. Its id says what it is about:
//
//	REG-…      resume a registration
//	SES-…      end a session in Keycloak
//	kc:<id>    reconcile the user with that id in Keycloak, and end its sessions there that have ended
//	notice:<id> and reset:<id>    mail it that a credential or its address was changed, or a link to choose a password
//	job:…      recurring: events, sync, sweep
//
// Whoever changes something enqueues the task in the transaction of the change. A worker
// claims what is due; a request that wants the thing for itself locks its task. A lock ends
// by itself, so that a worker that was killed holds up nobody for longer than lockTime.

const (
	lockTime  = 60 * time.Second // a flow must be over by then: see flowTime
	flowTime  = 40 * time.Second // the most that a flow over both stores may take
	lockWait  = time.Second      // how long a request waits for another's lock
	queuePoll = 5 * time.Second  // between two looks of a worker that finds nothing due
	workers   = 4                // of an instance: one slow task holds up nobody
)

// errLocked says that another works on the thing, or that the caller's lock has ended.
var errLocked = fmt.Errorf("%w: another worker has the lock", errUnavailable)

// task is a task that the caller has locked.
type task struct {
	ID       string
	Attempts int // that have failed since it was last done
	Revision int // of the row when it was locked; 0: nobody has asked for work, the row is only a lock
	lockedBy string
}

// never is the due time of a task that is done.
var never time.Time

// enqueue asks for work on some things. A task that is there already becomes due at the sooner
// of both times, and is done once more if it is being done now.
func enqueue(ctx context.Context, q querier, due time.Time, ids ...string) error {
	_, err := q.Exec(ctx, `
		insert into tasks as t (task_id, due_at, revision) select distinct id, $2::timestamptz, 1 from unnest($1::text[]) id
		on conflict (task_id) do update set due_at = least(t.due_at, excluded.due_at), revision = t.revision + 1`, ids, due)
	return storeError(err)
}

func (st *store) enqueue(ctx context.Context, due time.Time, ids ...string) error {
	return enqueue(ctx, st.pool, due, ids...)
}

// dequeue removes tasks that were done already, unless somebody is at them.
func (st *store) dequeue(ctx context.Context, ids ...string) error {
	_, err := st.pool.Exec(ctx, `delete from tasks where task_id = any($1) and locked_by is null`, ids)
	return storeError(err)
}

// commit is joined to statements that lock and unlock. By themselves they do not wait for the disk, nor for a
// standby: a lock that a crash of PostgreSQL forgets is another's, which its holder notices (st.locked), and a task
// that was done is done again.
func commit(q querier) string {
	if _, inTransaction := q.(*txn); inTransaction {
		return `(select) as durable`
	}
	return `set_config('synchronous_commit', 'off', true) as relaxed`
}

// tryLock locks the task of a thing for a time, whether it is due or not. If the caller dies,
// the task is due when the lock ends. errLocked: another has it.
func tryLock(ctx context.Context, q querier, id string, ttl time.Duration, now time.Time) (task, error) {
	by := gonanoid.Must()
	was, err := one[struct{ Attempts, Revision int }](ctx, q, lockSQL(commit(q)), id, by, now, now.Add(ttl))
	if errors.Is(err, errNotFound) {
		err = errLocked
	}
	return task{id, was.Attempts, was.Revision, by}, err
}

// lockSQL locks a task, if there is a row to lock it for.
func lockSQL(from string) string {
	return `
		insert into tasks as t (task_id, due_at, locked_by, locked_until) select $1, $3, $2, $4 from ` + from + `
		on conflict (task_id) do update set locked_by = $2, locked_until = $4
			where t.locked_until is null or t.locked_until <= $3
		returning attempts, revision`
}

// lock is tryLock that waits for another to finish.
func (st *store) lock(ctx context.Context, id string, ttl time.Duration, now func() time.Time) (t task, err error) {
	err = patiently(ctx, func() error {
		t, err = tryLock(ctx, st.pool, id, ttl, now())
		return err
	})
	return t, err
}

// patiently tries something anew, for up to lockWait, while another has the lock. Only the waiting is cut short: a
// statement that was sent may still lock.
func patiently(ctx context.Context, try func() error) error {
	for end := time.Now().Add(lockWait); ; {
		err := try()
		if !errors.Is(err, errLocked) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// claim locks the task that has been due for the longest time, or returns errNotFound. A lock
// that has ended by itself makes its task due: its holder has died. Workers that ask at the
// same time get different ones.
func (st *store) claim(ctx context.Context, now time.Time) (task, error) {
	t := task{lockedBy: gonanoid.Must()}
	err := st.pool.QueryRow(ctx, `
		update tasks set locked_by = $1, locked_until = $3 where task_id = (
			select task_id from tasks where coalesce(locked_until, due_at) <= $2
			order by coalesce(locked_until, due_at) limit 1 for update skip locked)
		returning task_id, attempts, revision`, t.lockedBy, now, now.Add(lockTime)).Scan(&t.ID, &t.Attempts, &t.Revision)
	return t, storeError(err)
}

// extend prolongs the lock of a long pass. It returns errLocked.
func (st *store) extend(ctx context.Context, t task, now time.Time) error {
	tag, err := st.pool.Exec(ctx, `update tasks set locked_until = $3 where task_id = $1 and locked_by = $2`,
		t.ID, t.lockedBy, now.Add(lockTime))
	if err == nil && tag.RowsAffected() == 0 {
		return errLocked
	}
	return storeError(err)
}

// finish ends the lock of a task that was done: it is due again at next, or never. Work that
// was enqueued meanwhile stays due. A lock that has become another's is left alone.
func finish(ctx context.Context, q querier, t task, next time.Time) error {
	if next.IsZero() {
		tag, err := q.Exec(ctx, `delete from tasks using `+commit(q)+`
			where task_id = $1 and locked_by = $2 and revision = $3`,
			t.ID, t.lockedBy, t.Revision)
		if err != nil || tag.RowsAffected() == 1 { // a transaction does not know yet: then both statements are sent
			return storeError(err)
		}
	}
	return endLock(ctx, q, t, 0, "", next)
}

// endLock ends a lock. The task is due at a time, or sooner if it was enqueued meanwhile; never: as it was.
func endLock(ctx context.Context, q querier, t task, attempts int, lastError string, due time.Time) error {
	var at any // null: as it was
	if !due.IsZero() {
		at = due
	}
	_, err := q.Exec(ctx, `
		update tasks set locked_by = null, locked_until = null, attempts = $4, last_error = $5,
			revision = greatest(revision, 1), -- the row is a task from now on, and not only a lock
			due_at = case when revision = $3 then coalesce($6, due_at) else least(due_at, $6) end
		from `+commit(q)+` where task_id = $1 and locked_by = $2`, t.ID, t.lockedBy, t.Revision, attempts, lastError, at)
	return storeError(err)
}

// retryPause is the pause after the n-th failure, give or take a fifth: what has failed
// together is not tried again together.
func retryPause(n int) time.Duration {
	pause := min(10*time.Second<<min(n, 10), 15*time.Minute)
	return pause*4/5 + rand.N(pause*2/5) // #nosec G404 -- no secret
}

// release ends the lock of a task by the outcome of its work, also when the client has hung up.
// It was done, and is due again at next; or it was refused, and is due as it was before; or it has
// failed, and is tried again.
func (s *server) release(ctx context.Context, t task, next time.Time, err error) {
	ctx, cancel := detached(ctx, 5*time.Second)
	defer cancel()
	switch p, q := asProblem(err), s.store.pool; {
	case err == nil:
		err = finish(ctx, q, t, next)
	case p.Status >= 500:
		err = endLock(ctx, q, t, t.Attempts+1, p.slug(), s.now().Add(retryPause(t.Attempts)))
	case t.Revision == 0: // it was only a lock
		err = finish(ctx, q, t, never)
	default:
		err = endLock(ctx, q, t, t.Attempts, "", never)
	}
	if err != nil {
		s.log.WarnContext(ctx, "task: lock not released, it will end by itself", "task", t.ID, "error", err)
	}
}

// kind is the label of a task in metrics: what comes before its id.
func (t task) kind() string {
	if name, ok := strings.CutPrefix(t.ID, "job:"); ok {
		return name
	}
	return t.ID[:strings.IndexAny(t.ID, ":-")]
}

// taskKinds are all kinds.
var taskKinds = []string{"REG", "SES", "kc", "notice", "reset", "events", "sync", "sweep", "token", "login", "code"}

// doNow does the work of a task in the request that needs its outcome, whether it is due or not.
func (s *server) doNow(ctx context.Context, id string) error {
	t, err := s.store.lock(ctx, id, lockTime, s.now)
	if err != nil {
		return err
	}
	next, err := s.perform(ctx, t)
	s.release(ctx, t, next, err)
	return err
}

// work claims tasks that are due and has them handled, one after the other, until ctx ends.
func (s *server) work(ctx context.Context) {
	for ctx.Err() == nil {
		found, err := s.workOnce(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.Warn("queue: claim failed, will retry", "error", err)
		}
		if found {
			continue
		}
		select {
		case <-ctx.Done():
		case <-s.wake: // this instance has enqueued something
		case <-time.After(min(queuePoll, s.cfg.JobInterval)):
		}
	}
}

// wakeWorker lets a worker look into the queue now.
func (s *server) wakeWorker() {
	select {
	case s.wake <- struct{}{}:
	default: // one is told already
	}
}

// perform does the work of a task. A handler that panics has failed, and ends no instance; one that
// was refused has failed, too: only a request is refused.
func (s *server) perform(ctx context.Context, t task) (next time.Time, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.metrics.panics.Inc()
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	next, err = s.handle(ctx, t)
	if refused := (problem{}); errors.As(err, &refused) && refused.Status < 500 {
		err = problemInternal.withCause(err)
	}
	return next, err
}

// workOnce handles the next task that is due, and says whether there was one.
func (s *server) workOnce(ctx context.Context) (bool, error) {
	t, err := s.store.claim(ctx, s.now())
	if errors.Is(err, errNotFound) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	next, err := s.perform(ctx, t)
	s.metrics.tasks.WithLabelValues(t.kind(), outcome(err)).Inc()
	if err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "task: failed, will retry", "task", t.ID, "attempts", t.Attempts+1, "error", err)
	}
	s.release(ctx, t, next, err)
	return true, nil
}

// tasksDue counts by kind the tasks that are due, the oldest 1,000, and returns since when the oldest one is.
func (st *store) tasksDue(ctx context.Context, now time.Time) (due map[string]int, oldest time.Time, err error) {
	due, oldest = map[string]int{}, now
	rows, _ := st.pool.Query(ctx, `
		select task_id, coalesce(locked_until, due_at) from tasks where coalesce(locked_until, due_at) <= $1
		order by coalesce(locked_until, due_at) limit 1000`, now)
	var t task
	var since time.Time
	_, err = pgx.ForEachRow(rows, []any{&t.ID, &since}, func() error {
		due[t.kind()]++
		if since.Before(oldest) {
			oldest = since
		}
		return nil
	})
	return due, oldest, storeError(err)
}
