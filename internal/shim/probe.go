package shim

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

//go:generate clang --target=wasm32 -Oz -nostdlib -ffreestanding -fno-builtin -Wl,--strip-all -Wl,-z,stack-size=4096 -Wl,--export=_start -Wl,--no-entry -o probe/probe.wasm probe/probe.c

// probeModule is probe/probe.c, compiled.
//
//go:embed probe/probe.wasm
var probeModule []byte

// probePrefix is what the probe hashes before its argument, so that its
// answer is of no use anywhere else.
const probePrefix = "hearth.sh/probe/v1\n"

// ProbeModule returns a copy of the WebAssembly module that a runtime runs to
// prove itself: a wasip1 command that prints Answer of its last argument.
func ProbeModule() []byte { return bytes.Clone(probeModule) }

// NewNonce returns a question that nobody has asked before: 32 hex digits from
// the system's random source.
func NewNonce() string {
	var nonce [16]byte
	rand.Read(nonce[:]) // never fails: it ends the process instead
	return hex.EncodeToString(nonce[:])
}

// Answer is what the probe computes for a nonce, in hex.
func Answer(nonce string) string {
	sum := sha256.Sum256([]byte(probePrefix + nonce))
	return hex.EncodeToString(sum[:])
}

// answered says whether a probe's output, or a response's body, is the answer
// to nonce. The header is there when nothing took it off.
func answered(output []byte, nonce string) bool {
	body := strings.TrimPrefix(string(output), "content-type: text/plain\n\n")
	return body == Answer(nonce)+"\n"
}

// Media types of the probe's layers: what runwasi's generic shims select, and
// what containerd-shim-spin does (containerd-shim-spin/src/constants.rs).
const (
	mediaTypeWasm       = "application/wasm"
	mediaTypeComponent  = "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"
	mediaTypeSpinWasm   = "application/vnd.wasm.content.layer.v1+wasm"
	mediaTypeSpinLocked = "application/vnd.fermyon.spin.application.v1+config"
)

// wasmMediaTypes are the layers that shims compile.
var wasmMediaTypes = []string{mediaTypeWasm, mediaTypeComponent, mediaTypeSpinWasm}

// probeFile is the module's name in an image of KindFile.
const probeFile = "probe.wasm"

// blob is one piece of an image.
type blob struct {
	ocispec.Descriptor
	data []byte
}

func newBlob(mediaType string, data []byte) blob {
	return blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data}
}

// probeImage is the probe as an image in memory.
type probeImage struct {
	manifest, config blob
	layers           []blob
	// args are the process's arguments before the nonce.
	args []string
	// unpack says that the layers make up a file system.
	unpack bool
}

// newProbeImage packs the probe in the form that a kind of runtime takes.
func newProbeImage(kind Kind) (probeImage, error) {
	var image probeImage
	config := ocispec.Image{Platform: ocispec.Platform{Architecture: "wasm", OS: "wasip1"}}
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	switch kind {
	case KindCommand:
		image.layers = []blob{newBlob(mediaTypeWasm, probeModule)}
		// Without a diff ID containerd would not unpack; with one it would
		// try. Nothing is to be unpacked, but runwasi's own builder lists it.
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, image.layers[0].Digest)
		image.args = []string{"/" + probeFile}
	case KindFile:
		layer, err := tarLayer()
		if err != nil {
			return image, err
		}
		image.layers = []blob{newBlob(ocispec.MediaTypeImageLayer, layer)}
		config.Platform = ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, image.layers[0].Digest)
		image.args = []string{"/" + probeFile}
		image.unpack = true
	case KindSpin:
		module := newBlob(mediaTypeSpinWasm, probeModule)
		locked, err := lockedProbe(module.Digest)
		if err != nil {
			return image, err
		}
		image.layers = []blob{module, newBlob(mediaTypeSpinLocked, locked)}
		config.Config.Labels = map[string]string{"com.fermyon.spin.lockedAppDigest": image.layers[1].Digest.String()}
		image.args = []string{"/"}
	default:
		return image, fmt.Errorf("making the probe image: there is no probe for runtimes of kind %q", kind)
	}
	data, err := json.Marshal(config)
	if err != nil {
		return image, fmt.Errorf("making the probe image: %w", err)
	}
	image.config = newBlob(ocispec.MediaTypeImageConfig, data)
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    image.config.Descriptor,
	}
	for _, layer := range image.layers {
		manifest.Layers = append(manifest.Layers, layer.Descriptor)
	}
	if data, err = json.Marshal(manifest); err != nil {
		return image, fmt.Errorf("making the probe image: %w", err)
	}
	image.manifest = newBlob(ocispec.MediaTypeImageManifest, data)
	return image, nil
}

// tarLayer is a file system with nothing but the probe in it.
func tarLayer() ([]byte, error) {
	var layer bytes.Buffer
	writer := tar.NewWriter(&layer)
	err := writer.WriteHeader(&tar.Header{Name: probeFile, Mode: 0o755, Size: int64(len(probeModule)), Format: tar.FormatUSTAR})
	if err == nil {
		_, err = writer.Write(probeModule)
	}
	if err == nil {
		err = writer.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("making the probe image: %w", err)
	}
	return layer.Bytes(), nil
}

// lockedProbe is Spin's locked application, lock version 0, with the probe on
// every route under the "wagi" executor: CGI, the query string as arguments.
func lockedProbe(module digest.Digest) ([]byte, error) {
	const name = "hearth-probe"
	type object = map[string]any
	locked, err := json.Marshal(object{
		"spin_lock_version": 0,
		"metadata": object{
			"name": name, "version": "1.0.0",
			"trigger":  object{"type": "http"},
			"triggers": object{"http": object{}},
		},
		"variables": object{},
		"triggers": []object{{
			"id": "trigger--" + name, "trigger_type": "http",
			"trigger_config": object{"component": name, "route": "/...", "executor": object{"type": "wagi"}},
		}},
		"components": []object{{
			"id":       name,
			"metadata": object{"allowed_outbound_hosts": []string{}},
			"source":   object{"content_type": "application/wasm", "digest": module.String()},
			"env":      object{}, "files": []any{}, "config": object{},
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("making the probe image: %w", err)
	}
	return locked, nil
}
