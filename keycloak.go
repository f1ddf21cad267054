package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

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

// keycloakOperations are what calls are measured as.
var keycloakOperations = []string{"activate_user", "code_grant", "count_users", "create_user", "delete_user",
	"disable_user", "discovery", "end_offline", "end_session", "end_sessions", "find_user", "get_user",
	"list_events", "list_users", "password_grant", "ping", "prepare_mail", "push_user", "refresh_grant",
	"rename_user", "send_mail", "signing_keys", "unlock_user", "user_consents", "user_locked", "user_sessions"}

// What Keycloak may answer beside errNotFound, errConflict and errUnavailable.
var (
	errInvalidCredentials = errors.New("keycloak: invalid user credentials")
	errAccountDisabled    = errors.New("keycloak: account disabled")
	errSetupRequired      = errors.New("keycloak: account is not fully set up")
	errInvalidGrant       = errors.New("keycloak: invalid grant")
	errMailNotSent        = errors.New("keycloak could not send the mail")
	errRefused            = errors.New("keycloak refuses the request")
	errServiceToken       = fmt.Errorf("%w: keycloak refuses the service account's token", errUnavailable)
	errBusy               = fmt.Errorf("%w: too much is waiting", errUnavailable)
)

// rejected are Keycloak's objections to a user: its profile rules, its password policy.
type rejected struct{ Fields []fieldError }

func (r rejected) Error() string { return fmt.Sprintf("keycloak rejects %d fields", len(r.Fields)) }

// keycloak makes all calls to Keycloak: those about users are in keycloak_user.go. It
// knows nothing of PostgreSQL.
type keycloak struct {
	cfg     config
	client  *http.Client
	admin   *gocloak.GoCloak
	metrics *metrics

	calls     bulkhead // everything but these:
	mails     bulkhead // they wait for SMTP, and must not keep people from signing in
	passwords bulkhead // a check takes Keycloak long, and guesses must not keep sessions from being refreshed

	service atomic.Pointer[oauth2.Token] // of the service account, renewed before it ends
	renewal singleflight.Group
}

func newKeycloak(cfg config, m *metrics) *keycloak {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	scheme, _, _ := strings.Cut(cfg.issuer(), ":")
	client := &http.Client{Transport: keycloakOnly{forwarding{transport, scheme}}}
	k := &keycloak{cfg: cfg, client: client, metrics: m, calls: newBulkhead(24, 48), mails: newBulkhead(8, 16),
		passwords: newBulkhead(16, 8)}
	k.admin = gocloak.NewClient(cfg.KeycloakURL)
	k.admin.SetRestyClient(resty.NewWithClient(client)) // its own has no limits, and a cookie jar for all users
	return k
}

// forwarding tells Keycloak the client's address, for its events and its guard against guessing. Keycloak believes it
// if it trusts this service as a proxy. Then it must be told the scheme, too: it refuses people who come without TLS.
// The trace context goes on as it came: the service makes no spans.
type forwarding struct {
	http.RoundTripper
	scheme string
}

func (f forwarding) RoundTrip(r *http.Request) (*http.Response, error) {
	if q := requestOf(r.Context()); q.Client.IsValid() {
		r = r.Clone(r.Context())
		r.Header.Set("X-Forwarded-For", q.Client.String())
		r.Header.Set("X-Forwarded-Proto", f.scheme)
		maps.Copy(r.Header, q.Trace)
	}
	return f.RoundTripper.RoundTrip(r)
}

// keycloakOnly makes an outage of each answer that is not Keycloak's. Keycloak answers in JSON, also to say no, or
// without a body (201, 204). A proxy's own 404, 403 or 429, its page, and its redirect to one say nothing of a user.
type keycloakOnly struct{ http.RoundTripper }

