package clusterstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// What is here is the work of one process at a time: the leader. Two at once
// do no harm.

const (
	// claimGrace is how long a claim without its function is thought to be
	// followed by it.
	claimGrace = time.Minute
	// orphanGrace is how long what nothing refers to is thought to be part of a
	// change that is not committed yet.
	orphanGrace = 15 * time.Minute
	// retiredFor is how long the last revision number of a deleted function is
	// remembered. A node that has not looked for that long has long lost what
	// it knew of the old revisions.
	retiredFor = 30 * 24 * time.Hour
	// collectPage bounds one answer while looking for garbage.
	collectPage = 500
)

// Adopt makes a Function object that somebody wrote by other means than a
// Store (kubectl, GitOps) a recorded revision: it asks the Admission, claims the
// name and the additional DNS name, takes in the values of its secrets as they
// are now, and records the spec. It then brings the status up to date. For what
// is recorded already that is all. Where the spec is refused it is left alone:
// condition Ready says False with reason NameTaken, HostTaken, InvalidSpec or
// what the Admission says; a revision recorded before goes on. Adopt then returns
// nil, or the *Refusal of a spec that may be taken on later. Other errors are
// worth a retry.
func (s *Store) Adopt(ctx context.Context, namespace, name string) error {
	k := key{Namespace: namespace, Name: name}
	if s.settled(k) {
		return s.begin(ctx)
	}
	err := s.admitted(ctx, k)
	var refused *Refusal
	if errors.As(err, &refused) && refused.Retry > 0 {
		return refused
	}
	if refusal(err) {
		return nil // the condition says so
	}
	return err
}

// settled says, without a request, that Adopt has nothing to do: most changes
// of a function are the word of nodes, written by a Store.
func (s *Store) settled(k key) bool {
	s.mem.mu.RLock()
	e := s.mem.entries[k.Name]
	f := s.mem.functions.rows[k].value
	claim := s.mem.hosts.rows[key{Name: k.Name}].value
	s.mem.mu.RUnlock()
	if e == nil || e.key != k || e.object != f || specHash(f.Spec) != e.rec.of ||
		claim.Namespace != k.Namespace || claim.LastRevision < e.rec.newest() || claim.ReleasedAt != nil {
		return false
	}
	before, err := json.Marshal(f.Status)
	if err != nil {
		return false
	}
	after, err := json.Marshal(s.statusOf(f, e.rec, f.Status.Nodes, nil))
	return err == nil && string(before) == string(after)
}

