package wasm_test

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero/api"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// killBound is how long a killed guest may still run in these tests: two
// hundred times what it takes, for machines that are busy with other things.
const killBound = 20 * time.Second

// straightLine is n times global 0 += 1, without a branch.
func straightLine(n int) []byte {
	one := cat(0x23, 0, i32c(1), 0x6a, 0x24, 0)
	return bytes.Repeat(one, n)
}

// spinners are modules whose export "f" runs for very long, in every way a
// module can.
func spinners() map[string][]byte {
	void := fntype(nil, nil)
	forever := func(code ...any) []byte { return cat(0x03, 0x40, cat(code...), 0x0c, 0, 0x0b) }
	const pages = 4096 // 256 MiB
	const half, all = pages << 15, pages << 16

	chain := func(n int) []byte { // f0 calls f1 twice, f1 calls f2 twice, …
		var funcs, bodies [][]byte
		for i := range n {
			funcs = append(funcs, []byte{0})
			if i == n-1 {
				bodies = append(bodies, body(nil))
			} else {
				bodies = append(bodies, body(nil, 0x10, uleb(i+1), 0x10, uleb(i+1)))
			}
		}
		return module(sec(1, vec(void)), sec(3, vec(funcs...)), sec(7, vec(export("f", 0, 0))), sec(10, vec(bodies...)))
	}
	indirect := module(sec(1, vec(void)), sec(3, vec([]byte{0}, []byte{0})),
		sec(4, vec([]byte{0x70, 0, 2})), sec(7, vec(export("f", 0, 0))),
		sec(9, vec(cat(0, i32c(0), 0x0b, vec([]byte{0}, []byte{1})))),
		sec(10, vec(body(nil, forever(i32c(1), 0x11, 0, 0)), body(nil))))
	recursion := module(sec(1, vec(fntype([]byte{tI32}, nil))), sec(3, vec([]byte{0})), sec(7, vec(export("f", 0, 0))),
		// Twice as many calls at every level, so that the stack never overflows.
		sec(10, vec(body(nil, 0x20, 0, 0x45, 0x04, 0x40, 0x0f, 0x0b, 0x20, 0, i32c(1), 0x6b, 0x10, 0, 0x20, 0, i32c(1), 0x6b, 0x10, 0))))
	straight := module(sec(1, vec(void)), sec(3, vec([]byte{0}, []byte{0})),
		sec(6, vec(cat(tI32, 1, i32c(0), 0x0b))), sec(7, vec(export("f", 0, 0))),
		sec(10, vec(body(nil, bytes.Repeat(cat(0x10, 1), 20000), forever(bytes.Repeat(cat(0x10, 1), 100))), body(nil, straightLine(10000)))))
	withData := func(code ...any) []byte {
		return module(sec(1, vec(void)), sec(3, vec([]byte{0})), sec(5, vec(cat(0, uleb(pages)))),
			sec(7, vec(export("f", 0, 0))), sec(12, 1), sec(10, vec(body(nil, code...))),
			sec(11, vec(cat(1, uleb(1<<20), bytes.Repeat([]byte{7}, 1<<20)))))
	}
	table := module(sec(1, vec(void)), sec(3, vec([]byte{0})), sec(4, vec(cat(0x70, 0, uleb(200_000)))),
		sec(7, vec(export("f", 0, 0))),
		sec(10, vec(body(nil, forever(i32c(0), 0xd0, 0x70, i32c(200_000), 0xfc, 17, 0, i32c(0), i32c(1), i32c(199_999), 0xfc, 14, 0, 0)))))
	brTable := single(-1, 0x03, 0x40, 0x02, 0x40, 0x02, 0x40, i32c(1), 0x0e, 2, 0, 1, 2, 0x0b, 0x0c, 1, 0x0b, 0x0c, 0, 0x0b)
	nested := single(-1, bytes.Repeat(cat(0x03, 0x40), 50), 0x0c, 0, bytes.Repeat(cat(0x0b), 50))
	startLoop := module(sec(1, vec(void)), sec(3, vec([]byte{0})), sec(8, 0), sec(10, vec(body(nil, forever()))))

	return map[string][]byte{
		"empty loop":                single(-1, forever()),
		"conditional loop":          single(-1, 0x03, 0x40, i32c(1), 0x0d, 0, 0x0b),
		"br_table loop":             brTable,
		"nested loops":              nested,
		"doubling call chain":       chain(60),
		"doubling recursion":        recursion,
		"indirect calls of a leaf":  indirect,
		"giant straight-line code":  straight,
		"loop in the start section": startLoop,
		"touching every page": module(sec(1, vec(void)), sec(3, vec([]byte{0})), sec(5, vec(cat(0, uleb(pages)))),
			sec(6, vec(cat(tI32, 1, i32c(0), 0x0b))), sec(7, vec(export("f", 0, 0))),
			sec(10, vec(body(nil, forever(0x23, 0, i32c(1), 0x36, 2, 0, 0x23, 0, i32c(4096), 0x6a, i32c(all-1), 0x71, 0x24, 0))))),
		"fill storm":          single(pages, forever(i32c(0), i32c(1), i32c(all), 0xfc, 11, 0)),
		"copy storm":          single(pages, forever(i32c(0), i32c(half), i32c(half), 0xfc, 10, 0, 0)),
		"backward copy storm": single(pages, forever(i32c(1), i32c(0), i32c(all-1), 0xfc, 10, 0, 0)),
		"one long fill after another": single(pages, bytes.Repeat(
			cat(i32c(0), i32c(1), i32c(all), 0xfc, 11, 0), 2000)),
		"init storm":  withData(forever(i32c(4096), i32c(0), i32c(1<<20), 0xfc, 8, 0, 0)),
		"table storm": table,
		"grow storm":  single(1, forever(i32c(0), 0x40, 0, 0x1a)),
		"wide loop": module(sec(1, vec(void, fntype(bytes.Repeat([]byte{tI64}, 900), bytes.Repeat([]byte{tI64}, 900)))),
			sec(3, vec([]byte{0})), sec(7, vec(export("f", 0, 0))),
			sec(10, vec(body(nil, bytes.Repeat(i64c(3), 900), 0x03, 1, 0x0c, 0, 0x0b, bytes.Repeat([]byte{0x1a}, 900))))),
	}
}

