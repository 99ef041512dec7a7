package sandbox

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The filter is an allowlist with three ways to say no:
//
//   - listed calls that the Go runtime, file access and serving on inherited
//     sockets need are allowed, some only with harmless arguments;
//   - calls a program may try in good faith (sockets, processes, changing
//     modes) fail with EPERM, so that it reports what was forbidden;
//   - calls that only an attack makes end the process at once;
//   - everything else, all future calls included, fails with ENOSYS, which is
//     what makes the Go runtime and libc fall back to the older call (clone3
//     is the important one: its flags are behind a pointer, so a filter
//     cannot read them).
//
// A denylist was rejected: each kernel adds calls, and the code confined here
// is machine code made from hostile input, where "not yet known to be bad" is
// the wrong default. What an allowlist costs, a new Go release using a new
// call, shows as ENOSYS and is met by the tests, which run the runtime, the
// compiler and an HTTP server inside.

// Offsets in struct seccomp_data (linux/seccomp.h). Both supported
// architectures are little-endian: the low word of an argument comes first.
const (
	offsetNumber       = 0
	offsetArchitecture = 4
	offsetArguments    = 16
)

// Return values of a filter (linux/seccomp.h).
const (
	retKill  = 0x80000000 // SECCOMP_RET_KILL_PROCESS
	retErrno = 0x00050000 // SECCOMP_RET_ERRNO, the number in the low 16 bits
	retAllow = 0x7fff0000 // SECCOMP_RET_ALLOW
)

// fionread asks how many bytes wait in a pipe or socket (asm-generic/ioctls.h).
const fionread = 0x541b

// allNamespaceFlags are the clone(2) flags that make a new namespace
// (CLONE_NEWTIME shares its bit with the exit signal, which is 0 for threads).
const allNamespaceFlags = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWTIME

// allowed is what every sandboxed process keeps, whatever its policy.
var allowed = []uint32{
	// Hot first: the filter is a linear list on kernels before 5.11.
	unix.SYS_FUTEX, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP,
	unix.SYS_MADVISE, unix.SYS_RT_SIGRETURN, unix.SYS_SCHED_YIELD, unix.SYS_GETPID, unix.SYS_GETTID,
	// Memory. mmap and mprotect have conditions.
	unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_BRK, unix.SYS_MINCORE, unix.SYS_MSYNC, unix.SYS_MEMBARRIER,
	// Threads, signals, time.
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RESTART_SYSCALL, unix.SYS_SET_TID_ADDRESS,
	unix.SYS_SET_ROBUST_LIST, unix.SYS_GET_ROBUST_LIST, unix.SYS_RSEQ,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGPENDING, unix.SYS_RT_SIGTIMEDWAIT,
	unix.SYS_SIGALTSTACK, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETCPU,
	unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_GETTIMEOFDAY,
	unix.SYS_SETITIMER, unix.SYS_GETITIMER,
	unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_GETTIME, unix.SYS_TIMER_DELETE,
	unix.SYS_TIMERFD_CREATE, unix.SYS_TIMERFD_SETTIME, unix.SYS_TIMERFD_GETTIME,
	// Who and where am I.
	unix.SYS_GETPPID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_GETGROUPS,
	unix.SYS_UNAME, unix.SYS_SYSINFO, unix.SYS_GETRUSAGE, unix.SYS_TIMES, unix.SYS_GETRLIMIT, unix.SYS_GETCWD,
	unix.SYS_GETRANDOM, unix.SYS_UMASK,
	// Descriptors. fcntl and ioctl have conditions.
	unix.SYS_CLOSE, unix.SYS_CLOSE_RANGE, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_PIPE2, unix.SYS_EVENTFD2,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_PPOLL, unix.SYS_PSELECT6,
	unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_PREADV, unix.SYS_PWRITEV,
	unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_LSEEK, unix.SYS_SENDFILE, unix.SYS_SPLICE, unix.SYS_TEE,
	unix.SYS_COPY_FILE_RANGE, unix.SYS_FSTAT, unix.SYS_FSTATFS, unix.SYS_FLOCK, unix.SYS_FADVISE64,
	unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNC_FILE_RANGE, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_FCHDIR,
	// Connected sockets. sendto has a condition; sendmsg and recvmsg, which
	// can name addresses and carry descriptors, are not needed.
	unix.SYS_RECVFROM, unix.SYS_SHUTDOWN, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME,
	unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT,
	// Looking at paths. What can be opened is Landlock's to say.
	unix.SYS_STATX, unix.SYS_STATFS, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_READLINKAT, unix.SYS_GETDENTS64, unix.SYS_CHDIR,
}

