// Package ecr makes Amazon ECR usable by the role of this instance: one token
// for each registry, shared by everything on the node that pulls or pushes and
// renewed before it expires, and repositories for what is pushed.
//
// It owns which hosts are ECR's, the tokens, which it keeps in memory and never
// writes to logs, errors or disk, and how repositories are made. It neither
// pulls nor pushes.
package ecr
