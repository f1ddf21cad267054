package main

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

const (
	mePath = "/api/v1/auth/me"

	bareChallenge  = `Bearer realm="auth-service"`
	tokenChallenge = `Bearer realm="auth-service", error="invalid_token", error_description="The access token is not valid or has expired."`
)

// bearing is a request with a token.
func bearing(path, token string) call { return call{path: path, auth: []string{"Bearer " + token}} }

// jsonText is a text as it is, or JSON.
func jsonText(v any) string {
	if text, ok := v.(string); ok {
		return text
	}
	encoded, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(encoded)
}

func segment(v any) string { return base64.RawURLEncoding.EncodeToString([]byte(jsonText(v))) }

// forge makes a JWT by the alg of its header, which need not be true.
func forge(key any, header body, claims any) string {
	input := segment(header) + "." + segment(claims)
	return input + "." + signature(header["alg"], key, input)
}

func signature(alg, key any, input string) string {
	var sig []byte
	var err error
	sum, longSum := sha256.Sum256([]byte(input)), sha512.Sum512([]byte(input))
	switch alg {
	case "RS256":
		sig, err = rsa.SignPKCS1v15(nil, key.(*rsa.PrivateKey), crypto.SHA256, sum[:])
	case "RS512":
		sig, err = rsa.SignPKCS1v15(nil, key.(*rsa.PrivateKey), crypto.SHA512, longSum[:])
	case "PS256":
		sig, err = rsa.SignPSS(rand.Reader, key.(*rsa.PrivateKey), crypto.SHA256, sum[:], nil)
	case "HS256":
		mac := hmac.New(sha256.New, key.([]byte))
		mac.Write([]byte(input))
		sig = mac.Sum(nil)
	}
	if err != nil {
		panic(err)
	}
	return base64.RawURLEncoding.EncodeToString(sig)
}

// changed is a copy with changes; nil deletes.
func changed(base, changes body) body {
	m := maps.Clone(base)
	maps.Copy(m, changes)
	maps.DeleteFunc(m, func(_ string, v any) bool { return v == nil })
	return m
}

// unpacked is what a real token has in one of its first two parts.
func unpacked(token string, part int) (m body) {
	decoded, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[part])
	if err != nil || json.Unmarshal(decoded, &m) != nil {
		panic("no token of Keycloak: " + token)
	}
	return m
}

func newKey() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
}

// pemAndDER are two forms of a public key.
func pemAndDER(key *rsa.PublicKey) (text, der []byte) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), der
}

// realmKey adds a key to the realm that the test has, too. Keycloak itself signs with
// it only if its priority is above 100.
func (w *env) realmKey(priority int) (key *rsa.PrivateKey, kid string) {
	w.Helper()
	key = newKey()
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	w.keycloakAdmin("POST", "/components", body{"name": fmt.Sprint("test ", priority), "providerId": "rsa", "providerType": "org.keycloak.keys.KeyProvider",
		"config": map[string][]string{"privateKey": {string(private)}, "priority": {fmt.Sprint(priority)}}}, nil)
	_, der := pemAndDER(&key.PublicKey)
	sum := sha256.Sum256(der) // as Keycloak names keys
	return key, base64.RawURLEncoding.EncodeToString(sum[:])
}

// forger makes tokens that are not quite those of a person who has signed in, where it can with a key of the realm.
type forger struct {
	*env
	email        string
	signIn       answer
	claims       body // of the access token
	head         body // of what key signs
	key, foreign *rsa.PrivateKey
}

func (w *env) forger() forger {
	w.Helper()
	email, _, _ := w.member()
	signIn := w.signsIn(email)
	key, kid := w.realmKey(1)
	return forger{w, email, signIn, unpacked(signIn.text("access_token"), 1), body{"alg": "RS256", "typ": "JWT", "kid": kid}, key, newKey()}
}

func (f forger) real() string              { return f.signIn.text("access_token") }
func (f forger) with(changes body) string  { return forge(f.key, f.head, changed(f.claims, changes)) }
func (f forger) under(changes body) string { return forge(f.key, changed(f.head, changes), f.claims) }
func (f forger) foreignly(changes body) string {
	return forge(f.foreign, changed(f.head, changes), f.claims)
}

// unixIn is a time in some seconds.
func unixIn(seconds int64) int64 { return time.Now().Unix() + seconds }

// sized has so many bytes: base64 has not all lengths, but one of these fits.
func (f forger) sized(size int) string {
	f.Helper()
	n := (size - len(f.with(nil))) * 3 / 4
	for i := range 60 {
		head, claims := body{"x": strings.Repeat("x", i%3)}, body{"x": strings.Repeat("x", n-i/3)}
		if token := forge(f.key, changed(f.head, head), changed(f.claims, claims)); len(token) == size {
			return token
		}
	}
	f.Fatalf("no token has %d bytes", size)
	return ""
}

