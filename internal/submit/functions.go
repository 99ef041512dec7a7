package submit

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

const (
	// defaultWait is how long a change waits for a node to serve it: pull and
	// compile of a large module on a small machine.
	defaultWait = 60 * time.Second
	maxWait     = 300 * time.Second
	// maxList bounds one page of a list.
	maxList = 1000
	// maxHeaderTags bounds the entity tags of one If-Match.
	maxHeaderTags = 32
)

// list serves GET /v1/functions.
func (s *Server) list(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	o := function.ListOptions{Tenant: q.Get("tenant"), Limit: maxList}
	if o.Tenant != "" {
		if err := function.ValidateTenant(o.Tenant); err != nil {
			return err
		}
	}
	if q.Has("limit") {
		n, err := intParameter(q, "limit", 1, maxList)
		if err != nil {
			return err
		}
		o.Limit = n
	}
	if c := q.Get("continue"); c != "" {
		after, err := base64.RawURLEncoding.DecodeString(c)
		if err != nil || function.ValidateName(string(after)) != nil {
			return newProblem("invalid-parameter", `The query parameter "continue" must be the value that the previous page returned.`)
		}
		o.After = string(after)
	}
	if err := s.authorize(r.Context(), access.VerbList, o.Tenant, "", ""); err != nil {
		return err
	}
	if err := s.count(r.Context(), o.Tenant); err != nil {
		return err
	}
	page, err := s.o.Store.List(r.Context(), o)
	if err != nil {
		return err
	}
	l := v1alpha1.FunctionList{APIVersion: v1alpha1.APIVersion, Kind: "FunctionList", Items: make([]v1alpha1.Function, 0, len(page.Items))}
	for _, f := range page.Items {
		l.Items = append(l.Items, s.view(f))
	}
	if page.Next != "" {
		l.Continue = base64.RawURLEncoding.EncodeToString([]byte(page.Next))
	}
	listReply(l).write(w)
	return nil
}

// get serves GET /v1/functions/{name}.
func (s *Server) get(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	f, err := s.readable(r.Context(), name)
	if err != nil {
		return err
	}
	tags, err := entityTags(r, "If-None-Match")
	if err != nil {
		return err
	}
	for _, tag := range tags {
		// Weak comparison, RFC 9110 section 13.1.2.
		if tag == "*" || strings.TrimPrefix(tag, "W/") == f.ETag {
			(&reply{status: http.StatusNotModified, header: map[string]string{"ETag": f.ETag, "Cache-Control": "no-cache"}}).write(w)
			return nil
		}
	}
	jsonReply(http.StatusOK, s.view(f), map[string]string{"ETag": f.ETag, "Cache-Control": "no-cache"}).write(w)
	return nil
}

// revisions serves GET /v1/functions/{name}/revisions.
func (s *Server) revisions(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	f, err := s.readable(r.Context(), name)
	if err != nil {
		return err
	}
	revs, err := s.o.Store.Revisions(r.Context(), name)
	if err != nil {
		return err
	}
	if err := s.stillReadable(r.Context(), f); err != nil {
		return err
	}
	l := v1alpha1.RevisionList{APIVersion: v1alpha1.APIVersion, Kind: "RevisionList", Items: make([]v1alpha1.Revision, 0, len(revs))}
	for _, v := range revs {
		l.Items = append(l.Items, v1alpha1.Revision{
			Revision: v.Number, Digest: v.ModuleDigest, Image: s.o.Image(v.Artifact), SizeBytes: v.SizeBytes,
			Settings: v.Settings.Public(), State: v.State, Active: v.Number == f.Active,
			Phases: phases(v), CreatedAt: v.CreatedAt, Error: v.Error,
		})
	}
	listReply(l).write(w)
	return nil
}

