package node_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/guests"
)

// agentData is agent.dataDir of the chart.
const agentData = "/var/lib/hearth"

// marked is a module that prints text and ends.
func marked(t *testing.T, text string) []byte {
	t.Helper()
	module, err := guests.Mark(guests.Read(t, "hello"), text)
	if err != nil {
		t.Fatal(err)
	}
	return module
}

// wasmImage has the form in which runwasi's own tool packs modules: a layer
// that is the module.
func wasmImage(t *testing.T, module []byte, more ...v1.Layer) v1.Image {
	t.Helper()
	layers := append([]v1.Layer{static.NewLayer(module, "application/wasm")}, more...)
	image, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), layers...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "wasm", "wasip1"
	config.Config.Entrypoint = []string{"/app.wasm"}
	// Nothing is to be unpacked into a file system. CRI names an image by the
	// digest of its config and takes two with the same config for one image, so
	// the config says which module it is for, as the real tools' configs do.
	config.RootFS.DiffIDs = []v1.Hash{}
	config.Config.Labels = map[string]string{"module": digest.FromBytes(module).String()}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// push returns the image's reference by tag, and its digest.
func push(t *testing.T, registry *cluster.Registry, repository string, image v1.Image) (string, v1.Hash) {
	t.Helper()
	reference, err := name.ParseReference(registry.Host+"/"+repository+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(reference, image, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	hash, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return reference.Name(), hash
}

// deploy creates a Deployment of Wasm pods that the test's end deletes.
func deploy(t *testing.T, app, image string, replicas int32) {
	t.Helper()
	class := "hearth-wasmtime"
	labels := map[string]string{"app": app}
	if _, err := bench.Client().AppsV1().Deployments("default").Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: app, Namespace: "default"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					RuntimeClassName: &class, TerminationGracePeriodSeconds: new(int64(1)),
					Containers: []corev1.Container{{Name: "main", Image: image, ImagePullPolicy: corev1.PullIfNotPresent}},
				},
			},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bench.Client().AppsV1().Deployments("default").Delete(context.Background(), app, metav1.DeleteOptions{})
	})
}

// compiled says whether the store on a node has an object of this module.
func compiled(node string, module []byte) bool {
	sum := sha256.Sum256(module)
	_, err := os.Stat(filepath.Join(bench.Node(node).Path(agentData), "store", "objects", hex.EncodeToString(sum[:]), "manifest.json"))
	return err == nil
}

