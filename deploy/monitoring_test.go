// Package deploy tests what monitoring is set up with: the alerts, with Prometheus' own tool, and the dashboard, by
// Grafana's own types.
package deploy

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"testing"

	"auth-service/dev/stack"

	"github.com/grafana/grafana-foundation-sdk/go/bargauge"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

func TestRules(t *testing.T) {
	t.Parallel()
	promtool, err := stack.FindOrInstall(t.Context(), nil, stack.Promtool)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", "prometheus-rules.yaml"}, {"test", "rules", "prometheus-rules-test.yaml"}} {
		if out, err := exec.Command(promtool[0], args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

// Grafana itself is not in any package registry, so the dashboard is not loaded into one. Its fields are checked
// against the types of Grafana's SDK, which are generated from Grafana's schemas: none is unknown, none is missing.
func TestDashboard(t *testing.T) {
	t.Parallel()
	types := cog.NewRuntime()
	types.RegisterPanelcfgVariant(timeseries.VariantConfig())
	types.RegisterPanelcfgVariant(stat.VariantConfig())
	types.RegisterPanelcfgVariant(bargauge.VariantConfig())
	types.RegisterDataqueryVariant(prometheus.VariantConfig())
	text, err := os.ReadFile("grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 the newer model is for Grafana's API; this is the one that can be imported by hand everywhere
	var strict, board dashboard.Dashboard
	if err := strict.UnmarshalJSONStrict(text).Error(); err != "" { // never nil
		t.Error(err)
	}
	if err := errors.Join(json.Unmarshal(text, &board), board.Validate()); err != nil || len(board.Panels) == 0 {
		t.Fatal(err)
	}
	for _, p := range board.Panels {
		if p.Panel == nil || p.Panel.Title == nil || p.Panel.Description == nil || len(p.Panel.Targets) == 0 {
			t.Errorf("a panel lacks its title, its description or a query: %+v", p.Panel)
		}
	}
}