func (k keycloakOnly) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := k.RoundTripper.RoundTrip(r)
	if err != nil || resp.StatusCode == http.StatusCreated || resp.StatusCode == http.StatusNoContent {
		return resp, err
	}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if kind != "application/json" {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%w: not an answer of Keycloak: %d %s", errUnavailable, resp.StatusCode, kind)
	}
	return resp, nil
}

// bulkhead bounds the calls under way. Keycloak is slow by design where passwords
// are hashed: as many again may wait, the rest is told so at once.
type bulkhead struct {
	running  chan struct{}
	admitted *waiters
}

// newBulkhead lets n calls run and as many wait. One client has no more than each of these places.
func newBulkhead(n, each int) bulkhead {
	return bulkhead{make(chan struct{}, n), &waiters{most: 2 * n, each: each, of: map[string]int{}}}
}

func (b bulkhead) do(ctx context.Context, f func() error) error {
	leave := b.admitted.enter(clientNetwork(ctx))
	if leave == nil {
		return errBusy
	}
	defer leave()
	select {
	case b.running <- struct{}{}:
		defer func() { <-b.running }()
	case <-ctx.Done():
		return errBusy
	}
	return f()
}

// call makes one call: bounded in number and time, measured, its error translated.
func (k *keycloak) call(ctx context.Context, operation string, b bulkhead, timeout time.Duration,
	f func(context.Context) error) error {
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
func (k *keycloak) asService(ctx context.Context, operation string,
	f func(ctx context.Context, token string) error) error {
	b, timeout := k.calls, keycloakTimeout
	switch operation {
	case "send_mail":
		b, timeout = k.mails, mailTimeout
	case "list_users", "list_events":
		timeout = listTimeout
	}
	return k.call(ctx, operation, b, timeout, func(ctx context.Context) error {
		for again := false; ; again = true {
			token, err := k.serviceToken(ctx)
			if err == nil {
				err = f(ctx, token)
			}
			if again || !errors.Is(err, errServiceToken) {
				return err
			}
			k.service.Store(nil)
		}
	})
}

// pathOf is a path in the admin API. Ids of Keycloak go into it as one segment, whatever they are: those of
// user-storage providers are f:<component>:<any text>. "": nobody has such an id.
func pathOf(segments ...string) string {
	for i, s := range segments {
		if s == "" || s == "." || s == ".." || len(s) > 255 || strings.ContainsFunc(s, unicode.IsControl) {
			return ""
		}
		segments[i] = url.PathEscape(s)
	}
	return strings.Join(segments, "/")
}

// api asks the realm's admin API as the service account, and reads the answer into answer, if there is one.
// gocloak's own methods would lose field errors, and know no lifespan and no language of a mail.
func (k *keycloak) api(ctx context.Context, operation, method, path string, query url.Values, body, answer any) (
	http.Header, error) {
	var header http.Header
	if path == "" {
		return header, errNotFound
	}
	err := k.asService(ctx, operation, func(ctx context.Context, token string) error {
		req := k.admin.RestyClient().R().SetContext(ctx).SetAuthToken(token).SetQueryParamsFromValues(query).SetBody(body)
		if answer != nil {
			req.SetResult(answer)
		}
		resp, err := req.Execute(method, k.cfg.KeycloakURL+"/admin/realms/"+k.cfg.KeycloakRealm+"/"+path)
		if err := responseError(resp, err); err != nil {
			return err
		}
		header = resp.Header()
		return nil
	})
	return header, err
}

// end makes a call that ends something; what is gone already is fine.
func (k *keycloak) end(ctx context.Context, operation, method, path string) error {
	_, err := k.api(ctx, operation, method, path, nil, nil, nil)
	if errors.Is(err, errNotFound) {
		return nil
	}
	return err
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

// keycloakError translates what oauth2 and net/http say into our errors. No answer at all, and one that only the
// operator can do something about, is errUnavailable.
func keycloakError(err error) error {
	var request *url.Error
	if errors.As(err, &request) { // it quotes the URL, which may hold an address
		err = request.Err
	}
	for _, ours := range []error{nil, errUnavailable, errNotFound, errConflict, errRefused, errMailNotSent} {
		if errors.Is(err, ours) {
			return err
		}
	}
	var grant *oauth2.RetrieveError
	switch {
	case errors.As(err, new(rejected)):
		return err
	case !errors.As(err, &grant):
		return fmt.Errorf("%w: keycloak: %w", errUnavailable, err)
	// Decided by error and description: the status differs between versions.
	case grant.ErrorDescription == "Account disabled":
		return errAccountDisabled
	case grant.ErrorDescription == "Account is not fully set up":
		return errSetupRequired
	case grant.ErrorDescription == "Invalid user credentials":
		return errInvalidCredentials
	case grant.ErrorCode == "invalid_grant":
		return fmt.Errorf("%w: %s", errInvalidGrant, grant.ErrorDescription)
	}
	return fmt.Errorf("%w: keycloak: %s %s: %s", errUnavailable,
		grant.Response.Status, grant.ErrorCode, grant.ErrorDescription)
}

// oauth is the client that people sign in to.
func (k *keycloak) oauth() *oauth2.Config {
	return &oauth2.Config{ClientID: k.cfg.AuthClientID, ClientSecret: string(k.cfg.AuthClientSecret),
		Scopes:      []string{"openid"},
		RedirectURL: k.cfg.PublicURL + "/auth/callback",
		Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInParams, TokenURL: k.realmURL("protocol/openid-connect/token"),
			AuthURL: k.cfg.issuer() + "/protocol/openid-connect/auth"}}
}

// grant asks the token endpoint for tokens.
func (k *keycloak) grant(ctx context.Context, operation string, b bulkhead,
	f func(context.Context) (*oauth2.Token, error)) (*oauth2.Token, error) {
	var token *oauth2.Token
	err := k.call(ctx, operation, b, keycloakTimeout, func(ctx context.Context) (err error) {
		token, err = f(context.WithValue(ctx, oauth2.HTTPClient, k.client))
		return err
	})
	return token, err
}

// signIn exchanges a password for tokens (RFC 6749 §4.3). It returns
// errInvalidCredentials, errAccountDisabled or errSetupRequired.
func (k *keycloak) signIn(ctx context.Context, login, password, otp string) (*oauth2.Token, error) {
	parameters := []oauth2.AuthCodeOption{oauth2.SetAuthURLParam("grant_type", "password"),
		oauth2.SetAuthURLParam("scope", "openid"),
		oauth2.SetAuthURLParam("username", login), oauth2.SetAuthURLParam("password", password)}
	if otp != "" { // Keycloak's own parameter, which PasswordCredentialsToken does not know
		parameters = append(parameters, oauth2.SetAuthURLParam("totp", otp))
	}
	return k.grant(ctx, "password_grant", k.passwords, func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().Exchange(ctx, "", parameters...)
	})
}

