package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// keycloak/realm.json is the realm as the service needs it. A new realm is imported from it. The
// doctor compares an existing one leaf by leaf. What realm.json does not mention is left alone.
//
//go:embed keycloak/realm.json
var realmJSON string

// leeways are the leaves of realm.json that may have other values, and which. All other leaves must be
// as they are there, lists in any order. allow has the exceptions for lists and the password policy.
var leeways = []struct{ leaves, values *regexp.Regexp }{
	// Taste: texts, languages, how long a session or a link lasts, how soon guessing is slowed down
	// (that it is, is required). The sign-in of the service account checks its secret.
	{all(`displayName|rememberMe|resetPasswordAllowed|supportedLocales|defaultLocale|eventsListeners`), all(`.*`)},
	{all(`ssoSession.*|actionToken.*|failureFactor|.*Seconds|quickLoginCheckMilliSeconds`), all(`.*`)},
	{all(`.*\]\.(name|description|displayName|secret|webOrigins|.*length\.min)`), all(`.*`)},
	{all(`webAuthnPolicyPasswordless(PasskeysEnabled|RequireResidentKey)`), all(`.*`)}, // see checkAccount
	{all(`loginTheme`), all(`.+`)}, // compareRealm warns
	{all(`.*\]\.attributes\.(post\.logout|oauth2\.device|oidc\.ciba)\..*`), all(`.*`)},
	{all(`.*\]\.config\.(id|userinfo|introspection)\.token\.claim`), all(`.*`)},
	// Bounds: stricter is fine. Sync needs events of a day, 86,400 s, and 0 is for ever. A column holds a
	// name of 100. The others are tokenLife, tokenAlgorithms, and a client's default.
	{all(`sslRequired`), all(`all`)},
	{all(`(.*E|e)ventsExpiration`), all(`0?|\d{6,}`)},
	{all(`.*access(TokenLifespan|\.token\.lifespan)`), all(`[1-9]\d{0,2}|[12]\d{3}|3[0-5]\d\d|3600`)},
	{all(`.*(SignatureAlgorithm|signed\.response\.alg)`), all(`[REP]S256|EdDSA`)},
	{all(`.*\[(username|firstName|lastName)\]\..*length\.max`), all(`[1-9]\d?|100`)},
	{all(`.*\.use\.refresh\.tokens`), all(``)},
}

// all is a pattern of all of a text.
func all(pattern string) *regexp.Regexp { return regexp.MustCompile(`^(?s:` + pattern + `)$`) }

// unsaid are leaves that realm.json leaves out, because Keycloak's default is right. They must have no value.
var unsaid = []string{"access.token.lifespan", "access.token.signed.response.alg", "multivalued", "required"}

const offlineScope = "offline_access"

// operators is in the place of a value that only the operator knows; there must be one.
const operators = "set by the operator"

// wantedRealm is realm.json for this deployment, without the leaves that are the operator's, and with
// those that Keycloak has in other documents, or that an import must not mention.
func wantedRealm(cfg config) (must map[string]any, err error) {
	quoted := func(s string) string { q, _ := json.Marshal(s); return string(q) }
	document := []byte(strings.NewReplacer(
		`"auth-client"`, quoted(cfg.AuthClientID), `"backend-admin"`, quoted(cfg.BackendClientID),
		`"${KEYCLOAK_BACKEND_CLIENT_SECRET}"`, quoted(string(cfg.BackendClientSecret)),
		"${PUBLIC_URL:http://localhost:3000}", cfg.PublicURL, "${REALM:myrealm}", cfg.KeycloakRealm).Replace(realmJSON))
	var parts struct {
		Users      []struct{ ClientRoles any }
		Components map[string][]struct{ Config map[string][]string }
	}
	if err := errors.Join(json.Unmarshal(document, &must), json.Unmarshal(document, &parts)); err != nil {
		return nil, err
	}
	for _, key := range []string{"components", "defaultRole", "roles"} {
		delete(must, key)
	}
	operatorsOwn := func(v any) bool { return strings.Contains(text(v), "${") }
	for _, client := range objects(must["clients"]) {
		client["redirectUris"] = slices.DeleteFunc(client["redirectUris"].([]any), operatorsOwn)
		maps.DeleteFunc(client, func(_ string, v any) bool { return operatorsOwn(v) })
		if client["clientId"] == cfg.AuthClientID {
			client["publicClient"], client["secret"] = cfg.AuthClientSecret == "", string(cfg.AuthClientSecret)
		}
	}
	maps.DeleteFunc(must, func(_ string, v any) bool { return operatorsOwn(v) })
	profile := parts.Components["org.keycloak.userprofile.UserProfileProvider"][0].Config["kc.user.profile.config"][0]
	account := "service-account-" + cfg.BackendClientID
	more, err := json.Marshal(map[string]any{
		"userProfile": json.RawMessage(profile), "enabledEventTypes": userEventTypes,
		"smtpServer": map[string]any{"host": operators, "from": operators},
		"users":      []any{map[string]any{"username": account, "clientRoles": parts.Users[0].ClientRoles}},
		"requiredActions": []any{ // the others are a matter of taste
			map[string]any{"alias": "VERIFY_EMAIL", "enabled": true},      // keeps unconfirmed accounts out
			map[string]any{"alias": "UPDATE_EMAIL", "enabled": true},      // a new address is proven before it counts
			map[string]any{"alias": "UPDATE_PASSWORD", "enabled": true}}}) // invitations and forgotten passwords use it
	return must, errors.Join(err, json.Unmarshal(more, &must))
}

