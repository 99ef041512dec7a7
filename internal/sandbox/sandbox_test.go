package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/hearth-sh/hearth/test/needs"
	"github.com/tetratelabs/wazero"
	"go.uber.org/goleak"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// childEnvironment makes the test binary run one of the children below
// instead of tests: what is tested cannot be undone in a process.
const childEnvironment = "HEARTH_SANDBOX_TEST_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnvironment); name != "" {
		os.Exit(children[name](os.Args[1:]))
	}
	goleak.VerifyTestMain(m)
}

var children map[string]func(args []string) int

func init() {
	children = map[string]func([]string) int{
		"attempt":  attemptChild,
		"compiler": compilerChild,
		"server":   serverChild,
		"lifeline": lifelineChild,
		"files":    filesChild,
		"require":  requireChild,
	}
}

// waitForChild bounds every child here; loaded machines and emulation are slow.
const waitForChild = 2 * time.Minute

func child(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitForChild)
	t.Cleanup(cancel)
	argv := append(emulator(), os.Args[0])
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:], args...)...)
	// The race detector otherwise waits a second before every exit.
	cmd.Env = append(os.Environ(), childEnvironment+"="+name, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// emulator is the command in front of a child of this architecture, when
// these tests run under user-mode emulation that is not registered with the
// kernel: HEARTH_EXEC_WRAPPER, or else what is found by trying.
var emulator = sync.OnceValue(func() []string {
	if wrapper := strings.Fields(os.Getenv("HEARTH_EXEC_WRAPPER")); len(wrapper) > 0 {
		return wrapper
	}
	if err := exec.Command(os.Args[0], "-test.run=^$").Run(); errors.Is(err, unix.ENOEXEC) {
		if path, err := exec.LookPath("qemu-aarch64-static"); err == nil {
			return []string{path}
		}
	}
	return nil
})

// needKernel skips a test about a layer that this kernel (or emulator) lacks. In
// CI only an emulator may lack one.
func needKernel(t *testing.T, seccomp, landlock bool) {
	t.Helper()
	lacks := func(format string, err error) {
		t.Helper()
		if len(emulator()) > 0 {
			t.Skipf(format, err)
		}
		needs.Missing(t, format, err)
	}
	if _, err := landlockABI(); landlock && err != nil {
		lacks("this kernel has no Landlock: %v", err)
	}
	// An unknown operation is EINVAL where seccomp exists, and an available
	// action returns 0.
	action := uint32(retKill)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if seccomp && errno != 0 {
		lacks("this kernel has no seccomp filters: %v", errno)
	}
}

func fail(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	return 1
}

func rawCall(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

// cString is a NUL-terminated path for raw calls.
func cString(s string) uintptr {
	p, _ := unix.BytePtrFromString(s)
	return uintptr(unsafe.Pointer(p))
}

// attempts are what must fail inside. A nil want means the process is killed
// by the attempt.
var attempts = []struct {
	name   string
	policy Policy
	try    func() error
	want   []error
}{
	{name: "execve", try: func() error { return unix.Exec("/bin/true", []string{"true"}, nil) }},
	{name: "execveat", try: func() error { return rawCall(unix.SYS_EXECVEAT, 0, cString("")) }},
	{name: "start a process", try: func() error { return exec.Command("/proc/self/exe").Run() }, want: []error{unix.EPERM}},
	{name: "fork", try: func() error { return rawCall(unix.SYS_CLONE, uintptr(unix.SIGCHLD)) }, want: []error{unix.EPERM}},
	{name: "clone3", try: func() error { return rawCall(unix.SYS_CLONE3, 0, 0) }, want: []error{unix.ENOSYS}},
	{name: "thread in a new network namespace", try: func() error {
		return rawCall(unix.SYS_CLONE, unix.CLONE_VM|unix.CLONE_SIGHAND|unix.CLONE_THREAD|unix.CLONE_NEWNET)
	}, want: []error{unix.EPERM}},
	{name: "ptrace", try: func() error { return unix.PtraceAttach(os.Getppid()) }},
	{name: "process_vm_readv", try: func() error { return rawCall(unix.SYS_PROCESS_VM_READV, uintptr(os.Getppid())) }},
	{name: "process_vm_writev", try: func() error { return rawCall(unix.SYS_PROCESS_VM_WRITEV, uintptr(os.Getppid())) }},
	{name: "bpf", try: func() error { return rawCall(unix.SYS_BPF) }},
	{name: "load a kernel module", try: func() error { return rawCall(unix.SYS_FINIT_MODULE) }},
	{name: "reboot", try: func() error { return rawCall(unix.SYS_REBOOT) }},
	{name: "keyctl", try: func() error { return rawCall(unix.SYS_KEYCTL) }},
	{name: "open_by_handle_at", try: func() error { return rawCall(unix.SYS_OPEN_BY_HANDLE_AT) }},
	{name: "kill the parent", try: func() error { return unix.Kill(os.Getppid(), 0) }, want: []error{unix.EPERM}},
	{name: "kill everybody", try: func() error { return unix.Kill(-1, 0) }, want: []error{unix.EPERM}},
	{name: "kill the process group", try: func() error { return unix.Kill(0, 0) }, want: []error{unix.EPERM}},
	{name: "tgkill a thread of the parent", try: func() error { return unix.Tgkill(os.Getppid(), os.Getppid(), 0) }, want: []error{unix.EPERM}},
	{name: "tkill", try: func() error { return rawCall(unix.SYS_TKILL, uintptr(os.Getppid())) }, want: []error{unix.EPERM}},
	{name: "signal through a pidfd", try: func() error { _, err := unix.PidfdOpen(os.Getppid(), 0); return err }, want: []error{unix.EPERM}},
	{name: "signal through F_SETOWN", try: func() error { _, err := unix.FcntlInt(0, unix.F_SETOWN, os.Getppid()); return err }, want: []error{unix.EPERM}},
	{name: "limits of the parent", try: func() error {
		return rawCall(unix.SYS_PRLIMIT64, uintptr(os.Getppid()), unix.RLIMIT_NOFILE)
	}, want: []error{unix.EPERM}},
	{name: "TCP socket", try: func() error { _, err := net.Dial("tcp", "127.0.0.1:1"); return err }, want: []error{unix.EPERM}},
	{name: "UDP socket", try: func() error { _, err := net.Dial("udp", "127.0.0.1:1"); return err }, want: []error{unix.EPERM}},
	{name: "unix socket", try: func() error { _, err := net.Dial("unix", "@nobody"); return err }, want: []error{unix.EPERM}},
	{name: "listen", try: func() error { _, err := net.Listen("tcp", "127.0.0.1:0"); return err }, want: []error{unix.EPERM}},
	{name: "socketpair", try: func() error { _, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err }, want: []error{unix.EPERM}},
	{name: "accept without leave", try: func() error { _, _, err := unix.Accept(0); return err }, want: []error{unix.EPERM}},
	{name: "sendto with an address", try: func() error {
		return unix.Sendto(0, nil, 0, &unix.SockaddrUnix{Name: "/x"})
	}, want: []error{unix.EPERM}},
	{name: "io_uring", try: func() error { return rawCall(unix.SYS_IO_URING_SETUP, 1) }, want: []error{unix.EPERM}},
	{name: "userfaultfd", try: func() error { return rawCall(unix.SYS_USERFAULTFD) }, want: []error{unix.EPERM}},
	{name: "perf_event_open", try: func() error { return rawCall(unix.SYS_PERF_EVENT_OPEN) }, want: []error{unix.EPERM}},
	{name: "memfd", try: func() error { _, err := unix.MemfdCreate("x", 0); return err }, want: []error{unix.EPERM}},
	{name: "unshare", try: func() error { return unix.Unshare(unix.CLONE_NEWUSER) }, want: []error{unix.EPERM}},
	{name: "setns", try: func() error { return unix.Setns(0, 0) }, want: []error{unix.EPERM}},
	{name: "mount", try: func() error { return unix.Mount("none", "/", "tmpfs", 0, "") }, want: []error{unix.EPERM}},
	{name: "new mount interface", try: func() error { _, err := unix.Fsopen("tmpfs", 0); return err }, want: []error{unix.EPERM}},
	{name: "chroot", try: func() error { return unix.Chroot("/") }, want: []error{unix.EPERM}},
	{name: "personality", try: func() error { return rawCall(unix.SYS_PERSONALITY, 0xffffffff) }, want: []error{unix.EPERM}},
	{name: "another seccomp filter", try: func() error { return rawCall(unix.SYS_SECCOMP, 1) }, want: []error{unix.EPERM}},
	{name: "become dumpable", try: func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }, want: []error{unix.EPERM}},
	{name: "become root", try: func() error { return rawCall(unix.SYS_SETUID, 0) }, want: []error{unix.EPERM}},
	{name: "change a mode", try: func() error { return os.Chmod("/tmp", 0o777) }, want: []error{unix.EPERM}},
	{name: "terminal input", try: func() error { return unix.IoctlSetInt(0, unix.TIOCSTI, 0) }, want: []error{unix.EPERM}},
	{name: "a call of the future", try: func() error { return rawCall(4000) }, want: []error{unix.ENOSYS}},
	{name: "executable mapping", try: func() error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	}, want: []error{unix.EPERM}},
	{name: "memory made executable", try: func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return nil
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	}, want: []error{unix.EPERM}},
	{name: "open without paths", try: func() error { _, err := os.Open("/etc/passwd"); return err }, want: []error{unix.EPERM}},
	{name: "open2 without paths", try: func() error { _, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{}); return err }, want: []error{unix.ENOSYS}},
	{name: "read elsewhere", policy: Policy{ReadOnly: []string{"/usr"}}, try: func() error { _, err := os.Open("/etc/passwd"); return err }, want: []error{unix.EACCES}},
	{name: "write where only reading is allowed", policy: Policy{ReadOnly: []string{"/tmp"}}, try: func() error {
		_, err := os.Create("/tmp/hearth-sandbox-test")
		return err
	}, want: []error{unix.EPERM}},
	{name: "remove where only reading is allowed", policy: Policy{ReadOnly: []string{"/tmp"}}, try: func() error {
		return os.Remove("/tmp/hearth-sandbox-test")
	}, want: []error{unix.EPERM}},
	{name: "write elsewhere", policy: Policy{ReadWrite: []string{"/tmp"}}, try: func() error {
		_, err := os.Create("/var/hearth-sandbox-test")
		return err
	}, want: []error{unix.EACCES}},
	{name: "open another process's memory", policy: Policy{ReadOnly: []string{"/usr"}}, try: func() error {
		_, err := os.Open(fmt.Sprintf("/proc/%d/mem", os.Getppid()))
		return err
	}, want: []error{unix.EACCES}},
	{name: "raise a limit", policy: Policy{MaxOpenFiles: 64}, try: func() error {
		return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 128, Max: 128})
	}, want: []error{unix.EPERM}},
	{name: "exceed open files", policy: Policy{MaxOpenFiles: 64}, try: func() error {
		for {
			if _, err := unix.Dup(0); err != nil {
				return err
			}
		}
	}, want: []error{unix.EMFILE}},
}

