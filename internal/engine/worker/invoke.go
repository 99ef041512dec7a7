package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tetratelabs/wazero/sys"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/cgi"
	"github.com/hearth-sh/hearth/internal/engine/wasip1"
)

// ended is a time before any deadline: setting it ends reads and writes that
// wait.
var ended = time.Unix(1, 0)

// invocation is one request on its way through a guest.
type invocation struct {
	rc        *http.ResponseController
	streaming bool // the body is read from the connection while the guest runs
	killed    chan struct{}

	mu       sync.Mutex
	fault    *Fault
	instance *instance
}

// abort ends the guest for the reason given; the first reason stays. It does
// not wait and may be called from anywhere, also when all is over.
func (v *invocation) abort(f *Fault) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fault != nil {
		return
	}
	v.fault = f
	close(v.killed)
	if v.instance != nil {
		v.instance.stop()
	}
	if v.streaming {
		_ = v.rc.SetReadDeadline(ended) // fails on a closed connection only
	}
	_ = v.rc.SetWriteDeadline(ended) // the same
}

// bind makes i the instance that abort stops.
func (v *invocation) bind(i *instance) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.instance = i
	if v.fault != nil {
		i.stop()
	}
}

func (v *invocation) reason() *Fault {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.fault
}

// finish makes later aborts do nothing and gives the reason of an earlier one.
func (v *invocation) finish() *Fault {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fault != nil {
		return v.fault
	}
	v.fault = &Fault{Code: FaultInternal, Detail: "over"}
	close(v.killed)
	return nil
}

func (w *Worker) invoke(rw http.ResponseWriter, r *http.Request) {
	began := time.Now()
	w.requests.Add(1)
	defer w.requests.Add(-1)

	left, err := timeout(r.Header)
	if err != nil {
		writeFault(rw, &Fault{Status: http.StatusBadRequest, Code: FaultInternal, Detail: err.Error()})
		return
	}
	f := w.function(r.Header.Get(HeaderKey))
	if f == nil {
		writeFault(rw, &Fault{
			Status: http.StatusServiceUnavailable, Code: FaultNotLoaded, Retryable: true,
			Detail: "the function is not loaded",
		})
		return
	}
	defer f.release()

	v := &invocation{rc: http.NewResponseController(rw), killed: make(chan struct{})}
	_ = v.rc.SetWriteDeadline(time.Time{}) // an earlier request's on this connection
	request := r.Header.Get(HeaderRequest)
	log := &stderrLog{pipe: w.logs, line: v1alpha1.LogLine{
		Function: f.spec.Name, Revision: f.spec.Revision, Request: request,
	}}

	// From here on the request ends in time: deadline, client and engine are
	// all watched before anything can block.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	deadline := time.AfterFunc(left, func() {
		v.abort(&Fault{Status: http.StatusGatewayTimeout, Code: FaultDeadline, Detail: "the function did not finish within its time limit"})
		cancel()
	})
	defer deadline.Stop()
	watch := context.AfterFunc(r.Context(), func() {
		v.abort(&Fault{Status: http.StatusBadGateway, Code: FaultClientGone, Detail: "the client went away"})
		cancel()
	})
	defer watch()
	w.mu.Lock()
	w.running[request] = v.abort
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.running, request)
		w.mu.Unlock()
	}()

	stdin, err := v.body(r)
	if err != nil {
		v.abort(&Fault{Status: http.StatusBadGateway, Code: FaultRequest, Detail: "the request body ended early"})
		_ = v.rc.SetWriteDeadline(time.Now().Add(answerTimeout)) // fails on a closed connection only
		writeFault(rw, v.reason())
		return
	}

	acquiring := time.Now()
	i, err := f.acquire(ctx)
	response := &response{
		w: rw, rc: v.rc, head: r.Method == http.MethodHead, abort: v.abort,
		instantiate: time.Since(acquiring),
	}
	var fault *Fault
	if err != nil {
		fault = acquireFault(err)
		if reason := v.finish(); reason != nil {
			fault = reason
		}
	} else {
		v.bind(i)
		p := f.process(r)
		p.Stdin, p.Stdout, p.Stderr, p.Killed = stdin, response, log, v.killed
		err = i.run(wasip1.WithProcess(ctx, p))
		if fault = v.finish(); fault == nil {
			fault = guestFault(err, i, f)
		}
		if fault != nil && (fault.Code == FaultStack || fault.Code == FaultMemory) {
			w.settleSoon() // a stack of tens of MiB is garbage now
		}
	}
	log.flush()

	// An abort may have closed the connection's deadlines; the answer still
	// has to get through.
	if fault != nil {
		_ = v.rc.SetWriteDeadline(time.Now().Add(answerTimeout)) // fails on a closed connection only
	}
	fault, cut := response.finish(fault)
	if !cut {
		// Giving back what a guest filled takes up to tens of milliseconds, and
		// the answer would be in a buffer all the time.
		_ = v.rc.Flush() // fails on a closed connection only
	}
	switch {
	case i == nil:
	case fault != nil && f.hold():
		// Nor has the next request of this connection to wait for it.
		w.background.Go(func() {
			defer f.release()
			i.close()
		})
	default:
		i.close()
	}
	if fault != nil && fault.Code != FaultClientGone {
		log.system(fmt.Sprintf("%s %s failed after %v: %s: %s", r.Method, r.URL.Path,
			time.Since(began).Round(time.Millisecond), fault.Code, fault.Detail))
	}
	f.refill()
	if cut {
		panic(http.ErrAbortHandler)
	}
}

