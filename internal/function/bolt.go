package function

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// DefaultLockTimeout is how long OpenBolt waits for the file's lock: a
	// predecessor that was just told to stop needs a moment, a second instance
	// would wait forever.
	DefaultLockTimeout = 2 * time.Second
	// boltFormat is the version of what is in the buckets.
	boltFormat = 1
	// retiredFor is how long the last revision number of a deleted function is
	// remembered. A node that has not looked for that long has long lost what
	// it knew of the old revisions.
	retiredFor = 30 * 24 * time.Hour
)

// Buckets. Keys of revisions are "<name>/<big-endian uint32>": a name has no
// slash, so a prefix scan yields one function's revisions in order.
var (
	bucketMeta      = []byte("meta")
	bucketFunctions = []byte("functions")
	bucketRevisions = []byte("revisions")
	bucketRetired   = []byte("retired")
	bucketRequests  = []byte("requests")
	bucketExpiry    = []byte("requests-by-time")
	allBuckets      = [][]byte{bucketMeta, bucketFunctions, bucketRevisions, bucketRetired, bucketRequests, bucketExpiry}

	keyFormat     = []byte("format")
	keyGeneration = []byte("generation")
)

// BoltOptions of a Bolt store. The zero value is good.
type BoltOptions struct {
	// LockTimeout bounds the wait for another process to let the file go;
	// 0 means DefaultLockTimeout.
	LockTimeout time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Logger gets what goes wrong without failing a call; nil discards it.
	Logger *slog.Logger
}

// Bolt is a Store in one bbolt file, which one process has open at a time.
// It takes in the reports of one node.
//
// Everything that readers need, bar old revisions, is also in memory, so that
// reading costs no decoding. Memory changes only after the transaction
// committed.
type Bolt struct {
	db  *bbolt.DB
	now func() time.Time
	log *slog.Logger

	// writing serialises changes from the look at what is to the update of
	// memory: without it two writers could both pass their precondition.
	writing sync.Mutex

	// mu guards what follows. It is never held during disk access.
	mu         sync.RWMutex
	closed     bool
	generation uint64
	entries    map[string]*entry
	names      []string // sorted keys of entries
	snapshot   *v1alpha1.Desired
	// changed is closed and replaced at every change, to wake waiters.
	changed chan struct{}
	// held are the idempotency keys of requests in progress in this process,
	// with their fingerprints. It lives in memory only: the file's lock means
	// no other process has any, so after a restart none is held.
	held map[string]string
	// requests counts the records in bucketRequests.
	requests int
}

// entry is one function in memory. It is replaced, never modified.
type entry struct {
	rec     functionRecord
	fn      Function
	desired v1alpha1.DesiredFunction
}

type functionRecord struct {
	// UID tells a function from an earlier one of that name.
	UID        string    `json:"uid"`
	Tenant     string    `json:"tenant"`
	CreatedAt  time.Time `json:"createdAt"`
	UpdatedAt  time.Time `json:"updatedAt"`
	Wanted     int       `json:"wanted"`
	Active     int       `json:"active"`
	LastActive int       `json:"lastActive"`
	// Newest is the highest revision number ever given.
	Newest int `json:"newest"`
	// Config counts changes of what is wanted.
	Config uint64 `json:"config"`
	// Since is the generation that first had the wanted revision. Older
	// reports cannot know of it.
	Since uint64 `json:"since"`
}

