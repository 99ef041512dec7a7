package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	lockName      = "lock"
	downloadsName = "downloads"
	manifestsName = "manifests"

	// partSuffix ends the name of a download that is not verified yet, and
	// tempSuffix that of an unpacked file; both have mode 0600.
	tempPrefix = ".hearth-"
	partSuffix = ".part"
	tempSuffix = ".tmp"

	maxRecordBytes = 16 << 10
)

// tempName matches the names of unfinished files; nothing else is ever removed.
var tempName = regexp.MustCompile(`^\.hearth-([0-9a-f]{32})\.(part|tmp)$`)

// key names the unfinished files of an artifact: the same bytes for the same
// place have the same key in every run.
func key(a *Artifact) string {
	h := sha256.New()
	_, _ = h.Write(a.SHA256[:])
	_, _ = h.Write([]byte(a.Path))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// stateDir is the directory of Options.StateDir while this process holds its
// lock, or reads only.
type stateDir struct {
	path     string
	readOnly bool
	lock     *os.File
	log      func(msg string, args ...any)
}

// openState makes the directory and locks it. The lock belongs to an open
// file, so that no way of dying leaves it behind.
func (f *Fetcher) openState(ctx context.Context) (*stateDir, error) {
	s := &stateDir{path: f.o.StateDir, log: f.log.Warn}
	for _, dir := range []string{s.path, filepath.Join(s.path, downloadsName), filepath.Join(s.path, manifestsName)} {
		if _, err := makeDirs(dir, 0o700); err != nil {
			return nil, err
		}
	}
	lock, err := os.OpenFile(filepath.Join(s.path, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, diskFault(err, "open the lock in %s", s.path)
	}
	deadline := time.NewTimer(lockWait)
	defer deadline.Stop()
	poll := time.NewTicker(lockPoll)
	defer poll.Stop()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			s.lock = lock
			return s, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = lock.Close()
			return nil, diskFault(err, "lock %s", s.path)
		}
		select {
		case <-poll.C:
			continue
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-deadline.C:
			err = nil
		}
		_ = lock.Close()
		return nil, fault.Passing(CodeBusy, err, "wait until it has ended, then run again", "another run is installing artifacts and holds %s", filepath.Join(s.path, lockName))
	}
}

func (s *stateDir) close() {
	if s.lock != nil {
		_ = s.lock.Close()
	}
}

// partPath is where the bytes of a download are kept: beside the destination
// if they are what is installed, else with the state.
func (s *stateDir) partPath(a *Artifact) string {
	if a.Format.raw() {
		return filepath.Join(filepath.Dir(a.Path), tempPrefix+key(a)+partSuffix)
	}
	return filepath.Join(s.path, downloadsName, tempPrefix+key(a)+partSuffix)
}

// tempPath is where a download is unpacked to.
func tempPath(a *Artifact) string {
	return filepath.Join(filepath.Dir(a.Path), tempPrefix+key(a)+tempSuffix)
}

// record says where a download's unfinished files are and where its bytes came
// from. It is a hint: what is resumed is hashed again, and only files with
// names of ours are removed.
type record struct {
	// Dir is the directory of the destination.
	Dir string `json:"dir"`
	// Source is the digest of the URL that the bytes came from, which may
	// itself be secret; Validator is what that server called their version.
	Source    string    `json:"source,omitempty"`
	Validator validator `json:"validator,omitzero"`
}

func (s *stateDir) recordPath(key string) string {
	return filepath.Join(s.path, downloadsName, key+".json")
}

func (s *stateDir) readRecord(key string) record {
	var r record
	b, err := readSmallFile(s.recordPath(key), maxRecordBytes)
	if err != nil || json.Unmarshal(b, &r) != nil {
		return record{}
	}
	return r
}

// writeRecord must have returned before an unfinished file is made elsewhere,
// or nobody would find it after a crash.
func (s *stateDir) writeRecord(key string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeDurable(s.recordPath(key), b)
}

