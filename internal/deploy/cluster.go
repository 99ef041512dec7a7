package deploy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	spinAPIVersion = "core.spinkube.dev/v1alpha1"
	kedaAPIVersion = "keda.sh/v1alpha1"
	// scaledObjectKind is KEDA's autoscaler.
	scaledObjectKind = "ScaledObject"

	// A reconciliation makes about five requests; a leader that just began
	// makes those of every function.
	clientQPS   = 50
	clientBurst = 100

	// byHost indexes Ingresses by the hosts of their rules.
	byHost = "host"
	// acmeSolver marks the Ingresses by which cert-manager answers a challenge
	// below a host for minutes; they take the host from nobody.
	acmeSolver = "acme.cert-manager.io/http01-solver"
)

var (
	spinAppsGVR      = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinapps"}
	executorsGVR     = schema.GroupVersionResource{Group: "core.spinkube.dev", Version: "v1alpha1", Resource: "spinappexecutors"}
	ingressesGVR     = schema.GroupVersionResource{Group: "networking.k8s.io", Version: "v1", Resource: "ingresses"}
	hpasGVR          = schema.GroupVersionResource{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}
	scaledObjectsGVR = schema.GroupVersionResource{Group: "keda.sh", Version: "v1alpha1", Resource: "scaledobjects"}
	deploymentsGVR   = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
)

// Options configure NewCluster.
type Options struct {
	// Config is how to reach the API server. Its limits of requests are set here.
	Config *rest.Config
	// Namespace is where the engines and the API are. Default hearth-system.
	Namespace string
	Settings  Settings
	// Logger gets what no caller is there to be told. Default: none.
	Logger *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
	// WrapTransport sees every request; nil for none.
	WrapTransport func(http.RoundTripper) http.RoundTripper
}

// Notify says what changed in the cluster that is not a Function itself. The
// functions are called one at a time, must not block, and may be nil.
type Notify struct {
	// Function: a spin function's SpinApp, Deployment or Ingress.
	Function func(namespace, name string)
	// Hosts: an Ingress of the resident functions, or somebody's host.
	Hosts func()
	// BaseDomain: the load balancer's address. Every function's host changes.
	BaseDomain func()
}

// Cluster is a connection with the watches that [Spin] and [Hosts] share:
// Ingresses whole, SpinApps and Deployments by their metadata. It is safe for
// concurrent use. Every replica may run one; only the leader reconciles.
type Cluster struct {
	o       Options
	set     Settings
	client  kubernetes.Interface
	dynamic dynamic.Interface

	ingress, spinApps, deploys *watched
	// telling is held while Notify is called: there are three watches.
	telling sync.Mutex
}

// NewCluster checks o and connects to nothing yet.
func NewCluster(o Options) (*Cluster, error) {
	if o.Config == nil {
		return nil, errors.New("deploying needs the configuration of an API server")
	}
	set, err := o.Settings.withDefaults()
	if err != nil {
		return nil, err
	}
	o.Namespace = or(o.Namespace, "hearth-system")
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	config := rest.CopyConfig(o.Config)
	config.QPS, config.Burst = clientQPS, clientBurst
	if o.WrapTransport != nil {
		config.Wrap(o.WrapTransport)
	}
	c := &Cluster{o: o, set: set}
	if c.client, err = kubernetes.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	if c.dynamic, err = dynamic.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	names, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}

	c.ingress = newWatched("Ingresses", &networkingv1.Ingress{}, cache.Indexers{
		cache.NamespaceIndex: cache.MetaNamespaceIndexFunc,
		byHost: func(obj any) ([]string, error) {
			i, ok := obj.(*networkingv1.Ingress)
			if !ok {
				return nil, nil
			}
			return hostsOf(i), nil
		},
	})
	ingresses := c.client.NetworkingV1().Ingresses(metav1.NamespaceAll)
	c.ingress.list = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return ingresses.List(ctx, o) }
	c.ingress.watch = ingresses.Watch
	labelled := func(gvr schema.GroupVersionResource, selector string) *watched {
		w := newWatched(gvr.Resource, &metav1.PartialObjectMetadata{}, cache.Indexers{})
		objects := names.Resource(gvr)
		w.list = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = selector
			return objects.List(ctx, o)
		}
		w.watch = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = selector
			return objects.Watch(ctx, o)
		}
		return w
	}
	c.spinApps = labelled(spinAppsGVR, ManagedByLabel+"="+FieldManager)
	c.deploys = labelled(deploymentsGVR, AppNameLabel)
	for _, w := range c.watches() {
		w.failed = c.watchFailed
	}
	return c, nil
}

