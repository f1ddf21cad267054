package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A stop lets a request in flight finish, and says so to the load balancer first.
func TestStop(t *testing.T) {
	w := sharedEnv(t)
	kc, err := newKeycloakProxy(services.KeycloakURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kc.close() })
	v, end := w.another(map[string]string{"KEYCLOAK_URL": kc.url(), "JOB_INTERVAL": "0s"})
	there, release := kc.holdAt("create_user", false)
	answered, ended := make(chan answer, 1), make(chan error, 1)
	go func() {
		a, err := v.send(v.url, registering(newEmail()))
		if err != nil {
			t.Error(err)
		}
		answered <- a
	}()
	<-there
	go func() { ended <- end() }()
	w.eventually("not ready any more", 5*time.Second, func() bool {
		a, err := v.send("http://"+v.management, call{path: "/readyz"})
		return err == nil && a.Status == 503 && strings.Contains(string(a.Body), "stopping")
	})
	w.eventually("closed to others", 5*time.Second, func() bool { _, err := http.Get(v.url + "/livez"); return err != nil })
	select {
	case err := <-ended:
		t.Errorf("ended with a request in flight: %v", err)
	default:
	}
	release()
	w.wants(<-answered, 201, "")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// While it says that it is not ready, an instance serves as before, on connections that it closes
// after each request. A second signal ends it at once.
func TestShutdownDelay(t *testing.T) {
	w := *sharedEnv(t)
	_, a := w.signedIn()
	p := w.spawn(program(t), map[string]string{"SHUTDOWN_DELAY": "1h"})
	v := w
	v.url, v.management = p.url, w.management
	closes := func() bool { // its connection after a request
		resp, err := client.Get(v.url + "/account/register")
		if err != nil {
			t.Fatal(err)
		}
		return resp.Body.Close() == nil && resp.Close
	}
	if closes() {
		t.Error("it keeps no connection")
	}
	p.Process.Signal(syscall.SIGTERM)
	v.eventually("not ready any more", time.Minute, func() bool {
		a, err := v.send("http://"+v.management, call{path: "/readyz"})
		if err != nil {
			t.Fatalf("it serves no more: %v", err)
		}
		return a.Status == 503 && strings.Contains(string(a.Body), "stopping")
	})
	if a := v.management404("/livez"); a.Status != 200 {
		t.Errorf("livez: %v", a)
	}
	if a := v.get("/health"); a.Status != 200 || !closes() {
		t.Errorf("a connection stays, or %v", a)
	}
	if !v.passes(a) {
		t.Error("a good token is refused")
	}
	w.wants(w.do(loggingOut(a.text("refresh_token"))), 204, "") // at another instance
	v.eventually("revoked here, too", time.Minute, func() bool { return !v.passes(a) })
	p.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(30 * time.Second):
		t.Error("a second signal does not end it")
	}
}

// Both listeners close a connection that has been idle for IDLE_TIMEOUT.
func TestIdleTimeout(t *testing.T) {
	v, _ := sharedEnv(t).another(map[string]string{"IDLE_TIMEOUT": "100ms", "JOB_INTERVAL": "0"})
	for _, address := range []string{strings.TrimPrefix(v.url, "http://"), v.management} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprint(conn, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 ") {
			t.Errorf("%v %s", err, answer)
		}
	}
}

func TestTLS(t *testing.T) {
	w := sharedEnv(t)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	writePair(t, cert, key, 1)
	v, _ := w.another(map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	serves := func() string { // protocol, and the number of the certificate
		resp, err := (&http.Client{Transport: transport}).Get(strings.Replace(v.url, "http:", "https:", 1) + "/health")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return fmt.Sprint(resp.Proto, " ", resp.TLS.PeerCertificates[0].SerialNumber)
	}
	if got := serves(); got != "HTTP/2.0 1" {
		t.Error(got)
	}
	if a, err := v.send(v.url, call{path: "/health"}); err == nil && a.Status != 400 {
		t.Errorf("without TLS: %v", a)
	}
	old := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	if _, err := tls.Dial("tcp", strings.TrimPrefix(v.url, "http://"), old); err == nil {
		t.Error("TLS 1.1 is accepted")
	}
	// Renewed files count without a restart. Those that don't fit together are logged, and the last good pair is served.
	failed := func() int { return strings.Count(w.logs.String(), `"msg":"certificate: failed, will retry"`) }
	writePair(t, cert, filepath.Join(dir, "another"), 2)
	w.eventually("the broken pair is logged", time.Minute, func() bool { return failed() == 1 })
	if got := serves(); got != "HTTP/2.0 1" {
		t.Error(got)
	}
	writePair(t, cert, key, 3)
	w.eventually("the new pair is served", time.Minute, func() bool { return serves() == "HTTP/2.0 3" })
	if failed() != 1 {
		t.Errorf("logged %d times", failed())
	}
}

// writePair writes a certificate with a number, and its key.
func writePair(t *testing.T, certFile, keyFile string, number int64) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(number), NotAfter: time.Now().Add(time.Hour)}
	cert, err1 := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	key, err2 := x509.MarshalPKCS8PrivateKey(private)
	if err := errors.Join(err1, err2,
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600),
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// The healthcheck asks where the service listens, however MANAGEMENT_ADDR says it.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	s := idle(t, slog.New(slog.DiscardHandler), nil)
	hosts := []string{"", "127.0.0.1", "127.0.0.2", "0.0.0.0", "localhost"}
	if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
		l.Close()
		hosts = append(hosts, "::1", "::1%lo", "::")
	}
	for _, host := range hosts {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		check := func() error {
			changes := map[string]string{"MANAGEMENT_ADDR": net.JoinHostPort(host, port)}
			return run(t.Context(), []string{"healthcheck"}, environment(changes), io.Discard, io.Discard)
		}
		go http.Serve(l, s.managementHandler())
		if err := check(); err != nil {
			t.Errorf("healthcheck of %q: %v", host, err)
		}
		if l.Close(); check() == nil {
			t.Errorf("healthcheck of %q, where nobody listens, says that all is well", host)
		}
	}
}
