package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"
)

// The benchmarks compare the service with the bare calls to Keycloak that it can't
// do without, in turn, in one run: x is how many times as long ours takes.

// sideBySide runs ours and bare in turn, in changing order, and reports the median of both
// and their ratio: a pause of Keycloak's in one of them is nobody's.
func sideBySide(b *testing.B, ours, bare func(i int)) {
	for i := range 8 { // connections, statements, and Keycloak's own warming up
		ours(-1 - i)
		bare(-1 - i)
	}
	inTurn(b, ours, bare)
}

func inTurn(b *testing.B, ours, bare func(i int)) {
	var took [2][]time.Duration
	i := 0
	for b.Loop() {
		for j := range 2 {
			which := (i + j) % 2
			start := time.Now()
			[]func(int){ours, bare}[which](i)
			took[which] = append(took[which], time.Since(start))
		}
		i++
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return float64(all[len(all)/2].Microseconds()) / 1000
	}
	b.ReportMetric(median(took[0]), "ms-ours")
	b.ReportMetric(median(took[1]), "ms-bare")
	b.ReportMetric(median(took[0])/median(took[1]), "x")
}

// bare calls Keycloak as the service account, with nothing around it.
type bareKeycloak struct {
	w     *env
	token string
}

func (w *env) bare() *bareKeycloak {
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

func benchEnv(b *testing.B) *env {
	w := newEnv(b, map[string]string{"KEYCLOAK_URL": services.KeycloakURL, "JOB_INTERVAL": "30s", "LOG_LEVEL": "info"})
	w.quick = true // the answers are not what is measured here
	b.Cleanup(w.straysDie)
	return w
}

func BenchmarkRegister(b *testing.B) {
	w := benchEnv(b)
	k := w.bare()
	users := "/admin/realms/" + w.realm + "/users"
	sideBySide(b, func(int) { w.register(newEmail()) }, func(int) {
		email := newEmail()
		body := fmt.Sprintf(`{"username":%q,"email":%q,"enabled":false,"emailVerified":false,"requiredActions":["VERIFY_EMAIL"],
			"attributes":{"user_id":["USR-0123456789abcdef"],"roles":["user"],"network_id":["X"],"station_id":["X"],"locale":["en"],
			"email_verify_url":["http://localhost:3000/account/verify"],
			"email_verify_token":["0123456789abcdef0123456789abcdef"],"email_verify_code":["123456"]}}`, email, email)
		_, header := k.call("POST", users, body, "application/json")
		user := users + header.Get("Location")[strings.LastIndex(header.Get("Location"), "/"):]
		k.call("PUT", user, `{"enabled":true}`, "application/json")
		k.call("PUT", user+"/send-verify-email?lifespan=86400", "", "application/json")
		k.call("PUT", user, `{"enabled":false}`, "application/json")
	})
}

// BenchmarkVerify confirms with a password, beside what Keycloak must do for that.
func BenchmarkVerify(b *testing.B) {
	w := benchEnv(b)
	k := w.bare()
	users := "/admin/realms/" + w.realm + "/users"
	w.hashesAsUsual()
	ours, bare := make(chan link, 130), make(chan string, 130) // -benchtime 120x at most
	for range cap(ours) {
		email := newEmail()
		ours <- registered(w, email)
		email = newEmail()
		_, header := k.call("POST", users, fmt.Sprintf(`{"username":%q,"email":%q,"requiredActions":["VERIFY_EMAIL"]}`, email, email), "application/json")
		bare <- users + header.Get("Location")[strings.LastIndex(header.Get("Location"), "/"):]
	}
	sideBySide(b, func(int) { w.confirms(<-ours) }, func(int) {
		user := <-bare
		k.call("GET", user, "", "application/json")
		k.call("PUT", user, fmt.Sprintf(`{"enabled":true,"emailVerified":true,"requiredActions":[],
			"credentials":[{"type":"password","value":%q,"temporary":false}]}`, password), "application/json")
	})
}

// BenchmarkResendByAddress compares an address that nobody has registered with one that waits for its confirmation:
// who asks must not learn which it is.
func BenchmarkResendByAddress(b *testing.B) {
	w := benchEnv(b)
	waiting := make(chan string, 120) // -benchtime 100x at most: each is asked for once
	for range cap(waiting) {
		email := newEmail()
		w.register(email)
		w.exec(`update rate_limits set resets_at = now() where key = $1`, mailsOfCooldown.of(mailbox(email)).Key)
		waiting <- email
	}
	ask := func(email string) { w.wants(w.post("/api/v1/register/resend", body{"email": email}), 200, "") }
	sideBySide(b, func(int) { ask(newEmail()) }, func(int) { ask(<-waiting) })
}

// grant asks Keycloak's token endpoint itself, by the same client as do.
func (w *env) grant(form url.Values) answer {
	w.Helper()
	a := w.token(form)
	if a.Status != 200 {
		w.Fatal(a)
	}
	return a
}

// token asks Keycloak's token endpoint.
func (w *env) token(form url.Values) answer {
	w.Helper()
	form.Set("client_id", "auth-client")
	form.Set("scope", "openid")
	a, err := w.send(services.KeycloakURL, call{method: "POST", path: "/realms/" + w.realm + "/protocol/openid-connect/token", form: form})
	if err != nil {
		w.Fatal(err)
	}
	return a
}

// hashesAsUsual has passwords cost what they cost outside of tests.
func (w *env) hashesAsUsual() {
	w.Helper()
	w.keycloakAdmin("PUT", "", body{"passwordPolicy": "hashAlgorithm(pbkdf2-sha512) and hashIterations(210000)"}, nil)
}

func BenchmarkLogin(b *testing.B) {
	w := benchEnv(b)
	b.Cleanup(w.straysDie)
	w.hashesAsUsual()
	emails := []string{newEmail(), newEmail(), newEmail(), newEmail()}
	for _, email := range emails {
		w.account(email)
	}
	sideBySide(b, func(i int) {
		w.wants(w.login(emails[(i+8)%4], password), 200, "")
	}, func(i int) {
		w.grant(url.Values{"grant_type": {"password"}, "username": {emails[(i+8)%4]}, "password": {password}})
	})
}

func BenchmarkRefresh(b *testing.B) {
	w := benchEnv(b)
	b.Cleanup(w.straysDie)
	email := newEmail()
	w.account(email)
	ours := w.login(email, password).text("refresh_token")
	bare := w.grant(url.Values{"grant_type": {"password"}, "username": {email}, "password": {password}}).text("refresh_token")
	sideBySide(b, func(int) {
		a := w.do(refreshing(ours))
		w.wants(a, 200, "")
		ours = a.text("refresh_token")
	}, func(int) {
		bare = w.grant(url.Values{"grant_type": {"refresh_token"}, "refresh_token": {bare}}).text("refresh_token")
	})
}

// contender is a server that is loaded like others.
type contender struct {
	name, address, path string
	took                []time.Duration // one batch
}

// BenchmarkValidate loads the real binary, two bare handlers and what a user would pick instead, each on one core, in
// turn. An op is 2,000 requests of each over eight connections. It prints the medians of what each takes, and of ours
// beside the others, with the quartiles.
func BenchmarkValidate(b *testing.B) {
	w := benchEnv(b)
	email := newEmail()
	w.account(email)
	issued := w.login(email, password).text("access_token")
	key, kid := w.realmKey(1)
	sign := func(id int) string {
		return forge(key, body{"alg": "RS256", "typ": "JWT", "kid": kid}, changed(unpacked(issued, 1), body{"jti": fmt.Sprint(id)}))
	}
	dir := b.TempDir()
	for _, command := range []string{".", "./bench/bare"} {
		if out, err := exec.Command("go", "build", "-o", dir+"/", command).CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	p := w.spawn(filepath.Join(dir, "auth-service"), map[string]string{"GOMAXPROCS": "1", "LOG_LEVEL": "info"})
	defer w.end(p, syscall.SIGTERM)
	ours := strings.TrimPrefix(p.url, "http://")
	other := w.startProxy(b)

	const batch = 2000
	for _, kind := range []struct {
		name   string
		tokens int // more than the service remembers: each is new when its turn comes
		forged bool
	}{{"one-token", 1, false}, {"in-turn", batch, false}, {"every-token-new", 6 * batch, false}, {"forged", 6 * batch, true}} {
		b.Run(kind.name, func(b *testing.B) {
			tokens := make([]string, kind.tokens)
			for i := range tokens {
				tokens[i] = sign(i)
				if kind.forged { // under the name of Keycloak's own key
					tokens[i] = issued[:strings.Index(issued, ".")] + tokens[i][strings.Index(tokens[i], "."):]
				}
			}
			answer := firstAnswer(b, ours, rawRequest(validatePath, tokens[0]))
			all := []*contender{{name: "ours", address: ours, path: validatePath},
				{name: "bare", address: startBare(b, dir, []byte("HTTP/1.1 200 OK\r\n\r\n")), path: "/"},
				{name: "same-answer", address: startBare(b, dir, answer), path: "/"}}
			if other != "" {
				all = append(all, &contender{name: "oauth2-proxy", address: other, path: "/oauth2/auth"})
			}
			load := func(i int) {
				for j := range all {
					c := all[(i+j)%len(all)]
					var part [][]byte
					for n := range batch {
						part = append(part, rawRequest(c.path, tokens[(i*batch+n)%len(tokens)]))
					}
					start := time.Now()
					pour(b, c.address, part)
					c.took = append(c.took, time.Since(start))
				}
			}
			load(0) // connections, the first look at the tokens in turn
			for _, c := range all {
				c.took = nil
			}
			for i := 1; b.Loop(); i++ {
				load(i)
			}
			for _, c := range all[1:] {
				var share []float64
				for i, took := range c.took {
					share = append(share, float64(took)/float64(all[0].took[i]))
				}
				slices.Sort(share)
				b.ReportMetric(share[len(share)/2], "of-"+c.name)
				b.Logf("ours has %.3f (quartiles %.3f and %.3f) of the throughput of %s", share[len(share)/2], share[len(share)/4], share[len(share)*3/4], c.name)
			}
			slices.Sort(all[0].took)
			b.ReportMetric(batch/all[0].took[len(all[0].took)/2].Seconds(), "requests/s")
			b.ReportMetric(memory(p.Process.Pid, "VmRSS"), "MB")
		})
	}
}

func rawRequest(path, token string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n", path, token)
}

// memory is a line of what Linux says of a process's memory, in MB: VmRSS, or the most it was, VmHWM.
func memory(pid int, line string) float64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	m := regexp.MustCompile(line + `:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		return 0
	}
	kB, _ := strconv.ParseFloat(string(m[1]), 64)
	return kB * 1024 / 1e6
}

// firstAnswer is what a server answers, as bytes.
func firstAnswer(b *testing.B, address string, request []byte) []byte {
	b.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	conn.Write(request)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		b.Fatal(err)
	}
	answer, err := httputil.DumpResponse(resp, true)
	if err != nil {
		b.Fatal(err)
	}
	return answer
}

// startBare starts the bare handler with an answer.
func startBare(b *testing.B, dir string, answer []byte) (address string) {
	b.Helper()
	cmd := exec.Command(filepath.Join(dir, "bare"))
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.Stdin = bytes.NewReader(answer)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := fmt.Fscan(out, &address); err != nil {
		b.Fatal(err)
	}
	return address
}

// startProxy starts oauth2-proxy, if the PATH has it, and returns its address or "".
func (w *env) startProxy(b *testing.B) string {
	b.Helper()
	binary, err := exec.LookPath("oauth2-proxy")
	if err != nil {
		return ""
	}
	address := fmt.Sprintf("127.0.0.1:%d", stack.FreePort())
	cmd := exec.Command(binary, "--provider=oidc", "--oidc-issuer-url="+services.KeycloakURL+"/realms/"+w.realm, "--client-id=auth-client",
		"--client-secret=none", "--cookie-secret="+strings.Repeat("x", 32), "--email-domain=*", "--skip-jwt-bearer-tokens", "--oidc-audience-claim=azp",
		"--insecure-oidc-allow-unverified-email", "--upstream=static://200", "--http-address="+address, "--request-logging=false", "--auth-logging=false")
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	w.eventually("oauth2-proxy answers", time.Minute, func() bool {
		a, err := w.send("http://"+address, call{path: "/ping"})
		return err == nil && a.Status == 200
	})
	return address
}

// pour sends requests over eight connections, each as soon as the one before it is
// answered, and reads no more of the answers than where they end.
func pour(b *testing.B, address string, requests [][]byte) {
	const connections = 8
	var all sync.WaitGroup
	for c := range connections {
		all.Go(func() {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			in := bufio.NewReader(conn)
			for i := c; i < len(requests); i += connections {
				if _, err := conn.Write(requests[i]); err != nil {
					b.Error(err)
					return
				}
				length := 0
				for {
					line, err := in.ReadSlice('\n')
					if err != nil {
						b.Error(err)
						return
					}
					if n, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
						length, _ = strconv.Atoi(string(bytes.TrimSpace(n)))
					}
					if len(line) == 2 {
						break
					}
				}
				if _, err := in.Discard(length); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

var syncUsers = flag.Int("sync-users", 0, "with how many users BenchmarkSync is run")

// BenchmarkSync makes a dry run over all users beside the bare paging of the same ones, in
// turn. Both take minutes with many users, so it is run only when asked to:
//
//	go test -run '^$' -bench Sync -benchtime 1x -sync-users 100000 -timeout 1h .
func BenchmarkSync(b *testing.B) {
	if *syncUsers == 0 {
		b.Skip("-sync-users says with how many")
	}
	s := newSeeds()
	w := uncheckedEnv(b, map[string]string{"KEYCLOAK_URL": services.KeycloakURL, "JOB_INTERVAL": "0", "LOG_LEVEL": "info"}, s.inKeycloak(0, *syncUsers)...)
	s.inPostgreSQL(w, 0, *syncUsers)
	w.exec(`analyze users`)
	binary := filepath.Join(b.TempDir(), "auth-service")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	page := func(k *bareKeycloak, first, size int) {
		body, _ := k.call("GET", fmt.Sprintf("/admin/realms/%s/users?briefRepresentation=false&first=%d&max=%d", w.realm, first, size), "", "application/json")
		var users []keycloakUser
		if err := json.Unmarshal(body, &users); err != nil || len(users) != size {
			b.Fatalf("%d users, %v", len(users), err)
		}
	}
	first := 0
	for _, size := range []int{50, 100, 250, 500, 1000} { // which is the cheapest, of users that Keycloak has not in its cache
		k, start := w.bare(), time.Now()
		for end := first + 1000; first < end; first += size {
			page(k, first, size)
		}
		b.Logf("pages of %d: %.2f ms a user", size, time.Since(start).Seconds())
	}
	peak := 0.0
	inTurn(b, func(int) {
		cmd := exec.Command(binary, "sync", "-dry-run")
		for name, value := range w.vars {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		out := new(buffer)
		cmd.Stdout, cmd.Stderr = out, out
		ended := make(chan error, 1)
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		go func() { ended <- cmd.Wait() }()
		for tick := time.NewTicker(100 * time.Millisecond); ; {
			select {
			case err := <-ended:
				if err != nil {
					b.Fatalf("%v\n%s", err, out)
				}
				return
			case <-tick.C: // not rusage, which begins with the memory of whoever forks
				peak = max(peak, memory(cmd.Process.Pid, "VmHWM"))
			}
		}
	}, func(int) {
		k, since := w.bare(), time.Now()
		for first := 0; first < *syncUsers; first += syncPage {
			if time.Since(since) > 4*time.Minute { // its token lives five
				k, since = w.bare(), time.Now()
			}
			page(k, first, min(syncPage, *syncUsers-first))
		}
	})
	b.ReportMetric(peak, "MB-peak")
}
