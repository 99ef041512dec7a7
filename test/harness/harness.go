// Package harness starts the shipped binary the way a person would and talks
// to it over HTTP: `nodeagent dev` in a data directory of the test's own, in a
// session of its own, so that every process it leaves behind can be found and
// ended. The end-to-end tests, the crash test and the benchmark share it.
//
// It owns processes and directories of tests. It must not import anything of
// Hearth but the API's types: what it sees is what a user sees.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/test/guests"
)

// BinaryEnv names a binary to test instead of building one.
const BinaryEnv = "HEARTH_BINARY"

const (
	// buildTimeout is for a cold build cache on a busy machine.
	buildTimeout = 10 * time.Minute
	// startTimeout is how long dev may take to answer /readyz. It takes about
	// a second; a machine with two busy cores takes several.
	startTimeout = 60 * time.Second
	// stopTimeout is how long an orderly stop may take before the harness
	// kills. Tests that hold the product to a tighter bound measure it.
	stopTimeout = 20 * time.Second
	// goneTimeout is how long processes may take to be gone after SIGKILL.
	goneTimeout = 10 * time.Second
	// pollInterval is between two looks at something that has no event.
	pollInterval = 20 * time.Millisecond
)

// Binary returns the binary under test: the one named by HEARTH_BINARY, else
// cmd/nodeagent of this tree, built once into dir.
func Binary(ctx context.Context, dir string) (string, error) {
	if path := os.Getenv(BinaryEnv); path != "" {
		abs, err := filepath.Abs(path)
		if err != nil {
			return "", err
		}
		if _, err := os.Stat(abs); err != nil {
			return "", fmt.Errorf("the binary of %s: %w", BinaryEnv, err)
		}
		return abs, nil
	}
	root, err := guests.Root()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	path := filepath.Join(dir, "nodeagent")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, "./cmd/nodeagent")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building cmd/nodeagent: %w\n%s", err, out)
	}
	return path, nil
}

// Options says how a Dev is started.
type Options struct {
	// Binary is the binary to start.
	Binary string
	// DataDir is kept by the caller; several runs may use it one after another.
	DataDir string
	// Listen is the address to listen on; empty means a free port of 127.0.0.1.
	Listen string
	// Args follow `dev` and the flags above.
	Args []string
	// Env is added to the environment.
	Env []string
}

// Dev is one running `nodeagent dev`.
type Dev struct {
	// Address is host:port of the public listener.
	Address string
	// URL is "http://" + Address.
	URL string
	// DataDir is where it keeps everything.
	DataDir string
	// Binary is what was started.
	Binary string
	// HTTP reaches the public listener whatever host a URL names, so that
	// http://hello.localhost:port/ needs no name resolution. It does not
	// follow redirects.
	HTTP *http.Client

	cmd    *exec.Cmd
	output *Output
	done   chan struct{} // closed when the parent process has been reaped
	err    error         // its exit, valid after done
}

// StartError is a dev that never became ready. It carries what was printed.
type StartError struct {
	Reason   string
	ExitCode int // -1 when it had to be killed
	Output   string
}

func (e *StartError) Error() string {
	return fmt.Sprintf("nodeagent dev did not start: %s\n--- its output ---\n%s", e.Reason, e.Output)
}

