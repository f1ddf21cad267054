package main

import (
	"context"
	"encoding/base32"
	"fmt"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"

	"auth-service/dev/preview"

	"github.com/chromedp/cdproto/cdp"
	cdpnetwork "github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/chromedp"
)

// What people do in the browser of browser_test.go.

// scenarioLink goes from the start page to the first sign-in.
func scenarioLink(b *browser) {
	email, username := newEmail(), newEmail()[:8]
	b.open("/", 200, "Welcome")
	b.press("Create an account", 200, "Create an account", "You choose your password later")
	b.opensDetails()
	b.fill("email", email, "first_name", "Adda", "last_name", "O'Neil", "phone", "+4930123456")
	b.press("Create an account", 200, "Look into your mailbox", email)
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Confirm e-mail address", 200, "Confirm your e-mail address", "At least", "Change your details")
	b.has("email", email, "password", "", "username", "", "first_name", "Adda", "last_name", "O'Neil",
		"phone", "+4930123456")
	b.unconfirmed(email) // a GET changes nothing
	b.opensDetails()
	b.fill("username", username, "first_name", "Ada")
	b.confirms(email)
	b.arrive(chromedp.Click(labelled("Sign in")), 200, anything)
	b.signsIn(username, "You are signed in")
	if name := b.value(`select first_name || ' ' || last_name from users where email = $1`, email); name != "Ada O'Neil" {
		b.Errorf("the name is %s", name)
	}
	b.open(l.URL, 200, "Already confirmed", email)
}

func scenarioCode(b *browser) {
	email := newEmail()
	b.registers(email)
	code := b.readMail(email, 1).Code
	b.press("Enter the code", 200, "Enter your code", "choose a password")
	b.has("email", email)
	b.fill("code", "12345")
	b.press("Confirm this address", 400, "Enter your code", "That did not work", "Code must be six digits",
		"Password is required")
	b.fill("code", otherCode(code), "password", password)
	b.press("Confirm this address", 400, "Enter your code", "The e-mail address or the code is wrong.")
	b.has("email", email, "code", "", "password", "")
	b.unconfirmed(email)
	b.opensDetails()
	b.fill("code", code[:3]+" "+code[3:], "first_name", "Ada")
	b.confirms(email)
	b.wants(b.login(email, password), 200, "")
	if name := b.value(`select first_name from users where email = $1`, email); name != "Ada" {
		b.Errorf("the name is %s", name)
	}
}

func scenarioTooManyCodes(b *browser) {
	email := newEmail()
	b.registers(email)
	l := b.readMail(email, 1)
	wrong := map[string]any{"email": email, "code": otherCode(l.Code)}
	for range codesTried.N {
		b.wants(b.post("/api/v1/register/verify", wrong), 400, "invalid-code")
	}
	b.press("Enter the code", 200, "Enter your code")
	b.fill("code", l.Code, "password", password)
	b.press("Confirm this address", 429, "Too many attempts", "The link in the mail still works")
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.confirms(email)
}

// otherCode is a code that is not this one.
func otherCode(code string) string { return string('0'+(code[0]-'0'+1)%10) + code[1:] }

// scenarioInvitation accepts one invitation, and declines another.
func scenarioInvitation(b *browser) {
	admin, email := b.admin(), newEmail()
	b.wants(admin.asks("POST", usersPath, body{"email": email, "first_name": "Ada",
		"role": "operator", "network_id": "N1", "station_id": "S1"}), 201, "")
	b.opensMail(email, 1, "You are invited")
	b.press("Accept the invitation", 200, "You are invited", "An account was prepared for this address.")
	b.has("email", email, "password", "", "first_name", "Ada")
	b.press("Accept the invitation", 400, "You are invited", "Password is required")
	b.unconfirmed(email)
	b.fill("password", password)
	b.press("Accept the invitation", 200, "Your address is confirmed")
	if u := b.testUser(email); u.Role != "operator" || u.FirstName != "Ada" {
		b.Errorf("who was invited is %+v", u.user)
	}

	email = newEmail()
	b.wants(admin.asks("POST", usersPath, body{"email": email}), 201, "")
	l := b.opensMail(email, 1, "You are invited")
	b.press("Decline the invitation now", 200, "You don't want this account?", email)
	b.unconfirmed(email)
	b.press("Decline the invitation", 200, "Deleted")
	b.open(l.URL, 410, "Registration cancelled")
}

