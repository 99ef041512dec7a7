package wasm_test

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"github.com/hearth-sh/hearth/internal/wasm"
)

func BenchmarkLowerGoGuest(b *testing.B) {
	guest, err := goGuest()
	if err != nil {
		b.Skip(err)
	}
	for name, o := range map[string]wasm.LowerOptions{
		"checks":    {Limits: wasm.DefaultLimits(), InterruptChecks: true},
		"remainder": {Limits: wasm.DefaultLimits(), InterruptChecks: true, RemainderByDivision: true},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(guest)))
			b.ReportAllocs()
			for b.Loop() {
				mustLower(b, guest, o)
			}
		})
	}
	b.Run("parse", func(b *testing.B) {
		b.SetBytes(int64(len(guest)))
		for b.Loop() {
			if _, err := wasm.Parse(guest, wasm.DefaultLimits()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkComputeBoundGoGuest compares what it costs a guest to be
// stoppable: not at all, by lowering, and by wazero's own means.
func BenchmarkComputeBoundGoGuest(b *testing.B) {
	guest, err := goGuest()
	if err != nil {
		b.Skip(err)
	}
	lowered := mustLower(b, guest, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true}).Bytes
	for _, c := range []struct {
		name        string
		module      []byte
		termination bool
	}{{"plain", guest, false}, {"lowered", lowered, false}, {"CloseOnContextDone", guest, true}} {
		b.Run(c.name, func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigCompiler().WithCloseOnContextDone(c.termination))
			defer r.Close(context.Background())
			wasi_snapshot_preview1.MustInstantiate(ctx, r)
			compiled, err := r.CompileModule(ctx, c.module)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				m, err := r.InstantiateModule(ctx, compiled, wazero.NewModuleConfig().WithName("").WithArgs("compute", "5").WithStdout(io.Discard))
				if err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
					b.Fatal(err)
				}
				if m != nil {
					_ = m.Close(ctx)
				}
			}
		})
	}
}

// BenchmarkCheckpoint is one pass through a checkpoint: into Go and back.
func BenchmarkCheckpoint(b *testing.B) {
	// A loop whose every round copies a whole table, so that each passes one.
	m := module(sec(1, vec(fntype([]byte{tI32}, nil))), sec(3, vec([]byte{0})), sec(4, vec([]byte{0x70, 0, 1})), sec(7, vec(export("f", 0, 0))),
		sec(10, vec(body(nil, 0x03, 0x40, i32c(0), i32c(0), 0x20, 0, i32c(0), 0x6c, 0xfc, 14, 0, 0, 0x20, 0, i32c(1), 0x6b, 0x22, 0, 0x0d, 0, 0x0b))))
	r := wazero.NewRuntime(b.Context())
	defer r.Close(context.Background())
	i, err := r.Instantiate(b.Context(), mustLower(b, m, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true}).Bytes)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := i.ExportedFunction("f").Call(b.Context(), uint64(b.N)); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkTightLoops runs loops as C compilers make them, a few instructions
// each, which is where a check weighs most. Plain and lowered take turns.
func BenchmarkTightLoops(b *testing.B) {
	const n = 60_000 // bytes or rounds of each loop
	counted := func(step int32, code ...any) []byte {
		return rounds(0x20, 1, 0x21, 3, 0x03, 0x40, cat(code...), 0x20, 3, i32c(step), 0x6a, 0x22, 3, 0x20, 0, 0x49, 0x0d, 0, 0x0b)
	}
	for _, c := range []struct {
		name string
		m    []byte
	}{
		{"sieve", counted(3, 0x20, 3, i32c(1), 0x3a, 0, 0)},
		{"sum", counted(1, 0x20, 3, 0x2d, 0, 0, 0x20, 2, 0x6a, 0x21, 2)},
		{"hash", counted(1, 0x20, 2, 0x20, 3, 0x73, i32c(16777619), 0x6c, 0x21, 2)},
		{"copy", counted(1, 0x20, 3, 0x20, 3, 0x2d, 0, 8, 0x3a, 0, 0)},
		{"count", counted(1)},
	} {
		r := newRuntime(b)
		plain := instantiate(b, r, c.m).ExportedFunction("f")
		lowered := instantiate(b, r, mustLower(b, c.m, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true}).Bytes).ExportedFunction("f")
		b.Run(c.name, func(b *testing.B) {
			var took [2][]time.Duration
			for b.Loop() {
				for k, f := range []api.Function{plain, lowered} {
					start := time.Now()
					if _, err := f.Call(b.Context(), n, 0); err != nil {
						b.Fatal(err)
					}
					took[k] = append(took[k], time.Since(start))
				}
			}
			slices.Sort(took[0])
			slices.Sort(took[1])
			p, l := took[0][len(took[0])/2], took[1][len(took[1])/2]
			b.ReportMetric(float64(p.Nanoseconds()), "plain-ns")
			b.ReportMetric(float64(l.Nanoseconds()), "lowered-ns")
			b.ReportMetric(100*(float64(l)/float64(p)-1), "%slower")
		})
	}
}
