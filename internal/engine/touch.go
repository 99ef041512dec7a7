package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

const (
	// defaultAgentSilence is longer than an agent pauses between two questions:
	// it always has one open, unless it ended, hangs, or cannot be scheduled.
	defaultAgentSilence = 10 * time.Second
	// peerPath is what engines ask each other, under the address of a gateway
	// and no other host: no ingress leads there.
	peerPath = "/peer/v1/function"
	// peerAskLimit bounds one question: the answer takes a look into a table.
	peerAskLimit = 1500 * time.Millisecond
	// peersAsked is how many peers are asked at most. One that is in touch and
	// knows the function is enough: every agent hears of all functions.
	peersAsked = 3
	// saidFor is how long an answer counts. It is how late a function is seen
	// to have changed, and keeps questions to one for a function in that time.
	saidFor = 2 * time.Second
	// notYetFor is how long it counts that nobody serves a function yet, which
	// is about to change.
	notYetFor = 100 * time.Millisecond
	// maxSaid bounds the answers that are remembered.
	maxSaid = 4096
	// unknownRate bounds the questions a second for names that nobody knew so
	// far: whoever makes names up gets no further than this engine.
	unknownRate = 50
	// gatewaysEvery is how often the addresses of peers are brought up to date
	// without an agent: pods come and go, and addresses are given to others.
	gatewaysEvery = 10 * time.Second
	// maxPeerAnswer bounds what is read of an answer.
	maxPeerAnswer = 64 << 10
	// maxAskedPath bounds the path that a question is about.
	maxAskedPath = 1024
)

// touch is what the engine knows of its agent's presence, and from its peers
// while there is none.
//
// An engine whose agent is gone goes on serving what it was told. So that it
// neither denies functions that were submitted since nor answers for those that
// were deleted or replaced, it asks a peer whose agent is there about each
// function it gets requests for, at most once in saidFor. While it is in touch
// it asks only about what it does not know: agents hear of a function one after
// the other, and one that hangs is missed with a delay.
type touch struct {
	engine  *Engine
	silence time.Duration
	born    time.Time

	// lost is what requests look at; written under Engine.mu.
	lost atomic.Bool
	// watching counts the agent's open questions, heard is when its last word
	// came, in ns since born.
	watching atomic.Int32
	heard    atomic.Int64
	gateways atomic.Pointer[[]string]

	unknown *rate
	// ending ends questions when the engine ends.
	ending context.Context
	end    context.CancelFunc

	mu   sync.Mutex
	said map[string]*said
	// nobody is until when no peer is asked about what is known here, because
	// none that was reached was in touch.
	nobody time.Time
}

// said is what peers say of a function.
type said struct {
	answered chan struct{} // closed when the rest is there
	until    time.Time
	// heard is false when no peer could say anything.
	heard bool
	// wanted and serving are versions: the newest, and the one that the peer
	// answers with itself. Both are empty when it has none.
	wanted, serving string
	// there leads to those that serve it; nil when there is no such function.
	there *function
}

// peerAnswer is what an engine says of a function to another.
type peerAnswer struct {
	// OutOfTouch says that the rest is as old as who says it.
	OutOfTouch bool   `json:"outOfTouch"`
	Known      bool   `json:"known"`
	Wanted     string `json:"wanted,omitempty"`
	Serving    string `json:"serving,omitempty"`
	// Peers are others that serve it, Gateways all others; whoever asks may be
	// among them.
	Peers     []string `json:"peers,omitempty"`
	Gateways  []string `json:"gateways,omitempty"`
	TimeoutMS int64    `json:"timeoutMs,omitempty"`
}

func newTouch(e *Engine, silence time.Duration) *touch {
	if silence <= 0 {
		silence = defaultAgentSilence
	}
	t := &touch{engine: e, silence: silence, born: time.Now(), unknown: newRate(unknownRate), said: make(map[string]*said)}
	t.ending, t.end = context.WithCancel(context.Background())
	t.gateways.Store(new([]string))
	return t
}

// word notes that the agent spoke.
func (t *touch) word() { t.heard.Store(int64(time.Since(t.born))) }

