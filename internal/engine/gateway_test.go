package engine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

func TestRequestBecomesCGIVariables(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) {
		f.Env = map[string]string{"GREETING": "hi", "PATH_INFO": "/forged", "HTTP_X_FORGED": "yes", "BOTH": "env"}
		f.Secrets = map[string]string{"TOKEN": "s3cret", "BOTH": "secret"}
	}))
	r := n.request(t.Context(), http.MethodPost, "C.LocalHost.:8080", "/env?a=1&b=%20", strings.NewReader("12345"))
	r.Header = http.Header{
		"Content-Type": {"text/x-test"}, "X-Two": {"one", "two"}, "Cookie": {"a=1", "b=2"},
		"Proxy": {"evil"}, "Hearth-Remote": {"1.2.3.4:5"}, "Connection": {"X-Hop"}, "X-Hop": {"gone"}, "X_Under": {"no"},
		"Authorization": {"Bearer x"},
	}
	body := "\n" + n.send(r).body
	for _, want := range []string{
		"argv0=/env argc=1", "GATEWAY_INTERFACE=CGI/1.1", "REQUEST_METHOD=POST", "QUERY_STRING=a=1&b=%20", "PATH_INFO=/env",
		"SCRIPT_NAME=", "SERVER_PROTOCOL=HTTP/1.1", "SERVER_PORT=8080", "CONTENT_LENGTH=5", "CONTENT_TYPE=text/x-test",
		"HTTP_X_TWO=one, two", "HTTP_COOKIE=a=1; b=2", "REMOTE_ADDR=127.0.0.1", "GREETING=hi", "TOKEN=s3cret", "BOTH=secret",
		"REQUEST_URI=/env?a=1&b=%20", "HTTP_AUTHORIZATION=Bearer x",
	} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no %q", want)
		}
	}
	for _, bad := range []string{"HTTP_PROXY", "evil", "1.2.3.4", "X_HOP", "FORGED", "forged", "UNDER", "HTTP_HEARTH_KEY"} {
		if strings.Contains(body, bad) {
			t.Errorf("%q is in the environment", bad)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
	body = "\n" + n.send(n.request(t.Context(), http.MethodGet, "localhost", "/f/c/env", nil)).body
	if !strings.Contains(body, "\nSCRIPT_NAME=/f/c\n") || !strings.Contains(body, "\nPATH_INFO=/env\n") {
		t.Errorf("path form: %s", body)
	}
}

func TestGuestHeadersReachTheClientFiltered(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil))
	a := n.get("c", "/status")
	wantBody(t, a, 418, "short and stout")
	if a.Header.Get("X-Own") != "yes" || a.Header.Get("X-Own-Hop") != "" || a.Header.Get("Hearth-Fault") != "" {
		t.Errorf("header %v", a.Header)
	}
	if a := n.get("c", "/redirect"); a.StatusCode != 302 || a.Header.Get("Location") != "/elsewhere" {
		t.Errorf("%d to %q", a.StatusCode, a.Header.Get("Location"))
	}
	if a := n.get("c", "/nocontent"); a.StatusCode != 204 || a.err != nil {
		t.Errorf("%d %v", a.StatusCode, a.err)
	}
	if a := n.get("c", "/large"); len(a.body) != 1<<20 || a.err != nil {
		t.Errorf("%d bytes, %v", len(a.body), a.err)
	}
	head := n.send(n.request(t.Context(), http.MethodHead, "c.localhost", "/hello", nil))
	if head.StatusCode != 200 || head.body != "" {
		t.Errorf("HEAD: %d %q", head.StatusCode, head.body)
	}
}

