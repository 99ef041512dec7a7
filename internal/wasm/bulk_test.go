package wasm_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/tetratelabs/wazero/api"
)

// bulkModule exports memory.fill, memory.copy, memory.init (of a segment of
// segmentBytes) and data.drop as functions, on a memory of some pages.
const (
	bulkPages    = 40 // 2.5 MiB: several chunks
	segmentBytes = 700_001
)

func bulkModule() []byte {
	segment := make([]byte, segmentBytes)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range segment {
		segment[i] = byte(rng.Uint32())
	}
	args := cat(0x20, 0, 0x20, 1, 0x20, 2)
	return module(
		sec(1, vec(fntype([]byte{tI32, tI32, tI32}, nil), fntype(nil, nil))),
		sec(3, vec([]byte{0}, []byte{0}, []byte{0}, []byte{1})),
		sec(5, vec(cat(1, uleb(bulkPages), uleb(bulkPages)))),
		sec(7, vec(export("memory", 2, 0), export("fill", 0, 0), export("copy", 0, 1), export("init", 0, 2), export("drop", 0, 3))),
		sec(12, 1),
		sec(10, vec(
			body(nil, args, 0xfc, 11, 0),
			body(nil, args, 0xfc, 10, 0, 0),
			body(nil, args, 0xfc, 8, 0, 0),
			body(nil, 0xfc, 9, 0))),
		sec(11, vec(cat(1, uleb(segmentBytes), segment))))
}

// Chunked operations leave exactly the memory that the plain ones leave, and
// trap exactly when they do, having written nothing.
func TestBulkOperationsKeepTheirSemantics(t *testing.T) {
	const size = bulkPages << 16
	const chunk = 256 << 10
	interesting := []uint32{
		0, 1, 63, 4095, 4096, 4097, chunk - 1, chunk, chunk + 1, 2*chunk - 1, 2 * chunk, 3*chunk + 5,
		segmentBytes - chunk, segmentBytes - 1, segmentBytes, segmentBytes + 1,
		size - chunk - 1, size - chunk, size - 1, size, size + 1, 1 << 31, 1<<32 - chunk, 1<<32 - 1,
	}
	m := bulkModule()
	r := newRuntime(t)
	plain, lowered := instantiate(t, r, m), instantiate(t, r, mustLower(t, m, options()).Bytes)
	rng := rand.New(rand.NewPCG(3, 4))
	reset := func() {
		for i := range 64 {
			b := make([]byte, size/64)
			for k := range b {
				b[k] = byte(k*7 + k>>8 + i)
			}
			plain.Memory().Write(uint32(i*len(b)), b)
			lowered.Memory().Write(uint32(i*len(b)), b)
		}
	}
	reset()
	call := func(i api.Module, name string, args ...uint64) string {
		if _, err := i.ExportedFunction(name).Call(t.Context(), args...); err != nil {
			return fmt.Sprintf("%.60s", err)
		}
		return ""
	}
	check := func(name string, d, s, n uint32) {
		t.Helper()
		a, b := call(plain, name, uint64(d), uint64(s), uint64(n)), call(lowered, name, uint64(d), uint64(s), uint64(n))
		if a != b {
			t.Fatalf("%s(%d, %d, %d): got %q, want %q", name, d, s, n, b, a)
		}
		x, _ := plain.Memory().Read(0, size)
		y, _ := lowered.Memory().Read(0, size)
		if !bytes.Equal(x, y) {
			t.Fatalf("%s(%d, %d, %d): memories differ", name, d, s, n)
		}
	}
	rounds := 600
	if testing.Short() || runtime.GOARCH != "amd64" {
		rounds = 60
	}
	pick := func() uint32 {
		if rng.IntN(3) > 0 {
			return interesting[rng.IntN(len(interesting))]
		}
		return rng.Uint32N(size)
	}
	// The overlaps that matter, then whatever comes.
	for _, delta := range []uint32{1, 4096, chunk - 1, chunk, chunk + 1} {
		check("copy", delta, 0, 3*chunk)
		check("copy", 0, delta, 3*chunk)
		check("copy", size-3*chunk, size-3*chunk-delta, 3*chunk)
	}
	for i := range rounds {
		name := []string{"fill", "copy", "init", "copy"}[i%4]
		check(name, pick(), pick(), pick())
	}
	if call(plain, "drop") != "" || call(lowered, "drop") != "" {
		t.Fatal("drop failed")
	}
	for _, n := range []uint32{0, 1, chunk + 1, segmentBytes} {
		check("init", 0, 0, n)
		check("init", 0, 1, n)
	}
}

// Where the length or the segment is small in the code already, nothing is
// replaced; where code is unreachable neither.
func TestBulkOperationsOfAllShapesValidate(t *testing.T) {
	r := newRuntime(t)
	three := cat(i32c(0), i32c(0))
	for name, code := range map[string][]byte{
		"constant small":              cat(three, i32c(100), 0xfc, 11, 0),
		"constant large":              cat(three, i32c(1<<20), 0xfc, 11, 0),
		"constant negative":           cat(three, i32c(-1), 0xfc, 10, 0, 0),
		"unreachable":                 cat(0x00, 0xfc, 11, 0),
		"after br":                    cat(0x0c, 0, 0xfc, 10, 0, 0),
		"polymorphic part":            cat(0x00, i32c(1), 0xfc, 11, 0),
		"long opcode":                 cat(three, i32c(100), 0xfc, 0x8b, 0, 0),
		"remainder after unreachable": cat(0x00, 0x6f, 0x1a, 0x82, 0x81, 0x01),
	} {
		t.Run(name, func(t *testing.T) {
			m := single(1, code)
			_, want := r.CompileModule(t.Context(), m)
			l := mustLower(t, m, options())
			if _, got := r.CompileModule(t.Context(), l.Bytes); (got == nil) != (want == nil) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}
