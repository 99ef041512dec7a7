package systemd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// DefaultMaxRestarts is how many restarts are taken for a start that is
	// difficult (a server that is not there yet) and not for a loop.
	DefaultMaxRestarts = 5
	// DefaultPoll is between two looks. A look costs systemd a fraction of a
	// millisecond; signals would miss what happens between subscribing and asking.
	DefaultPoll = 200 * time.Millisecond
	// journalInterval is between two looks at the journal for Progress, which
	// cost a process each.
	journalInterval = 5 * time.Second
	// failureLines is how many lines of the journal a failure quotes.
	failureLines = 8
)

// WaitOptions say how long to wait, and what not to wait for.
type WaitOptions struct {
	// Timeout bounds the wait. Required.
	Timeout time.Duration
	// MaxRestarts is how many restarts within the wait are tolerated; one more
	// is a failure. Default: DefaultMaxRestarts; negative: none.
	MaxRestarts int
	// Poll is between two looks. Default: DefaultPoll.
	Poll time.Duration
	// Progress, if not nil, is called from the waiting goroutine whenever the
	// state changed, and with new lines of the journal every few seconds.
	Progress func(Progress)
}

// Progress is what is seen while waiting.
type Progress struct {
	Unit    Unit
	Elapsed time.Duration
	// Journal are the unit's last lines; nil when only the state changed.
	Journal []string
}

// Queue has systemd start a unit and does not wait for anything of it.
func (m *Manager) Queue(ctx context.Context, name string) error {
	return m.call(ctx, "start "+name, func(ctx context.Context) error {
		_, err := m.bus.StartUnitContext(ctx, name, "replace", nil)
		return err
	})
}

// Start starts a unit and waits until it is active. One that is active already
// stays as it is.
func (m *Manager) Start(ctx context.Context, name string, o WaitOptions) (Unit, error) {
	return m.run(ctx, name, o, "starting", m.bus.StartUnitContext)
}

// Restart stops a unit, if it runs, starts it and waits until it is active again.
func (m *Manager) Restart(ctx context.Context, name string, o WaitOptions) (Unit, error) {
	return m.run(ctx, name, o, "restarting", m.bus.RestartUnitContext)
}

type enqueue func(ctx context.Context, name, mode string, ch chan<- string) (int, error)

func (m *Manager) run(ctx context.Context, name string, o WaitOptions, doing string, f enqueue) (Unit, error) {
	before, err := m.Unit(ctx, name)
	if err != nil {
		return before, err
	}
	if err := unusable(before); err != nil {
		return before, err
	}
	if before.ActiveState == "failed" {
		// Else a start limit that was hit earlier refuses the new attempt.
		if err := m.ResetFailed(ctx, name); err != nil {
			return before, err
		}
	}
	// No channel: the job is in the queue when this returns, and what becomes
	// of it is seen in the unit's state.
	err = m.call(ctx, doing+" "+name, func(ctx context.Context) error {
		_, err := f(ctx, name, jobMode, nil)
		return err
	})
	if err != nil {
		return before, err
	}
	return m.Wait(ctx, name, o)
}

// Wait waits until a unit that was started, by whomever, is active. Every other
// end is a classified failure that quotes the unit's last words; the unit itself
// is left alone.
func (m *Manager) Wait(ctx context.Context, name string, o WaitOptions) (Unit, error) {
	if o.MaxRestarts == 0 {
		o.MaxRestarts = DefaultMaxRestarts
	}
	if o.Poll <= 0 {
		o.Poll = DefaultPoll
	}
	if o.Timeout <= 0 {
		return Unit{Name: name}, fmt.Errorf("waiting for %s needs a deadline", name)
	}
	began := time.Now()
	bounded, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	var last Unit
	var base uint32
	var quoted time.Time
	for first := true; ; first = false {
		u, err := m.Unit(bounded, name)
		if err != nil {
			if errors.Is(ctx.Err(), context.Canceled) || bounded.Err() == nil {
				return last, err // cancelled, or systemd does not answer
			}
			return last, m.timeout(ctx, last, time.Since(began))
		}
		if first || u.Restarts < base {
			base = u.Restarts
		}
		if o.Progress != nil {
			changed := first || u.ActiveState != last.ActiveState || u.SubState != last.SubState || u.Restarts != last.Restarts || u.StatusText != last.StatusText
			if quote := !first && time.Since(quoted) >= journalInterval; changed || quote {
				p := Progress{Unit: u, Elapsed: time.Since(began)}
				if quote {
					p.Journal, quoted = m.lines(bounded, name, failureLines), time.Now()
				}
				o.Progress(p)
			}
			if first {
				quoted = began
			}
		}
		last = u
		if u.Active() && !u.Job {
			return u, nil
		}
		if err := m.ended(ctx, u, int64(u.Restarts)-int64(base), o.MaxRestarts); err != nil {
			return u, err
		}
		select {
		case <-bounded.Done():
			// A deadline of the caller's is as good as ours: what was waited
			// for is worth more to it than that its time is up.
			if errors.Is(ctx.Err(), context.Canceled) {
				return u, fmt.Errorf("waiting for %s: %w", name, ctx.Err())
			}
			return u, m.timeout(ctx, u, time.Since(began))
		case <-m.after(o.Poll):
		}
	}
}

