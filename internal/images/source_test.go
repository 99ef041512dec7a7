package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func pointer[T any](v T) *T { return &v }

func wasmPod(name, node string, images ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name},
		Spec: corev1.PodSpec{NodeName: node, RuntimeClassName: pointer("wasm"), ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}}}}
	for i, image := range images {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprint("c", i), Image: image})
	}
	return p
}

func object(apiVersion, kind, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": apiVersion, "kind": kind, "metadata": map[string]any{"namespace": "team", "name": name}, "spec": spec,
	}}
}

// api is a fake API server with the kinds of the source.
type api struct {
	client  *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
}

func newAPI(objects ...runtime.Object) api {
	kinds := map[schema.GroupVersionResource]string{spinApps: "SpinAppList", spinAppExecutors: "SpinAppExecutorList", functions: "FunctionList"}
	return api{fake.NewClientset(objects...), dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds)}
}

func (a api) source(t *testing.T, cachePath string) *Kubernetes {
	t.Helper()
	k, err := NewKubernetes(KubernetesOptions{
		Client: a.client, Dynamic: a.dynamic, Node: "node-a", Namespace: "hearth", CachePath: cachePath,
		WasmHandlers: func() []string { return []string{"spin", "wasmtime"} },
		NodeLabels:   func() map[string]string { return map[string]string{"pool": "wasm"} },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = k.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return k
}

// waitFor returns the first snapshot that is as wanted.
func waitFor(t *testing.T, k *Kubernetes, what string, ok func(Snapshot) bool) Snapshot {
	t.Helper()
	deadline := time.After(90 * time.Second)
	for {
		s, newer := k.Snapshot()
		if ok(s) {
			return s
		}
		select {
		case <-newer:
		case <-deadline:
			t.Fatalf("never came: %s; last %+v", what, s)
		}
	}
}

func names(s Snapshot) (out []string) {
	for _, w := range s.Wanted {
		out = append(out, w.Reference.Name)
	}
	return out
}

func has(want ...string) func(Snapshot) bool {
	return func(s Snapshot) bool { return s.Complete && slices.Equal(names(s), want) }
}

func wasmClass() *nodev1.RuntimeClass {
	return &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "wasm"}, Handler: "wasmtime"}
}

