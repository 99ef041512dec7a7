package clusterstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/internal/function"
)

const (
	// labelRequest is on the ConfigMaps of idempotency keys.
	labelRequest = "hearth.sh/request"
	// requestData is the one key of their data.
	requestData = "request"
	// maxResponseBytes bounds what a stored answer takes of a ConfigMap (1 MiB).
	maxResponseBytes = 512 << 10
	// holderSeparator is between an instance, a DNS label, and what tells its
	// lives apart, as client-go's leader election has it.
	holderSeparator = "_"
	// leaseSlack is how far the clocks of two machines may differ.
	leaseSlack = 5 * time.Second
)

// requestRecord is what is known of an idempotency key.
type requestRecord struct {
	Fingerprint string    `json:"fingerprint"`
	At          time.Time `json:"at"`
	// Holder is the process that works on the request, as the holder of its
	// Lease; empty: none.
	Holder string `json:"holder,omitempty"`
	// Deleting is what the request is about to delete: a deletion leaves no
	// object that could say under which key it was made.
	Deleting *deletion          `json:"deleting,omitempty"`
	Outcome  *function.Outcome  `json:"outcome,omitempty"`
	Response *function.Response `json:"response,omitempty"`
}

type deletion struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// requestObject is a record with the object that holds it.
type requestObject struct {
	requestRecord
	object *corev1.ConfigMap
}

func requestHash(idempotencyKey string) string {
	sum := sha256.Sum256([]byte(idempotencyKey))
	return hex.EncodeToString(sum[:16])
}

// holds returns the hash of a key that this process holds, "" for no key.
func (s *Store) holds(idempotencyKey string) (string, error) {
	if idempotencyKey == "" {
		return "", nil
	}
	hash := requestHash(idempotencyKey)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[hash] == nil {
		return "", errors.New("idempotency key was not begun")
	}
	return hash, nil
}

// Begin implements function.Idempotency. A key is held by an instance for as
// long as the instance renews its Lease.
func (s *Store) Begin(ctx context.Context, idempotencyKey, fingerprint string) (function.Begun, error) {
	if err := s.begin(ctx); err != nil {
		return function.Begun{}, err
	}
	hash := requestHash(idempotencyKey)
	for range maxAttempts {
		b, err := s.tryBegin(ctx, hash, fingerprint)
		if !errors.Is(err, errConflict) {
			return b, err
		}
	}
	return function.Begun{}, fmt.Errorf("begin a request: %w: others use the same Idempotency-Key", function.ErrUnavailable)
}

func (s *Store) tryBegin(ctx context.Context, hash, fingerprint string) (function.Begun, error) {
	r, err := s.readRequest(ctx, hash)
	if err != nil {
		return function.Begun{}, err
	}
	mine := requestRecord{Fingerprint: fingerprint, At: s.o.Now().UTC(), Holder: s.holder}
	b := function.Begun{State: function.IdempotencyNew}
	if r == nil || s.o.Now().Sub(r.At) >= function.IdempotencyExpiry {
		if r == nil {
			r = &requestObject{}
		}
		return b, s.hold(ctx, hash, r, mine)
	}
	same := r.Fingerprint == fingerprint
	if r.Response != nil {
		if !same {
			return function.Begun{State: function.IdempotencyMismatch}, nil
		}
		return function.Begun{State: function.IdempotencyReplay, Response: r.Response}, nil
	}
	working, err := s.working(ctx, hash, r.Holder)
	if err != nil {
		return function.Begun{}, err
	}
	if working {
		if !same {
			return function.Begun{State: function.IdempotencyMismatch}, nil
		}
		return function.Begun{State: function.IdempotencyInFlight}, nil
	}
	outcome, err := s.outcomeOf(ctx, hash, r)
	if err != nil {
		return function.Begun{}, err
	}
	if outcome != nil {
		if !same {
			return function.Begun{State: function.IdempotencyMismatch}, nil
		}
		mine.Outcome = outcome
		b = function.Begun{State: function.IdempotencyResume, Outcome: outcome}
	}
	return b, s.hold(ctx, hash, r, mine)
}

