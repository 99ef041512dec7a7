package wasm

import (
	"bytes"
	"fmt"
	"slices"
)

// VerifyChecks analyses what Lower made with InterruptChecks, knowing what
// checks look like but not how they are placed:
//
//   - every cycle in a function's control flow passes a check;
//   - on every path from a function's beginning to a call there is a check, so
//     that every cycle of calls, direct or not, passes one too;
//   - no path without a check is longer than a bound, which for the paths from
//     a function's beginning, paid for by callers, and for those behind a
//     call, of which many may return one after the other, is small.
func VerifyChecks(l *Lowered, limits Limits) error {
	// Or it would be refused as lowered already.
	b := bytes.ReplaceAll(l.Bytes, []byte(ReservedPrefix), []byte("hidden:"))
	limits.ModuleBytes, limits.Globals, limits.Types = 1<<30, limits.Globals+3, limits.Types+3
	limits.NestingDepth, limits.BodyBytes, limits.LocalsPerFunction = 1<<30, 1<<30, limits.LocalsPerFunction+scratchKinds
	limits.BrTableTargetsTotal, limits.Functions, limits.Exports = 1<<30, 1<<30, limits.Exports+4
	layout, err := readLayout(b, limits)
	if err != nil {
		return fmt.Errorf("reading the lowered module: %w", err)
	}
	v := verifier{
		code:       code{layout: layout, r: &reader{b: b, section: "code"}},
		fuel:       uint32(l.Module.Globals),
		checkpoint: uint32(l.Module.Functions),
	}
	for i, s := range layout.bodies {
		index := uint32(layout.ImportedFunctions + i)
		if index == v.checkpoint || index == v.checkpoint+1 {
			continue // which every check calls
		}
		if err := v.function(index, s); err != nil {
			return fmt.Errorf("function %d: %w", index, err)
		}
	}
	return nil
}

type verifier struct {
	code
	fuel, checkpoint uint32
	nodes            []node
}

// node is an instruction, or all those of one check.
type node struct {
	instruction
	check bool
	next  []int // nodes that may come next; len(nodes) stands for the return
	end   int   // of a block: its end, and its else or 0
	other int
	// from is the longest path without a check that begins here.
	from  int
	state byte // of the search: 0 not seen, 1 on the path, 2 done
}

// Bounds of paths without a check, in instructions: Lower counts at least one
// unit for each but some of its own.
const (
	longestFree = 2*freeWeight + 16
	longestTail = 2*returnWeight + 64
	// Where blocks nest, the rest of what the check outside paid for may
	// follow what the one inside paid for.
	longestPaid = 2*segmentWeight + 64
)

func (v *verifier) function(index uint32, s span) error {
	r := v.r
	r.pos, r.end = s.start, s.end
	v.targets = 0
	v.locals = uint64(len(v.types[v.functions[index]].Params))
	for range r.u32() {
		v.locals += uint64(r.u32())
		r.valueType()
	}
	v.nodes = v.nodes[:0]
	for r.pos < s.end {
		var i instruction
		v.next(&i)
		if !r.ok() {
			return r.err
		}
		i.labels = slices.Clone(i.labels)
		v.nodes = append(v.nodes, node{instruction: i})
	}
	depth, err := v.connect()
	if err != nil {
		return err
	}
	return v.paths(depth)
}

// matches reports whether the instructions from i on have these opcodes.
func (v *verifier) matches(i int, ops ...byte) bool {
	if i+len(ops) > len(v.nodes) {
		return false
	}
	for k, op := range ops {
		if v.nodes[i+k].op != op {
			return false
		}
	}
	return true
}

// checkAt returns how many instructions the check that begins at i has, or 0
// if none begins there.
func (v *verifier) checkAt(i int) int {
	n := v.nodes
	global := func(i int) bool {
		return n[i].index == v.fuel && n[i+1].value > 0 && n[i+3].index == v.fuel && n[i+4].index == v.fuel &&
			n[i+5].value == 0 && n[i+7].arity == 0 && n[i+8].index == v.checkpoint
	}
	countdown := []byte{opGlobalGet, opI32Const, opI32Sub, opGlobalSet, opGlobalGet, opI32Const, opI32LtS, opIf, opCall}
	switch {
	case v.matches(i, append([]byte{opLoop}, append(countdown, opBr, opEnd, opEnd)...)...) && global(i+1) && n[i].arity == 0 && n[i+10].index == 1:
		return len(countdown) + 4
	case v.matches(i, append(countdown, opEnd)...) && global(i):
		return len(countdown) + 1
	case v.matches(i, opLocalGet, opI32Const, opI32Sub, opLocalTee, opI32Const, opI32LtS, opIf,
		opI32Const, opCall, opLocalGet, opI32Const, opI32Add, opLocalSet, opEnd) &&
		n[i].index == n[i+3].index && n[i].index == n[i+9].index && n[i].index == n[i+12].index &&
		n[i+1].value > 0 && n[i+4].value == 0 && n[i+7].value == n[i+10].value && n[i+7].value >= n[i+1].value && n[i+8].index == v.checkpoint+1:
		// Its account is its own.
		for k := range n {
			if (n[k].op == opLocalSet || n[k].op == opLocalTee) && n[k].index == n[i].index &&
				(k < 3 || n[k-1].op != opI32Sub || n[k-3].op != opLocalGet || n[k-2].value <= 0) &&
				(k < 1 || n[k-1].op != opI32Add || n[k-4].op != opCall || n[k-4].index != v.checkpoint+1) {
				return 0
			}
		}
		return 14
	}
	return 0
}

