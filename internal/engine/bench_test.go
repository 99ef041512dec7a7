package engine

import (
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

func (n *node) mustGet(b *testing.B, host string) {
	resp, err := n.http.Do(n.request(b.Context(), http.MethodGet, host, "/", nil))
	if err != nil {
		b.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 200 {
		b.Fatal(resp.Status)
	}
}

func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(took[(len(took)-1)*p/100].Microseconds())/1000, "p"+strconv.Itoa(p)+"-ms")
	}
}

// BenchmarkWarmRequest is a request over HTTP through gateway and worker.
func BenchmarkWarmRequest(b *testing.B) {
	for _, guest := range []string{"c", "go"} {
		b.Run(guest, func(b *testing.B) {
			n := startNode(b, nil)
			n.deploy(n.function("f", guest, nil))
			n.mustGet(b, "f.localhost")
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				n.mustGet(b, "f.localhost")
				took = append(took, time.Since(began))
			}
			percentiles(b, took)
		})
	}
}

// BenchmarkWarmParallel is the same from several clients at once.
func BenchmarkWarmParallel(b *testing.B) {
	for _, guest := range []string{"c", "go"} {
		b.Run(guest, func(b *testing.B) {
			n := startNode(b, nil)
			n.deploy(n.function("f", guest, nil))
			n.mustGet(b, "f.localhost")
			b.SetParallelism(4)
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					n.mustGet(b, "f.localhost")
				}
			})
		})
	}
}

// BenchmarkFirstRequest is the first request ever to a function that was
// just reported ready.
func BenchmarkFirstRequest(b *testing.B) {
	for _, guest := range []string{"c", "go"} {
		b.Run(guest, func(b *testing.B) {
			n := startNode(b, nil)
			n.deploy(n.function("f", guest, nil))
			n.mustGet(b, "f.localhost") // the client's connection
			var took []time.Duration
			revision := 1
			for b.Loop() {
				b.StopTimer()
				revision++
				n.deploy(n.function("f", guest, func(f *control.Function) { f.Revision = revision }))
				b.StartTimer()
				began := time.Now()
				n.mustGet(b, "f.localhost")
				took = append(took, time.Since(began))
			}
			percentiles(b, took)
		})
	}
}

// BenchmarkIdleFunction reports what a hundred idle functions of one object
// cost each in one worker, beyond the first, which pays for the object.
func BenchmarkIdleFunction(b *testing.B) {
	const count = 100
	for _, guest := range []string{"c", "go"} {
		b.Run(guest, func(b *testing.B) {
			n := startNode(b, nil)
			n.deploy(n.function("f", guest, nil))
			before, _ := residentBytes(n.worker("default").PID)
			var all []control.Function
			for i := range count {
				all = append(all, n.function("f"+strconv.Itoa(i), guest, nil))
				n.deploy(all...)
			}
			for b.Loop() { //nolint:revive // what is measured is memory
			}
			time.Sleep(3 * time.Second) // what loading left behind is given back
			after, err := residentBytes(n.worker("default").PID)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(after-before)/count/(1<<20), "MiB/function")
			if os.Getenv("HEARTH_BENCH_VERBOSE") != "" {
				b.Logf("%d MiB", after>>20)
			}
		})
	}
}
