package process

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// InNetNS calls do on a thread that is in the network namespace at path:
// sockets that do itself opens are that namespace's and stay so. Goroutines
// that it starts are not there, and neither are names resolved by Go's
// resolver.
func InNetNS(path string, do func() error) error {
	failed := make(chan error, 1)
	go func() {
		// The thread is never unlocked: it ends with the goroutine instead of
		// carrying the namespace to others.
		runtime.LockOSThread()
		failed <- func() error {
			file, err := os.Open(path)
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering network namespace %s: %w", path, err)
			}
			return do()
		}()
	}()
	return <-failed
}