type revisionRecord struct {
	Number       int                           `json:"number"`
	ModuleDigest string                        `json:"moduleDigest"`
	SizeBytes    int64                         `json:"sizeBytes"`
	MemoryMin    uint32                        `json:"memoryMinPages,omitempty"`
	Artifact     v1alpha1.Artifact             `json:"artifact"`
	MemoryMiB    int                           `json:"memoryMiB"`
	TimeoutMS    int                           `json:"timeoutMs"`
	Concurrency  int                           `json:"concurrency"`
	Env          map[string]string             `json:"env,omitempty"`
	Secrets      map[string]string             `json:"secrets,omitempty"`
	Runtime      v1alpha1.FunctionRuntime      `json:"runtime,omitempty"`
	Host         string                        `json:"host,omitempty"`
	Routes       []string                      `json:"routes,omitempty"`
	Placement    *v1alpha1.FunctionPlacement   `json:"placement,omitempty"`
	Autoscaling  *v1alpha1.FunctionAutoscaling `json:"autoscaling,omitempty"`
	CreatedAt    time.Time                     `json:"createdAt"`
	Phases       []v1alpha1.Phase              `json:"phases,omitempty"`
	NodePhases   []v1alpha1.Phase              `json:"nodePhases,omitempty"`
	State        v1alpha1.FunctionState        `json:"state"`
	Error        *v1alpha1.FunctionError       `json:"error,omitempty"`
	Retrying     bool                          `json:"retrying,omitempty"`
	ActivatedAt  time.Time                     `json:"activatedAt,omitzero"`
}

type retiredRecord struct {
	Newest int       `json:"newest"`
	At     time.Time `json:"at"`
}

// OpenBolt opens the store at path, creating it (mode 0600) and its directory
// (0700) when missing, and checks that the file is whole. Errors match
// ErrLocked, ErrCorrupt, ErrFormat, ErrReadOnly or ErrDiskFull.
func OpenBolt(path string, o BoltOptions) (*Bolt, error) {
	s := &Bolt{
		now:     o.Now,
		log:     o.Logger,
		changed: make(chan struct{}),
		held:    map[string]string{},
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	timeout := cmp.Or(o.LockTimeout, DefaultLockTimeout)
	if err := s.open(path, timeout); err != nil {
		if errors.Is(err, ErrLocked) {
			err = fmt.Errorf("%w; stop the other process or choose another data directory", err)
		}
		if errors.Is(err, ErrCorrupt) {
			err = fmt.Errorf("%w; restore the file from a backup, or move it away to start empty", err)
		}
		return nil, err
	}
	return s, nil
}

func (s *Bolt) open(path string, timeout time.Duration) (err error) {
	doing := "open function database " + path
	if err := create(path, timeout); err != nil {
		return storeError(doing, err)
	}
	defer func() {
		if err != nil && s.db != nil {
			_ = s.db.Close()
		}
	}()
	err = guard(doing, func() error {
		var err error
		s.db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: timeout})
		if err != nil {
			return err
		}
		if err := checkFile(s.db, path); err != nil {
			return err
		}
		return s.db.Update(func(tx *bbolt.Tx) error {
			for _, b := range allBuckets {
				if _, err := tx.CreateBucketIfNotExists(b); err != nil {
					return err
				}
			}
			meta := tx.Bucket(bucketMeta)
			switch format := meta.Get(keyFormat); {
			case format == nil:
				if err := meta.Put(keyFormat, itob(boltFormat)); err != nil {
					return err
				}
			case len(format) != 8:
				return ErrCorrupt
			case binary.BigEndian.Uint64(format) > boltFormat:
				return ErrFormat
			}
			if err := pruneRetired(tx, s.now()); err != nil {
				return err
			}
			_, err := pruneRequests(tx, s.now(), 0)
			return err
		})
	})
	if err != nil {
		return err
	}
	return s.reload()
}

// create makes a new database whole before it gets its name. bbolt writes
// its first pages in place; a crash in between would leave a file that is
// neither empty nor a database. It does not sync the directory either.
func create(path string, timeout time.Duration) error {
	if info, err := os.Stat(path); err == nil && info.Size() > 0 {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-"+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	temp := f.Name()
	defer func() { _ = os.Remove(temp) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := bbolt.Open(temp, 0o600, &bbolt.Options{Timeout: timeout})
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // an empty file is in the way
	}
	// Link, not rename: when two processes start at once the second must not
	// replace the file that the first has already opened.
	if err := os.Link(temp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// checkFile looks for damage that bbolt itself only meets, as a panic or a
// bus error, when it happens to read there.
func checkFile(db *bbolt.DB, path string) error {
	return db.View(func(tx *bbolt.Tx) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if info.Size() < tx.Size() {
			return fmt.Errorf("%w: the file has %d bytes, should have at least %d", ErrCorrupt, info.Size(), tx.Size())
		}
		var first error
		for err := range tx.Check() { // the channel must be drained
			if first == nil {
				first = fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
		}
		return first
	})
}

// guard runs f and turns what bbolt does on a damaged file, panic or fault on
// the mapped pages, into ErrCorrupt.
func guard(doing string, f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %w: %v", doing, ErrCorrupt, p)
		}
	}()
	return storeError(doing, f())
}

// Close waits for writers, ends waits with ErrClosed and lets the file go.
func (s *Bolt) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.wake()
	s.mu.Unlock()
	return storeError("close function database", s.db.Close())
}

