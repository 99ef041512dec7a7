package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/engine/worker"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

// childEnvironment makes the test binary be one of the engine's children.
const childEnvironment = "HEARTH_TEST_CHILD"

// patience bounds every wait of these tests: long enough for a machine that
// does much else, with the race detector on.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	switch os.Getenv(childEnvironment) {
	case "worker":
		os.Exit(worker.Main(context.Background()))
	case "precompile":
		os.Exit(precompile.ChildMain(context.Background(), os.Stdin, os.Stdout))
	case "engine":
		os.Exit(engineMain())
	case "hang": // a worker that never answers
		time.Sleep(time.Hour)
	case "exit":
		os.Exit(7)
	}
	code := 1
	goleak.VerifyTestMain(cleaning{m, &code})
}

// cleaning removes the guests' store after the tests.
type cleaning struct {
	*testing.M
	code *int
}

func (c cleaning) Run() int {
	code := c.M.Run()
	if guests.dir != "" {
		_ = os.RemoveAll(guests.dir)
	}
	return code
}

// guests are the compiled test guests, made once.
var guests struct {
	once    sync.Once
	dir     string
	err     error
	objects map[string]precompile.ObjectRef
	skip    string
}

func guestObject(t testing.TB, name string) precompile.ObjectRef {
	t.Helper()
	guests.once.Do(func() { guests.err = buildGuests() })
	if guests.skip != "" && os.Getenv("CI") == "" {
		t.Skip(guests.skip)
	}
	if guests.err != nil || guests.skip != "" {
		t.Fatal(guests.err, guests.skip)
	}
	return guests.objects[name]
}

