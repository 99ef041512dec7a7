package prefetch

import (
	"cmp"
	"context"
	"math/rand/v2"
	"reflect"
	"slices"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

// codeEngineUnavailable is reported while the engine does not answer.
const codeEngineUnavailable = "engine-unavailable"

// pass derives everything from the last snapshots: what to fetch, what the
// engine should have, what to report. It returns when to look again at the
// latest.
func (l *Loop) pass(ctx context.Context) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	l.lastPass = now
	if !l.have || ctx.Err() != nil {
		return tick
	}
	if !l.eng.ok && now.Sub(l.eng.since) > engineGrace && len(l.fns) > 0 {
		l.fns = make(map[string]control.FunctionStatus)
	}
	next := l.heedEngine(now)

	needed := make(map[string]bool)
	entries := make([]pushedEntry, 0, len(l.desired.Functions))
	var pending []control.Pending
	for _, f := range l.desired.Functions {
		for _, c := range f.Candidates {
			needed[c.Artifact.Digest] = true
			if img := l.images[c.Artifact.Digest]; img != nil && img.err == nil && !l.refused(f.Name, c, img, now) {
				break // on its way, or there: the next one is not needed
			}
		}
		if e, ok := l.choose(f, now); ok {
			if p, ok := l.pushed[f.Name]; ok && !p.leaves.IsZero() {
				p.leaves = time.Time{}
				l.pushed[f.Name] = p
			}
			e.leaves = time.Time{}
			entries = append(entries, e)
		} else if e, ok := l.handOver(f, now); ok {
			entries = append(entries, e)
			if next.IsZero() || e.leaves.Before(next) {
				next = e.leaves
			}
		} else {
			p := control.Pending{Name: f.Name, Tenant: f.Tenant, TimeoutMS: f.TimeoutMS, Reach: reach(f)}
			if len(f.Candidates) > 0 {
				p.TimeoutMS = f.Candidates[0].TimeoutMS
			}
			pending = append(pending, p)
		}
	}
	if t := l.startJobs(ctx, needed); !t.IsZero() && (next.IsZero() || t.Before(next)) {
		next = t
	}
	l.setWant(entries, pending)
	l.setReport(now)

	d := tick
	if !next.IsZero() {
		d = min(d, max(next.Sub(now), time.Millisecond))
	}
	return d
}

// choose picks the best candidate that is in the store. One that the engine
// refused is passed over while another is there. While the only one is being
// made again, the engine keeps what it was told: it may have it in memory.
func (l *Loop) choose(f v1alpha1.DesiredFunction, now time.Time) (pushedEntry, bool) {
	var fallback *pushedEntry
	for _, c := range f.Candidates {
		img := l.images[c.Artifact.Digest]
		if img == nil || img.state != imageWarm {
			continue
		}
		e := pushedEntry{made: img.made, fn: control.Function{
			Name: f.Name, Tenant: f.Tenant, Revision: c.Revision,
			ObjectDir: img.ref.Dir, Object: img.ref.ID,
			MemoryMiB: c.MemoryMiB, TimeoutMS: c.TimeoutMS, Concurrency: c.Concurrency,
			Env: c.Env, Secrets: c.Secrets, Reach: reach(f),
		}}
		if !l.refused(f.Name, c, img, now) {
			return e, true
		}
		if fallback == nil {
			fallback = &e
		}
	}
	if fallback != nil {
		return *fallback, true
	}
	if p, ok := l.pushed[f.Name]; ok && p.fn.Tenant == f.Tenant {
		for _, c := range f.Candidates {
			if img := l.images[c.Artifact.Digest]; c.Revision == p.fn.Revision && img != nil && img.ref.ID == p.fn.Object {
				p.fn.Reach = reach(f)
				return p, true
			}
		}
	}
	return pushedEntry{}, false
}

// handOver is what the engine keeps for a moment of a function that other nodes
// have in this one's place. Nothing is reported of it any more, so that others
// look elsewhere.
func (l *Loop) handOver(f v1alpha1.DesiredFunction, now time.Time) (pushedEntry, bool) {
	p, ok := l.pushed[f.Name]
	if !ok || len(f.Candidates) > 0 || len(f.Peers) == 0 || p.fn.Tenant != f.Tenant {
		return pushedEntry{}, false
	}
	if p.leaves.IsZero() {
		p.leaves = now.Add(handover)
		l.pushed[f.Name] = p
	}
	if !now.Before(p.leaves) {
		return pushedEntry{}, false
	}
	p.fn.Reach = reach(f)
	return p, true
}

// reach is what the engine is told of a function beside how to run it.
func reach(f v1alpha1.DesiredFunction) control.Reach {
	return control.Reach{Routes: f.Routes, Peers: f.Peers}
}

// sameReach says whether two are equal; nil and empty are.
func sameReach(a, b control.Reach) bool {
	return slices.Equal(a.Routes, b.Routes) && slices.Equal(a.Peers, b.Peers)
}

// refused says whether the engine refused this revision's object lately.
func (l *Loop) refused(name string, c v1alpha1.DesiredRevision, img *image, now time.Time) bool {
	ef, ok := l.engFailed[name]
	return ok && ef.revision == c.Revision && ef.object == img.ref.ID && img.state == imageWarm && now.Before(ef.until)
}

