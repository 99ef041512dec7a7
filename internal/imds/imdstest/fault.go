package imdstest

import (
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Fault is one way to misbehave. Of its effects the first that is set counts,
// in the order of the fields; Delay goes before any.
type Fault struct {
	// Path below /latest/ that misbehaves: "meta-data/instance-id",
	// "api/token", or with a star at its end everything that begins so.
	Path string `json:"path"`
	// Skip lets this many requests pass first; Times ends the fault after so
	// many, 0 never; For ends it so long after it was set, 0 never.
	Skip  int           `json:"skip,omitempty"`
	Times int           `json:"times,omitempty"`
	For   time.Duration `json:"for,omitempty"`

	// Delay comes before the answer, right or wrong.
	Delay time.Duration `json:"delay,omitempty"`
	// Silent never answers.
	Silent bool `json:"silent,omitempty"`
	// Reset breaks the connection without an answer.
	Reset bool `json:"reset,omitempty"`
	// RejectToken forgets all tokens and answers 401.
	RejectToken bool `json:"rejectToken,omitempty"`
	// Status answers with this code.
	Status int `json:"status,omitempty"`
	// Location is the target of the redirect that Status makes.
	Location string `json:"location,omitempty"`
	// Truncate announces the right answer and sends half of it.
	Truncate bool `json:"truncate,omitempty"`
	// Body is the answer instead of the right one.
	Body *string `json:"body,omitempty"`
	// Oversize answers with this many bytes.
	Oversize int `json:"oversize,omitempty"`
}

// armed is a fault in effect.
type armed struct {
	Fault
	seen  int
	until time.Time
}

func (f *armed) matches(path string) bool {
	if prefix, ok := strings.CutSuffix(f.Path, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	return strings.Trim(f.Path, "/") == strings.Trim(path, "/")
}

// fault takes the fault that this request meets, if any. s.mu is held.
func (s *Server) faultLocked(path string, now time.Time) (Fault, bool) {
	for _, f := range s.faults {
		if !f.matches(path) || !f.until.IsZero() && !now.Before(f.until) || f.Times > 0 && f.seen >= f.Skip+f.Times {
			continue
		}
		if f.seen++; f.seen > f.Skip {
			return f.Fault, true
		}
	}
	return Fault{}, false
}

// misbehave carries the fault out, and says whether the answer was given.
func (s *Server) misbehave(w http.ResponseWriter, r *http.Request, f Fault, right func() (int, string)) bool {
	if f.Delay > 0 {
		timer := time.NewTimer(f.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return true
		case <-s.closed:
			return true
		}
	}
	switch {
	case f.Silent:
		s.silence(r)
	case f.Reset:
		reset(w)
	case f.RejectToken:
		s.RevokeTokens()
		refuse(w, http.StatusUnauthorized)
	case f.Status != 0:
		if f.Location != "" {
			w.Header().Set("Location", f.Location)
		}
		refuse(w, f.Status)
	case f.Truncate:
		_, body := right()
		w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
		_, _ = w.Write([]byte(body[:len(body)/2]))
	case f.Body != nil:
		_, _ = w.Write([]byte(*f.Body))
	case f.Oversize > 0:
		_, _ = w.Write([]byte(strings.Repeat("x", f.Oversize)))
	default:
		return false
	}
	return true
}

// silence keeps the request without an answer until its client leaves.
func (s *Server) silence(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-s.closed:
	}
	panic(http.ErrAbortHandler) // no answer even now
}

// reset closes the connection such that the client sees it reset.
func reset(w http.ResponseWriter) {
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		panic(http.ErrAbortHandler)
	}
	conn, _, err := hijacker.Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
