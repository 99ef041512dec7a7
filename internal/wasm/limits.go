package wasm

// Limits bound what a module may ask of the compiler and of the process that
// runs it. Zero means zero, not unlimited: start from [DefaultLimits].
type Limits struct {
	// ModuleBytes is the size of the whole module.
	ModuleBytes int
	// Types, Functions (imported and defined), Imports, Exports, Globals,
	// Tables, Memories, DataSegments and ElementSegments count entries.
	Types           int
	Functions       int
	Imports         int
	Exports         int
	Globals         int
	Tables          int
	Memories        int
	DataSegments    int
	ElementSegments int
	// TableEntries bounds the minimum of each table, the sum of all minimums,
	// and the number of elements in all element segments together.
	TableEntries int
	// LocalsPerFunction counts parameters and declared locals.
	LocalsPerFunction int
	// BodyBytes is the size of one function body.
	BodyBytes int
	// ParamsPerType and ResultsPerType bound one function type.
	ParamsPerType  int
	ResultsPerType int
	// BrTableTargets bounds the labels of one br_table, BrTableTargetsTotal
	// those of one function body: the compiler's cost is per label.
	BrTableTargets      int
	BrTableTargetsTotal int
	// NestingDepth bounds open blocks in one function body.
	NestingDepth int
	// NameBytes bounds one import or export name.
	NameBytes int
	// MemoryPages bounds the minimum of a memory, in pages of 64 KiB.
	MemoryPages int
}

// DefaultLimits are generous for what compilers produce today (the largest
// modules seen in the wild, language runtimes with a standard library, stay a
// factor of three below each) and keep the cost of the worst module bounded.
func DefaultLimits() Limits {
	return Limits{
		ModuleBytes:         50 << 20, // what the submit API accepts
		Types:               100_000,
		Functions:           200_000, // a Go program with the Kubernetes client has 60,000
		Imports:             10_000,
		Exports:             50_000,
		Globals:             50_000,
		Tables:              100,
		Memories:            1,       // more is the multi-memory proposal
		DataSegments:        100_000, // one per string in some toolchains
		ElementSegments:     100_000,
		TableEntries:        1 << 18, // 8 bytes each at run time: 2 MiB per instance
		LocalsPerFunction:   50_000,  // each costs a stack slot and a variable in the compiler's SSA form
		BodyBytes:           8 << 20, // browsers agreed on 7,654,321
		ParamsPerType:       1_000,   // likewise
		ResultsPerType:      1_000,   // likewise
		BrTableTargets:      65_520,  // likewise
		BrTableTargetsTotal: 500_000,
		NestingDepth:        20_000, // the largest switch statements nest one block a case
		NameBytes:           100_000,
		MemoryPages:         65_536, // 4 GiB, all that 32-bit addresses reach; the host sets the real limit
	}
}
