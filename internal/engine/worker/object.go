package worker

import (
	"context"
	"fmt"

	"github.com/hearth-sh/hearth/internal/engine/wasip1"
	"github.com/hearth-sh/hearth/internal/precompile"
)

// object is a compiled object in memory with its host module. Functions and
// revisions of the same object share it: their instances have nothing in
// common but code that cannot change, their limits are the allocator's, and a
// change of settings costs no load. All of them belong to the worker's tenant.
type object struct {
	*precompile.Loaded
	dir   string
	users int // under Worker.mu

	ready chan struct{} // closed when Loaded or err is set
	err   error
}

// useObject loads the object in dir, or joins those that use it. The caller
// gives it back with dropObject.
func (w *Worker) useObject(ctx context.Context, dir string) (*object, error) {
	w.mu.Lock()
	o := w.objects[dir]
	if o != nil {
		o.users++
		w.mu.Unlock()
		<-o.ready // whoever loads it is bound by the engine's time for a load
		if o.err != nil {
			return nil, o.err
		}
		return o, nil
	}
	o = &object{dir: dir, users: 1, ready: make(chan struct{})}
	w.objects[dir] = o
	w.mu.Unlock()
	defer close(o.ready)
	if o.Loaded, o.err = loadObject(ctx, dir); o.err != nil {
		w.mu.Lock()
		delete(w.objects, dir) // the next one tries again
		w.mu.Unlock()
		return nil, o.err
	}
	return o, nil
}

func loadObject(ctx context.Context, dir string) (*precompile.Loaded, error) {
	loaded, err := precompile.Load(ctx, dir, precompile.LoadOptions{MemoryLimitPages: memoryLimitPages})
	if err != nil {
		return nil, fmt.Errorf("load the compiled object: %w", err)
	}
	if err := wasip1.Instantiate(ctx, loaded.Runtime, loaded.Module); err != nil {
		_ = loaded.Close(context.WithoutCancel(ctx)) // the first error says it
		return nil, fmt.Errorf("make the host module: %w", err)
	}
	return loaded, nil
}

// dropObject gives up one use of o; the last one frees it. No instance of the
// caller's may be left.
func (w *Worker) dropObject(ctx context.Context, o *object) error {
	w.mu.Lock()
	o.users--
	last := o.users == 0
	if last {
		delete(w.objects, o.dir)
	}
	w.mu.Unlock()
	if !last {
		return nil
	}
	return o.Close(ctx)
}
