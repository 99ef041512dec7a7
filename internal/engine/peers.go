package engine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/worker"
)

const (
	// headerForwarded names the engine that forwarded a request. A request with
	// it is not forwarded again; it grants nothing, so anybody may set it.
	headerForwarded = worker.HeaderPrefix + "Forwarded"
	// headerNotServed is in answers to forwarded requests that no guest saw,
	// because the function is not here: another peer may be asked.
	headerNotServed = worker.HeaderPrefix + "Not-Served"
	headerClients   = "X-Forwarded-For"

	// peerDialLimit bounds connecting to a peer, which is in the same cluster: a
	// node that was lost answers nothing, and the next is a better choice.
	peerDialLimit = time.Second
	// peerAwayFor is how long a peer that was not reached is asked after the others.
	peerAwayFor = 5 * time.Second
	// peerConnections bounds connections to one peer, peerIdle those kept open.
	peerConnections = 1024
	peerIdle        = 64
	// peerIdleLimit is shorter than idleLimit, so that it is not the peer who
	// closes a connection just when it is used again.
	peerIdleLimit = idleLimit / 2
	// peerContinueLimit is how long a large body waits for a peer that wants
	// it: one that does not serve the function says so first, and the body is
	// then whole for the next.
	peerContinueLimit = time.Second
	// peerRefusals is how many peers may say that they do not serve the function
	// before the client is told to come back.
	peerRefusals = 3
	// maxForwarding bounds the requests for one function that are with peers:
	// one function alone must not take all connections. The node that serves
	// it queues them by its concurrency.
	maxForwarding = peerConnections / 4
	// maxRefusalBytes is what is read of a refusal so that its connection can be
	// used again.
	maxRefusalBytes = 64 << 10
)

// peerKeepAlive finds out within seconds that a node was lost while a request
// was on it.
var peerKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// peerUnacknowledged is how long what was sent to a peer may be without a sign
// that it arrived. Keep-alive says nothing of that: a request on a connection
// that was open when its node was lost would wait for the whole deadline.
const peerUnacknowledged = 3 * time.Second

// boundUnacknowledged is a [net.Dialer.Control].
func boundUnacknowledged(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerUnacknowledged.Milliseconds()))
	})
	return errors.Join(err, failed)
}

// elsewhere is where a function is to be had beside here. It is never changed,
// only replaced.
type elsewhere struct {
	peers   []string      // address:port
	timeout time.Duration // of a forwarded request
}

// peers are the gateways of other nodes.
type peers struct {
	name      string // this engine's
	transport *http.Transport

	mu   sync.Mutex
	away map[string]time.Time // until when
}

func newPeers(name string) *peers {
	dialer := &net.Dialer{Timeout: peerDialLimit, KeepAliveConfig: peerKeepAlive, Control: boundUnacknowledged}
	return &peers{
		name: name, away: make(map[string]time.Time),
		// No proxy: peers are addresses within the cluster.
		transport: &http.Transport{
			DialContext:            dialer.DialContext,
			MaxConnsPerHost:        peerConnections,
			MaxIdleConnsPerHost:    peerIdle,
			IdleConnTimeout:        peerIdleLimit,
			ExpectContinueTimeout:  peerContinueLimit,
			MaxResponseHeaderBytes: 2 * maxHeaderBytes, // a guest's and ours
			DisableCompression:     true,
		},
	}
}

func (p *peers) close() { p.transport.CloseIdleConnections() }

