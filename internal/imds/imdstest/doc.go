// Package imdstest is an instance metadata service for tests: a server that
// speaks version 2 of the protocol well enough for the AWS SDKs and
// cloud-init, with every way to misbehave that clients must survive, and the
// conformance suite of internal/imds.
//
// It owns the protocol and the tree of values. It knows nothing of Hearth.
package imdstest
