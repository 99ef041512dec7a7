// Command cluster measures what Hearth promises of a node of a Kubernetes
// cluster, on a real one: the shipped chart, real containerd and kubelet, a
// Wasm shim that compiles with Wasmtime, a registry. It prints one table with
// the targets beside. What is put in relation is measured in the same run, in
// turns.
//
//	go run ./test/bench/cluster            measure
//	go run ./test/bench/cluster -check     and fail when a target is missed
//
// It needs what test/cluster needs: Linux, root, Debian packages, and for the
// shim a Rust toolchain on first use.
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
	"github.com/hearth-sh/hearth/test/cluster"
)

// deadline bounds a whole run; one with default options takes some ten minutes.
const deadline = 45 * time.Minute

type options struct {
	rounds   int           // pods of each warmth
	restarts int           // starts of the agent
	idle     time.Duration // of watching an idle agent
	images   int           // small images that are wanted at once
	verbose  bool
}

func main() {
	var o options
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run (start, warmth, idle, images); all when empty")
	flag.IntVar(&o.rounds, "rounds", 5, "pods started with each warmth")
	flag.IntVar(&o.restarts, "restarts", 5, "starts of the agent's pod")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long an idle agent is watched")
	flag.IntVar(&o.images, "images", 500, "images that are wanted at once, at most 2000")
	flag.BoolVar(&o.verbose, "v", false, "print every single measurement, and what the agent said")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	missed, err := run(ctx, o, *only)
	os.Exit(report.Status(missed, *check, err))
}

// The agent is watched while idle after it had work: that is when memory shows
// what it keeps.
var sections = []report.Section[*bench]{
	{Name: "start", Measure: starts},
	{Name: "warmth", Measure: warmth},
	{Name: "idle", Measure: idle},
	{Name: "images", Measure: manyImages},
}

func run(ctx context.Context, o options, only string) (missed int, err error) {
	if err := cluster.Check(); err != nil {
		return 0, err
	}
	begin, loadBefore := time.Now(), report.LoadAverage()
	b := &bench{options: o}
	defer func() { err = errors.Join(err, b.close()) }()
	fmt.Fprintln(os.Stderr, "bench: starting a cluster …")
	if err := b.setUp(ctx); err != nil {
		return 0, fmt.Errorf("set up: %w", err)
	}
	if err := report.Run(ctx, b, sections, only); err != nil {
		b.dump(os.Stderr)
		return 0, err
	}
	if o.verbose {
		b.dump(os.Stderr)
	}
	fmt.Printf("Hearth on a node of Kubernetes, %s/%s, %d CPUs shared by two nodes and the control plane, %s, took %v, load average %s before and %s after\n\n",
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), time.Since(begin).Round(time.Second), loadBefore, report.LoadAverage())
	return b.table.Print(os.Stdout), nil
}
