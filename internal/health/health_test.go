package health

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is advanced by hand.
type clock struct{ now time.Time }

func newClock() *clock                   { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }
func (c *clock) Now() time.Time          { return c.now }
func (c *clock) Advance(d time.Duration) { c.now = c.now.Add(d) }

func node(c *clock) (r *Registry, registry, pull, disk *Check) {
	r = NewRegistry(Options{Clock: c.Now})
	registry = r.Register(Definition{Code: "registry", Severity: v1alpha1.SeverityCritical, Remedy: "start it"})
	pull = r.Register(Definition{Code: "pull", Severity: v1alpha1.SeverityCritical, DependsOn: []string{"registry"}})
	disk = r.Register(Definition{Code: "disk", Severity: v1alpha1.SeverityWarning, Remedy: "free some space"})
	return r, registry, pull, disk
}

func TestOverallState(t *testing.T) {
	tests := []struct {
		name        string
		report      func(registry, pull, disk *Check)
		want        v1alpha1.NodeState
		ready       bool
		summary     string
		first       string
		causedBy    string // of pull
		notReadyFor string
	}{
		{
			name: "no report yet is degraded and not ready", report: func(_, _, _ *Check) {},
			want: v1alpha1.NodeDegraded, summary: "starting: pull is unknown (and 1 more)", first: "pull", notReadyFor: "registry is unknown",
		},
		{
			name: "everything passes", report: func(a, b, c *Check) { a.OK(""); b.OK(""); c.OK("") },
			want: v1alpha1.NodeHealthy, ready: true, summary: "every check passes", first: "pull",
		},
		{
			name: "a warning degrades and leaves it ready", report: func(a, b, c *Check) { a.OK(""); b.OK(""); c.Fail("3 MiB free", "") },
			want: v1alpha1.NodeDegraded, ready: true, summary: "disk: 3 MiB free", first: "disk",
		},
		{
			name: "an unknown warning is no news", report: func(a, b, _ *Check) { a.OK(""); b.OK("") },
			want: v1alpha1.NodeHealthy, ready: true, summary: "every check passes", first: "disk",
		},
		{
			name: "the root cause comes first and explains the rest",
			report: func(a, b, c *Check) {
				c.Fail("3 MiB free", "")
				b.Fail("cannot pull", "")
				a.Fail("connection refused", "")
			},
			want: v1alpha1.NodeFailed, summary: "registry: connection refused (and 1 more); 1 other check waits for it",
			first: "registry", causedBy: "registry", notReadyFor: "pull (because of registry)",
		},
		{
			name: "a dependent's failure stands alone when its dependency passes",
			report: func(a, b, c *Check) {
				a.OK("")
				b.Fail("cannot pull", "")
				c.OK("")
			},
			want: v1alpha1.NodeFailed, summary: "pull: cannot pull", first: "pull", notReadyFor: "pull: cannot pull",
		},
		{
			name:   "an unknown dependent of a failing check is explained",
			report: func(a, _, c *Check) { a.Fail("connection refused", ""); c.OK("") },
			want:   v1alpha1.NodeFailed, summary: "registry: connection refused; 1 other check waits for it", first: "registry", causedBy: "registry",
			notReadyFor: "connection refused",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, registry, pull, disk := node(newClock())
			tt.report(registry, pull, disk)
			s := r.Snapshot()
			if s.State != tt.want || s.Summary != tt.summary || s.Checks[0].Code != tt.first {
				t.Errorf("state %s, summary %q, first %s", s.State, s.Summary, s.Checks[0].Code)
			}
			for _, c := range s.Checks {
				if c.Code == "pull" && c.CausedBy != tt.causedBy {
					t.Errorf("pull is caused by %q", c.CausedBy)
				}
			}
			err := r.Ready()
			if (err == nil) != tt.ready || err != nil && !strings.Contains(err.Error(), tt.notReadyFor) {
				t.Errorf("ready: %v", err)
			}
		})
	}
}

