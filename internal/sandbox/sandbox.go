// Package sandbox is what a child process takes from itself before it touches
// bytes or code that somebody else wrote: new privileges, system calls, paths
// and resources. It also holds the two things around it: the lifeline that
// ends a child with its parent, and the account a child of root runs as.
//
// It owns the process it is called in and nothing outside: it starts no
// process, opens no file that the policy does not name, and knows nothing of
// Wasm, functions or tenants. Nothing it does can be undone, so only a process
// that exists for one hostile job calls Enter.
package sandbox

// Policy says what a process keeps. The zero value keeps open files, memory
// and threads, and nothing else: no paths, no sockets, no executable memory.
type Policy struct {
	// ReadOnly and ReadWrite are the paths (files or directories, with all
	// below) that can still be opened. They are resolved when Enter runs;
	// one that does not exist is an error. Without Landlock they are not
	// enforced (see Applied.LandlockABI).
	ReadOnly, ReadWrite []string
	// AllowExecMemory keeps the right to make memory executable, which a
	// just-in-time compiler needs.
	AllowExecMemory bool
	// AcceptConnections keeps the right to accept on listeners that were
	// inherited. New sockets cannot be made either way.
	AcceptConnections bool
	// MaxCPUSeconds is the processor time of the whole process; the kernel
	// kills it when that is used up. 0 leaves the limit as it is.
	MaxCPUSeconds uint64
	// MaxAddressSpaceBytes bounds mapped memory, reserved and committed
	// alike; Go reserves generously, so less than 1 GiB will not start many
	// threads. 0 leaves the limit as it is.
	MaxAddressSpaceBytes uint64
	// MaxOpenFiles bounds file descriptors by number; 0 leaves it as it is.
	MaxOpenFiles uint64
	// MaxFileSizeBytes bounds each file written; a longer write fails with
	// EFBIG. 0 leaves the limit as it is.
	MaxFileSizeBytes uint64
	// Require makes Enter fail with an *UnavailableError when the kernel
	// cannot give every layer. Without it Enter applies what it can and says
	// so in Applied.
	Require bool
}

// Applied says what is in force after Enter.
type Applied struct {
	NoNewPrivs bool
	Seccomp    bool
	// LandlockABI is the Landlock version the kernel enforces for this
	// process, 0 when it has none.
	LandlockABI int
	// Notes says, one sentence each, what could not be had and why.
	Notes []string
}
