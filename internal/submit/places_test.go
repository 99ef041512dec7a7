package submit

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestPlacesGoToTenantsInTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(1)
		if ok, err := p.take(t.Context(), "first", time.Minute); !ok || err != nil {
			t.Fatal(ok, err)
		}
		var mu sync.Mutex
		var order []string
		var all sync.WaitGroup
		for _, tenant := range strings.Fields("a a a a b b c") { // in this order
			all.Go(func() {
				ok, err := p.take(t.Context(), tenant, time.Minute)
				if !ok || err != nil {
					t.Error(tenant, ok, err)
					return
				}
				mu.Lock()
				order = append(order, tenant)
				mu.Unlock()
				time.Sleep(time.Second)
				p.give()
			})
			synctest.Wait()
		}
		p.give()
		all.Wait()
		if !slices.Equal(order, strings.Fields("a b c a b a a")) {
			t.Errorf("got %q", order)
		}
		if p.free != 1 || p.waiters != 0 || len(p.waiting) != 0 || len(p.turns) != 0 {
			t.Errorf("left: %+v", p)
		}
	})
}

func TestWaitForAPlaceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(1)
		_, _ = p.take(t.Context(), "a", time.Second)
		began := time.Now()
		if ok, err := p.take(t.Context(), "a", time.Second); ok || err != nil || time.Since(began) != time.Second {
			t.Errorf("%t, %v after %s", ok, err, time.Since(began))
		}
		ctx, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, leave)
		if ok, err := p.take(ctx, "b", time.Minute); ok || err == nil {
			t.Errorf("%t, %v", ok, err)
		}
		// Beyond so many nobody waits at all.
		var all sync.WaitGroup
		for range maxWaiting {
			all.Go(func() { _, _ = p.take(t.Context(), "a", time.Minute) })
		}
		synctest.Wait()
		began = time.Now()
		if ok, err := p.take(t.Context(), "b", time.Minute); ok || err != nil || time.Since(began) != 0 {
			t.Errorf("%t, %v after %s", ok, err, time.Since(began))
		}
		all.Wait()
		p.give()
		if p.free != 1 || p.waiters != 0 || len(p.waiting) != 0 || len(p.turns) != 0 {
			t.Errorf("left: %+v", p)
		}
	})
}

func TestPlacesAreNeverLostNorMultiplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 3
		p := newPlaces(n)
		var mu sync.Mutex
		at, most := 0, 0
		var all sync.WaitGroup
		for i := range 200 {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i%7)*time.Second)
				defer cancel()
				// Ends of waits and gifts fall into the same moments.
				ok, _ := p.take(ctx, string(rune('a'+i%5)), time.Duration(1+i%5)*time.Second)
				if !ok {
					return
				}
				mu.Lock()
				at++
				most = max(most, at)
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				at--
				mu.Unlock()
				p.give()
			})
		}
		all.Wait()
		if most > n || p.free != n || p.waiters != 0 || len(p.waiting) != 0 || len(p.turns) != 0 {
			t.Errorf("%d at once, left: %+v", most, p)
		}
	})
}
