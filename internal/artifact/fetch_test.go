package artifact

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// large is more than the buffers of both ends of a connection.
const large = 6 << 20

func TestFetchInstalls(t *testing.T) {
	content := randomBytes(large, 1)
	m := newMirror(t, content)
	a := artifactOf(filepath.Join(t.TempDir(), "usr", "local", "bin"), content, m.URL+"/k3s%2Bk3s1")
	f := newFetcher(t)
	r, err := fetchOne(t, f, a)
	if err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)
	wantNoLeftovers(t, filepath.Join(f.o.StateDir, downloadsName))
	if r.Outcome != OutcomeInstalled || r.Downloaded != large || r.Installed != large || r.Resumed != 0 || r.Mirror != a.URLs[0] {
		t.Errorf("got %+v", r)
	}
	if len(r.CreatedDirs) != 3 || filepath.Base(r.CreatedDirs[0]) != "usr" || r.CreatedDirs[2] != filepath.Dir(a.Path) {
		t.Errorf("created %v, want usr, usr/local and usr/local/bin", r.CreatedDirs)
	}
	if r.Timing.Download <= 0 || r.Timing.Install <= 0 || r.Timing.Total < r.Timing.Download {
		t.Errorf("timing %+v does not add up", r.Timing)
	}

	// Once more: nothing is asked for and nothing changes.
	before, _ := os.Stat(a.Path)
	r, err = fetchOne(t, f, a)
	if err != nil || r.Outcome != OutcomePresent || r.Downloaded != 0 || r.CreatedDirs != nil {
		t.Errorf("the second run did %+v, %v", r, err)
	}
	after, _ := os.Stat(a.Path)
	if !os.SameFile(before, after) || !before.ModTime().Equal(after.ModTime()) {
		t.Error("the second run changed the file")
	}
	if n := len(m.seen()); n != 1 {
		t.Errorf("the mirror was asked %d times, want once", n)
	}
}

