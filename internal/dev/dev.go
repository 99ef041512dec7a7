// Package dev runs the whole of Hearth on one machine, as an ordinary user:
// the submit API, the embedded registry and the database in this process, the
// agent and the engine as children.
//
// It owns wiring, the data directory and the two children. It adds no
// behaviour of its own to any of them: what works here works because the
// parts do.
package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/paths"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/publish"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/sandbox"
	"github.com/hearth-sh/hearth/internal/submit"
	"github.com/hearth-sh/hearth/internal/supervise"
)

const (
	// startDeadline bounds waiting for the children: they start in well under
	// a second unless the machine is very busy.
	startDeadline = 30 * time.Second
	// warmDeadline bounds waiting for functions of earlier runs before the
	// screen is shown anyway; they go on warming in the background.
	warmDeadline = 10 * time.Second
	// pollEvery is how often a starting child is asked again.
	pollEvery = 20 * time.Millisecond
	// askDeadline bounds one question to a child.
	askDeadline = time.Second
	// shutdownDeadline bounds letting API requests finish at the end.
	shutdownDeadline = 3 * time.Second
	// readHeaderDeadline and idleDeadline bound connections to our own
	// listeners; peers are local processes.
	readHeaderDeadline = 10 * time.Second
	idleDeadline       = 2 * time.Minute
	// checkConcurrency is how many modules are checked at once: compiling
	// wants the other core.
	checkConcurrency = 2
)

// Options say where and how to run.
type Options struct {
	// Listen is the public address, host:port; port 0 takes a free one.
	Listen string
	// DataDir holds everything; it is created with mode 0700.
	DataDir string
	// BaseDomain is what functions' hosts end in.
	BaseDomain string
	// TokenFile has the tokens that may use the API; empty: whoever can connect
	// may. With it, the registry is not served on the public address.
	TokenFile string
	// Isolation, WorkerMemoryMiB and StoreBudgetMiB are passed on to the
	// engine and the agent.
	Isolation       string
	WorkerMemoryMiB int64
	// QuotaInvocations is the engine's: requests a second to one tenant's
	// functions; 0: no limit.
	QuotaInvocations float64
	StoreBudgetMiB   int64
	Version          string
	// Verbose repeats everything the children log.
	Verbose bool
	// Program is the nodeagent binary for the children; empty: this one.
	Program string
	// Out is where the screen goes; Terminal and Colour say what it can show.
	Out              io.Writer
	Terminal, Colour bool
	// CommandName is how the user called us, for the hints on the screen.
	CommandName string
	Logger      *slog.Logger
}

// Run starts everything, shows what to try next, and returns nil some seconds
// after ctx ended, with every child gone. It returns an error when something
// cannot be started; what had been started is then stopped.
func Run(ctx context.Context, o Options) error {
	began := time.Now()
	d := &dev{o: o, screen: &screen{w: o.Out, terminal: o.Terminal, colour: o.Colour}}
	d.screen.say("%s %s: everything on this machine\n", d.screen.paint(bold, "Hearth"), o.Version)
	defer d.closeAll()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	// Children outlive the API by a moment so that requests in flight can
	// finish: they have a context of their own, ended after the API's.
	if err := d.start(ctx, group); err != nil {
		return errors.Join(err, d.stop(group))
	}
	group.Go(func() error {
		err := d.awaitReady(ctx)
		if err == nil {
			d.showReady(ctx, time.Since(began))
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // stopped while starting: that is no failure
		}
		return err
	})
	<-ctx.Done()
	if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) {
		d.screen.say("\nStopping …")
	}
	return d.stop(group)
}

// dev is a run.
type dev struct {
	o        Options
	screen   *screen
	closers  []func() error // run in reverse
	listener *net.TCPListener
	store    *function.Bolt
	embedded *registry.Embedded
	registry net.Listener // loopback port of the registry
	api      net.Listener
	servers  []*http.Server
	submit   *submit.Server
	engine   *supervise.Process
	agent    *supervise.Process
	control  *control.Client

	stopChildren context.CancelFunc
	children     errgroup.Group
	address      string // host:port as bound
}

func (d *dev) closeLater(f func() error) { d.closers = append(d.closers, f) }

func (d *dev) closeAll() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		if err := d.closers[i](); err != nil && !errors.Is(err, net.ErrClosed) {
			d.o.Logger.Warn("close", "error", err)
		}
	}
	d.closers = nil
}

