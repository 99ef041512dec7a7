package election

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// ErrFenced says that a generation was given up while this machine held it.
// k3s must be stopped and its data removed, which the next Elect insists on by
// calling Discard, and no node may be told of this machine.
var ErrFenced = errors.New("the generation was given up by another machine")

// Hold is the exclusive right to found one generation, for as long as nobody
// gave it up. It beats on its own until it is ended with Found, Abandon or
// Close, one of which must be called. Like its Elector it is used by one
// goroutine at a time, but for Fenced.
type Hold struct {
	elector    *Elector
	generation int
	nonce      string
	session    string

	stop    context.CancelFunc
	stopped chan struct{} // closed when the beating ended
	fenced  chan struct{} // closed when the generation was seen given up
	once    sync.Once
}

// hold prepares the right to found generation n: beating first, then the
// credentials, which take requests of their own.
func (e *Elector) hold(ctx context.Context, n int, holder *holderRecord) (*Decision, error) {
	h := &Hold{elector: e, generation: n, nonce: holder.Nonce, session: randomHex(), stopped: make(chan struct{}), fenced: make(chan struct{})}
	// The beating outlives Elect and ends with the Hold, at the latest after
	// FoundWithin: a holder that hangs must not keep others waiting for ever.
	within := e.within
	if holder.Restore != nil {
		within += e.restoring
	}
	beating, stop := context.WithTimeout(context.WithoutCancel(ctx), within)
	h.stop = stop
	go h.beat(beating)
	credentials, err := e.records.publish(ctx, n, holder)
	if err != nil {
		h.Close()
		return nil, err
	}
	return &Decision{Action: ActionFound, Generation: n, Credentials: credentials, Hold: h, Restore: holder.Restore}, nil
}

func (h *Hold) beat(ctx context.Context) {
	defer close(h.stopped)
	e := h.elector
	interval := e.lease / beatsPerLease
	// Short enough that two requests which hang do not use up the lease.
	limited := func(do func(ctx context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, min(requestTimeout, 2*interval))
		defer cancel()
		return do(ctx)
	}
	for n := uint64(1); ; n++ {
		if b, err := json.Marshal(heartbeatRecord{Nonce: h.nonce, Session: h.session, Beat: n}); err == nil {
			// One attempt a beat: the next one is worth as much as a repetition.
			err := limited(func(ctx context.Context) error { return e.records.store.Put(ctx, heartbeatKey(h.generation), b) })
			if err != nil && ctx.Err() == nil {
				e.log.WarnContext(ctx, "a heartbeat failed", "generation", h.generation, "error", err)
			}
		}
		var b []byte
		err := limited(func(ctx context.Context) (err error) {
			b, err = e.records.store.Get(ctx, outcomeKey(h.generation))
			return err
		})
		if err == nil {
			if out, err := decode[outcomeRecord](e.records, outcomeKey(h.generation), b); err == nil && !h.ours(out) {
				h.fence()
				return
			}
		}
		timer := time.NewTimer(interval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

func (h *Hold) ours(out *outcomeRecord) bool { return out.Outcome == founded && out.Nonce == h.nonce }

func (h *Hold) fence() { h.once.Do(func() { close(h.fenced) }) }

// Generation returns which generation is held.
func (h *Hold) Generation() int { return h.generation }

// Fenced is closed when the generation is seen to have been given up, so that
// k3s can be stopped early. That it is open promises nothing: Found decides.
func (h *Hold) Fenced() <-chan struct{} { return h.fenced }

// Found decides that the generation is founded by this machine, which others
// may from now on join under address, an IP address or a DNS name without a
// port. It is called when the API server is ready.
//
// nil says that it is. An error that is ErrFenced (code CodeFenced) says that
// it never will be: stop k3s, then Elect again. After any other error it is not
// known, and Found may be called again, here or after a restart by Elect.
func (h *Hold) Found(ctx context.Context, address string) error {
	if err := checkAddress(address); err != nil {
		return fmt.Errorf("found generation %d: %w", h.generation, err)
	}
	e := h.elector
	b, err := json.Marshal(outcomeRecord{Outcome: founded, By: e.instance, Nonce: h.nonce, Address: address, At: time.Now().UTC()})
	if err != nil {
		return fmt.Errorf("encode the outcome of generation %d: %w", h.generation, err)
	}
	stored, _, err := e.records.create(ctx, outcomeKey(h.generation), b)
	if err != nil {
		return err
	}
	out, err := decode[outcomeRecord](e.records, outcomeKey(h.generation), stored)
	if err != nil {
		return err
	}
	if !h.ours(out) {
		h.fence()
		h.Close()
		return fault.Passing(CodeFenced, ErrFenced, "nothing is to be done: bootstrap removes what this machine began and joins the others", "generation %d was given up by %s (%s)", h.generation, out.By, out.Reason)
	}
	h.Close()
	e.newest = view{number: h.generation, holder: e.newest.holder, outcome: out}
	if err := e.remember(Memory{Generation: h.generation, Phase: PhaseFounder, Nonce: h.nonce}); err != nil {
		return err
	}
	return e.Announce(ctx, h.generation, address)
}

// Abandon gives the generation up, so that others need not wait for the lease
// after k3s failed here. It is no error if it was decided already. The next
// Elect calls Discard.
func (h *Hold) Abandon(ctx context.Context, reason string) error {
	h.Close()
	return h.elector.records.abandon(ctx, h.generation, h.elector.instance, reason)
}

// Close ends the beating and decides nothing: the generation can be resumed by
// this machine until others give it up.
func (h *Hold) Close() {
	h.stop()
	<-h.stopped
}
