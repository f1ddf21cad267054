package main

import (
	"fmt"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"

	"auth-service/dev/preview"

	cdpnetwork "github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
)

// What people do in the browser of browser_test.go.

func scenarioWithPassword(b *browser) {
	email := newEmail()
	b.open("/", 200, "Welcome")
	b.press("Create an account", 200, "Create an account")
	b.fill("email", email, "username", email[:8], "first_name", "Ada", "last_name", "O'Neil", "phone", "+4930123456", "password", password)
	b.press("Create an account", 201, "Look into your mailbox", email)
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.wants(b.login(email, password), 403, "account-not-verified")
	b.press("Confirm e-mail address", 200, "Confirm your e-mail address", email)
	b.wants(b.login(email, password), 403, "account-not-verified") // a GET changes nothing
	b.press("Confirm this address", 200, "Your address is confirmed", email, "You can sign in now.")
	b.wants(b.login(email, password), 200, "")
	b.open(l.URL, 200, "Already confirmed", email)
}

func scenarioWithoutPassword(b *browser) {
	email := newEmail()
	b.registers(email, "")
	b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Confirm e-mail address", 200, "Confirm your e-mail address", email)
	b.press("Confirm this address", 200, "Your address is confirmed", email, "Choose a password now")
	b.choosesPassword("Choose your password", "Your password is set")
	b.wants(b.login(email, password), 200, "")
}

// choosesPassword follows a link to Keycloak's own pages, chooses a password there
// and comes back. These pages are used, not judged; they like to have scripts.
func (b *browser) choosesPassword(label, done string) {
	b.Helper()
	b.scripts(true)
	b.arrive(chromedp.Click(labelled(label)), 200, anything)
	b.photograph("keycloak-1")
	b.arrive(chromedp.Click(chromedp.CSS("#kc-info-message a")), 200, anything)
	b.fill("password-new", password, "password-confirm", password)
	b.photograph("keycloak-2")
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 200, anything)
	b.scripts(false)
	b.arrive(chromedp.Click(chromedp.CSS("#kc-info-message a")), 200, done)
	b.audit("")
}

func scenarioCode(b *browser) {
	email := newEmail()
	b.registers(email, password)
	code := b.readMail(email, 1).Code
	b.press("Enter the code", 200, "Enter your code")
	b.has("email", email)
	b.fill("code", "12345")
	b.press("Confirm this address", 400, "Enter your code", "That did not work", "Code must be six digits")
	b.fill("code", otherCode(code))
	b.press("Confirm this address", 400, "Enter your code", "The e-mail address or the code is wrong.")
	b.has("email", email, "code", "")
	b.fill("code", code[:3]+" "+code[3:])
	b.press("Confirm this address", 200, "Your address is confirmed", email)
	b.wants(b.login(email, password), 200, "")

	email = newEmail()
	b.registers(email, password)
	l := b.readMail(email, 1)
	for range codeAttempts {
		b.wants(b.post("/api/v1/register/verify", map[string]any{"email": email, "code": otherCode(l.Code)}), 400, "invalid-code")
	}
	b.press("Enter the code", 200, "Enter your code")
	b.fill("code", l.Code)
	b.press("Confirm this address", 429, "Too many attempts", "The link in the mail still works")
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.press("Confirm this address", 200, "Your address is confirmed")
}

// otherCode is a code that is not this one.
func otherCode(code string) string { return string('0'+(code[0]-'0'+1)%10) + code[1:] }

func scenarioResend(b *browser) {
	email := newEmail()
	b.registers(email, password)
	first := b.readMail(email, 1)
	b.press("Send the mail again", 200, "Send the mail again")
	b.press("Send again", 429, "Too soon", "Please wait")
	b.minuteLater(email)
	b.open("/account/resend?email="+email, 200, "Send the mail again")
	b.press("Send again", 200, "A new mail is on its way", email)
	second := b.opensMail(email, 2, "Confirm your e‑mail address")
	if second.URL != first.URL || second.Code == first.Code {
		b.Errorf("the second mail has %v after %v", second, first)
	}
	b.press(b.vars["PUBLIC_URL"]+"/account/verify", 200, "Enter your code")
	b.fill("email", email, "code", second.Code)
	b.press("Confirm this address", 200, "Your address is confirmed", email)

	b.open("/account/resend", 200, "Send the mail again")
	b.press("Send again", 400, "Send the mail again", "E-mail address is required")
	b.fill("email", email)
	b.press("Send again", 409, "Already confirmed")
	b.open("/account/resend?email="+newEmail(), 200, "Send the mail again")
	b.press("Send again", 404, "No registration")
}

