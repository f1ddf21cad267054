package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/go-json-experiment/json" // claims differ in case, and none is there twice (RFC 7519 §4)
	"github.com/go-json-experiment/json/jsontext"
	signing "github.com/golang-jwt/jwt/v5"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/oauth2"
	"golang.org/x/sync/singleflight"
)

// Limits of token verification, and cache lifetimes.
const (
	maxToken       = 32 << 10         // bytes; the server reads no longer header
	tokenLeeway    = 30 * time.Second // between Keycloak's clock and ours, for exp, nbf and iat
	verifiedTokens = 10_000           // remembered, with whom they speak for: about 5 MB
	maxRemembered  = 512              // bytes of that; a token with more is verified each time
	verifiedFor    = 60 * time.Second
	keyInterval    = 30 * time.Second // between two fetches of the keys, unless a token asks for one
	keyPause       = 10 * time.Second // between two fetches whatever arrives
	keyWaiters     = 1024             // tokens that may wait for the next fetch
	keyWaitersEach = 16               // of one client address
	keysAbsent     = 1024             // ids remembered that the last fetch did not have
)

// tokenAlgorithms are all asymmetric: with HS256 a public key would be a secret, and "none" is not an algorithm.
var tokenAlgorithms = map[string]signing.SigningMethod{"RS256": signing.SigningMethodRS256,
	"ES256": signing.SigningMethodES256, "PS256": signing.SigningMethodPS256, "EdDSA": signing.SigningMethodEdDSA}

// signedToken is a token as it stands there (RFC 7515 §7.1). Nothing of it is believed.
type signedToken struct {
	header    tokenHeader
	claims    []byte // JSON
	input     string // what is signed
	signature []byte
}

// tokenHeader is what counts of a header. Keys that a token itself brings along (jwk, jku, x5u) count for nothing.
type tokenHeader struct {
	Algorithm string         `json:"alg"`
	KeyID     string         `json:"kid"`
	Critical  jsontext.Value `json:"crit"` // what must be understood; we understand nothing of that kind
	Encoded   jsontext.Value `json:"b64"`  // of claims that are not encoded (RFC 7797), which a JWT's always are
}

// parseToken takes a token apart.
func parseToken(token string) (t signedToken, err error) {
	dot := strings.LastIndexByte(token, '.')
	t.input = token[:max(dot, 0)]
	head, claims, _ := strings.Cut(t.input, ".")
	decode := base64.RawURLEncoding.Strict().DecodeString
	header, err1 := decode(head)
	t.claims, err = decode(claims) // another dot is not base64
	var err2 error
	t.signature, err2 = decode(token[dot+1:])
	if err = errors.Join(err1, err, err2); err == nil {
		err = json.Unmarshal(header, &t.header)
	}
	if err == nil && (tokenAlgorithms[t.header.Algorithm] == nil || t.header.Critical != nil || t.header.Encoded != nil) {
		err = errors.New("its algorithm, or what it wants to be understood, is not accepted")
	}
	return t, err
}

// tokenClaims are what Keycloak says in an access token, see keycloak/realm.json.
type tokenClaims struct {
	jwt.Claims
	Type            string   `json:"typ"` // Bearer; ID and Refresh are other tokens
	AuthorizedParty string   `json:"azp"`
	SessionID       string   `json:"sid"`
	UserID          userID   `json:"user_id"`
	Roles           []string `json:"roles"`
	NetworkID       string   `json:"network_id"`
	StationID       string   `json:"station_id"`
}

// principal is who an access token speaks for.
type principal struct {
	UserID    userID
	Subject   string // Keycloak's id of the user
	SessionID string // Keycloak's id of the session
	Roles     []string
	NetworkID string // "" = none, which is in nobody's scope
	StationID string
}

// size is how many bytes its texts have.
func (p principal) size() int {
	return len(string(p.UserID) + p.Subject + p.SessionID + strings.Join(p.Roles, "") + p.NetworkID + p.StationID)
}

func (p principal) is(role string) bool { return slices.Contains(p.Roles, role) }

