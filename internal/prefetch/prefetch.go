// Package prefetch is the agent's loop: it learns what should be on this
// node, gets it there, has the engine serve it, and says how far it is.
//
// It owns the reconciliation between four parties: the source of the desired
// state (the API), the registry, the store of compiled objects and the
// engine. It compiles nothing and parses no Wasm (the store does), serves no
// request (the engine does) and decides nothing about revisions (the API
// does). Secrets pass through it to the engine and into one file of mode
// 0600; they are never logged or reported.
//
// The loop is level-triggered: every event only says "look again", and one
// pass derives everything from the last snapshots of desired state, store and
// engine. Losing an event, or any of the other processes, therefore loses
// nothing.
package prefetch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/registry"
)

// Source tells what this node should have.
type Source interface {
	// Desired answers at once when its generation differs from after, else
	// when that changes or its own waiting time is over, then with the
	// generation unchanged. After 0 never waits.
	Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error)
}

// Reporter takes what this node has. Each report is complete.
type Reporter interface {
	Report(ctx context.Context, r v1alpha1.NodeReport) error
}

// Puller gets a module by digest; *registry.Client is one.
type Puller interface {
	Pull(ctx context.Context, a v1alpha1.Artifact, dst string, opts registry.PullOptions) (registry.Pulled, error)
}

// Store is what the loop needs of *precompile.Store.
type Store interface {
	// Ensure returns the image's object, compiling what module brings if need be.
	Ensure(ctx context.Context, imageDigest string, module func(ctx context.Context) (path string, err error)) (precompile.ObjectRef, []v1alpha1.Phase, error)
	// Object returns the image's object if it is there and usable.
	Object(imageDigest string) (precompile.ObjectRef, bool)
	// Quarantine takes an object out of use.
	Quarantine(ref precompile.ObjectRef, reason string) error
	// SetLive names the images that must not be evicted.
	SetLive(imageDigests []string)
}

// Engine is what the loop needs of *control.Client.
type Engine interface {
	PutState(ctx context.Context, s control.State) error
	Status(ctx context.Context, after uint64, wait time.Duration) (control.Status, error)
}

const (
	// tick is how often a pass runs without any event: it shows that the
	// loop is alive and repairs whatever no event told of.
	tick = 5 * time.Second
	// pollTimeout bounds one long poll: the wait the API is asked for, and
	// time for a loaded machine to answer.
	pollTimeout = pollWait + 10*time.Second
	// statusWait is how long the engine may hold a status call.
	statusWait = 30 * time.Second
	// engineTimeout bounds one call to the engine beyond the wait.
	engineTimeout = 10 * time.Second
	// A poll that came back unchanged sooner than quickPoll was not held:
	// pollPause keeps that from becoming a busy loop, and is short enough
	// for nobody to notice when something does change.
	quickPoll = time.Second
	pollPause = 250 * time.Millisecond
	// reportTimeout bounds one report.
	reportTimeout = 10 * time.Second
	// jobTimeout bounds one artifact from pull to object; the registry client
	// and the compiler have tighter limits of their own.
	jobTimeout = 15 * time.Minute
	// permanentRetry is when something that failed for good is tried again,
	// in case its reason lay outside the artifact after all.
	permanentRetry = 10 * time.Minute
	// credentialsRetry is the same for credentials that were refused: they are
	// changed on one side first, and a file of them arrives within a minute or two.
	credentialsRetry = 30 * time.Second
	// engineGrace is how long the last known state of the engine is believed
	// while it does not answer: a restart is shorter.
	engineGrace = 5 * time.Second
	// handover is how long the engine keeps a function that is placed on other
	// nodes by now and answers there: what other nodes were told of it last may
	// have them send requests here for a moment.
	handover = 5 * time.Second
	// sourceGrace is how long the source may be away before the engine is told
	// that what it serves may be out of date: replicas of the API are replaced
	// sooner.
	sourceGrace = 15 * time.Second
	// meetGrace is how long a peer may take to answer for the first time before
	// that is worth a warning: on most nodes all parts start at once.
	meetGrace = 5 * time.Second
	// errorsKept is how many recent errors Status shows.
	errorsKept = 10
)

// A backoff doubles from first to longest, plus or minus half at random.
type backoff struct{ first, longest time.Duration }

var (
	// artifactBackoff paces retries of pulls and compiles: a registry that
	// restarts is found soon, one that is down is not hammered by a fleet.
	artifactBackoff = backoff{500 * time.Millisecond, time.Minute}
	// peerBackoff paces calls to the API and the engine, both on this
	// machine or near it and usually back within a second.
	peerBackoff = backoff{100 * time.Millisecond, 5 * time.Second}
	// fleetBackoff paces calls to an API that many nodes share: after it was
	// away, a thousand of them come back over some seconds.
	fleetBackoff = backoff{500 * time.Millisecond, 15 * time.Second}
)

// fleetReportEvery is how often an unchanged report goes to an API that many
// nodes share, give or take a quarter: it repairs what was lost there, and is
// no write where nothing was.
const fleetReportEvery = 2 * time.Minute

// delay is the pause after the n-th failure in a row, n from 1.
func (b backoff) delay(n int) time.Duration {
	d := b.longest
	if n < 20 {
		d = min(b.longest, b.first<<max(n-1, 0))
	}
	return d/2 + rand.N(d)
}

// Options of a Loop. Source, Reporter, Puller, Store, Engine, Node and
// TempDir are required.
type Options struct {
	Source   Source
	Reporter Reporter
	Puller   Puller
	Store    Store
	Engine   Engine
	// Node is this node's name in reports.
	Node string
	// TempDir is where modules are between pull and compile. Its
	// subdirectory "pull" belongs to the loop and is emptied at start.
	TempDir string
	// CachePath is the file (mode 0600, it holds secrets) with the last
	// desired state, used when the API does not answer at start. Empty: none.
	CachePath string
	// Pulls and Compiles bound what runs at once (defaults: 2, one per core).
	Pulls, Compiles int
	// Jitter delays each pull by a random time below it, so that a fleet
	// does not ask the registry in the same instant (default: none).
	Jitter time.Duration
	// Fleet says that Source and Reporter are shared with many nodes: retries
	// are spread wider, reports come less densely, and again now and then
	// although nothing changed.
	Fleet bool
	// Logger gets a line per step of an artifact and per change of a peer's
	// reachability (default: none).
	Logger *slog.Logger
	// Registerer gets the metrics (default: none).
	Registerer prometheus.Registerer
}

// Loop is the agent's loop. Make it with New, run it with Run once.
type Loop struct {
	o    Options
	log  *slog.Logger
	m    *metrics
	dir  string
	now  func() time.Time
	kick chan struct{} // capacity 1: "look again"

	pulls, compiles chan struct{} // semaphores
	pushKick        chan struct{} // capacity 1: l.want changed
	reportKick      chan struct{} // capacity 1: l.report changed

	// jobs counts running artifact goroutines; Run waits for them.
	jobs sync.WaitGroup

	// mu guards everything below. It is held over calls of the store that
	// only look things up or rename, never over a wait.
	mu        sync.Mutex
	started   bool
	have      bool // a desired state is known
	fromCache bool
	desired   v1alpha1.Desired
	applied   uint64 // counts desired states, orders images by newness
	images    map[string]*image
	running   int
	source    peer
	eng       peer

	want      control.State // what the engine should have
	wantSet   bool
	pushed    map[string]pushedEntry
	needPush  bool
	fns       map[string]control.FunctionStatus
	fnsGen    uint64 // engine generation fns speaks of
	engFailed map[string]engineFailure
	report    v1alpha1.NodeReport
	reportSet bool
	acked     bool // report was taken by the API
	lastPass  time.Time
	recent    []RecentError
}

// peer is the reachability of another process.
type peer struct {
	ok    bool
	since time.Time
	err   string
	// asked is false until the first answer or failure, met until the first
	// answer.
	asked, met bool
	// told says that the log holds the present failure.
	told bool
}

// pushedEntry is what the engine was last told of a function.
type pushedEntry struct {
	fn   control.Function
	made uint64
	// gen is the generation in which it changed last: an older status says
	// nothing about it.
	gen uint64
	// leaves is until when the engine keeps what is placed elsewhere by now;
	// zero: it is placed here.
	leaves time.Time
}

type engineFailure struct {
	revision int
	object   string
	err      v1alpha1.FunctionError
	until    time.Time
}

