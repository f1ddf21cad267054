package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/oauth2"
)

// realmView is what Keycloak's admin API shows of the realm, as far as the service relies
// on it. keycloak/realm.json has all of it as it should be.
type realmView struct {
	cfg    config
	Events struct {
		EventsEnabled, AdminEventsEnabled, AdminEventsDetailsEnabled bool
		EnabledEventTypes                                            []string
		EventsExpiration                                             int
	}
	Profile struct{ Attributes []profileAttribute }
	Server  struct{ Themes map[string][]theme }
	Realm   struct {
		ID                                                                    string // "": the rest is not shown either
		RegistrationAllowed, RegistrationEmailAsUsername, EditUsernameAllowed bool
		VerifyEmail, LoginWithEmailAllowed, DuplicateEmailsAllowed            bool
		BruteForceProtected, RevokeRefreshToken, InternationalizationEnabled  bool
		RefreshTokenMaxReuse, AccessTokenLifespan                             int
		SSLRequired, EmailTheme                                               string
		SMTPServer, Attributes                                                map[string]string
	}
	Actions []struct {
		Alias   string
		Enabled bool
	}
	Clients []clientView
	Client  clientView // that people sign in to, the only one of Clients
}

type theme struct{ Name string }

type clientView struct {
	Enabled, PublicClient, DirectAccessGrantsEnabled, StandardFlowEnabled bool
	ImplicitFlowEnabled, FullScopeAllowed                                 bool
	RootURL                                                               string
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
	Required    *struct{}
	Permissions struct{ View, Edit []string }
	Validations map[string]struct{ Options []string }
}

// realmPart is one answer of the admin API, and the settings in it.
type realmPart struct {
	name          string
	path          string // of the admin API
	administrator bool   // the service's own rights don't show it
	into          func(*realmView) any
	where         string // in Keycloak's admin console
	rules         []realmRule
}

// realmRule is a setting that the service relies on.
type realmRule struct {
	name string
	fine func(realmView) bool
	mend string // in the words of the admin console
}