func scenarioCancel(b *browser) {
	email := newEmail()
	b.registers(email, password)
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Delete this registration now", 200, "You did not register?", email)
	b.wants(b.login(email, password), 403, "account-not-verified") // a GET changes nothing
	b.press("Delete the registration", 200, "Registration deleted")
	b.wants(b.login(email, password), 401, "invalid-credentials")
	b.open(l.URL, 410, "Registration cancelled")
	b.press("Register again", 200, "Create an account")
	b.minuteLater(email)
	b.registers(email, password) // the address is free again
	b.open(b.readMail(email, 2).URL, 200, "Confirm your e-mail address")
	b.press("This was not me", 200, "You did not register?", email)
}

func scenarioExpired(b *browser) {
	email := newEmail()
	b.registers(email, password)
	l := b.readMail(email, 1)
	b.open(l.URL, 200, "Confirm your e-mail address", email)
	b.expire(email)
	b.press("Confirm this address", 410, "Verification expired")
	b.open(l.URL, 410, "Verification expired")
	b.press("Register again", 200, "Create an account")
}

func scenarioMistakes(b *browser) {
	email := newEmail()
	b.account(email)
	b.open("/account/register", 200, "Create an account")
	b.fill("email", "ada@", "username", "a", "first_name", "Ada", "phone", "030 12345", "password", "Tr0ub4dor")
	b.press("Create an account", 400, "Create an account", "That did not work", "E-mail address is not a valid e-mail address",
		"User name must have at least 3 characters", "Phone number is not a valid phone number; write it with the country code")
	b.has("email", "ada@", "username", "a", "first_name", "Ada", "phone", "03012345", "password", "")
	if active := evaluate[string](b, "document.activeElement.className"); active != "summary" {
		b.Errorf("the focus is on %q instead of the summary of the mistakes", active)
	}
	b.fill("email", newEmail(), "username", "", "phone", "+49 30 123456", "password", "short")
	b.press("Create an account", 400, "Create an account", "Password must have at least 8 characters") // Keycloak's policy
	b.fill("email", strings.ToUpper(email), "password", password)
	b.press("Create an account", 409, "Create an account", "exists already")
}

func scenarioUnavailable(b *browser) {
	email := newEmail()
	b.registers(email, password)
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address", email)
	b.kc.close()
	b.press("Confirm this address", 503, "Temporarily unavailable", "Nothing is lost", "Request id")
	b.must(b.kc.open())
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address", email)
	b.press("Confirm this address", 200, "Your address is confirmed", email)
}

// scenarioElsewhere arrives by links that are wrong and from places that are not ours.
func scenarioElsewhere(b *browser) {
	b.arrive(chromedp.Navigate(b.elsewhere+"/form"), 200, "")
	b.press("Win", 403, "Not allowed")
	if n := len(b.mail.To("victim@example.test")); n > 0 {
		b.Errorf("the form of another site has made %d mails", n)
	}
	b.open("/account/verify?token=rubbish", 400, "Invalid link")
	b.open("/account/cancel", 400, "Invalid link")
	b.open("/problems/user-exists", 200, "Account exists", "application/problem+json")
	b.open("/problems/no-such-problem", 404, "Not found")
	b.arrive(chromedp.Navigate(b.vars["PUBLIC_URL"]+"/no-such-page"), 404, "", "/problems/not-found")
}

