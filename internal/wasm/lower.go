package wasm

import (
	"fmt"
	"math"
)

// LoweringVersion changes whenever Lower's output for some module does.
// Stores keep it beside what they derive from lowered modules.
const LoweringVersion = 4

// ReservedPrefix starts the export names that belong to the host; a module
// that exports such a name itself is refused.
const ReservedPrefix = "hearth:"

// The exports [Lower] adds. The globals exist only with
// LowerOptions.InterruptChecks, the function only if Module.HasStart.
const (
	// ExportFuel is a mutable i32 global: instructions until the next
	// checkpoint, counted down by the guest. What a guest has used is
	// refills * RefillFuel - fuel, about.
	ExportFuel = "hearth:fuel"
	// ExportKill is a mutable i32 global; once the host sets it to anything
	// but zero the guest traps with "unreachable" at its next checkpoint, and
	// at every one after.
	ExportKill = "hearth:kill"
	// ExportRefills is a mutable i32 global that counts (wrapping) how often
	// the fuel ran out.
	ExportRefills = "hearth:refills"
	// ExportStart is the function of the start section. The host must call it
	// once after instantiation, before any other function.
	ExportStart = "hearth:start"
)

const (
	// DefaultRefillFuel makes a checkpoint, which costs about 0.2 µs, rare
	// beside the 10 to 50 µs of work it pays for; and it keeps the worst
	// work, touching a fresh page with each 10 units, below 25 ms.
	DefaultRefillFuel = 50_000
	// MinRefillFuel is more than any single check takes: with less, fuel
	// would sink with every refill until it wrapped around. Smaller values
	// are raised to it.
	MinRefillFuel = 1 << 14
	// maxRefillFuel leaves fuel far from wrapping upwards.
	maxRefillFuel = 1 << 30

	// segmentWeight is how much straight-line code one check may cover.
	segmentWeight = 4096
	// freeWeight is what a function may do before its first check; callers
	// pay for it. It lets small leaf functions do without any.
	freeWeight = 16
	// returnWeight is how much of that may follow a call. A check has paid for
	// it, but a million calls that return one after the other, each to that
	// much code, are a million times that without any check.
	returnWeight = 128
	// leaseFuel is how much fuel a tight loop takes at a time, and tightLoop
	// up to how many instructions a loop is one; see openLeased. In longer
	// loops a lease gains nothing, measured on compiled C and Go.
	leaseFuel = 2048
	tightLoop = 32
	// A loop that beginUnrolled is for is unrolled so often that about
	// unrolledInstructions are run between two checks, but maxCopies times at
	// most. More gains nothing, measured on compiled C: sieving is about 15 %
	// slower than without checks then, with a check in every round 50 to 70 %.
	unrolledInstructions = 96
	maxCopies            = 8
	// unrolledArity is up to how many labels a br_table in such a loop may
	// have and how many values a block or branch may pass on, for they count
	// as one instruction. So one check pays for all copies: they weigh less
	// than segmentWeight.
	unrolledArity = 8
	// maxEntryValues caps the parameters, results and locals that entering a
	// function is charged for, so that no check takes more than MinRefillFuel.
	maxEntryValues = 1 << 16
)

// LowerOptions choose what [Lower] does.
type LowerOptions struct {
	// Limits bound the original module.
	Limits Limits
	// InterruptChecks makes the module stoppable: see [Lower]. Without it
	// only the rest of the lowering is done.
	InterruptChecks bool
	// RemainderByDivision replaces integer remainders by divide, multiply and
	// subtract: for arm64, where wazero up to v1.12.0 miscompiles them.
	RemainderByDivision bool
	// MaxTableEntries caps what each table may grow to; 0 means
	// Limits.TableEntries.
	MaxTableEntries uint32
	// RefillFuel is the fuel of one refill, in simple instructions; 0 means
	// DefaultRefillFuel.
	RefillFuel int32
}

// Lowered is a module ready for the engine.
type Lowered struct {
	// Bytes is the lowered module: the same for the same input and options.
	Bytes []byte
	// Module describes the original.
	Module *Module
	// Checks is how many places were inserted that count down fuel.
	Checks int
}

// Parse reads a module, checks all of it but the types of its code, and
// describes it. The error is an [*Error]. It takes time and memory linear in
// the size of the module.
func Parse(module []byte, limits Limits) (*Module, error) {
	l, err := readLayout(module, limits)
	if err != nil {
		return nil, err
	}
	lw := newLowering(l, LowerOptions{Limits: limits})
	lw.discard = true
	if err := lw.bodies(); err != nil {
		return nil, err
	}
	return &l.Module, nil
}