// wake needs s.mu.
func (s *Bolt) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// reload reads everything from the file into memory.
func (s *Bolt) reload() error {
	entries := map[string]*entry{}
	var generation uint64
	requests := 0
	err := guard("read function database", func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			if g := tx.Bucket(bucketMeta).Get(keyGeneration); len(g) == 8 {
				generation = binary.BigEndian.Uint64(g)
			}
			requests = tx.Bucket(bucketRequests).Stats().KeyN
			return tx.Bucket(bucketFunctions).ForEach(func(k, v []byte) error {
				var rec functionRecord
				if err := json.Unmarshal(v, &rec); err != nil {
					return fmt.Errorf("%w: function %q: %w", ErrCorrupt, k, err)
				}
				revs, err := readRevisions(tx, string(k))
				if err != nil {
					return err
				}
				e, err := newEntry(string(k), rec, revs)
				if err != nil {
					return err
				}
				entries[string(k)] = e
				return nil
			})
		})
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entries, s.requests = entries, requests
	s.names = slices.Sorted(maps.Keys(entries))
	// Generation 0 is what a node asks with that knows nothing yet.
	s.generation = max(generation, 1, s.generation)
	s.snapshot = nil
	s.wake()
	return nil
}

// Get implements Reader.
func (s *Bolt) Get(ctx context.Context, name string) (Function, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e, err := s.lookup(ctx, name)
	if err != nil {
		return Function{}, err
	}
	return e.fn, nil
}

// lookup needs s.mu.
func (s *Bolt) lookup(ctx context.Context, name string) (*entry, error) {
	if s.closed {
		return nil, ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := s.entries[name]
	if e == nil {
		return nil, ErrNotFound
	}
	return e, nil
}

// List implements Reader.
func (s *Bolt) List(ctx context.Context, o ListOptions) (Page, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return Page{}, ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return Page{}, err
	}
	return PageOf(s.names, o, func(name string) *Function { return &s.entries[name].fn }), nil
}

// Stats implements Reader.
func (s *Bolt) Stats(ctx context.Context) (Stats, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return Stats{}, ErrClosed
	}
	st := Stats{ByState: map[v1alpha1.FunctionState]int{}}
	for _, e := range s.entries {
		st.ByState[e.fn.Revision.State]++
	}
	return st, ctx.Err()
}

// Revisions implements Reader.
func (s *Bolt) Revisions(ctx context.Context, name string) ([]Revision, error) {
	s.writing.Lock() // memory and file must be of one moment
	defer s.writing.Unlock()
	f, err := s.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	revs, err := s.viewRevisions(name)
	if err != nil {
		return nil, err
	}
	slices.Reverse(revs)
	for i := range revs {
		if revs[i].Number == f.Wanted {
			revs[i] = f.Revision // memory also has what was not worth a write
		}
	}
	return revs, nil
}

func (s *Bolt) viewRevisions(name string) (revs []Revision, err error) {
	err = guard("read revisions of "+name, func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			revs, err = readRevisions(tx, name)
			return err
		})
	})
	return revs, err
}

// Watch implements Reader.
func (s *Bolt) Watch(ctx context.Context, name, etag string) (Function, error) {
	for {
		s.mu.RLock()
		changed := s.changed
		e, err := s.lookup(ctx, name)
		s.mu.RUnlock()
		if err != nil {
			return Function{}, err
		}
		if e.fn.ETag != etag {
			return e.fn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Function{}, ctx.Err()
		}
	}
}

