// Package agent is the process `nodeagent run`: it puts the store, the
// prefetch loop and the health model together and answers `nodeagent status`.
//
// It owns the wiring and the observation of its parts. What they do is theirs;
// it runs no guest code and parses no module.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/health"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/prefetch"
	"github.com/hearth-sh/hearth/internal/registry"
)

const (
	// observeEvery is how often the health model looks at the parts. Reading
	// them costs microseconds; people see changes within half a second.
	observeEvery = 500 * time.Millisecond
	// askEvery is how often the engine and the disk are asked for what only
	// status shows.
	askEvery = 2 * time.Second
	// engineDeadline bounds asking the engine while somebody waits for a
	// status document.
	engineDeadline = 300 * time.Millisecond
	// lowDiskBytes is the free space below which the node is degraded: the
	// next few functions may not fit.
	lowDiskBytes = 512 << 20
	// loopSilence is how long the prefetch loop may be silent: it turns every
	// five seconds, and one pass on a busy machine may take some more.
	loopSilence = 60 * time.Second
	// maxFailedListed is v1alpha1.FunctionsStatus's limit.
	maxFailedListed = 100
)

// Options say where everything is. All are required but Version and Logger.
type Options struct {
	Node              string
	Socket            string
	APISocket         string
	EngineSocket      string
	Registry          string
	RegistryPlainHTTP bool
	StoreDir          string
	// StateDir is private to the agent: the last instructions, pulls under way.
	StateDir         string
	StoreBudgetBytes int64
	// CompilerCommand starts a precompile child.
	CompilerCommand []string
	Version         string
	Logger          *slog.Logger
}

// Run works until ctx ends. It returns an error when something it owns cannot
// be opened; an API, registry or engine that is away is not an error.
func Run(ctx context.Context, o Options) error {
	metrics := prometheus.NewRegistry()
	prometheus.WrapRegistererWith(prometheus.Labels{"process": "agent"}, metrics).MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	listener, err := localsocket.Listen(o.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	compiler := precompile.NewCompiler(precompile.CompilerOptions{
		Command: o.CompilerCommand, Concurrency: runtime.NumCPU(), Logger: o.Logger,
	})
	store, err := precompile.Open(o.StoreDir, precompile.StoreOptions{
		Compiler: compiler, BudgetBytes: o.StoreBudgetBytes, Logger: o.Logger, Registerer: metrics,
	})
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	defer store.Close()
	puller, err := registry.NewClient(registry.ClientOptions{Registry: o.Registry, PlainHTTP: o.RegistryPlainHTTP, Logger: o.Logger})
	if err != nil {
		return err
	}
	defer puller.Close()
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		return fmt.Errorf("create the state directory: %w", err)
	}
	api := prefetch.NewAPIClient(o.APISocket)
	defer api.Close()
	engine := control.NewClient(o.EngineSocket)
	defer engine.CloseIdle()
	loop, err := prefetch.New(prefetch.Options{
		Source: api, Reporter: api, Puller: puller, Store: store, Engine: engine,
		Node: o.Node, TempDir: o.StateDir, CachePath: filepath.Join(o.StateDir, "desired.json"),
		Logger: o.Logger, Registerer: metrics,
	})
	if err != nil {
		return err
	}

	a := &agent{o: o, store: store, engine: engine, loop: loop}
	a.registerChecks()
	metrics.MustRegister(a.health.Collector())
	server := health.NewServer(health.ServerOptions{
		Registry: a.health, Node: o.Node, Versions: versions(o.Version), Sections: a.sections, Gatherer: metrics, Logger: o.Logger,
	})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx, listener) })
	group.Go(func() error { return loop.Run(ctx) })
	group.Go(func() error { a.observe(ctx); return nil })
	return group.Wait()
}

type agent struct {
	o      Options
	store  *precompile.Store
	engine *control.Client
	loop   *prefetch.Loop
	health *health.Registry

	turns                                       *health.Loop
	api, engineUp, workers, functions, disk, st *health.Check
	lastError                                   time.Time
}

func (a *agent) registerChecks() {
	r := health.NewRegistry(health.Options{Logger: a.o.Logger})
	a.health = r
	a.turns = r.Loop("prefetch loop", loopSilence)
	a.st = r.Register(health.Definition{Code: "store", Severity: v1alpha1.SeverityCritical,
		Remedy: "free disk space or raise --store-budget"})
	a.disk = r.Register(health.Definition{Code: "disk", Severity: v1alpha1.SeverityWarning,
		Remedy: "free space on the filesystem of the data directory; running functions are not affected"})
	a.engineUp = r.Register(health.Definition{Code: "engine", Severity: v1alpha1.SeverityCritical,
		Remedy: "the engine is restarted by itself; if this stays, read its log", Pending: "waiting for the engine to answer"})
	a.api = r.Register(health.Definition{Code: "api", Severity: v1alpha1.SeverityWarning,
		Remedy: "functions go on being served as they are; start the API again", Pending: "waiting for the API to say what should be here"})
	a.workers = r.Register(health.Definition{Code: "workers", Severity: v1alpha1.SeverityWarning, DependsOn: []string{"engine"},
		Remedy: "read the engine's log for why the worker ended", Pending: "waiting for the engine to answer"})
	a.functions = r.Register(health.Definition{Code: "functions", Severity: v1alpha1.SeverityWarning, DependsOn: []string{"engine"},
		Remedy: "`nodeagent functions get NAME` says why; submit a working revision or roll back", Pending: "waiting for the API to say what should be here"})
}

