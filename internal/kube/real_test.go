package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

// shared is the one real cluster of this package's tests, with the shipped
// custom resources.
var shared = cluster.Shared{Start: func(ctx context.Context) (*cluster.Cluster, error) {
	c, err := cluster.New(ctx, cluster.Options{ControlPlaneOnly: true})
	if err != nil {
		return nil, err
	}
	for _, resource := range []string{v1alpha1.FunctionsResource, v1alpha1.HostsResource} {
		manifest, err := os.ReadFile(filepath.Join(crdDir, v1alpha1.Group+"_"+resource+".yaml"))
		if err != nil {
			return c, err
		}
		if _, err := c.ApplyManifest(ctx, manifest); err != nil {
			return c, err
		}
	}
	return c, c.WaitFor(ctx, "functions to be served", 2*time.Minute, func(ctx context.Context) (bool, error) {
		_, err := kube.NewFunctions(c.Dynamic()).List(ctx, "")
		return err == nil, nil
	})
}}

func realCluster(t *testing.T) *cluster.Cluster { t.Helper(); return shared.Need(t) }

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

var digest = "@sha256:" + strings.Repeat("0f", 32)

func object(name string, spec map[string]any) *unstructured.Unstructured {
	full := map[string]any{"image": "registry.example.com/team/hello" + digest}
	maps.Copy(full, spec)
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": kube.FunctionKind,
		"metadata": map[string]any{"name": name, "namespace": "default"}, "spec": full,
	}}
}

func create(t *testing.T, c *cluster.Cluster, u *unstructured.Unstructured, dryRun bool) (*unstructured.Unstructured, error) {
	t.Helper()
	functions := c.Dynamic().Resource(kube.FunctionGVR()).Namespace("default")
	options := metav1.CreateOptions{FieldValidation: "Strict"}
	if dryRun {
		options.DryRun = []string{metav1.DryRunAll}
	} else {
		t.Cleanup(func() { _ = functions.Delete(context.Background(), u.GetName(), metav1.DeleteOptions{}) })
	}
	return functions.Create(t.Context(), u, options)
}

