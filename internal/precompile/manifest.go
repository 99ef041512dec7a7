package precompile

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// formatVersion is the version of manifest.json and of images/*.json. Another
// version is a miss, never an error: the store is a cache.
const formatVersion = 1

// maxDocumentBytes bounds a manifest or image index when read.
const maxDocumentBytes = 64 << 10

const (
	manifestFile = "manifest.json"
	moduleFile   = "module.wasm"
)

// Manifest describes an object: objects/<id>/manifest.json, wrapped as
// {"content": manifest, "sha256": "hex of content's bytes"}.
type Manifest struct {
	Version int    `json:"version"`
	Target  Target `json:"target"`
	// Source is the module as it was submitted.
	Source Source `json:"source"`
	// Files are all other files of the object: the lowered module first,
	// then its code.
	Files []File `json:"files"`
	// MemoryMinPages is the linear memory an instance starts with, in pages
	// of 64 KiB.
	MemoryMinPages uint64 `json:"memoryMinPages"`
	Functions      int    `json:"functions"`
	// Timings say what making it cost: lower, validate, compile.
	Timings   []v1alpha1.Phase `json:"timings"`
	CreatedAt time.Time        `json:"createdAt"`
}

// Source identifies a submitted module.
type Source struct {
	// SHA256 is in hex; it is also the object's identifier.
	SHA256    string `json:"sha256"`
	SizeBytes int64  `json:"sizeBytes"`
}

// File is one file of an object.
type File struct {
	// Path is relative to the object's directory, with slashes.
	Path      string `json:"path"`
	SHA256    string `json:"sha256"`
	SizeBytes int64  `json:"sizeBytes"`
}

// sizeBytes is the size of all files but the manifest.
func (m *Manifest) sizeBytes() int64 {
	var sum int64
	for _, f := range m.Files {
		sum += f.SizeBytes
	}
	return sum
}

// validate checks all that can be checked without the files.
func (m *Manifest) validate() error {
	if m.Version != formatVersion {
		return fmt.Errorf("manifest has format version %d, this is version %d", m.Version, formatVersion)
	}
	if !isHexDigest(m.Source.SHA256) {
		return errors.New("manifest has no digest of its source")
	}
	if len(m.Files) != 2 || m.Files[0].Path != moduleFile || !strings.HasPrefix(m.Files[1].Path, codeDirectory+"/") {
		return errors.New("manifest does not name a module and its code")
	}
	for _, f := range m.Files {
		// Paths come from the target and are compared with it later; this
		// keeps a damaged one from leaving the directory meanwhile.
		if !filepath.IsLocal(f.Path) || !isHexDigest(f.SHA256) || f.SizeBytes <= 0 {
			return fmt.Errorf("manifest has an invalid entry for %q", f.Path)
		}
	}
	return nil
}

// imageIndex is images/<digest>.json: which objects an image's layers became.
type imageIndex struct {
	Version int      `json:"version"`
	Image   string   `json:"image"`
	Objects []string `json:"objects"`
}

func (x *imageIndex) validate() error {
	if x.Version != formatVersion {
		return fmt.Errorf("image index has format version %d, this is version %d", x.Version, formatVersion)
	}
	if len(x.Objects) != 1 || !isHexDigest(x.Objects[0]) || !isHexDigest(x.Image) {
		return errors.New("image index does not name an image and its one object")
	}
	return nil
}

// sealed wraps a document with its own digest, for files that nothing else
// vouches for.
type sealed struct {
	Content json.RawMessage `json:"content"`
	SHA256  string          `json:"sha256"`
}

func seal(document any) ([]byte, error) {
	content, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(content)
	b, err := json.Marshal(sealed{Content: content, SHA256: hex.EncodeToString(sum[:])})
	return append(b, '\n'), err
}

// unseal is strict to the byte: what seal would not have written is refused,
// so no damage to a file goes unnoticed.
func unseal(b []byte, document interface{ validate() error }) error {
	var s sealed
	if err := decodeStrict(b, &s); err != nil {
		return err
	}
	sum := sha256.Sum256(s.Content)
	if hex.EncodeToString(sum[:]) != s.SHA256 {
		return errors.New("content does not have the digest beside it")
	}
	if err := decodeStrict(s.Content, document); err != nil {
		return err
	}
	again, err := seal(document)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, b) {
		return errors.New("document is not in canonical form")
	}
	return document.validate()
}

func decodeStrict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after the document")
	}
	return nil
}

// openRegular opens a regular file for reading and refuses links, devices and
// pipes, which could lead elsewhere or block.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// readSmall reads a regular file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, info, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func readManifest(objectDir string) (*Manifest, error) {
	b, err := readSmall(filepath.Join(objectDir, manifestFile), maxDocumentBytes)
	if err != nil {
		return nil, err
	}
	m := new(Manifest)
	if err := unseal(b, m); err != nil {
		return nil, fmt.Errorf("read %s: %w", manifestFile, err)
	}
	return m, nil
}

// verifyFile compares one file of an object with its manifest and returns its
// contents if keep is set.
func verifyFile(objectDir string, want File, keep bool) ([]byte, error) {
	f, info, err := openRegular(filepath.Join(objectDir, filepath.FromSlash(want.Path)))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info.Size() != want.SizeBytes {
		return nil, fmt.Errorf("%s has %d bytes, not %d", want.Path, info.Size(), want.SizeBytes)
	}
	h := sha256.New()
	var content []byte
	if keep {
		content = make([]byte, want.SizeBytes)
		if _, err := io.ReadFull(f, content); err != nil {
			return nil, fmt.Errorf("read %s: %w", want.Path, err)
		}
		h.Write(content)
	} else if _, err := io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("read %s: %w", want.Path, err)
	}
	if hex.EncodeToString(h.Sum(nil)) != want.SHA256 {
		return nil, fmt.Errorf("%s does not have the digest in the manifest", want.Path)
	}
	return content, nil
}

// verifyObject checks that an object was made for the target and that every
// file is what its manifest says. It returns the lowered module as well.
func verifyObject(objectDir string, target Target) (*Manifest, []byte, error) {
	m, err := readManifest(objectDir)
	if err != nil {
		return nil, nil, err
	}
	if m.Target != target {
		return nil, nil, fmt.Errorf("object was made for %+v, this is %+v", m.Target, target)
	}
	module, err := verifyFile(objectDir, m.Files[0], true)
	if err != nil {
		return nil, nil, err
	}
	if want := target.codePath(module); m.Files[1].Path != want {
		return nil, nil, fmt.Errorf("code is at %s, where the engine looks for %s", m.Files[1].Path, want)
	}
	if _, err := verifyFile(objectDir, m.Files[1], false); err != nil {
		return nil, nil, err
	}
	return m, module, nil
}

// isHexDigest reports whether s is a SHA-256 in lower-case hex.
func isHexDigest(s string) bool {
	if len(s) != sha256.Size*2 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// parseDigest takes "sha256:<hex>" apart.
func parseDigest(digest string) (string, error) {
	algorithm, hexDigest, ok := strings.Cut(digest, ":")
	if !ok || algorithm != "sha256" || !isHexDigest(hexDigest) {
		return "", fmt.Errorf("%q is not a sha256 digest", digest)
	}
	return hexDigest, nil
}
