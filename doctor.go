package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/jackc/pgx/v5/pgconn"
)

// The doctor checks a deployment: variables, PostgreSQL, Keycloak, and the realm against
// keycloak/realm.json. Only -fix changes something, and only settings of the realm.

// finding is one line of the doctor's report.
type finding struct {
	Name   string `json:"name"`             // of a setting of the realm: its path in keycloak/realm.json
	Status string `json:"status"`           // ok, wrong, warn, unknown; with -fix fixed, with -dry-run planned
	Is     string `json:"is,omitempty"`     // a setting's value in Keycloak
	Must   string `json:"must,omitempty"`   // the value that it must have
	Detail string `json:"detail,omitempty"` // what is wrong, or why it could not be checked
	Fix    string `json:"fix,omitempty"`    // what to do
}

// errUnhealthy ends the program with status 1, after the report.
var errUnhealthy = errors.New("something is wrong with this deployment")

// doctor checks a deployment.
type doctor struct {
	*invocation
	adminPassword string // "": check as the service account
	findings      []finding
}

// check reports a condition. If it is wrong, those that depend on it are unknown.
func (d *doctor) check(name string, ok bool, detail, fix string, dependent ...string) bool {
	if ok {
		d.findings = append(d.findings, finding{Name: name, Status: "ok"})
		return true
	}
	d.findings = append(d.findings, finding{Name: name, Status: "wrong", Detail: detail, Fix: fix})
	d.unknown(name+" is wrong", "", dependent...)
	return false
}

// warn reports a condition without which the service works, but less safely.
func (d *doctor) warn(name string, ok bool, detail, fix string) {
	if !d.check(name, ok, detail, fix) {
		d.findings[len(d.findings)-1].Status = "warn"
	}
}

// unknown reports what could not be checked, and why.
func (d *doctor) unknown(why, fix string, names ...string) {
	for _, name := range names {
		d.findings = append(d.findings, finding{Name: name, Status: "unknown", Detail: "could not check: " + why, Fix: fix})
	}
}

// doctor is the command. It returns errUnhealthy if something is wrong or planned.
func (in *invocation) doctor(ctx context.Context) (err error) {
	d := &doctor{invocation: in}
	if alone := d.adminPasswordFile == ""; alone != (d.adminUser == "") || d.fix && alone || d.dryRun && !d.fix {
		return fmt.Errorf("-admin-user and -admin-password-file belong together, -fix needs both, "+
			"and -dry-run needs -fix; %w", errUsage)
	}
	if d.adminPassword, err = secretValue("", "", "-admin-password-file", d.adminPasswordFile); err != nil {
		return err
	}
	cfg, err := loadConfig(d.getenv)
	if err != nil {
		for mistake := range strings.SplitSeq(err.Error(), "\n") {
			d.check("variables", false, mistake, "README.md lists all variables.")
		}
		return d.report()
	}
	d.check("variables", true, "", "")
	if d.server, err = newServer(ctx, cfg, newLogger(io.Discard, cfg)); err != nil {
		return err
	}
	defer d.store.pool.Close()
	d.checkAll(ctx)
	return d.report()
}

func (d *doctor) checkAll(ctx context.Context) {
	d.warn("PUBLIC_URL", d.cfg.https(), "it is not https: links, passwords and tokens can be read on the way",
		"Put TLS in front of the service, or set TLS_CERT_FILE and TLS_KEY_FILE.")
	d.checkPostgreSQL(ctx)
	d.checkKeycloak(ctx)
}

// report writes all findings, and returns errUnhealthy if one says so.
func (d *doctor) report() error {
	var text []byte
	unhealthy := false
	for _, f := range d.findings {
		unhealthy = unhealthy || f.Status == "wrong" || f.Status == "planned"
		text = fmt.Appendf(text, "%-8s %s", f.Status, f.Name)
		switch {
		case f.Detail != "":
			text = fmt.Appendf(text, ": %s", f.Detail)
		case f.Is != "":
			text = fmt.Appendf(text, ": is %s, must be %s", f.Is, f.Must)
		}
		if f.Fix != "" {
			text = fmt.Appendf(text, "\n         → %s", f.Fix)
		}
		text = append(text, '\n')
	}
	if err := d.print(d.findings, string(text)); err != nil || !unhealthy {
		return err
	}
	return errUnhealthy
}

// roleFix is how the service gets a role with the privileges that it needs, and no others.
const roleFix = "As the owner of the tables: create role auth_service login password '…', then run " +
	"\"auth-service migrate\", which grants the privileges. Use that role in the service's DATABASE_URL."

