package submit

import (
	"context"
	"errors"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

// A function can come to be by other means than this API: in a cluster, as an
// object that somebody applies. What follows holds it to the same rules.

// Refused is why a function that was applied is not taken on.
type Refused struct {
	// Code is one of the problem table's, Detail what to do about it.
	Code, Detail string
	// Retryable says that the same may be taken on later without a change.
	Retryable bool
	// Err is the cause; errors.Is it ErrImageOfAnother for what another tenant
	// has published.
	Err error
}

func (r *Refused) Error() string { return r.Detail }

// Unwrap returns the cause.
func (r *Refused) Unwrap() error { return r.Err }

// refused puts an error in the words that the API would answer with. What ends
// with the context is left as it is.
func refused(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || errors.Is(err, errClientGone) {
		return err
	}
	p := toProblem(err)
	return &Refused{Code: p.kind.Code, Detail: p.detail, Retryable: p.kind.Retryable, Err: err}
}

// Inspect says how many bytes the module of an image has, if the tenant may run
// it. size is what is known of it, 0 for nothing. It asks the registry; ctx
// bounds that. Other errors than a *Refused are the context's.
func (s *Server) Inspect(ctx context.Context, tenant string, a v1alpha1.Artifact, spin bool, size int64) (int64, error) {
	i, ok := s.o.Publisher.(Inspector)
	if !ok {
		return size, nil
	}
	size, err := i.Inspect(ctx, tenant, a, spin, size)
	if err != nil {
		return 0, refused(ctx, err)
	}
	if size > s.o.Limits.ModuleBytes && !spin {
		return 0, refused(ctx, newProblem("module-too-large", "At most %d bytes are accepted.", s.o.Limits.ModuleBytes))
	}
	return size, nil
}

// Admit says whether the tenant has room for a function with a module of that
// many bytes, and keeps the room until done is called, with the function as it
// was recorded or nil. It waits for submits of the tenant that are being recorded,
// unless wait is false: a caller that holds what one of them may wait for counts
// without them. Other errors than a *Refused are the context's.
func (s *Server) Admit(ctx context.Context, tenant, name string, bytes int64, wait bool) (done func(*function.Function), err error) {
	if s.quotas == nil {
		return func(*function.Function) {}, nil
	}
	if wait {
		free, err := s.quotas.hold(ctx, tenant)
		if err != nil {
			return nil, err
		}
		defer free(nil)
	}
	if err := s.quotas.admits(ctx, tenant, name, bytes); err != nil {
		return nil, refused(ctx, err)
	}
	return s.quotas.reserve(tenant, name, bytes), nil
}

// Gone is told that a function is deleted, by whomever.
func (s *Server) Gone(tenant, name string) { s.quotas.forget(tenant, name) }
