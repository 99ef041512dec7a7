package host

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// Codes of the failures of this package.
const (
	// CodeReadOnly: a file system that must be written to is read-only.
	CodeReadOnly fault.Code = "host-read-only"
	// CodeNoSpace: no space or no inodes are left.
	CodeNoSpace fault.Code = "host-no-space"
	// CodePathConflict: something that is no file is where a file must go.
	CodePathConflict fault.Code = "host-path-conflict"
	// CodeWriteFailed: a file could not be written for another reason.
	CodeWriteFailed fault.Code = "host-write-failed"
	// CodeLedger: the record of what was installed cannot be read or written.
	CodeLedger fault.Code = "host-ledger-unusable"

	// CodeNotRoot: only root can turn a machine into a node.
	CodeNotRoot fault.Code = "host-not-root"
	// CodeArchitecture: the machine's architecture is not the wanted one.
	CodeArchitecture fault.Code = "host-wrong-architecture"
	// CodeKernelTooOld: the kernel is older than MinKernel.
	CodeKernelTooOld fault.Code = "host-kernel-too-old"
	// CodeKernelFeature: the kernel lacks something a node needs.
	CodeKernelFeature fault.Code = "host-kernel-feature-missing"
	// CodeCgroups: the control groups are not what kubelet needs.
	CodeCgroups fault.Code = "host-cgroups-unusable"
	// CodeMemory: the machine has too little memory.
	CodeMemory fault.Code = "host-memory-too-small"
	// CodeDiskFull: too little disk space or too few inodes are free.
	CodeDiskFull fault.Code = "host-disk-too-full"
	// CodeSwap: swap is in use.
	CodeSwap fault.Code = "host-swap-on"
	// CodeNoSystemd: systemd is not running, or cannot be asked.
	CodeNoSystemd fault.Code = "host-no-systemd"
	// CodeClock: the clock is wrong by more than is allowed.
	CodeClock fault.Code = "host-clock-wrong"
	// CodeClockUnsynchronized: nobody keeps the clock right, so far as can be told.
	CodeClockUnsynchronized fault.Code = "host-clock-unsynchronized"

	// CodeModule: a kernel module cannot be loaded.
	CodeModule fault.Code = "host-module-missing"
	// CodeSysctl: a sysctl cannot be set.
	CodeSysctl fault.Code = "host-sysctl-refused"
)

// Explanations lists every code of this package, for `bootstrap explain`.
func Explanations() []fault.Explanation {
	return []fault.Explanation{
		fault.Explain(CodeReadOnly, "a file system that must be written to is mounted read-only", remedyReadOnly),
		fault.Explain(CodeNoSpace, "a file system has no space or no inodes left", remedyNoSpace),
		fault.Explain(CodePathConflict, "a directory or device is where a file must be installed", "move it away and run bootstrap again"),
		fault.Explain(CodeWriteFailed, "a file could not be written", "see the cause in the message; dmesg shows errors of the disk"),
		fault.Explain(CodeLedger, "the record of what bootstrap installed cannot be read or written", remedyLedger),
		fault.Explain(CodeNotRoot, "bootstrap does not run as root", "run it as root"),
		fault.Explain(CodeArchitecture, "the machine's architecture is not the one that was asked for", "start an instance type of the wanted architecture, or name artifacts for this one"),
		fault.Explain(CodeKernelTooOld, "the kernel is older than "+MinKernel, remedyKernel),
		fault.Explain(CodeKernelFeature, "the kernel lacks a feature that a node needs", "use the distribution's full kernel package (not a cut-down one), with its modules installed"),
		fault.Explain(CodeCgroups, "the control groups are not mounted as kubelet needs them", remedyCgroups),
		fault.Explain(CodeMemory, "the machine has too little memory", "use a larger instance type"),
		fault.Explain(CodeDiskFull, "too little disk space or too few inodes are free", "enlarge the root volume in the launch template"),
		fault.Explain(CodeSwap, "swap is in use, which kubelet accounts to nobody", remedySwap),
		fault.Explain(CodeNoSystemd, "systemd does not run this machine or does not answer", "use an image that boots with systemd"),
		fault.Explain(CodeClock, "the clock is wrong, so certificates and signatures would be refused", remedyClock),
		fault.Explain(CodeClockUnsynchronized, "no time service keeps the clock right", remedyClock),
		fault.Explain(CodeModule, "a kernel module cannot be loaded", "install the kernel's modules (on Ubuntu linux-modules-extra-aws), or take the module out of host.modules"),
		fault.Explain(CodeSysctl, "the kernel refuses a sysctl", "take it out of host.sysctls, or load the module that brings it through host.modules"),
	}
}

const (
	remedyReadOnly = "remount it writable, or use an image whose /usr/local and /var are writable"
	remedyNoSpace  = "free some, or enlarge the volume, and run bootstrap again"
	remedyLedger   = "look at the file; if it is beyond repair, move it away: bootstrap then takes everything that is there for somebody else's"
	remedyKernel   = "use an image with a newer kernel (Amazon Linux 2023, Ubuntu 22.04 and Debian 12 have one)"
	remedyCgroups  = "boot with the unified hierarchy (kernel parameter systemd.unified_cgroup_hierarchy=1), or, to run on version 1 all the same, put kubelet-arg fail-cgroupv1=false in k3s.config"
	remedySwap     = "swapoff -a, and take the swap out of /etc/fstab"
	remedyClock    = "start chrony or systemd-timesyncd (on EC2 with the server 169.254.169.123), and run bootstrap again"
)
