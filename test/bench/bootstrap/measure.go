package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/machine"
)

// The promises that are held here.
const (
	ratioTarget    = 2.0             // times faster than the script, with downloads
	overheadTarget = time.Second     // of our own, with everything present
	memoryTarget   = 80 << 20        // bytes, while streaming gigabytes
	binaryTarget   = 45_000_000      // bytes, stripped
	downloadTarget = 15_000_000      // bytes, compressed
	runTimeout     = 5 * time.Minute // of one run on a machine
	highWaterPoll  = 20 * time.Millisecond
)

//go:embed baseline.sh
var baseline []byte

type bench struct {
	options
	lab   lab
	table report.Table
}

// timings are by phase or step; "total" is from the start of the program to its
// end, as seen from outside.
type timings map[string]time.Duration

const total = "total"

// cpu is the processor's time, the children's included.
const cpu = "cpu"

// ours runs bootstrap on a machine.
func (b *bench) ours(ctx context.Context, m *machine.Machine, watch func(pid int)) (timings, bootstrap.Result, error) {
	var result bootstrap.Result
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	cmd := m.Command(ctx, "env", "AWS_ENDPOINT_URL="+b.lab.url, "bootstrap", "run", "-o", "json")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, result, err
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for watch != nil {
			watch(cmd.Process.Pid)
			select {
			case <-stop:
				return
			case <-time.After(highWaterPoll):
			}
		}
	}()
	err := cmd.Wait()
	took := time.Since(began)
	close(stop)
	<-done
	if err != nil {
		return nil, result, fmt.Errorf("bootstrap run: %w\n%s", err, said.String())
	}
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		return nil, result, err
	}
	t := timings{total: took, cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	for _, p := range result.Phases {
		t[string(p.Name)] += time.Duration(p.DurationMS) * time.Millisecond
	}
	return t, result, nil
}

// theirs runs the script.
func (b *bench) theirs(ctx context.Context, m *machine.Machine) (timings, error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	began := time.Now()
	cmd := m.Command(ctx, "sh", "/opt/bench/baseline.sh", "/opt/bench/list")
	out, err := cmd.Output()
	t := timings{total: time.Since(began), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return nil, fmt.Errorf("baseline.sh: %w after\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		ms, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("baseline.sh said %q", line)
		}
		t[name] = time.Duration(ms) * time.Millisecond
	}
	return t, nil
}

// activation is how long systemd says that k3s took to start.
func activation(ctx context.Context, m *machine.Machine) (time.Duration, error) {
	out, err := m.Exec(ctx, "systemctl", "show", "--property=InactiveExitTimestampMonotonic", "--property=ActiveEnterTimestampMonotonic", "k3s.service")
	if err != nil {
		return 0, err
	}
	at := map[string]time.Duration{}
	for line := range strings.Lines(out) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), "=")
		us, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("systemd said %q", line)
		}
		at[name] = time.Duration(us) * time.Microsecond
	}
	return at["ActiveEnterTimestampMonotonic"] - at["InactiveExitTimestampMonotonic"], nil
}

// own is what is not k3s's: all but waiting for its start and for the node.
func (t timings) own() time.Duration { return t[total] - t["start"] - t["ready"] }

