package engine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

// state gives the node all of a State but its generation.
func (n *node) state(s control.State) {
	n.t.Helper()
	n.mu.Lock()
	n.generation++
	s.Generation = n.generation
	n.mu.Unlock()
	if err := n.control.PutState(n.t.Context(), s); err != nil {
		n.t.Fatal(err)
	}
}

// elsewhere tells the node that functions are to be had from others.
func (n *node) elsewhere(name string, peers ...string) {
	n.t.Helper()
	n.state(control.State{Pending: []control.Pending{{Name: name, Tenant: "default", Reach: control.Reach{Peers: peers}}}})
}

// forwarded is the count of forwarded requests with this result.
func (n *node) forwarded(result string) float64 {
	n.t.Helper()
	families, err := n.control.Metrics(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "hearth_gateway_forwarded_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// refusingAddress is where nobody listens.
func refusingAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// fakePeer is a gateway that does what none of ours would.
func fakePeer(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}

func TestRequestsAreForwardedToANodeThatHasTheFunction(t *testing.T) {
	serving, asked := startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", nil), serving.function("go", "go", nil))
	asked.state(control.State{Pending: []control.Pending{
		{Name: "c", Tenant: "default", Reach: control.Reach{Peers: []string{serving.address}}},
		{Name: "go", Tenant: "default", Reach: control.Reach{Peers: []string{serving.address}}},
	}})

	a := asked.get("c", "/status")
	wantBody(t, a, 418, "short and stout")
	if a.Header.Get("X-Own") != "yes" || a.Header.Get("X-Own-Hop") != "" || a.Header.Get(headerNotServed) != "" {
		t.Errorf("header %v", a.Header)
	}
	timing := strings.Join(a.Header.Values(headerServerTiming), ", ")
	for _, phase := range []string{"forward", "queue", "instantiate", "firstbyte"} {
		if strings.Count(timing, phase+";dur=") != 1 {
			t.Errorf("Server-Timing: %q", timing)
		}
	}
	log := asked.get("c", "/log")
	if ids := log.Header.Values(headerRequestID); len(ids) != 1 {
		t.Errorf("identifiers %q", ids)
	}
	serving.eventually("the log knows the request", func() bool {
		return slices.ContainsFunc(serving.lines("c", control.LogOptions{}), func(l v1alpha1.LogLine) bool {
			return l.Request == log.Header.Get(headerRequestID)
		})
	})

	r := asked.request(t.Context(), http.MethodPost, "c.localhost:8080", "/env?a=%20&b", strings.NewReader("12345"))
	r.Header = http.Header{
		"X-Forwarded-For": {"192.0.2.1"}, "Hearth-Key": {"forged"}, "Connection": {"X-Hop"}, "X-Hop": {"gone"},
		"Proxy": {"evil"}, "Content-Type": {"text/x-test"}, "X-Two": {"one", "two"},
	}
	body := "\n" + asked.send(r).body
	for _, want := range []string{
		"PATH_INFO=/env", "QUERY_STRING=a=%20&b", "CONTENT_LENGTH=5", "SERVER_PORT=8080", "SCRIPT_NAME=", "REQUEST_METHOD=POST",
		"HTTP_X_FORWARDED_FOR=192.0.2.1, 127.0.0.1", "HTTP_HOST=c.localhost:8080", "HTTP_X_TWO=one, two",
	} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no %q", want)
		}
	}
	for _, bad := range []string{"HTTP_HEARTH_KEY", "HTTP_HEARTH_FORWARDED", "X_HOP", "evil", "HTTP_EXPECT"} {
		if strings.Contains(body, bad) {
			t.Errorf("%q is in the environment", bad)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
	path := asked.send(asked.request(t.Context(), http.MethodGet, "localhost", "/f/c/env", nil))
	if !strings.Contains(path.body, "\nSCRIPT_NAME=/f/c\n") || len(path.Header.Values("Content-Security-Policy")) != 1 {
		t.Errorf("path form: %q, %s", path.Header.Values("Content-Security-Policy"), path.body)
	}

	for _, size := range []int{0, 1, 64 << 10, 64<<10 + 1, 1 << 20, 9 << 20} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader = bytes.NewReader(make([]byte, size))
			if chunked {
				body = struct{ io.Reader }{body}
			}
			wantBody(t, asked.send(asked.request(t.Context(), http.MethodPost, "c.localhost", "/count", body)), 200, fmt.Sprintln(size))
		}
	}
	wantProblem(t, asked.send(asked.request(t.Context(), http.MethodPost, "c.localhost", "/count",
		bytes.NewReader(make([]byte, v1alpha1.MaxRequestBytes+1)))), 413, "body-too-large")
	wantProblem(t, asked.get("c", "/trap"), 502, "function-trapped")
	head := asked.send(asked.request(t.Context(), http.MethodHead, "c.localhost", "/hello", nil))
	if head.StatusCode != 200 || head.body != "" {
		t.Errorf("HEAD: %d %q", head.StatusCode, head.body)
	}
	r = asked.request(t.Context(), http.MethodGet, "c.localhost", "/", nil)
	r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
	wantProblem(t, asked.send(r), 501, "upgrade-unsupported")
	wantProblem(t, asked.get("absent", "/"), 404, "function-not-found")
	if n := asked.forwarded("ok"); n < 15 {
		t.Errorf("%v requests counted as forwarded", n)
	}
}

