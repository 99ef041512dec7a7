package deploy_test

import (
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/internal/deploy"
)

func TestNoHostLeadsToPodsBeforeTheyAnswerWhereSomethingElseDoes(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	ingresses := l.cluster.Client().NetworkingV1().Ingresses(l.namespace)
	bad := spinSpec(l.registry.Host + "/none" + absentDigest)
	f := l.create("moved", bad)
	in := deploy.Input{Function: f, Wanted: revision(1, bad), Elsewhere: true}
	out, _ := l.reconcile(in, "a revision that does not start to fail", isFailed)
	if out.Node.Serving != 0 {
		t.Errorf("%+v", out)
	}
	if _, err := ingresses.Get(t.Context(), "moved", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("there is an Ingress to pods that failed: %v", err)
	}

	good := spinSpec(l.serving("here now"))
	in.Wanted = revision(2, good)
	early := false
	out, _ = l.reconcile(in, "revision 2 to take over", func(o deploy.Outcome, err error) bool {
		if o.Node.Serving != 0 && !isReady(2)(o, err) {
			early = true
		}
		return isReady(2)(o, err)
	})
	if early || len(out.Phases) != 1 {
		t.Errorf("it served before it was ready: %t; %+v", early, out)
	}
	if _, err := ingresses.Get(t.Context(), "moved", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}

func TestACustomHostLeavesTheEnginesIngressBeforeTheyGiveItUp(t *testing.T) {
	t.Parallel()
	l := start(t, deploy.Settings{})
	host := "walker." + l.namespace + ".test"
	spec := spinSpec(l.serving("walker"))
	spec.Host = host
	f := l.create("walker", spec)
	resident := []deploy.Resident{{Namespace: l.namespace, Name: "walker", Host: host, Leaving: true}}
	l.reconcileHosts(resident, "the host to lead to the engines", func(o deploy.HostsOutcome) bool { return len(o.Problems) == 0 })
	l.systemIngress("host." + host)

	in := deploy.Input{Function: f, Wanted: revision(1, spec), Elsewhere: true}
	there := func(namespace, name string) bool {
		_, err := l.cluster.Client().NetworkingV1().Ingresses(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
		return err == nil
	}
	both := false
	l.reconcile(in, "the pods to have the host", func(o deploy.Outcome, err error) bool {
		if o.Node.Serving != 0 && there(l.system, "host."+host) {
			t.Error("the engines may give the host up while it leads to them")
		}
		if there(l.namespace, "walker") {
			both = both || there(l.system, "host."+host)
			if _, err := l.hosts.Reconcile(t.Context(), resident); err != nil {
				t.Error(err)
			}
		} else if !there(l.system, "host."+host) {
			t.Error("the host leads nowhere")
		}
		return isReady(1)(o, err)
	})
	if !both {
		t.Error("there was a moment in which the host led nowhere")
	}
}
