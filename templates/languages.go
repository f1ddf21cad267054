package templates

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"
	"golang.org/x/text/language"
)

// Languages are what the pages can be read in. Each is a file named after its BCP 47 tag, like pt-BR.json: an object
// from the English sentence to the translation. docs/translate.md says more.
type Languages struct {
	matcher   language.Matcher
	codes     []string // English first: it is for everybody else
	sentences map[string]map[string]string
}

//go:embed languages/*.json
var embedded embed.FS

// loadLanguages reads the languages of the program, and over them those of dir, an operator's; "" is none.
func loadLanguages(dir string) (*Languages, error) {
	l := &Languages{codes: []string{"en"}, sentences: map[string]map[string]string{"en": {"English": "English"}}}
	ours, _ := fs.Sub(embedded, "languages")
	err := l.read(ours)
	if dir != "" {
		err = errors.Join(err, l.read(os.DirFS(dir)))
	}
	slices.Sort(l.codes[1:])
	var tags []language.Tag
	for _, code := range l.codes {
		tags = append(tags, language.Make(code))
	}
	l.matcher = language.NewMatcher(tags)
	return l, err
}

// read adds languages, and sentences to those that are there.
func (l *Languages) read(dir fs.FS) error {
	files, err := fs.Glob(dir, "*.json")
	if err == nil && len(files) == 0 {
		err = errors.New("there is no file like de.json")
	}
	for _, file := range files {
		tag, wrong := language.Parse(strings.TrimSuffix(file, ".json"))
		sentences := map[string]string{}
		if wrong == nil {
			var content []byte
			if content, wrong = fs.ReadFile(dir, file); wrong == nil {
				wrong = json.Unmarshal(content, &sentences)
			}
		}
		for english, sentence := range sentences {
			if !slices.Equal(placeholders.FindAllString(english, -1), placeholders.FindAllString(sentence, -1)) {
				wrong = errors.Join(wrong, fmt.Errorf("%q and %q have other placeholders", english, sentence))
			}
		}
		if wrong != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", path.Base(file), wrong))
			continue
		}
		code := tag.String()
		if l.sentences[code] == nil {
			l.codes, l.sentences[code] = append(l.codes, code), map[string]string{}
		}
		maps.Copy(l.sentences[code], sentences)
	}
	return err
}

// placeholders are what a sentence and its translation have in the same order.
var placeholders = regexp.MustCompile(`%[ds]`)

// Match returns the language that is nearest to what somebody prefers: the first preference that is a language of the
// pages or a variety of it ("de-AT", "de_CH"). A preference is a tag or an Accept-Language header (RFC 9110 §12.5.4);
// a malformed one counts as absent.
func (l *Languages) Match(preferences ...string) string {
	_, i := language.MatchStrings(l.matcher, preferences...)
	return l.codes[i]
}

// Has says whether code is one of the languages, exactly.
func (l *Languages) Has(code string) bool { return l.sentences[code] != nil }

// Codes returns the BCP 47 tags of the languages, English first.
func (l *Languages) Codes() []string { return slices.Clone(l.codes) }

// native is the name of a language in itself: its translation of "English".
func (l *Languages) native(code string) string {
	return cmp.Or(l.sentences[code]["English"], code)
}

// direction is the dir attribute of a page in a language.
func direction(code string) string {
	switch script, _ := language.Make(code).Script(); script.String() {
	case "Arab", "Hebr", "Thaa", "Syrc", "Nkoo", "Adlm":
		return "rtl"
	}
	return "ltr"
}

// number is what a sentence may have in the place of a translation's %d.
var number = regexp.MustCompile(`\d+`)

// t returns the English sentence in the language of the page. A sentence without a translation stays English: better
// a foreign sentence than none.
func t(ctx context.Context, english string) string {
	look := lookOf(ctx)
	sentences := look.sentences[look.code]
	if s, ok := sentences[english]; ok {
		return s
	}
	if sentence, what, ok := strings.Cut(english, ": "); ok && sentences[sentence] != "" { // names a character
		return sentences[sentence] + ": " + t(ctx, what)
	}
	n := number.FindString(english)
	if s, ok := sentences[strings.Replace(english, n, "%d", 1)]; n != "" && ok {
		return strings.Replace(s, "%d", n, 1)
	}
	return english
}

// fault makes a sentence of a field's name and what is wrong with it ("E-mail address is required"). What begins with
// a capital is a sentence already.
func fault(ctx context.Context, label, wrong string) string {
	if r, _ := utf8.DecodeRuneInString(wrong); unicode.IsUpper(r) {
		return t(ctx, wrong)
	}
	return fmt.Sprintf(t(ctx, "%s %s"), t(ctx, label), t(ctx, wrong))
}

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
