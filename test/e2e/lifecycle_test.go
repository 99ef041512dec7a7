package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
	"github.com/hearth-sh/hearth/test/needs"
)

// stopBound is how long Ctrl-C may take: seconds, on a slow machine too.
const stopBound = 10 * time.Second

// sockets lists the unix sockets below a data directory.
func sockets(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type()&fs.ModeSocket != 0 {
			out = append(out, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// listed is the list of functions without the times of their phases, which
// tell of the last load and not only of the first.
func (d dev) listed() string {
	d.t.Helper()
	a := d.get("/v1/functions")
	var list v1alpha1.FunctionList
	if err := json.Unmarshal(a.Body, &list); err != nil {
		d.t.Fatalf("listing: %v: %s", err, a)
	}
	for i := range list.Items {
		list.Items[i].Phases = nil
	}
	out, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		d.t.Fatal(err)
	}
	return string(out)
}

func TestInterruptStopsCleanlyAndTheNextRunHasEverything(t *testing.T) {
	dir := t.TempDir()
	d := start(t, harness.Options{DataDir: dir})
	d.submit("kept-c", guests.Read(t, "hello-c"), "")
	d.submitWith("kept-echo", guests.Read(t, "echo"), harness.Settings{Env: map[string]string{"A": "kept"}, Secrets: map[string]string{"B": "kept too"}})
	d.submit("kept-revised", marked(t, "old"), "")
	d.submit("kept-revised", marked(t, "new"), "")
	d.submit("dropped", marked(t, "dropped"), "")
	if a := d.call(http.MethodDelete, "/v1/functions/dropped", nil, nil); a.Status != http.StatusNoContent {
		t.Fatalf("delete: %s", a)
	}
	for _, path := range sockets(t, dir) {
		if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s can be opened by others: %v", path, info.Mode())
		}
	}
	before := d.listed()

	// With a request under way, as it often is.
	d.submitWith("busy", guests.Read(t, "stream"), harness.Settings{})
	busy := make(chan error, 1)
	go func() {
		_, err := d.Do(context.WithoutCancel(t.Context()), http.MethodGet, d.PathURL("busy", "/?5"), nil, nil)
		busy <- err
	}()
	time.Sleep(100 * time.Millisecond) // let it reach the guest; nothing depends on it
	if took := d.stop(); took > stopBound {
		t.Errorf("stopping took %v", took)
	}
	<-busy
	if code := d.ExitCode(); code != 0 {
		t.Errorf("an orderly stop ended with exit code %d\n%s", code, tail(d.Output(), 4000))
	}
	if left := sockets(t, dir); len(left) > 0 {
		t.Errorf("sockets left: %v", left)
	}

	again := start(t, harness.Options{DataDir: dir, Listen: d.Address})
	again.answersSoon("kept-c", "Hello, world, from C!")
	again.answersSoon("kept-revised", "new")
	again.answersSoon("kept-echo", "A=kept\n")
	again.answersSoon("kept-echo", "B=kept too\n")
	again.problem(again.get("/v1/functions/dropped"), http.StatusNotFound)
	if a := again.call(http.MethodDelete, "/v1/functions/busy", nil, nil); a.Status != http.StatusNoContent {
		t.Fatalf("delete: %s", a)
	}
	eventually(t, func() error {
		if after := again.listed(); after != before {
			return fmt.Errorf("the list was\n%s\nand is\n%s", before, after)
		}
		return nil
	})
	again.ready(again.call(http.MethodPost, "/v1/functions/kept-revised/rollback", nil, nil))
	again.answers("kept-revised", "old")
	again.stop()
}

func TestTermIsAnOrderlyStopToo(t *testing.T) {
	d := start(t, harness.Options{})
	if err := syscall.Kill(d.PID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(settle):
		t.Fatal("it did not end on SIGTERM")
	}
	if code := d.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if left := d.Processes(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestEveryProcessMayBeKilledAtAnyTime(t *testing.T) {
	dir := t.TempDir()
	d := start(t, harness.Options{DataDir: dir})
	d.submit("survivor", marked(t, "alive"), "")
	d.submit("survivor-go", guests.Read(t, "hello-go"), "")

	for _, role := range []string{"worker", "engine", "run"} {
		t.Run(role, func(t *testing.T) {
			d := dev{d.Dev, t}
			old := d.PIDs(role)
			if len(old) == 0 {
				t.Fatalf("no process of role %s among %v", role, d.Processes())
			}
			for _, pid := range old {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			d.answersSoon("survivor", "alive")
			d.answersSoon("survivor-go", "Hello, world, from Go!")
			eventually(t, func() error {
				if len(d.PIDs(role)) == 0 || contains(d.PIDs(role), old) {
					return fmt.Errorf("no new %s", role)
				}
				return nil
			})
			if err := d.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
			// Not only what was there: the whole way works again.
			d.submit("after-"+role, marked(t, "after "+role), "")
			d.answers("after-"+role, "after "+role)
			if !d.Running() {
				t.Error("the parent ended")
			}
		})
	}

	t.Run("parent", func(t *testing.T) {
		d := dev{d.Dev, t}
		d.Kill()
		ctx, cancel := context.WithTimeout(t.Context(), stopBound)
		defer cancel()
		if err := d.WaitGone(ctx); err != nil {
			t.Errorf("children outlive a killed parent: %v", err)
		}
		d.KillAll()
		// The same address at once: sockets and locks left behind are no obstacle.
		again := start(t, harness.Options{DataDir: dir, Listen: d.Address})
		again.answersSoon("survivor", "alive")
		again.answersSoon("survivor-go", "Hello, world, from Go!")
		for _, role := range []string{"worker", "engine", "run"} {
			again.answersSoon("after-"+role, "after "+role)
		}
		again.stop()
	})
}

// corrupt flips one byte in the middle of every regular file below the
// store's objects and returns how many it changed.
func (d dev) corrupt() int {
	d.t.Helper()
	changed := 0
	err := filepath.WalkDir(filepath.Join(d.DataDir, "store", "objects"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil || len(content) == 0 {
			return err
		}
		content[len(content)/2] ^= 0x20
		changed++
		return os.WriteFile(path, content, 0o644)
	})
	if err != nil {
		d.t.Fatal(err)
	}
	if changed == 0 {
		d.t.Fatal("the store has no object to corrupt")
	}
	return changed
}

func TestCorruptedObjectsAreRecompiled(t *testing.T) {
	dir := t.TempDir()
	d := start(t, harness.Options{DataDir: dir})
	d.submit("damaged", marked(t, "sound"), "")
	d.submit("damaged-go", guests.Read(t, "hello-go"), "")

	t.Run("while running, then the worker dies", func(t *testing.T) {
		d := dev{d.Dev, t}
		d.corrupt()
		for _, pid := range d.PIDs("worker") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		d.answersSoon("damaged", "sound")
		d.answersSoon("damaged-go", "Hello, world, from Go!")
	})
	d.stop()
	d.corrupt()
	again := start(t, harness.Options{DataDir: dir})
	again.answersSoon("damaged", "sound")
	again.answersSoon("damaged-go", "Hello, world, from Go!")
	if a := again.get("/metrics"); !quarantined(a.Body) {
		t.Error("hearth_store_quarantined_total does not count the damage")
	}
	again.stop()
}

func quarantined(exposition []byte) bool {
	for line := range bytes.Lines(exposition) {
		value, found := bytes.CutPrefix(bytes.TrimSpace(line), []byte("hearth_store_quarantined_total"))
		if found && !bytes.HasSuffix(value, []byte(" 0")) {
			return true
		}
	}
	return false
}

func TestPortInUseIsSaidClearly(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = harness.Start(t.Context(), harness.Options{Binary: nodeagent, DataDir: t.TempDir(), Listen: l.Addr().String()})
	var failed *harness.StartError
	if !errors.As(err, &failed) {
		t.Fatalf("dev started on a port in use: %v", err)
	}
	if failed.ExitCode <= 0 {
		t.Errorf("exit code %d", failed.ExitCode)
	}
	for _, want := range []string{l.Addr().String(), "in use", "--listen"} {
		if !strings.Contains(failed.Output, want) {
			t.Errorf("the message does not say %q:\n%s", want, failed.Output)
		}
	}
}

func TestSecondDevOnOneDataDirectoryIsRefused(t *testing.T) {
	d := shared(t)
	d.submit("first-come", marked(t, "first"), "")
	_, err := harness.Start(t.Context(), harness.Options{Binary: nodeagent, DataDir: d.DataDir})
	// Start removed run/address of the first to wait for the second's.
	if werr := os.WriteFile(filepath.Join(d.DataDir, "run", "address"), []byte(d.Address+"\n"), 0o600); werr != nil {
		t.Error(werr)
	}
	var failed *harness.StartError
	if !errors.As(err, &failed) {
		t.Fatalf("a second dev started on the same data directory: %v", err)
	}
	if failed.ExitCode <= 0 {
		t.Errorf("exit code %d", failed.ExitCode)
	}
	for _, want := range []string{d.DataDir, "--data-dir"} {
		if !strings.Contains(failed.Output, want) {
			t.Errorf("the message does not say %q:\n%s", want, failed.Output)
		}
	}
	d.answers("first-come", "first")
	d.submit("first-come", marked(t, "still"), "")
	d.answers("first-come", "still")
}

func TestFullDiskIsSaidClearlyAndPasses(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=64m,mode=0755")
	d := start(t, harness.Options{DataDir: dir})
	d.submit("before-full", marked(t, "before"), "")

	ballast := filepath.Join(dir, "ballast")
	fill := func() {
		t.Helper()
		f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for block := make([]byte, 64<<10); ; {
			if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	fill()
	before := d.state()
	for i := range 3 {
		a := d.put("when-full", guests.Read(t, "hello-go"), "", nil)
		if a.Status != http.StatusInsufficientStorage && a.Status != http.StatusServiceUnavailable {
			t.Errorf("submit %d to a full disk: %s", i, a)
		}
		p := d.problem(a, a.Status)
		if !p.Retryable || !strings.Contains(strings.ToLower(p.Detail+p.Title), "disk") && !strings.Contains(strings.ToLower(p.Detail+p.Title), "space") {
			t.Errorf("the problem is not clear: %s", a)
		}
	}
	d.unchanged(before)
	d.answers("before-full", "before")

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		a, err := d.Submit(t.Context(), "when-full", guests.Read(t, "hello-go"), "", nil)
		if err != nil {
			return err
		}
		_, err = a.Function()
		return err
	})
	d.answersSoon("when-full", "Hello, world, from Go!")
	d.stop()
}

func TestTamperedArtifactIsNeverRun(t *testing.T) {
	dir := t.TempDir()
	d := start(t, harness.Options{DataDir: dir})
	const original, forged = "the original text", "the forged text!!"
	d.submit("tampered", marked(t, original), "")
	d.submit("honest", marked(t, "honest"), "")
	d.stop()

	// The registry's copy is changed and the node's is lost.
	changed := 0
	err := filepath.WalkDir(filepath.Join(dir, "registry"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(content, []byte(original)) {
			return err
		}
		changed++
		return os.WriteFile(path, bytes.ReplaceAll(content, []byte(original), []byte(forged)), 0o600)
	})
	if err != nil || changed == 0 {
		t.Fatalf("the registry holds no such blob: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "store")); err != nil {
		t.Fatal(err)
	}

	again := start(t, harness.Options{DataDir: dir})
	again.answersSoon("honest", "honest") // pulled and compiled anew
	eventually(t, func() error {
		r := again.cli("status", "-o", "json")
		if !strings.Contains(r.stdout, "digest") {
			return fmt.Errorf("status does not tell of the digest: %s", r.stdout)
		}
		return nil
	})
	a := again.get(again.PathURL("tampered", "/"))
	if a.Status != http.StatusServiceUnavailable || bytes.Contains(a.Body, []byte(forged)) {
		t.Errorf("a function whose artifact was changed: %s", a)
	}
	if r := again.cli("status"); r.code != exitDegraded {
		t.Errorf("status has exit code %d, want %d (degraded)\n%s", r.code, exitDegraded, r.stdout)
	}
	// Submitting the good bytes again repairs it.
	again.submit("tampered", marked(t, "good again"), "")
	again.answers("tampered", "good again")
	again.stop()
}
