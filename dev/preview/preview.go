// Package preview shows every page and every mail with invented data, for those
// who work on them: the development stack serves it beside its inbox.
package preview

import (
	"bytes"
	"context"
	"html/template"
	"net/http"
	"slices"
	"time"

	"auth-service/templates"
)

var index = template.Must(template.New("index").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Previews</title>
<link rel="stylesheet" href="/static/style.css">
<body class="wide">
<main>
<h1>Previews</h1>
<h2>Mails</h2>
<p>Keycloak sends every mail, in each language, to invented people. They arrive in the <a href="/">inbox</a>.</p>
<form method="post" action="/preview/mails">
<button class="button primary">Send every mail</button>
</form>
<h2 class="note">Pages</h2>
<ul class="links">
{{range $sample := .Samples}}<li>{{.Name}}:{{range $.Languages}} <a href="/preview/{{$sample.Name}}?lang={{.}}">{{.}}</a>{{end}}</li>
{{end}}</ul>
</main>
</html>
`))

// Handler serves the list of previews at /preview, each page under it in the
// language of the browser or of ?lang=, and the style sheet, under the
// Content-Security-Policy of production. A button there calls sendMails.
func Handler(site *templates.Site, sendMails func(context.Context) error) http.Handler {
	samples := Samples()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /preview", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		index.Execute(w, map[string]any{"Samples": samples, "Languages": site.Codes()})
	})
	mux.HandleFunc("GET /preview/{name}", func(w http.ResponseWriter, r *http.Request) {
		i := slices.IndexFunc(samples, func(s Sample) bool { return s.Name == r.PathValue("name") })
		if i < 0 {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		language := site.Match(r.FormValue("lang"), r.Header.Get("Accept-Language"))
		if err := samples[i].Page.Render(site.Context(r.Context(), language, r), w); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /static/{name}", func(w http.ResponseWriter, r *http.Request) {
		asset := site.Assets[r.PathValue("name")]
		w.Header().Set("Content-Type", asset.Type)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(asset.Content))
	})
	mux.HandleFunc("POST /preview/mails", func(w http.ResponseWriter, r *http.Request) {
		if err := sendMails(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		http.Redirect(w, r, "/", http.StatusSeeOther)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", templates.Policy)
		mux.ServeHTTP(w, r)
	})
}