// principal is whom the claims are about.
func (c tokenClaims) principal() principal {
	p := principal{c.UserID, c.Subject, c.SessionID, c.Roles, c.NetworkID, c.StationID}
	for _, scope := range []*string{&p.NetworkID, &p.StationID} {
		if *scope == noScope { // as attributesOf says to Keycloak, which drops empty claims
			*scope = ""
		}
	}
	return p
}

// verifier checks access tokens with the realm's keys, without asking anybody. The keys are fetched by one loop
// (keepKeys); they outlive Keycloak's absence.
type verifier struct {
	issuer string
	client string
	fetch  func(context.Context) ([]jose.JSONWebKey, error)
	now    func() time.Time

	revoked  revocations
	keys     atomic.Pointer[keySet]
	fetching singleflight.Group
	waiting  waiters // tokens that wait for the next fetch
}

// keySet is what the latest fetch has brought. The tokens that were verified with its keys are remembered with it,
// and so forgotten when a key is revoked.
type keySet struct {
	byID     map[string]jose.JSONWebKey
	verified *lru.Cache[[sha256.Size]byte, verifiedToken]
	absent   *lru.Cache[string, bool] // ids that were looked for in vain, until the next fetch
	asked    time.Time                // when the fetch began
	read     time.Time                // when the one began that has brought byID or found it again
	err      error                    // the fetch has failed: byID is of an earlier one
}

// verifiedToken is a token that needs no second look until then.
type verifiedToken struct {
	principal
	issued time.Time // by Keycloak's clock
	seen   time.Time // when it came first
	until  time.Time
}

func newVerifier(cfg config, kc *keycloak, now func() time.Time) *verifier {
	v := &verifier{issuer: cfg.issuer(), client: cfg.AuthClientID, fetch: kc.signingKeys, now: now,
		revoked: revocations{of: map[string]received{}, next: make(chan struct{})},
		waiting: waiters{most: keyWaiters, each: keyWaitersEach, of: map[string]int{}}}
	v.keys.Store(&keySet{})
	return v
}

// keepKeys fetches the keys now and at every interval.
func (v *verifier) keepKeys(ctx context.Context) {
	for ctx.Err() == nil {
		v.fetchKeys(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(keyInterval):
		}
	}
}

// fetchKeys waits until the keys are fetched once more, or ctx ends. However many ask for it, there is one fetch, and
// none sooner than keyPause after the last one.
func (v *verifier) fetchKeys(ctx context.Context) {
	fetched := v.fetching.DoChan("", func() (any, error) {
		time.Sleep(time.Until(v.keys.Load().asked.Add(keyPause)))
		v.refreshKeys(context.WithoutCancel(ctx))
		return nil, nil
	})
	select {
	case <-fetched:
	case <-ctx.Done():
	}
}

// refreshKeys fetches the keys. Without an answer those that we have stay good: a Keycloak that is away has revoked
// nothing.
func (v *verifier) refreshKeys(ctx context.Context) {
	before := v.keys.Load()
	after := &keySet{byID: before.byID, verified: before.verified, read: before.read, asked: time.Now()}
	after.absent, _ = lru.New[string, bool](keysAbsent) // fails only for a size below 1
	fetched, err := v.fetch(ctx)
	byID := map[string]jose.JSONWebKey{}
	for _, key := range fetched {
		if key.Use != "enc" && key.IsPublic() && key.KeyID != "" { // never a symmetric one
			byID[key.KeyID] = key
		}
	}
	switch {
	case err != nil:
		after.err = err
	case len(byID) == 0:
		after.err = fmt.Errorf("%w: keycloak: the realm has no signing keys", errUnavailable)
	case !reflect.DeepEqual(byID, before.byID):
		after.byID = byID
		after.verified, _ = lru.New[[sha256.Size]byte, verifiedToken](verifiedTokens)
	}
	if after.err == nil {
		after.read = after.asked
	}
	v.keys.Store(after)
}

