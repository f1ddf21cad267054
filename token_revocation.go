package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// An access token lives for minutes after what it says has ceased to be true. Revocations (RFC 7009) say which ones
// count no more: they are written in the transaction of the change, and each instance polls their table and keeps
// them in memory, where each check of a token looks. Polling works through every pooler, and nobody can forge a row
// who may only connect.
const (
	tokenLife      = time.Hour              // no access token lives longer: what is older revokes nothing
	revocationLag  = time.Minute            // no transaction takes longer to commit what it has revoked
	revocationPoll = 300 * time.Millisecond // between two looks at the table
	revocationWait = time.Second            // the most that a token waits for a look that begins after its arrival
)

// revocation is one of three: a session that has ended; a time before which no token of a user counts (claim iat);
// or what is true of a user from now on: its tokens that say something else are refused. For the latter no clock
// decides, so a token that is issued right after the change is good at once.
type revocation struct {
	SessionID string // claim sid; "" = of a user
	UserID    userID
	Role      string
	NetworkID string
	StationID string
	Active    bool
	NotBefore *time.Time // of Keycloak's clock
	Number    int64      // of two about what is true of a user the greater one counts
}

// key is what a revocation is about.
func (r revocation) key() string {
	if r.NotBefore != nil {
		return beforeKey(r.UserID)
	}
	return cmp.Or(r.SessionID, string(r.UserID))
}

func beforeKey(id userID) string { return "before " + string(id) }

// revocation is that of all tokens that say something else than u.
func (u user) revocation() revocation {
	return revocation{UserID: u.ID, Role: u.Role, NetworkID: u.NetworkID, StationID: u.StationID,
		Active: u.IsActive && u.IsVerified}
}

// revokes tells whether tokens of p count no more.
func (r revocation) revokes(p principal) bool {
	return r.SessionID != "" || !r.Active || !slices.Equal(p.Roles, []string{r.Role}) ||
		p.NetworkID != r.NetworkID || p.StationID != r.StationID
}

// revoke writes a revocation in the transaction of its change.
func (tx *txn) revoke(r revocation) {
	tx.exec(`
		insert into revocations (keycloak_session_id, user_id, role, network_id, station_id, is_active, not_before)
		values ($1, $2, $3, $4, $5, $6, $7)`,
		r.SessionID, r.UserID, r.Role, r.NetworkID, r.StationID, r.Active, r.NotBefore)
}

// revocations are those of the last tokenLife.
type revocations struct {
	mu   sync.RWMutex
	of   map[string]received // by key
	read time.Time           // when the latest look at the table began; zero: nobody can tell which tokens are good
	next chan struct{}       // closed when the next look has ended
}

// received is a revocation and when it was received first.
type received struct {
	revocation
	at time.Time
}

var errRevoked = errors.New("it was revoked")

// check returns errRevoked if a token was revoked, or errUnavailable as long as nobody can tell.
//
// What was read may be older than a token that says something else: another instance may have changed the user twice.
// But a token that was seen before the look began says nothing newer than that; until there is such a look it waits.
func (w *revocations) check(ctx context.Context, t verifiedToken) error {
	for {
		w.mu.RLock()
		read, next := w.read, w.next
		_, ended := w.of[t.SessionID]
		limit, limited := w.of[beforeKey(t.UserID)]
		now, changed := w.of[string(t.UserID)]
		w.mu.RUnlock()
		ended = ended || limited && t.issued.Before(*limit.NotBefore)
		switch {
		case read.IsZero():
			return fmt.Errorf("%w: the revocations have not been read yet", errUnavailable)
		case !ended && !(changed && now.revokes(t.principal)):
			return nil
		case ended, read.After(t.seen):
			return errRevoked
		}
		select {
		case <-next:
		case <-ctx.Done():
			return errRevoked
		case <-time.After(time.Until(t.seen.Add(revocationWait))): // PostgreSQL is away
			return errRevoked
		}
	}
}

func (w *revocations) lastRead() time.Time {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.read
}

// add takes what a look at the table has found that began at read, and forgets what revokes nothing any more.
func (w *revocations) add(read time.Time, found ...revocation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range found {
		key := r.key()
		has := w.of[key]
		newer := r.Number > has.Number
		if r.NotBefore != nil {
			newer = has.NotBefore == nil || r.NotBefore.After(*has.NotBefore)
		}
		if newer {
			w.of[key] = received{r, time.Now()}
		}
	}
	maps.DeleteFunc(w.of, func(_ string, r received) bool { return time.Since(r.at) > tokenLife+revocationLag })
	close(w.next)
	w.read, w.next = read, make(chan struct{})
}

// pollRevocations reads the revocations that have come since the last time. One look overlaps the one before by
// revocationLag, since a row becomes visible only when its transaction ends.
func (s *server) pollRevocations(ctx context.Context) error {
	last, start := s.verifier.revoked.lastRead(), time.Now()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := s.store.revocations(ctx, min(time.Since(last), tokenLife)+revocationLag)
	if err != nil {
		return err
	}
	s.verifier.revoked.add(start, found...)
	if last.IsZero() {
		s.log.Info("revocations: read")
	}
	return nil
}

// revocations returns those of the latest time.
func (st *store) revocations(ctx context.Context, since time.Duration) ([]revocation, error) {
	rows, _ := st.pool.Query(ctx, `
		select keycloak_session_id, user_id, role, network_id, station_id, is_active, not_before, revocation_id
		from revocations
		where at > now() - $1::interval`, since)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[revocation])
	return all, storeError(err)
}
