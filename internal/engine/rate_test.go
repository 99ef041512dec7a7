package engine

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

func TestARateGrantsWhatItSays(t *testing.T) {
	tests := map[string]struct {
		perSecond float64
		burst     int           // at once, after a pause
		next      time.Duration // until the next
	}{
		"some":             {5, 10, 200 * time.Millisecond},
		"one":              {1, 2, time.Second},
		"one in ten":       {.1, 1, 10 * time.Second},
		"one in centuries": {1e-300, 1, math.MaxInt64/4 + 1}, // nearest of floats
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRate(tt.perSecond)
			now := time.Hour
			for i := range tt.burst {
				if wait, ok := r.take(now); !ok {
					t.Fatalf("the request %d of %d waits %s", i+1, tt.burst, wait)
				}
			}
			wait, ok := r.take(now)
			if ok || wait != tt.next {
				t.Fatalf("%t, wait %s", ok, wait)
			}
			// What is refused takes nothing, and the time said is enough.
			for range 100 {
				r.take(now)
			}
			if _, ok := r.take(now + wait - 1); ok {
				t.Error("granted too early")
			}
			if wait, ok := r.take(now + wait); !ok {
				t.Errorf("wait another %s", wait)
			}
			if r.idle(now) {
				t.Error("idle while it is used")
			}
		})
	}
	for _, perSecond := range []float64{0, -1, math.NaN()} {
		r := newRate(perSecond)
		for range 1000 {
			if _, ok := r.take(0); !ok {
				t.Fatalf("%v is a limit", perSecond)
			}
		}
	}
	if _, ok := (*rate)(nil).take(0); !ok {
		t.Error("none is a limit")
	}
	fast := newRate(math.Inf(1))
	if _, ok := fast.take(1); !ok {
		t.Error("an endless rate refuses")
	}
}

func TestARateIsSharedFairlyByManyGoroutines(t *testing.T) {
	r := newRate(1000)
	var granted atomic.Int64
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			for range 1000 {
				if _, ok := r.take(time.Minute); ok {
					granted.Add(1)
				}
			}
		})
	}
	group.Wait()
	if granted.Load() != 2000 {
		t.Errorf("%d granted at once", granted.Load())
	}
}

func TestATenantsVisitorsTakeNothingFromOthers(t *testing.T) {
	t.Parallel()
	n := startNode(t, func(o *Options) { o.TenantRate = .01 }) // one now, the next in a hundred seconds
	of := func(name, tenant string) control.Function {
		return n.function(name, "c", func(f *control.Function) { f.Tenant = tenant })
	}
	n.deploy(of("a", "one"), of("b", "one"), of("c", "two"))
	wantBody(t, n.get("a", "/"), 200, "hello from c\n")
	// Of all functions of the tenant together, whatever is asked of them.
	for _, refused := range []answer{
		n.get("b", "/"), n.get("a", "/status"), n.at("localhost", "/f/a/"),
		n.send(n.request(t.Context(), http.MethodPost, "a.localhost", "/count", strings.NewReader(strings.Repeat("x", 1<<20)))),
	} {
		wantProblem(t, refused, 429, "too-many-invocations")
		if after, err := strconv.Atoi(refused.Header.Get("Retry-After")); err != nil || after < 1 || after > 100 {
			t.Errorf("Retry-After %q", refused.Header.Get("Retry-After"))
		}
		if !refused.problem(t).Retryable {
			t.Error("not said to be passing")
		}
	}
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	// Neither another revision nor being deleted and made again begins anew.
	n.deploy(of("c", "two"))
	n.deploy(of("a", "one"), of("c", "two"))
	wantProblem(t, n.get("a", "/"), 429, "too-many-invocations")
	if got := n.counted("too-many-invocations"); got != 5 {
		t.Errorf("%v counted", got)
	}
	// What is not of a tenant is not counted for any: not there is not there.
	for range 3 {
		wantProblem(t, n.get("absent", "/"), 404, "function-not-found")
	}
}

func TestAForwardedRequestCountsWhereItIsAnswered(t *testing.T) {
	t.Parallel()
	once := func(o *Options) { o.TenantRate = .01 }
	serving, asked := startNode(t, once), startNode(t, once)
	serving.deploy(serving.function("c", "c", nil))
	asked.elsewhere("c", serving.address)
	wantBody(t, asked.get("c", "/"), 200, "hello from c\n")
	p := asked.get("c", "/")
	if p.StatusCode != 429 || p.Header.Get("Retry-After") == "" || p.problem(t).Type != problemPrefix+"too-many-invocations" {
		t.Errorf("%d %v %s", p.StatusCode, p.Header, p.body)
	}
	// Whoever says that it was forwarded does not get around it.
	r := serving.request(t.Context(), http.MethodGet, "c.localhost", "/", nil)
	r.Header.Set(headerForwarded, "anybody")
	if a := serving.send(r); a.StatusCode != 429 {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
}

// counted is how many requests had this outcome.
func (n *node) counted(outcome string) (sum float64) {
	n.t.Helper()
	families, err := n.control.Metrics(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "hearth_requests_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "outcome" && l.GetValue() == outcome {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}

func BenchmarkRate(b *testing.B) {
	born := time.Now()
	b.Run("one tenant", func(b *testing.B) {
		r := newRate(1e8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				r.take(time.Since(born))
			}
		})
	})
	b.Run("a tenant each", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			r := newRate(1e8)
			for pb.Next() {
				r.take(time.Since(born))
			}
		})
	})
	b.Run("refused", func(b *testing.B) {
		r := newRate(1e-6)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				r.take(time.Since(born))
			}
		})
	})
	b.Run("no limit", func(b *testing.B) {
		r := newRate(0)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				r.take(time.Since(born))
			}
		})
	})
}
