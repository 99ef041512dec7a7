package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

// gauge is the value of one of the node's gauges.
func (n *node) gauge(name string) float64 {
	n.t.Helper()
	families, err := n.control.Metrics(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			return family.GetMetric()[0].GetGauge().GetValue()
		}
	}
	n.t.Fatalf("no metric %s", name)
	return 0
}

// stale gives the node a state of an agent that does not know what changed since.
func (n *node) stale(gateways []string, functions ...control.Function) {
	n.t.Helper()
	n.state(control.State{Functions: functions, Gateways: gateways, Stale: true})
	for _, f := range functions {
		n.awaitStatus(f.Name, func(s control.FunctionStatus) bool { return s.Serving == f.Revision })
	}
}

// wantRefusal is wantProblem of what is no function's.
func wantRefusal(t *testing.T, a answer, status int, code string) {
	t.Helper()
	if p := a.problem(t); a.StatusCode != status || p.Type != problemPrefix+code {
		t.Errorf("got %d %s, want %d %s", a.StatusCode, a.body, status, code)
	}
}

func (n *node) at(host, path string) answer {
	return n.send(n.request(n.t.Context(), http.MethodGet, host, path, nil))
}

// tells is what the node says to another.
func (n *node) tells(about string) (answer peerAnswer) {
	n.t.Helper()
	a := n.at(n.address, peerPath+"?"+about)
	if err := json.Unmarshal([]byte(a.body), &answer); err != nil {
		n.t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	return answer
}

func TestANodeOutOfTouchAsksOthersForWhatItWasNotToldOf(t *testing.T) {
	t.Parallel()
	serving, knowing, lost := startNode(t, nil), startNode(t, nil), startNode(t, nil)
	routes := control.Reach{Routes: []v1alpha1.HostRoute{{Host: "shop.example.com", Path: "/"}}}
	newer := serving.function("newer", "c", func(f *control.Function) { f.Reach = routes })
	coming := control.Pending{Name: "coming", Tenant: "default"}
	serving.state(control.State{Functions: []control.Function{newer}, Pending: []control.Pending{coming}, Gateways: []string{knowing.address, lost.address}})
	serving.awaitStatus("newer", func(s control.FunctionStatus) bool { return s.Serving == 1 })
	reach := control.Reach{Routes: routes.Routes, Peers: []string{serving.address}}
	knowing.state(control.State{
		Pending:  []control.Pending{{Name: "newer", Tenant: "default", Reach: reach}, coming},
		Gateways: []string{serving.address, lost.address},
	})
	// Alone and in touch, what it was not told of is not there.
	lost.put()
	wantProblem(t, lost.get("newer", "/"), 404, "function-not-found")
	wantRefusal(t, lost.at("shop.example.com", "/"), 421, "host-not-served")
	// Its agent may only hear of it a moment later than another's.
	lost.state(control.State{Gateways: []string{knowing.address}})
	wantBody(t, lost.get("newer", "/"), 200, "hello from c\n")
	wantBody(t, lost.at("shop.example.com", "/"), 200, "hello from c\n")
	wantProblem(t, lost.get("absent", "/"), 404, "function-not-found")
	before := lost.forwarded("ok")

	// One question, and no second hop: the node that knows leads to the one that serves.
	lost.stale([]string{knowing.address})
	for _, a := range []answer{lost.get("newer", "/"), lost.at("localhost", "/f/newer/"), lost.at("shop.example.com", "/")} {
		wantBody(t, a, 200, "hello from c\n")
		if timing := strings.Join(a.Header.Values(headerServerTiming), ", "); !strings.Contains(timing, "forward;") {
			t.Errorf("not forwarded: %s", timing)
		}
	}
	large := strings.Repeat("x", 1<<20)
	wantBody(t, lost.send(lost.request(t.Context(), http.MethodPost, "newer.localhost", "/count", strings.NewReader(large))), 200, fmt.Sprintln(len(large)))
	if knowing.forwarded("ok") != 0 || lost.forwarded("ok") != before+4 {
		t.Errorf("forwarded %v by the node that knows, %v by the one that asks", knowing.forwarded("ok"), lost.forwarded("ok"))
	}
	p := lost.get("coming", "/")
	wantProblem(t, p, 503, "function-not-ready")
	if p.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	// Not there is what a peer says that is in touch.
	wantProblem(t, lost.get("absent", "/"), 404, "function-not-found")
	wantRefusal(t, lost.at("other.example.com", "/"), 421, "host-not-served")
	if lost.gauge("hearth_engine_out_of_touch") != 1 || knowing.gauge("hearth_engine_out_of_touch") != 0 {
		t.Error("the metric does not say which of them is out of touch")
	}
	// With an answer it learns of all gateways: any of them may go.
	knowing.state(control.State{Stale: true})
	if knows := lost.tells("").Gateways; len(knows) != 2 || slices.Contains(knows, lost.address) {
		t.Errorf("it knows of %q", knows)
	}
	lost.eventually("the other one is asked", func() bool { return lost.get("newer", "/").StatusCode == 200 })

	// An agent that is back has the last word.
	lost.put()
	wantProblem(t, lost.get("newer", "/"), 404, "function-not-found")
	if lost.gauge("hearth_engine_out_of_touch") != 0 {
		t.Error("still out of touch")
	}
}

func TestANodeThatWasNotToldWhereAFunctionIsServedAsks(t *testing.T) {
	t.Parallel()
	serving, pending := startNode(t, nil), startNode(t, nil)
	coming := control.Pending{Name: "coming", Tenant: "default"}
	pending.state(control.State{Pending: []control.Pending{coming, {Name: "own", Tenant: "default"}}, Gateways: []string{serving.address}})
	serving.state(control.State{Pending: []control.Pending{coming}})
	wantProblem(t, pending.get("coming", "/"), 503, "function-not-ready")
	wantProblem(t, pending.get("own", "/"), 503, "function-not-ready") // nobody else has heard of it

	serving.put(serving.function("coming", "c", nil))
	serving.awaitStatus("coming", func(s control.FunctionStatus) bool { return s.Serving == 1 })
	pending.eventually("it leads to who serves the function", func() bool { return pending.get("coming", "/").StatusCode == 200 })
	if pending.forwarded("ok") == 0 {
		t.Error("not forwarded")
	}
}

func TestANodeOutOfTouchDoesNotAnswerForWhatWasReplacedOrDeleted(t *testing.T) {
	t.Parallel()
	peer, lost := startNode(t, nil), startNode(t, nil)
	revision := func(n *node, number int, value string) control.Function {
		return n.function("c", "c", func(f *control.Function) {
			f.Revision, f.Env = number, map[string]string{"GREETING": value}
		})
	}
	answeredBy := func(what, want string) {
		t.Helper()
		var got string
		lost.eventually(what+" is answered by "+want, func() bool {
			a := lost.get("c", "/env")
			got = fmt.Sprint(a.StatusCode)
			for line := range strings.Lines(a.body) {
				if value, ok := strings.CutPrefix(line, "GREETING="); ok {
					got = strings.TrimSpace(value)
				}
			}
			if forwarded := strings.Contains(strings.Join(a.Header.Values(headerServerTiming), ","), "forward;"); a.StatusCode == 200 && forwarded != (got != "here") {
				t.Errorf("forwarded %t: %s", forwarded, got)
			}
			return got == want
		})
	}
	peer.deploy(revision(peer, 1, "peer"))
	lost.stale([]string{peer.address}, revision(lost, 1, "here"))
	answeredBy("what is the same", "here")
	peer.deploy(revision(peer, 2, "peer"))
	answeredBy("the newer revision", "peer")
	// The peer only knows that there is such a function.
	peer.elsewhere("c", lost.address)
	answeredBy("what nobody else has", "here")
	peer.put()
	answeredBy("what was deleted", "404")
	// Of a name that another tenant has now, the old function stays gone.
	peer.deploy(peer.function("c", "c", func(f *control.Function) { f.Tenant, f.Env = "other", map[string]string{"GREETING": "other"} }))
	answeredBy("a name of another tenant", "other")
}

func TestNodesThatAreAllOutOfTouchGoOnServing(t *testing.T) {
	t.Parallel()
	a, b := startNode(t, nil), startNode(t, nil)
	b.stale([]string{a.address}, b.function("later", "c", nil))
	a.stale([]string{refusingAddress(t), b.address}, a.function("c", "c", nil))
	for range 3 {
		wantBody(t, a.get("c", "/"), 200, "hello from c\n")
	}
	// One that was told more lends it.
	wantBody(t, a.get("later", "/"), 200, "hello from c\n")
	p := a.get("absent", "/")
	wantProblem(t, p, 503, "node-out-of-touch")
	if p.Header.Get("Retry-After") == "" || !p.problem(t).Retryable {
		t.Error("it is not said to be passing")
	}
	// And one alone.
	a.stale(nil, a.function("c", "c", nil))
	wantBody(t, a.get("c", "/"), 200, "hello from c\n")
	wantProblem(t, a.get("absent", "/"), 503, "node-out-of-touch")
}

// tellingPeer answers questions as given, and says how many there were.
func tellingPeer(t *testing.T, tell func(about url.Values) peerAnswer) (address string, asked *atomic.Int64) {
	asked = &atomic.Int64{}
	return fakePeer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != peerPath {
			t.Errorf("%s %s%s reached a node that only knows", r.Method, r.Host, r.URL)
			return
		}
		if len(r.URL.Query()) > 0 {
			asked.Add(1)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(tell(r.URL.Query()))
	}), asked
}