// allowedWriting is kept besides when the policy has a path to write to.
var allowedWriting = []uint32{
	unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
}

// forbidden fails with EPERM. Most of it would fail with ENOSYS anyway; EPERM
// says that it was refused.
var forbidden = []uint32{
	// Processes.
	unix.SYS_TKILL, unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO, unix.SYS_PIDFD_SEND_SIGNAL,
	unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP, unix.SYS_SETPGID, unix.SYS_SETSID,
	unix.SYS_SETPRIORITY, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_PROCESS_MADVISE,
	// Sockets.
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN,
	unix.SYS_SENDMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMSG, unix.SYS_RECVMMSG,
	// Landlock does not control who owns a file, its mode, times and attributes.
	unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT, unix.SYS_TRUNCATE,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR,
	unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_MKNODAT,
	// Descriptors whose contents or timing a filter cannot see.
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_MEMFD_CREATE, unix.SYS_MEMFD_SECRET, unix.SYS_INOTIFY_INIT1, unix.SYS_FANOTIFY_INIT,
	unix.SYS_USERFAULTFD, unix.SYS_PERF_EVENT_OPEN, unix.SYS_NAME_TO_HANDLE_AT,
	// Namespaces, mounts, identity.
	unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT, unix.SYS_MOUNT, unix.SYS_UMOUNT2,
	unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_FSCONFIG, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_MOUNT_SETATTR,
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
	unix.SYS_SETGROUPS, unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_CAPSET,
	unix.SYS_PERSONALITY, unix.SYS_SECCOMP, unix.SYS_PKEY_MPROTECT,
	unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_MSGGET, unix.SYS_SEMGET, unix.SYS_MQ_OPEN,
	// The machine.
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
	unix.SYS_SYSLOG, unix.SYS_QUOTACTL, unix.SYS_ACCT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_VHANGUP, unix.SYS_SYNC, unix.SYS_SYNCFS,
}

// fatal ends the process.
var fatal = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_BPF, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
}

func denied(errno unix.Errno) bpf.Instruction { return bpf.RetConstant{Val: retErrno | uint32(errno)} }

var (
	permit = bpf.RetConstant{Val: retAllow}
	refuse = denied(unix.EPERM)
	kill   = bpf.RetConstant{Val: retKill}
)

func loadLow(argument uint32) bpf.Instruction {
	return bpf.LoadAbsolute{Off: offsetArguments + 8*argument, Size: 4}
}

func loadHigh(argument uint32) bpf.Instruction {
	return bpf.LoadAbsolute{Off: offsetArguments + 8*argument + 4, Size: 4}
}

