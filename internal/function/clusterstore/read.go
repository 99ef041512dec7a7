package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// settleTime is how long a watch gets to deliver what another process knows
// already.
const settleTime = time.Second

// maxTold bounds of how many nodes it is remembered what they were told. Beyond
// it a node is told again what it knows.
const maxTold = 5000

// generationSlack is how far a generation can be ahead of the resource version:
// changes that arrive in another order than they were made in are counted up.
const generationSlack = 100

// lookup returns the entry as memory has it, or nil, and what is closed at the
// next change.
func (s *Store) lookup(ctx context.Context, name string) (*entry, <-chan struct{}, error) {
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	if s.mem.closed {
		return nil, nil, function.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	return s.mem.entries[name], s.mem.changed, nil
}

// find returns the entry; a name that memory does not know is asked for: it
// may have been made by another process a moment ago.
func (s *Store) find(ctx context.Context, name string) (*entry, <-chan struct{}, error) {
	e, changed, err := s.lookup(ctx, name)
	if err != nil || e != nil {
		return e, changed, err
	}
	if function.ValidateName(name) != nil {
		return nil, changed, function.ErrNotFound
	}
	if e, _, err = s.refresh(ctx, name); err == nil && e == nil {
		err = function.ErrNotFound
	}
	return e, changed, err
}

// refresh asks the API server for a function and the claim of its name, and
// for what else is missing to read it. It returns nil for one that does not
// exist or was not recorded yet; claim is nil when nobody has the name.
func (s *Store) refresh(ctx context.Context, name string) (*entry, *kube.Host, error) {
	claim, err := s.getHost(ctx, name)
	if err != nil || claim == nil {
		return nil, nil, err
	}
	f, err := s.getFunction(ctx, key{Namespace: claim.Spec.Namespace, Name: name})
	if err != nil || f == nil {
		return nil, claim, err
	}
	e, err := s.complete(ctx, f)
	return e, claim, err
}

func (s *Store) getHost(ctx context.Context, name string) (*kube.Host, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	h := new(kube.Host)
	err := s.api.Get().Resource(v1alpha1.HostsResource).Name(name).Do(ctx).Into(h)
	if apierrors.IsNotFound(err) && !notServed(err) {
		return nil, nil
	}
	if err != nil {
		return nil, storeError("look up the name "+name, err)
	}
	s.sawHost(h)
	return h, nil
}

// getFunction returns the object as it is now, nil if there is none.
func (s *Store) getFunction(ctx context.Context, k key) (*kube.Function, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	f := new(kube.Function)
	err := s.api.Get().Namespace(k.Namespace).Resource(v1alpha1.FunctionsResource).Name(k.Name).Do(ctx).Into(f)
	if apierrors.IsNotFound(err) && !notServed(err) {
		s.mem.mu.RLock()
		old, known := s.mem.functions.rows[k]
		s.mem.mu.RUnlock()
		if known {
			s.mem.removeFunction(k, old.uid, old.rv)
		}
		return nil, nil
	}
	if err != nil {
		return nil, storeError("read function "+k.String(), err)
	}
	s.mem.putFunction(slim(f))
	if f.DeletionTimestamp != nil {
		return nil, nil
	}
	return f, nil
}

// complete fetches what memory lacks to read f, which is in memory, and
// returns its entry; nil if f is not recorded.
func (s *Store) complete(ctx context.Context, f *kube.Function) (*entry, error) {
	k := key{Namespace: f.Namespace, Name: f.Name}
	s.mem.mu.RLock()
	e, err := s.mem.build(k)
	s.mem.mu.RUnlock()
	if err == nil {
		return e, nil
	}
	rec, _ := readRecord(f.Annotations)
	i := slices.IndexFunc(rec.revisions, func(r revisionRef) bool { return r.number == rec.wanted })
	name := k.Name + "-" + rec.revisions[i].suffix
	c, cancel := call(ctx)
	defer cancel()
	cr, err := s.kube.AppsV1().ControllerRevisions(k.Namespace).Get(c, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, storeError("read revision "+name, err)
	}
	s.sawRevision(cr)
	if d, err := readRevision(cr); err == nil && d.ValuesIn != "" {
		secret, err := s.kube.CoreV1().Secrets(k.Namespace).Get(c, d.ValuesIn, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, storeError("read the secrets of "+name, err)
		}
		s.sawSecret(secret)
	}
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	if e, err = s.mem.build(k); errors.Is(err, errIncomplete) {
		return nil, nil
	}
	return e, err
}

// Get implements function.Reader.
func (s *Store) Get(ctx context.Context, name string) (function.Function, error) {
	e, _, err := s.find(ctx, name)
	if err != nil {
		return function.Function{}, err
	}
	return e.fn, nil
}

// List implements function.Reader.
func (s *Store) List(ctx context.Context, o function.ListOptions) (function.Page, error) {
	m := s.mem
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return function.Page{}, function.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return function.Page{}, err
	}
	return function.PageOf(m.names, o, func(name string) *function.Function { return &m.entries[name].fn }), nil
}

