package bootstrap_test

import (
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/machine"
)

// TestALostClusterIsRestoredFromASnapshot loses the only server with its disk.
// A new one, told to restore, founds the next generation under the same
// authority, with what the snapshot has and nothing later.
func TestALostClusterIsRestoredFromASnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t, "restore")
	// Here in parameters, under a key of one's own.
	l.store = "ssm:///hearth/restore\n    kmsKey: alias/hearth"
	old := l.add("old", l.userData("control-plane", ""), machine.Spec{})
	l.boot(old)
	l.succeeded(old)
	kube := client(t, old)
	remember := func(name string) {
		t.Helper()
		if _, err := kube.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remember("before")
	if out, err := old.Exec(t.Context(), "k3s", "etcd-snapshot", "save"); err != nil {
		t.Fatal(out, err)
	}
	remember("after")
	listed, err := old.Exec(t.Context(), "sh", "-c", "ls /var/lib/rancher/k3s/server/db/snapshots/on-demand-*; cat /var/lib/rancher/k3s/server/tls/server-ca.crt")
	if err != nil {
		t.Fatal(err)
	}
	path, authority, _ := strings.Cut(listed, "\n")
	snapshot, err := os.ReadFile(old.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}

	const where = "/var/backups/etcd-snapshot"
	restoring := strings.Replace(l.userData("control-plane", ""), "      store:", "      restore: {generation: 1, snapshot: "+where+"}\n        store:", 1)
	if !strings.Contains(restoring, "restore:") {
		t.Fatalf("the user-data has no place for it:\n%s", restoring)
	}
	fresh := l.add("fresh", restoring, machine.Spec{})
	if err := fresh.WriteFile(where, snapshot, 0o600); err != nil {
		t.Fatal(err)
	}
	l.boot(fresh)
	r := l.succeeded(fresh)
	if r.Node.Action != "found" || r.Node.Generation != 2 {
		t.Errorf("it became %+v", r.Node)
	}
	if now, err := fresh.Exec(t.Context(), "cat", "/var/lib/rancher/k3s/server/tls/server-ca.crt"); err != nil || now != authority {
		t.Errorf("the restored cluster has another authority: %v", err)
	}
	kube = client(t, fresh)
	if _, err := kube.CoreV1().ConfigMaps("default").Get(t.Context(), "before", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := kube.CoreV1().ConfigMaps("default").Get(t.Context(), "after", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("there is something from after the snapshot: %v", err)
	}
	etcdMembers(t, fresh, 1)

	// The wish may stay in the configuration: it was done once.
	if out, err := fresh.Exec(t.Context(), "systemctl", "restart", "hearth-bootstrap"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if r, err := result(t.Context(), fresh); err != nil || r.Changed || r.Node.Generation != 2 {
		t.Errorf("the second run: %v, %+v", err, r)
	}
	agent := l.add("agent", l.userData("wasm", ""), machine.Spec{})
	l.boot(agent)
	if r := l.succeeded(agent); r.Node.Action != "join" || r.Node.Generation != 2 {
		t.Errorf("an agent became %+v", r.Node)
	}
}
