// Package templates has the pages that people see: a few forms, and one page for every outcome. They need no script,
// carry no inline style, and speak English and German. Each page is a component with a plain struct as its content;
// WithLanguage decides in which language it is rendered.
package templates

import (
	"context"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/language"
)

// languages lists what the pages can be read in; the first is for everybody else.
var languages = language.NewMatcher([]language.Tag{language.English, language.German})

type languageKey struct{}

// WithLanguage returns a context whose pages are rendered in lang, which is what Language has chosen.
func WithLanguage(ctx context.Context, lang string) context.Context {
	return context.WithValue(ctx, languageKey{}, lang)
}

// Language returns "de" or "en": the locale if it is one of them or a variety of it ("de-AT", "de_CH"), otherwise what
// the Accept-Language header prefers (RFC 9110 §12.5.4), otherwise "en". Malformed values count as absent.
func Language(header, locale string) string {
	if _, i := language.MatchStrings(languages, locale, header); i == 1 {
		return "de"
	}
	return "en"
}

func pageLanguage(ctx context.Context) string {
	if lang, ok := ctx.Value(languageKey{}).(string); ok {
		return lang
	}
	return "en"
}

// number is what a sentence may have in the place of a translation's %d.
var number = regexp.MustCompile(`\d+`)

// t returns the English sentence in the language of the page. A sentence without a translation stays English: better
// a foreign sentence than none.
func t(ctx context.Context, english string) string {
	if pageLanguage(ctx) != "de" {
		return english
	}
	if s, ok := german[english]; ok {
		return s
	}
	n := number.FindString(english)
	if s, ok := german[strings.Replace(english, n, "%d", 1)]; n != "" && ok {
		return strings.Replace(s, "%d", n, 1)
	}
	return english
}

// fault makes a sentence of a field's name and what is wrong with it ("E-mail address is required"). What begins with
// a capital is a sentence already.
func fault(ctx context.Context, label, wrong string) string {
	wrong = t(ctx, wrong)
	if r, _ := utf8.DecodeRuneInString(wrong); unicode.IsUpper(r) {
		return wrong
	}
	return t(ctx, label) + " " + wrong
}

