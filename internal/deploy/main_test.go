package deploy_test

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/deploy/operatortest"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/packaging/spinkube"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	// soon bounds waits for what takes seconds: the machine may be busy.
	soon = 3 * time.Minute

	// Classes of the test's one node: native runs containers, missing is a
	// handler that the node does not have, nowhere asks for a node that is not there.
	native, missing, nowhere, wasmtime = "native", "hearth-spin", "nowhere", "wasmtime"

	// atOnce is how many tests share the cluster. They mostly wait for pods, so
	// it is more than there are processors.
	atOnce = "6"
)

// bench is the one real cluster of this package, with one node, SpinKube's
// definitions and a stand-in for its operator.
type bench struct {
	cluster  *cluster.Cluster
	operator *operatortest.Operator
	registry *cluster.Registry
	// toolbox is the image of the test's native program, which the registry has.
	toolbox v1.Image
	// without is what Reconcile said before there were definitions.
	without error
}

var (
	theBench bench
	shared   = cluster.Shared{
		Start: func(ctx context.Context) (*cluster.Cluster, error) {
			err := theBench.setUp(ctx)
			return theBench.cluster, err
		},
		Close: func() {
			if theBench.operator != nil {
				theBench.operator.Close()
			}
		},
	}
)

func TestMain(m *testing.M) {
	flag.Parse()
	chosen := false
	flag.Visit(func(f *flag.Flag) { chosen = chosen || f.Name == "test.parallel" })
	if !chosen {
		if err := flag.Set("test.parallel", atOnce); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(shared.Main(m))
}

func realCluster(t *testing.T) *bench {
	t.Helper()
	shared.Need(t)
	return &theBench
}

func (b *bench) setUp(ctx context.Context) error {
	if err := cluster.Check(); err != nil { // before minutes of building
		return err
	}
	shim, err := shims.Compile(ctx, os.Stderr)
	if err != nil {
		return err
	}
	if b.cluster, err = cluster.New(ctx, cluster.Options{Nodes: []cluster.Node{{
		Name: "node-a", Runtimes: []cluster.Runtime{{Name: wasmtime, Type: "io.containerd.wasmtime.v1", BinaryPath: shim.Wasmtime}},
		KubeletConfig: map[string]any{
			// Three crashes take seconds instead of a minute.
			"crashLoopBackOff": map[string]any{"maxContainerRestartPeriod": "3s"},
			// One image that cannot be had keeps no other pod waiting.
			"serializeImagePulls": false, "registryPullQPS": 0,
		},
	}}}); err != nil {
		return err
	}
	client := b.cluster.Client()
	for name, class := range map[string]*nodev1.RuntimeClass{
		native: {Handler: "runc"}, missing: {Handler: "spin"}, wasmtime: {Handler: wasmtime},
		nowhere: {Handler: "runc", Scheduling: &nodev1.Scheduling{NodeSelector: map[string]string{"hearth.sh/runtime-spin": "true"}}},
	} {
		class.Name = name
		if _, err := client.NodeV1().RuntimeClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	crd, err := os.ReadFile("../../packaging/chart/hearth/crds/hearth.sh_functions.yaml")
	if err != nil {
		return err
	}
	if _, err := b.cluster.ApplyManifest(ctx, crd); err != nil {
		return err
	}
	if err := b.withoutSpinKube(ctx); err != nil {
		return err
	}
	if _, err := b.cluster.ApplyManifest(ctx, spinkube.CRDs()); err != nil {
		return err
	}
	if err := b.cluster.WaitFor(ctx, "SpinApps to be served", soon, func(ctx context.Context) (bool, error) {
		_, err := b.cluster.Dynamic().Resource(spinApps).List(ctx, metav1.ListOptions{})
		return err == nil, nil
	}); err != nil {
		return err
	}
	if b.registry, err = b.cluster.Registry(ctx, cluster.RegistryOptions{}); err != nil {
		return err
	}
	program, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		return err
	}
	if b.toolbox, err = cluster.BinaryImage(map[string]string{"/app": program}); err != nil {
		return err
	}
	if _, err := b.push(ctx, nativeRepository, b.toolbox); err != nil {
		return err
	}
	// In the place of a shim for Spin, the node runs native programs.
	b.operator, err = operatortest.Start(ctx, operatortest.Options{Config: b.cluster.RESTConfig(), Container: func(c *corev1.Container) {
		if strings.Contains(c.Image, "/native-") {
			c.Command = nil // the image's own
		}
	}})
	return err
}

// withoutSpinKube reconciles where the cluster knows no SpinApps.
func (b *bench) withoutSpinKube(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	c, err := deploy.NewCluster(deploy.Options{Config: b.cluster.RESTConfig()})
	if err != nil {
		return err
	}
	_, b.without = deploy.NewSpin(c).Reconcile(ctx, deploy.Input{
		Function: &kube.Function{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "early", UID: "1"}, Spec: v1alpha1.FunctionSpec{Runtime: v1alpha1.RuntimeSpin}},
		Wanted:   deploy.Revision{Number: 1},
	})
	return nil
}

