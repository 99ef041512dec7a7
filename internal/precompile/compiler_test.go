package precompile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func wasiImport(t byte, functions ...string) []byte {
	content := leb(len(functions))
	for _, f := range functions {
		content = join(content, name("wasi_snapshot_preview1"), name(f), []byte{0, t})
	}
	return section(2, content...)
}

// importing is a module with type 0 ()->(), type 1 (i32)->() and imports.
func importing(imports []byte, start byte) []byte {
	return join(moduleHeader,
		section(1, 2, 0x60, 0, 0, 0x60, 1, 0x7f, 0),
		imports,
		section(3, 1, 0),
		section(7, join([]byte{1}, name("_start"), []byte{0, start})...),
		section(10, 1, 2, 0, 0x0b))
}

func TestCheckSaysWhatIsWrong(t *testing.T) {
	c := newTestCompiler(t)
	manyImports := leb(25)
	for i := range 25 {
		manyImports = join(manyImports, name("env"), name(fmt.Sprintf("missing_%02d", i)), []byte{0, 0})
	}
	deep := join([]byte{0}, bytes.Repeat([]byte{0x02, 0x40}, 1_000_000), bytes.Repeat([]byte{0x0b}, 1_000_001))
	for _, test := range []struct {
		name   string
		module []byte
		limit  int
		code   string
		detail []string
	}{
		{name: "empty file", module: nil, code: CodeNotWasm, detail: []string{"00 61 73 6d"}},
		{name: "text", module: []byte("#!/bin/sh\necho hello\n"), code: CodeNotWasm},
		{name: "wat", module: []byte("(module)"), code: CodeNotWasm},
		{name: "component", module: []byte{0, 'a', 's', 'm', 0x0d, 0, 1, 0, 0, 0}, code: CodeComponentUnsupported, detail: []string{"component", "yet", "spin runtime"}},
		{name: "ELF", module: append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 64)...), code: CodeNativeArtifact},
		{name: "engine cache", module: []byte("WAZEVO\x03dev............."), code: CodeNativeArtifact},
		{name: "header only", module: moduleHeader, code: CodeNoStartFunction, detail: []string{"_start"}},
		{name: "truncated", module: distinctModule(1)[:40], code: CodeMalformedModule},
		{name: "library", module: join(moduleHeader, section(1, 1, 0x60, 0, 0), section(3, 1, 0), section(7, join([]byte{1}, name("run"), []byte{0, 0})...), section(10, 1, 2, 0, 0x0b)), code: CodeNoStartFunction},
		{name: "start with a parameter", module: join(moduleHeader, section(1, 1, 0x60, 1, 0x7f, 0), section(3, 1, 0), section(7, join([]byte{1}, name("_start"), []byte{0, 0})...), section(10, 1, 2, 0, 0x0b)), code: CodeNoStartFunction},
		{name: "start is a memory", module: join(moduleHeader, section(5, 1, 0, 1), section(7, join([]byte{1}, name("_start"), []byte{2, 0})...)), code: CodeNoStartFunction},
		{name: "type error", module: startModule([]byte{0, 0x41, 0, 0x0b}), code: CodeInvalidModule, detail: []string{"function"}},
		{name: "unknown function called", module: startModule([]byte{0, 0x10, 9, 0x0b}), code: CodeInvalidModule},
		{name: "our own globals", module: startModule([]byte{0, 0x41, 0, 0x24, 0, 0x0b}), code: CodeInvalidModule},
		{name: "reserved export", module: join(moduleHeader, section(1, 1, 0x60, 0, 0), section(3, 1, 0), section(7, join([]byte{2}, name("_start"), []byte{0, 0}, name("hearth:kill"), []byte{0, 0})...), section(10, 1, 2, 0, 0x0b)), code: CodeInvalidModule, detail: []string{"hearth:"}},
		{name: "unknown imports are named", module: importing(section(2, manyImports...), 25), code: CodeUnsupportedImport, detail: []string{"env.missing_00", "env.missing_19", "and 5 more"}},
		{name: "unknown WASI function", module: importing(wasiImport(0, "fd_teleport"), 1), code: CodeUnsupportedImport, detail: []string{"wasi_snapshot_preview1.fd_teleport"}},
		{name: "WASI function with another type", module: importing(wasiImport(0, "proc_exit"), 1), code: CodeUnsupportedImport, detail: []string{"proc_exit", "(i32) -> ()"}},
		{name: "imported memory", module: importing(section(2, join([]byte{1}, name("env"), name("memory"), []byte{2, 0, 1})...), 0), code: CodeUnsupportedImport, detail: []string{"env.memory", "memory"}},
		{name: "import with a hostile name", module: importing(section(2, join([]byte{1}, name("env"), name("a\x1b[31m\nb"), []byte{0, 0})...), 1), code: CodeUnsupportedImport, detail: []string{"a?[31m?b"}},
		{name: "memory over the function's limit", module: startModule(emptyBody, section(5, 1, 0, 17)), limit: 1, code: CodeMemoryOverLimit, detail: []string{"17 pages", "16 pages"}},
		{name: "memory over any limit", module: startModule(emptyBody, section(5, join([]byte{1, 0}, leb(16385))...)), limit: 1024, code: CodeMemoryOverLimit},
		{name: "20 million table entries", module: startModule(emptyBody, section(4, join([]byte{1, 0x70, 0}, leb(20_000_000))...)), code: CodeLimitExceeded, detail: []string{"table"}},
		{name: "millions of locals", module: startModule(join([]byte{1}, leb(5_000_000), []byte{0x7f, 0x0b})), code: CodeLimitExceeded, detail: []string{"locals"}},
		{name: "4 billion locals in groups", module: startModule(join([]byte{2}, leb(0xffffffff), []byte{0x7f}, leb(0xffffffff), []byte{0x7e, 0x0b})), code: CodeLimitExceeded},
		{name: "a million nested blocks", module: startModule(deep), code: CodeLimitExceeded},
		{name: "a million types", module: join(moduleHeader, section(1, join(leb(1_000_000), bytes.Repeat([]byte{0x60, 0, 0}, 1_000_000))...)), code: CodeLimitExceeded},
		{name: "more types announced than there are", module: join(moduleHeader, section(1, leb(90_000)...)), code: CodeMalformedModule},
		{name: "exception handling", module: join(moduleHeader, section(1, 1, 0x60, 0, 0), section(13, 1, 0, 0)), code: CodeUnsupportedFeature},
		{name: "threads", module: startModule(emptyBody, section(5, 1, 3, 1, 1)), code: CodeUnsupportedFeature},
	} {
		t.Run(test.name, func(t *testing.T) {
			report, err := check(t, c, writeFile(t, test.module), CheckOptions{MemoryLimitMiB: test.limit})
			if err == nil {
				t.Fatalf("passed: %+v", report)
			}
			if got := codeOf(err); got != test.code {
				t.Fatalf("code %s, want %s: %v", got, test.code, err)
			}
			for _, d := range test.detail {
				if !strings.Contains(err.Error(), d) {
					t.Errorf("%q does not say %q", err, d)
				}
			}
			var e *Error
			if errors.As(err, &e); e.Retryable {
				t.Error("says that a retry could help")
			}
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("not printable: %q", err)
			}
		})
	}
}

