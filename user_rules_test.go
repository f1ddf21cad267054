package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	gonanoid "github.com/matoous/go-nanoid/v2"
)

// decisions is the README's table of role and scope: who and whom → a verdict for each
// action.
type decisions struct {
	actions []string
	rules   map[string][]string
}

func readDecisions(t *testing.T) decisions {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "| who | whom |")
	lines := strings.Split(table, "\n")
	d := decisions{strings.Fields(strings.ReplaceAll(lines[0], "|", " ")), map[string][]string{}}
	for _, line := range lines[2:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		d.rules[cells[0]+": "+cells[1]] = cells[2:]
	}
	if len(d.rules) != 6 || len(d.actions) != 7 {
		t.Fatalf("%d rules for %v", len(d.rules), d.actions)
	}
	return d
}

// rule is the line of the table that decides.
func (d decisions) rule(p principal, u user) string {
	network := u.NetworkID != "" && u.NetworkID == p.NetworkID
	station := u.StationID != "" && u.StationID == p.StationID
	switch role := p.Roles[0]; {
	case u.ID == p.UserID:
		return "anybody: themselves"
	case role == "admin":
		return "admin: everybody else"
	case role == "partner" && network && (u.Role == "user" || u.Role == "operator"):
		return "partner: a user or operator of its network"
	case role == "partner" && network:
		return "partner: a partner or admin of its network"
	case role == "operator" && network && station:
		return "operator: somebody of its network and station"
	}
	return "anybody: everybody else"
}

// verdict is yes, no, 404, or "" for what can't be.
func (d decisions) verdict(p principal, u user, do action) string {
	return d.rules[d.rule(p, u)][slices.Index(d.actions, string(do))]
}

// The table is the whole of principal.may: every role, in every relation to a user of
// every role, for every action.
func TestMay(t *testing.T) {
	table := readDecisions(t)
	seen := map[string]int{}
	for _, role := range roles {
		for _, scope := range [][2]string{{"N", "S"}, {"N", ""}, {"", "S"}, {"", ""}} {
			p := principal{UserID: "USR-me", Roles: []string{role}, NetworkID: scope[0], StationID: scope[1]}
			targets := []user{{ID: p.UserID, Role: role, NetworkID: scope[0], StationID: scope[1]}}
			for _, targetRole := range roles {
				for _, network := range []string{"N", "M", ""} {
					for _, station := range []string{"S", "T", ""} {
						targets = append(targets, user{ID: "USR-other", Role: targetRole, NetworkID: network, StationID: station})
					}
				}
			}
			for _, u := range targets {
				for _, do := range table.actions {
					want := table.verdict(p, u, action(do))
					seen[table.rule(p, u)+" "+want]++
					got := "yes"
					if err := p.may(action(do), u); err != nil && asProblem(err).Status == 404 {
						got = "404"
					} else if err != nil {
						got = "no"
					}
					if want != "" && got != want {
						t.Errorf("%s of %v: %+v may %s %+v: %s, not %s", table.rule(p, u), scope, p, do, u, got, want)
					}
				}
			}
		}
	}
	for name, verdicts := range table.rules {
		for i, verdict := range verdicts {
			if seen[name+" "+verdict] == 0 {
				t.Errorf("%s, %s is never tried", name, table.actions[i])
			}
		}
	}
}

