package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/test/needs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newHost(t testing.TB) *Host {
	t.Helper()
	h, err := New(Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	h.now = func() time.Time { return time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC) }
	h.uname = func() (string, string, error) { return "aarch64", "6.1.0-test", nil }
	h.getuid = func() int { return 0 }
	h.adjtime = func() (bool, error) { return false, nil }
	return h
}

func put(t testing.TB, h *Host, name, content string) {
	t.Helper()
	p := filepath.Join(h.Root(), name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// snapshot is every path below the root with mode and content.
func snapshot(t testing.TB, h *Host) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(h.Root(), func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == h.Root() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var content []byte
		if info.Mode().IsRegular() {
			content, err = os.ReadFile(p)
		} else if info.Mode()&fs.ModeSymlink != 0 {
			var target string
			target, err = os.Readlink(p)
			content = []byte(target)
		}
		out[strings.TrimPrefix(p, h.Root())] = fmt.Sprintf("%v %s", info.Mode(), content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func actions(changes []Change) (out []string) {
	for _, c := range changes {
		out = append(out, fmt.Sprintf("%s %s %s", c.Action, c.Path, c.Backup))
	}
	return out
}

var wanted = []File{
	{Path: "/etc/rancher/k3s/config.yaml.d/10-hearth.yaml", Content: []byte("a: 1\n"), Reason: "tells k3s how to run"},
	{Path: "/var/lib/hearth/bootstrap/k3s/token", Content: []byte("hush"), Mode: 0o600, Secret: true},
	{Path: "/etc/sysctl.d/90-hearth.conf", Content: []byte("x = 1\n")},
}

func TestPlanTouchesNothingAndApplyDoesWhatWasPlanned(t *testing.T) {
	h := newHost(t)
	put(t, h, "etc/sysctl.d/90-hearth.conf", "x = 2\n")
	before := snapshot(t, h)
	planned, err := h.Plan(t.Context(), wanted)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, snapshot(t, h)); d != "" {
		t.Errorf("Plan changed something:\n%s", d)
	}
	done, err := h.Apply(t.Context(), wanted)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(planned, done); d != "" {
		t.Errorf("done differs from planned:\n%s", d)
	}
	want := []string{
		"create /etc/rancher/k3s/config.yaml.d/10-hearth.yaml ",
		"create /var/lib/hearth/bootstrap/k3s/token ",
		"change /etc/sysctl.d/90-hearth.conf /etc/sysctl.d/90-hearth.conf.before-hearth",
	}
	if d := cmp.Diff(want, actions(done)); d != "" {
		t.Error(d)
	}
	after := snapshot(t, h)
	for name, want := range map[string]string{
		"/etc/rancher/k3s/config.yaml.d/10-hearth.yaml": "-rw-r--r-- a: 1\n",
		"/var/lib/hearth/bootstrap/k3s/token":           "-rw------- hush",
		"/var/lib/hearth/bootstrap/k3s":                 "drwx------ ",
		"/var/lib/hearth":                               "drwxr-xr-x ",
		"/etc/sysctl.d/90-hearth.conf":                  "-rw-r--r-- x = 1\n",
		"/etc/sysctl.d/90-hearth.conf.before-hearth":    "-rw-r--r-- x = 2\n",
	} {
		if after[name] != want {
			t.Errorf("%s is %q, want %q", name, after[name], want)
		}
	}

	again, err := h.Apply(t.Context(), wanted)
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(again, Change.Changed) {
		t.Errorf("a second Apply changed something: %v", actions(again))
	}
	if d := cmp.Diff(after, snapshot(t, h)); d != "" {
		t.Errorf("a second Apply left traces:\n%s", d)
	}
}

func TestSecretsAreInNoDescription(t *testing.T) {
	h := newHost(t)
	secret := []File{{Path: "/t/token", Content: []byte("K10secret\n"), Mode: 0o600, Secret: true}}
	put(t, h, "t/token", "K10older")
	var all bytes.Buffer
	for _, f := range []func(context.Context, []File) ([]Change, error){h.Plan, h.Apply} {
		changes, err := f(t.Context(), secret)
		if err != nil {
			t.Fatal(err)
		}
		all.WriteString(Text(changes))
		if err := json.NewEncoder(&all).Encode(changes); err != nil {
			t.Fatal(err)
		}
	}
	if s := all.String(); strings.Contains(s, "K10") || strings.Contains(s, digest(secret[0].Content)) {
		t.Errorf("a secret or its digest is shown:\n%s", s)
	}
	if _, err := h.Apply(t.Context(), []File{{Path: "/t/x", Content: []byte("x"), Mode: 0o644, Secret: true}}); err == nil {
		t.Error("a secret that others can read was written")
	}
}

func TestRemoveRestoresExactlyWhatWasThere(t *testing.T) {
	h := newHost(t)
	put(t, h, "etc/sysctl.d/90-hearth.conf", "x = 2\n")
	put(t, h, "usr/local/bin/k3s", "somebody's k3s")
	put(t, h, "usr/local/bin/shim", "from the image")
	if err := os.Symlink("/dev/null", filepath.Join(h.Root(), "etc/link.conf")); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, h)

	files := append(slices.Clone(wanted), File{Path: "/etc/link.conf", Content: []byte("no link\n")})
	if _, err := h.Apply(t.Context(), files); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"/usr/local/bin/k3s": "our k3s", "/usr/local/bin/shim": "from the image", "/opt/new/tool": "tool"} {
		recorded, err := h.Record(t.Context(), name, digest([]byte(content)), "an artifact")
		if err != nil {
			t.Fatal(err)
		}
		if want := name != "/usr/local/bin/shim"; recorded != want {
			t.Errorf("%s recorded: %v, want %v", name, recorded, want)
		}
		// As an artifact is installed: by renaming.
		put(t, h, name+".tmp", content)
		if err := os.Rename(filepath.Join(h.Root(), name+".tmp"), filepath.Join(h.Root(), name)); err != nil {
			t.Fatal(err)
		}
	}
	// A later version of everything, so that Previous and Backup are both used.
	for i := range files {
		files[i].Content = append(bytes.Clone(files[i].Content), "# newer\n"...)
	}
	if _, err := h.Apply(t.Context(), files); err != nil {
		t.Fatal(err)
	}

	planned, err := h.PlanRemove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	removed, err := h.Remove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(planned, removed); d != "" {
		t.Errorf("removed differs from planned:\n%s", d)
	}
	if d := cmp.Diff(before, snapshot(t, h)); d != "" {
		t.Errorf("Remove did not restore what was there:\n%s", d)
	}
	if r, err := h.Remove(t.Context()); err != nil || len(r.Removed)+len(r.Restored)+len(r.Left) > 0 {
		t.Errorf("a second Remove: %+v, %v", r, err)
	}
}

func TestFilesThatSomebodyChangedStayAndAreReported(t *testing.T) {
	h := newHost(t)
	if _, err := h.Apply(t.Context(), wanted); err != nil {
		t.Fatal(err)
	}
	const edited = "/etc/rancher/k3s/config.yaml.d/10-hearth.yaml"
	put(t, h, edited, "a: edited\n")
	r, err := h.Remove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Left) != 1 || r.Left[0].Path != edited || len(r.Removed) != 2 {
		t.Errorf("got %+v", r)
	}
	if got := snapshot(t, h)[edited]; got != "-rw-r--r-- a: edited\n" {
		t.Errorf("the edited file is %q", got)
	}
	// It is still known to be bootstrap's path.
	l, err := h.Ledger()
	if err != nil || len(l.Files) != 1 {
		t.Errorf("ledger %+v, %v", l, err)
	}
}

