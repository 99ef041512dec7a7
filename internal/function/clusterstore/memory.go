package clusterstore

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// goneFor is how long a deletion of our own is remembered: events from before
// it that arrive late must not bring the object back.
const goneFor = 10 * time.Minute

type key = types.NamespacedName

// meta is what the memory needs to know of any object.
type meta struct {
	uid types.UID
	rv  uint64
}

func versionOf(resourceVersion string) uint64 {
	// Resource versions are numbers that can be compared (KEP-5504).
	n, _ := strconv.ParseUint(resourceVersion, 10, 64)
	return n
}

// table is the newest known state of the objects of one kind, from watches and
// from the answers to our own writes, in whatever order these arrive.
type table[V any] struct {
	rows map[key]row[V]
	gone map[types.UID]time.Time
}

type row[V any] struct {
	meta
	value V
}

func newTable[V any]() table[V] {
	return table[V]{rows: map[key]row[V]{}, gone: map[types.UID]time.Time{}}
}

// put takes in a state and says whether it is news.
func (t *table[V]) put(k key, m meta, v V) bool {
	if _, gone := t.gone[m.uid]; gone {
		return false
	}
	if old, ok := t.rows[k]; ok && old.rv >= m.rv {
		return false
	}
	t.rows[k] = row[V]{m, v}
	return true
}

// remove takes in the deletion of the object with that UID.
func (t *table[V]) remove(k key, uid types.UID, now time.Time) bool {
	for id, at := range t.gone {
		if now.Sub(at) > goneFor {
			delete(t.gone, id)
		}
	}
	t.gone[uid] = now
	if old, ok := t.rows[k]; !ok || old.uid != uid {
		return false
	}
	delete(t.rows, k)
	return true
}

// missing returns what a complete list of version rv should have had.
func (t *table[V]) missing(listed map[key]bool, rv uint64) []key {
	var out []key
	for k, r := range t.rows {
		if !listed[k] && r.rv <= rv {
			out = append(out, k)
		}
	}
	return out
}

type revisionObject struct {
	function key
	name     string
	data     revisionData
}

type secretObject struct {
	function key
	values   map[string]string
}

// memory is everything readers need. Objects in it are never modified.
type memory struct {
	// mu guards all of it. It is never held during a request.
	mu     sync.RWMutex
	closed bool

	functions table[*kube.Function]
	revisions table[*revisionObject]
	secrets   table[*secretObject]
	hosts     table[v1alpha1.HostSpec]
	nodes     table[map[string]string]           // labels
	slices    table[map[string]string]           // gateway by node
	kept      map[key]map[string]*revisionObject // of a function, by name

	entries  map[string]*entry
	names    []string // sorted keys of entries
	requests map[string]doneRequest

	// generation is the resource version of the newest change that matters to
	// a node.
	generation uint64
	// everywhere is the generation of the newest change that is not of one
	// function: of nodes, their gateways or the base domain.
	everywhere uint64
	// changed is closed and replaced at every change, to wake waiters.
	changed     chan struct{}
	subscribers map[*subscriber]struct{}
}

type subscriber struct{ notify func(key) }

type doneRequest struct {
	function string
	change   change
}

func newMemory() *memory {
	return &memory{
		functions: newTable[*kube.Function](), revisions: newTable[*revisionObject](), secrets: newTable[*secretObject](),
		hosts: newTable[v1alpha1.HostSpec](), nodes: newTable[map[string]string](), slices: newTable[map[string]string](),
		kept:    map[key]map[string]*revisionObject{},
		entries: map[string]*entry{}, requests: map[string]doneRequest{},
		generation: 1, changed: make(chan struct{}), subscribers: map[*subscriber]struct{}{},
	}
}

// entry is one function as readers see it. It is replaced, never modified.
type entry struct {
	key     key
	object  *kube.Function
	rec     record
	fn      function.Function
	revs    []function.Revision // ascending; those whose objects are known
	desired v1alpha1.DesiredFunction
	// placements are the labels that a node must have for each candidate of
	// desired, in their order.
	placements []map[string]string
	spin       bool
	// engines says that nodes' engines are to answer: for a spin function until
	// its pods do, with the revision that they had before.
	engines bool
	// host is the custom host that engines are to answer at, with routes below it.
	host   string
	routes []string
	// serving are the nodes that answer requests now, sorted.
	serving []string
	// since is the generation that it has been like this for nodes since.
	since uint64
}