// adopt needs the name's lock. v is what was decided on the spec; nil: that is
// yet to be done. Beside errors of the API server and errOtherSpec it returns
// what the condition says: a *function.ValidationError, *Refusal,
// function.ErrTaken or function.ErrHostTaken.
func (s *Store) adopt(ctx context.Context, k key, v *verdict) error {
	started := time.Now()
	f, err := s.getFunction(ctx, k)
	if err != nil || f == nil {
		return err
	}
	claim, err := s.getHost(ctx, k.Name)
	if err != nil {
		return err
	}
	rec, recorded := readRecord(f.Annotations)
	var e *entry
	if recorded && claim != nil && claim.Spec.Namespace == k.Namespace {
		if e, err = s.complete(ctx, f); err != nil {
			return err
		}
	}
	if e != nil && specHash(f.Spec) == rec.of {
		if err := s.claimName(ctx, k, claim, rec.newest()); err != nil {
			return err
		}
		return s.writeStatus(ctx, f, s.statusOf(f, rec, f.Status.Nodes, nil))
	}
	refuse := func(reason string, why error) error { return s.refuse(ctx, f, reason, why) }
	if err := function.ValidateName(k.Name); err != nil {
		return refuse(ReasonInvalidSpec, err)
	}
	if err := function.ValidateTenant(k.Namespace); err != nil {
		return refuse(ReasonInvalidSpec, err)
	}
	artifact, err := artifactOf(f.Spec.Image)
	if err != nil {
		return refuse(ReasonInvalidSpec, err)
	}
	values, err := s.secretValues(ctx, k, f.Spec.Env)
	if problem := (*function.ValidationError)(nil); errors.As(err, &problem) {
		// Someone can make the Secret later, and nothing here would hear of it.
		if refused := refuse(ReasonInvalidSpec, problem); !errors.As(refused, &problem) {
			return refused
		}
		return fmt.Errorf("record function %s: its secrets are not there yet: %s", k, problem.Error())
	}
	if err != nil {
		return err
	}
	d := revisionData{Artifact: artifact, Spec: f.Spec}
	settings := d.settings(values)
	if err := settings.Validate(); err != nil {
		return refuse(ReasonInvalidSpec, err)
	}
	if claim != nil && claim.Spec.Namespace != k.Namespace {
		if err := s.claimName(ctx, k, claim, claim.Spec.LastRevision); err != nil {
			if errors.Is(err, function.ErrTaken) {
				return refuse(ReasonNameTaken, fmt.Errorf("%w, in another namespace: choose another name", err))
			}
			return err
		}
		return errConflict // it is ours now: look again
	}
	if v == nil {
		v = s.judge(ctx, k, f.Spec, false)
		defer func() { v.over(nil) }()
	}
	var refused *Refusal
	switch {
	case v.of != specHash(f.Spec):
		return errOtherSpec
	case errors.As(v.err, &refused):
		return refuse(refused.Reason, refused)
	case v.err != nil:
		return v.err
	}
	d.SizeBytes = v.bytes
	if e != nil {
		// Bytes that are known under the same digest are the same module.
		for _, r := range e.revs {
			if r.Artifact == artifact && r.ModuleDigest != "" {
				d.ModuleDigest, d.MemoryMinPages = r.ModuleDigest, r.MemoryMinPages
			}
		}
	}
	made, err := s.commitRevision(ctx, newRevision{
		// What the annotations of an object without an entry say was said of
		// another: a copy of a manifest takes them along.
		key: k, entry: e, object: f, claim: claim, data: d, settings: settings, started: started,
		spec: func(string) v1alpha1.FunctionSpec { return f.Spec },
	})
	if err != nil {
		switch {
		case errors.Is(err, function.ErrTaken):
			return refuse(ReasonNameTaken, err)
		case errors.Is(err, function.ErrHostTaken):
			return refuse(ReasonHostTaken, err)
		}
		return err
	}
	v.over(&made.fn)
	s.audit("apply", "accepted", "", k, f.Spec.Image, &made.fn.Revision)
	if f, err = s.getFunction(ctx, k); err != nil || f == nil {
		return err
	}
	rec, _ = readRecord(f.Annotations)
	err = s.writeStatus(ctx, f, s.statusOf(f, rec, f.Status.Nodes, nil))
	if errors.Is(err, errConflict) {
		return nil // a node was faster, and wrote the same
	}
	return err
}

// secretValues reads the values of an environment's secret variables. A Secret
// or key that is missing is a *function.ValidationError.
func (s *Store) secretValues(ctx context.Context, k key, env []v1alpha1.EnvVar) (map[string]string, error) {
	values := map[string]string{}
	read := map[string]*corev1.Secret{}
	for _, v := range env {
		ref := v.SecretKeyRef
		if ref == nil {
			continue
		}
		secret := read[ref.Name]
		if secret == nil {
			c, cancel := call(ctx)
			var err error
			secret, err = s.kube.CoreV1().Secrets(k.Namespace).Get(c, ref.Name, metav1.GetOptions{})
			cancel()
			if apierrors.IsNotFound(err) {
				return nil, &function.ValidationError{Field: "env." + v.Name, Reason: fmt.Sprintf("names the Secret %s, which does not exist in namespace %s", ref.Name, k.Namespace)}
			}
			if err != nil {
				return nil, storeError("read the secrets of "+k.String(), err)
			}
			read[ref.Name] = secret
		}
		value, ok := secret.Data[ref.Key]
		if !ok {
			return nil, &function.ValidationError{Field: "env." + v.Name, Reason: fmt.Sprintf("names the key %s, which Secret %s does not have", ref.Key, ref.Name)}
		}
		values[v.Name] = string(value)
	}
	return values, nil
}

// Collect deletes what is left over: revisions and secrets that no function
// lists and no change is about to, idempotency keys that expired, claims of
// functions that are gone, and the word of nodes that are gone. It goes on
// after errors and returns them all.
func (s *Store) Collect(ctx context.Context) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	return errors.Join(s.collectRevisions(ctx), s.collectRequests(ctx), s.collectHosts(ctx), s.collectNodes(ctx))
}