// put serves PUT /v1/functions/{name}.
func (s *Server) put(w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		if err != nil {
			s.metrics.rejected(err)
		}
	}()
	name, err := pathName(r)
	if err != nil {
		return err
	}
	media, params, err := mediaType(r, "application/wasm", "application/json", "multipart/form-data")
	if err != nil {
		return err
	}
	q := r.URL.Query()
	change, wait, key, err := s.changeOf(r)
	if err != nil {
		return err
	}
	if change.Tenant = q.Get("tenant"); change.Tenant != "" {
		if err := function.ValidateTenant(change.Tenant); err != nil {
			return err
		}
	}
	numbers, err := queryPatch(q, media)
	if err != nil {
		return err
	}
	// Refuse before 50 MiB travel. The store decides again, atomically.
	tenant, err := s.early(r.Context(), name, change)
	if err != nil {
		return err
	}
	giveReceive, err := s.place(r.Context(), s.receives, tenant)
	if err != nil {
		return err
	}
	defer giveReceive()
	body, err := s.receive(w, r, media, params)
	if err != nil {
		return err
	}
	defer body.remove()
	if media == "application/wasm" {
		body.patch = numbers
	}
	s.metrics.phase("receive", body.receive)
	auditOf(r.Context()).setDigest(body.digest)

	return s.mutate(w, r, key, fingerprint(r, body.content), func(ctx context.Context, done *function.Outcome) (*reply, error) {
		if done != nil {
			body.remove()
			f, err := s.current(ctx, name)
			if err != nil {
				return nil, err
			}
			bound, _, err := s.admitPut(ctx, name, change, f, true)
			if err != nil {
				return nil, err
			}
			return s.await(ctx, name, bound.Tenant, done.Revision, done.Created, wait)
		}
		res, err := s.submit(ctx, name, tenant, change, body)
		if err != nil {
			return nil, err
		}
		body.remove() // do not hold disk space while waiting
		return s.await(ctx, name, res.Function.Tenant, res.Function.Wanted, res.Created, wait)
	})
}

// fetch gets the image that the body names, in the tenant's name.
func (s *Server) fetch(ctx context.Context, tenant string, body *submission) (v1alpha1.Artifact, error) {
	if p, ok := s.o.Publisher.(TenantPublisher); ok {
		return p.FetchFor(ctx, tenant, body.image, body.path, s.o.Limits.ModuleBytes)
	}
	return s.o.Publisher.Fetch(ctx, body.image, body.path, s.o.Limits.ModuleBytes)
}

// publish puts the body where the tenant's functions are.
func (s *Server) publish(ctx context.Context, tenant, name string, body *submission, kind string, app Application) (v1alpha1.Artifact, error) {
	meta := ArtifactMeta{SizeBytes: body.size, Kind: kind, Application: app}
	if p, ok := s.o.Publisher.(TenantPublisher); ok {
		return p.PublishFor(ctx, tenant, name, body.path, body.digest, meta)
	}
	return s.o.Publisher.Publish(ctx, name, body.path, body.digest, meta)
}

