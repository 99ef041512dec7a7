package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// ModulesFile makes systemd-modules-load load the modules at every boot
	// (modules-load.d(5)).
	ModulesFile = "/etc/modules-load.d/hearth.conf"
	// SysctlFile makes systemd-sysctl set the sysctls at every boot
	// (sysctl.d(5)). 90: after the distribution's, before an administrator's 99.
	SysctlFile = "/etc/sysctl.d/90-hearth.conf"

	// modprobeTimeout bounds loading one module, which takes milliseconds
	// unless its hardware is being waited for.
	modprobeTimeout = 20 * time.Second
)

// Module is a kernel module to load.
type Module struct {
	Name   string
	Reason string
}

// Sysctl is a kernel setting.
type Sysctl struct {
	// Key has dots: net.ipv4.ip_forward.
	Key   string
	Value string
	// AtLeast leaves a larger number alone.
	AtLeast bool
	Reason  string
}

// Kernel is what the kernel must have and be set to.
type Kernel struct {
	Modules []Module
	Sysctls []Sysctl
}

// DefaultKernel is what every node gets. k3s loads and sets the first of each
// itself, but without telling why it fails; the limits of inotify are what a
// node with many pods runs into first.
func DefaultKernel() Kernel {
	return Kernel{
		Modules: []Module{
			{"overlay", "containerd's snapshots of images"},
			{"br_netfilter", "services for pods on the same bridge"},
		},
		Sysctls: []Sysctl{
			{Key: "net.ipv4.ip_forward", Value: "1", Reason: "pods' packets are routed"},
			{Key: "net.bridge.bridge-nf-call-iptables", Value: "1", Reason: "services for pods on the same bridge"},
			{Key: "fs.inotify.max_user_instances", Value: "8192", AtLeast: true, Reason: "each container watches files of its own"},
			{Key: "fs.inotify.max_user_watches", Value: "524288", AtLeast: true, Reason: "each container watches files of its own"},
		},
	}
}

// With adds a configuration's modules and sysctls, which replace those with the
// same name.
func (k Kernel) With(modules []string, sysctls map[string]string) Kernel {
	out := Kernel{slices.Clone(k.Modules), slices.Clone(k.Sysctls)}
	for _, name := range modules {
		if !slices.ContainsFunc(out.Modules, func(m Module) bool { return moduleName(m.Name) == moduleName(name) }) {
			out.Modules = append(out.Modules, Module{name, "host.modules"})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(sysctls)) {
		s := Sysctl{Key: key, Value: sysctls[key], Reason: "host.sysctls"}
		if i := slices.IndexFunc(out.Sysctls, func(s Sysctl) bool { return s.Key == key }); i >= 0 {
			out.Sysctls[i] = s
		} else {
			out.Sysctls = append(out.Sysctls, s)
		}
	}
	return out
}

// moduleName is how the kernel spells a name: it takes - and _ for the same.
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }

func validModule(name string) bool {
	return name != "" && len(name) < 64 && name[0] != '-' && name[0] != '.' &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") == ""
}

// sysctlPath is the file of a key. Like sysctl(8): the first separator decides
// which of . and / separates, and the other one is swapped, so that an
// interface's name may contain a dot (net/ipv4/conf/eth0.1/forwarding).
func sysctlPath(key string) (string, error) {
	p := key
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		p = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	if p == "" || len(p) > 256 || strings.ContainsAny(p, "\x00\n\\ =#;") || path.Clean("/"+p) != "/"+p {
		return "", fmt.Errorf("%q is no sysctl", key)
	}
	return "/proc/sys/" + p, nil
}

// Check refuses names that are none, and values with line breaks.
func (k Kernel) Check() error {
	var errs []error
	for _, m := range k.Modules {
		if !validModule(m.Name) {
			errs = append(errs, fmt.Errorf("%q is no name of a kernel module", m.Name))
		}
	}
	for _, s := range k.Sysctls {
		if _, err := sysctlPath(s.Key); err != nil {
			errs = append(errs, err)
		}
		if s.Value == "" || strings.ContainsAny(s.Value, "\n\x00") {
			errs = append(errs, fmt.Errorf("the sysctl %s has the value %q; it must be one line", s.Key, s.Value))
		}
	}
	return errors.Join(errs...)
}

