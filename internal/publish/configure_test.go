package publish

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/registry"
	"github.com/hearth-sh/hearth/internal/submit"
)

// lockedApp is what Spin reads of an artifact here.
type lockedApp struct {
	Variables map[string]struct {
		Default *string `json:"default"`
		Secret  bool    `json:"secret"`
	} `json:"variables"`
	Components []struct {
		Env    map[string]string `json:"env"`
		Config map[string]string `json:"config"`
	} `json:"components"`
}

// get reads one document of a registry as anybody can.
func get(t *testing.T, url string, into any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close(); http.DefaultClient.CloseIdleConnections() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %s %v", url, resp.Status, data, err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatal(err)
	}
}

// application reads the locked application of an artifact, and the digests of
// its layers.
func application(t *testing.T, host string, a v1alpha1.Artifact) (app lockedApp, layers []string) {
	t.Helper()
	var manifest struct {
		Layers []struct {
			Digest string `json:"digest"`
		} `json:"layers"`
	}
	base := "http://" + host + "/v2/" + a.Repository
	get(t, base+"/manifests/"+a.Digest, &manifest)
	for _, l := range manifest.Layers {
		layers = append(layers, l.Digest)
	}
	get(t, base+"/blobs/"+layers[len(layers)-1], &app)
	return app, layers
}

func TestEnvironmentOfASpinFunctionIsInItsArtifactAndNoSecret(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	p := publisherOf(t, Options{Client: clientOf(t, host), Tenants: true, Located: true, DigestTags: true})
	m := moduleOf(t, 300_000, "env")
	plain, err := p.PublishFor(t.Context(), "team", "hello", m.path, m.digest, m.meta)
	if err != nil {
		t.Fatal(err)
	}
	first := submit.Application{Env: map[string]string{"GREETING": "hello", "_LEVEL": "1"}, Secrets: []string{"TOKEN"}}
	m.meta.Application = first
	direct, err := p.PublishFor(t.Context(), "team", "hello", m.path, m.digest, m.meta)
	if err != nil {
		t.Fatal(err)
	}
	uploads := count.uploads.Load()
	configured, err := p.Configure(t.Context(), "team", "hello", plain, m.digest, m.meta.SizeBytes, submit.Application{}, first)
	if err != nil || configured != direct || configured.Digest == plain.Digest || count.uploads.Load() != uploads {
		t.Errorf("%+v by configuring, %+v by publishing, %v", configured, direct, err)
	}
	second := submit.Application{Env: map[string]string{"GREETING": "good day"}}
	changed, err := p.Configure(t.Context(), "team", "hello", configured, m.digest, m.meta.SizeBytes, first, second)
	if err != nil {
		t.Fatal(err)
	}
	if n := count.uploads.Load() - uploads; n != 2 { // application and configuration
		t.Errorf("%d blobs were uploaded, want 2", n)
	}
	m.there(t, p.o.Client, host+"/"+changed.Repository+"@"+changed.Digest)

	app, layers := application(t, host, configured)
	if env := app.Components[0].Env; !maps.Equal(env, first.Env) {
		t.Errorf("the guest's environment is %v", env)
	}
	if config := app.Components[0].Config; !maps.Equal(config, map[string]string{"greeting": "{{ greeting }}", "token": "{{ token }}"}) {
		t.Errorf("the component's variables are %v", config)
	}
	if v := app.Variables; len(v) != 2 || *v["greeting"].Default != "hello" || v["greeting"].Secret || v["token"].Default != nil || !v["token"].Secret {
		t.Errorf("the application's variables are %+v", v)
	}
	app, others := application(t, host, changed)
	if layers[0] != others[0] || layers[0] != m.digest || layers[1] == others[1] {
		t.Errorf("layers %q and %q", layers, others)
	}
	if env := app.Components[0].Env; !maps.Equal(env, second.Env) || len(app.Variables) != 1 {
		t.Errorf("the guest's environment is %v with %d variables", env, len(app.Variables))
	}
	back, err := p.Configure(t.Context(), "team", "hello", changed, m.digest, m.meta.SizeBytes, second, submit.Application{})
	if err != nil || back != plain {
		t.Errorf("without an environment it is %+v, want %+v (%v)", back, plain, err)
	}
}

func TestWhatSomebodyElsePublishedIsNotConfigured(t *testing.T) {
	count, host := countedBefore(t, embedded(t))
	client := clientOf(t, host)
	p := publisherOf(t, Options{Client: client, Tenants: true, DigestTags: true})
	m := moduleOf(t, 3000, "foreign")
	own := p.Repository("team", "hello")
	foreign := func(repository string, o registry.SpinOptions) v1alpha1.Artifact {
		t.Helper()
		a, err := client.Publish(t.Context(), repository, registry.Module{Path: m.path}, registry.PublishOptions{Spin: o})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	app := submit.Application{Env: map[string]string{"A": "1"}}
	for name, a := range map[string]v1alpha1.Artifact{
		"another repository":                  foreign("others/hello", registry.SpinOptions{Name: "hello"}),
		"its repository, made in another way": foreign(own, registry.SpinOptions{Name: "hello", Version: "2"}),
		"another registry":                    {Registry: "registry.example.com", Repository: own, Digest: m.digest},
	} {
		before := count.requests.Load()
		if got, err := p.Configure(t.Context(), "team", "hello", a, m.digest, m.meta.SizeBytes, submit.Application{}, app); err != nil || got != a {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if n := count.requests.Load() - before; n != 0 {
			t.Errorf("%s: the registry was asked %d times", name, n)
		}
	}
}

func TestConfiguringAModuleThatTheRegistryLostSaysSo(t *testing.T) {
	host := embedded(t)
	p := publisherOf(t, Options{Client: clientOf(t, host), Tenants: true, DigestTags: true})
	m := moduleOf(t, 3000, "lost")
	image, err := registry.BuildSpin(registry.Module{Path: m.path}, registry.SpinOptions{Name: "hello"})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	was := v1alpha1.Artifact{Repository: p.Repository("team", "hello"), Digest: digest.String()}
	got, err := p.Configure(t.Context(), "team", "hello", was, m.digest, m.meta.SizeBytes, submit.Application{}, submit.Application{Secrets: []string{"A"}})
	var pe *submit.PublishError
	if !errors.As(err, &pe) || pe.Retryable || !strings.Contains(pe.Detail, "submit it again") || !cmp.Equal(got, was) {
		t.Errorf("%+v, %v", got, err)
	}
}
