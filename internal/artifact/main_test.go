package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// childEnvironment makes the test binary one of the processes below.
const childEnvironment = "HEARTH_ARTIFACT_TEST_CHILD"

func TestMain(m *testing.M) {
	switch name := os.Getenv(childEnvironment); name {
	case "":
	case "fetch":
		os.Exit(fetchMain())
	case "serve":
		os.Exit(serveMain())
	default:
		panic("unknown child " + name)
	}
	goleak.VerifyTestMain(m)
}

// fetchJob is what a fetching child reads from its standard input.
type fetchJob struct {
	StateDir  string
	Artifacts []Artifact
	// CA is a certificate in PEM to trust, if any.
	CA string
}

// fetchReport is what it prints.
type fetchReport struct {
	Seconds    float64
	Downloaded int64
	Resumed    int64
	// PeakKiB is the most memory that was resident.
	PeakKiB int64
	Error   string
}

func fetchMain() int {
	var job fetchJob
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		panic(err)
	}
	o := Options{StateDir: job.StateDir}
	if job.CA != "" {
		o.RootCAs = x509.NewCertPool()
		o.RootCAs.AppendCertsFromPEM([]byte(job.CA))
	}
	f, err := New(o)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	began := time.Now()
	results, err := f.Fetch(context.Background(), job.Artifacts)
	report := fetchReport{Seconds: time.Since(began).Seconds(), PeakKiB: peakKiB()}
	for _, r := range results {
		report.Downloaded += r.Downloaded
		report.Resumed += r.Resumed
	}
	if err != nil {
		report.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		panic(err)
	}
	return 0
}

func peakKiB() int64 {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}

// testRand is seeded alike in every run, so that failures repeat.
func testRand(seed uint64) *rand.ChaCha8 {
	var s [32]byte
	s[0], s[1] = byte(seed), byte(seed>>8)
	return rand.NewChaCha8(s)
}

func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	_, _ = testRand(seed).Read(b)
	return b
}

// act answers one request in some way; content is what should be served.
type act func(w http.ResponseWriter, r *http.Request, content []byte)

// mirror is a server of one file. It plays one act per request and, when they
// are used up, serves as it should.
type mirror struct {
	*httptest.Server
	content []byte
	etag    string

	mu       sync.Mutex
	acts     []act
	requests []*http.Request
}

func newMirror(t testing.TB, content []byte, acts ...act) *mirror {
	t.Helper()
	m := &mirror{content: content, etag: `"` + digestOf(content).String()[:16] + `"`, acts: acts}
	m.Server = httptest.NewServer(m)
	t.Cleanup(m.Close)
	return m
}

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	m.requests = append(m.requests, r)
	play := serve
	if len(m.acts) > 0 {
		play, m.acts = m.acts[0], m.acts[1:]
	}
	m.mu.Unlock()
	if m.etag != "" {
		w.Header().Set("ETag", m.etag)
	}
	play(w, r, m.content)
}

func (m *mirror) seen() []*http.Request {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.requests
}

// always repeats an act more often than anybody asks.
func always(a act) []act {
	acts := make([]act, 200)
	for i := range acts {
		acts[i] = a
	}
	return acts
}

func serve(w http.ResponseWriter, r *http.Request, content []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

// status answers with an error.
func status(code int, header ...string) act {
	return func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// cut serves n more bytes of what was asked for, then breaks the connection.
func cut(n int) act {
	return func(w http.ResponseWriter, r *http.Request, content []byte) {
		serve(&cutWriter{ResponseWriter: w, left: n}, r, content)
	}
}

type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p[:min(c.left, len(p))])
	if c.left -= n; c.left <= 0 {
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// stall serves n more bytes, then nothing until the client goes away.
func stall(n int) act {
	return func(w http.ResponseWriter, r *http.Request, content []byte) {
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		_, _ = w.Write(content[:n])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
}

// silent says nothing at all.
func silent(_ http.ResponseWriter, r *http.Request, _ []byte) { <-r.Context().Done() }

// trickle serves a byte now and then.
func trickle(w http.ResponseWriter, r *http.Request, content []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for _, b := range content {
		_, _ = w.Write([]byte{b})
		_ = http.NewResponseController(w).Flush()
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// other serves other bytes instead.
func other(content []byte) act {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) { serve(w, r, content) }
}

// ignoreRange always serves everything.
func ignoreRange(w http.ResponseWriter, r *http.Request, content []byte) {
	r.Header.Del("Range")
	serve(w, r, content)
}

func page(w http.ResponseWriter, _ *http.Request, _ []byte) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	fmt.Fprint(w, "<!DOCTYPE html><html><body>Please log in to the network</body></html>")
}

// newFetcher returns a Fetcher that is quick to give up.
func newFetcher(t testing.TB, change ...func(*Options)) *Fetcher {
	t.Helper()
	o := Options{
		StateDir: filepath.Join(t.TempDir(), "state"), RetryWait: time.Millisecond, MaxRetryWait: 5 * time.Millisecond,
		StallTimeout: 30 * time.Second, Timeout: time.Minute,
	}
	for _, c := range change {
		c(&o)
	}
	f, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// artifactOf describes content to be installed from the URLs below a directory.
func artifactOf(dir string, content []byte, urls ...string) Artifact {
	return Artifact{
		Name: "k3s", Version: "v1.36.2+k3s1", URLs: urls, SHA256: sha256.Sum256(content), Size: int64(len(content)),
		Path: filepath.Join(dir, "k3s"), Mode: 0o755,
	}
}

func fetchOne(t testing.TB, f *Fetcher, a Artifact) (Result, error) {
	t.Helper()
	results, err := f.Fetch(t.Context(), []Artifact{a})
	if len(results) != 1 {
		t.Fatalf("got %d results", len(results))
	}
	if !errors.Is(err, results[0].Err) && err != nil {
		t.Errorf("Fetch says %v, its result %v", err, results[0].Err)
	}
	return results[0], err
}

// wantInstalled checks that the file is what it must be, and that nothing of
// ours lies about.
func wantInstalled(t testing.TB, a Artifact, content []byte) {
	t.Helper()
	got, err := os.ReadFile(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Fatalf("%s has %d bytes that are not those wanted", a.Path, len(got))
	}
	info, err := os.Lstat(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != a.mode() {
		t.Errorf("mode is %v, want %v", info.Mode(), a.mode())
	}
	wantNoLeftovers(t, filepath.Dir(a.Path))
}

func wantNoLeftovers(t testing.TB, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		for _, name := range leftovers(t, dir) {
			t.Errorf("%s was left in %s", name, dir)
		}
	}
}

func leftovers(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) || strings.HasSuffix(e.Name(), ".new") || strings.HasSuffix(e.Name(), ".json") {
			names = append(names, e.Name())
		}
	}
	return names
}

func wantAbsent(t testing.TB, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there (%v)", path, err)
	}
}

func wantCode(t testing.TB, err error, code fault.Code, says ...string) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Fatalf("got code %q of error %v, want %q", fault.CodeOf(err), err, code)
	}
	var f *fault.Error
	if errors.As(err, &f); f.Remedy == "" {
		t.Errorf("%v has no remedy", err)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("error %q does not say %q", err, s)
		}
	}
}
