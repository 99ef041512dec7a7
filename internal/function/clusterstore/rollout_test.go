package clusterstore_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

func TestARolloutHasTheSecretsAsTheyWereRecorded(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	secrets := apiServer(t).Client().CoreV1().Secrets("ann")
	own := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "mutable"}, Data: map[string][]byte{"pw": []byte("one")}}
	if _, err := secrets.Create(ctx, own, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	apply(t, "ann", "pinned", v1alpha1.FunctionSpec{Runtime: v1alpha1.RuntimeSpin, Env: []v1alpha1.EnvVar{
		{Name: "PLAIN", Value: "p"},
		{Name: "PASSWORD", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "mutable", Key: "pw"}},
	}})
	if err := s.Adopt(ctx, "ann", "pinned"); err != nil {
		t.Fatal(err)
	}
	own.Data["pw"] = []byte("two")
	if _, err := secrets.Update(ctx, own, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Rollout("ann", "pinned")
	if err != nil || len(r.Wanted.Spec.Env) != 2 || r.Wanted.Spec.Env[0] != (v1alpha1.EnvVar{Name: "PLAIN", Value: "p"}) {
		t.Fatalf("%+v %v", r.Wanted, err)
	}
	ref := r.Wanted.Spec.Env[1].SecretKeyRef
	if ref == nil {
		t.Fatal("the secret is held, not named")
	}
	copied, err := secrets.Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil || string(copied.Data[ref.Key]) != "one" || copied.Immutable == nil || !*copied.Immutable {
		t.Errorf("the pod gets %s of %s: %q, immutable %v, %v", ref.Key, ref.Name, copied.Data[ref.Key], copied.Immutable, err)
	}
	// What its author wrote stays so, and is recorded as it is.
	f := read(t, "ann", "pinned")
	if of := f.Spec.Env[1].SecretKeyRef; of == nil || of.Name != "mutable" || !clusterstore.Recorded(f) {
		t.Errorf("the spec: %+v", f.Spec.Env)
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
