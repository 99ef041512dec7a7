// Package precompile turns WebAssembly that strangers wrote into native code
// that is safe to keep: it checks, lowers and compiles each module in a child
// process without privileges, publishes the result into a content-addressed
// store, and loads it from there.
//
// Three parts, each for another process:
//
//   - [Compiler] starts one child per job and never trusts its answer further
//     than it can verify; [ChildMain] is that child.
//   - [Store] is what the one writer of a store directory uses.
//   - [Load] is what any number of readers use, without a Store, on a
//     directory they cannot write to.
//
// It owns the store's directory and the formats of its files, which are
// documented at [Manifest] and [Store]. It must not run guests, speak to a
// registry, or know what functions and revisions are.
package precompile
