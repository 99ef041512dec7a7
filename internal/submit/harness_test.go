package submit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testWait bounds what a test waits for that should come at once.
const testWait = 20 * time.Second

// fixture is the API on a real HTTP server with a real store. Stand-ins are
// only behind the interfaces this package defines.
type fixture struct {
	t      testing.TB
	store  *function.Bolt
	server *Server
	url    string
	node   string // URL of the node's side
	temp   string
	log    *lockedBuffer
	reg    *prometheus.Registry

	mu        sync.Mutex
	checkErr  error
	checking  func(ctx context.Context) error // called by Check
	checks    int
	pages     uint32
	pubErr    error
	published int
	apps      []Application // of what was published and configured, in order
	configure func()        // called by Configure
	image     []byte        // what Fetch brings
	health    []Check
	logLines  string
	logErr    error
	nodeFails *v1alpha1.FunctionError // the node reports this instead of ready
	client    *http.Client
}

func newFixture(t testing.TB, change ...func(*Options)) *fixture {
	t.Helper()
	dir := t.TempDir()
	f := &fixture{t: t, temp: filepath.Join(dir, "tmp"), log: &lockedBuffer{}, reg: prometheus.NewRegistry(), client: &http.Client{Transport: &http.Transport{}}}
	var err error
	if f.store, err = function.OpenBolt(filepath.Join(dir, "functions.db"), function.BoltOptions{}); err != nil {
		t.Fatal(err)
	}
	o := Options{
		Store: f.store, Checker: f, Publisher: f, Logs: f, Health: f,
		URLs: func(name string) (string, string) {
			return "http://" + name + ".localhost:8080/", "http://127.0.0.1:8080/f/" + name + "/"
		},
		BaseDomain: "localhost", Version: "test", TempDir: f.temp, Registerer: f.reg,
		Gatherers: func(context.Context) []prometheus.Gatherer { return []prometheus.Gatherer{f.reg} },
		Logger:    slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&o)
	}
	if f.server, err = New(o); err != nil {
		t.Fatal(err)
	}
	public := httptest.NewServer(f.server.Handler())
	node := httptest.NewServer(f.server.NodeHandler())
	f.url, f.node = public.URL, node.URL
	t.Cleanup(func() {
		f.server.Close()
		f.client.CloseIdleConnections()
		public.Close()
		node.Close()
		if err := f.store.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(f.temp); err != nil || len(left) > 0 {
			t.Errorf("temporary files left: %v, error %v", left, err)
		}
	})
	return f
}

func (f *fixture) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fixture) Check(ctx context.Context, path string, _ int) (CheckReport, error) {
	f.mu.Lock()
	checking, err, pages := f.checking, f.checkErr, f.pages
	f.checks++
	f.mu.Unlock()
	if checking != nil {
		if err := checking(ctx); err != nil {
			return CheckReport{}, err
		}
	}
	data, rerr := os.ReadFile(path)
	if rerr != nil {
		return CheckReport{}, rerr
	}
	if err == nil && !bytes.HasPrefix(data, []byte("\x00asm")) {
		err = &CheckError{Code: "not-wasm", Detail: "The file does not begin with the WebAssembly magic number."}
	}
	return CheckReport{Kind: "module", Digest: "sha256:" + hash(data), MemoryMinPages: pages}, err
}

func (f *fixture) Publish(_ context.Context, name, path, digest string, meta ArtifactMeta) (v1alpha1.Artifact, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, err := os.ReadFile(path)
	if err != nil {
		return v1alpha1.Artifact{}, err
	}
	if "sha256:"+hash(data) != digest || meta.SizeBytes != int64(len(data)) {
		return v1alpha1.Artifact{}, errors.New("published something else")
	}
	if f.pubErr != nil {
		return v1alpha1.Artifact{}, f.pubErr
	}
	f.published++
	f.apps = append(f.apps, meta.Application)
	return artifactOf(name, digest, meta.Application), nil
}

// artifactOf has a digest that is the module's unless there is an Application.
func artifactOf(name, digest string, app Application) v1alpha1.Artifact {
	if !app.Equal(Application{}) {
		digest = "sha256:" + hash(fmt.Appendf(nil, "%s %v", digest, app))
	}
	return v1alpha1.Artifact{Repository: "functions/" + name, Digest: digest}
}