// tokenURL is Keycloak's, not that of the proxy in front of it.
func (w *env) tokenURL() string {
	return services.KeycloakURL + "/realms/" + w.realm + "/protocol/openid-connect/token"
}

// byKeycloak are the person's tokens by all of Keycloak's algorithms.
func (f forger) byKeycloak() map[string]string {
	f.Helper()
	tokens := map[string]string{}
	for _, alg := range []string{"RS384", "ES512", "HS512", "PS256", "ES256", "EdDSA", "RS256"} {
		f.keycloakAdmin("PUT", "", body{"defaultSignatureAlgorithm": alg}, nil)
		people := oauth2.Config{ClientID: "auth-client", Endpoint: oauth2.Endpoint{TokenURL: f.tokenURL()}}
		token, err := people.PasswordCredentialsToken(f.Context(), f.email, password)
		if err != nil || unpacked(token.AccessToken, 0)["alg"] != alg {
			f.Fatalf("%s: %+v %v", alg, token, err)
		}
		tokens[alg] = token.AccessToken
	}
	return tokens
}

// accepted are tokens that are as they should be.
func (f forger) accepted(byKeycloak map[string]string) map[string]string {
	return map[string]string{
		"from Keycloak":      f.real(),
		"from the test":      f.with(nil),
		"as long as may be":  f.sized(maxToken),
		"ES256":              byKeycloak["ES256"],
		"PS256":              byKeycloak["PS256"],
		"EdDSA":              byKeycloak["EdDSA"],
		"header typ":         f.under(body{"typ": "at+jwt"}),
		"client only in aud": f.with(body{"azp": "other"}),
		"client among aud":   f.with(body{"azp": nil, "aud": []string{"other", "auth-client"}}),
		"client only in azp": f.with(body{"aud": "other"}),
		"just expired":       f.with(body{"exp": unixIn(-20)}),
		"valid in a moment":  f.with(body{"nbf": unixIn(20)}),
		"issued in a moment": f.with(body{"iat": unixIn(20)}),
		"claims in capitals": forge(f.key, f.head, strings.TrimSuffix(jsonText(f.claims), "}")+`,"ROLES":["admin"],"Network_ID":"N1"}`),
	}
}

// malformed are no tokens, or those of somebody or something else.
func (f forger) malformed(byKeycloak map[string]string) map[string]string {
	f.Helper()
	backend := clientcredentials.Config{ClientID: "backend-admin", ClientSecret: backendSecret, TokenURL: f.tokenURL()}
	serviceToken, err := backend.Token(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	adminToken, err := services.AdminToken(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	real := f.real()
	parts := strings.Split(real, ".")
	unencoded := segment(changed(f.head, body{"b64": false, "crit": []string{"b64"}}))
	kidTwice := segment(`{"alg":"RS256","kid":"x","kid":"`+f.head["kid"].(string)+`"}`) + "." + segment(f.claims)
	return map[string]string{
		"no signature":        parts[0] + "." + parts[1] + ".",
		"another's signature": parts[0] + "." + parts[1] + "." + strings.Split(f.with(nil), ".")[2],
		"altered signature":   parts[0] + "." + parts[1] + ".AAAAAAAA" + parts[2][8:],
		"altered payload":     parts[0] + "." + segment(changed(f.claims, body{"roles": []string{"admin"}})) + "." + parts[2],
		"altered header":      segment(changed(unpacked(real, 0), body{"typ": "jwt"})) + "." + parts[1] + "." + parts[2],
		"b64":                 unencoded + "." + segment(f.claims) + "." + signature("RS256", f.key, unencoded+"."+jsonText(f.claims)),
		"kid twice":           kidTwice + "." + signature("RS256", f.key, kidTwice),
		"claim twice":         forge(f.key, f.head, strings.Replace(jsonText(f.claims), `"roles":`, `"roles":["admin"],"roles":`, 1)),
		"claims null":         forge(f.key, f.head, "null"), "claims of a list": forge(f.key, f.head, "[]"), "claims of a text": forge(f.key, f.head, `"text"`),
		"too long": f.sized(maxToken + 1),
		"ID token": f.signIn.text("id_token"), "refresh token": f.signIn.text("refresh_token"),
		"service account's": serviceToken.AccessToken, "another realm's": adminToken,
		"RS384": byKeycloak["RS384"], "ES512": byKeycloak["ES512"], "HS512": byKeycloak["HS512"],
		"trailing garbage": real + "x", "trailing dot": real + ".", "trailing padding": real + "==", "twice": real + "," + real,
		"whitespace": real[:20] + " " + real[20:], "a tab": "\t" + real, "quoted": `"` + real + `"`,
		"flattened JSON": fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]),
		"general JSON":   fmt.Sprintf(`{"payload":%q,"signatures":[{"protected":%q,"signature":%q}]}`, parts[1], parts[0], parts[2]),
		"five parts":     real + "." + parts[0] + "." + parts[1], "two parts": parts[0] + "." + parts[1],
		"one dot": ".", "two dots": "..", "three dots": "...",
		"not base64": "!.!.!", "no token": "token", "not ASCII": "é", "empty": "", "blanks": "   ",
	}
}

