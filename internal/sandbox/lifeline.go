package sandbox

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// NewLifeline makes the pipe that ties a child to its parent: pass childEnd to
// one child (exec.Cmd.ExtraFiles), close it in the parent after the child
// started, and keep parentEnd open for as long as the child may live. Whatever
// ends the parent, SIGKILL included, closes parentEnd. Both are close-on-exec.
func NewLifeline() (childEnd, parentEnd *os.File, err error) {
	childEnd, parentEnd, err = os.Pipe()
	if err != nil {
		return nil, nil, fmt.Errorf("make a lifeline: %w", err)
	}
	return childEnd, parentEnd, nil
}

// Lifeline ends this process, at once and without cleaning up, as soon as the
// other end of the pipe fd is closed. It returns an error if fd is not the
// reading end of a pipe. It takes over fd for the rest of the process's life;
// a process whose parent gives it other ways to end cleanly uses those first.
//
// Two things watch. The kernel sends SIGKILL when the pipe breaks, which works
// while the runtime is stuck (guest code that never yields holds up a stopped
// world, and then no goroutine runs). A goroutine waits for the end of the
// pipe as well, for where that cannot be set up: user-mode emulation, or when
// several processes share one childEnd, of which the kernel would tell only
// the last.
func Lifeline(fd uintptr) error {
	var info unix.Stat_t
	if err := unix.Fstat(int(fd), &info); err != nil {
		return fmt.Errorf("inspect the lifeline: %w", err)
	}
	if info.Mode&unix.S_IFMT != unix.S_IFIFO {
		return fmt.Errorf("the lifeline (descriptor %d) is not a pipe", fd)
	}
	unix.CloseOnExec(int(fd))
	if err := signalOnHangup(fd); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("arm the lifeline: %w", err)
	}
	// The pipe may have broken before it was armed; the goroutine's first
	// read notices that.
	go func() {
		var b [1]byte
		for {
			// Not through os.File: the poller would be shared with work that
			// can starve it, and a finalizer could close the pipe.
			n, err := syscall.Read(int(fd), b[:])
			switch {
			case n > 0 || err == syscall.EINTR:
			case err == syscall.EAGAIN:
				poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				_, _ = unix.Poll(poll, -1) // ends when the pipe breaks
			default:
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				os.Exit(exitLifeline)
			}
		}
	}()
	return nil
}

// exitLifeline is the exit code of a process that outlived its parent and
// could not even send itself SIGKILL.
const exitLifeline = 75

func signalOnHangup(fd uintptr) error {
	if _, err := unix.FcntlInt(fd, unix.F_SETOWN, os.Getpid()); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(fd, unix.F_SETSIG, int(unix.SIGKILL)); err != nil {
		return err
	}
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	_, err = unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_ASYNC)
	return err
}