// order gives the peers at random, those that were not reached lately last.
func (p *peers) order(all []string) []string {
	order := slices.Clone(all)
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.away) == 0 {
		return order
	}
	now := time.Now()
	for peer, until := range p.away {
		if now.After(until) {
			delete(p.away, peer)
		}
	}
	rank := func(peer string) int {
		if _, away := p.away[peer]; away {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(order, func(a, b string) int { return rank(a) - rank(b) })
	return order
}

// missed notes that a peer was not reached; it says whether that is news.
func (p *peers) missed(peer string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, known := p.away[peer]
	p.away[peer] = time.Now().Add(peerAwayFor)
	return !known || time.Now().After(until)
}

// elsewhere gives the peers that the request is to be forwarded to: none when
// the function can answer here, and none for a request that was forwarded.
func (x *exchange) elsewhere(rev *revision) *elsewhere {
	there := x.function.elsewhere.Load()
	if len(there.peers) == 0 || x.forwarded || rev != nil && rev.loaded() {
		return nil
	}
	return there
}

// relayed is how sending a request to one peer ended.
type relayed int

const (
	// relayedAnswer: the peer's answer was passed on.
	relayedAnswer relayed = iota
	// relayedUnreached: nothing was sent.
	relayedUnreached
	// relayedRefused: the peer does not serve the function, and no guest saw
	// the request.
	relayedRefused
	// relayedLost: it was sent, or the part of its body that cannot be had
	// again, and there is no answer.
	relayedLost
)

// relay forwards the request to a peer. It returns nil when the client was
// answered or left, else why no peer has it: the request is then as it came,
// and may be served here.
func (x *exchange) relay(there *elsewhere, body requestBody) *v1alpha1.Problem {
	f, e := x.function, x.engine
	began := time.Now()
	defer func() { x.relaying = false }()
	x.relaying = true
	if f.forwarding.Add(1) > maxForwarding {
		f.forwarding.Add(-1)
		x.fail(problem(http.StatusTooManyRequests, "too-many-requests", "too many requests wait for the nodes that have the function; try again in a moment", true))
		return nil
	}
	defer f.forwarding.Add(-1)
	// The node that serves the function keeps its deadline; this is for one that
	// does not, as a node that was lost.
	ctx, cancel := context.WithDeadline(x.r.Context(), x.deadline.Add(answerGrace))
	defer cancel()
	refusals := 0
	for _, peer := range e.peers.order(there.peers) {
		outcome, err := x.sendTo(ctx, peer, body, began)
		if outcome == relayedAnswer {
			return nil
		}
		x.relayTime = time.Since(began)
		if body.stream != nil {
			left := x.r.Context().Err() != nil
			if cause := body.stream.failure(); cause != nil && (!left || isClientsLimit(cause)) {
				x.fail(bodyProblem(cause))
				return nil
			}
		}
		switch {
		case x.r.Context().Err() != nil:
			x.gone()
			return nil
		case ctx.Err() != nil:
			x.fail(problem(http.StatusGatewayTimeout, worker.FaultDeadline, "the function did not finish within its time limit, and the node that runs it did not say so", true))
			return nil
		case outcome == relayedLost:
			e.logger.Warn("request lost with the node it was forwarded to", "function", f.name, "peer", peer, "request", x.id, "error", err)
			x.fail(problem(http.StatusBadGateway, "peer-lost", "the node that has the function was lost before it answered", true))
			return nil
		case outcome == relayedUnreached:
			if e.peers.missed(peer) {
				e.logger.Warn("node that has a function is not reached, trying others", "function", f.name, "peer", peer, "error", err)
			}
		case outcome == relayedRefused:
			refusals++
		}
		if refusals == peerRefusals {
			break
		}
	}
	x.relayTime = time.Since(began)
	p := problem(http.StatusBadGateway, "peer-unreachable", "none of the nodes that have the function is reached from this one", true)
	if refusals > 0 {
		p = problem(http.StatusServiceUnavailable, "function-not-ready", "the nodes that had the function do not have it at the moment", true)
	}
	e.metrics.forwarded.WithLabelValues(code(p)).Inc()
	return p
}

// sendTo sends the request to one peer and passes its answer on. It panics
// with http.ErrAbortHandler when the answer broke off.
func (x *exchange) sendTo(ctx context.Context, peer string, body requestBody, began time.Time) (relayed, error) {
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { sent.Store(true) }})
	turn := &bodyTurn{body: body.ahead}
	resp, err := x.engine.peers.transport.RoundTrip(x.peerRequest(ctx, peer, body, turn))
	if err != nil {
		whole := turn.end()
		// A connection that was kept open and is gone is dialled anew by the
		// transport, where that is safe.
		if op := (*net.OpError)(nil); whole && (!sent.Load() || errors.As(err, &op) && op.Op == "dial") {
			return relayedUnreached, err
		}
		return relayedLost, err
	}
	id := resp.Header.Get(headerRequestID)
	if id == "" || resp.Header.Get(headerNotServed) != "" {
		// Without an identifier it is none of our engines, or one that does not
		// know the host.
		_, _ = io.CopyN(io.Discard, resp.Body, maxRefusalBytes) // so that the connection can be used again
		_ = resp.Body.Close()
		if !turn.end() {
			return relayedLost, errors.New("it refused the request after its body")
		}
		return relayedRefused, nil
	}
	x.id = id // what the function's log calls it
	x.relayTime = time.Since(began)
	x.passOn(resp)
	return relayedAnswer, nil
}

// peerRequest makes a peer's request from the client's. It has nothing but what
// the client sent, and where that came from.
func (x *exchange) peerRequest(ctx context.Context, peer string, body requestBody, turn *bodyTurn) *http.Request {
	h := x.outgoingHeader()
	if client, _, err := net.SplitHostPort(x.r.RemoteAddr); err == nil {
		h[headerClients] = []string{strings.Join(append(h[headerClients], client), ", ")}
	}
	h[headerForwarded] = []string{x.engine.peers.name}
	req := &http.Request{
		Method: x.r.Method,
		URL: &url.URL{
			Scheme: "http", Host: peer,
			Path: x.r.URL.Path, RawPath: x.r.URL.RawPath,
			RawQuery: x.r.URL.RawQuery, ForceQuery: x.r.URL.ForceQuery,
		},
		Host: x.r.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		ContentLength: body.length,
		Body:          http.NoBody,
	}
	switch {
	case body.stream != nil:
		h["Expect"] = []string{"100-continue"}
		req.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body.small), turn))
	case len(body.small) > 0:
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body.small)), nil }
		req.Body, _ = req.GetBody() // never fails
	}
	return req.WithContext(ctx)
}

// bodyTurn is one peer's turn at the part of a body that can be read once.
type bodyTurn struct {
	body *readAhead // nil when there is none

	mu          sync.Mutex
	begun, over bool
}

func (t *bodyTurn) Read(p []byte) (int, error) {
	t.mu.Lock()
	if t.over {
		t.mu.Unlock()
		return 0, errBodyOver
	}
	t.begun = true
	t.mu.Unlock()
	return t.body.Read(p)
}

// end ends the turn. It says whether the body is still whole.
func (t *bodyTurn) end() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	return !t.begun
}
