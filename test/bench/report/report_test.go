package report

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestOnlyNamesTheSectionsThatAreMeasured(t *testing.T) {
	var done []string
	section := func(name string) Section[string] {
		return Section[string]{Name: name, Measure: func(_ context.Context, of string) error { done = append(done, of+name); return nil }}
	}
	all := []Section[string]{section("one"), section("two"), section("three")}
	for _, c := range []struct {
		only string
		want []string
		ok   bool
	}{
		{"", []string{"b-one", "b-two", "b-three"}, true},
		{"three,one", []string{"b-one", "b-three"}, true},
		{"four", nil, false},
	} {
		done = nil
		if err := Run(t.Context(), "b-", all, c.only); (err == nil) != c.ok || !slices.Equal(done, c.want) {
			t.Errorf("-only %q measured %v (%v), want %v", c.only, done, err, c.want)
		}
	}
	broken := []Section[string]{{Name: "broken", Measure: func(context.Context, string) error { return errors.New("no") }}}
	if err := Run(t.Context(), "", broken, ""); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("the error does not name its section: %v", err)
	}
}

func TestTheTableCountsWhatWasMissed(t *testing.T) {
	var table Table
	table.Title("Group")
	table.Add("one", "1 ms", "of 2 ms")
	table.Hold("two", "2 ms", "", "≤ 3 ms", true)
	table.Hold("three", "4 ms", "", "≤ 3 ms", false)
	table.Note("a note")
	var out strings.Builder
	if missed := table.Print(&out); missed != 1 {
		t.Errorf("%d missed, want 1", missed)
	}
	for _, want := range []string{"\nGroup", "of 2 ms", "MISSED", "  a note\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
	for missed, want := range map[int]int{0: 0, 2: 1} {
		if got := Status(missed, true, nil); got != want {
			t.Errorf("status %d with %d missed, want %d", got, missed, want)
		}
	}
}

func TestQuantiles(t *testing.T) {
	values := []time.Duration{5, 1, 4, 2, 3}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 3, 0.95: 5, 1: 5} {
		if got := Quantile(values, q); got != want {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if Quantile[time.Duration](nil, 0.5) != 0 {
		t.Error("the median of nothing is not 0")
	}
}

// fake is a benchmark of one row.
type fake struct {
	table  Table
	calls  []string
	failed error
}

func (f *fake) SetUp(context.Context) error { f.calls = append(f.calls, "set up"); return f.failed }
func (f *fake) Dump(io.Writer)              { f.calls = append(f.calls, "dump") }
func (f *fake) Close() error                { f.calls = append(f.calls, "close"); return nil }
func (f *fake) Title() string               { return "A fake on " + Machine() }
func (f *fake) Rows() *Table                { return &f.table }

func TestABenchmarkIsClosedWhateverHappens(t *testing.T) {
	row := Section[*fake]{Name: "row", Measure: func(_ context.Context, f *fake) error {
		f.calls = append(f.calls, "measure")
		f.table.Hold("what", "2", "", "1", false)
		return nil
	}}
	broken := errors.New("broken")
	for _, c := range []struct {
		name    string
		only    string
		verbose bool
		failed  error
		want    []string
		missed  int
		ok      bool
	}{
		{name: "measured", want: []string{"set up", "measure", "close"}, missed: 1, ok: true},
		{name: "and said", verbose: true, want: []string{"set up", "measure", "dump", "close"}, missed: 1, ok: true},
		{name: "not set up", failed: broken, want: []string{"set up", "dump", "close"}},
		{name: "a section that is none costs nothing", only: "none", want: nil},
	} {
		f := &fake{failed: c.failed}
		var table strings.Builder
		missed, err := measure(t.Context(), f, []Section[*fake]{row}, c.only, c.verbose, &table, io.Discard)
		if missed != c.missed || (err == nil) != c.ok || !slices.Equal(f.calls, c.want) {
			t.Errorf("%s: %d missed (%v) after %v, want %d after %v", c.name, missed, err, f.calls, c.missed, c.want)
		}
		if c.failed != nil && !errors.Is(err, c.failed) {
			t.Errorf("%s: the error is %v", c.name, err)
		}
		if c.ok && !strings.HasPrefix(table.String(), "A fake on ") {
			t.Errorf("%s: printed %q", c.name, table.String())
		}
	}
}
