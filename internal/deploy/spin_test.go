package deploy_test

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ktypes "k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

var (
	scaledObjects = schema.GroupVersionResource{Group: "keda.sh", Version: "v1alpha1", Resource: "scaledobjects"}
	definitions   = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
)

// absent is an image that the registry does not have.
var absentDigest = "@sha256:" + strings.Repeat("0f", 32)

// nativeRepository has all images of native programs. They share a layer, which
// the node keeps.
const nativeRepository = "test/native-program"

// push brings an image to the test's registry and returns it by digest.
func (b *bench) push(ctx context.Context, repository string, image v1.Image) (string, error) {
	digest, err := image.Digest()
	if err != nil {
		return "", err
	}
	ref, err := name.NewDigest(b.registry.Host+"/"+repository+"@"+digest.String(), name.Insecure)
	if err != nil {
		return "", err
	}
	return ref.Name(), remote.Write(ref, image, remote.WithContext(ctx))
}

func (l *lab) push(repository string, image v1.Image) string {
	l.t.Helper()
	ref, err := l.bench.push(l.t.Context(), repository, image)
	if err != nil {
		l.t.Fatal(err)
	}
	return ref
}

// serving is an image that answers every request on port 80 with words.
func (l *lab) serving(words string) string {
	l.t.Helper()
	return l.running("serve", ":80", words)
}

// running is an image that runs the toolbox.
func (l *lab) running(args ...string) string {
	l.t.Helper()
	config, err := l.toolbox.ConfigFile()
	if err != nil {
		l.t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Config.Entrypoint = append([]string{"/app"}, args...)
	image, err := mutate.ConfigFile(l.toolbox, config)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.push(nativeRepository, image)
}

// wasm is an image of one module, in the form that shims read.
func (l *lab) wasm(module []byte) string {
	l.t.Helper()
	image, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), static.NewLayer(module, "application/wasm"))
	if err != nil {
		l.t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		l.t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS, config.RootFS.DiffIDs = "wasm", "wasip1", []v1.Hash{}
	config.Config.Labels = map[string]string{"module": l.namespace}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		l.t.Fatal(err)
	}
	return l.push(l.namespace+"/wasm", image)
}

func revision(n int, spec v1alpha1.FunctionSpec) deploy.Revision {
	return deploy.Revision{Number: n, Spec: spec}
}

func spinSpec(image string) v1alpha1.FunctionSpec {
	return v1alpha1.FunctionSpec{Image: image, Runtime: v1alpha1.RuntimeSpin}
}

