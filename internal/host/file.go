package host

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// DefaultMode is a file's mode when it names none.
const DefaultMode fs.FileMode = 0o644

// Suffixes of names under which what is replaced is kept, in the same directory.
// No reader of drop-in directories takes them for its own.
const (
	// BackupSuffix is for what was there before bootstrap. Remove puts it back.
	BackupSuffix = ".before-hearth"
	// EditedSuffix is for a file of bootstrap's that somebody changed before
	// bootstrap wrote it anew; the latest such file. Remove leaves it alone.
	EditedSuffix = ".edited"
)

// Owner is who a file belongs to.
type Owner struct{ UID, GID int }

// File is a file that should be there.
type File struct {
	// Path is absolute, on the machine.
	Path string
	// Content is all of it, at most 4 MiB.
	Content []byte
	// Mode are the permission bits. Default: DefaultMode. With fs.ModeDir it is
	// a directory, which is created with that mode if it is missing, and left
	// as it is otherwise; name it before what goes into it.
	Mode fs.FileMode
	// IfAbsent leaves a file that is there as it is, whatever its content: it is
	// for files that somebody else goes on writing.
	IfAbsent bool
	// Owner is who it belongs to. Default: whoever runs this.
	Owner *Owner
	// Secret keeps the content out of every description, and makes the
	// directory, if it has to be created, unreadable for others.
	Secret bool
	// Reason is a clause that says what it is for, such as "tells k3s how to run".
	Reason string
}

func (f File) mode() fs.FileMode {
	if f.Mode == 0 {
		return DefaultMode
	}
	return f.Mode.Perm()
}

// check refuses what would be written wrongly.
func (f File) check() error {
	switch {
	case !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/":
		return fmt.Errorf("the path %q of a file to install is not absolute and clean", f.Path)
	case f.Mode.IsDir() && (len(f.Content) > 0 || f.Mode.Perm() == 0):
		return fmt.Errorf("the directory %s has a content or no mode; that is a mistake of the caller", f.Path)
	case len(f.Content) > maxFile:
		return fmt.Errorf("%s would have %d bytes; configuration files have at most %d", f.Path, len(f.Content), maxFile)
	case f.Secret && f.mode()&0o077 != 0:
		return fmt.Errorf("%s is secret, but others could read it with mode %#o", f.Path, f.mode())
	}
	return nil
}

// Action is what happens to a file.
type Action string

// Actions.
const (
	Same    Action = "same"
	Create  Action = "create"
	Replace Action = "change"
)

// Change is what would happen, or happened, to one file.
type Change struct {
	Path   string `json:"path"`
	Action Action `json:"action"`
	Reason string `json:"reason,omitempty"`
	Mode   string `json:"mode"`
	Size   int    `json:"size"`
	SHA256 string `json:"sha256,omitempty"` // of the new content; absent for secrets
	Secret bool   `json:"secret,omitempty"`
	// Directory says that it is one.
	Directory bool `json:"directory,omitempty"`
	// Diff is a unified diff of a change of text, and "" for secrets.
	Diff string `json:"diff,omitempty"`
	// Backup is where what is there now, and is not bootstrap's, will be kept.
	Backup string `json:"backup,omitempty"`
}

// Changed says whether something differs from what is wanted.
func (c Change) Changed() bool { return c.Action != Same }

// Plan says what Apply would do. It changes nothing.
func (h *Host) Plan(ctx context.Context, files []File) ([]Change, error) {
	ledger, err := h.Ledger()
	if err != nil {
		return nil, err
	}
	steps, err := h.compare(ctx, ledger, files)
	changes := make([]Change, len(steps))
	for i, s := range steps {
		changes[i] = s.change
	}
	return changes, err
}

// step is one file with what is to be done about it.
type step struct {
	file   File
	now    state
	change Change
}

func (h *Host) compare(ctx context.Context, ledger *Ledger, files []File) ([]step, error) {
	seen := map[string]bool{}
	steps := make([]step, 0, len(files))
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return steps, err
		}
		if err := f.check(); err != nil {
			return steps, err
		}
		if seen[f.Path] {
			return steps, fmt.Errorf("%s is wanted twice with contents of its own; that is a mistake of the caller", f.Path)
		}
		seen[f.Path] = true
		now, err := h.tree.look(f.Path)
		if err != nil {
			return steps, classify(err, "looking at", f.Path)
		}
		c := Change{Path: f.Path, Reason: f.Reason, Mode: fmt.Sprintf("%#o", f.mode()), Size: len(f.Content), Secret: f.Secret, Directory: f.Mode.IsDir(), Action: Same}
		if !f.Secret && !c.Directory {
			c.SHA256 = digest(f.Content)
		}
		switch {
		case !now.exists:
			c.Action = Create
		case c.Directory:
			if !h.tree.isDir(f.Path) {
				return steps, fault.New(CodePathConflict, nil, "move it away and run bootstrap again", "%s must become a directory but is none", f.Path)
			}
		case now.mode&(fs.ModeDir|fs.ModeIrregular) != 0:
			return steps, conflict(f.Path, now)
		case f.IfAbsent:
		case now.mode&fs.ModeSymlink != 0, now.sha256 != digest(f.Content), now.mode.Perm() != f.mode(),
			f.Owner != nil && (now.uid != f.Owner.UID || now.gid != f.Owner.GID):
			c.Action = Replace
			if !f.Secret {
				c.Diff = describe(f, now)
			}
		}
		if c.Action == Replace {
			c.Backup = ledger.backup(f.Path, now)
		}
		steps = append(steps, step{f, now, c})
	}
	return steps, nil
}

