// Package engine is a node's data plane for functions: it accepts HTTP on the
// public listener, routes each request to a function by host or path, and
// passes it to the worker process that runs the function's guests.
//
// It owns routing, admission (concurrency, queues, deadlines), worker
// processes from start to kill, function logs and the control socket by which
// an agent tells it what to serve. It never runs guest code itself, never
// writes to the store, knows nothing of registries, Kubernetes or clouds, and
// keeps no state beyond logs: after a restart the agent sends everything again.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

const (
	// headerLimit bounds reading a request's header, from the connection's
	// first byte: slower clients hold a connection and nothing else.
	headerLimit = 10 * time.Second
	// idleLimit is how long a kept-alive connection may be quiet.
	idleLimit = 2 * time.Minute
	// maxHeaderBytes bounds a request's header.
	maxHeaderBytes = 64 << 10
	// defaultDrainLimit is for a single machine, where somebody waits for the end.
	defaultDrainLimit = 5 * time.Second
	// sweepInterval is how often old logs are looked for.
	sweepInterval = time.Hour
	// defaultOverheadBytes is enough for a hundred Go functions' code and a
	// few guests that recurse to the end of their stacks at once.
	defaultOverheadBytes = 512 << 20
)

// Isolation says which functions may share a worker process.
type Isolation string

const (
	// IsolationTenant, the default, gives each tenant a process.
	IsolationTenant Isolation = "tenant"
	// IsolationFunction gives each function a process.
	IsolationFunction Isolation = "function"
	// IsolationShared runs everything in one process.
	IsolationShared Isolation = "shared"
)

// Options is what an engine needs. Listener, ControlSocket, LogDir and
// WorkerCommand are required.
type Options struct {
	// Name tells this engine's forwarded requests from others'; the host's name
	// when empty.
	Name string
	// Listener accepts public HTTP. Run closes it.
	Listener net.Listener
	// Probes, if not nil, answers /livez, /readyz and /metrics to kubelet and
	// Prometheus; they never share an address with tenants. Run closes it.
	Probes net.Listener
	// ControlSocket is where to listen for the agent.
	ControlSocket string
	// APISocket is the unix socket that control paths are passed to when asked
	// for under the base domain, localhost or an address; empty for none.
	APISocket string
	// BaseDomain is what function names are prefixed to while the agent names no
	// other; "localhost" when empty.
	BaseDomain string
	// LogDir holds one NDJSON file per function and one rotated one.
	LogDir string
	// LogOutput gets every line of every function's log as well, as
	// control.LogRecord lines; nil for none. A slow one loses lines.
	LogOutput io.Writer
	// Isolation is IsolationTenant when empty.
	Isolation Isolation
	// WorkerCommand starts a worker; nothing is appended to it.
	WorkerCommand []string
	// WorkerEnv is added to the (empty) environment of workers.
	WorkerEnv []string
	// WorkerMemoryBytes caps the linear memory of a worker's guests together;
	// 0 means half of the machine's memory.
	WorkerMemoryBytes uint64
	// WorkerOverheadBytes is what a worker may use beyond that: code, Go's
	// heap, stacks of guests that recurse. A worker whose resident memory
	// exceeds both together is killed. 0 means 512 MiB.
	WorkerOverheadBytes uint64
	// StoreDir is the store's objects directory, the only thing workers may
	// read. Empty means no file system confinement by path, for tests only.
	StoreDir string
	// WorkerStderr receives what workers print, which is crash reports at
	// most; os.Stderr when nil.
	WorkerStderr *os.File
	// RequireSandbox refuses to run workers where the kernel lacks a part of
	// the sandbox, instead of running with what there is and saying so.
	RequireSandbox bool
	// ShutdownDelay is how long Run serves on, though no longer ready, when ctx
	// ends: whoever balances load over engines learns with a delay that this
	// one goes.
	ShutdownDelay time.Duration
	// TenantRate is how many requests a second the functions of one tenant may
	// answer here on average, two seconds' worth at once; 0: no limit.
	TenantRate float64
	// AgentSilence is how long an agent may be silent before other nodes are
	// asked what changes; 10 s when 0.
	AgentSilence time.Duration
	// DrainLimit is how long requests in flight may take after that; 5 s when 0.
	DrainLimit time.Duration
	Logger     *slog.Logger
}

