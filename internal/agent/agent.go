// Package agent is the process `nodeagent run`: it puts the store, the
// prefetch loops and the health model together and answers `nodeagent status`.
// What a node of a cluster does beside comes from package clusternode, which
// this one knows only as a [ClusterNode]: a build for one machine has none.
//
// It owns the wiring, the conclusions that need more than one part, and the
// observation of its parts. What they do is theirs; it runs no guest code and
// parses no module.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
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

// Options say where everything is. All are required but those that say so.
type Options struct {
	Node   string
	Socket string
	// APISocket is the submit API's, which says which functions should be
	// here; empty where there is none, as on a node of a cluster.
	APISocket string
	// APIURL is a cluster's API (https://host:port), which says the same for
	// all nodes; empty where there is none. Not both.
	APIURL string
	// APITokenFile holds the token for APIURL. It is read again when it changes.
	APITokenFile string
	// APICAFile holds the certificates that sign that of APIURL, which is then
	// for the URL's host. Empty: what the Cluster says, else the machine's own.
	APICAFile string
	// EngineSocket is the engine's control socket; empty where there is none.
	EngineSocket string
	// EngineUser gets the directory of EngineSocket, for an engine that is
	// another user; 0 leaves it.
	EngineUser int
	// Registry is needed with APISocket. On a cluster it is the one that
	// RegistryPlainHTTP is about.
	Registry          string
	RegistryPlainHTTP bool
	// RegistryConfig is a file of credentials for registries as
	// registry.ConfigKeychain takes it, read for each pull; empty: those of this
	// process's user.
	RegistryConfig string
	StoreDir       string
	// StateDir is private to the agent: the last instructions, pulls under way.
	StateDir         string
	StoreBudgetBytes int64
	// CompilerCommand starts a precompile child.
	CompilerCommand []string
	// HTTPListen is where probes and Prometheus find /livez, /readyz and
	// /metrics over TCP; empty for nowhere.
	HTTPListen string
	// Cluster makes this machine a node of a cluster; nil for none.
	Cluster func(ClusterParts) (ClusterNode, error)
	Version string
	Logger  *slog.Logger
}

// ClusterNode is what a machine does because it is a node of a cluster.
type ClusterNode interface {
	// Functions says which functions should be served here, and what to run
	// beside to hear of changes; nil where nobody says.
	Functions() (prefetch.Source, func(context.Context))
	// Keychain gives credentials for registries; nil for no others than
	// those of the machine's user.
	Keychain(ctx context.Context) (authn.Keychain, error)
	// APIAuthority is how the API of the cluster is known: the name that its
	// certificate is for, and what reads the certificates (PEM) that sign it.
	APIAuthority() (serverName string, certificates func(context.Context) ([]byte, error), address func() string)
	// Start adds its goroutines to the group; all end with ctx.
	Start(ctx context.Context, group *errgroup.Group)
	// Sections fills in what only a node of a cluster has to say.
	Sections(s *health.Sections)
	// Routes adds to the control socket what only whoever may connect to it
	// (mode 0600) may do.
	Routes(mux *http.ServeMux)
}

// ClusterParts are the agent's own parts that a ClusterNode works with.
type ClusterParts struct {
	Store *precompile.Store
	// SetLive names what wanted images need of the store; nothing is evicted
	// before it was called once.
	SetLive func(digests []string)
	// StateDir is the agent's, RunDir that of its socket.
	StateDir, RunDir string
	Health           *health.Registry
	Metrics          prometheus.Registerer
	Logger           *slog.Logger
}

