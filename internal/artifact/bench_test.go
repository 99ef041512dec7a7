package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// blobBlock is what blobs repeat; it is larger than most windows.
const blobBlock = 8 << 20

// writeBlob writes the content of a blob of size bytes, which is no two blocks
// alike.
func writeBlob(w io.Writer, size int64) error {
	block := randomBytes(blobBlock, 70)
	for n := int64(0); n < size; n += blobBlock {
		copy(block, strconv.FormatInt(n, 10))
		if _, err := w.Write(block[:min(blobBlock, size-n)]); err != nil {
			return err
		}
	}
	return nil
}

// serverReady is what a serving child prints once it listens.
type serverReady struct {
	HTTP, HTTPS, CA string
	// Zstd has the packed blob's size and digest.
	ZstdSize   int64
	ZstdSHA256 Digest
}

// serveMain serves /blob?size=N and, packed with the window of k3s's images,
// /blob.zst, from a process of its own, so that what the client needs can be
// told from what the server does. It ends with its standard input.
func serveMain() int {
	var packed bytes.Buffer
	if size, _ := strconv.ParseInt(os.Getenv("HEARTH_ARTIFACT_TEST_ZSTD"), 10, 64); size > 0 {
		z, err := zstd.NewWriter(&packed, zstd.WithWindowSize(maxZstdWindow))
		if err != nil {
			panic(err)
		}
		if err := writeBlob(z, size); err != nil {
			panic(err)
		}
		if err := z.Close(); err != nil {
			panic(err)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/blob", func(w http.ResponseWriter, r *http.Request) {
		size, err := strconv.ParseInt(r.FormValue("size"), 10, 64)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		_ = writeBlob(w, size) // the client went away
	})
	mux.HandleFunc("/blob.zst", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(packed.Bytes()))
	})
	plain, secure := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	err := json.NewEncoder(os.Stdout).Encode(serverReady{
		HTTP: plain.URL, HTTPS: secure.URL, ZstdSize: int64(packed.Len()), ZstdSHA256: digestOf(packed.Bytes()),
		CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})),
	})
	if err != nil {
		panic(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// startServer runs a serving child for as long as the test.
func startServer(t testing.TB, zstdSize int64) serverReady {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnvironment+"=serve", fmt.Sprint("HEARTH_ARTIFACT_TEST_ZSTD=", zstdSize))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	var ready serverReady
	if err := json.NewDecoder(out).Decode(&ready); err != nil {
		t.Fatal(err)
	}
	return ready
}

func blobDigest(t testing.TB, size int64) Digest {
	t.Helper()
	h := sha256.New()
	if err := writeBlob(h, size); err != nil {
		t.Fatal(err)
	}
	return Digest(h.Sum(nil))
}

// maxPeak is how much memory bootstrap may need while gigabytes stream through
// it, all of the process included.
const maxPeak = 80 << 20

func TestPeakMemory(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector needs several times the memory itself")
	}
	if testing.Short() {
		t.Skip("it writes 1.2 GiB")
	}
	const size = 256 << 20
	server := startServer(t, size)
	dir := t.TempDir()
	sum := blobDigest(t, size)
	var artifacts []Artifact
	for i := range 6 {
		a := Artifact{Name: "blob", Version: fmt.Sprint(i), URLs: []string{fmt.Sprint(server.HTTP, "/blob?size=", size)}, SHA256: sum, Size: size, Path: filepath.Join(dir, fmt.Sprint(i))}
		if i%3 == 2 {
			a.URLs[0], a.SHA256, a.Size = server.HTTP+"/blob.zst", server.ZstdSHA256, server.ZstdSize
			a.Format, a.InstalledSHA256, a.InstalledSize = FormatZstd, sum, size
		}
		artifacts = append(artifacts, a)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	job := fetchJob{StateDir: filepath.Join(dir, "state"), Artifacts: artifacts}
	report, err := childFetch(t, ctx, job)
	if err != nil || report.Error != "" {
		t.Fatal(err, report.Error)
	}
	t.Logf("peak %d KiB for %d MiB in %.1f s", report.PeakKiB, 6*size>>20, report.Seconds)
	if report.PeakKiB<<10 > maxPeak {
		t.Errorf("%d KiB were resident, at most %d may be", report.PeakKiB, maxPeak>>10)
	}
	// Recognising all of it again needs no more.
	report, err = childFetch(t, ctx, job)
	if err != nil || report.Error != "" || report.Downloaded != 0 {
		t.Fatal(err, report)
	}
	t.Logf("peak %d KiB to hash %d MiB in %.1f s", report.PeakKiB, 6*size>>20, report.Seconds)
	if report.PeakKiB<<10 > maxPeak {
		t.Errorf("%d KiB were resident while hashing", report.PeakKiB)
	}
}

// BenchmarkFetch compares a Fetch, durable writing included, with what shell
// scripts do instead. Peak memory is that of the largest process.
func BenchmarkFetch(b *testing.B) {
	const size = 256 << 20
	server := startServer(b, 0)
	ca := filepath.Join(b.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, []byte(server.CA), 0o600); err != nil {
		b.Fatal(err)
	}
	sum := blobDigest(b, size)
	for _, tls := range []bool{false, true} {
		scheme, base := "http", server.HTTP
		if tls {
			scheme, base = "https", server.HTTPS
		}
		url := fmt.Sprint(base, "/blob?size=", size)
		shell := func(script string) func(*testing.B) {
			return func(b *testing.B) {
				for _, tool := range []string{"curl", "sha256sum"} {
					if _, err := exec.LookPath(tool); err != nil {
						b.Skipf("no %s here", tool)
					}
				}
				b.SetBytes(size)
				var peak int64
				for b.Loop() {
					dir := b.TempDir()
					cmd := exec.CommandContext(b.Context(), "sh", "-euc", script)
					cmd.Dir = dir
					cmd.Env = append(os.Environ(), "URL="+url, "SUM="+sum.String(), "CURL_CA_BUNDLE="+ca)
					if out, err := cmd.CombinedOutput(); err != nil {
						b.Fatalf("%v: %s", err, out)
					}
					if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
						peak = max(peak, usage.Maxrss)
					}
					_ = os.Remove(filepath.Join(dir, "blob"))
				}
				b.ReportMetric(float64(peak)/1024, "peak-MiB")
			}
		}
		b.Run(scheme+"/hearth", func(b *testing.B) {
			b.SetBytes(size)
			var peak int64
			for b.Loop() {
				dir := b.TempDir()
				report, err := childFetch(b, b.Context(), fetchJob{StateDir: filepath.Join(dir, "state"), CA: server.CA, Artifacts: []Artifact{{
					Name: "blob", URLs: []string{url}, SHA256: sum, Size: size, Path: filepath.Join(dir, "blob"), Mode: 0o755,
				}}})
				if err != nil || report.Error != "" {
					b.Fatal(err, report.Error)
				}
				peak = max(peak, report.PeakKiB)
				_ = os.Remove(filepath.Join(dir, "blob"))
			}
			b.ReportMetric(float64(peak)/1024, "peak-MiB")
		})
		b.Run(scheme+"/shell-sequence", shell(`curl -fsS -o part "$URL"; echo "$SUM  part" | sha256sum -c >/dev/null; chmod 755 part; mv part blob`))
		b.Run(scheme+"/shell-sequence-durable", shell(`curl -fsS -o part "$URL"; echo "$SUM  part" | sha256sum -c >/dev/null; chmod 755 part; sync part; mv part blob; sync .`))
		b.Run(scheme+"/shell-pipe", shell(`test "$(curl -fsS "$URL" | tee part | sha256sum)" = "$SUM  -"; chmod 755 part; mv part blob`))
	}
}
