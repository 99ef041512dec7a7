package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// Defaults of MonitorOptions.
const (
	// DefaultInterval is how often a healthy runtime is proven again.
	DefaultInterval = 10 * time.Minute
	// DefaultStaleAfter is how long a good proof lasts without a new answer:
	// two missed rounds and some.
	DefaultStaleAfter = 25 * time.Minute
	// DefaultWatchInterval is how often containerd's process and the shims are
	// compared with what was proven.
	DefaultWatchInterval = 15 * time.Second
	// DefaultRetryInterval is the pause after a failed proof. It doubles with
	// each further failure, up to the interval.
	DefaultRetryInterval = 30 * time.Second
)

const (
	// jitter spreads the rounds of nodes that were started together.
	jitter = 0.1
	// serverDeadline bounds asking who answers.
	serverDeadline = 5 * time.Second
	// discoverDeadline bounds looking for runtimes: hashing and asking a few
	// shims on a slow disk.
	discoverDeadline = time.Minute
	// cleanDeadline bounds removing leftovers.
	cleanDeadline = time.Minute
)

// MonitorOptions say what to watch; Node and Discover are required.
type MonitorOptions struct {
	Node Node
	// Discover finds the runtimes of the node on which server runs. It is
	// called every WatchInterval, so it should remember binaries it knows
	// (BinaryCache). When it fails, the runtimes found before are kept.
	Discover func(ctx context.Context, server Server) (Inventory, error)
	// Prover (default: one with default options).
	Prover *Prover
	// Interval, StaleAfter, WatchInterval, RetryInterval have the defaults
	// above. StaleAfter must be longer than Interval.
	Interval, StaleAfter, WatchInterval, RetryInterval time.Duration
	// Logger (default slog.Default).
	Logger *slog.Logger
}

// State is what is known of one runtime.
type State struct {
	Runtime Runtime `json:"runtime"`
	// Proven: the last answer was good and is not stale. A failed proof ends
	// it at once; a missing answer does not.
	Proven bool `json:"proven"`
	// Since is when Proven last changed.
	Since time.Time `json:"since"`
	// Stale: the last answer is older than StaleAfter.
	Stale bool `json:"stale,omitempty"`
	// Answer is the last proof that said something about the runtime; nil:
	// there was none yet.
	Answer *Proof `json:"answer,omitempty"`
	// Last is the last attempt, answered or not.
	Last *Proof `json:"last,omitempty"`
}

// Snapshot is what is known of a node.
type Snapshot struct {
	// Looked says that runtimes were looked for and that is what there is.
	// Before, their absence from Runtimes means nothing.
	Looked bool `json:"looked"`
	// Runtimes are sorted by Key.
	Runtimes []State `json:"runtimes"`
	// Unreachable says why there is no answer from containerd; empty: there
	// is one.
	Unreachable string `json:"unreachable,omitempty"`
	// Problems concern the node rather than one runtime.
	Problems []string `json:"problems,omitempty"`
}

// Proven returns the state of a runtime that is proven, by handler.
func (s Snapshot) Proven(handler string) (State, bool) {
	for _, state := range s.Runtimes {
		if state.Runtime.Handler == handler && state.Proven {
			return state, true
		}
	}
	return State{}, false
}

// Monitor keeps proofs current: it proves every runtime when it starts, on a
// schedule, when containerd was restarted, and when a shim or its
// configuration changed. One proof runs at a time.
type Monitor struct {
	options MonitorOptions
	log     *slog.Logger
	refresh chan struct{}

	// mu guards what Snapshot and Subscribe share with Run. Only Run writes
	// entries, so that it reads them without the lock.
	mu          sync.Mutex
	entries     map[string]*entry
	looked      bool
	unreachable string
	problems    []string
	subscribers map[chan struct{}]struct{}

	// Run's own.
	server  Server
	cleaned bool
}

// entry is one runtime under watch.
type entry struct {
	runtime      Runtime
	last, answer *Proof
	proven       bool
	since        time.Time
	due          time.Time
	failures     int
}

