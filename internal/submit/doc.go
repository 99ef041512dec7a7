// Package submit is the HTTP API that takes functions in: submit, list,
// settings, roll back, delete, logs, and the two calls a node makes.
//
// It owns the wire: bodies received to temporary files and their bounds,
// preconditions, idempotency keys, RFC 9457 problems, the OpenAPI document.
// What a function is and what is durable belongs to internal/function. It
// never looks into a module, runs nothing a client sent, and never puts a
// secret's value, or a request's body, into an answer or a log line.
package submit
