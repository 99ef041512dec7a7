package artifact

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

func zstandard(t testing.TB, content []byte, window int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithWindowSize(window))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entry is a member of an archive.
type entry struct {
	name     string
	typeflag byte
	content  []byte
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.typeflag, Mode: 0o755, Size: int64(len(e.content))}
		if e.typeflag == tar.TypeSymlink || e.typeflag == tar.TypeLink {
			h.Linkname, h.Size = "/etc/shadow", 0
		}
		if err := errors.Join(w.WriteHeader(h)); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFetchUnpacks(t *testing.T) {
	content := slices.Concat(randomBytes(large, 30), bytes.Repeat([]byte("shim"), large/4))
	archive := tarOf(t,
		entry{"README.md", tar.TypeReg, []byte("read me")},
		entry{"bin/", tar.TypeDir, nil},
		entry{"./containerd-shim-spin-v2", tar.TypeReg, content},
		entry{"LICENSE", tar.TypeReg, randomBytes(large, 31)})
	const member = "containerd-shim-spin-v2"
	tests := []struct {
		name   string
		format Format
		member string
		served []byte
	}{
		{"gzip", FormatGzip, "", gzipped(t, content)},
		{"zstd", FormatZstd, "", zstandard(t, content, 8<<20)},
		{"zstd with the window of k3s's images", FormatZstd, "", zstandard(t, content, 32<<20)},
		{"tar", FormatTar, member, archive},
		{"tar+gzip", FormatTarGzip, member, gzipped(t, archive)},
		{"tar+zstd", FormatTarZstd, member, zstandard(t, archive, 8<<20)},
		{"several gzip members in a row", FormatGzip, "", slices.Concat(gzipped(t, content[:large]), gzipped(t, content[large:]))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, known := range []bool{true, false} {
				// A break and a mirror that starts again have it unpack twice.
				m := newMirror(t, tt.served, cut(len(tt.served)/3), cut(len(tt.served)/3), ignoreRange)
				a := artifactOf(t.TempDir(), tt.served, m.URL)
				a.Format, a.Member, a.InstalledSHA256 = tt.format, tt.member, sha256.Sum256(content)
				if known {
					a.InstalledSize = int64(len(content))
				} else {
					a.Size = 0
				}
				f := newFetcher(t)
				r, err := fetchOne(t, f, a)
				if err != nil {
					t.Fatal(err)
				}
				wantInstalled(t, a, content)
				wantNoLeftovers(t, filepath.Join(f.o.StateDir, downloadsName))
				if r.Installed != int64(len(content)) {
					t.Errorf("says that %d bytes were installed", r.Installed)
				}
				if r, err = fetchOne(t, f, a); err != nil || r.Outcome != OutcomePresent {
					t.Errorf("the second run: %s, %v", r.Outcome, err)
				}
			}
		})
	}
}

func TestMeasureFillsInWhatFetchNeeds(t *testing.T) {
	content := randomBytes(1<<20, 36)
	archive := tarOf(t, entry{"bin/shim", tar.TypeReg, content}, entry{"LICENSE", tar.TypeReg, randomBytes(3<<20, 37)})
	for format, served := range map[Format][]byte{
		"": content, FormatRaw: content, FormatGzip: gzipped(t, content), FormatZstd: zstandard(t, content, 1<<20),
		FormatTar: archive, FormatTarGzip: gzipped(t, archive), FormatTarZstd: zstandard(t, archive, 1<<20),
	} {
		a := Artifact{Name: "shim", URLs: []string{newMirror(t, served).URL}, Format: format, Path: filepath.Join(t.TempDir(), "shim")}
		if format.tar() {
			a.Member = "bin/shim"
		}
		if err := a.Measure(t.Context(), bytes.NewReader(served)); err != nil {
			t.Fatal(err)
		}
		if a.Size != int64(len(served)) || a.installedSize() != int64(len(content)) {
			t.Errorf("%s: sizes %d and %d", format, a.Size, a.InstalledSize)
		}
		if _, err := fetchOne(t, newFetcher(t), a); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		wantInstalled(t, a, content)
	}
	a := Artifact{Name: "shim", Format: FormatTar, Member: "nothing"}
	if err := a.Measure(t.Context(), bytes.NewReader(archive)); err == nil || a.Size != 0 {
		t.Errorf("got %v", err)
	}
}

