package submit

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/access"
)

const (
	defaultTail = 100
	maxTail     = 10_000
	// maxLogLine bounds one line of the log as it is passed on: a line of
	// 16 KiB with every character escaped, and its members.
	maxLogLine = 128 << 10
	// logWrite is how long a reader of logs may take no bytes before its
	// connection is closed.
	logWrite = 30 * time.Second
)

// logs serves GET /v1/functions/{name}/logs.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	follow := false
	switch q.Get("follow") {
	case "", "false":
	case "true":
		follow = true
	default:
		return newProblem("invalid-parameter", `The query parameter "follow" must be true or false.`)
	}
	tail := defaultTail
	if q.Has("tail") {
		if tail, err = intParameter(q, "tail", 0, maxTail); err != nil {
			return err
		}
	}
	var since time.Time
	if v := q.Get("since"); v != "" {
		if since, err = time.Parse(time.RFC3339, v); err != nil {
			ago, err := time.ParseDuration(v)
			if err != nil || ago < 0 {
				return newProblem("invalid-parameter", `The query parameter "since" must be a time such as 2026-01-31T12:00:00Z or a duration such as 10m.`)
			}
			since = s.o.Now().Add(-ago)
		}
	}
	f, err := s.readable(r.Context(), name)
	if err != nil {
		return err
	}
	if err := s.authorize(r.Context(), access.VerbGet, f.Tenant, name, access.SubresourceLog); err != nil {
		return err
	}
	if s.o.Logs == nil {
		return newProblem("logs-unavailable", "This API has no access to logs.")
	}
	ctx, cancel := s.untilStop(r.Context())
	defer cancel()
	if follow && s.o.Access != nil {
		var guard sync.WaitGroup
		defer guard.Wait()
		defer cancel()
		guard.Go(func() { s.guardLog(ctx, r, f, cancel) })
	}
	rc, err := s.o.Logs.Logs(ctx, name, follow, tail, since)
	if err != nil {
		var p *problem
		if errors.As(err, &p) {
			return p
		}
		return newProblem("logs-unavailable", "The engine, which has the logs, does not answer. Try again in a moment.").because(err)
	}
	defer func() { _ = rc.Close() }()
	// A source may be blocked in Read when the client leaves.
	unhook := closeWith(ctx, rc)
	defer unhook()

	h := w.Header()
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // reverse proxies: do not collect lines
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	out := http.NewResponseController(w)
	in := bufio.NewReaderSize(rc, maxLogLine)
	flush := func() error {
		_ = out.SetWriteDeadline(time.Now().Add(logWrite)) // not every ResponseWriter can
		if err := out.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		return nil
	}
	if flush() != nil {
		return errClientGone
	}
	for {
		line, err := in.ReadSlice('\n')
		if len(line) > 0 {
			_ = out.SetWriteDeadline(time.Now().Add(logWrite))
			if _, werr := w.Write(line); werr != nil {
				return errClientGone
			}
			if in.Buffered() == 0 && flush() != nil {
				return errClientGone
			}
		}
		switch {
		case err == nil, errors.Is(err, bufio.ErrBufferFull):
		case err == io.EOF, ctx.Err() != nil:
			return nil
		default:
			return newProblem("internal", "").because(err) // cuts the connection
		}
	}
}
