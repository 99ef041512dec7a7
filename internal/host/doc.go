// Package host changes a machine in ways that can be described beforehand,
// repeated without effect, and undone.
//
// Wanted files are values (File). A Host says what would change (Plan), changes
// it durably (Apply) and takes back exactly what it changed (Remove), which its
// Ledger remembers. Preflight looks whether the machine can be a node at all and
// reports everything that is in the way at once; Kernel loads modules and sets
// sysctls.
//
// The package knows nothing of Kubernetes, AWS or downloads; callers tell it
// what to want. Everything happens below a root directory, which is "/" except
// in tests and when an image is prepared: no path, and no symbolic link that is
// met on the way, leads out of it.
package host
