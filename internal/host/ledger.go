package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// DefaultLedger is where the ledger is kept.
const DefaultLedger = "/var/lib/hearth/bootstrap/installed.json"

const (
	ledgerVersion = 1
	maxEntries    = 4096
)

// Ledger is the record of what was installed, kept in a JSON file that is
// written before what it speaks of: a file that bootstrap made is never unknown
// to it, whenever power is lost.
type Ledger struct {
	Version int `json:"version"`
	// Files are in the order of their first installation.
	Files []Entry `json:"files"`
	// Directories were created for the files, parents first.
	Directories []string `json:"directories,omitempty"`
	// Sysctls were changed on the running system.
	Sysctls []SysctlEntry `json:"sysctls,omitempty"`
}

// Entry is one installed file.
type Entry struct {
	Path string `json:"path"`
	// SHA256 is the content's, in hex, as it is installed or about to be.
	SHA256 string `json:"sha256"`
	// Previous is what was installed before; the file has it if power was lost
	// in the middle of a change.
	Previous string `json:"previous,omitempty"`
	// Backup is the path of what was there before bootstrap, and BackupSHA256
	// its digest; "" if nothing was.
	Backup       string `json:"backup,omitempty"`
	BackupSHA256 string `json:"backupSHA256,omitempty"`
	// Edited says that a version that somebody changed was kept with EditedSuffix.
	Edited bool      `json:"edited,omitempty"`
	Reason string    `json:"reason,omitempty"`
	Time   time.Time `json:"time"`
}

// SysctlEntry is one changed kernel setting.
type SysctlEntry struct {
	Key    string `json:"key"`
	Before string `json:"before"`
	After  string `json:"after"`
}

func (e *Entry) mine(sha256 string) bool {
	return sha256 != "" && (sha256 == e.SHA256 || sha256 == e.Previous)
}

// Entry returns what is known of a path.
func (l *Ledger) Entry(name string) (Entry, bool) {
	if e := l.find(name); e != nil {
		return *e, true
	}
	return Entry{}, false
}

func (l *Ledger) find(name string) *Entry {
	for i := range l.Files {
		if l.Files[i].Path == name {
			return &l.Files[i]
		}
	}
	return nil
}

// backup is the name under which what is at a path must be kept before it is
// replaced; "" if it is bootstrap's own.
func (l *Ledger) backup(name string, now state) string {
	e := l.find(name)
	switch {
	case !now.exists || e != nil && e.mine(now.sha256):
		return ""
	case e == nil, e.original(now.sha256):
		return name + BackupSuffix
	}
	return name + EditedSuffix
}

// original says whether content is what was there before bootstrap: power was
// lost after the ledger was written and before anything else was, or somebody
// put it back.
func (e *Entry) original(sha256 string) bool { return e.Backup != "" && sha256 == e.BackupSHA256 }

// claimDirectories records directories that are about to be created, and says
// whether one of them is new to the ledger.
func (l *Ledger) claimDirectories(dirs []string) (changed bool) {
	for _, dir := range dirs {
		if !slices.Contains(l.Directories, dir) {
			l.Directories = append(l.Directories, dir)
			changed = true
		}
	}
	return changed
}

// claim records that a file is about to be installed in the place of now.
func (l *Ledger) claim(name, sha256, reason string, now state, at time.Time) {
	backup := l.backup(name, now)
	e := l.find(name)
	if e == nil {
		l.Files = append(l.Files, Entry{Path: name})
		e = &l.Files[len(l.Files)-1]
	}
	switch {
	case strings.HasSuffix(backup, BackupSuffix):
		e.Previous, e.Backup, e.BackupSHA256 = "", backup, now.sha256
	case backup != "":
		e.Previous, e.Edited = "", true
	case !now.exists:
		e.Previous = ""
	case now.sha256 != sha256:
		e.Previous = now.sha256
	}
	e.SHA256, e.Reason, e.Time = sha256, reason, at.UTC().Truncate(time.Second)
}