// Desired implements NodeSource.
func (s *Bolt) Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error) {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return v1alpha1.Desired{}, ErrClosed
		}
		changed := s.changed
		if s.generation != after {
			if s.snapshot == nil {
				d := v1alpha1.Desired{Generation: s.generation, Functions: make([]v1alpha1.DesiredFunction, 0, len(s.names))}
				for _, name := range s.names {
					d.Functions = append(d.Functions, s.entries[name].desired)
				}
				s.snapshot = &d
			}
			d := *s.snapshot
			s.mu.Unlock()
			return d, nil
		}
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return v1alpha1.Desired{}, ctx.Err()
		}
	}
}

// AddRevision implements Writer.
func (s *Bolt) AddRevision(ctx context.Context, name string, c Change, build func(*Function) (NewRevision, error)) (Result, error) {
	if err := ValidateName(name); err != nil {
		return Result{}, err
	}
	if c.Tenant != "" {
		if err := ValidateTenant(c.Tenant); err != nil {
			return Result{}, err
		}
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	old, err := s.admit(ctx, name, c)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Result{}, err
	}
	var current *Function
	if old != nil {
		f := old.fn
		current = &f
	}
	nr, err := build(current)
	if err != nil {
		return Result{}, err
	}
	if err := nr.Settings.Validate(); err != nil {
		return Result{}, err
	}
	if old != nil {
		w := old.fn.Revision
		if w.ModuleDigest == nr.ModuleDigest && w.Settings.Equal(nr.Settings) && w.State != v1alpha1.StateFailed {
			if err := s.recordOutcome(c.IdempotencyKey, Outcome{Name: name, Revision: w.Number}); err != nil {
				return Result{}, err
			}
			return Result{Function: old.fn, Unchanged: true}, nil
		}
	}

	started := time.Now()
	now := s.now().UTC()
	rec := functionRecord{UID: newUID(), Tenant: cmp.Or(c.Tenant, v1alpha1.DefaultTenant), CreatedAt: now}
	if old != nil {
		rec = old.rec
	}
	var made *entry
	err = s.update("record revision of "+name, c.IdempotencyKey, func(tx *bbolt.Tx, m *mutation) error {
		if old == nil {
			var err error
			if rec.Newest, err = retiredNumber(tx, name); err != nil {
				return err
			}
		}
		revs, err := readRevisions(tx, name)
		if err != nil {
			return err
		}
		rec.Newest++
		rec.Wanted = rec.Newest
		rec.UpdatedAt = now
		rec.Config++
		revs = append(revs, Revision{
			Number:         rec.Newest,
			ModuleDigest:   nr.ModuleDigest,
			SizeBytes:      nr.SizeBytes,
			MemoryMinPages: nr.MemoryMinPages,
			Artifact:       nr.Artifact,
			Settings:       nr.Settings,
			CreatedAt:      now,
			Phases:         slices.Clone(nr.Phases),
			State:          v1alpha1.StatePending,
		})
		if revs, err = pruneRevisions(tx, name, rec, revs); err != nil {
			return err
		}
		rec.Since = m.bump()
		if err := putRevision(tx, name, revs[len(revs)-1]); err != nil {
			return err
		}
		if err := putFunction(tx, name, rec); err != nil {
			return err
		}
		if made, err = newEntry(name, rec, revs); err != nil {
			return err
		}
		m.set[name] = made
		m.outcome = Outcome{Name: name, Revision: rec.Newest, Created: old == nil}
		// What the commit takes is known only after it; memory gets it, and
		// the file with the next change of state.
		m.committed = func() {
			f := &made.fn
			f.Revision.Phases = append(f.Revision.Phases, v1alpha1.Phase{
				Name: "record", Milliseconds: float64(time.Since(started).Microseconds()) / 1000,
			})
			f.ETag = NewETag(made.rec.configTag(), *f)
		}
		return nil
	})
	if err != nil {
		return Result{}, err
	}
	return Result{Function: made.fn, Created: old == nil}, nil
}

