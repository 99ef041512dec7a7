package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/mod/semver"
)

const (
	// versionDeadline bounds one run of a shim that only prints its version:
	// milliseconds on an idle node, the rest is for a node that is booting.
	versionDeadline = 5 * time.Second
	// versionWait bounds waiting for output after the process was killed.
	versionWait = time.Second
	// maxVersionOutput is how much is read of what a shim prints; real ones
	// print below 200 bytes.
	maxVersionOutput = 16 << 10
	// maxShimBinary bounds hashing. containerd-shim-spin 0.24 has 120 MB.
	maxShimBinary = 1 << 30
)

// ErrNoVersion says that a shim's output names no version.
var ErrNoVersion = errors.New("the output names no version")

// ErrUnsafeBinary says that a shim was not executed because others than root
// can change it.
var ErrUnsafeBinary = errors.New("others than root can change it")

// versionToken is a semantic version with an optional leading "v", as the
// whole of a word.
var versionToken = regexp.MustCompile(`^v?(\d{1,9}\.\d{1,9}\.\d{1,9}(?:[-+][0-9A-Za-z.+-]{1,64})?)[,;]?$`)

// ParseVersion reads what a shim prints for "-v": the line "Version: 0.24.0"
// of runwasi's shims (crates/containerd-shimkit/src/sandbox/cli.rs) and of
// containerd's own, or, failing that, the first word that is a semantic
// version. The result has no leading "v". ErrNoVersion when there is none.
func ParseVersion(output []byte) (string, error) {
	if len(output) > maxVersionOutput {
		output = output[:maxVersionOutput]
	}
	first := ""
	for line := range strings.Lines(string(output)) {
		line = strings.TrimSpace(line)
		name, value, labelled := strings.Cut(line, ":")
		if labelled && strings.EqualFold(strings.TrimSpace(name), "version") {
			for word := range strings.FieldsSeq(value) {
				if version, ok := parseToken(word); ok {
					return version, nil
				}
			}
		}
		if first != "" || labelled && strings.Contains(strings.ToLower(name), "version") {
			continue // "Go version: go1.26" is not the shim's
		}
		for word := range strings.FieldsSeq(line) {
			if version, ok := parseToken(word); ok {
				first = version
				break
			}
		}
	}
	if first == "" {
		return "", ErrNoVersion
	}
	return first, nil
}

func parseToken(word string) (string, bool) {
	match := versionToken.FindStringSubmatch(word)
	if match == nil || !semver.IsValid("v"+match[1]) {
		return "", false
	}
	return match[1], true
}

// olderThan says whether version precedes minimum; both without "v". A version
// that cannot be read precedes nothing: that is a problem of its own.
func olderThan(version, minimum string) bool {
	if minimum == "" || !semver.IsValid("v"+version) {
		return false
	}
	return semver.Compare("v"+version, "v"+minimum) < 0
}

// runVersion asks a shim for its version. root is the node's file system as
// this process sees it, path the binary within. The shim runs as containerd
// would run it, but without environment or input, for at most
// versionDeadline, and only when none but root could have put it there.
func runVersion(ctx context.Context, root, path string) (string, error) {
	if err := checkOwnership(root, path); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionDeadline)
	defer cancel()
	var output limitedBuffer
	output.limit = maxVersionOutput
	command := exec.CommandContext(ctx, path, "-v")
	command.Env = []string{}
	command.Dir = "/"
	command.Stdout, command.Stderr = &output, &output
	command.WaitDelay = versionWait
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if root != "/" {
		command.SysProcAttr.Chroot = root
	}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	err := command.Run()
	if ctx.Err() != nil {
		return "", fmt.Errorf("asking %s for its version: no answer within %v", path, versionDeadline)
	}
	version, parseErr := ParseVersion(output.Bytes())
	switch {
	case parseErr == nil:
		return version, nil
	case err != nil:
		return "", fmt.Errorf("asking %s for its version: %w", path, err)
	default:
		return "", fmt.Errorf("asking %s for its version: %w", path, parseErr)
	}
}

// checkOwnership refuses a binary that somebody other than root could have
// put there or changed: we would execute it as root before containerd does.
func checkOwnership(root, path string) error {
	for at := path; ; at = filepath.Dir(at) {
		info, err := os.Stat(filepath.Join(root, at))
		if err != nil {
			return fmt.Errorf("checking who owns %s: %w", path, err)
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("checking who owns %s: the system does not say", at)
		}
		// In a sticky directory nobody replaces another's file.
		writable := info.Mode().Perm()&0o022 != 0 && !(info.IsDir() && info.Mode()&os.ModeSticky != 0)
		if stat.Uid != 0 || writable {
			return fmt.Errorf("%s is not executed: %s has owner %d and mode %v: %w", path, at, stat.Uid, info.Mode().Perm(), ErrUnsafeBinary)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

// hashBinary returns the hex SHA-256 of a shim of at most maxShimBinary bytes.
func hashBinary(ctx context.Context, path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("hashing the shim: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", fmt.Errorf("hashing %s: %w", path, err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxShimBinary {
		return "", fmt.Errorf("hashing %s: not a file of at most %d bytes", path, maxShimBinary)
	}
	sum := sha256.New()
	buffer := make([]byte, 1<<20)
	for {
		if ctx.Err() != nil {
			return "", fmt.Errorf("hashing %s: %w", path, context.Cause(ctx))
		}
		n, err := file.Read(buffer)
		sum.Write(buffer[:n])
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(sum.Sum(nil)), nil
		}
		if err != nil {
			return "", fmt.Errorf("hashing %s: %w", path, err)
		}
	}
}

// BinaryCache remembers what was read of shims until their files change. The
// zero value is ready; a nil cache remembers nothing.
type BinaryCache struct {
	mu    sync.Mutex // one Discover may run beside another
	known map[string]inspected
}

// inspected is what was read of a file in one state.
type inspected struct {
	state           fileState
	digest, version string
}

// fileState changes whenever a file's content may have: ctime follows every
// write, replacement and change of owner or mode.
type fileState struct {
	device, inode        uint64
	size                 int64
	seconds, nanoseconds int64 // of ctime
}

func stateOf(info os.FileInfo) fileState {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fileState{}
	}
	seconds, nanoseconds := stat.Ctim.Unix()
	return fileState{stat.Dev, stat.Ino, stat.Size, seconds, nanoseconds}
}

// inspect returns a shim's digest and version. Only success is remembered:
// what failed may be repaired by a change elsewhere, of a directory's mode.
func (c *BinaryCache) inspect(ctx context.Context, root, path string) (digest, version string, err error) {
	info, err := os.Stat(filepath.Join(root, path))
	if err != nil {
		return "", "", fmt.Errorf("reading the shim: %w", err)
	}
	state := stateOf(info)
	if c != nil {
		c.mu.Lock()
		known, ok := c.known[path]
		c.mu.Unlock()
		if ok && known.state == state {
			return known.digest, known.version, nil
		}
	}
	if digest, err = hashBinary(ctx, filepath.Join(root, path)); err != nil {
		return "", "", err
	}
	if version, err = runVersion(ctx, root, path); err != nil {
		return digest, "", err
	}
	if c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.known == nil || len(c.known) >= maxShims {
			c.known = map[string]inspected{}
		}
		c.known[path] = inspected{state, digest, version}
	}
	return digest, version, nil
}

// limitedBuffer keeps the first limit bytes and drops the rest. It is for one
// writer at a time.
type limitedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	keep := min(len(p), b.limit-b.Len())
	b.Buffer.Write(p[:keep])
	return len(p), nil
}
