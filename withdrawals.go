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

// An access token lives for minutes after what it says has ceased to be true. Withdrawals
// say which ones count no more: they are written in the transaction of the change, reach
// every instance by NOTIFY, and are kept in memory, where each check of a token looks.
const (
	tokenLife     = time.Hour              // no access token lives longer: what is older withdraws nothing
	withdrawalLag = time.Minute            // no transaction takes longer to commit what it has withdrawn
	withdrawPoll  = 400 * time.Millisecond // between two looks at the table, and the most that one may take
	channelPause  = 200 * time.Millisecond // between two tries to listen
	withdrawFirst = 5 * time.Second        // the most that it may take to listen, and to look after a long time
)

// withdrawal is a session that has ended, or what is true of a user from now on: its
// tokens that say something else are refused. No clock decides, so a token that is
// issued right after the change is good at once.
type withdrawal struct {
	SessionID string `json:"keycloak_session_id"` // claim sid; "" = of a user
	UserID    userID `json:"user_id"`
	Role      string `json:"role"`
	NetworkID string `json:"network_id"`
	StationID string `json:"station_id"`
	Active    bool   `json:"is_active"`
	Number    int64  `json:"withdrawal_id"` // of two about the same user the greater one counts
}

// withdrawal is that of all tokens that say something else than u.
func (u user) withdrawal() withdrawal {
	return withdrawal{UserID: u.ID, Role: u.Role, NetworkID: u.NetworkID, StationID: u.StationID, Active: u.IsActive}
}

// withdraw records a withdrawal in the transaction of its change; PostgreSQL tells the
// instances when that is committed.
func withdraw(ctx context.Context, tx pgx.Tx, w withdrawal) error {
	_, err := tx.Exec(ctx, `
		with w as (
			insert into withdrawals (keycloak_session_id, user_id, role, network_id, station_id, is_active)
			values ($1, $2, $3, $4, $5, $6) returning *)
		select pg_notify('withdrawals', row_to_json(w)::text) from w`, w.SessionID, w.UserID, w.Role, w.NetworkID, w.StationID, w.Active)
	return err
}

// withdrawals are those of the last tokenLife.
type withdrawals struct {
	mu       sync.RWMutex
	sessions map[string]heard // by claim sid
	users    map[userID]heard
	read     time.Time // when the table was read; zero: never, so nobody can tell which tokens are good
}

// heard is a withdrawal and when we have heard of it.
type heard struct {
	withdrawal
	at time.Time
}

// check returns an error if a token of p was withdrawn, or errUnavailable as long as nobody
// can tell.
func (w *withdrawals) check(p principal) error {
	w.mu.RLock()
	defer w.mu.RUnlock()
	_, ended := w.sessions[p.SessionID]
	now, changed := w.users[p.UserID]
	same := now.Active && len(p.Roles) == 1 && p.Roles[0] == now.Role && p.NetworkID == now.NetworkID && p.StationID == now.StationID
	switch {
	case w.read.IsZero():
		return fmt.Errorf("%w: the withdrawals have not been read yet", errUnavailable)
	case ended, changed && !same:
		return errors.New("it was withdrawn")
	}
	return nil
}

func (w *withdrawals) lastRead() time.Time {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.read
}

// add takes withdrawals, and notes when the table was read if that is where they come from.
func (w *withdrawals) add(read time.Time, all ...withdrawal) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !read.IsZero() {
		w.read = read
	}
	for _, one := range all {
		switch {
		case one.SessionID != "":
			w.sessions[one.SessionID] = heard{one, time.Now()}
		case one.Number > w.users[one.UserID].Number:
			w.users[one.UserID] = heard{one, time.Now()}
		}
	}
}

// forget drops what withdraws nothing any more.
func (w *withdrawals) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for sid, h := range w.sessions {
		if time.Since(h.at) > tokenLife+withdrawalLag {
			delete(w.sessions, sid)
		}
	}
	for id, h := range w.users {
		if time.Since(h.at) > tokenLife+withdrawalLag {
			delete(w.users, id)
		}
	}
}

// followWithdrawals keeps the withdrawals current until ctx ends. While it can't, or may only
// look into the table, withdrawal_channel_up is 0.
func (s *server) followWithdrawals(ctx context.Context) {
	for said := false; ctx.Err() == nil; {
		followed, err := s.listen(ctx)
		s.metrics.channel.Set(0)
		if (followed || !said) && ctx.Err() == nil {
			s.log.Warn("withdrawals can't be followed until PostgreSQL answers again", "error", err)
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
	begun, cancel := context.WithTimeout(ctx, withdrawFirst)
	_, err = conn.Exec(begun, `listen withdrawals`) // before the table is read: nothing falls in between
	cancel()
	refused := errors.As(err, new(*pgconn.PgError)) // by a pooler: then the table alone is looked into
	if err != nil && !refused {
		return false, storeError(err)
	}
	for {
		if err := s.loadWithdrawals(ctx, conn); err != nil {
			return followed, err
		}
		followed = true
		if !refused {
			s.metrics.channel.Set(1)
		}
		s.tokens.withdrawn.forget()
		for look := time.Now().Add(withdrawPoll); time.Now().Before(look); {
			wait, cancel := context.WithDeadline(ctx, look)
			n, err := conn.WaitForNotification(wait)
			cancel()
			if err != nil && (wait.Err() == nil || ctx.Err() != nil) {
				return followed, storeError(err)
			}
			var w withdrawal
			if n != nil && json.Unmarshal([]byte(n.Payload), &w) == nil {
				s.tokens.withdrawn.add(time.Time{}, w)
			}
		}
	}
}

// loadWithdrawals reads what has come since the last time; a table that is read again and
// again must answer at once.
func (s *server) loadWithdrawals(ctx context.Context, q querier) error {
	w, start, patience := &s.tokens.withdrawn, time.Now(), withdrawPoll
	since := min(time.Since(w.lastRead()), tokenLife) + withdrawalLag // never read is more than two centuries ago
	if since > 2*withdrawalLag {
		patience = withdrawFirst
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	rows, _ := q.Query(ctx, `
		select keycloak_session_id, user_id, role, network_id, station_id, is_active, withdrawal_id from withdrawals
		where at > now() - $1::interval`, since)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[withdrawal])
	if err != nil {
		return storeError(err)
	}
	if w.lastRead().IsZero() {
		s.log.Info("the withdrawals are read")
	}
	w.add(start, all...)
	return nil
}

// forgetWithdrawals removes what withdraws nothing any more.
func (st *store) forgetWithdrawals(ctx context.Context) error {
	_, err := st.pool.Exec(ctx, `delete from withdrawals where withdrawal_id = any(array(
		select withdrawal_id from withdrawals where at < now() - $1::interval order by at limit 10000 for update skip locked))`, tokenLife)
	return storeError(err)
}
