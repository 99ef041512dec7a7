package artifact

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	kjson "sigs.k8s.io/json"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// ManifestKind is the kind of the document that Manifest is.
	ManifestKind = "ArtifactManifest"
	// MaxManifestBytes bounds the document.
	MaxManifestBytes = 1 << 20
	// MaxManifestArtifacts bounds its entries.
	MaxManifestArtifacts = 1000
)

// Manifest says which bytes are the released ones: a JSON document, signed
// apart from itself (see Signatures). An entry needs no path and mode; where
// to put a file is the node's affair.
type Manifest struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	// Name tells series of manifests apart, such as "hearth"; serials are
	// compared within a series only.
	Name string `json:"name"`
	// Serial grows with every issue of a series, from 1.
	Serial int64 `json:"serial"`
	// Issued is for people. It is not held against the clock, which may be
	// wrong on a machine that is just starting.
	Issued    time.Time  `json:"issued"`
	Artifacts []Artifact `json:"artifacts"`
}

// ParseManifest reads a manifest strictly: unknown, repeated or wrongly cased
// members, invalid UTF-8, duplicate entries and entries that contradict
// themselves are errors. It looks at no signature, see OpenManifest.
func ParseManifest(raw []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := parseStrict(raw, MaxManifestBytes, m); err != nil {
		return nil, manifestInvalid(err)
	}
	if err := m.Validate(); err != nil {
		return nil, manifestInvalid(err)
	}
	return m, nil
}

func manifestInvalid(err error) error {
	return fault.New(CodeManifestInvalid, err, "publish the manifest again with the release tool of this version", "the artifact manifest is not valid")
}

// Validate says what is wrong with the manifest.
func (m *Manifest) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if m.APIVersion != v1alpha1.APIVersion || m.Kind != ManifestKind {
		bad("it is %.60q %.60q, not %q %q", m.APIVersion, m.Kind, v1alpha1.APIVersion, ManifestKind)
	}
	if !nameSyntax.MatchString(m.Name) {
		bad("name %.120q must have lower-case letters, digits, '.', '_' and '-' only, at most 100", m.Name)
	}
	if m.Serial < 1 {
		bad("serial is %d: serials start with 1", m.Serial)
	}
	if m.Issued.IsZero() {
		bad("issued is missing")
	}
	if len(m.Artifacts) == 0 || len(m.Artifacts) > MaxManifestArtifacts {
		bad("it has %d artifacts: between 1 and %d are allowed", len(m.Artifacts), MaxManifestArtifacts)
		return errors.Join(errs...)
	}
	seen := make(map[[4]string]bool, len(m.Artifacts))
	for i := range m.Artifacts {
		a := &m.Artifacts[i]
		if a.Path != "" {
			errs = append(errs, a.Validate())
		} else {
			errs = append(errs, joined(a.Name, a.validate()))
		}
		id := [4]string{a.Name, a.Version, a.OS, a.Arch}
		if seen[id] {
			bad("%s for %s/%s is there twice", a, a.OS, a.Arch)
		}
		seen[id] = true
	}
	return errors.Join(errs...)
}

// Encode returns the bytes to sign and publish.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, manifestInvalid(err)
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	if b = append(b, '\n'); len(b) > MaxManifestBytes {
		return nil, manifestInvalid(fmt.Errorf("it has %d bytes: at most %d are allowed", len(b), MaxManifestBytes))
	}
	return b, nil
}

// Find returns a copy of the entry of that name and version for a platform. An
// empty version means the only one there is. An entry that leaves os or arch
// open fits every platform; one that names them goes first.
func (m *Manifest) Find(name, version, goos, goarch string) (Artifact, error) {
	var found []Artifact
	var others []string
	best := 0
	for _, a := range m.Artifacts {
		if a.Name != name {
			continue
		}
		fits := (a.OS == "" || a.OS == goos) && (a.Arch == "" || a.Arch == goarch)
		if !fits || version != "" && a.Version != version {
			others = append(others, strings.TrimSpace(fmt.Sprintf("%s %s/%s", a.Version, a.OS, a.Arch)))
			continue
		}
		precise := 0
		for _, p := range []string{a.OS, a.Arch} {
			if p != "" {
				precise++
			}
		}
		if precise > best {
			best, found = precise, nil
		}
		if precise == best {
			found = append(found, a)
		}
	}
	wanted := strings.TrimSpace(name + " " + version)
	switch {
	case len(found) == 1:
		a := found[0]
		a.URLs = slices.Clone(a.URLs)
		return a, nil
	case len(found) > 1:
		return Artifact{}, fault.New(CodeManifestNoEntry, nil, "say which version is wanted", "manifest %s serial %d has several versions of %s for %s/%s", m.Name, m.Serial, name, goos, goarch)
	case len(others) > 0:
		return Artifact{}, fault.New(CodeManifestNoEntry, nil, "choose one of those or publish a manifest that has it", "manifest %s serial %d has no %s for %s/%s, but has %s", m.Name, m.Serial, wanted, goos, goarch, strings.Join(others[:min(len(others), 10)], ", "))
	}
	return Artifact{}, fault.New(CodeManifestNoEntry, nil, "publish a manifest that has it", "manifest %s serial %d has no %s", m.Name, m.Serial, wanted)
}

// parseStrict decodes one bounded JSON document.
func parseStrict(raw []byte, limit int, into any) error {
	if len(raw) > limit {
		return fmt.Errorf("it has %d bytes: at most %d are allowed", len(raw), limit)
	}
	if !utf8.Valid(raw) {
		return errors.New("it is not UTF-8")
	}
	strict, err := kjson.UnmarshalStrict(raw, into)
	if err != nil {
		return err
	}
	return errors.Join(strict...)
}

func digestOf(b []byte) Digest { return sha256.Sum256(b) }