// closeListeners is for when Run gives up before serving; what went wrong
// first is what is reported.
func (o Options) closeListeners() {
	_ = o.Listener.Close()
	if o.Probes != nil {
		_ = o.Probes.Close()
	}
}

// Engine is a running engine. Run makes one.
type Engine struct {
	options    Options
	logger     *slog.Logger
	metrics    *metrics
	logs       *logStore
	api        *httputil.ReverseProxy // nil when there is no API
	protection *http.CrossOriginProtection
	credential *syscall.Credential
	rssLimit   uint64
	hangups    *hangups
	peers      *peers
	touch      *touch
	readAhead  atomic.Int64 // bytes that all requests hold in theirs
	routing    atomic.Pointer[routing]
	noteOnce   sync.Once
	// ending is done when Run is asked to end: followed logs end with it,
	// function requests may finish.
	ending context.Context

	mu         sync.RWMutex
	functions  map[string]*function
	processes  map[string]*process
	rates      map[string]*rate // by tenant
	generation uint64
	loads      uint64 // numbers revisions
	started    int    // numbers workers
	version    uint64
	changed    chan struct{} // closed and replaced with each version
	stopping   bool
	// background counts goroutines that unload and stop workers.
	background sync.WaitGroup
}

// Run serves until ctx ends and for ShutdownDelay more, then lets requests in
// flight finish within DrainLimit, ends all workers and returns nil; or an
// error when it could not start or a listener failed.
func Run(ctx context.Context, o Options) error {
	e, err := newEngine(o)
	if err != nil {
		o.closeListeners()
		return err
	}
	e.ending = ctx
	defer e.logs.closeAll()
	controlListener, err := localsocket.Listen(o.ControlSocket)
	if err != nil {
		_ = e.hangups.close()
		o.closeListeners()
		return fmt.Errorf("listen for the agent: %w", err)
	}
	// Having the control socket proves that no other engine uses the
	// directory, so these are a dead one's.
	if stale, err := filepath.Glob(workerSocket(o.ControlSocket, "*")); err == nil {
		for _, path := range stale {
			_ = os.Remove(path) // one that stays is replaced when its name comes up
		}
	}
	errorLog := slog.NewLogLogger(e.logger.Handler(), slog.LevelDebug)
	public := &http.Server{
		Handler:           e,
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          errorLog,
		ConnContext:       keepConnection,
	}
	private := &http.Server{
		Handler:           e.controlHandler(),
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       idleLimit,
		ErrorLog:          errorLog,
	}
	failed := make(chan error, 4)
	var group sync.WaitGroup
	group.Go(func() {
		if err := e.hangups.run(); err != nil {
			failed <- err
		}
	})
	serve := func(s *http.Server, l net.Listener, what string) {
		group.Go(func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", what, err)
			}
		})
	}
	serve(public, o.Listener, "functions")
	serve(private, controlListener, "the agent")
	probes := &http.Server{
		Handler:           e.probeHandler(),
		ReadHeaderTimeout: headerLimit,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          errorLog,
	}
	if o.Probes != nil {
		serve(probes, o.Probes, "probes")
	}
	sweeping, stopSweep := context.WithCancel(ctx)
	group.Go(func() { e.sweep(sweeping) })
	group.Go(func() { e.touch.run(sweeping) })
	e.logger.Info("engine ready", "listen", o.Listener.Addr().String(), "isolation", string(e.options.Isolation))

	var result error
	select {
	case <-ctx.Done():
		// Clients that keep connections open take the next request elsewhere.
		public.SetKeepAlivesEnabled(false)
		select {
		case <-time.After(o.ShutdownDelay):
		case result = <-failed:
		}
	case result = <-failed:
	}
	stopSweep()
	e.touch.end()
	drain, cancel := context.WithTimeout(context.Background(), e.options.DrainLimit)
	defer cancel()
	// A request that does not end in time is cut by Close.
	_ = public.Shutdown(drain)
	_ = public.Close()
	_ = private.Close()
	_ = probes.Close()
	_ = e.hangups.close() // only ends its run
	group.Wait()
	e.peers.close()
	e.stop()
	return result
}

