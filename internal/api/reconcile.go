package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/deploy"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/node"
)

const (
	// reconcilers is how many functions are worked on at once; each waits for
	// the API server most of the time.
	reconcilers = 4
	// collectEvery is how often what nobody refers to any more is looked for.
	collectEvery = time.Minute
	// hostsPause gathers changes of many functions into one look at all hosts.
	hostsPause = 100 * time.Millisecond
	// handover is how long the pods of a function that moves to the engines
	// answer beside them at most, once one engine has it: a node that is slow
	// or away holds nothing up, its engine forwards to the others. settle is
	// that time where every node has it.
	// hostSettle is the least of both where the function has a custom host: the
	// ingress controller needs a moment to learn that it leads to the engines.
	handover   = 10 * time.Second
	settle     = time.Second
	hostSettle = 5 * time.Second
	// hostsRetry is after the API server refused an Ingress.
	hostsRetry = 5 * time.Second
)

// queue is the work of one term: functions to look at, and whether the
// Ingresses of all are to be.
type queue struct {
	functions workqueue.TypedRateLimitingInterface[types.NamespacedName]
	hosts     chan struct{} // of capacity 1
	// told is what functions' statuses say of hosts that do not lead to them
	// (types.NamespacedName to string), by whichever leader: the one that said
	// it may be gone when it is so no longer.
	told sync.Map
	// waiting are functions without room in their tenant's quota.
	waiting waiting
}

func (q *queue) pokeHosts() {
	select {
	case q.hosts <- struct{}{}:
	default:
	}
}

// notify passes on what changed in the cluster to the term's queue, if there
// is one: whoever leads next looks at everything anyway.
func (a *api) notify() deploy.Notify {
	return deploy.Notify{
		Function: func(namespace, name string) {
			if q := a.queue.Load(); q != nil {
				q.functions.Add(types.NamespacedName{Namespace: namespace, Name: name})
			}
		},
		Hosts: func() {
			if q := a.queue.Load(); q != nil {
				q.pokeHosts()
			}
		},
		BaseDomain: func() {
			if store := a.known.Load(); store != nil {
				store.BaseDomainChanged()
			}
			if q := a.queue.Load(); q != nil {
				q.pokeHosts()
			}
		},
	}
}

// duties are what the leader does, until ctx ends.
func (a *api) duties(ctx context.Context) error {
	q := &queue{
		functions: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[types.NamespacedName]()),
		hosts:     make(chan struct{}, 1),
	}
	group, ctx := errgroup.WithContext(ctx)
	a.queue.Store(q)
	defer a.queue.Store(nil)
	a.metrics.leader.Set(1)
	defer a.metrics.leader.Set(0)
	defer a.metrics.queue.Set(0)
	unsubscribe := a.store.Subscribe(func(namespace, name string) {
		q.functions.Add(types.NamespacedName{Namespace: namespace, Name: name})
	})
	defer unsubscribe()
	q.pokeHosts()

	spin := deploy.NewSpin(a.cluster)
	for range reconcilers {
		group.Go(func() error {
			for a.next(ctx, q, spin) {
			}
			return nil
		})
	}
	group.Go(func() error { <-ctx.Done(); q.functions.ShutDown(); return nil })
	group.Go(func() error { a.lookAfterHosts(ctx, q); return nil })
	group.Go(func() error { a.collect(ctx); return nil })
	group.Go(func() error {
		recorder := node.NewRecorder(a.client, a.o.Instance, node.Options{Logger: a.log})
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { recorder.Run(ctx); return nil })
		group.Go(func() error {
			node.NewStaleConditions(a.client, a.o.StaleAfter, node.Options{Logger: a.log, Events: recorder}).Run(ctx)
			return nil
		})
		return group.Wait()
	})
	return group.Wait()
}

// next works on one function; false when the term is over.
func (a *api) next(ctx context.Context, q *queue, spin *deploy.Spin) bool {
	key, over := q.functions.Get()
	if over {
		return false
	}
	defer q.functions.Done(key)
	a.metrics.queue.Set(float64(q.functions.Len()))
	began := time.Now()
	again, err := a.reconcile(ctx, q, spin, key)
	a.metrics.passed(dutyFunctions, began, err, ctx.Err() != nil)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		a.log.Warn("a function was not reconciled", "namespace", key.Namespace, "function", key.Name, "error", err)
		if again > 0 {
			q.functions.AddAfter(key, again)
		} else {
			q.functions.AddRateLimited(key)
		}
	default:
		q.functions.Forget(key)
		if again > 0 {
			q.functions.AddAfter(key, again)
		}
	}
	return true
}

