package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/mail"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/swaggest/rest"
	"github.com/swaggest/rest/nethttp"
)

// decode reads path, query and body into in, and checks it. Every wrong field is
// named, all at once.
func (s *server) decode(w http.ResponseWriter, r *http.Request, params nethttp.RequestDecoder, in any) error {
	var wrong []fieldError
	if params != nil {
		if err := params.Decode(r, in, nil); err != nil {
			if wrong = unreadable(err); len(wrong) == 0 {
				return invalid().withCause(err)
			}
		}
		wrong = append(wrong, unknownParameters(r, in)...)
	}
	if takesCookie, err := s.decodeCookie(r, in); err != nil || takesCookie && r.ContentLength == 0 {
		return err // there or not, the cookie is all there is
	}
	if hasBody(r.Method, in) {
		if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
			return problemUnsupportedMediaType
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			return bodyError(err)
		}
		unknown, err := decodeJSON(body, in)
		if err != nil {
			return err
		}
		wrong = append(wrong, unknown...)
	}
	checked := checkFields(in, wrong)
	for _, f := range checked {
		if r.PathValue(f.Field) != "" {
			return problemNotFound // an id that nothing can have
		}
	}
	if wrong = append(wrong, checked...); len(wrong) > 0 {
		slices.SortFunc(wrong, func(a, b fieldError) int { return strings.Compare(a.Field, b.Field) })
		return invalid(wrong...)
	}
	return nil
}

// hasBody says whether a request has a JSON body that fills in.
func hasBody(method string, in any) bool {
	for _, f := range reflect.VisibleFields(reflect.TypeOf(in).Elem()) {
		if f.Tag.Get("json") != "" {
			return method == http.MethodPost || method == http.MethodPatch
		}
	}
	return false
}

// unreadable names the parameters that could not be read.
func unreadable(err error) (wrong []fieldError) {
	var request rest.RequestErrors
	if errors.As(err, &request) {
		for name := range request {
			_, name, _ = strings.Cut(name, ":")
			wrong = append(wrong, fieldError{name, "is not valid"})
		}
	}
	return wrong
}

// unknownParameters are those of the query that a list does not have, or that are there
// twice: a filter with a typo would show more than was asked for.
func unknownParameters(r *http.Request, in any) (wrong []fieldError) {
	if r.URL.RawQuery == "" {
		return nil
	}
	known := map[string]bool{}
	for name, f := range inputFields(in) {
		if f.tag.Get("query") != "" {
			known[name] = true
		}
	}
	for name, values := range r.URL.Query() {
		switch {
		case len(known) == 0: // takes none
		case !known[name] && len(name) > 50:
			wrong = append(wrong, fieldError{"", "has a parameter that is not known"})
		case !known[name]:
			wrong = append(wrong, fieldError{name, "is not known"})
		case len(values) > 1:
			wrong = append(wrong, fieldError{name, "is there twice"})
		}
	}
	return wrong
}

// decodeCookie gives the refresh token of the browser's cookie to an input that takes
// it, and says whether it is one that does. A browser sends cookies along for whoever
// asks it to; so one counts only if the request comes from an allowed origin (RFC 6454).
func (s *server) decodeCookie(r *http.Request, in any) (bool, error) {
	target, takes := in.(interface{ setCookie(token string) })
	cookie, err := r.Cookie(refreshCookie("", 0).Name)
	switch {
	case !takes, err != nil, cookie.Value == "":
		return takes, nil
	case r.Header.Get("Origin") == "" && r.Header.Get("Sec-Fetch-Site") == "", s.origins.Check(r) != nil:
		return takes, problemForbidden.withDetail("The cookie counts only for requests from an allowed origin.")
	}
	target.setCookie(cookie.Value)
	return takes, nil
}

func bodyError(err error) error {
	if errors.As(err, new(*http.MaxBytesError)) {
		return problemPayloadTooLarge
	}
	return problemInvalidRequest.withDetail("The request body could not be read.").withCause(err)
}

// decodeJSON fills in from a JSON object and returns the members that are unknown,
// are there twice, or have the wrong type. encoding/json itself would stop at the
// first, and takes "EMAIL" for "email".
func decodeJSON(body []byte, in any) ([]fieldError, error) {
	notJSON := problemInvalidRequest.withDetail("The request body must be one JSON object.")
	if !utf8.Valid(body) || !json.Valid(body) { // Valid refuses what follows the value, too
		return nil, notJSON
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, notJSON
	}
	fields := inputFields(in)
	seen := map[string]bool{}
	var wrong []fieldError
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, notJSON
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, notJSON
		}
		name := key.(string)
		f := fields[name]
		known := f.tag.Get("json") != "" // what path and query say is not the body's to change
		switch {
		case !known && len(name) > 50:
			wrong = append(wrong, fieldError{"", "has a field that is not known"})
		case !known:
			detail := "is not known"
			if hinted, ok := in.(interface{ hints() map[string]string }); ok {
				detail = cmp.Or(hinted.hints()[name], detail)
			}
			wrong = append(wrong, fieldError{name, detail})
		case seen[name]:
			wrong = append(wrong, fieldError{name, "is there twice"})
		case string(raw) == "null": // as if it were absent
		default:
			if json.Unmarshal(raw, f.value.Addr().Interface()) != nil {
				wrong = append(wrong, fieldError{name, "must be a " + strings.TrimPrefix(f.value.Type().String(), "*")})
			}
		}
		seen[name] = true
	}
	return wrong, nil
}