// key returns the key that a token names, and the set that has it. A key that is not there may be new, so the first
// token that names it waits for a fetch that begins after its arrival: at most keyPause, and only so many of them, also
// of one client. After a fetch in vain others are refused at once. errUnavailable: nobody can tell now.
func (v *verifier) key(ctx context.Context, id string) (jose.JSONWebKey, *keySet, error) {
	keys, arrived := v.keys.Load(), time.Now()
	key, known := keys.byID[id]
	if known || id == "" { // nothing is signed with the zero key
		return key, keys, nil
	}
	unknown := errors.New("its key is not one of the realm")
	if keys.absent != nil && keys.absent.Contains(id) {
		return key, keys, unknown
	}
	leave := v.waiting.enter(clientNetwork(ctx))
	if leave == nil {
		return key, keys, errBusy
	}
	defer leave()
	for !known && !keys.asked.After(arrived) {
		if v.fetchKeys(ctx); ctx.Err() != nil {
			return key, keys, fmt.Errorf("%w: %w", errUnavailable, ctx.Err())
		}
		keys = v.keys.Load()
		key, known = keys.byID[id]
	}
	switch {
	case known:
		return key, keys, nil
	case keys.err != nil:
		return key, keys, keys.err
	}
	keys.absent.Add(id, true)
	return key, keys, unknown
}

// waiters counts those who have a place, so that one client address can't take all places.
type waiters struct {
	most, each int // places, and of one client
	mu         sync.Mutex
	all        int
	of         map[string]int // by network
}

// enter returns how to leave again, or nil if there is no place.
func (w *waiters) enter(client string) (leave func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all >= w.most || w.of[client] >= w.each {
		return nil
	}
	w.all++
	w.of[client]++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.all--
		if w.of[client]--; w.of[client] == 0 {
			delete(w.of, client)
		}
	}
}

// verify returns whom a token speaks for, unless it was revoked.
//
// It returns errUnavailable if the keys or the revocations can't be had, and otherwise an error that says what is
// wrong with the token and quotes nothing of it.
func (v *verifier) verify(ctx context.Context, token string) (principal, error) {
	t, err := v.verifySigned(ctx, token)
	if err == nil {
		err = v.revoked.check(ctx, t)
	}
	return t.principal, err
}

// verifySigned is verify without revocations.
func (v *verifier) verifySigned(ctx context.Context, token string) (t verifiedToken, err error) {
	if len(token) > maxToken {
		return t, errors.New("it is too long")
	}
	// Read only: a copy would be most of what a check allocates.
	content := unsafe.Slice(unsafe.StringData(token), len(token)) // #nosec G103 -- see above
	sum, now, seen := sha256.Sum256(content), v.now(), time.Now()
	if keys := v.keys.Load(); keys.verified != nil {
		if t, ok := keys.verified.Get(sum); ok && now.Before(t.until) {
			return t, nil
		}
	}
	signed, err := parseToken(token)
	if err != nil {
		return t, errors.New("it is not a JWT with an algorithm that is accepted")
	}
	c, err := v.checkClaims(signed, now)
	if err != nil { // also before the signature: only a token that would be accepted may wait for its key
		return t, err
	}
	keys, err := v.checkSignature(ctx, signed)
	if err != nil {
		return t, err
	}
	t = verifiedToken{c.principal(), c.IssuedAt.Time(), seen, now.Add(verifiedFor)}
	if ends := c.Expiry.Time().Add(tokenLeeway); ends.Before(t.until) {
		t.until = ends
	}
	if t.size() <= maxRemembered {
		keys.verified.Add(sum, t)
	}
	return t, nil
}

// checkSignature checks a signature with the realm's key of that name. It returns the keys that it was checked with.
func (v *verifier) checkSignature(ctx context.Context, t signedToken) (*keySet, error) {
	key, keys, err := v.key(ctx, t.header.KeyID)
	if err != nil {
		return keys, err
	}
	if key.Algorithm != t.header.Algorithm ||
		tokenAlgorithms[key.Algorithm].Verify(t.input, t.signature, key.Key) != nil {
		return keys, errors.New("its signature is wrong")
	}
	return keys, nil
}