func TestEveryGuestStopsWhenKilled(t *testing.T) {
	for name, m := range spinners() {
		t.Run(name, func(t *testing.T) {
			r := newRuntime(t)
			instance := instantiate(t, r, mustLower(t, m, options()).Bytes)
			f := instance.ExportedFunction("f")
			if f == nil {
				f = instance.ExportedFunction(wasm.ExportStart)
			}
			args := make([]uint64, len(f.Definition().ParamTypes()))
			for i := range args {
				args[i] = 60
			}
			done := make(chan error, 1)
			go func() {
				_, err := f.Call(t.Context(), args...)
				done <- err
			}()
			select {
			case err := <-done:
				t.Fatalf("ended by itself: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			killed := time.Now()
			setKill(t, instance)
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), "unreachable") {
					t.Errorf("got %v, want the trap of the checkpoint", err)
				}
				t.Logf("stopped %v after it was killed", time.Since(killed))
			case <-time.After(killBound):
				// The guest's thread can't be stopped from here.
				fmt.Fprintf(os.Stderr, "%s: still running %v after it was killed\n", t.Name(), killBound)
				os.Exit(2)
			}
			// Kill is sticky: whatever runs next stops as well.
			if _, err := f.Call(t.Context(), args...); err == nil || !strings.Contains(err.Error(), "unreachable") {
				t.Errorf("second call: got %v", err)
			}
		})
	}
}

func TestInfiniteRecursionOverflowsTheStack(t *testing.T) {
	m := single(-1, 0x10, 0)
	i := instantiate(t, newRuntime(t), mustLower(t, m, options()).Bytes)
	if _, err := i.ExportedFunction("f").Call(t.Context()); err == nil || !strings.Contains(err.Error(), "stack overflow") {
		t.Errorf("got %v", err)
	}
}

