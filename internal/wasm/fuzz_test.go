package wasm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// seeds are modules to start mutation from: every way a guest can spin, and
// a sample of the spec testsuite if it is there.
func seeds() [][]byte {
	var all [][]byte
	for name, m := range spinners() {
		if len(m) < 4096 && !strings.Contains(name, "wide") {
			all = append(all, m)
		}
	}
	all = append(all, module(), generate([]byte("hearth")), generate([]byte{9, 8, 7, 6, 5, 4, 3, 2, 1, 200, 150, 100, 50}))
	if root, err := spectestDir(); err == nil {
		for _, name := range []string{
			"bulk.0", "memory_copy.1", "memory_init.0", "table_init.0", "ref_func.1", "br_table.0", "if.0", "loop.0",
			"int_exprs.0", "start.4", "global.0", "elem.0", "simd_load.0", "select.0", "call_indirect.0", "unreached-valid.0",
		} {
			if b, err := os.ReadFile(filepath.Join(root, "v2", "testdata", name+".wasm")); err == nil && len(b) < 4096 {
				all = append(all, b)
			}
		}
	}
	return all
}

// fuzzPages keeps guests of the fuzzer small.
const fuzzPages = 64

func fuzzLimits() wasm.Limits {
	l := wasm.DefaultLimits()
	l.ModuleBytes, l.TableEntries, l.LocalsPerFunction, l.MemoryPages = 1<<20, 10_000, 1000, fuzzPages
	return l
}

// FuzzLowerKeepsInvalidModulesInvalid: whatever the input, Parse and Lower
// return, agree with each other, and if the engine accepts what Lower made,
// it accepts the original too.
func FuzzLowerKeepsInvalidModulesInvalid(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	r := wazero.NewRuntimeWithConfig(f.Context(), wazero.NewRuntimeConfigInterpreter().WithCoreFeatures(api.CoreFeaturesV2).WithMemoryLimitPages(fuzzPages))
	f.Cleanup(func() { _ = r.Close(context.Background()) })
	f.Fuzz(func(t *testing.T, b []byte) {
		_, parseErr := wasm.Parse(b, fuzzLimits())
		for _, o := range []wasm.LowerOptions{
			{Limits: fuzzLimits()},
			{Limits: fuzzLimits(), InterruptChecks: true},
			{Limits: fuzzLimits(), InterruptChecks: true, RemainderByDivision: true},
		} {
			l, err := wasm.Lower(b, o)
			if (err == nil) != (parseErr == nil) {
				t.Fatalf("Parse says %v, Lower says %v", parseErr, err)
			}
			if err != nil {
				var e *wasm.Error
				if !errors.As(err, &e) || e.Offset < 0 || e.Offset > len(b) {
					t.Fatalf("not an error of this package, or out of range: %#v", err)
				}
				continue
			}
			// The worst are empty loops, five bytes each.
			if len(l.Bytes) > 24*len(b)+1024 {
				t.Fatalf("%d bytes became %d", len(b), len(l.Bytes))
			}
			c, err := r.CompileModule(t.Context(), l.Bytes)
			if err != nil {
				continue
			}
			_ = c.Close(t.Context())
			// What is in custom sections is not part of a module's validity,
			// but wazero refuses malformed names, and empty sections at the end.
			c, err = r.CompileModule(t.Context(), b)
			if err != nil && !strings.Contains(err.Error(), "section custom") && !strings.Contains(err.Error(), "custom section") {
				t.Fatalf("the engine refuses the original: %v", err)
			}
			if c != nil {
				_ = c.Close(t.Context())
			}
		}
	})
}

