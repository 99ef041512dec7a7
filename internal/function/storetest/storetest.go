// Package storetest is the suite that every implementation of function.Store
// passes. It owns no implementation and reaches into none: what it asks for
// is what the API and the nodes rely on.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

// Open opens the store that lives at place, with a clock. Opening the same
// place again, after Close, must find everything again.
type Open func(t *testing.T, place string, now func() time.Time) function.Store

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *fixture)
	}{
		{"a new function gets revision 1 of the default tenant", testNew},
		{"revisions are numbered in order and kept as they were", testRevisions},
		{"the same module and settings are not recorded twice", testUnchanged},
		{"a failed revision can be submitted again", testFailedAgain},
		{"what build refuses changes nothing", testBuildRefuses},
		{"invalid names, tenants and settings are refused", testInvalid},
		{"a name belongs to the tenant that claimed it", testTaken},
		{"preconditions hold or nothing happens", testPreconditions},
		{"a node's report changes the tag but fails no writer", testReportKeepsIfMatch},
		{"a recreated function does not match an old tag", testRecreatedTag},
		{"numbers go on after delete and recreate", testNumbersNotReused},
		{"concurrent patches lose nothing", testConcurrent},
		{"only one of two conditional writers wins", testOneWinner},
		{"list pages through all, by name and tenant", testList},
		{"rollback goes to the newest that was active", testRollback},
		{"rollback to a number, to the wanted one and to none", testRollbackTo},
		{"delete forgets", testDelete},
		{"the history is bounded and keeps what is in use", testHistory},
		{"a report makes a revision ready, pending, failed", testProgress},
		{"a report from before a revision says nothing of it", testStaleReport},
		{"a report with nonsense is passed over", testNonsenseReport},
		{"desired has wanted, active and kept artifacts", testDesired},
		{"a failed revision steps back for the active one", testDesiredFailed},
		{"desired waits for the next generation", testDesiredWaits},
		{"generations grow across a restart", testGenerationRestart},
		{"watch wakes on change and on delete", testWatch},
		{"everything acknowledged is there after a restart", testRestart},
		{"an idempotency key replays its answer", testReplay},
		{"an idempotency key in use is in flight", testInFlight},
		{"a released key starts anew, or resumes after a change", testRelease},
		{"a change survives a crash before its answer", testResumeAfterRestart},
		{"idempotency keys expire", testExpiry},
		{"canceled contexts change nothing", testCanceled},
		{"a closed store says so", testClosed},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			f := &fixture{T: t, open: open, place: t.TempDir(), clock: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
			f.Store = open(t, f.place, f.now)
			t.Cleanup(func() { _ = f.Store.Close() })
			c.test(t, f)
		})
	}
}

type fixture struct {
	*testing.T
	function.Store
	open  Open
	place string

	mu    sync.Mutex
	clock time.Time
}

func (f *fixture) now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.clock = f.clock.Add(time.Millisecond)
	return f.clock
}

func (f *fixture) later(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.clock = f.clock.Add(d)
}

func (f *fixture) restart() {
	f.Helper()
	if err := f.Store.Close(); err != nil {
		f.Fatalf("close: %v", err)
	}
	f.Store = f.open(f.T, f.place, f.now)
}

func ctx() context.Context { return context.Background() }

// revision n of some module.
func revision(n int) function.NewRevision {
	return function.NewRevision{
		ModuleDigest: fmt.Sprintf("sha256:%064x", n),
		SizeBytes:    int64(1000 + n),
		Artifact:     v1alpha1.Artifact{Registry: "registry.test", Repository: "functions/f", Digest: fmt.Sprintf("sha256:%064x", 1_000_000+n)},
		Settings:     function.DefaultSettings(),
		Phases:       []v1alpha1.Phase{{Name: "receive", Milliseconds: 1}},
	}
}

func constant(nr function.NewRevision) func(*function.Function) (function.NewRevision, error) {
	return func(*function.Function) (function.NewRevision, error) { return nr, nil }
}

func (f *fixture) add(name string, n int) function.Result {
	f.Helper()
	r, err := f.AddRevision(ctx(), name, function.Change{}, constant(revision(n)))
	if err != nil {
		f.Fatalf("add revision: %v", err)
	}
	return r
}

func (f *fixture) get(name string) function.Function {
	f.Helper()
	v, err := f.Get(ctx(), name)
	if err != nil {
		f.Fatalf("get %s: %v", name, err)
	}
	return v
}

func (f *fixture) desired() v1alpha1.Desired {
	f.Helper()
	d, err := f.Desired(ctx(), 0)
	if err != nil {
		f.Fatalf("desired: %v", err)
	}
	return d
}

