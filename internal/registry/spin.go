package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Executor is how Spin's HTTP trigger runs a component.
type Executor string

// ExecutorWAGI runs a core module with _start once per request, CGI style;
// ExecutorHTTP calls a component's exported handler.
const (
	ExecutorWAGI Executor = "wagi"
	ExecutorHTTP Executor = "http"
)

// Module names a module's file on disk. The file must not change while the
// value is in use: the registry compares what it receives with Digest.
type Module struct {
	// Path is the file; empty, with Digest and Size, means that the registry has
	// the module in the very repository already. Publishing fails with ErrNotFound
	// where that is not so.
	Path string
	// Digest is "sha256:…" of its bytes; empty means: compute it.
	Digest string
	// Size is its length in bytes; 0 means: ask the file system.
	Size int64
}

// SpinOptions describe the application around one module.
type SpinOptions struct {
	// Name is the application's and the component's name: a DNS label.
	Name string
	// Version is free text, "1" or "1.4.0" (default "0.0.0").
	Version string
	// Executor defaults to ExecutorWAGI.
	Executor Executor
	// Env are the component's environment variables, as its guest sees them.
	// Whoever may read the registry reads them: no place for a secret.
	Env map[string]string
	// Variables are those that the application declares, by Spin's name in lower
	// case: without that a guest cannot read what it is given at run time.
	Variables map[string]SpinVariable
	// Created is written only when it is not zero: the same input then gives
	// the same digest, whenever it is built.
	Created time.Time
}

// SpinVariable declares a variable of an application.
type SpinVariable struct {
	// Default is its value where none is given at run time; nil: there must be.
	Default *string `json:"default,omitempty"`
	// Secret keeps Spin from logging the value, which is given at run time.
	Secret bool `json:"secret,omitempty"`
}

// componentID is what Spin accepts as a component's identifier and Hearth as
// a function's name.
var componentID = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

// wasmMagic begins every Wasm binary, core module and component alike.
var wasmMagic = []byte("\x00asm")

// lockedApp is Spin's locked application, lock version 0, as written by
// spin-locked-app; members in the order Spin writes them. Nothing of Spin 4
// (trigger dependencies, host requirements) is used, so that shims with
// Spin 3 accept it.
type lockedApp struct {
	SpinLockVersion int                     `json:"spin_lock_version"`
	Metadata        lockedMetadata          `json:"metadata"`
	Variables       map[string]SpinVariable `json:"variables"`
	Triggers        []lockedTrigger         `json:"triggers"`
	Components      []lockedComponent       `json:"components"`
}

type lockedMetadata struct {
	Name     string              `json:"name"`
	Trigger  map[string]string   `json:"trigger"`
	Triggers map[string]struct{} `json:"triggers"`
	Version  string              `json:"version"`
}

type lockedTrigger struct {
	ID            string              `json:"id"`
	TriggerType   string              `json:"trigger_type"`
	TriggerConfig lockedTriggerConfig `json:"trigger_config"`
}

type lockedTriggerConfig struct {
	Component string         `json:"component"`
	Executor  lockedExecutor `json:"executor"`
	Route     string         `json:"route"`
}

type lockedExecutor struct {
	Type Executor `json:"type"`
}

type lockedComponent struct {
	ID       string                  `json:"id"`
	Metadata lockedComponentMetadata `json:"metadata"`
	Source   lockedSource            `json:"source"`
	// Env are WASI environment variables, Config the component's variables: a
	// template of the application's each.
	Env    map[string]string `json:"env"`
	Files  []struct{}        `json:"files"`
	Config map[string]string `json:"config"`
}

type lockedComponentMetadata struct {
	AllowedOutboundHosts []string `json:"allowed_outbound_hosts"`
}

type lockedSource struct {
	ContentType string `json:"content_type"`
	Digest      string `json:"digest"`
}

// imageConfig is the OCI image configuration of a Spin artifact. Spin writes
// no diff IDs: its layers are not file system layers.
type imageConfig struct {
	Created      *time.Time        `json:"created,omitempty"`
	Architecture string            `json:"architecture"`
	OS           string            `json:"os"`
	Config       imageConfigConfig `json:"config"`
	RootFS       imageConfigRootFS `json:"rootfs"`
}

type imageConfigConfig struct {
	Labels map[string]string `json:"Labels"`
}

type imageConfigRootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

// lockedAppLabel makes the configuration differ between applications, which
// image stores need: they key images by the configuration's digest.
const lockedAppLabel = "com.fermyon.spin.lockedAppDigest"

// SpinImage is a Spin OCI artifact of one component. It implements
// [v1.Image]; the module is streamed from its file, never held in memory.
type SpinImage struct {
	config, manifest, app []byte
	configHash, hash      v1.Hash
	parsed                *v1.Manifest
	layers                []v1.Layer
}

