package wasm

import (
	"bytes"
	"math"
	"strings"
)

// Section identifiers (chapter 5.5.2).
const (
	sectionCustom    = 0
	sectionType      = 1
	sectionImport    = 2
	sectionFunction  = 3
	sectionTable     = 4
	sectionMemory    = 5
	sectionGlobal    = 6
	sectionExport    = 7
	sectionStart     = 8
	sectionElement   = 9
	sectionCode      = 10
	sectionData      = 11
	sectionDataCount = 12
	sectionTag       = 13
	sectionCountIDs  = 13
)

var sectionNames = [...]string{
	"custom", "type", "import", "function", "table", "memory", "global",
	"export", "start", "element", "code", "data", "data count", "tag",
}

// sectionRank orders sections as they must appear; data count goes between
// element and code.
var sectionRank = [sectionCountIDs]int{
	sectionType: 1, sectionImport: 2, sectionFunction: 3, sectionTable: 4,
	sectionMemory: 5, sectionGlobal: 6, sectionExport: 7, sectionStart: 8,
	sectionElement: 9, sectionDataCount: 10, sectionCode: 11, sectionData: 12,
}

// maxMemoryPages is all that 32-bit addresses reach: 4 GiB.
const maxMemoryPages = 1 << 16

// section is where one section's content lies in the module.
type section struct {
	present bool
	// items is where the content starts behind the vector's count.
	items, end int
	count      int
}

type span struct{ start, end int }

type tableType struct {
	element  ValueType
	min, max uint32
	hasMax   bool
}

// layout is what reading a module leaves behind for checking and rewriting
// its code: where things are, and the sizes of all index spaces.
type layout struct {
	Module
	bytes    []byte
	limits   Limits
	sections [sectionCountIDs]section

	types             []FunctionType
	functions         []uint32 // type index of every function, imports first
	importedGlobals   int
	importedTables    int
	mutableImports    []bool // of imported globals
	tables            []tableType
	start             uint32
	hasDataCount      bool
	dataCount         int
	dataLengths       []uint32
	bodies            []span // function bodies, the size prefix excluded
	declared          []bool // functions that ref.func may name in a body
	elementEntries    int
	memoryDefinitions int
}

// readLayout reads everything but the instructions of function bodies.
func readLayout(module []byte, limits Limits) (*layout, error) {
	head := func(code Code, detail string) error {
		return &Error{Code: code, Section: "header", Detail: detail}
	}
	switch Sniff(module) {
	case KindModule:
	case KindComponent:
		return nil, head(CodeComponent, "this is a WebAssembly component, not a core module; components are not supported yet")
	case KindNative:
		return nil, head(CodeNativeArtifact, "this is native machine code or a serialized engine artifact, which cannot be checked; submit the .wasm it was made from")
	default:
		if bytes.HasPrefix(module, []byte("\x00asm")) {
			return nil, &Error{Code: CodeMalformed, Section: "header", Offset: 4, Detail: "the version of the binary format is missing or not 1"}
		}
		return nil, head(CodeNotWasm, "this is not WebAssembly: it does not start with \"\\0asm\"")
	}
	l := &layout{bytes: module, limits: limits}
	if len(module) > limits.ModuleBytes {
		r := reader{section: "header"}
		r.fail(CodeLimitExceeded, 0, "module of %d bytes, the limit is %d", len(module), limits.ModuleBytes)
		return nil, r.err
	}

	r := &reader{b: module, pos: 8, end: len(module)}
	rank := 0
	for r.pos < len(module) {
		at := r.pos
		r.section = ""
		id := r.byte()
		size := r.u32()
		if !r.ok() {
			return nil, r.err
		}
		if uint64(size) > uint64(r.remaining()) {
			r.malformed(at, "section of %d bytes runs past the end of the module", size)
			return nil, r.err
		}
		if int(id) < len(sectionNames) {
			r.section = sectionNames[id]
		}
		contentEnd := r.pos + int(size)
		switch {
		case id == sectionCustom:
			r.end = contentEnd
			r.name(limits.ModuleBytes, "custom section name")
			l.CustomBytes += int(size)
			// The rest of a custom section has no rules; it is stripped.
			r.pos = contentEnd
		case id == sectionTag:
			r.fail(CodeUnsupportedFeature, at, "exception handling")
		case id >= sectionCountIDs:
			r.malformed(at, "unknown section id %d", id)
		case sectionRank[id] <= rank:
			r.malformed(at, "section is repeated or out of order")
		default:
			rank = sectionRank[id]
			r.end = contentEnd
			l.readSection(r, int(id))
			if r.ok() && r.pos != contentEnd {
				r.malformed(r.pos, "section content ends %d bytes before its declared size", contentEnd-r.pos)
			}
		}
		if !r.ok() {
			return nil, r.err
		}
		r.end = len(module)
	}
	r.section = ""
	if defined := len(l.functions) - l.ImportedFunctions; defined != len(l.bodies) {
		r.malformed(len(module), "%d functions are declared but %d have a body", defined, len(l.bodies))
	} else if l.hasDataCount && l.dataCount != len(l.dataLengths) {
		r.malformed(len(module), "the data count section says %d segments, there are %d", l.dataCount, len(l.dataLengths))
	}
	if !r.ok() {
		return nil, r.err
	}
	return l, nil
}

