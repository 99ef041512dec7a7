package bootstrap_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
)

// toolboxImage is the image of the network's pods.
const toolboxImage = "docker.io/library/hearth-test-toolbox:1"

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
        imagePullPolicy: Never
        command: [/toolbox, sleep, 24h]
      initContainers:
      - name: install
        image: ` + toolboxImage + `
        imagePullPolicy: Never
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

// TestANetworkThatIsHandedOverComesWithTheNode: k3s connects no pods then, and
// the node can be Ready only because the other network's manifest was there
// before anybody waited.
func TestANetworkThatIsHandedOverComesWithTheNode(t *testing.T) {
	t.Parallel()
	l := newLab(t, "network")
	ctx := boundedBy(t, soon)
	toolbox, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		t.Fatal(err)
	}
	image, err := cluster.BinaryImage(map[string]string{"/toolbox": toolbox})
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "toolbox.tar")
	if err := k3s.WriteImages(archive, map[string]v1.Image{toolboxImage: image}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.put(ctx, filesBucket, "cni.yaml", []byte(cniManifest)); err != nil {
		t.Fatal(err)
	}
	// Where networks expect the plugins; their installers bring them.
	m := l.bare("server", machine.Spec{Binds: map[string]string{"/opt/cni/bin": "/usr/lib/cni"}})
	if err := m.WriteFile(k3s.ImagesDir+"/toolbox.tar", content, 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(cniManifest))
	config := l.spec("control-plane", l.name, fmt.Sprintf(`    files:
    - name: cni-manifest
      sha256: %s
      urls: ["s3://%s/cni.yaml"]
  network:
    cni: custom
  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
      disable: [traefik, servicelb, coredns, local-storage, metrics-server]
  shims:
  - name: wasmtime
  host:
    minDiskFree: 512Mi
`, hex.EncodeToString(sum[:]), filesBucket, l.k3s.Version))
	r, exit, err := l.run(ctx, m, attempt{config: config, stateDir: bootstrap.DefaultStateDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("exit %d, %s: %s; %s", exit, r.Code, r.Message, phases(r))
	if exit != 0 || r.Outcome != bootstrap.OutcomeSucceeded {
		t.Fatalf("exit %d, %s: %s", exit, r.Code, r.Message)
	}
	if n := nodes(t, client(t, m))[m.InstanceID]; !ready(n) {
		t.Error("the node is not Ready")
	}
	out, err := m.Exec(ctx, "sh", "-c", "ls /etc/cni/net.d; ls /var/lib/rancher/k3s/agent/etc/cni/net.d 2>/dev/null; true")
	if err != nil || strings.TrimSpace(out) != "10-handed-over.conflist" {
		t.Errorf("the networks of the node are %q: %v", out, err)
	}
	began := time.Now()
	if out, err := m.Exec(ctx, program, "reset", "--yes"); err != nil {
		t.Errorf("reset: %v: %s", err, out)
	}
	t.Logf("the reset took %s", time.Since(began).Round(100*time.Millisecond))
}
