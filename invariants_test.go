package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/jackc/pgx/v5"
)

// check re-derives the invariants from both stores after a scenario. It gives
// repairs the time that they need.
func (w *env) check() {
	w.Helper()
	if w.Failed() {
		return // one report is enough
	}
	var wrong []string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if wrong = w.violations(); len(wrong) == 0 {
			break
		}
	}
	for _, v := range wrong {
		w.Errorf("invariant: %s", v)
	}
	for _, leak := range w.leaks() {
		w.Errorf("secret: %s", leak)
	}
}

// violations lists what the two stores do not agree on.
func (w *env) violations() (wrong []string) {
	report := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	rows, _ := w.pool.Query(ctx, `
		select r.registration_id, r.status, coalesce(r.keycloak_id, '') as keycloak_id, coalesce(r.user_id, '') as user_id,
			coalesce(u.user_id, '') as known_user, coalesce(u.is_verified, false) as is_verified, coalesce(u.is_active, false) as is_active,
			coalesce(u.keycloak_id, '') as user_keycloak_id, exists (select from tasks where task_id = r.registration_id and locked_by is not null) as locked,
			r.email || r.username <> '' or coalesce(r.first_name, r.last_name, r.phone, r.ip_address, r.user_agent) is not null as personal,
			array(select action from audit_log where target in (r.registration_id, r.user_id) and outcome = 'ok') as actions
		from user_registrations r left join users u on u.user_id = r.user_id`)
	type row struct {
		RegistrationID, Status, KeycloakID, UserID, KnownUser string
		IsVerified, IsActive                                  bool
		UserKeycloakID                                        string
		Locked, Personal                                      bool
		Actions                                               []string
	}
	regs, err := pgx.CollectRows(rows, pgx.RowToStructByName[row])
	if err != nil {
		return []string{err.Error()}
	}
	inKeycloak := w.keycloakList()
	users := ofRegistrations(inKeycloak)
	audited := func(r row, action string) {
		if !slices.Contains(r.Actions, action) && !slices.Contains(r.Actions, "user.import") { // what was before is lost
			report("%s (%s) has no audit entry %s: %v", r.RegistrationID, r.Status, action, r.Actions)
		}
	}
	for _, r := range regs {
		ku, there := users[r.RegistrationID]
		delete(users, r.RegistrationID)
		audited(r, "registration.begin")
		switch r.Status {
		case "pending":
			switch {
			case r.KnownUser == "" || r.KeycloakID == "" || r.UserKeycloakID != r.KeycloakID || r.IsVerified:
				report("%s is pending without an unverified users row: %+v", r.RegistrationID, r)
			case !there || ku.ID != r.KeycloakID:
				report("%s is pending without its user in Keycloak", r.RegistrationID)
			case ku.Enabled || ku.EmailVerified:
				report("%s is pending and its user in Keycloak enabled=%v verified=%v", r.RegistrationID, ku.Enabled, ku.EmailVerified)
			case r.Locked:
				report("%s is still locked", r.RegistrationID)
			}
			audited(r, "user.create")
		case "verified":
			switch {
			case r.KnownUser == "" || !r.IsVerified, r.IsActive && !there,
				there && (ku.Enabled != r.IsActive || !ku.EmailVerified || ku.ID != r.KeycloakID):
				report("%s is verified, but not in both stores: %+v %+v", r.RegistrationID, r, ku)
			}
			for _, name := range []string{attrToken, attrCode} {
				if len(ku.Attributes[name]) > 0 {
					report("%s is verified and Keycloak still has %s", r.RegistrationID, name)
				}
			}
			audited(r, "registration.verified")
			audited(r, "user.create")
		default:
			if there || r.KeycloakID != "" || r.KnownUser != "" || r.UserID != "" || r.Personal {
				report("%s is %s, but something is left: %+v, in Keycloak: %v", r.RegistrationID, r.Status, r, there)
			}
			audited(r, "registration."+r.Status)
		}
	}
	for id := range users {
		report("Keycloak has a user of the registration %s, which nobody knows", id)
	}
	var orphans int
	if err := w.pool.QueryRow(ctx, `select count(*) from users u where source = 'web'
		and not exists (select from user_registrations r where r.user_id = u.user_id)`).Scan(&orphans); err != nil || orphans > 0 {
		report("%d users without a registration %v", orphans, err)
	}
	return slices.Concat(wrong, w.userViolations(ctx, inKeycloak), w.sessionViolations(ctx))
}

