package submit

import (
	"cmp"
	"context"
	"math"
	"strconv"
	"strings"
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
	// Some scripts in a loop at once; a hundredth of what a replica answers.
	DefaultQuotaRequests     = 200
	DefaultQuotaRequestBurst = 1000
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
	// Requests is how many requests of all kinds a second are answered, of which
	// RequestBurst at once after a pause. One without a tenant, such as a list of
	// all, counts for its caller. What its caller may not do costs nobody anything.
	Requests     float64
	RequestBurst int
}

func (q Quota) or(d Quota) Quota {
	return Quota{
		Functions: cmp.Or(q.Functions, d.Functions), Bytes: cmp.Or(q.Bytes, d.Bytes),
		Rate: cmp.Or(q.Rate, d.Rate), Burst: cmp.Or(q.Burst, d.Burst),
		Requests: cmp.Or(q.Requests, d.Requests), RequestBurst: cmp.Or(q.RequestBurst, d.RequestBurst),
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

	changes, requests bucket
	recent            map[string]recentChange
}

// bucket is a rate that is left; the zero value is a full one.
type bucket struct {
	tokens float64
	at     time.Time // of tokens; zero: never used
}

// take takes one, or says in how many seconds there will be one. A negative
// burst is none.
func (b *bucket) take(now time.Time, rate float64, burst int) (wait float64, ok bool) {
	most := math.Max(1, float64(burst))
	if burst < 0 {
		most = math.Inf(1)
	}
	if b.at.IsZero() {
		b.tokens = most
	} else if now.After(b.at) {
		b.tokens += now.Sub(b.at).Seconds() * rate
	}
	b.tokens, b.at = math.Min(b.tokens, most), now
	if b.tokens < 1 {
		return math.Ceil((1 - b.tokens) / rate), false
	}
	b.tokens--
	return 0, true
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
	q.o.Default = q.o.Default.or(Quota{DefaultQuotaFunctions, DefaultQuotaBytes, DefaultQuotaRate, DefaultQuotaBurst, DefaultQuotaRequests, DefaultQuotaRequestBurst})
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
			// After a minute without a request every sensible bucket is full.
			if s.users == 0 && q.now().Sub(s.changes.at) > time.Minute && q.now().Sub(s.requests.at) > time.Minute {
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
	q.mu.Lock()
	defer q.mu.Unlock()
	wait, ok := q.share(tenant).changes.take(q.now(), quota.Rate, quota.Burst)
	if ok {
		return nil
	}
	p := newProblem("too-many-changes", "The tenant %q may make %s changes a second, %d at once. Send the same request again in %.0f s.", tenant,
		strconv.FormatFloat(quota.Rate, 'g', 3, 64), max(1, quota.Burst), wait)
	p.retryAfter = int(wait)
	return p
}

type countedKey struct{}

// counting lets count count a request once.
func (s *Server) counting(ctx context.Context) context.Context {
	if s.quotas == nil {
		return ctx
	}
	return context.WithValue(ctx, countedKey{}, new(bool))
}

// count takes the request from the tenant's rate of all requests; an empty one
// is its caller's. Only the first call for a request counts, which comes once it
// is known that the caller may make it: else anybody could use up what is not
// theirs.
func (s *Server) count(ctx context.Context, tenant string) error {
	counted, _ := ctx.Value(countedKey{}).(*bool)
	if s.quotas == nil || counted == nil || *counted {
		return nil
	}
	*counted = true
	who, key := "tenant", tenant
	if tenant == "" {
		who, key = "user", "user "+callerOf(ctx).User // no tenant has a space in its name
	}
	return s.quotas.request(ctx, who, tenant, key)
}

// request takes one request from the rate under key.
func (q *quotas) request(ctx context.Context, who, tenant, key string) error {
	quota, err := q.of(ctx, tenant)
	if err != nil || quota.Requests < 0 {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	wait, ok := q.share(key).requests.take(q.now(), quota.Requests, quota.RequestBurst)
	if ok {
		return nil
	}
	p := newProblem("too-many-api-requests", "The %s %q may make %s requests a second, %d at once. Send the same request again in %.0f s.", who,
		strings.TrimPrefix(key, "user "), strconv.FormatFloat(quota.Requests, 'g', 4, 64), max(1, quota.RequestBurst), wait)
	p.retryAfter = int(wait)
	return p
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

// reserve counts the function as if it were recorded already, until the returned
// function is called with what was, or nil. After recentFor it is counted as the
// store says, whatever became of it.
func (q *quotas) reserve(tenant, name string, bytes int64) func(*function.Function) {
	const reserved = math.MaxInt // above any revision
	set := func(c recentChange) {
		c.at = q.now()
		q.share(tenant).recent[name] = c
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	set(recentChange{revision: reserved, bytes: bytes})
	return func(f *function.Function) {
		q.mu.Lock()
		defer q.mu.Unlock()
		switch {
		case f != nil:
			set(recentChange{revision: f.Wanted, bytes: f.Revision.SizeBytes})
		case q.share(tenant).recent[name].revision == reserved: // else somebody submitted it
			delete(q.share(tenant).recent, name)
		}
	}
}

// forget makes the store's word on a function count: it is gone there.
func (q *quotas) forget(tenant, name string) {
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if s := q.shares[tenant]; s != nil {
		delete(s.recent, name)
	}
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
