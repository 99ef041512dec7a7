// Package shims builds the containerd shims that tests run: one that executes
// WebAssembly with Wasmtime on runwasi's published crates, and shims that are
// wrong in one way each.
//
// It owns the Cargo project beside it and a directory of the user's cache. It
// starts no containerd: put Paths.Dir on one's PATH.
package shims

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/slot"
)

const (
	// buildTimeout is for a cold build: some ten minutes on two idle cores.
	buildTimeout = 45 * time.Minute
	// installTimeout bounds installing Debian packages.
	installTimeout = 10 * time.Minute
	// shown is how much of a failed build's output is worth showing.
	shown = 4 << 10
)

// Version is what every shim here says of itself with -v: the version in
// Cargo.toml.
const Version = "0.1.0"

// Paths are the shims' binaries, all in Dir, under the names by which
// containerd looks for them ("io.containerd.wasmtime.v1").
type Paths struct {
	Dir string
	// Wasmtime runs wasip1 commands, from Wasm layers and from files, and
	// keeps compiled modules in containerd's content store.
	Wasmtime string
	// Hollow ends every container with status 0 and runs nothing.
	Hollow string
	// Broken fails to create any task.
	Broken string
	// Stuck starts containers that never end.
	Stuck string
	// Chatty starts containers that write without end.
	Chatty string
}

// ErrNoCargo says that there is no Rust toolchain.
var ErrNoCargo = errors.New("cargo is missing: install Rust 1.95 or newer")

// Build returns the shims, building them when the cache has none for these
// sources. A test is skipped without a Rust toolchain; in CI (environment
// variable CI) it fails.
func Build(tb testing.TB) Paths {
	tb.Helper()
	paths, err := built()
	switch {
	case errors.Is(err, ErrNoCargo):
		needs.Missing(tb, "needs containerd shims made of Rust: %v", err)
	case err != nil:
		tb.Fatalf("building the test shims: %v", err)
	}
	return paths
}

// built runs one build per process, whichever test asks first.
var built = sync.OnceValues(func() (Paths, error) {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout+installTimeout)
	defer cancel()
	return Compile(ctx, os.Stderr)
})

// Compile is Build outside tests. What takes time is told to progress.
func Compile(ctx context.Context, progress io.Writer) (Paths, error) {
	source, err := sourceDir()
	if err != nil {
		return Paths{}, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return Paths{}, fmt.Errorf("finding the cache for shims: %w", err)
	}
	cache = filepath.Join(cache, "hearth", "shims")
	key, err := sourceKey(source)
	if err != nil {
		return Paths{}, err
	}
	paths := pathsIn(filepath.Join(cache, key))
	if paths.complete() {
		return paths, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Paths{}, fmt.Errorf("making the cache for shims: %w", err)
	}
	lock, err := slot.Lock(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return Paths{}, fmt.Errorf("waiting for another build of the shims: %w", err)
	}
	defer lock.Close()
	if paths.complete() { // another process was faster
		return paths, nil
	}
	installErr := run(ctx, installTimeout, source, nil, "sh", filepath.Join(source, "install-deps.sh"))
	cargo, err := exec.LookPath("cargo")
	if err != nil {
		return Paths{}, errors.Join(ErrNoCargo, installErr)
	}
	if installErr != nil {
		return Paths{}, installErr
	}
	begin := time.Now()
	fmt.Fprintf(progress, "shims: building with cargo; some ten minutes when nothing is cached\n")
	// Dependencies stay in the target directory for the next change of ours.
	target := filepath.Join(cache, "target")
	if err := run(ctx, buildTimeout, source, []string{"CARGO_TARGET_DIR=" + target}, cargo, "build", "--release", "--locked"); err != nil {
		return Paths{}, err
	}
	if err := publish(filepath.Join(target, "release"), paths); err != nil {
		return Paths{}, err
	}
	fmt.Fprintf(progress, "shims: built in %v\n", time.Since(begin).Round(time.Second))
	return paths, nil
}

func pathsIn(dir string) Paths {
	name := func(engine string) string { return filepath.Join(dir, "containerd-shim-"+engine+"-v1") }
	return Paths{
		Dir: dir, Wasmtime: name("wasmtime"), Hollow: name("hollow"), Broken: name("broken"),
		Stuck: name("stuck"), Chatty: name("chatty"),
	}
}

func (p Paths) all() []string {
	return []string{p.Wasmtime, p.Hollow, p.Broken, p.Stuck, p.Chatty}
}

func (p Paths) complete() bool {
	return !slices.ContainsFunc(p.all(), func(path string) bool {
		info, err := os.Stat(path)
		return err != nil || !info.Mode().IsRegular()
	})
}

// publish makes the directory of binaries appear at once and whole.
func publish(from string, to Paths) error {
	temporary, err := os.MkdirTemp(filepath.Dir(to.Dir), ".shims-")
	if err != nil {
		return fmt.Errorf("publishing the shims: %w", err)
	}
	defer os.RemoveAll(temporary)
	for _, path := range to.all() {
		data, err := os.ReadFile(filepath.Join(from, filepath.Base(path)))
		if err != nil {
			return fmt.Errorf("publishing the shims: %w", err)
		}
		if err := os.WriteFile(filepath.Join(temporary, filepath.Base(path)), data, 0o755); err != nil {
			return fmt.Errorf("publishing the shims: %w", err)
		}
	}
	if err := os.Chmod(temporary, 0o755); err != nil {
		return fmt.Errorf("publishing the shims: %w", err)
	}
	if err := os.RemoveAll(to.Dir); err != nil { // incomplete, or we would not be here
		return fmt.Errorf("publishing the shims: %w", err)
	}
	if err := os.Rename(temporary, to.Dir); err != nil {
		return fmt.Errorf("publishing the shims: %w", err)
	}
	return nil
}

// sourceDir is where this file was compiled from: the Cargo project.
func sourceDir() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", errors.New("finding the shims' sources: the program was built without file names")
	}
	dir := filepath.Dir(file)
	if _, err := os.Stat(filepath.Join(dir, "Cargo.lock")); err != nil {
		return "", fmt.Errorf("finding the shims' sources: %w (tests must not be built with -trimpath)", err)
	}
	return dir, nil
}

// sourceKey names a build: a hash of its inputs and the architecture.
func sourceKey(dir string) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.GOOS, runtime.GOARCH)
	files := []string{"Cargo.toml", "Cargo.lock"}
	err := filepath.WalkDir(filepath.Join(dir, "src"), func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && strings.HasSuffix(path, ".rs") {
			relative, _ := filepath.Rel(dir, path)
			files = append(files, relative)
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("hashing the shims' sources: %w", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return "", fmt.Errorf("hashing the shims' sources: %w", err)
		}
		fmt.Fprintln(sum, file, len(data))
		sum.Write(data)
	}
	return hex.EncodeToString(sum.Sum(nil))[:24], nil
}

func run(ctx context.Context, timeout time.Duration, dir string, env []string, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	command := exec.CommandContext(ctx, name, args...)
	command.Dir = dir
	command.Env = append(os.Environ(), env...)
	command.WaitDelay = 10 * time.Second
	if output, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("running %s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, output[max(0, len(output)-shown):])
	}
	return nil
}
