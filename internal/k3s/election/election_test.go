package election_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/election"
)

// node is one machine of a test, whose disk outlives its electors.
type node struct {
	store    election.Store
	name     string
	agent    bool
	disk     *disk
	restore  *election.Restore
	timeout  time.Duration
	patience time.Duration
	log      *slog.Logger
	discards []int
	refuses  error // what Discard answers
	// restoring is Options.RestoreWithin.
	restoring time.Duration
}

func (n *node) elector(t *testing.T) *election.Elector {
	t.Helper()
	e, err := election.New(election.Options{
		Store: n.store, Instance: n.name, Server: !n.agent, State: n.disk, Restore: n.restore, Timeout: n.timeout, Patience: n.patience, Logger: n.log, RestoreWithin: n.restoring,
		Discard: func(_ context.Context, g int) error {
			n.discards = append(n.discards, g)
			if n.refuses == nil {
				n.disk.data = 0
			}
			return n.refuses
		},
		DataPresent: func() (bool, error) { return n.disk.data != 0, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (n *node) elect(t *testing.T) *election.Decision {
	t.Helper()
	d, err := n.elector(t).Elect(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
	return d
}

func (n *node) fails(t *testing.T, code fault.Code, says string) {
	t.Helper()
	d, err := n.elector(t).Elect(t.Context())
	if d != nil && d.Hold != nil {
		d.Hold.Close()
	}
	if fault.CodeOf(err) != code || !strings.Contains(err.Error(), says) {
		t.Fatalf("%s: got %q, %v; want %q with %q", n.name, fault.CodeOf(err), err, code, says)
	}
}

// found brings the node through founding.
func (n *node) found(t *testing.T, address string) *election.Decision {
	t.Helper()
	d := n.elect(t)
	if d.Action != election.ActionFound {
		t.Fatalf("%s is to %s, want found", n.name, d.Action)
	}
	n.disk.data = d.Generation
	if err := d.Hold.Found(t.Context(), address); err != nil {
		t.Fatal(err)
	}
	return d
}

// quiet is a store without failures, in virtual time.
func quiet() *world {
	return &world{values: map[string][]byte{}, history: map[string][]version{}, seen: map[string]int{}}
}

func (w *world) node(name string) *node {
	return &node{store: &link{w: w, rand: newRand(1, 2)}, name: name, disk: &disk{}}
}

func TestTheFirstServerFoundsAndOthersJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		var logged bytes.Buffer
		first, second, agent := w.node("i-1"), w.node("i-2"), w.node("i-3")
		agent.agent = true
		first.log = slog.New(slog.NewJSONHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
		d := first.found(t, "10.0.0.1")
		joined := second.elect(t)
		if joined.Action != election.ActionJoin || joined.Generation != 1 || len(joined.Servers) != 1 || joined.Servers[0] != (election.Server{Instance: "i-1", Address: "10.0.0.1"}) {
			t.Fatalf("got %+v", joined)
		}
		if !joined.Credentials.ServerToken.Equal(d.Credentials.ServerToken) || !bytes.Equal(joined.Credentials.ServerCA, d.Credentials.ServerCA) {
			t.Error("a server that joins has other credentials than the founder")
		}
		if err := second.elector(t).Announce(t.Context(), 1, "fd00::2"); err != nil {
			t.Fatal(err)
		}
		seen := agent.elect(t)
		if seen.Action != election.ActionJoin || len(seen.Servers) != 2 || seen.Servers[1].Address != "fd00::2" {
			t.Fatalf("got %+v", seen)
		}
		if seen.Credentials.Authorities != nil || !seen.Credentials.ServerToken.IsZero() || !seen.Credentials.AgentToken.Equal(d.Credentials.AgentToken) {
			t.Error("an agent must have the agent token and nothing of servers")
		}
		if err := seen.Credentials.AgentToken.VerifyCA(seen.Credentials.ServerCA); err != nil {
			t.Error(err)
		}
		if err := second.elector(t).Leave(t.Context(), 1, "fd00::2"); err != nil {
			t.Fatal(err)
		}
		if again := agent.elect(t); len(again.Servers) != 1 {
			t.Errorf("a server that left is still offered: %+v", again.Servers)
		}
		for key, value := range w.values {
			if !election.Secret(key) && (bytes.Contains(value, []byte(d.Credentials.AgentToken.Secret())) || bytes.Contains(value, []byte(d.Credentials.ServerToken.Secret()))) {
				t.Errorf("%s has a token and is no secret", key)
			}
			if strings.HasPrefix(key, "agent/") && (bytes.Contains(value, []byte(d.Credentials.ServerToken.Secret())) || bytes.Contains(value, []byte("PRIVATE"))) {
				t.Errorf("%s has what only servers may have", key)
			}
			if len(value) > election.MaxValueBytes*15/16 {
				t.Errorf("%s has %d bytes, too near the limit", key, len(value))
			}
		}
		if strings.Contains(logged.String(), d.Credentials.AgentToken.Secret()) || strings.Contains(logged.String(), d.Credentials.ServerToken.Secret()) {
			t.Error("a token was logged")
		}
	})
}

func TestARestartedServerContinuesWithItsData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		founder, second := w.node("i-1"), w.node("i-2")
		founder.found(t, "10.0.0.1")
		second.elect(t)
		second.disk.data = 1
		if err := second.elector(t).Announce(t.Context(), 1, "10.0.0.2"); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*node{founder, second} {
			if d := n.elect(t); d.Action != election.ActionContinue || d.Generation != 1 || len(d.Servers) != 1 {
				t.Errorf("%s: got %+v", n.name, d)
			}
		}
		founder.disk.data = 0
		if d := founder.elect(t); d.Action != election.ActionJoin {
			t.Errorf("a founder without data is to %s, want join", d.Action)
		}
	})
}

func TestAFounderAloneThatLostItsDataFoundsNoSecondCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := quiet().node("i-1")
		n.found(t, "10.0.0.1")
		n.disk.data = 0
		n.fails(t, election.CodeDataLost, "restore a snapshot of generation 1")
	})
}

func TestASilentHolderIsReplacedAndDiscardsItsData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		first, second := w.node("i-1"), w.node("i-2")
		d := first.elect(t)
		first.disk.data = 1
		d.Hold.Close() // as if the machine were off
		began := time.Now()
		taken := second.elect(t)
		if taken.Action != election.ActionFound || taken.Generation != 2 {
			t.Fatalf("got %+v", taken)
		}
		if waited := time.Since(began); waited < election.DefaultLease || waited > 2*election.DefaultLease {
			t.Errorf("taken over after %s, want about the lease of %s", waited, election.DefaultLease)
		}
		if err := d.Hold.Found(t.Context(), "10.0.0.1"); !errors.Is(err, election.ErrFenced) || fault.CodeOf(err) != election.CodeFenced {
			t.Fatalf("the first founded as well: %v", err)
		}
		if err := taken.Hold.Found(t.Context(), "10.0.0.2"); err != nil {
			t.Fatal(err)
		}
		first.refuses = errors.New("device busy")
		first.fails(t, election.CodeFenced, "device busy")
		first.refuses = nil
		if d := first.elect(t); d.Action != election.ActionJoin || d.Generation != 2 {
			t.Errorf("got %+v", d)
		}
		if len(first.discards) != 2 || first.discards[1] != 1 {
			t.Errorf("discards: %v", first.discards)
		}
	})
}

// deaf is a store whose answers to one key get lost.
type deaf struct {
	election.Store
	key string
}

