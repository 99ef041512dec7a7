// Package node_test installs the shipped chart on a real cluster and holds the
// node agent to what it promises there: labels that follow proofs, images that
// are warm before their pods, a node that is left in time.
package node_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/packaging/spinkube"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	namespace = chart.Namespace
	toolbox   = "hearth.test/toolbox:1"

	// wasmNode has a real runtime, one that runs nothing and a broken one;
	// plainNode has none.
	wasmNode  = "node-wasm"
	plainNode = "node-plain"

	// soon bounds waits for what takes seconds: the machine may be busy.
	soon = 2 * time.Minute
)

// soaked is what a test does in `make soak`, where there is time, and usual
// elsewhere.
func soaked[T any](usual, soak T) T {
	if os.Getenv("HEARTH_SOAK") != "" {
		return soak
	}
	return usual
}

var (
	bench *cluster.Cluster
	agent string // the binary, for `nodeagent status` on a node
	wasm  shims.Paths
)

func TestMain(m *testing.M) {
	shared := cluster.Shared{First: true, Dump: chart.Dump, Start: func(ctx context.Context) (*cluster.Cluster, error) {
		err := setUp(ctx)
		return bench, err
	}}
	os.Exit(shared.Main(m))
}

func setUp(ctx context.Context) (err error) {
	if wasm, err = shims.Compile(ctx, os.Stderr); err != nil {
		return fmt.Errorf("build the shims: %w", err)
	}
	tools, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		return err
	}
	notReady := []corev1.Taint{{Key: v1alpha1.TaintNotReady, Effect: corev1.TaintEffectNoSchedule}}
	if bench, err = cluster.New(ctx, cluster.Options{Nodes: []cluster.Node{
		{Name: wasmNode, Taints: notReady, Runtimes: []cluster.Runtime{
			{Name: "wasmtime", Type: "io.containerd.wasmtime.v1", BinaryPath: wasm.Wasmtime},
			{Name: "wasmer", Type: "io.containerd.wasmer.v1", BinaryPath: wasm.Hollow},
			{Name: "wasmedge", Type: "io.containerd.wasmedge.v1", BinaryPath: wasm.Broken},
		}},
		{Name: plainNode},
	}}); err != nil {
		return err
	}
	if err := bench.LoadBinaryImage(ctx, toolbox, map[string]string{"/toolbox": tools}); err != nil {
		return err
	}
	if agent, err = chart.LoadImage(ctx, bench); err != nil {
		return err
	}
	// Before the agents: they look for kinds that came later every two minutes.
	if _, err := bench.ApplyManifest(ctx, spinkube.CRDs()); err != nil {
		return err
	}
	return install(ctx)
}

// install applies what `helm install` would. The API has tests of its own
// (test/functions); without it the agents follow the Function objects.
func install(ctx context.Context, values ...string) error {
	return chart.Install(ctx, bench, append([]string{"api.enabled=false",
		// What changes is seen sooner than usual: nobody here waits for the usual.
		"agent.heartbeatSeconds=20", "agent.extraArgs[0]=--shim-interval=3s", "agent.extraArgs[1]=--imds-interval=2s"}, values...)...)
}

// status is `nodeagent status -o json` on a node. The command's exit code
// follows the node's state, so it is no error here.
func status(ctx context.Context, node string) (v1alpha1.NodeStatus, error) {
	var s v1alpha1.NodeStatus
	out, err := bench.Node(node).Command(ctx, agent, "status", "-o", "json").Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return s, err
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("status of %s: %w: %s", node, err, out)
	}
	return s, nil
}

func waitStatus(t *testing.T, node, what string, ok func(v1alpha1.NodeStatus) bool) v1alpha1.NodeStatus {
	t.Helper()
	var last v1alpha1.NodeStatus
	if err := bench.WaitFor(t.Context(), what, soon, func(ctx context.Context) (bool, error) {
		s, err := status(ctx, node)
		if err != nil {
			return false, nil // the agent may be starting
		}
		last = s
		return ok(s), nil
	}); err != nil {
		shown, _ := json.MarshalIndent(last, "", "  ")
		t.Fatalf("%v\nlast status: %s", err, shown)
	}
	return last
}

func waitNode(t *testing.T, name, what string, ok func(*corev1.Node) bool) *corev1.Node {
	t.Helper()
	var last *corev1.Node
	if err := bench.WaitNode(t.Context(), name, what, soon, func(n *corev1.Node) bool { last = n; return ok(n) }); err != nil {
		t.Fatalf("%v\nlabels %v, taints %v, conditions %+v", err, last.Labels, last.Spec.Taints, last.Status.Conditions)
	}
	return last
}

func condition(n *corev1.Node, kind string) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if string(c.Type) == kind {
			return c
		}
	}
	return corev1.NodeCondition{}
}

func tainted(n *corev1.Node, key string) bool {
	for _, t := range n.Spec.Taints {
		if t.Key == key {
			return true
		}
	}
	return false
}