// submit checks, publishes and records what a PUT brought, in the turn of the
// tenant that early found.
func (s *Server) submit(ctx context.Context, name, tenant string, unbound function.Change, body *submission) (function.Result, error) {
	give, err := s.place(ctx, s.submits, tenant)
	if err != nil {
		return function.Result{}, err
	}
	defer give()
	work, cancel := context.WithTimeout(ctx, s.o.Limits.Work)
	defer cancel()

	steps := []v1alpha1.Phase{{Name: "receive", Milliseconds: milliseconds(body.receive)}}
	step := func(phase string, do func() error) error {
		started := time.Now()
		err := do()
		took := time.Since(started)
		s.metrics.phase(phase, took)
		steps = append(steps, v1alpha1.Phase{Name: phase, Milliseconds: milliseconds(took)})
		if err != nil && ctx.Err() != nil {
			return errClientGone
		}
		return err
	}
	var settings function.Settings
	merged := func(current *function.Function) (function.Settings, error) {
		base := function.DefaultSettings()
		if current != nil {
			base = current.Revision.Settings
		}
		m := body.patch.Apply(base)
		return m, s.valid(m)
	}
	current, err := s.current(work, name)
	if err != nil {
		return function.Result{}, err
	}
	change, verb, err := s.admitPut(ctx, name, unbound, current, false)
	if err != nil {
		return function.Result{}, err
	}
	// Before anything reaches the registry: a change that is going to be
	// refused leaves no trace there either.
	if err := change.Admits(name, current); err != nil {
		return function.Result{}, err
	}
	if settings, err = merged(current); err != nil {
		return function.Result{}, err
	}
	if body.image == "" {
		if err := s.quotas.admits(ctx, tenantOf(change, current), name, body.size); err != nil {
			return function.Result{}, err
		}
	}

	var artifact v1alpha1.Artifact
	if body.image != "" {
		err := step("publish", func() error {
			if err := s.emptyTemp(body); err != nil {
				return err
			}
			var err error
			if artifact, err = s.fetch(work, tenantOf(change, current), body); err != nil {
				return err
			}
			return body.measure()
		})
		auditOf(ctx).setDigest(body.digest)
		if err != nil {
			return function.Result{}, err
		}
		if body.size > s.o.Limits.ModuleBytes {
			return function.Result{}, newProblem("module-too-large", "At most %d bytes are accepted.", s.o.Limits.ModuleBytes)
		}
	}
	var checked CheckReport
	if err := step("check", func() (err error) {
		checked, err = s.o.Checker.Check(work, body.path, settings.MemoryMiB)
		return err
	}); err != nil {
		return function.Result{}, err
	}
	if checked.Digest != "" && checked.Digest != body.digest {
		return function.Result{}, fmt.Errorf("the checked module is %s, the received one %s", checked.Digest, body.digest)
	}
	if err := overMemory(checked.MemoryMinPages, settings.MemoryMiB); err != nil {
		return function.Result{}, err
	}
	for attempt := 1; ; attempt++ {
		app := applicationOf(settings)
		if body.image == "" {
			if err := step("publish", func() (err error) {
				artifact, err = s.publish(work, tenantOf(change, current), name, body, checked.Kind, app)
				return err
			}); err != nil {
				return function.Result{}, err
			}
		}
		if ctx.Err() != nil {
			return function.Result{}, errClientGone // nothing was recorded, and nothing will be
		}
		started := time.Now()
		res, err := s.add(ctx, name, unbound, change, verb, current, body.size, func(current *function.Function) (function.NewRevision, error) {
			m, err := merged(current) // again: another writer may have been faster
			if err == nil {
				err = overMemory(checked.MemoryMinPages, m.MemoryMiB)
			}
			if err == nil && body.image == "" && !applicationOf(m).Equal(app) {
				err = errOtherEnvironment
			}
			return function.NewRevision{
				ModuleDigest: body.digest, SizeBytes: body.size, MemoryMinPages: checked.MemoryMinPages,
				Artifact: artifact, Settings: m, Phases: steps,
			}, err
		})
		if err == nil {
			s.metrics.phase("record", time.Since(started))
			return res, nil
		}
		if !errors.Is(err, errOtherEnvironment) {
			return res, err
		}
		if attempt == maxAttempts {
			return res, fmt.Errorf("%w: %w", function.ErrPrecondition, err)
		}
		if current, err = s.current(work, name); err != nil {
			return res, err
		}
		if settings, err = merged(current); err != nil {
			return res, err
		}
	}
}

// add records a revision of size bytes under what the caller may do and the
// tenant has room for. current is what the decision so far, change and verb,
// is based on; when that turns out to be over it is made again.
func (s *Server) add(ctx context.Context, name string, unbound, change function.Change, verb access.Verb, current *function.Function, size int64, build func(*function.Function) (function.NewRevision, error)) (function.Result, error) {
	for attempt := 1; ; attempt++ {
		tenant := tenantOf(change, current)
		res, err := s.withinQuota(ctx, tenant, name, func(context.Context) (int64, error) { return size, nil }, func() (function.Result, error) {
			return s.o.Store.AddRevision(ctx, name, change, func(now *function.Function) (function.NewRevision, error) {
				if s.o.Access != nil && putVerb(now) != verb || s.quotas != nil && tenantOf(change, now) != tenant {
					return function.NewRevision{}, errOtherVerb
				}
				return build(now)
			})
		})
		if !errors.Is(err, errOtherVerb) {
			return res, err
		}
		if attempt == maxAttempts {
			return res, fmt.Errorf("%w: %w", function.ErrPrecondition, err)
		}
		if current, err = s.current(ctx, name); err != nil {
			return res, err
		}
		if change, verb, err = s.admitPut(ctx, name, unbound, current, false); err != nil {
			return res, err
		}
	}
}

