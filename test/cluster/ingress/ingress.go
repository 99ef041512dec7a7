// Package ingress is a small ingress controller for tests: what the API
// documents of networking.k8s.io/v1 Ingress, and nothing a particular
// controller adds. It stands where Traefik does in k3s, and acts on changes at
// once, which Traefik does not; cluster.Traefik runs that one.
//
// It serves the Ingresses of one class: exact hosts before wildcards (which
// stand for one label), exact paths before prefixes, longer prefixes (by path
// segment) before shorter ones, the older of two equal rules; a rule without a
// host is for hosts without rules. A backend is a port of a Service in the
// Ingress's namespace, by name or number, and its ready endpoints. It writes
// its address into the status of what it serves.
package ingress

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	networkinglisters "k8s.io/client-go/listers/networking/v1"
	"k8s.io/client-go/tools/cache"
)

// statusEvery is how often unwritten statuses are tried again.
const statusEvery = 500 * time.Millisecond

// Options of a Controller.
type Options struct {
	// Class is the class whose Ingresses are served.
	Class string
	// Listen is the address, host:port.
	Listen string
	// Status is what stands in the status of Ingresses; Listen's host when
	// both are empty.
	IP, Hostname string
}

// Controller is a running one.
type Controller struct {
	o         Options
	client    kubernetes.Interface
	ingresses networkinglisters.IngressLister
	services  corelisters.ServiceLister
	slices    discoverylisters.EndpointSliceLister
	transport *http.Transport
	server    *http.Server
	factory   informers.SharedInformerFactory
	changed   chan struct{}
	cancel    context.CancelFunc
	running   sync.WaitGroup
}

// Start runs one until Close.
func Start(ctx context.Context, client kubernetes.Interface, o Options) (*Controller, error) {
	host, _, err := net.SplitHostPort(o.Listen)
	if err != nil {
		return nil, err
	}
	if o.IP == "" && o.Hostname == "" {
		o.IP = host
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.Listen)
	if err != nil {
		return nil, err
	}
	c := &Controller{
		o: o, client: client, factory: informers.NewSharedInformerFactory(client, 0), changed: make(chan struct{}, 1),
		transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute},
	}
	c.ingresses = c.factory.Networking().V1().Ingresses().Lister()
	c.services = c.factory.Core().V1().Services().Lister()
	c.slices = c.factory.Discovery().V1().EndpointSlices().Lister()
	poke := func() {
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
	if _, err := c.factory.Networking().V1().Ingresses().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { poke() }, UpdateFunc: func(any, any) { poke() },
	}); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.cancel = cancel
	c.factory.Start(running.Done())
	for kind, ok := range c.factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			cancel()
			c.factory.Shutdown()
			return nil, errors.Join(fmt.Errorf("ingress: %v were not listed", kind), listener.Close())
		}
	}
	c.server = &http.Server{Handler: c, ReadHeaderTimeout: 10 * time.Second}
	c.running.Go(func() { _ = c.server.Serve(listener) })
	c.running.Go(func() { c.writeStatuses(running) })
	return c, nil
}

// Close ends it.
func (c *Controller) Close() {
	_ = c.server.Close()
	c.cancel()
	c.factory.Shutdown()
	c.running.Wait()
	c.transport.CloseIdleConnections()
}

// writeStatuses says in the status of each Ingress where it is served.
func (c *Controller) writeStatuses(ctx context.Context) {
	want := []networkingv1.IngressLoadBalancerIngress{{IP: c.o.IP, Hostname: c.o.Hostname}}
	for {
		again := false
		all, _ := c.ingresses.List(labels.Everything())
		for _, i := range all {
			if !c.ours(i) || len(i.Status.LoadBalancer.Ingress) == 1 &&
				i.Status.LoadBalancer.Ingress[0].IP == c.o.IP && i.Status.LoadBalancer.Ingress[0].Hostname == c.o.Hostname {
				continue
			}
			i = i.DeepCopy()
			i.Status.LoadBalancer.Ingress = want
			if _, err := c.client.NetworkingV1().Ingresses(i.Namespace).UpdateStatus(ctx, i, metav1.UpdateOptions{}); err != nil && !apierrors.IsNotFound(err) {
				again = true
			}
		}
		var retry <-chan time.Time
		if again {
			retry = time.After(statusEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-c.changed:
		case <-retry:
		}
	}
}

func (c *Controller) ours(i *networkingv1.Ingress) bool {
	return i.DeletionTimestamp == nil && i.Spec.IngressClassName != nil && *i.Spec.IngressClassName == c.o.Class
}

// ServeHTTP passes a request on to where the Ingresses say.
func (c *Controller) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	namespace, backend, ok := c.route(r.Host, r.URL.Path)
	if !ok {
		http.Error(w, "404 page not found", http.StatusNotFound)
		return
	}
	address, err := c.endpoint(namespace, backend)
	if err != nil {
		http.Error(w, "503 "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	(&httputil.ReverseProxy{
		Transport: c.transport,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: address})
			p.SetXForwarded()
			p.Out.Host = p.In.Host
		},
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "502 "+err.Error(), http.StatusBadGateway)
		},
	}).ServeHTTP(w, r)
}

