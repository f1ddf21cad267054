package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"auth-service/templates"

	envparse "github.com/caarlos0/env/v11"
	"github.com/jackc/pgx/v5/pgxpool"
)

// config is what the environment says. Every variable NAME that holds a secret
// may be given as NAME_FILE instead, the path of a file with the value.
type config struct {
	// DatabaseURL is PostgreSQL's connection string; of several hosts the one that
	// takes writes is used. Required.
	DatabaseURL secret `env:"DATABASE_URL,required"`

	// KeycloakURL is where this service reaches Keycloak, without /realms. Required.
	KeycloakURL string `env:"KEYCLOAK_URL,required"`
	// KeycloakPublicURL is where browsers reach Keycloak; it is also the iss of
	// every token. Default: KEYCLOAK_URL.
	KeycloakPublicURL string `env:"KEYCLOAK_PUBLIC_URL"`
	// KeycloakRealm is the realm of the users. Required.
	KeycloakRealm string `env:"KEYCLOAK_REALM,required"`
	// AuthClientID is the client that people sign in to. Required.
	AuthClientID string `env:"KEYCLOAK_AUTH_CLIENT_ID,required"`
	// AuthClientSecret makes that a confidential client, so that nobody gets or exchanges tokens at
	// Keycloak past this service. Recommended in production. Default: none, a public client.
	AuthClientSecret secret `env:"KEYCLOAK_AUTH_CLIENT_SECRET"`
	// BackendClientID and BackendClientSecret are the service account that
	// manages users. Required.
	BackendClientID     string `env:"KEYCLOAK_BACKEND_CLIENT_ID,required"`
	BackendClientSecret secret `env:"KEYCLOAK_BACKEND_CLIENT_SECRET,required"`

	// Host and Port are the address of the API and the pages. Default: 0.0.0.0, 3000.
	Host string `env:"SERVER_HOST" envDefault:"0.0.0.0"`
	Port uint16 `env:"SERVER_PORT" envDefault:"3000"`
	// PublicURL is where people reach this service; the link in the mail begins
	// with it. Default: http://localhost:3000.
	PublicURL string `env:"PUBLIC_URL" envDefault:"http://localhost:3000"`
	// ManagementAddr serves /livez, /readyz, /metrics and pprof; never expose it.
	// Default: 127.0.0.1:9090.
	ManagementAddr string `env:"MANAGEMENT_ADDR" envDefault:"127.0.0.1:9090"`
	// ShutdownDelay is how long this instance serves on after SIGTERM while /readyz says 503: longer than
	// a load balancer takes to notice. Default: 5s.
	ShutdownDelay time.Duration `env:"SHUTDOWN_DELAY" envDefault:"5s"`
	// IdleTimeout is how long a connection is kept without a request: longer than the load balancer keeps
	// it, or requests meet a connection that is just being closed. Default: 11m, as some keep theirs for 10.
	IdleTimeout time.Duration `env:"IDLE_TIMEOUT" envDefault:"11m"`
	// TLSCertFile and TLSKeyFile make the API speak HTTPS. They are read again when they are renewed.
	// Default: none, plain HTTP.
	TLSCertFile string `env:"TLS_CERT_FILE"`
	TLSKeyFile  string `env:"TLS_KEY_FILE"`
	// CORSOrigins are the frontends' origins, comma separated, each in full: they may
	// read answers, use the cookie, and be returned to after signing in. Default: none.
	CORSOrigins []string `env:"CORS_ALLOWED_ORIGINS"`
	// TrustedProxies are the networks (CIDR) whose X-Forwarded-For is believed.
	// Too wide, and everybody chooses the address that limits count. Default: none.
	TrustedProxies []netip.Prefix `env:"TRUSTED_PROXIES"`

	// LogLevel is debug, info, warn or error; RUST_LOG is accepted too. From warn on the log
	// is no evidence of the audit log: its entries are logged as info. Default: info.
	LogLevel string `env:"LOG_LEVEL"`
	// LogFormat is json or text. Default: json.
	LogFormat string `env:"LOG_FORMAT" envDefault:"json"`

	// VerificationTTL is how long a registration waits for its confirmation. Default: 24h.
	VerificationTTL time.Duration `env:"VERIFICATION_TTL" envDefault:"24h"`
	// InvitationTTL is how long an invitation waits for its confirmation. Default: 168h.
	InvitationTTL time.Duration `env:"INVITATION_TTL" envDefault:"168h"`
	// ResendCooldown is the shortest time between two mails to an address. Default: 60s.
	ResendCooldown time.Duration `env:"RESEND_COOLDOWN" envDefault:"60s"`
	// ResendLimit is how many mails one registration gets, the first included. Default: 5.
	ResendLimit int `env:"RESEND_LIMIT" envDefault:"5"`
	// Registration is open, or invited: only people who are invited get an account. What has begun already goes
	// on. Default: open.
	Registration string `env:"REGISTRATION" envDefault:"open"`
	// RegistrationDomains are the mail domains whose people may register themselves, comma separated; a subdomain
	// is another domain. Invitations go to any. Default: none, all may.
	RegistrationDomains []string `env:"REGISTRATION_DOMAINS"`
	// RefreshGrace is how long a rotated refresh token still gets the answer of
	// its rotation. Default: 10s.
	RefreshGrace time.Duration `env:"REFRESH_GRACE" envDefault:"10s"`
	// JobInterval is the pause between two runs of recurring jobs; 0 = this instance
	// does no work of the queue. Default: 30s.
	JobInterval time.Duration `env:"JOB_INTERVAL" envDefault:"30s"`
	// SyncMaxShare is how many users in a hundred a sync may disable or import at
	// once; more, and it stops before it changes anything. Default: 10.
	SyncMaxShare int `env:"SYNC_MAX_SHARE" envDefault:"10"`

	// Brand has APP_NAME, APP_LOGO_FILE, APP_COLOR, PRIVACY_URL, TERMS_URL, IMPRINT_URL and LANGUAGES_DIR.
	templates.Brand

	site     *templates.Site
	logLevel slog.Level
}

