package k3s

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// killTimeout is how long killed processes may take to be gone: one in an
	// interrupted disk write takes as long as the disk.
	killTimeout = 30 * time.Second
	killPoll    = 50 * time.Millisecond
	// toolTimeout bounds one call of ip or iptables.
	toolTimeout = 20 * time.Second
	// maxRules bounds a dump of iptables rules.
	maxRules = 64 << 20
)

// Data says which of k3s's data Cleanup removes.
type Data int

// Kinds of data.
const (
	// KeepData stops pods and takes the network away, like k3s-killall.sh.
	KeepData Data = iota
	// ClusterData removes what ties the node to its cluster (etcd, authorities,
	// certificates, manifests), and keeps images and the extracted programs: what
	// a founder does whose generation was given to another.
	ClusterData
	// AllData removes everything k3s made, like k3s-uninstall.sh, but no file
	// that bootstrap installed: host.Remove does that.
	AllData
)

// CleanupOptions say what to take away.
type CleanupOptions struct {
	// Paths. Default: DefaultPaths.
	Paths Paths
	Data  Data
	// root is where everything is looked for in tests.
	root string
	// run replaces calling ip and iptables in tests.
	run func(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error)
}

// CleanupReport says what was taken away.
type CleanupReport struct {
	Killed      []int    `json:"killed,omitempty"` // processes
	Unmounted   []string `json:"unmounted,omitempty"`
	Interfaces  []string `json:"interfaces,omitempty"`
	Rules       int      `json:"rules,omitempty"`  // lines of iptables and ip6tables
	Tables      []string `json:"tables,omitempty"` // of nftables
	Directories []string `json:"directories,omitempty"`
}

// Cleanup takes away what k3s leaves when its service has been stopped, which
// must be done before: pods and their shims, mounts, network interfaces and
// rules, and data as the options say. It touches only what is k3s's by its
// path, its containerd socket, or the names that kube-proxy, flannel and the
// bridge plugin use. Everything is tried; failures come joined.
//
// It does what k3s-killall.sh and k3s-uninstall.sh of install.sh do, with three
// differences: shims outside k3s's data directory (those of WebAssembly are) are
// found by the containerd they belong to; nothing is removed through a mount
// that could not be unmounted; and services other than bootstrap's are left alone.
func Cleanup(ctx context.Context, o CleanupOptions) (CleanupReport, error) {
	if o.Paths == (Paths{}) {
		o.Paths = DefaultPaths()
	}
	if o.root == "" {
		o.root = "/"
	}
	if o.run == nil {
		o.run = runTool
	}
	var r CleanupReport
	var errs []error
	for _, step := range []func(context.Context, *CleanupReport) error{o.killProcesses, o.unmount, o.removeInterfaces, o.removeRules, o.removeData} {
		if err := ctx.Err(); err != nil {
			return r, errors.Join(append(errs, err)...)
		}
		errs = append(errs, step(ctx, &r))
	}
	if err := errors.Join(errs...); err != nil {
		return r, fault.New(CodeCleanup, err, "reboot the machine and run bootstrap reset again", "not everything that k3s left could be taken away")
	}
	return r, nil
}

func (o CleanupOptions) at(name string) string { return filepath.Join(o.root, name) }

// process is what of /proc/<pid> decides.
type process struct {
	pid, parent int
	exe         string
	args        []string
}

// ours says whether a process is k3s's: a program of its data directory, or a
// shim of its containerd.
func (o CleanupOptions) ours(p process) bool {
	if strings.HasPrefix(p.exe, o.Paths.DataDir+"/data/") {
		return true
	}
	if len(p.args) == 0 || !strings.HasPrefix(filepath.Base(p.args[0]), "containerd-shim") {
		return false
	}
	return slices.ContainsFunc(p.args[1:], func(arg string) bool { return strings.Contains(arg, RunDir+"/containerd/") })
}

