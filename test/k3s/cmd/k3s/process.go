package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// logDir has the output of the wrapped programs, which k3s would have in
	// its own; containerd's has the place it has with k3s.
	logDir = "/var/log/hearth-test-k3s"
	// stopTimeout is how long a program may take to end when asked.
	stopTimeout = 10 * time.Second
	// lastWords is how much of a log an error quotes.
	lastWords = 2000
)

// errEnded is a program's exit with status 0.
var errEnded = errors.New("exit status 0")

// group runs the programs of one k3s. They live no longer than k3s does,
// however it ends (k3s has them in its own process, and containerd under the
// same death signal); and when one ends by itself, so does k3s.
type group struct {
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	children []*child
	wg       sync.WaitGroup
}

type child struct {
	name    string
	process *os.Process
	done    chan struct{}
	stopped bool // guarded by group.mu
}

func newGroup(ctx context.Context) (context.Context, *group) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &group{cancel: cancel}
}

// start runs a program until stop. log may be empty.
func (g *group) start(name, log string, env []string, argv ...string) (*child, error) {
	if log == "" {
		log = filepath.Join(logDir, name+".log")
	}
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	c := &child{name: name, done: make(chan struct{})}
	started := make(chan error, 1)
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		// The death signal is sent when the starting thread ends: it is kept.
		runtime.LockOSThread()
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = out, out
		cmd.Env = append(os.Environ(), env...)
		for i, variable := range cmd.Env { // units of children are not ours
			if strings.HasPrefix(variable, "NOTIFY_SOCKET=") {
				cmd.Env[i] = "K3S_NOTIFIED=1"
			}
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		c.process = cmd.Process
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		close(c.done)
		g.mu.Lock()
		stopped := c.stopped
		g.mu.Unlock()
		if !stopped {
			g.cancel(fmt.Errorf("%s exited: %w; its last words: %s", name, cmp.Or(err, errEnded), tail(log)))
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	g.mu.Lock()
	g.children = append(g.children, c)
	g.mu.Unlock()
	slog.Info("Running " + name + " " + strings.Join(argv[1:], " "))
	return c, nil
}

func (g *group) stopOne(c *child) {
	g.mu.Lock()
	c.stopped = true
	g.mu.Unlock()
	_ = c.process.Signal(syscall.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(stopTimeout):
		_ = c.process.Kill()
		<-c.done
	}
}

// stop ends every program, those that were started last first.
func (g *group) stop() {
	g.mu.Lock()
	children := append([]*child(nil), g.children...)
	g.mu.Unlock()
	for i := len(children) - 1; i >= 0; i-- {
		g.stopOne(children[i])
	}
	g.wg.Wait()
}

func tail(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(content[max(0, len(content)-lastWords):]))
}

// poll calls f until it says true; an error ends it.
func poll(ctx context.Context, every time.Duration, f func() (bool, error)) error {
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		if err := sleep(ctx, every); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
