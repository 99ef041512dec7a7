package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/paths"
)

const (
	// doctorStepWait bounds each check: none has a reason to take longer, and
	// a resolver that hangs is a finding.
	doctorStepWait = 3 * time.Second
	// A disk with less than lowDisk is worth a warning (a module, its image
	// and its compiled form take up to some 300 MiB); below minDisk submits fail.
	lowDisk = 2 << 30
	minDisk = 200 << 20
	// minFiles is what one engine with a hundred busy functions needs.
	minFiles = 1024
)

// finding is the result of one check of doctor.
type finding struct {
	Code string `json:"code"`
	// State is ok, warning, broken or skipped.
	State   string `json:"state"`
	Message string `json:"message"`
	// Why says what depends on it.
	Why    string `json:"why"`
	Remedy string `json:"remedy,omitempty"`
}

const (
	findingOK      = "ok"
	findingWarning = "warning"
	findingBroken  = "broken"
	findingSkipped = "skipped"
)

// diagnosis is what `doctor -o json` prints.
type diagnosis struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"` // "Diagnosis"
	State      string    `json:"state"`
	Findings   []finding `json:"findings"`
}

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "check this machine and say what to do about what is wrong",
		Description: "Looks at the kernel, limits, disk, data directory, clock, port, name resolution and the Go toolchain, then at the running " +
			"agent, engine and API. On a node of a cluster it looks at containerd, each runtime, the agent's identity, the startup taint, instance metadata " +
			"and the disk of images instead of what only a laptop needs. It changes nothing. The exit code is 0 when there is nothing to do, 3 with warnings, " +
			"4 when something is broken.",
		Flags: append(socketFlags(),
			&cli.StringFlag{Name: "base-domain", Value: "localhost", EnvVars: []string{"HEARTH_BASE_DOMAIN"}, Usage: "`DOMAIN` under which functions have their names"},
			&cli.StringFlag{Name: "containerd-socket", EnvVars: []string{"HEARTH_CONTAINERD_SOCKET"}, Usage: "`PATH` of containerd's socket, as the agent was told"},
			&cli.StringFlag{Name: "kubeconfig", EnvVars: []string{"HEARTH_KUBECONFIG"}, Usage: "`FILE` of the kubelet's identity, as the agent was told"},
			&cli.StringFlag{Name: "tainter-kubeconfig", EnvVars: []string{"HEARTH_TAINTER_KUBECONFIG"}, Usage: "`FILE` of the identity for taints, as the agent was told"},
			&cli.StringFlag{Name: "node-name", EnvVars: []string{"NODE_NAME"}, Usage: "name of this node (default: what the agent says)"},
			&cli.StringFlag{Name: "host-root", EnvVars: []string{"HEARTH_HOST_ROOT"}, Value: "/", Usage: "`DIR` at which the host's file system is seen"},
			&cli.StringFlag{Name: "imds", EnvVars: []string{"HEARTH_IMDS"}, Value: "auto", Usage: "ask the instance metadata service: on, off, or auto (its absence is no finding where this does not look like EC2)"},
			urlFlag(), outputFlag()),
		Action: action(doctorAction),
	}
}

