package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/oauth2"
)

// The doctor looks at a deployment and says what is wrong with it and how to mend it. It
// changes nothing. What the service's own rights can't see it could not check; with an
// administrator of Keycloak it checks all.

// finding is one line of the doctor's report.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`           // ok, wrong, advice, unknown
	Detail string `json:"detail,omitempty"` // what is wrong, or why it could not be checked
	Mend   string `json:"mend,omitempty"`
}

const mostSkew = 10 * time.Second // between two clocks

// errUnwell ends the program with status 1, after the report has said everything.
var errUnwell = errors.New("something is wrong with this deployment")

// doctor checks a deployment.
type doctor struct {
	s        *server
	findings []finding
}

// see reports one thing: fine, or what is wrong with it.
func (d *doctor) see(name string, fine bool, detail, mend string) bool {
	if fine {
		d.findings = append(d.findings, finding{Name: name, Status: "ok"})
	} else {
		d.findings = append(d.findings, finding{name, "wrong", detail, mend})
	}
	return fine
}

func (d *doctor) unknown(name string, why string) {
	d.findings = append(d.findings, finding{Name: name, Status: "unknown", Detail: "could not check: " + why})
}

// runDoctor reads the arguments, checks, and reports.
func runDoctor(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	flags := flag.NewFlagSet("doctor", flag.ContinueOnError)
	flags.SetOutput(out)
	asJSON := flags.Bool("json", false, "report in JSON")
	adminUser := flags.String("admin-user", "", "an administrator of Keycloak's master realm")
	adminPassword := flags.String("admin-password", "", "its password")
	passwordFile := flags.String("admin-password-file", "", "a file with its password")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *passwordFile != "" {
		text, err := os.ReadFile(*passwordFile)
		if err != nil {
			return err
		}
		*adminPassword = strings.TrimSpace(string(text))
	}
	d := &doctor{}
	cfg, err := loadConfig(getenv)
	if d.see("variables", err == nil, fmt.Sprint(err), "Correct these variables; README.md lists all of them.") {
		if d.s, err = newServer(ctx, cfg, newLogger(io.Discard, cfg)); err != nil {
			return err
		}
		defer d.s.store.pool.Close()
		d.checkPublicURL()
		d.checkPostgreSQL(ctx)
		d.checkKeycloak(ctx)
		d.checkRealm(ctx, *adminUser, *adminPassword)
	}
	return d.report(*asJSON, out)
}

func (d *doctor) report(asJSON bool, out io.Writer) error {
	wrong := slices.ContainsFunc(d.findings, func(f finding) bool { return f.Status == "wrong" })
	if asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(d.findings); err != nil {
			return err
		}
	} else {
		for _, f := range d.findings {
			fmt.Fprintf(out, "%-8s %s", f.Status, f.Name)
			if f.Detail != "" {
				fmt.Fprintf(out, ": %s", f.Detail)
			}
			fmt.Fprintln(out)
			if f.Mend != "" {
				fmt.Fprintf(out, "         → %s\n", f.Mend)
			}
		}
	}
	if wrong {
		return errUnwell
	}
	return nil
}

func (d *doctor) checkPublicURL() {
	if d.see("PUBLIC_URL", true, "", ""); !d.s.cfg.https() {
		d.findings[len(d.findings)-1] = finding{"PUBLIC_URL", "advice", "it is not https: links, passwords and tokens can be read on the way",
			"Put TLS in front of the service, or set TLS_CERT_FILE and TLS_KEY_FILE."}
	}
}

// rights are what the service's role must be allowed to do.
var rights = map[string]string{"schema_version": "select", "users": "select, insert, update, delete", "user_registrations": "select, insert, update",
	"sessions": "select, insert, update", "refresh_tokens": "select, insert, update, delete", "withdrawals": "select, insert, delete",
	"rate_limits": "select, insert, update, delete", "audit_floods": "select, insert, update, delete", "audit_log": "select, insert",
	"audit_seals": "select, insert", "sync_place": "select, insert, update", "sync_runs": "select, insert, update"}

