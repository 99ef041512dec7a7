// Package health is the one model of how a node is: named checks that the
// node's parts report, and what follows from them for people (`nodeagent
// status`), probes (/livez, /readyz), metrics and logs.
//
// It owns the checks' states, their times and the conclusions. It checks
// nothing itself and acts on nothing: parts report, others read.
package health

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// maxErrors bounds the distinct errors that are remembered.
	maxErrors = 16
	// maxMessageBytes bounds messages: some carry what others wrote.
	maxMessageBytes = 1024
)

// Definition says what a check is. It never changes while the process runs.
type Definition struct {
	// Code is stable, kebab-case and unique in the registry.
	Code     string
	Severity v1alpha1.Severity
	// DependsOn names checks without which this one cannot pass. They must be
	// registered before it, so dependencies have no cycles.
	DependsOn []string
	// Remedy is the default advice while the check does not pass.
	Remedy string
	// Pending is shown until the first report, such as "waiting for the engine".
	Pending string
}

// Options configure a Registry; the zero value is usable.
type Options struct {
	// Clock defaults to time.Now.
	Clock func() time.Time
	// Logger gets one event when a check changes; nil discards.
	Logger *slog.Logger
}

// Registry holds a process's checks. It is safe for concurrent use and starts
// no goroutine.
type Registry struct {
	clock   func() time.Time
	log     *slog.Logger
	started time.Time

	mu     sync.Mutex
	checks map[string]*Check
	order  []*Check // dependencies first: registration demands it
	state  v1alpha1.NodeState
	since  time.Time
	errors []v1alpha1.ErrorRecord // newest first
	loops  map[*Loop]struct{}
}

// NewRegistry returns a registry without checks; such a node is healthy.
func NewRegistry(o Options) *Registry {
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	now := o.Clock()
	return &Registry{
		clock:   o.Clock,
		log:     o.Logger,
		started: now,
		checks:  map[string]*Check{},
		state:   v1alpha1.NodeHealthy,
		since:   now,
		loops:   map[*Loop]struct{}{},
	}
}

// Check is the handle through which one part reports. Its methods are safe for
// concurrent use.
type Check struct {
	registry *Registry
	def      Definition

	// Guarded by registry.mu: the overall state is a function of all of them.
	state   v1alpha1.CheckState
	since   time.Time
	message string
	remedy  string
}

// Register adds a check in state unknown. It panics on a duplicate code, an
// unknown severity or dependency: those are mistakes in the program, found by
// its first run.
func (r *Registry) Register(d Definition) *Check {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.Code == "" || r.checks[d.Code] != nil {
		panic(fmt.Sprintf("health: check %q is registered twice or has no code", d.Code))
	}
	if severityRank(d.Severity) < 0 {
		panic(fmt.Sprintf("health: check %q has unknown severity %q", d.Code, d.Severity))
	}
	for _, dep := range d.DependsOn {
		if r.checks[dep] == nil {
			panic(fmt.Sprintf("health: check %q depends on %q, which is not registered", d.Code, dep))
		}
	}
	d.DependsOn = slices.Clone(d.DependsOn)
	c := &Check{registry: r, def: d, state: v1alpha1.CheckUnknown, since: r.clock(), message: d.Pending}
	r.checks[d.Code] = c
	r.order = append(r.order, c)
	r.settleLocked()
	return c
}

// OK reports that the check passes.
func (c *Check) OK(message string) { c.set(v1alpha1.CheckOK, message, "") }

// Fail reports that the check fails. An empty remedy means the definition's.
func (c *Check) Fail(message, remedy string) { c.set(v1alpha1.CheckFailing, message, remedy) }

// Unknown reports that the check could not be made, and why.
func (c *Check) Unknown(message string) { c.set(v1alpha1.CheckUnknown, message, "") }

// Report is OK for a nil error, else Fail with its text.
func (c *Check) Report(err error, okMessage string) {
	if err == nil {
		c.OK(okMessage)
		return
	}
	c.Fail(err.Error(), "")
}

// Set reports by code, for parts that have no handle. It returns an error for
// a code nobody registered.
func (r *Registry) Set(code string, state v1alpha1.CheckState, message, remedy string) error {
	r.mu.Lock()
	c := r.checks[code]
	r.mu.Unlock()
	if c == nil {
		return fmt.Errorf("no health check %q is registered", code)
	}
	c.set(state, message, remedy)
	return nil
}

