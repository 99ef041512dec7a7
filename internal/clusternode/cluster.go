// Package clusternode is what the agent does on a node of a Kubernetes cluster:
// it has the node's runtimes proved, writes on the Node what is proved, has
// wanted images brought here, and has the node emptied before it goes.
//
// It owns the wiring and the conclusions that need more than one part. What
// the parts do is theirs: shim proves, images brings, node writes and drains,
// imds hears. The agent knows it as an agent.ClusterNode only, so that a build
// for one machine goes without it and the cluster's clients.
package clusternode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/agent"
	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/health"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/node"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/prefetch"
	"github.com/hearth-sh/hearth/internal/shim"
)

// Options say how this machine is a node of a Kubernetes cluster.
type Options struct {
	// Clients are the identities towards the API server; required.
	Clients *kube.Clients
	// Namespace is where lists of images to prefetch are taken from, and, with
	// Pod, this process's own pod, which a drain lets go last. Pod is empty
	// outside a pod.
	Namespace, Pod string
	// ContainerdSocket is containerd's; empty means the first of
	// ContainerdSockets that exists.
	ContainerdSocket string
	// HostRoot is where the host's file system is seen: "/" on the host.
	HostRoot string
	// Metadata reads instance metadata; nil where there is none to ask.
	Metadata *imds.Client
	// DrainOnRebalance evicts on a rebalance recommendation too.
	DrainOnRebalance bool
	// Heartbeat is how often the condition of the node is written when it does
	// not change; 0 means node.DefaultHeartbeat.
	Heartbeat time.Duration
	// ShimInterval is how often containerd and the node's shims are looked at
	// for changes; 0 means shim.DefaultWatchInterval.
	ShimInterval time.Duration
	// NoticeInterval is how often instance metadata is asked for notices; 0
	// means imds.DefaultInterval.
	NoticeInterval time.Duration
	// MaintenanceLead is how long before a scheduled event the node is
	// emptied (default 10 min).
	MaintenanceLead time.Duration
}

// ContainerdSockets are where containerd listens: k3s's own, RKE2's is the
// same, then a distribution's.
var ContainerdSockets = []string{"/run/k3s/containerd/containerd.sock", "/run/containerd/containerd.sock"}

const (
	// socketPause is between two looks for containerd's socket: the agent may
	// be there before k3s.
	socketPause = time.Second
	// concludeEvery repairs what no event told of, such as a label that a
	// person removed.
	concludeEvery = time.Minute
	// concludeRetry is the pause after the API server refused a conclusion.
	concludeRetry = 5 * time.Second
	// reportEvery is how often the health model looks at the parts.
	reportEvery = 500 * time.Millisecond
	// loopSilence is how long the images loop may be silent: one pass on a busy
	// machine may take some time.
	loopSilence = 60 * time.Second
	// classesEvery is how often RuntimeClasses are read: they change with
	// installations, and only the status shows them.
	classesEvery = 5 * time.Minute
	// defaultMaintenanceLead leaves room for grace periods of minutes and for
	// disruption budgets.
	defaultMaintenanceLead = 10 * time.Minute
)

// cluster is the part of the agent that only nodes of a cluster have.
type cluster struct {
	o     Options
	log   *slog.Logger
	store *precompile.Store
	live  func(digests []string)
	state string // directory
	run   string // directory of sockets and pipes, the same name for the shims

	recorder  *node.Recorder
	labels    *node.Labels
	condition *node.Condition
	// imagesNote is the condition that shows kubectl how far the images are.
	imagesNote *node.Note
	taints     *node.Taints
	drainer    *node.Drainer
	notices    *notices
	watcher    *imds.Watcher // nil without instance metadata
	metrics    prometheus.Registerer
	registry   *health.Registry

	containerd, runtimes, shims, kubernetes, images, metadata, interruption, spotServer *health.Check
	imagesTurn                                                                          *health.Loop

	// heard holds a token when the API server was lost or found by whoever
	// watches it; unheard is maintain's own: which of the two it was last.
	heard   chan struct{}
	unheard bool

	mu       sync.Mutex
	monitor  *shim.Monitor
	loop     *images.Loop
	identity *imds.Identity
	classes  []shim.RuntimeClass
	classAt  time.Time
}

