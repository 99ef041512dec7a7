package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-sh/hearth/internal/precompile"
)

// world is a loop with fakes around it, in a bubble of fake time.
type world struct {
	t   *testing.T
	rt  *fakeRuntime
	st  *fakeStore
	w   *fakeWarmer
	src *fixedSource
	o   Options
	l   *Loop
	// stop ends the loop as a SIGTERM would.
	stop func()
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, rt: newFakeRuntime(), st: newFakeStore(), w: &fakeWarmer{identity: "shim-1", cache: map[string]bool{}}, src: newFixedSource()}
	dir := t.TempDir()
	w.o = Options{
		Source: w.src, Runtime: w.rt, Store: w.st, Warmer: w.w, Node: "node-a",
		TempDir: dir, StatePath: filepath.Join(dir, "images.json"),
		SetLive: func(d []string) { w.st.mu.Lock(); w.st.live = d; w.st.mu.Unlock() },
	}
	return w
}

func (w *world) start() {
	w.t.Helper()
	w.o.Registerer = prometheus.NewRegistry()
	l, err := New(w.o)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx) }()
	w.l, w.stop = l, func() { cancel(); <-done }
}

func (w *world) image(name string) ImageStatus {
	w.t.Helper()
	s, _ := w.l.Status()
	r, err := ParseReference(name)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, i := range s.Images {
		if i.Image == r.Name {
			return i
		}
	}
	w.t.Fatalf("no %s in %s", name, s.Summary)
	return ImageStatus{}
}

func wanting(name string, handlers ...string) Wanted {
	r, err := ParseReference(name)
	if err != nil {
		panic(err)
	}
	return Wanted{Reference: r, Handlers: handlers, Users: []string{"test"}, UserCount: 1}
}

func wasmLayer(module []byte) part {
	return part{"application/vnd.wasm.content.layer.v1+wasm", module}
}

// inBubble runs a test with fake time; everything it starts must end.
func inBubble(t *testing.T, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		f(t, w)
		if w.stop != nil {
			w.stop()
		}
	})
}

func TestAnImageIsPulledHeldWarmedAndCompiled(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		module := startModule('a', 10)
		d := w.rt.publish("r.example/app:1", "wasm", wasmLayer(module))
		w.src.want(wanting("r.example/app:1", "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		i := w.image("r.example/app:1")
		if i.State != StateWarm || i.Digest != d || i.Modules != 1 || i.Code != "" {
			t.Fatalf("%+v", i)
		}
		if w.rt.label("r.example/app@"+d, labelPinned) == "" {
			t.Error("not held")
		}
		if !slices.Equal(w.w.warmed, []string{"r.example/app:1 spin"}) {
			t.Errorf("warmed %q", w.w.warmed)
		}
		if w.st.count(sum(module)) != 1 || !slices.Equal(w.st.live, []string{sum(module)}) {
			t.Errorf("store %v live %v", w.st.ensured, w.st.live)
		}
		s, _ := w.l.Status()
		if c := s.Condition(); c != (Condition{"True", "AllWarm", "1/1 warm"}) {
			t.Errorf("%+v", c)
		}
	})
}

func TestARestartDoesNothingAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		module := startModule('a', 10)
		d := w.rt.publish("r.example/app:1", "wasm", wasmLayer(module))
		w.src.want(wanting("r.example/app@"+d, "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		w.stop()
		w.start()
		time.Sleep(2 * time.Minute)
		if i := w.image("r.example/app@" + d); i.State != StateWarm || i.Modules != 1 {
			t.Fatalf("%+v", i)
		}
		if len(w.rt.pulled()) != 1 || w.w.times() != 1 || w.st.count(sum(module)) != 1 {
			t.Errorf("pulls %d, warmed %d, compiled %d", len(w.rt.pulled()), w.w.times(), w.st.count(sum(module)))
		}
	})
}

func TestWhatGotLostIsMadeAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		module := startModule('a', 10)
		d := w.rt.publish("r.example/app:1", "wasm", wasmLayer(module))
		name := "r.example/app@" + d
		w.src.want(wanting(name, "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		for _, tt := range []struct {
			what string
			lose func()
			wait time.Duration
			ok   func() bool
		}{
			{"the image", func() { w.rt.set(func() { delete(w.rt.local, name); delete(w.rt.labels, name) }) }, time.Minute,
				func() bool { return len(w.rt.pulled()) == 2 && w.rt.label(name, labelPinned) != "" }},
			{"the pin", func() { w.rt.set(func() { clear(w.rt.labels[name]) }) }, time.Minute,
				func() bool { return w.rt.label(name, labelPinned) != "" && w.rt.label(name, labelOurs) == pinOwn }},
			{"the object", func() { w.st.mu.Lock(); clear(w.st.objects); w.st.mu.Unlock() }, time.Minute,
				func() bool { return w.st.count(sum(module)) == 2 }},
			{"the shim's cache", func() { w.w.mu.Lock(); clear(w.w.cache); w.w.mu.Unlock() }, recheck * 2,
				func() bool { return w.w.times() == 2 }},
			{"the shim, replaced by another", func() { w.w.mu.Lock(); w.w.identity = "shim-2"; w.w.mu.Unlock() }, time.Minute,
				func() bool { return w.w.times() == 3 }},
		} {
			tt.lose()
			time.Sleep(tt.wait)
			if i := w.image(name); !tt.ok() || i.State != StateWarm {
				t.Errorf("%s: not made again: %+v", tt.what, i)
			}
		}
	})
}

func TestFailuresAreSaidAndRecoverByThemselves(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(w *world)
		heal func(w *world)
		code string
		text string
	}{
		{"registry down", func(w *world) {
			w.rt.onPull = func(context.Context, Reference, *Auth, func(Progress) error) error {
				return fail(CodeRegistryUnavailable, nil, "connection refused")
			}
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeRegistryUnavailable, "refused"},
		{"a digest that lies", func(w *world) {
			w.rt.onPull = func(context.Context, Reference, *Auth, func(Progress) error) error {
				return fail(CodeDigestMismatch, nil, "unexpected digest")
			}
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeDigestMismatch, "unexpected"},
		{"a pull that stands still", func(w *world) {
			w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, progress func(Progress) error) error {
				for wait(ctx, time.Second) {
					if err := progress(Progress{Done: 10, Total: 100 << 20}); err != nil {
						return err
					}
				}
				return ctx.Err()
			}
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeStalled, "10 of"},
		{"a registry that drips", func(w *world) {
			w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, progress func(Progress) error) error {
				for n := int64(0); wait(ctx, time.Second); n++ {
					if err := progress(Progress{Done: n, Total: 100 << 20}); err != nil {
						return err
					}
				}
				return ctx.Err()
			}
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeStalled, "KiB"},
		{"an image that is too large, seen while it comes", func(w *world) {
			w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, progress func(Progress) error) error {
				return progress(Progress{Done: 0, Total: 2 << 30})
			}
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeTooLarge, "2048 MiB"},
		{"a disk that would be too full", func(w *world) {
			w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, progress func(Progress) error) error {
				return progress(Progress{Done: 0, Total: 400 << 20})
			}
			w.o.DiskPath = "/"
		}, func(w *world) { w.rt.set(func() { w.rt.onPull = nil }) }, CodeDiskLow, "must stay free"},
		{"a shim that fails", func(w *world) { w.w.err = errors.New("create failed") },
			func(w *world) { w.w.mu.Lock(); w.w.err = nil; w.w.mu.Unlock() }, CodeWarmFailed, "create failed"},
		{"a shim that only says it worked", func(w *world) { w.w.hollow = true },
			func(w *world) { w.w.mu.Lock(); w.w.hollow = false; w.w.mu.Unlock() }, CodeWarmFailed, "left nothing"},
		{"a store without room", func(w *world) {
			w.st.err = func(string, []byte) error {
				return &precompile.Error{Code: precompile.CodeDiskFull, Detail: "budget", Retryable: true}
			}
		}, func(w *world) { w.st.mu.Lock(); w.st.err = nil; w.st.mu.Unlock() }, CodeDiskFull, "budget"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				d := w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
				w.src.want(wanting("r.example/app@"+d, "spin"))
				tt.set(w)
				l := w.start
				l()
				w.l.mu.Lock()
				w.l.free = func(string) (int64, error) { return 2<<30 + 300<<20, nil }
				w.l.mu.Unlock()
				time.Sleep(4 * time.Minute)
				i := w.image("r.example/app@" + d)
				if i.State == StateWarm || i.Code != tt.code || !strings.Contains(i.Message, tt.text) || i.NextTry.IsZero() {
					t.Fatalf("%+v", i)
				}
				s, _ := w.l.Status()
				if c := s.Condition(); c.Status != "False" || c.Reason != "ImagesFailed" && c.Reason != "ImagesPending" {
					t.Errorf("%+v", c)
				}
				tt.heal(w)
				time.Sleep(longRetry * 2)
				if i := w.image("r.example/app@" + d); i.State != StateWarm || i.Code != "" {
					t.Errorf("did not recover: %+v", i)
				}
			})
		})
	}
}

