//go:build schemathesis

package main

import (
	"flag"
	"os"
	"os/exec"
	"regexp"
	"testing"
)

// TestSchemathesis is what testdata/schemathesis.sh runs. Its arguments are those of "schemathesis run".
func TestSchemathesis(t *testing.T) {
	w := newEnv(t, map[string]string{"RESEND_COOLDOWN": "1s"})
	admin := w.admin()
	admin.invited("operator", "N1", "S1")
	args := append([]string{"--config-file", "testdata/schemathesis/schemathesis.toml", "run", "--url", w.url},
		append(flag.Args(), w.url+"/api-docs/openapi.json")...)
	cmd := exec.CommandContext(t.Context(), os.Getenv("SCHEMATHESIS"), args...)
	cmd.Env = append(os.Environ(), "SERVICE="+w.url, "ADMIN_EMAIL="+admin.Email, "ADMIN_PASSWORD="+password)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	if defects := regexp.MustCompile(`.*"problem":"internal".*`).FindAllString(w.logs.String(), 5); defects != nil {
		t.Error(defects)
	}
}