// NewMonitor checks options and returns a Monitor that does nothing until Run.
func NewMonitor(options MonitorOptions) (*Monitor, error) {
	if options.Node == nil || options.Discover == nil {
		return nil, errors.New("watching Wasm runtimes: Node and Discover are required")
	}
	options.Interval = cmp.Or(options.Interval, DefaultInterval)
	options.StaleAfter = cmp.Or(options.StaleAfter, DefaultStaleAfter)
	options.WatchInterval = cmp.Or(options.WatchInterval, DefaultWatchInterval)
	options.RetryInterval = cmp.Or(options.RetryInterval, DefaultRetryInterval)
	if options.Interval <= 0 || options.WatchInterval <= 0 || options.RetryInterval <= 0 || options.StaleAfter <= options.Interval {
		return nil, fmt.Errorf("watching Wasm runtimes: intervals must be positive, and StaleAfter (%v) longer than Interval (%v), or every proof would go stale before the next", options.StaleAfter, options.Interval)
	}
	if options.Logger == nil {
		options.Logger = slog.Default()
	}
	if options.Prover == nil {
		options.Prover = NewProver(options.Node, ProverOptions{Logger: options.Logger})
	}
	return &Monitor{
		options: options, log: options.Logger,
		refresh: make(chan struct{}, 1),
		entries: map[string]*entry{}, subscribers: map[chan struct{}]struct{}{},
	}, nil
}

// Run watches until ctx is over, and returns its cause. It is called once.
func (m *Monitor) Run(ctx context.Context) error {
	ticker := time.NewTicker(m.options.WatchInterval)
	defer ticker.Stop()
	for {
		m.round(ctx)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		case <-m.refresh:
			for _, entry := range m.entries {
				entry.due = time.Time{}
			}
		}
	}
}

// Refresh asks for a proof of every runtime soon, and returns at once.
func (m *Monitor) Refresh() {
	select {
	case m.refresh <- struct{}{}:
	default: // one is waiting already
	}
}

// Subscribe returns a channel that is sent to after every proof and every
// change of what Snapshot says. Sends are merged while nobody receives. stop
// ends the subscription; the channel is not closed.
func (m *Monitor) Subscribe() (changed <-chan struct{}, stop func()) {
	channel := make(chan struct{}, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.subscribers[channel] = struct{}{}
	return channel, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subscribers, channel)
	}
}

// Snapshot says what is known now.
func (m *Monitor) Snapshot() Snapshot {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	snapshot := Snapshot{Looked: m.looked, Unreachable: m.unreachable, Problems: slices.Clone(m.problems), Runtimes: []State{}}
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		entry := m.entries[key]
		state := State{Runtime: entry.runtime, Since: entry.since, Answer: entry.answer, Last: entry.last}
		state.Stale = entry.answer != nil && m.stale(entry, now)
		state.Proven = entry.proven && !state.Stale
		if entry.proven && state.Stale {
			state.Since = entry.answer.At.Add(m.options.StaleAfter)
		}
		snapshot.Runtimes = append(snapshot.Runtimes, state)
	}
	return snapshot
}

func (m *Monitor) stale(entry *entry, now time.Time) bool {
	return now.Sub(entry.answer.At) > m.options.StaleAfter
}

// round looks at the node once and proves what is due.
func (m *Monitor) round(ctx context.Context) {
	defer m.expire()
	server, err := m.askServer(ctx)
	if err != nil {
		m.setUnreachable(clip(err.Error()))
		return
	}
	m.setUnreachable("")
	if server != m.server {
		if m.server != (Server{}) {
			m.log.InfoContext(ctx, "containerd was restarted, proving its runtimes again", "pid", server.PID)
		}
		m.server = server
		m.cleaned = false // what ran when it went away may have been left
		for _, entry := range m.entries {
			entry.due = time.Time{}
		}
	}
	if !m.cleaned {
		m.clean(ctx)
	}
	m.discover(ctx, server)
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if ctx.Err() != nil {
			return
		}
		if entry := m.entries[key]; !time.Now().Before(entry.due) {
			m.prove(ctx, entry)
		}
	}
}

func (m *Monitor) askServer(ctx context.Context) (Server, error) {
	ctx, cancel := context.WithTimeout(ctx, serverDeadline)
	defer cancel()
	return m.options.Node.Server(ctx)
}