func TestForwardedBodiesStreamBothWays(t *testing.T) {
	serving, asked := startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", nil))
	asked.elsewhere("c", serving.address)
	resp, err := asked.http.Do(asked.request(t.Context(), http.MethodGet, "c.localhost", "/stream", nil))
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
		t.Errorf("%d lines, the first after %v of %v", len(got), first, total)
	}

	// The answer begins before the request has ended: nothing waits for all of it.
	reader, writer := io.Pipe()
	result := make(chan *http.Response, 1)
	go func() {
		resp, err := asked.http.Do(asked.request(t.Context(), http.MethodPost, "c.localhost", "/echo", reader))
		if err != nil {
			t.Error(err)
		}
		result <- resp
	}()
	chunk := bytes.Repeat([]byte("0123456789abcdef"), 32<<10)
	if _, err := writer.Write(chunk); err != nil {
		t.Fatal(err)
	}
	if resp = <-result; resp == nil {
		t.FailNow()
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, len(chunk)/2)); err != nil {
		t.Errorf("the first half: %v", err)
	}
	if _, err := writer.Write([]byte("the end")); err != nil {
		t.Error(err)
	}
	writer.Close()
	rest, err := io.ReadAll(resp.Body)
	if len(rest) != len(chunk)/2+len("the end") || err != nil {
		t.Errorf("%d bytes follow, %v", len(rest), err)
	}
}

func TestForwardingPassesOverNodesThatDoNotAnswerOrServe(t *testing.T) {
	serving, empty, asked := startNode(t, nil), startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", nil))
	empty.put()
	stranger := fakePeer(t, func(w http.ResponseWriter, _ *http.Request) { http.NotFound(w, nil) })
	asked.elsewhere("c", refusingAddress(t), empty.address, serving.address, stranger)
	large := strings.Repeat("x", 1<<20)
	for range 12 { // in any order
		wantBody(t, asked.get("c", "/"), 200, "hello from c\n")
		wantBody(t, asked.send(asked.request(t.Context(), http.MethodPost, "c.localhost", "/count", strings.NewReader("12345"))), 200, "5\n")
		wantBody(t, asked.send(asked.request(t.Context(), http.MethodPost, "c.localhost", "/count", strings.NewReader(large))), 200, fmt.Sprintln(len(large)))
		wantBody(t, asked.send(asked.request(t.Context(), http.MethodPost, "c.localhost", "/count", struct{ io.Reader }{strings.NewReader(large)})), 200, fmt.Sprintln(len(large)))
	}
}

