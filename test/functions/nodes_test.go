package functions_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/chart"
)

// wasmReady is what a node's agent says of it, or somebody else in its place.
func wasmReady(ctx context.Context, node string) (corev1.NodeCondition, error) {
	n, err := bench.Client().CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return corev1.NodeCondition{}, err
	}
	for _, c := range n.Status.Conditions {
		if c.Type == v1alpha1.NodeConditionWasmReady {
			return c, nil
		}
	}
	return corev1.NodeCondition{}, fmt.Errorf("%s has no condition %s", node, v1alpha1.NodeConditionWasmReady)
}

// keepAgentOff has the DaemonSet leave out a node, without replacing the
// agents of others.
func keepAgentOff(ctx context.Context, node string) error {
	return patchAgents(ctx, "OnDelete", map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{
		"nodeSelectorTerms": []any{map[string]any{"matchExpressions": []any{
			map[string]any{"key": corev1.LabelHostname, "operator": "NotIn", "values": []string{node}},
		}}},
	}}})
}

func patchAgents(ctx context.Context, strategy string, affinity any) error {
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{
		"updateStrategy": map[string]any{"type": strategy},
		"template":       map[string]any{"spec": map[string]any{"affinity": affinity}},
	}})
	if err != nil {
		return err
	}
	_, err = bench.Client().AppsV1().DaemonSets(chart.Namespace).Patch(ctx, "hearth-nodeagent", types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

func TestANodeWhoseAgentIsGoneIsCalledUnknownAndGoesOnServing(t *testing.T) {
	const lost = "node-c"
	tenant := newTenant(t)
	f := submit(t, tenant, "lasting", "whatever the agent does")
	waitObject(t, tenant, "lasting", "every node to be warm", allWarm)
	t.Parallel() // beside tests that do not need every node's agent
	engine, err := onNode(t.Context(), "engine", lost)
	if err != nil {
		t.Fatal(err)
	}
	before, err := wasmReady(t.Context(), lost)
	if err != nil {
		t.Fatal(err)
	}
	if before.Status == corev1.ConditionUnknown {
		t.Fatalf("%s begins with %+v", lost, before)
	}

	// An agent that hangs says no farewell when it is removed.
	hung, err := onNode(t.Context(), "agent", lost)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := process(t.Context(), hung)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*soon)
		defer cancel()
		if err := patchAgents(ctx, "RollingUpdate", nil); err != nil {
			t.Error(err)
			return
		}
		if err := ready(ctx); err != nil {
			t.Error(err)
		}
		if err := bench.WaitFor(ctx, lost+" to be known again", soon, func(ctx context.Context) (bool, error) {
			c, err := wasmReady(ctx, lost)
			return err == nil && c.Status == before.Status && c.Reason == before.Reason, nil
		}); err != nil {
			t.Error(err)
		}
	})
	if err := keepAgentOff(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	if err := bench.WaitFor(t.Context(), "the agent of "+lost+" to be gone", soon, func(ctx context.Context) (bool, error) {
		pods, err := podsOf(ctx, "agent")
		return err == nil && len(pods) == len(nodes)-1, nil
	}); err != nil {
		t.Fatal(err)
	}

	var last corev1.NodeCondition
	if err := bench.WaitFor(t.Context(), lost+" to be called unknown", 2*soon, func(ctx context.Context) (bool, error) {
		for _, node := range nodes {
			c, err := wasmReady(ctx, node)
			if err != nil {
				return false, nil
			}
			if node != lost && c.Status == corev1.ConditionUnknown {
				return false, fmt.Errorf("%s is called %+v while its agent runs", node, c)
			}
			if node == lost {
				last = c
			}
		}
		response, body, err := ask(ctx, engine, "lasting", "")
		if err != nil {
			return false, err
		}
		if response.StatusCode != http.StatusOK || !strings.Contains(body, "whatever the agent does") {
			return false, fmt.Errorf("the engine of %s answers %s: %s", lost, response.Status, body)
		}
		return last.Status == corev1.ConditionUnknown, nil
	}); err != nil {
		t.Fatalf("%v; it is %+v", err, last)
	}
	t.Logf("after %s: %s: %s", time.Since(began).Round(time.Second), last.Reason, last.Message)
	if last.Reason != "HeartbeatStopped" || !last.LastHeartbeatTime.Equal(&before.LastHeartbeatTime) && last.LastHeartbeatTime.After(began) {
		t.Errorf("%+v, after %+v", last, before)
	}
	answers(t, f.URL, "whatever the agent does")
}
