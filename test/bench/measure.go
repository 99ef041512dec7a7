package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

// The promises that are held here.
const (
	firstTargetC   = 3 * time.Millisecond  // p50, after ready
	firstTargetGo  = 15 * time.Millisecond // p50, after ready
	hitTarget      = 15.0                  // times faster than compiling
	memoryTarget   = 20 << 20              // bytes that 100 idle functions add
	latenessTarget = 50 * time.Millisecond // beyond the control's
	computeTarget  = 0.20                  // slower than plain wazero
)

// languages are the guests everything is measured with.
var languages = []struct{ name, guest string }{{"C", "hello"}, {"Go", "hello-go"}}

// variant is the n-th of many modules of one guest that differ in a constant,
// so that each is code nobody has seen before.
func variant(ctx context.Context, guest string, n int) ([]byte, error) {
	path, err := guests.Compile(ctx, guest)
	if err != nil {
		return nil, err
	}
	module, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if guest == "hello" {
		return guests.Mark(module, fmt.Sprintf("Hello, number %d", n))
	}
	old, fresh := []byte("Hello, %s, from Go!\n"), fmt.Appendf(nil, "Hello, %%s, no %04d!\n", n)
	if len(old) != len(fresh) || bytes.Count(module, old) != 1 {
		return nil, fmt.Errorf("%s does not hold its greeting exactly once", guest)
	}
	return bytes.Replace(module, old, fresh, 1), nil
}

// submit deploys a module and wants it ready.
func (b *bench) submit(ctx context.Context, name string, module []byte, query string) (v1alpha1.Function, time.Duration, error) {
	a, err := b.dev.Submit(ctx, name, module, query, nil)
	if err != nil {
		return v1alpha1.Function{}, 0, err
	}
	f, err := a.Function()
	if err == nil && f.State != v1alpha1.StateReady {
		err = fmt.Errorf("%s is not ready: %s", name, a.Body)
	}
	return f, a.Took, err
}

func (b *bench) remove(ctx context.Context, name string) error {
	a, err := b.dev.Do(ctx, http.MethodDelete, "/v1/functions/"+name, nil, nil)
	if err == nil && a.Status != http.StatusNoContent {
		err = fmt.Errorf("deleting %s: %s", name, a)
	}
	return err
}

// get is one request that must succeed.
func get(ctx context.Context, client *http.Client, url string) (time.Duration, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	start := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	took := time.Since(start)
	if err != nil {
		return 0, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, nil, fmt.Errorf("GET %s: %s %s", url, resp.Status, body)
	}
	return took, resp.Header, nil
}

// client is a keep-alive client of its own with n connections.
func (b *bench) client(n int) *http.Client {
	dialer := &net.Dialer{}
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", b.dev.Address)
		},
		MaxIdleConnsPerHost: n, MaxConnsPerHost: n, DisableCompression: true,
	}}
}

var timingEntry = regexp.MustCompile(`([a-z]+);(?:[^,]*;)?dur=([0-9.]+)`)

// serverTiming reads durations out of a Server-Timing header.
func serverTiming(h http.Header) map[string]time.Duration {
	out := map[string]time.Duration{}
	for _, m := range timingEntry.FindAllStringSubmatch(strings.Join(h.Values("Server-Timing"), ","), -1) {
		if v, err := strconv.ParseFloat(m[2], 64); err == nil {
			out[m[1]] = time.Duration(v * float64(time.Millisecond))
		}
	}
	return out
}

