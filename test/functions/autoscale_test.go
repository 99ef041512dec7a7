package functions_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

var (
	hpas          = schema.GroupVersionResource{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}
	scaledObjects = schema.GroupVersionResource{Group: "keda.sh", Version: "v1alpha1", Resource: "scaledobjects"}
)

// clients ask at once and cost each request's work in processor time: a third
// of a processor on an idle machine, a fifth on one that is ten times too busy.
// A pod that has a third of that is far above what scaledAt percent of a pod's
// request of 100m is.
const (
	clients  = 4
	work     = "?work=20ms"
	breath   = 200 * time.Millisecond
	scaledAt = "20"
)

// load asks for a URL until stop is called, which says how many answered.
func load(ctx context.Context, url string) (stop func() (answered, failed int64)) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	var good, bad atomic.Int64
	for range clients {
		group.Go(func() {
			for ctx.Err() == nil {
				if status, _, err := get(ctx, url+work); err == nil && status == http.StatusOK {
					good.Add(1)
				} else if ctx.Err() == nil {
					bad.Add(1)
				}
				select {
				case <-ctx.Done():
				case <-time.After(breath):
				}
			}
		})
	}
	return func() (int64, int64) {
		cancel()
		group.Wait()
		return good.Load(), bad.Load()
	}
}

// watchReplicas notes how many pods a Deployment was to have, change by change.
// Its result is what was noted up to now.
func watchReplicas(t *testing.T, tenant, name string) func() []int32 {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	deployments := bench.Client().AppsV1().Deployments(tenant)
	d, err := deployments.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := deployments.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name, ResourceVersion: d.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	noted := []int32{*d.Spec.Replicas}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for event := range w.ResultChan() {
			if d, ok := event.Object.(*appsv1.Deployment); ok {
				mu.Lock()
				if n := *d.Spec.Replicas; n != noted[len(noted)-1] {
					noted = append(noted, n)
				}
				mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		w.Stop()
		<-done
	})
	return func() []int32 {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(noted)
	}
}

// waitPods waits until a Deployment has so many pods, all of them ready.
func waitPods(t *testing.T, tenant, name string, want int32) {
	t.Helper()
	var last *appsv1.Deployment
	if err := bench.WaitFor(t.Context(), "the pods to be as many as wanted", soon, func(ctx context.Context) (bool, error) {
		d, err := bench.Client().AppsV1().Deployments(tenant).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, nil
		}
		last = d
		return *d.Spec.Replicas == want && d.Status.Replicas == want && d.Status.ReadyReplicas == want && d.Status.UpdatedReplicas == want, nil
	}); err != nil {
		list, _ := bench.Client().AutoscalingV2().HorizontalPodAutoscalers(tenant).List(context.WithoutCancel(t.Context()), metav1.ListOptions{})
		t.Fatalf("%v: want %d, the Deployment has %+v, the autoscalers are %+v", err, want, last, list)
	}
}

func TestASpinFunctionHasAsManyPodsAsItsLoadNeeds(t *testing.T) {
	t.Parallel() // pods of its own, and most of it waits for what they use
	tenant := spinTenant(t)
	if err := bench.MetricsServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	scales(t, tenant, hpas, `{"spec":{"behavior":{"scaleDown":{"stabilizationWindowSeconds":0}}}}`, "hpa")
}

func TestKEDAGivesASpinFunctionAsManyPodsAsItsLoadNeeds(t *testing.T) {
	if os.Getenv("HEARTH_KEDA") == "" {
		t.Skip("KEDA takes minutes to build: make test-keda sets HEARTH_KEDA")
	}
	tenant := spinTenant(t)
	if err := errors.Join(bench.MetricsServer(t.Context()), bench.KEDA(t.Context())); err != nil {
		t.Fatal(err)
	}
	scales(t, tenant, scaledObjects, `{"spec":{"advanced":{"horizontalPodAutoscalerConfig":{"behavior":{"scaleDown":{"stabilizationWindowSeconds":0}}}}}}`, "hpa", "keda")
	left, err := bench.Client().AutoscalingV2().HorizontalPodAutoscalers(tenant).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(left.Items) > 0 {
		t.Errorf("without an autoscaler there is %+v (%v)", left.Items, err)
	}
}

// scales has a function go through its life with autoscalers, the last of which
// is of kind and takes pods away at once when it is told to by quick: five
// minutes are its default.
func scales(t *testing.T, tenant string, kind schema.GroupVersionResource, quick string, autoscalers ...string) {
	t.Helper()
	name := "busy-" + autoscalers[len(autoscalers)-1] // a cluster has each name once
	began := time.Now()
	step := func(what string) { t.Logf("%5.1f s  %s", time.Since(began).Seconds(), what) }
	set := func(args ...string) {
		t.Helper()
		must(t, slices.Concat([]string{"functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--wait", "2m"}, args, []string{name})...)
	}
	f := submit(t, tenant, name, "busy", "--runtime", "spin", "--min-replicas", "2", "--wait", "2m")
	waitPods(t, tenant, name, 2)
	noted := watchReplicas(t, tenant, name)
	step("two pods")

	for _, a := range autoscalers {
		set("--autoscaler", a, "--max-replicas", "3", "--target-cpu", scaledAt)
		step("its autoscaler is " + a)
	}
	// What Hearth does not set is its owner's to set.
	scalers := bench.Dynamic().Resource(kind).Namespace(tenant)
	if _, err := scalers.Patch(t.Context(), name, types.MergePatchType, []byte(quick), metav1.PatchOptions{FieldManager: "kubectl-patch"}); err != nil {
		t.Fatal(err)
	}
	stop := load(t.Context(), f.URL)
	waitPods(t, tenant, name, 3)
	step("three pods")
	set("--env", "GREETING=hello")
	waitPods(t, tenant, name, 3)
	step("another revision")
	// None went when autoscaling was turned on, nor with the revision.
	if got := noted(); !slices.Equal(got, []int32{2, 3}) {
		t.Errorf("there were to be %v pods; want 2, then 3", got)
	}
	answered, failed := stop()
	step(fmt.Sprintf("the load ends: %d requests were answered, %d were not", answered, failed))

	waitPods(t, tenant, name, 2)
	step("two pods again")
	u, err := scalers.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(u.Object["spec"]); err != nil || !strings.Contains(string(b), `"stabilizationWindowSeconds":0`) {
		t.Errorf("what its owner set is gone from the autoscaler: %s (%v)", b, err)
	}
	shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, name)
	if !strings.Contains(shown, "2 to 3, autoscaler "+autoscalers[len(autoscalers)-1]) {
		t.Errorf("the command line shows\n%s", shown)
	}

	set("--autoscaler", "none")
	step("no autoscaler")
	waitPods(t, tenant, name, 2)
	if err := bench.WaitFor(t.Context(), "the autoscaler to be gone", soon, func(ctx context.Context) (bool, error) {
		_, err := scalers.Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), nil
	}); err != nil {
		t.Error(err)
	}
	if got := noted(); !slices.Equal(got, []int32{2, 3, 2}) {
		t.Errorf("there were to be %v pods; want 2, then 3, then 2", got)
	}
}
