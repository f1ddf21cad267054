package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	if testing.Short() {
		t.Skip("starts a browser")
	}
	port := fmt.Sprint(stack.FreePort()) // known before the start, since the mail's link begins with it
	w := newWorld(t, map[string]string{"SERVER_PORT": port, "PUBLIC_URL": "http://localhost:" + port})
	chrome := startChromium(t)
	elsewhere := httptest.NewServer(w.otherSite())
	t.Cleanup(elsewhere.Close)
	for _, walk := range []struct {
		name, language string
		walk           func(*browser)
	}{
		{"WithPassword", "en", walkWithPassword},
		{"German", "de", walkInGerman},
		{"WithoutPassword", "en", walkWithoutPassword},
		{"WithoutPasswordByCode", "en", walkWithoutPasswordByCode},
		{"Code", "en", walkCode},
		{"Resend", "en", walkResend},
		{"Cancel", "en", walkCancel},
		{"Expired", "en", walkExpired},
		{"Mistakes", "en", walkMistakes},
		{"OtherSite", "en", walkOtherSite},
		{"Outage", "en", walkOutage},
		{"Samples", "en", walkSamples},
		{"SwaggerUI", "en", walkSwaggerUI},
	} {
		t.Run(walk.name, func(t *testing.T) {
			b := &browser{world: new(*w), elsewhere: elsewhere.URL, language: walk.language}
			b.TB = t
			b.openTab(chrome)
			walk.walk(b)
		})
	}
}

// startChromium starts a browser with a profile of its own.
func startChromium(t *testing.T) context.Context {
	path, err := stack.FindOrInstallChromium(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.DisableGPU,
		chromedp.UserDataDir(t.TempDir()), chromedp.Flag("disable-component-update", true))
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
	b.Helper()
	dir := filepath.Join(services.Dir, "npm", "axe-core-"+axeVersion)
	file := filepath.Join(dir, "node_modules", "axe-core", "axe.min.js")
	if _, err := os.Stat(file); err != nil {
		npm, err := stack.FindOrInstall(b.Context(), nil, stack.NPM)
		if err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command(npm[0], "install", "--no-package-lock", "--no-save", "--no-audit", "--no-fund", "--prefix", dir, "axe-core@"+axeVersion)
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("npm: %v\n%s", err, out)
		}
	}
	source, err := os.ReadFile(file)
	if err != nil {
		b.Fatal(err)
	}
	return string(source)
}

// otherSite is everything that is not the service: the person's mail reader, a
// site with a form that is sent to the service, and the samples of the pages.
func (w *world) otherSite() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", withSecurityHeaders(false, preview.Handler(nil)))
	mux.HandleFunc("GET /mail/{to}", func(rw http.ResponseWriter, r *http.Request) {
		all := w.mail.To(r.PathValue("to"))
		rw.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(rw, all[len(all)-1].HTML)
	})
	mux.HandleFunc("GET /form", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprintf(rw, `<form method="post" action="%s/account/register"><input name="email" value="victim@example.test"><button>Win</button></form>`,
			w.env["PUBLIC_URL"])
	})
	return mux
}

// browser is one tab, in which a person uses the service.
type browser struct {
	*world
	elsewhere string // address of otherSite
	language  string
	ctx       context.Context
	pages     int // seen so far
}

// openTab opens a tab with cookies of its own, whose pages can't run scripts.
func (b *browser) openTab(chrome context.Context) {
	tab, closeTab := chromedp.NewContext(chrome, chromedp.WithNewBrowserContext())
	b.Cleanup(closeTab)
	if err := chromedp.Do(tab); err != nil {
		b.Fatal(err)
	}
	var cancel context.CancelFunc
	b.ctx, cancel = context.WithTimeout(tab, time.Minute)
	b.Cleanup(cancel)
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders, cdpnetwork.SetExtraHTTPHeadersParams{
		Headers: cdpnetwork.Headers{"Accept-Language": b.language, "X-Forwarded-For": newAddress()}})
	if err != nil {
		b.Fatal(err)
	}
	b.scripts(false)
}

func (b *browser) scripts(allowed bool) {
	b.Helper()
	if _, err := chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: !allowed}); err != nil {
		b.Fatal(err)
	}
}

func evaluate[T any](b *browser, expression string) T {
	b.Helper()
	value, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.Fatal(err)
	}
	return value
}

