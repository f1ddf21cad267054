package templates_test

import (
	"encoding/json"
	"fmt"
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

// site has the languages of the program.
var site = func() *templates.Site {
	s, err := templates.NewSite(templates.Brand{PrivacyURL: "https://example.test/p", TermsURL: "https://example.test/t",
		ImprintURL: "https://example.test/i"})
	if err != nil {
		panic(err)
	}
	return s
}()

// TestTranslations renders every sample page in every language: each text is in the language's file.
func TestTranslations(t *testing.T) {
	said := sentences(t)
	for _, code := range site.Codes()[1:] {
		known := map[string]bool{}
		for _, translation := range languageFile(t, code) {
			known[translation] = true
		}
		for _, sample := range preview.Samples() {
			english, other := texts(t, sample.Page, "en"), texts(t, sample.Page, code)
			if len(english) == 0 || len(english) != len(other) {
				t.Errorf("%s has %d texts in English and %d in %s", sample.Name, len(english), len(other), code)
				continue
			}
			for i, text := range english {
				if text == other[i] && !known[text] {
					t.Errorf("%s: %s.json lacks %q", sample.Name, code, text)
				}
			}
		}
		for english := range languageFile(t, code) {
			if !said(english) {
				t.Errorf("%s.json: nothing says %q", code, english)
			}
		}
	}
}

// TestLanguagesAreWhole: each language has every sentence that another one has.
func TestLanguagesAreWhole(t *testing.T) {
	german := languageFile(t, "de")
	for _, code := range site.Codes()[1:] {
		sentences := languageFile(t, code)
		for english := range german {
			if sentences[english] == "" {
				t.Errorf("%s.json lacks %q", code, english)
			}
		}
	}
}

func languageFile(t *testing.T, code string) map[string]string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("languages", code+".json"))
	if err != nil {
		t.Fatal(err)
	}
	sentences := map[string]string{}
	if err := json.Unmarshal(content, &sentences); err != nil {
		t.Fatal(err)
	}
	return sentences
}

var (
	untranslated = regexp.MustCompile(`(?s)<(\w+)[^>]* translate="no">.*?</(?:p|pre|code)>`)
	textNode     = regexp.MustCompile(`>([^<]+)`)
)

// texts are the texts of a page, without addresses and the like.
func texts(t *testing.T, page templ.Component, language string) (all []string) {
	t.Helper()
	var b strings.Builder
	if err := page.Render(site.Context(t.Context(), language, nil), &b); err != nil {
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

// sentences returns a function that says whether the program has a sentence, or a pattern for it.
func sentences(t *testing.T) func(string) bool {
	t.Helper()
	var sources strings.Builder
	for _, pattern := range []string{"../*.go", "*.templ", "languages.go", "site.go"} {
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
	return func(english string) bool {
		begin, end, _ := strings.Cut(`"`+english+`"`, "%d")
		return strings.Contains(sources.String(), begin) && strings.Contains(sources.String(), end) ||
			ofKeycloak.MatchString(english)
	}
}

// TestLanguageFiles: a file that can't be right is named at the start, with what is wrong in it.
func TestLanguageFiles(t *testing.T) {
	for _, c := range []struct{ file, content, wants string }{
		{"sv.json", `{"Sign in": "Logga in"}`, ""},
		{"pt-BR.json", `{"must have at least %d characters": "mínimo de %d caracteres"}`, ""},
		{"sv.json", `{"Sign in": `, "sv.json: unexpected end of JSON input"},
		{"sv.json", `["Sign in"]`, "sv.json: json: cannot unmarshal array"},
		{"swedish!.json", `{}`, "swedish!.json: language: "},
		{"sv.json", `{"must have at least %d characters": "för kort"}`, "have other placeholders"},
		{"sv.json", `{"%s %s": "%s"}`, "have other placeholders"},
		{"sv.txt", ``, "there is no file like de.json"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := templates.NewSite(templates.Brand{LanguagesDir: dir})
		code := strings.TrimSuffix(c.file, ".json")
		if got := fmt.Sprint(err); (err == nil) != (c.wants == "") || !strings.Contains(got, c.wants) && err != nil {
			t.Errorf("%s %s: %v", c.file, c.content, err)
		}
		if err == nil && (!s.Has(code) || s.Match(code) != code) {
			t.Errorf("%s is not a language", code)
		}
	}
}

// TestOneSetOfColours: Keycloak's pages have the colours of ours, but for what the operator sets.
func TestOneSetOfColours(t *testing.T) {
	operators := regexp.MustCompile(`var\(--app[a-z-]*, (#[0-9a-f]+)\)`)
	block := func(file string) string {
		style, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, colours, begins := strings.Cut(string(style), ":root {")
		colours, _, ends := strings.Cut(colours, "*, ::before")
		if !begins || !ends {
			t.Fatalf("%s has no colours", file)
		}
		return operators.ReplaceAllString(colours, "$1")
	}
	if ours, theirs := block("style.css"), block("../keycloak/themes/auth-service/login/resources/css/auth-service.css"); ours != theirs {
		t.Errorf("ours:\n%s\nKeycloak's:\n%s", ours, theirs)
	}
}
