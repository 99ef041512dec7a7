package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/cgi"
	"github.com/hearth-sh/hearth/internal/engine/worker"
)

const (
	headerRequestID    = "Hearth-Request-Id"
	headerServerTiming = "Server-Timing"
	// restartWait is how long a request waits for a worker that is being
	// restarted: an exec, a start and the load of a few objects.
	restartWait = 5 * time.Second
	// answerGrace is what a worker gets beyond a request's deadline to say
	// that it killed the guest, before the engine says it instead.
	answerGrace = 2 * time.Second
	// writeGrace is what a client gets beyond the deadline to take the answer.
	writeGrace = 10 * time.Second
	// copyBytes is the size of buffers between worker and client.
	copyBytes = 32 << 10
	// pathFormPolicy puts pages that functions serve below the API's own
	// origin into origins of their own, so that their scripts cannot use it.
	pathFormPolicy = "sandbox allow-scripts allow-forms allow-popups"
	// cancelLimit bounds telling a worker that a client went away.
	cancelLimit = time.Second
)

var (
	errBodyTooLarge = errors.New("the request body is too large")
	copyBuffers     = sync.Pool{New: func() any { b := make([]byte, copyBytes); return &b }}
)

// ServeHTTP routes one request of the public listener.
func (e *Engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace || r.URL.Path == "" || r.URL.Path[0] != '/' {
		refuse(w, r, problem(http.StatusMethodNotAllowed, "method-not-allowed", "neither CONNECT, TRACE nor requests without a path are served", false))
		return
	}
	table := e.routing.Load()
	switch to := table.request(r.Host, r.URL.Path, r.URL.RawPath); to.to {
	case toFunction:
		e.serveFunction(w, r, to)
	case toAPI:
		if e.api != nil {
			// An earlier request to a function may have left its deadline.
			_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
			ctx, cancel := context.WithCancel(r.Context())
			if r.ContentLength != 0 {
				ctx, cancel = e.hangups.untilHangup(r)
			}
			defer cancel()
			defer context.AfterFunc(e.ending, cancel)()
			e.protection.Handler(e.api).ServeHTTP(&refusing{w, r.ContentLength != 0}, r.WithContext(ctx))
			return
		}
		fallthrough
	case toNothing:
		if r.URL.Path == peerPath && e.api == nil && isAddress(canonicalHost(r.Host)) {
			e.servePeer(w, r)
			return
		}
		if e.elsewhereOnly(w, r) {
			return
		}
		refuse(w, r, problem(http.StatusNotFound, "not-found",
			"there is nothing at this path; functions are at "+pathPrefix+"<name>/ and <name>."+table.base, false))
	default:
		if e.elsewhereOnly(w, r) {
			return
		}
		refuse(w, r, problem(http.StatusMisdirectedRequest, "host-not-served",
			"this server was not told to serve this host name; use localhost, an address, or a name below "+
				table.base+", give a function this host, or start the server with another base domain", false))
	}
}

// refusedBody is how long a client may go on sending a body that nobody wants
// any more.
const refusedBody = 500 * time.Millisecond

// refuse answers a request whose body, if it has one, was not read to its end.
func refuse(w http.ResponseWriter, r *http.Request, p *v1alpha1.Problem) {
	if r.ContentLength != 0 {
		leaveBody(w, http.NewResponseController(w))
	}
	writeProblem(w, p)
}

// leaveBody ends a connection with the answer that is about to be sent, because
// its request's body is not read to its end: net/http takes up to 256 KiB of the
// rest so that the connection can be used again, which without a deadline waits
// for a client that stalls, and with one goes on to take what comes later for
// the next request.
func leaveBody(w http.ResponseWriter, rc *http.ResponseController) {
	w.Header().Set("Connection", "close")
	_ = rc.SetReadDeadline(time.Now().Add(refusedBody)) // only fails without a connection
}

// refusing stops waiting for the rest of a request's body when the API refused
// the request: net/http would read on before it passes the answer to a sender
// that stalled.
type refusing struct {
	http.ResponseWriter
	body bool // the request has one
}

