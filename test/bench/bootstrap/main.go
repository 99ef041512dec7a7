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
	"io"
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
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "turns of bootstrap and of the script")
	flag.Int64Var(&b.rate, "rate", 100, "what one connection carries, in MB/s; S3 gives about 100")
	report.Main(b, sections, &b.verbose, deadline)
}

var sections = []report.Section[*bench]{
	{Name: "sizes", Measure: sizes},
	{Name: "memory", Measure: memory},
	{Name: "baked", Measure: bakedImage},
	{Name: "downloads", Measure: downloads},
}

// SetUp starts what machines are fetched from.
func (b *bench) SetUp(ctx context.Context) error {
	if err := errors.Join(cluster.Check(), machine.Check()); err != nil {
		return err
	}
	if b.rounds < 1 || b.rate < 0 {
		return errors.New("there must be at least one round, and a rate of at least 0")
	}
	return b.lab.setUp(ctx, b.rate*1_000_000)
}

// Dump has nothing to write: errors hold what machines said.
func (b *bench) Dump(io.Writer) {}

// Close removes the machines.
func (b *bench) Close() error { return b.lab.close() }

// Title says on what was measured, and how the values are to be read.
func (b *bench) Title() string {
	k := "the stand-in for k3s"
	if b.lab.k3s.Real {
		k = "a real k3s"
	}
	return fmt.Sprintf("From machine to node, %s %s, %s, medians (least to most) of %d rounds", k, b.lab.k3s.Version, report.Machine(), b.rounds)
}

// Rows are what was measured.
func (b *bench) Rows() *report.Table { return &b.table }
