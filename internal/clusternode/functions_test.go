package clusternode

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func object(namespace, name string, age time.Duration, change func(*kube.Function)) kube.Function {
	f := kube.Function{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, Generation: 3, UID: types.UID(namespace + name),
			CreationTimestamp: metav1.NewTime(noon.Add(-age)),
		},
		Spec: v1alpha1.FunctionSpec{Image: "registry.test/team/" + name + "@" + digestA},
	}
	if change != nil {
		change(&f)
	}
	return f
}

func TestFunctionsOfTheClusterBecomeWhatTheEngineServes(t *testing.T) {
	s := newFunctionSource(nil, slog.New(slog.DiscardHandler))
	s.replace([]kube.Function{
		object("team-a", "hello", time.Hour, func(f *kube.Function) {
			f.Spec.Image = "registry.test:5000/team/hello:v1@" + digestB
			f.Spec.Limits = &v1alpha1.FunctionLimits{MemoryMiB: 16}
			f.Spec.Env = []v1alpha1.EnvVar{{Name: "WHO", Value: "world"}}
		}),
		object("team-b", "hello", time.Minute, nil), // its name is taken by an older one
		object("team-b", "pods", time.Hour, func(f *kube.Function) { f.Spec.Runtime = v1alpha1.RuntimeSpin }),
		object("team-b", "tagged", time.Hour, func(f *kube.Function) { f.Spec.Image = "registry.test/x:latest" }),
		object("team-b", "secret", time.Hour, func(f *kube.Function) {
			f.Spec.Env = []v1alpha1.EnvVar{{Name: "KEY", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "s", Key: "k"}}}
		}),
		object("team-b", "leaving", time.Hour, func(f *kube.Function) { now := metav1.Now(); f.DeletionTimestamp = &now }),
	})
	got, err := s.Desired(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []v1alpha1.DesiredFunction{{
		Name: "hello", Tenant: "team-a",
		Candidates: []v1alpha1.DesiredRevision{{
			Revision:  3,
			Artifact:  v1alpha1.Artifact{Registry: "registry.test:5000", Repository: "team/hello", Digest: digestB},
			MemoryMiB: 16, TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency,
			Env: map[string]string{"WHO": "world"},
		}},
	}}
	if d := cmp.Diff(want, got.Functions); d != "" {
		t.Error(d)
	}
}

func TestDesiredWaitsForAChangeOfAnySpec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFunctionSource(nil, slog.New(slog.DiscardHandler))
		f := object("team", "hello", time.Hour, nil)
		s.replace([]kube.Function{f})
		first, err := s.Desired(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		// A change of status is none of the engine's business.
		touched := f
		touched.ResourceVersion = "2"
		s.put(watch.Modified, &touched)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		same, err := s.Desired(ctx, first.Generation)
		if err != nil || same.Generation != first.Generation || len(same.Functions) != 0 {
			t.Errorf("without a change: %+v, %v", same, err)
		}
		time.AfterFunc(time.Second, func() { s.put(watch.Deleted, &touched) })
		next, err := s.Desired(t.Context(), first.Generation)
		if err != nil || next.Generation <= first.Generation || len(next.Functions) != 0 {
			t.Errorf("after a deletion: %+v, %v", next, err)
		}
	})
}

func TestFunctionsOutliveAnAPIServerThatIsAway(t *testing.T) {
	s := newFunctionSource(nil, slog.New(slog.DiscardHandler))
	s.fail(context.DeadlineExceeded)
	if _, err := s.Desired(t.Context(), 0); err == nil {
		t.Error("something is desired although nobody ever said so")
	}
	s.replace([]kube.Function{object("team", "hello", time.Hour, nil)})
	d, err := s.Desired(t.Context(), 0)
	if err != nil || len(d.Functions) != 1 {
		t.Fatalf("%+v, %v", d, err)
	}
	s.fail(context.DeadlineExceeded)
	if _, err := s.Desired(t.Context(), d.Generation); err == nil {
		t.Error("nobody hears that the API server is away")
	}
	// The loop asks anew after an error, and keeps what it has meanwhile. An
	// answer from memory would pass for the API server's.
	if again, err := s.Desired(t.Context(), 0); err == nil {
		t.Errorf("the API server seems to be back: %+v", again)
	}
	s.replace([]kube.Function{object("team", "hello", time.Hour, nil)})
	if back, err := s.Desired(t.Context(), 0); err != nil || len(back.Functions) != 1 {
		t.Errorf("after it is back: %+v, %v", back, err)
	}
}
