package main

import (
	"cmp"
	"context"
	"net/netip"
	"time"

	"github.com/jackc/pgx/v5"
)

// entry is one line of the audit trail: what the caller did. It never holds a
// password, token, code or secret, nor an e-mail address: ids say who it was.
type entry struct {
	Action  string // registration.begin, login, …
	Target  string // the id of what was acted on, or ""
	Outcome string // ok (the default), refused or failed
	Reason  string // a problem's slug or a short constant
	Network string // where it belongs; "": to the target's, if it is a user, else to the actor's
	Details map[string]any
}

// writeAudit records an entry in the transaction of the change that it belongs
// to. If it can't be written, the change does not happen either.
func writeAudit(ctx context.Context, q querier, c caller, now time.Time, e entry) error {
	if e.Details == nil {
		e.Details = map[string]any{}
	}
	_, err := q.Exec(ctx, `
		insert into audit_log (audit_id, at, actor, action, target, outcome, reason, network_id, ip_address, user_agent, request_id, details)
		values ($1, $2, $3::text, $4, $5::text, $6, $7, coalesce(nullif($8::text, ''), (select network_id from users where user_id = $5::text),
			(select network_id from users where user_id = $3::text), ''), $9, $10, $11, $12)`,
		newAuditID(), now, c.Actor, e.Action, e.Target, cmp.Or(e.Outcome, "ok"), e.Reason, e.Network, c.Address, c.UserAgent, c.RequestID, e.Details)
	return storeError(err)
}

// audit records what has changed nothing.
func (st *store) audit(ctx context.Context, c caller, now time.Time, e entry) error {
	return writeAudit(ctx, st.pool, c, now, e)
}

// How many refusals of a kind are recorded one by one in a minute; the others are counted,
// and recorded as one entry that has their number.
const (
	refusalsOfOne = 10  // of one actor at one network address
	refusalsOfAll = 300 // of everybody
)

// auditRefusal records a refusal, or counts it where there are too many of its kind. It
// belongs to the network of whoever was refused.
func (st *store) auditRefusal(ctx context.Context, c caller, now time.Time, e entry) error {
	address, _ := netip.ParseAddr(c.Address)
	_, err := st.pool.Exec(ctx, `
		with refusal as (
			select $1 as audit_id, $2::timestamptz as at, $3 as actor, $4 as action, $5 as target, $6 as reason),
		of_one as (
			insert into audit_floods as f (minute, action, reason, actor, network, hits)
			select date_trunc('minute', at), action, reason, actor, $10, 1 from refusal
			on conflict (minute, action, reason, actor, network) do update set hits = f.hits + 1 returning hits),
		of_all as (
			insert into audit_floods as f (minute, action, reason, actor, network, hits)
			select date_trunc('minute', at), action, reason, '', '', 1 from refusal, of_one where hits <= $11
			on conflict (minute, action, reason, actor, network) do update set hits = f.hits + 1 returning hits)
		insert into audit_log (audit_id, at, actor, action, target, outcome, reason, network_id, ip_address, user_agent, request_id)
		select audit_id, at, actor, action, target, 'refused', reason, coalesce((select network_id from users where user_id = actor),
			(select network_id from users where user_id = target), ''), $7, $8, $9
		from refusal, of_all where hits <= $12`,
		newAuditID(), now, c.Actor, e.Action, e.Target, e.Reason, c.Address, c.UserAgent, c.RequestID,
		network(address), refusalsOfOne, refusalsOfAll)
	return storeError(err)
}