// TestFetchSurvivesBadMirrors lists what mirrors do wrong before they, or the
// next one, do it right.
func TestFetchSurvivesBadMirrors(t *testing.T) {
	content := randomBytes(large, 2)
	wrong := randomBytes(large, 3)
	tests := []struct {
		name string
		// first plays before it serves well; only then is the second asked.
		first []act
		// asked is how often each is.
		asked [2]int
		// says is in the account of some failed attempt.
		says string
		// resumes says that not everything was downloaded twice.
		resumes bool
	}{
		{"a connection that breaks is resumed", []act{cut(4 << 20)}, [2]int{2, 0}, "broke off after", true},
		{"many breaks are resumed as long as each gets further", []act{cut(1 << 20), cut(1 << 20), cut(1 << 20), cut(1 << 20), cut(1 << 20)}, [2]int{6, 0}, "broke off", true},
		{"a break before the first byte goes on with the next mirror", []act{cut(0)}, [2]int{1, 1}, "", true},
		{"a mirror that ignores ranges starts again", []act{cut(4 << 20), ignoreRange}, [2]int{2, 0}, "broke off", false},
		{"a mirror whose validator changed starts again", []act{cut(4 << 20), func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("ETag", `"another"`)
			serve(w, r, b)
		}}, [2]int{2, 0}, "broke off", false},
		{"a mirror that answers another range starts again", []act{cut(4 << 20), func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
		}}, [2]int{3, 0}, "broke off", false},
		{"a stalled transfer is given up and resumed", []act{stall(4 << 20)}, [2]int{2, 0}, "stalled", true},
		{"a silent mirror is given up", []act{silent}, [2]int{1, 1}, "stalled", true},
		{"a trickle is a stall", []act{trickle}, [2]int{1, 1}, "stalled", true},
		{"wrong bytes of the right size", always(other(wrong)), [2]int{1, 1}, digestOf(wrong).String(), false},
		{"too many bytes, announced", always(other(append(slices.Clone(content), 0))), [2]int{1, 1}, "announced", true},
		{"too many bytes, not announced", always(func(w http.ResponseWriter, _ *http.Request, b []byte) {
			_, _ = w.Write(b)
			_, _ = w.Write([]byte("more"))
		}), [2]int{1, 1}, "served more than", true},
		{"too few bytes", always(other(content[:4<<20])), [2]int{1, 1}, "announced 4194304 bytes instead of 6291456", true},
		{"a content length that is too long", always(func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:100])
		}), [2]int{1, 1}, "broke off after 100 bytes", true},
		{"a web page", always(page), [2]int{1, 1}, "web page", true},
		{"a web page after a break does not lose what there is", append([]act{cut(4 << 20)}, always(page)...), [2]int{2, 1}, "web page", true},
		{"404", always(status(404)), [2]int{1, 1}, "404 Not Found", true},
		{"403", always(status(403)), [2]int{1, 1}, "403 Forbidden", true},
		{"500", []act{status(500)}, [2]int{1, 1}, "500", true},
		{"503 with Retry-After", []act{status(503, "Retry-After", "1")}, [2]int{1, 1}, "503", true},
		{"429 for longer than anybody waits", always(status(429, "Retry-After", "7200")), [2]int{1, 1}, "2h0m0s", true},
		{"429 until a date long ago", []act{status(429, "Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")}, [2]int{1, 1}, "429", true},
		{"206 that was not asked for", always(func(w http.ResponseWriter, _ *http.Request, b []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
		}), [2]int{1, 1}, "not asked for", true},
		{"a redirect to plain http elsewhere", always(status(302, "Location", "http://192.0.2.1/k3s")), [2]int{1, 1}, "redirects", true},
		{"a redirect to instance metadata", always(status(302, "Location", "http://169.254.169.254/latest/meta-data/")), [2]int{1, 1}, "link-local", true},
		{"a redirect to a file", always(status(302, "Location", "file:///etc/shadow")), [2]int{1, 1}, "redirects where it must not", true},
		{"a redirect in a circle", always(status(302, "Location", "/again")), [2]int{6, 1}, "more than 5 times", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first, second := newMirror(t, content, tt.first...), newMirror(t, content)
			a := artifactOf(t.TempDir(), content, first.URL+"/k3s?X-Amz-Signature=hunter2", second.URL+"/k3s")
			f := newFetcher(t, func(o *Options) {
				if tt.says == "stalled" {
					o.StallTimeout = 3 * time.Second // a busy machine is no stall
				}
			})
			r, err := fetchOne(t, f, a)
			if err != nil {
				t.Fatal(err)
			}
			wantInstalled(t, a, content)
			wantNoLeftovers(t, filepath.Join(f.o.StateDir, downloadsName))
			if asked := [2]int{len(first.seen()), len(second.seen())}; asked != tt.asked {
				t.Errorf("mirrors were asked %v times, want %v: %v", asked, tt.asked, r.Attempts)
			}
			said := fmt.Sprint(r.Attempts)
			if !strings.Contains(said, tt.says) || strings.Contains(said, "hunter2") {
				t.Errorf("attempts were %s, want them to say %q and no secrets", said, tt.says)
			}
			if len(r.Attempts) == 0 {
				t.Error("no failed attempt was recorded")
			}
			// Buffers that were in flight may come twice.
			if resumed := r.Downloaded <= large+4*bufferSize; resumed != tt.resumes {
				t.Errorf("downloaded %d bytes of a file of %d, want resuming %v", r.Downloaded, large, tt.resumes)
			}
		})
	}
}

func TestResumingAsksForTheRestOfTheSameVersion(t *testing.T) {
	content := randomBytes(large, 4)
	for _, etag := range []string{`"strong"`, `W/"weak"`, ""} {
		m := newMirror(t, content, cut(3<<20))
		m.etag = etag
		a := artifactOf(t.TempDir(), content, m.URL)
		if _, err := fetchOne(t, newFetcher(t), a); err != nil {
			t.Fatal(err)
		}
		wantInstalled(t, a, content)
		again := m.seen()[1].Header
		if !strings.HasPrefix(again.Get("Range"), "bytes=") || again.Get("Accept-Encoding") != "identity" {
			t.Errorf("asked again with %v", again)
		}
		want := etag
		if strings.HasPrefix(etag, "W/") {
			want = "" // RFC 9110 forbids it
		}
		if got := again.Get("If-Range"); got != want {
			t.Errorf("with ETag %s If-Range is %q, want %q", etag, got, want)
		}
	}
}

