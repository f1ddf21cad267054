package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/Nerzal/gocloak/v13"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-resty/resty/v2"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
	"golang.org/x/sync/singleflight"
)

// How long a call may take. A mail waits for Keycloak's SMTP server, which may
// take ten seconds to say no; nobody waits for a page of users.
const (
	keycloakTimeout = 4 * time.Second
	mailTimeout     = 15 * time.Second
	listTimeout     = 30 * time.Second
)

// What Keycloak may answer beside errNotFound, errConflict and errUnavailable.
var (
	errInvalidCredentials = errors.New("keycloak: invalid user credentials")
	errAccountDisabled    = errors.New("keycloak: account disabled")
	errSetupRequired      = errors.New("keycloak: account is not fully set up")
	errInvalidGrant       = errors.New("keycloak: invalid grant")
	errMailNotSent        = errors.New("keycloak could not send the mail")
	errBusy               = fmt.Errorf("%w: too much is waiting", errUnavailable)
)

// rejected are Keycloak's objections to a user: its profile rules, its password policy.
type rejected struct{ Fields []fieldError }

func (r rejected) Error() string { return fmt.Sprintf("keycloak rejects %d fields", len(r.Fields)) }

// keycloak makes all calls to Keycloak. It knows nothing of PostgreSQL.
type keycloak struct {
	cfg     config
	client  *http.Client
	admin   *gocloak.GoCloak
	metrics *metrics

	calls bulkhead // everything but mails
	mails bulkhead // they wait for SMTP, and must not keep people from signing in

	service atomic.Pointer[oauth2.Token] // of the service account, renewed before it ends
	renewal singleflight.Group
}

func newKeycloak(cfg config, m *metrics) *keycloak {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	client := &http.Client{Transport: transport}
	k := &keycloak{cfg: cfg, client: client, metrics: m, calls: newBulkhead(24), mails: newBulkhead(8)}
	k.admin = gocloak.NewClient(cfg.KeycloakURL)
	k.admin.SetRestyClient(resty.NewWithClient(client)) // its own has no limits, and a cookie jar for all users
	return k
}

// bulkhead bounds the calls under way. Keycloak is slow by design where passwords
// are hashed: as many again may wait, the rest is told so at once.
type bulkhead struct{ running, admitted chan struct{} }

func newBulkhead(n int) bulkhead {
	return bulkhead{running: make(chan struct{}, n), admitted: make(chan struct{}, 2*n)}
}

func (b bulkhead) do(ctx context.Context, f func() error) error {
	select {
	case b.admitted <- struct{}{}:
		defer func() { <-b.admitted }()
	default:
		return errBusy
	}
	select {
	case b.running <- struct{}{}:
		defer func() { <-b.running }()
	case <-ctx.Done():
		return errBusy
	}
	return f()
}

// call makes one call: bounded in number and time, measured, its error translated.
func (k *keycloak) call(ctx context.Context, operation string, b bulkhead, timeout time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := b.do(ctx, func() error {
		start := time.Now()
		err := keycloakError(f(ctx))
		k.metrics.keycloak.WithLabelValues(operation, outcome(err)).Observe(time.Since(start).Seconds())
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", operation, err)
	}
	return nil
}

func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, errUnavailable):
		return "unavailable"
	}
	return "refused"
}

// asService makes a call as the service account; once more with a new token when
// Keycloak refuses the one we have (it was restarted, or the secret was rotated).
func (k *keycloak) asService(ctx context.Context, operation string, f func(ctx context.Context, token string) error) error {
	b, timeout := k.calls, keycloakTimeout
	switch operation {
	case "send_mail":
		b, timeout = k.mails, mailTimeout
	case "list_users":
		timeout = listTimeout
	}
	return k.call(ctx, operation, b, timeout, func(ctx context.Context) error {
		token, err := k.serviceToken(ctx)
		if err != nil {
			return err
		}
		err = f(ctx, token)
		var api *gocloak.APIError
		if !errors.As(err, &api) || api.Code != http.StatusUnauthorized {
			return err
		}
		k.service.Store(nil)
		if token, err = k.serviceToken(ctx); err != nil {
			return err
		}
		return f(ctx, token)
	})
}

