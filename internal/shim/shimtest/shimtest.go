// Package shimtest holds every implementation of shim.Node and shim.CacheNode
// to the same contract, and has a fake of both for faults.
//
// The suites are run against a real containerd with real shims, and against
// Fake; what passes in one and fails in the other is a bug in one of them.
package shimtest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/shim"
)

const (
	// shortDeadline is for proofs that must run out of time. It leaves a shim
	// on a busy machine time to start.
	shortDeadline = 5 * time.Second
	// longDeadline is for everything else.
	longDeadline = 2 * time.Minute
)

// NodeFixture is an implementation of Node with runtimes of known behaviour.
type NodeFixture struct {
	Node shim.Node
	// Good runs WebAssembly. File does too, from a file in an image; its Name
	// is empty when the implementation makes no difference.
	Good, File shim.Runtime
	// Hollow reports success and runs nothing.
	Hollow shim.Runtime
	// Broken cannot create tasks.
	Broken shim.Runtime
	// Stuck starts and never ends.
	Stuck shim.Runtime
	// Chatty writes without end.
	Chatty shim.Runtime
	// Missing has a handler and no binary; Discover believed otherwise.
	Missing shim.Runtime
	// Abandon leaves a container behind, as a process that crashed would.
	Abandon func(t *testing.T)
	// Left names what is there that only a run in progress may have.
	Left func(t *testing.T) []string
	// Stop ends containerd without warning, Start brings it back.
	Stop, Start func(t *testing.T)
}

