// Package process runs programs for the parts of tests that own whole trees of
// processes: short ones for what they say, and daemons in cgroups that end
// them all.
package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// logBytes bounds what TailFile reads of a log.
const logBytes = 64 << 10

// Output runs one short program of this machine and returns what it said, on
// both streams; so does the error.
func Output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Quote makes one word for the shell.
func Quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Tail returns the last lines of text.
func Tail(text []byte, lines int) string {
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// TailFile returns the last lines of a log, or why it cannot be read.
func TailFile(path string, lines int) string {
	file, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err.Error()
	}
	offset := max(0, info.Size()-logBytes)
	content := make([]byte, info.Size()-offset)
	n, err := file.ReadAt(content, offset)
	switch {
	case n > 0:
		return Tail(content[:n], lines)
	case err != nil && !errors.Is(err, io.EOF):
		return err.Error()
	}
	return "(empty)"
}
