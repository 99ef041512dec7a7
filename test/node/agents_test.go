package node_test

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// secondAgent starts another agent on wasmNode that shares no socket and no
// store with the first. What it returns waits for its end: it is refused after
// the time that it leaves the first to end.
func secondAgent(t *testing.T) (refused func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	cmd := bench.Node(wasmNode).Command(ctx, agent, "run", "--kubernetes=kubeconfig", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
		"--node-name="+wasmNode, "--imds=off", "--engine-socket=", "--socket=/run/hearth-second/agent.sock",
		"--store-dir=/var/lib/hearth-second/store", "--state-dir=/var/lib/hearth-second/agent")
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	waited := false
	t.Cleanup(func() {
		cancel()
		if !waited {
			<-ended
		}
	})
	return func() {
		t.Helper()
		err := <-ended
		waited = true
		lines := strings.Split(strings.TrimSpace(said.String()), "\n")
		t.Logf("a person reads: %s", lines[len(lines)-1])
		if err == nil || ctx.Err() != nil || !strings.Contains(lines[len(lines)-1], "another nodeagent works on this node (pod hearth-system/hearth-nodeagent-") {
			t.Errorf("a second agent: %v, %v", err, ctx.Err())
		}
	}
}

// TestSecondAgentIsRefusedWhileTheFirstWorksOn fills the time that the first
// agent is given to end with work of it.
func TestSecondAgentIsRefusedWhileTheFirstWorksOn(t *testing.T) {
	ctx := t.Context()
	before := waitProved(t)
	watchLabels(t, wasmNode)
	refused := secondAgent(t)
	t.Run("a Wasm pod may have an ordinary container", wasmPodMayHaveAnOrdinaryContainer)
	t.Run("SpinApps are brought as their executors say", spinAppsAreBroughtAsTheirExecutorsSay)
	t.Run("an image behind a pull secret is left to kubelet", imageBehindAPullSecretIsLeftToKubelet)
	refused()
	if s, err := status(ctx, wasmNode); err != nil || !s.StartedAt.Equal(before.StartedAt) || check(s, "kubernetes").State != v1alpha1.CheckOK {
		t.Errorf("the first agent after that: %v, %+v", err, check(s, "kubernetes"))
	}
}

// replaceAgent has wasmNode's agent started anew, as a new pod.
func replaceAgent(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	old, err := agentPod(ctx, wasmNode)
	if err != nil {
		t.Fatal(err)
	}
	now := int64(1)
	if err := bench.Client().CoreV1().Pods(namespace).Delete(ctx, old.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	if err := bench.WaitFor(ctx, "a new agent on "+wasmNode, soon, func(ctx context.Context) (bool, error) {
		pod, err := agentPod(ctx, wasmNode)
		if err != nil || pod.UID == old.UID {
			return false, nil
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady {
				return c.Status == corev1.ConditionTrue, nil
			}
		}
		return false, nil
	}); err != nil {
		t.Fatal(err)
	}
}