const (
	giveAdmin = "Give an administrator of Keycloak: -admin-user NAME -admin-password-file FILE."
	runFix    = "-fix sets it; -fix -dry-run shows what it would set. " + giveAdmin
	byHand    = "Set it in Keycloak's admin console → Realm settings; -fix leaves it to you."
)

// checkRealm compares the realm with realm.json, as an administrator or as the service account.
func (d *doctor) checkRealm(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 50*time.Second) // an administrator's token lives for a minute
	defer cancel()
	api := &adminAPI{kc: d.kc, admin: d.adminUser != ""}
	if api.admin {
		t, err := d.kc.signInAdmin(ctx, d.adminUser, d.adminPassword)
		if !d.check("administrator", err == nil, fmt.Sprint(err), "Give a user of Keycloak's realm master, "+
			"without a second factor, and the right password.", "Keycloak: themes", "realm") {
			return
		}
		defer d.kc.admin.Logout(context.WithoutCancel(ctx), "admin-cli", "", "master", t.RefreshToken)
		api.token = t.AccessToken
	} else {
		api.token, api.err = d.kc.serviceToken(ctx)
	}
	var server struct {
		Themes map[string][]struct{ Name string }
	}
	if api.call(ctx, "GET", "serverinfo", nil, &server); api.err != nil {
		d.unknown(api.err.Error(), giveAdmin, "Keycloak: themes", "realm")
		return
	}
	ours := struct{ Name string }{"auth-service"}
	whole := slices.Contains(server.Themes["email"], ours) && slices.Contains(server.Themes["login"], ours)
	d.check("Keycloak: themes", whole, "auth-service is not installed, or not all of it",
		"Copy keycloak/themes/auth-service into the directory themes of Keycloak, and restart it.")
	switch d.compareRealm(ctx, api); {
	case api.err != nil:
		d.unknown(api.err.Error(), giveAdmin, "realm")
	case !api.admin:
		d.unknown("Keycloak shows the rest of it to administrators only", giveAdmin, "realm")
	}
}

