package wasm_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/wasm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A module is written down as the concatenation of sections.

func cat(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			b = append(b, byte(p))
		case byte:
			b = append(b, p)
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		}
	}
	return b
}

func uleb(n int) []byte {
	var b []byte
	for n >= 0x80 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}

func sleb(n int64) []byte {
	var b []byte
	for {
		c := byte(n & 0x7f)
		n >>= 7
		if n == 0 && c&0x40 == 0 || n == -1 && c&0x40 != 0 {
			return append(b, c)
		}
		b = append(b, c|0x80)
	}
}

func i32c(n int32) []byte { return cat(0x41, sleb(int64(n))) }
func i64c(n int64) []byte { return cat(0x42, sleb(n)) }

func vec(items ...[]byte) []byte {
	b := uleb(len(items))
	for _, i := range items {
		b = append(b, i...)
	}
	return b
}

func sec(id int, content ...any) []byte {
	c := cat(content...)
	return cat(id, uleb(len(c)), c)
}

func str(s string) []byte { return cat(uleb(len(s)), s) }

const (
	tI32 = 0x7f
	tI64 = 0x7e
)

func fntype(params []byte, results []byte) []byte {
	return cat(0x60, uleb(len(params)), params, uleb(len(results)), results)
}

func export(name string, kind, index int) []byte { return cat(str(name), kind, uleb(index)) }

// body is a function body: instructions without the final end.
func body(locals []byte, code ...any) []byte {
	if locals == nil {
		locals = []byte{0}
	}
	c := cat(locals, cat(code...), 0x0b)
	return cat(uleb(len(c)), c)
}

func module(sections ...[]byte) []byte {
	b := []byte("\x00asm\x01\x00\x00\x00")
	for _, s := range sections {
		b = append(b, s...)
	}
	return b
}

// single is a module with one exported function "f" of type () -> () and a
// memory of the given pages, or none if negative.
func single(pages int, code ...any) []byte {
	sections := [][]byte{
		sec(1, vec(fntype(nil, nil))),
		sec(3, vec([]byte{0})),
	}
	if pages >= 0 {
		sections = append(sections, sec(5, vec(cat(0, uleb(pages)))))
	}
	return module(append(sections,
		sec(7, vec(export("f", 0, 0))),
		sec(10, vec(body(nil, code...))))...)
}

func options() wasm.LowerOptions {
	return wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true, RemainderByDivision: true}
}

func mustLower(t testing.TB, module []byte, o wasm.LowerOptions) *wasm.Lowered {
	t.Helper()
	l, err := wasm.Lower(module, o)
	if err != nil {
		t.Fatalf("lower: %v", err)
	}
	return l
}

func newRuntime(t testing.TB) wazero.Runtime {
	t.Helper()
	r := wazero.NewRuntimeWithConfig(t.Context(), wazero.NewRuntimeConfigCompiler().WithCoreFeatures(api.CoreFeaturesV2).WithDebugInfoEnabled(false))
	t.Cleanup(func() { _ = r.Close(context.Background()) })
	return r
}

func instantiate(t testing.TB, r wazero.Runtime, module []byte) api.Module {
	t.Helper()
	m, err := r.InstantiateWithConfig(t.Context(), module, wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		t.Fatalf("instantiate: %v", err)
	}
	return m
}

func setKill(t testing.TB, m api.Module) {
	t.Helper()
	g, ok := m.ExportedGlobal(wasm.ExportKill).(api.MutableGlobal)
	if !ok {
		t.Fatal("no mutable kill global")
	}
	g.Set(1)
}

func codeOf(err error) wasm.Code {
	var e *wasm.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// goGuest is testdata/compute built for wasip1.
var goGuest = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "wasm-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	// A cold build of the standard library takes its time on a loaded machine.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	out := filepath.Join(dir, "compute.wasm")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./testdata/compute")
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=")
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, errors.New(string(b) + err.Error())
	}
	return os.ReadFile(out)
})

func readTestdata(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