func newEngine(o Options) (*Engine, error) {
	if o.Listener == nil || o.ControlSocket == "" || o.LogDir == "" || len(o.WorkerCommand) == 0 {
		return nil, errors.New("the engine needs a listener, a control socket, a log directory and a worker command")
	}
	if o.BaseDomain == "" {
		o.BaseDomain = "localhost"
	}
	o.BaseDomain = canonicalHost(o.BaseDomain)
	if o.DrainLimit == 0 {
		o.DrainLimit = defaultDrainLimit
	}
	switch o.Isolation {
	case "":
		o.Isolation = IsolationTenant
	case IsolationTenant, IsolationFunction, IsolationShared:
	default:
		return nil, fmt.Errorf("isolation %q is none of tenant, function and shared", o.Isolation)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.WorkerStderr == nil {
		o.WorkerStderr = os.Stderr
	}
	if o.WorkerMemoryBytes == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, fmt.Errorf("ask how much memory the machine has: %w", err)
		}
		o.WorkerMemoryBytes = info.Totalram * uint64(info.Unit) / 2
	}
	if o.WorkerOverheadBytes == 0 {
		o.WorkerOverheadBytes = defaultOverheadBytes
	}
	if o.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("find the host's name: %w", err)
		}
		o.Name = name
	}
	m := newMetrics()
	logs, err := newLogStore(o.LogDir, m, o.Logger)
	if err != nil {
		return nil, err
	}
	if o.LogOutput != nil {
		logs.mirror = newLogMirror(o.LogOutput, m)
	}
	e := &Engine{
		options: o, logger: o.Logger, metrics: m, logs: logs,
		functions: make(map[string]*function),
		processes: make(map[string]*process),
		rates:     make(map[string]*rate),
		version:   rand.Uint64()>>16 + 1,
		changed:   make(chan struct{}),
		rssLimit:  o.WorkerMemoryBytes + o.WorkerOverheadBytes,
	}
	e.routing.Store(&routing{base: o.BaseDomain})
	e.peers = newPeers(o.Name)
	e.touch = newTouch(e, o.AgentSilence)
	if e.hangups, err = newHangups(); err != nil {
		logs.closeAll()
		return nil, err
	}
	if e.credential = sandbox.Credential(); e.credential != nil {
		for _, path := range []string{o.WorkerCommand[0], o.StoreDir} {
			if blocked := notReachable(path); blocked != "" {
				e.logger.Warn("workers keep the engine's own account, because another could not reach what they need",
					"need", path, "blocked", blocked)
				e.credential = nil
				break
			}
		}
	}
	e.protection = http.NewCrossOriginProtection()
	e.protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeProblem(w, problem(http.StatusForbidden, "cross-origin",
			"the API takes no changes that a page of another origin asks a browser for", false))
	}))
	if o.APISocket != "" {
		e.api = &httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(&url.URL{Scheme: "http", Host: "api"})
				r.Out.Host = r.In.Host
				r.SetXForwarded()
			},
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return localsocket.Dial(ctx, o.APISocket)
				},
				MaxIdleConnsPerHost: 64,
				IdleConnTimeout:     30 * time.Second,
				DisableCompression:  true,
			},
			FlushInterval: -1, // logs that are followed
			ErrorLog:      slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
				e.logger.Debug("API not reached", "path", r.URL.Path, "error", err)
				w.Header().Set("Retry-After", "1")
				writeProblem(w, problem(http.StatusServiceUnavailable, "api-unavailable",
					"the API does not answer at the moment", true))
			},
		}
	}
	return e, nil
}