// TestPoisonedBeginningIsNotTheNextMirrorsFault has a mirror give wrong bytes
// and break; the next one continues them in good faith.
func TestPoisonedBeginningIsNotTheNextMirrorsFault(t *testing.T) {
	content, wrong := randomBytes(large, 5), randomBytes(large, 6)
	first := newMirror(t, content, append([]act{func(w http.ResponseWriter, r *http.Request, _ []byte) { cut(4<<20)(w, r, wrong) }}, always(status(404))...)...)
	second := newMirror(t, content)
	a := artifactOf(t.TempDir(), content, first.URL, second.URL)
	r, err := fetchOne(t, newFetcher(t), a)
	if err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)
	if n := len(second.seen()); n != 2 {
		t.Errorf("the good mirror was asked %d times, want for the rest and then for all: %v", n, r.Attempts)
	}
}

func TestFailureNamesEachMirrorAndWhatWasWrong(t *testing.T) {
	content := randomBytes(1000, 7)
	gone := newMirror(t, content)
	gone.Close()
	missingOne, wrongOne := newMirror(t, content, always(status(404))...), newMirror(t, content, always(other(randomBytes(1000, 8)))...)
	tests := []struct {
		name      string
		urls      []string
		code      fault.Code
		transient bool
		says      []string
	}{
		{"not found anywhere", []string{missingOne.URL + "/a", missingOne.URL + "/b"}, CodeNotFound, false, []string{"any of its 2 mirrors", "/a: it answered 404 Not Found", "/b: it answered 404 Not Found"}},
		{"nobody there", []string{gone.URL}, CodeUnreachable, true, []string{gone.URL, "connection refused"}},
		{"wrong bytes are the news", []string{gone.URL, missingOne.URL, wrongOne.URL + "/x?secret=hunter2"}, CodeDigestMismatch, false, []string{"connection refused", "404", wrongOne.URL + "/x: its bytes are not those pinned"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFetcher(t)
			a := artifactOf(t.TempDir(), content, tt.urls...)
			r, err := fetchOne(t, f, a)
			wantCode(t, err, tt.code, tt.says...)
			if fault.IsTransient(err) != tt.transient || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("transient is %v, want %v: %v", fault.IsTransient(err), tt.transient, err)
			}
			if r.Outcome != OutcomeFailed {
				t.Errorf("outcome is %s", r.Outcome)
			}
			wantAbsent(t, a.Path)
			wantNoLeftovers(t, filepath.Dir(a.Path), filepath.Join(f.o.StateDir, downloadsName))
		})
	}
}

func TestOneFailureDoesNotStopTheOthers(t *testing.T) {
	content := randomBytes(large, 9)
	m := newMirror(t, content)
	bad := newMirror(t, content, always(status(404))...)
	dir := t.TempDir()
	artifacts := make([]Artifact, 6)
	for i := range artifacts {
		artifacts[i] = artifactOf(dir, content, m.URL)
		artifacts[i].Path = filepath.Join(dir, fmt.Sprint(i))
	}
	artifacts[2].URLs = []string{bad.URL}
	results, err := newFetcher(t, func(o *Options) { o.Parallel = 3 }).Fetch(t.Context(), artifacts)
	wantCode(t, err, CodeNotFound)
	for i, r := range results {
		if want := map[bool]Outcome{true: OutcomeFailed, false: OutcomeInstalled}[i == 2]; r.Outcome != want {
			t.Errorf("artifact %d: %s, want %s", i, r.Outcome, want)
		}
		if i != 2 {
			wantInstalled(t, artifacts[i], content)
		}
	}
}

