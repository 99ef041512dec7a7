package bootstrap_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/test/machine"
)

const (
	// cutWithin is the time after the first durable step of a run in which the
	// power goes: from the fetch to some seconds after the node is Ready.
	cutWithin = 30 * time.Second
	// lastCut is how long after success the power goes at the latest.
	lastCut = 4 * time.Second
	// resultPath is where a run says how far it is.
	resultPath = bootstrap.DefaultStateDir + "/result.json"
)

// TestPowerMayGoAtAnyInstant cuts the power of a machine again and again while
// it becomes a node, and once more while it is reset: a server that founds, or an
// agent, by turns in soaks and else as it happens. Whenever it goes, nothing is half-installed; when it is
// back, bootstrap's own unit goes on; and there is one cluster in the end.
//
// The first instants, until bootstrap's unit is installed, are left out:
// cloud-init writes what it needs without syncing it and does not get over that.
func TestPowerMayGoAtAnyInstant(t *testing.T) {
	t.Parallel()
	for series := range soaked(1, 8) {
		name, agent := fmt.Sprintf("power-%d", series+1), soaked(rand.N(2), series%2) == 1
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			t.Logf("the machine is an agent: %t", agent)
			l := newLab(t, name)
			m := l.add("cut", l.userData(map[bool]string{true: "wasm", false: "control-plane"}[agent], ""), machine.Spec{Disk: diskSize})
			server := m
			if agent {
				server = l.add("server", l.userData("control-plane", ""), machine.Spec{})
				l.boot(server)
				l.succeeded(server)
			}
			l.cutPowerAgainAndAgain(t, server, m, soaked(3, 5))
			l.cutPowerOfAReset(t, m)
		})
	}
}

