package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cimages "github.com/containerd/containerd/v2/core/images"

	"github.com/hearth-sh/hearth/internal/precompile"
)

// realLoop is the loop on real parts: containerd, registry, store with
// compile children. Only what is wanted is made up.
type realLoop struct {
	t    *testing.T
	node *node
	up   *upstream
	src  *fixedSource
	o    Options
	l    *Loop
	stop func()
}

func newRealLoop(t *testing.T, n *node, u *upstream) *realLoop {
	t.Helper()
	dir := t.TempDir()
	rt := n.runtime()
	store, err := precompile.Open(filepath.Join(dir, "store"), precompile.StoreOptions{
		Compiler: precompile.NewCompiler(precompile.CompilerOptions{Command: []string{os.Args[0]}, Env: []string{childEnv + "=1"}, SameAccount: true}),
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &realLoop{t: t, node: n, up: u, src: newFixedSource()}
	r.o = Options{
		Source: r.src, Runtime: rt, Store: store, Node: "node-a", TempDir: dir, StatePath: filepath.Join(dir, "state.json"),
		SetLive: store.SetLive, Spread: time.Millisecond, PullGap: time.Millisecond,
	}
	t.Cleanup(func() {
		if r.stop != nil {
			r.stop()
		}
		store.Close()
		rt.Close()
	})
	return r
}

func (r *realLoop) start() {
	r.t.Helper()
	l, err := New(r.o)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx) }()
	r.l, r.stop = l, func() { cancel(); <-done; r.stop = nil }
}

// until waits for a status; its deadline is for a machine with no time.
func (r *realLoop) until(what string, ok func(Status) bool) Status {
	r.t.Helper()
	deadline := time.After(3 * time.Minute)
	for {
		s, newer := r.l.Status()
		if ok(s) {
			return s
		}
		select {
		case <-newer:
		case <-deadline:
			r.t.Fatalf("never came: %s; last %s", what, s.Summary)
		}
	}
}

func allWarm(s Status) bool { return s.Total > 0 && s.Counts[StateWarm] == s.Total }

func componentOf(modules ...[]byte) []byte {
	out := []byte("\x00asm\x0d\x00\x01\x00")
	for _, m := range modules {
		s := customSection(m)
		s[0] = 1
		out = append(out, s...)
	}
	return out
}

func tarGz(t *testing.T, files map[string][]byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	z.Close()
	return b.Bytes()
}

