package cluster

import (
	"bufio"
	"bytes"
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
	killTimeout = 20 * time.Second
	// killPoll is between two looks at a cgroup, whose emptiness has no event
	// that exists on every version.
	killPoll = 20 * time.Millisecond
)

// cgroups are the hierarchies of this machine, and one subtree of each that
// belongs to a cluster. Every process of a cluster lives below it, pods
// included, so that ending the subtree ends the cluster.
type cgroups struct {
	// mounts are the mount points: one per controller on version 1 (plus the
	// named and the version 2 ones that stand beside them), one on version 2.
	mounts []string
	// unified says that version 2 has the controllers.
	unified bool
	// name is the subtree, relative to each mount point.
	name string
}

func findCgroups(name string) (*cgroups, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	g := &cgroups{name: name}
	seen := map[string]bool{}
	var v2 string
	for line := range strings.Lines(string(info)) {
		// See proc_pid_mountinfo(5): "36 35 98:0 /root /mountpoint rw ... - type source options".
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		kind := strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 3 || !strings.HasPrefix(fields[4], "/sys/fs/cgroup") {
			continue
		}
		switch kind[0] {
		case "cgroup":
			// A controller may be mounted twice, as cpu and as cpu,cpuacct.
			if options := kind[2]; !seen[options] {
				seen[options] = true
				g.mounts = append(g.mounts, fields[4])
			}
		case "cgroup2":
			v2 = fields[4]
		}
	}
	switch {
	case v2 == "" && len(g.mounts) == 0:
		return nil, errors.New("no cgroup hierarchy is mounted under /sys/fs/cgroup")
	case len(g.mounts) == 0:
		g.unified = true
		g.mounts = []string{v2}
	case v2 != "":
		g.mounts = append(g.mounts, v2)
	}
	return g, nil
}

// create makes a group below the cluster's subtree in every hierarchy, with
// the controllers that a kubelet needs to find in its --cgroup-root, and a leaf
// "daemons" in it: version 2 wants processes in leaves only.
func (g *cgroups) create(group string) error {
	for _, mount := range g.mounts {
		dir := mount
		parts := []string{g.name, group, "daemons"}
		for i, part := range parts {
			if g.unified {
				if err := enableControllers(dir); err != nil && i > 0 {
					return err
				}
			}
			parent := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("making a cgroup of the cluster: %w", err)
			}
			// On version 1 a new cpuset is empty and takes no process.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if g.unified {
					break
				}
				value, err := os.ReadFile(filepath.Join(parent, file))
				if errors.Is(err, fs.ErrNotExist) {
					break
				}
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(dir, file), value, 0o644); err != nil {
					return fmt.Errorf("filling %s of a cgroup: %w", file, err)
				}
			}
		}
	}
	return nil
}

func enableControllers(dir string) error {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0o644); err != nil &&
			slices.Contains([]string{"cpu", "cpuset", "memory", "pids", "io"}, name) {
			return fmt.Errorf("handing the %s controller to the cgroups below %s: %w", name, dir, err)
		}
	}
	return nil
}

// root is the kubelet's --cgroup-root for a group.
func (g *cgroups) root(group string) string { return "/" + g.name + "/" + group }

// daemonDirs are where a process has to write its id to join group.
func (g *cgroups) daemonDirs(group string) []string {
	var out []string
	for _, mount := range g.mounts {
		out = append(out, filepath.Join(mount, g.name, group, "daemons"))
	}
	return out
}

// roots are the subtrees of the cluster that exist.
func (g *cgroups) roots() []string {
	var out []string
	for _, mount := range g.mounts {
		dir := filepath.Join(mount, g.name)
		if _, err := os.Stat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return out
}

// processes lists what lives in the subtree.
func (g *cgroups) processes() []int {
	var out []int
	for _, root := range g.roots() {
		g.walk(root, func(dir string) {
			content, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				return // removed meanwhile
			}
			lines := bufio.NewScanner(bytes.NewReader(content))
			for lines.Scan() {
				if pid, err := strconv.Atoi(lines.Text()); err == nil && pid > 1 {
					out = append(out, pid)
				}
			}
		})
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// walk visits a subtree, parents first.
func (g *cgroups) walk(root string, visit func(dir string)) {
	visit(root)
	entries, err := os.ReadDir(root)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if entry.IsDir() {
			g.walk(filepath.Join(root, entry.Name()), visit)
		}
	}
}

// destroy kills every process of the subtree and removes it.
func (g *cgroups) destroy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for {
		living := g.processes()
		for _, pid := range living {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("killing process %d of the cluster: %w", pid, err)
			}
		}
		if len(living) == 0 && g.remove() {
			return nil
		}
		// A frozen process dies only when thawed; what is not frozen ignores it.
		for _, root := range g.roots() {
			g.walk(root, func(dir string) {
				for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
					path := filepath.Join(dir, file)
					if _, err := os.Stat(path); err == nil {
						_ = os.WriteFile(path, []byte(value), 0o644)
					}
				}
			})
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v or cgroups %v of the cluster are still there %s after they were killed", g.processes(), g.roots(), killTimeout)
		case <-time.After(killPoll):
		}
	}
}

// remove says whether the subtree is gone everywhere.
func (g *cgroups) remove() bool {
	gone := true
	for _, root := range g.roots() {
		var dirs []string
		g.walk(root, func(dir string) { dirs = append(dirs, dir) })
		for _, dir := range slices.Backward(dirs) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				gone = false
			}
		}
	}
	return gone
}