func TestWhatIsThereIsBelievedOnlyByItsDigest(t *testing.T) {
	content := randomBytes(10000, 10)
	tampered := slices.Clone(content)
	tampered[5000] ^= 1
	tests := []struct {
		name    string
		put     func(path string) error
		state   State
		outcome Outcome
		asked   int
	}{
		{"the right file", func(p string) error { return os.WriteFile(p, content, 0o755) }, StatePresent, OutcomePresent, 0},
		{"one flipped bit", func(p string) error { return os.WriteFile(p, tampered, 0o755) }, StateDiffers, OutcomeReplaced, 1},
		{"half a file", func(p string) error { return os.WriteFile(p, content[:5000], 0o755) }, StateDiffers, OutcomeReplaced, 1},
		{"another mode", func(p string) error { return os.WriteFile(p, content, 0o644) }, StateAttributes, OutcomeRepaired, 0},
		{"set-user-id", func(p string) error {
			return errors.Join(os.WriteFile(p, content, 0o755), os.Chmod(p, 0o755|os.ModeSetuid))
		}, StateAttributes, OutcomeRepaired, 0},
		{"a symbolic link to the right file", func(p string) error {
			return errors.Join(os.WriteFile(p+".real", content, 0o755), os.Symlink(p+".real", p))
		}, StateDiffers, OutcomeReplaced, 1},
		{"a link to nowhere", func(p string) error { return os.Symlink("/nonexistent", p) }, StateDiffers, OutcomeReplaced, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMirror(t, content)
			a := artifactOf(t.TempDir(), content, m.URL)
			if err := tt.put(a.Path); err != nil {
				t.Fatal(err)
			}
			f := newFetcher(t)
			statuses, err := f.Inspect(t.Context(), []Artifact{a})
			if err != nil || statuses[0].State != tt.state || (statuses[0].Reason == "") != (tt.state == StatePresent) {
				t.Errorf("Inspect found %+v, %v, want %s", statuses, err, tt.state)
			}
			if want := int64(tt.asked * len(content)); statuses[0].Download != want {
				t.Errorf("Inspect would download %d, want %d", statuses[0].Download, want)
			}
			r, err := fetchOne(t, f, a)
			if err != nil || r.Outcome != tt.outcome {
				t.Errorf("got %s, %v, want %s", r.Outcome, err, tt.outcome)
			}
			wantInstalled(t, a, content)
			if n := len(m.seen()); n != tt.asked {
				t.Errorf("the mirror was asked %d times, want %d", n, tt.asked)
			}
		})
	}
	t.Run("a directory is not replaced", func(t *testing.T) {
		a := artifactOf(t.TempDir(), content, newMirror(t, content).URL)
		if err := os.Mkdir(a.Path, 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := fetchOne(t, newFetcher(t), a)
		wantCode(t, err, CodeDisk, "remove what is in its place")
	})
}

func TestInspectTouchesNothing(t *testing.T) {
	content := randomBytes(1000, 11)
	m := newMirror(t, content)
	root := t.TempDir()
	a := artifactOf(filepath.Join(root, "opt", "bin"), content, m.URL)
	f := newFetcher(t, func(o *Options) { o.StateDir = filepath.Join(root, "state") })
	s, err := f.Inspect(t.Context(), []Artifact{a})
	if err != nil {
		t.Fatal(err)
	}
	if s[0].State != StateMissing || s[0].Download != 1000 || len(s[0].CreateDirs) != 2 {
		t.Errorf("got %+v", s[0])
	}
	if entries, _ := os.ReadDir(root); len(entries) != 0 || len(m.seen()) != 0 {
		t.Errorf("Inspect left %v and asked %d times", entries, len(m.seen()))
	}
}

