package main

import (
	"encoding/json"
	"net/url"
	"reflect"
	"strings"
	"testing"

	gonanoid "github.com/matoous/go-nanoid/v2"
)

// spellings are ways to write one mail address: U-label, decomposed, A-label, capitals, full width letters and dot, soft
// hyphen, blanks around it.
func spellings() (stored string, all []string) {
	local := gonanoid.MustGenerate("abcdefghijklmnopqrstuvwxyz", 12)
	for _, domain := range []string{"bücher.example", "bu\u0308cher.example", "xn--bcher-kva.example", "BÜCHER.Example", "XN--BCHER-KVA.example",
		"bücher．ｅxample", "bü\u00adcher.example", "bücher.example \n"} {
		all = append(all, local+"@"+domain)
	}
	return local + "@xn--bcher-kva.example", all
}

// One mailbox has one address, whichever way it is written and wherever it comes in.
func TestAddressSpellings(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	stored, all := spellings()
	first := w.post(registerPath, body{"email": all[0]})
	w.wants(first, 201, "")
	l := w.readMail(stored, 1)
	for _, email := range all {
		if a := w.post(registerPath, body{"email": email}); a.text("registration_id") != first.text("registration_id") || a.text("email") != stored {
			t.Errorf("%q: %v", email, a)
		}
		w.submit("/account/register", map[string]string{"email": email}, 200, "Look into your mailbox", strings.Replace(stored, "xn--bcher-kva", "bücher", 1))
		w.wants(w.post(resendPath, body{"email": email}), 200, "")
	}
	for i, email := range all {
		status, slug := 400, "invalid-code"
		if i >= codesTried.N {
			status, slug = 429, "too-many-attempts"
		}
		w.wants(w.post(verifyPath, body{"email": email, "code": otherCode(l.Code), "password": password}), status, slug)
	}
	w.exec(`delete from rate_limits where key = $1`, codesTried.of(stored).Key)
	if n := len(w.mail.To(stored)); n != 1 {
		t.Errorf("%d mails to one mailbox", n)
	}
	a := w.post(verifyPath, body{"email": all[1], "code": l.Code[:3] + " " + l.Code[3:], "password": password, "username": all[0]})
	w.wants(a, 200, "")
	for _, email := range all {
		w.wants(w.post(loginPath, body{"email": email, "password": password}), 200, "")
		w.wants(w.post(loginPath, body{"username": email, "password": password}), 200, "")
		w.wants(w.post(registerPath, body{"email": email}), 409, "user-exists")
	}
	w.wants(w.post("/api/v1/auth/password/forgot", body{"email": all[3]}), 202, "")
	w.resetLink(stored, 2)
	if got, err := w.grantAdmin(" " + all[0]); err != nil || !strings.Contains(got, stored) {
		t.Errorf("grant-admin: %q %v", got, err)
	}
	admin := w.testUser(stored)
	for _, email := range all {
		if found := admin.list("q=" + url.QueryEscape(email)); len(found) != 1 || found[0].Email != stored {
			t.Errorf("%q finds %v", email, found)
		}
		w.wants(admin.asks("POST", usersPath, body{"email": email}), 409, "user-exists")
	}
	stored, all = spellings()
	w.wants(admin.asks("POST", usersPath, body{"email": all[2]}), 201, "")
	w.wants(w.post(registerPath, body{"email": all[1]}), 201, "") // the invitation goes on
	if n := w.value(`select count(*)::text from user_registrations where email = $1`, stored); n != "1" {
		t.Errorf("%s registrations of one mailbox", n)
	}
}

// Keycloak's own users may have a U-label: they are imported with the address that is compared, stay in sync, and sign in
// with each spelling.
func TestAddressOfKeycloak(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	stored, all := spellings()
	w.keycloakAdmin("POST", "/users", body{"username": all[0], "email": all[0], "firstName": " Zoe\u0308", "enabled": true, "emailVerified": true,
		"credentials": []body{{"type": "password", "value": password}}}, nil)
	for _, email := range all { // the first sign-in imports
		w.wants(w.post(loginPath, body{"email": email, "password": password}), 200, "")
	}
	if got := w.value(`select email || first_name from users where email = $1`, stored); got != stored+"Zoë" {
		t.Error(got)
	}
	w.wants(w.post(registerPath, body{"email": all[1]}), 409, "user-exists")
	if found, _, out, err := w.sync(nil); err != nil || len(found) > 0 {
		t.Errorf("%v %v: %s", found, err, out)
	}
	id := w.value(`select keycloak_id from users where email = $1`, stored)
	w.keycloakAdmin("PUT", "/users/"+id, body{"lastName": "Gru\u0308n"}, nil)
	w.arrives(id, `last_name = 'Grün'`)
}