// workerSocket is where the worker of that id listens.
func workerSocket(control, id string) string {
	return filepath.Join(filepath.Dir(control), "w-"+id+".sock")
}

// notReachable gives the first directory on the way to path, or path itself,
// that other accounts cannot go through; empty when there is none.
func notReachable(path string) string {
	if path == "" || strings.HasPrefix(path, "/proc/") {
		return ""
	}
	for at := filepath.Clean(path); ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil || info.Mode().Perm()&0o001 == 0 {
			return at
		}
		if at == "/" || at == "." {
			return ""
		}
	}
}

func (e *Engine) noteSandbox(notes []string) {
	e.noteOnce.Do(func() {
		e.logger.Warn("workers run without a part of their sandbox", "missing", notes)
	})
}

// bump tells waiting readers of the status that it changed.
func (e *Engine) bump() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bumpLocked()
}

func (e *Engine) bumpLocked() {
	e.version++
	close(e.changed)
	e.changed = make(chan struct{})
}

// apply makes s what the engine serves.
func (e *Engine) apply(s control.State) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return errors.New("the engine is ending")
	}
	e.touch.told(s)
	again := s.Generation != e.generation
	e.generation = s.Generation
	table := &routing{base: e.options.BaseDomain}
	if s.BaseDomain != "" {
		if base := canonicalHost(s.BaseDomain); validHost(base) {
			table.base = base
		} else {
			e.logger.Warn("base domain of the state ignored: it is no DNS name", "domain", s.BaseDomain)
		}
	}
	named := make(map[string]bool, len(s.Functions))
	for _, spec := range s.Functions {
		if !validLabel(spec.Name) || named[spec.Name] {
			e.logger.Warn("entry of the state ignored: its name is no DNS label or named twice", "function", spec.Name)
			continue
		}
		named[spec.Name] = true
		e.applyFunction(spec, again)
		e.applyReach(e.functions[spec.Name], spec.Reach, spec.TimeoutMS, table)
	}
	for _, p := range s.Pending {
		if validLabel(p.Name) && validLabel(p.Tenant) && !named[p.Name] {
			named[p.Name] = true
			e.applyPending(p)
			e.applyReach(e.functions[p.Name], p.Reach, p.TimeoutMS, table)
		}
	}
	table.sort()
	e.routing.Store(table)
	for name, f := range e.functions {
		if !named[name] {
			e.removeFunction(f)
		}
	}
	e.forgetRates()
	e.bumpLocked()
	return nil
}

// rateOf is what is left of a tenant's rate.
func (e *Engine) rateOf(tenant string) *rate {
	r := e.rates[tenant]
	if r == nil {
		r = newRate(e.options.TenantRate)
		e.rates[tenant] = r
	}
	return r
}

// forgetRates drops those of tenants without functions, unless they are still
// being used up: deleting a function and making it again buys nothing.
func (e *Engine) forgetRates() {
	used := make(map[string]bool, len(e.rates))
	for _, f := range e.functions {
		used[f.tenant] = true
	}
	now := time.Since(e.touch.born)
	for tenant, r := range e.rates {
		if !used[tenant] && r.idle(now) {
			delete(e.rates, tenant)
		}
	}
}

func (e *Engine) applyFunction(spec control.Function, again bool) {
	f := e.functions[spec.Name]
	if f != nil && f.tenant != spec.Tenant {
		e.removeFunction(f)
		f = nil
	}
	if f == nil {
		f = &function{name: spec.Name, tenant: spec.Tenant, rate: e.rateOf(spec.Tenant)}
		f.limiter.limit = spec.Concurrency
		e.functions[spec.Name] = f
	}
	if err := checkSpec(spec); err != nil {
		f.invalid = &v1alpha1.FunctionError{Code: control.ErrorInvalid, Detail: err.Error()}
		f.number = spec.Revision
		return
	}
	f.invalid = nil
	if f.wanted != nil && sameSpec(f.wanted.spec, spec) {
		f.wanted.mu.Lock()
		failed := f.wanted.failure != nil
		f.wanted.mu.Unlock()
		if !failed || !again {
			return
		}
	}
	serving := f.serving.Load()
	if serving != nil && f.wanted != serving && sameSpec(serving.spec, spec) {
		// Back to what answers already.
		e.retire(f.wanted)
		f.wanted = serving
		return
	}
	p := e.processFor(spec)
	e.loads++
	r := newRevision(spec, f, p, e.loads)
	if f.wanted != nil && f.wanted != serving {
		e.retire(f.wanted)
	}
	f.wanted = r
	p.add(r)
}

