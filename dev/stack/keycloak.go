package stack

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed pom.xml
var pom string

// KeycloakVersion is the one that pom.xml pins.
var KeycloakVersion = regexp.MustCompile(`<keycloak\.version>(.+)</`).FindStringSubmatch(pom)[1]

// keycloakServer is what it takes to start Keycloak.
type keycloakServer struct {
	*Stack
	java, maven string
	port        int
	management  int    // health is asked here
	home        string // the unpacked distribution
	data        string // its database, apart from the distribution so that either can be replaced
	log         string
}

// newKeycloak describes how to start Keycloak.
func (s *Stack) newKeycloak(java, maven string, port int) (*Server, error) {
	port, err := choosePort(port, "Keycloak", "-keycloak-port")
	if err != nil {
		return nil, err
	}
	k := &keycloakServer{Stack: s, java: java, maven: maven, port: port, management: FreePort(),
		home: s.file("keycloak-" + s.options.Keycloak), data: s.file("keycloak-data"), log: s.file("keycloak.log")}
	return &Server{Name: "Keycloak", Port: port, Log: k.log, stopSignal: syscall.SIGTERM, start: k.start}, nil
}

// start starts Keycloak and heals what a SIGKILL may have left: a distribution
// that was killed while it compiled itself, or a database that can't be
// opened, which is put aside and not deleted.
func (k *keycloakServer) start(ctx context.Context) (*Child, error) {
	if err := os.RemoveAll(k.log); err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		if err := k.unpack(ctx); err != nil {
			return nil, err
		}
		child, err := k.launch(ctx)
		if err == nil {
			return child, nil
		}
		if ctx.Err() != nil || attempt == 2 {
			return nil, err
		}
		log, _ := os.ReadFile(k.log)
		if strings.Contains(string(log), "File corrupted") { // H2's words
			aside := k.data + time.Now().Format(".broken-20060102-150405")
			k.say("Keycloak's database is broken; it starts with an empty one, the old one is in " + aside)
			err = os.Rename(k.data, aside)
		} else {
			k.say("Keycloak ended while it started; trying again with a freshly unpacked one")
			err = os.RemoveAll(k.home)
		}
		if err != nil {
			return nil, err
		}
	}
}

// launch runs Keycloak and waits until it is healthy. We do what its kc.sh
// does, because a shell between us and Java would get the signals instead.
func (k *keycloakServer) launch(ctx context.Context) (*Child, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, errors.New("no answer within ten minutes"))
	defer cancel()
	log, err := os.OpenFile(k.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	// Keycloak compiles its configuration when it starts for the first time,
	// in place. The file "starting" is there from then on until it is healthy.
	starting, ready := filepath.Join(k.home, "starting"), filepath.Join(k.home, "ready")
	if _, err := os.Stat(ready); err != nil {
		if err := os.WriteFile(starting, nil, 0o644); err != nil {
			return nil, err
		}
	}
	for compiled := false; ; compiled = true {
		child, err := Spawn(k.command(log, compiled), syscall.SIGKILL)
		if err != nil {
			return nil, err
		}
		err = child.Await(ctx, func(ctx context.Context) error {
			return answers(ctx, fmt.Sprintf("http://127.0.0.1:%d/health/ready", k.management))
		})
		if err == nil {
			return child, errors.Join(os.WriteFile(ready, nil, 0o644), os.RemoveAll(starting))
		}
		// It compiled itself and wants to be started once more.
		if exit := (*exec.ExitError)(nil); !compiled && errors.As(err, &exit) && exit.ExitCode() == 10 {
			continue
		}
		return nil, err
	}
}

