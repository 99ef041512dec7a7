package function_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/storetest"
	"github.com/hearth-sh/hearth/test/needs"
)

// crashEnv makes the test binary a writer that is meant to be killed.
const crashEnv = "HEARTH_FUNCTION_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(crashEnv); path != "" {
		os.Exit(writeUntilKilled(path))
	}
	goleak.VerifyTestMain(m)
}

func TestBoltConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T, place string, now func() time.Time) function.Store {
		t.Helper()
		s, err := function.OpenBolt(filepath.Join(place, "db", "functions.db"), function.BoltOptions{Now: now})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func newRevision(n int) function.NewRevision {
	return function.NewRevision{
		ModuleDigest: fmt.Sprintf("sha256:%064x", n),
		Artifact:     v1alpha1.Artifact{Repository: "f", Digest: fmt.Sprintf("sha256:%064x", n)},
		Settings:     function.DefaultSettings(),
	}
}

func add(t testing.TB, s function.Store, name string, n int) function.Result {
	t.Helper()
	r, err := s.AddRevision(context.Background(), name, function.Change{}, func(*function.Function) (function.NewRevision, error) {
		return newRevision(n), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func open(t testing.TB, path string) *function.Bolt {
	t.Helper()
	s, err := function.OpenBolt(path, function.BoltOptions{LockTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// writeUntilKilled adds revisions and says on stdout what was acknowledged.
func writeUntilKilled(path string) int {
	s, err := function.OpenBolt(path, function.BoltOptions{})
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("f%d", i%3)
		r, err := s.AddRevision(context.Background(), name, function.Change{}, func(c *function.Function) (function.NewRevision, error) {
			n := 1
			if c != nil {
				n = c.Wanted + 1
			}
			return newRevision(n), nil
		})
		if err != nil {
			fmt.Println("error", err)
			return 1
		}
		fmt.Println(name, r.Function.Wanted)
	}
}

func TestKilledWriterLosesNothingAcknowledged(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	path := filepath.Join(t.TempDir(), "functions.db")
	acknowledged := map[string]int{}
	total := 0
	for range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// A random time, the first rounds within the creation of the file.
		kill := time.AfterFunc(time.Duration(rand.IntN(120))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var name string
			var n int
			if _, err := fmt.Sscan(lines.Text(), &name, &n); err != nil {
				t.Fatalf("writer: %s", lines.Text())
			}
			acknowledged[name] = n
			total++
		}
		_ = cmd.Wait()
		kill.Stop()

		s, err := function.OpenBolt(path, function.BoltOptions{})
		if err != nil {
			t.Fatalf("open after kill: %v", err)
		}
		for name, n := range acknowledged {
			f, err := s.Get(context.Background(), name)
			if err != nil || f.Wanted < n || f.Revision.ModuleDigest != newRevision(f.Wanted).ModuleDigest {
				t.Errorf("%s: acknowledged %d, have %+v, error %v", name, n, f, err)
			}
			acknowledged[name] = f.Wanted
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d acknowledged revisions", rounds, total)
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".new-*")); len(left) > rounds {
		t.Errorf("left over: %v", left)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	whole := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "functions.db")
		s, err := function.OpenBolt(path, function.BoltOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 60 {
			add(t, s, fmt.Sprintf("f%d", i), 1)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, path string)
		want   error
		hint   string
	}{
		{"locked by another process", func(t *testing.T, path string) { open(t, path) }, function.ErrLocked, "data directory"},
		{"not a database", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(strings.Repeat("hello", 9000)), 0o600); err != nil {
				t.Fatal(err)
			}
		}, function.ErrCorrupt, "backup"},
		{"cut short", func(t *testing.T, path string) {
			if err := os.Truncate(path, 3*4096); err != nil {
				t.Fatal(err)
			}
		}, function.ErrCorrupt, "backup"},
		{"a page of zeros", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			// All pages but the two that say where things are.
			for at := int64(2 * 4096); at < info.Size(); at += 4096 {
				if _, err := f.WriteAt(make([]byte, 4096), at); err != nil {
					t.Fatal(err)
				}
			}
		}, function.ErrCorrupt, "backup"},
		{"records of garbage", func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("functions")).Put([]byte("f1"), []byte("{")) })
			if err := errors.Join(err, db.Close()); err != nil {
				t.Fatal(err)
			}
		}, function.ErrCorrupt, "backup"},
		{"a later format", func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 0, 0, 0, 0, 99})
			})
			if err := errors.Join(err, db.Close()); err != nil {
				t.Fatal(err)
			}
		}, function.ErrFormat, ""},
		{"a directory in its place", func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, nil, "directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := whole(t)
			c.damage(t, path)
			_, err := function.OpenBolt(path, function.BoltOptions{LockTimeout: 50 * time.Millisecond})
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) || !strings.Contains(err.Error(), c.hint) {
				t.Fatalf("error %v, want %v with %q", err, c.want, c.hint)
			}
			t.Log(err)
		})
	}
}

func TestEmptyFileIsANewDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "functions.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	add(t, open(t, path), "hello", 1)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, error %v", info.Mode(), err)
	}
}

func TestFullDiskRefusesAndRecovers(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=256k")
	s, err := function.OpenBolt(filepath.Join(dir, "functions.db"), function.BoltOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	add(t, s, "hello", 1)
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(ballast, strings.NewReader(strings.Repeat("x", 1<<20)))
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	_ = ballast.Close()

	big := newRevision(2)
	big.Settings.Env = map[string]string{"A": strings.Repeat("x", 60_000)}
	var refused error
	for i := 0; i < 20 && refused == nil; i++ {
		big.Settings.TimeoutMS++
		_, refused = s.AddRevision(context.Background(), "hello", function.Change{}, func(*function.Function) (function.NewRevision, error) { return big, nil })
	}
	if !errors.Is(refused, function.ErrDiskFull) {
		t.Fatalf("error %v", refused)
	}
	before, err := s.Get(context.Background(), "hello")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(ballast.Name()); err != nil {
		t.Fatal(err)
	}
	after := add(t, s, "hello", 3)
	if after.Function.Wanted != before.Wanted+1 {
		t.Fatalf("from %d to %d", before.Wanted, after.Function.Wanted)
	}
}

func TestReadOnlyFileSystem(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=1m")
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := function.OpenBolt(filepath.Join(dir, "functions.db"), function.BoltOptions{})
	if !errors.Is(err, function.ErrReadOnly) {
		t.Fatalf("error %v", err)
	}
}

func BenchmarkGetAmongThousand(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "functions.db"))
	for i := range 1000 {
		add(b, s, fmt.Sprintf("f%d", i), 1)
	}
	for b.Loop() {
		if _, err := s.Get(context.Background(), "f500"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAddRevision(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "functions.db"))
	for i := 0; b.Loop(); i++ {
		add(b, s, "hello", i+1)
	}
}