// withinQuota makes a change after which the function's wanted module has the
// size that size returns, if the tenant has room for that. Nobody else's
// change of the tenant is counted or recorded meanwhile.
func (s *Server) withinQuota(ctx context.Context, tenant, name string, size func(context.Context) (int64, error), do func() (function.Result, error)) (function.Result, error) {
	var recorded *function.Function
	if s.quotas != nil {
		free, err := s.quotas.hold(ctx, tenant)
		if err != nil {
			return function.Result{}, err
		}
		defer func() { free(recorded) }()
		bytes, err := size(ctx)
		if err == nil {
			err = s.quotas.admits(ctx, tenant, name, bytes)
		}
		if err != nil {
			return function.Result{}, err
		}
	}
	res, err := do()
	if err == nil {
		recorded = &res.Function
		auditOf(ctx).recorded(res)
	}
	return res, err
}

// tenantOf is whom a function belongs to after the change; f is the function
// as it is (nil: not there).
func tenantOf(c function.Change, f *function.Function) string {
	switch {
	case c.Tenant != "":
		return c.Tenant
	case f != nil:
		return f.Tenant
	}
	return v1alpha1.DefaultTenant
}

// valid checks settings, and whether they can be honoured here.
func (s *Server) valid(m function.Settings) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if s.o.Runtimes == nil {
		for _, n := range []struct {
			name string
			set  bool
		}{
			{"runtime " + string(m.Runtime), m.Spin()}, {"host", m.Host != ""}, {"routes", len(m.Routes) > 0},
			{"placement", m.Placement != nil}, {"autoscaling", m.Autoscaling != nil},
		} {
			if n.set {
				return newProblem("runtime-unsupported", "This API is for one machine, which has the resident runtime only and cannot honour the setting %s. Leave it out, or submit to a cluster.", n.name)
			}
		}
		return nil
	}
	if runtime := cmp.Or(m.Runtime, v1alpha1.RuntimeResident); !slices.Contains(s.o.Runtimes, runtime) {
		return newProblem("runtime-unsupported", "This cluster cannot run functions with the runtime %s; it has %s.", runtime, joined(s.o.Runtimes))
	}
	return nil
}

func joined(runtimes []v1alpha1.FunctionRuntime) string {
	var names []string
	for _, r := range runtimes {
		names = append(names, string(r))
	}
	return cmp.Or(strings.Join(names, ", "), "none")
}

// patch serves PATCH /v1/functions/{name}: the wanted module with other settings.
func (s *Server) patch(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	if _, _, err := mediaType(r, "application/merge-patch+json"); err != nil {
		return err
	}
	change, wait, key, err := s.changeOf(r)
	if err != nil {
		return err
	}
	if err := s.admitEarly(r.Context(), name, access.VerbUpdate, key); err != nil {
		return err
	}
	data, err := s.readJSON(w, r)
	if err != nil {
		return err
	}
	patch, err := parsePatch(data)
	if err != nil {
		return err
	}
	return s.mutate(w, r, key, fingerprint(r, hash(data)), func(ctx context.Context, done *function.Outcome) (*reply, error) {
		change, err := s.admit(ctx, name, access.VerbUpdate, change)
		if err != nil {
			return nil, err
		}
		if done != nil {
			return s.await(ctx, name, change.Tenant, done.Revision, false, wait)
		}
		if ctx.Err() != nil {
			return nil, errClientGone
		}
		res, err := s.change(ctx, name, change, patch)
		if err != nil {
			return nil, s.hidden(err)
		}
		auditOf(ctx).recorded(res)
		return s.await(ctx, name, change.Tenant, res.Function.Wanted, false, wait)
	})
}

// change records the wanted module with other settings. The artifact of a spin
// function has its environment in it, and is published with the new one first.
func (s *Server) change(ctx context.Context, name string, change function.Change, patch function.Patch) (function.Result, error) {
	for attempt := 1; ; attempt++ {
		seen, err := s.o.Store.Get(ctx, name)
		if err != nil {
			return function.Result{}, err
		}
		artifact, app, err := s.configure(ctx, change, seen, patch)
		if err != nil {
			return function.Result{}, err
		}
		res, err := s.o.Store.AddRevision(ctx, name, change, func(current *function.Function) (function.NewRevision, error) {
			if current == nil {
				return function.NewRevision{}, function.ErrNotFound
			}
			was := current.Revision
			settings := patch.Apply(was.Settings)
			if err := s.valid(settings); err != nil {
				return function.NewRevision{}, err
			}
			if was.Artifact != seen.Revision.Artifact || !applicationOf(settings).Equal(app) {
				return function.NewRevision{}, errOtherEnvironment // another writer was faster
			}
			return function.NewRevision{
				ModuleDigest: was.ModuleDigest, SizeBytes: was.SizeBytes, MemoryMinPages: was.MemoryMinPages,
				Artifact: artifact, Settings: settings,
			}, overMemory(was.MemoryMinPages, settings.MemoryMiB)
		})
		if !errors.Is(err, errOtherEnvironment) {
			return res, err
		}
		if attempt == maxAttempts {
			return res, fmt.Errorf("%w: %w", function.ErrPrecondition, err)
		}
	}
}

