package wasm_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"github.com/hearth-sh/hearth/internal/wasm"
	"github.com/hearth-sh/hearth/test/needs"
)

func TestSniffTellsKindsApart(t *testing.T) {
	for _, c := range []struct {
		name, prefix string
		want         wasm.Kind
	}{
		{"core module", "\x00asm\x01\x00\x00\x00", wasm.KindModule},
		{"component", "\x00asm\x0d\x00\x01\x00", wasm.KindComponent},
		{"unknown version", "\x00asm\x02\x00\x00\x00", wasm.KindUnknown},
		{"truncated", "\x00asm\x01", wasm.KindUnknown},
		{"empty", "", wasm.KindUnknown},
		{"ELF and cwasm", "\x7fELF\x02\x01\x01", wasm.KindNative},
		{"PE", "MZ\x90\x00", wasm.KindNative},
		{"Mach-O", "\xcf\xfa\xed\xfe", wasm.KindNative},
		{"wazero cache", "WAZEVO\x061.12.0", wasm.KindNative},
		{"text", "(module)", wasm.KindUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := wasm.Sniff([]byte(c.prefix)); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// Every case here would be accepted by the engine, or would reach what
// lowering appends, if lowering did not refuse it.
func TestLowerRefuses(t *testing.T) {
	void := fntype(nil, nil)
	typeSec, funcSec := sec(1, vec(void)), sec(3, vec([]byte{0}))
	code := func(b ...any) []byte { return sec(10, vec(body(nil, b...))) }
	one := func(b ...any) []byte { return module(typeSec, funcSec, code(b...)) }
	memory := sec(5, vec([]byte{0, 1}))
	tight := wasm.DefaultLimits()
	tight.BodyBytes, tight.NestingDepth, tight.ModuleBytes = 1000, 10, 10_000

	for _, c := range []struct {
		name   string
		module []byte
		want   wasm.Code
		limits *wasm.Limits
	}{
		{name: "text", module: []byte("(module)"), want: wasm.CodeNotWasm},
		{name: "nothing", want: wasm.CodeNotWasm},
		{name: "half a header", module: []byte("\x00asm\x01"), want: wasm.CodeMalformed},
		{name: "component", module: []byte("\x00asm\x0d\x00\x01\x00"), want: wasm.CodeComponent},
		{name: "ELF", module: []byte("\x7fELF\x02\x01\x01\x00"), want: wasm.CodeNativeArtifact},

		{name: "write to the fuel global", module: one(i32c(9), 0x24, 0), want: wasm.CodeInvalid},
		{name: "write to the kill global", module: one(i32c(0), 0x24, 1), want: wasm.CodeInvalid},
		{name: "read of a global initializer's own space", module: module(sec(6, vec(cat(tI32, 0, 0x23, 0, 0x0b)))), want: wasm.CodeInvalid},
		{name: "export of the fuel global", module: module(sec(7, vec(export("x", 3, 0)))), want: wasm.CodeInvalid},
		{name: "call of the checkpoint", module: one(0x10, 1), want: wasm.CodeInvalid},
		{name: "reference to the checkpoint", module: one(0xd2, 1, 0x1a), want: wasm.CodeInvalid},
		{name: "checkpoint in an element segment", module: module(typeSec, funcSec, sec(4, vec([]byte{0x70, 0, 1})), sec(9, vec(cat(0, i32c(0), 0x0b, vec([]byte{1})))), code()), want: wasm.CodeInvalid},
		{name: "export of the checkpoint", module: module(typeSec, funcSec, sec(7, vec(export("x", 0, 1))), code()), want: wasm.CodeInvalid},
		{name: "start at the checkpoint", module: module(typeSec, funcSec, sec(8, 1), code()), want: wasm.CodeInvalid},
		{name: "function of an appended type", module: module(sec(1, vec(fntype([]byte{tI32}, nil))), sec(3, vec([]byte{1})), code()), want: wasm.CodeInvalid},
		{name: "block of an appended type", module: module(sec(1, vec(fntype([]byte{tI32}, nil))), sec(3, vec([]byte{0})), code(0x02, 1, 0x0b)), want: wasm.CodeInvalid},
		{name: "call_indirect of an appended type", module: module(sec(1, vec(fntype([]byte{tI32}, nil))), sec(3, vec([]byte{0})), sec(4, vec([]byte{0x70, 0, 1})), code(i32c(0), 0x11, 1, 0)), want: wasm.CodeInvalid},
		{name: "scratch local", module: one(i32c(5), i32c(3), 0x70, 0x21, 0), want: wasm.CodeInvalid},
		{name: "memory.size without memory", module: one(0x3f, 0, 0x1a), want: wasm.CodeInvalid},
		{name: "memory.grow without memory", module: one(i32c(0), 0x40, 0, 0x1a), want: wasm.CodeInvalid},
		{name: "load without memory", module: one(i32c(0), 0x28, 2, 0, 0x1a), want: wasm.CodeInvalid},
		{name: "vector load without memory", module: one(i32c(0), 0xfd, 0, 4, 0, 0x1a), want: wasm.CodeInvalid},
		{name: "memory.fill without memory", module: one(i32c(0), i32c(0), i32c(0), 0xfc, 11, 0), want: wasm.CodeInvalid},
		{name: "memory.init without memory", module: module(typeSec, funcSec, sec(12, 1), code(i32c(0), i32c(0), i32c(0), 0xfc, 8, 0, 0), sec(11, vec(cat(1, str("x"))))), want: wasm.CodeInvalid},
		{name: "active data without memory", module: module(sec(11, vec(cat(0, i32c(0), 0x0b, str(""))))), want: wasm.CodeInvalid},
		{name: "memory export without memory", module: module(sec(7, vec(export("memory", 2, 0)))), want: wasm.CodeInvalid},
		{name: "undeclared reference to the start function", module: module(typeSec, funcSec, sec(8, 0), code(0xd2, 0, 0x1a)), want: wasm.CodeInvalid},
		{name: "start function with a parameter", module: module(sec(1, vec(fntype([]byte{tI32}, nil))), funcSec, sec(8, 0), code()), want: wasm.CodeInvalid},
		{name: "memory.init without data count", module: module(typeSec, funcSec, memory, code(i32c(0), i32c(0), i32c(0), 0xfc, 8, 0, 0), sec(11, vec(cat(1, str("x"))))), want: wasm.CodeMalformed},
		{name: "data.drop without data count", module: module(typeSec, funcSec, memory, code(0xfc, 9, 0), sec(11, vec(cat(1, str("x"))))), want: wasm.CodeMalformed},
		{name: "wrong data count", module: module(sec(12, 2), sec(11, vec(cat(1, str("x"))))), want: wasm.CodeMalformed},
		{name: "own fuel export", module: module(typeSec, funcSec, sec(7, vec(export("hearth:fuel", 0, 0))), code()), want: wasm.CodeReservedExport},
		{name: "any reserved export", module: module(typeSec, funcSec, sec(7, vec(export("hearth:later", 0, 0))), code()), want: wasm.CodeReservedExport},
		{name: "duplicate export", module: module(typeSec, funcSec, sec(7, vec(export("x", 0, 0), export("x", 0, 0))), code()), want: wasm.CodeInvalid},

		{name: "bytes behind the end of a function", module: module(typeSec, funcSec, sec(10, vec([]byte{4, 0, 0x0b, 0x01, 0x0b}))), want: wasm.CodeMalformed},
		{name: "function without end", module: module(typeSec, funcSec, sec(10, vec([]byte{2, 0, 0x01}))), want: wasm.CodeMalformed},
		{name: "empty function body", module: module(typeSec, funcSec, sec(10, vec([]byte{0}))), want: wasm.CodeMalformed},
		{name: "function without body", module: module(typeSec, funcSec), want: wasm.CodeMalformed},
		{name: "body without function", module: module(typeSec, code()), want: wasm.CodeMalformed},
		{name: "else without if", module: one(0x05), want: wasm.CodeMalformed},
		{name: "two elses", module: one(i32c(0), 0x04, 0x40, 0x05, 0x05, 0x0b), want: wasm.CodeMalformed},
		{name: "unknown label", module: one(0x0c, 1), want: wasm.CodeInvalid},
		{name: "unknown opcode", module: one(0xff), want: wasm.CodeMalformed},
		{name: "unassigned vector opcode", module: one(0xfd, 0x9a, 0x01), want: wasm.CodeMalformed},
		{name: "reserved byte of memory.size", module: module(typeSec, funcSec, memory, code(0x3f, 1, 0x1a)), want: wasm.CodeMalformed},
		{name: "long reserved byte of memory.grow", module: module(typeSec, funcSec, memory, code(i32c(0), 0x40, 0x80, 0, 0x1a)), want: wasm.CodeMalformed},
		{name: "integer of six bytes", module: one(0x41, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00, 0x1a), want: wasm.CodeMalformed},
		{name: "integer with unused bits set", module: one(0x41, 0xff, 0xff, 0xff, 0xff, 0x4f, 0x1a), want: wasm.CodeMalformed},
		{name: "section out of order", module: module(memory, sec(3, 0)), want: wasm.CodeMalformed},
		{name: "repeated section", module: module(memory, memory), want: wasm.CodeMalformed},
		{name: "unknown section", module: module(sec(14)), want: wasm.CodeMalformed},
		{name: "section longer than its content", module: module(sec(5, vec([]byte{0, 1}), 0)), want: wasm.CodeMalformed},
		{name: "section past the end", module: module([]byte{5, 10, 0}), want: wasm.CodeMalformed},
		{name: "custom section name that is not UTF-8", module: module(sec(0, 1, 0xff)), want: wasm.CodeMalformed},
		{name: "export name that is not UTF-8", module: module(memory, sec(7, vec(cat(1, 0xff, 2, 0)))), want: wasm.CodeMalformed},
		{name: "mutable import in a constant", module: module(sec(2, vec(cat(str("m"), str("g"), 3, tI32, 1))), sec(6, vec(cat(tI32, 0, 0x23, 0, 0x0b)))), want: wasm.CodeInvalid},
		{name: "maximum below minimum", module: module(sec(5, vec([]byte{1, 2, 1}))), want: wasm.CodeInvalid},
		{name: "memory beyond 4 GiB", module: module(sec(5, vec(cat(0, uleb(65537))))), want: wasm.CodeInvalid},

		{name: "two memories", module: module(sec(5, vec([]byte{0, 1}, []byte{0, 1}))), want: wasm.CodeUnsupportedFeature},
		{name: "shared memory", module: module(sec(5, vec([]byte{3, 1, 1}))), want: wasm.CodeUnsupportedFeature},
		{name: "64-bit memory", module: module(sec(5, vec([]byte{4, 1}))), want: wasm.CodeUnsupportedFeature},
		{name: "atomics", module: one(0xfe, 0x03, 0x00), want: wasm.CodeUnsupportedFeature},
		{name: "exception handling", module: one(0x06, 0x40, 0x0b), want: wasm.CodeUnsupportedFeature},
		{name: "tag section", module: module(sec(13, vec([]byte{0, 0}))), want: wasm.CodeUnsupportedFeature},
		{name: "tail call", module: one(0x12, 0), want: wasm.CodeUnsupportedFeature},
		{name: "call_ref", module: one(0x14, 0), want: wasm.CodeUnsupportedFeature},
		{name: "garbage collection", module: one(0xfb, 0x00, 0x00), want: wasm.CodeUnsupportedFeature},
		{name: "struct type", module: module(sec(1, vec([]byte{0x5f, 0}))), want: wasm.CodeUnsupportedFeature},
		{name: "relaxed SIMD", module: one(0xfd, 0x80, 0x02), want: wasm.CodeUnsupportedFeature},
		{name: "extended constant", module: module(sec(6, vec(cat(tI32, 0, i32c(1), i32c(2), 0x6a, 0x0b)))), want: wasm.CodeUnsupportedFeature},

		{name: "millions of locals", module: module(typeSec, funcSec, sec(10, vec(body(cat(1, uleb(5_000_000), tI32))))), want: wasm.CodeLimitExceeded},
		{name: "locals that wrap around", module: module(typeSec, funcSec, sec(10, vec(body(cat(2, uleb(1<<32-1), tI32, uleb(1), tI32))))), want: wasm.CodeLimitExceeded},
		{name: "millions of table entries", module: module(sec(4, vec(cat(0x70, 0, uleb(5_000_000))))), want: wasm.CodeLimitExceeded},
		{name: "many tables together", module: module(sec(4, vec(cat(0x70, 0, uleb(200_000)), cat(0x70, 0, uleb(200_000))))), want: wasm.CodeLimitExceeded},
		{name: "a billion types", module: module(sec(1, uleb(1<<30))), want: wasm.CodeLimitExceeded},
		{name: "more types than bytes", module: module(sec(1, uleb(90_000))), want: wasm.CodeMalformed},
		{name: "function body too long", module: one(strings.Repeat("\x01", 2000)), want: wasm.CodeLimitExceeded, limits: &tight},
		{name: "blocks too deep", module: one(strings.Repeat("\x02\x40", 20), strings.Repeat("\x0b", 20)), want: wasm.CodeLimitExceeded, limits: &tight},
		{name: "module too long", module: module(sec(0, str("x"), strings.Repeat("x", 20_000))), want: wasm.CodeLimitExceeded, limits: &tight},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options()
			if c.limits != nil {
				o.Limits = *c.limits
			}
			l, err := wasm.Lower(c.module, o)
			if l != nil || codeOf(err) != c.want {
				t.Errorf("Lower: got %v, want %q", err, c.want)
			}
			if _, err := wasm.Parse(c.module, o.Limits); codeOf(err) != c.want {
				t.Errorf("Parse: got %v, want %q", err, c.want)
			}
			if err != nil && strings.ToLower(err.Error()[:1]) != err.Error()[:1] {
				t.Errorf("error starts with a capital: %v", err)
			}
		})
	}
}

func TestParseDescribesTheOriginal(t *testing.T) {
	m := module(
		sec(0, str("name"), "whatever"),
		sec(1, vec(fntype(nil, nil), fntype([]byte{tI32, tI64}, []byte{tI32}))),
		sec(2, vec(cat(str("wasi_snapshot_preview1"), str("fd_write"), 0, 1), cat(str("env"), str("g"), 3, tI32, 0))),
		sec(3, vec([]byte{0}, []byte{1})),
		sec(4, vec([]byte{0x70, 0, 7})),
		sec(5, vec([]byte{1, 2, 9})),
		sec(7, vec(export("_start", 0, 1), export("memory", 2, 0), export("add", 0, 2))),
		sec(8, 1),
		sec(10, vec(body(nil), body(nil, 0x20, 0))),
		sec(11, vec(cat(0, i32c(8), 0x0b, str("hello")))),
	)
	got, err := wasm.Parse(m, wasm.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	if got.Functions != 3 || got.ImportedFunctions != 1 || got.Globals != 1 || got.Tables != 1 || got.TableEntries != 7 || got.Data != 1 {
		t.Errorf("counts are wrong: %+v", got)
	}
	if !got.HasMemory || got.MemoryMin != 2 || !got.MemoryHasMax || got.MemoryMax != 9 || !got.HasStart {
		t.Errorf("memory or start are wrong: %+v", got)
	}
	if i := got.Imports[0]; i.Module != "wasi_snapshot_preview1" || i.Name != "fd_write" || i.Type.String() != "(i32, i64) -> (i32)" {
		t.Errorf("import is wrong: %+v", i)
	}
	if e, ok := got.Export("add"); !ok || e.Index != 2 || len(e.Type.Params) != 2 {
		t.Errorf("export is wrong: %+v", e)
	}
}

func TestLowerIsDeterministicAndStripsCustomSections(t *testing.T) {
	source := module(sec(0, str("name"), "secret"), single(1, 0x03, 0x40, 0x0b)[8:], sec(0, str(".debug_info"), "secret"))
	a, b := mustLower(t, source, options()), mustLower(t, source, options())
	if !bytes.Equal(a.Bytes, b.Bytes) {
		t.Error("two runs differ")
	}
	if bytes.Contains(a.Bytes, []byte("secret")) || bytes.Contains(a.Bytes, []byte("name")) {
		t.Error("a custom section is left")
	}
	if a.Module.CustomBytes == 0 || a.Checks == 0 {
		t.Errorf("got %+v, %d checks", a.Module, a.Checks)
	}
}

func TestLoweringTwiceIsRefused(t *testing.T) {
	once := mustLower(t, single(0), options())
	if _, err := wasm.Lower(once.Bytes, options()); codeOf(err) != wasm.CodeReservedExport {
		t.Errorf("got %v", err)
	}
}

func TestTablesAreCapped(t *testing.T) {
	grow := func(limits ...any) []byte {
		return module(
			sec(1, vec(fntype([]byte{tI32}, []byte{tI32}))), sec(3, vec([]byte{0})),
			sec(4, vec(cat(0x6f, cat(limits...)))),
			sec(7, vec(export("grow", 0, 0))),
			sec(10, vec(body(nil, 0xd0, 0x6f, 0x20, 0, 0xfc, 15, 0))))
	}
	o := options()
	o.MaxTableEntries = 100
	r := newRuntime(t)
	for name, m := range map[string][]byte{"no maximum": grow(0, 10), "large maximum": grow(1, 10, uleb(1<<20))} {
		t.Run(name, func(t *testing.T) {
			f := instantiate(t, r, mustLower(t, m, o).Bytes).ExportedFunction("grow")
			for _, step := range []struct{ by, want uint64 }{{91, 0xffffffff}, {90, 10}, {1, 0xffffffff}} {
				if got, err := f.Call(t.Context(), step.by); err != nil || got[0] != step.want {
					t.Errorf("grow by %d: got %v %v, want %d", step.by, got, err, step.want)
				}
			}
		})
	}
	if _, err := wasm.Lower(grow(0, uleb(101)), o); codeOf(err) != wasm.CodeLimitExceeded {
		t.Errorf("minimum beyond the cap: got %v", err)
	}
}

func TestStartSectionRunsOnlyWhenTheHostCallsIt(t *testing.T) {
	m := module(sec(1, vec(fntype(nil, nil))), sec(3, vec([]byte{0})),
		sec(6, vec(cat(tI32, 1, i32c(0), 0x0b))),
		sec(7, vec(export("g", 3, 0))),
		sec(8, 0), sec(10, vec(body(nil, i32c(7), 0x24, 0))))
	i := instantiate(t, newRuntime(t), mustLower(t, m, options()).Bytes)
	if got := i.ExportedGlobal("g").Get(); got != 0 {
		t.Fatalf("start ran by itself: g = %d", got)
	}
	if _, err := i.ExportedFunction(wasm.ExportStart).Call(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := i.ExportedGlobal("g").Get(); got != 7 {
		t.Errorf("g = %d, want 7", got)
	}
}

func TestModuleWithoutMemoryOrSectionsCanBeStopped(t *testing.T) {
	l := mustLower(t, module(), options())
	i := instantiate(t, newRuntime(t), l.Bytes)
	for _, name := range []string{wasm.ExportFuel, wasm.ExportKill, wasm.ExportRefills} {
		if i.ExportedGlobal(name) == nil {
			t.Errorf("no %s", name)
		}
	}
	if l.Module.HasMemory {
		t.Error("the description is of the lowered module")
	}
}

func TestRemainderByDivision(t *testing.T) {
	ops := []struct {
		name string
		op   int
		wide bool
	}{{"i32.rem_s", 0x6f, false}, {"i32.rem_u", 0x70, false}, {"i64.rem_s", 0x81, true}, {"i64.rem_u", 0x82, true}}
	values := []int64{0, 1, -1, 2, -2, 3, 7, -7, 10, 100, 1<<31 - 1, -1 << 31, 1 << 32, 1<<63 - 1, -1 << 63}
	r := newRuntime(t)
	for _, o := range ops {
		t.Run(o.name, func(t *testing.T) {
			ty, constant := byte(tI32), func(v int64) []byte { return i32c(int32(v)) }
			if o.wide {
				ty, constant = tI64, i64c
			}
			// Function 0 takes both operands, the others have a constant divisor.
			types := vec(fntype([]byte{ty, ty}, []byte{ty}), fntype([]byte{ty}, []byte{ty}))
			funcs, bodies := [][]byte{{0}}, [][]byte{body(nil, 0x20, 0, 0x20, 1, o.op)}
			exports := [][]byte{export("op", 0, 0)}
			for i, v := range values {
				funcs = append(funcs, []byte{1})
				bodies = append(bodies, body(nil, 0x20, 0, constant(v), o.op))
				exports = append(exports, export(string(rune('a'+i)), 0, i+1))
			}
			m := module(sec(1, types), sec(3, vec(funcs...)), sec(7, vec(exports...)), sec(10, vec(bodies...)))
			lowered := mustLower(t, m, options()).Bytes
			i := instantiate(t, r, lowered)
			for _, a := range values {
				for k, b := range values {
					want, trap := remainderOf(o.op, a, b)
					x, y := uint64(a), uint64(b)
					if !o.wide {
						x, y = uint64(uint32(a)), uint64(uint32(b))
					}
					got, err := i.ExportedFunction("op").Call(t.Context(), x, y)
					got2, err2 := i.ExportedFunction(string(rune('a'+k))).Call(t.Context(), x)
					for _, e := range []error{err, err2} {
						if trap != (e != nil && strings.Contains(e.Error(), "integer divide by zero")) {
							t.Fatalf("%d, %d: got error %v, want trap %v", a, b, e, trap)
						}
					}
					if !trap && (got[0] != want || got2[0] != want) {
						t.Errorf("%d, %d: got %#x and %#x, want %#x", a, b, got[0], got2[0], want)
					}
				}
			}
		})
	}
}

func remainderOf(op int, a, b int64) (uint64, bool) {
	switch op {
	case 0x6f:
		if int32(b) == 0 {
			return 0, true
		}
		return uint64(uint32(int32(a) % int32(b))), false
	case 0x70:
		if uint32(b) == 0 {
			return 0, true
		}
		return uint64(uint32(a) % uint32(b)), false
	case 0x81:
		if b == 0 {
			return 0, true
		}
		return uint64(a % b), false
	default:
		if b == 0 {
			return 0, true
		}
		return uint64(a) % uint64(b), false
	}
}

func TestGoProgramComputesTheSameLowered(t *testing.T) {
	onOneGoroutine(t)
	guest, err := goGuest()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	run := func(m []byte) string {
		r := newRuntime(t)
		wasi_snapshot_preview1.MustInstantiate(t.Context(), r)
		var out bytes.Buffer
		if _, err := r.InstantiateWithConfig(t.Context(), m, wazero.NewModuleConfig().WithArgs("compute", "1").WithStdout(&out)); err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
			t.Fatal(err)
		}
		return out.String()
	}
	lowered := mustLower(t, guest, options())
	t.Logf("%d bytes, lowered %d, %d checks in %d functions", len(guest), len(lowered.Bytes), lowered.Checks, lowered.Module.Functions)
	got := run(lowered.Bytes)
	if testing.Short() {
		return // one run is enough on an emulator
	}
	if want := run(guest); got != want || len(got) < 5 {
		t.Errorf("got %q, want %q", got, want)
	}
}
