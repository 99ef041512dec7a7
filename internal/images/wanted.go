package images

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
)

// PullSecret names a Secret of type kubernetes.io/dockerconfigjson. It is
// resolved only when the image is pulled, and only where that is allowed.
type PullSecret struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// Wanted is an image that should be on this node.
type Wanted struct {
	// Reference is the image, in canonical form.
	Reference Reference `json:"reference"`
	// Handlers are the runtime handlers to warm it for, sorted; none if it is
	// not run by a shim.
	Handlers []string `json:"handlers,omitempty"`
	// PullSecrets are tried in turn, before the node's own credentials.
	PullSecrets []PullSecret `json:"pullSecrets,omitempty"`
	// Users say who wants it, such as "pod team/web-0", sorted, at most
	// [MaxUsers] of UserCount.
	Users     []string `json:"users,omitempty"`
	UserCount int      `json:"userCount"`
	// Urgent images are those of pods on this node: they skip the delay that
	// spreads a fleet.
	Urgent bool `json:"urgent,omitempty"`
}

// MaxUsers bounds Wanted.Users.
const MaxUsers = 5

// maxPullSecrets bounds Wanted.PullSecrets: each costs a request.
const maxPullSecrets = 5

// Snapshot is what a source knows.
type Snapshot struct {
	// Wanted is sorted by name, with each name once.
	Wanted []Wanted
	// Known is false until there is anything to go by, be it from a cache.
	Known bool
	// Complete says that every part of the source has answered since the
	// process started. Nothing may be released before.
	Complete bool
	// StaleSince is when the source stopped answering, zero while it answers.
	StaleSince time.Time
	// StaleReason is one sentence for StaleSince.
	StaleReason string
	// Problems are sentences about what could not be read, at most a few.
	Problems []string
}

// want is one object's wish for one image.
type want struct {
	ref     Reference
	handler string
	secrets []PullSecret
	user    string
	urgent  bool
}

// merge makes one Wanted of all wishes for the same image.
func merge(wants []want) []Wanted {
	byName := make(map[string]*Wanted)
	users := make(map[string]map[string]bool)
	for _, w := range wants {
		m := byName[w.ref.Name]
		if m == nil {
			m = &Wanted{Reference: w.ref}
			byName[w.ref.Name], users[w.ref.Name] = m, make(map[string]bool)
		}
		if w.handler != "" && !slices.Contains(m.Handlers, w.handler) {
			m.Handlers = append(m.Handlers, w.handler)
		}
		for _, s := range w.secrets {
			if len(m.PullSecrets) < maxPullSecrets && !slices.Contains(m.PullSecrets, s) {
				m.PullSecrets = append(m.PullSecrets, s)
			}
		}
		users[w.ref.Name][w.user] = true
		m.Urgent = m.Urgent || w.urgent
	}
	out := make([]Wanted, 0, len(byName))
	for name, m := range byName {
		slices.Sort(m.Handlers)
		slices.SortFunc(m.PullSecrets, func(a, b PullSecret) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
		})
		for u := range users[name] {
			m.Users = append(m.Users, u)
		}
		slices.Sort(m.Users)
		m.UserCount = len(m.Users)
		m.Users = slices.Clip(m.Users[:min(len(m.Users), MaxUsers)])
		out = append(out, *m)
	}
	slices.SortFunc(out, func(a, b Wanted) int { return cmp.Compare(a.Reference.Name, b.Reference.Name) })
	return out
}

// union is live with what only cached has.
func union(live, cached []Wanted) []Wanted {
	out := slices.Clone(live)
	for _, c := range cached {
		if _, ok := slices.BinarySearchFunc(live, c.Reference.Name, func(w Wanted, n string) int { return cmp.Compare(w.Reference.Name, n) }); !ok {
			c.Urgent = false
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b Wanted) int { return cmp.Compare(a.Reference.Name, b.Reference.Name) })
	return out
}

// maxCacheBytes bounds the cache files of this package.
const maxCacheBytes = 16 << 20

// wantedFile is the cache of what was wanted last.
type wantedFile struct {
	Version int      `json:"version"`
	Wanted  []Wanted `json:"wanted"`
}

// readJSON reads a cache file. None is not an error, and neither found.
func readJSON(path string, into any) (found bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxCacheBytes+1))
	if err == nil && len(raw) > maxCacheBytes {
		err = fmt.Errorf("it has more than %d bytes", maxCacheBytes)
	}
	if err == nil {
		err = json.Unmarshal(raw, into)
	}
	return err == nil, err
}

// writeJSON replaces a cache file; readers see the old one or the new one.
func writeJSON(path string, from any) error {
	raw, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, raw, 0o644, renameio.IgnoreUmask(), renameio.WithTempDir(filepath.Dir(path)))
}

func readWanted(path string) ([]Wanted, error) {
	var f wantedFile
	if found, err := readJSON(path, &f); !found {
		return nil, err
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("its version is %d, not 1", f.Version)
	}
	// Nothing from a file is believed unparsed.
	kept := make([]Wanted, 0, len(f.Wanted))
	for _, w := range f.Wanted {
		r, err := ParseReference(w.Reference.Name)
		if err != nil {
			continue
		}
		w.Reference = r
		w.Handlers = slices.DeleteFunc(w.Handlers, func(h string) bool { return !validHandler(h) })
		kept = append(kept, w)
	}
	slices.SortFunc(kept, func(a, b Wanted) int { return cmp.Compare(a.Reference.Name, b.Reference.Name) })
	return slices.CompactFunc(kept, func(a, b Wanted) bool { return a.Reference.Name == b.Reference.Name }), nil
}