// New checks the options and prepares the temporary directory.
func New(o Options) (*Loop, error) {
	switch {
	case o.Source == nil, o.Reporter == nil, o.Puller == nil, o.Store == nil, o.Engine == nil:
		return nil, errors.New("prefetch: source, reporter, puller, store and engine are all required")
	case o.Node == "":
		return nil, errors.New("prefetch: the node's name is required")
	case o.TempDir == "":
		return nil, errors.New("prefetch: a directory for temporary files is required")
	}
	if o.Pulls <= 0 {
		o.Pulls = 2
	}
	if o.Compiles <= 0 {
		o.Compiles = runtime.NumCPU()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Loop{
		o: o, log: o.Logger, now: time.Now,
		kick:       make(chan struct{}, 1),
		pushKick:   make(chan struct{}, 1),
		reportKick: make(chan struct{}, 1),
		pulls:      make(chan struct{}, o.Pulls),
		compiles:   make(chan struct{}, o.Compiles),
		images:     make(map[string]*image),
		pushed:     make(map[string]pushedEntry),
		fns:        make(map[string]control.FunctionStatus),
		engFailed:  make(map[string]engineFailure),
	}
	var err error
	if l.dir, err = emptyDir(o.TempDir, "pull"); err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	if l.m, err = newMetrics(l, o.Registerer); err != nil {
		return nil, fmt.Errorf("prefetch: %w", err)
	}
	return l, nil
}

// Run works until ctx ends, then waits for its goroutines and returns nil.
// It may be called once.
func (l *Loop) Run(ctx context.Context) error {
	l.mu.Lock()
	if l.started {
		l.mu.Unlock()
		return errors.New("prefetch: the loop is already running")
	}
	l.started = true
	now := l.now()
	l.lastPass, l.source.since, l.eng.since = now, now, now
	l.mu.Unlock()

	if d, ok := l.loadCache(); ok {
		l.apply(d, true)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for _, f := range []func(context.Context){l.pollSource, l.watchEngine, l.pushStates, l.sendReports} {
		wg.Go(func() { f(ctx) })
	}
	l.reconcileLoop(ctx)
	wg.Wait()
	l.jobs.Wait()
	return nil
}

// look asks for another pass.
func (l *Loop) look() { signal(l.kick) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// wait sleeps for d or until ctx ends; it says whether to go on.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// reconcileLoop runs passes until ctx ends.
func (l *Loop) reconcileLoop(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			l.cancelAll()
			return
		case <-l.kick:
		case <-t.C:
		}
		start := l.now()
		next := l.pass(ctx)
		// Events that come while many functions change are taken together: a
		// pass costs about 10 µs per function, and passes never take more
		// than a third of one core.
		if !wait(ctx, 2*l.now().Sub(start)) {
			l.cancelAll()
			return
		}
		t.Reset(next)
	}
}

// pollSource follows the desired state.
func (l *Loop) pollSource(ctx context.Context) {
	var after uint64
	failures := 0
	for ctx.Err() == nil {
		start := l.now()
		call, cancel := context.WithTimeout(ctx, pollTimeout)
		d, err := l.o.Source.Desired(call, after)
		cancel()
		if ctx.Err() != nil {
			return
		}
		back := l.setPeer(&l.source, "api", err)
		if err != nil {
			failures++
			// The next answer is wanted at once and whole: the API may have
			// been replaced, its generations may have begun anew.
			after = 0
			if !wait(ctx, l.apiBackoff().delay(failures)) {
				return
			}
			continue
		}
		failures = 0
		if back {
			l.resend()
			l.look()
		}
		l.mu.Lock()
		fresh := !l.have || l.fromCache || d.Generation != l.desired.Generation
		l.mu.Unlock()
		if fresh {
			l.apply(d, false)
			l.saveCache(d)
		} else if l.now().Sub(start) < quickPoll && !wait(ctx, pollPause) {
			return
		}
		after = d.Generation
	}
}

// apply makes d the desired state.
func (l *Loop) apply(d v1alpha1.Desired, cached bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.desired, l.have, l.fromCache = d, true, cached
	l.applied++
	l.syncImages()
	l.look()
}

// watchEngine follows the engine's status.
func (l *Loop) watchEngine(ctx context.Context) {
	var after uint64
	failures := 0
	for ctx.Err() == nil {
		start := l.now()
		call, cancel := context.WithTimeout(ctx, statusWait+engineTimeout)
		s, err := l.o.Engine.Status(call, after, statusWait)
		cancel()
		if ctx.Err() != nil {
			return
		}
		l.setPeer(&l.eng, "engine", err)
		if err != nil {
			failures++
			after = 0
			l.look()
			if !wait(ctx, peerBackoff.delay(failures)) {
				return
			}
			continue
		}
		failures = 0
		l.engineStatus(s)
		if s.Version == after && l.now().Sub(start) < quickPoll && !wait(ctx, pollPause) {
			return
		}
		after = s.Version
	}
}

// engineStatus takes in a status. Generation 0 is an engine that has just
// started: it needs the state again.
func (l *Loop) engineStatus(s control.Status) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.Generation == 0 {
		if l.wantSet {
			l.needPush = true
			signal(l.pushKick)
		}
		l.look()
		return
	}
	if s.OutOfTouch && l.wantSet && !l.want.Stale {
		// It was not heard from here for a while, as when this process was
		// stopped: the same again is news to it.
		l.needPush = true
		signal(l.pushKick)
	}
	l.fnsGen = s.Generation
	l.fns = make(map[string]control.FunctionStatus, len(s.Functions))
	for _, f := range s.Functions {
		l.fns[f.Name] = f
	}
	l.look()
}

