package k3s

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestFilesThatALossOfPowerEmptiedAreMadeAnew(t *testing.T) {
	root, p := t.TempDir(), DefaultPaths()
	for name, content := range map[string]string{
		p.ServerTLS + "/serving-kube-scheduler.crt":               "",
		p.ServerTLS + "/client-admin.key":                         "\x00\x00\x00\x00",
		p.ServerTLS + "/dynamic-cert.json":                        "",
		p.ServerTLS + "/etcd/client.crt":                          "",
		p.DataDir + "/server/cred/admin.kubeconfig":               "",
		p.DataDir + "/agent/client-kubelet.crt":                   "",
		p.DataDir + "/agent/etc/k3s-agent-load-balancer.json":     "",
		p.ServerTLS + "/client-admin.crt":                         "-----BEGIN CERTIFICATE-----",
		p.ServerTLS + "/server-ca.crt":                            "", // an authority is nobody's to remove
		p.ServerTLS + "/etcd/peer-ca.key":                         "",
		p.ServerTLS + "/service.key":                              "",
		p.DataDir + "/server/db/etcd/member/wal/x.key":            "",
		p.DataDir + "/agent/containerd/io.containerd/config.json": "",
		p.DataDir + "/agent/node-password":                        "",
	} {
		put(t, root, name, content)
		before := time.Now().Add(-2 * tornAge)
		if err := os.Chtimes(filepath.Join(root, name), before, before); err != nil {
			t.Fatal(err)
		}
	}
	// k3s that is starting has made this one and not filled it yet.
	put(t, root, p.ServerTLS+"/client-controller.key", "")
	want := []string{
		p.DataDir + "/agent/client-kubelet.crt", p.DataDir + "/agent/etc/k3s-agent-load-balancer.json", p.DataDir + "/server/cred/admin.kubeconfig",
		p.ServerTLS + "/client-admin.key", p.ServerTLS + "/dynamic-cert.json", p.ServerTLS + "/etcd/client.crt", p.ServerTLS + "/serving-kube-scheduler.crt",
	}
	got, err := removeTorn(root, p)
	slices.Sort(got)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("removed %q, %v", got, err)
	}
	for _, name := range want {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
	if got, err := removeTorn(root, p); err != nil || len(got) > 0 {
		t.Errorf("again: %q, %v", got, err)
	}
	if got, err := removeTorn(t.TempDir(), p); err != nil || len(got) > 0 {
		t.Errorf("before anything was made: %q, %v", got, err)
	}
}
