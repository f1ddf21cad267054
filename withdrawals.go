package main

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// An access token lives for minutes after what it says has ceased to be true. Withdrawals
// say which ones count no more: they are written in the transaction of the change, reach
// every instance by NOTIFY, and are kept in memory, where each check of a token looks.

const (
	tokenLife    = time.Hour              // no access token lives longer: what is older withdraws nothing
	withdrawPoll = 500 * time.Millisecond // between two looks at the table while the channel is down
	channelPause = 5 * time.Second        // between two tries to listen
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
}

// withdraw records a withdrawal in the transaction of its change; PostgreSQL tells the
// instances when that is committed.
func withdraw(ctx context.Context, tx pgx.Tx, w withdrawal) error {
	_, err := tx.Exec(ctx, `
		with w as (
			insert into withdrawals (keycloak_session_id, user_id, role, network_id, station_id, is_active)
			values ($1, $2, $3, $4, $5, $6) returning *)
		select pg_notify('withdrawals', row_to_json(w)::text) from w`, w.SessionID, string(w.UserID), w.Role, w.NetworkID, w.StationID, w.Active)
	return err
}

// withdrawals are those of the last tokenLife.
type withdrawals struct {
	mu       sync.RWMutex
	sessions map[string]time.Time // by claim sid: when we heard of it
	users    map[userID]withdrawal
	heard    map[userID]time.Time
}

// refuses says whether a token of p was withdrawn.
func (w *withdrawals) refuses(p principal) bool {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if _, ended := w.sessions[p.SessionID]; ended {
		return true
	}
	now, changed := w.users[p.UserID]
	return changed && !(now.Active && len(p.Roles) == 1 && p.Roles[0] == now.Role && p.NetworkID == now.NetworkID && p.StationID == now.StationID)
}

func (w *withdrawals) add(all ...withdrawal) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, one := range all {
		if one.SessionID != "" {
			w.sessions[one.SessionID] = time.Now()
		} else {
			w.users[one.UserID], w.heard[one.UserID] = one, time.Now()
		}
	}
}

// forget drops what withdraws nothing any more.
func (w *withdrawals) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for sid, at := range w.sessions {
		if time.Since(at) > tokenLife {
			delete(w.sessions, sid)
		}
	}
	for id, at := range w.heard {
		if time.Since(at) > tokenLife {
			delete(w.users, id)
			delete(w.heard, id)
		}
	}
}

// follow keeps the withdrawals current until ctx ends. While the channel is down it looks
// into the table every second, and withdrawal_channel_up is 0.
func (s *server) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.listen(ctx)
		s.metrics.channel.Set(0)
		if ctx.Err() != nil {
			return
		}
		s.log.Warn("withdrawals are polled until the channel is up again", "error", err)
		for until := time.Now().Add(channelPause); time.Now().Before(until) && ctx.Err() == nil; {
			if err := s.loadWithdrawals(ctx, s.store.pool); err != nil && !errors.Is(err, errUnavailable) {
				s.log.Error("withdrawals can't be read", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(withdrawPoll):
			}
		}
	}
}

// listen takes what comes over the channel. It listens before it reads the table, so
// that nothing falls between the two.
func (s *server) listen(ctx context.Context) error {
	pooled, err := s.store.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	conn := pooled.Hijack() // the loop's own: the pool would hand it out while it listens
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `listen withdrawals`); err != nil {
		return err
	}
	if err := s.loadWithdrawals(ctx, conn); err != nil {
		return err
	}
	s.metrics.channel.Set(1)
	for {
		n, err := waitForNotification(ctx, conn)
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		var w withdrawal
		if err := json.Unmarshal([]byte(n.Payload), &w); err != nil {
			return err
		}
		s.tokens.withdrawn.add(w)
	}
}

// waitForNotification returns the next one, or nil after a second without any, in which
// the server has proved that it is still there.
func waitForNotification(ctx context.Context, conn *pgx.Conn) (*pgconn.Notification, error) {
	wait, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	n, err := conn.WaitForNotification(wait)
	if err == nil || wait.Err() == nil || ctx.Err() != nil {
		return n, err
	}
	alive, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return nil, conn.Ping(alive)
}

// loadWithdrawals reads the table, oldest first.
func (s *server) loadWithdrawals(ctx context.Context, q querier) error {
	rows, _ := q.Query(ctx, `
		select keycloak_session_id, user_id, role, network_id, station_id, is_active from withdrawals
		where at > clock_timestamp() - $1::interval order by withdrawal_id`, tokenLife)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[withdrawal])
	if err != nil {
		return storeError(err)
	}
	s.tokens.withdrawn.add(all...)
	return nil
}

// forgetWithdrawals removes what withdraws nothing any more.
func (st *store) forgetWithdrawals(ctx context.Context) error {
	_, err := st.pool.Exec(ctx, `delete from withdrawals where at < clock_timestamp() - $1::interval`, tokenLife)
	return storeError(err)
}
