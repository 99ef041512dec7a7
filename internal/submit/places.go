package submit

import (
	"context"
	"slices"
	"sync"
	"time"
)

// maxWaiting bounds the requests that wait for a place, each a connection and no
// more. One beyond it is refused at once.
const maxWaiting = 256

// places is a limited number of them. One that becomes free goes to the tenants
// that wait in turns, and of each to its first: who submits fifty functions at
// once keeps nobody who submits one waiting for all of them.
type places struct {
	mu      sync.Mutex // guards what follows, never held while waiting
	free    int
	waiting map[string][]chan struct{} // by tenant; a place is given by closing
	turns   []string                   // tenants that wait, the next one first
	waiters int
}

func newPlaces(n int) *places { return &places{free: n, waiting: map[string][]chan struct{}{}} }

// take waits for a place, patience at most, and says whether it is had. The
// error is the context's. What is had must be given back.
func (p *places) take(ctx context.Context, tenant string, patience time.Duration) (bool, error) {
	p.mu.Lock()
	if p.free > 0 { // then nobody waits
		p.free--
		p.mu.Unlock()
		return true, nil
	}
	if p.waiters >= maxWaiting {
		p.mu.Unlock()
		return false, nil
	}
	turn := make(chan struct{})
	if len(p.waiting[tenant]) == 0 {
		p.turns = append(p.turns, tenant)
	}
	p.waiting[tenant] = append(p.waiting[tenant], turn)
	p.waiters++
	p.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-turn:
		return true, nil
	case <-timer.C:
		return p.leave(tenant, turn), nil
	case <-ctx.Done():
		if p.leave(tenant, turn) {
			p.give()
		}
		return false, ctx.Err()
	}
}

// leave ends a wait, and says whether a place was given in that very moment.
func (p *places) leave(tenant string, turn chan struct{}) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiting[tenant], turn)
	if i < 0 {
		return true
	}
	p.waiters--
	if p.waiting[tenant] = slices.Delete(p.waiting[tenant], i, i+1); len(p.waiting[tenant]) == 0 {
		delete(p.waiting, tenant)
		p.turns = slices.DeleteFunc(p.turns, func(t string) bool { return t == tenant })
	}
	return false
}

// give gives a place back.
func (p *places) give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.turns) == 0 {
		p.free++
		return
	}
	tenant := p.turns[0]
	p.turns = p.turns[1:]
	turn := p.waiting[tenant][0]
	if p.waiting[tenant] = p.waiting[tenant][1:]; len(p.waiting[tenant]) == 0 {
		delete(p.waiting, tenant)
	} else {
		p.turns = append(p.turns, tenant)
	}
	p.waiters--
	close(turn)
}
