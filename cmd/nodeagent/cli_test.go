package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/health"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/submit"
	"github.com/hearth-sh/hearth/test/needs"
)

var update = flag.Bool("update", false, "write golden files and docs/cli.md")

var fixedNow = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

type outputs struct {
	code           int
	stdout, stderr string
}

// execute runs one command line as main does, with a fixed clock.
func execute(t *testing.T, ctx context.Context, stdin string, args ...string) outputs {
	t.Helper()
	clearEnvironment(t)
	var stdout, stderr bytes.Buffer
	app := command.Prepare(newApp())
	app.Writer, app.ErrWriter, app.Reader = &stdout, &stderr, strings.NewReader(stdin)
	app.Metadata = map[string]any{"now": func() time.Time { return fixedNow }}
	err := app.RunContext(ctx, command.Reorder(app, append([]string{"nodeagent"}, args...)))
	o := outputs{stdout: stdout.String(), stderr: stderr.String()}
	if err != nil {
		o.code = 1
		var exit cli.ExitCoder
		if errors.As(err, &exit) {
			o.code = exit.ExitCode()
		}
		if err.Error() != "" {
			o.stderr += "nodeagent: " + err.Error() + "\n"
		}
	}
	return o
}

func golden(t *testing.T, name string, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s:\n%s", path, diff)
	}
}

// fakeAPI answers as the documented API does, from one function's data, and
// records what it was asked.
type fakeAPI struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string
}

func sample() v1alpha1.Function {
	return v1alpha1.Function{
		APIVersion: v1alpha1.APIVersion, Kind: "Function", Name: "hello", Tenant: "default",
		URL: "http://hello.localhost:8080/", PathURL: "http://127.0.0.1:8080/f/hello/",
		State: v1alpha1.StateReady, Revision: 2, ActiveRevision: 2,
		Digest:   "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
		Image:    "127.0.0.1:8080/default/hello@sha256:fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210",
		Settings: v1alpha1.Settings{MemoryMiB: 128, TimeoutMS: 30_000, Concurrency: 32, Env: map[string]string{"GREETING": "hi\x1b[31m", "B": "2"}, SecretNames: []string{"API_KEY", "TOKEN"}},
		Phases:   []v1alpha1.Phase{{Name: "receive", Milliseconds: 2.31}, {Name: "check", Milliseconds: 41.2}, {Name: "compile", Milliseconds: 1204}},

		CreatedAt: fixedNow.Add(-26 * time.Hour), UpdatedAt: fixedNow.Add(-3 * time.Minute),
	}
}

