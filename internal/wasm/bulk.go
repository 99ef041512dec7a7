package wasm

const (
	// bulkInline is up to how many bytes a bulk memory operation of unknown
	// length runs where it stands: most do, and a call costs more than the
	// comparison.
	bulkInline = 4096
	// bulkConstant is the same for operations whose length is a constant.
	bulkConstant = 64 << 10
	// bulkChunk is how much the helpers do between two checks. 64 pages, if
	// every one of them has to be faulted in, take about 0.3 ms.
	bulkChunk = 256 << 10
	// tableConstant is up to how many entries a table operation of constant
	// length is taken for cheap. Longer ones pass a checkpoint each; they are
	// bounded by the cap on tables (2 MiB by default, well under 10 ms).
	tableConstant = 1024
)

// bulkHelpers are the functions that do long memory operations in chunks.
// They are appended in the order in which the code first needs them.
type bulkHelpers struct {
	order []bulkHelper
	// index of each helper in order, plus one.
	fill, copy int
	init       map[uint32]int
	// index of the helpers' function type, once known.
	typeIndex uint32
	typeKnown bool
}

type bulkHelper struct {
	op   uint32 // miscMemoryFill, miscMemoryCopy or miscMemoryInit
	data uint32 // of memory.init
}

// helper returns the function index of a helper, (dest, source, length) -> ().
func (lw *lowering) helper(h bulkHelper) uint32 {
	if lw.bulk.init == nil {
		lw.bulk.init = make(map[uint32]int)
	}
	n := lw.bulk.init[h.data]
	switch h.op {
	case miscMemoryFill:
		n = lw.bulk.fill
	case miscMemoryCopy:
		n = lw.bulk.copy
	}
	if n == 0 {
		lw.bulk.order = append(lw.bulk.order, h)
		n = len(lw.bulk.order)
		switch h.op {
		case miscMemoryFill:
			lw.bulk.fill = n
		case miscMemoryCopy:
			lw.bulk.copy = n
		default:
			lw.bulk.init[h.data] = n
		}
	}
	return lw.lease + uint32(n) // which comes behind the checkpoint and in front of these
}

// bulkType is what memory.fill, memory.copy and memory.init consume: a call
// to a helper, or a block that takes these parameters, has the same type as
// the instruction it stands for, on a polymorphic stack as well.
func (lw *lowering) bulkType() uint32 {
	if !lw.bulk.typeKnown {
		lw.bulk.typeIndex = lw.typeOf(FunctionType{Params: []ValueType{ValueI32, ValueI32, ValueI32}})
		lw.bulk.typeKnown = true
	}
	return lw.bulk.typeIndex
}

// pagesWeight is the weight of working through n bytes.
func pagesWeight(n int64) int32 {
	return int32(weightPage * (n/4096 + 2))
}

// misc lowers an instruction behind the 0xfc prefix.
func (lw *lowering) misc(i *instruction) {
	if !lw.InterruptChecks {
		return
	}
	length := int64(-1) // unknown
	if lw.lastConst {
		length = int64(uint32(lw.last))
	}
	switch i.sub {
	case miscMemoryFill, miscMemoryCopy, miscMemoryInit:
		bound := int64(bulkConstant)
		if i.sub == miscMemoryInit && int64(lw.dataLengths[i.index]) <= bound {
			// It cannot do more than the segment has without trapping.
			length = int64(lw.dataLengths[i.index])
		}
		if length >= 0 && length <= bound {
			lw.pay(i, 2*pagesWeight(length))
			return
		}
		lw.pay(i, 2*pagesWeight(bulkInline)+weightCall)
		lw.memoryOperation(i)
	case miscTableInit, miscTableCopy, miscTableFill, miscTableGrow:
		if length >= 0 && length <= tableConstant && i.sub != miscTableGrow {
			lw.pay(i, weightHost+int32(length/4))
			return
		}
		lw.pay(i, weightHost)
		if lw.weight != unreached {
			lw.copyTo(i.start)
			lw.checkConstant(lw.RefillFuel)
		}
	default:
		lw.pay(i, weightDivide)
	}
}

// memoryOperation replaces an operation whose length is not known to be
// small: it still runs in place if the length turns out to be.
func (lw *lowering) memoryOperation(i *instruction) {
	if lw.weight == unreached {
		return
	}
	length := lw.scratchLocal(scratchI32A)
	lw.copyTo(i.start)
	lw.emitIndex(opLocalTee, length)
	lw.emitIndex(opLocalGet, length)
	lw.emitI32(bulkInline)
	lw.emit(opI32LeU, opIf)
	lw.body = appendS64(lw.body, int64(lw.bulkType()))
	lw.copyTo(i.end)
	lw.emit(opElse)
	lw.emitIndex(opCall, lw.helper(bulkHelper{i.sub, i.index}))
	lw.emit(opEnd)
}

// Parameters of a helper.
const (
	paramDest   = 0
	paramSource = 1 // or the byte to fill with
	paramLength = 2
)

func (lw *lowering) emitGet(local byte) { lw.emit(opLocalGet, local) }
func (lw *lowering) emitBulk(h bulkHelper) {
	switch h.op {
	case miscMemoryFill:
		lw.emit(opMisc, miscMemoryFill, 0)
	case miscMemoryCopy:
		lw.emit(opMisc, miscMemoryCopy, 0, 0)
	default:
		lw.emit(opMisc)
		lw.body = appendU32(append(lw.body, miscMemoryInit), h.data)
		lw.emit(0)
	}
}