func doctorAction(c *cli.Context) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	d := &doctor{socket: agentSocket(c), dataDir: c.String("data-dir"), baseDomain: c.String("base-domain"), now: nowOf(c), explicitURL: c.IsSet("url")}
	d.node = nodeOptions{
		hostRoot: c.String("host-root"), containerdSocket: c.String("containerd-socket"), kubeconfig: c.String("kubeconfig"),
		tainter: c.String("tainter-kubeconfig") != "", imds: c.String("imds"), nodeName: c.String("node-name"),
		inPod: os.Getenv("KUBERNETES_SERVICE_HOST") != "",
	}
	if i := d.node.imds; i != "auto" && i != "on" && i != "off" {
		return usageError("--imds %q is not on, off or auto", i)
	}
	if d.node.kubeconfig == "" {
		d.node.kubeconfig = firstFile(kubeletKubeconfigs)
	}
	var systemDir string
	systemDir, d.system = systemDataDir(d.socket)
	if d.dataDir == "" {
		if d.dataDir = systemDir; !d.system {
			d.dataDir = paths.DataDir()
		}
	}
	if d.client, err = machineClient(c); err != nil {
		return err
	}
	defer d.client.Close()
	if d.url, err = url.Parse(d.client.URL()); err != nil {
		return err
	}
	p := newProgress(c.App.ErrWriter, true)
	result := diagnosis{APIVersion: v1alpha1.APIVersion, Kind: "Diagnosis", State: findingOK}
	d.look(c.Context)
	for _, check := range d.checks() {
		p.start("checking " + check.code)
		ctx, cancel := context.WithTimeout(c.Context, doctorStepWait)
		f := check.run(ctx)
		cancel()
		if err := c.Context.Err(); err != nil {
			p.stop()
			return err
		}
		f.Code, f.Why = check.code, check.why
		result.Findings = append(result.Findings, f)
		if f.State == findingBroken || f.State == findingWarning && result.State == findingOK {
			result.State = f.State
		}
	}
	p.stop()
	if asJSON {
		err = printJSON(c.App.Writer, result)
	} else {
		printDiagnosis(c.App.Writer, result)
	}
	switch {
	case err != nil:
		return err
	case result.State == findingWarning:
		return cli.Exit("", exitDegraded)
	case result.State == findingBroken:
		return cli.Exit("", exitFailed)
	}
	return nil
}

func printDiagnosis(w io.Writer, d diagnosis) {
	t := terminalOf(w)
	todo := 0
	for _, f := range d.Findings {
		fprintf(w, "%s %-14s %s\n", t.paint(stateColour(f.State), fmt.Sprintf("%-8s", f.State)), f.Code, printable(f.Message))
		if f.State == findingOK || f.State == findingSkipped {
			continue
		}
		todo++
		fprintf(w, "%24swhy: %s\n", "", f.Why)
		if f.Remedy != "" {
			fprintf(w, "%24sto do: %s\n", "", printable(f.Remedy))
		}
	}
	if todo == 0 {
		fprintf(w, "\nNothing to do.\n")
		return
	}
	fprintf(w, "\n%s to look at.\n", plural(todo, "finding"))
}

// doctor is what the checks look at.
type doctor struct {
	socket, dataDir, baseDomain string
	url                         *url.URL
	client                      *client.Client
	now                         time.Time

	explicitURL bool
	// system is whether the agent is a service of the machine, rather than a
	// part of `nodeagent dev`.
	system bool
	node   nodeOptions

	// status is the agent's word; nil where statusErr says why there is none.
	status    *v1alpha1.NodeStatus
	statusErr error
	// Found by one check, used by later ones.
	apiReady bool
	apiThere bool
}

type doctorCheck struct {
	code, why string
	run       func(context.Context) finding
}

// look asks the agent: what it says decides which checks there are.
func (d *doctor) look(ctx context.Context) {
	status, _, err := readStatus(ctx, d.socket)
	if err != nil {
		d.statusErr = err
		return
	}
	d.status = &status
}

func (d *doctor) checks() []doctorCheck {
	checks := []doctorCheck{
		{"landlock", "it keeps workers from every file but the compiled functions", d.landlock},
		{"seccomp", "it keeps workers from system calls they have no use for", d.seccomp},
		{"memory", "guests' memory is reserved at its limit and used as it grows", d.overcommit},
		{"files", "every request and instance needs some file descriptors", d.files},
		{"data-directory", "functions, artifacts and compiled code are kept there, for its owner only", d.dataDirectory},
		{"disk", "a module is stored as uploaded, as published and as compiled", d.disk},
		{"clock", "revisions, logs and certificates are ordered and judged by time", d.clock},
	}
	// What is submitted on a laptop is submitted elsewhere for a node.
	laptop := !d.system && !d.isCluster()
	if laptop {
		checks = append(checks, doctorCheck{"go", "`nodeagent submit DIR` builds Go modules with it", d.goToolchain})
	}
	checks = append(checks,
		doctorCheck{"agent", "it pulls, compiles and watches functions on this machine", d.agent},
		doctorCheck{"engine", "it answers requests to functions", d.engine})
	if laptop || d.explicitURL {
		checks = append(checks, doctorCheck{"api", "functions are submitted to it and listed by it", d.api})
	}
	if laptop {
		checks = append(checks,
			doctorCheck{"port", "the API and the functions answer there", d.port},
			doctorCheck{"base-domain", "functions have names such as http://hello." + d.baseDomain + "/", d.resolve})
	}
	checks = append(checks, d.nodeChecks()...)
	return append(checks, d.failingChecks(checks)...)
}

