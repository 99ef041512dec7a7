package functions_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
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

// offline is how long a node is off the network: longer than anybody waits for
// a connection, shorter than Kubernetes takes to notice.
const offline = 12 * time.Second

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

// askUntil asks one node's engine for a function until the answer is as
// wanted. Others are answers of before, which all must be of.
func askUntil(t *testing.T, engine corev1.Pod, function string, status int, text string, before ...int) {
	t.Helper()
	var last string
	if err := bench.WaitFor(t.Context(), fmt.Sprintf("the engine of %s to answer for %s with %d %s", engine.Spec.NodeName, function, status, text), soon, func(ctx context.Context) (bool, error) {
		response, body, err := ask(ctx, engine, function, "")
		if err != nil {
			return false, err
		}
		last = response.Status + " " + body
		if response.StatusCode == status && strings.Contains(body, text) {
			return true, nil
		}
		if !slices.Contains(before, response.StatusCode) {
			return false, fmt.Errorf("the engine of %s answers for %s: %s", engine.Spec.NodeName, function, last)
		}
		return false, nil
	}); err != nil {
		t.Fatalf("%v; the last answer was %s", err, last)
	}
}

func TestANodeWhoseAgentIsGoneIsCalledUnknownAndGoesOnServing(t *testing.T) {
	const lost = "node-c"
	tenant := newTenant(t)
	f := submit(t, tenant, "lasting", "whatever the agent does")
	waitObject(t, tenant, "lasting", "every node to be warm", allWarm)
	submit(t, tenant, "replaced", "the first of two")
	waitObject(t, tenant, "replaced", "every node to be warm", allWarm)
	submit(t, tenant, "passing", "as long as it is there")
	waitObject(t, tenant, "passing", "every node to be warm", allWarm)
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

	// What changes from here on, nobody tells this engine; others know it.
	for name, want := range map[string]string{"replaced": "the first of two", "passing": "as long as it is there"} {
		askUntil(t, engine, name, http.StatusOK, want)
	}
	submit(t, tenant, "later", "submitted since")
	submit(t, tenant, "replaced", "the second of two")
	must(t, "functions", "delete", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "passing")
	// Not even before the silence is noticed does it say that there is none.
	askUntil(t, engine, "later", http.StatusOK, "submitted since", http.StatusServiceUnavailable)
	askUntil(t, engine, "replaced", http.StatusOK, "the second of two", http.StatusOK)
	askUntil(t, engine, "passing", http.StatusNotFound, "function-not-found", http.StatusOK)
	askUntil(t, engine, "lasting", http.StatusOK, "whatever the agent does")
	askUntil(t, engine, "never-was", http.StatusNotFound, "function-not-found", http.StatusServiceUnavailable)
	askUntil(t, engine, "later", http.StatusOK, "submitted since")

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

// leaderNode is where the replica of the API runs that reconciles.
func leaderNode(t *testing.T) (node string) {
	t.Helper()
	if err := bench.WaitFor(t.Context(), "a replica to lead", soon, func(ctx context.Context) (bool, error) {
		lease, err := bench.Client().CoordinationV1().Leases(chart.Namespace).Get(ctx, "hearth-api", metav1.GetOptions{})
		if err != nil || lease.Spec.HolderIdentity == nil {
			return false, err
		}
		for _, p := range replicas(t) {
			if p.Name == *lease.Spec.HolderIdentity {
				node = p.Spec.NodeName
			}
		}
		return node != "", nil
	}); err != nil {
		t.Fatal(err)
	}
	return node
}

// TestRequestsGoOnThroughOtherNodesWhenOneIsOffTheNetwork: for Kubernetes the
// node is there for 40 s yet, so engines go on being told of its address.
func TestRequestsGoOnThroughOtherNodesWhenOneIsOffTheNetwork(t *testing.T) {
	const pool = "hearth.test/unplugged"
	// With the leader of the API, which somebody else has to become.
	lost := bench.Node(leaderNode(t))
	others := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == lost.Name })
	tenant := newTenant(t)
	submit(t, tenant, "cut-everywhere", "on every node")
	waitObject(t, tenant, "cut-everywhere", "every node to be warm", allWarm)
	// One of the others has it, the third one only forwards.
	label(t, lost.Name, pool, "yes")
	label(t, others[0], pool, "yes")
	submit(t, tenant, "cut-placed", "on two nodes", "--node-selector", pool+"=yes")
	waitObject(t, tenant, "cut-placed", "two nodes to be warm", warmOn("2/2"))
	var engines []corev1.Pod
	for _, node := range others {
		engine, err := onNode(t.Context(), "engine", node)
		if err != nil {
			t.Fatal(err)
		}
		engines = append(engines, engine)
		for _, function := range []string{"cut-everywhere", "cut-placed"} {
			if err := bench.WaitFor(t.Context(), "the engine of "+node+" to answer for "+function, soon, func(ctx context.Context) (bool, error) {
				response, _, err := ask(ctx, engine, function, "")
				return err == nil && response.StatusCode == http.StatusOK, nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	plugged := false
	plug := func(ctx context.Context) error {
		if plugged {
			return nil
		}
		plugged = true
		return lost.Plug(ctx)
	}
	t.Cleanup(func() {
		if err := plug(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := lost.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	asked, slowest := 0, time.Duration(0)
	for until := time.Now().Add(offline); time.Now().Before(until); {
		for i, engine := range engines {
			for function, text := range map[string]string{"cut-everywhere": "on every node", "cut-placed": "on two nodes"} {
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), soon)
				response, body, err := ask(ctx, engine, function, "")
				cancel()
				if err != nil || response.StatusCode != http.StatusOK || !strings.Contains(body, text) {
					t.Errorf("%s through %s: %v %v %s", function, others[i], err, response, body)
				}
				asked++
				slowest = max(slowest, time.Since(began))
			}
		}
		time.Sleep(askEvery)
	}
	t.Logf("%d requests while %s was off the network, the slowest took %s", asked, lost.Name, slowest.Round(time.Millisecond))
	if err := plug(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := bench.WaitNodeReady(t.Context(), lost.Name); err != nil {
		t.Fatal(err)
	}
	if err := ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	// It missed nothing that it is not told of now.
	submit(t, tenant, "cut-everywhere", "on every node again")
	back, err := onNode(t.Context(), "engine", lost.Name)
	if err != nil {
		t.Fatal(err)
	}
	var last string
	if err := bench.WaitFor(t.Context(), lost.Name+" to have what is new", soon, func(ctx context.Context) (bool, error) {
		_, body, err := ask(ctx, back, "cut-everywhere", "")
		last = fmt.Sprint(body, err)
		return err == nil && strings.Contains(body, "on every node again"), nil
	}); err != nil {
		t.Fatalf("%v; it answers %s", err, last)
	}
}
