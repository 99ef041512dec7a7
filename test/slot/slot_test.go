package slot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/slot"
)

// remove is a clean that only removes the directory, and says of which places.
func remove(base string, cleaned *[]int) func(context.Context, int) error {
	return func(_ context.Context, number int) error {
		*cleaned = append(*cleaned, number)
		return os.RemoveAll(filepath.Join(base, string(rune('0'+number))))
	}
}

func TestEveryPlaceHasOneHolder(t *testing.T) {
	base := filepath.Join(t.TempDir(), "places")
	var cleaned []int
	var held []*slot.Place
	for want := range 2 {
		p, err := slot.Take(t.Context(), base, 2, remove(base, &cleaned))
		if err != nil {
			t.Fatal(err)
		}
		if p.Number != want || p.Dir != filepath.Join(base, string(rune('0'+want))) {
			t.Errorf("place %d is %d in %s", want, p.Number, p.Dir)
		}
		if err := os.Mkdir(p.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		held = append(held, p)
	}
	if _, err := slot.Take(t.Context(), base, 2, remove(base, &cleaned)); !errors.Is(err, slot.ErrNoneFree) {
		t.Errorf("the third of two places: %v", err)
	}
	if len(cleaned) > 0 {
		t.Errorf("places %v were cleaned while they were held", cleaned)
	}
	// The second is as a killed test leaves it: free, with a directory.
	if err := held[1].Release(); err != nil {
		t.Fatal(err)
	}
	p, err := slot.Take(t.Context(), base, 2, remove(base, &cleaned))
	if err != nil {
		t.Fatal(err)
	}
	if p.Number != 1 || !slices.Equal(cleaned, []int{1}) {
		t.Errorf("took place %d after cleaning %v, want 1 after [1]", p.Number, cleaned)
	}
}

func TestAPlaceThatCannotBeCleanedIsSaid(t *testing.T) {
	base := t.TempDir()
	if err := os.Mkdir(filepath.Join(base, "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if _, err := slot.Take(t.Context(), base, 2, func(context.Context, int) error { return broken }); !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	// Nothing stays taken.
	p, err := slot.Take(t.Context(), base, 2, func(context.Context, int) error { return os.RemoveAll(filepath.Join(base, "1")) })
	if err != nil || p.Number != 0 {
		t.Errorf("afterwards: %v, %v", p, err)
	}
}

func TestWhatIsMissingIsMadeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made")
	made := func() bool { _, err := os.Stat(path); return err == nil }
	var times atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := slot.Once(t.Context(), path, made, func() error {
				times.Add(1)
				return os.WriteFile(path, nil, 0o600)
			}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if times.Load() != 1 {
		t.Errorf("made %d times", times.Load())
	}
}

func TestTheWaitForALockEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	held, err := slot.TryLock(path)
	if err != nil || held == nil {
		t.Fatal(held, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := slot.Lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a held lock: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := slot.Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}