// Lower checks a module as [Parse] does and rewrites it into an equivalent
// one that the host can stop. The error is an [*Error].
//
// With InterruptChecks, the guest counts fuel down at loop headers, in every
// function before it calls another, and at least every few thousand
// instructions of straight-line code. When fuel runs out it passes a
// checkpoint: memory.grow 0, which changes nothing but makes the engine return
// to Go for a moment (a safepoint for the scheduler and the collector), and
// then a trap if [ExportKill] is set. Bulk memory operations run in chunks
// with checkpoints between them, with unchanged semantics. A module without
// a memory gets one of zero pages.
//
// Besides, custom sections are stripped, tables are capped, and the start
// section becomes the export [ExportStart].
//
// The lowered module has no other observable difference, except that stack
// overflow may come a little earlier. Types are not checked here: a module
// with a type error is lowered to one with a type error.
func Lower(module []byte, o LowerOptions) (*Lowered, error) {
	l, err := readLayout(module, o.Limits)
	if err != nil {
		return nil, err
	}
	if o.MaxTableEntries == 0 {
		o.MaxTableEntries = uint32(min(int64(max(o.Limits.TableEntries, 0)), math.MaxUint32))
	}
	for i, t := range l.tables {
		if t.min > o.MaxTableEntries {
			return nil, &Error{
				Code: CodeLimitExceeded, Section: "table", Offset: l.sections[sectionTable].items,
				Detail: fmt.Sprintf("table %d of at least %d entries, the limit is %d", l.importedTables+i, t.min, o.MaxTableEntries),
			}
		}
	}
	lw := newLowering(l, o)
	if err := lw.bodies(); err != nil {
		return nil, err
	}
	return &Lowered{Bytes: lw.assemble(), Module: &l.Module, Checks: lw.checks}, nil
}

// unreached marks a place no path leads to.
const unreached = int32(-1)

// noCall as a tail says that there was a check since the last call.
const noCall = int32(-1)

// frame is one open block.
type frame struct {
	op byte
	// segment is the check in force where the block was entered, start the
	// weight since then. Where the block is left that check is in force
	// again, because paths that jump over what is inside have passed no other.
	segment int
	start   int32
	// in is the largest weight any branch to the block's end arrives with.
	in int32
	// from is the check that was in force on every path that arrived at the
	// end so far, fromNone or fromSeveral; weight is the largest since then.
	from   int
	weight int32
	// startTail is lowering.tail where the block was entered, tail the largest
	// that any path arrives with at its end.
	startTail, tail int32
	// loop is the index in frames of the innermost loop this block is in, or
	// is itself; -1 if there is none.
	loop int
	// arity is how many values a branch to the label carries.
	arity   int32
	hasElse bool
}

// In place of a frame's from.
const (
	fromNone    = -1
	fromSeveral = -2
)

// segment is the code one check pays for.
type segment struct {
	// loop is frame.loop where it began.
	loop int
	// patch is where its weight goes in the body, -1 for what callers pay;
	// leases is where the size of its leases goes, 0 if it takes none.
	patch  int
	leases [2]int
	// max is the largest weight of any path through it.
	max int32
}

// lowering is the state of one run over a module's code.
type lowering struct {
	code
	LowerOptions
	discard bool // only check, keep no output

	// Indices of what is appended.
	fuel, kill, refills uint32
	checkpoint          uint32
	lease               uint32
	voidType, leaseType uint32
	bulk                bulkHelpers
	extraTypes          []FunctionType

	out    []byte // all function bodies
	checks int

	// The function at hand.
	body     []byte // instructions, lowered
	copied   int    // the original is in body up to this offset
	frames   []frame
	segments []segment
	segment  int   // the check in force
	weight   int32 // of the longest path from that check to here
	// tail is the largest weight of any path from a call to here that passes
	// no check, or noCall if there is no such path.
	tail    int32
	scratch []ValueType
	// scratches is the index of each kind of scratch local plus one, or 0 if
	// there is none yet.
	scratches [scratchKinds]uint32
	// loops are those of the code, in its order; loop is the one at hand.
	loops     []loopShape
	loop      loopShape
	openLoops []openLoop // of findTightLoops
	calls     bool       // whether there are any in the code
	unrolled  unrolledLoop
	// last is the constant pushed by the instruction before, if it was an
	// i32.const or i64.const.
	last      int64
	lastConst bool
}