func TestAnEditIsKeptAsideWhenTheFileIsWrittenAnew(t *testing.T) {
	h := newHost(t)
	file := []File{{Path: "/etc/unit", Content: []byte("1\n")}}
	for i, edit := range []string{"first edit", "second edit"} {
		if _, err := h.Apply(t.Context(), file); err != nil {
			t.Fatal(err)
		}
		put(t, h, "etc/unit", edit)
		changes, err := h.Apply(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		if changes[0].Backup != "/etc/unit.edited" {
			t.Errorf("%d: %+v", i, changes[0])
		}
		if got := snapshot(t, h)["/etc/unit.edited"]; got != "-rw-r--r-- "+edit {
			t.Errorf("the edit is kept as %q", got)
		}
	}
	r, err := h.Remove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Left) != 1 || r.Left[0].Path != "/etc/unit.edited" || !slices.Equal(r.Removed, []string{"/etc/unit"}) {
		t.Errorf("got %+v", r)
	}
}

func TestDirectoriesAndFilesThatOthersWrite(t *testing.T) {
	h := newHost(t)
	before := snapshot(t, h)
	files := []File{{Path: "/d/server", Mode: fs.ModeDir | 0o700}, {Path: "/d/server/m/x", Content: []byte("x")}, {Path: "/d/cache", Content: []byte("{}"), IfAbsent: true}}
	done, err := h.Apply(t.Context(), files)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"create /d/server ", "create /d/server/m/x ", "create /d/cache "}, actions(done)); d != "" {
		t.Error(d)
	}
	put(t, h, "d/cache", "somebody wrote")
	if err := os.Chmod(filepath.Join(h.Root(), "d/server"), 0o750); err != nil {
		t.Fatal(err)
	}
	if again, err := h.Apply(t.Context(), files); err != nil || slices.ContainsFunc(again, Change.Changed) {
		t.Errorf("a second time: %v, %v", actions(again), err)
	}
	after := snapshot(t, h)
	if after["/d"] != "drwxr-xr-x " || after["/d/server"] != "drwxr-x--- " || after["/d/server/m"] != "drwxr-xr-x " || after["/d/cache"] != "-rw-r--r-- somebody wrote" {
		t.Errorf("got %v", after)
	}
	if err := os.Remove(filepath.Join(h.Root(), "d/cache")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, snapshot(t, h)); d != "" {
		t.Error(d)
	}
	put(t, h, "file", "")
	if _, err := h.Plan(t.Context(), []File{{Path: "/file", Mode: fs.ModeDir | 0o755}}); fault.CodeOf(err) != CodePathConflict {
		t.Errorf("a file in a directory's place: %v", err)
	}
}

