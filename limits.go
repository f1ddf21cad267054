package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// limit is at most N of something in a window that begins with the first. docs/security.md has the table
// of all limits, with what they are for.
type limit struct {
	Name    string // the kind in the keys
	N       int
	Window  time.Duration
	Problem problem // what the client is told
}

// limits are all that newLimit has made.
var limits []limit

// newLimit makes a limit. Over it the client is told problemTooManyRequests, or what is given.
func newLimit(name string, n int, window time.Duration, told ...problem) limit {
	l := limit{name, n, window, append(told, problemTooManyRequests)[0]}
	limits = append(limits, l)
	return l
}

const day = 24 * time.Hour

// Requests of one client address (IPv6: its /64).
var (
	unlimited  = limit{}
	onRegister = newLimit("register", 30, time.Minute)
	onVerify   = newLimit("verify", 60, time.Minute)
	onResend   = newLimit("resend", 30, time.Minute)
	onStatus   = newLimit("status", 300, time.Minute)
	onLogin    = newLimit("login", 60, time.Minute)
	onSignIn   = newLimit("sign-in", 60, time.Minute)
	onForgot   = newLimit("forgot", 30, time.Minute)
	onRefresh  = newLimit("refresh", 600, time.Minute)
	onUsers    = newLimit("users", 600, time.Minute)
	onAccount  = newLimit("account", 300, time.Minute)
)

// What a client address, a mail address, an account or a caller may cost.
var (
	addressesAsked  = newLimit("addresses", 50, time.Hour)                          // of a client: mail addresses
	wrongCodes      = newLimit("wrong-code", 30, time.Hour, problemTooManyAttempts) // of a client
	codesTried      = newLimit("code", 5, 30*day, problemTooManyAttempts)           // of an address
	mailsADay       = newLimit("mail-day", 10, day, problemResendLimit)             // to an address: registrations
	invitesADay     = newLimit("invitation-day", 10, day, problemResendLimit)       // to an address: invitations
	resetsADay      = newLimit("reset-day", 10, day)                                // to an account: new passwords
	resetReserve    = newLimit("reset-reserve", 3, day)                             // of an account, where it was used
	invitations     = newLimit("invite", 60, time.Hour)                             // by a caller
	failuresOfOne   = newLimit("failed-login", 5, time.Minute)                      // of an account and a client
	failuresOfAll   = newLimit("failed-logins", 30, time.Minute)                    // of an account
	refusalsOfOne   = newLimit("refusal", 10, time.Minute)                          // audited: of a kind, by one
	refusalsOfAll   = newLimit("refusals", 300, time.Minute)                        // audited: of a kind
	mailsOfCooldown = limit{Name: "mail", N: 1, Problem: problemResendTooSoon}      // to an address, in RESEND_COOLDOWN
	resetOfCooldown = limit{Name: "reset", N: 1, Problem: problemTooManyRequests}   // to an account, in RESEND_COOLDOWN
)

// rateLimit is the limit of somebody. Without a window it limits nothing, whatever was counted before.
type rateLimit struct {
	limit
	Key string
}

// of is the limit of somebody. Names that people type are compared without case, and only their hash is stored.
func (l limit) of(whom ...string) rateLimit {
	return rateLimit{l, l.Name + ":" + digest(strings.ToLower(strings.Join(whom, " ")))}
}

// within is the limit with a window of the configuration.
func (l limit) within(window time.Duration) limit {
	l.Window = window
	return l
}

// mailbox is what mails to an address are counted for: all user+tag@host reach the same one. It is counted apart from
// user@host, whose owner is not to be kept out by strangers who invent tags.
func mailbox(email string) string {
	local, domain, _ := strings.Cut(email, "@")
	if plain, _, tagged := strings.Cut(local, "+"); tagged {
		local = plain + "+"
	}
	return local + "@" + domain
}

// mailDay is the limit of a day's mails to an address. What strangers use up leaves the administrators theirs.
func mailDay(email, source string) rateLimit {
	if source == sourceInternal {
		return invitesADay.of(mailbox(email))
	}
	return mailsADay.of(mailbox(email))
}