// attemptChild runs one attempt on a thread that existed before Enter, and
// prints the error's number.
func attemptChild(args []string) int {
	for _, a := range attempts {
		if a.name != args[0] {
			continue
		}
		// The thread proves that the filter reaches those there already.
		start, result := make(chan struct{}), make(chan error)
		go func() {
			runtime.LockOSThread()
			<-start
			result <- a.try()
		}()
		if _, err := Enter(a.policy); err != nil {
			return fail("enter: %v", err)
		}
		close(start)
		err := <-result
		var errno syscall.Errno
		if err != nil && !errors.As(err, &errno) {
			return fail("%v", err)
		}
		_ = json.NewEncoder(os.Stdout).Encode(uint(errno))
		return 0
	}
	return fail("no attempt %q", args[0])
}

func TestForbiddenThingsFailInside(t *testing.T) {
	needKernel(t, true, true)
	for _, a := range attempts {
		t.Run(a.name, func(t *testing.T) {
			if a.name == "raise a limit" && os.Geteuid() == 0 {
				t.Skip("root may raise limits; children of root run as nobody")
			}
			cmd := child(t, "attempt", a.name)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if len(a.want) == 0 {
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS {
					t.Fatalf("process was not killed with SIGSYS: %v, printed %q, %s", err, out, stderr.String())
				}
				if exit.Sys().(syscall.WaitStatus).CoreDump() {
					t.Error("process left a core file")
				}
				return
			}
			if err != nil {
				t.Fatalf("child: %v: %s", err, stderr.String())
			}
			var errno uint
			if err := json.Unmarshal(out, &errno); err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(a.want, error(syscall.Errno(errno))) {
				t.Fatalf("got %v, want %v", syscall.Errno(errno), a.want)
			}
		})
	}
}

