package wasm_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// verified lowers a module and fails unless every cycle of what comes out
// passes a check; see VerifyChecks.
func verified(t *testing.T, m []byte, o wasm.LowerOptions) {
	t.Helper()
	l, err := wasm.Lower(m, o)
	if err != nil {
		return
	}
	if err := wasm.VerifyChecks(l, o.Limits); err != nil {
		t.Errorf("%v\noriginal %.4000x", err, m)
	}
}

func TestEveryCyclePassesACheck(t *testing.T) {
	for name, m := range spinners() {
		t.Run(name, func(t *testing.T) { verified(t, m, options()) })
	}
	t.Run("generated", func(t *testing.T) {
		for i := range 300 {
			recipe := make([]byte, 300)
			for k := range recipe {
				recipe[k] = byte((k+7)*(i+3)*2654435761>>16 ^ k*i)
			}
			verified(t, generate(recipe), options())
		}
	})
	t.Run("Go guest", func(t *testing.T) {
		if testing.Short() {
			t.Skip("compiling it takes long")
		}
		m, err := goGuest()
		if err != nil {
			t.Fatal(err)
		}
		verified(t, m, options())
	})
	t.Run("shapes", func(t *testing.T) { verified(t, readTestdata(t, "shapes.wasm"), options()) })
	t.Run("spec testsuite", func(t *testing.T) {
		root, err := spectestDir()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, pattern := range []string{"v1/testdata/*.wasm", "v2/testdata/*.wasm"} {
			files, _ := filepath.Glob(filepath.Join(root, pattern))
			for _, f := range files {
				m, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				verified(t, m, options())
				n++
			}
		}
		if n == 0 {
			t.Error("no modules found")
		}
		t.Logf("%d modules", n)
	})
}

// The verifier finds what it is there for.
func TestVerifierMissesNoCheck(t *testing.T) {
	onOneGoroutine(t)
	for name, m := range spinners() {
		t.Run(name, func(t *testing.T) {
			l := mustLower(t, m, options())
			good := l.Bytes
			// Each check in turn compares with -1 and not with 0, so that it
			// is none.
			test := []byte{0x41, 0, 0x48, 0x04, 0x40}
			failed, checks := 0, 0
			for at := 0; checks < 200; checks++ {
				i := bytes.Index(good[at:], test)
				if i < 0 {
					break
				}
				at += i + 1
				l.Bytes = bytes.Clone(good)
				l.Bytes[at] = 0x7f
				if wasm.VerifyChecks(l, wasm.DefaultLimits()) != nil {
					failed++
				}
			}
			// In these two, other checks are on the same paths.
			if failed == 0 && name != "one long fill after another" && name != "table storm" {
				t.Errorf("%d checks were disabled one by one, and it found none", checks)
			}
			t.Logf("found %d of %d", failed, checks)
		})
	}
}

// FuzzEveryCyclePassesACheck: modules from anywhere and generated ones.
func FuzzEveryCyclePassesACheck(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	r := newRuntime(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		o := wasm.LowerOptions{Limits: fuzzLimits(), InterruptChecks: true, RemainderByDivision: true}
		if len(b) < 4000 {
			verified(t, generate(b), o)
		}
		l, err := wasm.Lower(b, o)
		if err != nil {
			return
		}
		// What the engine refuses never runs.
		c, err := r.CompileModule(t.Context(), l.Bytes)
		if err != nil {
			return
		}
		_ = c.Close(t.Context())
		verified(t, b, o)
	})
}