// forged have one thing that is wrong in the claims, in the header, or of the key. Some of them lure us to fetch keys.
func (f forger) forged(lure string) map[string]string {
	bad := map[string]string{}
	for _, c := range []body{{"iss": lure}, {"iss": f.claims["iss"].(string) + "/"}, {"iss": nil}, {"azp": "other", "aud": []string{"other", "account"}},
		{"azp": nil, "aud": nil}, {"typ": "ID"}, {"typ": "Refresh"}, {"typ": "bearer"}, {"typ": nil}, {"exp": unixIn(-32)}, {"exp": nil}, {"exp": "tomorrow"},
		{"nbf": unixIn(40)}, {"iat": unixIn(40)}, {"user_id": nil}, {"user_id": ""}, {"user_id": 7}, {"sub": nil}, {"roles": "admin"}} {
		bad["claim "+jsonText(c)] = f.with(c)
	}
	realKID := unpacked(f.real(), 0)["kid"]
	for _, h := range []body{{"alg": "RS512"}, {"alg": "PS256"}, {"alg": "none"}, {"alg": "none", "kid": realKID}, {"alg": "None"}, {"alg": nil}, {"kid": nil}, {"kid": ""},
		{"crit": []string{"exp"}, "exp": unixIn(300)}, {"crit": []string{"x"}, "x": 1}, {"b64": false}} {
		bad["header "+jsonText(h)] = f.under(h)
	}
	jwk := func(id any) jose.JSONWebKey {
		kid, _ := id.(string)
		return jose.JSONWebKey{Key: &f.foreign.PublicKey, KeyID: kid}
	}
	for _, h := range []body{{"kid": realKID}, {}, {"kid": "unknown"}, {"kid": "../../../dev/null"}, {"jku": lure}, {"kid": "unknown", "jku": lure},
		{"kid": "unknown", "x5u": lure}, {"jwk": jwk(f.head["kid"])}, {"kid": "unknown", "jwk": jwk("unknown")}, {"kid": nil, "jwk": jwk(nil)}} {
		bad["foreign key, header "+jsonText(h)] = f.foreignly(h)
	}
	text, der := pemAndDER(&f.key.PublicKey)
	modulus := f.key.N.Bytes()
	for name, secret := range map[string][]byte{"nothing": {}, "PEM": text, "DER": der, "PKCS 1": x509.MarshalPKCS1PublicKey(&f.key.PublicKey),
		"modulus": modulus, "modulus in base64": []byte(base64.RawURLEncoding.EncodeToString(modulus))} {
		bad["HS256 with "+name] = forge(secret, changed(f.head, body{"alg": "HS256"}), f.claims)
	}
	return bad
}

// credentials is what somebody sends as Authorization, and the challenge that it gets; "": it is accepted.
type credentials struct {
	name      string
	auth      []string
	challenge string
}

// headers are the ways to send a good token.
func headers(token string) []credentials {
	bearer, basic := "Bearer "+token, "Basic dTpw"
	return []credentials{
		{"nothing", nil, bareChallenge},
		{"empty", []string{""}, bareChallenge},
		{"Basic", []string{basic}, bareChallenge},
		{"DPoP", []string{"DPoP " + token}, bareChallenge},
		{"no scheme", []string{token}, bareChallenge},
		{"Bearers", []string{"Bearers " + token}, bareChallenge},
		{"scheme only", []string{"Bearer"}, tokenChallenge},
		{"two", []string{bearer, bearer}, tokenChallenge},
		{"two schemes", []string{bearer, basic}, tokenChallenge},
		{"two schemes, Basic first", []string{basic, bearer}, bareChallenge},
		{"lower case", []string{"bearer " + token}, ""},
		{"upper case", []string{"BEARER " + token}, ""},
		{"blanks", []string{"Bearer    " + token}, ""},
	}
}

// judges sends all of them, to what gateways ask and to the API.
func (w *env) judges(rows []credentials) {
	w.Helper()
	var all sync.WaitGroup // a key that is not known is waited for
	for _, r := range rows {
		for _, path := range []string{validatePath, mePath} {
			all.Go(func() {
				a := w.do(call{path: path, auth: r.auth})
				identity := a.Header.Get("X-Auth-Roles") + a.Header.Get("X-Auth-Network-Id") + a.Header.Get("X-Auth-Station-Id")
				switch {
				case r.challenge == "":
					if a.Status != 200 || path == validatePath && identity != "user" {
						w.Errorf("%s: %s: %v %v", path, r.name, a, a.Header)
					}
				case a.Status != 401 || a.slug() != "unauthorized" || a.Header.Get("WWW-Authenticate") != r.challenge ||
					a.Header.Get("X-Auth-User-Id") != "":
					w.Errorf("%s: %s: %v %v", path, r.name, a, a.Header)
				}
			})
		}
	}
	all.Wait()
}