// applyPending makes a name known that has nothing to answer with yet. What
// answered under it before is no revision of it any more.
func (e *Engine) applyPending(p control.Pending) {
	f := e.functions[p.Name]
	if f != nil && f.tenant == p.Tenant && f.wanted == nil && f.invalid == nil && f.serving.Load() == nil {
		return
	}
	if f != nil {
		e.removeFunction(f)
	}
	f = &function{name: p.Name, tenant: p.Tenant, rate: e.rateOf(p.Tenant)}
	f.limiter.limit = v1alpha1.DefaultConcurrency
	e.functions[p.Name] = f
}

// applyReach says by which hosts a function is reached, and where it is beside
// here.
func (e *Engine) applyReach(f *function, r control.Reach, timeoutMS int, table *routing) {
	for _, route := range r.Routes {
		if err := table.add(route, f.name); err != nil {
			e.logger.Warn("route of a function ignored", "function", f.name, "reason", err.Error())
		}
	}
	if timeoutMS <= 0 || timeoutMS > v1alpha1.MaxTimeoutMS {
		timeoutMS = v1alpha1.MaxTimeoutMS
	}
	there := &elsewhere{timeout: time.Duration(timeoutMS) * time.Millisecond}
	if there.peers = addresses(r.Peers); len(there.peers) < min(len(r.Peers), v1alpha1.MaxPeers) {
		e.logger.Warn("a peer of a function ignored: it is no IP address and port", "function", f.name, "peers", r.Peers)
	}
	f.elsewhere.Store(there)
}

func (e *Engine) removeFunction(f *function) {
	delete(e.functions, f.name)
	serving := f.serving.Load()
	if serving != nil {
		e.retire(serving)
	}
	if f.wanted != nil && f.wanted != serving {
		e.retire(f.wanted)
	}
}

// retire lets a revision's requests end and unloads it.
func (e *Engine) retire(r *revision) {
	r.retire()
	e.background.Go(func() { r.worker.forget(r) })
}

// processFor gives the worker of a function, starting it when it is the first.
func (e *Engine) processFor(spec control.Function) *process {
	key, tenant := "t/"+spec.Tenant, spec.Tenant
	switch e.options.Isolation {
	case IsolationFunction:
		key = "f/" + spec.Tenant + "/" + spec.Name
	case IsolationShared:
		key, tenant = "shared", ""
	}
	p := e.processes[key]
	if p == nil {
		e.started++
		p = newProcess(e, strconv.Itoa(e.started), tenant)
		e.processes[key] = p
	}
	return p
}

// retireProcess stops a worker that has no functions left.
func (e *Engine) retireProcess(p *process) {
	e.mu.Lock()
	p.mu.Lock()
	empty := len(p.revisions) == 0
	p.mu.Unlock()
	found := false
	if empty {
		for key, q := range e.processes {
			if q == p {
				delete(e.processes, key)
				found = true
			}
		}
	}
	e.mu.Unlock()
	if found {
		p.stop()
		e.bump()
	}
}

// loaded switches a function to a revision that is ready.
func (e *Engine) loaded(r *revision) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.bumpLocked()
	f := r.function
	r.mu.Lock()
	ready := r.progress == v1alpha1.ProgressReady
	r.mu.Unlock()
	if !ready || f.wanted != r || e.functions[f.name] != f {
		return
	}
	old := f.serving.Swap(r)
	f.limiter.resize(r.spec.Concurrency)
	if old != nil && old != r {
		e.retire(old)
	}
}

