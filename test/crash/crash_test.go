// Package crash kills the product at random while it is in use and then holds
// it to its promise: what was acknowledged is there and answers, exactly once,
// and everything else recovers by itself.
//
//	go test ./test/crash                              one minute
//	go test ./test/crash -timeout 0 -crash.duration 8h    as long as you like
package crash

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

var (
	duration = flag.Duration("crash.duration", time.Minute, "how long processes are killed")
	seed     = flag.Uint64("crash.seed", 0, "seed of what is killed when; 0 takes a fresh one, which is printed")
)

const (
	// writers submit at the same time, each to functions of its own, so that
	// the order of one function's revisions is known.
	writers            = 3
	functionsPerWriter = 3
	// settle is how long recovery may take once nothing is killed any more.
	settle = 2 * time.Minute
	// orphanBound is how long children may outlive a killed parent.
	orphanBound = 10 * time.Second
	// attemptTimeout bounds one HTTP call of a writer; it then tries again.
	attemptTimeout = 20 * time.Second
	// retryPause is between two attempts of one submit.
	retryPause = 50 * time.Millisecond
)

// world is the product under test, restarted whenever its parent was killed.
type world struct {
	t       *testing.T
	options harness.Options
	dev     atomic.Pointer[harness.Dev]

	mu    sync.Mutex
	kills map[string]int
}

// restart starts the product on the same data directory and address.
func (w *world) restart(ctx context.Context) error {
	d, err := harness.Start(ctx, w.options)
	if err != nil {
		return err
	}
	w.options.Listen = d.Address
	w.dev.Store(d)
	return nil
}

// killOne kills one random process. A killed parent is started again once its
// children have ended by themselves.
func (w *world) killOne(ctx context.Context, random *rand.Rand) error {
	d := w.dev.Load()
	processes := d.Processes()
	if len(processes) == 0 {
		return fmt.Errorf("every process is gone without being killed:\n%s", d.Output())
	}
	// Roles are equally likely however many processes have them.
	byRole := map[string][]harness.Process{}
	for _, p := range processes {
		byRole[p.Role] = append(byRole[p.Role], p)
	}
	roles := slices.Sorted(maps.Keys(byRole))
	of := byRole[roles[random.IntN(len(roles))]]
	victim := of[random.IntN(len(of))]
	if victim.PID != d.PID() {
		if err := syscall.Kill(victim.PID, syscall.SIGKILL); errors.Is(err, syscall.ESRCH) {
			return nil // it ended meanwhile
		} else if err != nil {
			return fmt.Errorf("killing %v: %w", victim, err)
		}
		w.count(victim.Role)
		return nil
	}
	d.Kill()
	w.count(victim.Role)
	gone, cancel := context.WithTimeout(ctx, orphanBound)
	defer cancel()
	if err := d.WaitGone(gone); err != nil {
		d.KillAll()
		return fmt.Errorf("the parent was killed, its children go on: %w", err)
	}
	return w.restart(ctx)
}

func (w *world) count(role string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kills[role]++
}

// function is what a writer knows of one function.
type function struct {
	name     string
	submits  int // logical submits since it was last deleted; each must make one revision
	text     string
	deleted  bool
	attempts int
}

// tally counts over all writers.
type tally struct{ submits, acknowledged, attempts, deletes, async atomic.Int64 }

func TestNothingAcknowledgedIsLost(t *testing.T) {
	if testing.Short() {
		t.Skip("kills processes for a minute, which -short leaves out")
	}
	dir := t.TempDir()
	binary, err := harness.Binary(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("-crash.seed %d", *seed)
	w := &world{t: t, options: harness.Options{Binary: binary, DataDir: filepath.Join(dir, "data")}, kills: map[string]int{}}
	if err := os.Mkdir(w.options.DataDir, 0o755); err != nil {
		t.Fatal(err)
	}
	hello := guests.Read(t, "hello")
	if err := w.restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.dev.Load().KillAll()
		if t.Failed() {
			out := w.dev.Load().Output()
			t.Logf("--- last output of nodeagent dev ---\n%s", out[max(0, len(out)-32<<10):])
		}
	})

	// Writers end when stop is closed, but only after what they have begun
	// is acknowledged: afterwards nothing is undecided.
	stop := make(chan struct{})
	var all []*function
	var counts tally
	var group sync.WaitGroup
	for i := range writers {
		random := rand.New(rand.NewPCG(*seed, uint64(i+1)))
		var mine []*function
		for j := range functionsPerWriter {
			mine = append(mine, &function{name: fmt.Sprintf("crash-%d-%d", i, j), deleted: true})
		}
		all = append(all, mine...)
		group.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				f := mine[random.IntN(len(mine))]
				if err := w.write(f, hello, random, &counts); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}

	random := rand.New(rand.NewPCG(*seed, 0))
	for end := time.Now().Add(*duration); time.Now().Before(end) && !t.Failed(); {
		// Bursts and calm alike: from several kills within one submit to
		// enough time for everything to come up.
		time.Sleep(time.Duration(random.ExpFloat64() * float64(700*time.Millisecond)))
		if err := w.killOne(t.Context(), random); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	group.Wait()

	kills := 0
	var byRole []string
	for _, role := range slices.Sorted(maps.Keys(w.kills)) {
		kills += w.kills[role]
		byRole = append(byRole, fmt.Sprintf("%s %d", role, w.kills[role]))
	}
	fmt.Printf("crash: %d kills (%s); %d submits (%d asynchronous) in %d attempts, %d acknowledged; %d deletes\n",
		kills, strings.Join(byRole, ", "), counts.submits.Load(), counts.async.Load(), counts.attempts.Load(), counts.acknowledged.Load(), counts.deletes.Load())
	if t.Failed() {
		return
	}
	if kills == 0 || counts.acknowledged.Load() == 0 {
		t.Error("nothing was tested: no kill or no acknowledged submit")
	}

	w.verify(all)
	// The same again after an orderly stop: what answered from memory must
	// also be on disk.
	if _, err := w.dev.Load().Stop(); err != nil {
		t.Error(err)
	}
	if err := w.restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.verify(all)
	w.clean()
	if _, err := w.dev.Load().Stop(); err != nil {
		t.Error(err)
	}
}

