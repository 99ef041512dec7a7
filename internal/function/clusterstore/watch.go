package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// sink puts what a reflector sees into memory.
type sink struct {
	key    func(obj any) (key, types.UID, uint64, bool)
	put    func(obj any)
	remove func(k key, uid types.UID, rv uint64)
	// missing returns what memory has although a list of that version does not.
	missing func(listed map[key]bool, rv uint64) map[key]types.UID
	once    sync.Once
	synced  chan struct{}
}

var _ cache.ReflectorStore = (*sink)(nil)

// Add implements cache.ReflectorStore.
func (s *sink) Add(obj any) error { s.put(obj); return nil }

// Update implements cache.ReflectorStore.
func (s *sink) Update(obj any) error { s.put(obj); return nil }

// Delete implements cache.ReflectorStore.
func (s *sink) Delete(obj any) error {
	if k, uid, rv, ok := s.key(obj); ok {
		s.remove(k, uid, rv)
	}
	return nil
}

// Replace implements cache.ReflectorStore.
func (s *sink) Replace(list []any, resourceVersion string) error {
	rv := versionOf(resourceVersion)
	listed := make(map[key]bool, len(list))
	for _, obj := range list {
		if k, _, _, ok := s.key(obj); ok {
			listed[k] = true
		}
	}
	for k, uid := range s.missing(listed, rv) {
		s.remove(k, uid, rv)
	}
	for _, obj := range list {
		s.put(obj)
	}
	s.once.Do(func() { close(s.synced) })
	return nil
}

// Resync implements cache.ReflectorStore.
func (s *sink) Resync() error { return nil }

// identify is the key of an object.
func identify(obj any) (key, types.UID, uint64, bool) {
	m, ok := obj.(metav1.Object)
	if !ok {
		return key{}, "", 0, false
	}
	return key{Namespace: m.GetNamespace(), Name: m.GetName()}, m.GetUID(), versionOf(m.GetResourceVersion()), true
}

func missingFrom[V any](m *memory, t *table[V]) func(map[key]bool, uint64) map[key]types.UID {
	return func(listed map[key]bool, rv uint64) map[key]types.UID {
		m.mu.RLock()
		defer m.mu.RUnlock()
		out := map[key]types.UID{}
		for _, k := range t.missing(listed, rv) {
			out[k] = t.rows[k].uid
		}
		return out
	}
}

// source is one kind of objects to follow.
type source struct {
	name string
	kind runtime.Object
	list func(context.Context, metav1.ListOptions) (runtime.Object, error)
	// watch opens a watch.
	watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
	sink  *sink
}

// follow reads everything and goes on watching until background ends. It
// returns when all was read once.
func (s *Store) follow(ctx, background context.Context) error {
	functions, rest := s.sources()
	// Functions first: what they name was written before them, so that a later
	// list has it.
	if err := s.start(ctx, background, functions); err != nil {
		return err
	}
	if err := s.start(ctx, background, rest...); err != nil {
		return err
	}
	// Whatever this process says from now on is newer than what one before it said.
	call, cancel := call(ctx)
	defer cancel()
	rv, err := s.currentVersion(call)
	if err != nil {
		return err
	}
	s.mem.mu.Lock()
	s.mem.generation = rv // what reading counted means nothing to anybody
	s.mem.mu.Unlock()
	return nil
}

func (s *Store) start(ctx, background context.Context, sources ...source) error {
	logger := logr.FromSlogHandler(s.log.Handler())
	for _, src := range sources {
		lw := &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				if o.ResourceVersion == "0" {
					o.ResourceVersion = "" // what is listed must have all that was acknowledged
				}
				return src.list(ctx, o)
			},
			WatchFuncWithContext: src.watch,
		}
		r := cache.NewReflectorWithOptions(lw, src.kind, src.sink, cache.ReflectorOptions{
			Name: "hearth-" + src.name, Logger: &logger, Backoff: watchBackoff(),
		})
		s.running.Go(func() { r.RunWithContext(background) })
	}
	for _, src := range sources {
		select {
		case <-src.sink.synced:
		case <-ctx.Done():
			return storeError("read all "+src.name, errors.Join(errors.New("the API server did not answer in time; may this identity list and watch them?"), ctx.Err()))
		}
	}
	return nil
}

// watchBackoff is between attempts to watch an API server that is away.
// client-go's own grows to a minute, for clients as many as kubelets: for that
// long after the API server is back, nodes would hear of no change and submits
// wait. There are a few replicas only, and each has six watches.
func watchBackoff() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Cap: 3 * time.Second, Steps: 16}
}

