package host

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// MinKernel is the oldest kernel a node may have. What decides is Landlock
// (5.13), without which no tenant's code runs; openat2 (5.6), which this package
// writes files with, kubelet's metrics of control groups (5.8) and kube-proxy's
// nftables mode (5.13) need no newer one.
const MinKernel = "5.13"

const (
	// MinMemoryServer and MinMemoryAgent are what k3s's documentation asks for
	// ("Requirements", 2 GB and 512 MB), less what the kernel keeps for itself.
	MinMemoryServer = 1700 << 20
	MinMemoryAgent  = 400 << 20
	// DefaultMinInodes is enough for the images of a node's system pods several
	// times over.
	DefaultMinInodes = 50_000
	// DefaultMinDiskFree is for k3s, its images and a few functions.
	DefaultMinDiskFree = 4 << 30
	// DefaultMaxClockOffset is well within the five minutes at which AWS
	// refuses signatures, and small enough for a lease of a minute.
	DefaultMaxClockOffset = 30 * time.Second
)

// Requirements are what a machine must offer.
type Requirements struct {
	// Arch is the wanted GOARCH. Default: this program's.
	Arch string
	// MinMemory is in bytes. Default: MinMemoryAgent.
	MinMemory uint64
	// DataDir is where images and pods go. Default: /var/lib/rancher.
	DataDir string
	// MinDiskFree is how many bytes must be free there. Default: DefaultMinDiskFree.
	MinDiskFree uint64
	// MinInodes is how many inodes must be free there. Default: DefaultMinInodes.
	MinInodes uint64
	// Writable are directories that must not be read-only. Default: /usr/local,
	// /etc, /var/lib, /run.
	Writable []string
	// AllowCgroupV1 is for kubelets told to accept version 1.
	AllowCgroupV1 bool
	// MaxClockOffset is how wrong the clock may be. Default: DefaultMaxClockOffset.
	MaxClockOffset time.Duration
	// Clocks are other people's clocks, read by the caller.
	Clocks []ClockSample
	// Kernel is what will be loaded and set.
	Kernel Kernel
}

// ClockSample is one reading of another clock.
type ClockSample struct {
	// Source names the clock in messages: "s3.eu-central-1.amazonaws.com".
	Source string
	// Sent and Received are this machine's clock before and after the question.
	// They should carry monotonic readings, as time.Now's do.
	Sent, Received time.Time
	// Remote is what the other clock showed in between.
	Remote time.Time
	// Resolution is the other clock's: a second for HTTP.
	Resolution time.Duration
}

// SampleDate reads the clock of an HTTP server from its answer's Date header
// (RFC 9110, 6.6.1). Answers of caches tell an old time and are refused.
func SampleDate(source string, header http.Header, sent, received time.Time) (ClockSample, error) {
	if age := header.Get("Age"); age != "" && age != "0" {
		return ClockSample{}, fmt.Errorf("the answer of %s came from a cache, so its date is old", source)
	}
	date, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		return ClockSample{}, fmt.Errorf("the answer of %s has no usable date: %w", source, err)
	}
	return ClockSample{Source: source, Sent: sent, Received: received, Remote: date, Resolution: time.Second}, nil
}

// Offset is by how much this machine's clock is ahead of the other one, and how
// wrong that may be.
func (s ClockSample) Offset() (offset, uncertainty time.Duration) {
	elapsed := max(s.Received.Sub(s.Sent), 0)
	// The clocks are compared in wall time, so monotonic readings must go.
	middle := s.Sent.Add(elapsed / 2).Round(0)
	return middle.Sub(s.Remote.Add(s.Resolution / 2)), (elapsed + s.Resolution) / 2
}

// Severity says what a finding means for the run.
type Severity string

// Severities.
const (
	OK      Severity = "ok"
	Warning Severity = "warning" // a node can be made, but not a good one
	Failure Severity = "error"   // no node can be made
)

// Finding is the result of one check.
type Finding struct {
	// Check names the check: root, architecture, kernel, features, cgroups,
	// memory, disk, writable, swap, systemd, clock.
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	// Fact is what was found, as a short sentence.
	Fact string `json:"fact"`
	// Code and Remedy are set unless the severity is OK.
	Code   fault.Code `json:"code,omitempty"`
	Remedy string     `json:"remedy,omitempty"`
}

// Report is everything Preflight found.
type Report []Finding

// Err joins everything that is in the way, each a *fault.Error; nil if nothing is.
func (r Report) Err() error {
	var errs []error
	for _, f := range r {
		if f.Severity == Failure {
			errs = append(errs, fault.New(f.Code, nil, f.Remedy, "%s", f.Fact))
		}
	}
	return errors.Join(errs...)
}

// Warnings are the findings that do not stop a run.
func (r Report) Warnings() []Finding {
	return slices.DeleteFunc(slices.Clone(r), func(f Finding) bool { return f.Severity != Warning })
}

func ok(check, format string, args ...any) Finding {
	return Finding{Check: check, Severity: OK, Fact: fmt.Sprintf(format, args...)}
}

func bad(check string, severity Severity, code fault.Code, remedy, format string, args ...any) Finding {
	return Finding{Check: check, Severity: severity, Code: code, Remedy: remedy, Fact: fmt.Sprintf(format, args...)}
}

// Preflight looks whether the machine can become a node. It changes nothing,
// asks nobody, takes milliseconds, and reports everything at once.
func (h *Host) Preflight(ctx context.Context, r Requirements) (Report, error) {
	r = r.withDefaults()
	var out Report
	for _, check := range []func(Requirements) []Finding{
		h.checkRoot, h.checkArchitecture, h.checkKernel, h.checkFeatures, h.checkCgroups, h.checkMemory,
		h.checkDisk, h.checkWritable, h.checkSwap, h.checkSystemd, h.checkClock,
	} {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		out = append(out, check(r)...)
	}
	return out, nil
}

func (r Requirements) withDefaults() Requirements {
	if r.Arch == "" {
		r.Arch = runtime.GOARCH
	}
	if r.MinMemory == 0 {
		r.MinMemory = MinMemoryAgent
	}
	if r.DataDir == "" {
		r.DataDir = "/var/lib/rancher"
	}
	if r.MinDiskFree == 0 {
		r.MinDiskFree = DefaultMinDiskFree
	}
	if r.MinInodes == 0 {
		r.MinInodes = DefaultMinInodes
	}
	if r.Writable == nil {
		r.Writable = []string{"/usr/local/bin", "/etc", "/var/lib", "/run"}
	}
	if r.MaxClockOffset == 0 {
		r.MaxClockOffset = DefaultMaxClockOffset
	}
	return r
}

func (h *Host) checkRoot(Requirements) []Finding {
	if uid := h.getuid(); uid != 0 {
		return []Finding{bad("root", Failure, CodeNotRoot, "run it as root", "bootstrap runs as user %d, and only root can make a node", uid)}
	}
	return []Finding{ok("root", "runs as root")}
}

// goarch is Go's name of uname's machine.
func goarch(machine string) string {
	switch machine {
	case "x86_64":
		return "amd64"
	case "aarch64", "arm64":
		return "arm64"
	}
	return machine
}

func (h *Host) checkArchitecture(r Requirements) []Finding {
	machine, _, err := h.uname()
	if err != nil {
		return []Finding{bad("architecture", Warning, CodeArchitecture, "see the cause", "the architecture cannot be read: %v", err)}
	}
	if goarch(machine) != r.Arch {
		return []Finding{bad("architecture", Failure, CodeArchitecture, "start an instance type of the wanted architecture, or name artifacts for this one",
			"the machine is %s, and %s is wanted", goarch(machine), r.Arch)}
	}
	return []Finding{ok("architecture", "%s", r.Arch)}
}