// reconcile does for one function what has not been done yet. It asks the API
// server nothing where memory says that nothing is to be done.
func (a *api) reconcile(ctx context.Context, q *queue, spin *deploy.Spin, key types.NamespacedName) (time.Duration, error) {
	f, revisions, err := a.store.Function(key.Namespace, key.Name)
	if errors.Is(err, function.ErrNotFound) {
		q.pokeHosts() // what was made of it goes by its owner references
		a.madeRoom(q, key)
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var again time.Duration
	if len(revisions) == 0 || f.Status.ObservedGeneration != f.Generation || f.Status.URL != a.wantedURL(key) || !clusterstore.Recorded(f) {
		if again, err = a.adopt(ctx, q, key); err != nil {
			return 0, err
		}
	}
	host := said(f, clusterstore.NodeIngress)
	if host != nil && host.Error != nil {
		q.told.LoadOrStore(key, host.Error.Detail)
	}
	if f.Spec.Host != "" || host != nil || said(f, deploy.NodeName) != nil {
		q.pokeHosts()
	}
	if f.Spec.Runtime != v1alpha1.RuntimeSpin && said(f, deploy.NodeName) == nil {
		return again, nil
	}
	after, err := a.rollOut(ctx, spin, key)
	if again > 0 && (after == 0 || again < after) {
		after = again
	}
	return after, err
}

// adopt has a function recorded that was applied, and says when to try again
// where it is not taken on for now.
func (a *api) adopt(ctx context.Context, q *queue, key types.NamespacedName) (time.Duration, error) {
	err := a.store.Adopt(withWake(ctx, func() { q.functions.Add(key) }), key.Namespace, key.Name)
	var refused *clusterstore.Refusal
	isRefused := errors.As(err, &refused)
	if isRefused && refused.Reason == reasonQuotaExceeded {
		return q.waiting.add(key.Namespace, key.Name), nil
	}
	q.waiting.remove(key.Namespace, key.Name)
	switch {
	case errors.Is(err, errInspecting):
		return 0, nil // there will be a call
	case isRefused:
		return refused.Retry, nil
	}
	return 0, err
}

// madeRoom has functions looked at that waited for one of their tenant to go.
func (a *api) madeRoom(q *queue, gone types.NamespacedName) {
	q.waiting.remove(gone.Namespace, gone.Name)
	if server := a.submit.Load(); server != nil {
		server.Gone(gone.Namespace, gone.Name)
	}
	for _, name := range q.waiting.some(gone.Namespace) {
		q.functions.Add(types.NamespacedName{Namespace: gone.Namespace, Name: name})
	}
}

func (a *api) wantedURL(key types.NamespacedName) string {
	if host := a.host(key.Namespace, key.Name); host != "" {
		return "http://" + host + "/"
	}
	return ""
}

// rollOut brings a spin function to the cluster, or takes what is left of one
// away.
func (a *api) rollOut(ctx context.Context, spin *deploy.Spin, key types.NamespacedName) (time.Duration, error) {
	r, err := a.store.Rollout(key.Namespace, key.Name)
	if errors.Is(err, function.ErrNotFound) {
		return 0, nil // not recorded: the change that records it comes this way again
	}
	if err != nil {
		return 0, err
	}
	if wait := handoverLeft(r.Object, r.Wanted.Number, time.Now()); wait > 0 {
		return wait, nil
	}
	in := deploy.Input{Function: r.Object, Wanted: deploy.Revision{Number: r.Wanted.Number, Spec: r.Wanted.Spec}}
	in.Elsewhere = enginesAnswer(r.Object)
	if r.Previous != nil && r.Previous.Spec.Runtime == v1alpha1.RuntimeSpin { // else it is the engines'
		in.Previous = &deploy.Revision{Number: r.Previous.Number, Spec: r.Previous.Spec}
	}
	began := time.Now()
	out, err := spin.Reconcile(ctx, in)
	a.metrics.passed(dutyRollout, began, err, ctx.Err() != nil)
	if out.Removed {
		err = errors.Join(err, a.store.Unobserve(ctx, key.Namespace, key.Name, deploy.NodeName))
	}
	if out.Node.Name != "" {
		if observed := a.store.Observe(ctx, key.Namespace, key.Name, out.Node, out.Phases); observed != nil {
			return 0, fmt.Errorf("say how the rollout goes: %w", observed)
		}
	}
	return out.RequeueAfter, err
}

// handoverLeft is for how long the pods of a function that is no spin function
// any more are to answer yet: until the engines do. A revision that no engine
// can serve leaves them as they are. 0: not at all.
func handoverLeft(f *kube.Function, wanted int, now time.Time) time.Duration {
	pods := said(f, deploy.NodeName)
	if f.Spec.Runtime == v1alpha1.RuntimeSpin || f.DeletionTimestamp != nil || pods == nil || pods.Serving == 0 || pods.Serving == wanted {
		return 0
	}
	engines, warm := 0, 0
	for _, n := range f.Status.Nodes {
		if n.Name == deploy.NodeName || n.Name == clusterstore.NodeIngress {
			continue
		}
		if engines++; n.Serving == wanted {
			warm++
		}
	}
	if warm == 0 {
		return handover // a change comes this way before
	}
	patience := handover
	if warm == engines && warm >= f.Status.WantedNodes-1 { // the pods count as one
		patience = settle
		if f.Spec.Host != "" {
			patience = hostSettle
		}
	}
	for _, h := range f.Status.History {
		if h.Revision == wanted && h.ActivatedAt != nil {
			return min(max(h.ActivatedAt.Add(patience).Sub(now), 0), patience)
		}
	}
	return 0
}

// enginesAnswer says whether a spin function has no pods that answer, and
// engines that do.
func enginesAnswer(f *kube.Function) bool {
	if pods := said(f, deploy.NodeName); pods != nil && pods.Serving != 0 {
		return false
	}
	return slices.ContainsFunc(f.Status.Nodes, func(n v1alpha1.FunctionNode) bool {
		return n.Name != clusterstore.NodeIngress && n.Serving != 0
	})
}

// said is what stands in the function's status under a node's name.
func said(f *kube.Function, name string) *v1alpha1.FunctionNode {
	for i := range f.Status.Nodes {
		if f.Status.Nodes[i].Name == name {
			return &f.Status.Nodes[i]
		}
	}
	return nil
}

// lookAfterHosts keeps the Ingresses of resident functions as they should be.
func (a *api) lookAfterHosts(ctx context.Context, q *queue) {
	hosts := deploy.NewHosts(a.cluster)
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.hosts:
		case <-again:
		}
		pause(ctx, hostsPause)
		began := time.Now()
		residents, err := a.residents()
		after := hostsRetry
		if err == nil {
			var out deploy.HostsOutcome
			if out, err = hosts.Reconcile(ctx, residents); err == nil {
				after = out.RequeueAfter
			}
			a.tellHosts(ctx, &q.told, out.Problems)
		}
		a.metrics.passed(dutyHosts, began, err, ctx.Err() != nil)
		if err != nil && ctx.Err() == nil {
			a.log.Warn("the ways to functions were not all made", "error", err)
		}
		again = nil
		if after > 0 {
			again = time.After(after)
		}
	}
}