func TestNamesThatAreMadeUpCauseFewQuestions(t *testing.T) {
	t.Parallel()
	for name, refusal := range map[string]string{"in touch": "function-not-found", "out of touch": "node-out-of-touch"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			peer, asked := tellingPeer(t, func(url.Values) peerAnswer { return peerAnswer{} })
			n := startNode(t, nil)
			n.state(control.State{Gateways: []string{peer}, Stale: refusal == "node-out-of-touch"})
			// The same name again and again, at once.
			began := time.Now()
			var group sync.WaitGroup
			for range 50 {
				group.Go(func() { wantProblem(t, n.get("same", "/"), 404, "function-not-found") })
			}
			group.Wait()
			if most := 2 + int64(time.Since(began)/saidFor); asked.Load() < 1 || asked.Load() > most {
				t.Errorf("%d questions about one name", asked.Load())
			}
			// And one after the other.
			began = time.Now()
			asked.Store(0)
			const names = 2000
			for i := range names {
				a := n.get(fmt.Sprintf("made-up-%d", i), "/")
				if code := a.problem(t).Type[len(problemPrefix):]; code != "function-not-found" && (code != refusal || a.StatusCode != 503 || a.Header.Get("Retry-After") == "") {
					t.Fatalf("%d %s", a.StatusCode, a.body)
				}
			}
			most := int64(unknownRate * (rateBurst + time.Since(began).Seconds() + 1))
			if got := asked.Load(); got > most || got < unknownRate {
				t.Errorf("%d questions, %d would be the most", got, most)
			}
			t.Logf("%d questions about %d names in %s", asked.Load(), names, time.Since(began))
		})
	}
}