// squareModule exports square: (i32) -> i32.
var squareModule = []byte{
	0, 'a', 's', 'm', 1, 0, 0, 0,
	1, 6, 1, 0x60, 1, 0x7f, 1, 0x7f,
	3, 2, 1, 0,
	7, 10, 1, 6, 's', 'q', 'u', 'a', 'r', 'e', 0, 0,
	10, 9, 1, 7, 0, 0x20, 0, 0x20, 0, 0x6c, 0x0b,
}

func compilerChild([]string) int {
	a, err := Enter(Policy{AllowExecMemory: true, MaxOpenFiles: 256})
	if err != nil {
		return fail("enter: %v", err)
	}
	_ = json.NewEncoder(os.Stdout).Encode(a)
	ctx := context.Background()
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigCompiler())
	defer r.Close(ctx)
	m, err := r.Instantiate(ctx, squareModule)
	if err != nil {
		return fail("instantiate: %v", err)
	}
	results, err := m.ExportedFunction("square").Call(ctx, 12)
	if err != nil || results[0] != 144 {
		return fail("square(12) = %v, %v", results, err)
	}
	// Threads start, are preempted by signals, and garbage is collected.
	done := make(chan [][]byte)
	for range 8 {
		go func() {
			runtime.LockOSThread()
			var keep [][]byte
			for i := range 200 {
				keep = append(keep, make([]byte, 1<<14))
				if i%50 == 0 {
					runtime.GC()
				}
			}
			done <- keep
		}()
	}
	for range 8 {
		<-done
	}
	if _, err := io.WriteString(io.Discard, time.Now().Add(time.Millisecond).String()); err != nil {
		return fail("clock: %v", err)
	}
	<-time.After(time.Millisecond)
	return 0
}