func (s *Store) collectRevisions(ctx context.Context) error {
	var errs []error
	inUse := map[key]bool{} // Secrets
	options := metav1.ListOptions{LabelSelector: labelFunction, Limit: collectPage}
	for {
		list, err := s.kube.AppsV1().ControllerRevisions("").List(ctx, options)
		if err != nil {
			return storeError("list revisions", err)
		}
		for i := range list.Items {
			cr := &list.Items[i]
			d, err := readRevision(cr)
			if err != nil {
				continue
			}
			use, f, err := s.listed(ctx, cr.ObjectMeta)
			if err != nil {
				return err
			}
			if use || time.Since(cr.CreationTimestamp.Time) < orphanGrace {
				if d.ValuesIn != "" {
					inUse[key{Namespace: cr.Namespace, Name: d.ValuesIn}] = true
				}
				if use && metav1.GetControllerOf(cr) == nil {
					s.ownLater(ctx, f, cr.Name, d.ValuesIn)
				}
				continue
			}
			c, cancel := call(ctx)
			err = s.kube.AppsV1().ControllerRevisions(cr.Namespace).Delete(c, cr.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &cr.UID}})
			cancel()
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				errs = append(errs, storeError("delete revision "+cr.Name, err))
			}
		}
		if options.Continue = list.Continue; options.Continue == "" {
			break
		}
	}
	options = metav1.ListOptions{LabelSelector: labelFunction, Limit: collectPage}
	for {
		list, err := s.kube.CoreV1().Secrets("").List(ctx, options)
		if err != nil {
			return storeError("list secrets", err)
		}
		for i := range list.Items {
			o := &list.Items[i]
			if inUse[key{Namespace: o.Namespace, Name: o.Name}] || time.Since(o.CreationTimestamp.Time) < orphanGrace {
				continue
			}
			c, cancel := call(ctx)
			err := s.kube.CoreV1().Secrets(o.Namespace).Delete(c, o.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &o.UID}})
			cancel()
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				errs = append(errs, storeError("delete secret "+o.Name, err))
			}
		}
		if options.Continue = list.Continue; options.Continue == "" {
			break
		}
	}
	return errors.Join(errs...)
}

// listed says whether a function lists the revision. Memory says yes without
// asking; a no must be the API server's.
func (s *Store) listed(ctx context.Context, cr metav1.ObjectMeta) (bool, *kube.Function, error) {
	k := key{Namespace: cr.Namespace, Name: cr.Labels[labelFunction]}
	lists := func(f *kube.Function) bool {
		if f == nil {
			return false
		}
		rec, _ := readRecord(f.Annotations)
		return slices.ContainsFunc(rec.revisions, func(r revisionRef) bool { return k.Name+"-"+r.suffix == cr.Name })
	}
	s.mem.mu.RLock()
	f := s.mem.functions.rows[k].value
	s.mem.mu.RUnlock()
	if lists(f) {
		return true, f, nil
	}
	if time.Since(cr.CreationTimestamp.Time) < orphanGrace {
		return false, nil, nil
	}
	f, err := s.getFunction(ctx, k)
	return lists(f), f, err
}

func (s *Store) ownLater(ctx context.Context, f *kube.Function, name, secret string) {
	patch := fmt.Appendf(nil, `{"metadata":{"ownerReferences":[{"apiVersion":%q,"kind":%q,"name":%q,"uid":%q,"controller":true}]}}`,
		v1alpha1.APIVersion, kube.FunctionKind, f.Name, string(f.UID))
	c, cancel := call(ctx)
	defer cancel()
	_, err := s.kube.AppsV1().ControllerRevisions(f.Namespace).Patch(c, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err == nil && secret != "" {
		_, err = s.kube.CoreV1().Secrets(f.Namespace).Patch(c, secret, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	}
	if err != nil {
		s.log.Info("a function does not own its revision yet", "namespace", f.Namespace, "function", f.Name, "err", err)
	}
}

func (s *Store) collectRequests(ctx context.Context) error {
	var errs []error
	options := metav1.ListOptions{LabelSelector: labelRequest + "=true", Limit: collectPage}
	for {
		list, err := s.kube.CoreV1().ConfigMaps(s.o.Namespace).List(ctx, options)
		if err != nil {
			return storeError("list idempotency keys", err)
		}
		for i := range list.Items {
			o := &list.Items[i]
			r, err := parseRequest(o)
			if err == nil && s.o.Now().Sub(r.At) < function.IdempotencyExpiry {
				continue
			}
			c, cancel := call(ctx)
			err = s.kube.CoreV1().ConfigMaps(s.o.Namespace).Delete(c, o.Name, metav1.DeleteOptions{
				Preconditions: &metav1.Preconditions{ResourceVersion: &o.ResourceVersion},
			})
			cancel()
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				errs = append(errs, storeError("forget a request", err))
			}
		}
		if options.Continue = list.Continue; options.Continue == "" {
			break
		}
	}
	// Leases of processes that ended without releasing them.
	leases, err := s.kube.CoordinationV1().Leases(s.o.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labelRequest + "=holder"})
	if err != nil {
		return errors.Join(append(errs, storeError("list leases", err))...)
	}
	for _, l := range leases.Items {
		if l.Spec.RenewTime == nil || time.Since(l.Spec.RenewTime.Time) < orphanGrace {
			continue
		}
		c, cancel := call(ctx)
		err := s.kube.CoordinationV1().Leases(s.o.Namespace).Delete(c, l.Name, metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{ResourceVersion: &l.ResourceVersion},
		})
		cancel()
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, storeError("delete a lease", err))
		}
	}
	return errors.Join(errs...)
}