func newFakeAPI(t *testing.T) *fakeAPI {
	a := &fakeAPI{}
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}
	refuse := func(w http.ResponseWriter, status int, code, title, detail string) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v1alpha1.Problem{Type: submit.ProblemBase + code, Title: title, Detail: detail, Status: status})
	}
	mux.HandleFunc("GET /v1/functions", func(w http.ResponseWriter, r *http.Request) {
		broken := sample()
		broken.Name, broken.State, broken.ActiveRevision = "broken", v1alpha1.StateFailed, 1
		broken.URL = "http://broken.localhost:8080/"
		broken.Error = &v1alpha1.FunctionError{Code: "digest-mismatch", Detail: "The registry returned other bytes."}
		fresh := sample()
		fresh.Name, fresh.State, fresh.Revision, fresh.ActiveRevision = "fresh", v1alpha1.StatePending, 1, 0
		fresh.URL = "http://fresh.localhost:8080/"
		items := []v1alpha1.Function{broken, fresh, sample()}
		if r.URL.Query().Get("tenant") == "nobody" {
			items = []v1alpha1.Function{}
		}
		reply(w, 200, v1alpha1.FunctionList{APIVersion: v1alpha1.APIVersion, Kind: "FunctionList", Items: items})
	})
	mux.HandleFunc("GET /v1/functions/{name}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") != "hello" {
			refuse(w, 404, "function-not-found", "There is no function of that name", fmt.Sprintf("%q is not known.", r.PathValue("name")))
			return
		}
		reply(w, 200, sample())
	})
	mux.HandleFunc("PUT /v1/functions/{name}", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		f := sample()
		f.Name = r.PathValue("name")
		switch {
		case f.Name == "bad":
			refuse(w, 422, "unsupported-import", "The module imports what is not provided", `It imports "env"."launch".`)
			return
		case f.Name == "broken":
			f.State, f.ActiveRevision, f.Revision = v1alpha1.StateFailed, 2, 3
			f.Error = &v1alpha1.FunctionError{Code: "memory-over-limit", Detail: "It needs 200 MiB."}
		case f.Name == "slow":
			f.State, f.ActiveRevision, f.Revision = v1alpha1.StatePending, 2, 3
		case f.Name != "hello":
			f.Revision, f.ActiveRevision = 1, 1
		}
		a.mu.Lock()
		a.asked = append(a.asked, fmt.Sprintf("%s %d", r.Header.Get("Content-Type"), len(body)))
		a.mu.Unlock()
		reply(w, 200, f)
	})
	mux.HandleFunc("PATCH /v1/functions/{name}", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		a.asked = append(a.asked, string(body))
		a.mu.Unlock()
		f := sample()
		f.Revision, f.ActiveRevision = 3, 3
		reply(w, 200, f)
	})
	mux.HandleFunc("POST /v1/functions/{name}/rollback", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		a.asked = append(a.asked, "rollback "+string(body))
		a.mu.Unlock()
		f := sample()
		f.Revision, f.ActiveRevision, f.Phases = 1, 1, nil
		reply(w, 200, f)
	})
	mux.HandleFunc("DELETE /v1/functions/{name}", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) })
	mux.HandleFunc("GET /v1/functions/{name}/revisions", func(w http.ResponseWriter, _ *http.Request) {
		f := sample()
		reply(w, 200, v1alpha1.RevisionList{APIVersion: v1alpha1.APIVersion, Kind: "RevisionList", Items: []v1alpha1.Revision{
			{Revision: 3, Digest: f.Digest, Image: f.Image, SizeBytes: 3_000_000, Settings: f.Settings, State: v1alpha1.StateFailed, CreatedAt: fixedNow.Add(-time.Minute),
				Error: &v1alpha1.FunctionError{Code: "digest-mismatch", Detail: "x"}},
			{Revision: 2, Digest: f.Digest, Image: f.Image, SizeBytes: 2_900_000, Settings: f.Settings, State: v1alpha1.StateReady, Active: true, CreatedAt: fixedNow.Add(-3 * time.Hour)},
			{Revision: 1, Digest: f.Digest, Image: f.Image, SizeBytes: 40_000, Settings: f.Settings, State: v1alpha1.StateReady, CreatedAt: fixedNow.Add(-100 * time.Hour)},
		}})
	})
	mux.HandleFunc("GET /v1/functions/{name}/logs", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.asked = append(a.asked, r.URL.RawQuery)
		a.mu.Unlock()
		w.Header().Set("Content-Type", "application/x-ndjson")
		for i, l := range []v1alpha1.LogLine{
			{Stream: "stderr", Line: "started"}, {Stream: "stderr", Line: "evil \x1b]0;title\x07 \u202e"}, {Stream: "system", Line: "request failed: trap: unreachable"},
		} {
			l.Time, l.Function, l.Revision, l.Request = fixedNow.Add(time.Duration(i)*time.Millisecond), "hello", 2, "0123456789abcdef"
			_ = json.NewEncoder(w).Encode(l)
		}
	})
	mux.HandleFunc("/f/hello/{rest...}", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Server-Timing", "queue;dur=0.1, instantiate;dur=0.52, firstbyte;dur=1.8")
		w.Header().Set("Content-Type", "text/plain")
		w.Header()["Date"] = nil
		switch r.PathValue("rest") {
		case "trap":
			refuse(w, 502, "function-trapped", "The function failed", "It executed an unreachable instruction.")
			return
		case "teapot":
			w.WriteHeader(418)
		case "cut":
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "half")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		_, _ = fmt.Fprintf(w, "%s %s %q type=%s x=%v\n", r.Method, r.RequestURI, body, r.Header.Get("Content-Type"), r.Header.Values("X"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	a.Server = httptest.NewServer(mux)
	t.Cleanup(a.Close)
	return a
}

func (a *fakeAPI) last() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.asked) == 0 {
		return ""
	}
	return a.asked[len(a.asked)-1]
}

