package engine

import (
	"bytes"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestBodyIsReadAheadOnlyWhileNobodyWantsItAndWithinBounds(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*readAheadChunk/16)
	synctest.Test(t, func(t *testing.T) {
		var held atomic.Int64
		body := bytes.NewReader(content)
		a := newReadAhead(body, func() {}, &held)
		left := func() int {
			a.mu.Lock()
			defer a.mu.Unlock()
			return body.Len()
		}
		first := make([]byte, 100)
		if _, err := io.ReadFull(a, first); err != nil || left() != len(content)-100 || held.Load() != 0 {
			t.Errorf("a body that is wanted: %v, %d left, %d held", err, left(), held.Load())
		}
		time.Sleep(readAheadAfter)
		synctest.Wait()
		if left() != 0 || held.Load() != int64(len(content)-100) {
			t.Errorf("a body that is not: %d left, %d held", left(), held.Load())
		}
		rest, err := io.ReadAll(a)
		if err != nil || !bytes.Equal(append(first, rest...), content) || held.Load() != 0 {
			t.Errorf("%d bytes arrived, %v, %d held", len(rest)+100, err, held.Load())
		}
		a.stop()

		held.Store(readAheadMost - readAheadChunk)
		body.Reset(content)
		a = newReadAhead(body, func() {}, &held)
		time.Sleep(readAheadAfter)
		synctest.Wait()
		if left() != len(content)-readAheadChunk || held.Load() != readAheadMost {
			t.Errorf("beyond the bound: %d left, %d held", left(), held.Load())
		}
		a.stop()
		if held.Load() != readAheadMost-readAheadChunk {
			t.Errorf("%d held after the end", held.Load())
		}
		if _, err := a.Read(first); !errors.Is(err, errBodyOver) {
			t.Errorf("reading after the end: %v", err)
		}
	})
}

func TestEndOfARequestInterruptsAReadThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var held atomic.Int64
		r, w := io.Pipe()
		a := newReadAhead(r, func() { _ = w.Close() }, &held)
		time.Sleep(readAheadAfter)
		synctest.Wait() // it waits for the client
		a.stop()
		if held.Load() != 0 {
			t.Errorf("%d held after the end", held.Load())
		}
	})
}
