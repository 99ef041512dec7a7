package deploy

import (
	"strings"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// scalerPatience is how long an autoscaler may not know what pods use: for
	// new ones it takes two askings, 15 s apart, and the pods' start.
	scalerPatience = 3 * time.Minute
	// pollScaler is between two looks at an autoscaler that does nothing yet.
	pollScaler = time.Minute
)

// scalerState is what became of a function's autoscaler. The zero value is that
// of a function that has none.
type scalerState struct {
	// object is as it is in the cluster; nil: there is none.
	object *unstructured.Unstructured
	// waits says that it is not made before there is something to scale.
	waits bool
	// refused is why the cluster does not take it.
	refused error
}

// trouble says why the autoscaler does nothing, once that is more than a
// beginning, and when to look again; 0: it is at work.
func (s scalerState) trouble(now time.Time) (why *v1alpha1.FunctionError, again time.Duration) {
	switch {
	case s.refused != nil:
		return &v1alpha1.FunctionError{Code: CodeAutoscaler, Detail: "the cluster refuses the autoscaler: " + excerpt(s.refused.Error()) + "; see to that, it is tried again"}, pollTrouble
	case s.waits:
		return nil, pollRollout
	case s.object == nil:
		return nil, 0
	}
	// Both kinds say it in a condition: a HorizontalPodAutoscaler in
	// ScalingActive, a ScaledObject (keda, apis/keda/v1alpha1/condition_types.go)
	// in Ready, without a time.
	kind, remedy := string(autoscalingv2.ScalingActive), "see kubectl describe hpa %; it needs metrics-server, which k3s has"
	if s.object.GetKind() == scaledObjectKind {
		kind, remedy = "Ready", "see kubectl describe scaledobject %"
	}
	conditions, _, _ := unstructured.NestedSlice(s.object.Object, "status", "conditions")
	for _, c := range conditions {
		c, ok := c.(map[string]any)
		if !ok || c["type"] != kind {
			continue
		}
		reason, _ := c["reason"].(string)
		if c["status"] == string(corev1.ConditionTrue) || reason == "ScalingDisabled" { // somebody set the pods to 0
			return nil, 0
		}
		since, _ := c["lastTransitionTime"].(string)
		at, err := time.Parse(time.RFC3339, since)
		if c["status"] != string(corev1.ConditionFalse) || since != "" && (err != nil || now.Sub(at) < scalerPatience) {
			return nil, pollScaler
		}
		message, _ := c["message"].(string)
		name := s.object.GetName() + " -n " + s.object.GetNamespace()
		return &v1alpha1.FunctionError{Code: CodeAutoscaler, Detail: "the autoscaler does nothing: " + excerpt(message) + "; " + strings.Replace(remedy, "%", name, 1)}, pollScaler
	}
	return nil, pollScaler // nobody has looked at it yet
}
