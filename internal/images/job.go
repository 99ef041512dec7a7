package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/hearth-sh/hearth/internal/precompile"
)

// fetch has the image pulled and held. It returns what its name points at.
func (l *Loop) fetch(ctx context.Context, img *image, want Wanted) (string, error) {
	ref := want.Reference
	if err := l.roomFor(0); err != nil {
		return "", err
	}
	if l.absent(img) {
		l.step(img, StatePulling)
	}
	start := l.now()
	digest, err := l.pull(ctx, img, want)
	if err != nil {
		return "", err
	}
	m, err := l.manifest(ctx, digest)
	if err != nil {
		return "", err
	}
	if m.Size > l.o.MaxImageBytes {
		// It came faster than its size was seen. It stays unprotected, so
		// kubelet collects it when it needs the space.
		return "", l.tooLarge(m.Size)
	}
	name := ref.ByDigest(digest)
	if err := l.o.Runtime.Protect(ctx, name); err != nil {
		if !errors.Is(err, ErrNoImage) {
			return "", err
		}
		if err := l.o.Runtime.Protect(ctx, ref.Name); err != nil {
			return "", runtimeGone(err, "hold image %s right after its pull", ref.Name)
		}
	}
	l.m.pulled(l.now().Sub(start))
	l.log.Info("image pulled", "image", ref.Name, "digest", digest, "bytes", m.Size, "took", l.now().Sub(start))
	return digest, nil
}

// absent says whether an image is not here at all, as opposed to a tag that is
// asked for again.
func (l *Loop) absent(img *image) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return img.digest == ""
}

// pull tries the credentials there are. Those of the node are had anew once
// when the registry refuses them: tokens die before their time.
func (l *Loop) pull(ctx context.Context, img *image, want Wanted) (string, error) {
	auths, own, err := l.auths(ctx, want)
	if err != nil {
		return "", err
	}
	for i := 0; ; i++ {
		var digest string
		digest, err = l.o.Runtime.Pull(ctx, want.Reference, auths[i], l.guard(img))
		if err == nil || CodeOf(err) != CodeUnauthorized {
			return digest, err
		}
		if i == own {
			own = -1
			l.o.Credentials.Invalidate(want.Reference.Host)
			call, cancel := context.WithTimeout(ctx, credentialsTimeout)
			fresh, ferr := l.ownAuth(call, want.Reference.Host)
			cancel()
			if ferr != nil {
				return "", ferr
			}
			// The same again would be refused again, and registries lock out
			// who insists.
			if fresh != nil && *fresh != *auths[i] {
				auths = append(auths, fresh)
			}
		}
		if i == len(auths)-1 {
			if l.o.Secrets == nil && len(want.PullSecrets) > 0 {
				return "", needsSecret(want)
			}
			return "", err
		}
	}
}

// needsSecret says that an image is left to kubelet. Whether a workload's pull
// secret is needed shows only once the registry refuses: the image may be
// public, or the node's own role enough.
func needsSecret(want Wanted) error {
	s := want.PullSecrets[0]
	more := ""
	if n := len(want.PullSecrets) - 1; n > 0 {
		more = fmt.Sprintf(" or one of %d others", n)
	}
	return fail(CodePullSecret, nil, "%s wants the pull secret %s/%s%s, and the agent reads no Secrets: kubelet pulls this image when a pod starts here; to have it ahead, give the node's role or containerd's registry configuration access",
		want.Reference.Host, s.Namespace, s.Name, more)
}