// residents are the functions that the engines' Ingresses lead to.
func (a *api) residents() ([]deploy.Resident, error) {
	functions, err := a.store.AtEngines()
	residents := make([]deploy.Resident, 0, len(functions))
	for _, f := range functions {
		residents = append(residents, deploy.Resident(f))
	}
	return residents, err
}

// tellHosts says in functions' statuses which hosts do not lead to them, and
// takes back what is so no longer. told is what was said before.
func (a *api) tellHosts(ctx context.Context, told *sync.Map, problems map[types.NamespacedName]error) {
	for key, problem := range problems {
		says := deploy.FunctionError(problem)
		f, _, err := a.store.Function(key.Namespace, key.Name)
		if err != nil {
			continue
		}
		// What the status has counts, not what was once written into it: a
		// revision that was recorded at the same time may have replaced that.
		if n := said(f, clusterstore.NodeIngress); n != nil && n.Error != nil && n.Error.Detail == says.Detail && n.Revision == f.Status.Revision {
			told.Store(key, says.Detail)
			continue
		}
		n := v1alpha1.FunctionNode{
			Name: clusterstore.NodeIngress, Revision: f.Status.Revision, Progress: v1alpha1.ProgressQueued, Retrying: true,
			Error: says,
		}
		if err := a.store.Observe(ctx, key.Namespace, key.Name, n, nil); err != nil {
			a.log.Warn("a function was not told that a host does not lead to it", "namespace", key.Namespace, "function", key.Name, "error", err)
			continue
		}
		told.Store(key, says.Detail)
	}
	told.Range(func(k, _ any) bool {
		key, _ := k.(types.NamespacedName)
		if _, still := problems[key]; still {
			return true
		}
		if err := a.store.Unobserve(ctx, key.Namespace, key.Name, clusterstore.NodeIngress); err == nil || errors.Is(err, function.ErrNotFound) {
			told.Delete(key)
		}
		return true
	})
}

// collect removes what nobody refers to any more.
func (a *api) collect(ctx context.Context) {
	ticker := time.NewTicker(collectEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		began := time.Now()
		err := a.store.Collect(ctx)
		a.metrics.passed(dutyCollect, began, err, ctx.Err() != nil)
		if err != nil && ctx.Err() == nil {
			a.log.Warn("not all that is left over was removed", "error", err)
		}
	}
}