// outcome is all that can be seen of a run: results or trap of every call, and
// the memory and globals afterwards. It is empty if the run was stopped.
func outcome(t *testing.T, r wazero.Runtime, b []byte, lowered bool) (string, bool) {
	t.Helper()
	// Enough for any of these modules that ends at all.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	i, err := r.InstantiateWithConfig(ctx, b, wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		if ctx.Err() != nil {
			return "", false
		}
		return "instantiate", true
	}
	defer i.Close(context.Background())
	if lowered {
		// Killed from outside, as a host does it: the runtime has no means of
		// its own when it runs lowered modules.
		kill := i.ExportedGlobal(wasm.ExportKill).(api.MutableGlobal)
		stop := context.AfterFunc(ctx, func() { kill.Set(1) })
		defer stop()
	}
	var out strings.Builder
	for k := range 8 {
		f := i.ExportedFunction(fmt.Sprintf("f%d", k))
		if f == nil {
			continue
		}
		args := make([]uint64, len(f.Definition().ParamTypes()))
		for n := range args {
			args[n] = uint64(k*31 + n*7)
		}
		got, err := f.Call(ctx, args...)
		if ctx.Err() != nil {
			return "", false
		}
		text := ""
		if err != nil {
			text, _, _ = strings.Cut(err.Error(), "\n")
		}
		if strings.Contains(text, "stack overflow") {
			return "", false // may come earlier or later
		}
		fmt.Fprintf(&out, "%v %s\n", got, text)
	}
	if g := i.ExportedGlobal("g"); g != nil {
		fmt.Fprintf(&out, "global %d\n", g.Get())
	}
	if m := i.Memory(); m != nil {
		buf, _ := m.Read(0, m.Size())
		sum := uint64(14695981039346656037)
		for _, c := range buf {
			sum = (sum ^ uint64(c)) * 1099511628211
		}
		fmt.Fprintf(&out, "memory %d %x\n", m.Size(), sum)
	}
	return out.String(), true
}

// FuzzLoweredModulesBehaveTheSame runs generated modules with and without
// lowering and compares results, traps, memory and globals.
func FuzzLoweredModulesBehaveTheSame(f *testing.F) {
	f.Add([]byte("hearth"))
	for i := range 64 {
		seed := make([]byte, 400)
		for k := range seed {
			seed[k] = byte((k + 1) * (i*2 + 1) * 37 >> (k % 3))
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, recipe []byte) {
		if len(recipe) > 4000 {
			return
		}
		compareRuns(t, generate(recipe))
	})
}

// compareRuns reports whether both runs came to an end.
func compareRuns(t *testing.T, b []byte) bool {
	t.Helper()
	l, err := wasm.Lower(b, wasm.LowerOptions{Limits: fuzzLimits(), InterruptChecks: true, RemainderByDivision: true, RefillFuel: wasm.MinRefillFuel})
	if err != nil {
		t.Fatalf("generated module refused: %v", err)
	}
	config := wazero.NewRuntimeConfigCompiler().WithCoreFeatures(api.CoreFeaturesV2).WithMemoryLimitPages(fuzzPages)
	plain := wazero.NewRuntimeWithConfig(t.Context(), config.WithCloseOnContextDone(true))
	defer plain.Close(context.Background())
	quick := wazero.NewRuntimeWithConfig(t.Context(), config)
	defer quick.Close(context.Background())
	want, ok := outcome(t, plain, b, false)
	if !ok {
		return false
	}
	got, ok := outcome(t, quick, l.Bytes, true)
	if ok && got != want {
		t.Fatalf("lowered:\n%s\noriginal:\n%s\nmodule %x", got, want, b)
	}
	return ok
}

// A generator of valid modules: four functions of type (i32, i32) -> i32 with
// two i32 and two i64 locals, a memory of two pages, a data segment, a global
// and a table. It is directed by the bytes of a recipe and always leaves
// well-typed code.
type generator struct {
	recipe []byte
	out    []byte
	// function is the one being generated: it only calls later ones, so that
	// nearly everything ends.
	function int
}

// call emits a call of a later function, direct or not.
func (g *generator) call(indirect bool) {
	target := g.function + 1 + g.next(3)
	switch {
	case indirect: // beyond the table's four entries it traps
		g.emit(i32c(int32(target)), 0x11, 0, 0)
	case target < 4:
		g.emit(0x10, target)
	default:
		g.emit(0x6a) // i32.add has the same type
	}
}

func (g *generator) next(n int) int {
	if len(g.recipe) == 0 {
		return 0
	}
	c := int(g.recipe[0])
	g.recipe = g.recipe[1:]
	return c % n
}

func (g *generator) emit(parts ...any) { g.out = append(g.out, cat(parts...)...) }

