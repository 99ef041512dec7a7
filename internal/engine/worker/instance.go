package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// instance is a module's instance that has not run yet, runs, or is closed:
// it serves one request.
type instance struct {
	module api.Module
	memory *linearMemory
	// initialize is the module's start section as lowering exports it, nil
	// where there was none.
	initialize, start api.Function

	// mu closes the race of a late timer with close: the kill global lives in
	// memory that close gives back.
	mu     sync.Mutex
	kill   api.MutableGlobal
	closed bool
}

// newInstance makes an instance without running any of its code. Errors are
// errNoRoom, errOverLimit or the engine's own.
func newInstance(ctx context.Context, object *object, b *budget, limit uint64) (i *instance, err error) {
	memory := &linearMemory{budget: b, limit: limit}
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(error)
			if !ok || !errors.Is(e, errNoRoom) && !errors.Is(e, errOverLimit) {
				e = fmt.Errorf("instantiate: %v", r)
			}
			i, err = nil, e
		}
		if err != nil {
			memory.Free()
		}
	}()
	module, err := object.Runtime.InstantiateModule(
		experimental.WithMemoryAllocator(ctx, memory), object.Module,
		wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		return nil, fmt.Errorf("instantiate: %w", err)
	}
	i = &instance{
		module:     module,
		memory:     memory,
		initialize: module.ExportedFunction(wasm.ExportStart),
		start:      module.ExportedFunction("_start"),
	}
	var ok bool
	if i.kill, ok = module.ExportedGlobal(wasm.ExportKill).(api.MutableGlobal); !ok || i.start == nil {
		_ = module.Close(ctx)
		return nil, fmt.Errorf("instantiate: the module was not made by this version's compiler")
	}
	return i, nil
}

// run runs the guest to its end. ctx carries its process.
func (i *instance) run(ctx context.Context) error {
	if i.initialize != nil {
		if err := i.initialize.CallWithStack(ctx, nil); err != nil {
			return err
		}
	}
	return i.start.CallWithStack(ctx, nil)
}

// stop makes the guest trap at its next check, at most a few milliseconds
// away. It may be called at any time and from anywhere.
func (i *instance) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.closed {
		i.kill.Set(1)
	}
}

// close gives back all the instance holds. run must have returned.
func (i *instance) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return
	}
	i.closed = true
	_ = i.module.Close(context.Background()) // only a file system could fail
	i.memory.Free()
}
