package wasm

// ExternKind is the kind of an import or export, by its byte in the format.
type ExternKind byte

// The kinds of imports and exports.
const (
	ExternFunction ExternKind = 0
	ExternTable    ExternKind = 1
	ExternMemory   ExternKind = 2
	ExternGlobal   ExternKind = 3
)

// String returns the kind in words ("function", "table", "memory", "global").
func (k ExternKind) String() string {
	switch k {
	case ExternFunction:
		return "function"
	case ExternTable:
		return "table"
	case ExternMemory:
		return "memory"
	case ExternGlobal:
		return "global"
	}
	return "unknown"
}

// ValueType is a value type, by its byte in the format.
type ValueType byte

// The value types of WebAssembly 2.0.
const (
	ValueI32       ValueType = 0x7f
	ValueI64       ValueType = 0x7e
	ValueF32       ValueType = 0x7d
	ValueF64       ValueType = 0x7c
	ValueV128      ValueType = 0x7b
	ValueFuncref   ValueType = 0x70
	ValueExternref ValueType = 0x6f
)

// String returns the type as the text format writes it.
func (v ValueType) String() string {
	switch v {
	case ValueI32:
		return "i32"
	case ValueI64:
		return "i64"
	case ValueF32:
		return "f32"
	case ValueF64:
		return "f64"
	case ValueV128:
		return "v128"
	case ValueFuncref:
		return "funcref"
	case ValueExternref:
		return "externref"
	}
	return "unknown"
}

// FunctionType is the signature of a function.
type FunctionType struct {
	Params, Results []ValueType
}

// String returns the signature for people: "(i32, i32) -> (i64)".
func (t FunctionType) String() string {
	return valueTypesString(t.Params) + " -> " + valueTypesString(t.Results)
}

func valueTypesString(types []ValueType) string {
	s := "("
	for i, v := range types {
		if i > 0 {
			s += ", "
		}
		s += v.String()
	}
	return s + ")"
}

// Equal reports whether both have the same parameters and results.
func (t FunctionType) Equal(o FunctionType) bool {
	return string(valueTypeBytes(t.Params)) == string(valueTypeBytes(o.Params)) &&
		string(valueTypeBytes(t.Results)) == string(valueTypeBytes(o.Results))
}

func valueTypeBytes(types []ValueType) []byte {
	b := make([]byte, len(types))
	for i, v := range types {
		b[i] = byte(v)
	}
	return b
}

// Import is what a module wants from its host.
type Import struct {
	Module, Name string
	Kind         ExternKind
	// Type is set for functions.
	Type FunctionType
}

// Export is what a module offers to its host.
type Export struct {
	Name string
	Kind ExternKind
	// Index is in the index space of Kind, imports first.
	Index uint32
	// Type is set for functions.
	Type FunctionType
}

// Module describes a module as it was submitted, before lowering.
type Module struct {
	Imports []Import
	Exports []Export
	// MemoryMin and MemoryMax are in pages of 64 KiB; MemoryMax means
	// something only if MemoryHasMax.
	MemoryMin, MemoryMax uint64
	HasMemory            bool
	MemoryHasMax         bool
	// HasStart says there is a start function, which a host has to call by
	// the name [ExportStart] once the module is lowered.
	HasStart bool
	// Types, Functions, Globals, Tables, Data and Elements count entries,
	// imported ones included.
	Types, Functions, Globals, Tables, Data, Elements int
	// ImportedFunctions of Functions are imported.
	ImportedFunctions int
	// TableEntries is the sum of the tables' minimums.
	TableEntries int
	// CodeBytes and DataBytes are the sizes of the code and data sections,
	// CustomBytes that of all custom sections.
	CodeBytes, DataBytes, CustomBytes int
}

// Export finds an export by its name.
func (m *Module) Export(name string) (Export, bool) {
	for _, e := range m.Exports {
		if e.Name == name {
			return e, true
		}
	}
	return Export{}, false
}
