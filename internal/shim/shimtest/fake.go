package shimtest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"github.com/hearth-sh/hearth/internal/shim"
)

// Behaviour is what a runtime of the Fake does.
type Behaviour int

// The behaviours. Working executes the probe, on wazero.
const (
	Working Behaviour = iota
	Hollow
	Broken
	Unstartable
	Stuck
	Chatty
	Echoing
	Exiting
	Missing
)

// Fake is a Node and CacheNode in memory, whose runtimes behave as they are
// told. It shows faults that real parts do not show on command, and lets the
// monitor's tests run on a synthetic clock.
type Fake struct {
	mu         sync.Mutex // guards all below
	behaviours map[string]Behaviour
	server     shim.Server
	gone       chan struct{} // closed while containerd is stopped
	left       []string
	runs       map[string]int
	images     map[string]*fakeImage

	turn chan struct{} // one container at a time
}

type fakeImage struct {
	wasm     bool
	labels   map[shim.CompileKey]bool
	blobs    map[shim.CompileKey]bool
	compiled int
}

// FakeKey is the compile key of every working runtime of a Fake.
var FakeKey = shim.CompileKey{Shim: "fake", Engine: "17767192358106208183"}

// NewFake returns a Fake that answers, without runtimes.
func NewFake() *Fake {
	return &Fake{
		behaviours: map[string]Behaviour{},
		server:     shim.Server{UUID: "fake", PID: 1},
		gone:       make(chan struct{}),
		runs:       map[string]int{},
		images:     map[string]*fakeImage{},
		turn:       make(chan struct{}, 1),
	}
}

// Runtime adds a runtime, or changes what it does.
func (f *Fake) Runtime(name string, behaviour Behaviour) shim.Runtime {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.behaviours[name] = behaviour
	return shim.Runtime{
		Name: name, Kind: shim.KindCommand, Handler: name,
		RuntimeType: "io.containerd." + name + ".v1",
		Binary:      "/usr/local/bin/containerd-shim-" + name + "-v1", Version: "1.0.0",
	}
}

// Stop makes the containerd go away, also under a run in progress.
func (f *Fake) Stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped() {
		close(f.gone)
	}
}

// Start brings a containerd back, as another process.
func (f *Fake) Start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped() {
		f.gone = make(chan struct{})
		f.server.PID++
	}
}

// stopped is called with mu held.
func (f *Fake) stopped() bool {
	select {
	case <-f.gone:
		return true
	default:
		return false
	}
}

// Runs says how often a runtime was run.
func (f *Fake) Runs(handler string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.runs[handler]
}

// Abandon leaves a container behind.
func (f *Fake) Abandon() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left = append(f.left, "abandoned")
}

// Left names the containers that are there.
func (f *Fake) Left() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.left)
}

// Server implements shim.Node.
func (f *Fake) Server(context.Context) (shim.Server, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped() {
		return shim.Server{}, unreachable(shim.StageConnect)
	}
	return f.server, nil
}

// Clean implements shim.Node.
func (f *Fake) Clean(context.Context) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped() {
		return 0, unreachable(shim.StageConnect)
	}
	removed := len(f.left)
	f.left = nil
	return removed, nil
}

func unreachable(stage shim.Stage) error {
	return &shim.RunError{Stage: stage, Err: shim.ErrUnreachable}
}

// enter waits for the turn and says how the runtime behaves.
func (f *Fake) enter(ctx context.Context, runtime shim.Runtime) (behaviour Behaviour, gone chan struct{}, leave func(), err error) {
	select {
	case f.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, nil, nil, &shim.RunError{Stage: shim.StagePrepare, Err: context.Cause(ctx)}
	}
	leave = func() { <-f.turn }
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped() {
		leave()
		return 0, nil, nil, unreachable(shim.StageConnect)
	}
	f.runs[runtime.Handler]++
	behaviour, known := f.behaviours[runtime.Name]
	if !known || behaviour == Missing {
		leave()
		return 0, nil, nil, &shim.RunError{Stage: shim.StageCreate, Err: shim.ErrShimNotFound}
	}
	if behaviour == Broken {
		leave()
		return 0, nil, nil, &shim.RunError{Stage: shim.StageCreate, Err: fmt.Errorf("broken on purpose")}
	}
	return behaviour, f.gone, leave, nil
}

