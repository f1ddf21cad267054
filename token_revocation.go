package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// An access token lives for minutes after what it says has ceased to be true. Revocations
// say which ones count no more: they are written in the transaction of the change, reach
// every instance by NOTIFY, and are kept in memory, where each check of a token looks.
const (
	tokenLife           = time.Hour              // no access token lives longer: what is older revokes nothing
	revocationLag       = time.Minute            // no transaction takes longer to commit what it has revoked
	revocationPoll      = 400 * time.Millisecond // between two looks at the table, and the most that one may take
	channelPause        = 200 * time.Millisecond // between two tries to listen
	revocationFirstRead = 5 * time.Second        // the most that it may take to listen, and to look after a long time
)

// revocation is a session that has ended, or what is true of a user from now on: its
// tokens that say something else are refused. No clock decides, so a token that is
// issued right after the change is good at once.
type revocation struct {
	SessionID string `json:"keycloak_session_id"` // claim sid; "" = of a user
	UserID    userID `json:"user_id"`
	Role      string `json:"role"`
	NetworkID string `json:"network_id"`
	StationID string `json:"station_id"`
	Active    bool   `json:"is_active"`
	Number    int64  `json:"revocation_id"` // of two about the same user the greater one counts
}

// revocation is that of all tokens that say something else than u.
func (u user) revocation() revocation {
	return revocation{UserID: u.ID, Role: u.Role, NetworkID: u.NetworkID, StationID: u.StationID, Active: u.IsActive}
}

// revoke records a revocation in the transaction of its change; PostgreSQL tells the
// instances when that is committed.
func revoke(ctx context.Context, tx pgx.Tx, w revocation) error {
	_, err := tx.Exec(ctx, `
		with w as (
			insert into revocations (keycloak_session_id, user_id, role, network_id, station_id, is_active)
			values ($1, $2, $3, $4, $5, $6) returning *)
		select pg_notify('revocations', row_to_json(w)::text) from w`, w.SessionID, w.UserID, w.Role, w.NetworkID, w.StationID, w.Active)
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

// followRevocations keeps the revocations current until ctx ends. While it can't, or may only
// look into the table, revocation_channel_up is 0.
func (s *server) followRevocations(ctx context.Context) {
	for said := false; ctx.Err() == nil; {
		followed, err := s.listen(ctx)
		s.metrics.channel.Set(0)
		if (followed || !said) && ctx.Err() == nil {
			s.log.Warn("revocations can't be followed until PostgreSQL answers again", "error", err)
			s.store.pool.Reset() // its connections are likely to be broken, too, and each would cost a request
			said = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(channelPause):
		}
	}
}

// listen takes what comes over the channel, and looks into the table now and then: that
// proves that the connection lives, and finds what a pooler in between may have swallowed.
// It says whether it has followed for a while. The connection is a new one: what has broken
// the former has broken those of the pool, too, and each would cost a try.
func (s *server) listen(ctx context.Context) (followed bool, err error) {
	conn, err := pgx.ConnectConfig(ctx, s.store.pool.Config().ConnConfig)
	if err != nil {
		return false, storeError(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	begun, cancel := context.WithTimeout(ctx, revocationFirstRead)
	_, err = conn.Exec(begun, `listen revocations`) // before the table is read: nothing falls in between
	cancel()
	refused := errors.As(err, new(*pgconn.PgError)) // by a pooler: then the table alone is looked into
	if err != nil && !refused {
		return false, storeError(err)
	}
	for {
		if err := s.loadRevocations(ctx, conn); err != nil {
			return followed, err
		}
		followed = true
		if !refused {
			s.metrics.channel.Set(1)
		}
		s.verifier.revoked.forget()
		for look := time.Now().Add(revocationPoll); time.Now().Before(look); {
			wait, cancel := context.WithDeadline(ctx, look)
			n, err := conn.WaitForNotification(wait)
			cancel()
			if err != nil && (wait.Err() == nil || ctx.Err() != nil) {
				return followed, storeError(err)
			}
			var w revocation
			if n != nil && json.Unmarshal([]byte(n.Payload), &w) == nil {
				s.verifier.revoked.add(time.Time{}, w)
			}
		}
	}
}

// loadRevocations reads what has come since the last time; a table that is read again and
// again must answer at once.
func (s *server) loadRevocations(ctx context.Context, q querier) error {
	w, start, timeout := &s.verifier.revoked, time.Now(), revocationPoll
	since := min(time.Since(w.lastRead()), tokenLife) + revocationLag // never read is more than two centuries ago
	if since > 2*revocationLag {
		timeout = revocationFirstRead
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	rows, _ := q.Query(ctx, `
		select keycloak_session_id, user_id, role, network_id, station_id, is_active, revocation_id from revocations
		where at > now() - $1::interval`, since)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[revocation])
	if err != nil {
		return storeError(err)
	}
	if w.lastRead().IsZero() {
		s.log.Info("the revocations are read")
	}
	w.add(start, all...)
	return nil
}

// purgeRevocations removes what revokes nothing any more.
func (st *store) purgeRevocations(ctx context.Context) error {
	_, err := st.pool.Exec(ctx, `delete from revocations where revocation_id = any(array(
		select revocation_id from revocations where at < now() - $1::interval order by at limit 10000 for update skip locked))`, tokenLife)
	return storeError(err)
}
