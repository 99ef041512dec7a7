package wallclock

import (
	"testing"
	"time"
)

func TestAJumpChangesTheWallClockAndNotTheTimeThatPassed(t *testing.T) {
	began := time.Now()
	for _, by := range []time.Duration{time.Hour, -time.Hour, 0} {
		now := Jumped(began.Add(time.Minute), by)
		if passed := now.Sub(began); passed != time.Minute {
			t.Errorf("%s: %s passed, want a minute", by, passed)
		}
		if moved := now.Round(0).Sub(began.Round(0)); moved != time.Minute+by {
			t.Errorf("%s: the wall clock moved by %s", by, moved)
		}
	}
}