func newLowering(l *layout, o LowerOptions) *lowering {
	switch {
	case o.RefillFuel == 0:
		o.RefillFuel = DefaultRefillFuel
	case o.RefillFuel < MinRefillFuel:
		o.RefillFuel = MinRefillFuel
	case o.RefillFuel > maxRefillFuel:
		o.RefillFuel = maxRefillFuel
	}
	lw := &lowering{
		code:         code{layout: l, r: &reader{b: l.bytes, section: "code"}},
		LowerOptions: o,
	}
	if o.InterruptChecks {
		lw.fuel = uint32(l.Globals)
		lw.kill, lw.refills = lw.fuel+1, lw.fuel+2
		lw.checkpoint = uint32(len(l.functions))
		lw.lease = lw.checkpoint + 1
		lw.voidType = lw.typeOf(FunctionType{})
		lw.leaseType = lw.typeOf(FunctionType{Params: []ValueType{ValueI32}})
		// Larger than the original by a check for every 40 bytes or so.
		lw.out = make([]byte, 0, l.CodeBytes+l.CodeBytes/3)
	} else if !lw.discard {
		lw.out = make([]byte, 0, l.CodeBytes)
	}
	return lw
}

// typeOf returns the index of a type, appending it if the module has none
// like it.
func (lw *lowering) typeOf(t FunctionType) uint32 {
	for i := range lw.types {
		if lw.types[i].Equal(t) {
			return uint32(i)
		}
	}
	for i := range lw.extraTypes {
		if lw.extraTypes[i].Equal(t) {
			return uint32(len(lw.types) + i)
		}
	}
	lw.extraTypes = append(lw.extraTypes, t)
	return uint32(len(lw.types) + len(lw.extraTypes) - 1)
}

func (lw *lowering) bodies() error {
	for i, s := range lw.layout.bodies {
		lw.function(i, s)
		if !lw.r.ok() {
			return lw.r.err
		}
	}
	return nil
}

// function lowers the body of one defined function.
func (lw *lowering) function(defined int, s span) {
	r := lw.r
	r.pos, r.end = s.start, s.end
	t := lw.types[lw.functions[lw.ImportedFunctions+defined]]

	groups := r.count(math.MaxInt32, "groups of locals")
	groupsAt := r.pos
	lw.locals = uint64(len(t.Params))
	for range groups {
		at := r.pos
		n := r.u32()
		r.valueType()
		lw.locals += uint64(n)
		if lw.locals > uint64(max(lw.limits.LocalsPerFunction, 0)) {
			r.fail(CodeLimitExceeded, at, "%d parameters and locals in one function, the limit is %d", lw.locals, lw.limits.LocalsPerFunction)
		}
		if !r.ok() {
			return
		}
	}
	groupsEnd := r.pos
	if lw.InterruptChecks {
		lw.targets = 0
		if lw.findTightLoops(len(t.Results)); !r.ok() {
			return
		}
		r.pos = groupsEnd
	}

	lw.targets = 0
	lw.body = lw.body[:0]
	lw.copied = r.pos
	lw.frames = append(lw.frames[:0], frame{op: opBlock, in: unreached, from: fromNone, startTail: noCall, tail: noCall, loop: -1, arity: int32(len(t.Results))})
	lw.segments = append(lw.segments[:0], segment{patch: -1, loop: -1})
	lw.segment, lw.weight, lw.tail = 0, 0, noCall
	lw.scratch = lw.scratch[:0]
	lw.scratches = [scratchKinds]uint32{}
	lw.unrolled = unrolledLoop{}
	loop := 0
	lw.lastConst = false
	// Entering costs time for every value passed and every local zeroed.
	if entry := int32(min(lw.locals+uint64(len(t.Results)), maxEntryValues)) / 8; lw.InterruptChecks && entry > 0 {
		if entry > freeWeight/2 {
			lw.open()
		}
		lw.spend(entry)
	}

	var i instruction
	for len(lw.frames) > 0 {
		lw.next(&i)
		if !r.ok() {
			return
		}
		if i.op == opLoop && lw.InterruptChecks {
			lw.loop = lw.loops[loop]
			loop++
		}
		lw.instruction(&i)
		lw.last, lw.lastConst = i.value, i.op == opI32Const || i.op == opI64Const
	}
	switch {
	case !r.ok():
		return
	case r.pos != r.end:
		r.malformed(r.pos, "instructions behind the end of a function")
		return
	case lw.discard:
		return
	}
	lw.copyTo(r.pos)
	for _, s := range lw.segments[1:] {
		w := min(s.max, maxPatchedWeight)
		patchWeight(lw.body[s.patch:], w)
		if s.leases[0] != 0 {
			patchWeight(lw.body[s.leases[0]:], max(w, leaseFuel))
			patchWeight(lw.body[s.leases[1]:], max(w, leaseFuel))
		}
	}
	lw.finish(uint32(groups), lw.bytes[groupsAt:groupsEnd], lw.scratch)
}

