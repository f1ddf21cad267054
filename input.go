package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/mail"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"
	"golang.org/x/text/secure/precis"
	"golang.org/x/text/unicode/norm"
)

// input is the input of an operation while it is read: its fields by name, and names that a
// request has and the operation does not know.
type input struct {
	fields map[string]*inputField
	takes  map[string]bool   // path, query, json: whether any field comes from there
	hints  map[string]string // what to do instead of sending a field that is not known
	either [][]string        // sets of fields of which one must be there, and no other
}

// inputField has tags that are both the rules that check applies and what the OpenAPI document says.
type inputField struct {
	from  string // path, query or json
	value reflect.Value
	tag   reflect.StructTag
	given bool
	wrong string // what is wrong with it
}

// inputOf returns the fields of a struct.
func inputOf(to any) input {
	in := input{fields: map[string]*inputField{}, takes: map[string]bool{}}
	in.add(reflect.ValueOf(to).Elem())
	if hinted, ok := to.(interface{ hints() map[string]string }); ok {
		in.hints = hinted.hints()
	}
	if alternative, ok := to.(interface{ either() [][]string }); ok {
		in.either = alternative.either()
	}
	return in
}

func (in input) add(of reflect.Value) {
	for f, value := range of.Fields() {
		if f.Anonymous {
			in.add(value)
		}
		for _, from := range []string{"path", "query", "json"} {
			if name, _, _ := strings.Cut(f.Tag.Get(from), ","); name != "" {
				in.takes[from] = true
				in.fields[name] = &inputField{from: from, value: value, tag: f.Tag}
			}
		}
	}
}

// decode reads path, query and body into an operation's input, and checks it. Every wrong field
// is named, all at once.
func (s *server) decode(w http.ResponseWriter, r *http.Request, to any) error {
	in := inputOf(to)
	if err := in.readParameters(r); err != nil {
		return err
	}
	if takes, err := s.decodeCookie(r, to); err != nil || takes && r.ContentLength == 0 {
		return err // there or not, the cookie is all there is
	}
	if in.takes["json"] {
		mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if err != nil || mediaType != "application/json" {
			return problemUnsupportedMediaType
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			return bodyError(err)
		}
		if err := in.readJSON(body); err != nil {
			return err
		}
	}
	return in.check()
}

// take returns the field that a request gives a value to, or nil if it is not known or is given
// twice: a filter with a typo would show more than was asked for.
func (in input) take(from, name string) *inputField {
	f := in.fields[name]
	switch {
	case f == nil && (name == "" || len(name) > 50):
		in.fields[""] = &inputField{wrong: "has a field that is not known"}
	case f == nil || f.from != from: // what the path says is not the body's to change
		in.fields[name] = &inputField{wrong: cmp.Or(in.hints[name], "is not known")}
	case f.given:
		f.wrong = "is there twice"
	default:
		f.given = true
		return f
	}
	return nil
}

