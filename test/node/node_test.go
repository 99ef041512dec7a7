package node_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/images"
)

const (
	labelWasmtime = v1alpha1.RuntimeLabelPrefix + "wasmtime"
	labelHollow   = v1alpha1.RuntimeLabelPrefix + "wasmer"   // exits 0 without running anything
	labelBroken   = v1alpha1.RuntimeLabelPrefix + "wasmedge" // fails at every create
)

func TestNodeIsLabelledForWhatRanWasmAndNothingElse(t *testing.T) {
	n := waitNode(t, wasmNode, "the proof's label and condition", func(n *corev1.Node) bool {
		return n.Labels[labelWasmtime] == "true" && condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionTrue &&
			!tainted(n, v1alpha1.TaintNotReady)
	})
	for _, label := range []string{labelHollow, labelBroken} {
		if _, ok := n.Labels[label]; ok {
			t.Errorf("the node has %s, but that runtime never ran a module", label)
		}
	}
	for key := range n.Labels {
		if strings.HasPrefix(key, v1alpha1.Group+"/") && key != labelWasmtime {
			t.Errorf("unexpected label %s", key)
		}
	}
	s := waitStatus(t, wasmNode, "a status that names every runtime", func(s v1alpha1.NodeStatus) bool { return len(s.Runtimes) >= 3 })
	codes := map[string]string{}
	for _, r := range s.Runtimes {
		codes[r.Handler] = r.Code
	}
	if codes["wasmtime"] != "ok" || codes["wasmer"] != "wrong-output" || codes["wasmedge"] != "create-failed" {
		t.Errorf("runtimes ended as %v", codes)
	}
	if s.State != v1alpha1.NodeDegraded {
		t.Errorf("a node with two bad shims is %s: %s", s.State, s.Summary)
	}
}

func TestNodeWithoutRuntimesSaysSo(t *testing.T) {
	n := waitNode(t, plainNode, "the condition", func(n *corev1.Node) bool {
		return condition(n, v1alpha1.NodeConditionWasmReady).Reason == "NoRuntime"
	})
	if condition(n, v1alpha1.NodeConditionWasmReady).Status != corev1.ConditionFalse {
		t.Errorf("condition %+v", condition(n, v1alpha1.NodeConditionWasmReady))
	}
	for key := range n.Labels {
		if strings.HasPrefix(key, v1alpha1.RuntimeLabelPrefix) {
			t.Errorf("a node without any runtime has %s", key)
		}
	}
}

// TestLabelFollowsTheShim does so on a node that KWasm has been to: its operator
// annotates nodes, labels what it provisioned, and writes shims of its own.
func TestLabelFollowsTheShim(t *testing.T) {
	ctx := t.Context()
	keys := map[string]string{"kwasm.sh/kwasm-node": "true", "kwasm.sh/kwasm-provisioned": "0123456789abcdef", "runtime": "containerd-shim-spin"}
	kwasm := func(ctx context.Context, value func(key string) any) error {
		set := map[string]any{}
		for key := range keys {
			set[key] = value(key)
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": set, "annotations": set}})
		if err != nil {
			return err
		}
		_, err = bench.Client().CoreV1().Nodes().Patch(ctx, wasmNode, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "kwasm-operator"})
		return err
	}
	if err := kwasm(ctx, func(key string) any { return keys[key] }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kwasm(context.Background(), func(string) any { return nil }) })
	waitNode(t, wasmNode, "the label", func(n *corev1.Node) bool { return n.Labels[labelWasmtime] == "true" })
	node := bench.Node(wasmNode)
	installed := filepath.Join(node.Path(node.RuntimeBinDir), "containerd-shim-wasmtime-v1")
	if _, err := os.Stat(installed); err != nil {
		installed = filepath.Join(node.RuntimeBinDir, "containerd-shim-wasmtime-v1")
	}
	replace(t, installed, wasm.Hollow)
	restored := false
	t.Cleanup(func() {
		if !restored {
			replace(t, installed, wasm.Wasmtime)
		}
	})
	waitNode(t, wasmNode, "the label to go with the shim", func(n *corev1.Node) bool {
		_, there := n.Labels[labelWasmtime]
		return !there && condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionFalse
	})
	replace(t, installed, wasm.Wasmtime)
	restored = true
	n := waitNode(t, wasmNode, "the label to come back", func(n *corev1.Node) bool { return n.Labels[labelWasmtime] == "true" })
	for key, want := range keys {
		if n.Labels[key] != want || n.Annotations[key] != want {
			t.Errorf("KWasm's %s is %q and %q, it wrote %q", key, n.Labels[key], n.Annotations[key], want)
		}
	}
}