// Rollback implements Writer.
func (s *Bolt) Rollback(ctx context.Context, name string, to int, c Change) (Result, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	old, err := s.admit(ctx, name, c)
	if err != nil {
		return Result{}, err
	}
	revs, err := s.viewRevisions(name)
	if err != nil {
		return Result{}, err
	}
	i := slices.IndexFunc(revs, func(r Revision) bool { return r.Number == to })
	if to == 0 {
		for j := len(revs) - 1; j >= 0 && i < 0; j-- {
			if revs[j].Number < old.rec.Wanted && !revs[j].ActivatedAt.IsZero() {
				i = j
			}
		}
		if i < 0 {
			return Result{}, ErrNoRollbackTarget
		}
	}
	if i < 0 {
		return Result{}, fmt.Errorf("%w: %s has no revision %d", ErrRevisionNotFound, name, to)
	}
	to = revs[i].Number
	if to == old.rec.Wanted {
		if err := s.recordOutcome(c.IdempotencyKey, Outcome{Name: name, Revision: to}); err != nil {
			return Result{}, err
		}
		return Result{Function: old.fn, Unchanged: true}, nil
	}
	rec := old.rec
	var made *entry
	err = s.update("roll back "+name, c.IdempotencyKey, func(tx *bbolt.Tx, m *mutation) error {
		rec.Wanted = to
		rec.UpdatedAt = s.now().UTC()
		rec.Config++
		rec.Since = m.bump()
		r := &revs[i]
		r.State, r.Error, r.Retrying, r.NodePhases = v1alpha1.StatePending, nil, false, nil
		if rec.Active == to {
			r.State = v1alpha1.StateReady
		}
		if err := putRevision(tx, name, *r); err != nil {
			return err
		}
		if err := putFunction(tx, name, rec); err != nil {
			return err
		}
		if made, err = newEntry(name, rec, revs); err != nil {
			return err
		}
		m.set[name] = made
		m.outcome = Outcome{Name: name, Revision: to}
		return nil
	})
	if err != nil {
		return Result{}, err
	}
	return Result{Function: made.fn}, nil
}

// Delete implements Writer.
func (s *Bolt) Delete(ctx context.Context, name string, c Change) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	old, err := s.admit(ctx, name, c)
	if err != nil {
		return err
	}
	return s.update("delete "+name, c.IdempotencyKey, func(tx *bbolt.Tx, m *mutation) error {
		revs, err := readRevisions(tx, name)
		if err != nil {
			return err
		}
		for _, r := range revs {
			if err := tx.Bucket(bucketRevisions).Delete(revisionKey(name, r.Number)); err != nil {
				return err
			}
		}
		if err := tx.Bucket(bucketFunctions).Delete([]byte(name)); err != nil {
			return err
		}
		if err := put(tx, bucketRetired, []byte(name), retiredRecord{Newest: old.rec.Newest, At: s.now().UTC()}); err != nil {
			return err
		}
		m.bump()
		m.set[name] = nil
		m.outcome = Outcome{Name: name, Deleted: true}
		return nil
	})
}

// admit checks, under s.writing, what every change has in common. The error
// is ErrNotFound for a missing function when the precondition allows that.
func (s *Bolt) admit(ctx context.Context, name string, c Change) (*entry, error) {
	s.mu.RLock()
	old, err := s.lookup(ctx, name)
	s.mu.RUnlock()
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	var f *Function
	if old != nil {
		f = &old.fn
	}
	if refused := c.Admits(name, f); refused != nil {
		return nil, refused
	}
	return old, err
}