// readParameters reads path and query. An operation that takes no query does not look at it.
func (in input) readParameters(r *http.Request) error {
	for name, f := range in.fields {
		if f.from == "path" {
			f.given = true
			f.setText(r.PathValue(name))
		} else if text := f.tag.Get("default"); text != "" {
			f.setText(text)
		}
	}
	if !in.takes["query"] {
		return nil
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil { // a part of it may be readable, and ask for something else
		return invalid(fieldError{"query", "can't be read"})
	}
	for name, values := range query {
		for _, text := range values {
			if f := in.take("query", name); f != nil {
				f.setText(text)
			}
		}
	}
	return nil
}

// readJSON reads a JSON object. encoding/json itself would stop at the first wrong member, and
// takes "EMAIL" for "email".
func (in input) readJSON(body []byte) error {
	notJSON := problemInvalidRequest.withDetail("The request body must be one JSON object.")
	if !utf8.Valid(body) || !json.Valid(body) { // Valid refuses what follows the value, too
		return notJSON
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return notJSON
	}
	for dec.More() {
		name, err := dec.Token()
		var value json.RawMessage
		if err := cmp.Or(err, dec.Decode(&value)); err != nil {
			return notJSON
		}
		if f := in.take("json", name.(string)); f != nil {
			f.setJSON(value)
		}
	}
	return nil
}

// setText sets the value of a parameter or of a form's field.
func (f *inputField) setText(text string) {
	switch f.value.Kind() {
	case reflect.String:
		f.value.SetString(text)
	case reflect.Int, reflect.Bool:
		f.setJSON([]byte(text))
	default:
		f.setJSON(strconv.AppendQuote(nil, text))
	}
}

// setJSON sets a value that is written in JSON. A pointer may be null, as if it were absent.
func (f *inputField) setJSON(value []byte) {
	null := string(value) == "null" && f.value.Kind() != reflect.Pointer
	if json.Unmarshal(value, f.value.Addr().Interface()) != nil || null {
		f.wrong = cmp.Or(map[reflect.Kind]string{reflect.Bool: "must be true or false", reflect.Int: "must be a whole number",
			reflect.Struct: "must be a time like 2026-01-02T03:04:05Z"}[f.value.Kind()], "must be a string")
	}
}

// check returns invalid-request with every field that is wrong, or nil.
func (in input) check() error {
	var wrong []fieldError
	for _, name := range slices.Sorted(maps.Keys(in.fields)) {
		f := in.fields[name]
		switch detail := cmp.Or(f.wrong, f.check()); {
		case detail == "":
		case f.from == "path":
			return problemNotFound // an id that nothing can have
		default:
			wrong = append(wrong, fieldError{cmp.Or(name, "request"), detail})
		}
	}
	there := 0
	for _, fields := range in.either {
		if !slices.ContainsFunc(fields, func(name string) bool { return in.fields[name].value.String() == "" }) {
			there++
		}
	}
	if len(wrong) == 0 && in.either != nil && there != 1 {
		wrong = []fieldError{{in.either[0][0], "is required, or else " + strings.Join(in.either[1], " and ")}}
	}
	if len(wrong) > 0 {
		return invalid(wrong...)
	}
	return nil
}

// check returns what the tags have against the value, or "". It gives the value its normal form first.
func (f *inputField) check() string {
	v := reflect.Indirect(f.value) // of nil, and of a name that is not known: no value
	wrong := ""
	if f.given && v.Kind() == reflect.String && f.from != "path" {
		var normal string
		normal, wrong = f.normal(v.String())
		v.SetString(normal)
	}
	switch {
	case v.CanInt() && f.tag.Get("maximum") != "":
		least, most := f.number("minimum"), f.number("maximum")
		if n := int(v.Int()); n < least || n > most {
			return fmt.Sprintf("must be from %d to %d", least, most)
		}
	case v.Kind() != reflect.String:
	case v.String() == "" && f.tag.Get("required") == "true":
		return "is required"
	case f.given:
		return f.checkString(v.String(), wrong)
	}
	return ""
}

func (f *inputField) number(tag string) int {
	n, _ := strconv.Atoi(f.tag.Get(tag))
	return n
}

func (f *inputField) checkString(value, wrong string) string {
	least, most := f.number("minLength"), cmp.Or(f.number("maxLength"), maxBody)
	length := utf8.RuneCountInString(value)
	enum, pattern := f.tag.Get("enum"), f.tag.Get("pattern")
	odd := strings.IndexFunc(value, invisible)
	switch {
	case length < least:
		return fmt.Sprintf("must have at least %d characters", least)
	case length > most:
		return fmt.Sprintf("must have at most %d characters", most)
	case wrong != "":
		return wrong
	case f.tag.Get("format") != "password" && odd >= 0:
		r, _ := utf8.DecodeRuneInString(value[odd:])
		return notAllowed(r)
	case enum != "" && !slices.Contains(strings.Split(enum, ","), value):
		return "must be one of " + strings.ReplaceAll(enum, ",", ", ")
	case pattern != "":
		return mismatch(value, regexp.MustCompile(pattern), f.tag.Get("mismatch"))
	}
	return ""
}

// mismatch returns "" if a value matches a pattern. Otherwise it says what, or names the first character that is not
// in the pattern's class.
func mismatch(value string, pattern *regexp.Regexp, what string) string {
	if pattern.MatchString(value) {
		return ""
	}
	for _, r := range value {
		if what == "" && !pattern.MatchString(string(r)) {
			return notAllowed(r)
		}
	}
	return cmp.Or(what, "is not allowed")
}

// notAllowed names a character that a field can't have, and nothing else of its value.
func notAllowed(r rune) string {
	name := string(r)
	if r == ' ' {
		name = "a blank"
	} else if !unicode.IsPrint(r) || unicode.IsMark(r) {
		name = fmt.Sprintf("U+%04X", r)
	}
	return "has a character that is not allowed: " + name
}

// normalForms are those of kinds of fields, by the tag as, or else format: a function returns the normal form of a
// text, and what is wrong with it.
var normalForms = map[string]func(text string) (normal, wrong string){
	"email": mailAddress, "login": login, "username": username, "phone": phoneNumber,
	"search": func(text string) (string, string) {
		if local, domain, ok := strings.Cut(text, "@"); ok {
			if domain, err := mailDomain(domain); err == nil {
				return local + "@" + domain, ""
			}
		}
		return text, ""
	},
	"digits": func(text string) (string, string) { // people type and paste them in groups
		return notDialled.ReplaceAllString(text, ""), ""
	},
}

// normal returns the form in which a text is stored and compared, whichever way it comes in, and what is wrong with
// it. A password stays as it was typed.
func (f *inputField) normal(text string) (normal, wrong string) {
	kind := cmp.Or(f.tag.Get("as"), f.tag.Get("format"))
	if kind == "password" {
		return text, ""
	}
	text = plainText(text)
	if form := normalForms[kind]; form != nil && text != "" {
		return form(text)
	}
	return text, ""
}

// plainText is a text without blanks around it, in NFC (UAX #15): what looks the same is the same.
func plainText(text string) string { return norm.NFC.String(strings.TrimSpace(text)) }

// mailAddress returns an address as it is stored and compared, so that a mailbox has one. A mail can be sent to it if
// it is a bare addr-spec of RFC 5322 §3.4.1 without quotes, ASCII before the @ as Keycloak wants it, and a dot in its
// domain. Else it comes back as it is.
func mailAddress(text string) (normal, wrong string) {
	local, domain, _ := strings.Cut(text, "@")
	domain, err := mailDomain(domain)
	normal = local + "@" + domain
	a, parseErr := mail.ParseAddress(normal)
	foreign := strings.ContainsFunc(local, func(r rune) bool { return r > unicode.MaxASCII })
	if err != nil || parseErr != nil || a.Address != normal || a.Name != "" || strings.ContainsAny(normal, "\" ()[]") ||
		foreign || !utf8.ValidString(text) || len(local) > 64 ||
		!strings.Contains(domain, ".") || strings.HasSuffix(domain, ".") {
		return text, "is not a valid e-mail address"
	}
	return normal, ""
}

// mailDomain is a domain as an A-label in lower case (IDNA2008, RFC 5891 §5): full width letters are mapped, soft
// hyphens are dropped.
func mailDomain(text string) (string, error) { return lookup.ToASCII(text) }

// lookup is idna.Lookup that knows how long a name of DNS may be.
var lookup = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.VerifyDNSLength(true))