// TestForgedTokens has every token that is not quite one, and next to it what is. Where
// it can, exactly one thing is wrong, under a signature of the realm.
func TestForgedTokens(t *testing.T) {
	w := sharedEnv(t)
	defer w.straysDie()        // of Keycloak's own tokens
	asked := new(atomic.Int32) // whoever forges would like us to fetch his keys
	lure := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer lure.Close()
	f := w.forger()
	byKeycloak := f.byKeycloak()
	rows := headers(f.real())
	for name, token := range f.accepted(byKeycloak) {
		rows = append(rows, credentials{name, []string{"Bearer " + token}, ""})
	}
	for _, bad := range []map[string]string{f.malformed(byKeycloak), f.forged(lure.URL)} {
		for name, token := range bad {
			rows = append(rows, credentials{name, []string{"Bearer " + token}, tokenChallenge})
			if len(token) > 100 {
				w.secrets.add(token)
			}
		}
	}
	w.judges(rows)
	if n := asked.Load(); n > 0 {
		t.Errorf("the forger was asked for keys %d times", n)
	}
	// An account that is gone has a token for a while.
	gone := f.with(body{"user_id": newUserID()})
	w.wants(w.do(bearing(validatePath, gone)), 200, "")
	a := w.do(bearing(mePath, gone))
	if w.wants(a, 401, "unauthorized"); a.Header.Get("WWW-Authenticate") != tokenChallenge {
		t.Error(a.Header)
	}
}

// A thousand tokens that name as many keys cost one fetch of the keys, and hold nobody up.
func TestUnknownKeys(t *testing.T) {
	w := sharedEnv(t)
	w.quick = true
	email, _, _ := w.member()
	var unseen []string
	for range 5 {
		unseen = append(unseen, w.login(email, password).text("access_token"))
	}
	claims, signature := segment(unpacked(unseen[0], 1)), strings.Split(unseen[0], ".")[2]
	before := len(w.kc.times("signing_keys"))
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond) // over two seconds
			token := segment(body{"alg": "RS256", "kid": newUserID()}) + "." + claims + "." + signature
			if a, err := w.send(w.url, bearing(validatePath, token)); err != nil || a.Status != 401 {
				t.Errorf("%v %v", a, err)
			}
		})
	}
	over := make(chan struct{})
	go func() { all.Wait(); close(over) }()
	passed := 0
	for waiting := true; waiting; passed++ {
		start := time.Now()
		w.wants(w.do(bearing(validatePath, unseen[min(passed, len(unseen)-1)])), 200, "")
		if took := time.Since(start); took > time.Second {
			t.Errorf("a valid token waits for %v", took)
		}
		select {
		case <-over:
			waiting = false
		case <-time.After(5 * time.Millisecond):
		}
	}
	fetches := w.kc.times("signing_keys")[before:]
	if len(fetches) == 0 {
		t.Error("nobody looked for the keys")
	}
	for i := 1; i < len(fetches); i++ {
		if pause := fetches[i].Sub(fetches[i-1]); pause < keyPause-100*time.Millisecond {
			t.Errorf("the keys were fetched again after %v", pause)
		}
	}
}