func TestBodiesOfAllSizesReachTheGuest(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("go", "go", nil))
	for _, size := range []int{0, 1, 64 << 10, 64<<10 + 1, 1 << 20, 9 << 20} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader = bytes.NewReader(make([]byte, size))
			if chunked {
				body = struct{ io.Reader }{body}
			}
			a := n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/count", body))
			wantBody(t, a, 200, fmt.Sprintln(size))
		}
	}
	content := strings.Repeat("0123456789abcdef", 20<<10)
	a := n.send(n.request(t.Context(), http.MethodPost, "go.localhost", "/echo", strings.NewReader(content)))
	if a.body != content || a.err != nil {
		t.Errorf("echo of %d bytes: %d: %d %.200q, %v", len(content), a.StatusCode, len(a.body), a.body, a.err)
	}
	over := make([]byte, v1alpha1.MaxRequestBytes+1)
	for _, body := range []io.Reader{bytes.NewReader(over), struct{ io.Reader }{bytes.NewReader(over)}} {
		wantProblem(t, n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/count", body)), 413, "body-too-large")
	}
}

func TestStreamedWritesArriveAsTheyAreMade(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("go", "go", nil))
	for _, f := range []string{"c", "go"} {
		resp, err := n.http.Do(n.request(t.Context(), http.MethodGet, f+".localhost", "/stream", nil))
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(resp.Body)
		began, first := time.Now(), time.Duration(0)
		var got []string
		for lines.Scan() {
			if got = append(got, lines.Text()); first == 0 {
				first = time.Since(began)
			}
		}
		resp.Body.Close()
		if total := time.Since(began); len(got) != 3 || first > total/2 {
			t.Errorf("%s: %d lines, the first after %v of %v", f, len(got), first, total)
		}
	}
}

func TestRequestsThatAreNotForAFunction(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := localsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	api := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "api %s %s", r.Host, r.URL.Path)
	})}
	go func() { _ = api.Serve(l) }()
	defer api.Close()
	n := startNode(t, func(o *Options) { o.APISocket = socket })
	n.put(n.function("c", "c", nil))
	tests := []struct {
		method, host, path string
		header             http.Header
		status             int
		want               string
	}{
		{"GET", "localhost:8080", "/v1/functions", nil, 200, "api localhost:8080 /v1/functions"},
		{"GET", "127.0.0.1", "/", nil, 200, "api 127.0.0.1 /"},
		{"GET", "[::1]:80", "/v2/", nil, 200, "api [::1]:80 /v2/"},
		{"GET", "localhost", "/other", nil, 404, "not-found"},
		{"GET", "evil.example", "/v1/functions", nil, 421, "host-not-served"},
		{"GET", "evil.example", "/f/c/", nil, 421, "host-not-served"},
		{"GET", "absent.localhost", "/v1/functions", nil, 404, "function-not-found"},
		{"GET", "localhost", "/f/absent/", nil, 404, "function-not-found"},
		{"POST", "localhost", "/v1/functions/c/rollback", http.Header{"Sec-Fetch-Site": {"same-site"}}, 403, "cross-origin"},
		{"TRACE", "localhost", "/", nil, 405, "method-not-allowed"},
		{"GET", "c.localhost", "/", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}, 501, "upgrade-unsupported"},
	}
	n.deploy(n.function("c", "c", nil))
	for _, test := range tests {
		t.Run(test.method+" "+test.host+test.path, func(t *testing.T) {
			r := n.request(t.Context(), test.method, test.host, test.path, nil)
			if test.header != nil {
				r.Header = test.header
			}
			a := n.send(r)
			if a.StatusCode != test.status || !strings.Contains(a.body, test.want) {
				t.Errorf("%d %s", a.StatusCode, a.body)
			}
		})
	}
}

func TestBusyFunctionQueuesThenRefuses(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.Concurrency, f.TimeoutMS = 1, 30_000 }))
	const all = 1 + queueFactor + 3
	var group sync.WaitGroup
	var ok, refused atomic.Int32
	for range all {
		group.Go(func() {
			switch a := n.get("c", "/nap"); a.StatusCode {
			case 200:
				ok.Add(1)
			case 429:
				refused.Add(1)
				if a.Header.Get("Retry-After") == "" {
					t.Error("429 without Retry-After")
				}
			}
		})
	}
	group.Wait()
	if ok.Load() < 1+queueFactor || ok.Load()+refused.Load() != all || refused.Load() == 0 {
		t.Errorf("%d answered, %d refused of %d", ok.Load(), refused.Load(), all)
	}
}

