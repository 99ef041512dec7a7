package precompile

import (
	"errors"
	"fmt"
	"syscall"
)

// Codes of an Error. They are stable: the submit API uses them as the last
// segment of problem types, and nodes report them.
const (
	// CodeNotWasm: the bytes are not WebAssembly at all.
	CodeNotWasm = "not-wasm"
	// CodeComponentUnsupported: a component, which this runtime cannot run yet.
	CodeComponentUnsupported = "component-unsupported"
	// CodeNativeArtifact: machine code (ELF, a serialized module), never accepted.
	CodeNativeArtifact = "native-artifact"
	// CodeModuleTooLarge: more bytes than v1alpha1.MaxModuleBytes.
	CodeModuleTooLarge = "module-too-large"
	// CodeMalformedModule: the binary format is violated, e.g. truncated.
	CodeMalformedModule = "malformed-module"
	// CodeInvalidModule: well-formed, but does not validate.
	CodeInvalidModule = "invalid-module"
	// CodeUnsupportedImport: imports something the host does not offer.
	CodeUnsupportedImport = "unsupported-import"
	// CodeMemoryOverLimit: the minimum memory exceeds the function's limit.
	CodeMemoryOverLimit = "memory-over-limit"
	// CodeLimitExceeded: another bound (locals, table entries, …) is exceeded.
	CodeLimitExceeded = "limit-exceeded"
	// CodeNoStartFunction: does not export _start: () -> ().
	CodeNoStartFunction = "no-start-function"
	// CodeUnsupportedFeature: uses a Wasm proposal that is switched off.
	CodeUnsupportedFeature = "unsupported-feature"
	// CodeCompileTimeout: checking or compiling took longer than allowed.
	CodeCompileTimeout = "compile-timeout"
	// CodeCompileMemory: checking or compiling took more memory than allowed.
	CodeCompileMemory = "compile-memory"
	// CodeCompilerCrashed: the child ended without an answer.
	CodeCompilerCrashed = "compiler-crashed"
	// CodeDiskFull: no room on the filesystem or in the store's budget.
	CodeDiskFull = "disk-full"
	// CodeInternal: a fault of this machine or of Hearth, not of the module.
	CodeInternal = "internal"
)

// Error is why a module was refused or could not be compiled or stored.
type Error struct {
	// Code is one of the constants above.
	Code string
	// Detail is one sentence that says what was wrong, for a person.
	Detail string
	// Retryable says whether the same module can succeed later unchanged.
	Retryable bool

	err error
}

func (e *Error) Error() string {
	if e.err != nil {
		return fmt.Sprintf("%s: %v", e.Detail, e.err)
	}
	return e.Detail
}

// Unwrap returns the cause, if there is one beyond Detail.
func (e *Error) Unwrap() error { return e.err }

// ErrUnusable is wrapped by every error of Load that a fresh compile repairs:
// the object is missing, damaged, or made for another engine or machine.
var ErrUnusable = errors.New("precompiled object is unusable")

func internalError(err error, format string, args ...any) *Error {
	e := &Error{Code: CodeInternal, Detail: fmt.Sprintf(format, args...), Retryable: true, err: err}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		e.Code = CodeDiskFull
		e.Detail = "no space left on the disk while " + e.Detail
	}
	return e
}
