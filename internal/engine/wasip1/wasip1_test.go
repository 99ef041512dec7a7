package wasip1

import (
	"bytes"
	"context"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
)

// What links with wazero's module links with this one.
func TestEveryFunctionOfTheSnapshotHasItsSignature(t *testing.T) {
	ctx := t.Context()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer r.Close(ctx)
	theirs, err := wasi_snapshot_preview1.NewBuilder(r).Compile(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := Instantiate(ctx, r, nil); err != nil {
		t.Fatal(err)
	}
	ours := r.Module(ModuleName).ExportedFunctionDefinitions()
	for name, want := range theirs.ExportedFunctions() {
		got := ours[name]
		if got == nil {
			t.Errorf("%s is missing", name)
			continue
		}
		if !slices.Equal(got.ParamTypes(), want.ParamTypes()) || !slices.Equal(got.ResultTypes(), want.ResultTypes()) {
			t.Errorf("%s: %v %v, want %v %v", name, got.ParamTypes(), got.ResultTypes(), want.ParamTypes(), want.ResultTypes())
		}
	}
	if len(ours) != len(theirs.ExportedFunctions()) {
		t.Errorf("%d functions, want %d", len(ours), len(theirs.ExportedFunctions()))
	}
}

// one page of memory, exported.
var oneMemory = []byte{0, 'a', 's', 'm', 1, 0, 0, 0, 5, 3, 1, 0, 1, 7, 7, 1, 3, 'm', 'e', 'm', 2, 0}

func call(t testing.TB, p *Process, mem api.Memory, name string, args ...uint64) (e errno, exit *sys.ExitError) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			exit = r.(*sys.ExitError)
		}
	}()
	for _, f := range functions {
		if f.name == name {
			stack := make([]uint64, max(len(args), 1))
			for i, a := range args {
				stack[i] = a | 0xdead_beef<<32 // as native code leaves it
				if f.params[i] == i64 {
					stack[i] = a
				}
			}
			f.goFunc()(WithProcess(t.Context(), p), memoryOnly{mem: mem}, stack)
			return errno(stack[0]), nil
		}
	}
	t.Fatalf("no function %s", name)
	return 0, nil
}

type memoryOnly struct {
	api.Module
	mem api.Memory
}

func (m memoryOnly) Memory() api.Memory { return m.mem }

func newMemory(t testing.TB) api.Memory {
	t.Helper()
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	t.Cleanup(func() { _ = r.Close(ctx) })
	m, err := r.Instantiate(ctx, oneMemory)
	if err != nil {
		t.Fatal(err)
	}
	return m.Memory()
}

func newProcess() (*Process, *bytes.Buffer) {
	var out bytes.Buffer
	return &Process{
		Args: []string{"/path", "x"}, Env: []string{"A=1"},
		Stdin: bytes.NewReader([]byte("input")), Stdout: &out, Stderr: io.Discard, Killed: make(chan struct{}),
	}, &out
}

func TestStringsAreGivenWithTheirSizes(t *testing.T) {
	mem := newMemory(t)
	p, _ := newProcess()
	if e, _ := call(t, p, mem, "args_sizes_get", 0, 4); e != success {
		t.Fatal(e)
	}
	if n, _ := mem.ReadUint32Le(0); n != 2 {
		t.Errorf("%d arguments", n)
	}
	if n, _ := mem.ReadUint32Le(4); n != uint32(len("/path")+len("x")+2) {
		t.Errorf("%d bytes", n)
	}
	if e, _ := call(t, p, mem, "args_get", 16, 64); e != success {
		t.Fatal(e)
	}
	if b, _ := mem.Read(64, 8); string(b) != "/path\x00x\x00" {
		t.Errorf("%q", b)
	}
	for _, at := range []uint64{65536, 65535, 1<<32 - 1} {
		if e, _ := call(t, p, mem, "args_get", 16, at); e != fault {
			t.Errorf("values at %d: %d", at, e)
		}
	}
}