// mailLimits are the limits of mails of a registration or invitation. They count mails that were handed over.
func mailLimits(email, source string, cooldown time.Duration) []rateLimit {
	return []rateLimit{mailsOfCooldown.within(cooldown).of(mailbox(email)), mailDay(email, source)}
}

// hit counts one hit of each limit, exactly, over all instances. Over a limit it returns the limit's problem with the
// time until the window ends: then nothing is to be counted, of several limits by a transaction that is rolled back.
func hit(ctx context.Context, q querier, now time.Time, limits ...rateLimit) error {
	keys, most, ends := []string{}, []int{}, []time.Time{}
	for _, l := range limits {
		if l.Window > 0 {
			keys, most, ends = append(keys, l.Key), append(most, l.N), append(ends, now.Add(l.Window))
		}
	}
	rows, _ := q.Query(ctx, `
		insert into rate_limits as r (key, hits, resets_at)
		select key, 1, resets_at from unnest($1::text[], $3::timestamptz[]) as l (key, resets_at) order by key -- as all lock
		on conflict (key) do update set
			hits = case when r.resets_at <= $4 then 1 else least(r.hits, ($2::int[])[array_position($1, r.key)]) + 1 end,
			resets_at = case when r.resets_at <= $4 then excluded.resets_at else r.resets_at end
		returning key, hits, resets_at`, keys, most, ends, now)
	reached, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct {
		Key    string
		Hits   int
		Resets time.Time
	}])
	err = storeError(err)
	for _, l := range limits {
		for _, is := range reached {
			if is.Key == l.Key && is.Hits > l.N {
				err = cmp.Or(err, error(l.Problem.retryAfter(is.Resets.Sub(now))))
			}
		}
	}
	return err
}

// hit counts one hit of each limit, or none if one is over.
func (st *store) hit(ctx context.Context, now time.Time, limits ...rateLimit) error {
	if len(limits) == 1 {
		return hit(ctx, st.pool, now, limits...)
	}
	return st.tx(ctx, func(tx *txn) { tx.check(hit(ctx, tx, now, limits...)) })
}

// hitAddress counts the mail addresses that a client asks something for: each once an hour.
func (st *store) hitAddress(ctx context.Context, email string, now time.Time) error {
	client := clientNetwork(ctx)
	asked := limit{"asked", 1, time.Hour, problemTooManyRequests}.of(client, email)
	err := st.hit(ctx, now, asked, addressesAsked.of(client))
	if errors.Is(err, problemTooManyRequests) && st.peek(ctx, now, asked) != nil {
		return nil // for this one it has asked before
	}
	return err
}

// peek says what hit would, and counts nothing. Of several limits that are reached it names the one that lasts longest.
func (st *store) peek(ctx context.Context, now time.Time, limits ...rateLimit) error {
	var keys []string
	var most []int
	for _, l := range limits {
		if l.Window <= 0 {
			l.N = math.MaxInt32
		}
		keys, most = append(keys, l.Key), append(most, l.N)
	}
	reached, err := one[struct {
		Index  int
		Resets time.Time
	}](ctx, st.pool, `
		select i - 1, resets_at from unnest($1::text[], $2::int[]) with ordinality as l (key, n, i)
		join rate_limits using (key) where hits >= n and resets_at > $3 order by resets_at desc limit 1`, keys, most, now)
	if errors.Is(err, errNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	return limits[reached.Index].Problem.retryAfter(reached.Resets.Sub(now))
}

// reset begins a limit anew.
func (tx *txn) reset(l rateLimit) { tx.exec(`delete from rate_limits where key = $1`, l.Key) }

// refund takes hits back.
func refund(ctx context.Context, q querier, limits ...rateLimit) error {
	keys := []string{}
	for _, l := range limits {
		if l.Window > 0 {
			keys = append(keys, l.Key)
		}
	}
	_, err := q.Exec(ctx, `update rate_limits set hits = hits - 1 where key = any($1) and hits > 0`, keys)
	return storeError(err)
}
