package bootstrap_test

import (
	"context"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/machine"
)

// TestALostClusterIsRestoredFromASnapshot loses the only server with its disk.
// A new one, told to restore, founds the next generation under the same
// authority, with what the snapshot has and nothing later, although it is killed
// while k3s puts etcd back.
func TestALostClusterIsRestoredFromASnapshot(t *testing.T) {
	t.Parallel()
	l := newLab(t, "restore")
	// Here in parameters, under a key of one's own.
	l.store = "ssm:///hearth/restore\n    kmsKey: alias/hearth"
	old := l.add("old", l.withImage("control-plane"), machine.Spec{})
	l.boot(old)
	l.succeeded(old)
	hasTheChartsImage(t, old)
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
	// The snapshot is on the disk, whatever bucket later ones go to.
	restoring := strings.Replace(l.userData("control-plane", ""), "      store:", "      snapshots: {bucket: s3://nobody-has-this}\n        restore: {generation: 1, snapshot: "+where+"}\n        store:", 1)
	if !strings.Contains(restoring, "restore:") {
		t.Fatalf("the user-data has no place for it:\n%s", restoring)
	}
	fresh := l.add("fresh", restoring, machine.Spec{})
	if err := fresh.WriteFile(where+".whole", snapshot, 0o600); err != nil {
		t.Fatal(err)
	}
	// k3s waits for who writes into a pipe, until it is killed in the middle of
	// the restore, and leaves half of etcd's data.
	if err := unix.Mkfifo(fresh.Path(where), 0o600); err != nil {
		t.Fatal(err)
	}
	l.boot(fresh)
	restored, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := fresh.WaitFor(restored, "the restore to begin", func(ctx context.Context) (bool, error) {
		r, err := result(ctx, fresh)
		return err == nil && strings.HasPrefix(r.Doing, "restoring etcd"), nil
	}); err != nil {
		t.Fatal(err)
	}
	if out, err := fresh.Exec(t.Context(), "sh", "-c", "mkdir -p /var/lib/rancher/k3s/server/db/etcd/member/snap && echo half > /var/lib/rancher/k3s/server/db/etcd/member/snap/db &&"+
		" mv "+where+".whole "+where+" && systemctl kill -s KILL hearth-bootstrap"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
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

	// An agent whose server is gone, and that has not kept who the others are.
	const config = "/etc/rancher/k3s/config.yaml.d/10-hearth.yaml"
	const dead = "https://192.0.2.1:6443" // nobody's (RFC 5737)
	joined, err := agent.Exec(t.Context(), "sh", "-c", "systemctl stop k3s-agent && grep ^server: "+config+
		" && sed -i 's|^server: .*|server: "+dead+"|' "+config+" && rm -f /var/lib/rancher/k3s/agent/etc/k3s-agent-load-balancer.json")
	if err != nil {
		t.Fatal(err, joined)
	}
	if out, err := agent.Exec(t.Context(), "systemctl", "restart", "hearth-bootstrap"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if r, err := result(t.Context(), agent); err != nil || r.Outcome != "succeeded" {
		t.Errorf("an agent whose server is gone: %v, %+v", err, r)
	}
	if now, err := agent.Exec(t.Context(), "grep", "^server:", config); err != nil || now != joined {
		t.Errorf("it joins through %q, and did through %q: %v", now, joined, err)
	}
}