// open opens a page of the service, or of elsewhere, and looks at it.
func (b *browser) open(url string, status int, heading string, texts ...string) {
	b.Helper()
	if strings.HasPrefix(url, "/") {
		url = b.env["PUBLIC_URL"] + url
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

// arrive takes a step to another page and checks that it has this status, this
// heading and, somewhere, these texts.
func (b *browser) arrive(step chromedp.Action[chromedp.Void], status int, heading string, texts ...string) {
	b.Helper()
	response, err := chromedp.RunResponse(b.ctx, step)
	if err != nil {
		b.Fatalf("on the way to %q: %v", heading, err)
	}
	seen := evaluate[struct{ H1, Text string }](b, `({H1: document.querySelector("h1")?.innerText ?? "", Text: document.body.innerText})`)
	if int(response.Status) != status || seen.H1 != heading {
		b.Fatalf("got %d %q, want %d %q:\n%s", response.Status, seen.H1, status, heading, seen.Text)
	}
	for _, text := range texts {
		if !strings.Contains(seen.Text, text) {
			b.Errorf("%q does not say %q:\n%s", heading, text, seen.Text)
		}
	}
}

func (b *browser) fill(name, value string) {
	b.Helper()
	field := chromedp.CSS("[name=" + name + "]")
	if err := chromedp.Do(b.ctx, chromedp.Clear(field), chromedp.SendKeys(field, value)); err != nil {
		b.Fatalf("filling in %s: %v", name, err)
	}
}

func (b *browser) value(name string) string {
	b.Helper()
	return evaluate[string](b, `document.querySelector("[name=`+name+`]").value`)
}

// audit looks at the page on a phone in the light scheme, and on a desk in the dark
// one: nothing sticks out, and axe-core has no objection. tags
// limits it to some of axe-core's rules.
func (b *browser) audit(tags string) {
	b.Helper()
	b.pages++
	b.scripts(true)
	defer b.scripts(false)
	evaluate[chromedp.Void](b, b.axe())
	for width, scheme := range map[int64]string{320: "light", 1280: "dark"} {
		if err := chromedp.Do(b.ctx, chromedp.EmulateViewport(width, 800)); err != nil {
			b.Fatal(err)
		}
		if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}}); err != nil {
			b.Fatal(err)
		}
		b.photograph(fmt.Sprintf("%d-%s", width, scheme))
		for _, objection := range evaluate[[]string](b, `(async () => {
			const found = await axe.run(`+tags+`)
			const list = found.violations.map(v => v.help + ": " + v.nodes.map(n => n.html + " " + n.failureSummary).join("; "))
			const root = document.documentElement
			if (root.scrollWidth > root.clientWidth) list.push("it is " + root.scrollWidth + " wide")
			return list
		})()`) {
			b.Errorf("page %d, %d px, %s: %s", b.pages, width, scheme, objection)
		}
	}
}

// photograph writes a picture of the page, if asked for.
func (b *browser) photograph(view string) {
	b.Helper()
	if *screenshots == "" {
		return
	}
	picture, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	if err == nil {
		err = os.MkdirAll(*screenshots, 0o755)
	}
	if err == nil {
		name := fmt.Sprintf("%s-%02d-%s.png", b.Name()[strings.LastIndex(b.Name(), "/")+1:], b.pages, view)
		err = os.WriteFile(filepath.Join(*screenshots, name), picture, 0o644)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// registers fills in the form at /account/register, and sends it.
func (b *browser) registers(email, password string) {
	b.Helper()
	b.open("/account/register", 200, "Create an account")
	b.fill("email", email)
	if password != "" {
		b.fill("password", password)
	}
	b.press("Create an account", 201, "Look into your mailbox", email)
}

// opensMail waits for the n-th mail to an address and opens it, as HTML.
func (b *browser) opensMail(email string, n int, heading string) link {
	b.Helper()
	l := b.readMail(email, n)
	b.arrive(chromedp.Navigate(b.elsewhere+"/mail/"+email), 200, heading, l.Code)
	b.audit(`{runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}`) // a mail has no landmarks
	return l
}

func walkWithPassword(b *browser) {
	email := newEmail()
	b.open("/", 200, "Welcome")
	b.press("Create an account", 200, "Create an account")
	b.fill("first_name", "Ada")
	b.registers(email, password)
	b.opensMail(email, 1, "Confirm your e‑mail address")
	b.wants(b.login(email, password), 403, "account-not-verified")
	b.press("Confirm e-mail address", 200, "Confirm your e-mail address", email)
	b.wants(b.login(email, password), 403, "account-not-verified") // a GET changes nothing
	b.press("Confirm this address", 200, "Your address is confirmed", email, "You can sign in now.")
	b.wants(b.login(email, password), 200, "")
	b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Confirm e-mail address", 200, "Already confirmed", email)
}