// i32 emits an expression that leaves an i32.
func (g *generator) i32(budget int) {
	if budget <= 0 || len(g.recipe) == 0 {
		g.emit(i32c(int32(g.next(256))))
		return
	}
	switch g.next(12) {
	case 0:
		g.emit(i32c([]int32{0, 1, -1, -1 << 31, 1<<31 - 1, 4096, 65535, 7}[g.next(8)]))
	case 1, 2:
		g.emit(0x20, g.next(4))
	case 3: // binary, remainders often
		g.i32(budget - 1)
		g.i32(budget - 1)
		g.emit([]int{0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f, 0x70, 0x6f, 0x70, 0x71, 0x73, 0x74, 0x48, 0x4d}[g.next(14)])
	case 4:
		g.i32(budget - 1)
		g.emit(0x2d, 0, uleb(g.next(256)*300)) // load8_u, sometimes out of bounds
	case 5:
		g.i64(budget - 1)
		g.emit(0xa7)
	case 6: // if with a result
		g.i32(budget - 1)
		g.emit(0x04, tI32)
		g.i32(budget - 1)
		g.emit(0x05)
		g.i32(budget - 1)
		g.emit(0x0b)
	case 7: // block with a branch that carries a value
		g.emit(0x02, tI32)
		g.i32(budget - 1)
		g.i32(budget - 1)
		g.emit(0x0d, 0)
		g.emit(0x0b)
	case 8:
		g.i32(budget - 1)
		g.i32(budget - 1)
		g.call(false)
	case 9:
		g.i32(budget - 1)
		g.i32(budget - 1)
		g.call(true)
	case 10:
		g.emit(0x3f, 0)
	case 11:
		g.emit(0x23, 0)
	}
}

func (g *generator) i64(budget int) {
	if budget <= 0 || len(g.recipe) == 0 {
		g.emit(i64c(int64(g.next(256)) - 128))
		return
	}
	switch g.next(4) {
	case 0:
		g.emit(i64c([]int64{0, 1, -1, -1 << 63, 1<<63 - 1, 10}[g.next(6)]))
	case 1:
		g.emit(0x20, 4+g.next(2))
	case 2:
		g.i64(budget - 1)
		g.i64(budget - 1)
		g.emit([]int{0x7c, 0x7d, 0x7e, 0x7f, 0x80, 0x81, 0x82, 0x81, 0x82}[g.next(9)])
	case 3:
		g.i32(budget - 1)
		g.emit(0xac)
	}
}

// statement emits code that leaves nothing.
func (g *generator) statement(budget int) {
	if budget <= 0 || len(g.recipe) == 0 {
		g.emit(0x01)
		return
	}
	switch g.next(16) {
	case 0:
		g.i32(budget - 1)
		g.emit(0x21, g.next(3))
	case 1:
		g.i64(budget - 1)
		g.emit(0x21, 4+g.next(2))
	case 2:
		g.i32(budget - 1)
		g.emit(i32c(0xffff), 0x71)
		g.i32(budget - 1)
		g.emit(0x36, 0, 0)
	case 3: // a loop with a counter of its own in local 3
		g.emit(i32c(int32(g.next(9))), 0x21, 3, 0x03, 0x40)
		g.statements(budget - 1)
		g.emit(0x20, 3, i32c(1), 0x6b, 0x22, 3, i32c(0), 0x4a, 0x0d, 0)
		g.emit(0x0b)
	case 4, 5: // memory operations, of all lengths
		g.i32(budget - 1)
		g.i32(budget - 1)
		if g.next(2) == 0 {
			g.emit(i32c([]int32{0, 1, 100, 4096, 4097, 65536, 65537, 100000, 131072, 131073, -1}[g.next(11)]))
		} else {
			g.i32(budget - 1)
		}
		switch g.next(3) {
		case 0:
			g.emit(0xfc, 11, 0)
		case 1:
			g.emit(0xfc, 10, 0, 0)
		case 2:
			g.emit(0xfc, 8, g.next(2), 0)
		}
	case 6:
		g.i32(budget - 1)
		g.emit(0x04, 0x40)
		g.statements(budget - 1)
		if g.next(2) == 0 {
			g.emit(0x05)
			g.statements(budget - 1)
		}
		g.emit(0x0b)
	case 7: // a switch
		g.emit(0x02, 0x40, 0x02, 0x40, 0x02, 0x40)
		g.i32(budget - 1)
		g.emit(0x0e, 3, 0, 1, 2, g.next(3))
		g.emit(0x0b)
		g.statement(budget - 1)
		g.emit(0x0b)
		g.statement(budget - 1)
		g.emit(0x0b)
	case 8: // leave a block early, with code behind that is never reached
		g.emit(0x02, 0x40)
		g.emit(0x0c, 0)
		g.statement(budget - 1)
		g.emit(0x0b)
	case 9:
		g.i32(budget - 1)
		g.i32(budget - 1)
		g.call(g.next(2) == 0)
		g.emit(0x1a)
	case 10:
		g.i32(budget - 1)
		g.emit(0x24, 0)
	case 11:
		g.emit(0xfc, 9, g.next(2)) // data.drop
	case 12: // instructions without operands on an unreachable stack
		g.i32(budget - 1)
		g.emit(0x04, 0x40, 0x00, 0x70, 0x1a, 0xfc, 11, 0, 0x0b)
	case 13:
		g.emit(i32c(int32(g.next(2))), 0x40, 0, 0x1a) // memory.grow
	case 14, 15: // a tight loop that ends after some rounds wherever it branches
		g.emit(i32c(int32(g.next(40))), 0x21, 3, 0x02, 0x40, 0x03, 0x40)
		g.emit(0x20, 3, i32c(1), 0x6b, 0x22, 3, i32c(0), 0x4c, 0x0d, 1)
		for range 1 + g.next(3) {
			g.tight(0, 2)
		}
		if g.next(3) != 0 {
			g.emit(0x0c, 0)
		}
		g.emit(0x0b, 0x0b)
	}
}