// Start runs `nodeagent dev` and waits until /readyz says 200. On error
// nothing keeps running.
func Start(ctx context.Context, opts Options) (*Dev, error) {
	d, err := launch(opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := d.waitReady(ctx); err != nil {
		d.KillAll()
		code := -1
		var exit *exec.ExitError
		if errors.As(d.err, &exit) {
			code = exit.ExitCode()
		}
		return nil, &StartError{Reason: err.Error(), ExitCode: code, Output: d.Output()}
	}
	return d, nil
}

func launch(opts Options) (*Dev, error) {
	listen := opts.Listen
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	d := &Dev{DataDir: opts.DataDir, Binary: opts.Binary, output: &Output{}, done: make(chan struct{})}
	// An address of an earlier run must not be taken for this one's.
	if err := os.Remove(d.addressFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	argv := append([]string{"dev", "--listen", listen, "--data-dir", opts.DataDir}, opts.Args...)
	d.cmd = exec.Command(opts.Binary, argv...)
	d.cmd.Env = append(os.Environ(), opts.Env...)
	d.cmd.Stdout, d.cmd.Stderr = d.output, d.output
	// A session of its own marks every descendant, also orphaned ones.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// A child that keeps our end of the output pipe must not make Wait hang.
	d.cmd.WaitDelay = time.Second
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", opts.Binary, err)
	}
	go func() {
		defer close(d.done)
		d.err = d.cmd.Wait()
	}()
	return d, nil
}

func (d *Dev) addressFile() string { return filepath.Join(d.DataDir, "run", "address") }

func (d *Dev) waitReady(ctx context.Context) error {
	for {
		if d.Address == "" {
			if b, err := os.ReadFile(d.addressFile()); err == nil && bytes.ContainsRune(b, ':') {
				d.Address = strings.TrimSpace(string(b))
				d.URL = "http://" + d.Address
				d.HTTP = newClient(d.Address)
			}
		}
		last := "it wrote no address to " + d.addressFile()
		if d.Address != "" {
			status, body, err := d.ready(ctx)
			if err == nil && status == http.StatusOK {
				return nil
			}
			last = fmt.Sprintf("/readyz answered %d %s %v", status, body, err)
		}
		select {
		case <-d.done:
			return fmt.Errorf("it ended: %w", errOr(d.err, "with status 0"))
		case <-ctx.Done():
			return fmt.Errorf("%w; %s", ctx.Err(), last)
		case <-time.After(pollInterval):
		}
	}
}

func errOr(err error, otherwise string) error {
	if err == nil {
		return errors.New(otherwise)
	}
	return err
}

func (d *Dev) ready(ctx context.Context) (int, string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := d.do(ctx, http.MethodGet, "/readyz?verbose=1", nil, nil)
	if err != nil {
		return 0, "", err
	}
	return resp.Status, string(resp.Body), nil
}

// WaitReady waits until /readyz says 200 again, after something was killed.
func (d *Dev) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return d.waitReady(ctx)
}

func newClient(address string) *http.Client {
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", address)
			},
			MaxIdleConns:        64,
			MaxIdleConnsPerHost: 64,
			IdleConnTimeout:     30 * time.Second,
			// A guest's bytes must be seen as they were sent.
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// PID is the parent's process id.
func (d *Dev) PID() int { return d.cmd.Process.Pid }

// Output is all the parent and its children printed so far.
func (d *Dev) Output() string { return d.output.String() }

// Running says whether the parent process has not ended.
func (d *Dev) Running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Done is closed when the parent has ended.
func (d *Dev) Done() <-chan struct{} { return d.done }

// ExitCode is the parent's exit code, -1 while it runs or when a signal ended it.
func (d *Dev) ExitCode() int {
	if d.Running() {
		return -1
	}
	return d.cmd.ProcessState.ExitCode()
}

// Interrupt does what Ctrl-C in a terminal does: SIGINT to every process of
// the foreground group, parent and children alike.
func (d *Dev) Interrupt() error { return syscall.Kill(-d.PID(), syscall.SIGINT) }

// Stop ends dev in an orderly way and returns how long that took. Whatever
// is left afterwards is killed and named in the error.
func (d *Dev) Stop() (time.Duration, error) {
	start := time.Now()
	if d.Running() {
		if err := d.Interrupt(); err != nil {
			return 0, fmt.Errorf("interrupting dev: %w", err)
		}
	}
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-d.done:
	case <-timer.C:
		d.KillAll()
		return time.Since(start), fmt.Errorf("dev did not stop within %v of an interrupt\n%s", stopTimeout, d.Output())
	}
	took := time.Since(start)
	d.HTTP.CloseIdleConnections()
	if left := d.Processes(); len(left) > 0 {
		d.KillAll()
		return took, fmt.Errorf("processes left after dev ended: %v", left)
	}
	return took, nil
}

// Kill sends SIGKILL to the parent alone and reaps it. Its children are meant
// to end by themselves.
func (d *Dev) Kill() {
	_ = d.cmd.Process.Kill() // only fails when it has ended
	<-d.done
}

// KillAll ends every process of this dev for good. It is safe to call at any
// time and more than once.
func (d *Dev) KillAll() {
	deadline := time.Now().Add(goneTimeout)
	for {
		_ = d.cmd.Process.Kill()
		left := d.Processes()
		for _, p := range left {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(pollInterval)
	}
	<-d.done
	if d.HTTP != nil {
		d.HTTP.CloseIdleConnections()
	}
}

// WaitGone waits until no process of this dev is left.
func (d *Dev) WaitGone(ctx context.Context) error {
	for {
		left := d.Processes()
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("still running: %v", left)
		case <-time.After(pollInterval):
		}
	}
}

// outputBound is how much of a process's output is kept.
const outputBound = 4 << 20

// Output collects what a process prints; when it grows too long the oldest
// half goes. It is safe for concurrent use.
type Output struct {
	mu  sync.Mutex
	buf []byte
}

func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = append(o.buf, p...)
	if len(o.buf) > outputBound {
		o.buf = append(o.buf[:0], o.buf[len(o.buf)-outputBound/2:]...)
	}
	return len(p), nil
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.buf)
}
