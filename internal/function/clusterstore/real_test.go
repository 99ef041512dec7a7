package clusterstore_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/function/storetest"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

const system = "hearth-system"

// shared is the one real API server of this package's tests.
var shared = cluster.Shared{Start: start}

func apiServer(t testing.TB) *cluster.Cluster { t.Helper(); return shared.Need(t) }

func start(ctx context.Context) (*cluster.Cluster, error) {
	c, err := cluster.New(ctx, cluster.Options{ControlPlaneOnly: true})
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob("../../../packaging/chart/hearth/crds/hearth.sh_*.yaml")
	if err != nil {
		return c, err
	}
	for _, file := range files {
		manifest, err := os.ReadFile(file)
		if err != nil {
			return c, err
		}
		if _, err := c.ApplyManifest(ctx, manifest); err != nil {
			return c, err
		}
	}
	for _, name := range []string{system, "ann", "bob", "one", "two"} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := c.Client().CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			return c, err
		}
	}
	client, err := kube.NewRESTClient(c.RESTConfig())
	if err != nil {
		return c, err
	}
	return c, c.WaitFor(ctx, "functions and hosts to be served", 20*time.Second, func(ctx context.Context) (bool, error) {
		return client.Get().Resource("functions").Do(ctx).Error() == nil && client.Get().Resource("hosts").Do(ctx).Error() == nil, nil
	})
}

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

var (
	instances atomic.Int64
	wiped     = "" // the place that the objects are of
)

// fresh deletes everything that a store wrote. Names are cluster-wide, and
// their numbers are remembered: a test that expects an empty store begins so.
func fresh(t testing.TB) {
	t.Helper()
	c := apiServer(t)
	ctx := context.Background()
	client, err := kube.NewRESTClient(c.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	all := metav1.ListOptions{}
	ours := metav1.ListOptions{LabelSelector: "hearth.sh/function"}
	for _, ns := range []string{"default", "ann", "bob", "one", "two"} {
		errs := errors.Join(
			client.Delete().Namespace(ns).Resource("functions").Do(ctx).Error(),
			c.Client().AppsV1().ControllerRevisions(ns).DeleteCollection(ctx, metav1.DeleteOptions{}, ours),
			c.Client().CoreV1().Secrets(ns).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		)
		if errs != nil {
			t.Fatal(errs)
		}
	}
	if err := errors.Join(
		client.Delete().Resource("hosts").Do(ctx).Error(),
		c.Client().CoreV1().ConfigMaps(system).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "hearth.sh/request"}),
		c.Client().CoordinationV1().Leases(system).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		c.Client().DiscoveryV1().EndpointSlices(system).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		c.Client().CoreV1().Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, all),
	); err != nil {
		t.Fatal(err)
	}
}

func options(t testing.TB) clusterstore.Options {
	return clusterstore.Options{
		Config:        apiServer(t).RESTConfig(),
		Namespace:     system,
		Instance:      fmt.Sprintf("api-%d", instances.Add(1)),
		Host:          func(_, name string) string { return name + ".functions.test" },
		BaseDomain:    func() string { return "functions.test" },
		LeaseDuration: 2 * time.Second,
	}
}

func open(t testing.TB, change func(*clusterstore.Options)) *clusterstore.Store {
	t.Helper()
	o := options(t)
	if change != nil {
		change(&o)
	}
	s, err := clusterstore.New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestConformance(t *testing.T) {
	apiServer(t)
	storetest.Run(t, func(t *testing.T, place string, now func() time.Time) function.Store {
		if place != wiped {
			fresh(t)
			wiped = place
		}
		return open(t, func(o *clusterstore.Options) { o.Now = now })
	})
}

func revision(n int) function.NewRevision {
	return function.NewRevision{
		ModuleDigest: fmt.Sprintf("sha256:%064x", n),
		SizeBytes:    int64(1000 + n),
		Artifact:     v1alpha1.Artifact{Registry: "registry.test", Repository: "functions/f", Digest: fmt.Sprintf("sha256:%064x", 1_000_000+n)},
		Settings:     function.DefaultSettings(),
		Phases:       []v1alpha1.Phase{{Name: "receive", Milliseconds: 1}},
	}
}

func constant(nr function.NewRevision) func(*function.Function) (function.NewRevision, error) {
	return func(*function.Function) (function.NewRevision, error) { return nr, nil }
}

func add(t testing.TB, s function.Store, name string, n int, change func(*function.NewRevision)) function.Result {
	t.Helper()
	nr := revision(n)
	if change != nil {
		change(&nr)
	}
	r, err := s.AddRevision(context.Background(), name, function.Change{}, constant(nr))
	if err != nil {
		t.Fatalf("add revision to %s: %v", name, err)
	}
	return r
}

func clientOf(t testing.TB) *rest.RESTClient {
	t.Helper()
	client, err := kube.NewRESTClient(apiServer(t).RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func read(t testing.TB, namespace, name string) *kube.Function {
	t.Helper()
	f := new(kube.Function)
	if err := clientOf(t).Get().Namespace(namespace).Resource("functions").Name(name).Do(context.Background()).Into(f); err != nil {
		t.Fatal(err)
	}
	return f
}

// eventually waits for what another process wrote.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
