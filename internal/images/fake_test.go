package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/precompile"
)

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// fakeRuntime is a container runtime with a registry in memory. It is for
// faults that a real one cannot be made to show at a chosen moment.
type fakeRuntime struct {
	mu        sync.Mutex
	registry  map[string]string // name to digest
	manifests map[string]Manifest
	blobs     map[string][]byte
	local     map[string]string // name to digest
	labels    map[string]map[string]string
	watchers  map[int]func()
	next      int
	down      error
	pulls     []string
	auths     []Auth
	running   int
	most      int
	// onPull runs before a pull takes effect.
	onPull func(ctx context.Context, ref Reference, auth *Auth, progress func(Progress) error) error
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{
		registry: map[string]string{}, manifests: map[string]Manifest{}, blobs: map[string][]byte{},
		local: map[string]string{}, labels: map[string]map[string]string{}, watchers: map[int]func(){},
	}
}

// publish puts an image with these layers into the registry.
func (f *fakeRuntime) publish(name, arch string, layers ...part) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, err := ParseReference(name)
	if err != nil {
		panic(err)
	}
	m := Manifest{Architecture: arch}
	for _, l := range layers {
		d := sum(l.bytes)
		f.blobs[d] = l.bytes
		m.Layers = append(m.Layers, Layer{MediaType: l.mediaType, Digest: d, Size: int64(len(l.bytes))})
		m.Size += int64(len(l.bytes))
	}
	m.Digest = sum(fmt.Append(nil, arch, m.Layers))
	f.manifests[m.Digest] = m
	f.registry[r.Name] = m.Digest
	f.registry[r.ByDigest(m.Digest)] = m.Digest
	return m.Digest
}

func (f *fakeRuntime) set(change func()) {
	f.mu.Lock()
	change()
	ws := slices.Collect(maps.Values(f.watchers))
	f.mu.Unlock()
	for _, w := range ws {
		w()
	}
}

func (f *fakeRuntime) isDown() error {
	if f.down != nil {
		return fail(CodeRuntimeUnavailable, f.down, "containerd does not answer")
	}
	return nil
}

func (f *fakeRuntime) Images(context.Context) ([]Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.isDown(); err != nil {
		return nil, err
	}
	var out []Image
	for n, d := range f.local {
		out = append(out, Image{Name: n, Digest: d, Ready: true, Pinned: f.labels[n][labelPinned] != "", Ours: f.labels[n][labelOurs] != ""})
	}
	return out, nil
}

func (f *fakeRuntime) Pull(ctx context.Context, ref Reference, auth *Auth, progress func(Progress) error) (string, error) {
	f.mu.Lock()
	f.pulls = append(f.pulls, ref.Name)
	if auth != nil {
		f.auths = append(f.auths, *auth)
	}
	f.running++
	f.most = max(f.most, f.running)
	hook := f.onPull
	f.mu.Unlock()
	defer func() { f.mu.Lock(); f.running--; f.mu.Unlock() }()
	if hook != nil {
		if err := hook(ctx, ref, auth, progress); err != nil {
			return "", err
		}
	}
	f.mu.Lock()
	if err := f.isDown(); err != nil {
		f.mu.Unlock()
		return "", err
	}
	d, ok := f.registry[ref.Name]
	f.mu.Unlock()
	if !ok {
		return "", fail(CodeNotFound, nil, "no image %s", ref.Name)
	}
	f.set(func() {
		for _, n := range []string{ref.Name, ref.ByDigest(d)} {
			f.local[n] = d
			if n == ref.Name || f.labels[n] == nil {
				f.labels[n] = map[string]string{} // as containerd does
			}
		}
	})
	return d, nil
}

// Protect and Release tell watchers, as containerd does: labels are the image's.
func (f *fakeRuntime) Protect(_ context.Context, name string) (err error) {
	f.set(func() { err = f.protect(name) })
	return err
}

func (f *fakeRuntime) Release(_ context.Context, name string) (err error) {
	f.set(func() { err = f.release(name) })
	return err
}

func (f *fakeRuntime) protect(name string) error {
	if err := f.isDown(); err != nil {
		return err
	}
	l := f.labels[name]
	if l == nil {
		return fmt.Errorf("%w: %s", ErrNoImage, name)
	}
	if l[labelOurs] != pinOwn {
		l[labelOurs] = pinOwn
		if l[labelPinned] != "" {
			l[labelOurs] = pinShared
		}
	}
	l[labelPinned] = labelPinnedValue
	return nil
}

func (f *fakeRuntime) release(name string) error {
	if err := f.isDown(); err != nil {
		return err
	}
	l := f.labels[name]
	if l[labelOurs] == pinOwn && l[labelK3s] == "" {
		delete(l, labelPinned)
	}
	delete(l, labelOurs)
	return nil
}

func (f *fakeRuntime) Manifest(_ context.Context, digest string) (Manifest, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, ok := f.manifests[digest]
	if !ok {
		return Manifest{}, fmt.Errorf("%w: %s", ErrNoImage, digest)
	}
	return m, nil
}

type memoryBlob struct{ *bytes.Reader }

func (memoryBlob) Close() error { return nil }

func (f *fakeRuntime) Open(_ context.Context, l Layer) (Blob, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.blobs[l.Digest]
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrNoImage, l.Digest)
	}
	return memoryBlob{bytes.NewReader(b)}, nil
}

func (f *fakeRuntime) Watch(ctx context.Context, changed func()) error {
	f.mu.Lock()
	id := f.next
	f.next++
	f.watchers[id] = changed
	f.mu.Unlock()
	<-ctx.Done()
	f.mu.Lock()
	delete(f.watchers, id)
	f.mu.Unlock()
	return ctx.Err()
}

func (f *fakeRuntime) pulled() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.pulls)
}

func (f *fakeRuntime) label(name, key string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.labels[name][key]
}

// fakeStore keeps digests only.
type fakeStore struct {
	mu      sync.Mutex
	objects map[string]bool
	ensured []string
	live    []string
	// err decides about a module.
	err func(digest string, module []byte) error
}

func newFakeStore() *fakeStore { return &fakeStore{objects: map[string]bool{}} }

func (s *fakeStore) Ensure(ctx context.Context, d string, module func(context.Context) (string, error)) (precompile.ObjectRef, []v1alpha1.Phase, error) {
	path, err := module(ctx)
	if err != nil {
		return precompile.ObjectRef{}, nil, err
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return precompile.ObjectRef{}, nil, err
	}
	if sum(raw) != d {
		return precompile.ObjectRef{}, nil, fmt.Errorf("module %s came as %s", sum(raw), d)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ensured = append(s.ensured, d)
	if s.err != nil {
		if err := s.err(d, raw); err != nil {
			return precompile.ObjectRef{}, nil, err
		}
	}
	s.objects[d] = true
	return precompile.ObjectRef{ID: d}, nil, nil
}

func (s *fakeStore) Object(d string) (precompile.ObjectRef, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return precompile.ObjectRef{ID: d}, s.objects[d]
}

func (s *fakeStore) count(d string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.ensured {
		if e == d {
			n++
		}
	}
	return n
}

// fakeWarmer is a shim with a cache.
type fakeWarmer struct {
	mu       sync.Mutex
	identity string
	cache    map[string]bool
	warmed   []string
	running  int
	most     int
	err      error
	hollow   bool // says it worked and leaves nothing
}

func (w *fakeWarmer) Warm(ctx context.Context, ref, handler string) error {
	w.mu.Lock()
	w.running++
	w.most = max(w.most, w.running)
	w.mu.Unlock()
	ok := wait(ctx, 50*time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running--
	w.warmed = append(w.warmed, ref+" "+handler)
	if !ok {
		return ctx.Err()
	}
	if w.err == nil && !w.hollow {
		w.cache[ref+" "+handler] = true
	}
	return w.err
}

func (w *fakeWarmer) Cached(_ context.Context, ref, handler string) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cache[ref+" "+handler], nil
}

func (w *fakeWarmer) Identity(string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.identity
}

func (w *fakeWarmer) times() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.warmed)
}

// fixedSource is what a test wants.
type fixedSource struct {
	mu    sync.Mutex
	snap  Snapshot
	newer chan struct{}
}

func newFixedSource(ws ...Wanted) *fixedSource {
	s := &fixedSource{newer: make(chan struct{})}
	s.snap = Snapshot{Known: true, Complete: true, Wanted: sorted(ws)}
	return s
}

func sorted(ws []Wanted) []Wanted {
	ws = slices.Clone(ws)
	slices.SortFunc(ws, func(a, b Wanted) int { return strings.Compare(a.Reference.Name, b.Reference.Name) })
	return ws
}

func (s *fixedSource) Snapshot() (Snapshot, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snap, s.newer
}

func (s *fixedSource) change(f func(*Snapshot)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.snap)
	close(s.newer)
	s.newer = make(chan struct{})
}

func (s *fixedSource) want(ws ...Wanted) {
	s.change(func(snap *Snapshot) { snap.Wanted = sorted(ws) })
}
