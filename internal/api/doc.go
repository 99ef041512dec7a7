// Package api is `nodeagent api`: the submit API of a cluster and the duties
// of its one leader.
//
// It owns wiring, listeners, the certificate, the election and the order of
// duties. What a function is belongs to function and clusterstore, who may do
// what to access, what becomes of it in the cluster to deploy, the HTTP API to
// submit. It keeps nothing of its own: all that must outlive a replica is an
// object of the cluster.
package api
