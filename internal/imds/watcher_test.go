package imds_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

// script is a NoticeReader that says what it was told.
type script struct {
	mu      sync.Mutex
	notices imds.Notices
	errs    map[imds.Source]error
	hang    imds.Source
	polls   []time.Time
}

func (s *script) set(f func(*script)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *script) ReadNotice(ctx context.Context, src imds.Source) (imds.Notices, error) {
	s.mu.Lock()
	notices, err, hang := s.notices, s.errs[src], s.hang == src
	if src == imds.SourceSpot {
		s.polls = append(s.polls, time.Now())
	}
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return imds.Notices{}, ctx.Err()
	}
	if err != nil {
		return imds.Notices{}, err
	}
	var part imds.Notices
	switch src {
	case imds.SourceSpot:
		part.Spot = notices.Spot
	case imds.SourceRebalance:
		part.Rebalance = notices.Rebalance
	case imds.SourceMaintenance:
		part.Maintenance = notices.Maintenance
	case imds.SourceTargetState:
		part.TargetState = notices.TargetState
	}
	return part, nil
}

// watch runs a watcher in a bubble of its own time and gives the test what it
// says. step lets one and a half intervals pass.
func watch(t *testing.T, f func(t *testing.T, s *script, w *imds.Watcher, step func() []string)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &script{errs: map[imds.Source]error{}}
		w, err := imds.NewWatcher(s, imds.WatcherOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var said []string
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- w.Run(ctx, func(c imds.Change) {
				mu.Lock()
				defer mu.Unlock()
				said = append(said, strings.TrimSpace(fmt.Sprintf("%s %s %s", c.Source, c.Kind, c.EventID)))
			})
		}()
		f(t, s, w, func() []string {
			time.Sleep(imds.DefaultInterval * 3 / 2)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			out := said
			said = nil
			slices.Sort(out) // sources answer in any order
			return out
		})
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func TestWatcherSaysWhatChanges(t *testing.T) {
	watch(t, func(t *testing.T, s *script, w *imds.Watcher, step func() []string) {
		expect(t, "at first", step())
		if st := w.State(); !st.Polled || st.Degraded || st.LastSuccess.IsZero() {
			t.Errorf("%+v", st)
		}
		at := time.Now()
		s.set(func(s *script) { s.notices.Spot = &imds.SpotAction{Action: "terminate", Time: at} })
		expect(t, "a notice", step(), "spot appeared")
		expect(t, "the same notice", step())
		s.set(func(s *script) {
			s.notices.Spot = &imds.SpotAction{Action: "terminate", Time: at.Add(time.Minute)}
			s.notices.Rebalance = &imds.Rebalance{NoticeTime: at}
			s.notices.TargetState = imds.LifecycleInService
		})
		expect(t, "three at once", step(), "rebalance appeared", "spot changed", "target-state appeared")
		s.set(func(s *script) { s.notices = imds.Notices{TargetState: imds.LifecycleTerminated} })
		expect(t, "taken back", step(), "rebalance withdrawn", "spot withdrawn", "target-state changed")
		s.set(func(s *script) {
			s.notices.Maintenance = []imds.MaintenanceEvent{{ID: "a", State: "active"}, {ID: "b", State: "active"}}
		})
		expect(t, "two events", step(), "maintenance appeared a", "maintenance appeared b")
		s.set(func(s *script) {
			s.notices.Maintenance = []imds.MaintenanceEvent{{ID: "b", State: "completed"}, {ID: "c", State: "active"}}
		})
		expect(t, "other events", step(), "maintenance appeared c", "maintenance changed b", "maintenance withdrawn a")
	})
}

func TestWatcherDoesNotTakeAnErrorForAWithdrawal(t *testing.T) {
	watch(t, func(t *testing.T, s *script, w *imds.Watcher, step func() []string) {
		s.set(func(s *script) { s.notices.Spot = &imds.SpotAction{Action: "stop", Time: time.Now()} })
		expect(t, "a notice", step(), "spot appeared")
		s.set(func(s *script) {
			for _, src := range imds.Sources() {
				s.errs[src] = &imds.Error{Kind: imds.ErrUnavailable}
			}
		})
		failing := time.Now()
		expect(t, "failing", step())
		for range 20 { // any number of failures is survived
			expect(t, "still failing", step())
		}
		st := w.State()
		if !st.Degraded || st.Notices.Spot == nil || st.Since.Before(failing) || st.Since.After(failing.Add(2*imds.DefaultInterval)) || st.Failures[imds.SourceSpot] < 20 || !strings.Contains(st.Reason, "3 more") {
			t.Errorf("%+v", st)
		}
		s.set(func(s *script) { clear(s.errs) })
		expect(t, "well again, same notice", step())
		if st := w.State(); st.Degraded || len(st.Failures) != 0 || st.Reason != "" || !st.Since.IsZero() {
			t.Errorf("counters were not reset: %+v", st)
		}
		s.set(func(s *script) { s.notices = imds.Notices{} })
		expect(t, "taken back", step(), "spot withdrawn")
	})
}

func TestWatcherIsNotStoppedByOneSourceThatHangs(t *testing.T) {
	watch(t, func(t *testing.T, s *script, w *imds.Watcher, step func() []string) {
		s.set(func(s *script) { s.hang = imds.SourceMaintenance })
		step()
		if st := w.State(); !st.Degraded || st.Polled || st.Reason != "instance metadata did not answer in time" {
			t.Errorf("%+v", st)
		}
		s.set(func(s *script) { s.notices.Spot = &imds.SpotAction{Action: "terminate", Time: time.Now()} })
		expect(t, "an interruption while maintenance hangs", step(), "spot appeared")
	})
}

func TestWatcherPollsAtOnceAndThenWithJitter(t *testing.T) {
	watch(t, func(t *testing.T, s *script, _ *imds.Watcher, step func() []string) {
		began := time.Now()
		for range 40 {
			step()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.polls[0].Equal(began) {
			t.Errorf("the first poll came after %v", s.polls[0].Sub(began))
		}
		distinct := map[time.Duration]bool{}
		for i := 1; i < len(s.polls); i++ {
			d := s.polls[i].Sub(s.polls[i-1])
			if d < imds.DefaultInterval*9/10 || d > imds.DefaultInterval*11/10 {
				t.Errorf("an interval of %v", d)
			}
			distinct[d] = true
		}
		if len(distinct) < 10 {
			t.Errorf("only %d different intervals", len(distinct))
		}
	})
}

func TestWatcherOverTheServiceWithMetrics(t *testing.T) {
	s := imdstest.New(imdstest.Default())
	c := newClient(t, imds.Options{AttemptTimeout: 10 * time.Second, Attempts: 1}, s.Start(t, "tcp4"))
	c2, err := imds.New(imds.Options{Endpoint: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	reg := prometheus.NewPedanticRegistry()
	w, err := imds.NewWatcher(c, imds.WatcherOptions{Interval: 250 * time.Millisecond, Metrics: reg})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := imds.NewWatcher(c2, imds.WatcherOptions{Metrics: reg}); err == nil {
		t.Error("metrics were registered twice")
	}
	found := make(chan imds.Change, 16)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, func(c imds.Change) { found <- c }) }()
	wait := func(kind imds.ChangeKind, src imds.Source) imds.Change {
		t.Helper()
		select {
		case c := <-found:
			if c.Kind != kind || c.Source != src {
				t.Errorf("%s %s, want %s %s", c.Source, c.Kind, src, kind)
			}
			return c
		case <-time.After(time.Minute):
			t.Fatalf("never %s: %s; %+v", kind, src, w.State())
		}
		panic("unreachable")
	}
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	s.SetSpotAction("terminate", at)
	if c := wait(imds.Appeared, imds.SourceSpot); c.Notices.Spot == nil || !c.Notices.Spot.Time.Equal(at) {
		t.Errorf("%+v", c.Notices)
	}
	s.SetRebalance(at)
	wait(imds.Appeared, imds.SourceRebalance)
	remove := s.Fault(imdstest.Fault{Path: "meta-data/spot/*", Status: 503})
	for !w.State().Degraded {
		time.Sleep(time.Millisecond)
	}
	s.SetSpotAction("", time.Time{})
	s.SetRebalance(time.Time{})
	wait(imds.Withdrawn, imds.SourceRebalance) // the spot notice cannot be read
	remove()
	wait(imds.Withdrawn, imds.SourceSpot)
	s.SetTargetState("Terminated")
	wait(imds.Appeared, imds.SourceTargetState)
	// The interval is also a poll's deadline, which a busy machine may miss.
	got := gather(t, reg)
	for end := time.Now().Add(time.Minute); got["hearth_imds_degraded{}"] != 0 && time.Now().Before(end); got = gather(t, reg) {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	<-done
	for name, want := range map[string]float64{
		`hearth_imds_notices{maintenance}`: 0, `hearth_imds_notices{rebalance}`: 0, `hearth_imds_notices{spot}`: 0, `hearth_imds_notices{target-state}`: 1,
		`hearth_imds_degraded{}`: 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
	if got[`hearth_imds_poll_errors_total{unavailable,spot}`] < 1 || got[`hearth_imds_last_success_timestamp_seconds{}`] < 1e9 {
		t.Errorf("%v", got)
	}
}

// gather returns every sample by its name and label values.
func gather(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			got[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return got
}
