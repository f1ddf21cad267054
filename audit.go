package main

import (
	"context"
	"time"
)

// entry is one line of the audit trail: what the caller did. It never holds a
// password, token, code or secret, nor an e-mail address: ids say who it was.
type entry struct {
	Action  string // registration.begin, login, …
	Target  string // the id of what was acted on, or ""
	Outcome string // ok (the default), refused or failed
	Reason  string // a problem's slug or a short constant
	Details map[string]any
}

// writeAudit records an entry in the transaction of the change that it belongs
// to. If it can't be written, the change does not happen either.
func writeAudit(ctx context.Context, q querier, c caller, now time.Time, e entry) error {
	if e.Outcome == "" {
		e.Outcome = "ok"
	}
	if e.Details == nil {
		e.Details = map[string]any{}
	}
	_, err := q.Exec(ctx, `
		insert into audit_log (audit_id, at, actor, action, target, outcome, reason, ip_address, user_agent, request_id, details)
		values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
		newAuditID(), now, c.Actor, e.Action, e.Target, e.Outcome, e.Reason, c.Address, c.UserAgent, c.RequestID, e.Details)
	return storeError(err)
}

// audit records what was refused or has failed and so changed nothing.
func (st *store) audit(ctx context.Context, c caller, now time.Time, e entry) error {
	return writeAudit(ctx, st.pool, c, now, e)
}
