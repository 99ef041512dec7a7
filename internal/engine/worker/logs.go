package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// logQueue and logQueueBytes bound what waits for the engine to read. A
	// guest that writes faster loses lines, not time.
	logQueue      = 4096
	logQueueBytes = 4 << 20
	streamStderr  = "stderr"
	streamSystem  = "system"
)

// logPipe sends lines to the engine without ever blocking a guest.
type logPipe struct {
	queue   chan v1alpha1.LogLine
	bytes   atomic.Int64
	dropped atomic.Uint64
}

func newLogPipe() *logPipe {
	return &logPipe{queue: make(chan v1alpha1.LogLine, logQueue)}
}

func (l *logPipe) send(line v1alpha1.LogLine) {
	size := int64(len(line.Line))
	if l.bytes.Add(size) > logQueueBytes {
		l.bytes.Add(-size)
		l.dropped.Add(1)
		return
	}
	select {
	case l.queue <- line:
	default:
		l.bytes.Add(-size)
		l.dropped.Add(1)
	}
}

// run writes queued lines to w, one JSON object a line, until ctx ends or the
// engine closed its end.
func (l *logPipe) run(ctx context.Context, w io.Writer) {
	b := bufio.NewWriterSize(w, 64<<10)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	for {
		var line v1alpha1.LogLine
		select {
		case line = <-l.queue:
		case <-ctx.Done():
			return
		}
		l.bytes.Add(-int64(len(line.Line)))
		if e.Encode(line) != nil {
			return
		}
		if len(l.queue) == 0 && b.Flush() != nil {
			return
		}
	}
}

// stderrLog cuts what one request writes to stderr into lines.
type stderrLog struct {
	pipe    *logPipe
	line    v1alpha1.LogLine // all but Time, Stream and Line
	partial []byte
	total   int
}

func (s *stderrLog) Write(p []byte) (int, error) {
	n := len(p)
	if s.total > MaxLogBytes {
		return n, nil
	}
	if s.total += n; s.total > MaxLogBytes {
		p = p[:n-(s.total-MaxLogBytes)]
		s.text(p)
		s.flush()
		s.system("the function wrote more than " + strconv.Itoa(MaxLogBytes>>20) +
			" MiB to stderr in one request; the rest is dropped")
		return n, nil
	}
	s.text(p)
	return n, nil
}

func (s *stderrLog) text(p []byte) {
	for len(p) > 0 {
		room := MaxLogLine - len(s.partial)
		i := bytes.IndexByte(p[:min(len(p), room)], '\n')
		switch {
		case i >= 0:
			s.partial = append(s.partial, p[:i]...)
			s.emit()
			p = p[i+1:]
		case len(p) >= room:
			s.partial = append(s.partial, p[:room]...)
			s.emit()
			p = p[room:]
		default:
			s.partial = append(s.partial, p...)
			return
		}
	}
}

func (s *stderrLog) emit() {
	l := s.line
	l.Time, l.Stream = time.Now().UTC(), streamStderr
	l.Line = strings.ToValidUTF8(strings.TrimSuffix(string(s.partial), "\r"), "\uFFFD")
	s.partial = s.partial[:0]
	s.pipe.send(l)
}

// flush sends a last line that has no end.
func (s *stderrLog) flush() {
	if len(s.partial) > 0 {
		s.emit()
	}
}

// system says Hearth's own word on the request.
func (s *stderrLog) system(text string) {
	l := s.line
	l.Time, l.Stream, l.Line = time.Now().UTC(), streamSystem, text
	s.pipe.send(l)
}
