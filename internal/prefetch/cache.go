package prefetch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// maxDesiredBytes bounds an encoded desired state, from the API or from disk:
// ten thousand functions with 4 KiB of settings each fit.
const maxDesiredBytes = 64 << 20

// emptyDir makes parent/name exist, private and empty.
func emptyDir(parent, name string) (string, error) {
	dir := filepath.Join(parent, name)
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("remove temporary files of an earlier run: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a directory for temporary files: %w", err)
	}
	return dir, nil
}

// parseDesired reads a desired state from outside. Functions that cannot be
// worked on are dropped and counted rather than spoiling the others.
func parseDesired(raw []byte) (d v1alpha1.Desired, dropped int, err error) {
	if err := json.Unmarshal(raw, &d); err != nil {
		return v1alpha1.Desired{}, 0, fmt.Errorf("read desired state: %w", err)
	}
	seen := make(map[string]bool, len(d.Functions))
	kept := d.Functions[:0]
	for _, f := range d.Functions {
		if f.Name == "" || seen[f.Name] {
			dropped++
			continue
		}
		seen[f.Name] = true
		kept = append(kept, f)
	}
	d.Functions = kept
	return d, dropped, nil
}

// loadCache returns the last desired state from disk. A cache that cannot be
// read is no cache: the API has the truth.
func (l *Loop) loadCache() (v1alpha1.Desired, bool) {
	if l.o.CachePath == "" {
		return v1alpha1.Desired{}, false
	}
	f, err := os.Open(l.o.CachePath)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			l.log.Warn("last desired state not read, waiting for the API", "file", l.o.CachePath, "err", err)
		}
		return v1alpha1.Desired{}, false
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxDesiredBytes))
	if err == nil {
		var d v1alpha1.Desired
		if d, _, err = parseDesired(raw); err == nil {
			return d, true
		}
	}
	l.log.Warn("last desired state not usable, waiting for the API", "file", l.o.CachePath, "err", err)
	return v1alpha1.Desired{}, false
}

// saveCache keeps the desired state for a start without the API. The file
// holds secrets: it is 0600 from its first byte.
func (l *Loop) saveCache(d v1alpha1.Desired) {
	if l.o.CachePath == "" {
		return
	}
	raw, err := json.Marshal(d)
	if err == nil {
		err = renameio.WriteFile(l.o.CachePath, raw, 0o600, renameio.IgnoreUmask(), renameio.WithTempDir(filepath.Dir(l.o.CachePath)))
	}
	if err != nil {
		l.note("cache", err.Error())
		l.log.Warn("desired state not kept for the next start", "file", l.o.CachePath, "err", err)
	}
}