var (
	spinApps      = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}
	spinExecutors = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinappexecutors"}
)

// requests counts what goes to the API server, watches aside.
type requests struct{ reads, writes atomic.Int64 }

func (r *requests) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(q *http.Request) (*http.Response, error) {
		switch {
		case q.Method != http.MethodGet:
			r.writes.Add(1)
		case q.URL.Query().Get("watch") == "":
			r.reads.Add(1)
		}
		return next.RoundTrip(q)
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(q *http.Request) (*http.Response, error) { return f(q) }

// lab is a deploy.Cluster under way, in a namespace of its own.
type lab struct {
	*bench
	t         *testing.T
	namespace string
	// system is the namespace of the resident functions' Ingresses.
	system   string
	clock    clock
	deploy   *deploy.Cluster
	spin     *deploy.Spin
	hosts    *deploy.Hosts
	requests *requests
	changed  chan string
}

// clock is the time, or later, so that no test waits for a deadline.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// forward makes it d later.
func (c *clock) forward(d time.Duration) { c.ahead.Add(int64(d)) }

var namespaces atomic.Int64

// start begins a test that may run beside the others.
func start(t *testing.T, s deploy.Settings) *lab {
	t.Helper()
	b := realCluster(t)
	name := fmt.Sprintf("team-%d", namespaces.Add(1))
	l := &lab{bench: b, t: t, namespace: name, system: name + "-system", requests: new(requests), changed: make(chan string, 1000)}
	for _, name := range []string{l.namespace, l.system} {
		if _, err := b.cluster.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = b.cluster.Client().CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{})
		})
	}
	if s.BaseDomain == "" {
		s.BaseDomain = l.namespace + ".example"
	}
	if s.RuntimeClass == "" {
		s.RuntimeClass = native
	}
	l.run(s)
	return l
}

// run starts watches with settings s, until the test ends.
func (l *lab) run(s deploy.Settings) {
	t := l.t
	t.Helper()
	c, err := deploy.NewCluster(deploy.Options{Config: l.cluster.RESTConfig(), Namespace: l.system, Settings: s, Now: l.clock.now, WrapTransport: l.requests.wrap})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() {
		done <- c.Run(ctx, deploy.Notify{Function: func(namespace, name string) {
			if namespace != l.namespace {
				return // another test's
			}
			select {
			case l.changed <- namespace + "/" + name:
			default:
			}
		}})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	wait, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	if err := c.WaitSynced(wait); err != nil {
		t.Fatal(err)
	}
	l.deploy, l.spin, l.hosts = c, deploy.NewSpin(c), deploy.NewHosts(c)
}

// create makes a Function object, whose UID owners need.
func (l *lab) create(name string, spec v1alpha1.FunctionSpec) *kube.Function {
	l.t.Helper()
	f := &kube.Function{TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind}, ObjectMeta: metav1.ObjectMeta{Namespace: l.namespace, Name: name}, Spec: spec}
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(f)
	if err != nil {
		l.t.Fatal(err)
	}
	unstructured.RemoveNestedField(m, "status")
	u, err := l.cluster.Dynamic().Resource(kube.FunctionGVR()).Namespace(l.namespace).Create(l.t.Context(), &unstructured.Unstructured{Object: m}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	f.ObjectMeta.UID, f.CreationTimestamp = u.GetUID(), u.GetCreationTimestamp()
	return f
}

// lookAgain is between two reconciliations when no watch tells of a change.
const lookAgain = 500 * time.Millisecond

// reconcile calls Reconcile until ok says so. Like the real caller it keeps
// what was said in the status, and calls again when a watch tells of a change.
func (l *lab) reconcile(in deploy.Input, what string, ok func(deploy.Outcome, error) bool) (deploy.Outcome, error) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), soon)
	defer cancel()
	for {
		out, err := l.spin.Reconcile(ctx, in)
		if out.Node.Name != "" {
			in.Function.Status.Nodes = []v1alpha1.FunctionNode{out.Node}
		}
		if ok(out, err) {
			return out, err
		}
		select {
		case <-l.changed:
		case <-time.After(lookAgain):
		case <-ctx.Done():
			l.t.Fatalf("timed out after %s waiting for %s\nlast: %+v, %v (%v)", soon, what, out, out.Node.Error, err)
		}
	}
}

func isReady(revision int) func(deploy.Outcome, error) bool {
	return func(o deploy.Outcome, err error) bool {
		return err == nil && o.Node.Progress == v1alpha1.ProgressReady && o.Node.Revision == revision && o.Node.Serving == revision
	}
}

func isFailed(o deploy.Outcome, _ error) bool { return o.Node.Progress == v1alpha1.ProgressFailed }

func (l *lab) get(gvr schema.GroupVersionResource, name string) *unstructured.Unstructured {
	l.t.Helper()
	u, err := l.cluster.Dynamic().Resource(gvr).Namespace(l.namespace).Get(l.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return u
}
