package node

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/cluster"
)

// soon bounds waits for what takes seconds: the machine may be busy.
const soon = 2 * time.Minute

const (
	nodeA        = "node-a"
	nodeB        = "node-b"
	toolboxImage = "hearth.test/toolbox:1"
	// authority is what the chart ships, for the namespace it is written with.
	authority = "../../packaging/chart/hearth/files/authority.yaml"
	namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: hearth-system}\n---\n"
)

// shared is the one real cluster of this package's tests, with the shipped
// authority applied.
var shared = cluster.Shared{Start: func(ctx context.Context) (*cluster.Cluster, error) {
	c, err := cluster.New(ctx, cluster.Options{Nodes: []cluster.Node{{Name: nodeA}, {Name: nodeB}}})
	if err != nil {
		return nil, err
	}
	toolbox, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err != nil {
		return c, err
	}
	if err := c.LoadBinaryImage(ctx, toolboxImage, map[string]string{"/toolbox": toolbox}); err != nil {
		return c, err
	}
	manifest, err := os.ReadFile(authority)
	if err != nil {
		return c, err
	}
	_, err = c.ApplyManifest(ctx, append([]byte(namespace), manifest...))
	return c, err
}}

func realCluster(t *testing.T) *cluster.Cluster { t.Helper(); return shared.Need(t) }

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }
