package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"
)

const (
	giveAdmin = "Give an administrator of Keycloak: -admin-user NAME -admin-password-file FILE."
	runFix    = "-fix sets it; -fix -dry-run shows what it would set. " + giveAdmin
	byHand    = "Set it in Keycloak's admin console → Realm settings; -fix leaves it to you."
)

// checkRealm compares the realm with realm.json, as an administrator or as the service account.
func (d *doctor) checkRealm(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 50*time.Second) // an administrator's token lives for a minute
	defer cancel()
	api := &adminAPI{kc: d.s.kc}
	if d.adminUser == "" {
		api.token, _ = d.s.kc.serviceToken(ctx) // checkServiceAccount reports the error
	} else if t, err := d.s.kc.admin.LoginAdmin(ctx, d.adminUser, d.adminPassword, "master"); d.check("administrator",
		err == nil, fmt.Sprint(keycloakError(err)),
		"Give a user of Keycloak's realm master, without a second factor, and the right password.") {
		defer d.s.kc.admin.Logout(context.WithoutCancel(ctx), "admin-cli", "", "master", t.RefreshToken)
		api.token, api.admin = t.AccessToken, true
	}
	if api.token == "" {
		d.unknown("nobody could sign in to Keycloak's admin API", giveAdmin, "realm", "Keycloak: email theme")
		return
	}
	var server struct {
		Themes map[string][]struct{ Name string }
	}
	if api.call(ctx, "GET", "serverinfo", nil, &server); api.err == nil {
		d.check("Keycloak: email theme", slices.Contains(server.Themes["email"], struct{ Name string }{"auth-service"}),
			"it is not installed", "Copy keycloak/themes/auth-service into the directory themes of Keycloak, and restart it.")
		d.compareRealm(ctx, api)
	}
	if api.err != nil {
		d.unknown(api.err.Error(), giveAdmin, "realm")
	} else if !api.admin {
		d.unknown("Keycloak shows the rest of it to administrators only", giveAdmin, "realm")
	}
}

// compareRealm reports what differs, or with -fix what it has set and what differs still.
func (d *doctor) compareRealm(ctx context.Context, api *adminAPI) {
	must, err := wantedRealm(d.s.cfg)
	live := api.readRealm(ctx)
	if api.err = cmp.Or(api.err, err); api.err != nil {
		return
	}
	if !api.admin {
		maps.DeleteFunc(must, func(key string, _ any) bool { return live[key] == nil })
	}
	var found, left []finding
	should := merge("realm", live, must, &found).(map[string]any)
	if left = found; d.fix && !d.dryRun {
		api.writeRealm(ctx, live, should)
		if err, api.err = api.err, nil; err != nil { // what was written is seen below
			d.check("-fix", false, err.Error(), "Does the administrator have the right to manage the realm?")
		}
		if live, left = api.readRealm(ctx), nil; api.err != nil {
			return
		}
		merge("realm", live, must, &left)
	}
	for _, f := range found {
		if !slices.ContainsFunc(left, func(l finding) bool { return l.Name == f.Name }) {
			d.findings = append(d.findings, finding{Name: f.Name, Status: "fixed", Is: f.Is, Must: f.Must})
		}
	}
	for _, f := range left {
		if d.dryRun && f.Fix == runFix {
			f.Status, f.Fix = "planned", ""
		}
		d.findings = append(d.findings, f)
	}
	if len(left) == 0 && api.admin {
		d.check("realm", true, "", "")
	}
}

// adminAPI is Keycloak's admin API. After an error it makes no more calls.
type adminAPI struct {
	kc    *keycloak
	token string
	admin bool // the token is an administrator's, not the service account's
	err   error
}

// call sends body and reads answer. path is serverinfo or that below the realm.
func (a *adminAPI) call(ctx context.Context, method, path string, body, answer any) {
	if a.err != nil {
		return
	}
	if path != "serverinfo" {
		path = "realms/" + url.PathEscape(a.kc.cfg.KeycloakRealm) + path
	}
	resp, err := a.kc.admin.RestyClient().R().SetContext(ctx).SetAuthToken(a.token).SetBody(body).
		Execute(method, a.kc.cfg.KeycloakURL+"/admin/"+path)
	switch {
	case err != nil:
		a.err = keycloakError(err)
	case resp.IsError():
		a.err = fmt.Errorf("the admin API answers %s to %s %s: %.300s", resp.Status(), method, path, resp.Body())
	case answer != nil:
		a.err = json.Unmarshal(resp.Body(), answer)
	}
}

