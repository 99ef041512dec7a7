package engine

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// queueFactor times a function's concurrency may wait for their turn.
	queueFactor = 4
	// queueWait bounds the wait of one request: longer, and a client that
	// tries again elsewhere or later is better served.
	queueWait = 10 * time.Second
)

var (
	errQueueFull = errors.New("too many requests wait for the function already")
	errQueueWait = errors.New("the function was busy for too long")
)

// limiter admits a bounded number of requests at once and lets a bounded
// number wait, first come first served.
type limiter struct {
	mu      sync.Mutex
	limit   int
	running int
	waiting []chan struct{} // closed when its turn has come
}

// acquire waits for a turn. Errors are errQueueFull, errQueueWait or ctx's.
func (l *limiter) acquire(ctx context.Context) error {
	l.mu.Lock()
	if l.running < l.limit && len(l.waiting) == 0 {
		l.running++
		l.mu.Unlock()
		return nil
	}
	if len(l.waiting) >= l.limit*queueFactor {
		l.mu.Unlock()
		return errQueueFull
	}
	turn := make(chan struct{})
	l.waiting = append(l.waiting, turn)
	l.mu.Unlock()

	t := time.NewTimer(queueWait)
	defer t.Stop()
	var err error
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.C:
		err = errQueueWait
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, w := range l.waiting {
		if w == turn {
			l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
			return err
		}
	}
	// The turn came between giving up and here: pass it on.
	l.running--
	l.admit()
	return err
}

func (l *limiter) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running--
	l.admit()
}

// resize changes the limit; requests that run are left alone.
func (l *limiter) resize(limit int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = limit
	l.admit()
}

func (l *limiter) admit() {
	for l.running < l.limit && len(l.waiting) > 0 {
		l.running++
		close(l.waiting[0])
		l.waiting = l.waiting[1:]
	}
}

func (l *limiter) load() (running, waiting int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running, len(l.waiting)
}