// finish appends the body at hand to the output.
func (lw *lowering) finish(groups uint32, raw []byte, extra []ValueType) {
	var head [5]byte
	count := appendU32(head[:0], groups+uint32(len(extra)))
	size := len(count) + len(raw) + 2*len(extra) + len(lw.body)
	lw.out = appendU32(lw.out, uint32(size))
	lw.out = append(lw.out, count...)
	lw.out = append(lw.out, raw...)
	for _, t := range extra {
		lw.out = append(lw.out, 1, byte(t))
	}
	lw.out = append(lw.out, lw.body...)
}

// copyTo copies the original up to an offset.
func (lw *lowering) copyTo(offset int) {
	if !lw.discard {
		lw.body = append(lw.body, lw.bytes[lw.copied:offset]...)
	}
	lw.copied = offset
}

func (lw *lowering) emit(b ...byte) { lw.body = append(lw.body, b...) }

func (lw *lowering) emitIndex(op byte, index uint32) {
	lw.body = appendU32(append(lw.body, op), index)
}

func (lw *lowering) emitI32(v int32) {
	lw.body = appendS64(append(lw.body, opI32Const), int64(v))
}

// spend adds to the weight of the path at hand.
func (lw *lowering) spend(w int32) {
	if lw.weight == unreached {
		return
	}
	lw.weight += w
	if lw.tail != noCall {
		lw.tail += w
	}
	if s := &lw.segments[lw.segment]; lw.weight > s.max {
		s.max = lw.weight
	}
}

// open inserts a check at the end of what is emitted and makes it the one in
// force.
func (lw *lowering) open() {
	lw.segments = append(lw.segments, segment{patch: lw.check(), loop: lw.frames[len(lw.frames)-1].loop})
	lw.segment, lw.weight, lw.tail = len(lw.segments)-1, 0, noCall
}

// openHeader is open for a loop that is not tight. In loops around other loops
// without calls, a check that is a loop itself costs registers where they are
// wanted most: 15 % of a matrix product.
func (lw *lowering) openHeader() {
	if !lw.loop.outer {
		lw.open()
		return
	}
	lw.segments = append(lw.segments, segment{patch: lw.checkOnce(), loop: lw.frames[len(lw.frames)-1].loop})
	lw.segment, lw.weight, lw.tail = len(lw.segments)-1, 0, noCall
}

// openLeased is open for a tight loop. Counting down the global there costs a
// load and a store that wait for each other in every round, which is up to
// half the time of such a loop. So the loop counts down a local, which the
// engine keeps in a register, and takes a lease from the global when that runs
// out. What is left of a lease when the loop ends serves the next such loop of
// the function, or is lost: the guest was charged for at most leaseFuel too
// much.
func (lw *lowering) openLeased() {
	lw.checks++
	fuel := lw.scratchLocal(scratchFuel)
	s := segment{loop: lw.frames[len(lw.frames)-1].loop}
	constant := func() int {
		lw.emit(opI32Const)
		lw.emit(make([]byte, weightBytes)...)
		return len(lw.body) - weightBytes
	}
	lw.emitIndex(opLocalGet, fuel)
	s.patch = constant()
	lw.emit(opI32Sub)
	lw.emitIndex(opLocalTee, fuel)
	lw.emit(opI32Const, 0, opI32LtS, opIf, voidBlock)
	s.leases[0] = constant()
	lw.emitIndex(opCall, lw.lease)
	lw.emitIndex(opLocalGet, fuel)
	s.leases[1] = constant()
	lw.emit(opI32Add)
	lw.emitIndex(opLocalSet, fuel)
	lw.emit(opEnd)
	lw.segments = append(lw.segments, s)
	lw.segment, lw.weight, lw.tail = len(lw.segments)-1, 0, noCall
}

// loopShape is what lowering wants to know of a loop before it gets there.
type loopShape struct {
	// tight loops are those openLeased is for.
	tight bool
	// outer loops have loops but no calls in them.
	outer bool
	// copies of the body to make, more than 1 for those beginUnrolled is for.
	copies int
}

// openLoop is a block that findTightLoops is in.
type openLoop struct {
	loop  int // index in loops, negative if it is no loop
	start int // instructions read before it
	// arity is how many values a branch to its label carries, repeats says
	// that there is one.
	arity   int
	repeats bool
	// void says that its type has neither parameters nor results.
	void bool
}