func TestARolloutIsReadyWhenItsPodsAnswerAndThenCostsNoWrites(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	spec := spinSpec(l.serving("one"))
	spec.Env = []v1alpha1.EnvVar{{Name: "GREETING", Value: "hello"}}
	f := l.create("hello", spec)
	in := deploy.Input{Function: f, Wanted: revision(1, spec)}

	first := true
	var phases []v1alpha1.Phase
	l.reconcile(in, "revision 1 to be ready", func(o deploy.Outcome, err error) bool {
		if first && (err != nil || o.Node.Progress != v1alpha1.ProgressQueued || o.Node.Serving != 0 || o.RequeueAfter <= 0) {
			t.Errorf("the first outcome is %+v, %v", o, err)
		}
		first, phases = false, o.Phases
		return isReady(1)(o, err)
	})
	if len(phases) != 1 || phases[0].Name != deploy.PhaseRollout || phases[0].Milliseconds <= 0 {
		t.Errorf("phases %+v, want the rollout's", phases)
	}
	// Also when its pod was told to answer before the Deployment said so.
	f.Status.Nodes = []v1alpha1.FunctionNode{{Name: deploy.NodeName, Revision: 1, Progress: v1alpha1.ProgressLoading, Serving: 1}}
	if out, err := l.reconcile(in, "revision 1 to be ready again", isReady(1)); len(out.Phases) != 1 {
		t.Errorf("phases %+v, want the rollout's (%v)", out.Phases, err)
	}
	if err := l.operator.Refused(l.namespace, "hello"); err != nil {
		t.Errorf("the operator refuses the SpinApp: %v", err)
	}
	d, err := l.cluster.Client().AppsV1().Deployments(l.namespace).Get(t.Context(), "hello", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if env := d.Spec.Template.Spec.Containers[0].Env; len(env) == 0 || env[0].Name != "SPIN_VARIABLE_GREETING" || env[0].Value != "hello" {
		t.Errorf("the pods' environment is %+v", env)
	}
	ingress, err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Get(t.Context(), "hello", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	service, err := l.cluster.Client().CoreV1().Services(l.namespace).Get(t.Context(), "hello", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rule := ingress.Spec.Rules[0]
	if backend := rule.HTTP.Paths[0].Backend.Service; rule.Host != "hello."+l.namespace+".example" || backend.Name != service.Name || backend.Port.Number != service.Spec.Ports[0].Port {
		t.Errorf("the Ingress leads from %s to %+v, the Service is %+v", rule.Host, backend, service.Spec.Ports)
	}

	writes, reads := l.requests.writes.Load(), l.requests.reads.Load()
	for range 5 {
		if out, err := l.spin.Reconcile(t.Context(), in); !isReady(1)(out, err) || out.Phases != nil {
			t.Fatalf("outcome %+v, %v", out, err)
		}
	}
	if n := l.requests.writes.Load() - writes; n != 0 {
		t.Errorf("%d writes where nothing changed", n)
	}
	if n := l.requests.reads.Load() - reads; n > 5*3 {
		t.Errorf("%d reads for 5 reconciliations, want at most 3 each", n)
	}

	// Drift is put right, and told by the watch.
	for len(l.changed) > 0 {
		<-l.changed
	}
	if err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Delete(t.Context(), "hello", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	select {
	case key := <-l.changed:
		if key != l.namespace+"/hello" {
			t.Errorf("%s changed", key)
		}
	case <-time.After(soon):
		t.Fatal("nobody told that the Ingress is gone")
	}
	if _, err := l.spin.Reconcile(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Get(t.Context(), "hello", metav1.GetOptions{}); err != nil {
		t.Errorf("the Ingress is not back: %v", err)
	}

	// A second revision takes over.
	next := spinSpec(l.serving("two"))
	in = deploy.Input{Function: f, Wanted: revision(2, next), Previous: ptr.To(revision(1, spec))}
	served := true
	l.reconcile(in, "revision 2 to be ready", func(o deploy.Outcome, err error) bool {
		served = served && o.Node.Serving > 0
		return isReady(2)(o, err)
	})
	if !served {
		t.Error("between two revisions nothing was said to answer")
	}

	// Spin no more: pods answer until no controller of Ingresses sends them
	// anything, then all goes, with no request left to make.
	f.Spec.Runtime = v1alpha1.RuntimeResident
	out, err := l.spin.Reconcile(t.Context(), in)
	if err != nil || out.Removed || out.RequeueAfter <= 0 {
		t.Fatalf("outcome %+v, %v", out, err)
	}
	if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Get(t.Context(), "hello", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the Ingress is still there: %v", err)
	}
	if app := l.get(spinApps, "hello"); app.GetDeletionTimestamp() != nil {
		t.Error("the pods went with the Ingress")
	}
	l.clock.forward(out.RequeueAfter)
	if out, err := l.spin.Reconcile(t.Context(), in); err != nil || !out.Removed {
		t.Fatalf("outcome %+v, %v", out, err)
	}
	l.gone("hello")
	if err := l.cluster.WaitFor(t.Context(), "reconciling to be free", soon, func(ctx context.Context) (bool, error) {
		before := l.requests.reads.Load()
		out, err := l.spin.Reconcile(ctx, in)
		return out.Removed && l.requests.reads.Load() == before, err
	}); err != nil {
		t.Error(err)
	}
}

// gone waits until everything made for a function is gone.
func (l *lab) gone(name string) {
	l.t.Helper()
	client := l.cluster.Client()
	if err := l.cluster.WaitFor(l.t.Context(), "everything of "+name+" to be gone", soon, func(ctx context.Context) (bool, error) {
		_, app := l.cluster.Dynamic().Resource(spinApps).Namespace(l.namespace).Get(ctx, name, metav1.GetOptions{})
		_, ingress := client.NetworkingV1().Ingresses(l.namespace).Get(ctx, name, metav1.GetOptions{})
		_, hpa := client.AutoscalingV2().HorizontalPodAutoscalers(l.namespace).Get(ctx, name, metav1.GetOptions{})
		_, d := client.AppsV1().Deployments(l.namespace).Get(ctx, name, metav1.GetOptions{})
		_, s := client.CoreV1().Services(l.namespace).Get(ctx, name, metav1.GetOptions{})
		for _, err := range []error{app, ingress, hpa, d, s} {
			if !apierrors.IsNotFound(err) {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		l.t.Error(err)
	}
}

func TestDeletingAFunctionDeletesAllThatWasMadeForIt(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	spec := spinSpec(l.serving("bye"))
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 1, MaxReplicas: 3}
	f := l.create("bye", spec)
	in := deploy.Input{Function: f, Wanted: revision(1, spec)}
	l.reconcile(in, "to be ready", isReady(1))
	hpa, err := l.cluster.Client().AutoscalingV2().HorizontalPodAutoscalers(l.namespace).Get(t.Context(), "bye", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if hpa.Spec.ScaleTargetRef.Name != "bye" || hpa.Spec.MaxReplicas != 3 {
		t.Errorf("the autoscaler is %+v", hpa.Spec)
	}
	if err := l.cluster.Dynamic().Resource(kube.FunctionGVR()).Namespace(l.namespace).Delete(t.Context(), "bye", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	l.gone("bye")
	l.get(spinExecutors, deploy.DefaultExecutor) // is everybody's
}

func TestAnAutoscalerThatIsNoLongerWantedGoes(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	spec := spinSpec(l.registry.Host + "/none" + absentDigest)
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MaxReplicas: 3}
	f := l.create("scaled", spec)
	hpas := l.cluster.Client().AutoscalingV2().HorizontalPodAutoscalers(l.namespace)
	l.reconcile(deploy.Input{Function: f, Wanted: revision(1, spec)}, "the autoscaler to be made", func(deploy.Outcome, error) bool {
		_, err := hpas.Get(t.Context(), "scaled", metav1.GetOptions{})
		return err == nil
	})

	// KEDA is not installed.
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerKEDA, MaxReplicas: 3}
	out, err := l.spin.Reconcile(t.Context(), deploy.Input{Function: f, Wanted: revision(2, spec)})
	var crd *deploy.MissingCRDError
	if !errors.As(err, &crd) || crd.CRD != "scaledobjects.keda.sh" || !strings.Contains(crd.Error(), "KEDA") || out.Node.Error == nil || out.Node.Error.Code != deploy.CodeCRDMissing || !out.Node.Retrying {
		t.Errorf("without KEDA: %+v, %v", out, err)
	}
	if _, err := hpas.Get(t.Context(), "scaled", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the autoscaler of revision 1 is still there: %v", err)
	}

	// Its definition is: what KEDA would be given has no word that it does not know.
	definition, err := os.ReadFile("testdata/keda/keda.sh_scaledobjects.yaml")
	if err != nil {
		t.Fatal(err)
	}
	crds, err := l.cluster.ApplyManifest(t.Context(), definition)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = l.cluster.Dynamic().Resource(definitions).Delete(context.Background(), crds[0].GetName(), metav1.DeleteOptions{})
	})
	var scaled *unstructured.Unstructured
	l.reconcile(deploy.Input{Function: f, Wanted: revision(2, spec)}, "the ScaledObject to be made", func(deploy.Outcome, error) bool {
		scaled, err = l.cluster.Dynamic().Resource(scaledObjects).Namespace(l.namespace).Get(t.Context(), "scaled", metav1.GetOptions{})
		return err == nil
	})
	wanted, err := os.ReadFile("testdata/keda.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range bytes.Split(wanted, []byte("---\n")) {
		var o unstructured.Unstructured
		if err := yaml.Unmarshal(document, &o.Object); err != nil {
			t.Fatal(err)
		}
		if o.GetKind() != scaled.GetKind() {
			continue
		}
		o.SetNamespace(l.namespace)
		o.SetOwnerReferences(nil)
		if _, err := l.cluster.Dynamic().Resource(scaledObjects).Namespace(l.namespace).Create(t.Context(), &o,
			metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict, DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Error(err)
		}
	}

	spec.Autoscaling = nil
	if _, err := l.spin.Reconcile(t.Context(), deploy.Input{Function: f, Wanted: revision(3, spec)}); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := unstructured.NestedInt64(l.get(spinApps, "scaled").Object, "spec", "replicas"); n != 1 {
		t.Errorf("%d replicas, want 1", n)
	}
	if _, err := l.cluster.Dynamic().Resource(scaledObjects).Namespace(l.namespace).Get(t.Context(), "scaled", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the autoscaler of revision 2 is still there: %v", err)
	}
	if err := l.operator.Refused(l.namespace, "scaled"); err != nil {
		t.Error(err)
	}
}

func TestAnAutoscalerTakesOverThePodsThereAre(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	spec := spinSpec(l.serving("manned"))
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{MinReplicas: 2}
	f := l.create("manned", spec)
	l.reconcile(deploy.Input{Function: f, Wanted: revision(1, spec)}, "to be ready", isReady(1))
	deployments := l.cluster.Client().AppsV1().Deployments(l.namespace)
	d, err := deployments.Get(t.Context(), "manned", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := deployments.Watch(t.Context(), metav1.ListOptions{ResourceVersion: d.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()

	// There is no metrics-server: nothing but Hearth keeps the pods.
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 1, MaxReplicas: 3}
	in := deploy.Input{Function: f, Wanted: revision(2, spec)}
	l.reconcile(in, "the autoscaled revision to be ready", isReady(2))
	if d, err = deployments.Get(t.Context(), "manned", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for event := range w.ResultChan() {
		o, ok := event.Object.(*appsv1.Deployment)
		if !ok {
			t.Fatalf("the watch says %+v", event)
		}
		seen++
		if *o.Spec.Replicas != 2 {
			t.Errorf("there were to be %d pods", *o.Spec.Replicas)
		}
		if o.ResourceVersion == d.ResourceVersion {
			break
		}
	}
	t.Logf("%d changes of the Deployment", seen)

	// Long after, its owner reads why the number never changes.
	l.clock.forward(time.Hour)
	out, _ := l.reconcile(in, "the autoscaler's trouble to be told", func(o deploy.Outcome, err error) bool { return err == nil && o.Node.Error != nil })
	if e := out.Node.Error; out.Node.Progress != v1alpha1.ProgressReady || e.Code != deploy.CodeAutoscaler || !strings.Contains(e.Detail, "metrics-server") {
		t.Errorf("%+v, %+v", out, e)
	}
	t.Log(out.Node.Error.Detail)

	// The operator has the number again where no autoscaler decides.
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{MinReplicas: 1}
	l.reconcile(deploy.Input{Function: f, Wanted: revision(3, spec)}, "the fixed revision to be ready", isReady(3))
	if d, err = deployments.Get(t.Context(), "manned", metav1.GetOptions{}); err != nil || *d.Spec.Replicas != 1 {
		t.Errorf("without an autoscaler there are to be %d pods, want 1 (%v)", *d.Spec.Replicas, err)
	}
}

func TestAnAutoscalerThatTheClusterRefusesKeepsNoFunctionFromAnswering(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	none := corev1.ResourceList{"count/horizontalpodautoscalers.autoscaling": resource.MustParse("0")}
	quotas := l.cluster.Client().CoreV1().ResourceQuotas(l.namespace)
	if _, err := quotas.Create(t.Context(), &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "fixed"}, Spec: corev1.ResourceQuotaSpec{Hard: none}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := l.cluster.WaitFor(t.Context(), "the quota to hold", soon, func(ctx context.Context) (bool, error) {
		q, err := quotas.Get(ctx, "fixed", metav1.GetOptions{})
		return err == nil && len(q.Status.Hard) > 0, nil
	}); err != nil {
		t.Fatal(err)
	}
	spec := spinSpec(l.serving("refused"))
	spec.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MaxReplicas: 3}
	f := l.create("refused", spec)
	out, _ := l.reconcile(deploy.Input{Function: f, Wanted: revision(1, spec)}, "to be ready", isReady(1))
	if e := out.Node.Error; e == nil || e.Code != deploy.CodeAutoscaler || !out.Node.Retrying || !strings.Contains(e.Detail, "exceeded quota") {
		t.Errorf("%+v says %+v", out, e)
	}
	if err := quotas.Delete(t.Context(), "fixed", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	l.reconcile(deploy.Input{Function: f, Wanted: revision(1, spec)}, "the autoscaler to be made", func(o deploy.Outcome, err error) bool {
		_, missing := l.cluster.Client().AutoscalingV2().HorizontalPodAutoscalers(l.namespace).Get(t.Context(), "refused", metav1.GetOptions{})
		return err == nil && missing == nil && o.Node.Error == nil
	})
}

func TestWithoutSpinKubeTheErrorSaysWhatToInstall(t *testing.T) {
	t.Parallel()
	l := realCluster(t)
	var crd *deploy.MissingCRDError
	if !errors.As(l.without, &crd) || crd.CRD != "spinappexecutors.core.spinkube.dev" || !strings.Contains(crd.Error(), "install SpinKube") {
		t.Errorf("got %v", l.without)
	}
}

func TestAFailedRevisionSaysWhy(t *testing.T) {
	t.Parallel()
	// Through the shim, as a module that imports what nobody has.
	unknownImport := append([]byte("\x00asm\x01\x00\x00\x00"), append(append(
		[]byte{1, 4, 1, 0x60, 0, 0},                          // type: func()
		[]byte("\x02\x0f\x01\x06future\x04soon\x00\x00")...), // import future.soon
		[]byte("\x03\x02\x01\x00\x07\x0a\x01\x06_start\x00\x01\x0a\x06\x01\x04\x00\x10\x00\x0b")...)...) // _start calls it
	serving := func(l *lab) string { return l.serving("x") }
	// In the order in which they begin: what takes longest is first.
	for _, tt := range []struct {
		name  string
		class string
		image func(*lab) string
		env   []v1alpha1.EnvVar
		quota bool
		// mayPass: waiting might help, so it fails when the deadline passes.
		mayPass bool
		code    string
		words   []string
	}{
		{name: "the module imports what the shim lacks", class: wasmtime, image: func(l *lab) string { return l.wasm(unknownImport) },
			code: deploy.CodeCrashed, words: []string{"an import that it does not have", "containerd log"}},
		{name: "the process ends", image: func(l *lab) string { return l.running("nonsense", "a", "b") },
			code: deploy.CodeCrashed, words: []string{"exit code", "toolbox"}},
		{name: "a secret is not there", image: serving, mayPass: true,
			env:  []v1alpha1.EnvVar{{Name: "TOKEN", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "nothing", Key: "token"}}},
			code: deploy.CodeContainerRefused, words: []string{`secret "nothing" not found`}},
		{name: "the node has no such runtime", class: missing, image: serving,
			code: deploy.CodeRuntimeMissing, words: []string{"node-a", `"spin"`, "containerd-shim-spin"}},
		{name: "there is no such class", class: "absent", image: serving,
			code: deploy.CodeRuntimeMissing, words: []string{`RuntimeClass "absent" not found`}},
		{name: "no node is fit", class: nowhere, image: serving, mayPass: true,
			code: deploy.CodeUnschedulable, words: []string{"0/1 nodes are available", "proven the runtime"}},
		{name: "the registry does not have the image", image: func(l *lab) string { return l.registry.Host + "/gone" + absentDigest },
			code: deploy.CodeImagePull, words: []string{"does not have it", "not found"}},
		{name: "the image is for another processor", image: foreign,
			code: deploy.CodeWrongArchitecture, words: []string{"another processor", "node-a"}},
		{name: "the quota is used up", image: serving, quota: true, mayPass: true,
			code: deploy.CodeQuota, words: []string{"ResourceQuota", "exceeded quota"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := start(t, deploy.Settings{RuntimeClass: tt.class, ProgressDeadline: time.Hour})
			if tt.quota {
				l.noPods()
			}
			spec := spinSpec(tt.image(l))
			spec.Env = tt.env
			f := l.create("fn", spec)
			in := deploy.Input{Function: f, Wanted: revision(1, spec)}
			if tt.mayPass {
				out, err := l.reconcile(in, "the reason to be told", func(o deploy.Outcome, err error) bool {
					return err != nil || o.Node.Error != nil && o.Node.Error.Code == tt.code
				})
				if err != nil || !out.Node.Retrying || isFailed(out, err) {
					t.Fatalf("before the deadline: %+v, %v", out.Node, err)
				}
				l.clock.forward(2 * time.Hour)
			}
			out, err := l.reconcile(in, "the revision to fail", isFailed)
			if err != nil {
				t.Error(err)
			}
			e := out.Node.Error
			if e.Code != tt.code || strings.Contains(e.Detail, "CrashLoopBackOff") || out.Node.Revision != 1 || out.Node.Retrying || out.Node.Serving != 0 {
				t.Errorf("node %+v: %+v", out.Node, e)
			}
			for _, w := range tt.words {
				if !strings.Contains(e.Detail, w) {
					t.Errorf("%q does not say %q", e.Detail, w)
				}
			}
			t.Log(e.Code, "-", e.Detail)
		})
	}
}

// noPods forbids pods in the test's namespace.
func (l *lab) noPods() {
	l.t.Helper()
	quotas := l.cluster.Client().CoreV1().ResourceQuotas(l.namespace)
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "full"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("0")}}}
	if _, err := quotas.Create(l.t.Context(), quota, metav1.CreateOptions{}); err != nil {
		l.t.Fatal(err)
	}
	if err := l.cluster.WaitFor(l.t.Context(), "the quota to be counted", soon, func(ctx context.Context) (bool, error) {
		q, err := quotas.Get(ctx, "full", metav1.GetOptions{})
		return err == nil && len(q.Status.Hard) > 0, err
	}); err != nil {
		l.t.Fatal(err)
	}
}

func TestTheRevisionBeforeAFailedOneComesBack(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		image func(*lab) string
		env   []v1alpha1.EnvVar
		// class is that of the namespace's executor from revision 2 on.
		class   string
		mayPass bool
		code    string
	}{
		"at once where nothing heals it": {image: foreign, class: native, code: deploy.CodeWrongArchitecture},
		"after the deadline where waiting might have healed it": {image: func(l *lab) string { return l.serving("x") }, class: native, mayPass: true,
			env: []v1alpha1.EnvVar{{Name: "TOKEN", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "nothing", Key: "token"}}}, code: deploy.CodeContainerRefused},
		"where the executor's class became one that does not work": {image: func(l *lab) string { return l.serving("x") }, class: missing, code: deploy.CodeRuntimeMissing},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := start(t, deploy.Settings{ProgressDeadline: time.Hour})
			good := spinSpec(l.serving("good"))
			f := l.create("fn", good)
			in := deploy.Input{Function: f, Wanted: revision(1, good)}
			l.reconcile(in, "revision 1 to be ready", isReady(1))
			if tt.class != native {
				l.run(deploy.Settings{RuntimeClass: tt.class, BaseDomain: l.namespace + ".example", ProgressDeadline: time.Hour})
			}

			bad := spinSpec(tt.image(l))
			bad.Env = tt.env
			in = deploy.Input{Function: f, Wanted: revision(2, bad), Previous: ptr.To(revision(1, good))}
			if tt.mayPass {
				l.reconcile(in, "the reason to be told", func(o deploy.Outcome, _ error) bool {
					return o.Node.Error != nil && o.Node.Error.Code == tt.code
				})
				l.clock.forward(2 * time.Hour)
			}
			out, err := l.reconcile(in, "revision 2 to fail", isFailed)
			if err != nil {
				t.Error(err)
			}
			e := out.Node.Error
			if e.Code != tt.code || out.Node.Revision != 2 || out.Node.Retrying {
				t.Errorf("node %+v: %+v", out.Node, e)
			}
			if out.Node.Serving != 1 {
				t.Errorf("revision %d answers, want 1", out.Node.Serving)
			}
			app := l.get(spinApps, "fn")
			if image, _, _ := unstructured.NestedString(app.Object, "spec", "image"); image != good.Image || app.GetLabels()[deploy.RevisionLabel] != "1" {
				t.Errorf("the SpinApp is of revision %s with image %s", app.GetLabels()[deploy.RevisionLabel], image)
			}
			if tt.class != native {
				return // nothing comes up under this class
			}
			// It stays so, also for a replica that knows nothing, and a later
			// revision gets its chance.
			f.Status.Nodes = nil
			before := *e
			out, err = l.reconcile(in, "revision 1 to be back", func(o deploy.Outcome, err error) bool {
				return err == nil && o.RequeueAfter > time.Minute
			})
			if out.Node.Progress != v1alpha1.ProgressFailed || out.Node.Serving != 1 || *out.Node.Error != before || err != nil {
				t.Errorf("later: %+v %+v, %v", out.Node, out.Node.Error, err)
			}
			in = deploy.Input{Function: f, Wanted: revision(3, good), Previous: ptr.To(revision(1, good))}
			l.reconcile(in, "revision 3 to be ready", isReady(3))
		})
	}
}

