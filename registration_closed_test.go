package main

import (
	"strings"
	"testing"
)

// With REGISTRATION=invited only people who are invited get an account; what has begun before goes on.
func TestInvitedOnly(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1ms"})
	admin := w.administrator()
	before := newEmail()
	id := w.register(before).text("registration_id")
	w.readMail(before, 1)
	w.restarted(map[string]string{"REGISTRATION": "invited"}, func() {})

	for _, email := range []string{newEmail(), before, admin} {
		w.wants(w.post(registerPath, body{"email": email}), 403, "registration-closed")
	}
	const closed, german = "Only people who are invited get an account here.", "Hier bekommt nur ein Konto, wer eingeladen wird."
	w.submit("/account/register", map[string]string{"email": newEmail()}, 403, closed)
	for language, sentence := range map[string]string{"en": closed, "de": german} {
		a := w.do(call{path: "/account/register", header: map[string]string{"Accept-Language": language}})
		if a.Status != 200 || !strings.Contains(string(a.Body), sentence) || strings.Contains(string(a.Body), "<form") {
			t.Error(a)
		}
		a = w.do(call{path: "/", header: map[string]string{"Accept-Language": language}})
		if a.Status != 200 || strings.Contains(string(a.Body), "/account/register") {
			t.Error(a)
		}
	}
	if got := w.value(`select count(*)::text from user_registrations`); got != "2" {
		t.Errorf("%s registrations", got)
	}

	w.wants(w.post(resendPath, body{"registration_id": id}), 200, "")
	w.confirms(w.readMail(before, 2))
	invited := newEmail()
	w.wants(w.do(managing(w.signsIn(admin), "POST", "", body{"email": invited})), 201, "")
	w.confirms(w.readMail(invited, 1))
	w.signsIn(invited)
}

// With REGISTRATION_DOMAINS people of other domains don't register; a subdomain is another domain.
func TestRegistrationDomains(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"REGISTRATION_DOMAINS": "Example.test, bücher.example"})
	local := newEmail()[:8]
	for domain, open := range map[string]bool{"example.test": true, "EXAMPLE.TEST": true, "xn--bcher-kva.example": true, "bu\u0308cher.example": true,
		"sub.example.test": false, "example.test.evil.test": false, "notexample.test": false, "example.com": false} {
		a := w.post(registerPath, body{"email": local + "@" + domain})
		if !open {
			w.wants(a, 403, "registration-closed")
			w.submit("/account/register", map[string]string{"email": local + "@" + domain}, 403,
				"don't register themselves here", "<form", local+"@"+domain)
		} else if a.Status != 201 {
			t.Errorf("%s: %v", domain, a)
		}
	}
	if got := w.value(`select count(*)::text from audit_log where action = 'register' and reason = 'registration-closed'`); got != "8" {
		t.Errorf("%s refusals are audited", got)
	}
	admin, invited := w.administrator(), newEmail()[:12]+"@example.com"
	w.wants(w.do(managing(w.signsIn(admin), "POST", "", body{"email": invited})), 201, "")
	w.confirms(w.readMail(invited, 1))
}