// findTightLoops reads the instructions of a body once and notes which loops
// have neither calls nor more than tightLoop instructions, and which of these
// are to be unrolled: those that repeat at all, are innermost (or nested loops
// would grow exponentially), have no values to pass on, and consist of
// instructions that are lowered to themselves and are cheap enough for the
// check to matter.
func (lw *lowering) findTightLoops(results int) {
	lw.loops, lw.openLoops = lw.loops[:0], append(lw.openLoops[:0], openLoop{loop: -1, arity: results})
	var i instruction
	lastCall, lastLoop, lastOther := 0, 0, 0
	n := 1
	lw.calls = false
	branch := func(label uint32) {
		if uint64(label) >= uint64(len(lw.openLoops)) {
			return // refused later
		}
		l := &lw.openLoops[len(lw.openLoops)-1-int(label)]
		l.repeats = true
		if l.arity > unrolledArity {
			lastOther = n
		}
	}
	for ; len(lw.openLoops) > 0; n++ {
		if lw.next(&i); !lw.r.ok() {
			return
		}
		switch i.op {
		case opBlock, opIf:
			lw.openLoops = append(lw.openLoops, openLoop{loop: -1, arity: i.blockResults})
			if i.arity > unrolledArity {
				lastOther = n
			}
		case opLoop:
			lw.openLoops = append(lw.openLoops, openLoop{loop: len(lw.loops), start: n, arity: i.blockParams, void: i.arity == 0})
			lw.loops = append(lw.loops, loopShape{})
			lastLoop, lastOther = n, n
		case opEnd:
			if l := lw.openLoops[len(lw.openLoops)-1]; l.loop >= 0 {
				length := n - l.start // with the end
				s := loopShape{
					tight: length <= tightLoop && lastCall < l.start,
					outer: lastCall < l.start && lastLoop > l.start,
				}
				if s.tight && l.void && l.repeats && lastOther <= l.start {
					s.copies = min(unrolledInstructions/length, maxCopies)
				}
				lw.loops[l.loop] = s
			}
			lw.openLoops = lw.openLoops[:len(lw.openLoops)-1]
		case opBr, opBrIf:
			branch(i.index)
		case opReturn:
			branch(uint32(len(lw.openLoops) - 1))
		case opBrTable:
			for _, l := range i.labels {
				branch(l)
			}
			if len(i.labels) > unrolledArity {
				lastOther = n
			}
		case opCall, opCallIndirect:
			lastCall, lw.calls = n, true
		case opI32RemS, opI32RemU, opI64RemS, opI64RemU, opMisc, opMemoryGrow, opRefFunc:
			lastOther = n
		}
	}
}

// unrolledLoop is the loop that is being unrolled, if there is one.
type unrolledLoop struct {
	// left is how many copies of the body are still to be made, that at hand
	// included; 0 if no loop is being unrolled.
	left int
	// body is the offset of the original body, targets what code.targets was
	// there.
	body, targets int
	// label is the index in frames of the block that stands for the loop;
	// inserted how many blocks there are around the original body in its
	// place, besides that.
	label, inserted int
}

// beginUnrolled makes a tight loop without parameters and results run several
// rounds for each check, because even a leased check is up to half the time of
// a loop of four machine instructions:
//
//	block
//		loop
//			check
//			block
//				body
//				br 2
//			end
//			… more of these
//			body
//		end
//	end
//
// A branch to the loop's label, at the same depth, is now one to the end of
// the innermost of these blocks, where the next copy begins, or from the last
// copy to the loop. Branches that leave the loop pass the inserted blocks. The
// original is valid exactly if the last copy is, which is as it was but for
// the block around the loop; the types of the labels are the same. A check pays
// for all copies, so a loop that is left early was charged for up to
// copies - 1 rounds too much.
func (lw *lowering) beginUnrolled(i *instruction) {
	lw.copyTo(i.start)
	lw.emit(opBlock, voidBlock, opLoop, voidBlock)
	lw.pushFrame(opBlock, 0)
	lw.pushFrame(opLoop, 0)
	lw.openLeased()
	lw.spend(weightSimple)
	lw.unrolled = unrolledLoop{left: lw.loop.copies, body: i.end, targets: lw.targets}
	lw.beginCopy()
}

// beginCopy starts with the next copy of the body, of which there is one.
func (lw *lowering) beginCopy() {
	u := &lw.unrolled
	u.inserted = 1
	if u.left > 1 {
		lw.emit(opBlock, voidBlock)
		lw.pushFrame(opBlock, 0)
		u.inserted = 2
	}
	u.label = len(lw.frames) - 1
	lw.r.pos, lw.copied, lw.targets = u.body, u.body, u.targets
}

