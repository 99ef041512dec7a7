package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

func newTestLogs(t testing.TB) *logStore {
	t.Helper()
	s, err := newLogStore(t.TempDir(), newMetrics(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.closeAll)
	return s
}

func (s *logStore) texts(t testing.TB, tenant, function string, o control.LogOptions) []string {
	t.Helper()
	kept, _, done, err := s.read(tenant, function, o)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var texts []string
	for record := range bytes.Lines(kept) {
		var l v1alpha1.LogLine
		if err := json.Unmarshal(record, &l); err != nil {
			t.Fatalf("%v in %q", err, record)
		}
		texts = append(texts, l.Line)
	}
	return texts
}

func TestLogsRotateAndKeepTheNewest(t *testing.T) {
	s := newTestLogs(t)
	line := strings.Repeat("x", 16<<10)
	const lines = 3 * logFileBytes / (16 << 10)
	for i := range lines {
		s.append("default", v1alpha1.LogLine{Function: "f", Line: fmt.Sprint(i, line)})
	}
	var total int64
	files, _ := filepath.Glob(filepath.Join(s.dir, "default", "*"))
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	if len(files) != 2 || total > 2*logFileBytes {
		t.Errorf("%d files of %d bytes", len(files), total)
	}
	texts := s.texts(t, "default", "f", control.LogOptions{Tail: 2})
	if len(texts) != 2 || !strings.HasPrefix(texts[1], fmt.Sprint(lines-1)) {
		t.Errorf("tail of %d", len(texts))
	}
}

func TestLogsSelectByTailAndTime(t *testing.T) {
	s := newTestLogs(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range 5 {
		s.append("default", v1alpha1.LogLine{Time: at.Add(time.Duration(i) * time.Second), Function: "f", Line: fmt.Sprint(i)})
	}
	for _, test := range []struct {
		o    control.LogOptions
		want string
	}{
		{control.LogOptions{}, "01234"},
		{control.LogOptions{Tail: 2}, "34"},
		{control.LogOptions{Tail: 99}, "01234"},
		{control.LogOptions{Tail: -1}, ""},
		{control.LogOptions{Since: at.Add(3 * time.Second)}, "34"},
		{control.LogOptions{Since: at.Add(3 * time.Second), Tail: 1}, "4"},
		{control.LogOptions{Since: at.Add(time.Hour)}, ""},
	} {
		if got := strings.Join(s.texts(t, "default", "f", test.o), ""); got != test.want {
			t.Errorf("%+v: %s, want %s", test.o, got, test.want)
		}
	}
}

func TestLogsOfAnotherTenantAreNotSeen(t *testing.T) {
	s := newTestLogs(t)
	s.append("one", v1alpha1.LogLine{Function: "f", Line: "secret"})
	if got := s.texts(t, "two", "f", control.LogOptions{}); len(got) != 0 {
		t.Errorf("%q", got)
	}
	// A worker of tenant two that says it is tenant one's function.
	s.collect(strings.NewReader(`{"function":"f","line":"forged"}`+"\nnot json\n"), func(string) (string, bool) { return "", false })
	if got := s.texts(t, "one", "f", control.LogOptions{}); len(got) != 1 {
		t.Errorf("%q", got)
	}
}

func TestLogsSurviveATornRecordAndManyFunctions(t *testing.T) {
	s := newTestLogs(t)
	for i := range maxOpenLogs + 10 {
		s.append("default", v1alpha1.LogLine{Function: fmt.Sprint("f", i), Line: "a"})
	}
	if s.open > maxOpenLogs {
		t.Errorf("%d open files", s.open)
	}
	path := s.path("default", "f0")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"line":"to`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got := s.texts(t, "default", "f0", control.LogOptions{}); len(got) != 1 {
		t.Errorf("%q", got)
	}
}

func FuzzSelectLines(f *testing.F) {
	f.Add([]byte("{}\n{\"time\":\"2026-01-01T00:00:00Z\"}\n"), 1, int64(1))
	f.Fuzz(func(t *testing.T, b []byte, tail int, since int64) {
		if i := bytes.LastIndexByte(b, '\n'); true {
			b = b[:i+1] // as read gives it
		}
		got := selectLines(b, control.LogOptions{Tail: tail % 1000, Since: time.Unix(since, 0)})
		if !bytes.HasSuffix(b, got) {
			t.Errorf("%q is no end of %q", got, b)
		}
	})
}