// doomed are the pids of ours and of all that descends from them, which are the
// containers. The caller's own ancestors and itself are spared.
func (o CleanupOptions) doomed(all []process, self int) (pids []int) {
	parents := map[int]int{}
	for _, p := range all {
		parents[p.pid] = p.parent
	}
	spared := map[int]bool{1: true}
	for pid := self; pid > 1 && !spared[pid]; pid = parents[pid] {
		spared[pid] = true
	}
	dead := map[int]bool{}
	for _, p := range all {
		if o.ours(p) {
			dead[p.pid] = true
		}
	}
	for changed := true; changed; {
		changed = false
		for _, p := range all {
			if dead[p.parent] && !dead[p.pid] {
				dead[p.pid], changed = true, true
			}
		}
	}
	for pid := range dead {
		if !spared[pid] {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// processes reads /proc. Those that end meanwhile are left out.
func (o CleanupOptions) processes() ([]process, error) {
	entries, err := os.ReadDir(o.at("/proc"))
	if err != nil {
		return nil, err
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := o.at("/proc/" + e.Name())
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		// "pid (name) state parent ...": the name may have spaces and brackets.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) < 2 || fields[0] == "Z" {
			continue
		}
		p := process{pid: pid}
		p.parent, _ = strconv.Atoi(fields[1])
		p.exe, _ = os.Readlink(dir + "/exe")
		p.exe = strings.TrimSuffix(p.exe, " (deleted)")
		if line, err := os.ReadFile(dir + "/cmdline"); err == nil && len(line) > 0 {
			p.args = strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		}
		out = append(out, p)
	}
	return out, nil
}

func (o CleanupOptions) killProcesses(ctx context.Context, r *CleanupReport) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for {
		all, err := o.processes()
		if err != nil {
			return fmt.Errorf("listing processes: %w", err)
		}
		pids := o.doomed(all, os.Getpid())
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			// A process that ended needs none; one that was killed may take a while.
			if err := unix.Kill(pid, unix.SIGKILL); err == nil && !slices.Contains(r.Killed, pid) {
				r.Killed = append(r.Killed, pid)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v are still there %v after they were killed", pids, killTimeout)
		case <-time.After(killPoll):
		}
	}
}

// mountPrefixes are where k3s, kubelet and CNI plugins mount.
var mountPrefixes = []string{RunDir, "/var/lib/kubelet/pods", "/var/lib/kubelet/plugins", "/run/netns/cni-"}

// mounts are the mount points below the prefixes, innermost first.
func mounts(mountinfo string, prefixes []string) (out []string) {
	for line := range strings.Lines(mountinfo) {
		// proc_pid_mountinfo(5): the fifth field, with octal escapes.
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if slices.ContainsFunc(prefixes, func(prefix string) bool {
			return point == prefix || strings.HasPrefix(point, prefix+"/") || strings.HasSuffix(prefix, "-") && strings.HasPrefix(point, prefix)
		}) {
			out = append(out, point)
		}
	}
	slices.Reverse(out) // later mounts lie over or within earlier ones
	return out
}

// unescape undoes the kernel's \040 for spaces and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func (o CleanupOptions) unmount(_ context.Context, r *CleanupReport) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("listing mounts: %w", err)
	}
	prefixes := make([]string, len(mountPrefixes))
	for i, prefix := range mountPrefixes {
		prefixes[i] = o.at(prefix)
	}
	var errs []error
	for _, point := range mounts(string(info), prefixes) {
		// Lazily: what still holds it open was killed or is about to let go.
		err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // gone with the one above it
			errs = append(errs, fmt.Errorf("unmounting %s: %w", point, err))
			continue
		}
		r.Unmounted = append(r.Unmounted, point)
		if strings.HasPrefix(point, o.at("/run/netns/cni-")) {
			if err := os.Remove(point); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// interfaces are those that k3s's flannel, bridge plugin and kube-proxy make
// (remove_interfaces of install.sh).
var interfaces = []string{"cni0", "flannel.1", "flannel-v6.1", "flannel-wg", "flannel-wg-v6", "kube-ipvs0"}

func (o CleanupOptions) removeInterfaces(ctx context.Context, r *CleanupReport) error {
	var names []string
	// The host's ends of pods that have no process any more.
	if ports, err := os.ReadDir(o.at("/sys/class/net/cni0/brif")); err == nil {
		for _, port := range ports {
			names = append(names, port.Name())
		}
	}
	for _, name := range interfaces {
		if exists(o.at("/sys/class/net/" + name)) {
			names = append(names, name)
		}
	}
	var errs []error
	for _, name := range names {
		if out, err := o.run(ctx, nil, "ip", "link", "delete", name); err != nil && exists(o.at("/sys/class/net/"+name)) {
			errs = append(errs, fmt.Errorf("deleting the interface %s: %w %s", name, err, bytes.TrimSpace(out)))
			continue
		}
		r.Interfaces = append(r.Interfaces, name)
	}
	return errors.Join(errs...)
}

// withoutOurs leaves out the lines of a dump of rules that are kube-proxy's, the
// CNI plugins' or flannel's, as install.sh does.
func withoutOurs(rules []byte) (kept []byte, dropped int) {
	for line := range bytes.Lines(rules) {
		if bytes.Contains(line, []byte("KUBE-")) || bytes.Contains(line, []byte("CNI-")) || bytes.Contains(bytes.ToLower(line), []byte("flannel")) {
			dropped++
			continue
		}
		kept = append(kept, line...)
	}
	return kept, dropped
}

func (o CleanupOptions) removeRules(ctx context.Context, r *CleanupReport) error {
	var errs []error
	for _, family := range []string{"iptables", "ip6tables"} {
		rules, err := o.run(ctx, nil, family+"-save")
		if errors.Is(err, exec.ErrNotFound) {
			continue // k3s brought its own, whose rules in nf_tables go with a reboot
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s-save: %w", family, err))
			continue
		}
		kept, dropped := withoutOurs(rules)
		if dropped == 0 {
			continue
		}
		if out, err := o.run(ctx, kept, family+"-restore"); err != nil {
			errs = append(errs, fmt.Errorf("%s-restore: %w %s", family, err, bytes.TrimSpace(out)))
			continue
		}
		r.Rules += dropped
	}
	return errors.Join(append(errs, o.removeTables(ctx, r))...)
}

// removeTables removes what kube-proxy has in its nftables mode: a table of its
// own for each family.
func (o CleanupOptions) removeTables(ctx context.Context, r *CleanupReport) error {
	tables, err := o.run(ctx, nil, "nft", "list", "tables")
	if errors.Is(err, exec.ErrNotFound) {
		return nil // goes with a reboot
	}
	if err != nil {
		return fmt.Errorf("nft list tables: %w", err)
	}
	var errs []error
	for line := range strings.Lines(string(tables)) {
		// table ip kube-proxy
		words := strings.Fields(line)
		if len(words) != 3 || words[0] != "table" || words[2] != "kube-proxy" {
			continue
		}
		if out, err := o.run(ctx, nil, "nft", "delete", "table", words[1], words[2]); err != nil {
			errs = append(errs, fmt.Errorf("deleting the nftables table %s %s: %w %s", words[1], words[2], err, bytes.TrimSpace(out)))
			continue
		}
		r.Tables = append(r.Tables, words[1]+" "+words[2])
	}
	return errors.Join(errs...)
}

// data are the directories and files of a kind of data.
func (o CleanupOptions) data() []string {
	d := o.Paths.DataDir
	switch o.Data {
	case ClusterData:
		out := []string{d + "/server", o.Paths.Marker, AdminKubeconfig, "/var/lib/cni", "/var/lib/kubelet/pki", RunDir}
		// Of the agent everything but images and containerd's store.
		entries, _ := os.ReadDir(o.at(d + "/agent")) // nothing there is nothing to remove
		for _, e := range entries {
			if e.Name() != "containerd" && e.Name() != "images" {
				out = append(out, d+"/agent/"+e.Name())
			}
		}
		return out
	case AllData:
		return []string{d, AdminKubeconfig, NodePassword, RunDir, "/run/flannel", "/var/lib/cni", "/var/lib/kubelet"}
	}
	return nil
}

func (o CleanupOptions) removeData(_ context.Context, r *CleanupReport) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("listing mounts: %w", err)
	}
	var errs []error
	for _, name := range o.data() {
		dir := o.at(name)
		if !exists(dir) {
			continue
		}
		if inside := slices.DeleteFunc(mounts(string(info), []string{dir}), func(point string) bool { return point == dir }); len(inside) > 0 {
			errs = append(errs, fmt.Errorf("%s stays, because %s is mounted there", dir, inside[0]))
			continue
		}
		if err := removeContents(dir); err != nil {
			errs = append(errs, err)
			continue
		}
		r.Directories = append(r.Directories, name)
	}
	if o.Data == AllData {
		for _, name := range emptied {
			_ = os.Remove(o.at(name)) // stays if it has something of somebody else's
		}
	}
	return errors.Join(errs...)
}

