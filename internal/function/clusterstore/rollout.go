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

// RecordedSpec is the spec that a revision was recorded for.
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
				return &RecordedSpec{Number: number, Spec: o.data.Spec}
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
	m.bump(0)
	m.wake()
	keys := make([]key, 0, len(m.functions.rows))
	for k := range m.functions.rows {
		keys = append(keys, k)
	}
	m.mu.Unlock()
	m.notify(keys...)
}