func wasmFile(t *testing.T, name string) string {
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte("\x00asm\x01\x00\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOutputOfEachCommand(t *testing.T) {
	a := newFakeAPI(t)
	secret := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(secret, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hello, bad, broken, slow, fresh := wasmFile(t, "hello.wasm"), wasmFile(t, "bad.wasm"), wasmFile(t, "broken.wasm"), wasmFile(t, "slow.wasm"), wasmFile(t, "My App_2.wasm")
	tests := []struct {
		name string
		args []string
		code int
		// asked is what the API got last.
		asked string
	}{
		{"list", []string{"functions", "list"}, 0, ""},
		{"list-json", []string{"functions", "list", "-o", "json"}, 0, ""},
		{"list-empty", []string{"fn", "ls", "--tenant", "nobody"}, 0, ""},
		{"get", []string{"functions", "get", "hello"}, 0, ""},
		{"get-json", []string{"functions", "get", "hello", "-o", "json"}, 0, ""},
		{"get-unknown", []string{"functions", "get", "nope"}, exitRefused, ""},
		{"revisions", []string{"functions", "revisions", "hello"}, 0, ""},
		{"revisions-json", []string{"functions", "revisions", "hello", "-o", "json"}, 0, ""},
		{"rollback", []string{"functions", "rollback", "hello", "--to", "1"}, 0, `rollback {"revision":1}`},
		{"set", []string{"functions", "set", "hello", "--memory", "1GiB", "--timeout", "5s", "-e", "A=1,2", "--env", "B=", "--unset-env", "C", "--secret", "K=@" + secret, "--unset-secret", "OLD"}, 0,
			`{"memoryMiB":1024,"timeoutMs":5000,"env":{"A":"1,2","B":"","C":null},"secrets":{"K":"s3cret","OLD":null}}`},
		{"set-nothing", []string{"functions", "set", "hello"}, exitUsage, ""},
		{"delete", []string{"functions", "delete", "hello"}, 0, ""},
		{"submit", []string{"submit", fresh}, 0, "application/wasm 8"},
		{"submit-unchanged", []string{"submit", hello}, 0, "application/wasm 8"},
		{"submit-json", []string{"submit", hello, "-o", "json"}, 0, "application/wasm 8"},
		{"submit-refused", []string{"submit", bad}, exitRefused, ""},
		{"submit-failed", []string{"submit", broken}, exitRefused, ""},
		{"submit-not-waiting", []string{"submit", slow, "--wait", "0"}, 0, ""},
		{"submit-missing", []string{"submit", "no-such-file"}, exitUsage, ""},
		{"logs", []string{"logs", "hello", "--tail", "5", "--since", "10m"}, 0, "follow=false&since=2026-01-02T02%3A54%3A05Z&tail=5"},
		{"logs-json", []string{"logs", "hello", "-o", "json"}, 0, "follow=false&tail=100"},
		{"invoke", []string{"invoke", "hello", "/greet?name=Ada"}, 0, ""},
		{"invoke-post", []string{"invoke", "hello", "-d", "-", "-H", "X: 1", "-H", "X: a,b", "-H", "content-type: text/x"}, 0, ""},
		{"invoke-4xx", []string{"invoke", "hello", "teapot"}, exitStatus4xx, ""},
		{"invoke-trap", []string{"invoke", "hello", "/trap"}, exitStatus5xx, ""},
		{"invoke-cut", []string{"invoke", "hello", "/cut"}, exitStatus5xx, ""},
		{"unknown-command", []string{"log"}, exitUsage, ""},
		{"unknown-flag", []string{"logs", "hello", "--flollow"}, exitUsage, ""},
		{"unknown-format", []string{"functions", "list", "-o", "yaml"}, exitUsage, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			args := tt.args
			if tt.name != "unknown-command" {
				args = append(args[:len(args):len(args)], "--url", a.URL)
			}
			got := execute(t, t.Context(), "from stdin", args...)
			if got.code != tt.code {
				t.Errorf("exit code %d, want %d", got.code, tt.code)
			}
			if tt.asked != "" && a.last() != tt.asked {
				t.Errorf("the API was asked %s\nwant %s", a.last(), tt.asked)
			}
			if strings.Contains(got.stdout+got.stderr, "s3cret") {
				t.Error("a secret was printed")
			}
			if strings.Contains(got.stdout+got.stderr, "\x1b") {
				t.Error("an escape character was printed")
			}
			text := strings.ReplaceAll("-- stdout --\n"+got.stdout+"-- stderr --\n"+got.stderr, a.URL, "http://SERVER")
			golden(t, tt.name, text)
		})
	}
}

func TestInvokeIncludesHeadersAndTiming(t *testing.T) {
	a := newFakeAPI(t)
	got := execute(t, t.Context(), "", "invoke", "hello", "-i", "--url", a.URL)
	for _, want := range []string{"HTTP/1.1 200 OK\n", "Content-Type: text/plain\n", "GET /f/hello/ "} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("%q is missing in %s", want, got.stdout)
		}
	}
	if !strings.Contains(got.stderr, "there: queue 0.1 ms, instantiate 0.52 ms, firstbyte 1.8 ms") {
		t.Error(got.stderr)
	}
}