// emptied are directories that k3s and its kubelet make in places of others,
// children first. They go when they are empty.
var emptied = []string{
	filepath.Dir(NodePassword),
	"/usr/libexec/kubernetes/kubelet-plugins/volume/exec", // kubelet's default --volume-plugin-dir
	"/usr/libexec/kubernetes/kubelet-plugins/volume", "/usr/libexec/kubernetes/kubelet-plugins", "/usr/libexec/kubernetes",
}

// removeContents removes a tree. A mount point or link that it is itself (a
// volume of its own for k3s's data) stays, empty.
func removeContents(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Stat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if !target.IsDir() {
			return os.Remove(dir)
		}
	} else if err := os.RemoveAll(dir); err == nil || !errors.Is(err, unix.EBUSY) {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

func runTool(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	program, err := exec.LookPath(name)
	if err != nil {
		// Not in the PATH of every service.
		if program, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			return nil, fmt.Errorf("%s: %w", name, exec.ErrNotFound)
		}
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin, cmd.WaitDelay = bytes.NewReader(stdin), time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil && len(out) > maxRules {
		err = fmt.Errorf("%s printed %d bytes", name, len(out))
	}
	if err != nil {
		return []byte(cmp.Or(strings.TrimSpace(stderr.String()), "")), err
	}
	return out, nil
}
