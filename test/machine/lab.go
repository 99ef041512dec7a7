package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

const (
	// KeepEnv, when set, keeps consoles and disks of machines and says where.
	KeepEnv = "HEARTH_KEEP_MACHINES"
	// base holds the networks of this machine, one directory per slot. Fixed, so
	// that leftovers are found whatever TMPDIR says, and on disk, because
	// container images are unpacked there.
	base = "/var/tmp/hearth-machines"
	// closeTimeout bounds stopping and cleaning.
	closeTimeout = 2 * time.Minute
)

// ErrCannotRun is what errors wrap when this machine cannot run others at all:
// not Linux, not root, or a program is missing.
var ErrCannotRun = errors.New("this machine cannot run test machines")

// Options of a network.
type Options struct {
	// Progress gets a line for what takes long. Making the machine image, which
	// takes minutes, is written to standard error when it is nil.
	Progress io.Writer
}

// Network is a bridge with machines on it. Its methods may be called at the
// same time.
type Network struct {
	dir  string // goes with the network
	slot int
	lock *os.File // held while the network lives
	root string   // the machine image
	out  io.Writer

	watchdog     *exec.Cmd
	watchdogPipe *os.File

	mu       sync.Mutex // guards machines
	machines []*Machine // in the order of their numbers, never shorter

	closeOnce sync.Once
	closeErr  error
}

// Start makes a network for one test and removes it with all its machines when
// the test ends. A machine that cannot run any (no root, a program missing)
// skips the test, but fails it where the environment variable CI is set. When
// the test failed, the end of every journal is part of its output.
func Start(tb testing.TB, options Options) *Network {
	tb.Helper()
	n, err := New(tb.Context(), options)
	if err != nil {
		if errors.Is(err, ErrCannotRun) && os.Getenv("CI") == "" {
			tb.Skip(err)
		}
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			var logs strings.Builder
			n.DumpLogs(&logs)
			tb.Log(logs.String())
		}
		if err := n.Close(); err != nil {
			tb.Error(err)
		}
	})
	return n
}

// Check says whether this machine can run others; its error wraps ErrCannotRun
// and says what to do.
func Check() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: it needs root for containers, mounts and loop devices; run the test with sudo", ErrCannotRun)
	}
	for _, name := range []string{"systemd-nspawn", "mmdebstrap", "ip", "nsenter", "unshare", "mkfs.ext4", "e2fsck", "losetup"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%w: %s is missing; run test/packaging/install-deps.sh", ErrCannotRun, name)
		}
	}
	return nil
}

// New makes a network without machines. Making the machine image on first use
// takes minutes and counts towards ctx. The caller calls Close.
func New(ctx context.Context, options Options) (*Network, error) {
	if err := Check(); err != nil {
		return nil, err
	}
	n := &Network{out: options.Progress}
	if n.out == nil {
		n.out = os.Stderr
	}
	var err error
	if n.root, err = Root(ctx, n.out); err != nil {
		return nil, err
	}
	if err := n.acquire(ctx); err != nil {
		return nil, err
	}
	if err := n.prepare(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// acquire takes the first free slot and cleans every slot whose process is
// gone: a lock is released by the kernel however its holder ended.
func (n *Network) acquire(ctx context.Context) error {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return err
	}
	for slot := range maxSlots {
		lock, err := tryLock(filepath.Join(base, fmt.Sprintf("%d.lock", slot)))
		if err != nil {
			return err
		}
		if lock == nil {
			continue // in use
		}
		dir := filepath.Join(base, fmt.Sprint(slot))
		if exists(dir) {
			if err := clean(ctx, slot); err != nil {
				lock.Close()
				return fmt.Errorf("cleaning what a killed test left: %w", err)
			}
		}
		if n.lock != nil {
			lock.Close()
			continue
		}
		n.lock, n.slot, n.dir = lock, slot, dir
	}
	if n.lock == nil {
		return fmt.Errorf("%d networks of test machines exist already; stop some", maxSlots)
	}
	return nil
}

func slotGroup(slot int) (*group, error) { return newGroup(fmt.Sprintf("hearthm%d", slot)) }

// clean ends and removes everything of a slot. The caller holds its lock.
func clean(ctx context.Context, slot int) error {
	g, err := slotGroup(slot)
	if err != nil {
		return err
	}
	if err := g.destroy(ctx); err != nil {
		return err
	}
	if err := removeLAN(ctx, slot); err != nil {
		return err
	}
	// With the last process of a machine its mounts are gone, and with them
	// their loop devices; only files are left.
	return os.RemoveAll(filepath.Join(base, fmt.Sprint(slot)))
}

func (n *Network) prepare(ctx context.Context) error {
	// The directory is what says that a slot needs cleaning: it comes first.
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	if err := n.startWatchdog(); err != nil {
		return err
	}
	return makeLAN(ctx, n.slot)
}

// Close ends every machine at once and removes what there was.
func (n *Network) Close() error {
	n.closeOnce.Do(func() { n.closeErr = n.close() })
	return n.closeErr
}

func (n *Network) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	for _, m := range n.all() {
		errs = append(errs, m.end(ctx))
	}
	n.stopWatchdog()
	if os.Getenv(KeepEnv) != "" {
		kept := filepath.Join(base, fmt.Sprintf("kept-%s-%d", time.Now().UTC().Format("20060102T150405.000"), n.slot))
		g, err := slotGroup(n.slot)
		if err == nil {
			err = errors.Join(g.destroy(ctx), os.Rename(n.dir, kept))
		}
		errs = append(errs, err)
		fmt.Fprintf(n.out, "machine: %s is set: the files are kept in %s\n", KeepEnv, kept)
	}
	if err := errors.Join(append(errs, clean(ctx, n.slot))...); err != nil {
		return errors.Join(fmt.Errorf("removing the test machines: %w", err), n.lock.Close())
	}
	return n.lock.Close()
}

