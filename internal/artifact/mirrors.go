package artifact

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// minProgress is how many bytes further an attempt must have got to be
	// followed at once by another one at the same mirror, which does not count.
	minProgress = 64 << 10
	// maxAttemptsKept bounds Result.Attempts.
	maxAttemptsKept = 32
)

// progress is what a try achieved.
type progress struct {
	// bytes is how many were received.
	bytes int64
	// advance is how much further than ever before it got, in bytes. A mirror
	// that always breaks off at the same place advances once.
	advance int64
}

// mirrors tries the mirrors of something until one try succeeds. Each round
// asks those that still make sense in their order; one that fails for good is
// not asked again, one that got further is asked again at once, and between
// rounds there is a wait. It returns nil, an error of try that is not a
// *mirrorError, an error of the context, or a *mirrorsError.
func (f *Fetcher) mirrors(ctx context.Context, urls []string, try func(context.Context, location) (progress, error), failed func(Attempt)) error {
	type mirror struct {
		at     location
		last   *mirrorError
		gone   bool
		resume time.Time
	}
	var all []*mirror
	for _, u := range urls {
		l, err := parseLocation(u)
		if err == nil {
			err = f.permitted(l.url)
		}
		if err != nil {
			return err // was validated before
		}
		all = append(all, &mirror{at: l})
	}
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval, wait.Multiplier = f.o.RetryWait, f.o.MaxRetryWait, 2
	for round := 1; ; round++ {
		for _, m := range all {
			if m.gone || time.Now().Before(m.resume) {
				continue
			}
			for {
				began := time.Now()
				p, err := try(ctx, m.at)
				if err == nil {
					return nil
				}
				var e *mirrorError
				if context.Cause(ctx) != nil || !errors.As(err, &e) {
					if cause := context.Cause(ctx); cause != nil && !isFault(err) {
						err = cause
					}
					return err
				}
				m.last, m.gone, m.resume = e, !e.kind.passing(), time.Now().Add(e.after)
				failed(Attempt{Mirror: m.at.String(), Err: e, Bytes: p.bytes, Duration: time.Since(began)})
				if m.gone || e.after > 0 || p.advance < minProgress {
					break
				}
				wait.Reset()
				round = 1
			}
		}
		pause := wait.NextBackOff()
		var soonest time.Time
		for _, m := range all {
			if !m.gone && (soonest.IsZero() || m.resume.Before(soonest)) {
				soonest = m.resume
			}
		}
		if soonest.IsZero() || round >= f.o.Attempts {
			e := new(mirrorsError)
			for _, m := range all {
				e.kinds = append(e.kinds, m.last.kind)
				e.mirrors = append(e.mirrors, m.at.String())
				e.errs = append(e.errs, m.last)
			}
			return e
		}
		timer := time.NewTimer(max(pause, time.Until(soonest)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
}

// mirrorsError is what was wrong with each mirror in the end.
type mirrorsError struct {
	mirrors []string
	kinds   []kind
	errs    []error
}

func (e *mirrorsError) Error() string {
	parts := make([]string, len(e.mirrors))
	for i := range parts {
		parts[i] = e.mirrors[i] + ": " + e.errs[i].Error()
	}
	return strings.Join(parts, "; ")
}

func (e *mirrorsError) Unwrap() []error { return e.errs }

// classify turns the failure of all mirrors of an artifact into one that says
// what to do. Wrong bytes are the news when there are any.
func (e *mirrorsError) classify(a *Artifact) error {
	what := fmt.Sprintf("%s could not be fetched from any of its %d mirrors", a, len(a.URLs))
	if len(a.URLs) == 1 {
		what = a.String() + " could not be fetched"
	}
	switch {
	case slices.Contains(e.kinds, kindWrong):
		return fault.New(CodeDigestMismatch, e, "see who serves those bytes; correct the pinned digest only if the file was meant to change", "%s", what)
	case slices.ContainsFunc(e.kinds, kind.passing), slices.Contains(e.kinds, kindRefused):
		code := fault.Passing(CodeUnreachable, e, "see whether this machine's routes, security groups, DNS, proxy and clock let it reach them, then run again", "%s", what)
		code.Transient = slices.ContainsFunc(e.kinds, kind.passing)
		return code
	}
	return fault.New(CodeNotFound, e, "correct its URLs or publish the file there and let this machine read it", "%s", what)
}

func isFault(err error) bool {
	var f *fault.Error
	return errors.As(err, &f)
}