// SetProgress implements NodeSource.
func (s *Bolt) SetProgress(ctx context.Context, r v1alpha1.NodeReport) error {
	reported := make(map[string]*v1alpha1.FunctionReport, len(r.Functions))
	for i := range r.Functions {
		reported[r.Functions[i].Name] = &r.Functions[i]
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.RLock()
	if s.closed {
		s.mu.RUnlock()
		return ErrClosed
	}
	if err := ctx.Err(); err != nil {
		s.mu.RUnlock()
		return err
	}
	var passing []*entry // replaced in memory only
	type durableChange struct {
		e     *entry
		rec   functionRecord
		rev   Revision
		since time.Time // when rec.Active became so; zero: it did not change
	}
	var durable []durableChange
	for name, e := range s.entries {
		rec, rev, activated := progress(e, reported[name], r.Generation, s.now().UTC())
		was := e.fn.Revision
		switch {
		case rec.Active != e.rec.Active || rec.LastActive != e.rec.LastActive ||
			rev.State != was.State || rev.Retrying != was.Retrying || !reflect.DeepEqual(rev.Error, was.Error):
			durable = append(durable, durableChange{e, rec, rev, activated})
		case !slices.Equal(rev.NodePhases, was.NodePhases):
			ne := *e
			ne.fn.Revision = rev
			ne.fn.ETag = NewETag(rec.configTag(), ne.fn)
			passing = append(passing, &ne)
		}
	}
	s.mu.RUnlock()

	apply := func(m *mutation) {
		for _, e := range passing {
			m.set[e.fn.Name] = e
		}
	}
	if len(durable) == 0 {
		if len(passing) > 0 {
			m := &mutation{set: map[string]*entry{}, generation: s.generation}
			apply(m)
			s.commit(m)
		}
		return nil
	}
	return s.update("record progress", "", func(tx *bbolt.Tx, m *mutation) error {
		apply(m)
		for _, d := range durable {
			name := d.e.fn.Name
			if err := putRevision(tx, name, d.rev); err != nil {
				return err
			}
			revs, err := readRevisions(tx, name)
			if err != nil {
				return err
			}
			if !d.since.IsZero() && d.rec.Active != d.rec.Wanted {
				i := slices.IndexFunc(revs, func(r Revision) bool { return r.Number == d.rec.Active })
				if i < 0 {
					// The node serves what is not in the history (any more):
					// nothing can be said of it.
					d.rec.Active, d.rec.LastActive = d.e.rec.Active, d.e.rec.LastActive
				} else {
					revs[i].ActivatedAt = d.since
					if err := putRevision(tx, name, revs[i]); err != nil {
						return err
					}
				}
			}
			if err := putFunction(tx, name, d.rec); err != nil {
				return err
			}
			e, err := newEntry(name, d.rec, revs)
			if err != nil {
				return err
			}
			if !reflect.DeepEqual(e.desired, d.e.desired) {
				m.bump()
			}
			m.set[name] = e
		}
		return nil
	})
}

// progress is what a report makes of an entry: its new record and wanted
// revision, and the time when another revision became active.
func progress(e *entry, r *v1alpha1.FunctionReport, generation uint64, now time.Time) (rec functionRecord, rev Revision, activated time.Time) {
	rec, rev = e.rec, e.fn.Revision
	if r == nil {
		if generation >= rec.Since {
			// The node knew of the function and does not have it.
			rec.Active = 0
			if rev.State == v1alpha1.StateReady {
				rev.State = v1alpha1.StatePending
			}
		}
		return rec, rev, activated
	}
	if r.Serving >= 0 && r.Serving <= rec.Newest {
		if r.Serving != rec.Active && r.Serving != 0 {
			activated = now
		}
		rec.Active = r.Serving
		if r.Serving != 0 {
			rec.LastActive = r.Serving
		}
	}
	serving := rec.Active == rec.Wanted
	if serving && !activated.IsZero() {
		rev.ActivatedAt = activated
	}
	if r.Revision != rec.Wanted {
		// The report is about another candidate: a snapshot from before, or
		// the one that is fallen back to. Only whether the wanted one serves is news.
		if !serving && rev.State == v1alpha1.StateReady {
			rev.State = v1alpha1.StatePending
		}
		return rec, rev, activated
	}
	// A node that loads a revision again (it was restarted, or rolled back to)
	// reports fewer steps than the one that made it ready.
	if len(r.Phases) > 0 && len(r.Phases) >= len(rev.NodePhases) {
		rev.NodePhases = slices.Clone(r.Phases)
	}
	switch {
	case serving:
		rev.State, rev.Error, rev.Retrying = v1alpha1.StateReady, nil, false
	case r.Progress == v1alpha1.ProgressFailed && !r.Retrying:
		rev.State, rev.Error, rev.Retrying = v1alpha1.StateFailed, cloneError(r.Error), false
		if rev.Error == nil {
			rev.Error = &v1alpha1.FunctionError{Code: "internal", Detail: "the node gave no reason"}
		}
	case r.Error != nil && r.Retrying:
		rev.State, rev.Error, rev.Retrying = v1alpha1.StatePending, cloneError(r.Error), true
	default:
		rev.State, rev.Error, rev.Retrying = v1alpha1.StatePending, nil, false
	}
	return rec, rev, activated
}

func cloneError(e *v1alpha1.FunctionError) *v1alpha1.FunctionError {
	if e == nil {
		return nil
	}
	c := *e
	return &c
}

// mutation collects what becomes of memory once a transaction committed.
type mutation struct {
	set        map[string]*entry // nil value: deleted
	generation uint64
	bumped     bool
	requests   int
	outcome    Outcome
	committed  func()
}

// bump gives the transaction a new generation, once.
func (m *mutation) bump() uint64 {
	if !m.bumped {
		m.generation++
		m.bumped = true
	}
	return m.generation
}

// update runs f in a durable transaction and then changes memory. It needs
// s.writing. With key set, m.outcome is recorded under it.
func (s *Bolt) update(doing, key string, f func(tx *bbolt.Tx, m *mutation) error) error {
	m := &mutation{set: map[string]*entry{}, generation: s.generation}
	ran := false
	err := guard(doing, func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			if err := f(tx, m); err != nil {
				return err
			}
			if m.bumped {
				if err := tx.Bucket(bucketMeta).Put(keyGeneration, itob(m.generation)); err != nil {
					return err
				}
			}
			if key != "" {
				n, err := s.putRequest(tx, key, requestRecord{Outcome: &m.outcome})
				if err != nil {
					return err
				}
				m.requests = n
			}
			ran = true
			return nil
		})
	})
	if err != nil {
		if ran && !s.isClosed() {
			// The commit itself failed. A failed last sync can leave the
			// transaction visible in the file; memory must say the same.
			if rerr := s.reload(); rerr != nil {
				s.log.Error("function database could not be read again after a failed write", "error", rerr)
			}
		}
		return err
	}
	if m.committed != nil {
		m.committed()
	}
	s.commit(m)
	return nil
}

