package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/renameio/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// PhaseName names one step of a run.
type PhaseName string

// The phases, in order.
const (
	PhaseDiscover  PhaseName = "discover"
	PhaseConfigure PhaseName = "configure"
	PhasePreflight PhaseName = "preflight"
	PhaseFetch     PhaseName = "fetch"
	PhasePrepare   PhaseName = "prepare"
	PhaseElect     PhaseName = "elect"
	PhaseInstall   PhaseName = "install"
	PhaseStart     PhaseName = "start"
	PhaseReady     PhaseName = "ready"
	PhaseProve     PhaseName = "prove"
	PhaseSignal    PhaseName = "signal"
)

// PhaseNames lists the phases in order.
func PhaseNames() []PhaseName {
	return []PhaseName{
		PhaseDiscover, PhaseConfigure, PhasePreflight, PhaseFetch, PhasePrepare, PhaseElect,
		PhaseInstall, PhaseStart, PhaseReady, PhaseProve, PhaseSignal,
	}
}

// Outcome says how a run or a phase ended.
type Outcome string

// The outcomes.
const (
	OutcomeRunning   Outcome = "running"
	OutcomeSucceeded Outcome = "succeeded"
	OutcomeFailed    Outcome = "failed"
)

// KindResult is the kind of a Result document.
const KindResult = "BootstrapResult"

