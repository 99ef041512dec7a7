package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiterAdmitsInOrderAndBoundsTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &limiter{limit: 1}
		if err := l.acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		turns := make(chan int, queueFactor)
		for i := range queueFactor {
			go func() {
				if l.acquire(t.Context()) == nil {
					turns <- i
				}
			}()
			synctest.Wait()
		}
		if err := l.acquire(t.Context()); !errors.Is(err, errQueueFull) {
			t.Errorf("with a full queue: %v", err)
		}
		for i := range queueFactor {
			l.release()
			if got := <-turns; got != i {
				t.Errorf("turn of %d, want %d", got, i)
			}
		}
		l.release()
		if running, waiting := l.load(); running != 0 || waiting != 0 {
			t.Errorf("%d running, %d waiting", running, waiting)
		}
	})
}

func TestLimiterWaitIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &limiter{limit: 1}
		if err := l.acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := l.acquire(t.Context()); !errors.Is(err, errQueueWait) || time.Since(began) != queueWait {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		done := make(chan error)
		go func() { done <- l.acquire(t.Context()) }()
		synctest.Wait()
		l.resize(2)
		if err := <-done; err != nil {
			t.Errorf("after growing: %v", err)
		}
	})
}
