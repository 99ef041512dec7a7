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
