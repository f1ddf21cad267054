package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"auth-service/templates"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/swaggest/jsonschema-go"
	"github.com/swaggest/openapi-go"
	"github.com/swaggest/openapi-go/openapi31"
	collector "github.com/swaggest/rest/openapi"
	"github.com/swaggest/swgui/v5/static"
	"github.com/vearutop/statigz"
)

// openAPIProse is what the routes and their types do not say: descriptions, headers, links. It is a
// JSON Merge Patch (RFC 7396) of the document.
//
//go:embed openapi_prose.json
var openAPIProse []byte

// document makes the OpenAPI 3.1 document of the routes.
func document(cfg config, routes []route) ([]byte, error) {
	reflector := openapi31.NewReflector()
	spec := reflector.Spec
	spec.Info.WithVersion(version()).WithContact(*(&openapi31.Contact{}).WithURL(cfg.PublicURL))
	spec.WithServers(*(&openapi31.Server{}).WithURL(cfg.PublicURL))
	spec.SetHTTPBearerTokenSecurity("bearerAuth", "JWT", "An access token of the realm.")
	spec.ComponentsEns().WithSchemasItem("Role", map[string]any{"type": "string", "enum": roles})
	security := []map[string][]string{{"bearerAuth": {}}}
	if cfg.AuthClientSecret == "" { // else nobody but this service may redeem a code
		security = append(security, map[string][]string{"keycloak": {"openid"}})
		oidc := cfg.issuer() + "/protocol/openid-connect/"
		flow := openapi31.OauthFlowsDefsAuthorizationCode{AuthorizationURL: oidc + "auth", TokenURL: oidc + "token",
			Scopes: map[string]string{"openid": "Sign in"}}
		spec.ComponentsEns().WithSecuritySchemesItem("keycloak", openapi31.SecuritySchemeOrReference{
			SecurityScheme: (&openapi31.SecurityScheme{}).WithOauth2(openapi31.SecuritySchemeOauth2{
				Flows: openapi31.OauthFlows{AuthorizationCode: &flow}}).WithDescription("Signs in at Keycloak, with PKCE.")})
	}
	reflector.DefaultOptions = append(reflector.DefaultOptions, jsonschema.InterceptDefName(schemaName),
		jsonschema.InterceptProp(describeField), jsonschema.InterceptSchema(describeInput),
		jsonschema.InterceptNullability(func(p jsonschema.InterceptNullabilityParams) {
			if kind := p.Type.Kind(); p.NullAdded && (kind == reflect.Slice || kind == reflect.Map) {
				p.Schema.RemoveType(jsonschema.Null) // an empty one is written
			}
		}))
	docs := collector.NewCollector(reflector)
	for _, rt := range routes {
		if rt.Summary == "" {
			continue
		}
		method, path, _ := strings.Cut(rt.Pattern, " ")
		err := docs.CollectOperation(method, path, rt.describe)
		if err == nil {
			err = spec.SetupOperation(method, path, func(op *openapi31.Operation) error {
				rt.finish(op, spec.Components, security)
				return nil
			})
		}
		if err != nil {
			return nil, err
		}
	}
	plain, err := json.Marshal(spec)
	if err == nil {
		plain, err = jsonpatch.MergePatch(plain, openAPIProse)
	}
	var sorted any
	if err == nil {
		err = json.Unmarshal(plain, &sorted)
	}
	if err != nil {
		return nil, err
	}
	return json.MarshalIndent(sorted, "", "  ")
}

// schemaName is the name of a Go type in the document: registerIn is RegisterRequest, listOut[user] UserPage.
func schemaName(t reflect.Type, _ string) string {
	name := t.Name()
	if _, of, generic := strings.Cut(strings.TrimSuffix(name, "]"), "["); generic {
		name = of[strings.LastIndex(of, ".")+1:] + "Page"
	}
	for suffix, plain := range map[string]string{"In": "Request", "Out": "Result"} {
		if short, ok := strings.CutSuffix(name, suffix); ok {
			name = short + plain
		}
	}
	return strings.ToUpper(name[:1]) + name[1:]
}

