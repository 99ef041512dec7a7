package election_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/election"
)

// The model runs many machines against one store in virtual time. Every
// request may be delayed before and after it takes effect, may lose its
// answer, and may take effect long after its sender gave up; every machine may
// be paused for longer than the lease, die, and come back remembering what it
// saved. One seed is one schedule.

// world is what all machines share.
type world struct {
	mu      sync.Mutex
	values  map[string][]byte
	history map[string][]version // every value, oldest first
	lag     time.Duration        // by how much reads may lag behind
	founded map[int]string       // by generation, who was told that it founded
	joined  map[int]bool         // generations that somebody joined
	tokens  map[int]string       // by generation, the server token in use
	broken  []string             // what must never happen, and did
	faults  bool                 // false once failures have stopped
	bug     bug
	seen    map[string]int // how often what is worth exploring happened
}

// bug is a fault planted in the store, to show that the model finds it.
type bug string

const (
	noBug bug = ""
	// createsTwice checks whether a key exists and writes it in two steps.
	createsTwice bug = "create is check, then write"
	// outcomeOverwritten lets the last word on a generation count.
	outcomeOverwritten bug = "the outcome can be overwritten"
	// outcomeIgnored tells a holder that it founded, whatever was decided.
	outcomeIgnored bug = "a holder does not look at the outcome that was first"
	// alwaysFirst tells every candidate that it holds the generation.
	alwaysFirst bug = "a candidate does not look at who was first"
)

func (w *world) fail(format string, args ...any) {
	w.broken = append(w.broken, fmt.Sprintf(format, args...))
}

func (w *world) note(event string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[event]++
}

func (w *world) says(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail(format, args...)
}

type version struct {
	at    time.Time
	value []byte
}

func (w *world) setLocked(key string, value []byte) {
	w.values[key] = value
	w.history[key] = append(w.history[key], version{time.Now(), value})
}

// link is one machine's connection to the store.
type link struct {
	w      *world
	mu     sync.Mutex
	rand   *rand.Rand
	frozen time.Time // the whole machine stands still until then
}

var errLost = errors.New("the answer was lost")

func (l *link) Location() string { return "s3://model/cluster" }

func (l *link) draw(n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rand.IntN(n)
}

func (l *link) delay(ctx context.Context) error {
	l.w.mu.Lock()
	faults := l.w.faults
	l.w.mu.Unlock()
	d := time.Duration(1+l.draw(50_000)) * time.Microsecond
	if faults {
		switch l.draw(60) {
		case 0:
			pause := time.Duration(l.draw(120_000)) * time.Millisecond
			l.mu.Lock()
			l.frozen = time.Now().Add(pause)
			l.mu.Unlock()
		case 1, 2, 3, 4:
			d = time.Duration(l.draw(5_000)) * time.Millisecond
		}
	}
	l.mu.Lock()
	d = max(d, time.Until(l.frozen)+d)
	l.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// request applies op to the store, or loses it in one of several ways.
func (l *link) request(ctx context.Context, write bool, op func() error) error {
	if err := l.delay(ctx); err != nil {
		return err
	}
	l.w.mu.Lock()
	faults := l.w.faults
	l.w.mu.Unlock()
	lost := 100
	if faults {
		lost = l.draw(20)
	}
	switch {
	case lost == 0: // never arrived
		return errLost
	case lost == 1 && write: // arrives long after its sender gave up
		late := time.Duration(l.draw(120_000)) * time.Millisecond
		go func() {
			time.Sleep(late)
			_ = op()
		}()
		return errLost
	case lost == 2: // arrived, but nobody learns of it
		_ = op()
		return errLost
	}
	err := op()
	if e := l.delay(ctx); e != nil {
		return e
	}
	return err
}

func (l *link) Get(ctx context.Context, key string) (b []byte, err error) {
	err = l.request(ctx, false, func() error {
		l.w.mu.Lock()
		defer l.w.mu.Unlock()
		seen := time.Now()
		if l.w.lag > 0 && l.draw(4) == 0 {
			seen = seen.Add(-time.Duration(l.draw(int(l.w.lag))))
		}
		b = nil
		for _, v := range l.w.history[key] {
			if !v.at.After(seen) {
				b = bytes.Clone(v.value)
			}
		}
		if b == nil {
			return election.ErrNotFound
		}
		return nil
	})
	return b, err
}

func (l *link) Create(ctx context.Context, key string, value []byte) error {
	value = bytes.Clone(value)
	return l.request(ctx, true, func() error {
		l.w.mu.Lock()
		_, exists := l.w.values[key]
		switch {
		case l.w.bug == createsTwice && strings.HasSuffix(key, "/holder") && !exists:
			l.w.mu.Unlock()
			time.Sleep(200 * time.Millisecond)
			l.w.mu.Lock()
		case exists && l.w.bug == outcomeOverwritten && strings.HasSuffix(key, "/outcome"):
		case exists && l.w.bug == outcomeIgnored && bytes.Contains(value, []byte(`"founded"`)):
		case exists && l.w.bug == alwaysFirst && strings.HasSuffix(key, "/holder") && !bytes.Contains(value, []byte("probe-")):
		case exists:
			l.w.mu.Unlock()
			return election.ErrExists
		}
		l.w.setLocked(key, value)
		l.w.mu.Unlock()
		return nil
	})
}

func (l *link) Put(ctx context.Context, key string, value []byte) error {
	value = bytes.Clone(value)
	return l.request(ctx, true, func() error {
		l.w.mu.Lock()
		defer l.w.mu.Unlock()
		l.w.setLocked(key, value)
		return nil
	})
}

func (l *link) List(ctx context.Context, prefix string) (keys []string, err error) {
	err = l.request(ctx, false, func() error {
		l.w.mu.Lock()
		defer l.w.mu.Unlock()
		keys = nil
		for key := range l.w.values {
			if rest, ok := strings.CutPrefix(key, prefix); ok && !strings.Contains(rest, "/") {
				keys = append(keys, key)
			}
		}
		return nil
	})
	return keys, err
}

// disk is what survives a crash of one machine.
type disk struct {
	mu     sync.Mutex
	memory election.Memory
	data   int // generation whose etcd data is there, 0 for none
}

func (d *disk) Load() (election.Memory, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.memory, nil
}

func (d *disk) Save(m election.Memory) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.memory = m
	return nil
}