// path is a path below the data directory.
func (d *dev) path(parts ...string) string {
	return filepath.Join(append([]string{d.o.DataDir}, parts...)...)
}

// prepare opens everything that can fail for a reason a person must fix.
func (d *dev) prepare(ctx context.Context) error {
	var err error
	if d.o.DataDir, err = filepath.Abs(d.o.DataDir); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	if err := d.screen.step("data directory "+d.o.DataDir, func() (string, error) { return "", d.lock() }); err != nil {
		return err
	}
	if err := d.screen.step("listen on "+d.o.Listen, func() (string, error) { return "", d.listen(ctx) }); err != nil {
		return err
	}
	if err := d.screen.step("database", func() (string, error) {
		if err := os.MkdirAll(d.path("db"), 0o700); err != nil {
			return "", fmt.Errorf("create the database's directory: %w", err)
		}
		store, err := function.OpenBolt(d.path("db", "functions.db"), function.BoltOptions{Logger: d.o.Logger})
		if err != nil {
			return "", err
		}
		d.store = store
		d.closeLater(store.Close)
		page, err := store.List(ctx, function.ListOptions{})
		if err != nil {
			return "", err
		}
		return count(len(page.Items), "function"), nil
	}); err != nil {
		return err
	}
	return d.screen.step("registry", func() (string, error) { return d.openRegistry(ctx) })
}

// lock makes the data directory ours.
func (d *dev) lock() error {
	mode := os.FileMode(0o700)
	if os.Geteuid() == 0 {
		// Root's children run guests and compile under another account,
		// which has to pass through here to the store, and nowhere else:
		// what is private has directories of its own with mode 0700.
		mode = 0o711
	}
	if err := os.MkdirAll(d.o.DataDir, mode); err != nil {
		return fmt.Errorf("create the data directory: %w; choose another with --data-dir", err)
	}
	file, err := os.OpenFile(d.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open the data directory's lock: %w; choose another directory with --data-dir", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("another nodeagent uses the data directory %s; stop it, or choose another directory with --data-dir", d.o.DataDir)
		}
		return fmt.Errorf("lock the data directory: %w", err)
	}
	d.closeLater(file.Close)
	// The engine looks at start whether another account could read here.
	if err := os.MkdirAll(d.path("store", "objects"), 0o755); err != nil {
		return fmt.Errorf("create the store's directory: %w", err)
	}
	return nil
}

func (d *dev) listen(ctx context.Context) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", d.o.Listen)
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("listen on %s: the port is in use; stop what uses it, or choose another with --listen", d.o.Listen)
		}
		return fmt.Errorf("listen on %s: %w; choose another address with --listen", d.o.Listen, err)
	}
	d.listener = listener.(*net.TCPListener)
	d.closeLater(d.listener.Close)
	d.address = d.listener.Addr().String()
	if addr, ok := d.listener.Addr().(*net.TCPAddr); ok && !addr.IP.IsLoopback() && d.o.TokenFile == "" {
		d.o.Logger.Warn("the submit API has no authentication and is reachable from other machines; give --token-file", "address", d.address)
	}
	return nil
}

// openRegistry opens the embedded registry, drops what no revision refers to,
// and gives it a loopback port of its own (docs/decisions.md says why).
func (d *dev) openRegistry(ctx context.Context) (string, error) {
	embedded, err := registry.OpenEmbedded(ctx, registry.EmbeddedOptions{Dir: d.path("registry"), Logger: d.o.Logger})
	if err != nil {
		return "", err
	}
	d.embedded = embedded
	d.closeLater(embedded.Close)
	keep, err := d.artifacts(ctx)
	if err != nil {
		return "", err
	}
	collected, err := embedded.CollectGarbage(ctx, publish.DefaultPrefix, keep)
	if err != nil {
		// Garbage costs space and nothing else; a full or failing disk must
		// not keep functions from being served.
		d.o.Logger.Warn("registry not cleaned up", "error", err)
	}
	d.registry, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("listen on loopback for the registry: %w", err)
	}
	d.closeLater(d.registry.Close)
	detail := count(len(keep), "artifact")
	if collected.Manifests > 0 {
		detail += fmt.Sprintf(", %d no longer needed removed", collected.Manifests)
	}
	return detail, nil
}