func TestAModuleTheStoreRefusesDoesNotFailTheImage(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.st.err = func(string, []byte) error {
			return &precompile.Error{Code: precompile.CodeUnsupportedImport, Detail: "imports env.x"}
		}
		w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
		w.rt.publish("r.example/text:1", "wasm", part{"application/wasm", []byte("no wasm at all")})
		w.rt.publish("r.example/plain:1", "amd64", part{"application/vnd.oci.image.layer.v1.tar+gzip", []byte("damaged")})
		w.src.want(wanting("r.example/app:1", "spin"), wanting("r.example/text:1", "spin"), wanting("r.example/plain:1", "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		for name, want := range map[string]string{"app": "imports env.x", "text": "neither a core module nor a component", "plain": "cannot be unpacked"} {
			i := w.image("r.example/" + name + ":1")
			if i.State != StateWarm || i.Modules != 0 || len(i.Notes) != 1 || !strings.Contains(i.Notes[0], want) {
				t.Errorf("%+v", i)
			}
		}
	})
}

func TestPinsOfUnwantedImagesAreReleasedAndOthersPinsStay(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		var names []string
		for i, who := range []string{"ours", "k3s", "theirs"} {
			d := w.rt.publish("r.example/"+who+":1", "wasm", wasmLayer(startModule(byte('a'+i), 10)))
			names = append(names, "r.example/"+who+"@"+d)
		}
		w.rt.local[names[1]], w.rt.labels[names[1]] = w.rt.registry[names[1]], map[string]string{labelPinned: labelPinnedValue, labelK3s: "pinned"}
		w.rt.local[names[2]], w.rt.labels[names[2]] = w.rt.registry[names[2]], map[string]string{labelPinned: labelPinnedValue}
		w.src.want(wanting(names[0], "spin"), wanting(names[1], "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		w.stop() // SIGKILL would leave the same: labels and nothing else
		w.src.want()
		w.src.change(func(s *Snapshot) { s.Complete = false })
		w.start()
		time.Sleep(time.Hour)
		if w.rt.label(names[0], labelPinned) == "" {
			t.Fatal("released while it is not known what is wanted")
		}
		w.src.change(func(s *Snapshot) { s.Complete, s.StaleSince = true, time.Now() })
		time.Sleep(time.Hour)
		if w.rt.label(names[0], labelPinned) == "" {
			t.Fatal("released while the API does not answer")
		}
		w.src.change(func(s *Snapshot) { s.StaleSince = time.Time{} })
		time.Sleep(5 * time.Minute)
		if w.rt.label(names[0], labelPinned) == "" {
			t.Fatal("released too soon")
		}
		time.Sleep(10 * time.Minute)
		if w.rt.label(names[0], labelPinned) != "" || w.rt.label(names[0], labelOurs) != "" {
			t.Error("not released")
		}
		if w.rt.label(names[1], labelPinned) == "" || w.rt.label(names[1], labelOurs) != "" {
			t.Error("k3s's pin is gone, or ours stayed")
		}
		if w.rt.label(names[2], labelPinned) == "" {
			t.Error("somebody else's pin is gone")
		}
	})
}

