package main

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/jackc/pgx/v5"
)

// entry is what a caller did, for the audit log. It never holds a password, token, code or
// secret, nor personal data: ids say who it was.
type entry struct {
	Action  string // registration.begin, login, …
	Target  string // the id of what was acted on, or ""
	Outcome string // ok (the default), refused or failed
	Reason  string // a problem's slug or a short constant
	Network string // whose partners may read it; "": that of the target, if it is a user, else of the actor
	Details map[string]any
}

// auditEntry is an entry as it is stored.
type auditEntry struct {
	ID        auditID        `json:"audit_id" example:"AUD-V1StGXR8_Z5jdHi6"`
	At        time.Time      `json:"at"`
	Actor     string         `json:"actor" example:"USR-V1StGXR8_Z5jdHi6" description:"A user, anonymous, system:…, cli:…"`
	Action    string         `json:"action" example:"user.update"`
	Target    string         `json:"target" example:"USR-V1StGXR8_Z5jdHi6"`
	Outcome   string         `json:"outcome" enum:"ok,refused,failed"`
	Reason    string         `json:"reason" description:"The problem's type of a refusal, or why it was done."`
	NetworkID string         `json:"network_id" description:"Of the target, if it is a user, else of the actor; of a refusal, of who was refused."`
	Address   string         `json:"ip_address"`
	UserAgent string         `json:"user_agent"`
	RequestID string         `json:"request_id"`
	Details   map[string]any `json:"details" description:"What has changed, with before and after."`
}

// audit writes an entry in the transaction of its change: if the entry can't be written, the
// change does not happen either. A refusal concerns who was refused, not whose account was asked for.
func (tx *txn) audit(c caller, now time.Time, e entry) {
	if tx.err != nil {
		return
	}
	row := auditEntry{newAuditID(), now, c.Actor, e.Action, e.Target, cmp.Or(e.Outcome, "ok"), e.Reason, e.Network,
		c.Address, c.UserAgent, cmp.Or(c.RequestID, requestOf(tx.ctx).ID), e.Details} // a task may be done in a request
	if row.Details == nil {
		row.Details = map[string]any{}
	}
	first, second := e.Target, c.Actor
	if row.Outcome == "refused" {
		first, second = second, first
	}
	tx.waiting.Queue(`
		insert into audit_log (audit_id, at, actor, action, target, outcome, reason, network_id,
			ip_address, user_agent, request_id, details)
		values ($1, $2, $3, $4, $5, $6, $7, coalesce(nullif($8, ''), (select network_id from users where user_id = $13),
			(select network_id from users where user_id = $14), ''), $9, $10, $11, $12)
		returning network_id`,
		row.ID, now, row.Actor, row.Action, row.Target, row.Outcome, row.Reason, row.NetworkID,
		row.Address, row.UserAgent, row.RequestID, row.Details, first, second).
		QueryRow(func(r pgx.Row) error { return r.Scan(&row.NetworkID) })
	tx.entries = append(tx.entries, &row)
}

// audit writes an entry of what has changed nothing.
func (st *store) audit(ctx context.Context, c caller, now time.Time, e entry) error {
	return st.tx(ctx, func(tx *txn) { tx.audit(c, now, e) })
}

// refusalLimits are how many refusals of a kind (action and reason) are audited. Each target has
// limits of its own, and so have the refusals without one: however many others there are,
// guesses at one account are audited. Who names many targets is bounded by the route's limit.
func refusalLimits(c caller, e entry) (ofOne, ofAll rateLimit) {
	address, _ := netip.ParseAddr(c.Address)
	kind := e.Action + " " + e.Reason + " " + e.Target
	one := kind + " " + c.Actor + " " + network(address)
	return refusalsOfOne.of(one), refusalsOfAll.of(kind)
}

// recordRefusal audits a refusal within its limits. Those over them are counted in a metric,
// and one WARN line a minute says so. The client is refused even if the entry can't be written.
func (s *server) recordRefusal(ctx context.Context, c caller, action string, p problem) {
	ctx, cancel := detached(ctx, 5*time.Second)
	defer cancel()
	now, e := s.now(), entry{Action: action, Target: p.target, Outcome: "refused", Reason: p.slug()}
	ofOne, ofAll := refusalLimits(c, e)
	err := s.store.hit(ctx, now, ofOne) // not in one transaction: a flood would wait for its locks
	if err == nil {
		err = s.store.hit(ctx, now, ofAll)
	}
	if err == nil {
		err = s.store.audit(ctx, c, now, e)
	}
	switch {
	case errors.Is(err, problemTooManyRequests):
		s.metrics.dropped.WithLabelValues(action).Inc()
		if s.dropWarned.again(now) {
			s.log.WarnContext(ctx, "audit: refusals dropped", "action", action, "reason", e.Reason)
		}
	case err != nil:
		s.log.ErrorContext(ctx, "audit: refusal not written", "action", action, "reason", e.Reason, "error", err)
	}
}

// auditIn asks for a part of the audit log.
type auditIn struct {
	pageIn
	Actor   string    `query:"actor" maxLength:"100" example:"USR-V1StGXR8_Z5jdHi6" description:"Who did it: a user, anonymous, system:…, cli:…"`
	Target  string    `query:"target" maxLength:"100" example:"USR-V1StGXR8_Z5jdHi6" description:"The id of what was acted on."`
	Action  string    `query:"action" maxLength:"50" example:"user.update"`
	Outcome string    `query:"outcome" enum:"ok,refused,failed"`
	From    time.Time `query:"from" description:"Not earlier than this."`
	To      time.Time `query:"to" description:"Earlier than this."`
}

// auditEntries lists the audit log, the latest entry first: all of it for an administrator,
// what concerns its own network for a partner.
func (s *server) auditEntries(ctx context.Context, c caller, in auditIn) (listOut[auditEntry], error) {
	network := ""
	if !c.is(roleAdmin) {
		if network = c.NetworkID; !c.is(rolePartner) || network == "" {
			return listOut[auditEntry]{}, problemForbidden
		}
	}
	return pageOf(in.pageIn, func(before cursor) ([]auditEntry, error) {
		return s.store.auditEntries(ctx, in, network, before)
	}, func(e auditEntry) (auditEntry, cursor) { return e, cursor{e.At, string(e.ID)} })
}

// auditEntries returns entries of one network, or all (""), filtered, the latest first.
// "between" is there for PostgreSQL to leave out other months: a comparison of rows does not.
func (st *store) auditEntries(ctx context.Context, in auditIn, network string, before cursor) ([]auditEntry, error) {
	if !in.To.IsZero() && in.To.Before(before.At) {
		before = cursor{At: in.To}
	}
	return list[auditEntry](ctx, st, `
		select audit_id, at, actor, action, target, outcome, reason, network_id,
			ip_address, user_agent, request_id, details
		from audit_log
		where at between $1 and $2 and (at, audit_id) < ($2, $3)
			and ($4 = '' or network_id = $4) and ($5 = '' or actor = $5) and ($6 = '' or target = $6)
			and ($7 = '' or action = $7) and ($8 = '' or outcome = $8)
		order by at desc, audit_id desc limit $9`,
		in.From, before.At, before.ID, network, in.Actor, in.Target, in.Action, in.Outcome, in.Limit+1)
}
