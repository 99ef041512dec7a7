package prefetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/registry"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(precompile.ChildMain(context.Background(), os.Stdin, os.Stdout))
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

// world is everything around a loop, scripted at the interfaces.
type world struct {
	t  *testing.T
	mu sync.Mutex
	// changed is closed and replaced whenever something below changes.
	changed chan struct{}

	// API
	desired v1alpha1.Desired
	apiErr  error
	polls   int
	reports []v1alpha1.NodeReport

	// registry
	pullErr   map[string]error // by digest
	pullBlock map[string]chan struct{}
	pulls     []string
	pulling   int
	maxPulls  int

	// store
	objects      map[string]precompile.ObjectRef
	ensureErr    map[string]error
	ensures      int
	quarantined  []string
	live         []string
	maxCompiles  int
	compiling    int
	compileBlock chan struct{}

	// engine
	engineErr error
	state     control.State
	puts      int
	// outOfTouch is what the engine says until a state comes that is not stale.
	outOfTouch bool
	version    uint64
	refuse     map[string]v1alpha1.FunctionError // by object: how often served
	refuseN    map[string]int
}

func newWorld(t *testing.T) *world {
	return &world{
		t: t, changed: make(chan struct{}), version: 1,
		pullErr: map[string]error{}, pullBlock: map[string]chan struct{}{},
		objects: map[string]precompile.ObjectRef{}, ensureErr: map[string]error{},
		refuse: map[string]v1alpha1.FunctionError{}, refuseN: map[string]int{},
	}
}

// do changes the world and wakes whoever waits for a change.
func (w *world) do(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error) {
	timer := time.NewTimer(pollWait)
	defer timer.Stop()
	w.mu.Lock()
	w.polls++
	for {
		if w.apiErr != nil {
			defer w.mu.Unlock()
			return v1alpha1.Desired{}, w.apiErr
		}
		if w.desired.Generation != after {
			defer w.mu.Unlock()
			return w.desired, nil
		}
		c := w.changed
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return v1alpha1.Desired{}, ctx.Err()
		case <-timer.C:
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.desired, nil
		case <-c:
		}
		w.mu.Lock()
	}
}

func (w *world) Report(_ context.Context, r v1alpha1.NodeReport) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.apiErr != nil {
		return w.apiErr
	}
	w.reports = append(w.reports, r)
	return nil
}

func (w *world) Pull(ctx context.Context, a v1alpha1.Artifact, dst string, o registry.PullOptions) (registry.Pulled, error) {
	w.mu.Lock()
	w.pulls = append(w.pulls, a.Digest)
	w.pulling++
	w.maxPulls = max(w.maxPulls, w.pulling)
	err, block := w.pullErr[a.Digest], w.pullBlock[a.Digest]
	w.mu.Unlock()
	defer func() { w.mu.Lock(); w.pulling--; w.mu.Unlock() }()
	if o.Progress != nil {
		o.Progress(43, 100)
	}
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return registry.Pulled{}, ctx.Err()
		}
	}
	if err != nil {
		return registry.Pulled{}, err
	}
	if err := os.WriteFile(dst, []byte("\x00asm"+a.Digest), 0o600); err != nil {
		return registry.Pulled{}, err
	}
	return registry.Pulled{Digest: a.Digest, Size: 100, Phases: []v1alpha1.Phase{{Name: "pull", Milliseconds: 2}, {Name: "verify", Milliseconds: 1}}}, nil
}

func (w *world) Ensure(ctx context.Context, digest string, module func(context.Context) (string, error)) (precompile.ObjectRef, []v1alpha1.Phase, error) {
	if ref, ok := w.Object(digest); ok {
		return ref, nil, nil
	}
	path, err := module(ctx)
	if err != nil {
		return precompile.ObjectRef{}, nil, err
	}
	if _, err := os.Stat(path); err != nil {
		return precompile.ObjectRef{}, nil, err
	}
	w.mu.Lock()
	w.ensures++
	w.compiling++
	w.maxCompiles = max(w.maxCompiles, w.compiling)
	block := w.compileBlock
	w.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.compiling--
	if ctx.Err() != nil {
		return precompile.ObjectRef{}, nil, ctx.Err()
	}
	if err := w.ensureErr[digest]; err != nil {
		return precompile.ObjectRef{}, nil, err
	}
	ref := precompile.ObjectRef{ID: "object-" + digest, Dir: "/objects/" + digest}
	w.objects[digest] = ref
	return ref, []v1alpha1.Phase{{Name: "compile", Milliseconds: 5}, {Name: "store", Milliseconds: 1}}, nil
}

