package mail

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/smtp"
	"strings"
	"testing"
	"time"
)

const twoParts = "From: Example <no-reply@example.test>\r\nTo: ada@example.test\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe_=3Cb=3E?=\r\n" +
	"MIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=x\r\n\r\n" +
	"--x\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" +
	"Open http://localhost/verify?token=3Dabc.\r\n" +
	"--x\r\nContent-Type: text/html; charset=iso-8859-1\r\n\r\n<p>Gr\xfc\xdfe</p>\r\n--x--\r\n"

func TestCatcher(t *testing.T) {
	dir := t.TempDir()
	c, err := StartIn("127.0.0.1:0", dir)
	if err != nil {
		t.Fatal(err)
	}
	send := func() error {
		return smtp.SendMail(c.Addr(), nil, "no-reply@example.test", []string{"ada@example.test"}, []byte(twoParts))
	}
	got := make(chan Message)
	go func() {
		m, _ := c.WaitFor(t.Context(), "Ada@Example.test", 2)
		got <- m
	}()
	for range 2 {
		if err := send(); err != nil {
			t.Fatal(err)
		}
	}
	m := <-got
	if m.ID != 2 || m.Subject != "Grüße <b>" || strings.TrimSpace(m.HTML) != "<p>Grüße</p>" ||
		len(m.Links) != 1 || m.Links[0] != "http://localhost/verify?token=abc" {
		t.Errorf("the second mail came as %+v", m)
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.WaitFor(short, "ada@example.test", 3); err == nil {
		t.Error("a third mail arrived")
	}

	c.Close()
	if send() == nil {
		t.Error("a closed catcher took a mail")
	}
	if err := c.Restart(); err != nil {
		t.Fatal(err)
	}
	if err := send(); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	c.Close()

	again, err := StartIn("127.0.0.1:0", dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if kept := again.To("ada@example.test"); len(kept) != 3 || kept[2].Subject != m.Subject {
		t.Errorf("%d mails were kept, want 3", len(kept))
	}
	for path, want := range map[string]string{
		"/":                         "Grüße &lt;b&gt;",
		"/messages/1":               `sandbox="`,
		"/messages/1/html":          "<p>Grüße</p>",
		"/messages/1/raw":           "boundary=x",
		"/api/messages?to=nobody@x": "[]",
	} {
		w := httptest.NewRecorder()
		again.Inbox().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), want) {
			t.Errorf("GET %s: %d without %q: %s", path, w.Code, want, w.Body)
		}
	}
}