// firstRequests deploys functions nobody has seen and asks each once, over a
// new connection, as soon as its submit says ready.
func firstRequests(ctx context.Context, b *bench) error {
	for _, lang := range languages {
		var first, total []time.Duration
		phases := map[string][]time.Duration{}
		server := map[string][]time.Duration{}
		var order []string
		for i := range b.functions {
			name := fmt.Sprintf("first-%s-%d", strings.ToLower(lang.name), i)
			module, err := variant(ctx, lang.guest, i)
			if err != nil {
				return err
			}
			f, took, err := b.submit(ctx, name, module, "")
			if err != nil {
				return err
			}
			client := b.client(1)
			asked, header, err := get(ctx, client, b.dev.HostURL(name, "/"))
			client.CloseIdleConnections()
			if err != nil {
				return err
			}
			if i == 0 {
				continue // starts the tenant's worker and fills caches of the machine
			}
			first, total = append(first, asked), append(total, took)
			for _, p := range f.Phases {
				if phases[p.Name] == nil {
					order = append(order, p.Name)
				}
				phases[p.Name] = append(phases[p.Name], time.Duration(p.Milliseconds*float64(time.Millisecond)))
			}
			for k, v := range serverTiming(header) {
				server[k] = append(server[k], v)
			}
		}
		b.table.Title(fmt.Sprintf("First request ever to a submitted %s function (%d functions, new connection)", lang.name, len(first)))
		target := firstTargetC
		if lang.name == "Go" {
			target = firstTargetGo
		}
		p50 := report.Quantile(first, 0.5)
		b.table.Hold("p50", report.Milliseconds(p50), "", "≤ "+report.Milliseconds(target), p50 <= target)
		b.table.Add("p99", report.Milliseconds(report.Quantile(first, 0.99)), report.Times(report.Quantile(first, 0.99), p50)+" p50")
		for _, k := range []string{"queue", "load", "instantiate", "firstbyte"} {
			b.table.Add("  Server-Timing "+k+" p50", report.Milliseconds(report.Quantile(server[k], 0.5)), "")
		}
		b.table.Title(fmt.Sprintf("Submit to ready, %s function, median of %d", lang.name, len(total)))
		whole := report.Quantile(total, 0.5)
		b.table.Add("whole", report.Milliseconds(whole), "")
		for _, p := range order {
			v := report.Quantile(phases[p], 0.5)
			b.table.Add("  "+p, report.Milliseconds(v), fmt.Sprintf("%.0f %%", 100*float64(v)/float64(whole)))
		}
	}
	return nil
}

// storeHits deploys modules again that the store has compiled before.
func storeHits(ctx context.Context, b *bench) error {
	b.table.Title("Compiled before against compiling")
	for _, lang := range languages {
		// A deleted function's object stays in the store until the space is
		// needed, so the second submit of the same bytes finds it.
		var first, second, loads, compiles []time.Duration
		for i := range max(3, b.rounds) {
			name := fmt.Sprintf("hit-%s-%d", strings.ToLower(lang.name), i)
			module, err := variant(ctx, lang.guest, 5000+i)
			if err != nil {
				return err
			}
			for again := range 2 {
				f, took, err := b.submit(ctx, name, module, "")
				if err != nil {
					return err
				}
				compiled := false
				for _, p := range f.Phases {
					v := time.Duration(p.Milliseconds * float64(time.Millisecond))
					switch p.Name {
					case "compile":
						compiled = v > 0
						if again == 0 {
							compiles = append(compiles, v)
						}
					case "load":
						if again == 1 {
							loads = append(loads, v)
						}
					}
				}
				if again == 1 && compiled {
					return fmt.Errorf("%s was compiled again although the store had it: %v", name, f.Phases)
				}
				if again == 0 {
					first = append(first, took)
				} else {
					second = append(second, took)
				}
				if err := b.remove(ctx, name); err != nil {
					return err
				}
			}
		}
		compile, load := report.Quantile(compiles, 0.5), report.Quantile(loads, 0.5)
		ratio := float64(compile) / float64(max(load, 1))
		b.table.Hold(lang.name+": load of a store hit", report.Milliseconds(load), fmt.Sprintf("compile %s, %.1f× faster", report.Milliseconds(compile), ratio), fmt.Sprintf("≥ %.0f×", hitTarget), ratio >= hitTarget)
		b.table.Add(lang.name+": submit of known bytes", report.Milliseconds(report.Quantile(second, 0.5)), "first submit "+report.Milliseconds(report.Quantile(first, 0.5)))
	}
	return nil
}