func (l *layout) readSection(r *reader, id int) {
	s := &l.sections[id]
	s.present, s.end = true, r.end
	vector := func(limit int, what string, item func()) {
		s.count = r.count(limit, what)
		s.items = r.pos
		for i := 0; i < s.count && r.ok(); i++ {
			item()
		}
	}
	switch id {
	case sectionType:
		vector(l.limits.Types, "types", func() { l.readType(r) })
		l.Types = len(l.types)
	case sectionImport:
		vector(l.limits.Imports, "imports", func() { l.readImport(r) })
	case sectionFunction:
		vector(max(l.limits.Functions-len(l.functions), 0), "functions", func() {
			if t, ok := l.typeIndex(r); ok {
				l.functions = append(l.functions, t)
			}
		})
	case sectionTable:
		vector(max(l.limits.Tables-l.Tables, 0), "tables", func() {
			l.tables = append(l.tables, l.readTableType(r))
		})
	case sectionMemory:
		// The second one is refused as a feature, not as a number.
		vector(math.MaxInt32, "memories", func() { l.readMemoryType(r) })
		l.memoryDefinitions = s.count
	case sectionGlobal:
		vector(max(l.limits.Globals-l.Globals, 0), "globals", func() {
			l.readGlobalType(r)
			l.readConstant(r)
			l.Globals++
		})
	case sectionExport:
		names := make(map[string]struct{})
		vector(l.limits.Exports, "exports", func() { l.readExport(r, names) })
	case sectionStart:
		at := r.pos
		l.start = r.u32()
		if t, ok := l.function(r, at, l.start); ok {
			if len(t.Params)+len(t.Results) != 0 {
				r.fail(CodeInvalid, at, "the start function has parameters or results")
			}
			l.HasStart = true
		}
	case sectionElement:
		vector(l.limits.ElementSegments, "element segments", func() { l.readElement(r) })
		l.Elements = s.count
	case sectionDataCount:
		l.hasDataCount = true
		l.dataCount = int(r.u32())
	case sectionCode:
		l.CodeBytes = r.remaining()
		vector(max(l.limits.Functions-l.ImportedFunctions, 0), "function bodies", func() { l.readBody(r) })
	case sectionData:
		l.DataBytes = r.remaining()
		vector(l.limits.DataSegments, "data segments", func() { l.readData(r) })
		l.Data = s.count
	}
	l.Functions = len(l.functions)
	if id == sectionFunction || id == sectionImport {
		// Kept in step so that exports and elements can mark functions.
		l.declared = append(l.declared, make([]bool, len(l.functions)-len(l.declared))...)
	}
}

