// Package shim knows the WebAssembly runtimes of a node: it finds them, reads
// their versions, proves by running a module that they work, and warms their
// compile caches.
//
// Discover merges what is known about each runtime: the shim binary, the
// runtime handler that containerd's CRI plugin reports, k3s's rendered
// configuration, and the RuntimeClasses that the caller passes in as values.
// Prover decides whether a runtime runs WebAssembly now; Monitor repeats that
// on a schedule and whenever containerd or a shim changed; Warmer makes a shim
// compile an image before its first pod. Containerd does the work behind them
// on a real node, through the interfaces Node and CacheNode, which package
// shimtest holds to their contract.
//
// The package owns containerd's namespace "hearth.sh" with everything in it,
// and the short-lived containers that warming creates in "k8s.io". It touches
// no other container, image or CRI sandbox, changes no configuration, installs
// nothing, and knows nothing of Kubernetes' API.
package shim