// artifacts lists what some revision still refers to.
func (d *dev) artifacts(ctx context.Context) ([]v1alpha1.Artifact, error) {
	page, err := d.store.List(ctx, function.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list functions: %w", err)
	}
	var all []v1alpha1.Artifact
	for _, f := range page.Items {
		revisions, err := d.store.Revisions(ctx, f.Name)
		if err != nil {
			return nil, fmt.Errorf("list revisions of %s: %w", f.Name, err)
		}
		for _, r := range revisions {
			all = append(all, r.Artifact)
		}
	}
	return all, nil
}

// start serves the API and starts the children.
func (d *dev) start(ctx context.Context, group *errgroup.Group) error {
	metrics := prometheus.NewRegistry()
	own := prometheus.WrapRegistererWith(prometheus.Labels{"process": "api"}, metrics)
	own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	up := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "hearth_process_up", Help: "Whether a sibling process answered this scrape.",
	}, []string{"process"})
	metrics.MustRegister(up)

	client, err := registry.NewClient(registry.ClientOptions{Registry: d.registry.Addr().String(), PlainHTTP: true, Logger: d.o.Logger})
	if err != nil {
		return err
	}
	d.closeLater(func() error { client.Close(); return nil })
	publisher, err := publish.NewPublisher(publish.Options{Client: client})
	if err != nil {
		return err
	}
	program := d.o.Program
	if program == "" {
		program = sandbox.Executable()
	}
	compiler := precompile.NewCompiler(precompile.CompilerOptions{
		Command: []string{program, "precompile"}, Concurrency: checkConcurrency, Logger: d.o.Logger,
	})
	d.control = control.NewClient(paths.EngineSocket(d.o.DataDir))
	d.closeLater(func() error { d.control.CloseIdle(); return nil })
	agentClient, engineClient := newSibling(paths.AgentSocket(d.o.DataDir)), newSibling(paths.EngineSocket(d.o.DataDir))
	d.closeLater(func() error { agentClient.CloseIdleConnections(); engineClient.CloseIdleConnections(); return nil })
	// Not a nil *access.File as an interface that is not nil.
	var who submit.Access
	if d.o.TokenFile != "" {
		if who, err = access.OpenFile(d.o.TokenFile, access.FileOptions{Logger: d.o.Logger}); err != nil {
			return err
		}
	}
	api, err := submit.New(submit.Options{
		Access:     who,
		Audit:      d.audit(),
		Store:      d.store,
		Checker:    publish.Remember(publish.NewChecker(compiler), publish.RememberOptions{Logger: d.o.Logger}),
		Publisher:  publisher,
		Logs:       functionLogs{d.control},
		Health:     readiness{d, agentClient},
		URLs:       d.urls,
		Image:      d.image,
		BaseDomain: d.o.BaseDomain,
		Version:    d.o.Version,
		TempDir:    d.path("tmp", "uploads"),
		Logger:     d.o.Logger,
		Registerer: metrics,
		Gatherers: func(ctx context.Context) []prometheus.Gatherer {
			return []prometheus.Gatherer{
				siblingGatherer{ctx, agentClient, up.WithLabelValues("agent")},
				siblingGatherer{ctx, engineClient, up.WithLabelValues("engine")},
				metrics, // last: it shows what became of the others
			}
		},
	})
	if err != nil {
		return err
	}
	if d.api, err = localsocket.Listen(paths.APISocket(d.o.DataDir)); err != nil {
		return err
	}
	d.submit = api
	mux := http.NewServeMux()
	mux.Handle("/node/", api.NodeHandler())
	if who == nil {
		// It knows no tokens; the agent has a way of its own.
		mux.Handle("/v2/", d.embedded.Handler())
	}
	mux.Handle("/", api.Handler())
	d.serve(group, "submit API", d.api, mux)
	pull := http.NewServeMux()
	pull.Handle("/v2/", d.embedded.Handler())
	d.serve(group, "registry", d.registry, pull)

	return d.startChildren(ctx, group)
}

// audit gets a line for each change where there are callers to tell apart.
func (d *dev) audit() *slog.Logger {
	if d.o.TokenFile == "" {
		return nil
	}
	return d.o.Logger.With("audit", true)
}

func (d *dev) serve(group *errgroup.Group, name string, listener net.Listener, handler http.Handler) {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderDeadline,
		IdleTimeout:       idleDeadline,
		ErrorLog:          slog.NewLogLogger(d.o.Logger.Handler(), slog.LevelDebug),
	}
	d.servers = append(d.servers, server)
	group.Go(func() error {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the %s: %w", name, err)
		}
		return nil
	})
}

