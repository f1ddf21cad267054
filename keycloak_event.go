package main

import (
	"cmp"
	"context"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// usersPage returns some users in a fixed order, with their attributes. Keycloak takes 1 to
// 3 ms for each, and with a hundred thousand users half a second for the page itself, hence
// not too few; in pages of a thousand and more each costs more again.
func (k *keycloak) usersPage(ctx context.Context, first, limit int) ([]keycloakUser, error) {
	var page []keycloakUser
	query := url.Values{"first": {strconv.Itoa(first)}, "max": {strconv.Itoa(limit)}, "briefRepresentation": {"false"}}
	_, err := k.api(ctx, "list_users", "GET", "users", query, nil, &page)
	return page, err
}

// countUsers says how many users the realm has.
func (k *keycloak) countUsers(ctx context.Context) (n int, err error) {
	_, err = k.api(ctx, "count_users", "GET", "users/count", nil, nil, &n)
	return n, err
}

// Keycloak's user events that matter: those that change what PostgreSQL has, changes of
// credentials, and sign-ins. UPDATE_PASSWORD, UPDATE_TOTP and REMOVE_TOTP are not among them:
// since Keycloak 26 they only come along with the two of credentials, for the same deed.
var (
	profileEvents = []string{"REGISTER", "UPDATE_PROFILE", "UPDATE_EMAIL", "VERIFY_EMAIL", "EXECUTE_ACTIONS",
		deleteAccount, "USER_DISABLED_BY_PERMANENT_LOCKOUT", "IDENTITY_PROVIDER_FIRST_LOGIN"}
	userEventTypes = append(profileEvents, "UPDATE_CREDENTIAL", "REMOVE_CREDENTIAL", "LOGIN", "LOGIN_ERROR")
)

// eventSources are Keycloak's two logs: of what administrators do, and of what users do.
var eventSources = [...]struct {
	path  string
	query url.Values
}{
	{"admin-events", url.Values{"resourceTypes": {"USER"}}},
	{"events", url.Values{"type": userEventTypes}},
}

// deleteAccount: a person has deleted its own account on Keycloak's page.
const deleteAccount = "DELETE_ACCOUNT"

// keycloakEvent says that something has happened to a user in Keycloak.
type keycloakEvent struct {
	ID        string `json:"id"`
	At        int64  `json:"time"`   // milliseconds since 1970
	Type      string `json:"type"`   // "": an administrator's
	UserID    string `json:"userId"` // in Keycloak; "" if it knows nobody of that name
	SessionID string `json:"sessionId"`
	Address   string `json:"ipAddress"`
	Details   struct {
		Grant  string `json:"grant_type"` // password: by the API, not on Keycloak's page
		CodeID string `json:"code_id"`    // the session that a page of Keycloak belongs to, also if it begins after it
	} `json:"details"`
	Resource string `json:"resourcePath"` // of an administrator's event: users/{id}/…
	Admin    struct {
		UserID  string `json:"userId"`
		Address string `json:"ipAddress"`
	} `json:"authDetails"`
	own bool // done by this service
}

// changesUser says whether the event may have changed what PostgreSQL has of the user.
func (e keycloakEvent) changesUser() bool {
	return e.UserID != "" && (e.Type == "" || slices.Contains(profileEvents, e.Type))
}

// credentialChange is the audit action of a password, one-time code or passkey that is new or gone.
const credentialChange = "credential.change" // #nosec G101 -- a name

// audited returns the audit entry of an event, and who has done it; false: it is not worth one.
// user is the user's id in PostgreSQL, "" if it has none. ours says that this service has made
// the session, and has audited it, or has audited a refusal from that address at that time.
func (e keycloakEvent) audited(user string, ours bool) (caller, entry, bool) {
	c := caller{Actor: cmp.Or(user, anonymous), Address: e.Address}
	a := entry{Action: "keycloak.login", Target: user,
		Details: map[string]any{"event": e.ID, "type": cmp.Or(e.Type, "ADMIN")}}
	if user == "" && e.UserID != "" {
		a.Details["keycloak_id"] = e.UserID
	}
	switch e.Type {
	case "LOGIN":
		return c, a, !ours
	case "LOGIN_ERROR":
		c.Actor, a.Outcome, a.Reason = anonymous, "refused", problemInvalidCredentials.slug()
		return c, a, !ours || e.Details.Grant != "password"
	case "":
		c.Actor, a.Action = "keycloak:admin", credentialChange
		return c, a, strings.HasSuffix(e.Resource, "/reset-password") || strings.Contains(e.Resource, "/credentials")
	}
	a.Action = credentialChange
	return c, a, !slices.Contains(profileEvents, e.Type)
}

// eventsPage is how many events are asked for at once.
const eventsPage = 1000

// events returns what has happened since a time, according to one source, in order. It calls
// progress after each page. The next page begins at the time of the last event, not after so
// many, as others may have expired meanwhile: some come twice.
func (k *keycloak) events(ctx context.Context, source int, since int64, progress func() error) (
	[]keycloakEvent, error) {
	own, err := k.ownID(ctx)
	if err != nil {
		return nil, err
	}
	var all []keycloakEvent
	query := maps.Clone(eventSources[source].query)
	query.Set("direction", "asc")
	query.Set("max", strconv.Itoa(eventsPage))
	for {
		var page []keycloakEvent
		query.Set("dateFrom", strconv.FormatInt(since, 10))
		_, err := k.api(ctx, "list_events", "GET", eventSources[source].path, query, nil, &page)
		if err == nil {
			err = progress()
		}
		if err != nil {
			return nil, err
		}
		for _, e := range page {
			if id, ok := strings.CutPrefix(e.Resource, "users/"); ok {
				e.UserID, _, _ = strings.Cut(id, "/")
				e.Address, e.own = e.Admin.Address, e.Admin.UserID == own
			}
			all = append(all, e)
		}
		if len(page) < eventsPage {
			return all, nil
		}
		since = max(since+1, page[len(page)-1].At)
	}
}