func (d *doctor) checkPostgreSQL(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	pool := d.s.store.pool
	var version int
	var now time.Time
	err := pool.QueryRow(ctx, `select current_setting('server_version_num')::int, clock_timestamp()`).Scan(&version, &now)
	if !d.see("PostgreSQL: reachable", err == nil, fmt.Sprint(storeError(err)), "Check DATABASE_URL, the network, and the role's password.") {
		for _, name := range []string{"version", "clock", "schema", "rights"} {
			d.unknown("PostgreSQL: "+name, "it is not reachable")
		}
		return
	}
	d.see("PostgreSQL: version", version >= 140000, fmt.Sprintf("it is %d", version/10000), "Use PostgreSQL 14 or newer.")
	skew := time.Since(now).Abs()
	d.see("PostgreSQL: clock", skew < mostSkew, fmt.Sprintf("it differs from this machine's by %v", skew.Round(time.Second)), "Run NTP on both machines.")
	var have string
	err = pool.QueryRow(ctx, `select sha256 from schema_version`).Scan(&have)
	if !d.see("PostgreSQL: schema", err == nil && have == digest(schemaSQL), "it is not this version's",
		"Run \"auth-service migrate\" as the owner of the tables. (A service that owns them does so when it starts.)") {
		d.unknown("PostgreSQL: rights", "the schema is another version's")
		return
	}
	var missing []string
	for _, table := range slices.Sorted(maps.Keys(rights)) {
		for right := range strings.SplitSeq(rights[table], ", ") {
			var may bool
			if err := pool.QueryRow(ctx, `select has_table_privilege($1, $2)`, table, right).Scan(&may); err != nil || !may {
				missing = append(missing, right+" on "+table)
			}
		}
	}
	d.see("PostgreSQL: rights", len(missing) == 0, "the role lacks "+strings.Join(missing, ", "),
		"Create the role as README.md describes before \"auth-service migrate\"; or grant these rights.")
	var mayAlter bool
	if err := pool.QueryRow(ctx, `select has_table_privilege('audit_log', 'update, delete, truncate') or pg_has_role(relowner, 'usage')
		from pg_class where oid = 'audit_log'::regclass`).Scan(&mayAlter); err != nil || mayAlter {
		d.findings = append(d.findings, finding{"PostgreSQL: record", "advice", "the role of the service could change or delete what is on record",
			"Run the service as a role of its own: README.md, \"Production roles\"."})
	}
}

func (d *doctor) checkKeycloak(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	kc, cfg := d.s.kc, d.s.cfg
	var discovery struct{ Issuer string }
	err := kc.getJSON(ctx, "discovery", keycloakTimeout, ".well-known/openid-configuration", &discovery)
	if !d.see("Keycloak: reachable", err == nil, fmt.Sprint(err), "Check KEYCLOAK_URL, KEYCLOAK_REALM and the network.") {
		for _, name := range []string{"issuer", "clock", "service account", "service account's roles", "algorithm"} {
			d.unknown("Keycloak: "+name, "it is not reachable")
		}
		return
	}
	d.see("Keycloak: issuer", discovery.Issuer == cfg.issuer(), fmt.Sprintf("tokens say %s, expected is %s", discovery.Issuer, cfg.issuer()),
		"Set KEYCLOAK_PUBLIC_URL to what Keycloak calls itself, or its hostname to that.")
	if skew, err := kc.clockSkew(ctx); err != nil {
		d.unknown("Keycloak: clock", err.Error())
	} else {
		d.see("Keycloak: clock", skew < mostSkew, fmt.Sprintf("it differs from this machine's by %v", skew.Round(time.Second)), "Run NTP on both machines.")
	}
	token, err := kc.serviceToken(ctx)
	if !d.see("Keycloak: service account", err == nil, fmt.Sprint(err), "Check KEYCLOAK_BACKEND_CLIENT_ID and KEYCLOAK_BACKEND_CLIENT_SECRET, and that the client has a service account.") {
		d.unknown("Keycloak: service account's roles", "it can't sign in")
		d.unknown("Keycloak: algorithm", "it can't sign in")
		return
	}
	signed, err := jose.ParseSignedCompact(token, tokenAlgorithms)
	d.see("Keycloak: algorithm", err == nil, "the realm signs with an algorithm that the service does not accept", "Set the realm's default signature algorithm to RS256, PS256, ES256 or EdDSA.")
	if err != nil {
		d.unknown("Keycloak: service account's roles", "its token can't be read")
		return
	}
	var claims struct {
		RealmAccess struct{ Roles []string }            `json:"realm_access"`
		Access      map[string]struct{ Roles []string } `json:"resource_access"`
	}
	if err := json.Unmarshal(signed.UnsafePayloadWithoutVerification(), &claims); err != nil {
		d.unknown("Keycloak: service account's roles", "its token can't be read")
		return
	}
	wanted, has := []string{"manage-users", "view-events", "view-users"}, claims.Access["realm-management"].Roles
	var lacks, more []string
	for _, role := range wanted {
		if !slices.Contains(has, role) {
			lacks = append(lacks, role)
		}
	}
	for _, role := range has {
		if !slices.Contains(append(wanted, "query-users", "query-groups"), role) { // the last two are part of view-users
			more = append(more, role)
		}
	}
	d.see("Keycloak: service account's roles", len(lacks)+len(more) == 0, fmt.Sprintf("it lacks %v and has more than it needs: %v", lacks, more),
		"Give it exactly manage-users, view-users and view-events of realm-management.")
}

