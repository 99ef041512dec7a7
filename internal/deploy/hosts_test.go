package deploy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/internal/deploy"
)

func (l *lab) systemIngress(name string) *networkingv1.Ingress {
	l.t.Helper()
	i, err := l.cluster.Client().NetworkingV1().Ingresses(l.system).Get(l.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return i
}

func (l *lab) reconcileHosts(functions []deploy.Resident, what string, ok func(deploy.HostsOutcome) bool) deploy.HostsOutcome {
	l.t.Helper()
	var out deploy.HostsOutcome
	if err := l.cluster.WaitFor(l.t.Context(), what, soon, func(ctx context.Context) (bool, error) {
		var err error
		out, err = l.hosts.Reconcile(ctx, functions)
		return err == nil && ok(out), err
	}); err != nil {
		l.t.Fatalf("%v: %+v", err, out)
	}
	return out
}

func TestResidentFunctionsShareAWildcardAndHaveTheirHosts(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	shared := "shared." + l.namespace + ".test"
	functions := []deploy.Resident{
		{Namespace: l.namespace, Name: "plain"},
		{Namespace: l.namespace, Name: "site", Host: shared},
		{Namespace: l.namespace, Name: "api", Host: shared, Routes: []string{"/api", "/v1"}},
	}
	if out, err := l.hosts.Reconcile(t.Context(), functions); err != nil || len(out.Problems) > 0 || out.BaseDomain != l.namespace+".example" {
		t.Fatalf("%+v, %v", out, err)
	}
	wildcard := l.systemIngress(deploy.WildcardIngress)
	if r := wildcard.Spec.Rules; len(r) != 1 || r[0].Host != "*."+l.namespace+".example" || r[0].HTTP.Paths[0].Backend.Service.Name != deploy.DefaultEngineService || *wildcard.Spec.IngressClassName != "traefik" {
		t.Errorf("the wildcard is %+v", wildcard.Spec)
	}
	var paths []string
	for _, p := range l.systemIngress("host." + shared).Spec.Rules[0].HTTP.Paths {
		paths = append(paths, p.Path)
	}
	if !slices.Equal(paths, []string{"/", "/api", "/v1"}) {
		t.Errorf("paths %q", paths)
	}

	// Many functions with nothing new cost nothing.
	for n := range 1000 {
		functions = append(functions, deploy.Resident{Namespace: l.namespace, Name: fmt.Sprintf("fn-%d", n)})
	}
	var reads, writes int64
	l.reconcileHosts(functions, "reconciling to be free", func(deploy.HostsOutcome) bool {
		r, w := l.requests.reads.Load(), l.requests.writes.Load()
		free := r == reads && w == writes
		reads, writes = r, w
		return free
	})

	// Nobody claims the host any more.
	l.reconcileHosts(functions[:1], "the host's Ingress to go", func(deploy.HostsOutcome) bool {
		_, err := l.cluster.Client().NetworkingV1().Ingresses(l.system).Get(t.Context(), "host."+shared, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	l.systemIngress(deploy.WildcardIngress)
}

func TestAHostThatSomebodyHasIsLeftToThem(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	own, custom, later := "fn."+l.namespace+".example", "custom."+l.namespace+".test", "later."+l.namespace+".test"
	first := []deploy.Resident{{Namespace: l.namespace, Name: "first", Host: later}}
	l.reconcileHosts(first, "the host to be had", func(o deploy.HostsOutcome) bool { return len(o.Problems) == 0 })
	// An Ingress's age is told in seconds.
	made := l.systemIngress("host." + later).CreationTimestamp
	if err := l.cluster.WaitFor(t.Context(), "a second to pass", soon, func(context.Context) (bool, error) {
		return metav1.Now().Rfc3339Copy().After(made.Time), nil
	}); err != nil {
		t.Fatal(err)
	}
	l.ingress("a", own, nil)
	l.ingress("b", custom, nil)
	l.ingress("c", later, nil)
	l.ingress("acme", "acme."+l.namespace+".example", map[string]string{"acme.cert-manager.io/http01-solver": "true"})

	functions := append(first,
		deploy.Resident{Namespace: l.namespace, Name: "fn"}, deploy.Resident{Namespace: l.namespace, Name: "other", Host: custom},
		deploy.Resident{Namespace: l.namespace, Name: "acme"})
	out := l.reconcileHosts(functions, "two hosts to be taken", func(o deploy.HostsOutcome) bool { return len(o.Problems) == 2 })
	for function, ingress := range map[string]string{"fn": "a", "other": "b"} {
		var taken *deploy.HostTakenError
		err := out.Problems[types.NamespacedName{Namespace: l.namespace, Name: function}]
		if !errors.As(err, &taken) || taken.Name != ingress || taken.Namespace != l.namespace || !strings.Contains(err.Error(), "Ingress "+l.namespace+"/"+ingress) {
			t.Errorf("%s: %v", function, err)
		}
	}
	if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.system).Get(t.Context(), "host."+custom, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("there is an Ingress for a host that is taken: %v", err)
	}
}

func TestTheBaseDomainFollowsTheLoadBalancer(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	l.run(deploy.Settings{BaseDomainSetting: "the value baseDomain"}) // without a base domain
	if _, err := l.deploy.BaseDomain(); !errors.Is(err, deploy.ErrNoAddress) {
		t.Errorf("got %v", err)
	}
	functions := []deploy.Resident{{Namespace: l.namespace, Name: "fn"}}
	out := l.reconcileHosts(functions, "the wildcard to be made", func(deploy.HostsOutcome) bool { return true })
	key := types.NamespacedName{Namespace: l.namespace, Name: "fn"}
	if !errors.Is(out.BaseDomainErr, deploy.ErrNoAddress) || !errors.Is(out.Problems[key], deploy.ErrNoAddress) {
		t.Errorf("got %+v", out)
	}
	set := func(a networkingv1.IngressLoadBalancerIngress) {
		t.Helper()
		i := l.systemIngress(deploy.WildcardIngress)
		i.Status.LoadBalancer.Ingress = []networkingv1.IngressLoadBalancerIngress{a}
		if _, err := l.cluster.Client().NetworkingV1().Ingresses(l.system).UpdateStatus(t.Context(), i, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if host := l.systemIngress(deploy.WildcardIngress).Spec.Rules[0].Host; host != "*.hearth.invalid" {
		t.Errorf("without an address the wildcard is for %s", host)
	}
	set(networkingv1.IngressLoadBalancerIngress{Hostname: "x.elb.amazonaws.com"})
	var names *deploy.NoBaseDomainError
	l.reconcileHosts(functions, "the name to be seen", func(o deploy.HostsOutcome) bool { return errors.As(o.BaseDomainErr, &names) })
	if !strings.Contains(names.Error(), "the value baseDomain") {
		t.Errorf("got %v", names)
	}
	if err := l.deploy.Unreached(functions[0]); !errors.As(err, &names) || deploy.FunctionError(err).Code != deploy.CodeNoBaseDomain {
		t.Errorf("its owner is told %v", err)
	}
	set(networkingv1.IngressLoadBalancerIngress{IP: "203.0.113.7"})
	l.reconcileHosts(functions, "the address to be seen", func(o deploy.HostsOutcome) bool { return o.BaseDomain == "203.0.113.7.nip.io" })
	if host := l.systemIngress(deploy.WildcardIngress).Spec.Rules[0].Host; host != "*.203.0.113.7.nip.io" {
		t.Errorf("the wildcard is for %s", host)
	}
	if err := l.deploy.Unreached(functions[0]); err != nil {
		t.Errorf("its owner is still told %v", err)
	}
	if url, err := l.deploy.URL(l.namespace, "user1"); err != nil || url != "http://user1.203.0.113.7.nip.io/" {
		t.Errorf("URL %s, %v", url, err)
	}
}
