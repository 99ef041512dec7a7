package deploy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
)

// Resident is one function with runtime resident.
type Resident struct {
	Namespace, Name string
	// Host is the custom host that the function claimed, empty for none, and
	// Routes the paths below it (none: "/").
	Host   string
	Routes []string
	// Leaving says that the function becomes a spin function: its host is the
	// pods' as soon as their Ingress has it.
	Leaving bool
}

// HostsOutcome is what Hosts.Reconcile found.
type HostsOutcome struct {
	// BaseDomain is what the wildcard leads from; empty while unknown, and
	// then BaseDomainErr says why.
	BaseDomain    string
	BaseDomainErr error
	// Problems are functions that a host does not lead to, each with a
	// *HostTakenError, *HostNameError, *NoBaseDomainError or ErrNoAddress.
	Problems map[types.NamespacedName]error
	// RequeueAfter is when to call again at the latest.
	RequeueAfter time.Duration
}

// Hosts leads requests for resident functions to the engines: one Ingress for
// the wildcard of their own hosts and one for each custom host. It is not safe
// for concurrent use.
type Hosts struct{ c *Cluster }

// NewHosts returns a reconciler over c, whose Run must be under way and synced.
func NewHosts(c *Cluster) *Hosts { return &Hosts{c: c} }

// Reconcile makes the Ingresses those of the given functions, which are all
// resident ones of the cluster. It writes only what differs, and looks at each
// function in memory only. The error joins what the API server refused; what
// could be done is done nevertheless.
func (h *Hosts) Reconcile(ctx context.Context, functions []Resident) (HostsOutcome, error) {
	out := HostsOutcome{Problems: make(map[types.NamespacedName]error), RequeueAfter: resync}
	out.BaseDomain, out.BaseDomainErr = h.c.BaseDomain()

	var errs []error
	errs = append(errs, h.wildcard(ctx, functions, &out))

	routes := make(map[string][]string)
	for _, f := range functions {
		if f.Host != "" && !(f.Leaving && leads(h.c.cachedIngress(f.Namespace, f.Name), f.Host, f.Routes)) {
			routes[f.Host] = append(routes[f.Host], routesOf(f.Routes)...)
		}
	}
	taken := make(map[string]error)
	for _, host := range slices.Sorted(maps.Keys(routes)) {
		live := h.c.cachedIngress(h.c.o.Namespace, hostIngressName(host))
		var since time.Time
		if live != nil {
			since = live.CreationTimestamp.Time
		}
		if err := h.c.TakenBy(host, since); err != nil {
			taken[host] = err
			delete(routes, host)
			continue
		}
		wanted, err := h.c.set.hostIngress(h.c.o.Namespace, host, routes[host])
		if err == nil {
			err = h.ensure(ctx, live, wanted)
		}
		errs = append(errs, err)
	}
	for _, f := range functions {
		if err := taken[f.Host]; err != nil {
			out.Problems[types.NamespacedName{Namespace: f.Namespace, Name: f.Name}] = err
		}
	}
	if len(out.Problems) > 0 || out.BaseDomainErr != nil {
		out.RequeueAfter = pollTrouble
	}
	errs = append(errs, h.sweep(ctx, routes))
	return out, errors.Join(errs...)
}

// leads says whether an Ingress, which may be nil, has one of the routes of a
// host.
func leads(i *networkingv1.Ingress, host string, routes []string) bool {
	if i == nil {
		return false
	}
	for _, r := range i.Spec.Rules {
		if r.Host != host || r.HTTP == nil {
			continue
		}
		for _, p := range r.HTTP.Paths {
			if slices.Contains(routesOf(routes), p.Path) {
				return true
			}
		}
	}
	return false
}

// wildcard keeps the Ingress of own hosts and finds functions whose own host
// an Ingress of somebody else has: an exact host wins over a wildcard.
func (h *Hosts) wildcard(ctx context.Context, functions []Resident, out *HostsOutcome) error {
	base := out.BaseDomain
	if base == "" {
		base = placeholderBase
	}
	t := h.c.set.HostTemplate
	hosts := map[string]bool{}
	if w, err := t.Wildcard("", base); err == nil {
		hosts[w] = true // the template has no tenant: one for all, from the start
	}
	for _, f := range functions {
		w, err := t.Wildcard(f.Namespace, base)
		if err == nil && out.BaseDomain == "" && t.NeedsBase() {
			// Engines have it, and nobody can ask for it: its owner is told.
			hosts[w] = true
			out.Problems[types.NamespacedName{Namespace: f.Namespace, Name: f.Name}] = out.BaseDomainErr
			continue
		}
		if err == nil {
			hosts[w] = true
			var host string
			if host, err = t.Host(f.Name, f.Namespace, base); err == nil {
				err = h.c.TakenBy(host, time.Time{})
			}
		}
		if err != nil {
			out.Problems[types.NamespacedName{Namespace: f.Namespace, Name: f.Name}] = err
		}
	}
	if len(hosts) == 0 {
		hosts["*."+placeholderBase] = true
	}
	wanted, err := h.c.set.wildcardIngress(h.c.o.Namespace, slices.Sorted(maps.Keys(hosts)))
	if err != nil {
		return err
	}
	return h.ensure(ctx, h.c.cachedIngress(h.c.o.Namespace, WildcardIngress), wanted)
}

// ensure applies an Ingress of ours over live, which may be nil and must not
// be somebody else's.
func (h *Hosts) ensure(ctx context.Context, live *networkingv1.Ingress, wanted *unstructured.Unstructured) error {
	var u *unstructured.Unstructured
	if live != nil {
		if !ours(live) {
			return &ConflictError{Object: describe(wanted), Owner: "is not Hearth's"}
		}
		m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(live)
		if err != nil {
			return fmt.Errorf("read %s: %w", describe(wanted), err)
		}
		u = &unstructured.Unstructured{Object: m}
		u.SetAPIVersion("networking.k8s.io/v1")
		u.SetKind("Ingress")
	}
	_, err := h.c.apply(ctx, ingressesGVR, u, wanted)
	return err
}

// sweep removes the Ingresses of hosts that nobody claims any more.
func (h *Hosts) sweep(ctx context.Context, claimed map[string][]string) error {
	keep := map[string]bool{}
	for host := range claimed {
		keep[hostIngressName(host)] = true
	}
	objs, err := h.c.ingress.objects.ByIndex(cache.NamespaceIndex, h.c.o.Namespace)
	errs := []error{err}
	for _, obj := range objs {
		i, ok := obj.(*networkingv1.Ingress)
		if !ok || !ours(i) || i.Labels[PartLabel] != "host" || keep[i.Name] {
			continue
		}
		errs = append(errs, h.c.delete(ctx, ingressesGVR, i.Namespace, i.Name, func(o metav1.Object) bool { return o.GetLabels()[PartLabel] == "host" }))
	}
	return errors.Join(errs...)
}