// configure returns the artifact of the function as it is, f, with the patch
// applied to its settings.
func (s *Server) configure(ctx context.Context, change function.Change, f function.Function, patch function.Patch) (v1alpha1.Artifact, Application, error) {
	was, settings := f.Revision, patch.Apply(f.Revision.Settings)
	app := applicationOf(settings)
	before := applicationOf(was.Settings)
	c, able := s.o.Publisher.(Configurer)
	if !able || app.Equal(before) {
		return was.Artifact, app, nil
	}
	// Before anything reaches the registry: what is going to be refused leaves no
	// trace there.
	err := change.Admits(f.Name, &f)
	if err == nil {
		err = s.valid(settings)
	}
	if err != nil {
		return was.Artifact, app, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Limits.Work)
	defer cancel()
	artifact, err := c.Configure(ctx, f.Tenant, f.Name, was.Artifact, was.ModuleDigest, was.SizeBytes, before, app)
	return artifact, app, err
}

// rollback serves POST /v1/functions/{name}/rollback.
func (s *Server) rollback(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	change, wait, key, err := s.changeOf(r)
	if err != nil {
		return err
	}
	if err := s.admitEarly(r.Context(), name, access.VerbUpdate, key); err != nil {
		return err
	}
	data, err := s.readJSON(w, r)
	if err != nil {
		return err
	}
	to := 0
	if len(data) > 0 {
		if _, _, err := mediaType(r, "application/json"); err != nil {
			return err
		}
		var doc struct {
			Revision *int `json:"revision"`
		}
		if err := strictJSON(data, &doc); err != nil {
			return err
		}
		if doc.Revision != nil {
			if to = *doc.Revision; to < 1 {
				return newProblem("malformed-request", `The member "revision" must be the number of a revision, 1 or more.`)
			}
		}
	}
	return s.mutate(w, r, key, fingerprint(r, hash(data)), func(ctx context.Context, done *function.Outcome) (*reply, error) {
		change, err := s.admit(ctx, name, access.VerbUpdate, change)
		if err != nil {
			return nil, err
		}
		if done != nil {
			return s.await(ctx, name, change.Tenant, done.Revision, false, wait)
		}
		if ctx.Err() != nil {
			return nil, errClientGone
		}
		res, err := s.rollbackTo(ctx, name, to, change)
		if err != nil {
			return nil, s.hidden(err)
		}
		return s.await(ctx, name, change.Tenant, res.Function.Wanted, false, wait)
	})
}

// rollbackTo rolls back if the tenant has room for the older module.
func (s *Server) rollbackTo(ctx context.Context, name string, to int, change function.Change) (function.Result, error) {
	tenant := change.Tenant
	if s.quotas != nil {
		f, err := s.o.Store.Get(ctx, name)
		if err != nil {
			return function.Result{}, err
		}
		tenant = tenantOf(change, &f)
	}
	size := func(ctx context.Context) (int64, error) {
		f, err := s.o.Store.Get(ctx, name)
		if err != nil {
			return 0, err
		}
		revisions, err := s.o.Store.Revisions(ctx, name)
		if err != nil {
			return 0, err
		}
		for _, v := range revisions { // newest first, as Store.Rollback chooses
			if v.Number == to || to == 0 && v.Number < f.Wanted && !v.ActivatedAt.IsZero() {
				return v.SizeBytes, nil
			}
		}
		return 0, nil // the store says what is wrong
	}
	return s.withinQuota(ctx, tenant, name, size, func() (function.Result, error) {
		return s.o.Store.Rollback(ctx, name, to, change)
	})
}