func scenarioGerman(b *browser) {
	email := newEmail()
	b.open("/", 200, "Willkommen")
	b.press("Konto anlegen", 200, "Konto anlegen")
	b.fill("email", "ada")
	b.press("Konto anlegen", 400, "Konto anlegen", "E-Mail-Adresse ist keine gültige E-Mail-Adresse")
	b.fill("email", email)
	b.press("Konto anlegen", 201, "Sehen Sie in Ihr Postfach", email)
	code := b.opensMail(email, 1, "Bestätigen Sie Ihre E‑Mail-Adresse").Code
	b.press("E-Mail-Adresse bestätigen", 200, "E-Mail-Adresse bestätigen", email)
	b.open("/account/verify?email="+email, 200, "Code eingeben")
	b.fill("code", code)
	b.press("Diese Adresse bestätigen", 200, "Ihre Adresse ist bestätigt", "Wir haben Ihnen noch eine E-Mail gesendet.")
	_, err := b.mail.WaitFor(b.ctx, email, 2)
	b.must(err)
	b.arrive(chromedp.Navigate(b.elsewhere+"/mail/"+email), 200, "Passwort wählen")
	b.audit(mailRules)
	b.choosesPassword("Passwort wählen", "Ihr Passwort ist gesetzt")
	b.wants(b.login(email, password), 200, "")
}

// signsIn fills in Keycloak's page, which needs no scripts and is not ours to judge.
func (b *browser) signsIn(email, heading string, texts ...string) {
	b.Helper()
	b.photograph("keycloak")
	b.fill("username", email, "password", password)
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 200, heading, texts...)
}

// scenarioFrontend goes from the confirmed address to a frontend that is signed in.
func scenarioFrontend(b *browser) {
	email := newEmail()
	b.registers(email, password)
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address", email)
	b.press("Confirm this address", 200, "Your address is confirmed", email)
	b.arrive(chromedp.Click(labelled("Sign in")), 200, anything)
	b.signsIn(email, "You are signed in")
	b.audit("")

	type answer struct {
		Status int
		Token  string `json:"access_token"`
		Email  string
	}
	ask := func(format string, args ...any) answer {
		b.Helper()
		return evaluate[answer](b, fmt.Sprintf("ask("+format+").catch(() => ({status: 0}))", args...)) // 0: the browser does not tell
	}
	at := func(url string) {
		b.Helper()
		if got := evaluate[string](b, "location.href"); got != url {
			b.Errorf("the browser is at %s, not %s", got, url)
		}
	}
	b.scripts(true)
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders, cdpnetwork.SetExtraHTTPHeadersParams{Headers: cdpnetwork.Headers{}}) // CORS would ask for them
	b.must(err)
	b.arrive(chromedp.Navigate(b.frontend+"/app"), 200, "App")
	b.arrive(chromedp.Click(labelled("Sign in")), 200, "App") // Keycloak knows the browser
	at(b.frontend + "/app?back")
	first := ask(`"POST", "refresh"`)
	if me := ask(`"GET", "me", %q`, first.Token); first.Status != 200 || me.Status != 200 || me.Email != email {
		b.Errorf("refresh %v, me %v", first, me)
	}
	if hidden := evaluate[string](b, "document.cookie"); hidden != "" {
		b.Errorf("scripts see %s", hidden)
	}

	// Another port is the same site, so the cookie goes along; the origin is not listed.
	stranger := httptest.NewServer(b.otherSite())
	defer stranger.Close()
	origin := strings.Replace(stranger.URL, "127.0.0.1", "localhost", 1)
	b.arrive(chromedp.Navigate(origin+"/app"), 200, "App")
	for _, theft := range []string{`"POST", "refresh"`, `"POST", "logout"`, `"GET", "me", ` + strconv.Quote(first.Token)} {
		if got := ask("%s", theft); got.Status != 0 {
			b.Errorf("a stranger reads %v", got)
		}
	}
	if n := b.value(`select count(*)::text from audit_log where reason = 'forbidden' and action in ('refresh', 'logout')`); n != "2" {
		b.Errorf("%s requests of the stranger were refused", n)
	}
	b.arrive(chromedp.Click(labelled("Sign in")), 400, "Invalid request", "return_to must be a path of this site")

	b.arrive(chromedp.Navigate(b.frontend+"/app"), 200, "App")
	if got := ask(`"POST", "refresh"`); got.Status != 200 { // the stranger has ended nothing
		b.Errorf("refresh: %v", got)
	}
	if out, after := ask(`"POST", "logout"`), ask(`"POST", "refresh"`); out.Status != 204 || after.Status/100 != 4 {
		b.Errorf("logout %v, and after it %v", out, after)
	}
	b.arrive(chromedp.Click(labelled("Sign in")), 200, anything)
	b.signsIn(email, "App") // the password is asked for again
	at(b.frontend + "/app?back")
}

