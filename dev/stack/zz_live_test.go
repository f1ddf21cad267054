package stack

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"auth-service/dev/mail"
)

func TestLive(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	began := time.Now()
	lap := func(what string) { t.Logf("%-40s %.2fs", what, time.Since(began).Seconds()); began = time.Now() }
	s, err := Use(ctx, Options{Test: true, Alone: os.Getenv("ALONE") != "", Progress: func(p string) { fmt.Println(time.Now().Format("05.000"), p) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Stop(); lap("stop") }()
	lap("use")
	if s.Attached {
		t.Log("attached", s.KeycloakURL, s.Keycloak.Stop())
	}
	url, err := s.CreateDatabase(ctx, "test_x")
	lap("create database " + url + fmt.Sprint(err))
	err = s.CreateRealm(ctx, "test-x", nil)
	t.Log(err)
	c, _ := mail.Start("127.0.0.1:0")
	vars := map[string]string{"KEYCLOAK_BACKEND_CLIENT_SECRET": `a"b\c`, "SMTP_PORT": strings.Split(c.Addr(), ":")[1]}
	err = s.CreateRealm(ctx, "test-x", vars)
	lap("create realm " + fmt.Sprint(err))
	err = s.CreateRealm(ctx, "test-x", vars)
	lap("create realm again " + fmt.Sprint(err))
	tok, _ := s.AdminToken(ctx)
	do := func(m, p, b string) *http.Response {
		req, _ := http.NewRequest(m, s.KeycloakURL+"/admin/realms/test-x"+p, strings.NewReader(b))
		req.Header.Set("Authorization", "Bearer "+tok)
		req.Header.Set("Content-Type", "application/json")
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := do("POST", "/users", `{"username":"ada","email":"ada@example.test","enabled":true,"requiredActions":["VERIFY_EMAIL"]}`)
	loc := r.Header.Get("Location")
	id := loc[strings.LastIndex(loc, "/")+1:]
	lap(r.Status)
	r = do("PUT", "/users/"+id+"/send-verify-email", "")
	lap("send " + r.Status)
	m, err := c.WaitFor(ctx, "ADA@example.test", 1)
	lap(fmt.Sprint("mail ", m.Subject, m.From, m.Links, len(m.HTML), len(m.Text), err))
	short, cc := context.WithTimeout(ctx, time.Second)
	_, err = c.WaitFor(short, "ada@example.test", 2)
	cc()
	lap(fmt.Sprint(err))
	c.Close()
	r = do("PUT", "/users/"+id+"/send-verify-email", "")
	lap("send while down " + r.Status)
	c.Restart()
	r = do("PUT", "/users/"+id+"/send-verify-email", "")
	m, err = c.WaitFor(ctx, "ada@example.test", 2)
	lap(fmt.Sprint("send again ", r.Status, m.ID, err))
	if !s.Attached {
		for _, srv := range []*Server{s.Postgres, s.Keycloak} {
			srv.Stop()
			lap("stop " + srv.Name)
			err := srv.Start(ctx)
			lap(fmt.Sprint("start ", srv.Name, err))
			srv.Kill()
			<-srv.Done()
			lap("kill " + srv.Name)
			err = srv.Start(ctx)
			lap(fmt.Sprint("start ", srv.Name, err))
		}
		lap(fmt.Sprint(s.CreateRealm(ctx, "test-x", vars)))
	}
	lap(fmt.Sprint("drop db", s.DropDatabase(ctx, "test_x")))
	lap(fmt.Sprint("delete realm", s.DeleteRealm(ctx, "test-x"), s.DeleteRealm(ctx, "test-x")))
}
