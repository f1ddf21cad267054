package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/jackc/pgx/v5/pgconn"
)

// The doctor looks at a deployment and says what is wrong with it and how to mend it. It
// changes nothing. Some settings of the realm are shown to an administrator of Keycloak
// only; without one they could not be checked, which is not the same as fine.

// finding is one line of the doctor's report.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`           // ok, wrong, advice, unknown
	Detail string `json:"detail,omitempty"` // what is wrong, or why it could not be checked
	Mend   string `json:"mend,omitempty"`
}

const mostSkew = 10 * time.Second // between two clocks

// errUnwell ends the program with status 1, after the report has said everything.
var errUnwell = errors.New("something is wrong with this deployment")

// doctor checks a deployment.
type doctor struct {
	s        *server
	findings []finding
}

// see reports one thing: fine, or what is wrong with it.
func (d *doctor) see(name string, fine bool, detail, mend string) bool {
	if fine {
		d.findings = append(d.findings, finding{Name: name, Status: "ok"})
	} else {
		d.findings = append(d.findings, finding{name, "wrong", detail, mend})
	}
	return fine
}

// advise reports what works and could be better.
func (d *doctor) advise(name string, fine bool, detail, mend string) {
	if !d.see(name, fine, detail, mend) {
		d.findings[len(d.findings)-1].Status = "advice"
	}
}

// unknown reports what could not be checked, and why.
func (d *doctor) unknown(why, mend string, names ...string) {
	for _, name := range names {
		d.findings = append(d.findings, finding{name, "unknown", "could not check: " + why, mend})
	}
}

// runDoctor reads the arguments, checks, and reports.
func runDoctor(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	flags := flag.NewFlagSet("auth-service doctor", flag.ContinueOnError)
	flags.SetOutput(out)
	asJSON := flags.Bool("json", false, "report in JSON")
	adminUser := flags.String("admin-user", "", "the `name` of an administrator of Keycloak's realm master")
	passwordFile := flags.String("admin-password-file", "", "the `file` with the administrator's password")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 || (*adminUser == "") != (*passwordFile == "") {
		return errors.New("doctor takes -json, and -admin-user together with -admin-password-file")
	}
	adminPassword, err := secretValue("-admin-password", "", *passwordFile)
	if err != nil {
		return err
	}
	d := &doctor{}
	cfg, err := loadConfig(getenv)
	if err == nil {
		d.see("variables", true, "", "")
		if d.s, err = newServer(ctx, cfg, newLogger(io.Discard, cfg)); err != nil {
			return err
		}
		defer d.s.store.pool.Close()
		d.check(ctx, *adminUser, adminPassword)
	} else {
		for mistake := range strings.SplitSeq(err.Error(), "\n") {
			d.see("variables", false, mistake, "README.md lists all variables.")
		}
	}
	return d.report(*asJSON, out)
}

func (d *doctor) check(ctx context.Context, adminUser, adminPassword string) {
	d.advise("PUBLIC_URL", d.s.cfg.https(), "it is not https: links, passwords and tokens can be read on the way",
		"Put TLS in front of the service, or set TLS_CERT_FILE and TLS_KEY_FILE.")
	d.checkPostgreSQL(ctx)
	if d.checkKeycloak(ctx) {
		d.checkRealm(ctx, adminUser, adminPassword)
	} else {
		for _, part := range realmParts {
			d.unknown("Keycloak does not answer", "", part.names()...)
		}
	}
}

// report writes all findings. To people, what could not be checked for one reason is one line.
func (d *doctor) report(asJSON bool, out io.Writer) error {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetIndent("", "  ")
	if asJSON {
		if err := encoder.Encode(d.findings); err != nil {
			return err
		}
	}
	for rest := d.findings; len(rest) > 0 && !asJSON; {
		f, n := rest[0], 1
		for f.Status == "unknown" && n < len(rest) && rest[n].Detail == f.Detail {
			n++
		}
		if n > 1 {
			f.Name = fmt.Sprintf("%d settings, from %q to %q", n, f.Name, rest[n-1].Name)
		}
		rest = rest[n:]
		fmt.Fprintf(&text, "%-8s %s", f.Status, f.Name)
		if f.Detail != "" {
			fmt.Fprintf(&text, ": %s", f.Detail)
		}
		fmt.Fprintln(&text)
		if f.Mend != "" {
			fmt.Fprintf(&text, "         → %s\n", f.Mend)
		}
	}
	if _, err := io.WriteString(out, text.String()); err != nil {
		return err
	}
	if slices.ContainsFunc(d.findings, func(f finding) bool { return f.Status == "wrong" }) {
		return errUnwell
	}
	return nil
}

// rights are what the service's role must be allowed to do.
var rights = map[string]string{
	"schema_version": "select", "users": "select, insert, update, delete",
	"user_registrations": "select, insert, update, delete",
	"sessions":           "select, insert, update, delete", "refresh_tokens": "select, insert, update, delete",
	"revocations": "select, insert, delete", "rate_limits": "select, insert, update, delete",
	"audit_log": "select, insert", "sync_cursor": "select, insert, update", "tasks": "select, insert, update, delete",
	"sync_runs": "select, insert, update",
}

// roleAdvice is how the service gets a role with these rights and no others.
const roleAdvice = "As the owner of the tables: create role auth_service login password '…', then run " +
	"\"auth-service migrate\", which gives it its rights; that role goes into the service's DATABASE_URL."

