package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// enough is an environment with what is required and nothing else.
var enough = map[string]string{
	"DATABASE_URL": "postgres://auth:s3cret-db@db/auth", "KEYCLOAK_URL": "http://keycloak:8080/", "KEYCLOAK_REALM": "people",
	"KEYCLOAK_AUTH_CLIENT_ID": "auth-client", "KEYCLOAK_BACKEND_CLIENT_ID": "backend-admin",
	"KEYCLOAK_BACKEND_CLIENT_SECRET": "s3cret-client",
}

// environment is enough with changes; an empty value removes a variable.
func environment(changes map[string]string) func(string) string {
	all := maps.Clone(enough)
	maps.Copy(all, changes)
	return func(name string) string { return all[name] }
}

func TestConfigValues(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "secret")
	if err := os.WriteFile(file, []byte(" host=s3cret-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for variable, c := range map[string]struct{ set, field, unset, want string }{
		"DATABASE_URL":                        {"host=other dbname=x", "DatabaseURL", "postgres://auth:s3cret-db@db/auth", "host=other dbname=x"},
		"KEYCLOAK_URL":                        {"https://id.example/auth//", "KeycloakURL", "http://keycloak:8080", "https://id.example/auth"},
		"KEYCLOAK_PUBLIC_URL":                 {"https://id.example/", "KeycloakPublicURL", "http://keycloak:8080", "https://id.example"},
		"KEYCLOAK_REALM":                      {"other", "KeycloakRealm", "people", "other"},
		"KEYCLOAK_AUTH_CLIENT_ID":             {"other", "AuthClientID", "auth-client", "other"},
		"KEYCLOAK_BACKEND_CLIENT_ID":          {"other", "BackendClientID", "backend-admin", "other"},
		"KEYCLOAK_BACKEND_CLIENT_SECRET":      {"other", "BackendClientSecret", "s3cret-client", "other"},
		"KEYCLOAK_BACKEND_CLIENT_SECRET_FILE": {file, "BackendClientSecret", "s3cret-client", "host=s3cret-file"},
		"DATABASE_URL_FILE":                   {file, "DatabaseURL", "postgres://auth:s3cret-db@db/auth", "host=s3cret-file"},
		"SERVER_HOST":                         {"::1", "Host", "0.0.0.0", "::1"},
		"SERVER_PORT":                         {"8443", "Port", "3000", "8443"},
		"PUBLIC_URL":                          {"https://a.example/", "PublicURL", "http://localhost:3000", "https://a.example"},
		"SHUTDOWN_DELAY":                      {"0s", "ShutdownDelay", "5s", "0s"},
		"IDLE_TIMEOUT":                        {"90s", "IdleTimeout", "11m0s", "1m30s"},
		"MANAGEMENT_ADDR":                     {":1", "ManagementAddr", "127.0.0.1:9090", ":1"},
		"CORS_ALLOWED_ORIGINS":                {"https://a.example,https://b.example", "CORSOrigins", "[]", "[https://a.example https://b.example]"},
		"TRUSTED_PROXIES":                     {"10.0.0.0/8,fd00::/8", "TrustedProxies", "[]", "[10.0.0.0/8 fd00::/8]"},
		"LOG_LEVEL":                           {"WARN", "logLevel", "INFO", "WARN"},
		"RUST_LOG":                            {"hyper=error,trace", "logLevel", "INFO", "DEBUG"},
		"LOG_FORMAT":                          {"text", "LogFormat", "json", "text"},
		"VERIFICATION_TTL":                    {"1h30m", "VerificationTTL", "24h0m0s", "1h30m0s"},
		"RESEND_COOLDOWN":                     {"5s", "ResendCooldown", "1m0s", "5s"},
		"RESEND_LIMIT":                        {"1", "ResendLimit", "5", "1"},
		"REGISTRATION":                        {"invited", "Registration", "open", "invited"},
		"REGISTRATION_DOMAINS":                {"Example.com, bu\u0308cher.example", "RegistrationDomains", "[]", "[example.com xn--bcher-kva.example]"},
		"REFRESH_GRACE":                       {"1s", "RefreshGrace", "10s", "1s"},
		"JOB_INTERVAL":                        {"0s", "JobInterval", "30s", "0s"},
		"SYNC_MAX_SHARE":                      {"0", "SyncMaxShare", "10", "0"},
	} {
		got := func(changes map[string]string) string {
			cfg, err := loadConfig(environment(changes))
			if err != nil {
				t.Errorf("%s: %v", variable, err)
			}
			switch v := reflect.ValueOf(cfg).FieldByName(c.field); {
			case c.field == "logLevel":
				return cfg.logLevel.String()
			case v.Type() == reflect.TypeFor[secret]():
				return v.String() // fmt would redact it
			default:
				return fmt.Sprint(v)
			}
		}
		set := map[string]string{variable: c.set}
		if name, ok := strings.CutSuffix(variable, "_FILE"); ok {
			set[name] = ""
		}
		if unset, set := got(nil), got(set); unset != c.unset || set != c.want {
			t.Errorf("%s: unset %q, set %q; want %q, %q", variable, unset, set, c.unset, c.want)
		}
	}
}