func (w *world) Object(digest string) (precompile.ObjectRef, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	ref, ok := w.objects[digest]
	return ref, ok
}

func (w *world) Quarantine(ref precompile.ObjectRef, _ string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.quarantined = append(w.quarantined, ref.ID)
	maps.DeleteFunc(w.objects, func(_ string, r precompile.ObjectRef) bool { return r.ID == ref.ID })
	return nil
}

func (w *world) SetLive(ds []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.live = slices.Clone(ds)
}

func (w *world) PutState(_ context.Context, s control.State) error {
	w.mu.Lock()
	if err := w.engineErr; err != nil {
		w.mu.Unlock()
		return err
	}
	w.mu.Unlock()
	w.do(func() { w.state = s; w.puts++; w.version++; w.outOfTouch = w.outOfTouch && s.Stale })
	return nil
}

func (w *world) Status(ctx context.Context, after uint64, wait time.Duration) (control.Status, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	w.mu.Lock()
	for {
		if w.engineErr != nil {
			defer w.mu.Unlock()
			return control.Status{}, w.engineErr
		}
		if w.version != after {
			defer w.mu.Unlock()
			return w.status(), nil
		}
		c := w.changed
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return control.Status{}, ctx.Err()
		case <-timer.C:
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.status(), nil
		case <-c:
		}
		w.mu.Lock()
	}
}

func (w *world) status() control.Status {
	s := control.Status{Version: w.version, Generation: w.state.Generation, OutOfTouch: w.outOfTouch}
	for _, f := range w.state.Functions {
		fs := control.FunctionStatus{Name: f.Name, Wanted: f.Revision, Serving: f.Revision, Progress: v1alpha1.ProgressReady,
			Phases: []v1alpha1.Phase{{Name: "load", Milliseconds: 3}, {Name: "instantiate", Milliseconds: 1}}}
		if e, ok := w.refuse[f.Object]; ok {
			fs.Serving, fs.Progress, fs.Error, fs.Phases = 0, v1alpha1.ProgressFailed, &e, nil
		}
		s.Functions = append(s.Functions, fs)
	}
	return s
}

// restartEngine forgets its state, as a new process would.
func (w *world) restartEngine() {
	w.do(func() { w.state = control.State{}; w.version += 1000; w.engineErr = nil })
}

func digestOf(name string, rev int) string {
	return fmt.Sprintf("sha256:%064x", fmt.Sprintf("%s-%d", name, rev))[:71]
}

func art(name string, rev int) v1alpha1.Artifact {
	return v1alpha1.Artifact{Repository: "functions/" + name, Digest: digestOf(name, rev)}
}

const secretValue = "hunter2-very-secret"

func want(name string, revs ...int) v1alpha1.DesiredFunction {
	f := v1alpha1.DesiredFunction{Name: name, Tenant: "default"}
	for _, r := range revs {
		f.Candidates = append(f.Candidates, v1alpha1.DesiredRevision{
			Revision: r, Artifact: art(name, r), MemoryMiB: 128, TimeoutMS: 1000, Concurrency: 2,
			Secrets: map[string]string{"TOKEN": secretValue},
		})
	}
	return f
}

// submit makes fs the desired state.
func (w *world) submit(fs ...v1alpha1.DesiredFunction) {
	w.do(func() {
		w.desired = v1alpha1.Desired{Generation: w.desired.Generation + 1, Functions: fs}
	})
}

func (w *world) last(name string) v1alpha1.FunctionReport {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.reports) == 0 {
		return v1alpha1.FunctionReport{}
	}
	for _, f := range w.reports[len(w.reports)-1].Functions {
		if f.Name == name {
			return f
		}
	}
	return v1alpha1.FunctionReport{}
}

func (w *world) engineHas(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.state.Functions {
		if f.Name == name {
			return f.Revision
		}
	}
	return 0
}

