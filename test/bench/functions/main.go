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
	"flag"
	"io"
	"time"

	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/chart"
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
	b := &bench{}
	flag.IntVar(&b.submits, "submits", 30, "submits one after the other, and half as many Deployments")
	flag.IntVar(&b.concurrent, "concurrent", 50, "submits at once")
	flag.IntVar(&b.tenants, "tenants", 10, "tenants that functions are of")
	flag.IntVar(&b.functions, "functions", 1000, "functions that are there when reads are measured")
	flag.IntVar(&b.reads, "reads", 2000, "reads of each kind")
	report.Main(b, sections, &b.verbose, deadline)
}

var sections = []report.Section[*bench]{
	{Name: "submit", Measure: submits},
	{Name: "concurrent", Measure: concurrentSubmits},
	{Name: "many", Measure: manyFunctions},
}

// Title says on what was measured.
func (b *bench) Title() string {
	return "Functions on a cluster, " + report.Machine() + " shared by three nodes, control plane and registry"
}

// Rows are what was measured.
func (b *bench) Rows() *report.Table { return &b.table }

// Dump writes what the pods said.
func (b *bench) Dump(w io.Writer) {
	if b.cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	chart.Dump(ctx, b.cluster, w)
}
