package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Nerzal/gocloak/v13"
	"github.com/go-resty/resty/v2"
	"golang.org/x/net/idna"
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
	attrKind           = "email_verify_kind" // kindInvitation, or absent
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
// the secrets of the mail. Nobody deletes it any more, and only restore enables it.
func (u keycloakUser) activated() bool { return u.verified() && u.attribute(attrToken) == "" }

// awaitsVerification says whether the user waits for its confirmation. An account has lost the
// secrets of the mail, also if it has a new address that is not confirmed.
func (u keycloakUser) awaitsVerification() bool { return !u.verified() && u.attribute(attrToken) != "" }

// kindInvitation makes the mail's template use the words of an invitation.
const kindInvitation = "invitation"

// describe gives the user what its registration says: names, claims, and the words of its mail.
func (u *keycloakUser) describe(reg registration) {
	if u.Attributes == nil {
		u.Attributes = &map[string][]string{}
	}
	u.Email, u.FirstName, u.LastName = &reg.Email, &reg.FirstName, &reg.LastName
	maps.Copy(*u.Attributes, attributesOf(reg.user()))
	(*u.Attributes)[attrLocale] = []string{reg.Locale}
	delete(*u.Attributes, attrKind)
	if reg.Source == sourceInternal {
		(*u.Attributes)[attrKind] = []string{kindInvitation}
	}
}

// createUser creates the disabled user of a registration (R2). It has no password, and its
// address as the username if Keycloak takes that.
//
// It returns errConflict when Keycloak has a user with that address or username, and rejected
// with the fields that its profile rules refuse; nothing is created then.
func (k *keycloak) createUser(ctx context.Context, reg registration, token string) (keycloakUser, error) {
	username, off := defaultUsername(reg.Email, reg.UserID), false
	ku := keycloakUser{gocloak.User{Username: &username, Enabled: &off, EmailVerified: &off,
		RequiredActions: &[]string{"VERIFY_EMAIL"}}}
	ku.describe(reg)
	maps.Copy(*ku.Attributes, map[string][]string{attrRegistrationID: {string(reg.ID)},
		attrURL: {k.cfg.PublicURL + "/account/verify"}, attrToken: {token}})
	header, err := k.api(ctx, "create_user", "POST", "users", nil, ku.User, nil)
	if err != nil {
		return ku, err
	}
	_, escaped, _ := strings.Cut(header.Get("Location"), "/users/")
	id, err := url.PathUnescape(escaped)
	if err != nil || id == "" {
		return ku, fmt.Errorf("%w: keycloak answered a creation without the new user's id", errUnavailable)
	}
	ku.ID = &id
	return ku, nil
}

// attributesOf are the attributes that become claims.
func attributesOf(u user) map[string][]string {
	return map[string][]string{attrUserID: {string(u.ID)}, attrRoles: {u.Role},
		attrNetworkID: {cmp.Or(u.NetworkID, noScope)}, attrStationID: {cmp.Or(u.StationID, noScope)}}
}

// claims are the attributes that become claims, for the audit log: what can't be one of ours
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

// push gives Keycloak's user the role and scope of ours, disables it if ours is deleted, and then does
// what edit says, in one call. It writes nothing where nothing differs, as somebody may be changing
// the user there. ku is the user as Keycloak had it a moment ago. Errors as of createUser.
func (k *keycloak) push(ctx context.Context, ku keycloakUser, u user, edit func(*keycloakUser)) error {
	disable := ku.enabled() && !u.IsActive
	if ku.hasClaims(u) && !disable && edit == nil {
		return nil
	}
	ku = ku.withoutState()
	maps.Copy(*ku.Attributes, attributesOf(u))
	if disable {
		ku.Enabled = gocloak.BoolP(false)
	}
	if edit != nil {
		edit(&ku)
	}
	return k.update(ctx, "push_user", ku)
}

// rename makes a user's address its username, or its id where another has that. Errors as of createUser.
func (k *keycloak) rename(ctx context.Context, ku keycloakUser, id userID) error {
	ku = ku.withoutState()
	ku.Username = gocloak.StringP(defaultUsername(gocloak.PString(ku.Email), id))
	err := k.update(ctx, "rename_user", ku)
	if errors.Is(err, errConflict) {
		ku.Username = gocloak.StringP(string(id))
		err = k.update(ctx, "rename_user", ku)
	}
	return err
}

// withoutState is the user with a copy of its attributes and without what a PUT need not say:
// what is left out stays as it is, also if somebody is changing it.
func (u keycloakUser) withoutState() keycloakUser {
	attributes := map[string][]string{} // of who was created in Keycloak there are none
	if u.Attributes != nil {
		maps.Copy(attributes, *u.Attributes)
	}
	u.Attributes, u.Enabled, u.EmailVerified, u.RequiredActions = &attributes, nil, nil, nil
	return u
}

