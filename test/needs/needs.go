// Package needs is what tests ask of the machine they run on. A test that lacks
// something is skipped and says what; where the environment variable CI is set
// it fails: a machine on which tests cannot run would look like one on which
// they pass.
package needs

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// Missing ends a test that cannot run here. The text says what is missing and
// what installs it.
func Missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatalf("this cannot be left out where CI is set: "+format, args...)
	}
	tb.Skipf(format, args...)
}

// Root ends a test unless it is run by root. why is what it needs root for,
// like "mounting a file system".
func Root(tb testing.TB, why string) {
	tb.Helper()
	if os.Geteuid() != 0 {
		Missing(tb, "%s needs root: run the test with sudo", why)
	}
}

// Program returns the path of a program that the Debian packages of
// test/install-deps.sh bring.
func Program(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(tb, "%s is missing: run test/install-deps.sh", name)
	}
	return path
}

// Tmpfs mounts a file system of its own on dir for as long as the test, with
// options of tmpfs(5), which must bound it: "size=256k". A test that unmounts
// it earlier may.
func Tmpfs(tb testing.TB, dir, options string) {
	tb.Helper()
	Root(tb, "mounting a tmpfs")
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		Missing(tb, "mounting a tmpfs on %s: %v", dir, err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			tb.Errorf("unmounting %s: %v", dir, err)
		}
	})
}