// describeField lists what is always there, as encoding/json does not omit it, what may not be empty, and roles.
func describeField(p jsonschema.InterceptPropParams) error {
	name, options, _ := strings.Cut(p.Field.Tag.Get("json"), ",")
	if !p.Processed || name == "" {
		return nil
	}
	if options == "" && !slices.Contains(p.ParentSchema.Required, p.Name) {
		p.ParentSchema.Required = append(p.ParentSchema.Required, p.Name)
	}
	if p.Name == "role" {
		p.PropertySchema.WithRef("#/components/schemas/Role").Type, p.PropertySchema.Enum = nil, nil
	}
	if s := p.PropertySchema; p.Field.Tag.Get("required") == "true" && s.HasType(jsonschema.String) && s.MinLength == 0 {
		s.WithMinLength(1)
	}
	return nil
}

// describeInput says of inputs what readJSON does, an unknown member is an error, and which fields may stand
// for others.
func describeInput(p jsonschema.InterceptSchemaParams) (bool, error) {
	if !p.Processed || !strings.HasSuffix(p.Value.Type().Name(), "In") {
		return false, nil
	}
	p.Schema.WithAdditionalProperties(*(&jsonschema.SchemaOrBool{}).WithTypeBoolean(false))
	if in, ok := p.Value.Interface().(interface{ either() [][]string }); ok {
		for _, fields := range in.either() {
			p.Schema.OneOf = append(p.Schema.OneOf, (&jsonschema.Schema{}).WithRequired(fields...).ToSchemaOrBool())
		}
	}
	return false, nil
}

// Enum lists the types that a problem may have.
func (problemType) Enum() (types []any) {
	for _, slug := range slices.Sorted(maps.Keys(problems)) {
		types = append(types, problems[slug].Type)
	}
	return types
}

// problemsByStatus are the problems that the route may answer.
func (rt route) problemsByStatus() map[int][]problem {
	all := append([]problem{problemInternal}, rt.problems...)
	if rt.Name != "health" { // its 503 is an answer like the others
		all = append(all, problemUnavailable)
	}
	if rt.Limit.N > 0 {
		all = append(all, problemTooManyRequests)
	}
	if rt.needsToken() {
		all = append(all, problemUnauthorized)
	}
	takes := inputOf(reflect.New(reflect.TypeOf(rt.in)).Interface()).takes
	if takes["json"] || takes["query"] {
		all = append(all, problemInvalidRequest)
	}
	if takes["json"] {
		all = append(all, problemPayloadTooLarge, problemUnsupportedMediaType)
	}
	byStatus := map[int][]problem{}
	for _, p := range all {
		byStatus[p.Status] = append(byStatus[p.Status], p)
	}
	return byStatus
}

func (rt route) needsToken() bool { return rt.Access == signedIn || rt.Name == "validate" }

// describe tells the document about a route: input, answer, and each problem by status.
func (rt route) describe(oc openapi.OperationContext) error {
	oc.SetID(rt.Name)
	oc.SetTags(rt.Tag)
	oc.SetSummary(rt.Summary)
	oc.AddReqStructure(rt.in, openapi.WithCustomize(func(cor openapi.ContentOrReference) {
		if body, ok := cor.(*openapi31.RequestBodyOrReference); ok && body.RequestBody != nil {
			_, optional := rt.in.(refreshIn) // the cookie instead
			body.RequestBody.WithRequired(!optional)
		}
	}))
	if _, empty := rt.out.(noContent); empty {
		rt.out = nil
	}
	oc.AddRespStructure(rt.out, openapi.WithHTTPStatus(rt.status))
	if rt.Name == "health" {
		oc.AddRespStructure(rt.out, openapi.WithHTTPStatus(http.StatusServiceUnavailable))
	}
	oc.AddRespStructure(problem{}, openapi.WithContentType(problemContent),
		func(cu *openapi.ContentUnit) { cu.IsDefault, cu.Description = true, "Any other problem." })
	for status, some := range rt.problemsByStatus() {
		var slugs []string
		for _, p := range some {
			slugs = append(slugs, p.slug())
		}
		oc.AddRespStructure(problem{}, openapi.WithContentType(problemContent), openapi.WithHTTPStatus(status),
			func(cu *openapi.ContentUnit) { cu.Description = strings.Join(slugs, ", ") })
	}
	return nil
}

