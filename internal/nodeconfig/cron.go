package nodeconfig

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// cronFields are the five fields of a schedule with their ranges, as the
// parser that k3s uses has them (github.com/robfig/cron/v3, ParseStandard).
var cronFields = []struct {
	name      string
	low, high int
	words     []string
}{
	{"minute", 0, 59, nil},
	{"hour", 0, 23, nil},
	{"day of the month", 1, 31, nil},
	{"month", 1, 12, []string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
	{"day of the week", 0, 6, []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}},
}

var cronNames = []string{"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}

// minEvery is the shortest time between snapshots that makes sense.
const minEvery = time.Minute

// checkCron says what is wrong with a schedule.
func checkCron(s string) error {
	if len(s) > 256 {
		return errors.New("it is too long")
	}
	if strings.HasPrefix(s, "@") {
		if every, ok := strings.CutPrefix(s, "@every "); ok {
			if d, err := time.ParseDuration(every); err != nil || d < minEvery {
				return errors.New("@every needs a time span of at least 1m")
			}
			return nil
		}
		if !slices.Contains(cronNames, s) {
			return fmt.Errorf("it is none of %s", strings.Join(cronNames, ", "))
		}
		return nil
	}
	parts := strings.Fields(s)
	if len(parts) != len(cronFields) {
		return fmt.Errorf("it has %d fields, not minute, hour, day of the month, month, day of the week", len(parts))
	}
	for i, part := range parts {
		for item := range strings.SplitSeq(part, ",") {
			if err := checkCronItem(item, i); err != nil {
				return fmt.Errorf("%s: %w", cronFields[i].name, err)
			}
		}
	}
	if !cronComes(parts) {
		return errors.New("it never comes: none of its months has such a day")
	}
	return nil
}

// longest are the most days that each month has.
var longest = []int{31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}

// cronComes says whether a valid schedule ever comes. Where days of the week are
// named it does: they count beside the days of the month, not together with them.
func cronComes(parts []string) bool {
	const day, month, weekday = 2, 3, 4
	if _, any := cronValues(parts[weekday], weekday); !any {
		return true
	}
	days, _ := cronValues(parts[day], day)
	months, _ := cronValues(parts[month], month)
	for _, m := range months {
		if slices.ContainsFunc(days, func(d int) bool { return d <= longest[m-1] }) {
			return true
		}
	}
	return false
}

// cronValues are the values of a valid field, and whether it leaves them open.
func cronValues(field string, i int) (values []int, open bool) {
	f := cronFields[i]
	for item := range strings.SplitSeq(field, ",") {
		span, by, stepped := strings.Cut(item, "/")
		step := 1
		if stepped {
			step, _ = strconv.Atoi(by)
		}
		low, high := f.low, f.high
		if span == "*" || span == "?" {
			open = open || step == 1
		} else {
			from, to, isRange := strings.Cut(span, "-")
			low, _ = cronValue(from, i)
			if isRange {
				high, _ = cronValue(to, i)
			} else if !stepped {
				high = low
			}
		}
		for v := low; v <= high; v += step {
			values = append(values, v)
		}
	}
	return values, open
}

func checkCronItem(item string, i int) error {
	span, step, stepped := strings.Cut(item, "/")
	if stepped {
		if n, err := strconv.Atoi(step); err != nil || n < 1 || n > cronFields[i].high {
			return fmt.Errorf("%s is not a step from 1 to %d", quote(step), cronFields[i].high)
		}
	}
	if span == "*" || span == "?" {
		return nil
	}
	from, to, isRange := strings.Cut(span, "-")
	low, err := cronValue(from, i)
	if err != nil {
		return err
	}
	if !isRange {
		return nil
	}
	high, err := cronValue(to, i)
	if err != nil {
		return err
	}
	if low > high {
		return fmt.Errorf("%s ends before it begins", quote(span))
	}
	return nil
}

func cronValue(s string, i int) (int, error) {
	f := cronFields[i]
	if at := slices.Index(f.words, strings.ToLower(s)); at >= 0 {
		return at + f.low, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < f.low || n > f.high || strings.HasPrefix(s, "+") {
		return 0, fmt.Errorf("%s is not between %d and %d", quote(s), f.low, f.high)
	}
	return n, nil
}