// parseKernel reads the first two numbers of a release: "6.1.0-21-cloud-arm64".
func parseKernel(release string) (major, minor int, err error) {
	first, rest, _ := strings.Cut(release, ".")
	second := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(second)
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, fmt.Errorf("%q is no release of Linux", release)
	}
	return major, minor, nil
}

func (h *Host) checkKernel(Requirements) []Finding {
	_, release, err := h.uname()
	var major, minor int
	if err == nil {
		major, minor, err = parseKernel(release)
	}
	if err != nil {
		return []Finding{bad("kernel", Warning, CodeKernelTooOld, remedyKernel, "the kernel's version cannot be read: %v", err)}
	}
	wantMajor, wantMinor, _ := parseKernel(MinKernel)
	if major < wantMajor || major == wantMajor && minor < wantMinor {
		return []Finding{bad("kernel", Failure, CodeKernelTooOld, remedyKernel, "the kernel is %s; nodes need Linux %s or newer, which has Landlock", release, MinKernel)}
	}
	return []Finding{ok("kernel", "Linux %s", release)}
}

// has says whether a feature is there, can be loaded, or is absent; unknown is
// when nobody could tell without trying.
func (h *Host) has(there bool, modules ...string) (available, known bool) {
	if there {
		return true, true
	}
	_, release, err := h.uname()
	if err != nil || !h.tree.exists("/lib/modules/"+release+"/modules.dep") {
		return false, false
	}
	for _, module := range modules {
		if h.listed(module, "modules.dep") || h.listed(module, "modules.builtin") {
			return true, true
		}
	}
	return false, true
}

func (h *Host) checkFeatures(r Requirements) []Finding {
	features := []struct {
		name, need string
		there      bool
		modules    []string
	}{
		{"overlayfs", "containerd's snapshots", h.hasFilesystem("overlay"), []string{"overlay"}},
		{"br_netfilter", "services for pods on the same node", h.hasModule("br_netfilter"), []string{"br_netfilter"}},
		{"netfilter", "kube-proxy's rules", h.hasModule("nf_tables") || h.hasModule("ip_tables") || h.tree.exists("/proc/net/ip_tables_names") ||
			h.hasModule("x_tables"), []string{"nf_tables", "ip_tables"}},
		{"connection tracking", "services and network policies", h.hasModule("nf_conntrack") || h.tree.exists("/proc/sys/net/netfilter/nf_conntrack_max"), []string{"nf_conntrack"}},
		{"Landlock", "confining tenants' code", h.landlock(), nil},
	}
	for _, m := range r.Kernel.Modules {
		if name := moduleName(m.Name); name != "overlay" && name != "br_netfilter" {
			features = append(features, struct {
				name, need string
				there      bool
				modules    []string
			}{name, m.Reason, h.hasModule(name), []string{name}})
		}
	}
	const remedy = "use the distribution's full kernel package, with its modules installed"
	var out []Finding
	for _, f := range features {
		switch available, known := h.has(f.there, f.modules...); {
		case available:
		case f.modules == nil: // decided at boot, and not by a module
			out = append(out, bad("features", Warning, CodeKernelFeature, "add landlock to the kernel parameter lsm=", "the kernel does not list %s among its security modules (needed for %s)", f.name, f.need))
		case known:
			out = append(out, bad("features", Failure, CodeKernelFeature, remedy, "the kernel has no %s (needed for %s)", f.name, f.need))
		default:
			out = append(out, bad("features", Warning, CodeKernelFeature, remedy, "%s is not loaded (needed for %s), and /lib/modules does not say whether it can be", f.name, f.need))
		}
	}
	if len(out) == 0 {
		return []Finding{ok("features", "overlayfs, bridges, netfilter, Landlock")}
	}
	return out
}

func (h *Host) landlock() bool {
	b, err := h.tree.read("/sys/kernel/security/lsm")
	if err != nil {
		return true // securityfs is not mounted; the node's own proof tells
	}
	return slices.Contains(strings.Split(strings.TrimSpace(string(b)), ","), "landlock")
}

