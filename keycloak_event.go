package main

import (
	"context"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/Nerzal/gocloak/v13"
)

// usersPage returns some users in a fixed order, with their attributes. Keycloak takes 1 to
// 3 ms for each, and with a hundred thousand users half a second for the page itself, hence
// not too few; in pages of a thousand and more each costs more again.
func (k *keycloak) usersPage(ctx context.Context, first, limit int) ([]keycloakUser, error) {
	var page []keycloakUser
	err := k.asService(ctx, "list_users", func(ctx context.Context, token string) error {
		users, err := k.admin.GetUsers(ctx, token, k.cfg.KeycloakRealm,
			gocloak.GetUsersParams{First: &first, Max: &limit, BriefRepresentation: gocloak.BoolP(false)})
		page = make([]keycloakUser, len(users))
		for i, u := range users {
			page[i].User = *u
		}
		return err
	})
	return page, err
}

// countUsers says how many users the realm has.
func (k *keycloak) countUsers(ctx context.Context) (n int, err error) {
	err = k.asService(ctx, "count_users", func(ctx context.Context, token string) error {
		n, err = k.admin.GetUserCount(ctx, token, k.cfg.KeycloakRealm, gocloak.GetUsersParams{})
		return err
	})
	return n, err
}

// Keycloak's user events that matter: those that change what PostgreSQL has, changes of
// credentials, and sign-ins.
var (
	profileEvents    = []string{"REGISTER", "UPDATE_PROFILE", "UPDATE_EMAIL", "VERIFY_EMAIL", "EXECUTE_ACTIONS", "DELETE_ACCOUNT", "USER_DISABLED_BY_PERMANENT_LOCKOUT", "IDENTITY_PROVIDER_FIRST_LOGIN"}
	credentialEvents = []string{"UPDATE_PASSWORD", "RESET_PASSWORD", "UPDATE_CREDENTIAL", "REMOVE_CREDENTIAL", "UPDATE_TOTP", "REMOVE_TOTP"}
	userEventTypes   = slices.Concat(profileEvents, credentialEvents, []string{"LOGIN", "LOGIN_ERROR"})
)

// eventSources are Keycloak's two logs: of what administrators do, and of what users do.
var eventSources = [...]struct {
	path  string
	query url.Values
}{
	{"admin-events", url.Values{"resourceTypes": {"USER"}}},
	{"events", url.Values{"type": userEventTypes}},
}

// keycloakEvent says that something has happened to a user in Keycloak.
type keycloakEvent struct {
	ID        string
	At        int64  // milliseconds since 1970
	Type      string // of a user event; "" for an administrator's
	Resource  string // of an admin event: users/{id}/…
	UserID    string // in Keycloak; "" if it knows nobody of that name
	SessionID string
	Address   string
	Grant     string // password: by the API, not on Keycloak's page
}

// changesUser says whether the event may have changed what PostgreSQL has of the user.
func (e keycloakEvent) changesUser() bool {
	return e.UserID != "" && (e.Type == "" || slices.Contains(profileEvents, e.Type))
}

// audited returns the audit entry of an event, and who has done it; false: it is not worth one.
// user is the user's id here, or "". ours says that this service has made the session, and has
// audited it. A failed password grant was refused by this service, which has audited that.
func (e keycloakEvent) audited(user string, ours bool) (caller, entry, bool) {
	c := caller{Actor: anonymous, Address: e.Address}
	details := map[string]any{"event": e.ID, "type": e.Type}
	switch {
	case e.Type == "" && strings.HasSuffix(e.Resource, "/reset-password"), e.Type == "" && strings.Contains(e.Resource, "/credentials"):
		details["type"] = "ADMIN"
		return caller{Actor: "keycloak:admin", Address: e.Address}, entry{Action: "credential.change", Target: user, Details: details}, true
	case slices.Contains(credentialEvents, e.Type):
		c.Actor = user
		return c, entry{Action: "credential.change", Target: user, Details: details}, user != ""
	case e.Type == "LOGIN" && !ours:
		c.Actor = user
		return c, entry{Action: "keycloak.login", Target: user, Details: details}, user != ""
	case e.Type == "LOGIN_ERROR" && e.Grant != "password":
		return c, entry{Action: "keycloak.login", Target: user, Outcome: "refused", Reason: problemInvalidCredentials.slug(), Details: details}, true
	}
	return c, entry{}, false
}

// eventsPage is how many events are asked for at once.
const eventsPage = 1000

// events returns what has happened since a time, according to one source, other than by this
// service; and the time of the latest event, this service's own included, so that those are not
// read again and again. It calls progress after each page. The next page begins at the time of
// the last event, as others may have expired meanwhile: some come twice.
func (k *keycloak) events(ctx context.Context, source int, since int64, progress func() error) (all []keycloakEvent, latest int64, err error) {
	type event struct {
		ID           string `json:"id"`
		Time         int64  `json:"time"`
		Type         string `json:"type"`
		UserID       string `json:"userId"`
		SessionID    string `json:"sessionId"`
		Address      string `json:"ipAddress"`
		ResourcePath string `json:"resourcePath"`
		Details      struct {
			Grant string `json:"grant_type"`
		} `json:"details"`
		Administrator struct {
			UserID  string `json:"userId"`
			Address string `json:"ipAddress"`
		} `json:"authDetails"`
	}
	for first := 0; ; {
		var page []event
		query := url.Values{"dateFrom": {strconv.FormatInt(since, 10)}, "direction": {"asc"},
			"first": {strconv.Itoa(first)}, "max": {strconv.Itoa(eventsPage)}}
		var own string
		err := k.asService(ctx, "list_events", func(ctx context.Context, token string) error {
			claims, err := readClaims(token)
			if err != nil {
				return err
			}
			own = claims.Subject
			resp, err := k.admin.GetRequestWithBearerAuth(ctx, token).SetResult(&page).SetQueryParamsFromValues(eventSources[source].query).
				SetQueryParamsFromValues(query).Get(strings.Join([]string{k.cfg.KeycloakURL, "admin/realms", k.cfg.KeycloakRealm, eventSources[source].path}, "/"))
			return responseError(resp, err)
		})
		if err == nil {
			err = progress()
		}
		if err != nil {
			return nil, 0, err
		}
		for _, e := range page {
			latest = max(latest, e.Time)
			if e.Administrator.UserID == own {
				continue
			}
			if id, ok := strings.CutPrefix(e.ResourcePath, "users/"); ok {
				e.UserID, _, _ = strings.Cut(id, "/")
				e.Address = e.Administrator.Address
			}
			all = append(all, keycloakEvent{e.ID, e.Time, e.Type, e.ResourcePath, e.UserID, e.SessionID, e.Address, e.Details.Grant})
		}
		if len(page) < eventsPage {
			return all, latest, nil
		}
		if first += eventsPage; latest > since {
			since, first = latest, 0
		}
	}
}
