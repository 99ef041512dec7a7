package submit

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

// Access says who makes a request and what they may do. Errors are those of
// package access: an *UnauthenticatedError, a *DeniedError, or one that matches
// ErrUnavailable; any other is answered as ours. Both methods are called for
// every request, some several times: implementations remember answers.
type Access interface {
	// Authenticate finds the caller by the request's headers. It must not
	// read the body.
	Authenticate(ctx context.Context, r *http.Request) (access.Caller, error)
	// Authorize returns nil when the caller may act.
	Authorize(ctx context.Context, c access.Caller, a access.Action) error
}

const (
	// accessEvery is how often a followed log asks again whether it may go on.
	accessEvery = 10 * time.Second
	// maxAttempts is how often a change is tried whose function came or went
	// between the decision and the record.
	maxAttempts = 3
)

// errOtherVerb: the function came or went since it was decided whether the
// caller may create or update it.
var errOtherVerb = errors.New("the function came or went while the request was worked on")

// errOtherEnvironment: the function's environment, which its artifact has, was
// changed since that was published.
var errOtherEnvironment = errors.New("the function's environment was changed while the request was worked on")

type callerKey struct{}

func callerOf(ctx context.Context) access.Caller {
	c, _ := ctx.Value(callerKey{}).(access.Caller)
	return c
}

// authenticate puts the caller into the request's context.
func (s *Server) authenticate(r *http.Request) (*http.Request, error) {
	if s.o.Access == nil {
		return r, nil
	}
	c, err := s.o.Access.Authenticate(r.Context(), r)
	if err != nil {
		return nil, err
	}
	auditOf(r.Context()).setCaller(c)
	return r.WithContext(context.WithValue(r.Context(), callerKey{}, c)), nil
}

// authorize says whether the request's caller may do this; without access
// control everybody may.
func (s *Server) authorize(ctx context.Context, verb access.Verb, tenant, name, subresource string) error {
	if s.o.Access == nil {
		return nil
	}
	return s.o.Access.Authorize(ctx, callerOf(ctx), access.Action{Verb: verb, Tenant: tenant, Function: name, Subresource: subresource})
}

func denied(err error) bool {
	var d *access.DeniedError
	return errors.As(err, &d)
}

// readable returns a function that the caller may read. One that they may not
// is not there, for all they can tell.
func (s *Server) readable(ctx context.Context, name string) (function.Function, error) {
	f, err := s.o.Store.Get(ctx, name)
	if err != nil {
		return f, err
	}
	if err := s.authorize(ctx, access.VerbGet, f.Tenant, name, ""); err != nil {
		if denied(err) {
			err = function.ErrNotFound
		}
		return function.Function{}, err
	}
	return f, s.count(ctx, f.Tenant)
}

// stillReadable is for what was read in two steps: between them the name may
// have become another tenant's.
func (s *Server) stillReadable(ctx context.Context, was function.Function) error {
	if s.o.Access == nil {
		return nil
	}
	f, err := s.o.Store.Get(ctx, was.Name)
	if err == nil && f.Tenant != was.Tenant {
		err = function.ErrNotFound
	}
	return err
}

// admitEarly refuses a change of a function that must exist before its body
// is read, and takes it from the tenant's rate. What it lets pass is decided
// by admit; in particular, under an Idempotency-Key a function that is not
// there may be one that this very request deleted.
func (s *Server) admitEarly(ctx context.Context, name string, verb access.Verb, key string) error {
	if s.o.Access == nil && s.quotas == nil {
		return nil
	}
	f, err := s.readable(ctx, name)
	if errors.Is(err, function.ErrNotFound) && (key != "" || s.o.Access == nil) {
		return nil
	}
	if err != nil {
		return err
	}
	auditOf(ctx).setTenant(f.Tenant)
	if err := s.authorize(ctx, verb, f.Tenant, name, ""); err != nil {
		return err
	}
	return s.quotas.spend(ctx, f.Tenant)
}

// admit decides whether a function that must exist may be changed, and binds
// the change to the tenant that this was decided for.
func (s *Server) admit(ctx context.Context, name string, verb access.Verb, c function.Change) (function.Change, error) {
	if s.o.Access == nil {
		return c, nil
	}
	f, err := s.readable(ctx, name)
	if err != nil {
		return c, err
	}
	auditOf(ctx).setTenant(f.Tenant)
	c.Tenant = f.Tenant
	return c, s.authorize(ctx, verb, f.Tenant, name, "")
}