// endCopy is the end of a copy of the body.
func (lw *lowering) endCopy(i *instruction) {
	u := &lw.unrolled
	u.left--
	if u.left == 0 {
		lw.endBlock() // the loop
		lw.copyTo(i.end)
		outside := &lw.frames[len(lw.frames)-1]
		outside.in = max(outside.in, lw.weight)
		lw.weight = unreached
		lw.endBlock()
		lw.emit(opEnd)
		*u = unrolledLoop{}
		return
	}
	lw.copyTo(i.start)
	if lw.weight != unreached {
		// As behind any loop, what is in force again is the check before it.
		lw.spend(weightSimple)
		outside := &lw.frames[len(lw.frames)-3]
		outside.in = outside.start
		lw.weight = unreached
	}
	lw.emit(opBr, 2, opEnd)
	lw.endBlock()
	lw.beginCopy()
}

// shift returns the label that stands for one of the original code.
func (lw *lowering) shift(label uint32) uint32 {
	if u := &lw.unrolled; u.left > 0 && int64(label) > int64(len(lw.frames)-1-u.label) {
		label += uint32(u.inserted)
	}
	return label
}

// branch emits a branch instruction out of the unrolled loop anew.
func (lw *lowering) branch(i *instruction) {
	if lw.unrolled.left == 0 {
		return
	}
	lw.copyTo(i.start)
	lw.copied = i.end
	lw.emit(i.op)
	if i.op != opBrTable {
		lw.body = appendU32(lw.body, lw.shift(i.index))
		return
	}
	lw.body = appendU32(lw.body, uint32(len(i.labels)-1))
	for _, l := range i.labels {
		lw.body = appendU32(lw.body, lw.shift(l))
	}
}

// repeatIf replaces a br_if to a loop, without values, by an if with a br in it.
// wazero up to v1.12.0 splits the edge that the br_if is, and after that does
// not compile it together with the comparison in front of it: four instructions
// more in every round of a loop.
func (lw *lowering) repeatIf(i *instruction) {
	lw.copyTo(i.start)
	lw.copied = i.end
	lw.emit(opIf, voidBlock)
	lw.emitIndex(opBr, lw.shift(i.index)+1)
	lw.emit(opEnd)
}

// check emits a check whose weight is to be patched in at the place it returns:
//
//	loop
//		fuel -= weight
//		if fuel < 0 { checkpoint(); continue }
//	end
//
// It is a loop, which pays again after a refill, because then no path leads
// from the call of the checkpoint to what follows but through the beginning.
// wazero's register allocation lets the code behind a join continue with the
// registers of one of the paths to it, at a loop those of the path that enters
// it. So all values stay in registers and what the call costs, saving and
// loading them, is in the branch that is hardly ever taken. With an if without
// else, everything in use was stored before each check and loaded behind it.
func (lw *lowering) check() (patch int) {
	lw.emit(opLoop, voidBlock)
	patch = lw.emitCountdown(-1)
	lw.emit(opBr, 1, opEnd, opEnd)
	return patch
}

// checkOnce is check without the loop.
func (lw *lowering) checkOnce() (patch int) {
	patch = lw.emitCountdown(-1)
	lw.emit(opEnd)
	return patch
}

// checkConstant emits a check of a given weight, up to all of a refill.
func (lw *lowering) checkConstant(weight int32) {
	lw.emitCountdown(weight)
	lw.emit(opEnd)
}

// emitCountdown subtracts the weight from the fuel and opens an if in which
// the checkpoint was passed. A negative weight stands for one to be patched
// in, whose place it returns.
func (lw *lowering) emitCountdown(weight int32) (patch int) {
	lw.checks++
	lw.emitIndex(opGlobalGet, lw.fuel)
	if weight < 0 {
		lw.emit(opI32Const)
		patch = len(lw.body)
		lw.emit(make([]byte, weightBytes)...)
	} else {
		lw.emitI32(weight)
	}
	lw.emit(opI32Sub)
	lw.emitIndex(opGlobalSet, lw.fuel)
	lw.emitIndex(opGlobalGet, lw.fuel)
	lw.emit(opI32Const, 0, opI32LtS, opIf, voidBlock)
	lw.emitIndex(opCall, lw.checkpoint)
	return patch
}