func (d *doctor) checkPostgreSQL(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	pool := d.s.store.pool
	var version int
	var now time.Time
	err := pool.QueryRow(ctx, `
		select current_setting('server_version_num')::int, clock_timestamp()`).Scan(&version, &now)
	if !d.see("PostgreSQL: reachable", err == nil, fmt.Sprint(storeError(err)),
		"Check DATABASE_URL, the network, and the role's password.") {
		d.unknown("PostgreSQL does not answer", "", "PostgreSQL: version", "PostgreSQL: clock", "PostgreSQL: schema",
			"PostgreSQL: rights", "PostgreSQL: record")
		return
	}
	d.see("PostgreSQL: version", version >= 150000, fmt.Sprintf("it is %d", version/10000), "Use 15 or newer.")
	d.checkClock("PostgreSQL: clock", d.s.now().Sub(now))

	var have int
	var pg *pgconn.PgError
	err = pool.QueryRow(ctx, `select version from schema_version`).Scan(&have)
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		d.unknown("the role may not read schema_version", roleAdvice, "PostgreSQL: schema")
	} else if !d.see("PostgreSQL: schema", err == nil && have == schemaVersion, "it is not this version's",
		"Run \"auth-service migrate\" as the owner of the tables. (A service that owns them does so when it starts.)") {
		d.unknown("the schema is not this version's", "", "PostgreSQL: rights", "PostgreSQL: record")
		return
	}
	var lacks string
	var mayAlter bool
	if err := pool.QueryRow(ctx, `
		select coalesce(string_agg(lack, ', ' order by lack), ''),
			(select pg_has_role(relowner, 'usage') or has_table_privilege(oid, 'update, delete, truncate')
			from pg_class where oid = 'audit_log'::regclass)
		from (
			select action || ' on ' || name as lack
			from jsonb_each_text($1) as needed (name, actions), regexp_split_to_table(actions, ', ') as action
			where not case action when 'delete' then has_table_privilege(name, action) else has_any_column_privilege(name, action) end
		) as lacks`, rights).Scan(&lacks, &mayAlter); err != nil {
		d.unknown(storeError(err).Error(), "", "PostgreSQL: rights", "PostgreSQL: record")
		return
	}
	d.see("PostgreSQL: rights", lacks == "", "the role lacks "+lacks, roleAdvice)
	d.advise("PostgreSQL: record", !mayAlter, "the service's role could change or delete what is on record", roleAdvice)
}

func (d *doctor) checkClock(name string, skew time.Duration) {
	skew = skew.Abs().Round(time.Second)
	d.see(name, skew < mostSkew, fmt.Sprintf("it differs from this machine's by %v", skew), "Run NTP on both machines.")
}

// checkKeycloak says whether Keycloak and the realm answer.
func (d *doctor) checkKeycloak(ctx context.Context) bool {
	kc, cfg := d.s.kc, d.s.cfg
	var discovery struct{ Issuer string }
	err := kc.getJSON(ctx, "discovery", keycloakTimeout, ".well-known/openid-configuration", &discovery)
	ofToken := []string{"Keycloak: algorithm", "Keycloak: clock", "Keycloak: service account's roles"}
	if !d.see("Keycloak: reachable", err == nil, fmt.Sprint(err),
		"Check KEYCLOAK_URL, KEYCLOAK_REALM and the network.") {
		d.unknown("Keycloak does not answer", "", "Keycloak: issuer", "Keycloak: service account")
		d.unknown("Keycloak does not answer", "", ofToken...)
		return false
	}
	d.see("Keycloak: issuer", discovery.Issuer == cfg.issuer(),
		fmt.Sprintf("tokens say %s, expected is %s", discovery.Issuer, cfg.issuer()),
		"Set KEYCLOAK_PUBLIC_URL to what Keycloak calls itself, or Keycloak's hostname to that.")
	token, err := kc.serviceToken(ctx)
	if !d.see("Keycloak: service account", err == nil, fmt.Sprint(err),
		"Check KEYCLOAK_BACKEND_CLIENT_ID and KEYCLOAK_BACKEND_CLIENT_SECRET, that the realm and that client are enabled, "+
			"and its \"Service account roles\" on.") {
		d.unknown("the service account can't sign in", "", ofToken...)
		return true
	}
	header, claims, err := readServiceToken(token)
	if err != nil {
		d.unknown("the service account's token can't be read", "", ofToken...)
		return true
	}
	d.see("Keycloak: algorithm", slices.Contains(tokenAlgorithms, header.Algorithm),
		"the realm signs tokens with "+string(header.Algorithm),
		"Realm settings → Tokens: set \"Default Signature Algorithm\" to RS256, PS256, ES256 or EdDSA.")
	d.checkClock("Keycloak: clock", d.s.now().Sub(time.Unix(claims.IssuedAt, 0))) // Keycloak sends no Date

	needed := []string{"manage-users", "view-events", "view-users"}
	has := slices.DeleteFunc(claims.Access["realm-management"].Roles, func(role string) bool {
		return role == "query-groups" || role == "query-users" // they are part of view-users
	})
	slices.Sort(has)
	d.see("Keycloak: service account's roles", slices.Equal(has, needed), "they are "+strings.Join(has, ", "),
		"Clients → "+cfg.BackendClientID+" → Service account roles: exactly "+strings.Join(needed, ", ")+" of realm-management.")
	return true
}

type serviceClaims struct {
	IssuedAt int64                               `json:"iat"`
	Access   map[string]struct{ Roles []string } `json:"resource_access"`
}

// readServiceToken reads a token whatever its algorithm: it comes from Keycloak itself.
func readServiceToken(token string) (header struct {
	Algorithm jose.SignatureAlgorithm `json:"alg"`
}, claims serviceClaims, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return header, claims, errors.New("it is no JWT")
	}
	for i, into := range []any{&header, &claims} {
		text, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err := errors.Join(err, json.Unmarshal(text, into)); err != nil {
			return header, claims, err
		}
	}
	return header, claims, nil
}
