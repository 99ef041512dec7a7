package functions_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/deploy/operatortest"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

const (
	toolbox = "hearth.test/toolbox:functions"
	// native is a RuntimeClass of ordinary containers: the nodes have no shim
	// for Spin, so a native program stands where the module would run.
	native = "native"
	// broken is the variable of a revision that does not come up.
	broken = "BROKEN"
)

var (
	spinApps  = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}
	executors = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinappexecutors"}
)

// spinKube is what all tests with spin functions share: the image that answers
// in their places, its RuntimeClass and one stand-in for the operator, which
// serves every SpinApp of the cluster.
type spinKube struct {
	mu       sync.Mutex // guards the others
	users    int
	operator *operatortest.Operator
}

var spin spinKube

func (s *spinKube) acquire(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.operator != nil {
		s.users++
		return nil
	}
	program, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		return err
	}
	if err := bench.LoadBinaryImage(ctx, toolbox, map[string]string{"/toolbox": program}, "/toolbox"); err != nil {
		return err
	}
	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: native}, Handler: "runc"}
	if _, err := bench.Client().NodeV1().RuntimeClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	s.operator, err = operatortest.Start(ctx, operatortest.Options{Config: bench.RESTConfig(), Container: func(c *corev1.Container) {
		// The revision's image stays among the arguments: it is what the answer
		// says, and what tells the revision to whoever looks at the Deployment.
		c.Command, c.Args = []string{"/toolbox"}, []string{"serve", ":80", c.Image}
		if slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "SPIN_VARIABLE_"+broken }) {
			c.Args = []string{"cat", "/the module's only import", c.Image}
		}
		c.Image, c.ImagePullPolicy = toolbox, corev1.PullIfNotPresent
	}})
	if err == nil {
		s.users++
	}
	return err
}

func (s *spinKube) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users == 0 {
		s.operator.Close()
		s.operator = nil
	}
}

// spinTenant is a new tenant of a cluster with a spin-operator. Its pods answer
// with the image of their revision.
func spinTenant(t *testing.T) string {
	t.Helper()
	if err := spin.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	tenant := newTenant(t)
	t.Cleanup(spin.release)
	// An executor that is there is used as it is.
	if _, err := bench.Dynamic().Resource(executors).Namespace(tenant).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "core.spinkube.dev/v1alpha1", "kind": "SpinAppExecutor", "metadata": map[string]any{"name": deploy.DefaultExecutor},
		"spec": map[string]any{"createDeployment": true, "deploymentConfig": map[string]any{"runtimeClassName": native}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return tenant
}

// made are the objects there are of a spin function.
func made(ctx context.Context, tenant, name string) (map[string]bool, error) {
	out := map[string]bool{}
	for kind, gvr := range map[string]schema.GroupVersionResource{
		"SpinApp": spinApps, "Deployment": {Group: "apps", Version: "v1", Resource: "deployments"},
		"Service": {Version: "v1", Resource: "services"}, "Ingress": {Group: "networking.k8s.io", Version: "v1", Resource: "ingresses"},
	} {
		list, err := bench.Dynamic().Resource(gvr).Namespace(tenant).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		if err != nil {
			return nil, err
		}
		if len(list.Items) > 0 {
			out[kind] = true
		}
	}
	return out, nil
}

func digestOf(image string) string { return image[strings.LastIndexByte(image, '@')+1:] }

func TestASpinFunctionHasPodsAndABadRevisionIsTakenBack(t *testing.T) {
	t.Parallel() // pods of its own: no engine matters
	tenant := spinTenant(t)
	f := submit(t, tenant, "spun", "one", "--runtime", "spin", "--wait", "2m")
	if f.State != v1alpha1.StateReady || f.URL != "http://spun."+base+"/" {
		t.Fatalf("%+v", f)
	}
	if m, err := made(t.Context(), tenant, "spun"); err != nil || len(m) != 4 {
		t.Errorf("there are %v, %v; want all four", m, err)
	}
	answers(t, f.URL, digestOf(f.Image))

	// What the author reads of a revision that does not come up.
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	defer cancel()
	_, stderr, err := nodeagent(ctx, "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "spun", "--wait", "3m", "--env", broken+"=yes", wasmFile(t, "two"))
	if err == nil {
		t.Fatal("a revision that does not come up was called ready")
	}
	t.Logf("the author reads: %s", stderr)
	for _, word := range []string{"Revision 2 was recorded", "revision 1 goes on answering", "the module's only import"} {
		if !strings.Contains(stderr, word) {
			t.Errorf("the command line does not say %q", word)
		}
	}
	answers(t, f.URL, digestOf(f.Image))
	waitObject(t, tenant, "spun", "revision 1 to be active", func(o *kube.Function) bool { return o.Status.ActiveRevision == 1 && o.Status.Revision == 2 })

	must(t, "functions", "delete", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "spun")
	waitStatusCode(t, f.URL, http.StatusNotFound)
	var left map[string]bool
	if err := bench.WaitFor(t.Context(), "everything of the function to be gone", soon, func(ctx context.Context) (bool, error) {
		var err error
		left, err = made(ctx, tenant, "spun")
		return err == nil && len(left) == 0, nil
	}); err != nil {
		t.Errorf("%v: %v", err, left)
	}
}

func TestAFunctionAnswersWhileItMovesBetweenPodsAndEngines(t *testing.T) {
	tenant := spinTenant(t)
	f := submit(t, tenant, "mover", "resident now", "--runtime", "spin", "--wait", "2m")
	answers(t, f.URL, digestOf(f.Image))
	var asked atomic.Int64
	polling, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		var failed []error
		for polling.Err() == nil {
			status, body, err := get(polling, f.URL)
			if polling.Err() == nil && (err != nil || status != http.StatusOK) {
				if failed = append(failed, fmt.Errorf("request %d at %s: %d %s (%v)", asked.Load(), time.Now().Format(time.TimeOnly), status, body, err)); len(failed) > 10 {
					break
				}
			}
			asked.Add(1)
			select {
			case <-polling.Done():
			case <-time.After(5 * time.Millisecond): // the machine has other work
			}
		}
		done <- errors.Join(failed...)
	}()
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--runtime", "resident", "--wait", "2m", "mover")
	answers(t, f.URL, "resident now")
	var left map[string]bool
	err := bench.WaitFor(t.Context(), "what spin had to be gone", soon, func(ctx context.Context) (bool, error) {
		var err error
		left, err = made(ctx, tenant, "mover")
		return err == nil && len(left) == 0, nil
	})
	waitObject(t, tenant, "mover", "every node to be warm", allWarm)
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--runtime", "spin", "--wait", "2m", "mover")
	answers(t, f.URL, digestOf(f.Image))
	waitObject(t, tenant, "mover", "the engines to have given it up", func(o *kube.Function) bool { return len(o.Status.Nodes) == 1 })
	stop()
	if err := errors.Join(err, <-done); err != nil {
		t.Errorf("%v; left: %v", err, left)
	}
	t.Logf("%d requests", asked.Load())
}