// arrive notes a branch from here to the end of a block.
func (lw *lowering) arrive(f *frame) {
	if lw.weight == unreached || f.op == opLoop {
		return // a branch to a loop meets the loop's own check
	}
	f.arrived(lw.segment, lw.weight, lw.tail)
	w := lw.weight
	if lw.segment != f.segment {
		// What this path has cost since the block's check began is not more
		// than the longest path through that check's code, so far.
		w = lw.segments[f.segment].max
	}
	f.in = max(f.in, w)
}

// arrived notes a path to the end of a block, with the check in force on it
// and the weight and the tail since then.
func (f *frame) arrived(segment int, weight, tail int32) {
	f.tail = max(f.tail, tail)
	if f.from == fromNone {
		f.from = segment
	} else if f.from != segment {
		f.from = fromSeveral
	}
	f.weight = max(f.weight, weight)
}

// label finds the block a branch goes to.
func (lw *lowering) label(i *instruction, depth uint32) *frame {
	if uint64(depth) >= uint64(lw.nesting()) {
		lw.r.fail(CodeInvalid, i.start, "unknown label %d", depth)
		return &lw.frames[0]
	}
	return &lw.frames[len(lw.frames)-1-int(lw.shift(depth))]
}

// nesting is how many blocks are open in the original code.
func (lw *lowering) nesting() int {
	return len(lw.frames) - lw.unrolled.inserted
}

func (lw *lowering) push(i *instruction, arity int) {
	if lw.nesting() > lw.limits.NestingDepth {
		lw.r.fail(CodeLimitExceeded, i.start, "blocks nested deeper than %d", lw.limits.NestingDepth)
		return
	}
	lw.pushFrame(i.op, arity)
}

func (lw *lowering) pushFrame(op byte, arity int) {
	loop := lw.frames[len(lw.frames)-1].loop
	if op == opLoop {
		loop = len(lw.frames)
	}
	lw.frames = append(lw.frames, frame{
		op: op, segment: lw.segment, start: lw.weight, in: unreached, from: fromNone,
		startTail: lw.tail, tail: noCall, loop: loop, arity: int32(arity),
	})
}

// pay accounts for an instruction that is about to run, with a new check in
// front of it if the one in force is used up.
func (lw *lowering) pay(i *instruction, w int32) {
	if lw.weight == unreached || !lw.InterruptChecks {
		return
	}
	limit := int32(segmentWeight)
	if lw.segment == 0 {
		limit = freeWeight
		switch {
		case i.op == opCall || i.op == opCallIndirect:
			limit = 0 // or a chain of calls would never be checked
		case lw.calls && (i.op == opGlobalSet || immediates[i.op] == immMemoryArgument):
			// There will be a check anyway. Early it costs less: wazero knows
			// from one access to memory that another one is within bounds, but
			// not across a check. Compilers set a global, the stack pointer,
			// where a function needs memory of its own.
			limit = 0
		}
	}
	if lw.weight+w > limit && (lw.weight > 0 || lw.segment == 0) || lw.tail != noCall && lw.tail+w > returnWeight {
		lw.copyTo(i.start)
		lw.open()
	}
	lw.spend(w)
	if (i.op == opCall || i.op == opCallIndirect) && lw.tail == noCall {
		lw.tail = 0
	}
}

// instruction lowers one instruction.
func (lw *lowering) instruction(i *instruction) {
	switch i.op {
	case opBlock:
		lw.pay(i, weightOf(i))
		lw.push(i, i.blockResults)
	case opLoop:
		if lw.InterruptChecks && lw.weight != unreached && lw.loop.copies > 1 && lw.nesting() <= lw.limits.NestingDepth {
			lw.beginUnrolled(i)
			return
		}
		lw.push(i, i.blockParams)
		if lw.InterruptChecks && lw.weight != unreached {
			lw.copyTo(i.end)
			if lw.loop.tight {
				lw.openLeased()
			} else {
				lw.openHeader()
			}
			lw.spend(weightSimple + int32(i.arity))
		}
	case opIf:
		lw.pay(i, weightSimple+weightOf(i))
		lw.push(i, i.blockResults)
	case opElse:
		f := &lw.frames[len(lw.frames)-1]
		if f.op != opIf || f.hasElse {
			lw.r.malformed(i.start, "else without if")
			return
		}
		lw.arrive(f)
		f.hasElse = true
		lw.segment, lw.weight, lw.tail = f.segment, f.start, f.startTail
	case opEnd:
		if lw.unrolled.left > 0 && len(lw.frames)-1 == lw.unrolled.label {
			lw.endCopy(i)
			return
		}
		lw.endBlock()
	case opBr, opBrIf:
		f := lw.label(i, i.index)
		lw.pay(i, weightSimple+f.arity)
		if i.op == opBrIf && f.op == opLoop && f.arity == 0 && lw.InterruptChecks {
			lw.repeatIf(i)
		} else {
			lw.branch(i)
		}
		lw.arrive(f)
		if i.op == opBr {
			lw.weight = unreached
		}
	case opBrTable:
		arity := int32(0)
		for _, l := range i.labels {
			arity = max(arity, lw.label(i, l).arity)
		}
		lw.pay(i, 2*weightSimple+arity)
		lw.branch(i)
		for _, l := range i.labels {
			lw.arrive(lw.label(i, l))
		}
		lw.weight = unreached
	case opReturn:
		lw.pay(i, weightSimple+lw.frames[0].arity)
		lw.weight = unreached
	case opUnreachable:
		lw.weight = unreached
	case opI32RemS, opI32RemU, opI64RemS, opI64RemU:
		lw.pay(i, 2*weightDivide)
		if lw.RemainderByDivision {
			lw.remainder(i)
		}
	case opMisc:
		lw.misc(i)
	default:
		lw.pay(i, weightOf(i))
	}
}

