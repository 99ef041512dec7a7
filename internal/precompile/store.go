package precompile

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Names below a store's directory.
const (
	objectsName    = "objects"
	imagesName     = "images"
	quarantineName = "quarantine"
	tmpName        = "tmp"
	lockName       = "lock"
)

// Modes of what is published: readers run under other accounts, and nothing
// in a store is secret. Only the owner can write.
const (
	directoryMode = 0o755
	fileMode      = 0o644
)

// maxQuarantined is how many damaged objects are kept for somebody to look
// at; older ones are deleted.
const maxQuarantined = 4

// StoreOptions are the settings of a [Store].
type StoreOptions struct {
	// Compiler makes what is missing; required.
	Compiler *Compiler
	// BudgetBytes bounds the objects' files together; 0 means no bound.
	BudgetBytes int64
	// Logger gets what is quarantined and evicted; default: slog.Default.
	Logger *slog.Logger
	// Registerer gets the metrics hearth_store_* and hearth_precompile_*;
	// nil means none.
	Registerer prometheus.Registerer
}

// Store is a directory of precompiled objects:
//
//	objects/<id>/manifest.json        see Manifest
//	objects/<id>/module.wasm          the lowered module
//	objects/<id>/code/wazero-…/<key>  its machine code, as the engine caches it
//	images/<digest>.json              which object an OCI image became
//	quarantine/                       what was found damaged or out of date
//	tmp/                              what is being made; emptied by Open
//	lock                              held by the one writer
//
// An object's id is the SHA-256 of the module as it was submitted. That is
// all a writer can vouch for: were it the digest of the lowered module, a
// module that takes over its compiler could publish its own code as that of
// another one.
//
// Everything is published by rename after it was made durable, so it is there
// whole or not at all; an image is recorded after its object. Whatever does
// not verify is a miss: it is moved to quarantine and made again. All methods
// are safe for concurrent use.
type Store struct {
	dir      string
	options  StoreOptions
	logger   *slog.Logger
	metrics  metrics
	lock     *os.File
	target   Target
	now      func() time.Time
	images   flights[ensured]
	compiles flights[ensured]

	// closing ends work that is still running when Close is called.
	closing context.Context
	close   context.CancelFunc

	// mu guards the index below and every rename and removal in objects and
	// images, so that nothing is evicted between its check and its use.
	mu      sync.Mutex
	objects map[string]*object
	index   map[string]string // image hex to object id
	// live are the images that must stay, nil before the first SetLive, when
	// nobody has said yet what may go.
	live map[string]bool
	// pinned counts the running Ensure calls that rely on an object.
	pinned map[string]int
	bytes  int64
	// quarantines numbers quarantined objects of this process.
	quarantines int
}

type object struct {
	size int64
	// usable is false for objects of another target, which are kept until
	// their space or name is needed.
	usable   bool
	lastUsed time.Time
}

// ObjectRef names an object of a store.
type ObjectRef struct {
	// ID is the object's name below objects/.
	ID string
	// Dir is its absolute directory, for [Load].
	Dir string
	// SizeBytes is that of its files.
	SizeBytes int64
}

// Usage says what a store holds.
type Usage struct {
	// Bytes are those of all objects, LiveBytes of those that live images
	// use; BudgetBytes is 0 without a budget.
	Bytes, LiveBytes, BudgetBytes int64
	Objects, Images, Quarantined  int
}

// ensured is what one execution of Ensure's work yields: phases for an image,
// the durations they come from for an object.
type ensured struct {
	ref              ObjectRef
	phases           []v1alpha1.Phase
	compiled, stored time.Duration
}

// ErrLocked is returned by Open when another process has the store.
var ErrLocked = errors.New("another process uses this store")

