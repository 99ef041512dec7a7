package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/precompile"
)

// Source says which images are wanted; [Kubernetes] is the real one.
type Source interface {
	// Snapshot returns the latest state, and a channel that is closed when
	// there is a newer one.
	Snapshot() (Snapshot, <-chan struct{})
}

// Store is what the loop needs of *precompile.Store. Modules of images are
// kept under the digest of their own bytes, not of an image: whoever has the
// component can compute it, and images share modules.
type Store interface {
	// Ensure returns the object of a module, compiling it if need be.
	Ensure(ctx context.Context, moduleDigest string, module func(ctx context.Context) (path string, err error)) (precompile.ObjectRef, []v1alpha1.Phase, error)
	// Object returns the object if it is there and usable.
	Object(moduleDigest string) (precompile.ObjectRef, bool)
}

// Warmer has shims fill their own compile caches.
type Warmer interface {
	// Warm causes the shim behind a runtime handler to compile an image that
	// is on this node, and returns when it has.
	Warm(ctx context.Context, imageRef, handler string) error
	// Cached says whether the shim's cache has the image, judged by what the
	// shim wrote. A shim without a cache has nothing to warm: true.
	Cached(ctx context.Context, imageRef, handler string) (bool, error)
	// Identity changes whenever the shim's binary behind a handler does; what
	// another one compiled is not believed to fit. Empty: not known now.
	Identity(handler string) string
}

const (
	// tick is how often a pass runs without any event: it repairs what no
	// event told of, such as an image removed while containerd's event stream
	// was down.
	tick = 30 * time.Second
	// passGap is the least time between two passes; events within it are
	// taken together. A pass lists all images of this node.
	passGap = 250 * time.Millisecond
	// recheck is how often the cache of a warm image's shims is looked at
	// again: nothing tells when containerd collects its blobs.
	recheck = 10 * time.Minute
	// warmTimeout bounds one compile by a shim. Cranelift needs some ten
	// seconds for the largest modules on a small node.
	warmTimeout = 5 * time.Minute
	// prepareTimeout bounds everything after the pull of one image; the
	// compiler has tighter limits of its own.
	prepareTimeout = 20 * time.Minute
	// stallBytes within Options.StallTimeout is the slowest pull that is let
	// go on.
	stallBytes = 64 << 10
	// unpackTimeout bounds what containerd does after the last byte came.
	unpackTimeout = 10 * time.Minute
	// saveEvery bounds how often the cache of findings is written.
	saveEvery = 5 * time.Second
	// longRetry is when what failed for good is tried again, in case its
	// reason lay outside the image after all.
	longRetry = 10 * time.Minute
	// roomLook is how often it is looked whether a full disk has room again,
	// roomStep how much more room is a reason to try before the back-off ends.
	roomLook = 5 * time.Second
	roomStep = 16 << 20
)

// Options of a [Loop]. Source, Runtime, Store, Node and TempDir are required.
type Options struct {
	Source  Source
	Runtime Runtime
	Store   Store
	// Warmer may be nil: then no shim of this node keeps a cache.
	Warmer Warmer
	// Credentials and Secrets may be nil: then pulls are anonymous, as far as
	// containerd's configuration has no credentials. Without Secrets, images
	// whose registry refuses that are left to kubelet if their workload names
	// a pull secret.
	Credentials Credentials
	Secrets     Secrets
	// SetLive is told the digests of all modules of wanted images, so that
	// the store evicts others first; see prefetch.LiveUnion. May be nil.
	SetLive func(moduleDigests []string)
	// Node is this node's name; it decides where in Spread the node is.
	Node string
	// TempDir is for modules between image and store. Its subdirectory
	// "images" belongs to the loop and is emptied at start.
	TempDir string
	// StatePath is the file (mode 0644, no secrets) that keeps what earlier
	// walks of images found, so that a restart reads no image again. Empty:
	// none.
	StatePath string
	// DiskPath is on the filesystem of containerd's images, see
	// [Containerd.ImageRoot]. Empty: free space is not looked at.
	DiskPath string
	// MinFreeBytes is what pulls must leave free at DiskPath (default 2 GiB).
	// Keep it above kubelet's threshold for collecting images, or the two
	// work against each other.
	MinFreeBytes int64
	// MaxImageBytes bounds one image, compressed (default 512 MiB).
	MaxImageBytes int64
	// Pulls and Compiles bound what runs at once (defaults 2 and 1).
	Pulls, Compiles int
	// PullGap is the average time between two starts of pulls that no pod
	// waits for (default 500 ms). Images that a pod of this node waits for
	// are not held back: kubelet asks for them at once anyway.
	PullGap time.Duration
	// Spread is the time over which a fleet's nodes start to pull the same
	// image, each at a fixed place given by its name (default 30 s).
	Spread time.Duration
	// StallTimeout ends a pull of which less than 64 KiB came for that long
	// (default 2 min).
	StallTimeout time.Duration
	// ReleaseAfter is how long an image must be unwanted before kubelet may
	// collect it (default 10 min): rollouts and short outages of an
	// application must not cost its images.
	ReleaseAfter time.Duration
	// TagRefresh is how often an image wanted by tag is asked for again
	// (default 1 h); the registry answers with a digest, which costs it one
	// request if nothing changed. Digests are never asked for again.
	TagRefresh time.Duration
	// Logger gets a line per step of an image (default: none).
	Logger *slog.Logger
	// Registerer gets the metrics hearth_images_* (default: none).
	Registerer prometheus.Registerer
}

