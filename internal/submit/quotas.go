package submit

import (
	"cmp"
	"context"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/function"
)

// Defaults of Quota, generous for a team and far from what hurts a cluster.
const (
	DefaultQuotaFunctions = 200
	DefaultQuotaBytes     = 2 << 30
	DefaultQuotaRate      = 5
	DefaultQuotaBurst     = 30
)

// Quota bounds what one tenant may take. A zero field means the default, a
// negative one no bound.
type Quota struct {
	// Functions is how many there may be.
	Functions int
	// Bytes bounds the sum of the sizes of all functions' wanted modules.
	Bytes int64
	// Rate is how many changes a second are taken on, Burst how many at once
	// after a pause. Changes that are refused later count, too.
	Rate  float64
	Burst int
}

func (q Quota) or(d Quota) Quota {
	return Quota{
		Functions: cmp.Or(q.Functions, d.Functions), Bytes: cmp.Or(q.Bytes, d.Bytes),
		Rate: cmp.Or(q.Rate, d.Rate), Burst: cmp.Or(q.Burst, d.Burst),
	}
}

// Quotas bound every tenant.
//
// A change that does not make a tenant's share grow is never refused for
// Functions or Bytes, so that a tenant above a bound that was lowered can
// still mend and delete. One server lets nobody over a bound. Several that
// serve one store do not wait for each other: together they can go over it by
// what the others take in while a change is on its way to them, which is well
// under a second, and they each grant Rate and Burst.
type Quotas struct {
	// Default is for tenants that For says nothing of.
	Default Quota
	// For returns a tenant's own quota; nil: all have the default. It is
	// called several times for each change: it must be quick.
	For func(ctx context.Context, tenant string) (Quota, error)
}

const (
	// recentFor is how long the server remembers its own changes, in case the
	// store's list has not caught up with them.
	recentFor = 10 * time.Second
	// maxShares is how many tenants' rates are remembered before those that
	// have not been used are forgotten.
	maxShares = 1024
)

// quotas holds tenants to their Quota. Methods that only refuse do nothing on
// nil.
type quotas struct {
	o     Quotas
	store function.Reader
	now   func() time.Time

	mu     sync.Mutex // guards what follows, never held while the store is asked
	shares map[string]*share
}

// share is what the server knows of one tenant.
type share struct {
	// lock is held from counting to recording, so that two changes cannot
	// both take the last place.
	lock  chan struct{}
	users int // hold or wait for lock

	tokens float64
	at     time.Time // of tokens; zero: never used
	recent map[string]recentChange
}

// recentChange is what became of a function.
type recentChange struct {
	revision int
	bytes    int64
	deleted  bool
	at       time.Time
}

func newQuotas(o *Quotas, store function.Reader, now func() time.Time) *quotas {
	if o == nil {
		return nil
	}
	q := &quotas{o: *o, store: store, now: now, shares: map[string]*share{}}
	q.o.Default = q.o.Default.or(Quota{DefaultQuotaFunctions, DefaultQuotaBytes, DefaultQuotaRate, DefaultQuotaBurst})
	return q
}

func (q *quotas) of(ctx context.Context, tenant string) (Quota, error) {
	if q.o.For == nil {
		return q.o.Default, nil
	}
	own, err := q.o.For(ctx, tenant)
	return own.or(q.o.Default), err
}

// share needs q.mu.
func (q *quotas) share(tenant string) *share {
	if s := q.shares[tenant]; s != nil {
		return s
	}
	if len(q.shares) >= maxShares {
		for name, s := range q.shares {
			// After a minute without a change every sensible bucket is full.
			if s.users == 0 && q.now().Sub(s.at) > time.Minute {
				delete(q.shares, name)
			}
		}
	}
	s := &share{lock: make(chan struct{}, 1), recent: map[string]recentChange{}}
	q.shares[tenant] = s
	return s
}