// Open opens the store in dir, creating it if needed, as its only writer. It
// removes what an earlier process left unfinished, and quarantines what is
// not as a store would have written it; neither is an error. Contents of
// files are verified when they are used.
func Open(dir string, o StoreOptions) (*Store, error) {
	if o.Compiler == nil {
		return nil, errors.New("a store needs a compiler")
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	s := &Store{
		dir: dir, options: o, logger: o.Logger, target: CurrentTarget(), now: time.Now,
		objects: map[string]*object{}, index: map[string]string{}, pinned: map[string]int{},
	}
	if err := os.MkdirAll(dir, directoryMode); err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	s.lock, err = os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	if err := lockFile(s.lock); err != nil {
		_ = s.lock.Close()
		return nil, fmt.Errorf("lock the store %s: %w", dir, err)
	}
	if s.metrics, err = newMetrics(o.Registerer, s.Usage); err != nil {
		_ = s.lock.Close()
		return nil, err
	}
	s.mu.Lock() // a scrape may come at any time from here on
	err = s.recover()
	s.mu.Unlock()
	if err != nil {
		s.metrics.unregister(o.Registerer)
		_ = s.lock.Close()
		return nil, fmt.Errorf("open the store: %w", err)
	}
	s.closing, s.close = context.WithCancel(context.Background())
	return s, nil
}

// lockPatience is how long Open waits for the lock. A writer that was killed
// while it started a child leaves the lock to that child until it executes
// its program, some milliseconds on a busy machine.
const lockPatience = 2 * time.Second

func lockFile(f *os.File) error {
	deadline := time.After(lockPatience)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-deadline:
			return ErrLocked
		case <-retry.C:
		}
	}
}

// Close waits for running work, which it cancels, and gives up the lock.
func (s *Store) Close() error {
	s.close()
	s.images.group.Wait()
	s.compiles.group.Wait()
	s.metrics.unregister(s.options.Registerer)
	return s.lock.Close() // closing releases the lock
}

func (s *Store) path(elements ...string) string {
	return filepath.Join(append([]string{s.dir}, elements...)...)
}

func (s *Store) ref(id string, size int64) ObjectRef {
	return ObjectRef{ID: id, Dir: s.path(objectsName, id), SizeBytes: size}
}

func imageFile(image string) string { return image + ".json" }

