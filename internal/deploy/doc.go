// Package deploy makes a Function of a cluster reachable: the SpinApp, its
// executor, autoscaler and Ingress of a function with runtime spin, and the
// Ingresses that lead to the engines for resident ones.
//
// It owns these objects and what is said about their rollout. It records no
// revision and claims no name (internal/function), runs nothing and touches no
// Node. What it made is told by the label app.kubernetes.io/managed-by=hearth-api
// together with an owner reference or the namespace it lies in; objects of
// others are never overwritten and never deleted.
//
// [Cluster] holds the connection and the watches, [Spin] and [Hosts] reconcile.
// Both are level-triggered: they look at what is, write what is missing and say
// when to call again. All memory they have is in the objects themselves, so any
// replica can go on where another one ended.
package deploy