// Revisions implements function.Reader.
func (s *Store) Revisions(ctx context.Context, name string) ([]function.Revision, error) {
	e, _, err := s.find(ctx, name)
	if err != nil {
		return nil, err
	}
	revs := slices.Clone(e.revs)
	slices.Reverse(revs)
	return revs, nil
}

// Watch implements function.Reader.
func (s *Store) Watch(ctx context.Context, name, etag string) (function.Function, error) {
	e, changed, err := s.find(ctx, name)
	for {
		switch {
		case err != nil:
			return function.Function{}, err
		case e == nil:
			return function.Function{}, function.ErrNotFound
		case e.fn.ETag != etag:
			return e.fn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return function.Function{}, ctx.Err()
		}
		e, changed, err = s.lookup(ctx, name)
	}
}

// Stats implements function.Reader.
func (s *Store) Stats(ctx context.Context) (function.Stats, error) {
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	if s.mem.closed {
		return function.Stats{}, function.ErrClosed
	}
	st := function.Stats{ByState: map[v1alpha1.FunctionState]int{}}
	for _, e := range s.mem.entries {
		st.ByState[e.fn.Revision.State]++
	}
	return st, ctx.Err()
}

// Desired implements function.NodeSource for a node that everything is placed
// on, and that has no peers.
func (s *Store) Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error) {
	return s.desired(ctx, after, nil, func(d *v1alpha1.Desired, e *entry) {
		f := e.desired
		f.Routes = s.routes(e, d.BaseDomain)
		d.Functions = append(d.Functions, f)
	})
}

// DesiredFor is Desired for one node of the cluster. Functions that are placed
// on it come with candidates and secrets, all others with the addresses of the
// nodes that serve them. Each revision has a placement of its own: one that
// answers stays on its nodes until the wanted one answers on others, and is told
// to no node that it was not placed on.
func (s *Store) DesiredFor(ctx context.Context, node string, after uint64) (v1alpha1.Desired, error) {
	if node == "" {
		return v1alpha1.Desired{}, &function.ValidationError{Field: "node", Reason: "must be the name of a node"}
	}
	// Functions that did not change since are as they were told.
	s.mu.Lock()
	last, known := s.told[node]
	s.mu.Unlock()
	if known = known && after != 0 && last.Generation == after; !known {
		last = v1alpha1.Desired{}
	}
	var gateways map[string]string
	var next int // of last.Functions
	var changed bool
	begin := func(d *v1alpha1.Desired) {
		gateways = s.mem.gateways()
		d.Gateways = others(node, slices.Sorted(maps.Keys(gateways)), gateways)
		next, changed = 0, false
	}
	add := func(d *v1alpha1.Desired, e *entry) {
		was := -1
		for next < len(last.Functions) && last.Functions[next].Name < e.key.Name {
			next, changed = next+1, true // it is gone
		}
		if next < len(last.Functions) && last.Functions[next].Name == e.key.Name {
			was = next
			next++
		}
		if was >= 0 && e.since <= after && s.mem.everywhere <= after && last.BaseDomain == d.BaseDomain {
			d.Functions = append(d.Functions, last.Functions[was])
			return
		}
		f := s.mem.placedOn(e, node)
		f.Routes = s.routes(e, d.BaseDomain)
		f.Peers = others(node, e.serving, gateways)
		changed = changed || was < 0 || !reflect.DeepEqual(last.Functions[was], f)
		d.Functions = append(d.Functions, f)
	}
	for {
		d, err := s.desired(ctx, after, begin, add)
		if err != nil {
			return d, err
		}
		// Most of what matters to some node changes nothing for this one.
		same := known && !changed && next == len(last.Functions) && last.BaseDomain == d.BaseDomain && slices.Equal(last.Gateways, d.Gateways)
		if !same {
			s.mu.Lock()
			if _, ok := s.told[node]; ok || len(s.told) < maxTold {
				s.told[node] = d
			}
			s.mu.Unlock()
			return d, nil
		}
		if err := s.passOver(ctx, d.Generation); err != nil {
			return v1alpha1.Desired{}, err
		}
	}
}