// cutPowerAgainAndAgain cuts that of m, which is the only server or joins it.
func (l *lab) cutPowerAgainAndAgain(t *testing.T, server, m *machine.Machine, cuts int) {
	ctx := boundedBy(t, soaked(soon, 15*time.Minute))
	for cut := range cuts {
		l.bootAndRun(t, m)
		// Each cut in a part of the time of its own, so that few cuts see all of it.
		part := cutWithin / time.Duration(cuts)
		at := time.Duration(cut)*part + rand.N(part)
		deadline := time.Now().Add(at)
		for time.Now().Before(deadline) {
			if r := diskResult(t, m); r.Outcome == bootstrap.OutcomeSucceeded {
				deadline = time.Now().Add(min(time.Until(deadline), rand.N(lastCut)))
				time.Sleep(time.Until(deadline)) // the instant is what is tested
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		reached := diskResult(t, m)
		if err := m.CutPower(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("cut %d: the power went %s after the run began, in phase %q (%s)", cut+1, at.Round(10*time.Millisecond), reached.Phase, reached.Outcome)
		if err := m.CheckDisk(ctx); err != nil {
			t.Error(err)
		}
		l.nothingIsHalfInstalled(ctx, t, m)
		l.oneCluster(t)
		if t.Failed() {
			return
		}
	}
	began := time.Now()
	l.bootAndRun(t, m)
	r := l.succeeded(m)
	t.Logf("a node %s after its last boot: %s, generation %d; %q", time.Since(began).Round(time.Second), r.Node.Action, r.Node.Generation, r.Warnings)
	if outcomes := l.oneCluster(t); !slices.Contains(outcomes, "founded") {
		t.Errorf("nobody founded the cluster: %q", outcomes)
	}
	etcdMembers(t, server, 1)
	want := map[string]bool{server.InstanceID: true, m.InstanceID: true}
	if seen := nodes(t, client(t, server)); len(seen) != len(want) || !ready(seen[m.InstanceID]) {
		t.Errorf("the nodes are %v", seen)
	}
	if left := leftovers(t, m); len(left) > 0 {
		t.Errorf("unfinished files are left: %q", left)
	}
}

// cutPowerOfAReset cuts the power once a reset has begun to remove files, and
// resets again when it is back. In between, bootstrap's unit may have made the
// machine a node again, as it does at every boot for as long as it is there.
func (l *lab) cutPowerOfAReset(t *testing.T, m *machine.Machine) {
	t.Helper()
	ctx := boundedBy(t, soon)
	before := len(ledgerOf(t, m.Path(host.DefaultLedger)).Files)
	reset := m.Command(ctx, "bootstrap", "reset", "--yes")
	if err := reset.Start(); err != nil {
		t.Fatal(err)
	}
	gone := func() int { // programs and configuration, as far as they are gone
		n := 0
		for _, path := range []string{binDir + "/k3s", binDir + "/nodeagent", shimPath, "/etc/rancher/k3s/config.yaml.d", "/var/lib/rancher/k3s", "/var/lib/kubelet"} {
			if _, err := os.Lstat(m.Path(path)); err != nil {
				n++
			}
		}
		return n
	}
	for gone() == 0 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	at := gone()
	if err := m.CutPower(ctx); err != nil {
		t.Fatal(err)
	}
	_ = reset.Wait() // it went with the power
	t.Logf("the power went when %d of 6 places were empty; %d files had been recorded", at, before)
	if err := m.CheckDisk(ctx); err != nil {
		t.Error(err)
	}
	l.boot(m)
	if err := m.WaitBooted(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := m.Exec(ctx, "sh", "-c", "systemctl stop hearth-bootstrap 2>/dev/null; command -v bootstrap")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := m.Exec(ctx, "bootstrap", "reset", "--yes"); err != nil {
		t.Fatalf("the second reset: %v: %s", err, out)
	}
	for _, path := range []string{"/var/lib/rancher", "/etc/rancher", "/var/lib/kubelet", "/etc/systemd/system/k3s.service", "/etc/systemd/system/k3s-agent.service", binDir + "/k3s", binDir + "/nodeagent", shimPath, host.DefaultLedger} {
		if _, err := os.Lstat(m.Path(path)); err == nil {
			t.Errorf("after the second reset there is %s", path)
		}
	}
	for _, line := range running(t, m) {
		if kind, _, _ := strings.Cut(line, " "); kind == "process" || kind == "unit" {
			t.Errorf("after the second reset there is the %s", line)
		}
	}
}

// bootAndRun boots a machine and waits until bootstrap runs there. Until then the
// result is that of an earlier run, which may have succeeded.
func (l *lab) bootAndRun(t *testing.T, m *machine.Machine) {
	t.Helper()
	before := time.Now() // the machine's clock is this one
	l.boot(m)
	waitFor(t, m, "a run to begin", func(context.Context) (bool, error) { return diskResult(t, m).StartedAt.After(before), nil })
}

// diskResult is the result on the disk of a machine, in use or not.
func diskResult(t *testing.T, m *machine.Machine) bootstrap.Result {
	t.Helper()
	var r bootstrap.Result
	b, err := os.ReadFile(m.Path(resultPath))
	if errors.Is(err, fs.ErrNotExist) {
		return r
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%s is no result: %v: %q", resultPath, err, b)
	}
	return r
}

// oneCluster fails where two generations were founded.
func (l *lab) oneCluster(t *testing.T) []string {
	t.Helper()
	outcomes := l.outcomes(t)
	founded := 0
	for _, o := range outcomes {
		if o == "founded" {
			founded++
		}
	}
	if founded > 1 {
		t.Errorf("%d clusters were founded: %q", founded, outcomes)
	}
	return outcomes
}

// disk is a machine's disk after a loss of power, with its journal replayed.
type disk struct {
	root  string // of its file system
	image string // what the machine's / is an overlay of
}

// openDisk mounts a copy of the disk of a machine that is off, where nobody else
// sees it. The caller closes it.
func openDisk(ctx context.Context, t *testing.T, m *machine.Machine) (d disk, closeDisk func()) {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	if err := m.SaveDisk(ctx, image); err != nil {
		t.Fatal(err)
	}
	mount := filepath.Join(dir, "disk")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	// It ends with its input, also when this process is killed.
	holder := exec.Command("sh", "-c", `mount -o loop "$1" "$2" && echo mounted && exec cat >/dev/null`, "sh", image, mount)
	holder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	hold, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	closeDisk = func() {
		_ = hold.Close()
		_ = holder.Wait()    // it says nothing
		_ = os.Remove(image) // many of them would fill this machine's disk
	}
	if line != "mounted\n" {
		closeDisk()
		t.Fatalf("mounting a copy of the disk of %s failed", m.Name)
	}
	base, err := machine.Root(ctx, os.Stderr)
	if err != nil {
		closeDisk()
		t.Fatal(err)
	}
	return disk{root: filepath.Join(fmt.Sprintf("/proc/%d/root", holder.Process.Pid), mount), image: base}, closeDisk
}

// at is where a path of the machine is: its own or the image's.
func (d disk) at(path string) string {
	if strings.HasPrefix(path, "/var/") {
		return filepath.Join(d.root, path)
	}
	own := filepath.Join(d.root, "upper", path)
	if _, err := os.Lstat(own); err == nil {
		return own
	}
	return filepath.Join(d.image, path)
}

// digest of a file; "" where there is none.
func (d disk) digest(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(d.at(path))
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode()&fs.ModeCharDevice != 0 {
		return "" // a character device stands for what was removed
	}
	if err != nil {
		t.Fatal(err)
	}
	if !info.Mode().IsRegular() {
		return info.Mode().String()
	}
	sum, err := digest(d.at(path))
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// unfinished are names of files that are not what they will be called yet.
var unfinished = regexp.MustCompile(`^\..*\.?hearth-|^bootstrap\.new$|^\.[a-z-]+\.json[0-9]+$`)

// nothingIsHalfInstalled looks at a disk whose power was cut: every file under
// its own name is what was there before or what it is to be, and whole.
func (l *lab) nothingIsHalfInstalled(ctx context.Context, t *testing.T, m *machine.Machine) {
	t.Helper()
	d, closeDisk := openDisk(ctx, t, m)
	defer closeDisk()
	ledger := ledgerOf(t, d.at(host.DefaultLedger))
	whole := map[string]bool{l.sum: true}
	for _, e := range ledger.Files {
		whole[e.SHA256], whole[e.Previous] = true, true
		switch got := d.digest(t, e.Path); {
		case got == "", got == e.SHA256, got == e.Previous, got == e.BackupSHA256:
		default:
			t.Errorf("%s (%s) is neither absent, nor what was there before, nor whole: %s instead of %s", e.Path, e.Reason, got, e.SHA256)
		}
	}
	programs, err := os.ReadDir(filepath.Join(d.root, "upper", binDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, p := range programs {
		if !p.Type().IsRegular() || unfinished.MatchString(p.Name()) {
			continue
		}
		if sum := d.digest(t, filepath.Join(binDir, p.Name())); !whole[sum] {
			t.Errorf("%s/%s has the unknown digest %s", binDir, p.Name(), sum)
		}
	}
	t.Logf("%d files are recorded, %d programs are there", len(ledger.Files), len(programs))
}

// leftovers are unfinished files on a machine where everything is done.
func leftovers(t *testing.T, m *machine.Machine) []string {
	t.Helper()
	var found []string
	for _, root := range []string{"/etc", "/usr/local", "/var/lib/hearth", "/var/lib/rancher/k3s/agent/images", "/var/lib/rancher/k3s/server/manifests", "/var/lib/rancher/credentialprovider"} {
		err := filepath.WalkDir(m.Path(root), func(name string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() && unfinished.MatchString(e.Name()) {
				found = append(found, name)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}
