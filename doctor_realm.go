package main

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// keycloak/realm.json is the realm as the service needs it. A new realm is imported from it. The
// doctor compares an existing one leaf by leaf. What realm.json does not mention is left alone.
//
//go:embed keycloak/realm.json
var realmJSON string

// leeways are the leaves of realm.json that may have other values. All others must be as they are
// there, lists in any order.
var leeways = []struct {
	leaves  *regexp.Regexp
	values  *regexp.Regexp // that will do, too; nil for lists
	atLeast []any          // elements of a list that may have more; nil for all of realm.json's
}{
	// Taste: texts, Keycloak's own pages, how long a session or a link lasts, how soon guessing is
	// slowed down (that it is, is required). The sign-in of the service account checks its secret.
	{leaf(`displayName|rememberMe|resetPasswordAllowed|supportedLocales|defaultLocale|eventsListeners`), value(`.*`), nil},
	{leaf(`ssoSession.*|actionToken.*|failureFactor|.*Seconds|quickLoginCheckMilliSeconds`), value(`.*`), nil},
	{leaf(`.*\]\.(name|description|displayName|secret|optionalClientScopes|.*length\.min)`), value(`.*`), nil},
	{leaf(`.*\]\.attributes\.(post\.logout|oauth2\.device|oidc\.ciba)\..*`), value(`.*`), nil},
	{leaf(`.*\]\.config\.(id|userinfo|introspection)\.token\.claim`), value(`.*`), nil},
	// Bounds: stricter is fine. stricterPolicy does the same for passwordPolicy.
	{leaf(`sslRequired`), value(`all`), nil},
	{leaf(`(e|.*E)ventsExpiration`), value(`0?|\d{6,}`), nil}, // sync needs a day, 86,400 s; 0 is for ever
	{leaf(`(.*\.)?access(TokenLifespan|\.token\.lifespan)`), // seconds, at most tokenLife
		value(`[1-9]\d{0,2}|[12]\d{3}|3[0-5]\d\d|3600`), nil},
	{leaf(`(.*\.)?(defaultSignatureAlgorithm|access\.token\.signed\.response\.alg)`), // tokenAlgorithms
		value(`[REP]S256|EdDSA`), nil},
	{leaf(`.*\[(username|firstName|lastName)\]\..*length\.max`), value(`[1-9]\d?|100`), nil}, // what columns hold
	{leaf(`.*\.use\.refresh\.tokens`), value(``), nil},                                       // Keycloak's default is true
	// At least: others may have their own use.
	{leaf(`enabledEventTypes|.*\.(redirectUris|webOrigins)`), nil, nil},
	{leaf(`.*\.defaultClientScopes`), nil, []any{"basic"}}, // it has the claim sub
	{leaf(`.*\[(email|firstName|lastName|locale)\]\.permissions\..*`), nil, []any{"admin"}},
	{leaf(`.*\[username\]\.permissions\.view`), nil, []any{"admin"}},
}

func leaf(path string) *regexp.Regexp    { return regexp.MustCompile(`^realm\.(` + path + `)$`) }
func value(values string) *regexp.Regexp { return regexp.MustCompile(`^(` + values + `)$`) }

// unsaid are leaves that realm.json leaves out, because Keycloak's default is right. They must have no value.
var unsaid = []string{"access.token.lifespan", "access.token.signed.response.alg", "multivalued", "required"}

// operators is in the place of a value that only the operator knows; there must be one.
const operators = "set by the operator"

// wantedRealm is realm.json for this deployment, without the leaves that are the operator's, and with
// some for which an import relies on Keycloak's defaults: an existing realm may have other values.
func wantedRealm(cfg config) (must map[string]any, err error) {
	quoted := func(s string) string { q, _ := json.Marshal(s); return string(q) }
	document := []byte(strings.NewReplacer(
		`"auth-client"`, quoted(cfg.AuthClientID), `"backend-admin"`, quoted(cfg.BackendClientID),
		`"${KEYCLOAK_BACKEND_CLIENT_SECRET}"`, quoted(string(cfg.BackendClientSecret)),
		"${PUBLIC_URL:http://localhost:3000}", cfg.PublicURL, "${REALM:myrealm}", cfg.KeycloakRealm).Replace(realmJSON))
	var types []any
	var profile map[string]any
	var parts struct {
		Users      []struct{ ClientRoles map[string]any }
		Components map[string][]struct{ Config map[string][]string }
	}
	if err := errors.Join(json.Unmarshal(document, &must), json.Unmarshal(document, &parts)); err != nil {
		return nil, err
	}
	escaped := parts.Components["org.keycloak.userprofile.UserProfileProvider"][0].Config["kc.user.profile.config"][0]
	err = errors.Join(json.Unmarshal([]byte(escaped), &profile), json.Unmarshal([]byte(text(userEventTypes)), &types))
	operatorsOwn := func(v any) bool { return strings.Contains(text(v), "${") }
	for _, client := range objects(must["clients"]) {
		client["enabled"] = true
		if attributes, ok := client["attributes"].(map[string]any); ok {
			attributes["use.refresh.tokens"] = "true"
		}
		client["redirectUris"] = slices.DeleteFunc(client["redirectUris"].([]any), operatorsOwn)
		maps.DeleteFunc(client, func(_ string, v any) bool { return operatorsOwn(v) })
	}
	delete(must, "components")
	maps.DeleteFunc(must, func(_ string, v any) bool { return operatorsOwn(v) })
	account := "service-account-" + cfg.BackendClientID
	maps.Copy(must, map[string]any{
		"userProfile": profile, "defaultSignatureAlgorithm": "RS256", "enabledEventTypes": types,
		"smtpServer": map[string]any{"host": operators, "from": operators},
		"users":      []any{map[string]any{"username": account, "clientRoles": parts.Users[0].ClientRoles}},
		"requiredActions": []any{ // an import that lists some switches Keycloak's others off
			map[string]any{"alias": "VERIFY_EMAIL", "enabled": true},      // keeps unconfirmed accounts out
			map[string]any{"alias": "UPDATE_PASSWORD", "enabled": true}}}) // invitations and forgotten passwords use it
	return must, err
}

