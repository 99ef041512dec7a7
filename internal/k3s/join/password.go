package join

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// NodePasswordFile is where k3s keeps the password with which this machine
	// proves that a node's name is its own.
	NodePasswordFile = "/etc/rancher/node/password" //nolint:gosec // where it is, not what it is

	nodePasswordBytes    = 16 // as k3s takes
	maxNodePasswordBytes = 256
)

// Password is a node password. Printing or logging it shows nothing.
type Password struct{ secret string }

// Reveal returns the password as k3s reads it.
func (p Password) Reveal() string { return p.secret }

// String hides the password.
func (p Password) String() string { return "REDACTED" }

// Format hides the password whatever the verb.
func (p Password) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(p.String())) }

// MarshalText hides the password.
func (p Password) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// LogValue hides the password.
func (p Password) LogValue() slog.Value { return slog.StringValue(p.String()) }

// NodePassword returns the node password in a file, usually NodePasswordFile,
// and first makes one, durably, if there is none: once a server has seen a
// password for a node's name it accepts no other. Errors have the code
// CodeNodePassword.
func NodePassword(file string) (Password, error) {
	fail := func(err error) (Password, error) {
		return Password{}, fault.New(CodeNodePassword, err, "check the file system, or remove the file if this machine is no node yet", "cannot read or make the node password in %s", file)
	}
	f, err := os.Open(file)
	if err == nil {
		defer func() { _ = f.Close() }()
		b, err := io.ReadAll(io.LimitReader(f, maxNodePasswordBytes+1))
		if err != nil {
			return fail(err)
		}
		p, err := ParseNodePassword(b)
		if err != nil {
			return fail(err)
		}
		return p, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	b := make([]byte, nodePasswordBytes)
	if _, err := rand.Read(b); err != nil {
		return fail(err)
	}
	p := Password{hex.EncodeToString(b)}
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	if err := renameio.WriteFile(file, []byte(p.secret+"\n"), 0o600, renameio.WithTempDir(dir)); err != nil {
		return fail(err)
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := syncDirectory(d); err != nil {
			return fail(err)
		}
	}
	return p, nil
}

// ParseNodePassword reads the contents of the file.
func ParseNodePassword(b []byte) (Password, error) {
	s := strings.TrimSpace(string(b))
	if len(b) > maxNodePasswordBytes || s == "" {
		return Password{}, fmt.Errorf("a node password of %d bytes", len(b))
	}
	for _, r := range s {
		if r <= ' ' || r > '~' { // it travels in a header
			return Password{}, errors.New("a node password with other characters than printable ASCII")
		}
	}
	return Password{s}, nil
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