// Run implements shim.Node.
func (f *Fake) Run(ctx context.Context, runtime shim.Runtime, nonce string) (shim.Output, error) {
	behaviour, gone, leave, err := f.enter(ctx, runtime)
	if err != nil {
		return shim.Output{}, err
	}
	defer leave()
	switch behaviour {
	case Unstartable:
		return shim.Output{}, &shim.RunError{Stage: shim.StageStart, Err: fmt.Errorf("not today")}
	case Stuck:
		select {
		case <-ctx.Done():
			return shim.Output{}, &shim.RunError{Stage: shim.StageAnswer, Err: context.Cause(ctx)}
		case <-gone:
			return shim.Output{}, unreachable(shim.StageAnswer)
		}
	case Chatty:
		return shim.Output{Stdout: bytes.Repeat([]byte("y"), 16<<10), Truncated: true}, nil
	case Echoing:
		return shim.Output{Stdout: []byte(nonce + "\n")}, nil
	case Exiting:
		return shim.Output{ExitStatus: 1, Stderr: []byte("out of luck\n")}, nil
	case Hollow:
		return shim.Output{}, nil
	default:
		output, err := execute(ctx, nonce)
		if err != nil {
			return shim.Output{}, &shim.RunError{Stage: shim.StageAnswer, Err: err}
		}
		return shim.Output{Stdout: output, CompileKeys: []shim.CompileKey{FakeKey}}, nil
	}
}

// execute runs the probe as an engine would.
func execute(ctx context.Context, nonce string) ([]byte, error) {
	engine := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer engine.Close(ctx)
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, engine); err != nil {
		return nil, err
	}
	var output bytes.Buffer
	config := wazero.NewModuleConfig().WithArgs("/probe.wasm", nonce).WithStdout(&output)
	if _, err := engine.InstantiateWithConfig(ctx, shim.ProbeModule(), config); err != nil {
		return nil, err
	}
	return output.Bytes(), nil
}

// Image adds an image that is not compiled.
func (f *Fake) Image(name string, wasm bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images[name] = &fakeImage{wasm: wasm, labels: map[shim.CompileKey]bool{}, blobs: map[shim.CompileKey]bool{}}
}

// Evict forgets an image's compiled code, not that there was some.
func (f *Fake) Evict(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.images[name].blobs)
}

// Compilations says how often an image was compiled.
func (f *Fake) Compilations(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.images[name].compiled
}

// CreateTask implements shim.CacheNode.
func (f *Fake) CreateTask(ctx context.Context, runtime shim.Runtime, name string) error {
	behaviour, _, leave, err := f.enter(ctx, runtime)
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	defer f.mu.Unlock()
	image := f.images[name]
	if behaviour == Working && image != nil && image.wasm && !image.blobs[FakeKey] {
		image.compiled++
		image.labels[FakeKey], image.blobs[FakeKey] = true, true
	}
	return nil
}

// Compiled implements shim.CacheNode.
func (f *Fake) Compiled(_ context.Context, name string) (shim.ImageCache, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	cache := shim.ImageCache{Image: name}
	if f.stopped() {
		return cache, unreachable(shim.StageConnect)
	}
	image := f.images[name]
	if image == nil {
		return cache, fmt.Errorf("%s: %w", name, shim.ErrImageNotFound)
	}
	if !image.wasm {
		return cache, fmt.Errorf("%s: %w", name, shim.ErrNotCompilable)
	}
	cache.Digest = "sha256:" + name
	cache.WasmLayers = []string{"layer"}
	for key := range maps.Keys(image.labels) {
		if image.blobs[key] {
			cache.Complete = append(cache.Complete, key)
		} else {
			cache.Partial = append(cache.Partial, key)
		}
	}
	return cache, nil
}
