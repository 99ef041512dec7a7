package bootstrap

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/imds"
	units "github.com/hearth-sh/hearth/systemd"
)

// TestWhenAFailureIsSignalled ends runs of one machine, one after the other.
func TestWhenAFailureIsSignalled(t *testing.T) {
	passing := fault.Passing("unit-start-timeout", nil, "", "k3s does not come up")
	final := fault.New("restore-failed", nil, "", "no such snapshot")
	type run struct {
		err   error
		phase PhaseName
		took  time.Duration
		// told says whether an ABANDON is sent, exit is the process's code.
		told bool
		exit int
	}
	for _, tt := range []struct {
		name string
		runs []run
	}{
		{"what may pass is tried again until it took too long", []run{
			{passing, PhaseStart, 10 * time.Minute, false, ExitStart}, {passing, PhaseStart, 10 * time.Minute, false, ExitStart}, {passing, PhaseReady, 10 * time.Minute, true, ExitGaveUp},
			{passing, PhaseStart, time.Second, true, ExitGaveUp}}},
		{"pauses count as well", []run{{passing, PhaseStart, 29*time.Minute + 46*time.Second, true, ExitGaveUp}}},
		{"who waits for others is told, and waits on", []run{{passing, PhaseElect, 20 * time.Minute, false, ExitCluster}, {passing, PhaseElect, 20 * time.Minute, true, ExitCluster}}},
		{"what stays is told at once", []run{{final, PhaseInstall, time.Second, true, ExitCluster}}},
		{"a machine that cannot be a node says so", []run{{passing, PhasePrepare, time.Hour, true, ExitHost}}},
		{"one that was a node never gives up", []run{{nil, "", time.Minute, false, ExitOK}, {passing, PhaseStart, time.Hour, false, ExitStart}, {passing, PhaseStart, time.Hour, false, ExitStart}}},
		{"a run that was told to end counts for nothing", []run{{context.Canceled, PhaseStart, time.Hour, false, ExitInterrupted}, {passing, PhaseStart, time.Minute, false, ExitStart}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for i, r := range tt.runs {
				q := &queryAPI{}
				m := &machine{
					o: Options{StateDir: dir}, log: slog.New(slog.DiscardHandler), aws: q.config(t),
					rec:      &recorder{begin: time.Now().Add(-r.took), log: slog.New(slog.DiscardHandler)},
					snapshot: Snapshot{Identity: imds.Identity{InstanceID: "i-1"}},
				}
				m.spec.Timeouts.Total = "30m"
				m.spec.Signal = v1alpha1.SignalConfig{LifecycleHook: "hook", AutoScalingGroup: "group"}
				m.rec.result.Phase = r.phase
				ctx, cancel := context.WithCancel(t.Context())
				err := r.err
				if errors.Is(err, context.Canceled) {
					cancel()
					err = classify(ctx, r.phase, time.Minute, err)
				}
				m.conclude(ctx, err)
				cancel()
				result := m.rec.finish(err)
				if told := len(q.asked) > 0; told != r.told || told && q.asked[0].Get("LifecycleActionResult") != "ABANDON" {
					t.Errorf("run %d: told %v", i+1, q.asked)
				}
				if result.ExitCode != r.exit || result.GaveUp && r.exit != ExitGaveUp && r.exit != ExitHost {
					t.Errorf("run %d: ended with %d, gave up %t; want %d", i+1, result.ExitCode, result.GaveUp, r.exit)
				}
			}
		})
	}
}

// TestNobodyIsToldWithoutMetadata: nobody knows which instance it is.
func TestNobodyIsToldWithoutMetadata(t *testing.T) {
	q := &queryAPI{}
	m := &machine{o: Options{StateDir: t.TempDir()}, log: slog.New(slog.DiscardHandler), aws: q.config(t), rec: &recorder{begin: time.Now()}}
	m.spec.Signal.LifecycleHook = "hook"
	m.conclude(t.Context(), fault.New(CodeMetadataDisabled, nil, "", "it is off"))
	if diff := cmp.Diff([]url.Values(nil), q.asked); diff != "" {
		t.Error(diff)
	}
}

func TestACountThatCannotBeReadBeginsAnew(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, attemptsFile), []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := count(dir, time.Minute, false)
	if want := (attempts{Runs: 1, SpentMS: (time.Minute + restartPause).Milliseconds()}); err != nil || a != want {
		t.Errorf("got %+v, %v", a, err)
	}
}

// TestTheUnitDoesAsExitCodesSay: it does not start again what gave up, and pauses
// for as long as is counted.
func TestTheUnitDoesAsExitCodesSay(t *testing.T) {
	unit := string(units.Bootstrap)
	for _, want := range []string{"RestartPreventExitStatus=2 3 5 11\n", "RestartSec=15\n"} {
		if !strings.Contains(unit, want) {
			t.Errorf("the unit lacks %q", want)
		}
	}
	if restartPause != 15*time.Second || ExitUsage != 2 || ExitConfig != 3 || ExitHost != 5 || ExitGaveUp != 11 {
		t.Error("the unit and this package do not say the same")
	}
}