// passOver waits until there is another generation.
func (s *Store) passOver(ctx context.Context, generation uint64) error {
	for {
		s.mem.mu.RLock()
		closed, now, changed := s.mem.closed, s.mem.generation, s.mem.changed
		s.mem.mu.RUnlock()
		switch {
		case closed:
			return function.ErrClosed
		case now != generation:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// routes are the ways to a function that an engine does not know by itself:
// its additional host, and its own where that is not <name>.<base domain>.
func (s *Store) routes(e *entry, base string) []v1alpha1.HostRoute {
	if s.o.Host == nil {
		return e.desired.Routes
	}
	host := s.o.Host(e.key.Namespace, e.key.Name)
	if host == "" || base != "" && host == e.key.Name+"."+base {
		return e.desired.Routes
	}
	return append(slices.Clone(e.desired.Routes), v1alpha1.HostRoute{Host: host, Path: "/"})
}

// others are the gateways of those of the nodes (sorted) that are not this one.
// Each node begins at another one, so that no node gets the requests of all.
func others(node string, nodes []string, gateways map[string]string) []string {
	var out []string
	first, _ := slices.BinarySearch(nodes, node)
	for i := range nodes {
		n := nodes[(first+i)%len(nodes)]
		if address := gateways[n]; n != node && address != "" && len(out) < v1alpha1.MaxPeers {
			out = append(out, address)
		}
	}
	return out
}

// desired waits until the generation is not after; begin, if not nil, and add
// are called under the memory's lock.
func (s *Store) desired(ctx context.Context, after uint64, begin func(*v1alpha1.Desired), add func(*v1alpha1.Desired, *entry)) (v1alpha1.Desired, error) {
	m := s.mem
	asked := false
	for {
		m.mu.RLock()
		closed, generation, changed := m.closed, m.generation, m.changed
		if !closed && (generation > after || asked && generation != after) {
			base := ""
			if s.o.BaseDomain != nil {
				base = s.o.BaseDomain()
			}
			d := v1alpha1.Desired{Generation: generation, BaseDomain: base, Functions: make([]v1alpha1.DesiredFunction, 0, len(m.names))}
			if begin != nil {
				begin(&d)
			}
			for _, name := range m.names {
				if e := m.entries[name]; e.engines {
					add(&d, e)
				}
			}
			m.mu.RUnlock()
			return d, nil
		}
		m.mu.RUnlock()
		switch {
		case closed:
			return v1alpha1.Desired{}, function.ErrClosed
		case ctx.Err() != nil:
			return v1alpha1.Desired{}, ctx.Err()
		case generation < after:
			// The node has been told something newer, by another process.
			if err := s.catchUp(ctx, after); err != nil {
				return v1alpha1.Desired{}, err
			}
			asked = true
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return v1alpha1.Desired{}, ctx.Err()
		}
	}
}

// catchUp takes over a generation that another process has told a node, unless
// it cannot have. Two processes come to different numbers for the same content:
// one counts from what changed, one that started later from what it found.
// Without this a node that asks them in turn would be answered at once each time.
func (s *Store) catchUp(ctx context.Context, generation uint64) error {
	c, cancel := call(ctx)
	defer cancel()
	rv, err := s.currentVersion(c)
	if err != nil {
		return err
	}
	if rv+generationSlack < generation {
		return nil // of another cluster, or nonsense
	}
	// Changes up to there are on their way on our watches. One that comes later
	// than this makes a generation of its own, newer than this one.
	t := time.NewTimer(settleTime)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mem.mu.Lock()
	defer s.mem.mu.Unlock()
	s.mem.generation = max(s.mem.generation, generation)
	return nil
}

// Subscribe calls notify with the namespace and name of every function there
// is, then of each that changes or goes, until cancel is called. notify must
// not block and must not call back; adding to a work queue is what it is for.
func (s *Store) Subscribe(notify func(namespace, name string)) (cancel func()) {
	sub := &subscriber{notify: func(k key) { notify(k.Namespace, k.Name) }}
	m := s.mem
	m.mu.Lock()
	m.subscribers[sub] = struct{}{}
	known := slices.Collect(maps.Keys(m.functions.rows))
	m.mu.Unlock()
	for _, k := range known {
		sub.notify(k)
	}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subscribers, sub)
	}
}

// Function returns the object as memory has it, with its recorded revisions,
// oldest first. Without any it was not recorded (yet): see Adopt. The error is
// function.ErrNotFound or function.ErrClosed.
func (s *Store) Function(namespace, name string) (*kube.Function, []function.Revision, error) {
	k := key{Namespace: namespace, Name: name}
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	if s.mem.closed {
		return nil, nil, function.ErrClosed
	}
	f := s.mem.functions.rows[k].value
	if f == nil {
		return nil, nil, fmt.Errorf("%w: %s", function.ErrNotFound, k)
	}
	var revs []function.Revision
	if e := s.mem.entries[name]; e != nil && e.key == k {
		revs = slices.Clone(e.revs)
	}
	return f.DeepCopy(), revs, nil
}