func (d deaf) Create(ctx context.Context, key string, value []byte) error {
	if err := d.Store.Create(ctx, key, value); key != d.key {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestAFounderThatDiedBeforeItLearnedOfItIsTheFounder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := quiet().node("i-1")
		inner := n.store
		n.store = deaf{inner, "generation/1/outcome"}
		d := n.elect(t)
		n.disk.data = 1
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := d.Hold.Found(ctx, "10.0.0.1"); err == nil || errors.Is(err, election.ErrFenced) {
			t.Fatalf("got %v", err)
		}
		d.Hold.Close()
		n.store = inner
		if d := n.elect(t); d.Action != election.ActionContinue || d.Generation != 1 {
			t.Errorf("got %+v", d)
		}
		if m, _ := n.disk.Load(); m.Phase != election.PhaseFounder || len(n.discards) != 0 {
			t.Errorf("remembers %+v, discarded %v", m, n.discards)
		}
	})
}

func TestAHolderThatDiedBeforeItLearnedOfItHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		n := w.node("i-1")
		inner := n.store
		n.store = deaf{inner, "generation/1/holder"}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := n.elector(t).Elect(ctx); err == nil {
			t.Fatal("it learned")
		}
		n.store = inner
		d := n.elect(t)
		if d.Action != election.ActionFound || d.Generation != 1 {
			t.Errorf("got %+v", d)
		}
		d.Hold.Close()
	})
}

func TestAHolderThatComesBackInTimeResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		first := w.node("i-1")
		d := first.elect(t)
		token := d.Credentials.ServerToken
		d.Hold.Close()
		time.Sleep(election.DefaultLease * 10) // nobody else is there
		again := first.elect(t)
		if again.Action != election.ActionFound || again.Generation != 1 || !again.Credentials.ServerToken.Equal(token) {
			t.Fatalf("got %+v", again)
		}
		again.Hold.Close()
	})
}

func TestAHolderThatHangsLosesItsGenerationInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		hung, second := w.node("i-1"), w.node("i-2")
		d := hung.elect(t)
		defer d.Hold.Close()
		began := time.Now()
		taken := second.elect(t)
		if taken.Action != election.ActionFound || time.Since(began) < election.DefaultFoundWithin {
			t.Errorf("after %s: got %+v", time.Since(began), taken)
		}
		taken.Hold.Close()
	})
}

// TestAHolderThatRestoresHasMoreTime: fetching what a large cluster has takes
// longer than a first start.
func TestAHolderThatRestoresHasMoreTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const more = 20 * time.Minute
		w := quiet()
		w.node("i-0").found(t, "10.0.0.1")
		hung, second := w.node("i-1"), w.node("i-2")
		hung.restore, hung.restoring = &election.Restore{Generation: 1, Snapshot: "x"}, more
		second.timeout = time.Hour
		d := hung.elect(t)
		defer d.Hold.Close()
		second.restore = hung.restore
		began := time.Now()
		taken := second.elect(t)
		if taken.Action != election.ActionFound || taken.Generation != 3 || time.Since(began) < election.DefaultFoundWithin+more {
			t.Errorf("after %s: got %+v", time.Since(began), taken)
		}
		taken.Hold.Close()
	})
}

func TestAHolderIsToldEarlyThatItWasFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		n := w.node("i-1")
		d := n.elect(t)
		select {
		case <-d.Hold.Fenced():
			t.Fatal("fenced by nobody")
		default:
		}
		if err := n.store.Create(t.Context(), "generation/1/outcome", []byte(`{"outcome":"abandoned","by":"i-2","nonce":"x"}`)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-d.Hold.Fenced():
		case <-time.After(election.DefaultLease):
			t.Error("not told")
		}
		d.Hold.Close()
	})
}

func TestGivingUpLetsOthersFoundAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		first, second := w.node("i-1"), w.node("i-2")
		d := first.elect(t)
		if err := d.Hold.Abandon(t.Context(), strings.Repeat("k3s does not start ", 1000)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if d := second.found(t, "10.0.0.2"); d.Generation != 2 || time.Since(began) > election.DefaultLease {
			t.Errorf("generation %d after %s", d.Generation, time.Since(began))
		}
		if d := first.elect(t); d.Action != election.ActionJoin || len(first.discards) != 1 {
			t.Errorf("got %+v, discards %v", d, first.discards)
		}
	})
}

