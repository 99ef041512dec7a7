package guests

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
)

// run executes a guest on a plain engine, as a check of the guest itself.
func run(t *testing.T, name string, timeout time.Duration, env ...string) (stdout, stderr string, err error) {
	t.Helper()
	module := Read(t, name)
	ctx := t.Context()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithCloseOnContextDone(true).WithMemoryLimitPages(2048))
	defer r.Close(context.Background())
	wasi_snapshot_preview1.MustInstantiate(ctx, r)
	var out, errs bytes.Buffer
	config := wazero.NewModuleConfig().WithStdout(&limited{&out}).WithStderr(&limited{&errs}).
		WithStdin(strings.NewReader("the body")).WithArgs("/").WithRandSource(rand.Reader).
		WithSysWalltime().WithSysNanotime().WithSysNanosleep()
	for i := 0; i < len(env); i += 2 {
		config = config.WithEnv(env[i], env[i+1])
	}
	program, err := r.CompileModule(ctx, module)
	if err != nil {
		t.Fatal(err)
	}
	// Compiling takes seconds for a Go guest; the deadline is for running.
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err = r.InstantiateModule(ctx, program, config)
	return out.String(), errs.String(), err
}

// limited keeps the first megabyte and swallows the rest.
type limited struct{ *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len() < 1<<20 {
		l.Buffer.Write(p)
	}
	return len(p), nil
}

func TestWellBehavedGuestsAnswer(t *testing.T) {
	for name, want := range map[string]string{
		"hello":        marker,
		"hello-c":      "Hello, world, from C! You asked for /",
		"hello-go":     "Hello, world, from Go!",
		"echo":         "--- body ---\nthe body",
		"stream":       "chunk 1\n",
		"stderr-lines": "logged",
		"log-query":    "logged",
		"counter":      "data=1 bss=1 dirty=0 file=refused",
		"entropy":      "\n",
		"compute":      "\n",
		"big-memory":   "big",
		"memory":       "\r\n\r\n1",
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := run(t, name, time.Minute, "QUERY_STRING", "2")
			if err != nil && !strings.Contains(err.Error(), "exit_code(0)") {
				t.Fatalf("ended with %v; stdout %q", err, out)
			}
			header, body, found := strings.Cut(out, "\r\n\r\n")
			if !found || !strings.HasPrefix(header, "Content-Type: text/plain") {
				t.Fatalf("no CGI header in %q", out)
			}
			if !strings.Contains("\r\n\r\n"+body, want) {
				t.Errorf("body %q lacks %q", body, want)
			}
		})
	}
}

func TestHostileGuestsDoWhatTheySay(t *testing.T) {
	const endless, exits1, traps, overflows = "module closed with context deadline exceeded", "exit_code(1)", "unreachable", "stack overflow"
	for name, want := range map[string]string{
		"spin":           endless,
		"spin-late":      endless,
		"bulk-fill":      endless,
		"recurse-spin":   endless,
		"endless-stdout": endless,
		"endless-stderr": endless,
		"endless-header": endless,
		"zero-writes":    endless,
		"entropy-flood":  endless,
		"read-forever":   endless,
		"go-spin":        endless,
		"recurse":        overflows,
		"trap":           traps,
		"late-trap":      traps,
		"exit1":          exits1,
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := run(t, name, 500*time.Millisecond)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("ended with %v, want %s", err, want)
			}
		})
	}
}

// Without loops an engine that checks at loop headers only cannot stop this
// guest, so it is not run here; that it has none is what makes it worth having.
func TestCallTreeCompiles(t *testing.T) { Build(t, "call-tree") }

func TestMarkChangesOnlyTheAnswer(t *testing.T) {
	hello := Read(t, "hello")
	first, err := Mark(hello, "first")
	if err != nil {
		t.Fatal(err)
	}
	second, err := Mark(hello, "second")
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != len(hello) || bytes.Equal(first, second) {
		t.Error("two texts must give two modules of the first one's size")
	}
	for _, text := range []string{"", strings.Repeat("x", MaxMark+1), "a\x00b"} {
		if _, err := Mark(hello, text); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
	if _, err := Mark(first, "again"); err == nil {
		t.Error("a module without placeholder was accepted")
	}
}

func TestEverySourceCompiles(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("src", "c", "*.c"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no sources: %v", err)
	}
	for _, file := range files {
		path := Build(t, strings.TrimSuffix(filepath.Base(file), ".c"))
		head := make([]byte, 4)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Read(head); err != nil || string(head) != "\x00asm" {
			t.Errorf("%s is no module: %q %v", path, head, err)
		}
		f.Close()
	}
}
