// Package join finds out, before k3s is started, whether a server will let this
// machine join, and if not, why and what to do.
//
// k3s itself polls every 5 to 10 seconds, without an end, whether its token is
// wrong or its server still starting. Preflight asks the same questions of the
// same endpoints (pkg/server/handlers/router.go and pkg/etcd of k3s) in well
// under a second, keeps asking where the answer may change, and ends at once,
// with a code and a remedy, where it will not.
//
// Servers are verified with the CA that the cluster's store gave, from the
// first byte: nothing a server says is believed before, and no token is sent to
// one that is not verified. The package writes nothing but the node password,
// which k3s would write itself, and only in NodePassword.
package join
