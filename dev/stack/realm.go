package stack

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// ErrRealmExists is returned by CreateRealm for a name that is taken.
var ErrRealmExists = errors.New("the realm exists already")

// CreateRealm creates a realm from keycloak/realm.json. vars replace its
// ${NAME} placeholders; REALM is the name. What a test creates is called
// test-…: should the test be killed, the next start deletes it. users, of
// tests only, are imported with it, thousands a second.
func (s *Stack) CreateRealm(ctx context.Context, name string, vars map[string]string, users ...map[string]any) error {
	realm, err := s.realmJSON(name, vars)
	if err == nil && s.options.Test {
		realm, err = forTests(realm, users)
	}
	if err != nil {
		return err
	}
	status, answer, err := s.ask(ctx, "POST", "", realm)
	if err != nil {
		return err
	}
	switch status {
	case http.StatusCreated:
		return nil
	case http.StatusConflict:
		return fmt.Errorf("%s: %w", name, ErrRealmExists)
	}
	return fmt.Errorf("keycloak/realm.json was refused with status %d: %s", status, answer)
}

// EnsureRealm creates a realm that is not there yet. Of one that is there,
// which it leaves as it is, it reports whether it was made from what
// keycloak/realm.json and vars are now.
func (s *Stack) EnsureRealm(ctx context.Context, name string, vars map[string]string) (current bool, err error) {
	realm, err := s.realmJSON(name, vars)
	if err != nil {
		return false, err
	}
	sum := sha256.Sum256(realm)
	hash, remembered := hex.EncodeToString(sum[:]), s.file("realm-"+name+".sha256")
	err = s.CreateRealm(ctx, name, vars)
	if errors.Is(err, ErrRealmExists) {
		was, _ := os.ReadFile(remembered)
		return string(was) == hash, nil
	}
	if err != nil {
		return false, err
	}
	return true, os.WriteFile(remembered, []byte(hash), 0o644)
}

// DeleteRealm deletes a realm; one that is not there is fine.
func (s *Stack) DeleteRealm(ctx context.Context, name string) error {
	status, answer, err := s.ask(ctx, "DELETE", "/"+url.PathEscape(name), nil)
	if err != nil || status == http.StatusNoContent || status == http.StatusNotFound {
		return err
	}
	return fmt.Errorf("deleting realm %s: status %d: %s", name, status, answer)
}

// deleteLeftovers deletes the realms of tests that were killed.
func (s *Stack) deleteLeftovers(ctx context.Context) error {
	status, answer, err := s.ask(ctx, "GET", "?briefRepresentation=true", nil)
	if err != nil {
		return err
	}
	var realms []struct{ Realm string }
	if err := json.Unmarshal(answer, &realms); err != nil {
		return fmt.Errorf("listing realms: status %d: %w", status, err)
	}
	for _, r := range realms {
		if strings.HasPrefix(r.Realm, "test-") {
			err = errors.Join(err, s.DeleteRealm(ctx, r.Realm))
		}
	}
	return err
}

// realmJSON is keycloak/realm.json with its placeholders replaced.
func (s *Stack) realmJSON(name string, vars map[string]string) ([]byte, error) {
	realm, err := os.ReadFile(filepath.Join(s.Root, "keycloak", "realm.json"))
	if err != nil {
		return nil, err
	}
	all := map[string]string{"REALM": name}
	maps.Copy(all, vars)
	if realm, err = expand(realm, all); err != nil {
		return nil, fmt.Errorf("keycloak/realm.json: %w", err)
	}
	return realm, nil
}

// forTests adds users to a realm, and a signing key: that Keycloak makes two for each realm takes longer than the
// rest of the import.
func forTests(realm []byte, users []map[string]any) ([]byte, error) {
	var document map[string]any
	if err := json.Unmarshal(realm, &document); err != nil {
		return nil, err
	}
	all, _ := document["users"].([]any)
	for _, u := range users {
		all = append(all, u)
	}
	document["users"] = all
	document["privateKey"] = signingKey()
	return json.Marshal(document)
}

// signingKey is the key that the realms of tests share.
var signingKey = sync.OnceValue(func() string {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err) // there is no randomness
	}
	return base64.StdEncoding.EncodeToString(x509.MarshalPKCS1PrivateKey(key))
})

// placeholder is ${NAME} or ${NAME:default}. Keycloak's own ${client_account}
// and the like are in lower case and stay.
var placeholder = regexp.MustCompile(`\$\{([A-Z][A-Z0-9_]*)(?::([^}]*))?\}`)

// expand replaces the placeholders in the strings of a JSON document. One that
// has neither a value nor a default is an error that names it.
func expand(document []byte, vars map[string]string) ([]byte, error) {
	var missing []error
	expanded := placeholder.ReplaceAllFunc(document, func(found []byte) []byte {
		m := placeholder.FindSubmatch(found)
		value, ok := vars[string(m[1])]
		if !ok {
			if m[2] == nil {
				missing = append(missing, fmt.Errorf("there is no value for ${%s}, and it has no default", m[1]))
			}
			return m[2] // part of the document, hence escaped
		}
		quoted, _ := json.Marshal(value)
		return quoted[1 : len(quoted)-1]
	})
	return expanded, errors.Join(missing...)
}

// AdminToken returns an access token of Keycloak's administrator. It lives for
// a minute.
func (s *Stack) AdminToken(ctx context.Context) (string, error) {
	form := url.Values{"grant_type": {"password"}, "client_id": {"admin-cli"}, "username": {s.AdminUser}, "password": {s.AdminPassword}}
	req, err := http.NewRequestWithContext(ctx, "POST", s.KeycloakURL+"/realms/master/protocol/openid-connect/token",
		strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	status, answer, err := roundTrip(req)
	if err != nil {
		return "", err
	}
	var token struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(answer, &token); err != nil || token.AccessToken == "" {
		return "", fmt.Errorf("the administrator can't sign in to Keycloak (status %d); go run ./dev -reset starts afresh", status)
	}
	return token.AccessToken, nil
}

// ask sends a request about realms to Keycloak's admin API.
func (s *Stack) ask(ctx context.Context, method, path string, body []byte) (status int, answer []byte, err error) {
	token, err := s.AdminToken(ctx)
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.KeycloakURL+"/admin/realms"+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	return roundTrip(req)
}

func roundTrip(req *http.Request) (status int, answer []byte, err error) {
	client := http.Client{Timeout: 10 * time.Minute} // a realm with a hundred thousand users takes some
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}
