package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/process"
)

const (
	// bootTimeout is until systemd answers, which takes two or three seconds.
	bootTimeout = 2 * time.Minute
	// powerOffTimeout is for an orderly end; units get 20 s to stop.
	powerOffTimeout = 90 * time.Second
	// prepareTimeout is for the mounts of a machine.
	prepareTimeout = time.Minute
	// execTimeout bounds commands whose context has no deadline.
	execTimeout = 5 * time.Minute
	// cloudInitTimeout bounds WaitCloudInit without a deadline.
	cloudInitTimeout = 10 * time.Minute
	// poll is between two looks at what has no event.
	poll = 100 * time.Millisecond
	// logTail is how many lines of a log DumpLogs writes.
	logTail = 150
	// execPath is that of a root login.
	execPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Machine is one of a network. Its methods may be called at the same time,
// except those that start and stop it.
type Machine struct {
	Name string
	// IP is the address of eth0.
	IP string
	// InstanceID as the metadata service says it.
	InstanceID string
	// IMDS is the machine's metadata service; tests change it and set faults.
	IMDS *imdstest.Server

	network *Network
	n       int
	spec    Spec
	dir     string
	// group has the machine's own processes. Its systemd sees it as the root of
	// the hierarchies, so that two machines on one kernel cannot meet there, and
	// killing it is a loss of power.
	group *process.Cgroups
	aside *process.Cgroups // commands from outside and the holder of its mounts

	stopIMDS context.CancelFunc
	imdsDone chan error

	mu      sync.Mutex // guards what follows
	holder  *exec.Cmd  // keeps the mounts while the machine is off, too
	nspawn  *exec.Cmd
	ended   chan struct{} // closed when nspawn was waited for
	removed bool
}

// Add makes a machine, switched off, and starts its metadata service.
func (n *Network) Add(ctx context.Context, spec Spec) (*Machine, error) {
	if !machineName.MatchString(spec.Name) || n.Machine(spec.Name) != nil {
		return nil, fmt.Errorf("a machine's name must be a DNS label of at most 40 characters that no other has, not %q", spec.Name)
	}
	m := &Machine{Name: spec.Name, network: n, spec: spec, dir: filepath.Join(n.dir, spec.Name)}
	n.mu.Lock()
	m.n = len(n.machines)
	if m.n == maxMachines {
		n.mu.Unlock()
		return nil, fmt.Errorf("a network has at most %d machines in its life", maxMachines)
	}
	n.machines = append(n.machines, m)
	n.mu.Unlock()
	m.IP = machineIP(n.slot, m.n)
	config := m.instance()
	m.InstanceID, m.IMDS = config.InstanceID, imdstest.New(config)
	m.group, m.aside = n.cgroups.Below(m.Name, "machine"), n.cgroups.Below(m.Name, "aside")
	if err := errors.Join(m.group.Create(), m.aside.Create()); err != nil {
		return nil, err
	}
	if err := attach(ctx, n.slot, m.n, config.MAC); err != nil {
		return nil, err
	}
	if err := m.serveIMDS(); err != nil {
		return nil, err
	}
	if err := m.makeDisk(ctx); err != nil {
		return nil, err
	}
	return m, m.mount(ctx)
}

// instance is what the metadata service says.
func (m *Machine) instance() imdstest.Config {
	c := imdstest.Default()
	c.InstanceID = fmt.Sprintf("i-0%04x%012x", os.Getpid()&0xffff, m.network.slot<<8|m.n+1)
	c.LifeCycle, c.Role = "on-demand", ""
	c.InstanceType, c.Architecture = "t4g.xlarge", runtime.GOARCH
	if runtime.GOARCH == "amd64" {
		c.InstanceType, c.Architecture = "m7i.large", "x86_64"
	}
	zone := string("abc"[m.n%3])
	c.Zone, c.ZoneID = c.Region+zone, "euc1-az"+strconv.Itoa(m.n%3+1)
	c.LocalIPv4, c.MAC = m.IP, fmt.Sprintf("02:00:c6:12:%02x:%02x", 100+m.network.slot, 10+m.n)
	c.Hostname = "ip-" + strings.ReplaceAll(m.IP, ".", "-") + "." + c.Region + ".compute.internal"
	c.Tags, c.UserData = m.spec.Tags, m.spec.UserData
	if m.spec.Configure != nil {
		m.spec.Configure(&c)
	}
	return c
}

func (m *Machine) serveIMDS() error {
	ln, err := m.Listen("tcp", metadataIP+":80")
	if err != nil {
		return fmt.Errorf("starting the metadata service of %s: %w", m.Name, err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // until end
	m.stopIMDS, m.imdsDone = cancel, make(chan error, 1)
	go func() { m.imdsDone <- m.IMDS.Serve(ctx, ln) }()
	return nil
}

// InNetNS calls f on a thread in the machine's network; the thread ends with it.
// Sockets that f opens stay there.
func (m *Machine) InNetNS(f func() error) error {
	return process.InNetNS(netnsPath(machineNS(m.network.slot, m.n)), f)
}

// Listen opens a listener in the machine's network.
func (m *Machine) Listen(network, address string) (ln net.Listener, err error) {
	err = m.InNetNS(func() (err error) {
		ln, err = net.Listen(network, address)
		return err
	})
	return ln, err
}

// Dial connects from within the machine's network, to its loopback too.
func (m *Machine) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = m.InNetNS(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// launch is the command of a program in cgroups of the machine, seen from this
// machine.
func launch(g *process.Cgroups, argv ...string) *exec.Cmd {
	var script strings.Builder
	for _, dir := range g.Dirs() {
		fmt.Fprintf(&script, "echo $$ >%s || exit 126\n", process.Quote(filepath.Join(dir, "cgroup.procs")))
	}
	script.WriteString("exec \"$@\"\n")
	return exec.Command("sh", append([]string{"-c", script.String(), "sh"}, argv...)...)
}

// mount makes the machine's file systems in a mount namespace that a process
// holds: they are invisible elsewhere and go with it.
func (m *Machine) mount(ctx context.Context) error {
	ready := filepath.Join(m.dir, "mounted")
	if err := os.RemoveAll(ready); err != nil {
		return err
	}
	script := "set -eu\nmount --make-rprivate /\ncd " + process.Quote(m.dir) + "\nmkdir -p disk root\n"
	if m.spec.Disk > 0 {
		// The file system is what a machine finds after a loss of power: the
		// kernel replays its journal here.
		script += "mount -o loop -t ext4 disk.img disk\n"
	}
	// /var is the disk's own: the snapshots of containers are overlays, which
	// an overlay cannot hold.
	script += "if [ ! -e disk/made ]; then\n" +
		"mkdir -p disk/upper disk/work\n" +
		"rm -rf disk/var\n" +
		"cp -a " + process.Quote(filepath.Join(m.network.root, "var")) + " disk/var\n" +
		"touch disk/made\n" +
		"sync -f disk\n" +
		"fi\n" +
		"mount -t overlay overlay -o lowerdir=" + process.Quote(m.network.root) + ",upperdir=disk/upper,workdir=disk/work root\n" +
		"mount --bind disk/var root/var\n" +
		"touch mounted\n" +
		"exec sleep infinity\n"
	cmd := launch(m.aside, "unshare", "--mount", "--propagation", "private", "sh", "-c", script)
	var said bytes.Buffer // read only after the process ended
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &said, &said, time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("mounting the disk of %s: %w", m.Name, err)
	}
	m.mu.Lock()
	m.holder = cmd
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	for !exists(ready) {
		if !alive(cmd.Process.Pid) {
			_ = cmd.Wait()
			m.mu.Lock()
			m.holder = nil
			m.mu.Unlock()
			return fmt.Errorf("mounting the disk of %s: %s", m.Name, strings.TrimSpace(said.String()))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("mounting the disk of %s takes longer than %s", m.Name, prepareTimeout)
		case <-time.After(poll):
		}
	}
	return nil
}

// alive says whether a child runs; one that ended is a zombie until waited for.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, ok := bytes.Cut(stat, []byte(") "))
	return ok && len(after) > 0 && after[0] != 'Z' && after[0] != 'X'
}

// Path is where this machine sees a file of the machine, whether it runs or
// not. Only the disk is seen so: not /run, /tmp, /proc, /sys, /dev and Binds.
func (m *Machine) Path(path string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.holder == nil {
		return filepath.Join(m.dir, "not-mounted", path)
	}
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.holder.Process.Pid), m.dir, "root", path)
}

