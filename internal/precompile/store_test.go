package precompile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/internal/sandbox"
	"github.com/hearth-sh/hearth/internal/wasm"
	"github.com/hearth-sh/hearth/test/needs"
)

func TestGuestsCompileLoadAndRun(t *testing.T) {
	for _, g := range []struct {
		name  string
		build func(testing.TB) string
		want  string
	}{{"C", cGuest, "hello from C"}, {"Go", goGuest, "hello from Go"}} {
		t.Run(g.name, func(t *testing.T) {
			path := g.build(t)
			s := openStore(t, t.TempDir())
			report, err := check(t, s.options.Compiler, path, CheckOptions{MemoryLimitMiB: 128})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", report)
			calls := 0
			ref, phases, err := s.Ensure(t.Context(), imageOf(g.name), from(path, &calls))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v %+v", ref, phases)
			l, err := Load(t.Context(), ref.Dir, LoadOptions{MemoryLimitPages: 2048})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close(t.Context())
			t.Logf("%+v %+v", l.Timings, l.Manifest)
			if out := runGuest(t, l); !strings.Contains(out, g.want) {
				t.Fatalf("printed %q", out)
			}
			again, phases, err := s.Ensure(t.Context(), imageOf(g.name), from(path, &calls))
			if err != nil || again != ref || calls != 1 || len(phases) != 0 {
				t.Fatalf("second Ensure: %+v, %v, %d calls, %v", again, phases, calls, err)
			}
		})
	}
}

func ensure(t testing.TB, s *Store, image, path string) ObjectRef {
	t.Helper()
	ref, _, err := s.Ensure(t.Context(), imageOf(image), from(path, nil))
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestStoreKeepsItsObjectsOverARestart(t *testing.T) {
	dir, path := t.TempDir(), writeFile(t, distinctModule(1))
	s := openStore(t, dir)
	ref := ensure(t, s, "a", path)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	if got, ok := s.Object(imageOf("a")); !ok || got != ref {
		t.Fatalf("%+v, %v", got, ok)
	}
	calls := 0
	if got, phases, err := s.Ensure(t.Context(), imageOf("a"), from(path, &calls)); err != nil || got != ref || calls != 0 || phases != nil {
		t.Fatalf("%+v %v %d %v", got, phases, calls, err)
	}
	if _, ok := s.Object(imageOf("b")); ok {
		t.Error("has an image that nobody brought")
	}
	empty(t, filepath.Join(dir, tmpName), filepath.Join(dir, quarantineName))
}

func TestSameModuleUnderTwoImagesIsOneObject(t *testing.T) {
	s, path := openStore(t, t.TempDir()), writeFile(t, distinctModule(1))
	a := ensure(t, s, "a", path)
	_, phases, err := s.Ensure(t.Context(), imageOf("b"), from(path, nil))
	if err != nil || len(phases) != 0 {
		t.Fatalf("compiled again: %v, %v", phases, err)
	}
	b, _ := s.Object(imageOf("b"))
	if a != b || s.Usage().Objects != 1 || s.Usage().Images != 2 {
		t.Fatalf("%+v %+v %+v", a, b, s.Usage())
	}
}

func TestConcurrentEnsuresShareOneCompile(t *testing.T) {
	registry := prometheus.NewRegistry()
	s := openStore(t, t.TempDir(), func(o *StoreOptions) { o.Registerer = registry })
	path := writeFile(t, distinctModule(1))
	var group sync.WaitGroup
	var calls atomic.Int32
	for i := range 16 {
		group.Go(func() {
			_, _, err := s.Ensure(t.Context(), imageOf(strconv.Itoa(i%4)), func(context.Context) (string, error) {
				calls.Add(1)
				return path, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := calls.Load(); n != 4 {
		t.Errorf("modules fetched %d times for 4 images", n)
	}
	if n := sample(t, registry, "hearth_precompile_duration_seconds"); n != 1 {
		t.Errorf("compiled %v times", n)
	}
}

// sample reads a counter, or how often the phase "compile" was observed.
func sample(t *testing.T, registry *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			switch {
			case m.GetHistogram() != nil && m.GetLabel()[0].GetValue() == "compile":
				return float64(m.GetHistogram().GetSampleCount())
			case m.GetCounter() != nil:
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestWorkGoesOnForWhoeverStillWaits(t *testing.T) {
	s, path := openStore(t, t.TempDir()), writeFile(t, distinctModule(1))
	fetching, goOn := make(chan struct{}), make(chan struct{})
	first, leave := context.WithCancel(t.Context())
	firstDone, secondDone := make(chan error), make(chan error)
	go func() {
		_, _, err := s.Ensure(first, imageOf("a"), func(context.Context) (string, error) {
			close(fetching)
			<-goOn
			return path, nil
		})
		firstDone <- err
	}()
	<-fetching
	go func() {
		_, _, err := s.Ensure(t.Context(), imageOf("a"), func(context.Context) (string, error) { return "", errors.New("called twice") })
		secondDone <- err
	}()
	eventually(t, "the second waits too", func() bool {
		s.images.mu.Lock()
		defer s.images.mu.Unlock()
		for _, f := range s.images.running {
			return f.waiters == 2
		}
		return false
	})
	leave()
	if err := <-firstDone; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(goOn)
	if err := <-secondDone; err != nil {
		t.Error(err)
	}
}

func TestWorkThatNobodyWaitsForIsCancelled(t *testing.T) {
	s := openStore(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	_, _, err := s.Ensure(ctx, imageOf("a"), func(work context.Context) (string, error) {
		cancel()
		<-work.Done()
		close(ended)
		return "", work.Err()
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	<-ended
}

func TestErrorsOfTheModuleSourceAreHandedOn(t *testing.T) {
	s := openStore(t, t.TempDir())
	unreachable := errors.New("registry unreachable")
	_, _, err := s.Ensure(t.Context(), imageOf("a"), func(context.Context) (string, error) { return "", unreachable })
	if !errors.Is(err, unreachable) {
		t.Fatal(err)
	}
	for _, digest := range []string{"", "latest", "sha256:..", "sha512:" + strings.Repeat("0", 64), "sha256:" + strings.Repeat("A", 64), "sha256:../../" + strings.Repeat("0", 58)} {
		if _, _, err := s.Ensure(t.Context(), digest, from("/dev/null", nil)); err == nil {
			t.Errorf("%q was taken", digest)
		}
	}
}

// TestEveryDamageIsFoundAndRepaired flips bits all over an object, the code's
// function offsets included, which the engine itself would trust.
func TestEveryDamageIsFoundAndRepaired(t *testing.T) {
	registry := prometheus.NewRegistry()
	dir, path := t.TempDir(), writeFile(t, distinctModule(1))
	s := openStore(t, dir, func(o *StoreOptions) { o.Registerer = registry })
	ref := ensure(t, s, "a", path)
	m, err := readManifest(ref.Dir)
	if err != nil {
		t.Fatal(err)
	}
	code := m.Files[1].Path
	files := map[string]int64{manifestFile: 0, moduleFile: 0, code: 0}
	for name := range files {
		info, err := os.Stat(filepath.Join(ref.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = info.Size()
	}
	damage := func(what string, change func(file string) error, name string) {
		t.Helper()
		if err := change(filepath.Join(ref.Dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(t.Context(), ref.Dir, LoadOptions{}); !errors.Is(err, ErrUnusable) {
			t.Errorf("%s of %s: a reader got %v", what, name, err)
		}
		calls := 0
		got, _, err := s.Ensure(t.Context(), imageOf("a"), from(path, &calls))
		if err != nil || got != ref || calls != 1 {
			t.Fatalf("%s of %s: %+v, %d compiles, %v", what, name, got, calls, err)
		}
		if l, err := Load(t.Context(), ref.Dir, LoadOptions{}); err != nil {
			t.Fatalf("%s of %s: after repair: %v", what, name, err)
		} else {
			_ = l.Close(t.Context())
		}
	}
	flip := func(offset int64) func(string) error {
		return func(file string) error {
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			// A manifest made again may be shorter: it has times in it.
			offset := min(offset, info.Size()-1)
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, offset); err != nil {
				return err
			}
			b[0] ^= 1 << (offset % 8)
			_, err = f.WriteAt(b, offset)
			return err
		}
	}
	count := 0
	for name, size := range files {
		offsets := []int64{0, 1, size / 3, size / 2, size - 2, size - 1}
		if slow() {
			offsets = offsets[3:4]
		}
		if name == code {
			// Magic, version, count, then the offset of the first function.
			offsets = append(offsets, 6+1+3+4)
		}
		for _, offset := range offsets {
			damage(fmt.Sprintf("bit of byte %d", offset), flip(offset), name)
			count++
		}
		if slow() {
			continue
		}
		damage("truncation", func(f string) error { return os.Truncate(f, size/2) }, name)
		damage("emptying", func(f string) error { return os.Truncate(f, 0) }, name)
		damage("removal", os.Remove, name)
		damage("link in place", func(f string) error { return errors.Join(os.Rename(f, f+"~"), os.Symlink(f+"~", f)) }, name)
		damage("pipe in place", func(f string) error { return errors.Join(os.Remove(f), syscall.Mkfifo(f, 0o644)) }, name)
		count += 5
	}
	if n := sample(t, registry, "hearth_store_quarantined_total"); n != float64(count) {
		t.Errorf("%v quarantined, want %d", n, count)
	}
	if n := s.Usage().Quarantined; n != min(count, maxQuarantined) {
		t.Errorf("%d kept in quarantine of %d, want at most %d", n, count, maxQuarantined)
	}
}

// TestEveryBitOfTheSmallDocumentsCounts: no single flipped bit of a manifest
// or image index goes unnoticed.
func TestEveryBitOfTheSmallDocumentsCounts(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	ref := ensure(t, s, "a", writeFile(t, distinctModule(1)))
	for path, document := range map[string]func() interface{ validate() error }{
		filepath.Join(ref.Dir, manifestFile):                     func() interface{ validate() error } { return new(Manifest) },
		filepath.Join(dir, imagesName, imageOf("a")[7:]+".json"): func() interface{ validate() error } { return new(imageIndex) },
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := unseal(b, document()); err != nil {
			t.Fatal(err)
		}
		for i := range b {
			for bit := range 8 {
				b[i] ^= 1 << bit
				if err := unseal(b, document()); err == nil {
					t.Errorf("%s: bit %d of byte %d", filepath.Base(path), bit, i)
				}
				b[i] ^= 1 << bit
			}
		}
	}
}

func TestOpenSurvivesGarbage(t *testing.T) {
	dir, path := t.TempDir(), writeFile(t, distinctModule(1))
	s := openStore(t, dir)
	kept := ensure(t, s, "kept", path)
	lost := ensure(t, s, "lost", writeFile(t, distinctModule(2)))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	hexName := strings.Repeat("ab", 32)
	err := errors.Join(
		os.RemoveAll(lost.Dir),
		os.WriteFile(filepath.Join(dir, objectsName, "README"), []byte("hello"), 0o644),
		os.Mkdir(filepath.Join(dir, objectsName, hexName), 0o755),
		os.Symlink("/etc", filepath.Join(dir, objectsName, strings.Repeat("cd", 32))),
		os.Mkdir(filepath.Join(dir, objectsName, "odd\nname"), 0o700),
		os.Rename(filepath.Join(dir, objectsName), filepath.Join(dir, "o")), os.Rename(filepath.Join(dir, "o"), filepath.Join(dir, objectsName)),
		os.WriteFile(filepath.Join(dir, imagesName, hexName+".json"), []byte("{}"), 0o644),
		os.WriteFile(filepath.Join(dir, imagesName, "x"), nil, 0o644),
		os.Mkdir(filepath.Join(dir, imagesName, strings.Repeat("ef", 32)+".json"), 0o755),
		syscall.Mkfifo(filepath.Join(dir, imagesName, strings.Repeat("12", 32)+".json"), 0o644),
		os.MkdirAll(filepath.Join(dir, tmpName, "a", "b"), 0o700),
		os.WriteFile(filepath.Join(dir, tmpName, "c"), nil, 0),
		os.WriteFile(filepath.Join(dir, quarantineName, "-"), nil, 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	if got, ok := s.Object(imageOf("kept")); !ok || got != kept {
		t.Errorf("lost what was whole: %+v, %v", got, ok)
	}
	if _, ok := s.Object(imageOf("lost")); ok {
		t.Error("has an object that is gone")
	}
	if u := s.Usage(); u.Objects != 1 || u.Images != 1 {
		t.Errorf("%+v", u)
	}
	empty(t, filepath.Join(dir, tmpName))
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	// What should be a directory and is not.
	if err := errors.Join(s.Close(), os.RemoveAll(filepath.Join(dir, imagesName)), os.WriteFile(filepath.Join(dir, imagesName), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	if got := ensure(t, s, "kept", path); got != kept {
		t.Errorf("%+v", got)
	}
}

func TestStoreHasOneWriter(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := Open(dir, s.options); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openStore(t, dir)
}

func TestObjectsOfAnotherTargetAreMadeAgain(t *testing.T) {
	dir, path := t.TempDir(), writeFile(t, distinctModule(1))
	s := openStore(t, dir)
	ref := ensure(t, s, "a", path)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// As an earlier lowering would have left it.
	m, err := readManifest(ref.Dir)
	if err != nil {
		t.Fatal(err)
	}
	m.Target.Lowering--
	b, err := seal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(ref.Dir, manifestFile), b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(t.Context(), ref.Dir, LoadOptions{}); !errors.Is(err, ErrUnusable) {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	if _, ok := s.Object(imageOf("a")); ok {
		t.Error("offers an object of another target")
	}
	if got := ensure(t, s, "a", path); got != ref {
		t.Errorf("%+v", got)
	}
	if _, ok := s.Object(imageOf("a")); !ok {
		t.Error("not there after it was made again")
	}
}

func TestQuarantineOnRequestMakesAMiss(t *testing.T) {
	s, path := openStore(t, t.TempDir()), writeFile(t, distinctModule(1))
	ref := ensure(t, s, "a", path)
	if err := s.Quarantine(ref, "a reader could not load it"); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Object(imageOf("a")); ok {
		t.Error("still there")
	}
	if err := s.Quarantine(ref, "once more"); err != nil {
		t.Error(err)
	}
	if err := s.Quarantine(ObjectRef{ID: "../../etc"}, ""); err == nil {
		t.Error("took a path")
	}
	if u := s.Usage(); u.Bytes != 0 || u.Objects != 0 || u.Images != 0 || u.Quarantined != 1 {
		t.Errorf("%+v", u)
	}
	ensure(t, s, "a", path)
}

func TestLeastRecentlyUsedIsEvictedAndLiveIsNot(t *testing.T) {
	dir := t.TempDir()
	registry := prometheus.NewRegistry()
	s := openStore(t, dir, func(o *StoreOptions) { o.Registerer = registry })
	clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s.now = func() time.Time { clock = clock.Add(time.Second); return clock }
	paths := map[string]string{}
	for i, n := range []string{"a", "b", "c", "d", "e"} {
		paths[n] = writeFile(t, distinctModule(i))
	}
	size := ensure(t, s, "a", paths["a"]).SizeBytes
	ensure(t, s, "b", paths["b"])
	s.options.BudgetBytes = 3*size + size/2
	ensure(t, s, "c", paths["c"])

	// Nobody has said what is live: nothing may go.
	_, _, err := s.Ensure(t.Context(), imageOf("d"), from(paths["d"], nil))
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeDiskFull || !e.Retryable || s.Usage().Objects != 3 {
		t.Fatalf("%v, %+v", err, s.Usage())
	}
	empty(t, filepath.Join(dir, tmpName))

	has := func(want string) {
		t.Helper()
		got := ""
		for _, n := range []string{"a", "b", "c", "d", "e"} {
			if _, ok := s.Object(imageOf(n)); ok {
				got += n
			}
		}
		if got != want {
			t.Fatalf("store has %q, want %q", got, want)
		}
	}
	s.SetLive([]string{imageOf("b"), "not a digest"})
	s.Touch(imageOf("a"))
	ensure(t, s, "d", paths["d"]) // c is the oldest that is not live
	has("abd")
	ensure(t, s, "e", paths["e"])
	has("bde")
	if u := s.Usage(); u.LiveBytes != size || u.Bytes > u.BudgetBytes {
		t.Errorf("%+v", u)
	}
	// The order survives a restart.
	s.Touch(imageOf("d"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, func(o *StoreOptions) { o.BudgetBytes = 2 * size; o.Registerer = registry })
	s.SetLive([]string{imageOf("b")})
	if err := s.Evict(t.Context()); err != nil {
		t.Fatal(err)
	}
	has("bd")
	// Live objects alone leave no room: an error, and nothing is evicted.
	s.SetLive([]string{imageOf("b"), imageOf("d")})
	if _, _, err := s.Ensure(t.Context(), imageOf("a"), from(paths["a"], nil)); codeOf(err) != CodeDiskFull {
		t.Fatal(err)
	}
	has("bd")
	s.options.BudgetBytes = 1
	if err := s.Evict(t.Context()); err != nil {
		t.Fatal(err)
	}
	has("bd")
	if n := sample(t, registry, "hearth_store_evictions_total"); n != 1 {
		t.Errorf("%v evictions since the restart", n)
	}
}

func TestFullDiskIsAnErrorWithoutLeftovers(t *testing.T) {
	dir := t.TempDir()
	needs.Tmpfs(t, dir, "size=256k")
	s := openStore(t, dir)
	small, big := writeFile(t, distinctModule(1)), writeFile(t, compileBomb(80, 400))
	ref := ensure(t, s, "small", small)
	for range 3 {
		_, _, err := s.Ensure(t.Context(), imageOf("big"), from(big, nil))
		var e *Error
		if !errors.As(err, &e) || e.Code != CodeDiskFull || !e.Retryable || !strings.Contains(e.Error(), "no space") {
			t.Fatalf("%v", err)
		}
		empty(t, filepath.Join(dir, tmpName))
	}
	if got := ensure(t, s, "small", small); got != ref {
		t.Error("what was there is not any more")
	}
	if err := syscall.Mount("hearth-test", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	ensure(t, s, "big", big)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOthersCanReadAndNotWrite(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := t.TempDir()
	s := openStore(t, dir)
	ref := ensure(t, s, "a", writeFile(t, distinctModule(1)))
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || path == filepath.Join(dir, lockName) {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		want := os.FileMode(fileMode)
		if e.IsDir() {
			want = directoryMode
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != uint32(os.Geteuid()) {
			t.Errorf("%s belongs to %d", path, uid)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = ref
}

// readerMain loads an object as a worker does: confined to reading it, as
// another account if there is one, and with an engine that must not compile.
func readerMain(args []string) int {
	a, err := sandbox.Enter(sandbox.Policy{ReadOnly: []string{args[0]}, AllowExecMemory: true})
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter:", err)
		return 1
	}
	l, err := Load(context.Background(), args[0], LoadOptions{})
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		return 1
	}
	defer l.Close(context.Background())
	m, err := l.Runtime.InstantiateModule(context.Background(), l.Module, moduleConfig())
	if err != nil {
		fmt.Fprintln(os.Stderr, "instantiate:", err)
		return 1
	}
	if _, err := m.ExportedFunction("_start").Call(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "call:", err)
		return 1
	}
	if a.Seccomp {
		if err := os.WriteFile(filepath.Join(args[0], "x"), nil, 0o644); err == nil {
			fmt.Fprintln(os.Stderr, "could write")
			return 1
		}
	}
	return 0
}

func TestConfinedReaderUnderAnotherAccountLoads(t *testing.T) {
	s := openStore(t, t.TempDir())
	ref := ensure(t, s, "a", writeFile(t, distinctModule(1)))
	command := childCommand()
	cmd := exec.CommandContext(t.Context(), command[0], append(command[1:], ref.Dir)...)
	cmd.Env = childEnv("reader")
	if len(emulator()) == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: sandbox.Credential()}
		for dir := s.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := output(cmd); err != nil {
		t.Fatal(err)
	}
}

func TestLoadRefusesAMemoryOverItsLimit(t *testing.T) {
	s := openStore(t, t.TempDir())
	ref := ensure(t, s, "a", writeFile(t, startModule(emptyBody, section(5, 1, 0, 3))))
	if _, err := Load(t.Context(), ref.Dir, LoadOptions{MemoryLimitPages: 2}); codeOf(err) != CodeMemoryOverLimit {
		t.Fatal(err)
	}
	l, err := Load(t.Context(), ref.Dir, LoadOptions{MemoryLimitPages: 3})
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close(t.Context())
	if _, err := Load(t.Context(), filepath.Join(ref.Dir, "gone"), LoadOptions{}); !errors.Is(err, ErrUnusable) {
		t.Fatal(err)
	}
}

// TestStoredModuleHasNoBodies: what is loaded beside machine code is not read
// and validated all over again.
func TestStoredModuleHasNoBodies(t *testing.T) {
	s := openStore(t, t.TempDir())
	ref := ensure(t, s, "a", cGuest(t))
	stored, err := os.ReadFile(filepath.Join(ref.Dir, moduleFile))
	if err != nil {
		t.Fatal(err)
	}
	bodiless, err := wasm.WithoutBodies(stored)
	if err != nil || !bytes.Equal(stored, bodiless) {
		t.Errorf("the stored module has bodies (%v)", err)
	}
	l, err := Load(t.Context(), ref.Dir, LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestLoadNeverCompiles takes the code away after verification would have
// passed: the engine must say so and not make its own.
func TestLoadNeverCompiles(t *testing.T) {
	s := openStore(t, t.TempDir())
	ref := ensure(t, s, "a", writeFile(t, distinctModule(1)))
	m, err := readManifest(ref.Dir)
	if err != nil {
		t.Fatal(err)
	}
	module, err := os.ReadFile(filepath.Join(ref.Dir, moduleFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(ref.Dir, m.Files[1].Path)); err != nil {
		t.Fatal(err)
	}
	if err := loadCode(t.Context(), new(Loaded), ref.Dir, module, maxMemoryPages); err == nil || !strings.Contains(err.Error(), "does not find its code") {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Dir(filepath.Join(ref.Dir, m.Files[1].Path)))
	if err != nil || len(entries) != 0 {
		t.Fatalf("the engine wrote %v, %v", entries, err)
	}
}

// publisherMain publishes modules one after the other and says which are
// done, until it is killed.
func publisherMain(args []string) int {
	s, err := Open(args[0], StoreOptions{
		Compiler: NewCompiler(CompilerOptions{Command: childCommand(), Env: childEnv("child"), SameAccount: len(emulator()) > 0}),
		Logger:   slog.New(slog.DiscardHandler),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	first, _ := strconv.Atoi(args[1])
	for n := first; ; n++ {
		path := filepath.Join(args[2], strconv.Itoa(n))
		err := os.WriteFile(path, distinctModule(n), 0o600)
		if err == nil {
			_, _, err = s.Ensure(context.Background(), imageOf(strconv.Itoa(n)), from(path, nil))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(n)
	}
}

// TestKilledWriterLosesNothingItAcknowledged kills a writer, and sometimes
// its compiler, at random points, and looks at the store each time.
func TestKilledWriterLosesNothingItAcknowledged(t *testing.T) {
	rounds, life := 15, 300*time.Millisecond
	if slow() {
		rounds, life = 3, 6*time.Second
	}
	dir, modules := t.TempDir(), t.TempDir()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	next, published := 0, 0
	for range rounds {
		command := childCommand()
		cmd := exec.CommandContext(t.Context(), command[0], append(command[1:], dir, strconv.Itoa(next), modules)...)
		cmd.Env = append(os.Environ(), childEnv("publisher")...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(life/15 + time.Duration(random.Int64N(int64(life))))
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		err := cmd.Wait()
		if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("publisher ended by itself: %v: %s", err, stderr.String())
		}
		acknowledged := len(strings.Fields(stdout.String()))

		s := openStore(t, dir)
		for n := range next + acknowledged {
			ref, ok := s.Object(imageOf(strconv.Itoa(n)))
			if !ok {
				t.Fatalf("acknowledged image %d is gone", n)
			}
			if _, _, err := verifyObject(ref.Dir, CurrentTarget()); err != nil {
				t.Fatalf("image %d: %v", n, err)
			}
		}
		if q := s.Usage().Quarantined; q != 0 {
			t.Fatalf("%d objects were half published", q)
		}
		empty(t, filepath.Join(dir, tmpName))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		next += acknowledged
		published += acknowledged
	}
	t.Logf("%d kills, %d images acknowledged", rounds, published)
	if published == 0 {
		t.Error("no writer lived long enough to publish anything")
	}
}

func TestKilledCompilerIsAnErrorAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	path := writeFile(t, longCompile())
	done := make(chan error, 1)
	go func() {
		_, _, err := s.Ensure(t.Context(), imageOf("a"), from(path, nil))
		done <- err
	}()
	var pid int
	eventually(t, "the compiler writes", func() bool {
		matches, _ := filepath.Glob(filepath.Join(dir, tmpName, "*", "output", moduleFile))
		if len(matches) == 0 {
			return false
		}
		pid = childOf(os.Getpid())
		return pid != 0
	})
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := <-done
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeCompilerCrashed || !e.Retryable {
		t.Fatal(err)
	}
	empty(t, filepath.Join(dir, tmpName), filepath.Join(dir, objectsName), filepath.Join(dir, imagesName))
}

// childOf finds a child process whose parent is pid, 0 if there is none.
func childOf(pid int) int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// pid (command) state parent …; a command may have blanks and brackets.
		_, rest, ok := strings.Cut(string(b[max(bytes.LastIndexByte(b, ')'), 0):]), ") ")
		fields := strings.Fields(rest)
		if ok && len(fields) > 1 && fields[0] != "Z" && fields[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return child
		}
	}
	return 0
}

func TestCloseCancelsWhatIsRunning(t *testing.T) {
	s := openStore(t, t.TempDir())
	path := writeFile(t, longCompile())
	done := make(chan error, 1)
	go func() {
		_, _, err := s.Ensure(t.Context(), imageOf("a"), from(path, nil))
		done <- err
	}()
	eventually(t, "a child runs", func() bool { return len(s.options.Compiler.slots) == 1 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
