// Command bench measures what Hearth promises, on the shipped binary over
// HTTP, and prints one table with the targets beside. Everything that is put
// in relation is measured in the same run, in turns, so that a slow moment of
// the machine hits both sides.
//
//	go run ./test/bench            measure
//	go run ./test/bench -check     and fail when a target is missed
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/harness"
)

type options struct {
	functions int           // fresh functions per language for first requests
	idle      int           // functions that are idle when memory is measured
	load      time.Duration // of each throughput run
	kills     int           // requests per guest that runs into its deadline
	burners   int           // busy programs beside the guests that are stopped
	rounds    int           // turns of each compared pair
	compute   int           // rounds of the compute guest in one turn
	verbose   bool
}

func main() {
	if os.Getenv(burnEnv) != "" {
		burn()
	}
	b := &bench{warm: map[string]time.Duration{}}
	flag.IntVar(&b.functions, "functions", 30, "fresh functions per language for the first request")
	flag.IntVar(&b.idle, "idle", 100, "idle functions when memory is measured")
	flag.DurationVar(&b.load, "load", 3*time.Second, "length of each throughput run")
	flag.IntVar(&b.kills, "kills", 20, "requests per guest that is stopped at its deadline")
	flag.IntVar(&b.burners, "burners", 0, "busy programs beside the guests that are stopped at their deadline")
	flag.IntVar(&b.rounds, "rounds", 5, "turns of each compared pair")
	flag.IntVar(&b.compute, "compute", 20, "work of the compute-bound guest per turn")
	report.Main(b, sections, &b.verbose, 0)
}

var sections = []report.Section[*bench]{
	{Name: "first", Measure: firstRequests},
	{Name: "hit", Measure: storeHits},
	{Name: "warm", Measure: warmRequests},
	{Name: "fresh", Measure: freshProcesses},
	{Name: "deadline", Measure: deadlines},
	{Name: "compute", Measure: computeBound},
	{Name: "memory", Measure: idleMemory},
}

// bench is one run.
type bench struct {
	options
	dev   *harness.Dev
	dir   string
	table report.Table
	// warm medians by language, for the comparison with a fresh process.
	warm map[string]time.Duration
}

// SetUp starts the product.
func (b *bench) SetUp(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp("", "hearth-bench-"); err != nil {
		return err
	}
	binary, err := harness.Binary(ctx, b.dir)
	if err != nil {
		return err
	}
	b.dev, err = b.start(ctx, binary, "main")
	return err
}

// Dump writes the output of the product.
func (b *bench) Dump(w io.Writer) {
	if b.dev != nil {
		fmt.Fprintln(w, b.dev.Output())
	}
}

// Close ends the product and removes its data.
func (b *bench) Close() error {
	if b.dev != nil {
		b.dev.KillAll()
	}
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// Title says on what was measured.
func (b *bench) Title() string { return "Hearth on " + report.Machine() }

// Rows are what was measured.
func (b *bench) Rows() *report.Table { return &b.table }

func (b *bench) start(ctx context.Context, binary, name string) (*harness.Dev, error) {
	data, err := os.MkdirTemp(b.dir, name+"-")
	if err != nil {
		return nil, err
	}
	// The sandboxed processes may run under another user.
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(data, 0o755); err != nil {
		return nil, err
	}
	return harness.Start(ctx, harness.Options{Binary: binary, DataDir: data})
}