// WriteFile writes a file of the machine's disk, with the directories above it.
func (m *Machine) WriteFile(path string, content []byte, mode os.FileMode) error {
	path = m.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, content, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// Boot switches the machine on and returns when its systemd answers. What runs
// at boot, cloud-init first of all, goes on: see WaitCloudInit and WaitBooted.
func (m *Machine) Boot(ctx context.Context) error {
	if m.Running() {
		return fmt.Errorf("%s runs already", m.Name)
	}
	m.mu.Lock()
	holder := m.holder
	m.mu.Unlock()
	if holder == nil {
		if err := m.mount(ctx); err != nil {
			return err
		}
		m.mu.Lock()
		holder = m.holder
		m.mu.Unlock()
	}
	console, err := os.OpenFile(filepath.Join(m.dir, "console.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer console.Close() // the process has its own
	argv := []string{
		"nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", holder.Process.Pid), "--wdns=/",
		"env", "SYSTEMD_SECCOMP=0", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1",
		"systemd-nspawn", "--quiet", "--directory=" + filepath.Join(m.dir, "root"), "--boot", "--register=no", "--keep-unit",
		"--machine=" + fmt.Sprintf("hearthm%d-%d", m.network.slot, m.n), "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
		"--network-namespace-path=" + netnsPath(machineNS(m.network.slot, m.n)), "--capability=all", "--bind=/dev/kmsg",
	}
	for _, device := range []string{"/dev/fuse", "/dev/net/tun"} {
		if exists(device) {
			argv = append(argv, "--bind="+device)
		}
	}
	for to, from := range m.spec.Binds {
		argv = append(argv, "--bind-ro="+from+":"+to)
	}
	cmd := launch(m.group, argv...)
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("booting %s: %w", m.Name, err)
	}
	ended := make(chan struct{})
	go func() { // ends with the machine, at the latest when end kills it
		_ = cmd.Wait() // how a machine ends says nothing
		close(ended)
	}()
	m.mu.Lock()
	m.nspawn, m.ended = cmd, ended
	m.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	state := "no systemd yet"
	for {
		if m.init() != 0 {
			// Exit codes other than 0 come with a word, too.
			out, _ := m.Exec(ctx, "systemctl", "is-system-running")
			switch state = strings.TrimSpace(out); state {
			case "initializing", "starting", "running", "degraded", "maintenance":
				return nil
			}
		}
		select {
		case <-ended:
			return fmt.Errorf("booting %s: the machine ended; its console:\n%s", m.Name, process.TailFile(filepath.Join(m.dir, "console.log"), 20))
		case <-ctx.Done():
			return fmt.Errorf("booting %s: systemd is %q; its console:\n%s", m.Name, state, process.TailFile(filepath.Join(m.dir, "console.log"), 20))
		case <-time.After(poll):
		}
	}
}

// Running says whether the machine is switched on.
func (m *Machine) Running() bool {
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	if ended == nil {
		return false
	}
	select {
	case <-ended:
		return false
	default:
		return true
	}
}

// init is the process id of the machine's systemd as this machine sees it, or
// 0. It changes when the machine reboots itself.
func (m *Machine) init() int {
	m.mu.Lock()
	cmd := m.nspawn
	m.mu.Unlock()
	if cmd == nil {
		return 0
	}
	pid := cmd.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	for word := range strings.FieldsSeq(string(children)) {
		child, err := strconv.Atoi(word)
		if err != nil {
			continue
		}
		// While nspawn sets the container up, its child is nspawn itself.
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child))
		if err == nil && strings.TrimSpace(string(name)) == "systemd" {
			return child
		}
	}
	return 0
}