// endBlock closes the innermost block.
func (lw *lowering) endBlock() {
	last := len(lw.frames) - 1
	f := &lw.frames[last]
	lw.arrive(f)
	switch {
	case f.op == opLoop:
		f.in = unreached
		if lw.weight != unreached {
			f.in, f.tail = f.start, lw.tail
		}
	case f.op == opIf && !f.hasElse && f.start != unreached:
		f.in = max(f.in, f.start)
		f.arrived(f.segment, f.start, f.startTail)
	}
	lw.segment, lw.weight, lw.tail = f.segment, f.in, f.tail
	// All paths have passed the same check, so it stays in force; but not if
	// it is one of a loop that was left, or each round would pay for what
	// comes behind.
	if f.from >= 0 && lw.segments[f.from].loop < last {
		lw.segment, lw.weight = f.from, f.weight
	}
	lw.frames = lw.frames[:last]
}

// Kinds of scratch locals. They are appended behind the original locals,
// whose indices alone the original code may use.
const (
	scratchI32A = iota
	scratchI32B
	scratchI64A
	scratchI64B
	// scratchFuel is fuel already taken from the global; it starts at 0.
	scratchFuel
	scratchKinds
)

// scratchLocal returns the index of a scratch local of the function at hand.
func (lw *lowering) scratchLocal(kind int) uint32 {
	if lw.scratches[kind] == 0 {
		t := ValueI32
		if kind == scratchI64A || kind == scratchI64B {
			t = ValueI64
		}
		lw.scratch = append(lw.scratch, t)
		lw.scratches[kind] = uint32(lw.locals) + uint32(len(lw.scratch))
	}
	return lw.scratches[kind] - 1
}

// remainder replaces a rem b by a - a/b*b. Division by zero traps in the
// division as it would have. The smallest integer divided by -1 overflows
// where the remainder is 0, so for signed operands -1 is replaced by 1, which
// has the same remainder: 0.
func (lw *lowering) remainder(i *instruction) {
	lw.copyTo(i.start)
	lw.copied = i.end
	if lw.discard {
		return
	}
	wide := i.op == opI64RemS || i.op == opI64RemU
	signed := i.op == opI32RemS || i.op == opI64RemS
	a, b := lw.scratchLocal(scratchI32A), uint32(0)
	if wide {
		a, b = lw.scratchLocal(scratchI64A), lw.scratchLocal(scratchI64B)
	} else {
		b = lw.scratchLocal(scratchI32B)
	}
	constant, equal, divide, multiply, subtract := byte(opI32Const), byte(opI32Eq), i.op-2, byte(opI32Mul), byte(opI32Sub)
	if wide {
		constant, equal, multiply, subtract = opI64Const, opI64Eq, opI64Mul, opI64Sub
	}
	lw.emitIndex(opLocalSet, b)
	lw.emitIndex(opLocalTee, a)
	lw.emitIndex(opLocalGet, a)
	// A constant divisor other than -1, the common case, needs no care.
	if signed && (!lw.lastConst || lw.last == -1) {
		lw.emit(constant, 1)
		lw.emitIndex(opLocalGet, b)
		lw.emitIndex(opLocalGet, b)
		lw.emit(constant, 0x7f, equal, opSelect)
		lw.emitIndex(opLocalTee, b)
	} else {
		lw.emitIndex(opLocalGet, b)
	}
	lw.emit(divide)
	lw.emitIndex(opLocalGet, b)
	lw.emit(multiply, subtract)
}
