package main

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// rules is an env whose instances run no jobs: what is changed in one store only stays so until
// a test has it reconciled.
type rules struct {
	*env
	other string // address of a second instance
}

// is fails unless the row of an address is as wanted: "none", "active", "deleted, not confirmed" …
func (r *rules) is(email, want string) {
	r.Helper()
	got := r.value(`select coalesce(min(case when is_active then 'active' else 'deleted' end ||
		case when is_verified then '' else ', not confirmed' end), 'none') from users
			where lower(email) = lower($1)`, email)
	if got != want {
		r.Errorf("%s is %s, not %s", email, got, want)
	}
}

// finds makes a full pass that must find and repair as much.
func (r *rules) finds(settings map[string]string, want map[difference]int) {
	r.Helper()
	found, repaired, out, err := r.sync(settings)
	if diff := cmp.Diff(want, found); diff != "" || err != nil || !maps.Equal(found, repaired) {
		r.Errorf("%v: found %s\n%s", err, diff, out)
	}
}

// confirmed makes Keycloak's user as V3 leaves it, but for enabled.
func (r *rules) confirmed(email string, enabled bool) {
	r.Helper()
	id := r.keycloakID(email)
	ku := r.fromKeycloak(id)
	for _, name := range []string{attrToken, attrCode} {
		delete(ku["attributes"].(body), name)
	}
	maps.Copy(ku, body{"emailVerified": true, "enabled": enabled, "requiredActions": []string{},
		"credentials": []body{{"type": "password", "value": password, "temporary": false}}})
	r.keycloakAdmin("PUT", "/users/"+id, ku, nil)
}

// TestSyncRules: what sync must not do, and what it must not forget.
func TestSyncRules(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	s := newSeeds()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0", "RESEND_COOLDOWN": "1ms"}, s.inKeycloak(0, 12)...)
	v, _ := w.another(nil)
	r := &rules{w, v.url}
	r.Run("a limit of 100 % is none", func() { r.noLimit(s) })
	r.confirmedInKeycloak()
	r.Run("confirmed in Keycloak before its id was in PostgreSQL", r.confirmedBeforeR3)
	r.Run("a registration whose token is removed in Keycloak", r.tokenRemoved)
	r.Run("confirmed by another while its mail is sent", r.confirmedMeanwhile)
	r.Run("a code for a registration that Keycloak does not have yet", r.codeBeforeR2)
	r.Run("an address that is not confirmed yet is managed", r.managedUnconfirmed)
	r.Run("a registration that has ended", r.endedRegistration)
	r.Run("a refresh says what is true in PostgreSQL", r.refreshTells)
	r.Run("several sign-ins of one whom only Keycloak knows", r.parallelImport)
	r.Run("several sign-ins of one whose role was edited", r.parallelOverwrite)
	r.Run("what changes during a dry run is no difference", r.changeDuringPass)
	r.Run("addresses that others have given up", r.addressesMove)
	r.Run("a registration in other hands", r.registrationLocked)
}

func (r *rules) noLimit(s seeds) {
	s.inPostgreSQL(r.env, 100, 112)
	before := r.localUsers()
	if _, _, out, err := r.sync(nil); err == nil || !strings.Contains(out, "aborted") {
		r.Errorf("%v: %s", err, out)
	}
	if diff := cmp.Diff(before, r.localUsers()); diff != "" {
		r.Error(diff)
	}
	r.finds(map[string]string{"SYNC_MAX_SHARE": "100"}, map[difference]int{diffUnknown: 12, diffMissing: 12})
}

