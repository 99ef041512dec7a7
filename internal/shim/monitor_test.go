package shim_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-sh/hearth/internal/shim"
	"github.com/hearth-sh/hearth/internal/shim/shimtest"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// watched is a monitor on a fake node, in a bubble of synthetic time.
type watched struct {
	*shim.Monitor
	fake *shimtest.Fake

	mu        sync.Mutex // the monitor's goroutine reads what tests change
	inventory shim.Inventory
	err       error
}

func (w *watched) discover(context.Context, shim.Server) (shim.Inventory, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inventory, w.err
}

func (w *watched) set(err error, runtimes ...shim.Runtime) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inventory, w.err = shim.Inventory{Runtimes: runtimes}, err
}

// watch runs the test in a bubble with a running monitor.
func watch(t *testing.T, test func(t *testing.T, w *watched)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &watched{fake: shimtest.NewFake()}
		monitor, err := shim.NewMonitor(shim.MonitorOptions{Node: w.fake, Discover: w.discover, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		w.Monitor = monitor
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		w.set(nil, w.fake.Runtime("good", shimtest.Working))
		go func() { done <- monitor.Run(ctx) }()
		synctest.Wait()
		test(t, w)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run() = %v", err)
		}
	})
}

// state is that of the only runtime.
func (w *watched) state(t *testing.T) shim.State {
	t.Helper()
	snapshot := w.Snapshot()
	if len(snapshot.Runtimes) != 1 {
		t.Fatalf("%d runtimes, want 1", len(snapshot.Runtimes))
	}
	return snapshot.Runtimes[0]
}

// pass lets time go by, and the monitor come to rest.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestMonitorProvesAtStartAndOnSchedule(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		if state := w.state(t); !state.Proven || state.Answer == nil || state.Answer.Code != shim.CodeOK {
			t.Fatalf("not proven at the start: %+v", state)
		}
		if _, ok := w.Snapshot().Proven("good"); !ok {
			t.Error("Proven() does not find the handler")
		}
		pass(time.Hour)
		// Ten minutes, give or take the jitter and the watch interval.
		if runs := w.fake.Runs("good"); runs < 6 || runs > 8 {
			t.Errorf("%d proofs in an hour", runs)
		}
	})
}

func TestMonitorBelievesAFailureAtOnce(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		changed, stop := w.Subscribe()
		defer stop()
		w.fake.Runtime("good", shimtest.Hollow)
		w.Refresh()
		synctest.Wait()
		if state := w.state(t); state.Proven || state.Answer.Code != shim.CodeWrongOutput {
			t.Fatalf("still proven after a failed proof: %+v", state)
		}
		select {
		case <-changed:
		default:
			t.Error("nobody was told")
		}
		before := w.fake.Runs("good")
		pass(5 * time.Minute)
		if retries := w.fake.Runs("good") - before; retries < 3 || retries > 5 {
			t.Errorf("%d retries in five minutes, want a few at growing distances", retries)
		}
		w.fake.Runtime("good", shimtest.Working)
		pass(shim.DefaultInterval)
		if !w.state(t).Proven {
			t.Error("not proven again after it was repaired")
		}
	})
}

func TestMonitorKeepsAProofWithoutAnAnswerUntilItIsStale(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		proven := w.state(t).Answer.At
		w.fake.Stop()
		pass(time.Minute)
		snapshot := w.Snapshot()
		if !snapshot.Runtimes[0].Proven || snapshot.Unreachable == "" {
			t.Fatalf("a missing answer was taken for a failure: %+v", snapshot)
		}
		changed, stop := w.Subscribe()
		defer stop()
		pass(time.Until(proven.Add(shim.DefaultStaleAfter)))
		if state := w.state(t); !state.Proven {
			t.Fatalf("stale too early: %+v", state)
		}
		pass(shim.DefaultWatchInterval)
		if state := w.state(t); state.Proven || !state.Stale {
			t.Fatalf("never stale: %+v", state)
		}
		select {
		case <-changed:
		default:
			t.Error("nobody was told")
		}
		w.fake.Start()
		pass(shim.DefaultWatchInterval)
		if state := w.state(t); !state.Proven || state.Stale || w.Snapshot().Unreachable != "" {
			t.Errorf("not proven after containerd came back: %+v", state)
		}
	})
}

func TestMonitorProvesAgainAfterARestart(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		before := w.fake.Runs("good")
		w.fake.Stop()
		w.fake.Start()
		pass(shim.DefaultWatchInterval)
		if runs := w.fake.Runs("good"); runs != before+1 {
			t.Errorf("%d proofs after a restart, want one", runs-before)
		}
	})
}

func TestMonitorProvesAChangedShim(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		before := w.fake.Runs("good")
		upgraded := w.fake.Runtime("good", shimtest.Working)
		upgraded.Digest, upgraded.Version = "other", "2.0.0"
		w.set(nil, upgraded)
		pass(shim.DefaultWatchInterval)
		state := w.state(t)
		if w.fake.Runs("good") != before+1 || !state.Proven || state.Answer.Identity != upgraded.Identity() {
			t.Errorf("the upgrade was not proven: %+v", state)
		}
	})
}

func TestMonitorForgetsWhatIsGoneOnly(t *testing.T) {
	watch(t, func(t *testing.T, w *watched) {
		w.set(errors.New("CRI does not answer"))
		pass(shim.DefaultWatchInterval)
		if snapshot := w.Snapshot(); len(snapshot.Runtimes) != 1 || !snapshot.Runtimes[0].Proven || len(snapshot.Problems) != 1 {
			t.Fatalf("half an inventory was taken for all: %+v", snapshot)
		}
		w.set(nil)
		pass(shim.DefaultWatchInterval)
		if snapshot := w.Snapshot(); len(snapshot.Runtimes) != 0 || len(snapshot.Problems) != 0 {
			t.Errorf("a runtime that is gone is still there: %+v", snapshot)
		}
	})
}

func TestMonitorRemovesLeftovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := shimtest.NewFake()
		fake.Abandon()
		monitor, err := shim.NewMonitor(shim.MonitorOptions{
			Node: fake, Logger: quiet,
			Discover: func(context.Context, shim.Server) (shim.Inventory, error) { return shim.Inventory{}, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go monitor.Run(ctx)
		synctest.Wait()
		if left := fake.Left(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		cancel()
		synctest.Wait()
	})
}

func TestMonitorOptions(t *testing.T) {
	discover := func(context.Context, shim.Server) (shim.Inventory, error) { return shim.Inventory{}, nil }
	for behaviour, options := range map[string]shim.MonitorOptions{
		"no node":                        {Discover: discover},
		"no way to discover":             {Node: shimtest.NewFake()},
		"proofs that are always stale":   {Node: shimtest.NewFake(), Discover: discover, Interval: time.Hour},
		"an interval that never elapses": {Node: shimtest.NewFake(), Discover: discover, WatchInterval: -1},
	} {
		if _, err := shim.NewMonitor(options); err == nil {
			t.Errorf("%s is accepted", behaviour)
		}
	}
}

func TestMonitorSaysWhetherRuntimesWereLookedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &watched{fake: shimtest.NewFake()}
		monitor, err := shim.NewMonitor(shim.MonitorOptions{Node: w.fake, Discover: w.discover, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		changed, stop := monitor.Subscribe()
		defer stop()
		told := func() bool {
			select {
			case <-changed:
				return true
			default:
				return false
			}
		}
		if monitor.Snapshot().Looked {
			t.Error("it looked before it ran")
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		w.set(errors.New("no inventory"))
		go func() { done <- monitor.Run(ctx) }()
		pass(time.Second)
		if s := monitor.Snapshot(); s.Looked || len(s.Problems) != 1 || !told() {
			t.Errorf("an inventory that failed passes for one, or nobody hears of it: %+v", s)
		}
		w.set(nil) // there is none
		pass(time.Minute)
		if s := monitor.Snapshot(); !s.Looked || len(s.Runtimes) != 0 || !told() {
			t.Errorf("nobody hears that there is no runtime: %+v", s)
		}
		pass(time.Minute)
		if told() {
			t.Error("subscribers are told although nothing changed")
		}
		cancel()
		<-done
	})
}