// New returns what agent.Options.Cluster wants.
func New(o Options) func(agent.ClusterParts) (agent.ClusterNode, error) {
	return func(p agent.ClusterParts) (agent.ClusterNode, error) {
		// Not a nil *cluster as an interface that is not nil.
		c, err := newCluster(o, p)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
}

func newCluster(o Options, p agent.ClusterParts) (*cluster, error) {
	if o.HostRoot == "" {
		o.HostRoot = "/"
	}
	if o.MaintenanceLead <= 0 {
		o.MaintenanceLead = defaultMaintenanceLead
	}
	c := &cluster{
		o: o, log: p.Logger, store: p.Store, live: p.SetLive, state: p.StateDir, run: p.RunDir, metrics: p.Metrics, registry: p.Health,
		heard: make(chan struct{}, 1),
	}
	instance := o.Pod
	if instance == "" {
		instance = o.Clients.NodeName
	}
	options := node.Options{Logger: p.Logger}
	c.recorder = node.NewRecorder(o.Clients.Node, instance, options)
	options.Events = c.recorder
	c.labels = node.NewLabels(o.Clients, shim.DefaultStaleAfter, options)
	c.condition = node.NewCondition(o.Clients, o.Heartbeat, options)
	c.taints = node.NewTaints(o.Clients, options)
	var err error
	if c.imagesNote, err = node.NewNote(o.Clients, images.ConditionType, options); err != nil {
		return nil, err
	}
	c.drainer = node.NewDrainer(o.Clients, node.DrainOptions{
		Options: options, PodNamespace: o.Namespace, PodName: o.Pod, DrainOnRebalance: o.DrainOnRebalance,
	})
	c.notices = newNotices(c.drainer, o.MaintenanceLead, p.Logger)
	if err := p.Metrics.Register(c.drainer.Collector()); err != nil {
		return nil, fmt.Errorf("register the metrics of draining: %w", err)
	}
	if o.Metadata != nil {
		if c.watcher, err = imds.NewWatcher(o.Metadata, imds.WatcherOptions{Interval: o.NoticeInterval, Logger: p.Logger, Metrics: p.Metrics}); err != nil {
			return nil, err
		}
	}
	c.registerChecks(p.Health)
	return c, nil
}

func (c *cluster) registerChecks(r *health.Registry) {
	c.kubernetes = r.Register(health.Definition{Code: "kubernetes", Severity: v1alpha1.SeverityWarning,
		Pending: "waiting for the API server",
		Remedy:  "what runs goes on running; see whether the API server answers and whether the agent's roles are installed"})
	c.containerd = r.Register(health.Definition{Code: "containerd", Severity: v1alpha1.SeverityCritical,
		Pending: "waiting for containerd", Remedy: "see `systemctl status k3s k3s-agent containerd`, or say where it listens with --containerd-socket"})
	c.runtimes = r.Register(health.Definition{Code: "runtimes", Severity: v1alpha1.SeverityCritical, DependsOn: []string{"containerd"},
		Pending: "waiting for the first proof", Remedy: "no runtime of this node runs Wasm; `nodeagent status` says why for each"})
	c.shims = r.Register(health.Definition{Code: "shims", Severity: v1alpha1.SeverityWarning, DependsOn: []string{"containerd"},
		Pending: "waiting for the first proof", Remedy: "install or upgrade the shim on this node; it is proved again within seconds"})
	c.images = r.Register(health.Definition{Code: "images", Severity: v1alpha1.SeverityWarning, DependsOn: []string{"containerd"},
		Pending: "waiting to hear which images are wanted", Remedy: "`nodeagent status` names each image and why; it is tried again by itself"})
	c.interruption = r.Register(health.Definition{Code: "interruption", Severity: v1alpha1.SeverityWarning,
		Pending: "no notice yet", Remedy: "nothing to do: pods leave by themselves, a replacement comes from the pool"})
	c.spotServer = r.Register(health.Definition{Code: "spot-server", Severity: v1alpha1.SeverityWarning,
		Pending: "not known yet", Remedy: "replace this server by an on-demand instance"})
	if c.o.Metadata != nil {
		c.metadata = r.Register(health.Definition{Code: "instance-metadata", Severity: v1alpha1.SeverityWarning,
			Pending: "waiting for the instance metadata service",
			Remedy:  "notices of interruption are missed meanwhile; in a pod without host network the instance's hop limit must be 2, see `nodeagent doctor`"})
	} else {
		c.spotServer.OK("not an EC2 instance, or told not to ask (--imds)")
	}
	c.imagesTurn = r.Loop("images loop", loopSilence)
	c.interruption.OK("none announced")
}

// Functions implements agent.ClusterNode.
func (c *cluster) Functions() (prefetch.Source, func(context.Context)) {
	if c.o.Clients.Reader == nil {
		return nil, nil
	}
	source := newFunctionSource(kube.NewFunctions(c.o.Clients.Reader), c.log)
	return source, source.Run
}

// What the API of a cluster leaves in its namespace for its clients.
const (
	apiName         = "hearth-api"
	apiAuthorityKey = "ca.crt"
	// apiAddressKey is beside it: host:port of the Service, which spares nodes
	// the cluster's name service.
	apiAddressKey = "address"
)

// APIAuthority implements agent.ClusterNode. The name is that of the Service,
// whatever the agent connects to.
func (c *cluster) APIAuthority() (serverName string, certificates func(context.Context) ([]byte, error), address func() string) {
	client := c.o.Clients.Tainter // the ServiceAccount
	if client == nil {
		client = c.o.Clients.Node
	}
	var found atomic.Pointer[string]
	certificates = func(ctx context.Context) ([]byte, error) {
		pem, at, err := readAPIAuthority(ctx, client, c.o.Namespace)
		if err == nil {
			found.Store(&at)
		}
		return pem, err
	}
	address = func() string {
		if at := found.Load(); at != nil {
			return *at
		}
		return ""
	}
	return apiName + "." + c.o.Namespace + ".svc", certificates, address
}

// readAPIAuthority lists instead of getting: listing ConfigMaps of its namespace
// is what the agent may do anyway.
func readAPIAuthority(ctx context.Context, client kubernetes.Interface, namespace string) (certificates []byte, address string, err error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	list, err := client.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + apiName})
	if err != nil {
		return nil, "", fmt.Errorf("read ConfigMap %s/%s: %w", namespace, apiName, err)
	}
	for _, m := range list.Items {
		if pem := m.Data[apiAuthorityKey]; m.Name == apiName && pem != "" {
			return []byte(pem), m.Data[apiAddressKey], nil
		}
	}
	return nil, "", fmt.Errorf("no ConfigMap %s/%s has a %s yet: the API makes it when it first runs (`kubectl -n %s get deployment %s`)",
		namespace, apiName, apiAuthorityKey, namespace, apiName)
}