func TestFunctionThatNoNodeHasIsNotForwardedForEver(t *testing.T) {
	a, b := startNode(t, nil), startNode(t, nil)
	// Each thinks that the other has it.
	a.elsewhere("c", b.address)
	b.elsewhere("c", a.address)
	p := a.get("c", "/")
	wantProblem(t, p, 503, "function-not-ready")
	if p.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if a.forwarded("function-not-ready") != 1 || b.forwarded("function-not-ready") != 0 {
		t.Error("the second node forwarded too")
	}
	// And itself.
	a.elsewhere("c", a.address)
	wantProblem(t, a.get("c", "/"), 503, "function-not-ready")
	a.elsewhere("c", refusingAddress(t), refusingAddress(t))
	wantProblem(t, a.get("c", "/"), 502, "peer-unreachable")
	a.elsewhere("c")
	wantProblem(t, a.get("c", "/"), 503, "function-not-ready")
	// The mark is a loop guard and nothing else.
	a.deploy(a.function("c", "c", nil))
	r := a.request(t.Context(), http.MethodGet, "c.localhost", "/", nil)
	r.Header.Set(headerForwarded, "anybody")
	wantBody(t, a.send(r), 200, "hello from c\n")
	b.elsewhere("c", a.address)
	r = b.request(t.Context(), http.MethodGet, "c.localhost", "/", nil)
	r.Header.Set(headerForwarded, "anybody")
	if p := b.send(r); p.Header.Get(headerNotServed) == "" {
		t.Errorf("%d without a word that it is not served here", p.StatusCode)
	} else {
		wantProblem(t, p, 503, "function-not-ready")
	}
}