func (d *disk) has() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.data
}

func (d *disk) set(data int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = data
}

type machine struct {
	w      *world
	name   string
	server bool
	disk   *disk
	rand   *rand.Rand
	done   atomic.Bool
}

// live runs the machine, with crashes while failures go on, until it is part of
// a founded generation.
func (m *machine) live(ctx context.Context) {
	for !m.done.Load() && ctx.Err() == nil {
		run, crash := context.WithCancel(ctx)
		m.w.mu.Lock()
		faults := m.w.faults
		m.w.mu.Unlock()
		if faults && m.rand.IntN(2) == 0 {
			time.AfterFunc(time.Duration(m.rand.IntN(200_000))*time.Millisecond, crash)
		}
		m.run(run)
		crash()
		if !m.done.Load() {
			time.Sleep(time.Duration(m.rand.IntN(60_000)) * time.Millisecond)
		}
	}
}

func (m *machine) run(ctx context.Context) {
	l := &link{w: m.w, rand: newRand(m.rand.Uint64(), m.rand.Uint64())}
	e, err := election.New(election.Options{
		Store: l, Instance: m.name, Server: m.server, State: m.disk,
		Discard: func(_ context.Context, n int) error {
			m.w.mu.Lock()
			defer m.w.mu.Unlock()
			if _, ok := m.w.founded[n]; ok {
				m.w.fail("%s was told to discard generation %d, which is founded", m.name, n)
			}
			m.disk.set(0)
			return nil
		},
		DataPresent: func() (bool, error) { return m.disk.has() != 0, nil },
		Timeout:     time.Hour,
	})
	if err != nil {
		panic(err)
	}
	for {
		d, err := e.Elect(ctx)
		if err != nil {
			if code := fault.CodeOf(err); ctx.Err() == nil && code != election.CodeUnavailable {
				m.w.says("%s: unexpected: %v", m.name, err)
			}
			return
		}
		if d.Action != election.ActionFound {
			if m.disk.has() == d.Generation {
				m.w.note("founded without learning of it")
			}
			m.joined(d)
			return
		}
		if m.disk.has() == d.Generation {
			m.w.note("resumed")
		}
		if !m.found(ctx, d) {
			return
		}
		if m.done.Load() {
			return
		}
	}
}

func (m *machine) joined(d *election.Decision) {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if !bytes.Contains(m.w.values["generation/"+strconv.Itoa(d.Generation)+"/outcome"], []byte(`"founded"`)) {
		m.w.fail("%s joined generation %d, which nobody founded", m.name, d.Generation)
	}
	m.w.joined[d.Generation] = true
	if m.server {
		m.use(d)
		m.disk.set(d.Generation)
	} else if d.Credentials.Authorities != nil || !d.Credentials.ServerToken.IsZero() {
		m.w.fail("%s is an agent and has a server's credentials", m.name)
	}
	m.done.Store(true)
}

// use checks that everybody in a generation has the same credentials.
func (m *machine) use(d *election.Decision) {
	token := d.Credentials.ServerToken.Reveal()
	if other, ok := m.w.tokens[d.Generation]; ok && other != token {
		m.w.fail("%s has other credentials of generation %d than others", m.name, d.Generation)
	}
	m.w.tokens[d.Generation] = token
}

