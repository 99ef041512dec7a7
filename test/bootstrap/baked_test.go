package bootstrap_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	installed "github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/shims"
)

// baked is an agent as docs/bootstrap.md describes images that bring everything:
// the package's unit, enabled, and all files where they belong. Its user-data is
// a compressed MIME message that cloud-init has nothing to do with, and its pool
// a tag. hearthImage is the archive with our chart's image, config an agent's
// NodeConfig.
func (l *lab) baked(t *testing.T, name string, hearthImage []byte, config string) *machine.Machine {
	t.Helper()
	const pool = "  pool: wasm\n"
	if !strings.Contains(config, pool) {
		t.Fatalf("the configuration names no pool:\n%s", config)
	}
	config = strings.Replace(config, pool, "", 1)
	message := "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"parts\"\n\n" +
		"--parts\nContent-Type: text/cloud-config\n\n#cloud-config\npreserve_hostname: true\n\n" +
		"--parts\nContent-Type: " + nodeconfig.MediaType + "\n\n" + config + "\n--parts--\n"
	var compressed bytes.Buffer
	z := gzip.NewWriter(&compressed)
	if _, err := z.Write([]byte(message)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	m := l.add(name, compressed.String(), machine.Spec{Tags: map[string]string{"hearth.sh:pool": "wasm"}})
	unpackPackage(t, m)
	l.prepare(m) // the package has an example of the file with the endpoint
	if out, err := exec.CommandContext(t.Context(), "systemctl", "--root="+m.Path("/"), "enable", "hearth-bootstrap.service").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wasm, err := shims.Compile(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := cluster.GoBinary(t.Context(), "./cmd/nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{
		k3s.InstallPath: l.k3s.Binary, shimPath: wasm.Wasmtime, binDir + "/nodeagent": agent, k3s.ImagesDir + "/" + filepath.Base(l.k3s.Images): l.k3s.Images,
	} {
		content, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o755)
		if filepath.Dir(to) != binDir {
			mode = 0o644
		}
		if err := m.WriteFile(to, content, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.WriteFile(k3s.ImagesDir+"/hearth-image.tar", hearthImage, 0o644); err != nil {
		t.Fatal(err)
	}
	return m
}

// unpackPackage puts what the deb holds on the disk of a machine that is off.
func unpackPackage(t *testing.T, m *machine.Machine) {
	t.Helper()
	nfpm, err := filepath.Abs("../../bin/nfpm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(nfpm); err != nil {
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", nfpm, "github.com/goreleaser/nfpm/v2/cmd/nfpm")
		build.Dir, build.Env = "../../packaging/tools", append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build nfpm: %v\n%s", err, out)
		}
	}
	dir, out := t.TempDir(), t.TempDir()
	for _, name := range []string{"bootstrap", "nodeagent"} {
		binary, err := cluster.GoBinary(t.Context(), "./cmd/"+name)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		// Of a link, the package would hold the link.
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".8"), []byte(".TH "+name+" 8\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	deb := filepath.Join(out, "hearth.deb")
	pack := exec.CommandContext(t.Context(), nfpm, "package", "-f", "packaging/linux/nfpm.yaml", "-p", "deb", "-t", deb)
	pack.Dir, pack.Env = "../..", append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000", "VERSION=1.0.0", "GOARCH="+runtime.GOARCH, "BINARIES="+dir, "MANPAGES="+dir)
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "--extract", deb, m.Path("/")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// downloadedNothing looks at what a node that was baked fetched: the signed list,
// and nothing that is in it.
func (l *lab) downloadedNothing(t *testing.T, m *machine.Machine) {
	t.Helper()
	if out, err := m.Exec(t.Context(), "sh", "-c", "test ! -e "+binDir+"/bootstrap && systemctl show --value --property=FragmentPath hearth-bootstrap"); err != nil || !strings.HasSuffix(strings.TrimSpace(out), "/lib/systemd/system/hearth-bootstrap.service") {
		t.Errorf("the unit is %q: %v", out, err)
	}
	l.gate.mu.Lock()
	got := slices.Sorted(slices.Values(l.gate.files[m.IP]))
	l.gate.mu.Unlock()
	list := []string{fmt.Sprintf("/%s/artifacts.json", filesBucket), fmt.Sprintf("/%s/artifacts.json.sig", filesBucket)}
	if !slices.Equal(slices.Compact(got), list) {
		t.Errorf("it fetched %q", got)
	}
	config, err := os.ReadFile(m.Path(installed.HearthConfig))
	if err != nil || !strings.Contains(string(config), "hearth.sh/pool=wasm") {
		t.Errorf("the tag's pool is not in %s: %v", config, err)
	}
}