// outcomeOf finds what was changed under a key by whoever does not work on it
// any more.
func (s *Store) outcomeOf(ctx context.Context, hash string, r *requestObject) (*function.Outcome, error) {
	if r.Outcome != nil {
		return r.Outcome, nil
	}
	s.mem.mu.RLock()
	done, ok := s.mem.requests[hash]
	s.mem.mu.RUnlock()
	if ok {
		return &function.Outcome{Name: done.function, Revision: done.change.revision, Created: done.change.created}, nil
	}
	if d := r.Deleting; d != nil {
		f, err := s.getFunction(ctx, key{Namespace: d.Namespace, Name: d.Name})
		if err != nil {
			return nil, err
		}
		if f == nil || string(f.UID) != d.UID {
			return &function.Outcome{Name: d.Name, Deleted: true}, nil
		}
	}
	return nil, nil
}

// hold writes rec, which names this instance, over what was read.
func (s *Store) hold(ctx context.Context, hash string, was *requestObject, rec requestRecord) error {
	r := &requestObject{requestRecord: rec, object: was.object}
	s.mu.Lock()
	if s.held[hash] != nil {
		s.mu.Unlock()
		return errConflict // another goroutine of this process was faster
	}
	s.held[hash] = r
	s.mu.Unlock()
	err := s.writeRequest(ctx, hash, r)
	if err != nil {
		s.mu.Lock()
		delete(s.held, hash)
		s.mu.Unlock()
	}
	return err
}

// working says whether the holder of a key still works on it.
func (s *Store) working(ctx context.Context, hash, holder string) (bool, error) {
	switch holder {
	case "":
		return false, nil
	case s.holder:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.held[hash] != nil, nil
	}
	instance, _, _ := strings.Cut(holder, holderSeparator)
	ctx, cancel := call(ctx)
	defer cancel()
	l, err := s.kube.CoordinationV1().Leases(s.o.Namespace).Get(ctx, s.leaseName(instance), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, storeError("look up who holds the Idempotency-Key", err)
	}
	if l.Spec.RenewTime == nil || l.Spec.LeaseDurationSeconds == nil || l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity != holder {
		return false, nil
	}
	valid := time.Duration(*l.Spec.LeaseDurationSeconds)*time.Second + leaseSlack
	return time.Since(l.Spec.RenewTime.Time) < valid, nil
}

// Complete implements function.Idempotency.
func (s *Store) Complete(ctx context.Context, idempotencyKey string, answer function.Response) error {
	if err := s.begin(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	hash, err := s.holds(idempotencyKey)
	if err != nil {
		return err
	}
	// Let go whatever happens: if the answer cannot be stored, a retry finds
	// the outcome and makes the answer again.
	r := s.letGo(hash)
	if len(answer.Body) > maxResponseBytes {
		return fmt.Errorf("store the answer to a request: it has %d bytes, at most %d can be stored", len(answer.Body), maxResponseBytes)
	}
	r.Response, r.Holder, r.At = &answer, "", s.o.Now().UTC()
	return s.writeRequest(context.WithoutCancel(ctx), hash, r)
}

// Release implements function.Idempotency.
func (s *Store) Release(ctx context.Context, idempotencyKey string) error {
	hash := requestHash(idempotencyKey)
	r := s.letGo(hash)
	if r == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	outcome, err := s.outcomeOf(ctx, hash, r)
	if err != nil {
		return err // the Lease ends, then another process finds the outcome
	}
	if outcome != nil {
		r.Outcome, r.Holder = outcome, ""
		return s.writeRequest(ctx, hash, r)
	}
	ctx, cancel := call(ctx)
	defer cancel()
	err = s.kube.CoreV1().ConfigMaps(s.o.Namespace).Delete(ctx, requestName(hash), metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{ResourceVersion: &r.object.ResourceVersion},
	})
	if err != nil && !apierrors.IsNotFound(err) {
		return storeError("forget a request", err)
	}
	return nil
}

func (s *Store) letGo(hash string) *requestObject {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.held[hash]
	delete(s.held, hash)
	return r
}

// recordOutcome records a change that turned out to be none.
func (s *Store) recordOutcome(ctx context.Context, idempotencyKey string, o function.Outcome) error {
	return s.amend(ctx, idempotencyKey, func(r *requestRecord) { r.Outcome = &o })
}