func TestClientThatLeavesTakesItsGuestWithIt(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil))
	for _, body := range []io.Reader{nil, strings.NewReader("small")} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := n.http.Do(n.request(ctx, http.MethodPost, "c.localhost", "/spin", body))
			done <- err
		}()
		n.awaitInFlight("c", 1)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("the request ended with %v", err)
		}
		n.awaitInFlight("c", 0)
	}
}

func (n *node) awaitInFlight(function string, want int) {
	n.t.Helper()
	n.eventually(fmt.Sprintf("%d requests in flight", want), func() bool {
		for _, f := range n.status().Functions {
			if f.Name == function {
				return f.InFlight == want
			}
		}
		return false
	})
}

func TestBodyThatStallsEndsAtTheDeadline(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.TimeoutMS = 500 }))
	// While the guest reads, its own deadline and the body's end together, and
	// either may speak first.
	for _, test := range []struct {
		length string
		status []string
	}{{"100", []string{"408"}}, {"1000000", []string{"408", "504"}}} {
		conn, err := net.Dial("tcp", n.address)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /count HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: %s\r\n\r\nhalf", test.length)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		line, err := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if fields := strings.Fields(line); err != nil || len(fields) < 2 || !slices.Contains(test.status, fields[1]) {
			t.Errorf("%q, %v", line, err)
		}
	}
	n.awaitInFlight("c", 0)
}

func TestRevisionsSwitchWithoutARefusedRequest(t *testing.T) {
	n := startNode(t, nil)
	revision := func(number int) control.Function {
		return n.function("c", []string{"c", "go"}[number%2], func(f *control.Function) { f.Revision = number })
	}
	n.deploy(revision(1))
	stop := make(chan struct{})
	var group sync.WaitGroup
	var requests atomic.Int64
	for range 4 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if a := n.get("c", "/"); a.StatusCode != 200 || !strings.HasPrefix(a.body, "hello from") {
					t.Errorf("%d %s", a.StatusCode, a.body)
					return
				}
				requests.Add(1)
			}
		})
	}
	for number := 2; number <= 8; number++ {
		n.deploy(revision(number))
	}
	close(stop)
	group.Wait()
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	n.eventually("old revisions are unloaded", func() bool { return n.worker("default").Functions == 1 })
	t.Logf("%d requests over 7 switches", requests.Load())
}

func TestKilledWorkerComesBackAndInnocentsAreRetried(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("go", "go", nil))
	pid := n.worker("default").PID
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() { wantBody(t, n.get("c", "/nap"), 200, "rested\n") })
	}
	n.awaitInFlight("c", 4)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	wantBody(t, n.get("go", "/"), 200, "hello from go\n")
	if w := n.worker("default"); w.PID == pid || w.Restarts != 1 {
		t.Errorf("pid %d, %d restarts", w.PID, w.Restarts)
	}
	n.awaitStatus("c", func(s control.FunctionStatus) bool { return s.Serving == 1 })

	// What has begun cannot be sent again: the client sees that it broke off.
	resp, err := n.http.Do(n.request(t.Context(), http.MethodGet, "c.localhost", "/stream", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := syscall.Kill(n.worker("default").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the client takes %q for the whole", b)
	}
}

// More guests spin than there are processors, and the rest still works: the
// worker answers pings, its collector runs, and others get their turn.
func TestSpinningGuestsHoldUpNobody(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("spin", "c", func(f *control.Function) { f.TimeoutMS = 4000 }), n.function("c", "c", nil), n.function("go", "go", nil))
	pid := n.worker("default").PID
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() { wantProblem(t, n.get("spin", "/spin"), 504, "deadline-exceeded") })
	}
	n.awaitInFlight("spin", 8)
	for range 10 {
		wantBody(t, n.get("c", "/"), 200, "hello from c\n")
		wantBody(t, n.get("go", "/"), 200, "hello from go\n")
	}
	group.Wait()
	if w := n.worker("default"); w.PID != pid {
		t.Errorf("the worker was killed: %s", w.LastExit)
	}
}

