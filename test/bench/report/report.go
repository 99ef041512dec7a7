// Package report is what the benchmarks have in common: sections that are
// measured one after the other, and one table with the targets beside.
package report

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// missed marks a row whose target was not reached.
const missed = "MISSED"

// Section is one group of rows of a benchmark B; it may use what earlier ones
// left behind.
type Section[B any] struct {
	Name    string
	Measure func(context.Context, B) error
}

// Run measures the sections that only names, separated by commas, in their own
// order; all when it is empty.
func Run[B any](ctx context.Context, bench B, sections []Section[B], only string) error {
	wanted := selected(only)
	if err := known(sections, only); err != nil {
		return err
	}
	for _, s := range sections {
		if len(wanted) > 0 && !wanted[s.Name] {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s …\n", s.Name)
		if err := s.Measure(ctx, bench); err != nil {
			return fmt.Errorf("measuring %s: %w", s.Name, err)
		}
	}
	return nil
}

// selected are the names in a -only.
func selected(only string) map[string]bool {
	wanted := map[string]bool{}
	for name := range strings.SplitSeq(only, ",") {
		if name = strings.TrimSpace(name); name != "" {
			wanted[name] = true
		}
	}
	return wanted
}

// known returns an error for a name that no section has.
func known[B any](sections []Section[B], only string) error {
	for name := range selected(only) {
		if !slices.ContainsFunc(sections, func(s Section[B]) bool { return s.Name == name }) {
			return fmt.Errorf("there is no section %q", name)
		}
	}
	return nil
}

// Status is the exit status of a benchmark: 2 when it could not be measured, 1
// when it was to be checked and missed a target. It says so.
func Status(targetsMissed int, check bool, err error) int {
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	case targetsMissed > 0 && check:
		fmt.Fprintf(os.Stderr, "bench: %d targets missed\n", targetsMissed)
		return 1
	}
	return 0
}

// LoadAverage is that of the last minute: more than there are CPUs before the
// run means that others were at work and times say little.
func LoadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	minute, _, _ := strings.Cut(string(b), " ")
	return minute
}

// row is one line of the table; a title has only what it says, after a line feed.
type row struct{ what, value, relation, target, verdict string }

// Table collects rows in the order they are measured. The zero value is empty.
type Table struct{ rows []row }

// Title starts a group of rows.
func (t *Table) Title(what string) { t.rows = append(t.rows, row{what: "\n" + what}) }

// Add appends a row without a target.
func (t *Table) Add(what, value, relation string) {
	t.rows = append(t.rows, row{what: what, value: value, relation: relation})
}

// Hold appends a row that has a target, and whether it was reached.
func (t *Table) Hold(what, value, relation, target string, ok bool) {
	verdict := "ok"
	if !ok {
		verdict = missed
	}
	t.rows = append(t.rows, row{what, value, relation, target, verdict})
}

// Note appends a line that is not part of the columns.
func (t *Table) Note(what string) { t.rows = append(t.rows, row{what: what}) }

// Print writes the table and returns how many targets were missed.
func (t *Table) Print(to io.Writer) (targetsMissed int) {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tmeasured\tin relation\ttarget\t")
	for _, r := range t.rows {
		switch {
		case strings.HasPrefix(r.what, "\n"):
			fmt.Fprintf(w, "\t\t\t\t\n%s\t\t\t\t\n", r.what[1:])
		case r.value == "":
			fmt.Fprintf(w, "  %s\n", r.what)
		default:
			fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%s\n", r.what, r.value, r.relation, r.target, r.verdict)
		}
		if r.verdict == missed {
			targetsMissed++
		}
	}
	if err := w.Flush(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	return targetsMissed
}

// Quantile of the values: 0.5 is the median, 1 the greatest; 0 of none.
func Quantile[T ~int64](values []T, q float64) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

// Median is the quantile 0.5.
func Median[T ~int64](values []T) T { return Quantile(values, 0.5) }

// Milliseconds shows a duration with two digits after the point.
func Milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
}

// Times shows how many times b a is.
func Times(a, b time.Duration) string {
	if b <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f×", float64(a)/float64(b))
}
