package clusterstore_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
)

// gate is an Admission as a test wants it.
type gate struct {
	mu       sync.Mutex
	inspect  error
	admit    error
	bytes    int64
	known    []int64 // sizes that Inspect was told
	held     int
	recorded []string
	during   func() // of Admit, once
}

func (g *gate) Inspect(_ context.Context, _ string, _ v1alpha1.Artifact, _ v1alpha1.FunctionRuntime, size int64) (int64, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.known = append(g.known, size)
	return g.bytes, g.inspect
}

func (g *gate) Admit(context.Context, string, string, int64, bool) (func(*function.Function), error) {
	g.mu.Lock()
	err, during := g.admit, g.during
	g.during = nil
	g.mu.Unlock()
	if during != nil {
		during()
	}
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held++
	return func(f *function.Function) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.held--
		if f != nil {
			g.recorded = append(g.recorded, f.Name)
		}
	}, nil
}

// applied is apply, and waits for the store to see it.
func applied(t *testing.T, s *clusterstore.Store, namespace, name string, spec v1alpha1.FunctionSpec) {
	t.Helper()
	generation := apply(t, namespace, name, spec).Generation
	eventually(t, "the watch brings "+name, func() bool {
		f, _, err := s.Function(namespace, name)
		return err == nil && f.Generation >= generation
	})
}

func (g *gate) set(do func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	do()
}

func TestWhatIsAppliedIsHeldToTheRulesOfTheAPI(t *testing.T) {
	fresh(t)
	g := &gate{bytes: 4321}
	var log bytes.Buffer
	s := open(t, func(o *clusterstore.Options) {
		o.Admission, o.Audit = g, slog.New(slog.NewJSONHandler(&log, nil))
	})
	ctx := t.Context()
	lines := func(with ...string) (n int) {
	lines:
		for line := range strings.Lines(log.String()) {
			for _, w := range with {
				if !strings.Contains(line, w) {
					continue lines
				}
			}
			n++
		}
		return n
	}
	full := &clusterstore.Refusal{Reason: "QuotaExceeded", Message: "There is no room.", Retry: time.Minute}

	g.set(func() { g.admit = full })
	applied(t, s, "ann", "first", v1alpha1.FunctionSpec{})
	for range 2 { // again, as a reconciler does
		var refused *clusterstore.Refusal
		if err := s.Adopt(ctx, "ann", "first"); !errors.As(err, &refused) || refused.Retry != time.Minute {
			t.Fatalf("without room: %v", err)
		}
	}
	if c := ready(read(t, "ann", "first")); c.Status != v1alpha1.ConditionFalse || c.Reason != "QuotaExceeded" || c.Message != "There is no room." {
		t.Errorf("condition %+v", c)
	}
	if _, err := s.Get(ctx, "first"); !errors.Is(err, function.ErrNotFound) {
		t.Errorf("it was recorded: %v", err)
	}
	if n := lines(`"outcome":"refused"`, `"action":"apply"`, `"problem":"QuotaExceeded"`, `"tenant":"ann"`); n != 1 {
		t.Errorf("%d lines of the refusal in %s", n, &log)
	}

	g.set(func() { g.admit = nil })
	if err := s.Adopt(ctx, "ann", "first"); err != nil {
		t.Fatal(err)
	}
	if v, err := s.Get(ctx, "first"); err != nil || v.Revision.SizeBytes != 4321 {
		t.Errorf("%+v %v", v.Revision, err)
	}
	if n := lines(`"outcome":"accepted"`, `"action":"apply"`, `"function":"first"`, `"revision":1`, `"image":"registry.test/team/hello@`); n != 1 {
		t.Errorf("%d lines of the change in %s", n, &log)
	}
	g.set(func() {
		if g.held != 0 || len(g.recorded) != 1 || g.recorded[0] != "first" {
			t.Errorf("%d places are held, recorded %v", g.held, g.recorded)
		}
	})

	// Another's image is for good, and what was recorded goes on.
	g.set(func() {
		g.inspect, g.known = &clusterstore.Refusal{Reason: "ImageNotYours", Message: "It is another's."}, nil
	})
	other := v1alpha1.FunctionSpec{Image: "registry.test/other/hello@sha256:" + strings.Repeat("0e", 32)}
	applied(t, s, "ann", "first", other)
	if err := s.Adopt(ctx, "ann", "first"); err != nil {
		t.Errorf("nothing is to be tried again: %v", err)
	}
	if f := read(t, "ann", "first"); ready(f).Reason != "ImageNotYours" || clusterstore.Recorded(f) {
		t.Errorf("condition %+v", ready(f))
	}
	if err := s.SetProgress(ctx, v1alpha1.NodeReport{Node: "node-a", Functions: []v1alpha1.FunctionReport{
		{Name: "first", Revision: 1, Progress: v1alpha1.ProgressReady, Serving: 1},
	}}); err != nil {
		t.Fatal(err)
	}
	if f := read(t, "ann", "first"); ready(f).Reason != "ImageNotYours" || f.Status.ActiveRevision != 1 {
		t.Errorf("after a node's word: %+v", f.Status)
	}
	// A change by the API replaces what was refused, and is none of the gate's.
	r, err := s.AddRevision(ctx, "first", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
		nr := revision(7)
		nr.Settings = c.Revision.Settings
		return nr, nil
	})
	if err != nil || r.Function.Wanted != 2 {
		t.Errorf("%+v %v", r, err)
	}
	// An image that a revision has is known.
	g.set(func() { g.inspect, g.known = nil, nil })
	applied(t, s, "ann", "first", v1alpha1.FunctionSpec{Env: []v1alpha1.EnvVar{{Name: "A", Value: "1"}}})
	if err := s.Adopt(ctx, "ann", "first"); err != nil {
		t.Fatal(err)
	}
	g.set(func() {
		if len(g.known) != 1 || g.known[0] != 4321 {
			t.Errorf("the gate was told of sizes %v", g.known)
		}
	})

	// A registry that is asked yet says nothing of the function.
	asking := errors.New("asking")
	g.set(func() { g.inspect = asking })
	applied(t, s, "ann", "second", v1alpha1.FunctionSpec{})
	if err := s.Adopt(ctx, "ann", "second"); !errors.Is(err, asking) {
		t.Errorf("while it is asked for: %v", err)
	}
	if f := read(t, "ann", "second"); len(f.Status.Conditions) != 0 {
		t.Errorf("conditions %+v", f.Status.Conditions)
	}

	if err := clientOf(t).Delete().Namespace("ann").Resource("functions").Name("second").Body(&metav1.DeleteOptions{}).Do(ctx).Error(); err != nil {
		t.Fatal(err)
	}
}