// describe is a diff of the content, or a sentence about what else differs.
func describe(f File, now state) string {
	switch {
	case now.mode&fs.ModeSymlink != 0:
		return "a symbolic link becomes a file\n"
	case now.sha256 == digest(f.Content):
		return fmt.Sprintf("only mode or owner differ: %#o %d:%d becomes %#o\n", now.mode.Perm(), now.uid, now.gid, f.mode())
	case !now.whole:
		return fmt.Sprintf("a file of more than %d bytes becomes one of %d\n", maxFile, len(f.Content))
	}
	return unified(f.Path, string(now.content), string(f.Content))
}

// Apply makes the files be there, durably and one after the other, and returns
// what it did: with an error, what was done before it. Files that are as they
// should be are not touched. What is replaced and is not bootstrap's own is kept
// under Change.Backup.
func (h *Host) Apply(ctx context.Context, files []File) ([]Change, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ledger, err := h.Ledger()
	if err != nil {
		return nil, err
	}
	steps, err := h.compare(ctx, ledger, files)
	if err != nil {
		return nil, err
	}
	// The ledger first: whatever happens from here on, no file of ours is
	// unknown to it.
	dirty := false
	for _, s := range steps {
		switch {
		case s.change.Changed() && s.change.Directory:
			dirty = ledger.claimDirectories(h.absent(s.file.Path)) || dirty
		case s.change.Changed():
			ledger.claim(s.file.Path, digest(s.file.Content), s.file.Reason, s.now, h.now())
			dirty = true
		}
	}
	if dirty {
		if err := h.save(ledger); err != nil {
			return nil, err
		}
	}
	done := make([]Change, 0, len(steps))
	for _, s := range steps {
		if s.change.Changed() {
			if err := ctx.Err(); err != nil {
				return done, err
			}
			if err := h.install(ledger, s); err != nil {
				return done, classify(err, "writing", s.file.Path)
			}
		}
		done = append(done, s.change)
	}
	return done, nil
}

func (h *Host) install(ledger *Ledger, s step) error {
	if s.change.Directory {
		return h.makeDirs(ledger, s.file.Path, s.file.mode())
	}
	mode := fs.FileMode(0o755)
	if s.file.Secret {
		mode = 0o700
	}
	if err := h.makeDirs(ledger, path.Dir(s.file.Path), mode); err != nil {
		return err
	}
	if s.change.Backup != "" {
		if err := h.keep(s.file.Path, s.change.Backup); err != nil {
			return err
		}
	}
	return h.tree.write(s.file.Path, s.file.Content, s.file.mode(), s.file.Owner)
}

// keep puts what is there aside. The first original is kept for good, of edits
// the latest.
func (h *Host) keep(name, as string) error {
	if strings.HasSuffix(as, EditedSuffix) {
		if err := h.tree.remove(as); err != nil {
			return err
		}
	}
	return h.tree.keep(name, as)
}

// absent lists a directory and those of its parents that do not exist, parents
// first.
func (h *Host) absent(name string) (dirs []string) {
	for dir := name; dir != "/" && !h.tree.exists(dir); dir = path.Dir(dir) {
		dirs = append(dirs, dir)
	}
	slices.Reverse(dirs)
	return dirs
}

// makeDirs creates directories that the ledger knows before they exist.
func (h *Host) makeDirs(ledger *Ledger, name string, mode fs.FileMode) error {
	absent := h.absent(name)
	if len(absent) == 0 {
		return nil
	}
	if ledger.claimDirectories(absent) {
		if err := h.save(ledger); err != nil {
			return err
		}
	}
	_, err := h.tree.makeDirs(name, mode)
	return err
}

// Text formats changes for people: one line each, diffs indented below.
func Text(changes []Change) string {
	var b strings.Builder
	for _, c := range changes {
		what := fmt.Sprintf("%d bytes", c.Size)
		if c.Directory {
			what = "directory"
		}
		if c.Secret {
			what += ", secret"
		}
		fmt.Fprintf(&b, "%-6s %s (%s, %s)", c.Action, c.Path, c.Mode, what)
		if c.Reason != "" {
			fmt.Fprintf(&b, ": %s", c.Reason)
		}
		if c.Backup != "" {
			fmt.Fprintf(&b, "; what is there is kept as %s", c.Backup)
		}
		b.WriteByte('\n')
		for line := range strings.Lines(c.Diff) {
			b.WriteString("    " + line)
		}
	}
	return b.String()
}
