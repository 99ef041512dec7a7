package host

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// maxFile bounds what is read of a configuration file. Artifacts, which are
	// larger, are only hashed.
	maxFile = 4 << 20
	// temporaryMark is in the names of files that are being written. They start
	// with a dot, so no reader of a drop-in directory takes them for its own.
	temporaryMark = ".hearth-"
	// maxNames bounds how many names of a directory are looked at for leftovers.
	maxNames = 1 << 16
)

// tree is a file system below a root directory. Every path is looked up by the
// kernel with the root as the limit, as chroot does: absolute symbolic links
// and ".." lead back to the root and never out of it (openat2, Linux 5.6).
type tree struct{ root string }

// missing says that a path or one of its parents is not there.
func missing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// clean makes a path absolute within the tree.
func clean(name string) string { return path.Clean("/" + name) }

func (t tree) open(name string, flags int, mode uint32) (*os.File, error) {
	root, err := unix.Open(t.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: t.root, Err: err}
	}
	defer unix.Close(root)
	how := &unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Mode: uint64(mode), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		// EAGAIN: something was renamed during the lookup, so that the kernel
		// cannot vouch for it. EINTR: Go's preemption signal.
		fd, err := unix.Openat2(root, clean(name), how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: clean(name), Err: err}
		}
		return os.NewFile(uintptr(fd), clean(name)), nil
	}
}

// dir opens a directory for use with the *at system calls.
func (t tree) dir(name string) (*os.File, error) {
	return t.open(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// makeDirs creates a directory and its parents, durably, and returns those it
// created, parents first. The last one gets the mode, parents 0755.
func (t tree) makeDirs(name string, mode fs.FileMode) (created []string, err error) {
	name = clean(name)
	current, err := t.dir("/")
	if err != nil {
		return nil, err
	}
	defer func() { _ = current.Close() }()
	var at string
	parts := strings.Split(strings.Trim(name, "/"), "/")
	for i, part := range parts {
		if part == "" {
			break
		}
		at += "/" + part
		next, err := t.dir(at)
		if missing(err) {
			perm := fs.FileMode(0o755)
			if i == len(parts)-1 {
				perm = mode
			}
			// Within the opened parent: what a link leads to stays in the root.
			err = unix.Mkdirat(int(current.Fd()), part, uint32(perm))
			if err == nil {
				// The mode again, past the umask; and the name durable.
				err = errors.Join(unix.Fchmodat(int(current.Fd()), part, uint32(perm), 0), current.Sync())
				created = append(created, at)
			} else if errors.Is(err, unix.EEXIST) {
				err = nil // somebody else was faster, or a dangling link: the next open tells
			}
			if err != nil {
				return created, &fs.PathError{Op: "mkdir", Path: at, Err: err}
			}
			next, err = t.dir(at)
			if err != nil {
				return created, err
			}
		} else if err != nil {
			return created, err
		}
		_ = current.Close()
		current = next
	}
	return created, nil
}

// state is what is at a path now. The zero value is nothing.
type state struct {
	exists bool
	mode   fs.FileMode
	uid    int
	gid    int
	// sha256 is of the content, or of the target of a symbolic link with
	// "symlink:" before it, in hex.
	sha256 string
	// content is what was read, if it was asked for and is not too long.
	content []byte
	whole   bool
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// look reads what is at a path. It does not follow a link in the last place.
func (t tree) look(name string) (state, error) {
	dir, err := t.dir(path.Dir(clean(name)))
	if missing(err) {
		return state{}, nil
	}
	if err != nil {
		return state{}, err
	}
	defer dir.Close()
	base := path.Base(clean(name))
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); missing(err) {
		return state{}, nil
	} else if err != nil {
		return state{}, &fs.PathError{Op: "stat", Path: clean(name), Err: err}
	}
	s := state{exists: true, mode: fs.FileMode(st.Mode & 0o7777), uid: int(st.Uid), gid: int(st.Gid)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(dir.Fd()), base, buf)
		if err != nil {
			return state{}, &fs.PathError{Op: "readlink", Path: clean(name), Err: err}
		}
		s.mode |= fs.ModeSymlink
		s.sha256 = digest(append([]byte("symlink:"), buf[:n]...))
		return s, nil
	case unix.S_IFDIR:
		s.mode |= fs.ModeDir
		return s, nil
	default:
		s.mode |= fs.ModeIrregular
		return s, nil
	}
	// Opened after stat: a device that was put there meanwhile would block or act.
	fd, err := unix.Openat(int(dir.Fd()), base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return state{}, &fs.PathError{Op: "open", Path: clean(name), Err: err}
	}
	f := os.NewFile(uintptr(fd), clean(name))
	defer f.Close()
	hash := sha256.New()
	head, err := io.ReadAll(io.LimitReader(io.TeeReader(f, hash), maxFile))
	if err == nil {
		_, err = io.Copy(hash, f)
	}
	if err != nil {
		return state{}, err
	}
	s.sha256 = hex.EncodeToString(hash.Sum(nil))
	s.content, s.whole = head, st.Size <= maxFile
	return s, nil
}

// read returns a small file of the tree, following links within it.
func (t tree) read(name string) ([]byte, error) {
	f, err := t.open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is longer than %d bytes", clean(name), maxFile)
	}
	return b, err
}