// warmRequests asks one function again and again.
func warmRequests(ctx context.Context, b *bench) error {
	for _, lang := range languages {
		name := "warm-" + strings.ToLower(lang.name)
		module, err := variant(ctx, lang.guest, 6000)
		if err != nil {
			return err
		}
		if _, _, err := b.submit(ctx, name, module, ""); err != nil {
			return err
		}
		b.table.Title("Warm requests, " + lang.name + " function, keep-alive")
		var one float64
		for _, connections := range []int{1, 8} {
			took, err := b.throughput(ctx, name, connections)
			if err != nil {
				return err
			}
			rps := float64(len(took)) / b.load.Seconds()
			relation := ""
			if connections == 1 {
				b.warm[lang.name] = report.Quantile(took, 0.5)
				one = rps
			} else {
				relation = fmt.Sprintf("%.1f× one connection", rps/one)
			}
			b.table.Add(fmt.Sprintf("%d connections: p50", connections), report.Milliseconds(report.Quantile(took, 0.5)), "")
			b.table.Add(fmt.Sprintf("%d connections: p99", connections), report.Milliseconds(report.Quantile(took, 0.99)), "")
			b.table.Add(fmt.Sprintf("%d connections: requests per second", connections), fmt.Sprintf("%.0f", rps), relation)
		}
	}
	return nil
}

func (b *bench) throughput(ctx context.Context, name string, connections int) ([]time.Duration, error) {
	client := b.client(connections)
	defer client.CloseIdleConnections()
	url := b.dev.HostURL(name, "/")
	for range 50 {
		if _, _, err := get(ctx, client, url); err != nil {
			return nil, err
		}
	}
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	var group sync.WaitGroup
	end := time.Now().Add(b.load)
	for range connections {
		group.Go(func() {
			var mine []time.Duration
			var err error
			for err == nil && time.Now().Before(end) {
				var took time.Duration
				if took, _, err = get(ctx, client, url); err == nil {
					mine = append(mine, took)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all, failed = append(all, mine...), errors.Join(failed, err)
		})
	}
	group.Wait()
	return all, failed
}

// freshProcesses runs the same Wasm as a process per request, wazero's own
// file cache warmed.
func freshProcesses(ctx context.Context, b *bench) error {
	root, err := guests.Root()
	if err != nil {
		return err
	}
	program, cache := filepath.Join(b.dir, "freshprocess"), filepath.Join(b.dir, "wazero-cache")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "./test/bench/freshprocess")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building freshprocess: %w\n%s", err, out)
	}
	b.table.Title("The same Wasm as a fresh process per request (wazero with its own cache, warmed)")
	for _, lang := range languages {
		module, err := variant(ctx, lang.guest, 6000)
		if err != nil {
			return err
		}
		path := filepath.Join(b.dir, lang.guest+".wasm")
		if err := os.WriteFile(path, module, 0o644); err != nil {
			return err
		}
		var took []time.Duration
		for i := range 10 * b.rounds {
			cmd := exec.CommandContext(ctx, program, cache, path)
			cmd.Env = []string{"REQUEST_METHOD=GET", "PATH_INFO=/", "QUERY_STRING=", "GATEWAY_INTERFACE=CGI/1.1"}
			start := time.Now()
			out, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("running %s: %w", lang.guest, err)
			}
			if !bytes.Contains(out, []byte("Hello")) {
				return fmt.Errorf("%s said %q", lang.guest, out)
			}
			if i > 0 { // the first one compiles
				took = append(took, time.Since(start))
			}
		}
		relation := ""
		if warm := b.warm[lang.name]; warm > 0 {
			relation = report.Times(report.Quantile(took, 0.5), warm) + " a warm request"
		}
		b.table.Add(lang.name+": p50", report.Milliseconds(report.Quantile(took, 0.5)), relation)
		b.table.Add(lang.name+": p99", report.Milliseconds(report.Quantile(took, 0.99)), "")
	}
	return nil
}

// lateness is what one guest's requests and the control's turns between them
// were late by.
type lateness struct {
	guest           string
	guests, control []time.Duration
}

