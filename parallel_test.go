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
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms", "RESEND_LIMIT": "100"})
	first := w.url
	var instances []string
	for _, v := range w.fleet() {
		instances = append(instances, v.url)
	}
	w.url = first

	w.Run("two hundred guesses of a code", func() {
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
		if got["400 invalid-code"] != 5 || got["429 too-many-attempts"] != len(guesses)-5 {
			w.Errorf("%v", got)
		}
		if compared = w.kc.count("get_user") - compared; compared != 5 {
			w.Errorf("%d guesses were compared", compared)
		}
		w.wants(w.do(typing(email, l.Code)), 429, "too-many-attempts")
		w.wants(w.do(verifying(l)), 200, "")
		w.wants(w.do(signingIn(email, password)), 200, "")
	})

	w.Run("two hundred refreshes of a token", func() {
		l := w.session(newEmail())
		asked := w.kc.count("refresh")
		answers := w.at(instances[:2], slices.Repeat([]call{refreshing(l.Token)}, 200)...)
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
	})

	w.Run("forty registrations of an address", func() {
		email := newEmail()
		var calls []call
		for i := range 40 {
			calls = append(calls, registering([]string{email, strings.ToUpper(email)}[i%2]))
		}
		got := tally(w.at(instances, calls...))
		for outcome := range got {
			if !slices.Contains([]string{"201", "409 user-exists", "429 too-many-requests", "429 resend-limit", "503 unavailable"}, outcome) {
				w.Errorf("%v", got)
			}
		}
		if got["201"] == 0 {
			w.Errorf("nobody was registered: %v", got)
		}
		w.settle() // one user for each pending row, none for the rest
		var pending int
		if err := w.pool.QueryRow(w.Context(), `select count(*) from user_registrations
			where lower(email) = lower($1) and status = 'pending'`, email).Scan(&pending); err != nil || pending != 1 {
			w.Errorf("%d are pending (%v) after %v", pending, err, got)
		}
		w.wants(w.do(verifying(w.lastMail(email))), 200, "")
		w.wants(w.do(signingIn(email, password)), 200, "")
	})

	w.Run("a double click", func() {
		for i := range 6 {
			email := newEmail()
			l := registered(w, email)
			click := verifying(l)
			if i%2 == 1 {
				click = typing(email, l.Code)
			}
			var already []bool
			for _, a := range w.at(instances, click, click) {
				w.wants(a, 200, "")
				already = append(already, a.JSON["already_verified"] == true)
			}
			if already[0] == already[1] {
				w.Errorf("both say already_verified=%v", already[0])
			}
		}
	})

	// Whoever wins: the stores agree, the answers fit, and who got 200 gets in.
	w.Run("verify, resend, cancel, expiry and replacement against each other", func() {
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
			l := registered(w, email)
			others := map[string]call{"resend": resending(email), "cancel": cancelling(l), "replace": registering(email), "": {}}
			names := slices.Sorted(maps.Keys(others))
			acts := []func() answer{late(verifying(l))}
			switch other := names[round%len(names)]; other {
			case "": // the time runs out
				acts = append(acts, func() answer {
					time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
					w.expire(email)
					return answer{Status: 200}
				})
			default:
				acts = append(acts, late(others[other]), late(others[names[1+rand.IntN(3)]]))
			}
			answers := make([]answer, len(acts))
			var all sync.WaitGroup
			for i, act := range acts {
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
				w.do(verifying(l)) // what has expired is noticed by a touch
			}
			wins[fmt.Sprint(names[round%len(names)], " ", answers[0].Status)]++
		}
		w.settle()
		w.Logf("the other and verify's answer: %v", wins)
	})

	w.Run("no token while the mail is on its way", func() {
		email := newEmail()
		there, release := w.kc.holdAt("^send_mail ", true) // the user is enabled
		registered := make(chan answer, 1)
		go func() {
			a, _ := w.send(w.url, registering(email))
			registered <- a
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
					if err != nil || !slices.Contains([]string{"account-not-verified", "invalid-credentials", "too-many-requests"}, a.slug()) {
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
		if a := <-registered; a.Status != 201 {
			w.Errorf("register: %v", a)
		}
		w.wants(w.do(signingIn(email, password)), 403, "account-not-verified")
		w.wants(w.do(verifying(w.readMail(email, 1))), 200, "")
		w.exec(`delete from rate_limits where key like 'login:%'`)
		w.wants(w.do(signingIn(email, password)), 200, "")
	})

	w.Run("three instances send each queued mail once", func() {
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
		w.settle()
		var extra []string
		for _, email := range emails {
			if n := len(w.mail.To(email)); n != 1 {
				extra = append(extra, fmt.Sprintf("%s got %d mails", email, n))
			}
		}
		if len(extra) > 0 {
			w.Error(strings.Join(extra, "\n"))
		}
	})
}