// german has the translation of every sentence of the pages, and of the titles and details of problems that they show.
var german = map[string]string{
	// Every page
	"Your account":        "Ihr Konto",
	"Error":               "Fehler",
	"optional":            "freiwillig",
	"To the start page":   "Zur Startseite",
	"Create an account":   "Konto anlegen",
	"Enter the code":      "Code eingeben",
	"Send the mail again": "E-Mail erneut senden",
	"Register again":      "Neu registrieren",
	"Use another address": "Andere Adresse verwenden",
	"Sign in":             "Anmelden",
	"Try again":           "Noch einmal versuchen",
	"This was not me":     "Das war ich nicht",
	"That did not work":   "Das hat nicht geklappt",
	"Request id:":         "Anfragenummer:",

	// Home
	"Welcome": "Willkommen",
	"Here you open an account and confirm your e-mail address.": "Hier legen Sie ein Konto an und bestätigen " +
		"Ihre E-Mail-Adresse.",
	"Already registered?": "Schon registriert?",
	"For developers":      "Für Entwickler",
	"API documentation":   "API-Dokumentation",

	// Register
	"E-mail address": "E-Mail-Adresse",
	"User name":      "Benutzername",
	"First name":     "Vorname",
	"Last name":      "Nachname",
	"Phone number":   "Telefonnummer",
	"Password":       "Passwort",
	"Leave empty to sign in with your e-mail address.": "Leer lassen, um sich mit der E-Mail-Adresse anzumelden.",
	"With country code, like +4930123456.":             "Mit Landesvorwahl, wie +4930123456.",
	"We send a mail there to confirm it.":              "Wir senden eine E-Mail dorthin, um sie zu bestätigen.",
	"Please enter it again if you had chosen one.":     "Bitte noch einmal eingeben, falls Sie eines gewählt hatten.",
	"Leave empty to choose it on the sign-in server's page after your address is confirmed.": "Leer lassen, um " +
		"es nach der Bestätigung Ihrer Adresse auf der Seite des Anmeldeservers zu wählen.",
	"Do you have a code already?": "Haben Sie schon einen Code?",

	// Registered, resent
	"Look into your mailbox":               "Sehen Sie in Ihr Postfach",
	"We have sent a mail to this address:": "Wir haben eine E-Mail an diese Adresse gesendet:",
	"We have sent it to this address:":     "Wir haben sie an diese Adresse gesendet:",
	"Your mail will be sent":               "Ihre E-Mail wird noch gesendet",
	"It goes to this address as soon as possible. You need not do anything for it.": "Sie geht so bald wie " +
		"möglich an diese Adresse. Sie müssen dafür nichts tun.",
	"A new mail is on its way": "Eine neue E-Mail ist unterwegs",
	"Open the link in the mail, or enter the six-digit code from it.": "Öffnen Sie den Link in der E-Mail, oder " +
		"geben Sie den sechsstelligen Code daraus ein.",
	"The link in it is the same, the code is new.": "Der Link darin ist derselbe, der Code ist neu.",
	"No mail after a few minutes? Look into the spam folder, or let us send it again.": "Nach einigen Minuten " +
		"keine E-Mail? Sehen Sie im Spam-Ordner nach, oder lassen Sie sie erneut senden.",

	// Verify, code
	"Confirm your e-mail address": "E-Mail-Adresse bestätigen",
	"Somebody, probably you, has registered an account with this address:": "Jemand, wahrscheinlich Sie, hat " +
		"ein Konto mit dieser Adresse registriert:",
	"Confirm this address":  "Diese Adresse bestätigen",
	"Did you not register?": "Haben Sie sich nicht registriert?",
	"Enter your code":       "Code eingeben",
	"Code":                  "Code",
	"Six digits, from the mail that we sent you.": "Sechs Ziffern aus der E-Mail, die wir Ihnen gesendet haben.",
	"No mail, or the code no longer works?":       "Keine E-Mail, oder der Code gilt nicht mehr?",

	// Verified
	"Your address is confirmed":                        "Ihre Adresse ist bestätigt",
	"Choose a password now, and then you can sign in.": "Wählen Sie jetzt ein Passwort, dann können Sie sich anmelden.",
	"Choose your password":                             "Passwort wählen",
	"You can sign in now.":                             "Sie können sich jetzt anmelden.",

	// Resend, cancel
	"The address you registered with.":               "Die Adresse, mit der Sie sich registriert haben.",
	"Send again":                                     "Erneut senden",
	"You did not register?":                          "Sie haben sich nicht registriert?",
	"You get a new code; the link stays the same.":   "Sie erhalten einen neuen Code; der Link bleibt derselbe.",
	"Then delete the registration for this address:": "Dann löschen Sie die Registrierung für diese Adresse:",
	"The link and the code in the mail stop working, and nobody gets an account with them.": "Link und Code aus " +
		"der E-Mail werden ungültig, und niemand erhält damit ein Konto.",
	"Delete the registration": "Registrierung löschen",
	"Registration deleted":    "Registrierung gelöscht",
	"Its link and its code no longer work. You need not do anything else.": "Der Link und der Code gelten nicht " +
		"mehr. Sie müssen nichts weiter tun.",

	// What is wrong with a field; each continues the field's name
	"is required":                      "ist erforderlich",
	"is not valid":                     "ist ungültig",
	"is not a valid e-mail address":    "ist keine gültige E-Mail-Adresse",
	"must have at least %d characters": "muss mindestens %d Zeichen haben",
	"must have at most %d characters":  "darf höchstens %d Zeichen haben",
	"is too long":                      "ist zu lang",
	"is too short":                     "ist zu kurz",
	"is too weak":                      "ist zu schwach",
	"must be six digits":               "muss aus sechs Ziffern bestehen",
	"is not a valid phone number; write it with the country code, like +4930123456": "ist ungültig; bitte mit " +
		"Landesvorwahl schreiben, wie +4930123456",
	"is taken already":                    "ist schon vergeben",
	"is not allowed":                      "ist nicht erlaubt",
	"has a character that is not allowed": "enthält ein unerlaubtes Zeichen",
	"has characters of several scripts":   "enthält Zeichen aus mehreren Schriften",
	"has a length that is not allowed":    "hat eine unerlaubte Länge",
	"must not be another e-mail address":  "darf keine andere E-Mail-Adresse sein",

	// The same, from Keycloak's password policies
	"minimum length %d":                              "muss mindestens %d Zeichen haben",
	"maximum length %d":                              "darf höchstens %d Zeichen haben",
	"must contain at least %d numerical digits":      "muss mindestens %d Ziffern enthalten",
	"must contain at least %d lower case characters": "muss mindestens %d Kleinbuchstaben enthalten",
	"must contain at least %d upper case characters": "muss mindestens %d Großbuchstaben enthalten",
	"must contain at least %d special characters":    "muss mindestens %d Sonderzeichen enthalten",
	"must not be equal to the username":              "darf nicht der Benutzername sein",
	"must not be equal to the email":                 "darf nicht die E-Mail-Adresse sein",

	// Titles and details of problems
	"Invalid request":        "Ungültige Anfrage",
	"Some fields are wrong.": "Einige Angaben stimmen nicht.",
	"Account exists":         "Konto vorhanden",
	"An account with this e-mail address or username exists already.": "Es gibt schon ein Konto mit dieser " +
		"E-Mail-Adresse oder diesem Benutzernamen.",
	"Verification expired": "Frist abgelaufen",
	"The time to confirm this registration is over. Please register again.": "Die Frist, um diese Registrierung " +
		"zu bestätigen, ist vorbei. Bitte registrieren Sie sich neu.",
	"Registration cancelled": "Registrierung aufgehoben",
	"This registration was cancelled or replaced by a newer one.": "Diese Registrierung wurde aufgehoben oder " +
		"durch eine neuere ersetzt.",
	"Invalid link": "Ungültiger Link",
	"This link is not valid. It may be incomplete or belong to a newer mail.": "Dieser Link ist ungültig. " +
		"Vielleicht ist er unvollständig oder gehört zu einer neueren E-Mail.",
	"Wrong code": "Falscher Code",
	"The e-mail address or the code is wrong.": "Die E-Mail-Adresse oder der Code ist falsch.",
	"Too many attempts":                        "Zu viele Versuche",
	"The code was entered wrongly too often. The link in the mail still works, or ask for a new mail.": "Der Code " +
		"wurde zu oft falsch eingegeben. Der Link in der E-Mail gilt noch, oder lassen Sie sich eine neue " +
		"E-Mail senden.",
	"Too soon": "Zu früh",
	"A mail was sent a moment ago. Please wait before asking for another.": "Gerade eben wurde eine E-Mail " +
		"gesendet. Bitte warten Sie etwas, bevor Sie eine weitere anfordern.",
	"Too many mails": "Zu viele E-Mails",
	"No more mails can be sent for this registration or address today.": "Für diese Registrierung oder Adresse " +
		"können heute keine weiteren E-Mails gesendet werden.",
	"No registration":                         "Keine Registrierung",
	"There is no open registration for this.": "Dafür gibt es keine offene Registrierung.",
	"Already confirmed":                       "Schon bestätigt",
	"This address is confirmed already. You can sign in.": "Diese Adresse ist schon bestätigt. Sie können sich " +
		"anmelden.",
	"Too many requests":                   "Zu viele Anfragen",
	"Please wait a moment and try again.": "Bitte warten Sie einen Moment, und versuchen Sie es noch einmal.",
	"Temporarily unavailable":             "Vorübergehend nicht verfügbar",
	"The service can't do this right now. Nothing is lost; please try again in a moment.": "Der Dienst kann das " +
		"gerade nicht ausführen. Nichts ist verloren; bitte versuchen Sie es gleich noch einmal.",
	"Something went wrong": "Etwas ist schiefgegangen",
	"This is our fault. Please try again; if it stays, tell us the request id.": "Das liegt an uns. Bitte " +
		"versuchen Sie es noch einmal; wenn es so bleibt, nennen Sie uns die Anfragenummer.",
	"Not allowed":                       "Nicht erlaubt",
	"You are not allowed to do this.":   "Sie dürfen das nicht tun.",
	"Not found":                         "Nicht gefunden",
	"There is nothing at this address.": "Unter dieser Adresse gibt es nichts.",
	"Method not allowed":                "Methode nicht erlaubt",
	"This address does not know that method; Allow lists those it knows.": "Diese Adresse kennt die Methode " +
		"nicht; Allow nennt die, die sie kennt.",
	"Too large": "Zu groß",
	"The request body is larger than 16 KiB.":    "Die Anfrage ist größer als 16 KiB.",
	"Unsupported media type":                     "Nicht unterstützter Medientyp",
	"The request body must be application/json.": "Die Anfrage muss application/json sein.",
	"Not signed in":                              "Nicht angemeldet",
	"A valid access token is needed.":            "Es braucht ein gültiges Zugriffstoken.",
	"Sign-in failed":                             "Anmeldung fehlgeschlagen",
	"The username, the e-mail address or the password is wrong.": "Benutzername, E-Mail-Adresse oder Passwort " +
		"ist falsch.",
	"Account not verified": "Konto nicht bestätigt",
	"The e-mail address of this account is not confirmed yet. Look into your mailbox.": "Die E-Mail-Adresse " +
		"dieses Kontos ist noch nicht bestätigt. Sehen Sie in Ihr Postfach.",
	"Account disabled":                       "Konto gesperrt",
	"This account is disabled.":              "Dieses Konto ist gesperrt.",
	"Account setup required":                 "Konto unvollständig",
	"This account is not set up completely.": "Dieses Konto ist nicht vollständig eingerichtet.",
	"Token reused":                           "Token wiederverwendet",
	"Last admin":                             "Letzter Administrator",

	// The page of a problem type
	"An answer of this type has the media type application/problem+json (RFC 9457):": "Eine Antwort dieser Art " +
		"hat den Medientyp application/problem+json (RFC 9457):",
	"Sign in or refresh the access token, and repeat the request with it.": "Melden Sie sich an oder erneuern " +
		"Sie das Zugriffstoken, und wiederholen Sie die Anfrage damit.",
	"Don't repeat the request as it is; it would be refused again. If there are errors, each names a field.": "Bitte " +
		"wiederholen Sie die Anfrage nicht unverändert; sie würde wieder abgelehnt. Jeder Eintrag in errors nennt " +
		"ein Feld.",
	"Wait as many seconds as the header Retry-After says, then repeat the request.": "Warten Sie so viele " +
		"Sekunden, wie die Kopfzeile Retry-After angibt, und wiederholen Sie die Anfrage.",
	"Report the request_id; the log has the cause under it.": "Melden Sie die request_id; unter ihr steht die " +
		"Ursache im Protokoll.",

	// Preview
	"Previews": "Vorschau",
	"Every page in every state, with invented data.": "Jede Seite in jedem Zustand, mit erfundenen Daten.",
}