func (o *Options) fill() error {
	switch {
	case o.Source == nil, o.Runtime == nil, o.Store == nil:
		return errors.New("images: source, runtime and store are all required")
	case o.Node == "":
		return errors.New("images: the node's name is required")
	case o.TempDir == "":
		return errors.New("images: a directory for temporary files is required")
	}
	o.MinFreeBytes = cmp.Or(o.MinFreeBytes, 2<<30)
	o.MaxImageBytes = cmp.Or(o.MaxImageBytes, 512<<20)
	o.Pulls = cmp.Or(max(o.Pulls, 0), 2)
	o.Compiles = cmp.Or(max(o.Compiles, 0), 1)
	o.PullGap = cmp.Or(max(o.PullGap, 0), 500*time.Millisecond)
	o.Spread = cmp.Or(max(o.Spread, 0), 30*time.Second)
	o.StallTimeout = cmp.Or(max(o.StallTimeout, 0), 2*time.Minute)
	o.ReleaseAfter = cmp.Or(max(o.ReleaseAfter, 0), 10*time.Minute)
	o.TagRefresh = cmp.Or(max(o.TagRefresh, 0), time.Hour)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// image is a wanted image on its way. Guarded by Loop.mu.
type image struct {
	want  Wanted
	state State
	// startAt is this node's place in the fleet's spread.
	startAt time.Time
	// digest is what the name points at here, empty while it does not.
	digest      string
	done, total int64
	err         *Error
	failures    int
	nextTry     time.Time
	// room is what was free when it failed for lack of that.
	room room
	// prepared is the digest for which everything after the pull was seen
	// done, checkAt when that is looked at again.
	prepared string
	checkAt  time.Time
	// refreshAt is when a tag is asked for again.
	refreshAt time.Time
	cancel    context.CancelFunc // not nil while a job runs
	fetching  bool               // that job is a fetch
	gone      bool               // no longer wanted
}

// memory is what is known of an image's digest. It outlives the process.
type memory struct {
	Found findings `json:"found"`
	// Warmed maps a handler to the identity of the shim that compiled it.
	Warmed map[string]string `json:"warmed,omitempty"`
}

type stateFile struct {
	Version int                `json:"version"`
	Images  map[string]*memory `json:"images"`
}

// Loop is the reconciliation loop. Make it with New, run it with Run once.
type Loop struct {
	o    Options
	log  *slog.Logger
	m    *metrics
	dir  string
	now  func() time.Time
	free func(path string) (int64, error)
	kick chan struct{} // capacity 1: "look again"
	warm chan struct{} // capacity 1: shims compile one at a time
	jobs sync.WaitGroup

	// mu guards everything below; it is never held over a wait.
	mu       sync.Mutex
	started  bool
	snapshot Snapshot
	images   map[string]*image
	memory   map[string]*memory
	dirty    bool // memory is newer than the file
	savedAt  time.Time
	// fetches and prepares count running jobs.
	fetches, prepares int
	nextPull          time.Time
	unwanted          map[string]time.Time // names we hold that nobody wants, since when
	runtimeErr        string
	runtimeSince      time.Time
	lastPass          time.Time
	live              []string
	liveSet           bool
	changed           chan struct{} // closed when Status changes
}

// New checks the options, prepares the temporary directory and reads what an
// earlier process remembered.
func New(o Options) (*Loop, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	l := &Loop{
		o: o, log: o.Logger, now: time.Now, free: freeBytes,
		kick:     make(chan struct{}, 1),
		warm:     make(chan struct{}, 1),
		images:   make(map[string]*image),
		memory:   make(map[string]*memory),
		unwanted: make(map[string]time.Time),
		changed:  make(chan struct{}),
	}
	var err error
	if l.dir, err = emptyDir(o.TempDir, "images"); err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	l.loadMemory()
	if l.m, err = newMetrics(l, o.Registerer); err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	return l, nil
}

// Run works until ctx ends, then waits for its goroutines and returns nil.
// It may be called once. Pulls that are running end with it; containerd
// keeps what it has and goes on from there the next time.
func (l *Loop) Run(ctx context.Context) error {
	l.mu.Lock()
	if l.started {
		l.mu.Unlock()
		return errors.New("images: the loop is already running")
	}
	l.started = true
	l.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { l.watchRuntime(ctx) })
	l.passes(ctx)
	wg.Wait()
	l.jobs.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.saveMemory()
	return nil
}

