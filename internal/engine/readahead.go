package engine

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// readAheadAfter is how long nobody may want more of a body before it is
	// read on for the sake of noticing that its client left.
	readAheadAfter = 250 * time.Millisecond
	// readAheadChunk is how much is read at a time.
	readAheadChunk = 64 << 10
	// readAheadMost bounds what all requests together have read ahead. A
	// body beyond that waits in the kernel, where hangups still see most of
	// the clients that leave.
	readAheadMost = 64 << 20
)

var errBodyOver = errors.New("the request is over")

// readAhead is a request's body that goes on being read while its guest does
// not. Only that tells every client that left: one that closed the connection
// while the buffers on the way were full has its FIN wait behind bytes that
// nobody takes, so the kernel cannot know either. A body that is read at once
// is only passed through.
type readAhead struct {
	body io.Reader
	// interrupt ends a read of body that waits.
	interrupt func()
	// held counts what all requests hold.
	held *atomic.Int64

	mu sync.Mutex
	// turn is signalled when reading ends.
	turn sync.Cond
	// reading says that somebody reads from body, without mu.
	reading bool
	// wanted says that Read waits: what is read ahead is better given to it.
	wanted bool
	over   bool
	timer  *time.Timer
	chunks [][]byte
	err    error // of body, after chunks
}

func newReadAhead(body io.Reader, interrupt func(), held *atomic.Int64) *readAhead {
	a := &readAhead{body: body, interrupt: interrupt, held: held}
	a.turn.L = &a.mu
	a.timer = time.AfterFunc(readAheadAfter, a.run)
	return a
}

// Read gives what was read ahead, then what comes.
func (a *readAhead) Read(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.timer.Stop()
	a.wanted = true
	for a.reading && len(a.chunks) == 0 && !a.over {
		a.turn.Wait()
	}
	a.wanted = false
	var n int
	var err error
	switch {
	case a.over:
		return 0, errBodyOver
	case len(a.chunks) > 0:
		n = copy(p, a.chunks[0])
		if a.chunks[0] = a.chunks[0][n:]; len(a.chunks[0]) == 0 {
			a.chunks = a.chunks[1:]
		}
		a.held.Add(-int64(n))
	case a.err != nil:
		return 0, a.err
	default:
		n, err = a.read(p)
		if a.err = err; a.over {
			return n, errBodyOver
		}
	}
	if a.err == nil {
		a.timer.Reset(readAheadAfter)
	}
	return n, err
}

// read reads from body; mu is held before and after.
func (a *readAhead) read(p []byte) (int, error) {
	a.reading = true
	a.mu.Unlock()
	n, err := a.body.Read(p)
	a.mu.Lock()
	a.reading = false
	a.turn.Broadcast()
	return n, err
}

// run reads on until somebody else wants to, or has to, or there is no more.
func (a *readAhead) run() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for !a.reading && !a.wanted && !a.over && a.err == nil {
		if a.held.Add(readAheadChunk) > readAheadMost {
			a.held.Add(-readAheadChunk)
			return
		}
		chunk := make([]byte, readAheadChunk)
		n, err := a.read(chunk)
		a.err = err
		a.held.Add(int64(n) - readAheadChunk)
		if a.over {
			a.held.Add(-int64(n))
		} else if n > 0 {
			a.chunks = append(a.chunks, chunk[:n])
		}
	}
}

// stop ends reading and gives back what is held. After it nobody reads: the
// server, which takes over the connection, would abort a read that waits for the
// client, and with it the deadline that its own reading of the rest needs.
func (a *readAhead) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.timer.Stop()
	a.over = true
	a.turn.Broadcast()
	for a.reading {
		a.interrupt()
		a.turn.Wait()
	}
	for _, chunk := range a.chunks {
		a.held.Add(-int64(len(chunk)))
	}
	a.chunks = nil
}
