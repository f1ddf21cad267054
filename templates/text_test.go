package templates_test

import (
	"encoding/json"
	"html"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"auth-service/dev/preview"
	"auth-service/templates"

	"github.com/a-h/templ"
)

// sameInGerman are words that both languages have.
var sameInGerman = map[string]bool{"Code": true}

// TestGerman renders every sample page in both languages: no text of the one is left in the other.
func TestGerman(t *testing.T) {
	for _, sample := range preview.Samples() {
		english, german := texts(t, sample.Page, "en"), texts(t, sample.Page, "de")
		if len(english) == 0 || len(english) != len(german) {
			t.Errorf("%s has %d texts in English and %d in German", sample.Name, len(english), len(german))
			continue
		}
		for i, text := range english {
			if text == german[i] && !sameInGerman[text] {
				t.Errorf("%s: german.json lacks %q", sample.Name, text)
			}
		}
	}
}

var (
	untranslated = regexp.MustCompile(`(?s)<(\w+)[^>]* translate="no">.*?</(?:p|pre|code)>`)
	textNode     = regexp.MustCompile(`>([^<]+)`)
)

// texts are the texts of a page, without addresses and the like.
func texts(t *testing.T, page templ.Component, language string) (all []string) {
	t.Helper()
	var b strings.Builder
	if err := page.Render(templates.WithLanguage(t.Context(), language), &b); err != nil {
		t.Fatal(err)
	}
	for _, m := range textNode.FindAllStringSubmatch(untranslated.ReplaceAllString(b.String(), ""), -1) {
		text := strings.TrimSpace(html.UnescapeString(m[1]))
		if strings.ContainsFunc(text, unicode.IsLetter) {
			all = append(all, text)
		}
	}
	return all
}

// TestPasswordHint compares what the page wants of a password with what Keycloak wants.
func TestPasswordHint(t *testing.T) {
	realm, err := os.ReadFile("../keycloak/realm.json")
	if err != nil {
		t.Fatal(err)
	}
	policy := regexp.MustCompile(`"passwordPolicy": *"[^"]*\blength\((\d+)\)`).FindSubmatch(realm)
	if policy == nil {
		t.Fatal("realm.json wants no length of passwords")
	}
	page := strings.Join(texts(t, templates.Verify(templates.VerifyForm{Token: "token"}), "en"), "\n")
	if want := "At least " + string(policy[1]) + " characters"; !strings.Contains(page, want) {
		t.Errorf("the page does not say %q:\n%s", want, page)
	}
}

// ofKeycloak begin the sentences of Keycloak's password policies.
var ofKeycloak = regexp.MustCompile(`^(maximum length|minimum length|must contain at least|must not be equal to) `)

// wrapped is where a sentence goes on in the next line of the source.
var wrapped = regexp.MustCompile(`" \+\n\t*"`)

// TestGermanIsUsed finds translations of sentences that the program does not have any more.
func TestGermanIsUsed(t *testing.T) {
	var sources strings.Builder
	for _, pattern := range []string{"../*.go", "*.templ"} {
		files, err := filepath.Glob(pattern)
		if err != nil || files == nil {
			t.Fatal(pattern, err)
		}
		for _, file := range files {
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasSuffix(file, "_test.go") {
				sources.Write(wrapped.ReplaceAll(source, nil))
			}
		}
	}
	content, err := os.ReadFile("german.json")
	if err != nil {
		t.Fatal(err)
	}
	german := map[string]string{}
	if err := json.Unmarshal(content, &german); err != nil {
		t.Fatal(err)
	}
	for english := range german {
		begin, end, _ := strings.Cut(`"`+english+`"`, "%d")
		said := strings.Contains(sources.String(), begin) && strings.Contains(sources.String(), end)
		if !said && !ofKeycloak.MatchString(english) {
			t.Errorf("nothing says %q", english)
		}
	}
}
