package main

import (
	"context"
	"net/url"
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

// eventSources are Keycloak's two records: of what administrators do, and of what users do
// themselves.
var eventSources = [...]struct {
	path  string
	query url.Values
}{
	{"admin-events", url.Values{"resourceTypes": {"USER"}}},
	{"events", url.Values{"type": userEventTypes}},
}

// userEvent says that something has happened to a user in Keycloak.
type userEvent struct {
	Source int // of eventSources
	ID     string
	At     int64 // milliseconds since 1970
	UserID string
}

// eventsPage is how many events are asked for at once.
const eventsPage = 1000

// userEventTypes are those that change what is kept here.
var userEventTypes = []string{"REGISTER", "UPDATE_PROFILE", "UPDATE_EMAIL", "VERIFY_EMAIL", "EXECUTE_ACTIONS", "DELETE_ACCOUNT",
	"USER_DISABLED_BY_PERMANENT_LOCKOUT", "IDENTITY_PROVIDER_FIRST_LOGIN"}

// userEvents returns what has happened to users since a time, according to one source, other
// than by this service; and the time of the latest event, this service's own included, so
// that those are not read again and again. It calls alive after each page. The next page
// begins at the time of the last event, as others may have expired meanwhile: some come twice.
func (k *keycloak) userEvents(ctx context.Context, source int, since int64, alive func() error) (all []userEvent, latest int64, err error) {
	for first := 0; ; {
		var page []struct {
			ID           string `json:"id"`
			Time         int64  `json:"time"`
			UserID       string `json:"userId"`
			ResourcePath string `json:"resourcePath"`
			Details      struct {
				UserID string `json:"userId"`
			} `json:"authDetails"`
		}
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
			err = alive()
		}
		if err != nil {
			return nil, 0, err
		}
		for _, e := range page {
			latest = max(latest, e.Time)
			if id, ok := strings.CutPrefix(e.ResourcePath, "users/"); ok {
				e.UserID, _, _ = strings.Cut(id, "/")
			}
			if e.UserID != "" && e.Details.UserID != own {
				all = append(all, userEvent{source, e.ID, e.Time, e.UserID})
			}
		}
		if len(page) < eventsPage {
			return all, latest, nil
		}
		if first += eventsPage; latest > since {
			since, first = latest, 0
		}
	}
}