// exists says whether a path leads to something.
func (t tree) exists(name string) bool {
	f, err := t.open(name, unix.O_PATH, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// isDir says whether a path leads to a directory.
func (t tree) isDir(name string) bool {
	f, err := t.open(name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// write replaces a file: after a loss of power there is the old content or the
// new one. Its directory must exist.
func (t tree) write(name string, content []byte, mode fs.FileMode, owner *Owner) (err error) {
	dir, err := t.dir(path.Dir(clean(name)))
	if err != nil {
		return err
	}
	defer dir.Close()
	base := path.Base(clean(name))
	sweep(dir, base)
	temp := "." + base + temporaryMark + rand.Text()
	fd, err := unix.Openat(int(dir.Fd()), temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "create", Path: clean(name), Err: err}
	}
	f := os.NewFile(uintptr(fd), clean(name))
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = unix.Unlinkat(int(dir.Fd()), temp, 0)
		}
	}()
	if _, err = f.Write(content); err != nil {
		return err
	}
	if owner != nil {
		// Before the mode: changing the owner clears set-user-ID.
		if err = f.Chown(owner.UID, owner.GID); err != nil {
			return err
		}
	}
	if err = unix.Fchmod(fd, uint32(mode.Perm())); err != nil {
		return &fs.PathError{Op: "chmod", Path: clean(name), Err: err}
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = unix.Renameat(int(dir.Fd()), temp, int(dir.Fd()), base); err != nil {
		return &fs.PathError{Op: "rename", Path: clean(name), Err: err}
	}
	return dir.Sync()
}

// sweep removes what a run that died left of writing this file.
func sweep(dir *os.File, base string) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return
	}
	names, _ := dir.Readdirnames(maxNames) // leftovers are harmless
	for _, name := range names {
		if strings.HasPrefix(name, "."+base+temporaryMark) {
			_ = unix.Unlinkat(int(dir.Fd()), name, 0)
		}
	}
}

// keep gives what is at a path a second name, in the same directory, unless
// that name is taken. Content, mode and owner stay as they are, because it is
// the same file.
func (t tree) keep(name, as string) error {
	dir, err := t.dir(path.Dir(clean(name)))
	if err != nil {
		return err
	}
	defer dir.Close()
	err = unix.Linkat(int(dir.Fd()), path.Base(clean(name)), int(dir.Fd()), path.Base(clean(as)), 0)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return &fs.PathError{Op: "link", Path: clean(as), Err: err}
	}
	return dir.Sync()
}

// rename moves a file within its directory.
func (t tree) rename(from, to string) error {
	dir, err := t.dir(path.Dir(clean(from)))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Renameat(int(dir.Fd()), path.Base(clean(from)), int(dir.Fd()), path.Base(clean(to))); err != nil {
		return &fs.PathError{Op: "rename", Path: clean(from), Err: err}
	}
	return dir.Sync()
}

// remove removes a file; one that is not there is removed already.
func (t tree) remove(name string) error { return t.unlink(name, 0) }

// removeDir removes a directory if it is empty, and says whether it is gone.
func (t tree) removeDir(name string) (bool, error) {
	err := t.unlink(name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return false, nil
	}
	return err == nil, err
}

func (t tree) unlink(name string, flags int) error {
	dir, err := t.dir(path.Dir(clean(name)))
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	err = unix.Unlinkat(int(dir.Fd()), path.Base(clean(name)), flags)
	if missing(err) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "remove", Path: clean(name), Err: err}
	}
	return dir.Sync()
}

// classify gives a failure to write its code.
func classify(err error, doing, name string) error {
	var classified *fault.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &classified):
		return err
	case errors.Is(err, unix.EROFS):
		return fault.New(CodeReadOnly, err, remedyReadOnly, "%s %s is not possible on a read-only file system", doing, name)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.New(CodeNoSpace, err, remedyNoSpace, "%s %s failed for lack of space", doing, name)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault.New(CodeWriteFailed, err, "run it as root; if it was root, look at `lsattr` and at the security module's log", "%s %s was refused", doing, name)
	case errors.Is(err, unix.ENOSYS):
		return fault.New(CodeKernelTooOld, err, remedyKernel, "%s %s needs openat2, which this kernel lacks", doing, name)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP):
		return fault.New(CodePathConflict, err, "move what is there away and run bootstrap again", "%s %s is not possible because of what is there", doing, name)
	}
	return fault.New(CodeWriteFailed, err, "see dmesg for errors of the disk, and run bootstrap again", "%s %s failed", doing, name)
}