func TestRestoreFoundsTheNextGenerationWithTheSameCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		old := w.node("i-1")
		before := old.found(t, "10.0.0.1")
		fresh, late := w.node("i-2"), w.node("i-3")
		fresh.restore = &election.Restore{Generation: 1, Snapshot: "s3://snapshots/etcd-1"}
		late.restore = fresh.restore
		d := fresh.elect(t)
		if d.Action != election.ActionFound || d.Generation != 2 || d.Restore == nil || d.Restore.Snapshot != "s3://snapshots/etcd-1" {
			t.Fatalf("got %+v", d)
		}
		if !d.Credentials.ServerToken.Equal(before.Credentials.ServerToken) || !bytes.Equal(d.Credentials.ServerCA, before.Credentials.ServerCA) {
			t.Error("nodes that knew the old cluster will not know the restored one")
		}
		if err := d.Hold.Abandon(t.Context(), "no snapshot"); err != nil {
			t.Fatal(err)
		}
		// Whoever is next restores too, also if its own configuration says nothing.
		next := w.node("i-4")
		d = next.elect(t)
		if d.Generation != 3 || d.Restore == nil || d.Restore.Generation != 1 {
			t.Fatalf("a restore that was given up became an empty cluster: %+v", d)
		}
		if err := d.Hold.Found(t.Context(), "10.0.0.4"); err != nil {
			t.Fatal(err)
		}
		if d := late.elect(t); d.Action != election.ActionJoin || d.Generation != 3 {
			t.Errorf("a restore that is done is not ignored: %+v", d)
		}
		old.fails(t, election.CodeSuperseded, "generation 3 has replaced")
		old.disk.data = 0
		if d := old.elect(t); d.Action != election.ActionJoin || d.Generation != 3 {
			t.Errorf("an old server without data does not join: %+v", d)
		}
	})
}

func TestAServerMayRestoreWhatItWasPartOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		a, b := w.node("i-1"), w.node("i-2")
		a.found(t, "10.0.0.1")
		b.elect(t)
		b.disk.data = 1
		for _, n := range []*node{a, b} {
			n.restore = &election.Restore{Generation: 1, Snapshot: "x"}
		}
		d := a.elect(t)
		if d.Action != election.ActionFound || d.Generation != 2 {
			t.Fatalf("got %+v", d)
		}
		done := make(chan error)
		go func() {
			_, err := b.elector(t).Elect(t.Context())
			done <- err
		}()
		time.Sleep(10 * time.Second)
		if err := d.Hold.Found(t.Context(), "10.0.0.1"); err != nil {
			t.Fatal(err)
		}
		if err := <-done; fault.CodeOf(err) != election.CodeSuperseded {
			t.Errorf("the other server: got %v", err)
		}
		if m, _ := b.disk.Load(); m.Generation != 1 {
			t.Errorf("the other server forgot whose data it has: %+v", m)
		}
	})
}

func TestRestoringWhatWasNeverFoundedIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		n := w.node("i-1")
		n.restore = &election.Restore{Generation: 1, Snapshot: "x"}
		n.fails(t, election.CodeRestore, "never founded")
		m := w.node("i-2")
		d := m.elect(t)
		if err := d.Hold.Abandon(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
		n.fails(t, election.CodeRestore, "never founded")
	})
}

func TestDataThatNothingExplainsIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		n := w.node("i-1")
		n.disk.data = 1
		n.fails(t, election.CodeForeignData, "bootstrap reset")
		// An image made of a running node: its memory and data are another's.
		founder := w.node("i-2")
		founder.found(t, "10.0.0.2")
		clone := w.node("i-3")
		clone.disk = &disk{memory: founder.disk.memory, data: founder.disk.data}
		clone.fails(t, election.CodeForeignData, "bake")
		// A server that is made an agent.
		founder.agent = true
		founder.fails(t, election.CodeForeignData, "another role")
		// A store that was emptied.
		founder.agent = false
		founder.store = &link{w: quiet(), rand: newRand(1, 1)}
		founder.fails(t, election.CodeSuperseded, "does not have")
	})
}

