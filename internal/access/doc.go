// Package access says who asks and whether they may: callers, actions, the
// errors of both, and the tokens of one machine, which are in a file.
//
// It owns no route and no answer (internal/submit does) and knows nothing of
// Kubernetes, so that one machine needs nothing of it; package kubeaccess asks
// a cluster instead. It never keeps, prints or logs a token.
package access
