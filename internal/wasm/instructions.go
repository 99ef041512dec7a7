package wasm

// Opcodes that reading or lowering treats by name (chapter 5.4).
const (
	opUnreachable  = 0x00
	opBlock        = 0x02
	opLoop         = 0x03
	opIf           = 0x04
	opElse         = 0x05
	opEnd          = 0x0b
	opBr           = 0x0c
	opBrIf         = 0x0d
	opBrTable      = 0x0e
	opReturn       = 0x0f
	opCall         = 0x10
	opCallIndirect = 0x11
	opDrop         = 0x1a
	opSelect       = 0x1b
	opLocalGet     = 0x20
	opLocalSet     = 0x21
	opLocalTee     = 0x22
	opGlobalGet    = 0x23
	opGlobalSet    = 0x24
	opMemorySize   = 0x3f
	opMemoryGrow   = 0x40
	opI32Const     = 0x41
	opI64Const     = 0x42
	opF32Const     = 0x43
	opF64Const     = 0x44
	opI32Eq        = 0x46
	opI32LtS       = 0x48
	opI32LtU       = 0x49
	opI32LeU       = 0x4d
	opI64Eq        = 0x51
	opI64GtU       = 0x56
	opI32Add       = 0x6a
	opI32Sub       = 0x6b
	opI32Mul       = 0x6c
	opI32DivS      = 0x6d
	opI32DivU      = 0x6e
	opI32RemS      = 0x6f
	opI32RemU      = 0x70
	opI32Or        = 0x72
	opI64Add       = 0x7c
	opI64Sub       = 0x7d
	opI64Mul       = 0x7e
	opI64DivS      = 0x7f
	opI64DivU      = 0x80
	opI64RemS      = 0x81
	opI64RemU      = 0x82
	opI64Shl       = 0x86
	opI64ExtendU   = 0xad
	opRefNull      = 0xd0
	opRefFunc      = 0xd2
	opGC           = 0xfb
	opMisc         = 0xfc
	opVector       = 0xfd
	opThreads      = 0xfe
)

// Second opcodes behind opMisc.
const (
	miscMemoryInit = 8
	miscDataDrop   = 9
	miscMemoryCopy = 10
	miscMemoryFill = 11
	miscTableInit  = 12
	miscElemDrop   = 13
	miscTableCopy  = 14
	miscTableGrow  = 15
	miscTableSize  = 16
	miscTableFill  = 17
)

// simdConst is v128.const behind opVector.
const simdConst = 12

// voidBlock is the block type without parameters and results.
const voidBlock = 0x40

// immediate says what follows an opcode.
type immediate byte

const (
	immUnknown immediate = iota // not an opcode
	immNone
	immBlockType
	immLabel
	immBrTable
	immFunction
	immCallIndirect
	immSelectTypes
	immLocal
	immGlobal
	immTable
	immMemoryArgument
	immMemoryIndex
	immI32
	immI64
	immF32
	immF64
	immRefType
	immRefFunc
	immTailCalls // and below: opcodes of proposals that are not supported
	immExceptions
	immFunctionReferences
	immGarbageCollection
	immThreads
	immPrefix // a second opcode follows
)