// replace installs a file the way package managers do: by rename.
func replace(t *testing.T, to, from string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to+".new", content, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(to+".new", to); err != nil {
		t.Fatal(err)
	}
}

func TestLabelOutlivesARestartOfContainerd(t *testing.T) {
	waitNode(t, wasmNode, "the label", func(n *corev1.Node) bool { return n.Labels[labelWasmtime] == "true" })
	proved := provedAt(waitStatus(t, wasmNode, "a proof", func(s v1alpha1.NodeStatus) bool { return !provedAt(s).IsZero() }))
	time.Sleep(3 * time.Second) // what the test before caused may still be written
	from := time.Now()
	if err := bench.Node(wasmNode).RestartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, wasmNode, "a new proof after containerd came back", func(s v1alpha1.NodeStatus) bool { return provedAt(s).After(proved) })
	for _, at := range writesOfLabels(t) {
		if at.After(from) {
			t.Errorf("labels were written at %s although the proof held", at)
		}
	}
}

func provedAt(s v1alpha1.NodeStatus) time.Time {
	for _, r := range s.Runtimes {
		if r.Handler == "wasmtime" && r.Proven && r.ProvedAt != nil {
			return *r.ProvedAt
		}
	}
	return time.Time{}
}

// writesOfLabels are the times at which the agent patched the Node itself
// (not its status).
func writesOfLabels(t *testing.T) []time.Time {
	t.Helper()
	entries, err := bench.AuditEntries()
	if err != nil {
		t.Fatal(err)
	}
	var times []time.Time
	for _, e := range entries {
		if e.Verb == "patch" && e.ObjectRef.Resource == "nodes" && e.ObjectRef.Subresource == "" &&
			e.ObjectRef.Name == wasmNode && strings.Contains(e.UserAgent, "hearth-nodeagent") {
			times = append(times, e.RequestReceivedTimestamp)
		}
	}
	return times
}

func TestIdleAgentWritesHeartbeatsOnly(t *testing.T) {
	waitNode(t, wasmNode, "the label", func(n *corev1.Node) bool { return n.Labels[labelWasmtime] == "true" })
	// What the tests before caused may still be written: the state of images at
	// most every 30 seconds, the rest soon.
	for _, name := range []string{wasmNode, plainNode} {
		waitNode(t, name, "the images as they are", func(n *corev1.Node) bool {
			s, err := status(t.Context(), name)
			return err == nil && s.Images != nil && condition(n, images.ConditionType).Message == s.Images.Summary
		})
	}
	time.Sleep(5 * time.Second)
	from := time.Now()
	time.Sleep(20 * time.Second)
	entries, err := bench.AuditEntries()
	if err != nil {
		t.Fatal(err)
	}
	writes := 0
	for _, e := range entries {
		if !e.RequestReceivedTimestamp.After(from) || !strings.Contains(e.UserAgent, "hearth-nodeagent") {
			continue
		}
		if slices.Contains([]string{"create", "update", "patch", "delete"}, e.Verb) {
			if e.ObjectRef.Resource != "nodes" || e.ObjectRef.Subresource != "status" {
				t.Errorf("an idle agent wrote: %s %+v", e.Verb, e.ObjectRef)
			}
			writes++
		}
	}
	// Each may have had one at the beginning and one at the end.
	if writes > 4 {
		t.Errorf("%d writes of two idle agents in 20 seconds, which is how far heartbeats are apart", writes)
	}
}

// TestWasmImageIsWarmOnTheNodeBeforeItsFirstPod follows a quiet time: the
// condition that kubectl shows is written every 30 seconds at most.
func TestWasmImageIsWarmOnTheNodeBeforeItsFirstPod(t *testing.T) {
	wasmImageIsWarmOnTheNodeBeforeItsFirstPod(t)
}

func TestListedImagesAreWarmBeforeAnyPod(t *testing.T) {
	list := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "list", Namespace: namespace, Labels: map[string]string{images.ListLabel: "true"}},
		Data:       map[string]string{"images": toolbox + "\n"},
	}
	if _, err := bench.Client().CoreV1().ConfigMaps(namespace).Create(t.Context(), list, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bench.Client().CoreV1().ConfigMaps(namespace).Delete(context.Background(), list.Name, metav1.DeleteOptions{})
	})
	for _, name := range []string{wasmNode, plainNode} {
		waitStatus(t, name, "the list to be heard", func(s v1alpha1.NodeStatus) bool { return s.Images != nil && s.Images.Total > 0 })
		waitNode(t, name, "the condition that kubectl shows", func(n *corev1.Node) bool {
			return condition(n, images.ConditionType).Message != ""
		})
	}
}

