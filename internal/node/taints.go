package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// ErrNoTaintAuthority says that this process has no identity that may change
// taints: NodeRestriction denies it to a kubelet's.
var ErrNoTaintAuthority = errors.New("no identity that may change taints; give the agent a kubeconfig for taints or run it as the DaemonSet")

// Taints adds and removes Hearth's own taints on the Node. Its methods are
// safe for concurrent use.
type Taints struct {
	clients *kube.Clients
	o       Options
}

// NewTaints returns the taints of the clients' node.
func NewTaints(clients *kube.Clients, o Options) *Taints {
	return &Taints{clients: clients, o: o.withDefaults()}
}

// Proven removes the startup taint.
func (t *Taints) Proven(ctx context.Context) error {
	return t.change(ctx, v1alpha1.TaintNotReady, "")
}

// NotReady sets the startup taint again.
func (t *Taints) NotReady(ctx context.Context) error {
	return t.change(ctx, v1alpha1.TaintNotReady, corev1.TaintEffectNoSchedule)
}

// Interrupted sets or removes the taint of a node that is about to go.
func (t *Taints) Interrupted(ctx context.Context, interrupted bool) error {
	effect := corev1.TaintEffectNoSchedule
	if !interrupted {
		effect = ""
	}
	return t.change(ctx, v1alpha1.TaintInterruption, effect)
}

// change makes the taints with that key be exactly one with that effect, or
// none when it is "". Taints are one list to the API server, so this reads,
// changes and writes on the condition that nothing else changed meanwhile.
func (t *Taints) change(ctx context.Context, key string, effect corev1.TaintEffect) error {
	return retryOnConflict(ctx, t.o.Clock, func(ctx context.Context) error {
		n, err := get(ctx, t.clients.Node, t.clients.NodeName)
		if err != nil {
			return err
		}
		taints, changed := withTaint(n.Spec.Taints, key, effect)
		if !changed {
			return nil
		}
		if t.clients.Tainter == nil {
			return fmt.Errorf("taint %s of node %s: %w", key, n.Name, ErrNoTaintAuthority)
		}
		// A merge patch replaces a list whole. With the version it is refused
		// with 409 when another wrote in between, which a JSON patch's test
		// would report as 422, indistinguishable from a mistake of ours.
		_, err = patch(ctx, t.clients.Tainter, n.Name, types.MergePatchType, map[string]any{
			"metadata": version(n),
			"spec":     map[string]any{"taints": taints},
		})
		if err == nil {
			t.o.Logger.Info("taint changed", "node", n.Name, "taint", key, "effect", effect)
		}
		return err
	})
}

func withTaint(have []corev1.Taint, key string, effect corev1.TaintEffect) (taints []corev1.Taint, changed bool) {
	taints = slices.DeleteFunc(slices.Clone(have), func(t corev1.Taint) bool { return t.Key == key && t.Effect != effect })
	if effect != "" && !slices.ContainsFunc(taints, func(t corev1.Taint) bool { return t.Key == key }) {
		return append(taints, corev1.Taint{Key: key, Effect: effect}), true
	}
	return taints, len(taints) != len(have)
}