func (f *fixture) Configure(_ context.Context, _, name string, from v1alpha1.Artifact, module string, _ int64, was, app Application) (v1alpha1.Artifact, error) {
	f.mu.Lock()
	configure := f.configure
	f.configure = nil
	f.mu.Unlock()
	if configure != nil {
		configure()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pubErr != nil {
		return from, f.pubErr
	}
	if from != artifactOf(name, module, was) {
		return from, fmt.Errorf("%+v was not published with %+v", from, was)
	}
	f.apps = append(f.apps, app)
	return artifactOf(name, module, app), nil
}

func (f *fixture) Fetch(_ context.Context, image, dst string, _ int64) (v1alpha1.Artifact, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pubErr != nil {
		return v1alpha1.Artifact{}, f.pubErr
	}
	host, repository, _ := strings.Cut(image, "/")
	repository, _, _ = strings.Cut(repository, ":")
	return v1alpha1.Artifact{Registry: host, Repository: repository, Digest: "sha256:" + hash(f.image)}, os.WriteFile(dst, f.image, 0o600)
}

func (f *fixture) Logs(ctx context.Context, name string, follow bool, tail int, _ time.Time) (io.ReadCloser, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.logErr != nil {
		return nil, f.logErr
	}
	r, w := io.Pipe()
	lines := f.logLines
	go func() {
		_, _ = io.WriteString(w, lines)
		if follow {
			<-ctx.Done()
		}
		_ = w.Close()
	}()
	return r, nil
}

func (f *fixture) Ready(context.Context) []Check {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.health
}

// runNode is a node: it long-polls for what is desired and reports it ready.
func (f *fixture) runNode() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	client := &http.Client{Transport: &http.Transport{}}
	go func() {
		defer close(done)
		for after := uint64(0); ctx.Err() == nil; {
			req, _ := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("%s/node/v1/desired?after=%d&wait=30s", f.node, after), nil)
			resp, err := client.Do(req)
			if err != nil {
				return
			}
			var d v1alpha1.Desired
			err = json.NewDecoder(resp.Body).Decode(&d)
			_ = resp.Body.Close()
			if err != nil {
				return
			}
			after = d.Generation
			report := v1alpha1.NodeReport{Node: "test", Generation: d.Generation}
			f.mu.Lock()
			fails := f.nodeFails
			f.mu.Unlock()
			for _, fn := range d.Functions {
				n := fn.Candidates[0].Revision
				r := v1alpha1.FunctionReport{Name: fn.Name, Revision: n, Progress: v1alpha1.ProgressReady, Serving: n, Phases: []v1alpha1.Phase{{Name: "compile", Milliseconds: 3}}}
				if fails != nil {
					r.Progress, r.Serving, r.Error = v1alpha1.ProgressFailed, 0, fails
				}
				report.Functions = append(report.Functions, r)
			}
			body, _ := json.Marshal(report)
			req, _ = http.NewRequestWithContext(ctx, "POST", f.node+"/node/v1/report", bytes.NewReader(body))
			req.Header.Set("Content-Type", "application/json")
			if resp, err = client.Do(req); err != nil {
				return
			}
			_ = resp.Body.Close()
		}
	}()
	f.t.Cleanup(func() {
		cancel()
		<-done
		client.CloseIdleConnections()
	})
}

// answer is a response that was read and held against the document.
type answer struct {
	t      testing.TB
	status int
	header http.Header
	body   []byte
}

func (a answer) want(status int) answer {
	a.t.Helper()
	if a.status != status {
		a.t.Fatalf("status %d, want %d: %s", a.status, status, a.body)
	}
	return a
}

func (a answer) problem(code string) v1alpha1.Problem {
	a.t.Helper()
	var p v1alpha1.Problem
	if err := json.Unmarshal(a.body, &p); err != nil || p.Type != ProblemBase+code {
		a.t.Fatalf("status %d, want problem %s: %s", a.status, code, a.body)
	}
	if p.Status != a.status || p.Detail == "" || !strings.HasPrefix(p.Instance, "urn:uuid:") || a.header.Get("Content-Type") != "application/problem+json" {
		a.t.Fatalf("problem is incomplete: %d %s", a.status, a.body)
	}
	return p
}

func (a answer) function() v1alpha1.Function {
	a.t.Helper()
	var v v1alpha1.Function
	if err := json.Unmarshal(a.body, &v); err != nil || v.Kind != "Function" || v.APIVersion != v1alpha1.APIVersion {
		a.t.Fatalf("not a function: %d %s", a.status, a.body)
	}
	return v
}

