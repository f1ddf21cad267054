package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
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

// What somebody who attacks the service has tried, and what it must answer.

// TestAddressIsProvenFirst: the owner of an account can't give it another address before that is proven, and an
// account whose address nobody has proven gets no role, no session and no mail (S2).
func TestAddressIsProvenFirst(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	email, ours := w.signedIn()
	id, victim := w.idOf(email), newEmail()
	token := w.grant(url.Values{"grant_type": {"password"}, "username": {email}, "password": {password}, "client_id": {"auth-client"}})
	r := authorized(w.console(email, "openid").text("access_token"), "POST", "/realms/"+w.realm+"/account/")
	r.json = body{"username": email, "email": victim, "firstName": "A", "lastName": "B"}
	a, err := w.send(services.KeycloakURL, r)
	var ku body
	w.keycloakAdmin("GET", "/users/"+w.keycloakID(email), nil, &ku)
	if err != nil || a.Status != 400 || ku["email"] != strings.ToLower(email) {
		t.Fatalf("the address is %v: %v %v", ku["email"], a, err)
	}

	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(email), body{"email": victim, "emailVerified": false}, nil)
	w.eventually("it is noticed", time.Minute, func() bool {
		w.due("job:events")
		return w.value(`select concat(is_verified, ' ', email) from users where user_id = $1`, id) == "f "+victim
	})
	w.revoked(ours, token)
	w.isOver(token)
	w.wants(admin.asks("PATCH", usersPath+"/"+id, body{"role": "admin"}), 409, "address-unproven")
	w.wants(w.do(forgetting(victim)), 202, "")
	w.eventually("nothing is left to do", time.Minute, func() bool {
		return w.value(`select count(*)::text from tasks where task_id like 'reset:%'`) == "0"
	})
	if n := len(w.mail.To(victim)); n != 0 {
		t.Errorf("%d mails to an address that nobody has proven", n)
	}
	w.keycloakAdmin("PUT", "/users/"+w.keycloakID(victim), body{"emailVerified": true}, nil)
	w.eventually("it is noticed", time.Minute, func() bool {
		w.due("job:events")
		return w.value(`select is_verified::text from users where user_id = $1`, id) == "true"
	})
	w.wants(admin.asks("PATCH", usersPath+"/"+id, body{"role": "operator"}), 200, "")
	if m := w.receive(victim, 1); !strings.Contains(m.Text, "was changed just now") {
		t.Errorf("the mail says %s", m.Text)
	}
	w.straysDie()
}

