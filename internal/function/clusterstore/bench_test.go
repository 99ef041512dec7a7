package clusterstore_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/function"
)

// BenchmarkGetAmongThousand reports the 99th percentile of Get while nodes
// report and revisions are added.
func BenchmarkGetAmongThousand(b *testing.B) {
	fresh(b)
	s := open(b, nil)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < 1000; i += 16 {
				if _, err := s.AddRevision(context.Background(), fmt.Sprintf("f%d", i), function.Change{}, constant(revision(i))); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	done := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
				_, _ = s.AddRevision(context.Background(), "busy", function.Change{}, constant(revision(i)))
			}
		}
	})
	took := make([]time.Duration, 0, 1<<20)
	for i := 0; b.Loop(); i++ {
		began := time.Now()
		if _, err := s.Get(context.Background(), fmt.Sprintf("f%d", i%1000)); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	close(done)
	wg.Wait()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
}

func BenchmarkAddRevision(b *testing.B) {
	fresh(b)
	s := open(b, nil)
	for i := 0; b.Loop(); i++ {
		add(b, s, "hello", i+1, nil)
	}
}
