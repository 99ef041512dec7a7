package wasm

import (
	"fmt"
	"math"
	"unicode/utf8"
)

// reader reads the primitive encodings of the binary format (chapter 5.2).
// The first fault sticks: it is kept in err, and every later read returns
// zero, so callers check err once per item and not once per byte.
type reader struct {
	b       []byte // the whole module, so that pos is an offset to report
	pos     int
	end     int // reads stay below it
	section string
	err     *Error
}

func (r *reader) fail(code Code, at int, format string, args ...any) {
	if r.err == nil {
		r.err = &Error{Code: code, Section: r.section, Offset: at, Detail: fmt.Sprintf(format, args...)}
	}
	r.pos = r.end
}

func (r *reader) malformed(at int, format string, args ...any) {
	r.fail(CodeMalformed, at, format, args...)
}

func (r *reader) ok() bool       { return r.err == nil }
func (r *reader) remaining() int { return r.end - r.pos }

func (r *reader) byte() byte {
	if r.pos >= r.end {
		r.malformed(r.pos, "unexpected end")
		return 0
	}
	c := r.b[r.pos]
	r.pos++
	return c
}

// u32 reads an unsigned LEB128 of at most 5 bytes whose unused bits are zero.
func (r *reader) u32() uint32 {
	if r.pos < r.end && r.b[r.pos] < 0x80 { // the common case
		c := r.b[r.pos]
		r.pos++
		return uint32(c)
	}
	start := r.pos
	var v uint32
	for shift := uint(0); shift < 35; shift += 7 {
		if r.pos >= r.end {
			r.malformed(r.pos, "unexpected end of an integer")
			return 0
		}
		c := r.b[r.pos]
		r.pos++
		if shift == 28 && c&0xf0 != 0 {
			break
		}
		v |= uint32(c&0x7f) << shift
		if c&0x80 == 0 {
			return v
		}
	}
	r.malformed(start, "integer is too long or too large")
	return 0
}

// signed reads a signed LEB128 of the given width (32, 33 or 64 bits).
func (r *reader) signed(bits uint) int64 {
	start := r.pos
	maxBytes := int((bits + 6) / 7)
	var v int64
	var shift uint
	for i := 1; i <= maxBytes; i++ {
		if r.pos >= r.end {
			r.malformed(r.pos, "unexpected end of an integer")
			return 0
		}
		c := r.b[r.pos]
		r.pos++
		v |= int64(c&0x7f) << shift
		shift += 7
		if c&0x80 != 0 {
			continue
		}
		if i == maxBytes {
			// The bits beyond the width must repeat the sign bit.
			used := bits - 7*uint(maxBytes-1)
			mask := byte(0x7f) << (used - 1) & 0x7f
			if top := c & mask; top != 0 && top != mask {
				break
			}
		}
		if shift < 64 && c&0x40 != 0 {
			v |= math.MinInt64 >> (63 - shift)
		}
		return v
	}
	r.malformed(start, "integer is too long or too large")
	return 0
}

func (r *reader) skip(n int, what string) {
	if n > r.remaining() {
		r.malformed(r.pos, "%s runs past its end", what)
		return
	}
	r.pos += n
}

// count reads the length of a vector and bounds it by limit and by the bytes
// that are left (every item takes at least one), so it is safe to allocate.
func (r *reader) count(limit int, what string) int {
	at := r.pos
	n := r.u32()
	if !r.ok() {
		return 0
	}
	if uint64(n) > uint64(max(limit, 0)) {
		r.fail(CodeLimitExceeded, at, "%d %s, the limit is %d", n, what, limit)
		return 0
	}
	if int(n) > r.remaining() {
		r.malformed(at, "%d %s do not fit into what is left", n, what)
		return 0
	}
	return int(n)
}

// name reads a length-prefixed UTF-8 string.
func (r *reader) name(limit int, what string) string {
	at := r.pos
	n := r.u32()
	if !r.ok() {
		return ""
	}
	if uint64(n) > uint64(r.remaining()) {
		r.malformed(at, "%s runs past its end", what)
		return ""
	}
	if int(n) > limit {
		r.fail(CodeLimitExceeded, at, "%s of %d bytes, the limit is %d", what, n, limit)
		return ""
	}
	s := r.b[r.pos : r.pos+int(n)]
	if !utf8.Valid(s) {
		r.malformed(r.pos, "%s is not valid UTF-8", what)
		return ""
	}
	r.pos += int(n)
	return string(s)
}

func (r *reader) valueType() ValueType {
	at := r.pos
	c := r.byte()
	if !r.ok() {
		return 0
	}
	switch v := ValueType(c); v {
	case ValueI32, ValueI64, ValueF32, ValueF64, ValueV128, ValueFuncref, ValueExternref:
		return v
	}
	r.unknownType(at, c, "value type")
	return 0
}

func (r *reader) refType() ValueType {
	at := r.pos
	c := r.byte()
	if !r.ok() {
		return 0
	}
	switch v := ValueType(c); v {
	case ValueFuncref, ValueExternref:
		return v
	}
	r.unknownType(at, c, "reference type")
	return 0
}

func (r *reader) unknownType(at int, c byte, what string) {
	switch {
	case c == 0x63 || c == 0x64:
		r.fail(CodeUnsupportedFeature, at, "typed function references")
	case c == 0x69 || c == 0x74 || c == 0x75:
		r.fail(CodeUnsupportedFeature, at, "exception handling")
	case c >= 0x6a && c <= 0x73 && c != 0x6f && c != 0x70:
		r.fail(CodeUnsupportedFeature, at, "garbage collection")
	default:
		r.malformed(at, "%#x is not a %s", c, what)
	}
}

// appendU32 appends v as the shortest unsigned LEB128.
func appendU32(b []byte, v uint32) []byte {
	for v >= 0x80 {
		b = append(b, byte(v)|0x80)
		v >>= 7
	}
	return append(b, byte(v))
}

// appendS64 appends v as the shortest signed LEB128; it serves all widths.
func appendS64(b []byte, v int64) []byte {
	for {
		c := byte(v & 0x7f)
		v >>= 7
		if (v == 0 && c&0x40 == 0) || (v == -1 && c&0x40 != 0) {
			return append(b, c)
		}
		b = append(b, c|0x80)
	}
}

// weightBytes is the fixed width of a patched weight: three bytes of signed
// LEB128 hold up to maxPatchedWeight.
const (
	weightBytes      = 3
	maxPatchedWeight = 1<<20 - 1
)

// patchWeight writes v as a signed LEB128 of exactly weightBytes bytes.
func patchWeight(b []byte, v int32) {
	b[0] = byte(v)&0x7f | 0x80
	b[1] = byte(v>>7)&0x7f | 0x80
	b[2] = byte(v>>14) & 0x7f
}
