package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/test/process"
	"github.com/hearth-sh/hearth/test/slot"
)

// testSlot is not taken by clusters unless fifteen others run.
const testSlot = maxSlots - 1

// reserve skips where a cluster cannot run and keeps others out of testSlot.
func reserve(t *testing.T) {
	t.Helper()
	if err := Check(); err != nil {
		t.Skip(err) // TestMain fails before this where CI is set
	}
	if err := os.MkdirAll(base, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	lock, err := slot.Lock(ctx, filepath.Join(base, fmt.Sprintf("%d.lock", testSlot)))
	if err != nil {
		t.Fatalf("slot %d is in use: %v", testSlot, err)
	}
	t.Cleanup(func() {
		if err := clean(context.Background(), testSlot); err != nil {
			t.Error(err)
		}
		lock.Close()
	})
}

func TestCgroupsHoldAndEndProcesses(t *testing.T) {
	reserve(t)
	groups, err := process.FindCgroups(slotName(testSlot))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // making one that exists is no error
		if err := groups.Below("node-x", "daemons").Create(); err != nil {
			t.Fatal(err)
		}
	}
	launch := filepath.Join(t.TempDir(), "enter")
	if err := launcher(launch, groups.Below("node-x", "daemons")); err != nil {
		t.Fatal(err)
	}
	d := &daemon{name: "sleep", log: filepath.Join(t.TempDir(), "log"), argv: []string{launch, "sh", "-c", "sleep 1000 & sleep 1000"}}
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for len(groups.Processes()) < 3 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if got := groups.Processes(); len(got) != 3 || !slices.Contains(got, d.pid()) {
		t.Errorf("the cgroups hold processes %v, want three, %d among them", got, d.pid())
	}
	if err := groups.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-d.done
	if err := d.exited(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a killed daemon is reported as: %v", err)
	}
	if left := groups.Existing(); len(left) > 0 {
		t.Errorf("cgroups are left: %v", left)
	}
}

func TestNodesAreJoinedByANetwork(t *testing.T) {
	reserve(t)
	ctx := t.Context()
	if err := makeNetwork(ctx, testSlot, []string{"x", "y"}); err != nil {
		t.Fatal(err)
	}
	// Nobody listens on port 9: to be refused is to have reached the address.
	reach := func(from string, to string) {
		t.Helper()
		dial := func() error {
			conn, err := net.DialTimeout("tcp4", net.JoinHostPort(to, "9"), 5*time.Second)
			if err == nil {
				conn.Close()
			}
			if errors.Is(err, unix.ECONNREFUSED) {
				return nil
			}
			return err
		}
		run := dial
		if from != "" {
			run = func() error { return process.InNetNS(netnsPath(nodeNS(testSlot, from)), dial) }
		}
		if err := run(); err != nil {
			t.Errorf("from %q to %s: %v", from, to, err)
		}
	}
	reach("", nodeIP(testSlot, 0))
	reach("x", nodeIP(testSlot, 1))
	reach("y", hostIP(testSlot))
	if err := removeNetwork(ctx, testSlot); err != nil {
		t.Fatal(err)
	}
	if left, err := networkNamespaces(ctx, testSlot); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := removeNetwork(ctx, testSlot); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
}

func TestShimNames(t *testing.T) {
	for runtimeType, want := range map[string]string{
		"io.containerd.spin.v2":     "containerd-shim-spin-v2",
		"io.containerd.wasmtime.v1": "containerd-shim-wasmtime-v1",
		"spin":                      "",
	} {
		if got, err := shimName(runtimeType); got != want || (err != nil) != (want == "") {
			t.Errorf("%s: %q, %v", runtimeType, got, err)
		}
	}
}

func TestVersionsComeFromTheToolsModules(t *testing.T) {
	root, err := repository()
	if err != nil {
		t.Fatal(err)
	}
	for module, want := range map[string]string{
		"kubernetes": "k8s.io/component-base/version.gitVersion=v1.",
		"containerd": "containerd/v2/version.Version=v2.",
	} {
		flags, err := versionFlags(filepath.Join(root, "test/tools", module, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(flags, want) {
			t.Errorf("%q is missing in the flags of %s: %q", want, module, flags)
		}
	}
}

func TestADaemonIsRespawnedUntilItIsStopped(t *testing.T) {
	dir := t.TempDir()
	runs := filepath.Join(dir, "runs")
	d := &daemon{name: "flaky", log: filepath.Join(dir, "log"), respawn: true, argv: []string{"sh", "-c", "echo run >>" + process.Quote(runs) + "; [ $(wc -l <" + process.Quote(runs) + ") -ge 2 ] && exec sleep 1000; exit 7"}}
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		content, _ := os.ReadFile(runs)
		if strings.Count(string(content), "run") == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it was not started again: %q", content)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := d.exited(); err != nil {
		t.Errorf("it runs: %v", err)
	}
	for range 2 {
		if err := d.stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.exited(); err != nil {
		t.Errorf("stopped on purpose is no failure: %v", err)
	}
	if d.running() {
		t.Error("it still runs")
	}
}

func TestADaemonThatEndsIsReportedWithItsLog(t *testing.T) {
	d := &daemon{name: "broken", log: filepath.Join(t.TempDir(), "log"), argv: []string{"sh", "-c", "echo the reason; exit 7"}}
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	<-d.done
	if err := d.exited(); err == nil || !strings.Contains(err.Error(), "the reason") || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("got %v", err)
	}
}