// realmParts have all of them.
var realmParts = []realmPart{
	{"events", "{realm}/events/config", false, func(v *realmView) any { return &v.Events },
		"Realm settings → Events → ", []realmRule{
			{"user events", func(v realmView) bool { return v.Events.EventsEnabled },
				`User events settings: switch "Save events" on. Sync reads them.`},
			{"expiration", func(v realmView) bool { return mayExpire(v.Events.EventsExpiration) },
				`User events settings: set "Expiration" to a day or more. Sync reads what has happened during an outage.`},
			{"event types", func(v realmView) bool { return !lacks(v.Events.EnabledEventTypes, userEventTypes...) },
				"User events settings: add the saved types " + strings.Join(userEventTypes, ", ") + "."},
			{"admin events", func(v realmView) bool { return v.Events.AdminEventsEnabled },
				`Admin events settings: switch "Save events" on. Sync reads them.`},
			{"no representations", func(v realmView) bool { return !v.Events.AdminEventsDetailsEnabled },
				`Admin events settings: switch "Include representation" off. It would keep the secrets of links.`},
		}},
	{"user profile", "{realm}/users/profile", false, func(v *realmView) any { return &v.Profile },
		"Realm settings → User profile: ", []realmRule{
			ownAttribute(attrUserID), ownAttribute(attrRoles), ownAttribute(attrNetworkID), ownAttribute(attrStationID),
			ownAttribute(attrRegistrationID), ownAttribute(attrURL), ownAttribute(attrToken), ownAttribute(attrCode),
			commonAttribute("username"), commonAttribute("email"),
			commonAttribute("firstName"), commonAttribute("lastName"), commonAttribute(attrLocale),
			{"known roles only", func(v realmView) bool {
				a := v.attribute(attrRoles)
				options := a.Validations["options"].Options
				return a.Name == "" || !lacks(options, roles...) && !lacks(roles, options...) && len(options) > 0
			}, `give the attribute roles the validator "options" with ` + strings.Join(roles, ", ") + "."},
			{"nothing else is required", func(v realmView) bool {
				return !slices.ContainsFunc(v.Profile.Attributes, func(a profileAttribute) bool {
					return a.Required != nil && a.Name != "username" && a.Name != "email"
				})
			}, `switch "Required field" off, except for the email. Whoever lacks a required one can't sign in.`},
		}},
	{"email theme", "serverinfo", false, func(v *realmView) any { return &v.Server }, "", []realmRule{
		{"installed", func(v realmView) bool {
			return slices.Contains(v.Server.Themes["email"], theme{"auth-service"})
		}, "Copy keycloak/themes/auth-service into the directory themes of Keycloak, and restart it."},
	}},
	{"realm", "{realm}", true, func(v *realmView) any { return &v.Realm }, "Realm settings → ", []realmRule{
		{"require SSL", func(v realmView) bool { return !strings.EqualFold(v.Realm.SSLRequired, "none") },
			`General: set "Require SSL" to External requests.`},
		{"user registration", func(v realmView) bool { return !v.Realm.RegistrationAllowed },
			`Login: switch "User registration" off. People register here.`},
		{"email as username", func(v realmView) bool { return !v.Realm.RegistrationEmailAsUsername },
			`Login: switch "Email as username" off. Usernames are chosen here.`},
		{"login with email", func(v realmView) bool { return v.Realm.LoginWithEmailAllowed },
			`Login: switch "Login with email" on.`},
		{"duplicate emails", func(v realmView) bool { return !v.Realm.DuplicateEmailsAllowed },
			`Login: switch "Duplicate emails" off.`},
		{"verify email", func(v realmView) bool { return v.Realm.VerifyEmail },
			`Login: switch "Verify email" on. It keeps unconfirmed accounts out.`},
		{"edit username", func(v realmView) bool { return !v.Realm.EditUsernameAllowed },
			`Login: switch "Edit username" off. People could take another's address for their name.`},
		{"SMTP", func(v realmView) bool { return v.Realm.SMTPServer["host"] != "" && v.Realm.SMTPServer["from"] != "" },
			`Email: set "From" and "Host". All mails go by them.`},
		{"email theme", func(v realmView) bool { return v.Realm.EmailTheme == "auth-service" },
			`Themes: set "Email theme" to auth-service.`},
		{"internationalization", func(v realmView) bool { return v.Realm.InternationalizationEnabled },
			`Localization: switch "Internationalization" on. Mails are in the person's language.`},
		{"brute force detection", func(v realmView) bool { return v.Realm.BruteForceProtected },
			`Security defenses → Brute force detection: set "Brute Force Mode" to Lockout temporarily.`},
		{"revoke refresh token", func(v realmView) bool { return v.Realm.RevokeRefreshToken },
			`Tokens: switch "Revoke Refresh Token" on, and set "Refresh Token Max Reuse" to 1.`},
		{"refresh token max reuse", func(v realmView) bool {
			return !v.Realm.RevokeRefreshToken || v.Realm.RefreshTokenMaxReuse == 1
		}, `Tokens: set "Refresh Token Max Reuse" to 1. With 0 one lost answer ends a session.`},
		{"admin events' expiration", func(v realmView) bool {
			seconds, err := strconv.Atoi(v.Realm.Attributes["adminEventsExpiration"])
			return err != nil || mayExpire(seconds)
		}, `Events → Admin events settings: set "Expiration" to a day or more. Sync reads what has happened during an outage.`},
		{"access token lifespan", func(v realmView) bool { return mayLive(v.Realm.AccessTokenLifespan) },
			`Tokens: set "Access Token Lifespan" to 5 minutes. Revocations are kept for one hour.`},
	}},
	{"required actions", "{realm}/authentication/required-actions", true, func(v *realmView) any { return &v.Actions },
		"Authentication → Required actions: ", []realmRule{
			{"verify email", func(v realmView) bool { return v.enabled("VERIFY_EMAIL") },
				`enable "Verify Email". It keeps unconfirmed accounts out.`},
			{"update password", func(v realmView) bool { return v.enabled("UPDATE_PASSWORD") },
				`enable "Update Password". Invitations use it.`},
		}},
	{"client", "{realm}/clients?clientId={client}", true, func(v *realmView) any { return &v.Clients },
		"Clients → that of KEYCLOAK_AUTH_CLIENT_ID → ", []realmRule{
			{"enabled", func(v realmView) bool { return v.Client.Enabled }, "enable it."},
			{"client authentication", func(v realmView) bool { return v.Client.PublicClient },
				`Settings → Capability config: switch "Client authentication" off. It is a public client.`},
			{"direct access grants", func(v realmView) bool { return v.Client.DirectAccessGrantsEnabled },
				`Settings → Capability config: switch "Direct access grants" on. POST /api/v1/auth/login uses them.`},
			{"standard flow", func(v realmView) bool { return v.Client.StandardFlowEnabled },
				`Settings → Capability config: switch "Standard flow" on. GET /auth/login uses it.`},
			{"implicit flow", func(v realmView) bool { return !v.Client.ImplicitFlowEnabled },
				`Settings → Capability config: switch "Implicit flow" off (RFC 9700 §2.1.2).`},
			{"PKCE", func(v realmView) bool { return v.Client.Attributes["pkce.code.challenge.method"] == "S256" },
				`Settings → Capability config: set "PKCE Method" to S256 (RFC 7636).`},
			redirect("/auth/callback", "/auth/callback"),
			redirect("/account/ready", "/account/*"),
			{"claim sub", func(v realmView) bool { return slices.Contains(v.Client.DefaultClientScopes, "basic") },
				`Client scopes: add the client scope "basic" as Default. It has the claim sub.`},
			{"full scope", func(v realmView) bool { return !v.Client.FullScopeAllowed },
				`Client scopes → dedicated → Scope: switch "Full scope allowed" off. Tokens would carry Keycloak's roles.`},
			{"claim aud", func(v realmView) bool {
				return v.Client.maps("oidc-audience-mapper", map[string]string{
					"included.client.audience": v.cfg.AuthClientID, "access.token.claim": "true"})
			}, `Client scopes → dedicated → Mappers: add an "Audience" of this client, "Add to access token" on.`},
			ownClaim(attrUserID), ownClaim(attrRoles), ownClaim(attrNetworkID), ownClaim(attrStationID),
			{"refresh tokens", func(v realmView) bool { return v.Client.Attributes["use.refresh.tokens"] != "false" },
				`Advanced → OpenID Connect Compatibility Modes: switch "Use refresh tokens" on.`},
			{"access token lifespan", func(v realmView) bool {
				seconds, err := strconv.Atoi(v.Client.Attributes["access.token.lifespan"])
				return err != nil || mayLive(seconds)
			}, `Advanced → Advanced settings: let "Access Token Lifespan" inherit from the realm.`},
			{"access token algorithm", func(v realmView) bool {
				algorithm := v.Client.Attributes["access.token.signed.response.alg"]
				return algorithm == "" || slices.Contains(tokenAlgorithms, jose.SignatureAlgorithm(algorithm))
			}, `Advanced → Fine grain OpenID Connect configuration: set "Access token signature algorithm" to RS256.`},
		}},
}