// command is Keycloak's command line. Tests sign in often, so the JVM keeps
// its optimising compiler: without it a start saves 1.5 of 6.5 s and every
// login costs twice as much.
func (k *keycloakServer) command(log *os.File, compiled bool) *exec.Cmd {
	args := []string{"-Xms512m", "-Xmx1g", "-Xmn400m", "-XX:+UseSerialGC", "-XX:MaxMetaspaceSize=256m", "-XX:+ExitOnOutOfMemoryError",
		"-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
		"--add-opens=java.base/java.util=ALL-UNNAMED", "--add-opens=java.base/java.util.concurrent=ALL-UNNAMED",
		"--add-opens=java.base/java.security=ALL-UNNAMED",
		"-Djava.util.concurrent.ForkJoinPool.common.threadFactory=io.quarkus.bootstrap.forkjoin.QuarkusForkJoinWorkerThreadFactory",
		"-Djava.util.logging.manager=org.jboss.logmanager.LogManager",
		"-Dkc.home.dir=" + k.home, "-Djboss.server.config.dir=" + filepath.Join(k.home, "conf"), "-Dpicocli.disable.closures=true"}
	if compiled {
		args = append(args, "-Dkc.config.built=true")
	}
	args = append(args, "-cp", filepath.Join(k.home, "lib", "quarkus-run.jar"), "io.quarkus.bootstrap.runner.QuarkusEntryPoint",
		"start-dev", "--spi-theme--folder--dir="+filepath.Join(k.Root, "keycloak", "themes"),
		"--spi-password-policy--password-blacklist--blacklists-path="+filepath.Join(k.Root, "keycloak", "password-blacklists"),
		"--db-url=jdbc:h2:file:"+filepath.Join(k.data, "keycloakdb")+";NON_KEYWORDS=VALUE;DB_CLOSE_ON_EXIT=FALSE")

	cmd := exec.Command(k.java, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = k.home, log, log
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KC_") { // somebody else's Keycloak
			cmd.Env = append(cmd.Env, v)
		}
	}
	port := strconv.Itoa(k.port)
	cmd.Env = append(cmd.Env, "AUTH_SERVICE_URL="+k.options.PublicURL) // the theme's other variables are those of our own environment
	cmd.Env = append(cmd.Env, "KC_HTTP_HOST=127.0.0.1", "KC_HTTP_PORT="+port, "KC_HOSTNAME=http://localhost:"+port,
		"KC_HTTP_MANAGEMENT_PORT="+strconv.Itoa(k.management), "KC_HEALTH_ENABLED=true",
		"QUARKUS_HTTP_LIMITS_MAX_BODY_SIZE=200M",                                         // of a realm with a hundred thousand users
		"KC_PROXY_HEADERS=xforwarded", "KC_PROXY_TRUSTED_ADDRESSES=127.0.0.1/32,::1/128", // the service tells whose request it is
		"KC_BOOTSTRAP_ADMIN_USERNAME="+k.AdminUser, "KC_BOOTSTRAP_ADMIN_PASSWORD="+k.AdminPassword)
	if k.options.Test { // a fifth of Keycloak's time went into hashing passwords of tests
		cmd.Env = append(cmd.Env, "KC_SPI_PASSWORD_HASHING__ARGON2__ITERATIONS=1", "KC_SPI_PASSWORD_HASHING__ARGON2__MEMORY=64")
	}
	return cmd
}

// unpack makes sure that a whole distribution is there: Maven fetches it, or
// has it from an earlier time, and it appears under its name by a rename.
func (k *keycloakServer) unpack(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(k.home, "starting")); err == nil {
		k.say("Keycloak was interrupted in its first start; unpacking it again")
		if err := os.RemoveAll(k.home); err != nil {
			return err
		}
	}
	if _, err := os.Stat(k.home); err == nil {
		return nil
	}
	k.say("this is the first start here: it takes about a minute, later ones about ten seconds")
	half := k.home + ".half"
	if err := os.RemoveAll(half); err != nil {
		return err
	}
	defer os.RemoveAll(half)
	err := during(k.say, "fetching Keycloak "+k.options.Keycloak+" with Maven (160 MB, once)", func() error {
		return Run(ctx, exec.Command(k.maven, "-q", "-B", "-ntp", "-f", filepath.Join(k.Root, "dev", "stack", "pom.xml"),
			"validate", "-Dtarget="+half, "-Dkeycloak.version="+k.options.Keycloak))
	})
	if err != nil {
		return fmt.Errorf("fetching Keycloak: %w", err)
	}
	return os.Rename(filepath.Join(half, "dependency", "keycloak-"+k.options.Keycloak), k.home)
}