// found acts as k3s's first start does. It returns whether to elect again.
func (m *machine) found(ctx context.Context, d *election.Decision) bool {
	defer d.Hold.Close()
	if data := m.disk.has(); data != 0 && data != d.Generation {
		m.w.says("%s starts generation %d on the data of generation %d", m.name, d.Generation, data)
	}
	m.disk.set(d.Generation)
	select {
	case <-time.After(time.Duration(5+m.rand.IntN(40)) * time.Second):
	case <-d.Hold.Fenced():
		m.w.note("fenced while k3s started")
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
	m.w.mu.Lock()
	faults := m.w.faults
	m.w.mu.Unlock()
	if faults && m.rand.IntN(6) == 0 { // k3s did not start
		_ = d.Hold.Abandon(ctx, "k3s did not start")
		return ctx.Err() == nil
	}
	for {
		err := d.Hold.Found(ctx, "10.0.0.1")
		switch {
		case err == nil:
			m.w.mu.Lock()
			defer m.w.mu.Unlock()
			m.w.founded[d.Generation] = m.name
			if len(m.w.founded) > 1 {
				m.w.fail("several generations were founded: %v", m.w.founded)
			}
			m.use(d)
			m.done.Store(true)
			return true
		case errors.Is(err, election.ErrFenced):
			m.w.note("fenced when founding")
			return true
		case ctx.Err() != nil:
			return false
		}
	}
}

func newRand(a, b uint64) *rand.Rand { return rand.New(rand.NewPCG(a, b)) }

// explore runs one schedule and returns what broke.
func explore(t *testing.T, seed uint64, planted bug, seen map[string]int) []string {
	w := &world{values: map[string][]byte{}, history: map[string][]version{}, founded: map[int]string{}, joined: map[int]bool{}, tokens: map[int]string{}, faults: true, bug: planted, seen: seen}
	synctest.Test(t, func(t *testing.T) {
		r := newRand(seed, 1)
		if seed%3 == 2 { // Systems Manager
			w.lag = 5 * time.Second
		}
		ctx, cancel := context.WithCancel(t.Context())
		var machines []*machine
		var all sync.WaitGroup
		for i := range 3 + r.IntN(4) {
			m := &machine{w: w, name: "i-" + strconv.Itoa(i), server: i < 3, disk: &disk{}, rand: newRand(seed, uint64(100+i))}
			machines = append(machines, m)
			start := time.Duration(r.IntN(3_000)) * time.Millisecond
			// Some never come back after the failures have stopped.
			all.Go(func() { time.Sleep(start); m.live(ctx) })
		}
		time.Sleep(time.Duration(r.IntN(900)) * time.Second)
		w.mu.Lock()
		w.faults = false
		w.mu.Unlock()
		// A holder that is alive but whose requests were lost founds or gives
		// up within FoundWithin; then the next needs a lease and a start.
		time.Sleep(30 * time.Minute)
		for _, m := range machines {
			if !m.done.Load() {
				w.says("%s is part of nothing, 30 minutes after failures stopped", m.name)
			}
		}
		cancel()
		all.Wait()
		time.Sleep(5 * time.Minute) // late requests
		if len(w.joined) > 1 {
			w.says("several generations were joined: %v", w.joined)
		}
		for _, m := range machines {
			if m.server && m.disk.has() != m.disk.memory.Generation {
				w.says("%s remembers generation %d and has the data of %d", m.name, m.disk.memory.Generation, m.disk.has())
			}
		}
	})
	slices.Sort(w.broken)
	return slices.Compact(w.broken)
}

func schedules(t *testing.T, n int) int {
	if s := os.Getenv("HEARTH_ELECTION_SCHEDULES"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	if testing.Short() {
		n /= 10
	}
	return n
}

func TestNoScheduleFoundsTwoClustersOrNone(t *testing.T) {
	seen := map[string]int{}
	n := schedules(t, 400)
	for seed := range uint64(n) {
		if broken := explore(t, seed, noBug, seen); len(broken) > 0 {
			t.Fatalf("seed %d:\n%s", seed, strings.Join(broken, "\n"))
		}
	}
	t.Logf("%d schedules: %v", n, seen)
	// A model that never gets into trouble shows nothing.
	for _, event := range []string{"fenced while k3s started", "fenced when founding", "resumed"} {
		if n >= 400 && seen[event] < 4 {
			t.Errorf("%q happened %d times in %d schedules", event, seen[event], n)
		}
	}
}

func TestTheModelFindsPlantedBugs(t *testing.T) {
	for _, planted := range []bug{createsTwice, outcomeOverwritten, outcomeIgnored, alwaysFirst} {
		t.Run(string(planted), func(t *testing.T) {
			for seed := range uint64(300) {
				if broken := explore(t, seed, planted, map[string]int{}); len(broken) > 0 {
					t.Logf("seed %d: %s", seed, broken[0])
					return
				}
			}
			t.Error("the model did not notice")
		})
	}
}