// seccompProgram builds the filter of a policy for the process with this
// identifier.
func seccompProgram(p Policy, pid uint32) []bpf.Instruction {
	program := []bpf.Instruction{
		// A call through another architecture's entry has other numbers.
		bpf.LoadAbsolute{Off: offsetArchitecture, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArchitecture, SkipTrue: 1},
		kill,
		bpf.LoadAbsolute{Off: offsetNumber, Size: 4},
	}
	if foreignNumbers != 0 {
		program = append(program,
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: foreignNumbers, SkipFalse: 1},
			kill)
	}
	// when runs body for one call; body ends in a return on every path and
	// may use the accumulator freely.
	when := func(number uint32, body ...bpf.Instruction) {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: number, SkipFalse: uint8(len(body))})
		program = append(program, body...)
	}
	// whenOneOf allows a call if the low word of an argument is in a list.
	whenOneOf := func(number, argument uint32, values []uint32) {
		body := []bpf.Instruction{loadLow(argument)}
		for _, v := range values {
			body = append(body, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, permit)
		}
		when(number, append(body, refuse)...)
	}

	for _, number := range allowed {
		when(number, permit)
	}
	for _, number := range allowedLegacy {
		when(number, permit)
	}

	// Threads yes, processes and namespaces no.
	threadFlags := uint32(unix.CLONE_VM | unix.CLONE_SIGHAND | unix.CLONE_THREAD)
	body := []bpf.Instruction{
		loadLow(0),
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: allNamespaceFlags, SkipFalse: 1},
		refuse,
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: threadFlags},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: threadFlags, SkipFalse: 1},
		permit,
		refuse,
	}
	when(unix.SYS_CLONE, body...)
	// The runtime preempts its own threads with signals.
	whenOneOf(unix.SYS_TGKILL, 0, []uint32{pid})
	whenOneOf(unix.SYS_KILL, 0, []uint32{pid})
	whenOneOf(unix.SYS_PRLIMIT64, 0, []uint32{0, pid})
	whenOneOf(unix.SYS_PRCTL, 0, []uint32{unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_SET_VMA, unix.PR_GET_DUMPABLE, unix.PR_GET_NO_NEW_PRIVS, unix.PR_GET_SECCOMP})
	whenOneOf(unix.SYS_IOCTL, 1, []uint32{unix.TCGETS, unix.TIOCGWINSZ, fionread})

	// fcntl can have a signal of one's choice sent to any process of the same
	// account (F_SETOWN, F_SETSIG), so the owner can only be this process.
	body = []bpf.Instruction{
		loadLow(1),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.F_SETOWN, SkipFalse: 4},
		loadLow(2),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: pid, SkipFalse: 1},
		permit,
		refuse,
	}
	for _, v := range []uint32{unix.F_DUPFD, unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL,
		unix.F_GETLK, unix.F_SETLK, unix.F_SETLKW, unix.F_OFD_GETLK, unix.F_OFD_SETLK, unix.F_OFD_SETLKW,
		unix.F_GETPIPE_SZ, unix.F_SETPIPE_SZ, unix.F_SETSIG, unix.F_GET_SEALS} {
		body = append(body, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, permit)
	}
	when(unix.SYS_FCNTL, append(body, refuse)...)

	// An address would let a datagram socket that was inherited reach others.
	when(unix.SYS_SENDTO,
		loadLow(4),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipFalse: 3},
		loadHigh(4),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipFalse: 1},
		permit,
		refuse)

	for _, number := range []uint32{unix.SYS_MMAP, unix.SYS_MPROTECT} {
		if p.AllowExecMemory {
			when(number, permit)
			continue
		}
		when(number,
			loadLow(2),
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.PROT_EXEC, SkipFalse: 1},
			refuse,
			permit)
	}

	accept := refuse
	if p.AcceptConnections {
		accept = permit
	}
	when(unix.SYS_ACCEPT4, accept)
	when(unix.SYS_ACCEPT, accept)

	// Opening is confined here as well as by Landlock, for kernels without
	// it: nothing at all without paths, nothing for writing without a path to
	// write to.
	switch {
	case len(p.ReadWrite) > 0:
		when(unix.SYS_OPENAT, permit)
		for _, number := range allowedWriting {
			when(number, permit)
		}
	case len(p.ReadOnly) > 0:
		when(unix.SYS_OPENAT,
			loadLow(2),
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC, SkipFalse: 1},
			refuse,
			permit)
	}
	if len(p.ReadWrite) == 0 {
		for _, number := range allowedWriting {
			when(number, refuse)
		}
		if len(p.ReadOnly) == 0 {
			when(unix.SYS_OPENAT, refuse)
		}
	}

	for _, number := range forbidden {
		when(number, refuse)
	}
	for _, number := range forbiddenLegacy {
		when(number, refuse)
	}
	for _, number := range fatal {
		when(number, kill)
	}
	return append(program, denied(unix.ENOSYS))
}
