package clusterstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	// maxAttempts bounds how often a change is decided anew because the object
	// changed meanwhile: nodes write its status while it is rolled out.
	maxAttempts = 30
	// maxPause bounds the pause before the next attempt.
	maxPause = 200 * time.Millisecond
)

// errConflict says that what was decided on is no longer so.
var errConflict = errors.New("the function changed meanwhile")

// attempt runs try, under the name's lock, until it ends with anything but
// errConflict.
func (s *Store) attempt(ctx context.Context, name, idempotencyKey string, try func(hash string) error) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	hash, err := s.holds(idempotencyKey)
	if err != nil {
		return err
	}
	unlock, err := s.writers.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	for i := range maxAttempts {
		if err = s.begin(ctx); err != nil {
			return err
		}
		if err = try(hash); !errors.Is(err, errConflict) {
			return err
		}
		pause := time.NewTimer(rand.N(min(maxPause, 2*time.Millisecond<<min(i, 10))))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		}
	}
	return fmt.Errorf("change %s: %w: others changed it at each of %d attempts: %w", name, function.ErrUnavailable, maxAttempts, err)
}

// current is the function as the API server has it now. A spec that somebody
// else wrote is recorded first, so that no change is made over it unseen.
func (s *Store) current(ctx context.Context, name string) (*entry, *kube.Host, error) {
	e, claim, err := s.refresh(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if e != nil && specHash(e.object.Spec) != e.rec.of {
		err := s.adopt(ctx, e.key, nil)
		if refusal(err) {
			return e, claim, nil // refused; what is recorded counts
		}
		if err != nil {
			return nil, nil, err
		}
		return s.refresh(ctx, name)
	}
	return e, claim, nil
}

// AddRevision implements function.Writer.
func (s *Store) AddRevision(ctx context.Context, name string, c function.Change, build func(*function.Function) (function.NewRevision, error)) (function.Result, error) {
	if err := function.ValidateName(name); err != nil {
		return function.Result{}, err
	}
	if c.Tenant != "" {
		if err := function.ValidateTenant(c.Tenant); err != nil {
			return function.Result{}, err
		}
	}
	var result function.Result
	err := s.attempt(ctx, name, c.IdempotencyKey, func(hash string) (err error) {
		result, err = s.tryAdd(ctx, name, hash, c, build)
		return err
	})
	if err != nil {
		return function.Result{}, err
	}
	return result, nil
}

func (s *Store) tryAdd(ctx context.Context, name, hash string, c function.Change, build func(*function.Function) (function.NewRevision, error)) (function.Result, error) {
	started := time.Now()
	e, claim, err := s.current(ctx, name)
	if err != nil {
		return function.Result{}, err
	}
	var current *function.Function
	if e != nil {
		if done, ok := e.rec.request(hash); ok {
			return function.Result{Function: e.fn, Created: done.created}, nil // an earlier attempt was cut off after its commit
		}
		f := e.fn
		current = &f
	}
	if err := c.Admits(name, current); err != nil {
		return function.Result{}, err
	}
	nr, err := build(current)
	if err != nil {
		return function.Result{}, err
	}
	if err := nr.Settings.Validate(); err != nil {
		return function.Result{}, err
	}
	if nr.Artifact.Registry == "" {
		return function.Result{}, &function.ValidationError{Field: "artifact", Reason: "must name a registry that the nodes of the cluster reach"}
	}
	if e != nil {
		w := e.fn.Revision
		if w.ModuleDigest == nr.ModuleDigest && w.Settings.Equal(nr.Settings) && w.State != v1alpha1.StateFailed {
			if err := s.recordOutcome(ctx, c.IdempotencyKey, function.Outcome{Name: name, Revision: w.Number}); err != nil {
				return function.Result{}, err
			}
			return function.Result{Function: e.fn, Unchanged: true}, nil
		}
	}
	k := key{Namespace: cmp.Or(c.Tenant, v1alpha1.DefaultTenant), Name: name}
	if e != nil {
		k = e.key
	} else if err := s.checkTenant(ctx, k.Namespace); err != nil {
		return function.Result{}, err
	}
	d := revisionData{
		ModuleDigest: nr.ModuleDigest, SizeBytes: nr.SizeBytes, MemoryMinPages: nr.MemoryMinPages,
		Artifact: nr.Artifact, Phases: slices.Clone(nr.Phases),
	}
	next := newRevision{
		key: k, entry: e, claim: claim, data: d, settings: nr.Settings, hash: hash, started: started,
		spec: func(secret string) v1alpha1.FunctionSpec { return specOf(nr.Artifact, nr.Settings, secret) },
	}
	if e != nil {
		next.object = e.object
	}
	made, err := s.commitRevision(ctx, next)
	if err != nil {
		return function.Result{}, err
	}
	return function.Result{Function: made.fn, Created: e == nil}, nil
}

// checkTenant asks for the namespace before anything is claimed for it.
func (s *Store) checkTenant(ctx context.Context, namespace string) error {
	ctx, cancel := call(ctx)
	defer cancel()
	ns, err := s.kube.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), err == nil && ns.DeletionTimestamp != nil:
		return fmt.Errorf("%w: make the namespace %s, or name another tenant", function.ErrTenantNotFound, namespace)
	case err != nil:
		return storeError("look up namespace "+namespace, err)
	}
	return nil
}

