// Command functions measures what Hearth promises of functions on a Kubernetes
// cluster, on a real one of three nodes with the shipped chart: how long from a
// submit to the first answer, what the API does with many tenants and a
// thousand functions, and how much a change costs the cluster. Beside it, in
// turns, a Deployment with its Service and Ingress, which is what one would do
// with plain Kubernetes. It prints one table with the targets.
//
//	go run ./test/bench/functions            measure
//	go run ./test/bench/functions -check     and fail when a target is missed
//
// It needs what test/cluster needs: Linux, root, Debian packages.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"

	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
)

// deadline bounds a whole run; one with default options takes some ten minutes.
const deadline = 45 * time.Minute

type options struct {
	submits    int // one after the other
	concurrent int // at once
	tenants    int // that these are of
	functions  int // that are there when reads are measured
	reads      int // of each kind
	verbose    bool
}

func main() {
	var o options
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run (submit, concurrent, many); all when empty")
	flag.IntVar(&o.submits, "submits", 30, "submits one after the other, and half as many Deployments")
	flag.IntVar(&o.concurrent, "concurrent", 50, "submits at once")
	flag.IntVar(&o.tenants, "tenants", 10, "tenants that functions are of")
	flag.IntVar(&o.functions, "functions", 1000, "functions that are there when reads are measured")
	flag.IntVar(&o.reads, "reads", 2000, "reads of each kind")
	flag.BoolVar(&o.verbose, "v", false, "print every single measurement, and what the pods said")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	missed, err := run(ctx, o, *only)
	os.Exit(report.Status(missed, *check, err))
}

var sections = []report.Section[*bench]{
	{Name: "submit", Measure: submits},
	{Name: "concurrent", Measure: concurrentSubmits},
	{Name: "many", Measure: manyFunctions},
}

func run(ctx context.Context, o options, only string) (missed int, err error) {
	if err := cluster.Check(); err != nil {
		return 0, err
	}
	if min(o.submits, o.concurrent, o.tenants, o.reads) < 1 || o.functions <= few {
		return 0, fmt.Errorf("there must be at least one of everything, and more than %d functions", few)
	}
	begin, loadBefore := time.Now(), report.LoadAverage()
	b := &bench{options: o}
	defer func() { err = errors.Join(err, b.close()) }()
	fmt.Fprintln(os.Stderr, "bench: starting a cluster …")
	if err := b.setUp(ctx); err != nil {
		b.dump()
		return 0, fmt.Errorf("set up: %w", err)
	}
	if err := report.Run(ctx, b, sections, only); err != nil {
		b.dump()
		return 0, err
	}
	if o.verbose {
		b.dump()
	}
	fmt.Printf("Functions on a cluster, %s/%s, %d CPUs shared by three nodes, control plane and registry, %s, took %v, load average %s before and %s after\n\n",
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), time.Since(begin).Round(time.Second), loadBefore, report.LoadAverage())
	return b.table.Print(os.Stdout), nil
}

// dump writes what the pods said.
func (b *bench) dump() {
	if b.cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	chart.Dump(ctx, b.cluster, os.Stderr)
}