func (c *Cluster) watches() []*watched { return []*watched{c.ingress, c.spinApps, c.deploys} }

// watchFailed is told of what cannot be watched. It is tried again without end.
func (c *Cluster) watchFailed(ctx context.Context, what string, err error) {
	c.o.Logger.WarnContext(ctx, "the cluster cannot be watched right now, and is tried again", "objects", what, "error", err)
}

func hostsOf(i *networkingv1.Ingress) []string {
	hosts := make([]string, 0, len(i.Spec.Rules))
	for _, r := range i.Spec.Rules {
		if r.Host != "" && !slices.Contains(hosts, r.Host) {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}

// Run watches until ctx ends and tells n what changed. It is called once.
func (c *Cluster) Run(ctx context.Context, n Notify) error {
	c.subscribe(n)
	var running sync.WaitGroup
	for _, w := range c.watches() {
		running.Go(func() { w.run(ctx) })
	}
	running.Wait()
	return nil
}

// WaitSynced waits until the watches have seen all there is, or ctx ends.
// SpinApps are not waited for: the cluster may not know them.
func (c *Cluster) WaitSynced(ctx context.Context) error {
	if !cache.WaitForCacheSync(ctx.Done(), c.ingress.hasSynced, c.deploys.hasSynced) {
		return fmt.Errorf("read the cluster's Ingresses and Deployments: %w", context.Cause(ctx))
	}
	return nil
}

func (c *Cluster) subscribe(n Notify) {
	function := func(namespace, name string) {
		if n.Function != nil {
			n.Function(namespace, name)
		}
	}
	hosts := func() {
		if n.Hosts != nil {
			n.Hosts()
		}
	}
	named := func(_, obj any) {
		if m, ok := obj.(metav1.Object); ok {
			function(m.GetNamespace(), m.GetName())
		}
	}
	ingress := func(old, obj any) {
		i, ok := obj.(*networkingv1.Ingress)
		if !ok {
			return
		}
		before, _ := old.(*networkingv1.Ingress)
		switch {
		case c.isWildcard(i):
			if before == nil || !slices.EqualFunc(before.Status.LoadBalancer.Ingress, i.Status.LoadBalancer.Ingress, sameAddress) {
				if n.BaseDomain != nil {
					n.BaseDomain()
				}
			}
			hosts()
		case ours(i) && i.Namespace == c.o.Namespace && i.Labels[PartLabel] != "":
			hosts()
		case ours(i):
			function(i.Namespace, i.Name)
		default:
			hosts()
			for _, h := range append(hostsOf(i), hostsOfOrNone(before)...) {
				for _, other := range c.ingressesOf(h) {
					if ours(other) && other.Labels[PartLabel] == "" {
						function(other.Namespace, other.Name)
					}
				}
			}
		}
	}
	for w, tell := range map[*watched]func(old, obj any){c.spinApps: named, c.deploys: named, c.ingress: ingress} {
		w.changed = func(old, obj any) {
			c.telling.Lock()
			defer c.telling.Unlock()
			tell(old, obj)
		}
	}
}

func hostsOfOrNone(i *networkingv1.Ingress) []string {
	if i == nil {
		return nil
	}
	return hostsOf(i)
}

func sameAddress(a, b networkingv1.IngressLoadBalancerIngress) bool {
	return a.IP == b.IP && a.Hostname == b.Hostname
}

// ours says whether the label says that Hearth made it.
func ours(o metav1.Object) bool { return o.GetLabels()[ManagedByLabel] == FieldManager }

func (c *Cluster) isWildcard(i *networkingv1.Ingress) bool {
	return i.Namespace == c.o.Namespace && i.Name == WildcardIngress
}

// BaseDomain returns the domain below which functions answer now, without a
// request. See [BaseDomainFrom].
func (c *Cluster) BaseDomain() (string, error) {
	var addresses []networkingv1.IngressLoadBalancerIngress
	if i := c.cachedIngress(c.o.Namespace, WildcardIngress); i != nil {
		addresses = i.Status.LoadBalancer.Ingress
	}
	base, err := BaseDomainFrom(c.set.BaseDomain, addresses)
	var names *NoBaseDomainError
	if errors.As(err, &names) {
		names.Setting = c.set.BaseDomainSetting
	}
	return base, err
}

// Host returns a function's own host now.
func (c *Cluster) Host(namespace, name string) (string, error) {
	var base string
	if c.set.HostTemplate.NeedsBase() {
		var err error
		if base, err = c.BaseDomain(); err != nil {
			return "", err
		}
	}
	return c.set.HostTemplate.Host(name, namespace, base)
}

// URL returns where a function answers now.
func (c *Cluster) URL(namespace, name string) (string, error) {
	host, err := c.Host(namespace, name)
	if err != nil {
		return "", err
	}
	return "http://" + host + "/", nil
}

// Unreached returns why the own host of a resident function, or its custom one,
// does not lead to it: the errors of HostsOutcome.Problems, without a request.
// nil: both do, or will in a moment.
func (c *Cluster) Unreached(f Resident) error {
	own, err := c.Host(f.Namespace, f.Name)
	if err == nil {
		err = c.TakenBy(own, time.Time{}) // an exact host wins over a wildcard, whoever came first
	}
	if err != nil || f.Host == "" {
		return err
	}
	var since time.Time
	if live := c.cachedIngress(c.o.Namespace, hostIngressName(f.Host)); live != nil {
		since = live.CreationTimestamp.Time
	}
	return c.TakenBy(f.Host, since)
}

// TakenBy returns a *HostTakenError where an Ingress of somebody else has the
// host; nil: it is free or Hearth's. since is when Hearth's own Ingress with
// this host was made: who came later takes nothing. Zero: there is none.
func (c *Cluster) TakenBy(host string, since time.Time) error {
	var first *networkingv1.Ingress
	for _, i := range c.ingressesOf(host) {
		if ours(i) || i.Labels[acmeSolver] != "" || !since.IsZero() && !i.CreationTimestamp.Time.Before(since) {
			continue
		}
		if first == nil || i.CreationTimestamp.Before(&first.CreationTimestamp) {
			first = i
		}
	}
	if first == nil {
		return nil
	}
	return &HostTakenError{Host: host, Namespace: first.Namespace, Name: first.Name}
}

func (c *Cluster) ingressesOf(host string) []*networkingv1.Ingress {
	objs, err := c.ingress.objects.ByIndex(byHost, host)
	if err != nil {
		return nil // the index is there since NewCluster
	}
	out := make([]*networkingv1.Ingress, 0, len(objs))
	for _, obj := range objs {
		if i, ok := obj.(*networkingv1.Ingress); ok {
			out = append(out, i)
		}
	}
	return out
}

// cachedIngress returns an Ingress, which must not be changed; nil: none.
func (c *Cluster) cachedIngress(namespace, name string) *networkingv1.Ingress {
	obj, found, err := c.ingress.objects.GetByKey(namespace + "/" + name)
	if err != nil || !found {
		return nil
	}
	i, _ := obj.(*networkingv1.Ingress)
	return i
}

// controlledBy says whether f is o's owner.
func controlledBy(o metav1.Object, f *kube.Function) bool {
	ref := metav1.GetControllerOf(o)
	return ref != nil && ref.UID == f.UID
}

// ofEarlier says whether o belongs to a function of the same name that was
// deleted, so that the garbage collector is about to remove it.
func ofEarlier(o metav1.Object, f *kube.Function) bool {
	ref := metav1.GetControllerOf(o)
	return ref != nil && ref.UID != f.UID && ref.Kind == kube.FunctionKind && ref.Name == f.Name && ref.APIVersion == v1alpha1.APIVersion
}
