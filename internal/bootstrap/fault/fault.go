// Package fault gives every way in which a machine can fail to become a node a
// stable code, a sentence and a remedy.
//
// Codes are part of the product: they are printed, written to the result file
// and the journal, and explained by `bootstrap explain CODE`. A code never
// changes its meaning.
package fault

import (
	"errors"
	"fmt"
)

// Code names one kind of failure, in lower case with dashes, such as
// "artifact-digest-mismatch".
type Code string

// Explanation says what a code means and what to do, whatever the occasion.
type Explanation struct {
	Code    Code   `json:"code"`
	Meaning string `json:"meaning"`
	Remedy  string `json:"remedy"`
}

// Explain returns an explanation.
func Explain(code Code, meaning, remedy string) Explanation {
	return Explanation{Code: code, Meaning: meaning, Remedy: remedy}
}

// Error is a classified failure.
type Error struct {
	// Code says what kind of failure this is.
	Code Code
	// Message is one sentence about this occurrence.
	Message string
	// Remedy is what to do next.
	Remedy string
	// Transient says that the same run may succeed when tried again later
	// without anybody changing anything.
	Transient bool
	// Err is the cause; it may be nil.
	Err error
}

// Error returns what happened, why, and what to do.
func (e *Error) Error() string {
	s := e.Message
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New returns a failure that trying again does not cure.
func New(code Code, cause error, remedy, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Remedy: remedy, Err: cause}
}

// Passing returns a failure that may pass by itself.
func Passing(code Code, cause error, remedy, format string, args ...any) *Error {
	e := New(code, cause, remedy, format, args...)
	e.Transient = true
	return e
}

// CodeOf returns the code of the outermost classified failure in err's tree,
// or "" when there is none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// IsTransient says whether the outermost classified failure may pass by itself.
func IsTransient(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Transient
}
