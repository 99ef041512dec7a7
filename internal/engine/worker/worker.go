// Package worker is the process in which guests run: one per tenant, started
// and ended by the engine, confined before it reads its first compiled object.
//
// It owns instances from making to closing, their memory, the kill at a
// request's deadline, and the translation of a request into a guest's
// environment and streams. It opens nothing but compiled objects, read-only,
// connects to nobody, and does not decide what to serve, how many requests run
// at once or when to restart: that is the engine's business.
//
// The engine speaks HTTP/1.1 over an inherited unix listener. A request with
// HeaderControl is an operation on the worker, any other runs a guest.
package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

const (
	// loadsAtOnce bounds concurrent loads, which are processor time of one
	// core each; requests run beside them.
	loadsAtOnce = 2
	// settleTime after the last load, what loading left behind in the heap is
	// given back to the system.
	settleTime = time.Second
	// coolTime after its last request, a function's prepared instance is
	// closed if others want room; keepWarm of them stay in any case.
	coolTime = 2 * time.Minute
	keepWarm = 8
	// maxOpenFiles is far above two descriptors a connection at the highest
	// concurrency an engine allows.
	maxOpenFiles = 65536
	// goMemoryShare is the part (one in …) of the worker's memory above which
	// Go's collector works harder; linear memory is outside of Go's heap.
	goMemoryShare = 2
)

// Worker holds the functions of one process. Main makes one.
type Worker struct {
	id     string
	budget *budget
	logs   *logPipe
	logger *slog.Logger
	notes  []string

	loads chan struct{}
	// background counts goroutines that outlive a request.
	background sync.WaitGroup
	requests   atomic.Int64

	mu        sync.RWMutex
	functions map[string]*function
	objects   map[string]*object // by directory
	// running finds requests for OpCancel, by request.
	running map[string]func(*Fault)
	settle  *time.Timer
}

// Main is the whole of `nodeagent worker`; its result is the exit code. It
// expects what the engine hands down: a unix listener as file descriptor
// ListenerFD, a lifeline pipe as LifelineFD, a log pipe as LogFD and a Config
// as JSON on stdin. It serves until ctx ends or the lifeline breaks.
func Main(ctx context.Context) int {
	logger := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	if err := run(ctx, logger); err != nil {
		logger.Error("worker cannot run", "error", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, logger *slog.Logger) error {
	if err := sandbox.Lifeline(LifelineFD); err != nil {
		return fmt.Errorf("hold on to the engine's lifeline: %w", err)
	}
	var config Config
	if err := json.NewDecoder(io.LimitReader(os.Stdin, 1<<20)).Decode(&config); err != nil {
		return fmt.Errorf("read the configuration on stdin: %w", err)
	}
	logger = logger.With("worker", config.ID)
	f := os.NewFile(ListenerFD, "listener")
	listener, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("take over the listener: %w", err)
	}
	_ = f.Close() // FileListener has its own
	// The path is the engine's to remove: from here it cannot be reached.
	if l, ok := listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false)
	}
	logFile := os.NewFile(LogFD, "log")

	policy := sandbox.Policy{
		AllowExecMemory:   true,
		AcceptConnections: true,
		MaxOpenFiles:      maxOpenFiles,
		// Nothing is written to files, ever.
		MaxFileSizeBytes: 1,
		Require:          config.RequireSandbox,
	}
	if config.StoreDir != "" {
		policy.ReadOnly = []string{config.StoreDir}
	} else {
		policy.ReadOnly = []string{"/"}
	}
	applied, err := sandbox.Enter(policy)
	if err != nil {
		return fmt.Errorf("enter the sandbox: %w", err)
	}
	debug.SetMemoryLimit(int64(max(config.MemoryBytes/goMemoryShare, 128<<20)))
	// Compiled modules are long-lived and pointer-poor: collecting more often
	// is cheap and halves what a hundred idle functions cost.
	debug.SetGCPercent(50)

	w := New(config, logger)
	w.notes = applied.Notes
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.background.Go(func() { w.logs.run(ctx, logFile) })
	w.background.Go(func() { w.cool(ctx) })
	return w.serve(ctx, listener)
}

// New makes a worker without functions. Of the configuration only ID and
// MemoryBytes matter here.
func New(config Config, logger *slog.Logger) *Worker {
	return &Worker{
		id:        config.ID,
		budget:    newBudget(config.MemoryBytes),
		logs:      newLogPipe(),
		logger:    logger,
		loads:     make(chan struct{}, loadsAtOnce),
		functions: make(map[string]*function),
		objects:   make(map[string]*object),
		running:   make(map[string]func(*Fault)),
	}
}

func (w *Worker) serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler:  w,
		ErrorLog: slog.NewLogLogger(w.logger.Handler(), slog.LevelDebug),
		// The only peer is the engine, which sends headers in one piece.
		ReadHeaderTimeout: time.Minute,
		// The engine's own limit, plus the fields it adds.
		MaxHeaderBytes: 256 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("accept from the engine: %w", err)
	}
	return nil
}

