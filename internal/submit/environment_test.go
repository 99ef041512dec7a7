package submit

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestArtifactOfASpinFunctionFollowsItsEnvironment(t *testing.T) {
	f := newFixture(t, func(o *Options) {
		o.Runtimes = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin}
	})
	const path = "/v1/functions/hello"
	patch := func(document string) answer { return f.do("PATCH", path+"?wait=0s", []byte(document), mp) }
	for _, step := range []struct {
		name string
		do   func() answer
		env  map[string]string // of the artifact
		sec  []string
		made int // artifacts so far
	}{
		{"resident", func() answer { return f.do("PUT", path+"?wait=0s", module(1), wasm) }, nil, nil, 1},
		{"resident with an environment", func() answer { return patch(`{"env":{"A":"1"},"secrets":{"TOKEN":"s3cret"}}`) }, nil, nil, 1},
		{"spin", func() answer { return patch(`{"runtime":"spin"}`) }, map[string]string{"A": "1"}, []string{"TOKEN"}, 2},
		{"another secret's value", func() answer { return patch(`{"secrets":{"TOKEN":"0ther"}}`) }, map[string]string{"A": "1"}, []string{"TOKEN"}, 2},
		{"another value", func() answer { return patch(`{"env":{"A":"2"}}`) }, map[string]string{"A": "2"}, []string{"TOKEN"}, 3},
		{"another module", func() answer { return f.do("PUT", path+"?wait=0s", module(2), wasm) }, map[string]string{"A": "2"}, []string{"TOKEN"}, 4},
		{"another memory", func() answer { return patch(`{"memoryMiB":64}`) }, map[string]string{"A": "2"}, []string{"TOKEN"}, 4},
		{"resident again", func() answer { return patch(`{"runtime":null}`) }, nil, nil, 5},
	} {
		before := f.checks
		got := step.do()
		if got.status != 200 && got.status != 201 && got.status != 202 {
			t.Fatalf("%s: %d %s", step.name, got.status, got.body)
		}
		f.mu.Lock()
		made, app := len(f.apps), f.apps[len(f.apps)-1]
		f.mu.Unlock()
		if want := (Application{Env: step.env, Secrets: step.sec}); made != step.made || !app.Equal(want) {
			t.Errorf("%s: %d artifacts, the last with %+v, want %d and %+v", step.name, made, app, step.made, want)
		}
		v, err := f.store.Get(t.Context(), "hello")
		if err != nil || v.Revision.Artifact != artifactOf("hello", v.Revision.ModuleDigest, app) {
			t.Errorf("%s: recorded %+v, %v", step.name, v.Revision.Artifact, err)
		}
		if text, _ := json.Marshal(f.apps); strings.Contains(string(text), "s3cret") || strings.Contains(string(text), "0ther") {
			t.Fatalf("%s: a secret's value was published: %s", step.name, text)
		}
		if strings.HasPrefix(step.name, "another secret") && f.checks != before {
			t.Error("settings are no module to check")
		}
	}
}

func TestEnvironmentThatAnotherWriterChangedIsPublishedAgain(t *testing.T) {
	f := newFixture(t, func(o *Options) {
		o.Runtimes = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin}
	})
	const path = "/v1/functions/hello?wait=0s"
	f.do("PUT", path+"&runtime=spin", module(1), wasm).want(202)
	f.set(func() {
		f.configure = func() { f.do("PATCH", path, []byte(`{"env":{"B":"2"}}`), mp).want(202) }
	})
	f.do("PATCH", path, []byte(`{"env":{"A":"1"}}`), mp).want(202)
	v, err := f.store.Get(t.Context(), "hello")
	want := Application{Env: map[string]string{"A": "1", "B": "2"}}
	if err != nil || !applicationOf(v.Revision.Settings).Equal(want) || v.Revision.Artifact != artifactOf("hello", v.Revision.ModuleDigest, want) {
		t.Errorf("%+v, %v", v.Revision, err)
	}
}

func TestSettingsAreNotRecordedWhileTheirArtifactCannotBePublished(t *testing.T) {
	f := newFixture(t, func(o *Options) {
		o.Runtimes = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin}
	})
	const path = "/v1/functions/hello?wait=0s"
	f.do("PUT", path+"&runtime=spin", module(1), wasm).want(202)
	f.set(func() {
		f.pubErr = &PublishError{Code: "registry-unavailable", Detail: "The registry does not answer.", Retryable: true}
	})
	if p := f.do("PATCH", path, []byte(`{"env":{"A":"1"}}`), mp).problem("registry-unavailable"); !p.Retryable {
		t.Errorf("%+v", p)
	}
	if p := f.do("PATCH", path, []byte(`{"secrets":{"_A":"1"}}`), mp).problem("invalid-settings"); p.Retryable {
		t.Errorf("%+v", p)
	}
	if v, err := f.store.Get(t.Context(), "hello"); err != nil || v.Wanted != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}
