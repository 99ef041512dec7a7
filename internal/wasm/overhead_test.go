package wasm_test

import (
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// processorTime is how long the calling thread has run, in nanoseconds'
// resolution, unlike what getrusage says.
func processorTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// BenchmarkCheckOverhead says for each shape of code how much slower its
// checks make it. Plain and lowered take short turns, in processor time, and
// the median of how neighbours compare counts: what else the machine does
// disturbs both alike.
func BenchmarkCheckOverhead(b *testing.B) {
	m := readTestdata(b, "shapes.wasm")
	r := newRuntime(b)
	plain := instantiate(b, r, m)
	lowered := instantiate(b, r, mustLower(b, m, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true}).Bytes)
	for _, c := range []struct {
		name string
		work uint64 // for 0.3 to 1 ms
	}{
		{"fib", 25}, {"fib_unoptimized", 22}, {"ackermann", 8}, {"mutual", 40}, {"tree", 3},
		{"quicksort", 1}, {"indirect", 10}, {"helpers", 40}, {"queens", 6},
		{"sieve", 1}, {"matmul", 1}, {"sha256", 800}, {"hash", 300},
	} {
		b.Run(c.name, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			turn := func(i api.Module) float64 {
				start := processorTime(b)
				if _, err := i.ExportedFunction(c.name).Call(b.Context(), c.work); err != nil {
					b.Fatal(err)
				}
				return float64(processorTime(b) - start)
			}
			compare(b, func() float64 { return turn(plain) }, func() float64 { return turn(lowered) })
		})
	}
}

// BenchmarkGuestOverhead is the same for whole programs: the compute-bound Go
// guest, and any WASI command named by WASM_GUEST.
func BenchmarkGuestOverhead(b *testing.B) {
	guests := map[string]func() ([]byte, error){"go": goGuest}
	if path := os.Getenv("WASM_GUEST"); path != "" {
		guests["named"] = func() ([]byte, error) { return os.ReadFile(path) }
	}
	for name, read := range guests {
		b.Run(name, func(b *testing.B) {
			guest, err := read()
			if err != nil {
				b.Skip(err)
			}
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			r := newRuntime(b)
			wasi_snapshot_preview1.MustInstantiate(b.Context(), r)
			var compiled [2]wazero.CompiledModule
			var compileTime [2]float64
			for k, m := range [][]byte{guest, mustLower(b, guest, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true}).Bytes} {
				start := processorTime(b)
				if compiled[k], err = r.CompileModule(b.Context(), m); err != nil {
					b.Fatal(err)
				}
				compileTime[k] = float64(processorTime(b) - start)
			}
			arguments := []string{"compute", "1"}
			if only := os.Getenv("WASM_GUEST_ARGUMENT"); only != "" && name == "named" {
				arguments[1] = only
			}
			turn := func(k int) float64 {
				start := processorTime(b)
				m, err := r.InstantiateModule(b.Context(), compiled[k], wazero.NewModuleConfig().WithName("").WithArgs(arguments...).WithStdout(io.Discard))
				if err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
					b.Fatal(err)
				}
				if m != nil {
					_ = m.Close(b.Context())
				}
				return float64(processorTime(b) - start)
			}
			compare(b, func() float64 { return turn(0) }, func() float64 { return turn(1) })
			b.ReportMetric(100*(compileTime[1]/compileTime[0]-1), "%slower-to-compile")
		})
	}
}

// compare runs both until the benchmark has enough, and reports.
func compare(b *testing.B, plain, lowered func() float64) {
	var base, ratio []float64
	for b.Loop() {
		// Both orders, so that a change of speed cancels out.
		p, l := plain(), lowered()
		l += lowered()
		p += plain()
		base = append(base, p/2)
		ratio = append(ratio, l/p)
	}
	slices.Sort(base)
	slices.Sort(ratio)
	b.ReportMetric(base[len(base)/2], "plain-ns")
	b.ReportMetric(100*(ratio[len(ratio)/2]-1), "%slower")
	b.ReportMetric(0, "ns/op")
}
