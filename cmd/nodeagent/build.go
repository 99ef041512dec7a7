package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// buildWait bounds building a module: a first build downloads
	// dependencies and compiles the standard library.
	buildWait = 10 * time.Minute
	// buildKillWait is how long a cancelled build's output is waited for.
	buildKillWait = 3 * time.Second
	// maxBuildOutput bounds what is kept of a failed build's messages.
	maxBuildOutput = 32 << 10
)

// buildError is a directory that could not be turned into a module.
type buildError struct {
	message, remedy, output string
}

func (e *buildError) Error() string {
	s := e.message
	if e.output != "" {
		s += "\n" + e.output
	}
	return s
}

// buildable says what is wrong with a directory that cannot be built. Go is
// recognised; for everything else it says what to do instead.
func buildable(dir string) *buildError {
	kind, hint := recognise(dir)
	if kind == "go" {
		return nil
	}
	return &buildError{
		message: fmt.Sprintf("%s is not the directory of a Go module (no go.mod there or above), the only kind that is built for you", dir),
		remedy:  hint,
	}
}

// recognise says what a directory holds; for what is not built, hint says how
// to get a module from it.
func recognise(dir string) (kind, hint string) {
	if hasGoMod(dir) {
		return "go", ""
	}
	if modules, _ := filepath.Glob(filepath.Join(dir, "*.wasm")); len(modules) > 0 {
		return "", "it holds a module, though: nodeagent submit " + modules[0]
	}
	for _, known := range []struct{ pattern, hint string }{
		{"*.go", "run `go mod init NAME` there, then submit it again"},
		{"Cargo.toml", "build it with `cargo build --release --target wasm32-wasip1`, then submit the .wasm file below target/"},
		{"*.c", "build it with `clang --target=wasm32-wasi -O2 -o module.wasm …`, then submit that file"},
		{"Makefile", "build it, then submit the .wasm file"},
	} {
		if found, _ := filepath.Glob(filepath.Join(dir, known.pattern)); len(found) > 0 {
			return "", known.hint
		}
	}
	return "", "compile it for wasip1 with the language's own tools, then submit the .wasm file"
}

// hasGoMod looks upwards as the go command does: a function may be one package
// of a larger module.
func hasGoMod(dir string) bool {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	inside, _ := filepath.Glob(filepath.Join(abs, "*.go"))
	for here := abs; ; here = filepath.Dir(here) {
		if info, err := os.Stat(filepath.Join(here, "go.mod")); err == nil && info.Mode().IsRegular() {
			return here == abs || len(inside) > 0
		}
		if here == filepath.Dir(here) {
			return false
		}
	}
}

// buildGo builds the main package in dir into a wasip1 module at out.
func buildGo(ctx context.Context, dir, out string) error {
	goTool, err := exec.LookPath("go")
	if err != nil {
		return &buildError{
			message: dir + " is a Go module, but the go command is not in PATH",
			remedy:  "install Go from https://go.dev/dl/, or build the module elsewhere and submit the .wasm file",
		}
	}
	ctx, cancel := context.WithTimeout(ctx, buildWait)
	defer cancel()
	name, err := runGo(ctx, goTool, dir, "list", "-f", "{{.Name}}", ".")
	if err != nil {
		return err
	}
	if name != "main" {
		return &buildError{
			message: fmt.Sprintf("%s is the package %q, not a program: a function needs package main with func main", dir, name),
			remedy:  "submit the directory of the main package, such as ./cmd/NAME",
		}
	}
	// Trimmed and without version-control stamps, the same sources give the
	// same bytes, so submitting them again changes nothing.
	_, err = runGo(ctx, goTool, dir, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, ".")
	return err
}

func runGo(ctx context.Context, goTool, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, goTool, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "CGO_ENABLED=0")
	// The go command starts compilers: end the whole group, or they go on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = buildKillWait
	var stdout bytes.Buffer
	stderr := &headBuffer{limit: maxBuildOutput}
	cmd.Stdout, cmd.Stderr = &stdout, stderr
	err := cmd.Run()
	if err == nil {
		return strings.TrimSpace(stdout.String()), nil
	}
	if ctx.Err() != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return "", &buildError{message: fmt.Sprintf("building %s took longer than %v", dir, buildWait)}
		}
		return "", ctx.Err()
	}
	e := &buildError{message: fmt.Sprintf("go %s in %s failed: %v", args[0], dir, err), output: printableLines(stderr.String())}
	if strings.Contains(e.output, "no Go files") || strings.Contains(e.output, "build constraints exclude all Go files") {
		e.remedy = "submit the directory of the main package, such as ./cmd/NAME"
	} else if args[0] == "build" {
		e.remedy = "it is built for GOOS=wasip1 GOARCH=wasm; packages that need an operating system do not work there"
	}
	return "", e
}

func printableLines(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	for i, line := range lines {
		lines[i] = "  " + printable(line)
	}
	return strings.TrimRight(strings.Join(lines, "\n"), " ")
}

// headBuffer keeps the first bytes: the first error of a compiler is the one
// that matters.
type headBuffer struct {
	bytes.Buffer
	limit int
}

func (b *headBuffer) Write(p []byte) (int, error) {
	if room := b.limit - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