// issuer is the iss of the realm's tokens, and where browsers reach the realm.
func (cfg config) issuer() string { return cfg.KeycloakPublicURL + "/realms/" + cfg.KeycloakRealm }

const invitedOnly = "invited" // Registration

// mayRegister says whether somebody with an address may register without an invitation.
func (cfg config) mayRegister(email string) error {
	_, domain, _ := strings.Cut(email, "@")
	switch {
	case cfg.Registration == invitedOnly:
		return problemRegistrationClosed
	case len(cfg.RegistrationDomains) > 0 && !slices.Contains(cfg.RegistrationDomains, domain):
		return problemRegistrationClosed.withDetail("People with this e-mail address don't register themselves here. " +
			"Use another address, or ask for an invitation.")
	}
	return nil
}

// https says whether people reach the service by TLS, ours or a proxy's.
func (cfg config) https() bool { return strings.HasPrefix(cfg.PublicURL, "https://") }

// origin is the scheme, host and port of a URL, as browsers spell it (RFC 6454 §6.1).
func origin(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	defaultPort := map[string]string{"http": ":80", "https": ":443"}[u.Scheme]
	return u.Scheme + "://" + strings.TrimSuffix(strings.ToLower(u.Host), defaultPort)
}

// secret is a value that must never be printed.
type secret string

func (secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, "[redacted]") } // whatever the verb
func (secret) LogValue() slog.Value         { return slog.StringValue("[redacted]") }
func (secret) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// loadConfig reads the configuration through getenv. All mistakes are reported
// at once, each in a line that names its variable and never quotes a secret.
func loadConfig(getenv func(string) string) (config, error) {
	var cfg config
	var mistakes []error
	must := func(ok bool, format string, args ...any) {
		if !ok {
			mistakes = append(mistakes, fmt.Errorf(format, args...))
		}
	}

	environment := map[string]string{}
	variables := map[string]string{} // field name → variable
	for _, f := range reflect.VisibleFields(reflect.TypeFor[config]()) {
		name, _, _ := strings.Cut(f.Tag.Get("env"), ",")
		value := getenv(name)
		if f.Type == reflect.TypeFor[secret]() {
			var err error
			value, err = secretValue(name, value, name+"_FILE", getenv(name+"_FILE"))
			must(err == nil, "%w", err)
		}
		if variables[f.Name] = name; value != "" {
			environment[name] = value
		}
	}
	var aggregate envparse.AggregateError
	errors.As(envparse.ParseWithOptions(&cfg, envparse.Options{Environment: environment}), &aggregate)
	for _, err := range aggregate.Errors {
		var missing envparse.VarIsNotSetError
		var parse envparse.ParseError
		switch {
		case errors.As(err, &missing):
			err = fmt.Errorf("%s is required", missing.Key)
		case errors.As(err, &parse):
			err = fmt.Errorf("%s: %w", variables[parse.Name], parse.Err)
		}
		must(false, "%w", err)
	}
	cfg.check(getenv, must)
	return cfg, errors.Join(mistakes...)
}

