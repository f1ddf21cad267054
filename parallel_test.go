package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// at sends requests at once, each to the next instance, and returns the answers.
func (w *env) at(instances []string, calls ...call) []answer {
	w.Helper()
	answers := make([]answer, len(calls))
	start := make(chan struct{})
	var all sync.WaitGroup
	for i, r := range calls {
		all.Go(func() {
			<-start
			var err error
			if answers[i], err = w.send(instances[i%len(instances)], r); err != nil {
				w.Errorf("%s: %v", r.path, err)
			}
		})
	}
	close(start)
	all.Wait()
	return answers
}

// patient is at for clients that try again when another has had the lock for longer than lockWait.
func (w *env) patient(instances []string, calls ...call) []answer {
	w.Helper()
	answers := w.at(instances, calls...)
	for i, a := range answers {
		if a.slug() == "unavailable" {
			answers[i] = w.do(calls[i])
		}
	}
	return answers
}

// tally counts the answers by status and problem.
func tally(answers []answer) map[string]int {
	n := map[string]int{}
	for _, a := range answers {
		n[strings.TrimSpace(fmt.Sprint(a.Status, " ", a.slug()))]++
	}
	return n
}

// TestParallel has three instances that share one env.
func TestParallel(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "RESEND_LIMIT": "100"})
	first := w.url
	var instances []string
	for _, v := range w.fleet() {
		instances = append(instances, v.url)
	}
	w.url = first
	w.Run("two hundred guesses of a code", func() { w.manyGuesses(instances) })
	w.Run("two hundred refreshes of a token", func() { w.manyRefreshes(instances) })
	w.Run("a double click", func() { w.doubleClicks(instances) })
	w.Run("verify, resend, cancel and expiry against each other", func() { w.contests(instances) })
	w.Run("no token while the mail is on its way", func() { w.noTokenMeanwhile(instances) })
	w.Run("three instances send each queued mail once", func() { w.queuedMails() })
}

func (w *env) manyGuesses(instances []string) {
	email := newEmail()
	l := registered(w, email)
	var guesses []call
	for i := range 200 {
		if code := fmt.Sprintf("%06d", 123*i); code != l.Code {
			guesses = append(guesses, typing(email, code))
		}
	}
	compared := w.kc.count("get_user")
	got := tally(w.at(instances[:2], guesses...))
	if got["400 invalid-code"]+got["503 unavailable"] != 5 || got["429 too-many-attempts"] != len(guesses)-5 {
		w.Errorf("%v", got) // 503: it has waited a second for the others, and was counted all the same
	}
	if compared = w.kc.count("get_user") - compared; compared < got["400 invalid-code"] { // events are compared, too
		w.Errorf("%d guesses were compared", compared)
	}
	w.wants(w.do(typing(email, l.Code)), 429, "too-many-attempts")
	w.wants(w.do(verifying(l)), 200, "")
	w.wants(w.do(signingIn(email, password)), 200, "")
}

func (w *env) manyRefreshes(instances []string) {
	l := w.session(newEmail())
	asked := w.kc.count("refresh")
	answers := w.patient(instances[:2], slices.Repeat([]call{refreshing(l.Token)}, 200)...)
	for _, a := range answers {
		if w.wants(a, 200, ""); string(a.Body) != string(answers[0].Body) {
			w.Fatalf("two answers: %v %v", a, answers[0])
		}
	}
	if asked = w.kc.count("refresh") - asked; asked != 1 {
		w.Errorf("Keycloak was asked %d times", asked)
	}
	next := w.refreshed(answers[0])
	w.graceEnds(next)
	late := tally(w.at(instances, slices.Repeat([]call{refreshing(l.Token)}, 20)...)) // the first ends the session
	if late["401 token-reused"] == 0 || late["401 token-reused"]+late["401 invalid-token"] != 20 {
		w.Errorf("%v", late)
	}
	w.ended("token-reused", next)
}

// TestForty registers one address forty times at once, over three instances: it is one
// registration, with one mail, whose link works.
func TestForty(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	first := w.url
	var instances []string
	for _, v := range w.fleet() {
		instances = append(instances, v.url)
	}
	w.url = first
	email := newEmail()
	var calls []call
	for i := range 40 {
		calls = append(calls, registering([]string{email, strings.ToUpper(email)}[i%2]))
	}
	ids := map[string]bool{}
	answers := w.patient(instances, calls...)
	for _, a := range answers {
		if w.wants(a, 201, ""); a.text("registration_id") != w.registrationOf(email) {
			t.Errorf("%v", a)
		}
		ids[a.text("registration_id")] = true
	}
	w.waitUntilIdle()
	if n := len(w.mail.To(email)); n != 1 || len(ids) != 1 {
		t.Errorf("%d mails of %d registrations", n, len(ids))
	}
	if got := w.value(`select concat_ws(' ', (select count(*) from user_registrations), (select count(*) from users),
		(select count(*) from audit_log where action = 'registration.begin'))`); got != "1 1 1" {
		t.Errorf("registrations, users, begun: %s", got)
	}
	w.wants(w.do(verifying(w.readMail(email, 1))), 200, "")
	w.wants(w.do(signingIn(email, password)), 200, "")
}