// run starts a loop in the bubble and returns it with a way to stop it.
func (w *world) run(change ...func(*Options)) (*Loop, func()) {
	w.t.Helper()
	o := Options{Source: w, Reporter: w, Puller: w, Store: w, Engine: w, Node: "n1", TempDir: w.t.TempDir(), Compiles: 2}
	for _, f := range change {
		f(&o)
	}
	l, err := New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	synctest.Wait()
	return l, func() {
		w.t.Helper()
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		if left, _ := os.ReadDir(l.dir); len(left) > 0 {
			w.t.Errorf("temporary files left: %v", left)
		}
	}
}

// settle lets d of the bubble's time pass.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestSubmittedFunctionBecomesReadyAndIsReportedStepByStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		reg := prometheus.NewRegistry()
		l, stop := w.run(func(o *Options) { o.Registerer = reg })
		defer stop()
		block := make(chan struct{})
		w.pullBlock[digestOf("a", 1)] = block
		w.submit(want("a", 1))
		settle(0)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressPulling {
			t.Errorf("while pulling: %+v", r)
		}
		if s := l.Status(); s.Summary != "0/1 warm, 1 pulling 43 %" || s.Functions[0].Percent != 43 {
			t.Errorf("summary %q", s.Summary)
		}
		close(block)
		settle(0)
		r := w.last("a")
		var names []string
		for _, p := range r.Phases {
			names = append(names, p.Name)
		}
		if r.Progress != v1alpha1.ProgressReady || r.Serving != 1 || strings.Join(names, " ") != "pull verify compile store load instantiate" {
			t.Errorf("ready: %+v", r)
		}
		if s := l.Status(); s.Summary != "1/1 warm" || !s.API.OK || !s.Engine.OK {
			t.Errorf("%+v", s)
		}
		if !slices.Equal(w.live, []string{digestOf("a", 1)}) {
			t.Errorf("live %v", w.live)
		}
		families, err := reg.Gather()
		series := 0
		for _, f := range families {
			series += len(f.GetMetric())
		}
		if err != nil || series != 4+5+1 { // phases, states, bytes
			t.Errorf("%d series, %v", series, err)
		}
		// Nothing changes: nothing is said.
		n, puts := len(w.reports), w.puts
		settle(10 * time.Minute)
		if len(w.reports) != n || w.puts != puts || len(w.pulls) != 1 {
			t.Errorf("idle: %d reports, %d states, %d pulls", len(w.reports)-n, w.puts-puts, len(w.pulls))
		}
		if w.polls > 30 {
			t.Errorf("%d polls in ten idle minutes", w.polls)
		}
	})
}

func TestRevisionOfAnArtifactThatWasThereIsNotChargedForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(0)
		// New settings make a revision of the same artifact.
		f := want("a", 2)
		f.Candidates[0].Artifact = art("a", 1)
		w.submit(f)
		settle(time.Second)
		r := w.last("a")
		for _, p := range r.Phases {
			if p.Name != "load" && p.Name != "instantiate" {
				t.Errorf("phase %s is reported although nothing was pulled or compiled", p.Name)
			}
		}
		if r.Revision != 2 || r.Progress != v1alpha1.ProgressReady {
			t.Errorf("revision 2: %+v", r)
		}
	})
}

func TestAClockThatWasSetBackMakesNoGenerationOlderThanTheEngines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		// An agent before this one fed the engine, by a clock an hour ahead.
		before := uint64(time.Now().Add(time.Hour).UnixMilli())
		w.state = control.State{Generation: before}
		_, stop := w.run()
		defer stop()
		settle(time.Second)
		w.submit(want("a", 1))
		settle(time.Second)
		if now := w.state.Generation; now <= before || w.last("a").Progress != v1alpha1.ProgressReady {
			t.Errorf("the engine was at generation %d and is given %d; %+v", before, now, w.last("a"))
		}
	})
}

