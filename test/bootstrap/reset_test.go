package bootstrap_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/test/machine"
)

// files is what is on a machine's disk: kind, mode, owner and content by path.
type files map[string]string

// notCompared changes by itself on a running machine: logs, and what cloud-init
// and systemd note for themselves.
var notCompared = []string{"/dev", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/cloud", "/var/lib/systemd", "/var/log", "/var/tmp"}

// tree reads everything below root on the machine's disk, whatever is mounted
// over it.
func tree(t *testing.T, m *machine.Machine, root string) files {
	t.Helper()
	all := files{}
	base := m.Path("/")
	err := filepath.WalkDir(m.Path(root), func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it went while it was looked for
		}
		if err != nil {
			return err
		}
		path := "/" + strings.TrimPrefix(strings.TrimPrefix(name, base), "/")
		if slices.Contains(notCompared, path) {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := info.Mode().String()
		if owner, ok := info.Sys().(*syscall.Stat_t); ok {
			what += fmt.Sprintf(" %d:%d", owner.Uid, owner.Gid)
		}
		switch {
		case info.Mode().IsRegular():
			sum, err := digest(name)
			if err != nil {
				return err
			}
			what += " " + sum
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			what += " " + target
		}
		all[path] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func digest(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// compare names what differs.
func (before files) compare(t *testing.T, after files) {
	t.Helper()
	paths := slices.Collect(maps.Keys(before))
	paths = slices.AppendSeq(paths, maps.Keys(after))
	slices.Sort(paths)
	for _, path := range slices.Compact(paths) {
		was, is := before[path], after[path]
		switch {
		case was == is:
		case was == "":
			t.Errorf("%s was added: %s", path, is)
		case is == "":
			t.Errorf("%s is gone: %s", path, was)
		default:
			t.Errorf("%s was %s and is %s", path, was, is)
		}
	}
}

// running is what k3s brings to life on a machine beside its files, a line each.
func running(t *testing.T, m *machine.Machine) []string {
	t.Helper()
	// Chains that kube-proxy emptied count as well.
	script := `ps -eo args= | grep -E 'k3s|containerd|kubelet|kube-|etcd|flanneld' | grep -v grep | sed 's/^/process /'
awk '{ print $2, $3 }' /proc/self/mounts | grep -E 'rancher|kubelet|k3s|netns|cni' | sed 's/^/mount /'
for save in iptables-save ip6tables-save; do command -v $save >/dev/null && $save 2>/dev/null | grep -E '^(:|-A).*(KUBE|CNI|FLANNEL)' | sed "s/^/$save /"; done
command -v nft >/dev/null && nft list tables | grep -i -E 'kube|cni|flannel' | sed 's/^/nft /'
ip -o link | awk -F': ' '{ print "interface " $2 }'
ip -o route | sed 's/^/route /'
ip netns list 2>/dev/null | sed 's/^/netns /'
systemctl list-units --all --plain --no-legend 'k3s*' | sed 's/^/unit /'
systemctl list-unit-files --no-legend 'k3s*' | sed 's/^/unit file /'
true`
	out, err := m.Exec(t.Context(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	slices.Sort(lines)
	return lines
}

// plan is `bootstrap plan` by hand.
func (l *lab) plan(t *testing.T, m *machine.Machine) bootstrap.Plan {
	t.Helper()
	out, err := m.Command(t.Context(), "env", "AWS_ENDPOINT_URL="+l.aws, program, "plan", "-o", "json").Output()
	if err != nil {
		t.Fatalf("plan: %v: %s", err, out)
	}
	var p bootstrap.Plan
	if err := json.Unmarshal(out, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPlanTouchesNothingAndResetLeavesNothing looks at every file of a machine
// before and after: a plan, a run, a plan again, and a reset.
func TestPlanTouchesNothingAndResetLeavesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t, "reset")
	ctx := boundedBy(t, soon)
	m := l.bare("server", machine.Spec{})
	if err := m.WaitBooted(ctx); err != nil {
		t.Fatal(err)
	}
	_, config, _ := strings.Cut(l.userData("control-plane", ""), "content: |\n")
	config, _, _ = strings.Cut(config, "bootcmd:")
	for path, content := range map[string]string{
		"/etc/hearth/node.yaml": strings.ReplaceAll(strings.TrimPrefix(config, "    "), "\n    ", "\n"),
		// Somebody's own, which a reset must neither remove nor change.
		"/etc/rancher/k3s/owner.txt": "mine\n", "/usr/local/bin/tool": "#!/bin/sh\n", "/etc/sysctl.d/10-owner.conf": "# mine\n",
		"/etc/rancher/k3s/registries.yaml": "# what was there before\n",
	} {
		if err := m.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before, life := tree(t, m, "/"), running(t, m)

	p := l.plan(t, m)
	before.compare(t, tree(t, m, "/"))
	if !p.Changes || p.Node.Name != m.InstanceID {
		t.Errorf("a fresh machine's plan is %+v", p.Node)
	}
	planned := map[string]bool{}
	for _, d := range p.Downloads {
		planned[d.Path] = true
		if d.State != artifact.StateMissing || d.Bytes <= 0 || len(d.URLs) == 0 {
			t.Errorf("the plan's download %+v", d)
		}
	}
	for _, f := range p.Files {
		planned[f.Path] = true
	}
	if len(p.Units) != 2 || p.Units[0].Name != "k3s.service" {
		t.Errorf("the plan's units are %+v", p.Units)
	}

	began := time.Now()
	if _, err := m.Exec(ctx, "env", "AWS_ENDPOINT_URL="+l.aws, program, "run"); err != nil {
		t.Fatalf("run: %v", err)
	}
	t.Logf("the run took %s", time.Since(began).Round(100*time.Millisecond))
	ledger := ledgerOf(t, m.Path(host.DefaultLedger))
	for _, e := range ledger.Files {
		if !planned[e.Path] {
			t.Errorf("%s was installed (%s) and not in the plan", e.Path, e.Reason)
		}
	}
	if p = l.plan(t, m); p.Changes {
		document, _ := json.MarshalIndent(p, "", " ")
		t.Errorf("a plan after the run would change something: %s", document)
	}
	if grown := running(t, m); len(grown) < len(life)+5 {
		t.Errorf("k3s does not show: %q", grown)
	}

	began = time.Now()
	if out, err := m.Exec(ctx, program, "reset", "--yes"); err != nil {
		t.Fatalf("reset: %v: %s", err, out)
	}
	t.Logf("the reset took %s", time.Since(began).Round(100*time.Millisecond))
	before.compare(t, tree(t, m, "/"))
	if after := running(t, m); !slices.Equal(after, life) {
		t.Errorf("alive before:\n%s\nand after the reset:\n%s", strings.Join(life, "\n"), strings.Join(after, "\n"))
	}
	if out, err := m.Exec(ctx, program, "reset", "--yes"); err != nil {
		t.Errorf("a second reset: %v: %s", err, out)
	}
	before.compare(t, tree(t, m, "/"))
}

// ledgerOf reads the record of what was installed; it is empty where none is.
func ledgerOf(t *testing.T, path string) host.Ledger {
	t.Helper()
	var ledger host.Ledger
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ledger
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &ledger); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return ledger
}
