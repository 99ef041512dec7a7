package artifact

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/hearth-sh/hearth/test/needs"
	"golang.org/x/sys/unix"
)

func TestFullDisk(t *testing.T) {
	content := randomBytes(large, 40)
	packed := zstandard(t, make([]byte, large), 1<<20)
	tests := []struct {
		name   string
		served []byte
		change func(*Artifact)
		asked  bool // whether it shows only while downloading
		says   string
	}{
		{"known beforehand", content, func(*Artifact) {}, false, "need 6.0 MiB below"},
		{"known beforehand of what is unpacked", packed, func(a *Artifact) {
			a.Format, a.InstalledSHA256, a.InstalledSize = FormatZstd, digestOf(make([]byte, large)), large
		}, false, "need 6.0 MiB below"},
		{"while downloading", content, func(a *Artifact) { a.Size = 0 }, true, "cannot write k3s v1.36.2+k3s1 to "},
		{"while unpacking", packed, func(a *Artifact) {
			a.Format, a.InstalledSHA256 = FormatZstd, digestOf(make([]byte, large))
		}, true, "cannot write "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			needs.Tmpfs(t, dir, "size=4m")
			m := newMirror(t, tt.served)
			a := artifactOf(dir, tt.served, m.URL)
			old := []byte("the old one")
			if err := os.WriteFile(a.Path, old, 0o755); err != nil {
				t.Fatal(err)
			}
			tt.change(&a)
			_, err := fetchOne(t, newFetcher(t), a)
			wantCode(t, err, CodeNoSpace, tt.says, "larger volume")
			if asked := len(m.seen()) > 0; asked != tt.asked {
				t.Errorf("the mirror was asked: %v, want %v", asked, tt.asked)
			}
			// The old file stays and the space is given back.
			if got, err := os.ReadFile(a.Path); err != nil || string(got) != string(old) {
				t.Errorf("the old file is %q, %v", got, err)
			}
			wantNoLeftovers(t, dir)
		})
	}
	t.Run("several together", func(t *testing.T) {
		dir := t.TempDir()
		needs.Tmpfs(t, dir, "size=10m")
		m := newMirror(t, content)
		a, b := artifactOf(dir, content, m.URL), artifactOf(dir, content, m.URL)
		b.Path += "2"
		_, err := newFetcher(t).Fetch(t.Context(), []Artifact{a, b})
		wantCode(t, err, CodeNoSpace, "need 12.0 MiB", "10.0 MiB are free")
		if len(m.seen()) > 0 {
			t.Error("something was downloaded")
		}
		// One after the other had to fit only if the second is there already.
		if _, err := fetchOne(t, newFetcher(t), a); err != nil {
			t.Error(err)
		}
	})
}

func TestReadOnlyDisk(t *testing.T) {
	content := randomBytes(1000, 41)
	m := newMirror(t, content)
	dir := t.TempDir()
	a := artifactOf(dir, content, m.URL)
	present := a
	present.Path = filepath.Join(dir, "present")
	if err := os.WriteFile(present.Path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	needs.Root(t, "mounting a directory")
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		needs.Missing(t, "mounting a directory: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := fetchOne(t, newFetcher(t), a)
	wantCode(t, err, CodeReadOnly, "mount it read-write", dir)
	deep := a
	deep.Path = filepath.Join(dir, "a", "b")
	_, err = fetchOne(t, newFetcher(t), deep)
	wantCode(t, err, CodeReadOnly, "make the directory")
	_, err = fetchOne(t, newFetcher(t, func(o *Options) { o.StateDir = filepath.Join(dir, "state") }), a)
	wantCode(t, err, CodeReadOnly, "make the directory")
	// What is right needs no writing.
	if r, err := fetchOne(t, newFetcher(t), present); err != nil || r.Outcome != OutcomePresent {
		t.Errorf("got %s, %v", r.Outcome, err)
	}
	if len(m.seen()) > 0 {
		t.Error("something was downloaded")
	}
}

func TestSpaceIsReservedBeforehand(t *testing.T) {
	content := randomBytes(large, 42)
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=16m")
	free := func() int64 {
		n, err := freeBytes(dir)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := free()
	var during int64
	m := newMirror(t, content, func(w http.ResponseWriter, r *http.Request, b []byte) {
		during = free()
		serve(w, r, b)
	})
	a := artifactOf(dir, content, m.URL)
	if _, err := fetchOne(t, newFetcher(t), a); err != nil {
		t.Fatal(err)
	}
	if during > before-large {
		t.Errorf("%d bytes were free at the first request and %d before: nothing was reserved", during, before)
	}
}
