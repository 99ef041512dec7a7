package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// orphanDeadline bounds waiting for killed processes to be gone.
const orphanDeadline = 5 * time.Second

// ourContainer matches the identifiers that newID makes.
var ourContainer = regexp.MustCompile(`^(probe|warm)-[0-9a-f]{16}$`)

// killOrphans ends the processes of containers of ours that containerd has
// forgotten. It is called with the lock held and after every container was
// removed, so none of them is in use.
//
// runwasi's shims implement no Pids call, which containerd makes when it
// starts and finds shims: it then takes a running container for leaked, fails
// to delete it because it runs, and drops it with its shim still alive
// (containerd 2.4, core/runtime/v2; "cleaning leaked shim process" in its log).
//
// Only processes of our own PID namespace are seen: in a pod this needs
// hostPID.
func (c *Containerd) killOrphans(ctx context.Context) error {
	paths, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return fmt.Errorf("looking for forgotten shims: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, orphanDeadline)
	defer cancel()
	var errs []error
	for _, path := range paths {
		if pid, err := strconv.Atoi(filepath.Base(path)); err == nil && c.isOrphan(path) {
			errs = append(errs, c.killOrphan(ctx, pid, path))
		}
	}
	return errors.Join(errs...)
}

// isOrphan recognises a shim of ours, on this containerd, by the arguments that
// containerd gives every shim; processes a shim forks keep them.
func (c *Containerd) isOrphan(process string) bool {
	command, err := os.ReadFile(filepath.Join(process, "cmdline"))
	if err != nil {
		return false // it ended, or is none
	}
	arguments := bytes.Split(command, []byte{0})
	if !shimBinary.Match([]byte(filepath.Base(string(arguments[0])))) {
		return false
	}
	after := func(flag string) string {
		for i, argument := range arguments[:len(arguments)-1] {
			if string(argument) == flag {
				return string(arguments[i+1])
			}
		}
		return ""
	}
	id := after("-id")
	return after("-address") == c.options.Address && ourContainer.MatchString(id) && c.remembers(id)
}

// createdDir has a file for each container of ours that may still have a
// process. Sockets have the same path on every node, and several nodes may
// share a PID namespace (nested ones, tests): only what this node's own
// directory names is ours to kill.
func (c *Containerd) createdDir() string { return filepath.Join(c.options.StateDir, "created") }

func (c *Containerd) remember(id string) error {
	if err := os.MkdirAll(c.createdDir(), 0o700); err != nil {
		return fmt.Errorf("remembering container %s: %w", id, err)
	}
	if err := os.WriteFile(filepath.Join(c.createdDir(), id), nil, 0o600); err != nil {
		return fmt.Errorf("remembering container %s: %w", id, err)
	}
	return nil
}

// forget is for a container that is gone. A file that stays costs nothing: no
// process will ever bear that name.
func (c *Containerd) forget(id string) { _ = os.Remove(filepath.Join(c.createdDir(), id)) }

func (c *Containerd) remembers(id string) bool {
	_, err := os.Lstat(filepath.Join(c.createdDir(), id))
	return err == nil
}

// killOrphan kills a process and waits until it is gone. The descriptor makes
// sure that it is the one that was looked at, not a later one of its number.
func (c *Containerd) killOrphan(ctx context.Context, pid int, process string) error {
	descriptor, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening forgotten shim %d: %w", pid, err)
	}
	defer unix.Close(descriptor)
	if !c.isOrphan(process) {
		return nil
	}
	if err := unix.PidfdSendSignal(descriptor, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing forgotten shim %d: %w", pid, err)
	}
	c.log.InfoContext(ctx, "killed a shim that containerd had forgotten", "pid", pid)
	for c.isOrphan(process) {
		if err := pause(ctx, pollInterval); err != nil {
			return fmt.Errorf("waiting for forgotten shim %d to end: %w", pid, err)
		}
	}
	return nil
}
