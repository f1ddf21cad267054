package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// The benchmarks compare the service with the bare calls to Keycloak that it can't
// do without, in turn, in one run: x is how many times as long ours takes.

// compare runs ours and bare in turn and reports both and their ratio.
func compare(b *testing.B, ours, bare func(i int)) {
	for i := range 3 { // connections, statements, and Keycloak's own warming up
		ours(-1 - i)
		bare(-1 - i)
	}
	var took [2]time.Duration
	i := 0
	for b.Loop() {
		for j, f := range []func(int){ours, bare} {
			start := time.Now()
			f(i)
			took[j] += time.Since(start)
		}
		i++
	}
	n := float64(max(i, 1))
	b.ReportMetric(float64(took[0].Microseconds())/1000/n, "ms-ours")
	b.ReportMetric(float64(took[1].Microseconds())/1000/n, "ms-bare")
	b.ReportMetric(float64(took[0])/float64(took[1]), "x")
}

// bare calls Keycloak as the service account, with nothing around it.
type bareKeycloak struct {
	w     *world
	token string
}

func (w *world) bare() *bareKeycloak {
	k := &bareKeycloak{w: w}
	body, _ := k.call("POST", "/realms/"+w.realm+"/protocol/openid-connect/token", url.Values{"grant_type": {"client_credentials"},
		"client_id": {"backend-admin"}, "client_secret": {backendSecret}}.Encode(), "application/x-www-form-urlencoded")
	var token struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &token); err != nil {
		w.Fatal(err)
	}
	k.token = token.AccessToken
	return k
}

func (k *bareKeycloak) call(method, path, body, contentType string) ([]byte, http.Header) {
	req, err := http.NewRequest(method, services.KeycloakURL+path, strings.NewReader(body))
	if err != nil {
		k.w.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	if k.token != "" {
		req.Header.Set("Authorization", "Bearer "+k.token)
	}
	resp, err := client.Do(req)
	if err != nil {
		k.w.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode >= 300 {
		k.w.Fatalf("%s %s: %s %s %v", method, path, resp.Status, answer, err)
	}
	return answer, resp.Header
}

func benchWorld(b *testing.B) *world {
	w := newWorld(b, map[string]string{"KEYCLOAK_URL": services.KeycloakURL, "JOB_INTERVAL": "30s", "LOG_LEVEL": "info"})
	w.quick = true // the answers are not what is measured here
	return w
}

func BenchmarkRegister(b *testing.B) {
	w := benchWorld(b)
	k := w.bare()
	users := "/admin/realms/" + w.realm + "/users"
	compare(b, func(int) { w.register(newEmail()) }, func(int) {
		email := newEmail()
		body := fmt.Sprintf(`{"username":%q,"email":%q,"enabled":false,"emailVerified":false,"requiredActions":["VERIFY_EMAIL"],
			"attributes":{"user_id":["USR-0123456789abcdef"],"roles":["user"],"network_id":["X"],"station_id":["X"],"locale":["en"],
			"email_verify_url":["http://localhost:3000/account/verify"],
			"email_verify_token":["0123456789abcdef0123456789abcdef"],"email_verify_code":["123456"]},
			"credentials":[{"type":"password","value":%q,"temporary":false}]}`, email, email, password)
		_, header := k.call("POST", users, body, "application/json")
		user := users + header.Get("Location")[strings.LastIndex(header.Get("Location"), "/"):]
		k.call("PUT", user, `{"enabled":true}`, "application/json")
		k.call("PUT", user+"/send-verify-email?lifespan=86400", "", "application/json")
		k.call("PUT", user, `{"enabled":false}`, "application/json")
	})
}

func BenchmarkLogin(b *testing.B) {
	w := benchWorld(b)
	emails := []string{newEmail(), newEmail(), newEmail(), newEmail()} // the limit is per account
	for _, email := range emails {
		w.account(email)
	}
	k := &bareKeycloak{w: w}
	compare(b, func(i int) {
		w.wants(w.login(emails[(i+8)%4], password), 200, "")
	}, func(i int) {
		k.call("POST", "/realms/"+w.realm+"/protocol/openid-connect/token", url.Values{"grant_type": {"password"}, "scope": {"openid"},
			"client_id": {"auth-client"}, "username": {emails[(i+8)%4]}, "password": {password}}.Encode(), "application/x-www-form-urlencoded")
	})
}