func TestRealImagesOfEveryKindBecomeWarm(t *testing.T) {
	u := startUpstream(t, "", "")
	r := newRealLoop(t, startNode(t), u)
	a, b, c, d := startModule('a', 100), startModule('b', 100), startModule('c', 100), startModule('d', 100)
	unlinked := []byte("\x00asm\x01\x00\x00\x00" + "\x01\x04\x01\x60\x00\x00" + "\x02\x09\x01\x03env\x01x\x00\x00")
	spin := u.pushSpin("spin", "", a)
	comp := u.push("component", "", part{"application/vnd.wasm.config.v0+json", []byte(`{"architecture":"wasm","os":"wasip2","layerDigests":[]}`)},
		part{"application/wasm", componentOf(b, unlinked, c)})
	files := map[string][]byte{"app/main.wasm": d, "etc/motd": []byte("hello")}
	layer := tarGz(t, files)
	plain := sha256.New()
	z, _ := gzip.NewReader(bytes.NewReader(layer))
	var raw bytes.Buffer
	raw.ReadFrom(z)
	plain.Write(raw.Bytes())
	packed := u.push("packed", "", part{"application/vnd.oci.image.config.v1+json", []byte(fmt.Sprintf(
		`{"architecture":%q,"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]},"config":{}}`, runtime.GOARCH, hex.EncodeToString(plain.Sum(nil))))},
		part{"application/vnd.oci.image.layer.v1.tar+gzip", layer})
	names := map[string]string{"spin": u.host + "/spin@" + spin, "component": u.host + "/component@" + comp, "packed": u.host + "/packed@" + packed}
	r.src.want(wanting(names["spin"]), wanting(names["component"]), wanting(names["packed"], "wasm"))
	r.start()
	s := r.until("all warm", allWarm)
	for _, i := range s.Images {
		want := map[string]int{names["spin"]: 1, names["component"]: 2, names["packed"]: 1}[i.Image]
		if i.Modules != want {
			t.Errorf("%+v, want %d modules", i, want)
		}
		if i.Image == names["component"] && (len(i.Notes) != 1 || !strings.Contains(i.Notes[0], "not resident-servable: core module 1 of layer")) {
			t.Errorf("notes %q", i.Notes)
		}
	}
	for _, m := range [][]byte{a, b, c, d} {
		if _, ok := r.o.Store.Object(sum(m)); !ok {
			t.Errorf("no object of a module")
		}
	}

	t.Run("a restart of the agent asks the registry nothing", func(t *testing.T) {
		r.stop()
		before := len(u.accesses())
		r.start()
		r.until("all warm again", allWarm)
		if n := len(u.accesses()) - before; n != 0 {
			t.Errorf("%d requests", n)
		}
	})
	t.Run("a restart of containerd keeps the pins", func(t *testing.T) {
		r.node.proc.kill()
		r.until("containerd is missed", func(s Status) bool { return s.RuntimeError != "" })
		r.node.start()
		r.until("all warm again", func(s Status) bool { return s.RuntimeError == "" && allWarm(s) })
		list, err := r.o.Runtime.Images(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		pins := 0
		for _, i := range list {
			if i.Pinned && i.Ours {
				pins++
			}
		}
		if pins != 3 {
			t.Errorf("%d pins: %+v", pins, list)
		}
	})
	t.Run("an image that somebody removed comes back", func(t *testing.T) {
		rt := r.node.runtime()
		defer rt.Close()
		ctx, cancel := scope(context.Background())
		defer cancel()
		if err := rt.client.ImageService().Delete(ctx, names["spin"], cimages.SynchronousDelete()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "pulled and held again", func() bool {
			list, err := rt.Images(context.Background())
			return err == nil && slices.ContainsFunc(list, func(i Image) bool { return i.Name == names["spin"] && i.Ready && i.Ours && i.Pinned })
		})
	})
}

// rotating are credentials of which the registry knows only the last.
type rotating struct {
	password    atomic.Value
	invalidated atomic.Int32
}

func (c *rotating) Credentials(context.Context, string) (string, string, time.Time, error) {
	return "AWS", c.password.Load().(string), time.Now().Add(12 * time.Hour), nil
}

func (c *rotating) Invalidate(string) {
	c.invalidated.Add(1)
	c.password.Store("right")
}

func TestRealFaultsOfARegistryAreSurvived(t *testing.T) {
	u := startUpstream(t, "AWS", "right")
	r := newRealLoop(t, startNode(t), u)
	c := &rotating{}
	c.password.Store("expired")
	r.o.Credentials = c
	mirror := startUpstream(t, "", "")
	r.node.mirror("secret.example", "http://"+mirror.host)
	r.start()
	digests := 0
	image := func(size int) string {
		digests++
		return u.host + "/app@" + u.pushSpin("app", "", startModule(byte(digests), size))
	}
	want := func(name string) {
		t.Helper()
		w := wanting(name)
		w.Urgent = true
		r.src.want(w)
	}

	t.Run("credentials that expired are had anew, once", func(t *testing.T) {
		want(image(100))
		r.until("warm", allWarm)
		if n := c.invalidated.Load(); n != 1 {
			t.Errorf("invalidated %d times", n)
		}
	})
	t.Run("401 in the middle", func(t *testing.T) {
		var n atomic.Int32
		u.breakWith(func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.Contains(req.URL.Path, "/blobs/") || n.Add(1) > 2 {
				return false
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(401)
			return true
		})
		defer u.breakWith(nil)
		want(image(100))
		r.until("warm", allWarm)
	})
	t.Run("a blob that is not what its digest says", func(t *testing.T) {
		u.breakWith(func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
				return false
			}
			w.Write(bytes.Repeat([]byte("x"), 3000))
			return true
		})
		name := image(3000 - 60)
		want(name)
		s := r.until("a failure", func(s Status) bool { return s.Counts[StateFailed] == 1 })
		if got := s.Images[0].Code; got != CodeDigestMismatch && got != CodeRegistryUnavailable && got != CodeUnpullable {
			t.Errorf("%+v", s.Images[0])
		}
		t.Log(s.Images[0].Code, s.Images[0].Message)
		u.breakWith(nil)
		w := wanting(name)
		w.Urgent, w.PullSecrets = true, []PullSecret{{"a", "b"}} // asks for a try at once
		r.src.want(w)
		r.until("warm", allWarm)
	})
	t.Run("slow, and containerd is killed in the middle", func(t *testing.T) {
		var hold atomic.Bool
		hold.Store(true)
		name := image(4 << 20)
		u.breakWith(func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") && hold.Load() {
				// The head of a large blob, then nothing.
				w.Header().Set("Content-Length", fmt.Sprint(4<<20+100))
				w.Write(make([]byte, 1<<20))
				w.(http.Flusher).Flush()
				<-req.Context().Done()
				return true
			}
			return false
		})
		want(name)
		s := r.until("progress", func(s Status) bool { return len(s.Images) == 1 && s.Images[0].Total > 4<<20 })
		if !strings.Contains(s.Summary, "1 pulling") || !strings.Contains(s.Summary, "%") {
			t.Errorf("%q", s.Summary)
		}
		r.node.proc.kill()
		hold.Store(false)
		u.breakWith(nil)
		r.until("containerd is missed", func(s Status) bool { return s.RuntimeError != "" })
		r.node.start()
		r.until("warm", func(s Status) bool { return s.RuntimeError == "" && allWarm(s) })
	})
	t.Run("too large", func(t *testing.T) {
		r.stop()
		r.o.MaxImageBytes = 1 << 20
		want(image(2 << 20))
		r.start()
		s := r.until("a failure", func(s Status) bool { return s.Counts[StateFailed] == 1 })
		if s.Images[0].Code != CodeTooLarge {
			t.Errorf("%+v", s.Images[0])
		}
		list, err := r.o.Runtime.Images(context.Background())
		if err != nil || slices.ContainsFunc(list, func(i Image) bool { return i.Name == s.Images[0].Image && i.Ours }) {
			t.Errorf("held all the same: %+v %v", list, err)
		}
	})
	t.Run("a mirror never sees the registry's password", func(t *testing.T) {
		d := mirror.pushSpin("app", "", startModule('m', 100))
		want("secret.example/app@" + d)
		r.until("warm", allWarm)
		accesses := mirror.accesses()
		for _, a := range accesses {
			if a.auth != "" {
				t.Errorf("%s %s carried %.10q", a.method, a.path, a.auth)
			}
		}
		if len(accesses) == 0 {
			t.Error("the mirror was not asked")
		}
	})
}

