package main

import (
	"testing"

	"github.com/Nerzal/gocloak/v13"
	"github.com/google/go-cmp/cmp"
)

// TestCompare is the table of who wins where the two stores differ.
func TestCompare(t *testing.T) {
	local := user{ID: "USR-0123456789abcdef", KeycloakID: "id", Email: "ada@example.test", Username: "ada", FirstName: "Ada", LastName: "Lovelace",
		Role: roleOperator, NetworkID: "N1", StationID: "S1", Source: sourceWeb, IsVerified: true, IsActive: true}
	remote := func(change func(*keycloakUser)) *keycloakUser {
		attributes := attributesOf(local)
		ku := keycloakUser{gocloak.User{ID: gocloak.StringP("id"), Email: gocloak.StringP("ADA@example.test"), Username: gocloak.StringP("ada"),
			FirstName: gocloak.StringP("Ada"), LastName: gocloak.StringP("Lovelace"), Enabled: gocloak.BoolP(true),
			EmailVerified: gocloak.BoolP(true), Attributes: &attributes}}
		if change != nil {
			change(&ku)
		}
		return &ku
	}
	with := func(change func(*user)) *user {
		u := local
		change(&u)
		return &u
	}
	disabled := func(ku *keycloakUser) { ku.Enabled = gocloak.BoolP(false) }
	for _, c := range []struct {
		name   string
		local  *user
		remote *keycloakUser
		found  []difference
		want   *user // nil: as local
		push   bool
	}{
		{name: "neither store has one", want: &user{}},
		{name: "in sync, but for capitals", local: &local, remote: remote(nil)},
		{name: "address, username and names are Keycloak's", local: &local, remote: remote(func(ku *keycloakUser) {
			ku.Email, ku.Username, ku.FirstName, ku.LastName = gocloak.StringP("new@example.test"), gocloak.StringP("new"), nil, gocloak.StringP("King")
		}), found: []difference{diffProfile}, want: with(func(u *user) {
			u.Email, u.Username, u.FirstName, u.LastName = "new@example.test", "new", "", "King"
		})},
		{name: "verified is Keycloak's", local: &local, remote: remote(func(ku *keycloakUser) { ku.EmailVerified = nil }),
			found: []difference{diffVerified}, want: with(func(u *user) { u.IsVerified = false })},
		{name: "role and scope are PostgreSQL's", local: &local, remote: remote(func(ku *keycloakUser) {
			(*ku.Attributes)[attrRoles] = []string{roleAdmin}
		}), found: []difference{diffRole}, push: true},
		{name: "attributes are gone", local: &local, remote: remote(func(ku *keycloakUser) { ku.Attributes = nil }),
			found: []difference{diffRole}, push: true},
		{name: "disabled in Keycloak: the stricter side wins", local: &local, remote: remote(disabled),
			found: []difference{diffDisabled}, want: with(func(u *user) { u.IsActive = false })},
		{name: "deleted in PostgreSQL: the stricter side wins", local: with(func(u *user) { u.IsActive = false }), remote: remote(nil),
			found: []difference{diffDeleted}, push: true},
		{name: "disabled in both stores", local: with(func(u *user) { u.IsActive = false }), remote: remote(disabled)},
		{name: "not in Keycloak", local: &local, found: []difference{diffMissing}, want: with(func(u *user) { u.IsActive = false })},
		{name: "deleted, and not in Keycloak", local: with(func(u *user) { u.IsActive = false })},
		{name: "an open registration belongs to its task", local: with(func(u *user) { u.Registration, u.IsVerified = "REG-x", false }),
			remote: remote(disabled)},
		{name: "who is being erased belongs to its task", local: with(func(u *user) { u.Email, u.IsActive = "", false }), remote: remote(nil)},
		{name: "in sync, but for the spelling", local: with(func(u *user) { u.Email, u.FirstName = "ada@xn--bcher-kva.example", "Zoë" }),
			remote: remote(func(ku *keycloakUser) {
				ku.Email, ku.FirstName = gocloak.StringP("ada@bücher.example"), gocloak.StringP("Zoe\u0308 ")
			})},
		{name: "only in Keycloak: imported without scope", remote: remote(nil), found: []difference{diffUnknown}, push: true,
			want: with(func(u *user) {
				u.Email, u.Role, u.NetworkID, u.StationID, u.Source = "ADA@example.test", roleUser, "", "", sourceInternal
			})},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want == nil {
				c.want = c.local
			}
			if diff := cmp.Diff(comparison{c.found, *c.want, c.push}, compare(c.local, c.remote)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