var _ v1.Image = (*SpinImage)(nil)

// BuildSpin describes the module as a Spin application with one HTTP
// component on route "/...". The same module and options always give the
// same bytes and so the same digest.
//
// It fails when the name is not a DNS label, the file is not Wasm
// (ErrNotWasm) or larger than v1alpha1.MaxModuleBytes (ErrTooLarge).
func BuildSpin(m Module, opts SpinOptions) (*SpinImage, error) {
	if !componentID.MatchString(opts.Name) {
		return nil, fmt.Errorf("build artifact: %w: %q is not a DNS label", ErrInvalidReference, opts.Name)
	}
	if opts.Executor == "" {
		opts.Executor = ExecutorWAGI
	}
	if opts.Executor != ExecutorWAGI && opts.Executor != ExecutorHTTP {
		return nil, fmt.Errorf("build artifact: unknown executor %q, use %q or %q", opts.Executor, ExecutorWAGI, ExecutorHTTP)
	}
	if opts.Version == "" {
		opts.Version = "0.0.0"
	}
	layer, err := newFileLayer(m)
	if err != nil {
		return nil, fmt.Errorf("build artifact for %s: %w", opts.Name, err)
	}

	app, err := json.Marshal(lockedApp{
		Metadata: lockedMetadata{
			Name: opts.Name, Version: opts.Version,
			Trigger:  map[string]string{"type": "http"},
			Triggers: map[string]struct{}{"http": {}},
		},
		Variables: orEmpty(opts.Variables),
		Triggers: []lockedTrigger{{
			ID: "trigger--" + opts.Name, TriggerType: "http",
			TriggerConfig: lockedTriggerConfig{
				Component: opts.Name, Executor: lockedExecutor{Type: opts.Executor}, Route: "/...",
			},
		}},
		Components: []lockedComponent{{
			ID:       opts.Name,
			Metadata: lockedComponentMetadata{AllowedOutboundHosts: []string{}},
			Source:   lockedSource{ContentType: MediaTypeWasm, Digest: layer.hash.String()},
			Env:      orEmpty(opts.Env),
			Files:    []struct{}{},
			Config:   templates(opts.Variables),
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("build artifact for %s: %w", opts.Name, err)
	}
	appLayer := newBytesLayer(app, MediaTypeSpinApp)

	cfg := imageConfig{
		Architecture: "wasm", OS: "wasip1",
		Config: imageConfigConfig{Labels: map[string]string{lockedAppLabel: appLayer.hash.String()}},
		RootFS: imageConfigRootFS{Type: "layers", DiffIDs: []string{}},
	}
	annotations := map[string]string{
		"org.opencontainers.image.title":   opts.Name,
		"org.opencontainers.image.version": opts.Version,
	}
	if !opts.Created.IsZero() {
		t := opts.Created.UTC()
		cfg.Created = &t
		annotations["org.opencontainers.image.created"] = t.Format(time.RFC3339)
	}
	img := &SpinImage{app: app, layers: []v1.Layer{layer, appLayer}}
	if img.config, err = json.Marshal(cfg); err != nil {
		return nil, fmt.Errorf("build artifact for %s: %w", opts.Name, err)
	}
	img.configHash = hashOf(img.config)
	img.parsed = &v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(img.config)), Digest: img.configHash},
		Layers: []v1.Descriptor{
			{MediaType: MediaTypeSpinWasm, Size: layer.size, Digest: layer.hash},
			{MediaType: MediaTypeSpinApp, Size: int64(len(app)), Digest: appLayer.hash},
		},
		Annotations: annotations,
	}
	if img.manifest, err = json.Marshal(img.parsed); err != nil {
		return nil, fmt.Errorf("build artifact for %s: %w", opts.Name, err)
	}
	img.hash = hashOf(img.manifest)
	return img, nil
}

// orEmpty writes {} for no map: artifacts have had that from the beginning, and
// their digests with it.
func orEmpty[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return m
}

// templates gives the component each of the application's variables under the
// same name.
func templates(variables map[string]SpinVariable) map[string]string {
	out := make(map[string]string, len(variables))
	for name := range variables {
		out[name] = "{{ " + name + " }}"
	}
	return out
}

// LockedApp is the raw locked application, the artifact's last layer.
func (i *SpinImage) LockedApp() []byte { return bytes.Clone(i.app) }

// Layers implements [v1.Image].
func (i *SpinImage) Layers() ([]v1.Layer, error) { return i.layers, nil }

