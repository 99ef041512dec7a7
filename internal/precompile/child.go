package precompile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/sandbox"
	"github.com/hearth-sh/hearth/internal/wasm"
)

const (
	// maxOutputFileBytes bounds each file a child writes. Code is about four
	// times the size of its module, which has at most 50 MiB.
	maxOutputFileBytes = 1 << 30
	// maxChildFiles is well above what a compile opens.
	maxChildFiles = 64
	// maxStackBytes ends a runaway recursion of the compiler early; a deeply
	// nested module needs a few MiB.
	maxStackBytes = 256 << 20
	// minCompilationWorkers is what makes the engine look at the context
	// between functions; with one worker it does not.
	minCompilationWorkers = 2
	// addressSpaceBytes is what the Go runtime, thread stacks and the engine
	// reserve without using it, on top of what they use.
	addressSpaceBytes = 8 << 30
)

// ChildMain is the whole of a child process: it confines itself, answers one
// request from stdin with one result on stdout, and returns the exit code. It
// expects the descriptors that [Compiler] passes. A module that is refused is
// an answer, with exit code 0.
func ChildMain(ctx context.Context, stdin io.Reader, stdout io.Writer) int {
	if err := sandbox.Lifeline(lifelineDescriptor); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var req request
	if err := readMessage(stdin, maxRequestBytes, &req); err != nil {
		fmt.Fprintf(os.Stderr, "read the request: %v\n", err)
		return 1
	}
	res := result{Version: wireVersion}
	applied, err := confine(req)
	res.Sandbox = applied
	if err == nil {
		var job *job
		job, err = runJob(ctx, req)
		res.Timings = job.timings
		res.Module = job.description
	}
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = internalError(err, "precompiling")
		}
		res.Module = nil
		res.Failure = &failure{Code: e.Code, Detail: printable(e.Error(), maxDetailBytes)}
	}
	if err := writeMessage(stdout, &res); err != nil {
		fmt.Fprintf(os.Stderr, "write the result: %v\n", err)
		return 1
	}
	return 0
}

// confine gives up everything but reading the module's descriptor and writing
// below the output's, before the first byte of the module is looked at.
func confine(req request) (sandbox.Applied, error) {
	// The collector works harder before the limit is reached; the parent
	// watches the limit itself.
	debug.SetMemoryLimit(int64(req.MemoryBytes / 4 * 3))
	debug.SetMaxStack(maxStackBytes)
	policy := sandbox.Policy{
		AllowExecMemory:  true,
		MaxCPUSeconds:    req.CPUSeconds,
		MaxOpenFiles:     maxChildFiles,
		MaxFileSizeBytes: maxOutputFileBytes,
		Require:          req.RequireSandbox,
	}
	if !raceDetector { // which maps terabytes
		policy.MaxAddressSpaceBytes = addressSpaceBytes + req.MemoryBytes
	}
	if req.Operation == operationCompile {
		policy.ReadWrite = []string{outputPath()}
	}
	return sandbox.Enter(policy)
}

// outputPath reaches the output directory through the descriptor, because the
// account of this process may not be able to search the directories above it.
func outputPath() string { return fmt.Sprintf("/proc/self/fd/%d", outputDescriptor) }

// job is one module on its way through.
type job struct {
	req         request
	timings     []v1alpha1.Phase
	description *moduleDescription
}

func (j *job) time(name string, start time.Time) {
	j.timings = append(j.timings, phase(name, start))
}

func phase(name string, start time.Time) v1alpha1.Phase {
	return v1alpha1.Phase{Name: name, Milliseconds: milliseconds(time.Since(start))}
}

// milliseconds keeps microseconds: more digits would only look precise.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func runJob(ctx context.Context, req request) (j *job, err error) {
	j = &job{req: req}
	defer func() {
		if p := recover(); p != nil {
			err = &Error{Code: CodeCompilerCrashed, Detail: fmt.Sprintf("the compiler failed on this module: %v", p)}
		}
	}()
	file := os.NewFile(moduleDescriptor, "module")
	if file == nil {
		return j, internalError(os.ErrInvalid, "reading the module's descriptor")
	}
	// ReadAt: the offset is shared with the parent, which reads as well.
	module := make([]byte, req.SizeBytes)
	if _, err := io.ReadFull(io.NewSectionReader(file, 0, req.SizeBytes), module); err != nil {
		return j, internalError(err, "reading the module")
	}
	lowered, err := j.check(ctx, module)
	if err != nil || req.Operation != operationCompile {
		return j, err
	}
	return j, j.compile(ctx, lowered)
}

