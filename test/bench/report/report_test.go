package report

import (
	"context"
	"errors"
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