func (d *dev) startChildren(ctx context.Context, group *errgroup.Group) error {
	file, err := d.listener.File()
	if err != nil {
		return fmt.Errorf("pass the listener on: %w", err)
	}
	d.closeLater(file.Close)
	level := slog.LevelWarn
	if d.o.Verbose {
		level = slog.LevelDebug
	}
	logDir := d.path("logs", "system")
	engineLog, err := newChildLog(logDir, "engine", d.o.Logger, level)
	if err != nil {
		return fmt.Errorf("open the engine's log: %w", err)
	}
	d.closeLater(engineLog.Close)
	agentLog, err := newChildLog(logDir, "agent", d.o.Logger, level)
	if err != nil {
		return fmt.Errorf("open the agent's log: %w", err)
	}
	d.closeLater(agentLog.Close)

	fd := func(n int) string { return strconv.Itoa(n) }
	d.engine = supervise.New(supervise.Options{
		Name: "engine", Program: d.o.Program, Files: []*os.File{file}, Line: engineLog.line, Logger: d.o.Logger,
		Args: []string{
			"engine", "--listen-fd", fd(3), "--lifeline-fd", fd(supervise.LifelineFD(1)),
			"--control-socket", paths.EngineSocket(d.o.DataDir), "--api-socket", paths.APISocket(d.o.DataDir),
			"--base-domain", d.o.BaseDomain, "--store-dir", d.path("store"), "--log-dir", d.path("logs"),
			"--isolation", d.o.Isolation, "--worker-memory", strconv.FormatInt(d.o.WorkerMemoryMiB, 10),
			"--quota-invocations", strconv.FormatFloat(d.o.QuotaInvocations, 'g', -1, 64),
		},
	})
	d.agent = supervise.New(supervise.Options{
		Name: "agent", Program: d.o.Program, Line: agentLog.line, Logger: d.o.Logger,
		Args: []string{
			"run", "--lifeline-fd", fd(supervise.LifelineFD(0)),
			"--socket", paths.AgentSocket(d.o.DataDir), "--api-socket", paths.APISocket(d.o.DataDir),
			"--engine-socket", paths.EngineSocket(d.o.DataDir), "--registry", d.registry.Addr().String(), "--registry-plain-http",
			"--store-dir", d.path("store"), "--state-dir", d.path("agent"),
			"--store-budget", strconv.FormatInt(d.o.StoreBudgetMiB, 10),
		},
	})
	var childContext context.Context
	childContext, d.stopChildren = context.WithCancel(context.WithoutCancel(ctx))
	run := func(p *supervise.Process) {
		ended := make(chan error, 1)
		d.children.Go(func() error {
			err := p.Run(childContext)
			ended <- err
			return err
		})
		// A child that cannot be started at all ends the whole run.
		group.Go(func() error {
			select {
			case err := <-ended:
				return err
			case <-ctx.Done():
				return nil
			}
		})
	}
	run(d.engine)
	run(d.agent)
	return nil
}

// stop ends the children first, while the API still answers them, then the
// API, and waits for everything.
func (d *dev) stop(group *errgroup.Group) error {
	if d.submit != nil {
		d.submit.Close() // long polls, followed logs and waits end now
	}
	if d.stopChildren != nil {
		d.stopChildren()
		_ = d.children.Wait()
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownDeadline)
	defer cancel()
	for _, server := range d.servers {
		if err := server.Shutdown(ctx); err != nil {
			_ = server.Close()
		}
	}
	_ = os.Remove(d.path("run", "address"))
	return group.Wait()
}