func (n *Network) all() []*Machine {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*Machine(nil), n.machines...)
}

// HostIP is the address at which machines reach servers that a test opens on
// this machine.
func (n *Network) HostIP() string { return hostIP(n.slot) }

// Machine returns the machine of that name, or nil.
func (n *Network) Machine(name string) *Machine {
	for _, m := range n.all() {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// DumpLogs writes the end of every machine's journal, or of its console when
// it does not run.
func (n *Network) DumpLogs(w io.Writer) {
	for _, m := range n.all() {
		m.DumpLogs(w)
	}
}

// startWatchdog starts a process that outlives a killed test and ends what the
// test started: it reads from a pipe that only this process holds, and the
// kernel closes that however this process ends. What is left then (files,
// empty cgroups, names of namespaces) costs nothing and goes with the next
// network.
func (n *Network) startWatchdog() error {
	g, err := slotGroup(n.slot)
	if err != nil {
		return err
	}
	var script strings.Builder
	script.WriteString("read -r line || true\nfor round in 1 2 3 4 5 6 7 8 9 10; do\n\tliving=\n")
	for _, dir := range g.dirs {
		fmt.Fprintf(&script, "\tfor pid in $(find %s -name cgroup.procs -exec cat {} + 2>/dev/null); do living=$pid; kill -9 \"$pid\" 2>/dev/null || true; done\n", quote(dir))
	}
	script.WriteString("\t[ -n \"$living\" ] || exit 0\n\tsleep 0.2\ndone\n")
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	cmd := exec.Command("sh", "-c", script.String())
	cmd.Stdin = read
	// The slot's lock is held until this process has ended as well: it kills
	// whatever is in the slot's cgroups, which must not be the next network's.
	cmd.ExtraFiles = []*os.File{n.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		write.Close()
		return fmt.Errorf("starting the watchdog of the machines: %w", err)
	}
	n.watchdog, n.watchdogPipe = cmd, write
	return nil
}

func (n *Network) stopWatchdog() {
	if n.watchdog == nil {
		return
	}
	n.watchdogPipe.Close()
	_ = n.watchdog.Wait() // ends in ten short rounds at most
	n.watchdog = nil
}

// quote makes one word for the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// machineName is a DNS label, short enough for a host's name.
var machineName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`)

// Spec is a machine to be.
type Spec struct {
	// Name for the test's own use; the machine does not know it.
	Name string
	// UserData is what the instance was launched with.
	UserData string
	// Tags of the instance, all visible to itself (InstanceMetadataTags).
	Tags map[string]string
	// Configure changes what the metadata service says, after everything else
	// was filled in: identity by the machine's number, architecture of this
	// machine, on-demand, no role.
	Configure func(*imdstest.Config)
	// Binds are files and directories of this machine that the machine sees, read-only,
	// by their absolute path there. Programs are shared so, not copied.
	Binds map[string]string
	// Disk is the size in bytes of the machine's disk, an ext4 file system that
	// forgets on CutPower what it had not written. Zero means a directory of
	// this machine, which forgets nothing. Space is taken as it is used.
	Disk int64
}
