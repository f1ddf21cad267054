package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/mail"
	"net/url"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// TestParameters asks lists for what their parameters can't mean: a filter that is not
// understood would show more than was asked for.
func TestParameters(t *testing.T) {
	w := sharedEnv(t)
	admin := w.admin()
	for _, c := range []struct {
		path, query string
		status      int
		wrong       string
	}{
		{usersPath, "", 200, ""},
		{usersPath, "limit=1&cursor=&include_deleted=false&role=user&network_id=", 200, ""},
		{auditPath, "limit=200&from=2026-01-02T03:04:05Z&to=2026-01-02T03:04:05.5%2B01:00&outcome=ok", 200, ""},
		{sessionsPath, "limit=1", 200, ""},
		{"/api/v1/auth/me", "x=1&%zz", 200, ""}, // takes none
		{usersPath, "=x", 400, "request"},       // without a name
		{usersPath, "pageIn=x&pageIn.Limit=1&pageIn[limit]=1&a.b[c]=1", 400, "a.b[c] pageIn pageIn.Limit pageIn[limit]"},
		{usersPath, "Limit=1&ROLE=user&x", 400, "Limit ROLE x"},
		{usersPath, "limit=&include_deleted=&role=&source=&q=", 400, "include_deleted limit q role source"},
		{usersPath, "limit=0&q=ab&role=chief&network_id=" + strings.Repeat("x", 33), 400, "limit network_id q role"},
		{usersPath, "limit=201&include_deleted=yes", 400, "include_deleted limit"},
		{usersPath, "limit=1.0&include_deleted=1", 400, "include_deleted limit"},
		{usersPath, "limit=null&include_deleted=null", 400, "include_deleted limit"},
		{usersPath, "limit=1&limit=1&role=user&role=admin", 400, "limit role"},
		{usersPath, "q=a%00bc&network_id=%ff", 400, "network_id q"},
		{usersPath, "role=%zz", 400, "query"},
		{usersPath, "role=user;x", 400, "query"},
		{auditPath, "from=&to=", 400, "from to"},
		{auditPath, "from=2026-01-02&to=yesterday", 400, "from to"},
		{auditPath, "from=null&to=%22", 400, "from to"},
		{sessionsPath, "limit=x", 400, "limit"},
	} {
		w.answered(admin.asks("GET", c.path+"?"+c.query, nil), nil, c.status, c.wrong)
	}
	w.answered(admin.asks("POST", "/api/v1/sync", body{"dry_run": nil}), nil, 400, "dry_run") // it would repair
}

// readJSON reads and checks the input of an operation.
func readJSON(data []byte, to any) error {
	in := inputOf(to)
	if err := in.readJSON(data); err != nil {
		return err
	}
	return in.check()
}

// FuzzQuery reads any query into the inputs of the lists.
func FuzzQuery(f *testing.F) {
	for _, query := range []string{"", "=x", "pageIn=x", "pageIn[limit]=1", "limit=1&cursor=x", "limit=&from=", "from=2026-01-02T03:04:05Z",
		"include_deleted=yes", "role=admin&role=user", "q=%ff", "a;b", "%zz", "to=%22", "limit=null", "limit=1e2"} {
		f.Add(query)
	}
	f.Fuzz(func(t *testing.T, query string) {
		var users usersIn
		var audit auditIn
		for _, to := range []any{&users, &audit} {
			in := inputOf(to)
			err := in.readParameters(&http.Request{URL: &url.URL{RawQuery: query}})
			if err == nil {
				err = in.check()
			}
			if err != nil && !errors.Is(err, problemInvalidRequest) {
				t.Error(err)
			} else if err != nil {
				return
			}
			for name, given := range (&url.URL{RawQuery: query}).Query() {
				if f := in.fields[name]; f == nil || f.from != "query" || len(given) > 1 {
					t.Errorf("%q is accepted", query)
				}
			}
		}
		for _, page := range []pageIn{users.pageIn, audit.pageIn} {
			if page.Limit < 1 || page.Limit > 200 {
				t.Errorf("%q: limit %d", query, page.Limit)
			}
		}
		for _, s := range []string{users.Role, users.NetworkID, users.Query, audit.Actor, audit.Outcome} {
			if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) || len(s) > 4*100 {
				t.Errorf("%q: %q is accepted", query, s)
			}
		}
	})
}

func FuzzInput(f *testing.F) {
	for _, s := range []string{`{"email":"a@b.cd","username":"ada"}`, `{"email":1}`, `{"email":"a","email":"b"}`, `{"EMAIL":"x"}`, `{"a":{"b":[1]}}`, `{"phone":"\u0000"}`, `null`, "{"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var in registerIn
		if err := readJSON(data, &in); err != nil {
			if !errors.Is(err, problemInvalidRequest) {
				t.Error(err)
			}
			return
		}
		again, _ := json.Marshal(in)
		var same registerIn
		if err := readJSON(again, &same); err != nil || same != in {
			t.Errorf("%s is accepted, but not again: %s", data, again)
		}
		for _, s := range []string{in.Email, in.Username, in.FirstName, in.LastName, in.Phone, in.Locale} {
			if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) || strings.ContainsAny(s, "<>\"") && s != in.Email || len(s) > 4*255 {
				t.Errorf("%s is accepted", data)
			}
		}
	})
}

func FuzzMailAddress(f *testing.F) {
	for _, s := range []string{"a@b.cd", "a@b", `"a"@b.cd`, "a@b.cd\r\nX: y", "ä@b.cd", "a@[1.2.3.4]", "A <a@b.cd>", "a@b.cd,c@d.ef", "a(b)@c.de", "a@b.cd ",
		"a@Bu\u0308cher.example", "a@xn--bcher-kva.example", "a@b\u00ad.c\uff44", "0@\x8d.0", "a@" + strings.Repeat("b", 64) + ".c\uff44"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		normal, wrong := mailAddress(s)
		if wrong != "" {
			return
		}
		a, err := mail.ParseAddress(normal)
		_, domain, _ := strings.Cut(normal, "@")
		if err != nil || a.Address != normal || strings.Count(normal, "@") != 1 || strings.ContainsFunc(normal, func(r rune) bool { return r <= ' ' || r > '~' }) ||
			strings.ContainsAny(normal, `,;:<>()[]\"`) || !strings.Contains(domain, ".") || domain != strings.ToLower(domain) {
			t.Errorf("%q is accepted: %v", s, fmt.Sprint(a, err))
		}
		if again, wrong := mailAddress(normal); again != normal || wrong != "" {
			t.Errorf("%q: %q becomes %q", s, normal, again)
		}
	})
}