// clockSkew is how far Keycloak's clock is from ours.
func (k *keycloak) clockSkew(ctx context.Context) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, k.realmURL(".well-known/openid-configuration"), nil)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	resp, err := k.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	theirs, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return 0, errors.New("it does not say its time")
	}
	return max(start.Sub(theirs.Add(time.Second)), theirs.Sub(time.Now()), 0), nil // Date has whole seconds
}

// realmView is what an administrator sees of the realm.
type realmView struct {
	Realm struct {
		VerifyEmail, LoginWithEmailAllowed, DuplicateEmailsAllowed, RegistrationAllowed, BruteForceProtected bool
		RevokeRefreshToken, EventsEnabled, AdminEventsEnabled, AdminEventsDetailsEnabled                     bool
		InternationalizationEnabled                                                                          bool
		RefreshTokenMaxReuse, AccessTokenLifespan                                                            int
		SSLRequired, EmailTheme, PasswordPolicy, DefaultSignatureAlgorithm                                   string
		EnabledEventTypes                                                                                    []string
		SMTPServer                                                                                           map[string]string
	}
	Client  clientView
	Profile struct {
		Attributes []profileAttribute
	}
	Themes struct {
		Themes map[string][]struct{ Name string }
	}
}

type clientView struct {
	ID                                                                    string
	Enabled, PublicClient, DirectAccessGrantsEnabled, StandardFlowEnabled bool
	ImplicitFlowEnabled, FullScopeAllowed                                 bool
	RedirectURIs, DefaultClientScopes                                     []string
	Attributes                                                            map[string]string
	ProtocolMappers                                                       []struct {
		ProtocolMapper string
		Config         map[string]string
	}
}

type profileAttribute struct {
	Name        string
	Multivalued bool
	Required    *struct{ Roles []string }
	Permissions struct{ View, Edit []string }
	Validations map[string]struct{ Options []string }
}

// realmRule is a setting that the service relies on.
type realmRule struct {
	name string
	fine func(realmView, config) bool
	mend string
}

