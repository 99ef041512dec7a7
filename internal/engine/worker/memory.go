package worker

import (
	"errors"
	"fmt"
	"sync"

	"github.com/tetratelabs/wazero/experimental"
	"golang.org/x/sys/unix"
)

// budget accounts for the linear memory of all instances of the worker. What
// counts is committed length, not touched pages: a guest may touch all of it
// at any moment without another look from here.
type budget struct {
	limit uint64

	mu    sync.Mutex
	used  uint64
	freed chan struct{} // closed and replaced when memory comes back
}

func newBudget(limit uint64) *budget {
	return &budget{limit: limit, freed: make(chan struct{})}
}

func (b *budget) take(n uint64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n > b.limit-b.used {
		return false
	}
	b.used += n
	return true
}

func (b *budget) give(n uint64) {
	if n == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	close(b.freed)
	b.freed = make(chan struct{})
}

// state gives what is used and a channel that is closed when that shrinks.
func (b *budget) state() (used uint64, freed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used, b.freed
}

var (
	// errNoRoom: the worker's budget cannot hold another instance now.
	errNoRoom = errors.New("the worker's memory is in use")
	// errOverLimit: the module's minimum is above the function's own limit.
	errOverLimit = errors.New("the module's minimum memory exceeds the function's limit")
)

// linearMemory is one instance's memory: address space for its limit reserved
// once, so that growing moves a length and never the bytes.
type linearMemory struct {
	budget *budget
	limit  uint64

	mapping   []byte
	committed uint64
	started   bool
	// denied says that the guest asked for more than limit, noRoom that it
	// stayed within limit and the worker's budget was used up. They are read
	// by whoever ran the guest, after it ended.
	denied, noRoom bool
}

// Allocate implements experimental.MemoryAllocator, for one instance.
func (m *linearMemory) Allocate(_, maximum uint64) experimental.LinearMemory {
	size := min(m.limit, maximum)
	if size == 0 {
		return m
	}
	// No reserve: what is not touched costs nothing, and the budget, not the
	// kernel's overcommit policy, says how much may be.
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		panic(fmt.Errorf("%w: reserve %d MiB of address space: %w", errNoRoom, size>>20, err))
	}
	m.mapping = b
	return m
}

// Reallocate implements experimental.LinearMemory. wazero takes nil for a
// failed growth only; at the start the failure travels as a panic, which
// newInstance catches.
func (m *linearMemory) Reallocate(size uint64) []byte {
	first := !m.started
	m.started = true
	if size > uint64(len(m.mapping)) {
		m.denied = true
		if first {
			panic(errOverLimit)
		}
		return nil
	}
	if size > m.committed {
		if !m.budget.take(size - m.committed) {
			m.noRoom = true
			if first {
				panic(errNoRoom)
			}
			return nil
		}
		m.committed = size
	}
	return m.mapping[:size:size]
}

// Free implements experimental.LinearMemory. It is called by the instance's
// owner as well, because wazero forgets a memory whose instantiation failed;
// the second call does nothing.
func (m *linearMemory) Free() {
	if m.mapping != nil {
		// Fails for a range that is not mapped, which would be a bug here.
		_ = unix.Munmap(m.mapping)
		m.mapping = nil
	}
	m.budget.give(m.committed)
	m.committed = 0
}
