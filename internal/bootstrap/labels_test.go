package bootstrap

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/k3s"
)

func TestANodeGetsTheLabelsOfItsConfigurationAndLosesThoseItHadFromIt(t *testing.T) {
	for name, tc := range map[string]struct {
		node  nodeState
		want  map[string]string
		patch string
	}{
		"registered just now": {
			node: nodeState{Labels: map[string]string{"team": "red", "kubernetes.io/os": "linux"}}, want: map[string]string{"team": "red"},
			patch: `{"labels":{},"annotations":{"hearth.sh/configured-labels":"team"}}`,
		},
		"nothing changed": {
			node: nodeState{Labels: map[string]string{"team": "red"}, Annotations: map[string]string{labelsAnnotation: "team"}}, want: map[string]string{"team": "red"},
		},
		"no labels, and none before": {node: nodeState{Labels: map[string]string{"kubernetes.io/os": "linux"}}},
		"another value, one more, one less, and somebody's own": {
			node:  nodeState{Labels: map[string]string{"team": "red", "disk": "slow", "own": "yes"}, Annotations: map[string]string{labelsAnnotation: "disk,team"}},
			want:  map[string]string{"team": "blue", "rack": ""},
			patch: `{"labels":{"team":"blue","rack":"","disk":null},"annotations":{"hearth.sh/configured-labels":"rack,team"}}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := labelPatch(tc.node, tc.want)
			if tc.patch == "" {
				if got != nil {
					t.Errorf("the patch is %s", got)
				}
				return
			}
			var is, want struct{ Metadata map[string]any }
			if err := json.Unmarshal(got, &is); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(`{"metadata":`+tc.patch+`}`), &want); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, is); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestWhatAManifestInstalledIsSaidToStay(t *testing.T) {
	paths := k3s.DefaultPaths()
	got := left(paths, []string{paths.Manifests + "/hearth-addon.yaml", "/etc/rancher/k3s/registries.yaml"})
	want := []string{"k3s leaves what " + paths.Manifests + "/hearth-addon.yaml installed in the cluster; to remove it: kubectl -n kube-system delete helmchart hearth"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