// clean removes the unfinished files of runs that ended, but those to keep.
func (s *stateDir) clean(artifacts []Artifact, keep map[string]bool) {
	dirs := map[string]bool{filepath.Join(s.path, downloadsName): true}
	for i := range artifacts {
		dirs[filepath.Dir(artifacts[i].Path)] = true
	}
	var records []string
	entries, _ := os.ReadDir(filepath.Join(s.path, downloadsName))
	for _, e := range entries {
		k, ok := cutExt(e.Name(), ".json")
		if !ok {
			continue
		}
		if r := s.readRecord(k); filepath.IsAbs(r.Dir) {
			dirs[r.Dir] = true
		}
		if !keep[k] {
			records = append(records, e.Name())
		}
	}
	for dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log("cannot look for unfinished downloads", "dir", dir, "error", err)
		}
		for _, e := range entries {
			m := tempName.FindStringSubmatch(e.Name())
			if m == nil || e.IsDir() || m[2] == "part" && keep[m[1]] {
				continue
			}
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				s.log("cannot remove an unfinished download", "path", filepath.Join(dir, e.Name()), "error", err)
			}
		}
	}
	for _, name := range records {
		_ = os.Remove(filepath.Join(s.path, downloadsName, name)) // tried again next time
	}
}

// Discard removes the directory of Options.StateDir with all that it remembers,
// and the unfinished downloads it knows of. Nobody may be fetching. What is
// installed stays.
func Discard(dir string) error {
	s := &stateDir{path: dir, log: func(string, ...any) {}}
	s.clean(nil, nil)
	if err := os.RemoveAll(dir); err != nil {
		return diskFault(err, "remove %s", dir)
	}
	return nil
}

func cutExt(name, ext string) (string, bool) {
	if filepath.Ext(name) != ext {
		return name, false
	}
	return name[:len(name)-len(ext)], true
}

// forget removes what is kept about a finished download.
func (s *stateDir) forget(a *Artifact) {
	_ = os.Remove(s.recordPath(key(a)))
	if !a.Format.raw() {
		_ = os.Remove(s.partPath(a))
	}
}

// openPart opens an unfinished download for appending. It refuses what this
// account did not make itself, since the file becomes the installed one.
func openPart(path string) (*os.File, error) {
	if info, err := os.Lstat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("it is not a regular file")}
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil {
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || st.Nlink != 1 || int(st.Uid) != os.Geteuid() {
			err = &fs.PathError{Op: "open", Path: path, Err: errors.New("it is not an unfinished download of this account")}
		}
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// createTemp makes a file that did not exist, removing what did.
func createTemp(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// makeDirs makes a directory and those above it durably and returns which were
// missing, outermost first.
func makeDirs(dir string, perm fs.FileMode) ([]string, error) {
	_, missing := existingParent(dir)
	for _, d := range missing {
		if err := os.Mkdir(d, perm); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, diskFault(err, "make the directory %s", d)
		}
		if err := syncDir(filepath.Dir(d)); err != nil {
			return nil, diskFault(err, "sync the directory %s", filepath.Dir(d))
		}
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = unix.ENOTDIR
	}
	return missing, diskFault(err, "use the directory %s", dir)
}

// publish gives a complete file its place: durable before it is visible, and
// with its mode only once it was verified.
func publish(file *os.File, path string, mode fs.FileMode) error {
	if err := file.Chmod(mode); err != nil {
		return diskFault(err, "set the mode of %s", file.Name())
	}
	if err := file.Sync(); err != nil {
		return diskFault(err, "write %s to the disk", file.Name())
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return diskFault(err, "put %s in its place", path)
	}
	return diskFault(syncDir(filepath.Dir(path)), "sync the directory of %s", path)
}

// writeDurable replaces a small file of ours. The name of its temporary file
// is always the same, so that crashes leave at most one behind.
func writeDurable(path string, b []byte) error {
	file, err := createTemp(path + ".new")
	if err != nil {
		return diskFault(err, "write %s", path)
	}
	defer file.Close()
	if _, err := file.Write(b); err != nil {
		return diskFault(err, "write %s", path)
	}
	return publish(file, path, 0o600)
}

// readSmallFile reads a regular file of at most limit bytes.
func readSmallFile(path string, limit int64) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) {
		err = nil // the file system has nothing to sync
	}
	return errors.Join(err, d.Close())
}
