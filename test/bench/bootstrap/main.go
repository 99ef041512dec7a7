// Command bootstrap measures what Hearth promises of the way from a machine to
// a node: bootstrap's own share of it, beside a shell script that does the same
// one after the other (baseline.sh), on machines with a real systemd (test/machine)
// and a k3s (test/k3s). What is put in relation is measured in the same run, in
// turns.
//
//	go run ./test/bench/bootstrap            measure
//	go run ./test/bench/bootstrap -check     and fail when a target is missed
//
// It needs what test/machine and test/k3s need: Linux, root, Debian packages.
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
	"github.com/hearth-sh/hearth/test/machine"
)

// deadline bounds a whole run; one with default options takes some fifteen minutes.
const deadline = time.Hour

type options struct {
	rounds  int   // of each comparison
	rate    int64 // of one connection, in MB/s
	verbose bool
}

func main() {
	var o options
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run (sizes, memory, baked, downloads); all when empty")
	flag.IntVar(&o.rounds, "rounds", 5, "turns of bootstrap and of the script")
	flag.Int64Var(&o.rate, "rate", 100, "what one connection carries, in MB/s; S3 gives about 100")
	flag.BoolVar(&o.verbose, "v", false, "print every single measurement")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	missed, err := run(ctx, o, *only)
	os.Exit(report.Status(missed, *check, err))
}

var sections = []report.Section[*bench]{
	{Name: "sizes", Measure: sizes},
	{Name: "memory", Measure: memory},
	{Name: "baked", Measure: bakedImage},
	{Name: "downloads", Measure: downloads},
}

func run(ctx context.Context, o options, only string) (missed int, err error) {
	if err := errors.Join(cluster.Check(), machine.Check()); err != nil {
		return 0, err
	}
	if o.rounds < 1 || o.rate < 0 {
		return 0, errors.New("there must be at least one round, and a rate of at least 0")
	}
	begin, loadBefore := time.Now(), report.LoadAverage()
	b := &bench{options: o}
	defer func() { err = errors.Join(err, b.lab.close()) }()
	if err := b.lab.setUp(ctx, o.rate*1_000_000); err != nil {
		return 0, fmt.Errorf("set up: %w", err)
	}
	if err := report.Run(ctx, b, sections, only); err != nil {
		return 0, err
	}
	k := "the stand-in for k3s"
	if b.lab.k3s.Real {
		k = "a real k3s"
	}
	fmt.Printf("From machine to node, %s %s, %s/%s, %d CPUs, %d rounds, %s, took %v, load average %s before and %s after; medians (least to most)\n\n",
		k, b.lab.k3s.Version, runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), o.rounds, runtime.Version(), time.Since(begin).Round(time.Second), loadBefore, report.LoadAverage())
	return b.table.Print(os.Stdout), nil
}