// Look asks for a pass soon, for instance because a shim was replaced.
func (l *Loop) Look() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// wait sleeps for d or until ctx ends; it says whether to go on.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// watchRuntime has every change of containerd's images looked at.
func (l *Loop) watchRuntime(ctx context.Context) {
	for ctx.Err() == nil {
		err := l.o.Runtime.Watch(ctx, l.Look)
		if ctx.Err() != nil {
			return
		}
		l.log.Debug("events of containerd's images are not followed", "err", err)
		// The pass that runs every tick covers the gap.
		if !wait(ctx, 2*time.Second+rand.N(3*time.Second)) {
			return
		}
		l.Look()
	}
}

// passes runs passes until ctx ends.
func (l *Loop) passes(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	_, newer := l.o.Source.Snapshot()
	for {
		select {
		case <-ctx.Done():
			return
		case <-newer:
		case <-l.kick:
		case <-t.C:
		}
		snapshot, changed := l.o.Source.Snapshot()
		newer = changed
		start := l.now()
		next := l.pass(ctx, snapshot)
		if !wait(ctx, max(passGap, 2*l.now().Sub(start))) {
			return
		}
		t.Reset(next)
	}
}

// pass derives everything from the last snapshots: what to fetch, what to
// prepare, what to hold and what to let go. It returns when to look again at
// the latest.
func (l *Loop) pass(ctx context.Context, snap Snapshot) time.Duration {
	call, cancel := context.WithTimeout(ctx, 2*callTimeout)
	inventory, err := l.o.Runtime.Images(call)
	cancel()
	if ctx.Err() != nil {
		return tick
	}
	now := l.now()
	here := make(map[string]Image, len(inventory))
	for _, i := range inventory {
		here[i.Name] = i
	}

	l.mu.Lock()
	l.lastPass, l.snapshot = now, snap
	l.sync(snap, now)
	if err != nil {
		if l.runtimeErr == "" {
			l.runtimeSince = now
			l.log.Warn("container runtime does not answer", "err", err)
		}
		l.runtimeErr = err.Error()
		l.publish()
		l.mu.Unlock()
		return 2 * time.Second // it is on this machine, and usually restarting
	}
	if l.runtimeErr != "" {
		l.log.Info("container runtime answers again", "after", now.Sub(l.runtimeSince))
		l.runtimeErr = ""
		for _, img := range l.images {
			if img.err != nil && img.err.Code == CodeRuntimeUnavailable {
				img.nextTry = now
			}
		}
	}
	for _, img := range l.images {
		l.observe(img, here[img.want.Reference.Name])
	}
	full := l.lookForRoom(now)
	l.setLive(snap)
	hold, release, soon := l.pins(here, snap, now)
	next := l.start(ctx, now)
	l.saveIfDue(now)
	l.publish()
	l.mu.Unlock()

	for _, name := range hold {
		if err := l.o.Runtime.Protect(ctx, name); err != nil && ctx.Err() == nil {
			l.log.Warn("image not protected from collection", "image", name, "err", err)
		}
	}
	for _, name := range release {
		if err := l.o.Runtime.Release(ctx, name); err != nil && ctx.Err() == nil {
			l.log.Warn("image not released", "image", name, "err", err)
			continue
		}
		l.log.Info("image released, nobody wants it any more", "image", name)
	}
	next = earlier(next, soon)
	pause := tick
	if full {
		pause = roomLook
	}
	if next.IsZero() {
		return pause
	}
	return min(pause, max(next.Sub(l.now()), time.Millisecond))
}