// realmRules are all of them; keycloak/realm.json has them as they should be.
var realmRules = []realmRule{
	{"verify email", func(v realmView, _ config) bool { return v.Realm.VerifyEmail }, "Switch \"Verify email\" on: it keeps unconfirmed accounts out."},
	{"login with email", func(v realmView, _ config) bool { return v.Realm.LoginWithEmailAllowed }, "Switch \"Login with email\" on."},
	{"duplicate emails", func(v realmView, _ config) bool { return !v.Realm.DuplicateEmailsAllowed }, "Switch \"Duplicate emails\" off."},
	{"user registration", func(v realmView, _ config) bool { return !v.Realm.RegistrationAllowed }, "Switch Keycloak's own \"User registration\" off: people register here."},
	{"brute force detection", func(v realmView, _ config) bool { return v.Realm.BruteForceProtected }, "Switch brute force detection on."},
	{"revoke refresh token", func(v realmView, _ config) bool { return v.Realm.RevokeRefreshToken }, "Switch \"Revoke refresh token\" on."},
	{"refresh token max reuse", func(v realmView, _ config) bool {
		return !v.Realm.RevokeRefreshToken || v.Realm.RefreshTokenMaxReuse == 1
	}, "Set \"Refresh token max reuse\" to 1: with 0 one lost answer ends a session."},
	{"access token lifespan", func(v realmView, _ config) bool {
		return v.Realm.AccessTokenLifespan > 0 && time.Duration(v.Realm.AccessTokenLifespan)*time.Second <= tokenLife
	}, "Set the access token lifespan to 5 minutes; withdrawals are kept for one hour."},
	{"user events", func(v realmView, _ config) bool { return v.Realm.EventsEnabled }, "Switch \"Save events\" of users on: sync reads them."},
	{"user event types", func(v realmView, _ config) bool {
		return len(v.Realm.EnabledEventTypes) == 0 || !slices.ContainsFunc(userEventTypes, func(t string) bool { return !slices.Contains(v.Realm.EnabledEventTypes, t) })
	}, "Save at least the events " + strings.Join(userEventTypes, ", ") + "."},
	{"admin events", func(v realmView, _ config) bool { return v.Realm.AdminEventsEnabled }, "Switch \"Save admin events\" on: sync reads them."},
	{"admin events without details", func(v realmView, _ config) bool { return !v.Realm.AdminEventsDetailsEnabled }, "Switch \"Include representation\" off: it would hold the secrets of verification links."},
	{"email theme", func(v realmView, _ config) bool { return v.Realm.EmailTheme == "auth-service" }, "Set the email theme to auth-service."},
	{"email theme is installed", func(v realmView, _ config) bool {
		return slices.ContainsFunc(v.Themes.Themes["email"], func(t struct{ Name string }) bool { return t.Name == "auth-service" })
	}, "Copy keycloak/themes/auth-service into Keycloak's themes directory."},
	{"SMTP", func(v realmView, _ config) bool {
		return v.Realm.SMTPServer["host"] != "" && v.Realm.SMTPServer["from"] != ""
	}, "Set the realm's SMTP server and sender: all mails go by them."},
	{"require SSL", func(v realmView, _ config) bool { return !strings.EqualFold(v.Realm.SSLRequired, "none") }, "Set \"Require SSL\" to external requests."},
	{"internationalization", func(v realmView, _ config) bool { return v.Realm.InternationalizationEnabled }, "Switch internationalization on: mails are in the person's language."},
	{"client: enabled", func(v realmView, _ config) bool { return v.Client.Enabled }, "Enable the client."},
	{"client: public", func(v realmView, _ config) bool { return v.Client.PublicClient }, "Switch client authentication off: it is a public client."},
	{"client: direct access grants", func(v realmView, _ config) bool { return v.Client.DirectAccessGrantsEnabled }, "Switch direct access grants on: POST /api/v1/auth/login uses them."},
	{"client: standard flow", func(v realmView, _ config) bool { return v.Client.StandardFlowEnabled }, "Switch the standard flow on: GET /auth/login uses it."},
	{"client: implicit flow", func(v realmView, _ config) bool { return !v.Client.ImplicitFlowEnabled }, "Switch the implicit flow off (RFC 9700 §2.1.2)."},
	{"client: full scope", func(v realmView, _ config) bool { return !v.Client.FullScopeAllowed }, "Switch \"Full scope allowed\" off: tokens would carry Keycloak's own roles."},
	{"client: PKCE", func(v realmView, _ config) bool { return v.Client.Attributes["pkce.code.challenge.method"] == "S256" }, "Set the PKCE method to S256 (RFC 7636)."},
	{"client: refresh tokens", func(v realmView, _ config) bool { return v.Client.Attributes["use.refresh.tokens"] != "false" }, "Switch \"Use refresh tokens\" on."},
	{"client: redirect to /auth/callback", func(v realmView, cfg config) bool { return v.Client.mayRedirect(cfg.PublicURL + "/auth/callback") }, "Add PUBLIC_URL/auth/callback to the valid redirect URIs."},
	{"client: redirect to /account/ready", func(v realmView, cfg config) bool { return v.Client.mayRedirect(cfg.PublicURL + "/account/ready") }, "Add PUBLIC_URL/account/* to the valid redirect URIs."},
	{"client: claim sub", func(v realmView, _ config) bool { return slices.Contains(v.Client.DefaultClientScopes, "basic") }, "Add the client scope \"basic\" as a default: it has the claim sub."},
	{"client: audience", func(v realmView, cfg config) bool {
		return v.Client.maps("oidc-audience-mapper", "included.client.audience", cfg.AuthClientID)
	}, "Add an audience mapper for the client itself."},
	claimRule(attrUserID), claimRule(attrRoles), claimRule(attrNetworkID), claimRule(attrStationID),
	{"client: roles is an array", func(v realmView, _ config) bool {
		return !v.Client.maps("oidc-usermodel-attribute-mapper", "claim.name", attrRoles) || v.Client.maps("oidc-usermodel-attribute-mapper", "claim.name", attrRoles, "multivalued", "true")
	}, "Switch \"Multivalued\" of the mapper roles on."},
	attributeRule(attrUserID), attributeRule(attrRoles), attributeRule(attrNetworkID), attributeRule(attrStationID),
	attributeRule(attrRegistrationID), attributeRule(attrURL), attributeRule(attrToken), attributeRule(attrCode),
	{"user profile: known roles only", func(v realmView, _ config) bool {
		a := v.attribute(attrRoles)
		return a == nil || slices.Equal(slices.Sorted(slices.Values(a.Validations["options"].Options)), slices.Sorted(slices.Values(roles)))
	}, "Give the attribute roles the validator options with user, admin, partner and operator."},
	{"user profile: names are optional", func(v realmView, _ config) bool {
		first, last := v.attribute("firstName"), v.attribute("lastName")
		return (first == nil || first.Required == nil) && (last == nil || last.Required == nil)
	}, "Make firstName and lastName optional: whoever has none could not sign in."},
}