// serviceToken returns a token with at least half a minute to live. However many
// ask at once, one call renews it.
func (k *keycloak) serviceToken(ctx context.Context) (string, error) {
	if t := k.service.Load(); t != nil && time.Until(t.Expiry) > 30*time.Second {
		return t.AccessToken, nil
	}
	renewed := k.renewal.DoChan("", func() (any, error) {
		ctx, cancel := detached(ctx, keycloakTimeout)
		defer cancel()
		cc := clientcredentials.Config{ClientID: k.cfg.BackendClientID, ClientSecret: string(k.cfg.BackendClientSecret),
			TokenURL: k.realmURL("protocol/openid-connect/token"), AuthStyle: oauth2.AuthStyleInHeader}
		t, err := cc.Token(context.WithValue(ctx, oauth2.HTTPClient, k.client))
		if err != nil {
			return nil, err
		}
		k.service.Store(t)
		return t, nil
	})
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case r := <-renewed:
		if r.Err != nil {
			// A wrong secret is the operator's to mend; to callers it is an outage.
			return "", fmt.Errorf("%w: keycloak: the service account gets no token: %v", errUnavailable, r.Err)
		}
		return r.Val.(*oauth2.Token).AccessToken, nil
	}
}

func (k *keycloak) realmURL(path string) string {
	return k.cfg.KeycloakURL + "/realms/" + k.cfg.KeycloakRealm + "/" + path
}

// keycloakError translates what gocloak, oauth2 and net/http say into our errors.
// No answer at all, and an answer that Keycloak itself calls a failure, is
// errUnavailable.
func keycloakError(err error) error {
	var api *gocloak.APIError
	var grant *oauth2.RetrieveError
	switch {
	case err == nil, errors.As(err, new(rejected)), errors.Is(err, errMailNotSent), errors.Is(err, errUnavailable):
		return err
	case errors.As(err, &api):
		switch {
		case api.Code == 0: // no answer; the message quotes the URL, which may hold an address
			return fmt.Errorf("%w: keycloak: %s", errUnavailable, api.Message[strings.LastIndex(api.Message, `": `)+1:])
		case api.Code >= 500:
			return fmt.Errorf("%w: keycloak: %s", errUnavailable, api.Message)
		case api.Code == http.StatusNotFound:
			return errNotFound
		case api.Code == http.StatusConflict:
			return errConflict
		}
		return fmt.Errorf("keycloak: %s", api.Message)
	case errors.As(err, &grant):
		// Decided by error and description: the status differs between versions.
		switch {
		case grant.Response.StatusCode >= 500:
			return fmt.Errorf("%w: keycloak: %s", errUnavailable, grant.Response.Status)
		case grant.ErrorDescription == "Account disabled":
			return errAccountDisabled
		case grant.ErrorDescription == "Account is not fully set up":
			return errSetupRequired
		case grant.ErrorDescription == "Invalid user credentials":
			return errInvalidCredentials
		case grant.ErrorCode == "invalid_grant":
			return fmt.Errorf("%w: %s", errInvalidGrant, grant.ErrorDescription)
		}
		return fmt.Errorf("keycloak: %s: %s", grant.ErrorCode, grant.ErrorDescription)
	}
	return fmt.Errorf("%w: keycloak: %w", errUnavailable, err)
}

// The attributes of a Keycloak user that are ours. The first four become claims;
// the mail's template reads the email_ ones, which are removed by verification.
const (
	attrUserID         = "user_id"
	attrRoles          = "roles"
	attrNetworkID      = "network_id"
	attrStationID      = "station_id"
	attrRegistrationID = "registration_id"
	attrURL            = "email_verify_url"
	attrToken          = "email_verify_token"
	attrCode           = "email_verify_code"
	attrLocale         = "locale"
)

// noScope stands for "no network" and "no station" in attributes and claims:
// Keycloak drops empty ones, and the claims must be there.
const noScope = "X"

// keycloakUser is Keycloak's user, as far as we look at it.
type keycloakUser struct{ gocloak.User }

func (u keycloakUser) id() string     { return gocloak.PString(u.ID) }
func (u keycloakUser) enabled() bool  { return gocloak.PBool(u.Enabled) }
func (u keycloakUser) verified() bool { return gocloak.PBool(u.EmailVerified) }
func (u keycloakUser) attribute(name string) string {
	if u.Attributes != nil && len((*u.Attributes)[name]) > 0 {
		return (*u.Attributes)[name][0]
	}
	return ""
}

