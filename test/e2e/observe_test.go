package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

func TestLogsFollowAndNameTheirRequest(t *testing.T) {
	d := shared(t)
	d.submit("logger", guests.Read(t, "stderr-lines"), "")
	first := d.get(d.PathURL("logger", "/?2"))

	ctx, cancel := context.WithTimeout(t.Context(), settle)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.URL+"/v1/functions/logger/logs?follow=true&tail=100", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := d.HTTP.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/x-ndjson") {
		t.Fatalf("following: %s %s", resp.Status, resp.Header.Get("Content-Type"))
	}
	lines := bufio.NewScanner(resp.Body)
	next := func() v1alpha1.LogLine {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("the log ended: %v", lines.Err())
		}
		var line v1alpha1.LogLine
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("log line %q: %v", lines.Text(), err)
		}
		return line
	}
	expect := func(answer *harness.Answer, count int) {
		t.Helper()
		id := answer.Header.Get("Hearth-Request-Id")
		for i := range count {
			line := next()
			if line.Function != "logger" || line.Revision != 1 || line.Stream != "stderr" || line.Request != id ||
				line.Line != fmt.Sprintf("log line %d", i) || time.Since(line.Time).Abs() > time.Hour {
				t.Errorf("line %d of request %s is %+v", i, id, line)
			}
		}
	}
	expect(first, 2)
	// What comes now reaches the follower while it waits.
	expect(d.get(d.PathURL("logger", "/?3")), 3)

	if got := d.logs("logger", "?tail=1"); len(got) != 1 || got[0].Line != "log line 2" {
		t.Errorf("tail=1 gave %+v", got)
	}
	if got := d.logs("logger", "?since="+time.Now().Add(time.Hour).UTC().Format(time.RFC3339)); len(got) != 0 {
		t.Errorf("lines of the future: %+v", got)
	}
}

func TestServerTimingIsOnEveryAnswerOfAFunction(t *testing.T) {
	d := shared(t)
	d.submit("timed", guests.Read(t, "hello"), "")
	d.timed(d.get(d.PathURL("timed", "/")))
	d.timed(d.get(d.HostURL("timed", "/")))
	d.timed(d.get(d.PathURL("nobody-here", "/")))
	d.timed(d.call(http.MethodPost, d.PathURL("timed", "/"), bytes.NewReader(make([]byte, v1alpha1.MaxRequestBytes+1)), nil))
}

func TestMetricsAreValidAndCoverEveryPhase(t *testing.T) {
	d := shared(t)
	d.submit("measured", marked(t, "measured"), "")
	d.answers("measured", "measured")
	d.put("measured", []byte("no wasm"), "", nil)

	var families map[string]*dto.MetricFamily
	scrape := func() {
		a := d.get("/metrics")
		if a.Status != http.StatusOK {
			t.Fatalf("metrics: %s", a)
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		var err error
		if families, err = parser.TextToMetricFamilies(bytes.NewReader(a.Body)); err != nil {
			t.Fatalf("the exposition does not parse: %v", err)
		}
	}
	scrape()
	values := func(family, label string) map[string]bool {
		out := map[string]bool{}
		for _, m := range families[family].GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == label {
					out[l.GetValue()] = true
				}
			}
		}
		return out
	}
	for family, phases := range map[string][]string{
		"hearth_submit_phase_duration_seconds":   {"receive", "check", "publish", "record", "ready"},
		"hearth_prefetch_phase_duration_seconds": {"pull"},
		"hearth_precompile_duration_seconds":     {"compile"},
		"hearth_request_phase_duration_seconds":  {"queue", "load", "instantiate", "first_byte", "total"},
	} {
		got := values(family, "phase")
		for _, phase := range phases {
			if !got[phase] {
				t.Errorf("%s has no phase %s: %v", family, phase, got)
			}
		}
	}
	for _, family := range []string{
		"hearth_submits_total", "hearth_functions", "hearth_api_requests_total", "hearth_requests_total",
		"hearth_store_hits_total", "hearth_store_misses_total", "hearth_store_quarantined_total", "hearth_store_evictions_total",
		"hearth_store_bytes", "hearth_inflight_requests", "hearth_function_loads_total", "hearth_health_check",
	} {
		if families[family] == nil {
			t.Errorf("no %s", family)
		}
	}
	for family, f := range families {
		if !strings.HasPrefix(family, "hearth_") && !strings.HasPrefix(family, "go_") && !strings.HasPrefix(family, "process_") {
			t.Errorf("%s is not under the product's prefix", family)
		}
		if f.GetHelp() == "" && strings.HasPrefix(family, "hearth_") {
			t.Errorf("%s has no help text", family)
		}
		if len(f.GetMetric()) > 200 {
			t.Errorf("%s has %d series: is a label unbounded?", family, len(f.GetMetric()))
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetValue() == "measured" {
					t.Errorf("%s carries a function's name in label %s", family, l.GetName())
				}
			}
		}
	}
}

func TestOpenAPIDocumentIsServedAndNamesTheRoutes(t *testing.T) {
	d := shared(t)
	a := d.get("/openapi.json")
	var doc struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(a.Body, &doc); err != nil || a.Status != http.StatusOK || !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Fatalf("openapi.json: %v %s", err, a)
	}
	for path, methods := range map[string][]string{
		"/v1/functions":                  {"get"},
		"/v1/functions/{name}":           {"get", "put", "patch", "delete"},
		"/v1/functions/{name}/revisions": {"get"},
		"/v1/functions/{name}/rollback":  {"post"},
		"/v1/functions/{name}/logs":      {"get"},
	} {
		for _, m := range methods {
			if doc.Paths[path][m] == nil {
				t.Errorf("%s %s is not documented", m, path)
			}
		}
	}
}