// immediates is indexed by opcode.
var immediates = func() (t [256]immediate) {
	set := func(from, to int, i immediate) {
		for op := from; op <= to; op++ {
			t[op] = i
		}
	}
	set(0x00, 0x01, immNone) // unreachable, nop
	set(opBlock, opIf, immBlockType)
	t[opElse], t[opEnd] = immNone, immNone
	set(0x06, 0x0a, immExceptions) // try, catch, throw, rethrow, throw_ref
	set(opBr, opBrIf, immLabel)
	t[opBrTable] = immBrTable
	t[opReturn] = immNone
	t[opCall] = immFunction
	t[opCallIndirect] = immCallIndirect
	set(0x12, 0x13, immTailCalls)
	set(0x14, 0x15, immFunctionReferences)
	set(0x18, 0x19, immExceptions) // delegate, catch_all
	set(opDrop, opSelect, immNone)
	t[0x1c] = immSelectTypes
	t[0x1f] = immExceptions // try_table
	set(opLocalGet, opLocalTee, immLocal)
	set(opGlobalGet, opGlobalSet, immGlobal)
	set(0x25, 0x26, immTable) // table.get, table.set
	set(0x28, 0x3e, immMemoryArgument)
	set(opMemorySize, opMemoryGrow, immMemoryIndex)
	t[opI32Const], t[opI64Const] = immI32, immI64
	t[opF32Const], t[opF64Const] = immF32, immF64
	set(0x45, 0xc4, immNone) // comparisons, arithmetic, conversions
	t[opRefNull] = immRefType
	t[0xd1] = immNone // ref.is_null
	t[opRefFunc] = immRefFunc
	t[0xd3] = immGarbageCollection // ref.eq
	set(0xd4, 0xd6, immFunctionReferences)
	t[opGC] = immGarbageCollection
	t[opMisc], t[opVector] = immPrefix, immPrefix
	t[opThreads] = immThreads
	return t
}()

// vectorHoles are the second opcodes below 256 that SIMD left unassigned.
var vectorHoles = func() (t [256]bool) {
	for _, op := range []byte{
		0x9a, 0xa2, 0xa5, 0xa6, 0xaf, 0xb0, 0xb2, 0xb3, 0xb4, 0xbb, 0xc2, 0xc5,
		0xc6, 0xcf, 0xd0, 0xd2, 0xd3, 0xd4, 0xe2, 0xee,
	} {
		t[op] = true
	}
	return t
}()

// instruction is one decoded instruction of the original code.
type instruction struct {
	op    byte
	sub   uint32 // the second opcode behind a prefix
	start int    // offsets of its bytes
	end   int
	// index is the immediate index (label, function, local, data segment, …),
	// value a constant.
	index uint32
	value int64
	// arity is, for a block, how many values enter and leave it, for
	// call_indirect the size of its signature.
	arity int
	// blockParams and blockResults of a block's type.
	blockParams, blockResults int
	// labels are the targets of a br_table, the default last.
	labels []uint32
}

// code decodes the instructions of one function body at a time and checks
// every index against the original index spaces.
type code struct {
	*layout
	r       *reader
	locals  uint64 // parameters and declared locals
	targets int    // br_table targets seen in this body
	labels  []uint32
}

// next decodes one instruction into i; faults are left in the reader.
func (c *code) next(i *instruction) {
	r := c.r
	*i = instruction{start: r.pos, labels: c.labels[:0]}
	i.op = r.byte()
	if !r.ok() {
		return
	}
	switch immediates[i.op] {
	case immNone:
	case immUnknown:
		r.malformed(i.start, "unknown opcode %#x", i.op)
	case immBlockType:
		c.blockType(i)
	case immLabel:
		i.index = r.u32()
	case immBrTable:
		c.brTable(i)
	case immFunction:
		i.index = r.u32()
		c.function(r, i.start, i.index)
	case immCallIndirect:
		if t, ok := c.typeIndex(r); ok {
			i.arity = len(c.types[t].Params) + len(c.types[t].Results)
		}
		c.table(i.start, r.u32())
	case immSelectTypes:
		n := r.count(c.limits.ResultsPerType, "types")
		for range n {
			r.valueType()
		}
	case immLocal:
		i.index = r.u32()
		if r.ok() && uint64(i.index) >= c.locals {
			r.fail(CodeInvalid, i.start, "unknown local %d", i.index)
		}
	case immGlobal:
		i.index = r.u32()
		if r.ok() && uint64(i.index) >= uint64(c.Globals) {
			r.fail(CodeInvalid, i.start, "unknown global %d", i.index)
		}
	case immTable:
		c.table(i.start, r.u32())
	case immMemoryArgument:
		c.memoryArgument(i.start)
	case immMemoryIndex:
		c.memoryIndex(i.start)
	case immI32:
		i.value = r.signed(32)
	case immI64:
		i.value = r.signed(64)
	case immF32:
		r.skip(4, "constant")
	case immF64:
		r.skip(8, "constant")
	case immRefType:
		r.refType()
	case immRefFunc:
		i.index = r.u32()
		if _, ok := c.function(r, i.start, i.index); ok && !c.declared[i.index] {
			// Checked here because the export of the start function would
			// declare it.
			r.fail(CodeInvalid, i.start, "undeclared function reference %d", i.index)
		}
	case immPrefix:
		i.sub = r.u32()
		if r.ok() {
			if i.op == opMisc {
				c.misc(i)
			} else {
				c.vector(i)
			}
		}
	case immTailCalls:
		r.fail(CodeUnsupportedFeature, i.start, "tail calls")
	case immExceptions:
		r.fail(CodeUnsupportedFeature, i.start, "exception handling")
	case immFunctionReferences:
		r.fail(CodeUnsupportedFeature, i.start, "typed function references")
	case immGarbageCollection:
		r.fail(CodeUnsupportedFeature, i.start, "garbage collection")
	case immThreads:
		r.fail(CodeUnsupportedFeature, i.start, "threads (atomic operations)")
	}
	i.end = r.pos
	c.labels = i.labels
}

