package imds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// DefaultInterval is what EC2's documentation recommends for polling
	// notices of an interruption.
	DefaultInterval = 5 * time.Second
	// intervalJitter spreads polls by this part of the interval either way, so
	// that a fleet started at once does not poll at once.
	intervalJitter = 0.1
)

// ChangeKind says what happened to a notice.
type ChangeKind string

// The kinds.
const (
	Appeared  ChangeKind = "appeared"
	Changed   ChangeKind = "changed"
	Withdrawn ChangeKind = "withdrawn"
)

// Change is one thing that EC2 announced, announced differently, or took back.
// Only an answer makes a change: not reading a notice is not its withdrawal.
type Change struct {
	Kind   ChangeKind
	Source Source
	// EventID is the scheduled event's, of SourceMaintenance only.
	EventID string
	// Notices is all that is known after the poll that found the change.
	Notices Notices
}

// State is what the watcher knows.
type State struct {
	Notices Notices
	// Polled says whether every source was read at least once. Before that,
	// the lack of a notice means nothing.
	Polled bool
	// Degraded says that the last poll of some source failed, so that notices
	// of it would be missed. Reason is one sentence, Since is when it began.
	Degraded bool
	Reason   string
	Since    time.Time
	// Failures counts each source's failed polls since its last good one; it
	// has no entry for a source that is well.
	Failures map[Source]int
	// LastSuccess is when a poll last read every source; zero before.
	LastSuccess time.Time
}

// NoticeReader reads one source of notices; *Client is one.
type NoticeReader interface {
	// ReadNotice returns notices with only the source's part, the zero value
	// for nothing announced.
	ReadNotice(ctx context.Context, s Source) (Notices, error)
}

// WatcherOptions configure a Watcher; the zero value is right on an instance.
type WatcherOptions struct {
	// Interval between the beginnings of two polls, and the deadline of each;
	// 0 means DefaultInterval.
	Interval time.Duration
	// Logger gets one event when the watcher becomes degraded and when it is
	// well again; nil discards.
	Logger *slog.Logger
	// Metrics is where the watcher registers its metrics; nil registers none.
	Metrics prometheus.Registerer
}

// Watcher polls the notices and says what changes. Run owns the polling; the
// other methods are safe for concurrent use.
type Watcher struct {
	reader   NoticeReader
	interval time.Duration
	log      *slog.Logger
	metrics  *metrics

	mu    sync.Mutex
	state State
	read  map[Source]bool // sources that answered at least once
}

// NewWatcher returns a watcher that has not polled yet. It fails only when its
// metrics cannot be registered.
func NewWatcher(r NoticeReader, o WatcherOptions) (*Watcher, error) {
	if o.Interval <= 0 {
		o.Interval = DefaultInterval
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Watcher{reader: r, interval: o.Interval, log: o.Logger, read: map[Source]bool{}}
	var err error
	if w.metrics, err = newMetrics(w, o.Metrics); err != nil {
		return nil, fmt.Errorf("registering the metrics of instance metadata: %w", err)
	}
	return w, nil
}

// State returns a snapshot.
func (w *Watcher) State() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.state
	s.Failures = make(map[Source]int, len(w.state.Failures))
	for k, v := range w.state.Failures {
		s.Failures[k] = v
	}
	return s
}

// Run polls until the context ends, and returns its error; failures of the
// service never end it. It polls at once, then every interval. It calls handle
// for each change as soon as it is read, from this goroutine; handle must return
// quickly, since the other changes wait for it. Run once per watcher.
func (w *Watcher) Run(ctx context.Context, handle func(Change)) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		spread := 1 + intervalJitter*(2*rand.Float64()-1)
		timer.Reset(time.Duration(float64(w.interval) * spread))
		w.poll(ctx, handle)
	}
}