// foreign is an image of a program for a processor that no node has.
func foreign(l *lab) string {
	var header bytes.Buffer
	if err := binary.Write(&header, binary.LittleEndian, elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_S390), Version: uint32(elf.EV_CURRENT), Ehsize: 64,
	}); err != nil {
		l.t.Fatal(err)
	}
	path := filepath.Join(l.t.TempDir(), "app")
	if err := os.WriteFile(path, header.Bytes(), 0o755); err != nil {
		l.t.Fatal(err)
	}
	image, err := cluster.BinaryImage(map[string]string{"/app": path})
	if err != nil {
		l.t.Fatal(err)
	}
	return l.push(nativeRepository, image)
}

func TestWithoutARevisionToGoBackToAFailedOneIsReadyOnceItComesUp(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{ProgressDeadline: time.Hour})
	spec := spinSpec(l.serving("late"))
	spec.Env = []v1alpha1.EnvVar{{Name: "TOKEN", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "late", Key: "token"}}}
	f := l.create("late", spec)
	in := deploy.Input{Function: f, Wanted: revision(1, spec)}
	l.reconcile(in, "the reason to be told", func(o deploy.Outcome, _ error) bool { return o.Node.Error != nil })
	l.clock.forward(2 * time.Hour)
	l.reconcile(in, "to fail", isFailed)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "late"}, StringData: map[string]string{"token": "t"}}
	if _, err := l.cluster.Client().CoreV1().Secrets(l.namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	l.reconcile(in, "to be ready", isReady(1))
}