// report says of one function what a node at the current generation would.
func (f *fixture) report(r ...v1alpha1.FunctionReport) {
	f.Helper()
	err := f.SetProgress(ctx(), v1alpha1.NodeReport{Node: "n", Generation: f.desired().Generation, Functions: r})
	if err != nil {
		f.Fatalf("set progress: %v", err)
	}
}

func ready(name string, n int) v1alpha1.FunctionReport {
	return v1alpha1.FunctionReport{
		Name: name, Revision: n, Progress: v1alpha1.ProgressReady, Serving: n,
		Phases: []v1alpha1.Phase{{Name: "pull", Milliseconds: 2}},
	}
}

func failed(name string, n, serving int) v1alpha1.FunctionReport {
	return v1alpha1.FunctionReport{
		Name: name, Revision: n, Progress: v1alpha1.ProgressFailed, Serving: serving,
		Error: &v1alpha1.FunctionError{Code: "invalid-module", Detail: "section 3"},
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

func (f *fixture) wantState(name string, state v1alpha1.FunctionState, active int) {
	f.Helper()
	v := f.get(name)
	if v.Revision.State != state || v.Active != active {
		f.Fatalf("state %s active %d, want %s and %d", v.Revision.State, v.Active, state, active)
	}
}

func testNew(t *testing.T, f *fixture) {
	if _, err := f.Get(ctx(), "hello"); !errors.Is(err, function.ErrNotFound) {
		t.Fatalf("get of nothing: %v", err)
	}
	r := f.add("hello", 1)
	if !r.Created || r.Unchanged || r.Function.Wanted != 1 || r.Function.Tenant != v1alpha1.DefaultTenant {
		t.Fatalf("result %+v", r)
	}
	v := f.get("hello")
	if v.ETag == "" || v.Revision.State != v1alpha1.StatePending || v.Active != 0 || v.CreatedAt.IsZero() {
		t.Fatalf("function %+v", v)
	}
	if diff := cmp.Diff(r.Function, v); diff != "" {
		t.Fatal("result and get differ", diff)
	}
}

func testRevisions(t *testing.T, f *fixture) {
	for i := 1; i <= 3; i++ {
		f.add("hello", i)
	}
	revs, err := f.Revisions(ctx(), "hello")
	if err != nil || len(revs) != 3 {
		t.Fatalf("%d revisions, error %v", len(revs), err)
	}
	for i, r := range revs {
		if want := revision(3 - i); r.Number != 3-i || r.ModuleDigest != want.ModuleDigest || r.Artifact != want.Artifact {
			t.Fatalf("revision %d is %+v", i, r)
		}
	}
	_, err = f.Revisions(ctx(), "other")
	wantErr(t, err, function.ErrNotFound)
}

func testUnchanged(t *testing.T, f *fixture) {
	first := f.add("hello", 1)
	again := f.add("hello", 1)
	if !again.Unchanged || again.Created || again.Function.Wanted != 1 || again.Function.ETag != first.Function.ETag {
		t.Fatalf("again: %+v", again)
	}
	nr := revision(1)
	nr.Settings.Secrets = function.Secrets{"A": "1"}
	r, err := f.AddRevision(ctx(), "hello", function.Change{}, constant(nr))
	if err != nil || r.Unchanged || r.Function.Wanted != 2 {
		t.Fatalf("other secret: %+v, %v", r, err)
	}
}

func testFailedAgain(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.report(failed("hello", 1, 0))
	if r := f.add("hello", 1); r.Unchanged || r.Function.Wanted != 2 {
		t.Fatalf("%+v", r)
	}
}

func testBuildRefuses(t *testing.T, f *fixture) {
	refusal := errors.New("no")
	_, err := f.AddRevision(ctx(), "hello", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
		if c != nil {
			t.Error("build got a function that does not exist")
		}
		return function.NewRevision{}, refusal
	})
	wantErr(t, err, refusal)
	_, err = f.Get(ctx(), "hello")
	wantErr(t, err, function.ErrNotFound)
}

func testInvalid(t *testing.T, f *fixture) {
	var ve *function.ValidationError
	for _, name := range []string{"", "A", "-a", "a-", "a.b", "xn--a", strings.Repeat("a", 64)} {
		if _, err := f.AddRevision(ctx(), name, function.Change{}, constant(revision(1))); !errors.As(err, &ve) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := f.AddRevision(ctx(), "a", function.Change{Tenant: "B"}, constant(revision(1))); !errors.As(err, &ve) {
		t.Errorf("tenant: %v", err)
	}
	nr := revision(1)
	nr.Settings.MemoryMiB = 0
	if _, err := f.AddRevision(ctx(), "a", function.Change{}, constant(nr)); !errors.As(err, &ve) {
		t.Errorf("settings: %v", err)
	}
}

func testTaken(t *testing.T, f *fixture) {
	if _, err := f.AddRevision(ctx(), "hello", function.Change{Tenant: "ann"}, constant(revision(1))); err != nil {
		t.Fatal(err)
	}
	bob := function.Change{Tenant: "bob"}
	_, err := f.AddRevision(ctx(), "hello", bob, constant(revision(2)))
	wantErr(t, err, function.ErrTaken)
	wantErr(t, f.Delete(ctx(), "hello", bob), function.ErrTaken)
	_, err = f.Rollback(ctx(), "hello", 1, bob)
	wantErr(t, err, function.ErrTaken)
	if r := f.add("hello", 2); r.Function.Tenant != "ann" {
		t.Fatalf("tenant became %s", r.Function.Tenant)
	}
}

func testPreconditions(t *testing.T, f *fixture) {
	with := func(p function.Precondition) error {
		_, err := f.AddRevision(ctx(), "hello", function.Change{Precondition: p}, constant(revision(9)))
		return err
	}
	wantErr(t, with(function.Precondition{IfMatch: []string{"*"}}), function.ErrPrecondition)
	wantErr(t, with(function.Precondition{IfMatch: []string{`"x"`}}), function.ErrPrecondition)
	old := f.add("hello", 1).Function.ETag
	now := f.add("hello", 2).Function.ETag
	if old == now {
		t.Fatal("the tag did not change")
	}
	wantErr(t, with(function.Precondition{IfNoneMatchAny: true}), function.ErrPrecondition)
	for _, tag := range []string{old, "W/" + now, `""`, `"`, "", "x" + now} {
		wantErr(t, with(function.Precondition{IfMatch: []string{tag}}), function.ErrPrecondition)
	}
	wantErr(t, f.Delete(ctx(), "hello", function.Change{Precondition: function.Precondition{IfMatch: []string{old}}}), function.ErrPrecondition)
	if f.get("hello").Wanted != 2 {
		t.Fatal("a refused change changed something")
	}
	if err := with(function.Precondition{IfMatch: []string{old, now}}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AddRevision(ctx(), "new", function.Change{Precondition: function.Precondition{IfNoneMatchAny: true}}, constant(revision(1))); err != nil {
		t.Fatal(err)
	}
}

func testReportKeepsIfMatch(t *testing.T, f *fixture) {
	tag := f.add("hello", 1).Function.ETag
	f.report(ready("hello", 1))
	if f.get("hello").ETag == tag {
		t.Fatal("the tag is the same though the state changed")
	}
	_, err := f.AddRevision(ctx(), "hello", function.Change{Precondition: function.Precondition{IfMatch: []string{tag}}}, constant(revision(2)))
	if err != nil {
		t.Fatal(err)
	}
}

func testRecreatedTag(t *testing.T, f *fixture) {
	tag := f.add("hello", 1).Function.ETag
	if err := f.Delete(ctx(), "hello", function.Change{}); err != nil {
		t.Fatal(err)
	}
	f.add("hello", 1)
	wantErr(t, f.Delete(ctx(), "hello", function.Change{Precondition: function.Precondition{IfMatch: []string{tag}}}), function.ErrPrecondition)
}

func testNumbersNotReused(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.add("hello", 2)
	if err := f.Delete(ctx(), "hello", function.Change{}); err != nil {
		t.Fatal(err)
	}
	f.restart()
	r := f.add("hello", 3)
	if !r.Created || r.Function.Wanted != 3 {
		t.Fatalf("%+v", r)
	}
	revs, err := f.Revisions(ctx(), "hello")
	if err != nil || len(revs) != 1 {
		t.Fatalf("revisions %v %v", revs, err)
	}
}

func testConcurrent(t *testing.T, f *fixture) {
	f.add("hello", 1)
	const writers = 8
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			name := fmt.Sprintf("V%d", i)
			_, err := f.AddRevision(ctx(), "hello", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
				nr := revision(1)
				nr.Settings = c.Revision.Settings
				nr.Settings.Env = map[string]string{name: "1"}
				for k, v := range c.Revision.Settings.Env {
					nr.Settings.Env[k] = v
				}
				return nr, nil
			})
			if err != nil {
				t.Error(err)
			}
			_, _ = f.List(ctx(), function.ListOptions{})
			_ = f.SetProgress(ctx(), v1alpha1.NodeReport{Node: "n", Generation: 1000, Functions: []v1alpha1.FunctionReport{ready("hello", 1)}})
		})
	}
	wg.Wait()
	v := f.get("hello")
	if len(v.Revision.Settings.Env) != writers || v.Wanted != writers+1 {
		t.Fatalf("wanted %d env %v", v.Wanted, v.Revision.Settings.Env)
	}
}