// tight emits a few instructions for a loop inside a block, in depth blocks
// inside the loop: to any of them it may branch.
func (g *generator) tight(depth, budget int) {
	condition := func() { g.emit(0x20, g.next(4), i32c(int32(1+g.next(7))), 0x71) }
	label := func() int { return g.next(depth + 2) }
	switch kind := g.next(8); {
	case kind == 1:
		g.emit(0x20, g.next(4), 0x41, g.next(64), 0x73, 0x21, g.next(3))
	case kind == 2:
		condition()
		g.emit(0x20, g.next(4), 0x3a, 0, 0)
	case kind == 3:
		condition()
		g.emit(0x0d, label())
	case kind == 4:
		condition()
		g.emit(0x0e, 2, label(), label(), label())
	case kind == 5 && budget > 0:
		g.emit(0x02, 0x40)
		g.tight(depth+1, budget-1)
		g.tight(depth+1, budget-1)
		g.emit(0x0b)
	case kind >= 6 && budget > 0:
		condition()
		g.emit(0x04, 0x40)
		g.tight(depth+1, budget-1)
		if kind == 7 {
			g.emit(0x05)
			g.tight(depth+1, budget-1)
		}
		g.emit(0x0b)
	default: // mix the locals
		g.emit(0x20, g.next(4), 0x20, g.next(4), 0x6a, 0x21, g.next(3))
	}
}

func (g *generator) statements(budget int) {
	for range 1 + g.next(4) {
		g.statement(budget)
	}
}

func generate(recipe []byte) []byte {
	g := &generator{recipe: recipe}
	var bodies [][]byte
	for i := range 4 {
		g.out, g.function = nil, i
		g.statements(5)
		g.i32(4)
		bodies = append(bodies, body(cat(2, 2, tI32, 2, tI64), g.out))
	}
	segment := make([]byte, 70_000)
	for i := range segment {
		segment[i] = byte(i * 13)
	}
	return module(
		sec(1, vec(fntype([]byte{tI32, tI32}, []byte{tI32}))),
		sec(3, vec([]byte{0}, []byte{0}, []byte{0}, []byte{0})),
		sec(4, vec([]byte{0x70, 0, 4})),
		sec(5, vec([]byte{1, 2, 5})),
		sec(6, vec(cat(tI32, 1, i32c(5), 0x0b))),
		sec(7, vec(export("memory", 2, 0), export("g", 3, 0), export("f0", 0, 0), export("f1", 0, 1), export("f2", 0, 2), export("f3", 0, 3))),
		sec(9, vec(cat(0, i32c(0), 0x0b, vec([]byte{0}, []byte{1}, []byte{2}, []byte{3})))),
		sec(12, 2),
		sec(10, vec(bodies...)),
		sec(11, vec(cat(1, str("hearth")), cat(1, uleb(len(segment)), segment))))
}

// The generator's modules are valid, or the differential fuzzer would show
// nothing.
func TestGeneratedModulesAreValid(t *testing.T) {
	r := newRuntime(t)
	n, ended := 200, 0
	if runtime.GOARCH != "amd64" {
		n = 20
	}
	for i := range n {
		recipe := make([]byte, 300)
		for k := range recipe {
			recipe[k] = byte((k+7)*(i+3)*2654435761>>16 ^ k*i)
		}
		b := generate(recipe)
		if _, err := r.CompileModule(t.Context(), b); err != nil {
			t.Fatalf("recipe %d: %v", i, err)
		}
		if compareRuns(t, b) {
			ended++
		}
	}
	if ended < n/2 {
		t.Errorf("only %d of %d modules came to an end", ended, n)
	}
	t.Logf("%d of %d modules compared", ended, n)
}
