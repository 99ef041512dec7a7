package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// maxPooled bounds the instances kept ready in the whole worker: each
	// holds the pages its data segments touched, and only functions asked for
	// lately gain from it.
	maxPooled = 32
	// pooledShare is the part of the worker's memory (one in …) that prepared
	// instances may hold.
	pooledShare = 4
	// memoryLimitPages lets every growth come to linearMemory, which knows the
	// function's limit and remembers that it refused.
	memoryLimitPages = 65536
	// roomWait bounds how long a request waits for other instances to end
	// when the worker's memory is used up.
	roomWait = 2 * time.Second
)

// function is a loaded revision.
type function struct {
	spec   Spec
	object *object
	limit  uint64
	worker *Worker

	mu sync.Mutex
	// users counts requests and refills that hold the object.
	users   int
	closing bool
	idle    chan struct{} // closed when closing and users is 0
	// ready is a prepared instance, or nil.
	ready     *instance
	refilling bool
	lastUse   time.Time
}

func (w *Worker) load(ctx context.Context, spec Spec) (f *function, phases []v1alpha1.Phase, err error) {
	began := time.Now()
	object, err := w.useObject(ctx, spec.ObjectDir)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = w.dropObject(context.WithoutCancel(ctx), object) // the first error says it
		}
	}()
	loaded := time.Now()
	f = &function{
		spec:    spec,
		object:  object,
		limit:   uint64(spec.MemoryMiB) << 20,
		worker:  w,
		idle:    make(chan struct{}),
		lastUse: loaded,
	}
	// Proves that instances can be made, and is the first request's.
	i, err := newInstance(ctx, object, w.budget, f.limit)
	switch {
	case errors.Is(err, errNoRoom): // says nothing of the function
	case err != nil:
		return nil, nil, &instantiateError{err}
	default:
		f.ready = i
	}
	return f, []v1alpha1.Phase{
		{Name: "load", Milliseconds: milliseconds(loaded.Sub(began))},
		{Name: "instantiate", Milliseconds: milliseconds(time.Since(loaded))},
	}, nil
}

// instantiateError tells a module that cannot be instantiated from an object
// that cannot be read.
type instantiateError struct{ err error }

func (e *instantiateError) Error() string { return e.err.Error() }
func (e *instantiateError) Unwrap() error { return e.err }

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// hold keeps the object loaded until release.
func (f *function) hold() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closing {
		return false
	}
	f.users++
	return true
}

func (f *function) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users--
	if f.closing && f.users == 0 {
		close(f.idle)
	}
}

// acquire gives an instance, waiting for room if need be. The caller closes it.
func (f *function) acquire(ctx context.Context) (*instance, error) {
	f.mu.Lock()
	i := f.ready
	f.ready = nil
	f.lastUse = time.Now()
	f.mu.Unlock()
	if i != nil {
		return i, nil
	}
	var giveUp <-chan time.Time
	for {
		// Before the try, so that memory freed during it is not missed.
		_, freed := f.worker.budget.state()
		i, err := newInstance(ctx, f.object, f.worker.budget, f.limit)
		if !errors.Is(err, errNoRoom) {
			return i, err
		}
		if f.worker.dropPooled(1) {
			continue
		}
		if giveUp == nil {
			t := time.NewTimer(roomWait)
			defer t.Stop()
			giveUp = t.C
		}
		select {
		case <-freed:
		case <-giveUp:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// refill prepares an instance for the next request, beside whatever else goes
// on. It is called after a request, so that it takes no time from it.
func (f *function) refill() {
	f.mu.Lock()
	if f.closing || f.refilling || f.ready != nil {
		f.mu.Unlock()
		return
	}
	f.refilling = true
	f.users++
	f.mu.Unlock()
	f.worker.background.Go(func() {
		defer f.release()
		i, err := newInstance(context.Background(), f.object, f.worker.budget, f.limit)
		f.mu.Lock()
		f.refilling = false
		if err == nil && !f.closing && f.ready == nil {
			f.ready, i = i, nil
		}
		f.mu.Unlock()
		if i != nil {
			i.close()
		}
		f.worker.trimPooled()
	})
}

// drop closes the prepared instance and says whether there was one.
func (f *function) drop() bool {
	f.mu.Lock()
	i := f.ready
	f.ready = nil
	f.mu.Unlock()
	if i == nil {
		return false
	}
	i.close()
	return true
}

// pooled is how much the prepared instance holds, and when f was used last.
func (f *function) pooled() (bytes uint64, have bool, lastUse time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ready == nil {
		return 0, false, f.lastUse
	}
	return f.ready.memory.committed, true, f.lastUse
}

// close waits for users of the object and gives everything back.
func (f *function) close(ctx context.Context) error {
	f.mu.Lock()
	if !f.closing {
		f.closing = true
		if f.users == 0 {
			close(f.idle)
		}
	}
	f.mu.Unlock()
	f.drop()
	select {
	case <-f.idle:
	case <-ctx.Done():
		return fmt.Errorf("unload %s: %w", f.spec.Name, ctx.Err())
	}
	f.drop()
	return f.worker.dropObject(ctx, f.object)
}