// find gives the function of a request. Right after a start the engine has not
// been told yet what there is: it waits for that, so that its restart is not
// taken for the end of functions.
func (e *Engine) find(ctx context.Context, name string) (f *function, told bool) {
	t := time.NewTimer(restartWait)
	defer t.Stop()
	for {
		e.mu.RLock()
		f, told = e.functions[name], e.generation != 0
		changed := e.changed
		e.mu.RUnlock()
		if told {
			return f, true
		}
		select {
		case <-changed:
		case <-t.C:
			return nil, false
		case <-ctx.Done():
			return nil, false
		}
	}
}

// awaitServing waits while a function's first revision is being loaded, as all
// are when the engine was restarted; nil when none can answer.
func (e *Engine) awaitServing(ctx context.Context, f *function) *revision {
	t := time.NewTimer(restartWait)
	defer t.Stop()
	for {
		e.mu.RLock()
		loading := e.functions[f.name] == f && f.invalid == nil && f.wanted != nil
		if loading {
			f.wanted.mu.Lock()
			loading = f.wanted.failure == nil
			f.wanted.mu.Unlock()
		}
		changed := e.changed
		e.mu.RUnlock()
		if r := f.serving.Load(); r != nil || !loading {
			return r
		}
		select {
		case <-changed:
		case <-t.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// lookup finds a function by name.
func (e *Engine) lookup(name string) *function {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.functions[name]
}

// snapshot gives the status and a channel that is closed when it changes.
func (e *Engine) snapshot() (control.Status, <-chan struct{}) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	s := control.Status{
		Version: e.version, Generation: e.generation, OutOfTouch: e.touch.lost.Load(),
		Functions: make([]control.FunctionStatus, 0, len(e.functions)),
		Workers:   make([]control.WorkerStatus, 0, len(e.processes)),
	}
	for _, f := range e.functions {
		s.Functions = append(s.Functions, f.status())
	}
	for _, p := range e.processes {
		s.Workers = append(s.Workers, p.status())
	}
	slices.SortFunc(s.Functions, func(a, b control.FunctionStatus) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(s.Workers, func(a, b control.WorkerStatus) int { return strings.Compare(a.ID, b.ID) })
	return s, e.changed
}

// status is called with Engine.mu held.
func (f *function) status() control.FunctionStatus {
	s := control.FunctionStatus{
		Name: f.name, Tenant: f.tenant,
		Progress: v1alpha1.ProgressLoading,
		Requests: f.requests.Load(), Failures: f.failures.Load(),
	}
	s.InFlight, s.Queued = f.limiter.load()
	if r := f.serving.Load(); r != nil {
		s.Serving = r.spec.Revision
	}
	switch r := f.wanted; {
	case f.invalid != nil:
		s.Wanted, s.Progress, s.Error = f.number, v1alpha1.ProgressFailed, f.invalid
	case r != nil:
		r.mu.Lock()
		s.Wanted, s.Progress, s.Phases, s.Error = r.spec.Revision, r.progress, r.phases, r.failure
		if r.conn == nil && r.progress == v1alpha1.ProgressReady {
			s.Progress = v1alpha1.ProgressLoading // its worker is being restarted
			if s.Serving == r.spec.Revision {
				s.Serving = 0
			}
		}
		r.mu.Unlock()
	}
	return s
}

// sweep removes old logs now and then.
func (e *Engine) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		e.logs.sweep(func(tenant, name string) bool {
			f := e.lookup(name)
			return f != nil && f.tenant == tenant
		})
	}
}

// stop ends all workers.
func (e *Engine) stop() {
	e.mu.Lock()
	e.stopping = true
	for _, f := range e.functions {
		e.removeFunction(f)
	}
	processes := make([]*process, 0, len(e.processes))
	for _, p := range e.processes {
		processes = append(processes, p)
	}
	e.mu.Unlock()
	var group sync.WaitGroup
	for _, p := range processes {
		group.Go(p.stop)
	}
	group.Wait()
	e.background.Wait()
}