// The parts of the prefetch.LiveUnion: what functions need of the store, and what
// wanted images do.
const (
	liveFunctions = iota
	liveImages
	liveParts
)

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
	switch {
	case errors.Is(err, precompile.ErrLocked):
		return fmt.Errorf("open the store: %w; stop the other nodeagent, or give this one another --store-dir", err)
	case err != nil:
		return fmt.Errorf("open the store: %w", err)
	}
	defer store.Close()
	if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
		return fmt.Errorf("create the state directory: %w", err)
	}
	a := &agent{o: o, store: store, health: health.NewRegistry(health.Options{Logger: o.Logger})}
	setLive := store.SetLive
	if o.Cluster != nil {
		live := prefetch.NewLiveUnion(liveParts, store.SetLive)
		setLive = func(digests []string) { live.Set(liveFunctions, digests) }
		if a.cluster, err = o.Cluster(ClusterParts{
			Store: store, SetLive: func(digests []string) { live.Set(liveImages, digests) },
			StateDir: o.StateDir, RunDir: filepath.Dir(o.Socket), Health: a.health, Metrics: metrics, Logger: o.Logger,
		}); err != nil {
			return err
		}
	}
	if o.EngineUser > 0 && o.EngineSocket != "" {
		if err := handOver(filepath.Dir(o.EngineSocket), o.EngineUser); err != nil {
			return err
		}
	}
	source, reporter, follow, done, err := a.functionSource()
	if err != nil {
		return err
	}
	defer done()
	if source != nil {
		puller, err := a.puller(ctx)
		if err != nil {
			return err
		}
		defer puller.Close()
		a.engine = control.NewClient(o.EngineSocket)
		defer a.engine.CloseIdle()
		if a.loop, err = prefetch.New(prefetch.Options{
			Source: source, Reporter: reporter, Puller: puller, Store: liveStore{store, setLive}, Engine: a.engine,
			Node: o.Node, TempDir: o.StateDir, CachePath: filepath.Join(o.StateDir, "desired.json"), Fleet: o.APIURL != "",
			Logger: o.Logger, Registerer: metrics,
		}); err != nil {
			return err
		}
	} else {
		setLive(nil)
	}
	a.registerChecks()
	metrics.MustRegister(a.health.Collector())
	server := health.NewServer(health.ServerOptions{
		Registry: a.health, Node: o.Node, Versions: versions(o.Version), Sections: a.sections, Gatherer: metrics,
		Routes: func(mux *http.ServeMux) {
			if a.cluster != nil {
				a.cluster.Routes(mux)
			}
		},
		Logger: o.Logger,
	})
	var probes net.Listener
	if o.HTTPListen != "" {
		var config net.ListenConfig
		if probes, err = config.Listen(ctx, "tcp", o.HTTPListen); err != nil {
			return fmt.Errorf("listen for probes and metrics: %w", err)
		}
		defer probes.Close()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx, listener) })
	if probes != nil {
		group.Go(func() error { return server.ServeProbes(ctx, probes) })
	}
	if a.loop != nil {
		group.Go(func() error { return a.loop.Run(ctx) })
	}
	if follow != nil {
		group.Go(func() error { follow(ctx); return nil })
	}
	if a.cluster != nil {
		a.cluster.Start(ctx, group)
	}
	group.Go(func() error { a.observe(ctx); return nil })
	group.Go(func() error { a.releaseStart(ctx); return nil })
	group.Go(func() error { return a.notifySystemd(ctx) })
	return group.Wait()
}

// functionSource says who tells which functions should be served here: the
// submit API of this machine or of the cluster, or the cluster's objects
// themselves. Nil where nobody does.
func (a *agent) functionSource() (source prefetch.Source, reporter prefetch.Reporter, follow func(context.Context), done func(), err error) {
	done = func() {}
	switch {
	case a.o.APISocket != "" && a.o.APIURL != "":
		return nil, nil, nil, done, errors.New("the submit API has a socket or a URL, not both")
	case a.o.APISocket != "":
		api := prefetch.NewAPIClient(a.o.APISocket)
		return api, api, nil, api.Close, nil
	case a.o.EngineSocket == "":
	case a.o.APIURL != "":
		api, err := a.remoteAPI()
		if err != nil {
			return nil, nil, nil, done, err
		}
		return api, api, nil, api.Close, nil
	case a.cluster != nil:
		source, follow = a.cluster.Functions()
		return source, silentReporter{}, follow, done, nil
	}
	return nil, nil, nil, done, nil
}

// remoteAPI makes the client of the cluster's API.
func (a *agent) remoteAPI() (*prefetch.APIClient, error) {
	o := prefetch.RemoteOptions{URL: a.o.APIURL, TokenFile: a.o.APITokenFile, UserAgent: "hearth-nodeagent/" + a.o.Version}
	switch {
	case a.o.APICAFile != "":
		o.Authority = func(context.Context) ([]byte, error) { return os.ReadFile(a.o.APICAFile) }
	case a.cluster != nil:
		o.ServerName, o.Authority, o.Address = a.cluster.APIAuthority()
	}
	return prefetch.NewRemoteAPIClient(o)
}

// silentReporter is for a cluster without an API: what is warm on a node is said
// by the node, in its condition and metrics; nobody else is told.
type silentReporter struct{}

// Report implements prefetch.Reporter.
func (silentReporter) Report(context.Context, v1alpha1.NodeReport) error { return nil }

