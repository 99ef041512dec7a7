package k3s

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
		p.EtcdDir + "/name":                                       "",
		p.DataDir + "/server/cred/ipsec.psk":                      "",
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
		p.DataDir + "/agent/client-kubelet.crt", p.DataDir + "/agent/etc/k3s-agent-load-balancer.json", p.DataDir + "/server/cred/admin.kubeconfig", p.DataDir + "/server/cred/ipsec.psk", p.EtcdDir + "/name",
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

// TestProgramsThatALossOfPowerTruncatedAreUnpackedAnew: k3s would start from
// what is left of them for ever.
func TestProgramsThatALossOfPowerTruncatedAreUnpackedAnew(t *testing.T) {
	root, p := t.TempDir(), DefaultPaths()
	program := strings.Repeat("\x7fELF", 1000)
	sum := sha256.Sum256([]byte(program))
	sums := hex.EncodeToString(sum[:]) + "  k3s\n" + hex.EncodeToString(sum[:]) + "  aux/nft\n"
	whole := func() map[string]string {
		return map[string]string{"bin/k3s": program, "bin/aux/nft": program, "bin/.sha256sums": sums, "bin/.links": "containerd k3s\nkubectl k3s\n"}
	}
	for i, tt := range []struct {
		name   string
		change func(files map[string]string)
		torn   bool
	}{
		{"what is whole", func(map[string]string) {}, false},
		{"a program that is empty", func(f map[string]string) { f["bin/k3s"] = "" }, true},
		{"a program that is cut off", func(f map[string]string) { f["bin/aux/nft"] = program[:500] }, true},
		{"a program that was not written", func(f map[string]string) { f["bin/k3s"] = strings.Repeat("\x00", len(program)) }, true},
		{"a program that is missing", func(f map[string]string) { delete(f, "bin/k3s") }, true},
		{"an empty list", func(f map[string]string) { f["bin/.sha256sums"] = "" }, true},
		{"a list that is cut off", func(f map[string]string) { f["bin/.sha256sums"] = sums[:len(sums)-12] }, true},
		{"links that somebody changed", func(f map[string]string) { f["bin/.links"] = "containerd /bin/sh\n" }, false},
		{"a directory without anything", func(f map[string]string) { clear(f); f["x"] = "" }, true},
		{"programs of another kind", func(f map[string]string) { delete(f, "bin/.sha256sums"); delete(f, "bin/.links") }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := fmt.Sprintf("%s/data/%064x", p.DataDir, i)
			files := whole()
			tt.change(files)
			for file, content := range files {
				put(t, root, name+"/"+file, content)
			}
			if err := os.MkdirAll(filepath.Join(root, name, "bin"), 0o755); err == nil {
				for _, link := range []string{"containerd", "kubectl"} {
					if err := os.Symlink("k3s", filepath.Join(root, name, "bin", link)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if tt.name == "a directory without anything" {
				if err := os.RemoveAll(filepath.Join(root, name, "bin")); err != nil {
					t.Fatal(err)
				}
			}
			got, err := removeTorn(root, p)
			if err != nil || slices.Contains(got, name) != tt.torn {
				t.Errorf("removed %q, %v", got, err)
			}
			if _, err := os.Lstat(filepath.Join(root, name)); (err != nil) != tt.torn {
				t.Errorf("afterwards: %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(root, p.DataDir, "data", "*-tmp")); len(left) > 0 {
				t.Errorf("%q are left", left)
			}
		})
	}
	// What was found whole once, on the disk, is not read again.
	first := fmt.Sprintf("%s/data/%064x", p.DataDir, 0)
	put(t, root, first+"/bin/k3s", "changed later, which is nobody's loss of power")
	put(t, root, p.DataDir+"/data/cni/host-local", "")
	if got, err := removeTorn(root, p); err != nil || len(got) > 0 {
		t.Errorf("again: %q, %v", got, err)
	}
}
