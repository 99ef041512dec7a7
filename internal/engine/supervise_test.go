package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

// counter gives the value of a metric with one label's value.
func (n *node) counter(name, label string) float64 {
	n.t.Helper()
	families, err := n.control.Metrics(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetValue() == label {
					return m.GetCounter().GetValue()
				}
			}
			if label == "" {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestSilentWorkerIsReplacedAndItsRequestsAreSentAgain(t *testing.T) {
	n := startNode(t, nil)
	n.deploy(n.function("c", "c", nil), n.function("other", "c", func(f *control.Function) { f.Tenant = "other" }))
	silent, other := n.worker("default").PID, n.worker("other").PID
	n.standStill(silent)
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			wantBody(t, n.send(n.request(t.Context(), http.MethodPost, "c.localhost", "/count", strings.NewReader("12345"))), 200, "5\n")
		})
	}
	n.awaitInFlight("c", 3)
	wantBody(t, n.get("other", "/"), 200, "hello from c\n") // meanwhile
	group.Wait()
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	if w := n.worker("default"); w.PID == silent || w.Restarts != 1 || !strings.HasPrefix(w.LastExit, "silent: ") {
		t.Errorf("worker %d was %d, %d restarts, last exit %q", w.PID, silent, w.Restarts, w.LastExit)
	}
	if w := n.worker("other"); w.PID != other {
		t.Errorf("the other tenant's worker ended: %q", w.LastExit)
	}
	if got := n.counter("hearth_worker_restarts_total", "silent"); got != 1 {
		t.Errorf("%v restarts for silence", got)
	}
	if got := n.counter("hearth_request_retries_total", ""); got != 3 {
		t.Errorf("%v requests sent again, want 3", got)
	}
	if !strings.Contains(n.logs.String(), "worker is silent") {
		t.Error("the log does not say so")
	}
}

func TestWorkerThatOutgrowsItsMemoryIsReplaced(t *testing.T) {
	n := startNode(t, func(o *Options) {
		o.WorkerMemoryBytes, o.WorkerOverheadBytes = 96<<20, 64<<20
	})
	const guests = 4
	n.deploy(n.function("deep", "c", func(f *control.Function) { f.TimeoutMS = 20_000 }),
		n.function("c", "c", nil),
		n.function("other", "c", func(f *control.Function) { f.Tenant = "other" }))
	big, other := n.worker("default").PID, n.worker("other").PID
	// Each keeps tens of MiB of stack, which no guest's limit counts.
	var group sync.WaitGroup
	for range guests {
		group.Go(func() {
			// They are innocent as far as anybody knows: sent once more, and
			// then their second worker is too big as well.
			if a := n.get("deep", "/deep"); a.StatusCode != 502 && a.StatusCode != 504 && a.StatusCode != 503 {
				t.Errorf("%d %s", a.StatusCode, a.body)
			}
		})
	}
	n.eventually("the worker is killed", func() bool { return n.counter("hearth_worker_restarts_total", "memory") > 0 })
	wantBody(t, n.get("other", "/"), 200, "hello from c\n")
	group.Wait()
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	if w := n.worker("default"); w.PID == big || !strings.HasPrefix(w.LastExit, "memory: ") {
		t.Errorf("worker %d was %d, last exit %q", w.PID, big, w.LastExit)
	}
	if w := n.worker("other"); w.PID != other || w.Restarts != 0 {
		t.Errorf("the other tenant's worker ended: %q", w.LastExit)
	}
	if !strings.Contains(n.logs.String(), "worker uses too much memory") {
		t.Error("the log does not say so")
	}
}

// engineOptions is what a test hands to an engine in a process of its own.
type engineOptions struct{ Dir, StoreDir string }