func claimRule(name string) realmRule {
	return realmRule{"client: claim " + name, func(v realmView, _ config) bool {
		return v.Client.maps("oidc-usermodel-attribute-mapper", "claim.name", name, "user.attribute", name, "access.token.claim", "true")
	}, "Add a mapper of the user attribute " + name + " to the claim of that name, in the access token."}
}

func attributeRule(name string) realmRule {
	return realmRule{"user profile: " + name, func(v realmView, _ config) bool {
		a := v.attribute(name)
		return a != nil && a.Multivalued == (name == attrRoles) && slices.Equal(a.Permissions.Edit, []string{"admin"}) && !slices.Contains(a.Permissions.View, "user")
	}, "Declare the attribute " + name + " in the user profile, for administrators only: Keycloak drops unknown ones silently, and people must not change it."}
}

func (v realmView) attribute(name string) *profileAttribute {
	i := slices.IndexFunc(v.Profile.Attributes, func(a profileAttribute) bool { return a.Name == name })
	if i < 0 {
		return nil
	}
	return &v.Profile.Attributes[i]
}

// maps says whether the client has a mapper of a kind with these settings.
func (c clientView) maps(kind string, settings ...string) bool {
	for _, m := range c.ProtocolMappers {
		fits := m.ProtocolMapper == kind
		for i := 0; i < len(settings); i += 2 {
			fits = fits && m.Config[settings[i]] == settings[i+1]
		}
		if fits {
			return true
		}
	}
	return false
}

func (c clientView) mayRedirect(target string) bool {
	return slices.ContainsFunc(c.RedirectURIs, func(pattern string) bool {
		prefix, wild := strings.CutSuffix(pattern, "*")
		return pattern == target || wild && strings.HasPrefix(target, prefix)
	})
}

// checkRealm checks each setting of the realm, with the eyes of an administrator.
func (d *doctor) checkRealm(ctx context.Context, user, password string) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	view, err := d.s.kc.viewRealm(ctx, user, password)
	for _, rule := range realmRules {
		switch name := "realm: " + rule.name; {
		case user == "":
			d.unknown(name, "the service's own rights don't show it; give -admin-user")
		case err != nil:
			d.unknown(name, err.Error())
		default:
			d.see(name, rule.fine(view, d.s.cfg), "it is not as the service needs it", rule.mend)
		}
	}
}

// viewRealm reads the settings as an administrator of the master realm.
func (k *keycloak) viewRealm(ctx context.Context, user, password string) (v realmView, err error) {
	if user == "" {
		return v, nil
	}
	admin := &oauth2.Config{ClientID: "admin-cli", Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInParams,
		TokenURL: k.cfg.KeycloakURL + "/realms/master/protocol/openid-connect/token"}}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, k.client)
	token, err := admin.PasswordCredentialsToken(ctx, user, password)
	if err != nil {
		return v, errors.New("the administrator can't sign in")
	}
	client := admin.Client(ctx, token)
	get := func(path string, answer any) error {
		resp, err := client.Get(k.cfg.KeycloakURL + "/admin/" + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("Keycloak answers %s to the administrator", resp.Status)
		}
		return json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(answer)
	}
	realm := "realms/" + url.PathEscape(k.cfg.KeycloakRealm)
	var clients []clientView
	if err := errors.Join(get(realm, &v.Realm), get(realm+"/users/profile", &v.Profile), get("serverinfo", &v.Themes),
		get(realm+"/clients?clientId="+url.QueryEscape(k.cfg.AuthClientID), &clients)); err != nil {
		return v, err
	}
	if len(clients) > 0 {
		v.Client = clients[0]
	}
	return v, nil
}
