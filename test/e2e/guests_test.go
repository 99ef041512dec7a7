package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/harness"
)

// late is how long after its deadline a hostile guest's answer may come in a
// test. The product promises 50 ms, which the benchmark holds it to; a test
// machine may stand still for seconds.
const late = 10 * time.Second

// timing are the members every function answer's Server-Timing has.
var timing = []string{"queue", "load", "instantiate", "firstbyte"}

func (d dev) timed(a *harness.Answer) {
	d.t.Helper()
	value := strings.Join(a.Header.Values("Server-Timing"), ", ")
	for _, name := range timing {
		if !regexp.MustCompile(`(^|[, ])` + name + `;(.*;)?dur=[0-9.]+`).MatchString(value) {
			d.t.Errorf("Server-Timing of a %d lacks %s: %q", a.Status, name, value)
		}
	}
	if a.Header.Get("Hearth-Request-Id") == "" {
		d.t.Errorf("a %d without Hearth-Request-Id", a.Status)
	}
}

func TestHostileGuestsAreStoppedAndHarmNobody(t *testing.T) {
	d := shared(t)
	d.submit("neighbour", marked(t, "unharmed"), "")
	d.answers("neighbour", "unharmed")
	workers := d.PIDs("worker")
	if len(workers) == 0 {
		t.Fatal("no worker process")
	}

	for _, c := range []struct {
		guest    string
		settings harness.Settings
		status   int // 0: the answer began well and must break off
		codes    []string
	}{
		{"spin", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"go-spin", harness.Settings{TimeoutMS: 500}, 504, nil},
		{"call-tree", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"bulk-fill", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"recurse-spin", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"recurse", harness.Settings{TimeoutMS: 5000}, 502, nil},
		{"endless-header", harness.Settings{TimeoutMS: 5000}, 502, nil},
		{"endless-stdout", harness.Settings{TimeoutMS: 5000}, 0, nil},
		{"endless-stderr", harness.Settings{TimeoutMS: 500}, 504, nil},
		{"zero-writes", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"entropy-flood", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"sleep", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"read-forever", harness.Settings{TimeoutMS: 300}, 504, nil},
		{"exit1", harness.Settings{}, 502, nil},
		{"garbage", harness.Settings{}, 502, nil},
		{"silent", harness.Settings{}, 502, nil},
		{"trap", harness.Settings{}, 502, nil},
		{"late-trap", harness.Settings{}, 0, nil},
		{"spin-late", harness.Settings{TimeoutMS: 700}, 0, nil},
	} {
		t.Run(c.guest, func(t *testing.T) {
			d := dev{d.Dev, t}
			function := "hostile-" + c.guest
			d.submitWith(function, guests.Read(t, c.guest), c.settings)
			for range 2 { // the second finds what the first left
				a, err := d.Do(t.Context(), http.MethodGet, d.PathURL(function, "/"), nil, nil)
				if c.status == 0 {
					if err == nil && a.Status == http.StatusOK {
						t.Errorf("an answer that broke off looks complete: %d bytes", len(a.Body))
					}
					if err == nil && a.Status != http.StatusOK {
						d.problem(a, a.Status)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				p := d.problem(a, c.status, c.codes...)
				if len(p.Detail) < 10 {
					t.Errorf("no reason given: %+v", p)
				}
				d.timed(a)
				if limit := time.Duration(c.settings.TimeoutMS)*time.Millisecond + late; c.settings.TimeoutMS > 0 && a.Took > limit {
					t.Errorf("answered after %v, its deadline is %d ms", a.Took, c.settings.TimeoutMS)
				}
			}
			d.answers("neighbour", "unharmed")
			if now := d.PIDs("worker"); !contains(now, workers) {
				t.Errorf("workers were %v and are %v: a guest must not end its worker", workers, now)
				workers = now
			}
			// The author finds the reason in the log.
			eventually(t, func() error {
				for _, line := range d.logs(function, "") {
					if line.Stream == "system" && line.Line != "" {
						return nil
					}
				}
				return fmt.Errorf("no system line in the log of %s", function)
			})
		})
	}
}

// contains says whether all of want are in have.
func contains(have, want []int) bool {
	for _, w := range want {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}

// logs reads a function's log so far.
func (d dev) logs(function, query string) []v1alpha1.LogLine {
	d.t.Helper()
	a := d.get("/v1/functions/" + function + "/logs" + query)
	if a.Status != http.StatusOK || !strings.HasPrefix(a.Header.Get("Content-Type"), "application/x-ndjson") {
		d.t.Fatalf("logs of %s: %s", function, a)
	}
	var out []v1alpha1.LogLine
	for raw := range bytes.Lines(a.Body) {
		var line v1alpha1.LogLine
		if err := json.Unmarshal(raw, &line); err != nil {
			d.t.Fatalf("log line %q: %v", raw, err)
		}
		out = append(out, line)
	}
	return out
}

func TestMemoryStopsAtTheLimitAndTheGuestLives(t *testing.T) {
	d := shared(t)
	d.submitWith("hungry", guests.Read(t, "memory"), harness.Settings{MemoryMiB: 48})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			a, err := d.Do(t.Context(), http.MethodGet, d.PathURL("hungry", "/"), nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			mib, err := strconv.Atoi(strings.TrimSpace(string(a.Body)))
			if a.Status != http.StatusOK || err != nil || mib < 16 || mib > 48 {
				t.Errorf("with a limit of 48 MiB the guest got: %s", a)
			}
		})
	}
	callers.Wait()
}

func TestOthersAreServedWhileMoreGuestsSpinThanThereAreProcessors(t *testing.T) {
	d := shared(t)
	d.submitWith("spinners", guests.Read(t, "spin"), harness.Settings{TimeoutMS: 2000, Concurrency: 8})
	d.submit("bystander", marked(t, "served"), "")
	workers := d.PIDs("worker")

	var spinning atomic.Int32
	var callers sync.WaitGroup
	spinning.Store(8)
	for range 8 {
		callers.Go(func() {
			defer spinning.Add(-1)
			a, err := d.Do(t.Context(), http.MethodGet, d.PathURL("spinners", "/"), nil, nil)
			if err != nil || a.Status != http.StatusGatewayTimeout {
				t.Errorf("a spinner got %v %v", a, err)
			}
		})
	}
	served := 0
	for spinning.Load() == 8 {
		if a := d.get(d.PathURL("bystander", "/")); a.Status != http.StatusOK || !strings.Contains(string(a.Body), "served") {
			t.Errorf("while others spin: %s", a)
		}
		served++
	}
	callers.Wait()
	if served < 3 {
		t.Errorf("only %d requests were served in the 2 s that others were spinning", served)
	}
	if now := d.PIDs("worker"); !contains(now, workers) {
		t.Errorf("workers were %v and are %v", workers, now)
	}
}

func TestNothingLeaksFromOneRequestToTheNext(t *testing.T) {
	d := shared(t)
	d.submit("leak", guests.Read(t, "counter"), "")
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for range 25 {
				a, err := d.Do(t.Context(), http.MethodGet, d.PathURL("leak", "/"), nil, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if want := "data=1 bss=1 dirty=0 file=refused\n"; a.Status != http.StatusOK || string(a.Body) != want {
					t.Errorf("want %q, got %s", want, a)
					return
				}
			}
		})
	}
	callers.Wait()
}