// inputField is a field of an operation's input: its value and its tags, which are
// both the rules that checkFields applies and what the OpenAPI document says.
type inputField struct {
	value reflect.Value
	tag   reflect.StructTag
}

func inputFields(in any) map[string]inputField {
	v := reflect.ValueOf(in).Elem()
	fields := map[string]inputField{}
	for _, f := range reflect.VisibleFields(v.Type()) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			fields[name] = inputField{v.FieldByIndex(f.Index), f.Tag}
		} else if name := f.Tag.Get("path") + f.Tag.Get("query"); name != "" {
			fields[name] = inputField{v.FieldByIndex(f.Index), f.Tag}
		}
	}
	return fields
}

// checkFields applies the rules of the tags to in, except to fields that are known to be
// wrong, and returns what is wrong, by field name.
func checkFields(in any, known []fieldError) []fieldError {
	var wrong []fieldError
	for name, f := range inputFields(in) {
		if slices.ContainsFunc(known, func(k fieldError) bool { return k.Field == name }) {
			continue
		}
		if f.value.CanInt() && f.tag.Get("maximum") != "" {
			least, _ := strconv.ParseInt(f.tag.Get("minimum"), 10, 64)
			most, _ := strconv.ParseInt(f.tag.Get("maximum"), 10, 64)
			if n := f.value.Int(); n < least || n > most {
				wrong = append(wrong, fieldError{name, fmt.Sprintf("must be from %d to %d", least, most)})
			}
		}
		cleared := false // not absent, but empty, where that is no choice
		if f.value.Kind() == reflect.Pointer && !f.value.IsNil() {
			f.value = f.value.Elem()
			cleared = f.value.Kind() == reflect.String && f.value.String() == "" && f.tag.Get("enum") != ""
		}
		if f.value.Kind() != reflect.String {
			continue
		}
		detail := checkString(f.value.String(), f.tag)
		if cleared {
			detail = oneOf(f.tag)
		}
		if detail != "" {
			wrong = append(wrong, fieldError{name, detail})
		}
	}
	slices.SortFunc(wrong, func(a, b fieldError) int { return strings.Compare(a.Field, b.Field) })
	return wrong
}

func checkString(value string, tag reflect.StructTag) string {
	least, _ := strconv.Atoi(tag.Get("minLength"))
	most, err := strconv.Atoi(tag.Get("maxLength"))
	if err != nil {
		most = maxBody
	}
	length := utf8.RuneCountInString(value)
	switch {
	case value == "" && tag.Get("required") == "true":
		return "is required"
	case value == "":
		return ""
	case length < least:
		return fmt.Sprintf("must have at least %d characters", least)
	case length > most:
		return fmt.Sprintf("must have at most %d characters", most)
	case tag.Get("format") == "email" && !validEmail(value):
		return "is not a valid e-mail address"
	case tag.Get("format") != "password" && (!utf8.ValidString(value) || strings.ContainsFunc(value, invisible)):
		return "has a character that is not allowed"
	}
	if enum := strings.Split(tag.Get("enum"), ","); enum[0] != "" && !slices.Contains(enum, value) {
		return oneOf(tag)
	}
	if pattern := tag.Get("pattern"); pattern != "" && !regexp.MustCompile(pattern).MatchString(value) {
		if detail := tag.Get("mismatch"); detail != "" {
			return detail
		}
		return "has a character that is not allowed"
	}
	return ""
}

func oneOf(tag reflect.StructTag) string {
	return "must be one of " + strings.ReplaceAll(tag.Get("enum"), ",", ", ")
}

// pageIn asks for a page of a list (keyset paging).
type pageIn struct {
	Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50"`
	Cursor string `query:"cursor" maxLength:"200" description:"next_cursor of the page before."`
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

// parseCursor reads a next_cursor; "" is the beginning.
func parseCursor(text string) (cursor, error) {
	if text == "" {
		return cursor{time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), ""}, nil
	}
	wrong := invalid(fieldError{"cursor", "is not the next_cursor of a page"})
	plain, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return cursor{}, wrong
	}
	at, id, _ := strings.Cut(string(plain), " ")
	micro, err := strconv.ParseInt(at, 10, 64)
	c := cursor{time.UnixMicro(micro).UTC(), id}
	if err != nil || !cursorID.MatchString(id) || c.At.Year() < 1 || c.At.Year() > 9999 { // which PostgreSQL would not take
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
	if err != nil {
		return listOut[T]{}, err
	}
	out := listOut[T]{Items: []T{}}
	for i, row := range rows[:min(in.Limit, len(rows))] {
		t, at := item(row)
		out.Items = append(out.Items, t)
		if i == in.Limit-1 && len(rows) > in.Limit {
			next := at.String()
			out.NextCursor = &next
		}
	}
	return out, nil
}

// invisible says what nobody types into a name: control characters, those that turn
// the direction of writing, and the blank of no width.
func invisible(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u200b'
}

// validEmail says whether an address is one that a mail can be sent to: a bare
// addr-spec of RFC 5322 §3.4.1 without quotes, ASCII before the @ as Keycloak wants
// it, and a dot in its domain.
func validEmail(email string) bool {
	a, err := mail.ParseAddress(email)
	if err != nil || a.Address != email || a.Name != "" || strings.ContainsAny(email, "\" ()[]") {
		return false
	}
	local, domain, _ := strings.Cut(email, "@")
	ascii := !strings.ContainsFunc(local, func(r rune) bool { return r > unicode.MaxASCII })
	return ascii && len(local) <= 64 && strings.Contains(domain, ".") && !strings.HasSuffix(domain, ".")
}