// connect finds the checks and sets what may follow each node. It returns how
// deep blocks nest.
func (v *verifier) connect() (depth int, err error) {
	n := v.nodes
	var open []int
	for i := range n { // first the ends of blocks
		switch n[i].op {
		case opBlock, opLoop, opIf:
			open = append(open, i)
			depth = max(depth, len(open))
		case opElse:
			n[open[len(open)-1]].other = i
		case opEnd:
			if len(open) > 0 {
				n[open[len(open)-1]].end = i
				open = open[:len(open)-1]
			} else if i != len(n)-1 {
				return 0, fmt.Errorf("instruction %d is behind the end", i)
			}
		}
	}
	target := func(label uint32) (int, error) {
		switch {
		case int(label) == len(open):
			return len(n), nil
		case int(label) > len(open):
			return 0, fmt.Errorf("unknown label %d", label)
		}
		if b := open[len(open)-1-int(label)]; n[b].op == opLoop {
			return b, nil
		} else {
			return n[b].end, nil
		}
	}
	for i := 0; i < len(n); i++ {
		x := &n[i]
		if size := v.checkAt(i); size > 0 {
			x.check, x.next = true, []int{i + size}
			i += size - 1
			continue
		}
		labels := x.labels
		x.next = []int{i + 1}
		switch x.op {
		case opBlock, opLoop:
			open = append(open, i)
		case opIf:
			open = append(open, i)
			x.next = append(x.next, max(x.other+1, 0))
			if x.other == 0 {
				x.next[1] = x.end
			}
		case opElse:
			x.next = []int{n[open[len(open)-1]].end}
		case opEnd:
			if len(open) > 0 {
				open = open[:len(open)-1]
			}
		case opBr:
			x.next, labels = nil, []uint32{x.index}
		case opBrIf:
			labels = []uint32{x.index}
		case opBrTable, opUnreachable:
			x.next = nil
		case opReturn:
			x.next = []int{len(n)}
		}
		for _, l := range labels {
			t, err := target(l)
			if err != nil {
				return 0, err
			}
			x.next = append(x.next, t)
		}
	}
	return depth, nil
}

// calls reports whether a node calls a function of the original.
func (v *verifier) calls(i int) bool {
	x := &v.nodes[i]
	return !x.check && (x.op == opCallIndirect || x.op == opCall && x.index < v.checkpoint)
}

// paths checks those of a function.
func (v *verifier) paths(depth int) error {
	n := v.nodes
	// The search runs over paths without a check from everywhere a path can
	// begin: the function's beginning, and behind each check.
	seeds := []int{0}
	var stack []int
	for k := 0; k < len(seeds); k++ {
		if s := seeds[k]; s == len(n) || n[s].state != 0 {
			continue
		}
		stack = append(stack[:0], seeds[k])
		for len(stack) > 0 {
			i := stack[len(stack)-1]
			x := &n[i]
			switch {
			case x.check:
				x.state = 2
				seeds = append(seeds, x.next[0])
				stack = stack[:len(stack)-1]
			case x.state == 0:
				x.state = 1
				if k == 0 && v.calls(i) {
					return fmt.Errorf("instruction %d (at %d) is a call that no check comes before", i, x.start)
				}
				for _, next := range x.next {
					if next == len(n) {
						continue
					}
					switch n[next].state {
					case 0:
						stack = append(stack, next)
					case 1:
						return fmt.Errorf("the loop at %d repeats from %d without a check", n[next].start, x.start)
					}
				}
			case x.state == 1:
				stack = stack[:len(stack)-1]
				x.state = 2
				longest := 0
				for _, next := range x.next {
					if next < len(n) && !n[next].check {
						if n[next].state == 1 {
							return fmt.Errorf("the loop at %d repeats from %d without a check", n[next].start, x.start)
						}
						longest = max(longest, n[next].from)
					}
				}
				x.from = longest + 1
				if op := x.op; op == opBlock || op == opLoop || op == opElse || op == opEnd || op == 0x01 {
					x.from = longest
				}
			default:
				stack = stack[:len(stack)-1]
			}
		}
	}
	if !n[0].check && n[0].from > longestFree {
		return fmt.Errorf("%d instructions before the first check or return", n[0].from)
	}
	for i := range n {
		if n[i].state == 2 && v.calls(i) && n[i].from > longestTail {
			return fmt.Errorf("%d instructions behind the call at %d", n[i].from, n[i].start)
		}
		if n[i].check && n[i].next[0] < len(n) && n[n[i].next[0]].from > longestPaid*(depth+1) {
			return fmt.Errorf("%d instructions behind the check at %d", n[n[i].next[0]].from, n[i].start)
		}
	}
	return nil
}