// scenarioScanner opens a mail's link and presses the button, as scanners of mails do.
func scenarioScanner(b *browser) {
	email := newEmail()
	b.registers(email)
	l := b.readMail(email, 1)
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.press("Confirm this address", 400, "Confirm your e-mail address", "That did not work", "Password is required")
	b.submit("/account/verify", map[string]string{"token": l.Token}, 400, "Password is required")
	b.open("/account/verify?email="+email, 200, "Enter your code")
	b.fill("code", l.Code)
	b.press("Confirm this address", 400, "Enter your code", "Password is required")
	b.unconfirmed(email)
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.confirms(email)
}

func scenarioWeakPassword(b *browser) {
	email := newEmail()
	b.registers(email)
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address")
	b.opensDetails()
	b.fill("first_name", "Ada", "password", "short")
	b.press("Confirm this address", 400, "Confirm your e-mail address", "Password must have at least") // Keycloak's policy
	b.has("email", email, "password", "", "first_name", "Ada")
	b.fill("password", email)
	b.press("Confirm this address", 400, "Confirm your e-mail address", "Password must not be")
	b.unconfirmed(email)
	b.confirms(email)
	b.wants(b.login(email, password), 200, "")
}

// scenarioSentTwice sends each form a second time, which does no harm.
func scenarioSentTwice(b *browser) {
	email := newEmail()
	b.registers(email)
	l := b.readMail(email, 1)
	b.registers(email)
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.confirms(email)
	again := map[string]string{"token": l.Token, "password": "another " + password, "first_name": "Eve"}
	b.submit("/account/verify", again, 200, "Your address is confirmed")
	b.wants(b.login(email, password), 200, "") // with the first one
	if n := len(b.mail.To(email)); n != 1 {
		b.Errorf("%d mails", n)
	}
}

// scenarioPasswordByMail confirms without a password, as only an application can: Keycloak mails its own link.
func scenarioPasswordByMail(b *browser) {
	email := newEmail()
	b.registers(email)
	a := b.post("/api/v1/register/verify", map[string]any{"token": b.readMail(email, 1).Token})
	b.wants(a, 200, "")
	if a.JSON["set_password_mailed"] != true {
		b.Errorf("the answer is %v", a)
	}
	b.receive(email, 2)
	b.arrive(chromedp.Navigate(b.elsewhere+"/mail/"+email), 200, "Choose a password")
	b.audit(mailRules)
	b.choosesPassword("Choose password", "Your password is set")
	b.wants(b.login(email, password), 200, "")
}

// choosesPassword follows a link to Keycloak's own pages, chooses a password there
// and comes back. These pages like to have scripts.
func (b *browser) choosesPassword(label, done string) {
	b.Helper()
	b.scripts(true)
	b.arrive(chromedp.Click(labelled(label)), 200, anything)
	b.audit("")
	b.arrive(chromedp.Click(chromedp.CSS("#kc-info-message a")), 200, anything)
	b.look("")
	b.scripts(true)
	b.fill("password-new", password, "password-confirm", password)
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 200, anything)
	b.scripts(false)
	b.arrive(chromedp.Click(chromedp.CSS("#kc-info-message a")), 200, done)
	b.audit("")
}

func scenarioResend(b *browser) {
	email := newEmail()
	b.registers(email)
	first := b.readMail(email, 1)
	resend := func(email string) {
		b.Helper()
		b.open("/account/resend?email="+email, 200, "Send the mail again")
		b.press("Send again", 200, "Look into your mailbox", "If a registration is waiting for this address", email)
	}
	resend(email) // too soon
	b.minuteLater(email)
	resend(email)
	second := b.opensMail(email, 2, "Confirm your e‑mail address")
	if second.URL != first.URL || second.Code == first.Code {
		b.Errorf("the second mail has %v after %v", second, first)
	}
	b.press(b.vars["PUBLIC_URL"]+"/account/verify", 200, "Enter your code")
	b.fill("email", email, "code", second.Code)
	b.confirms(email)

	b.open("/account/resend", 200, "Send the mail again")
	b.press("Send again", 400, "Send the mail again", "E-mail address is required")
	stranger := newEmail()
	resend(email)    // confirmed by now
	resend(stranger) // never registered
	if n, none := len(b.mail.To(email)), len(b.mail.To(stranger)); n != 2 || none != 0 {
		b.Errorf("%d mails, and %d to a stranger", n, none)
	}
}