// earlier is the earlier of two times, of which zero ones do not count.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// sync makes l.images match the snapshot. Called with mu held.
func (l *Loop) sync(snap Snapshot, now time.Time) {
	wanted := make(map[string]bool, len(snap.Wanted))
	for _, w := range snap.Wanted {
		name := w.Reference.Name
		wanted[name] = true
		img := l.images[name]
		if img == nil {
			l.images[name] = &image{want: w, state: StateQueued, startAt: now.Add(l.place(name))}
			continue
		}
		if img.err != nil && (w.Urgent && !img.want.Urgent || !slices.Equal(w.PullSecrets, img.want.PullSecrets)) {
			img.failures, img.nextTry = 0, now // a pod waits, or brought credentials
		}
		if !slices.Equal(w.Handlers, img.want.Handlers) {
			img.prepared = ""
		}
		img.want = w
	}
	if !snap.Known {
		return
	}
	for name, img := range l.images {
		if !wanted[name] {
			img.gone = true
			if img.cancel != nil {
				img.cancel()
			}
			delete(l.images, name)
		}
	}
}

// place is where in the spread of a fleet this node is, for one image: fixed,
// so that restarts do not add up, and different for each image, so that it is
// not always the same node that comes first.
func (l *Loop) place(name string) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(l.o.Node + "\x00" + name))
	// The last bits of FNV are its best mixed ones of short inputs.
	return time.Duration(float64(h.Sum64()%100_003) / 100_003 * float64(l.o.Spread))
}

// observe takes in what the runtime has of an image. Called with mu held.
func (l *Loop) observe(img *image, i Image) {
	if img.cancel != nil {
		return // the job knows better
	}
	digest := i.Digest
	if !i.Ready || (img.want.Reference.Digest != "" && digest != img.want.Reference.Digest) {
		digest = ""
	}
	if img.digest == "" && digest != "" && img.err != nil && img.err.Code != CodeTooLarge {
		// Somebody else brought it, usually kubelet with a pull secret.
		img.err, img.failures, img.nextTry, img.state = nil, 0, time.Time{}, StateQueued
	}
	if img.digest != "" && digest != img.digest {
		img.prepared = ""
		if img.state == StateWarm {
			img.state = StateQueued
		}
	}
	img.digest = digest
	if digest == "" || img.state != StateWarm {
		return
	}
	// What was warm stays so only while its objects are there and its shims
	// are the same.
	m := l.memory[digest]
	ok := m != nil && img.prepared == digest
	if ok {
		for _, d := range m.Found.Modules {
			if _, there := l.o.Store.Object(d); !there {
				ok = false
			}
		}
	}
	if ok && l.o.Warmer != nil && m.Found.Shim {
		for _, h := range img.want.Handlers {
			if id := l.o.Warmer.Identity(h); id != "" && m.Warmed[h] != id {
				ok = false
			}
		}
	}
	if !ok {
		img.state, img.prepared = StateQueued, ""
	}
}

// setLive names the modules that must stay. Called with mu held.
func (l *Loop) setLive(snap Snapshot) {
	if l.o.SetLive == nil || !snap.Known {
		return
	}
	var live []string
	for _, img := range l.images {
		if m := l.memory[img.digest]; m != nil {
			live = append(live, m.Found.Modules...)
		}
	}
	slices.Sort(live)
	live = slices.Compact(live)
	if l.liveSet && slices.Equal(live, l.live) {
		return
	}
	l.live, l.liveSet = live, true
	l.o.SetLive(live)
}

// pins says which images to hold and which to let go, and when the next one
// is to be let go. Called with mu held.
func (l *Loop) pins(here map[string]Image, snap Snapshot, now time.Time) (hold, release []string, next time.Time) {
	if !snap.Known {
		return nil, nil, time.Time{}
	}
	keep := make(map[string]bool)
	for _, img := range l.images {
		name := img.want.Reference.Name
		i, ok := here[name]
		if !ok || img.err != nil && img.err.Code == CodeTooLarge {
			continue
		}
		// The name with the digest is the one that stays when a tag moves.
		// An image that was imported may not have it.
		if by := img.want.Reference.ByDigest(i.Digest); here[by].Digest == i.Digest {
			name = by
		}
		keep[name] = true
		// While it is being fetched its size may not have been seen yet; the
		// job itself holds it.
		if p := here[name]; img.digest != "" && (!p.Pinned || !p.Ours) {
			hold = append(hold, name)
		}
	}
	for name, i := range here {
		if !i.Ours || keep[name] {
			delete(l.unwanted, name)
			continue
		}
		if !snap.Complete || !snap.StaleSince.IsZero() {
			// Who does not know what is wanted lets nothing go.
			delete(l.unwanted, name)
			continue
		}
		since, ok := l.unwanted[name]
		if !ok {
			since = now
			l.unwanted[name] = now
		}
		if due := since.Add(l.o.ReleaseAfter); now.Before(due) {
			next = earlier(next, due)
		} else {
			release = append(release, name)
			delete(l.unwanted, name)
		}
	}
	for name := range l.unwanted {
		if _, ok := here[name]; !ok {
			delete(l.unwanted, name)
		}
	}
	slices.Sort(hold)
	slices.Sort(release)
	return hold, release, next
}