// engineMain is an engine that can be killed. Its listener is descriptor 3.
func engineMain() int {
	var o engineOptions
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return 2
	}
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return 2
	}
	err = Run(context.Background(), Options{
		Listener: l, ControlSocket: filepath.Join(o.Dir, "engine.sock"), LogDir: filepath.Join(o.Dir, "logs"),
		StoreDir: o.StoreDir, WorkerCommand: []string{sandbox.Executable()}, WorkerEnv: []string{childEnvironment + "=worker"},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// startEngineProcess is startNode with an engine in a process of its own.
func startEngineProcess(t *testing.T) (*node, *exec.Cmd) {
	t.Helper()
	guestObject(t, "c")
	dir, err := os.MkdirTemp("", "hearth-node-")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{
		t: t, dir: dir, address: listener.Addr().String(), logs: &syncBuffer{},
		control: control.NewClient(filepath.Join(dir, "engine.sock")),
		http:    &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}},
	}
	options, err := json.Marshal(engineOptions{Dir: dir, StoreDir: filepath.Join(guests.dir, "store", "objects")})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(sandbox.Executable())
	cmd.Env = append(os.Environ(), childEnvironment+"=engine")
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = bytes.NewReader(options), n.logs, []*os.File{file}
	cmd.WaitDelay = patience
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(file.Close(), listener.Close()); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		n.http.CloseIdleConnections()
		n.control.CloseIdle()
		_ = cmd.Process.Kill() // fails when the test did it
		_ = cmd.Wait()         // the same
		if t.Failed() {
			t.Logf("engine's log:\n%s", n.logs)
		}
		_ = os.RemoveAll(dir)
	})
	n.eventually("the control socket answers", func() bool {
		_, err := n.control.Status(t.Context(), 0, 0)
		return err == nil
	})
	return n, cmd
}

// processState is that of proc(5), 0 when there is no such process.
func processState(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) == 0 {
		return 0
	}
	return fields[0][0]
}

// alive says whether a process runs; one that nobody has reaped does not.
func alive(pid int) bool {
	s := processState(pid)
	return s != 0 && s != 'Z' && s != 'X'
}

// standStill stops a process and waits until all of it has stopped.
func (n *node) standStill(pid int) {
	n.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		n.t.Fatal(err)
	}
	n.eventually("the process has stopped", func() bool { return processState(pid) == 'T' })
}

// Whatever workers do at that moment: nothing, guests that spin, or not even
// being scheduled.
func TestNoWorkerOutlivesAnEngineThatIsKilled(t *testing.T) {
	n, engine := startEngineProcess(t)
	var functions []control.Function
	tenants := []string{"idle", "busy", "stopped"}
	for _, tenant := range tenants {
		functions = append(functions, n.function(tenant, "c", func(f *control.Function) { f.Tenant, f.TimeoutMS = tenant, longLimit }))
	}
	n.deploy(functions...)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			resp, err := n.http.Do(n.request(t.Context(), http.MethodGet, "busy.localhost", "/spin", nil))
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				t.Errorf("the engine lives: %d", resp.StatusCode)
			}
		})
	}
	n.awaitInFlight("busy", 8)
	var pids []int
	for _, tenant := range tenants {
		pids = append(pids, n.worker(tenant).PID)
	}
	n.standStill(n.worker("stopped").PID)
	if err := engine.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	for _, pid := range pids {
		n.eventually(fmt.Sprintf("worker %d ends", pid), func() bool { return !alive(pid) })
	}
}

// An engine that was frozen with its workers, as a container or a laptop is,
// must not take its own absence for theirs.
func TestWorkersOutliveAnEngineThatStoodStill(t *testing.T) {
	n, engine := startEngineProcess(t)
	n.deploy(n.function("c", "c", nil))
	pid := n.worker("default").PID
	goOn := func(pid int) {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	n.standStill(pid)
	time.Sleep(2 * watchInterval) // the engine has asked and waits for the answer
	n.standStill(engine.Process.Pid)
	time.Sleep(silenceLimit + ownDelayMost + time.Second)
	goOn(engine.Process.Pid)
	n.eventually("the engine notices that it stood still", func() bool { return strings.Contains(n.logs.String(), "engine stood still") })
	goOn(pid)
	wantBody(t, n.get("c", "/"), 200, "hello from c\n")
	if w := n.worker("default"); w.PID != pid || w.Restarts != 0 {
		t.Errorf("worker %d was %d: %s", w.PID, pid, w.LastExit)
	}
}
