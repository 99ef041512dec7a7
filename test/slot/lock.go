package slot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is between two tries of a file lock, which has no event.
const lockPoll = 200 * time.Millisecond

// Lock waits for an exclusive lock that its Close gives back, or the kernel
// when the process ends. The file stays: removing it would let two processes
// lock two inodes. The error is ctx's when the wait was too long.
func Lock(ctx context.Context, path string) (*os.File, error) {
	for {
		file, err := TryLock(path)
		if err != nil || file != nil {
			return file, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(lockPoll):
		}
	}
}

// TryLock is Lock without the wait: it returns nil and no error when another
// process holds the lock.
func TryLock(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil {
		return file, nil
	}
	file.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("locking %s: %w", path, err)
}

// Once makes what a cache lacks: of the processes that ask at the same time
// one does, and the others wait for it until ctx ends. The lock is a file
// beside path.
func Once(ctx context.Context, path string, made func() bool, create func() error) error {
	if made() {
		return nil
	}
	lock, err := Lock(ctx, path+".lock")
	if err != nil {
		return fmt.Errorf("waiting for another process that makes %s: %w", path, err)
	}
	defer lock.Close()
	if made() {
		return nil
	}
	return create()
}