func TestOldRevisionServesUntilTheNewOneIsWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(0)
		block := make(chan struct{})
		w.pullBlock[digestOf("a", 2)] = block
		f := want("a", 2, 1)
		f.Keep = []v1alpha1.Artifact{art("a", 0)}
		w.submit(f)
		settle(time.Second)
		if r := w.last("a"); r.Revision != 2 || r.Serving != 1 || r.Progress != v1alpha1.ProgressPulling || w.engineHas("a") != 1 {
			t.Errorf("meanwhile: %+v, engine has %d", r, w.engineHas("a"))
		}
		if len(w.live) != 3 {
			t.Errorf("live: %v", w.live)
		}
		close(block)
		settle(0)
		if r := w.last("a"); r.Serving != 2 || r.Progress != v1alpha1.ProgressReady {
			t.Errorf("after: %+v", r)
		}
		if slices.Contains(w.pulls, digestOf("a", 0)) {
			t.Error("an artifact to keep was pulled although nobody asked for it")
		}
	})
}

func TestAFunctionThatMovesAwayIsHandedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		w.submit(want("moves", 1), want("returns", 1), want("ends", 1))
		settle(0)
		gone := func(name string, peers ...string) v1alpha1.DesiredFunction {
			f := want(name)
			f.TimeoutMS, f.Peers = 1000, peers
			return f
		}
		w.submit(gone("moves", "10.0.0.2:8080"), gone("returns", "10.0.0.2:8080"), gone("ends"))
		settle(handover / 2)
		if w.engineHas("moves") != 1 || w.engineHas("returns") != 1 {
			t.Error("what others may still ask for is gone at once")
		}
		if w.engineHas("ends") != 0 {
			t.Error("what nobody else has is kept on a node that it is not placed on")
		}
		for _, name := range []string{"moves", "returns"} {
			if r := w.last(name); r.Revision != 0 {
				t.Errorf("it is still reported: %+v", r)
			}
		}
		w.submit(gone("moves", "10.0.0.3:8080"), want("returns", 1), gone("ends"))
		settle(handover)
		if w.engineHas("moves") != 0 || w.engineHas("returns") != 1 {
			t.Errorf("after the handover the engine has %d and %d", w.engineHas("moves"), w.engineHas("returns"))
		}
		if len(w.state.Pending) != 2 || !slices.Equal(w.state.Pending[1].Peers, []string{"10.0.0.3:8080"}) {
			t.Errorf("pending: %+v", w.state.Pending)
		}
	})
}

func TestFailuresAreJudged(t *testing.T) {
	d := digestOf("a", 2)
	for name, c := range map[string]struct {
		breaks   func(*world)
		heal     func(*world)
		code     string
		retrying bool
		within   time.Duration // healed by itself
	}{
		"registry down": {
			func(w *world) { w.pullErr[d] = fmt.Errorf("x: %w", registry.ErrUnavailable) },
			func(w *world) { delete(w.pullErr, d) }, "registry-unavailable", true, 2 * time.Minute,
		},
		"disk full while pulling": {
			func(w *world) { w.pullErr[d] = fmt.Errorf("x: %w", registry.ErrNoSpace) },
			func(w *world) { delete(w.pullErr, d) }, "disk-full", true, 2 * time.Minute,
		},
		"disk full while storing": {
			func(w *world) {
				w.ensureErr[d] = &precompile.Error{Code: precompile.CodeDiskFull, Detail: "full", Retryable: true}
			},
			func(w *world) { delete(w.ensureErr, d) }, "disk-full", true, 2 * time.Minute,
		},
		"registry that lies": {
			func(w *world) { w.pullErr[d] = fmt.Errorf("x: %w", registry.ErrDigestMismatch) },
			func(w *world) { delete(w.pullErr, d) }, "digest-mismatch", false, 12 * time.Minute,
		},
		"not wasm": {
			func(w *world) { w.pullErr[d] = fmt.Errorf("x: %w", registry.ErrNotWasm) },
			func(w *world) { delete(w.pullErr, d) }, "not-wasm", false, 12 * time.Minute,
		},
		"bad module": {
			func(w *world) {
				w.ensureErr[d] = &precompile.Error{Code: precompile.CodeInvalidModule, Detail: "bad section"}
			},
			func(w *world) { delete(w.ensureErr, d) }, "invalid-module", false, 12 * time.Minute,
		},
		"unknown fault": {
			func(w *world) { w.pullErr[d] = errors.New("cosmic ray") },
			func(w *world) { delete(w.pullErr, d) }, "internal", true, 2 * time.Minute,
		},
		"somebody else's cancellation": {
			func(w *world) { w.ensureErr[d] = context.Canceled },
			func(w *world) { delete(w.ensureErr, d) }, "internal", true, 2 * time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				c.breaks(w)
				l, stop := w.run()
				defer stop()
				w.submit(want("a", 2, 1))
				settle(100 * time.Millisecond)
				r := w.last("a")
				if r.Error == nil || r.Error.Code != c.code || r.Retrying != c.retrying || r.Progress != v1alpha1.ProgressFailed {
					t.Fatalf("%+v %+v", r, r.Error)
				}
				if r.Serving != 1 {
					t.Errorf("the other candidate does not serve: %+v", r)
				}
				s := l.Status()
				if (s.Retrying == 1) != c.retrying || (s.Failed == 1) == c.retrying || len(s.Recent) == 0 || !strings.Contains(s.Summary, "a: ") {
					t.Errorf("status %+v", s)
				}
				settle(5 * time.Minute)
				if n := len(w.pulls); c.retrying && (n < 6 || n > 30) || !c.retrying && n != 2 {
					t.Errorf("%d pulls in five minutes", n)
				}
				w.do(func() { c.heal(w) })
				settle(c.within)
				if r := w.last("a"); r.Progress != v1alpha1.ProgressReady || r.Serving != 2 || r.Error != nil {
					t.Errorf("not recovered: %+v %+v", r, r.Error)
				}
			})
		})
	}
}

func TestNewRevisionOfAFailedArtifactIsTriedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := digestOf("a", 1)
		w.pullErr[d] = registry.ErrDigestMismatch
		_, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(time.Second)
		delete(w.pullErr, d)
		f := want("a", 1)
		f.Candidates[0].Revision = 2
		w.submit(f)
		settle(0)
		if r := w.last("a"); r.Revision != 2 || r.Progress != v1alpha1.ProgressReady {
			t.Errorf("%+v", r)
		}
	})
}

func TestRestartedEngineGetsTheStateAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		l, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(0)
		w.restartEngine()
		settle(0)
		if w.engineHas("a") != 1 || w.last("a").Progress != v1alpha1.ProgressReady {
			t.Error("not told again")
		}
		// Away for longer: the report says so, and that it is passing.
		w.do(func() { w.engineErr = errors.New("connection refused"); w.state = control.State{} })
		settle(3 * time.Second)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady {
			t.Errorf("a short absence is news: %+v", r)
		}
		settle(30 * time.Second)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressLoading || r.Serving != 0 || r.Error == nil || !r.Retrying {
			t.Errorf("away: %+v", r)
		}
		if s := l.Status(); s.Engine.OK || s.Retrying != 1 {
			t.Errorf("%+v", s)
		}
		w.restartEngine()
		settle(10 * time.Second)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady || r.Error != nil {
			t.Errorf("back: %+v", r)
		}
	})
}

func TestUnusableObjectIsQuarantinedAndMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		obj := "object-" + digestOf("a", 1)
		w.submit(want("a", 1))
		settle(0)
		w.do(func() {
			w.version++
			w.refuse[obj] = v1alpha1.FunctionError{Code: control.ErrorObjectUnusable, Detail: "bit flip"}
		})
		settle(0)
		if len(w.quarantined) == 0 || w.ensures < 2 {
			t.Fatalf("quarantined %v, %d compiles", w.quarantined, w.ensures)
		}
		if w.engineHas("a") != 1 {
			t.Error("the engine was told to forget the function meanwhile")
		}
		settle(10 * time.Minute)
		if w.ensures > 40 {
			t.Errorf("%d compiles of an object that stays unusable in ten minutes", w.ensures)
		}
		w.do(func() { w.version++; delete(w.refuse, obj) })
		settle(2 * time.Minute)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady || r.Error != nil {
			t.Errorf("%+v", r)
		}
	})
}

func TestRevisionTheEngineRefusesFallsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		obj := "object-" + digestOf("a", 2)
		w.refuse[obj] = v1alpha1.FunctionError{Code: control.ErrorInstantiate, Detail: "traps at start"}
		w.submit(want("a", 2, 1))
		settle(time.Second)
		r := w.last("a")
		if r.Progress != v1alpha1.ProgressFailed || r.Retrying || r.Error == nil || r.Error.Code != control.ErrorInstantiate || r.Serving != 1 {
			t.Fatalf("%+v %+v", r, r.Error)
		}
		w.do(func() { delete(w.refuse, obj) })
		settle(12 * time.Minute)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady || r.Serving != 2 {
			t.Errorf("not tried again: %+v", r)
		}
	})
}

