package prefetch

import (
	"slices"
	"sync"
)

// LiveUnion lets several loops name what must stay in one store: its SetLive
// replaces the whole set, so nobody may call it with less than everything.
// Nothing is passed on before every part has spoken, because until then
// nobody knows what may go. The zero value is not usable; see NewLiveUnion.
type LiveUnion struct {
	set func(digests []string)

	mu    sync.Mutex
	parts [][]string
	heard []bool
}

// NewLiveUnion makes a union of n parts that is given to set, such as
// (*precompile.Store).SetLive.
func NewLiveUnion(n int, set func(digests []string)) *LiveUnion {
	return &LiveUnion{set: set, parts: make([][]string, n), heard: make([]bool, n)}
}

// Set replaces part i, from 0. Calls of set never overlap.
func (u *LiveUnion) Set(i int, digests []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.parts[i], u.heard[i] = slices.Clone(digests), true
	if slices.Contains(u.heard, false) {
		return
	}
	all := slices.Concat(u.parts...)
	slices.Sort(all)
	u.set(slices.Compact(all))
}