// check returns the lowered module if the original is one this host can run.
func (j *job) check(ctx context.Context, module []byte) ([]byte, error) {
	start := time.Now()
	switch wasm.Sniff(module[:min(len(module), wasm.SniffBytes)]) {
	case wasm.KindComponent:
		return nil, &Error{Code: CodeComponentUnsupported, Detail: "this is a WebAssembly component; components are not supported on the resident runtime yet, the spin runtime will run them: submit a core module built for wasip1 instead"}
	case wasm.KindNative:
		return nil, &Error{Code: CodeNativeArtifact, Detail: "this is machine code or a serialized module, which is never accepted: submit the WebAssembly module it was made from"}
	}
	lowered, err := wasm.Lower(module, lowerOptions())
	j.time("lower", start)
	if err != nil {
		return nil, fromWasm(err)
	}
	if err := checkImports(ctx, lowered.Module); err != nil {
		return nil, err
	}
	export, ok := lowered.Module.Export("_start")
	if !ok || export.Kind != wasm.ExternFunction || !export.Type.Equal(wasm.FunctionType{}) {
		return nil, &Error{Code: CodeNoStartFunction, Detail: "the module does not export a function _start without parameters and results: build it as a command for wasip1, not as a library or reactor"}
	}
	if limit := uint64(j.req.MemoryLimitPages); lowered.Module.MemoryMin > limit {
		return nil, &Error{Code: CodeMemoryOverLimit, Detail: fmt.Sprintf("the module starts with %d pages of memory (%.4g MiB), more than the %d pages (%.4g MiB) allowed: raise the function's memory limit or lower the module's initial memory",
			lowered.Module.MemoryMin, float64(lowered.Module.MemoryMin)/16, limit, float64(limit)/16)}
	}
	start = time.Now()
	err = validate(ctx, lowered.Bytes, j.req.MemoryLimitPages)
	j.time("validate", start)
	if err != nil {
		return nil, err
	}
	var imports []string
	for _, i := range lowered.Module.Imports {
		imports = append(imports, i.Module+"."+i.Name)
	}
	slices.Sort(imports)
	j.description = &moduleDescription{
		Imports:        slices.Compact(imports),
		MemoryMinPages: lowered.Module.MemoryMin,
		Functions:      lowered.Module.Functions,
	}
	return lowered.Bytes, nil
}

// errValidated is why a validation stops before it compiles.
var errValidated = errors.New("validated")

// validate runs the engine's own validation and nothing else: a compile whose
// context has ended already stops at its first function, after the whole
// module was validated. The engine has no other way to validate only, and its
// interpreter takes several times as long.
func validate(ctx context.Context, module []byte, memoryLimitPages uint32) error {
	// A module that validates does not depend on the memory's limit, but one
	// of 0 pages is not a valid setting.
	r := wazero.NewRuntimeWithConfig(ctx, runtimeConfig(nil, max(memoryLimitPages, 1)))
	defer r.Close(ctx)
	ended, cancel := context.WithCancelCause(ctx)
	cancel(errValidated)
	compiled, err := r.CompileModule(experimental.WithCompilationWorkers(ended, minCompilationWorkers), module)
	switch {
	case err == nil: // nothing to compile
		_ = compiled.Close(ctx)
		return nil
	case errors.Is(err, errValidated) || errors.Is(err, context.Canceled):
		return ctx.Err()
	}
	return &Error{Code: CodeInvalidModule, Detail: fmt.Sprintf("the module is not valid WebAssembly: %v", err)}
}

// checkImports compares what the module wants with what the host offers, both
// by name and by type.
func checkImports(ctx context.Context, m *wasm.Module) error {
	if len(m.Imports) == 0 {
		return nil
	}
	offered, err := hostFunctions(ctx)
	if err != nil {
		return internalError(err, "listing the host's functions")
	}
	var bad []string
	more := 0
	for _, i := range m.Imports {
		problem := ""
		switch want, ok := offered[i.Name]; {
		case i.Kind != wasm.ExternFunction:
			problem = "is a " + i.Kind.String() + ", only functions can be imported"
		case i.Module != wasi_snapshot_preview1.ModuleName || !ok:
			problem = "unknown"
		case !want.Equal(i.Type):
			problem = fmt.Sprintf("has type %s, not %s", want, i.Type)
		}
		if problem == "" {
			continue
		}
		if len(bad) == maxNamedImports {
			more++
			continue
		}
		name := printable(i.Module, 60) + "." + printable(i.Name, 60)
		if problem != "unknown" {
			name += " (" + printable(problem, 200) + ")"
		}
		bad = append(bad, name)
	}
	if len(bad) == 0 {
		return nil
	}
	list := strings.Join(bad, ", ")
	if more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return &Error{Code: CodeUnsupportedImport, Detail: "the module imports what this host does not offer (only functions of " + wasi_snapshot_preview1.ModuleName + "): " + list}
}