// confirmedInKeycloak has an administrator of Keycloak confirm an address. Whoever comes next
// concludes the registration, and enables nobody.
func (r *rules) confirmedInKeycloak() {
	for name, come := range map[string]func(email string, l link){
		"by its task":       func(email string, _ link) { r.makesDue(email) },
		"by another click":  func(_ string, l link) { r.wants(r.do(verifying(l)), 200, "") },
		"when it is denied": func(_ string, l link) { r.wants(r.do(cancelling(l)), 409, "already-verified") },
		"when it is begun again": func(email string, _ link) {
			r.do(registering(email))
			r.makesDue(email)
		},
		"when a mail is asked for": func(email string, _ link) {
			r.do(resending(r.registrationOf(email)))
			r.makesDue(email)
		},
	} {
		r.Run("confirmed and disabled in Keycloak, "+name, func() {
			email := newEmail()
			l := registered(r.env, email)
			r.confirmed(email, false)
			come(email, l)
			r.command("jobs")
			r.is(email, "deleted")
			if r.fromKeycloak(r.keycloakID(email))["enabled"] != false {
				r.Error("it was enabled")
			}
		})
		r.Run("confirmed in Keycloak, "+name, func() {
			email := newEmail()
			l := registered(r.env, email)
			r.confirmed(email, true)
			come(email, l)
			r.command("jobs")
			r.is(email, "active")
			r.signsIn(email)
		})
	}
}

func (r *rules) confirmedBeforeR3() {
	var emails []string
	for range 2 {
		email := newEmail()
		emails = append(emails, email)
		registered(r.env, email)
		r.confirmed(email, true)
		r.exec(`update user_registrations set keycloak_id = null, user_id = null where email = $1`, email)
		r.exec(`delete from users where email = $1`, email)
		r.makesDue(email)
	}
	r.command("jobs")
	for _, email := range emails {
		r.is(email, "active")
		r.signsIn(email)
	}
}

func (r *rules) tokenRemoved() {
	for _, mailed := range []bool{true, false} {
		email := newEmail()
		if !mailed {
			r.mail.Close()
		}
		r.register(email)
		r.keycloakAdmin("PUT", "/users/"+r.keycloakID(email), body{"email": email, "username": email,
			"attributes": body{}}, nil)
		if !mailed {
			if err := r.mail.Restart(); err != nil {
				r.Fatal(err)
			}
		}
		id := r.registrationOf(email)
		r.wants(r.do(resending(id)), 503, "unavailable")
		r.wants(r.do(resending(id)), 404, "registration-not-found")
		r.is(email, "none")
	}
}

