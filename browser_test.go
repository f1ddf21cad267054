package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"auth-service/dev/preview"
	"auth-service/dev/stack"

	"github.com/chromedp/cdproto/emulation"
	cdpnetwork "github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
)

// The pages in a real Chromium, as a person uses them: with the mails that
// Keycloak has sent, without any script, on a phone and on a desk, by day and by
// night. To see them:
//
//	go test -run Browser -screenshots /tmp/screenshots

var screenshots = flag.String("screenshots", "", "directory that the browser tests write a picture of every page to")

func TestBrowser(t *testing.T) {
	t.Parallel() // it waits for a browser
	if testing.Short() {
		t.Skip("starts a browser")
	}
	port := fmt.Sprint(stack.FreePort()) // known before the start, since the mail's link begins with it
	elsewhere := httptest.NewUnstartedServer(nil)
	_, otherPort, _ := net.SplitHostPort(elsewhere.Listener.Addr().String())
	frontend := "http://localhost:" + otherPort
	w := newEnv(t, map[string]string{
		"SERVER_PORT": port, "PUBLIC_URL": "http://localhost:" + port, "CORS_ALLOWED_ORIGINS": frontend})
	chrome := startChromium(t, chromedp.Flag("host-resolver-rules", "MAP accounts.test:80 127.0.0.1:"+port))
	elsewhere.Config.Handler = w.otherSite()
	elsewhere.Start()
	t.Cleanup(elsewhere.Close)
	audited := new(sync.Map)
	w.sendPreviews()
	for _, scenario := range []struct {
		name, language string
		play           func(*browser)
	}{
		{"Link", "en", scenarioLink}, {"German", "de", scenarioGerman}, {"Code", "en", scenarioCode},
		{"TooManyCodes", "en", scenarioTooManyCodes}, {"Invitation", "en", scenarioInvitation},
		{"Scanner", "en", scenarioScanner}, {"WeakPassword", "en", scenarioWeakPassword},
		{"SentTwice", "en", scenarioSentTwice}, {"PasswordByMail", "en", scenarioPasswordByMail},
		{"Resend", "en", scenarioResend}, {"Cancel", "en", scenarioCancel}, {"Expired", "en", scenarioExpired},
		{"Mistakes", "en", scenarioMistakes}, {"Unavailable", "en", scenarioUnavailable},
		{"Elsewhere", "en", scenarioElsewhere}, {"SwaggerUI", "en", scenarioSwaggerUI},
		{"Frontend", "en", scenarioFrontend}, {"SPA", "en", scenarioSPA}, {"Passkey", "en", scenarioPasskey},
		{"KeycloakPages", "en", scenarioKeycloakPages}, {"OneTimeCode", "en", scenarioOneTimeCode},
		{"SignInMistakes", "en", scenarioSignInMistakes},
		{"SignInMistakesInGerman", "de", scenarioSignInMistakes},
		{"Samples", "en", scenarioSamples}, {"SamplesInGerman", "de", scenarioSamples},
		{"SamplesInArabic", "ar", scenarioSamples},
	} {
		t.Run(scenario.name, func(t *testing.T) {
			if strings.HasPrefix(scenario.name, "Samples") {
				t.Parallel() // they don't meet the service
			}
			b := &browser{env: new(*w), elsewhere: elsewhere.URL, frontend: frontend, language: scenario.language,
				audited: audited}
			b.TB = t
			b.openTab(chrome)
			scenario.play(b)
		})
	}
}

// startChromium starts a browser with a profile of its own.
func startChromium(t *testing.T, more ...chromedp.ExecAllocatorOption) context.Context {
	path, err := stack.FindOrInstallChromium(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.DisableGPU,
		chromedp.UserDataDir(t.TempDir()), chromedp.Flag("disable-component-update", true))
	options = append(options, more...)
	if os.Getuid() == 0 {
		options = append(options, chromedp.NoSandbox)
	}
	allocator, end := chromedp.NewExecAllocator(context.WithoutCancel(t.Context()), options...)
	chrome, closeChrome := chromedp.NewContext(allocator)
	t.Cleanup(func() { closeChrome(); end() })
	if err := chromedp.Do(chrome); err != nil {
		t.Fatal(err)
	}
	return chrome
}

// axeVersion of axe-core finds what people with disabilities would stumble over.
const axeVersion = "4.14.1"

// axe returns the source of axe-core, which npm fetches once.
func (b *browser) axe() string {
	dir := filepath.Join(services.Dir, "npm", "axe-core-"+axeVersion)
	file := filepath.Join(dir, "node_modules", "axe-core", "axe.min.js")
	if _, err := os.Stat(file); err != nil {
		npm, err := stack.FindOrInstall(b.Context(), nil, stack.NPM)
		b.must(err)
		cmd := exec.Command(npm[0], "install", "--no-package-lock", "--no-save", "--no-audit", "--no-fund",
			"--prefix", dir, "axe-core@"+axeVersion)
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("npm: %v\n%s", err, out)
		}
	}
	source, err := os.ReadFile(file)
	b.must(err)
	return string(source)
}