// Command is a program on the running machine, as root's, not yet started.
// ctx's end kills it. It is not part of any unit: use systemd-run for that.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	argv := append([]string{"nsenter", "-t", strconv.Itoa(m.init()), "-m", "-u", "-i", "-n", "-p", "-C", "--wdns=/", "--", name}, args...)
	like := launch(m.aside, argv...)
	cmd := exec.CommandContext(ctx, like.Path, like.Args[1:]...)
	cmd.Env = []string{execPath, "HOME=/root", "LANG=C.UTF-8"}
	cmd.WaitDelay = time.Second
	return cmd
}

// Exec runs a command on the machine, and returns stdout and stderr as one. The
// error holds them, too.
func (m *Machine) Exec(ctx context.Context, name string, args ...string) (string, error) {
	return m.ExecInput(ctx, nil, name, args...)
}

// ExecInput is Exec with a standard input.
func (m *Machine) ExecInput(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	if m.init() == 0 {
		return "", fmt.Errorf("%s on %s: the machine does not run", name, m.Name)
	}
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, execTimeout)
		defer cancel()
		ctx = bounded
	}
	cmd := m.Command(ctx, name, args...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s on %s: %w\n%s", name, strings.Join(args, " "), m.Name, err, bytes.TrimSpace(out))
	}
	return string(out), err
}