func (m *Monitor) clean(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, cleanDeadline)
	defer cancel()
	removed, err := m.options.Node.Clean(ctx)
	if err != nil {
		m.log.WarnContext(ctx, "leftovers of an earlier run could not be removed, trying again", "error", err)
		return
	}
	m.cleaned = true
	if removed > 0 {
		m.log.InfoContext(ctx, "removed leftovers of an earlier run", "containers", removed)
	}
}

func (m *Monitor) discover(ctx context.Context, server Server) {
	ctx, cancel := context.WithTimeout(ctx, discoverDeadline)
	defer cancel()
	inventory, err := m.options.Discover(ctx, server)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		// What is missing from half an inventory need not be gone.
		problems := []string{clip("looking for Wasm runtimes: " + err.Error())}
		if !slices.Equal(m.problems, problems) {
			m.problems = problems
			m.notify()
		}
		return
	}
	changed := !m.looked || !slices.Equal(m.problems, inventory.Problems)
	m.looked, m.problems = true, inventory.Problems
	found := map[string]bool{}
	for _, runtime := range inventory.Runtimes {
		key := runtime.Key()
		found[key] = true
		known := m.entries[key]
		switch {
		case known == nil:
			m.entries[key] = &entry{runtime: runtime, since: time.Now()}
			changed = true
		case known.runtime.Identity() != runtime.Identity():
			// The old proof is kept until the new one, which follows at once:
			// an upgrade that works should not make the node flap.
			m.log.InfoContext(ctx, "a Wasm runtime changed, proving it again", "runtime", key, "version", runtime.Version)
			known.runtime, known.due, known.failures = runtime, time.Time{}, 0
			changed = true
		default:
			known.runtime = runtime // its problems or classes may differ
		}
	}
	for key := range m.entries {
		if !found[key] {
			delete(m.entries, key)
			changed = true
		}
	}
	if changed {
		m.notify()
	}
}

func (m *Monitor) prove(ctx context.Context, entry *entry) {
	proof := m.options.Prover.Prove(ctx, entry.runtime)
	m.mu.Lock()
	defer m.mu.Unlock()
	entry.last = &proof
	switch {
	case !proof.Code.Answered():
		entry.due = proof.At.Add(m.options.WatchInterval)
	case proof.OK:
		entry.failures = 0
		spread := 1 + jitter*(2*rand.Float64()-1)
		entry.due = proof.At.Add(time.Duration(spread * float64(m.options.Interval)))
	default:
		pause := m.options.RetryInterval << min(entry.failures, 16)
		entry.failures++
		entry.due = proof.At.Add(min(pause, m.options.Interval))
	}
	if proof.Code.Answered() {
		entry.answer = &proof
		m.setProven(ctx, entry, proof.OK)
	}
	m.notify()
}

// setProven is called with mu held.
func (m *Monitor) setProven(ctx context.Context, entry *entry, proven bool) {
	if entry.proven == proven && !entry.since.IsZero() {
		return
	}
	entry.proven, entry.since = proven, time.Now()
	if proven {
		m.log.InfoContext(ctx, "a Wasm runtime is proven", "runtime", entry.runtime.Key(), "version", entry.runtime.Version)
	} else {
		m.log.WarnContext(ctx, "a Wasm runtime is no longer proven", "runtime", entry.runtime.Key(), "code", entry.last.Code, "message", entry.last.Message)
	}
}

// expire ends proofs that have gone stale.
func (m *Monitor) expire() {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := false
	for _, entry := range m.entries {
		if entry.proven && m.stale(entry, now) {
			entry.proven, entry.since = false, now
			changed = true
			m.log.Warn("the proof of a Wasm runtime is stale", "runtime", entry.runtime.Key(), "age", now.Sub(entry.answer.At))
		}
	}
	if changed {
		m.notify()
	}
}

func (m *Monitor) setUnreachable(reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// The wording of an error may differ each time; that it is one matters.
	changed := (m.unreachable == "") != (reason == "")
	m.unreachable = reason
	if changed {
		if reason != "" {
			m.log.Warn("containerd does not answer, proofs are kept until they are stale", "reason", strings.TrimSpace(reason))
		}
		m.notify()
	}
}

// notify is called with mu held.
func (m *Monitor) notify() {
	for channel := range m.subscribers {
		select {
		case channel <- struct{}{}:
		default:
		}
	}
}