// scripted are credentials that are refused until invalidated so often.
type scripted struct {
	bad         int32
	invalidated atomic.Int32
	asked       atomic.Int32
}

func (s *scripted) Credentials(context.Context, string) (string, string, time.Time, error) {
	s.asked.Add(1)
	if s.invalidated.Load() < s.bad {
		return "AWS", "old", time.Now().Add(time.Hour), nil
	}
	return "AWS", "new", time.Now().Add(time.Hour), nil
}
func (s *scripted) Invalidate(string) { s.invalidated.Add(1) }

func TestRefusedCredentialsAreHadAnewOnce(t *testing.T) {
	for bad, want := range map[int32]State{0: StateWarm, 1: StateWarm, 1000: StateFailed} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *world) {
				c := &scripted{bad: bad}
				w.o.Credentials = c
				w.rt.onPull = func(_ context.Context, _ Reference, a *Auth, _ func(Progress) error) error {
					if a == nil || a.Password != "new" || a.Host != "r.example" {
						return fail(CodeUnauthorized, nil, "401")
					}
					return nil
				}
				w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
				w.src.want(Wanted{Reference: mustRef(t, "r.example/app:1"), Urgent: true})
				w.start()
				time.Sleep(5 * time.Second)
				if i := w.image("r.example/app:1"); i.State != want {
					t.Fatalf("%+v", i)
				}
				// What is refused again and again stays the same, and is not tried twice.
				pulls := map[int32]int{0: 1, 1: 2, 1000: 1}[bad]
				if n := len(w.rt.pulled()); n != pulls || c.invalidated.Load() > 1 {
					t.Errorf("%d pulls, invalidated %d times", n, c.invalidated.Load())
				}
			})
		})
	}
}

func TestContainerdThatRestartsInAPullIsWaitedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
		w.src.want(wanting("r.example/app:1", "spin"))
		w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, _ func(Progress) error) error {
			w.rt.mu.Lock()
			defer w.rt.mu.Unlock()
			w.rt.down, w.rt.onPull = errors.New("connection refused"), nil
			return w.rt.isDown()
		}
		w.start()
		time.Sleep(5 * time.Minute)
		s, _ := w.l.Status()
		if s.RuntimeError == "" || s.Condition().Status != "Unknown" || !strings.Contains(s.Summary, "containerd does not answer") {
			t.Fatalf("%+v", s)
		}
		w.rt.set(func() { w.rt.down = nil })
		time.Sleep(10 * time.Second)
		if i := w.image("r.example/app:1"); i.State != StateWarm {
			t.Errorf("%+v", i)
		}
	})
}

func TestATagThatMovedIsNoticedAndOneThatCannotBeAskedForStaysWarm(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		first := w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
		w.src.want(wanting("r.example/app:1", "spin"))
		w.start()
		time.Sleep(2 * time.Minute)
		w.rt.set(func() {
			w.rt.onPull = func(context.Context, Reference, *Auth, func(Progress) error) error {
				return fail(CodeRegistryUnavailable, nil, "down")
			}
		})
		time.Sleep(3 * time.Hour)
		if i := w.image("r.example/app:1"); i.State != StateWarm || i.Digest != first {
			t.Fatalf("%+v", i)
		}
		w.rt.set(func() { w.rt.onPull = nil })
		second := w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('b', 10)))
		time.Sleep(3 * time.Hour)
		if i := w.image("r.example/app:1"); i.State != StateWarm || i.Digest != second {
			t.Fatalf("%+v", i)
		}
		if w.rt.label("r.example/app@"+first, labelOurs) != "" || w.rt.label("r.example/app@"+second, labelOurs) == "" {
			t.Error("the pin did not move along")
		}
	})
}

