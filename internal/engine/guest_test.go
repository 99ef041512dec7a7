package engine

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

func TestGuestsAnswerUnderBothURLForms(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("go", "go", nil))
	wantBody(t, n.get("c", "/hello"), 200, "hello from c\n")
	wantBody(t, n.get("go", "/"), 200, "hello from go\n")
	for _, path := range []string{"/f/c/hello", "/f/c", "/f/c/"} {
		a := n.send(n.request(t.Context(), http.MethodGet, "localhost", path, nil))
		wantBody(t, a, 200, "hello from c\n")
		if got := a.Header.Get("Content-Security-Policy"); got != pathFormPolicy {
			t.Errorf("%s: policy %q", path, got)
		}
	}
	wantBody(t, n.send(n.request(t.Context(), http.MethodGet, "127.0.0.1:8080", "/f/go/", nil)), 200, "hello from go\n")
	a := n.get("c", "/hello")
	if a.ContentLength != int64(len("hello from c\n")) {
		t.Errorf("a short answer has length %d", a.ContentLength)
	}
	for _, phase := range []string{"queue;dur=", "load;dur=", "instantiate;dur=", "firstbyte;dur="} {
		if !strings.Contains(a.Header.Get("Server-Timing"), phase) {
			t.Errorf("no %s in Server-Timing %q", phase, a.Header.Get("Server-Timing"))
		}
	}
	if a.Header.Get("Content-Security-Policy") != "" {
		t.Error("the host form has an origin of its own and needs no policy")
	}
}

// Every kind of fault is answered with its own code, and the worker lives on.
func TestHostileGuestsHarmOnlyTheirRequest(t *testing.T) {
	n := startNode(t, nil)
	short := func(f *control.Function) { f.TimeoutMS, f.MemoryMiB = 1000, 32 }
	// For guests that end by themselves, on a machine that may be slow.
	patient := func(f *control.Function) { f.TimeoutMS, f.MemoryMiB = 30_000, 32 }
	n.deploy(n.function("bad", "c", short), n.function("good", "c", nil), n.function("badgo", "go", short),
		n.function("faulty", "c", patient), n.function("faultygo", "go", patient))
	pid := n.worker("default").PID
	tests := []struct {
		function, path string
		status         int
		code           string
		detail         string
	}{
		{"bad", "/spin", 504, "deadline-exceeded", ""},
		{"faulty", "/recurse", 502, "stack-overflow", "recursion"},
		{"faulty", "/memory", 502, "function-out-of-memory", "32 MiB"},
		{"faulty", "/exit", 502, "function-exited", "code 1"},
		{"faulty", "/garbage", 502, "invalid-response", "this is not a header"},
		{"faulty", "/nothing", 502, "invalid-response", ""},
		{"faulty", "/trap", 502, "function-trapped", "unreachable"},
		{"bad", "/sleep", 504, "deadline-exceeded", ""},
		{"bad", "/stdin", 504, "deadline-exceeded", ""},
		{"bad", "/iovs", 504, "deadline-exceeded", ""},
		{"bad", "/poll", 504, "deadline-exceeded", ""},
		{"bad", "/entropy", 504, "deadline-exceeded", ""},
		{"bad", "/stderr", 504, "deadline-exceeded", ""},
		{"badgo", "/spin", 504, "deadline-exceeded", ""},
		{"faultygo", "/panic", 502, "function-exited", "code 2"},
		{"faultygo", "/memory", 502, "function-out-of-memory", "32 MiB"},
	}
	for _, test := range tests {
		t.Run(test.function+test.path, func(t *testing.T) {
			began := time.Now()
			p := wantProblem(t, n.get(test.function, test.path), test.status, test.code)
			if !strings.Contains(p.Detail, test.detail) {
				t.Errorf("detail %q does not say %q", p.Detail, test.detail)
			}
			t.Logf("%v: %s", time.Since(began).Round(time.Millisecond), p.Detail)
			wantBody(t, n.get("good", "/"), 200, "hello from c\n")
		})
	}
	t.Run("endless stdout is cut off", func(t *testing.T) {
		if a := n.get("faulty", "/stdout"); a.StatusCode != 200 || a.err == nil {
			t.Errorf("status %d, error %v, %d bytes", a.StatusCode, a.err, len(a.body))
		}
		wantBody(t, n.get("good", "/"), 200, "hello from c\n")
	})
	t.Run("failure after the answer began is cut off", func(t *testing.T) {
		if a := n.get("faulty", "/late-exit"); a.err == nil {
			t.Errorf("the client takes %q for the whole", a.body)
		}
	})
	if w := n.worker("default"); w.PID != pid || w.Restarts != 0 {
		t.Errorf("worker %d was %d, %d restarts: %s", w.PID, pid, w.Restarts, w.LastExit)
	}
	n.eventually("the log says why requests failed", func() bool {
		for _, l := range n.lines("faulty", control.LogOptions{}) {
			if l.Stream == "system" && strings.Contains(l.Line, "function-trapped") && l.Request != "" {
				return true
			}
		}
		return false
	})
}

func TestNothingOfOneRequestIsSeenByTheNext(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("go", "go", nil))
	random := map[string]bool{}
	for range 8 {
		wantBody(t, n.get("c", "/state"), 200, "1\n")
		wantBody(t, n.get("go", "/state"), 200, "1\n")
		random[n.get("c", "/random").body] = true
	}
	if len(random) != 8 {
		t.Errorf("randomness repeats: %v", random)
	}
	wantBody(t, n.get("c", "/files"), 200, "refused\n")
	var now int64
	if _, err := fmt.Sscan(n.get("c", "/time").body, &now); err != nil || time.Since(time.Unix(now, 0)).Abs() > time.Hour {
		t.Errorf("the guest's clock says %d (%v)", now, err)
	}
}

func TestTenantsHaveProcessesOfTheirOwn(t *testing.T) {
	for _, test := range []struct {
		isolation Isolation
		workers   int
	}{{IsolationTenant, 2}, {IsolationFunction, 3}, {IsolationShared, 1}} {
		t.Run(string(test.isolation), func(t *testing.T) {
			n := startNode(t, func(o *Options) { o.Isolation = test.isolation })
			n.deploy(n.function("one", "c", nil), n.function("two", "c", nil),
				n.function("other", "c", func(f *control.Function) { f.Tenant = "other" }))
			pids := map[int]bool{}
			for _, w := range n.status().Workers {
				pids[w.PID] = true
			}
			if len(pids) != test.workers {
				t.Errorf("%d processes, want %d", len(pids), test.workers)
			}
			wantBody(t, n.get("other", "/"), 200, "hello from c\n")
		})
	}
}
