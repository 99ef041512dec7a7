package api

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/submit"
)

// judge is an admitter as a test wants it.
type judge struct {
	mu      sync.Mutex
	asked   int
	of      map[string]int // asked, by tenant
	at      map[string]int // by tenant, now
	most    int            // of one tenant at once
	block   chan struct{}
	inspect error
	admit   error
}

func (j *judge) Inspect(ctx context.Context, tenant string, _ v1alpha1.Artifact, _ bool, size int64) (int64, error) {
	if size > 0 {
		return size, j.inspect
	}
	j.mu.Lock()
	j.asked++
	if j.at == nil {
		j.at, j.of = map[string]int{}, map[string]int{}
	}
	j.of[tenant]++
	j.at[tenant]++
	j.most = max(j.most, j.at[tenant])
	block, err := j.block, j.inspect
	j.mu.Unlock()
	defer func() { j.mu.Lock(); j.at[tenant]--; j.mu.Unlock() }()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return 100, err
}

func (j *judge) Admit(context.Context, string, string, int64, bool) (func(*function.Function), error) {
	return func(*function.Function) {}, j.admit
}

func image(n byte) v1alpha1.Artifact {
	return v1alpha1.Artifact{Registry: "registry.test", Repository: "team/hello", Digest: "sha256:" + strings.Repeat(string('a'+n), 64)}
}

func TestAReconcilerDoesNotWaitForARegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &judge{block: make(chan struct{})}
		a := newAdmission(func() admitter { return j })
		defer a.close()
		woken := 0
		ctx := withWake(t.Context(), func() { woken++ })
		for range 2 {
			if _, err := a.Inspect(ctx, "team", image(0), "", 0); !errors.Is(err, errInspecting) {
				t.Errorf("while the registry is asked: %v", err)
			}
		}
		close(j.block)
		synctest.Wait()
		if size, err := a.Inspect(ctx, "team", image(0), "", 0); err != nil || size != 100 || j.asked != 1 || woken != 2 {
			t.Errorf("%d bytes, %v, asked %d times, woken %d times", size, err, j.asked, woken)
		}
		// What was found out is found out for one tenant.
		if _, err := a.Inspect(t.Context(), "other", image(0), "", 0); err != nil || j.asked != 2 {
			t.Errorf("%v, asked %d times", err, j.asked)
		}
	})
}

func TestARegistryThatDoesNotAnswerHoldsNoOtherTenantUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &judge{block: make(chan struct{})}
		a := newAdmission(func() admitter { return j })
		defer a.close()
		for n := range byte(20) {
			if _, err := a.Inspect(withWake(t.Context(), func() {}), "slow", image(n), "", 0); !errors.Is(err, errInspecting) {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if j.most != inspectsEach {
			t.Errorf("%d images of one tenant are looked at at once", j.most)
		}
		began := time.Now()
		// A request that needs to know waits, within its bound.
		_, err := a.Inspect(t.Context(), "other", image(0), "", 0)
		var refused *clusterstore.Refusal
		if !errors.As(err, &refused) || refused.Reason != reasonImageUnavailable || refused.Retry <= 0 || !strings.Contains(refused.Message, "registry.test") {
			t.Errorf("%v", err)
		}
		if took := time.Since(began); took != inspectDeadline {
			t.Errorf("it took %s", took)
		}
		if _, err := a.Inspect(t.Context(), "other", image(0), "", 0); !errors.As(err, &refused) {
			t.Errorf("again at once: %v", err)
		}
		j.mu.Lock()
		if n := j.of["other"]; n != 1 {
			t.Errorf("the registry was asked %d times", n)
		}
		j.mu.Unlock()
		close(j.block)
		time.Sleep(unavailableFor)
		if size, err := a.Inspect(t.Context(), "other", image(0), "", 0); err != nil || size != 100 {
			t.Errorf("when it is back: %d, %v", size, err)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		j.block = make(chan struct{})
		if _, err := a.Inspect(ended, "third", image(0), "", 0); !errors.Is(err, context.Canceled) {
			t.Errorf("a request that ended: %v", err)
		}
	})
}