func TestHealthEndpoints(t *testing.T) {
	d := shared(t)
	for _, path := range []string{"/livez", "/readyz"} {
		if a := d.get(path); a.Status != http.StatusOK {
			t.Errorf("%s: %s", path, a)
		}
	}
	if a := d.get("/readyz?verbose=1"); !json.Valid(a.Body) {
		t.Errorf("verbose readiness is no JSON: %s", a)
	}
	if a := d.get("/"); a.Status != http.StatusOK || len(a.Body) == 0 {
		t.Errorf("the front page: %s", a)
	}
	if a := d.get("/v2/"); a.Status != http.StatusOK {
		t.Errorf("the distribution API: %s", a)
	}
}

// TestSecretsReachTheGuestAndNothingElse looks for a secret's value in every
// place a person or another process could see.
func TestSecretsReachTheGuestAndNothingElse(t *testing.T) {
	d := shared(t)
	secret := "s3cr3t-" + rand.Text()
	settings := harness.Settings{Secrets: map[string]string{"API_TOKEN": secret}, TimeoutMS: 2000}
	submitted, err := d.SubmitWith(t.Context(), "keeper", guests.Read(t, "echo"), settings, "")
	if err != nil {
		t.Fatal(err)
	}
	f := d.ready(submitted)
	if len(f.Settings.SecretNames) != 1 || f.Settings.SecretNames[0] != "API_TOKEN" {
		t.Errorf("secret names: %v", f.Settings.SecretNames)
	}
	if a := d.get(d.PathURL("keeper", "/")); !strings.Contains(string(a.Body), "API_TOKEN="+secret+"\n") {
		t.Fatalf("the guest did not get its secret: %s", a)
	}
	// Also on the ways that fail.
	over, err := d.SubmitWith(t.Context(), "keeper", guests.Read(t, "echo"), harness.Settings{Secrets: map[string]string{"API TOKEN=": secret}}, "")
	if err != nil {
		t.Fatal(err)
	}
	bad, err := d.SubmitWith(t.Context(), "keeper", []byte("no wasm"), settings, "")
	if err != nil {
		t.Fatal(err)
	}
	// A new revision and a rollback carry it along.
	d.submit("keeper", guests.Read(t, "exit1"), "")
	d.get(d.PathURL("keeper", "/"))
	rolled := d.call(http.MethodPost, "/v1/functions/keeper/rollback", nil, nil)
	d.ready(rolled)

	places := map[string][]byte{"submit": submitted.Body, "refused settings": over.Body, "refused module": bad.Body, "rollback": rolled.Body}
	for _, path := range []string{"/v1/functions", "/v1/functions/keeper", "/v1/functions/keeper/revisions", "/v1/functions/keeper/logs?tail=1000",
		"/metrics", "/readyz?verbose=1", "/openapi.json", "/", "/v2/_catalog"} {
		places[path] = d.get(path).Body
	}
	for _, argv := range [][]string{{"status", "-o", "json"}, {"status"}, {"doctor"}, {"functions", "get", "keeper"}, {"functions", "list", "-o", "json"}, {"logs", "keeper"}} {
		out := d.cli(argv...)
		places["nodeagent "+strings.Join(argv, " ")] = []byte(out.stdout + out.stderr)
	}
	places["output of dev"] = []byte(d.Output())
	for _, p := range d.Processes() {
		for _, file := range []string{"cmdline", "environ"} {
			content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID, file))
			if err == nil {
				places[p.String()+" "+file] = content
			}
		}
	}
	for place, content := range places {
		if bytes.Contains(content, []byte(secret)) {
			t.Errorf("the secret is in %s", place)
		}
	}
	// On disk only files that nobody else can read may hold it, and never
	// what is published or written as a log.
	err = filepath.WalkDir(d.DataDir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(content, []byte(secret)) {
			return nil
		}
		rel, _ := filepath.Rel(d.DataDir, path)
		if info, err := e.Info(); err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("the secret is in %s, which others can read (%v)", rel, info.Mode())
		}
		for _, sub := range []string{"logs/", "registry/", "store/", "tmp/"} {
			if strings.HasPrefix(rel, sub) {
				t.Errorf("the secret is in %s", rel)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFunctionsAnswerNoMoreThanTheirQuotaAndTheAPIGoesOn(t *testing.T) {
	d := start(t, harness.Options{Args: []string{"--quota-invocations", "0.001"}}) // one, and the next in a quarter of an hour
	d.submit("limited", guests.Read(t, "hello"), "")
	d.submit("same-tenant", guests.Read(t, "hello"), "")
	if a := d.get(d.PathURL("limited", "/")); a.Status != http.StatusOK {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	a := d.get(d.PathURL("same-tenant", "/"))
	if p := d.problem(a, http.StatusTooManyRequests, "too-many-invocations"); !p.Retryable || a.Header.Get("Retry-After") == "" {
		t.Error(a)
	}
	// Control paths are nobody's invocations.
	for _, path := range []string{"/v1/functions", "/livez", "/readyz", "/metrics", "/openapi.json"} {
		if a := d.get(d.URL + path); a.Status != http.StatusOK {
			t.Errorf("%s: %d %s", path, a.Status, a.Body)
		}
	}
}