func TestWhatOthersOwnIsNotTaken(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	image := l.registry.Host + "/none" + absentDigest
	spec := spinSpec(image)

	t.Run("a field that kubectl set", func(t *testing.T) {
		f := l.create("edited", spec)
		in := deploy.Input{Function: f, Wanted: revision(1, spec)}
		if _, err := l.spin.Reconcile(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		patch := `{"spec":{"image":"example.com/other:1"}}`
		if _, err := l.cluster.Dynamic().Resource(spinApps).Namespace(l.namespace).Patch(t.Context(), "edited", ktypes.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "kubectl-edit"}); err != nil {
			t.Fatal(err)
		}
		out, err := l.spin.Reconcile(t.Context(), in)
		var conflict *deploy.ConflictError
		if !errors.As(err, &conflict) || len(conflict.Managers) != 1 || conflict.Managers[0] != "kubectl-edit" || conflict.Fields[0] != ".spec.image" {
			t.Errorf("got %v", err)
		}
		if out.Node.Error == nil || out.Node.Error.Code != deploy.CodeConflict || !strings.Contains(out.Node.Error.Detail, `"kubectl-edit"`) {
			t.Errorf("node %+v", out.Node)
		}
	})
	t.Run("a field of our own under an older name", func(t *testing.T) {
		f := l.create("older", spec)
		in := deploy.Input{Function: f, Wanted: revision(1, spec)}
		if _, err := l.spin.Reconcile(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		patch := `{"spec":{"image":"example.com/other:1"}}`
		if _, err := l.cluster.Dynamic().Resource(spinApps).Namespace(l.namespace).Patch(t.Context(), "older", ktypes.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "hearth-api-before"}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.spin.Reconcile(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		if got, _, _ := unstructured.NestedString(l.get(spinApps, "older").Object, "spec", "image"); got != image {
			t.Errorf("image %s", got)
		}
	})
	t.Run("a SpinApp of the same name", func(t *testing.T) {
		u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "core.spinkube.dev/v1alpha1", "kind": "SpinApp", "metadata": map[string]any{"name": "theirs"},
			"spec": map[string]any{"image": "example.com/theirs:1", "executor": "none", "replicas": int64(1)}}}
		if _, err := l.cluster.Dynamic().Resource(spinApps).Namespace(l.namespace).Create(t.Context(), u, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		f := l.create("theirs", spec)
		out, err := l.spin.Reconcile(t.Context(), deploy.Input{Function: f, Wanted: revision(1, spec)})
		var conflict *deploy.ConflictError
		if !errors.As(err, &conflict) || !strings.Contains(err.Error(), "SpinApp "+l.namespace+"/theirs") || out.Node.Error.Code != deploy.CodeConflict {
			t.Errorf("got %+v, %v", out, err)
		}
		// And it is not deleted when the function stops being spin.
		f.Spec.Runtime = v1alpha1.RuntimeResident
		if _, err := l.spin.Reconcile(t.Context(), deploy.Input{Function: f}); err != nil {
			t.Fatal(err)
		}
		l.get(spinApps, "theirs")
	})
	t.Run("a host", func(t *testing.T) {
		theirs := l.ingress("theirs-host", "taken."+l.namespace+".example", nil)
		f := l.create("taken", spec)
		in := deploy.Input{Function: f, Wanted: revision(1, spec)}
		var taken *deploy.HostTakenError
		out, err := l.reconcile(in, "the host to be taken", func(o deploy.Outcome, err error) bool { return errors.As(err, &taken) })
		if taken.Name != theirs || taken.Namespace != l.namespace || out.Node.Error.Code != deploy.CodeHostTaken || !out.Node.Retrying || out.Node.Progress == v1alpha1.ProgressReady {
			t.Errorf("got %+v, %v", out, err)
		}
		if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Get(t.Context(), "taken", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("there is an Ingress for it: %v", err)
		}
		if err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Delete(t.Context(), theirs, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		l.reconcile(in, "the host to be free", func(_ deploy.Outcome, err error) bool { return err == nil })
	})
}

// ingress makes somebody else's Ingress.
func (l *lab) ingress(name, host string, labels map[string]string) string {
	l.t.Helper()
	i := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{
		Host: host, IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{
			Path: "/", PathType: ptr.To(networkingv1.PathTypePrefix),
			Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "theirs", Port: networkingv1.ServiceBackendPort{Number: 80}}},
		}}}},
	}}}}
	if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.namespace).Create(l.t.Context(), i, metav1.CreateOptions{}); err != nil {
		l.t.Fatal(err)
	}
	return name
}

