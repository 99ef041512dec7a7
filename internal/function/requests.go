package function

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// maxRequests bounds how many answered requests are remembered; beyond it
	// the oldest are forgotten before their time.
	maxRequests = 10_000
	// maxPruned bounds what one write removes, so that no request pays for a
	// day's leftovers.
	maxPruned = 64
)

// requestRecord is a request that changed something or was answered. It is
// written first in the transaction of the change itself: a crash between the
// change and the answer leaves Outcome without Response.
type requestRecord struct {
	Fingerprint string    `json:"fingerprint"`
	At          time.Time `json:"at"`
	Outcome     *Outcome  `json:"outcome,omitempty"`
	Response    *Response `json:"response,omitempty"`
}

// Begin implements Idempotency. It writes nothing: until something was
// changed or answered there is nothing that a crash could lose.
func (s *Bolt) Begin(ctx context.Context, key, fingerprint string) (Begun, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.isClosed() {
		return Begun{}, ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return Begun{}, err
	}
	if held, ok := s.held[key]; ok {
		if held != fingerprint {
			return Begun{State: IdempotencyMismatch}, nil
		}
		return Begun{State: IdempotencyInFlight}, nil
	}
	var rec *requestRecord
	err := guard("look up idempotency key", func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			var err error
			rec, err = readRequest(tx, key)
			return err
		})
	})
	if err != nil {
		return Begun{}, err
	}
	b := Begun{State: IdempotencyNew}
	if rec != nil && s.now().Sub(rec.At) < IdempotencyExpiry {
		switch {
		case rec.Fingerprint != fingerprint:
			return Begun{State: IdempotencyMismatch}, nil
		case rec.Response != nil:
			return Begun{State: IdempotencyReplay, Response: rec.Response}, nil
		case rec.Outcome != nil:
			b = Begun{State: IdempotencyResume, Outcome: rec.Outcome}
		}
	}
	s.held[key] = fingerprint
	return b, nil
}

// Complete implements Idempotency.
func (s *Bolt) Complete(_ context.Context, key string, r Response) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.isClosed() {
		return ErrClosed
	}
	if _, ok := s.held[key]; !ok {
		return fmt.Errorf("idempotency key was not begun")
	}
	// Let go whatever happens: if the answer cannot be stored, a retry finds
	// the outcome and makes the answer again.
	defer delete(s.held, key)
	return s.update("record answer", "", func(tx *bbolt.Tx, m *mutation) error {
		old, err := readRequest(tx, key)
		if err != nil {
			return err
		}
		rec := requestRecord{Response: &r}
		if old != nil && old.Fingerprint == s.held[key] {
			rec.Outcome = old.Outcome
		}
		m.requests, err = s.putRequest(tx, key, rec)
		return err
	})
}

// Release implements Idempotency.
func (s *Bolt) Release(_ context.Context, key string) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	delete(s.held, key)
	return nil
}

// recordOutcome records a change that turned out to be none.
func (s *Bolt) recordOutcome(key string, o Outcome) error {
	if key == "" {
		return nil
	}
	return s.update("record outcome", key, func(_ *bbolt.Tx, m *mutation) error {
		m.outcome = o
		return nil
	})
}

// putRequest writes rec under a held key and returns by how much the number
// of records grew. It needs s.writing.
func (s *Bolt) putRequest(tx *bbolt.Tx, key string, rec requestRecord) (int, error) {
	fingerprint, ok := s.held[key]
	if !ok {
		return 0, fmt.Errorf("idempotency key was not begun")
	}
	rec.Fingerprint, rec.At = fingerprint, s.now().UTC()
	grown, err := pruneRequests(tx, rec.At, s.requests)
	if err != nil {
		return 0, err
	}
	old, err := readRequest(tx, key)
	if err != nil {
		return 0, err
	}
	if old != nil {
		if err := tx.Bucket(bucketExpiry).Delete(expiryKey(old.At, key)); err != nil {
			return 0, err
		}
		grown--
	}
	if err := tx.Bucket(bucketExpiry).Put(expiryKey(rec.At, key), nil); err != nil {
		return 0, err
	}
	return grown + 1, put(tx, bucketRequests, []byte(key), rec)
}

func readRequest(tx *bbolt.Tx, key string) (*requestRecord, error) {
	v := tx.Bucket(bucketRequests).Get([]byte(key))
	if v == nil {
		return nil, nil
	}
	var rec requestRecord
	if err := json.Unmarshal(v, &rec); err != nil {
		return nil, fmt.Errorf("%w: idempotency record: %w", ErrCorrupt, err)
	}
	return &rec, nil
}

// expiryKey orders records by age: big-endian nanoseconds, then the key.
func expiryKey(at time.Time, key string) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(at.UnixNano())), key...)
}

// pruneRequests removes some of the records that expired or, when there are
// have of them, are too many, and returns the (negative) change of their number.
func pruneRequests(tx *bbolt.Tx, now time.Time, have int) (int, error) {
	limit := expiryKey(now.Add(-IdempotencyExpiry), "")
	var old [][]byte
	c := tx.Bucket(bucketExpiry).Cursor()
	for k, _ := c.First(); len(k) > 8 && len(old) < maxPruned; k, _ = c.Next() {
		if bytes.Compare(k[:8], limit) > 0 && have-len(old) < maxRequests {
			break
		}
		old = append(old, slices.Clone(k))
	}
	for _, k := range old {
		if err := tx.Bucket(bucketExpiry).Delete(k); err != nil {
			return 0, err
		}
		if err := tx.Bucket(bucketRequests).Delete(k[8:]); err != nil {
			return 0, err
		}
	}
	return -len(old), nil
}