// delete serves DELETE /v1/functions/{name}.
func (s *Server) delete(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	change, _, key, err := s.changeOf(r)
	if err != nil {
		return err
	}
	if err := s.admitEarly(r.Context(), name, access.VerbDelete, key); err != nil {
		return err
	}
	return s.mutate(w, r, key, fingerprint(r, ""), func(ctx context.Context, done *function.Outcome) (*reply, error) {
		if done == nil {
			change, err := s.admit(ctx, name, access.VerbDelete, change)
			if err != nil {
				return nil, err
			}
			if ctx.Err() != nil {
				return nil, errClientGone
			}
			was, err := s.toDelete(ctx, name)
			if err != nil {
				return nil, err
			}
			if err := s.o.Store.Delete(ctx, name, change); err != nil {
				return nil, s.hidden(err)
			}
			s.quotas.deleted(was)
			auditOf(ctx).deleted(was)
		}
		return &reply{status: http.StatusNoContent}, nil
	})
}

// toDelete returns what quotas and the audit log want to know of a function
// before it is gone; nil where there is neither.
func (s *Server) toDelete(ctx context.Context, name string) (*function.Function, error) {
	if s.quotas == nil && s.o.Audit == nil {
		return nil, nil
	}
	return s.current(ctx, name)
}

// changeOf reads what every changing request can carry.
func (s *Server) changeOf(r *http.Request) (c function.Change, wait time.Duration, key string, err error) {
	if key, err = idempotencyKey(r); err != nil {
		return
	}
	key = s.scoped(r.Context(), key)
	c.IdempotencyKey = key
	if c.Precondition.IfMatch, err = entityTags(r, "If-Match"); err != nil {
		return
	}
	none, err := entityTags(r, "If-None-Match")
	if err != nil {
		return
	}
	if len(none) > 0 {
		if len(none) != 1 || none[0] != "*" {
			err = newProblem("invalid-parameter", "If-None-Match of a change can only be *.")
			return
		}
		c.Precondition.IfNoneMatchAny = true
	}
	wait = defaultWait
	q := r.URL.Query()
	if q.Has("wait") {
		if wait, err = durationParameter(q, "wait", maxWait); err != nil {
			return
		}
	}
	for _, p := range strings.Split(strings.Join(r.Header.Values("Prefer"), ","), ",") {
		if strings.EqualFold(strings.TrimSpace(p), "respond-async") {
			wait = 0
		}
	}
	return
}

// early refuses a PUT before its body is read: for its caller, its tenant's
// quotas, or a precondition, all without the store's lock. The tenant is empty
// where nothing depends on it.
func (s *Server) early(ctx context.Context, name string, c function.Change) (tenant string, err error) {
	// Under a key the request may have been made before: what it found then
	// and did is not held against it now.
	fresh := c.IdempotencyKey == ""
	if !fresh && s.o.Access == nil && s.quotas == nil {
		return "", nil
	}
	f, err := s.current(ctx, name)
	if err != nil {
		return "", err
	}
	if c, _, err = s.admitPut(ctx, name, c, f, !fresh); err != nil {
		return "", err
	}
	tenant = tenantOf(c, f)
	if err := s.count(ctx, tenant); err != nil {
		return tenant, err
	}
	if err := s.quotas.spend(ctx, tenant); err != nil || !fresh {
		return tenant, err
	}
	if err := c.Admits(name, f); err != nil {
		return tenant, err
	}
	return tenant, s.quotas.admits(ctx, tenant, name, -1)
}