func TestUnfinishedDownloadGoesOnInTheNextRun(t *testing.T) {
	content := randomBytes(large, 12)
	packed, unpacked := gzipped(t, content), content
	for _, format := range []Format{FormatRaw, FormatGzip} {
		served := map[Format][]byte{FormatRaw: content, FormatGzip: packed}[format]
		newArtifact := func(t *testing.T, m *mirror) Artifact {
			a := artifactOf(t.TempDir(), served, m.URL)
			if a.Format = format; format != FormatRaw {
				a.InstalledSHA256, a.InstalledSize = sha256.Sum256(unpacked), large
			}
			return a
		}
		// interrupt runs until 4 MiB are there.
		interrupt := func(t *testing.T, a Artifact, f *Fetcher) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			f.o.Progress = func(e Event) {
				if e.Phase == PhaseDownload && e.Bytes >= 3<<20 {
					cancel()
				}
			}
			defer func() { f.o.Progress = nil }()
			time.AfterFunc(20*time.Second, cancel)
			_, err := f.Fetch(ctx, []Artifact{a})
			wantCode(t, err, CodeInterrupted, "goes on where it stopped")
			wantAbsent(t, a.Path)
		}
		slowEnd := func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:2<<20])
			_ = http.NewResponseController(w).Flush()
			for i := 2 << 20; i < 4<<20; i += 256 << 10 {
				time.Sleep(ProgressInterval / 4) // so that events are sent
				_, _ = w.Write(b[i : i+256<<10])
				_ = http.NewResponseController(w).Flush()
			}
			<-r.Context().Done()
		}
		tests := []struct {
			name string
			// meanwhile happens between the runs.
			meanwhile func(t *testing.T, f *Fetcher, m *mirror, a *Artifact)
			resumes   bool
			asked     int
		}{
			{"resumed", nil, true, 2},
			{"changed at the mirror", func(_ *testing.T, _ *Fetcher, m *mirror, _ *Artifact) { m.etag = `"other"` }, false, 2},
			{"tampered with", func(t *testing.T, f *Fetcher, _ *mirror, a *Artifact) {
				path := (&stateDir{path: f.o.StateDir}).partPath(a)
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				b[1000] ^= 1
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}, false, 3},
			{"readable by others", func(t *testing.T, f *Fetcher, _ *mirror, a *Artifact) {
				if err := os.Chmod((&stateDir{path: f.o.StateDir}).partPath(a), 0o666); err != nil {
					t.Fatal(err)
				}
			}, false, 2},
			{"record lost", func(t *testing.T, f *Fetcher, _ *mirror, a *Artifact) {
				if err := os.WriteFile((&stateDir{path: f.o.StateDir}).recordPath(key(a)), []byte("{"), 0o600); err != nil {
					t.Fatal(err)
				}
			}, true, 2},
			{"complete already", func(t *testing.T, f *Fetcher, _ *mirror, a *Artifact) {
				if err := os.WriteFile((&stateDir{path: f.o.StateDir}).partPath(a), served, 0o600); err != nil {
					t.Fatal(err)
				}
			}, true, 1},
			{"complete already, of unknown size", func(t *testing.T, f *Fetcher, _ *mirror, a *Artifact) {
				a.Size = 0
				if err := os.WriteFile((&stateDir{path: f.o.StateDir}).partPath(a), served, 0o600); err != nil {
					t.Fatal(err)
				}
			}, true, 2},
		}
		for _, tt := range tests {
			t.Run(string(format)+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				m := newMirror(t, served, slowEnd)
				a := newArtifact(t, m)
				f := newFetcher(t)
				interrupt(t, a, f)
				if tt.meanwhile != nil {
					tt.meanwhile(t, f, m, &a)
				}
				if tt.resumes && a.Size > 0 {
					s, err := f.Inspect(t.Context(), []Artifact{a})
					if err != nil || s[0].Resumable < 2<<20 || s[0].Download+s[0].Resumable != a.Size {
						t.Errorf("Inspect says %+v, %v", s, err)
					}
				}
				r, err := fetchOne(t, f, a)
				if err != nil {
					t.Fatal(err)
				}
				wantInstalled(t, a, unpacked)
				wantNoLeftovers(t, filepath.Join(f.o.StateDir, downloadsName))
				if (r.Resumed > 0) != tt.resumes || len(m.seen()) != tt.asked {
					t.Errorf("resumed %d bytes after asking %d times, want resuming %v and %d", r.Resumed, len(m.seen()), tt.resumes, tt.asked)
				}
				if tt.resumes && r.Downloaded+r.Resumed != int64(len(served)) {
					t.Errorf("resumed %d and downloaded %d of %d", r.Resumed, r.Downloaded, len(served))
				}
			})
		}
	}
}

