package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/swaggest/jsonschema-go"
	"github.com/swaggest/openapi-go"
	"github.com/swaggest/openapi-go/openapi31"
	collector "github.com/swaggest/rest/openapi"
	"github.com/swaggest/swgui"
	"github.com/swaggest/swgui/v5emb"
)

// document makes the OpenAPI 3.1 document of the routes, once, at the start.
func document(routes []route) ([]byte, error) {
	reflector := openapi31.NewReflector()
	reflector.Spec.Info.WithTitle("Registration and tokens in front of Keycloak").WithVersion("1").
		WithDescription("People register, confirm their e-mail address and sign in; gateways ask whether a token may pass; " +
			"administrators manage users. Errors are application/problem+json (RFC 9457).")
	reflector.Spec.SetHTTPBearerTokenSecurity("bearerAuth", "JWT", "An access token of the realm.")
	reflector.DefaultOptions = append(reflector.DefaultOptions,
		jsonschema.InterceptProp(required), jsonschema.InterceptSchema(strict),
		jsonschema.InterceptDefName(func(t reflect.Type, _ string) string {
			name := t.Name()
			if list, of, generic := strings.Cut(strings.TrimSuffix(name, "]"), "["); generic {
				name = of[strings.LastIndex(of, ".")+1:] + list // listOut[auth-service.session]
			}
			return strings.ToUpper(name[:1]) + name[1:]
		}))
	docs := collector.NewCollector(reflector)
	for _, rt := range routes {
		if rt.Summary == "" {
			continue
		}
		method, path, _ := strings.Cut(rt.Pattern, " ")
		if err := docs.CollectOperation(method, path, rt.describe); err != nil {
			return nil, err
		}
	}
	return json.MarshalIndent(reflector.Spec, "", "  ")
}

// required lists what is always there: what encoding/json does not omit.
func required(p jsonschema.InterceptPropParams) error {
	if name, options, _ := strings.Cut(p.Field.Tag.Get("json"), ","); p.Processed && name != "" && options == "" &&
		!slices.Contains(p.ParentSchema.Required, p.Name) {
		p.ParentSchema.Required = append(p.ParentSchema.Required, p.Name)
	}
	return nil
}

// strict says of inputs what readJSON does: an unknown member is an error.
func strict(p jsonschema.InterceptSchemaParams) (bool, error) {
	if p.Processed && strings.HasSuffix(p.Value.Type().Name(), "In") {
		p.Schema.WithAdditionalProperties(*(&jsonschema.SchemaOrBool{}).WithTypeBoolean(false))
	}
	return false, nil
}

// describe tells the document about a route: input, answer, and each problem that
// it may answer, by status.
func (rt route) describe(oc openapi.OperationContext) error {
	oc.SetID(rt.Name)
	oc.SetTags(rt.Tag)
	oc.SetSummary(rt.Summary)
	if rt.Aliases != "" {
		oc.SetDescription("Also at " + strings.Join(strings.Fields(rt.Aliases), " and ") + ".")
	}
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
		return nil
	}
	problems := append([]problem{problemInvalidRequest, problemInternal}, rt.problems...)
	if problems = append(problems, problemUnavailable); rt.Limit.N > 0 {
		problems = append(problems, problemTooManyRequests)
	}
	if rt.Access == signedIn || rt.Name == "validate" {
		oc.AddSecurity("bearerAuth")
		problems = append(problems, problemUnauthorized)
	}
	if oc.Method() == "post" || oc.Method() == "patch" {
		problems = append(problems, problemPayloadTooLarge, problemUnsupportedMediaType)
	}
	byStatus := map[int][]string{}
	for _, p := range problems {
		byStatus[p.Status] = append(byStatus[p.Status], p.slug())
	}
	for status, slugs := range byStatus {
		oc.AddRespStructure(problem{}, openapi.WithHTTPStatus(status),
			openapi.WithContentType("application/problem+json"),
			func(cu *openapi.ContentUnit) { cu.Description = strings.Join(slugs, ", ") })
	}
	return nil
}

// openAPI serves the document.
func (s *server) openAPI(w http.ResponseWriter, r *http.Request) {
	sum := sha256.Sum256(s.openAPIDocument)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "public, max-age=60")
	w.Header().Set("ETag", `"`+base64.RawURLEncoding.EncodeToString(sum[:12])+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.openAPIDocument))
}

// swaggerUI serves Swagger UI under a policy that allows its two inline elements
// by their hashes and nothing else inline.
func swaggerUI() http.HandlerFunc {
	ui := v5emb.NewHandlerWithConfig(swgui.Config{
		Title: "API", SwaggerJSON: "/api-docs/openapi.json", BasePath: "/swagger-ui/"})
	index := recorder{header: http.Header{}}
	request, err := http.NewRequestWithContext(context.Background(), "GET", "/swagger-ui/", nil)
	if err != nil {
		panic(err)
	}
	ui.ServeHTTP(&index, request)
	hashes := func(element string) (all string) {
		for _, m := range regexp.MustCompile(`(?s)<`+element+`>(.*?)</`+element+`>`).FindAllSubmatch(index.Bytes(), -1) {
			sum := sha256.Sum256(m[1])
			all += " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
		}
		return all
	}
	policy := fmt.Sprintf("default-src 'none'; script-src 'self'%s; style-src 'self'%s; img-src 'self' data:; "+
		"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", hashes("script"), hashes("style"))
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		ui.ServeHTTP(w, r)
	}
}
