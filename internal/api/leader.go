package api

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// The Lease of the replica that reconciles, as long as the rest of Kubernetes'
// controllers hold theirs.
const (
	leaseName     = "hearth-api"
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	leaseRetry    = 2 * time.Second
)

// lead has duties run while this replica is the leader, and returns when ctx
// ends and they did. A replica that loses the lease stops its duties before
// another can have it, and stands for election again: it goes on answering
// requests. Duties that end by themselves give the lease away.
func lead(ctx context.Context, client kubernetes.Interface, namespace, identity string, log *slog.Logger, duties func(context.Context) error) error {
	// Held by the duties: two terms of this process never overlap.
	var terms sync.Mutex
	for ctx.Err() == nil {
		term, end := context.WithCancel(ctx)
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: &resourcelock.LeaseLock{
				LeaseMeta:  metav1.ObjectMeta{Name: leaseName, Namespace: namespace},
				Client:     client.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
			},
			LeaseDuration:   leaseDuration,
			RenewDeadline:   renewDeadline,
			RetryPeriod:     leaseRetry,
			ReleaseOnCancel: true,
			Name:            leaseName,
			Callbacks: leaderelection.LeaderCallbacks{
				// In a goroutine of the elector's, with a context that has
				// ended when the elector returns.
				OnStartedLeading: func(ctx context.Context) {
					terms.Lock()
					defer terms.Unlock()
					defer end()
					if ctx.Err() != nil {
						return
					}
					log.Info("this replica leads: it reconciles", "identity", identity)
					if err := duties(ctx); err != nil && ctx.Err() == nil {
						log.Error("a leader's duty ended", "error", err)
					}
				},
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			end()
			return fmt.Errorf("stand for election: %w", err)
		}
		elector.Run(term)
		end()
		func() {
			terms.Lock() // waits for the duties
			defer terms.Unlock()
		}()
		pause(ctx, leaseRetry)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
