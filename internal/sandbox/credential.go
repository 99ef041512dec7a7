package sandbox

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// Nobody is the user and group that children of root run as: the account that
// by convention owns no file.
const Nobody = 65534

// Credential returns the account for children when this process is root, for
// exec.Cmd.SysProcAttr, and nil when it is not (children then keep the account
// of the parent). It is also nil for a root that has no such account to give,
// in a user namespace that does not map it.
//
// A child under another account may be unable to search the directories that
// lead to a file: pass open descriptors, and start it by Executable.
func Credential() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"/proc/self/uid_map", "/proc/self/gid_map"} {
		f, err := os.Open(name)
		if err != nil {
			continue // without /proc there is no saying; the common case is a plain root
		}
		ok := maps(f, Nobody)
		_ = f.Close()
		if !ok {
			return nil
		}
	}
	if setgroups, err := os.ReadFile("/proc/self/setgroups"); err == nil && strings.TrimSpace(string(setgroups)) == "deny" {
		return nil
	}
	return &syscall.Credential{Uid: Nobody, Gid: Nobody}
}

// maps reports whether an identifier is mapped by a uid_map or gid_map: lines
// of first identifier inside, first outside, and count (user_namespaces(7)).
func maps(r io.Reader, id uint64) bool {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var inside, outside, count uint64
		if _, err := fmt.Sscan(lines.Text(), &inside, &outside, &count); err != nil {
			return false
		}
		if id >= inside && id-inside < count {
			return true
		}
	}
	return false
}

// Executable is a path of the running program for exec.Cmd. It resolves even
// when the child's account cannot search the directory the program lies in,
// and stays the same program after an upgrade replaced the file.
func Executable() string { return "/proc/self/exe" }
