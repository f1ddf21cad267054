package main

import (
	"os"
	"strings"
	"testing"
)

// The README's table of role and scope is the whole of principal.may: every role, in
// every relation to a user of every role, for every action.
func TestMay(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "| who | whom |")
	rules := map[string][]string{} // who and whom → a verdict for each action
	lines := strings.Split(table, "\n")
	actions := strings.Split(strings.Trim(strings.ReplaceAll(lines[0], " ", ""), "|"), "|")
	for _, line := range lines[2:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		rules[strings.TrimSpace(cells[0])+": "+strings.TrimSpace(cells[1])] = cells[2:]
	}
	if len(rules) != 6 || len(actions) != 6 {
		t.Fatalf("%d rules for %v", len(rules), actions)
	}
	rule := func(p principal, u user) string {
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
				name := rule(p, u)
				for i, do := range actions {
					want := strings.TrimSpace(rules[name][i])
					seen[name+" "+want]++
					got := "yes"
					if err := p.may(action(do), u); err != nil && asProblem(err).Status == 404 {
						got = "404"
					} else if err != nil {
						got = "no"
					}
					if want != "" && got != want {
						t.Errorf("%s of %v: %+v may %s %+v: %s, not %s", name, scope, p, do, u, got, want)
					}
				}
			}
		}
	}
	for name, verdicts := range rules {
		for i, verdict := range verdicts {
			if seen[name+" "+strings.TrimSpace(verdict)] == 0 {
				t.Errorf("%s, %s is never tried", name, actions[i])
			}
		}
	}
}