// newRevision is a revision that is about to be recorded.
type newRevision struct {
	key key
	// entry is the function as it is recorded, nil if it is not.
	entry *entry
	// object is the Function object, nil if it is to be made.
	object *kube.Function
	// claim is what was read of the claim of the name, nil if there is none.
	claim    *kube.Host
	data     revisionData
	settings function.Settings
	// spec is made for the name of the Secret with the secret values.
	spec func(secret string) v1alpha1.FunctionSpec
	// hash is of the idempotency key, if there is one.
	hash    string
	started time.Time
}

// commitRevision records the next revision of a function and makes it the
// wanted one.
func (s *Store) commitRevision(ctx context.Context, n newRevision) (*entry, error) {
	k, e, claim, d, owner := n.key, n.entry, n.claim, n.data, n.object
	var rec record
	if e != nil {
		rec = e.rec
		rec.revisions, rec.requests = slices.Clone(rec.revisions), slices.Clone(rec.requests)
	}
	now := s.o.Now().UTC()
	d.Number = rec.newest() + 1
	if e == nil && claim != nil {
		d.Number = claim.Spec.LastRevision + 1
	}
	d.CreatedAt = now

	var secret *corev1.Secret
	if len(n.settings.Secrets) > 0 {
		if d.ValuesIn = s.secretWith(k, e, n.settings.Secrets); d.ValuesIn == "" {
			secret = newSecret(k.Namespace, k.Name, n.settings.Secrets, owner)
			d.ValuesIn = secret.Name
		}
	}
	d.Spec = n.spec(d.ValuesIn)
	cr, ref, err := newControllerRevision(k.Namespace, k.Name, d, owner)
	if err != nil {
		return nil, err
	}
	// A new name is claimed before anything is left in the namespace of a
	// tenant that cannot have it.
	if e == nil {
		if err := s.claimName(ctx, k, claim, d.Number); err != nil {
			return nil, err
		}
	}
	if err := s.claimHost(ctx, k, n.settings); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	if e != nil {
		g.Go(func() error { return s.claimName(gctx, k, claim, d.Number) })
	}
	if secret != nil {
		g.Go(func() error {
			c, cancel := call(gctx)
			defer cancel()
			made, err := s.kube.CoreV1().Secrets(k.Namespace).Create(c, secret, metav1.CreateOptions{FieldManager: fieldManager})
			if err != nil {
				return storeError("record the secrets of "+k.String(), err)
			}
			s.sawSecret(made)
			secret = made
			return nil
		})
	}
	g.Go(func() error {
		c, cancel := call(gctx)
		defer cancel()
		made, err := s.kube.AppsV1().ControllerRevisions(k.Namespace).Create(c, cr, metav1.CreateOptions{FieldManager: fieldManager})
		if err != nil {
			return storeError("record a revision of "+k.String(), err)
		}
		s.sawRevision(made)
		cr = made
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}

	rec.revisions = append(rec.revisions, ref)
	rec.wanted, rec.updatedAt = d.Number, now
	rec.changes++
	rec.recordOf, rec.recordMS = d.Number, float64(time.Since(n.started).Microseconds())/1000
	rec.remember(change{n.hash, d.Number, owner == nil})
	if e != nil {
		rec.prune(e.fn.Active, e.fn.LastActive)
	}
	f, err := s.commit(ctx, k, owner, d.Spec, rec)
	if err != nil {
		return nil, err
	}
	if owner == nil {
		s.own(ctx, f, cr, secret)
	}
	return s.committed(ctx, f)
}

// commit writes spec and record in one request. It returns errConflict when
// the object is not as it was.
func (s *Store) commit(ctx context.Context, k key, was *kube.Function, spec v1alpha1.FunctionSpec, rec record) (*kube.Function, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	rec.of = specHash(spec)
	made := new(kube.Function)
	var err error
	options := metav1.CreateOptions{FieldManager: fieldManager}
	if was == nil {
		f := &kube.Function{
			TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind},
			ObjectMeta: metav1.ObjectMeta{Namespace: k.Namespace, Name: k.Name, Annotations: map[string]string{}},
			Spec:       spec,
		}
		rec.write(f.Annotations)
		err = s.api.Post().Namespace(k.Namespace).Resource(v1alpha1.FunctionsResource).
			VersionedParams(&options, metav1.ParameterCodec).Body(f).Do(ctx).Into(made)
	} else {
		f := was.DeepCopy()
		f.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind}
		f.Spec = spec
		if f.Annotations == nil {
			f.Annotations = map[string]string{}
		}
		rec.write(f.Annotations)
		err = s.api.Put().Namespace(k.Namespace).Resource(v1alpha1.FunctionsResource).Name(k.Name).
			VersionedParams(&metav1.UpdateOptions{FieldManager: fieldManager}, metav1.ParameterCodec).Body(f).Do(ctx).Into(made)
	}
	switch {
	case apierrors.IsConflict(err), was == nil && apierrors.IsAlreadyExists(err), was != nil && apierrors.IsNotFound(err) && !notServed(err):
		if was == nil {
			// Somebody made the object without us (kubectl): it is recorded first.
			if err := s.adopt(ctx, k, nil); err != nil {
				return nil, err
			}
		}
		return nil, errConflict
	case apierrors.IsInvalid(err):
		return nil, &function.ValidationError{Field: "the function", Reason: "is refused by the API server: " + err.Error()}
	case err != nil:
		return nil, storeError("record function "+k.String(), err)
	}
	s.mem.putFunction(slim(made))
	return made, nil
}