func TestOnlyEnginesThatAreInTouchAreBelieved(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.HandlerFunc{
		"something else": func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) },
		"a page":         func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"no answer":      func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"a hanging one":  func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://example.com", http.StatusFound)
		},
		"garbage": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, "{")
		},
		"another that lost": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"outOfTouch":true}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lost := startNode(t, nil)
			lost.stale([]string{fakePeer(t, h)}, lost.function("c", "c", nil))
			wantBody(t, lost.get("c", "/"), 200, "hello from c\n")
			wantProblem(t, lost.get("absent", "/"), 503, "node-out-of-touch")
		})
	}
}

func TestAnAgentThatFallsSilentIsMissedUntilItSpeaksAgain(t *testing.T) {
	t.Parallel()
	peer := startNode(t, nil)
	peer.deploy(peer.function("later", "c", nil))
	n := startNode(t, func(o *Options) { o.AgentSilence = 300 * time.Millisecond })
	n.state(control.State{Gateways: []string{peer.address}})
	// An open question is a sign of life, however long it takes.
	following, stop := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	status := n.status()
	go func() {
		_, err := n.control.Status(following, status.Version, time.Minute)
		answered <- err
	}()
	for range 10 {
		select {
		case err := <-answered:
			t.Fatalf("the question was answered: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		if n.gauge("hearth_engine_out_of_touch") != 0 {
			t.Fatal("missed while it waits for an answer")
		}
	}
	stop()
	<-answered
	n.eventually("it is missed", func() bool { return n.gauge("hearth_engine_out_of_touch") == 1 })
	// Whoever comes back is told at once, and is not believed for what it said before.
	again, err := n.control.Status(t.Context(), status.Version, time.Minute)
	if err != nil || !again.OutOfTouch || again.Generation != status.Generation {
		t.Fatalf("%+v %v", again, err)
	}
	wantBody(t, n.get("later", "/"), 200, "hello from c\n")
	n.state(control.State{Gateways: []string{peer.address}, Functions: []control.Function{n.function("later", "c", nil)}})
	if n.status().OutOfTouch {
		t.Error("still out of touch")
	}
}

func TestPeersAnswerUnderTheirAddressOnly(t *testing.T) {
	t.Parallel()
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", func(f *control.Function) { f.Secrets = map[string]string{"PASSWORD": "s3cret"} }))
	if got := n.tells("name=c"); !got.Known || got.Serving == "" || got.Serving != got.Wanted || got.OutOfTouch {
		t.Errorf("%+v", got)
	}
	if got := n.tells("host=c.localhost&path=/x"); !got.Known {
		t.Errorf("%+v", got)
	}
	a := n.at(n.address, peerPath+"?name=c")
	for _, secret := range []string{"s3cret", "PASSWORD", n.function("c", "c", nil).Object, "default"} {
		if strings.Contains(a.body, secret) {
			t.Errorf("it tells %s", secret)
		}
	}
	wantRefusal(t, n.at("localhost", peerPath+"?name=c"), 404, "not-found")
	wantRefusal(t, n.send(n.request(t.Context(), http.MethodPost, n.address, peerPath, strings.NewReader("x"))), 405, "method-not-allowed")
	if b := n.at("c.localhost", peerPath); strings.Contains(b.body, "known") {
		t.Errorf("under a function's host: %s", b.body)
	}
}
