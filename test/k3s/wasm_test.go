package k3s_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/shims"
)

// A shim that lies on PATH before k3s first starts needs no configuration: a
// pod of its RuntimeClass runs.
func TestAShimThatIsThereBeforeK3sRunsWasm(t *testing.T) {
	d := load(t)
	shim, err := os.ReadFile(shims.Build(t).Wasmtime)
	if err != nil {
		t.Fatal(err)
	}
	layer := static.NewLayer(guests.Read(t, "hello"), "application/wasm")
	image, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), layer)
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
	config.RootFS.DiffIDs = []v1.Hash{} // nothing is to be unpacked
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	const ref = "hearth.test/hello:1"
	tar := filepath.Join(t.TempDir(), "wasm.tar")
	if err := k3s.WriteLayout(tar, map[string]v1.Image{ref: image}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(tar)
	if err != nil {
		t.Fatal(err)
	}

	network := machine.Start(t, machine.Options{})
	m, err := network.Add(t.Context(), machine.Spec{Name: "server", Binds: d.Binds})
	if err != nil {
		t.Fatal(err)
	}
	m.SetUserData(userData("server", serverConfig(m, "cluster-init: true")))
	for path, content := range map[string][]byte{
		"/usr/local/bin/containerd-shim-wasmtime-v1": shim,
		k3s.ImagesDir + "/wasm.tar":                  content,
	} {
		if err := m.WriteFile(path, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Install(m); err != nil {
		t.Fatal(err)
	}
	if err := m.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := connect(t, m)
	nodeReady(t, client, m)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	class := "wasmtime"
	pods := client.CoreV1().Pods("default")
	if err := m.WaitFor(ctx, "the RuntimeClass and the service account", func(ctx context.Context) (bool, error) {
		_, err := pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "hello"},
			Spec: corev1.PodSpec{RuntimeClassName: &class, RestartPolicy: corev1.RestartPolicyNever,
				Containers: []corev1.Container{{Name: "main", Image: ref, ImagePullPolicy: corev1.PullNever}}},
		}, metav1.CreateOptions{})
		return err == nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(soon); ; time.Sleep(time.Second) {
		pod, err := pods.Get(ctx, "hello", metav1.GetOptions{})
		if err == nil && pod.Status.Phase == corev1.PodSucceeded {
			break
		}
		if err == nil && pod.Status.Phase == corev1.PodFailed || time.Now().After(deadline) {
			t.Fatalf("the pod does not succeed: %v %+v", err, pod.Status)
		}
	}
	log, err := pods.GetLogs("hello", &corev1.PodLogOptions{}).DoRaw(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "HEARTH-MARKER") {
		t.Errorf("the module says %q", log)
	}
}
