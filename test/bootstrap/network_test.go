package bootstrap_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
)

const (
	// toolboxImage is the image of the network's pods: one of Docker Hub's, for
	// which there is a mirror.
	toolboxImage = "docker.io/library/hearth-test-toolbox:1"
	// registryHost is where k3s's own images come from in place of Docker Hub. It
	// has no address but its mirror's.
	registryHost = "images.hearth.test"
)

// cniManifest is a network of one node: a DaemonSet, as others come, that tells
// containerd how to connect pods.
const cniManifest = `apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: network
  namespace: kube-system
spec:
  selector:
    matchLabels: {app: network}
  template:
    metadata:
      labels: {app: network}
    spec:
      hostNetwork: true
      tolerations:
      - operator: Exists
      containers:
      - name: network
        image: ` + toolboxImage + `
        imagePullPolicy: Always
        command: [/toolbox, sleep, 24h]
      initContainers:
      - name: install
        image: ` + toolboxImage + `
        imagePullPolicy: Always
        command:
        - /toolbox
        - write
        - /host/10-handed-over.conflist
        - '{"cniVersion":"1.0.0","name":"handed-over","plugins":[{"type":"ptp","ipam":{"type":"host-local","subnet":"10.42.0.0/24","routes":[{"dst":"0.0.0.0/0"}]}}]}'
        volumeMounts:
        - name: conf
          mountPath: /host
      volumes:
      - name: conf
        hostPath:
          path: /etc/cni/net.d
          type: DirectoryOrCreate
`

// mirror is a registry that remembers who was asked for what.
type mirror struct {
	registry  http.Handler
	mu        sync.Mutex
	manifests map[string]bool // "REGISTRY REPOSITORY", REGISTRY as containerd says it
}

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if repository, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/"); ok && r.Method != http.MethodPut {
		m.mu.Lock()
		m.manifests[r.URL.Query().Get("ns")+" "+repository] = true
		m.mu.Unlock()
	}
	m.registry.ServeHTTP(w, r)
}