// otherSite is everything that is not the service: the person's mail reader, a
// site with a form that is sent to the service, a frontend, and the samples of the pages.
func (w *env) otherSite() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", withSecurityHeaders(false, preview.Handler(site, nil)))
	mux.HandleFunc("GET /mail/{to}", func(rw http.ResponseWriter, r *http.Request) {
		all := w.mail.To(r.PathValue("to"))
		rw.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(rw, all[len(all)-1].HTML)
	})
	mux.HandleFunc("GET /form", func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, `<!doctype html><form method="post" action="%s/account/register">
			<input name="email" value="victim@example.test"><button>Win</button></form>`, w.vars["PUBLIC_URL"])
	})
	for path, name := range map[string]string{"/spa/{$}": "index.html", "/spa/app.js": "app.js"} {
		mux.HandleFunc("GET "+path, func(rw http.ResponseWriter, r *http.Request) {
			file, _ := os.ReadFile("examples/spa/" + name)
			file = bytes.ReplaceAll(file, []byte("http://localhost:3000"), []byte(w.vars["PUBLIC_URL"]))
			http.ServeContent(rw, r, name, time.Time{}, bytes.NewReader(file))
		})
	}
	mux.HandleFunc("GET /app", func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, `<!doctype html><title>App</title><h1>App</h1>
			<a href="%[1]s/auth/login?return_to=%[2]s">Sign in</a><script>
			async function ask(method, path, token) {
				const headers = token ? {Authorization: "Bearer " + token} : {}
				const answer = await fetch("%[1]s/api/v1/auth/" + path, {method, headers, credentials: "include"})
				return {...await answer.json().catch(() => ({})), status: answer.status}
			}</script>`, w.vars["PUBLIC_URL"], url.QueryEscape("http://"+r.Host+"/app?back"))
	})
	return mux
}

// browser is one tab, in which a person uses the service.
type browser struct {
	*env
	elsewhere string // address of otherSite
	frontend  string // its other address: an origin that is allowed
	language  string
	ctx       context.Context
	pages     int       // looked at so far
	audited   *sync.Map // pages that need not be looked at again, of all tabs
}

// openTab opens a tab with cookies of its own, whose pages can't run scripts.
func (b *browser) openTab(chrome context.Context) {
	tab, closeTab := chromedp.NewContext(chrome, chromedp.WithNewBrowserContext())
	b.Cleanup(closeTab)
	b.must(chromedp.Do(tab))
	var cancel context.CancelFunc
	b.ctx, cancel = context.WithTimeout(tab, 5*time.Minute) // the samples are many
	b.Cleanup(cancel)
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders, cdpnetwork.SetExtraHTTPHeadersParams{
		Headers: cdpnetwork.Headers{"Accept-Language": b.language, "X-Forwarded-For": privateAddress()}})
	b.must(err)
	b.scripts(false)
}

func (b *browser) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *browser) scripts(allowed bool) {
	_, err := chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled,
		emulation.SetScriptExecutionDisabledParams{Value: !allowed})
	b.must(err)
}

func evaluate[T any](b *browser, expression string) T {
	b.Helper()
	value, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	b.must(err)
	return value
}

// open opens a page of the service, or of elsewhere, and looks at it.
func (b *browser) open(url string, status int, heading string, texts ...string) {
	b.Helper()
	if strings.HasPrefix(url, "/") {
		url = b.vars["PUBLIC_URL"] + url
	}
	b.arrive(chromedp.Navigate(url), status, heading, texts...)
	b.audit("")
}

// press presses the button or link with this label, and looks at where it leads.
func (b *browser) press(label string, status int, heading string, texts ...string) {
	b.Helper()
	b.arrive(chromedp.Click(labelled(label)), status, heading, texts...)
	b.audit("")
}

func labelled(label string) chromedp.Search {
	return chromedp.Search(fmt.Sprintf(`//*[self::a or self::button][normalize-space(.)=%q]`, label))
}

// anything is a heading that need not be known.
const anything = "*"

// arrive takes a step to another page and checks that it has this status, this
// heading and, somewhere, these texts.
func (b *browser) arrive(step chromedp.Action[chromedp.Void], status int, heading string, texts ...string) {
	b.Helper()
	response, err := chromedp.RunResponse(b.ctx, step)
	if err != nil {
		b.Fatalf("on the way to %q: %v", heading, err)
	}
	seen := evaluate[struct{ H1, Text string }](b,
		`({H1: document.querySelector("h1")?.innerText ?? "", Text: document.body.innerText})`)
	if int(response.Status) != status || (seen.H1 != heading && heading != anything) {
		b.Fatalf("got %d %q, want %d %q:\n%s", response.Status, seen.H1, status, heading, seen.Text)
	}
	for _, text := range texts {
		if !strings.Contains(seen.Text, text) {
			b.Errorf("%q does not say %q:\n%s", heading, text, seen.Text)
		}
	}
}

