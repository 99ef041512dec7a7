package kube

import (
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

var (
	_ runtime.Object = (*Function)(nil)
	_ runtime.Object = (*FunctionList)(nil)
	_ runtime.Object = (*Host)(nil)
	_ runtime.Object = (*HostList)(nil)
)

// DeepCopyInto writes a copy that shares nothing with f.
func (f *Function) DeepCopyInto(out *Function) {
	*out = *f
	f.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Limits = copyOf(f.Spec.Limits)
	out.Spec.Env = slices.Clone(f.Spec.Env)
	for i := range out.Spec.Env {
		e := &out.Spec.Env[i]
		e.SecretKeyRef = copyOf(e.SecretKeyRef)
	}
	out.Spec.Routes = slices.Clone(f.Spec.Routes)
	if p := f.Spec.Placement; p != nil {
		out.Spec.Placement = &v1alpha1.FunctionPlacement{NodeSelector: maps.Clone(p.NodeSelector)}
	}
	out.Spec.Autoscaling = copyOf(f.Spec.Autoscaling)
	out.Status = CopyStatus(f.Status)
}

// CopyStatus returns a copy that shares nothing with s.
func CopyStatus(s v1alpha1.FunctionStatus) v1alpha1.FunctionStatus {
	s.Nodes = slices.Clone(s.Nodes)
	for i := range s.Nodes {
		s.Nodes[i].Error = copyOf(s.Nodes[i].Error)
	}
	s.History = slices.Clone(s.History)
	for i := range s.History {
		h := &s.History[i]
		h.Error, h.Phases, h.ActivatedAt = copyOf(h.Error), slices.Clone(h.Phases), copyOf(h.ActivatedAt)
	}
	s.Conditions = slices.Clone(s.Conditions)
	return s
}

// DeepCopyInto writes a copy that shares nothing with h.
func (h *Host) DeepCopyInto(out *Host) {
	*out = *h
	h.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.ClaimedAt, out.Spec.ReleasedAt = copyOf(h.Spec.ClaimedAt), copyOf(h.Spec.ReleasedAt)
}

// DeepCopyInto writes a copy that shares nothing with l.
func (l *FunctionList) DeepCopyInto(out *FunctionList) {
	*out = *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = deepCopies(l.Items)
}

// DeepCopyInto writes a copy that shares nothing with l.
func (l *HostList) DeepCopyInto(out *HostList) {
	*out = *l
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = deepCopies(l.Items)
}

// DeepCopy returns a copy that shares nothing with f.
func (f *Function) DeepCopy() *Function { return deepCopy(f) }

// DeepCopy returns a copy that shares nothing with h.
func (h *Host) DeepCopy() *Host { return deepCopy(h) }

// DeepCopyObject implements runtime.Object.
func (f *Function) DeepCopyObject() runtime.Object { return deepCopyObject(f) }

// DeepCopyObject implements runtime.Object.
func (h *Host) DeepCopyObject() runtime.Object { return deepCopyObject(h) }

// DeepCopyObject implements runtime.Object.
func (l *FunctionList) DeepCopyObject() runtime.Object { return deepCopyObject(l) }

// DeepCopyObject implements runtime.Object.
func (l *HostList) DeepCopyObject() runtime.Object { return deepCopyObject(l) }

// copier is a pointer to a T that is copied whole.
type copier[T any] interface {
	*T
	DeepCopyInto(*T)
}

func deepCopy[T any, P copier[T]](p P) *T {
	if p == nil {
		return nil
	}
	out := new(T)
	p.DeepCopyInto(out)
	return out
}

func deepCopies[T any, P copier[T]](items []T) []T {
	out := slices.Clone(items)
	for i := range items {
		P(&items[i]).DeepCopyInto(&out[i])
	}
	return out
}

// deepCopyObject returns no object at all, not one that is a nil pointer, for nil.
func deepCopyObject[T any, P interface {
	copier[T]
	runtime.Object
}](p P) runtime.Object {
	if p == nil {
		return nil
	}
	return P(deepCopy[T](p))
}

// copyOf copies what holds no pointers itself.
func copyOf[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}
