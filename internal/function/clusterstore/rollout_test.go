package clusterstore_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
)

func TestARolloutHasTheSpecsOfItsRevisions(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	if _, err := s.Rollout("default", "pods"); !errors.Is(err, function.ErrNotFound) {
		t.Fatalf("of nothing: %v", err)
	}
	secret := func(nr *function.NewRevision) {
		nr.Settings.Runtime = v1alpha1.RuntimeSpin
		nr.Settings.Secrets = function.Secrets{"KEY": "value"}
	}
	add(t, s, "pods", 1, secret)
	r, err := s.Rollout("default", "pods")
	if err != nil || r.Object.Name != "pods" || r.Wanted.Number != 1 || r.Previous != nil {
		t.Fatalf("%+v %v", r, err)
	}
	if e := r.Wanted.Spec.Env; len(e) != 1 || e[0].Name != "KEY" || e[0].Value != "" || e[0].SecretKeyRef == nil {
		t.Errorf("a secret is to be named, not held: %+v", e)
	}
	answered := v1alpha1.FunctionNode{Name: "spin", Revision: 1, Progress: v1alpha1.ProgressReady, Serving: 1}
	if err := s.Observe(ctx, "default", "pods", answered, nil); err != nil {
		t.Fatal(err)
	}
	add(t, s, "pods", 2, secret)
	add(t, s, "pods", 3, secret)
	// Revision 2 never answered: it is nothing to go back to.
	r, err = s.Rollout("default", "pods")
	if err != nil || r.Wanted.Number != 3 || r.Previous == nil || r.Previous.Number != 1 {
		t.Fatalf("%+v %v", r, err)
	}
	if r.Wanted.Spec.Image == r.Previous.Spec.Image {
		t.Error("both run the same image")
	}
	if _, err := s.Rollout("ann", "pods"); !errors.Is(err, function.ErrNotFound) {
		t.Errorf("of another namespace: %v", err)
	}

	if err := s.Unobserve(ctx, "default", "pods", "spin"); err != nil {
		t.Fatal(err)
	}
	if f := read(t, "default", "pods"); len(f.Status.Nodes) != 0 {
		t.Errorf("%+v", f.Status.Nodes)
	}
	before := read(t, "default", "pods").ResourceVersion
	if err := errors.Join(s.Unobserve(ctx, "default", "pods", "spin"), s.Unobserve(ctx, "default", "nobody", "spin")); err != nil {
		t.Error(err)
	}
	if read(t, "default", "pods").ResourceVersion != before {
		t.Error("taking back nothing wrote something")
	}
}

func TestNodesAndSubscribersHearOfAnotherBaseDomain(t *testing.T) {
	fresh(t)
	var mu sync.Mutex
	base := "one.test"
	s := open(t, func(o *clusterstore.Options) {
		o.BaseDomain = func() string { mu.Lock(); defer mu.Unlock(); return base }
		o.Host = func(_, name string) string { mu.Lock(); defer mu.Unlock(); return name + "." + base }
	})
	add(t, s, "hello", 1, nil)
	d, err := s.DesiredFor(t.Context(), "node-a", 0)
	if err != nil || d.BaseDomain != "one.test" {
		t.Fatalf("%+v %v", d, err)
	}
	heard := make(chan string, 16)
	cancel := s.Subscribe(func(_, name string) { heard <- name })
	defer cancel()
	<-heard // that it exists
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	next := make(chan v1alpha1.Desired, 1)
	go func() {
		defer close(next)
		if d, err := s.DesiredFor(ctx, "node-a", d.Generation); err == nil {
			next <- d
		}
	}()
	mu.Lock()
	base = "two.test"
	mu.Unlock()
	s.BaseDomainChanged()
	if d, ok := <-next; !ok || d.BaseDomain != "two.test" {
		t.Errorf("a waiting node was told %+v", d)
	}
	if name := <-heard; name != "hello" {
		t.Errorf("%s", name)
	}
}

func TestAHostOfAnotherFormIsARoute(t *testing.T) {
	fresh(t)
	s := open(t, func(o *clusterstore.Options) {
		o.Host = func(namespace, name string) string { return name + "-" + namespace + ".functions.test" }
	})
	add(t, s, "hello", 1, nil)
	d, err := s.DesiredFor(t.Context(), "node-a", 0)
	if err != nil || len(d.Functions) != 1 {
		t.Fatalf("%+v %v", d, err)
	}
	if diff := cmp.Diff([]v1alpha1.HostRoute{{Host: "hello-default.functions.test", Path: "/"}}, d.Functions[0].Routes); diff != "" {
		t.Error(diff)
	}
}