// fill types into the inputs with these names.
func (b *browser) fill(namesAndValues ...string) {
	b.Helper()
	for pair := range slices.Chunk(namesAndValues, 2) {
		field := chromedp.CSS("[name=" + pair[0] + "]")
		b.must(chromedp.Do(b.ctx, chromedp.WaitVisible(field)))
		evaluate[string](b, `document.querySelector("[name=`+pair[0]+`]").value = ""`)
		b.must(chromedp.Do(b.ctx, chromedp.SendKeys(field, pair[1])))
	}
}

// has checks what the inputs with these names have in them.
func (b *browser) has(namesAndValues ...string) {
	b.Helper()
	for pair := range slices.Chunk(namesAndValues, 2) {
		if got := evaluate[string](b, `document.querySelector("[name=`+pair[0]+`]").value`); got != pair[1] {
			b.Errorf("%s is %q, want %q", pair[0], got, pair[1])
		}
	}
}

// audit looks at the page, unless one with the same title and as many elements was
// looked at before. rules limits it to some of axe-core's rules.
func (b *browser) audit(rules string) {
	b.Helper()
	key := b.language + evaluate[string](b, `document.title + document.querySelectorAll("*").length`)
	if _, known := b.audited.LoadOrStore(key, true); !known {
		b.look(rules)
	}
}

// look looks at the page at the width of a phone and of a desk, in the light and
// in the dark scheme (in English; colours have no language): nothing sticks out,
// and axe-core has no objection.
func (b *browser) look(rules string) {
	b.Helper()
	b.pages++
	b.scripts(true)
	defer b.scripts(false)
	evaluate[chromedp.Void](b, b.axe())
	onlyColours := `runOnly: {type: "rule", values: ["color-contrast"]}`
	inScheme := map[string]string{"light": rules, "dark": onlyColours}
	if b.language != "en" {
		delete(inScheme, "dark")
	}
	for _, width := range []int64{320, 1280} {
		for scheme, rules := range inScheme {
			b.must(chromedp.Do(b.ctx, chromedp.EmulateViewport(width, 800)))
			_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
				Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
			b.must(err)
			b.photograph(fmt.Sprintf("%d-%s", width, scheme))
			for _, objection := range evaluate[[]string](b, `(async () => {
				const found = await axe.run({resultTypes: ["violations"], `+rules+`})
				const list = found.violations.map(v => v.help + ": " + v.nodes.map(n => n.html + " " + n.failureSummary).join("; "))
				const root = document.documentElement
				if (root.scrollWidth > root.clientWidth) list.push("it is " + root.scrollWidth + " wide")
				return list
			})()`) {
				b.Errorf("page %d, %d px, %s: %s", b.pages, width, scheme, objection)
			}
		}
	}
}

// photograph writes a picture of the page, if asked for.
func (b *browser) photograph(view string) {
	if *screenshots == "" {
		return
	}
	picture, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	b.must(err)
	b.must(os.MkdirAll(*screenshots, 0o755))
	name := fmt.Sprintf("%s-%02d-%s.png", filepath.Base(b.Name()), b.pages, view)
	b.must(os.WriteFile(filepath.Join(*screenshots, name), picture, 0o644))
}

// registers fills in the form at /account/register, and sends it.
func (b *browser) registers(email string) {
	b.Helper()
	b.open("/account/register", 200, "Create an account")
	b.fill("email", email)
	b.press("Create an account", 200, "Look into your mailbox", email)
}

// confirms chooses the password on the page that the mail's link, or the code, has led to.
func (b *browser) confirms(email string) {
	b.Helper()
	b.fill("password", password)
	b.press("Confirm this address", 200, "Your address is confirmed", "You can sign in now.")
}

// opensDetails opens what is behind the form's summary, and looks at it.
func (b *browser) opensDetails() {
	b.Helper()
	b.must(chromedp.Do(b.ctx, chromedp.Click(chromedp.CSS("summary"))))
	b.look("")
}

// mailRules are those of axe-core that a mail can follow; it has no landmarks.
const mailRules = `runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]`

// opensMail waits for the n-th mail to an address and opens it, as HTML.
func (b *browser) opensMail(email string, n int, heading string) link {
	b.Helper()
	l := b.readMail(email, n)
	b.arrive(chromedp.Navigate(b.elsewhere+"/mail/"+email), 200, heading, l.Code)
	b.audit(mailRules)
	return l
}