// Keycloak's key is replaced while people work: nobody is refused a valid token, and
// the old key's tokens are refused as soon as its revocation can be known.
func TestKeyRotation(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer stop()
	asks := func(r call) answer {
		a, err := w.send(w.url, r)
		if err != nil || a.Status != 200 {
			t.Errorf("%s: %v %v", r.path, a, err)
			stop()
		}
		return a
	}
	latest := make([]atomic.Value, 4) // the key of each worker's newest token
	for i := range latest {
		email, _, _ := w.member()
		latest[i].Store("")
		workers.Go(func() {
			var a answer
			var signedIn time.Time
			for ctx.Err() == nil {
				if time.Since(signedIn) > 10*time.Second {
					a, signedIn = asks(signingIn(email, password)), time.Now()
				} else {
					a = asks(call{method: "POST", path: refreshPath, json: body{"refresh_token": a.text("refresh_token")}})
				}
				if asks(bearing(validatePath, a.text("access_token"))); ctx.Err() == nil {
					asks(bearing(mePath, a.text("access_token")))
					latest[i].Store(unpacked(a.text("access_token"), 0)["kid"])
				}
				select { // ten times a second will do
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	email, _, _ := w.member()
	old := w.login(email, password).text("access_token")
	_, kid := w.realmKey(200)
	w.eventually("all have tokens of the new key", time.Minute, func() bool {
		w.wants(w.do(bearing(validatePath, old)), 200, "")
		return ctx.Err() != nil || !slices.ContainsFunc([]int{0, 1, 2, 3}, func(i int) bool { return latest[i].Load() != kid })
	})
	var keys []struct{ ID, Name, ProviderID string }
	w.keycloakAdmin("GET", "/components?type=org.keycloak.keys.KeyProvider", nil, &keys)
	for _, key := range keys {
		if key.ProviderID == "rsa" && !strings.HasPrefix(key.Name, "test ") {
			w.keycloakAdmin("DELETE", "/components/"+key.ID, nil, nil)
		}
	}
	w.eventually("the old key is forgotten", keyInterval+keyPause+5*time.Second, func() bool {
		return ctx.Err() != nil || w.do(bearing(validatePath, old)).Status == 401
	})
	w.account(newEmail()) // the service account's token was of the old key, too
}

// Without Keycloak a token is good for its whole life, remembered or not, and no
// longer.
func TestTokensWithoutKeycloak(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	email, _, _ := w.member()
	w.keycloakAdmin("PUT", "", body{"accessTokenLifespan": 15}, nil)
	var tokens []string
	for range 7 {
		tokens = append(tokens, w.login(email, password).text("access_token"))
	}
	passes := func(w *env, token string, status int, slug string) {
		t.Helper()
		w.wants(w.do(bearing(validatePath, token)), status, slug)
	}
	past := func(token string, seconds float64) func() bool { // its end
		return func() bool { return float64(time.Now().UnixMilli())/1000-unpacked(token, 1)["exp"].(float64) > seconds }
	}
	passes(w, tokens[0], 200, "")
	w.kc.close()
	late := *w // an instance that never saw a key
	defer late.startBlind()()
	passes(&late, tokens[0], 503, "unavailable")
	for i, moment := range []float64{-1, 1, 10, 20, 28} {
		w.eventually("its moment", time.Minute, past(tokens[0], moment))
		passes(w, tokens[0], 200, "")   // known
		passes(w, tokens[i+1], 200, "") // never seen before
	}
	w.eventually("the end of all", time.Minute, past(tokens[6], tokenLeeway.Seconds()))
	for _, token := range tokens {
		passes(w, token, 401, "unauthorized")
	}
	passes(&late, tokens[0], 401, "unauthorized") // whatever its key
	if err := w.kc.open(); err != nil {
		t.Fatal(err)
	}
	late.eventually("the late instance has the keys", time.Minute, func() bool {
		return late.do(bearing(validatePath, w.login(email, password).text("access_token"))).Status == 200
	})
}

// gatewayUser is somebody whose token gateways ask about.
type gatewayUser struct{ name, roles, network, station, token, id, subject string }

// gatewayUsers are people of all roles, in and out of scope.
func (w *env) gatewayUsers() []gatewayUser {
	w.Helper()
	people := []gatewayUser{
		{name: "admin", roles: "admin"},
		{name: "partner", roles: "partner", network: "N1"},
		{name: "unbound", roles: "partner"}, // to any network
		{name: "operator", roles: "operator", network: "N1", station: "S1"},
		{name: "user", roles: "user", network: "N1", station: "S1"},
		{name: "stranger", roles: "user"},
		{name: "both", roles: "operator,user", network: "N2", station: "S2"},
	}
	for i := range people {
		p := &people[i]
		email, _, subject := w.member()
		var u body
		w.keycloakAdmin("GET", "/users/"+subject, nil, &u)
		attributes := u["attributes"].(body)
		attributes["roles"] = strings.Split(p.roles, ",")
		for name, value := range map[string]string{"network_id": p.network, "station_id": p.station} {
			if value != "" { // who has none is registered with "X"
				attributes[name] = []string{value}
			}
		}
		w.keycloakAdmin("PUT", "/users/"+subject, u, nil)
		role, more, _ := strings.Cut(p.roles, ",")
		w.exec(`update users set role = $2, network_id = $3, station_id = $4 where keycloak_id = $1`, subject, role, p.network, p.station)
		p.token = w.grant(url.Values{"grant_type": {"password"}, "username": {email}, "password": {password}}).text("access_token")
		p.subject, p.id = subject, w.value(`select user_id from users where email = $1`, email)
		if more != "" { // as can be in a token, but not here
			attributes["roles"] = []string{role}
			w.keycloakAdmin("PUT", "/users/"+subject, u, nil)
		}
	}
	w.straysDie()
	return people
}

// demands are what a gateway may ask for, and who has it; "!" are the fields that can't be understood, for anybody.
var demands = []struct{ queries, passes string }{
	{"?", "admin partner unbound operator user stranger both"},
	{"?role=admin", "admin"},
	{"?role=partner", "partner unbound"},
	{"?role=operator", "operator both"},
	{"?role=user ?role=user&role=user", "user stranger both"},
	{"?role=admin&role=partner", "admin partner unbound"},
	{"?role=operator&role=admin&role=user", "admin operator user stranger both"},
	{"?network_id=N1 ?network_id=N1&network_id=N1", "admin partner operator user"},
	{"?network_id=N2", "admin both"},
	{"?network_id=N3 ?network_id=n1 ?network_id=N1%20 ?network_id=N1&network_id=N2", "admin"},
	{"?network_id= ?network_id ?network_id=X ?station_id= ?station_id=X", "admin"}, // none is in nobody's scope
	{"?station_id=S1", "admin operator user"},
	{"?station_id=S2", "admin both"},
	{"?station_id=S3 ?station_id=S1&station_id=S2", "admin"},
	{"?network_id=N1&station_id=S1", "admin partner operator user"},
	{"?network_id=N1&station_id=S2 ?network_id=N1&station_id=X", "admin partner"}, // who has the whole network
	{"?network_id=N2&station_id=S1 ?network_id=N1&station_id= ?network_id=&station_id=S1 ?network_id=X&station_id=S1", "admin"},
	{"?role=operator&network_id=N1&station_id=S1", "operator"},
	{"?role=operator&role=partner&network_id=N1&station_id=S2", "partner"},
	{"?role=user&network_id=N2&station_id=S2", "both"},
	{"?role=partner&network_id=N2", ""},
	// What can't be understood is 400, with the fields, and met by nobody.
	{"?role=chief ?role=Admin ?role= ?role=admin,user ?role=admin&role=chief", "!role"},
	{"?rolle=admin", "!rolle"},
	{"?Role=admin", "!Role"},
	{"?role=user&network=N1", "!network"},
	{"?role=chief&network=N1", "!network role"},
	{"?=admin", "!request"}, // without a name
	{"?role=user;network_id=N9 ?role=user&network_id=%zz ?%", "!query"},
}

// decides fails unless a gateway is told what the table says of one query and person.
func (w *env) decides(query string, p gatewayUser, passes string) {
	w.Helper()
	r := bearing(validatePath+query, p.token)
	a := w.do(r)
	got := body{"status": a.Status, "problem": a.slug(), "body": len(a.JSON) > 0}
	for name, values := range a.Header {
		if strings.HasPrefix(name, "X-Auth-") || name == "Cache-Control" {
			got[name] = strings.Join(values, " and ")
		}
	}
	want := body{"status": 403, "problem": "forbidden", "body": true, "Cache-Control": "no-store"}
	fields, unclear := strings.CutPrefix(passes, "!")
	switch {
	case unclear:
		want["status"], want["problem"], want["errors"] = 400, "invalid-request", fields
		var named []string
		list, _ := a.JSON["errors"].([]any)
		for _, e := range list {
			named = append(named, e.(body)["field"].(string))
		}
		slices.Sort(named)
		got["errors"] = strings.Join(named, " ")
	case slices.Contains(strings.Fields(passes), p.name):
		want = body{"status": 200, "problem": "", "body": false, "Cache-Control": "no-store", "X-Auth-User-Id": p.id,
			"X-Auth-Subject": p.subject, "X-Auth-Roles": p.roles, "X-Auth-Network-Id": p.network, "X-Auth-Station-Id": p.station}
	case !strings.HasPrefix(a.Header.Get("WWW-Authenticate"), bareChallenge+`, error="insufficient_scope"`):
		w.Errorf("%s: %s: %v", query, p.name, a.Header)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		w.Errorf("%s: %s: %s", query, p.name, diff)
	}
	r.method = "HEAD"
	if head := w.do(r); head.Status != a.Status || len(head.Body) > 0 {
		w.Errorf("%s: %s: HEAD %v, GET %v", query, p.name, head, a)
	}
}

// decidesForEnvoy fails unless only the token counts: Envoy appends the client's path and query, and uses its method.
func (w *env) decidesForEnvoy(p gatewayUser) {
	w.Helper()
	for _, path := range []string{"/", "/any/path?role=admin", "/any?network_id=N9&rolle=%zz", "/a%2Fb/%2e%2e/c", "/.well-known/x", "/a//b/../c/./d/"} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} {
			r := bearing(strings.TrimSuffix(envoyPath, "/")+path, p.token)
			r.method = method
			if a := w.do(r); a.Status != 200 || a.Header.Get("X-Auth-User-Id") != p.id || len(a.Body) > 0 {
				w.Errorf("%s %s: %v", method, path, a)
			}
			r.auth = nil
			if a := w.do(r); a.Status != 401 || a.Header.Get("WWW-Authenticate") != bareChallenge {
				w.Errorf("%s %s: %v", method, path, a)
			}
		}
	}
}

// TestValidate has the decision table of what a gateway may demand. It holds without
// PostgreSQL and Keycloak, too, and asks neither while they are there.
func TestValidate(t *testing.T) {
	t.Parallel()
	w := newEnv(t, map[string]string{"JOB_INTERVAL": "0"}) // what follows is Keycloak's alone
	people := w.gatewayUsers()
	decideAll := func() {
		for _, row := range demands {
			for query := range strings.FieldsSeq(row.queries) {
				for _, p := range people {
					w.decides(query, p, row.passes)
				}
				w.wants(w.do(call{path: validatePath + query}), 401, "unauthorized")
			}
		}
		if a, err := w.send(w.url, bearing(validatePath+"/?role=admin", people[0].token)); err != nil || a.Status != 404 {
			t.Errorf("not 404, and the demand is lost: %v %v", a, err)
		}
		w.decidesForEnvoy(people[0])
	}
	calls := func() (n int) {
		for name := range strings.FieldsSeq("service_token token find_user get_user other") {
			n += w.kc.count(name)
		}
		return n
	}
	before := calls()
	decideAll()
	if n := calls() - before; n != 0 {
		t.Errorf("Keycloak was asked %d times", n)
	}
	w.kc.close()
	w.pg.close()
	decideAll()
	w.wants(w.do(bearing(mePath, people[0].token)), 503, "unavailable") // PostgreSQL is away indeed
	if err := errors.Join(w.kc.open(), w.pg.open()); err != nil {
		t.Fatal(err)
	}
}

// Who I am is what PostgreSQL says now, whatever the token says.
func TestMe(t *testing.T) {
	w := sharedEnv(t)
	email, username, id := w.member()
	token := w.login(email, password).text("access_token")
	me := func() answer { return w.do(bearing(mePath, token)) }
	set := func(columns string) { w.exec(`update users set `+columns+` where email = $1`, email) }
	set(`first_name = 'Ada', last_name = 'Lovelace', phone = '+4930123456', photo = 'https://example.test/ada.png', role = 'operator',
		network_id = 'N1', station_id = 'S1', last_login_at = '2026-01-02T03:04:05.678+01:00', created_at = '2025-01-02T03:04:05Z',
		updated_at = '2026-01-02T03:04:05.000001Z'`)
	want := body{"user_id": w.value(`select user_id from users where email = $1`, email), "keycloak_id": id, "email": email, "username": username,
		"first_name": "Ada", "last_name": "Lovelace", "phone": "+4930123456", "photo": "https://example.test/ada.png", "is_verified": true,
		"role": "operator", "network_id": "N1", "station_id": "S1", "source": "web", "is_active": true, "last_login_at": "2026-01-02T02:04:05.678Z",
		"created_at": "2025-01-02T03:04:05Z", "updated_at": "2026-01-02T03:04:05.000001Z", "deleted_at": nil}
	if diff := cmp.Diff(want, me().JSON); diff != "" {
		t.Error(diff)
	}
	set(`first_name = null, last_name = null, phone = null, photo = null, last_login_at = null, network_id = '', station_id = ''`)
	maps.Copy(want, body{"first_name": "", "last_name": "", "phone": "", "photo": "", "network_id": "", "station_id": "", "last_login_at": nil})
	if diff := cmp.Diff(want, me().JSON); diff != "" {
		t.Error(diff)
	}
	set(`is_active = false, deleted_at = now()`)
	w.wants(me(), 403, "account-disabled")
	set(`is_active = true, deleted_at = null, role = 'user'`)
	w.wants(me(), 200, "")
}

// fuzzed is a verifier without Keycloak, and the key and the claims of tokens that it accepts.
func fuzzed(f testing.TB) (v *verifier, key *rsa.PrivateKey, head, claims body) {
	f.Helper()
	v = idle(f, slog.New(slog.DiscardHandler), nil).verifier
	key = newKey()
	v.fetch = func(context.Context) ([]jose.JSONWebKey, error) {
		return []jose.JSONWebKey{{Key: &key.PublicKey, KeyID: "known", Algorithm: "RS256"}}, nil
	}
	v.refreshKeys(f.Context())
	v.revoked.add(time.Now())
	return v, key, body{"alg": "RS256", "kid": "known"}, body{"iss": v.issuer, "typ": "Bearer", "azp": v.client, "sub": "s", "user_id": "u",
		"roles": []string{"user"}, "iat": time.Now().Unix(), "exp": time.Now().Unix() + 3600}
}

// What is remembered of tokens is bounded in bytes: one with much to remember is good each time, and verified each time.
func TestTokensRemembered(t *testing.T) {
	v, key, head, claims := fuzzed(t)
	for _, c := range []struct {
		network    string
		remembered bool
	}{{strings.Repeat("n", 255), true}, {strings.Repeat("n", 8<<10), false}} {
		token := forge(key, head, changed(claims, body{"network_id": c.network}))
		for range 2 {
			if p, err := v.verify(t.Context(), token); err != nil || p.NetworkID != c.network {
				t.Error(p, err)
			}
		}
		if got := v.keys.Load().verified.Contains(sha256.Sum256([]byte(token))); got != c.remembered {
			t.Errorf("a network of %d bytes: remembered is %v", len(c.network), got)
		}
	}
}

// FuzzToken has no text that is accepted: nobody but the realm can sign one.
func FuzzToken(f *testing.F) {
	v, key, head, claims := fuzzed(f)
	impatient, cancel := context.WithCancel(f.Context()) // an unknown key is not waited for
	cancel()
	valid := forge(key, head, claims)
	if p, err := v.verify(impatient, valid); err != nil || p.UserID != "u" {
		f.Fatal(p, err)
	}
	// No seed is next to the valid one, which the fuzzer would find.
	for _, changes := range []body{{"alg": "none"}, {"alg": "HS256"}, {"alg": "ES256"}, {"kid": nil}, {"kid": "unknown"}, {"crit": []string{"b64"}, "b64": false},
		{"jwk": jose.JSONWebKey{Key: &key.PublicKey}}, {"x5c": []string{"AA=="}}, {"typ": 7}} {
		f.Add(segment(changed(head, changes)) + "." + segment(claims) + "." + segment("signature"))
	}
	for _, changes := range []body{{"iss": nil}, {"exp": 1}, {"exp": -1e300}, {"nbf": time.Now().Unix() + 3600}, {"typ": "ID"}, {"azp": nil, "aud": []any{"a", 1}}, {"roles": "user"}} {
		f.Add(forge(key, head, changed(claims, changes)))
	}
	for _, text := range []string{"", ".", "..", "...", "a.b.c", `{"payload":"","signatures":[{}]}`, forge(key, head, "null"), forge(key, head, "[[[[")} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if p, err := v.verify(impatient, token); err == nil || p.UserID != "" || p.Roles != nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q is taken for %+v, %v", token, p, err)
		}
	})
}

