package bootstrap

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

func TestALockThatWasRemovedWithItsDirectoryKeepsNobodyOut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); fault.CodeOf(err) != CodeBusy {
		t.Errorf("a second run: %v", err)
	}
	removeLock(dir)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the empty directory stays: %v", err)
	}
	next, err := lock(dir)
	if err != nil {
		t.Fatalf("after the reset: %v", err)
	}
	// Who still has the removed one does not take the new one away.
	release()
	if _, err := lock(dir); fault.CodeOf(err) != CodeBusy {
		t.Errorf("the new lock is not held: %v", err)
	}
	next()
}

func TestARunSweepsWhatOneThatLostPowerWasWriting(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".result.json5185765", ".election.json1", ".attempts.json1", "result.json", ".result.json.mine", ".other.json1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{".other.json1", ".result.json.mine", "lock", "result.json"}; !slices.Equal(names, want) {
		t.Errorf("there are %q, not %q", names, want)
	}
}

func TestAResetListsWhatAnotherNetworkLeft(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"etc/cni/net.d/10-calico.conflist", "var/lib/calico/nodename", "sys/class/net/cali123/mtu", "sys/class/net/cilium_host/mtu", "sys/class/net/eth0/mtu", "sys/class/net/cni0/mtu"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755), os.WriteFile(filepath.Join(root, name), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var paths []string
	for _, l := range networkLeft(root) {
		paths = append(paths, l.Path)
	}
	if want := []string{"/etc/cni/net.d/10-calico.conflist", "/sys/class/net/cali123", "/sys/class/net/cilium_host", "/var/lib/calico"}; !slices.Equal(paths, want) {
		t.Errorf("got %q, want %q", paths, want)
	}
	if left := networkLeft(t.TempDir()); len(left) > 0 {
		t.Errorf("of nothing is left %+v", left)
	}
}

func TestResetKeepsWhatSomebodyPutIntoTheStateDirectory(t *testing.T) {
	dir := t.TempDir()
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	removeLock(dir)
	if _, err := os.Stat(mine); err != nil {
		t.Error(err)
	}
}
