package shim

import (
	"fmt"
	"strconv"
	"strings"
)

// runwasi keeps compiled modules in containerd's content store and notes them
// in labels of the image's manifest and layers
// (crates/containerd-shim-wasm/src/containerd/client.rs, load_modules):
//
//	manifest  runwasi.io/precompiled/<shim>/<u64> = "true"
//	layer     runwasi.io/precompiled/<shim>/<u64> = <digest of the compiled blob>
//	blob      runwasi.io/precompiled/<shim>/<u64>/original = <digest of the layer>
//
// The number is a hash of the engine's version, settings and CPU features; it
// cannot be computed outside the shim, only learnt from labels it wrote.
const (
	compileLabelPrefix = "runwasi.io/precompiled/"
	compileLabelBlob   = "/original"
)

// CompileKey is one shim's one engine: what was compiled under another key is
// of no use to it.
type CompileKey struct {
	// Shim is the name that the shim gives itself: "spin", "wasmtime".
	Shim string
	// Engine is the hash of engine and CPU, a decimal 64-bit number. It is
	// kept as text because JSON numbers are not wide enough.
	Engine string
}

// String is the key as the label spells it: "spin/17767192358106208183".
func (k CompileKey) String() string { return k.Shim + "/" + k.Engine }

// MarshalText writes the key as String does.
func (k CompileKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *CompileKey) UnmarshalText(text []byte) error {
	key, ok := parseCompileLabel(compileLabelPrefix + string(text))
	if !ok {
		return fmt.Errorf("reading a compile key: %q is not <shim>/<number>", text)
	}
	*k = key
	return nil
}

func (k CompileKey) label() string { return compileLabelPrefix + k.String() }

// parseCompileLabel reads the name of a label on a manifest or a layer. Others,
// those on the compiled blobs included, are not ok.
func parseCompileLabel(label string) (key CompileKey, ok bool) {
	rest, ok := strings.CutPrefix(label, compileLabelPrefix)
	if !ok {
		return key, false
	}
	name, engine, ok := strings.Cut(rest, "/")
	if !ok || name == "" || strings.TrimSpace(name) != name {
		return key, false
	}
	// Exactly as Rust prints a u64: no sign, no leading zero.
	number, err := strconv.ParseUint(engine, 10, 64)
	if err != nil || strconv.FormatUint(number, 10) != engine {
		return key, false
	}
	return CompileKey{Shim: name, Engine: engine}, true
}