// heedEngine acts on what the engine says of the functions it was given: an
// unusable object is quarantined and made again, a refused one passed over.
// It returns when the first refusal is to be tried again.
func (l *Loop) heedEngine(now time.Time) (next time.Time) {
	wanted := make(map[string]v1alpha1.DesiredFunction, len(l.desired.Functions))
	for _, f := range l.desired.Functions {
		wanted[f.Name] = f
	}
	for name, ef := range l.engFailed {
		if _, ok := wanted[name]; !ok || now.After(ef.until) {
			delete(l.engFailed, name)
		} else if next.IsZero() || ef.until.Before(next) {
			next = ef.until
		}
	}
	for name, f := range wanted {
		fs, p, ok := l.current(name)
		if !ok {
			continue
		}
		if fs.Progress == v1alpha1.ProgressReady {
			l.served(f, p)
		}
		if fs.Error == nil || fs.Progress != v1alpha1.ProgressFailed {
			continue
		}
		switch fs.Error.Code {
		case control.ErrorObjectUnusable:
			l.recompile(f, p, fs.Error.Detail, now)
		case control.ErrorInstantiate, control.ErrorInvalid:
			if _, known := l.engFailed[name]; known {
				continue
			}
			until := now.Add(permanentRetry + rand.N(permanentRetry/10))
			l.engFailed[name] = engineFailure{
				revision: p.fn.Revision, object: p.fn.Object,
				err: *fs.Error, until: until,
			}
			l.m.errors.WithLabelValues(metricCode(fs.Error.Code)).Inc()
			l.noteLocked(name, fs.Error.Detail)
			if next.IsZero() || until.Before(next) {
				next = until
			}
		}
	}
	return next
}

// current returns what the engine says of a function, if it speaks of what
// the engine was last told.
func (l *Loop) current(name string) (control.FunctionStatus, pushedEntry, bool) {
	fs, ok := l.fns[name]
	p, known := l.pushed[name]
	return fs, p, ok && known && l.fnsGen >= p.gen && fs.Wanted == p.fn.Revision
}

// served ends the count of unusable objects of what the engine serves now.
func (l *Loop) served(f v1alpha1.DesiredFunction, p pushedEntry) {
	for _, c := range f.Candidates {
		if img := l.images[c.Artifact.Digest]; c.Revision == p.fn.Revision && img != nil && img.ref.ID == p.fn.Object {
			img.unusable = 0
		}
	}
}

// recompile quarantines an object that the engine could not use.
func (l *Loop) recompile(f v1alpha1.DesiredFunction, p pushedEntry, reason string, now time.Time) {
	for _, c := range f.Candidates {
		img := l.images[c.Artifact.Digest]
		if c.Revision != p.fn.Revision || img == nil || img.state != imageWarm || img.ref.ID != p.fn.Object || img.made != p.made {
			// The last: it was made anew since the engine was told, and bears
			// the same name; what the engine says is about the old one.
			continue
		}
		l.m.errors.WithLabelValues(control.ErrorObjectUnusable).Inc()
		l.noteLocked(f.Name, reason)
		if err := l.o.Store.Quarantine(img.ref, reason); err != nil {
			l.log.Warn("unusable object not quarantined", "object", img.ref.ID, "err", err)
		} else {
			l.log.Warn("engine cannot use an object, compiling it again", "function", f.Name, "object", img.ref.ID, "reason", reason)
		}
		bad := img.ref.ID
		// The same object may be under other images: none of them may be
		// given to the engine from here on.
		for _, other := range l.images {
			if other.state != imageWarm || other.ref.ID != bad {
				continue
			}
			other.state = imageQueued
			other.err = &v1alpha1.FunctionError{Code: control.ErrorObjectUnusable, Detail: reason}
			other.retrying = true
			other.unusable++
			other.nextTry = time.Time{}
			if other.unusable > 1 {
				other.nextTry = now.Add(artifactBackoff.delay(other.unusable))
			}
		}
		return
	}
}