// guard watches a pull: it records its progress and ends it when it is too
// large, would fill the disk, or does not move.
func (l *Loop) guard(img *image) func(Progress) error {
	marked, at := int64(-1), l.now()
	return func(p Progress) error {
		now := l.now()
		l.mu.Lock()
		if p.Done != img.done || p.Total != img.total {
			if marked >= 0 && p.Done > img.done && !img.gone {
				img.state = StatePulling // a retry, or a tag that moved
			}
			img.done, img.total = p.Done, p.Total
			l.publish()
		}
		l.mu.Unlock()
		if p.Total > l.o.MaxImageBytes {
			return l.tooLarge(p.Total)
		}
		if err := l.roomFor(p.Total - p.Done); err != nil {
			return err
		}
		complete := p.Total > 0 && p.Done >= p.Total
		if marked < 0 || p.Done-marked >= stallBytes || complete && marked < p.Done {
			marked, at = p.Done, now
		}
		limit := l.o.StallTimeout
		if complete {
			limit = unpackTimeout
		}
		if now.Sub(at) > limit {
			if complete {
				return fail(CodeStalled, nil, "containerd has all of it, but did not unpack it within %s; look at containerd's log and the disk", limit)
			}
			return fail(CodeStalled, nil, "less than %d KiB came within %s (%d of %d bytes); look at the registry and the way to it", stallBytes>>10, limit, p.Done, p.Total)
		}
		return nil
	}
}

func (l *Loop) tooLarge(size int64) error {
	return fail(CodeTooLarge, nil, "the image has %d MiB, more than the %d MiB this node takes ahead of time; pods can still pull it themselves", size>>20, l.o.MaxImageBytes>>20)
}

// roomFor says whether more bytes leave enough room on the images' disk.
// Unpacked files come on top, as much as they may be; the margin is for them.
func (l *Loop) roomFor(more int64) error {
	if l.o.DiskPath == "" {
		return nil
	}
	free, err := l.free(l.o.DiskPath)
	if err != nil {
		return fail(CodeInternal, err, "free space is not known")
	}
	if free-more < l.o.MinFreeBytes {
		return fail(CodeDiskLow, nil, "%d MiB are free at %s and %d MiB to come, but %d MiB must stay free; free space there", free>>20, l.o.DiskPath, more>>20, l.o.MinFreeBytes>>20)
	}
	return nil
}

func (l *Loop) manifest(ctx context.Context, digest string) (Manifest, error) {
	m, err := l.o.Runtime.Manifest(ctx, digest)
	if err != nil {
		return Manifest{}, runtimeGone(err, "read the manifest %s of an image that is here", digest)
	}
	return m, nil
}

// runtimeGone turns ErrNoImage for something that was there a moment ago into
// a failure that is tried again soon.
func runtimeGone(err error, format string, args ...any) error {
	if errors.Is(err, ErrNoImage) {
		return fail(CodeRuntimeUnavailable, err, "could not "+format, args...)
	}
	return err
}

// prepare does everything that comes after the pull: shims first, a pod may
// be waiting for them, then the store.
func (l *Loop) prepare(ctx context.Context, img *image, want Wanted, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	m, err := l.manifest(ctx, digest)
	if err != nil {
		return err
	}
	if m.Size > l.o.MaxImageBytes {
		return l.tooLarge(m.Size)
	}
	shim := shimLayers(m)
	if shim && l.o.Warmer != nil {
		for _, h := range want.Handlers {
			if err := l.warmFor(ctx, img, want.Reference.Name, digest, h); err != nil {
				return timedOut(ctx, CodeWarmFailed, err)
			}
		}
	}
	if l.known(digest) {
		return nil
	}
	l.step(img, StateCompiling)
	w := walker{
		runtime: l.o.Runtime, dir: l.dir,
		have: func(d string) bool { _, ok := l.o.Store.Object(d); return ok },
		ensure: func(ctx context.Context, d, path string) error {
			_, _, err := l.o.Store.Ensure(ctx, d, func(context.Context) (string, error) { return path, nil })
			return storeError(ctx, err)
		},
		archives: len(want.Handlers) > 0 || isWasmArchitecture(m.Architecture),
	}
	found, err := w.walk(ctx, m)
	if err != nil {
		return timedOut(ctx, CodeCompileFailed, runtimeGone(err, "read an image that is here"))
	}
	l.remember(digest, func(m *memory) { m.Found = found })
	return nil
}

