package systemd

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/google/renameio/v2"
)

// DefaultMarkerDir is where markers are kept: in memory, because every service
// is started anew after a reboot.
const DefaultMarkerDir = "/run/hearth/started"

// maxMarker bounds a marker file.
const maxMarker = 4 << 10

// Inputs are the files a service was, or would be, started from: unit, program,
// configuration.
type Inputs struct {
	// SHA256 is over the paths and contents of all of them, in hex.
	SHA256 string
	// Newest is when the last of them was put in its place.
	Newest time.Time
}

// Verified are digests that somebody has just computed, so that programs of a
// hundred megabytes are not read twice.
type Verified struct {
	// At is when the last of them was known. A file that changed later is read.
	At time.Time
	// SHA256 has them in hex, by path.
	SHA256 map[string]string
}

// ReadInputs reads files, in any order. One that is missing counts as such. A
// program of a hundred megabytes takes a tenth of a second, so ask once.
func ReadInputs(paths ...string) (Inputs, error) { return Verified{}.ReadInputs(paths...) }

// ExpectInputs is ReadInputs for files of which some, whose digests in hex are
// given by path, are yet to be put in their places.
func ExpectInputs(will map[string]string, paths ...string) (Inputs, error) {
	return Verified{}.read(will, paths)
}

// ReadInputs is the function of that name without reading what is known.
func (v Verified) ReadInputs(paths ...string) (Inputs, error) { return v.read(nil, paths) }

func (v Verified) read(will map[string]string, paths []string) (Inputs, error) {
	var in Inputs
	all := sha256.New()
	for _, path := range slices.Sorted(slices.Values(paths)) {
		sum, changed, err := will[path], time.Now(), error(nil)
		if sum == "" {
			sum, changed, err = v.hashFile(path)
		}
		if err != nil {
			return Inputs{}, fmt.Errorf("reading what a service starts from: %w", err)
		}
		fmt.Fprintf(all, "%q %s\n", path, sum)
		if changed.After(in.Newest) {
			in.Newest = changed
		}
	}
	in.SHA256 = hex.EncodeToString(all.Sum(nil))
	return in, nil
}

func (v Verified) hashFile(path string) (sum string, changed time.Time, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "missing", time.Time{}, nil
	}
	if err != nil {
		return "", time.Time{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", time.Time{}, err
	}
	// The change time, not the modification time: it is the rename that counts,
	// and it cannot be set to something else.
	changed = time.Unix(st.Ctim.Unix())
	if sum = v.SHA256[path]; sum != "" && !changed.After(v.At) {
		return sum, changed, nil
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return "", time.Time{}, err
	}
	return hex.EncodeToString(hash.Sum(nil)), changed, nil
}

// marker says what an invocation of a unit was started from.
type marker struct {
	InvocationID string `json:"invocationID"`
	SHA256       string `json:"sha256"`
}

func markerPath(dir, unit string) (string, error) {
	if unit == "" || strings.ContainsAny(unit, "/\x00") || strings.HasPrefix(unit, ".") {
		return "", fmt.Errorf("%q is no unit", unit)
	}
	return filepath.Join(dir, unit+".json"), nil
}

// MarkStarted remembers, in a directory such as DefaultMarkerDir, what the
// unit's current invocation was started from.
func MarkStarted(dir string, u Unit, in Inputs) error {
	path, err := markerPath(dir, u.Name)
	if err != nil {
		return err
	}
	b, err := json.Marshal(marker{u.InvocationID, in.SHA256})
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = renameio.WriteFile(path, b, 0o600, renameio.WithTempDir(dir))
	}
	if err != nil {
		return fmt.Errorf("remembering what %s was started from: %w", u.Name, err)
	}
	return nil
}

// NeedsRestart says whether a running unit was started from something else than
// what is there now, and why. With the marker of this very invocation the
// contents decide; without one (it was restarted by somebody else, or at boot)
// whether something was put in its place after the start. A unit that does not
// run needs a start and no restart.
func NeedsRestart(dir string, u Unit, in Inputs) (bool, string) {
	if u.ActiveState == "inactive" || u.ActiveState == "failed" {
		return false, "it does not run"
	}
	if path, err := markerPath(dir, u.Name); err == nil {
		var m marker
		if b, err := readBounded(path); err == nil && json.Unmarshal(b, &m) == nil && m.InvocationID == u.InvocationID && m.InvocationID != "" {
			if m.SHA256 == in.SHA256 {
				return false, "it was started from what is there now"
			}
			return true, "its unit, program or configuration has another content than at its start"
		}
	}
	if u.Started.IsZero() || in.Newest.After(u.Started) {
		return true, "its unit, program or configuration was put there after its start"
	}
	return false, "it is younger than its unit, program and configuration"
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxMarker))
}
