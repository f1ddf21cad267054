package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// operate runs a subcommand as an operator does, beside the service.
func (w *env) operate(args ...string) (string, error) {
	var out bytes.Buffer
	env := maps.Clone(w.vars)
	env["USER"] = "tester"
	err := run(w.Context(), args, func(name string) string { return env[name] }, &out, w.logs)
	return out.String(), err
}

// patched changes a user by another's token.
func (w *env) patched(by answer, email string, change body) answer {
	w.Helper()
	r := authorized(by.text("access_token"), "PATCH", "/api/v1/users/"+w.idOf(email))
	r.json = change
	return w.do(r)
}

func (w *env) idOf(email string) string {
	w.Helper()
	return w.value(`select user_id from users where email = lower($1)`, email)
}

// appointed signs a new account in whom an administrator has given a role and a scope.
func (w *env) appointed(by answer, role, network, station string) (email string, a answer) {
	w.Helper()
	email = newEmail()
	w.account(email)
	w.wants(w.patched(by, email, body{"role": role, "network_id": network, "station_id": station}), 200, "")
	return email, w.signsIn(email)
}

// loggedEntries are the audit entries in a log by their id, as far as a line has them.
func loggedEntries(t testing.TB, log string) map[string]body {
	t.Helper()
	entries := map[string]body{}
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `"audit":true`) {
			continue
		}
		var e body
		if err := json.Unmarshal([]byte(line), &e); err != nil || e["level"] != "INFO" || e["msg"] != "audit: entry written" {
			t.Fatalf("%v: %s", err, line)
		}
		for _, name := range []string{"time", "level", "msg", "audit", "service.version"} {
			delete(e, name)
		}
		if e["request_id"] == nil {
			e["request_id"] = ""
		}
		id := e["audit_id"].(string)
		if entries[id] != nil {
			t.Errorf("%s is in the log twice", id)
		}
		entries[id] = e
	}
	return entries
}

// storedEntries are those in the table, with what a line in the log has of them.
func storedEntries(t testing.TB, rows string) map[string]body {
	t.Helper()
	entries := map[string]body{}
	for line := range strings.Lines(rows) {
		var e body
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		entries[e["audit_id"].(string)] = e
	}
	return entries
}

const entriesAsJSON = `select (to_jsonb(a) - array['at', 'user_agent'])::text from audit_log a`