func ok(format string, args ...any) finding {
	return finding{State: findingOK, Message: fmt.Sprintf(format, args...)}
}

func warning(remedy, format string, args ...any) finding {
	return finding{State: findingWarning, Message: fmt.Sprintf(format, args...), Remedy: remedy}
}

func broken(remedy, format string, args ...any) finding {
	return finding{State: findingBroken, Message: fmt.Sprintf(format, args...), Remedy: remedy}
}

func skipped(format string, args ...any) finding {
	return finding{State: findingSkipped, Message: fmt.Sprintf(format, args...)}
}

func (d *doctor) landlock(context.Context) finding {
	var uname unix.Utsname
	_ = unix.Uname(&uname)
	kernel := "Linux " + unix.ByteSliceToString(uname.Release[:])
	// With no attributes and this flag the call only tells the version; see
	// landlock_create_ruleset(2).
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errno == 0:
		return ok("%s has Landlock (ABI %d)", kernel, abi)
	case errno == unix.EOPNOTSUPP:
		return warning("add landlock to the kernel's lsm= parameter", "%s has Landlock, but it is switched off", kernel)
	}
	return warning("use a kernel from 5.13 on with CONFIG_SECURITY_LANDLOCK", "%s has no Landlock (%v)", kernel, errno)
}

func (d *doctor) seccomp(context.Context) finding {
	actions, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	switch {
	case err != nil:
		return warning("use a kernel with CONFIG_SECCOMP_FILTER", "seccomp filters cannot be seen: %v", err)
	case !strings.Contains(string(actions), "kill_process"):
		return warning("use a kernel from 4.14 on", "the kernel's seccomp filters cannot kill a process")
	}
	return ok("the kernel has seccomp filters")
}

func (d *doctor) overcommit(context.Context) finding {
	mode, err := os.ReadFile("/proc/sys/vm/overcommit_memory")
	if err != nil {
		return skipped("the overcommit policy cannot be read: %v", err)
	}
	if strings.TrimSpace(string(mode)) == "2" {
		return warning("set vm.overcommit_memory to 0 or 1 with sysctl, or keep limits of functions small", "the kernel refuses reservations beyond its memory (vm.overcommit_memory = 2)")
	}
	return ok("memory can be reserved without being used")
}

func (d *doctor) files(context.Context) finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return skipped("the limit of open files cannot be read: %v", err)
	}
	if limit.Max < minFiles {
		return warning("raise the hard limit of open files (ulimit -Hn)", "a process may have %d files open, which is few", limit.Max)
	}
	return ok("a process may have %d files open", limit.Max)
}

func (d *doctor) dataDirectory(context.Context) finding {
	info, err := os.Stat(d.dataDir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		// Its nearest parent decides whether it can be made.
		parent := existingParent(d.dataDir)
		if unix.Access(parent, unix.W_OK|unix.X_OK) != nil {
			return broken("choose another one with --data-dir", "%s does not exist and cannot be made: %s cannot be written to", d.dataDir, parent)
		}
		return ok("%s will be made when first needed", d.dataDir)
	case err != nil:
		return broken("run as its owner or choose another one with --data-dir", "%v", err)
	case !info.IsDir():
		return broken("move it away or choose another one with --data-dir", "%s is not a directory", d.dataDir)
	case info.Mode().Perm()&0o022 != 0:
		return broken("chmod go-w "+d.dataDir, "others can write to %s (mode %04o)", d.dataDir, info.Mode().Perm())
	case d.system && os.Getuid() != 0:
		return ok("%s can be written to by its owner only", d.dataDir)
	case unix.Access(d.dataDir, unix.W_OK|unix.X_OK) != nil:
		return broken("run as its owner or choose another one with --data-dir", "%s cannot be written to by user %d", d.dataDir, os.Getuid())
	}
	return ok("%s can be written to by its owner only", d.dataDir)
}