func TestUnpackingFailuresAreNotTheMirrorsFault(t *testing.T) {
	content := randomBytes(large, 32)
	bomb := zstandard(t, make([]byte, 64<<20), 8<<20)
	archive := tarOf(t, entry{"a", tar.TypeReg, content}, entry{"link", tar.TypeSymlink, nil}, entry{"hard", tar.TypeLink, nil}, entry{"../../etc/passwd", tar.TypeReg, content})
	packed := gzipped(t, content)
	tests := []struct {
		name   string
		served []byte
		change func(*Artifact)
		says   string
	}{
		{"not gzip at all", content, func(a *Artifact) { a.Format = FormatGzip }, "not in gzip's format"},
		{"not zstd at all", content, func(a *Artifact) { a.Format = FormatZstd }, "cannot be unpacked"},
		{"not tar at all", content, func(a *Artifact) { a.Format, a.Member = FormatTar, "a" }, "not a tar archive"},
		{"truncated gzip", packed[:len(packed)/2], func(a *Artifact) { a.Format = FormatGzip }, "unexpected EOF"},
		{"no such member", archive, func(a *Artifact) { a.Format, a.Member = FormatTar, "b" }, `no member "b"`},
		{"a symbolic link", archive, func(a *Artifact) { a.Format, a.Member = FormatTar, "link" }, "not a regular file"},
		{"a hard link", archive, func(a *Artifact) { a.Format, a.Member = FormatTar, "hard" }, "not a regular file"},
		{"another digest", packed, func(a *Artifact) { a.Format, a.InstalledSHA256[0] = FormatGzip, a.InstalledSHA256[0]^1 }, "with digest " + digestOf(content).String()},
		{"another size", packed, func(a *Artifact) { a.Format, a.InstalledSize = FormatGzip, large+1 }, "unpacks to 6291456 bytes"},
		{"more than pinned", packed, func(a *Artifact) { a.Format, a.InstalledSize = FormatGzip, large-1 }, "more bytes than it may"},
		{"a bomb", bomb, func(a *Artifact) { a.Format = FormatZstd }, "more bytes than it may"},
		{"a window larger than the memory for it", zstandard(t, content, 64<<20), func(a *Artifact) { a.Format = FormatZstd }, "window"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first, second := newMirror(t, tt.served), newMirror(t, tt.served)
			a := artifactOf(t.TempDir(), tt.served, first.URL, second.URL)
			a.InstalledSHA256 = sha256.Sum256(content)
			tt.change(&a)
			f := newFetcher(t, func(o *Options) { o.MaxSize = 16 << 20 })
			_, err := fetchOne(t, f, a)
			wantCode(t, err, CodeUnpack, tt.says)
			if len(second.seen()) != 0 {
				t.Error("another mirror was asked for what is right already")
			}
			wantAbsent(t, a.Path)
			wantNoLeftovers(t, filepath.Dir(a.Path), filepath.Join(f.o.StateDir, downloadsName))
		})
	}
}

func TestHostileArchiveOfAMirrorIsTheMirrorsFault(t *testing.T) {
	content := randomBytes(large, 33)
	served := gzipped(t, content)
	first := newMirror(t, served, always(func(w http.ResponseWriter, r *http.Request, b []byte) {
		serve(w, r, randomBytes(len(b), 34))
	})...)
	second := newMirror(t, served)
	a := artifactOf(t.TempDir(), served, first.URL, second.URL)
	a.Format, a.InstalledSHA256 = FormatGzip, sha256.Sum256(content)
	r, err := fetchOne(t, newFetcher(t), a)
	if err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)
	if len(r.Attempts) != 1 || !strings.Contains(r.Attempts[0].Err.Error(), "not those pinned") {
		t.Errorf("attempts: %v", r.Attempts)
	}
}

func TestZstdDownloadsTakeTurns(t *testing.T) {
	content := randomBytes(large, 35)
	served := zstandard(t, content, 1<<20)
	dir := t.TempDir()
	var artifacts []Artifact
	for i := range 4 {
		m := newMirror(t, served, func(w http.ResponseWriter, r *http.Request, b []byte) {
			time.Sleep(20 * time.Millisecond)
			serve(w, r, b)
		})
		a := artifactOf(dir, served, m.URL)
		a.Format, a.InstalledSHA256, a.Path = FormatZstd, sha256.Sum256(content), filepath.Join(dir, string(rune('a'+i)))
		artifacts = append(artifacts, a)
	}
	if _, err := newFetcher(t).Fetch(t.Context(), artifacts); err != nil {
		t.Fatal(err, fault.CodeOf(err))
	}
	for _, a := range artifacts {
		wantInstalled(t, a, content)
	}
}
