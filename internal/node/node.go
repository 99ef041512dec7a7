// Package node writes what Hearth has to say on the Node object of a cluster:
// one label per proven runtime, the condition WasmReady, two taints, and, when
// the machine is about to go, the cordon and the evictions.
//
// It owns exactly the keys named in api/v1alpha1 and touches no other: not the
// labels of others, not a cordon or taint that somebody else set. It proves no
// runtime (internal/shim does) and reads no instance metadata (internal/imds
// does). StaleConditions is the one part that looks at other nodes; it runs in
// the cluster's own deployment, never in an agent.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/clock"

	"github.com/hearth-sh/hearth/internal/kube"
)

// FieldManager is the name under which the API server records our fields.
const FieldManager = "hearth-nodeagent"

const (
	// conflictDeadline bounds the retries of one write that others keep
	// overtaking. A kubelet writes its Node every few seconds at most.
	conflictDeadline = 15 * time.Second
	conflictPause    = 50 * time.Millisecond
)

// Options are what all parts of this package share; the zero value is usable.
type Options struct {
	// Logger defaults to discarding.
	Logger *slog.Logger
	// Clock defaults to the machine's.
	Clock clock.WithTicker
	// Events records what happens on the Node and its pods; nil discards.
	Events *Recorder
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = clock.RealClock{}
	}
	return o
}

// get reads a Node with a deadline. It asks etcd (no ResourceVersion), because
// what is written next depends on it.
func get(ctx context.Context, client kubernetes.Interface, name string) (*corev1.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	n, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read node %s: %w", name, err)
	}
	return n, nil
}

// patch applies a patch to a Node (or its status, with that subresource).
func patch(ctx context.Context, client kubernetes.Interface, name string, kind types.PatchType, body any, subresources ...string) (*corev1.Node, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode a patch of node %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	n, err := client.CoreV1().Nodes().Patch(ctx, name, kind, data, metav1.PatchOptions{FieldManager: FieldManager}, subresources...)
	if err != nil {
		return nil, fmt.Errorf("write node %s: %w", name, err)
	}
	return n, nil
}

// identity is the part of a patch's metadata that makes the API server refuse
// it (409 Conflict) when the Node was meanwhile deleted and another of the same
// name was registered. It also keeps a patch from ever creating a Node.
func identity(n *corev1.Node) map[string]any { return map[string]any{"uid": n.UID} }

// version is identity for writes that depend on all of what was read.
func version(n *corev1.Node) map[string]any {
	return map[string]any{"uid": n.UID, "resourceVersion": n.ResourceVersion}
}

// retryOnConflict calls attempt again while it fails with a conflict, with
// growing pauses and jitter, for conflictDeadline at most.
func retryOnConflict(ctx context.Context, c clock.Clock, attempt func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, conflictDeadline)
	defer cancel()
	pause := conflictPause
	for {
		err := attempt(ctx)
		if !apierrors.IsConflict(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-c.After(pause/2 + rand.N(pause)):
		}
		pause = min(2*pause, time.Second)
	}
}