func (h *Host) checkCgroups(r Requirements) []Finding {
	// What kubelet cannot run without (its validation of the cgroup root).
	needed := []string{"cpu", "cpuset", "memory", "pids"}
	lacks := func(have []string) (missing []string) {
		for _, name := range needed {
			if !slices.Contains(have, name) {
				missing = append(missing, name)
			}
		}
		return missing
	}
	if b, err := h.tree.read("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		if missing := lacks(strings.Fields(string(b))); len(missing) > 0 {
			return []Finding{bad("cgroups", Failure, CodeCgroups, "take cgroup_disable= and cgroup_no_v1= off the kernel's command line",
				"the unified control groups lack the controllers %s", strings.Join(missing, ", "))}
		}
		return []Finding{ok("cgroups", "version 2")}
	}
	b, err := h.tree.read("/proc/cgroups")
	if err != nil {
		return []Finding{bad("cgroups", Failure, CodeCgroups, remedyCgroups, "no control groups are mounted: %v", err)}
	}
	var have []string
	for line := range strings.Lines(string(b)) { // name, hierarchy, number of groups, enabled
		if f := strings.Fields(line); len(f) == 4 && f[1] != "0" && f[3] == "1" {
			have = append(have, f[0])
		}
	}
	if missing := lacks(have); len(missing) > 0 {
		return []Finding{bad("cgroups", Failure, CodeCgroups, remedyCgroups, "the control groups lack the controllers %s", strings.Join(missing, ", "))}
	}
	severity := Failure
	if r.AllowCgroupV1 {
		severity = Warning
	}
	return []Finding{bad("cgroups", severity, CodeCgroups, remedyCgroups, "control groups are mounted as version 1, which kubelet refuses from 1.35 on unless it is told otherwise")}
}

func (h *Host) checkMemory(r Requirements) []Finding {
	b, err := h.tree.read("/proc/meminfo")
	var total uint64
	if err == nil {
		total, err = memTotal(string(b))
	}
	switch {
	case err != nil:
		return []Finding{bad("memory", Warning, CodeMemory, "see the cause", "the size of the memory cannot be read: %v", err)}
	case total < MinMemoryAgent:
		return []Finding{bad("memory", Failure, CodeMemory, "use a larger instance type", "the machine has %s of memory; no node runs in less than %s", size(total), size(MinMemoryAgent))}
	case total < r.MinMemory:
		return []Finding{bad("memory", Warning, CodeMemory, "use a larger instance type", "the machine has %s of memory; its role needs %s", size(total), size(r.MinMemory))}
	}
	return []Finding{ok("memory", "%s", size(total))}
}

func memTotal(meminfo string) (uint64, error) {
	for line := range strings.Lines(meminfo) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemTotal:" && f[2] == "kB" {
			kib, err := strconv.ParseUint(f[1], 10, 50)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemTotal")
}