// setWant has the engine told when what it should have changed.
func (l *Loop) setWant(entries []pushedEntry, pending []control.Pending) {
	slices.SortFunc(pending, func(a, b control.Pending) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(entries, func(a, b pushedEntry) int { return cmp.Compare(a.fn.Name, b.fn.Name) })
	gen := l.want.Generation + 1
	if !l.wantSet {
		// Begins above whatever an agent before this one used, so that an
		// old status is never taken for an answer to a new state. The clock
		// may have been set back since; what the engine speaks of was not.
		gen = max(uint64(max(l.now().UnixMilli(), 1)), l.fnsGen+1)
	}
	changed := !l.wantSet || len(entries) != len(l.pushed) || !slices.EqualFunc(pending, l.want.Pending, func(a, b control.Pending) bool {
		return a.Name == b.Name && a.Tenant == b.Tenant
	})
	// How functions are reached changes often, with every node that becomes warm,
	// and changes nothing of what runs: it makes no new generation, in which the
	// engine would load again what failed, and what it says would not count.
	stale := l.staleLocked()
	touched := l.desired.BaseDomain != l.want.BaseDomain || stale != l.want.Stale || !slices.Equal(l.desired.Gateways, l.want.Gateways) || changed || !slices.EqualFunc(pending, l.want.Pending, func(a, b control.Pending) bool {
		return a.TimeoutMS == b.TimeoutMS && sameReach(a.Reach, b.Reach)
	})
	fns := make([]control.Function, 0, len(entries))
	pushed := make(map[string]pushedEntry, len(entries))
	for _, e := range entries {
		p, ok := l.pushed[e.fn.Name]
		touched = touched || !ok || !sameReach(p.fn.Reach, e.fn.Reach)
		if p.fn.Reach = e.fn.Reach; ok && p.made == e.made && reflect.DeepEqual(p.fn, e.fn) {
			e.gen = p.gen
		} else {
			e.gen, changed = gen, true
		}
		pushed[e.fn.Name] = e
		fns = append(fns, e.fn)
	}
	if !changed && !touched {
		return
	}
	if !changed {
		gen = l.want.Generation
	}
	l.pushed = pushed
	l.want = control.State{
		Generation: gen, Functions: fns, Pending: pending,
		BaseDomain: l.desired.BaseDomain, Gateways: l.desired.Gateways, Stale: stale,
	}
	l.wantSet, l.needPush = true, true
	signal(l.pushKick)
}

// staleLocked says whether functions may have changed without this node having
// been told: it knows them from before its start, or its source is away.
func (l *Loop) staleLocked() bool {
	return l.fromCache || !l.source.ok && l.now().Sub(l.source.since) > sourceGrace
}

// setReport has the report sent when it changed.
func (l *Loop) setReport(now time.Time) {
	r := v1alpha1.NodeReport{
		Node: l.o.Node, Generation: l.desired.Generation,
		Functions: make([]v1alpha1.FunctionReport, 0, len(l.desired.Functions)),
	}
	for _, f := range l.desired.Functions {
		if len(f.Candidates) > 0 {
			r.Functions = append(r.Functions, l.functionReport(f, now))
		}
	}
	if l.reportSet && reflect.DeepEqual(l.report, r) {
		return
	}
	l.report, l.reportSet, l.acked = r, true, false
	signal(l.reportKick)
}

// functionReport says how far a function's first candidate is.
func (l *Loop) functionReport(f v1alpha1.DesiredFunction, now time.Time) v1alpha1.FunctionReport {
	c := f.Candidates[0]
	r := v1alpha1.FunctionReport{Name: f.Name, Revision: c.Revision, Serving: l.fns[f.Name].Serving}
	if p, ok := l.pushed[f.Name]; ok && l.fnsGen < p.gen && !slices.ContainsFunc(f.Candidates, func(c v1alpha1.DesiredRevision) bool { return c.Revision == r.Serving }) {
		// A status from before the function was made anew.
		r.Serving = 0
	}
	img := l.images[c.Artifact.Digest]
	if img == nil {
		r.Progress = v1alpha1.ProgressQueued
		return r
	}
	if img.madeFor[userKey(f.Name, c.Revision)] {
		r.Phases = img.phases
	}
	r.Error, r.Retrying = img.err, img.retrying
	switch img.state {
	case imageQueued:
		r.Progress = v1alpha1.ProgressQueued
	case imagePulling:
		r.Progress = v1alpha1.ProgressPulling
	case imageCompiling:
		r.Progress = v1alpha1.ProgressCompiling
	case imageFailed:
		r.Progress = v1alpha1.ProgressFailed
	case imageWarm:
		l.reportWarm(&r, f, c, img, now)
	}
	return r
}

// reportWarm fills in the engine's part: the image is in the store.
func (l *Loop) reportWarm(r *v1alpha1.FunctionReport, f v1alpha1.DesiredFunction, c v1alpha1.DesiredRevision, img *image, now time.Time) {
	r.Progress = v1alpha1.ProgressLoading
	if l.refused(f.Name, c, img, now) {
		ef := l.engFailed[f.Name]
		r.Progress, r.Error = v1alpha1.ProgressFailed, &ef.err
		return
	}
	if !l.eng.ok && l.eng.asked && now.Sub(l.eng.since) > engineGrace {
		r.Error = &v1alpha1.FunctionError{Code: codeEngineUnavailable, Detail: "the engine on this node does not answer: " + l.eng.err}
		r.Retrying = true
		return
	}
	fs, p, ok := l.current(f.Name)
	if !ok || p.fn.Revision != c.Revision || p.fn.Object != img.ref.ID {
		return
	}
	switch {
	case fs.Progress == v1alpha1.ProgressReady && fs.Serving == c.Revision:
		r.Progress = v1alpha1.ProgressReady
		r.Phases = slices.Concat(r.Phases, fs.Phases)
	case fs.Progress == v1alpha1.ProgressFailed && fs.Error != nil:
		e := *fs.Error
		r.Progress, r.Error = v1alpha1.ProgressFailed, &e
		r.Retrying = e.Code == control.ErrorWorkerFailed || e.Code == control.ErrorObjectUnusable
	}
}