// pushStates gives the engine the newest wanted state, until it took it.
func (l *Loop) pushStates(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.pushKick:
		}
		for failures := 0; ; {
			l.mu.Lock()
			s, need := l.want, l.needPush
			l.needPush = false
			l.mu.Unlock()
			if !need {
				break
			}
			call, cancel := context.WithTimeout(ctx, engineTimeout)
			err := l.o.Engine.PutState(call, s)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				l.log.DebugContext(ctx, "engine has the state", "generation", s.Generation, "functions", len(s.Functions))
				break
			}
			l.setPeer(&l.eng, "engine", err)
			l.mu.Lock()
			l.needPush = true
			l.mu.Unlock()
			failures++
			if !wait(ctx, peerBackoff.delay(failures)) {
				return
			}
		}
	}
}

// sendReports sends the newest report, until the API took it.
func (l *Loop) sendReports(ctx context.Context) {
	again := time.NewTimer(math.MaxInt64) // never, unless the API is a fleet's
	defer again.Stop()
	for {
		if l.o.Fleet {
			again.Reset(fleetReportEvery*3/4 + rand.N(fleetReportEvery/2))
		}
		select {
		case <-ctx.Done():
			return
		case <-l.reportKick:
		case <-again.C:
			l.mu.Lock()
			l.acked = false
			l.mu.Unlock()
		}
		for failures := 0; ; {
			l.mu.Lock()
			r, need := l.report, l.reportSet && !l.acked
			l.acked = true // what changes from here on clears it again
			l.mu.Unlock()
			if !need {
				break
			}
			start := l.now()
			call, cancel := context.WithTimeout(ctx, reportTimeout)
			err := l.o.Reporter.Report(call, r)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				failures = 0
				// Steps that come quickly are taken together: reports take a
				// third of the time at most, however large they are.
				if l.o.Fleet && !wait(ctx, 2*l.now().Sub(start)) {
					return
				}
				continue // it may have changed meanwhile
			}
			l.note("report", err.Error())
			l.mu.Lock()
			l.acked = false
			l.mu.Unlock()
			failures++
			if !wait(ctx, l.apiBackoff().delay(failures)) {
				return
			}
		}
	}
}

func (l *Loop) apiBackoff() backoff {
	if l.o.Fleet {
		return fleetBackoff
	}
	return peerBackoff
}

// resend makes the last report go out again, to an API that was away.
func (l *Loop) resend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = false
	signal(l.reportKick)
}

// setPeer records whether a peer answered and logs changes only. It returns
// true when the peer is back after having been away.
func (l *Loop) setPeer(p *peer, name string, err error) (back bool) {
	l.mu.Lock()
	was, asked := p.ok, p.asked
	p.asked = true
	if ok := err == nil; ok != was || !asked {
		p.ok, p.since = ok, l.now()
	}
	if err != nil {
		p.err = err.Error()
	} else {
		p.err = ""
	}
	starting := !p.met && l.now().Sub(p.since) < meetGrace
	p.met = p.met || err == nil
	tell := err != nil && !starting && !p.told
	told := p.told || tell
	p.told = told && err != nil
	l.mu.Unlock()
	switch {
	case tell:
		l.log.Warn("peer does not answer, trying on", "peer", name, "err", err)
		l.note(name, err.Error())
	case err != nil && !asked:
		l.log.Debug("peer does not answer yet", "peer", name, "err", err)
	case err == nil && !was && asked:
		if told {
			l.log.Info("peer answers again", "peer", name)
		}
		return true
	}
	return false
}
