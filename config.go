package main

import (
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

	envparse "github.com/caarlos0/env/v11"
	"github.com/jackc/pgx/v5/pgxpool"
)

// config is what the environment says. Every variable NAME that holds a secret
// may be given as NAME_FILE instead, the path of a file with the value.
type config struct {
	// DatabaseURL is PostgreSQL's connection string; several hosts and
	// target_session_attrs=read-write follow a failover. Required.
	DatabaseURL secret `env:"DATABASE_URL,required"`

	// KeycloakURL is where this service reaches Keycloak, without /realms. Required.
	KeycloakURL string `env:"KEYCLOAK_URL,required"`
	// KeycloakPublicURL is where browsers reach Keycloak; it is also the iss of
	// every token. Default: KEYCLOAK_URL.
	KeycloakPublicURL string `env:"KEYCLOAK_PUBLIC_URL"`
	// KeycloakRealm is the realm of the users. Required.
	KeycloakRealm string `env:"KEYCLOAK_REALM,required"`
	// AuthClientID is the public client that people sign in to. Required.
	AuthClientID string `env:"KEYCLOAK_AUTH_CLIENT_ID,required"`
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
	// TLSCertFile and TLSKeyFile make the API speak HTTPS. Default: none, plain HTTP.
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
	// RefreshGrace is how long a rotated refresh token still gets the answer of
	// its rotation. Default: 10s.
	RefreshGrace time.Duration `env:"REFRESH_GRACE" envDefault:"10s"`
	// JobInterval is the pause between two runs of recurring jobs; 0 = this instance
	// does no work of the queue. Default: 30s.
	JobInterval time.Duration `env:"JOB_INTERVAL" envDefault:"30s"`
	// SyncMaxShare is how many users in a hundred a sync may disable or import at
	// once; more, and it stops before it changes anything. Default: 10.
	SyncMaxShare int `env:"SYNC_MAX_SHARE" envDefault:"10"`

	logLevel slog.Level
}

// issuer is the iss of the realm's tokens, and where browsers reach the realm.
func (cfg config) issuer() string { return cfg.KeycloakPublicURL + "/realms/" + cfg.KeycloakRealm }

// https says whether people reach the service by TLS, ours or a proxy's.
func (cfg config) https() bool { return strings.HasPrefix(cfg.PublicURL, "https://") }

// origin is the scheme, host and port of a URL (RFC 6454 §6.1).
func origin(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

// secret is a value that must never be printed.
type secret string

func (secret) Format(f fmt.State, _ rune)   { io.WriteString(f, "[redacted]") } // whatever the verb
func (secret) LogValue() slog.Value         { return slog.StringValue("[redacted]") }
func (secret) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// loadConfig reads the configuration through getenv. All mistakes are reported
// at once, each in a line that names its variable and never quotes a secret.
func loadConfig(getenv func(string) string) (config, error) {
	var cfg config
	var mistakes []error
	wrong := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }

	environment := map[string]string{}
	variables := map[string]string{} // field name → variable
	for _, f := range reflect.VisibleFields(reflect.TypeFor[config]()) {
		name, _, _ := strings.Cut(f.Tag.Get("env"), ",")
		if name == "" {
			continue
		}
		variables[f.Name] = name
		value := getenv(name)
		if f.Type == reflect.TypeFor[secret]() {
			var err error
			if value, err = secretValue(name, value, getenv(name+"_FILE")); err != nil {
				wrong("%w", err)
				value = "unreadable" // reported already; not also "required"
			}
		}
		if value != "" {
			environment[name] = value
		}
	}

	var aggregate envparse.AggregateError
	if err := envparse.ParseWithOptions(&cfg, envparse.Options{Environment: environment}); errors.As(err, &aggregate) {
		for _, e := range aggregate.Errors {
			var missing envparse.VarIsNotSetError
			var parse envparse.ParseError
			switch {
			case errors.As(e, &missing):
				wrong("%s is required", missing.Key)
			case errors.As(e, &parse):
				wrong("%s: %w", variables[parse.Name], parse.Err)
			default:
				wrong("%w", e)
			}
		}
	} else if err != nil {
		wrong("%w", err)
	}

	cfg.check(getenv, wrong)
	return cfg, errors.Join(mistakes...)
}