// current returns the function, nil when there is none.
func (s *Server) current(ctx context.Context, name string) (*function.Function, error) {
	f, err := s.o.Store.Get(ctx, name)
	switch {
	case errors.Is(err, function.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &f, nil
}

// await waits until a recorded revision serves and answers: 201 or 200 when
// it does, 202 when that takes longer than wait or another revision came in
// between, a problem when it cannot be served. With access control only a
// function of the tenant is shown.
func (s *Server) await(ctx context.Context, name, tenant string, revision int, created bool, wait time.Duration) (*reply, error) {
	started := time.Now()
	stop, cancel := s.untilStop(ctx)
	defer cancel()
	timed, cancelTimed := context.WithTimeout(stop, wait)
	defer cancelTimed()

	f, err := s.o.Store.Get(ctx, name)
	for err == nil && f.Wanted == revision && f.Revision.State == v1alpha1.StatePending && timed.Err() == nil {
		var next function.Function
		next, err = s.o.Store.Watch(timed, name, f.ETag)
		if err == nil {
			f = next
		} else if timed.Err() != nil {
			err = nil // an answer all the same, unless nobody waits for it
		}
	}
	if ctx.Err() != nil {
		return nil, errClientGone
	}
	if errors.Is(err, function.ErrNotFound) || err == nil && s.o.Access != nil && f.Tenant != tenant {
		return nil, newProblem("function-not-found", "The function was recorded, and then deleted by someone else.")
	}
	if err != nil {
		return nil, err
	}
	header := map[string]string{"ETag": f.ETag, "Location": "/v1/functions/" + name}
	status, outcome := http.StatusAccepted, "pending"
	switch {
	case f.Wanted != revision:
		outcome = "superseded"
	case f.Revision.State == v1alpha1.StateReady:
		status, outcome = http.StatusOK, "ready"
		if created {
			status = http.StatusCreated
		}
		s.metrics.phase("ready", time.Since(started))
	case f.Revision.State == v1alpha1.StateFailed:
		p := failed(f)
		p.header = header
		s.metrics.submit("failed")
		return nil, p
	}
	s.metrics.submit(outcome)
	return jsonReply(status, s.view(f), header), nil
}

// mutate runs a changing request under its Idempotency-Key, if it has one.
func (s *Server) mutate(w http.ResponseWriter, r *http.Request, key, fingerprint string, do func(context.Context, *function.Outcome) (*reply, error)) error {
	ctx := r.Context()
	if key == "" {
		a, err := do(ctx, nil)
		if err != nil {
			return err
		}
		a.write(w)
		return nil
	}
	begun, err := s.o.Store.Begin(ctx, key, fingerprint)
	if err != nil {
		return err
	}
	switch begun.State {
	case function.IdempotencyInFlight:
		return newProblem("request-in-flight", "The first request with this Idempotency-Key has not been answered yet.")
	case function.IdempotencyMismatch:
		return newProblem("idempotency-mismatch", "This Idempotency-Key was used for a request with another method, path or body. Use a new key.")
	case function.IdempotencyReplay:
		auditOf(ctx).setReplayed()
		a := &reply{status: begun.Response.Status, header: begun.Response.Header, body: begun.Response.Body}
		w.Header().Set("Idempotency-Replayed", "true")
		a.write(w)
		return nil
	}
	// The client may be gone by the time there is an answer; the record must
	// not depend on it. Both calls are bounded by the disk.
	lasting := context.WithoutCancel(ctx)
	answered := false
	defer func() {
		if !answered {
			_ = s.o.Store.Release(lasting, key)
		}
	}()
	a, err := do(ctx, begun.Outcome)
	if err != nil {
		if errors.Is(err, errClientGone) || ctx.Err() != nil {
			return err
		}
		p := toProblem(err)
		if p.kind.Retryable || p.kind.Status >= 500 || p.kind.Status == http.StatusForbidden {
			// A retry should try, not be told again: somebody may have mended
			// it, given the right, or made room.
			return p
		}
		s.keep(lasting, key, p.reply(requestInstance(ctx)), &answered)
		return p
	}
	s.keep(lasting, key, a, &answered)
	a.write(w)
	return nil
}

// keep stores an answer for replays. When that fails the answer still goes
// out: the change is recorded, and a retry resumes from there.
func (s *Server) keep(ctx context.Context, key string, a *reply, answered *bool) {
	err := s.o.Store.Complete(ctx, key, function.Response{Status: a.status, Header: a.header, Body: a.body})
	if err != nil {
		s.log.WarnContext(ctx, "answer could not be stored for its Idempotency-Key", "error", err)
		return
	}
	*answered = true
}

// view is a function as the API shows it.
func (s *Server) view(f function.Function) v1alpha1.Function {
	url, pathURL := s.o.URLs(f.Name)
	var warnings []v1alpha1.FunctionError
	if s.o.Warnings != nil {
		warnings = s.o.Warnings(f)
	}
	return v1alpha1.Function{
		APIVersion: v1alpha1.APIVersion, Kind: "Function",
		Name: f.Name, Tenant: f.Tenant, URL: url, PathURL: pathURL,
		State: f.Revision.State, Revision: f.Wanted, ActiveRevision: f.Active, Warm: f.Warm,
		Digest: f.Revision.ModuleDigest, Image: s.o.Image(f.Revision.Artifact),
		Settings: f.Revision.Settings.Public(), Phases: phases(f.Revision),
		CreatedAt: f.CreatedAt, UpdatedAt: f.UpdatedAt, Error: f.Revision.Error,
		Warnings: warnings,
	}
}

func phases(r function.Revision) []v1alpha1.Phase {
	return append(append([]v1alpha1.Phase(nil), r.Phases...), r.NodePhases...)
}

func pathName(r *http.Request) (string, error) {
	name := r.PathValue("name")
	return name, function.ValidateName(name)
}

// fingerprint identifies a request, so that a key is not used for two. How
// long to wait for the answer is not part of what is asked for.
func fingerprint(r *http.Request, content string) string {
	q := r.URL.Query()
	q.Del("wait")
	return hash([]byte(r.Method + "\n" + r.URL.Path + "\n" + q.Encode() + "\n" + content))
}

// idempotencyKey reads the Idempotency-Key header
// (draft-ietf-httpapi-idempotency-key-header): a quoted string, or the bare
// token that most clients send. "" means there is none.
func idempotencyKey(r *http.Request) (string, error) {
	values := r.Header.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	malformed := newProblem("invalid-idempotency-key", "Send one Idempotency-Key of 1 to 255 printable ASCII characters without spaces, e.g. a UUID.")
	if len(values) > 1 {
		return "", malformed
	}
	key := values[0]
	if len(key) >= 2 && key[0] == '"' && key[len(key)-1] == '"' {
		key = key[1 : len(key)-1]
	}
	if key == "" || len(key) > 255 || strings.ContainsFunc(key, func(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }) {
		return "", malformed
	}
	return key, nil
}

// entityTags parses If-Match and If-None-Match (RFC 9110, section 13.1).
func entityTags(r *http.Request, header string) ([]string, error) {
	rest := strings.TrimSpace(strings.Join(r.Header.Values(header), ","))
	if rest == "" {
		return nil, nil
	}
	if rest == "*" {
		return []string{"*"}, nil
	}
	malformed := newProblem("invalid-parameter", "%s must be * or a list of quoted entity tags.", header)
	var tags []string
	for rest != "" {
		tag := ""
		if strings.HasPrefix(rest, "W/") {
			tag, rest = "W/", rest[2:]
		}
		if rest == "" || rest[0] != '"' {
			return nil, malformed
		}
		end := strings.IndexByte(rest[1:], '"')
		if end < 0 || len(tags) == maxHeaderTags {
			return nil, malformed
		}
		tags = append(tags, tag+rest[:end+2])
		rest = strings.TrimLeft(rest[end+2:], " \t")
		if rest == "" {
			break
		}
		if rest[0] != ',' {
			return nil, malformed
		}
		rest = strings.TrimLeft(rest, ", \t")
	}
	return tags, nil
}

func intParameter(q url.Values, name string, min, max int) (int, error) {
	n, err := strconv.Atoi(q.Get(name))
	if err != nil || n < min || n > max {
		return 0, newProblem("invalid-parameter", "The query parameter %q must be a whole number from %d to %d.", name, min, max)
	}
	return n, nil
}

func durationParameter(q url.Values, name string, max time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(q.Get(name))
	if err != nil || d < 0 || d > max {
		return 0, newProblem("invalid-parameter", `The query parameter %q must be a duration such as "30s", from 0s to %s.`, name, max)
	}
	return d, nil
}

// queryPatch reads the settings that a raw module can bring in the query.
func queryPatch(q url.Values, media string) (function.Patch, error) {
	var p function.Patch
	if q.Has("runtime") {
		if media != "application/wasm" {
			return p, newProblem("unknown-parameter", "With %s, give runtime in the settings instead of the query.", media)
		}
		p.SetRuntime(v1alpha1.FunctionRuntime(q.Get("runtime")))
	}
	for _, n := range []struct {
		name string
		set  func(int)
	}{{"memoryMiB", p.SetMemoryMiB}, {"timeoutMs", p.SetTimeoutMS}, {"concurrency", p.SetConcurrency}} {
		if !q.Has(n.name) {
			continue
		}
		if media != "application/wasm" {
			return p, newProblem("unknown-parameter", "With %s, give %s in the settings instead of the query.", media, n.name)
		}
		v, err := strconv.Atoi(q.Get(n.name))
		if err != nil {
			return p, newProblem("invalid-parameter", "The query parameter %q must be a whole number.", n.name)
		}
		n.set(v)
	}
	return p, nil
}