// start starts the jobs that are due and fit, urgent ones first. Called with
// mu held. It returns when the next one is due.
func (l *Loop) start(ctx context.Context, now time.Time) (next time.Time) {
	due := make([]*image, 0, 16)
	for _, img := range l.images {
		if img.cancel != nil {
			continue
		}
		at := img.nextTry
		switch {
		case img.digest == "":
			if !img.want.Urgent && img.startAt.After(at) {
				at = img.startAt
			}
		case img.want.Reference.Digest == "" && img.state == StateWarm:
			at = earlier(img.refreshAt, img.checkAt)
		case img.state == StateWarm:
			at = img.checkAt
		}
		if at.After(now) {
			next = earlier(next, at)
			continue
		}
		due = append(due, img)
	}
	slices.SortFunc(due, func(a, b *image) int {
		if a.want.Urgent != b.want.Urgent {
			if a.want.Urgent {
				return -1
			}
			return 1
		}
		// What failed least comes first, so that one bad registry does not
		// hold up the others.
		return cmp.Or(cmp.Compare(a.failures, b.failures), a.startAt.Compare(b.startAt), cmp.Compare(a.want.Reference.Name, b.want.Reference.Name))
	})
	for _, img := range due {
		refresh := img.want.Reference.Digest == "" && img.state == StateWarm && !img.refreshAt.After(now)
		if img.digest != "" && !refresh {
			if l.prepares < l.o.Compiles {
				l.prepares++
				l.run(ctx, img, false)
			}
			continue
		}
		if l.fetches >= l.o.Pulls {
			continue
		}
		if !img.want.Urgent {
			if l.nextPull.After(now) {
				next = earlier(next, l.nextPull)
				continue
			}
			l.nextPull = now.Add(l.o.PullGap/2 + rand.N(l.o.PullGap))
		}
		l.fetches++
		l.run(ctx, img, true)
	}
	return next
}

// run starts a job. Called with mu held.
func (l *Loop) run(base context.Context, img *image, fetch bool) {
	ctx, cancel := context.WithCancel(base)
	img.cancel, img.fetching = cancel, fetch
	want, digest := img.want, img.digest
	l.jobs.Go(func() {
		defer cancel()
		var err error
		if fetch {
			digest, err = l.fetch(ctx, img, want)
		} else {
			err = l.prepare(ctx, img, want, digest)
		}
		l.finish(ctx, img, want, digest, fetch, err)
		// The next one need not wait for a pass.
		l.mu.Lock()
		defer l.mu.Unlock()
		if base.Err() == nil {
			l.start(base, l.now())
		}
	})
}

// step records the start of a step. An image that failed stays so while it is
// tried again, until bytes move: who reads the status is not to see it
// flicker, and the condition made of it is not to be written each time.
func (l *Loop) step(img *image, s State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !img.gone && img.state != s && img.err == nil {
		img.state, img.done, img.total = s, 0, 0
		l.publish()
	}
}