func wasmImageIsWarmOnTheNodeBeforeItsFirstPod(t *testing.T) {
	ctx := t.Context()
	// Not what an earlier run of this test left on the node.
	text := "warm before its pod " + rand.Text()
	registry, err := bench.Registry(ctx, cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	module := marked(t, text)
	reference, manifest := push(t, registry, earlyRepository(wasmNode, registry.Host, "warm"), wasmImage(t, module))
	deploy(t, "warm", reference, 0)

	waitStatus(t, wasmNode, "the image to be warm", func(s v1alpha1.NodeStatus) bool {
		return compiled(wasmNode, module) && s.Images != nil && s.Images.Total == 1 && s.Images.Warm == 1
	})
	waitNode(t, wasmNode, "the condition that kubectl shows", func(n *corev1.Node) bool {
		c := condition(n, images.ConditionType)
		return c.Status == corev1.ConditionTrue && strings.Contains(c.Message, "1/1 warm")
	})
	node := bench.Node(wasmNode)
	client, err := node.Containerd()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	info, err := client.ContentStore().Info(ctx, digest.Digest(manifest.String()))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for key := range info.Labels {
		found = found || strings.HasPrefix(key, "runwasi.io/precompiled/")
	}
	if !found {
		t.Errorf("the shim compiled nothing: labels of the manifest are %v", info.Labels)
	}
	_, service, conn, err := node.CRI()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	shown, err := service.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: reference}})
	if err != nil || !shown.GetImage().GetPinned() {
		t.Errorf("kubelet may collect the image: %v, %v", shown, err)
	}
	if n, err := bench.Client().CoreV1().Nodes().Get(ctx, plainNode, metav1.GetOptions{}); err != nil || strings.Contains(condition(n, images.ConditionType).Message, "1/1") {
		t.Errorf("a node without the runtime brought the image: %v, %v", condition(n, images.ConditionType), err)
	}

	if _, err := bench.Client().AppsV1().Deployments("default").UpdateScale(ctx, "warm", &autoscalingv1.Scale{
		ObjectMeta: metav1.ObjectMeta{Name: "warm", Namespace: "default"}, Spec: autoscalingv1.ScaleSpec{Replicas: 1},
	}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	var said string
	if err := bench.WaitFor(ctx, "the module's line in the pod's log", soon, func(ctx context.Context) (bool, error) {
		pods, err := bench.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=warm"})
		if err != nil || len(pods.Items) != 1 {
			return false, err
		}
		pod = pods.Items[0]
		said, err = bench.PodLogs(ctx, "default", pod.Name, "")
		return err == nil && strings.Contains(said, text), nil
	}); err != nil {
		t.Fatalf("%v\npod %s: %+v\nlog: %s", err, pod.Name, pod.Status, said)
	}
	if pod.Spec.NodeName != wasmNode {
		t.Errorf("the pod ran on %s", pod.Spec.NodeName)
	}
	events, err := bench.Client().CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod.Name})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if e.Reason == "Pulling" {
			t.Errorf("kubelet pulled: %s", e.Message)
		}
	}

	if err := bench.Client().AppsV1().Deployments("default").Delete(ctx, "warm", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, wasmNode, "the image to be wanted no more", func(s v1alpha1.NodeStatus) bool { return s.Images != nil && s.Images.Total == 0 })
}

// wasmPodMayHaveAnOrdinaryContainer is about a sidecar: its image is wanted with
// the pod's other one and is no fault for having no Wasm in it.
func wasmPodMayHaveAnOrdinaryContainer(t *testing.T) {
	ctx := t.Context()
	registry, err := bench.Registry(ctx, cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	text := "in a mixed pod " + rand.Text()
	module := marked(t, text)
	reference, _ := push(t, registry, earlyRepository(wasmNode, registry.Host, "mixed"), wasmImage(t, module))
	class, labels, one := "hearth-wasmtime", map[string]string{"app": "mixed"}, int32(1)
	if _, err := bench.Client().AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "mixed", Namespace: "default"},
		Spec: appsv1.DeploymentSpec{Replicas: &one, Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels},
			Spec: corev1.PodSpec{RuntimeClassName: &class, TerminationGracePeriodSeconds: new(int64(1)), Containers: []corev1.Container{
				{Name: "main", Image: reference, ImagePullPolicy: corev1.PullIfNotPresent},
				{Name: "side", Image: toolbox, ImagePullPolicy: corev1.PullIfNotPresent, Args: []string{"sleep", "1h"}},
			}},
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bench.Client().AppsV1().Deployments("default").Delete(context.Background(), "mixed", metav1.DeleteOptions{})
	})
	var pod corev1.Pod
	if err := bench.WaitFor(ctx, "the module's line, and the other container beside it", soon, func(ctx context.Context) (bool, error) {
		pods, err := bench.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=mixed"})
		if err != nil || len(pods.Items) != 1 {
			return false, err
		}
		pod = pods.Items[0]
		running := false
		for _, c := range pod.Status.ContainerStatuses {
			running = running || c.Name == "side" && c.State.Running != nil
		}
		said, err := bench.PodLogs(ctx, "default", pod.Name, "main")
		return err == nil && running && strings.Contains(said, text), nil
	}); err != nil {
		t.Fatalf("%v\npod %s: %+v", err, pod.Name, pod.Status)
	}
	s := waitStatus(t, wasmNode, "both images to be warm", func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && s.Images.Total == 2 && s.Images.Warm == 2
	})
	if check(s, "images").State != v1alpha1.CheckOK || !compiled(wasmNode, module) {
		t.Errorf("%+v; compiled: %t", check(s, "images"), compiled(wasmNode, module))
	}
}