// update writes a user. With attributes a PUT replaces them all, and names and address, so
// the user goes back as it came. Errors as of createUser.
func (k *keycloak) update(ctx context.Context, operation string, ku keycloakUser) error {
	_, err := k.api(ctx, operation, "PUT", pathOf("users", ku.id()), nil, ku.User, nil)
	return err
}

// responseError is what an answer of the admin API means. Keycloak says what it refuses: an error that tells no more
// than its status, or none, is somebody else's, or about the realm, and so an outage.
func responseError(resp *resty.Response, err error) error {
	var said objection
	if err != nil || resp.IsError() && json.Unmarshal(resp.Body(), &said) != nil {
		return cmp.Or(err, errUnavailable)
	}
	text := cmp.Or(said.Error, said.Message)
	status, fields := resp.StatusCode(), said.fields()
	specific := text != "" && !strings.HasSuffix(text, http.StatusText(status)) && !strings.HasPrefix(text, "Realm")
	switch {
	case status == http.StatusOK && resp.Request.Result != nil, status == http.StatusCreated,
		status == http.StatusNoContent && resp.Request.Result == nil:
		return nil
	case status == http.StatusUnauthorized:
		return errServiceToken
	case status == http.StatusBadRequest && len(fields) > 0:
		return rejected{fields}
	case status == http.StatusBadRequest && specific:
		return errRefused
	case status == http.StatusNotFound && specific:
		return errNotFound
	case status == http.StatusConflict && specific:
		return errConflict
	}
	return fmt.Errorf("%w: keycloak: %s", errUnavailable, resp.Status()) // the body may quote what was sent
}

// objection is Keycloak's: a word or a sentence, one field, several fields, or the first broken rule of the password
// policy.
type objection struct {
	violation
	Errors      []violation `json:"errors"`
	Error       string      `json:"error"`
	Description string      `json:"error_description"`
}

type violation struct {
	Field   string `json:"field"`
	Message string `json:"errorMessage"`
}