// TestANetworkThatIsHandedOverComesWithTheNode: k3s connects no pods then, and
// the node can be Ready only because the other network's manifest was there
// before anybody waited. All images, of which the machine has none, come from
// the configured registry and the mirror of Docker Hub, by real pulls.
func TestANetworkThatIsHandedOverComesWithTheNode(t *testing.T) {
	t.Parallel()
	l := newLab(t, "network")
	ctx := boundedBy(t, soon)
	images := &mirror{registry: registry.New(registry.Logger(log.New(io.Discard, "", 0))), manifests: map[string]bool{}}
	mirrorURL := l.serve(images)
	for repository, program := range map[string]string{"library/hearth-test-toolbox:1": "toolbox", "rancher/mirrored-pause:3.6": "pause", "rancher/mirrored-pause:3.10": "pause"} {
		binary, err := cluster.GoBinary(ctx, "./test/cluster/images/"+program)
		if err != nil {
			t.Fatal(err)
		}
		image, err := cluster.BinaryImage(map[string]string{"/" + program: binary})
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.ParseReference(strings.TrimPrefix(mirrorURL, "http://")+"/"+repository, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, image, remote.WithContext(ctx), remote.WithTransport(http.DefaultTransport)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.put(ctx, filesBucket, "cni.yaml", []byte(cniManifest)); err != nil {
		t.Fatal(err)
	}
	// Where networks expect the plugins; their installers bring them.
	m := l.bare("server", machine.Spec{Binds: map[string]string{"/opt/cni/bin": "/usr/lib/cni"}})
	sum := sha256.Sum256([]byte(cniManifest))
	config := l.spec("control-plane", l.name, fmt.Sprintf(`    files:
    - name: cni-manifest
      sha256: %s
      urls: ["s3://%s/cni.yaml"]
  registries:
    systemDefault: %s
    mirrors:
      %s: {endpoints: [%q]}
      docker.io: {endpoints: [%q]}
  network:
    cni: custom
  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
      disable: [traefik, servicelb, coredns, local-storage, metrics-server]
  shims:
  - name: wasmtime
  addons:
    hearth: {values: {image: {repository: hearth.sh/nodeagent}}}
  host:
    minDiskFree: 512Mi
`, hex.EncodeToString(sum[:]), filesBucket, registryHost, registryHost, mirrorURL, mirrorURL, l.k3s.Version))
	r, exit, err := l.run(ctx, m, attempt{config: config, stateDir: bootstrap.DefaultStateDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("exit %d, %s: %s; %s", exit, r.Code, r.Message, phases(r))
	if exit != 0 || r.Outcome != bootstrap.OutcomeSucceeded {
		t.Fatalf("exit %d, %s: %s", exit, r.Code, r.Message)
	}
	kube := client(t, m)
	n := nodes(t, kube)[m.InstanceID]
	if !ready(n) {
		t.Error("the node is not Ready")
	}
	var installed metav1.Time
	waitFor(t, m, "the network's pod to say when it was installed", func(ctx context.Context) (bool, error) {
		pods, err := kube.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{LabelSelector: "app=network"})
		if err != nil || len(pods.Items) != 1 || len(pods.Items[0].Status.InitContainerStatuses) != 1 || pods.Items[0].Status.InitContainerStatuses[0].State.Terminated == nil {
			return false, nil
		}
		installed = pods.Items[0].Status.InitContainerStatuses[0].State.Terminated.StartedAt
		return true, nil
	})
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.LastTransitionTime.Before(&installed) {
			t.Errorf("the node was Ready at %s, before it had a network, which began to be installed at %s", c.LastTransitionTime, installed)
		}
	}
	out, err := m.Exec(ctx, "sh", "-c", "ls /etc/cni/net.d; ls /var/lib/rancher/k3s/agent/etc/cni/net.d 2>/dev/null; true")
	if err != nil || strings.TrimSpace(out) != "10-handed-over.conflist" {
		t.Errorf("the networks of the node are %q: %v", out, err)
	}
	l.nothingCameFromDockerHub(ctx, m, images)
	began := time.Now()
	if out, err := m.Exec(ctx, program, "reset", "--yes"); err != nil {
		t.Errorf("reset: %v: %s", err, out)
	}
	t.Logf("the reset took %s", time.Since(began).Round(100*time.Millisecond))
}

// nothingCameFromDockerHub looks at every image of a node, and at what containerd
// tried.
func (l *lab) nothingCameFromDockerHub(ctx context.Context, m *machine.Machine, images *mirror) {
	l.t.Helper()
	images.mu.Lock()
	asked := slices.Sorted(maps.Keys(images.manifests))
	images.mu.Unlock()
	for _, want := range []string{"docker.io library/hearth-test-toolbox", registryHost + " rancher/mirrored-pause"} {
		if !slices.Contains(asked, want) {
			l.t.Errorf("nobody asked the mirror for %s, but for %q", want, asked)
		}
	}
	listed, err := m.Command(ctx, "k3s", "ctr", "--namespace", "k8s.io", "images", "list", "--quiet").Output()
	if err != nil {
		l.t.Fatalf("%v: %s", err, listed)
	}
	for ref := range strings.FieldsSeq(string(listed)) {
		host, rest, _ := strings.Cut(ref, "/")
		repository := strings.TrimPrefix(rest[:max(0, strings.IndexAny(rest, ":@"))], "library/")
		ours := host == "docker.io" && repository == "hearth-test-toolbox" || host == registryHost && repository == "rancher/mirrored-pause"
		// The archive of images brought these; they were not pulled.
		brought := ref == k3s.PauseImage || ref == k3s.NewPauseImage
		if !ours && !brought && !strings.HasPrefix(ref, "sha256:") {
			l.t.Errorf("the node has the image %s", ref)
		}
	}
	said, err := m.Exec(ctx, "sh", "-c", "grep -c 'registry-1[.]docker[.]io' /var/lib/rancher/k3s/agent/containerd/containerd.log || true")
	if err != nil || strings.TrimSpace(said) != "0" {
		l.t.Errorf("containerd speaks of Docker Hub in %s lines: %v", strings.TrimSpace(said), err)
	}
	l.t.Logf("pulled through the mirror: %q; images of the node: %q", asked, strings.Fields(string(listed)))
}
