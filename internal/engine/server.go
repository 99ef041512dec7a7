package engine

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

// controlHandler serves the agent.
func (e *Engine) controlHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT "+control.PathState, e.putState)
	mux.HandleFunc("GET "+control.PathStatus, e.getStatus)
	mux.HandleFunc("GET "+control.PathLogs+"{function}", e.getLogs)
	mux.Handle("GET "+control.PathMetrics, promhttp.HandlerFor(e.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET "+control.PathLive, func(w http.ResponseWriter, _ *http.Request) {
		e.mu.RLock() // held for ever by nobody, or the engine is not alive
		defer e.mu.RUnlock()
		w.WriteHeader(http.StatusOK)
	})
	return mux
}

// probeHandler serves kubelet and Prometheus. An engine is ready once an agent
// told it what to serve, even if that is nothing.
func (e *Engine) probeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		e.mu.RLock() // held for ever by nobody, or the engine is not alive
		defer e.mu.RUnlock()
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		e.mu.RLock()
		fed := e.generation > 0
		e.mu.RUnlock()
		if e.ending.Err() != nil {
			http.Error(w, "not ready: the engine is ending", http.StatusServiceUnavailable)
			return
		}
		if !fed {
			http.Error(w, "not ready: no agent has said what to serve", http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func (e *Engine) putState(w http.ResponseWriter, r *http.Request) {
	defer e.touch.watch()()
	var s control.State
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, control.MaxStateBytes)).Decode(&s); err != nil {
		// The decoder's error can quote its input, which holds secrets.
		writeProblem(w, problem(http.StatusBadRequest, "state-invalid", "the state is not the JSON that was expected", false))
		return
	}
	if err := e.apply(s); err != nil {
		writeProblem(w, problem(http.StatusServiceUnavailable, "state-invalid", err.Error(), true))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (e *Engine) getStatus(w http.ResponseWriter, r *http.Request) {
	defer e.touch.watch()()
	q := r.URL.Query()
	var after uint64
	var wait time.Duration
	var err error
	if v := q.Get("after"); v != "" {
		after, err = strconv.ParseUint(v, 10, 64)
	}
	if v := q.Get("wait"); v != "" && err == nil {
		wait, err = time.ParseDuration(v)
	}
	if err != nil {
		writeProblem(w, problem(http.StatusBadRequest, "status-parameter-invalid", err.Error(), false))
		return
	}
	t := time.NewTimer(min(max(wait, 0), control.MaxStatusWait))
	defer t.Stop()
	status, changed := e.snapshot()
wait:
	for after != 0 && status.Version == after {
		select {
		case <-changed:
			status, changed = e.snapshot()
		case <-t.C:
			break wait
		case <-r.Context().Done():
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status) // the agent is gone
}

func (e *Engine) getLogs(w http.ResponseWriter, r *http.Request) {
	o, err := logOptions(r)
	if err != nil {
		writeProblem(w, problem(http.StatusBadRequest, "log-parameters-invalid", err.Error(), false))
		return
	}
	name := strings.ToLower(r.PathValue("function"))
	f := e.lookup(name)
	if f == nil {
		writeProblem(w, problem(http.StatusNotFound, "function-not-found", fmt.Sprintf("the engine serves no function named %q", name), true))
		return
	}
	kept, next, done, err := e.logs.read(f.tenant, name, o)
	if err != nil {
		writeProblem(w, problem(http.StatusInternalServerError, "internal", err.Error(), true))
		return
	}
	defer done()
	w.Header().Set("Content-Type", "application/x-ndjson")
	if _, err := w.Write(kept); err != nil || next == nil {
		return
	}
	rc := http.NewResponseController(w)
	if rc.Flush() != nil {
		return
	}
	for {
		select {
		case record := <-next:
			if _, err := w.Write(record); err != nil {
				return
			}
			if len(next) == 0 && rc.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

func logOptions(r *http.Request) (o control.LogOptions, err error) {
	q := r.URL.Query()
	if v := q.Get("follow"); v != "" {
		if o.Follow, err = strconv.ParseBool(v); err != nil {
			return o, fmt.Errorf("follow is true or false, not %q", v)
		}
	}
	if v := q.Get("tail"); v != "" {
		if o.Tail, err = strconv.Atoi(v); err != nil || o.Tail > control.MaxLogTail {
			return o, fmt.Errorf("tail is a number up to %d, not %q", control.MaxLogTail, v)
		}
	}
	if v := q.Get("since"); v != "" {
		if o.Since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return o, fmt.Errorf("since is a time as in RFC 3339, not %q", v)
		}
	}
	return o, nil
}