// signInAdmin is signIn for an administrator of the realm master.
func (k *keycloak) signInAdmin(ctx context.Context, name, password string) (*oauth2.Token, error) {
	cli := oauth2.Config{ClientID: "admin-cli", Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInParams,
		TokenURL: k.cfg.KeycloakURL + "/realms/master/protocol/openid-connect/token"}}
	return k.grant(ctx, "password_grant", k.passwords, func(ctx context.Context) (*oauth2.Token, error) {
		return cli.PasswordCredentialsToken(ctx, name, password)
	})
}

// refresh exchanges a refresh token for the next tokens (RFC 6749 §6). It returns
// errInvalidGrant when the session has ended.
func (k *keycloak) refresh(ctx context.Context, token string) (*oauth2.Token, error) {
	return k.grant(ctx, "refresh_grant", k.calls, func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().TokenSource(ctx, &oauth2.Token{RefreshToken: token}).Token()
	})
}

// redeem exchanges the code of the code flow for tokens (RFC 6749 §4.1.3, RFC 7636
// §4.5). It returns errInvalidGrant for a code that is used, too old or another's.
func (k *keycloak) redeem(ctx context.Context, code, verifier string) (*oauth2.Token, error) {
	return k.grant(ctx, "code_grant", k.calls, func(ctx context.Context) (*oauth2.Token, error) {
		return k.oauth().Exchange(ctx, code, oauth2.VerifierOption(verifier))
	})
}

