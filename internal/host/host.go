package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options say which machine.
type Options struct {
	// Root is the directory all paths are below. Default: "/".
	Root string
	// Ledger is where the ledger is, below Root. Default: DefaultLedger.
	Ledger string
	// Modprobe is the program that loads kernel modules; nothing below Root.
	// Default: modprobe in PATH or /sbin.
	Modprobe string
}

// Host is a machine. It is safe for concurrent use; but two Hosts with the same
// root would overwrite each other's ledger, so one bootstrap at a time is the
// caller's business.
type Host struct {
	// mu makes reading, changing and writing the ledger one step: downloads
	// that run in parallel are recorded in parallel.
	mu   sync.Mutex
	o    Options
	tree tree
	// What cannot be read from files; tests put their own in.
	now     func() time.Time
	getuid  func() int
	uname   func() (machine, release string, err error)
	statfs  func(path string) (unix.Statfs_t, error)
	adjtime func() (unsynchronized bool, err error)
	load    loader
}

// New returns the machine below a root directory. It touches nothing.
func New(o Options) (*Host, error) {
	if o.Root == "" {
		o.Root = "/"
	}
	if !filepath.IsAbs(o.Root) {
		return nil, fmt.Errorf("the root directory %q is not absolute", o.Root)
	}
	if o.Ledger == "" {
		o.Ledger = DefaultLedger
	}
	if !usable(o.Ledger) {
		return nil, fmt.Errorf("the path %q of the ledger is not absolute and clean", o.Ledger)
	}
	h := &Host{o: o, tree: tree{o.Root}, now: time.Now, getuid: os.Geteuid, uname: uname, adjtime: adjtime}
	h.statfs = h.statfsBelow
	h.load = h.modprobe
	return h, nil
}

// Root is the directory all paths are below.
func (h *Host) Root() string { return h.o.Root }

func uname() (machine, release string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", err
	}
	return unix.ByteSliceToString(u.Machine[:]), unix.ByteSliceToString(u.Release[:]), nil
}

// statfsBelow asks about the file system that a path is on, or will be on.
func (h *Host) statfsBelow(name string) (st unix.Statfs_t, err error) {
	for name = clean(name); ; name = filepath.Dir(name) {
		f, err := h.tree.open(name, unix.O_PATH, 0)
		if missing(err) && name != "/" {
			continue
		}
		if err != nil {
			return st, err
		}
		err = unix.Fstatfs(int(f.Fd()), &st)
		return st, errors.Join(err, f.Close())
	}
}

// adjtime asks the kernel's clock discipline whether anybody steers it. It is
// where timedated's NTPSynchronized comes from, too, so that needs no asking.
func adjtime() (unsynchronized bool, err error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return false, err
	}
	const timeError = 5 // TIME_ERROR of adjtimex(2)
	return state == timeError || t.Status&unix.STA_UNSYNC != 0, nil
}
