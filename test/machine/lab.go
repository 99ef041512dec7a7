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
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
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
	dir     string           // goes with the network
	cgroups *process.Cgroups // every process of the network is below
	place   *slot.Place      // held while the network lives
	slot    int              // its number
	root    string           // the machine image
	out     io.Writer

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
		if errors.Is(err, ErrCannotRun) {
			needs.Missing(tb, "%v", err)
		}
		tb.Fatal(err)
	}
	slot.EndWith(tb, n)
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
	if n.place, err = slot.Take(ctx, base, maxSlots, clean); err != nil {
		return nil, fmt.Errorf("finding a place for a network of test machines: %w", err)
	}
	n.slot, n.dir = n.place.Number, n.place.Dir
	if err := n.prepare(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// slotCgroups hold every process of a slot.
func slotCgroups(slot int) (*process.Cgroups, error) {
	return process.FindCgroups(fmt.Sprintf("hearthm%d", slot))
}

// clean ends and removes everything of a slot. The caller holds its lock.
func clean(ctx context.Context, slot int) error {
	g, err := slotCgroups(slot)
	if err != nil {
		return err
	}
	if err := g.Destroy(ctx); err != nil {
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
	var err error
	if n.cgroups, err = slotCgroups(n.slot); err != nil {
		return err
	}
	if err := n.place.Watch(n.cgroups); err != nil {
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
	n.place.Unwatch()
	if os.Getenv(KeepEnv) != "" {
		kept := filepath.Join(base, fmt.Sprintf("kept-%s-%d", time.Now().UTC().Format("20060102T150405.000"), n.slot))
		if n.cgroups != nil {
			errs = append(errs, n.cgroups.Destroy(ctx))
		}
		errs = append(errs, os.Rename(n.dir, kept))
		fmt.Fprintf(n.out, "machine: %s is set: the files are kept in %s\n", KeepEnv, kept)
	}
	if err := errors.Join(append(errs, clean(ctx, n.slot))...); err != nil {
		return errors.Join(fmt.Errorf("removing the test machines: %w", err), n.place.Release())
	}
	return n.place.Release()
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