func TestWaitingInVainSaysForWhat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := quiet()
		agent := w.node("i-9")
		agent.agent, agent.timeout = true, time.Minute
		agent.fails(t, election.CodeTimeout, "no server has begun")
		holder := w.node("i-1")
		d := holder.elect(t)
		agent.fails(t, election.CodeTimeout, "still being founded by i-1")
		if err := d.Hold.Abandon(t.Context(), "etcd has no space"); err != nil {
			t.Fatal(err)
		}
		agent.fails(t, election.CodeTimeout, "given up (etcd has no space)")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := agent.elector(t).Elect(ctx); !errors.Is(err, context.DeadlineExceeded) || fault.CodeOf(err) != election.CodeTimeout {
			t.Errorf("the caller's own deadline: got %v", err)
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		if _, err := agent.elector(t).Elect(ctx); !errors.Is(err, context.Canceled) || fault.CodeOf(err) != "" {
			t.Errorf("cancelled: got %v", err)
		}
	})
}

// failing is a store that answers every request in one way.
type failing struct {
	election.Store
	err error
}

func (f failing) Get(context.Context, string) ([]byte, error)    { return nil, f.err }
func (f failing) Create(context.Context, string, []byte) error   { return f.err }
func (f failing) Put(context.Context, string, []byte) error      { return f.err }
func (f failing) List(context.Context, string) ([]string, error) { return nil, f.err }

func TestAStoreThatCannotBeUsedEndsTheElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := quiet().node("i-1")
		inner := n.store
		began := time.Now()
		n.store = failing{inner, fault.New(election.CodeDenied, nil, "allow it", "denied")}
		n.fails(t, election.CodeDenied, "allow it")
		if d := time.Since(began); d < 10*time.Second || d > 30*time.Second {
			t.Errorf("a denial was tried for %s", d)
		}
		began = time.Now()
		n.store = failing{inner, fault.New(election.CodeMissing, nil, "create it", "no bucket")}
		n.fails(t, election.CodeMissing, "create it")
		if d := time.Since(began); d > time.Second {
			t.Errorf("what cannot pass was tried for %s", d)
		}
		began = time.Now()
		n.store = failing{inner, errors.New("503 Slow Down")}
		n.fails(t, election.CodeUnavailable, "503 Slow Down")
		if d := time.Since(began); d < time.Minute || d > 5*time.Minute {
			t.Errorf("what may pass was tried for %s", d)
		}
	})
}

// overwrites is a store of somebody who ignores If-None-Match.
type overwrites struct{ election.Store }

func (o overwrites) Create(ctx context.Context, key string, value []byte) error {
	return o.Put(ctx, key, value)
}

func TestAStoreThatDoesNotFenceIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := quiet().node("i-1")
		n.store = overwrites{n.store}
		n.fails(t, election.CodeUnsupported, "If-None-Match")
	})
}

func TestRecordsOfOthersAreRefused(t *testing.T) {
	good := map[string]string{
		"generation/1/holder":  `{"holder":"i-9","nonce":"n"}`,
		"generation/1/outcome": `{"outcome":"founded","by":"i-9","nonce":"n","address":"10.0.0.9"}`,
	}
	for name, c := range map[string]struct{ key, value string }{
		"a holder that is HTML":       {"generation/1/holder", "<html>"},
		"a holder without a nonce":    {"generation/1/holder", `{"holder":"i-9"}`},
		"an impossible restore":       {"generation/1/holder", `{"holder":"i-9","nonce":"n","restore":{"from":0}}`},
		"an unknown outcome":          {"generation/1/outcome", `{"outcome":"maybe"}`},
		"an address with a port":      {"generation/1/outcome", `{"outcome":"founded","address":"10.0.0.1:6443"}`},
		"an address that is a URL":    {"generation/1/outcome", `{"outcome":"founded","address":"https://x"}`},
		"credentials that are not":    {"server/1/credentials", `{"authorities":{}}`},
		"a member with a bad address": {"members/1/i-5", `{"address":"a b"}`},
		"binary where JSON should be": {"generation/1/holder", "\x00\x01\xff"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := quiet()
				n := w.node("i-1")
				if strings.HasPrefix(c.key, "members/") {
					w.node("i-2").found(t, "10.0.0.2")
				} else {
					for key, value := range good {
						if err := n.store.Put(t.Context(), key, []byte(value)); err != nil {
							t.Fatal(err)
						}
					}
				}
				if err := n.store.Put(t.Context(), c.key, []byte(c.value)); err != nil {
					t.Fatal(err)
				}
				n.fails(t, election.CodeCorrupt, c.key)
			})
		})
	}
}