func medianOf(all []timings, of func(timings) time.Duration) time.Duration {
	var ds []time.Duration
	for _, t := range all {
		ds = append(ds, of(t))
	}
	return report.Median(ds)
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// spread is the median of some timings with the least and the most.
func spread(all []timings, of func(timings) time.Duration) string {
	var ds []time.Duration
	for _, t := range all {
		ds = append(ds, of(t))
	}
	return fmt.Sprintf("%s (%.2f to %.2f)", seconds(report.Median(ds)), slices.Min(ds).Seconds(), slices.Max(ds).Seconds())
}

// phases are the medians of our phases.
func phases(all []timings) string {
	var out []string
	for _, p := range bootstrap.PhaseNames() {
		out = append(out, fmt.Sprintf("%s %d", p, medianOf(all, func(t timings) time.Duration { return t[string(p)] }).Milliseconds()))
	}
	return strings.Join(out, ", ") + " ms"
}

// on does something on a machine of its own, which is gone afterwards.
func (b *bench) on(ctx context.Context, baked bool, do func(*machine.Machine) error) (err error) {
	m, err := b.lab.boot(ctx, baked)
	if m != nil {
		defer func() { err = errors.Join(err, b.lab.remove(ctx, m)) }()
	}
	if err == nil {
		err = do(m)
	}
	if err != nil && m != nil && b.verbose {
		journal, _ := m.Journal(context.WithoutCancel(ctx), "k3s.service")
		fmt.Fprintln(os.Stderr, journal[max(0, len(journal)-4000):])
	}
	return err
}

// compared runs bootstrap and the script in turns, each time on a new machine.
func compared(ctx context.Context, b *bench, baked bool) (us, them []timings, second []timings, err error) {
	for i := range b.rounds {
		turns := []func() error{
			func() error {
				return b.on(ctx, baked, func(m *machine.Machine) error {
					t, _, err := b.ours(ctx, m, nil)
					if err != nil {
						return err
					}
					if t["k3s"], err = activation(ctx, m); err != nil {
						return err
					}
					us = append(us, t)
					b.say("bootstrap: %v", t)
					again, result, err := b.ours(ctx, m, nil)
					if err == nil && result.Changed {
						err = errors.New("the second run changed something")
					}
					second = append(second, again)
					b.say("bootstrap again: %v", again)
					return err
				})
			},
			func() error {
				return b.on(ctx, baked, func(m *machine.Machine) error {
					t, err := b.theirs(ctx, m)
					them = append(them, t)
					b.say("script: %v", t)
					return err
				})
			},
		}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			if err := turn(); err != nil {
				return us, them, second, err
			}
		}
	}
	return us, them, second, nil
}

// upToK3s is a run's share before k3s runs: what both sides do, without the
// proof, which the script leaves out.
func upToK3s(t timings) time.Duration { return t.own() - t["prove"] }

// downloads is a fresh machine.
func downloads(ctx context.Context, b *bench) error {
	us, them, _, err := compared(ctx, b, false)
	if err != nil {
		return err
	}
	ours, theirs := medianOf(us, upToK3s), medianOf(them, upToK3s)
	b.table.Title(fmt.Sprintf("A fresh machine: %d MiB in %d files, %d MB/s per connection", b.lab.bytes()>>20, len(b.lab.artifacts), b.rate))
	b.table.Add("script: own share", spread(them, upToK3s), "")
	ratio := float64(theirs) / float64(ours)
	b.table.Hold("bootstrap: own share", spread(us, upToK3s), fmt.Sprintf("%.1f times faster", ratio), fmt.Sprintf("%.0f times", ratioTarget), ratio >= ratioTarget)
	fetch := func(t timings) time.Duration { return t["fetch"] }
	b.table.Add("script: downloads with digests", spread(them, fetch), "")
	b.table.Add("bootstrap: downloads with digests", spread(us, fetch), fmt.Sprintf("%.1f times faster", float64(medianOf(them, fetch))/float64(medianOf(us, fetch))))
	all := func(t timings) time.Duration { return t[total] }
	b.table.Add("script: to Node Ready", spread(them, all), "")
	b.table.Add("bootstrap: to Node Ready, and proven", spread(us, all), "")
	b.processor(us, them)
	b.table.Note("bootstrap's phases: " + phases(us))
	return nil
}

// processor is what both need of it, which says more than the clock on a busy
// machine.
func (b *bench) processor(us, them []timings) {
	of := func(t timings) time.Duration { return t[cpu] }
	b.table.Add("script: processor time", spread(them, of), "")
	b.table.Add("bootstrap: processor time", spread(us, of), "")
}