func gzipped(t testing.TB, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestLeftoversOfDeadRunsAreRemoved(t *testing.T) {
	content := randomBytes(1000, 13)
	m := newMirror(t, content)
	a := artifactOf(t.TempDir(), content, m.URL)
	elsewhere := t.TempDir()
	f := newFetcher(t)
	state, err := f.openState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gone := a
	gone.Path = filepath.Join(elsewhere, "shim")
	if err := state.writeRecord(key(&gone), record{Dir: elsewhere}); err != nil {
		t.Fatal(err)
	}
	state.close()
	dead := []string{
		filepath.Join(elsewhere, tempPrefix+key(&gone)+partSuffix),
		filepath.Join(elsewhere, tempPrefix+key(&gone)+tempSuffix),
		filepath.Join(filepath.Dir(a.Path), tempPrefix+strings.Repeat("0", 32)+partSuffix),
		filepath.Join(f.o.StateDir, downloadsName, tempPrefix+strings.Repeat("0", 32)+partSuffix),
	}
	alive := []string{
		filepath.Join(elsewhere, "shim"),
		filepath.Join(elsewhere, ".hearth-notes"),
		filepath.Join(filepath.Dir(a.Path), ".hearth-abc.part"),
	}
	for _, path := range slices.Concat(dead, alive) {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := fetchOne(t, f, a); err != nil {
		t.Fatal(err)
	}
	for _, path := range dead {
		wantAbsent(t, path)
	}
	for _, path := range alive {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("a file that is not ours is gone: %v", err)
		}
	}
	wantAbsent(t, state.recordPath(key(&gone)))
}

func TestNothingIsExecutableBeforeItIsVerified(t *testing.T) {
	content := randomBytes(large, 14)
	m := newMirror(t, content, func(w http.ResponseWriter, r *http.Request, b []byte) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		for i := 0; i < len(b); i += 1 << 20 {
			_, _ = w.Write(b[i : i+1<<20])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(ProgressInterval / 2)
		}
	})
	a := artifactOf(t.TempDir(), content, m.URL)
	looked := 0
	f := newFetcher(t, func(o *Options) {
		o.Progress = func(e Event) {
			if e.Phase != PhaseDownload && e.Phase != PhaseInstall {
				return
			}
			entries, _ := os.ReadDir(filepath.Dir(a.Path))
			for _, entry := range entries {
				info, err := entry.Info()
				if err == nil {
					looked++
					if info.Mode() != 0o600 || entry.Name() == filepath.Base(a.Path) {
						t.Errorf("%s has mode %v in phase %s", entry.Name(), info.Mode(), e.Phase)
					}
				}
			}
		}
	})
	if _, err := fetchOne(t, f, a); err != nil {
		t.Fatal(err)
	}
	if looked == 0 {
		t.Error("no unfinished file was seen")
	}
	wantInstalled(t, a, content)
}

func TestProgressIsToldInOrderAndNotTooOften(t *testing.T) {
	content := randomBytes(large, 15)
	m := newMirror(t, content, status(500))
	a := artifactOf(t.TempDir(), content, m.URL)
	var mu sync.Mutex
	var phases []Phase
	events := 0
	f := newFetcher(t, func(o *Options) {
		o.Progress = func(e Event) {
			if !mu.TryLock() {
				t.Error("two events at once")
				return
			}
			defer mu.Unlock()
			events++
			if len(phases) == 0 || phases[len(phases)-1] != e.Phase {
				phases = append(phases, e.Phase)
			}
			if e.Name != a.Name || e.Version != a.Version || e.Total > 0 && e.Bytes > e.Total || (e.Err != nil) != (e.Phase == PhaseRetry) {
				t.Errorf("odd event %+v", e)
			}
		}
	})
	if _, err := fetchOne(t, f, a); err != nil {
		t.Fatal(err)
	}
	if want := []Phase{PhaseCheck, PhaseDownload, PhaseRetry, PhaseInstall, PhaseDone}; !slices.Equal(phases, want) && !slices.Equal(phases, slices.Insert(slices.Clone(want), 3, PhaseDownload)) {
		t.Errorf("phases were %v", phases)
	}
	if events > 30 {
		t.Errorf("%d events for one small file", events)
	}
}