func scenarioCancel(b *browser) {
	email := newEmail()
	b.registers(email)
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Delete this registration now", 200, "You did not register?", email)
	b.unconfirmed(email) // a GET changes nothing
	b.press("Delete the registration", 200, "Deleted")
	b.wants(b.login(email, password), 401, "invalid-credentials")
	b.open(l.URL, 410, "Registration cancelled")
	b.press("Create an account", 200, "Create an account")
	b.minuteLater(email)
	b.registers(email) // the address is free again
	b.open(b.readMail(email, 2).URL, 200, "Confirm your e-mail address")
	b.press("This was not me", 200, "You did not register?", email)
}

func scenarioExpired(b *browser) {
	email := newEmail()
	b.registers(email)
	l := b.readMail(email, 1)
	b.open(l.URL, 200, "Confirm your e-mail address")
	b.expire(email)
	b.press("Confirm this address", 410, "Verification expired") // even without a password
	b.open(l.URL, 410, "Verification expired")
	b.press("Create an account", 200, "Create an account")
}

func scenarioMistakes(b *browser) {
	email := newEmail()
	b.account(email)
	b.open("/account/register", 200, "Create an account")
	b.opensDetails()
	b.fill("email", "ada@", "username", "a", "first_name", "Ada", "phone", "030 12345")
	b.press("Create an account", 400, "Create an account", "That did not work",
		"E-mail address is not a valid e-mail address", "User name must have at least 3 characters",
		"Phone number is not a valid phone number; write it with the country code")
	b.has("email", "ada@", "username", "a", "first_name", "Ada", "phone", "030 12345")
	if active := evaluate[string](b, "document.activeElement.className"); active != "summary" {
		b.Errorf("the focus is on %q instead of the summary of the mistakes", active)
	}
	b.fill("email", strings.ToUpper(email), "username", "", "phone", "+49 30 123456")
	b.press("Create an account", 409, "Create an account", "exists already")
}

func scenarioUnavailable(b *browser) {
	email := newEmail()
	b.registers(email)
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address")
	b.fill("password", password)
	b.kc.close()
	b.press("Confirm this address", 503, "Temporarily unavailable", "Nothing is lost", "Request id")
	b.must(b.kc.open())
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address")
	b.confirms(email)
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
	b.open("/no-such-page", 404, "Not found")
}

func scenarioGerman(b *browser) {
	email := newEmail()
	b.open("/", 200, "Willkommen")
	b.press("Konto anlegen", 200, "Konto anlegen", "Ihr Passwort wählen Sie später")
	b.fill("email", "ada")
	b.press("Konto anlegen", 400, "Konto anlegen", "E-Mail-Adresse ist keine gültige E-Mail-Adresse")
	b.fill("email", email)
	b.press("Konto anlegen", 200, "Sehen Sie in Ihr Postfach", email)
	b.opensMail(email, 1, "Bestätigen Sie Ihre E‑Mail-Adresse")
	b.press("E-Mail-Adresse bestätigen", 200, "E-Mail-Adresse bestätigen", "Ihre Angaben ändern")
	b.fill("password", "kurz")
	b.press("Diese Adresse bestätigen", 400, "E-Mail-Adresse bestätigen", "Passwort muss mindestens")
	b.fill("password", password)
	b.press("Diese Adresse bestätigen", 200, "Ihre Adresse ist bestätigt", "Sie können sich jetzt anmelden.")
	b.wants(b.login(email, password), 200, "")
}

