package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

// function is a name that requests can come for.
type function struct {
	name, tenant string
	limiter      limiter
	// rate is its tenant's, shared with the tenant's other functions; nil for
	// what only leads elsewhere.
	rate *rate

	requests, failures atomic.Uint64

	// serving answers requests, wanted is the newest of the State; they are
	// the same when all is well. Written under Engine.mu, serving is read
	// without it by every request.
	serving atomic.Pointer[revision]
	wanted  *revision
	// elsewhere is never nil once the function is in Engine.functions.
	elsewhere atomic.Pointer[elsewhere]
	// forwarding counts requests on their way to peers.
	forwarding atomic.Int64
	// invalid says why the State's entry cannot be used, wanted is then nil.
	invalid *v1alpha1.FunctionError
	number  int // revision number of the entry that is invalid
}

// revision is one load of a function's object into a worker. Loading the same
// object again makes another one.
type revision struct {
	spec     control.Function
	key      string
	worker   *process
	function *function

	mu       sync.Mutex
	conn     *incarnation // where it is loaded, nil while it is not
	changed  chan struct{}
	progress v1alpha1.RevisionProgress
	phases   []v1alpha1.Phase
	failure  *v1alpha1.FunctionError
	loading  bool
	crashes  int // of the worker while this was being loaded
	notUntil time.Time
	users    int
	retired  bool
	drained  chan struct{} // closed when retired and users is 0
}

var (
	errRetired  = errors.New("the revision was replaced")
	errNotReady = errors.New("the worker is not ready")
)

func newRevision(spec control.Function, f *function, w *process, n uint64) *revision {
	return &revision{
		spec: spec, function: f, worker: w,
		key:      spec.Name + "@" + strconv.Itoa(spec.Revision) + "#" + strconv.FormatUint(n, 10),
		changed:  make(chan struct{}),
		progress: v1alpha1.ProgressLoading,
		drained:  make(chan struct{}),
	}
}

func (r *revision) broadcast() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// acquire gives the worker to send a request to and keeps the revision loaded
// until release. It waits at most wait for a worker that is being restarted.
// After an error there is nothing to release.
func (r *revision) acquire(ctx context.Context, wait time.Duration) (*incarnation, error) {
	r.mu.Lock()
	if r.retired {
		r.mu.Unlock()
		return nil, errRetired
	}
	r.users++
	conn, changed := r.conn, r.changed
	r.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	conn, err := r.await(ctx, changed, wait)
	if err != nil {
		r.release()
	}
	return conn, err
}

// loaded says whether a worker has it at this moment.
func (r *revision) loaded() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conn != nil
}

// again waits for another worker after the given one failed. The caller still
// holds the revision.
func (r *revision) again(ctx context.Context, failed *incarnation, wait time.Duration) (*incarnation, error) {
	// The process's end is noticed from elsewhere, a moment later.
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-failed.dead:
	case <-t.C:
		return nil, errNotReady
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	conn, changed := r.conn, r.changed
	r.mu.Unlock()
	if conn != nil && conn != failed {
		return conn, nil
	}
	return r.await(ctx, changed, wait)
}

func (r *revision) await(ctx context.Context, changed <-chan struct{}, wait time.Duration) (*incarnation, error) {
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		select {
		case <-changed:
		case <-t.C:
			return nil, errNotReady
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		r.mu.Lock()
		conn, failure := r.conn, r.failure
		changed = r.changed
		r.mu.Unlock()
		if conn != nil && !conn.isDead() {
			return conn, nil
		}
		if failure != nil {
			return nil, errNotReady
		}
	}
}

func (r *revision) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.users--
	if r.retired && r.users == 0 {
		close(r.drained)
	}
}

// retire stops new requests; drained is closed when the last one ended.
func (r *revision) retire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.retired {
		return
	}
	r.retired = true
	if r.users == 0 {
		close(r.drained)
	}
}

// lost forgets the worker when it died.
func (r *revision) lost(conn *incarnation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == conn {
		r.conn = nil
		r.broadcast()
	}
}

func sameSpec(a, b control.Function) bool {
	return a.Name == b.Name && a.Tenant == b.Tenant && a.Revision == b.Revision &&
		a.ObjectDir == b.ObjectDir && a.Object == b.Object && a.MemoryMiB == b.MemoryMiB &&
		a.TimeoutMS == b.TimeoutMS && a.Concurrency == b.Concurrency &&
		maps.Equal(a.Env, b.Env) && maps.Equal(a.Secrets, b.Secrets)
}

// checkSpec refuses what would be dangerous or senseless to act on. The agent
// checked all of it; this side does not depend on that.
func checkSpec(f control.Function) error {
	within := func(what string, v, least, most int) error {
		if v < least || v > most {
			return fmt.Errorf("%s %d is not between %d and %d", what, v, least, most)
		}
		return nil
	}
	switch {
	case !validLabel(f.Name):
		return fmt.Errorf("the name %q is not a DNS label", f.Name)
	case !validLabel(f.Tenant):
		return fmt.Errorf("the tenant %q is not a DNS label", f.Tenant)
	case !filepath.IsAbs(f.ObjectDir):
		return fmt.Errorf("the object directory %q is not an absolute path", f.ObjectDir)
	case f.Revision < 1:
		return fmt.Errorf("the revision %d is not positive", f.Revision)
	}
	return errors.Join(
		within("memory limit (MiB)", f.MemoryMiB, v1alpha1.MinMemoryMiB, v1alpha1.MaxMemoryMiB),
		within("timeout (ms)", f.TimeoutMS, v1alpha1.MinTimeoutMS, v1alpha1.MaxTimeoutMS),
		within("concurrency", f.Concurrency, v1alpha1.MinConcurrency, v1alpha1.MaxConcurrency),
	)
}