func TestParallelRecordsAreAllKept(t *testing.T) {
	h := newHost(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := h.Record(t.Context(), fmt.Sprintf("/opt/d%d/x", i), digest([]byte{byte(i)}), ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if l, err := h.Ledger(); err != nil || len(l.Files) != 20 {
		t.Errorf("%d entries, %v", len(l.Files), err)
	}
	if _, err := h.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if left := snapshot(t, h); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func BenchmarkApply(b *testing.B) {
	var files []File
	for i := range 25 {
		files = append(files, File{Path: fmt.Sprintf("/etc/d%d/f%d", i%5, i), Content: bytes.Repeat([]byte("x\n"), 500)})
	}
	b.Run("fresh", func(b *testing.B) {
		for b.Loop() {
			if _, err := newHost(b).Apply(b.Context(), files); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unchanged", func(b *testing.B) {
		h := newHost(b)
		for b.Loop() {
			if _, err := h.Apply(b.Context(), files); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestRetireTakesBackSingleFiles(t *testing.T) {
	h := newHost(t)
	put(t, h, "etc/b", "theirs")
	put(t, h, "etc/stranger", "x")
	before := snapshot(t, h)
	files := []File{{Path: "/etc/a", Content: []byte("1")}, {Path: "/etc/b", Content: []byte("1")}, {Path: "/etc/c", Content: []byte("1")}}
	if _, err := h.Apply(t.Context(), files); err != nil {
		t.Fatal(err)
	}
	put(t, h, "etc/c", "edited")
	paths := []string{"/etc/a", "/etc/b", "/etc/c", "/etc/stranger", "/etc/absent"}
	planned, err := h.PlanRetire(t.Context(), paths...)
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.Retire(t.Context(), paths...)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(planned, r); d != "" {
		t.Error(d)
	}
	if !slices.Equal(r.Removed, []string{"/etc/a"}) || !slices.Equal(r.Restored, []string{"/etc/b"}) || len(r.Left) != 1 {
		t.Errorf("got %+v", r)
	}
	after := snapshot(t, h)
	for name, want := range map[string]string{"/etc/a": "", "/etc/b": before["/etc/b"], "/etc/c": "-rw-r--r-- edited", "/etc/stranger": before["/etc/stranger"]} {
		if after[name] != want {
			t.Errorf("%s is %q, want %q", name, after[name], want)
		}
	}
	if l, err := h.Ledger(); err != nil || len(l.Files) != 1 || l.Files[0].Path != "/etc/c" {
		t.Errorf("ledger %+v, %v", l, err)
	}
}

// A loss of power is a run that ends after any of its writes. What a write
// leaves is whole or not there, so cutting between system calls that change
// names is all there is to try.
func TestRemoveRestoresAfterALossOfPowerAnywhere(t *testing.T) {
	setup := func(t *testing.T) (*Host, []File, map[string]string) {
		h := newHost(t)
		put(t, h, "etc/a", "theirs")
		return h, []File{{Path: "/etc/a", Content: []byte("ours")}, {Path: "/new/dir/b", Content: []byte("ours")}}, snapshot(t, h)
	}
	steps := []struct {
		name string
		run  func(t *testing.T, h *Host, l *Ledger, files []File)
	}{
		{"after the ledger", func(*testing.T, *Host, *Ledger, []File) {}},
		{"after the backup", func(t *testing.T, h *Host, _ *Ledger, _ []File) {
			if err := h.keep("/etc/a", "/etc/a"+BackupSuffix); err != nil {
				t.Fatal(err)
			}
		}},
		{"after one file", func(t *testing.T, h *Host, l *Ledger, files []File) {
			s, err := h.compare(t.Context(), &Ledger{}, files[:1])
			if err != nil {
				t.Fatal(err)
			}
			if err := h.install(l, s[0]); err != nil {
				t.Fatal(err)
			}
		}},
		{"after a directory", func(t *testing.T, h *Host, l *Ledger, _ []File) {
			if err := h.makeDirs(l, "/new/dir", 0o755); err != nil {
				t.Fatal(err)
			}
		}},
		{"in the middle of writing", func(t *testing.T, h *Host, _ *Ledger, _ []File) { put(t, h, "etc/.a.hearth-ABC", "ou") }},
	}
	begin := func(t *testing.T, h *Host, files []File) *Ledger {
		l, err := h.Ledger()
		if err != nil {
			t.Fatal(err)
		}
		steps, err := h.compare(t.Context(), l, files)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps {
			l.claim(s.file.Path, digest(s.file.Content), "", s.now, h.now())
		}
		if err := h.save(l); err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, step := range steps {
		t.Run(step.name+", reset", func(t *testing.T) {
			h, files, before := setup(t)
			step.run(t, h, begin(t, h, files), files)
			if _, err := h.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			after := snapshot(t, h)
			delete(after, "/etc/.a.hearth-ABC") // swept by the next write
			if d := cmp.Diff(before, after); d != "" {
				t.Error(d)
			}
		})
		t.Run(step.name+", run again, reset", func(t *testing.T) {
			h, files, before := setup(t)
			step.run(t, h, begin(t, h, files), files)
			if _, err := h.Apply(t.Context(), files); err != nil {
				t.Fatal(err)
			}
			after := snapshot(t, h)
			if after["/etc/a"] != "-rw-r--r-- ours" || after["/etc/a"+BackupSuffix] != "-rw-r--r-- theirs" || after["/new/dir/b"] == "" {
				t.Errorf("got %v", after)
			}
			if _, err := h.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, snapshot(t, h)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestNoLinkLeadsOutOfTheRoot(t *testing.T) {
	outside := t.TempDir()
	for _, target := range []string{outside, "../../../../../../../../" + outside} {
		h := newHost(t)
		if err := os.Symlink(target, filepath.Join(h.Root(), "etc")); err != nil {
			t.Fatal(err)
		}
		// Below the root the link dangles, or leads to a directory of that name there.
		_, err := h.Apply(t.Context(), []File{{Path: "/etc/x", Content: []byte("x")}})
		if entries, _ := os.ReadDir(outside); len(entries) > 0 {
			t.Fatalf("written outside the root (err %v)", err)
		}
		if err == nil {
			t.Error("a dangling link was taken for a directory")
		}
	}
	h := newHost(t)
	if err := errors.Join(os.Mkdir(filepath.Join(h.Root(), "data"), 0o755), os.Symlink("/data", filepath.Join(h.Root(), "etc"))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Apply(t.Context(), []File{{Path: "/etc/x", Content: []byte("x")}}); err != nil {
		t.Fatal(err)
	}
	if got := snapshot(t, h)["/data/x"]; got != "-rw-r--r-- x" {
		t.Errorf("an absolute link within the root was not followed: %q", got)
	}
}

func TestWhatCannotBecomeAFileIsClassified(t *testing.T) {
	h := newHost(t)
	put(t, h, "a/b/c", "")
	for _, f := range []File{{Path: "/a/b"}, {Path: "/a/b/c/d"}} {
		if _, err := h.Apply(t.Context(), []File{f}); fault.CodeOf(err) != CodePathConflict {
			t.Errorf("%s: %v", f.Path, err)
		}
	}
	for _, name := range []string{"", "relative", "/a/../b", "/", "/a/"} {
		if _, err := h.Plan(t.Context(), []File{{Path: name}}); err == nil {
			t.Errorf("the path %q was accepted", name)
		}
	}
	if _, err := h.Plan(t.Context(), []File{{Path: "/x"}, {Path: "/x"}}); err == nil {
		t.Error("a path that is wanted twice was accepted")
	}
}

func TestWriteFailuresAreClassified(t *testing.T) {
	for err, want := range map[error]fault.Code{
		unix.EROFS: CodeReadOnly, unix.ENOSPC: CodeNoSpace, unix.EDQUOT: CodeNoSpace, unix.EIO: CodeWriteFailed,
		unix.EPERM: CodeWriteFailed, unix.ENOSYS: CodeKernelTooOld, unix.ENOTDIR: CodePathConflict,
	} {
		got := classify(&fs.PathError{Op: "open", Path: "/x", Err: err}, "writing", "/x")
		if fault.CodeOf(got) != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// Real file systems, because a fake would only show what we believe of them.
func TestReadOnlyAndFullFileSystems(t *testing.T) {
	mount := func(t *testing.T, options string) *Host {
		h := newHost(t)
		target := filepath.Join(h.Root(), "usr")
		if err := os.Mkdir(target, 0o755); err != nil {
			t.Fatal(err)
		}
		needs.Tmpfs(t, target, options)
		return h
	}
	file := []File{{Path: "/usr/local/x", Content: bytes.Repeat([]byte("x"), 1<<20)}}
	t.Run("read-only", func(t *testing.T) {
		h := mount(t, "size=4m")
		if err := unix.Mount("", filepath.Join(h.Root(), "usr"), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Apply(t.Context(), file); fault.CodeOf(err) != CodeReadOnly {
			t.Errorf("got %v", err)
		}
		r, err := h.Preflight(t.Context(), Requirements{})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(r, func(f Finding) bool { return f.Code == CodeReadOnly && strings.Contains(f.Fact, "/usr/local") }) {
			t.Errorf("preflight does not report it: %+v", r)
		}
	})
	t.Run("full", func(t *testing.T) {
		h := mount(t, "size=512k")
		if _, err := h.Apply(t.Context(), file); fault.CodeOf(err) != CodeNoSpace {
			t.Errorf("got %v", err)
		}
		for name := range snapshot(t, h) {
			if strings.Contains(name, temporaryMark) || name == "/usr/local/x" {
				t.Errorf("%s is left", name)
			}
		}
		if _, err := h.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestDamagedLedgersAreRefused(t *testing.T) {
	sum := strings.Repeat("0", 64)
	for name, content := range map[string]string{
		"empty":          ``,
		"truncated":      `{"version":1,"files":[`,
		"newer":          `{"version":2,"files":[]}`,
		"unknown field":  `{"version":1,"files":[],"x":1}`,
		"twice":          `{"version":1,"files":[]}{}`,
		"outside":        `{"version":1,"files":[{"path":"/etc/../../x","sha256":"` + sum + `","time":"2026-01-01T00:00:00Z"}]}`,
		"root":           `{"version":1,"files":[],"directories":["/"]}`,
		"no digest":      `{"version":1,"files":[{"path":"/x","sha256":"y","time":"2026-01-01T00:00:00Z"}]}`,
		"other's backup": `{"version":1,"files":[{"path":"/x","sha256":"` + sum + `","backup":"/etc/passwd","backupSHA256":"` + sum + `","time":"2026-01-01T00:00:00Z"}]}`,
		"no sysctl":      `{"version":1,"files":[],"sysctls":[{"key":"../../x","before":"","after":""}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			put(t, h, DefaultLedger, content)
			if _, err := h.Apply(t.Context(), wanted); fault.CodeOf(err) != CodeLedger {
				t.Errorf("Apply: %v", err)
			}
			if _, err := h.Remove(t.Context()); fault.CodeOf(err) != CodeLedger {
				t.Errorf("Remove: %v", err)
			}
		})
	}
}

func FuzzParseLedger(f *testing.F) {
	h := newHost(f)
	if _, err := h.Apply(f.Context(), wanted); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(h.Root(), DefaultLedger))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"files":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLedger(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseLedger(again); err != nil {
			t.Errorf("what was accepted is refused when written again: %v", err)
		}
	})
}

func TestUnifiedDiff(t *testing.T) {
	number := func(from, to int) (s string) {
		for i := from; i <= to; i++ {
			s += fmt.Sprintf("%d\n", i)
		}
		return s
	}
	for _, tt := range []struct{ name, before, after, want string }{
		{"equal texts have none", "a\n", "a\n", ""},
		{"a line is added to nothing", "", "a\n", "@@ -0,0 +1,1 @@\n+a\n"},
		{"everything goes", "a\n", "", "@@ -1,1 +0,0 @@\n-a\n"},
		{"a line changes", "a\nb\nc\n", "a\nB\nc\n", "@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n"},
		{"distant changes are hunks of their own", number(1, 20), "0\n" + number(1, 19), "@@ -1,3 +1,4 @@\n+0\n 1\n 2\n 3\n@@ -17,4 +18,3 @@\n 17\n 18\n 19\n-20\n"},
		{"a missing last line end shows", "a", "a\n", "@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.want
			if want != "" {
				want = "--- f\n+++ f\n" + want
			}
			if d := cmp.Diff(want, unified("f", tt.before, tt.after)); d != "" {
				t.Error(d)
			}
		})
	}
	if got := unified("f", "a\x00", "b"); !strings.HasPrefix(got, "binary") {
		t.Errorf("binary content gives %q", got)
	}
	if got := unified("f", number(1, 5000), number(2, 5001)); !strings.HasPrefix(got, "too long") {
		t.Errorf("long content gives %q", got)
	}
}

func TestClockOffsets(t *testing.T) {
	local := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	sample := func(ahead, took time.Duration) ClockSample {
		// The server's clock, cut to its second, at the middle of the exchange.
		return ClockSample{Source: "s3.example", Sent: local, Received: local.Add(took), Remote: local.Add(took/2 - ahead).Truncate(time.Second), Resolution: time.Second}
	}
	for _, tt := range []struct {
		name           string
		unsynchronized bool
		clocks         []ClockSample
		want           Severity
		code           fault.Code
	}{
		{"synchronized, nothing to compare", false, nil, OK, ""},
		{"synchronized and right", false, []ClockSample{sample(0, time.Second)}, OK, ""},
		{"unsynchronized, nothing to compare", true, nil, Warning, CodeClockUnsynchronized},
		{"unsynchronized but right", true, []ClockSample{sample(time.Second, time.Second)}, Warning, CodeClockUnsynchronized},
		{"an hour ahead", false, []ClockSample{sample(time.Hour, time.Second)}, Failure, CodeClock},
		{"an hour behind", true, []ClockSample{sample(-time.Hour, time.Second)}, Failure, CodeClock},
		{"a slow answer proves nothing", false, []ClockSample{sample(40*time.Second, 60*time.Second)}, OK, ""},
		{"contradicting clocks", false, []ClockSample{sample(time.Hour, time.Second), sample(0, time.Second)}, Warning, CodeClock},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.adjtime = func() (bool, error) { return tt.unsynchronized, nil }
			got := h.checkClock(Requirements{Clocks: tt.clocks}.withDefaults())
			if len(got) != 1 || got[0].Severity != tt.want || got[0].Code != tt.code {
				t.Errorf("got %+v, want %s %s", got, tt.want, tt.code)
			}
		})
	}
	header := http.Header{"Date": {"Wed, 01 Jul 2026 12:00:00 GMT"}}
	if s, err := SampleDate("x", header, local, local); err != nil || !s.Remote.Equal(local) {
		t.Errorf("got %+v, %v", s, err)
	}
	for _, h := range []http.Header{{}, {"Date": {"yesterday"}}, {"Date": header["Date"], "Age": {"60"}}} {
		if _, err := SampleDate("x", h, local, local); err == nil {
			t.Errorf("%v was accepted", h)
		}
	}
}

// goodMachine is the files of a machine that passes.
func goodMachine(t testing.TB) *Host {
	h := newHost(t)
	for name, content := range map[string]string{
		"proc/filesystems":                       "nodev\tproc\n\text4\nnodev\toverlay\n",
		"proc/meminfo":                           "MemTotal:        3884596 kB\nMemFree: 1 kB\n",
		"proc/swaps":                             "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
		"proc/sys/net/bridge/bridge-nf":          "",
		"sys/module/nf_tables/refcnt":            "1\n",
		"sys/module/nf_conntrack/refcnt":         "1\n",
		"sys/kernel/security/lsm":                "capability,landlock,yama",
		"sys/fs/cgroup/cgroup.controllers":       "cpuset cpu io memory hugetlb pids\n",
		"run/dbus/system_bus_socket":             "",
		"run/systemd/system/x":                   "",
		"lib/modules/6.1.0-test/modules.dep":     "kernel/net/bridge/br_netfilter.ko.xz: kernel/net/bridge/bridge.ko.xz\nkernel/net/netfilter/nf-conntrack.ko:\n",
		"lib/modules/6.1.0-test/modules.builtin": "kernel/fs/overlayfs/overlay.ko\n",
	} {
		put(t, h, name, content)
	}
	h.statfs = func(string) (unix.Statfs_t, error) {
		return unix.Statfs_t{Bsize: 4096, Bavail: 8 << 30 / 4096, Files: 1 << 20, Ffree: 1 << 20}, nil
	}
	return h
}

func TestPreflight(t *testing.T) {
	remove := func(name string) func(*testing.T, *Host) {
		return func(t *testing.T, h *Host) {
			if err := os.RemoveAll(filepath.Join(h.Root(), name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	write := func(name, content string) func(*testing.T, *Host) {
		return func(t *testing.T, h *Host) { put(t, h, name, content) }
	}
	kernel := func(machine, release string) func(*testing.T, *Host) {
		return func(_ *testing.T, h *Host) {
			h.uname = func() (string, string, error) { return machine, release, nil }
		}
	}
	all := func(fs ...func(*testing.T, *Host)) func(*testing.T, *Host) {
		return func(t *testing.T, h *Host) {
			for _, f := range fs {
				f(t, h)
			}
		}
	}
	noCgroup2 := remove("sys/fs/cgroup/cgroup.controllers")
	v1 := write("proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t4\t1\t1\ncpu\t2\t1\t1\nmemory\t3\t1\t1\npids\t5\t1\t1\n")
	for _, tt := range []struct {
		name string
		make func(*testing.T, *Host)
		want []string // severity and code of what is not ok
	}{
		{"a good machine", func(*testing.T, *Host) {}, nil},
		{"not root", func(_ *testing.T, h *Host) { h.getuid = func() int { return 1000 } }, []string{"error host-not-root"}},
		{"wrong architecture", kernel("x86_64", "6.1.0-test"), []string{"error host-wrong-architecture"}},
		{"an old kernel", all(kernel("aarch64", "5.10.0-28-arm64"), write("lib/modules/5.10.0-28-arm64/modules.dep", "")), []string{"error host-kernel-too-old"}},
		{"an unreadable version", kernel("aarch64", "linux"), []string{"warning host-kernel-too-old"}},
		{"overlayfs can be loaded", write("proc/filesystems", "nodev\tproc\n"), nil},
		{"no overlayfs at all", all(write("proc/filesystems", ""), write("lib/modules/6.1.0-test/modules.builtin", "")), []string{"error host-kernel-feature-missing"}},
		{"nobody knows about overlayfs", all(write("proc/filesystems", ""), remove("lib/modules")), []string{"warning host-kernel-feature-missing"}},
		{"no Landlock", write("sys/kernel/security/lsm", "capability,yama"), []string{"warning host-kernel-feature-missing"}},
		{"no memory controller", write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu pids"), []string{"error host-cgroups-unusable"}},
		{"version 1 of control groups", all(noCgroup2, v1), []string{"error host-cgroups-unusable"}},
		{"no control groups", noCgroup2, []string{"error host-cgroups-unusable"}},
		{"little memory", write("proc/meminfo", "MemTotal: 900000 kB\n"), []string{"warning host-memory-too-small"}},
		{"hardly any memory", write("proc/meminfo", "MemTotal: 200000 kB\n"), []string{"error host-memory-too-small"}},
		{"swap", write("proc/swaps", "Filename Type Size Used Priority\n/swapfile file 1 0 -2\n"), []string{"warning host-swap-on"}},
		{"no systemd", remove("run/systemd"), []string{"error host-no-systemd"}},
		{"no D-Bus", remove("run/dbus"), []string{"error host-no-systemd"}},
		{"no D-Bus but systemd's own socket", all(remove("run/dbus"), write("run/systemd/private", "")), nil},
		{"a full disk without inodes", func(_ *testing.T, h *Host) {
			h.statfs = func(string) (unix.Statfs_t, error) {
				return unix.Statfs_t{Bsize: 4096, Bavail: 10, Files: 100, Ffree: 10}, nil
			}
		}, []string{"error host-disk-too-full", "error host-disk-too-full"}},
		{"everything at once", all(remove("run"), write("proc/swaps", "F\n/dev/sdb\n"), kernel("x86_64", "4.14.0"), remove("proc/cgroups"), noCgroup2),
			[]string{"error host-wrong-architecture", "error host-kernel-too-old", "error host-cgroups-unusable", "warning host-swap-on", "error host-no-systemd"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := goodMachine(t)
			tt.make(t, h)
			before := snapshot(t, h)
			r, err := h.Preflight(t.Context(), Requirements{Arch: "arm64", MinMemory: MinMemoryServer})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			failures := 0
			for _, f := range r {
				if f.Severity != OK {
					got = append(got, fmt.Sprintf("%s %s", f.Severity, f.Code))
					if f.Remedy == "" || f.Fact == "" {
						t.Errorf("without a fact or remedy: %+v", f)
					}
				}
				if f.Severity == Failure {
					failures++
				}
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("%s\n%+v", d, r)
			}
			if (r.Err() != nil) != (failures > 0) {
				t.Errorf("Err is %v with %d failures", r.Err(), failures)
			}
			if d := cmp.Diff(before, snapshot(t, h)); d != "" {
				t.Errorf("Preflight changed something:\n%s", d)
			}
		})
	}
}

func TestVersion1OfControlGroupsCanBeAllowed(t *testing.T) {
	h := goodMachine(t)
	put(t, h, "proc/cgroups", "cpuset\t4\t1\t1\ncpu\t2\t1\t1\nmemory\t3\t1\t1\npids\t5\t1\t1\n")
	if err := os.Remove(filepath.Join(h.Root(), "sys/fs/cgroup/cgroup.controllers")); err != nil {
		t.Fatal(err)
	}
	got := h.checkCgroups(Requirements{AllowCgroupV1: true})
	if len(got) != 1 || got[0].Severity != Warning {
		t.Errorf("got %+v", got)
	}
}

// This machine, whatever it is: every probe must come to an answer.
func TestPreflightAnswersOnARealMachine(t *testing.T) {
	h, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.Preflight(t.Context(), Requirements{})
	if err != nil {
		t.Fatal(err)
	}
	checks := map[string]bool{}
	for _, f := range r {
		checks[f.Check] = true
		t.Logf("%-8s %-12s %s", f.Severity, f.Check, f.Fact)
		if strings.Contains(f.Fact, "cannot be") && f.Check != "systemd" {
			t.Errorf("no answer: %+v", f)
		}
	}
	if len(checks) != 11 {
		t.Errorf("checks: %v", checks)
	}
}

func kernelHost(t *testing.T) *Host {
	h := goodMachine(t)
	for name, content := range map[string]string{
		"proc/sys/net/ipv4/ip_forward":                "0\n",
		"proc/sys/net/bridge/bridge-nf-call-iptables": "1\n",
		"proc/sys/fs/inotify/max_user_instances":      "128\n",
		"proc/sys/fs/inotify/max_user_watches":        "1048576\n",
		"proc/sys/net/ipv4/ip_local_port_range":       "32768\t60999\n",
		"proc/sys/net/ipv4/conf/eth0.1/forwarding":    "0\n",
	} {
		put(t, h, name, content)
	}
	h.load = func(_ context.Context, name string) error {
		if name == "dummy" {
			put(t, h, "sys/module/dummy/refcnt", "0\n")
			return nil
		}
		return fmt.Errorf("no module %s", name)
	}
	return h
}

func TestKernelIsSetOnceAndSetBack(t *testing.T) {
	h := kernelHost(t)
	k := DefaultKernel().With([]string{"dummy"}, map[string]string{"net.ipv4.ip_local_port_range": "1024 65000", "net.ipv4.conf.eth0/1.forwarding": "1"})
	planned, err := h.PlanKernel(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range planned {
		got = append(got, c.Command)
	}
	want := []string{"modprobe -- dummy", `sysctl -w net.ipv4.ip_forward="1"`, `sysctl -w fs.inotify.max_user_instances="8192"`,
		`sysctl -w net.ipv4.conf.eth0/1.forwarding="1"`, `sysctl -w net.ipv4.ip_local_port_range="1024 65000"`}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	files, err := h.KernelFiles(k)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(files[1].Content); strings.Contains(s, "max_user_watches") || !strings.Contains(s, "net.ipv4.ip_forward = 1\n") {
		t.Errorf("the file would lower a limit or lacks something:\n%s", s)
	}
	done, err := h.ApplyKernel(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(planned, done); d != "" {
		t.Error(d)
	}
	// procfs shows fields with tabs; a file shows what was written.
	put(t, h, "proc/sys/net/ipv4/ip_local_port_range", "1024\t65000\n")
	if again, err := h.ApplyKernel(t.Context(), k); err != nil || len(again) > 0 {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	r, err := h.Remove(t.Context())
	if err != nil || len(r.Sysctls) != 4 {
		t.Errorf("got %+v, %v", r, err)
	}
	if now, _ := h.readSysctl("net.ipv4.ip_forward"); now != "0" {
		t.Errorf("ip_forward is %q after Remove", now)
	}
}

func TestKernelFailuresAreClassifiedAndAllReported(t *testing.T) {
	h := kernelHost(t)
	_, err := h.ApplyKernel(t.Context(), Kernel{Modules: []Module{{Name: "zram"}}, Sysctls: []Sysctl{{Key: "no.such", Value: "1"}, {Key: "net.ipv4.ip_forward", Value: "1"}}})
	for _, want := range []string{"zram", "no.such"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
	if now, _ := h.readSysctl("net.ipv4.ip_forward"); now != "1" {
		t.Error("one failure kept the rest from being done")
	}
	for _, k := range []Kernel{
		{Modules: []Module{{Name: "-r"}}}, {Modules: []Module{{Name: "a b"}}}, {Modules: []Module{{Name: "../x"}}},
		{Sysctls: []Sysctl{{Key: "../../etc/passwd", Value: "1"}}}, {Sysctls: []Sysctl{{Key: "a..b", Value: "1"}}},
		{Sysctls: []Sysctl{{Key: "a.b", Value: "1\nc.d = 2"}}}, {Sysctls: []Sysctl{{Key: "a b", Value: "1"}}},
	} {
		if _, err := h.PlanKernel(t.Context(), k); err == nil {
			t.Errorf("%+v was accepted", k)
		}
	}
}

func TestEveryCodeIsExplained(t *testing.T) {
	source, err := os.ReadFile("codes.go")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[fault.Code]bool{}
	for _, e := range Explanations() {
		if e.Meaning == "" || e.Remedy == "" || explained[e.Code] {
			t.Errorf("%+v", e)
		}
		explained[e.Code] = true
	}
	if n := bytes.Count(source, []byte("fault.Code = ")); n != len(explained) {
		t.Errorf("%d codes, %d explanations", n, len(explained))
	}
}