func TestCheckRefusesWhatIsTooLargeWithoutReadingIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(path, moduleHeader, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, v1alpha1.MaxModuleBytes+1); err != nil {
		t.Fatal(err)
	}
	if _, err := check(t, newTestCompiler(t), path, CheckOptions{}); codeOf(err) != CodeModuleTooLarge {
		t.Fatal(err)
	}
	if _, err := check(t, newTestCompiler(t), t.TempDir(), CheckOptions{}); codeOf(err) != CodeInternal {
		t.Fatal(err)
	}
}

func TestCheckReportsWhatItFound(t *testing.T) {
	module := importing(wasiImport(1, "proc_exit", "proc_exit"), 2)
	path := writeFile(t, module)
	report, err := check(t, newTestCompiler(t), path, CheckOptions{MemoryLimitMiB: 1})
	if err != nil {
		t.Fatal(err)
	}
	if report.ModuleDigest != imageOf(string(module)) || report.SizeBytes != int64(len(module)) || report.Functions != 3 ||
		len(report.Imports) != 1 || report.Imports[0] != "wasi_snapshot_preview1.proc_exit" || report.Phases[0].Name != "check" {
		t.Fatalf("%+v", report)
	}
}

// TestValidationAloneAgreesWithCompiling guards the trick that validates
// without compiling against changes of the engine.
func TestValidationAloneAgreesWithCompiling(t *testing.T) {
	ctx := t.Context()
	for name, module := range map[string][]byte{
		"valid":   distinctModule(1),
		"invalid": startModule([]byte{0, 0x41, 0, 0x0b}),
		"nothing": moduleHeader,
	} {
		alone, whole := validate(ctx, module, 16), compileDirectly(ctx, module)
		if (alone == nil) != (whole == nil) {
			t.Errorf("%s: validated %v, compiled %v", name, alone, whole)
		}
	}
}