func (w *env) doubleClicks(instances []string) {
	for i := range 6 {
		email := newEmail()
		l := registered(w, email)
		click := verifying(l)
		if i%2 == 1 {
			click = typing(email, l.Code)
		}
		var already []bool
		for _, a := range w.patient(instances, click, click) {
			w.wants(a, 200, "")
			already = append(already, a.JSON["already_verified"] == true)
		}
		if already[0] == already[1] {
			w.Errorf("both say already_verified=%v", already[0])
		}
	}
}

// contests sends requests about one registration at almost the same time. Whoever wins: the
// stores agree, the answers fit, and who got 200 gets in.
func (w *env) contests(instances []string) {
	// Also during what the others do: each comes up to 100 ms later than another.
	late := func(r call) func() answer {
		return func() answer {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			a, err := w.send(instances[rand.IntN(len(instances))], r)
			if err != nil {
				w.Errorf("%s: %v", r.path, err)
			}
			return a
		}
	}
	wins := map[string]int{}
	for round := range 24 {
		email := newEmail()
		l := resendable(w, email)
		expiry := func() answer {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			w.expire(email)
			return answer{Status: 200}
		}
		acts := map[string]func() answer{"resend": late(resending(l.Code)), "cancel": late(cancelling(l)),
			"register": late(registering(email)), "expiry": expiry}
		names := slices.Sorted(maps.Keys(acts))
		contest := []func() answer{late(verifying(l)), acts[names[round%len(names)]], acts[names[rand.IntN(len(names))]]}
		answers := make([]answer, len(contest))
		var all sync.WaitGroup
		for i, act := range contest {
			all.Go(func() { answers[i] = act() })
		}
		all.Wait()
		for _, a := range answers {
			if !slices.Contains([]int{200, 201, 404, 409, 410, 503}, a.Status) {
				w.Errorf("round %d: %v", round, a)
			}
		}
		if answers[0].Status == 200 {
			w.wants(w.do(signingIn(email, password)), 200, "")
		} else {
			w.do(verifying(l)) // what has expired is noticed by the next request
		}
		wins[fmt.Sprint(names[round%len(names)], " ", answers[0].Status)]++
	}
	w.waitUntilIdle()
	w.Logf("the other and verify's answer: %v", wins)
}

// noTokenMeanwhile tries to sign in while Keycloak's user is enabled for its mail. An
// administrator of Keycloak has given it a password, as the service never does before the
// confirmation.
func (w *env) noTokenMeanwhile(instances []string) {
	email := newEmail()
	id := resendable(w, email).Code
	w.keycloakAdmin("PUT", "/users/"+w.value(`select keycloak_id from users where email = $1`, email)+"/reset-password", body{"type": "password", "value": password}, nil)
	there, release := w.kc.holdAt("^send_mail ", true) // the user is enabled
	mailed := make(chan answer, 1)
	go func() {
		a, _ := w.send(w.url, resending(id))
		mailed <- a
	}()
	<-there
	var hammers sync.WaitGroup
	stop := time.Now().Add(3 * time.Second)
	for i := range 4 {
		hammers.Go(func() {
			for n := 0; time.Now().Before(stop); n++ {
				r := signingIn(email, password)
				if i == 3 && n < 8 { // Keycloak would lock the account after ten
					r = signingIn(email, "not "+password)
				}
				a, err := w.send(instances[i%3], r)
				noToken := []string{"account-not-verified", "invalid-credentials", "too-many-requests", "unavailable"} // it has waited a second in line
				if err != nil || !slices.Contains(noToken, a.slug()) {
					w.Errorf("%v %v", a, err)
				}
				if i == 0 { // or our own limit would guard the door
					w.pool.Exec(w.Context(), `delete from rate_limits where key like 'login:%'`)
				}
			}
		})
	}
	time.AfterFunc(time.Second, release) // so that it is hammered at the window's end, too
	hammers.Wait()
	if a := <-mailed; a.Status != 200 {
		w.Errorf("resend: %v", a)
	}
	w.wants(w.do(signingIn(email, password)), 403, "account-not-verified")
	w.wants(w.do(verifying(w.lastMail(email))), 200, "")
	w.exec(`delete from rate_limits where key like 'login:%'`)
	w.wants(w.do(signingIn(email, password)), 200, "")
}

func (w *env) queuedMails() {
	w.mail.Close()
	var emails []string
	for range 12 {
		email := newEmail()
		if a := w.do(registering(email)); a.text("verification_email") != "queued" {
			w.Errorf("not queued: %v", a)
		}
		emails = append(emails, email)
	}
	if err := w.mail.Restart(); err != nil {
		w.Fatal(err)
	}
	w.waitUntilIdle()
	for _, email := range emails {
		if n := len(w.mail.To(email)); n != 1 {
			w.Errorf("%s got %d mails", email, n)
		}
	}
}
