package shim

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Kind is how a runtime is made to run the probe.
type Kind string

const (
	// KindCommand runs a wasip1 command from an OCI image whose layer is the
	// module itself (architecture "wasm"), as runwasi does from 0.3 on.
	KindCommand Kind = "command"
	// KindFile runs a wasip1 command that is a file in an ordinary image, for
	// runtimes that know no Wasm layers.
	KindFile Kind = "file"
	// KindSpin runs a Spin application and asks it over HTTP on the loopback
	// address, because Spin's trigger runs nothing until it is asked.
	KindSpin Kind = "spin"
	// KindUnproven is a Wasm runtime for which there is no probe: it can be
	// listed, never proven.
	KindUnproven Kind = "unproven"
)

// knownRuntimes are the Wasm engines with a containerd shim, by the name in
// containerd-shim-<name>-v<n>. Slight and wws only serve applications in
// formats of their own, and both projects are archived.
var knownRuntimes = map[string]Kind{
	"lunatic":  KindFile,
	"slight":   KindUnproven,
	"spin":     KindSpin,
	"wamr":     KindCommand,
	"wasmedge": KindCommand,
	"wasmer":   KindCommand,
	"wasmtime": KindCommand,
	"wws":      KindUnproven,
}

// Source says where a fact about a runtime comes from.
type Source string

// The places Discover looks at.
const (
	SourceBinary       Source = "binary"
	SourceCRI          Source = "cri"
	SourceConfig       Source = "config"
	SourceRuntimeClass Source = "runtimeclass"
)

// Runtime is one way in which this node could run WebAssembly: a shim, and the
// runtime handler through which pods reach it. A shim behind two handlers is
// two Runtimes.
type Runtime struct {
	// Name is the engine: "spin", "wasmtime". It comes from the runtime type
	// or the binary.
	Name string `json:"name"`
	// Kind is how the runtime is probed.
	Kind Kind `json:"kind"`
	// Handler is the CRI runtime handler, what a RuntimeClass names. Empty:
	// containerd has none for this shim, so no pod can use it.
	Handler string `json:"handler,omitempty"`
	// RuntimeType is containerd's name for the shim: "io.containerd.spin.v2".
	RuntimeType string `json:"runtimeType"`
	// RuntimePath is the shim's absolute path when the configuration fixes it
	// (runtime_path); containerd then does not search its PATH.
	RuntimePath string `json:"runtimePath,omitempty"`
	// Options are the handler's options as containerd read them.
	Options map[string]any `json:"options,omitempty"`
	// Snapshotter is the handler's own snapshotter; empty: containerd's.
	Snapshotter string `json:"snapshotter,omitempty"`
	// Binary is the file that containerd would execute, or, when Problems say
	// that containerd cannot find it, where it was seen. Empty: nowhere.
	Binary string `json:"binary,omitempty"`
	// Version is what the shim says of itself, without a leading "v". Empty:
	// not known; Problems say why.
	Version string `json:"version,omitempty"`
	// Digest is the hex SHA-256 of the binary; empty when it was not read.
	Digest string `json:"digest,omitempty"`
	// RuntimeClasses are the names of those that lead to Handler, sorted.
	RuntimeClasses []string `json:"runtimeClasses,omitempty"`
	// Sources say where this was found, sorted.
	Sources []Source `json:"sources"`
	// TooOld says that Version is below the minimum for this engine.
	TooOld bool `json:"tooOld,omitempty"`
	// Problems are sentences about what is wrong and what to do.
	Problems []string `json:"problems,omitempty"`
}

// Key names a Runtime on its node: the handler, or without one the runtime
// type.
func (r Runtime) Key() string {
	return cmp.Or(r.Handler, r.RuntimeType)
}

// Identity changes whenever something changes that a proof depends on: the
// binary's content, its version, its place, the handler's type and options.
func (r Runtime) Identity() string {
	// A map of JSON values: encoding cannot fail, and keys come out sorted.
	options, _ := json.Marshal(r.Options)
	sum := sha256.New()
	for _, part := range []string{r.Handler, r.RuntimeType, r.RuntimePath, string(options), r.Binary, r.Version, r.Digest} {
		sum.Write([]byte(part))
		sum.Write([]byte{0})
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// systemdCgroup says whether the handler's cgroups are made by systemd.
func (r Runtime) systemdCgroup() bool {
	on, _ := r.Options[optionSystemdCgroup].(bool)
	return on
}

// Names of handler options, as containerd's runc shim established them and
// k3s renders them for Wasm shims too.
const (
	optionSystemdCgroup = "SystemdCgroup"
	optionBinaryName    = "BinaryName"
)

// shimBinary matches a shim's file name: containerd makes it from the last two
// parts of the runtime type (pkg/shim/util.go, BinaryName).
var shimBinary = regexp.MustCompile(`^containerd-shim-([A-Za-z0-9][A-Za-z0-9_-]{0,62})-(v[0-9]{1,3})$`)

// binaryName is the file name that containerd looks for, "" when the type
// cannot name one.
func binaryName(runtimeType string) string {
	parts := strings.Split(runtimeType, ".")
	if len(parts) < 2 || parts[0] == "" {
		return ""
	}
	return "containerd-shim-" + parts[len(parts)-2] + "-" + parts[len(parts)-1]
}

// engineName is the engine in a shim's file name.
func engineName(binary string) (name, runtimeType string, ok bool) {
	match := shimBinary.FindStringSubmatch(binary)
	if match == nil {
		return "", "", false
	}
	return match[1], "io.containerd." + match[1] + "." + match[2], true
}

// kinds are the runtimes that count as Wasm: the known ones and the caller's.
func kinds(extra map[string]Kind) map[string]Kind {
	all := maps.Clone(knownRuntimes)
	maps.Copy(all, extra)
	return all
}

func addSorted[T cmp.Ordered](list []T, value T) []T {
	at, found := slices.BinarySearch(list, value)
	if found {
		return list
	}
	return slices.Insert(list, at, value)
}