// A submit holds its tenant's place while it waits for a function's lock, so
// that nobody may wait for a place while holding that lock.
func TestADecisionIsMadeWithoutTheFunctionsLock(t *testing.T) {
	fresh(t)
	g := &gate{bytes: 1}
	s := open(t, func(o *clusterstore.Options) { o.Admission = g })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	add(t, s, "hello", 1, nil)
	changed := read(t, "default", "hello")
	spec := changed.Spec
	spec.Env = []v1alpha1.EnvVar{{Name: "A", Value: "1"}}
	applied(t, s, "default", "hello", spec)
	g.set(func() {
		g.during = func() {
			// Which takes in what was applied, and makes the decision one about
			// a spec that is no more.
			if _, err := s.AddRevision(ctx, "hello", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
				nr := revision(2)
				nr.Settings = c.Revision.Settings
				nr.Settings.MemoryMiB = 64
				return nr, nil
			}); err != nil {
				t.Error(err)
			}
		}
	})
	if err := s.Adopt(ctx, "default", "hello"); err != nil {
		t.Fatal(err)
	}
	v, err := s.Get(ctx, "hello")
	if err != nil || v.Wanted != 3 || v.Revision.Settings.Env["A"] != "1" || v.Revision.Settings.MemoryMiB != 64 {
		t.Errorf("%+v %v", v.Revision, err)
	}
	g.set(func() {
		if g.held != 0 {
			t.Errorf("%d places are held", g.held)
		}
	})

	// A spec that changes under the decision is decided on anew.
	g.set(func() {
		g.known = nil
		g.during = func() {
			other := v1alpha1.FunctionSpec{Image: "registry.test/team/other@sha256:" + strings.Repeat("0d", 32)}
			apply(t, "default", "hello", other)
		}
	})
	first := v1alpha1.FunctionSpec{Image: "registry.test/team/first@sha256:" + strings.Repeat("0c", 32)}
	applied(t, s, "default", "hello", first)
	if err := s.Adopt(ctx, "default", "hello"); err != nil {
		t.Fatal(err)
	}
	if v, err := s.Get(ctx, "hello"); err != nil || v.Revision.Artifact.Repository != "team/other" {
		t.Errorf("%+v %v", v.Revision.Artifact, err)
	}
	g.set(func() {
		if len(g.known) != 2 || g.held != 0 {
			t.Errorf("%d decisions, %d places held", len(g.known), g.held)
		}
	})
}
