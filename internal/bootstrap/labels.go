package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/k3s"
)

// labelsAnnotation has the keys of spec.node.labels that the Node got from
// bootstrap, so that those which the configuration drops can be taken away and
// those of others stay.
const labelsAnnotation = v1alpha1.Group + "/configured-labels"

// labelPatch is a merge patch that gives a Node the labels of its configuration;
// nil if it has them. A kubelet sets labels only when its node registers.
func labelPatch(node nodeState, want map[string]string) []byte {
	keys := strings.Join(slices.Sorted(maps.Keys(want)), ",")
	labels := map[string]any{}
	for key, value := range want {
		if was, there := node.Labels[key]; !there || was != value {
			labels[key] = value
		}
	}
	for key := range strings.SplitSeq(node.Annotations[labelsAnnotation], ",") {
		_, wanted := want[key]
		if _, there := node.Labels[key]; there && !wanted {
			labels[key] = nil
		}
	}
	if len(labels) == 0 && node.Annotations[labelsAnnotation] == keys {
		return nil
	}
	patch, _ := json.Marshal(map[string]any{"metadata": map[string]any{ // text to text
		"labels": labels, "annotations": map[string]any{labelsAnnotation: keys},
	}})
	return patch
}

// label makes the labels of a registered Node those of the configuration, with
// the node's own identity.
func (m *machine) label(ctx context.Context, node nodeState) error {
	patch := labelPatch(node, m.spec.Node.Labels)
	if patch == nil {
		return nil
	}
	client, err := newNodeClient(m.paths.KubeletKubeconfig, m.snapshot.Identity.InstanceID)
	if err != nil {
		return err
	}
	defer client.close()
	if err := client.patch(ctx, patch); err != nil {
		return err
	}
	m.rec.changed()
	m.rec.note("gave the node the labels of its configuration")
	return nil
}

func (c *nodeClient) patch(ctx context.Context, patch []byte) error {
	ctx, cancel := context.WithTimeout(ctx, readyCall)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPatch, c.url, bytes.NewReader(patch))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/merge-patch+json")
	response, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxNodeBytes))
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the API server answers %s: %.300s", response.Status, body)
	}
	return nil
}

// left says what stays in the cluster although its manifest goes: k3s applies
// manifests and takes nothing away that it applied.
func left(paths k3s.Paths, retired []string) (warnings []string) {
	for _, path := range retired {
		if chart := k3s.ChartOf(paths, path); chart != "" {
			warnings = append(warnings, fmt.Sprintf("k3s leaves what %s installed in the cluster; to remove it: kubectl -n kube-system delete helmchart %s", path, chart))
		}
	}
	return warnings
}