// finish records how a job ended.
func (l *Loop) finish(ctx context.Context, img *image, want Wanted, digest string, fetch bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.Look()
	now := l.now()
	img.cancel, img.fetching = nil, false
	if fetch {
		l.fetches--
	} else {
		l.prepares--
	}
	name := want.Reference.Name
	if err == nil {
		img.err, img.failures, img.nextTry = nil, 0, now
		if fetch {
			img.digest = digest
			img.refreshAt = now.Add(l.o.TagRefresh*9/10 + rand.N(l.o.TagRefresh/5+1))
			img.state = StateQueued // for what comes after the pull
			if img.prepared == digest {
				img.state = StateWarm
			}
			return
		}
		if !slices.Equal(want.Handlers, img.want.Handlers) {
			img.state = StateQueued // a new handler came meanwhile
			return
		}
		if img.prepared != digest {
			l.log.Info("image is warm", "image", name, "digest", digest, "notes", l.memory[digest].Found.Notes)
		}
		img.prepared, img.state = digest, StateWarm
		img.checkAt = now.Add(recheck*9/10 + rand.N(recheck/5))
		if img.refreshAt.IsZero() {
			// It was here before us; its tag may have moved since.
			img.refreshAt = now.Add(rand.N(l.o.TagRefresh))
		}
		l.publish()
		return
	}
	if img.gone || ctx.Err() != nil {
		img.state = StateQueued
		return
	}
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Code: CodeInternal, Detail: shorten(err.Error(), 400)}
	}
	if fetch && img.state == StateWarm {
		// Only the tag was asked for again; what is here is as good as before.
		img.refreshAt = now.Add(retryAfter(e.Code, 5))
		l.m.failures.WithLabelValues(e.Code).Inc()
		l.log.Warn("tag not asked for again", "image", name, "code", e.Code, "err", e, "nextTry", img.refreshAt)
		return
	}
	img.failures++
	img.err, img.state = e, StateFailed
	img.prepared = ""
	img.nextTry = now.Add(retryAfter(e.Code, img.failures))
	if needsRoom(e.Code) {
		img.room = l.roomNow()
	}
	l.m.failures.WithLabelValues(e.Code).Inc()
	if e.Code == CodePullSecret {
		img.state = StateDeferred
		l.log.Info("image is left to kubelet", "image", name, "why", e, "nextTry", img.nextTry)
		l.publish()
		return
	}
	l.log.Warn("image is not warm", "image", name, "code", e.Code, "err", e, "failures", img.failures, "nextTry", img.nextTry)
	l.publish()
}

// retryAfter is the pause after the n-th failure in a row, n from 1. Half of
// it is random, so that a fleet that failed together does not come back
// together.
func retryAfter(code string, n int) time.Duration {
	first, longest := time.Second, 5*time.Minute
	switch code {
	case CodePullSecret:
		first = longRetry // somebody may make the image public
		longest = longRetry
	case CodeInvalidReference, CodeNotFound, CodeTooLarge, CodeUnpullable:
		first, longest = longRetry/4, longRetry
	case CodeDigestMismatch:
		// Often only the part that was left by an interrupted pull is
		// damaged; the runtime drops it and begins anew.
		first, longest = 5*time.Second, longRetry
	case CodeUnauthorized:
		first = 30 * time.Second // registries lock out who insists
	case CodeDiskLow, CodeDiskFull:
		first, longest = 30*time.Second, 2*time.Minute
	case CodeRuntimeUnavailable:
		longest = 5 * time.Second
	}
	d := longest
	if n < 16 {
		d = min(longest, first<<(n-1))
	}
	return d/2 + rand.N(d)
}

// publish tells that Status changed. Called with mu held.
func (l *Loop) publish() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// loadMemory reads the state file; a bad one is as good as none.
func (l *Loop) loadMemory() {
	if l.o.StatePath == "" {
		return
	}
	var f stateFile
	found, err := readJSON(l.o.StatePath, &f)
	if err == nil && found && f.Version != 1 {
		err = fmt.Errorf("its version is %d, not 1", f.Version)
	}
	if err != nil {
		l.log.Warn("findings of an earlier run are not usable, images are read again", "file", l.o.StatePath, "err", err)
		return
	}
	for d, m := range f.Images {
		if m != nil && m.Found.Version == walkVersion {
			l.memory[d] = m
		}
	}
}

func (l *Loop) saveIfDue(now time.Time) {
	if l.dirty && now.Sub(l.savedAt) >= saveEvery {
		l.savedAt = now
		l.saveMemory()
	}
}

// saveMemory writes the state file. Called with mu held.
func (l *Loop) saveMemory() {
	if !l.dirty || l.o.StatePath == "" {
		return
	}
	if l.snapshot.Complete {
		current := make(map[string]bool, len(l.images))
		for _, img := range l.images {
			current[img.digest] = true
		}
		for d := range l.memory {
			if !current[d] {
				delete(l.memory, d)
			}
		}
	}
	if err := writeJSON(l.o.StatePath, stateFile{Version: 1, Images: l.memory}); err != nil {
		l.log.Warn("findings are not kept for the next start", "file", l.o.StatePath, "err", err)
		return
	}
	l.dirty = false
}