func TestWhatTheAPIServerAcceptsAsAFunction(t *testing.T) {
	c := realCluster(t)
	env := func(vars ...map[string]any) map[string]any {
		list := make([]any, len(vars))
		for i, v := range vars {
			list[i] = v
		}
		return map[string]any{"env": list}
	}
	limit := func(name string, v int64) map[string]any { return map[string]any{"limits": map[string]any{name: v}} }
	big := strings.Repeat("x", 40<<10)
	for name, test := range map[string]struct {
		name    string
		spec    map[string]any
		refused string // part of the message; "" for accepted
	}{
		"the least":                  {"hello", nil, ""},
		"with a tag before a digest": {"hello", map[string]any{"image": "localhost:5000/hello:v1" + digest}, ""},
		"spin":                       {"hello", map[string]any{"runtime": "spin", "host": "hello.example.com"}, ""},
		"all limits":                 {"hello", map[string]any{"limits": map[string]any{"memoryMiB": int64(1024), "timeoutMs": int64(300000), "concurrency": int64(1)}}, ""},
		"env and a secret":           {"hello", env(map[string]any{"name": "A", "value": "b"}, map[string]any{"name": "_S1", "secretKeyRef": map[string]any{"name": "s", "key": "k"}}), ""},
		"63 characters":              {strings.Repeat("a", 63), nil, ""},
		"routes of a host":           {"hello", map[string]any{"host": "hello.example.com", "routes": []any{"/", "/api/v1", "/it's"}}, ""},
		"a placement":                {"hello", map[string]any{"placement": map[string]any{"nodeSelector": map[string]any{"example.com/pool": "wasm"}}}, ""},
		"autoscaled pods":            {"hello", map[string]any{"runtime": "spin", "autoscaling": map[string]any{"autoscaler": "hpa", "minReplicas": int64(2), "maxReplicas": int64(2), "targetCPUPercent": int64(50)}}, ""},
		"more pods":                  {"hello", map[string]any{"runtime": "spin", "autoscaling": map[string]any{"minReplicas": int64(3)}}, ""},

		"64 characters":              {strings.Repeat("a", 64), nil, "at most 63 characters"},
		"a dot in the name":          {"a.b", nil, "metadata.name must consist of"},
		"a digit first":              {"1a", nil, "metadata.name must consist of"},
		"punycode":                   {"xn--hello", nil, `must not start with "xn--"`},
		"a tag alone":                {"hello", map[string]any{"image": "registry.example.com/hello:latest"}, "must be named by digest"},
		"a short digest":             {"hello", map[string]any{"image": "registry.example.com/hello@sha256:00"}, "must be named by digest"},
		"no registry":                {"hello", map[string]any{"image": "hello" + digest}, "must start with the registry's host"},
		"an image in upper case":     {"hello", map[string]any{"image": "registry.example.com/Hello" + digest}, "must start with the registry's host"},
		"another runtime":            {"hello", map[string]any{"runtime": "jvm"}, `Unsupported value: "jvm"`},
		"too little memory":          {"hello", limit("memoryMiB", 0), "greater than or equal to 1"},
		"too much memory":            {"hello", limit("memoryMiB", 1025), "less than or equal to 1024"},
		"too short a timeout":        {"hello", limit("timeoutMs", 9), "greater than or equal to 10"},
		"too much concurrency":       {"hello", limit("concurrency", 1001), "less than or equal to 1000"},
		"a host of one label":        {"hello", map[string]any{"host": "localhost"}, "at least two labels"},
		"a host in upper case":       {"hello", map[string]any{"host": "Hello.example.com"}, "host must be a DNS name"},
		"routes without a host":      {"hello", map[string]any{"routes": []any{"/"}}, "set host too"},
		"a route without a slash":    {"hello", map[string]any{"host": "a.example.com", "routes": []any{"api"}}, "begins with a slash"},
		"a route ending with one":    {"hello", map[string]any{"host": "a.example.com", "routes": []any{"/api/"}}, "does not end with one"},
		"a route upwards":            {"hello", map[string]any{"host": "a.example.com", "routes": []any{"/a/../b"}}, "as a segment"},
		"a route twice":              {"hello", map[string]any{"host": "a.example.com", "routes": []any{"/a", "/a"}}, "Duplicate value"},
		"placement of spin":          {"hello", map[string]any{"runtime": "spin", "placement": map[string]any{}}, "resident functions only"},
		"autoscaling of resident":    {"hello", map[string]any{"autoscaling": map[string]any{"minReplicas": int64(2)}}, "spin functions only"},
		"another autoscaler":         {"hello", map[string]any{"runtime": "spin", "autoscaling": map[string]any{"autoscaler": "magic", "maxReplicas": int64(2)}}, `Unsupported value: "magic"`},
		"most below least":           {"hello", map[string]any{"runtime": "spin", "autoscaling": map[string]any{"minReplicas": int64(3), "maxReplicas": int64(2)}}, "at least minReplicas"},
		"an autoscaler without most": {"hello", map[string]any{"runtime": "spin", "autoscaling": map[string]any{"autoscaler": "keda"}}, "maxReplicas must be set"},
		"a bad variable":             {"hello", env(map[string]any{"name": "1A", "value": "b"}), "does not begin with a digit"},
		"a variable twice":           {"hello", env(map[string]any{"name": "A", "value": "b"}, map[string]any{"name": "A", "value": "c"}), "Duplicate value"},
		"a value and a secret":       {"hello", env(map[string]any{"name": "A", "value": "b", "secretKeyRef": map[string]any{"name": "s", "key": "k"}}), "not both"},
		"too much environment":       {"hello", env(map[string]any{"name": "A", "value": big}, map[string]any{"name": "B", "value": big}), "at most 65536 characters"},
		"an unknown member":          {"hello", map[string]any{"imagePullPolicy": "Always"}, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := create(t, c, object(test.name, test.spec), true)
			switch {
			case test.refused == "" && err != nil:
				t.Error(err)
			case test.refused != "" && (err == nil || !strings.Contains(err.Error(), test.refused)):
				t.Errorf("want a refusal that says %q, got %v", test.refused, err)
			}
		})
	}
	t.Run("no spec", func(t *testing.T) {
		u := object("hello", nil)
		delete(u.Object, "spec")
		if _, err := create(t, c, u, true); !apierrors.IsInvalid(err) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDefaultsAreThoseOfTheSubmitAPI(t *testing.T) {
	c := realCluster(t)
	if _, err := create(t, c, object("defaults", nil), false); err != nil {
		t.Fatal(err)
	}
	f, err := kube.NewFunctions(c.Dynamic()).Get(t.Context(), "default", "defaults")
	if err != nil {
		t.Fatal(err)
	}
	want := v1alpha1.FunctionSpec{
		Image: "registry.example.com/team/hello" + digest, Runtime: v1alpha1.RuntimeResident,
		Limits: &v1alpha1.FunctionLimits{MemoryMiB: v1alpha1.DefaultMemoryMiB, TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency},
	}
	if diff := cmp.Diff(want, f.Spec); diff != "" {
		t.Error(diff)
	}
}

func TestStatusIsWrittenBesideTheSpecAndShown(t *testing.T) {
	c := realCluster(t)
	ctx := t.Context()
	functions := kube.NewFunctions(c.Dynamic())
	u := object("shown", nil)
	u.Object["status"] = map[string]any{"url": "http://forged.example.com/"}
	if _, err := create(t, c, u, false); err != nil {
		t.Fatal(err)
	}
	f, err := functions.Get(ctx, "default", "shown")
	if err != nil || f.Status.URL != "" {
		t.Fatalf("whoever writes the spec wrote the status: %+v %v", f, err)
	}
	then := time.Now().Add(-time.Hour).Truncate(time.Second).UTC()
	status := v1alpha1.FunctionStatus{
		ObservedGeneration: f.Generation, URL: "http://shown.example.com/", Revision: 3, ActiveRevision: 2, Warm: "2/3", WarmNodes: 2, WantedNodes: 3,
		Nodes: []v1alpha1.FunctionNode{
			{Name: "node-a", Revision: 3, Progress: v1alpha1.ProgressFailed, Serving: 2, Error: &v1alpha1.FunctionError{Code: "registry-unavailable", Detail: "x"}, Retrying: true},
			{Name: "node-b", Revision: 3, Progress: v1alpha1.ProgressQueued},
		},
		History: []v1alpha1.RevisionStatus{
			{Revision: 2, State: v1alpha1.StateReady, ActivatedAt: &then, Phases: []v1alpha1.Phase{{Name: "pull", Milliseconds: 1.25}}},
			{Revision: 3, State: v1alpha1.StatePending},
		},
		Conditions: []v1alpha1.Condition{{Type: v1alpha1.ConditionReady, Status: v1alpha1.ConditionFalse, Reason: "Pulling", LastTransitionTime: then}},
	}
	if err := functions.SetStatus(ctx, f, status); err != nil {
		t.Fatal(err)
	}
	if err := functions.SetStatus(ctx, f, v1alpha1.FunctionStatus{URL: "http://old.example.com/"}); !apierrors.IsConflict(err) {
		t.Errorf("an older reader overwrote a newer status: %v", err)
	}
	f, err = functions.Get(ctx, "default", "shown")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(status, f.Status); diff != "" {
		t.Error(diff)
	}
	again := f.DeepCopy().Status
	again.Conditions[0].LastTransitionTime = time.Now()
	if err := functions.SetStatus(ctx, f, again); err != nil {
		t.Fatal(err)
	}
	after, err := functions.Get(ctx, "default", "shown")
	if err != nil || after.ResourceVersion != f.ResourceVersion {
		t.Errorf("the same status again was written: %v", err)
	}
	if after.Generation != 1 {
		t.Errorf("writing the status made generation %d", after.Generation)
	}

	raw, err := c.Client().Discovery().RESTClient().Get().AbsPath("/apis/hearth.sh/v1alpha1/namespaces/default/functions/shown").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(ctx).Raw()
	if err != nil {
		t.Fatal(err)
	}
	var table metav1.Table
	if err := json.Unmarshal(raw, &table); err != nil {
		t.Fatal(err)
	}
	var columns []string
	for _, column := range table.ColumnDefinitions {
		if column.Priority == 0 {
			columns = append(columns, column.Name)
		}
	}
	if want := []string{"Name", "Runtime", "URL", "Revision", "Active", "Warm", "Ready", "Age"}; !slices.Equal(columns, want) {
		t.Errorf("columns %v, want %v", columns, want)
	}
	if got := fmt.Sprint(table.Rows[0].Cells[:7]); got != "[shown resident http://shown.example.com/ 3 2 2/3 False]" {
		t.Errorf("row %s", got)
	}
}

func TestWatchGoesOnFromAList(t *testing.T) {
	c := realCluster(t)
	functions := kube.NewFunctions(c.Dynamic())
	list, err := functions.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create(t, c, object("watched", nil), false); err != nil {
		t.Fatal(err)
	}
	if err := c.Dynamic().Resource(kube.FunctionGVR()).Namespace("default").Delete(t.Context(), "watched", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var seen []watch.EventType
	enough := errors.New("enough")
	err = functions.Watch(ctx, "", list.ResourceVersion, func(e kube.Event) error {
		if e.Function != nil && e.Function.Name == "watched" {
			seen = append(seen, e.Type)
		}
		if len(seen) == 2 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || !slices.Equal(seen, []watch.EventType{watch.Added, watch.Deleted}) {
		t.Errorf("saw %v: %v", seen, err)
	}
	ended, stop := context.WithCancel(t.Context())
	stop()
	if err := functions.Watch(ended, "", list.ResourceVersion, func(kube.Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
}

func TestANameIsClaimedOnce(t *testing.T) {
	c := realCluster(t)
	client, err := kube.NewRESTClient(c.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	host := kube.NewHost("claimed.example.com", v1alpha1.HostSpec{Namespace: "team", Function: "hello", LastRevision: 3})
	var made kube.Host
	if err := client.Post().Resource(v1alpha1.HostsResource).Body(host).Do(t.Context()).Into(&made); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Delete().Resource(v1alpha1.HostsResource).Name(made.Name).Do(context.Background()).Error()
	})
	if diff := cmp.Diff(host.Spec, made.Spec); diff != "" || made.UID == "" {
		t.Error(diff)
	}
	if err := client.Post().Resource(v1alpha1.HostsResource).Body(host).Do(t.Context()).Error(); !apierrors.IsAlreadyExists(err) {
		t.Errorf("claimed twice: %v", err)
	}
	var list kube.HostList
	if err := client.Get().Resource(v1alpha1.HostsResource).Do(t.Context()).Into(&list); err != nil || len(list.Items) != 1 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestCopiesShareNothing(t *testing.T) {
	f := &kube.Function{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}},
		Spec: v1alpha1.FunctionSpec{
			Limits: &v1alpha1.FunctionLimits{MemoryMiB: 1}, Env: []v1alpha1.EnvVar{{Name: "A", SecretKeyRef: &v1alpha1.SecretKeyRef{Key: "k"}}},
			Routes: []string{"/"}, Placement: &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"a": "b"}}, Autoscaling: &v1alpha1.FunctionAutoscaling{MinReplicas: 1},
		},
		Status: v1alpha1.FunctionStatus{
			Conditions: []v1alpha1.Condition{{Type: "Ready"}},
			Nodes:      []v1alpha1.FunctionNode{{Name: "n", Error: &v1alpha1.FunctionError{Code: "c"}}},
			History:    []v1alpha1.RevisionStatus{{ActivatedAt: new(time.Time), Error: &v1alpha1.FunctionError{Code: "c"}, Phases: []v1alpha1.Phase{{Name: "p"}}}},
		},
	}
	list := &kube.FunctionList{Items: []kube.Function{*f}}
	dup := list.DeepCopyObject().(*kube.FunctionList)
	if diff := cmp.Diff(list, dup); diff != "" {
		t.Fatal(diff)
	}
	f.Labels["a"], f.Spec.Limits.MemoryMiB, f.Spec.Env[0].SecretKeyRef.Key, f.Spec.Env[0].Name, f.Status.Conditions[0].Type = "x", 9, "x", "x", "x"
	f.Spec.Routes[0], f.Spec.Placement.NodeSelector["a"], f.Spec.Autoscaling.MinReplicas = "x", "x", 9
	f.Status.Nodes[0].Error.Code, f.Status.Nodes[0].Name, f.Status.History[0].Error.Code, f.Status.History[0].Phases[0].Name = "x", "x", "x", "x"
	*f.Status.History[0].ActivatedAt = time.Unix(1, 0)
	d := dup.Items[0]
	if s := d.Spec; s.Routes[0] != "/" || s.Placement.NodeSelector["a"] != "b" || s.Autoscaling.MinReplicas != 1 {
		t.Errorf("the copy changed with the original: %+v", s)
	}
	if s := d.Status; s.Nodes[0].Error.Code != "c" || s.Nodes[0].Name != "n" || s.History[0].Error.Code != "c" || s.History[0].Phases[0].Name != "p" || !s.History[0].ActivatedAt.IsZero() {
		t.Errorf("the copy changed with the original: %+v", s)
	}
	if d.Labels["a"] != "b" || d.Spec.Limits.MemoryMiB != 1 || d.Spec.Env[0].SecretKeyRef.Key != "k" || d.Spec.Env[0].Name != "A" || d.Status.Conditions[0].Type != "Ready" {
		t.Errorf("the copy changed with the original: %+v", d)
	}
}

func TestNodeNamesAreChecked(t *testing.T) {
	for _, name := range []string{"", "Node", "a/b", "system:node:a"} {
		if _, err := kube.FromKubeconfig("/nonexistent", name, kube.Options{}); err == nil || !strings.Contains(err.Error(), "node name") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