// TestManyImages shows what a node asks of a registry and of its own
// memory when it has to get many images at once: 60, and 500 in `make soak`. It
// asserts bounds, no times.
func TestManyImages(t *testing.T) {
	if testing.Short() {
		t.Skip("pulls many images")
	}
	many := 60
	if os.Getenv("HEARTH_SOAK") != "" {
		many = 500
	}
	u := startUpstream(t, "", "")
	r := newRealLoop(t, startNode(t), u)
	r.o.PullGap = 50 * time.Millisecond
	r.o.Store = newFakeStore() // compiles are not the point
	r.o.SetLive = nil
	var ws []Wanted
	for i := range many {
		module := append(startModule(byte(i), 2000), customSection([]byte(fmt.Sprintf("\x01n%d", i)))...)
		ws = append(ws, wanting(fmt.Sprintf("%s/app%d@%s", u.host, i%10, u.pushSpin(fmt.Sprint("app", i%10), "", module))))
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	r.src.want(ws...)
	r.start()
	var peak uint64
	deadline := time.Now().Add(8 * time.Minute)
	for {
		runtime.ReadMemStats(&after)
		peak = max(peak, after.HeapAlloc)
		s, _ := r.l.Status()
		if allWarm(s) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(s.Summary)
		}
		time.Sleep(200 * time.Millisecond)
	}
	took := time.Since(began)
	runtime.GC()
	runtime.ReadMemStats(&after)
	perSecond := map[int64]int{}
	busiest := 0
	log := u.accesses()
	for _, a := range log {
		s := a.at.Unix()
		perSecond[s]++
		busiest = max(busiest, perSecond[s])
	}
	t.Logf("%d images in %s: %d requests, %.1f per image, %.1f per second on average, %d in the busiest second; heap before %.1f MiB, at most %.1f MiB, kept %.1f MiB",
		many, took.Round(time.Second), len(log), float64(len(log))/float64(many), float64(len(log))/took.Seconds(), busiest,
		float64(before.HeapAlloc)/(1<<20), float64(peak)/(1<<20), float64(after.HeapAlloc)/(1<<20))
	if len(log) > many*8 {
		t.Errorf("%d requests for %d images", len(log), many)
	}
	// 25 ms at least between two starts, about five requests for each.
	if busiest > 40*8 {
		t.Errorf("%d requests in one second", busiest)
	}
	if peak > before.HeapAlloc+128<<20 {
		t.Errorf("heap grew to %d MiB", peak>>20)
	}
}