func (c *code) blockType(i *instruction) {
	r := c.r
	at := r.pos
	t := r.signed(33)
	switch {
	case !r.ok():
	case t >= 0:
		if t >= int64(len(c.types)) {
			r.fail(CodeInvalid, at, "unknown type %d", t)
			return
		}
		i.blockParams, i.blockResults = len(c.types[t].Params), len(c.types[t].Results)
		i.arity = i.blockParams + i.blockResults
	case t == -64: // 0x40, no values
	case t == -1, t == -2, t == -3, t == -4, t == -5, t == -16, t == -17:
		i.blockResults, i.arity = 1, 1
	case t == -29 || t == -28:
		r.fail(CodeUnsupportedFeature, at, "typed function references")
	default:
		r.malformed(at, "not a block type")
	}
}

func (c *code) brTable(i *instruction) {
	r := c.r
	n := r.count(c.limits.BrTableTargets, "br_table targets")
	c.targets += n
	if c.targets > c.limits.BrTableTargetsTotal {
		r.fail(CodeLimitExceeded, i.start, "more than %d br_table targets in one function", c.limits.BrTableTargetsTotal)
		return
	}
	for k := 0; k <= n && r.ok(); k++ { // the default comes last
		i.labels = append(i.labels, r.u32())
	}
}

func (c *code) table(at int, index uint32) {
	if c.r.ok() && uint64(index) >= uint64(c.Tables) {
		c.r.fail(CodeInvalid, at, "unknown table %d", index)
	}
}

func (c *code) needMemory(at int) {
	if c.r.ok() && !c.HasMemory {
		c.r.fail(CodeInvalid, at, "the module has no memory")
	}
}

func (c *code) memoryArgument(at int) {
	// From 64 on, the alignment's bit 6 announces a memory index.
	if align := c.r.u32(); c.r.ok() && align >= 64 && align < 128 {
		c.r.fail(CodeUnsupportedFeature, at, "more than one memory")
	} else if c.r.ok() && align >= 32 {
		c.r.malformed(at, "alignment of 2^%d", align)
	}
	c.r.u32()
	c.needMemory(at)
}

// memoryIndex reads a memory index where the format has one reserved byte.
func (c *code) memoryIndex(at int) {
	if index := c.r.byte(); c.r.ok() && index != 0 {
		c.r.malformed(at, "the reserved byte is not zero")
	}
	c.needMemory(at)
}

func (c *code) data(at int, index uint32) {
	switch {
	case !c.r.ok():
	case !c.hasDataCount:
		c.r.malformed(at, "the data count section is missing")
	case uint64(index) >= uint64(c.dataCount):
		c.r.fail(CodeInvalid, at, "unknown data segment %d", index)
	}
}

