package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// childFetch runs a Fetch in a process of its own; kill it at any time.
func childFetch(t testing.TB, ctx context.Context, job fetchJob) (fetchReport, error) {
	t.Helper()
	in, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), childEnvironment+"=fetch", "GORACE=atexit_sleep_ms=0")
	cmd.Stdin = bytes.NewReader(in)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var report fetchReport
	if err == nil {
		err = json.Unmarshal(out, &report)
	}
	return report, err
}

// TestKilledAtAnyInstant kills a run with SIGKILL over and over, each time a
// bit later, until one gets through. At no time is anything half-installed,
// executable or lost, and at the end nothing is left over.
func TestKilledAtAnyInstant(t *testing.T) {
	size := 24 << 20
	if raceDetector {
		size = 6 << 20
	}
	content := randomBytes(size, 50)
	archive := gzipped(t, tarOf(t, entry{"bin/shim", '0', content}))
	slowly := func(w http.ResponseWriter, r *http.Request, b []byte) {
		serve(&slowWriter{w, r.Context()}, r, b)
	}
	dir := t.TempDir()
	raw := artifactOf(dir, content, newMirror(t, content, always(slowly)...).URL)
	packed := artifactOf(dir, archive, newMirror(t, archive, always(slowly)...).URL)
	packed.Path, packed.Format, packed.Member = filepath.Join(dir, "shim"), FormatTarGzip, "bin/shim"
	packed.InstalledSHA256 = sha256.Sum256(content)
	job := fetchJob{StateDir: filepath.Join(t.TempDir(), "state"), Artifacts: []Artifact{raw, packed}}
	old := []byte("the old one")
	if err := os.WriteFile(packed.Path, old, 0o755); err != nil {
		t.Fatal(err)
	}

	var resumed int64
	killed := 0
	for wait := 20 * time.Millisecond; ; wait += wait / 3 {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		report, err := childFetch(t, ctx, job)
		cancel()
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			info, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case tempName.MatchString(e.Name()):
				// The right mode is set after verifying, a moment before renaming.
				if info.Mode() != 0o600 && !bytes.Equal(b, content) {
					t.Fatalf("after %v the unfinished %s has mode %v", wait, e.Name(), info.Mode())
				}
			case path == packed.Path && bytes.Equal(b, old):
			case !bytes.Equal(b, content) || info.Mode() != 0o755:
				t.Fatalf("after %v %s has %d bytes and mode %v", wait, e.Name(), len(b), info.Mode())
			}
		}
		if err == nil {
			if report.Error != "" {
				t.Fatal(report.Error)
			}
			resumed = report.Resumed
			break
		}
		if ctx.Err() == nil {
			t.Fatal(err)
		}
		if killed++; wait > time.Minute {
			t.Fatal("it never gets through")
		}
	}
	wantInstalled(t, raw, content)
	wantInstalled(t, packed, content)
	wantNoLeftovers(t, filepath.Join(job.StateDir, downloadsName))
	t.Logf("killed %d times; the last run resumed %d bytes", killed, resumed)
	if killed == 0 {
		t.Error("the first run got through: nothing was shown")
	}
}

// slowWriter makes a transfer last long enough to be killed in.
type slowWriter struct {
	http.ResponseWriter
	ctx context.Context
}

func (s *slowWriter) Write(p []byte) (int, error) {
	timer := time.NewTimer(time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
	return s.ResponseWriter.Write(p)
}