// write makes one logical change and tries until it is acknowledged.
func (w *world) write(f *function, hello []byte, random *rand.Rand, counts *tally) error {
	f.attempts++
	key := fmt.Sprintf(`"%s-%d-%x"`, f.name, f.attempts, random.Uint64())
	if !f.deleted && random.IntN(12) == 0 {
		if err := w.insist(counts, http.MethodDelete, "/v1/functions/"+f.name, nil, http.Header{"Idempotency-Key": {key}}, nil); err != nil {
			return fmt.Errorf("deleting %s: %w", f.name, err)
		}
		counts.deletes.Add(1)
		f.deleted, f.submits = true, 0
		return nil
	}

	text := fmt.Sprintf("%s change %d", f.name, f.attempts)
	module, err := guests.Mark(hello, text)
	if err != nil {
		return err
	}
	header := http.Header{"Content-Type": {"application/wasm"}, "Idempotency-Key": {key}}
	if random.IntN(3) == 0 {
		header.Set("Prefer", "respond-async")
		counts.async.Add(1)
	}
	counts.submits.Add(1)
	var answer v1alpha1.Function
	if err := w.insist(counts, http.MethodPut, "/v1/functions/"+f.name, module, header, &answer); err != nil {
		return fmt.Errorf("submitting %s: %w", f.name, err)
	}
	counts.acknowledged.Add(1)
	if f.deleted {
		// Whether numbers start again after a delete is not promised here.
		f.submits = answer.Revision - 1
	}
	f.deleted, f.text = false, text
	f.submits++
	if answer.Revision != f.submits {
		return fmt.Errorf("%s: submit %d was acknowledged as revision %d: a retry made a revision of its own, or one was lost", f.name, f.submits, answer.Revision)
	}
	return nil
}

// insist repeats one call, with one Idempotency-Key, until it succeeds.
// Processes are killed meanwhile, so connections break and answers that say
// "later" are expected; an answer that says the request itself is bad is not.
func (w *world) insist(counts *tally, method, path string, body []byte, header http.Header, into any) error {
	deadline := time.Now().Add(settle)
	for {
		counts.attempts.Add(1)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(w.t.Context()), attemptTimeout)
		answer, err := w.dev.Load().Do(ctx, method, path, bytes.NewReader(body), header)
		cancel()
		if err == nil {
			if answer.Status/100 == 2 {
				if into == nil {
					return nil
				}
				return json.Unmarshal(answer.Body, into)
			}
			problem, _, perr := answer.Problem()
			if perr != nil {
				return perr
			}
			if method == http.MethodDelete && answer.Status == http.StatusNotFound {
				return nil // deleted by an attempt whose answer was lost
			}
			if !problem.Retryable {
				return fmt.Errorf("refused for good: %s", answer)
			}
			err = fmt.Errorf("%s", answer)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not acknowledged within %v: %w", settle, err)
		}
		time.Sleep(retryPause)
	}
}

// verify holds every function to what its writer knows.
func (w *world) verify(all []*function) {
	w.t.Helper()
	deadline := time.Now().Add(settle)
	for _, f := range all {
		for {
			err := w.check(f)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				w.t.Errorf("%s: %v", f.name, err)
				break
			}
			time.Sleep(retryPause)
		}
	}
}

func (w *world) check(f *function) error {
	d := w.dev.Load()
	ctx := w.t.Context()
	record, err := d.Do(ctx, http.MethodGet, "/v1/functions/"+f.name, nil, nil)
	if err != nil {
		return err
	}
	answer, err := d.Do(ctx, http.MethodGet, d.PathURL(f.name, "/"), nil, nil)
	if err != nil {
		return err
	}
	if f.deleted {
		if record.Status != http.StatusNotFound || answer.Status != http.StatusNotFound {
			return fmt.Errorf("its delete was acknowledged (or it never was), but it is there: %s\n%s", record, answer)
		}
		return nil
	}
	got, err := record.Function()
	if err != nil {
		return err
	}
	if got.Revision != f.submits || got.State != v1alpha1.StateReady || got.ActiveRevision != got.Revision {
		return fmt.Errorf("after %d acknowledged submits the record is %s", f.submits, record.Body)
	}
	if answer.Status != http.StatusOK || strings.TrimSpace(string(answer.Body)) != f.text {
		return fmt.Errorf("want %q, it answers %s", f.text, answer)
	}
	return nil
}

// clean wants no leftovers of work that was interrupted.
func (w *world) clean() {
	w.t.Helper()
	deadline := time.Now().Add(settle)
	for {
		var left []string
		for _, sub := range []string{"tmp", filepath.Join("store", "tmp")} {
			err := filepath.WalkDir(filepath.Join(w.options.DataDir, sub), func(path string, e fs.DirEntry, err error) error {
				if errors.Is(err, os.ErrNotExist) {
					return nil // gone meanwhile
				}
				if err == nil && !e.IsDir() {
					left = append(left, path)
				}
				return err
			})
			if err != nil {
				w.t.Error(err)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("temporary files left after a restart: %v", left)
			return
		}
		time.Sleep(retryPause)
	}
}
