package clusternode

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-sh/hearth/internal/node"
	"github.com/hearth-sh/hearth/internal/shim"
)

func TestLabelsAndConditionFollowProofs(t *testing.T) {
	good := &shim.Proof{At: time.Now(), OK: true, Code: shim.CodeOK, Message: "ran"}
	bad := &shim.Proof{At: time.Now(), Code: shim.CodeWrongOutput, Message: "it ran nothing"}
	away := &shim.Proof{At: time.Now(), Code: shim.CodeUnreachable, Message: "containerd does not answer"}
	runtime := func(handler string, proven, stale bool, answer, last *shim.Proof) shim.State {
		return shim.State{Runtime: shim.Runtime{Name: "wasmtime", Handler: handler}, Proven: proven, Stale: stale, Answer: answer, Last: last}
	}
	for _, c := range []struct {
		name     string
		snapshot shim.Snapshot
		answered bool
		proofs   map[string]node.ProofState
		status   corev1.ConditionStatus
		reason   string
	}{
		{"a runtime ran the probe", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("wasmtime", true, false, good, good)}},
			true, map[string]node.ProofState{"wasmtime": node.Proven}, corev1.ConditionTrue, "RuntimesProven"},
		{"one ran it, one did not", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("hollow", false, false, bad, bad), runtime("wasmtime", true, false, good, good)}},
			true, map[string]node.ProofState{"wasmtime": node.Proven, "hollow": node.Failed}, corev1.ConditionTrue, "SomeRuntimesProven"},
		{"none ran it", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("hollow", false, false, bad, bad)}},
			true, map[string]node.ProofState{"hollow": node.Failed}, corev1.ConditionFalse, "ProofFailed"},
		{"a good proof outlives containerd's restart", shim.Snapshot{Looked: true, Unreachable: "no answer", Runtimes: []shim.State{runtime("wasmtime", true, false, good, away)}},
			true, map[string]node.ProofState{"wasmtime": node.Proven}, corev1.ConditionTrue, "RuntimesProven"},
		{"a proof that grew stale is missing, not failed", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("wasmtime", false, true, good, away)}},
			true, map[string]node.ProofState{"wasmtime": node.Unknown}, corev1.ConditionUnknown, "NoAnswer"},
		{"nothing is concluded before all were tried", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("wasmtime", true, false, good, good), runtime("spin", false, false, nil, nil)}},
			false, map[string]node.ProofState{"wasmtime": node.Proven}, corev1.ConditionTrue, "RuntimesProven"},
		{"nothing is concluded before runtimes were looked for", shim.Snapshot{}, false, map[string]node.ProofState{}, corev1.ConditionFalse, "NoRuntime"},
		{"no runtime at all", shim.Snapshot{Looked: true}, true, map[string]node.ProofState{}, corev1.ConditionFalse, "NoRuntime"},
		{"containerd was never there", shim.Snapshot{Unreachable: "no answer"}, false, map[string]node.ProofState{}, corev1.ConditionUnknown, "ContainerdUnreachable"},
		{"a shim that no pod can ask for has no label", shim.Snapshot{Looked: true, Runtimes: []shim.State{runtime("", false, false, bad, bad)}},
			true, map[string]node.ProofState{}, corev1.ConditionFalse, "NoRuntime"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := judge(c.snapshot)
			if v.answered != c.answered {
				t.Errorf("answered %v, want %v", v.answered, c.answered)
			}
			if d := cmp.Diff(c.proofs, v.proofs); d != "" {
				t.Error(d)
			}
			if v.condition.Status != c.status || v.condition.Reason != c.reason {
				t.Errorf("condition %s %s, want %s %s", v.condition.Status, v.condition.Reason, c.status, c.reason)
			}
		})
	}
}

func TestALostAPIServerIsLookedIntoAtOnceAndOnce(t *testing.T) {
	c := &cluster{heard: make(chan struct{}, 1)}
	for i, step := range []struct{ server, look bool }{{true, false}, {false, true}, {false, false}, {true, true}, {true, false}, {false, true}} {
		c.hear(step.server)
		if look := len(c.heard) == 1; look != step.look {
			t.Errorf("step %d: looked into %t, want %t", i, look, step.look)
		}
		for range len(c.heard) {
			<-c.heard
		}
	}
	c.hear(true)
	c.hear(false) // nobody looks yet, and nobody waits for that
}