func TestAnExecutorOfSomebodyElseIsUsedAsItIs(t *testing.T) {
	t.Parallel()
	executor := func(spec map[string]any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "core.spinkube.dev/v1alpha1", "kind": "SpinAppExecutor", "metadata": map[string]any{"name": deploy.DefaultExecutor}, "spec": spec}}
	}
	for name, tt := range map[string]struct {
		spec    map[string]any
		problem string
	}{
		"with a class of its own": {map[string]any{"createDeployment": true, "deploymentConfig": map[string]any{"runtimeClassName": nowhere}}, ""},
		"without Deployments":     {map[string]any{"createDeployment": false}, "makes no Deployments"},
		"without a class":         {map[string]any{"createDeployment": true}, "names neither"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := start(t, deploy.Settings{})
			u, err := l.cluster.Dynamic().Resource(spinExecutors).Namespace(l.namespace).Create(t.Context(), executor(tt.spec), metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			spec := spinSpec(l.registry.Host + "/none" + absentDigest)
			f := l.create("fn", spec)
			out, err := l.spin.Reconcile(t.Context(), deploy.Input{Function: f, Wanted: revision(1, spec)})
			var unusable *deploy.ExecutorError
			if tt.problem == "" && err != nil || tt.problem != "" && (!errors.As(err, &unusable) || !strings.Contains(out.Node.Error.Detail, tt.problem)) {
				t.Errorf("got %+v, %v", out, err)
			}
			if after := l.get(spinExecutors, deploy.DefaultExecutor); after.GetResourceVersion() != u.GetResourceVersion() {
				t.Error("it was written")
			}
		})
	}
}

func TestAnAPIServerThatFailsSaysNothingOfTheFunction(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	spec := spinSpec(l.registry.Host + "/none" + absentDigest)
	f := l.create("fn", spec)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	out, err := l.spin.Reconcile(ctx, deploy.Input{Function: f, Wanted: revision(1, spec)})
	if err == nil || out.Node.Name != "" || out.RequeueAfter <= 0 {
		t.Errorf("got %+v, %v", out, err)
	}
}
