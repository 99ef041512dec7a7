package prefetch

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestPeerThatIsMerelyStartingIsNoWarning(t *testing.T) {
	now := time.Unix(1000, 0)
	var log bytes.Buffer
	l := &Loop{now: func() time.Time { return now }, log: slog.New(slog.NewTextHandler(&log, nil))}
	var p peer
	away := errors.New("connection refused")
	for _, step := range []struct {
		what  string
		after time.Duration
		err   error
		back  bool
		logs  string // at Info and above; empty for nothing
	}{
		{"not up yet", 0, away, false, ""},
		{"still not", time.Second, away, false, ""},
		{"there at last", time.Second, nil, true, ""},
		{"and stays", time.Second, nil, false, ""},
		{"lost", time.Second, away, false, "level=WARN"},
		{"still lost", 10 * time.Second, away, false, ""},
		{"back", time.Second, nil, true, "answers again"},
		{"lost again", time.Hour, away, false, "level=WARN"},
	} {
		log.Reset()
		now = now.Add(step.after)
		back := l.setPeer(&p, "engine", step.err)
		if back != step.back || !strings.Contains(log.String(), step.logs) || (step.logs == "") != (log.Len() == 0) {
			t.Errorf("%s: back %v, log %q", step.what, back, log.String())
		}
	}

	log.Reset()
	p = peer{}
	l.setPeer(&p, "engine", away)
	now = now.Add(meetGrace)
	l.setPeer(&p, "engine", away)
	l.setPeer(&p, "engine", away)
	if got := strings.Count(log.String(), "level=WARN"); got != 1 {
		t.Errorf("a peer that never came up is warned of %d times", got)
	}
}