func TestChildThatMisbehavesIsAnError(t *testing.T) {
	small := writeFile(t, distinctModule(1))
	for _, test := range []struct {
		child     string
		change    func(*CompilerOptions)
		code      string
		retryable bool
	}{
		{"crash", nil, CodeCompilerCrashed, false},
		{"garbage", nil, CodeCompilerCrashed, false},
		{"hog", func(o *CompilerOptions) { o.MemoryBytes = 256 << 20 }, CodeCompileMemory, false},
		{"hang", func(o *CompilerOptions) { o.Timeout = 3 * time.Second }, CodeCompileTimeout, true},
	} {
		t.Run(test.child, func(t *testing.T) {
			c := newTestCompiler(t, func(o *CompilerOptions) {
				o.Env = childEnv(test.child)
				if test.change != nil {
					test.change(o)
				}
			})
			_, err := check(t, c, small, CheckOptions{})
			var e *Error
			if !errors.As(err, &e) || e.Code != test.code || e.Retryable != test.retryable {
				t.Fatalf("%#v", err)
			}
		})
	}
	t.Run("cannot be started", func(t *testing.T) {
		c := newTestCompiler(t, func(o *CompilerOptions) { o.Command = []string{"/does/not/exist"} })
		if _, err := check(t, c, small, CheckOptions{}); codeOf(err) != CodeInternal {
			t.Fatal(err)
		}
	})
	t.Run("is no longer wanted", func(t *testing.T) {
		c := newTestCompiler(t, func(o *CompilerOptions) { o.Env = childEnv("hang"); o.Concurrency = 1 })
		f, err := os.Open(small)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		ctx, cancel := context.WithCancel(t.Context())
		results := make(chan error, 2) // the second waits for its turn
		for range 2 {
			go func() { _, err := c.Check(ctx, f, CheckOptions{}); results <- err }()
		}
		eventually(t, "a child runs", func() bool { return len(c.slots) == 1 })
		cancel()
		for range 2 {
			if err := <-results; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
}

// compileBomb is a small module that validates in no time and compiles for
// long: functions whose every instruction lives until the end.
func compileBomb(functions, instructions int) []byte {
	body := []byte{0}
	for i := range instructions {
		body = append(body, 0x20, 0) // local.get 0
		body = append(body, 0x41)
		body = append(body, leb(i&0x3f)...)
		body = append(body, 0x6a) // i32.add
	}
	for range instructions - 1 {
		body = append(body, 0x6c) // i32.mul
	}
	body = append(body, 0x0b)
	code := leb(functions + 1)
	types := leb(functions + 1)
	for range functions {
		code = join(code, leb(len(body)), body)
		types = append(types, 1)
	}
	code = join(code, []byte{2}, emptyBody)
	types = append(types, 0)
	return join(moduleHeader,
		section(1, 2, 0x60, 0, 0, 0x60, 1, 0x7f, 1, 0x7f),
		section(3, types...),
		section(7, join([]byte{1}, name("_start"), []byte{0}, leb(functions))...),
		section(10, code...))
}

// longCompile takes far longer than any test waits for it.
func longCompile() []byte { return longModule() }

// longModule is made once: under the race detector that alone takes seconds.
var longModule = sync.OnceValue(func() []byte {
	if slow() || raceDetector {
		return compileBomb(100, 5_000)
	}
	return compileBomb(300, 20_000)
})

func TestCompileBombIsKilledAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, func(o *StoreOptions) {
		o.Compiler = newTestCompiler(t, func(o *CompilerOptions) { o.Timeout = time.Second; o.MemoryBytes = 1 << 30 })
	})
	path := writeFile(t, longCompile())
	_, _, err := s.Ensure(t.Context(), imageOf("bomb"), from(path, nil))
	if code := codeOf(err); code != CodeCompileTimeout && code != CodeCompileMemory {
		t.Fatal(err)
	}
	empty(t, filepath.Join(dir, tmpName), filepath.Join(dir, objectsName), filepath.Join(dir, imagesName))
}

func empty(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("%s is not empty: %v, %v", dir, entries, err)
		}
	}
}