// deadlines asks guests that never end and measures how long after their
// deadline the answer has arrived at the client. Before each request the
// control has a turn of the same length, and what is held is how much later
// the guests are than it: on a machine that others keep busy no program gets a
// processor at the moment it wants one.
func deadlines(ctx context.Context, b *bench) error {
	const deadline = 200 * time.Millisecond
	bystander, err := variant(ctx, "hello", 7000)
	if err != nil {
		return err
	}
	if _, _, err := b.submit(ctx, "bystander", bystander, ""); err != nil {
		return err
	}
	c, err := newControl()
	if err != nil {
		return err
	}
	defer c.close()
	stop, err := startBurners(ctx, b.burners)
	if err != nil {
		return err
	}
	defer stop()
	var all []lateness
	var control []time.Duration
	for _, guest := range []string{"spin", "call-tree", "bulk-fill", "recurse-spin", "zero-writes", "entropy-flood", "sleep", "go-spin"} {
		path, err := guests.Compile(ctx, guest)
		if err != nil {
			return err
		}
		module, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := "late-" + guest
		if _, _, err := b.submit(ctx, name, module, fmt.Sprintf("?timeoutMs=%d", deadline.Milliseconds())); err != nil {
			return err
		}
		l := lateness{guest: guest}
		for range b.kills {
			l.control = append(l.control, c.turn(deadline))
			a, err := b.dev.Do(ctx, http.MethodGet, b.dev.PathURL(name, "/"), nil, nil)
			if err != nil {
				return err
			}
			if a.Status != http.StatusGatewayTimeout {
				return fmt.Errorf("%s: want 504, got %s", guest, a)
			}
			l.guests = append(l.guests, a.Took-deadline)
		}
		all, control = append(all, l), append(control, l.control...)
	}
	b.table.Title(fmt.Sprintf("How late after its deadline (%v) a guest is stopped, seen by the client, %d requests each, beside %d busy programs",
		deadline, b.kills, b.burners))
	spread := func(d []time.Duration) string {
		return fmt.Sprintf("p50 %s, p99 %s", report.Milliseconds(report.Quantile(d, 0.5)), report.Milliseconds(report.Quantile(d, 0.99)))
	}
	worst := report.Quantile(control, 1)
	b.table.Add("control, a native thread: worst", report.Milliseconds(worst), spread(control))
	for _, l := range all {
		late := report.Quantile(l.guests, 1)
		b.table.Hold(l.guest+": worst", report.Milliseconds(late), spread(l.guests)+"; control between "+report.Milliseconds(report.Quantile(l.control, 1)),
			"≤ "+report.Milliseconds(latenessTarget)+" after the control's", late-worst <= latenessTarget)
	}
	return nil
}

// computeBound runs the same work on Hearth, whose worker's processor time it
// reads, and in this process on plain wazero and on wazero with
// WithCloseOnContextDone, in turns.
func computeBound(ctx context.Context, b *bench) error {
	path, err := guests.Compile(ctx, "compute")
	if err != nil {
		return err
	}
	module, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if _, _, err := b.submit(ctx, "compute", module, "?timeoutMs=300000"); err != nil {
		return err
	}
	plain, err := newRunner(ctx, module, false)
	if err != nil {
		return err
	}
	defer plain.Close(ctx)
	checked, err := newRunner(ctx, module, true)
	if err != nil {
		return err
	}
	defer checked.Close(ctx)

	b.table.Title(fmt.Sprintf("A compute-bound C guest, processor time, best of %d turns", b.rounds))
	for _, kernel := range []string{"", "-sieve", "-product", "-fib", "-hash"} {
		query := strconv.Itoa(b.compute) + kernel
		var hearths, plains, checks []time.Duration
		for turn := range b.rounds {
			before := b.dev.CPU("worker")
			a, err := b.dev.Do(ctx, http.MethodGet, b.dev.PathURL("compute", "/?"+query), nil, nil)
			if err != nil {
				return err
			}
			if a.Status != http.StatusOK {
				return fmt.Errorf("compute: %s", a)
			}
			hearths = append(hearths, b.dev.CPU("worker")-before)
			for runner, took := range map[*runner]*[]time.Duration{plain: &plains, checked: &checks} {
				if runner == checked && (turn > 0 || kernel != "") {
					continue // many times slower; one turn shows that
				}
				before := ownCPU()
				out, _, err := runner.run(ctx, query)
				if err != nil {
					return err
				}
				if !bytes.HasSuffix(bytes.TrimSpace(out), bytes.TrimSpace(a.Body)) {
					return fmt.Errorf("results differ: %q here, %q from Hearth", out, a.Body)
				}
				*took = append(*took, ownCPU()-before)
			}
		}
		hearth, bare := report.Quantile(hearths, 0), report.Quantile(plains, 0)
		overhead := float64(hearth)/float64(bare) - 1
		relation := fmt.Sprintf("%+.0f %% against plain wazero's %s", 100*overhead, report.Milliseconds(bare))
		if kernel != "" {
			b.table.Add("  of this, "+kernel[1:], report.Milliseconds(hearth), relation)
			continue
		}
		b.table.Hold("Hearth, can be stopped at any time", report.Milliseconds(hearth), relation, fmt.Sprintf("≤ +%.0f %%", 100*computeTarget), overhead <= computeTarget)
		b.table.Add("wazero WithCloseOnContextDone", report.Milliseconds(report.Quantile(checks, 0)), fmt.Sprintf("%.1f× plain wazero", float64(report.Quantile(checks, 0))/float64(bare)))
	}
	return nil
}

