package deploy

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestAnAutoscalerThatDoesNothingSaysWhy(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	ago := func(d time.Duration) string { return now.Add(-d).Format(time.RFC3339) }
	condition := func(kind, status, reason, message, since string) any {
		c := map[string]any{"type": kind, "status": status, "reason": reason, "message": message}
		if since != "" {
			c["lastTransitionTime"] = since
		}
		return c
	}
	const hpa = "HorizontalPodAutoscaler"
	able := condition("AbleToScale", "True", "ReadyForNewScale", "recommended size matches current size", ago(time.Hour))
	for name, tt := range map[string]struct {
		kind       string
		conditions []any
		active     bool
		says       string // "": nothing
	}{
		"nobody looked at it yet":               {kind: hpa},
		"it scales":                             {kind: hpa, conditions: []any{able, condition("ScalingActive", "True", "ValidMetricFound", "", ago(time.Hour))}, active: true},
		"there are no metrics yet":              {kind: hpa, conditions: []any{able, condition("ScalingActive", "False", "FailedGetResourceMetric", "no metrics known for pods", ago(time.Minute))}},
		"there are no metrics for long":         {kind: hpa, conditions: []any{able, condition("ScalingActive", "False", "FailedGetResourceMetric", "no metrics known for pods", ago(4*time.Minute))}, says: "no metrics known for pods"},
		"somebody wants no pods":                {kind: hpa, conditions: []any{able, condition("ScalingActive", "False", "ScalingDisabled", "scaling is disabled since the replica count of the target is zero", ago(time.Hour))}, active: true},
		"it is not known whether it scales":     {kind: hpa, conditions: []any{condition("ScalingActive", "Unknown", "", "", ago(time.Hour))}},
		"KEDA takes it":                         {kind: scaledObjectKind, conditions: []any{condition("Ready", "True", "ScaledObjectReady", "ScaledObject is defined correctly", "")}, active: true},
		"KEDA, which tells no times, refuses":   {kind: scaledObjectKind, conditions: []any{condition("Active", "False", "", "", ""), condition("Ready", "False", "ScaledObjectCheckFailed", "the trigger has no value", "")}, says: "the trigger has no value"},
		"what it says is no list of conditions": {kind: hpa, conditions: []any{"ScalingActive"}},
	} {
		t.Run(name, func(t *testing.T) {
			u := object("any/v1", tt.kind, "team", "hello")
			u.Object["status"] = map[string]any{"conditions": tt.conditions}
			why, again := scalerState{object: u}.trouble(now)
			if (again == 0) != tt.active || (why != nil) != (tt.says != "") {
				t.Fatalf("got %+v, to look again after %s", why, again)
			}
			if why == nil {
				return
			}
			for _, words := range []string{tt.says, "hello -n team"} {
				if why.Code != CodeAutoscaler || !strings.Contains(why.Detail, words) {
					t.Errorf("%+v does not say %q", why, words)
				}
			}
		})
	}
	if why, again := (scalerState{}).trouble(now); why != nil || again != 0 {
		t.Errorf("without an autoscaler: %+v, to look again after %s", why, again)
	}
	refused := scalerState{refused: errors.New("admission webhook denied the request: it is managed by another")}
	if why, again := refused.trouble(now); again == 0 || why == nil || why.Code != CodeAutoscaler || !strings.Contains(why.Detail, "managed by another") {
		t.Errorf("refused: %+v, to look again after %s", why, again)
	}
}