// login is what people sign in with: their address, or their username as it was registered.
func login(text string) (normal, wrong string) {
	if strings.Contains(text, "@") {
		normal, _ = mailAddress(text)
	} else if mapped, err := precis.UsernameCaseMapped.String(text); err == nil {
		return mapped, ""
	}
	return cmp.Or(normal, text), ""
}

// username finds the first letter that Keycloak refuses: all must be Latin, so that none looks like another's.
func username(text string) (normal, wrong string) {
	if strings.Contains(text, "@") { // the own address, see ownUsername
		return login(text)
	}
	for _, r := range text {
		if !unicode.In(r, unicode.Latin, unicode.Common) {
			return text, notAllowed(r)
		}
	}
	return text, ""
}

// notDialled is what people write into a phone number to read it more easily. (0) is dialled only without the
// country code.
var notDialled = regexp.MustCompile(`\(0\)|[\s\p{Z}\p{Pd}()./]`)

// phoneNumber is a number in the form of E.164.
func phoneNumber(text string) (normal, wrong string) {
	normal = notDialled.ReplaceAllString(text, "")
	for i, r := range normal {
		if (r < '0' || r > '9') && (r != '+' || i > 0) {
			return normal, notAllowed(r)
		}
	}
	if !dialled.MatchString(normal) {
		wrong = "is not a valid phone number; write it with the country code, like +4930123456"
	}
	return normal, wrong
}

