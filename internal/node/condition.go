package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	// DefaultHeartbeat is how often the condition is written when nothing
	// changes. It is the only write of an idle agent.
	DefaultHeartbeat = time.Minute
	// MinHeartbeat is because Kubernetes keeps the time of a heartbeat in whole
	// seconds: faster ones would not be seen to come.
	MinHeartbeat = 2 * time.Second
	// MaxHeartbeat leaves room for three of them before StaleConditions takes
	// the labels of a node for left behind, whatever it was told.
	MaxHeartbeat = DefaultProofStaleAfter / 3
	// leftAlone is how long a new process leaves what it finds at least,
	// however fast its heartbeat: it has to find and prove its runtimes first.
	leftAlone = 30 * time.Second
	// shutdownDeadline bounds the last write, which must fit into what is left
	// of the pod's grace period.
	shutdownDeadline = 3 * time.Second
	// retryPause is between two attempts at a write that failed.
	retryPause = 5 * time.Second
	// maxMessage bounds a condition's message: it may quote what others wrote,
	// and every watcher of Nodes gets it.
	maxMessage = 512
)

// Readiness is what the condition WasmReady says.
type Readiness struct {
	Status corev1.ConditionStatus
	// Reason is stable, one word in CamelCase; Message one sentence for people.
	Reason, Message string
}

// Condition keeps the Node's condition WasmReady. Set never blocks; Run
// writes.
type Condition struct {
	clients   *kube.Clients
	o         Options
	heartbeat time.Duration

	mu      sync.Mutex
	wanted  Readiness     // guarded by mu
	changed chan struct{} // holds one token while wanted was set and not written

	// Run's own: what was last written, for the transition time.
	written corev1.NodeCondition
}

// CheckHeartbeat refuses an interval that StaleConditions could not follow.
func CheckHeartbeat(interval time.Duration) error {
	if interval < MinHeartbeat || interval > MaxHeartbeat {
		return fmt.Errorf("a heartbeat every %s cannot be judged; give at least %s and at most %s", interval, MinHeartbeat, MaxHeartbeat)
	}
	return nil
}

// NewCondition returns the condition of the clients' node, unknown until the
// first Set. heartbeat 0 means DefaultHeartbeat.
func NewCondition(clients *kube.Clients, heartbeat time.Duration, o Options) *Condition {
	if heartbeat == 0 {
		heartbeat = DefaultHeartbeat
	}
	return &Condition{
		clients: clients, o: o.withDefaults(), heartbeat: heartbeat,
		wanted:  Readiness{Status: corev1.ConditionUnknown, Reason: "NotProbedYet", Message: "No runtime has been probed since the agent started."},
		changed: make(chan struct{}, 1),
	}
}

// Set says what the condition should be. Saying the same again writes nothing.
func (c *Condition) Set(r Readiness) {
	r.Message = truncate(r.Message, maxMessage)
	c.mu.Lock()
	defer c.mu.Unlock()
	if r == c.wanted {
		return
	}
	c.wanted = r
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// Run writes the condition at once when it changes and as a heartbeat when it
// does not, until ctx ends; then it writes Unknown once, so that a stopped
// agent leaves no claim behind. It returns that last write's error, nil
// otherwise.
//
// What a process that crashed left behind stays as it is until the first Set,
// so that a restart does not flip the condition, but for three heartbeats (or
// leftAlone, if that is longer) only and without a heartbeat: nobody stands for
// it.
func (c *Condition) Run(ctx context.Context) error {
	next, read := c.restore(ctx)
	said := false
	for {
		timer := c.o.Clock.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return c.stop(context.WithoutCancel(ctx))
		case <-c.changed:
			timer.Stop()
			said = true
		case <-timer.C():
		}
		if !read {
			// An agent may start while the API server is away. Writing before
			// reading would flip the condition, or lose since when it holds.
			if next, read = c.restore(ctx); !read || next > 0 && !said {
				continue
			}
		}
		c.mu.Lock()
		wanted := c.wanted
		c.mu.Unlock()
		if err := c.write(ctx, wanted); err != nil {
			if ctx.Err() == nil {
				c.o.Logger.Warn("node condition not written", "node", c.clients.NodeName, "error", err)
			}
			next = retryPause
			continue
		}
		// Jitter keeps the heartbeats of nodes that booted together apart.
		next = c.heartbeat - rand.N(c.heartbeat/10+1)
	}
}

// restore reads what the condition is now and returns how long it may stay;
// when it could not be read, when to try again.
func (c *Condition) restore(ctx context.Context) (next time.Duration, read bool) {
	n, err := get(ctx, c.clients.Node, c.clients.NodeName)
	if err != nil {
		c.o.Logger.Warn("node condition not read", "node", c.clients.NodeName, "error", err)
		return retryPause, false
	}
	old := wasmReady(n)
	if old == nil {
		return 0, true
	}
	c.written = *old
	if old.Status == corev1.ConditionUnknown {
		return 0, true
	}
	return max(3*c.heartbeat, leftAlone), true
}

// The reasons of a condition that nobody stands for any more.
const (
	reasonStopped          = "AgentStopped"
	reasonHeartbeatStopped = "HeartbeatStopped"
)

func (c *Condition) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownDeadline)
	defer cancel()
	return c.write(ctx, Readiness{
		Status: corev1.ConditionUnknown, Reason: reasonStopped,
		Message: "The agent was stopped; nobody is watching whether Wasm runs here.",
	})
}

func (c *Condition) write(ctx context.Context, r Readiness) error {
	now := metav1.NewTime(c.o.Clock.Now())
	condition := corev1.NodeCondition{
		Type: v1alpha1.NodeConditionWasmReady, Status: r.Status, Reason: r.Reason, Message: r.Message,
		LastHeartbeatTime: now, LastTransitionTime: now,
	}
	if c.written.Status == r.Status && !c.written.LastTransitionTime.IsZero() {
		condition.LastTransitionTime = c.written.LastTransitionTime
	}
	// A strategic merge patch merges conditions by type: it names ours only.
	n, err := patch(ctx, c.clients.Node, c.clients.NodeName, types.StrategicMergePatchType,
		map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{condition}}}, "status")
	if err != nil {
		return err
	}
	if c.written.Status != r.Status && c.written.Status != "" {
		kind := Normal
		if r.Status != corev1.ConditionTrue && r.Reason != reasonStopped {
			kind = Warning
		}
		c.o.Events.Node(n, kind, "WasmReady"+string(r.Status), r.Message)
	}
	c.written = condition
	return nil
}

func wasmReady(n *corev1.Node) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == v1alpha1.NodeConditionWasmReady {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

func truncate(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-len("…")], "") + "…"
}

// SpotServer returns a sentence of warning when the node is a server of the
// cluster (control plane or etcd member) on a machine that may be taken away
// at two minutes' notice. lifecycle is the instance's, as instance metadata
// names it (instance-life-cycle): "spot" or "on-demand".
func SpotServer(n *corev1.Node, lifecycle string) (string, bool) {
	if lifecycle != "spot" {
		return "", false
	}
	for _, role := range []string{"control-plane", "etcd", "master"} {
		if _, ok := n.Labels["node-role.kubernetes.io/"+role]; ok {
			return fmt.Sprintf("Node %s is a %s of this cluster on a Spot instance: it can vanish at two minutes' notice and take the quorum with it; replace it by an on-demand instance.", n.Name, role), true
		}
	}
	return "", false
}