// Journal returns the journal of this boot, of one unit or of all ("").
func (m *Machine) Journal(ctx context.Context, unit string) (string, error) {
	args := []string{"--no-pager", "--boot", "--output=short-precise"}
	if unit != "" {
		args = append(args, "--unit="+unit)
	}
	return m.Exec(ctx, "journalctl", args...)
}

// WaitFor looks until something is so. The condition's error ends the wait; a
// context without a deadline has one of five minutes.
func (m *Machine) WaitFor(ctx context.Context, what string, so func(context.Context) (bool, error)) error {
	if _, ok := ctx.Deadline(); !ok {
		bounded, cancel := context.WithTimeout(ctx, execTimeout)
		defer cancel()
		ctx = bounded
	}
	for {
		ok, err := so(ctx)
		if err != nil {
			return fmt.Errorf("waiting on %s for %s: %w", m.Name, what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting on %s for %s: %w", m.Name, what, context.Cause(ctx))
		case <-time.After(poll):
		}
	}
}

// WaitUnit waits until a unit is in a state ("active", "failed", "inactive").
func (m *Machine) WaitUnit(ctx context.Context, unit, state string) error {
	var last string
	err := m.WaitFor(ctx, unit+" to be "+state, func(ctx context.Context) (bool, error) {
		out, _ := m.Exec(ctx, "systemctl", "show", "--value", "--property=ActiveState", unit)
		last = strings.TrimSpace(out)
		return last == state, nil
	})
	if err != nil {
		return fmt.Errorf("%w; it is %q", err, last)
	}
	return nil
}

// WaitCloudInit waits until cloud-init ended, and returns an error with the end
// of its output when a part of it failed.
func (m *Machine) WaitCloudInit(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cloudInitTimeout)
	defer cancel()
	err := m.WaitFor(ctx, "cloud-init to end", func(ctx context.Context) (bool, error) {
		_, err := m.Exec(ctx, "test", "-e", "/run/cloud-init/result.json")
		return err == nil, nil
	})
	if err != nil {
		return err
	}
	result, err := m.Exec(ctx, "cat", "/run/cloud-init/result.json")
	if err != nil {
		return err
	}
	if !strings.Contains(strings.Join(strings.Fields(result), ""), `"errors":[]`) {
		said, _ := m.Exec(ctx, "tail", "-n", "40", "/var/log/cloud-init-output.log")
		return fmt.Errorf("cloud-init on %s failed: %s\n%s", m.Name, strings.TrimSpace(result), said)
	}
	return nil
}