// secretValue returns the value of a secret's variable or the content of its file. Both at once
// is a mistake: nobody could tell which one counts. With an error it returns a value that raises
// no second one.
func secretValue(name, value, fileName, file string) (string, error) {
	const unreadable = "host=unreadable"
	switch {
	case file == "":
		return value, nil
	case value != "":
		return unreadable, fmt.Errorf("%s and %s are both set; use one", name, fileName)
	}
	content, err := os.ReadFile(file) // #nosec G304 -- the operator names it
	if err != nil {
		return unreadable, fmt.Errorf("%s: %w", fileName, err)
	}
	if value = strings.TrimSpace(string(content)); value == "" {
		return unreadable, fmt.Errorf("%s: %s is empty", fileName, file)
	}
	return value, nil
}

// check finds what the types can't, and fills in what follows from other values.
func (cfg *config) check(getenv func(string) string, must func(ok bool, format string, args ...any)) {
	_, err := pgxpool.ParseConfig(string(cfg.DatabaseURL)) // err may quote it
	must(err == nil, "DATABASE_URL is not a connection string that PostgreSQL's driver understands")
	for name, value := range map[string]*string{
		"KEYCLOAK_URL": &cfg.KeycloakURL, "KEYCLOAK_PUBLIC_URL": &cfg.KeycloakPublicURL, "PUBLIC_URL": &cfg.PublicURL,
	} {
		*value = strings.TrimRight(*value, "/")
		u, err := url.Parse(*value)
		if err != nil {
			u = new(url.URL)
		}
		plain, others := u.Scheme+"://"+u.Host, "path, user, query or fragment"
		if name != "PUBLIC_URL" { // Keycloak may be below a path
			plain, others = plain+u.EscapedPath(), "user, query or fragment"
		}
		must(*value == "" || *value == plain && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "",
			"%s must be a URL that begins with http:// or https:// and has no %s", name, others)
	}
	cfg.KeycloakPublicURL = cmp.Or(cfg.KeycloakPublicURL, cfg.KeycloakURL)
	if both := cfg.TLSCertFile != "" && cfg.TLSKeyFile != ""; both {
		_, err := tls.LoadX509KeyPair(cfg.TLSCertFile, cfg.TLSKeyFile)
		must(err == nil, "TLS_CERT_FILE, TLS_KEY_FILE: %w", err)
	} else {
		must(cfg.TLSCertFile+cfg.TLSKeyFile == "", "TLS_CERT_FILE and TLS_KEY_FILE must be set together")
	}
	_, err = newCORS(cfg.CORSOrigins)
	must(err == nil, "CORS_ALLOWED_ORIGINS: %w", err)
	must(!strings.Contains(strings.Join(cfg.CORSOrigins, ""), "*"),
		"CORS_ALLOWED_ORIGINS must list each origin in full, without *")
	_, _, err = net.SplitHostPort(cfg.ManagementAddr)
	must(err == nil, "MANAGEMENT_ADDR: %w", err)
	for name, d := range map[string]time.Duration{
		"VERIFICATION_TTL": cfg.VerificationTTL, "INVITATION_TTL": cfg.InvitationTTL,
		"RESEND_COOLDOWN": cfg.ResendCooldown, "REFRESH_GRACE": cfg.RefreshGrace, "IDLE_TIMEOUT": cfg.IdleTimeout,
	} {
		must(d > 0, "%s must be longer than 0", name)
	}
	cfg.site, err = templates.NewSite(cfg.Brand)
	must(err == nil, "%w", err)
	must(cfg.Registration == "open" || cfg.Registration == invitedOnly, "REGISTRATION must be open or invited")
	for i, domain := range cfg.RegistrationDomains {
		cfg.RegistrationDomains[i], err = mailDomain(strings.TrimSpace(domain))
		must(err == nil && strings.Contains(domain, "."), "REGISTRATION_DOMAINS: %q is not a mail domain", domain)
	}
	must(cfg.ResendLimit >= 1, "RESEND_LIMIT must be at least 1")
	must(cfg.ShutdownDelay >= 0, "SHUTDOWN_DELAY must not be negative")
	must(cfg.JobInterval >= 0, "JOB_INTERVAL must not be negative")
	must(cfg.SyncMaxShare >= 0 && cfg.SyncMaxShare <= 100, "SYNC_MAX_SHARE must be between 0 and 100")
	must(cfg.LogFormat == "json" || cfg.LogFormat == "text", "LOG_FORMAT must be json or text")

	level, name := cfg.LogLevel, "LOG_LEVEL"
	if level == "" {
		// RUST_LOG may list targets ("info,hyper=warn"); the part without one is the level.
		name = "RUST_LOG"
		for part := range strings.SplitSeq(getenv("RUST_LOG"), ",") {
			if part != "" && !strings.Contains(part, "=") {
				level = strings.Replace(part, "trace", "debug", 1)
			}
		}
	}
	must(level == "" || cfg.logLevel.UnmarshalText([]byte(level)) == nil, "%s must be debug, info, warn or error", name)
}