func TestARefusalSaysWhatToDoAndWhetherItIsForGood(t *testing.T) {
	for what, tc := range map[string]struct {
		inspect, admit error
		reason         string
		retry          bool
		says           string
	}{
		"another's image":         {inspect: &submit.Refused{Code: "registry-unauthorized", Detail: "It is another's.", Err: submit.ErrImageOfAnother}, reason: reasonImageNotYours, says: "another's"},
		"no Wasm":                 {inspect: &submit.Refused{Code: "image-invalid", Detail: "It is a chart."}, reason: reasonImageInvalid, says: "chart"},
		"nothing there":           {inspect: &submit.Refused{Code: "image-not-found", Detail: "There is none."}, reason: reasonImageUnavailable, retry: true, says: "push it"},
		"no credentials":          {inspect: &submit.Refused{Code: "registry-unauthorized", Detail: "No."}, reason: reasonImageUnavailable, retry: true, says: "credentials"},
		"a registry that is away": {inspect: &submit.Refused{Code: "registry-unavailable", Retryable: true}, reason: reasonImageUnavailable, retry: true},
		"no room":                 {admit: &submit.Refused{Code: "quota-exceeded", Detail: "Delete one."}, reason: reasonQuotaExceeded, retry: true, says: "Delete one"},
	} {
		t.Run(what, func(t *testing.T) {
			a := newAdmission(func() admitter { return &judge{inspect: tc.inspect, admit: tc.admit} })
			defer a.close()
			_, err := a.Inspect(t.Context(), "team", image(0), "", 0)
			if tc.inspect == nil && err == nil {
				_, err = a.Admit(t.Context(), "team", "hello", 100, true)
			}
			var r *clusterstore.Refusal
			if !errors.As(err, &r) || r.Reason != tc.reason || r.Retry > 0 != tc.retry || !strings.Contains(r.Message, tc.says) {
				t.Errorf("%+v", err)
			}
		})
	}
	starting := newAdmission(func() admitter { return nil })
	defer starting.close()
	_, err := starting.Inspect(t.Context(), "team", image(0), "", 0)
	_, admitErr := starting.Admit(t.Context(), "team", "hello", 1, true)
	if !errors.Is(err, function.ErrUnavailable) || !errors.Is(admitErr, function.ErrUnavailable) {
		t.Errorf("while the replica starts: %v, %v", err, admitErr)
	}
	if err := starting.close(); err != nil {
		t.Error(err)
	}
}

func TestWhatIsKnownOfImagesIsBounded(t *testing.T) {
	j := &judge{}
	a := newAdmission(func() admitter { return j })
	defer a.close()
	for n := range maxInspected + 10 {
		i := image(0)
		i.Repository = "team/" + strings.Repeat("x", n%100+1) + "/" + strings.Repeat("y", n/100+1)
		if _, err := a.Inspect(t.Context(), "team", i, "", 0); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.inspects) > maxInspected || len(a.inspects) < 10 {
		t.Errorf("%d are remembered", len(a.inspects))
	}
}

func TestThoseThatWaitForRoomAreFewAtATime(t *testing.T) {
	var w waiting
	w.remove("team", "nobody")
	for n := range 3 * quotaWakes {
		if after := w.add("team", strings.Repeat("x", n+1)); after != quotaRetry+time.Duration(n+1)*quotaRetryEach {
			t.Errorf("number %d is looked at again after %s", n, after)
		}
	}
	w.add("other", "x")
	if some := w.some("team"); len(some) != quotaWakes {
		t.Errorf("%d are looked at at once", len(some))
	}
	for n := range 3 * quotaWakes {
		w.remove("team", strings.Repeat("x", n+1))
	}
	if some := w.some("team"); len(some) != 0 || len(w.of) != 1 {
		t.Errorf("%v of %v are left", some, w.of)
	}
}