// TestDecisions walks through the table over HTTP: real people of every role, towards
// users of every role in every scope. Each refusal is audited.
func TestDecisions(t *testing.T) {
	t.Parallel()
	table := readDecisions(t)
	w := newEnv(t, nil)
	admin := w.admin()
	callers := []*testUser{admin, admin.invited("partner", "N1", ""), admin.invited("partner", "", ""), admin.invited("operator", "N1", "S1"),
		admin.invited("operator", "N1", ""), admin.invited("user", "N1", "S1")}
	var targets []user
	for _, role := range roles {
		for _, scope := range [][2]string{{"N1", "S1"}, {"N1", "S2"}, {"N2", "S1"}, {"", ""}} {
			targets = append(targets, admin.admits(body{"role": role, "network_id": scope[0], "station_id": scope[1]}))
		}
	}
	w.register(newEmail()) // and somebody who is not confirmed yet

	type step struct {
		method, path string
		in           any
		status       int
		operation    string
	}
	steps := func(do action, u user) []step {
		path := usersPath + "/" + string(u.ID)
		switch do {
		case actRead:
			return []step{{"GET", path, nil, 200, "user"}}
		case actEdit:
			return []step{{"PATCH", path, body{"last_name": gonanoid.MustGenerate("abcdef", 8)}, 200, "patchUser"}}
		case actAssign:
			return []step{{"PATCH", path, body{"station_id": "S9"}, 200, "patchUser"}, {"PATCH", path, body{"station_id": u.StationID}, 200, "patchUser"}}
		case actCreate:
			return []step{{"POST", usersPath, body{"email": newEmail(), "role": u.Role, "network_id": u.NetworkID, "station_id": u.StationID}, 201, "createUser"}}
		case actDelete:
			return []step{{"DELETE", path, nil, 204, "deleteUser"}, {"POST", path + "/restore", nil, 200, "restoreUser"}}
		case actErase:
			if do := table.verdict(callers[0].principal(), u, do); do == "yes" {
				return nil // see TestErase
			}
			return []step{{"DELETE", path + "?erase=true", nil, 204, "deleteUser"}}
		}
		return []step{{"GET", path + "/sessions", nil, 200, "userSessions"},
			{"DELETE", path + "/sessions/" + string(newSessionID()), nil, 404, "endUserSession"}, {"DELETE", path + "/sessions", nil, 204, "endUserSessions"}}
	}
	refusals, requests := map[string]string{}, 0
	for _, caller := range callers {
		for _, u := range append(targets, caller.user) {
			for _, do := range table.actions {
				verdict := table.verdict(caller.principal(), u, action(do))
				for _, step := range steps(action(do), u) {
					back := step.in != nil && do == "assign" && jsonText(step.in) == jsonText(body{"station_id": u.StationID})
					if verdict == "" || u.ID == caller.ID && (back || step.operation == "endUserSessions") {
						continue // nothing would change, or all would end
					}
					a, status, slug := caller.asks(step.method, step.path, step.in), step.status, ""
					requests++
					switch {
					case verdict == "no":
						status, slug = 403, "forbidden"
					case verdict == "404":
						status, slug = 404, "user-not-found"
					case status == 404:
						slug = "not-found" // there is no such session
					}
					if a.Status != status || a.slug() != slug {
						t.Errorf("%s %s %s, %s %s %s: %s %s: %v, want %d %s", caller.Role, caller.NetworkID, caller.StationID, u.Role, u.NetworkID, u.StationID, step.method, do, a, status, slug)
					}
					if status >= 400 {
						target := u.ID
						if step.operation == "createUser" || slug == "not-found" {
							target = ""
						}
						refusals[a.Header.Get("X-Request-Id")] = fmt.Sprint(caller.ID, " ", step.operation, " ", target, " refused ", slug)
					}
				}
			}
		}
	}
	t.Logf("%d requests, %d refused", requests, len(refusals))
	for request, want := range refusals {
		if got := w.value(`select coalesce(string_agg(concat_ws(' ', actor, action, target, outcome, reason), ', '), '') from audit_log where request_id = $1`, request); got != want {
			t.Errorf("audited is %q, not %q", got, want)
		}
	}

	everybody := admin.list("limit=200&include_deleted=true")
	if n := w.value(`select count(*)::text from users`); n != fmt.Sprint(len(everybody)) {
		t.Errorf("an administrator sees %d of %s", len(everybody), n)
	}
	for _, caller := range callers {
		var seen []user
		for _, u := range everybody {
			if table.verdict(caller.principal(), u, actRead) == "yes" {
				seen = append(seen, u)
			}
		}
		if diff := cmp.Diff(ids(seen), ids(caller.list("limit=7"))); diff != "" || len(seen) == 0 {
			t.Errorf("%s %s %s: the list has (-want +got):\n%s", caller.Role, caller.NetworkID, caller.StationID, diff)
		}
	}
}