// recordDeletion records what is about to be deleted.
func (s *Store) recordDeletion(ctx context.Context, idempotencyKey string, e *entry) error {
	return s.amend(ctx, idempotencyKey, func(r *requestRecord) {
		r.Deleting = &deletion{Namespace: e.key.Namespace, Name: e.key.Name, UID: string(e.object.UID)}
	})
}

func (s *Store) amend(ctx context.Context, idempotencyKey string, change func(*requestRecord)) error {
	if idempotencyKey == "" {
		return nil
	}
	hash := requestHash(idempotencyKey)
	s.mu.Lock()
	r := s.held[hash]
	s.mu.Unlock()
	if r == nil {
		return errors.New("idempotency key was not begun")
	}
	change(&r.requestRecord)
	err := s.writeRequest(ctx, hash, r)
	if errors.Is(err, errConflict) {
		return fmt.Errorf("record a request: %w: this process was thought dead, and another works on it", function.ErrUnavailable)
	}
	return err
}

func requestName(hash string) string { return "request-" + hash }

func (s *Store) readRequest(ctx context.Context, hash string) (*requestObject, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	o, err := s.kube.CoreV1().ConfigMaps(s.o.Namespace).Get(ctx, requestName(hash), metav1.GetOptions{})
	if apierrors.IsNotFound(err) && kindOf(err) != "namespaces" {
		return nil, nil
	}
	if err != nil {
		return nil, storeError("look up an Idempotency-Key", err)
	}
	return parseRequest(o)
}

func parseRequest(o *corev1.ConfigMap) (*requestObject, error) {
	r := &requestObject{object: o}
	if err := json.Unmarshal([]byte(o.Data[requestData]), &r.requestRecord); err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", o.Namespace, o.Name, err)
	}
	return r, nil
}

// writeRequest creates the object or replaces the one that was read.
func (s *Store) writeRequest(ctx context.Context, hash string, r *requestObject) error {
	data, err := json.Marshal(r.requestRecord)
	if err != nil {
		return fmt.Errorf("encode a request: %w", err)
	}
	ctx, cancel := call(ctx)
	defer cancel()
	configMaps := s.kube.CoreV1().ConfigMaps(s.o.Namespace)
	var made *corev1.ConfigMap
	if r.object == nil {
		made, err = configMaps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: requestName(hash), Labels: map[string]string{labelRequest: "true"}},
			Data:       map[string]string{requestData: string(data)},
		}, metav1.CreateOptions{FieldManager: fieldManager})
	} else {
		o := r.object.DeepCopy()
		o.Data = map[string]string{requestData: string(data)}
		made, err = configMaps.Update(ctx, o, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	switch {
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), apierrors.IsNotFound(err) && r.object != nil:
		return errConflict
	case err != nil:
		return storeError("record a request", err)
	}
	r.object = made
	return nil
}

func (s *Store) leaseName(instance string) string { return "hearth-api-" + instance }

// renew makes or renews this process's Lease.
func (s *Store) renew(ctx context.Context) error {
	ctx, cancel := call(ctx)
	defer cancel()
	leases := s.kube.CoordinationV1().Leases(s.o.Namespace)
	seconds := int32(max(1, s.o.LeaseDuration/time.Second))
	now := metav1.NewMicroTime(time.Now())
	l, err := leases.Get(ctx, s.leaseName(s.o.Instance), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: s.leaseName(s.o.Instance), Labels: map[string]string{labelRequest: "holder"}},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: &s.holder, LeaseDurationSeconds: &seconds, AcquireTime: &now, RenewTime: &now},
		}, metav1.CreateOptions{FieldManager: fieldManager})
	} else if err == nil {
		l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &s.holder, &seconds, &now
		_, err = leases.Update(ctx, l, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	return storeError("renew the lease of "+s.o.Instance, err)
}

// keepLease renews the Lease until ctx ends.
func (s *Store) keepLease(ctx context.Context) {
	t := time.NewTicker(s.o.LeaseDuration / 3)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := s.renew(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("the store's lease was not renewed; requests in progress may be taken over", "err", err)
			}
		case <-ctx.Done():
			return
		}
	}
}
