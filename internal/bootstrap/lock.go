package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// CodeBusy: another run is under way on this machine.
const CodeBusy fault.Code = "bootstrap-busy"

// lockFile is the lock's name in the state directory.
const lockFile = "lock"

// lock keeps runs from each other; the kernel releases it when the process
// ends, however it does.
func lock(dir string) (release func(), err error) {
	// A reset removes the lock that it holds: who waited in between has locked
	// a file that nobody else will find, and tries again.
	const tries = 3
	for range tries {
		f, err := tryLock(dir)
		if err != nil {
			return nil, err
		}
		held, err := f.Stat()
		if err == nil {
			var there os.FileInfo
			if there, err = os.Stat(f.Name()); err == nil && os.SameFile(held, there) {
				sweep(dir)
				return func() { _ = f.Close() }, nil
			}
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
	return nil, busy()
}

// unfinished are the names of files that renameio was writing for us.
var unfinished = regexp.MustCompile(`^\.(` + regexp.QuoteMeta(resultFile) + `|` + regexp.QuoteMeta(electionFile) + `|` + regexp.QuoteMeta(attemptsFile) + `)[0-9]+$`)

// sweep removes what runs that lost power were writing. Nobody writes while the
// lock is held; what cannot be removed does no harm.
func sweep(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.Type().IsRegular() && unfinished.MatchString(e.Name()) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

func busy() error {
	return fault.New(CodeBusy, nil, "`bootstrap status` shows how far it is", "another bootstrap runs on this machine")
}

func tryLock(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fault.New("host-write-failed", err, "see whether the file system is writable", "make %s", dir)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.New("host-write-failed", err, "bootstrap runs as root; see whether the file system is writable", "open the lock in %s", dir)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, busy()
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}
