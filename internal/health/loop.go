package health

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Loop is the sign of life of one goroutine that must keep turning. Liveness
// follows loops only: a probe that looked at anything outside the process
// would restart it for another's fault.
type Loop struct {
	registry   *Registry
	name       string
	maxSilence time.Duration

	last time.Time // guarded by registry.mu
}

// Loop registers a loop that beats at least every maxSilence, which has to
// include the longest wait inside one turn. It counts as having just beaten.
func (r *Registry) Loop(name string, maxSilence time.Duration) *Loop {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := &Loop{registry: r, name: name, maxSilence: maxSilence, last: r.clock()}
	r.loops[l] = struct{}{}
	return l
}

// Beat says that the loop has turned.
func (l *Loop) Beat() {
	l.registry.mu.Lock()
	defer l.registry.mu.Unlock()
	l.last = l.registry.clock()
}

// Stop says that the loop has ended as intended; it no longer counts.
func (l *Loop) Stop() {
	l.registry.mu.Lock()
	defer l.registry.mu.Unlock()
	delete(l.registry.loops, l)
}

// Live returns nil while every loop beats in time, else an error that names
// those that do not and for how long.
func (r *Registry) Live() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock()
	var stuck []string
	for l := range r.loops {
		if silence := now.Sub(l.last); silence > l.maxSilence {
			stuck = append(stuck, fmt.Sprintf("%s has not turned for %v (at most %v)", l.name, silence.Round(time.Millisecond), l.maxSilence))
		}
	}
	if len(stuck) == 0 {
		return nil
	}
	slices.Sort(stuck)
	return fmt.Errorf("not alive: %s", strings.Join(stuck, "; "))
}
