package images

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"
)

func refusing(context.Context, Reference, *Auth, func(Progress) error) error {
	return fail(CodeUnauthorized, nil, "401 Unauthorized")
}

func TestAnImageThatNeedsAPullSecretIsLeftToKubelet(t *testing.T) {
	const name = "r.example/private:1"
	private := wanting(name, "spin")
	private.PullSecrets = []PullSecret{{"team", "pull"}, {"team", "other"}}

	t.Run("and warmed once kubelet brought it", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			module := startModule('p', 10)
			d := w.rt.publish(name, "wasm", wasmLayer(module))
			w.rt.onPull = refusing
			w.src.want(private)
			w.start()
			time.Sleep(2 * time.Minute)
			i := w.image(name)
			if i.State != StateDeferred || i.Code != CodePullSecret || strings.Contains(i.Message, "401") ||
				!strings.Contains(i.Message, "pull secret team/pull or one of 1 others") || !strings.Contains(i.Message, "reads no Secrets") {
				t.Fatalf("%+v", i)
			}
			s, _ := w.l.Status()
			if c := s.Condition(); s.Counts[StateFailed] != 0 || c.Status != "False" || c.Reason != "ImagesDeferred" || !strings.HasPrefix(s.Summary, "0/1 warm, 1 deferred: "+name) {
				t.Errorf("%+v, %s", c, s.Summary)
			}
			if n := len(w.rt.pulled()); n > 1 {
				t.Errorf("the registry was asked %d times within two minutes", n)
			}
			w.rt.set(func() { w.rt.local[name] = d })
			w.l.Look() // containerd's event
			time.Sleep(5 * time.Second)
			if i := w.image(name); i.State != StateWarm || i.Code != "" || w.st.count(sum(module)) != 1 {
				t.Errorf("%+v", i)
			}
		})
	})

	t.Run("unless the registry gives it to everybody, or to the node", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.rt.publish(name, "wasm", wasmLayer(startModule('p', 10)))
			w.src.want(private)
			w.start()
			time.Sleep(2 * time.Minute)
			if i := w.image(name); i.State != StateWarm {
				t.Errorf("%+v", i)
			}
		})
	})

	t.Run("and one without any pull secret has failed", func(t *testing.T) {
		inBubble(t, func(t *testing.T, w *world) {
			w.rt.onPull = refusing
			w.src.want(wanting(name, "spin"))
			w.start()
			time.Sleep(2 * time.Minute)
			if i := w.image(name); i.State != StateFailed || i.Code != CodeUnauthorized {
				t.Errorf("%+v", i)
			}
		})
	})
}

func TestAFullDiskIsTriedAgainAsSoonAsThereIsRoom(t *testing.T) {
	for _, code := range []string{CodeDiskLow, CodeDiskFull} {
		t.Run(code, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				const name = "r.example/app:1"
				free := int64(10 << 20)
				var room atomic.Bool
				w.rt.publish(name, "wasm", wasmLayer(startModule('d', 10)))
				w.rt.onPull = func(context.Context, Reference, *Auth, func(Progress) error) error {
					if !room.Load() {
						return fail(code, nil, "no space left on device")
					}
					return nil
				}
				urgent := wanting(name, "spin")
				urgent.Urgent = true
				w.src.want(urgent)
				w.start()
				w.l.mu.Lock()
				w.l.free = func(string) (int64, error) { return free, nil }
				w.l.mu.Unlock()
				time.Sleep(10 * time.Minute) // the back-off is minutes long now
				if i := w.image(name); i.State != StateFailed || i.Code != code || i.Failures > 15 {
					t.Fatalf("%+v", i)
				}
				tries := len(w.rt.pulled())
				w.l.mu.Lock()
				free += roomStep
				w.l.mu.Unlock()
				room.Store(true)
				time.Sleep(roomLook + 2*time.Second)
				if i := w.image(name); i.State != StateWarm || len(w.rt.pulled()) > tries+1 {
					t.Errorf("%+v after %d more tries", i, len(w.rt.pulled())-tries)
				}
			})
		})
	}
}

