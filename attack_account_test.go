package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What a second attacker has tried: whoever has been in an account for a moment, or has an address in mind.

// TestSlowBody: a token is good when the body is there, and not only when the headers were.
func TestSlowBody(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	evil, accomplice := admin.invited("admin", "", ""), admin.invited("user", "", "")
	u, err := url.Parse(w.url)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const in = `{"role":"admin"}`
	fmt.Fprintf(conn, "PATCH %s/%s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"+
		"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n",
		usersPath, accomplice.ID, u.Host, evil.signIn.text("access_token"), len(in))
	answer := bufio.NewReader(conn)
	if line, err := answer.ReadString('\n'); err != nil || !strings.Contains(line, " 100 ") {
		t.Fatal(line, err) // the body is waited for: the token was accepted
	}
	w.wants(admin.asks("DELETE", usersPath+"/"+string(evil.ID), nil), 204, "")
	w.revoked(evil.signIn)
	io.WriteString(conn, in)
	if rest, err := io.ReadAll(answer); err != nil || !strings.Contains(string(rest), "HTTP/1.1 401") {
		t.Errorf("%v %s", err, rest)
	}
}

// TestLocaleOfAnAccount: what people set as their language in Keycloak keeps no mail from them.
func TestLocaleOfAnAccount(t *testing.T) {
	w := sharedEnv(t)
	email, username, kc := w.member()
	r := authorized(w.console(email, "openid").text("access_token"), "POST", "/realms/"+w.realm+"/account/")
	for locale, status := range map[string]int{"\u0001": 400, "de\r\nX: y": 400, "de": 204} {
		r.json = body{"username": username, "email": email, "firstName": "A", "lastName": "B",
			"attributes": body{"locale": []string{locale}}}
		if a, err := w.send(services.KeycloakURL, r); err != nil || a.Status != status {
			t.Errorf("Keycloak on the locale %q: %v %v", locale, a, err)
		}
	}
	for _, odd := range []string{"\u0001", "xx", ""} {
		if got := site.Match(odd); got != "en" {
			t.Errorf("%q is the language %q", odd, got)
		}
	}
	if got := w.fromKeycloak(kc)["attributes"].(body)["locale"]; fmt.Sprint(got) != "[de]" {
		t.Errorf("the locale is %v", got)
	}
	w.straysDie()
}

// TestDirectGuesses: passwords that are guessed at Keycloak's token endpoint are on record, once.
func TestDirectGuesses(t *testing.T) {
	w := sharedEnv(t)
	email, _, _ := w.member()
	id := w.idOf(email)
	w.token(url.Values{"grant_type": {"password"}, "username": {email}, "password": {"wrong wrong wrong"}})
	w.eventually("it is on record", time.Minute, func() bool {
		w.due("job:events")
		return w.value(`select coalesce(string_agg(action, ' '), '') from audit_log where target = $1 and outcome = 'refused'`, id) == "keycloak.login"
	})
}

// TestInvitationOfTheFired: the invitation by an administrator who was deleted since is void.
func TestInvitationOfTheFired(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	evil, accomplice, colleague := admin.invited("admin", "", ""), newEmail(), newEmail()
	w.wants(evil.asks("POST", usersPath, body{"email": accomplice, "role": "admin"}), 201, "")
	w.wants(admin.asks("POST", usersPath, body{"email": colleague, "role": "admin"}), 201, "")
	w.wants(admin.asks("DELETE", usersPath+"/"+string(evil.ID), nil), 204, "")
	confirm := body{"token": w.lastMail(accomplice).Token, "password": password}
	w.wants(w.post(verifyPath, confirm), 410, "verification-cancelled")
	w.wants(w.post(verifyPath, confirm), 410, "verification-cancelled")
	w.wants(w.login(accomplice, password), 401, "invalid-credentials")
	w.confirms(w.lastMail(colleague))
}