// compareRealm reports what differs, or with -fix what it has set and what differs still.
func (d *doctor) compareRealm(ctx context.Context, api *adminAPI) {
	must, err := wantedRealm(d.cfg)
	live := api.readRealm(ctx)
	if api.err = cmp.Or(api.err, err); api.err != nil {
		return
	}
	if !api.admin {
		maps.DeleteFunc(must, func(key string, _ any) bool { return live[key] == nil })
	}
	d.checkMappers(live)
	if api.admin {
		d.checkAccount(live)
	}
	if theme := text(live["loginTheme"]); theme != "" {
		d.warn("Keycloak: login theme", theme == text(must["loginTheme"]), "the realm's is "+theme+", not auth-service",
			"Nothing, if it is yours. See docs/restyle.md for one on top of auth-service.")
	}
	var found, left []finding
	should := merge("realm", live, must, &found).(map[string]any)
	if left = found; d.fix && !d.dryRun {
		err := api.writeRealm(ctx, live, should)
		d.check("-fix", err == nil, fmt.Sprint(err), "Does the administrator have the right to manage the realm?")
		left = nil
		if merge("realm", api.readRealm(ctx), must, &left); api.err != nil {
			return
		}
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

// checkMappers looks for what realm.json can't say: mappers that must not be there.
func (d *doctor) checkMappers(live map[string]any) {
	i := indexOf(live["clients"], map[string]any{"clientId": d.cfg.AuthClientID})
	if i < 0 {
		return
	}
	client := objects(live["clients"])[i]
	mappers, scopes := objects(client["protocolMappers"]), including(client["defaultClientScopes"], nil)
	for _, scope := range objects(live["clientScopes"]) {
		if slices.Contains(scopes, scope["name"]) {
			mappers = append(mappers, objects(scope["protocolMappers"])...)
		}
	}
	subject, groups := "", ""
	for _, m := range mappers {
		config, _ := m["config"].(map[string]any)
		switch kind := m["protocolMapper"]; {
		case kind == "oidc-sha256-pairwise-sub-mapper", config["claim.name"] == "sub":
			subject = nameOf(m)
		case kind == "oidc-group-membership-mapper" && config["access.token.claim"] == "true":
			groups = nameOf(m)
		}
	}
	d.check("Keycloak: subject", subject == "", "the mapper "+subject+" makes sub another one than the user's id",
		"Remove it from the client that people sign in to, and from its default client scopes.")
	d.warn("Keycloak: token size", groups == "", "the mapper "+groups+" lists all groups of a user in each access token; "+
		"this service accepts 32 KiB, proxies mostly 8", "Take its claim out of the access token.")
}

// checkAccount looks for what people can't do with their own account. That is for the operator to say.
func (d *doctor) checkAccount(live map[string]any) {
	roles, _ := live["roles"].(map[string]any)
	standard, _ := live["defaultRole"].(map[string]any)
	deletes := slices.ContainsFunc(objects(roles["realm"]), func(role map[string]any) bool {
		return role["name"] == standard["name"] && strings.Contains(text(role["composites"]), `"delete-account"`)
	})
	var off []string
	for _, action := range slices.Sorted(maps.Keys(accountActions)) {
		enabled := slices.ContainsFunc(objects(live["requiredActions"]), func(a map[string]any) bool {
			return a["alias"] == accountActions[action] && a["enabled"] == true
		})
		if !enabled || action == "delete" && !deletes {
			off = append(off, action)
		}
	}
	d.warn("Keycloak: own account", len(off) == 0, "people can't do this with their account: "+strings.Join(off, ", "),
		"Enable its required action: Authentication → Required actions. For delete the realm's default roles need "+
			"the role delete-account of the client account, too.")
	d.warn("Keycloak: passkeys", live["webAuthnPolicyPasswordlessPasskeysEnabled"] == true,
		"nobody signs in with a passkey",
		"Authentication → Policies → WebAuthn passwordless policy → Enable passkeys. That is in Keycloak 26.4 and newer.")
}

// merge returns what is with each leaf as it must be, and adds a finding for each that differs. What
// must does not mention stays.
func merge(path string, is, must any, found *[]finding) any {
	add := func(path string, is, must any, fix string) {
		*found = append(*found, finding{path, "wrong", cmp.Or(text(is), "nothing"), cmp.Or(text(must), "nothing"), "", fix})
	}
	if wanted, ok := must.(map[string]any); ok {
		live, _ := is.(map[string]any)
		if live == nil && (len(wanted) == 0 || nameOf(wanted) != "") { // a client, a mapper, an attribute, a validator
			add(path, is, "as in keycloak/realm.json", runFix) // a client has a secret
			return must
		}
		merged := map[string]any{}
		maps.Copy(merged, live)
		keys := append(slices.Collect(maps.Keys(wanted)), unsaid...)
		slices.Sort(keys)
		for _, key := range slices.Compact(keys) {
			if v := merge(path+"."+key, live[key], wanted[key], found); v != nil || live[key] != nil {
				merged[key] = v
			}
		}
		return merged
	}
	if elements := objects(must); len(elements) > 0 {
		merged, _ := is.([]any)
		merged = slices.Clone(merged)
		for _, e := range objects(merged) { // whoever lacks a required attribute can't sign in
			if e["required"] != nil && indexOf(must, e) < 0 {
				add(path+"["+nameOf(e)+"].required", e["required"], nil, byHand)
			}
		}
		for _, e := range elements {
			i := indexOf(merged, e)
			if i < 0 {
				i, merged = len(merged), append(merged, nil)
			}
			merged[i] = merge(path+"["+nameOf(e)+"]", merged[i], e, found)
		}
		return merged
	}
	switch must = allow(strings.TrimPrefix(path, "realm."), is, must); {
	case canonical(is) == canonical(must):
		return is
	case must == operators:
		add(path, is, must, byHand)
		return is
	}
	add(path, is, must, runFix)
	return must
}

// indexOf returns the index of the element that has the same name, or is a mapper with the same effect; or -1.
func indexOf(list any, element map[string]any) int {
	effect := func(e map[string]any) string {
		config, _ := e["config"].(map[string]any)
		return text(config["claim.name"]) + text(config["included.client.audience"])
	}
	return slices.IndexFunc(objects(list), func(e map[string]any) bool {
		return nameOf(e) == nameOf(element) || effect(e) != "" && effect(e) == effect(element)
	})
}

// allow returns what a leaf should be: what it is, as far as that will do, else what it must be.
func allow(leaf string, is, must any) any {
	for _, l := range leeways {
		if l.leaves.MatchString(leaf) && l.values.MatchString(text(is)) {
			return is
		}
	}
	wanted, _ := must.([]any)
	switch {
	case leaf == "enabledEventTypes", strings.HasSuffix(leaf, ".redirectUris"):
		return including(is, wanted)
	case strings.HasSuffix(leaf, "ClientScopes"):
		kept, _ := is.([]any) // sessions without an end are in no list
		kept = slices.DeleteFunc(slices.Clone(kept), func(scope any) bool { return scope == offlineScope })
		if strings.HasSuffix(leaf, ".defaultClientScopes") {
			kept = including(kept, []any{"basic"}) // it has the claim sub
		}
		return kept
	case strings.Contains(leaf, "].permissions.") && slices.Contains(wanted, any("user")):
		return including(is, []any{"admin"}) // what users may do themselves is a matter of taste
	case leaf == "passwordPolicy":
		return stricterPolicy(text(is), text(must))
	case must == operators && text(is) != "":
		return is
	}
	return must
}

// including returns a list with the wanted elements that it lacks. A pattern has those that it matches:
// https://a/* has https://a/b.
func including(list any, wanted []any) []any {
	complete, _ := list.([]any)
	for _, e := range wanted {
		if !slices.ContainsFunc(complete, func(has any) bool {
			prefix, pattern := strings.CutSuffix(text(has), "*")
			return has == e || pattern && strings.HasPrefix(text(e), prefix)
		}) {
			complete = append(slices.Clip(complete), e)
		}
	}
	return complete
}

// stricterPolicy returns a password policy with the rules of must that it lacks, and as long.
func stricterPolicy(policy, must string) string {
	policy = regexp.MustCompile(`\blength\(\d\)`).ReplaceAllString(policy, "length(10)")
	for rule := range strings.SplitSeq(must, " and ") {
		name, _, _ := strings.Cut(rule, "(")
		if !regexp.MustCompile(`\b` + name + `\b`).MatchString(policy) {
			policy = strings.TrimPrefix(policy+" and "+rule, " and ")
		}
	}
	return policy
}

func nameOf(e map[string]any) string {
	return cmp.Or(text(e["clientId"]), text(e["username"]), text(e["alias"]), text(e["name"]))
}

func objects(v any) (list []map[string]any) {
	elements, _ := v.([]any)
	for _, e := range elements {
		if object, ok := e.(map[string]any); ok {
			list = append(list, object)
		}
	}
	return list
}

// text is a string as it is, another value as JSON, and "" for none.
func text(v any) string {
	if s, ok := v.(string); ok || v == nil {
		return s
	}
	encoded, _ := json.Marshal(v) // it was decoded from JSON
	return string(encoded)
}

// canonical is equal for what means the same to Keycloak: lists in any order, numbers and switches in
// quotes, and no value for false.
func canonical(v any) string {
	if list, ok := v.([]any); ok {
		v = slices.SortedFunc(slices.Values(list), func(a, b any) int { return strings.Compare(text(a), text(b)) })
	}
	if t := text(v); !slices.Contains([]string{"false", "null", "[]"}, t) {
		return t
	}
	return ""
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
	live := map[string]any{}
	if a.admin {
		a.call(ctx, "POST", "/partial-export?exportClients=true&exportGroupsAndRoles=true", nil, &live)
	} else {
		token := readServiceToken(a.token)
		granted := []any{}
		for _, role := range token.Access["realm-management"].Roles {
			if role != "query-groups" && role != "query-users" { // they are part of view-users
				granted = append(granted, role)
			}
		}
		live["defaultSignatureAlgorithm"] = token.Algorithm
		live["users"] = []any{map[string]any{"username": "service-account-" + a.kc.cfg.BackendClientID,
			"clientRoles": map[string]any{"realm-management": granted}}}
	}
	for _, client := range objects(live["clients"]) {
		delete(client, "secret") // it is masked, and Keycloak leaves it as it is
		uris, _ := client["redirectUris"].([]any)
		for i, uri := range uris {
			if strings.HasPrefix(text(uri), "/") {
				uris[i] = text(client["rootUrl"]) + text(uri)
			}
		}
	}
	var profile any
	a.call(ctx, "GET", "/events/config", nil, &live) // has all types of events where the realm has none
	a.call(ctx, "GET", "/users/profile", nil, &profile)
	live["userProfile"] = profile
	return live
}

// writeRealm writes what differs, with as few calls as Keycloak allows. a is a copy: after an error,
// the realm can still be read.
func (a adminAPI) writeRealm(ctx context.Context, live, should map[string]any) error {
	changed := maps.Clone(should)
	maps.DeleteFunc(changed, func(key string, v any) bool { return reflect.DeepEqual(v, live[key]) })
	part := func(key string) []map[string]any { // the elements of a list that differ
		list := objects(changed[key])
		delete(changed, key)
		return slices.DeleteFunc(list, func(e map[string]any) bool {
			return slices.ContainsFunc(objects(live[key]), func(was map[string]any) bool { return reflect.DeepEqual(e, was) })
		})
	}
	for _, client := range part("clients") {
		a.writeClient(ctx, client, objects(live["clientScopes"]))
	}
	for _, account := range part("users") { // after the clients: it may be new
		a.writeServiceRoles(ctx, account)
	}
	for _, action := range part("requiredActions") {
		a.call(ctx, "PUT", "/authentication/required-actions/"+nameOf(action), action, nil)
	}
	if profile := changed["userProfile"]; profile != nil {
		a.call(ctx, "PUT", "/users/profile", profile, nil)
		delete(changed, "userProfile")
	}
	if len(changed) > 0 { // Keycloak leaves the rest as it is
		a.call(ctx, "PUT", "", changed, nil)
	}
	return a.err
}

// writeClient sends all of a client: Keycloak resets some of what is left out. Scopes are added and
// removed one by one.
func (a *adminAPI) writeClient(ctx context.Context, client map[string]any, scopes []map[string]any) {
	if client["id"] == nil {
		a.call(ctx, "POST", "/clients", client, nil)
		return
	}
	path := "/clients/" + text(client["id"])
	a.call(ctx, "PUT", path, client, nil)
	defaults, _ := client["defaultClientScopes"].([]any)
	for _, scope := range scopes {
		switch id := text(scope["id"]); {
		case slices.Contains(defaults, scope["name"]):
			a.call(ctx, "PUT", path+"/default-client-scopes/"+id, nil, nil)
		case scope["name"] == offlineScope:
			a.call(ctx, "DELETE", path+"/default-client-scopes/"+id, nil, nil)
			a.call(ctx, "DELETE", path+"/optional-client-scopes/"+id, nil, nil)
		}
	}
}

// writeServiceRoles grants the roles that are missing and revokes those that the service does not
// need: they would make its secret worth more to a thief.
func (a *adminAPI) writeServiceRoles(ctx context.Context, account map[string]any) {
	needed, _ := account["clientRoles"].(map[string]any)["realm-management"].([]any)
	live := a.readRealm(ctx) // again: the account may have come with its client
	id := func(list any, name string) (id string) {
		for _, e := range objects(list) {
			if nameOf(e) == name {
				id = text(e["id"])
			}
		}
		return id
	}
	client := "/clients/" + id(live["clients"], "realm-management")
	path := "/users/" + id(live["users"], nameOf(account)) + "/role-mappings" + client
	var roles, granted []any
	a.call(ctx, "GET", client+"/roles", nil, &roles) // not …/available: while a realm is being deleted, that fails
	a.call(ctx, "GET", path, nil, &granted)
	for _, role := range objects(roles) {
		switch should, has := slices.Contains(needed, role["name"]), id(granted, nameOf(role)) != ""; {
		case should && !has:
			a.call(ctx, "POST", path, []any{role}, nil)
		case has && !should:
			a.call(ctx, "DELETE", path, []any{role}, nil)
		}
	}
}