// collectHosts asks the API server only about claims that may be at their end:
// released names are kept long, and there may be thousands.
func (s *Store) collectHosts(ctx context.Context) error {
	now := s.o.Now()
	s.mem.mu.RLock()
	names := make([]string, 0, len(s.mem.hosts.rows))
	for k, r := range s.mem.hosts.rows {
		owner := s.mem.functions.rows[key{Namespace: r.value.Namespace, Name: r.value.Function}].value
		if released := r.value.ReleasedAt; owner == nil && released != nil && !strings.Contains(k.Name, ".") && now.Sub(*released) < retiredFor {
			continue
		}
		if owner == nil || strings.Contains(k.Name, ".") && owner.Spec.Host != k.Name {
			names = append(names, k.Name)
		}
	}
	s.mem.mu.RUnlock()
	var errs []error
	for _, name := range names {
		if err := s.collectHost(ctx, name); err != nil && !errors.Is(err, errConflict) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Store) collectHost(ctx context.Context, name string) error {
	claim, err := s.getHost(ctx, name)
	if err != nil || claim == nil || inGrace(claim) {
		return err
	}
	now := s.o.Now().UTC()
	if strings.Contains(name, ".") {
		if used, err := s.hostUsed(ctx, claim); err != nil || used {
			return err
		}
	} else {
		f, err := s.getFunction(ctx, key{Namespace: claim.Spec.Namespace, Name: name})
		if err != nil || f != nil {
			return err
		}
		if claim.Spec.ReleasedAt == nil {
			// Deleted by other means than a Store.
			spec := claim.Spec
			spec.ReleasedAt = &now
			if err := s.putHost(ctx, claim, name, spec); err != nil {
				return err
			}
			s.audit("delete", "accepted", "", key{Namespace: spec.Namespace, Name: name}, "", nil)
			return nil
		}
		if now.Sub(*claim.Spec.ReleasedAt) < retiredFor {
			return nil
		}
	}
	c, cancel := call(ctx)
	defer cancel()
	err = s.api.Delete().Resource(v1alpha1.HostsResource).Name(name).Body(&metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &claim.UID, ResourceVersion: &claim.ResourceVersion},
	}).Do(c).Error()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return storeError("release the name "+name, err)
	}
	return nil
}

// collectNodes drops what nodes said that are gone, and counts anew how many
// nodes should have each function. What is no node of the cluster but reports
// (NodeSpin, NodeIngress) is left to whoever reports it.
func (s *Store) collectNodes(ctx context.Context) error {
	type part struct {
		k    key
		node string
	}
	var gone []part
	var resident []*entry
	s.mem.mu.RLock()
	for _, e := range s.mem.entries {
		if !e.spin {
			resident = append(resident, e)
		}
		for _, n := range e.object.Status.Nodes {
			if _, there := s.mem.nodes.rows[key{Name: n.Name}]; !there && n.Name != NodeIngress && n.Name != NodeSpin {
				gone = append(gone, part{e.key, n.Name})
			}
		}
	}
	s.mem.mu.RUnlock()
	var errs []error
	for _, p := range gone {
		errs = append(errs, s.writeNode(ctx, p.k, p.node, func(record, *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase) { return nil, nil }))
	}
	for _, e := range resident {
		s.mem.mu.RLock()
		f := s.mem.functions.rows[e.key].value
		s.mem.mu.RUnlock()
		if f == nil || f.UID != e.object.UID {
			continue
		}
		rec, ok := readRecord(f.Annotations)
		if !ok {
			continue
		}
		if st := s.statusOf(f, rec, f.Status.Nodes, nil); st.Warm != f.Status.Warm {
			if err := s.writeStatus(ctx, f, st); err != nil && !errors.Is(err, errConflict) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