func (w *refusing) WriteHeader(code int) {
	if code >= http.StatusBadRequest && w.body {
		leaveBody(w.ResponseWriter, http.NewResponseController(w.ResponseWriter))
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *refusing) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// exchange is one request to a function on its way.
type exchange struct {
	engine   *Engine
	function *function
	to       route
	w        http.ResponseWriter
	r        *http.Request
	rc       *http.ResponseController

	id       string
	arrived  time.Time
	deadline time.Time

	// forwarded says that a peer sent the request, notHere that no guest saw it.
	forwarded, notHere bool
	// relaying is true while the request is with peers; relayTime is how long
	// that took, to the first byte of an answer.
	relaying  bool
	relayTime time.Duration

	queue, load, instantiate, firstByte time.Duration

	body requestBody
	// unread says that the client has not sent all of its body, or nobody
	// looked; body.stream knows better where there is one.
	unread bool
}

func (e *Engine) newExchange(w http.ResponseWriter, r *http.Request, to route) *exchange {
	return &exchange{
		engine: e, to: to, w: w, r: r, rc: http.NewResponseController(w), id: rand.Text(), arrived: time.Now(),
		unread: r.ContentLength != 0, forwarded: r.Header.Get(headerForwarded) != "", notHere: true,
	}
}

func (e *Engine) serveFunction(w http.ResponseWriter, r *http.Request, to route) {
	x := e.newExchange(w, r, to)
	function, told := e.find(r.Context(), to.function)
	x.function = function
	if !told {
		x.fail(problem(http.StatusServiceUnavailable, "function-not-ready", "this node has just started and was not told yet what to serve", true))
		return
	}
	if (function == nil || e.touch.lost.Load() || e.leadsNowhere(function)) && !x.forwarded {
		var unknown *v1alpha1.Problem
		if x.function, unknown = x.current(function); unknown != nil {
			x.fail(unknown)
			return
		}
	}
	if x.function == nil {
		x.fail(problem(http.StatusNotFound, "function-not-found", fmt.Sprintf(
			"there is no function named %q here; `nodeagent functions list` shows the ones there are, `nodeagent submit` adds one", to.function), false))
		return
	}
	x.serveCounted()
}

// serveCounted is serve of a function that is known.
func (x *exchange) serveCounted() {
	x.engine.metrics.inFlight.Inc()
	defer x.engine.metrics.inFlight.Dec()
	x.function.requests.Add(1)
	x.serve()
}

// serve takes the request through queue, worker and answer.
func (x *exchange) serve() {
	f := x.function
	rev := f.serving.Load()
	there := x.elsewhere(rev)
	if rev == nil && there == nil {
		if rev = x.engine.awaitServing(x.r.Context(), f); rev == nil {
			x.notServed()
			return
		}
		x.load = time.Since(x.arrived)
	}
	if rev != nil {
		x.deadline = x.arrived.Add(time.Duration(rev.spec.TimeoutMS) * time.Millisecond)
	} else {
		x.deadline = x.arrived.Add(there.timeout)
	}
	_ = x.rc.SetWriteDeadline(x.deadline.Add(writeGrace)) // only fails without a connection
	if there == nil && !x.admitted() {
		return
	}
	if upgrade := x.r.Header.Get("Upgrade"); upgrade != "" && !strings.EqualFold(upgrade, "h2c") {
		x.fail(problem(http.StatusNotImplemented, "upgrade-unsupported",
			"functions answer plain HTTP requests; they cannot switch to another protocol", false))
		return
	}
	body, problem := x.readBody()
	if problem != nil {
		x.fail(problem)
		return
	}
	x.unread = false
	if body.stream != nil {
		body.ahead = newReadAhead(body.stream, body.stream.interrupt, &x.engine.readAhead)
		defer func() {
			body.ahead.stop()
			if x.leavesBody() {
				leaveBody(x.w, x.rc) // of which the header has been sent
			}
		}()
		x.body = body
		connected, leave := x.engine.hangups.untilHangup(x.r)
		defer leave()
		x.r = x.r.WithContext(connected)
	}
	ctx, cancel := context.WithDeadline(x.r.Context(), x.deadline)
	defer cancel()
	if there != nil {
		nobody := x.relay(there, body)
		if nobody == nil {
			return
		}
		// It may be ready here by now, or in a moment.
		waiting := time.Now()
		if rev = x.engine.awaitServing(ctx, f); rev == nil {
			x.fail(nobody)
			return
		}
		x.load = time.Since(waiting)
		if !x.admitted() {
			return
		}
	}
	if err := f.limiter.acquire(ctx); err != nil {
		x.queue = time.Since(x.arrived) - x.load - x.relayTime
		x.failQueue(err)
		return
	}
	defer f.limiter.release()
	x.queue = time.Since(x.arrived) - x.load - x.relayTime

	waiting := time.Now()
	var conn *incarnation
	for {
		// The revision may be replaced at any moment; the next one is warm.
		rev = f.serving.Load()
		var err error
		if conn, err = rev.acquire(ctx, restartWait); err == nil {
			break
		} else if !errors.Is(err, errRetired) || x.engine.lookup(f.name) != f {
			x.load += time.Since(waiting)
			x.failAcquire(ctx, err)
			return
		}
		if ctx.Err() != nil {
			x.failAcquire(ctx, ctx.Err())
			return
		}
	}
	defer rev.release()
	x.load += time.Since(waiting)
	x.notHere = false
	x.forward(rev, conn, body)
}

// admitted takes the request from its tenant's rate, or refuses it. What is
// forwarded counts where it is answered, or everybody could choose not to count.
func (x *exchange) admitted() bool {
	wait, ok := x.function.rate.take(x.arrived.Sub(x.engine.touch.born))
	if !ok {
		x.notHere = false // the answer, though no guest saw it: other nodes are not to make up for this one
		x.w.Header().Set("Retry-After", strconv.Itoa(int(max(1, math.Ceil(wait.Seconds())))))
		x.fail(problem(http.StatusTooManyRequests, "too-many-invocations",
			fmt.Sprintf("functions of this tenant answer %g requests a second on a node; try again in a moment", x.engine.options.TenantRate), true))
	}
	return ok
}

// leavesBody says whether some of the client's body was not read.
func (x *exchange) leavesBody() bool {
	if x.body.stream != nil {
		return !x.body.stream.complete()
	}
	return x.unread
}

// requestBody is a request's body on its way to a worker.
type requestBody struct {
	small []byte // all of it, when it is small
	// stream is the rest after small, nil when there is none.
	stream *limitedBody
	ahead  *readAhead // of stream
	length int64      // -1 when not known
}

// readBody reads a small body before the request takes a turn, so that slow
// uploads hold no instance and the connection can tell that the client left.
func (x *exchange) readBody() (requestBody, *v1alpha1.Problem) {
	r := x.r
	if r.ContentLength > v1alpha1.MaxRequestBytes {
		return requestBody{}, bodyProblem(errBodyTooLarge)
	}
	if r.ContentLength == 0 || r.Body == nil || r.Body == http.NoBody {
		return requestBody{}, nil
	}
	_ = x.rc.SetReadDeadline(x.deadline) // only fails without a connection
	limited := &limitedBody{body: r.Body, rc: x.rc, left: v1alpha1.MaxRequestBytes}
	// Or the server would end the body when the answer begins. A client that
	// sends all before it reads is held up until the deadline at most.
	_ = x.rc.EnableFullDuplex() // only fails for other protocols, which have it
	if r.ContentLength > worker.SmallBody {
		return requestBody{stream: limited, length: r.ContentLength}, nil
	}
	small, err := io.ReadAll(io.LimitReader(limited, worker.SmallBody))
	if err != nil {
		return requestBody{}, bodyProblem(err)
	}
	if r.ContentLength >= 0 || limited.complete() {
		limited.finish()
		return requestBody{small: small, length: int64(len(small))}, nil
	}
	return requestBody{small: small, stream: limited, length: -1}, nil
}

func bodyProblem(err error) *v1alpha1.Problem {
	switch {
	case errors.Is(err, errBodyTooLarge):
		return problem(http.StatusRequestEntityTooLarge, "body-too-large",
			fmt.Sprintf("a request body can have at most %d MiB", v1alpha1.MaxRequestBytes>>20), false)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return problem(http.StatusRequestTimeout, "request-timeout",
			"the request body did not arrive within the function's time limit", true)
	}
	return problem(http.StatusBadRequest, "request-body-failed", "the request body could not be read to its end", true)
}

// isClientsLimit tells a body that was refused from one whose client left:
// net/http ends the request's context with any read that fails.
func isClientsLimit(err error) bool {
	return errors.Is(err, errBodyTooLarge) || errors.Is(err, os.ErrDeadlineExceeded)
}

// limitedBody reads the client's body up to the limit and remembers why it
// failed, because the transport tells only that it did.
type limitedBody struct {
	body io.ReadCloser
	rc   *http.ResponseController
	left int64

	mu   sync.Mutex
	done bool // read to its end
	err  error
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errBodyTooLarge
	}
	// One byte more than allowed, to tell the end from too much.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.body.Read(p)
	b.left -= int64(n)
	switch {
	case b.left < 0:
		err = errBodyTooLarge
		b.fail(err)
		return 0, err
	case errors.Is(err, io.EOF):
		b.finish()
	case err != nil:
		b.fail(err)
	}
	return n, err
}