const problemContent = "application/problem+json"

// finish gives an operation what openapi.OperationContext does not know: the headers of its answers, an example of
// each problem, and which tokens it takes, if any.
func (rt route) finish(op *openapi31.Operation, shared *openapi31.Components, security []map[string][]string) {
	op.MapOfAnything = nil // x-forbid-unknown-…, which no tool knows
	if op.Security = security; !rt.needsToken() {
		op.Security = []map[string][]string{{}}
	}
	problems := rt.problemsByStatus()
	for status, answer := range op.Responses.MapOfResponseOrReferenceValues {
		content, refused := answer.Response.Content[problemContent]
		names := []string{"X-Request-Id"}
		switch _, located := rt.out.(interface{ location() string }); {
		case status == "401":
			names = append(names, "WWW-Authenticate")
		case refused && (status == "429" || status == "503"):
			names = append(names, "Retry-After")
		case status < "300" && located:
			names = append(names, "Location")
		}
		for _, name := range names {
			answer.Response.WithHeadersItem(name, openapi31.HeaderOrReference{
				Reference: &openapi31.Reference{Ref: "#/components/headers/" + name}})
		}
		if !refused {
			continue
		}
		n, _ := strconv.Atoi(status)
		for _, p := range problems[n] {
			p.RequestID = "V1StGXR8_Z5jdHi6B-myT"
			if p.slug() == problemInvalidRequest.slug() {
				p.Errors = []fieldError{{"email", "is required"}}
			}
			shared.WithExamplesItem(p.slug(), openapi31.ExampleOrReference{Example: (&openapi31.Example{}).WithValue(p)})
			content.WithExamplesItem(p.slug(), openapi31.ExampleOrReference{
				Reference: &openapi31.Reference{Ref: "#/components/examples/" + p.slug()}})
		}
		answer.Response.Content[problemContent] = content
	}
}

// openAPI serves the document.
func (s *server) openAPI(w http.ResponseWriter, r *http.Request) {
	doc, err := s.openAPIDocument()
	if err != nil {
		s.writeProblem(w, r, err)
		return
	}
	sum := sha256.Sum256(doc)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "public, max-age=60")
	w.Header().Set("ETag", `"`+base64.RawURLEncoding.EncodeToString(sum[:12])+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(doc))
}

// swaggerUI serves Swagger UI under a policy that allows its inline elements by their hashes and nothing else
// inline. The pages are ours: that of swgui needs html/template, which makes the binary larger by a fifth, since the
// linker can't tell any more which methods are used; and its page after a sign-in lacks its script.
func swaggerUI(cfg config) http.HandlerFunc {
	var page, afterSignIn bytes.Buffer
	_ = templates.SwaggerUI(cfg.AuthClientID).Render(context.Background(), &page) // into memory
	_ = templates.SwaggerUIAfterSignIn().Render(context.Background(), &afterSignIn)
	files := http.StripPrefix("/swagger-ui/", statigz.FileServer(static.FS))
	hashes := func(element string) (all string) {
		inline := regexp.MustCompile(`(?s)<` + element + `>(.*?)</` + element + `>`)
		for _, m := range inline.FindAllStringSubmatch(page.String()+afterSignIn.String(), -1) {
			sum := sha256.Sum256([]byte(m[1]))
			all += " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
		}
		return all
	}
	policy := fmt.Sprintf("default-src 'none'; script-src 'self'%s; style-src 'self'%s; img-src 'self' data:; "+
		"connect-src 'self' %s; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		hashes("script"), hashes("style"), origin(cfg.KeycloakPublicURL))
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Cross-Origin-Opener-Policy", "unsafe-none") // the window of the sign-in hands over the code
		switch r.URL.Path {
		case "/swagger-ui", "/swagger-ui/":
			respond(w, http.StatusOK, "text/html; charset=utf-8", page.Bytes())
		case "/swagger-ui/oauth2-redirect.html":
			respond(w, http.StatusOK, "text/html; charset=utf-8", afterSignIn.Bytes())
		default:
			files.ServeHTTP(w, r)
		}
	}
}
