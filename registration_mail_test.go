package main

import (
	"context"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"auth-service/dev/mail"
	"auth-service/dev/preview"

	"github.com/google/go-cmp/cmp"
)

// TestMails reads every mail in every language, in both of its parts.
func TestMails(t *testing.T) {
	w := sharedEnv(t)
	const confirm, confirmGerman = "Confirm your e-mail address", "Bitte bestätigen Sie Ihre E-Mail-Adresse"
	const access, accessGerman = "Access to your account", "Zugang zu Ihrem Konto"
	wants := map[string]struct{ subject, says string }{
		"registration.en":    {confirm, "Someone registered at"},
		"registration.de":    {confirmGerman, "Jemand hat sich mit dieser E-Mail-Adresse bei"},
		"invitation.en":      {confirm, "was prepared for this e-mail address"},
		"invitation.de":      {confirmGerman, "Für diese E-Mail-Adresse wurde ein Konto bei"},
		"changed-address.en": {confirm, "that this is the e-mail address of your account"},
		"changed-address.de": {confirmGerman, "dass dies die E-Mail-Adresse Ihres Kontos"},
		"password.en":        {access, "you choose a password for your account"},
		"password.de":        {accessGerman, "wählen Sie ein Passwort für Ihr Konto"},
		"required-action.en": {access, "An administrator asks you to do the following"},
		"required-action.de": {accessGerman, "Ein Administrator bittet Sie"},
		"notice.en":          {access, "was changed just now"},
		"notice.de":          {accessGerman, "wurde gerade geändert"},
	}
	w.sendPreviews()
	for _, kind := range preview.Mails {
		for _, language := range []string{"en", "de"} {
			name := kind.Name + "." + language
			t.Run(name, func(t *testing.T) {
				m := w.receive(name+"@example.test", 1)
				if m.Subject != wants[name].subject {
					t.Errorf("the subject is %q, want %q", m.Subject, wants[name].subject)
				}
				if !strings.Contains(m.HTML, `<html lang="`+language+`"`) {
					t.Errorf("the mail is not in %q:\n%s", language, m.HTML)
				}
				for _, part := range []string{m.Text, m.HTML} {
					if !strings.Contains(part, wants[name].says) {
						t.Errorf("a part lacks %q:\n%s", wants[name].says, part)
					}
				}
				sameLinks(t, m)
				byKeycloak := len(m.Links) == 1 && strings.Contains(m.Links[0], "/login-actions/action-token?key=") &&
					!codePattern.MatchString(m.Text)
				if byKeycloak != (kind.Kind == "" && kind.Action != "") {
					t.Errorf("%d links:\n%s", len(m.Links), m.Text)
				}
			})
		}
	}
}

// TestMailOfRegistration reads the mail that the service has sent: link, code, and nothing that a stranger could have
// written into it.
func TestMailOfRegistration(t *testing.T) {
	w := sharedEnv(t)
	for _, language := range []string{"en", "de"} {
		email := "o'neil-" + newEmail() // what a person can choose freely
		in := map[string]any{"email": email, "locale": language, "first_name": "Zoë http://evil.test", "last_name": "O'Neil"}
		w.wants(w.post("/api/v1/register", in), 400, "invalid-request") // a name is no link
		in["first_name"] = "Zoë"
		w.wants(w.post("/api/v1/register", in), 201, "")
		m := w.receive(email, 1)
		l := w.readLink(m)
		if !strings.HasSuffix(l.URL, "/account/verify?token="+l.Token) {
			t.Errorf("the link is %s", l.URL)
		}
		for _, part := range []string{m.Text, m.HTML} {
			for _, want := range []string{l.URL, l.Code, "/account/cancel?token=" + l.Token} {
				if !strings.Contains(part, want) {
					t.Errorf("a part lacks %q:\n%s", want, part)
				}
			}
			for _, never := range []string{"Zoë", "Neil", email, "/login-actions/", "key="} {
				if strings.Contains(part, never) {
					t.Errorf("a part has %q:\n%s", never, part)
				}
			}
		}
		sameLinks(t, m)
	}
}

// TestMailEscapes puts markup where a mail prints what it is given.
func TestMailEscapes(t *testing.T) {
	t.Parallel()
	w := newEnv(t, nil)
	const hostile = `<b>"&'</b>`
	user := map[string]any{"username": "eve", "email": "eve@example.test", "firstName": "Eve", "enabled": true,
		"requiredActions": []string{"VERIFY_EMAIL"}, "attributes": map[string]any{
			attrURL:   []string{"http://localhost/account/verify" + hostile},
			attrToken: []string{hostile}, attrCode: []string{hostile}}}
	w.keycloakAdmin("POST", "/users", user, nil)
	var found []seenUser
	w.keycloakAdmin("GET", "/users?username=eve&exact=true", nil, &found)
	w.keycloakAdmin("PUT", "/users/"+found[0].ID+"/send-verify-email", nil, nil)
	m := w.receive("eve@example.test", 1)
	if strings.Contains(m.HTML, "<b>") || !strings.Contains(m.HTML, "&lt;b&gt;") {
		t.Errorf("not escaped:\n%s", m.HTML)
	}
	if !strings.Contains(m.Text, hostile) || strings.Contains(m.Text, "&lt;") {
		t.Errorf("escaped, though it is plain text:\n%s", m.Text)
	}
}