func (r *rules) confirmedMeanwhile() {
	email := newEmail()
	there, release := r.kc.holdAt("^send_mail ", true)
	got := make(chan answer)
	go func() { got <- r.do(registering(email)) }()
	<-there
	id := r.registrationOf(email)
	r.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = $1`, id) // ours has ended
	r.confirmed(email, true)
	release()
	<-got
	if r.fromKeycloak(r.keycloakID(email))["enabled"] != true {
		r.Error("it was disabled")
	}
	r.exec(`update tasks set locked_by = null, locked_until = null, due_at = now() where task_id = $1`, id)
	r.command("jobs")
	r.is(email, "active")
}

func (r *rules) codeBeforeR2() {
	email := newEmail()
	l := registered(r.env, email)
	r.keycloakAdmin("DELETE", "/users/"+r.keycloakID(email), nil, nil)
	r.exec(`update user_registrations set keycloak_id = null, user_id = null, mail_state = 'queued'
		where email = $1`, email) // R1
	r.exec(`delete from users where email = $1`, email)
	r.wants(r.do(typing(email, other(l.Code))), 400, "invalid-code")
	r.wants(r.do(verifying(r.readMail(email, 2))), 200, "")
}

func (r *rules) managedUnconfirmed() {
	email, _ := r.signedIn()
	r.keycloakAdmin("PUT", "/users/"+r.keycloakID(email), body{"email": "new-" + email, "emailVerified": false}, nil)
	r.command("jobs")
	email = "new-" + email
	r.is(email, "active, not confirmed")
	r.wants(r.do(forgetting(email)), 202, "")
	r.command("jobs")
	if n := len(r.mail.To(email)); n != 0 {
		r.Errorf("%d mails to an address that nobody has proven", n)
	}
	admin, path := r.signsIn(r.administrator()), "/"+r.userOf(email)
	r.wants(r.do(managing(admin, "PATCH", path, body{"role": "operator", "network_id": "N1", "station_id": "S1"})),
		409, "address-unproven")
	r.wants(r.do(managing(admin, "DELETE", path+"/sessions", nil)), 204, "")
	r.wants(r.do(managing(admin, "DELETE", path, nil)), 204, "")
	r.wants(r.do(managing(admin, "POST", path+"/restore", nil)), 200, "")
	r.keycloakAdmin("PUT", "/users/"+r.keycloakID(email), body{"emailVerified": true}, nil)
	r.command("jobs")
	r.is(email, "active")
}

// endedRegistration puts users of Keycloak back whose registration was cancelled.
func (r *rules) endedRegistration() {
	email := newEmail()
	l := registered(r.env, email)
	ku := r.fromKeycloak(r.keycloakID(email))
	r.wants(r.do(cancelling(l)), 200, "")
	delete(ku, "id")
	r.keycloakAdmin("POST", "/users", ku, nil) // as a restored Keycloak has it
	r.finds(nil, map[difference]int{diffUnknown: 1})
	r.command("jobs") // its task deletes it
	r.is(email, "none")
	if left := r.inKeycloak(email); len(left) > 0 {
		r.Errorf("in Keycloak %v is left", left)
	}
	maps.Copy(ku, body{"emailVerified": true, "enabled": true, "requiredActions": []string{}})
	r.keycloakAdmin("POST", "/users", ku, nil)
	r.finds(nil, map[difference]int{diffUnknown: 1}) // and an account is never deleted
	r.is(email, "active")
	r.keycloakAdmin("DELETE", "/users/"+r.keycloakID(email), nil, nil)
	r.exec(`delete from users where email = $1`, email)
}

func (r *rules) refreshTells() {
	email, a := r.signedIn()
	r.edits(r.keycloakID(email), body{attrRoles: []string{roleAdmin}, attrNetworkID: []string{"NET-1"}})
	a = r.refreshed(a)
	if claims := unpacked(a.text("access_token"), 1); fmt.Sprintf("%v %v", claims["roles"],
		claims["network_id"]) != "[user] X" {
		r.Errorf("the token says %v", claims)
	}
	r.wants(r.do(bearing(validatePath, r.refreshed(a).text("access_token"))), 200, "")
}

func (r *rules) parallelImport() {
	for range 4 {
		email := r.createsUser(nil)
		for _, a := range r.patient([]string{r.url, r.other}, slices.Repeat([]call{signingIn(email, password)}, 3)...) {
			r.wants(a, 200, "")
		}
	}
}

// parallelOverwrite: what Keycloak had is overwritten and audited once.
func (r *rules) parallelOverwrite() {
	for range 4 {
		email := newEmail()
		r.account(email)
		r.edits(r.keycloakID(email), body{attrRoles: []string{roleAdmin}, attrNetworkID: []string{"NET-1"}})
		pushed := r.kc.count("push_user")
		for _, a := range r.patient([]string{r.url, r.other}, slices.Repeat([]call{signingIn(email, password)}, 3)...) {
			r.wants(a, 200, "")
			if claims := unpacked(a.text("access_token"), 1); fmt.Sprintf("%v %v", claims["roles"],
				claims["network_id"]) != "[user] X" {
				r.Errorf("the token says %v", claims)
			}
		}
		if pushed = r.kc.count("push_user") - pushed; pushed != 1 {
			r.Errorf("Keycloak was written %d times", pushed)
		}
		if got := r.value(`select count(*)::text from audit_log where action = 'user.overwrite' and target = $1`,
			r.userOf(email)); got != "1" {
			r.Errorf("audited %s times", got)
		}
	}
}

func (r *rules) changeDuringPass() {
	email := newEmail()
	l := registered(r.env, email)
	there, release := r.kc.holdAt("^list_users ", true)
	ended := make(chan string)
	go func() {
		found, _, out, err := r.sync(nil, "-dry-run")
		ended <- fmt.Sprint(len(found), err, out)
	}()
	<-there
	r.wants(r.do(verifying(l)), 200, "")
	release()
	if got := <-ended; !strings.HasPrefix(got, "0 <nil>") {
		r.Error(got)
	}
}

func (r *rules) addressesMove() {
	var ids, emails []string
	for range 4 {
		_, _, id := r.member()
		ids, emails = append(ids, id), append(emails, newEmail())
	}
	becomes := func(who int, email string) { r.keycloakAdmin("PUT", "/users/"+ids[who], body{"email": email}, nil) }
	for who := range 3 {
		becomes(who, emails[who+1])
	}
	r.command("jobs")
	for who := range 3 {
		becomes(3-who, newEmail()) // looked at first, when the address is not free in PostgreSQL
	}
	for who := range 4 {
		becomes(who, emails[who])
	}
	r.eventually("all have their addresses back", time.Minute, func() bool { // a conflict is tried again
		r.command("jobs")
		return r.value(`select string_agg(email, ' ' order by created_at) from users where keycloak_id = any($1)`,
			ids) == strings.Join(emails, " ")
	})
}

func (r *rules) registrationLocked() {
	email := newEmail()
	registered(r.env, email)
	id := r.registrationOf(email)
	r.exec(`update tasks set locked_by = 'another', locked_until = 'infinity' where task_id = $1`, id)
	r.keycloakAdmin("DELETE", "/users/"+r.keycloakID(email), nil, nil)
	r.command("jobs")
	r.is(email, "active, not confirmed")
	r.exec(`update tasks set locked_by = null, locked_until = null, due_at = now() where task_id = $1`, id)
	r.command("jobs")
	r.is(email, "none")
}

// TestSyncSignIn: whoever signs in and is known to Keycloak only gets the right claims at once.
func TestSyncSignIn(t *testing.T) {
	t.Parallel() // it waits for Keycloak most of the time
	r := &rules{env: newEnv(t, map[string]string{"JOB_INTERVAL": "0", "CORS_ALLOWED_ORIGINS": app,
		"PUBLIC_URL": "http://localhost:3000"})}
	r.command("jobs") // from now on
	r.Run("by password", r.importedByPassword)
	r.Run("by the code flow", r.importedByCodeFlow)
	r.Run("an edited role", r.editedRole)
	r.Run("a new address, confirmed before the sign-in", r.newAddress)
	r.Run("what fails leaves no session", r.failedImport)
	r.Run("a taken address", r.takenAddress)
	r.Run("disabled", func() {
		r.wants(r.login(r.createsUser(body{"enabled": false}), password), 403, "account-disabled")
	})
	r.Run("disabled meanwhile", r.disabledMeanwhile)
	r.Run("deleted meanwhile", r.deletedMeanwhile)
	r.Run("what Keycloak itself would refuse", r.refusedByProfile)
	r.Run("ids and a locale that are none of ours", r.foreignAttributes)
	r.Run("a name that is too long", r.longName)
}

// says fails unless tokens say what a user is that was imported or has never been changed.
func (r *rules) says(email string, a answer) {
	r.Helper()
	claims := unpacked(a.text("access_token"), 1)
	want := body{"user_id": r.userOf(email), "roles": []any{roleUser}, "network_id": noScope, "station_id": noScope}
	for name, value := range want {
		if diff := cmp.Diff(value, claims[name]); diff != "" {
			r.Errorf("%s: %s", name, diff)
		}
	}
	r.wants(r.do(bearing(validatePath, a.text("access_token"))), 200, "")
}

// seemsAdmin is a user whom Keycloak has as an administrator.
var seemsAdmin = body{"attributes": body{attrRoles: []string{roleAdmin}}}

func (r *rules) importedByPassword() {
	email := r.createsUser(seemsAdmin)
	a := r.signsIn(email)
	r.says(email, a)
	r.says(email, r.refreshed(a))
}

func (r *rules) importedByCodeFlow() {
	email := r.createsUser(seemsAdmin)
	p := r.person()
	p.isBack(p.comesBack(p.signsIn(p.begins(app), email)), app)
	a := p.asks("refresh")
	r.wants(a, 200, "")
	r.says(email, a)
}

func (r *rules) editedRole() {
	email := newEmail()
	r.account(email)
	r.edits(r.keycloakID(email), body{attrRoles: []string{roleAdmin}, attrNetworkID: []string{"NET-1"}})
	r.says(email, r.signsIn(email))
}

func (r *rules) newAddress() {
	email := newEmail()
	r.account(email)
	id := r.keycloakID(email)
	r.keycloakAdmin("PUT", "/users/"+id, body{"email": "new-" + email, "emailVerified": false}, nil)
	r.command("jobs")
	r.is("new-"+email, "active, not confirmed")
	r.keycloakAdmin("PUT", "/users/"+id, body{"emailVerified": true}, nil)
	r.signsIn("new-" + email)
	r.is("new-"+email, "active")
}

func (r *rules) failedImport() {
	email := r.createsUser(seemsAdmin)
	r.kc.on("^refresh ", lost)
	r.wants(r.login(email, password), 503, "unavailable")
	r.kc.on("^refresh ", 0)
	r.says(email, r.signsIn(email))
}

func (r *rules) takenAddress() {
	email, other := r.createsUser(seemsAdmin), newEmail()
	r.account(other)
	r.exec(`update users set email = $1 where email = $2`, email, other)
	r.wants(r.login(email, password), 403, "account-setup-required")
	p := r.person()
	p.isTold(p.comesBack(p.signsIn(p.begins(app), email)), 403, "Account setup required",
		"This account does not fit in here: another one may have its e-mail address or username. Please ask an administrator.",
		"/auth/login?return_to="+url.QueryEscape(app))
	r.exec(`update users set email = $1 where email = $2`, other, email)
	r.says(email, r.signsIn(email))
}

// signsInDuring has something done while a sign-in looks at Keycloak's user.
func (r *rules) signsInDuring(email string, do func()) answer {
	r.Helper()
	there, release := r.kc.holdAt("^get_user ", false)
	got := make(chan answer)
	go func() { got <- r.login(email, password) }()
	<-there
	do()
	release()
	return <-got
}

func (r *rules) disabledMeanwhile() {
	email := newEmail()
	r.account(email)
	id := r.keycloakID(email)
	r.edits(id, body{attrRoles: []string{roleAdmin}})
	a := r.signsInDuring(email, func() { r.keycloakAdmin("PUT", "/users/"+id, body{"enabled": false}, nil) })
	r.wants(a, 403, "account-disabled")
	if got := r.value(`select actor from audit_log where action = 'user.sync' and target = $1`,
		r.userOf(email)); got != "system:sync" {
		r.Errorf("it is audited as done by %s", got)
	}
}

func (r *rules) deletedMeanwhile() {
	email := r.createsUser(seemsAdmin)
	id := r.inKeycloak(email)[0]
	a := r.signsInDuring(email, func() { r.keycloakAdmin("DELETE", "/users/"+id, nil, nil) })
	r.wants(a, 403, "account-setup-required")
}

// imports has a user imported in Keycloak, which then does not look into it.
func (r *rules) imports(change body) (email string) {
	r.Helper()
	email = newEmail()
	u := body{"username": email, "email": email, "enabled": true, "emailVerified": true,
		"credentials": []body{{"type": "password", "value": password, "temporary": false}}}
	maps.Copy(u, change)
	r.keycloakAdmin("POST", "/partialImport", body{"ifResourceExists": "FAIL", "users": []body{u}}, nil)
	return email
}

func (r *rules) refusedByProfile() {
	email := r.imports(body{"firstName": "<Ada>"})
	for range 2 {
		r.wants(r.login(email, password), 403, "account-setup-required")
	}
	r.keycloakAdmin("PUT", "/users/"+r.inKeycloak(email)[0], body{"firstName": "Ada"}, nil)
	r.says(email, r.signsIn(email))
}

func (r *rules) foreignAttributes() {
	locale := []string{"de-Latn-DE-1996-x-some"}
	email := r.imports(body{"attributes": body{attrLocale: locale, attrUserID: []string{"7"},
		attrRegistrationID: []string{"7"}}})
	r.says(email, r.signsIn(email))
	r.edits(r.keycloakID(email), body{attrRegistrationID: []string{}})
	email = r.imports(body{"attributes": body{attrLocale: locale,
		attrRegistrationID: []string{string(newRegistrationID())}}})
	r.says(email, r.signsIn(email))
}

func (r *rules) longName() {
	email := r.imports(body{"firstName": strings.Repeat("Ä", 101)})
	r.wants(r.login(email, password), 403, "account-setup-required")
	if found, _, out, err := r.sync(nil); !errors.Is(err, errDiffer) || found[diffConflict] != 1 {
		r.Errorf("%v: %s", err, out)
	}
	r.keycloakAdmin("PUT", "/users/"+r.inKeycloak(email)[0], body{"firstName": strings.Repeat("Ä", 100)}, nil)
	r.says(email, r.signsIn(email))
}