// WaitBooted waits until every unit of the boot was started, or failed.
func (m *Machine) WaitBooted(ctx context.Context) error {
	return m.WaitFor(ctx, "the end of its boot", func(ctx context.Context) (bool, error) {
		out, _ := m.Exec(ctx, "systemctl", "is-system-running")
		state := strings.TrimSpace(out)
		return state == "running" || state == "degraded", nil
	})
}

// PowerOff shuts the machine down in order.
func (m *Machine) PowerOff(ctx context.Context) error {
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	if !m.Running() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, powerOffTimeout)
	defer cancel()
	if _, err := m.Exec(ctx, "systemctl", "--no-block", "poweroff"); err != nil {
		return err
	}
	select {
	case <-ended:
		return m.group.Kill(ctx) // what units left behind
	case <-ctx.Done():
		return fmt.Errorf("%s did not power off within %s; its console:\n%s", m.Name, powerOffTimeout, process.TailFile(filepath.Join(m.dir, "console.log"), 20))
	}
}

// Kill ends every process of the machine at once. Its disk keeps all that was
// written, as when only the operating system crashes no worse than that; for
// the harder case see CutPower.
func (m *Machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	if err := m.group.Kill(ctx); err != nil {
		return err
	}
	if ended != nil {
		<-ended // killed
	}
	return nil
}

// Remove ends the machine for good, as terminating an instance does. A second
// time it does nothing.
func (m *Machine) Remove(ctx context.Context) error {
	m.mu.Lock()
	removed := m.removed
	m.removed = true
	m.mu.Unlock()
	if removed {
		return nil
	}
	if err := m.end(ctx); err != nil {
		return err
	}
	if err := detach(ctx, m.network.slot, m.n); err != nil {
		return err
	}
	return os.RemoveAll(m.dir)
}

// end kills everything of the machine, holder and metadata service included. It
// may be called twice.
func (m *Machine) end(ctx context.Context) error {
	var errs []error
	if m.group != nil {
		errs = append(errs, m.Kill(ctx))
	}
	if m.aside != nil {
		errs = append(errs, m.release(ctx))
	}
	m.mu.Lock()
	stop := m.stopIMDS
	m.stopIMDS = nil
	m.mu.Unlock()
	if stop != nil {
		stop()
		errs = append(errs, <-m.imdsDone)
	}
	return errors.Join(errs...)
}

// release ends the holder of the mounts, and with it the mounts.
func (m *Machine) release(ctx context.Context) error {
	err := m.aside.Kill(ctx)
	m.mu.Lock()
	holder := m.holder
	m.holder = nil
	m.mu.Unlock()
	if holder != nil && err == nil {
		_ = holder.Wait() // killed
	}
	return err
}

// DumpLogs writes the end of the machine's journal, or of its console when it
// does not run.
func (m *Machine) DumpLogs(w io.Writer) {
	fmt.Fprintf(w, "--- console of %s\n%s\n", m.Name, process.TailFile(filepath.Join(m.dir, "console.log"), 20))
	if m.init() == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	journal, _ := m.Exec(ctx, "journalctl", "--no-pager", "--boot", "--output=short-precise", "--lines="+strconv.Itoa(logTail))
	fmt.Fprintf(w, "--- journal of %s\n%s\n", m.Name, journal)
	said, _ := m.Exec(ctx, "tail", "-n", strconv.Itoa(logTail), "/var/log/cloud-init-output.log")
	fmt.Fprintf(w, "--- cloud-init of %s\n%s\n", m.Name, said)
}

// SetUserData changes what the instance was launched with, before its first boot.
func (m *Machine) SetUserData(text string) {
	m.IMDS.Update(func(c *imdstest.Config) { c.UserData = text })
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }
