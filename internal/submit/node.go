package submit

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// maxDesiredWait bounds a node's long poll.
	maxDesiredWait = 60 * time.Second
	// maxReportBytes bounds a node's report: a thousand functions of a few KiB.
	maxReportBytes = 16 << 20
)

// closeWith closes c when ctx ends, to end a blocked Read; the returned
// function calls that off.
func closeWith(ctx context.Context, c io.Closer) func() bool {
	return context.AfterFunc(ctx, func() { _ = c.Close() })
}

// desired serves GET /node/v1/desired: the snapshot as soon as its generation
// is not after, or the same one again when wait is over. It has secrets in it.
func (s *Server) desired(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	var after uint64
	var wait time.Duration
	var err error
	if q.Has("after") {
		if after, err = strconv.ParseUint(q.Get("after"), 10, 64); err != nil {
			return newProblem("invalid-parameter", `The query parameter "after" must be a generation.`)
		}
	}
	if q.Has("wait") {
		if wait, err = durationParameter(q, "wait", maxDesiredWait); err != nil {
			return err
		}
	}
	stop, cancel := s.untilStop(r.Context())
	defer cancel()
	timed, cancelTimed := context.WithTimeout(stop, wait)
	defer cancelTimed()
	d, err := s.o.Store.Desired(timed, after)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		if r.Context().Err() != nil {
			return errClientGone
		}
		// No generation has this number, so this is the current snapshot at once.
		d, err = s.o.Store.Desired(r.Context(), math.MaxUint64)
	}
	if err != nil {
		return err
	}
	// Not jsonReply: nobody reads this, and it can be long.
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	body, err := json.Marshal(d)
	if err != nil {
		return err
	}
	_, _ = w.Write(body)
	return nil
}

// report serves POST /node/v1/report. Members that are not known are passed
// over: a node may be newer than its API for a while.
func (s *Server) report(w http.ResponseWriter, r *http.Request) error {
	if _, _, err := mediaType(r, "application/json"); err != nil {
		return err
	}
	if r.ContentLength > maxReportBytes {
		return bodyProblem(errBodySize, "body-too-large", maxReportBytes)
	}
	data, err := s.readAll(w, r, maxReportBytes)
	if err != nil {
		return err
	}
	var report v1alpha1.NodeReport
	if err := json.Unmarshal(data, &report); err != nil {
		return newProblem("malformed-request", "The body is not a node's report.").because(err)
	}
	if err := s.o.Store.SetProgress(r.Context(), report); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
