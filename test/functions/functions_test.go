package functions_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

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
	f = submit(t, tenant, "twice", "the one after")
	if f.Revision != 2 {
		t.Fatalf("%+v", f)
	}
	answers(t, f.URL, "the one after")
	must(t, "functions", "rollback", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "twice")
	answers(t, f.URL, "the one before")
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