// scenarioSignInMistakes comes back from Keycloak without having signed in.
func scenarioSignInMistakes(b *browser) {
	said := map[string][]string{
		"en": {"Sign-in not completed", "The sign-in was cancelled.", "This sign-in is over already.", "This sign-in took too long.",
			"This sign-in was not begun in this browser.", "Sign in", "Account disabled", "You are signed in"},
		"de": {"Anmeldung nicht abgeschlossen", "Die Anmeldung wurde abgebrochen.", "Diese Anmeldung ist schon abgeschlossen.",
			"Diese Anmeldung hat zu lange gedauert.", "Diese Anmeldung wurde nicht in diesem Browser begonnen.", "Anmelden", "Konto gesperrt", "Sie sind angemeldet"},
	}[b.language]
	title, cancelled, over, late, foreign, signIn, disabled, signedIn := said[0], said[1], said[2], said[3], said[4], said[5], said[6], said[7]
	email := newEmail()
	b.account(email)
	b.arrive(chromedp.Navigate(b.vars["PUBLIC_URL"]+"/auth/login"), 200, anything)
	state := evaluate[string](b, `new URL(location.href).searchParams.get("state")`)
	back := "/auth/callback?error=access_denied&state="
	b.open(back+state, 400, title, cancelled)
	b.open(back+state, 400, title, over)
	b.open(back+"x"+state, 400, title, foreign)
	cookies, err := chromedp.Call(b.ctx, cdpnetwork.GetCookies, cdpnetwork.GetCookiesParams{URLs: []string{b.vars["PUBLIC_URL"]}})
	b.must(err)
	b.open(back+newSignIn(cookies.Cookies[0].Value, "/account/signed-in", time.Now().Add(-time.Hour)).state, 400, title, late)
	b.arrive(chromedp.Click(labelled(signIn)), 200, anything)
	b.exec(`update users set is_active = false, deleted_at = now() where email = $1`, email)
	b.fill("username", email, "password", password)
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 403, disabled)
	b.audit("")
	b.exec(`update users set is_active = true, deleted_at = null where email = $1`, email)
	b.arrive(chromedp.Click(labelled(signIn)), 200, anything)
	b.signsIn(email, signedIn)
}

// scenarioSamples looks at every page in every state, and at every mail.
func scenarioSamples(b *browser) {
	for _, m := range preview.Mails {
		b.arrive(chromedp.Navigate(b.elsewhere+"/mail/"+m.Name+"."+b.language+"@example.test"), 200, anything)
		b.look(mailRules)
	}
	for _, sample := range preview.Samples() {
		b.arrive(chromedp.Navigate(b.elsewhere+"/preview/"+sample.Name), 200, anything)
		b.look("")
	}
}

// scenarioSwaggerUI tries an operation in Swagger UI, which needs its scripts.
func scenarioSwaggerUI(b *browser) {
	b.scripts(true)
	messages := chromedp.Console(b.ctx)
	health := `#operations-Service-health `
	if err := chromedp.Do(b.ctx, chromedp.EmulateViewport(1280, 1000), chromedp.Navigate(b.vars["PUBLIC_URL"]+"/swagger-ui"),
		chromedp.Click(chromedp.CSS(health+".opblock-summary-control")),
		chromedp.Click(chromedp.CSS(health+".try-out__btn")),
		chromedp.Click(chromedp.CSS(health+".execute")),
		chromedp.WaitVisible(chromedp.CSS(health+".live-responses-table .response-col_status"))); err != nil {
		b.Fatal(err)
	}
	b.photograph("1280")
	if got := evaluate[string](b, `document.querySelector("`+health+`.live-responses-table tbody .response-col_status").innerText`); !strings.HasPrefix(got, "200") {
		b.Errorf("the operation was answered with %q", got)
	}
	documented := 0
	for _, operations := range b.get("/api-docs/openapi.json").JSON["paths"].(map[string]any) {
		documented += len(operations.(map[string]any))
	}
	if listed := evaluate[int](b, `document.querySelectorAll(".opblock").length`); listed != documented {
		b.Errorf("it lists %d operations, the document has %d", listed, documented)
	}
	evaluate[chromedp.Void](b, `console.log("the end")`)
	for m, err := range messages {
		b.must(err)
		if m.Text == "the end" {
			break
		}
		b.Errorf("console: %s %s %s", m.Type, m.URL, m.Text)
	}
}