// Nobody gives what they don't have, and nobody raises themselves.
func TestAssign(t *testing.T) {
	w := sharedEnv(t)
	network, other := "N-"+gonanoid.Must(8), "N-"+gonanoid.Must(8)
	admin := w.admin()
	partner, operator := admin.invited("partner", network, ""), admin.invited("operator", network, "S1")
	u := partner.admits(body{"role": "user", "network_id": network})
	for _, c := range []struct {
		who    *testUser
		whom   userID
		in     body
		status int
		slug   string
	}{
		{partner, u.ID, body{"role": "operator", "station_id": "S1"}, 200, ""},
		{partner, u.ID, body{"role": "partner"}, 403, "forbidden"},
		{partner, u.ID, body{"role": "admin"}, 403, "forbidden"},
		{partner, u.ID, body{"network_id": other}, 403, "forbidden"},
		{partner, u.ID, body{"network_id": ""}, 403, "forbidden"},
		{partner, u.ID, body{"last_name": "Hopper", "network_id": network, "role": "operator"}, 200, ""}, // as it is already
		{partner, u.ID, body{"last_name": "Lovelace", "role": "admin"}, 403, "forbidden"},
		{partner, "me", body{"role": "admin"}, 403, "forbidden"},
		{partner, "me", body{"role": "user"}, 403, "forbidden"},
		{partner, partner.ID, body{"network_id": other}, 403, "forbidden"},
		{partner, partner.ID, body{"station_id": "S1"}, 403, "forbidden"},
		{partner, "me", body{"first_name": "Paula", "role": "partner"}, 200, ""},
		{operator, "me", body{"role": "admin"}, 403, "forbidden"},
		{operator, u.ID, body{"role": "user"}, 403, "forbidden"}, // whom it sees
		{operator, "me", body{"phone": "+4930123456"}, 200, ""},
		{admin, "me", body{"role": "user"}, 403, "forbidden"},
		{admin, "me", body{"network_id": network}, 403, "forbidden"},
		{admin, u.ID, body{"role": "admin", "network_id": other}, 200, ""},
		{partner, u.ID, body{"role": "user"}, 404, "user-not-found"}, // by now
		{admin, u.ID, body{"network_id": network}, 200, ""},
		{partner, u.ID, body{"role": "user"}, 403, "forbidden"},
	} {
		a := c.who.asks("PATCH", usersPath+"/"+string(c.whom), c.in)
		w.Logf("%s %s %v", c.who.Role, c.whom, c.in)
		w.wants(a, c.status, c.slug)
		for name, value := range c.in {
			if c.status == 200 && a.JSON[name] != value {
				t.Errorf("%s is not %v: %v", name, value, a)
			}
		}
	}
	for role, status := range map[string]int{"user": 201, "operator": 201, "partner": 403, "admin": 403} {
		if a := partner.asks("POST", usersPath, body{"email": newEmail(), "role": role, "network_id": network}); a.Status != status {
			t.Errorf("a partner creates a %s: %v", role, a)
		}
	}
	w.wants(partner.asks("POST", usersPath, body{"email": newEmail()}), 403, "forbidden") // of no network
	w.wants(partner.asks("POST", usersPath, body{"email": newEmail(), "network_id": other}), 403, "forbidden")
	if got := admin.asks("GET", usersPath+"/"+string(u.ID), nil); got.text("last_name") != "Hopper" {
		t.Errorf("a refused change was made in part: %v", got)
	}
}
