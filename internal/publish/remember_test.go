package publish

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/hearth-sh/hearth/internal/submit"
)

// checks counts what it is asked and answers with err.
type checks struct {
	mu    sync.Mutex
	n     int
	err   error
	enter chan struct{} // nil: at once
}

func (c *checks) Check(ctx context.Context, path string, memoryMiB int) (submit.CheckReport, error) {
	c.mu.Lock()
	c.n++
	err := c.err
	c.mu.Unlock()
	if c.enter != nil {
		select {
		case <-c.enter:
		case <-ctx.Done():
			return submit.CheckReport{}, ctx.Err()
		}
	}
	digest, derr := digestOf(path)
	if err != nil || derr != nil {
		return submit.CheckReport{}, errors.Join(err, derr)
	}
	return submit.CheckReport{Kind: "core module", Digest: digest, MemoryMinPages: uint32(memoryMiB)}, nil
}

func TestOutcomeOfACheckIsRememberedWhereItIsTheModules(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		kept bool
	}{
		{"passed", nil, true},
		{"refused", &submit.CheckError{Code: "unsupported-import", Detail: "It imports a."}, true},
		{"refused for now", &submit.CheckError{Code: "invalid-module", Retryable: true}, false},
		{"too slow on a busy machine", &submit.CheckError{Code: "compile-timeout"}, false},
		{"ours", errors.New("no child"), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			next := &checks{err: test.err}
			o := RememberOptions{File: filepath.Join(t.TempDir(), "checks.json"), Build: "1"}
			r := Remember(next, o)
			module, other := fileOf(t, "module"), fileOf(t, "other")
			check := func(r *Remembered, path string, memory, want int) {
				t.Helper()
				report, err := r.Check(t.Context(), path, memory)
				var refused, wanted *submit.CheckError
				switch {
				case errors.As(test.err, &wanted):
					if !errors.As(err, &refused) || *refused != *wanted {
						t.Errorf("%v", err)
					}
				case !errors.Is(err, test.err), err == nil && (report.Kind != "core module" || report.MemoryMinPages != uint32(memory)):
					t.Errorf("%+v, %v", report, err)
				}
				if next.n != want {
					t.Errorf("%d checks, want %d", next.n, want)
				}
			}
			again := func(n int) int { // checks after one that may be remembered
				if test.kept {
					return n
				}
				return n + 1
			}
			check(r, module, 64, 1)
			check(r, module, 64, again(1))
			next.n = 0
			check(r, module, 32, 1)
			check(r, other, 64, 2)
			check(Remember(next, o), module, 64, again(2))
			next.n = 0
			o.Build = "2"
			check(Remember(next, o), module, 64, 1)
			if err := os.WriteFile(o.File, []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			check(Remember(next, o), module, 64, 2)
		})
	}
}

func TestSameModuleIsCheckedOnceAtATime(t *testing.T) {
	module := fileOf(t, "module")
	synctest.Test(t, func(t *testing.T) {
		next := &checks{enter: make(chan struct{})}
		r := Remember(next, RememberOptions{})
		hasty, leave := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() { _, err := r.Check(hasty, module, 64); first <- err }()
		synctest.Wait()
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if _, err := r.Check(t.Context(), module, 64); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		leave() // another goes on
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		close(next.enter)
		all.Wait()
		if next.n != 2 {
			t.Errorf("%d checks, want one and one that was given up", next.n)
		}
	})
}

func TestRememberedOutcomesAreBounded(t *testing.T) {
	next := &checks{}
	r := Remember(next, RememberOptions{})
	module := fileOf(t, "module")
	for memory := range maxOutcomes + 100 {
		if _, err := r.Check(t.Context(), module, memory); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Check(t.Context(), module, 0); err != nil { // in use: stays
			t.Fatal(err)
		}
	}
	if len(r.outcomes) != maxOutcomes || next.n != maxOutcomes+100 {
		t.Errorf("%d remembered of %d checks", len(r.outcomes), next.n)
	}
}