func (l *layout) readType(r *reader) {
	at := r.pos
	switch form := r.byte(); {
	case !r.ok():
		return
	case form == 0x60:
	case form == 0x4e || form == 0x4f || form == 0x50 || form == 0x5e || form == 0x5f:
		r.fail(CodeUnsupportedFeature, at, "garbage collection")
		return
	default:
		r.malformed(at, "%#x is not a type", form)
		return
	}
	var t FunctionType
	if n := r.count(l.limits.ParamsPerType, "parameters"); n > 0 {
		t.Params = make([]ValueType, n)
		for i := range t.Params {
			t.Params[i] = r.valueType()
		}
	}
	if n := r.count(l.limits.ResultsPerType, "results"); n > 0 {
		t.Results = make([]ValueType, n)
		for i := range t.Results {
			t.Results[i] = r.valueType()
		}
	}
	l.types = append(l.types, t)
}

func (l *layout) typeIndex(r *reader) (uint32, bool) {
	at := r.pos
	t := r.u32()
	if r.ok() && uint64(t) >= uint64(len(l.types)) {
		r.fail(CodeInvalid, at, "unknown type %d", t)
	}
	return t, r.ok()
}

// function looks up the type of a function, failing the reader if the index
// is out of range.
func (l *layout) function(r *reader, at int, index uint32) (FunctionType, bool) {
	if !r.ok() {
		return FunctionType{}, false
	}
	if uint64(index) >= uint64(len(l.functions)) {
		r.fail(CodeInvalid, at, "unknown function %d", index)
		return FunctionType{}, false
	}
	return l.types[l.functions[index]], true
}

func (l *layout) readImport(r *reader) {
	i := Import{
		Module: r.name(l.limits.NameBytes, "import module name"),
		Name:   r.name(l.limits.NameBytes, "import name"),
	}
	at := r.pos
	i.Kind = ExternKind(r.byte())
	if !r.ok() {
		return
	}
	switch i.Kind {
	case ExternFunction:
		t, ok := l.typeIndex(r)
		if !ok {
			return
		}
		i.Type = l.types[t]
		l.functions = append(l.functions, t)
		l.ImportedFunctions++
	case ExternTable:
		l.readTableType(r)
		l.importedTables++
	case ExternMemory:
		l.readMemoryType(r)
	case ExternGlobal:
		l.mutableImports = append(l.mutableImports, l.readGlobalType(r))
		l.importedGlobals++
		l.Globals++
	case 4:
		r.fail(CodeUnsupportedFeature, at, "exception handling")
	default:
		r.malformed(at, "%#x is not a kind of import", byte(i.Kind))
	}
	if len(l.functions) > l.limits.Functions {
		r.fail(CodeLimitExceeded, at, "more than %d functions", l.limits.Functions)
	}
	l.Imports = append(l.Imports, i)
}

// limitsType reads minimum and maximum of a table or memory.
func (r *reader) limitsType() (minimum, maximum uint32, hasMax bool) {
	at := r.pos
	switch flags := r.byte(); {
	case !r.ok():
		return
	case flags <= 1:
		hasMax = flags == 1
	case flags <= 3:
		r.fail(CodeUnsupportedFeature, at, "threads (shared memory)")
		return
	case flags <= 7:
		r.fail(CodeUnsupportedFeature, at, "64-bit memory or table")
		return
	default:
		r.malformed(at, "%#x are not flags of limits", flags)
		return
	}
	minimum = r.u32()
	if hasMax {
		maximum = r.u32()
		if r.ok() && maximum < minimum {
			r.fail(CodeInvalid, at, "the maximum %d is below the minimum %d", maximum, minimum)
		}
	}
	return
}

