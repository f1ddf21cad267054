package main

import (
	"net/url"
	"strings"
	"testing"
	"time"
)

// direct signs somebody in at Keycloak's token endpoint, past the service.
func (w *env) direct(email, password string) answer {
	w.Helper()
	return w.grant(url.Values{"grant_type": {"password"}, "username": {email}, "password": {password}})
}

// isOver fails if the session of a refresh token goes on at Keycloak.
func (w *env) isOver(a answer) {
	w.Helper()
	form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {a.text("refresh_token")}}
	if again := w.token(form); again.Status != 400 {
		w.Errorf("the session goes on at Keycloak: %v", again)
	}
}

// TestAllMeansAll: whoever ends all sessions of a user ends those that were begun at Keycloak, too, and their access
// tokens. Who signs in right afterwards has a token that is good at once.
func TestAllMeansAll(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	admin := w.admin()
	type somebody struct {
		email, id string
		ours      answer
	}
	for _, c := range []struct {
		name string
		end  func(u somebody)
		back func(u somebody) // so that the user can sign in again
	}{
		{"the user", func(u somebody) { w.wants(w.as(u.ours, "DELETE", sessionsPath), 204, "") }, func(somebody) {}},
		{"an administrator", func(u somebody) {
			w.wants(admin.asks("DELETE", usersPath+"/"+u.id+"/sessions", nil), 204, "")
		}, func(somebody) {}},
		{"deleted and restored", func(u somebody) {
			w.wants(admin.asks("DELETE", usersPath+"/"+u.id, nil), 204, "")
		}, func(u somebody) {
			w.wants(admin.asks("POST", usersPath+"/"+u.id+"/restore", nil), 200, "")
		}},
		{"disabled in Keycloak and restored", func(u somebody) {
			w.keycloakAdmin("PUT", "/users/"+w.keycloakID(u.email), body{"enabled": false}, nil)
			w.due("job:events")
			w.command("jobs")
		}, func(u somebody) {
			w.wants(admin.asks("POST", usersPath+"/"+u.id+"/restore", nil), 200, "")
		}},
		{"while Keycloak was away", func(u somebody) {
			w.kc.on("^(user_sessions|end_sessions) ", lost)
			w.wants(w.as(u.ours, "DELETE", sessionsPath), 204, "")
			w.kc.on("^(user_sessions|end_sessions) ", 0)
			w.due(kcTask(w.keycloakID(u.email)))
			w.command("jobs")
		}, func(somebody) {}},
	} {
		w.Run(c.name, func() {
			email, ours := w.signedIn()
			u := somebody{email, w.idOf(email), ours}
			theirs := w.direct(email, password)
			if !w.passes(ours) || !w.passes(theirs) {
				w.Fatal("the tokens are not good")
			}
			c.end(u)
			w.revoked(ours, theirs)
			c.back(u)
			w.isOver(ours)
			w.isOver(theirs)
			if after := w.signsIn(email); !w.passes(after) {
				w.Error("a token that was issued right afterwards is refused")
			}
		})
	}
}

// TestSessionsBegunAtKeycloak are listed and ended like others, under an id that stays.
func TestSessionsBegunAtKeycloak(t *testing.T) {
	w := sharedEnv(t)
	email, ours := w.signedIn()
	theirs := w.direct(email, password)
	list := func() (ids []string, origins string) {
		a := w.as(ours, "GET", sessionsPath)
		w.wants(a, 200, "")
		for _, item := range a.JSON["items"].([]any) {
			item := item.(body)
			ids, origins = append(ids, item["session_id"].(string)), origins+item["origin"].(string)+" "
			if (item["expires_at"] == nil) != (item["origin"] == "keycloak") {
				w.Errorf("it ends at %v: %v", item["expires_at"], item)
			}
		}
		return ids, origins
	}
	var ids []string
	w.eventually("it is listed", time.Minute, func() bool {
		var origins string
		ids, origins = list()
		return strings.Contains(origins, "keycloak") && strings.Contains(origins, "service")
	})
	if again, _ := list(); strings.Join(again, " ") != strings.Join(ids, " ") {
		t.Errorf("listed as %v, and then as %v", ids, again)
	}
	for _, id := range ids {
		if id != ours.text("session_id") {
			w.wants(w.as(ours, "DELETE", sessionsPath+"/"+id), 204, "")
		}
	}
	w.revoked(theirs)
	if ids, origins := list(); len(ids) != 1 || origins != "service " || !w.passes(ours) {
		t.Errorf("left are %v %s", ids, origins)
	}
}

// TestChangedCredential ends what was begun before, also a session that is over already, and is told by mail.
func TestChangedCredential(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.command("jobs") // from now on
	for name, change := range map[string]func(email string){"by an administrator": w.resetByAdmin, "by a link": w.choosesByLink} {
		w.Run(name, func() {
			email, ours := w.signedIn()
			theirs, over := w.direct(email, password), w.direct(email, password)
			w.keycloakAdmin("DELETE", "/sessions/"+unpacked(over.text("access_token"), 1)["sid"].(string), nil, nil)
			if !w.passes(over) {
				w.Fatal("nobody has revoked it yet")
			}
			second := time.Now().Truncate(time.Second) // of their times
			w.eventually("their second is over", 3*time.Second, func() bool { return time.Now().Truncate(time.Second).After(second) })
			change(email)
			w.eventually("their second is over", 3*time.Second, func() bool { return time.Since(second) > 2*time.Second })
			fresh := w.direct(email, password+"2")
			mails := len(w.mail.To(email))
			w.due("job:events")
			w.command("jobs")
			w.revoked(ours, theirs, over)
			if !w.passes(fresh) {
				w.Error("the token of the new password is refused")
			}
			w.isOver(theirs)
			if n := len(w.mail.To(email)) - mails; n != 1 {
				w.Fatalf("%d mails tell it", n)
			}
			notice := w.mail.To(email)[mails]
			if !strings.Contains(notice.Text, "was changed just now") || strings.Contains(notice.Text, "http") {
				w.Errorf("the mail says %s", notice.Text)
			}
		})
	}
	w.straysDie()
}

// TestResetUnlocks: whoever has chosen a new password is not kept out by guesses at the former one (S8).
func TestResetUnlocks(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	w.command("jobs") // from now on
	email, _, kc := w.member()
	locked := func() bool {
		var status struct{ Disabled bool }
		w.keycloakAdmin("GET", "/attack-detection/brute-force/users/"+kc, nil, &status)
		return status.Disabled
	}
	w.eventually("Keycloak has locked it", time.Minute, func() bool {
		w.token(url.Values{"grant_type": {"password"}, "username": {email}, "password": {"a wrong password"}})
		return locked()
	})
	w.choosesByLink(email)
	w.due("job:events")
	w.command("jobs")
	if locked() {
		t.Error("it is locked")
	}
}