// committed is the entry after a commit. That it cannot be read does not make
// the commit undone.
func (s *Store) committed(ctx context.Context, f *kube.Function) (*entry, error) {
	s.mem.mu.RLock()
	e, err := s.mem.build(key{Namespace: f.Namespace, Name: f.Name})
	s.mem.mu.RUnlock()
	if err != nil {
		e, err = s.complete(ctx, f)
	}
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, fmt.Errorf("%w: %s was deleted at the same time", function.ErrNotFound, f.Name)
	}
	return e, nil
}

// own makes a function the owner of what was written before it existed. Where
// that fails, Collect does it.
func (s *Store) own(ctx context.Context, f *kube.Function, cr *appsv1.ControllerRevision, secret *corev1.Secret) {
	patch := fmt.Appendf(nil, `{"metadata":{"ownerReferences":[{"apiVersion":%q,"kind":%q,"name":%q,"uid":%q,"controller":true}]}}`,
		v1alpha1.APIVersion, kube.FunctionKind, f.Name, string(f.UID))
	ctx, cancel := call(ctx)
	defer cancel()
	var g errgroup.Group
	g.Go(func() error {
		_, err := s.kube.AppsV1().ControllerRevisions(cr.Namespace).Patch(ctx, cr.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		return err
	})
	if secret != nil {
		g.Go(func() error {
			_, err := s.kube.CoreV1().Secrets(secret.Namespace).Patch(ctx, secret.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		s.log.Info("a new function does not own its revision yet", "namespace", f.Namespace, "function", f.Name, "err", err)
	}
}

// secretWith finds a Secret of the function's with exactly these values.
func (s *Store) secretWith(k key, e *entry, values map[string]string) string {
	if e == nil {
		return "" // what is there belongs to a function that was deleted
	}
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	for _, ro := range s.mem.kept[k] {
		// Only those of revisions that are kept: Collect deletes the others.
		if ro.data.ValuesIn == "" || !slices.ContainsFunc(e.rec.revisions, func(r revisionRef) bool { return k.Name+"-"+r.suffix == ro.name }) {
			continue
		}
		if so, ok := s.mem.secrets.rows[key{Namespace: k.Namespace, Name: ro.data.ValuesIn}]; ok && maps.Equal(so.value.values, values) {
			return ro.data.ValuesIn
		}
	}
	return ""
}

// claimName makes the claim of a function's own name say that the namespace
// has it and that number was given. claim is what was read of it, nil if there
// is none. It returns function.ErrTaken, or errConflict to look again.
func (s *Store) claimName(ctx context.Context, k key, claim *kube.Host, number int) error {
	spec := v1alpha1.HostSpec{Namespace: k.Namespace, Function: k.Name, LastRevision: number}
	switch {
	case claim == nil:
		return s.putHost(ctx, nil, k.Name, spec)
	case claim.Spec.Namespace != k.Namespace:
		f, err := s.getFunction(ctx, key{Namespace: claim.Spec.Namespace, Name: k.Name})
		if err != nil {
			return err
		}
		if f != nil || inGrace(claim) {
			return fmt.Errorf("%w: %s", function.ErrTaken, k.Name)
		}
		spec.LastRevision = max(number, claim.Spec.LastRevision)
	case claim.Spec.LastRevision >= number && claim.Spec.ReleasedAt == nil:
		return nil
	default:
		spec.LastRevision = max(number, claim.Spec.LastRevision)
	}
	return s.putHost(ctx, claim, k.Name, spec)
}

// putHost creates a claim, or replaces the one that was read.
func (s *Store) putHost(ctx context.Context, was *kube.Host, name string, spec v1alpha1.HostSpec) error {
	ctx, cancel := call(ctx)
	defer cancel()
	if was != nil && was.Spec.Namespace == spec.Namespace && was.Spec.ReleasedAt == nil {
		spec.ClaimedAt = was.Spec.ClaimedAt
	} else {
		now := time.Now().UTC()
		spec.ClaimedAt = &now
	}
	h := kube.NewHost(name, spec)
	made := new(kube.Host)
	var err error
	if was == nil {
		err = s.api.Post().Resource(v1alpha1.HostsResource).Body(h).Do(ctx).Into(made)
	} else {
		h.ObjectMeta = *was.ObjectMeta.DeepCopy()
		err = s.api.Put().Resource(v1alpha1.HostsResource).Name(name).Body(h).Do(ctx).Into(made)
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || was != nil && apierrors.IsNotFound(err) && !notServed(err) {
		return errConflict
	}
	if err != nil {
		return storeError("claim the name "+name, err)
	}
	s.sawHost(made)
	return nil
}

// claimHost claims the additional DNS name of a function, if it has one, or
// returns function.ErrHostTaken.
func (s *Store) claimHost(ctx context.Context, k key, settings function.Settings) error {
	host := settings.Host
	if host == "" {
		return nil
	}
	if s.o.BaseDomain != nil {
		if base := s.o.BaseDomain(); base != "" {
			label, below := strings.CutSuffix(host, "."+base)
			if host == base || below && label != k.Name && !strings.Contains(label, ".") {
				return fmt.Errorf("%w: %s is the place of a function's own name; choose a name outside of %s", function.ErrHostTaken, host, base)
			}
		}
	}
	if other, path := s.routeTaken(k, settings); other != "" {
		return fmt.Errorf("%w: %s%s reaches function %s already", function.ErrHostTaken, host, path, other)
	}
	for range 3 {
		s.mem.mu.RLock()
		known, ok := s.mem.hosts.rows[key{Name: host}]
		s.mem.mu.RUnlock()
		if ok && known.value.Namespace == k.Namespace && known.value.ReleasedAt == nil {
			return nil
		}
		claim, err := s.getHost(ctx, host)
		if err != nil {
			return err
		}
		if claim != nil && claim.Spec.Namespace != k.Namespace {
			used, err := s.hostUsed(ctx, claim)
			if err != nil {
				return err
			}
			if used {
				return fmt.Errorf("%w: %s", function.ErrHostTaken, host)
			}
		}
		err = s.putHost(ctx, claim, host, v1alpha1.HostSpec{Namespace: k.Namespace, Function: k.Name})
		if !errors.Is(err, errConflict) {
			return err
		}
	}
	return errConflict
}

// inGrace says whether a claim is so new that its function may be on its way:
// a claim is made before the function is.
func inGrace(claim *kube.Host) bool {
	return claim.Spec.ReleasedAt == nil && claim.Spec.ClaimedAt != nil && time.Since(*claim.Spec.ClaimedAt) < claimGrace
}

// hostUsed says whether a function of the claim's namespace has the DNS name.
func (s *Store) hostUsed(ctx context.Context, claim *kube.Host) (bool, error) {
	k := key{Namespace: claim.Spec.Namespace, Name: claim.Spec.Function}
	f, err := s.getFunction(ctx, k)
	if err != nil {
		return false, err
	}
	if f != nil && f.Spec.Host == claim.Name {
		return true, nil
	}
	if inGrace(claim) {
		return true, nil
	}
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	for other, r := range s.mem.functions.rows {
		if other.Namespace == k.Namespace && r.value.Spec.Host == claim.Name {
			return true, nil
		}
	}
	return false, nil
}

// routeTaken looks for another function of the namespace with the same path of
// the same DNS name.
func (s *Store) routeTaken(k key, settings function.Settings) (other, path string) {
	routes := settings.Routes
	if len(routes) == 0 {
		routes = []string{"/"}
	}
	s.mem.mu.RLock()
	defer s.mem.mu.RUnlock()
	for o, r := range s.mem.functions.rows {
		if o.Namespace != k.Namespace || o.Name == k.Name || r.value.Spec.Host != settings.Host {
			continue
		}
		theirs := r.value.Spec.Routes
		if len(theirs) == 0 {
			theirs = []string{"/"}
		}
		for _, p := range routes {
			if slices.Contains(theirs, p) {
				return o.Name, p
			}
		}
	}
	return "", ""
}

// Rollback implements function.Writer.
func (s *Store) Rollback(ctx context.Context, name string, to int, c function.Change) (function.Result, error) {
	var result function.Result
	err := s.attempt(ctx, name, c.IdempotencyKey, func(hash string) (err error) {
		result, err = s.tryRollback(ctx, name, hash, to, c)
		return err
	})
	if err != nil {
		return function.Result{}, err
	}
	return result, nil
}

func (s *Store) tryRollback(ctx context.Context, name, hash string, to int, c function.Change) (function.Result, error) {
	e, _, err := s.current(ctx, name)
	if err != nil {
		return function.Result{}, err
	}
	if e == nil {
		return function.Result{}, cmp.Or(c.Admits(name, nil), function.ErrNotFound)
	}
	if _, ok := e.rec.request(hash); ok {
		return function.Result{Function: e.fn}, nil
	}
	f := e.fn
	if err := c.Admits(name, &f); err != nil {
		return function.Result{}, err
	}
	i := slices.IndexFunc(e.revs, func(r function.Revision) bool { return r.Number == to })
	if to == 0 {
		for j := len(e.revs) - 1; j >= 0 && i < 0; j-- {
			if e.revs[j].Number < e.fn.Wanted && !e.revs[j].ActivatedAt.IsZero() {
				i = j
			}
		}
		if i < 0 {
			return function.Result{}, function.ErrNoRollbackTarget
		}
	}
	if i < 0 {
		return function.Result{}, fmt.Errorf("%w: %s has no revision %d", function.ErrRevisionNotFound, name, to)
	}
	to = e.revs[i].Number
	if to == e.fn.Wanted {
		if err := s.recordOutcome(ctx, c.IdempotencyKey, function.Outcome{Name: name, Revision: to}); err != nil {
			return function.Result{}, err
		}
		return function.Result{Function: e.fn, Unchanged: true}, nil
	}
	ref := e.rec.revisions[slices.IndexFunc(e.rec.revisions, func(r revisionRef) bool { return r.number == to })]
	s.mem.mu.RLock()
	ro := s.mem.kept[e.key][name+"-"+ref.suffix]
	s.mem.mu.RUnlock()
	if ro == nil {
		return function.Result{}, errConflict
	}
	if err := s.claimHost(ctx, e.key, e.revs[i].Settings); err != nil {
		return function.Result{}, err
	}
	rec := e.rec
	rec.requests = slices.Clone(rec.requests)
	rec.wanted, rec.updatedAt = to, s.o.Now().UTC()
	rec.changes++
	rec.remember(change{hash, to, false})
	object, err := s.commit(ctx, e.key, e.object, ro.data.Spec, rec)
	if err != nil {
		return function.Result{}, err
	}
	made, err := s.committed(ctx, object)
	if err != nil {
		return function.Result{}, err
	}
	return function.Result{Function: made.fn}, nil
}

// Delete implements function.Writer.
func (s *Store) Delete(ctx context.Context, name string, c function.Change) error {
	return s.attempt(ctx, name, c.IdempotencyKey, func(string) error { return s.tryDelete(ctx, name, c) })
}

func (s *Store) tryDelete(ctx context.Context, name string, c function.Change) error {
	e, claim, err := s.current(ctx, name)
	if err != nil {
		return err
	}
	if e == nil {
		return cmp.Or(c.Admits(name, nil), function.ErrNotFound)
	}
	f := e.fn
	if err := c.Admits(name, &f); err != nil {
		return err
	}
	if err := s.recordDeletion(ctx, c.IdempotencyKey, e); err != nil {
		return err
	}
	// The numbers given so far outlive the function. Until it is gone nobody
	// takes the claim: that it is used is always asked of the API server.
	now := s.o.Now().UTC()
	spec := v1alpha1.HostSpec{
		Namespace: e.key.Namespace, Function: name, ReleasedAt: &now,
		LastRevision: max(e.rec.newest(), claim.Spec.LastRevision),
	}
	if err := s.putHost(ctx, claim, name, spec); err != nil {
		return err
	}
	ctx, cancel := call(ctx)
	defer cancel()
	background := metav1.DeletePropagationBackground
	options := metav1.DeleteOptions{
		Preconditions:     &metav1.Preconditions{UID: &e.object.UID, ResourceVersion: &e.object.ResourceVersion},
		PropagationPolicy: &background,
	}
	err = s.api.Delete().Namespace(e.key.Namespace).Resource(v1alpha1.FunctionsResource).Name(name).Body(&options).Do(ctx).Error()
	switch {
	case apierrors.IsConflict(err):
		return errConflict
	case err != nil && !(apierrors.IsNotFound(err) && !notServed(err)):
		return storeError("delete function "+e.key.String(), err)
	}
	s.mem.removeFunction(e.key, e.object.UID, versionOf(e.object.ResourceVersion))
	return nil
}
