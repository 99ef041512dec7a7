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
	"flag"
	"time"

	"github.com/hearth-sh/hearth/test/bench/report"
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
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "pods started with each warmth")
	flag.IntVar(&b.restarts, "restarts", 5, "starts of the agent's pod")
	flag.DurationVar(&b.options.idle, "idle", time.Minute, "how long an idle agent is watched")
	flag.IntVar(&b.images, "images", 500, "images that are wanted at once, at most 2000")
	report.Main(b, sections, &b.verbose, deadline)
}

// The agent is watched while idle after it had work: that is when memory shows
// what it keeps.
var sections = []report.Section[*bench]{
	{Name: "start", Measure: starts},
	{Name: "warmth", Measure: warmth},
	{Name: "idle", Measure: idle},
	{Name: "images", Measure: manyImages},
}

// Title says on what was measured.
func (b *bench) Title() string {
	return "Hearth on a node of Kubernetes, " + report.Machine() + " shared by two nodes and the control plane"
}

// Rows are what was measured.
func (b *bench) Rows() *report.Table { return &b.table }
