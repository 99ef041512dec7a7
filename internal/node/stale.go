package node

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// DefaultStaleAfter is how long a heartbeat may be missing: three of them and
// the time to notice.
const DefaultStaleAfter = 3*DefaultHeartbeat + 30*time.Second

// nodePage bounds one answer of the API server.
const nodePage = 200

// StaleConditions turns the condition WasmReady of other nodes Unknown when
// their heartbeat stops, and removes the labels of their runtimes when nobody
// renewed the proofs for as long as an agent would believe them itself: what
// an agent cannot do once it is dead. It needs authority over all nodes, so it
// belongs to the cluster's own deployment and not to any node's agent; one at a
// time, which is the caller's to see to.
type StaleConditions struct {
	client     kubernetes.Interface
	o          Options
	staleAfter time.Duration
	// proofStaleAfter is when labels go.
	proofStaleAfter time.Duration

	// seen remembers each heartbeat and when it was first seen, by our own
	// clock: the clocks of nodes may be wrong, so their times are only ever
	// compared with each other.
	seen map[types.UID]sighting
}

type sighting struct {
	heartbeat metav1.Time
	at        time.Time
}

// NewStaleConditions returns a sweeper with the authority of client.
// staleAfter 0 means DefaultStaleAfter; it must be more than the agents'
// heartbeat.
func NewStaleConditions(client kubernetes.Interface, staleAfter time.Duration, o Options) *StaleConditions {
	if staleAfter == 0 {
		staleAfter = DefaultStaleAfter
	}
	return &StaleConditions{client: client, o: o.withDefaults(), staleAfter: staleAfter,
		proofStaleAfter: max(staleAfter, DefaultProofStaleAfter), seen: map[types.UID]sighting{}}
}

// Sweep looks at all nodes once and returns the names of those whose condition
// it turned Unknown. A heartbeat is stale when it has not changed for
// staleAfter of Sweeps, so the first Sweep of a process turns nothing; labels
// go after DefaultProofStaleAfter of the same. Sweep is not for concurrent use.
func (s *StaleConditions) Sweep(ctx context.Context) ([]string, error) {
	var turned []string
	here := map[types.UID]bool{}
	options := metav1.ListOptions{Limit: nodePage}
	for {
		page, err := s.list(ctx, options)
		if err != nil {
			return turned, fmt.Errorf("look for stale conditions: %w", err)
		}
		for i := range page.Items {
			n := &page.Items[i]
			here[n.UID] = true
			silent := s.silence(n)
			unknown, err := s.turnUnknown(ctx, n, silent)
			if err == nil {
				err = s.removeLabels(ctx, n, silent)
			}
			if unknown {
				turned = append(turned, n.Name)
			}
			// With a conflict a heartbeat came after all, or the node went: the
			// next sweep sees.
			if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
				return turned, err
			}
		}
		if options.Continue = page.Continue; options.Continue == "" {
			break
		}
	}
	for uid := range s.seen {
		if !here[uid] {
			delete(s.seen, uid)
		}
	}
	return turned, nil
}

func (s *StaleConditions) list(ctx context.Context, o metav1.ListOptions) (*corev1.NodeList, error) {
	ctx, cancel := context.WithTimeout(ctx, kube.CallTimeout)
	defer cancel()
	return s.client.CoreV1().Nodes().List(ctx, o)
}

// silence is for how long the node's heartbeat has been seen not to change.
func (s *StaleConditions) silence(n *corev1.Node) time.Duration {
	c := wasmReady(n)
	if c == nil {
		delete(s.seen, n.UID)
		return 0
	}
	now := s.o.Clock.Now()
	last, known := s.seen[n.UID]
	if !known || !last.heartbeat.Equal(&c.LastHeartbeatTime) {
		s.seen[n.UID] = sighting{c.LastHeartbeatTime, now}
		return 0
	}
	return now.Sub(last.at)
}

// turnUnknown says of a node that was silent for too long that nothing is
// known of it. n is then as it was written.
func (s *StaleConditions) turnUnknown(ctx context.Context, n *corev1.Node, silent time.Duration) (bool, error) {
	if silent <= s.staleAfter || wasmReady(n).Status == corev1.ConditionUnknown {
		return false, nil
	}
	c := *wasmReady(n)
	c.Status, c.Reason = corev1.ConditionUnknown, reasonHeartbeatStopped
	c.Message = fmt.Sprintf("The agent has not been heard of for more than %s; look at its pod or unit on the node.", s.staleAfter)
	c.LastTransitionTime = metav1.NewTime(s.o.Clock.Now())
	// LastHeartbeatTime stays: it is the agent's word, not ours. The version
	// makes a heartbeat that comes in between win.
	written, err := patch(ctx, s.client, n.Name, types.StrategicMergePatchType, map[string]any{
		"metadata": version(n),
		"status":   map[string]any{"conditions": []corev1.NodeCondition{c}},
	}, "status")
	if err != nil {
		return false, err
	}
	s.o.Logger.Warn("node condition turned unknown", "node", n.Name, "lastHeartbeat", c.LastHeartbeatTime.Time)
	s.o.Events.Node(n, Warning, "WasmReadyUnknown", c.Message)
	*n = *written
	return true, nil
}

// removeLabels takes the labels of runtimes from a node whose proofs are too
// old to be believed, so that no new pod is sent there for their sake.
func (s *StaleConditions) removeLabels(ctx context.Context, n *corev1.Node, silent time.Duration) error {
	if silent <= s.proofStaleAfter {
		return nil
	}
	labels := map[string]any{}
	for key := range n.Labels {
		if strings.HasPrefix(key, v1alpha1.RuntimeLabelPrefix) {
			labels[key] = nil
		}
	}
	if len(labels) == 0 {
		return nil
	}
	metadata := version(n)
	metadata["labels"] = labels
	if _, err := patch(ctx, s.client, n.Name, types.StrategicMergePatchType, map[string]any{"metadata": metadata}); err != nil {
		return err
	}
	s.o.Logger.Warn("labels of runtimes removed: their proofs are stale", "node", n.Name, "silent", silent.Round(time.Second))
	return nil
}

// Run sweeps every third of staleAfter until ctx ends.
func (s *StaleConditions) Run(ctx context.Context) {
	ticker := s.o.Clock.NewTicker(s.staleAfter / 3)
	defer ticker.Stop()
	for {
		if _, err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.o.Logger.Warn("stale conditions not swept", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C():
		}
	}
}