// ServeHTTP runs a guest or an operation.
func (w *Worker) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	switch op := r.Header.Get(HeaderControl); op {
	case "":
		w.invoke(rw, r)
	case OpPing:
		w.ping(rw)
	case OpLoad:
		w.serveLoad(rw, r)
	case OpUnload:
		w.serveUnload(rw, r)
	case OpCancel:
		w.mu.RLock()
		abort := w.running[r.Header.Get(HeaderRequest)]
		w.mu.RUnlock()
		if abort != nil {
			abort(&Fault{Status: http.StatusBadGateway, Code: FaultClientGone, Detail: "the client went away"})
		}
		rw.WriteHeader(http.StatusNoContent)
	default:
		writeFault(rw, &Fault{Status: http.StatusNotImplemented, Code: FaultInternal, Detail: "unknown operation " + op})
	}
}

func (w *Worker) ping(rw http.ResponseWriter) {
	used, _ := w.budget.state()
	w.mu.RLock()
	n := len(w.functions)
	w.mu.RUnlock()
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(Pong{ // a lost engine ends the worker anyway
		Requests:    int(w.requests.Load()),
		Functions:   n,
		MemoryBytes: used,
		DroppedLogs: w.logs.dropped.Load(),
		Sandbox:     w.notes,
	})
}

func (w *Worker) serveLoad(rw http.ResponseWriter, r *http.Request) {
	var spec Spec
	if err := json.NewDecoder(io.LimitReader(r.Body, controlBodyMax)).Decode(&spec); err != nil {
		writeFault(rw, &Fault{Status: http.StatusBadRequest, Code: FaultInternal, Detail: "read what to load: " + err.Error()})
		return
	}
	select {
	case w.loads <- struct{}{}:
		defer func() { <-w.loads }()
	case <-r.Context().Done():
		return
	}
	w.mu.RLock()
	_, have := w.functions[spec.Key]
	w.mu.RUnlock()
	if have {
		writeFault(rw, &Fault{Status: http.StatusConflict, Code: FaultInternal, Detail: spec.Key + " is loaded already"})
		return
	}
	f, phases, err := w.load(r.Context(), spec)
	w.settleSoon()
	if err != nil {
		fault := &Fault{Status: http.StatusUnprocessableEntity, Code: "object-unusable", Detail: err.Error()}
		if i := (*instantiateError)(nil); errors.As(err, &i) {
			fault.Code = "instantiate-failed"
		} else if !errors.Is(err, precompile.ErrUnusable) {
			// Out of memory, out of descriptors: the object may be good.
			fault.Code, fault.Retryable = "load-failed", true
		}
		writeFault(rw, fault)
		return
	}
	w.mu.Lock()
	w.functions[spec.Key] = f
	w.mu.Unlock()
	w.trimPooled()
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(Loaded{Phases: phases}) // as above
}

func (w *Worker) serveUnload(rw http.ResponseWriter, r *http.Request) {
	key := r.Header.Get(HeaderKey)
	w.mu.Lock()
	f := w.functions[key]
	delete(w.functions, key)
	w.mu.Unlock()
	if f != nil {
		if err := f.close(r.Context()); err != nil {
			// Still running requests keep it; it is closed when they end.
			w.background.Go(func() { _ = f.close(context.Background()) })
		}
		w.settleSoon()
	}
	rw.WriteHeader(http.StatusNoContent)
}

// settleSoon gives memory back to the system once a burst of loads is over.
func (w *Worker) settleSoon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.settle == nil {
		w.settle = time.AfterFunc(settleTime, debug.FreeOSMemory)
	} else {
		w.settle.Reset(settleTime)
	}
}

// trimPooled closes prepared instances beyond what the worker keeps.
func (w *Worker) trimPooled() {
	w.trim(maxPooled, w.budget.limit/pooledShare)
}

// dropPooled closes n prepared instances, least recently used first, and says
// whether there was one.
func (w *Worker) dropPooled(n int) (dropped bool) {
	for _, f := range w.byLastUse() {
		if n == 0 {
			break
		}
		if f.drop() {
			dropped = true
			n--
		}
	}
	return dropped
}

func (w *Worker) trim(most int, bytes uint64) {
	list := w.byLastUse()
	slices.Reverse(list)
	for _, f := range list {
		size, have, _ := f.pooled()
		if !have {
			continue
		}
		if most == 0 || size > bytes {
			f.drop()
			continue
		}
		most--
		bytes -= size
	}
}

func (w *Worker) byLastUse() []*function {
	type entry struct {
		f    *function
		used time.Time
	}
	w.mu.RLock()
	list := make([]entry, 0, len(w.functions))
	for _, f := range w.functions {
		list = append(list, entry{f: f})
	}
	w.mu.RUnlock()
	for i := range list {
		_, _, list[i].used = list[i].f.pooled()
	}
	slices.SortFunc(list, func(a, b entry) int { return a.used.Compare(b.used) })
	functions := make([]*function, len(list))
	for i, e := range list {
		functions[i] = e.f
	}
	return functions
}

// cool closes prepared instances that nobody asked for in a while.
func (w *Worker) cool(ctx context.Context) {
	tick := time.NewTicker(coolTime / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		list := w.byLastUse()
		for _, f := range list[:max(0, len(list)-keepWarm)] {
			if _, have, used := f.pooled(); have && time.Since(used) > coolTime {
				f.drop()
				w.settleSoon()
			}
		}
	}
}

func (w *Worker) function(key string) *function {
	w.mu.RLock()
	defer w.mu.RUnlock()
	f := w.functions[key]
	if f == nil || !f.hold() {
		return nil
	}
	return f
}

func timeout(h http.Header) (time.Duration, error) {
	us, err := strconv.ParseInt(h.Get(HeaderTimeout), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", HeaderTimeout, err)
	}
	return time.Duration(us) * time.Microsecond, nil
}
