// Package wallclock makes the times that code sees after somebody set the
// machine's clock, without setting it.
package wallclock

import (
	"time"
	"unsafe"
)

// How package time keeps a time that has a monotonic reading: one bit that says
// so, 33 bits of seconds, 30 bits of nanoseconds.
const (
	hasMonotonic = 1 << 63
	secondsShift = 30
)

// Jumped returns what time.Now would have returned in place of t had the
// machine's clock been set by so much (whole seconds) since the process began:
// another wall clock and the same monotonic reading, which setting a clock does
// not change. It panics for a time without a monotonic reading.
func Jumped(t time.Time, by time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t)) // its first field
	if *wall&hasMonotonic == 0 || by%time.Second != 0 {
		panic("wallclock: a jump is of whole seconds, of a time with a monotonic reading")
	}
	*wall += uint64(int64(by/time.Second)) << secondsShift
	return t
}
