package precompile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/sandbox"
	"github.com/hearth-sh/hearth/internal/wasm"
	"github.com/hearth-sh/hearth/test/needs"
)

// childEnvironment makes the test binary one of the processes below.
const childEnvironment = "HEARTH_PRECOMPILE_TEST_CHILD"

func TestMain(m *testing.M) {
	switch name := os.Getenv(childEnvironment); name {
	case "":
	case "child":
		os.Exit(ChildMain(context.Background(), os.Stdin, os.Stdout))
	case "crash":
		panic("a compiler bug")
	case "garbage":
		fmt.Println(strings.Repeat("garbage", 1<<15))
		os.Exit(0)
	case "hog":
		var keep [][]byte
		for {
			b := make([]byte, 16<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			keep = append(keep, b)
			_ = keep
		}
	case "hang":
		time.Sleep(time.Hour) // an empty select would be a deadlock, and end
	case "publisher":
		os.Exit(publisherMain(os.Args[1:]))
	case "reader":
		os.Exit(readerMain(os.Args[1:]))
	default:
		panic("unknown child " + name)
	}
	guests.dir, _ = os.MkdirTemp("", "hearth-guests-*")
	code := 0
	func() {
		defer os.RemoveAll(guests.dir)
		code = m.Run()
	}()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// emulator is the command in front of a child of this architecture, when
// these tests run under user-mode emulation that is not registered with the
// kernel: HEARTH_EXEC_WRAPPER, or else what is found by trying.
var emulator = sync.OnceValue(func() []string {
	if wrapper := strings.Fields(os.Getenv("HEARTH_EXEC_WRAPPER")); len(wrapper) > 0 {
		return wrapper
	}
	if os.Getenv(childEnvironment) != "" { // a child is told
		return nil
	}
	if err := exec.Command(os.Args[0], "-test.run=^$").Run(); errors.Is(err, syscall.ENOEXEC) {
		if path, err := exec.LookPath("qemu-aarch64-static"); err == nil {
			return []string{path}
		}
	}
	return nil
})

func childCommand() []string {
	if wrapper := emulator(); len(wrapper) > 0 {
		return append(wrapper, os.Args[0])
	}
	return []string{sandbox.Executable()}
}

// slow says to do the same with fewer repetitions: each child costs about a
// second under emulation.
func slow() bool { return testing.Short() || len(emulator()) > 0 }

// childEnv has the race detector not wait a second before every exit.
func childEnv(name string) []string {
	return []string{childEnvironment + "=" + name, "GORACE=atexit_sleep_ms=0", "HEARTH_EXEC_WRAPPER=" + strings.Join(emulator(), " ")}
}

func newTestCompiler(t testing.TB, change ...func(*CompilerOptions)) *Compiler {
	t.Helper()
	o := CompilerOptions{
		Command: childCommand(),
		Env:     childEnv("child"),
		// An emulator cannot be executed from a directory that only root can
		// search, and Linux processes under it look alike anyway.
		SameAccount: len(emulator()) > 0,
		Logger:      slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	for _, c := range change {
		c(&o)
	}
	return NewCompiler(o)
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.Helper()
	w.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// guests are modules built once per run from testdata.
var guests struct {
	dir  string
	once [2]sync.Once
	err  [2]error
}

func cGuest(t testing.TB) string {
	t.Helper()
	path := filepath.Join(guests.dir, "c.wasm")
	guests.once[0].Do(func() {
		guests.err[0] = output(exec.Command("clang", "--target=wasm32-wasi", "-O2", "-o", path, filepath.Join("testdata", "hello.c")))
	})
	if guests.err[0] != nil {
		needs.Missing(t, "no C compiler for wasm32-wasi here (clang, lld, wasi-libc): %v", guests.err[0])
	}
	return path
}

func goGuest(t testing.TB) string {
	t.Helper()
	path := filepath.Join(guests.dir, "go.wasm")
	guests.once[1].Do(func() {
		dir := filepath.Join(guests.dir, "go")
		source, err := os.ReadFile(filepath.Join("testdata", "hello.go.txt"))
		err = errors.Join(err, os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "main.go"), source, 0o644))
		if err == nil {
			cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "main.go")
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=", "CGO_ENABLED=0", "GOWORK=off", "GO111MODULE=off")
			err = output(cmd)
		}
		guests.err[1] = err
	})
	if guests.err[1] != nil {
		needs.Missing(t, "no Go toolchain here: %v", guests.err[1])
	}
	return path
}

func output(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Modules are put together by hand, so that each says exactly what it tests.

var moduleHeader = []byte{0, 'a', 's', 'm', 1, 0, 0, 0}

func section(id byte, content ...byte) []byte {
	return append(append([]byte{id}, leb(len(content))...), content...)
}

func leb(n int) []byte {
	var b []byte
	for {
		c := byte(n & 0x7f)
		if n >>= 7; n == 0 {
			return append(b, c)
		}
		b = append(b, c|0x80)
	}
}

func name(s string) []byte { return append(leb(len(s)), s...) }

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// startBody is a module with one function _start of this body, and sections
// that go before the export section.
func startModule(body []byte, before ...[]byte) []byte {
	return join(moduleHeader,
		section(1, 1, 0x60, 0, 0),
		section(3, 1, 0),
		join(before...),
		section(7, join([]byte{1}, name("_start"), []byte{0, 0})...),
		section(10, join([]byte{1}, leb(len(body)), body)...))
}

var emptyBody = []byte{0, 0x0b}

// distinctModule returns a runnable module that differs for every n: it
// carries n as a constant.
func distinctModule(n int) []byte {
	return startModule(join([]byte{0, 0x41}, leb(n&0x3f), []byte{0x41}, leb(n>>6&0x3f), []byte{0x6a, 0x1a, 0x0b}),
		section(5, 1, 0, 1))
}

func writeFile(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "module")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func check(t testing.TB, c *Compiler, path string, o CheckOptions) (*Report, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return c.Check(t.Context(), f, o)
}

func openStore(t testing.TB, dir string, change ...func(*StoreOptions)) *Store {
	t.Helper()
	o := StoreOptions{Compiler: newTestCompiler(t), Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
	for _, c := range change {
		c(&o)
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func imageOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// from is the module callback of Ensure for a file; it counts its calls.
func from(path string, calls *int) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		if calls != nil {
			*calls++
		}
		return path, nil
	}
}

// runGuest instantiates a loaded object and returns its standard output.
func runGuest(t testing.TB, l *Loaded) string {
	t.Helper()
	ctx := context.Background()
	wasi_snapshot_preview1.MustInstantiate(ctx, l.Runtime)
	var stdout bytes.Buffer
	m, err := l.Runtime.InstantiateModule(ctx, l.Module, moduleConfig().WithStdout(&stdout))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(ctx)
	if m.ExportedGlobal(wasm.ExportKill) == nil {
		t.Error("module was not lowered")
	}
	if _, err := m.ExportedFunction("_start").Call(ctx); err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
		t.Fatal(err)
	}
	return stdout.String()
}

func moduleConfig() wazero.ModuleConfig {
	return wazero.NewModuleConfig().WithStartFunctions().WithName("")
}

func codeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return fmt.Sprintf("%T", err)
}

// compileDirectly is wazero without this package, for comparison.
func compileDirectly(ctx context.Context, module []byte) error {
	r := wazero.NewRuntimeWithConfig(ctx, runtimeConfig(nil, maxMemoryPages))
	defer r.Close(ctx)
	_, err := r.CompileModule(experimental.WithCompilationWorkers(ctx, 2), module)
	return err
}

// eventually polls a condition of another process; it fails the test when
// that never comes true.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for range 6000 {
		if condition() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited in vain until %s", what)
}
