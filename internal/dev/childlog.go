package dev

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
)

// maxChildLog is the size at which a child's log file is set aside; one old
// file is kept, so a child's logs take at most twice this on disk.
const maxChildLog = 4 << 20

// childLog keeps what a child process prints: in a file, and on the terminal
// what is a warning or worse. It is used by one goroutine at a time.
type childLog struct {
	path   string
	logger *slog.Logger
	name   string
	// level is the least level that is repeated on the parent's own log.
	level slog.Level

	mu   sync.Mutex
	file *os.File
	size int64
}

func newChildLog(dir, name string, logger *slog.Logger, level slog.Level) (*childLog, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &childLog{path: filepath.Join(dir, name+".log"), logger: logger, name: name, level: level}
	return l, l.open()
}

func (l *childLog) open() error {
	file, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return err
	}
	l.file, l.size = file, info.Size()
	return nil
}

// line takes one line of a child's output. Losing a log line must not hold up
// the child, so errors (a full disk) are not returned.
func (l *childLog) line(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil && l.size+int64(len(line)) > maxChildLog {
		l.file.Close()
		l.file = nil
		if os.Rename(l.path, l.path+".1") == nil {
			_ = l.open()
		}
	}
	if l.file != nil {
		n, _ := l.file.Write(line)
		l.size += int64(n)
	}
	var record struct {
		Level slog.Level `json:"level"`
		Msg   string     `json:"msg"`
		Error string     `json:"error"`
	}
	if json.Unmarshal(line, &record) != nil {
		// Not one of our records: a crash report, which people must see.
		l.logger.Warn("output of a child", "process", l.name, "line", string(line))
		return
	}
	if record.Level >= l.level {
		attrs := []any{"process", l.name}
		if record.Error != "" {
			attrs = append(attrs, "error", record.Error)
		}
		l.logger.Log(nil, record.Level, record.Msg, attrs...) //nolint:staticcheck // no context belongs to a child's line
	}
}

func (l *childLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}