func (lw *lowering) emitArguments() {
	lw.emitGet(paramDest)
	lw.emitGet(paramSource)
	lw.emitGet(paramLength)
}

// emitPastMemory leaves whether address + length goes beyond the memory. In
// 64 bits nothing wraps.
func (lw *lowering) emitPastMemory(address byte) {
	lw.emitGet(address)
	lw.emit(opI64ExtendU)
	lw.emitGet(paramLength)
	lw.emit(opI64ExtendU, opI64Add)
	lw.emit(opMemorySize, 0, opI64ExtendU, opI64Const, 16, opI64Shl, opI64GtU)
}

// emitHelper makes the body of a helper:
//
//	if out of bounds { the operation itself, which traps }
//	loop {
//		check
//		if length <= chunk { the operation on the rest; return }
//		the operation on one chunk
//		advance
//	}
//
// Bounds are checked before anything is written, as the instruction does, and
// they hold to the end because a memory never shrinks.
func (lw *lowering) emitHelper(h bulkHelper) {
	lw.body = lw.body[:0]
	lw.emitPastMemory(paramDest)
	switch h.op {
	case miscMemoryCopy:
		lw.emitPastMemory(paramSource)
		lw.emit(opI32Or)
	case miscMemoryInit:
		// A segment has less than 4 GiB, so a sum that wraps is past its end.
		lw.emitGet(paramSource)
		lw.emitGet(paramLength)
		lw.emit(opI32Add)
		lw.emitGet(paramSource)
		lw.emit(opI32LtU, opI32Or)
	}
	lw.emit(opIf, voidBlock)
	lw.emitArguments()
	lw.emitBulk(h)
	lw.emit(opUnreachable, opEnd)
	if h.op == miscMemoryInit {
		// The length of a segment is 0 once it was dropped, which only the
		// engine knows: no bytes from its end on is out of bounds exactly if
		// the whole is.
		lw.emit(opI32Const, 0)
		lw.emitGet(paramSource)
		lw.emitGet(paramLength)
		lw.emit(opI32Add, opI32Const, 0)
		lw.emitBulk(h)
	}
	if h.op == miscMemoryCopy {
		// If the destination is behind the source, the end must be moved
		// first or its source would be overwritten.
		lw.emitGet(paramSource)
		lw.emitGet(paramDest)
		lw.emit(opI32LtU, opIf, voidBlock)
		lw.emitChunks(h, true)
		lw.emit(opEnd)
	}
	lw.emitChunks(h, false)
	lw.emit(opEnd)
	lw.finish(0, nil, nil)
}

// emitChunks makes the loop of a helper. It never falls through.
func (lw *lowering) emitChunks(h bulkHelper, backwards bool) {
	lw.emit(opLoop, voidBlock)
	lw.checkConstant(2 * pagesWeight(bulkChunk))
	lw.emitGet(paramLength)
	lw.emitI32(bulkChunk)
	lw.emit(opI32LeU, opIf, voidBlock)
	lw.emitArguments()
	lw.emitBulk(h)
	lw.emit(opReturn, opEnd)
	advance := func(local byte, op byte) {
		lw.emitGet(local)
		lw.emitI32(bulkChunk)
		lw.emit(op, opLocalSet, local)
	}
	if backwards {
		advance(paramLength, opI32Sub)
		lw.emitGet(paramDest)
		lw.emitGet(paramLength)
		lw.emit(opI32Add)
		lw.emitGet(paramSource)
		lw.emitGet(paramLength)
		lw.emit(opI32Add)
		lw.emitI32(bulkChunk)
		lw.emitBulk(h)
	} else {
		lw.emitGet(paramDest)
		lw.emitGet(paramSource)
		lw.emitI32(bulkChunk)
		lw.emitBulk(h)
		advance(paramDest, opI32Add)
		if h.op != miscMemoryFill {
			advance(paramSource, opI32Add)
		}
		advance(paramLength, opI32Sub)
	}
	lw.emit(opBr, 0, opEnd)
}

// emitCheckpoint makes the function a guest calls when its fuel ran out.
func (lw *lowering) emitCheckpoint() {
	lw.body = lw.body[:0]
	// Growing by nothing changes nothing, but the engine leaves compiled code
	// for it: Go may now schedule, collect, and run whoever sets kill.
	lw.emit(opI32Const, 0, opMemoryGrow, 0, opDrop)
	lw.emitIndex(opGlobalGet, lw.fuel)
	lw.emitI32(lw.RefillFuel)
	lw.emit(opI32Add)
	lw.emitIndex(opGlobalSet, lw.fuel)
	lw.emitIndex(opGlobalGet, lw.refills)
	lw.emit(opI32Const, 1, opI32Add)
	lw.emitIndex(opGlobalSet, lw.refills)
	lw.emitIndex(opGlobalGet, lw.kill)
	lw.emit(opIf, voidBlock, opUnreachable, opEnd, opEnd)
	lw.finish(0, nil, nil)
}

// emitLease makes the function that takes fuel, its parameter, for the local
// account of a loop.
func (lw *lowering) emitLease() {
	lw.body = lw.body[:0]
	lw.emitIndex(opGlobalGet, lw.fuel)
	lw.emitGet(0)
	lw.emit(opI32Sub)
	lw.emitIndex(opGlobalSet, lw.fuel)
	lw.emitIndex(opGlobalGet, lw.fuel)
	lw.emit(opI32Const, 0, opI32LtS, opIf, voidBlock)
	lw.emitIndex(opCall, lw.checkpoint)
	lw.emit(opEnd, opEnd)
	lw.finish(0, nil, nil)
}