// TestLabelsAreBounded: what a client makes up is no label of a metric (S5).
func TestLabelsAreBounded(t *testing.T) {
	w := sharedEnv(t)
	for i := range 30 {
		for _, path := range []string{"/api/v1/auth/ext-authz/x", registerPath, "/nothing"} {
			r := bearing(path, "x")
			r.method = fmt.Sprint("ZZ", i, strings.Repeat("Z", 100*i))
			if _, err := w.send(w.url, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if metrics := string(w.management404("/metrics").Body); strings.Contains(metrics, "ZZ") || len(metrics) > 1<<20 {
		t.Errorf("the metrics have %d bytes", len(metrics))
	}
}

// TestAddressesOfAClient: one client can't ask for the mail of ever more people, and doing it for the same ones again
// costs nothing (S7).
func TestAddressesOfAClient(t *testing.T) {
	w := sharedEnv(t)
	from := newAddress()
	ask := func(path, email string) answer {
		return w.do(call{method: "POST", path: path, json: body{"email": email}, from: from})
	}
	first := newEmail()
	w.wants(ask(forgotPath, first), 202, "")
	w.exec(`update rate_limits set hits = $2 where key = $1`, addressesAsked.of(network(netip.MustParseAddr(from))).Key, addressesAsked.N)
	w.wants(ask(forgotPath, first), 202, "")
	for _, path := range []string{forgotPath, registerPath, "/api/v1/register/resend"} {
		w.wants(ask(path, newEmail()), 429, "too-many-requests")
	}
	w.wants(w.post(registerPath, body{"email": first}), 201, "")
}

// TestMailsToOneMailbox: addresses that differ in their tag are one mailbox for the limits (P3).
func TestMailsToOneMailbox(t *testing.T) {
	w := sharedEnv(t)
	name := newEmail()
	tagged := func(i int) string { return strings.Replace(name, "@", fmt.Sprintf("+%d@", i), 1) }
	w.wants(w.post(registerPath, body{"email": tagged(0)}), 201, "")
	w.readMail(tagged(0), 1)
	w.usesUp(mailsADay.of(mailbox(tagged(1))))
	w.wants(w.post(registerPath, body{"email": tagged(1)}), 429, "resend-limit")
	w.wants(w.admin().asks("POST", usersPath, body{"email": tagged(2)}), 201, "") // the administrators' own
}

// TestInvitationsOfACaller are limited (S23).
func TestInvitationsOfACaller(t *testing.T) {
	w := sharedEnv(t)
	partner := w.admin().invited("partner", "N-"+newEmail()[:6], "")
	w.wants(partner.asks("POST", usersPath, body{"email": newEmail(), "network_id": partner.NetworkID}), 201, "")
	w.usesUp(invitations.of(string(partner.ID)))
	w.wants(partner.asks("POST", usersPath, body{"email": newEmail(), "network_id": partner.NetworkID}), 429, "too-many-requests")
}

// TestOneTimeCode: an account that has a one-time code needs it to sign in, and is told so (K1).
func TestOneTimeCode(t *testing.T) {
	w := sharedEnv(t)
	email, _, kc := w.member()
	const secret = "DJmQfC73VGFhw7D4QJ8A"
	w.hasOneTimeCodes(kc, secret)
	sign := func(password, otp string) answer {
		in := body{"email": email, "password": password}
		if otp != "" {
			in["otp"] = otp
		}
		return w.post(loginPath, in)
	}
	code := oneTimeCode(secret, time.Now())
	w.wants(sign(password, ""), 401, "otp-required")
	w.wants(sign(password, other(code)), 401, "invalid-credentials")
	w.wants(sign("a wrong password", code), 401, "invalid-credentials")
	w.names(sign(password, "12a456"), "otp")
	w.wants(sign(password, code), 200, "")
}

// hasOneTimeCodes gives a user of Keycloak devices that make codes. Keycloak takes a secret as it is, not in base 32.
func (w *env) hasOneTimeCodes(kc string, secrets ...string) {
	w.Helper()
	var user body
	w.keycloakAdmin("GET", "/users/"+kc, nil, &user)
	var credentials []body
	for i, secret := range secrets {
		credentials = append(credentials, body{"type": "otp", "userLabel": fmt.Sprint("device ", i+1),
			"secretData":     `{"value":"` + secret + `"}`,
			"credentialData": `{"subType":"totp","digits":6,"counter":0,"period":30,"algorithm":"HmacSHA1"}`})
	}
	user["credentials"] = credentials
	w.keycloakAdmin("PUT", "/users/"+kc, user, nil)
}

// oneTimeCode is that of RFC 6238 §4, with its defaults.
func oneTimeCode(secret string, at time.Time) string {
	mac := hmac.New(sha1.New, []byte(secret))
	binary.Write(mac, binary.BigEndian, at.Unix()/30)
	sum := mac.Sum(nil)
	return fmt.Sprintf("%06d", binary.BigEndian.Uint32(sum[sum[19]&15:])&0x7fffffff%1_000_000)
}

// TestPasswordPolicy: what everybody tries first is no password (S11).
func TestPasswordPolicy(t *testing.T) {
	w := sharedEnv(t)
	l := registered(w, newEmail())
	for _, bad := range []string{"password", "12345678", "        ", "1234567890", "Qwertyuiop", "password123"} {
		in := verifying(l)
		in.json = body{"token": l.Token, "password": bad}
		w.names(w.do(in), "password")
	}
	w.wants(w.do(verifying(l)), 200, "")
}

// TestUsernamesLookLikeNobody: RFC 8265 (S19).
func TestUsernamesLookLikeNobody(t *testing.T) {
	w := sharedEnv(t)
	for _, bad := range []string{"victim＠bank.test", "adm\u00adin", "USR-aaaaaaaaaaaaaaaa", "usr-x", "a b", "ad\u0301min\u200b"} {
		w.names(w.post(registerPath, body{"email": newEmail(), "username": bad}), "username")
	}
	email := newEmail()
	l := registered(w, email)
	in := verifying(l)
	name := "wide" + strings.ToLower(email[:8])
	in.json = body{"token": l.Token, "password": password, "username": "ｗｉｄｅ" + strings.ToUpper(email[:8])}
	a := w.do(in)
	if w.wants(a, 200, ""); a.text("username") != name {
		t.Errorf("the username is %q", a.text("username"))
	}
	w.wants(w.post(loginPath, body{"username": name, "password": password}), 200, "")
}

// TestConfidentialClient: with a secret all ways of signing in work, and nobody gets or exchanges tokens at Keycloak
// past the service (S14).
func TestConfidentialClient(t *testing.T) {
	t.Parallel()
	const secret = "the secret of auth-client"
	w := newEnv(t, map[string]string{"CORS_ALLOWED_ORIGINS": app, "PUBLIC_URL": "http://localhost:3000", "JOB_INTERVAL": "0"})
	email, _, _ := w.member()
	var clients []body
	w.keycloakAdmin("GET", "/clients?clientId=auth-client", nil, &clients)
	clients[0]["publicClient"], clients[0]["secret"] = false, secret
	w.keycloakAdmin("PUT", "/clients/"+clients[0]["id"].(string), clients[0], nil)
	w.secrets.add(secret)
	w.restarted(map[string]string{"KEYCLOAK_AUTH_CLIENT_SECRET": secret}, func() {})

	ours := w.signsIn(email)
	for _, form := range []url.Values{{"grant_type": {"password"}, "username": {email}, "password": {password}},
		{"grant_type": {"refresh_token"}, "refresh_token": {ours.text("refresh_token")}}} {
		if a := w.token(form); a.Status != 401 || a.text("access_token") != "" {
			t.Errorf("Keycloak answers %v", a)
		}
	}
	w.wants(w.do(loggingOut(w.refreshed(ours).text("refresh_token"))), 204, "")
	p := w.person()
	p.isBack(p.comesBack(p.signsIn(p.begins(app), email)), app)
	if found := w.doctor(nil); slices.ContainsFunc(found, func(f finding) bool { return f.Name == "Keycloak: auth client" && f.Status != "ok" }) {
		t.Errorf("%v", found)
	}
	w.restarted(map[string]string{"KEYCLOAK_AUTH_CLIENT_SECRET": "another"}, func() {})
	w.wants(w.login(email, password), 503, "unavailable")
}

// TestGuessesHoldUpNobody: while all places for checking passwords are taken, sessions are refreshed (S15).
func TestGuessesHoldUpNobody(t *testing.T) {
	w := sharedEnv(t)
	cfg, err := loadConfig(func(name string) string { return w.vars[name] })
	if err != nil {
		t.Fatal(err)
	}
	kc, release := newKeycloak(cfg, newMetrics()), make(chan struct{})
	var guesses sync.WaitGroup
	places := kc.passwords.admitted
	for i := range places.most {
		ctx := context.WithValue(t.Context(), requestKey{}, request{Client: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})})
		guesses.Go(func() { kc.passwords.do(ctx, func() error { <-release; return nil }) })
	}
	w.eventually("the places are taken", time.Minute, func() bool {
		places.mu.Lock()
		defer places.mu.Unlock()
		return places.all == places.most
	})
	email, ours := w.signedIn()
	if _, err := kc.signIn(t.Context(), email, password, ""); !errors.Is(err, errBusy) {
		t.Error(err)
	}
	if _, err := kc.refresh(t.Context(), ours.text("refresh_token")); err != nil {
		t.Error(err)
	}
	close(release)
	guesses.Wait()
	w.refreshed(ours) // once more than anybody knows: refreshTokenMaxReuse
}

// TestSeveralCookies: each is tried, and those that are refused are cleared (S17).
func TestSeveralCookies(t *testing.T) {
	w := cookieEnv(t)
	_, ours := w.signedIn()
	headers := cookieOrigins[0].headers
	both := func(first, second string) call {
		r := withCookie(refreshPath, first, headers)
		r.header["Cookie"] += "; __Host-refresh_token=" + second + "; refresh_token=somebody's"
		return r
	}
	a := w.do(both("planted", ours.text("refresh_token")))
	w.wants(a, 200, "")
	next := w.cookieSet(a).Value
	a = w.do(both("planted", "another"))
	w.wants(a, 401, "invalid-token")
	if c := w.cookieSet(a); c == nil || c.MaxAge >= 0 {
		t.Errorf("the cookie stays: %v", a.Header)
	}
	w.wants(w.do(call{method: "POST", path: refreshPath, header: map[string]string{"Cookie": "refresh_token=" + next,
		"Origin": headers["Origin"]}}), 401, "invalid-token") // a sibling host could have set that
	w.wants(w.do(both(next, "x")), 200, "")
}

// TestCookiesTried: a request can't have the service look up more cookies than a browser would honestly have.
func TestCookiesTried(t *testing.T) {
	w := cookieEnv(t)
	_, ours := w.signedIn()
	try := func(planted int) answer {
		r := withCookie(refreshPath, "planted", cookieOrigins[0].headers)
		r.header["Cookie"] = strings.Repeat("__Host-refresh_token=planted; ", planted) + "__Host-refresh_token=" +
			ours.text("refresh_token")
		return w.do(r)
	}
	w.wants(try(cookiesTried), 401, "invalid-token")
	w.wants(try(cookiesTried-1), 200, "")
}

// TestStepsOfAWrongCode: Keycloak is asked the same, whether an address waits for a code, is confirmed, or is nobody's.
func TestStepsOfAWrongCode(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	waiting, confirmed := newEmail(), newEmail()
	registered(w, waiting)
	w.account(confirmed)
	users := regexp.MustCompile(`users/[^/]+`)
	steps := func(email string) (calls []string) {
		before := w.kc.called()
		w.wants(w.do(typing(email, "000000")), 400, "invalid-code")
		for _, call := range w.kc.called()[len(before):] {
			calls = append(calls, users.ReplaceAllString(call, "users/{id}"))
		}
		return calls
	}
	want := steps(waiting)
	if len(want) == 0 {
		t.Fatal("Keycloak is not asked")
	}
	for _, email := range []string{confirmed, newEmail()} {
		if diff := cmp.Diff(want, steps(email)); diff != "" {
			t.Error(diff)
		}
	}
}

// TestUnknownKeyAgain: a key id that the realm has not is looked for once, one client can't take all places of those
// who wait, and a flood is one line of the log (S22).
func TestUnknownKeyAgain(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	email, ours := w.signedIn()
	parts := strings.Split(ours.text("access_token"), ".")
	forged := func(kid string) call {
		return bearing(validatePath, segment(body{"alg": "RS256", "kid": kid})+"."+parts[1]+"."+parts[2])
	}
	w.wants(w.do(forged("nobody's")), 401, "unauthorized")
	for range 20 {
		start := time.Now()
		w.wants(w.do(forged("nobody's")), 401, "unauthorized")
		if took := time.Since(start); took > time.Second {
			t.Fatalf("the same id waits again, for %v", took)
		}
	}
	from, answers := newAddress(), make(chan answer, 200)
	for i := range cap(answers) {
		r := forged(strconv.Itoa(i))
		r.from = from
		go func() { a, _ := w.send(w.url, r); answers <- a }()
	}
	_, kid := w.realmKey(200)
	w.eventually("a token of a really new key passes", keyPause+10*time.Second, func() bool {
		fresh := w.login(email, password)
		return fresh.Status == 200 && unpacked(fresh.text("access_token"), 0)["kid"] == kid && w.do(bearing(validatePath, fresh.text("access_token"))).Status == http.StatusOK
	})
	n := 0
	for range cap(answers) {
		if a := <-answers; a.Status == 503 {
			n++
		}
	}
	if n < cap(answers)-2*keyWaitersEach {
		t.Errorf("only %d of one client's were refused at once", n)
	}
	if lines := strings.Count(w.logs.String(), "too much is waiting"); lines < 1 || lines > 2 {
		t.Errorf("the log has %d lines of it", lines)
	}
}

// TestClientAddressAtKeycloak: Keycloak's events say who it was (S8).
func TestClientAddressAtKeycloak(t *testing.T) {
	w := sharedEnv(t)
	email, _, kc := w.member()
	r := signingIn(email, "a wrong password")
	r.from = "10.77.0.7"
	w.kc.forwards.Store(true)
	defer w.kc.forwards.Store(false)
	w.wants(w.do(r), 401, "invalid-credentials")
	w.eventually("the event says it", time.Minute, func() bool {
		var events []struct{ IPAddress string }
		w.keycloakAdmin("GET", "/events?type=LOGIN_ERROR&user="+kc, nil, &events)
		return slices.ContainsFunc(events, func(e struct{ IPAddress string }) bool { return e.IPAddress == "10.77.0.7" })
	})
}