func TestAnExecutorDecidesHowASpinAppRuns(t *testing.T) {
	class := func(name, handler string) *nodev1.RuntimeClass {
		return &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}
	}
	executor := func(creates bool, config map[string]any) map[string]any {
		return map[string]any{"createDeployment": creates, "deploymentConfig": config}
	}
	for _, tt := range []struct {
		name      string
		classes   []runtime.Object
		executors map[string]map[string]any // spec by name
		executor  string
		want      []string // handlers; nil: not wanted
	}{
		{"without executors and classes the shim's usual handler", nil, nil, "", []string{"spin"}},
		{"without executors SpinKube's usual class", []runtime.Object{class(spinRuntimeClass, "wasmtime")}, nil, "", []string{"wasmtime"}},
		{"the executor it names", []runtime.Object{class("mine", "wasmtime")},
			map[string]map[string]any{"b": executor(true, map[string]any{"runtimeClassName": "mine"}), "a": executor(true, nil)}, "b", []string{"wasmtime"}},
		{"the first of its namespace when it names none", []runtime.Object{class("mine", "wasmtime")},
			map[string]map[string]any{"a": executor(true, map[string]any{"runtimeClassName": "mine"}), "b": executor(true, nil)}, "", []string{"wasmtime"}},
		{"an executor without a class", []runtime.Object{class(spinRuntimeClass, "wasmtime")}, map[string]map[string]any{"a": executor(true, nil)}, "a", []string{"wasmtime"}},
		{"an executor that is not there yet", nil, nil, "later", []string{"spin"}},
		{"a class that is not there has no pods", nil, map[string]map[string]any{"a": executor(true, map[string]any{"runtimeClassName": "gone"})}, "a", nil},
		{"a class for another node's handler", []runtime.Object{class("mine", "kata")}, map[string]map[string]any{"a": executor(true, map[string]any{"runtimeClassName": "mine"})}, "a", nil},
		{"apps that are realized elsewhere", nil, map[string]map[string]any{"a": executor(false, nil)}, "a", nil},
		{"an image that brings Spin itself", nil, map[string]map[string]any{"a": executor(true, map[string]any{"spinImage": "r.example/spin"})}, "a", nil},
		{"an executor that cannot be read", nil, map[string]map[string]any{"a": {"createDeployment": "yes", "deploymentConfig": 7}}, "a", []string{"spin"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := t.Context()
			// Always wanted, so that it is seen when everything is known.
			a := newAPI(append(tt.classes, wasmClass(), wasmPod("sentinel", "node-a", "r.example/sentinel"))...)
			create := func(gvr schema.GroupVersionResource, kind, name string, spec map[string]any) {
				if _, err := a.dynamic.Resource(gvr).Namespace("team").Create(ctx, object("core.spinkube.dev/v1alpha1", kind, name, spec), metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			for name, spec := range tt.executors {
				create(spinAppExecutors, "SpinAppExecutor", name, plainJSON(spec))
			}
			create(spinApps, "SpinApp", "app", map[string]any{"image": "r.example/app:1", "executor": tt.executor})
			s := waitFor(t, a.source(t, ""), "everything", func(s Snapshot) bool { return s.Complete })
			var got []string
			for _, w := range s.Wanted {
				if w.Reference.Name == "r.example/app:1" {
					got = w.Handlers
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("wanted for %q, want %q", got, tt.want)
			}
		})
	}
}

// plainJSON has the types that decoding JSON gives.
func plainJSON(m map[string]any) map[string]any {
	for k, v := range m {
		switch v := v.(type) {
		case int:
			m[k] = int64(v)
		case map[string]any:
			if v == nil {
				delete(m, k)
			}
		}
	}
	return m
}

func TestAPodGetsThePullSecretsOfItsServiceAccount(t *testing.T) {
	account := func(name string, secrets ...string) *corev1.ServiceAccount {
		a := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name}}
		for _, s := range secrets {
			a.ImagePullSecrets = append(a.ImagePullSecrets, corev1.LocalObjectReference{Name: s})
		}
		return a
	}
	pod := func(name, account string, own bool) *corev1.Pod {
		p := wasmPod(name, "node-a", "r.example/"+name)
		p.Spec.ServiceAccountName = account
		if !own {
			p.Spec.ImagePullSecrets = nil
		}
		return p
	}
	objects := []runtime.Object{
		wasmClass(), account("default", "common"), account("builder", "first", "second"), account("poor"),
		pod("unnamed", "", false), pod("named", "builder", false), pod("own", "builder", true), pod("poor", "poor", false), pod("ghost", "ghost", false),
	}
	app := map[string]any{"image": "r.example/app", "serviceAccountName": "builder"}
	secrets := func(t *testing.T, a api) map[string]string {
		if _, err := a.dynamic.Resource(spinApps).Namespace("team").Create(t.Context(), object("core.spinkube.dev/v1alpha1", "SpinApp", "app", app), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		s := waitFor(t, a.source(t, ""), "everything", func(s Snapshot) bool { return s.Complete && len(s.Wanted) == 6 })
		got := map[string]string{}
		for _, w := range s.Wanted {
			got[strings.TrimSuffix(strings.TrimPrefix(w.Reference.Name, "r.example/"), ":latest")] = fmt.Sprint(w.PullSecrets)
		}
		return got
	}
	got := secrets(t, newAPI(objects...))
	for name, want := range map[string]string{
		"unnamed": "[{team common}]", "named": "[{team first} {team second}]", "own": "[{team pull}]", "poor": "[]", "ghost": "[]", "app": "[{team first} {team second}]",
	} {
		if got[name] != want {
			t.Errorf("%s: %s, want %s", name, got[name], want)
		}
	}

	t.Run("an agent that may not see them does without", func(t *testing.T) {
		a := newAPI(objects...)
		a.client.PrependReactor("list", "serviceaccounts", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "serviceaccounts"}, "", nil)
		})
		if got := secrets(t, a); got["named"] != "[]" || got["own"] != "[{team pull}]" {
			t.Errorf("%v", got)
		}
	})
}
