package precompile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

const (
	// DefaultTimeout is for one child. A Go program of 3 MB takes about a
	// second, one of 50 MiB under half a minute on two cores; the rest is for
	// slow and busy machines.
	DefaultTimeout = 2 * time.Minute
	// DefaultMemoryBytes is about ten times what a 3 MB Go program takes.
	DefaultMemoryBytes = 2 << 30
	// memoryCheckInterval bounds how far a child gets past its memory bound:
	// a core touches about 1 GiB of fresh memory per second.
	memoryCheckInterval = 50 * time.Millisecond
	// pipeDelay is how long output of a child that ended may still arrive;
	// it has no children that could hold the pipes open.
	pipeDelay = 5 * time.Second
	// maxStderrBytes is what is kept of a crash: the end of a Go traceback is
	// the least useful part.
	maxStderrBytes = 8 << 10
)

// CompilerOptions are the settings of a [Compiler]. Zero values mean the
// defaults described.
type CompilerOptions struct {
	// Command is the program and arguments of a child, which must call
	// [ChildMain]; default: this program with the argument "precompile".
	Command []string
	// Env is the child's whole environment; default: empty.
	Env []string
	// Timeout is for one job, from the start of its child; default:
	// DefaultTimeout.
	Timeout time.Duration
	// MemoryBytes bounds a child's resident memory; default:
	// DefaultMemoryBytes, or three quarters of the machine's memory if that
	// is less.
	MemoryBytes uint64
	// TempDir says where the caller keeps modules. The compiler itself makes
	// no temporary files: a child gets descriptors only.
	TempDir string
	// Concurrency is how many children run at once, others wait; default:
	// one per processor.
	Concurrency int
	// SameAccount keeps children of root under root's account, for programs
	// that the unprivileged account cannot execute (emulators).
	SameAccount bool
	// RequireSandbox refuses to compile where the kernel lacks a layer of
	// the sandbox, instead of logging that once.
	RequireSandbox bool
	// Logger gets crashes of children and what the sandbox lacks; default:
	// slog.Default.
	Logger *slog.Logger
}

// Compiler runs one confined child process per module. It is safe for
// concurrent use and owns no process between calls.
type Compiler struct {
	options CompilerOptions
	slots   chan struct{}
	// warnOnce keeps an incomplete sandbox to one line per process.
	warnOnce sync.Once
}

// NewCompiler returns a Compiler; it starts nothing yet.
func NewCompiler(o CompilerOptions) *Compiler {
	if len(o.Command) == 0 {
		o.Command = []string{sandbox.Executable(), "precompile"}
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.MemoryBytes == 0 {
		o.MemoryBytes = defaultMemory()
	}
	if o.Concurrency <= 0 {
		o.Concurrency = runtime.GOMAXPROCS(0)
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Compiler{options: o, slots: make(chan struct{}, o.Concurrency)}
}

func defaultMemory() uint64 {
	memory := uint64(DefaultMemoryBytes)
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		if total := info.Totalram * uint64(info.Unit); total > 0 {
			memory = min(memory, total/4*3)
		}
	}
	return memory
}

// CheckOptions are what a module is checked against.
type CheckOptions struct {
	// MemoryLimitMiB bounds the module's initial memory; 0 means
	// v1alpha1.MaxMemoryMiB.
	MemoryLimitMiB int
}

// Report is what a check found out about a module that passed.
type Report struct {
	// Kind is "core module"; other kinds do not pass yet.
	Kind string
	// ModuleDigest is "sha256:…" of the module as submitted.
	ModuleDigest string
	SizeBytes    int64
	// Imports are the functions it imports, as "module.name", sorted.
	Imports []string
	// MemoryMinPages is its initial memory in pages of 64 KiB.
	MemoryMinPages uint64
	// Functions counts defined and imported ones.
	Functions int
	// Phases has one entry, "check", from the start of the child.
	Phases []v1alpha1.Phase
}

// Check decides in a child whether a module can run here; nothing is
// compiled or kept. The module is read from the start of the file, whatever
// its offset; the file must not change meanwhile. The error is an *Error
// unless ctx ended.
func (c *Compiler) Check(ctx context.Context, module *os.File, o CheckOptions) (*Report, error) {
	if o.MemoryLimitMiB == 0 {
		o.MemoryLimitMiB = v1alpha1.MaxMemoryMiB
	}
	if o.MemoryLimitMiB < v1alpha1.MinMemoryMiB || o.MemoryLimitMiB > v1alpha1.MaxMemoryMiB {
		return nil, fmt.Errorf("memory limit of %d MiB is outside %d to %d", o.MemoryLimitMiB, v1alpha1.MinMemoryMiB, v1alpha1.MaxMemoryMiB)
	}
	size, err := moduleSize(module)
	if err != nil {
		return nil, err
	}
	// Hashed here, not by the child: what it says about a module's identity
	// could be a lie. It costs no time beside the child.
	digest := make(chan string, 1)
	go func() {
		defer close(digest)
		if d, err := digestOf(module, size); err == nil {
			digest <- "sha256:" + d
		}
	}()
	res, elapsed, err := c.run(ctx, module, nil, request{
		Operation:        operationCheck,
		SizeBytes:        size,
		MemoryLimitPages: uint32(o.MemoryLimitMiB << 20 / pageBytes),
	})
	d, ok := <-digest
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, internalError(io.ErrUnexpectedEOF, "reading the module")
	}
	return &Report{
		Kind:           "core module",
		ModuleDigest:   d,
		SizeBytes:      size,
		Imports:        res.Module.Imports,
		MemoryMinPages: res.Module.MemoryMinPages,
		Functions:      res.Module.Functions,
		Phases:         []v1alpha1.Phase{{Name: "check", Milliseconds: milliseconds(elapsed)}},
	}, nil
}