func TestSimulatedInterruptionEmptiesTheNodeAndCanBeTakenBack(t *testing.T) {
	ctx := t.Context()
	two := int32(2)
	labels := map[string]string{"app": "victim"}
	if _, err := bench.Client().AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "victim", Namespace: "default"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &two, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{
						Weight: 100, Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{
							Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: []string{wasmNode}}}},
					}}}},
					Containers: []corev1.Container{{Name: "main", Image: toolbox, ImagePullPolicy: corev1.PullIfNotPresent, Args: []string{"serve"}}},
				},
			},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bench.Client().AppsV1().Deployments("default").Delete(context.Background(), "victim", metav1.DeleteOptions{})
	})
	on := func(ctx context.Context, node string) int {
		pods, err := bench.Client().CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=victim"})
		if err != nil {
			return -1
		}
		n := 0
		for _, p := range pods.Items {
			if p.Spec.NodeName == node && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
				n++
			}
		}
		return n
	}
	if err := bench.WaitFor(ctx, "two pods on the node", soon, func(ctx context.Context) (bool, error) { return on(ctx, wasmNode) == 2, nil }); err != nil {
		t.Fatal(err)
	}

	out, err := bench.Node(wasmNode).Command(ctx, agent, "simulate", "spot-interruption", "--in", "2m").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "drained") {
		t.Fatalf("nodeagent simulate spot-interruption: %v\n%s", err, out)
	}
	t.Logf("what a person sees:\n%s", out)
	n := waitNode(t, wasmNode, "cordon and taint", func(n *corev1.Node) bool {
		return n.Spec.Unschedulable && tainted(n, v1alpha1.TaintInterruption)
	})
	_ = n
	if err := bench.WaitFor(ctx, "both pods on the other node", soon, func(ctx context.Context) (bool, error) {
		return on(ctx, wasmNode) == 0 && on(ctx, plainNode) == 2, nil
	}); err != nil {
		t.Fatal(err)
	}
	s, err := status(ctx, wasmNode)
	if err != nil || s.Interruption == nil || !s.Interruption.Simulated || s.Interruption.Phase != "drained" {
		t.Errorf("status says %+v, %v", s.Interruption, err)
	}
	// The agent itself stays: it is a DaemonSet's.
	pods, err := bench.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + wasmNode, LabelSelector: "app.kubernetes.io/component=agent"})
	if err != nil || len(pods.Items) != 1 || pods.Items[0].DeletionTimestamp != nil {
		t.Errorf("the agent's pod on the drained node: %v, %v", pods.Items, err)
	}

	if out, err := bench.Node(wasmNode).Command(ctx, agent, "simulate", "end").CombinedOutput(); err != nil {
		t.Fatalf("nodeagent simulate end: %v\n%s", err, out)
	}
	waitNode(t, wasmNode, "the node to take pods again", func(n *corev1.Node) bool {
		return !n.Spec.Unschedulable && !tainted(n, v1alpha1.TaintInterruption)
	})
}

func TestEngineRunsWithoutAnyIdentity(t *testing.T) {
	ctx := t.Context()
	if err := bench.WaitFor(ctx, "the engine on both nodes to be ready", soon, func(ctx context.Context) (bool, error) {
		d, err := bench.Client().AppsV1().DaemonSets(namespace).Get(ctx, "hearth-engine", metav1.GetOptions{})
		return err == nil && d.Status.NumberReady == 2, err
	}); err != nil {
		t.Fatal(err)
	}
	pods, err := bench.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=engine"})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Spec.HostNetwork {
			t.Errorf("%s is on the host's network", p.Name)
		}
		for _, v := range p.Spec.Volumes {
			if v.Projected != nil {
				t.Errorf("%s has a token: volume %s", p.Name, v.Name)
			}
		}
	}
}

func TestStoppedAgentLeavesNoClaim(t *testing.T) {
	ctx := t.Context()
	selector := map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"nodeSelector": map[string]any{"nowhere": "true"}}}}}
	patch := func(body map[string]any) {
		t.Helper()
		data, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bench.Client().AppsV1().DaemonSets(namespace).Patch(ctx, "hearth-nodeagent", types.StrategicMergePatchType, data, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	patch(selector)
	waitNode(t, wasmNode, "the condition to be Unknown", func(n *corev1.Node) bool {
		c := condition(n, v1alpha1.NodeConditionWasmReady)
		return c.Status == corev1.ConditionUnknown && c.Reason == "AgentStopped"
	})
	patch(map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"nodeSelector": map[string]any{"nowhere": nil}}}}})
	waitNode(t, wasmNode, "the condition to be True again", func(n *corev1.Node) bool {
		return condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionTrue
	})
}