var dialled = regexp.MustCompile(`^\+[1-9][0-9]{6,14}$`)

// decodeCookie gives the refresh tokens of the browser's cookies to an input that takes
// them, and says whether it is one that does. A browser sends cookies along for whoever
// asks it to; so one counts only if the request comes from an allowed origin (RFC 6454).
func (s *server) decodeCookie(r *http.Request, in any) (bool, error) {
	target, takes := in.(interface{ setCookies(tokens []string) })
	var tokens []string
	for _, cookie := range r.CookiesNamed(s.refreshCookie("", 0).Name) {
		if cookie.Value != "" && len(tokens) < cookiesTried {
			tokens = append(tokens, cookie.Value)
		}
	}
	switch {
	case !takes, len(tokens) == 0:
		return takes, nil
	case r.Header.Get("Origin") == "" && r.Header.Get("Sec-Fetch-Site") == "", s.origins.Check(r) != nil:
		return takes, problemForbidden.withDetail("The cookie counts only for requests from an allowed origin.")
	}
	target.setCookies(tokens)
	return takes, nil
}

func bodyError(err error) error {
	if errors.As(err, new(*http.MaxBytesError)) {
		return problemPayloadTooLarge
	}
	return problemInvalidRequest.withDetail("The request body could not be read.").withCause(err)
}

// pageIn asks for a page of a list (keyset paging).
type pageIn struct {
	Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50"`
	Cursor string `query:"cursor" maxLength:"200" pattern:"^[A-Za-z0-9_-]*$" mismatch:"is not the next_cursor of a page" description:"next_cursor of the page before."`
}

type listOut[T any] struct {
	Items      []T     `json:"items"`
	NextCursor *string `json:"next_cursor" nullable:"true" description:"null on the last page."`
}

// cursor is the last row of a page: the next one begins behind it. Lists run from the
// latest to the earliest.
type cursor struct {
	At time.Time
	ID string
}

// latest is before the first row of any list.
var latest = cursor{time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), ""}

// parseCursor reads a next_cursor; "" is the beginning.
func parseCursor(text string) (cursor, error) {
	if text == "" {
		return latest, nil
	}
	wrong := invalid(fieldError{"cursor", "is not the next_cursor of a page"})
	plain, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return cursor{}, wrong
	}
	at, id, _ := strings.Cut(string(plain), " ")
	micro, err := strconv.ParseInt(at, 10, 64)
	c := cursor{time.UnixMicro(micro).UTC(), id}
	if err != nil || !cursorID.MatchString(id) || c.At.Year() < 1 || c.At.Year() > 9999 { // for PostgreSQL
		return cursor{}, wrong
	}
	return c, nil
}

var cursorID = regexp.MustCompile(`^[A-Z]{3}-[A-Za-z0-9_-]{16}$`)

func (c cursor) String() string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s", c.At.UnixMicro(), c.ID))
}

// pageOf answers a list: fetch returns the rows behind the cursor, one more than the limit
// if there are more.
func pageOf[R, T any](in pageIn, fetch func(before cursor) ([]R, error), item func(R) (T, cursor)) (listOut[T], error) {
	before, err := parseCursor(in.Cursor)
	if err != nil {
		return listOut[T]{}, err
	}
	rows, err := fetch(before)
	out := listOut[T]{Items: []T{}}
	for i, row := range rows[:min(in.Limit, len(rows))] {
		t, at := item(row)
		out.Items = append(out.Items, t)
		if i == in.Limit-1 && len(rows) > in.Limit {
			next := at.String()
			out.NextCursor = &next
		}
	}
	return out, err
}

// invisible says what nobody types into a name: control characters, those that end a line or turn the
// direction of writing, the blank of no width, and what is no UTF-8.
func invisible(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Bidi_Control, unicode.Zl, unicode.Zp) ||
		r == '\u200b' || r == utf8.RuneError
}