func (l *layout) readTableType(r *reader) tableType {
	at := r.pos
	if r.remaining() > 0 && r.b[r.pos] == 0x40 {
		r.fail(CodeUnsupportedFeature, at, "tables with an initializer")
		return tableType{}
	}
	t := tableType{element: r.refType()}
	t.min, t.max, t.hasMax = r.limitsType()
	if !r.ok() {
		return t
	}
	l.Tables++
	l.TableEntries += int(t.min)
	if l.TableEntries > l.limits.TableEntries {
		r.fail(CodeLimitExceeded, at, "tables of %d entries together, the limit is %d", l.TableEntries, l.limits.TableEntries)
	}
	if l.Tables > l.limits.Tables {
		r.fail(CodeLimitExceeded, at, "more than %d tables", l.limits.Tables)
	}
	return t
}

func (l *layout) readMemoryType(r *reader) {
	at := r.pos
	minimum, maximum, hasMax := r.limitsType()
	if !r.ok() {
		return
	}
	switch {
	case l.HasMemory:
		r.fail(CodeUnsupportedFeature, at, "more than one memory")
	case l.limits.Memories < 1:
		r.fail(CodeLimitExceeded, at, "a memory, the limit is none")
	case minimum > maxMemoryPages || maximum > maxMemoryPages:
		r.fail(CodeInvalid, at, "memory of more than 65536 pages")
	case int64(minimum) > int64(l.limits.MemoryPages):
		r.fail(CodeLimitExceeded, at, "memory of at least %d pages, the limit is %d", minimum, l.limits.MemoryPages)
	}
	l.HasMemory = true
	l.MemoryMin, l.MemoryMax, l.MemoryHasMax = uint64(minimum), uint64(maximum), hasMax
}

// readGlobalType reads the type of a global and reports whether it is mutable.
func (l *layout) readGlobalType(r *reader) bool {
	r.valueType()
	at := r.pos
	mutable := r.byte()
	if r.ok() && mutable > 1 {
		r.malformed(at, "%#x is not a mutability", mutable)
	}
	if l.Globals >= l.limits.Globals {
		r.fail(CodeLimitExceeded, at, "more than %d globals", l.limits.Globals)
	}
	return mutable == 1
}

// readConstant reads a constant expression. Only its form and its indices are
// checked: the engine checks the type.
func (l *layout) readConstant(r *reader) {
	for r.ok() {
		at := r.pos
		switch op := r.byte(); op {
		case opEnd:
			return
		case opI32Const:
			r.signed(32)
		case opI64Const:
			r.signed(64)
		case opF32Const:
			r.skip(4, "constant")
		case opF64Const:
			r.skip(8, "constant")
		case opVector:
			if sub := r.u32(); r.ok() && sub != simdConst {
				r.fail(CodeInvalid, at, "not a constant expression")
			}
			r.skip(16, "constant")
		case opGlobalGet:
			i := r.u32()
			switch {
			case !r.ok():
			case uint64(i) >= uint64(l.importedGlobals):
				r.fail(CodeInvalid, at, "constant expression reads global %d, which is not an imported one", i)
			case l.mutableImports[i]:
				r.fail(CodeInvalid, at, "constant expression reads the mutable global %d", i)
			}
		case opRefNull:
			r.refType()
		case opRefFunc:
			i := r.u32()
			if _, ok := l.function(r, at, i); ok {
				l.declared[i] = true
			}
		case 0x6a, 0x6b, 0x6c, 0x7c, 0x7d, 0x7e:
			r.fail(CodeUnsupportedFeature, at, "extended constant expressions")
		default:
			if r.ok() {
				r.fail(CodeInvalid, at, "opcode %#x is not allowed in a constant expression", op)
			}
		}
	}
}

