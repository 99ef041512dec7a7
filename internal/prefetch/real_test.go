package prefetch

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/registry"
)

// childEnv makes this test binary a precompile child.
const childEnv = "PREFETCH_TEST_CHILD"

// startModule is the smallest module with _start: (module (memory (export
// "memory") 1) (func (export "_start"))) and a custom section that pads it
// to about n bytes and makes it differ.
func startModule(tag byte, n int) []byte {
	m := []byte("\x00asm\x01\x00\x00\x00" +
		"\x01\x04\x01\x60\x00\x00" +
		"\x03\x02\x01\x00" +
		"\x05\x03\x01\x00\x01" +
		"\x07\x13\x02\x06memory\x02\x00\x06_start\x00\x00" +
		"\x0a\x04\x01\x02\x00\x0b")
	m = append(m, 0)
	for size := n + 2; ; {
		if size < 0x80 {
			m = append(m, byte(size))
			break
		}
		m = append(m, byte(size)|0x80)
		size >>= 7
	}
	m = append(m, 1, tag)
	pad := make([]byte, n)
	for i := range pad {
		pad[i] = tag
	}
	return append(m, pad...)
}

// real is a node with the real registry over HTTP, the real store with real
// compile children and the real API client; only the engine and the API's
// logic are scripted.
type real struct {
	w      *world
	client *registry.Client
	fault  atomic.Value // string: what breaks the next blob
	faults atomic.Int64
	store  *precompile.Store
	dir    string
	socket string
	// stopAPI ends the API's server.
	stopAPI func()
}

func startReal(t *testing.T) *real {
	t.Helper()
	r := &real{w: newWorld(t), dir: t.TempDir()}
	r.fault.Store("")
	e, err := registry.OpenEmbedded(context.Background(), registry.EmbeddedOptions{Dir: filepath.Join(r.dir, "registry")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	h := e.Handler()
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") && r.faults.Add(-1) >= 0 {
			switch r.fault.Load() {
			case "cut":
				rw = &cutter{ResponseWriter: rw, left: 1000}
			case "500":
				rw.WriteHeader(500)
				return
			case "lie":
				rw = &liar{ResponseWriter: rw}
			}
		}
		h.ServeHTTP(rw, req)
	}))
	t.Cleanup(srv.Close)
	r.client, err = registry.NewClient(registry.ClientOptions{Registry: strings.TrimPrefix(srv.URL, "http://"), PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.client.Close)
	r.store, err = precompile.Open(filepath.Join(r.dir, "store"), precompile.StoreOptions{
		Compiler: precompile.NewCompiler(precompile.CompilerOptions{Command: []string{os.Args[0]}, Env: []string{childEnv + "=1"}, SameAccount: true}),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.store.Close() })
	r.socket = filepath.Join(r.dir, "api.sock")
	r.stopAPI = r.serveAPI(t)
	return r
}

// cutter drops the connection in the middle of a body.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

// liar sends the right number of wrong bytes.
type liar struct{ http.ResponseWriter }

func (l *liar) Write(p []byte) (int, error) {
	q := make([]byte, len(p))
	copy(q, p)
	q[len(q)-1] ^= 1
	return l.ResponseWriter.Write(q)
}

// serveAPI answers the node's endpoints on the socket, from the world's state.
func (r *real) serveAPI(t *testing.T) (stop func()) {
	t.Helper()
	ln, err := localsocket.Listen(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /node/v1/desired", func(rw http.ResponseWriter, req *http.Request) {
		after, err := strconv.ParseUint(req.URL.Query().Get("after"), 10, 64)
		if err != nil || req.URL.Query().Get("wait") != "30s" {
			http.Error(rw, "bad query "+req.URL.RawQuery, 400)
			return
		}
		d, err := r.w.Desired(req.Context(), after)
		if err != nil {
			http.Error(rw, err.Error(), 503)
			return
		}
		json.NewEncoder(rw).Encode(d)
	})
	mux.HandleFunc("POST /node/v1/report", func(rw http.ResponseWriter, req *http.Request) {
		var rep v1alpha1.NodeReport
		d := json.NewDecoder(io.LimitReader(req.Body, 1<<20))
		d.DisallowUnknownFields()
		if err := d.Decode(&rep); err != nil {
			http.Error(rw, err.Error(), 400)
			return
		}
		r.w.do(func() { r.w.reports = append(r.w.reports, rep) })
		rw.WriteHeader(http.StatusNoContent)
	})
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { srv.Serve(ln); close(done) }()
	stop = sync.OnceFunc(func() { srv.Close(); <-done })
	t.Cleanup(stop)
	return stop
}

