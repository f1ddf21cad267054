package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"auth-service/dev/stack"

	"github.com/getkin/kin-openapi/openapi3filter"
)

// The document is clean for linters, and the clients that generators make of it are compiled and taken through the
// service, as a frontend and a Go program do.

// tool runs a program in a folder and fails the test with what it prints.
func tool(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// clients copies a folder of testdata/clients and the document to where the generators work.
func clients(t *testing.T, from, to string) {
	t.Helper()
	files, err := filepath.Glob("testdata/clients/" + from + "/*")
	if err != nil || files == nil {
		t.Fatal(err, files)
	}
	for _, file := range append(files, "testdata/openapi.json") {
		content, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(file)), content, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// takesThrough runs a client against the service, and gives it the mail's token when the mail is there.
func takesThrough(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	w, email, mail := newEnv(t, nil), newEmail(), filepath.Join(t.TempDir(), "token")
	done := make(chan string, 1)
	go func() {
		cmd := exec.CommandContext(t.Context(), name, append(args, w.url, email, mail)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err == nil {
			out = nil
		}
		done <- string(out)
	}()
	token := w.readMail(email, 1).Token
	if err := os.WriteFile(mail+".half", []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(mail+".half", mail); err != nil {
		t.Fatal(err)
	}
	if out := <-done; out != "" {
		t.Errorf("%s: %s", name, out)
	}
	if left := w.value(`select count(*)::text from sessions where ended_at is null`); left != "0" {
		t.Errorf("%s sessions live after the client has signed out", left)
	}
}

// npmClients is the folder with the linters and generators of package.json.
func npmClients(t *testing.T) (dir string) {
	t.Helper()
	content, err := os.ReadFile("testdata/clients/typescript/package.json")
	if err != nil {
		t.Fatal(err)
	}
	npm, err := stack.FindOrInstall(t.Context(), nil, stack.NPM)
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(services.Dir, "npm", "clients-"+digest(string(content))[:8])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	clients(t, "typescript", dir)
	if _, err := os.Stat(filepath.Join(dir, "installed")); err != nil {
		tool(t, dir, npm[0], "install", "--ignore-scripts", "--no-audit", "--no-fund")
		if err := os.WriteFile(filepath.Join(dir, "installed"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestDocumentAndClients(t *testing.T) {
	t.Run("npm", func(t *testing.T) {
		t.Parallel()
		dir := npmClients(t)
		tool(t, dir, "node_modules/.bin/redocly", "lint", "openapi.json")
		tool(t, dir, "node_modules/.bin/spectral", "lint", "--fail-severity=hint", "-r", "spectral.yaml", "openapi.json")
		tool(t, dir, "node_modules/.bin/openapi-typescript", "openapi.json", "-o", "schema.d.ts")
		tool(t, dir, "node_modules/.bin/tsc", "--strict", "--target", "es2022", "--module", "nodenext", "client.ts")
		takesThrough(t, dir, "node", "client.js")
	})
	t.Run("go", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		clients(t, "go", dir)
		tool(t, ".", "go", "tool", "-modfile=dev/tools.mod", "oapi-codegen", "-generate", "types,client", "-package", "main",
			"-o", filepath.Join(dir, "client.go"), "testdata/openapi.json")
		tool(t, dir, "go", "build", "-o", "client", ".")
		takesThrough(t, dir, filepath.Join(dir, "client"))
	})
}

// The document forbids what the service refuses, and allows what it takes.
func TestDocumentedRequests(t *testing.T) {
	w := sharedEnv(t)
	_, signedIn := w.signedIn()
	bearer := []string{"Bearer " + signedIn.text("access_token")}
	post := func(path string, in body) call { return call{method: "POST", path: path, json: in} }
	get := func(path string) call { return call{method: "GET", path: path, auth: bearer} }
	email := newEmail()
	for _, c := range []struct {
		call
		refused string // field
	}{
		{post(registerPath, body{"email": email, "phone": "+49 (0)30/123456"}), ""},
		{post(registerPath, body{"email": email, "phone": "+0"}), "phone"},
		{post(registerPath, body{"email": email, "phone": "+4930-"}), "phone"},
		{post(loginPath, body{"password": password, "email": email}), ""},
		{post(loginPath, body{"password": password}), "username"},
		{post(loginPath, body{"password": password, "username": "ada", "email": email}), "username"},
		{post(resendPath, body{"email": email}), ""},
		{post(resendPath, body{"email": email, "registration_id": "REG-V1StGXR8_Z5jdHi6"}), "registration_id"},
		{get(validatePath + "?role=user&role=admin"), ""},
		{get(validatePath + "?role=root"), "role"},
		{get(sessionsPath + "?cursor="), ""},
		{get(sessionsPath + "?cursor=%00"), "cursor"},
		{post(loginPath, body{"password": password, "email": email, "": "x"}), "request"},
	} {
		a := w.do(c.call)
		named := strings.Contains(string(a.Body), `"field":"`+c.refused+`"`)
		if c.refused == "" && a.Status == 400 || c.refused != "" && (a.Status != 400 || !named) {
			t.Errorf("%s %v: %v", c.path, c.json, a)
		}
		content, _ := json.Marshal(c.json)
		req, err := http.NewRequest(c.method, c.path, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		route, params, err := documented.router.FindRoute(req)
		if err != nil {
			t.Fatal(err)
		}
		err = openapi3filter.ValidateRequest(t.Context(), &openapi3filter.RequestValidationInput{Request: req,
			PathParams: params, Route: route,
			Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc}})
		if (err != nil) != (c.refused != "") {
			t.Errorf("%s %s: the document says %v", c.path, content, err)
		}
	}
}