// body gives the guest's stdin. A body of known small size is read first.
func (v *invocation) body(r *http.Request) (io.Reader, error) {
	switch {
	case r.ContentLength == 0 || r.Body == nil:
		return bytes.NewReader(nil), nil
	case r.ContentLength > 0 && r.ContentLength <= SmallBody:
		b := make([]byte, r.ContentLength)
		v.setStreaming(true)
		defer v.setStreaming(false)
		if _, err := io.ReadFull(r.Body, b); err != nil {
			return nil, err
		}
		return bytes.NewReader(b), nil
	default:
		v.setStreaming(true)
		// Or the server would end the body when the guest's answer begins.
		_ = v.rc.EnableFullDuplex() // only fails for other protocols
		return &streamedBody{body: r.Body, v: v}, nil
	}
}

func (v *invocation) setStreaming(s bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.streaming = s
}

// streamedBody is stdin read from the connection.
type streamedBody struct {
	body io.Reader
	v    *invocation
}

func (s *streamedBody) Read(p []byte) (int, error) {
	n, err := s.body.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		// A guest must not take a cut-off body for a whole one.
		s.v.abort(&Fault{Status: http.StatusBadGateway, Code: FaultRequest, Detail: "the request body ended early"})
	}
	return n, err
}

// process translates the request for the guest.
func (f *function) process(r *http.Request) *wasip1.Process {
	h := r.Header
	script, scheme, remote := h.Get(HeaderScript), h.Get(HeaderScheme), h.Get(HeaderRemote)
	for name := range h {
		if strings.HasPrefix(name, HeaderPrefix) && name != HeaderRequest {
			delete(h, name)
		}
	}
	path := r.URL.Path
	return &wasip1.Process{
		Args: []string{script + strings.ReplaceAll(path, "\x00", "")},
		Env: cgi.Environment(&cgi.Request{
			Method:        r.Method,
			Proto:         r.Proto,
			Scheme:        scheme,
			Host:          r.Host,
			ScriptName:    script,
			Path:          path,
			RawPath:       r.URL.EscapedPath(),
			Query:         r.URL.RawQuery,
			RemoteAddr:    remote,
			Header:        h,
			ContentLength: r.ContentLength,
		}, f.spec.Env, f.spec.Secrets),
	}
}

func acquireFault(err error) *Fault {
	if errors.Is(err, errNoRoom) {
		return &Fault{
			Status: http.StatusServiceUnavailable, Code: FaultNoRoom, Retryable: true,
			Detail: "the worker's memory is used up by other requests",
		}
	}
	return &Fault{Status: http.StatusBadGateway, Code: FaultTrap, Detail: "the function cannot be instantiated: " + firstLine(err)}
}

// guestFault says what was wrong with how a guest ended, nil for nothing.
func guestFault(err error, i *instance, f *function) *Fault {
	if err == nil {
		return nil
	}
	fault := &Fault{Status: http.StatusBadGateway}
	var exit *sys.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == 0:
		return nil
	case errors.As(err, &exit):
		fault.Code, fault.Detail = FaultExit, fmt.Sprintf("the function exited with code %d", exit.ExitCode())
	case strings.HasPrefix(err.Error(), "wasm error: stack overflow"), err.Error() == "stack overflow":
		fault.Code, fault.Detail = FaultStack, "the function overflowed its call stack, most likely by endless recursion"
		return fault
	default:
		fault.Code, fault.Detail = FaultTrap, "the function trapped: "+strings.TrimPrefix(firstLine(err), "wasm error: ")
	}
	switch m := i.memory; {
	case m.denied:
		fault.Code = FaultMemory
		fault.Detail += fmt.Sprintf(", after it was refused more than its %d MiB of memory", f.spec.MemoryMiB)
	case m.noRoom:
		fault.Status, fault.Code, fault.Retryable = http.StatusServiceUnavailable, FaultNoRoom, true
		fault.Detail += ", after it was refused memory because other requests use up the worker's"
	}
	return fault
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	const most = 512
	return line[:min(len(line), most)]
}
