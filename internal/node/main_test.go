package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

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

// bench is the one real cluster of this package's tests, started by the first
// test that needs it.
type bench struct {
	once    sync.Once
	cluster *cluster.Cluster
	err     error
}

var shared bench

func (b *bench) start() {
	b.once.Do(func() {
		ctx := context.Background()
		if b.cluster, b.err = cluster.New(ctx, cluster.Options{Nodes: []cluster.Node{{Name: nodeA}, {Name: nodeB}}}); b.err != nil {
			return
		}
		b.err = func() error {
			toolbox, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
			if err != nil {
				return err
			}
			if err := b.cluster.LoadBinaryImage(ctx, toolboxImage, map[string]string{"/toolbox": toolbox}); err != nil {
				return err
			}
			manifest, err := os.ReadFile(authority)
			if err != nil {
				return err
			}
			_, err = b.cluster.ApplyManifest(ctx, append([]byte(namespace), manifest...))
			return err
		}()
	})
}

// realCluster returns the cluster, with the shipped authority applied; a
// machine that cannot run one skips the test, but fails it in CI.
func realCluster(t *testing.T) *cluster.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a real cluster")
	}
	shared.start()
	if errors.Is(shared.err, cluster.ErrCannotRun) && os.Getenv("CI") == "" {
		t.Skip(shared.err)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.cluster
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	code := m.Run()
	if c := shared.cluster; c != nil {
		if code != 0 {
			c.DumpLogs(os.Stderr)
		}
		if err := c.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}