// A new field can't forget its form: what is called like an address, a phone number or a code has it.
func TestNormalForms(t *testing.T) {
	s := &server{}
	for _, rt := range s.routes() {
		if rt.in == nil || reflect.TypeOf(rt.in).Kind() != reflect.Struct {
			continue
		}
		in := reflect.New(reflect.TypeOf(rt.in))
		for name, f := range inputOf(in.Interface()).fields {
			as := f.tag.Get("as") + f.tag.Get("format")
			want := map[string]string{"email": "email", "phone": "phone", "code": "digits", "otp": "digits", "q": "search", "password": "password",
				"username": "username"}[name]
			if rt.Name == "login" && (name == "email" || name == "username") {
				want = "login"
			}
			if want != "" && as != want {
				t.Errorf("%s: %s has the form %q, not %q", rt.Name, name, as, want)
			}
		}
	}
}

// Texts are trimmed and in NFC in JSON as in forms, wherever they come in; passwords never.
func TestTrimmed(t *testing.T) {
	w := sharedEnv(t)
	email, username := newEmail(), newEmail()[:8]
	padded := func(in body) body {
		for name, value := range in {
			in[name] = "\t" + value.(string) + " \n"
		}
		return in
	}
	w.wants(w.post(registerPath, padded(body{"email": email, "first_name": "Zoe\u0308", "phone": "+49 (0)30/123456", "locale": "de_DE"})), 201, "")
	l := w.readMail(email, 1)
	in := padded(body{"token": l.Token, "username": username, "last_name": "Gru\u0308n"})
	in["password"] = " " + password
	w.wants(w.post(verifyPath, in), 200, "")
	if got := w.value(`select concat_ws('|', email, username, first_name, last_name, phone) from users where email = $1`, email); got != strings.Join([]string{email, username, "Zoë", "Grün", "+4930123456"}, "|") {
		t.Error(got)
	}
	for _, name := range []string{email, username, strings.ToUpper(username)} {
		field := map[bool]string{true: "email", false: "username"}[strings.Contains(name, "@")]
		in := padded(body{field: name})
		in["password"] = " " + password
		a := w.post(loginPath, in)
		w.wants(a, 200, "")
		w.wants(w.post(refreshPath, padded(body{"refresh_token": a.text("refresh_token")})), 200, "")
		in["password"] = password
		w.wants(w.post(loginPath, in), 401, "invalid-credentials")
	}
}

// What Keycloak refuses of names and usernames, we refuse and name before: each character is tried on the real one.
func TestNamesOfKeycloak(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	email, _, _ := w.member()
	id := w.value(`select keycloak_id from users where email = $1`, email)
	refused := func(field, value string) bool {
		status, answer := w.askKeycloak("PUT", "/users/"+id, body{field: value})
		if status != 204 && status != 400 {
			t.Fatalf("%q: %d %s", value, status, answer)
		}
		return status == 400
	}
	characters := []rune("äßøŁđéñ’‘“”´`¨·•€£©®°…–——ªº×÷ǅʻ\u02bc\u0301李あア한аАλΩאع\u00a0\u2003\u2028\u2029\u0085\u200b\u200d\u202e😀①Ａ＜")
	for r := rune(' '); r <= '~'; r++ {
		characters = append(characters, r)
	}
	for _, r := range characters {
		for ours, keycloaks := range map[string]string{"first_name": "firstName", "username": "username"} {
			value := "ab" + string(r) + "cd"
			encoded, _ := json.Marshal(body{"email": email, ours: value})
			var in registerIn
			err := readJSON(encoded, &in)
			if err == nil {
				_, err = ownUsername(in.Username, email)
			}
			if err == nil && refused(keycloaks, value) {
				t.Errorf("%s: Keycloak refuses %q, and we don't", ours, r)
			}
		}
	}
}