// endFloods records how many refusals of the minutes before were only counted. Instances
// share the work.
func (st *store) endFloods(ctx context.Context, now time.Time) error {
	for ended := floodBatch; ended == floodBatch; {
		if err := st.tx(ctx, func(tx pgx.Tx) (err error) {
			ended, err = endSomeFloods(ctx, tx, now)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

const floodBatch = 1000 // counters in a transaction

func endSomeFloods(ctx context.Context, tx pgx.Tx, now time.Time) (ended int, err error) {
	type flood struct {
		Minute                         time.Time
		Action, Reason, Actor, Network string
		Hits                           int
	}
	rows, _ := tx.Query(ctx, `
		delete from audit_floods where ctid = any(array(
			select ctid from audit_floods where minute < $1 order by minute limit $2 for update skip locked))
		returning minute, action, reason, actor, network, hits`, now.Truncate(time.Minute).Add(-time.Minute), floodBatch) // instances' clocks differ
	floods, err := pgx.CollectRows(rows, pgx.RowToStructByPos[flood])
	if err != nil {
		return 0, err
	}
	for _, f := range floods {
		counted := f.Hits - refusalsOfOne
		if f.Actor == "" {
			counted = f.Hits - refusalsOfAll
		}
		if counted <= 0 {
			continue
		}
		if err := writeAudit(ctx, tx, caller{Actor: cmp.Or(f.Actor, anonymous), Address: f.Network}, now, entry{Action: f.Action, Outcome: "refused",
			Reason: f.Reason, Details: map[string]any{"count": counted, "minute": f.Minute}}); err != nil {
			return 0, err
		}
	}
	return len(floods), nil
}

// monthsAhead have their partition already: an instance that runs no jobs makes them when
// it starts.
const monthsAhead = 3

func (st *store) makeMonths(ctx context.Context, now time.Time) error {
	_, err := st.pool.Exec(ctx, `select audit_log_month($1::timestamptz + n * interval '1 month') from generate_series(0, $2::int) n`, now, monthsAhead)
	return storeError(err)
}

// auditIn asks for a part of the record.
type auditIn struct {
	pageIn
	Actor   string    `query:"actor" maxLength:"100" example:"USR-V1StGXR8_Z5jdHi6" description:"Who did it: a user, anonymous, system:…, cli:…"`
	Target  string    `query:"target" maxLength:"100" example:"USR-V1StGXR8_Z5jdHi6" description:"The id of what was acted on."`
	Action  string    `query:"action" maxLength:"50" example:"user.update"`
	Outcome string    `query:"outcome" enum:"ok,refused,failed"`
	From    time.Time `query:"from" description:"Not earlier than this."`
	To      time.Time `query:"to" description:"Earlier than this."`
}

// auditEntry is an entry as it is kept; its fields in this order are what a seal digests.
type auditEntry struct {
	ID        auditID        `json:"audit_id" example:"AUD-V1StGXR8_Z5jdHi6"`
	At        time.Time      `json:"at"`
	Actor     string         `json:"actor" example:"USR-V1StGXR8_Z5jdHi6" description:"A user, anonymous, system:…, cli:…"`
	Action    string         `json:"action" example:"user.update"`
	Target    string         `json:"target" example:"USR-V1StGXR8_Z5jdHi6"`
	Outcome   string         `json:"outcome" enum:"ok,refused,failed"`
	Reason    string         `json:"reason" description:"The problem's type of a refusal, or why it was done."`
	NetworkID string         `json:"network_id" description:"Of the target, if it is a user, else of the actor."`
	Address   string         `json:"ip_address"`
	UserAgent string         `json:"user_agent"`
	RequestID string         `json:"request_id"`
	Details   map[string]any `json:"details" description:"What has changed, with before and after; count: how many refusals this entry stands for."`
}

const auditColumns = `audit_id, at, actor, action, target, outcome, reason, network_id, ip_address, user_agent, request_id, details`

// auditTrail lists what is on record, the latest first: all of it for an administrator,
// what concerns its own network for a partner.
func (s *server) auditTrail(ctx context.Context, c caller, in auditIn) (listOut[auditEntry], error) {
	return pageOf(in.pageIn, func(before cursor) ([]auditEntry, error) {
		network := ""
		if !c.is(roleAdmin) {
			if network = c.NetworkID; !c.is(rolePartner) || network == "" {
				return nil, problemForbidden
			}
		}
		return s.store.auditTrail(ctx, in, network, before)
	}, func(e auditEntry) (auditEntry, cursor) { return e, cursor{e.At, string(e.ID)} })
}

// auditTrail returns entries of one network, or all (""), filtered, the latest first.
func (st *store) auditTrail(ctx context.Context, in auditIn, network string, before cursor) ([]auditEntry, error) {
	f := newFilter()
	if !in.To.IsZero() && in.To.Before(before.At) {
		before = cursor{At: in.To} // one bound: of two PostgreSQL may begin at the later one
	}
	f.and("(at, audit_id) < (?, ?)", before.At, before.ID)
	f.and("at <= ?", before.At) // leaves out the months after it
	f.is("network_id", network)
	f.is("actor", in.Actor)
	f.is("target", in.Target)
	f.is("action", in.Action)
	f.among("outcome", in.Outcome, "ok", "refused", "failed")
	if !in.From.IsZero() {
		f.and("at >= ?", in.From)
	}
	return inOrder[auditEntry](ctx, st, f.list(auditColumns, "audit_log", "at desc, audit_id desc", in.Limit+1), f.args,
		`plan_cache_mode = force_custom_plan`) // one actor has five entries, another half of all
}