// unusable is the failure of a unit that cannot be started at all.
func unusable(u Unit) error {
	switch u.LoadState {
	case "loaded", "": // "" is a version of systemd we do not know; starting tells
		return nil
	case "not-found":
		return fault.New(CodeUnitMissing, nil, "see whether its file is in /etc/systemd/system, and run bootstrap again", "there is no unit %s", u.Name)
	case "masked":
		return fault.New(CodeUnitInvalid, nil, "systemctl unmask "+u.Name, "the unit %s is masked", u.Name)
	}
	return fault.New(CodeUnitInvalid, nil, "systemd-analyze verify "+u.Name+" says what is wrong with it", "systemd cannot load the unit %s (%s)", u.Name, u.LoadState)
}

// ended is the failure of a unit that will not become active any more.
func (m *Manager) ended(ctx context.Context, u Unit, restarts int64, most int) error {
	if err := unusable(u); err != nil {
		return err
	}
	remedy := "journalctl -u " + u.Name + " has all it said"
	switch {
	case u.ActiveState == "failed" && !u.Job:
		return fault.New(CodeUnitFailed, nil, remedy, "%s failed (%s), its process %s%s", u.Name, u.Result, u.exited(), m.quote(ctx, u.Name))
	case restarts > int64(max(most, 0)):
		return fault.New(CodeUnitLoops, nil, remedy, "%s was restarted %d times and does not stay, its last process %s%s", u.Name, restarts, u.exited(), m.quote(ctx, u.Name))
	case u.ActiveState == "inactive" && !u.Job:
		return fault.New(CodeUnitEnded, nil, remedy, "%s is not running, its process %s%s", u.Name, u.exited(), m.quote(ctx, u.Name))
	}
	return nil
}

func (m *Manager) timeout(ctx context.Context, u Unit, after time.Duration) error {
	// The unit goes on trying, so the same run may succeed later.
	return fault.Passing(CodeUnitTimeout, nil, "journalctl -u "+u.Name+" has all it said; it goes on trying", "%s after %v%s", u, after.Round(time.Second), m.quote(ctx, u.Name))
}

// quote is the unit's last lines, to be put at the end of a message.
func (m *Manager) quote(ctx context.Context, unit string) string {
	lines := m.lines(ctx, unit, failureLines)
	if len(lines) == 0 {
		return ""
	}
	return "; its last lines:\n  " + strings.Join(lines, "\n  ") + "\n"
}

// Stop stops a unit and waits until it is. One that does not run or exist is
// stopped already.
func (m *Manager) Stop(ctx context.Context, name string, timeout time.Duration) error {
	u, err := m.Unit(ctx, name)
	if err != nil {
		return err
	}
	if u.LoadState == "not-found" && u.ActiveState == "inactive" {
		return nil
	}
	err = m.call(ctx, "stopping "+name, func(ctx context.Context) error {
		_, err := m.bus.StopUnitContext(ctx, name, jobMode, nil)
		return err
	})
	if fault.CodeOf(err) == CodeUnitMissing {
		return nil
	}
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		u, err = m.Unit(ctx, name)
		if err != nil {
			return err
		}
		if (u.ActiveState == "inactive" || u.ActiveState == "failed") && !u.Job {
			return nil
		}
		select {
		case <-bounded.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("stopping %s: %w", name, ctx.Err())
			}
			return fault.New(CodeStopTimeout, nil, "systemctl kill -s KILL "+name+" ends it the hard way", "%s after %v", u, timeout)
		case <-m.after(DefaultPoll):
		}
	}
}
