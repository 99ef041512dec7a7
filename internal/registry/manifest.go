package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// maxManifestBytes bounds a manifest, as registries themselves do (4 MiB).
const maxManifestBytes = 4 << 20

// Format is how a module is packaged in its artifact.
type Format string

// The artifact formats a node can pull.
const (
	// FormatSpin is a Spin application with exactly one Wasm layer.
	FormatSpin Format = "spin"
	// FormatWasm is the CNCF Wasm artifact: one application/wasm layer.
	FormatWasm Format = "wasm"
)

// wasmLayer is the one layer of a manifest that is the module.
type wasmLayer struct {
	Format Format
	Digest v1.Hash
	Size   int64
}

// manifestDoc is the part of an OCI manifest that decides what it is.
type manifestDoc struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	ArtifactType  string          `json:"artifactType"`
	Config        descriptor      `json:"config"`
	Layers        []descriptor    `json:"layers"`
	Manifests     json.RawMessage `json:"manifests"`
}

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

// parseManifest finds the module in a manifest of at most maxManifestBytes.
// What is not one of the supported formats is ErrNotWasm, with a sentence
// that says what it is instead.
func parseManifest(raw []byte) (wasmLayer, error) {
	if len(raw) > maxManifestBytes {
		return wasmLayer{}, fmt.Errorf("%w: the manifest has more than %d bytes", ErrTooLarge, maxManifestBytes)
	}
	var m manifestDoc
	if err := json.Unmarshal(raw, &m); err != nil {
		return wasmLayer{}, fmt.Errorf("%w: the manifest is not a JSON object: %w", ErrNotWasm, err)
	}
	if m.SchemaVersion != 2 {
		return wasmLayer{}, fmt.Errorf("%w: manifest schema version %d, only 2 is read", ErrNotWasm, m.SchemaVersion)
	}
	if m.MediaType == MediaTypeIndex || m.MediaType == MediaTypeDockerIndex ||
		(len(m.Manifests) > 0 && !bytes.Equal(m.Manifests, []byte("null"))) {
		return wasmLayer{}, fmt.Errorf("%w: it is an index of several images; name one of them by its digest", ErrNotWasm)
	}
	if m.MediaType != "" && m.MediaType != MediaTypeManifest && m.MediaType != MediaTypeDockerManifest {
		return wasmLayer{}, fmt.Errorf("%w: manifest media type %.100q", ErrNotWasm, m.MediaType)
	}

	spin := slices.ContainsFunc(m.Layers, func(d descriptor) bool { return d.MediaType == MediaTypeSpinApp })
	switch {
	case spin:
		return spinLayer(m)
	case m.Config.MediaType == MediaTypeWasmConfig || m.ArtifactType == MediaTypeWasm:
		if len(m.Layers) != 1 || m.Layers[0].MediaType != MediaTypeWasm {
			return wasmLayer{}, fmt.Errorf("%w: a Wasm artifact has exactly one layer of type %s, this one has %s", ErrNotWasm, MediaTypeWasm, layerTypes(m.Layers))
		}
		return checkLayer(FormatWasm, m.Layers[0])
	case slices.ContainsFunc(m.Layers, func(d descriptor) bool { return isTarLayer(d.MediaType) }):
		return wasmLayer{}, fmt.Errorf("%w: it is a container image; Wasm packaged in container layers is not read yet, push the module with `spin registry push` or `wkg oci push`", ErrNotWasm)
	default:
		return wasmLayer{}, fmt.Errorf("%w: configuration %.100q with %s", ErrNotWasm, m.Config.MediaType, layerTypes(m.Layers))
	}
}

func spinLayer(m manifestDoc) (wasmLayer, error) {
	if m.Config.MediaType != MediaTypeImageConfig && !strings.HasPrefix(m.Config.MediaType, "application/vnd.docker.container.image") {
		return wasmLayer{}, fmt.Errorf("%w: Spin application with configuration %.100q", ErrNotWasm, m.Config.MediaType)
	}
	var module *descriptor
	for i, d := range m.Layers {
		switch d.MediaType {
		case MediaTypeSpinWasm:
			if module != nil {
				return wasmLayer{}, fmt.Errorf("%w: a Spin application with more than one component; deploy one function per component", ErrNotWasm)
			}
			module = &m.Layers[i]
		case MediaTypeSpinApp:
		default:
			// Files would be missing at run time: better refused here than
			// failing in the first request.
			return wasmLayer{}, fmt.Errorf("%w: a Spin application with files (layer %.100q) is not read yet", ErrNotWasm, d.MediaType)
		}
	}
	if module == nil {
		return wasmLayer{}, fmt.Errorf("%w: a Spin application without a Wasm layer", ErrNotWasm)
	}
	return checkLayer(FormatSpin, *module)
}

func checkLayer(f Format, d descriptor) (wasmLayer, error) {
	h, err := parseDigest(d.Digest)
	if err != nil {
		return wasmLayer{}, fmt.Errorf("%w: the layer's digest: %w", ErrNotWasm, err)
	}
	if d.Size < int64(len(wasmMagic)) {
		return wasmLayer{}, fmt.Errorf("%w: the layer declares %d bytes", ErrNotWasm, d.Size)
	}
	return wasmLayer{Format: f, Digest: h, Size: d.Size}, nil
}

func isTarLayer(mt string) bool {
	return strings.HasPrefix(mt, "application/vnd.oci.image.layer.") ||
		strings.HasPrefix(mt, "application/vnd.docker.image.rootfs.")
}

// layerTypes lists the layers' media types for an error message, bounded.
func layerTypes(ls []descriptor) string {
	if len(ls) == 0 {
		return "no layers"
	}
	var names []string
	for i, l := range ls {
		if i == 3 {
			names = append(names, fmt.Sprintf("and %d more", len(ls)-3))
			break
		}
		names = append(names, fmt.Sprintf("%.80q", l.MediaType))
	}
	return "layers " + strings.Join(names, ", ")
}