func TestObjectThatCannotBeUsedIsReported(t *testing.T) {
	n := startNode(t, nil)
	n.put(n.function("c", "c", func(f *control.Function) { f.ObjectDir += "0" }),
		n.function("small", "c", func(f *control.Function) { f.MemoryMiB = 1 }),
		n.function("odd", "c", func(f *control.Function) { f.Concurrency = 0 }))
	failed := func(s control.FunctionStatus) bool { return s.Progress == v1alpha1.ProgressFailed }
	for name, code := range map[string]string{"c": control.ErrorObjectUnusable, "small": control.ErrorInstantiate, "odd": control.ErrorInvalid} {
		if s := n.awaitStatus(name, failed); s.Error == nil || s.Error.Code != code {
			t.Errorf("%s: %+v", name, s.Error)
		}
		wantProblem(t, n.get(name, "/"), 503, "function-failed")
	}
	// The agent compiled it again: the next State tries once more.
	n.deploy(n.function("c", "c", nil))
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	n.put()
	n.eventually("workers without functions end", func() bool { return len(n.status().Workers) == 0 })
	wantProblem(t, n.get("c", "/"), 404, "function-not-found")
}

func TestWorkersThatDoNotComeUpAreReported(t *testing.T) {
	n := startNode(t, func(o *Options) { o.WorkerEnv = []string{childEnvironment + "=exit"} })
	n.put(n.function("c", "c", nil))
	n.eventually("the worker is tried again", func() bool { return n.worker("default").Restarts >= 2 })
	a := n.get("c", "/")
	wantProblem(t, a, 503, "function-not-ready")
	if a.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if w := n.worker("default"); !strings.Contains(w.LastExit, "exit status 7") {
		t.Errorf("last exit %q", w.LastExit)
	}
}

func TestLogsAreKeptAndFollowed(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := n.control.Logs(ctx, "c", control.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	a := n.get("c", "/log")
	d := json.NewDecoder(r)
	for _, want := range []string{"first line", "second \uFFFD line", "", "unfinished"} {
		var l v1alpha1.LogLine
		if err := d.Decode(&l); err != nil {
			t.Fatal(err)
		}
		if l.Line != want || l.Stream != "stderr" || l.Function != "c" || l.Revision != 1 || l.Request != a.Header.Get(headerRequestID) || l.Time.IsZero() {
			t.Errorf("%+v, want %q", l, want)
		}
	}
	if lines := n.lines("c", control.LogOptions{Tail: 1}); len(lines) != 1 || lines[0].Line != "unfinished" {
		t.Errorf("tail: %+v", lines)
	}
	if lines := n.lines("c", control.LogOptions{Since: time.Now().Add(time.Hour)}); len(lines) != 0 {
		t.Errorf("since: %+v", lines)
	}
	if _, err := n.control.Logs(ctx, "absent", control.LogOptions{}); err == nil {
		t.Error("logs of a function that is not there")
	}
	families, err := n.control.Metrics(ctx)
	if err != nil || len(families) == 0 {
		t.Errorf("%d metric families, %v", len(families), err)
	}
}

func TestWorkerMemoryIsSharedWithoutHarm(t *testing.T) {
	n := startNode(t, func(o *Options) { o.WorkerMemoryBytes = 64 << 20 })
	n.deploy(n.function("c", "c", func(f *control.Function) { f.MemoryMiB = 1024; f.TimeoutMS = 5000 }), n.function("go", "go", nil))
	pid := n.worker("default").PID
	for range 3 {
		wantProblem(t, n.get("c", "/memory"), 503, "worker-out-of-memory")
		// The answer goes out before the memory is given back.
		n.eventually("the other function has memory again", func() bool { return n.get("go", "/").StatusCode == 200 })
	}
	if w := n.worker("default"); w.PID != pid {
		t.Errorf("the worker was killed: %s", w.LastExit)
	}
}
