package deploy

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// server is what an API server has, or why it does not answer: the real ones of
// other tests are not away for as long as it takes.
type server struct {
	mu    sync.Mutex
	away  error
	items []metav1.PartialObjectMetadata
	asked int
	open  []*watch.FakeWatcher
}

func (s *server) set(away error, items ...metav1.PartialObjectMetadata) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away, s.items, s.asked = away, items, 0
	if away != nil {
		for _, w := range s.open {
			w.Stop()
		}
		s.open = nil
	}
}

// count is how often it was asked since set.
func (s *server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func (s *server) list(context.Context, metav1.ListOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	return &metav1.PartialObjectMetadataList{ListMeta: metav1.ListMeta{ResourceVersion: "9"}, Items: slices.Clone(s.items)}, s.away
}

func (s *server) watch(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.away != nil:
		s.asked++
		return nil, s.away
	case o.SendInitialEvents != nil: // it is an old one, which lists first
		return nil, apierrors.NewInvalid(schema.GroupKind{}, "", nil)
	}
	w := watch.NewFake()
	s.open = append(s.open, w)
	return w, nil
}

func named(name, version string) metav1.PartialObjectMetadata {
	return metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, ResourceVersion: version},
	}
}

func TestWatchIsBackSecondsAfterALongOutage(t *testing.T) {
	// One of them sleeps until a moment that is years away on a test's clock.
	handlers := utilruntime.ErrorHandlers
	utilruntime.ErrorHandlers = nil
	t.Cleanup(func() { utilruntime.ErrorHandlers = handlers })
	missing := apierrors.NewGenericServerResponse(http.StatusNotFound, "list", schema.GroupResource{Resource: "spinapps"}, "", "404 page not found", 0, true)
	for _, test := range []struct {
		name   string
		away   error
		within time.Duration // after the API server is back
		most   int           // attempts in an hour
		failed bool          // somebody is told
	}{
		{"an API server that is away", errors.New("connection refused"), 6 * time.Second, 3600, true},
		{"a kind that is not installed", missing, 2*missingPause + 6*time.Second, 241, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &server{}
				s.set(nil, named("a", "1"), named("b", "1"), named("same", "1"))
				w := newWatched("deployments", &metav1.PartialObjectMetadata{}, cache.Indexers{})
				w.list, w.watch = s.list, s.watch
				var told atomic.Int64
				w.failed = func(context.Context, string, error) { told.Add(1) }
				var mu sync.Mutex
				var changes []string
				// taken are the changes since the last call, sorted.
				taken := func() []string {
					synctest.Wait()
					mu.Lock()
					defer mu.Unlock()
					all := changes
					changes = nil
					slices.Sort(all)
					return all
				}
				w.changed = func(old, obj any) {
					what, m := "changed ", obj.(metav1.Object)
					if _, there, _ := w.objects.Get(obj); !there {
						what = "gone "
					} else if old == nil {
						what = "new "
					}
					mu.Lock()
					defer mu.Unlock()
					changes = append(changes, what+m.GetName())
				}
				ctx, stop := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { w.run(ctx); close(done) }()
				<-w.synced
				if got := taken(); !slices.Equal(got, []string{"new a", "new b", "new same"}) {
					t.Errorf("at first: %q", got)
				}
				s.set(test.away)
				time.Sleep(time.Hour)
				if asked := s.count(); asked > test.most || asked < 10 {
					t.Errorf("asked %d times in an hour, want %d at most", asked, test.most)
				}
				if n := told.Load(); test.failed != (n > 10) {
					t.Errorf("told %d times", n)
				}
				taken()
				s.set(nil, named("b", "2"), named("c", "1"), named("same", "1"))
				time.Sleep(test.within)
				if got := taken(); !slices.Equal(got, []string{"changed b", "gone a", "new c"}) {
					t.Errorf("%s after it is back: %q", test.within, got)
				}
				stop()
				<-done
			})
		})
	}
}