// authorizes signs in at Keycloak, in the window that Swagger UI opens.
func (b *browser) authorizes() (email string) {
	email = newEmail()
	b.account(email)
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders, cdpnetwork.SetExtraHTTPHeadersParams{
		Headers: cdpnetwork.Headers{}}) // Keycloak's CORS knows no X-Forwarded-For
	b.must(err)
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	opened := chromedp.WaitNewTarget(ctx, func(info *target.Info) bool {
		return strings.Contains(info.URL, "/protocol/openid-connect/auth")
	})
	b.must(chromedp.Do(ctx,
		chromedp.Click(chromedp.CSS(".auth-wrapper .authorize")),
		chromedp.Click(chromedp.Search(`//*[@class="auth-container"][.//h4[contains(., "keycloak")]]//button[text()="Authorize"]`))))
	window, closeWindow := chromedp.NewContext(ctx, chromedp.WithTargetID(<-opened))
	defer closeWindow()
	b.must(chromedp.Do(window,
		chromedp.WaitVisible(chromedp.CSS("[name=password]")),
		chromedp.SendKeys(chromedp.CSS("[name=username]"), email),
		chromedp.SendKeys(chromedp.CSS("[name=password]"), password),
		chromedp.Click(chromedp.CSS("[type=submit]"))))
	b.must(chromedp.Do(ctx, chromedp.WaitVisible(chromedp.CSS(".auth-wrapper .authorize.locked"))))
	evaluate[chromedp.Void](b, `document.querySelector(".modal-ux .close-modal")?.click()`)
	return email
}

// signsIn fills in Keycloak's page, which needs no scripts.
func (b *browser) signsIn(email, heading string, texts ...string) {
	b.Helper()
	b.fill("username", email, "password", password)
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 200, heading, texts...)
}

// scenarioKeycloakPages looks at Keycloak's pages, which look like the service's, also in an operator's colours.
func scenarioKeycloakPages(b *browser) {
	signIn := chromedp.Navigate(b.vars["PUBLIC_URL"] + "/auth/login")
	b.arrive(signIn, 200, "Sign in to your account", "No account yet?")
	b.look("")
	b.fill("username", newEmail(), "password", password)
	b.arrive(chromedp.Click(chromedp.CSS("[type=submit]")), 200, "Sign in to your account", "Invalid username or password")
	b.look("")
	b.arrive(chromedp.Click(labelled("Forgot Password?")), 200, "Forgot Your Password?")
	b.look("")
	b.arrive(signIn, 200, "Sign in to your account")
	b.press("Create an account", 200, "Create an account", "You choose your password later")

	defer b.edit("", func(realm map[string]any) { realm["loginTheme"] = "example" })()
	b.arrive(signIn, 200, "Sign in to your account", "No account yet?", "Privacy", "Terms", "Imprint")
	b.look("")
	for label, url := range map[string]string{"Create an account": "https://accounts.example.com/account/register",
		"Privacy": "https://www.example.com/privacy?lang=en&print"} {
		if got := evaluate[string](b, fmt.Sprintf(`[...document.links].find(l => l.text == %q)?.href`, label)); got != url {
			b.Errorf("%s leads to %q", label, got)
		}
	}
	accent := `getComputedStyle(document.documentElement).getPropertyValue("--accent")` // the dark scheme's is mixed from it
	if got := evaluate[string](b, accent); !strings.Contains(got, "#8a1c4a") {
		b.Errorf("the accent is %s", got)
	}
}

// scenarioOneTimeCode adds a second device that makes codes, and signs in with one of the first, on Keycloak's pages.
func scenarioOneTimeCode(b *browser) {
	email := newEmail()
	b.account(email)
	const first = "DJmQfC73VGFhw7D4QJ8A"
	b.hasOneTimeCodes(b.keycloakID(email), first)
	submit := chromedp.Click(chromedp.CSS("[type=submit]"))
	b.open("/account/signed-in", 200, "You are signed in", "Set up a one-time code")
	b.arrive(chromedp.Click(labelled("Set up a one-time code")), 200, "Sign in to your account")
	b.signsIn(email, "Sign In", "One-time code")
	b.fill("otp", other(oneTimeCode(first, time.Now())))
	b.arrive(submit, 200, "Sign In", "Invalid authenticator code")
	b.look("")
	b.fill("otp", oneTimeCode(first, time.Now()))
	b.arrive(submit, 200, "Mobile Authenticator Setup")
	b.look("")
	b.arrive(chromedp.Click(chromedp.CSS("#mode-manual")), 200, "Mobile Authenticator Setup")
	b.look("")
	key := strings.ReplaceAll(evaluate[string](b, `document.querySelector("#kc-totp-secret-key").textContent`), " ", "")
	second, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(key)
	b.must(err)
	b.fill("totp", oneTimeCode(string(second), time.Now()), "userLabel", "tablet")
	b.arrive(submit, 200, "You are signed in")

	_, err = chromedp.Call(b.ctx, cdpnetwork.ClearBrowserCookies, cdp.Empty{})
	b.must(err)
	b.arrive(chromedp.Navigate(b.vars["PUBLIC_URL"]+"/auth/login"), 200, "Sign in to your account")
	b.signsIn(email, "Sign In", "device 1", "tablet")
	b.look("")
	b.must(chromedp.Do(b.ctx, chromedp.Click(chromedp.Search(`//label[contains(., "tablet")]`))))
	b.fill("otp", oneTimeCode(string(second), time.Now().Add(30*time.Second))) // each counts once
	b.arrive(submit, 200, "You are signed in")
}