func existingParent(path string) string {
	for {
		parent := filepath.Dir(path)
		if _, err := os.Stat(parent); err == nil || parent == path {
			return parent
		}
		path = parent
	}
}

func (d *doctor) disk(context.Context) finding {
	dir := d.dataDir
	if _, err := os.Stat(dir); err != nil {
		dir = existingParent(dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return skipped("free space of %s cannot be read: %v", dir, err)
	}
	free := fs.Bavail * uint64(fs.Bsize)
	remedy := "free some space, or choose another --data-dir"
	switch {
	case free < minDisk:
		return broken(remedy, "only %s are free at %s", humanBytes(free), dir)
	case free < lowDisk:
		return warning(remedy, "only %s are free at %s", humanBytes(free), dir)
	case fs.Files > 0 && fs.Ffree < 10_000:
		return warning("remove small files, or choose another --data-dir", "only %d inodes are free at %s", fs.Ffree, dir)
	}
	return ok("%s are free at %s", humanBytes(free), dir)
}

func (d *doctor) clock(context.Context) finding {
	// The executable cannot be younger than now.
	exe, err := os.Executable()
	if err == nil {
		if info, err := os.Stat(exe); err == nil && info.ModTime().After(d.now.Add(time.Hour)) {
			return broken("set the clock, and let NTP keep it (timedatectl set-ntp true)", "the clock says %s, before this program was installed", d.now.UTC().Format(time.RFC3339))
		}
	}
	var timex unix.Timex
	if state, err := unix.Adjtimex(&timex); err == nil && state == unix.TIME_ERROR {
		return ok("the clock says %s (the kernel does not know of any synchronisation)", d.now.UTC().Format(time.RFC3339))
	}
	return ok("the clock says %s and is synchronised", d.now.UTC().Format(time.RFC3339))
}

func (d *doctor) goToolchain(ctx context.Context) finding {
	goTool, err := exec.LookPath("go")
	if err != nil {
		return warning("install Go from https://go.dev/dl/, or submit .wasm files only", "the go command is not in PATH")
	}
	version, err := exec.CommandContext(ctx, goTool, "env", "GOVERSION").Output()
	if err != nil {
		return warning("run `go version` and see what it says", "%s does not work: %v", goTool, err)
	}
	v := strings.TrimSpace(string(version))
	if minor, err := strconv.Atoi(firstNumber(strings.TrimPrefix(v, "go1."))); err == nil && minor < 21 {
		return warning("install a newer Go from https://go.dev/dl/", "%s cannot build for wasip1; Go 1.21 and later can", v)
	}
	return ok("%s is at %s", v, goTool)
}

func firstNumber(s string) string {
	end := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		return s
	}
	return s[:end]
}

func (d *doctor) agent(context.Context) finding {
	if d.status == nil {
		message, _, _ := strings.Cut(d.statusErr.Error(), "\n")
		_, statErr := os.Lstat(d.socket)
		switch {
		case errors.Is(statErr, os.ErrNotExist):
			return warning(d.startRemedy(), "no agent runs here: there is no socket %s", d.socket)
		case unix.Access(d.socket, unix.W_OK) == unix.EACCES:
			return broken("run doctor as the user that the agent runs as (root for a system service)", "user %d may not ask the agent on %s", os.Getuid(), d.socket)
		}
		return broken(d.restartRemedy(), "%s", message)
	}
	status := d.status
	if status.State == v1alpha1.NodeHealthy {
		return ok("the agent answers: %s", status.Summary)
	}
	remedy := "`nodeagent status` shows every check"
	for _, check := range status.Checks {
		if check.State != v1alpha1.CheckOK && check.Remedy != "" {
			remedy = check.Remedy
			break
		}
	}
	if status.State == v1alpha1.NodeDegraded {
		return warning(remedy, "the agent answers, the node is degraded: %s", status.Summary)
	}
	return broken(remedy, "the agent answers, the node is failed: %s", status.Summary)
}

func (d *doctor) engine(context.Context) finding {
	switch {
	case d.status == nil:
		return skipped("only the agent could tell")
	case d.status.Engine == nil && (d.system || d.isCluster()):
		return skipped("the agent has nothing for an engine here")
	case d.status.Engine == nil:
		return warning("look again in a moment, then at the engine's log", "the agent does not know how the engine is")
	case !d.status.Engine.Reachable:
		return broken("restart nodeagent; the engine's log says why it stopped", "the engine does not answer the agent")
	}
	return ok("the engine answers, with %s", plural(len(d.status.Engine.Workers), "worker"))
}

