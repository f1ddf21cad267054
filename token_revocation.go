package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// An access token lives for minutes after what it says has ceased to be true. Revocations
// (RFC 7009) say which ones count no more: they are written in the transaction of the change,
// each instance polls their table, and keeps them in memory, where each check of a token looks.
// Polling works through every pooler, and nobody can forge a row who may only connect.
const (
	tokenLife      = time.Hour              // no access token lives longer: what is older revokes nothing
	revocationLag  = time.Minute            // no transaction takes longer to commit what it has revoked
	revocationPoll = 300 * time.Millisecond // between two looks at the table
)

// revocation is a session that has ended, or what is true of a user from now on: its
// tokens that say something else are refused. No clock decides, so a token that is
// issued right after the change is good at once.
type revocation struct {
	SessionID string // claim sid; "" = of a user
	UserID    userID
	Role      string
	NetworkID string
	StationID string
	Active    bool
	Number    int64 // of two about the same user the greater one counts
}

// revocation is that of all tokens that say something else than u.
func (u user) revocation() revocation {
	return revocation{UserID: u.ID, Role: u.Role, NetworkID: u.NetworkID, StationID: u.StationID, Active: u.IsActive}
}

// revoke writes a revocation in the transaction of its change.
func revoke(ctx context.Context, tx pgx.Tx, r revocation) error {
	_, err := tx.Exec(ctx, `
		insert into revocations (keycloak_session_id, user_id, role, network_id, station_id, is_active)
		values ($1, $2, $3, $4, $5, $6)`, r.SessionID, r.UserID, r.Role, r.NetworkID, r.StationID, r.Active)
	return err
}

// revocations are those of the last tokenLife.
type revocations struct {
	mu       sync.RWMutex
	sessions map[string]received // by claim sid
	users    map[userID]received
	read     time.Time // when the table was read; zero: never, so nobody can tell which tokens are good
}

// received is a revocation and when we have received of it.
type received struct {
	revocation
	at time.Time
}

// check returns an error if a token of p was revoked, or errUnavailable as long as nobody
// can tell.
func (w *revocations) check(p principal) error {
	w.mu.RLock()
	defer w.mu.RUnlock()
	_, ended := w.sessions[p.SessionID]
	now, changed := w.users[p.UserID]
	same := now.Active && len(p.Roles) == 1 && p.Roles[0] == now.Role && p.NetworkID == now.NetworkID && p.StationID == now.StationID
	switch {
	case w.read.IsZero():
		return fmt.Errorf("%w: the revocations have not been read yet", errUnavailable)
	case ended, changed && !same:
		return errors.New("it was revoked")
	}
	return nil
}

func (w *revocations) lastRead() time.Time {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.read
}

// add takes revocations, and notes when the table was read if that is where they come from.
func (w *revocations) add(read time.Time, all ...revocation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !read.IsZero() {
		w.read = read
	}
	for _, one := range all {
		switch {
		case one.SessionID != "":
			w.sessions[one.SessionID] = received{one, time.Now()}
		case one.Number > w.users[one.UserID].Number:
			w.users[one.UserID] = received{one, time.Now()}
		}
	}
}

// forget drops what revokes nothing any more.
func (w *revocations) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for sid, h := range w.sessions {
		if time.Since(h.at) > tokenLife+revocationLag {
			delete(w.sessions, sid)
		}
	}
	for id, h := range w.users {
		if time.Since(h.at) > tokenLife+revocationLag {
			delete(w.users, id)
		}
	}
}

// pollRevocations reads the revocations that have come since the last time. One look overlaps
// the one before by revocationLag, since a row becomes visible only when its transaction ends.
func (s *server) pollRevocations(ctx context.Context) error {
	known, start := &s.verifier.revoked, time.Now()
	since := min(time.Since(known.lastRead()), tokenLife) + revocationLag // never read is more than two centuries ago
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	all, err := s.store.revocations(ctx, since)
	if err != nil {
		return err
	}
	if known.lastRead().IsZero() {
		s.log.Info("revocations: read")
	}
	known.add(start, all...)
	known.forget()
	return nil
}

// revocations returns those of the latest time.
func (st *store) revocations(ctx context.Context, since time.Duration) ([]revocation, error) {
	rows, _ := st.pool.Query(ctx, `
		select keycloak_session_id, user_id, role, network_id, station_id, is_active, revocation_id from revocations
		where at > now() - $1::interval`, since)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[revocation])
	return all, storeError(err)
}