// recover reads the directory into the index.
func (s *Store) recover() error {
	for _, name := range []string{objectsName, imagesName, quarantineName, tmpName} {
		path := s.path(name)
		if info, err := os.Lstat(path); err == nil && !info.IsDir() {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(path, directoryMode); err != nil {
			return err
		}
		// Whatever the umask: readers have other accounts.
		if err := os.Chmod(path, directoryMode); err != nil {
			return err
		}
	}
	if err := os.Chmod(s.dir, directoryMode); err != nil {
		return err
	}
	leftovers, err := os.ReadDir(s.path(tmpName))
	if err != nil {
		return err
	}
	for _, e := range leftovers {
		if err := os.RemoveAll(s.path(tmpName, e.Name())); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(s.path(objectsName))
	if err != nil {
		return err
	}
	for _, e := range entries {
		size, usable, err := s.inspect(e)
		if err != nil {
			if err := s.moveToQuarantine(e.Name(), err.Error()); err != nil {
				return err
			}
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		s.objects[e.Name()] = &object{size: size, usable: usable, lastUsed: info.ModTime()}
		s.bytes += size
	}
	entries, err = os.ReadDir(s.path(imagesName))
	if err != nil {
		return err
	}
	for _, e := range entries {
		image, index, err := s.readImage(e.Name())
		if err == nil && s.objects[index] == nil {
			err = errors.New("its object is gone")
		}
		if err != nil {
			s.logger.Warn("image index removed from the store", "name", printable(e.Name(), 100), "reason", err)
			if err := os.RemoveAll(s.path(imagesName, e.Name())); err != nil {
				return err
			}
			continue
		}
		s.index[image] = index
	}
	return nil
}

// inspect checks an object's structure: cheap enough to do for all at start.
func (s *Store) inspect(e fs.DirEntry) (size int64, usable bool, err error) {
	if !e.IsDir() || !isHexDigest(e.Name()) {
		return 0, false, errors.New("not an object")
	}
	m, err := readManifest(s.path(objectsName, e.Name()))
	if err != nil {
		return 0, false, err
	}
	if m.Source.SHA256 != e.Name() {
		return 0, false, errors.New("manifest belongs to another object")
	}
	for _, f := range m.Files {
		info, err := os.Lstat(s.path(objectsName, e.Name(), filepath.FromSlash(f.Path)))
		if err != nil {
			return 0, false, err
		}
		if !info.Mode().IsRegular() || info.Size() != f.SizeBytes {
			return 0, false, fmt.Errorf("%s is not as the manifest says", f.Path)
		}
	}
	return m.sizeBytes(), m.Target == s.target, nil
}

func (s *Store) readImage(name string) (image, id string, err error) {
	image, ok := strings.CutSuffix(name, ".json")
	if !ok || !isHexDigest(image) {
		return "", "", errors.New("not an image index")
	}
	b, err := readSmall(s.path(imagesName, name), maxDocumentBytes)
	if err != nil {
		return "", "", err
	}
	var x imageIndex
	if err := unseal(b, &x); err != nil {
		return "", "", err
	}
	if x.Image != image {
		return "", "", errors.New("it belongs to another image")
	}
	return image, x.Objects[0], nil
}

// Object returns the object of an image if the store has one for this
// machine. It does not read files: Ensure verifies, and so does Load.
func (s *Store) Object(imageDigest string) (ObjectRef, bool) {
	image, err := parseDigest(imageDigest)
	if err != nil {
		return ObjectRef{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.index[image]
	o := s.objects[id]
	if o == nil || !o.usable {
		return ObjectRef{}, false
	}
	return s.ref(id, o.size), true
}

// Touch marks an image as used now, which decides what is evicted last.
func (s *Store) Touch(imageDigest string) {
	image, err := parseDigest(imageDigest)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touch(s.index[image])
}

// touch keeps the last use as the directory's time, where it survives a
// restart without a file of its own. Losing it costs nothing but order.
func (s *Store) touch(id string) {
	if o := s.objects[id]; o != nil {
		o.lastUsed = s.now()
		_ = os.Chtimes(s.path(objectsName, id), time.Time{}, o.lastUsed)
	}
}

// SetLive replaces the set of images that are never evicted. Until it is
// called for the first time nothing is.
func (s *Store) SetLive(imageDigests []string) {
	live := map[string]bool{}
	for _, d := range imageDigests {
		if image, err := parseDigest(d); err == nil {
			live[image] = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = live
}

// Usage says what the store holds now.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := Usage{Bytes: s.bytes, BudgetBytes: s.options.BudgetBytes, Objects: len(s.objects), Images: len(s.index)}
	for id := range s.liveObjects() {
		u.LiveBytes += s.objects[id].size
	}
	if entries, err := os.ReadDir(s.path(quarantineName)); err == nil {
		u.Quarantined = len(entries)
	}
	return u
}

// liveObjects are those that must not be evicted; mu is held.
func (s *Store) liveObjects() map[string]bool {
	live := map[string]bool{}
	for id, n := range s.pinned {
		if n > 0 && s.objects[id] != nil {
			live[id] = true
		}
	}
	for image, id := range s.index {
		if (s.live == nil || s.live[image]) && s.objects[id] != nil {
			live[id] = true
		}
	}
	return live
}

// Evict deletes the least recently used objects that are not live until the
// store is within its budget, or there are none left.
func (s *Store) Evict(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.options.BudgetBytes > 0 && s.bytes > s.options.BudgetBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		evicted, err := s.evictOne()
		if err != nil || !evicted {
			return err
		}
	}
	return nil
}

// makeRoom evicts for an object that is to come; mu is held. When live
// objects leave no room for it nothing is evicted.
func (s *Store) makeRoom(size int64) error {
	budget := s.options.BudgetBytes
	if budget <= 0 || s.bytes+size <= budget {
		return nil
	}
	var live int64
	for id := range s.liveObjects() {
		live += s.objects[id].size
	}
	if live+size > budget {
		return &Error{
			Code: CodeDiskFull,
			Detail: fmt.Sprintf("the store's budget of %d MiB has no room for %d MiB more: %d MiB are in use by functions; delete some or raise the budget",
				budget>>20, (size+1<<20-1)>>20, live>>20),
			Retryable: true,
		}
	}
	for s.bytes+size > budget {
		evicted, err := s.evictOne()
		if err != nil {
			return internalError(err, "evicting from the store")
		}
		if !evicted {
			return internalError(errors.New("nothing left to evict"), "evicting from the store")
		}
	}
	return nil
}

// evictOne deletes the least recently used object that is not live; mu is held.
func (s *Store) evictOne() (bool, error) {
	live := s.liveObjects()
	victim := ""
	for id, o := range s.objects {
		if live[id] {
			continue
		}
		if v := s.objects[victim]; v == nil || o.lastUsed.Before(v.lastUsed) || o.lastUsed.Equal(v.lastUsed) && id < victim {
			victim = id
		}
	}
	if victim == "" {
		return false, nil
	}
	size := s.objects[victim].size
	if err := s.forgetImages(victim); err != nil {
		return false, err
	}
	// Out of the way first: a half-deleted object would be found by its name.
	grave := s.path(tmpName, "evicted-"+victim)
	if err := os.Rename(s.path(objectsName, victim), grave); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	s.forget(victim)
	s.metrics.evictions.Inc()
	s.logger.Info("object evicted from the store", "object", victim, "bytes", size)
	return true, os.RemoveAll(grave)
}

func (s *Store) forget(id string) {
	if o := s.objects[id]; o != nil {
		s.bytes -= o.size
		delete(s.objects, id)
	}
}

// forgetImages removes the index entries of an object; mu is held.
func (s *Store) forgetImages(id string) error {
	for image, object := range s.index {
		if object != id {
			continue
		}
		if err := os.Remove(s.path(imagesName, imageFile(image))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(s.index, image)
	}
	return nil
}

// Quarantine takes an object out of use, for example because a reader could
// not load it. The next Ensure of its images compiles again. An object that
// is no longer there is no error.
func (s *Store) Quarantine(ref ObjectRef, reason string) error {
	if !isHexDigest(ref.ID) {
		return fmt.Errorf("%q is not an object", printable(ref.ID, 100))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.quarantine(ref.ID, reason)
}

// quarantine moves an object away and forgets it; mu is held.
func (s *Store) quarantine(id, reason string) error {
	if err := s.forgetImages(id); err != nil {
		return fmt.Errorf("quarantine object %s: %w", id, err)
	}
	if err := s.moveToQuarantine(id, reason); err != nil {
		return err
	}
	s.forget(id)
	return nil
}

// moveToQuarantine takes any entry of objects/; mu is held.
func (s *Store) moveToQuarantine(name, reason string) error {
	s.quarantines++
	// The time orders entries of all processes.
	destination := fmt.Sprintf("%d-%d-%.16s", s.now().UnixNano(), s.quarantines, name)
	err := os.Rename(s.path(objectsName, name), s.path(quarantineName, destination))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("quarantine object %s: %w", printable(name, 100), err)
	}
	s.metrics.quarantined.Inc()
	s.logger.Warn("object quarantined", "object", printable(name, 100), "reason", reason, "kept", s.path(quarantineName, destination))
	return s.pruneQuarantine(maxQuarantined)
}

// pruneQuarantine keeps the newest entries.
func (s *Store) pruneQuarantine(keep int) error {
	entries, err := os.ReadDir(s.path(quarantineName))
	if err != nil {
		return err
	}
	age := func(e fs.DirEntry) int64 { // 0, the oldest, for what is not ours
		stamp, _, _ := strings.Cut(e.Name(), "-")
		n, _ := strconv.ParseInt(stamp, 10, 64)
		return n
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int {
		return cmp.Or(cmp.Compare(age(b), age(a)), strings.Compare(b.Name(), a.Name()))
	})
	for i, e := range entries {
		if i < keep {
			continue
		}
		if err := os.RemoveAll(s.path(quarantineName, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Ensure returns the verified object of an image, made from its module if the
// store has none that is whole and made for this machine. module is called
// only then; the file it names is read, never changed or removed. Calls for
// one image share one execution, and so do images with the same module. The
// phases are "compile" and "store", none on a hit.
//
// Errors are an *Error, or those of ctx and of module, wrapped.
func (s *Store) Ensure(ctx context.Context, imageDigest string, module func(ctx context.Context) (path string, err error)) (ObjectRef, []v1alpha1.Phase, error) {
	image, err := parseDigest(imageDigest)
	if err != nil {
		return ObjectRef{}, nil, fmt.Errorf("ensure an image: %w", err)
	}
	e, err := s.images.do(ctx, image, func(ctx context.Context) (ensured, error) {
		ctx, cancel := s.untilClose(ctx)
		defer cancel()
		return s.ensureImage(ctx, image, module)
	}, func() {})
	return e.ref, e.phases, err
}

// untilClose also ends ctx when the store closes.
func (s *Store) untilClose(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.closing, cancel)
	return ctx, func() { stop(); cancel() }
}

func (s *Store) ensureImage(ctx context.Context, image string, module func(ctx context.Context) (string, error)) (ensured, error) {
	s.mu.Lock()
	id := s.index[image]
	s.mu.Unlock()
	if id != "" {
		if ref, ok, err := s.verified(id); err != nil || ok {
			if ok {
				s.metrics.hits.Inc()
			}
			return ensured{ref: ref}, err
		}
	}
	s.metrics.misses.Inc()
	path, err := module(ctx)
	if err != nil {
		return ensured{}, fmt.Errorf("get the module of image sha256:%s: %w", image, err)
	}
	file, err := os.Open(path)
	if err != nil {
		return ensured{}, internalError(err, "opening the module")
	}
	size, err := moduleSize(file)
	if err == nil {
		if id, err = digestOf(file, size); err != nil {
			err = internalError(err, "reading the module")
		}
	}
	if err != nil {
		_ = file.Close()
		return ensured{}, err
	}
	unpin := s.pin(id)
	defer unpin()
	e, err := s.compiles.do(ctx, id, func(ctx context.Context) (ensured, error) {
		ctx, cancel := s.untilClose(ctx)
		defer cancel()
		return s.ensureObject(ctx, id, file, size)
	}, func() { _ = file.Close() })
	if err != nil {
		return ensured{}, err
	}
	start := time.Now()
	if err := s.recordImage(image, id); err != nil {
		return ensured{}, err
	}
	e.stored += time.Since(start)
	var phases []v1alpha1.Phase
	if e.compiled > 0 {
		phases = []v1alpha1.Phase{
			{Name: "compile", Milliseconds: milliseconds(e.compiled)},
			{Name: "store", Milliseconds: milliseconds(e.stored)},
		}
	}
	return ensured{ref: e.ref, phases: phases}, nil
}

// pin keeps an object from eviction until the returned function is called.
func (s *Store) pin(id string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinned[id]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pinned[id]--; s.pinned[id] == 0 {
			delete(s.pinned, id)
		}
	}
}

// verified reads an object whole. One that does not verify is quarantined
// and not an error.
func (s *Store) verified(id string) (ObjectRef, bool, error) {
	unpin := s.pin(id)
	defer unpin()
	s.mu.Lock()
	known := s.objects[id] != nil
	s.mu.Unlock()
	if !known {
		return ObjectRef{}, false, nil
	}
	// Not under mu: this reads some ten megabytes.
	m, _, err := verifyObject(s.path(objectsName, id), s.target)
	if err == nil && m.Source.SHA256 != id {
		err = errors.New("manifest belongs to another object")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM) {
			// That says nothing about the object.
			return ObjectRef{}, false, internalError(err, "verifying an object")
		}
		if err := s.quarantine(id, err.Error()); err != nil {
			return ObjectRef{}, false, internalError(err, "replacing an object")
		}
		return ObjectRef{}, false, nil
	}
	s.touch(id)
	return s.ref(id, m.sizeBytes()), true, nil
}

// ensureObject compiles and publishes unless another image brought the same
// module before.
func (s *Store) ensureObject(ctx context.Context, id string, module *os.File, size int64) (ensured, error) {
	if ref, ok, err := s.verified(id); err != nil || ok {
		return ensured{ref: ref}, err
	}
	e, err := s.make(ctx, id, module, size)
	var full *Error
	if errors.As(err, &full) && full.Code == CodeDiskFull {
		// The next try finds what could be given up at once.
		s.mu.Lock()
		_ = s.pruneQuarantine(0)
		s.mu.Unlock()
	}
	return e, err
}

// make compiles a module and publishes the object.
func (s *Store) make(ctx context.Context, id string, module *os.File, size int64) (ensured, error) {
	work, err := os.MkdirTemp(s.path(tmpName), "object-*")
	if err != nil {
		return ensured{}, internalError(err, "preparing a compile")
	}
	defer os.RemoveAll(work)

	res, output, elapsed, err := s.compile(ctx, work, module, size)
	if err != nil {
		return ensured{}, err
	}
	s.metrics.observe("child", milliseconds(elapsed))
	for _, t := range res.Timings {
		s.metrics.observe(t.Name, t.Milliseconds)
	}
	start := time.Now()
	built := filepath.Join(work, "object")
	m, err := s.assemble(output, built, res, Source{SHA256: id, SizeBytes: size})
	if err != nil {
		return ensured{}, err
	}
	if err := ctx.Err(); err != nil {
		return ensured{}, err
	}
	if err := s.publish(built, id, m); err != nil {
		return ensured{}, err
	}
	stored := time.Since(start)
	s.metrics.observe("store", milliseconds(stored))
	return ensured{ref: s.ref(id, m.sizeBytes()), compiled: elapsed, stored: stored}, nil
}

// compile runs the child with an output directory of its own below work.
func (s *Store) compile(ctx context.Context, work string, module *os.File, size int64) (*result, string, time.Duration, error) {
	output := filepath.Join(work, "output")
	if err := os.Mkdir(output, 0o700); err != nil {
		return nil, "", 0, internalError(err, "preparing a compile")
	}
	if c := s.options.Compiler.credential(); c != nil {
		if err := os.Chown(output, int(c.Uid), int(c.Gid)); err != nil {
			return nil, "", 0, internalError(err, "preparing a compile")
		}
	}
	directory, err := os.Open(output)
	if err != nil {
		return nil, "", 0, internalError(err, "preparing a compile")
	}
	defer directory.Close()
	res, elapsed, err := s.options.Compiler.run(ctx, module, directory, request{
		Operation: operationCompile,
		SizeBytes: size,
		// The function's own limit was checked when it was submitted and is
		// applied when it is loaded; one object serves all.
		MemoryLimitPages: maxMemoryPages,
	})
	return res, output, elapsed, err
}

// assemble takes exactly the two files expected out of the child's directory
// into a new one, makes them ours and durable, and writes the manifest.
func (s *Store) assemble(output, built string, res *result, source Source) (*Manifest, error) {
	module, err := readSmall(filepath.Join(output, moduleFile), maxOutputFileBytes)
	if err != nil {
		return nil, badOutput(err)
	}
	sum := sha256.Sum256(module)
	code := s.target.codePath(module)
	m := &Manifest{
		Version: formatVersion,
		Target:  s.target,
		Source:  source,
		Files: []File{
			{Path: moduleFile, SHA256: hex.EncodeToString(sum[:]), SizeBytes: int64(len(module))},
			{Path: code},
		},
		MemoryMinPages: res.Module.MemoryMinPages,
		Functions:      res.Module.Functions,
		Timings:        res.Timings,
		CreatedAt:      s.now().UTC().Truncate(time.Millisecond),
	}
	codeDir := filepath.Dir(filepath.Join(built, filepath.FromSlash(code)))
	if err := makeDirectories(built, filepath.Join(built, codeDirectory), codeDir); err != nil {
		return nil, internalError(err, "storing the object")
	}
	for i := range m.Files {
		f := &m.Files[i]
		if err := adopt(filepath.Join(output, filepath.FromSlash(f.Path)), filepath.Join(built, filepath.FromSlash(f.Path)), f); err != nil {
			return nil, err
		}
	}
	b, err := seal(m)
	if err != nil {
		return nil, internalError(err, "describing the object")
	}
	if err := writeDurable(filepath.Join(built, manifestFile), b); err != nil {
		return nil, internalError(err, "storing the object")
	}
	for _, dir := range []string{codeDir, filepath.Join(built, codeDirectory), built} {
		if err := syncDirectory(dir); err != nil {
			return nil, internalError(err, "storing the object")
		}
	}
	return m, nil
}

func badOutput(err error) error {
	return &Error{Code: CodeInternal, Detail: "the compiler did not leave its output where the engine will look for it", err: err}
}

func makeDirectories(paths ...string) error {
	for _, path := range paths {
		if err := os.Mkdir(path, directoryMode); err != nil {
			return err
		}
		if err := os.Chmod(path, directoryMode); err != nil { // whatever the umask
			return err
		}
	}
	return nil
}

// adopt moves a file that a child wrote into the object, as ours, and fills in
// its size and digest. The child is dead, so nobody else has it open.
func adopt(from, to string, f *File) error {
	file, info, err := openRegular(from)
	if err != nil {
		return badOutput(err)
	}
	defer file.Close()
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || stat.Nlink != 1 {
		return badOutput(fmt.Errorf("%s has other names", f.Path))
	}
	if os.Geteuid() == 0 {
		if err := file.Chown(0, 0); err != nil {
			return internalError(err, "storing the object")
		}
	}
	if err := file.Chmod(fileMode); err != nil {
		return internalError(err, "storing the object")
	}
	size := info.Size()
	digest, err := digestOf(file, size)
	if err != nil {
		return internalError(err, "reading what was compiled")
	}
	if f.SHA256 != "" && f.SHA256 != digest {
		return badOutput(fmt.Errorf("%s changed", f.Path))
	}
	f.SHA256, f.SizeBytes = digest, size
	if err := file.Sync(); err != nil {
		return internalError(err, "storing the object")
	}
	if err := os.Rename(from, to); err != nil {
		return internalError(err, "storing the object")
	}
	return nil
}

// publish makes room, renames the object into place and makes that durable.
func (s *Store) publish(built, id string, m *Manifest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Something there is of another target, or was put there by others.
	if err := s.quarantine(id, "replaced by a new compile"); err != nil {
		return internalError(err, "replacing an object")
	}
	if err := s.makeRoom(m.sizeBytes()); err != nil {
		return err
	}
	if err := os.Rename(built, s.path(objectsName, id)); err != nil {
		return internalError(err, "publishing the object")
	}
	if err := syncDirectory(s.path(objectsName)); err != nil {
		return internalError(err, "publishing the object")
	}
	s.objects[id] = &object{size: m.sizeBytes(), usable: true}
	s.bytes += m.sizeBytes()
	s.touch(id)
	return nil
}

// recordImage writes an image's index, after its object is durable.
func (s *Store) recordImage(image, id string) error {
	b, err := seal(&imageIndex{Version: formatVersion, Image: image, Objects: []string{id}})
	if err != nil {
		return internalError(err, "describing the image")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects[id] == nil {
		return internalError(errors.New("the object was removed meanwhile"), "recording the image")
	}
	if s.index[image] == id {
		return nil
	}
	temp := s.path(tmpName, "image-"+image)
	defer os.Remove(temp)
	_ = os.Remove(temp)
	err = writeDurable(temp, b)
	if err == nil {
		err = os.Rename(temp, s.path(imagesName, imageFile(image)))
	}
	if err == nil {
		err = syncDirectory(s.path(imagesName))
	}
	if err != nil {
		return internalError(err, "recording the image")
	}
	s.index[image] = id
	return nil
}

// writeDurable creates a file that must not exist and syncs it; the name is
// durable once its directory is synced.
func writeDurable(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Chmod(fileMode), f.Sync(), f.Close())
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
