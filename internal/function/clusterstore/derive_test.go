package clusterstore

import (
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestTheConditionOfAFunctionThatAnswersTellsWhatTroublesIt(t *testing.T) {
	st := v1alpha1.FunctionStatus{
		Revision: 2, ActiveRevision: 2,
		History: []v1alpha1.RevisionStatus{{Revision: 2, State: v1alpha1.StateReady}},
		Nodes: []v1alpha1.FunctionNode{
			{Name: "spin", Revision: 2, Progress: v1alpha1.ProgressReady, Serving: 2, Retrying: true, Error: &v1alpha1.FunctionError{Code: "autoscaler-idle", Detail: "the autoscaler does nothing"}},
		},
	}
	c := readyCondition(st)
	if c.Status != v1alpha1.ConditionTrue || c.Reason != ReasonReady || !strings.HasSuffix(c.Message, "; the autoscaler does nothing") {
		t.Errorf("%+v", c)
	}
	st.Nodes[0].Revision = 1
	if c := readyCondition(st); c.Message != "revision 2 answers requests" {
		t.Errorf("of an older revision's trouble: %+v", c)
	}
}