// hostFunctions asks the engine which functions of WASI preview 1 it has.
func hostFunctions(ctx context.Context) (map[string]wasm.FunctionType, error) {
	// The interpreter: nothing is to be compiled for a list.
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer r.Close(ctx)
	host, err := wasi_snapshot_preview1.NewBuilder(r).Compile(ctx)
	if err != nil {
		return nil, err
	}
	functions := map[string]wasm.FunctionType{}
	for name, f := range host.ExportedFunctions() {
		functions[name] = wasm.FunctionType{Params: valueTypes(f.ParamTypes()), Results: valueTypes(f.ResultTypes())}
	}
	return functions, nil
}

func valueTypes(types []api.ValueType) []wasm.ValueType {
	var converted []wasm.ValueType
	for _, t := range types {
		converted = append(converted, wasm.ValueType(t))
	}
	return converted
}

// fromWasm gives the errors of package wasm this package's codes.
func fromWasm(err error) error {
	var e *wasm.Error
	if !errors.As(err, &e) {
		return internalError(err, "lowering the module")
	}
	code := CodeInternal
	switch e.Code {
	case wasm.CodeNotWasm:
		return &Error{Code: CodeNotWasm, Detail: "this is not WebAssembly: a module begins with the bytes 00 61 73 6d 01 00 00 00"}
	case wasm.CodeComponent:
		code = CodeComponentUnsupported
	case wasm.CodeNativeArtifact:
		code = CodeNativeArtifact
	case wasm.CodeMalformed:
		code = CodeMalformedModule
	case wasm.CodeInvalid, wasm.CodeReservedExport:
		code = CodeInvalidModule
	case wasm.CodeLimitExceeded:
		code = CodeLimitExceeded
	case wasm.CodeUnsupportedFeature:
		code = CodeUnsupportedFeature
	}
	return &Error{Code: code, Detail: e.Error()}
}

// compile writes the lowered module's code, and the module without the bodies
// that the code was made from, to the output directory. Making them durable is
// the parent's part.
func (j *job) compile(ctx context.Context, lowered []byte) error {
	bodiless, err := wasm.WithoutBodies(lowered)
	if err != nil {
		return internalError(err, "taking the bodies out of the lowered module")
	}
	if err := os.WriteFile(path.Join(outputPath(), moduleFile), bodiless, 0o600); err != nil {
		return internalError(err, "writing the lowered module")
	}
	start := time.Now()
	defer func() { j.time("compile", start) }()
	cache, err := wazero.NewCompilationCacheWithDir(path.Join(outputPath(), codeDirectory))
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) || strings.Contains(err.Error(), syscall.ENOSPC.Error()) { // wrapped with %v
			err = syscall.ENOSPC
		}
		return internalError(err, "making the code's directory")
	}
	defer cache.Close(ctx)
	r := wazero.NewRuntimeWithConfig(ctx, runtimeConfig(cache, max(j.req.MemoryLimitPages, 1)))
	defer r.Close(ctx)
	workers := max(minCompilationWorkers, runtime.GOMAXPROCS(0))
	compiled, err := r.CompileModule(experimental.WithCompilationWorkers(ctx, workers), lowered)
	switch {
	case errors.Is(err, syscall.EFBIG):
		return &Error{Code: CodeLimitExceeded, Detail: fmt.Sprintf("the module's machine code is larger than %d MiB", maxOutputFileBytes>>20)}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return internalError(err, "writing the code")
	case err != nil:
		return &Error{Code: CodeCompilerCrashed, Detail: fmt.Sprintf("the compiler gave up on this module: %v", err)}
	}
	if err := compiled.Close(ctx); err != nil {
		return internalError(err, "closing the compiled module")
	}
	// The engine looks for code by the module it is given, which will be the
	// one without bodies.
	target := CurrentTarget()
	if err := os.Rename(path.Join(outputPath(), target.codePath(lowered)), path.Join(outputPath(), target.codePath(bodiless))); err != nil {
		return badOutput(err)
	}
	return nil
}