func (s *Bolt) isClosed() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.closed
}

// commit puts a mutation into memory and wakes who waits.
func (s *Bolt) commit(m *mutation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests += m.requests
	if len(m.set) == 0 && !m.bumped {
		return
	}
	for name, e := range m.set {
		_, had := s.entries[name]
		i, _ := slices.BinarySearch(s.names, name)
		switch {
		case e == nil:
			delete(s.entries, name)
			if had {
				s.names = slices.Delete(s.names, i, i+1)
			}
		case !had:
			s.names = slices.Insert(s.names, i, name)
			fallthrough
		default:
			s.entries[name] = e
		}
	}
	if m.bumped {
		s.generation = m.generation
		s.snapshot = nil
	}
	s.wake()
}

// newEntry derives everything that memory holds of a function. revs is in
// ascending order.
func newEntry(name string, rec functionRecord, revs []Revision) (*entry, error) {
	i := slices.IndexFunc(revs, func(r Revision) bool { return r.Number == rec.Wanted })
	if i < 0 {
		return nil, fmt.Errorf("%w: function %s has no revision %d", ErrCorrupt, name, rec.Wanted)
	}
	fn := Function{
		Name: name, Tenant: rec.Tenant,
		CreatedAt: rec.CreatedAt, UpdatedAt: rec.UpdatedAt,
		Wanted: rec.Wanted, Active: rec.Active, LastActive: rec.LastActive,
		Revision: revs[i],
	}
	fn.ETag = NewETag(rec.configTag(), fn)
	return &entry{rec: rec, fn: fn, desired: NewDesired(fn, revs)}, nil
}

// configTag identifies what is wanted.
func (rec functionRecord) configTag() string { return fmt.Sprintf("%s.%d", rec.UID, rec.Config) }

