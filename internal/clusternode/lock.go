package clusternode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lockPath is the node's, whatever socket and directories an agent was
	// given: what two agents would fight over is the Node object, containerd's
	// images and the pods of this machine. It is in the run directory of the
	// host, which the pods of the DaemonSet see under the same name; systemd
	// keeps it when the service stops (RuntimeDirectoryPreserve).
	lockPath = "/run/hearth/node.lock"
	// lockPatience is how long the agent before this one may take to end:
	// where one agent is replaced by another, be it of an update, a pod that
	// was deleted by force, or a service that a DaemonSet takes over from, both
	// are there for as long as the old one's grace period (15 s in the chart).
	lockPatience = 20 * time.Second
	// lockPoll is how often it is looked whether it has ended; flock cannot
	// be given a deadline.
	lockPoll = 100 * time.Millisecond
	// maxHolderBytes bounds what is read of who holds the lock.
	maxHolderBytes = 256
)

// errSecondAgent is wrapped when another agent works on this node.
var errSecondAgent = errors.New("another nodeagent works on this node")

// lockNode makes this process the node's only agent until the file is closed
// or the process ends, however that happens. It waits for patience at most,
// after telling waiting once why; it returns an error of errSecondAgent after
// that, and ctx's own when that ends first.
//
// The kernel's lock is on the file's inode, so that pods and the host mean the
// same one. Nobody removes the file.
func lockNode(ctx context.Context, path, owner string, patience time.Duration, waiting func(reason string)) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("create the directory of the node's lock: %w", err)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the node's lock: %w", err)
	}
	deadline := time.Now().Add(patience)
	told := false
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if time.Now().After(deadline) {
			err := fmt.Errorf("%w%s and did not end within %s; stop it (`systemctl disable --now hearth-nodeagent` on the host, or uninstall the other DaemonSet), each node has one agent",
				errSecondAgent, holder(file), patience)
			_ = file.Close()
			return nil, err
		}
		if !told {
			told = true
			waiting("waiting for another nodeagent of this node to end" + holder(file))
		}
		timer := time.NewTimer(lockPoll)
		select {
		case <-ctx.Done():
			timer.Stop()
			_ = file.Close()
			return nil, ctx.Err()
		case <-timer.C:
		}
	}
	// Who holds it is for people only; without it the lock is as good.
	if err := file.Truncate(0); err == nil {
		_, _ = file.WriteAt([]byte(owner+"\n"), 0)
	}
	return file, nil
}

// holder is what the process that holds a lock wrote of itself, in brackets.
func holder(file *os.File) string {
	text := make([]byte, maxHolderBytes)
	n, _ := file.ReadAt(text, 0)
	line, _, _ := strings.Cut(string(text[:n]), "\n")
	line = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(line, ""))
	if line == "" {
		return ""
	}
	return " (" + line + ")"
}

// owner says who this process is, for the person who finds two.
func (c *cluster) owner() string {
	if c.o.Pod != "" {
		return fmt.Sprintf("pod %s/%s", c.o.Namespace, c.o.Pod)
	}
	return fmt.Sprintf("process %d on the host", os.Getpid())
}
