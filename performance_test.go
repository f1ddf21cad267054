package main

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// What the requests of a person's way cost in round trips stands in docs/performance.md.
func TestRoundTrips(t *testing.T) {
	t.Parallel()
	w := uncheckedEnv(t, map[string]string{"JOB_INTERVAL": "0"})
	var mu sync.Mutex
	var trips [][]string
	w.pg.mu.Lock()
	w.pg.trips = func(statements []string) {
		mu.Lock()
		defer mu.Unlock()
		text := strings.Join(statements, "")
		ofConnection := text == "" || text == "show transaction_read_only" || text == "-- ping"
		if !ofConnection && !strings.Contains(text, "from revocations") { // which is polled
			trips = append(trips, statements)
		}
	}
	w.pg.mu.Unlock()
	var err error
	if w.url, err = w.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	documented := documents(t)["docs/performance.md"]
	count := func(name string, request func()) {
		mu.Lock()
		trips = nil
		mu.Unlock()
		calls := len(w.kc.called())
		request()
		mu.Lock()
		defer mu.Unlock()
		statements, text := 0, ""
		for _, trip := range trips {
			statements += len(trip)
			text += strings.Join(trip, "; ") + "\n"
		}
		var operations []string
		for _, call := range w.kc.called()[calls:] {
			operations = append(operations, strings.Fields(call)[0])
		}
		row := fmt.Sprintf("| %s | %d | %d | %s |", name, len(trips), statements, strings.Join(operations, ", "))
		if !strings.Contains(documented, row+"\n") {
			t.Errorf("docs/performance.md lacks %s\n%s", row, text)
		}
	}
	for _, first := range []bool{true, false} { // the first of each fetches tokens and keys, and prepares statements
		email, refreshToken := newEmail(), ""
		for _, step := range []struct {
			name string
			do   func()
		}{
			{"register", func() { w.register(email) }},
			{"verify, with a password", func() { w.confirms(w.readMail(email, 1)) }},
			{"login", func() { refreshToken = w.login(email, password).text("refresh_token") }},
			{"refresh", func() { w.wants(w.do(refreshing(refreshToken)), 200, "") }},
		} {
			if first {
				step.do()
			} else {
				count(step.name, step.do)
			}
		}
	}
}
