// Package templates has the pages that people see: a few forms, and one page for every outcome. They need no script,
// carry no inline style, and speak English and German. Each page is a component with a plain struct as its content;
// WithLanguage decides in which language it is rendered.
package templates

import (
	"context"
	_ "embed"
	"encoding/json"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"
	"golang.org/x/text/language"
)

// languages lists what the pages can be read in; the first is for everybody else.
var languages = language.NewMatcher([]language.Tag{language.English, language.German})

type languageKey struct{}

// WithLanguage returns a context whose pages are rendered in lang, which is what Language has chosen.
func WithLanguage(ctx context.Context, lang string) context.Context {
	return context.WithValue(ctx, languageKey{}, lang)
}

// Language returns "de" or "en": the locale if it is one of them or a variety of it ("de-AT", "de_CH"), otherwise what
// the Accept-Language header prefers (RFC 9110 §12.5.4), otherwise "en". Malformed values count as absent.
func Language(header, locale string) string {
	if _, i := language.MatchStrings(languages, locale, header); i == 1 {
		return "de"
	}
	return "en"
}

func pageLanguage(ctx context.Context) string {
	if lang, ok := ctx.Value(languageKey{}).(string); ok {
		return lang
	}
	return "en"
}

// number is what a sentence may have in the place of a translation's %d.
var number = regexp.MustCompile(`\d+`)

// shown is an e-mail address as its person writes it: the domain as a U-label (RFC 5890 §2.3.2.1). A page shows an
// address only to who has typed it, or has the mail that went there. Forms keep the A-label: Keycloak's sign-in page
// wants it, and password managers take it from there.
func shown(email string) string {
	local, domain, _ := strings.Cut(email, "@")
	if unicode, err := idna.Lookup.ToUnicode(domain); err == nil {
		domain = unicode
	}
	return local + "@" + domain
}

// t returns the English sentence in the language of the page. A sentence without a translation stays English: better
// a foreign sentence than none.
func t(ctx context.Context, english string) string {
	if pageLanguage(ctx) != "de" {
		return english
	}
	if s, ok := german[english]; ok {
		return s
	}
	if sentence, what, ok := strings.Cut(english, ": "); ok && german[sentence] != "" { // names a character
		return german[sentence] + ": " + t(ctx, what)
	}
	n := number.FindString(english)
	if s, ok := german[strings.Replace(english, n, "%d", 1)]; n != "" && ok {
		return strings.Replace(s, "%d", n, 1)
	}
	return english
}

// fault makes a sentence of a field's name and what is wrong with it ("E-mail address is required"). What begins with
// a capital is a sentence already.
func fault(ctx context.Context, label, wrong string) string {
	wrong = t(ctx, wrong)
	if r, _ := utf8.DecodeRuneInString(wrong); unicode.IsUpper(r) {
		return wrong
	}
	return t(ctx, label) + " " + wrong
}

//go:embed german.json
var germanJSON []byte

// german has the translation of every sentence of the pages, and of the titles and details of problems that they show.
var german = func() map[string]string {
	sentences := map[string]string{}
	if err := json.Unmarshal(germanJSON, &sentences); err != nil {
		panic(err) // the file is part of the program
	}
	return sentences
}()