func TestRequestIsNotSentTwiceToPeers(t *testing.T) {
	var requests atomic.Int32
	lost := fakePeer(t, func(http.ResponseWriter, *http.Request) {
		requests.Add(1)
		panic(http.ErrAbortHandler)
	})
	again := fakePeer(t, func(http.ResponseWriter, *http.Request) {
		requests.Add(1)
		panic(http.ErrAbortHandler)
	})
	n := startNode(t, nil)
	n.elsewhere("c", lost, again)
	for _, size := range []int{10, 1 << 20} {
		requests.Store(0)
		wantProblem(t, n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/", strings.NewReader(strings.Repeat("x", size)))), 502, "peer-lost")
		if got := requests.Load(); got != 1 {
			t.Errorf("%d bytes were sent %d times", size, got)
		}
	}
	// One that takes the body before it says no: there is none for the next.
	thief := func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set(headerNotServed, "late")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	n.elsewhere("c", fakePeer(t, thief), fakePeer(t, thief))
	requests.Store(0)
	wantProblem(t, n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/", strings.NewReader(strings.Repeat("x", 1<<20)))), 502, "peer-lost")
	if got := requests.Load(); got != 1 {
		t.Errorf("sent %d times", got)
	}
}

func TestForwardedAnswerThatBreaksOffIsNotTakenForTheWhole(t *testing.T) {
	serving, asked := startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", nil))
	asked.elsewhere("c", serving.address)
	resp, err := asked.http.Do(asked.request(t.Context(), http.MethodGet, "c.localhost", "/drip", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := syscall.Kill(serving.worker("default").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the client takes %q for the whole", b)
	}
	asked.eventually("it is counted", func() bool { return asked.forwarded("broken-off") == 1 })
}

func TestClientThatLeavesTakesItsForwardedGuestWithIt(t *testing.T) {
	serving, asked := startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", nil))
	asked.elsewhere("c", serving.address)
	for _, body := range []io.Reader{nil, strings.NewReader("small")} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			resp, err := asked.http.Do(asked.request(ctx, http.MethodPost, "c.localhost", "/spin", body))
			if err == nil {
				resp.Body.Close()
			}
			done <- err
		}()
		serving.awaitInFlight("c", 1)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("the request ended with %v", err)
		}
		serving.awaitInFlight("c", 0)
	}
	// In the middle of an upload, which the guest does not read.
	conn := asked.dial()
	upload(t, conn, "POST /spin HTTP/1.1\r\nHost: c.localhost\r\nContent-Length: 1000000\r\n\r\n", make([]byte, 1000))
	serving.awaitInFlight("c", 1)
	_ = conn.Close()
	serving.awaitInFlight("c", 0)
	asked.eventually("they are counted", func() bool { return asked.forwarded("client-gone") == 3 })
}

func TestForwardedRequestKeepsADeadline(t *testing.T) {
	serving, asked := startNode(t, nil), startNode(t, nil)
	serving.deploy(serving.function("c", "c", func(f *control.Function) { f.TimeoutMS = 300 }))
	asked.elsewhere("c", serving.address)
	// The node that runs it says so.
	wantProblem(t, asked.get("c", "/sleep"), 504, "deadline-exceeded")
	// One that does not is not waited for.
	release := make(chan struct{})
	silent := fakePeer(t, func(http.ResponseWriter, *http.Request) { <-release })
	defer close(release)
	asked.state(control.State{Pending: []control.Pending{{Name: "c", Tenant: "default", TimeoutMS: 100, Reach: control.Reach{Peers: []string{silent}}}}})
	p := wantProblem(t, asked.get("c", "/"), 504, "deadline-exceeded")
	if !strings.Contains(p.Detail, "node") {
		t.Error(p.Detail)
	}
}

func TestFunctionOnItsWayIsForwardedUntilItIsHere(t *testing.T) {
	serving := startNode(t, nil)
	serving.deploy(serving.function("c", "go", func(f *control.Function) { f.Secrets = map[string]string{"WHERE": "there"} }))
	// A node that has the function and cannot load it.
	stuck := startNode(t, func(o *Options) { o.WorkerEnv = []string{childEnvironment + "=hang"} })
	reach := func(f *control.Function) { f.Peers = []string{serving.address} }
	stuck.put(stuck.function("c", "c", reach))
	wantBody(t, stuck.get("c", "/"), 200, "hello from go\n")
	// Nobody else has it: what is wrong here is what the client hears.
	stuck.put(stuck.function("c", "c", func(f *control.Function) { f.Peers = []string{refusingAddress(t)} }))
	wantProblem(t, stuck.get("c", "/"), 502, "peer-unreachable")

	asked := startNode(t, nil)
	asked.elsewhere("c", serving.address)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if a := asked.get("c", "/"); a.StatusCode != 200 {
					t.Errorf("%d %s", a.StatusCode, a.body)
					return
				}
			}
		})
	}
	asked.deploy(asked.function("c", "c", reach))
	asked.elsewhere("c", serving.address)
	asked.deploy(asked.function("c", "c", reach))
	close(stop)
	group.Wait()
	wantBody(t, asked.get("c", "/"), 200, "hello from c\n")
}

func TestChangeOfPeersAndRoutesReloadsNothing(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil))
	pid, before := n.worker("default").PID, len(n.lines("c", control.LogOptions{}))
	n.put(n.function("c", "c", func(f *control.Function) {
		f.Peers = []string{"192.0.2.1:80", "no address", "name.example:80"}
		f.Routes = []v1alpha1.HostRoute{{Host: "shop.example.com", Path: "/"}}
	}))
	wantBody(t, n.send(n.request(t.Context(), http.MethodGet, "shop.example.com", "/", nil)), 200, "hello from c\n")
	loads := strings.Count(n.logs.String(), "function is warm")
	if w := n.worker("default"); w.PID != pid || w.Functions != 1 || loads > 1 || len(n.lines("c", control.LogOptions{})) != before {
		t.Errorf("loaded again: %+v, %d loads", w, loads)
	}
	if !strings.Contains(n.logs.String(), "a peer of a function ignored") {
		t.Error("a peer that is no address is taken")
	}
}