// do sends a request; headers are "Name: value".
func (f *fixture) do(method, path string, body []byte, headers ...string) answer {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testWait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, f.url+path, bytes.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		f.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatalf("%s %s: %v", method, path, err)
	}
	a := answer{f.t, resp.StatusCode, resp.Header, data}
	documented.check(f.t, method, req.URL.Path, a)
	return a
}

const (
	wasm = "Content-Type: application/wasm"
	js   = "Content-Type: application/json"
	mp   = "Content-Type: application/merge-patch+json"
)

// module n of a kind that the checker accepts.
func module(n int) []byte { return fmt.Appendf(nil, "\x00asm\x01\x00\x00\x00 module %d", n) }

func (f *fixture) put(name string, n int, headers ...string) answer {
	f.t.Helper()
	return f.do("PUT", "/v1/functions/"+name, module(n), append(headers, wasm)...)
}

// document holds answers against the OpenAPI document and remembers which
// were seen.
type document struct {
	once sync.Once
	doc  *openapi3.T
	err  error

	mu   sync.Mutex
	seen map[string]bool // "GET /path 200", "problem code"
}

var documented = &document{seen: map[string]bool{}}

func (d *document) load(t testing.TB) *openapi3.T {
	t.Helper()
	d.once.Do(func() {
		d.doc, d.err = openapi3.NewLoader().LoadFromData(buildOpenAPI("test", true))
		if d.err == nil {
			d.err = d.doc.Validate(context.Background())
		}
	})
	if d.err != nil {
		t.Fatalf("the OpenAPI document is not valid: %v", d.err)
	}
	return d.doc
}

func (d *document) path(path string) string {
	if rest, ok := strings.CutPrefix(path, "/v1/functions/"); ok {
		_, tail, more := strings.Cut(rest, "/")
		path = "/v1/functions/{name}"
		if more {
			path += "/" + tail
		}
	}
	return path
}

func (d *document) check(t testing.TB, method, path string, a answer) {
	t.Helper()
	doc := d.load(t)
	pattern := d.path(path)
	item := doc.Paths.Value(pattern)
	var p v1alpha1.Problem
	if a.header.Get("Content-Type") == "application/problem+json" && json.Unmarshal(a.body, &p) == nil {
		d.mu.Lock()
		d.seen["problem "+strings.TrimPrefix(p.Type, ProblemBase)] = true
		d.mu.Unlock()
	}
	if method == http.MethodHead {
		method = http.MethodGet
		a.body = nil
	}
	if item == nil || item.GetOperation(method) == nil {
		if a.status != 404 && a.status != 405 && a.status != 403 {
			t.Errorf("%s %s answered %d and is not documented", method, pattern, a.status)
		}
		return
	}
	d.mu.Lock()
	d.seen[fmt.Sprintf("%s %s %d", method, pattern, a.status)] = true
	d.mu.Unlock()
	response := item.GetOperation(method).Responses.Value(strconv.Itoa(a.status))
	if response == nil {
		t.Errorf("%s %s: status %d is not documented: %s", method, pattern, a.status, a.body)
		return
	}
	for name := range response.Value.Headers {
		if a.header.Get(name) == "" {
			t.Errorf("%s %s %d: no header %s", method, pattern, a.status, name)
		}
	}
	if len(a.body) == 0 {
		return
	}
	media, _, err := mime.ParseMediaType(a.header.Get("Content-Type"))
	content := response.Value.Content[media]
	if err != nil || content == nil {
		t.Errorf("%s %s %d: media type %q is not documented", method, pattern, a.status, media)
		return
	}
	var docs []any
	switch media {
	case "text/plain":
		docs = append(docs, string(a.body))
	default:
		for dec := json.NewDecoder(bytes.NewReader(a.body)); ; {
			var v any
			if err := dec.Decode(&v); err == io.EOF {
				break
			} else if err != nil {
				t.Errorf("%s %s %d: %v", method, pattern, a.status, err)
				return
			}
			docs = append(docs, v)
		}
	}
	for _, v := range docs {
		if err := content.Schema.Value.VisitJSON(v, openapi3.EnableJSONSchema2020()); err != nil {
			t.Errorf("%s %s %d is not as documented: %v\n%s", method, pattern, a.status, err, a.body)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
