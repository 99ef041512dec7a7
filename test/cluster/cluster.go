// Package cluster runs a real Kubernetes cluster on this machine for tests:
// etcd, API server, controller manager and scheduler, and per node (in
// namespaces of its own) containerd, runc, CNI plugins, kubelet and
// kube-proxy. Nothing is faked; what a test sees is what a node in the field
// does.
//
//	c := cluster.Start(t, cluster.Options{Nodes: []cluster.Node{{Name: "node-a"}}})
//	pods, err := c.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
//
// The package owns every process, namespace, cgroup, link and file of its
// clusters and removes them: at Close, and what a killed test left with the
// next New. It imports nothing of Hearth but what other tests share.
package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hearth-sh/hearth/test/needs"
	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
)

const (
	// KeepEnv, when set, keeps the files of a cluster (logs, configuration,
	// certificates) after it was stopped, and says where they are.
	KeepEnv = "HEARTH_KEEP_CLUSTER"
	// base holds the clusters of this machine, one directory per slot. Fixed,
	// so that leftovers are found whatever TMPDIR says, and on disk, because
	// container images are unpacked there.
	base = "/var/tmp/hearth-cluster"

	// startTimeout is for a cluster whose programs are built: some 15 s on two
	// idle cores.
	startTimeout = 3 * time.Minute
	// closeTimeout bounds stopping and cleaning.
	closeTimeout = time.Minute
	// controlPlane names the cgroup and launcher of what is on no node.
	controlPlane = "control-plane"
)

// ErrCannotRun is what New's error wraps when this machine cannot run a
// cluster at all: not Linux, not root, or a program is missing.
var ErrCannotRun = errors.New("this machine cannot run a test cluster")