func (c *Check) set(state v1alpha1.CheckState, message, remedy string) {
	message = truncate(message)
	if state != v1alpha1.CheckOK && remedy == "" {
		remedy = c.def.Remedy
	}
	r := c.registry
	r.mu.Lock()
	before := c.state
	c.state, c.message, c.remedy = state, message, remedy
	if before != state {
		c.since = r.clock()
	}
	nodeBefore, nodeAfter, cause := r.settleLocked()
	r.mu.Unlock()

	if before != state {
		level := slog.LevelInfo
		if state == v1alpha1.CheckFailing && c.def.Severity != v1alpha1.SeverityInfo && cause(c) == nil {
			level = slog.LevelWarn
		}
		r.log.Log(context.Background(), level, "health check changed",
			"check", c.def.Code, "from", before, "to", state, "severity", c.def.Severity, "message", message)
	}
	if nodeBefore != nodeAfter {
		r.log.Info("node state changed", "from", nodeBefore, "to", nodeAfter)
	}
}

// settleLocked recomputes the overall state. It returns the state before and
// after, and the causes found on the way.
func (r *Registry) settleLocked() (before, after v1alpha1.NodeState, cause func(*Check) *Check) {
	causes := r.causesLocked()
	before, after = r.state, v1alpha1.NodeHealthy
	for _, c := range r.order {
		if causes[c] == nil {
			after = worse(after, c.effect())
		}
	}
	if before != after {
		r.state, r.since = after, r.clock()
	}
	return before, after, func(c *Check) *Check { return causes[c] }
}

// causesLocked maps each check that does not pass to the failing check at the
// root of it, if one of its dependencies (however far) fails.
func (r *Registry) causesLocked() map[*Check]*Check {
	causes := make(map[*Check]*Check)
	for _, c := range r.order { // dependencies come first
		if c.state == v1alpha1.CheckOK {
			continue
		}
		for _, code := range c.def.DependsOn {
			dep := r.checks[code]
			// An unknown dependency explains an unknown check but no failure.
			root := causes[dep]
			if root == nil && dep.state == v1alpha1.CheckFailing {
				root = dep
			}
			if root != nil {
				causes[c] = root
				break
			}
		}
	}
	return causes
}

// effect is what the check alone makes of the node.
func (c *Check) effect() v1alpha1.NodeState {
	switch {
	case c.state == v1alpha1.CheckOK, c.def.Severity == v1alpha1.SeverityInfo:
		return v1alpha1.NodeHealthy
	case c.state == v1alpha1.CheckFailing && c.def.Severity == v1alpha1.SeverityCritical:
		return v1alpha1.NodeFailed
	case c.state == v1alpha1.CheckUnknown && c.def.Severity == v1alpha1.SeverityWarning:
		return v1alpha1.NodeHealthy // nothing is wrong yet
	}
	return v1alpha1.NodeDegraded
}

// Snapshot is the registry at one moment.
type Snapshot struct {
	State   v1alpha1.NodeState
	Since   time.Time
	Summary string
	// Checks are ordered as v1alpha1.NodeStatus.Checks says.
	Checks     []v1alpha1.Check
	LastErrors []v1alpha1.ErrorRecord
	StartedAt  time.Time
	Time       time.Time
}

// Snapshot returns the checks and what follows from them. The caller owns it.
func (r *Registry) Snapshot() Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	causes := r.causesLocked()
	s := Snapshot{
		State:      r.state,
		Since:      r.since,
		Checks:     make([]v1alpha1.Check, 0, len(r.order)),
		LastErrors: append(make([]v1alpha1.ErrorRecord, 0, len(r.errors)), r.errors...),
		StartedAt:  r.started,
		Time:       r.clock(),
	}
	for _, c := range r.order {
		check := v1alpha1.Check{
			Code:      c.def.Code,
			Severity:  c.def.Severity,
			State:     c.state,
			Since:     c.since,
			Message:   c.message,
			Remedy:    c.remedy,
			DependsOn: slices.Clone(c.def.DependsOn),
		}
		if root := causes[c]; root != nil {
			check.CausedBy = root.def.Code
		}
		s.Checks = append(s.Checks, check)
	}
	slices.SortStableFunc(s.Checks, func(a, b v1alpha1.Check) int {
		return cmp.Or(
			cmp.Compare(displayRank(a), displayRank(b)),
			cmp.Compare(severityRank(a.Severity), severityRank(b.Severity)),
			strings.Compare(a.Code, b.Code),
		)
	})
	s.Summary = summary(s.Checks)
	return s
}