func testOneWinner(t *testing.T, f *fixture) {
	tag := f.add("hello", 1).Function.ETag
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 8 {
		wg.Go(func() {
			_, err := f.AddRevision(ctx(), "hello", function.Change{Precondition: function.Precondition{IfMatch: []string{tag}}}, constant(revision(10+i)))
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, function.ErrPrecondition) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 || f.get("hello").Wanted != 2 {
		t.Fatalf("%d writers won, wanted is %d", won, f.get("hello").Wanted)
	}
}

func testList(t *testing.T, f *fixture) {
	for i, name := range []string{"d", "a", "c", "b"} {
		tenant := []string{"one", "two"}[i%2]
		if _, err := f.AddRevision(ctx(), name, function.Change{Tenant: tenant}, constant(revision(1))); err != nil {
			t.Fatal(err)
		}
	}
	names := func(o function.ListOptions) string {
		t.Helper()
		var s []string
		for {
			p, err := f.List(ctx(), o)
			if err != nil {
				t.Fatal(err)
			}
			if o.Limit > 0 && len(p.Items) > o.Limit {
				t.Fatal("page is too long")
			}
			for _, i := range p.Items {
				s = append(s, i.Name)
			}
			if p.Next == "" {
				return strings.Join(s, "")
			}
			o.After = p.Next
		}
	}
	for _, c := range []struct {
		o    function.ListOptions
		want string
	}{
		{function.ListOptions{}, "abcd"},
		{function.ListOptions{Limit: 1}, "abcd"},
		{function.ListOptions{Limit: 3}, "abcd"},
		{function.ListOptions{Limit: 4}, "abcd"},
		{function.ListOptions{Tenant: "two", Limit: 1}, "ab"},
		{function.ListOptions{Tenant: "three"}, ""},
		{function.ListOptions{After: "bb"}, "cd"},
		{function.ListOptions{After: "d"}, ""},
	} {
		if got := names(c.o); got != c.want {
			t.Errorf("%+v: %s, want %s", c.o, got, c.want)
		}
	}
	st, err := f.Stats(ctx())
	if err != nil || st.ByState[v1alpha1.StatePending] != 4 {
		t.Errorf("stats %+v %v", st, err)
	}
}

func testRollback(t *testing.T, f *fixture) {
	f.add("hello", 1)
	_, err := f.Rollback(ctx(), "hello", 0, function.Change{})
	wantErr(t, err, function.ErrNoRollbackTarget)
	f.report(ready("hello", 1))
	f.add("hello", 2)
	f.report(ready("hello", 2))
	f.add("hello", 3)
	f.report(failed("hello", 3, 2))
	r, err := f.Rollback(ctx(), "hello", 0, function.Change{})
	if err != nil || r.Function.Wanted != 2 || r.Function.Revision.State != v1alpha1.StateReady {
		t.Fatalf("%+v %v", r, err)
	}
	r, err = f.Rollback(ctx(), "hello", 0, function.Change{})
	if err != nil || r.Function.Wanted != 1 || r.Function.Revision.State != v1alpha1.StatePending || r.Function.Active != 2 {
		t.Fatalf("%+v %v", r, err)
	}
	if r := f.add("hello", 4); r.Function.Wanted != 4 {
		t.Fatalf("the number after a rollback is %d", r.Function.Wanted)
	}
}

func testRollbackTo(t *testing.T, f *fixture) {
	_, err := f.Rollback(ctx(), "hello", 1, function.Change{})
	wantErr(t, err, function.ErrNotFound)
	f.add("hello", 1)
	f.add("hello", 2)
	_, err = f.Rollback(ctx(), "hello", 7, function.Change{})
	wantErr(t, err, function.ErrRevisionNotFound)
	if r, err := f.Rollback(ctx(), "hello", 2, function.Change{}); err != nil || !r.Unchanged {
		t.Fatalf("%+v %v", r, err)
	}
	if r, err := f.Rollback(ctx(), "hello", 1, function.Change{}); err != nil || r.Unchanged || r.Function.Wanted != 1 {
		t.Fatalf("%+v %v", r, err)
	}
	if r, err := f.Rollback(ctx(), "hello", 2, function.Change{}); err != nil || r.Function.Wanted != 2 {
		t.Fatalf("forward again: %+v %v", r, err)
	}
}

func testDelete(t *testing.T, f *fixture) {
	wantErr(t, f.Delete(ctx(), "hello", function.Change{}), function.ErrNotFound)
	f.add("hello", 1)
	f.add("hello-2", 1)
	if err := f.Delete(ctx(), "hello", function.Change{}); err != nil {
		t.Fatal(err)
	}
	_, err := f.Get(ctx(), "hello")
	wantErr(t, err, function.ErrNotFound)
	f.get("hello-2")
	if d := f.desired(); len(d.Functions) != 1 || d.Functions[0].Name != "hello-2" {
		t.Fatalf("desired %+v", d)
	}
}

func testHistory(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.report(ready("hello", 1))
	for i := 2; i <= function.MaxRevisions+10; i++ {
		f.add("hello", i)
	}
	revs, err := f.Revisions(ctx(), "hello")
	if err != nil || len(revs) != function.MaxRevisions {
		t.Fatalf("%d revisions, %v", len(revs), err)
	}
	if revs[0].Number != function.MaxRevisions+10 || revs[len(revs)-1].Number != 1 {
		t.Fatalf("from %d to %d", revs[0].Number, revs[len(revs)-1].Number)
	}
	f.restart()
	if r, err := f.Rollback(ctx(), "hello", 0, function.Change{}); err != nil || r.Function.Wanted != 1 {
		t.Fatalf("%+v %v", r, err)
	}
}

func testProgress(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.report(v1alpha1.FunctionReport{Name: "hello", Revision: 1, Progress: v1alpha1.ProgressPulling, Phases: []v1alpha1.Phase{{Name: "pull"}}})
	f.wantState("hello", v1alpha1.StatePending, 0)
	f.report(v1alpha1.FunctionReport{
		Name: "hello", Revision: 1, Progress: v1alpha1.ProgressFailed, Retrying: true,
		Error: &v1alpha1.FunctionError{Code: "registry-unavailable"},
	})
	f.wantState("hello", v1alpha1.StatePending, 0)
	if v := f.get("hello"); v.Revision.Error == nil || !v.Revision.Retrying {
		t.Fatalf("%+v", v.Revision)
	}
	f.report(ready("hello", 1))
	f.wantState("hello", v1alpha1.StateReady, 1)
	v := f.get("hello")
	if v.Revision.Error != nil || len(v.Revision.NodePhases) == 0 || v.Revision.ActivatedAt.IsZero() {
		t.Fatalf("%+v", v.Revision)
	}
	f.restart()
	after := f.get("hello")
	if diff := cmp.Diff(v, after); diff != "" {
		t.Fatal("restart changed it", diff)
	}
	f.add("hello", 2)
	f.report(failed("hello", 2, 1))
	f.wantState("hello", v1alpha1.StateFailed, 1)
	f.report() // the node has lost everything
	f.wantState("hello", v1alpha1.StateFailed, 0)
	if v := f.get("hello"); v.LastActive != 1 || v.Revision.Error.Code != "invalid-module" {
		t.Fatalf("%+v", v)
	}
	f.report(ready("hello", 2))
	f.wantState("hello", v1alpha1.StateReady, 2)
	f.report()
	f.wantState("hello", v1alpha1.StatePending, 0)
}

func testStaleReport(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.report(ready("hello", 1))
	before := f.desired().Generation
	f.add("hello", 2)
	f.add("other", 1)
	stale := v1alpha1.NodeReport{Node: "n", Generation: before, Functions: []v1alpha1.FunctionReport{ready("hello", 1)}}
	if err := f.SetProgress(ctx(), stale); err != nil {
		t.Fatal(err)
	}
	f.wantState("hello", v1alpha1.StatePending, 1)
	f.wantState("other", v1alpha1.StatePending, 0)
	// Recreated under the same name: what was served before is not this one.
	if err := f.Delete(ctx(), "hello", function.Change{}); err != nil {
		t.Fatal(err)
	}
	f.add("hello", 9)
	if err := f.SetProgress(ctx(), stale); err != nil {
		t.Fatal(err)
	}
	if v := f.get("hello"); v.Revision.State != v1alpha1.StatePending || v.Active != 0 {
		t.Fatalf("active %d state %s", v.Active, v.Revision.State)
	}
}

func testNonsenseReport(t *testing.T, f *fixture) {
	f.add("hello", 1)
	f.report(
		v1alpha1.FunctionReport{Name: "nobody", Revision: 1, Serving: 1},
		v1alpha1.FunctionReport{Name: "hello", Revision: -4, Serving: 77, Progress: "dancing"},
		v1alpha1.FunctionReport{},
	)
	f.wantState("hello", v1alpha1.StatePending, 0)
	f.report(v1alpha1.FunctionReport{Name: "hello", Revision: 1, Progress: v1alpha1.ProgressFailed})
	if v := f.get("hello"); v.Revision.State != v1alpha1.StateFailed || v.Revision.Error == nil {
		t.Fatalf("failed without a reason: %+v", v.Revision)
	}
}

func testDesired(t *testing.T, f *fixture) {
	if d := f.desired(); d.Generation == 0 || d.Functions == nil || len(d.Functions) != 0 {
		t.Fatalf("%+v", d)
	}
	nr := revision(1)
	nr.Settings.Env = map[string]string{"A": "1"}
	nr.Settings.Secrets = function.Secrets{"S": "secret"}
	if _, err := f.AddRevision(ctx(), "hello", function.Change{Tenant: "ann"}, constant(nr)); err != nil {
		t.Fatal(err)
	}
	f.report(ready("hello", 1))
	for i := 2; i <= 9; i++ {
		f.add("hello", i)
	}
	d := f.desired().Functions
	if len(d) != 1 || d[0].Tenant != "ann" || len(d[0].Candidates) != 2 {
		t.Fatalf("%+v", d)
	}
	want := v1alpha1.DesiredRevision{
		Revision: 1, Artifact: nr.Artifact, MemoryMiB: v1alpha1.DefaultMemoryMiB,
		TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency,
		Env: map[string]string{"A": "1"}, Secrets: map[string]string{"S": "secret"},
	}
	if d[0].Candidates[0].Revision != 9 {
		t.Fatalf("first candidate %+v", d[0].Candidates[0])
	}
	if diff := cmp.Diff(want, d[0].Candidates[1]); diff != "" {
		t.Fatal(diff)
	}
	if len(d[0].Keep) != function.KeepArtifacts || d[0].Keep[0] != revision(8).Artifact {
		t.Fatalf("keep %+v", d[0].Keep)
	}
	before := f.desired()
	f.restart()
	// The generation may have grown: a store need not remember it.
	if diff := cmp.Diff(before.Functions, f.desired().Functions); diff != "" {
		t.Fatal("restart changed it", diff)
	}
}

func testDesiredFailed(t *testing.T, f *fixture) {
	candidates := func() string {
		var s []string
		for _, c := range f.desired().Functions[0].Candidates {
			s = append(s, fmt.Sprint(c.Revision))
		}
		return strings.Join(s, " ")
	}
	f.add("hello", 1)
	f.report(failed("hello", 1, 0))
	if c := candidates(); c != "1" {
		t.Fatalf("candidates %s", c)
	}
	f.report(ready("hello", 1))
	f.add("hello", 2)
	if c := candidates(); c != "2 1" {
		t.Fatalf("candidates %s", c)
	}
	before := f.desired().Generation
	f.report(failed("hello", 2, 1))
	if c := candidates(); c != "1" {
		t.Fatalf("candidates %s", c)
	}
	if f.desired().Generation <= before {
		t.Fatal("the generation did not grow")
	}
	f.report(ready("hello", 1))
	f.wantState("hello", v1alpha1.StateFailed, 1)
	f.add("hello", 3)
	f.report(ready("hello", 3))
	if c := candidates(); c != "3" {
		t.Fatalf("candidates %s", c)
	}
}

func testDesiredWaits(t *testing.T, f *fixture) {
	f.add("hello", 1)
	g := f.desired().Generation
	got := make(chan v1alpha1.Desired, 1)
	go func() {
		d, err := f.Desired(ctx(), g)
		if err != nil {
			t.Error(err)
		}
		got <- d
	}()
	f.report(v1alpha1.FunctionReport{Name: "hello", Revision: 1, Progress: v1alpha1.ProgressPulling})
	f.add("hello", 2)
	if d := <-got; d.Generation <= g || d.Functions[0].Candidates[0].Revision != 2 {
		t.Fatalf("%+v", d)
	}
	// A node that knows a later generation than there is gets the truth at once.
	if d, err := f.Desired(ctx(), g+1000); err != nil || len(d.Functions) != 1 {
		t.Fatalf("%+v %v", d, err)
	}
	c, cancel := context.WithCancel(ctx())
	cancel()
	_, err := f.Desired(c, f.desired().Generation)
	wantErr(t, err, context.Canceled)
}

func testGenerationRestart(t *testing.T, f *fixture) {
	f.add("hello", 1)
	g := f.desired().Generation
	f.restart()
	if n := f.desired().Generation; n < g {
		t.Fatalf("generation went from %d to %d", g, n)
	}
	f.add("hello", 2)
	if n := f.desired().Generation; n <= g {
		t.Fatalf("generation went from %d to %d", g, n)
	}
}

func testWatch(t *testing.T, f *fixture) {
	tag := f.add("hello", 1).Function.ETag
	got := make(chan function.Function, 1)
	go func() {
		v, err := f.Watch(ctx(), "hello", tag)
		if err != nil {
			t.Error(err)
		}
		got <- v
	}()
	f.add("other", 1)
	f.report(ready("hello", 1))
	v := <-got
	if v.Revision.State != v1alpha1.StateReady {
		t.Fatalf("%+v", v)
	}
	gone := make(chan error, 1)
	go func() {
		_, err := f.Watch(ctx(), "hello", v.ETag)
		gone <- err
	}()
	if err := f.Delete(ctx(), "hello", function.Change{}); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-gone, function.ErrNotFound)
}

func testRestart(t *testing.T, f *fixture) {
	nr := revision(1)
	nr.Settings.Env = map[string]string{"A": "ä\n\"<"}
	nr.Settings.Secrets = function.Secrets{"S": "\x01 secret <&>"}
	nr.Settings.Host, nr.Settings.Routes = "hello.example.com", []string{"/a", "/b/c"}
	nr.Settings.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": "wasm"}}
	if _, err := f.AddRevision(ctx(), "hello", function.Change{}, constant(nr)); err != nil {
		t.Fatal(err)
	}
	f.report(ready("hello", 1))
	nr = revision(3)
	nr.Settings.Runtime = v1alpha1.RuntimeSpin
	nr.Settings.Autoscaling = &v1alpha1.FunctionAutoscaling{MinReplicas: 2, MaxReplicas: 3}
	if _, err := f.AddRevision(ctx(), "pods", function.Change{}, constant(nr)); err != nil {
		t.Fatal(err)
	}
	f.add("b", 2)
	if _, err := f.Rollback(ctx(), "b", 1, function.Change{}); err != nil {
		t.Fatal(err)
	}
	before, err := f.List(ctx(), function.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.restart()
	after, err := f.List(ctx(), function.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range before.Items {
		b, a := before.Items[i], after.Items[i]
		if b.Name != a.Name || b.Wanted != a.Wanted || b.Active != a.Active || !b.Revision.Settings.Equal(a.Revision.Settings) || !b.CreatedAt.Equal(a.CreatedAt) {
			t.Errorf("before %+v\nafter %+v", b, a)
		}
	}
}

func (f *fixture) begin(key, print string) function.Begun {
	f.Helper()
	b, err := f.Begin(ctx(), key, print)
	if err != nil {
		f.Fatalf("begin: %v", err)
	}
	return b
}

func (f *fixture) wantBegin(key, print string, want function.IdempotencyState) function.Begun {
	f.Helper()
	b := f.begin(key, print)
	if b.State != want {
		f.Fatalf("begin %s %s: state %d, want %d", key, print, b.State, want)
	}
	return b
}

func testReplay(t *testing.T, f *fixture) {
	f.wantBegin("k", "p", function.IdempotencyNew)
	answer := function.Response{Status: 201, Header: map[string]string{"ETag": `"x"`}, Body: []byte("{}\n")}
	if err := f.Complete(ctx(), "k", answer); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		b := f.wantBegin("k", "p", function.IdempotencyReplay)
		if diff := cmp.Diff(&answer, b.Response); diff != "" {
			t.Fatal(diff)
		}
		f.wantBegin("k", "other", function.IdempotencyMismatch)
		f.restart()
	}
	if err := f.Complete(ctx(), "never", answer); err == nil {
		t.Fatal("completed a key that was not begun")
	}
}

func testInFlight(t *testing.T, f *fixture) {
	f.wantBegin("k", "p", function.IdempotencyNew)
	f.wantBegin("k", "p", function.IdempotencyInFlight)
	f.wantBegin("k", "q", function.IdempotencyMismatch)
	f.wantBegin("l", "p", function.IdempotencyNew)
	f.restart()
	f.wantBegin("k", "p", function.IdempotencyNew)
}

func testRelease(t *testing.T, f *fixture) {
	f.wantBegin("k", "p", function.IdempotencyNew)
	if err := f.Release(ctx(), "k"); err != nil {
		t.Fatal(err)
	}
	f.wantBegin("k", "other", function.IdempotencyNew)
	if _, err := f.AddRevision(ctx(), "hello", function.Change{IdempotencyKey: "k"}, constant(revision(1))); err != nil {
		t.Fatal(err)
	}
	if err := f.Release(ctx(), "k"); err != nil {
		t.Fatal(err)
	}
	f.wantBegin("k", "p", function.IdempotencyMismatch)
	b := f.wantBegin("k", "other", function.IdempotencyResume)
	if diff := cmp.Diff(&function.Outcome{Name: "hello", Revision: 1, Created: true}, b.Outcome); diff != "" {
		t.Fatal(diff)
	}
	if err := f.Complete(ctx(), "k", function.Response{Status: 201}); err != nil {
		t.Fatal(err)
	}
	f.wantBegin("k", "other", function.IdempotencyReplay)
}

func testResumeAfterRestart(t *testing.T, f *fixture) {
	for _, c := range []struct {
		key  string
		do   func(function.Change) error
		want function.Outcome
	}{
		{"add", func(c function.Change) error {
			_, err := f.AddRevision(ctx(), "hello", c, constant(revision(1)))
			return err
		}, function.Outcome{Name: "hello", Revision: 1, Created: true}},
		{"same", func(c function.Change) error {
			_, err := f.AddRevision(ctx(), "hello", c, constant(revision(1)))
			return err
		}, function.Outcome{Name: "hello", Revision: 1}},
		{"rollback", func(c function.Change) error {
			_, err := f.Rollback(ctx(), "hello", 1, c)
			return err
		}, function.Outcome{Name: "hello", Revision: 1}},
		{"delete", func(c function.Change) error { return f.Delete(ctx(), "hello", c) }, function.Outcome{Name: "hello", Deleted: true}},
	} {
		f.wantBegin(c.key, "p", function.IdempotencyNew)
		if err := c.do(function.Change{IdempotencyKey: c.key}); err != nil {
			t.Fatal(c.key, err)
		}
		f.restart()
		b := f.wantBegin(c.key, "p", function.IdempotencyResume)
		if diff := cmp.Diff(&c.want, b.Outcome); diff != "" {
			t.Fatal(c.key, diff)
		}
	}
	if _, err := f.AddRevision(ctx(), "x", function.Change{IdempotencyKey: "not begun"}, constant(revision(1))); err == nil {
		t.Fatal("changed under a key that was not begun")
	}
	_, err := f.Get(ctx(), "x")
	wantErr(t, err, function.ErrNotFound)
}

func testExpiry(t *testing.T, f *fixture) {
	f.wantBegin("k", "p", function.IdempotencyNew)
	if err := f.Complete(ctx(), "k", function.Response{Status: 200}); err != nil {
		t.Fatal(err)
	}
	f.later(function.IdempotencyExpiry - time.Minute)
	f.wantBegin("k", "p", function.IdempotencyReplay)
	f.later(2 * time.Minute)
	f.wantBegin("k", "other", function.IdempotencyNew)
	if err := f.Complete(ctx(), "k", function.Response{Status: 202}); err != nil {
		t.Fatal(err)
	}
	if b := f.wantBegin("k", "other", function.IdempotencyReplay); b.Response.Status != 202 {
		t.Fatalf("%+v", b.Response)
	}
}

func testCanceled(t *testing.T, f *fixture) {
	c, cancel := context.WithCancel(ctx())
	cancel()
	_, err := f.AddRevision(c, "hello", function.Change{}, constant(revision(1)))
	wantErr(t, err, context.Canceled)
	_, err = f.Get(ctx(), "hello")
	wantErr(t, err, function.ErrNotFound)
	tag := f.add("hello", 1).Function.ETag
	_, err = f.Watch(c, "hello", tag)
	wantErr(t, err, context.Canceled)
	wantErr(t, f.Delete(c, "hello", function.Change{}), context.Canceled)
}

func testClosed(t *testing.T, f *fixture) {
	tag := f.add("hello", 1).Function.ETag
	ended := make(chan error, 1)
	go func() {
		_, err := f.Watch(ctx(), "hello", tag)
		ended <- err
	}()
	if err := f.Store.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, <-ended, function.ErrClosed)
	_, err := f.Get(ctx(), "hello")
	wantErr(t, err, function.ErrClosed)
	_, err = f.AddRevision(ctx(), "hello", function.Change{}, constant(revision(2)))
	wantErr(t, err, function.ErrClosed)
	_, err = f.Desired(ctx(), 0)
	wantErr(t, err, function.ErrClosed)
	wantErr(t, f.SetProgress(ctx(), v1alpha1.NodeReport{}), function.ErrClosed)
	_, err = f.Begin(ctx(), "k", "p")
	wantErr(t, err, function.ErrClosed)
	if err := f.Store.Close(); err != nil {
		t.Fatalf("closing twice: %v", err)
	}
}