func TestSinceMovesOnlyWithTheState(t *testing.T) {
	c := newClock()
	r, registry, pull, disk := node(c)
	registry.OK("")
	pull.OK("")
	disk.OK("")
	start := c.now
	c.Advance(time.Minute)
	disk.Fail("9 MiB free", "")
	failedAt := c.now
	c.Advance(time.Minute)
	disk.Fail("3 MiB free", "")
	s := r.Snapshot()
	if got := s.Checks[0]; !got.Since.Equal(failedAt) || got.Message != "3 MiB free" || got.Remedy != "free some space" {
		t.Errorf("%+v", got)
	}
	if !s.Since.Equal(failedAt) || !s.Checks[1].Since.Equal(start) || !s.Time.Equal(c.now) || !s.StartedAt.Equal(start) {
		t.Errorf("%+v", s)
	}
	c.Advance(time.Minute)
	disk.OK("plenty")
	if s := r.Snapshot(); !s.Since.Equal(c.now) || s.State != v1alpha1.NodeHealthy || s.Checks[2].Remedy != "" && s.Checks[0].Remedy != "" {
		t.Errorf("%+v", s)
	}
}

func TestOneEventForEachChange(t *testing.T) {
	var log bytes.Buffer
	r := NewRegistry(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	c := r.Register(Definition{Code: "engine", Severity: v1alpha1.SeverityCritical})
	c.OK("")
	c.OK("still")
	c.Fail("gone", "")
	c.Fail("gone", "")
	if n := strings.Count(log.String(), `msg="health check changed"`); n != 2 {
		t.Errorf("%d events:\n%s", n, log.String())
	}
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "check=engine from=ok to=failing") {
		t.Error(log.String())
	}
}

func TestSetByCode(t *testing.T) {
	r, _, _, _ := node(newClock())
	if err := r.Set("disk", v1alpha1.CheckFailing, "full", ""); err != nil {
		t.Error(err)
	}
	if err := r.Set("dsik", v1alpha1.CheckFailing, "full", ""); err == nil {
		t.Error("an unknown code was taken")
	}
}

func TestWrongDefinitionsPanic(t *testing.T) {
	for name, d := range map[string]Definition{
		"no code":            {Severity: v1alpha1.SeverityInfo},
		"twice":              {Code: "disk", Severity: v1alpha1.SeverityInfo},
		"no severity":        {Code: "x"},
		"unknown dependency": {Code: "x", Severity: v1alpha1.SeverityInfo, DependsOn: []string{"y"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, _, _, _ := node(newClock())
			defer func() {
				if recover() == nil {
					t.Error("was registered")
				}
			}()
			r.Register(d)
		})
	}
}

func TestErrorsAreCountedAndBounded(t *testing.T) {
	c := newClock()
	r := NewRegistry(Options{Clock: c.Now})
	first := c.now
	r.RecordError("pull-failed", "hello", errors.New("refused"))
	c.Advance(time.Second)
	r.RecordError("pull-failed", "other", errors.New("refused"))
	r.RecordError("pull-failed", "hello", errors.New("refused"))
	r.RecordError("pull-failed", "hello", nil)
	got := r.Snapshot().LastErrors
	want := []v1alpha1.ErrorRecord{
		{Time: c.now, FirstTime: first, Count: 2, Code: "pull-failed", Subject: "hello", Message: "refused"},
		{Time: c.now, FirstTime: c.now, Count: 1, Code: "pull-failed", Subject: "other", Message: "refused"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for i := range 100 {
		r.RecordError("x", fmt.Sprint(i), errors.New(strings.Repeat("é", 10_000)))
	}
	got = r.Snapshot().LastErrors
	if len(got) != maxErrors || got[0].Subject != "99" || len(got[0].Message) > maxMessageBytes+len("…") {
		t.Errorf("%d records, first %s", len(got), got[0].Subject)
	}
}

func TestLivenessFollowsLoopsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, registry, _, _ := node(&clock{})
		r.clock = time.Now
		registry.Fail("gone", "")
		loop := r.Loop("reconcile", time.Second)
		if err := r.Live(); err != nil {
			t.Errorf("a failing check: %v", err)
		}
		time.Sleep(time.Second)
		if err := r.Live(); err != nil {
			t.Errorf("in time: %v", err)
		}
		time.Sleep(time.Millisecond)
		if err := r.Live(); err == nil || !strings.Contains(err.Error(), "reconcile has not turned for 1.001s") {
			t.Errorf("stuck: %v", err)
		}
		loop.Beat()
		if err := r.Live(); err != nil {
			t.Errorf("turned again: %v", err)
		}
		time.Sleep(time.Hour)
		loop.Stop()
		if err := r.Live(); err != nil {
			t.Errorf("ended: %v", err)
		}
	})
}