// TestNode runs the suite. The fixture is made once; its parts are cleaned up
// through t.
func TestNode(t *testing.T, fixture NodeFixture) {
	f := fixture
	prove := func(t *testing.T, ctx context.Context, runtime shim.Runtime, deadline time.Duration) shim.Proof {
		t.Helper()
		proof := shim.NewProver(f.Node, shim.ProverOptions{Deadline: deadline}).Prove(ctx, runtime)
		if proof.OK != (proof.Code == shim.CodeOK) || proof.Message == "" || proof.At.IsZero() || proof.Key != runtime.Key() || proof.Identity != runtime.Identity() {
			t.Errorf("incoherent proof: %+v", proof)
		}
		return proof
	}
	expect := func(t *testing.T, proof shim.Proof, code shim.Code) {
		t.Helper()
		if proof.Code != code {
			t.Fatalf("code %q (%s), want %q", proof.Code, proof.Message, code)
		}
	}
	clean := func(t *testing.T) {
		t.Helper()
		if left := f.Left(t); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	cases := []struct {
		behaviour string
		runtime   shim.Runtime
		deadline  time.Duration
		code      shim.Code
	}{
		{"a runtime that runs WebAssembly is proven", f.Good, longDeadline, shim.CodeOK},
		{"a module in a file system is run too", f.File, longDeadline, shim.CodeOK},
		{"success without having run anything is no proof", f.Hollow, longDeadline, shim.CodeWrongOutput},
		{"a shim that cannot create tasks is said to", f.Broken, longDeadline, shim.CodeCreateFailed},
		{"a shim that hangs runs out of time", f.Stuck, shortDeadline, shim.CodeTimeout},
		{"output without end is cut off", f.Chatty, longDeadline, shim.CodeWrongOutput},
		{"a shim that is not there is not found", f.Missing, longDeadline, shim.CodeNotFound},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			if tc.runtime.Name == "" {
				t.Skip("this implementation has no such runtime")
			}
			expect(t, prove(t, t.Context(), tc.runtime, tc.deadline), tc.code)
			clean(t)
		})
	}

	t.Run("a cancelled proof is no answer and leaves nothing", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		timer := time.AfterFunc(time.Second, cancel)
		defer timer.Stop()
		proof := prove(t, ctx, f.Stuck, longDeadline)
		expect(t, proof, shim.CodeCancelled)
		if proof.Code.Answered() {
			t.Error("cancellation counts as an answer")
		}
		clean(t)
	})

	t.Run("proofs at the same time do not disturb each other", func(t *testing.T) {
		var group sync.WaitGroup
		for range 3 {
			group.Go(func() {
				if proof := prove(t, t.Context(), f.Good, longDeadline); !proof.OK {
					t.Errorf("%s: %s", proof.Code, proof.Message)
				}
			})
		}
		group.Wait()
		clean(t)
	})

	t.Run("leftovers of a crash are removed", func(t *testing.T) {
		f.Abandon(t)
		if len(f.Left(t)) == 0 {
			t.Fatal("the fixture left nothing behind")
		}
		removed, err := f.Node.Clean(t.Context())
		if err != nil || removed != 1 {
			t.Errorf("Clean() = %d, %v, want 1 container", removed, err)
		}
		clean(t)
		if removed, err := f.Node.Clean(t.Context()); err != nil || removed != 0 {
			t.Errorf("second Clean() = %d, %v, want nothing to do", removed, err)
		}
	})

	t.Run("containerd that goes away is not the runtime's failure", func(t *testing.T) {
		before, err := f.Node.Server(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var once sync.Once
		timer := time.AfterFunc(2*time.Second, func() { once.Do(func() { f.Stop(t) }) })
		defer timer.Stop()
		proof := prove(t, t.Context(), f.Stuck, longDeadline)
		expect(t, proof, shim.CodeUnreachable)
		if proof.Code.Answered() {
			t.Error("a missing answer counts as an answer")
		}
		once.Do(func() {}) // Stop has returned

		if _, err := f.Node.Server(t.Context()); !errors.Is(err, shim.ErrUnreachable) {
			t.Errorf("Server() while down: %v, want ErrUnreachable", err)
		}
		expect(t, prove(t, t.Context(), f.Good, longDeadline), shim.CodeUnreachable)

		f.Start(t)
		after, err := f.Node.Server(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if before == after {
			t.Errorf("a restarted containerd looks like the one before: %+v", after)
		}
		if _, err := f.Node.Clean(t.Context()); err != nil {
			t.Error(err)
		}
		clean(t)
		expect(t, prove(t, t.Context(), f.Good, longDeadline), shim.CodeOK)
	})
}

// CacheFixture is an implementation of CacheNode with images that Kubernetes
// could have pulled.
type CacheFixture struct {
	Node shim.CacheNode
	// Good compiles and keeps what it compiled; Hollow does not.
	Good, Hollow shim.Runtime
	// Key is Good's, from a proof.
	Key shim.CompileKey
	// Images makes n images of different Wasm modules, none compiled yet.
	Images func(t *testing.T, n int) []string
	// Native is an image without Wasm layers, Absent the name of none.
	Native, Absent string
	// Compilations says how often Good compiled an image.
	Compilations func(t *testing.T, image string) int
	// Evict removes what was compiled of an image, not the labels.
	Evict func(t *testing.T, image string)
	// Left names containers that only a run in progress may have.
	Left func(t *testing.T) []string
}

// TestCacheNode runs the suite.
func TestCacheNode(t *testing.T, f CacheFixture) {
	warmer := shim.NewWarmer(f.Node, shim.WarmerOptions{Deadline: longDeadline})
	images := f.Images(t, 4)
	clean := func(t *testing.T) {
		t.Helper()
		if left := f.Left(t); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}

	t.Run("an image is compiled once", func(t *testing.T) {
		image := images[0]
		if cached, err := warmer.Cached(t.Context(), f.Key, image); err != nil || cached {
			t.Fatalf("Cached() before = %t, %v", cached, err)
		}
		first, err := warmer.Warm(t.Context(), f.Good, f.Key, image)
		if err != nil {
			t.Fatal(err)
		}
		if first.Created != 1 || !first.ImageCache.Warm(f.Key) || len(first.WasmLayers) != 1 {
			t.Errorf("first warming: %+v", first)
		}
		if cached, err := warmer.Cached(t.Context(), f.Key, image); err != nil || !cached {
			t.Errorf("Cached() after = %t, %v", cached, err)
		}
		second, err := warmer.Warm(t.Context(), f.Good, f.Key, image)
		if err != nil || second.Created != 0 {
			t.Errorf("second warming: %+v, %v, want no task", second, err)
		}
		// A pod's create, which is what warming is for.
		if err := f.Node.CreateTask(t.Context(), f.Good, image); err != nil {
			t.Fatal(err)
		}
		if n := f.Compilations(t, image); n != 1 {
			t.Errorf("compiled %d times, want once", n)
		}
		clean(t)
	})

	t.Run("without a key the result is read from the labels", func(t *testing.T) {
		result, err := warmer.Warm(t.Context(), f.Good, shim.CompileKey{}, images[1])
		if err != nil || result.Created != 1 || !result.ImageCache.Warm(f.Key) {
			t.Errorf("%+v, %v", result, err)
		}
		clean(t)
	})

	t.Run("labels alone do not make an image warm", func(t *testing.T) {
		image := images[1]
		f.Evict(t, image)
		if cached, err := warmer.Cached(t.Context(), f.Key, image); err != nil || cached {
			t.Errorf("Cached() = %t, %v after the code is gone", cached, err)
		}
		if result, err := warmer.Warm(t.Context(), f.Good, f.Key, image); err != nil || result.Created != 1 {
			t.Errorf("warming again: %+v, %v", result, err)
		}
	})

	t.Run("a shim without a cache is told apart", func(t *testing.T) {
		if _, err := warmer.Warm(t.Context(), f.Hollow, shim.CompileKey{}, images[2]); !errors.Is(err, shim.ErrNotCompiled) {
			t.Errorf("error %v, want ErrNotCompiled", err)
		}
		clean(t)
	})

	t.Run("images that cannot be warmed are told apart", func(t *testing.T) {
		if _, err := warmer.Warm(t.Context(), f.Good, f.Key, f.Absent); !errors.Is(err, shim.ErrImageNotFound) {
			t.Errorf("absent image: %v, want ErrImageNotFound", err)
		}
		if _, err := warmer.Warm(t.Context(), f.Good, f.Key, f.Native); !errors.Is(err, shim.ErrNotCompilable) {
			t.Errorf("native image: %v, want ErrNotCompilable", err)
		}
	})

	t.Run("warming at the same time does not collide", func(t *testing.T) {
		var group sync.WaitGroup
		for range 3 {
			group.Go(func() {
				if result, err := warmer.Warm(t.Context(), f.Good, f.Key, images[3]); err != nil || result.Created > 1 {
					t.Errorf("%+v, %v", result, err)
				}
			})
		}
		group.Wait()
		clean(t)
	})
}
