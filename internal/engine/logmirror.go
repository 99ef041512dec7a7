package engine

import (
	"encoding/json"
	"io"
	"sync"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

// mirrorLines is how many lines may wait for a slow reader before lines are
// dropped: functions never wait for whoever collects their logs.
const mirrorLines = 4096

// logMirror writes every line of every function's log to one stream, as
// control.LogRecord lines, for those who collect logs of processes.
type logMirror struct {
	out     io.Writer
	metrics *metrics
	lines   chan []byte
	stop    chan struct{}
	running sync.WaitGroup
}

// newLogMirror starts one; close ends it.
func newLogMirror(out io.Writer, m *metrics) *logMirror {
	l := &logMirror{out: out, metrics: m, lines: make(chan []byte, mirrorLines), stop: make(chan struct{})}
	l.running.Go(l.run)
	return l
}

// write never blocks. tenant and line belong together.
func (l *logMirror) write(tenant string, line v1alpha1.LogLine) {
	record, err := json.Marshal(control.LogRecord{Log: control.LogRecordKind, Tenant: tenant, LogLine: line})
	if err != nil {
		l.metrics.logDrops.Inc()
		return
	}
	select {
	case l.lines <- append(record, '\n'):
	default:
		l.metrics.logDrops.Inc()
	}
}

func (l *logMirror) run() {
	for {
		select {
		case line := <-l.lines:
			l.put(line)
		case <-l.stop:
			// What was said before the end is still worth having.
			for {
				select {
				case line := <-l.lines:
					l.put(line)
				default:
					return
				}
			}
		}
	}
}

func (l *logMirror) put(line []byte) {
	if _, err := l.out.Write(line); err != nil {
		l.metrics.logDrops.Inc()
	}
}

func (l *logMirror) close() {
	close(l.stop)
	l.running.Wait()
}