// merge returns what is with each leaf as it must be, and adds a finding for each that differs. What
// must does not mention stays.
func merge(path string, is, must any, found *[]finding) any {
	switch must := must.(type) {
	case map[string]any:
		live, ok := is.(map[string]any)
		if !ok && (len(must) == 0 || nameOf(must) != "") { // a client, a mapper, an attribute, a validator
			*found = append(*found, wrongLeaf(path, is, "as in keycloak/realm.json", runFix)) // a client has a secret
			return must
		}
		merged := map[string]any{}
		maps.Copy(merged, live)
		for _, key := range slices.Sorted(maps.Keys(must)) {
			if v := merge(path+"."+key, live[key], must[key], found); v != nil {
				merged[key] = v
			}
		}
		for _, key := range unsaid {
			if live[key] != nil && must[key] == nil {
				merged[key] = merge(path+"."+key, live[key], nil, found)
			}
		}
		return merged
	case []any:
		if len(objects(must)) > 0 {
			return mergeNamed(path, is, must, found)
		}
	}
	switch must = allow(path, is, must); {
	case must == operators && text(is) != "", canonical(is) == canonical(must):
		return is
	case must == operators:
		*found = append(*found, wrongLeaf(path, is, must, byHand))
		return is
	}
	*found = append(*found, wrongLeaf(path, is, must, runFix))
	return must
}

// mergeNamed is merge for a list of elements with names.
func mergeNamed(path string, is any, must []any, found *[]finding) []any {
	live, _ := is.([]any)
	merged := slices.Clone(live)
	for _, e := range objects(merged) { // whoever lacks a required attribute can't sign in
		if e["required"] != nil && indexOf(must, e) < 0 {
			*found = append(*found, wrongLeaf(path+"["+nameOf(e)+"].required", e["required"], nil, byHand))
		}
	}
	for _, e := range objects(must) {
		path := path + "[" + nameOf(e) + "]"
		if i := indexOf(merged, e); i >= 0 {
			merged[i] = merge(path, merged[i], e, found)
		} else {
			merged = append(merged, merge(path, nil, e, found))
		}
	}
	return merged
}

// indexOf returns the index of the mapper that has the same effect, whatever its name, else of the
// element that has the same name, or -1.
func indexOf(list []any, element map[string]any) int {
	effect := func(e map[string]any) string {
		config, _ := e["config"].(map[string]any)
		return text(config["claim.name"]) + text(config["included.client.audience"])
	}
	i := slices.IndexFunc(objects(list), func(e map[string]any) bool {
		return e["protocolMapper"] == element["protocolMapper"] && effect(e) != "" && effect(e) == effect(element)
	})
	if i < 0 {
		i = slices.IndexFunc(objects(list), func(e map[string]any) bool { return nameOf(e) == nameOf(element) })
	}
	return i
}

// allow returns what a leaf should be: what it is, as far as leeways and stricterPolicy allow.
func allow(path string, is, must any) any {
	for _, l := range leeways {
		switch {
		case !l.leaves.MatchString(path):
		case l.values != nil && l.values.MatchString(text(is)):
			return is
		case l.values == nil:
			elements, _ := must.([]any)
			if l.atLeast != nil {
				elements = l.atLeast
			}
			return including(is, elements)
		}
	}
	if path == "realm.passwordPolicy" {
		return stricterPolicy(text(is), text(must))
	}
	return must
}

// including returns the list with the elements of must that it lacks. A pattern of redirect URIs has
// those that it matches: https://a/* has https://a/b.
func including(is any, must []any) any {
	list, _ := is.([]any)
	for _, e := range must {
		if !slices.ContainsFunc(list, func(has any) bool {
			prefix, wild := strings.CutSuffix(text(has), "*")
			return has == e || wild && strings.HasPrefix(text(e), prefix)
		}) {
			list = append(slices.Clip(list), e)
		}
	}
	return list
}

// stricterPolicy returns a password policy with the rules of must that it lacks, and as long.
func stricterPolicy(policy, must string) string {
	for rule := range strings.SplitSeq(must, " and ") {
		name, bound, _ := strings.Cut(strings.TrimSuffix(rule, ")"), "(")
		has := regexp.MustCompile(`\b` + name + `\b(?:\((\w*)\))?`).FindStringSubmatch(policy)
		if has == nil {
			policy = strings.TrimPrefix(policy+" and "+rule, " and ")
			continue
		}
		length, _ := strconv.Atoi(has[1])
		if least, _ := strconv.Atoi(bound); name == "length" && length < least {
			policy = strings.Replace(policy, has[0], rule, 1)
		}
	}
	return policy
}

func wrongLeaf(path string, is, must any, fix string) finding {
	return finding{path, "wrong", cmp.Or(text(is), "nothing"), cmp.Or(text(must), "nothing"), "", fix}
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
