package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// killTimeout is how long killed processes may take to be gone, and their
	// cgroups to become removable.
	killTimeout = 30 * time.Second
	// killPoll is between two looks at a cgroup, whose emptiness has no event
	// that exists on every version.
	killPoll = 20 * time.Millisecond
)

// group is one subtree in every cgroup hierarchy of this machine. A machine's
// systemd sees its group as the root of the hierarchies, so that two machines
// on one kernel cannot meet there, and killing the group is a loss of power.
type group struct {
	// dirs are one per hierarchy: many on version 1, one on version 2.
	dirs    []string
	unified bool
}

// hierarchies are the mount points below /sys/fs/cgroup, and whether version 2
// has the controllers.
func hierarchies() (mounts []string, unified bool, err error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, false, err
	}
	seen := map[string]bool{}
	var v2 string
	for line := range strings.Lines(string(info)) {
		// See proc_pid_mountinfo(5): "36 35 98:0 /root /mountpoint rw ... - type source options".
		before, after, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 3 || !strings.HasPrefix(fields[4], "/sys/fs/cgroup") {
			continue
		}
		switch {
		case kind[0] == "cgroup" && !seen[kind[2]]:
			seen[kind[2]] = true // a hierarchy may be mounted twice
			mounts = append(mounts, fields[4])
		case kind[0] == "cgroup2":
			v2 = fields[4]
		}
	}
	switch {
	case v2 == "" && len(mounts) == 0:
		return nil, false, errors.New("no cgroup hierarchy is mounted under /sys/fs/cgroup")
	case len(mounts) == 0:
		return []string{v2}, true, nil
	case v2 != "":
		mounts = append(mounts, v2)
	}
	return mounts, false, nil
}

// newGroup names a subtree; it need not exist.
func newGroup(name string) (*group, error) {
	mounts, unified, err := hierarchies()
	if err != nil {
		return nil, err
	}
	g := &group{unified: unified}
	for _, mount := range mounts {
		g.dirs = append(g.dirs, filepath.Join(mount, name))
	}
	return g, nil
}

// create makes the subtree and its parents, ready for processes.
func (g *group) create() error {
	for _, dir := range g.dirs {
		mount := dir
		for filepath.Dir(mount) != "/sys/fs/cgroup" && filepath.Dir(mount) != "/sys/fs" {
			mount = filepath.Dir(mount)
		}
		relative, err := filepath.Rel(mount, dir)
		if err != nil {
			return err
		}
		parent := mount
		for part := range strings.SplitSeq(relative, "/") {
			if g.unified {
				enableControllers(parent)
			}
			child := filepath.Join(parent, part)
			if err := os.Mkdir(child, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("making a cgroup for a machine: %w", err)
			}
			if err := inheritCPUs(parent, child); err != nil && !g.unified {
				return err
			}
			parent = child
		}
	}
	return nil
}

// inheritCPUs fills a cpuset of version 1, which is empty and takes no process
// until then; below it the kernel does so from now on.
func inheritCPUs(parent, child string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(child, file), value, 0o644); err != nil {
			return fmt.Errorf("filling %s of a cgroup: %w", file, err)
		}
	}
	clone := filepath.Join(child, "cgroup.clone_children")
	if _, err := os.Stat(clone); err != nil {
		return nil
	}
	return os.WriteFile(clone, []byte("1"), 0o644)
}

// enableControllers hands down what the parent has; what it cannot, the
// machine's systemd says.
func enableControllers(dir string) {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, name := range strings.Fields(string(controllers)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0o644)
	}
}

// processes lists what lives in the subtree.
func (g *group) processes() []int {
	var out []int
	for _, dir := range g.dirs {
		walk(dir, func(dir string) {
			content, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				return // removed meanwhile
			}
			for line := range strings.Lines(string(content)) {
				if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 1 {
					out = append(out, pid)
				}
			}
		})
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// walk visits a subtree, parents first.
func walk(dir string, visit func(dir string)) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	visit(dir)
	for _, entry := range entries {
		if entry.IsDir() {
			walk(filepath.Join(dir, entry.Name()), visit)
		}
	}
}

// kill ends every process of the subtree at once and waits until they are gone.
func (g *group) kill(ctx context.Context) error {
	return g.until(ctx, func() bool {
		living := g.processes()
		for _, pid := range living {
			_ = unix.Kill(pid, unix.SIGKILL) // one that ended needs none
		}
		return len(living) == 0
	})
}

// destroy kills and removes the subtree.
func (g *group) destroy(ctx context.Context) error {
	return g.until(ctx, func() bool {
		living := g.processes()
		for _, pid := range living {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		gone := len(living) == 0
		for _, root := range g.dirs {
			var dirs []string
			walk(root, func(dir string) { dirs = append(dirs, dir) })
			for _, dir := range slices.Backward(dirs) {
				if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
					gone = false
				}
			}
		}
		return gone
	})
}

func (g *group) until(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for !done() {
		for _, root := range g.dirs { // a frozen process dies only when thawed
			walk(root, func(dir string) {
				for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
					if path := filepath.Join(dir, file); exists(path) {
						_ = os.WriteFile(path, []byte(value), 0o644)
					}
				}
			})
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v of %v are still there %s after they were killed", g.processes(), g.dirs, killTimeout)
		case <-time.After(killPoll):
		}
	}
	return nil
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }
