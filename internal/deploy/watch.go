package deploy

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const (
	// watchPause is the longest pause between attempts to watch an API server
	// that is away. client-go's own grows to a minute, for clients as many as
	// kubelets: for that long after an outage a rollout would seem to stand
	// still. There are a few replicas only, and each has three of these watches.
	watchPause = 3 * time.Second
	// missingPause is between attempts to watch a kind that the cluster does not
	// know: one without SpinKube is asked about SpinApps for ever.
	missingPause = 15 * time.Second
)

// watched is all objects of one kind as the API server last told of them.
type watched struct {
	name  string
	kind  runtime.Object
	list  func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
	// failed is told of attempts to list or watch that failed.
	failed func(ctx context.Context, what string, err error)
	// changed is told of every change once run began, of objects that were there
	// before as well: old is nil for a new one, and for one that is gone obj is
	// its last state. It is called for one object at a time.
	changed func(old, obj any)

	objects cache.Indexer
	once    sync.Once
	synced  chan struct{}
}

var _ cache.ReflectorStore = (*watched)(nil)

func newWatched(name string, kind runtime.Object, indexers cache.Indexers) *watched {
	return &watched{name: name, kind: kind, objects: cache.NewIndexer(cache.MetaNamespaceKeyFunc, indexers), synced: make(chan struct{})}
}

// hasSynced says whether all objects were read once.
func (w *watched) hasSynced() bool {
	select {
	case <-w.synced:
		return true
	default:
		return false
	}
}

// run watches until ctx ends.
func (w *watched) run(ctx context.Context) {
	quiet := logr.Discard() // failed says it in our words
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := w.list(ctx, o)
			w.tell(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			events, err := w.watch(ctx, o)
			w.tell(ctx, err)
			return events, err
		},
	}
	cache.NewReflectorWithOptions(lw, w.kind, w, cache.ReflectorOptions{
		Name: "hearth-" + w.name, Logger: &quiet,
		Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Cap: watchPause, Steps: 16},
	}).RunWithContext(logr.NewContext(ctx, quiet))
}

// tell passes on a failure, and waits where asking again soon is of no use.
func (w *watched) tell(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil {
		return
	}
	if !kindMissing(err) {
		w.failed(ctx, w.name, err)
		return
	}
	t := time.NewTimer(missingPause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Add implements cache.ReflectorStore.
func (w *watched) Add(obj any) error { return w.Update(obj) }

// Update implements cache.ReflectorStore.
func (w *watched) Update(obj any) error {
	dropManagedFields(obj)
	old, _, err := w.objects.Get(obj)
	if err != nil {
		return err
	}
	if err := w.objects.Update(obj); err != nil {
		return err
	}
	w.changed(old, obj)
	return nil
}

// Delete implements cache.ReflectorStore.
func (w *watched) Delete(obj any) error {
	old, known, err := w.objects.Get(obj)
	if err != nil || !known {
		return err
	}
	if err := w.objects.Delete(obj); err != nil {
		return err
	}
	w.changed(nil, old)
	return nil
}

// Replace implements cache.ReflectorStore: what a list after an outage does not
// have is gone.
func (w *watched) Replace(list []any, version string) error {
	before := map[string]any{}
	for _, obj := range w.objects.List() {
		k, err := cache.MetaNamespaceKeyFunc(obj)
		if err != nil {
			return err
		}
		before[k] = obj
	}
	for _, obj := range list {
		dropManagedFields(obj)
	}
	if err := w.objects.Replace(slices.Clone(list), version); err != nil {
		return err
	}
	w.once.Do(func() { close(w.synced) })
	for _, obj := range list {
		k, err := cache.MetaNamespaceKeyFunc(obj)
		if err != nil {
			return err
		}
		old := before[k]
		delete(before, k)
		if old == nil || versionOf(old) != versionOf(obj) {
			w.changed(old, obj)
		}
	}
	for _, gone := range before {
		w.changed(nil, gone)
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (w *watched) Resync() error { return nil }

func versionOf(obj any) string {
	m, ok := obj.(metav1.Object)
	if !ok {
		return ""
	}
	return m.GetResourceVersion()
}

// dropManagedFields keeps memory small: they are half of many objects.
func dropManagedFields(obj any) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
}