func TestAPIThatIsAwayChangesNothingAndHearsAllWhenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(0)
		n, polls := len(w.reports), w.polls
		w.do(func() { w.apiErr = errors.New("connection refused") })
		settle(10 * time.Minute)
		if w.engineHas("a") != 1 {
			t.Error("the function is gone")
		}
		if p := w.polls - polls; p > 300 {
			t.Errorf("%d polls in ten minutes of absence", p)
		}
		w.do(func() { w.apiErr = nil })
		settle(10 * time.Second)
		if len(w.reports) != n+1 || w.last("a").Progress != v1alpha1.ProgressReady {
			t.Errorf("%d reports after its return", len(w.reports)-n)
		}
	})
}

func TestStartWithoutAPIServesTheLastKnownState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		cache := filepath.Join(t.TempDir(), "desired.json")
		withCache := func(o *Options) { o.CachePath = cache }
		_, stop := w.run(withCache)
		w.submit(want("a", 1))
		settle(0)
		stop()
		st, err := os.Stat(cache)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Fatalf("%v %v", st, err)
		}
		w.do(func() { w.apiErr = errors.New("connection refused") })
		w.restartEngine()
		l, stop := w.run(withCache)
		settle(0)
		if w.engineHas("a") != 1 || w.state.Functions[0].Secrets["TOKEN"] != secretValue {
			t.Error("not served")
		}
		if s := l.Status(); !s.FromCache || s.API.OK || s.Warm != 1 {
			t.Errorf("%+v", s)
		}
		w.do(func() { w.apiErr = nil })
		settle(10 * time.Second)
		if s := l.Status(); s.FromCache || !s.API.OK {
			t.Errorf("%+v", s)
		}
		stop()
		// A damaged file is no obstacle.
		os.WriteFile(cache, []byte(`{"generation":`), 0o600)
		w.restartEngine()
		_, stop = w.run(withCache)
		settle(time.Second)
		if w.engineHas("a") != 1 {
			t.Error("not served after a damaged cache")
		}
		stop()
	})
}

func TestWorkIsBoundedAndTheNewestGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.compileBlock = make(chan struct{})
		block := make(chan struct{})
		var fs []v1alpha1.DesiredFunction
		for i := range 30 {
			f := want(fmt.Sprintf("f%02d", i), 1)
			fs = append(fs, f)
			w.pullBlock[f.Candidates[0].Artifact.Digest] = block
		}
		_, stop := w.run()
		defer stop()
		w.submit(fs...)
		settle(time.Second)
		w.submit(append(slices.Clone(fs), want("newest", 1))...)
		settle(time.Second)
		close(block)
		settle(time.Second)
		close(w.compileBlock)
		settle(time.Second)
		if w.maxPulls > 2 || w.maxCompiles > 2 {
			t.Errorf("%d pulls and %d compiles at once", w.maxPulls, w.maxCompiles)
		}
		// It is started before all that wait. Pulls take no time here, so some
		// that are started after it can overtake it in the same instant; first
		// come, first served would make it the last of 31.
		if i := slices.Index(w.pulls, digestOf("newest", 1)); i < 0 || i > 15 {
			t.Errorf("the newest was pulled as number %d", i)
		}
		if w.last("f29").Progress != v1alpha1.ProgressReady {
			t.Error("not all are ready")
		}
	})
}

func TestWorkNobodyWantsIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		block := make(chan struct{})
		w.pullBlock[digestOf("a", 1)] = block
		l, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(time.Second)
		w.submit(want("b", 1))
		settle(time.Second)
		l.mu.Lock()
		running := l.running
		l.mu.Unlock()
		if running != 0 || w.ensures != 1 {
			t.Errorf("%d jobs run, %d compiles", running, w.ensures)
		}
		// And wanted again while the cancelled one ends.
		w.submit(want("a", 1))
		w.submit()
		w.submit(want("a", 1))
		close(block)
		settle(time.Minute)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady {
			t.Errorf("%+v", r)
		}
		w.submit()
		settle(time.Second)
		if w.engineHas("a") != 0 || len(w.live) != 0 || l.Status().Summary != "no functions" {
			t.Error("deleted, but still there")
		}
	})
}

