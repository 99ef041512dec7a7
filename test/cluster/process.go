package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/test/process"
)

const (
	// stopTimeout is how long a daemon may take to end after SIGTERM before it
	// is killed; etcd and containerd take well below a second.
	stopTimeout = 15 * time.Second
	// respawnDelay is between the end of a program and its next start.
	respawnDelay = time.Second
	// maxRespawns bounds those starts: what ends so often is broken.
	maxRespawns = 10
	// logTail is how many lines of every log a failed test shows.
	logTail = 40
)

// daemon is one program of the cluster that can be stopped and started again.
// Its output is appended to a log across restarts.
type daemon struct {
	name string
	log  string
	argv []string // through the launcher of its place
	env  []string
	// respawn starts the program again when it ends by itself, as systemd does
	// with Restart=always: a kubelet ends when containerd is not there.
	respawn bool

	mu sync.Mutex // serialises start and stop

	state    sync.Mutex // guards what follows; never held while waiting
	cmd      *exec.Cmd
	retiring bool
	retire   chan struct{} // closed when retiring becomes true
	done     chan struct{} // closed when the last process was waited for
	err      error         // of that process
}

// start does nothing when the daemon runs.
func (d *daemon) start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running() {
		return nil
	}
	cmd, err := d.spawn()
	if err != nil {
		return err
	}
	d.state.Lock()
	defer d.state.Unlock()
	d.cmd, d.err, d.retiring = cmd, nil, false
	d.retire, d.done = make(chan struct{}), make(chan struct{})
	go d.supervise(cmd, d.retire, d.done) // ends by retire and a kill at the latest
	return nil
}

func (d *daemon) spawn() (*exec.Cmd, error) {
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the process has its own
	cmd := exec.Command(d.argv[0], d.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), d.env...)
	// A session of its own: an interrupt from the terminal goes to the test,
	// and the watchdog ends what the test leaves.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", d.name, err)
	}
	return cmd, nil
}

// supervise waits for the process, and for those it starts in its place.
func (d *daemon) supervise(cmd *exec.Cmd, retire <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	for spawned := 0; ; spawned++ {
		err := cmd.Wait()
		d.state.Lock()
		d.err = err
		d.state.Unlock()
		if !d.respawn || spawned == maxRespawns {
			return
		}
		select {
		case <-retire:
			return
		case <-time.After(respawnDelay):
		}
		d.state.Lock()
		if d.retiring {
			d.state.Unlock()
			return
		}
		if cmd, err = d.spawn(); err != nil {
			d.err = err
			d.state.Unlock()
			return
		}
		d.cmd = cmd
		d.state.Unlock()
	}
}

// running says whether there is something to stop.
func (d *daemon) running() bool {
	d.state.Lock()
	defer d.state.Unlock()
	if d.done == nil {
		return false
	}
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// abandon makes the daemon's end final: what ends from now on stays ended.
func (d *daemon) abandon() {
	d.state.Lock()
	defer d.state.Unlock()
	if d.retire != nil && !d.retiring {
		d.retiring = true
		close(d.retire)
	}
}

func (d *daemon) signal(signal os.Signal) {
	d.state.Lock()
	defer d.state.Unlock()
	_ = d.cmd.Process.Signal(signal) // one that ended needs none
}

// pid is that of the newest process.
func (d *daemon) pid() int {
	d.state.Lock()
	defer d.state.Unlock()
	return d.cmd.Process.Pid
}

// stop asks, waits, then kills. It does nothing when the daemon is stopped.
func (d *daemon) stop(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.running() {
		return nil
	}
	d.abandon()
	d.signal(syscall.SIGTERM)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-d.done:
		return nil
	case <-timer.C:
	case <-ctx.Done():
	}
	d.signal(os.Kill)
	<-d.done
	return nil
}

// kill ends the daemon at once.
func (d *daemon) kill() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running() {
		d.abandon()
		d.signal(os.Kill)
		<-d.done
	}
}

// exited returns an error once the daemon has ended by itself for good, with
// the end of its log.
func (d *daemon) exited() error {
	if d.running() {
		return nil
	}
	d.state.Lock()
	defer d.state.Unlock()
	if d.cmd == nil || d.retiring {
		return nil
	}
	return fmt.Errorf("%s ended (%w); the end of its log:\n%s", d.name, errOr(d.err, errors.New("exit status 0")), process.TailFile(d.log, 15))
}

func errOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// daemonCgroups are those of what runs for a node or the control plane beside
// pods: a leaf, because version 2 wants processes in leaves only.
func (c *Cluster) daemonCgroups(group string) *process.Cgroups {
	return c.cgroups.Below(group, "daemons")
}

// launcher writes a script that joins cgroups and namespaces and becomes its
// arguments. A script, because a Go program cannot move itself between
// namespaces of mounts: its threads share one.
func launcher(path string, cgroups *process.Cgroups, enter ...string) error {
	var b strings.Builder
	b.WriteString("#!/bin/sh\n# Joins the cgroups and namespaces of one machine of a test cluster, then becomes \"$@\".\nset -eu\n")
	for _, dir := range cgroups.Dirs() {
		fmt.Fprintf(&b, "echo $$ >%s\n", process.Quote(filepath.Join(dir, "cgroup.procs")))
	}
	b.WriteString("exec")
	for _, word := range enter {
		b.WriteString(" " + process.Quote(word))
	}
	b.WriteString(" \"$@\"\n")
	// A child forked while the file is open for writing would hold it so until
	// its exec, and executing it would fail: text file busy.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte(b.String()), 0o755)
}