// size writes bytes for people.
func size(n uint64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

func (h *Host) checkDisk(r Requirements) []Finding {
	st, err := h.statfs(r.DataDir)
	if err != nil {
		return []Finding{bad("disk", Warning, CodeDiskFull, "see the cause", "the space below %s cannot be read: %v", r.DataDir, err)}
	}
	var out []Finding
	free := st.Bavail * uint64(st.Bsize)
	if free < r.MinDiskFree {
		out = append(out, bad("disk", Failure, CodeDiskFull, "enlarge the volume in the launch template, or lower host.minDiskFree",
			"%s are free below %s; %s are needed", size(free), r.DataDir, size(r.MinDiskFree)))
	}
	if st.Files > 0 && st.Ffree < r.MinInodes { // some file systems have no table of inodes
		out = append(out, bad("disk", Failure, CodeDiskFull, "use a file system with more inodes, such as a larger volume or xfs",
			"%d inodes are free below %s; %d are needed", st.Ffree, r.DataDir, r.MinInodes))
	}
	if out == nil {
		out = []Finding{ok("disk", "%s and %d inodes free below %s", size(free), st.Ffree, r.DataDir)}
	}
	return out
}

func (h *Host) checkWritable(r Requirements) []Finding {
	var out []Finding
	for _, dir := range r.Writable {
		st, err := h.statfs(dir)
		switch {
		case err != nil:
			out = append(out, bad("writable", Warning, CodeReadOnly, "see the cause", "%s cannot be looked at: %v", dir, err))
		case st.Flags&unix.ST_RDONLY != 0:
			out = append(out, bad("writable", Failure, CodeReadOnly, remedyReadOnly, "%s is on a read-only file system", dir))
		}
	}
	if out == nil {
		out = []Finding{ok("writable", "%s", strings.Join(r.Writable, ", "))}
	}
	return out
}

func (h *Host) checkSwap(Requirements) []Finding {
	b, err := h.tree.read("/proc/swaps")
	if err != nil {
		return []Finding{ok("swap", "the kernel has no swap")}
	}
	var on []string
	for i, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 { // the first line is a heading
			on = append(on, f[0])
		}
	}
	if len(on) > 0 {
		// k3s starts kubelet with fail-swap-on=false, so this is no failure; but
		// memory limits then do not hold as they say.
		return []Finding{bad("swap", Warning, CodeSwap, remedySwap, "swap is on (%s)", strings.Join(on, ", "))}
	}
	return []Finding{ok("swap", "off")}
}

func (h *Host) checkSystemd(Requirements) []Finding {
	if !h.tree.exists("/run/systemd/system") { // sd_booted(3)
		return []Finding{bad("systemd", Failure, CodeNoSystemd, "use an image that boots with systemd", "systemd does not run this machine")}
	}
	if !h.tree.exists("/run/dbus/system_bus_socket") && !h.tree.exists("/run/systemd/private") {
		return []Finding{bad("systemd", Failure, CodeNoSystemd, "install dbus (or dbus-broker) in the image and start it", "systemd cannot be asked: there is neither a system bus nor systemd's own socket")}
	}
	return []Finding{ok("systemd", "runs")}
}

func (h *Host) checkClock(r Requirements) []Finding {
	unsynchronized, err := h.adjtime()
	var out []Finding
	var nearest *time.Duration
	for _, s := range r.Clocks {
		offset, uncertainty := s.Offset()
		abs := max(offset.Abs()-uncertainty, 0)
		if nearest == nil || abs < nearest.Abs() {
			nearest = &offset
		}
		if abs > r.MaxClockOffset {
			direction := "ahead of"
			if offset < 0 {
				direction = "behind"
			}
			out = append(out, bad("clock", Failure, CodeClock, remedyClock, "the clock is %v %s that of %s; %v are allowed", offset.Abs().Round(time.Second), direction, s.Source, r.MaxClockOffset))
		}
	}
	switch {
	case len(out) > 0 && len(out) < len(r.Clocks):
		// They contradict each other: one of them is wrong, or a cache.
		for i := range out {
			out[i].Severity = Warning
		}
		return out
	case len(out) > 0:
		return out
	case err != nil:
		return []Finding{bad("clock", Warning, CodeClockUnsynchronized, remedyClock, "whether the clock is kept right cannot be read: %v", err)}
	case unsynchronized && nearest == nil:
		return []Finding{bad("clock", Warning, CodeClockUnsynchronized, remedyClock, "no time service has set the clock yet, and there was no other clock to compare it with")}
	case unsynchronized:
		return []Finding{bad("clock", Warning, CodeClockUnsynchronized, remedyClock, "no time service has set the clock yet; it is right within %v all the same", r.MaxClockOffset)}
	case nearest == nil:
		return []Finding{ok("clock", "kept right by a time service")}
	}
	return []Finding{ok("clock", "kept right by a time service, and within %v of %s", r.MaxClockOffset, r.Clocks[0].Source)}
}
