package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/cgi"
)

const (
	// holdBytes and holdTime are how much of a response is kept back at its
	// start: a guest that fails soon gets a clean 502, and a short answer goes
	// out in one piece with its length. The time is also the most by which a
	// streamed write is late.
	holdBytes = 32 << 10
	holdTime  = 8 * time.Millisecond
)

var errResponseOver = errors.New("the response is over")

// response is a guest's stdout. Writes come from the goroutine that runs the
// guest, flushes from a timer.
type response struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	head bool
	// instantiate is reported with the header.
	instantiate time.Duration
	// abort ends the guest; it is called with mu held and must not block.
	abort func(*Fault)

	mu      sync.Mutex
	scanner cgi.HeaderScanner
	buf     []byte // the header block until parsed, then the body held back
	parsed  *cgi.Response
	sent    bool
	over    bool
	total   int64
	timer   *time.Timer
	armed   bool
	wrote   time.Time // when the header block was complete
}

// Write takes the guest's output.
func (r *response) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return 0, errResponseOver
	}
	n := len(p)
	if r.parsed == nil {
		r.buf = append(r.buf, p...)
		end := r.scanner.End(r.buf)
		if end < 0 && len(r.buf) <= cgi.MaxHeaderBytes {
			return n, nil
		}
		if end < 0 || end > cgi.MaxHeaderBytes {
			return 0, r.fail(FaultOutput, fmt.Sprintf("the response header is longer than %d KiB, or there is none", cgi.MaxHeaderBytes>>10))
		}
		parsed, err := cgi.ParseHeader(r.buf[:end])
		if err != nil {
			return 0, r.fail(FaultOutput, err.Error())
		}
		r.parsed, r.wrote = parsed, time.Now()
		p = r.buf[end:]
		r.buf = nil
	}
	if r.total += int64(len(p)); r.total > v1alpha1.MaxResponseBytes {
		return 0, r.fail(FaultTooLarge, fmt.Sprintf("the response is longer than %d MiB", v1alpha1.MaxResponseBytes>>20))
	}
	if r.head || !cgi.BodyAllowed(r.parsed.Status) {
		p = nil // nobody may see it
	}
	switch {
	case r.sent:
		if err := r.write(p); err != nil {
			return 0, err
		}
	case len(r.buf)+len(p) > holdBytes:
		if err := r.send(p); err != nil {
			return 0, err
		}
	default:
		r.buf = append(r.buf, p...)
	}
	if !r.armed {
		r.armed = true
		if r.timer == nil {
			r.timer = time.AfterFunc(holdTime, r.flush)
		} else {
			r.timer.Reset(holdTime)
		}
	}
	return n, nil
}

// flush sends what was held back or is in buffers below.
func (r *response) flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.armed = false
	if r.over || !r.sent && r.send(nil) != nil {
		return
	}
	if r.rc.Flush() != nil {
		_ = r.gone() // its error is for a writer
	}
}

// send writes the header and the body so far.
func (r *response) send(more []byte) error {
	h := r.w.Header()
	for name, values := range r.parsed.Header {
		if !strings.HasPrefix(name, HeaderPrefix) {
			h[name] = values
		}
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // or net/http guesses one
	}
	h.Set(HeaderInstantiate, strconv.FormatInt(r.instantiate.Microseconds(), 10))
	if r.parsed.ContentLength >= 0 && cgi.BodyAllowed(r.parsed.Status) {
		h.Set("Content-Length", strconv.FormatInt(r.parsed.ContentLength, 10))
	}
	r.sent = true
	r.w.WriteHeader(r.parsed.Status)
	held := r.buf
	r.buf = nil
	if err := r.write(held); err != nil {
		return err
	}
	return r.write(more)
}

func (r *response) write(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if _, err := r.w.Write(p); err != nil {
		if errors.Is(err, http.ErrContentLength) {
			return r.fail(FaultOutput, "the body is longer than the function's own Content-Length field says")
		}
		return r.gone()
	}
	return nil
}

func (r *response) gone() error {
	return r.fail(FaultClientGone, "the client went away")
}

// fail ends the response and the guest.
func (r *response) fail(code, detail string) error {
	r.over = true
	r.abort(&Fault{Status: http.StatusBadGateway, Code: code, Detail: detail})
	return errResponseOver
}

// finish gives the answer when the guest is done: its own when fault is nil.
// It returns the fault that the answer turned into, if any, and whether the
// connection has to be cut because part of the guest's answer is out.
func (r *response) finish(fault *Fault) (f *Fault, cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	if r.timer != nil {
		r.timer.Stop()
	}
	if fault == nil && r.parsed == nil {
		detail := "the function ended without writing a response; it has to write a CGI header, a blank line and the body to stdout"
		if len(r.buf) > 0 {
			detail = "the function ended within its response header; a blank line has to follow it"
		}
		fault = &Fault{Status: http.StatusBadGateway, Code: FaultOutput, Detail: detail}
	}
	if fault != nil {
		if !r.sent {
			r.writeFault(fault)
		}
		return fault, r.sent
	}
	if !r.sent {
		if !r.head {
			r.parsed.ContentLength = int64(len(r.buf))
		}
		if r.send(nil) != nil {
			return &Fault{Code: FaultClientGone, Detail: "the client went away"}, true
		}
		return nil, false
	}
	if want := r.parsed.ContentLength; want >= 0 && r.total < want && !r.head && cgi.BodyAllowed(r.parsed.Status) {
		return &Fault{Code: FaultOutput, Detail: "the body is shorter than the function's own Content-Length field says"}, true
	}
	return nil, false
}

func (r *response) writeFault(f *Fault) {
	h := r.w.Header()
	clear(h)
	h.Set(HeaderInstantiate, strconv.FormatInt(r.instantiate.Microseconds(), 10))
	writeFault(r.w, f)
}

func writeFault(w http.ResponseWriter, f *Fault) {
	body, _ := json.Marshal(f)
	h := w.Header()
	h.Set(HeaderFault, f.Code)
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(f.Status)
	_, _ = w.Write(body) // a lost engine ends the worker anyway
}
