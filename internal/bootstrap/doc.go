// Package bootstrap turns an EC2 instance into a proven node of a k3s cluster:
// it runs the phases in order, each with a deadline and a line in a timeline,
// and leaves a result that people and programs can read.
//
// It owns the order, the decisions that need more than one part, and the
// record of how a run went. What a phase does is the work of its package:
// imds reads the instance, nodeconfig the wish, artifact brings files, host
// writes them, k3s and its election decide what the machine founds or joins,
// systemd starts it, shim proves that it runs WebAssembly.
//
// A run may be repeated at any time, also after a crash or a loss of power in
// the middle of any phase: it finds what is there, does what is missing and
// changes nothing else.
package bootstrap