// watch notes that the agent waits for an answer, until the returned function
// is called.
func (t *touch) watch() (done func()) {
	t.watching.Add(1)
	return func() {
		t.word()
		t.watching.Add(-1)
	}
}

// told takes in what a State says of all this. It needs Engine.mu.
func (t *touch) told(s control.State) {
	t.adopt(s.Gateways)
	t.set(s.Stale, "the agent does not know itself what changed")
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.said)
	t.nobody = time.Time{}
}

// set needs Engine.mu.
func (t *touch) set(lost bool, reason string) {
	if t.lost.Swap(lost) == lost {
		return
	}
	if lost {
		t.engine.metrics.outOfTouch.Set(1)
		t.engine.logger.Warn("out of touch; asking other nodes about what changes until an agent says it", "reason", reason)
	} else {
		t.engine.metrics.outOfTouch.Set(0)
		t.engine.logger.Info("in touch with the agent again")
	}
}

// adopt takes the addresses of other nodes' gateways.
func (t *touch) adopt(gateways []string) {
	kept := addresses(gateways)
	t.gateways.Store(&kept)
}

// run notices until ctx ends that the agent fell silent, and keeps the
// addresses of peers up to date while it is.
func (t *touch) run(ctx context.Context) {
	tick := time.NewTicker(max(t.silence/10, 10*time.Millisecond))
	defer tick.Stop()
	var refreshed time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if !t.lost.Load() {
			t.look()
		} else if time.Since(refreshed) >= gatewaysEvery {
			refreshed = time.Now()
			t.ask(ctx, url.Values{})
		}
	}
}

// look notices that the agent fell silent. A new version of the status lets one
// that comes back know it at once.
func (t *touch) look() {
	e := t.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.generation == 0 || t.watching.Load() > 0 || time.Since(t.born)-time.Duration(t.heard.Load()) < t.silence {
		return
	}
	t.set(true, "the agent is silent")
	e.bumpLocked()
}

// version stands for a revision without telling anything of it.
func version(r *revision) string {
	if r == nil {
		return ""
	}
	s := r.spec
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%s@%d %s %d %d %d", s.Tenant, s.Name, s.Revision, s.Object, s.MemoryMiB, s.TimeoutMS, s.Concurrency))
	return hex.EncodeToString(sum[:12])
}

// servePeer answers another engine's question.
func (e *Engine) servePeer(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		refuse(w, r, problem(http.StatusMethodNotAllowed, "method-not-allowed", "other engines are asked with GET", false))
		return
	}
	q := r.URL.Query()
	name := q.Get("name")
	if host := q.Get("host"); host != "" {
		if to := e.routing.Load().request(host, q.Get("path"), ""); to.to == toFunction {
			name = to.function
		}
	}
	e.mu.RLock()
	answer := peerAnswer{OutOfTouch: e.touch.lost.Load() || e.generation == 0}
	if f := e.functions[name]; f != nil {
		there := f.elsewhere.Load()
		answer.Known, answer.Wanted = true, version(f.wanted)
		answer.Peers, answer.TimeoutMS = there.peers, there.timeout.Milliseconds()
		if rev := f.serving.Load(); rev != nil && rev.loaded() {
			answer.Serving = version(rev)
		}
	}
	e.mu.RUnlock()
	answer.Gateways = *e.touch.gateways.Load()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(answer) // who asked is gone
}

// errNoPeer is why an answer of something else is not believed.
var errNoPeer = errors.New("what answers there is no engine")

// askPeer asks one peer. It gives the address under which that peer would know
// this engine.
func (t *touch) askPeer(ctx context.Context, peer string, about url.Values) (answer peerAnswer, own string, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerAskLimit)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		here, _, err := net.SplitHostPort(info.Conn.LocalAddr().String())
		if listener, ok := t.engine.options.Listener.Addr().(*net.TCPAddr); ok && err == nil {
			own = net.JoinHostPort(here, strconv.Itoa(listener.Port))
		}
	}})
	where := url.URL{Scheme: "http", Host: peer, Path: peerPath, RawQuery: about.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where.String(), nil)
	if err != nil {
		return answer, "", err
	}
	resp, err := t.engine.peers.transport.RoundTrip(req)
	if err != nil {
		return answer, "", err
	}
	defer resp.Body.Close()
	body := io.LimitReader(resp.Body, maxPeerAnswer)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" {
		_, _ = io.Copy(io.Discard, body) // so that the connection can be used again
		return answer, "", errNoPeer
	}
	if err := json.NewDecoder(body).Decode(&answer); err != nil {
		return answer, "", fmt.Errorf("read the answer: %w", err)
	}
	return answer, own, nil
}

