package main

import (
	"testing"
	"time"
)

// ages stands in for time that passes for a session: its exchanges were that long ago.
func (w *env) ages(a answer, by string) {
	w.Helper()
	w.exec(`update refresh_tokens set used_at = used_at - $2::interval, answer_until = answer_until - $2::interval where session_id = $1`,
		a.text("session_id"), by)
}

// A phone that has lost an answer goes on with its old token, however late, and from whichever instance; the next token,
// which nobody has used, is nobody's then.
func TestLostAnswer(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	for range 2 { // an answer may be lost more than once
		_, first := w.signedIn()
		lost := w.refreshed(first)
		for _, instance := range []*env{v, w} {
			w.ages(first, "20 minutes")
			again := instance.refreshed(first)
			if again.text("refresh_token") == lost.text("refresh_token") || again.text("access_token") == lost.text("access_token") {
				t.Errorf("no fresh tokens: %v", again)
			}
			if a := w.refreshed(first); string(a.Body) != string(again.Body) {
				t.Errorf("another answer within the grace time: %v", a)
			}
			w.wants(w.as(again, "GET", "/api/v1/auth/me"), 200, "")
			lost = again
		}
		w.ages(first, "1 minute")
		next := v.refreshed(lost) // the answer has arrived
		w.refreshed(next)
		w.ages(first, "1 minute")
		w.wants(w.do(refreshing(first.text("refresh_token"))), 401, "token-reused") // a thief's
		w.ended("token-reused", next)
	}
}

// A thief who shows a used token whose successor was never used, and the client who has that one: whoever comes second
// ends the session for both.
func TestStolenRefreshToken(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	for name, second := range map[string]func(client, thief answer) answer{
		"the client": func(client, _ answer) answer { return client },
		"the thief":  func(_, thief answer) answer { return thief },
	} {
		_, first := w.signedIn()
		clients := w.refreshed(first)
		w.ages(first, "1 minute")
		thiefs := v.refreshed(first)
		w.ages(first, "1 minute")
		last := second(clients, thiefs)
		if name == "the thief" {
			client := w.do(refreshing(clients.text("refresh_token"))) // the client's next call finds out
			w.wants(client, 401, "token-reused")
			w.wants(v.do(refreshing(last.text("refresh_token"))), 401, "invalid-token")
		} else {
			w.refreshed(thiefs) // the thief goes on, until the client's next call
			w.wants(v.do(refreshing(last.text("refresh_token"))), 401, "token-reused")
		}
		w.ended("token-reused", clients, thiefs)
	}
}

// Two instances that are shown an old token at once exchange the next one once.
func TestLostAnswerAtOnce(t *testing.T) {
	w := sharedEnv(t)
	v, _ := w.another(nil)
	_, first := w.signedIn()
	w.refreshed(first)
	w.ages(first, "20 minutes")
	asked := w.kc.count("refresh")
	answers := make(chan answer, 10)
	for i := range cap(answers) {
		instance := []*env{w, v}[i%2]
		go func() {
			a, _ := w.send(instance.url, refreshing(first.text("refresh_token")))
			answers <- a
		}()
	}
	bodies := map[string]bool{}
	for range cap(answers) {
		a := <-answers
		w.wants(a, 200, "")
		bodies[string(a.Body)] = true
	}
	if n := w.kc.count("refresh") - asked; n != 1 || len(bodies) != 1 {
		t.Errorf("Keycloak was asked %d times, and there are %d answers", n, len(bodies))
	}
}

// When the next token has ended unused, so has the session: that is no theft. Nor is an answer kept for longer.
func TestLostAnswerTooLate(t *testing.T) {
	w := sharedEnv(t)
	_, first := w.signedIn()
	w.refreshed(first)
	session := first.text("session_id")
	w.exec(`update sessions set expires_at = now() where session_id = $1`, session)
	w.exec(`update refresh_tokens set answer_until = now() - interval '61 seconds' where session_id = $1`, session)
	w.wants(w.do(refreshing(first.text("refresh_token"))), 401, "invalid-token")
	if got := w.value(`select count(*)::text from audit_log where details->'sessions' ? $1`, session); got != "0" {
		t.Errorf("%s entries say that it has ended", got)
	}
	w.due("job:sweep")
	w.eventually("the answer is forgotten", time.Minute, func() bool {
		return w.value(`select count(answer)::text from refresh_tokens where session_id = $1`, session) == "0"
	})
	w.exec(`update sessions set expires_at = now() + interval '1 day' where session_id = $1`, session) // it lives in Keycloak
}
