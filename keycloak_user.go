package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Nerzal/gocloak/v13"
	"github.com/go-resty/resty/v2"
)

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

// activated says whether its registration has made it an account (V3): confirmed, and without
// the secrets of the mail. Nobody deletes or enables it any more.
func (u keycloakUser) activated() bool { return u.verified() && u.attribute(attrToken) == "" }

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

// claims are the attributes that become claims, for the record: what can't be one of ours
// may be personal.
func (ku keycloakUser) claims() map[string][]string {
	claims := map[string][]string{}
	for name := range attributesOf(user{}) {
		if ku.Attributes == nil {
			continue
		}
		for _, value := range (*ku.Attributes)[name] {
			if !claimPattern.MatchString(value) {
				value = "?"
			}
			claims[name] = append(claims[name], value)
		}
	}
	return claims
}

var claimPattern = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,32}$`)

// hasClaims says whether they are what they should be.
func (ku keycloakUser) hasClaims(u user) bool {
	for name, values := range attributesOf(u) {
		if ku.Attributes == nil || !slices.Equal((*ku.Attributes)[name], values) {
			return false
		}
	}
	return true
}

// assign gives Keycloak's user our role and scope, in one call, and our names if they were
// changed here, and disables it if ours is deleted; only a restored one is enabled. What
// needs no change is not written, as somebody may be changing it there. It returns
// errNotFound for a user that Keycloak does not have any more.
func (k *keycloak) assign(ctx context.Context, u user, enable, names bool) error {
	ku, err := k.user(ctx, u.KeycloakID)
	if err != nil {
		return err
	}
	switched := ku.enabled() != u.IsActive && (enable || !u.IsActive)
	if ku.hasClaims(u) && !names && !switched {
		return nil
	}
	if ku.Attributes == nil { // created in Keycloak
		ku.Attributes = &map[string][]string{}
	}
	maps.Copy(*ku.Attributes, attributesOf(u))
	ku.Enabled, ku.EmailVerified, ku.RequiredActions = nil, nil, nil
	if names {
		ku.FirstName, ku.LastName = &u.FirstName, &u.LastName
	}
	if switched {
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