// awaitReady waits for the children and for functions of earlier runs.
func (d *dev) awaitReady(ctx context.Context) error {
	wait := func(deadline time.Duration, ask func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, deadline)
		defer cancel()
		var last error
		for {
			attempt, cancel := context.WithTimeout(ctx, askDeadline)
			err := ask(attempt)
			cancel()
			if err == nil {
				return nil
			}
			if ctx.Err() == nil || last == nil {
				last = err
			}
			select {
			case <-ctx.Done():
				return last
			case <-time.After(pollEvery):
			}
		}
	}
	ready := readiness{d, newSibling(paths.AgentSocket(d.o.DataDir))}
	defer ready.agent.CloseIdleConnections()
	if err := d.screen.step("engine", func() (string, error) {
		err := wait(startDeadline, func(ctx context.Context) error { _, err := d.control.Status(ctx, 0, 0); return err })
		return "process " + strconv.Itoa(d.engine.PID()), err
	}); err != nil {
		return fmt.Errorf("the engine does not answer: %w; see %s", err, d.path("logs", "system", "engine.log"))
	}
	if err := d.screen.step("agent", func() (string, error) {
		err := wait(startDeadline, ready.askAgent)
		return "process " + strconv.Itoa(d.agent.PID()), err
	}); err != nil {
		return fmt.Errorf("the agent does not answer: %w; see %s", err, d.path("logs", "system", "agent.log"))
	}
	page, err := d.store.List(ctx, function.ListOptions{})
	if err != nil || len(page.Items) == 0 {
		return err
	}
	return d.screen.step("functions", func() (string, error) {
		warm := 0
		_ = wait(warmDeadline, func(ctx context.Context) error {
			status, err := d.control.Status(ctx, 0, 0)
			if err != nil {
				return err
			}
			warm = 0
			for _, f := range status.Functions {
				if f.Serving > 0 {
					warm++
				}
			}
			if warm < len(page.Items) {
				return errors.New("not all warm")
			}
			return nil
		})
		return fmt.Sprintf("%d of %d answer", warm, len(page.Items)), nil
	})
}

func (d *dev) showReady(ctx context.Context, took time.Duration) {
	// Scripts and tests learn the address from a file: port 0 is chosen late.
	if err := renameio.WriteFile(d.path("run", "address"), []byte(d.address+"\n"), 0o600); err != nil {
		d.o.Logger.Warn("address not written", "error", err)
	}
	name := d.o.CommandName
	url, _ := d.urls("hello-go")
	server := ""
	if d.clientURL() != "http://127.0.0.1:8080" {
		server = " --api " + d.clientURL()
	}
	status := ""
	if d.o.DataDir != paths.DataDir() {
		status = " --socket " + paths.AgentSocket(d.o.DataDir)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s in %s. API and functions: %s\n", d.screen.paint(green, "Ready"), took.Round(10*time.Millisecond), d.screen.paint(bold, d.clientURL()+"/"))
	fmt.Fprintf(&b, "\nTry next, in another terminal:\n\n")
	for _, line := range [][2]string{
		{name + " submit" + server + " examples/hello-go", "build a Go function, get its URL"},
		{"curl " + url, "call it, or open it in a browser"},
		{name + " logs" + server + " hello-go -f", "what it writes to stderr"},
		{name + " functions" + server + " list", "everything that is here"},
		{name + " status" + status, "how this machine is"},
	} {
		fmt.Fprintf(&b, "  %-58s %s\n", line[0], d.screen.paint("2", "# "+line[1]))
	}
	if page, err := d.store.List(ctx, function.ListOptions{Limit: 8}); err == nil && len(page.Items) > 0 {
		fmt.Fprintf(&b, "\nHere already:\n\n")
		for _, f := range page.Items {
			url, _ := d.urls(f.Name)
			fmt.Fprintf(&b, "  %s\n", url)
		}
		if page.Next != "" {
			fmt.Fprintf(&b, "  …\n")
		}
	}
	fmt.Fprintf(&b, "\nStop with Ctrl-C; everything is kept in %s.\n", d.o.DataDir)
	d.screen.say("%s", b.String())
}

// clientURL is where a client on this machine reaches the API.
func (d *dev) clientURL() string {
	host, port, err := net.SplitHostPort(d.address)
	if err != nil {
		return "http://" + d.address
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	if port == "80" {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return "http://" + host
	}
	return "http://" + net.JoinHostPort(host, port)
}

// urls returns a function's URL by host and by path.
func (d *dev) urls(name string) (url, pathURL string) {
	host := name + "." + d.o.BaseDomain
	if _, port, err := net.SplitHostPort(d.address); err == nil && port != "80" {
		host += ":" + port
	}
	base := d.clientURL()
	if addr, ok := d.listener.Addr().(*net.TCPAddr); ok && addr.IP.IsUnspecified() && d.o.BaseDomain != "localhost" {
		base = "http://" + strings.TrimPrefix(host, name+".")
	}
	return "http://" + host + "/", base + "/f/" + name + "/"
}

// image is the reference by which anybody who reaches us can pull.
func (d *dev) image(a v1alpha1.Artifact) string {
	host := a.Registry
	if host == "" {
		host = strings.TrimPrefix(d.clientURL(), "http://")
	}
	return host + "/" + a.Repository + "@" + a.Digest
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}
