package deploy

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with testdata/<name>.yaml, which -update writes.
func golden(t *testing.T, name string, objects ...*unstructured.Unstructured) {
	t.Helper()
	var documents []string
	for _, o := range objects {
		b, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, string(b))
	}
	got := strings.Join(documents, "---\n")
	file := filepath.Join("testdata", name+".yaml")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func TestRendering(t *testing.T) {
	image := "registry.example.com/team/hello@sha256:" + strings.Repeat("0f", 32)
	base := func(change func(*v1alpha1.FunctionSpec)) v1alpha1.FunctionSpec {
		spec := v1alpha1.FunctionSpec{Image: image, Runtime: v1alpha1.RuntimeSpin}
		if change != nil {
			change(&spec)
		}
		return spec
	}
	started := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for name, tt := range map[string]struct {
		settings Settings
		spec     v1alpha1.FunctionSpec
		failed   *failedRollout
	}{
		"plain": {spec: base(nil)},
		"everything": {
			settings: Settings{
				IngressClass: "nginx", IngressAnnotations: map[string]string{"cert-manager.io/cluster-issuer": "letsencrypt"},
				RuntimeClass: "wasmtime-spin-v2", Executor: "mine", ImagePullSecrets: []string{"pull"}, HostTemplate: "{name}-{tenant}.{base}",
			},
			spec: base(func(s *v1alpha1.FunctionSpec) {
				s.Host, s.Routes = "api.example.com", []string{"/v2", "/v1"}
				s.Limits = &v1alpha1.FunctionLimits{MemoryMiB: 64, Concurrency: 4}
				s.Env = []v1alpha1.EnvVar{{Name: "TOKEN", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "hello-1f", Key: "TOKEN"}}, {Name: "GREETING", Value: "hello"}, {Name: "EMPTY"}}
			}),
			failed: &failedRollout{Revision: 8, Error: v1alpha1.FunctionError{Code: CodeImagePull, Detail: "the registry does not have it"}},
		},
		"replicas": {spec: base(func(s *v1alpha1.FunctionSpec) { s.Autoscaling = &v1alpha1.FunctionAutoscaling{MinReplicas: 3} })},
		"hpa": {spec: base(func(s *v1alpha1.FunctionSpec) {
			s.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 2, MaxReplicas: 5, TargetCPUPercent: 50}
		})},
		"keda": {settings: Settings{IngressClass: ClusterDefaultClass}, spec: base(func(s *v1alpha1.FunctionSpec) {
			s.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerKEDA, MaxReplicas: 5}
		})},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := tt.settings.withDefaults()
			if err != nil {
				t.Fatal(err)
			}
			f := &kube.Function{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "hello", UID: "6f1c"}, Spec: tt.spec}
			r := Revision{Number: 7, Spec: tt.spec}
			host, err := s.HostTemplate.Host(f.Name, f.Namespace, "203.0.113.7.nip.io")
			if err != nil {
				t.Fatal(err)
			}
			var objects []*unstructured.Unstructured
			for _, render := range []func() (*unstructured.Unstructured, error){
				func() (*unstructured.Unstructured, error) { return s.executor(f.Namespace) },
				func() (*unstructured.Unstructured, error) {
					return s.spinApp(f, r, rollout{started: started, failed: tt.failed})
				},
				func() (*unstructured.Unstructured, error) { return s.autoscaler(f, r) },
				func() (*unstructured.Unstructured, error) { return s.spinIngress(f, host, f.Spec.Host) },
			} {
				u, err := render()
				if err != nil {
					t.Fatal(err)
				}
				if u != nil {
					objects = append(objects, u)
				}
			}
			golden(t, name, objects...)

			number, state := remembered(objects[1])
			if number != 7 || !state.started.Equal(started) || !cmp.Equal(state.failed, tt.failed) {
				t.Errorf("the SpinApp remembers revision %d and %+v", number, state)
			}
		})
	}
}

func TestRenderingTheIngressesOfResidentFunctions(t *testing.T) {
	s, err := Settings{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	wildcard, err := s.wildcardIngress("hearth-system", []string{"*.203.0.113.7.nip.io"})
	if err != nil {
		t.Fatal(err)
	}
	host, err := s.hostIngress("hearth-system", "api.example.com", []string{"/b", "/a", "/b"})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "hosts", wildcard, host)

	long := strings.Repeat("a.", 125) + "aa"
	if a, b := hostIngressName(long), hostIngressName("b"+long[1:]); a == b || len(a) > 253 || hostIngressName("api.example.com") != "host.api.example.com" {
		t.Errorf("names %q and %q", a, b)
	}
}

func TestTheWildcardsPriorityLiesBetweenEveryHostAndOne(t *testing.T) {
	every, one := len("PathPrefix(`/`)"), len("Host(`a.b`) && PathPrefix(`/`)")
	if every >= 20 || one <= 20 || wildcardPriority != "20" {
		t.Errorf("%d, %s, %d", every, wildcardPriority, one)
	}
}

func TestSecretsThatSpinHasNoNameForAreRefusedAndEnvironmentVariablesLeftOut(t *testing.T) {
	ref := &v1alpha1.SecretKeyRef{Name: "s", Key: "k"}
	_, err := variables([]v1alpha1.EnvVar{{Name: "TOKEN", SecretKeyRef: ref}, {Name: "_KEY", SecretKeyRef: ref}})
	var bad *EnvError
	if !errors.As(err, &bad) || bad.Name != "_KEY" || !strings.Contains(err.Error(), "begin with a letter") {
		t.Errorf("got %v", err)
	}
	out, err := variables([]v1alpha1.EnvVar{{Name: "_KEY", Value: "1"}, {Name: "Level", Value: "2"}})
	if err != nil || !cmp.Equal(out, []any{map[string]any{"name": "level", "value": "2"}}) {
		t.Errorf("%v, %v", out, err)
	}
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	for name, s := range map[string]Settings{
		"no name in the template": {HostTemplate: "{base}"}, "a base domain in capitals": {BaseDomain: "EXAMPLE.com"},
		"a deadline in the past": {ProgressDeadline: -1}, "no port": {EnginePort: 70000},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := s.withDefaults(); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestWithin(t *testing.T) {
	live := map[string]any{"a": map[string]any{"b": int64(1), "default": true}, "list": []any{map[string]any{"x": "1", "y": "2"}}}
	for name, tt := range map[string]struct {
		wanted map[string]any
		want   bool
	}{
		"a part":             {map[string]any{"a": map[string]any{"b": int64(1)}}, true},
		"a part of an item":  {map[string]any{"list": []any{map[string]any{"x": "1"}}}, true},
		"another value":      {map[string]any{"a": map[string]any{"b": int64(2)}}, false},
		"a missing member":   {map[string]any{"a": map[string]any{"c": int64(1)}}, false},
		"more items":         {map[string]any{"list": []any{map[string]any{"x": "1"}, map[string]any{"x": "1"}}}, false},
		"an item in a value": {map[string]any{"a": []any{}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := within(tt.wanted, live); got != tt.want {
				t.Errorf("got %t", got)
			}
		})
	}
}