// keycloakSession is a session of Keycloak, whoever has begun it.
type keycloakSession struct {
	ID      string    `json:"id"`
	Key     sessionID `json:"key"` // the id that a row of it gets
	Address string    `json:"address"`
	Started time.Time `json:"started"`
	Used    time.Time `json:"used"`
}

// sessions returns the live sessions of a user; none if the user is gone.
func (k *keycloak) sessions(ctx context.Context, user string) (live []keycloakSession, err error) {
	var list []gocloak.UserSessionRepresentation
	_, err = k.api(ctx, "user_sessions", "GET", pathOf("users", user, "sessions"), nil, nil, &list)
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	for _, l := range list {
		id := gocloak.PString(l.ID)
		live = append(live, keycloakSession{id, sessionID("SES-" + digest(id)[:16]), gocloak.PString(l.IPAddress),
			time.UnixMilli(gocloak.PInt64(l.Start)), time.UnixMilli(gocloak.PInt64(l.LastAccess))})
	}
	return live, err
}

// endSession ends a session in Keycloak, also an offline one; what is gone already is fine.
func (k *keycloak) endSession(ctx context.Context, sid string) (err error) {
	for _, offline := range []string{"false", "true"} {
		query := url.Values{"isOffline": {offline}}
		_, err = k.api(ctx, "end_session", "DELETE", pathOf("sessions", sid), query, nil, nil)
		if !errors.Is(err, errNotFound) {
			return err
		}
	}
	return nil
}

// logOut ends all sessions of a user in Keycloak, in one call.
func (k *keycloak) logOut(ctx context.Context, id string) error {
	return k.end(ctx, "end_sessions", "POST", pathOf("users", id, "logout"))
}

// endOffline revokes the offline tokens of a user (OpenID Connect Core §11): they outlive its sessions. Keycloak shows
// them as grants of consent.
func (k *keycloak) endOffline(ctx context.Context, id string) error {
	var grants []struct {
		ClientID string `json:"clientId"`
		Offline  []any  `json:"additionalGrants"`
	}
	_, err := k.api(ctx, "user_consents", "GET", pathOf("users", id, "consents"), nil, nil, &grants)
	for _, grant := range grants {
		if err == nil && len(grant.Offline) > 0 {
			err = k.end(ctx, "end_offline", "DELETE", pathOf("users", id, "consents", grant.ClientID))
		}
	}
	return err
}

// signingKeys returns the realm's keys that are of a known kind; others are skipped (RFC 7517 §5).
func (k *keycloak) signingKeys(ctx context.Context) (keys []jose.JSONWebKey, err error) {
	var set struct{ Keys []json.RawMessage }
	err = k.getJSON(ctx, "signing_keys", keycloakTimeout, "protocol/openid-connect/certs", &set)
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(raw) == nil {
			keys = append(keys, key)
		}
	}
	return keys, err
}

// ping asks for the realm's public description.
func (k *keycloak) ping(ctx context.Context) error {
	var realm struct{ Realm string }
	err := k.getJSON(ctx, "ping", 2*time.Second, "", &realm)
	if err == nil && realm.Realm != k.cfg.KeycloakRealm {
		err = fmt.Errorf("%w: not an answer of Keycloak: another realm", errUnavailable)
	}
	return err
}

// getJSON reads what the realm tells everybody.
func (k *keycloak) getJSON(ctx context.Context, operation string, timeout time.Duration, path string,
	answer any) error {
	return k.call(ctx, operation, k.calls, timeout, func(ctx context.Context) error {
		url := strings.TrimSuffix(k.realmURL(path), "/")
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
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