func TestCompilerThreadsAndCollectorWorkInside(t *testing.T) {
	cmd := child(t, "compiler")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	t.Logf("applied: %s", out)
}

func serverChild([]string) int {
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return fail("listener: %v", err)
	}
	a, err := Enter(Policy{ReadOnly: []string{"/proc/self/fd/4"}, AcceptConnections: true})
	if err != nil {
		return fail("enter: %v", err)
	}
	if a.Seccomp {
		if _, err := net.Dial("unix", listener.Addr().String()); !errors.Is(err, unix.EPERM) {
			return fail("dialled: %v", err)
		}
	}
	root := os.NewFile(4, "/proc/self/fd/4").Name()
	mux := http.NewServeMux()
	// ServeFile uses sendfile, the echo splice or copies.
	mux.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, filepath.Join(root, "file")) })
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	server := &http.Server{Handler: mux, ReadTimeout: time.Minute, WriteTimeout: time.Minute}
	mux.HandleFunc("POST /quit", func(http.ResponseWriter, *http.Request) { go func() { _ = server.Shutdown(context.Background()) }() })
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fail("serve: %v", err)
	}
	return 0
}

func TestServingOnAnInheritedListenerWorksInside(t *testing.T) {
	dir := t.TempDir()
	content := bytes.Repeat([]byte("hearth "), 1<<16)
	if err := os.WriteFile(filepath.Join(dir, "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	file, err := listener.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	directory, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer directory.Close()
	cmd := child(t, "server")
	cmd.ExtraFiles = []*os.File{file, directory}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) },
	}}
	defer client.CloseIdleConnections()
	for _, request := range []struct{ method, path string }{{"GET", "/file"}, {"POST", "/echo"}, {"POST", "/echo"}} {
		r, _ := http.NewRequest(request.method, "http://x"+request.path, bytes.NewReader(content))
		answer, err := client.Do(r)
		if err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		got, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%s: %d bytes, %v", request.path, len(got), err)
		}
	}
	if answer, err := client.Post("http://x/quit", "", nil); err == nil {
		answer.Body.Close()
	}
	client.CloseIdleConnections()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
}