// MediaType implements [v1.Image].
func (i *SpinImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// Size implements [v1.Image]; it is the manifest's size.
func (i *SpinImage) Size() (int64, error) { return int64(len(i.manifest)), nil }

// ConfigName implements [v1.Image].
func (i *SpinImage) ConfigName() (v1.Hash, error) { return i.configHash, nil }

// ConfigFile implements [v1.Image].
func (i *SpinImage) ConfigFile() (*v1.ConfigFile, error) { return partial.ConfigFile(i) }

// RawConfigFile implements [v1.Image].
func (i *SpinImage) RawConfigFile() ([]byte, error) { return bytes.Clone(i.config), nil }

// Digest implements [v1.Image].
func (i *SpinImage) Digest() (v1.Hash, error) { return i.hash, nil }

// Manifest implements [v1.Image].
func (i *SpinImage) Manifest() (*v1.Manifest, error) { return i.parsed.DeepCopy(), nil }

// RawManifest implements [v1.Image].
func (i *SpinImage) RawManifest() ([]byte, error) { return bytes.Clone(i.manifest), nil }

// LayerByDigest implements [v1.Image].
func (i *SpinImage) LayerByDigest(h v1.Hash) (v1.Layer, error) {
	if h == i.configHash {
		return partial.ConfigLayer(i)
	}
	for _, l := range i.layers {
		if d, err := l.Digest(); err == nil && d == h {
			return l, nil
		}
	}
	return nil, fmt.Errorf("layer %s: %w", h, ErrNotFound)
}

// LayerByDiffID implements [v1.Image]. Layers are not compressed: a diff ID
// is the digest.
func (i *SpinImage) LayerByDiffID(h v1.Hash) (v1.Layer, error) { return i.LayerByDigest(h) }

// fileLayer is the module, read from its file each time it is sent.
type fileLayer struct {
	path string
	hash v1.Hash
	size int64
}

func newFileLayer(m Module) (*fileLayer, error) {
	if m.Path == "" && m.Digest != "" && m.Size > 0 {
		hash, err := parseDigest(m.Digest)
		return &fileLayer{hash: hash, size: m.Size}, err
	}
	f, err := os.Open(m.Path)
	if err != nil {
		return nil, fmt.Errorf("open module: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("stat module: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("module %s is not a regular file", m.Path)
	}
	if m.Size != 0 && m.Size != st.Size() {
		return nil, fmt.Errorf("module %s has %d bytes, not the %d it was announced with", m.Path, st.Size(), m.Size)
	}
	if st.Size() > v1alpha1.MaxModuleBytes {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are accepted", ErrTooLarge, st.Size(), v1alpha1.MaxModuleBytes)
	}
	l := &fileLayer{path: m.Path, size: st.Size()}
	var magic [4]byte
	if _, err := io.ReadFull(f, magic[:]); err != nil || !bytes.Equal(magic[:], wasmMagic) {
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("read module: %w", err)
		}
		return nil, fmt.Errorf("%w: the file does not begin with the Wasm magic bytes", ErrNotWasm)
	}
	if m.Digest != "" {
		if l.hash, err = parseDigest(m.Digest); err != nil {
			return nil, err
		}
		return l, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(f, l.size)); err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	l.hash = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	return l, nil
}

func (l *fileLayer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *fileLayer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *fileLayer) Size() (int64, error)                 { return l.size, nil }
func (l *fileLayer) MediaType() (types.MediaType, error)  { return MediaTypeSpinWasm, nil }
func (l *fileLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }
func (l *fileLayer) Compressed() (io.ReadCloser, error) {
	if l.path == "" {
		return nil, fmt.Errorf("%w: the module %s is not in the repository any more; submit it again", ErrNotFound, l.hash)
	}
	f, err := os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("open module: %w", err)
	}
	return f, nil
}

// bytesLayer is a small layer held in memory.
type bytesLayer struct {
	data []byte
	hash v1.Hash
	mt   types.MediaType
}

func newBytesLayer(data []byte, mt types.MediaType) *bytesLayer {
	return &bytesLayer{data: data, hash: hashOf(data), mt: mt}
}

func (l *bytesLayer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *bytesLayer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *bytesLayer) Size() (int64, error)                 { return int64(len(l.data)), nil }
func (l *bytesLayer) MediaType() (types.MediaType, error)  { return l.mt, nil }
func (l *bytesLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }
func (l *bytesLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.data)), nil
}

func hashOf(b []byte) v1.Hash {
	sum := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// parseDigest accepts sha256 only: it is what every registry serves and what
// the store is keyed by.
func parseDigest(s string) (v1.Hash, error) {
	h, err := v1.NewHash(s)
	if err != nil || h.Algorithm != "sha256" {
		return v1.Hash{}, fmt.Errorf("%w: %.100q is not a sha256 digest", ErrInvalidReference, s)
	}
	return h, nil
}