func buildGuests() error {
	if _, err := exec.LookPath("clang"); err != nil {
		guests.skip = "clang and wasi-libc are needed to build guests (Debian: clang lld wasi-libc libclang-rt-dev-wasm32)"
		return nil
	}
	dir, err := os.MkdirTemp("", "hearth-engine-")
	if err != nil {
		return err
	}
	guests.dir = dir
	// As in a data directory that workers of another account can reach.
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	cModule, goModule := filepath.Join(dir, "c.wasm"), filepath.Join(dir, "go.wasm")
	if out, err := exec.Command("clang", "--target=wasm32-wasi", "--sysroot=/usr", "-O2", "-o", cModule, "testdata/c/guest.c").CombinedOutput(); err != nil {
		return fmt.Errorf("build the C guest: %w\n%s", err, out)
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", goModule, "testdata/go/main.go")
	build.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the Go guest: %w\n%s", err, out)
	}
	store, err := precompile.Open(filepath.Join(dir, "store"), precompile.StoreOptions{
		Compiler: precompile.NewCompiler(precompile.CompilerOptions{
			Command: []string{sandbox.Executable()},
			Env:     []string{childEnvironment + "=precompile"},
			Timeout: 5 * time.Minute,
			Logger:  slog.New(slog.DiscardHandler),
		}),
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer store.Close()
	guests.objects = make(map[string]precompile.ObjectRef)
	for name, path := range map[string]string{"c": cModule, "go": goModule} {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		ref, _, err := store.Ensure(context.Background(), "sha256:"+hex.EncodeToString(sum[:]),
			func(context.Context) (string, error) { return path, nil })
		if err != nil {
			return fmt.Errorf("compile the %s guest: %w", name, err)
		}
		guests.objects[name] = ref
	}
	return nil
}

// node is a running engine with its client.
type node struct {
	t       testing.TB
	dir     string
	address string
	control *control.Client
	http    *http.Client
	logs    *syncBuffer
	end     context.CancelFunc // asks the engine to end

	mu         sync.Mutex
	generation uint64
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func startNode(t testing.TB, change func(*Options)) *node {
	t.Helper()
	guestObject(t, "c")
	dir, err := os.MkdirTemp("", "hearth-node-")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{
		t: t, dir: dir, address: listener.Addr().String(), logs: &syncBuffer{},
		control: control.NewClient(filepath.Join(dir, "engine.sock")),
		http: &http.Client{
			Transport:     &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	o := Options{
		Listener:      listener,
		ControlSocket: filepath.Join(dir, "engine.sock"),
		LogDir:        filepath.Join(dir, "logs"),
		StoreDir:      filepath.Join(guests.dir, "store", "objects"),
		WorkerCommand: []string{sandbox.Executable()},
		WorkerEnv:     []string{childEnvironment + "=worker"},
		AgentSilence:  time.Hour, // tests speak now and then
		Logger:        slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&o)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.end = cancel
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	t.Cleanup(func() {
		n.http.CloseIdleConnections()
		n.control.CloseIdle()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("engine: %v", err)
			}
		case <-time.After(patience):
			t.Error("the engine does not end")
		}
		if t.Failed() {
			t.Logf("engine's log:\n%s", n.logs)
		}
		_ = os.RemoveAll(dir)
	})
	n.eventually("the control socket answers", func() bool {
		_, err := n.control.Status(t.Context(), 0, 0)
		return err == nil
	})
	return n
}

// eventually asks until the answer is yes.
func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			n.t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (n *node) function(name, guest string, change func(*control.Function)) control.Function {
	object := guestObject(n.t, guest)
	f := control.Function{
		Name: name, Tenant: "default", Revision: 1,
		ObjectDir: object.Dir, Object: object.ID,
		MemoryMiB: 128, TimeoutMS: 30_000, Concurrency: 32,
	}
	if change != nil {
		change(&f)
	}
	return f
}

func (n *node) put(functions ...control.Function) {
	n.t.Helper()
	n.mu.Lock()
	n.generation++
	s := control.State{Generation: n.generation, Functions: functions}
	n.mu.Unlock()
	if err := n.control.PutState(n.t.Context(), s); err != nil {
		n.t.Fatal(err)
	}
}

// deploy puts the state and waits until all of it is ready.
func (n *node) deploy(functions ...control.Function) {
	n.t.Helper()
	n.put(functions...)
	for _, f := range functions {
		n.awaitStatus(f.Name, func(s control.FunctionStatus) bool {
			if s.Progress == v1alpha1.ProgressFailed {
				n.t.Fatalf("%s failed: %+v", f.Name, s.Error)
			}
			return s.Serving == f.Revision && s.Progress == v1alpha1.ProgressReady
		})
	}
}

func (n *node) status() control.Status {
	n.t.Helper()
	s, err := n.control.Status(n.t.Context(), 0, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// awaitStatus follows the long poll until ok.
func (n *node) awaitStatus(name string, ok func(control.FunctionStatus) bool) control.FunctionStatus {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	var after uint64
	for {
		s, err := n.control.Status(ctx, after, time.Second)
		if err != nil {
			n.t.Fatalf("status while waiting for %s: %v", name, err)
		}
		for _, f := range s.Functions {
			if f.Name == name && ok(f) {
				return f
			}
		}
		after = s.Version
	}
}

func (n *node) worker(tenant string) control.WorkerStatus {
	n.t.Helper()
	for _, w := range n.status().Workers {
		if w.Tenant == tenant {
			return w
		}
	}
	n.t.Fatalf("no worker of %s", tenant)
	return control.WorkerStatus{}
}

type answer struct {
	*http.Response
	body string
	err  error // of reading the body
}

func (a answer) problem(t testing.TB) v1alpha1.Problem {
	t.Helper()
	var p v1alpha1.Problem
	if a.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("%d is no problem: %s", a.StatusCode, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	return p
}

func (n *node) request(ctx context.Context, method, host, path string, body io.Reader) *http.Request {
	n.t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, "http://"+n.address+path, body)
	if err != nil {
		n.t.Fatal(err)
	}
	r.Host = host
	return r
}

func (n *node) send(r *http.Request) answer {
	n.t.Helper()
	resp, err := n.http.Do(r)
	if err != nil {
		n.t.Fatalf("%s %s: %v", r.Method, r.URL.Path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp, string(b), err}
}

func (n *node) get(function, path string) answer {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	return n.send(n.request(ctx, http.MethodGet, function+".localhost", path, nil))
}

func (n *node) lines(function string, o control.LogOptions) []v1alpha1.LogLine {
	n.t.Helper()
	r, err := n.control.Logs(n.t.Context(), function, o)
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Close()
	var lines []v1alpha1.LogLine
	for d := json.NewDecoder(r); ; {
		var l v1alpha1.LogLine
		if err := d.Decode(&l); err == io.EOF {
			return lines
		} else if err != nil {
			n.t.Fatal(err)
		}
		lines = append(lines, l)
	}
}

func wantBody(t testing.TB, a answer, status int, body string) {
	t.Helper()
	if a.StatusCode != status || a.body != body {
		t.Errorf("got %d %q, want %d %q", a.StatusCode, a.body, status, body)
	}
}

func wantProblem(t testing.TB, a answer, status int, code string) v1alpha1.Problem {
	t.Helper()
	p := a.problem(t)
	if a.StatusCode != status || !strings.HasSuffix(p.Type, "/"+code) || p.Detail == "" {
		t.Errorf("got %d %s (%s), want %d %s", a.StatusCode, p.Type, p.Detail, status, code)
	}
	for _, h := range []string{headerRequestID, headerServerTiming} {
		if a.Header.Get(h) == "" {
			t.Errorf("no %s in a problem", h)
		}
	}
	return p
}
