package images

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// conformance holds for every Runtime. host is a registry that has team/app:1
// with the digest, and nothing else under that name.
func conformance(t *testing.T, rt Runtime, host, digest string) {
	ctx := context.Background()
	byDigest := mustRef(t, host+"/team/app@"+digest)
	find := func(name string) (Image, bool) {
		t.Helper()
		list, err := rt.Images(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range list {
			if i.Name == name {
				return i, true
			}
		}
		return Image{}, false
	}
	t.Run("what is not here is ErrNoImage", func(t *testing.T) {
		none := "sha256:" + strings.Repeat("0", 64)
		if _, err := rt.Manifest(ctx, none); !errors.Is(err, ErrNoImage) {
			t.Error(err)
		}
		if _, err := rt.Open(ctx, Layer{Digest: none, Size: 1}); !errors.Is(err, ErrNoImage) {
			t.Error(err)
		}
		if err := rt.Protect(ctx, byDigest.Name); !errors.Is(err, ErrNoImage) {
			t.Error(err)
		}
		if err := rt.Release(ctx, byDigest.Name); err != nil {
			t.Error("release of what is gone:", err)
		}
	})
	t.Run("an image that does not exist is not found", func(t *testing.T) {
		if _, err := rt.Pull(ctx, mustRef(t, host+"/team/none:1"), nil, quiet); CodeOf(err) != CodeNotFound {
			t.Error(err)
		}
	})
	t.Run("a pull is announced and lists both names", func(t *testing.T) {
		watch, cancel := context.WithCancel(ctx)
		changed := make(chan struct{}, 100)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for watch.Err() == nil { // a first call may meet a connection being made
				_ = rt.Watch(watch, func() {
					select {
					case changed <- struct{}{}:
					default:
					}
				})
			}
		}()
		got, err := rt.Pull(ctx, mustRef(t, host+"/team/app:1"), nil, quiet)
		if err != nil || got != digest {
			t.Fatal(got, err)
		}
		// Nothing says when the events are subscribed to: what comes of the pull
		// may come before, so more is changed until something is heard.
		for heard, giveUp := false, time.After(2*time.Minute); !heard; {
			select {
			case <-changed:
				heard = true
			case <-giveUp:
				t.Fatal("no event")
			case <-time.After(time.Second):
				if err := errors.Join(rt.Protect(ctx, host+"/team/app:1"), rt.Release(ctx, host+"/team/app:1")); err != nil {
					t.Fatal(err)
				}
			}
		}
		cancel()
		<-done
		for _, n := range []string{host + "/team/app:1", byDigest.Name} {
			if i, ok := find(n); !ok || !i.Ready || i.Digest != digest || i.Pinned || i.Ours {
				t.Errorf("%s: %+v", n, i)
			}
		}
	})
	t.Run("holding and letting go, each twice", func(t *testing.T) {
		for range 2 {
			if err := rt.Protect(ctx, byDigest.Name); err != nil {
				t.Fatal(err)
			}
			if i, _ := find(byDigest.Name); !i.Pinned || !i.Ours {
				t.Errorf("%+v", i)
			}
		}
		// A pull may take the labels away, holding it again brings them back.
		if _, err := rt.Pull(ctx, byDigest, nil, quiet); err != nil {
			t.Fatal(err)
		}
		if err := rt.Protect(ctx, byDigest.Name); err != nil {
			t.Fatal(err)
		}
		if i, _ := find(byDigest.Name); !i.Pinned || !i.Ours {
			t.Errorf("after another pull: %+v", i)
		}
		for range 2 {
			if err := rt.Release(ctx, byDigest.Name); err != nil {
				t.Fatal(err)
			}
			if i, _ := find(byDigest.Name); i.Pinned || i.Ours {
				t.Errorf("%+v", i)
			}
		}
	})
	t.Run("its layers are readable", func(t *testing.T) {
		m, err := rt.Manifest(ctx, digest)
		if err != nil || len(m.Layers) == 0 || m.Size <= 0 {
			t.Fatal(m, err)
		}
		b, err := rt.Open(ctx, m.Layers[0])
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		head := make([]byte, 4)
		if _, err := b.ReadAt(head, 0); err != nil || string(head) != "\x00asm" || b.Size() != m.Layers[0].Size {
			t.Errorf("%q, %d bytes: %v", head, b.Size(), err)
		}
	})
	t.Run("a pull that is given up ends", func(t *testing.T) {
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := rt.Pull(gone, byDigest, nil, quiet); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestFakeRuntimeConforms(t *testing.T) {
	f := newFakeRuntime()
	d := f.publish("r.example/team/app:1", "wasm", wasmLayer(startModule('a', 100)))
	f.onPull = func(ctx context.Context, _ Reference, _ *Auth, _ func(Progress) error) error { return ctx.Err() }
	conformance(t, f, "r.example", d)
}

func TestContainerdConforms(t *testing.T) {
	n := startNode(t)
	u := startUpstream(t, "", "")
	rt := n.runtime()
	defer rt.Close()
	conformance(t, rt, u.host, u.pushSpin("team/app", "1", startModule('a', 100)))
}