// Keychain implements agent.ClusterNode with the tokens that ECR gives the
// instance's role.
func (c *cluster) Keychain(ctx context.Context) (authn.Keychain, error) {
	if c.o.Metadata == nil {
		return nil, nil
	}
	tokens, err := c.registryTokens(ctx)
	if err != nil {
		return nil, err
	}
	return tokens.Keychain(), nil
}

func (c *cluster) registryTokens(ctx context.Context) (*ecr.Source, error) {
	return ecr.New(ctx, ecr.Options{Metadata: c.o.Metadata, FirstUse: ecr.Jitter(tokenJitter), Logger: c.log})
}

// Start implements agent.ClusterNode. Nothing is written or driven before this
// is the node's only agent.
func (c *cluster) Start(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error {
		lock, err := lockNode(ctx, lockPath, c.owner(), lockPatience, func(reason string) {
			c.log.Warn(reason)
			c.containerd.Fail(reason, "each node has one agent; this one ends if the other does not")
		})
		if err != nil {
			return ended(ctx, err)
		}
		defer lock.Close()
		group, ctx := errgroup.WithContext(ctx)
		c.work(ctx, group)
		return group.Wait()
	})
}

// work starts what makes up the agent of a node.
func (c *cluster) work(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error { c.recorder.Run(ctx); return nil })
	group.Go(func() error {
		if err := c.condition.Run(ctx); err != nil {
			c.log.Warn("the node condition was left as it was", "err", err)
		}
		return nil
	})
	group.Go(func() error { return ended(ctx, c.drainer.Run(ctx)) })
	if c.watcher != nil {
		group.Go(func() error { return ended(ctx, c.watcher.Run(ctx, c.noticed)) })
		group.Go(func() error { c.identify(ctx); return nil })
	}
	group.Go(func() error { c.maintain(ctx); return nil })
	group.Go(func() error { return c.withContainerd(ctx) })
}