func filesChild(args []string) int {
	if _, err := Enter(Policy{ReadOnly: []string{args[0]}, ReadWrite: []string{args[1]}, MaxFileSizeBytes: 1 << 16}); err != nil {
		return fail("enter: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(args[0], "in")); err != nil || string(b) != "in" {
		return fail("read: %q, %v", b, err)
	}
	temp, err := os.CreateTemp(args[1], "*")
	if err != nil {
		return fail("create: %v", err)
	}
	if _, err := temp.WriteString("out"); err != nil {
		return fail("write: %v", err)
	}
	if err := errors.Join(temp.Sync(), temp.Close(), os.Rename(temp.Name(), filepath.Join(args[1], "out"))); err != nil {
		return fail("publish: %v", err)
	}
	if err := os.WriteFile(filepath.Join(args[1], "big"), make([]byte, 1<<17), 0o600); !errors.Is(err, unix.EFBIG) {
		return fail("file over the limit: %v", err)
	}
	return 0
}

func TestPathsOfThePolicyStayUsable(t *testing.T) {
	in, out := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(in, "in"), []byte("in"), 0o644); err != nil {
		t.Fatal(err)
	}
	if output, err := child(t, "files", in, out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	if b, err := os.ReadFile(filepath.Join(out, "out")); err != nil || string(b) != "out" {
		t.Fatalf("%q, %v", b, err)
	}
}

func requireChild([]string) int {
	a, err := Enter(Policy{Require: true})
	var unavailable *UnavailableError
	switch missing := a.Missing(); {
	case len(missing) == 0 && err != nil:
		return fail("everything is in force, yet: %v", err)
	case len(missing) > 0 && !errors.As(err, &unavailable):
		return fail("missing %v, yet: %v", missing, err)
	}
	return 0
}

func TestRequireFailsExactlyWhenALayerIsMissing(t *testing.T) {
	if output, err := child(t, "require").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
}

func TestEnterRefusesAPathThatDoesNotExist(t *testing.T) {
	if output, err := child(t, "files", "/does/not/exist", "/tmp").CombinedOutput(); err == nil || !strings.Contains(string(output), "no such file") {
		t.Fatalf("%v: %s", err, output)
	}
}

// spinModule exports spin, which never returns and never yields.
var spinModule = []byte{
	0, 'a', 's', 'm', 1, 0, 0, 0,
	1, 4, 1, 0x60, 0, 0,
	3, 2, 1, 0,
	7, 8, 1, 4, 's', 'p', 'i', 'n', 0, 0,
	10, 9, 1, 7, 0, 0x03, 0x40, 0x0c, 0, 0x0b, 0x0b,
}

func lifelineChild(args []string) int {
	if err := Lifeline(3); err != nil {
		return fail("%v", err)
	}
	if _, err := Enter(Policy{AllowExecMemory: true}); err != nil {
		return fail("enter: %v", err)
	}
	if args[0] == "stuck" {
		// Guest code on the only processor, and a collection that waits for
		// it: no goroutine runs any more.
		runtime.GOMAXPROCS(1)
		ctx := context.Background()
		r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigCompiler())
		m, err := r.Instantiate(ctx, spinModule)
		if err != nil {
			return fail("%v", err)
		}
		fmt.Println("ready")
		_, _ = m.ExportedFunction("spin").Call(ctx)
	}
	fmt.Println("ready")
	select {}
}