// FuzzSignedToken signs whatever header and claims, and asks go-jose, too: nothing is accepted that it refuses, and
// nothing of what is accepted is read otherwise.
func FuzzSignedToken(f *testing.F) {
	v, key, head, claims := fuzzed(f)
	impatient, cancel := context.WithCancel(f.Context())
	cancel()
	for _, changes := range []body{{}, {"alg": "PS256"}, {"crit": nil}, {"crit": []string{}}, {"b64": true}, {"typ": 7}, {"kid": 7}, {"x5t": "x"}, {"KID": "x"}} {
		f.Add(jsonText(changed(head, changes)), jsonText(claims))
	}
	for _, changes := range []body{{"aud": []string{v.client}, "azp": nil}, {"aud": []any{"a", 1}}, {"aud": nil}, {"exp": 1e300}, {"exp": "1"}, {"nbf": 1.5}, {"iat": -1e300},
		{"Roles": "x"}, {"roles": nil}, {"network_id": noScope}, {"sid": 1}, {"jti": 1}, {"x": []any{body{"roles": 1}}}} {
		f.Add(jsonText(head), jsonText(changed(claims, changes)))
	}
	twice := strings.TrimSuffix(jsonText(claims), "}")
	for _, text := range []string{twice + `,"sub":"t"}`, twice + `,"s\u0075b":"t"}`, twice + `,"x":{"y":1,"y":2}}`, twice + `,"x":"\ud800"}`, twice + ",\"x\":\"\xff\"}", twice + "} {}", "null", " " + twice + "}\n"} {
		f.Add(jsonText(head), text)
		f.Add(strings.TrimSuffix(jsonText(head), "}")+strings.TrimPrefix(text, twice), jsonText(claims))
	}
	judge := func(token string) (p principal, err error) {
		signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.PS256, jose.EdDSA})
		if err != nil {
			return p, err
		}
		content, err := signed.Verify(&key.PublicKey)
		var c tokenClaims
		if err == nil {
			err = josejson.Unmarshal(content, &c)
		}
		if err == nil {
			err = c.ValidateWithLeeway(josejwt.Expected{Issuer: v.issuer, Time: v.now()}, tokenLeeway+time.Second)
		}
		return c.principal(), err
	}
	f.Fuzz(func(t *testing.T, head, claims string) {
		input := segment(head) + "." + segment(claims)
		token := input + "." + signature("RS256", key, input)
		p, err := v.verify(impatient, token)
		if err != nil {
			return
		}
		oracle, refused := judge(token)
		if diff := cmp.Diff(oracle, p); refused != nil || diff != "" {
			t.Errorf("%s.%s: go-jose says %v %s", head, claims, refused, diff)
		}
	})
}
