package precompile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

// Descriptors a child inherits besides standard input (request), standard
// output (result) and standard error (only for crashes).
const (
	moduleDescriptor   = 3
	lifelineDescriptor = 4
	outputDescriptor   = 5 // only when compiling
)

// wireVersion is that of request and result. Parent and child are the same
// program; a difference means that the program was replaced meanwhile.
const wireVersion = 1

const (
	maxRequestBytes = 4 << 10
	maxResultBytes  = 64 << 10
	// maxDetailBytes bounds what is told about one module.
	maxDetailBytes = 2 << 10
	// maxNamedImports is how many imports an error or a report names.
	maxNamedImports = 20
)

type operation string

const (
	operationCheck   operation = "check"
	operationCompile operation = "compile"
)

type request struct {
	Version   int       `json:"version"`
	Operation operation `json:"operation"`
	SizeBytes int64     `json:"sizeBytes"`
	// MemoryLimitPages bounds the module's initial memory.
	MemoryLimitPages uint32 `json:"memoryLimitPages"`
	// MemoryBytes and CPUSeconds bound the child.
	MemoryBytes uint64 `json:"memoryBytes"`
	CPUSeconds  uint64 `json:"cpuSeconds"`
	// RequireSandbox makes the child fail where the kernel cannot confine it.
	RequireSandbox bool `json:"requireSandbox,omitempty"`
}

func (r *request) validate() error {
	switch {
	case r.Version != wireVersion:
		return fmt.Errorf("request has version %d, this is version %d", r.Version, wireVersion)
	case r.Operation != operationCheck && r.Operation != operationCompile:
		return fmt.Errorf("unknown operation %q", r.Operation)
	case r.SizeBytes < 0 || r.SizeBytes > v1alpha1.MaxModuleBytes:
		return fmt.Errorf("size of %d bytes is out of range", r.SizeBytes)
	case r.MemoryLimitPages > maxMemoryPages:
		return fmt.Errorf("memory limit of %d pages is out of range", r.MemoryLimitPages)
	case r.MemoryBytes == 0 || r.MemoryBytes > 1<<40 || r.CPUSeconds == 0 || r.CPUSeconds > 1<<20:
		return errors.New("limits of the child are out of range")
	}
	return nil
}

type result struct {
	Version int                `json:"version"`
	Sandbox sandbox.Applied    `json:"sandbox"`
	Failure *failure           `json:"failure,omitempty"`
	Module  *moduleDescription `json:"module,omitempty"`
	// Timings are lower, validate and compile, in milliseconds.
	Timings []v1alpha1.Phase `json:"timings"`
}

type failure struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

type moduleDescription struct {
	Imports        []string `json:"imports"`
	MemoryMinPages uint64   `json:"memoryMinPages"`
	Functions      int      `json:"functions"`
}

// codesOfChild are the codes a child may answer with; the others are the
// parent's to give.
var codesOfChild = []string{
	CodeNotWasm, CodeComponentUnsupported, CodeNativeArtifact, CodeModuleTooLarge, CodeMalformedModule, CodeInvalidModule,
	CodeUnsupportedImport, CodeMemoryOverLimit, CodeLimitExceeded, CodeNoStartFunction, CodeUnsupportedFeature,
	CodeCompilerCrashed, CodeDiskFull, CodeInternal,
}

var timingNames = []string{"lower", "validate", "compile"}

// validate treats the result as what it is, the word of a process that
// handled hostile bytes: everything in it is bounded and made printable.
func (r *result) validate() error {
	if r.Version != wireVersion {
		return fmt.Errorf("result has version %d, this is version %d", r.Version, wireVersion)
	}
	if (r.Failure == nil) == (r.Module == nil) {
		return errors.New("result is neither a failure nor a description")
	}
	if r.Failure != nil {
		if !slices.Contains(codesOfChild, r.Failure.Code) {
			return errors.New("result has an unknown code")
		}
		r.Failure.Detail = printable(r.Failure.Detail, maxDetailBytes)
	}
	if r.Module != nil {
		if len(r.Module.Imports) > 1000 || r.Module.MemoryMinPages > maxMemoryPages || r.Module.Functions < 0 {
			return errors.New("result describes an impossible module")
		}
		for i, name := range r.Module.Imports {
			r.Module.Imports[i] = printable(name, 200)
		}
	}
	if len(r.Timings) > len(timingNames) || len(r.Sandbox.Notes) > 10 {
		return errors.New("result is too long")
	}
	for _, t := range r.Timings {
		if !slices.Contains(timingNames, t.Name) || !(t.Milliseconds >= 0 && t.Milliseconds < 1e9) {
			return errors.New("result has an impossible timing")
		}
	}
	for i, note := range r.Sandbox.Notes {
		r.Sandbox.Notes[i] = printable(note, 500)
	}
	return nil
}

// readMessage decodes one message of at most limit bytes.
func readMessage(r io.Reader, limit int64, into interface{ validate() error }) error {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return err
	}
	if int64(len(b)) > limit {
		return fmt.Errorf("message is longer than %d bytes", limit)
	}
	if err := decodeStrict(b, into); err != nil {
		return err
	}
	return into.validate()
}

func writeMessage(w io.Writer, message any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// printable makes text from outside safe to show in one line and cuts it.
func printable(s string, limit int) string {
	cut := len(s) > limit
	if cut {
		s = s[:limit]
	}
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if cut {
		s += "…"
	}
	return s
}
