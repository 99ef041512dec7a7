package api

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/submit"
)

// Reasons of the condition Ready of a function that was applied and is not
// taken on.
const (
	reasonQuotaExceeded    = "QuotaExceeded"
	reasonImageNotYours    = "ImageNotYours"
	reasonImageInvalid     = "ImageInvalid"
	reasonImageUnavailable = "ImageUnavailable"
)

const (
	// inspectDeadline bounds one look at an image: a registry that a tenant names
	// may be any machine.
	inspectDeadline = 10 * time.Second
	// inspectsEach is how many images of one tenant are looked at at once: its
	// registries keep no other tenant waiting.
	inspectsEach = 4
	// unavailableFor is for how long nothing is asked again about an image that
	// the registry did not show. Somebody may push it, or mend the registry.
	unavailableFor = 15 * time.Second
	// maxInspected is how many images are remembered.
	maxInspected = 4096
	// quotaRetry is after what time a function that found no room is looked at
	// again at the latest, where no other tells that there is room; quotaRetryEach
	// is added for every one that waits, so that any number of them costs the same.
	quotaRetry     = 30 * time.Second
	quotaRetryEach = 100 * time.Millisecond
	// quotaWakes is how many of those that wait are looked at for each that goes.
	quotaWakes = 10
)

// errInspecting says that a registry is being asked, and that there will be a call.
var errInspecting = errors.New("the image is being looked up in its registry")

// admission holds functions that are applied to the rules of the submit API. It
// is the clusterstore.Admission of a replica.
type admission struct {
	server func() admitter // nil until there is one
	now    func() time.Time

	ctx     context.Context // of what goes on behind a call
	end     context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	inspects map[inspectKey]*inspect
	places   map[string]chan struct{} // by tenant
}

// admitter is the part of the submit API that decides.
type admitter interface {
	Inspect(ctx context.Context, tenant string, a v1alpha1.Artifact, spin bool, size int64) (int64, error)
	Admit(ctx context.Context, tenant, name string, bytes int64, wait bool) (func(*function.Function), error)
}

type inspectKey struct {
	tenant   string
	artifact v1alpha1.Artifact
	spin     bool
}

// inspect is a look at an image, under way or done.
type inspect struct {
	done chan struct{}
	// wake are called when it is done. They are guarded by the admission's mu.
	wake []func()
	// What follows is set before done is closed.
	size  int64
	err   error
	until time.Time // of a failure; zero: what was found out stays so
}

func newAdmission(server func() admitter) *admission {
	ctx, end := context.WithCancel(context.Background())
	return &admission{
		server: server, now: time.Now, ctx: ctx, end: end,
		inspects: map[inspectKey]*inspect{}, places: map[string]chan struct{}{},
	}
}

// close ends looks under way; later ones fail.
func (a *admission) close() error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.end()
	a.running.Wait()
	return nil
}

type wakeKey struct{}

// withWake has Inspect return at once, with errInspecting, where it has to ask a
// registry, and wake called when that is done. A reconciler has others to look at.
func withWake(ctx context.Context, wake func()) context.Context {
	return context.WithValue(ctx, wakeKey{}, wake)
}

// Inspect implements clusterstore.Admission.
func (a *admission) Inspect(ctx context.Context, namespace string, image v1alpha1.Artifact, runtime v1alpha1.FunctionRuntime, size int64) (int64, error) {
	server := a.server()
	if server == nil {
		return 0, fmt.Errorf("%w: this replica is starting", function.ErrUnavailable)
	}
	key := inspectKey{namespace, image, runtime == v1alpha1.RuntimeSpin}
	if size > 0 {
		size, err := server.Inspect(ctx, namespace, image, key.spin, size) // asks nobody
		return size, a.refusal(err, 0)
	}
	wake, _ := ctx.Value(wakeKey{}).(func())
	i, err := a.look(server, key, wake)
	if err != nil {
		return 0, err
	}
	if wake != nil {
		select {
		case <-i.done:
		default:
			return 0, errInspecting
		}
	}
	select {
	case <-i.done:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return i.size, a.refusal(i.err, max(i.until.Sub(a.now()), time.Second))
}

// look finds what is known of an image, or begins to find out.
func (a *admission) look(server admitter, key inspectKey, wake func()) (*inspect, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, function.ErrClosed
	}
	if i := a.inspects[key]; i != nil {
		select {
		case <-i.done:
			if i.until.IsZero() || a.now().Before(i.until) {
				return i, nil
			}
		default:
			if wake != nil {
				i.wake = append(i.wake, wake)
			}
			return i, nil
		}
	}
	if len(a.inspects) >= maxInspected {
		for k, i := range a.inspects {
			select {
			case <-i.done:
				delete(a.inspects, k)
			default:
			}
			if len(a.inspects) < maxInspected/2 {
				break
			}
		}
	}
	i := &inspect{done: make(chan struct{})}
	if wake != nil {
		i.wake = append(i.wake, wake)
	}
	places := a.places[key.tenant]
	if places == nil {
		places = make(chan struct{}, inspectsEach)
		a.places[key.tenant] = places
	}
	a.inspects[key] = i
	a.running.Go(func() { a.inspect(server, key, i, places) })
	return i, nil
}

func (a *admission) inspect(server admitter, key inspectKey, i *inspect, places chan struct{}) {
	select {
	case places <- struct{}{}:
		ctx, cancel := context.WithTimeout(a.ctx, inspectDeadline)
		i.size, i.err = server.Inspect(ctx, key.tenant, key.artifact, key.spin, 0)
		if errors.Is(i.err, context.DeadlineExceeded) {
			i.err = &submit.Refused{
				Code: "registry-unavailable", Retryable: true, Err: i.err,
				Detail: fmt.Sprintf("The registry %s did not show the image within %s.", key.artifact.Registry, inspectDeadline),
			}
		}
		cancel()
		<-places
	case <-a.ctx.Done():
		i.err = function.ErrClosed
	}
	if i.err != nil {
		i.until = a.now().Add(unavailableFor)
	}
	a.mu.Lock()
	close(i.done)
	wake := i.wake
	i.wake = nil
	a.mu.Unlock()
	for _, w := range wake {
		w()
	}
}

// Admit implements clusterstore.Admission.
func (a *admission) Admit(ctx context.Context, namespace, name string, bytes int64, wait bool) (func(*function.Function), error) {
	server := a.server()
	if server == nil {
		return nil, fmt.Errorf("%w: this replica is starting", function.ErrUnavailable)
	}
	done, err := server.Admit(ctx, namespace, name, bytes, wait)
	return done, a.refusal(err, quotaRetry)
}

// refusal puts what the submit API says into a condition. retry is after what
// time there may be another answer.
func (a *admission) refusal(err error, retry time.Duration) error {
	var refused *submit.Refused
	if !errors.As(err, &refused) {
		return err
	}
	r := &clusterstore.Refusal{Reason: reasonImageInvalid, Message: refused.Detail, Err: err}
	switch {
	case errors.Is(err, submit.ErrImageOfAnother):
		r.Reason = reasonImageNotYours
	case refused.Code == "quota-exceeded":
		r.Reason, r.Retry = reasonQuotaExceeded, retry
	case refused.Retryable, refused.Code == "image-not-found", refused.Code == "registry-unauthorized", refused.Code == "registry-refused":
		r.Reason, r.Retry = reasonImageUnavailable, retry
	}
	if r.Reason == reasonImageUnavailable {
		r.Message += " Hearth must see an image before it records the function: push it, or let the API's credentials read it; it is tried again."
	}
	return r
}

// waiting are functions of tenants that have no room for them.
type waiting struct {
	mu sync.Mutex
	of map[string]map[string]struct{} // names by tenant
}

// add returns after what time to look again, where nothing else says so.
func (w *waiting) add(tenant, name string) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of == nil {
		w.of = map[string]map[string]struct{}{}
	}
	if w.of[tenant] == nil {
		w.of[tenant] = map[string]struct{}{}
	}
	w.of[tenant][name] = struct{}{}
	return quotaRetry + time.Duration(len(w.of[tenant]))*quotaRetryEach
}

func (w *waiting) remove(tenant, name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if delete(w.of[tenant], name); len(w.of[tenant]) == 0 {
		delete(w.of, tenant)
	}
}

// some are a few of the tenant's.
func (w *waiting) some(tenant string) (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range w.of[tenant] {
		if names = append(names, name); len(names) == quotaWakes {
			break
		}
	}
	return names
}