// known says whether an earlier walk's modules are all in the store.
func (l *Loop) known(digest string) bool {
	l.mu.Lock()
	m := l.memory[digest]
	var modules []string
	ok := m != nil && m.Found.Version == walkVersion
	if ok {
		modules = slices.Clone(m.Found.Modules)
	}
	l.mu.Unlock()
	for _, d := range modules {
		if _, there := l.o.Store.Object(d); !there {
			return false
		}
	}
	return ok
}

// warmFor has one shim compile the image, unless its cache has it already.
func (l *Loop) warmFor(ctx context.Context, img *image, name, digest, handler string) error {
	identity := l.o.Warmer.Identity(handler)
	l.mu.Lock()
	m := l.memory[digest]
	fresh := m != nil && identity != "" && m.Warmed[handler] == identity
	l.mu.Unlock()
	cached := func() (bool, error) {
		call, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		ok, err := l.o.Warmer.Cached(call, name, handler)
		if err != nil {
			return false, fail(CodeWarmFailed, err, "the compile cache of runtime %s could not be looked at", handler)
		}
		return ok, nil
	}
	if fresh {
		if ok, err := cached(); ok || err != nil {
			return err
		}
	}
	select {
	case l.warm <- struct{}{}:
		defer func() { <-l.warm }()
	case <-ctx.Done():
		return ctx.Err()
	}
	l.step(img, StateWarming)
	start := l.now()
	call, cancel := context.WithTimeout(ctx, warmTimeout)
	err := l.o.Warmer.Warm(call, name, handler)
	cancel()
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fail(CodeWarmFailed, err, "runtime %s did not compile it", handler)
	}
	// Only what the shim wrote counts, not that it said nothing.
	if ok, err := cached(); err != nil {
		return err
	} else if !ok {
		return fail(CodeWarmFailed, nil, "runtime %s ran, but left nothing in its compile cache", handler)
	}
	l.m.warmed(l.now().Sub(start))
	l.remember(digest, func(m *memory) {
		m.Warmed = maps.Clone(m.Warmed)
		if m.Warmed == nil {
			m.Warmed = make(map[string]string)
		}
		m.Warmed[handler] = identity
	})
	return nil
}

// remember changes what is known of a digest.
func (l *Loop) remember(digest string, change func(*memory)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.memory[digest]
	if m == nil {
		m = &memory{}
		l.memory[digest] = m
	}
	change(m)
	l.dirty = true
}

// storeError tells a module that is not for the store from a passing fault.
func storeError(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return cmpErr(ctx.Err(), err)
	}
	var pe *precompile.Error
	if errors.As(err, &pe) {
		switch {
		case !pe.Retryable:
			return &refusal{reason: pe.Error()}
		case pe.Code == precompile.CodeDiskFull:
			return fail(CodeDiskFull, nil, "%s", pe.Error())
		}
	}
	return fail(CodeCompileFailed, err, "a module could not be compiled")
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// timedOut names a deadline of ours for what it is.
func timedOut(ctx context.Context, code string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fail(code, nil, "not done within %s", prepareTimeout)
	}
	var e *Error
	if err != nil && !errors.As(err, &e) && ctx.Err() == nil {
		return fail(code, err, "not done")
	}
	return err
}

func isWasmArchitecture(a string) bool { return a == "wasm" || a == "wasm32" }

// shimLayers says whether shims see Wasm in the image at all: a cache can be
// expected only for layers that are Wasm themselves, in an image of a Wasm
// architecture. Files inside ordinary layers are compiled at every start.
func shimLayers(m Manifest) bool {
	return (isWasmArchitecture(m.Architecture) || m.Architecture == "") &&
		slices.ContainsFunc(m.Layers, func(l Layer) bool { return rawLayers[l.MediaType] })
}