// poll reads every source once and hands on what changed.
func (w *Watcher) poll(ctx context.Context, handle func(Change)) {
	polling, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	type answer struct {
		source Source
		part   Notices
		err    error
	}
	sources := Sources()
	answers := make(chan answer, len(sources))
	for _, s := range sources {
		go func() { // ends with polling, and is waited for below
			part, err := w.reader.ReadNotice(polling, s)
			answers <- answer{s, part, err}
		}()
	}
	errs := map[Source]error{}
	for range sources {
		a := <-answers
		switch {
		case ctx.Err() != nil: // stopping says nothing about the service
		case a.err != nil:
			errs[a.source] = a.err
		default:
			// At once: a source that hangs must not hold back the others'.
			for _, c := range w.take(a.source, a.part) {
				handle(c)
			}
		}
	}
	if ctx.Err() == nil {
		w.settle(sources, errs)
	}
}

// take enters one source's answer into the state and returns what it changed.
func (w *Watcher) take(s Source, part Notices) []Change {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.state.Notices
	w.read[s] = true
	w.state.Notices = before.with(s, part)
	return changes(before, w.state.Notices)
}

// settle ends a poll: it concludes from the errors how the watcher is.
func (w *Watcher) settle(sources []Source, errs map[Source]error) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	failures := map[Source]int{}
	for s, err := range errs {
		failures[s] = w.state.Failures[s] + 1
		w.metrics.errors.WithLabelValues(string(s), kindName(err)).Inc()
	}
	w.state.Failures = failures
	w.state.Polled = len(w.read) == len(sources)
	was := w.state.Degraded
	if w.state.Degraded = len(failures) > 0; w.state.Degraded {
		w.state.Reason = reason(sources, errs)
		if !was {
			w.state.Since = now
			w.log.Warn("notices of the instance's end cannot be read", "reason", w.state.Reason)
		}
		return
	}
	w.state.Reason, w.state.Since, w.state.LastSuccess = "", time.Time{}, now
	if was {
		w.log.Info("notices of the instance's end can be read again")
	}
}

// reason is the most urgent source's error, and how many others there are.
func reason(sources []Source, errs map[Source]error) string {
	var first error
	for _, s := range sources {
		if err := errs[s]; err != nil {
			first = err
			break
		}
	}
	text := first.Error()
	var e *Error
	if !errors.As(first, &e) && errors.Is(first, context.DeadlineExceeded) {
		text = "instance metadata did not answer in time"
	}
	if n := len(errs) - 1; n > 0 {
		text += fmt.Sprintf(" (and %d more sources of notices fail)", n)
	}
	return text
}

// changes compares two sets of notices.
func changes(before, after Notices) []Change {
	var list []Change
	add := func(s Source, had, has, same bool, id string) {
		kind := Changed
		switch {
		case had == has && (!had || same):
			return
		case !had:
			kind = Appeared
		case !has:
			kind = Withdrawn
		}
		list = append(list, Change{Kind: kind, Source: s, EventID: id, Notices: after})
	}
	for _, s := range Sources() {
		switch s {
		case SourceSpot:
			a, b := before.Spot, after.Spot
			add(s, a != nil, b != nil, a != nil && b != nil && a.Action == b.Action && a.Time.Equal(b.Time), "")
		case SourceRebalance:
			a, b := before.Rebalance, after.Rebalance
			add(s, a != nil, b != nil, a != nil && b != nil && a.NoticeTime.Equal(b.NoticeTime), "")
		case SourceTargetState:
			a, b := before.TargetState, after.TargetState
			add(s, a != "", b != "", a == b, "")
		case SourceMaintenance:
			for _, e := range before.Maintenance {
				if !hasEvent(after.Maintenance, e.ID) {
					add(s, true, false, false, e.ID)
				}
			}
			for _, e := range after.Maintenance {
				i := slices.IndexFunc(before.Maintenance, func(o MaintenanceEvent) bool { return o.ID == e.ID })
				add(s, i >= 0, true, i >= 0 && before.Maintenance[i] == e, e.ID)
			}
		}
	}
	return list
}

func hasEvent(list []MaintenanceEvent, id string) bool {
	return slices.ContainsFunc(list, func(e MaintenanceEvent) bool { return e.ID == id })
}