// finish ends the read deadline: from here on a read that ends means that the
// client went away.
func (b *limitedBody) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done = true
	_ = b.rc.SetReadDeadline(time.Time{}) // only fails without a connection
}

// interrupt ends a read that waits for the client.
func (b *limitedBody) interrupt() {
	_ = b.rc.SetReadDeadline(time.Now()) // only fails without a connection
}

func (b *limitedBody) complete() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.done
}

func (b *limitedBody) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
}

func (b *limitedBody) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Close does nothing: the server closes the client's body.
func (b *limitedBody) Close() error { return nil }

// forward sends the request to the worker and its answer to the client. When
// the worker dies before the first byte of an answer, and the body can be sent
// again, it is sent once more: another request may have been at fault.
func (x *exchange) forward(rev *revision, conn *incarnation, body requestBody) {
	// The worker kills the guest at the deadline; this is for a worker that
	// does not.
	ctx, cancel := context.WithDeadline(x.r.Context(), x.deadline.Add(answerGrace))
	defer cancel()
	for attempt := 1; ; attempt++ {
		began := time.Now()
		err := x.attempt(ctx, rev, conn, body)
		if err == nil {
			return
		}
		if body.stream != nil {
			left := x.r.Context().Err() != nil
			if cause := body.stream.failure(); cause != nil && (!left || isClientsLimit(cause)) {
				x.fail(bodyProblem(cause))
				return
			}
		}
		if x.r.Context().Err() != nil {
			x.gone()
			return
		}
		if ctx.Err() != nil {
			x.fail(problem(http.StatusGatewayTimeout, worker.FaultDeadline, "the function did not finish within its time limit, and its worker did not say so", true))
			return
		}
		if attempt == 1 && body.stream == nil {
			retryCtx, cancelRetry := context.WithDeadline(x.r.Context(), x.deadline)
			next, againErr := rev.again(retryCtx, conn, restartWait)
			cancelRetry()
			if againErr == nil {
				x.engine.metrics.retries.Inc()
				x.load += time.Since(began)
				conn = next
				continue
			}
			if x.r.Context().Err() != nil {
				x.gone()
				return
			}
		}
		x.engine.logger.Warn("request lost with its worker", "function", x.function.name, "request", x.id, "error", err)
		x.fail(problem(http.StatusBadGateway, "worker-lost", "the process that ran the function ended before it answered", true))
		return
	}
}

// attempt sends the request to a worker and passes the answer on. An error means
// that there was none. It panics with http.ErrAbortHandler when the answer
// broke off.
func (x *exchange) attempt(ctx context.Context, rev *revision, conn *incarnation, body requestBody) error {
	began := time.Now()
	conn.inFlight.Add(1)
	defer conn.inFlight.Add(-1)
	answered := false
	if body.stream != nil {
		defer func() {
			if !answered {
				x.cancelInWorker(conn)
			}
		}()
	}
	resp, err := conn.client.RoundTrip(x.request(ctx, rev, body))
	if err != nil {
		return err
	}
	if fault := readFault(resp); fault != nil {
		x.readTiming(resp, began)
		_ = resp.Body.Close() // read
		x.failFault(fault)
	} else {
		x.copyResponse(resp, began)
	}
	answered = true
	return nil
}

// request makes the worker's request from the client's.
func (x *exchange) request(ctx context.Context, rev *revision, body requestBody) *http.Request {
	h := x.outgoingHeader()
	scheme := "http"
	if x.r.TLS != nil {
		scheme = "https"
	}
	h[worker.HeaderKey] = []string{rev.key}
	h[worker.HeaderRequest] = []string{x.id}
	h[worker.HeaderTimeout] = []string{strconv.FormatInt(time.Until(x.deadline).Microseconds(), 10)}
	h[worker.HeaderScript] = []string{x.to.script}
	h[worker.HeaderScheme] = []string{scheme}
	h[worker.HeaderRemote] = []string{x.r.RemoteAddr}
	req := &http.Request{
		Method: x.r.Method,
		URL: &url.URL{
			Scheme: "http", Host: "worker",
			Path: x.to.path, RawPath: x.to.rawPath,
			RawQuery: x.r.URL.RawQuery, ForceQuery: x.r.URL.ForceQuery,
		},
		Host: x.r.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		ContentLength: body.length,
		Body:          http.NoBody,
	}
	switch {
	case body.stream != nil:
		req.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(bytes.NewReader(body.small), body.ahead), body.stream}
	case len(body.small) > 0:
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body.small)), nil }
		req.Body, _ = req.GetBody() // never fails
	}
	return req.WithContext(ctx)
}