// observe feeds the health model from the parts until ctx ends.
func (a *agent) observe(ctx context.Context) {
	tick := time.NewTicker(observeEvery)
	defer tick.Stop()
	var asked time.Time
	for {
		a.look()
		if now := time.Now(); now.Sub(asked) >= askEvery {
			asked = now
			a.ask(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (a *agent) look() {
	s := a.loop.Status()
	if time.Since(s.LastPass) < loopSilence {
		a.turns.Beat()
	}
	report := func(c *health.Check, p prefetch.Peer, ok string) {
		switch {
		case p.OK:
			c.OK(ok)
		case p.Error != "":
			c.Fail(p.Error, "")
		}
	}
	report(a.api, s.API, "answers")
	report(a.engineUp, s.Engine, "answers")
	if s.Known {
		if n := s.Failed + s.Retrying; n > 0 {
			a.functions.Fail(s.Summary, "")
		} else {
			a.functions.OK(s.Summary)
		}
	}
	usage := a.store.Usage()
	if usage.BudgetBytes > 0 && usage.LiveBytes >= usage.BudgetBytes {
		a.st.Fail(fmt.Sprintf("functions that are needed take %d MiB, the budget is %d MiB", usage.LiveBytes>>20, usage.BudgetBytes>>20), "")
	} else {
		a.st.OK(fmt.Sprintf("%d objects, %d MiB", usage.Objects, usage.Bytes>>20))
	}
	newest := a.lastError
	for i := len(s.Recent) - 1; i >= 0; i-- { // oldest first
		if e := s.Recent[i]; e.Time.After(a.lastError) {
			a.health.RecordError("prefetch", e.Subject, errors.New(e.Message))
			if e.Time.After(newest) {
				newest = e.Time
			}
		}
	}
	a.lastError = newest
}

// ask looks at what has to be asked for: the engine's workers and the disk.
func (a *agent) ask(ctx context.Context) {
	if d, err := diskStatus(a.o.StoreDir); err != nil {
		a.disk.Unknown(err.Error())
	} else if d.FreeBytes < lowDiskBytes {
		a.disk.Fail(fmt.Sprintf("%d MiB free", d.FreeBytes>>20), "")
	} else {
		a.disk.OK(fmt.Sprintf("%d GiB free", d.FreeBytes>>30))
	}
	ctx, cancel := context.WithTimeout(ctx, askEvery)
	defer cancel()
	status, err := a.engine.Status(ctx, 0, 0)
	if err != nil {
		a.workers.Unknown("the engine does not answer")
		return
	}
	var troubled []string
	for _, w := range status.Workers {
		if w.State == control.WorkerBackoff {
			troubled = append(troubled, fmt.Sprintf("%s (%s)", w.ID, w.LastExit))
		}
	}
	if len(troubled) > 0 {
		a.workers.Fail("ended and waiting to be started again: "+strings.Join(troubled, ", "), "")
		return
	}
	a.workers.OK(fmt.Sprintf("%d running", len(status.Workers)))
}

// sections collects what a status document shows beside the checks.
func (a *agent) sections(ctx context.Context) health.Sections {
	s := a.loop.Status()
	functions := &v1alpha1.FunctionsStatus{
		Total: s.Total, Warm: s.Warm, Pulling: s.Queued + s.Pulling + s.Compiling + s.Loading, FailedCount: s.Failed + s.Retrying,
	}
	for _, f := range s.Functions {
		if f.Error == nil || len(functions.Failed) == maxFailedListed {
			continue
		}
		functions.Failed = append(functions.Failed, v1alpha1.FailedFunction{
			Name: f.Name, Revision: f.Revision, Serving: f.Serving, Retrying: f.Retrying, Error: *f.Error,
		})
	}
	usage := a.store.Usage()
	sections := health.Sections{
		Functions: functions,
		Store: &v1alpha1.StoreStatus{
			Path: a.o.StoreDir, Objects: usage.Objects, UsedBytes: usage.Bytes, BudgetBytes: usage.BudgetBytes, Quarantined: usage.Quarantined,
		},
		Engine: &v1alpha1.EngineStatus{Workers: []v1alpha1.WorkerStatus{}},
	}
	if d, err := diskStatus(a.o.StoreDir); err == nil {
		sections.Disk = d
	}
	ctx, cancel := context.WithTimeout(ctx, engineDeadline)
	defer cancel()
	status, err := a.engine.Status(ctx, 0, 0)
	if err != nil {
		return sections
	}
	sections.Engine.Reachable, sections.Engine.Generation = true, status.Generation
	for _, w := range status.Workers {
		sections.Engine.Workers = append(sections.Engine.Workers, v1alpha1.WorkerStatus{
			ID: w.ID, Tenant: w.Tenant, PID: w.PID, State: w.State, Since: w.Since,
			Functions: w.Functions, Restarts: w.Restarts, RSSBytes: w.RSSBytes,
		})
	}
	return sections
}

func diskStatus(path string) (*v1alpha1.DiskStatus, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return nil, fmt.Errorf("ask for free space: %w", err)
	}
	size := uint64(fs.Bsize)
	return &v1alpha1.DiskStatus{Path: path, TotalBytes: fs.Blocks * size, FreeBytes: fs.Bavail * size}, nil
}

// versions says what this binary is made of.
func versions(own string) v1alpha1.Versions {
	v := v1alpha1.Versions{Hearth: own, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "github.com/tetratelabs/wazero" {
				v.Wazero = m.Version
			}
		}
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		v.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	return v
}
