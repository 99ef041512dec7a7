package precompile

import (
	"context"
	"sync"
)

// flights makes concurrent calls with one key share one execution. Unlike
// singleflight of x/sync the execution has no caller's context: it goes on as
// long as anyone waits for it, and is cancelled when the last one left.
type flights[T any] struct {
	mu      sync.Mutex
	running map[string]*flight[T]
	// group lets the owner wait for executions that nobody waits for.
	group sync.WaitGroup
}

type flight[T any] struct {
	done    chan struct{}
	cancel  context.CancelFunc
	waiters int
	value   T
	err     error
}

// do returns what work returns, for this call or for an earlier one with the
// same key that is still running. release is called exactly once: when work is
// done with what the caller passed it, or at once if work is not called.
func (f *flights[T]) do(ctx context.Context, key string, work func(ctx context.Context) (T, error), release func()) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		release()
		return zero, err
	}
	f.mu.Lock()
	if f.running == nil {
		f.running = map[string]*flight[T]{}
	}
	current, ok := f.running[key]
	if !ok {
		workCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		current = &flight[T]{done: make(chan struct{}), cancel: cancel}
		f.running[key] = current
		f.group.Go(func() {
			defer cancel()
			defer release()
			current.value, current.err = work(workCtx)
			f.mu.Lock()
			if f.running[key] == current {
				delete(f.running, key)
			}
			f.mu.Unlock()
			close(current.done)
		})
	}
	current.waiters++
	f.mu.Unlock()
	if ok {
		release()
	}

	select {
	case <-current.done:
		return current.value, current.err
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	current.waiters--
	if current.waiters == 0 {
		current.cancel()
		// Whoever comes now starts afresh instead of sharing a cancelled one.
		if f.running[key] == current {
			delete(f.running, key)
		}
	}
	return zero, context.Cause(ctx)
}