// sendPreviews makes Keycloak send every mail, see preview.SendMails.
func (w *env) sendPreviews() {
	w.Helper()
	_, port, _ := strings.Cut(w.mail.Addr(), ":")
	smtpPort, err := strconv.Atoi(port)
	if err == nil {
		err = preview.SendMails(w.Context(), services, smtpPort, "auth-service", []string{"en", "de", "ar"})
	}
	if err != nil {
		w.Fatal(err)
	}
}

// TestMailsOfAnOperator reads every mail with the operator's colour, logo and links, and without.
func TestMailsOfAnOperator(t *testing.T) {
	t.Parallel()
	for theme, theirs := range map[string]bool{"auth-service": false, "example": true} {
		catcher, err := mail.Start("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer catcher.Close()
		_, port, _ := strings.Cut(catcher.Addr(), ":")
		smtpPort, err := strconv.Atoi(port)
		if err == nil {
			err = preview.SendMails(t.Context(), services, smtpPort, theme, []string{"en", "ar"})
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range catcher.Messages() {
			for text, want := range map[string]bool{
				`bgcolor="#8a1c4a"`:     theirs && strings.Contains(m.HTML, "inline-block"), // a notice has no button
				"a { color: #8a1c4a; }": theirs, "a { color: #1b58b8; }": !theirs,
				`<img src="https://www.example.com/logo.svg?size=28&amp;v=2"`: theirs, "<img": theirs,
				`href="https://www.example.com/privacy?lang=en&amp;print"`: theirs,
				`href="https://www.example.com/imprint"`:                   theirs,
				`style="display:none;`:                                     true, `role="presentation" width="520"`: true,
			} {
				if strings.Contains(m.HTML, text) != want {
					t.Errorf("theme %s, mail to %s: %q is there: %t", theme, m.To, text, !want)
				}
			}
			if strings.Contains(m.Text, ": https://www.example.com/privacy?lang=en&print") != theirs {
				t.Errorf("theme %s, mail to %s, as text:\n%s", theme, m.To, m.Text)
			}
		}
	}
}

func (w *env) receive(to string, n int) mail.Message {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 30*time.Second)
	defer cancel()
	m, err := w.mail.WaitFor(ctx, to, n)
	if err != nil {
		w.Fatal(err)
	}
	return m
}

var hrefPattern = regexp.MustCompile(`href="([^"]*)"`)

// sameLinks checks that both parts of a mail lead to the same places.
func sameLinks(t *testing.T, m mail.Message) {
	t.Helper()
	inHTML := map[string]bool{}
	for _, href := range hrefPattern.FindAllStringSubmatch(m.HTML, -1) {
		inHTML[strings.ReplaceAll(href[1], "&amp;", "&")] = true
	}
	for _, link := range m.Links {
		if _, err := url.Parse(link); err != nil || !inHTML[link] {
			t.Errorf("the link %s is not in the HTML part (%v):\n%s", link, err, m.HTML)
		}
		delete(inHTML, link)
	}
	for link := range inHTML {
		t.Errorf("the link %s is in the HTML part only", link)
	}
}

// TestMailLanguages: mails and Keycloak's pages have the languages of ours, each with all messages and their
// placeholders, and the realm knows them. An apostrophe would quote (java.text.MessageFormat).
func TestMailLanguages(t *testing.T) {
	codes := slices.Sorted(slices.Values(site.Codes()))
	realm, err := os.ReadFile("keycloak/realm.json")
	if err != nil {
		t.Fatal(err)
	}
	var supported struct{ SupportedLocales []string }
	if err := json.Unmarshal(realm, &supported); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(codes, supported.SupportedLocales); diff != "" {
		t.Errorf("realm.json: %s", diff)
	}
	themes, err := filepath.Glob("keycloak/themes/auth-service/*/theme.properties")
	if err != nil || themes == nil {
		t.Fatal(themes, err)
	}
	for _, file := range themes {
		if locales := properties(t, file)["locales"]; locales != strings.Join(codes, ",") {
			t.Errorf("%s has the locales %s", file, locales)
		}
		messages := func(code string) map[string]string {
			return properties(t, filepath.Join(filepath.Dir(file), "messages", "messages_"+code+".properties"))
		}
		english := messages("en")
		for _, code := range codes {
			translated := messages(code)
			for name, text := range translated {
				has, wants := messageArgument.FindAllString(text, -1), messageArgument.FindAllString(english[name], -1)
				if english[name] == "" || !slices.Equal(has, wants) || strings.Contains(text, "'") {
					t.Errorf("%s, %s: %s=%s", file, code, name, text)
				}
			}
			if len(translated) != len(english) {
				t.Errorf("%s, %s: %d of %d messages", file, code, len(translated), len(english))
			}
		}
	}
}

var messageArgument = regexp.MustCompile(`\{\d\}`)

// properties reads a file of Java properties, of the simple form that the themes have.
func properties(t *testing.T, file string) map[string]string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for line := range strings.Lines(string(content)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			values[name] = value
		}
	}
	return values
}
