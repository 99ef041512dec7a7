package api

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/kube"
)

func TestPodsAnswerUntilTheEnginesDo(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	node := func(name string, serving int) v1alpha1.FunctionNode {
		return v1alpha1.FunctionNode{Name: name, Revision: 2, Serving: serving}
	}
	pods := node("spin", 1)
	for _, test := range []struct {
		name     string
		runtime  v1alpha1.FunctionRuntime
		host     string
		deleted  bool
		nodes    []v1alpha1.FunctionNode
		wanted   int // nodes
		activeMS int // for how long the wanted revision has answered; 0: it has not
		want     time.Duration
	}{
		{name: "no engine has it", nodes: []v1alpha1.FunctionNode{node("a", 0), pods}, wanted: 3, want: handover},
		{name: "no engine can have it", nodes: []v1alpha1.FunctionNode{{Name: "a", Revision: 2, Progress: v1alpha1.ProgressFailed}, pods}, wanted: 2, want: handover},
		{name: "one engine has it", nodes: []v1alpha1.FunctionNode{node("a", 2), node("b", 0), pods}, wanted: 3, activeMS: 1000, want: handover - time.Second},
		{name: "one engine has it and others said nothing yet", nodes: []v1alpha1.FunctionNode{node("a", 2), pods}, wanted: 4, activeMS: 1000, want: handover - time.Second},
		{name: "one engine has had it for long", nodes: []v1alpha1.FunctionNode{node("a", 2), node("b", 0), pods}, wanted: 3, activeMS: 60_000},
		{name: "every engine has it since a moment ago", nodes: []v1alpha1.FunctionNode{node("a", 2), node("b", 2), pods}, wanted: 3, activeMS: 400, want: settle - 400*time.Millisecond},
		{name: "every engine has it", nodes: []v1alpha1.FunctionNode{node("a", 2), node("b", 2), pods}, wanted: 3, activeMS: 1500},
		{name: "every engine has it and an ingress controller must learn of its host", host: "a.example.com", nodes: []v1alpha1.FunctionNode{node("a", 2), pods}, wanted: 2, activeMS: 1500, want: hostSettle - 1500*time.Millisecond},
		{name: "a clock that is ahead", nodes: []v1alpha1.FunctionNode{node("a", 2), pods}, wanted: 2, activeMS: -60_000, want: settle},
		{name: "a host that is taken is no engine", nodes: []v1alpha1.FunctionNode{node("a", 2), node(clusterstore.NodeIngress, 0), pods}, wanted: 2, activeMS: 1500},
		{name: "pods that answer nothing", nodes: []v1alpha1.FunctionNode{node("a", 0), node("spin", 0)}, wanted: 2},
		{name: "no pods", nodes: []v1alpha1.FunctionNode{node("a", 0)}, wanted: 1},
		{name: "a spin function", runtime: v1alpha1.RuntimeSpin, nodes: []v1alpha1.FunctionNode{node("a", 0), pods}, wanted: 1},
		{name: "a function that is being deleted", deleted: true, nodes: []v1alpha1.FunctionNode{node("a", 0), pods}, wanted: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &kube.Function{Spec: v1alpha1.FunctionSpec{Runtime: test.runtime, Host: test.host}}
			if test.deleted {
				f.DeletionTimestamp = &metav1.Time{Time: now}
			}
			f.Status.Nodes, f.Status.WantedNodes = test.nodes, test.wanted
			h := v1alpha1.RevisionStatus{Revision: 2}
			if test.activeMS != 0 {
				at := now.Add(-time.Duration(test.activeMS) * time.Millisecond)
				h.ActivatedAt = &at
			}
			f.Status.History = []v1alpha1.RevisionStatus{{Revision: 1}, h}
			if got := handoverLeft(f, 2, now); got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
		})
	}
}

func TestEnginesAnswerForASpinFunctionWithoutPodsThatDo(t *testing.T) {
	node := func(name string, serving int) v1alpha1.FunctionNode {
		return v1alpha1.FunctionNode{Name: name, Revision: 2, Serving: serving}
	}
	for _, test := range []struct {
		name  string
		nodes []v1alpha1.FunctionNode
		want  bool
	}{
		{"a new function", nil, false},
		{"engines and no pods", []v1alpha1.FunctionNode{node("a", 1)}, true},
		{"engines and pods that start", []v1alpha1.FunctionNode{node("a", 1), node("spin", 0)}, true},
		{"engines that gave it up and pods that start", []v1alpha1.FunctionNode{node("a", 0), node("spin", 0)}, false},
		{"engines and pods that answer", []v1alpha1.FunctionNode{node("a", 1), node("spin", 2)}, false},
		{"a host that is taken", []v1alpha1.FunctionNode{node(clusterstore.NodeIngress, 1), node("spin", 0)}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &kube.Function{}
			f.Status.Nodes = test.nodes
			if got := enginesAnswer(f); got != test.want {
				t.Errorf("%t, want %t", got, test.want)
			}
		})
	}
}