var errIncomplete = errors.New("not all objects of the function are known yet")

// build makes the entry of a function from the objects in memory. nil without
// an error: there is nothing to see. It needs mu.
func (m *memory) build(k key) (*entry, error) {
	f := m.functions.rows[k].value
	if f == nil || f.DeletionTimestamp != nil {
		return nil, nil
	}
	rec, ok := readRecord(f.Annotations)
	if !ok {
		return nil, nil
	}
	claim, ok := m.hosts.rows[key{Name: k.Name}]
	if !ok {
		return nil, errIncomplete
	}
	if claim.value.Namespace != k.Namespace {
		return nil, nil
	}
	status := derive(f, rec, f.Status.Nodes, nil)
	history := make(map[int]*v1alpha1.RevisionStatus, len(status.History))
	for i := range status.History {
		history[status.History[i].Revision] = &status.History[i]
	}
	e := &entry{key: k, object: f, rec: rec}
	for _, ref := range rec.revisions {
		ro := m.kept[k][k.Name+"-"+ref.suffix]
		if ro == nil || ro.data.Number != ref.number {
			if ref.number == rec.wanted {
				return nil, errIncomplete
			}
			continue
		}
		var values map[string]string
		if ro.data.ValuesIn != "" {
			so, ok := m.secrets.rows[key{Namespace: k.Namespace, Name: ro.data.ValuesIn}]
			if !ok || so.value.function != k {
				if ref.number == rec.wanted {
					return nil, errIncomplete
				}
				continue
			}
			values = so.value.values
		}
		r := function.Revision{
			Number: ref.number, ModuleDigest: ro.data.ModuleDigest, SizeBytes: ro.data.SizeBytes, MemoryMinPages: ro.data.MemoryMinPages,
			Artifact: ro.data.Artifact, Settings: ro.data.settings(values), CreatedAt: ro.data.CreatedAt,
			Phases: ro.data.Phases, State: v1alpha1.StatePending,
		}
		if rec.recordOf == ref.number {
			r.Phases = append(slices.Clip(r.Phases), v1alpha1.Phase{Name: "record", Milliseconds: rec.recordMS})
		}
		if h := history[ref.number]; h != nil {
			r.State, r.Error, r.Retrying, r.NodePhases = h.State, h.Error, h.Retrying, h.Phases
			if h.ActivatedAt != nil {
				r.ActivatedAt = *h.ActivatedAt
			}
		}
		e.revs = append(e.revs, r)
	}
	i := slices.IndexFunc(e.revs, func(r function.Revision) bool { return r.Number == rec.wanted })
	e.fn = function.Function{
		Name: k.Name, Tenant: k.Namespace, CreatedAt: f.CreationTimestamp.UTC(), UpdatedAt: rec.updatedAt,
		Wanted: rec.wanted, Active: status.ActiveRevision, LastActive: lastActive(status), Warm: status.Warm,
		Revision: e.revs[i],
	}
	e.fn.ETag = function.NewETag(fmt.Sprintf("%s.%d", f.UID, rec.changes), e.fn)
	settings := e.fn.Revision.Settings
	e.spin = settings.Spin()
	e.desired, e.engines = function.NewDesired(e.fn, e.revs), true
	if e.spin {
		settings, e.engines = m.lend(e)
	}
	if settings.Host != "" {
		// Without the claim the name is somebody else's.
		if h, ok := m.hosts.rows[key{Name: settings.Host}]; ok && h.value.Namespace == k.Namespace {
			e.host, e.routes = settings.Host, settings.Routes
			routes := settings.Routes
			if len(routes) == 0 {
				routes = []string{"/"}
			}
			for _, path := range routes {
				e.desired.Routes = append(e.desired.Routes, v1alpha1.HostRoute{Host: settings.Host, Path: path})
			}
		}
	}
	for _, c := range e.desired.Candidates {
		e.placements = append(e.placements, e.placementOf(c.Revision))
	}
	for _, n := range f.Status.Nodes {
		if n.Serving != 0 {
			e.serving = append(e.serving, n.Name)
		}
	}
	return e, nil
}