func TestConfigMistakes(t *testing.T) {
	notURL := func(name string) string {
		const url = " must be a URL that begins with http:// or https:// and has no "
		if name == "PUBLIC_URL" {
			return name + url + "path, user, query or fragment"
		}
		return name + url + "user, query or fragment"
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte(" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		changes map[string]string
		want    []string // one line each, sorted
	}{
		{"who may register", map[string]string{"REGISTRATION": "closed", "REGISTRATION_DOMAINS": "localhost,a@b.example,*.example.com,ok.example"},
			[]string{"REGISTRATION must be open or invited", `REGISTRATION_DOMAINS: "*.example.com" is not a mail domain`,
				`REGISTRATION_DOMAINS: "a@b.example" is not a mail domain`, `REGISTRATION_DOMAINS: "localhost" is not a mail domain`}},
		{"nothing at all", map[string]string{"DATABASE_URL": "", "KEYCLOAK_URL": "", "KEYCLOAK_REALM": "", "KEYCLOAK_AUTH_CLIENT_ID": "",
			"KEYCLOAK_BACKEND_CLIENT_ID": "", "KEYCLOAK_BACKEND_CLIENT_SECRET": ""},
			[]string{"DATABASE_URL is required", "KEYCLOAK_AUTH_CLIENT_ID is required", "KEYCLOAK_BACKEND_CLIENT_ID is required",
				"KEYCLOAK_BACKEND_CLIENT_SECRET is required", "KEYCLOAK_REALM is required", "KEYCLOAK_URL is required"}},
		{"everything wrong", map[string]string{"DATABASE_URL": "postgres://auth:s3cret-db@db:port/auth", "KEYCLOAK_URL": "keycloak:8080",
			"KEYCLOAK_PUBLIC_URL": "ftp://id.example", "PUBLIC_URL": "https://", "SERVER_PORT": "70000", "TRUSTED_PROXIES": "10.0.0.1",
			"CORS_ALLOWED_ORIGINS": "app.example", "MANAGEMENT_ADDR": "9090", "TLS_CERT_FILE": "cert.pem", "LOG_LEVEL": "loud", "LOG_FORMAT": "xml",
			"VERIFICATION_TTL": "-1h", "RESEND_COOLDOWN": "0s", "REFRESH_GRACE": "0s", "RESEND_LIMIT": "0", "JOB_INTERVAL": "soon"},
			[]string{"CORS_ALLOWED_ORIGINS: …", "DATABASE_URL is not a connection string that PostgreSQL's driver understands", "JOB_INTERVAL: …",
				notURL("KEYCLOAK_PUBLIC_URL"), notURL("KEYCLOAK_URL"),
				"LOG_FORMAT must be json or text", "LOG_LEVEL must be debug, info, warn or error", "MANAGEMENT_ADDR: …",
				notURL("PUBLIC_URL"), "REFRESH_GRACE must be longer than 0", "RESEND_COOLDOWN must be longer than 0",
				"RESEND_LIMIT must be at least 1", "SERVER_PORT: …", "TLS_CERT_FILE and TLS_KEY_FILE must be set together", "TRUSTED_PROXIES: …",
				"VERIFICATION_TTL must be longer than 0"}},
		{"a secret from two places", map[string]string{"DATABASE_URL_FILE": empty},
			[]string{"DATABASE_URL and DATABASE_URL_FILE are both set; use one"}},
		{"secret files", map[string]string{"DATABASE_URL": "", "DATABASE_URL_FILE": empty, "KEYCLOAK_BACKEND_CLIENT_SECRET": "",
			"KEYCLOAK_BACKEND_CLIENT_SECRET_FILE": "/does/not/exist"},
			[]string{"DATABASE_URL_FILE: …", "KEYCLOAK_BACKEND_CLIENT_SECRET_FILE: …"}},
		{"TLS files", map[string]string{"TLS_CERT_FILE": empty, "TLS_KEY_FILE": "/does/not/exist"}, []string{"TLS_CERT_FILE, TLS_KEY_FILE: …"}},
		{"beyond the limits", map[string]string{"JOB_INTERVAL": "-1s", "SYNC_MAX_SHARE": "101", "SHUTDOWN_DELAY": "-1s", "IDLE_TIMEOUT": "0s"},
			[]string{"IDLE_TIMEOUT must be longer than 0", "JOB_INTERVAL must not be negative", "SHUTDOWN_DELAY must not be negative", "SYNC_MAX_SHARE must be between 0 and 100"}},
		{"a path", map[string]string{"PUBLIC_URL": "https://a.example/accounts/"}, []string{notURL("PUBLIC_URL")}},
		{"queries", map[string]string{"PUBLIC_URL": "https://a.example?x", "KEYCLOAK_URL": "http://keycloak:8080/auth?", "KEYCLOAK_PUBLIC_URL": "HTTPS://id.example"},
			[]string{notURL("KEYCLOAK_PUBLIC_URL"), notURL("KEYCLOAK_URL"), notURL("PUBLIC_URL")}},
		{"fragments", map[string]string{"PUBLIC_URL": "https://a.example/#", "KEYCLOAK_URL": "http://keycloak:8080/auth#x", "KEYCLOAK_PUBLIC_URL": "https://:443"},
			[]string{notURL("KEYCLOAK_PUBLIC_URL"), notURL("KEYCLOAK_URL"), notURL("PUBLIC_URL")}},
		{"users", map[string]string{"PUBLIC_URL": "https://me@a.example", "KEYCLOAK_URL": "http://me:s3cret@keycloak:8080"},
			[]string{notURL("KEYCLOAK_URL"), notURL("PUBLIC_URL")}},
		{"brand", map[string]string{"APP_COLOR": "#ffcc00", "APP_LOGO_FILE": "go.mod", "PRIVACY_URL": "/privacy", "TERMS_URL": "javascript:alert(1)",
			"LANGUAGES_DIR": filepath.Dir(empty)},
			[]string{"APP_COLOR: #ffcc00 has a contrast of 1.3:1 on the page and needs 4.5:1; #7f6600 has it",
				"APP_LOGO_FILE: must be an .svg, .png, .jpg or .webp file of at most 512 KiB",
				"LANGUAGES_DIR: there is no file like de.json", "PRIVACY_URL: must be a URL that begins with http:// or https://",
				"TERMS_URL: must be a URL that begins with http:// or https://"}},
		{"RUST_LOG", map[string]string{"RUST_LOG": "loud"}, []string{"RUST_LOG must be debug, info, warn or error"}},
	} {
		var stdout, stderr bytes.Buffer
		err := run(t.Context(), nil, environment(c.changes), &stdout, &stderr)
		if err == nil || stdout.Len()+stderr.Len() > 0 {
			t.Errorf("%s: error %v, output %s%s", c.name, err, &stdout, &stderr)
			continue
		}
		heading, list, _ := strings.Cut(err.Error(), "\n")
		if heading != "the configuration is wrong:" || strings.Contains(list, "s3cret") {
			t.Errorf("%s: %v", c.name, err)
		}
		lines := strings.Split(list, "\n")
		for i, line := range lines { // the words of libraries are theirs
			for _, want := range c.want {
				if name, ok := strings.CutSuffix(want, "…"); ok && strings.HasPrefix(line, name) {
					lines[i] = want
				}
			}
		}
		slices.Sort(lines)
		if diff := cmp.Diff(c.want, lines); diff != "" {
			t.Errorf("%s (-want +got):\n%s\n%v", c.name, diff, err)
		}
	}
}

// Whatever prints a configuration prints no secret.
func TestSecretsAreNeverPrinted(t *testing.T) {
	cfg, err := loadConfig(environment(nil))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, v := range []any{cfg, &cfg, cfg.DatabaseURL, &cfg.DatabaseURL, []secret{cfg.BackendClientSecret},
		map[string]secret{"x": cfg.BackendClientSecret}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).Info("starting", "config", v, slog.Group("g", "v", v))
		}
		if encoded, err := json.Marshal(v); err == nil {
			out.Write(encoded)
		}
	}
	hex := fmt.Sprintf("%x", "s3cret")
	if text := out.String(); strings.Contains(text, "s3cret") || strings.Contains(text, hex) || !strings.Contains(text, "[redacted]") {
		i := max(strings.Index(text, "s3cret"), strings.Index(text, hex))
		t.Errorf("a secret is printed: …%s", text[max(0, i-150):min(len(text), max(i, 0)+50)])
	}
}