func TestHostsAndBaseDomainFollowTheState(t *testing.T) {
	serving, n := startNode(t, nil), startNode(t, nil)
	routes := func(f *control.Function) {
		f.Routes = []v1alpha1.HostRoute{{Host: "shop.example.com", Path: "/env"}}
	}
	for _, base := range []string{"fn.example.org", "10.0.0.1.nip.io", ""} {
		serving.state(control.State{BaseDomain: base, Functions: []control.Function{serving.function("c", "c", routes)}})
		serving.awaitStatus("c", func(s control.FunctionStatus) bool { return s.Serving == 1 })
		n.state(control.State{BaseDomain: base, Pending: []control.Pending{{Name: "c", Tenant: "default", Reach: control.Reach{
			Peers: []string{serving.address}, Routes: []v1alpha1.HostRoute{{Host: "shop.example.com", Path: "/env"}},
		}}}})
		if base == "" {
			base = "localhost" // what it was started with
		}
		for _, node := range []*node{serving, n} {
			get := func(host, path string) answer {
				return node.send(node.request(t.Context(), http.MethodGet, host, path, nil))
			}
			wantBody(t, get("c."+base, "/"), 200, "hello from c\n")
			body := "\n" + get("shop.example.com", "/env").body
			if !strings.Contains(body, "\nPATH_INFO=/env\n") || !strings.Contains(body, "\nSCRIPT_NAME=\n") || !strings.Contains(body, "\nHTTP_HOST=shop.example.com\n") {
				t.Errorf("custom host: %s", body)
			}
			if a := get("shop.example.com", "/"); a.StatusCode != 404 || a.problem(t).Type != problemPrefix+"not-found" {
				t.Errorf("a path that leads nowhere: %d", a.StatusCode)
			}
			for _, other := range []string{"c.fn.example.org", "c.localhost", "evil.example.com"} {
				if a := get(other, "/"); other != "c."+base && a.StatusCode != 421 {
					t.Errorf("%s below %s: %d", other, base, a.StatusCode)
				}
			}
		}
	}
}

// A peer is told what the client said and nothing that only this node knows.
func TestPeersNeverReceiveSecrets(t *testing.T) {
	var seen bytes.Buffer
	var mu sync.Mutex
	peer := fakePeer(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		_ = r.Write(&seen)
		mu.Unlock()
		w.Header().Set(headerRequestID, "theirs")
		_, _ = io.WriteString(w, "there")
	})
	n := startNode(t, func(o *Options) {
		o.Name = "node-a"
		o.WorkerEnv = []string{childEnvironment + "=hang"}
	})
	n.put(n.function("c", "c", func(f *control.Function) {
		f.Env, f.Secrets = map[string]string{"PLAIN": "setting-of-the-function"}, map[string]string{"TOKEN": "s3cret-of-the-function"}
		f.Peers = []string{peer}
	}))
	for _, body := range []io.Reader{nil, strings.NewReader("small"), strings.NewReader(strings.Repeat("large", 64<<10))} {
		wantBody(t, n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/x", body)), 200, "there")
	}
	mu.Lock()
	defer mu.Unlock()
	if all := seen.String(); strings.Contains(all, "of-the-function") || strings.Contains(all, "TOKEN") || strings.Count(all, "Hearth-Forwarded: node-a") != 3 {
		t.Errorf("the peer was told %.2000s", all)
	}
}

func TestPeersThatWereNotReachedAreAskedLast(t *testing.T) {
	p := newPeers("n")
	all := []string{"a:1", "b:1", "c:1"}
	first := map[string]bool{}
	for range 200 {
		order := p.order(all)
		first[order[0]] = true
		if len(order) != 3 {
			t.Fatal(order)
		}
	}
	if len(first) != 3 {
		t.Errorf("only %v come first", first)
	}
	if !p.missed("a:1") || p.missed("a:1") {
		t.Error("news is not told once")
	}
	for range 50 {
		if order := p.order(all); order[2] != "a:1" {
			t.Fatal(order)
		}
	}
	p.away["a:1"] = time.Now().Add(-time.Second)
	if p.order(all); len(p.away) != 0 {
		t.Error("remembered for ever")
	}
	if !slices.Equal(all, []string{"a:1", "b:1", "c:1"}) {
		t.Error("the list was changed")
	}
}