// createUser creates the disabled user of a registration (R2) and returns its id.
// The password goes into this call and nowhere else.
//
// It returns errConflict when Keycloak has a user with that address or username,
// and rejected with the fields that its profile rules or password policy refuse;
// nothing is created then.
func (k *keycloak) createUser(ctx context.Context, reg registration, token, code, password string) (string, error) {
	attributes := attributesOf(user{ID: reg.UserID, Role: roleUser})
	maps.Copy(attributes, map[string][]string{attrRegistrationID: {string(reg.ID)}, attrLocale: {reg.Locale},
		attrURL: {k.cfg.PublicURL + "/account/verify"}, attrToken: {token}, attrCode: {code}})
	user := gocloak.User{
		Username: &reg.Username, Email: &reg.Email, FirstName: &reg.FirstName, LastName: &reg.LastName,
		Enabled: gocloak.BoolP(false), EmailVerified: gocloak.BoolP(false), Attributes: &attributes,
		RequiredActions: &[]string{"VERIFY_EMAIL", "UPDATE_PASSWORD"},
	}
	if reg.WithPassword {
		user.RequiredActions = &[]string{"VERIFY_EMAIL"}
		user.Credentials = &[]gocloak.CredentialRepresentation{
			{Type: gocloak.StringP("password"), Value: &password, Temporary: gocloak.BoolP(false)}}
	}
	return k.create(ctx, user)
}

func (k *keycloak) create(ctx context.Context, user gocloak.User) (id string, err error) {
	err = k.asService(ctx, "create_user", func(ctx context.Context, token string) error {
		// gocloak's CreateUser loses the field errors.
		resp, err := k.admin.GetRequestWithBearerAuth(ctx, token).SetBody(user).Post(k.usersURL())
		if err := responseError(resp, err); err != nil {
			return err
		}
		location := resp.Header().Get("Location")
		id = location[strings.LastIndex(location, "/")+1:]
		if !keycloakIDPattern.MatchString(id) {
			return errors.New("keycloak answered a creation without the new user's id")
		}
		return nil
	})
	return id, err
}

// createInvited creates the enabled user of an internal account (I2), without a password:
// nobody can sign in before the invitation is followed. A user that an earlier call has
// created, whose answer was lost, is found by our id. Ours may have changed since, or have
// been deleted. Errors as of createUser.
func (k *keycloak) createInvited(ctx context.Context, u user, locale string) (string, error) {
	attributes := attributesOf(u)
	attributes[attrLocale] = []string{locale}
	id, err := k.create(ctx, gocloak.User{Username: &u.Username, Email: &u.Email, FirstName: &u.FirstName, LastName: &u.LastName,
		Enabled: &u.IsActive, Attributes: &attributes, RequiredActions: &invitation})
	if !errors.Is(err, errConflict) {
		return id, err
	}
	found, lookup := k.findUser(ctx, gocloak.GetUsersParams{Q: gocloak.StringP(attrUserID + ":" + string(u.ID))})
	if errors.Is(lookup, errNotFound) {
		return "", err
	} else if lookup != nil {
		return "", lookup
	}
	u.KeycloakID = found.id()
	return u.KeycloakID, k.assign(ctx, u, false, true)
}

// attributesOf are the attributes that become claims.
func attributesOf(u user) map[string][]string {
	return map[string][]string{attrUserID: {string(u.ID)}, attrRoles: {u.Role},
		attrNetworkID: {cmp.Or(u.NetworkID, noScope)}, attrStationID: {cmp.Or(u.StationID, noScope)}}
}

// assign gives Keycloak's user our role and scope, in one call, and our names if they were
// changed here, and disables it if ours is deleted; only a restored one is enabled. It
// returns errNotFound for a user that Keycloak does not have any more.
func (k *keycloak) assign(ctx context.Context, u user, enable, names bool) error {
	ku, err := k.user(ctx, u.KeycloakID)
	if err != nil {
		return err
	}
	if ku.Attributes == nil { // created in Keycloak
		ku.Attributes = &map[string][]string{}
	}
	maps.Copy(*ku.Attributes, attributesOf(u))
	if names {
		ku.FirstName, ku.LastName = &u.FirstName, &u.LastName
	}
	if !u.IsActive || enable {
		ku.Enabled = &u.IsActive
	}
	return k.asService(ctx, "assign_user", func(ctx context.Context, token string) error {
		return k.admin.UpdateUser(ctx, token, k.cfg.KeycloakRealm, ku.User)
	})
}

