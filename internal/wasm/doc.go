// Package wasm reads WebAssembly core modules and rewrites ("lowers") them so
// that a host can always stop them.
//
// It owns the binary format: telling a module from something else ([Sniff]),
// reading one strictly and within limits ([Parse]), and turning it into an
// equivalent one that counts down fuel and looks at a kill flag ([Lower]). It
// knows nothing but bytes: no engine, no files, no network, no clock, no
// goroutine. It never type-checks code, that is left to the engine's
// validator, which sees the lowered module; in return lowering keeps one
// promise: a module that an engine would refuse is never turned into one that
// it would accept.
//
// The formats come from the WebAssembly Core Specification, release 2.0,
// chapters 5 (binary format) and 3.4 (validation of modules).
package wasm
