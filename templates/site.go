// Package templates has the pages that people see: a few forms, and one page for every outcome. They need no script
// and carry no inline style. Each page is a component with a plain struct as its content; Site.Context says in which
// language it is rendered, and with whose name and colour.
package templates

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/a-h/templ"
	"github.com/lucasb-eyer/go-colorful"
)

// Policy is the Content-Security-Policy that all pages can live with.
const Policy = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; " +
	"frame-ancestors 'none'"

// Brand is what the operator's environment says of the pages.
type Brand struct {
	// AppName is what the pages are called; mails and Keycloak's pages have the realm's display name.
	// Default: "Your account", in the reader's language.
	AppName string `env:"APP_NAME"`
	// AppLogoFile is a picture for the pages (SVG, PNG, JPEG or WebP, at most 512 KiB). Default: a neutral symbol.
	AppLogoFile string `env:"APP_LOGO_FILE"`
	// AppColor is the colour of links and buttons, like #1b58b8: at least 4.5:1 on the page's background (WCAG 2.2,
	// 1.4.3). Dark pages get a lighter one of the same hue. Default: a blue.
	AppColor string `env:"APP_COLOR"`
	// PrivacyURL, TermsURL and ImprintURL are linked below every page. Default: none.
	PrivacyURL string `env:"PRIVACY_URL"`
	TermsURL   string `env:"TERMS_URL"`
	ImprintURL string `env:"IMPRINT_URL"`
	// LanguagesDir has language files like de.json, which add languages or change sentences. Default: none.
	LanguagesDir string `env:"LANGUAGES_DIR"`
}

// Site is what all pages have in common. Its Assets are the files that they ask for, by path.
type Site struct {
	*Languages
	Assets map[string]Asset
	name   string
	legal  []Action
}

// An Asset may be cached forever under its URL, which has its hash.
type Asset struct {
	URL     string
	Type    string
	Content []byte
}

//go:embed style.css
var styleSheet []byte

// symbolSVG is the logo of who has none, in the colours of both schemes.
const symbolSVG = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 28 28"><style>rect{fill:%s}g{fill:#fff}` +
	`@media(prefers-color-scheme:dark){rect{fill:%s}g{fill:#0b1b33}}</style><rect width="28" height="28" rx="8"/>` +
	`<g><circle cx="14" cy="10.5" r="4"/><path d="M6.5 22a7.5 7.5 0 0 1 15 0z"/></g></svg>`

// logoTypes are the media types of a logo's file.
var logoTypes = map[string]string{".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg",
	".jpeg": "image/jpeg", ".webp": "image/webp"}

const maxLogo = 512 << 10

// NewSite reads what the brand names. All mistakes are reported at once, each with its variable.
func NewSite(b Brand) (*Site, error) {
	s := &Site{Assets: map[string]Asset{}, name: b.AppName}
	var mistakes []error
	must := func(variable string, err error) {
		if err != nil {
			mistakes = append(mistakes, fmt.Errorf("%s: %w", variable, err))
		}
	}
	var err error
	s.Languages, err = loadLanguages(b.LanguagesDir)
	must("LANGUAGES_DIR", err)
	style, logo, err := colours(b.AppColor)
	must("APP_COLOR", err)
	for _, legal := range []struct{ variable, label, url string }{
		{"PRIVACY_URL", "Privacy", b.PrivacyURL}, {"TERMS_URL", "Terms of use", b.TermsURL},
		{"IMPRINT_URL", "Imprint", b.ImprintURL},
	} {
		if legal.url == "" {
			continue
		}
		if u, err := url.Parse(legal.url); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			must(legal.variable, errors.New("must be a URL that begins with http:// or https://"))
		}
		s.legal = append(s.legal, Action{Label: legal.label, URL: legal.url})
	}
	s.add("style.css", "text/css; charset=utf-8", append(styleSheet[:len(styleSheet):len(styleSheet)], style...))
	s.add("robots.txt", "text/plain; charset=utf-8", []byte("User-agent: *\nDisallow: /\n"))
	kind := logoTypes[".svg"]
	if b.AppLogoFile != "" {
		kind = logoTypes[strings.ToLower(filepath.Ext(b.AppLogoFile))]
		logo, err = os.ReadFile(b.AppLogoFile) // #nosec G304 -- the operator names it
		if err == nil && (kind == "" || len(logo) > maxLogo) {
			err = errors.New("must be an .svg, .png, .jpg or .webp file of at most 512 KiB")
		}
		must("APP_LOGO_FILE", err)
	}
	for _, name := range []string{"logo", "icon", "favicon.ico"} { // the last by its address, for what is no page of ours
		s.add(name, kind, logo)
	}
	return s, errors.Join(mistakes...)
}

func (s *Site) add(name, kind string, content []byte) {
	sum := sha256.Sum256(content)
	s.Assets[name] = Asset{"/static/" + name + "?v=" + hex.EncodeToString(sum[:6]), kind, content}
}

// contrast is the contrast ratio of two colours (WCAG 2.2).
func contrast(a, b colorful.Color) float64 {
	luminance := func(c colorful.Color) float64 {
		red, green, blue := c.LinearRgb()
		return 0.2126*red + 0.7152*green + 0.0722*blue
	}
	light, dark := luminance(a), luminance(b)
	return (max(light, dark) + 0.05) / (min(light, dark) + 0.05)
}

// The backgrounds of style.css: the page in the light scheme, the card in both.
var (
	white, black = colorful.Color{R: 1, G: 1, B: 1}, colorful.Color{}
	lightPage, _ = colorful.Hex("#eef1f6")
	darkCard, _  = colorful.Hex("#19202a")
)

// colours returns the style that gives the pages another accent, in both schemes, and the symbol in it.
func colours(accent string) (style string, symbol []byte, err error) {
	if accent == "" { // as style.css has it
		return "", fmt.Appendf(nil, symbolSVG, "#1b58b8", "#8fbaff"), nil
	}
	light, err := colorful.Hex(accent)
	if err != nil {
		return "", nil, errors.New("must be a colour like #1b58b8")
	}
	// until blends c with another colour until it has a contrast on a background.
	until := func(c, with, background colorful.Color, wanted float64) colorful.Color {
		for share := 0.0; share < 1; share += 0.02 {
			if blend := c.BlendRgb(with, share); contrast(blend, background) >= wanted {
				return blend
			}
		}
		return with
	}
	if ratio := contrast(light, lightPage); ratio < 4.5 {
		return "", nil, fmt.Errorf("%s has a contrast of %.1f:1 on the page and needs 4.5:1; %s has it", accent, ratio,
			until(light, black, lightPage, 4.6).Hex())
	}
	dark := until(light, white, darkCard, 7)
	const scheme = ":root{--accent:%s;--accent-strong:%s;--accent-soft:%s}"
	style = fmt.Sprintf("\n"+scheme+"\n@media (prefers-color-scheme: dark){"+scheme+"}\n",
		light.Hex(), light.BlendRgb(black, .3).Hex(), light.BlendRgb(white, .88).Hex(),
		dark.Hex(), dark.BlendRgb(white, .4).Hex(), darkCard.BlendRgb(dark, .15).Hex())
	return style, fmt.Appendf(nil, symbolSVG, light.Hex(), dark.Hex()), nil
}

// look is how a page is rendered.
type look struct {
	*Site
	code    string   // its language
	request *url.URL // of the page itself; nil: it has no switch of languages
}

type lookKey struct{}

// Context returns a context whose pages are rendered in the language with this code; each page needs one. Their switch
// of languages leads to the same page again, if r has asked for it; an answer to a form has no switch, as what was
// typed would be lost.
func (s *Site) Context(ctx context.Context, code string, r *http.Request) context.Context {
	l := look{Site: s, code: code}
	if r != nil && r.Method != http.MethodPost {
		l.request = r.URL
	}
	return context.WithValue(ctx, lookKey{}, l)
}

func lookOf(ctx context.Context) look { return ctx.Value(lookKey{}).(look) }

// in is the address of the page in another language.
func (l look) in(code string) templ.SafeURL {
	query := l.request.Query()
	query.Set("lang", code)
	return templ.SafeURL("?" + query.Encode())
}

// title is what the pages are called.
func (l look) title(ctx context.Context) string { return cmp.Or(l.name, t(ctx, "Your account")) }
