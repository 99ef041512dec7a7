package precompile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// LoadOptions are the settings of [Load].
type LoadOptions struct {
	// MemoryLimitPages bounds linear memory, in pages of 64 KiB; 0 means the
	// most any function may have.
	MemoryLimitPages uint32
}

// Loaded is an object in memory, ready to be instantiated.
type Loaded struct {
	// Runtime is this object's own: the host's modules are instantiated in
	// it as well, and Module must not be used in another one.
	Runtime  wazero.Runtime
	Module   wazero.CompiledModule
	Manifest Manifest
	// Timings has one entry, "load".
	Timings []v1alpha1.Phase

	cache wazero.CompilationCache
}

// Load reads an object into a runtime of its own and never compiles. It needs
// no more than to read objectDir, verifies every byte of it first, and keeps
// no file open.
//
// An error that wraps ErrUnusable means that the object must be made again:
// it is missing, damaged or made for another target. An *Error with
// CodeMemoryOverLimit means that it starts with more memory than allowed.
func Load(ctx context.Context, objectDir string, o LoadOptions) (*Loaded, error) {
	start := time.Now()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if o.MemoryLimitPages == 0 {
		o.MemoryLimitPages = maxMemoryPages
	}
	m, module, err := verifyObject(objectDir, CurrentTarget())
	if err != nil {
		return nil, unusable(objectDir, err)
	}
	if m.MemoryMinPages > uint64(o.MemoryLimitPages) {
		return nil, &Error{Code: CodeMemoryOverLimit, Detail: fmt.Sprintf("the module starts with %d pages of memory, more than the %d allowed", m.MemoryMinPages, o.MemoryLimitPages)}
	}
	l := &Loaded{Manifest: *m}
	if err := loadCode(ctx, l, objectDir, module, o.MemoryLimitPages); err != nil {
		return nil, unusable(objectDir, err)
	}
	l.Timings = []v1alpha1.Phase{phase("load", start)}
	return l, nil
}

// loadCode has the engine take the code of a verified object from its cache.
func loadCode(ctx context.Context, l *Loaded, objectDir string, module []byte, memoryLimitPages uint32) error {
	cache, err := wazero.NewCompilationCacheWithDir(filepath.Join(objectDir, codeDirectory))
	if err != nil {
		return err
	}
	l.cache = cache
	l.Runtime = wazero.NewRuntimeWithConfig(ctx, runtimeConfig(cache, memoryLimitPages))
	// With an ended context and two workers the engine stops before the first
	// function if it has to compile; finding the code in its cache it does
	// not ask. So a miss is this error, never a second of silent compiling
	// and then a failure to write.
	ended, cancel := context.WithCancel(ctx)
	cancel()
	l.Module, err = compileCached(experimental.WithCompilationWorkers(ended, minCompilationWorkers), l.Runtime, module)
	if err == nil {
		return nil
	}
	_ = l.Close(ctx)
	if errors.Is(err, context.Canceled) {
		err = errors.New("the engine does not find its code")
	}
	return err
}

// compileCached turns a panic of the engine over code it cannot read into an
// error: the digests matched, but a reader must not die of it.
func compileCached(ctx context.Context, r wazero.Runtime, module []byte) (c wazero.CompiledModule, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the engine failed: %v", p)
		}
	}()
	return r.CompileModule(ctx, module)
}

func unusable(objectDir string, err error) error {
	return fmt.Errorf("%w: %s: %s", ErrUnusable, filepath.Base(objectDir), strings.TrimSpace(err.Error()))
}

// Close frees the runtime with all its instances, and the code. No call into
// a guest may be running.
func (l *Loaded) Close(ctx context.Context) error {
	return errors.Join(l.Runtime.Close(ctx), l.cache.Close(ctx))
}
