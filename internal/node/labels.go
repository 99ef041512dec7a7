package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// DefaultProofStaleAfter is how long a label outlives the last answer. Probes
// run every few minutes; a label that one slow containerd could remove would
// take pods with it that have nothing to do with it.
const DefaultProofStaleAfter = 15 * time.Minute

// ProofState is what the newest attempt to run Wasm under a runtime said.
type ProofState int

// An attempt that gave no answer (containerd was restarting, the probe was
// never scheduled) is Unknown: absence of a proof is not proof of absence.
const (
	Unknown ProofState = iota
	Proven
	Failed
)

// Labels keeps one label per runtime on the Node equal to what was proven.
// Its methods are safe for concurrent use.
type Labels struct {
	clients    *kube.Clients
	o          Options
	staleAfter time.Duration

	mu sync.Mutex // serialises Sync and guards answered
	// answered is when each runtime last gave an answer; for one that has not
	// since this process started, when it was first asked about.
	answered map[string]time.Time
}

// NewLabels returns the labels of the clients' node. staleAfter 0 means
// DefaultProofStaleAfter.
func NewLabels(clients *kube.Clients, staleAfter time.Duration, o Options) *Labels {
	if staleAfter == 0 {
		staleAfter = DefaultProofStaleAfter
	}
	return &Labels{clients: clients, o: o.withDefaults(), staleAfter: staleAfter, answered: map[string]time.Time{}}
}

// Sync makes the labels say what proofs says. A proven runtime is labelled, a
// failed one is not, an unknown one keeps what it has until staleAfter has
// passed since its last answer (or since this process first asked). proofs
// names every runtime this node should have: the label of one it leaves out is
// removed. Nothing is written when nothing changes.
func (l *Labels) Sync(ctx context.Context, proofs map[string]ProofState) error {
	if proofs == nil {
		// An empty map is a decision, nil is more likely a mistake, and the
		// price of the mistake is every label of the node.
		return fmt.Errorf("labels of node %s: no runtimes were named", l.clients.NodeName)
	}
	for name := range proofs {
		if problems := validation.IsQualifiedName(v1alpha1.RuntimeLabelPrefix + name); len(problems) > 0 {
			return fmt.Errorf("label of runtime %q: %s", name, problems[0])
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := get(ctx, l.clients.Node, l.clients.NodeName)
	if err != nil {
		return err
	}
	change := labelChange(n.Labels, l.wanted(proofs))
	if len(change) == 0 {
		return nil
	}
	// A merge patch names exactly the keys that change, whoever wrote them
	// first (bootstrap may have registered the node with them), and never
	// creates a Node. Server-side apply does neither.
	metadata := identity(n)
	metadata["labels"] = change
	if _, err := patch(ctx, l.clients.Node, n.Name, types.MergePatchType, map[string]any{"metadata": metadata}); err != nil {
		return err
	}
	l.announce(n, change)
	return nil
}

// wish is what should become of a label; keep leaves it as it is. The zero
// value removes, which is what a runtime that nobody names gets.
type wish int

const (
	absent wish = iota
	present
	keep
)

func (l *Labels) wanted(proofs map[string]ProofState) map[string]wish {
	now := l.o.Clock.Now()
	maps.DeleteFunc(l.answered, func(name string, _ time.Time) bool {
		_, named := proofs[name]
		return !named
	})
	wanted := make(map[string]wish, len(proofs))
	for name, proof := range proofs {
		last, known := l.answered[name]
		if proof != Unknown || !known {
			l.answered[name] = now
			last = now
		}
		switch {
		case proof == Proven:
			wanted[name] = present
		case proof == Unknown && now.Sub(last) <= l.staleAfter:
			wanted[name] = keep
		default:
			wanted[name] = absent
		}
	}
	return wanted
}

// labelChange returns the labels of a merge patch: a value sets, nil removes.
func labelChange(have map[string]string, wanted map[string]wish) map[string]any {
	change := map[string]any{}
	for key := range have {
		if name, ours := strings.CutPrefix(key, v1alpha1.RuntimeLabelPrefix); ours && wanted[name] == absent {
			change[key] = nil
		}
	}
	for name, w := range wanted {
		if key := v1alpha1.RuntimeLabelPrefix + name; w == present && have[key] != "true" {
			change[key] = "true"
		}
	}
	return change
}

func (l *Labels) announce(n *corev1.Node, change map[string]any) {
	for _, key := range slices.Sorted(maps.Keys(change)) {
		runtime := strings.TrimPrefix(key, v1alpha1.RuntimeLabelPrefix)
		if change[key] == nil {
			l.o.Logger.Warn("runtime label removed", "node", n.Name, "runtime", runtime)
			l.o.Events.Node(n, Warning, "RuntimeUnproven", fmt.Sprintf("Runtime %s is no longer proven to run Wasm here.", runtime))
			continue
		}
		l.o.Logger.Info("runtime label set", "node", n.Name, "runtime", runtime)
		l.o.Events.Node(n, Normal, "RuntimeProven", fmt.Sprintf("Runtime %s just ran Wasm here.", runtime))
	}
}