// bakedImage is a machine that has all files.
func bakedImage(ctx context.Context, b *bench) error {
	us, them, second, err := compared(ctx, b, true)
	if err != nil {
		return err
	}
	// Of the start, what is not k3s's own is ours.
	own := func(t timings) time.Duration { return t[total] - t["ready"] - t["k3s"] }
	b.table.Title("A machine whose image has everything")
	b.table.Hold("bootstrap: own overhead, proof included", spread(us, own), "", "under "+overheadTarget.String(), medianOf(us, own) < overheadTarget)
	b.table.Add("script: own overhead, without a proof", spread(them, timings.own), "")
	all := func(t timings) time.Duration { return t[total] }
	b.table.Add("script: to Node Ready", spread(them, all), "")
	b.table.Add("bootstrap: to Node Ready, and proven", spread(us, all), "")
	b.processor(us, them)
	b.table.Note("bootstrap's phases: " + phases(us))
	b.table.Hold("bootstrap: a second run, all of it", spread(second, all), "", "under "+overheadTarget.String(), medianOf(second, all) < overheadTarget)
	b.table.Note("its phases: " + phases(second))
	return nil
}

// memory is what bootstrap needs while it downloads gigabytes.
func memory(ctx context.Context, b *bench) error {
	return b.on(ctx, true, func(m *machine.Machine) error {
		if _, _, err := b.ours(ctx, m, nil); err != nil {
			return err
		}
		files, err := b.lab.blobFiles()
		if err != nil {
			return err
		}
		if err := m.WriteFile("/etc/hearth/node.yaml", b.lab.config(m.Name, files), 0o600); err != nil {
			return err
		}
		var peak int64
		t, _, err := b.ours(ctx, m, func(pid int) { peak = max(peak, highWater(pid)) })
		if err != nil {
			return err
		}
		b.table.Title("Downloading gigabytes")
		b.table.Hold(fmt.Sprintf("peak memory with %d files of %d MiB", blobs, blobSize>>20), mebi(peak), "fetched in "+seconds(t["fetch"]), "under "+mebi(memoryTarget), peak > 0 && peak < memoryTarget)
		return nil
	})
}

// highWater is the most memory that the bootstrap started by a process has had.
func highWater(pid int) int64 {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	var most int64
	for _, child := range strings.Fields(string(children)) {
		status, err := os.ReadFile("/proc/" + child + "/status")
		if err != nil || !bytes.HasPrefix(status, []byte("Name:\tbootstrap\n")) {
			continue
		}
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		if fields := strings.Fields(rest); len(fields) > 0 {
			kib, _ := strconv.ParseInt(fields[0], 10, 64)
			most = max(most, kib<<10)
		}
	}
	return most
}

// sizes are those of the binary, as it is shipped.
func sizes(ctx context.Context, b *bench) error {
	b.table.Title("The binary")
	for _, arch := range []string{"arm64", "amd64"} {
		path := filepath.Join(b.lab.dir, "bootstrap-"+arch)
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./cmd/bootstrap")
		build.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building bootstrap for %s: %w\n%s", arch, err, out)
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		b.table.Hold(arch+", stripped", mega(info.Size()), "", "at most "+mega(binaryTarget), info.Size() <= binaryTarget)
		for _, by := range []string{"gzip", "xz"} {
			if _, err := exec.LookPath(by); err != nil {
				continue
			}
			n, err := compressed(ctx, by, path)
			if err != nil {
				return err
			}
			b.table.Hold(arch+", as downloaded, "+by+" -9", mega(n), "", "at most "+mega(downloadTarget), n <= downloadTarget)
		}
	}
	return nil
}

func compressed(ctx context.Context, by, path string) (int64, error) {
	var n counter
	cmd := exec.CommandContext(ctx, by, "-9", "-c", path)
	cmd.Stdout = &n
	err := cmd.Run()
	return int64(n), err
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func mega(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func mebi(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (l *lab) bytes() (n int64) {
	for _, a := range l.artifacts {
		n += a.Size
	}
	return n
}

func (b *bench) say(format string, args ...any) {
	if b.verbose {
		fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
	}
}