// The log has what was committed, and nothing else.
func TestAuditIsLoggedAfterCommit(t *testing.T) {
	d := newDatabase(t)
	now := time.Now()
	write := func(tx *txn, action string) {
		tx.audit(caller{Actor: "USR-a", Address: "192.0.2.7"}, now, entry{Action: action, Target: "USR-b",
			Details: map[string]any{"role": map[string]any{"before": "user", "after": "admin"}}})
	}
	for _, c := range []struct {
		name    string
		f       func(*txn)
		fails   string // "": it is committed
		entries int
	}{
		{name: "committed", entries: 2, f: func(tx *txn) { write(tx, "first"); write(tx, "second") }},
		{name: "rolled back", fails: "undone", f: func(tx *txn) { write(tx, "x"); tx.check(errors.New("undone")) }},
		{name: "its commit fails", fails: "commit", f: func(tx *txn) {
			write(tx, "x")
			rows, _ := tx.Query(t.Context(), `select 1 / 0`)
			rows.Close()
		}},
		{name: "a later entry can't be written", fails: "no partition", f: func(tx *txn) {
			write(tx, "x")
			tx.audit(caller{Actor: "a"}, now.AddDate(50, 0, 0), entry{Action: "x"})
		}},
	} {
		before := len(loggedEntries(t, d.logs.String()))
		err := d.store.tx(t.Context(), c.f)
		if (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := len(loggedEntries(t, d.logs.String())) - before; got != c.entries {
			t.Errorf("%s: the log has %d entries more, not %d", c.name, got, c.entries)
		}
	}
	if diff := cmp.Diff(storedEntries(t, d.list(entriesAsJSON)), loggedEntries(t, d.logs.String())); diff != "" {
		t.Errorf("-stored +logged\n%s", diff)
	}
}

// droppedRefusals is what the metric says, of all actions.
func droppedRefusals(t testing.TB, metrics string) (n int) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(?m)^auth_audit_refusals_dropped_total\{action="\w+"\} (\d+)$`).FindAllStringSubmatch(metrics, -1) {
		k, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	return n
}

func (d *database) dropped() int {
	d.Helper()
	answer := httptest.NewRecorder()
	d.managementHandler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return droppedRefusals(d, answer.Body.String())
}

// refusal is one that happens n times.
type refusal struct {
	n       int
	actor   string
	address string
	target  string
	reason  string
}

// flood has all of them refused at once.
func (d *database) flood(refusals ...refusal) {
	var all sync.WaitGroup
	work := make(chan refusal)
	for range 8 {
		all.Go(func() {
			for r := range work {
				p := problemInvalidCredentials.withTarget(r.target)
				if r.reason != "" {
					p = problem{Type: problemType("/problems/" + r.reason), Status: 401}.withTarget(r.target)
				}
				d.recordRefusal(d.Context(), caller{Actor: r.actor, Address: r.address, UserAgent: "flood"}, "login", p)
			}
		})
	}
	for _, r := range refusals {
		for range r.n {
			work <- r
		}
	}
	close(work)
	all.Wait()
}

// A flood of refusals does not become one of entries; how many are missing is known.
func TestRefusalLimits(t *testing.T) {
	t.Parallel()
	const here, there, ada, bob = "192.0.2.1", "192.0.2.2", "USR-ada", "USR-bob"
	everywhere := func(n int, target string) (list []refusal) {
		for i := range 60 {
			list = append(list, refusal{n: n, actor: anonymous, address: fmt.Sprint("198.51.100.", i), target: target})
		}
		return list
	}
	for _, c := range []struct {
		name             string
		refusals         []refusal
		audited, dropped int
	}{
		{name: "just as many as are audited", refusals: []refusal{{n: 10, actor: anonymous, address: here}}, audited: 10},
		{name: "one more", refusals: []refusal{{n: 11, actor: anonymous, address: here}}, audited: 10, dropped: 1},
		{name: "from two addresses", refusals: []refusal{{n: 20, actor: anonymous, address: here}, {n: 20, actor: anonymous, address: there}},
			audited: 20, dropped: 20},
		{name: "from one network", refusals: []refusal{{n: 20, actor: anonymous, address: "2001:db8::1"}, {n: 20, actor: anonymous, address: "2001:db8:0:0:1::3"}},
			audited: 10, dropped: 30},
		{name: "of two actors", refusals: []refusal{{n: 15, actor: ada, address: here}, {n: 15, actor: anonymous, address: here}},
			audited: 20, dropped: 10},
		{name: "of two kinds", refusals: []refusal{{n: 15, actor: ada, address: here}, {n: 15, actor: ada, address: here, reason: "otp-required"}},
			audited: 20, dropped: 10},
		{name: "from nowhere", refusals: []refusal{{n: 15, actor: anonymous}}, audited: 10, dropped: 5},
		{name: "from many addresses", refusals: everywhere(6, ""), audited: 300, dropped: 60},
		{name: "at two accounts", refusals: []refusal{{n: 15, actor: anonymous, address: here, target: ada}, {n: 15, actor: anonymous, address: here, target: bob}},
			audited: 20, dropped: 10},
		{name: "at one account, from many addresses", refusals: everywhere(6, ada), audited: 300, dropped: 60},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDatabase(t)
			noon := time.Now()
			d.now = func() time.Time { return noon }
			d.flood(c.refusals...)
			if got := d.value(`select count(*)::text from audit_log where outcome = 'refused'`); got != fmt.Sprint(c.audited) || d.dropped() != c.dropped {
				t.Errorf("%s are audited, not %d; %d are dropped, not %d", got, c.audited, d.dropped(), c.dropped)
			}
			if n := strings.Count(d.logs.String(), `"level":"WARN","msg":"audit: refusals dropped"`); n != min(c.dropped, 1) {
				t.Errorf("%d lines say that refusals are dropped", n)
			}
			d.now = func() time.Time { return noon.Add(time.Minute) } // from then on they are audited again
			d.flood(c.refusals[0])
			if got := d.value(`select count(*)::text from audit_log where at > $1`, noon); got != fmt.Sprint(min(c.refusals[0].n, refusalsOfOne.N)) {
				t.Errorf("a minute later %s are audited", got)
			}
		})
	}
}

// Other refusals, however many, hide no guesses at one account: not those of the same kind
// that name nobody, nor those at others, nor those from the same address.
func TestGuessesAreAudited(t *testing.T) {
	w := sharedEnv(t)
	email, from := newEmail(), newAddress()
	w.account(email)
	d := &database{TB: t, server: idle(t, newLogger(w.logs, config{}), map[string]string{"DATABASE_URL": w.vars["DATABASE_URL"]})}
	d.flood(refusal{n: 310, actor: anonymous, address: from}, refusal{n: 310, actor: anonymous, address: from, target: "USR-0123456789abcdef"})
	for i := range 31 {
		d.flood(refusal{n: 10, actor: anonymous, address: fmt.Sprint("203.0.113.", i)})
	}
	var want []string
	for range 3 {
		guess := signingIn(email, "a wrong password")
		guess.from = from
		a := w.do(guess)
		w.wants(a, 401, "invalid-credentials")
		want = append(want, a.text("request_id"))
	}
	if got := w.list(`select request_id from audit_log where target = $1 and outcome = 'refused' order by at`, w.idOf(email)); got != strings.Join(want, "\n") {
		t.Errorf("of the guesses %v the audit log has\n%s", want, got)
	}
}

// Many requests from one address that all fail, at two instances.
func TestFloodOfLogins(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	v, _ := w.another(nil)
	const n = 300
	instances, from := []string{w.url, v.url}, newAddress()
	answers := map[string]int{}
	for range n / 10 {
		var calls []call
		for range 10 {
			calls = append(calls, call{method: "POST", path: loginPath, json: body{"email": newEmail(), "password": "a wrong password"}, from: from})
		}
		for what, m := range tally(w.at(instances, calls...)) {
			answers[what] += m
		}
	}
	refused, limited := answers["401 invalid-credentials"], answers["429 too-many-requests"]
	if refused <= refusalsOfOne.N || limited <= refusalsOfOne.N || refused+limited != n {
		t.Errorf("answers: %v", answers)
	}
	audited, err := strconv.Atoi(w.value(`select count(*)::text from audit_log where outcome = 'refused' and action = 'login'`))
	if err != nil || audited < 2*refusalsOfOne.N || audited > 6*refusalsOfOne.N { // two kinds, in three minutes at most
		t.Errorf("%d refusals are audited %v", audited, err)
	}
	dropped := droppedRefusals(t, string(w.management404("/metrics").Body)) + droppedRefusals(t, string(v.management404("/metrics").Body))
	if audited+dropped != n {
		t.Errorf("%d are audited and %d dropped, of %d", audited, dropped, n)
	}
}

const auditPath = "/api/v1/audit"

// auditPage is the ids of the entries on a page, and the cursor of the next one.
func (w *env) auditPage(who answer, query url.Values) (ids []string, next string) {
	w.Helper()
	a := w.as(who, "GET", auditPath+"?"+query.Encode())
	w.wants(a, 200, "")
	for _, item := range a.JSON["items"].([]any) {
		ids = append(ids, item.(body)["audit_id"].(string))
	}
	return ids, a.text("next_cursor")
}

// auditReaders are those who read the audit log, and those of whom it tells. No job runs.
type auditReaders struct {
	*env
	root, ada, stray                       string // addresses
	admin, local, partner, other, operator answer // sign-ins
	user, adas                             answer
}

// TestAuditEntries lists the audit log.
func TestAuditEntries(t *testing.T) {
	t.Parallel()
	r := &auditReaders{env: newEnv(t, map[string]string{"JOB_INTERVAL": "0"}), root: newEmail()}
	r.account(r.root)
	if out, err := r.operate("grant-admin", r.root); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	r.admin = r.signsIn(r.root)
	_, r.local = r.appointed(r.admin, "admin", "NET-1", "")
	_, r.partner = r.appointed(r.admin, "partner", "NET-1", "")
	_, r.other = r.appointed(r.admin, "partner", "NET-2", "")
	_, r.operator = r.appointed(r.admin, "operator", "NET-1", "STA-1")
	r.stray, r.user = r.appointed(r.admin, "user", "", "")
	r.ada, r.adas = r.appointed(r.admin, "user", "NET-1", "STA-1")
	r.whoMayRead()
	r.whoSeesWhat()
	r.filters()
	r.wrongFilters()
	r.pages()
}

func (r *auditReaders) whoMayRead() {
	_, aimless := r.appointed(r.admin, "partner", "", "STA-1")
	for _, c := range []struct {
		name   string
		who    answer
		status int
		slug   string
	}{
		{name: "admin", who: r.admin, status: 200},
		{name: "an admin with a network", who: r.local, status: 200},
		{name: "partner", who: r.partner, status: 200},
		{name: "partner without a network", who: aimless, status: 403, slug: "forbidden"},
		{name: "operator", who: r.operator, status: 403, slug: "forbidden"},
		{name: "user", who: r.adas, status: 403, slug: "forbidden"},
		{name: "nobody", status: 401, slug: "unauthorized"},
	} {
		r.Log(c.name)
		read := authorized(c.who.text("access_token"), "GET", auditPath)
		if c.who.JSON == nil {
			read.auth = nil
		}
		r.wants(r.do(read), c.status, c.slug)
	}
}

// whoSeesWhat: an entry belongs to the network of whom it is about, or else of who did it.
func (r *auditReaders) whoSeesWhat() {
	change := func(by answer, email, field, value string) answer { return r.patched(by, email, body{field: value}) }
	type deed struct {
		name    string
		done    answer
		network string // whose partners see it
	}
	moved := change(r.admin, r.ada, "network_id", "NET-2") // first, so that Ada is in NET-2 in all that follows
	deeds := []deed{
		{name: "moved: of the network that it left", done: moved, network: "NET-1"},
		{name: "of another's by now", done: change(r.admin, r.ada, "first_name", "Ada A."), network: "NET-2"},
		{name: "by its partner", done: change(r.other, r.ada, "last_name", "L."), network: "NET-2"},
		{name: "of somebody in no network, by somebody in one", done: change(r.local, r.stray, "first_name", "S."), network: ""},
		{name: "moved from none: of the one that it is in", done: change(r.admin, r.stray, "network_id", "NET-2"), network: "NET-2"},
		{name: "moved to none", done: change(r.admin, r.stray, "network_id", ""), network: "NET-2"},
		{name: "refused: of who was refused", done: change(r.partner, r.ada, "first_name", "A."), network: "NET-1"},
		{name: "refused, who is in no network", done: change(r.user, r.ada, "first_name", "A."), network: ""},
		{name: "refused, who is known by the name only", done: r.login(r.ada, "a wrong password"), network: "NET-2"},
		{name: "refused, who is not known", done: r.login(newEmail(), "a wrong password"), network: ""},
		{name: "about nobody", done: r.as(r.operator, "GET", auditPath), network: "NET-1"},
		{name: "a sign-in", done: r.signsIn(r.ada), network: "NET-2"},
	}
	for _, d := range deeds {
		request := d.done.Header.Get("X-Request-Id")
		entry := r.value(`select audit_id from audit_log where request_id = $1`, request)
		if got := r.value(`select network_id from audit_log where request_id = $1`, request); got != d.network {
			r.Errorf("%s is of %q, not %q", d.name, got, d.network)
		}
		for network, who := range map[string]answer{"": r.admin, "NET-1": r.partner, "NET-2": r.other} {
			ids, _ := r.auditPage(who, url.Values{"limit": {"200"}})
			if sees := slices.Contains(ids, entry); sees != (network == "" || network == d.network) {
				r.Errorf("%s: the partner of %q sees it: %v", d.name, network, sees)
			}
		}
	}
	a := r.as(r.admin, "GET", auditPath+"?limit=1&target="+r.idOf(r.stray)+"&action=user.update")
	entry := a.JSON["items"].([]any)[0].(body)
	want := body{"audit_id": entry["audit_id"], "at": entry["at"], "actor": r.idOf(r.root), "action": "user.update", "target": r.idOf(r.stray),
		"outcome": "ok", "reason": "", "network_id": "NET-2", "ip_address": entry["ip_address"], "user_agent": "Go-http-client/1.1",
		"request_id": deeds[5].done.Header.Get("X-Request-Id"), "details": body{"network_id": body{"before": "NET-2", "after": ""}}}
	if diff := cmp.Diff(want, entry); diff != "" || !strings.HasSuffix(entry["at"].(string), "Z") {
		r.Error(diff)
	}
}

// filters: each filter, alone and with the others, means what it says.
func (r *auditReaders) filters() {
	ofTime := func(offset int) string {
		return r.value(`select to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') from audit_log order by at offset $1 limit 1`, offset)
	}
	early, late := ofTime(15), ofTime(40)
	at, err := time.Parse(time.RFC3339Nano, early)
	if err != nil {
		r.Fatal(err)
	}
	elsewhere := at.In(time.FixedZone("", -5*3600)).Format(time.RFC3339Nano)
	var queries []url.Values
	for _, actor := range []string{"", r.idOf(r.root), "anonymous", "cli:tester", "USR-nobody"} {
		for _, target := range []string{"", r.idOf(r.ada)} {
			for _, action := range []string{"", "user.update", "login"} {
				for _, outcome := range []string{"", "ok", "refused", "failed"} {
					for _, times := range [][2]string{{"", ""}, {early, ""}, {"", late}, {early, late}, {elsewhere, late}, {late, early}} {
						queries = append(queries, url.Values{"actor": {actor}, "target": {target}, "action": {action}, "outcome": {outcome},
							"from": {times[0]}, "to": {times[1]}})
					}
				}
			}
		}
	}
	seen := map[int]int{}
	for i, query := range queries {
		who, network := r.admin, ""
		if i%2 == 1 {
			who, network = r.partner, "NET-1"
		}
		want := r.list(`select audit_id from audit_log where $1 in ('', actor) and $2 in ('', target) and $3 in ('', action) and $4 in ('', outcome)
			and at >= coalesce(nullif($5, '')::timestamptz, '-infinity') and at < coalesce(nullif($6, '')::timestamptz, 'infinity') and $7 in ('', network_id)
			order by at desc, audit_id desc`, query.Get("actor"), query.Get("target"), query.Get("action"), query.Get("outcome"),
			query.Get("from"), query.Get("to"), network)
		maps.DeleteFunc(query, func(_ string, values []string) bool { return values[0] == "" })
		query.Set("limit", "200")
		ids, _ := r.auditPage(who, query)
		if strings.Join(ids, "\n") != want {
			r.Errorf("%s of %q: %v, want\n%s", query.Encode(), network, ids, want)
		}
		seen[len(ids)]++
	}
	if len(seen) < 10 || seen[0] == 0 {
		r.Errorf("the filters leave %v", seen)
	}
}

