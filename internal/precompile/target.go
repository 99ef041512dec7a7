package precompile

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"path"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"

	"golang.org/x/sys/cpu"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/wasm"
)

// Target is everything that decides whether machine code made somewhere can
// run here. Two equal targets can share objects.
type Target struct {
	// Engine is the engine's name and version, "wazero v1.12.0".
	Engine string `json:"engine"`
	// EngineSum is the checksum of the engine's source as go.sum has it. A
	// fork behind a replace directive keeps the version, but not this. Empty
	// in test binaries.
	EngineSum string `json:"engineSum,omitempty"`
	// Lowering is wasm.LoweringVersion.
	Lowering int    `json:"lowering"`
	GOOS     string `json:"goos"`
	GOARCH   string `json:"goarch"`
	// CPUFeatures are the optional instructions the compiler may have used,
	// by the bits wazero gives them (amd64: 1 SSE4.1, 2 BMI1, 4 LZCNT;
	// arm64: 1 LSE atomics).
	CPUFeatures uint64 `json:"cpuFeatures"`
}

const engineModule = "github.com/tetratelabs/wazero"

// CurrentTarget is the target of this process.
var CurrentTarget = sync.OnceValue(func() Target {
	version, sum := engineVersion()
	return Target{
		Engine:      "wazero " + version,
		EngineSum:   sum,
		Lowering:    wasm.LoweringVersion,
		GOOS:        runtime.GOOS,
		GOARCH:      runtime.GOARCH,
		CPUFeatures: cpuFeatures(),
	}
})

// engineVersion says what wazero calls itself when it names its cache
// directory (internal/version.GetWazeroVersion).
func engineVersion() (version, sum string) {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if !strings.Contains(dep.Path, engineModule) {
				continue
			}
			version, sum = dep.Version, dep.Sum
			if dep.Replace != nil {
				sum = dep.Replace.Sum
			}
		}
		if version == "" || version == "(devel)" {
			version = info.Main.Version
		}
	}
	if version == "" || version == "(devel)" {
		version = "dev"
	}
	return version, sum
}

// cpuFeatures repeats what wazero detects (internal/platform/cpuid*.go), for
// it is part of the cache's key and not exported.
func cpuFeatures() uint64 {
	var flags uint64
	switch runtime.GOARCH {
	case "amd64":
		if cpu.X86.HasSSE41 {
			flags |= 1
		}
		if cpu.X86.HasBMI1 {
			flags |= 2
		}
		if cpu.X86.HasBMI1 && cpu.X86.HasBMI2 && cpu.X86.HasPOPCNT {
			flags |= 4
		}
	case "arm64":
		if cpu.ARM64.HasATOMICS {
			flags |= 1
		}
	}
	return flags
}

// codeDirectory is the directory, below an object's, that the engine is given
// for its cache.
const codeDirectory = "code"

// codePath predicts where the engine keeps the code of a module, below an
// object's directory. It repeats wazero's cache.go (directory) and
// engine_cache.go (key): SHA-256 of the module's identifier, "WAZEVO" and the
// CPU features, where the identifier is SHA-256 of the module and one byte
// that is 0 while WithCloseOnContextDone is off. A compile that ends up
// elsewhere is refused, so a wrong prediction is found at once.
func (t Target) codePath(module []byte) string {
	h := sha256.New()
	h.Write(module)
	h.Write([]byte{0})
	id := h.Sum(nil)
	h.Reset()
	h.Write(id)
	h.Write([]byte("WAZEVO"))
	h.Write(binary.LittleEndian.AppendUint64(nil, t.CPUFeatures))
	version := strings.TrimPrefix(t.Engine, "wazero ")
	return path.Join(codeDirectory, "wazero-"+version+"-"+t.GOARCH+"-"+t.GOOS, hex.EncodeToString(h.Sum(nil)))
}

// pageBytes is the size of a page of linear memory.
const pageBytes = 64 << 10

// maxMemoryPages is the most linear memory any function may ask for.
const maxMemoryPages = v1alpha1.MaxMemoryMiB << 20 / pageBytes

// runtimeConfig is the one configuration for compiling and for loading: the
// engine's cache key does not cover all of it, so there must not be two.
func runtimeConfig(cache wazero.CompilationCache, memoryLimitPages uint32) wazero.RuntimeConfig {
	config := wazero.NewRuntimeConfigCompiler().
		WithCoreFeatures(api.CoreFeaturesV2).
		// Interrupt checks are lowered into the module; the engine's own cost
		// several times as much and can be evaded.
		WithCloseOnContextDone(false).
		// Lowering drops custom sections; looking for debug information would
		// still cost.
		WithDebugInfoEnabled(false).
		WithCustomSections(false).
		WithMemoryLimitPages(memoryLimitPages)
	if cache != nil {
		config = config.WithCompilationCache(cache)
	}
	return config
}

// lowerOptions are the lowering that LoweringVersion stands for.
func lowerOptions() wasm.LowerOptions {
	limits := wasm.DefaultLimits()
	limits.ModuleBytes = v1alpha1.MaxModuleBytes
	return wasm.LowerOptions{
		Limits:          limits,
		InterruptChecks: true,
		// wazero v1.12.0 miscompiles integer remainders on arm64.
		RemainderByDivision: runtime.GOARCH == "arm64",
		MaxTableEntries:     uint32(limits.TableEntries),
	}
}
