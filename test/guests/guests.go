// Package guests compiles the WebAssembly programs that the end-to-end tests,
// the crash test and the benchmark run on Hearth: well-behaved ones that show
// what a function can do, and hostile ones that each do one wrong thing.
//
// It owns the sources under src/ and a cache of compiled modules in the user's
// cache directory. It knows nothing of Hearth: what it makes are ordinary
// wasip1 modules, and its own tests run them on a plain engine.
package guests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// ErrNoCompiler says that clang, its WebAssembly linker or wasi-libc is
// missing; test/install-deps.sh installs them.
var ErrNoCompiler = errors.New("the C compiler for WebAssembly is missing: run test/install-deps.sh")

// compileTimeout bounds one compiler run. The slowest guest takes some ten
// seconds alone with a cold Go build cache; the rest is for a busy machine.
const compileTimeout = 5 * time.Minute

// marker is the text in hello.c that Mark replaces.
const marker = "HEARTH-MARKER-0000000000000000000000000000000000"

// MaxMark is how many bytes a text given to Mark may have.
const MaxMark = len(marker)

// cFlags are needed by single C guests beside the common flags.
var cFlags = map[string][]string{
	"bulk-fill":      {"-mbulk-memory"},
	"big-memory":     {"-Wl,--initial-memory=67108864"}, // 64 MiB
	"unknown-import": {"-Wl,--allow-undefined"},
}

// Build returns the path of the named guest as a wasip1 module, compiling it
// when the cache has none for these sources and this compiler. Names are those
// of src/c/<name>.c; "go-<name>" for src/go/<name>; "hello-go" and "hello-c"
// are the two examples. A test whose compiler is missing fails, saying what to
// install: leaving it out quietly would leave the product untested.
func Build(tb testing.TB, name string) string {
	tb.Helper()
	path, err := Compile(tb.Context(), name)
	if err != nil {
		tb.Fatalf("building guest %s: %v", name, err)
	}
	return path
}

// Read is Build that returns the module's bytes.
func Read(tb testing.TB, name string) []byte {
	tb.Helper()
	module, err := os.ReadFile(Build(tb, name))
	if err != nil {
		tb.Fatal(err)
	}
	return module
}

// Mark returns a copy of the compiled hello guest that answers with text, at
// most MaxMark bytes, without running a compiler. Each text makes another
// module with another digest.
func Mark(hello []byte, text string) ([]byte, error) {
	if len(text) == 0 || len(text) > MaxMark || strings.ContainsRune(text, 0) {
		return nil, fmt.Errorf("marking a guest with %q: need 1 to %d bytes without NUL", text, MaxMark)
	}
	if n := bytes.Count(hello, []byte(marker)); n != 1 {
		return nil, fmt.Errorf("marking a guest: it holds the placeholder %d times, not once", n)
	}
	padded := make([]byte, MaxMark) // the rest is NUL: the C string ends early
	copy(padded, text)
	return bytes.Replace(hello, []byte(marker), padded, 1), nil
}

var compiled struct {
	sync.Mutex
	once map[string]func() (string, error)
}

// Compile is Build for programs that are no tests. It may be called from many
// goroutines and processes at once; each guest is compiled once per process at
// most. The first caller's ctx bounds the compilation.
func Compile(ctx context.Context, name string) (string, error) {
	compiled.Lock()
	if compiled.once == nil {
		compiled.once = map[string]func() (string, error){}
	}
	once, ok := compiled.once[name]
	if !ok {
		ctx := context.WithoutCancel(ctx)
		once = sync.OnceValues(func() (string, error) {
			ctx, cancel := context.WithTimeout(ctx, compileTimeout)
			defer cancel()
			return compile(ctx, name)
		})
		compiled.once[name] = once
	}
	compiled.Unlock()
	return once()
}

// Root is the top directory of the repository this package was compiled from.
func Root() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", errors.New("the place of the guest sources is unknown")
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(file)))
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		return "", fmt.Errorf("finding the repository (was the binary built with -trimpath?): %w", err)
	}
	return root, nil
}

// job is one compiler run: its command without the output file, the sources
// it reads and whatever else must change the cache key.
type job struct {
	argv    []string // "-o" and the output path come before the last element
	dir     string
	env     []string
	sources string // a file, or a directory that is read whole
	version string
}

func compile(ctx context.Context, name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	j, err := plan(ctx, root, name)
	if err != nil {
		return "", err
	}
	key, err := j.key()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	dir := filepath.Join(cache, "hearth-test-guests")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("making the guest cache: %w", err)
	}
	path := filepath.Join(dir, name+"-"+key+".wasm")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}

	// Compiled beside its place and renamed: other processes see all or nothing.
	tmp, err := os.MkdirTemp(dir, ".building-")
	if err != nil {
		return "", fmt.Errorf("making a directory to compile in: %w", err)
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "guest.wasm")
	argv := slices.Insert(slices.Clone(j.argv), len(j.argv)-1, "-o", out)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = j.dir
	cmd.Env = append(os.Environ(), j.env...)
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, output)
	}
	if err := os.Rename(out, path); err != nil {
		return "", fmt.Errorf("keeping the compiled guest: %w", err)
	}
	return path, nil
}

// plan decides how the named guest is compiled.
func plan(ctx context.Context, root, name string) (job, error) {
	sources := filepath.Join(root, "test", "guests", "src")
	goDir := ""
	cFile := filepath.Join(sources, "c", name+".c")
	switch {
	case name == "hello-go":
		goDir = filepath.Join(root, "examples", "hello-go")
	case name == "hello-c":
		cFile = filepath.Join(root, "examples", "hello-c", "hello.c")
	case strings.HasPrefix(name, "go-"):
		goDir = filepath.Join(sources, "go", strings.TrimPrefix(name, "go-"))
	}
	if goDir != "" {
		return job{
			argv:    []string{"go", "build", "-trimpath", "-ldflags=-s -w", "."},
			dir:     goDir,
			env:     []string{"GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=", "GOWORK=off"},
			sources: goDir,
			version: runtime.Version(),
		}, nil
	}
	version, err := clangVersion(ctx)
	if err != nil {
		return job{}, err
	}
	// Debian's clang finds wasi-libc by itself for this target.
	argv := []string{"clang", "--target=wasm32-wasi", "-O2", "-Wall", "-Wno-unused-result", "-Wl,--strip-all"}
	argv = append(argv, cFlags[name]...)
	return job{argv: append(argv, cFile), dir: root, sources: cFile, version: version}, nil
}

var clangVersion = func() func(context.Context) (string, error) {
	var once sync.Once
	var version string
	var err error
	return func(ctx context.Context) (string, error) {
		once.Do(func() {
			var out []byte
			if out, err = exec.CommandContext(ctx, "clang", "--version").Output(); err != nil {
				err = fmt.Errorf("%w (%w)", ErrNoCompiler, err)
			} else if _, err = exec.LookPath("wasm-ld"); err != nil {
				err = fmt.Errorf("%w (%w)", ErrNoCompiler, err)
			}
			version = string(out)
		})
		return version, err
	}
}()

// key names the result: the same sources, flags and compiler give the same key.
func (j job) key() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %q\n", j.argv, j.env, j.version)
	err := filepath.WalkDir(j.sources, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n%s", d.Name(), len(content), content)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("reading the guest's sources: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}