// fields are the fields that Keycloak objects to.
func (answer objection) fields() []fieldError {
	if strings.HasPrefix(answer.Error, "invalidPassword") {
		// "Invalid password: minimum length 8." is the policy's text and holds nothing that was sent.
		rule := strings.TrimSuffix(strings.TrimPrefix(answer.Description, "Invalid password: "), ".")
		if n, ok := strings.CutPrefix(rule, "minimum length "); ok {
			rule = "must have at least " + n + " characters"
		} else if answer.Error == "invalidPasswordBlacklistedMessage" {
			rule = "is one of those that are guessed first; choose another one"
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
		fields = append(fields, fieldError{cmp.Or(names[v.Field], v.Field), cmp.Or(details[v.Message], "is not allowed")})
	}
	return fields
}

// user returns a user by its id, or errNotFound.
func (k *keycloak) user(ctx context.Context, id string) (user keycloakUser, err error) {
	_, err = k.api(ctx, "get_user", "GET", pathOf("users", id), nil, nil, &user.User)
	if err == nil && user.id() != id {
		err = fmt.Errorf("%w: not an answer of Keycloak: another user", errUnavailable)
	}
	return user, err
}

// ownID is the id of this service's account, a user of Keycloak, too.
func (k *keycloak) ownID(ctx context.Context) (string, error) {
	token, err := k.serviceToken(ctx)
	if err != nil {
		return "", err
	}
	claims, err := readClaims(token)
	return claims.Subject, err
}

// userOfRegistration finds the user that was created for a registration whose
// answer we may have missed, or errNotFound.
func (k *keycloak) userOfRegistration(ctx context.Context, id registrationID) (keycloakUser, error) {
	return k.findUser(ctx, url.Values{"q": {attrRegistrationID + ":" + string(id)}})
}

// userByLogin finds the user who signs in with this e-mail address or username. Whom others have created in Keycloak
// may have the address with a U-label (RFC 5890 §2.3.2.1).
func (k *keycloak) userByLogin(ctx context.Context, login string) (keycloakUser, error) {
	if local, domain, ok := strings.Cut(login, "@"); ok {
		unicode, _ := idna.ToUnicode(domain)
		for _, domain := range slices.Compact([]string{domain, unicode}) {
			u, err := k.findUser(ctx, url.Values{"email": {local + "@" + domain}, "exact": {"true"}})
			if !errors.Is(err, errNotFound) {
				return u, err
			}
		}
	}
	return k.userByUsername(ctx, login)
}

// userByUsername returns the user with a username, or errNotFound.
func (k *keycloak) userByUsername(ctx context.Context, username string) (keycloakUser, error) {
	return k.findUser(ctx, url.Values{"username": {username}, "exact": {"true"}})
}

func (k *keycloak) findUser(ctx context.Context, query url.Values) (keycloakUser, error) {
	var users []gocloak.User
	_, err := k.api(ctx, "find_user", "GET", "users", query, nil, &users)
	if err == nil && len(users) == 0 {
		err = errNotFound
	}
	if err != nil {
		return keycloakUser{}, err
	}
	return keycloakUser{users[0]}, nil
}

// disable disables a user and leaves everything else as it is: a PUT without attributes is a
// partial update.
func (k *keycloak) disable(ctx context.Context, id string) error {
	return k.update(ctx, "disable_user", keycloakUser{gocloak.User{ID: &id, Enabled: gocloak.BoolP(false)}})
}

// prepareMail gives the user a new code, and what its registration says by now, and enables it
// for the mail.
func (k *keycloak) prepareMail(ctx context.Context, ku keycloakUser, reg registration, code string) error {
	ku.describe(reg)
	(*ku.Attributes)[attrCode] = []string{code}
	ku.Enabled = gocloak.BoolP(true)
	return k.update(ctx, "prepare_mail", ku)
}

// activate makes the user an account in one call (V3): enabled, verified, with username, names,
// role and scope of its registration, without the secrets of the mail, and with the password,
// unless that is "". The password goes into this call and nowhere else.
//
// It returns the account; errConflict when another user has the username, and rejected when the
// password policy or the profile rules refuse something: nothing has changed then.
func (k *keycloak) activate(ctx context.Context, ku keycloakUser, reg registration, password string) (
	keycloakUser, error) {
	ku, on := ku.withoutState(), true
	ku.describe(reg)
	for _, name := range []string{attrToken, attrCode, attrKind} { // attrURL is for the mail of a new address, too
		delete(*ku.Attributes, name)
	}
	ku.Username, ku.RequiredActions, ku.Enabled, ku.EmailVerified = &reg.Username, &[]string{}, &on, &on
	with := ku
	if password != "" {
		kind, off := "password", false
		with.Credentials = &[]gocloak.CredentialRepresentation{{Type: &kind, Value: &password, Temporary: &off}}
	}
	return ku, k.update(ctx, "activate_user", with)
}

// deleteUser deletes a user (E2); one that is gone already is fine.
func (k *keycloak) deleteUser(ctx context.Context, id string) error {
	return k.end(ctx, "delete_user", "DELETE", pathOf("users", id))
}

// unlock ends the lock that Keycloak's guard against guessing has put on a user, if there is one, and says so.
func (k *keycloak) unlock(ctx context.Context, id string) (locked bool, err error) {
	var guard struct{ Disabled bool }
	path := pathOf("attack-detection", "brute-force", "users", id)
	if _, err = k.api(ctx, "user_locked", "GET", path, nil, nil, &guard); err == nil {
		err = k.end(ctx, "unlock_user", "DELETE", path)
	}
	return guard.Disabled, err
}

// What a mail asks a person to do on Keycloak's page.
var (
	verifyEmail    []string
	choosePassword = []string{"UPDATE_PASSWORD"}
	securityNotice = []string{} // nothing: the mail tells that something was changed
)

// sendMail makes Keycloak mail an enabled user, in the language that is nearest to a locale: people may set theirs to
// anything in Keycloak. Keycloak hands the mail to its SMTP server before it answers; errMailNotSent means that this
// failed.
func (k *keycloak) sendMail(ctx context.Context, id, locale string, lifespan time.Duration, actions []string) error {
	return k.asService(ctx, "send_mail", func(ctx context.Context, token string) error {
		req := k.admin.RestyClient().R().SetContext(ctx).SetAuthToken(token).
			SetHeader("Accept-Language", k.cfg.site.Match(locale)).
			SetQueryParam("lifespan", strconv.Itoa(int(lifespan.Seconds())))
		path := "send-verify-email"
		if actions != nil {
			path = "execute-actions-email"
			req.SetBody(actions).
				SetQueryParam("client_id", k.cfg.AuthClientID).
				SetQueryParam("redirect_uri", k.cfg.PublicURL+"/account/ready")
		}
		resp, err := req.Put(k.cfg.KeycloakURL + "/admin/realms/" + k.cfg.KeycloakRealm + "/" + pathOf("users", id, path))
		var said objection
		if err == nil && resp.StatusCode() == http.StatusInternalServerError && json.Unmarshal(resp.Body(), &said) == nil &&
			said.Message != "" {
			return errMailNotSent
		}
		return responseError(resp, err)
	})
}