// Result is how a run goes or went: what `bootstrap status` shows, the last
// line of `bootstrap run -o json`, and the file result.json in the state
// directory. Times are UTC, durations milliseconds.
type Result struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	// Run is unique to the run.
	Run     string  `json:"run"`
	Version string  `json:"version"`
	Outcome Outcome `json:"outcome"`
	// Phase is the one under way, or the one that failed.
	Phase PhaseName `json:"phase,omitempty"`
	// PhaseSince is when it began.
	PhaseSince time.Time `json:"phaseSince,omitzero"`
	// Doing is what the phase waits for.
	Doing string `json:"doing,omitempty"`
	// Changed says whether the run changed anything on the machine.
	Changed bool `json:"changed"`
	// Code, Message and Remedy say why a run failed.
	Code    fault.Code `json:"code,omitempty"`
	Message string     `json:"message,omitempty"`
	Remedy  string     `json:"remedy,omitempty"`
	// GaveUp says that runs have failed for so long that the machine does not try
	// again by itself.
	GaveUp bool `json:"gaveUp,omitempty"`
	// ExitCode is the process's.
	ExitCode   int       `json:"exitCode"`
	StartedAt  time.Time `json:"startedAt"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	DurationMS int64     `json:"durationMs"`
	// Node is what the machine became, as far as it is known.
	Node     NodeResult    `json:"node"`
	Phases   []PhaseResult `json:"phases"`
	Warnings []string      `json:"warnings,omitempty"`
}

// NodeResult is what the machine became.
type NodeResult struct {
	Name       string            `json:"name,omitempty"`
	Role       v1alpha1.NodeRole `json:"role,omitempty"`
	Pool       v1alpha1.NodePool `json:"pool,omitempty"`
	Cluster    string            `json:"cluster,omitempty"`
	Generation int               `json:"generation,omitempty"`
	// Action is found, join or continue.
	Action string `json:"action,omitempty"`
	// Proven lists the runtimes that ran the probe.
	Proven []string `json:"proven,omitempty"`
}

// PhaseResult is one line of the timeline.
type PhaseResult struct {
	Name    PhaseName `json:"name"`
	Outcome Outcome   `json:"outcome"`
	// StartMS is when it began, after the run's start.
	StartMS    int64 `json:"startMs"`
	DurationMS int64 `json:"durationMs"`
	// Attempts is more than 1 when a failure passed.
	Attempts int `json:"attempts"`
	// Changed says whether it changed anything on the machine.
	Changed bool       `json:"changed,omitempty"`
	Notes   []string   `json:"notes,omitempty"`
	Code    fault.Code `json:"code,omitempty"`
	Message string     `json:"message,omitempty"`
}

const (
	// retryWait and maxRetryWait are about the pauses before a phase whose
	// failure may pass is tried again.
	retryWait    = 500 * time.Millisecond
	maxRetryWait = 10 * time.Second
	// maxNotes bounds what one phase and one run may say.
	maxNotes = 50
)

// CodeTimeout: a phase ran out of time with nothing better to say.
const CodeTimeout fault.Code = "phase-timeout"

// CodeInterrupted: the run was told to end.
const CodeInterrupted fault.Code = "interrupted"

// CodeInternal: a failure that nobody classified.
const CodeInternal fault.Code = "internal"

// recorder keeps the result and tells everybody who listens.
type recorder struct {
	mu     sync.Mutex
	result Result
	begin  time.Time
	phase  *PhaseResult
	// dir is where the result is kept; "" for nowhere.
	dir  string
	log  *slog.Logger
	tell func(Line)
}

// Line is one thing that a person who watches is told.
type Line struct {
	// At is the time since the run's start.
	At    time.Duration
	Phase PhaseName
	Text  string
	// Done is set with the last line of a phase; Failed with it if it failed.
	Done, Failed bool
	// Warning marks what a person should look at.
	Warning bool
	// Fields are structured values for the journal.
	Fields map[string]string
}

func (r *recorder) say(l Line) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sayLocked(l)
}

func (r *recorder) sayLocked(l Line) {
	l.At = time.Since(r.begin)
	if r.tell != nil {
		r.tell(l)
	}
}

// doing says what the phase waits for. It is told once per text.
func (r *recorder) doing(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.result.Doing == text {
		return
	}
	r.result.Doing = text
	r.sayLocked(Line{Phase: r.result.Phase, Text: text})
	r.saveLocked()
}

// note adds to the timeline what a person may want to know afterwards.
func (r *recorder) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase != nil && len(r.phase.Notes) < maxNotes {
		r.phase.Notes = append(r.phase.Notes, text)
	}
	r.sayLocked(Line{Phase: r.result.Phase, Text: text})
}

// warn is for what does not stop the run and should be looked at.
func (r *recorder) warn(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.result.Warnings) < maxNotes {
		r.result.Warnings = append(r.result.Warnings, text)
	}
	r.sayLocked(Line{Phase: r.result.Phase, Text: text, Warning: true})
}

// changed notes that the machine is not what it was.
func (r *recorder) changed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Changed = true
	if r.phase != nil {
		r.phase.Changed = true
	}
}

// overdue notes that runs have failed for longer than one may take. The machine
// gives up unless it is others that it waits for.
func (r *recorder) overdue(a attempts) {
	r.mu.Lock()
	r.result.GaveUp = ownPhase(r.result.Phase)
	gaveUp := r.result.GaveUp
	r.mu.Unlock()
	spent := (time.Duration(a.SpentMS) * time.Millisecond).Round(time.Second)
	if gaveUp {
		r.warn("%d runs failed within %s: it is not tried again by itself", a.Runs, spent)
		return
	}
	r.warn("%d runs failed within %s; it is tried on, since it waits for others", a.Runs, spent)
}

func (r *recorder) node(change func(*NodeResult)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.result.Node)
}

// run does one phase within a time of its own, again while its failure may
// pass by itself.
func (r *recorder) run(ctx context.Context, name PhaseName, within time.Duration, do func(ctx context.Context) error) error {
	begin := time.Now()
	r.mu.Lock()
	p := &PhaseResult{Name: name, Outcome: OutcomeRunning, StartMS: begin.Sub(r.begin).Milliseconds()}
	r.phase = p
	r.result.Phase, r.result.PhaseSince, r.result.Doing = name, begin.UTC(), ""
	r.result.Phases = append(r.result.Phases, *p)
	r.saveLocked()
	r.mu.Unlock()

	phaseCtx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = retryWait, maxRetryWait
	var err error
	for {
		p.Attempts++
		if err = do(phaseCtx); err == nil || phaseCtx.Err() != nil || !fault.IsTransient(err) {
			break
		}
		wait := pause.NextBackOff()
		r.say(Line{Phase: name, Text: fmt.Sprintf("%s; again in %s", oneLine(err), wait.Round(100*time.Millisecond)), Warning: true})
		if !sleep(phaseCtx, wait) {
			break
		}
	}
	err = classify(ctx, name, within, err)

	r.mu.Lock()
	defer r.mu.Unlock()
	p.DurationMS = time.Since(begin).Milliseconds()
	p.Outcome = OutcomeSucceeded
	line := Line{Phase: name, Done: true, Text: "done", Fields: map[string]string{"HEARTH_DURATION_MS": fmt.Sprint(p.DurationMS)}}
	if err != nil {
		p.Outcome, p.Code, p.Message = OutcomeFailed, fault.CodeOf(err), oneLine(err)
		line.Failed, line.Text = true, oneLine(err)
		line.Fields["HEARTH_CODE"] = string(p.Code)
	}
	line.Fields["HEARTH_OUTCOME"] = string(p.Outcome)
	r.result.Phases[len(r.result.Phases)-1] = *p
	r.phase = nil
	r.sayLocked(line)
	r.saveLocked()
	return err
}

// classify gives every failure a code.
func classify(ctx context.Context, name PhaseName, within time.Duration, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fault.New(CodeInterrupted, err, "run it again; it goes on where it was", "the run was told to end in phase %s", name)
	}
	if fault.CodeOf(err) != "" {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fault.New(CodeTimeout, err, "see the journal for what it waited for, and spec.timeouts for more time",
			"phase %s was not done within %s", name, within)
	}
	return fault.New(CodeInternal, err, "run it again; if it stays, report it with the result file", "phase %s failed", name)
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// finish ends the run's record.
func (r *recorder) finish(err error) Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.FinishedAt = time.Now().UTC()
	r.result.DurationMS = time.Since(r.begin).Milliseconds()
	r.result.Doing = ""
	r.result.Outcome = OutcomeSucceeded
	if err != nil {
		r.result.Outcome = OutcomeFailed
		r.result.Code = fault.CodeOf(err)
		r.result.ExitCode = ExitCode(err, r.result.Phase)
		if r.result.GaveUp && r.result.ExitCode != ExitHost && r.result.ExitCode != ExitConfig { // which end it as well
			r.result.ExitCode = ExitGaveUp
		}
		var f *fault.Error
		if errors.As(err, &f) {
			r.result.Message, r.result.Remedy = f.Message, f.Remedy
			if f.Err != nil {
				r.result.Message += ": " + f.Err.Error()
			}
		} else {
			r.result.Message = err.Error()
		}
		if r.result.Remedy == "" {
			for _, e := range Explanations() {
				if e.Code == r.result.Code {
					r.result.Remedy = e.Remedy
				}
			}
		}
	} else {
		r.result.Phase, r.result.PhaseSince = "", time.Time{}
	}
	r.saveLocked()
	return r.result
}

// saveLocked keeps the result durably; that it cannot be kept stops no run.
func (r *recorder) saveLocked() {
	if r.dir == "" {
		return
	}
	if err := saveResult(r.dir, r.result); err != nil {
		r.log.Debug("the result was not saved", "err", err)
	}
}

// resultFile is the result's name in the state directory.
const resultFile = "result.json"

// maxResultBytes bounds what is read of it.
const maxResultBytes = 1 << 20

func saveResult(dir string, result Result) error {
	b, err := json.MarshalIndent(result, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dir, resultFile), append(b, '\n'), 0o644)
}

// ErrNoResult says that bootstrap has not run on this machine.
var ErrNoResult = errors.New("bootstrap has not run on this machine")

// LastResult reads the result of the run under way, or of the last one.
func LastResult(stateDir string) (Result, error) {
	var r Result
	path := filepath.Join(stateDir, resultFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, ErrNoResult
	}
	if err != nil {
		return r, err
	}
	if info.Size() > maxResultBytes {
		return r, fmt.Errorf("%s is no result: it has %d bytes", path, info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s is no result: %w", path, err)
	}
	if r.Kind != KindResult {
		return r, fmt.Errorf("%s is no result: its kind is %q", path, r.Kind)
	}
	return r, nil
}
