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
	"os"
	"os/signal"
	"runtime"
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
	var o options
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run (first, hit, warm, memory, deadline, compute, fresh); all when empty")
	flag.IntVar(&o.functions, "functions", 30, "fresh functions per language for the first request")
	flag.IntVar(&o.idle, "idle", 100, "idle functions when memory is measured")
	flag.DurationVar(&o.load, "load", 3*time.Second, "length of each throughput run")
	flag.IntVar(&o.kills, "kills", 20, "requests per guest that is stopped at its deadline")
	flag.IntVar(&o.burners, "burners", 0, "busy programs beside the guests that are stopped at their deadline")
	flag.IntVar(&o.rounds, "rounds", 5, "turns of each compared pair")
	flag.IntVar(&o.compute, "compute", 20, "work of the compute-bound guest per turn")
	flag.BoolVar(&o.verbose, "v", false, "print the output of the product too")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	missed, err := run(ctx, o, *only)
	os.Exit(report.Status(missed, *check, err))
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

func run(ctx context.Context, o options, only string) (missed int, err error) {
	dir, err := os.MkdirTemp("", "hearth-bench-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binary, err := harness.Binary(ctx, dir)
	if err != nil {
		return 0, err
	}
	b := &bench{options: o, dir: dir, warm: map[string]time.Duration{}}
	if b.dev, err = b.start(ctx, binary, "main"); err != nil {
		return 0, err
	}
	defer b.dev.KillAll()
	begin, loadBefore := time.Now(), report.LoadAverage()
	err = report.Run(ctx, b, sections, only)
	if o.verbose {
		fmt.Fprintln(os.Stderr, b.dev.Output())
	}
	if err != nil {
		return 0, err
	}
	fmt.Printf("Hearth on %s/%s, %d CPUs, %s, took %v, load average %s before and %s after\n\n", runtime.GOOS, runtime.GOARCH,
		runtime.NumCPU(), runtime.Version(), time.Since(begin).Round(time.Second), loadBefore, report.LoadAverage())
	return b.table.Print(os.Stdout), nil
}

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