func TestRandomnessAndClocksAreReal(t *testing.T) {
	d := shared(t)
	d.submit("entropy", guests.Read(t, "entropy"), "")
	seen := map[string]bool{}
	var last int64
	for range 5 {
		before := time.Now()
		a := d.get(d.PathURL("entropy", "/"))
		lines := strings.Fields(string(a.Body))
		if len(lines) != 3 || len(lines[0]) != 64 {
			t.Fatalf("answer %s", a)
		}
		if seen[lines[0]] || lines[0] == strings.Repeat("0", 64) {
			t.Errorf("random bytes came twice: %s", lines[0])
		}
		seen[lines[0]] = true
		wall, err := strconv.ParseInt(lines[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if at := time.Unix(0, wall); at.Before(before.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
			t.Errorf("the guest's wall clock says %v, it is %v", at, before)
		}
		mono, err := strconv.ParseInt(lines[2], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if mono <= last && last != 0 {
			t.Logf("monotonic clock of a later instance is not later: %d after %d", mono, last)
		}
		last = mono
	}
}

func TestTenantsNeverShareAProcess(t *testing.T) {
	d := shared(t)
	before := d.PIDs("worker")
	d.submit("of-red", marked(t, "red"), "?tenant=red")
	d.submit("of-blue", marked(t, "blue"), "?tenant=blue")
	d.answers("of-red", "red")
	d.answers("of-blue", "blue")
	if now := d.PIDs("worker"); len(now) < len(before)+2 || !contains(now, before) {
		t.Errorf("two new tenants: workers were %v and are %v", before, now)
	}
}

func TestWorkersAreConfined(t *testing.T) {
	d := shared(t)
	d.submit("confined", marked(t, "confined"), "")
	workers := d.PIDs("worker")
	if len(workers) == 0 {
		t.Fatal("no worker process")
	}
	for _, pid := range workers {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`NoNewPrivs:\s*1`, `Seccomp:\s*2`} {
			if !regexp.MustCompile(`(?m)^` + want + `$`).Match(status) {
				t.Errorf("worker %d lacks %s:\n%s", pid, want, status)
			}
		}
		if os.Getuid() == 0 && regexp.MustCompile(`(?m)^Uid:\s+0\s`).Match(status) {
			t.Errorf("worker %d runs as root", pid)
		}
	}
}

func TestAnswersStreamAsTheGuestWrites(t *testing.T) {
	d := shared(t)
	d.submit("stream", guests.Read(t, "stream"), "")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, d.PathURL("stream", "/?8"), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := d.HTTP.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var first, last time.Time
	var body strings.Builder
	buf := make([]byte, 4096)
	reads := 0
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if first.IsZero() {
				first = time.Now()
			}
			last = time.Now()
			reads++
			body.Write(buf[:n])
		}
		if err != nil {
			break
		}
	}
	if !strings.HasSuffix(body.String(), "chunk 7\n") || strings.Count(body.String(), "chunk") != 8 {
		t.Errorf("body %q", body.String())
	}
	// The guest pauses seven times for 200 ms between the first and the last
	// chunk. A buffered answer would arrive in one piece.
	if spread := last.Sub(first); spread < 500*time.Millisecond || reads < 3 {
		t.Errorf("8 chunks arrived in %d reads over %v: not streamed", reads, spread)
	}
}

