package engine

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/engine/worker"
)

const (
	// logFileBytes is the size at which a log is rotated; one old file is kept.
	logFileBytes = 4 << 20
	// maxOpenLogs bounds open files; functions that were quiet for longest are
	// closed and opened again when they speak.
	maxOpenLogs = 128
	// followerLines is what a follower may be behind before it loses lines.
	followerLines = 1024
	// keepLogs is how long the log of a function that is not served stays.
	keepLogs = 7 * 24 * time.Hour
	logExt   = ".ndjson"
	oldExt   = ".old"
)

// logStore keeps the log of each function in two bounded files and passes new
// lines to followers. Logs are a convenience for the function's author: they
// are not fsynced, and losing lines is counted, not prevented.
//
// Files lie at <tenant>/<function>.ndjson, so that a name that changes hands
// does not show its former owner's lines.
type logStore struct {
	dir     string
	metrics *metrics
	logger  *slog.Logger
	mirror  *logMirror // nil: none

	mu   sync.Mutex
	logs map[string]*functionLog // by path
	open int
}

type functionLog struct {
	path string

	file      *os.File
	size      int64
	lastWrite time.Time
	followers map[chan []byte]struct{}
}

func newLogStore(dir string, m *metrics, logger *slog.Logger) (*logStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the log directory: %w", err)
	}
	return &logStore{dir: dir, metrics: m, logger: logger, logs: make(map[string]*functionLog)}, nil
}

func (s *logStore) path(tenant, function string) string {
	return filepath.Join(s.dir, tenant, function+logExt)
}

func (s *logStore) log(tenant, function string) *functionLog {
	path := s.path(tenant, function)
	l := s.logs[path]
	if l == nil {
		l = &functionLog{path: path, followers: make(map[chan []byte]struct{})}
		s.logs[path] = l
	}
	return l
}

// append writes a line. tenant and the line's function are valid labels.
func (s *logStore) append(tenant string, line v1alpha1.LogLine) {
	record, err := json.Marshal(line)
	if err != nil {
		s.metrics.logDrops.Inc()
		return
	}
	record = append(record, '\n')
	if s.mirror != nil {
		s.mirror.write(tenant, line)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.log(tenant, line.Function)
	if err := s.write(l, record); err != nil {
		// One event for the first of a row: a full disk must not fill another.
		if l.file != nil || l.lastWrite.IsZero() {
			s.logger.Warn("function log cannot be written", "path", l.path, "error", err)
		}
		s.close(l)
		s.metrics.logDrops.Inc()
	} else {
		s.metrics.logLines.Inc()
	}
	l.lastWrite = time.Now()
	for f := range l.followers {
		select {
		case f <- record:
		default:
			s.metrics.logDrops.Inc()
		}
	}
}

func (s *logStore) write(l *functionLog, record []byte) error {
	if l.file != nil && l.size+int64(len(record)) > logFileBytes {
		s.close(l)
		if err := os.Rename(l.path, l.path+oldExt); err != nil {
			return err
		}
	}
	if l.file == nil {
		if s.open >= maxOpenLogs {
			s.closeQuietest()
		}
		if err := os.MkdirAll(filepath.Dir(l.path), 0o700); err != nil {
			return err
		}
		f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			_ = f.Close() // the first error says it
			return err
		}
		l.file, l.size = f, info.Size()
		s.open++
	}
	n, err := l.file.Write(record)
	l.size += int64(n)
	return err
}

func (s *logStore) close(l *functionLog) {
	if l.file != nil {
		_ = l.file.Close() // nothing is buffered here
		l.file = nil
		s.open--
	}
}

func (s *logStore) closeQuietest() {
	var quietest *functionLog
	for _, l := range s.logs {
		if l.file != nil && (quietest == nil || l.lastWrite.Before(quietest.lastWrite)) {
			quietest = l
		}
	}
	if quietest != nil {
		s.close(quietest)
	}
}

// read gives the lines kept, oldest first, as whole records, and a channel of
// the ones that follow when follow is set. done must be called.
func (s *logStore) read(tenant, function string, o control.LogOptions) (kept []byte, next <-chan []byte, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.log(tenant, function)
	done = func() {}
	if o.Tail >= 0 {
		// At most two files of logFileBytes; read under the lock so that no
		// line is seen twice or missed between here and the channel.
		for _, path := range []string{l.path + oldExt, l.path} {
			b, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, nil, done, fmt.Errorf("read the log of %s: %w", function, err)
			}
			// A crash can leave half a record at the end.
			if i := bytes.LastIndexByte(b, '\n'); i+1 < len(b) {
				b = b[:i+1]
			}
			kept = append(kept, b...)
		}
		kept = selectLines(kept, o)
	}
	if o.Follow {
		c := make(chan []byte, followerLines)
		l.followers[c] = struct{}{}
		next = c
		done = func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(l.followers, c)
		}
	}
	return kept, next, done, nil
}

// selectLines applies Since and Tail to records.
func selectLines(records []byte, o control.LogOptions) []byte {
	if !o.Since.IsZero() {
		for len(records) > 0 {
			end := bytes.IndexByte(records, '\n') + 1
			var line struct {
				Time time.Time `json:"time"`
			}
			if json.Unmarshal(records[:end], &line) == nil && !line.Time.Before(o.Since) {
				break
			}
			records = records[end:]
		}
	}
	if o.Tail > 0 {
		at := len(records)
		for range o.Tail {
			if at == 0 {
				break
			}
			at = bytes.LastIndexByte(records[:at-1], '\n') + 1
		}
		records = records[at:]
	}
	return records
}

// sweep removes logs of functions that are not served and were quiet for long.
func (s *logStore) sweep(served func(tenant, function string) bool) {
	paths, err := filepath.Glob(filepath.Join(s.dir, "*", "*"+logExt+"*"))
	if err != nil {
		return
	}
	for _, path := range paths {
		name, _, _ := strings.Cut(filepath.Base(path), ".")
		info, err := os.Stat(path)
		if err != nil || time.Since(info.ModTime()) < keepLogs || served(filepath.Base(filepath.Dir(path)), name) {
			continue
		}
		_ = os.Remove(path) // tried again with the next sweep
	}
}

func (s *logStore) closeAll() {
	if s.mirror != nil {
		s.mirror.close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.logs {
		s.close(l)
	}
}

// collect reads a worker's log pipe to its end. The worker is believed only
// about functions it was given: one that was taken over must not write into
// another tenant's log.
func (s *logStore) collect(r io.Reader, tenantOf func(function string) (string, bool)) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), worker.MaxLogRecord)
	for lines.Scan() {
		var line v1alpha1.LogLine
		if json.Unmarshal(lines.Bytes(), &line) != nil || len(line.Line) > 4*worker.MaxLogLine {
			s.metrics.logDrops.Inc()
			continue
		}
		tenant, ok := tenantOf(line.Function)
		if !ok {
			s.metrics.logDrops.Inc()
			continue
		}
		s.append(tenant, line)
	}
	// A record over the bound is no worker of ours: stop listening but keep
	// the pipe from filling, which costs nothing.
	_, _ = io.Copy(io.Discard, r)
}
