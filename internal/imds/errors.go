package imds

import (
	"errors"
	"fmt"
	"net/http"
)

// What can be wrong with the metadata service or its answers. Every error of
// this package about an exchange is an *Error that is exactly one of these.
var (
	// ErrUnreachable: no answer within the deadlines.
	ErrUnreachable = errors.New("instance metadata is unreachable")
	// ErrDisabled: the service answers that it is switched off for this
	// instance (403), or the environment forbids its use.
	ErrDisabled = errors.New("instance metadata is disabled")
	// ErrVersion1: the service does not issue tokens, so it knows only version 1.
	ErrVersion1 = errors.New("instance metadata has no version 2")
	// ErrNotFound: the service has no such value (404).
	ErrNotFound = errors.New("instance metadata has no such value")
	// ErrUnavailable: the service answers, but only with failures (5xx, 429,
	// or 401 to a token it has just issued).
	ErrUnavailable = errors.New("instance metadata is failing")
	// ErrMalformed: the answer is not in the documented format or is too long.
	ErrMalformed = errors.New("instance metadata is malformed")
)

// Error is one failed read.
type Error struct {
	// Kind is one of the Err values of this package.
	Kind error
	// Path is what was read, such as "meta-data/instance-id".
	Path string
	// Status is the HTTP status of the last answer; 0 without one.
	Status int
	// Err is the cause in detail; it may be nil.
	Err error

	sentence string
}

// Error returns one sentence that says what to do next.
func (e *Error) Error() string { return e.sentence }

// Unwrap makes errors.Is find both the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// malformed is an answer to path that breaks its format. The value itself is
// quoted and cut by callers: it came from outside.
func malformed(path, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{
		Kind: ErrMalformed, Path: path, Status: http.StatusOK, Err: err,
		sentence: fmt.Sprintf("instance metadata %s is malformed: %v; check what answers at the metadata address", path, err),
	}
}

// quote shortens what came from outside, and makes it printable.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q... (%d bytes)", s[:most], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// kindName is the error's kind as a value of a metric's label.
func kindName(err error) string {
	for _, k := range []struct {
		err  error
		name string
	}{
		{ErrUnreachable, "unreachable"}, {ErrDisabled, "disabled"}, {ErrVersion1, "version-1"},
		{ErrNotFound, "not-found"}, {ErrUnavailable, "unavailable"}, {ErrMalformed, "malformed"},
	} {
		if errors.Is(err, k.err) {
			return k.name
		}
	}
	return "other"
}