// KernelFiles are the files that make every boot do what Kernel.Apply does now.
// Sysctls that are large enough already are left out.
func (h *Host) KernelFiles(k Kernel) ([]File, error) {
	if err := k.Check(); err != nil {
		return nil, err
	}
	const header = "# Written by bootstrap from host.modules, host.sysctls and its own needs.\n"
	var modules, sysctls strings.Builder
	modules.WriteString(header)
	sysctls.WriteString(header)
	for _, m := range k.Modules {
		fmt.Fprintf(&modules, "# %s\n%s\n", oneLine(m.Reason), m.Name)
	}
	for _, s := range k.Sysctls {
		if now, err := h.readSysctl(s.Key); err == nil && s.satisfied(now) && now != s.Value {
			continue
		}
		fmt.Fprintf(&sysctls, "# %s\n%s = %s\n", oneLine(s.Reason), s.Key, s.Value)
	}
	return []File{
		{Path: ModulesFile, Content: []byte(modules.String()), Reason: "kernel modules of every boot"},
		{Path: SysctlFile, Content: []byte(sysctls.String()), Reason: "kernel settings of every boot"},
	}, nil
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", " ") }

// KernelChange is a module to load or a sysctl to set now.
type KernelChange struct {
	Module string `json:"module,omitempty"`
	Sysctl string `json:"sysctl,omitempty"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Command does the same by hand.
	Command string `json:"command"`
}

func (s Sysctl) satisfied(now string) bool {
	if now == normalise(s.Value) {
		return true
	}
	have, err1 := strconv.ParseInt(now, 10, 64)
	want, err2 := strconv.ParseInt(s.Value, 10, 64)
	return s.AtLeast && err1 == nil && err2 == nil && have >= want
}

// normalise writes values the way the kernel shows them: fields with tabs
// between.
func normalise(value string) string { return strings.Join(strings.Fields(value), "\t") }

func (h *Host) readSysctl(key string) (string, error) {
	p, err := sysctlPath(key)
	if err != nil {
		return "", err
	}
	b, err := h.tree.read(p)
	return normalise(string(b)), err
}

func (h *Host) writeSysctl(key, value string) error {
	p, err := sysctlPath(key)
	if err != nil {
		return err
	}
	f, err := h.tree.open(p, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	return errors.Join(err, f.Close())
}

// PlanKernel says what ApplyKernel would do. It changes nothing.
func (h *Host) PlanKernel(ctx context.Context, k Kernel) ([]KernelChange, error) {
	if err := errors.Join(k.Check(), ctx.Err()); err != nil {
		return nil, err
	}
	var out []KernelChange
	for _, m := range k.Modules {
		if !h.hasModule(m.Name) {
			out = append(out, KernelChange{Module: m.Name, Reason: m.Reason, Command: "modprobe -- " + m.Name})
		}
	}
	for _, s := range k.Sysctls {
		now, err := h.readSysctl(s.Key)
		if err != nil {
			now = "" // may come with a module
		}
		if err != nil || !s.satisfied(now) {
			out = append(out, KernelChange{Sysctl: s.Key, Before: now, After: s.Value, Reason: s.Reason,
				Command: fmt.Sprintf("sysctl -w %s=%q", s.Key, s.Value)})
		}
	}
	return out, nil
}

// ApplyKernel loads the modules and sets the sysctls that need it, and returns
// what it did. Everything is tried; the failures come joined, each classified.
// Remove sets sysctls back; modules stay loaded, because others may use them by then.
func (h *Host) ApplyKernel(ctx context.Context, k Kernel) ([]KernelChange, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	changes, err := h.PlanKernel(ctx, k)
	if err != nil || len(changes) == 0 {
		return nil, err
	}
	ledger, err := h.Ledger()
	if err != nil {
		return nil, err
	}
	var done []KernelChange
	var errs []error
	for _, c := range changes {
		if c.Module == "" {
			continue
		}
		err := h.load(ctx, c.Module)
		switch {
		case err == nil:
			done = append(done, c)
		case !h.hasModule(c.Module): // built in, on an image without lists of modules
			errs = append(errs, fault.New(CodeModule, err, "install the kernel's modules, or take it out of host.modules", "loading the kernel module %s failed", c.Module))
		}
	}
	dirty := false
	for i, c := range changes {
		if c.Sysctl == "" {
			continue
		}
		// Again, because a module may have brought it.
		if c.Before, err = h.readSysctl(c.Sysctl); err != nil {
			continue // the write below says why
		}
		changes[i] = c
		j := slices.IndexFunc(ledger.Sysctls, func(e SysctlEntry) bool { return e.Key == c.Sysctl })
		if j < 0 {
			ledger.Sysctls = append(ledger.Sysctls, SysctlEntry{Key: c.Sysctl, Before: c.Before, After: normalise(c.After)})
		} else {
			ledger.Sysctls[j].After = normalise(c.After)
		}
		dirty = true
	}
	if dirty {
		if err := h.save(ledger); err != nil {
			return done, errors.Join(append(errs, err)...)
		}
	}
	for _, c := range changes {
		if c.Sysctl == "" {
			continue
		}
		if err := h.writeSysctl(c.Sysctl, c.After); err != nil {
			remedy := "take it out of host.sysctls, or correct its value"
			if errors.Is(err, fs.ErrNotExist) {
				remedy = "load the module that brings it (host.modules), or take it out of host.sysctls"
			}
			errs = append(errs, fault.New(CodeSysctl, err, remedy, "setting the sysctl %s to %q failed", c.Sysctl, c.After))
			continue
		}
		done = append(done, c)
	}
	return done, errors.Join(errs...)
}

// hasModule says whether what a module brings is there, loaded or built in.
func (h *Host) hasModule(name string) bool {
	name = moduleName(name)
	if h.tree.exists("/sys/module/" + name) {
		return true
	}
	switch name { // built in without parameters: no directory under /sys/module
	case "overlay":
		return h.hasFilesystem("overlay")
	case "br_netfilter":
		return h.tree.exists("/proc/sys/net/bridge")
	}
	return h.listed(name, "modules.builtin")
}

func (h *Host) hasFilesystem(name string) bool {
	b, err := h.tree.read("/proc/filesystems")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[len(fields)-1] == name {
			return true
		}
	}
	return false
}

// listed says whether a list of the running kernel's modules has a name.
func (h *Host) listed(name, list string) bool {
	_, release, err := h.uname()
	if err != nil {
		return false
	}
	b, err := h.tree.read("/lib/modules/" + release + "/" + list)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		file, _, _ := strings.Cut(strings.TrimSpace(line), ":") // modules.dep: "path.ko.zst: dependencies"
		base, _, found := strings.Cut(path.Base(file), ".ko")
		if found && moduleName(base) == moduleName(name) {
			return true
		}
	}
	return false
}

// loader loads a module into the running kernel.
type loader func(ctx context.Context, name string) error

func (h *Host) modprobe(ctx context.Context, name string) error {
	if h.o.Root != "/" {
		return errors.New("modules are loaded only when the root is /")
	}
	program := h.o.Modprobe
	if program == "" {
		program = "modprobe"
		if _, err := exec.LookPath(program); err != nil {
			program = "/sbin/modprobe" // not in the PATH of every service
		}
	}
	ctx, cancel := context.WithTimeout(ctx, modprobeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "--", name)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		out = bytes.TrimSpace(out)
		return fmt.Errorf("%s: %w: %s", program, err, out[:min(len(out), 500)])
	}
	return nil
}