func (r *auditReaders) wrongFilters() {
	for query, field := range map[string]string{
		"from=yesterday": "from", "from=2026-13-01T00:00:00Z": "from",
		"to=2026-01-01": "to", "to=1700000000": "to", "to=2026-01-01T00:00:00": "to",
		"outcome=perhaps": "outcome", "outcome=OK": "outcome",
		"limit=0": "limit", "limit=201": "limit", "limit=-1": "limit", "limit=many": "limit",
		"cursor=x": "cursor", "cursor=" + cursorText("1 x"): "cursor",
		"actor=%ff": "actor", "target=a%00b": "target",
		"action=" + strings.Repeat("x", 51): "action", "actor=" + strings.Repeat("x", 101): "actor",
	} {
		r.Log(query)
		r.names(r.as(r.admin, "GET", auditPath+"?"+query), field)
	}
	for _, query := range []string{"limit=0&outcome=perhaps&from=x&to=y", "to=y&limit=many&outcome=perhaps&from=x"} { // all at once
		got := ""
		for _, e := range r.as(r.admin, "GET", auditPath+"?"+query).JSON["errors"].([]any) {
			got += e.(body)["field"].(string) + " "
		}
		if got != "from limit outcome to " {
			r.Errorf("%s names %s", query, got)
		}
	}
}

// pages: each entry is on one page, while more are written, and though some are of one moment.
func (r *auditReaders) pages() {
	r.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome, network_id)
		select 'AUD-' || substr(md5(random()::text), 1, 16), date_trunc('second', now()) + i / 4 * interval '1 microsecond', 'test', 'test.paging', '', 'ok', 'NET-' || 1 + i % 2
		from generate_series(1, 450) i`)
	for limit, least := range map[string]int{"200": 3, "50": 9, "7": 65, "": 9} {
		for network, who := range map[string]answer{"": r.admin, "NET-1": r.partner} {
			want := strings.Split(r.list(`select audit_id from audit_log where action = 'test.paging' and $1 in ('', network_id)
				order by at desc, audit_id desc`, network), "\n")
			page := url.Values{"action": {"test.paging"}}
			if limit != "" {
				page.Set("limit", limit)
			}
			var got []string
			pages := 0
			for ; pages == 0 || page.Get("cursor") != ""; pages++ {
				ids, next := r.auditPage(who, page)
				got = append(got, ids...)
				page.Set("cursor", next)
				r.exec(`insert into audit_log (audit_id, at, actor, action, target, outcome, network_id) values ('AUD-' || substr(md5(random()::text), 1, 16),
					now() + interval '1 second', 'test', 'test.paging', '', 'ok', 'NET-1')`)
			}
			if !slices.Equal(got, want) {
				r.Errorf("limit %s: %d entries on %d pages, not %d", limit, len(got), pages, len(want))
			}
			if network == "" && pages < least {
				r.Errorf("limit %s: %d pages", limit, pages)
			}
		}
	}
}