func (l *layout) readExport(r *reader, names map[string]struct{}) {
	at := r.pos
	e := Export{Name: r.name(l.limits.NameBytes, "export name")}
	if !r.ok() {
		return
	}
	if strings.HasPrefix(e.Name, ReservedPrefix) {
		r.fail(CodeReservedExport, at, "the module exports %.100q; names that start with %q are reserved for the host", e.Name, ReservedPrefix)
		return
	}
	if _, dup := names[e.Name]; dup {
		r.fail(CodeInvalid, at, "%.100q is exported twice", e.Name)
		return
	}
	names[e.Name] = struct{}{}
	at = r.pos
	e.Kind = ExternKind(r.byte())
	e.Index = r.u32()
	if !r.ok() {
		return
	}
	known := 0
	switch e.Kind {
	case ExternFunction:
		t, ok := l.function(r, at, e.Index)
		if !ok {
			return
		}
		e.Type = t
		l.declared[e.Index] = true
		known = len(l.functions)
	case ExternTable:
		known = l.Tables
	case ExternMemory:
		if l.HasMemory {
			known = 1
		}
	case ExternGlobal:
		known = l.Globals
	case 4:
		r.fail(CodeUnsupportedFeature, at, "exception handling")
		return
	default:
		r.malformed(at, "%#x is not a kind of export", byte(e.Kind))
		return
	}
	if uint64(e.Index) >= uint64(known) {
		r.fail(CodeInvalid, at, "%.100q exports the unknown %s %d", e.Name, e.Kind, e.Index)
		return
	}
	l.Exports = append(l.Exports, e)
}

// readElement reads one element segment. The low bits of its flags say: 1
// passive or declarative, 2 declarative or with a table index, 4 expressions
// instead of function indices (chapter 5.5.12).
func (l *layout) readElement(r *reader) {
	at := r.pos
	flags := r.u32()
	if r.ok() && flags > 7 {
		r.malformed(at, "%d are not flags of an element segment", flags)
		return
	}
	if flags&1 == 0 {
		table := uint32(0)
		if flags&2 != 0 {
			table = r.u32()
		}
		if r.ok() && uint64(table) >= uint64(l.Tables) {
			r.fail(CodeInvalid, at, "unknown table %d", table)
			return
		}
		l.readConstant(r)
	}
	expressions := flags&4 != 0
	if flags&3 != 0 {
		if expressions {
			r.refType()
		} else {
			kindAt := r.pos
			if kind := r.byte(); r.ok() && kind != 0 {
				r.malformed(kindAt, "%#x is not a kind of elements", kind)
			}
		}
	}
	n := r.count(max(l.limits.TableEntries-l.elementEntries, 0), "elements")
	l.elementEntries += n
	for i := 0; i < n && r.ok(); i++ {
		if expressions {
			l.readConstant(r)
			continue
		}
		itemAt := r.pos
		f := r.u32()
		if _, ok := l.function(r, itemAt, f); ok {
			l.declared[f] = true
		}
	}
}

func (l *layout) readBody(r *reader) {
	at := r.pos
	size := r.u32()
	switch {
	case !r.ok():
	case uint64(size) > uint64(r.remaining()):
		r.malformed(at, "function body of %d bytes runs past its end", size)
	case int64(size) > int64(l.limits.BodyBytes):
		r.fail(CodeLimitExceeded, at, "function body of %d bytes, the limit is %d", size, l.limits.BodyBytes)
	default:
		l.bodies = append(l.bodies, span{r.pos, r.pos + int(size)})
		r.pos += int(size)
	}
}

func (l *layout) readData(r *reader) {
	at := r.pos
	flags := r.u32()
	if !r.ok() {
		return
	}
	switch flags {
	case 0, 2:
		memory := uint32(0)
		if flags == 2 {
			memory = r.u32()
		}
		if r.ok() && (memory != 0 || !l.HasMemory) {
			r.fail(CodeInvalid, at, "unknown memory %d", memory)
			return
		}
		l.readConstant(r)
	case 1:
	default:
		r.malformed(at, "%d are not flags of a data segment", flags)
		return
	}
	n := r.u32()
	if !r.ok() {
		return
	}
	if uint64(n) > uint64(r.remaining()) {
		r.malformed(at, "data segment of %d bytes runs past its end", n)
		return
	}
	r.pos += int(n)
	l.dataLengths = append(l.dataLengths, n)
}