// rule is one path of one Ingress.
type rule struct {
	namespace string
	backend   networkingv1.IngressBackend
	host      int // 2: exact, 1: wildcard, 0: any host without rules
	exact     bool
	path      string
	created   time.Time
}

func (c *Controller) route(host, path string) (string, networkingv1.IngressBackend, bool) {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	var found []rule
	all, _ := c.ingresses.List(labels.Everything())
	for _, i := range all {
		if !c.ours(i) {
			continue
		}
		for _, r := range i.Spec.Rules {
			matched, ok := matchHost(r.Host, host)
			if !ok || r.HTTP == nil {
				continue
			}
			for _, p := range r.HTTP.Paths {
				exact := p.PathType != nil && *p.PathType == networkingv1.PathTypeExact
				if exact && p.Path == path || !exact && matchPrefix(p.Path, path) {
					found = append(found, rule{i.Namespace, p.Backend, matched, exact, p.Path, i.CreationTimestamp.Time})
				}
			}
		}
	}
	if len(found) == 0 {
		return "", networkingv1.IngressBackend{}, false
	}
	best := slices.MinFunc(found, func(a, b rule) int {
		return cmp.Or(cmp.Compare(b.host, a.host), -compareBool(a.exact, b.exact), cmp.Compare(len(b.path), len(a.path)), a.created.Compare(b.created))
	})
	return best.namespace, best.backend, true
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// matchHost says how well a rule's host fits.
func matchHost(pattern, host string) (int, bool) {
	switch {
	case pattern == "":
		return 0, true
	case pattern == host:
		return 2, true
	}
	if suffix, ok := strings.CutPrefix(pattern, "*."); ok {
		label, rest, _ := strings.Cut(host, ".")
		return 1, label != "" && rest == suffix
	}
	return 0, false
}

// matchPrefix compares path segments: /foo is a prefix of /foo and /foo/bar,
// not of /foobar.
func matchPrefix(prefix, path string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

// endpoint picks a ready one of a backend.
func (c *Controller) endpoint(namespace string, backend networkingv1.IngressBackend) (string, error) {
	if backend.Service == nil {
		return "", errors.New("the backend is no Service")
	}
	service, err := c.services.Services(namespace).Get(backend.Service.Name)
	if err != nil {
		return "", err
	}
	at := slices.IndexFunc(service.Spec.Ports, func(p corev1.ServicePort) bool {
		return backend.Service.Port.Name != "" && p.Name == backend.Service.Port.Name ||
			backend.Service.Port.Name == "" && p.Port == backend.Service.Port.Number
	})
	if at < 0 {
		return "", fmt.Errorf("the Service %s has no port %+v", service.Name, backend.Service.Port)
	}
	port := service.Spec.Ports[at].Name
	endpoints, err := c.slices.EndpointSlices(namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: service.Name}))
	if err != nil {
		return "", err
	}
	var addresses []string
	for _, slice := range endpoints {
		for _, p := range slice.Ports {
			if p.Port == nil || p.Name != nil && *p.Name != port {
				continue
			}
			for _, e := range slice.Endpoints {
				if e.Conditions.Ready != nil && !*e.Conditions.Ready || len(e.Addresses) == 0 {
					continue
				}
				addresses = append(addresses, net.JoinHostPort(e.Addresses[0], strconv.Itoa(int(*p.Port))))
			}
		}
	}
	if len(addresses) == 0 {
		return "", fmt.Errorf("the Service %s has no ready endpoint", service.Name)
	}
	return addresses[rand.N(len(addresses))], nil
}