func (d *doctor) api(ctx context.Context) finding {
	err := d.client.Ready(ctx)
	var problem *client.ProblemError
	switch {
	case err == nil:
		d.apiReady, d.apiThere = true, true
		return ok("the API at %s is ready", d.client.URL())
	case errors.As(err, &problem) && problem.Status == 503:
		d.apiThere = true
		return broken("see `nodeagent status`", "the API at %s is not ready: %s", d.client.URL(), problem)
	case errors.As(err, &problem):
		return broken("stop the other program, or say where the API is with --api", "what answers at %s is not Hearth's API: %s", d.client.URL(), problem)
	case d.status == nil && refusedText(err):
		return warning("start it with `nodeagent dev`, or say where it is with --api", "nothing answers at %s", d.client.URL())
	}
	return broken("start it with `nodeagent dev`, or say where it is with --api", "%v", err)
}

func refusedText(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

func (d *doctor) port(ctx context.Context) finding {
	address := d.url.Host
	if d.url.Scheme != "http" && d.url.Scheme != "https" || d.url.Port() == "" || !isLoopback(d.url.Hostname()) {
		return skipped("%s is not a port of this machine", d.client.URL())
	}
	if d.apiThere {
		return ok("%s is held by Hearth's API", address)
	}
	var config net.ListenConfig
	ln, err := config.Listen(ctx, "tcp", address)
	if err == nil {
		_ = ln.Close()
		return ok("%s is free", address)
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return broken("choose another address with `nodeagent dev --listen`", "%s cannot be listened on: %v", address, err)
	}
	who := "another program (of another user, perhaps)"
	if port, err := strconv.Atoi(d.url.Port()); err == nil {
		if holder := portHolder(uint16(port)); holder != "" {
			who = holder
		}
	}
	return broken("stop it, or choose another address with `nodeagent dev --listen 127.0.0.1:PORT` and --api", "%s is in use by %s", address, who)
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// portHolder names the process that listens on a TCP port, as far as this user
// may know: proc_pid_net(5) gives the socket's inode, /proc/PID/fd who has it.
func portHolder(port uint16) string {
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		scanner := bufio.NewScanner(f)
		for scanner.Scan() {
			if inode, ok := listeningInode(scanner.Text(), port); ok {
				inodes["socket:["+inode+"]"] = true
			}
		}
		_ = f.Close()
	}
	if len(inodes) == 0 {
		return ""
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && inodes[to] {
			pid := strings.Split(link, "/")[2]
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("process %s (%s)", pid, printable(strings.TrimSpace(string(name))))
		}
	}
	return ""
}

// listeningInode reads one line of /proc/net/tcp: "sl local_address
// rem_address st … inode …", addresses in hexadecimal, state 0A listening.
func listeningInode(line string, port uint16) (inode string, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[3] != "0A" {
		return "", false
	}
	_, hexPort, found := strings.Cut(fields[1], ":")
	n, err := strconv.ParseUint(hexPort, 16, 16)
	return fields[9], found && err == nil && uint16(n) == port
}

func (d *doctor) resolve(ctx context.Context) finding {
	host := "hello." + d.baseDomain
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if d.baseDomain != "localhost" {
		if err != nil {
			return broken("point *."+d.baseDomain+" at this machine, or use a base domain such as 192.0.2.1.nip.io with its own address", "%s does not resolve: %v", host, err)
		}
		return ok("%s resolves to %v", host, addresses)
	}
	if err != nil {
		// Nothing is wrong: browsers and curl know *.localhost themselves
		// (RFC 6761, section 6.3), whatever the resolver says.
		return ok("%s is known to browsers and curl only; other programs reach a function at %s/f/NAME/", host, d.client.URL())
	}
	for _, address := range addresses {
		if !address.IsLoopback() {
			return broken("take "+host+" out of /etc/hosts or the resolver that answers so", "%s resolves to %v, which is not this machine", host, address)
		}
	}
	return ok("%s resolves to this machine", host)
}
