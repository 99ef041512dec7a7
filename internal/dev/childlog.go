package dev

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	var record map[string]any
	var level slog.Level
	if json.Unmarshal(line, &record) != nil || record["msg"] == nil || level.UnmarshalText([]byte(fmt.Sprint(record["level"]))) != nil {
		// Not one of our records: a crash report, which people must see.
		l.logger.Warn("output of a child", "process", l.name, "line", strings.TrimSpace(string(line)))
		return
	}
	if level < l.level {
		return
	}
	attrs := []slog.Attr{slog.String("process", l.name)}
	for _, key := range slices.Sorted(maps.Keys(record)) {
		if key != "time" && key != "level" && key != "msg" {
			attrs = append(attrs, slog.Any(key, record[key]))
		}
	}
	l.logger.LogAttrs(context.Background(), level, fmt.Sprint(record["msg"]), attrs...)
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