// ParseLedger reads a ledger strictly.
func ParseLedger(b []byte) (*Ledger, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var l Ledger
	if err := d.Decode(&l); err != nil {
		return nil, fmt.Errorf("the ledger is no valid JSON: %w", err)
	}
	if d.More() {
		return nil, errors.New("the ledger has something after its end")
	}
	if l.Version != ledgerVersion {
		return nil, fmt.Errorf("the ledger has version %d; this bootstrap knows %d", l.Version, ledgerVersion)
	}
	if len(l.Files) > maxEntries || len(l.Directories) > maxEntries || len(l.Sysctls) > maxEntries {
		return nil, fmt.Errorf("the ledger has more than %d entries", maxEntries)
	}
	seen := map[string]bool{}
	for _, e := range l.Files {
		switch {
		case !usable(e.Path):
			return nil, fmt.Errorf("the ledger names the path %q", e.Path)
		case seen[e.Path]:
			return nil, fmt.Errorf("the ledger names %s twice", e.Path)
		case !hexDigest(e.SHA256), e.Previous != "" && !hexDigest(e.Previous), e.Backup != "" && !hexDigest(e.BackupSHA256):
			return nil, fmt.Errorf("the ledger has no valid digest for %s", e.Path)
		case e.Backup != "" && e.Backup != e.Path+BackupSuffix:
			return nil, fmt.Errorf("the ledger names the backup %q of %s", e.Backup, e.Path)
		}
		seen[e.Path] = true
	}
	for _, dir := range l.Directories {
		if !usable(dir) {
			return nil, fmt.Errorf("the ledger names the directory %q", dir)
		}
	}
	for _, s := range l.Sysctls {
		if _, err := sysctlPath(s.Key); err != nil {
			return nil, fmt.Errorf("the ledger: %w", err)
		}
	}
	return &l, nil
}

func usable(name string) bool { return path.IsAbs(name) && path.Clean(name) == name && name != "/" }

