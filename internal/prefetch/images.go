package prefetch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/registry"
)

type imageState string

const (
	imageQueued    imageState = "queued"
	imagePulling   imageState = "pulling"
	imageCompiling imageState = "compiling"
	imageWarm      imageState = "warm"
	imageFailed    imageState = "failed"
)

var imageStates = []imageState{imageQueued, imagePulling, imageCompiling, imageWarm, imageFailed}

// image is one artifact on its way into the store. Guarded by Loop.mu.
type image struct {
	digest string
	// sources are the places that have it, tried in turn.
	sources []v1alpha1.Artifact
	// users are the "function/revision" pairs it is a candidate of.
	users map[string]bool
	// seq is the desired state it first appeared in; newer ones go first.
	seq   uint64
	order int
	state imageState
	// ref is the object while state is warm.
	ref    precompile.ObjectRef
	phases []v1alpha1.Phase
	// madeFor are the users that waited while phases were spent; others got
	// the object for nothing and must not be charged.
	madeFor     map[string]bool
	done, total int64
	// err is the last failure, kept while it is being tried again.
	err      *v1alpha1.FunctionError
	retrying bool
	// failures counts those in a row, nextTry is when the next try is due.
	failures int
	nextTry  time.Time
	// made counts how often the store made it anew: the engine is told again
	// after each, even though everything else stays the same.
	made uint64
	// unusable counts how often in a row the engine could not use what was
	// compiled; serving it ends the count.
	unusable int
	cancel   context.CancelFunc // not nil while a job runs
	gone     bool               // no longer wanted
}

// userKey names a revision of a function in image.users.
func userKey(function string, revision int) string { return fmt.Sprintf("%s/%d", function, revision) }

// syncImages makes l.images match l.desired. Called with mu held.
func (l *Loop) syncImages() {
	users := make(map[string]map[string]bool)
	sources := make(map[string][]v1alpha1.Artifact)
	var live []string
	order := make(map[string]int)
	for _, f := range l.desired.Functions {
		for _, c := range f.Candidates {
			d := c.Artifact.Digest
			if users[d] == nil {
				users[d] = make(map[string]bool)
				order[d] = len(order)
				live = append(live, d)
			}
			users[d][userKey(f.Name, c.Revision)] = true
			if !slices.Contains(sources[d], c.Artifact) {
				sources[d] = append(sources[d], c.Artifact)
			}
		}
		for _, a := range f.Keep {
			live = append(live, a.Digest)
		}
	}
	for d, img := range l.images {
		if users[d] == nil {
			img.gone = true
			if img.cancel != nil {
				img.cancel()
			}
			delete(l.images, d)
		}
	}
	for d, u := range users {
		img := l.images[d]
		if img == nil {
			img = &image{digest: d, seq: l.applied, state: imageQueued}
			l.images[d] = img
		} else if img.state == imageFailed && slices.ContainsFunc(slices.Collect(maps.Keys(u)), func(k string) bool { return !img.users[k] }) {
			// A new revision asks for it: that is a new try.
			img.state, img.failures, img.nextTry = imageQueued, 0, time.Time{}
			img.err, img.retrying = nil, false
		}
		img.users, img.sources, img.order = u, sources[d], order[d]
	}
	// Before anything is published, and so evicted: what serves is named first.
	slices.Sort(live)
	l.o.Store.SetLive(slices.Compact(live))
	for _, img := range l.images {
		if img.state == imageQueued && img.cancel == nil {
			l.lookup(img)
		}
	}
}

// lookup makes an image warm that the store already has.
func (l *Loop) lookup(img *image) bool {
	ref, ok := l.o.Store.Object(img.digest)
	if ok {
		img.state, img.ref = imageWarm, ref
		img.err, img.retrying = nil, false
	}
	return ok
}

// startJobs starts what is needed and fits, newest first. Called with mu held.
// It returns when the next postponed try is due (zero: none).
func (l *Loop) startJobs(ctx context.Context, needed map[string]bool) (next time.Time) {
	now := l.now()
	var due []*image
	for d := range needed {
		img := l.images[d]
		if img == nil || img.cancel != nil || img.state == imageWarm {
			continue
		}
		if img.nextTry.After(now) {
			if next.IsZero() || img.nextTry.Before(next) {
				next = img.nextTry
			}
			continue
		}
		due = append(due, img)
	}
	slices.SortFunc(due, func(a, b *image) int {
		if a.seq != b.seq {
			return int(b.seq) - int(a.seq)
		}
		return a.order - b.order
	})
	for _, img := range due {
		if l.running >= l.o.Pulls+l.o.Compiles {
			break
		}
		jctx, cancel := context.WithTimeout(ctx, jobTimeout)
		img.cancel = cancel
		l.running++
		src := img.sources[img.failures%len(img.sources)]
		l.jobs.Go(func() { l.runJob(jctx, cancel, img, src) })
	}
	return next
}

// runJob brings one image into the store.
func (l *Loop) runJob(ctx context.Context, cancel context.CancelFunc, img *image, src v1alpha1.Artifact) {
	defer cancel()
	hex := strings.TrimPrefix(img.digest, "sha256:")
	b := &bringer{
		loop: l, job: ctx, img: img, src: src, returned: make(chan struct{}),
		file: filepath.Join(l.dir, fmt.Sprintf("%.12s-%d.wasm", filepath.Base(hex), rand.Uint32())),
	}
	ref, phases, err := l.o.Store.Ensure(ctx, img.digest, b.bring)
	b.end()
	if rmErr := os.Remove(b.file); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
		l.log.Warn("temporary module not removed", "file", b.file, "err", rmErr)
	}
	l.finish(ctx, img, ref, slices.Concat(b.phases, phases), err)
}

