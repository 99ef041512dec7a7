package functions_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

func TestASubmittedFunctionAnswersAtItsURLFromEveryNode(t *testing.T) {
	tenant := newTenant(t)
	f := submit(t, tenant, "first", "first light")
	if want := "http://first." + base + "/"; f.URL != want || f.Tenant != tenant || f.State != v1alpha1.StateReady || f.Revision != 1 {
		t.Fatalf("%+v, want the URL %s", f, want)
	}
	answers(t, f.URL, "first light")
	waitObject(t, tenant, "first", "every node to be warm", allWarm)
	// Straight to each engine, without the ingress choosing.
	engines, err := podsOf(t.Context(), "engine")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range engines {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.Status.PodIP+":8080/", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Host = "first." + base
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Errorf("the engine of %s: %s", p.Spec.NodeName, response.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	list := must(t, "functions", "list", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant)
	if !strings.Contains(list, "first") {
		t.Errorf("the list lacks it: %s", list)
	}
}

func TestARevisionReplacesTheOneBeforeAndCanBeRolledBack(t *testing.T) {
	tenant := newTenant(t)
	f := submit(t, tenant, "twice", "the one before")
	answers(t, f.URL, "the one before")
	waitObject(t, tenant, "twice", "every node to be warm", allWarm)
	stop := visit(t, f.URL, "the one") // whichever: nobody may see the change
	f = submit(t, tenant, "twice", "the one after")
	if f.Revision != 2 {
		t.Fatalf("%+v", f)
	}
	answers(t, f.URL, "the one after")
	waitObject(t, tenant, "twice", "every node to have the new one", allWarm)
	must(t, "functions", "rollback", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "twice")
	answers(t, f.URL, "the one before")
	waitObject(t, tenant, "twice", "every node to have the old one again", allWarm)
	stop()
	must(t, "functions", "delete", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "twice")
	waitStatusCode(t, f.URL, http.StatusNotFound)
}

func waitStatusCode(t *testing.T, url string, want int) {
	t.Helper()
	var last string
	if err := bench.WaitFor(t.Context(), fmt.Sprintf("%s to answer %d", url, want), soon, func(ctx context.Context) (bool, error) {
		status, body, err := get(ctx, url)
		last = fmt.Sprintf("%d %s %v", status, body, err)
		return err == nil && status == want, nil
	}); err != nil {
		t.Fatalf("%v; the last answer was %s", err, last)
	}
}

func TestAFunctionCanBeAppliedWithoutTheAPI(t *testing.T) {
	tenant := newTenant(t)
	image := submit(t, tenant, "by-api", "made by hand").Image
	apply(t, tenant, "by-hand", map[string]any{"image": image, "env": []any{map[string]any{"name": "WHO", "value": "hand"}}})
	f := waitObject(t, tenant, "by-hand", "the applied function to be warm", allWarm)
	if f.Status.URL != "http://by-hand."+base+"/" || f.Status.Revision != 1 {
		t.Errorf("%+v", f.Status)
	}
	answers(t, f.Status.URL, "made by hand")
	// It is a function like any other from now on.
	shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "-o", "json", "by-hand")
	if !strings.Contains(shown, `"revision": 1`) {
		t.Errorf("%s", shown)
	}
	// A second one of that name, in another namespace, is told whose it is.
	other := newTenant(t)
	apply(t, other, "by-hand", map[string]any{"image": image})
	taken := waitObject(t, other, "by-hand", "the second of the name to be refused", func(f *kube.Function) bool { return len(f.Status.Conditions) > 0 })
	if c := taken.Status.Conditions[0]; c.Status != v1alpha1.ConditionFalse || c.Reason != "NameTaken" {
		t.Errorf("%+v", c)
	}
	answers(t, f.Status.URL, "made by hand")
}

// TestARevisionThatNoNodeCanServeLeavesTheOldOneServing: who applies is not
// asked first, and reads why in the status.
func TestARevisionThatNoNodeCanServeLeavesTheOldOneServing(t *testing.T) {
	t.Parallel()
	tenant := newTenant(t)
	for n, c := range []struct {
		name  string
		image func(t *testing.T, good string) string
		words []string
	}{
		{
			"nothing is published by that digest",
			func(_ *testing.T, good string) string {
				return good[:strings.LastIndexByte(good, ':')+1] + strings.Repeat("0", 64)
			},
			[]string{"MANIFEST_UNKNOWN"},
		},
		{
			"it is no Wasm", publishedGarbage,
			[]string{"not-wasm", "revision 1 answers meanwhile"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := fmt.Sprint("unserved-", n)
			f := submit(t, tenant, name, "goes on serving")
			answers(t, f.URL, "goes on serving")
			waitObject(t, tenant, name, "every node to be warm", allWarm)
			stop := visit(t, f.URL, "goes on serving")
			apply(t, tenant, name, map[string]any{"image": c.image(t, f.Image)})
			told := waitObject(t, tenant, name, "the status to say that the old one answers, and why", func(o *kube.Function) bool {
				m := readyOf(o).Message
				// What nobody can have is not even recorded as a revision.
				ok := readyOf(o).Status == v1alpha1.ConditionFalse && o.Status.ActiveRevision == f.Revision
				for _, word := range c.words {
					ok = ok && strings.Contains(m, word)
				}
				return ok
			})
			t.Logf("the author reads: %s", readyOf(told).Message)
			stop()
			apply(t, tenant, name, map[string]any{"image": f.Image})
			waitObject(t, tenant, name, "the next one, which can be served, to be", allWarm)
		})
	}
}

// publishedGarbage is a Wasm artifact in the place of good, whose module is none.
func publishedGarbage(t *testing.T, good string) string {
	t.Helper()
	ref, err := name.ParseReference(good, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.wasm.config.v0+json")
	artifact, err = mutate.AppendLayers(artifact, static.NewLayer([]byte("no module"), "application/wasm"))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := artifact.Digest()
	if err != nil {
		t.Fatal(err)
	}
	target := ref.Context().Digest(digest.String())
	if err := remote.Write(target, artifact, remote.WithContext(t.Context()), remote.WithAuth(&login)); err != nil {
		t.Fatal(err)
	}
	return target.String()
}