func TestTheWholeHasADeadline(t *testing.T) {
	content := randomBytes(large, 16)
	m := newMirror(t, content, always(trickle)...)
	a := artifactOf(t.TempDir(), content, m.URL)
	began := time.Now()
	_, err := fetchOne(t, newFetcher(t, func(o *Options) { o.Timeout = 300 * time.Millisecond }), a)
	wantCode(t, err, CodeTimeout, "ran out", "while downloading it")
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	wantAbsent(t, a.Path)
}

func TestTwoRunsExcludeEachOther(t *testing.T) {
	content := randomBytes(1000, 17)
	m := newMirror(t, content)
	f := newFetcher(t)
	state, err := f.openState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = f.Fetch(ctx, []Artifact{artifactOf(t.TempDir(), content, m.URL)})
	wantCode(t, err, CodeBusy)
	if !fault.IsTransient(err) {
		t.Error("that another run is busy passes")
	}
	state.close()
	if _, err := fetchOne(t, f, artifactOf(t.TempDir(), content, m.URL)); err != nil {
		t.Error(err)
	}
}

func TestConcurrentFetchersOfOneMachine(t *testing.T) {
	content := randomBytes(large, 18)
	m := newMirror(t, content)
	dir, state := t.TempDir(), t.TempDir()
	var wg sync.WaitGroup
	for range 4 {
		f := newFetcher(t, func(o *Options) { o.StateDir = state })
		wg.Go(func() {
			if _, err := fetchOne(t, f, artifactOf(dir, content, m.URL)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(m.seen()); n != 1 {
		t.Errorf("the mirror was asked %d times, want once", n)
	}
}

func TestHTTPSOnlyWithValidCertificates(t *testing.T) {
	content := randomBytes(1000, 19)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serve(w, r, content) })
	secure := httptest.NewTLSServer(handler)
	defer secure.Close()
	plain := httptest.NewServer(handler)
	defer plain.Close()
	down := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	defer down.Close()
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	trusting := func(o *Options) { o.RootCAs = roots }

	a := artifactOf(t.TempDir(), content, secure.URL)
	_, err := fetchOne(t, newFetcher(t), a)
	wantCode(t, err, CodeUnreachable, "certificate")
	if fault.IsTransient(err) {
		t.Error("a certificate does not become valid by waiting")
	}
	_, err = fetchOne(t, newFetcher(t, trusting), a)
	if err != nil {
		t.Error(err)
	}
	wantInstalled(t, a, content)
	_, err = fetchOne(t, newFetcher(t, trusting), artifactOf(t.TempDir(), content, down.URL))
	wantCode(t, err, CodeUnreachable, "from https to http://")
	_, err = fetchOne(t, newFetcher(t), artifactOf(t.TempDir(), content, "http://192.0.2.1/k3s"))
	wantCode(t, err, CodeInvalid, "http:// is for this machine only")
	_, err = fetchOne(t, newFetcher(t), artifactOf(t.TempDir(), content, "https://169.254.169.254/k3s"))
	wantCode(t, err, CodeInvalid, "link-local")
}

func TestProxies(t *testing.T) {
	content := randomBytes(1000, 20)
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		serve(w, r, content)
	}))
	defer proxy.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("http_proxy", proxy.URL)
	t.Setenv("NO_PROXY", "")
	t.Setenv("no_proxy", "")
	f := newFetcher(t, func(o *Options) { o.AllowHTTP = true })
	a := artifactOf(t.TempDir(), content, "http://mirror.invalid/k3s")
	if _, err := fetchOne(t, f, a); err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)
	if !slices.Equal(asked, []string{"http://mirror.invalid/k3s"}) {
		t.Errorf("the proxy was asked for %v", asked)
	}
	transport := f.client.Transport.(*http.Transport)
	for _, host := range []string{"169.254.169.254", "[fe80::1]", "[fd00:ec2::254]"} {
		if p, err := transport.Proxy(&http.Request{URL: &url.URL{Scheme: "http", Host: host}}); p != nil || err != nil {
			t.Errorf("%s would be asked through %v, %v", host, p, err)
		}
	}
}