// ask asks peers until one that is in touch knows the function. That there is
// none is the word of all that were asked: one may not have been told yet. The
// best of the other answers is from one that serves the function, though it is
// out of touch; found is false without any.
func (t *touch) ask(ctx context.Context, about url.Values) (best peerAnswer, from string, found bool) {
	denied := false
	for i, peer := range t.engine.peers.order(*t.gateways.Load()) {
		if i == peersAsked || ctx.Err() != nil {
			break
		}
		answer, own, err := t.askPeer(ctx, peer, about)
		if err != nil || answer.OutOfTouch {
			// The others are the better choice for some seconds, for requests too.
			if t.engine.peers.missed(peer) {
				t.engine.logger.Debug("node cannot say what changed", "peer", peer, "outOfTouch", answer.OutOfTouch, "error", err)
			}
			if err == nil && answer.Serving != "" && !found {
				best, from, found = answer, peer, true
				best.Peers = nil // as old as what that one knows
			}
			continue
		}
		not := func(address string) bool { return address == own || address == peer }
		gateways := slices.DeleteFunc(slices.Clone(answer.Gateways), not)
		if t.lost.Load() { // or the agent's are better
			t.adopt(append(gateways, peer))
		}
		if answer.Known || len(about) == 0 {
			answer.Peers = slices.DeleteFunc(answer.Peers, not)
			return answer, peer, true
		}
		denied = true
	}
	if denied {
		return peerAnswer{}, "", true
	}
	return best, from, found
}

// errTooManyUnknown refuses questions for names that nobody knew so far.
var errTooManyUnknown = errors.New("too many names are asked for that this node was not told of")