func (r *real) run(t *testing.T) (stop func()) {
	t.Helper()
	api := NewAPIClient(r.socket)
	l, err := New(Options{Source: api, Reporter: api, Puller: r.client, Store: r.store, Engine: r.w, Node: "n1",
		TempDir: filepath.Join(r.dir, "tmp"), CachePath: filepath.Join(r.dir, "desired.json")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		api.Close()
		if left, _ := os.ReadDir(l.dir); len(left) > 0 {
			t.Errorf("temporary files left: %v", left)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (r *real) publish(t *testing.T, name string, rev int, data []byte) v1alpha1.DesiredFunction {
	t.Helper()
	path := filepath.Join(t.TempDir(), "m.wasm")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := r.client.Publish(context.Background(), "functions/"+name, registry.Module{Path: path},
		registry.PublishOptions{Spin: registry.SpinOptions{Name: name, Version: strconv.Itoa(rev)}})
	if err != nil {
		t.Fatal(err)
	}
	f := want(name, rev)
	f.Candidates[0].Artifact = a
	return f
}

// until waits for a report that satisfies ok.
func (r *real) until(t *testing.T, name string, ok func(v1alpha1.FunctionReport) bool) v1alpha1.FunctionReport {
	t.Helper()
	// Generous: a loaded machine compiles slowly; success does not wait.
	deadline := time.After(time.Minute)
	for {
		r.w.mu.Lock()
		c := r.w.changed
		r.w.mu.Unlock()
		if f := r.w.last(name); f.Name != "" && ok(f) {
			return f
		}
		select {
		case <-c:
		case <-deadline:
			t.Fatalf("not reached; last report of %s: %+v %+v", name, r.w.last(name), r.w.last(name).Error)
		}
	}
}

func ready(rev int) func(v1alpha1.FunctionReport) bool {
	return func(f v1alpha1.FunctionReport) bool {
		return f.Progress == v1alpha1.ProgressReady && f.Serving == rev
	}
}

func TestRealPartsBringAFunctionFromTheRegistryToTheEngine(t *testing.T) {
	r := startReal(t)
	stop := r.run(t)
	r.w.submit(r.publish(t, "a", 1, startModule('1', 100_000)))
	f := r.until(t, "a", ready(1))
	var names []string
	for _, p := range f.Phases {
		names = append(names, p.Name)
	}
	t.Log("phases:", phaseText(f.Phases))
	for _, must := range []string{"pull", "verify", "compile", "store", "load", "instantiate"} {
		if !strings.Contains(strings.Join(names, " "), must) {
			t.Errorf("no phase %s in %v", must, names)
		}
	}
	r.w.mu.Lock()
	fn := r.w.state.Functions[0]
	r.w.mu.Unlock()
	if st, err := os.Stat(filepath.Join(fn.ObjectDir, "module.wasm")); err != nil || st.Size() == 0 {
		t.Errorf("the engine's object: %v", err)
	}
	stop()

	// The agent starts again: nothing is pulled, nothing compiled.
	r.faults.Store(1 << 30)
	r.fault.Store("500")
	r.w.restartEngine()
	r.w.do(func() { r.w.reports = nil })
	r.run(t)
	r.until(t, "a", ready(1))
}

func TestRealRegistryFaults(t *testing.T) {
	r := startReal(t)
	r.run(t)
	for i, fault := range []string{"cut", "500", "lie"} {
		r.fault.Store(fault)
		r.faults.Store(1)
		name := fault + "-once"
		if fault == "500" {
			name = "error-once"
		}
		r.w.submit(r.publish(t, name, 1, startModule(byte('a'+i), 50_000)))
		if f := r.until(t, name, ready(1)); f.Error != nil {
			t.Errorf("%s: %+v", fault, f.Error)
		}
	}
	// A registry that goes on lying is a failure for good, for that function.
	r.fault.Store("lie")
	r.faults.Store(1 << 30)
	lied := r.publish(t, "lied", 1, startModule('z', 50_000))
	r.w.mu.Lock()
	all := append([]v1alpha1.DesiredFunction{lied}, r.w.desired.Functions...)
	r.w.mu.Unlock()
	r.w.submit(all...)
	f := r.until(t, "lied", func(f v1alpha1.FunctionReport) bool { return f.Progress == v1alpha1.ProgressFailed })
	if f.Error.Code != "digest-mismatch" || f.Retrying {
		t.Errorf("%+v %+v", f, f.Error)
	}
	if r.w.last("lie-once").Progress != v1alpha1.ProgressReady {
		t.Error("another function suffers")
	}
}

func TestRealModuleThatCannotBeCompiledFailsForGood(t *testing.T) {
	r := startReal(t)
	r.run(t)
	data := startModule('q', 1000)
	data[14] = 0x7f // the type section's end
	r.w.submit(r.publish(t, "bad", 1, data))
	f := r.until(t, "bad", func(f v1alpha1.FunctionReport) bool { return f.Progress == v1alpha1.ProgressFailed })
	if f.Retrying || f.Error.Code == "internal" {
		t.Errorf("%+v", f.Error)
	}
}

func TestRealAPIRestart(t *testing.T) {
	r := startReal(t)
	r.run(t)
	r.w.submit(r.publish(t, "a", 1, startModule('1', 100)))
	r.until(t, "a", ready(1))
	r.stopAPI()
	second := r.publish(t, "b", 1, startModule('2', 100))
	r.w.mu.Lock()
	all := append([]v1alpha1.DesiredFunction{second}, r.w.desired.Functions...)
	r.w.mu.Unlock()
	r.w.submit(all...)
	r.stopAPI = r.serveAPI(t)
	r.until(t, "b", ready(1))
	if r.w.engineHas("a") != 1 {
		t.Error("the first function was lost")
	}
}

func TestAPIClientSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	c := NewAPIClient(filepath.Join(dir, "none.sock"))
	t.Cleanup(c.Close)
	if _, err := c.Desired(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("%v", err)
	}
	if err := c.Report(t.Context(), v1alpha1.NodeReport{}); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