func TestSubmitWaitsOnlyAsLongAsItWasTold(t *testing.T) {
	mux := http.NewServeMux()
	pending := sample()
	pending.Name, pending.State = "slow", v1alpha1.StatePending
	mux.HandleFunc("/v1/functions/slow", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(pending)
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	got := execute(t, t.Context(), "", "submit", wasmFile(t, "slow.wasm"), "--wait", "300ms", "--url", server.URL)
	if got.code != exitNotReady || !strings.Contains(got.stderr, "durable but not ready after 300 ms") {
		t.Errorf("%+v", got)
	}
}

func TestNobodyAnswers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	_ = ln.Close()
	got := execute(t, t.Context(), "", "functions", "list", "--url", "http://"+address)
	if got.code != exitUnreachable || !strings.Contains(got.stderr, "nodeagent dev") {
		t.Errorf("%+v", got)
	}
}

func TestInterruptIsNoError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	block := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { cancel(); <-block }))
	defer server.Close()
	defer close(block)
	got := execute(t, ctx, "", "functions", "list", "--url", server.URL)
	if got.code != exitInterrupted || got.stderr != "nodeagent: interrupted\n" {
		t.Errorf("%+v", got)
	}
}

// serveAgent serves a node's status on a socket.
func serveAgent(t *testing.T, report func(r *health.Registry)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	ln, err := localsocket.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	now := fixedNow.Add(-5 * time.Minute)
	r := health.NewRegistry(health.Options{Clock: func() time.Time { return now }})
	report(r)
	server := health.NewServer(health.ServerOptions{Registry: r, Node: "laptop",
		Versions: v1alpha1.Versions{Hearth: "1.2.3", Wazero: "v1.12.0", Go: "go1.26", OS: "linux", Arch: "amd64", Kernel: "6.1"},
		Sections: func(context.Context) health.Sections {
			return health.Sections{
				Functions: &v1alpha1.FunctionsStatus{Total: 3, Warm: 2, FailedCount: 1, Failed: []v1alpha1.FailedFunction{{Name: "hello", Revision: 2, Serving: 1, Error: v1alpha1.FunctionError{Code: "digest-mismatch", Detail: "the registry returned other bytes"}}}},
				Store:     &v1alpha1.StoreStatus{Path: "/data/store", Objects: 4, UsedBytes: 12 << 20, BudgetBytes: 10 << 30},
				Engine:    &v1alpha1.EngineStatus{Reachable: true, PID: 7, Workers: []v1alpha1.WorkerStatus{{ID: "default", Tenant: "default", PID: 8, State: "running", Since: now, Functions: 3, RSSBytes: 30 << 20}}},
				Disk:      &v1alpha1.DiskStatus{Path: "/data", TotalBytes: 100 << 30, FreeBytes: 33 << 30},
			}
		}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestStatus(t *testing.T) {
	tests := []struct {
		name   string
		report func(registry, engine, disk *health.Check, r *health.Registry)
		code   int
	}{
		{"healthy", func(a, b, c *health.Check, _ *health.Registry) { a.OK("answers"); b.OK("answers"); c.OK("33 GiB free") }, 0},
		{"degraded", func(a, b, c *health.Check, r *health.Registry) {
			a.OK("answers")
			b.OK("answers")
			c.Fail("3 MiB free", "")
			r.RecordError("disk-full", "hello", errors.New("no space left on device"))
			r.RecordError("disk-full", "hello", errors.New("no space left on device"))
		}, exitDegraded},
		{"failed", func(a, b, c *health.Check, _ *health.Registry) {
			a.Fail("connection refused \x1b[2J", "")
			b.Fail("no answer", "")
			c.OK("")
		}, exitFailed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			socket := serveAgent(t, func(r *health.Registry) {
				registry := r.Register(health.Definition{Code: "registry", Severity: v1alpha1.SeverityCritical, Remedy: "restart nodeagent"})
				engine := r.Register(health.Definition{Code: "engine", Severity: v1alpha1.SeverityCritical, DependsOn: []string{"registry"}, Remedy: "wait"})
				disk := r.Register(health.Definition{Code: "disk", Severity: v1alpha1.SeverityWarning, Remedy: "free some space"})
				tt.report(registry, engine, disk, r)
			})
			for _, format := range []string{"text", "json"} {
				got := execute(t, t.Context(), "", "status", "--socket", socket, "-o", format)
				if got.code != tt.code || got.stderr != "" {
					t.Errorf("exit code %d, %s", got.code, got.stderr)
				}
				golden(t, "status-"+tt.name+"-"+format, got.stdout)
			}
		})
	}
}

func TestStatusOfNobody(t *testing.T) {
	dir := t.TempDir()
	silent := filepath.Join(dir, "silent.sock")
	ln, err := localsocket.Listen(silent)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	notAgent := filepath.Join(dir, "other.sock")
	other, err := localsocket.Listen(notAgent)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") })}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(other) }()
	defer func() { _ = server.Close(); <-done }()

	for name, tt := range map[string]struct{ socket, want string }{
		"no socket":          {filepath.Join(dir, "none.sock"), "no agent answers"},
		"a listener, frozen": {silent, "did not answer within 800ms"},
		"another server":     {notAgent, "does not answer as the agent does"},
	} {
		t.Run(name, func(t *testing.T) {
			got := execute(t, t.Context(), "", "status", "--socket", tt.socket)
			if got.code != exitUnreachable || !strings.Contains(got.stderr, tt.want) || got.stdout != "" {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestDoctorLooksAtTheRealMachine(t *testing.T) {
	a := newFakeAPI(t)
	socket := serveAgent(t, func(r *health.Registry) {
		r.Register(health.Definition{Code: "x", Severity: v1alpha1.SeverityCritical}).OK("")
	})
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	got := execute(t, t.Context(), "", "doctor", "--socket", socket, "--data-dir", dir, "--url", a.URL, "-o", "json")
	var d diagnosis
	if err := json.Unmarshal([]byte(got.stdout), &d); err != nil {
		t.Fatal(err)
	}
	state := map[string]string{}
	for _, f := range d.Findings {
		state[f.Code] = f.State
		if f.Message == "" || f.Why == "" || (f.State == findingBroken || f.State == findingWarning) && f.Remedy == "" {
			t.Errorf("%+v", f)
		}
	}
	for code, want := range map[string]string{"data-directory": findingBroken, "agent": findingOK, "engine": findingOK, "api": findingOK, "port": findingOK} {
		if state[code] != want {
			t.Errorf("%s is %s, want %s", code, state[code], want)
		}
	}
	if len(state) != 13 || got.code != exitFailed || d.State != findingBroken {
		t.Errorf("%d findings, exit code %d", len(state), got.code)
	}
}

func TestDoctorNamesTheHolderOfThePort(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	got := execute(t, t.Context(), "", "doctor", "--data-dir", t.TempDir(), "--socket", filepath.Join(t.TempDir(), "s"), "--url", server.URL)
	if want := fmt.Sprintf("is in use by process %d", os.Getpid()); !strings.Contains(got.stdout, want) {
		t.Errorf("%q is missing in\n%s", want, got.stdout)
	}
}

func TestDiagnosisAsText(t *testing.T) {
	var b bytes.Buffer
	printDiagnosis(&b, diagnosis{Findings: []finding{
		{Code: "seccomp", State: findingOK, Message: "the kernel has seccomp filters", Why: "x"},
		{Code: "port", State: findingBroken, Message: "127.0.0.1:8080 is in use by process 9 (nc)", Why: "the API answers there", Remedy: "stop it"},
		{Code: "engine", State: findingSkipped, Message: "only the agent could tell"},
	}})
	golden(t, "doctor", b.String())
}

func TestListeningInode(t *testing.T) {
	const line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0000 100 0 0 10 0"
	if inode, ok := listeningInode(line, 8080); !ok || inode != "31337" {
		t.Errorf("%s %v", inode, ok)
	}
	for _, other := range []string{"", "sl local_address", strings.Replace(line, " 0A ", " 01 ", 1), strings.Replace(line, "1F90", "zz", 1)} {
		if _, ok := listeningInode(other, 8080); ok {
			t.Errorf("%q was taken", other)
		}
	}
}

func TestSubmitBuildsAGoDirectory(t *testing.T) {
	if testing.Short() {
		t.Skip("builds for wasip1")
	}
	if _, err := exec.LookPath("go"); err != nil {
		needs.Missing(t, "no go command: %v", err)
	}
	a := newFakeAPI(t)
	dir := filepath.Join(t.TempDir(), "greeter")
	write(t, dir, "go.mod", "module example.org/greeter\n\ngo 1.21\n")
	write(t, dir, "main.go", "package main\n\nfunc main() { println(\"hi\") }\n")
	write(t, dir, "lib/lib.go", "package lib\n")
	write(t, dir, "bad/main.go", "package main\n\nfunc main() { undefined() }\n")

	got := execute(t, t.Context(), "", "submit", dir, "--url", a.URL)
	if got.code != 0 || !strings.Contains(got.stdout, "greeter is ready: revision 1") || !strings.Contains(got.stderr, "building greeter …") {
		t.Errorf("%+v", got)
	}
	for name, want := range map[string]string{"lib": `is the package "lib", not a program`, "bad": "undefined: undefined"} {
		if got := execute(t, t.Context(), "", "submit", filepath.Join(dir, name), "--url", a.URL); got.code != exitFailure || !strings.Contains(got.stderr, want) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if got := execute(t, t.Context(), "", "submit", dir, "--url", a.URL); got.code != exitFailure || !strings.Contains(got.stderr, "go.dev/dl") {
		t.Errorf("without go: %+v", got)
	}
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDirectoriesThatAreNotBuiltSayWhatToDo(t *testing.T) {
	for file, want := range map[string]string{
		"Makefile": "build it, then submit the .wasm file", "main.c": "clang --target=wasm32-wasi", "Cargo.toml": "cargo build",
		"main.go": "go mod init", "x.wasm": "nodeagent submit", "README": "compile it for wasip1",
	} {
		t.Run(file, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, file, "")
			err := buildable(dir)
			if err == nil || !strings.Contains(err.remedy, want) {
				t.Errorf("%+v", err)
			}
		})
	}
}

func TestTargets(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "Hello_World.v2.wasm", "")
	write(t, dir, "main.go", "")
	tests := []struct{ arg, kind, name string }{
		{filepath.Join(dir, "Hello_World.v2.wasm"), "file", "hello-world-v2"},
		{"registry.example.org/team/My:1", "", ""},
		{"registry.example.org/team/my-fn:1", "image", "my-fn"},
		{"localhost:5000/x@sha256:" + strings.Repeat("a", 64), "image", "x"},
		{"127.0.0.1:5000/a/b", "image", "b"},
		{"some/dir", "", ""},
		{"some.dir/module.wasm", "", ""},
		{filepath.Join(dir, "main.go"), "", ""},
		{"/dev/null", "", ""},
	}
	for _, tt := range tests {
		got, err := parseTarget(tt.arg)
		if (err != nil) != (tt.kind == "") || got.kind != tt.kind {
			t.Errorf("%s: %+v %v", tt.arg, got, err)
			continue
		}
		if err == nil && got.name() != tt.name {
			t.Errorf("%s is named %q", tt.arg, got.name())
		}
	}
}

var validName = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

func FuzzSanitizeName(f *testing.F) {
	for _, s := range []string{"hello", "My App_2", "123", "-x-", "ünï", strings.Repeat("ab-", 40), "xn--a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if name := sanitizeName(s); name != "" && !validName.MatchString(name) {
			t.Errorf("%q", name)
		}
	})
}

func FuzzParsePair(f *testing.F) {
	for _, s := range []string{"A=1", "A", "=x", "A=b=c", "A=", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, value, err := parsePair(s)
		if err == nil && (name == "" || name+"="+value != s || strings.Contains(name, "=")) {
			t.Errorf("%q %q", name, value)
		}
	})
}

func FuzzParseSecret(f *testing.F) {
	for _, s := range []string{"A=hunter2value", "A", "=hunter2value", "A=@/file", "A=", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, _, err := parseSecret(s, func(string) (string, bool) { return "", false }, func(string) (string, error) { return "", errors.New("unreadable") })
		_, value, explicit := strings.Cut(s, "=")
		if err != nil && explicit && len(value) > 8 && value[0] != '@' && strings.Contains(err.Error(), value) && !strings.Contains("the name is empty; write NAME, NAME=@FILE or NAME=VALUE", value) {
			t.Errorf("the error tells the value: %v", err)
		}
	})
}

func TestParseMiB(t *testing.T) {
	for s, want := range map[string]int{"64": 64, "64M": 64, "64MiB": 64, "64 MiB": 64, "1G": 1024, "1gib": 1024, "": 0, "x": 0, "-1": 0, "0": 0, "64KB": 0, "1.5G": 0, "9999999999999999999": 0, "9007199254740993G": 0} {
		got, err := parseMiB(s)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d %v", s, got, err)
		}
	}
}

func TestReorderMovesOptionsBeforeArguments(t *testing.T) {
	app := command.Prepare(newApp())
	for in, want := range map[string]string{
		"logs hello --follow":                     "logs --follow hello",
		"logs hello -f --tail 5":                  "logs --follow --tail 5 hello",
		"invoke hello /x -d @- -i":                "invoke --data @- --include hello /x",
		"invoke -d -1 hello":                      "invoke --data -1 hello",
		"functions get hello -o json":             "functions get --output json hello",
		"functions set h --env A=b --memory=1G":   "functions set --env A=b --memory=1G h",
		"logs -- --follow":                        "logs -- --follow",
		"logs hello -- -f":                        "logs hello -- -f",
		"invoke hello -":                          "invoke hello -",
		"logs hello --help":                       "logs --help",
		"logs h " + command.CompletionRequest:     "logs h " + command.CompletionRequest,
		"nonsense a --b":                          "nonsense a --b",
		"":                                        "",
		"functions rollback hello --to":           "functions rollback --to hello",
		"functions --help":                        "functions --help",
		"submit ./dir --secret K --name=x --wait": "submit --secret K --name=x --wait ./dir",
	} {
		got := strings.Join(command.Reorder(app, append([]string{"nodeagent"}, strings.Fields(in)...)), " ")
		if strings.TrimSpace(strings.TrimPrefix(got, "nodeagent")) != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}

func TestEveryCommandAndOptionSaysWhatItIs(t *testing.T) {
	app := command.Prepare(newApp())
	var walk func(prefix string, commands []*cli.Command)
	walk = func(prefix string, commands []*cli.Command) {
		for _, c := range commands {
			name := prefix + " " + c.Name
			if c.Usage == "" {
				t.Errorf("%s has no usage", name)
			}
			if len(c.Subcommands) > 0 && c.Description == "" {
				t.Errorf("%s has no description", name)
			}
			for _, f := range c.Flags {
				if d, ok := f.(cli.DocGenerationFlag); !ok || d.GetUsage() == "" {
					t.Errorf("%s: option %s has no usage", name, f.Names()[0])
				}
			}
			walk(name, c.Subcommands)
		}
	}
	walk(app.Name, app.Commands)
}

func TestRemediesAreForProblemsThatExist(t *testing.T) {
	// The gateway's own, which the API does not know.
	kinds := map[string]bool{"function-not-ready": true, "function-out-of-memory": true, "deadline-exceeded": true, "too-many-requests": true}
	for _, k := range submit.Problems() {
		kinds[k.Code] = true
	}
	for code := range remedies {
		if !kinds[code] {
			t.Errorf("the API has no problem %q", code)
		}
	}
}

func TestCompletionScriptsAreComplete(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		got := execute(t, t.Context(), "", "completion", shell)
		if got.code != 0 || !strings.Contains(got.stdout, "nodeagent") || strings.Contains(got.stdout, "NODEAGENT") {
			t.Errorf("%s: %+v", shell, got)
		}
		tool, err := exec.LookPath(shell)
		if err != nil || shell == "powershell" {
			continue
		}
		cmd := exec.CommandContext(t.Context(), tool, "-n")
		cmd.Stdin = strings.NewReader(got.stdout)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
}

func TestCompletionKnowsFunctions(t *testing.T) {
	a := newFakeAPI(t)
	os.Args = []string{"nodeagent", "functions", "get", command.CompletionRequest} // the library looks there
	got := execute(t, t.Context(), "", "functions", "get", "--url", a.URL, command.CompletionRequest)
	if got.stdout != "broken\nfresh\nhello\n" {
		t.Errorf("%+v", got)
	}
}

func TestManPage(t *testing.T) {
	for _, section := range []string{"1", "8"} {
		got := execute(t, t.Context(), "", "man", "--section", section)
		if !strings.Contains(got.stdout, ".TH nodeagent "+section) || !strings.Contains(got.stdout, "rollback") {
			t.Errorf("section %s: %.200s", section, got.stdout)
		}
	}
	if got := execute(t, t.Context(), "", "man", "--section", "3"); got.code != exitUsage {
		t.Errorf("%+v", got)
	}
}

func TestPrintableShowsControlCharacters(t *testing.T) {
	for in, want := range map[string]string{"plain ü\t": "plain ü\t", "\x1b[2J": `\x1b[2J`, "a\nb\r": `a\x0ab\x0d`, "\u202e": `\x202e`, "\u009b": `\x9b`} {
		if got := printable(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestHumanNumbers(t *testing.T) {
	for got, want := range map[string]string{
		humanBytes(0): "0 B", humanBytes(1023): "1023 B", humanBytes(1536): "1.5 KiB", humanBytes(int64(50 << 20)): "50.0 MiB", humanBytes(uint64(200 << 30)): "200 GiB",
		humanDuration(1500 * time.Microsecond): "1.5 ms", humanDuration(90 * time.Second): "1 min", humanDuration(25 * time.Hour): "25 h 0 min", humanDuration(72 * time.Hour): "3 days",
		humanMilliseconds(0.5): "0.50 ms", humanMilliseconds(1204): "1.2 s",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
