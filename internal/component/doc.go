// Package component reads the binary format of the WebAssembly component
// model: which core modules a component carries, and where they are.
//
// It owns the format and nothing else. It knows only bytes: it runs nothing,
// fetches nothing, and validates no more than it has to in order to find the
// modules. Source of the format: WebAssembly/component-model,
// design/mvp/Binary.md (version 0x0d, layer 1).
package component