func TestMetrics(t *testing.T) {
	r, registry, _, disk := node(newClock())
	registry.OK("")
	disk.Fail("full", "")
	metrics := prometheus.NewPedanticRegistry()
	metrics.MustRegister(r.Collector())
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[f.GetName()+"/"+m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
		}
	}
	want := map[string]float64{
		"hearth_health_check/registry": 1, "hearth_health_check/pull": 0, "hearth_health_check/disk": 0,
		"hearth_node_state/healthy": 0, "hearth_node_state/degraded": 1, "hearth_node_state/failed": 0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func fullSections(context.Context) Sections {
	at := time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC)
	return Sections{
		Functions: &v1alpha1.FunctionsStatus{Total: 3, Warm: 2, FailedCount: 1, Failed: []v1alpha1.FailedFunction{
			{Name: "hello", Revision: 2, Serving: 1, Error: v1alpha1.FunctionError{Code: "digest-mismatch", Detail: "other bytes"}}}},
		Store:  &v1alpha1.StoreStatus{Path: "/data/store", Objects: 4, UsedBytes: 1 << 20, BudgetBytes: 1 << 30},
		Engine: &v1alpha1.EngineStatus{Reachable: true, PID: 7, Generation: 9, Workers: []v1alpha1.WorkerStatus{{ID: "w1", Tenant: "default", PID: 8, State: "running", Since: at, Functions: 3}}},
		Disk:   &v1alpha1.DiskStatus{Path: "/data", TotalBytes: 1 << 40, FreeBytes: 1 << 39},
	}
}

func TestServerOnItsSocket(t *testing.T) {
	r, registry, pull, disk := node(newClock())
	registry.OK("answers in 1 ms")
	pull.OK("")
	disk.Fail("3 MiB free", "")
	r.RecordError("pull-failed", "hello", errors.New("refused"))
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(r.Collector())
	server := NewServer(ServerOptions{Registry: r, Node: "laptop", Versions: v1alpha1.Versions{Hearth: "devel"}, Sections: fullSections, Gatherer: metrics})

	path := filepath.Join(t.TempDir(), "agent.sock")
	ln, err := localsocket.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	client := localsocket.HTTPClient(path)
	get := func(path string) (int, []byte) {
		t.Helper()
		resp, err := client.Get(localsocket.BaseURL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, body
	}

	code, body := get("/v1/status")
	var status v1alpha1.NodeStatus
	if err := json.Unmarshal(body, &status); err != nil || code != http.StatusOK {
		t.Fatal(code, err)
	}
	if status.Kind != "NodeStatus" || status.State != v1alpha1.NodeDegraded || status.Functions.Warm != 2 || status.Node != "laptop" {
		t.Errorf("%s", body)
	}
	validate(t, body)
	if code, body := get("/readyz"); code != http.StatusOK || string(body) != "ok\n" {
		t.Errorf("readyz: %d %s", code, body)
	}
	registry.Fail("gone", "")
	if code, body := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(string(body), "registry: gone") {
		t.Errorf("readyz: %d %s", code, body)
	}
	if code, body := get("/readyz?verbose"); code != http.StatusServiceUnavailable || !json.Valid(body) {
		t.Errorf("readyz?verbose: %d %s", code, body)
	}
	if code, body := get("/livez"); code != http.StatusOK {
		t.Errorf("livez: %d %s", code, body)
	}
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(string(body), `hearth_health_check{code="registry"} 0`) {
		t.Errorf("metrics: %d %s", code, body)
	}
	client.CloseIdleConnections()
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestStatusDoesNotWaitForAPartThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var calls atomic.Int32
		s := NewServer(ServerOptions{Registry: NewRegistry(Options{}), Sections: func(ctx context.Context) Sections {
			calls.Add(1)
			<-release // deaf to its context
			return fullSections(ctx)
		}})
		start := time.Now()
		for range 3 {
			if status := s.Status(t.Context()); status.Functions != nil {
				t.Error("sections came from nowhere")
			}
		}
		if d := time.Since(start); d != 3*sectionsWait || calls.Load() != 1 {
			t.Errorf("took %v, %d calls", d, calls.Load())
		}
		close(release)
		synctest.Wait()
		if status := s.Status(t.Context()); status.Functions == nil {
			t.Error("sections are still missing")
		}
	})
}

