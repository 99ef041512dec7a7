package node_test

import (
	"context"
	"crypto/rand"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/test/cluster"
)

// createSpin creates an object of SpinKube that the test's end deletes.
func createSpin(t *testing.T, resource, kind, namespace, name string, spec map[string]any) {
	t.Helper()
	client := bench.Dynamic().Resource(schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: resource}).Namespace(namespace)
	if _, err := client.Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "core.spinkube.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": spec,
	}}, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Delete(context.Background(), name, metav1.DeleteOptions{}) })
}

func spinAppsAreBroughtAsTheirExecutorsSay(t *testing.T) {
	ctx := t.Context()
	registry, err := bench.Registry(ctx, cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	app := func(prefix string) (module []byte, reference string) {
		module = marked(t, "a SpinApp "+rand.Text())
		reference, _ = push(t, registry, earlyRepository(wasmNode, registry.Host, prefix), wasmImage(t, module))
		return module, reference
	}

	// Its executor is not there, and this node has no handler "spin", which is
	// usual where the cluster has no class of SpinKube's either.
	const usual = "spin-usual"
	namespaces := bench.Client().CoreV1().Namespaces()
	if _, err := namespaces.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: usual}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = namespaces.Delete(context.Background(), usual, metav1.DeleteOptions{}) })
	usualModule, usualImage := app("spin-usual")
	createSpin(t, "spinapps", "SpinApp", usual, "app", map[string]any{"image": usualImage, "executor": "containerd-shim-spin", "replicas": int64(1)})

	createSpin(t, "spinappexecutors", "SpinAppExecutor", "default", "ours", map[string]any{
		"createDeployment": true, "deploymentConfig": map[string]any{"runtimeClassName": "hearth-wasmtime"},
	})
	createSpin(t, "spinappexecutors", "SpinAppExecutor", "default", "elsewhere", map[string]any{"createDeployment": false})
	module, image := app("spin")
	createSpin(t, "spinapps", "SpinApp", "default", "ours", map[string]any{"image": image, "executor": "ours", "replicas": int64(1)})
	_, far := app("spin-far")
	createSpin(t, "spinapps", "SpinApp", "default", "far", map[string]any{"image": far, "executor": "elsewhere", "replicas": int64(1)})

	allWarm(t, 1) // of three
	if !compiled(wasmNode, module) {
		t.Error("the store has no object of the app's module")
	}

	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "wasmtime-spin-v2"}, Handler: "wasmtime"}
	classes := bench.Client().NodeV1().RuntimeClasses()
	if _, err := classes.Create(ctx, class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = classes.Delete(context.Background(), class.Name, metav1.DeleteOptions{}) })
	allWarm(t, 2)
	if !compiled(wasmNode, usualModule) {
		t.Error("the store has no object of the module whose app has no executor")
	}
}
