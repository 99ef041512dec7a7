package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
	"go.uber.org/goleak"
)

// dumpTimeout bounds Shared.Dump.
const dumpTimeout = 30 * time.Second

// Shared is the one cluster of a package's tests:
//
//	var shared = cluster.Shared{Start: func(ctx context.Context) (*cluster.Cluster, error) { ... }}
//
//	func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }
type Shared struct {
	// Start makes the cluster and fills it. What it returns beside an error is
	// closed like any other.
	Start func(ctx context.Context) (*Cluster, error)
	// First starts the cluster before all tests: a machine that cannot run one
	// runs none of them. Otherwise the first test that needs it does.
	First bool
	// Dump writes more than the cluster's own logs when a test failed. It may
	// be nil.
	Dump func(ctx context.Context, c *Cluster, w io.Writer)
	// Close ends what Start made beside the cluster, before that; also after
	// half a Start. It may be nil.
	Close func()
	// Leaks are goroutines that libraries keep for the life of the process.
	Leaks []goleak.Option

	once    sync.Once
	cluster *Cluster
	err     error
}

// Need returns the cluster. A machine that cannot run one skips the test, but
// fails it where the environment variable CI is set; -short skips it, too.
func (s *Shared) Need(tb testing.TB) *Cluster {
	tb.Helper()
	if testing.Short() {
		tb.Skip("starts a real cluster")
	}
	s.once.Do(s.start)
	if s.err != nil {
		if errors.Is(s.err, ErrCannotRun) {
			needs.Missing(tb, "%v", s.err)
		}
		tb.Fatal(s.err)
	}
	return s.cluster
}

func (s *Shared) start() { s.cluster, s.err = s.Start(context.Background()) }

// Main runs the tests, says what the cluster said when one failed, removes the
// cluster, looks for goroutines that are left, and returns the exit code.
func (s *Shared) Main(m *testing.M) int {
	if s.First {
		if err := Check(); err != nil {
			fmt.Fprintln(os.Stderr, "the tests on a cluster do not run here:", err)
			if os.Getenv("CI") != "" {
				return 1
			}
			return 0
		}
		s.once.Do(s.start)
	}
	code := 1
	if s.First && s.err != nil {
		fmt.Fprintln(os.Stderr, "set up:", s.err)
	} else {
		code = m.Run()
	}
	if code != 0 && s.cluster != nil {
		if s.Dump != nil {
			ctx, cancel := context.WithTimeout(context.Background(), dumpTimeout)
			s.Dump(ctx, s.cluster, os.Stderr)
			cancel()
		}
		s.cluster.DumpLogs(os.Stderr)
	}
	if s.Close != nil {
		s.Close()
	}
	if s.cluster != nil {
		if err := s.cluster.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	// What a failed test left is no news.
	if err := goleak.Find(s.Leaks...); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}
