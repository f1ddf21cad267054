package main

import (
	"net/url"
	"strings"
	"time"

	"auth-service/dev/preview"

	"github.com/chromedp/chromedp"
)

// What people do in the browser of browser_test.go, beyond the straight way.

func walkInGerman(b *browser) {
	email := newEmail()
	b.open("/account/register", 200, "Konto anlegen")
	b.fill("email", email)
	b.fill("password", password)
	b.press("Konto anlegen", 201, "Sehen Sie in Ihr Postfach", email)
	b.opensMail(email, 1, "Bestätigen Sie Ihre E‑Mail-Adresse")
	b.press("E-Mail-Adresse bestätigen", 200, "E-Mail-Adresse bestätigen", email)
	b.press("Diese Adresse bestätigen", 200, "Ihre Adresse ist bestätigt", email)
	b.wants(b.login(email, password), 200, "")
}

func walkWithoutPassword(b *browser) {
	email := newEmail()
	b.registers(email, "")
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.press("Confirm e-mail address", 200, "Confirm your e-mail address", email)
	b.press("Confirm this address", 200, "Your address is confirmed", "Choose a password now")
	b.open("/account/verify?token="+l.Token+"&key="+l.Key, 200, "Already confirmed", "Choose a password now")
	b.choosesPassword(`//a[normalize-space(.)="Choose your password"]`, email)
}

func walkWithoutPasswordByCode(b *browser) {
	email := newEmail()
	b.registers(email, "")
	l := b.readMail(email, 1)
	b.press("Enter the code", 200, "Enter your code")
	b.fill("code", l.Code)
	b.press("Confirm this address", 200, "Your address is confirmed", "We have sent you another mail")
	ctx := b.Context()
	if _, err := b.mail.WaitFor(ctx, email, 2); err != nil {
		b.Fatal(err)
	}
	if err := chromedp.Do(b.ctx, chromedp.Navigate(b.elsewhere+"/mail/"+email)); err != nil {
		b.Fatal(err)
	}
	b.choosesPassword(`(//a[contains(@href, "/login-actions/action-token")])[1]`, email)
}

// choosesPassword follows a link to Keycloak's own pages, chooses a password there
// and comes back. The pages are Keycloak's: they are used, not judged.
func (b *browser) choosesPassword(link, email string) {
	b.Helper()
	chosen := "another horse battery staple"
	b.secrets.add(chosen)
	for _, step := range []chromedp.Action[chromedp.Void]{
		chromedp.Click(chromedp.Search(link)),
		chromedp.WaitVisible(chromedp.CSS("#password-new, #kc-info-message")),
	} {
		if err := chromedp.Do(b.ctx, step); err != nil {
			b.Fatalf("on the way to Keycloak's page: %v", err)
		}
	}
	b.photograph("keycloak")
	if evaluate[bool](b, `document.querySelector("#kc-info-message") !== null`) { // "click here to proceed"
		if err := chromedp.Do(b.ctx, chromedp.Click(chromedp.CSS("#kc-info-message a"))); err != nil {
			b.Fatal(err)
		}
	}
	b.fill("password-new", chosen)
	b.fill("password-confirm", chosen)
	for _, step := range []chromedp.Action[chromedp.Void]{
		chromedp.Click(chromedp.CSS("[type=submit]")),
		chromedp.WaitVisible(chromedp.CSS(`a[href$="/account/ready"]`)),
	} {
		if err := chromedp.Do(b.ctx, step); err != nil {
			b.Fatalf("on Keycloak's page: %v", err)
		}
	}
	b.arrive(chromedp.Click(chromedp.CSS(`a[href$="/account/ready"]`)), 200, "Your password is set", "You can sign in now.")
	b.audit("")
	b.wants(b.login(email, chosen), 200, "")
}

func walkCode(b *browser) {
	email := newEmail()
	b.registers(email, password)
	l := b.readMail(email, 1)
	wrong := "000000"
	if l.Code == wrong {
		wrong = "000001"
	}
	b.press("Enter the code", 200, "Enter your code")
	if got := b.value("email"); got != email {
		b.Errorf("the form knows %q, not %q", got, email)
	}
	for range codeAttempts - 1 {
		b.fill("code", wrong)
		b.press("Confirm this address", 400, "Enter your code", "The e-mail address or the code is wrong.")
	}
	b.fill("code", l.Code[:3]+" "+l.Code[3:]) // as people paste it
	b.press("Confirm this address", 200, "Your address is confirmed", email)

	email = newEmail()
	b.registers(email, password)
	l = b.readMail(email, 1)
	for range codeAttempts {
		b.post("/verify", map[string]any{"email": email, "code": wrong})
	}
	b.press("Enter the code", 200, "Enter your code")
	b.fill("code", l.Code)
	b.press("Confirm this address", 429, "Too many attempts", "The link in the mail still works")
	b.open("/account/verify?token="+l.Token, 200, "Confirm your e-mail address")
	b.press("Confirm this address", 200, "Your address is confirmed")
}

func walkResend(b *browser) {
	email := newEmail()
	b.registers(email, password)
	first := b.readMail(email, 1)
	b.press("Send the mail again", 200, "Send the mail again")
	b.press("Send again", 429, "Too soon")
	b.forget(email)
	b.open("/account/resend?email="+url.QueryEscape(email), 200, "Send the mail again")
	b.press("Send again", 200, "A new mail is on its way", email)
	second := b.readMail(email, 2)
	if first.Token != second.Token || first.Code == second.Code {
		b.Errorf("the second mail must have the same link and a new code: %v, %v", first, second)
	}
	b.open("/account/resend", 200, "Send the mail again")
	b.press("Send again", 400, "Send the mail again", "E-mail address is required")
	b.fill("email", newEmail())
	b.press("Send again", 404, "No registration")
}

// forget stands in for waiting until the limits of an address are over.
func (w *world) forget(email string) {
	w.Helper()
	for _, l := range append(mailLimits(email, 0), registerLimit(email)) {
		if _, err := w.pool.Exec(w.Context(), `delete from rate_limits where key = $1`, l.Key); err != nil {
			w.Fatal(err)
		}
	}
}

func walkCancel(b *browser) {
	email := newEmail()
	b.registers(email, password)
	l := b.opensMail(email, 1, "Confirm your e‑mail address")
	b.open("/account/verify?token="+l.Token, 200, "Confirm your e-mail address")
	b.press("This was not me", 200, "You did not register?", email)
	b.press("Delete the registration", 200, "Registration deleted")
	b.open("/account/verify?token="+l.Token, 410, "Registration cancelled")
	b.press("Register again", 200, "Create an account")
	b.open("/account/cancel?token="+l.Token, 410, "Registration cancelled")
	b.open("/account/cancel?token=unknown", 400, "Invalid link")
	b.wants(b.login(email, password), 401, "invalid-credentials")
}

func walkExpired(b *browser) {
	email := newEmail()
	b.registers(email, password)
	l := b.readMail(email, 1)
	b.open("/account/verify?token="+l.Token, 200, "Confirm your e-mail address")
	// Stands in for waiting a day.
	if _, err := b.pool.Exec(b.Context(), `update user_registrations set expires_at = $2 where email = $1`, email, time.Now()); err != nil {
		b.Fatal(err)
	}
	b.press("Confirm this address", 410, "Verification expired")
	b.open("/account/verify?token="+l.Token, 410, "Verification expired")
	b.press("Register again", 200, "Create an account")
	b.forget(email)
	b.registers(email, password)
}

func walkMistakes(b *browser) {
	b.open("/account/register", 200, "Create an account")
	for name, value := range map[string]string{"email": "ada@", "username": "al", "first_name": "Ada", "phone": "030 123", "password": password} {
		b.fill(name, value)
	}
	b.press("Create an account", 400, "Create an account", "E-mail address is not a valid e-mail address",
		"User name must have at least 3 characters", "Phone number is not a valid phone number")
	for name, want := range map[string]string{"email": "ada@", "username": "al", "first_name": "Ada", "password": ""} {
		if got := b.value(name); got != want {
			b.Errorf("%s is shown again as %q, want %q", name, got, want)
		}
	}
	email := newEmail()
	b.open("/account/register", 200, "Create an account")
	b.fill("email", email)
	b.fill("password", "short")
	b.press("Create an account", 400, "Create an account", "Password must have at least 8 characters")
	b.fill("password", password)
	b.press("Create an account", 201, "Look into your mailbox", email)
	b.open("/account/verify?token="+b.readMail(email, 1).Token, 200, "Confirm your e-mail address")
	b.press("Confirm this address", 200, "Your address is confirmed")
	b.open("/account/register", 200, "Create an account")
	b.fill("email", strings.ToUpper(email))
	b.press("Create an account", 409, "Create an account", "An account with this e-mail address or username exists already.")
}

func walkOtherSite(b *browser) {
	if err := chromedp.Do(b.ctx, chromedp.Navigate(b.elsewhere+"/form")); err != nil {
		b.Fatal(err)
	}
	b.press("Win", 403, "Not allowed")
}

func walkOutage(b *browser) {
	email := newEmail()
	b.registers(email, password)
	b.open("/account/verify?token="+b.readMail(email, 1).Token, 200, "Confirm your e-mail address")
	if err := b.kc.close(); err != nil {
		b.Fatal(err)
	}
	b.press("Confirm this address", 503, "Temporarily unavailable", "Nothing is lost")
	if err := b.kc.open(); err != nil {
		b.Fatal(err)
	}
	b.open("/account/verify?token="+b.readMail(email, 1).Token, 200, "Confirm your e-mail address")
	b.press("Confirm this address", 200, "Your address is confirmed")
}

// walkSamples looks at every page in every state, whether a walk leads there or not.
func walkSamples(b *browser) {
	for _, sample := range preview.Samples() {
		if err := chromedp.Do(b.ctx, chromedp.Navigate(b.elsewhere+"/preview/"+sample.Name)); err != nil {
			b.Fatal(err)
		}
		b.audit("")
	}
}

// walkSwaggerUI reads the API's description and tries an operation.
func walkSwaggerUI(b *browser) {
	b.scripts(true)
	for _, step := range []chromedp.Action[chromedp.Void]{
		chromedp.Navigate(b.env["PUBLIC_URL"] + "/swagger-ui"),
		chromedp.Click(chromedp.CSS("#operations-Service-health .opblock-summary-control")),
		chromedp.Click(chromedp.CSS("#operations-Service-health .try-out__btn")),
		chromedp.Click(chromedp.CSS("#operations-Service-health .execute")),
		chromedp.WaitVisible(chromedp.CSS("#operations-Service-health .live-responses-table .response .microlight")),
	} {
		if err := chromedp.Do(b.ctx, step); err != nil {
			b.Fatalf("Swagger UI: %v", err)
		}
	}
	b.photograph("swagger-ui")
	if text := evaluate[string](b, `document.querySelector("#operations-Service-health .live-responses-table").innerText`); !strings.Contains(text, `"status": "ok"`) {
		b.Errorf("the operation answers %s", text)
	}
	if n := evaluate[int](b, `document.querySelectorAll(".opblock").length`); n < 7 {
		b.Errorf("Swagger UI lists %d operations", n)
	}
}
