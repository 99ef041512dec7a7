package clusterstore

import (
	"context"
	"fmt"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// This file is what whoever brings functions to something other than nodes'
// engines needs to know, and can say.

// Rollout is a recorded function as it is to be brought to the cluster.
type Rollout struct {
	// Object is the Function as memory has it; it may be read only.
	Object *kube.Function
	// Wanted is the revision that should answer requests, Previous the newest
	// other one that did, if any is kept.
	Wanted, Previous *RecordedSpec
}

// RecordedSpec is the spec that a revision was recorded for. Its secret variables
// refer to the values as they were then, wherever the spec had them from.
type RecordedSpec struct {
	Number int
	Spec   v1alpha1.FunctionSpec
}

// Rollout returns a function with the specs of its revisions. The error is
// function.ErrNotFound for one that is not recorded (yet), or
// function.ErrClosed.
func (s *Store) Rollout(namespace, name string) (Rollout, error) {
	k := key{Namespace: namespace, Name: name}
	m := s.mem
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return Rollout{}, function.ErrClosed
	}
	e := m.entries[name]
	if e == nil || e.key != k {
		return Rollout{}, fmt.Errorf("%w: %s", function.ErrNotFound, k)
	}
	spec := func(number int) *RecordedSpec {
		for _, ref := range e.rec.revisions {
			if o := m.kept[k][k.Name+"-"+ref.suffix]; ref.number == number && o != nil {
				return &RecordedSpec{Number: number, Spec: o.data.pinned()}
			}
		}
		return nil
	}
	r := Rollout{Object: e.object.DeepCopy(), Wanted: spec(e.rec.wanted)}
	if r.Wanted == nil {
		return Rollout{}, fmt.Errorf("%w: %s", function.ErrNotFound, k)
	}
	for i := len(e.revs) - 1; i >= 0; i-- {
		if v := &e.revs[i]; v.Number != e.rec.wanted && !v.ActivatedAt.IsZero() {
			r.Previous = spec(v.Number)
			break
		}
	}
	return r, nil
}

// AtEngines is a function that requests are to be led to the engines for.
type AtEngines struct {
	Namespace, Name string
	// Host is the custom host at which the engines answer for it, empty for
	// none, and Routes the paths below it (none: "/").
	Host   string
	Routes []string
	// Leaving says that the function becomes a spin function.
	Leaving bool
}

// AtEngines returns the functions that requests are to be led to the engines
// for, by name: resident ones, and those that move to pods until these answer.
// A custom host moves with what answers: it stays the pods' until an engine has
// the resident revision, and the engines' until pods have the spin one.
func (s *Store) AtEngines() ([]AtEngines, error) {
	m := s.mem
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return nil, function.ErrClosed
	}
	var out []AtEngines
	for _, name := range m.names {
		e := m.entries[name]
		if !e.engines {
			continue
		}
		f := AtEngines{Namespace: e.key.Namespace, Name: name, Host: e.host, Routes: e.routes, Leaving: e.spin}
		if !e.spin && e.withPods() {
			f.Host, f.Routes = "", nil
		}
		out = append(out, f)
	}
	return out, nil
}

// withPods says whether pods of an earlier revision answer, and no engine has
// the wanted one.
func (e *entry) withPods() bool {
	pods := nodeOf(e.object.Status.Nodes, NodeSpin)
	if pods == nil || pods.Serving == 0 {
		return false
	}
	for _, n := range e.object.Status.Nodes {
		if n.Name != NodeSpin && n.Name != NodeIngress && n.Serving == e.rec.wanted {
			return false
		}
	}
	return true
}

// Unobserve takes back what was said under a node's name (see Observe).
// Nothing is written where nothing was said; a function that is gone is no
// error.
func (s *Store) Unobserve(ctx context.Context, namespace, name, node string) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	return s.writeNode(ctx, key{Namespace: namespace, Name: name}, node,
		func(record, *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase) { return nil, nil })
}

// BaseDomainChanged tells nodes of a base domain that is another now, and
// subscribers of every function, whose URL is.
func (s *Store) BaseDomainChanged() {
	m := s.mem
	m.mu.Lock()
	m.bumpAll(0)
	m.wake()
	keys := make([]key, 0, len(m.functions.rows))
	for k := range m.functions.rows {
		keys = append(keys, k)
	}
	m.mu.Unlock()
	m.notify(keys...)
}