func (d *doctor) checkPostgreSQL(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	pool := d.store.pool
	var version int
	var now time.Time
	err := pool.QueryRow(ctx, `select current_setting('server_version_num')::int, clock_timestamp()`).Scan(&version, &now)
	if !d.check("PostgreSQL: reachable", err == nil, fmt.Sprint(storeError(err)),
		"Check DATABASE_URL, the network, and the role's password.", "PostgreSQL: version", "PostgreSQL: clock",
		"PostgreSQL: schema", "PostgreSQL: privileges", "PostgreSQL: audit log") {
		return
	}
	d.check("PostgreSQL: version", version >= 150000, fmt.Sprintf("it is %d", version/10000), "Use 15 or newer.")
	d.checkClock("PostgreSQL: clock", now)

	var have int
	var pg *pgconn.PgError
	err = pool.QueryRow(ctx, `select version from schema_version`).Scan(&have)
	if errors.As(err, &pg) && pg.Code == "42501" { // insufficient_privilege
		d.unknown("the role may not read schema_version", roleFix, "PostgreSQL: schema")
	} else if !d.check("PostgreSQL: schema", err == nil && have == schemaVersion, "it is not this version's",
		"Run \"auth-service migrate\" as the owner of the tables. (A service that owns them does so when it starts.)",
		"PostgreSQL: privileges", "PostgreSQL: audit log") {
		return
	}
	var missing string
	var mayAlter bool
	err = pool.QueryRow(ctx, `
		select coalesce(string_agg(p, ', ' order by p), ''),
			(select pg_has_role(relowner, 'usage') or has_table_privilege(oid, 'update, delete, truncate')
			from pg_class where oid = 'audit_log'::regclass)
		from unnest($1::text[]) as p
		where not has_table_privilege(split_part(p, ' on ', 2), split_part(p, ' on ', 1))`,
		neededPrivileges()).Scan(&missing, &mayAlter)
	if err != nil {
		d.unknown(storeError(err).Error(), "", "PostgreSQL: privileges", "PostgreSQL: audit log")
		return
	}
	d.check("PostgreSQL: privileges", missing == "", "the role lacks "+missing, roleFix)
	d.warn("PostgreSQL: audit log", !mayAlter, "the service's role could change or delete entries", roleFix)
}

// neededPrivileges are those that schema.sql grants to auth_service, each as "select on users".
func neededPrivileges() (needed []string) {
	grants := regexp.MustCompile(`grant ([^;]+) on ([^;]+) to auth_service;`)
	for _, grant := range grants.FindAllStringSubmatch(schemaSQL, -1) {
		for action := range strings.SplitSeq(grant[1], ",") {
			for table := range strings.SplitSeq(grant[2], ",") {
				needed = append(needed, strings.TrimSpace(action)+" on "+strings.TrimSpace(table))
			}
		}
	}
	return needed
}

func (d *doctor) checkClock(name string, theirs time.Time) {
	skew := d.now().Sub(theirs).Abs().Round(time.Second)
	d.check(name, skew < 10*time.Second, fmt.Sprintf("it differs from this machine's by %v", skew),
		"Run NTP on both machines.")
}

func (d *doctor) checkKeycloak(ctx context.Context) {
	var discovery struct{ Issuer string }
	err := d.kc.getJSON(ctx, "discovery", keycloakTimeout, ".well-known/openid-configuration", &discovery)
	if !d.check("Keycloak: reachable", err == nil, fmt.Sprint(err),
		"Check KEYCLOAK_URL, KEYCLOAK_REALM and the network.", "Keycloak: issuer", "Keycloak: themes", "realm",
		"Keycloak: auth client", "Keycloak: service account", "Keycloak: clock", "Keycloak: signing key") {
		return
	}
	issuer := d.cfg.issuer()
	d.check("Keycloak: issuer", discovery.Issuer == issuer,
		fmt.Sprintf("tokens say %s, expected is %s", discovery.Issuer, issuer),
		"Set KEYCLOAK_PUBLIC_URL to what Keycloak calls itself, or Keycloak's hostname to that.")
	d.checkRealm(ctx)
	_, err = d.kc.refresh(ctx, "nobody's")
	d.check("Keycloak: auth client", errors.Is(err, errInvalidGrant), fmt.Sprint(err), "Check KEYCLOAK_AUTH_CLIENT_ID "+
		"and KEYCLOAK_AUTH_CLIENT_SECRET. Without the latter the client must be public.")
	token, err := d.kc.serviceToken(ctx) // after checkRealm: -fix may have created the account
	if d.check("Keycloak: service account", err == nil, fmt.Sprint(err), "Check KEYCLOAK_BACKEND_CLIENT_ID and "+
		"KEYCLOAK_BACKEND_CLIENT_SECRET. The realm, that client and its \"Service account roles\" must be enabled.",
		"Keycloak: clock", "Keycloak: signing key") {
		t := readServiceToken(token)
		d.checkClock("Keycloak: clock", time.Unix(t.IssuedAt, 0)) // Keycloak sends no Date
		keys, err := d.kc.signingKeys(ctx)
		known := slices.ContainsFunc(keys, func(key jose.JSONWebKey) bool { return key.KeyID == t.Key })
		d.check("Keycloak: signing key", known, fmt.Sprint(cmp.Or(err, errKeyKind)),
			"Give a key for RS256, ES256, PS256, or EdDSA with Ed25519, the highest priority of its algorithm.")
	}
}

var errKeyKind = errors.New("tokens are signed with a kind of key that is not known here, such as Ed448")

// serviceToken is what the doctor reads in the service account's token.
type serviceToken struct {
	Algorithm string                              `json:"alg"`
	Key       string                              `json:"kid"`
	IssuedAt  int64                               `json:"iat"`
	Access    map[string]struct{ Roles []string } `json:"resource_access"`
}

// readServiceToken reads a token whatever its algorithm: it comes from Keycloak itself.
func readServiceToken(token string) (t serviceToken) {
	for part := range strings.SplitSeq(token, ".") {
		text, _ := base64.RawURLEncoding.DecodeString(part)
		_ = json.Unmarshal(text, &t) // the signature is no JSON
	}
	return t
}
