package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// Admission decides, for a spec that somebody wrote by other means than a Store,
// what the submit API decides for one that comes its way. Errors that are a
// *Refusal become the function's condition; any other is worth a retry.
type Admission interface {
	// Inspect says how many bytes the module of an image has, if functions of
	// the namespace may run it. size is what is known of it already, 0 for
	// nothing.
	Inspect(ctx context.Context, namespace string, a v1alpha1.Artifact, runtime v1alpha1.FunctionRuntime, size int64) (int64, error)
	// Admit says whether the namespace has room for the function with a module
	// of that many bytes. done is called with what was recorded, nil for nothing.
	// wait says that Admit may wait for changes of the namespace that are on
	// their way; without it the caller may be in the way of one of them.
	Admit(ctx context.Context, namespace, name string, bytes int64, wait bool) (done func(*function.Function), err error)
}

// Refusal is why a spec does not become a revision, although it could be one.
type Refusal struct {
	// Reason and Message are the condition's; the message says what to do.
	Reason, Message string
	// Retry is after what time the same spec may be taken on; 0: never.
	Retry time.Duration
	// Err is the cause.
	Err error
}

func (r *Refusal) Error() string { return r.Message }

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }

// Recorded says whether the spec of a Function is that of its wanted revision;
// not so for one that somebody wrote by other means than a Store and that Adopt
// has not recorded, or refuses.
func Recorded(f *kube.Function) bool {
	rec, ok := readRecord(f.Annotations)
	return ok && specHash(f.Spec) == rec.of
}

// errOtherSpec says that the spec changed since it was decided on.
var errOtherSpec = errors.New("the spec changed meanwhile")

// verdict is what Admission said of a spec.
type verdict struct {
	of    string // specHash of the spec
	bytes int64
	err   error
	done  func(*function.Function)
}

// over lets go of the place that was kept, for what was recorded or nothing.
func (v *verdict) over(f *function.Function) {
	if v != nil && v.done != nil {
		v.done(f)
		v.done = nil
	}
}

// judge asks whether the spec may become a revision. The spec has been found
// valid, or will be looked at again.
func (s *Store) judge(ctx context.Context, k key, spec v1alpha1.FunctionSpec, wait bool) *verdict {
	v := &verdict{of: specHash(spec)}
	artifact, err := artifactOf(spec.Image)
	if s.o.Admission == nil || err != nil {
		v.bytes = s.sizeOf(k, artifact)
		return v
	}
	if v.bytes, v.err = s.o.Admission.Inspect(ctx, k.Namespace, artifact, spec.Runtime, s.sizeOf(k, artifact)); v.err == nil {
		v.done, v.err = s.o.Admission.Admit(ctx, k.Namespace, k.Name, v.bytes, wait)
	}
	return v
}

// sizeOf is the size of a module that a kept revision of the function has, 0 for
// one that none has: bytes that are known under the same digest are the same.
func (s *Store) sizeOf(k key, a v1alpha1.Artifact) int64 {
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	if e := s.mem.entries[k.Name]; e != nil && e.key == k {
		for _, r := range e.revs {
			if r.Artifact == a && r.SizeBytes > 0 {
				return r.SizeBytes
			}
		}
	}
	return 0
}

// refusal says whether an error of adopt is the spec's, of which the condition
// tells; what was recorded before counts.
func refusal(err error) bool {
	var invalid *function.ValidationError
	var refused *Refusal
	return errors.As(err, &invalid) || errors.As(err, &refused) || errors.Is(err, function.ErrTaken) || errors.Is(err, function.ErrHostTaken)
}

// audit writes the line of a change that somebody made with an object. Who that
// was is in the audit log of the API server alone.
func (s *Store) audit(action, outcome, problem string, k key, image string, r *function.Revision) {
	if s.o.Audit == nil {
		return
	}
	attrs := []slog.Attr{
		slog.String("outcome", outcome), slog.String("action", action), slog.String("source", "kubernetes"),
		slog.String("tenant", k.Namespace), slog.String("function", k.Name),
	}
	if image != "" {
		attrs = append(attrs, slog.String("image", image))
	}
	if r != nil {
		attrs = append(attrs, slog.Int("revision", r.Number), slog.String("digest", r.ModuleDigest))
	}
	if problem != "" {
		attrs = append(attrs, slog.String("problem", problem))
	}
	s.o.Audit.LogAttrs(context.Background(), slog.LevelInfo, "function change", attrs...)
}

// refuse says in the status that the spec does not become a revision, and
// returns why.
func (s *Store) refuse(ctx context.Context, f *kube.Function, reason string, why error) error {
	st := kube.CopyStatus(f.Status)
	before := readyOf(st)
	setCondition(&st, v1alpha1.Condition{
		Type: v1alpha1.ConditionReady, Status: v1alpha1.ConditionFalse, Reason: reason, Message: why.Error(),
	}, f.Generation, s.o.Now())
	if err := s.writeStatus(ctx, f, st); err != nil {
		return err
	}
	if before == nil || before.Reason != reason || before.ObservedGeneration != f.Generation { // else it is tried again
		s.audit("apply", "refused", reason, key{Namespace: f.Namespace, Name: f.Name}, f.Spec.Image, nil)
	}
	return why
}

func readyOf(st v1alpha1.FunctionStatus) *v1alpha1.Condition {
	for i := range st.Conditions {
		if st.Conditions[i].Type == v1alpha1.ConditionReady {
			c := st.Conditions[i]
			return &c
		}
	}
	return nil
}

// adoptions bounds how often a spec that changes under the decision is decided
// on anew.
const adoptions = 5

// admitted adopts a function, on a decision that is made before its lock is
// taken: who holds a place of the tenant may wait for that lock.
func (s *Store) admitted(ctx context.Context, k key) error {
	for range adoptions {
		s.mem.mu.RLock()
		f := s.mem.functions.rows[k].value
		recorded := s.mem.entries[k.Name]
		s.mem.mu.RUnlock()
		var v *verdict
		if f != nil && f.DeletionTimestamp == nil && (recorded == nil || recorded.key != k || specHash(f.Spec) != recorded.rec.of) {
			v = s.judge(ctx, k, f.Spec, true)
			var refused *Refusal
			if v.err != nil && !errors.As(v.err, &refused) {
				return v.err
			}
		}
		err := s.attempt(ctx, k.Name, "", func(string) error { return s.adopt(ctx, k, v) })
		v.over(nil)
		if !errors.Is(err, errOtherSpec) {
			return err
		}
	}
	return fmt.Errorf("record function %s: %w: its spec changed at each of %d attempts", k, function.ErrUnavailable, adoptions)
}