// ownCPU is the processor time this process has used. Unlike wall-clock time
// it says the same on a machine where others are at work too.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// runner runs one module in this process.
type runner struct {
	wazero.Runtime
	module wazero.CompiledModule
}

func newRunner(ctx context.Context, module []byte, closeOnDone bool) (*runner, error) {
	r := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigCompiler().WithCloseOnContextDone(closeOnDone))
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, r); err != nil {
		return nil, err
	}
	compiled, err := r.CompileModule(experimental.WithCompilationWorkers(ctx, 2), module)
	if err != nil {
		return nil, err
	}
	return &runner{Runtime: r, module: compiled}, nil
}

func (r *runner) run(ctx context.Context, query string) ([]byte, time.Duration, error) {
	// The checks of WithCloseOnContextDone are made for a context that can end.
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	var out bytes.Buffer
	config := wazero.NewModuleConfig().WithName("").WithStdout(&out).WithEnv("QUERY_STRING", query)
	start := time.Now()
	m, err := r.InstantiateModule(ctx, r.module, config)
	took := time.Since(start)
	var exit *sys.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 0) {
		return nil, 0, err
	}
	if m != nil {
		err = m.Close(ctx)
	} else {
		err = nil
	}
	return out.Bytes(), took, err
}

// idleMemory deploys many functions on a product of its own and looks at what
// each adds to all processes together once nothing happens any more.
func idleMemory(ctx context.Context, b *bench) error {
	main := b.dev
	defer func() { b.dev = main }()
	b.table.Title(fmt.Sprintf("Memory of the whole process tree with %d idle functions", b.idle))
	for _, lang := range languages {
		d, err := b.start(ctx, main.Binary, "memory")
		if err != nil {
			return err
		}
		b.dev = d
		err = b.memoryOf(ctx, lang.name, lang.guest)
		d.KillAll()
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) memoryOf(ctx context.Context, language, guest string) error {
	// One function first, so that the worker process is in the base.
	deploy := func(i int) error {
		module, err := variant(ctx, guest, i)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("idle-%d", i)
		if _, _, err := b.submit(ctx, name, module, ""); err != nil {
			return err
		}
		_, _, err = get(ctx, b.dev.HTTP, b.dev.HostURL(name, "/"))
		return err
	}
	if err := deploy(0); err != nil {
		return err
	}
	before, err := b.calm(ctx)
	if err != nil {
		return err
	}
	for i := 1; i <= b.idle; i++ {
		if err := deploy(i); err != nil {
			return err
		}
	}
	after, err := b.calm(ctx)
	if err != nil {
		return err
	}
	each := func(before, after uint64) uint64 { return (max(after, before) - before) / uint64(b.idle) }
	pss := each(before.PSS, after.PSS)
	b.table.Hold(language+": each function adds (PSS)", mib(pss), fmt.Sprintf("all together %s → %s", mib(before.PSS), mib(after.PSS)), "< "+mib(memoryTarget), pss < memoryTarget)
	b.table.Add(language+": each function adds (RSS)", mib(each(before.RSS, after.RSS)), fmt.Sprintf("all together %s → %s", mib(before.RSS), mib(after.RSS)))
	return nil
}

// calm waits until memory has stopped changing, half a minute at most, and
// returns the last look.
func (b *bench) calm(ctx context.Context) (harness.Memory, error) {
	var last harness.Memory
	for range 15 {
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-time.After(2 * time.Second):
		}
		now, err := b.dev.Memory()
		if err != nil {
			return last, err
		}
		change := int64(now.PSS) - int64(last.PSS)
		last = now
		if max(change, -change) < 1<<20 {
			break
		}
	}
	return last, nil
}

func mib(n uint64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