// userViolations lists what Keycloak has otherwise than the users table.
func (w *env) userViolations(ctx context.Context, inKeycloak []seenUser) (wrong []string) {
	rows, _ := w.pool.Query(ctx, `
		select user_id, keycloak_id, role, network_id, station_id, is_verified, is_active,
			not is_verified and exists (select from user_registrations r where r.user_id = u.user_id and r.status = 'pending') as open,
			exists (select from tasks where task_id = 'kc:' || u.keycloak_id) as queued,
			exists (select from audit_log where target = u.user_id and action in ('user.create', 'user.import') and outcome = 'ok') as audited,
			exists (select from sessions s where s.user_id = u.user_id and ended_at is null) as signed_in
		from users u`)
	type row struct {
		UserID, KeycloakID, Role, NetworkID, StationID string
		IsVerified, IsActive, Open                     bool
		Queued, Audited, SignedIn                      bool
	}
	users, err := pgx.CollectRows(rows, pgx.RowToStructByName[row])
	if err != nil {
		return []string{err.Error()}
	}
	byID := map[string]seenUser{}
	for _, ku := range inKeycloak {
		byID[ku.ID] = ku
	}
	for _, u := range users {
		ku, there := byID[u.KeycloakID]
		claims := map[string][]string{attrUserID: {u.UserID}, attrRoles: {u.Role}, attrNetworkID: {cmp.Or(u.NetworkID, noScope)}, attrStationID: {cmp.Or(u.StationID, noScope)}}
		for name, want := range claims {
			if there && !slices.Equal(ku.Attributes[name], want) {
				wrong = append(wrong, fmt.Sprintf("Keycloak has %s %v of %+v", name, ku.Attributes[name], u))
			}
		}
		switch {
		case u.IsActive && !there, there && u.IsVerified && !ku.EmailVerified, // who is deleted in PostgreSQL may be gone in Keycloak
			there && ku.Enabled != (u.IsActive && !u.Open):
			wrong = append(wrong, fmt.Sprintf("in Keycloak: %v %+v: %+v", there, ku, u))
		case u.Queued, !u.Audited, u.SignedIn && !u.IsActive:
			wrong = append(wrong, fmt.Sprintf("something is to be done: %+v", u))
		}
	}
	return wrong
}

// sessionViolations lists what is wrong with the sessions, in PostgreSQL and in Keycloak.
func (w *env) sessionViolations(ctx context.Context) (wrong []string) {
	w.Helper()
	report := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	rows, _ := w.pool.Query(ctx, `
		select session_id, keycloak_session_id as sid, ended_at is not null as ended, ended_at is null and expires_at > now() as live,
			coalesce(ended_reason, '') as reason,
			(select count(*) from refresh_tokens t where t.session_id = s.session_id) as tokens,
			(select count(*) from refresh_tokens t where t.session_id = s.session_id and used_at is null) as unused,
			exists (select from audit_log where target = s.user_id and action = 'login' and outcome = 'ok'
				and details->>'session_id' = s.session_id) or s.origin = 'keycloak' as signed_in,
			exists (select from audit_log where target = s.user_id and action in ('logout', 'session.end') and outcome = 'ok'
				and details->'sessions' ? s.session_id and reason = s.ended_reason) as signed_out,
			origin = 'service' as service
		from sessions s`)
	type row struct {
		SessionID, SID      string
		Ended, Live         bool
		Reason              string
		Tokens, Unused      int
		SignedIn, SignedOut bool
		Service             bool // not begun at Keycloak
	}
	sessions, err := pgx.CollectRows(rows, pgx.RowToStructByName[row])
	if err != nil {
		return []string{err.Error()}
	}
	inKeycloak, live := w.keycloakSessions(), map[string]bool{}
	for _, s := range sessions {
		live[s.SID] = live[s.SID] || s.Live
		switch {
		case s.Live && (s.Unused != 1 && s.Service || !slices.Contains(inKeycloak, s.SID)), s.Ended && s.Tokens > 0:
			report("in Keycloak: %v: %+v", slices.Contains(inKeycloak, s.SID), s)
		case !s.SignedIn || s.Ended != s.SignedOut:
			report("the audit log does not know %+v", s)
		}
	}
	for _, sid := range inKeycloak {
		if !live[sid] {
			report("Keycloak has a session %s that has ended in PostgreSQL", sid)
		}
	}
	return wrong
}