func (s *Store) sources() (functions source, rest []source) {
	m := s.mem
	ours := func(o metav1.ListOptions) metav1.ListOptions { o.LabelSelector = labelFunction; return o }
	engines := func(o metav1.ListOptions) metav1.ListOptions {
		o.LabelSelector = discoveryv1.LabelServiceName + "=" + engineService
		return o
	}
	functions = source{
		name: "functions", kind: &kube.Function{},
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			out := new(kube.FunctionList)
			return out, s.api.Get().Resource(v1alpha1.FunctionsResource).VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(out)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			return s.api.Get().Resource(v1alpha1.FunctionsResource).VersionedParams(&o, metav1.ParameterCodec).Watch(ctx)
		},
		sink: newSink(func(obj any) { m.putFunction(slim(obj.(*kube.Function))) }, m.removeFunction, missingFrom(m, &m.functions)),
	}
	rest = []source{
		{
			name: "hosts", kind: &kube.Host{},
			list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				out := new(kube.HostList)
				return out, s.api.Get().Resource(v1alpha1.HostsResource).VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(out)
			},
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.Watch = true
				return s.api.Get().Resource(v1alpha1.HostsResource).VersionedParams(&o, metav1.ParameterCodec).Watch(ctx)
			},
			sink: newSink(func(obj any) { s.sawHost(obj.(*kube.Host)) },
				func(k key, uid types.UID, rv uint64) { m.removeHost(k.Name, uid, rv) }, missingFrom(m, &m.hosts)),
		},
		{
			name: "revisions", kind: &appsv1.ControllerRevision{},
			list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return s.kube.AppsV1().ControllerRevisions("").List(ctx, ours(o))
			},
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.kube.AppsV1().ControllerRevisions("").Watch(ctx, ours(o))
			},
			sink: newSink(func(obj any) { s.sawRevision(obj.(*appsv1.ControllerRevision)) }, m.removeRevision, missingFrom(m, &m.revisions)),
		},
		{
			name: "secrets", kind: &corev1.Secret{},
			list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return s.kube.CoreV1().Secrets("").List(ctx, ours(o))
			},
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.kube.CoreV1().Secrets("").Watch(ctx, ours(o))
			},
			sink: newSink(func(obj any) { s.sawSecret(obj.(*corev1.Secret)) }, m.removeSecret, missingFrom(m, &m.secrets)),
		},
		{
			name: "nodes", kind: &metav1.PartialObjectMetadata{},
			list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return s.meta.Resource(corev1.SchemeGroupVersion.WithResource("nodes")).List(ctx, o)
			},
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.meta.Resource(corev1.SchemeGroupVersion.WithResource("nodes")).Watch(ctx, o)
			},
			sink: newSink(func(obj any) {
				n := obj.(*metav1.PartialObjectMetadata)
				m.putLabels(&m.nodes, key{Name: n.Name}, meta{n.UID, versionOf(n.ResourceVersion)}, n.Labels)
			}, func(k key, uid types.UID, rv uint64) { m.removeLabels(&m.nodes, k, uid, rv) }, missingFrom(m, &m.nodes)),
		},
		{
			name: "gateways", kind: &discoveryv1.EndpointSlice{},
			list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return s.kube.DiscoveryV1().EndpointSlices(s.o.Namespace).List(ctx, engines(o))
			},
			watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.kube.DiscoveryV1().EndpointSlices(s.o.Namespace).Watch(ctx, engines(o))
			},
			sink: newSink(func(obj any) {
				e := obj.(*discoveryv1.EndpointSlice)
				m.putLabels(&m.slices, key{Namespace: e.Namespace, Name: e.Name}, meta{e.UID, versionOf(e.ResourceVersion)}, gatewaysOf(e))
			}, func(k key, uid types.UID, rv uint64) { m.removeLabels(&m.slices, k, uid, rv) }, missingFrom(m, &m.slices)),
		},
	}
	return functions, rest
}

func newSink(put func(any), remove func(key, types.UID, uint64), missing func(map[key]bool, uint64) map[key]types.UID) *sink {
	return &sink{key: identify, put: put, remove: remove, missing: missing, synced: make(chan struct{})}
}

// slim drops what is large and never read.
func slim(f *kube.Function) *kube.Function {
	f.ManagedFields = nil // the API server keeps its own where a write has none
	return f
}

// gatewaysOf are the addresses of the ready endpoints, by node.
func gatewaysOf(e *discoveryv1.EndpointSlice) map[string]string {
	out := map[string]string{}
	for _, p := range e.Endpoints {
		if p.NodeName == nil || len(p.Addresses) == 0 || p.Conditions.Ready != nil && !*p.Conditions.Ready {
			continue
		}
		out[*p.NodeName] = net.JoinHostPort(p.Addresses[0], strconv.Itoa(gatewayPort))
	}
	return out
}

func (s *Store) sawHost(h *kube.Host) {
	s.mem.putHost(h.Name, meta{h.UID, versionOf(h.ResourceVersion)}, h.Spec)
}

func (s *Store) sawRevision(cr *appsv1.ControllerRevision) {
	d, err := readRevision(cr)
	if err != nil {
		s.log.Warn("a revision is passed over", "err", err)
		return
	}
	s.mem.putRevision(key{Namespace: cr.Namespace, Name: cr.Name}, meta{cr.UID, versionOf(cr.ResourceVersion)},
		&revisionObject{function: key{Namespace: cr.Namespace, Name: cr.Labels[labelFunction]}, name: cr.Name, data: d})
}

func (s *Store) sawSecret(o *corev1.Secret) {
	values := make(map[string]string, len(o.Data))
	for k, v := range o.Data {
		values[k] = string(v)
	}
	s.mem.putSecret(key{Namespace: o.Namespace, Name: o.Name}, meta{o.UID, versionOf(o.ResourceVersion)},
		&secretObject{function: key{Namespace: o.Namespace, Name: o.Labels[labelFunction]}, values: values})
}

// currentVersion is the API server's newest resource version.
func (s *Store) currentVersion(ctx context.Context) (uint64, error) {
	list := new(kube.HostList)
	err := s.api.Get().Resource(v1alpha1.HostsResource).VersionedParams(&metav1.ListOptions{Limit: 1}, metav1.ParameterCodec).Do(ctx).Into(list)
	if err != nil {
		return 0, storeError("ask for the newest resource version", err)
	}
	n := versionOf(list.ResourceVersion)
	if n == 0 {
		return 0, fmt.Errorf("the API server's resource version %q is not a number, as Kubernetes 1.35 and later have it", list.ResourceVersion)
	}
	return n, nil
}
