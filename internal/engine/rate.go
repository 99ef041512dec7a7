package engine

import (
	"math"
	"sync/atomic"
	"time"
)

// rateBurst is how many seconds' worth of a rate may come at once after a
// pause: a page that asks for many things at a time is one visitor.
const rateBurst = 2

// maxRate is the highest rate there is: one takes at least a nanosecond.
const maxRate = 1e9

// rate is a rate that several goroutines take from without waiting for each
// other (the generic cell rate algorithm). nil and the zero value grant everything.
type rate struct {
	interval, window int64 // ns that one takes, and all that come at once
	// taken is until when the rate is taken, in ns since the engine's start.
	taken atomic.Int64
}

// newRate grants perSecond on average and, after a pause, rateBurst seconds'
// worth at once, but at least one. 0 and less grant everything.
func newRate(perSecond float64) *rate {
	if !(perSecond > 0) {
		return &rate{}
	}
	interval := math.Max(1, float64(time.Second)/math.Min(perSecond, maxRate))
	// Rates of less than one in a century are one in a century.
	interval = math.Min(interval, math.MaxInt64/4)
	return &rate{interval: int64(interval), window: int64(math.Max(interval, rateBurst*float64(time.Second)))}
}

// take takes one at a time since the engine's start, or says how long to wait
// for it. What is refused takes nothing.
func (r *rate) take(now time.Duration) (wait time.Duration, ok bool) {
	if r == nil || r.interval == 0 {
		return 0, true
	}
	for {
		taken := r.taken.Load()
		next := max(taken, int64(now)) + r.interval
		if over := next - int64(now) - r.window; over > 0 {
			return time.Duration(over), false
		}
		if r.taken.CompareAndSwap(taken, next) {
			return 0, true
		}
	}
}

// idle says whether nothing of it is taken.
func (r *rate) idle(now time.Duration) bool { return r.taken.Load() <= int64(now) }