// spend takes one change from the tenant's rate.
func (q *quotas) spend(ctx context.Context, tenant string) error {
	if q == nil {
		return nil
	}
	quota, err := q.of(ctx, tenant)
	if err != nil || quota.Rate < 0 {
		return err
	}
	burst := math.Max(1, float64(quota.Burst))
	if quota.Burst < 0 {
		burst = math.Inf(1)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	s, now := q.share(tenant), q.now()
	if s.at.IsZero() {
		s.tokens = burst
	} else if now.After(s.at) {
		s.tokens += now.Sub(s.at).Seconds() * quota.Rate
	}
	s.tokens, s.at = math.Min(s.tokens, burst), now
	if s.tokens < 1 {
		wait := math.Ceil((1 - s.tokens) / quota.Rate)
		p := newProblem("too-many-changes", "The tenant %q may make %s changes a second, %s at once. Send the same request again in %.0f s.", tenant,
			strconv.FormatFloat(quota.Rate, 'g', 3, 64), strconv.FormatFloat(burst, 'f', 0, 64), wait)
		p.retryAfter = int(wait)
		return p
	}
	s.tokens--
	return nil
}

// admits says whether the tenant's function may have a wanted module of this
// size (negative: not known yet, only the number of functions is looked at).
func (q *quotas) admits(ctx context.Context, tenant, name string, bytes int64) error {
	if q == nil {
		return nil
	}
	quota, err := q.of(ctx, tenant)
	if err != nil {
		return err
	}
	functions, total, own, err := q.count(ctx, tenant, name)
	if err != nil {
		return err
	}
	if own < 0 && quota.Functions >= 0 && functions >= quota.Functions {
		return newProblem("quota-exceeded", "The tenant %q has %d functions and may have %d. Delete one that is not needed, or ask for a higher quota.", tenant, functions, quota.Functions)
	}
	if quota.Bytes >= 0 && bytes > max(own, 0) && total+bytes > quota.Bytes {
		return newProblem("quota-exceeded", "The modules of the tenant %q would have %d bytes together and may have %d. Make them smaller, delete a function that is not needed, or ask for a higher quota.", tenant, total+bytes, quota.Bytes)
	}
	return nil
}

// count returns how many other functions the tenant has, the bytes of their
// wanted modules, and those of the function's own (-1: there is none).
func (q *quotas) count(ctx context.Context, tenant, name string) (functions int, total, own int64, err error) {
	page, err := q.store.List(ctx, function.ListOptions{Tenant: tenant})
	if err != nil {
		return 0, 0, 0, err
	}
	bytes := make(map[string]int64, len(page.Items)+1)
	revisions := make(map[string]int, len(page.Items))
	for _, f := range page.Items {
		bytes[f.Name], revisions[f.Name] = f.Revision.SizeBytes, f.Wanted
	}
	q.mu.Lock()
	s, now := q.share(tenant), q.now()
	for n, r := range s.recent {
		_, listed := revisions[n]
		switch {
		case now.Sub(r.at) > recentFor, !r.deleted && listed && revisions[n] >= r.revision, r.deleted && revisions[n] > r.revision:
			delete(s.recent, n) // the store has caught up, or somebody else was there since
		case r.deleted:
			delete(bytes, n)
		default:
			bytes[n] = r.bytes
		}
	}
	q.mu.Unlock()
	own = -1
	for n, b := range bytes {
		if n == name {
			own = b
			continue
		}
		functions++
		total += b
	}
	return functions, total, own, nil
}

// hold keeps other changes of the tenant from being counted until the
// returned function is called, with what was recorded or nil.
func (q *quotas) hold(ctx context.Context, tenant string) (func(*function.Function), error) {
	if q == nil {
		return func(*function.Function) {}, nil
	}
	q.mu.Lock()
	s := q.share(tenant)
	s.users++
	q.mu.Unlock()
	select {
	case s.lock <- struct{}{}:
	case <-ctx.Done():
		q.mu.Lock()
		s.users--
		q.mu.Unlock()
		return nil, errClientGone
	}
	return func(f *function.Function) {
		q.mu.Lock()
		s.users--
		if f != nil {
			s.recent[f.Name] = recentChange{revision: f.Wanted, bytes: f.Revision.SizeBytes, at: q.now()}
		}
		q.mu.Unlock()
		<-s.lock
	}, nil
}

// deleted remembers that a function, as it was, is gone.
func (q *quotas) deleted(f *function.Function) {
	if q == nil || f == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.share(f.Tenant).recent[f.Name] = recentChange{revision: f.Wanted, deleted: true, at: q.now()}
}
