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
{{range .}}<li><a href="/preview/{{.Name}}">{{.Name}}</a><a href="/preview/{{.Name}}?lang=de" lang="de">{{.Name}}, deutsch</a></li>
{{end}}</ul>
</main>
</html>
`))

// Handler serves the list of previews at /preview, each page under it in the
// language of the browser or of ?lang=, and the style sheet, under the
// Content-Security-Policy of production. A button there calls sendMails.
func Handler(sendMails func(context.Context) error) http.Handler {
	samples := Samples()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /preview", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		index.Execute(w, samples)
	})
	mux.HandleFunc("GET /preview/{name}", func(w http.ResponseWriter, r *http.Request) {
		i := slices.IndexFunc(samples, func(s Sample) bool { return s.Name == r.PathValue("name") })
		if i < 0 {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		language := templates.Language(r.Header.Get("Accept-Language"), r.FormValue("lang"))
		if err := samples[i].Page.Render(templates.WithLanguage(r.Context(), language), w); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /static/style.css", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "style.css", time.Time{}, bytes.NewReader(templates.Style))
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
