// Package publish is what the submit API has done for it on the way from a
// received module to a durable artifact: a check by a sandboxed child, and a
// push to a registry, the one that comes with Hearth or anybody's.
//
// It owns how repositories are named, that the same bytes are pushed once
// however many submit them, when a repository is made, and how the errors of
// package registry become problems of the API. It knows neither Kubernetes nor
// a cloud: what makes repositories and gives credentials is handed in.
package publish
