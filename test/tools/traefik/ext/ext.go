// Package ext is where distributors of Traefik add fields to its dynamic
// configuration. These tests add none.
package ext

// HTTP is embedded in the HTTP configuration.
type HTTP struct{}

// Router is embedded in a router's.
type Router struct{}
