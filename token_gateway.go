package main

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

const (
	validatePath = "/api/v1/auth/validate"
	envoyPath    = "/api/v1/auth/ext-authz/" // below validate, validate/?role=admin would come to it and require nothing
)

// validateIn documents what a gateway may demand; validate reads it itself.
type validateIn struct {
	Roles     []string `query:"role" items.enum:"user,admin,partner,operator" description:"user, operator, partner or admin; repeated: any of them."`
	NetworkID string   `query:"network_id" description:"The token's scope must have this network."`
	StationID string   `query:"station_id" description:"The token's scope must have this station."`
}

type validateOut struct {
	UserID    userID `header:"X-Auth-User-Id,omitempty" json:"-" example:"USR-V1StGXR8_Z5jdHi6"`
	Subject   string `header:"X-Auth-Subject,omitempty" json:"-" description:"Keycloak's id of the user."`
	Roles     string `header:"X-Auth-Roles,omitempty" json:"-" example:"user" description:"Comma separated."`
	NetworkID string `header:"X-Auth-Network-Id,omitempty" json:"-" description:"Empty: none."`
	StationID string `header:"X-Auth-Station-Id,omitempty" json:"-" description:"Empty: none."`
}

// validateOp is what the document says of validate.
func validateOp() operation {
	return operation{"Signing in", validateIn{}, validateOut{}, 200, []problem{problemForbidden}, nil}
}

// gateway answers gateways, and hands on what people and their browsers ask for. It stands before the policies of
// pages, CORS and the mux: they cost more than the whole check, and a gateway throws away what they answer.
func (s *server) gateway(next http.Handler) http.Handler {
	check := s.withRequest(sentID, s.withLog(http.HandlerFunc(s.validate)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch path := r.URL.Path; {
		case path == validatePath:
			r.Pattern = validatePath
		case strings.HasPrefix(path, envoyPath): // Envoy appends the path of the request that it asks about; it is
			r.Pattern, r.URL.RawQuery = envoyPath, "" // the client's, as are the method and the query: they demand nothing
		default:
			next.ServeHTTP(w, r)
			return
		}
		check.ServeHTTP(w, r)
	})
}

// identityHeaders are what validateOut documents.
var identityHeaders = []string{"X-Auth-User-Id", "X-Auth-Subject", "X-Auth-Roles", "X-Auth-Network-Id",
	"X-Auth-Station-Id"}

// validate tells a gateway whether a token may pass, from memory alone: it asks neither PostgreSQL nor Keycloak.
func (s *server) validate(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h["Cache-Control"] = noStore
	if r.Pattern == validatePath && r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		s.writeProblem(w, r, problemMethodNotAllowed)
		return
	}
	p, err := s.bearer(r)
	if err == nil && r.URL.RawQuery != "" {
		required, unreadable := url.ParseQuery(r.URL.RawQuery)
		if err = p.satisfies(required); unreadable != nil { // a part of it may be readable, and the demand another
			err = invalid(fieldError{"query", "can't be read"})
		}
	}
	if err != nil {
		s.writeProblem(w, r, err)
		return
	}
	identity := []string{string(p.UserID), p.Subject, strings.Join(p.Roles, ","), p.NetworkID, p.StationID}
	for i, name := range identityHeaders {
		h[name] = identity[i : i+1 : i+1]
	}
} // 200 without a body is what net/http makes of it

// satisfies checks a gateway's required role and scope. A requirement that nobody knows is the gateway's mistake, and
// must not be one that everybody satisfies.
func (p principal) satisfies(required url.Values) error {
	var wrong []fieldError
	unknown := func(role string) bool { return !slices.Contains(roles, role) }
	for name, values := range required {
		switch {
		case !slices.Contains([]string{"role", "network_id", "station_id"}, name):
			wrong = append(wrong, fieldError{cmp.Or(name, "request"), "is not known"})
		case name == "role" && slices.ContainsFunc(values, unknown):
			wrong = append(wrong, fieldError{name, "is not a role"})
		}
	}
	if len(wrong) > 0 {
		slices.SortFunc(wrong, func(a, b fieldError) int { return strings.Compare(a.Field, b.Field) })
		return invalid(wrong...)
	}
	// A partner has every station of its network. Of a station alone nobody can tell whose it is.
	whole := p.is(rolePartner) && required.Has("network_id")
	otherNetwork := func(id string) bool { return id == "" || id != p.NetworkID } // nobody is in the empty one
	otherStation := func(id string) bool { return id == "" || id != p.StationID && !whole }
	refused := problemForbidden.withChallenge("insufficient_scope")
	switch wanted := required["role"]; {
	case len(wanted) > 0 && !slices.ContainsFunc(wanted, p.is):
		return refused
	case p.is(roleAdmin):
		return nil
	case slices.ContainsFunc(required["network_id"], otherNetwork),
		slices.ContainsFunc(required["station_id"], otherStation):
		return refused
	}
	return nil
}
