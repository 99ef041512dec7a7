package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// UnavailableError says which layers the kernel could not give although the
// policy requires them.
type UnavailableError struct {
	// Missing names them: "no_new_privs", "seccomp", "landlock".
	Missing []string
	// Notes are those of Applied.
	Notes []string
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("this kernel cannot sandbox a process fully (missing: %s); Linux 5.13 or newer with seccomp and Landlock enabled can: %s",
		strings.Join(e.Missing, ", "), strings.Join(e.Notes, "; "))
}

// Missing names the layers that are not in force, in the words of
// UnavailableError.
func (a Applied) Missing() []string {
	var missing []string
	if !a.NoNewPrivs {
		missing = append(missing, "no_new_privs")
	}
	if !a.Seccomp {
		missing = append(missing, "seccomp")
	}
	if a.LandlockABI == 0 {
		missing = append(missing, "landlock")
	}
	return missing
}

// Enter applies p to every thread of the process, for good. It returns an
// error when a layer exists but could not be applied (the process should then
// exit: it may be half restricted), and an *UnavailableError when p.Require is
// set and a layer does not exist. A layer that does not exist is otherwise
// only missing from Applied.
//
// Open what the process needs besides the policy's paths before Enter; files,
// listeners and pipes that are open stay usable.
func Enter(p Policy) (Applied, error) {
	var a Applied
	if err := setLimits(p); err != nil {
		return a, err
	}
	// Not dumpable: processes of the same account cannot attach to this one
	// or open its memory through /proc, and it leaves no core.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return a, fmt.Errorf("make the process undumpable: %w", err)
	}
	if err := ll.AllThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		a.Notes = append(a.Notes, fmt.Sprintf("no_new_privs could not be set: %v", err))
	} else {
		a.NoNewPrivs = true
	}
	if err := enterLandlock(p, &a); err != nil {
		return a, err
	}
	if err := enterSeccomp(p, &a); err != nil {
		return a, err
	}
	if missing := a.Missing(); p.Require && len(missing) > 0 {
		return a, &UnavailableError{Missing: missing, Notes: a.Notes}
	}
	return a, nil
}

// setLimits lowers soft and hard limits alike, so that they cannot be raised
// again without privileges.
func setLimits(p Policy) error {
	for _, l := range []struct {
		resource int
		name     string
		value    uint64
		set      bool
	}{
		// A core file would put a tenant's memory on the disk.
		{unix.RLIMIT_CORE, "core file size", 0, true},
		{unix.RLIMIT_CPU, "cpu time", p.MaxCPUSeconds, p.MaxCPUSeconds > 0},
		{unix.RLIMIT_AS, "address space", p.MaxAddressSpaceBytes, p.MaxAddressSpaceBytes > 0},
		{unix.RLIMIT_NOFILE, "open files", p.MaxOpenFiles, p.MaxOpenFiles > 0},
		{unix.RLIMIT_FSIZE, "file size", p.MaxFileSizeBytes, p.MaxFileSizeBytes > 0},
	} {
		if !l.set {
			continue
		}
		var old unix.Rlimit
		if err := unix.Getrlimit(l.resource, &old); err != nil {
			return fmt.Errorf("read the limit of %s: %w", l.name, err)
		}
		value := min(l.value, old.Max)
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("set the limit of %s to %d: %w", l.name, value, err)
		}
	}
	return nil
}

// landlockVersionFlag asks landlock_create_ruleset for the kernel's ABI
// version (linux/landlock.h, LANDLOCK_CREATE_RULESET_VERSION).
const landlockVersionFlag = 1

func landlockABI() (int, error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, landlockVersionFlag)
	if errno != 0 {
		return 0, errno
	}
	return int(version), nil
}

func enterLandlock(p Policy, a *Applied) error {
	var rules []landlock.Rule
	for _, r := range []struct {
		paths           []string
		file, directory func(...string) landlock.FSRule
	}{
		{p.ReadOnly, landlock.ROFiles, landlock.RODirs},
		{p.ReadWrite, landlock.RWFiles, landlock.RWDirs},
	} {
		for _, path := range r.paths {
			info, err := os.Stat(path)
			switch {
			case err != nil:
				return fmt.Errorf("resolve a path of the sandbox's policy: %w", err)
			case info.IsDir():
				rules = append(rules, r.directory(path))
			default:
				rules = append(rules, r.file(path))
			}
		}
	}
	abi, err := landlockABI()
	if err != nil {
		a.Notes = append(a.Notes, fmt.Sprintf("the kernel has no Landlock, so open paths are not confined: %v", err))
		return nil
	}
	// Best effort is about kernels that know fewer rights; what they know is
	// enforced, and LandlockABI says how much that is. Besides paths this
	// takes TCP, and signals and abstract sockets to processes outside.
	if err := landlock.V9.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("confine paths with Landlock: %w", err)
	}
	a.LandlockABI = abi
	return nil
}

func enterSeccomp(p Policy, a *Applied) error {
	raw, err := bpf.Assemble(seccompProgram(p, uint32(os.Getpid())))
	if err != nil {
		return fmt.Errorf("assemble the seccomp filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	// The calling thread must itself have no_new_privs; TSYNC then gives both
	// that and the filter to all others, or fails as a whole.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	switch {
	case errors.Is(errno, unix.ENOSYS), errors.Is(errno, unix.EINVAL):
		// Old kernels, kernels built without it, and user-mode emulation.
		a.Notes = append(a.Notes, fmt.Sprintf("the kernel has no seccomp filters, so system calls are not confined: %v", errno))
		return nil
	case errno != 0:
		return fmt.Errorf("install the seccomp filter: %w", errno)
	case thread != 0:
		return fmt.Errorf("install the seccomp filter: thread %d has another one", thread)
	}
	a.Seccomp = true
	return nil
}