// Calls that return one after the other, each to code that was paid for before
// the call, are no way to go on after a kill either.
func TestDeepRecursionStopsOnItsWayBack(t *testing.T) {
	m := module(sec(1, vec(fntype([]byte{tI32}, nil), fntype(nil, nil))),
		sec(2, vec(cat(str("env"), str("bottom"), 0, 1))), sec(3, vec([]byte{0})),
		sec(6, vec(cat(tI32, 1, i32c(0), 0x0b))), sec(7, vec(export("f", 0, 1), export("g", 3, 0))),
		sec(10, vec(body(nil, 0x20, 0, 0x45, 0x04, 0x40, 0x10, 0, 0x0f, 0x0b, 0x20, 0, i32c(1), 0x6b, 0x10, 1, straightLine(900)))))
	r := newRuntime(t)
	var i api.Module
	_, err := r.NewHostModuleBuilder("env").NewFunctionBuilder().WithFunc(func() { setKill(t, i) }).Export("bottom").Instantiate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i = instantiate(t, r, mustLower(t, m, options()).Bytes)
	if _, err := i.ExportedFunction("f").Call(t.Context(), 50_000); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("got %v", err)
	}
	// A refill's worth of code at most, of 50 times as much.
	if got := i.ExportedGlobal("g").Get(); got > wasm.DefaultRefillFuel {
		t.Errorf("%d rounds after it was killed", got)
	}
}

// With more guests spinning than there are processors for Go, the collector
// and the timers still get their turn, because every guest returns to Go at
// its checkpoints.
func TestCollectorRunsWhileMoreGuestsSpinThanProcessors(t *testing.T) {
	r := newRuntime(t)
	lowered := mustLower(t, single(-1, 0x03, 0x40, 0x0c, 0, 0x0b), options()).Bytes
	n := runtime.GOMAXPROCS(0) + 2
	done := make(chan struct{}, n)
	var instances []api.Module
	for range n {
		i := instantiate(t, r, lowered)
		instances = append(instances, i)
		go func() {
			_, _ = i.ExportedFunction("f").Call(t.Context())
			done <- struct{}{}
		}()
	}
	stop := watchdog(t, 60*time.Second)
	defer stop()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before) // stops the world, like a collection
	for after.NumGC < before.NumGC+10 {
		garbage := make([][]byte, 0, 64)
		for range 64 {
			garbage = append(garbage, make([]byte, 1<<20))
		}
		runtime.KeepAlive(garbage)
		runtime.ReadMemStats(&after)
	}
	for _, i := range instances {
		setKill(t, i)
	}
	for range n {
		<-done
	}
	t.Logf("%d collections by themselves with %d guests spinning", after.NumGC-before.NumGC, n)
}

func TestFuelIsAccounted(t *testing.T) {
	// A loop of a million rounds.
	m := module(sec(1, vec(fntype(nil, nil))), sec(3, vec([]byte{0})), sec(7, vec(export("f", 0, 0))),
		sec(10, vec(body(cat(1, 1, tI32), i32c(1_000_000), 0x21, 0, 0x03, 0x40, 0x20, 0, i32c(1), 0x6b, 0x22, 0, 0x0d, 0, 0x0b))))
	i := instantiate(t, newRuntime(t), mustLower(t, m, options()).Bytes)
	if _, err := i.ExportedFunction("f").Call(t.Context()); err != nil {
		t.Fatal(err)
	}
	refills := int64(i.ExportedGlobal(wasm.ExportRefills).Get())
	used := refills*wasm.DefaultRefillFuel - int64(int32(i.ExportedGlobal(wasm.ExportFuel).Get()))
	// Five instructions a round, and the header.
	if used < 5_000_000 || used > 7_000_000 {
		t.Errorf("used %d in %d refills", used, refills)
	}
}