// placementOf are the labels that a node must have for a revision; nil: none.
func (e *entry) placementOf(number int) map[string]string {
	for i := range e.revs {
		if p := e.revs[i].Settings.Placement; e.revs[i].Number == number && p != nil {
			return p.NodeSelector
		}
	}
	return nil
}

// lend reduces what engines should have of a spin function to the resident
// revision that answered last, and says whether they still should: until pods
// answer. The settings are that revision's.
func (m *memory) lend(e *entry) (function.Settings, bool) {
	if pods := nodeOf(e.object.Status.Nodes, NodeSpin); pods != nil && pods.Serving != 0 {
		return e.fn.Revision.Settings, false
	}
	for i := range e.revs {
		if r := &e.revs[i]; r.Number == e.fn.LastActive && !r.Settings.Spin() {
			e.desired.Candidates = slices.DeleteFunc(e.desired.Candidates, func(c v1alpha1.DesiredRevision) bool { return c.Revision != r.Number })
			return r.Settings, len(e.desired.Candidates) > 0
		}
	}
	return e.fn.Revision.Settings, false
}

// update makes the entry of a function anew after one of its objects changed
// at version rv. It needs mu.
func (m *memory) update(k key, rv uint64) {
	old := m.entries[k.Name]
	if old != nil && old.key != k {
		old = nil
	}
	e, err := m.build(k)
	if err != nil && old != nil && m.functions.rows[k].uid == old.object.UID {
		// The objects of one commit arrive on several watches. Until all are
		// here, what was before is the truth.
		return
	}
	i, found := slices.BinarySearch(m.names, k.Name)
	switch {
	case e != nil:
		m.entries[k.Name] = e
		if !found {
			m.names = slices.Insert(m.names, i, k.Name)
		}
		for _, c := range e.rec.requests {
			m.requests[c.key] = doneRequest{k.Name, c}
		}
	case old != nil:
		delete(m.entries, k.Name)
		m.names = slices.Delete(m.names, i, i+1)
	}
	if old != nil {
		for _, c := range old.rec.requests {
			if e == nil {
				delete(m.requests, c.key)
			} else if _, still := e.rec.request(c.key); !still {
				delete(m.requests, c.key)
			}
		}
	}
	if matters(old, e) {
		m.bump(rv)
		if e != nil {
			e.since = m.generation
		}
	} else if e != nil && old != nil {
		e.since = old.since
	}
}

// matters says whether a node could tell the two apart.
func matters(a, b *entry) bool {
	if a != nil && !a.engines {
		a = nil
	}
	if b != nil && !b.engines {
		b = nil
	}
	if a == nil || b == nil {
		return a != b
	}
	return a.key != b.key || a.object.UID != b.object.UID || !slices.EqualFunc(a.placements, b.placements, maps.Equal) || !slices.Equal(a.serving, b.serving) ||
		!reflect.DeepEqual(a.desired, b.desired)
}

// bump makes a new generation. It needs mu.
func (m *memory) bump(rv uint64) { m.generation = max(m.generation+1, rv) }

// bumpAll makes a new generation in which every function may be another for some
// node. It needs mu.
func (m *memory) bumpAll(rv uint64) {
	m.bump(rv)
	m.everywhere = m.generation
}

// wake wakes all waiters. It needs mu.
func (m *memory) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.closed = true
		m.wake()
	}
}

// notify tells subscribers, outside of mu.
func (m *memory) notify(keys ...key) {
	m.mu.RLock()
	subscribers := slices.Collect(maps.Keys(m.subscribers))
	m.mu.RUnlock()
	for _, s := range subscribers {
		for _, k := range keys {
			s.notify(k)
		}
	}
}

func (m *memory) putFunction(f *kube.Function) {
	k := key{Namespace: f.Namespace, Name: f.Name}
	m.mu.Lock()
	news := m.functions.put(k, meta{f.UID, versionOf(f.ResourceVersion)}, f)
	if news {
		m.update(k, versionOf(f.ResourceVersion))
		m.wake()
	}
	m.mu.Unlock()
	if news {
		m.notify(k)
	}
}

func (m *memory) removeFunction(k key, uid types.UID, rv uint64) {
	m.mu.Lock()
	news := m.functions.remove(k, uid, time.Now())
	if news {
		m.update(k, rv)
		m.wake()
	}
	m.mu.Unlock()
	if news {
		m.notify(k)
	}
}

