// Package supervise keeps a child process running: it starts it with a
// lifeline, restarts it with backoff when it ends, and stops it within a
// deadline.
//
// It owns processes and their output; it knows nothing of what they do.
package supervise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/internal/sandbox"
)

const (
	// stopGrace is how long a child may take to end by itself after SIGTERM:
	// the engine drains requests for a few seconds.
	stopGrace = 8 * time.Second
	// firstRestart keeps a recovery invisible to people; lastRestart keeps a
	// child that cannot start from using up the processor.
	firstRestart = 50 * time.Millisecond
	lastRestart  = 10 * time.Second
	// steady is how long a child must have run for its next end to count as
	// the first one again.
	steady = 30 * time.Second
	// maxOutputLine bounds what is held of one line of a child's output.
	maxOutputLine = 64 << 10
)

// Options describe one child.
type Options struct {
	// Name is for people: "agent", "engine".
	Name string
	// Args are the arguments after the program's own path.
	Args []string
	// Program is the executable; empty means this one.
	Program string
	// Env is added to the parent's environment.
	Env []string
	// Files are inherited as descriptors 3, 4, …; the lifeline follows them.
	// They stay open in the parent, so that a listener survives its child.
	Files []*os.File
	// Line is called with every line of the child's output (both streams)
	// from one goroutine at a time; the slice is only valid during the call.
	Line func(line []byte)
	// Logger gets starts and ends.
	Logger *slog.Logger
}

// LifelineFD is the descriptor at which a child with n inherited files finds
// its lifeline.
func LifelineFD(n int) int { return 3 + n }

// Process is a child that is kept running by Run.
type Process struct {
	o Options

	mu       sync.Mutex
	pid      int // 0 while it is not running
	restarts int
	lastEnd  string
}

// New returns a process that is not started yet.
func New(o Options) *Process {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Line == nil {
		o.Line = func([]byte) {}
	}
	return &Process{o: o}
}

// PID returns the process id, 0 while the child is not running.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

// Restarts returns how often the child was started again and how it ended last.
func (p *Process) Restarts() (int, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.restarts, p.lastEnd
}

// Run starts the child and restarts it whenever it ends, until ctx is done;
// then it stops it (SIGTERM, SIGKILL after a grace period) and returns nil.
// It returns an error only when the program cannot be started at all.
func (p *Process) Run(ctx context.Context) error {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = firstRestart, lastRestart
	for {
		began := time.Now()
		end, err := p.once(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // stopped as asked; how the child ended no longer matters
		}
		if err != nil && (errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission)) {
			return fmt.Errorf("start %s: %w", p.o.Name, err)
		}
		if err != nil {
			end = err.Error()
		}
		if time.Since(began) > steady {
			retry.Reset()
		}
		wait := retry.NextBackOff()
		p.o.Logger.Warn("process ended, starting it again", "process", p.o.Name, "end", end, "wait", wait.Round(time.Millisecond))
		p.mu.Lock()
		p.restarts++
		p.lastEnd = end
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// once runs the child until it ends and says how it ended.
func (p *Process) once(ctx context.Context) (string, error) {
	program := p.o.Program
	if program == "" {
		self, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find own executable: %w", err)
		}
		program = self
	}
	childEnd, parentEnd, err := sandbox.NewLifeline()
	if err != nil {
		return "", fmt.Errorf("make a lifeline: %w", err)
	}
	defer parentEnd.Close()
	output, outputWriter, err := os.Pipe()
	if err != nil {
		childEnd.Close()
		return "", fmt.Errorf("make a pipe for output: %w", err)
	}
	defer output.Close()

	// Not CommandContext: the child gets SIGTERM and time before SIGKILL.
	cmd := exec.Command(program, p.o.Args...) //nolint:noctx // the loop below stops it with a grace period
	cmd.Env = append(os.Environ(), p.o.Env...)
	cmd.Stdout, cmd.Stderr = outputWriter, outputWriter
	cmd.ExtraFiles = append(append([]*os.File{}, p.o.Files...), childEnd)
	// A group of its own: Ctrl-C on a terminal reaches the parent alone,
	// which then stops the children in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	childEnd.Close()
	outputWriter.Close()
	if err != nil {
		return "", err
	}
	p.o.Logger.Info("process started", "process", p.o.Name, "pid", cmd.Process.Pid)
	p.mu.Lock()
	p.pid = cmd.Process.Pid
	p.mu.Unlock()

	copied := make(chan struct{})
	go func() {
		defer close(copied)
		p.lines(output)
	}()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	var waitErr error
	select {
	case waitErr = <-ended:
	case <-ctx.Done():
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case waitErr = <-ended:
		case <-time.After(stopGrace):
			p.o.Logger.Warn("process did not stop in time, killing it", "process", p.o.Name, "grace", stopGrace)
			_ = cmd.Process.Kill()
			waitErr = <-ended
		}
	}
	p.mu.Lock()
	p.pid = 0
	p.mu.Unlock()
	// A grandchild may hold the pipe for a moment longer; closing our end
	// ends the copy whatever it does.
	select {
	case <-copied:
	case <-time.After(500 * time.Millisecond):
		output.Close()
		<-copied
	}
	if waitErr != nil {
		return waitErr.Error(), nil
	}
	return "exit status 0", nil
}

// lines hands the child's output on, line by line. Overlong lines are cut,
// never held.
func (p *Process) lines(r io.Reader) {
	br := bufio.NewReaderSize(r, maxOutputLine)
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			p.o.Line(line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}
