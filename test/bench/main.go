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
	"strings"
	"text/tabwriter"
	"time"

	"github.com/hearth-sh/hearth/test/harness"
)

type options struct {
	functions int           // fresh functions per language for first requests
	idle      int           // functions that are idle when memory is measured
	load      time.Duration // of each throughput run
	kills     int           // requests per guest that runs into its deadline
	rounds    int           // turns of each compared pair
	compute   int           // rounds of the compute guest in one turn
	verbose   bool
}

func main() {
	var o options
	check := flag.Bool("check", false, "exit with status 1 when a target is missed")
	only := flag.String("only", "", "comma-separated sections to run (first, hit, warm, memory, deadline, compute, fresh); all when empty")
	flag.IntVar(&o.functions, "functions", 30, "fresh functions per language for the first request")
	flag.IntVar(&o.idle, "idle", 100, "idle functions when memory is measured")
	flag.DurationVar(&o.load, "load", 3*time.Second, "length of each throughput run")
	flag.IntVar(&o.kills, "kills", 20, "requests per guest that is stopped at its deadline")
	flag.IntVar(&o.rounds, "rounds", 5, "turns of each compared pair")
	flag.IntVar(&o.compute, "compute", 20, "work of the compute-bound guest per turn")
	flag.BoolVar(&o.verbose, "v", false, "print the output of the product too")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	missed, err := run(ctx, o, *only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	if missed > 0 && *check {
		fmt.Fprintf(os.Stderr, "bench: %d targets missed\n", missed)
		os.Exit(1)
	}
}

// section is one group of rows; it may use what earlier ones left behind.
type section struct {
	name    string
	measure func(context.Context, *bench) error
}

var sections = []section{
	{"first", firstRequests},
	{"hit", storeHits},
	{"warm", warmRequests},
	{"fresh", freshProcesses},
	{"deadline", deadlines},
	{"compute", computeBound},
	{"memory", idleMemory},
}

// bench is one run.
type bench struct {
	options
	dev   *harness.Dev
	dir   string
	table table
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
	begin, loadBefore := time.Now(), loadAverage()
	for _, s := range sections {
		if only != "" && !strings.Contains(","+only+",", ","+s.name+",") {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s …\n", s.name)
		if err := s.measure(ctx, b); err != nil {
			if o.verbose {
				fmt.Fprintln(os.Stderr, b.dev.Output())
			}
			return 0, fmt.Errorf("measuring %s: %w", s.name, err)
		}
	}
	if o.verbose {
		fmt.Fprintln(os.Stderr, b.dev.Output())
	}
	fmt.Printf("Hearth on %s/%s, %d CPUs, %s, took %v, load average %s before and %s after\n\n", runtime.GOOS, runtime.GOARCH,
		runtime.NumCPU(), runtime.Version(), time.Since(begin).Round(time.Second), loadBefore, loadAverage())
	return b.table.print(), nil
}

// loadAverage is that of the last minute: more than there are CPUs before the
// run means that others were at work and times say little.
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	minute, _, _ := strings.Cut(string(b), " ")
	return minute
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

// row is one line of the table.
type row struct{ what, value, relation, target, verdict string }

type table struct{ rows []row }

// add appends a row without a target.
func (t *table) add(what, value, relation string) {
	t.rows = append(t.rows, row{what: what, value: value, relation: relation})
}

// hold appends a row that has a target.
func (t *table) hold(what, value, relation, target string, ok bool) {
	verdict := "ok"
	if !ok {
		verdict = "MISSED"
	}
	t.rows = append(t.rows, row{what, value, relation, target, verdict})
}

// title starts a group.
func (t *table) title(what string) { t.rows = append(t.rows, row{what: "\n" + what}) }

func (t *table) print() (missed int) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tmeasured\tin relation\ttarget\t")
	for _, r := range t.rows {
		if title, ok := strings.CutPrefix(r.what, "\n"); ok {
			fmt.Fprintf(w, "\t\t\t\t\n%s\t\t\t\t\n", title)
			continue
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%s\n", r.what, r.value, r.relation, r.target, r.verdict)
		if r.verdict == "MISSED" {
			missed++
		}
	}
	if err := w.Flush(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	return missed
}
