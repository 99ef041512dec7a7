// Package electiontest holds every implementation of election.Store to its
// contract.
package electiontest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/k3s/election"
)

const timeout = time.Minute

// Run runs the suite. open returns an empty store; a second call with the same
// name returns another view of the same contents, as another machine has.
func Run(t *testing.T, open func(t *testing.T, name string) election.Store) {
	tests := map[string]func(t *testing.T, a, b election.Store){
		"a missing key is ErrNotFound":                               missing,
		"create stores what others read":                             createReads,
		"create of an existing key is ErrExists and changes nothing": createTwice,
		"create after put is ErrExists":                              createAfterPut,
		"put overwrites":                                             put,
		"one of many concurrent creators wins":                       race,
		"one of many concurrent creators wins for secrets":           raceSecret,
		"list shows the keys directly below a prefix":                list,
		"an empty prefix lists nothing":                              listEmpty,
		"the largest value is kept to the byte":                      largest,
		"impossible keys and values are refused":                     impossible,
		"a context that ended is obeyed":                             ended,
	}
	names := make([]string, 0, len(tests))
	for name := range tests {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		t.Run(name, func(t *testing.T) {
			store := fmt.Sprintf("store-%d", i)
			tests[name](t, open(t, store), open(t, store))
		})
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	return ctx
}

func get(t *testing.T, s election.Store, key string) []byte {
	t.Helper()
	b, err := s.Get(within(t), key)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	return b
}

func missing(t *testing.T, a, _ election.Store) {
	for _, key := range []string{"generation/1/holder", "server/1/credentials"} {
		if b, err := a.Get(within(t), key); !errors.Is(err, election.ErrNotFound) {
			t.Errorf("get %s: got %q, %v, want ErrNotFound", key, b, err)
		}
	}
}

func createReads(t *testing.T, a, b election.Store) {
	for _, key := range []string{"generation/1/holder", "server/1/credentials", "agent/1/credentials"} {
		want := []byte(`{"of":"` + key + `"}`)
		if err := a.Create(within(t), key, want); err != nil {
			t.Fatalf("create %s: %v", key, err)
		}
		if got := get(t, b, key); !bytes.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
}

func createTwice(t *testing.T, a, b election.Store) {
	const key = "generation/1/outcome"
	if err := a.Create(within(t), key, []byte("first")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []election.Store{a, b} {
		// The same value again is ErrExists as well: only reading tells.
		for _, value := range []string{"second", "first"} {
			if err := s.Create(within(t), key, []byte(value)); !errors.Is(err, election.ErrExists) {
				t.Errorf("create again with %s: got %v, want ErrExists", value, err)
			}
		}
	}
	if got := get(t, b, key); string(got) != "first" {
		t.Errorf("got %q, want first", got)
	}
}

func createAfterPut(t *testing.T, a, b election.Store) {
	const key = "generation/1/heartbeat"
	if err := a.Put(within(t), key, []byte("beat")); err != nil {
		t.Fatal(err)
	}
	if err := b.Create(within(t), key, []byte("other")); !errors.Is(err, election.ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
}

func put(t *testing.T, a, b election.Store) {
	const key = "generation/1/heartbeat"
	for i := range 5 {
		value := fmt.Sprintf("beat %d", i)
		if err := a.Put(within(t), key, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if got := get(t, b, key); string(got) != value {
			t.Errorf("got %q, want %q", got, value)
		}
	}
}

func race(t *testing.T, a, b election.Store)       { raceFor(t, "generation/%d/holder", a, b) }
func raceSecret(t *testing.T, a, b election.Store) { raceFor(t, "server/%d/credentials", a, b) }

func raceFor(t *testing.T, format string, a, b election.Store) {
	const rounds, creators = 10, 8
	ctx := within(t)
	for round := 1; round <= rounds; round++ {
		key := fmt.Sprintf(format, round)
		var (
			start   = make(chan struct{})
			all     sync.WaitGroup
			mu      sync.Mutex
			winners []string
		)
		for i := range creators {
			store := []election.Store{a, b}[i%2]
			value := fmt.Sprintf("creator %d", i)
			all.Go(func() {
				<-start
				err := store.Create(ctx, key, []byte(value))
				if err == nil {
					mu.Lock()
					winners = append(winners, value)
					mu.Unlock()
				} else if !errors.Is(err, election.ErrExists) {
					t.Errorf("%s: got %v, want ErrExists", key, err)
				}
			})
		}
		close(start)
		all.Wait()
		if len(winners) != 1 {
			t.Fatalf("%s: %d creators were told that they won: %v", key, len(winners), winners)
		}
		if got := get(t, a, key); string(got) != winners[0] {
			t.Errorf("%s: %s was told that it won, but %q is stored", key, winners[0], got)
		}
	}
}

func list(t *testing.T, a, b election.Store) {
	ctx := within(t)
	var want []string
	// More than one page of any store (SSM has ten a page).
	for i := range 25 {
		key := fmt.Sprintf("members/1/i-%02d", i)
		if err := a.Put(ctx, key, []byte("x")); err != nil {
			t.Fatal(err)
		}
		want = append(want, key)
	}
	for _, key := range []string{"members/10/i-0", "members/2/i-0", "generation/1/holder"} {
		if err := a.Put(ctx, key, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.List(ctx, "members/1/")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func listEmpty(t *testing.T, a, _ election.Store) {
	got, err := a.List(within(t), "members/1/")
	if err != nil || len(got) != 0 {
		t.Errorf("got %q, %v, want nothing", got, err)
	}
}

func largest(t *testing.T, a, b election.Store) {
	want := bytes.Repeat([]byte("0123456789abcdef"), election.MaxValueBytes/16)
	if err := a.Create(within(t), "server/1/credentials", want); err != nil {
		t.Fatal(err)
	}
	if got := get(t, b, "server/1/credentials"); !bytes.Equal(got, want) {
		t.Errorf("got %d other bytes", len(got))
	}
}

func impossible(t *testing.T, a, _ election.Store) {
	ctx := within(t)
	for _, key := range []string{"", "/", "a/", "/a", "a//b", "../a", "a/..", "A", "a b", "a\x00", "ä", strings.Repeat("a", 10_000)} {
		if err := a.Create(ctx, key, []byte("x")); err == nil || errors.Is(err, election.ErrExists) {
			t.Errorf("create %.20q: got %v", key, err)
		}
		if err := a.Put(ctx, key, []byte("x")); err == nil {
			t.Errorf("put %.20q was accepted", key)
		}
		if _, err := a.Get(ctx, key); err == nil || errors.Is(err, election.ErrNotFound) {
			t.Errorf("get %.20q: got %v", key, err)
		}
		if _, err := a.List(ctx, key+"/"); err == nil {
			t.Errorf("list %.20q was accepted", key+"/")
		}
	}
	if _, err := a.List(ctx, "members"); err == nil {
		t.Error("a prefix without a slash was accepted")
	}
	for _, size := range []int{0, election.MaxValueBytes + 1} {
		if err := a.Create(ctx, "generation/1/holder", make([]byte, size)); err == nil || errors.Is(err, election.ErrExists) {
			t.Errorf("create with %d bytes: got %v", size, err)
		}
		if err := a.Put(ctx, "generation/1/holder", make([]byte, size)); err == nil {
			t.Errorf("put with %d bytes was accepted", size)
		}
	}
}

func ended(t *testing.T, a, _ election.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Create(ctx, "generation/1/holder", []byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("create: got %v, want context.Canceled", err)
	}
	if err := a.Put(ctx, "generation/1/heartbeat", []byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("put: got %v, want context.Canceled", err)
	}
	if _, err := a.Get(ctx, "generation/1/holder"); !errors.Is(err, context.Canceled) {
		t.Errorf("get: got %v, want context.Canceled", err)
	}
	if _, err := a.List(ctx, "members/1/"); !errors.Is(err, context.Canceled) {
		t.Errorf("list: got %v, want context.Canceled", err)
	}
}