func TestEmptyStatusIsValid(t *testing.T) {
	s := NewServer(ServerOptions{Registry: NewRegistry(Options{}), Node: "n"})
	recorder := httptest.NewRecorder()
	s.Handler().ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/v1/status", nil))
	validate(t, recorder.Body.Bytes())
	if strings.Contains(recorder.Body.String(), "null") {
		t.Errorf("null in %s", recorder.Body)
	}
}

// validate checks a document against docs/status.schema.json; it knows the
// keywords that the schema uses and fails on others.
func validate(t *testing.T, document []byte) {
	t.Helper()
	data, err := os.ReadFile("../../docs/status.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(document, &v); err != nil {
		t.Fatal(err)
	}
	check(t, schema, schema, "", v)
}

func check(t *testing.T, root, schema map[string]any, at string, v any) {
	t.Helper()
	for keyword, want := range schema {
		switch keyword {
		case "$schema", "$id", "title", "description", "$defs", "items":
		case "$ref":
			defs := root["$defs"].(map[string]any)
			check(t, root, defs[strings.TrimPrefix(want.(string), "#/$defs/")].(map[string]any), at, v)
		case "type":
			got := map[bool]string{true: "object"}[isType[map[string]any](v)] + map[bool]string{true: "array"}[isType[[]any](v)] +
				map[bool]string{true: "string"}[isType[string](v)] + map[bool]string{true: "boolean"}[isType[bool](v)]
			if n, ok := v.(float64); ok {
				got = "number"
				if n == float64(int64(n)) {
					got = "integer"
				}
			}
			if got != want {
				t.Errorf("%s is %q, not %q", at, got, want)
			}
		case "const":
			if v != want {
				t.Errorf("%s is %v, not %v", at, v, want)
			}
		case "enum":
			found := false
			for _, e := range want.([]any) {
				found = found || e == v
			}
			if !found {
				t.Errorf("%s is %v, not one of %v", at, v, want)
			}
		case "minimum":
			if n, _ := v.(float64); n < want.(float64) {
				t.Errorf("%s is %v", at, v)
			}
		case "format":
			if _, err := time.Parse(time.RFC3339Nano, v.(string)); err != nil {
				t.Errorf("%s: %v", at, err)
			}
		case "required":
			members, _ := v.(map[string]any)
			for _, name := range want.([]any) {
				if _, ok := members[name.(string)]; !ok {
					t.Errorf("%s.%s is missing", at, name)
				}
			}
		case "properties":
			members, _ := v.(map[string]any)
			for name, member := range members {
				property, ok := want.(map[string]any)[name].(map[string]any)
				if !ok {
					t.Errorf("%s.%s is not in the schema", at, name)
					continue
				}
				check(t, root, property, at+"."+name, member)
			}
		default:
			t.Fatalf("keyword %q is not understood", keyword)
		}
	}
	if items, ok := schema["items"].(map[string]any); ok {
		elements, _ := v.([]any)
		for i, e := range elements {
			check(t, root, items, fmt.Sprintf("%s[%d]", at, i), e)
		}
	}
}

func isType[T any](v any) bool { _, ok := v.(T); return ok }

func BenchmarkReport(b *testing.B) {
	r, registry, _, _ := node(newClock())
	for b.Loop() {
		registry.OK("answers")
	}
	_ = r.Ready()
}