// bringer hands a module's file to the store. The store may call it on a
// goroutine of its own that outlives the call of Ensure by a moment; nothing
// of a job may be left behind by that.
type bringer struct {
	loop *Loop
	job  context.Context
	img  *image
	src  v1alpha1.Artifact
	file string
	// returned is closed when bring has returned.
	returned chan struct{}

	// mu orders bring against end: whoever comes second cleans up.
	mu      sync.Mutex
	started bool
	ended   bool
	slot    bool
	phases  []v1alpha1.Phase
}

func (b *bringer) bring(ctx context.Context) (string, error) {
	b.mu.Lock()
	if b.ended || b.started {
		b.mu.Unlock()
		return "", context.Canceled
	}
	b.started = true
	b.mu.Unlock()
	defer close(b.returned)

	// The store's context follows whoever waits; the job's own end counts too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.job, cancel)()

	phases, err := b.loop.pull(ctx, b.img, b.src, b.file)
	if err != nil {
		return "", err
	}
	// The compile slot is taken at the end of the pull, the first moment at
	// which it is certain that there is something to compile.
	select {
	case b.loop.compiles <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.phases = phases
	if b.ended {
		<-b.loop.compiles
		return "", context.Canceled
	}
	b.slot = true
	b.loop.step(b.img, imageCompiling)
	return b.file, nil
}

// end gives back the compile slot and waits for bring, which the job's end
// has cancelled if it is still running.
func (b *bringer) end() {
	b.mu.Lock()
	b.ended = true
	started := b.started
	if b.slot {
		b.slot = false
		<-b.loop.compiles
	}
	b.mu.Unlock()
	if started {
		<-b.returned
	}
}

// pull is the first half of a job.
func (l *Loop) pull(ctx context.Context, img *image, src v1alpha1.Artifact, file string) ([]v1alpha1.Phase, error) {
	if l.o.Jitter > 0 && !wait(ctx, rand.N(l.o.Jitter)) {
		return nil, ctx.Err()
	}
	select {
	case l.pulls <- struct{}{}:
		defer func() { <-l.pulls }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l.step(img, imagePulling)
	p, err := l.o.Puller.Pull(ctx, src, file, registry.PullOptions{
		MaxBytes: v1alpha1.MaxModuleBytes,
		Progress: func(done, total int64) {
			l.mu.Lock()
			img.done, img.total = done, total
			l.mu.Unlock()
		},
	})
	if err != nil {
		return nil, err
	}
	l.m.pulledBytes.Add(float64(p.Size))
	return p.Phases, nil
}

// step records the start of a step and has it reported.
func (l *Loop) step(img *image, s imageState) {
	l.mu.Lock()
	if !img.gone {
		img.state, img.done, img.total = s, 0, 0
	}
	l.mu.Unlock()
	l.look()
}

// finish records how a job ended.
func (l *Loop) finish(ctx context.Context, img *image, ref precompile.ObjectRef, phases []v1alpha1.Phase, err error) {
	l.mu.Lock()
	l.running--
	img.cancel = nil
	gone := img.gone
	var code, detail string
	switch {
	case err == nil:
		// img.users is replaced, never changed, so this stays as it is.
		img.state, img.ref, img.phases, img.madeFor = imageWarm, ref, phases, img.users
		img.made++
		img.err, img.retrying, img.failures = nil, false, 0
		img.nextTry = time.Time{}
	case gone || errors.Is(ctx.Err(), context.Canceled):
		// Nobody waits for it, or the agent is ending.
		img.state = imageQueued
	default:
		var retry bool
		code, detail, retry = explain(err)
		img.failures++
		img.state, img.retrying = imageFailed, retry
		img.err = &v1alpha1.FunctionError{Code: code, Detail: detail}
		switch {
		case retry:
			img.nextTry = l.now().Add(artifactBackoff.delay(img.failures))
		case errors.Is(err, registry.ErrUnauthorized):
			img.nextTry = l.now().Add(credentialsRetry + rand.N(credentialsRetry/2))
		default:
			img.nextTry = l.now().Add(permanentRetry + rand.N(permanentRetry/10))
		}
	}
	failures, retrying, next := img.failures, img.retrying, img.nextTry
	l.mu.Unlock()
	switch {
	case err == nil:
		for _, p := range phases {
			l.m.phase(p)
		}
		l.log.Info("artifact is in the store", "digest", img.digest, "object", ref.ID, "phases", phaseText(phases))
	case code != "":
		l.m.errors.WithLabelValues(metricCode(code)).Inc()
		l.note(img.digest, detail)
		l.log.Warn("artifact is not in the store", "digest", img.digest, "code", code, "detail", detail,
			"retrying", retrying, "failures", failures, "nextTry", next)
	}
	l.look()
}

// explain turns a job's error into what is reported.
func explain(err error) (code, detail string, retry bool) {
	var pe *precompile.Error
	if errors.As(err, &pe) {
		return pe.Code, pe.Error(), pe.Retryable
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "registry-unavailable", fmt.Sprintf("not done within %s: %v", jobTimeout, err), true
	}
	if errors.Is(err, context.Canceled) {
		// Somebody else's cancelled work was joined; ours is still wanted.
		return "internal", err.Error(), true
	}
	code = registry.Code(err)
	// A fault whose kind is unknown is thought to be passing: giving up on
	// it would need a person, trying on needs one only if it stays.
	return code, err.Error(), registry.Retryable(err) || code == "internal"
}

func (l *Loop) cancelAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, img := range l.images {
		if img.cancel != nil {
			img.cancel()
		}
	}
}

func phaseText(ps []v1alpha1.Phase) string {
	var b strings.Builder
	for i, p := range ps {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%s=%.1fms", p.Name, p.Milliseconds)
	}
	return b.String()
}