// about gives what peers say of a function, at most saidFor old. Of one that
// is not known here not all questions are passed on.
func (t *touch) about(ctx context.Context, key string, question url.Values, here bool) (*said, error) {
	if len(*t.gateways.Load()) == 0 {
		return &said{}, nil
	}
	now := time.Now()
	t.mu.Lock()
	s := t.said[key]
	fresh := s == nil || now.After(s.until)
	if fresh {
		known := here || s != nil && s.there != nil
		switch {
		case here && now.Before(t.nobody):
			t.mu.Unlock()
			return &said{}, nil
		case !known:
			if _, ok := t.unknown.take(now.Sub(t.born)); !ok {
				t.mu.Unlock()
				return nil, errTooManyUnknown
			}
		}
		if !t.roomFor(key, now) {
			t.mu.Unlock()
			return nil, errTooManyUnknown
		}
		next := &said{answered: make(chan struct{}), until: now.Add(peersAsked*peerAskLimit + saidFor)}
		if s != nil {
			next.there = s.there // keeps its count of requests on their way
		}
		t.said[key], s = next, next
	}
	t.mu.Unlock()
	if !fresh {
		select {
		case <-s.answered:
			return s, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	// For all who wait, though the first may leave.
	answer, from, found := t.ask(t.ending, question)
	t.mu.Lock()
	defer t.mu.Unlock()
	defer close(s.answered)
	now = time.Now()
	s.until = now.Add(saidFor)
	if s.heard = found; !found {
		s.there = nil
		if here {
			t.nobody = s.until
		}
		return s, nil
	}
	if !answer.Known {
		s.there = nil
		return s, nil
	}
	s.wanted, s.serving = answer.Wanted, answer.Serving
	if s.there == nil {
		s.there = &function{name: cmp.Or(question.Get("name"), question.Get("host"))}
	}
	there := &elsewhere{timeout: time.Duration(answer.TimeoutMS) * time.Millisecond}
	if there.timeout <= 0 || there.timeout > v1alpha1.MaxTimeoutMS*time.Millisecond {
		there.timeout = v1alpha1.MaxTimeoutMS * time.Millisecond
	}
	if answer.Serving != "" {
		there.peers = append(there.peers, from)
	} else {
		there.peers = addresses(answer.Peers)
	}
	s.there.elsewhere.Store(there)
	if len(there.peers) == 0 {
		s.until = now.Add(notYetFor)
	}
	return s, nil
}

// roomFor makes room for another answer. It needs mu.
func (t *touch) roomFor(key string, now time.Time) bool {
	if _, there := t.said[key]; there || len(t.said) < maxSaid {
		return true
	}
	for k, s := range t.said {
		if now.After(s.until) {
			delete(t.said, k)
		}
	}
	return len(t.said) < maxSaid
}

// addresses are those of the peers that are an IP address and a port, as many
// as are used.
func addresses(peers []string) []string {
	kept := make([]string, 0, min(len(peers), v1alpha1.MaxPeers))
	for _, p := range peers {
		if address, err := netip.ParseAddrPort(p); err == nil && address.Port() != 0 && len(kept) < v1alpha1.MaxPeers {
			kept = append(kept, p)
		}
	}
	return kept
}

// leadsNowhere says whether a function is neither served nor loaded here, and
// no peer is known that serves it. One may by now: who submitted it knows that
// as soon as the API does, and this node's agent a moment later.
func (e *Engine) leadsNowhere(f *function) bool {
	if f.serving.Load() != nil || len(f.elsewhere.Load().peers) > 0 {
		return false
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	return f.wanted == nil && f.invalid == nil
}

// current gives the function to answer with where the engine's own word is not
// enough, or nil and why there is none: f, which the engine was told of, if that
// is what peers have, else what leads to them.
func (x *exchange) current(f *function) (*function, *v1alpha1.Problem) {
	t := x.engine.touch
	s, err := t.about(x.r.Context(), "name "+x.to.function, url.Values{"name": {x.to.function}}, f != nil)
	switch {
	case err != nil && f != nil:
		return f, nil
	case (err != nil || !s.heard) && f == nil && !t.lost.Load():
		return nil, nil // by the word of the own agent
	case err != nil:
		return nil, problem(http.StatusServiceUnavailable, "node-out-of-touch", "this node has no word of what functions there are, and "+err.Error()+"; try again in a moment", true)
	case !s.heard && f == nil:
		return nil, problem(http.StatusServiceUnavailable, "node-out-of-touch", "this node has no word of what functions there are, and neither has any node that it reaches; ask again later, and see to the agent of this node", true)
	case !s.heard:
		return f, nil
	case s.there == nil && f != nil && !t.lost.Load():
		return f, nil // the own agent heard of it first
	case s.there == nil:
		return nil, nil
	case f == nil:
		return s.there, nil
	}
	serving := f.serving.Load()
	switch here := version(serving); {
	case here != "" && (here == s.serving || here == s.wanted):
		return f, nil
	case here != "" && s.serving == "":
		return f, nil // nobody who was asked has another
	case len(s.there.elsewhere.Load().peers) == 0:
		return f, nil
	}
	return s.there, nil
}

// elsewhereOnly answers for a host, or a path of a host, that this engine knows
// nothing of. It says whether peers do.
func (e *Engine) elsewhereOnly(w http.ResponseWriter, r *http.Request) bool {
	host := canonicalHost(r.Host)
	if r.Header.Get(headerForwarded) != "" || !validHost(host) || controlHost(e.routing.Load().base, host) || len(r.URL.Path) > maxAskedPath {
		return false
	}
	s, err := e.touch.about(r.Context(), "host "+host+r.URL.Path, url.Values{"host": {host}, "path": {r.URL.Path}}, false)
	if err != nil || s.there == nil {
		return false
	}
	x := e.newExchange(w, r, route{to: toFunction, function: s.there.name, path: slash(r.URL.Path), rawPath: r.URL.RawPath})
	x.function = s.there
	x.serveCounted()
	return true
}