func newUID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func itob(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func revisionKey(name string, number int) []byte {
	return binary.BigEndian.AppendUint32([]byte(name+"/"), uint32(number))
}

func put(tx *bbolt.Tx, bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put(key, data)
}

func putFunction(tx *bbolt.Tx, name string, rec functionRecord) error {
	return put(tx, bucketFunctions, []byte(name), rec)
}

func putRevision(tx *bbolt.Tx, name string, r Revision) error {
	return put(tx, bucketRevisions, revisionKey(name, r.Number), revisionRecord{
		Number: r.Number, ModuleDigest: r.ModuleDigest, SizeBytes: r.SizeBytes, MemoryMin: r.MemoryMinPages, Artifact: r.Artifact,
		MemoryMiB: r.Settings.MemoryMiB, TimeoutMS: r.Settings.TimeoutMS, Concurrency: r.Settings.Concurrency,
		Env: r.Settings.Env, Secrets: r.Settings.Secrets,
		Runtime: r.Settings.Runtime, Host: r.Settings.Host, Routes: r.Settings.Routes,
		Placement: r.Settings.Placement, Autoscaling: r.Settings.Autoscaling,
		CreatedAt: r.CreatedAt, Phases: r.Phases, NodePhases: r.NodePhases,
		State: r.State, Error: r.Error, Retrying: r.Retrying, ActivatedAt: r.ActivatedAt,
	})
}

// readRevisions returns a function's revisions in ascending order.
func readRevisions(tx *bbolt.Tx, name string) ([]Revision, error) {
	var revs []Revision
	prefix := []byte(name + "/")
	c := tx.Bucket(bucketRevisions).Cursor()
	for k, v := c.Seek(prefix); len(k) == len(prefix)+4 && string(k[:len(prefix)]) == string(prefix); k, v = c.Next() {
		var r revisionRecord
		if err := json.Unmarshal(v, &r); err != nil {
			return nil, fmt.Errorf("%w: revision %q: %w", ErrCorrupt, k, err)
		}
		revs = append(revs, Revision{
			Number: r.Number, ModuleDigest: r.ModuleDigest, SizeBytes: r.SizeBytes, MemoryMinPages: r.MemoryMin, Artifact: r.Artifact,
			Settings: Settings{
				MemoryMiB: r.MemoryMiB, TimeoutMS: r.TimeoutMS, Concurrency: r.Concurrency,
				Env: r.Env, Secrets: r.Secrets,
				Runtime: r.Runtime, Host: r.Host, Routes: r.Routes, Placement: r.Placement, Autoscaling: r.Autoscaling,
			},
			CreatedAt: r.CreatedAt, Phases: r.Phases, NodePhases: r.NodePhases,
			State: r.State, Error: r.Error, Retrying: r.Retrying, ActivatedAt: r.ActivatedAt,
		})
	}
	return revs, nil
}

// pruneRevisions drops the oldest revisions beyond MaxRevisions.
func pruneRevisions(tx *bbolt.Tx, name string, rec functionRecord, revs []Revision) ([]Revision, error) {
	for i := 0; len(revs) > MaxRevisions && i < len(revs); {
		if n := revs[i].Number; n == rec.Wanted || n == rec.Active || n == rec.LastActive {
			i++
			continue
		}
		if err := tx.Bucket(bucketRevisions).Delete(revisionKey(name, revs[i].Number)); err != nil {
			return nil, err
		}
		revs = slices.Delete(revs, i, i+1)
	}
	return revs, nil
}

// retiredNumber takes the last number of an earlier function of that name.
func retiredNumber(tx *bbolt.Tx, name string) (int, error) {
	b := tx.Bucket(bucketRetired)
	v := b.Get([]byte(name))
	if v == nil {
		return 0, nil
	}
	var r retiredRecord
	if err := json.Unmarshal(v, &r); err != nil {
		return 0, fmt.Errorf("%w: deleted function %q: %w", ErrCorrupt, name, err)
	}
	return r.Newest, b.Delete([]byte(name))
}

func pruneRetired(tx *bbolt.Tx, now time.Time) error {
	c := tx.Bucket(bucketRetired).Cursor()
	for k, v := c.First(); k != nil; {
		var r retiredRecord
		if json.Unmarshal(v, &r) == nil && now.Sub(r.At) < retiredFor {
			k, v = c.Next()
			continue
		}
		key := slices.Clone(k)
		if err := c.Delete(); err != nil {
			return err
		}
		k, v = c.Seek(key) // where deletion leaves a cursor is not defined
	}
	return nil
}
