package main

import (
	"encoding/json"
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type body = map[string]any

// attempt is one line of a table of requests.
type attempt struct {
	name   string
	path   string
	body   body
	status int
	slug   string
}

// try sends a table of requests, in order.
func (w *env) try(list ...attempt) {
	w.Helper()
	for _, r := range list {
		w.Run(r.name, func() { w.wants(w.post(r.path, r.body), r.status, r.slug) })
	}
}

// value is the one text that a query returns.
func (w *env) value(sql string, args ...any) (text string) {
	w.Helper()
	if err := w.pool.QueryRow(w.Context(), sql, args...).Scan(&text); err != nil {
		w.Fatal(err)
	}
	return text
}

// due makes a task due, which stands in for waiting until it is.
func (w *env) due(id string) {
	w.Helper()
	w.exec(`update tasks set due_at = now() where task_id = $1`, id)
}

// minuteLater lets the cooldown of an address be over.
func (w *env) minuteLater(email string) {
	w.exec(`update rate_limits set resets_at = now() where key = $1`, mailsOfCooldown.of(mailbox(email)).Key)
}

const (
	registerPath, verifyPath = "/api/v1/register", "/api/v1/register/verify"
	resendPath, cancelPath   = "/api/v1/register/resend", "/api/v1/register/cancel"
	loginPath                = "/api/v1/auth/login"
)

func TestRegister(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	username := "ada-" + email[:8]
	a := w.post(registerPath, body{"email": email, "username": username, "first_name": "Ada", "last_name": "Lovelace",
		"phone": "+4930123456", "locale": "en"})
	w.wants(a, 201, "")
	id := a.text("registration_id")
	if a.Header.Get("Location") != "/api/v1/registrations/"+id || !regexp.MustCompile(`^REG-[A-Za-z0-9_-]{16}$`).MatchString(id) {
		t.Errorf("Location %q, id %q", a.Header.Get("Location"), id)
	}
	for name, d := range map[string]time.Duration{"expires_at": 24 * time.Hour, "resend_available_at": time.Minute} {
		at, err := time.Parse(time.RFC3339, a.text(name))
		if off := time.Until(at) - d; err != nil || off.Abs() > 10*time.Second || !strings.HasSuffix(a.text(name), "Z") {
			t.Errorf("%s is %q", name, a.text(name))
		}
		delete(a.JSON, name)
	}
	if diff := cmp.Diff(body{"registration_id": id, "email": email, "username": username, "status": "pending_verification",
		"verification_email": "sent"}, a.JSON); diff != "" {
		t.Error(diff)
	}
	u := w.keycloakUsers()[id]
	l := w.readMail(email, 1)
	if diff := cmp.Diff(map[string][]string{"user_id": u.Attributes["user_id"], "roles": {"user"}, "network_id": {"X"}, "station_id": {"X"},
		"registration_id": {id}, "locale": {"en"}, "email_verify_url": {"http://localhost:3000/account/verify"},
		"email_verify_token": {l.Token}, "email_verify_code": {l.Code}}, u.Attributes); diff != "" || u.Enabled || u.EmailVerified || u.Username != email {
		t.Errorf("Keycloak's user: %s %+v", diff, u)
	}
	if got := w.value(`select concat_ws(' ', username, first_name, last_name, phone, role, source, network_id = '', station_id = '', is_verified)
		from users where email = $1`, email); got != email+" Ada Lovelace +4930123456 user web t t f" {
		t.Error(got)
	}
	rows := w.value(`select r::text || u::text from user_registrations r join users u using (user_id) where r.registration_id = $1`, id)
	for _, s := range []string{l.Token, l.Code} {
		if strings.Contains(rows, s) {
			t.Errorf("the database holds %q: %s", s, rows)
		}
	}
	w.wants(w.login(email, password), 403, "account-not-verified")
}

func TestVerify(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	username := "ada-" + email[:8]
	a := w.post(registerPath, body{"email": email, "username": username, "first_name": "Ada", "last_name": "Lovelace"})
	w.wants(a, 201, "")
	id, l := a.text("registration_id"), w.readMail(email, 1)
	a = w.post(verifyPath, body{"token": l.Token, "password": password})
	w.wants(a, 200, "")
	want := body{"registration_id": id, "user_id": w.userOf(email), "email": email, "username": username, "status": "active",
		"already_verified": false, "set_password_mailed": false}
	if diff := cmp.Diff(want, a.JSON); diff != "" {
		t.Error(diff)
	}
	// A second confirmation changes nothing, whatever it brings along.
	want["already_verified"] = true
	for _, again := range []body{{"token": l.Token}, {"email": email, "code": l.Code},
		{"token": l.Token, "password": "another password", "username": "another-" + email[:8], "first_name": "Eve", "phone": "+4930123456"}} {
		if diff := cmp.Diff(want, w.post(verifyPath, again).JSON); diff != "" {
			t.Error(diff)
		}
	}
	w.secrets.add("another password")
	if got := w.value(`select concat_ws(' ', username, first_name, last_name, phone, is_verified) from users where email = $1`, email); got != username+" Ada Lovelace t" {
		t.Error(got)
	}
	w.try(
		attempt{"another code, once verified", verifyPath, body{"email": email, "code": other(l.Code)}, 400, "invalid-code"},
		attempt{"resend, once verified", resendPath, body{"registration_id": id}, 409, "already-verified"},
		attempt{"cancel, once verified", cancelPath, body{"token": l.Token}, 409, "already-verified"},
		attempt{"another password", loginPath, body{"email": email, "password": "another password"}, 401, "invalid-credentials"},
		attempt{"sign in", loginPath, body{"username": username, "password": password}, 200, ""},
	)
}

// What is typed with the proof counts, and not what was typed before.
func TestVerifyCorrects(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	chosen := "chosen-" + email[:8]
	w.wants(w.post(registerPath, body{"email": email, "username": "typed-" + email[:8], "first_name": "Typo", "phone": "+4930000000"}), 201, "")
	l := w.readMail(email, 1)
	a := w.post(verifyPath, body{"token": l.Token, "password": password, "username": chosen, "first_name": "Grace", "last_name": "Hopper", "phone": "+4930123456"})
	w.wants(a, 200, "")
	if a.text("username") != chosen {
		t.Error(a)
	}
	if got := w.value(`select concat_ws(' ', username, first_name, last_name, phone) from users where email = $1`, email); got != chosen+" Grace Hopper +4930123456" {
		t.Error(got)
	}
	w.try(
		attempt{"the typed username", loginPath, body{"username": "typed-" + email[:8], "password": password}, 401, "invalid-credentials"},
		attempt{"the chosen username", loginPath, body{"username": chosen, "password": password}, 200, ""},
	)
}

// What Keycloak refuses at the confirmation changes nothing: the same token or code may be sent again.
func TestVerifyRefused(t *testing.T) {
	w := sharedEnv(t)
	taken := newEmail()
	w.account(taken)
	email := newEmail()
	username := "name-" + email[:8]
	w.wants(w.post(registerPath, body{"email": email, "username": username}), 201, "")
	l := w.readMail(email, 1)
	for _, c := range []struct {
		name   string
		in     body
		status int
		field  string
		detail string
	}{
		{"short password", body{"password": "sh0rt-7"}, 400, "password", "must have at least 10 characters"},
		{"password is the username", body{"password": username}, 400, "password", "must not be equal to the username"},
		{"password is the address", body{"password": email}, 400, "password", "must not be equal to the email"},
		{"homograph", body{"password": password, "username": "\u0430dmin-x"}, 400, "username", "has a character that is not allowed: \u0430"},
		{"another's address", body{"password": password, "username": taken}, 400, "username", "must not be another e-mail address"},
		{"wrong name", body{"password": password, "first_name": "<b>"}, 400, "first_name", "has a character that is not allowed: <"},
	} {
		c.in["token"] = l.Token
		a := w.post(verifyPath, c.in)
		w.Log(c.name)
		w.wants(a, c.status, "invalid-request")
		if diff := cmp.Diff([]any{body{"field": c.field, "detail": c.detail}}, a.JSON["errors"]); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
	holder := newEmail()
	w.wants(w.post(registerPath, body{"email": holder, "username": "held-" + email[:8]}), 201, "")
	w.wants(w.post(verifyPath, body{"token": w.readMail(holder, 1).Token, "password": password}), 200, "")
	w.wants(w.post(verifyPath, body{"token": l.Token, "password": password, "username": "held-" + email[:8]}), 409, "user-exists")
	u := w.keycloakUsers()[w.value(`select registration_id from user_registrations where email = $1`, email)]
	if u.Enabled || u.EmailVerified || u.Username != email {
		t.Errorf("Keycloak's user has changed: %+v", u)
	}
	w.try(
		attempt{"signing in", loginPath, body{"email": email, "password": password}, 403, "account-not-verified"},
		attempt{"by code", verifyPath, body{"email": email, "code": l.Code, "password": password}, 200, ""},
		attempt{"signing in", loginPath, body{"username": username, "password": password}, 200, ""},
	)
}

// Without a password the account is active all the same, and Keycloak mails its own link.
func TestVerifyWithoutPassword(t *testing.T) {
	w := sharedEnv(t)
	for _, how := range []string{"link", "code"} {
		email := newEmail()
		w.register(email)
		l := w.readMail(email, 1)
		in := body{"token": l.Token}
		if how == "code" {
			in = body{"email": email, "code": l.Code}
		}
		a := w.post(verifyPath, in)
		w.wants(a, 200, "")
		if a.JSON["set_password_mailed"] != true {
			t.Error(a)
		}
		w.eventually("a mail with Keycloak's own link", time.Minute, func() bool { return len(w.mail.To(email)) == 2 })
		m := w.mail.To(email)[1]
		page := regexp.MustCompile(`https?://\S+/login-actions/action-token\?key=[^\s"<>]+`).FindString(m.Text)
		if page == "" || strings.Contains(m.Text, l.Token) {
			t.Fatal(m.Text)
		}
		if resp, err := client.Get(page); err != nil || resp.StatusCode >= 400 {
			t.Errorf("Keycloak's page: %v %v", resp, err)
		}
		w.wants(w.login(email, password), 401, "invalid-credentials") // there is no password yet
	}
}

// Every path of the table of routes does the same as its first one.
func TestAliases(t *testing.T) {
	w := sharedEnv(t)
	for _, path := range []string{"/register", "/api/v1/auth/register"} {
		w.wants(w.post(path, body{"email": newEmail()}), 201, "")
	}
	email := newEmail()
	id := w.register(email).text("registration_id")
	w.try(
		attempt{"resend", "/verify/resend", body{"registration_id": id}, 429, "resend-too-soon"},
		attempt{"verify", "/verify", body{"token": w.readMail(email, 1).Token, "password": password}, 200, ""},
		attempt{"login", "/auth/login", body{"email": email, "password": password}, 200, ""},
	)
}

const noPhone = "is not a valid phone number; write it with the country code, like +4930123456"

func TestRegisterFields(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, c := range []struct {
		field  string
		detail string // "" = accepted
		values []string
	}{
		{"email", "is required", []string{""}},
		{"email", "", []string{"a@b.cd", "o'neil+news@mail.example.test", "ada@münchen.example", "A@B.CD", " a@b.cd\n"}},
		{"email", "is not a valid e-mail address", []string{"ada", "ada@", "@b.cd", "ada@localhost", "a b@c.de", "Ada <a@b.cd>", "a@b.cd,c@d.ef", "ä@b.cd",
			"a@b..cd", "a@b.cd.", "a@[127.0.0.1]", `"a b"@c.de`, "a@b.cd\r\nBcc: x@y.zz", "a@b_c.de", "a＠b.cd", "a@b@c.de", long[:65] + "@b.cd"}},
		{"email", "must have at most 255 characters", []string{long + long}},
		{"username", "", []string{"ada", "Ada.L_1-2", "ädä", long[:100]}},
		{"username", "must have at least 3 characters", []string{"ab", "ä1"}},
		{"username", "must have at most 100 characters", []string{long[:101]}},
		{"username", "has a character that is not allowed: a blank", []string{"a b c"}},
		{"username", "has a character that is not allowed: <", []string{"<script>", "x<>&"}},
		{"username", "has a character that is not allowed: U+0000", []string{"a\u0000b"}},
		{"username", "has a character that is not allowed: U+0009", []string{"a\tb"}},
		{"username", "has a character that is not allowed: /", []string{"a/../b"}},
		{"username", "has a character that is not allowed: {", []string{"{ada}"}},
		{"username", "has a character that is not allowed: U+200B", []string{"ada\u200bm"}},
		{"username", "has a character that is not allowed: а", []string{"аdmin-x"}}, // Cyrillic
		{"first_name", "", []string{"Ada", "Anne-Marie d'Arc, Jr.", "Jean-Luc", "María", "李", " Ada ", long[:100]}},
		{"first_name", "must have at most 100 characters", []string{long[:101]}},
		{"first_name", "has a character that is not allowed: <", []string{"<b>"}},
		{"first_name", "has a character that is not allowed: (", []string{"María (Maja)"}},
		{"first_name", "has a character that is not allowed: &", []string{"Anne & Marie"}},
		{"first_name", "has a character that is not allowed: U+000A", []string{"a\nb"}},
		{"first_name", "has a character that is not allowed: $", []string{"${x}"}},
		{"first_name", "has a character that is not allowed: U+0000", []string{"a\u0000"}},
		{"first_name", "has a character that is not allowed: U+202E", []string{"Ada\u202exe"}},
		{"last_name", "", []string{"Lovelace", "O’Neil"}},
		{"last_name", "must have at most 100 characters", []string{long[:101]}},
		{"last_name", "has a character that is not allowed: U+0085", []string{"a\u0085b"}},
		{"last_name", "has a character that is not allowed: U+2028", []string{"a\u2028b"}},
		{"phone", "", []string{"+4930123456", "+123456789012345", "+49 30 123456", "+49 (0)30/123-456", "+39 (06) 1234.567", "+49\u00a030\u2011123456\n"}},
		{"phone", noPhone, []string{"030123456", "+0123456789", "+123456", "+1234567890123456", "(0)30 123456", "0049 30 123456", "+"}},
		{"phone", "has a character that is not allowed: x", []string{"+4930123456 x7", "+49x30"}},
		{"phone", "has a character that is not allowed: +", []string{"+49+30123456"}},
		{"phone", "has a character that is not allowed: ٣", []string{"+49٣0123456"}},
		{"password", "is chosen with the confirmation, not with the registration", []string{"x", password}},
		{"locale", "", []string{"de", "de-AT", "de_DE", "zh-Hant-TW"}},
		{"locale", "is not a language tag, like de or en", []string{"german", "d", "../de", "de__AT", "de_AT.UTF-8"}},
		{"locale", "must have at most 20 characters", []string{"de-" + long[:18]}},
	} {
		for _, value := range c.values {
			encoded, err := json.Marshal(body{"email": "a@b.cd", c.field: value})
			if err != nil {
				t.Fatal(err)
			}
			var in registerIn
			var got, want []fieldError
			if err := readJSON(encoded, &in); err != nil {
				got = asProblem(err).Errors
			}
			if c.detail != "" {
				want = []fieldError{{c.field, c.detail}}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s %q (-want +got):\n%s", c.field, value, diff)
			}
		}
	}
}

func TestRegisterRefused(t *testing.T) {
	w := sharedEnv(t)
	taken := newEmail()
	w.account(taken)
	for _, c := range []struct {
		name string
		body body
		want map[string]string
	}{
		{"every field", body{"email": "no-address", "username": "x!", "first_name": "<script>", "last_name": strings.Repeat("L", 101), "phone": "030-1234",
			"password": password, "locale": "english!", "role": "chief-admin"},
			map[string]string{"email": "is not a valid e-mail address", "username": "must have at least 3 characters",
				"first_name": "has a character that is not allowed: <", "last_name": "must have at most 100 characters",
				"phone": noPhone, "password": "is chosen with the confirmation, not with the registration",
				"locale": "is not a language tag, like de or en", "role": "is not known"}},
		{"wrong types", body{"email": 77777, "username": true, "phone": []string{"+49301234567"}},
			map[string]string{"email": "must be a string", "username": "must be a string", "phone": "must be a string"}},
		{"nothing", body{}, map[string]string{"email": "is required"}},
		{"null", body{"email": nil, "phone": nil}, map[string]string{"email": "must be a string", "phone": "must be a string"}},
		{"another's address as username", body{"email": newEmail(), "username": taken}, map[string]string{"username": "must not be another e-mail address"}},
		{"domain", body{"email": "ada@exa_mple.com"}, map[string]string{"email": "is not a valid e-mail address"}},
	} {
		a := w.post(registerPath, c.body)
		w.Log(c.name)
		w.wants(a, 400, "invalid-request")
		got := map[string]string{}
		for _, e := range a.JSON["errors"].([]any) {
			got[e.(body)["field"].(string)] = e.(body)["detail"].(string)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		for field, value := range c.body {
			encoded, _ := json.Marshal(value)
			if text := strings.Trim(string(encoded), `[]"`); len(text) > 4 && strings.Contains(string(a.Body), text) {
				t.Errorf("%s: the answer quotes %s: %s", c.name, field, a.Body)
			}
		}
	}
}

func TestDuplicates(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // sync would not leave one store with a user of its own
	names := map[string]string{}
	for _, where := range []string{"both", "keycloak", "postgresql"} {
		names[where] = where + "-" + newEmail()[:8]
	}
	address := func(where string) string { return names[where] + "@example.test" }
	w.wants(w.post(registerPath, body{"email": address("both"), "username": names["both"]}), 201, "")
	w.confirms(w.readMail(address("both"), 1))
	w.keycloakAdmin("POST", "/users", body{"email": address("keycloak"), "username": names["keycloak"], "enabled": true}, nil)
	w.exec(`insert into users (user_id, keycloak_id, email, username, source) values ($1, $1, $2, $3, 'internal')`,
		"USR-"+names["postgresql"], address("postgresql"), names["postgresql"])
	defer w.exec(`delete from users where user_id = $1`, "USR-"+names["postgresql"]) // Keycloak has no such user
	for where, name := range names {
		w.try(
			attempt{where + ": address", registerPath, body{"email": address(where)}, 409, "user-exists"},
			attempt{where + ": ADDRESS", registerPath, body{"email": strings.ToUpper(address(where)), "username": "free-" + name}, 409, "user-exists"},
			attempt{where + ": username", registerPath, body{"email": newEmail(), "username": name}, 409, "user-exists"},
			attempt{where + ": USERNAME", registerPath, body{"email": newEmail(), "username": strings.ToUpper(name)}, 409, "user-exists"},
		)
	}
	w.wants(w.post(registerPath, body{"email": address("both"), "username": names["postgresql"]}), 409, "user-exists") // of two
	if a, b := w.inKeycloak(address("keycloak")), w.inKeycloak(address("both")); len(a) != 1 || len(b) != 1 {
		t.Errorf("who was there has lost the account in Keycloak: %v %v", a, b)
	}
	// A username is reserved by the confirmation, not before: the second to confirm chooses another.
	first, second, username := newEmail(), newEmail(), "wanted-"+names["both"]
	for _, email := range []string{first, second} {
		w.wants(w.post(registerPath, body{"email": email, "username": username}), 201, "")
	}
	w.confirms(w.readMail(second, 1))
	token := w.readMail(first, 1).Token
	w.try(
		attempt{"taken meanwhile", verifyPath, body{"token": token, "password": password}, 409, "user-exists"},
		attempt{"another one", verifyPath, body{"token": token, "password": password, "username": "other-" + names["both"]}, 200, ""},
		attempt{"first", loginPath, body{"username": "other-" + names["both"], "password": password}, 200, ""},
		attempt{"second", loginPath, body{"username": username, "password": password}, 200, ""},
	)
}

// Registering again goes on with the same registration, and changes nothing of it (S1, P5).
func TestRegisterAgain(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	first := w.post(registerPath, body{"email": email, "username": "owner-" + email[:6], "first_name": "Ada"})
	w.wants(first, 201, "")
	l := w.readMail(email, 1)
	second := w.post(registerPath, body{"email": strings.ToUpper(email), "username": "stranger-" + email[:6], "first_name": "Eve", "phone": "+4930123456"})
	w.wants(second, 201, "")
	if diff := cmp.Diff(first.JSON, second.JSON); diff != "" {
		t.Errorf("within the cooldown, -first +second:\n%s", diff)
	}
	if n := len(w.mail.To(email)); n != 1 {
		t.Errorf("%d mails", n)
	}
	w.minuteLater(email)
	third := w.post(registerPath, body{"email": email, "username": "stranger-" + email[:6]})
	w.wants(third, 201, "")
	if third.text("registration_id") != first.text("registration_id") {
		t.Error("after the cooldown the registration is another")
	}
	if again := w.readMail(email, 2); again.Token != l.Token || again.Code == l.Code {
		t.Errorf("after the cooldown the mail has %v, the first had %v", again, l)
	}
	if got := w.value(`select concat_ws(' ', username, first_name, phone) from user_registrations where email = $1`, email); got != "owner-"+email[:6]+" Ada" {
		t.Error(got)
	}
	w.confirms(l)
	w.try(
		attempt{"the owner", loginPath, body{"username": "owner-" + email[:6], "password": password}, 200, ""},
		attempt{"the stranger", loginPath, body{"username": "stranger-" + email[:6], "password": password}, 401, "invalid-credentials"},
	)
}

// Whoever registers somebody else's address has nothing of the account that this person confirms (S1).
func TestStrangersRegistration(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	w.wants(w.post(registerPath, body{"email": email, "username": "mine-" + email[:6]}), 201, "")
	w.wants(w.post(registerPath, body{"email": email, "password": "a stranger's password"}), 400, "invalid-request")
	w.secrets.add("a stranger's password")
	w.wants(w.post(registerPath, body{"email": email}), 201, "") // the owner's, or so the owner thinks
	w.confirms(w.readMail(email, 1))
	w.wants(w.login(email, "a stranger's password"), 401, "invalid-credentials")
	w.wants(w.login(email, password), 200, "")
}

func TestDefaultUsername(t *testing.T) {
	w := sharedEnv(t)
	id := newEmail()[:12]
	for _, c := range []struct{ email, username string }{
		{id + "@example.test", id + "@example.test"},
		{"CAPS." + id + "@Example.test", "CAPS." + id + "@example.test"},
		{"o'neil-" + id + "@example.test", "USR-"}, // Keycloak has no ' in usernames
		{id + "@" + strings.Repeat("a.", 60) + "test", "USR-"},
		{id + "@" + strings.Repeat("a.", (100-12-1-4)/2) + "xtest", id + "@" + strings.Repeat("a.", (100-12-1-4)/2) + "xtest"}, // 100 characters
	} {
		a := w.register(c.email)
		if got := a.text("username"); got != c.username && !(c.username == "USR-" && regexp.MustCompile(`^USR-[\w-]{16}$`).MatchString(got)) {
			t.Errorf("%s has username %s", c.email, got)
		}
		w.try(
			attempt{c.email, verifyPath, body{"token": w.readMail(c.email, 1).Token, "password": password}, 200, ""},
			attempt{c.email, loginPath, body{"email": strings.ToUpper(c.email), "password": password}, 200, ""},
			attempt{c.email, loginPath, body{"username": a.text("username"), "password": password}, 200, ""},
		)
	}
}

func TestMailLanguage(t *testing.T) {
	w := sharedEnv(t)
	const english, german = "Confirm your e-mail address", "Bitte bestätigen Sie Ihre E-Mail-Adresse"
	for _, c := range []struct{ locale, header, subject, text string }{
		{"", "", english, "Someone registered"},
		{"de", "", german, "Jemand hat sich"},
		{"de-AT", "en", german, "Jemand hat sich"},
		{"en-GB", "de", english, "Someone registered"},
		{"", "de-CH,en;q=0.5", german, "Jemand hat sich"},
		{"fr", "", "Confirmez votre adresse e-mail", "Quelqu’un s’est inscrit"},
		{"sv", "", english, "Someone registered"},
		{"", "*;q=x,,;", english, "Someone registered"},
	} {
		email := newEmail()
		w.wants(w.do(call{method: "POST", path: registerPath, json: withLocale(body{"email": email}, c.locale),
			header: map[string]string{"Accept-Language": c.header}}), 201, "")
		l := w.readMail(email, 1)
		m := w.mail.To(email)[0]
		if m.Subject != c.subject || !strings.Contains(m.Text, c.text) || !strings.Contains(m.HTML, c.text) {
			t.Errorf("%+v: %s\n%s", c, m.Subject, m.Text)
		}
		cancel := strings.Replace(l.URL, "/account/verify", "/account/cancel", 1)
		for part, text := range map[string]string{"text": m.Text, "html": m.HTML} {
			if !strings.Contains(text, l.URL) || !strings.Contains(text, l.Code) || !strings.Contains(text, cancel) || strings.Contains(text, "login-actions") {
				t.Errorf("%+v: the %s part lacks something:\n%s", c, part, text)
			}
		}
	}
}

func TestCodes(t *testing.T) {
	w := sharedEnv(t)
	email, unknown := newEmail(), newEmail()
	id := w.register(email).text("registration_id")
	l := w.readMail(email, 1)
	// Unknown address and wrong code are answered alike, to the last header, as long as one likes.
	for i := range codesTried.N + 2 {
		var answers [2]answer
		for n, address := range []string{email, unknown} {
			a := w.post(verifyPath, body{"email": address, "code": other(l.Code)})
			if i < codesTried.N {
				w.wants(a, 400, "invalid-code")
			} else {
				w.wants(a, 429, "too-many-attempts")
			}
			delete(a.JSON, "request_id")
			a.Header.Del("X-Request-Id")
			a.Header.Del("Date")
			answers[n] = answer{Status: a.Status, Header: a.Header, JSON: a.JSON}
		}
		if diff := cmp.Diff(answers[0], answers[1]); diff != "" {
			t.Errorf("attempt %d: known and unknown differ:\n%s", i+1, diff)
		}
	}
	w.wants(w.post(verifyPath, body{"email": email, "code": l.Code}), 429, "too-many-attempts")
	w.wants(w.post(verifyPath, body{"token": newToken()}), 400, "invalid-token")
	w.wants(w.post(verifyPath, body{"email": email, "code": l.Code}), 429, "too-many-attempts")
	w.minuteLater(email)
	w.wants(w.post(resendPath, body{"registration_id": id}), 200, "")
	next := w.readMail(email, 2)
	if next.Token != l.Token || next.Code == l.Code {
		t.Errorf("a new mail has the same link and a new code: %v, %v", l, next)
	}
	w.try(
		attempt{"earlier code", verifyPath, body{"email": email, "code": l.Code}, 400, "invalid-code"},
		attempt{"new code", verifyPath, body{"email": strings.ToUpper(email), "code": next.Code}, 200, ""},
	)
	// The link works when the attempts are used up.
	email = newEmail()
	w.register(email)
	l = w.readMail(email, 1)
	w.usesUp(codesTried.of(email))
	w.try(
		attempt{"code", verifyPath, body{"email": email, "code": l.Code}, 429, "too-many-attempts"},
		attempt{"link", verifyPath, body{"token": l.Token}, 200, ""},
	)
}

func TestBodiesOfTheOthers(t *testing.T) {
	w := sharedEnv(t)
	email, id := newEmail(), string(newRegistrationID())
	for path, bodies := range map[string][]body{
		verifyPath: {{}, {"email": email}, {"code": "123456"}, {"token": "t", "email": email, "code": "123456"}, {"email": email, "code": "12345"},
			{"email": email, "code": "12345a"}, {"email": email, "code": 123456}, {"email": "x", "code": "123456"}, {"token": strings.Repeat("t", 101)},
			{"token": "t\u0000"}, {"token": "t", "key": "a b"}, {"token": "t", "password": strings.Repeat("p", 129)}},
		resendPath: {{}, {"email": email, "registration_id": id}, {"registration_id": "REG-x"}, {"registration_id": "USR" + id[3:]}, {"email": "x"}},
		cancelPath: {{}, {"token": ""}, {"token": 1}, {"token": "t\u0000"}, {"token": "t", "registration_id": id}},
		loginPath: {{}, {"email": email}, {"password": password}, {"email": email, "username": "ada", "password": password},
			{"email": email, "password": ""}, {"username": "a\u0000b", "password": password}, {"email": email, "password": strings.Repeat("p", 129)}},
	} {
		for _, b := range bodies {
			w.Log(path, b)
			a := w.post(path, b)
			w.wants(a, 400, "invalid-request")
			if errs, _ := a.JSON["errors"].([]any); len(errs) != 1 && len(b) > 0 {
				t.Errorf("%s %v: %s", path, b, a.Body)
			}
		}
	}
	w.try(
		attempt{"unknown token", verifyPath, body{"token": "p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx"}, 400, "invalid-token"},
		attempt{"unknown token", cancelPath, body{"token": "p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx"}, 400, "invalid-token"},
		attempt{"unknown id", resendPath, body{"registration_id": id}, 404, "registration-not-found"},
		attempt{"unknown address", resendPath, body{"email": email}, 200, ""},
	)
}

func TestExpiry(t *testing.T) {
	w := sharedEnv(t)
	for name, touch := range map[string]func(email, id string, l link){
		"by the link": func(_, _ string, l link) {
			w.wants(w.post(verifyPath, body{"token": l.Token}), 410, "verification-expired")
		},
		"by the code": func(email, _ string, l link) {
			w.wants(w.post(verifyPath, body{"email": email, "code": l.Code}), 410, "verification-expired")
		},
		"by resend": func(_, id string, _ link) {
			w.wants(w.post(resendPath, body{"registration_id": id}), 410, "verification-expired")
		},
		"by cancelling": func(_, _ string, l link) {
			w.wants(w.post(cancelPath, body{"token": l.Token}), 410, "verification-expired")
		},
		"by its task":   func(_, id string, _ link) { w.due(id) },
		"by signing in": func(email, _ string, _ link) { w.wants(w.login(email, password), 403, "account-not-verified") },
		"by a new one":  func(email, _ string, _ link) { w.register(email) },
	} {
		t.Log(name)
		email := newEmail()
		id := w.register(email).text("registration_id")
		l := w.readMail(email, 1)
		w.expire(email)
		if a := w.get("/api/v1/registrations/" + id); a.text("status") != "verification_expired" {
			t.Error(a)
		}
		touch(email, id, l)
		if name == "by signing in" {
			continue // changes nothing
		}
		w.eventually("expired and gone", time.Minute, func() bool {
			_, there := w.keycloakUsers()[id]
			return !there && w.value(`select status from user_registrations where registration_id = $1`, id) == "expired"
		})
		if got := w.value(`select concat(email, username, first_name, last_name, phone, ip_address, user_agent) from user_registrations where registration_id = $1`, id); got != "" {
			t.Errorf("personal data are left: %s", got)
		}
		w.try(
			attempt{"the link", verifyPath, body{"token": l.Token}, 410, "verification-expired"},
			attempt{"another mail", resendPath, body{"registration_id": id}, 410, "verification-expired"},
			attempt{"cancelling", cancelPath, body{"token": l.Token}, 410, "verification-expired"},
			attempt{"the code", verifyPath, body{"email": email, "code": l.Code}, 400, "invalid-code"},
		)
		if name != "by a new one" {
			w.try(
				attempt{"signing in", loginPath, body{"email": email, "password": password}, 401, "invalid-credentials"},
				attempt{"registering again", registerPath, body{"email": email}, 201, ""},
			)
		}
	}
}

func TestResend(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	id := w.register(email).text("registration_id")
	l := w.readMail(email, 1)
	codes := map[string]bool{l.Code: true}
	w.exec(`update user_registrations set expires_at = now() + interval '1 hour' where registration_id = $1`, id)
	for n := 2; n <= 5; n++ {
		a := w.post(resendPath, body{"registration_id": id})
		w.wants(a, 429, "resend-too-soon")
		if wait := a.Header.Get("Retry-After"); wait < "50" || wait > "60" {
			t.Errorf("Retry-After: %s", wait)
		}
		w.minuteLater(email)
		a = w.post(resendPath, body{"registration_id": id})
		w.wants(a, 200, "")
		for name, d := range map[string]time.Duration{"expires_at": 24 * time.Hour, "resend_available_at": time.Minute} {
			at, err := time.Parse(time.RFC3339, a.text(name))
			if off := time.Until(at) - d; err != nil || off.Abs() > 10*time.Second {
				t.Errorf("%s is %q", name, a.text(name))
			}
			delete(a.JSON, name)
		}
		if diff := cmp.Diff(body{"registration_id": id, "status": "pending_verification", "verification_email": "sent", "resend_count": float64(n - 1)}, a.JSON); diff != "" {
			t.Error(diff)
		}
		next := w.readMail(email, n)
		if next.URL != l.URL || codes[next.Code] {
			t.Errorf("mail %d has %v, the first had %v", n, next, l)
		}
		codes[next.Code] = true
	}
	w.minuteLater(email)
	w.try(
		attempt{"resend", resendPath, body{"registration_id": id}, 429, "resend-limit"},
		attempt{"register again", registerPath, body{"email": email}, 429, "resend-limit"},
		attempt{"the link still works", verifyPath, body{"token": l.Token, "password": password}, 200, ""},
	)
	if got := w.get("/api/v1/registrations/" + id); got.text("status") != "active" {
		t.Error(got)
	}
}

// Cancelling and registering again is no way around the day's limit.
func TestMailsADay(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	w.register(email)
	day := mailsADay.of(mailbox(email)).Key
	if hits := w.value(`select hits::text from rate_limits where key = $1`, day); hits != "1" {
		t.Errorf("%s mails counted", hits)
	}
	w.wants(w.post(cancelPath, body{"token": w.readMail(email, 1).Token}), 200, "")
	w.exec(`update rate_limits set hits = 10 where key = $1`, day)
	w.minuteLater(email)
	w.wants(w.post(registerPath, body{"email": email}), 429, "resend-limit")
}

// The answer to an address is the same whatever is known of it; its mail comes if it may (S18).
func TestResendByAddress(t *testing.T) {
	w := sharedEnv(t)
	account, waiting, unknown, invited := newEmail(), newEmail(), newEmail(), newEmail()
	w.account(account)
	w.register(invited) // within the cooldown
	w.register(waiting)
	l := w.readMail(waiting, 1)
	w.minuteLater(waiting)
	for _, email := range []string{account, strings.ToUpper(waiting), unknown, invited} {
		a := w.post(resendPath, body{"email": email})
		w.wants(a, 200, "")
		if diff := cmp.Diff(body{"status": "accepted"}, a.JSON); diff != "" {
			t.Errorf("%s: %s", email, diff)
		}
	}
	if again := w.readMail(waiting, 2); again.Token != l.Token || again.Code == l.Code {
		t.Errorf("the second mail has %v, the first had %v", again, l)
	}
	for email, n := range map[string]int{account: 1, unknown: 0, invited: 1} {
		if got := len(w.mail.To(email)); got != n {
			t.Errorf("%d mails, not %d", got, n)
		}
	}
}

func TestCancel(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	a := w.register(email)
	id, l := a.text("registration_id"), w.readMail(email, 1)
	for range 2 { // it stays cancelled
		if diff := cmp.Diff(body{"registration_id": id, "status": "cancelled"}, w.post(cancelPath, body{"token": l.Token}).JSON); diff != "" {
			t.Error(diff)
		}
	}
	if _, there := w.keycloakUsers()[id]; there {
		t.Error("Keycloak still has the user")
	}
	w.try(
		attempt{"the link", verifyPath, body{"token": l.Token}, 410, "verification-cancelled"},
		attempt{"the code", verifyPath, body{"email": email, "code": l.Code}, 400, "invalid-code"},
		attempt{"another mail", resendPath, body{"registration_id": id}, 404, "registration-not-found"},
		attempt{"signing in", loginPath, body{"email": email, "password": password}, 401, "invalid-credentials"},
		attempt{"registering again", registerPath, body{"email": email}, 201, ""},
	)
}

func TestStatus(t *testing.T) {
	w := sharedEnv(t)
	for word, lead := range map[string]func(email string, l link){
		"pending_verification": func(string, link) {},
		"active":               func(_ string, l link) { w.confirms(l) },
		"cancelled":            func(_ string, l link) { w.wants(w.post(cancelPath, body{"token": l.Token}), 200, "") },
		"verification_expired": func(email string, l link) {
			w.expire(email)
			w.wants(w.post(verifyPath, body{"token": l.Token}), 410, "verification-expired")
		},
	} {
		email := newEmail()
		r := w.register(email)
		id := r.text("registration_id")
		lead(email, w.readMail(email, 1))
		a := w.get(r.Header.Get("Location"))
		for _, name := range []string{"expires_at", "resend_available_at"} {
			if _, err := time.Parse(time.RFC3339, a.text(name)); err != nil {
				t.Error(err)
			}
			delete(a.JSON, name)
		}
		if diff := cmp.Diff(body{"registration_id": id, "status": word, "verification_email": "sent", "resend_count": 0.0}, a.JSON); diff != "" {
			t.Errorf("%s (-want +got):\n%s", word, diff)
		}
	}
	w.wants(w.get("/api/v1/registrations/"+string(newRegistrationID())), 404, "registration-not-found")
	for _, id := range []string{"REG-short", "REG-V1StGXR8_Z5jdHi6x", "USR-V1StGXR8_Z5jdHi6", "x", "%00", "%ff", "'", "REG-V1StGXR8_Z5jdHi%0a"} {
		w.Log(id)
		w.wants(w.get("/api/v1/registrations/"+id), 404, "not-found")
	}
}

// withLocale adds a locale to the body of a request, if there is one.
func withLocale(b body, locale string) body {
	if locale != "" {
		b["locale"] = locale
	}
	return b
}

// Mail scanners open links, with GET and HEAD, before the person does.
func TestLinksChangeNothing(t *testing.T) {
	w := sharedEnv(t)
	email, from := newEmail(), newAddress()
	r := w.register(email)
	l := w.readMail(email, 1)
	stored := netip.MustParseAddr(from).String()
	everything := func() string {
		user, _ := json.Marshal(w.keycloakUsers()[r.text("registration_id")])
		return string(user) + w.value(`select r::text || u::text || (select count(*) from audit_log where ip_address = $2)
			from user_registrations r join users u using (user_id) where r.email = $1`, email, stored)
	}
	link, _ := url.Parse(l.URL)
	visit := func(status int) {
		for _, path := range []string{link.RequestURI(), "/account/cancel?" + link.RawQuery} {
			for i := range 6 {
				a := w.do(call{method: []string{"GET", "HEAD"}[i%2], path: path, from: from})
				if a.Status != status {
					t.Errorf("%s: %v, want %d", path, a, status)
				}
			}
			w.do(call{method: "GET", path: path + "x", from: from}) // a broken link
			w.do(call{method: "HEAD", path: path + "x", from: from})
		}
		w.do(call{path: r.Header.Get("Location"), from: from})
		for _, path := range []string{"/account/register", "/account/resend?email=" + email, "/account/verify?email=" + email, "/account/ready"} {
			w.do(call{path: path, from: from})
		}
	}
	before := everything()
	visit(200)
	if after := everything(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	w.expire(email)
	before = everything()
	visit(410)
	if after := everything(); after != before {
		t.Errorf("overdue, before:\n%s\nafter:\n%s", before, after)
	}
}

// The forms do what the API does, with the same statuses.
func TestForms(t *testing.T) {
	w := sharedEnv(t)
	email := newEmail()
	person := map[string]string{"email": " " + email + " ", "phone": "+49 30 123456"}
	type form = map[string]string
	submit := func(path string, values form, status int, shows ...string) {
		t.Helper()
		a := w.form(path, values)
		if a.Status != status || a.Header.Get("Content-Type") != "text/html; charset=utf-8" || strings.Contains(string(a.Body), password) {
			t.Errorf("%s %v: got %v, want %d", path, values, a, status)
		}
		for _, s := range shows {
			if !strings.Contains(string(a.Body), s) {
				t.Errorf("%s %v does not show %q:\n%s", path, values, s, a.Body)
			}
		}
	}
	for _, header := range []map[string]string{{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}} {
		for _, path := range []string{"/account/register", "/account/verify", "/account/resend", "/account/cancel"} {
			a := w.do(call{method: "POST", path: path, form: url.Values{"email": {email}, "password": {password}}, header: header})
			if a.Status != 403 || !strings.Contains(string(a.Body), problemForbidden.Title) {
				t.Errorf("%s %v: %v", path, header, a)
			}
		}
	}
	wrong := maps.Clone(person)
	wrong["email"], wrong["username"] = "ada@", "<x>"
	submit("/account/register", wrong, 400, "is not a valid e-mail address", "User name has a character that is not allowed", `value="ada@"`)
	submit("/account/register", form{}, 400, "E-mail address is required")
	submit("/account/register", form{"email": strings.Repeat("x", maxBody)}, 413, problemPayloadTooLarge.Title)
	submit("/account/register", person, 200, "Look into your mailbox", "/account/verify?email=")
	submit("/account/register", person, 200, "Look into your mailbox") // sent twice: no second mail
	l := w.readMail(email, 1)
	for _, address := range []string{email, newEmail()} { // the same, whatever is known of it
		submit("/account/resend", form{"email": address}, 200, "a registration is waiting for this address")
	}
	submit("/account/resend", form{"email": "x"}, 400, "is not a valid e-mail address")
	submit("/account/resend", form{}, 400, "is required")
	w.minuteLater(email)
	submit("/account/resend", form{"email": email}, 200)
	l = w.readMail(email, 2)
	submit("/account/verify", form{"email": email, "code": other(l.Code), "password": password}, 400, problemInvalidCode.Detail)
	submit("/account/verify", form{"email": email, "code": "12", "password": password}, 400, "Code ")
	submit("/account/verify", form{}, 400, "E-mail address is required", "Code is required", "Password is required")
	submit("/account/verify", form{"token": "unknown", "password": password}, 400, "Invalid link", problemInvalidToken.Detail)
	// A scanner that presses the button has no password, and confirms nothing.
	submit("/account/verify", form{"token": l.Token}, 400, "Password is required", email)
	submit("/account/verify", form{"token": l.Token, "password": "short"}, 400, "must have at least 10 characters", email)
	w.wants(w.login(email, password), 403, "account-not-verified")
	submit("/account/verify", form{"email": email, "code": l.Code[:3] + " " + l.Code[3:], "password": password}, 200, "confirmed")
	submit("/account/verify", form{"token": l.Token, "password": password}, 200, "confirmed")
	submit("/account/register", person, 409, problemUserExists.Detail)
	submit("/account/cancel", form{"token": l.Token}, 409, problemAlreadyVerified.Title)
	submit("/account/cancel", form{"token": "unknown"}, 400, "Invalid link", problemInvalidToken.Detail)
	submit("/account/cancel", form{}, 400)

	for slug, status := range map[string]string{"verification-cancelled": "cancelled", "verification-expired": "expired"} {
		person["email"] = newEmail()
		submit("/account/register", person, 200)
		l = w.readMail(person["email"], 1)
		if status == "cancelled" {
			submit("/account/cancel", form{"token": l.Token}, 200)
		} else {
			w.expire(person["email"])
		}
		submit("/account/verify", form{"token": l.Token, "password": password}, 410, problems[slug].Title)
	}
}
