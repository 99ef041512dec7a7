package node

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// Note writes a further condition of our own on the Node, whose type starts
// with our prefix. It is for conditions that say what happened last rather
// than vouch for something: they have no heartbeat of their own and are only
// written when told to.
type Note struct {
	clients *kube.Clients
	o       Options
	kind    corev1.NodeConditionType

	mu      sync.Mutex
	written corev1.NodeCondition
}

// NewNote returns the writer of the condition kind, such as
// "hearth.sh/ImagesWarm", on the clients' node.
func NewNote(clients *kube.Clients, kind string, o Options) (*Note, error) {
	if !strings.HasPrefix(kind, v1alpha1.Group+"/") {
		return nil, fmt.Errorf("node condition %q is not ours: it must start with %s/", kind, v1alpha1.Group)
	}
	return &Note{clients: clients, o: o.withDefaults(), kind: corev1.NodeConditionType(kind)}, nil
}

// Write makes the condition say r. It always writes.
func (n *Note) Write(ctx context.Context, r Readiness) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := metav1.NewTime(n.o.Clock.Now().Truncate(time.Second))
	condition := corev1.NodeCondition{
		Type: n.kind, Status: r.Status, Reason: r.Reason, Message: truncate(r.Message, maxMessage),
		LastHeartbeatTime: now, LastTransitionTime: now,
	}
	if n.written.Type == "" {
		if old, err := get(ctx, n.clients.Node, n.clients.NodeName); err == nil {
			for _, c := range old.Status.Conditions {
				if c.Type == n.kind {
					n.written = c
				}
			}
		}
	}
	if n.written.Status == r.Status && !n.written.LastTransitionTime.IsZero() {
		condition.LastTransitionTime = n.written.LastTransitionTime
	}
	if _, err := patch(ctx, n.clients.Node, n.clients.NodeName, types.StrategicMergePatchType,
		map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{condition}}}, "status"); err != nil {
		return err
	}
	n.written = condition
	return nil
}