// moduleSize refuses what no child needs to look at.
func moduleSize(module *os.File) (int64, error) {
	info, err := module.Stat()
	switch {
	case err != nil:
		return 0, internalError(err, "reading the module")
	case !info.Mode().IsRegular():
		return 0, internalError(fmt.Errorf("%s is not a regular file", module.Name()), "reading the module")
	case info.Size() > v1alpha1.MaxModuleBytes:
		return 0, &Error{Code: CodeModuleTooLarge, Detail: fmt.Sprintf("the module has %d bytes, more than the %d MiB allowed", info.Size(), v1alpha1.MaxModuleBytes>>20)}
	}
	return info.Size(), nil
}

func digestOf(module *os.File, size int64) (string, error) {
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(module, 0, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

// Why a child was killed.
var (
	errTimeout = errors.New("the child ran out of time")
	errMemory  = errors.New("the child used too much memory")
)

// run starts a child for one request and returns its verified result, or an
// *Error, or the error of ctx. output is nil unless compiling.
func (c *Compiler) run(ctx context.Context, module, output *os.File, req request) (*result, time.Duration, error) {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return nil, 0, context.Cause(ctx)
	}
	req.Version = wireVersion
	req.MemoryBytes = c.options.MemoryBytes
	// The kernel's limit is only for a child whose parent does not get to
	// kill it in time.
	req.CPUSeconds = uint64(c.options.Timeout/time.Second+1)*uint64(runtime.GOMAXPROCS(0)) + 5
	req.RequireSandbox = c.options.RequireSandbox

	childEnd, parentEnd, err := sandbox.NewLifeline()
	if err != nil {
		return nil, 0, internalError(err, "starting the compiler")
	}
	defer parentEnd.Close()
	defer childEnd.Close()

	childCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var stdin bytes.Buffer
	if err := writeMessage(&stdin, req); err != nil {
		return nil, 0, internalError(err, "starting the compiler")
	}
	stdout, stderr := &boundedBuffer{limit: maxResultBytes}, &boundedBuffer{limit: maxStderrBytes}
	cmd := exec.CommandContext(childCtx, c.options.Command[0], c.options.Command[1:]...)
	cmd.Env = append([]string{}, c.options.Env...) // not nil, which would be this process's
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &stdin, stdout, stderr
	cmd.ExtraFiles = []*os.File{module, childEnd}
	if output != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, output)
	}
	cmd.WaitDelay = pipeDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// A terminal's interrupt is for the parent, which then decides.
		Setpgid: true,
	}
	cmd.SysProcAttr.Credential = c.credential()

	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, internalError(err, "starting the compiler")
	}
	_ = childEnd.Close()
	// The kill timer and the watch over memory end with the child.
	watched := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(watched)
		c.watch(cmd.Process.Pid, stop, cancel)
	}()
	waitErr := cmd.Wait()
	elapsed := time.Since(start)
	close(stop)
	<-watched

	if waitErr != nil {
		return nil, elapsed, c.explain(ctx, childCtx, cmd, stderr, waitErr)
	}
	res := new(result)
	if err := readMessage(&stdout.Buffer, maxResultBytes, res); err != nil || stdout.cut {
		c.options.Logger.Warn("compiler child gave no valid answer", "error", err, "stderr", printable(stderr.String(), maxDetailBytes))
		return nil, elapsed, &Error{Code: CodeCompilerCrashed, Detail: "the compiler gave no valid answer for this module", err: err}
	}
	if missing := res.Sandbox.Missing(); len(missing) > 0 {
		c.warnOnce.Do(func() {
			c.options.Logger.Warn("modules are compiled without a complete sandbox", "missing", missing, "notes", res.Sandbox.Notes)
		})
	}
	if f := res.Failure; f != nil {
		return nil, elapsed, &Error{Code: f.Code, Detail: f.Detail, Retryable: f.Code == CodeInternal || f.Code == CodeDiskFull}
	}
	return res, elapsed, nil
}