// outgoingHeader gives what of the client's header is sent on.
func (x *exchange) outgoingHeader() http.Header {
	h := x.r.Header.Clone()
	cgi.RemoveHopByHop(h)
	for name := range h {
		if strings.HasPrefix(name, worker.HeaderPrefix) {
			delete(h, name)
		}
	}
	delete(h, "Proxy")  // https://httpoxy.org
	delete(h, "Expect") // answered here
	if h["User-Agent"] == nil {
		h["User-Agent"] = nil // or the transport adds its own
	}
	return h
}

// readFault gives the worker's own word on the request, nil when the answer
// is the guest's.
func readFault(resp *http.Response) *worker.Fault {
	if resp.Header.Get(worker.HeaderFault) == "" {
		return nil
	}
	fault := &worker.Fault{}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(fault); err != nil || fault.Status < 400 || fault.Status > 599 {
		return &worker.Fault{Status: http.StatusBadGateway, Code: "worker-lost", Detail: "the worker's answer broke off", Retryable: true}
	}
	return fault
}

func (x *exchange) readTiming(resp *http.Response, began time.Time) {
	x.firstByte = time.Since(began)
	if us, err := strconv.ParseInt(resp.Header.Get(worker.HeaderInstantiate), 10, 64); err == nil {
		x.instantiate = time.Duration(us) * time.Microsecond
	}
}

// copyResponse passes a guest's answer on.
func (x *exchange) copyResponse(resp *http.Response, began time.Time) {
	x.readTiming(resp, began)
	x.passOn(resp)
}

// passOn passes an answer of a worker or of a peer on. It panics with
// http.ErrAbortHandler when the answer breaks off.
func (x *exchange) passOn(resp *http.Response) {
	defer resp.Body.Close()
	h := x.w.Header()
	for name, values := range resp.Header {
		if !strings.HasPrefix(name, worker.HeaderPrefix) {
			h[name] = values
		}
	}
	cgi.RemoveHopByHop(h)
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // what the function did not say is not guessed
	}
	x.ownHeader()
	x.w.WriteHeader(resp.StatusCode)

	buffer := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buffer)
	for {
		n, err := resp.Body.Read(*buffer)
		if n > 0 {
			if _, werr := x.w.Write((*buffer)[:n]); werr != nil {
				x.gone()
				panic(http.ErrAbortHandler)
			}
			if resp.ContentLength < 0 {
				if x.rc.Flush() != nil {
					x.gone()
					panic(http.ErrAbortHandler)
				}
			}
		}
		if errors.Is(err, io.EOF) {
			x.count("ok", resp.StatusCode)
			return
		}
		if err != nil {
			// The client must not take what it has for the whole.
			if x.r.Context().Err() != nil {
				x.gone()
			} else {
				x.function.failures.Add(1)
				x.count("broken-off", resp.StatusCode)
			}
			panic(http.ErrAbortHandler)
		}
	}
}