func (c *code) element(at int, index uint32) {
	if c.r.ok() && uint64(index) >= uint64(c.Elements) {
		c.r.fail(CodeInvalid, at, "unknown element segment %d", index)
	}
}

func (c *code) misc(i *instruction) {
	r := c.r
	switch i.sub {
	case 0, 1, 2, 3, 4, 5, 6, 7: // saturating truncation
	case miscMemoryInit:
		i.index = r.u32()
		c.data(i.start, i.index)
		c.memoryIndex(i.start)
	case miscDataDrop:
		i.index = r.u32()
		c.data(i.start, i.index)
	case miscMemoryCopy:
		c.memoryIndex(i.start)
		c.memoryIndex(i.start)
	case miscMemoryFill:
		c.memoryIndex(i.start)
	case miscTableInit:
		c.element(i.start, r.u32())
		c.table(i.start, r.u32())
	case miscElemDrop:
		c.element(i.start, r.u32())
	case miscTableCopy:
		c.table(i.start, r.u32())
		c.table(i.start, r.u32())
	case miscTableGrow, miscTableSize, miscTableFill:
		c.table(i.start, r.u32())
	default:
		r.malformed(i.start, "unknown opcode 0xfc %d", i.sub)
	}
}

func (c *code) vector(i *instruction) {
	r := c.r
	switch sub := i.sub; {
	case sub > 0xff:
		r.fail(CodeUnsupportedFeature, i.start, "relaxed SIMD")
	case vectorHoles[sub]:
		r.malformed(i.start, "unknown opcode 0xfd %d", sub)
	case sub <= 11 || sub == 92 || sub == 93: // loads and v128.store
		c.memoryArgument(i.start)
	case sub == simdConst || sub == 13: // i8x16.shuffle
		r.skip(16, "immediate")
	case sub >= 21 && sub <= 34: // extract_lane, replace_lane
		r.byte()
	case sub >= 84 && sub <= 91: // load_lane, store_lane
		c.memoryArgument(i.start)
		r.byte()
	}
}

// The weight of an instruction is how many simple instructions it may cost
// at worst; see Lower for the unit.
const (
	weightSimple = 1
	// weightMemory: a load or store may be the first to touch a page, which
	// costs a page fault (about 5 µs on a virtual machine).
	weightMemory = 8
	// weightPage is the same for each 4 KiB page of a bulk operation.
	weightPage = 8
	// weightDivide covers division, square root and the wide vector
	// operations that engines expand to many machine instructions.
	weightDivide = 4
	// weightCall includes freeWeight, what a callee may do before its first
	// checkpoint.
	weightCall         = freeWeight + 4
	weightCallIndirect = freeWeight + 12
	// weightHost: the engine leaves compiled code for these.
	weightHost = 64
	// weightGrow: the engine may move the whole memory.
	weightGrow = 4096
)

// weightOf is the weight of an instruction that no case in lowering treats
// on its own.
func weightOf(i *instruction) int32 {
	switch op := i.op; {
	case op == opBlock || op == opLoop || op == opIf:
		return int32(i.arity) // values may have to be moved
	case op == opElse || op == opEnd || op == 0x01:
		return 0
	case op == opCall:
		return weightCall
	case op == opCallIndirect:
		return weightCallIndirect + int32(i.arity)
	case op >= 0x28 && op <= 0x3e:
		return weightMemory
	case op == opMemoryGrow:
		return weightGrow
	case op == 0x26: // table.set
		return weightDivide
	case op >= opI32DivS && op <= opI32RemU, op >= opI64DivS && op <= opI64RemU:
		return weightDivide
	case op == 0x91, op == 0x95, op == 0x9f, op == 0xa3: // sqrt, div
		return weightDivide
	case op == opRefFunc:
		return weightHost
	case op == opVector:
		if i.sub <= 11 || (i.sub >= 84 && i.sub <= 93) {
			return 2 * weightMemory
		}
		return weightDivide
	}
	return weightSimple
}
