package wasm

import "encoding/binary"

// WithoutBodies returns a module that Lower made with each function's body
// replaced by `unreachable`. Everything that decides how an instance is laid
// out (types, imports, functions, tables, memory, globals, exports, elements,
// data) stays as it is.
//
// It is what an engine needs beside machine code that was compiled from the
// whole module: decoding and validating bodies again is most of the time that
// loading such code takes. It must never be compiled itself.
//
// An error means that the input is not a well-formed module.
func WithoutBodies(module []byte) ([]byte, error) {
	fail := func(offset int, detail string) error {
		return &Error{Code: CodeMalformed, Section: "code", Offset: offset, Detail: detail}
	}
	const header = 8
	if len(module) < header {
		return nil, fail(0, "the module has no header")
	}
	out := append(make([]byte, 0, len(module)), module[:header]...)
	for at := header; at < len(module); {
		id := module[at]
		size, n := binary.Uvarint(module[at+1:])
		begin := at + 1 + n
		if n <= 0 || size > uint64(len(module)-begin) {
			return nil, fail(at, "a section's size is wrong")
		}
		end := begin + int(size)
		if id != sectionCode {
			out = append(out, module[at:end]...)
			at = end
			continue
		}
		count, n := binary.Uvarint(module[begin:end])
		if n <= 0 || count > size {
			return nil, fail(begin, "the number of functions is wrong")
		}
		section := binary.AppendUvarint(make([]byte, 0, 8+4*count), count)
		for range count {
			section = append(section, 3, 0, opUnreachable, opEnd) // size, no locals, body
		}
		out = append(out, id)
		out = binary.AppendUvarint(out, uint64(len(section)))
		out = append(out, section...)
		at = end
	}
	return out, nil
}
