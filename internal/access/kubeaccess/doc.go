// Package kubeaccess asks a Kubernetes cluster who somebody is (TokenReview)
// and what they may do (SubjectAccessReview), and which node a node's agent
// is on.
//
// It owns the questions, how long an answer is believed and how many are asked
// at once. It keeps no token, only hashes of them, and decides nothing itself:
// rights are the cluster's RBAC, revoked there.
package kubeaccess