// TestTaggedStrangers: mails to a mailbox's invented tags do not keep its owner from registering.
func TestTaggedStrangers(t *testing.T) {
	w := sharedEnv(t)
	victim := newEmail()
	tagged := strings.Replace(victim, "@", "+1@", 1)
	w.usesUp(mailsADay.of(mailbox(tagged)))
	w.wants(w.post(registerPath, body{"email": tagged}), 429, "resend-limit")
	w.wants(w.post(registerPath, body{"email": victim}), 201, "")
}

// TestOwnAddressAsUsername: the own address is that one, and not what some fold to it (RFC 8265).
func TestOwnAddressAsUsername(t *testing.T) {
	for username, want := range map[string]string{"Ada@Boss.test": "ada@boss.test", "ada@boſs.test": "", "ada@boss.tesT": "ada@boss.test"} {
		if got, err := ownUsername(username, "ada@boss.test"); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q %v", username, got, err)
		}
	}
}

// TestFormerAddress: an address that an account had is free, as its username, too.
func TestFormerAddress(t *testing.T) {
	w := sharedEnv(t)
	email, next := newEmail(), newEmail()
	w.account(email)
	id := w.idOf(email)
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"email": next, "emailVerified": true}, nil)
	w.eventually("it is noticed", time.Minute, func() bool {
		w.due("job:events")
		return w.value(`select concat_ws(' ', email, username) from users where user_id = $1`, id) == next+" "+next
	})
	w.wants(w.post(registerPath, body{"email": email}), 201, "")
	w.wants(w.login(next, password), 200, "")
}

// TestKnownClient: while strangers guess, the owner signs in from where the account was used before, whatever
// Keycloak's guard says, and nobody from elsewhere.
func TestKnownClient(t *testing.T) {
	w := sharedEnv(t)
	email, _, _ := w.member()
	home := newAddress()
	try := func(from, password string) answer {
		r := signingIn(email, password)
		r.from = from
		return w.do(r)
	}
	w.wants(try(home, password), 200, "")
	w.usesUp(failuresOfAll.of(w.idOf(email)))
	w.wants(try(newAddress(), password), 429, "too-many-requests")
	w.wants(try(home, password), 200, "")
	w.exec(`delete from rate_limits where key = $1`, failuresOfAll.of(w.idOf(email)).Key)
	for range 32 { // Keycloak locks after 30
		w.token(url.Values{"grant_type": {"password"}, "username": {email}, "password": {"wrong wrong wrong"}})
	}
	w.wants(try(newAddress(), password), 401, "invalid-credentials")
	w.wants(try(home, "a wrong password"), 401, "invalid-credentials")
	w.wants(try(home, password), 200, "")
}

// TestResetReserve: strangers who have had all the day's links mailed do not keep the owner from one.
func TestResetReserve(t *testing.T) {
	w := sharedEnv(t)
	email, _, kc := w.member()
	home := newAddress()
	r := signingIn(email, password)
	r.from = home
	w.wants(w.do(r), 200, "")
	w.usesUp(resetsADay.of(kc))
	for _, c := range []struct {
		from  string
		mails int
	}{{newAddress(), 1}, {home, 2}} {
		r := forgetting(email)
		r.from = c.from
		w.wants(w.do(r), 202, "")
		w.eventually("the task is done", time.Minute, func() bool {
			return w.value(`select count(*)::text from tasks where task_id = $1`, "reset:"+kc) == "0"
		})
		if got := len(w.mail.To(email)); got != c.mails {
			t.Errorf("%d mails instead of %d", got, c.mails)
		}
	}
}

var actionLink = regexp.MustCompile(`https?://\S+[?&]key=\S+`)