// hidden turns what the store says to a change that admit bound, of a
// function that has since become another tenant's, into not found.
func (s *Server) hidden(err error) error {
	if s.o.Access != nil && errors.Is(err, function.ErrTaken) {
		return function.ErrNotFound
	}
	return err
}

// admitPut decides whether a function may be created or updated, as it is now
// (nil: not there), and binds the change to the tenant that this was decided
// for. either lets pass who may only do the other of the two: a request that
// is sent again under its Idempotency-Key finds what it created.
func (s *Server) admitPut(ctx context.Context, name string, c function.Change, f *function.Function, either bool) (function.Change, access.Verb, error) {
	if s.o.Access == nil {
		return c, "", nil
	}
	named := c.Tenant != ""
	verb, other := access.VerbCreate, access.VerbUpdate
	if f != nil && (!named || c.Tenant == f.Tenant) {
		verb, other = other, verb
		c.Tenant = f.Tenant
	}
	c.Tenant = cmp.Or(c.Tenant, v1alpha1.DefaultTenant)
	err := s.authorize(ctx, verb, c.Tenant, name, "")
	if denied(err) && either && s.authorize(ctx, other, c.Tenant, name, "") == nil {
		err = nil
	}
	if denied(err) && verb == access.VerbUpdate {
		// Who may not read it is told what they would be told if there were no
		// such function, or, without naming a tenant, that the name is gone.
		if _, rerr := s.readable(ctx, name); errors.Is(rerr, function.ErrNotFound) {
			if !named {
				return c, verb, function.ErrTaken
			}
			if cerr := s.authorize(ctx, other, c.Tenant, name, ""); cerr != nil {
				return c, verb, cerr
			}
		} else if rerr != nil {
			return c, verb, rerr
		}
	}
	if err != nil {
		return c, verb, err
	}
	auditOf(ctx).setTenant(c.Tenant)
	return c, verb, function.Change{Tenant: c.Tenant}.Admits(name, f)
}

// putVerb is what a PUT does to a function as it is (nil: not there).
func putVerb(f *function.Function) access.Verb {
	if f == nil {
		return access.VerbCreate
	}
	return access.VerbUpdate
}

// scoped is an Idempotency-Key among those of its caller: with the key of
// somebody else's request, nobody is given the answer to it.
func (s *Server) scoped(ctx context.Context, key string) string {
	if s.o.Access == nil || key == "" {
		return key
	}
	c := callerOf(ctx)
	return hash([]byte(hash([]byte(c.User)) + hash([]byte(c.UID)) + key))
}

// guardLog ends a followed log, by calling end, once the caller may not read
// it any more or the function is gone or another's, and returns when ctx ends.
func (s *Server) guardLog(ctx context.Context, r *http.Request, f function.Function, end func()) {
	defer end()
	checked := time.Now()
	for ctx.Err() == nil {
		timed, cancel := context.WithDeadline(ctx, checked.Add(s.accessEvery))
		next, err := s.o.Store.Watch(timed, f.Name, f.ETag)
		cancel()
		switch {
		case err == nil:
			if next.Tenant != f.Tenant || !next.CreatedAt.Equal(f.CreatedAt) {
				return
			}
			f.ETag = next.ETag
		case ctx.Err() != nil, errors.Is(err, function.ErrNotFound), errors.Is(err, function.ErrClosed):
			return
		}
		if time.Since(checked) < s.accessEvery {
			if err != nil && !sleep(ctx, time.Second) { // the store is in trouble
				return
			}
			continue
		}
		checked = time.Now()
		c, err := s.o.Access.Authenticate(ctx, r)
		if err == nil {
			err = s.o.Access.Authorize(ctx, c, access.Action{Verb: access.VerbGet, Tenant: f.Tenant, Function: f.Name, Subresource: access.SubresourceLog})
		}
		// Trouble is no reason to end what was allowed a moment ago.
		if err != nil && !errors.Is(err, access.ErrUnavailable) {
			return
		}
	}
}

// sleep returns false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