// Ready returns an error naming the critical checks that do not pass, root
// causes only; nil when the node is ready for work. A degraded node is ready.
func (r *Registry) Ready() error {
	var reasons []string
	for _, c := range r.Snapshot().Checks {
		if c.Severity == v1alpha1.SeverityCritical && c.State != v1alpha1.CheckOK {
			if c.CausedBy == "" {
				reasons = append(reasons, describe(c))
			} else {
				reasons = append(reasons, fmt.Sprintf("%s (because of %s)", c.Code, c.CausedBy))
			}
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return fmt.Errorf("not ready: %s", strings.Join(reasons, "; "))
}

// RecordError remembers that something went wrong with subject (a function's
// name, say; may be empty). An error with the code, subject and text of a
// remembered one is counted there.
func (r *Registry) RecordError(code, subject string, err error) {
	if err == nil {
		return
	}
	message := truncate(err.Error())
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock()
	record := v1alpha1.ErrorRecord{Time: now, FirstTime: now, Count: 1, Code: code, Subject: subject, Message: message}
	r.errors = slices.DeleteFunc(r.errors, func(e v1alpha1.ErrorRecord) bool {
		same := e.Code == code && e.Subject == subject && e.Message == message
		if same {
			record.FirstTime, record.Count = e.FirstTime, e.Count+1
		}
		return same
	})
	r.errors = slices.Insert(r.errors, 0, record)
	if len(r.errors) > maxErrors {
		r.errors = r.errors[:maxErrors]
	}
}

func summary(checks []v1alpha1.Check) string {
	var roots, caused, unknown int
	var first string
	for _, c := range checks {
		switch {
		case c.Severity == v1alpha1.SeverityInfo:
		case c.CausedBy != "":
			caused++
		case c.State == v1alpha1.CheckFailing:
			if roots == 0 {
				first = describe(c)
			}
			roots++
		case c.State == v1alpha1.CheckUnknown && c.Severity == v1alpha1.SeverityCritical:
			if roots+unknown == 0 {
				first = describe(c)
			}
			unknown++
		}
	}
	switch {
	case roots > 0:
		s := first
		if roots > 1 {
			s += fmt.Sprintf(" (and %d more)", roots-1)
		}
		if caused > 0 {
			s += fmt.Sprintf("; %d other checks wait for it", caused)
			if caused == 1 {
				s = strings.Replace(s, "1 other checks wait", "1 other check waits", 1)
			}
		}
		return s
	case unknown == 1:
		return "starting: " + first
	case unknown > 1:
		return fmt.Sprintf("starting: %s (and %d more)", first, unknown-1)
	case len(checks) == 0:
		return "no checks are registered"
	}
	return "every check passes"
}

func describe(c v1alpha1.Check) string {
	if c.Message == "" {
		return c.Code + " is " + string(c.State)
	}
	return c.Code + ": " + c.Message
}

func displayRank(c v1alpha1.Check) int {
	switch {
	case c.State == v1alpha1.CheckFailing && c.CausedBy == "":
		return 0
	case c.State == v1alpha1.CheckFailing:
		return 1
	case c.State == v1alpha1.CheckUnknown:
		return 2
	}
	return 3
}

func severityRank(s v1alpha1.Severity) int {
	return slices.Index([]v1alpha1.Severity{v1alpha1.SeverityCritical, v1alpha1.SeverityWarning, v1alpha1.SeverityInfo}, s)
}

func worse(a, b v1alpha1.NodeState) v1alpha1.NodeState {
	rank := []v1alpha1.NodeState{v1alpha1.NodeHealthy, v1alpha1.NodeDegraded, v1alpha1.NodeFailed}
	if slices.Index(rank, b) > slices.Index(rank, a) {
		return b
	}
	return a
}

func truncate(s string) string {
	if len(s) <= maxMessageBytes {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessageBytes], "") + "…"
}