// TestScannerOfANewAddress: opening the mail's link, as scanners do, does not give an account the address. The
// person's next step does.
func TestScannerOfANewAddress(t *testing.T) {
	w := sharedEnv(t)
	email, _, kc := w.member()
	next := newEmail()
	p := w.person()
	p.fillsIn(p.manages("email", "/", email), url.Values{"email": {next}})
	m, err := w.mail.WaitFor(w.Context(), next, 1)
	if err != nil {
		t.Fatal(err)
	}
	link, err := url.Parse(actionLink.FindString(m.Text))
	if err != nil {
		t.Fatal(err)
	}
	page := w.person().visit(link.RequestURI(), call{})
	if got := w.fromKeycloak(kc)["email"]; page.Status != 200 || got != email {
		t.Errorf("opening %s: %v, and the address is %v", link, page, got)
	}
	button := regexp.MustCompile(`href="(http[^"]*action-token[^"]*)"`).FindStringSubmatch(string(page.Body))
	if button == nil {
		t.Fatalf("the page has no link of Keycloak's: %s", page.Body)
	}
	person := w.person()
	for to := strings.ReplaceAll(button[1], "&amp;", "&"); to != ""; {
		to = person.visit(to, call{}).Header.Get("Location")
	}
	if got := w.fromKeycloak(kc)["email"]; got != next {
		t.Errorf("after the person's step the address is %v", got)
	}
	w.straysDie()
}

// console signs somebody in at Keycloak's account console, with a scope.
func (w *env) console(email, scope string) answer {
	w.Helper()
	redirect := services.KeycloakURL + "/realms/" + w.realm + "/account/"
	q := url.Values{"client_id": {"account-console"}, "redirect_uri": {redirect}, "response_type": {"code"}, "scope": {scope},
		"code_challenge_method": {"S256"}, "code_challenge": {"FgtOQz44TgXlN9xZtGf3yyQD8CFNsVxdtYhio_EVbS4"}} // of 50 times a
	p := w.person()
	a := p.visit(services.KeycloakURL+"/realms/"+w.realm+"/protocol/openid-connect/auth?"+q.Encode(), call{})
	a = p.fillsIn(a, url.Values{"username": {email}, "password": {password}})
	back, err := url.Parse(a.Header.Get("Location"))
	if err != nil {
		w.Fatal(err)
	}
	return w.atConsole(url.Values{"grant_type": {"authorization_code"}, "code": {back.Query().Get("code")},
		"redirect_uri": {redirect}, "code_verifier": {strings.Repeat("a", 50)}})
}

// atConsole asks for tokens as the account console does.
func (w *env) atConsole(form url.Values) answer {
	w.Helper()
	form.Set("client_id", "account-console")
	a, err := w.send(services.KeycloakURL, call{method: "POST", path: "/realms/" + w.realm + "/protocol/openid-connect/token", form: form})
	if err != nil {
		w.Fatal(err)
	}
	return a
}

// TestOfflineSession: an offline token of Keycloak's own console ends with everything else.
func TestOfflineSession(t *testing.T) {
	w := sharedEnv(t)
	email, _, _ := w.member()
	offline := w.console(email, "openid offline_access").text("refresh_token")
	refreshed := func() answer {
		return w.atConsole(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {offline}})
	}
	a := refreshed()
	w.wants(a, 200, "")
	offline = a.text("refresh_token")
	w.resetByAdmin(email)
	w.eventually("the offline token has ended", time.Minute, func() bool {
		w.due("job:events")
		a := refreshed()
		offline = cmp.Or(a.text("refresh_token"), offline)
		return a.Status == 400
	})
	w.straysDie()
}

// TestShareOfAClient: one client takes no more than its share of the places, and others get in (S15).
func TestShareOfAClient(t *testing.T) {
	b, release := newBulkhead(2, 2), make(chan struct{})
	defer close(release)
	of := func(client string) context.Context {
		return context.WithValue(t.Context(), requestKey{}, request{Client: netip.MustParseAddr(client)})
	}
	for range 2 {
		in := make(chan struct{})
		go b.do(of("192.0.2.1"), func() error { close(in); <-release; return nil })
		<-in
	}
	if err := b.do(of("192.0.2.1"), func() error { return nil }); !errors.Is(err, errBusy) {
		t.Errorf("a third place: %v", err)
	}
	leave := b.admitted.enter(network(netip.MustParseAddr("192.0.2.2")))
	if leave == nil {
		t.Fatal("another client has no place")
	}
	leave()
}