// keycloakSessions are the ids of the sessions that Keycloak has of our client.
func (w *env) keycloakSessions() (ids []string) {
	w.Helper()
	var list []struct{ ID string }
	w.keycloakAdmin("GET", "/clients?clientId=auth-client", nil, &list)
	w.keycloakAdmin("GET", "/clients/"+list[0].ID+"/user-sessions?max=100000", nil, &list)
	for _, session := range list {
		ids = append(ids, session.ID)
	}
	return ids
}

// straysDie stands in for the time after which Keycloak ends the sessions that nobody
// has got the tokens of (L1), or that a test has opened there itself.
func (w *env) straysDie() {
	w.Helper()
	for _, sid := range w.keycloakSessions() {
		var known bool
		if err := w.pool.QueryRow(context.Background(), `select exists (select from sessions where keycloak_session_id = $1)`, sid).Scan(&known); err != nil {
			w.Fatal(err)
		}
		if !known {
			w.keycloakAdmin("DELETE", "/sessions/"+sid, nil, nil)
		}
	}
}

type seenUser struct {
	ID            string
	Username      string
	Enabled       bool
	EmailVerified bool
	Attributes    map[string][]string
}

// keycloakList asks Keycloak itself, as its administrator, for the users of the realm.
func (w *env) keycloakList() (list []seenUser) {
	w.Helper()
	for {
		var page []seenUser
		w.keycloakAdmin("GET", fmt.Sprintf("/users?briefRepresentation=false&first=%d&max=250", len(list)), nil, &page)
		if list = append(list, page...); len(page) < 250 {
			return list
		}
	}
}

// keycloakUsers are those that came by registration, by its id.
func (w *env) keycloakUsers() map[string]seenUser {
	w.Helper()
	return ofRegistrations(w.keycloakList())
}

func ofRegistrations(list []seenUser) map[string]seenUser {
	users := map[string]seenUser{}
	for _, u := range list {
		if id := u.Attributes[attrRegistrationID]; len(id) > 0 {
			users[id[0]] = u
		}
	}
	return users
}

// keycloakAdmin calls Keycloak's admin API in this env's realm, past the service. A busy Keycloak may answer 500 to
// what it can do a moment later, unless it was a POST.
func (w *env) keycloakAdmin(method, path string, body, result any) {
	w.Helper()
	status, answer := w.askKeycloak(method, path, body)
	if status == http.StatusInternalServerError && method != "POST" {
		status, answer = w.askKeycloak(method, path, body)
		if status == http.StatusNotFound && method == "DELETE" {
			return
		}
	}
	if status >= 300 {
		w.Fatalf("Keycloak: %s %s: %d: %s", method, path, status, answer)
	}
	if result != nil {
		if err := json.Unmarshal(answer, result); err != nil {
			w.Fatalf("Keycloak: %s %s: %v", method, path, err)
		}
	}
}