// scenarioFrontend goes from the confirmed address to a frontend that is signed in.
func scenarioFrontend(b *browser) {
	email := newEmail()
	b.registers(email)
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address")
	b.confirms(email)
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
		// Status 0: the browser does not tell.
		return evaluate[answer](b, fmt.Sprintf("ask("+format+").catch(() => ({status: 0}))", args...))
	}
	at := func(url string) {
		b.Helper()
		if got := evaluate[string](b, "location.href"); got != url {
			b.Errorf("the browser is at %s, not %s", got, url)
		}
	}
	b.scripts(true)
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders,
		cdpnetwork.SetExtraHTTPHeadersParams{Headers: cdpnetwork.Headers{}}) // CORS would ask for them
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
	refused := `select count(*)::text from audit_log where reason = 'forbidden' and action in ('refresh', 'logout')`
	if n := b.value(refused); n != "2" {
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

// awaits waits until a script shows this text.
func (b *browser) awaits(text string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	seen := chromedp.Search(fmt.Sprintf(`//main//*[contains(text(), %q)]`, text))
	if err := chromedp.Do(ctx, chromedp.WaitVisible(seen)); err != nil {
		b.Fatalf("%q is not seen: %v\n%s", text, err, evaluate[string](b, "document.body.innerText"))
	}
}

// scenarioSPA goes from the sign-up in examples/spa, which is of another origin, to the sign-out there.
func scenarioSPA(b *browser) {
	email := newEmail()
	app, click := chromedp.Navigate(b.frontend+"/spa/"), func(label string) {
		b.Helper()
		b.must(chromedp.Do(b.ctx, chromedp.Click(labelled(label))))
	}
	_, err := chromedp.Call(b.ctx, cdpnetwork.SetExtraHTTPHeaders,
		cdpnetwork.SetExtraHTTPHeadersParams{Headers: cdpnetwork.Headers{}}) // CORS would ask for them
	b.must(err)
	b.scripts(true)
	b.arrive(app, 200, "App")
	b.awaits("Create an account")
	b.look("")
	b.scripts(true)
	b.fill("email", "ada@nowhere")
	click("Create an account")
	b.awaits("email is not a valid e-mail address")
	b.fill("email", email)
	click("Create an account")
	b.awaits("Look into your mailbox")
	b.open(b.readMail(email, 1).URL, 200, "Confirm your e-mail address")
	b.confirms(email)

	b.scripts(true)
	b.arrive(app, 200, "App")
	b.awaits("Sign in")
	b.arrive(chromedp.Click(labelled("Sign in")), 200, anything)
	b.signsIn(email, "App")
	b.awaits(email)
	b.look("")
	b.scripts(true)
	if kept := evaluate[string](b, "document.cookie + JSON.stringify({...localStorage, ...sessionStorage})"); kept != "{}" {
		b.Errorf("scripts see %s", kept)
	}
	refreshed := func() int {
		return evaluate[int](b, `performance.getEntriesByType("resource").filter(e => e.name.endsWith("/refresh")).length`)
	}
	b.admin().changes(userID(b.value(`select user_id from users where email = $1`, email)),
		body{"role": "operator", "network_id": "N1", "station_id": "S1"})
	b.eventually("the token with the former role is refused and renewed", time.Minute, func() bool {
		click("Ask again")
		return refreshed() > 1
	})
	b.awaits("operator")
	b.must(b.pg.close())
	click("Ask again")
	b.awaits("Nothing is lost. Please try again in")
	b.must(b.pg.open())
	b.arrive(app, 200, "App") // the cookie outlives the page
	b.awaits(email)

	click("Sign out")
	b.awaits("Create an account")
	b.fill("email", email)
	click("Create an account")
	b.awaits("You have an account already.")
	b.arrive(chromedp.Click(labelled("Sign in")), 200, anything)
	b.signsIn(email, "App") // Keycloak asks for the password again
	b.awaits(email)
}

// scenarioSignInMistakes comes back from Keycloak without having signed in.
func scenarioSignInMistakes(b *browser) {
	said := map[string][]string{
		"en": {"Sign-in not completed", "The sign-in was cancelled.", "This sign-in is over already.",
			"This sign-in took too long.", "This sign-in was not begun in this browser.",
			"Sign in", "Account disabled", "You are signed in"},
		"de": {"Anmeldung nicht abgeschlossen", "Die Anmeldung wurde abgebrochen.",
			"Diese Anmeldung ist schon abgeschlossen.", "Diese Anmeldung hat zu lange gedauert.",
			"Diese Anmeldung wurde nicht in diesem Browser begonnen.", "Anmelden", "Konto gesperrt", "Sie sind angemeldet"},
	}[b.language]
	title, cancelled, over, late, foreign := said[0], said[1], said[2], said[3], said[4]
	signIn, disabled, signedIn := said[5], said[6], said[7]
	email := newEmail()
	b.account(email)
	b.arrive(chromedp.Navigate(b.vars["PUBLIC_URL"]+"/auth/login"), 200, anything)
	state := evaluate[string](b, `new URL(location.href).searchParams.get("state")`)
	back := "/auth/callback?error=access_denied&state="
	b.open(back+state, 400, title, cancelled)
	b.open(back+state, 400, title, over)
	b.open(back+"x"+state, 400, title, foreign)
	cookies, err := chromedp.Call(b.ctx, cdpnetwork.GetCookies,
		cdpnetwork.GetCookiesParams{URLs: []string{b.vars["PUBLIC_URL"]}})
	b.must(err)
	flow := newSignIn(cookies.Cookies[0].Value, "/account/signed-in", time.Now().Add(-time.Hour))
	b.open(back+flow.state, 400, title, late)
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
	if err := chromedp.Do(b.ctx, chromedp.EmulateViewport(1280, 1000),
		chromedp.Navigate(b.vars["PUBLIC_URL"]+"/swagger-ui"),
		chromedp.Click(chromedp.CSS(health+".opblock-summary-control")),
		chromedp.Click(chromedp.CSS(health+".try-out__btn")),
		chromedp.Click(chromedp.CSS(health+".execute")),
		chromedp.WaitVisible(chromedp.CSS(health+".live-responses-table .response-col_status"))); err != nil {
		b.Fatal(err)
	}
	b.photograph("1280")
	status := `document.querySelector("` + health + `.live-responses-table tbody .response-col_status").innerText`
	if got := evaluate[string](b, status); !strings.HasPrefix(got, "200") {
		b.Errorf("the operation was answered with %q", got)
	}
	documented := 0
	for _, operations := range b.get("/api-docs/openapi.json").JSON["paths"].(map[string]any) {
		documented += len(operations.(map[string]any))
	}
	if listed := evaluate[int](b, `document.querySelectorAll(".opblock").length`); listed != documented {
		b.Errorf("it lists %d operations, the document has %d", listed, documented)
	}
	email := b.authorizes()
	defer b.keycloakAdmin("POST", "/users/"+b.keycloakID(email)+"/logout", nil, nil) // PostgreSQL knows nothing of it
	me := `#operations-Signing_in-me `
	b.must(chromedp.Do(b.ctx,
		chromedp.Click(chromedp.CSS(me+".opblock-summary-control")),
		chromedp.Click(chromedp.CSS(me+".try-out__btn")),
		chromedp.Click(chromedp.CSS(me+".execute")),
		chromedp.WaitVisible(chromedp.CSS(me+".live-responses-table .response-col_status"))))
	b.photograph("1280-signed-in")
	if got := evaluate[string](b, strings.Replace(status, health, me, 1)); !strings.HasPrefix(got, "200") {
		b.Errorf("who is signed in is answered with %q", got)
	}
	evaluate[chromedp.Void](b, `console.log("the end")`)
	for m, err := range messages {
		b.must(err)
		if m.Text == "the end" {
			break
		} else if m.Type == "debug" { // of Chromium itself
			continue
		}
		b.Errorf("console: %s %s %s", m.Type, m.URL, m.Text)
	}
}
