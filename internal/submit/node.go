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

// nodeOf returns the node that makes the call, empty where nobody asks.
func (s *Server) nodeOf(r *http.Request) (string, error) {
	if s.o.NodeAccess == nil {
		return "", nil
	}
	node, err := s.o.NodeAccess(r.Context(), r)
	if err == nil && node == "" {
		err = errors.New("the node's access names no node")
	}
	return node, err
}

func (s *Server) desiredOf(ctx context.Context, node string, after uint64) (v1alpha1.Desired, error) {
	if s.o.NodeDesired != nil {
		return s.o.NodeDesired(ctx, node, after)
	}
	return s.o.Store.Desired(ctx, after)
}

// desired serves GET /node/v1/desired: the snapshot as soon as its generation
// is not after, or the same one again when wait is over. It has secrets in it.
func (s *Server) desired(w http.ResponseWriter, r *http.Request) error {
	node, err := s.nodeOf(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	var after uint64
	var wait time.Duration
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
	d, err := s.desiredOf(timed, node, after)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		if r.Context().Err() != nil {
			return errClientGone
		}
		// No generation has this number, so this is the current snapshot at once.
		d, err = s.desiredOf(r.Context(), node, math.MaxUint64)
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
	node, err := s.nodeOf(r)
	if err != nil {
		return err
	}
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
	if s.o.NodeAccess != nil && report.Node != node {
		return newProblem("forbidden", "The report is about the node %.80q, and the token is the node %q's.", report.Node, node)
	}
	if err := s.o.Store.SetProgress(r.Context(), report); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
