package component

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of [CoreModules]. Real components have some tens of sections and
// rarely more than three levels; what exceeds these is made to hurt.
const (
	// MaxDepth is how deeply components may nest, the outermost being 1.
	MaxDepth = 32
	// MaxSections bounds all sections at all levels together.
	MaxSections = 1 << 16
	// MaxModules bounds the core modules at all levels together.
	MaxModules = 1 << 10
)

// preambleBytes is the length of magic, version and layer together.
const preambleBytes = 8

// Section identifiers of the component binary format.
const (
	sectionCoreModule = 1
	sectionComponent  = 4
	// sectionLast is the highest identifier known (value).
	sectionLast = 12
)

// Errors of [CoreModules], to be compared with errors.Is. Errors of the reader
// itself are neither.
var (
	// ErrNotComponent: the bytes do not begin as a component does.
	ErrNotComponent = errors.New("not a WebAssembly component")
	// ErrMalformed: they do, but the binary format is violated later on, or
	// belongs to a version of it that is not known.
	ErrMalformed = errors.New("malformed WebAssembly component")
	// ErrLimit: one of the bounds above is exceeded.
	ErrLimit = errors.New("WebAssembly component exceeds a limit")
)

// Section is where a core module lies in a component: Size bytes from Offset
// are a whole module, its own preamble included.
type Section struct {
	Offset, Size int64
	// Depth is how many components it lies in, 1 for the outermost.
	Depth int
}

// CoreModules finds the core modules in the component that is the first size
// bytes of r, those of nested components included, in the order of the
// binary. Only section headers and the modules' preambles are read, so a
// large component costs little; the modules are not validated.
//
// r may be hostile: memory and time are bounded by the constants above,
// whatever it says.
func CoreModules(r io.ReaderAt, size int64) ([]Section, error) {
	p := parser{r: r}
	kind, err := p.preamble(0, size)
	if err != nil {
		return nil, err
	}
	if kind != layerComponent {
		return nil, fmt.Errorf("%w: it does not begin with the magic, version 13 and layer 1", ErrNotComponent)
	}
	// ends are where the components we are in end, the innermost last.
	ends := []int64{size}
	at := int64(preambleBytes)
	var modules []Section
	sections := 0
	for len(ends) > 0 {
		end := ends[len(ends)-1]
		if at == end {
			ends = ends[:len(ends)-1]
			continue
		}
		if sections++; sections > MaxSections {
			return nil, fmt.Errorf("%w: more than %d sections", ErrLimit, MaxSections)
		}
		id, body, length, err := p.header(at, end)
		if err != nil {
			return nil, err
		}
		switch {
		case id > sectionLast:
			return nil, fmt.Errorf("%w: unknown section %d at byte %d", ErrMalformed, id, at)
		case id == sectionCoreModule:
			kind, err := p.preamble(body, body+length)
			if err != nil {
				return nil, err
			}
			if kind != layerModule {
				return nil, fmt.Errorf("%w: the core module section at byte %d holds no core module", ErrMalformed, at)
			}
			if len(modules) == MaxModules {
				return nil, fmt.Errorf("%w: more than %d core modules", ErrLimit, MaxModules)
			}
			modules = append(modules, Section{Offset: body, Size: length, Depth: len(ends)})
		case id == sectionComponent:
			kind, err := p.preamble(body, body+length)
			if err != nil {
				return nil, err
			}
			if kind != layerComponent {
				return nil, fmt.Errorf("%w: the component section at byte %d holds no component", ErrMalformed, at)
			}
			if len(ends) == MaxDepth {
				return nil, fmt.Errorf("%w: components nest more than %d deep", ErrLimit, MaxDepth)
			}
			ends = append(ends, body+length)
			at = body + preambleBytes
			continue
		}
		at = body + length
	}
	return modules, nil
}

type layer int

const (
	layerUnknown layer = iota
	layerModule
	layerComponent
)

type parser struct{ r io.ReaderAt }

// preamble says what begins at offset at and must fit below end.
func (p *parser) preamble(at, end int64) (layer, error) {
	if end-at < preambleBytes {
		return layerUnknown, nil
	}
	var b [preambleBytes]byte
	if err := p.read(b[:], at); err != nil {
		return layerUnknown, err
	}
	if string(b[:4]) != "\x00asm" {
		return layerUnknown, nil
	}
	switch version, l := binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:]); {
	case version == 1 && l == 0:
		return layerModule, nil
	case version == 0x0d && l == 1:
		return layerComponent, nil
	default:
		return layerUnknown, nil
	}
}

// header reads a section's identifier and length; its body lies below end.
func (p *parser) header(at, end int64) (id byte, body, length int64, err error) {
	// One identifier byte and at most five of a LEB128 u32.
	var buf [6]byte
	b := buf[:min(int64(len(buf)), end-at)]
	if err := p.read(b, at); err != nil {
		return 0, 0, 0, err
	}
	var n uint64
	for i := 1; ; i++ {
		if i == len(b) {
			return 0, 0, 0, fmt.Errorf("%w: the length of the section at byte %d is cut off or too long", ErrMalformed, at)
		}
		n |= uint64(b[i]&0x7f) << (7 * (i - 1))
		if b[i] < 0x80 {
			body = at + int64(i) + 1
			break
		}
	}
	if n > 1<<32-1 {
		return 0, 0, 0, fmt.Errorf("%w: the length of the section at byte %d exceeds 32 bits", ErrMalformed, at)
	}
	if int64(n) > end-body {
		return 0, 0, 0, fmt.Errorf("%w: the section at byte %d declares %d bytes, %d are left", ErrMalformed, at, n, end-body)
	}
	return b[0], body, int64(n), nil
}

func (p *parser) read(b []byte, at int64) error {
	n, err := p.r.ReadAt(b, at)
	if n == len(b) {
		return nil // io.ReaderAt may report io.EOF along with the last bytes
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it ends at byte %d, before its declared size", ErrMalformed, at+int64(n))
	}
	return fmt.Errorf("read component at byte %d: %w", at, err)
}