func (m *memory) putRevision(k key, mt meta, ro *revisionObject) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.revisions.put(k, mt, ro) {
		return
	}
	if m.kept[ro.function] == nil {
		m.kept[ro.function] = map[string]*revisionObject{}
	}
	m.kept[ro.function][ro.name] = ro
	m.affects(ro.function, mt.rv)
}

func (m *memory) removeRevision(k key, uid types.UID, rv uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ro := m.revisions.rows[k].value
	if !m.revisions.remove(k, uid, time.Now()) {
		return
	}
	delete(m.kept[ro.function], ro.name)
	if len(m.kept[ro.function]) == 0 {
		delete(m.kept, ro.function)
	}
	m.affects(ro.function, rv)
}

func (m *memory) putSecret(k key, mt meta, so *secretObject) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.secrets.put(k, mt, so) {
		m.affects(so.function, mt.rv)
	}
}

func (m *memory) removeSecret(k key, uid types.UID, rv uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	so := m.secrets.rows[k].value
	if m.secrets.remove(k, uid, time.Now()) {
		m.affects(so.function, rv)
	}
}

// affects updates a function and wakes waiters if that changed anything they
// can see. It needs mu.
func (m *memory) affects(k key, rv uint64) {
	before := m.entries[k.Name]
	m.update(k, rv)
	if m.entries[k.Name] != before {
		m.wake()
	}
}

func (m *memory) putHost(name string, mt meta, spec v1alpha1.HostSpec) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, had := m.hosts.rows[key{Name: name}]
	if !m.hosts.put(key{Name: name}, mt, spec) {
		return
	}
	if !had || old.value.Namespace != spec.Namespace {
		m.hostAffects(name, mt.rv)
	}
}

func (m *memory) removeHost(name string, uid types.UID, rv uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hosts.remove(key{Name: name}, uid, time.Now()) {
		m.hostAffects(name, rv)
	}
}

// hostAffects updates all functions that a claim could concern. Claims change
// hands rarely. It needs mu.
func (m *memory) hostAffects(name string, rv uint64) {
	for k, r := range m.functions.rows {
		if k.Name == name || r.value.Spec.Host == name {
			m.update(k, rv)
		}
	}
	m.wake()
}

// put of nodes and gateways.
func (m *memory) putLabels(t *table[map[string]string], k key, mt meta, v map[string]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := t.rows[k].value
	if t.put(k, mt, v) && !maps.Equal(old, v) {
		m.bumpAll(mt.rv)
		m.wake()
	}
}

func (m *memory) removeLabels(t *table[map[string]string], k key, uid types.UID, rv uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.remove(k, uid, time.Now()) {
		m.bumpAll(rv)
		m.wake()
	}
}

// gateways are the address of each node that has one. It needs mu.
func (m *memory) gateways() map[string]string {
	out := map[string]string{}
	for _, r := range m.slices.rows {
		maps.Copy(out, r.value)
	}
	return out
}

// wantedNodes are the nodes that should have a function with that placement,
// beside those that say they do. It needs mu.
func (m *memory) wantedNodes(placement map[string]string) []string {
	var out []string
	for node := range m.gateways() {
		if m.placed(placement, node) {
			out = append(out, node)
		}
	}
	return out
}

// placed says whether a function is to be had on a node. It needs mu.
func (m *memory) placed(placement map[string]string, node string) bool {
	if len(placement) == 0 {
		return true
	}
	labels := m.nodes.rows[key{Name: node}].value
	for k, v := range placement {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// placedOn is what of a function is to be had on a node: the candidates that are
// placed there. It needs mu.
func (m *memory) placedOn(e *entry, node string) v1alpha1.DesiredFunction {
	f := e.desired
	var candidates []v1alpha1.DesiredRevision
	timeout := e.fn.Revision.Settings.TimeoutMS
	for i, c := range f.Candidates {
		if m.placed(e.placements[i], node) {
			candidates = append(candidates, c)
		}
		timeout = max(timeout, c.TimeoutMS) // whichever answers elsewhere
	}
	switch len(candidates) {
	case len(f.Candidates):
	case 0:
		f = v1alpha1.DesiredFunction{Name: f.Name, Tenant: f.Tenant, TimeoutMS: timeout}
	default:
		f.Candidates = candidates
	}
	return f
}