// nodeName is a DNS label, short enough for a namespace's name.
var nodeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`)

// Options say what cluster to run. The zero value is one node called "node-a".
type Options struct {
	// Nodes, at most 16.
	Nodes []Node
	// ControlPlaneOnly makes a cluster without any node: all there is to
	// objects, and up in a third of the time.
	ControlPlaneOnly bool
	// FeatureGates of the API server, controller manager and scheduler.
	FeatureGates map[string]bool
	// APIServerArgs and ControllerManagerArgs are appended to command lines.
	APIServerArgs         []string
	ControllerManagerArgs []string
	// Progress gets a line per step that takes long, and how long each took.
	// Building the programs, which takes minutes, is written to standard error
	// when it is nil.
	Progress io.Writer
}

// Cluster is a running one. Its methods may be called at the same time.
type Cluster struct {
	dir     string // of this cluster; goes with it
	pki     string
	tools   string
	place   *slot.Place // held while the cluster lives
	slot    int         // its number
	names   []string    // of the nodes, in the order of Options
	cgroups *process.Cgroups
	ca      *authority
	options Options

	machines map[string]*Machine
	etcd     *daemon
	api      *daemon
	manager  *daemon
	sched    *daemon

	config  *rest.Config
	http    *http.Client
	client  kubernetes.Interface
	dynamic dynamic.Interface

	mu         sync.Mutex // guards registries
	registries []*Registry
	others     []*daemon // beside those of a cluster

	closeOnce sync.Once
	closeErr  error
}

// Start runs a cluster for one test and stops it when the test ends. A machine
// that cannot run one (no root, a program missing) skips the test, but fails
// it where the environment variable CI is set. When the test failed, the end
// of every log is part of its output.
func Start(tb testing.TB, options Options) *Cluster {
	tb.Helper()
	c, err := New(tb.Context(), options)
	if err != nil {
		if errors.Is(err, ErrCannotRun) {
			needs.Missing(tb, "%v", err)
		}
		tb.Fatal(err)
	}
	slot.EndWith(tb, c)
	return c
}

// Check says whether this machine can run a cluster; its error wraps
// ErrCannotRun and says what to do.
func Check() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: it needs root for network namespaces, mounts and cgroups; run the test with sudo", ErrCannotRun)
	}
	for _, name := range []string{"etcd", "runc", "ip", "nft", "nsenter", "unshare", "go"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%w: %s is missing; run test/install-deps.sh", ErrCannotRun, name)
		}
	}
	for _, name := range []string{"ptp", "host-local", "portmap", "loopback"} {
		if _, err := os.Stat(filepath.Join(cniDir, name)); err != nil {
			return fmt.Errorf("%w: the CNI plugin %s is missing in %s; run test/install-deps.sh", ErrCannotRun, name, cniDir)
		}
	}
	return nil
}

// New runs a cluster and returns when every node is Ready and pods can be
// made. Building the programs on first use takes minutes and counts towards
// ctx only. The caller calls Close.
func New(ctx context.Context, options Options) (*Cluster, error) {
	if err := Check(); err != nil {
		return nil, err
	}
	if options.ControlPlaneOnly {
		options.Nodes = nil
	} else if len(options.Nodes) == 0 {
		options.Nodes = []Node{{Name: "node-a"}}
	}
	if len(options.Nodes) > maxNodes {
		return nil, fmt.Errorf("a test cluster has at most %d nodes, not %d", maxNodes, len(options.Nodes))
	}
	c := &Cluster{options: options, machines: map[string]*Machine{}}
	for _, node := range options.Nodes {
		if !nodeName.MatchString(node.Name) || node.Name == controlPlane || c.machines[node.Name] != nil {
			return nil, fmt.Errorf("a node's name must be a DNS label of at most 40 characters that no other node has, not %q", node.Name)
		}
		c.names = append(c.names, node.Name)
		c.machines[node.Name] = &Machine{Name: node.Name, spec: node, cluster: c}
	}
	progress := options.Progress
	if progress == nil {
		progress = os.Stderr
	}
	var err error
	if c.tools, err = Tools(ctx, progress); err != nil {
		return nil, err
	}
	if c.place, err = slot.Take(ctx, base, maxSlots, clean); err != nil {
		return nil, fmt.Errorf("finding a place for a test cluster: %w", err)
	}
	c.slot, c.dir, c.pki = c.place.Number, c.place.Dir, filepath.Join(c.place.Dir, "pki")
	bounded, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := c.start(bounded); err != nil {
		var logs strings.Builder
		c.DumpLogs(&logs)
		return nil, errors.Join(fmt.Errorf("starting a test cluster: %w\n%s", err, logs.String()), c.Close())
	}
	return c, nil
}

func slotName(slot int) string { return fmt.Sprintf("hearth%d", slot) }

// clean ends and removes everything of a slot. The caller holds its lock.
func clean(ctx context.Context, slot int) error {
	groups, err := process.FindCgroups(slotName(slot))
	if err != nil {
		return err
	}
	if err := groups.Destroy(ctx); err != nil {
		return err
	}
	if err := removeNetwork(ctx, slot); err != nil {
		return err
	}
	// With the last process of a node its mounts are gone; only files are left.
	return os.RemoveAll(filepath.Join(base, fmt.Sprint(slot)))
}

func (c *Cluster) start(ctx context.Context) error {
	began := time.Now()
	step := func(what string) {
		if c.options.Progress != nil {
			fmt.Fprintf(c.options.Progress, "cluster: %6.1f s  %s\n", time.Since(began).Seconds(), what)
		}
	}
	var err error
	if c.cgroups, err = process.FindCgroups(slotName(c.slot)); err != nil {
		return err
	}
	// The directory is what says that a slot needs cleaning: it comes first.
	if err := os.MkdirAll(c.pki, 0o700); err != nil {
		return err
	}
	if err := c.daemonCgroups(controlPlane).Create(); err != nil {
		return err
	}
	if err := c.place.Watch(c.cgroups); err != nil {
		return err
	}
	if err := c.writeControlPlane(); err != nil {
		return err
	}
	for n, name := range c.names {
		m := c.machines[name]
		m.IP = nodeIP(c.slot, n)
		m.Dir = filepath.Join(c.dir, name)
		m.NetNS = netnsPath(nodeNS(c.slot, name))
		m.ContainerdSocket = filepath.Join(m.Dir, "run/containerd/containerd.sock")
		m.ContainerdConfigDir = filepath.Join(m.Dir, "etc/containerd")
		m.RuntimeBinDir = filepath.Join(m.Dir, runtimeBinDir)
		m.KubeletKubeconfig = filepath.Join(m.Dir, "etc/kubernetes/kubelet.kubeconfig")
		m.launch = filepath.Join(m.Dir, "enter")
		if err := m.prepare(); err != nil {
			return fmt.Errorf("preparing node %s: %w", name, err)
		}
	}
	if err := makeNetwork(ctx, c.slot, c.names); err != nil {
		return err
	}
	step("network")

	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer step("API server")
		if err := c.etcd.start(); err != nil {
			return err
		}
		return c.StartAPIServer(groupCtx)
	})
	for _, name := range c.names {
		group.Go(func() error {
			defer step("containerd of " + name)
			if err := c.machines[name].boot(groupCtx); err != nil {
				return fmt.Errorf("starting node %s: %w", name, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, name := range c.names {
		m := c.machines[name]
		if err := errors.Join(m.kubelet.start(), m.proxy.start()); err != nil {
			return err
		}
	}
	for _, name := range c.names {
		if err := c.WaitNodeReady(ctx, name); err != nil {
			return err
		}
	}
	step("nodes ready")
	if err := c.waitDefaultServiceAccount(ctx); err != nil {
		return err
	}
	step("cluster ready")
	return nil
}

// Close stops everything and removes it: processes, mounts, namespaces,
// cgroups, files. It may be called more than once.
func (c *Cluster) Close() error {
	c.closeOnce.Do(func() { c.closeErr = c.close() })
	return c.closeErr
}

func (c *Cluster) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if c.http != nil {
		utilnet.CloseIdleConnectionsFor(c.http.Transport)
	}
	c.mu.Lock()
	registries := c.registries
	c.mu.Unlock()
	for _, r := range registries {
		r.daemon.kill()
	}
	// Nothing here is worth an orderly end: the files go, too.
	for _, d := range c.daemons() {
		d.abandon()
	}
	var err error
	if c.cgroups != nil {
		err = c.cgroups.Destroy(ctx)
	}
	for _, d := range c.daemons() {
		d.kill()
	}
	c.place.Unwatch()
	if err == nil {
		if os.Getenv(KeepEnv) != "" {
			err = c.keep(ctx)
		} else {
			err = clean(ctx, c.slot)
		}
	}
	if err != nil {
		err = fmt.Errorf("removing the test cluster: %w", err)
	}
	return errors.Join(err, c.place.Release())
}

// keep moves the files where no later cluster removes them.
func (c *Cluster) keep(ctx context.Context) error {
	if err := removeNetwork(ctx, c.slot); err != nil {
		return err
	}
	kept := filepath.Join(base, fmt.Sprintf("kept-%s-%d", time.Now().UTC().Format("20060102T150405.000"), c.slot))
	if err := os.Rename(c.dir, kept); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "cluster: %s is set: the files are kept in %s\n", KeepEnv, kept)
	return nil
}

func (c *Cluster) daemons() []*daemon {
	all := []*daemon{c.etcd, c.api, c.manager, c.sched}
	c.mu.Lock()
	all = append(all, c.others...)
	c.mu.Unlock()
	for _, m := range c.machines {
		all = append(all, m.holder, m.containerd, m.kubelet, m.proxy)
	}
	var out []*daemon
	for _, d := range all {
		if d != nil {
			out = append(out, d)
		}
	}
	return out
}

// DumpLogs writes the end of every component's log.
func (c *Cluster) DumpLogs(w io.Writer) {
	dumpLogs(w, controlPlane, filepath.Join(c.dir, "logs"))
	for _, name := range c.names {
		dumpLogs(w, name, filepath.Join(c.dir, name, "logs"))
	}
}

// Dir holds the cluster's files; logs of the control plane are in logs, those
// of a node in <node>/logs.
func (c *Cluster) Dir() string { return c.dir }

// Node returns the node of that name, or nil.
func (c *Cluster) Node(name string) *Machine { return c.machines[name] }

// Nodes returns the nodes in the order of Options.
func (c *Cluster) Nodes() []*Machine {
	var out []*Machine
	for _, name := range c.names {
		out = append(out, c.machines[name])
	}
	return out
}

// Kubeconfig is the path of one that may do everything (group system:masters).
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "admin.kubeconfig") }

// RESTConfig is a copy of the administrator's, to be changed at will.
func (c *Cluster) RESTConfig() *rest.Config { return rest.CopyConfig(c.config) }

// Client is the administrator's.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// Dynamic is the administrator's.
func (c *Cluster) Dynamic() dynamic.Interface { return c.dynamic }

// IssueKubeconfig writes a kubeconfig for a user of the cluster's own
// authority to path.
func (c *Cluster) IssueKubeconfig(path, user string, groups ...string) error {
	return c.ca.kubeconfig(path, c.server(), subject{name: user, groups: groups})
}

// HostIP is the address at which nodes and pods reach servers that a test
// opens on this machine.
func (c *Cluster) HostIP() string { return hostIP(c.slot) }

func (c *Cluster) server() string { return "https://" + hostIP(c.slot) + ":6443" }

// clients makes them from the administrator's kubeconfig.
func (c *Cluster) clients() error {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return err
	}
	// Tests poll; the default of five requests a second would be their clock.
	config.QPS, config.Burst = 200, 400
	c.config = config
	// One transport for both, so that Close can close its connections.
	if c.http, err = rest.HTTPClientFor(config); err != nil {
		return err
	}
	if c.client, err = kubernetes.NewForConfigAndClient(config, c.http); err != nil {
		return err
	}
	c.dynamic, err = dynamic.NewForConfigAndClient(config, c.http)
	return err
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }
