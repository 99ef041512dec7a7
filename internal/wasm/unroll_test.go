package wasm_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// rounds is a module whose "f" (i32, i32) -> i32 has two more locals, 2 and 3,
// and runs code, which may add to local 2, the result.
func rounds(code ...any) []byte {
	return module(
		sec(1, vec(fntype([]byte{tI32, tI32}, []byte{tI32}), fntype(nil, nil))), sec(3, vec([]byte{0})),
		sec(5, vec([]byte{0, 1})), sec(7, vec(export("f", 0, 0), export("memory", 2, 0))),
		sec(10, vec(body(cat(1, 2, tI32), cat(code...), 0x20, 2))))
}

// add adds a constant to a local, next is local 2 = local 2 * 31 + n, which
// tells in which order it passed where; more is whether --local 0 > 0.
func add(local int, n int32) []byte { return cat(0x20, local, i32c(n), 0x6a, 0x21, local) }
func next(n int32) []byte           { return cat(0x20, 2, i32c(31), 0x6c, i32c(n), 0x6a, 0x21, 2) }

var more = cat(0x20, 0, i32c(1), 0x6b, 0x22, 0, i32c(0), 0x4a)

func TestUnrolledLoopsBehaveTheSame(t *testing.T) {
	const (
		void  = 0x40
		block = 0x02
		loop  = 0x03
		iff   = 0x04
		els   = 0x05
		end   = 0x0b
		br    = 0x0c
		brIf  = 0x0d
		table = 0x0e
	)
	equal := func(n int32) []byte { return cat(0x20, 0, i32c(n), 0x46) } // local 0 == n
	for _, c := range []struct {
		name string
		code []byte
		// unrolled is how many loops of the code are.
		unrolled int
	}{
		{"do while", cat(loop, void, next(1), more, brIf, 0, end), 1},
		{"while", cat(block, void, loop, void, 0x20, 0, 0x45, brIf, 1, next(1), add(0, -1), br, 0, end, end), 1},
		{"type index", cat(loop, 1, next(1), more, brIf, 0, end), 1},
		{"long branch depth", cat(loop, void, next(1), more, brIf, 0x80, 0x80, 0, end), 1},
		{"code behind", cat(loop, void, next(1), more, brIf, 0, end, next(2), next(3)), 1},
		{"continue from blocks", cat(loop, void, add(0, -1), block, void, equal(3), brIf, 1, block, void, equal(5), brIf, 2, equal(7), brIf, 0, next(2), end, 0x20, 0, i32c(0), 0x4a, brIf, 1, end, end), 1},
		{"continue from if and else", cat(loop, void, more, iff, void, 0x20, 0, i32c(1), 0x71, iff, void, next(1), br, 2, els, next(2), br, 2, end, end, end), 1},
		{"if without else", cat(loop, void, equal(3), iff, void, next(9), end, more, brIf, 0, end), 1},
		{"if with a result", cat(loop, void, 0x20, 0, i32c(1), 0x71, iff, tI32, i32c(5), els, i32c(6), end, 0x20, 2, 0x6a, 0x21, 2, more, brIf, 0, end), 1},
		{"break out of outer blocks", cat(block, void, block, void, block, void,
			loop, void, equal(2), brIf, 1, equal(4), brIf, 2, equal(6), brIf, 3, more, brIf, 0, end,
			next(1), end, next(2), end, next(3), end), 1},
		{"break from a nested block", cat(block, void, block, void,
			loop, void, block, void, equal(2), brIf, 2, equal(5), brIf, 3, end, more, brIf, 0, end,
			next(1), end, next(2), end), 1},
		{"return", cat(loop, void, equal(4), iff, void, i32c(77), 0x0f, end, more, brIf, 0, end), 1},
		{"branch to the function's label", cat(loop, void, i32c(78), equal(4), brIf, 1, 0x1a, more, brIf, 0, end), 1},
		{"branch with a value to a block", cat(block, tI32, loop, void, i32c(9), equal(4), brIf, 1, 0x1a, more, brIf, 0, end, i32c(8), end, 0x21, 2), 1},
		{"br_table", cat(block, void, block, void, loop, void, block, void, add(0, -1),
			0x20, 0, i32c(7), 0x71, table, 4, 3, 2, 0, 1, 1, end, next(5), br, 0, end, next(1), end, next(2), end), 1},
		{"br_table with the loop as default", cat(block, void, loop, void, next(1), add(0, -1), 0x20, 0, i32c(7), 0x71, table, 1, 1, 0, end, end), 1},
		{"trap", cat(loop, void, next(1), 0x20, 1, 0x20, 0, i32c(4), 0x6b, 0x6d, 0x1a, more, brIf, 0, end), 1},
		{"load out of bounds", cat(loop, void, add(1, 9000), 0x20, 1, 0x2d, 0, 0, 0x20, 2, 0x6a, 0x21, 2, more, brIf, 0, end), 1},
		{"store", cat(loop, void, 0x20, 0, 0x20, 1, 0x3a, 0, 0, 0x20, 0, 0x2d, 0, 1, 0x20, 2, 0x6a, 0x21, 2, more, brIf, 0, end), 1},
		{"loop in a loop", cat(loop, void, 0x20, 1, 0x21, 3,
			loop, void, next(1), 0x20, 3, i32c(1), 0x6b, 0x22, 3, i32c(0), 0x4a, brIf, 0, end, more, brIf, 0, end), 1},
		{"inner loop continues the outer", cat(block, void, 0x01, loop, void, add(0, -1), 0x20, 0, i32c(0), 0x4c, brIf, 1, 0x20, 1, 0x21, 3,
			loop, void, next(1), 0x20, 3, 0x20, 0, 0x46, brIf, 1, 0x20, 3, i32c(1), 0x6b, 0x22, 3, i32c(0), 0x4a, brIf, 0, end, br, 0, end, end), 1},
		{"one loop after another", cat(loop, void, next(1), more, brIf, 0, end, 0x20, 1, 0x21, 0, loop, void, next(2), more, brIf, 0, end), 2},
		{"unreachable loop", cat(block, void, br, 0, loop, void, next(1), more, brIf, 0, end, end, next(2)), 0},
		{"loop behind its own branch", cat(block, void, loop, void, more, brIf, 0, br, 1, next(3), br, 0, end, end), 1},
		{"code behind unreachable", cat(loop, void, equal(1), iff, void, 0x00, br, 1, end, more, brIf, 0, end), 1},
		{"not repeated", cat(loop, void, next(1), end), 0},
		{"with a remainder", cat(loop, void, 0x20, 0, i32c(3), 0x70, 0x20, 2, 0x6a, 0x21, 2, more, brIf, 0, end), 0},
		{"with a result", cat(loop, tI32, next(1), more, brIf, 0, i32c(4), end, 0x1a), 0},
		{"long", cat(loop, void, next(1), next(2), next(3), next(4), next(5), more, brIf, 0, end), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := rounds(c.code)
			r := newRuntime(t)
			lowered := mustLower(t, m, options()).Bytes
			// An unrolled loop begins with this, and no test does it itself.
			if got := bytes.Count(lowered, []byte{block, void, loop, void, 0x20, 4}); got != c.unrolled {
				t.Errorf("%d loops are unrolled, want %d", got, c.unrolled)
			}
			plain, low := instantiate(t, r, m), instantiate(t, r, lowered)
			for a := range uint64(30) {
				for _, b := range []uint64{0, 1, 2, 3, 8, 9, 17, 60000} {
					want, wantErr := plain.ExportedFunction("f").Call(t.Context(), a, b)
					got, err := low.ExportedFunction("f").Call(t.Context(), a, b)
					if trapOf(err) != trapOf(wantErr) || fmt.Sprint(got) != fmt.Sprint(want) {
						t.Fatalf("f(%d, %d): got %v %v, want %v %v", a, b, got, err, want, wantErr)
					}
				}
			}
			x, _ := plain.Memory().Read(0, 1<<16)
			y, _ := low.Memory().Read(0, 1<<16)
			if !bytes.Equal(x, y) {
				t.Error("the memories differ")
			}
		})
	}
}

// trapOf is the first line of an error.
func trapOf(err error) string {
	if err == nil {
		return ""
	}
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// Depths are checked one by one for two copies; what runs is checked above.
func TestUnrollingAdjustsBranchDepths(t *testing.T) {
	pad := strings.Repeat("\x01", 22) // nops, so that there are three copies
	in := cat(0x02, 0x40, 0x03, 0x40, pad, 0x20, 0, 0x0e, 2, 0, 1, 2, 0x02, 0x40, 0x0c, 1, 0x0c, 2, 0x0c, 3, 0x0b, 0x0b, 0x0b)
	copied := func(n int) []byte { // branches from the loop on go n labels further
		return cat(pad, 0x20, 0, 0x0e, 2, 0, 1+n, 2+n, 0x02, 0x40, 0x0c, 1, 0x0c, 2+n, 0x0c, 3+n, 0x0b)
	}
	want := cat(0x02, 0x40, copied(2), 0x0c, 2, 0x0b, 0x02, 0x40, copied(2), 0x0c, 2, 0x0b, copied(1), 0x0b, 0x0b, 0x0b)
	if got := mustLower(t, rounds(in), options()).Bytes; !bytes.Contains(got, want) {
		t.Errorf("got %x\nwant in it %x", got, want)
	}
}

func TestUnrollingKeepsInvalidLoopsInvalid(t *testing.T) {
	r := newRuntime(t)
	for name, code := range map[string][]byte{
		"a value left":             cat(0x03, 0x40, more, 0x0d, 0, i32c(1), 0x0b),
		"a value missing":          cat(0x03, 0x40, more, 0x0d, 0, 0x1a, 0x0b),
		"a value for the next":     cat(0x03, 0x40, 0x1a, more, 0x0d, 0, i32c(1), 0x0b),
		"no value for the label":   cat(0x02, tI32, 0x03, 0x40, more, 0x0d, 1, more, 0x0d, 0, 0x0b, i32c(1), 0x0b, 0x1a),
		"function without a value": cat(0x03, 0x40, more, 0x0d, 1, more, 0x0d, 0, 0x0b),
		"a local of its own":       cat(0x03, 0x40, more, 0x0d, 0, 0x0b, 0x20, 4, 0x1a),
		"unknown label":            cat(0x03, 0x40, more, 0x0d, 0, more, 0x0d, 2, 0x0b),
		"unknown label in a block": cat(0x03, 0x40, 0x02, 0x40, more, 0x0d, 3, 0x0b, more, 0x0d, 0, 0x0b),
		"unknown label in a table": cat(0x03, 0x40, more, 0x0d, 0, more, 0x0e, 1, 0, 2, 0x0b),
		"label that wraps around":  cat(0x03, 0x40, more, 0x0d, 0, more, 0x0d, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x0b),
		"else in the loop":         cat(0x03, 0x40, more, 0x0d, 0, 0x05, 0x0b),
		"loop without end":         cat(0x03, 0x40, more, 0x0d, 0),
	} {
		t.Run(name, func(t *testing.T) {
			m := rounds(code)
			l, err := wasm.Lower(m, options())
			if _, parseErr := wasm.Parse(m, wasm.DefaultLimits()); (err == nil) != (parseErr == nil) {
				t.Fatalf("Parse says %v, Lower says %v", parseErr, err)
			}
			if err != nil {
				return
			}
			if _, err := r.CompileModule(t.Context(), l.Bytes); err == nil {
				t.Error("the engine accepts it lowered")
			}
		})
	}
}

// Limits hold for the original: copies are not counted.
func TestUnrollingDoesNotCountAgainstLimits(t *testing.T) {
	nested := bytes.Repeat([]byte{0x02, 0x40}, 3)
	m := rounds(0x03, 0x40, nested, more, 0x0e, 3, 0, 1, 2, 3, 0x0b, 0x0b, 0x0b, 0x0b)
	exact := options()
	exact.Limits.NestingDepth, exact.Limits.BrTableTargetsTotal = 4, 3
	mustLower(t, m, exact)
	for name, reduce := range map[string]func(*wasm.Limits){
		"nesting":          func(l *wasm.Limits) { l.NestingDepth-- },
		"br_table targets": func(l *wasm.Limits) { l.BrTableTargetsTotal-- },
	} {
		o := exact
		reduce(&o.Limits)
		if _, err := wasm.Lower(m, o); codeOf(err) != wasm.CodeLimitExceeded {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// However a module is made, lowering multiplies its size by a constant.
func TestLoweredSizeIsLinear(t *testing.T) {
	for name, code := range map[string][]byte{
		"empty loops":         bytes.Repeat(cat(0x03, 0x40, 0x0c, 0, 0x0b), 10_000),
		"tight loops":         bytes.Repeat(cat(0x03, 0x40, more, 0x0d, 0, 0x0b), 10_000),
		"nested loops":        cat(bytes.Repeat(cat(0x03, 0x40, more, 0x0d, 0), 5000), bytes.Repeat([]byte{0x0b}, 5000)),
		"loops with br_table": bytes.Repeat(cat(0x03, 0x40, 0x20, 0, 0x0e, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0x0b), 10_000),
	} {
		m := rounds(code)
		if got := len(mustLower(t, m, options()).Bytes); got > 24*len(m) {
			t.Errorf("%s: %d bytes became %d", name, len(m), got)
		}
	}
}
