// Package function is the domain of Hearth: what a function is called, what
// its revisions and settings are, which revision is wanted and which one
// answers, and the durable record of all that.
//
// It owns the database file (bbolt, one process at a time) and the rules that
// keep it true: revisions are immutable and numbered without reuse, a name
// belongs to the tenant that claimed it first, a write that returned is on
// disk. It speaks no HTTP, runs no module, pulls and publishes nothing, and
// must never print, log or return in JSON the value of a secret.
package function
