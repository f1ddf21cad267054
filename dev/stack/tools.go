package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A Tool is a program of the operating system that the stack or a test needs.
type Tool struct {
	Name     string
	Binaries []string // names it goes by; the first that is found counts
	Dirs     []string // patterns of directories that are searched after PATH
	Packages string   // Debian's packages that bring it, separated by blanks
	Usable   func(path string) bool
}

// The tools that the stack and the tests know.
var (
	PostgreSQL = Tool{Name: "PostgreSQL's server", Binaries: []string{"initdb"}, Packages: "postgresql",
		Dirs: []string{"$(pg_config --bindir)", "/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
			"/opt/homebrew/opt/postgresql*/bin", "/usr/local/opt/postgresql*/bin"}}
	Java = Tool{Name: "Java 17 or newer", Binaries: []string{"java"}, Packages: "default-jre-headless",
		Dirs: []string{"$JAVA_HOME/bin", "/usr/lib/jvm/*/bin", "/opt/homebrew/opt/openjdk/bin"}, Usable: isJava17}
	Maven    = Tool{Name: "Maven", Binaries: []string{"mvn"}, Packages: "maven", Dirs: []string{"$MAVEN_HOME/bin"}}
	Chromium = Tool{Name: "Chromium", Binaries: []string{"chromium", "chromium-browser", "google-chrome"},
		Packages: "chromium fonts-dejavu-core", Dirs: []string{"/Applications/Google Chrome.app/Contents/MacOS"}}
	NPM       = Tool{Name: "npm", Binaries: []string{"npm"}, Packages: "npm"}
	Nginx     = Tool{Name: "nginx", Binaries: []string{"nginx"}, Packages: "nginx", Dirs: []string{"/usr/sbin"}}
	PgBouncer = Tool{Name: "PgBouncer", Binaries: []string{"pgbouncer"}, Packages: "pgbouncer",
		Dirs: []string{"/usr/sbin"}}
	Curl       = Tool{Name: "curl", Binaries: []string{"curl"}, Packages: "curl"}
	Prometheus = Tool{Name: "Prometheus", Binaries: []string{"prometheus"}, Packages: "prometheus"}
	Promtool   = Tool{Name: "promtool", Binaries: []string{"promtool"}, Packages: "prometheus"}
)

// FindOrInstallChromium returns the path of a Chromium for the browser tests.
func FindOrInstallChromium(ctx context.Context) (string, error) {
	paths, err := FindOrInstall(ctx, nil, Chromium)
	if err != nil {
		return "", err
	}
	return paths[0], nil
}

// FindOrInstall returns the paths of the tools, in order. What is missing is
// installed by apt-get when we are root on Debian; otherwise the error has the
// one command that does it.
func FindOrInstall(ctx context.Context, progress func(string), tools ...Tool) ([]string, error) {
	paths, missing := findAll(tools)
	if len(missing) == 0 {
		return paths, nil
	}
	var names, packages []string
	for _, t := range missing {
		names = append(names, t.Name)
		packages = append(packages, strings.Fields(t.Packages)...)
	}
	install := append([]string{"install", "-y", "--no-install-recommends"}, packages...)
	if _, err := exec.LookPath("apt-get"); err != nil {
		return nil, fmt.Errorf("missing: %s; please install it (Debian calls it %s)",
			strings.Join(names, ", "), strings.Join(packages, ", "))
	}
	if os.Getuid() != 0 {
		return nil, fmt.Errorf("missing: %s; install it with\n\n    sudo apt-get update && sudo apt-get %s",
			strings.Join(names, ", "), strings.Join(install, " "))
	}
	allow, err := denyServices("/usr/sbin/policy-rc.d")
	if err != nil {
		return nil, err
	}
	defer allow()
	err = during(progress, "installing "+strings.Join(packages, ", ")+" with apt-get", func() error {
		for _, args := range [][]string{{"update"}, install} {
			cmd := exec.Command("apt-get", append([]string{"-q", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
			cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
			if err := Run(ctx, cmd); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if paths, missing = findAll(tools); len(missing) > 0 {
		return nil, fmt.Errorf("%s is missing even after its installation", missing[0].Name)
	}
	return paths, nil
}

// denyServices keeps packages from starting the services that they bring, nginx on
// port 80 and PostgreSQL on 5432, until its result is called: we want programs, not
// servers. The file is Debian's own means for that (deb-systemd-invoke(1p)), and one
// that is there stays as it is. Ours allows everything once this process has ended.
func denyServices(policy string) (allow func(), err error) {
	f, err := os.OpenFile(policy, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if errors.Is(err, os.ErrExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(f, "#!/bin/sh\n[ ! -d /proc/%d ] || exit 101\n", os.Getpid())
	return func() { os.Remove(policy) }, errors.Join(err, f.Close())
}

// findAll looks for every tool and returns those it did not find.
func findAll(tools []Tool) (paths []string, missing []Tool) {
	for _, t := range tools {
		path, err := t.find()
		if err != nil {
			missing = append(missing, t)
		}
		paths = append(paths, path)
	}
	return paths, missing
}

// find returns the tool's path, newest directory first where a pattern has several.
func (t Tool) find() (string, error) {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	for _, pattern := range t.Dirs {
		if ask, ok := strings.CutPrefix(pattern, "$("); ok {
			args := strings.Fields(strings.TrimSuffix(ask, ")"))
			out, _ := exec.Command(args[0], args[1:]...).Output()
			pattern = strings.TrimSpace(string(out))
		}
		found, _ := filepath.Glob(os.ExpandEnv(pattern))
		slices.Reverse(found)
		dirs = append(dirs, found...)
	}
	for _, name := range t.Binaries {
		for _, dir := range dirs {
			path, err := exec.LookPath(filepath.Join(dir, name))
			if err == nil && filepath.IsAbs(path) && (t.Usable == nil || t.Usable(path)) {
				return path, nil
			}
		}
	}
	return "", errors.New("not found")
}

var javaVersion = regexp.MustCompile(`version "(\d+)`)

// isJava17 asks a Java for its version; Keycloak needs 17.
func isJava17(path string) bool {
	out, _ := exec.Command(path, "-version").CombinedOutput()
	m := javaVersion.FindSubmatch(out)
	if m == nil {
		return false
	}
	major, _ := strconv.Atoi(string(m[1]))
	return major >= 17
}
