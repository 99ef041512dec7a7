package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/journal"
)

const (
	// journalTimeout bounds reading the last lines of a unit.
	journalTimeout = 5 * time.Second
	// maxLine is how much of a line is quoted, in bytes.
	maxLine = 400
	// maxJournal bounds what is read of journalctl.
	maxJournal = 1 << 20
	// maxField bounds a value that is sent.
	maxField = 1 << 20
)

// ErrNoJournal is what Send returns where no journal listens.
var ErrNoJournal = errors.New("no systemd journal listens on this machine")

// Priority is syslog's severity, as in sd-daemon(3).
type Priority int

// Priorities.
const (
	PriorityError   Priority = 3
	PriorityWarning Priority = 4
	PriorityNotice  Priority = 5
	PriorityInfo    Priority = 6
	PriorityDebug   Priority = 7
)

// Send writes one entry to the journal, with fields of its own that
// `journalctl FIELD=value` finds. Names are upper case letters, digits and
// underscores, and begin with a letter (systemd.journal-fields(7)); values may
// be anything up to a megabyte.
func Send(p Priority, message string, fields map[string]string) error {
	for name, value := range fields {
		if !validField(name) {
			return fmt.Errorf("%q cannot be the name of a journal field", name)
		}
		if len(value) > maxField {
			return fmt.Errorf("the journal field %s has %d bytes; at most %d are sent", name, len(value), maxField)
		}
	}
	if !journal.Enabled() {
		return ErrNoJournal
	}
	if err := journal.Send(message, journal.Priority(p), fields); err != nil {
		return fmt.Errorf("writing to the journal: %w", err)
	}
	return nil
}

func validField(name string) bool {
	if name == "" || len(name) > 64 || name[0] < 'A' || name[0] > 'Z' {
		return false
	}
	return strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") == ""
}

// journalLines returns a unit's last lines of this boot, oldest first; nothing
// if they cannot be read, because they only ever illustrate something.
// journalctl reads them, as sd-journal is a C library.
func journalLines(ctx context.Context, unit string, n int) []string {
	// Also when the caller's time is up: that is when they are wanted most.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), journalTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "journalctl", "--boot", "--quiet", "--no-pager", "--output=cat", "--lines="+strconv.Itoa(n), "--unit="+unit)
	var out bytes.Buffer
	cmd.Stdout, cmd.WaitDelay = &limited{&out, maxJournal}, time.Second
	if err := cmd.Run(); err != nil {
		return nil
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		// A terminal, such as EC2's console, must not obey what a program wrote.
		line = strings.Map(func(r rune) rune {
			if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
				return ' '
			}
			return r
		}, strings.TrimSpace(line))
		if len(line) > maxLine {
			line = strings.ToValidUTF8(line[:maxLine], "") + "…"
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	return lines[max(len(lines)-n, 0):]
}

// limited swallows what is beyond a bound.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(b []byte) (int, error) {
	n := min(len(b), l.left)
	l.left -= n
	if _, err := l.w.Write(b[:n]); err != nil {
		return 0, err
	}
	return len(b), nil
}
