package report

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"time"
)

// Bench is what a benchmark measures, from before to after.
type Bench interface {
	// SetUp starts it.
	SetUp(ctx context.Context) error
	// Dump writes what its processes said, which may be none yet.
	Dump(w io.Writer)
	// Close ends it, however far SetUp came.
	Close() error
	// Title says what was measured, and on what: "Hearth on linux/amd64, 2 CPUs".
	Title() string
	// Rows are what the sections measured.
	Rows() *Table
}

// Main is a benchmark's: it parses the command line, where the benchmark's own
// flags are defined already, measures until an interrupt or the deadline (0 is
// none), prints the table and ends the process with Status. verbose gets -v.
func Main[B Bench](bench B, sections []Section[B], verbose *bool, deadline time.Duration) {
	var names []string
	for _, s := range sections {
		names = append(names, s.Name)
	}
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run ("+strings.Join(names, ", ")+"); all when empty")
	flag.BoolVar(verbose, "v", false, "print every single measurement, and what the measured processes said")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	if deadline > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, deadline)
		defer cancel()
	}
	missed, err := measure(ctx, bench, sections, *only, *verbose, os.Stdout, os.Stderr)
	stop()
	os.Exit(Status(missed, *check, err))
}

func measure[B Bench](ctx context.Context, bench B, sections []Section[B], only string, verbose bool, table, said io.Writer) (missed int, err error) {
	if err := known(sections, only); err != nil {
		return 0, err
	}
	begin, before := time.Now(), LoadAverage()
	defer func() { err = errors.Join(err, bench.Close()) }()
	fmt.Fprintln(said, "bench: set up …")
	err = bench.SetUp(ctx)
	if err != nil {
		err = fmt.Errorf("set up: %w", err)
	} else {
		err = Run(ctx, bench, sections, only)
	}
	if err != nil || verbose {
		bench.Dump(said)
	}
	if err != nil {
		return 0, err
	}
	fmt.Fprintf(table, "%s, %s, took %v, load average %s before and %s after\n\n",
		bench.Title(), runtime.Version(), time.Since(begin).Round(time.Second), before, LoadAverage())
	return bench.Rows().Print(table), nil
}

// Machine is what this one is, for titles.
func Machine() string {
	return fmt.Sprintf("%s/%s, %d CPUs", runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
}