// credential is the account of children, nil for that of this process.
func (c *Compiler) credential() *syscall.Credential {
	if c.options.SameAccount {
		return nil
	}
	return sandbox.Credential()
}

// watch kills the child through cancel when it is over time or memory.
func (c *Compiler) watch(pid int, stop <-chan struct{}, cancel context.CancelCauseFunc) {
	timeout := time.NewTimer(c.options.Timeout)
	defer timeout.Stop()
	ticker := time.NewTicker(memoryCheckInterval)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-timeout.C:
			cancel(errTimeout)
			return
		case <-ticker.C:
			if residentBytes(pid) > c.options.MemoryBytes {
				cancel(errMemory)
				return
			}
		}
	}
}

// residentBytes is 0 when it cannot be known (the process just ended).
func residentBytes(pid int) uint64 {
	// statm (proc(5)): total and resident size in pages, and more.
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}

// explain says why a child ended without an answer.
func (c *Compiler) explain(ctx, childCtx context.Context, cmd *exec.Cmd, stderr *boundedBuffer, waitErr error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	usage := time.Duration(0)
	status := syscall.WaitStatus(0)
	if cmd.ProcessState != nil {
		usage = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		status, _ = cmd.ProcessState.Sys().(syscall.WaitStatus)
	}
	signalled := func(s syscall.Signal) bool { return status.Signaled() && status.Signal() == s }
	output := stderr.String()
	switch cause := context.Cause(childCtx); {
	case errors.Is(cause, errTimeout), signalled(syscall.SIGXCPU):
		return &Error{
			Code:   CodeCompileTimeout,
			Detail: fmt.Sprintf("compiling the module took longer than the %v allowed", c.options.Timeout),
			// With hardly any processor time used it was the machine, not the
			// module, that was too slow.
			Retryable: usage < c.options.Timeout/2,
		}
	case errors.Is(cause, errMemory), strings.Contains(output, "out of memory"), strings.Contains(output, "cannot allocate memory"):
		return &Error{Code: CodeCompileMemory, Detail: fmt.Sprintf("compiling the module took more memory than the %d MiB allowed", c.options.MemoryBytes>>20)}
	}
	c.options.Logger.Warn("compiler child crashed", "error", waitErr, "stderr", printable(output, maxDetailBytes))
	e := &Error{Code: CodeCompilerCrashed, Detail: "the compiler crashed on this module", err: waitErr}
	// Nothing of ours sends SIGKILL without saying why: the kernel was out of
	// memory, or somebody killed the child.
	e.Retryable = signalled(syscall.SIGKILL)
	return e
}

// boundedBuffer keeps the first limit bytes and drops the rest.
type boundedBuffer struct {
	bytes.Buffer
	limit int
	cut   bool
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if room := b.limit - b.Len(); room < len(p) {
		b.cut = true
		b.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