func (k *keycloak) usersURL(path ...string) string {
	return strings.Join(append([]string{k.cfg.KeycloakURL, "admin/realms", k.cfg.KeycloakRealm, "users"}, path...), "/")
}

// responseError is gocloak's error for a response, or rejected where the body
// names fields.
func responseError(resp *resty.Response, err error) error {
	if err != nil {
		return &gocloak.APIError{Message: err.Error()}
	}
	if !resp.IsError() {
		return nil
	}
	if resp.StatusCode() == http.StatusBadRequest {
		if fields := rejectedFields(resp.Body()); len(fields) > 0 {
			return rejected{fields}
		}
	}
	return &gocloak.APIError{Code: resp.StatusCode(), Message: resp.Status()} // the body may quote what was sent
}

// rejectedFields reads Keycloak's three shapes of a 400: one field, several
// fields, and the password policy, which names its first broken rule only.
func rejectedFields(body []byte) []fieldError {
	type violation struct {
		Field   string `json:"field"`
		Message string `json:"errorMessage"`
	}
	var answer struct {
		violation
		Errors      []violation `json:"errors"`
		Error       string      `json:"error"`
		Description string      `json:"error_description"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return nil
	}
	if strings.HasPrefix(answer.Error, "invalidPassword") {
		// "Invalid password: minimum length 8." is the policy's text and holds nothing that was sent.
		rule := strings.TrimSuffix(strings.TrimPrefix(answer.Description, "Invalid password: "), ".")
		if n, ok := strings.CutPrefix(rule, "minimum length "); ok {
			rule = "must have at least " + n + " characters"
		}
		return []fieldError{{"password", rule}}
	}
	if answer.Field != "" {
		answer.Errors = append(answer.Errors, answer.violation)
	}
	names := map[string]string{"firstName": "first_name", "lastName": "last_name"}
	details := map[string]string{
		"error-invalid-email":                 "is not a valid e-mail address",
		"error-non-ascii-local-part-email":    "is not a valid e-mail address",
		"error-invalid-length":                "has a length that is not allowed",
		"error-invalid-length-too-long":       "is too long",
		"error-invalid-length-too-short":      "is too short",
		"error-person-name-invalid-character": "has a character that is not allowed",
		"error-username-invalid-character":    "has a character that is not allowed",
		"error-user-attribute-required":       "is required",
	}
	var fields []fieldError
	for _, v := range answer.Errors {
		field := v.Field
		if ours, ok := names[field]; ok {
			field = ours
		}
		detail, ok := details[v.Message]
		if !ok {
			detail = "is not allowed"
		}
		fields = append(fields, fieldError{field, detail})
	}
	return fields
}

// user returns a user by its id, or errNotFound.
func (k *keycloak) user(ctx context.Context, id string) (keycloakUser, error) {
	var user keycloakUser
	if !keycloakIDPattern.MatchString(id) {
		return user, errNotFound
	}
	err := k.asService(ctx, "get_user", func(ctx context.Context, token string) error {
		u, err := k.admin.GetUserByID(ctx, token, k.cfg.KeycloakRealm, id)
		if err == nil {
			user.User = *u
		}
		return err
	})
	return user, err
}

// userOfRegistration finds the user that was created for a registration whose
// answer we may have missed, or errNotFound.
func (k *keycloak) userOfRegistration(ctx context.Context, id registrationID) (keycloakUser, error) {
	return k.findUser(ctx, gocloak.GetUsersParams{Q: gocloak.StringP(attrRegistrationID + ":" + string(id))})
}

// userByLogin finds the user who signs in with this e-mail address or username.
func (k *keycloak) userByLogin(ctx context.Context, login string) (keycloakUser, error) {
	if strings.Contains(login, "@") {
		u, err := k.findUser(ctx, gocloak.GetUsersParams{Email: &login, Exact: gocloak.BoolP(true)})
		if !errors.Is(err, errNotFound) {
			return u, err
		}
	}
	return k.findUser(ctx, gocloak.GetUsersParams{Username: &login, Exact: gocloak.BoolP(true)})
}

func (k *keycloak) findUser(ctx context.Context, params gocloak.GetUsersParams) (keycloakUser, error) {
	var user keycloakUser
	params.BriefRepresentation = gocloak.BoolP(false)
	err := k.asService(ctx, "find_user", func(ctx context.Context, token string) error {
		users, err := k.admin.GetUsers(ctx, token, k.cfg.KeycloakRealm, params)
		if err != nil {
			return err
		}
		if len(users) == 0 {
			return &gocloak.APIError{Code: http.StatusNotFound}
		}
		user.User = *users[0]
		return nil
	})
	return user, err
}

// setEnabled enables or disables a user and leaves everything else as it is: a
// PUT without attributes is a partial update.
func (k *keycloak) setEnabled(ctx context.Context, id string, enabled bool) error {
	operation := "disable_user"
	if enabled {
		operation = "enable_user"
	}
	return k.asService(ctx, operation, func(ctx context.Context, token string) error {
		return k.admin.UpdateUser(ctx, token, k.cfg.KeycloakRealm, gocloak.User{ID: &id, Enabled: &enabled})
	})
}

// setCode gives the user a new code and enables it for the mail. With attributes a
// PUT replaces everything, so the user goes back as it came.
func (k *keycloak) setCode(ctx context.Context, user keycloakUser, code string) error {
	(*user.Attributes)[attrCode] = []string{code}
	user.Enabled = gocloak.BoolP(true)
	return k.asService(ctx, "set_code", func(ctx context.Context, token string) error {
		return k.admin.UpdateUser(ctx, token, k.cfg.KeycloakRealm, user.User)
	})
}

// activate makes the user an account (V3): enabled, verified, without the
// secrets of the mail. What it still owes, a password, it keeps owing.
func (k *keycloak) activate(ctx context.Context, user keycloakUser) error {
	for _, name := range []string{attrURL, attrToken, attrCode} {
		delete(*user.Attributes, name)
	}
	open := []string{}
	if user.RequiredActions != nil {
		for _, action := range *user.RequiredActions {
			if action != "VERIFY_EMAIL" {
				open = append(open, action)
			}
		}
	}
	user.RequiredActions = &open
	user.Enabled, user.EmailVerified = gocloak.BoolP(true), gocloak.BoolP(true)
	return k.asService(ctx, "activate_user", func(ctx context.Context, token string) error {
		return k.admin.UpdateUser(ctx, token, k.cfg.KeycloakRealm, user.User)
	})
}

// deleteUser deletes a user (E2, C2); one that is gone already is fine.
func (k *keycloak) deleteUser(ctx context.Context, id string) error {
	err := k.asService(ctx, "delete_user", func(ctx context.Context, token string) error {
		return k.admin.DeleteUser(ctx, token, k.cfg.KeycloakRealm, id)
	})
	if errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// What a mail asks a person to do on Keycloak's page.
var (
	verifyEmail    []string
	choosePassword = []string{"UPDATE_PASSWORD"}
	invitation     = []string{"VERIFY_EMAIL", "UPDATE_PASSWORD"} // the link proves the address
)

// sendMail makes Keycloak mail an enabled user. Keycloak hands the mail to its SMTP server
// before it answers; errMailNotSent means that this failed.
func (k *keycloak) sendMail(ctx context.Context, id, language string, lifespan time.Duration, actions []string) error {
	return k.asService(ctx, "send_mail", func(ctx context.Context, token string) error {
		// gocloak knows neither the lifespan of the one nor the language of both.
		req := k.admin.GetRequestWithBearerAuth(ctx, token).
			SetHeader("Accept-Language", language).
			SetQueryParam("lifespan", strconv.Itoa(int(lifespan.Seconds())))
		path := "send-verify-email"
		if len(actions) > 0 {
			path = "execute-actions-email"
			req.SetBody(actions).
				SetQueryParam("client_id", k.cfg.AuthClientID).
				SetQueryParam("redirect_uri", k.cfg.PublicURL+"/account/ready")
		}
		resp, err := req.Put(k.usersURL(id, path))
		if err == nil && resp.StatusCode() == http.StatusInternalServerError {
			return errMailNotSent
		}
		return responseError(resp, err)
	})
}

// passwordURL is the page of Keycloak where the holder of an action key chooses a password.
func (k *keycloak) passwordURL(key string) string {
	return k.cfg.issuer() + "/login-actions/action-token?key=" + key
}

// oauth is the client that people sign in to.
func (k *keycloak) oauth() *oauth2.Config {
	return &oauth2.Config{ClientID: k.cfg.AuthClientID, Scopes: []string{"openid"}, RedirectURL: k.cfg.PublicURL + "/auth/callback",
		Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInParams, TokenURL: k.realmURL("protocol/openid-connect/token"),
			AuthURL: k.cfg.issuer() + "/protocol/openid-connect/auth"}}
}

// grant asks the token endpoint for tokens.
func (k *keycloak) grant(ctx context.Context, operation string, f func(context.Context) (*oauth2.Token, error)) (*oauth2.Token, error) {
	var token *oauth2.Token
	err := k.call(ctx, operation, k.calls, keycloakTimeout, func(ctx context.Context) (err error) {
		token, err = f(context.WithValue(ctx, oauth2.HTTPClient, k.client))
		return err
	})
	return token, err
}

// signIn exchanges a password for tokens (RFC 6749 §4.3). It returns
// errInvalidCredentials, errAccountDisabled or errSetupRequired.
func (k *keycloak) signIn(ctx context.Context, login, password string) (*oauth2.Token, error) {
	return k.grant(ctx, "password_grant", func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().PasswordCredentialsToken(ctx, login, password)
	})
}

// refresh exchanges a refresh token for the next tokens (RFC 6749 §6). It returns
// errInvalidGrant when the session has ended.
func (k *keycloak) refresh(ctx context.Context, token string) (*oauth2.Token, error) {
	return k.grant(ctx, "refresh_grant", func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().TokenSource(ctx, &oauth2.Token{RefreshToken: token}).Token()
	})
}

// redeem exchanges the code of the code flow for tokens (RFC 6749 §4.1.3, RFC 7636
// §4.5). It returns errInvalidGrant for a code that is used, too old or another's.
func (k *keycloak) redeem(ctx context.Context, code, verifier string) (*oauth2.Token, error) {
	return k.grant(ctx, "code_grant", func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().Exchange(ctx, code, oauth2.VerifierOption(verifier))
	})
}

// hasSession says whether a session of a user lives.
func (k *keycloak) hasSession(ctx context.Context, user, sid string) (lives bool, err error) {
	if !keycloakIDPattern.MatchString(user) {
		return false, nil
	}
	err = k.asService(ctx, "user_sessions", func(ctx context.Context, token string) error {
		sessions, err := k.admin.GetUserSessions(ctx, token, k.cfg.KeycloakRealm, user)
		lives = slices.ContainsFunc(sessions, func(s *gocloak.UserSessionRepresentation) bool { return gocloak.PString(s.ID) == sid })
		return err
	})
	if errors.Is(err, errNotFound) { // the user is gone
		return false, nil
	}
	return lives, err
}

// endSession ends a session in Keycloak; one that is gone already is fine.
func (k *keycloak) endSession(ctx context.Context, sid string) error {
	if !keycloakIDPattern.MatchString(sid) {
		return fmt.Errorf("not a session id of Keycloak")
	}
	err := k.asService(ctx, "end_session", func(ctx context.Context, token string) error {
		return k.admin.LogoutUserSession(ctx, token, k.cfg.KeycloakRealm, sid)
	})
	if errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// signingKeys returns the realm's keys (RFC 7517 §5).
func (k *keycloak) signingKeys(ctx context.Context) (keys jose.JSONWebKeySet, err error) {
	err = k.getJSON(ctx, "signing_keys", keycloakTimeout, "protocol/openid-connect/certs", &keys)
	return keys, err
}

// ping asks for the realm's public description.
func (k *keycloak) ping(ctx context.Context) error {
	return k.getJSON(ctx, "ping", 2*time.Second, "", &struct{}{})
}

// getJSON reads what the realm tells everybody.
func (k *keycloak) getJSON(ctx context.Context, operation string, timeout time.Duration, path string, answer any) error {
	return k.call(ctx, operation, k.calls, timeout, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(k.realmURL(path), "/"), nil)
		if err != nil {
			return err
		}
		resp, err := k.client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("the realm answers %s", resp.Status)
		}
		return json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(answer)
	})
}