// secretValue returns the value of a secret's variable or the content of its
// file. Both at once is a mistake: nobody could tell which one counts.
func secretValue(name, value, file string) (string, error) {
	switch {
	case file == "":
		return value, nil
	case value != "":
		return "", fmt.Errorf("%s and %s_FILE are both set; use one", name, name)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	if value = strings.TrimSpace(string(content)); value == "" {
		return "", fmt.Errorf("%s_FILE: %s is empty", name, file)
	}
	return value, nil
}

// check finds what the types can't, and fills in what follows from other values.
func (cfg *config) check(getenv func(string) string, wrong func(string, ...any)) {
	if cfg.DatabaseURL != "" && cfg.DatabaseURL != "unreadable" {
		if _, err := pgxpool.ParseConfig(string(cfg.DatabaseURL)); err != nil {
			wrong("DATABASE_URL is not a connection string that PostgreSQL's driver understands") // err may quote it
		}
	}
	if cfg.KeycloakPublicURL == "" {
		cfg.KeycloakPublicURL = cfg.KeycloakURL
	}
	for name, value := range map[string]*string{
		"KEYCLOAK_URL": &cfg.KeycloakURL, "KEYCLOAK_PUBLIC_URL": &cfg.KeycloakPublicURL, "PUBLIC_URL": &cfg.PublicURL,
	} {
		*value = strings.TrimRight(*value, "/")
		if *value == "" {
			continue // reported as required already
		}
		if u, err := url.Parse(*value); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			wrong("%s must be a URL that begins with http:// or https://", name)
		}
	}
	if (cfg.TLSCertFile == "") != (cfg.TLSKeyFile == "") {
		wrong("TLS_CERT_FILE and TLS_KEY_FILE must be set together")
	} else if cfg.TLSCertFile != "" {
		if _, err := tls.LoadX509KeyPair(cfg.TLSCertFile, cfg.TLSKeyFile); err != nil {
			wrong("TLS_CERT_FILE, TLS_KEY_FILE: %w", err)
		}
	}
	if _, err := newCORS(cfg.CORSOrigins); err != nil {
		wrong("CORS_ALLOWED_ORIGINS: %w", err)
	}
	if slices.ContainsFunc(cfg.CORSOrigins, func(origin string) bool { return strings.Contains(origin, "*") }) {
		wrong("CORS_ALLOWED_ORIGINS must list each origin in full, without *")
	}
	if _, _, err := net.SplitHostPort(cfg.ManagementAddr); err != nil {
		wrong("MANAGEMENT_ADDR: %w", err)
	}
	if cfg.LogFormat != "json" && cfg.LogFormat != "text" {
		wrong("LOG_FORMAT must be json or text")
	}
	for name, d := range map[string]time.Duration{
		"VERIFICATION_TTL": cfg.VerificationTTL, "INVITATION_TTL": cfg.InvitationTTL, "RESEND_COOLDOWN": cfg.ResendCooldown, "REFRESH_GRACE": cfg.RefreshGrace,
	} {
		if d <= 0 {
			wrong("%s must be longer than 0", name)
		}
	}
	if cfg.ResendLimit < 1 {
		wrong("RESEND_LIMIT must be at least 1")
	}
	if cfg.JobInterval < 0 {
		wrong("JOB_INTERVAL must not be negative")
	}
	if cfg.SyncMaxShare < 0 || cfg.SyncMaxShare > 100 {
		wrong("SYNC_MAX_SHARE must be between 0 and 100")
	}

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
	if level != "" && cfg.logLevel.UnmarshalText([]byte(level)) != nil {
		wrong("%s must be debug, info, warn or error", name)
	}
}