func TestTheSourceGathersWhatTheNodeWillRun(t *testing.T) {
	template := func(image, class string, selector map[string]string) corev1.PodTemplateSpec {
		return corev1.PodTemplateSpec{Spec: corev1.PodSpec{RuntimeClassName: &class, NodeSelector: selector, Containers: []corev1.Container{{Name: "c", Image: image}}}}
	}
	deployment := func(name string, t corev1.PodTemplateSpec) *appsv1.Deployment {
		return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name}, Spec: appsv1.DeploymentSpec{Template: t}}
	}
	plain := wasmPod("plain", "node-a", "r.example/plain")
	plain.Spec.RuntimeClassName = nil
	done := wasmPod("done", "node-a", "r.example/done")
	done.Status.Phase = corev1.PodSucceeded
	a := newAPI(
		wasmClass(),
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "kata"}, Handler: "kata"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "elsewhere"}, Handler: "wasmtime", Scheduling: &nodev1.Scheduling{NodeSelector: map[string]string{"pool": "gpu"}}},
		wasmPod("here", "node-a", "r.example/here", "sidecar:1", "UPPER CASE"),
		wasmPod("pending", "", "r.example/pending"),
		wasmPod("other", "node-b", "r.example/other"),
		plain, done,
		deployment("ok", template("r.example/deployment", "wasm", map[string]string{"pool": "wasm"})),
		deployment("far", template("r.example/far", "wasm", map[string]string{"pool": "gpu"})),
		deployment("gpu", template("r.example/gpu", "elsewhere", nil)),
		deployment("kata", template("r.example/kata", "kata", nil)),
		deployment("ghost", template("r.example/ghost", "no-such-class", nil)),
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "list", Labels: map[string]string{ListLabel: "true"}},
			Data: map[string]string{"images": "r.example/list handler=spin\nr.example/list2\nr.example/kata2 handler=kata\nbroken line here\n"}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "unmarked"}, Data: map[string]string{"images": "r.example/unmarked"}},
	)
	ctx := context.Background()
	for gvr, o := range map[schema.GroupVersionResource]*unstructured.Unstructured{
		spinApps:  object("core.spinkube.dev/v1alpha1", "SpinApp", "app", map[string]any{"image": "r.example/spinapp:2", "imagePullSecrets": []any{map[string]any{"name": "spin-pull"}}}),
		functions: object("hearth.sh/v1alpha1", "Function", "fn", map[string]any{"image": "r.example/fn@sha256:" + strings.Repeat("a", 64), "runtime": "spin"}),
	} {
		if _, err := a.dynamic.Resource(gvr).Namespace("team").Create(ctx, o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// The agent itself brings what the resident engine runs.
	resident := object("hearth.sh/v1alpha1", "Function", "resident", map[string]any{"image": "r.example/resident@sha256:" + strings.Repeat("b", 64), "runtime": "resident"})
	if _, err := a.dynamic.Resource(functions).Namespace("team").Create(ctx, resident, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	k := a.source(t, filepath.Join(t.TempDir(), "wanted.json"))
	s := waitFor(t, k, "everything", has(
		"docker.io/library/sidecar:1", "r.example/deployment:latest", "r.example/fn@sha256:"+strings.Repeat("a", 64),
		"r.example/here:latest", "r.example/list2:latest", "r.example/list:latest", "r.example/pending:latest", "r.example/spinapp:2"))
	by := map[string]Wanted{}
	for _, w := range s.Wanted {
		by[w.Reference.Name] = w
	}
	for name, want := range map[string]Wanted{
		"r.example/here:latest":                          {Handlers: []string{"wasmtime"}, Urgent: true, Users: []string{"pod team/here"}, PullSecrets: []PullSecret{{"team", "pull"}}},
		"r.example/pending:latest":                       {Handlers: []string{"wasmtime"}, Users: []string{"pod team/pending"}, PullSecrets: []PullSecret{{"team", "pull"}}},
		"r.example/spinapp:2":                            {Handlers: []string{"spin"}, Users: []string{"spinapp team/app"}, PullSecrets: []PullSecret{{"team", "spin-pull"}}},
		"r.example/list:latest":                          {Handlers: []string{"spin"}, Users: []string{"list hearth/list"}},
		"r.example/list2:latest":                         {Users: []string{"list hearth/list"}},
		"r.example/fn@sha256:" + strings.Repeat("a", 64): {Handlers: []string{"spin"}, Users: []string{"function team/fn"}},
	} {
		want.Reference, want.UserCount = by[name].Reference, 1
		if !sameWanted([]Wanted{by[name]}, []Wanted{want}) {
			t.Errorf("%s: %+v", name, by[name])
		}
	}
	if len(s.Problems) != 2 {
		t.Errorf("problems %q", s.Problems)
	}

	if err := a.client.CoreV1().Pods("team").Delete(ctx, "here", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, k, "the pod's images are not wanted any more", func(s Snapshot) bool {
		return !slices.Contains(names(s), "r.example/here:latest")
	})
}

func TestTheSourceOutlivesTheAPI(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wanted.json")
	t.Run("learn", func(t *testing.T) {
		waitFor(t, newAPI(wasmClass(), wasmPod("p", "node-a", "r.example/app")).source(t, path), "the pod", has("r.example/app:latest"))
	})
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o644 {
		t.Fatal(info, err)
	}
	t.Run("start without it", func(t *testing.T) {
		a := newAPI()
		refuse := func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, errors.New("connection refused")
		}
		a.client.PrependReactor("list", "*", refuse)
		a.dynamic.PrependReactor("list", "*", refuse)
		s := waitFor(t, a.source(t, path), "a stale snapshot", func(s Snapshot) bool { return !s.StaleSince.IsZero() })
		if !s.Known || s.Complete || !slices.Equal(names(s), []string{"r.example/app:latest"}) || s.Wanted[0].Urgent || !strings.Contains(s.StaleReason, "connection refused") {
			t.Errorf("%+v", s)
		}
	})
	t.Run("a bad cache is as good as none", func(t *testing.T) {
		for _, content := range []string{"{", `{"version":9}`, `{"version":1,"wanted":[{"reference":{"Name":"BAD NAME"}}]}`, strings.Repeat(" ", maxCacheBytes+1)} {
			if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			k, err := NewKubernetes(KubernetesOptions{Client: newAPI().client, Dynamic: newAPI().dynamic, Node: "n", CachePath: path, WasmHandlers: func() []string { return nil }})
			if err != nil {
				t.Fatal(err)
			}
			if s, _ := k.Snapshot(); s.Known || len(s.Wanted) != 0 {
				t.Errorf("%.30q: %+v", content, s)
			}
		}
	})
}

func TestAnAPIServerThatIsBackIsHeardWithinSeconds(t *testing.T) {
	// The library's pause between errors counts from a time outside the bubble.
	handlers := utilruntime.ErrorHandlers
	utilruntime.ErrorHandlers = nil
	defer func() { utilruntime.ErrorHandlers = handlers }()
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(wasmClass(), wasmPod("p", "node-a", "r.example/app"))
		var away atomic.Bool
		away.Store(true)
		refuse := func(clienttesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("connection refused")
		}
		a.client.PrependReactor("list", "*", refuse)
		a.dynamic.PrependReactor("list", "*", refuse)
		k := a.source(t, "")
		time.Sleep(20 * time.Minute)
		away.Store(false)
		back := time.Now()
		waitFor(t, k, "the pod", has("r.example/app:latest"))
		if took := time.Since(back); took > 7*time.Second {
			t.Errorf("what is wanted was heard %s after the API server was back", took)
		}
	})
}

func TestListsAreReadLineByLine(t *testing.T) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	for _, tt := range []struct {
		name, in string
		want     []string
		problems int
	}{
		{"nothing", "", nil, 0},
		{"comments, blank lines, CRLF and a byte order mark", "\ufeff# images\r\n\r\n  r.example/a:1 # why\r\n", []string{"r.example/a:1 "}, 0},
		{"names are made canonical", "nginx\nr.example/a\nr.example/b:1@" + digest, []string{"docker.io/library/nginx:latest ", "r.example/a:latest ", "r.example/b@" + digest + " "}, 0},
		{"a handler", "r.example/a handler=spin", []string{"r.example/a:latest spin"}, 0},
		{"the same twice", "r.example/a\nr.example/a:latest", []string{"r.example/a:latest "}, 0},
		{"bad lines spoil themselves only", "UPPER\nr.example/a\nr.example/b what\nr.example/c handler=\nr.example/d handler=../x\n\xff\xfe\n", []string{"r.example/a:latest "}, 5},
		{"other digests", "r.example/a@sha512:" + strings.Repeat("ab", 64), nil, 1},
		{"too many", func() string {
			var b strings.Builder
			for i := range MaxListImages + 2 {
				fmt.Fprintf(&b, "r.example/x:%d\n", i)
			}
			return b.String()
		}(), make([]string, MaxListImages), 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, problems := ParseList(tt.in)
			if len(got) != len(tt.want) || len(problems) != tt.problems {
				t.Fatalf("%+v, problems %q", got, problems)
			}
			for i, e := range got {
				if tt.want[i] != "" && e.Reference.Name+" "+e.Handler != tt.want[i] {
					t.Errorf("%+v, want %q", e, tt.want[i])
				}
			}
		})
	}
}

func FuzzParseList(f *testing.F) {
	f.Add("r.example/a:1 handler=spin # x\n\xff\nUPPER")
	f.Fuzz(func(t *testing.T, in string) {
		got, problems := ParseList(in)
		if len(got) > MaxListImages || len(problems) > maxListProblems {
			t.Fatal(len(got), len(problems))
		}
		for _, e := range got {
			again, err := ParseReference(e.Reference.Name)
			if err != nil || again != e.Reference {
				t.Fatalf("%+v is not canonical: %+v %v", e.Reference, again, err)
			}
		}
	})
}

func TestDockerConfigs(t *testing.T) {
	for _, tt := range []struct{ name, ref, config, want string }{
		{"by host", "r.example/a/b:1", `{"auths":{"r.example":{"username":"u","password":"p"}}}`, "u:p@r.example"},
		{"encoded", "r.example:5000/a:1", `{"auths":{"https://r.example:5000":{"auth":"dTpw"}}}`, "u:p@r.example:5000"},
		{"docker hub as docker login writes it", "nginx", `{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"}}}`, "u:p@registry-1.docker.io"},
		{"the longest path counts", "r.example/a/b:1", `{"auths":{"r.example":{"username":"x"},"r.example/a":{"username":"u","password":"p"},"r.example/ab":{"username":"y"}}}`, "u:p@r.example"},
		{"another host", "r.example/a", `{"auths":{"example":{"username":"u"}}}`, ""},
		{"a host that ends alike", "r.example/a", `{"auths":{"evilr.example":{"username":"u"}}}`, ""},
		{"nothing", "r.example/a", `{}`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := parseDockerConfig([]byte(tt.config), mustRef(t, tt.ref))
			got := ""
			if a != nil {
				got = a.Username + ":" + a.Password + "@" + a.Host
			}
			if err != nil || got != tt.want {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	if _, err := parseDockerConfig([]byte(`{"auths":{"r":{"password":"hunter2`), mustRef(t, "r.example/a")); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Error(err)
	}
	a := Auth{Password: "hunter2"}
	raw := fmt.Sprintf("%v %+v %#v %s", a, &a, a, a.LogValue())
	if strings.Contains(raw, "hunter2") {
		t.Error(raw)
	}
}

func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"r.example/a":{"auth":"dTpw"}}}`))
	ref, _ := ParseReference("r.example/a/b")
	f.Fuzz(func(t *testing.T, in []byte) {
		a, err := parseDockerConfig(in, ref)
		if a != nil && (err != nil || a.Username == "" || a.Host != "r.example" || !json.Valid(in)) {
			t.Fatal(a.Username, err)
		}
	})
}