func hexDigest(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// Ledger reads the ledger; an empty one if nothing was installed yet.
func (h *Host) Ledger() (*Ledger, error) {
	b, err := h.tree.read(h.o.Ledger)
	if missing(err) {
		return &Ledger{Version: ledgerVersion}, nil
	}
	var l *Ledger
	if err == nil {
		l, err = ParseLedger(b)
	}
	if err != nil {
		return nil, fault.New(CodeLedger, err, remedyLedger, "reading %s failed", h.o.Ledger)
	}
	return l, nil
}

func (h *Host) save(l *Ledger) error {
	l.claimDirectories(h.absent(path.Dir(h.o.Ledger)))
	b, err := json.MarshalIndent(l, "", " ")
	if err != nil {
		return err
	}
	if _, err = h.tree.makeDirs(path.Dir(h.o.Ledger), 0o755); err == nil {
		err = h.tree.write(h.o.Ledger, append(b, '\n'), 0o600, nil)
	}
	if err == nil {
		return nil
	}
	if err := classify(err, "writing", h.o.Ledger); fault.CodeOf(err) != CodeWriteFailed {
		return err
	}
	return fault.New(CodeLedger, err, remedyLedger, "writing %s failed", h.o.Ledger)
}

// Record notes that somebody else is about to install a file with this digest
// at a path, such as a downloaded program; call it before that. What is there and is not
// bootstrap's is kept, and Remove puts it back. A file that has the digest
// already and is not in the ledger came with the image: it is not recorded, so
// Remove leaves it alone, and Record returns false.
func (h *Host) Record(ctx context.Context, name, sha256, reason string) (bool, error) {
	if !usable(name) || !hexDigest(sha256) {
		return false, fmt.Errorf("recording %q with the digest %q: the path must be absolute, the digest 64 digits in hex", name, sha256)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	ledger, err := h.Ledger()
	if err != nil {
		return false, err
	}
	now, err := h.tree.look(name)
	if err != nil {
		return false, classify(err, "looking at", name)
	}
	if now.exists && now.mode&(fs.ModeDir|fs.ModeIrregular) != 0 {
		return false, conflict(name, now)
	}
	backup := ledger.backup(name, now)
	if now.sha256 == sha256 {
		return backup == "", nil
	}
	ledger.claim(name, sha256, reason, now, h.now())
	if err := h.save(ledger); err != nil {
		return false, err
	}
	err = h.makeDirs(ledger, path.Dir(name), 0o755)
	if err == nil && backup != "" {
		err = h.keep(name, backup)
	}
	return err == nil, classify(err, "preparing", name)
}

func conflict(name string, now state) error {
	what := "a directory"
	if now.mode&fs.ModeDir == 0 {
		what = "neither file nor link"
	}
	return fault.New(CodePathConflict, nil, "move it away and run bootstrap again", "%s must become a file but is %s", name, what)
}

// Left is a file that Remove did not touch.
type Left struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Removal says what Remove did, or would do.
type Removal struct {
	Removed  []string `json:"removed,omitempty"`
	Restored []string `json:"restored,omitempty"` // paths that have their former content again
	Left     []Left   `json:"left,omitempty"`
	Sysctls  []string `json:"sysctls,omitempty"` // settings that have their former value again
}

// PlanRemove says what Remove would do. It changes nothing. Directories that
// would be empty afterwards are not listed.
func (h *Host) PlanRemove(ctx context.Context) (Removal, error) { return h.removal(ctx, true) }

// Remove takes back what Apply, Record and ApplyKernel did, newest first, and
// nothing else: a file that somebody changed since stays and is reported, and
// what was there before comes back. It can be repeated after any failure.
func (h *Host) Remove(ctx context.Context) (Removal, error) { return h.removal(ctx, false) }

// PlanRetire says what Retire would do. It changes nothing.
func (h *Host) PlanRetire(ctx context.Context, paths ...string) (Removal, error) {
	return h.retire(ctx, true, paths)
}

// Retire takes back single files that bootstrap installed and that are no longer
// wanted. Paths it did not install are left alone, as are files that somebody
// changed since, which are reported.
func (h *Host) Retire(ctx context.Context, paths ...string) (Removal, error) {
	return h.retire(ctx, false, paths)
}

func (h *Host) retire(ctx context.Context, dry bool, paths []string) (r Removal, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ledger, err := h.Ledger()
	if err != nil {
		return r, err
	}
	rest := &Ledger{Version: ledgerVersion, Directories: ledger.Directories, Sysctls: ledger.Sysctls}
	for _, e := range ledger.Files {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		gone := false
		if slices.Contains(paths, e.Path) {
			if gone, err = h.takeBack(e, dry, &r); err != nil {
				return r, err
			}
		}
		if !gone {
			rest.Files = append(rest.Files, e)
		}
	}
	if dry || len(rest.Files) == len(ledger.Files) {
		return r, nil
	}
	return r, h.save(rest)
}

func (h *Host) removal(ctx context.Context, dry bool) (r Removal, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ledger, err := h.Ledger()
	if err != nil {
		return r, err
	}
	left := &Ledger{Version: ledgerVersion}
	for _, e := range slices.Backward(ledger.Files) {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		gone, err := h.takeBack(e, dry, &r)
		if err != nil {
			return r, err
		}
		if !gone {
			left.Files = append(left.Files, e)
		}
	}
	for _, s := range slices.Backward(ledger.Sysctls) {
		now, err := h.readSysctl(s.Key)
		if err != nil || now != s.After || now == s.Before {
			continue // gone with its module, or somebody else's by now
		}
		r.Sysctls = append(r.Sysctls, s.Key)
		if !dry {
			if err := h.writeSysctl(s.Key, s.Before); err != nil {
				return r, fault.New(CodeSysctl, err, "set it by hand", "setting %s back to %q failed", s.Key, s.Before)
			}
		}
	}
	if dry {
		return r, nil
	}
	slices.Reverse(left.Files)
	keepers := left.Files
	// The ledger goes before the directory it is in, and only when nothing is
	// left that it must speak of.
	if len(keepers) == 0 {
		if err := h.tree.remove(h.o.Ledger); err != nil {
			return r, classify(err, "removing", h.o.Ledger)
		}
	}
	for _, dir := range slices.Backward(ledger.Directories) {
		gone, err := h.tree.removeDir(dir)
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return r, classify(err, "removing", dir)
		}
		if !gone {
			left.Directories = append(left.Directories, dir)
		}
	}
	if len(keepers) > 0 {
		slices.Reverse(left.Directories)
		return r, h.save(left)
	}
	return r, nil
}

// takeBack undoes one entry, and says whether the ledger need not know it any
// longer.
func (h *Host) takeBack(e Entry, dry bool, r *Removal) (bool, error) {
	now, err := h.tree.look(e.Path)
	if err != nil {
		return false, classify(err, "looking at", e.Path)
	}
	backup := state{}
	if e.Backup != "" {
		if backup, err = h.tree.look(e.Backup); err != nil {
			return false, classify(err, "looking at", e.Backup)
		}
	}
	gone := true
	switch {
	case now.exists && e.original(now.sha256) && !e.mine(now.sha256):
		if backup.exists && backup.sha256 == e.BackupSHA256 && !dry {
			err = h.tree.remove(e.Backup)
		}
	case now.exists && !e.mine(now.sha256):
		r.Left = append(r.Left, Left{e.Path, "changed since bootstrap installed it"})
		gone = false
	case backup.exists:
		r.Restored = append(r.Restored, e.Path)
		if !dry {
			err = h.tree.rename(e.Backup, e.Path)
		}
	case now.exists:
		r.Removed = append(r.Removed, e.Path)
		if !dry {
			err = h.tree.remove(e.Path)
		}
	}
	if err != nil {
		return false, classify(err, "removing", e.Path)
	}
	if e.Edited && h.tree.exists(e.Path+EditedSuffix) {
		r.Left = append(r.Left, Left{e.Path + EditedSuffix, "somebody's change to a file of bootstrap's, kept when that was written anew"})
	}
	return gone, nil
}
