package wasm

import "fmt"

// Code is the stable, kebab-case class of an [Error]; it may be shown to users
// and matched by programs.
type Code string

// The codes of an [Error].
const (
	// CodeNotWasm: the bytes do not start like a WebAssembly binary.
	CodeNotWasm Code = "not-wasm"
	// CodeComponent: a component where a core module is needed.
	CodeComponent Code = "component"
	// CodeNativeArtifact: machine code, see [KindNative].
	CodeNativeArtifact Code = "native-artifact"
	// CodeMalformed: the bytes do not follow the binary format.
	CodeMalformed Code = "malformed"
	// CodeInvalid: well-formed, but breaks a validation rule.
	CodeInvalid Code = "invalid"
	// CodeLimitExceeded: larger than [Limits] allow.
	CodeLimitExceeded Code = "limit-exceeded"
	// CodeUnsupportedFeature: uses a proposal beyond WebAssembly 2.0.
	CodeUnsupportedFeature Code = "unsupported-feature"
	// CodeReservedExport: exports a name that starts with [ReservedPrefix].
	CodeReservedExport Code = "reserved-export"
)

// Error is the error of [Parse] and [Lower]: why a module was refused.
type Error struct {
	Code Code
	// Section is the section the fault is in ("code", "import", …), or
	// "header", or empty when no single one is at fault.
	Section string
	// Offset is where the fault was seen, in bytes from the start of the
	// original module.
	Offset int
	// Detail is the fault in one lower-case sentence without a full stop.
	Detail string
}

// Error implements error.
func (e *Error) Error() string {
	where := ""
	if e.Section != "" {
		where = " in the " + e.Section + " section"
		if e.Section == "header" {
			where = " in the header"
		}
	}
	switch e.Code {
	case CodeNotWasm, CodeComponent, CodeNativeArtifact, CodeReservedExport:
		return e.Detail
	case CodeLimitExceeded:
		return fmt.Sprintf("module exceeds a limit%s at byte %d: %s", where, e.Offset, e.Detail)
	case CodeUnsupportedFeature:
		return fmt.Sprintf("module needs an unsupported feature%s at byte %d: %s", where, e.Offset, e.Detail)
	default:
		return fmt.Sprintf("%s module%s at byte %d: %s", e.Code, where, e.Offset, e.Detail)
	}
}
