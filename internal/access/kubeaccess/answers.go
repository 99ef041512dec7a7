package kubeaccess

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"
)

// maxAsked bounds the questions that are asked or wait for a place. Beyond it
// the answer is at once that there is none.
const maxAsked = 1024

var errBusy = errors.New("too many requests with tokens or rights that are not known yet")

// renewAfter is the part of an answer's time after which whoever needs it has it
// asked for anew, without waiting: what is in use all the time never makes a
// request wait, and is believed no longer for it.
const renewAfter = 0.75

// answers keeps answers to questions for as long as each says, at most max of
// them, and asks each question once however many want to know, at most places
// at a time.
type answers[T any] struct {
	max     int
	timeout time.Duration
	places  chan struct{}
	now     func() time.Time

	// mu is never held while a question is asked.
	mu    sync.Mutex
	known map[[sha256.Size]byte]kept[T]
	asked map[[sha256.Size]byte]*question[T]
}

type kept[T any] struct {
	answer T
	// renew is from when the question may be asked again, until when it must.
	renew, until time.Time
}

// question is being asked; done is closed when answer and err are there.
type question[T any] struct {
	done   chan struct{}
	answer T
	err    error
}

func newAnswers[T any](max, places int, timeout time.Duration, now func() time.Time) *answers[T] {
	return &answers[T]{
		max: max, timeout: timeout, places: make(chan struct{}, places), now: now,
		known: map[[sha256.Size]byte]kept[T]{}, asked: map[[sha256.Size]byte]*question[T]{},
	}
}

// get returns the answer under key, asking if need be. An error is nobody's
// answer but those who wait for it now. ask gets a context that does not end
// with ctx, since others may wait for it too, but after the timeout.
func (a *answers[T]) get(ctx context.Context, key [sha256.Size]byte, ask func(context.Context) (T, time.Duration, error)) (T, error) {
	a.mu.Lock()
	if k, ok := a.known[key]; ok {
		now := a.now()
		if now.Before(k.until) {
			if !now.Before(k.renew) && a.asked[key] == nil && len(a.asked) < maxAsked {
				a.begin(ctx, key, ask)
			}
			a.mu.Unlock()
			return k.answer, nil
		}
	}
	q := a.asked[key]
	if q == nil {
		if len(a.asked) >= maxAsked {
			a.mu.Unlock()
			var none T
			return none, errBusy
		}
		q = a.begin(ctx, key, ask)
	}
	a.mu.Unlock()
	select {
	case <-q.done:
		return q.answer, q.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// begin asks the question; it needs a.mu.
func (a *answers[T]) begin(ctx context.Context, key [sha256.Size]byte, ask func(context.Context) (T, time.Duration, error)) *question[T] {
	q := &question[T]{done: make(chan struct{})}
	a.asked[key] = q
	// It ends by the timeout at the latest.
	go a.answer(context.WithoutCancel(ctx), key, q, ask)
	return q
}

func (a *answers[T]) answer(ctx context.Context, key [sha256.Size]byte, q *question[T], ask func(context.Context) (T, time.Duration, error)) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	began := a.now()
	var ttl time.Duration
	select {
	case a.places <- struct{}{}:
		q.answer, ttl, q.err = ask(ctx)
		<-a.places
	case <-ctx.Done():
		q.err = ctx.Err()
	}
	a.mu.Lock()
	delete(a.asked, key)
	// From when it was asked: the answer may be as old as that.
	if until := began.Add(ttl); q.err == nil && ttl > 0 && a.now().Before(until) {
		a.makeRoom()
		a.known[key] = kept[T]{q.answer, began.Add(time.Duration(renewAfter * float64(ttl))), until}
	} else if q.err == nil {
		delete(a.known, key) // an older answer is not true any more
	}
	a.mu.Unlock()
	close(q.done)
}

// makeRoom drops what is over, and if that is nothing, some others. It needs
// a.mu.
func (a *answers[T]) makeRoom() {
	if len(a.known) < a.max {
		return
	}
	now := a.now()
	for key, k := range a.known {
		if !now.Before(k.until) {
			delete(a.known, key)
		}
	}
	for key := range a.known {
		if len(a.known) < a.max*3/4 {
			break
		}
		delete(a.known, key) // asking again costs little
	}
}