func TestClientThatLeavesEndsItsGuest(t *testing.T) {
	d := shared(t)
	// One at a time and a long deadline: as long as an abandoned guest runs,
	// nobody else is served.
	d.submitWith("abandoned", guests.Read(t, "moody"), harness.Settings{TimeoutMS: 200_000, Concurrency: 1})
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := d.Do(ctx, http.MethodGet, d.PathURL("abandoned", "/?spin"), nil, nil)
		cancel()
		if err == nil {
			t.Fatal("a spinning guest answered")
		}
		d.answers("abandoned", "fine")
	}
}

func TestRequestAndResponseBounds(t *testing.T) {
	d := shared(t)
	d.submit("bounds", guests.Read(t, "echo"), "")
	big := bytes.Repeat([]byte("x"), v1alpha1.MaxRequestBytes+1)
	d.problem(d.call(http.MethodPost, d.PathURL("bounds", "/"), bytes.NewReader(big), nil), http.StatusRequestEntityTooLarge)
	fits := big[:v1alpha1.MaxRequestBytes-(64<<10)]
	if a := d.call(http.MethodPost, d.PathURL("bounds", "/"), bytes.NewReader(fits), nil); a.Status != http.StatusOK || !bytes.HasSuffix(a.Body, fits[:1000]) || len(a.Body) < len(fits) {
		t.Errorf("a body just under the bound: status %d, %d bytes back", a.Status, len(a.Body))
	}
}

func TestFullQueueIsRefusedWith429(t *testing.T) {
	d := shared(t)
	d.submitWith("narrow", guests.Read(t, "stream"), harness.Settings{Concurrency: 1, TimeoutMS: 20_000})
	var statuses [600]atomic.Int32
	var callers sync.WaitGroup
	for range 24 {
		callers.Go(func() {
			a, err := d.Do(t.Context(), http.MethodGet, d.PathURL("narrow", "/?1"), nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			statuses[a.Status].Add(1)
			if a.Status == http.StatusTooManyRequests && a.Header.Get("Retry-After") == "" {
				t.Errorf("429 without Retry-After: %s", a)
			}
		})
	}
	callers.Wait()
	ok, refused := statuses[200].Load(), statuses[429].Load()
	if ok == 0 || refused == 0 || ok+refused != 24 {
		t.Errorf("of 24 requests at once to a function that runs one: %d answered, %d refused with 429", ok, refused)
	}
}
