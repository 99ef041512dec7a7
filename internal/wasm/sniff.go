package wasm

import (
	"bytes"
	"encoding/binary"
)

// Kind says what a blob is, judged by its first bytes alone.
type Kind int

// The kinds [Sniff] tells apart.
const (
	// KindUnknown is anything not recognised.
	KindUnknown Kind = iota
	// KindModule is a core module, version 1.
	KindModule
	// KindComponent is a component (component model binary, layer 1).
	KindComponent
	// KindNative is machine code: an executable, an object file or the
	// serialized form of some engine. Such bytes must never be loaded from
	// outside, no engine can check them.
	KindNative
)

// String returns the kind in words fit for an error message.
func (k Kind) String() string {
	switch k {
	case KindModule:
		return "core module"
	case KindComponent:
		return "component"
	case KindNative:
		return "native artifact"
	default:
		return "unknown"
	}
}

// SniffBytes is how many leading bytes [Sniff] looks at, at most.
const SniffBytes = 16

// nativeMagics are the first bytes of formats that hold machine code. ELF
// covers wasmtime's .cwasm and wasmer's .wasmu with the ELF container,
// "WAZEVO" is the file cache of wazero.
var nativeMagics = [][]byte{
	[]byte("\x7fELF"),
	[]byte("MZ"),               // PE
	[]byte("\xfe\xed\xfa\xce"), // Mach-O, 32 bit
	[]byte("\xfe\xed\xfa\xcf"), // Mach-O, 64 bit
	[]byte("\xce\xfa\xed\xfe"),
	[]byte("\xcf\xfa\xed\xfe"),
	[]byte("\xca\xfe\xba\xbe"), // Mach-O, fat (also Java class files)
	[]byte("\xca\xfe\xba\xbf"),
	[]byte("!<arch>\n"),            // static library
	[]byte("WAZEVO"),               // wazero
	[]byte("\x00wasmtime-"),        // wasmtime before it used ELF
	[]byte("\xe4wasmtime-aot"),     // likewise
	[]byte("wasmer-universal"),     // wasmer
	[]byte("\x00wasmer-universal"), // wasmer
	[]byte("\x00aot\x01\x00\x00"),  // wasm-micro-runtime, version 1
	[]byte("\x00aot"),              // and the others
}

// Sniff says what the blob starting with prefix is. [SniffBytes] bytes
// suffice; with fewer the answer is KindUnknown more often, never wrong.
func Sniff(prefix []byte) Kind {
	if len(prefix) > SniffBytes {
		prefix = prefix[:SniffBytes]
	}
	if len(prefix) >= 8 && bytes.HasPrefix(prefix, []byte("\x00asm")) {
		// The second word is a 16-bit version and a 16-bit layer: layer 0 is
		// a core module, layer 1 a component (component model,
		// design/mvp/Binary.md).
		version, layer := binary.LittleEndian.Uint16(prefix[4:]), binary.LittleEndian.Uint16(prefix[6:])
		switch {
		case layer == 0 && version == 1:
			return KindModule
		case layer == 1:
			return KindComponent
		}
		return KindUnknown
	}
	for _, magic := range nativeMagics {
		if bytes.HasPrefix(prefix, magic) {
			return KindNative
		}
	}
	return KindUnknown
}