// ended makes the end of a loop with its context no error.
func ended(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

// withContainerd waits for containerd's socket, then runs what needs it.
func (c *cluster) withContainerd(ctx context.Context) error {
	socket := c.findContainerd(ctx)
	if socket == "" {
		return nil
	}
	c.log.Info("found containerd", "socket", socket)
	shimNode, err := shim.NewContainerd(shim.ContainerdOptions{
		Address: socket, StateDir: filepath.Join(c.run, "shim"), Proc: c.hostProc(), Logger: c.log,
	})
	if err != nil {
		return err
	}
	defer shimNode.Close()
	cri, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to %s: %w", socket, err)
	}
	defer cri.Close()
	var binaries shim.BinaryCache
	monitor, err := shim.NewMonitor(shim.MonitorOptions{
		Node: shimNode, WatchInterval: c.o.ShimInterval, Logger: c.log,
		Discover: func(ctx context.Context, server shim.Server) (shim.Inventory, error) {
			return shim.Discover(ctx, shim.DiscoverOptions{
				Root: c.o.HostRoot, Proc: c.hostProc(), ContainerdPID: server.PID,
				CRI: runtimeapi.NewRuntimeServiceClient(cri), RuntimeClasses: c.runtimeClasses(ctx), Binaries: &binaries,
			})
		},
	})
	if err != nil {
		return err
	}
	runtime, err := images.NewContainerd(socket)
	if err != nil {
		return err
	}
	defer runtime.Close()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return ended(ctx, monitor.Run(ctx)) })
	c.mu.Lock()
	c.monitor = monitor
	c.mu.Unlock()

	var source *images.Kubernetes
	if c.o.Clients.Reader != nil && c.o.Clients.Tainter != nil {
		if source, err = c.prefetch(ctx, group, runtime, shimNode); err != nil {
			return err
		}
	} else {
		c.live(nil)
		c.images.OK("nobody says which are wanted: the agent has the kubelet's identity only")
	}
	group.Go(func() error { c.conclude(ctx, monitor, source); return nil })
	return group.Wait()
}

// prefetch starts the loop that brings wanted images here.
func (c *cluster) prefetch(ctx context.Context, group *errgroup.Group, runtime *images.Containerd, shimNode *shim.Containerd) (*images.Kubernetes, error) {
	source, err := images.NewKubernetes(images.KubernetesOptions{
		Client: c.o.Clients.Tainter, Dynamic: c.o.Clients.Reader, Node: c.o.Clients.NodeName, Namespace: c.o.Namespace,
		WasmHandlers: c.handlers, CachePath: filepath.Join(c.state, "images-wanted.json"), Logger: c.log,
	})
	if err != nil {
		return nil, err
	}
	root, err := runtime.ImageRoot(ctx)
	if err != nil {
		c.log.Warn("free space of images is not watched", "err", err)
		root = ""
	} else if root = filepath.Join(c.o.HostRoot, root); !isDir(root) {
		root = ""
	}
	var credentials images.Credentials
	if c.o.Metadata != nil {
		tokens, err := c.registryTokens(ctx)
		if err != nil {
			return nil, err
		}
		credentials = &registryTokens{source: tokens, last: map[string]ecr.Credentials{}}
	}
	loop, err := images.New(images.Options{
		Source: source, Runtime: runtime, Store: c.store, Credentials: credentials,
		Warmer:  &shimWarmer{warmer: shim.NewWarmer(shimNode, shim.WarmerOptions{Logger: c.log}), state: c.proven},
		SetLive: c.live,
		Node:    c.o.Clients.NodeName, TempDir: c.state, StatePath: filepath.Join(c.state, "images.json"),
		DiskPath: root, Logger: c.log, Registerer: c.metrics,
	})
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.loop = loop
	monitor := c.monitor
	c.mu.Unlock()
	group.Go(func() error {
		// Before, no handler of this node is known, and it would seem that no
		// image is wanted here; what was wanted last stands meanwhile.
		if !looked(ctx, monitor) {
			return nil // the agent ends
		}
		return ended(ctx, source.Run(ctx))
	})
	group.Go(func() error { return ended(ctx, loop.Run(ctx)) })
	group.Go(func() error { loop.Announce(ctx, c.announce); return nil })
	return source, nil
}