// idToken checks the ID token of a code flow: signature, issuer, audience, time, and that it answers this very
// sign-in (OpenID Connect Core §3.1.3.7).
func (v *verifier) idToken(ctx context.Context, token *oauth2.Token, nonce string) error {
	raw, _ := token.Extra("id_token").(string)
	signed, err := parseToken(raw)
	if err == nil {
		_, err = v.checkSignature(ctx, signed) // and not go-oidc, which would not tell a missing key from an outage
	}
	if err != nil {
		return err
	}
	id, err := oidc.NewVerifier(v.issuer, nil, &oidc.Config{ClientID: v.client, InsecureSkipSignatureCheck: true,
		SupportedSigningAlgs: []string{signed.header.Algorithm},
		Now:                  func() time.Time { return v.now().Add(-tokenLeeway) }}).Verify(ctx, raw)
	switch {
	case err != nil:
		return err
	case !sameSecret(id.Nonce, nonce):
		return errors.New("the ID token's nonce is another")
	case id.AccessTokenHash != "":
		return id.VerifyAccessToken(token.AccessToken)
	}
	return nil
}

// readClaims reads an access token that has just come from Keycloak's token endpoint itself; no signature is needed to
// know its origin (OpenID Connect Core §3.1.3.7). It returns the problem of one that would not be accepted here.
func readClaims(token string) (c tokenClaims, err error) {
	if len(token) > maxToken {
		return c, problemTokenLong
	}
	signed, err := parseToken(token)
	if err == nil {
		err = json.Unmarshal(signed.claims, &c)
	}
	switch {
	case err != nil:
		return c, problemTokenAlgorithm.withCause(fmt.Errorf("keycloak's access token: %w", err))
	case c.Subject == "":
		return c, problemTokenClaims.withCause(errors.New("keycloak's access token: sub is missing"))
	}
	return c, nil
}

// checkClaims reads the claims and looks at everything but the signature (RFC 9068 §4, OpenID Connect Core §2).
func (v *verifier) checkClaims(t signedToken, now time.Time) (c tokenClaims, err error) {
	switch {
	case json.Unmarshal(t.claims, &c) != nil:
		return c, errors.New("its claims can't be read")
	case c.Issuer != v.issuer:
		return c, errors.New("its issuer is another realm")
	case c.Type != "Bearer":
		return c, errors.New("it is not an access token")
	case c.AuthorizedParty != v.client && !c.Audience.Contains(v.client):
		return c, errors.New("it was issued for another client")
	case c.Expiry == nil || c.IssuedAt == nil || c.Subject == "" || c.UserID == "":
		return c, errors.New("it lacks a claim")
	}
	switch err := c.ValidateWithLeeway(jwt.Expected{Time: now}, tokenLeeway); {
	case errors.Is(err, jwt.ErrExpired):
		return c, errors.New("it has expired")
	case err != nil:
		return c, errors.New("it is not valid yet")
	}
	return c, nil
}

// bearer returns whom the request speaks for by its Authorization header, or the challenge of RFC 6750 §3.
func (s *server) bearer(r *http.Request) (principal, error) {
	credentials := r.Header.Values("Authorization")
	scheme, token, _ := strings.Cut(strings.Join(credentials[:min(len(credentials), 1)], ""), " ")
	switch {
	case !strings.EqualFold(scheme, "Bearer"): // RFC 9110 §11.1: without case
		return principal{}, problemUnauthorized
	case len(credentials) > 1: // somebody downstream might look at the other one
		return principal{}, problemInvalidAccessToken.withCause(errors.New("there are several"))
	}
	p, err := s.verifier.verify(r.Context(), strings.Trim(token, " "))
	if err != nil && !errors.Is(err, errUnavailable) {
		return p, problemInvalidAccessToken.withCause(err)
	}
	return p, err
}

type principalKey struct{}

// authenticated lets only requests with a valid access token through.
func (s *server) authenticated(rt route, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := s.bearer(r)
		if err != nil {
			s.refuse(w, r, rt, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), principalKey{}, p)))
	})
}
