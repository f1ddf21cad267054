package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"auth-service/dev/stack"

	"go.yaml.in/yaml/v4"
)

// manifest is what the tests read of compose.yaml and of Kubernetes' objects.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Secret   map[string]string `yaml:"stringData"`
	Spec     struct {
		Template struct {
			Spec struct {
				Grace      int `yaml:"terminationGracePeriodSeconds"`
				Containers []struct {
					Env []struct{ Name, Value string }
				}
			}
		}
	}
	Services map[string]struct {
		Environment map[string]string
		Grace       time.Duration `yaml:"stop_grace_period"`
	}
}

// Every variable that a deployment sets is one of the service's, they suffice, and the deployment waits longer for the
// end of an instance than that may take.
func TestDeployments(t *testing.T) {
	known := map[string]bool{}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[config]()) {
		name, _, _ := strings.Cut(f.Tag.Get("env"), ",")
		known[name], known[name+"_FILE"] = true, f.Type == reflect.TypeFor[secret]()
	}
	for _, file := range []string{"compose.yaml", "deploy/kubernetes.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = regexp.MustCompile(`\$\{\w+:-([^}]*)\}`).ReplaceAll(text, []byte("$1")) // compose's defaults
		vars, grace := map[string]string{}, time.Duration(0)
		for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
			var m manifest
			if err := documents.Decode(&m); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			maps.Copy(vars, m.Data)
			maps.Copy(vars, m.Secret)
			maps.Copy(vars, m.Services["auth-service"].Environment)
			for _, c := range m.Spec.Template.Spec.Containers {
				for _, v := range c.Env {
					vars[v.Name] = v.Value
				}
			}
			grace = max(grace, m.Services["auth-service"].Grace, time.Duration(m.Spec.Template.Spec.Grace)*time.Second)
		}
		for name := range vars {
			if !known[name] {
				t.Errorf("%s: the service knows no %s", file, name)
			}
		}
		cfg, err := loadConfig(func(name string) string { return vars[name] })
		if err != nil {
			t.Errorf("%s: %v", file, err)
		}
		if end := cfg.ShutdownDelay + drainTime; grace < end+5*time.Second {
			t.Errorf("%s: an instance is killed after %v, and may take %v", file, grace, end)
		}
	}
}

// image are the files of the image, and how it runs. Where buildah can build it, it is the Dockerfile's; else it is made
// as the Dockerfile makes it.
func image(t *testing.T) (root, says string) {
	t.Helper()
	buildah, err := exec.LookPath("buildah")
	if err != nil || os.Getuid() != 0 {
		root = t.TempDir()
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w -X main.release=test", "-o", root+"/auth-service", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return root, ""
	}
	const name = "localhost/auth-service-test"
	var out, log bytes.Buffer
	cmd := exec.Command("testdata/image.sh", name)
	cmd.Stdout, cmd.Stderr = &out, &log
	err = cmd.Run()
	lines := strings.Split(out.String(), "\n")
	t.Cleanup(func() {
		exec.Command(buildah, "rm", lines[0]).Run()
		exec.Command(buildah, "rmi", name, name+"-base").Run()
	})
	if err != nil || len(lines) < 3 {
		t.Fatalf("%v\n%s%s", err, &out, &log)
	}
	return lines[1], lines[2]
}

// TestImage runs the commands of the image in its files, as its user, with nothing else around.
func TestImage(t *testing.T) {
	t.Parallel()
	root, says := image(t)
	for _, want := range []string{"65532:65532", "[/auth-service]", "MANAGEMENT_ADDR=:9090", "/auth-service healthcheck"} {
		if says != "" && !strings.Contains(says, want) {
			t.Errorf("the image lacks %s: %s", want, says)
		}
	}
	management := fmt.Sprintf(":%d", stack.FreePort())
	command := func(log io.Writer, args ...string) *exec.Cmd {
		cmd := exec.Command("/auth-service", args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
		if os.Getuid() != 0 { // others may not change the root
			cmd.Path, cmd.SysProcAttr = root+cmd.Path, nil
		}
		cmd.Env, cmd.Dir = []string{"MANAGEMENT_ADDR=" + management, "SERVER_HOST=127.0.0.1", "SERVER_PORT=0", "SHUTDOWN_DELAY=0"}, "/"
		for name, value := range enough {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		cmd.Stdout, cmd.Stderr = log, log
		return cmd
	}
	log := new(buffer)
	if err := command(log, "version").Run(); err != nil || log.String() != "test\n" {
		t.Errorf("version: %v %s", err, log)
	}
	if err := command(log, "healthcheck").Run(); err == nil {
		t.Errorf("healthy before the start: %s", log)
	}
	service, err := stack.Spawn(command(log), syscall.SIGKILL)
	if err != nil {
		t.Fatal(err)
	}
	defer service.End(syscall.SIGTERM, 10*time.Second)
	if err := log.waitFor(30*time.Second, func(text string) bool { return strings.Contains(text, `"msg":"listening"`) }); err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	if err := command(log, "healthcheck").Run(); err != nil {
		t.Errorf("%v\n%s", err, log)
	}
}
