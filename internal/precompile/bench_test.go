package precompile

import (
	"context"
	"os"
	"testing"
)

func guestsToMeasure(b *testing.B, run func(b *testing.B, path string)) {
	b.Run("C", func(b *testing.B) { run(b, cGuest(b)) })
	b.Run("Go", func(b *testing.B) { run(b, goGuest(b)) })
}

// BenchmarkCheck is what a submit waits for: a child from start to answer.
func BenchmarkCheck(b *testing.B) {
	guestsToMeasure(b, func(b *testing.B, path string) {
		c := newTestCompiler(b)
		for b.Loop() {
			if _, err := check(b, c, path, CheckOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkCompile is the child and the publishing, for comparison with
// BenchmarkLoad: a load is to be at least 15 times faster.
func BenchmarkCompile(b *testing.B) {
	guestsToMeasure(b, func(b *testing.B, path string) {
		s := openStore(b, b.TempDir())
		for b.Loop() {
			ref := ensureB(b, s, path)
			b.StopTimer()
			if err := s.Quarantine(ref, "benchmark"); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}

func ensureB(b *testing.B, s *Store, path string) ObjectRef {
	b.Helper()
	ref, _, err := s.Ensure(context.Background(), imageOf("a"), from(path, nil))
	if err != nil {
		b.Fatal(err)
	}
	return ref
}

func BenchmarkLoad(b *testing.B) {
	guestsToMeasure(b, func(b *testing.B, path string) {
		ref := ensureB(b, openStore(b, b.TempDir()), path)
		for b.Loop() {
			l, err := Load(context.Background(), ref.Dir, LoadOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if err := l.Close(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkVerify is the part of a load that hashes every byte.
func BenchmarkVerify(b *testing.B) {
	guestsToMeasure(b, func(b *testing.B, path string) {
		ref := ensureB(b, openStore(b, b.TempDir()), path)
		b.SetBytes(ref.SizeBytes)
		for b.Loop() {
			if _, _, err := verifyObject(ref.Dir, CurrentTarget()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkValidate is the validation without compiling, in this process.
func BenchmarkValidate(b *testing.B) {
	guestsToMeasure(b, func(b *testing.B, path string) {
		module, err := os.ReadFile(path)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(module)))
		for b.Loop() {
			if err := validate(context.Background(), module, maxMemoryPages); err != nil {
				b.Fatal(err)
			}
		}
	})
}