func TestRecreatedFunctionIsNotTakenForTheOldOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.run()
		defer stop()
		w.submit(want("a", 1))
		settle(0)
		f := want("a", 1)
		f.Candidates[0].Artifact = art("other", 1)
		block := make(chan struct{})
		w.pullBlock[digestOf("other", 1)] = block
		w.submit(f)
		settle(time.Second)
		if r := w.last("a"); r.Progress == v1alpha1.ProgressReady {
			t.Errorf("%+v", r)
		}
		close(block)
		settle(time.Second)
		if r := w.last("a"); r.Progress != v1alpha1.ProgressReady || w.state.Functions[0].Object != "object-"+digestOf("other", 1) {
			t.Errorf("%+v", r)
		}
	})
}

func TestSecretsAreNeitherLoggedNorReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var buf lockedBuffer
		w.pullErr[digestOf("bad", 1)] = registry.ErrNotWasm
		l, stop := w.run(func(o *Options) {
			o.Logger = slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: slog.LevelDebug}))
			o.CachePath = filepath.Join(t.TempDir(), "c", "missing-directory", "x")
		})
		w.submit(want("a", 1), want("bad", 1))
		settle(time.Second)
		w.do(func() { w.engineErr = errors.New("gone"); w.apiErr = errors.New("gone") })
		settle(time.Minute)
		out := fmt.Sprintf("%s %+v %+v", buf.String(), w.reports, l.Status())
		stop()
		if strings.Contains(out, secretValue) {
			t.Error("the secret's value leaked")
		}
		if !strings.Contains(buf.String(), "artifact is in the store") {
			t.Error("the log says nothing")
		}
	})
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestBackoffGrowsIsBoundedAndVaries(t *testing.T) {
	b := backoff{100 * time.Millisecond, 5 * time.Second}
	seen := map[time.Duration]bool{}
	for n := 1; n < 100; n++ {
		nominal := min(5*time.Second, 100*time.Millisecond<<min(n-1, 10))
		d := b.delay(n)
		if d < nominal/2 || d >= nominal*3/2 {
			t.Errorf("failure %d: %s, nominal %s", n, d, nominal)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Error("no jitter")
	}
}

func TestOptionsAreChecked(t *testing.T) {
	w := newWorld(t)
	for _, o := range []Options{{}, {Source: w, Reporter: w, Puller: w, Store: w, Engine: w}, {Source: w, Reporter: w, Puller: w, Store: w, Engine: w, Node: "n"}} {
		if _, err := New(o); err == nil {
			t.Errorf("accepted %+v", reflect.TypeOf(o))
		}
	}
}

func FuzzParseDesired(f *testing.F) {
	f.Add([]byte(`{"generation":1,"functions":[{"name":"a","candidates":[{"revision":1}]},{"name":"a"},{}]}`))
	f.Add([]byte(`{"functions":null}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, dropped, err := parseDesired(raw)
		if err != nil {
			return
		}
		if dropped < 0 {
			t.Error("negative")
		}
		seen := map[string]bool{}
		for _, fn := range d.Functions {
			if fn.Name == "" || seen[fn.Name] {
				t.Errorf("kept %+v", fn)
			}
			seen[fn.Name] = true
		}
	})
}

func BenchmarkPassOverAThousandFunctions(b *testing.B) {
	w := newWorld(nil)
	l, err := New(Options{Source: w, Reporter: w, Puller: w, Store: w, Engine: w, Node: "n", TempDir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	var fs []v1alpha1.DesiredFunction
	for i := range 1000 {
		f := want(fmt.Sprintf("f%04d", i), 2, 1)
		fs = append(fs, f)
		for _, c := range f.Candidates {
			w.objects[c.Artifact.Digest] = precompile.ObjectRef{ID: c.Artifact.Digest, Dir: "/o"}
		}
	}
	l.apply(v1alpha1.Desired{Generation: 1, Functions: fs}, false)
	for b.Loop() {
		l.pass(context.Background())
	}
}