func TestOtherPlatformsAreRefused(t *testing.T) {
	elf := func(machine byte) []byte {
		b := randomBytes(1000, 21)
		copy(b, "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00")
		b[18], b[19] = machine, 0
		return b
	}
	arm := func(o *Options) { o.Platform = "linux/arm64" }
	t.Run("by the definition", func(t *testing.T) {
		a := artifactOf(t.TempDir(), elf(183), "https://mirror.invalid/k3s")
		a.OS, a.Arch = "linux", "amd64"
		_, err := fetchOne(t, newFetcher(t, arm), a)
		wantCode(t, err, CodePlatform, "is for linux/amd64, but this machine is linux/arm64")
	})
	t.Run("by the program itself", func(t *testing.T) {
		content := elf(62)
		m := newMirror(t, content)
		a := artifactOf(t.TempDir(), content, m.URL)
		_, err := fetchOne(t, newFetcher(t, arm), a)
		wantCode(t, err, CodePlatform, "ELF machine 62")
		wantAbsent(t, a.Path)
		wantNoLeftovers(t, filepath.Dir(a.Path))
	})
	t.Run("the right one is not", func(t *testing.T) {
		content := elf(183)
		a := artifactOf(t.TempDir(), content, newMirror(t, content).URL)
		if _, err := fetchOne(t, newFetcher(t, arm), a); err != nil {
			t.Error(err)
		}
	})
}

func TestFilesOfThisMachine(t *testing.T) {
	content := randomBytes(large, 23)
	dir := t.TempDir()
	source := filepath.Join(dir, "k3s arm64")
	if err := os.WriteFile(source, content, 0o600); err != nil {
		t.Fatal(err)
	}
	u := (&url.URL{Scheme: "file", Path: source}).String()
	a := artifactOf(filepath.Join(dir, "bin"), content, u)
	if _, err := fetchOne(t, newFetcher(t), a); err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)

	t.Run("continue what a mirror began", func(t *testing.T) {
		m := newMirror(t, content, append([]act{cut(4 << 20)}, always(status(404))...)...)
		a := artifactOf(t.TempDir(), content, m.URL, u)
		r, err := fetchOne(t, newFetcher(t), a)
		if err != nil || r.Downloaded > large+4*bufferSize {
			t.Errorf("%d bytes, %v", r.Downloaded, err)
		}
		wantInstalled(t, a, content)
	})
	t.Run("are missing or none", func(t *testing.T) {
		a := artifactOf(t.TempDir(), content, "file:///nonexistent/k3s", "file://"+filepath.Dir(a.Path))
		_, err := fetchOne(t, newFetcher(t), a)
		wantCode(t, err, CodeNotFound, "no such file", "not a regular file")
	})
	t.Run("are shorter than what was begun", func(t *testing.T) {
		short := filepath.Join(t.TempDir(), "short")
		if err := os.WriteFile(short, content[:1000], 0o600); err != nil {
			t.Fatal(err)
		}
		m := newMirror(t, content, cut(4<<20))
		a := artifactOf(t.TempDir(), content, m.URL, "file://"+short)
		a.Size = 0
		if _, err := fetchOne(t, newFetcher(t), a); err != nil {
			t.Error(err)
		}
	})
}

func TestSizeBoundHoldsWithoutSize(t *testing.T) {
	content := randomBytes(large, 22)
	endless := newMirror(t, content, always(func(w http.ResponseWriter, r *http.Request, b []byte) {
		for r.Context().Err() == nil {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})...)
	a := artifactOf(t.TempDir(), content, endless.URL)
	a.Size = 0
	r, err := fetchOne(t, newFetcher(t, func(o *Options) { o.MaxSize = 8 << 20 }), a)
	wantCode(t, err, CodeDigestMismatch, "served more than 8388608 bytes")
	if r.Downloaded > 9<<20 {
		t.Errorf("%d bytes were read", r.Downloaded)
	}
	if !errors.Is(r.Err, err) {
		t.Error("the result has another error")
	}
}
