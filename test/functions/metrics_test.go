package functions_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/harness"
)

// scrape reads what /metrics says at an address.
func scrape(ctx context.Context, client *http.Client, url string) (map[string]*dto.MetricFamily, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	request.Close = true
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, response.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(response.Body)
}

// own are the names of Hearth's metrics, with their type and labels.
func own(families map[string]*dto.MetricFamily, into map[string]string) {
	for name, f := range families {
		if !strings.HasPrefix(name, "hearth_") {
			continue
		}
		labels := map[string]bool{}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
			}
		}
		into[name] = fmt.Sprint(f.GetType(), slices.Sorted(maps.Keys(labels)))
	}
}

// TestMetricsHaveTheNamesOfOneMachine: what a dashboard shows of `nodeagent
// dev` it shows of a cluster, whose processes are pods.
func TestMetricsHaveTheNamesOfOneMachine(t *testing.T) {
	t.Parallel()
	tenant := newTenant(t)
	wasm := module(t, "measured")

	dev, err := harness.Start(t.Context(), harness.Options{Binary: agent, DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.KillAll()
	defer dev.HTTP.CloseIdleConnections()
	if a, err := dev.Submit(t.Context(), "measured", wasm, "", nil); err != nil || a.Status != http.StatusCreated {
		t.Fatalf("%v %s", err, a)
	}
	if a, err := dev.Do(t.Context(), http.MethodGet, dev.PathURL("measured", "/"), nil, nil); err != nil || a.Status != http.StatusOK {
		t.Fatalf("%v %s", err, a)
	}
	families, err := scrape(t.Context(), dev.HTTP, dev.URL+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	machine := map[string]string{}
	own(families, machine)

	f := submit(t, tenant, "measured", "measured")
	answers(t, f.URL, "measured")
	waitObject(t, tenant, "measured", "every node to be warm", allWarm)
	var missing []string
	leaders := 0.0
	if err := bench.WaitFor(t.Context(), "the pods to have every metric of one machine", soon, func(ctx context.Context) (bool, error) {
		pods := map[string]string{}
		leaders = 0
		for component, port := range map[string]string{"api": "9642", "engine": "9641", "agent": "9640"} {
			list, err := podsOf(ctx, component)
			if err != nil {
				return false, err
			}
			for _, p := range list {
				if !chart.Ready(p) {
					continue
				}
				families, err := scrape(ctx, http.DefaultClient, "http://"+p.Status.PodIP+":"+port+"/metrics")
				if err != nil {
					return false, nil
				}
				own(families, pods)
				for _, m := range families["hearth_leader"].GetMetric() {
					leaders += m.GetGauge().GetValue()
				}
				for _, duty := range families["hearth_reconcile_duration_seconds"].GetMetric() {
					if duty.GetHistogram().GetSampleCount() > 0 {
						pods["reconciled"] = "yes"
					}
				}
			}
		}
		missing = nil
		for name, what := range machine {
			if name == "hearth_process_up" {
				continue // of dev's parts; a pod that is down is Kubernetes' to tell
			}
			if pods[name] == "" {
				missing = append(missing, name)
			} else if pods[name] != what {
				missing = append(missing, fmt.Sprintf("%s is %s, on one machine %s", name, pods[name], what))
			}
		}
		if pods["reconciled"] == "" {
			missing = append(missing, "hearth_reconcile_duration_seconds of anything")
		}
		slices.Sort(missing)
		return len(missing) == 0 && leaders == 1, nil
	}); err != nil {
		t.Fatalf("%v; missing: %s; %v replicas lead", err, strings.Join(missing, ", "), leaders)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestAChangeIsInTheLogOfTheReplicaThatMadeIt holds the audit line, and that no
// secret is in it.
func TestAChangeIsInTheLogOfTheReplicaThatMadeIt(t *testing.T) {
	const secret = "not-for-the-log-7731"
	tenant := newTenant(t)
	t.Setenv("HEARTH_TEST_SECRET", secret)
	submit(t, tenant, "audited", "audited", "--secret", "HEARTH_TEST_SECRET")
	must(t, "functions", "delete", "--kubeconfig", bench.Kubeconfig(), "audited")
	lines := map[string]map[string]any{}
	if err := bench.WaitFor(t.Context(), "both changes to be in the replicas' logs", soon, func(ctx context.Context) (bool, error) {
		pods, err := podsOf(ctx, "api")
		if err != nil {
			return false, err
		}
		for _, p := range pods {
			log, err := bench.PodLogs(ctx, p.Namespace, p.Name, "")
			if err != nil {
				return false, nil
			}
			if strings.Contains(log, secret) {
				return false, fmt.Errorf("the log of %s has a secret", p.Name)
			}
			for line := range strings.Lines(log) {
				var l map[string]any
				if json.Unmarshal([]byte(line), &l) == nil && l["audit"] == true && l["function"] == "audited" {
					lines[fmt.Sprint(l["action"])] = l
				}
			}
		}
		return len(lines) == 2, nil
	}); err != nil {
		t.Fatalf("%v; there are %v", err, lines)
	}
	for action, l := range lines {
		t.Logf("%s: %v", action, l)
		if l["tenant"] != tenant || !strings.Contains(fmt.Sprint(l["user"]), "hearth-cli") {
			t.Errorf("%s: who, and for whom? %v", action, l)
		}
	}
}
