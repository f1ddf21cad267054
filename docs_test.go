package main

import (
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// documents are README.md and the pages it leads to.
func documents(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, name := range append(names, "README.md") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(text)
	}
	return texts
}

// Every variable of the configuration is in README's table, with its default, and README
// and .env.example list the same ones.
func TestDocumentedConfiguration(t *testing.T) {
	rows := map[string]string{} // variable → its row
	for _, row := range regexp.MustCompile("(?m)^\\| `[A-Z].*$").FindAllString(documents(t)["README.md"], -1) {
		for _, name := range regexp.MustCompile("`([A-Z][A-Z_]+)`").FindAllStringSubmatch(strings.Split(row, "|")[1], -1) {
			rows[name[1]] = row
		}
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[config]()) {
		name, _, _ := strings.Cut(f.Tag.Get("env"), ",")
		if value := f.Tag.Get("envDefault"); name != "" && (rows[name] == "" || !strings.Contains(rows[name], value)) {
			t.Errorf("README.md lacks %s, or its default %q: %s", name, value, rows[name])
		}
	}
	example, err := os.ReadFile(".env.example")
	if err != nil {
		t.Fatal(err)
	}
	var listed, examples []string
	for name := range rows {
		listed = append(listed, name)
	}
	for _, m := range regexp.MustCompile(`(?m)^#?([A-Z_]+)=`).FindAllStringSubmatch(string(example), -1) {
		name := m[1]
		if rows[name] == "" { // a secret's file
			name = strings.TrimSuffix(name, "_FILE")
		}
		examples = append(examples, name)
	}
	slices.Sort(listed)
	slices.Sort(examples)
	if diff := cmp.Diff(listed, examples); diff != "" {
		t.Errorf("README.md and .env.example differ (-README +example):\n%s", diff)
	}
}

// Every link to a file or a heading of the documents leads somewhere.
func TestDocumentLinks(t *testing.T) {
	texts := documents(t)
	for name, text := range texts {
		for _, m := range regexp.MustCompile(`\]\(([^)#:]*)(?:#([^)]*))?\)`).FindAllStringSubmatch(text, -1) {
			target := name
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(name), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if m[2] != "" && !slices.Contains(anchors(texts[target]), m[2]) {
				t.Errorf("%s: %s has no heading #%s", name, target, m[2])
			}
		}
	}
}

// anchors are the headings of a document as links name them.
func anchors(text string) (all []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		plain := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(m[1]), "")
		all = append(all, strings.ReplaceAll(plain, " ", "-"))
	}
	return all
}

// The table of limits in docs/security.md is that of the program.
func TestDocumentedLimits(t *testing.T) {
	text, err := os.ReadFile("docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|[^|]+\\| (\\d+) \\| (\\S+) \\|").FindAllStringSubmatch(string(text), -1) {
		documented[row[1]] = row[2] + " in " + row[3]
	}
	want := map[string]string{mailsOfCooldown.Name: "1 in `RESEND_COOLDOWN`", resetOfCooldown.Name: "1 in `RESEND_COOLDOWN`"}
	for _, l := range limits {
		want[l.Name] = fmt.Sprintf("%d in %s", l.N, regexp.MustCompile(`(\D)0[ms].*`).ReplaceAllString(l.Window.String(), "$1"))
	}
	if diff := cmp.Diff(want, documented); diff != "" {
		t.Errorf("-program +documented\n%s", diff)
	}
}

// fenced is a block of a document and the line above it.
var fenced = regexp.MustCompile("(?ms)^([^\n]*)\n *```([a-z]*)\n(.*?)^ *```$")

// Every command of the documents runs, or a comment above it says why it is not run here. Those of one document run in
// one shell, with the program in the path, and with the addresses and the files of the test.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	w, dir := newEnv(t, nil), t.TempDir()
	if err := os.Symlink(program(t), dir+"/auth-service"); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	for name, value := range w.vars {
		env = append(env, name+"="+value)
	}
	inbox := httptest.NewServer(w.mail.Inbox())
	t.Cleanup(inbox.Close)
	here := strings.NewReplacer("localhost:3000", strings.TrimPrefix(w.url, "http://"),
		"localhost:8025", strings.TrimPrefix(inbox.URL, "http://"), "-admin-user admin", "-admin-user "+services.AdminUser,
		"/run/secrets/keycloak-admin", asAdmin(t, services.AdminUser, services.AdminPassword)[3])
	for name, text := range documents(t) {
		var script []string
		for _, block := range fenced.FindAllStringSubmatch(text, -1) {
			switch above, language := block[1], block[2]; {
			case language == "":
				t.Errorf("%s: a block says no language:\n%s", name, block[3])
			case language == "sh" && !regexp.MustCompile(`^ *<!-- not run: .+ -->$`).MatchString(above):
				script = append(script, here.Replace(block[3]))
			}
		}
		cmd := exec.CommandContext(t.Context(), "bash", "-euxo", "pipefail", "-c", strings.Join(script, "\n"))
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil || regexp.MustCompile(`(?m)^{"type":"/problems/`).Match(out) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
