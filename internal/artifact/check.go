package artifact

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// State is what lies at an artifact's path.
type State string

// The states.
const (
	// StateMissing: nothing is there.
	StateMissing State = "missing"
	// StatePresent: the right file is there.
	StatePresent State = "present"
	// StateAttributes: the right bytes are there with another mode or owner.
	StateAttributes State = "attributes"
	// StateDiffers: something else is there, which Fetch replaces.
	StateDiffers State = "differs"
)

// Status is what Inspect finds about one artifact.
type Status struct {
	Artifact Artifact
	State    State
	// Reason says why the state is not StatePresent.
	Reason string
	// Size is that of what is there, in bytes.
	Size int64
	// Download is how many bytes Fetch would download: 0 when nothing, -1 when
	// their number is not known. Those kept from an earlier run, Resumable,
	// are not in it.
	Download, Resumable int64
	// CreateDirs are the directories that Fetch would make, outermost first.
	CreateDirs []string
	// Err is a *fault.Error when the state cannot be told.
	Err error
	// Duration is what looking took.
	Duration time.Duration
}

// Inspect says what Fetch would do, in the order of the artifacts, and touches
// nothing: no lock, no network, no file. The error joins those of the
// statuses, or says which artifacts are not well defined.
func (f *Fetcher) Inspect(ctx context.Context, artifacts []Artifact) ([]Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, f.o.Timeout, errTimeout)
	defer cancel()
	if err := f.validate(artifacts); err != nil {
		return nil, err
	}
	state := stateDir{path: f.o.StateDir}
	statuses := make([]Status, len(artifacts))
	f.forEach(len(artifacts), checkParallel, func(i int) {
		began := time.Now()
		a := &artifacts[i]
		c := f.check(ctx, a, nil)
		s := Status{Artifact: *a, State: c.state, Reason: c.reason, Size: c.size, Err: c.err}
		if s.Err == nil && (s.State == StateMissing || s.State == StateDiffers) {
			_, s.CreateDirs = existingParent(filepath.Dir(a.Path))
			s.Download = -1
			if part, err := openPart(state.partPath(a)); err == nil {
				if info, err := part.Stat(); err == nil {
					s.Resumable = info.Size()
				}
				_ = part.Close()
			}
			if a.Size > 0 {
				s.Resumable = min(s.Resumable, a.Size)
				s.Download = a.Size - s.Resumable
			}
		}
		s.Duration = time.Since(began)
		statuses[i] = s
	})
	var errs []error
	for i := range statuses {
		if statuses[i].Err != nil {
			errs = append(errs, statuses[i].Err)
		}
	}
	return statuses, errors.Join(errs...)
}

// check is what was found at an artifact's path.
type check struct {
	state  State
	reason string
	size   int64
	err    error
}

// check looks at an artifact's path. A file is right when its bytes hash to
// what they must, whatever anything else on the machine says about it.
func (f *Fetcher) check(ctx context.Context, a *Artifact, t *tracker) check {
	c, err := inspectFile(ctx, a, t)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return check{state: StateMissing, reason: "there is no such file"}
	case err != nil && ctx.Err() != nil:
		c.err = timedOut(ctx, a, "hashing "+a.Path)
	case err != nil:
		c.err = diskFault(err, "read %s", a.Path)
	}
	return c
}

func inspectFile(ctx context.Context, a *Artifact, t *tracker) (check, error) {
	// Looked at before it is opened: opening a device may have effects.
	info, err := os.Lstat(a.Path)
	if err != nil {
		return check{}, err
	}
	switch {
	case info.IsDir():
		return check{}, &fs.PathError{Op: "install", Path: a.Path, Err: unix.EISDIR}
	case info.Mode()&fs.ModeSymlink != 0:
		return check{state: StateDiffers, reason: "a symbolic link is in its place"}, nil
	case !info.Mode().IsRegular():
		return check{state: StateDiffers, reason: "it is not a regular file"}, nil
	}
	c := check{size: info.Size()}
	if want := a.installedSize(); want > 0 && c.size != want {
		c.state, c.reason = StateDiffers, "its size differs"
		return c, nil
	}
	file, err := os.OpenFile(a.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return c, err
	}
	defer file.Close()
	if info, err = file.Stat(); err != nil {
		return c, err
	}
	if !info.Mode().IsRegular() {
		return c, &fs.PathError{Op: "read", Path: a.Path, Err: errors.New("it changes while it is looked at")}
	}
	willNeed(file, info.Size())
	hash := sha256.New()
	if c.size, err = copyBuffered(ctx, hash, file, func(n int64) { t.bytes(n, info.Size()) }); err != nil {
		return c, err
	}
	if sum := Digest(hash.Sum(nil)); sum != a.installedSHA256() {
		c.state, c.reason = StateDiffers, "its digest is "+sum.String()
		return c, nil
	}
	switch {
	case info.Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != a.mode():
		c.state, c.reason = StateAttributes, "its mode is "+Mode(info.Mode().Perm()).String()
	case !ownedByUs(info):
		c.state, c.reason = StateAttributes, "its owner is another user"
	default:
		c.state = StatePresent
	}
	return c, nil
}

func ownedByUs(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return !ok || int(st.Uid) == os.Geteuid()
}

// repair gives a file with the right bytes its mode and owner.
func repair(a *Artifact, c check) error {
	file, err := os.OpenFile(a.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return diskFault(err, "open %s", a.Path)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return diskFault(err, "look at %s", a.Path)
	}
	if !info.Mode().IsRegular() || info.Size() != c.size {
		return fault.New(CodeDisk, nil, "see what else writes it, then run again", "%s changes while it is looked at", a.Path)
	}
	if !ownedByUs(info) {
		if err := file.Chown(os.Geteuid(), os.Getegid()); err != nil {
			return diskFault(err, "set the owner of %s", a.Path)
		}
	}
	// After the owner: changing that clears mode bits.
	if err := errors.Join(file.Chmod(a.mode()), file.Sync()); err != nil {
		return diskFault(err, "set the mode of %s", a.Path)
	}
	return nil
}

// copyBuffered copies until the end of the source with a buffer of the pool,
// looking at the context for each.
func copyBuffered(ctx context.Context, to io.Writer, from io.Reader, progress func(int64)) (int64, error) {
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	var total int64
	for {
		if err := context.Cause(ctx); err != nil {
			return total, err
		}
		n, err := from.Read(b[:])
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return total, err
			}
			total += int64(n)
			if progress != nil {
				progress(total)
			}
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// timedOut is the failure of whatever was being done when the context ended.
func timedOut(ctx context.Context, a *Artifact, doing string) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, context.Canceled) {
		return fault.Passing(CodeInterrupted, cause, "run again, it goes on where it stopped", "%s was interrupted while %s", a, doing)
	}
	return fault.Passing(CodeTimeout, cause, "run again, it goes on where it stopped; allow more time if the network is slow", "%s was not finished while %s", a, doing)
}
