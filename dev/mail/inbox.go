package mail

import (
	_ "embed"
	"encoding/json"
	"html/template"
	"net/http"
	"slices"
	"strconv"
)

//go:embed inbox.html
var inboxHTML string

var inbox = template.Must(template.New("inbox").Parse(inboxHTML))

// frameRules let a mail's links open in a tab of their own, and nothing else:
// no script, no form.
const frameRules = "allow-popups allow-popups-to-escape-sandbox allow-top-navigation-by-user-activation"

// Inbox shows the mails in a browser, and as JSON at /api/messages?to=.
func (c *Catcher) Inbox() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		newest := c.Messages()
		slices.Reverse(newest)
		show(w, "list", newest)
	})
	mux.HandleFunc("GET /messages/{id}", c.one(func(w http.ResponseWriter, m Message) {
		show(w, "message", m)
	}))
	mux.HandleFunc("GET /messages/{id}/html", c.one(func(w http.ResponseWriter, m Message) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy",
			"default-src 'none'; style-src 'unsafe-inline'; img-src data: http: https:; sandbox "+frameRules)
		w.Write([]byte(`<base target="_blank">` + m.HTML))
	}))
	mux.HandleFunc("GET /messages/{id}/raw", c.one(func(w http.ResponseWriter, m Message) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Write(m.Raw)
	}))
	mux.HandleFunc("GET /api/messages", func(w http.ResponseWriter, r *http.Request) {
		newest := c.Messages()
		if to := r.FormValue("to"); to != "" {
			newest = c.To(to)
		}
		slices.Reverse(newest)
		w.Header().Set("Content-Type", "application/json")
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		out.Encode(newest)
	})
	return mux
}

// one answers with the message that the path names.
func (c *Catcher) one(answer func(http.ResponseWriter, Message)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, _ := strconv.Atoi(r.PathValue("id"))
		all := c.Messages()
		i := slices.IndexFunc(all, func(m Message) bool { return m.ID == id })
		if i < 0 {
			http.Error(w, "There is no such mail (any more).", http.StatusNotFound)
			return
		}
		answer(w, all[i])
	}
}

func show(w http.ResponseWriter, page string, data any) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; base-uri 'none'")
	inbox.ExecuteTemplate(w, page, data)
}
