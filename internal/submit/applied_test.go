package submit

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

// inspecting is a publisher that knows sizes.
type inspecting struct {
	*fixture
	size int64
	err  error
}

func (i inspecting) Inspect(context.Context, string, v1alpha1.Artifact, bool, int64) (int64, error) {
	return i.size, i.err
}

func TestAnAppliedFunctionIsCountedAsASubmittedOneIs(t *testing.T) {
	f := newFixture(t, quota(Quota{Functions: 2, Bytes: 5000}))
	f.runNode()
	f.put("a", 1).want(201)
	ctx := context.Background()
	admit := func(name string, bytes int64) (func(*function.Function), error) {
		return f.server.Admit(ctx, v1alpha1.DefaultTenant, name, bytes, true)
	}
	refused := func(what string, err error, says string) {
		t.Helper()
		var r *Refused
		if !errors.As(err, &r) || r.Code != "quota-exceeded" || !strings.Contains(r.Detail, says) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := admit("b", 5000); err == nil {
		t.Fatal("more bytes than there is room for")
	} else {
		refused("bytes", err, "may have 5000")
	}
	done, err := admit("b", 100)
	if err != nil {
		t.Fatal(err)
	}
	// Its place is kept until it is recorded, and given back if it is not.
	f.put("c", 1).want(403).problem("quota-exceeded")
	done(nil)
	f.put("c", 1).want(201)
	f.do("DELETE", "/v1/functions/c", nil).want(204)
	if done, err = admit("b", 100); err != nil {
		t.Fatal(err)
	}
	done(&function.Function{Name: "b", Tenant: v1alpha1.DefaultTenant, Wanted: 1, Revision: function.Revision{Number: 1, SizeBytes: 100}})
	f.put("c", 1).want(403).problem("quota-exceeded")
	_, err = admit("c", 1)
	refused("a third", err, "has 2 functions and may have 2")
	if done, err = admit("a", 100); err != nil {
		t.Errorf("one that is there: %v", err)
	} else {
		done(nil)
	}
	// Who holds the function's lock does not wait for the tenant's.
	free, err := f.server.quotas.hold(ctx, v1alpha1.DefaultTenant)
	if err != nil {
		t.Fatal(err)
	}
	if done, err = f.server.Admit(ctx, v1alpha1.DefaultTenant, "b", 200, false); err != nil {
		t.Error(err)
	} else {
		done(nil)
	}
	free(nil)
	// It never was in this store: whoever knows says so.
	f.server.Gone(v1alpha1.DefaultTenant, "b")
	f.put("c", 1).want(201)
}

func TestAnImageThatIsAppliedIsLookedAt(t *testing.T) {
	a := v1alpha1.Artifact{Registry: "registry.test", Repository: "team/hello", Digest: "sha256:00"}
	another := &PublishError{Code: "registry-unauthorized", Detail: "It is another's.", Err: ErrImageOfAnother}
	for what, tc := range map[string]struct {
		i         inspecting
		spin      bool
		code      string
		retryable bool
	}{
		"a good one":               {i: inspecting{size: 100}},
		"a large one":              {i: inspecting{size: v1alpha1.MaxModuleBytes + 1}, code: "module-too-large"},
		"a large spin application": {i: inspecting{size: v1alpha1.MaxModuleBytes + 1}, spin: true},
		"another's":                {i: inspecting{err: another}, code: "registry-unauthorized"},
		"a registry that is away":  {i: inspecting{err: &PublishError{Code: "registry-unavailable", Detail: "away", Retryable: true}}, code: "registry-unavailable", retryable: true},
	} {
		t.Run(what, func(t *testing.T) {
			f := newFixture(t, func(o *Options) { tc.i.fixture = f0(o); o.Publisher = tc.i })
			size, err := f.server.Inspect(context.Background(), "team", a, tc.spin, 0)
			var r *Refused
			if tc.code == "" && (err != nil || size != tc.i.size) || tc.code != "" && (!errors.As(err, &r) || r.Code != tc.code || r.Retryable != tc.retryable) {
				t.Errorf("%d, %v", size, err)
			}
			if errors.Is(err, ErrImageOfAnother) != (tc.i.err == another) {
				t.Errorf("whose it is: %v", err)
			}
		})
	}
	f := newFixture(t)
	if size, err := f.server.Inspect(context.Background(), "team", a, false, 5); err != nil || size != 5 {
		t.Errorf("a publisher that cannot look: %d, %v", size, err)
	}
	ended, end := context.WithCancel(context.Background())
	end()
	if _, err := (newFixture(t, func(o *Options) { o.Publisher = inspecting{f0(o), 0, context.Canceled} })).server.Inspect(ended, "team", a, false, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("after its end: %v", err)
	}
}

// f0 is the fixture that the options are of.
func f0(o *Options) *fixture {
	f, _ := o.Publisher.(*fixture)
	return f
}