// ownHeader adds what every answer for a function has.
func (x *exchange) ownHeader() {
	h := x.w.Header()
	if x.leavesBody() {
		h.Set("Connection", "close")
	}
	h.Set(headerRequestID, x.id)
	var phases []string
	add := func(name string, d time.Duration) {
		phases = append(phases, name+";dur="+strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', -1, 64))
	}
	if x.relaying || x.relayTime > 0 {
		add("forward", x.relayTime)
	}
	if !x.relaying { // or the peer says the rest
		add("queue", x.queue)
		add("load", x.load)
		add("instantiate", x.instantiate)
		add("firstbyte", x.firstByte)
	}
	h.Add(headerServerTiming, strings.Join(phases, ", "))
	if x.to.script != "" {
		if !slices.Contains(h["Content-Security-Policy"], pathFormPolicy) { // a peer did it
			h.Add("Content-Security-Policy", pathFormPolicy)
		}
		delete(h, "Service-Worker-Allowed")
		delete(h, "Clear-Site-Data")
	}
}

// fail answers with a problem and counts it.
func (x *exchange) fail(p *v1alpha1.Problem) {
	p.Instance = "urn:hearth:request:" + x.id
	if x.firstByte == 0 {
		x.firstByte = time.Since(x.arrived)
	}
	x.ownHeader()
	if x.leavesBody() {
		leaveBody(x.w, x.rc)
	}
	if x.forwarded && x.notHere {
		x.w.Header().Set(headerNotServed, code(p))
	}
	if (p.Status == http.StatusServiceUnavailable || p.Status == http.StatusTooManyRequests) && x.w.Header().Get("Retry-After") == "" {
		x.w.Header().Set("Retry-After", "1")
	}
	if x.function != nil {
		if p.Status >= 500 {
			x.function.failures.Add(1)
		}
		x.count(code(p), p.Status)
	}
	writeProblem(x.w, p)
}

func (x *exchange) failFault(f *worker.Fault) {
	if f.Code == worker.FaultClientGone {
		x.gone()
		return
	}
	if _, known := titles[f.Code]; !known {
		f.Code = worker.FaultInternal
	}
	x.fail(problem(f.Status, f.Code, f.Detail, f.Retryable))
}

func (x *exchange) failQueue(err error) {
	switch {
	case errors.Is(err, errQueueFull), errors.Is(err, errQueueWait):
		x.fail(problem(http.StatusTooManyRequests, "too-many-requests", err.Error()+"; try again in a moment", true))
	case x.r.Context().Err() != nil:
		x.gone()
	default:
		x.fail(problem(http.StatusTooManyRequests, "too-many-requests", "the function was busy until the request's time was over", true))
	}
}

func (x *exchange) failAcquire(ctx context.Context, err error) {
	switch {
	case x.r.Context().Err() != nil:
		x.gone()
	case errors.Is(err, errRetired):
		x.fail(problem(http.StatusNotFound, "function-not-found", "the function was deleted", false))
	case ctx.Err() != nil:
		x.fail(problem(http.StatusServiceUnavailable, "function-not-ready", "the function's worker did not come back within the request's time", true))
	default:
		x.fail(problem(http.StatusServiceUnavailable, "function-not-ready", "the function's worker is being restarted", true))
	}
}

// notServed answers for a function without any revision that is ready.
func (x *exchange) notServed() {
	x.engine.mu.RLock()
	status := x.function.status()
	x.engine.mu.RUnlock()
	if status.Error != nil {
		x.fail(problem(http.StatusServiceUnavailable, "function-failed", "the function cannot be served: "+status.Error.Detail, false))
		return
	}
	x.fail(problem(http.StatusServiceUnavailable, "function-not-ready", "the function is being made ready", true))
}

// gone counts a request whose client left; nobody reads an answer.
func (x *exchange) gone() {
	x.count(worker.FaultClientGone, 0)
}

func (x *exchange) count(outcome string, status int) {
	m := x.engine.metrics
	if x.relaying {
		m.forwarded.WithLabelValues(outcome).Inc()
		if outcome == "ok" || outcome == worker.FaultClientGone {
			return // counted where the function is
		}
	}
	class := "none"
	if status > 0 {
		class = strconv.Itoa(status/100) + "xx"
	}
	m.requests.WithLabelValues(outcome, class).Inc()
	m.phase("queue", x.queue)
	m.phase("load", x.load)
	m.phase("instantiate", x.instantiate)
	if x.firstByte > 0 {
		m.phase("first_byte", x.queue+x.load+x.firstByte)
	}
	m.phase("total", time.Since(x.arrived))
}

// cancelInWorker ends the guest of a request whose body was still on its way:
// the worker cannot see that its connection is gone while nobody reads it.
func (x *exchange) cancelInWorker(conn *incarnation) {
	ctx, cancel := context.WithTimeout(context.Background(), cancelLimit)
	defer cancel()
	// A worker that does not answer ends the guest at its deadline, or is
	// ended itself.
	_ = conn.ask(ctx, conn.client, worker.OpCancel, map[string]string{worker.HeaderRequest: x.id}, nil, nil)
}