// readRealm returns the realm in the form of realm.json, as far as Keycloak shows it.
func (a *adminAPI) readRealm(ctx context.Context) map[string]any {
	live, granted := map[string]any{}, []any{}
	if a.admin {
		var actions any
		a.call(ctx, "GET", "", nil, &live)
		a.call(ctx, "GET", "/authentication/required-actions", nil, &actions)
		if live["id"] == nil {
			a.err = cmp.Or(a.err, errors.New("the administrator may not view the realm"))
		}
		live["requiredActions"] = actions
		live["clients"] = append(a.client(ctx, a.kc.cfg.AuthClientID), a.client(ctx, a.kc.cfg.BackendClientID)...)
		_, granted = a.serviceRoles(ctx)
	} else if token, err := readServiceToken(a.token); err == nil {
		live["defaultSignatureAlgorithm"] = token.Algorithm
		for _, role := range token.Access["realm-management"].Roles {
			if role != "query-groups" && role != "query-users" { // they are part of view-users
				granted = append(granted, role)
			}
		}
	}
	var profile any
	a.call(ctx, "GET", "/events/config", nil, &live) // has all types of events where the realm has none
	a.call(ctx, "GET", "/users/profile", nil, &profile)
	live["userProfile"] = profile
	live["users"] = []any{map[string]any{"username": "service-account-" + a.kc.cfg.BackendClientID,
		"clientRoles": map[string]any{"realm-management": granted}}}
	return live
}

// client returns a list of the one client, or of none. Its redirect URIs are made absolute.
func (a *adminAPI) client(ctx context.Context, clientID string) (found []any) {
	a.call(ctx, "GET", "/clients?clientId="+url.QueryEscape(clientID), nil, &found)
	for _, client := range objects(found) {
		uris, _ := client["redirectUris"].([]any)
		for i, uri := range uris {
			if strings.HasPrefix(text(uri), "/") {
				uris[i] = text(client["rootUrl"]) + text(uri)
			}
		}
	}
	return found
}

// serviceRoles returns the names of the service account's roles in realm-management and the path of
// them, or "" if there is no such account.
func (a *adminAPI) serviceRoles(ctx context.Context) (path string, granted []any) {
	granted = []any{}
	backend, management := objects(a.client(ctx, a.kc.cfg.BackendClientID)), objects(a.client(ctx, "realm-management"))
	if len(backend) == 0 || len(management) == 0 || backend[0]["serviceAccountsEnabled"] != true {
		return "", granted
	}
	var user struct{ ID string }
	a.call(ctx, "GET", "/clients/"+text(backend[0]["id"])+"/service-account-user", nil, &user)
	path = "/users/" + user.ID + "/role-mappings/clients/" + text(management[0]["id"])
	var roles []any
	a.call(ctx, "GET", path, nil, &roles)
	for _, role := range objects(roles) {
		granted = append(granted, role["name"])
	}
	return path, granted
}

// writeRealm writes what differs, with as few calls as Keycloak allows.
func (a *adminAPI) writeRealm(ctx context.Context, live, should map[string]any) {
	changed := maps.Clone(should)
	maps.DeleteFunc(changed, func(key string, v any) bool { return reflect.DeepEqual(v, live[key]) })
	if profile := changed["userProfile"]; profile != nil {
		a.call(ctx, "PUT", "/users/profile", profile, nil)
	}
	was := objects(live["requiredActions"])
	for i, action := range objects(changed["requiredActions"]) {
		if i >= len(was) || !reflect.DeepEqual(action, was[i]) {
			a.call(ctx, "PUT", "/authentication/required-actions/"+nameOf(action), action, nil)
		}
	}
	was = objects(live["clients"])
	for i, client := range objects(changed["clients"]) {
		if i >= len(was) {
			a.call(ctx, "POST", "/clients", client, nil)
		} else if !reflect.DeepEqual(client, was[i]) {
			a.writeClient(ctx, was[i], client)
		}
	}
	for _, account := range objects(changed["users"]) {
		a.writeServiceRoles(ctx, account)
	}
	for _, key := range []string{"userProfile", "requiredActions", "clients", "users"} {
		delete(changed, key)
	}
	if len(changed) > 0 { // Keycloak leaves the rest as it is
		a.call(ctx, "PUT", "", changed, nil)
	}
}

// writeClient sends all of a client: Keycloak resets some of what is left out. Default scopes are
// added one by one.
func (a *adminAPI) writeClient(ctx context.Context, was, client map[string]any) {
	path := "/clients/" + text(was["id"])
	a.call(ctx, "PUT", path, client, nil)
	if reflect.DeepEqual(was["defaultClientScopes"], client["defaultClientScopes"]) {
		return
	}
	var scopes []any
	a.call(ctx, "GET", "/client-scopes", nil, &scopes)
	for _, scope := range objects(scopes) {
		if scope["name"] == "basic" {
			a.call(ctx, "PUT", path+"/default-client-scopes/"+text(scope["id"]), nil, nil)
		}
	}
}

// writeServiceRoles grants the roles that are missing and revokes those that the service does not
// need: they would make its secret worth more to a thief.
func (a *adminAPI) writeServiceRoles(ctx context.Context, account map[string]any) {
	needed, _ := account["clientRoles"].(map[string]any)["realm-management"].([]any)
	path, _ := a.serviceRoles(ctx)
	var missing, granted []map[string]any
	a.call(ctx, "GET", path+"/available", nil, &missing)
	a.call(ctx, "GET", path, nil, &granted)
	needs := func(role map[string]any) bool { return slices.Contains(needed, role["name"]) }
	missing = slices.DeleteFunc(missing, func(role map[string]any) bool { return !needs(role) })
	granted = slices.DeleteFunc(granted, needs)
	if len(missing) > 0 {
		a.call(ctx, "POST", path, missing, nil)
	}
	if len(granted) > 0 {
		a.call(ctx, "DELETE", path, granted, nil)
	}
}
