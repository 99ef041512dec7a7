package process

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

// Cgroups is one subtree in every cgroup hierarchy of this machine. What is
// started below it stays below it, so that ending the subtree ends all of it.
type Cgroups struct {
	// mounts are the mount points: one per controller on version 1 (plus the
	// named and the version 2 ones that stand beside them), one on version 2.
	mounts []string
	// unified says that version 2 has the controllers.
	unified bool
	// name is the subtree, relative to each mount point.
	name string
}

// FindCgroups names a subtree, relative to the roots of the hierarchies. It
// need not exist.
func FindCgroups(name string) (*Cgroups, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	g := &Cgroups{name: name}
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
			seen[kind[2]] = true // one hierarchy may be mounted twice, as cpu and as cpu,cpuacct
			g.mounts = append(g.mounts, fields[4])
		case kind[0] == "cgroup2":
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

// Below names a subtree of this one.
func (g *Cgroups) Below(parts ...string) *Cgroups {
	below := *g
	below.name = filepath.Join(append([]string{g.name}, parts...)...)
	return &below
}

// Path is the subtree's in each hierarchy, as a kubelet's --cgroup-root.
func (g *Cgroups) Path() string { return "/" + g.name }

// Dirs are the subtree's directories, one per hierarchy. A process joins by
// writing its id to cgroup.procs of each.
func (g *Cgroups) Dirs() []string {
	var out []string
	for _, mount := range g.mounts {
		out = append(out, filepath.Join(mount, g.name))
	}
	return out
}

// Existing are those of Dirs that exist.
func (g *Cgroups) Existing() []string {
	return slices.DeleteFunc(g.Dirs(), func(dir string) bool { _, err := os.Stat(dir); return err != nil })
}

// Create makes the subtree and those above it, ready for processes: with the
// controllers that a kubelet needs to find. Version 2 wants processes in leaves
// only, so that what is created below it later must come before its processes.
func (g *Cgroups) Create() error {
	for _, mount := range g.mounts {
		parent := mount
		for part := range strings.SplitSeq(g.name, "/") {
			if g.unified {
				// What the root lacks, everyone on this machine lacks.
				if err := handDown(parent); err != nil && parent != mount {
					return err
				}
			}
			child := filepath.Join(parent, part)
			if err := os.Mkdir(child, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("making a cgroup for a test: %w", err)
			}
			if !g.unified {
				if err := inheritCPUs(parent, child); err != nil {
					return err
				}
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
	return os.WriteFile(filepath.Join(child, "cgroup.clone_children"), []byte("1"), 0o644)
}

// handDown gives the groups below dir every controller that dir has.
func handDown(dir string) error {
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

// Processes lists what lives in the subtree.
func (g *Cgroups) Processes() []int {
	var out []int
	g.walk(func(dir string) {
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
	slices.Sort(out)
	return slices.Compact(out)
}

// walk visits the subtree in every hierarchy, parents first.
func (g *Cgroups) walk(visit func(dir string)) {
	for _, dir := range g.Dirs() {
		walk(dir, visit)
	}
}

func walk(dir string, visit func(dir string)) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // gone
	}
	visit(dir)
	for _, entry := range entries {
		if entry.IsDir() {
			walk(filepath.Join(dir, entry.Name()), visit)
		}
	}
}

// Kill ends every process of the subtree at once and waits until they are gone.
func (g *Cgroups) Kill(ctx context.Context) error {
	return g.killUntil(ctx, func() bool { return true })
}

// Destroy kills every process of the subtree and removes it.
func (g *Cgroups) Destroy(ctx context.Context) error { return g.killUntil(ctx, g.remove) }

// remove says whether the subtree is gone everywhere.
func (g *Cgroups) remove() bool {
	gone := true
	var dirs []string
	g.walk(func(dir string) { dirs = append(dirs, dir) })
	for _, dir := range slices.Backward(dirs) {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			gone = false
		}
	}
	return gone
}

// killUntil kills until no process is left and done says so, too.
func (g *Cgroups) killUntil(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for {
		living := g.Processes()
		for _, pid := range living {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("killing process %d of a test: %w", pid, err)
			}
		}
		if len(living) == 0 && done() {
			return nil
		}
		// A frozen process dies only when thawed; what is not frozen ignores it.
		g.walk(func(dir string) {
			for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
				path := filepath.Join(dir, file)
				if _, err := os.Stat(path); err == nil {
					_ = os.WriteFile(path, []byte(value), 0o644)
				}
			}
		})
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v or cgroups %v of a test are still there %s after they were killed", g.Processes(), g.Existing(), killTimeout)
		case <-time.After(killPoll):
		}
	}
}