func TestVectorsAreBounded(t *testing.T) {
	mem := newMemory(t)
	p, out := newProcess()
	mem.WriteString(1000, "hello ")
	mem.WriteString(2000, "world")
	for i, v := range []uint32{1000, 6, 0, 0, 2000, 5} {
		mem.WriteUint32Le(uint32(i*4), v)
	}
	if e, _ := call(t, p, mem, "fd_write", 1, 0, 3, 512); e != success || out.String() != "hello world" {
		t.Errorf("%d %q", e, out)
	}
	if n, _ := mem.ReadUint32Le(512); n != 11 {
		t.Errorf("%d written", n)
	}
	for name, test := range map[string]struct {
		args []uint64
		want errno
	}{
		"stdin":             {[]uint64{0, 0, 1, 512}, badf},
		"unknown":           {[]uint64{3, 0, 1, 512}, badf},
		"outside":           {[]uint64{1, 65532, 1, 512}, fault},
		"count wraps":       {[]uint64{1, 60000, 1 << 31, 512}, fault},
		"result is outside": {[]uint64{1, 0, 1, 65534}, fault},
	} {
		t.Run(name, func(t *testing.T) {
			if e, _ := call(t, p, mem, "fd_write", test.args...); e != test.want {
				t.Errorf("got %d, want %d", e, test.want)
			}
		})
	}
	if e, _ := call(t, p, mem, "fd_close", 1); e != success {
		t.Error(e)
	}
	if e, _ := call(t, p, mem, "fd_write", 1, 0, 1, 512); e != badf {
		t.Errorf("write after close: %d", e)
	}
}

func TestReadGivesWhatThereIs(t *testing.T) {
	mem := newMemory(t)
	p, _ := newProcess()
	for i, v := range []uint32{1000, 3, 2000, 100} {
		mem.WriteUint32Le(uint32(i*4), v)
	}
	if e, _ := call(t, p, mem, "fd_read", 0, 0, 2, 512); e != success {
		t.Fatal(e)
	}
	a, _ := mem.Read(1000, 3)
	b, _ := mem.Read(2000, 2)
	if n, _ := mem.ReadUint32Le(512); n != 5 || string(a)+string(b) != "input" {
		t.Errorf("%d %q %q", n, a, b)
	}
	if e, _ := call(t, p, mem, "fd_read", 0, 0, 2, 512); e != success {
		t.Errorf("at the end: %d", e)
	}
	if n, _ := mem.ReadUint32Le(512); n != 0 {
		t.Errorf("%d bytes after the end", n)
	}
}

func TestSleepEndsInTimeOrWithTheKill(t *testing.T) {
	mem := newMemory(t)
	put := func(timeout time.Duration) {
		mem.WriteUint64Le(0, 42)
		mem.WriteUint32Le(16, clockMonotonic)
		mem.WriteUint64Le(24, uint64(timeout))
	}
	synctest.Test(t, func(t *testing.T) {
		p, _ := newProcess()
		p.Killed = make(chan struct{})
		put(time.Hour)
		began := time.Now()
		if e, _ := call(t, p, mem, "poll_oneoff", 0, 1024, 1, 512); e != success || time.Since(began) != time.Hour {
			t.Errorf("%d after %v", e, time.Since(began))
		}
		if n, _ := mem.ReadUint32Le(512); n != 1 {
			t.Errorf("%d events", n)
		}
		if u, _ := mem.ReadUint64Le(1024); u != 42 {
			t.Errorf("event of %d", u)
		}
		killed := make(chan struct{})
		p.Killed = killed
		time.AfterFunc(time.Minute, func() { close(killed) })
		began = time.Now()
		_, exit := call(t, p, mem, "poll_oneoff", 0, 1024, 1, 512)
		if exit == nil || exit.ExitCode() != ExitKilled || time.Since(began) != time.Minute {
			t.Errorf("%v after %v", exit, time.Since(began))
		}
	})
	p, _ := newProcess()
	for _, count := range []uint64{0, maxSubscriptions + 1, 1 << 31} {
		if e, _ := call(t, p, mem, "poll_oneoff", 0, 0, count, 512); e != inval {
			t.Errorf("%d subscriptions: %d", count, e)
		}
	}
}

func TestKilledGuestGetsNoMoreAnswers(t *testing.T) {
	mem := newMemory(t)
	for _, f := range functions {
		p, _ := newProcess()
		killed := make(chan struct{})
		close(killed)
		p.Killed = killed
		if _, exit := call(t, p, mem, f.name, make([]uint64, len(f.params))...); exit == nil {
			t.Errorf("%s returned to a killed guest", f.name)
		}
	}
}

// No arguments make a host function fail in another way than by its errno.
func FuzzHostFunctions(f *testing.F) {
	mem := newMemory(f)
	f.Add(0, uint64(0), uint64(0), uint64(1), uint64(512), uint64(0))
	f.Add(20, uint64(1), uint64(65535), uint64(1<<32-1), uint64(4), uint64(9))
	f.Fuzz(func(t *testing.T, which int, a, b, c, d, e uint64) {
		fn := functions[uint(which)%uint(len(functions))]
		if fn.name == "poll_oneoff" {
			return // would sleep; its parsing is covered by tests
		}
		p, _ := newProcess()
		all := []uint64{a, b, c, d, e, a, b, c, d}
		call(t, p, mem, fn.name, all[:len(fn.params)]...)
	})
}