func TestOptionsThatCannotWorkAreRefused(t *testing.T) {
	store, state := election.NewDirectory(t.TempDir()), election.NewFileState(filepath.Join(t.TempDir(), "x"))
	for name, o := range map[string]election.Options{
		"no store":                {Instance: "i-1", State: state},
		"no state":                {Instance: "i-1", Store: store},
		"no instance":             {Store: store, State: state},
		"a path as instance":      {Instance: "a/b", Store: store, State: state},
		"a server without a past": {Instance: "i-1", Store: store, State: state, Server: true},
		"no snapshot":             {Instance: "i-1", Store: store, State: state, Restore: &election.Restore{Generation: 1}},
	} {
		if _, err := election.New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestElectionInADirectoryWithAFileState(t *testing.T) {
	dir := t.TempDir()
	options := func(name string) election.Options {
		return election.Options{
			Store: election.NewDirectory(filepath.Join(dir, "store")), Instance: name, Server: true, State: election.NewFileState(filepath.Join(dir, name, "state", "election.json")),
			Discard: func(context.Context, int) error { return nil }, DataPresent: func() (bool, error) { return false, nil },
		}
	}
	e, err := election.New(options("i-1"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := e.Elect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d.Hold.Close()
	// The process is killed and started again.
	if e, err = election.New(options("i-1")); err != nil {
		t.Fatal(err)
	}
	if d, err = e.Elect(t.Context()); err != nil || d.Action != election.ActionFound || d.Generation != 1 {
		t.Fatalf("got %+v, %v", d, err)
	}
	if err := d.Hold.Found(t.Context(), "node-1.example"); err != nil {
		t.Fatal(err)
	}
	other, err := election.New(options("i-2"))
	if err != nil {
		t.Fatal(err)
	}
	if d, err = other.Elect(t.Context()); err != nil || d.Action != election.ActionJoin || d.Servers[0].Address != "node-1.example" {
		t.Fatalf("got %+v, %v", d, err)
	}
}

func TestFileState(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a", "b", "election.json")
	s := election.NewFileState(file)
	if m, err := s.Load(); err != nil || m != (election.Memory{}) {
		t.Fatalf("nothing saved: got %+v, %v", m, err)
	}
	want := election.Memory{Store: "s3://b/p", Instance: "i-1", Generation: 2, Phase: election.PhaseHolding, Nonce: "n", DataOf: 1}
	for _, m := range []election.Memory{want, {}, want} {
		if err := s.Save(m); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Load(); err != nil || got != m {
			t.Fatalf("got %+v, %v, want %+v", got, err, m)
		}
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for name, content := range map[string]string{
		"empty": "", "HTML": "<html>", "half": `{"store":"s3://b/p"`, "incomplete": `{"generation":1}`,
		"unknown phase": `{"store":"s","instance":"i","generation":1,"phase":"x"}`,
		"no nonce":      `{"store":"s","instance":"i","generation":1,"phase":"holding"}`, "huge": strings.Repeat(" ", 1<<20),
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Load(); fault.CodeOf(err) != election.CodeState {
			t.Errorf("%s: got %+v, %v", name, m, err)
		}
	}
}