func TestManyImagesComeBoundedAndUrgentOnesFirst(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, _ func(Progress) error) error {
			wait(ctx, 3*time.Second)
			return ctx.Err()
		}
		var ws []Wanted
		for i := range 60 {
			name := fmt.Sprintf("r.example/app%02d:1", i)
			w.rt.publish(name, "wasm", wasmLayer(startModule(byte(i), 10)))
			ws = append(ws, wanting(name, "spin"))
		}
		w.src.want(ws...)
		w.start()
		time.Sleep(40 * time.Second)
		w.rt.publish("r.example/urgent:1", "wasm", wasmLayer(startModule('u', 10)))
		before := len(w.rt.pulled())
		urgent := wanting("r.example/urgent:1", "spin")
		urgent.Urgent = true
		w.src.want(append(ws, urgent)...)
		time.Sleep(10 * time.Second)
		if p := w.rt.pulled(); !slices.Contains(p[before:before+3], "r.example/urgent:1") {
			t.Errorf("the urgent one waited: %q", p[before:])
		}
		time.Sleep(10 * time.Minute)
		s, _ := w.l.Status()
		if s.Counts[StateWarm] != 61 || w.rt.most != 2 || w.w.most != 1 {
			t.Errorf("%s, %d pulls at once, %d shims at once", s.Summary, w.rt.most, w.w.most)
		}
	})
}

func TestAFleetSpreadsItsFirstPulls(t *testing.T) {
	places := make([]int, 10)
	for n := range 1000 {
		l := &Loop{o: Options{Node: fmt.Sprintf("ip-10-0-%d-%d", n/250, n%250), Spread: 10 * time.Second}}
		d := l.place("r.example/app@sha256:abc")
		if d != l.place("r.example/app@sha256:abc") || d < 0 || d >= 10*time.Second {
			t.Fatal(d)
		}
		places[int(d/time.Second)]++
	}
	if slices.Max(places) > 160 || slices.Min(places) < 50 {
		t.Errorf("1000 nodes over 10 s: %v", places)
	}
}

func TestTheConditionIsWrittenOnlyWhenItChangesAndNotOften(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.rt.onPull = func(ctx context.Context, _ Reference, _ *Auth, progress func(Progress) error) error {
			for i := range int64(120) {
				if !wait(ctx, time.Second) {
					return ctx.Err()
				}
				_ = progress(Progress{Done: i << 20, Total: 120 << 20})
			}
			return nil
		}
		w.rt.publish("r.example/app@sha256:"+strings.Repeat("0", 64), "wasm")
		d := w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
		w.src.want(wanting("r.example/app@"+d, "spin"))
		w.start()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var messages []string
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.l.Announce(ctx, func(_ context.Context, c Condition) error {
				messages = append(messages, c.Status+" "+c.Message)
				if len(messages) == 2 {
					return errors.New("the API is away")
				}
				return nil
			})
		}()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		n := len(messages)
		if n < 3 || n > 8 || messages[n-1] != "True 1/1 warm" {
			t.Errorf("%d writes: %q", n, messages)
		}
		time.Sleep(2 * time.Hour)
		if len(messages) != n {
			t.Errorf("writes while nothing changed: %q", messages[n:])
		}
		cancel()
		<-done
	})
}

func TestABadStateFileCostsTimeOnly(t *testing.T) {
	for _, content := range []string{"", "{", `{"version":2}`, `{"version":1,"images":{"x":null}}`, `[]`} {
		inBubble(t, func(t *testing.T, w *world) {
			if err := os.WriteFile(w.o.StatePath, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			w.rt.publish("r.example/app:1", "wasm", wasmLayer(startModule('a', 10)))
			w.src.want(wanting("r.example/app:1", "spin"))
			w.start()
			time.Sleep(2 * time.Minute)
			if i := w.image("r.example/app:1"); i.State != StateWarm {
				t.Errorf("%q: %+v", content, i)
			}
		})
	}
}
