// Package slot gives what tests run on this machine (clusters, networks of
// machines) one of a few places each, and empties a place whose test was
// killed. A place is a number, a directory, a lock on it and a subtree of
// cgroups; what else bears its number (links, namespaces) its user cleans.
package slot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hearth-sh/hearth/test/process"
)

// Place is one that this process holds until Release.
type Place struct {
	// Number is from 0.
	Number int
	// Dir is the place's directory, which does not exist yet. It is what says
	// that a place needs cleaning: make it before all else.
	Dir string

	lock         *os.File
	watchdog     *exec.Cmd
	watchdogPipe *os.File
}

// ErrNoneFree is what Take's error wraps when every place is in use.
var ErrNoneFree = errors.New("no place is free")

// Take takes the first free place of most below base, and cleans every one
// whose process is gone: a lock is released by the kernel however its holder
// ended. clean must end what a place has and remove its directory.
func Take(ctx context.Context, base string, most int, clean func(ctx context.Context, number int) error) (*Place, error) {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, err
	}
	var taken *Place
	for number := range most {
		lock, err := TryLock(filepath.Join(base, fmt.Sprintf("%d.lock", number)))
		if err != nil {
			return nil, errors.Join(err, taken.Release())
		}
		if lock == nil {
			continue // in use
		}
		dir := filepath.Join(base, fmt.Sprint(number))
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			if err := clean(ctx, number); err != nil {
				lock.Close()
				return nil, errors.Join(fmt.Errorf("cleaning what a killed test left: %w", err), taken.Release())
			}
		}
		if taken != nil {
			lock.Close()
			continue
		}
		taken = &Place{Number: number, Dir: dir, lock: lock}
	}
	if taken == nil {
		return nil, fmt.Errorf("%w: all %d below %s are in use", ErrNoneFree, most, base)
	}
	return taken, nil
}

// Release gives the place back, with what is still in it. Nil has nothing to
// give back.
func (p *Place) Release() error {
	if p == nil {
		return nil
	}
	return p.lock.Close()
}

// EndWith closes what runs in a place when the test ends. When the test failed,
// the end of every log is part of its output.
func EndWith(tb testing.TB, running interface {
	DumpLogs(w io.Writer)
	Close() error
}) {
	tb.Helper()
	tb.Cleanup(func() {
		if tb.Failed() {
			var logs strings.Builder
			running.DumpLogs(&logs)
			tb.Log(logs.String())
		}
		if err := running.Close(); err != nil {
			tb.Error(err)
		}
	})
}

// Watch starts a process that outlives a killed test and ends what the test
// started in the cgroups: it reads from a pipe that only this process holds,
// and the kernel closes that however this process ends. What is left then
// (files, empty cgroups, names of namespaces) costs nothing and goes with the
// next Take.
func (p *Place) Watch(groups *process.Cgroups) error {
	var script strings.Builder
	script.WriteString("read -r line || true\nfor round in 1 2 3 4 5 6 7 8 9 10; do\n\tliving=\n")
	for _, dir := range groups.Dirs() {
		fmt.Fprintf(&script, "\tfor pid in $(find %s -name cgroup.procs -exec cat {} + 2>/dev/null); do living=$pid; kill -9 \"$pid\" 2>/dev/null || true; done\n", process.Quote(dir))
	}
	script.WriteString("\t[ -n \"$living\" ] || exit 0\n\tsleep 0.2\ndone\n")
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	cmd := exec.Command("sh", "-c", script.String())
	cmd.Stdin = read
	// The lock is held until this process has ended as well: it kills whatever
	// is in the place's cgroups, which must not be the next holder's.
	cmd.ExtraFiles = []*os.File{p.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		write.Close()
		return fmt.Errorf("starting the watchdog of a test: %w", err)
	}
	p.watchdog, p.watchdogPipe = cmd, write
	return nil
}

// Unwatch ends the watchdog. Without one it does nothing.
func (p *Place) Unwatch() {
	if p.watchdog == nil {
		return
	}
	p.watchdogPipe.Close()
	_ = p.watchdog.Wait() // finds nothing and ends; ten short rounds at most
	p.watchdog = nil
}
