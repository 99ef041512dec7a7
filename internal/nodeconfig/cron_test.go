package nodeconfig

import (
	"strings"
	"testing"
	"time"

	"github.com/robfig/cron/v3"
)

// schedules are what people write, right and wrong.
var schedules = []string{
	"* * * * *", "0 */6 * * *", "*/15 0-6,12 1 jan-MAR mon", "5/10 * * * *", "0 0 1-31/2 * ?", "@daily", "@every 90m", "@every 1m", "0 0 29 2 *", "0 0 31 1,2 *",
	"0 0 31 2 *", "0 0 30 2 *", "0 0 31 apr,jun *", "0 0 31 2 mon", "0 0 31 2 */2", "0 0 31 2 0-6",
	"", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7", "*/0 * * * *", "*/61 * * * *", "5-1 * * * *", "a * * * *",
	"1-2-3 * * * *", "1/2/3 * * * *", "+1 * * * *", "-1 * * * *", ", * * * *", "1,,2 * * * *", "@often", "@every 1x", "@every 1s", "@reboot", "TZ=UTC * * * * *", "TZ=UTC", "*-5 * * * *", "* * * * sunday",
	"0 0 */31 2 *", "1-59/59 23 31 12 6",
}

// TestSchedulesThatAreAcceptedAreK3sTo compares with the parser that k3s uses:
// of a schedule that it cannot read, k3s says nothing and takes no snapshots.
func TestSchedulesThatAreAcceptedAreK3sTo(t *testing.T) {
	for _, s := range schedules {
		agree(t, s)
	}
	for _, never := range []string{"0 0 31 2 *", "0 0 30 2 *", "0 0 31 apr,jun *"} {
		if err := checkCron(never); err == nil || !strings.Contains(err.Error(), "never") {
			t.Errorf("%s: %v", never, err)
		}
	}
	for _, good := range schedules[:10] {
		if err := checkCron(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
}

func agree(t *testing.T, s string) {
	t.Helper()
	if checkCron(s) != nil {
		return // stricter is good
	}
	plan, err := cron.ParseStandard(s)
	if err != nil {
		t.Fatalf("%q is accepted, and no schedule of k3s's: %v", s, err)
	}
	if plan.Next(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		t.Fatalf("%q is accepted, and never comes", s)
	}
}

func FuzzSchedule(f *testing.F) {
	for _, s := range schedules {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkCron(s) == nil && len(s) > 256 {
			t.Errorf("%q is allowed", s)
		}
		agree(t, s)
	})
}