// askKeycloak is keycloakAdmin for any status. A busy Keycloak has lost the session of the administrator: then it takes
// another.
func (w *env) askKeycloak(method, path string, body any) (status int, answer []byte) {
	w.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	encoded, err := json.Marshal(body)
	if err != nil {
		w.Fatal(err)
	}
	for range 2 {
		token, err := adminToken(ctx, status == http.StatusUnauthorized)
		if err != nil {
			w.Fatal(err)
		}
		req, err := http.NewRequestWithContext(ctx, method, services.KeycloakURL+"/admin/realms/"+w.realm+path, bytes.NewReader(encoded))
		if err != nil {
			w.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			w.Fatal(err)
		}
		defer resp.Body.Close()
		if answer, err = io.ReadAll(resp.Body); err != nil {
			w.Fatal(err)
		}
		if status = resp.StatusCode; status != http.StatusUnauthorized {
			break
		}
	}
	return status, answer
}

// administration keeps the administrator's token for half of its minute: each sign-in costs
// Keycloak a password hash.
var administration struct {
	sync.Mutex
	token string
	until time.Time
}

func adminToken(ctx context.Context, another bool) (string, error) {
	administration.Lock()
	defer administration.Unlock()
	var err error
	if another || time.Now().After(administration.until) {
		administration.until = time.Now().Add(30 * time.Second)
		if administration.token, err = services.AdminToken(ctx); err != nil {
			administration.until = time.Time{}
		}
	}
	return administration.token, err
}

// leaks looks for the secrets that the tests have used in every log line and every
// audit entry.
func (w *env) leaks() (found []string) {
	var audit string
	if err := w.pool.QueryRow(context.Background(), `select coalesce(string_agg(a::text, E'\n'), '') from audit_log a`).Scan(&audit); err != nil {
		return []string{err.Error()}
	}
	logs := w.logs.String()
	for secret := range strings.FieldsFuncSeq(w.secrets.String(), func(r rune) bool { return r == '\n' }) {
		for where, text := range map[string]string{"the log": logs, "the audit log": audit} {
			if i := strings.Index(text, secret); i >= 0 {
				found = append(found, fmt.Sprintf("%s holds %q: …%s…", where, secret, text[max(0, i-200):min(len(text), i+200)]))
			}
		}
	}
	return found
}

// documented is the OpenAPI document that the service itself serves.
var documented struct {
	sync.Once
	router routers.Router
	err    error
}

// checkDocumented checks that the document foresees this answer of an API route:
// its status, its media type, its schema.
func (w *env) checkDocumented(r call, a answer) {
	w.Helper()
	documented.Do(func() {
		doc, err := w.send(w.url, call{path: "/api-docs/openapi.json"})
		if err != nil {
			documented.err = err
			return
		}
		loaded, err := openapi3.NewLoader().LoadFromData(doc.Body)
		if err != nil {
			documented.err = err
			return
		}
		openapi3filter.RegisterBodyDecoder("text/html", openapi3filter.RegisteredBodyDecoder("text/plain"))
		loaded.Servers = nil // the requests that are looked up have no host
		documented.router, documented.err = legacy.NewRouter(loaded)
	})
	if documented.err != nil {
		w.Fatal(documented.err)
	}
	req, err := http.NewRequest(r.method, r.path, nil)
	if err != nil {
		return
	}
	found, params, err := documented.router.FindRoute(req)
	if err != nil {
		return // a page, an alias, or what does not exist
	}
	if err := openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: found},
		Status:                 a.Status, Header: a.Header, Body: io.NopCloser(strings.NewReader(string(a.Body))),
		Options: &openapi3filter.Options{IncludeResponseStatus: true},
	}); err != nil {
		w.Errorf("%s %s answers what the document does not foresee: %v\n%v", r.method, r.path, regexp.MustCompile(`(?s)Schema:.*`).ReplaceAllString(err.Error(), ""), a)
	}
}