// looked waits until the node's runtimes were looked for, and returns false
// when ctx ended before.
func looked(ctx context.Context, monitor *shim.Monitor) bool {
	changed, stop := monitor.Subscribe()
	defer stop()
	for !monitor.Snapshot().Looked {
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
	return true
}

// announce writes what the images loop has to say as a node condition.
func (c *cluster) announce(ctx context.Context, condition images.Condition) error {
	return c.imagesNote.Write(ctx, node.Readiness{
		Status: corev1.ConditionStatus(condition.Status), Reason: condition.Reason, Message: condition.Message,
	})
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// findContainerd waits until there is a socket; it returns "" when ctx ends.
func (c *cluster) findContainerd(ctx context.Context) string {
	sockets := ContainerdSockets
	if c.o.ContainerdSocket != "" {
		sockets = []string{c.o.ContainerdSocket}
	}
	for {
		for _, socket := range sockets {
			if info, err := os.Stat(socket); err == nil && info.Mode().Type() == os.ModeSocket {
				return socket
			}
		}
		c.containerd.Fail("there is no socket at "+strings.Join(sockets, " or "), "")
		select {
		case <-ctx.Done():
			return ""
		case <-time.After(socketPause):
		}
	}
}

// hostProc is where the host's processes are seen: its own /proc below the
// host's root, which is only of use together with it.
func (c *cluster) hostProc() string { return filepath.Join(c.o.HostRoot, "proc") }

// runtimeClasses returns those of the cluster, the last known ones while the
// API server does not answer.
func (c *cluster) runtimeClasses(ctx context.Context) []shim.RuntimeClass {
	c.mu.Lock()
	classes, at := c.classes, c.classAt
	c.mu.Unlock()
	if time.Since(at) < classesEvery {
		return classes
	}
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	// The ServiceAccount may read them; a kubelet may by itself.
	client := c.o.Clients.Tainter
	if client == nil {
		client = c.o.Clients.Node
	}
	list, err := client.NodeV1().RuntimeClasses().List(ctx, metav1.ListOptions{Limit: 500, ResourceVersion: "0"})
	c.mu.Lock()
	defer c.mu.Unlock()
	// A failed attempt counts as one: containerd must not wait for Kubernetes.
	c.classAt = time.Now()
	if err != nil {
		c.classAt = c.classAt.Add(concludeEvery - classesEvery)
		c.log.Debug("RuntimeClasses not read", "err", err)
		return c.classes
	}
	c.classes = nil
	for _, class := range list.Items {
		c.classes = append(c.classes, shim.RuntimeClass{Name: class.Name, Handler: class.Handler})
	}
	return c.classes
}

// handlers are the runtime handlers of this node that run Wasm, proven or not:
// their images are wanted here either way, proofs come and go.
func (c *cluster) handlers() []string {
	c.mu.Lock()
	monitor := c.monitor
	c.mu.Unlock()
	if monitor == nil {
		return nil
	}
	var handlers []string
	for _, s := range monitor.Snapshot().Runtimes {
		if s.Runtime.Handler != "" {
			handlers = append(handlers, s.Runtime.Handler)
		}
	}
	return handlers
}

// proven returns what is known of a handler's runtime.
func (c *cluster) proven(handler string) (shim.State, bool) {
	c.mu.Lock()
	monitor := c.monitor
	c.mu.Unlock()
	if monitor == nil {
		return shim.State{}, false
	}
	return monitor.Snapshot().Proven(handler)
}

// conclude turns proofs into the node's labels, condition and taint whenever
// they change, when the API server is lost or found, and again every minute.
func (c *cluster) conclude(ctx context.Context, monitor *shim.Monitor, source *images.Kubernetes) {
	changed, stop := monitor.Subscribe()
	defer stop()
	var handlers []string
	var untainted bool
	for {
		snapshot := monitor.Snapshot()
		verdict := judge(snapshot)
		c.report(snapshot, verdict)
		pause := concludeEvery
		if verdict.answered {
			c.condition.Set(verdict.condition)
			err := c.labels.Sync(ctx, verdict.proofs)
			if err == nil && verdict.condition.Status == corev1.ConditionTrue && !untainted {
				switch err = c.taints.Proven(ctx); {
				case err == nil:
					untainted = true
				case errors.Is(err, node.ErrNoTaintAuthority):
					c.log.Warn("the startup taint stays", "err", err)
					untainted, err = true, nil
				}
			}
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				c.kubernetes.Fail(err.Error(), "")
				pause = concludeRetry
			default:
				c.kubernetes.OK("labels and condition are written")
			}
		}
		if now := c.handlers(); source != nil && !slices.Equal(now, handlers) {
			handlers = now
			source.Look()
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
		case <-c.heard:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// verdict is what a snapshot of proofs means for the node.
type verdict struct {
	// answered is false until runtimes were looked for and every one was tried
	// once; before, nothing is concluded: what an agent before this one proved
	// stands.
	answered  bool
	proofs    map[string]node.ProofState
	condition node.Readiness
}

// judge concludes. A label is about a handler, because that is what a pod's
// RuntimeClass names.
func judge(s shim.Snapshot) verdict {
	v := verdict{answered: s.Looked, proofs: map[string]node.ProofState{}}
	var proven, failed, unknown []string
	for _, state := range s.Runtimes {
		handler := state.Runtime.Handler
		if handler == "" {
			continue
		}
		switch {
		case state.Proven:
			v.proofs[handler] = node.Proven
			proven = append(proven, handler)
		case state.Last == nil:
			v.answered = false
		case state.Answer == nil || state.Stale:
			v.proofs[handler] = node.Unknown
			unknown = append(unknown, fmt.Sprintf("%s: %s", handler, state.Last.Message))
		default:
			v.proofs[handler] = node.Failed
			failed = append(failed, fmt.Sprintf("%s: %s", handler, state.Answer.Message))
		}
	}
	switch {
	case len(proven) > 0:
		v.condition = node.Readiness{Status: corev1.ConditionTrue, Reason: "RuntimesProven", Message: "A module ran under " + strings.Join(proven, ", ") + "."}
		if len(failed) > 0 {
			v.condition.Reason = "SomeRuntimesProven"
			v.condition.Message += " Not under " + strings.Join(failed, "; ")
		}
	case len(failed) > 0:
		v.condition = node.Readiness{Status: corev1.ConditionFalse, Reason: "ProofFailed", Message: strings.Join(failed, "; ")}
	case len(unknown) > 0:
		v.condition = node.Readiness{Status: corev1.ConditionUnknown, Reason: "NoAnswer", Message: strings.Join(unknown, "; ")}
	case s.Unreachable != "":
		v.condition = node.Readiness{Status: corev1.ConditionUnknown, Reason: "ContainerdUnreachable", Message: s.Unreachable}
	default:
		v.condition = node.Readiness{Status: corev1.ConditionFalse, Reason: "NoRuntime", Message: "No Wasm runtime is installed on this node."}
	}
	return v
}

// report feeds the health model.
func (c *cluster) report(s shim.Snapshot, v verdict) {
	if s.Unreachable != "" {
		c.containerd.Fail(s.Unreachable, "")
	} else {
		c.containerd.OK("answers")
	}
	if !v.answered {
		if len(s.Problems) > 0 {
			c.shims.Fail(strings.Join(s.Problems, "; "), "")
		}
		return
	}
	var bad []string
	for _, state := range s.Runtimes {
		if !state.Proven && state.Last != nil {
			bad = append(bad, fmt.Sprintf("%s: %s", state.Runtime.Key(), state.Last.Message))
		}
	}
	switch v.condition.Status {
	case corev1.ConditionTrue:
		c.runtimes.OK(v.condition.Message)
	case corev1.ConditionUnknown:
		c.runtimes.Unknown(v.condition.Message)
	default:
		if len(s.Runtimes) == 0 {
			// A pool for resident functions needs no shim at all.
			c.runtimes.OK("no Wasm runtime is installed; pods with one are not for this node")
		} else {
			c.runtimes.Fail(v.condition.Message, "")
		}
	}
	if bad = append(bad, s.Problems...); len(bad) > 0 {
		c.shims.Fail(strings.Join(bad, "; "), "")
	} else {
		c.shims.OK(fmt.Sprintf("%d found, all proven", len(s.Runtimes)))
	}
}

// identify reads who this instance is, once.
func (c *cluster) identify(ctx context.Context) {
	pause := time.Second
	for {
		identity, err := c.o.Metadata.Identity(ctx)
		if err == nil {
			c.mu.Lock()
			c.identity = &identity
			c.mu.Unlock()
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, time.Minute)
	}
	c.lookForSpotServer(ctx)
}

// lookForSpotServer calls out a server of the cluster on a Spot instance.
func (c *cluster) lookForSpotServer(ctx context.Context) {
	for pause := time.Second; ; pause = min(2*pause, time.Minute) {
		call, cancel := context.WithTimeout(ctx, kube.CallTimeout)
		n, err := c.o.Clients.Node.CoreV1().Nodes().Get(call, c.o.Clients.NodeName, metav1.GetOptions{})
		cancel()
		if err == nil {
			c.mu.Lock()
			lifecycle := string(c.identity.LifeCycle)
			c.mu.Unlock()
			if message, bad := node.SpotServer(n, lifecycle); bad {
				c.log.Error(message)
				c.recorder.Node(n, node.Warning, "ServerOnSpot", message)
				c.spotServer.Fail(message, "")
			} else {
				c.spotServer.OK("life cycle " + lifecycle)
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// noticed takes in what the metadata service announced. It must not block.
func (c *cluster) noticed(change imds.Change) {
	c.notices.settle(change.Notices)
}

// maintain acts on scheduled events when their time has come, feeds the
// health model with what the watcher and the drainer say, and beats for the
// images loop.
func (c *cluster) maintain(ctx context.Context) {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		if c.watcher != nil {
			state := c.watcher.State()
			switch {
			case state.Degraded:
				c.metadata.Fail(state.Reason, "")
			case state.Polled:
				c.metadata.OK("answers")
			}
			if state.Polled {
				c.notices.settle(state.Notices)
			}
		}
		c.reportDrain()
		c.reportImages()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (c *cluster) reportDrain() {
	s := c.drainer.Status()
	if s.Phase == node.DrainIdle {
		c.interruption.OK("none announced")
		return
	}
	message := fmt.Sprintf("%s: %s, %d of %d pods gone", s.Notice.Kind, s.Phase, s.Gone, s.Total)
	if !s.Notice.Deadline.IsZero() {
		message += ", deadline " + s.Notice.Deadline.UTC().Format(time.RFC3339)
	}
	if s.LastError != "" {
		message += ": " + s.LastError
	}
	c.interruption.Fail(message, "")
}

// hear takes in whether the API server is heard by those who watch it. What is
// watched ends with it; nobody should have to wait for the next minute to read
// that it is away, or back.
func (c *cluster) hear(server bool) {
	if server != c.unheard {
		return
	}
	c.unheard = !server
	select {
	case c.heard <- struct{}{}:
	default:
	}
}

func (c *cluster) reportImages() {
	c.mu.Lock()
	loop := c.loop
	c.mu.Unlock()
	if loop == nil {
		c.imagesTurn.Beat() // there is nothing yet that could be stuck
		return
	}
	s, _ := loop.Status()
	c.hear(s.StaleSince.IsZero())
	if s.LastPass.IsZero() || time.Since(s.LastPass) < loopSilence {
		c.imagesTurn.Beat()
	}
	switch {
	case !s.Known:
	case s.Counts[images.StateFailed] > 0:
		c.images.Fail(s.Summary, "")
	// What is left to kubelet for want of a pull secret is no fault: the
	// summary says so.
	case !s.StaleSince.IsZero():
		c.images.Fail("not heard which images are wanted since "+s.StaleSince.UTC().Format(time.RFC3339)+": "+s.StaleReason,
			"what was wanted last counts on; see whether the API server answers")
	default:
		c.images.OK(s.Summary)
	}
}