// noHome stands for the registry of artifacts without a host of their own
// where there is none: in a cluster every artifact names its registry.
const noHome = "registry.invalid"

func (a *agent) puller(ctx context.Context) (*registry.Client, error) {
	options := registry.ClientOptions{
		Registry: a.o.Registry, PlainHTTP: a.o.RegistryPlainHTTP, Logger: a.o.Logger,
		Keychain: authn.DefaultKeychain,
	}
	if a.o.RegistryConfig != "" {
		options.Keychain = registry.ConfigKeychain(a.o.RegistryConfig)
	}
	if options.Registry == "" {
		options.Registry = noHome
	}
	if a.cluster != nil {
		keychain, err := a.cluster.Keychain(ctx)
		if err != nil {
			return nil, err
		}
		if keychain != nil {
			options.Keychain = authn.NewMultiKeychain(keychain, options.Keychain)
		}
		// One machine's registry is Hearth's own and lets anybody read.
		options.RegistryKeychain = options.Keychain
	}
	return registry.NewClient(options)
}

// handOver makes dir and gives it to a user.
func handOver(dir string, uid int) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("make the directory of the engine's socket: %w", err)
	}
	if err := os.Chown(dir, uid, uid); err != nil {
		return fmt.Errorf("give the directory of the engine's socket to its user: %w", err)
	}
	return nil
}

// liveStore is the store as one of several loops sees it.
type liveStore struct {
	*precompile.Store
	setLive func(digests []string)
}

func (s liveStore) SetLive(digests []string) { s.setLive(digests) }

type agent struct {
	o       Options
	store   *precompile.Store
	engine  *control.Client // nil without functions
	loop    *prefetch.Loop  // nil without functions
	cluster ClusterNode     // nil outside a cluster
	health  *health.Registry

	turns                                       *health.Loop
	api, engineUp, workers, functions, disk, st *health.Check
	lastError                                   time.Time
}

func (a *agent) registerChecks() {
	r := a.health
	a.st = r.Register(health.Definition{Code: "store", Severity: v1alpha1.SeverityCritical,
		Remedy: "free disk space or raise --store-budget"})
	a.disk = r.Register(health.Definition{Code: "disk", Severity: v1alpha1.SeverityWarning,
		Remedy: "free space on the filesystem of the data directory; running functions are not affected"})
	if a.loop == nil {
		return
	}
	a.turns = r.Loop("prefetch loop", loopSilence)
	a.engineUp = r.Register(health.Definition{Code: "engine", Severity: v1alpha1.SeverityCritical,
		Remedy: "the engine is restarted by itself; if this stays, read its log", Pending: "waiting for the engine to answer"})
	remedy := "functions go on being served as they are; start the API again"
	if a.o.APIURL != "" {
		remedy = "functions go on being served as they are; see whether the pods of the Deployment hearth-api run, and whether this node reaches " + a.o.APIURL
	}
	a.api = r.Register(health.Definition{Code: "api", Severity: v1alpha1.SeverityWarning,
		Remedy: remedy, Pending: "waiting for the API to say what should be here"})
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
	usage := a.store.Usage()
	if usage.BudgetBytes > 0 && usage.LiveBytes >= usage.BudgetBytes {
		a.st.Fail(fmt.Sprintf("functions that are needed take %d MiB, the budget is %d MiB", usage.LiveBytes>>20, usage.BudgetBytes>>20), "")
	} else {
		a.st.OK(fmt.Sprintf("%d objects, %d MiB", usage.Objects, usage.Bytes>>20))
	}
	if a.loop != nil {
		a.lookAtFunctions()
	}
}

func (a *agent) lookAtFunctions() {
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
	if a.engine == nil {
		return
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
	usage := a.store.Usage()
	sections := health.Sections{
		Store: &v1alpha1.StoreStatus{
			Path: a.o.StoreDir, Objects: usage.Objects, UsedBytes: usage.Bytes, BudgetBytes: usage.BudgetBytes, Quarantined: usage.Quarantined,
		},
	}
	if d, err := diskStatus(a.o.StoreDir); err == nil {
		sections.Disk = d
	}
	if a.cluster != nil {
		a.cluster.Sections(&sections)
	}
	if a.loop == nil {
		return sections
	}
	sections.Functions = a.functionsStatus()
	sections.Engine = &v1alpha1.EngineStatus{Workers: []v1alpha1.WorkerStatus{}}
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

func (a *agent) functionsStatus() *v1alpha1.FunctionsStatus {
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
	return functions
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