func TestLifelineEndsTheChildWithItsParent(t *testing.T) {
	for _, how := range []string{"idle", "stuck"} {
		t.Run(how, func(t *testing.T) {
			if how == "stuck" {
				needKernel(t, true, false) // emulation has no signal-driven I/O either
			}
			childEnd, parentEnd, err := NewLifeline()
			if err != nil {
				t.Fatal(err)
			}
			defer parentEnd.Close()
			cmd := child(t, "lifeline", how)
			cmd.ExtraFiles = []*os.File{childEnd}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			_ = childEnd.Close()
			if line, err := io.ReadAll(io.LimitReader(stdout, 6)); err != nil || string(line) != "ready\n" {
				t.Fatalf("%q, %v", line, err)
			}
			_ = parentEnd.Close()
			// Output ends when the process does; the context of child bounds it.
			_, _ = io.Copy(io.Discard, stdout)
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
				t.Fatalf("child ended with %v", err)
			}
		})
	}
}

func TestLifelineRefusesWhatIsNotAPipe(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Lifeline(f.Fd()); err == nil {
		t.Fatal("no error")
	}
}

func TestCredentialIsNobodyForRootOnly(t *testing.T) {
	c := Credential()
	switch {
	case os.Geteuid() != 0 && c != nil:
		t.Fatalf("not root, got %+v", c)
	case c != nil && (c.Uid != Nobody || c.Gid != Nobody || c.NoSetGroups):
		t.Fatalf("got %+v", c)
	}
}

func TestChildOfRootRunsAsNobodyFromADirectoryItCannotSearch(t *testing.T) {
	credential := Credential()
	if credential == nil {
		t.Skip("only root gives its children another account")
	}
	if len(emulator()) > 0 {
		t.Skip("/proc/self/exe is the emulator")
	}
	cmd := child(t, "compiler")
	cmd.Path = Executable()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
}

func TestMapsFindsAnIdentifierInAMapping(t *testing.T) {
	for _, c := range []struct {
		mapping string
		want    bool
	}{
		{"         0          0 4294967295\n", true},
		{"0 1000 1\n", false},
		{"0 1000 1\n1 100000 65536\n", true},
		{"", false},
		{"garbage\n", false},
		{"18446744073709551615 0 18446744073709551615\n", false},
	} {
		if got := maps(strings.NewReader(c.mapping), Nobody); got != c.want {
			t.Errorf("%q: %v", c.mapping, got)
		}
	}
}

// TestNoCallIsListedTwice: the first match wins, so a second entry would be
// dead and could hide a mistake.
func TestNoCallIsListedTwice(t *testing.T) {
	for name, p := range map[string]Policy{
		"nothing": {}, "everything": {ReadOnly: []string{"/"}, ReadWrite: []string{"/"}, AllowExecMemory: true, AcceptConnections: true}, "reading": {ReadOnly: []string{"/"}},
	} {
		seen := map[uint32]bool{}
		program := seccompProgram(p, 1)
		for i := 4; i < len(program); {
			jump, ok := program[i].(bpf.JumpIf)
			if !ok || jump.Cond != bpf.JumpEqual {
				i++
				continue
			}
			if seen[jump.Val] {
				t.Errorf("%s: call %d is listed twice", name, jump.Val)
			}
			seen[jump.Val] = true
			i += 1 + int(jump.SkipFalse)
		}
		raw, err := bpf.Assemble(program)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d instructions, %d calls", name, len(raw), len(seen))
	}
}
