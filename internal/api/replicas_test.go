package api

import (
	"context"
	"io"
	"log"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ggcrregistry "github.com/google/go-containerregistry/pkg/registry"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/utils/ptr"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
	"github.com/hearth-sh/hearth/packaging/spinkube"
	"github.com/hearth-sh/hearth/test/cluster"
)

// soon bounds waits for what takes seconds: the machine may be busy.
const soon = 3 * time.Minute

var spinApps = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}

// replicas are of an API under way, on a real API server without nodes.
type replicas struct {
	t         *testing.T
	c         *cluster.Cluster
	namespace string
	// registry is a real one, image in it.
	registry, image string
	// quotas of replicas that are started from now on.
	quotas *submit.Quotas
}

// newRegistry has one module, which nobody runs, under each of the names.
func newRegistry(t *testing.T, repositories ...string) (host string, images []string) {
	t.Helper()
	server := httptest.NewServer(ggcrregistry.New(ggcrregistry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")
	client, err := registry.NewClient(registry.ClientOptions{Registry: host, PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	module := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(module, append([]byte("\x00asm\x01\x00\x00\x00"), make([]byte, 992)...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, repository := range repositories {
		a, err := client.Publish(t.Context(), repository, registry.Module{Path: module}, registry.PublishOptions{Spin: registry.SpinOptions{Name: "hello"}})
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, host+"/"+a.Repository+"@"+a.Digest)
	}
	return host, images
}

func newReplicas(t *testing.T) *replicas {
	c := realCluster(t)
	files, err := filepath.Glob("../../packaging/chart/hearth/crds/hearth.sh_*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	manifests := [][]byte{spinkube.CRDs()}
	for _, f := range files {
		manifest, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		manifests = append(manifests, manifest)
	}
	for _, m := range manifests {
		if _, err := c.ApplyManifest(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	r := &replicas{t: t, c: c, namespace: newNamespace(t, c)}
	host, images := newRegistry(t, "library/hello")
	r.registry, r.image = host, images[0]
	r.wait("functions and SpinApps to be served", func(ctx context.Context) (bool, error) {
		_, err := c.Dynamic().Resource(kube.FunctionGVR()).List(ctx, metav1.ListOptions{})
		_, spinErr := c.Dynamic().Resource(spinApps).List(ctx, metav1.ListOptions{})
		return err == nil && spinErr == nil, nil
	})
	return r
}

func (r *replicas) wait(what string, ok func(context.Context) (bool, error)) {
	r.t.Helper()
	if err := r.c.WaitFor(r.t.Context(), what, soon, ok); err != nil {
		r.t.Fatal(err)
	}
}

// start runs a replica until the function that is returned is called, or the
// test ends.
func (r *replicas) start(name string) (stop func()) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{
			Config: r.c.RESTConfig(), Namespace: r.namespace, Instance: name,
			Listen: "127.0.0.1:0", TLSListen: "127.0.0.1:0", TempDir: r.t.TempDir(),
			Deploy:   deploy.Settings{BaseDomain: r.namespace + ".example"},
			Registry: r.registry, RegistryPlainHTTP: true, Quotas: r.quotas,
			CheckCommand: []string{"/bin/false"}, Version: "test", Logger: slog.New(slog.DiscardHandler),
		})
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("%s: %v", name, err)
		}
	}
	r.t.Cleanup(stop)
	return stop
}

// leader waits for one that ok takes.
func (r *replicas) leader(what string, ok func(name string) bool) (name string) {
	r.t.Helper()
	r.wait(what, func(ctx context.Context) (bool, error) {
		lease, err := r.c.Client().CoordinationV1().Leases(r.namespace).Get(ctx, leaseName, metav1.GetOptions{})
		name = ""
		if err == nil {
			name = ptr.Deref(lease.Spec.HolderIdentity, "")
		}
		return name != "" && ok(name), nil
	})
	return name
}

// apply is kubectl's.
func (r *replicas) apply(name, host string, runtime v1alpha1.FunctionRuntime) {
	r.t.Helper()
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": kube.FunctionKind,
		"metadata": map[string]any{"name": name, "namespace": r.namespace},
		"spec":     map[string]any{"image": r.image, "runtime": string(runtime), "host": host},
	}}
	if _, err := r.c.Dynamic().Resource(kube.FunctionGVR()).Namespace(r.namespace).Apply(r.t.Context(), name, u, metav1.ApplyOptions{FieldManager: "kubectl", Force: true}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *replicas) remove(name string) {
	r.t.Helper()
	if err := r.c.Dynamic().Resource(kube.FunctionGVR()).Namespace(r.namespace).Delete(r.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// object waits until ok takes the Function.
func (r *replicas) object(name, what string, ok func(*kube.Function) bool) (f *kube.Function) {
	r.t.Helper()
	r.wait(name+" to be "+what, func(ctx context.Context) (bool, error) {
		var err error
		f, err = kube.NewFunctions(r.c.Dynamic()).Get(ctx, r.namespace, name)
		return err == nil && ok(f), nil
	})
	return f
}

func (r *replicas) has(ctx context.Context, ingress string) bool {
	_, err := r.c.Client().NetworkingV1().Ingresses(r.namespace).Get(ctx, ingress, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		r.t.Error(err)
	}
	return err == nil
}

func (r *replicas) ingress(name string, there bool) {
	r.t.Helper()
	what := "Ingress " + name + " to be there"
	if !there {
		what = "Ingress " + name + " to be gone"
	}
	r.wait(what, func(ctx context.Context) (bool, error) { return r.has(ctx, name) == there, nil })
}

func recorded(f *kube.Function) bool {
	return f.Status.Revision > 0 && f.Status.ObservedGeneration == f.Generation && f.Status.URL != ""
}

func TestAnotherReplicaTakesTheDutiesOfOneThatEnds(t *testing.T) {
	r := newReplicas(t)
	stop := map[string]func(){"one": r.start("one"), "two": r.start("two")}
	first := r.leader("one to lead", func(string) bool { return true })
	hostOf := func(name string) string { return name + "." + r.namespace + ".test" }
	r.apply(r.namespace+"-a", hostOf("a"), v1alpha1.RuntimeResident)
	r.object(r.namespace+"-a", "recorded", recorded)
	r.ingress(deploy.WildcardIngress, true)
	r.ingress("host."+hostOf("a"), true)

	stop[first]()
	second := r.leader("the other to lead", func(name string) bool { return name != first })
	r.apply(r.namespace+"-b", hostOf("b"), v1alpha1.RuntimeResident)
	r.object(r.namespace+"-b", "recorded", recorded)
	r.ingress("host."+hostOf("b"), true)
	r.remove(r.namespace + "-a")
	r.ingress("host."+hostOf("a"), false)
	if !r.has(t.Context(), "host."+hostOf("b")) {
		t.Error("the host of a function that is there is gone")
	}

	// Without an API server nobody leads; with it again, the same work is done.
	if err := r.c.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.apply(r.namespace+"-c", hostOf("c"), v1alpha1.RuntimeResident)
	r.object(r.namespace+"-c", "recorded", recorded)
	r.ingress("host."+hostOf("c"), true)
	r.leader("it to lead again", func(name string) bool { return name == second })
}

func TestCustomHostLeadsToTheEnginesUntilPodsAnswer(t *testing.T) {
	r := newReplicas(t)
	r.start("one")
	name, host := r.namespace+"-site", "site."+r.namespace+".test"
	r.apply(name, host, v1alpha1.RuntimeResident)
	f := r.object(name, "recorded", recorded)
	r.ingress("host."+host, true)

	// A node says that its engine answers.
	store, err := clusterstore.New(t.Context(), clusterstore.Options{Config: r.c.RESTConfig(), Namespace: r.namespace, Instance: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	answers := v1alpha1.FunctionNode{Name: "node-a", Revision: f.Status.Revision, Progress: v1alpha1.ProgressReady, Serving: f.Status.Revision}
	if err := store.Observe(t.Context(), r.namespace, name, answers, nil); err != nil {
		t.Fatal(err)
	}
	r.object(name, "answered by an engine", func(f *kube.Function) bool { return f.Status.ActiveRevision == answers.Serving })

	r.apply(name, host, v1alpha1.RuntimeSpin)
	var app *unstructured.Unstructured
	r.wait("the SpinApp to be there", func(ctx context.Context) (bool, error) {
		app, err = r.c.Dynamic().Resource(spinApps).Namespace(r.namespace).Get(ctx, name, metav1.GetOptions{})
		return err == nil, nil
	})
	f = r.object(name, "rolled out", func(f *kube.Function) bool { return said(f, deploy.NodeName) != nil })
	if !r.has(t.Context(), "host."+host) || r.has(t.Context(), name) {
		t.Error("the host does not lead to the engines while pods start")
	}

	// In the place of SpinKube's operator: a rollout that is over, of no pods, for
	// there is no node.
	revision := app.GetLabels()[deploy.RevisionLabel]
	labels := map[string]string{deploy.RevisionLabel: revision, deploy.AppNameLabel: name}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: name, Labels: labels, OwnerReferences: []metav1.OwnerReference{{
			APIVersion: app.GetAPIVersion(), Kind: app.GetKind(), Name: name, UID: app.GetUID(), Controller: ptr.To(true),
		}}},
		Spec: appsv1.DeploymentSpec{
			Replicas: ptr.To[int32](0), Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: f.Spec.Image}}}},
		},
	}
	if _, err := r.c.Client().AppsV1().Deployments(r.namespace).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Whenever one of them is gone, the other must be there.
	gap := false
	r.wait("the host to lead to the pods", func(ctx context.Context) (bool, error) {
		engines := r.has(ctx, "host."+host)
		pods := r.has(ctx, name)
		gap = gap || !engines && !pods
		return pods && !engines, nil
	})
	if gap {
		t.Error("the host led nowhere for a while")
	}
}

func TestANewLeaderTakesBackWhatTheOldOneSaidOfAHost(t *testing.T) {
	r := newReplicas(t)
	name, host := r.namespace+"-late", "late."+r.namespace+".test"
	ingresses := r.c.Client().NetworkingV1().Ingresses(newNamespace(t, r.c))
	prefix := networkingv1.PathTypePrefix
	if _, err := ingresses.Create(t.Context(), &networkingv1.Ingress{
		ObjectMeta: metav1.ObjectMeta{Name: "somebody-elses"},
		Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{Host: host, IngressRuleValue: networkingv1.IngressRuleValue{
			HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{Path: "/", PathType: &prefix, Backend: networkingv1.IngressBackend{
				Service: &networkingv1.IngressServiceBackend{Name: "theirs", Port: networkingv1.ServiceBackendPort{Number: 80}},
			}}}},
		}}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	stop := r.start("one")
	r.apply(name, host, v1alpha1.RuntimeResident)
	r.object(name, "told that its host is taken", func(f *kube.Function) bool {
		n := said(f, clusterstore.NodeIngress)
		return n != nil && n.Error != nil && strings.Contains(n.Error.Detail, host)
	})
	stop()
	if err := ingresses.Delete(t.Context(), "somebody-elses", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.start("two")
	r.ingress("host."+host, true)
	r.object(name, "told so no longer", func(f *kube.Function) bool { return said(f, clusterstore.NodeIngress) == nil })
}

func TestAppliedFunctionsAreHeldToTheirTenantsQuota(t *testing.T) {
	r := newReplicas(t)
	r.quotas = &submit.Quotas{Default: submit.Quota{Functions: 2, Bytes: 2500}}
	r.start("one")
	ready := func(f *kube.Function) v1alpha1.Condition {
		for _, c := range f.Status.Conditions {
			if c.Type == v1alpha1.ConditionReady {
				return c
			}
		}
		return v1alpha1.Condition{}
	}
	refused := func(reason, says string) func(*kube.Function) bool {
		return func(f *kube.Function) bool {
			c := ready(f)
			return c.Reason == reason && c.Status == v1alpha1.ConditionFalse && strings.Contains(c.Message, says) && f.Status.Revision == 0
		}
	}
	for _, name := range []string{"-a", "-b"} {
		r.apply(r.namespace+name, "", v1alpha1.RuntimeResident)
		r.object(r.namespace+name, "recorded", recorded)
	}
	r.apply(r.namespace+"-c", "", v1alpha1.RuntimeResident)
	r.object(r.namespace+"-c", "refused", refused(reasonQuotaExceeded, "may have 2"))
	r.remove(r.namespace + "-a")
	r.object(r.namespace+"-c", "recorded, since there is room", recorded)

	// Another tenant's image, and one that is not there.
	theirs, missing := r.namespace+"-theirs", r.namespace+"-missing"
	r.remove(r.namespace + "-b")
	image := r.image
	r.image = r.registry + "/functions/somebody/hello@sha256:" + strings.Repeat("a", 64)
	r.apply(theirs, "", v1alpha1.RuntimeResident)
	r.object(theirs, "refused", refused(reasonImageNotYours, "another tenant"))
	r.image = r.registry + "/library/later@sha256:" + strings.Repeat("a", 64)
	r.apply(missing, "", v1alpha1.RuntimeResident)
	r.object(missing, "refused", refused(reasonImageUnavailable, "push it"))
	// Neither takes a place.
	r.image = image
	r.apply(r.namespace+"-d", "", v1alpha1.RuntimeResident)
	r.object(r.namespace+"-d", "recorded", recorded)
}