// mayExpire says whether events are kept until sync has certainly read them, in seconds; 0 is
// for ever.
func mayExpire(seconds int) bool { return seconds == 0 || seconds >= int(syncDaily.Seconds()) }

// ownAttribute is one that Keycloak would drop silently if it were not declared, and that
// people must neither change nor see.
func ownAttribute(name string) realmRule {
	return realmRule{name, func(v realmView) bool {
		a, admin := v.attribute(name), []string{"admin"}
		return a.Multivalued == (name == attrRoles) &&
			slices.Equal(a.Permissions.Edit, admin) && slices.Equal(a.Permissions.View, admin)
	}, "attribute " + name + `, "Multivalued" for roles only, who can edit and who can view: Admin alone.`}
}

// commonAttribute is one of Keycloak's own that the service sets.
func commonAttribute(name string) realmRule {
	return realmRule{name, func(v realmView) bool { return !lacks(v.attribute(name).Permissions.Edit, "admin") },
		"attribute " + name + ", who can edit: Admin at least."}
}

// ownClaim is an attribute in the access token.
func ownClaim(name string) realmRule {
	return realmRule{"claim " + name, func(v realmView) bool {
		return v.Client.maps("oidc-usermodel-attribute-mapper", map[string]string{
			"user.attribute": name, "claim.name": name, "jsonType.label": "String",
			"multivalued": strconv.FormatBool(name == attrRoles), "access.token.claim": "true"})
	}, `Client scopes → dedicated → Mappers: add the "User Attribute" ` + name +
		` as the claim of that name, a String, "Multivalued" for roles only, "Add to access token" on.`}
}

// redirect is where Keycloak sends browsers back to.
func redirect(path, pattern string) realmRule {
	return realmRule{"redirect to " + path, func(v realmView) bool { return v.Client.mayRedirect(v.cfg.PublicURL + path) },
		"Settings → Access settings: add PUBLIC_URL" + pattern + ` to the "Valid redirect URIs".`}
}

// lacks says whether some of the elements are not in a list.
func lacks(list []string, elements ...string) bool {
	return slices.ContainsFunc(elements, func(e string) bool { return !slices.Contains(list, e) })
}

func mayLive(seconds int) bool { return seconds > 0 && time.Duration(seconds)*time.Second <= tokenLife }

// attribute is one of the user profile, empty if it is not declared.
func (v realmView) attribute(name string) (found profileAttribute) {
	for _, a := range v.Profile.Attributes {
		if a.Name == name {
			found = a
		}
	}
	return found
}

func (v realmView) enabled(action string) bool {
	for _, a := range v.Actions {
		if a.Alias == action {
			return a.Enabled
		}
	}
	return false
}

// maps says whether the client has a mapper of a kind with these settings.
func (c clientView) maps(kind string, settings map[string]string) bool {
	for _, m := range c.ProtocolMappers {
		fits := m.ProtocolMapper == kind
		for name, value := range settings {
			fits = fits && cmp.Or(m.Config[name], "false") == value
		}
		if fits {
			return true
		}
	}
	return false
}

func (c clientView) mayRedirect(target string) bool {
	return slices.ContainsFunc(c.RedirectURIs, func(pattern string) bool {
		if strings.HasPrefix(pattern, "/") {
			pattern = c.RootURL + pattern
		}
		prefix, wild := strings.CutSuffix(pattern, "*")
		return pattern == target || wild && strings.HasPrefix(target, prefix)
	})
}

func (p realmPart) names() (names []string) {
	for _, rule := range p.rules {
		names = append(names, p.name+": "+rule.name)
	}
	return names
}

// checkRealm checks each setting of the realm, with the service's own eyes and with those
// of an administrator, if there is one.
func (d *doctor) checkRealm(ctx context.Context, adminUser, adminPassword string) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	kc := d.s.kc
	service, _ := kc.serviceToken(ctx) // if it can't sign in, that has been said
	admin, mend := "", "Give an administrator of Keycloak: -admin-user NAME -admin-password-file FILE."
	if adminUser != "" {
		token, end, err := kc.signInAdmin(ctx, adminUser, adminPassword)
		if d.see("administrator", err == nil, fmt.Sprint(err),
			"Give a user of Keycloak's realm master, without a second factor, and the right password.") {
			defer end()
			admin = token
		}
	}
	view := realmView{cfg: d.s.cfg}
	for _, part := range realmParts {
		token, why := cmp.Or(admin, service), "the service account can't sign in"
		if part.administrator {
			token, why = admin, "the service's own rights don't show it"
		}
		if token == "" {
			d.unknown(why, mend, part.names()...)
			continue
		}
		err := kc.adminGet(ctx, token, part.path, part.into(&view))
		switch {
		case err != nil:
		case part.name == "realm" && view.Realm.ID == "":
			err = errors.New("the administrator has not the right to view it")
		case part.name == "client" && len(view.Clients) == 0:
			err = errors.New("it is not there")
			d.see("client", false, "the realm has no client "+d.s.cfg.AuthClientID,
				"Correct KEYCLOAK_AUTH_CLIENT_ID, or create the client.")
		case part.name == "client":
			view.Client = view.Clients[0]
		}
		if err != nil {
			d.unknown(err.Error(), "", part.names()...)
			continue
		}
		for i, name := range part.names() {
			d.see(name, part.rules[i].fine(view), "", part.where+part.rules[i].mend)
		}
	}
}

// signInAdmin signs an administrator in to the realm master, until end is called.
func (k *keycloak) signInAdmin(ctx context.Context, user, password string) (token string, end func(), err error) {
	master := k.cfg.KeycloakURL + "/realms/master/protocol/openid-connect/"
	admin := &oauth2.Config{ClientID: "admin-cli",
		Endpoint: oauth2.Endpoint{TokenURL: master + "token", AuthStyle: oauth2.AuthStyleInParams}}
	t, err := admin.PasswordCredentialsToken(context.WithValue(ctx, oauth2.HTTPClient, k.client), user, password)
	if err != nil {
		return "", nil, keycloakError(err)
	}
	return t.AccessToken, func() {
		form := url.Values{"client_id": {"admin-cli"}, "refresh_token": {t.RefreshToken}}
		if resp, err := k.client.PostForm(master+"logout", form); err == nil { // else the session times out
			resp.Body.Close()
		}
	}, nil
}

// adminGet reads from the admin API.
func (k *keycloak) adminGet(ctx context.Context, token, path string, answer any) error {
	path = strings.NewReplacer("{realm}", "realms/"+url.PathEscape(k.cfg.KeycloakRealm),
		"{client}", url.QueryEscape(k.cfg.AuthClientID)).Replace(path)
	return k.read(ctx, "doctor", keycloakTimeout, k.cfg.KeycloakURL+"/admin/"+path, token, answer)
}
