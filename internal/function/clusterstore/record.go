package clusterstore

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

// What is written on objects, beside their own members.
const (
	// AnnotationRevision is the number of the wanted revision.
	AnnotationRevision = v1alpha1.Group + "/revision"
	// AnnotationRevisionOf is the hash of the spec that it was recorded for. A
	// spec with another was written by somebody else and is not recorded yet.
	AnnotationRevisionOf = v1alpha1.Group + "/revision-of"
	// annotationRevisions lists the revisions that are kept, oldest first, as
	// the ends "<number>-<hash>" of their ControllerRevisions' names. One that
	// is not listed was never committed, or is forgotten.
	annotationRevisions = v1alpha1.Group + "/revisions"
	// annotationChanges counts changes of what is wanted.
	annotationChanges = v1alpha1.Group + "/changes"
	// annotationUpdatedAt is the time of the last one.
	annotationUpdatedAt = v1alpha1.Group + "/updated-at"
	// annotationRequests lists the last changes that were made under an
	// idempotency key: "<hash of the key>:<revision>", with ":created" where
	// the change made the function.
	annotationRequests = v1alpha1.Group + "/requests"
	// annotationRecord is "<number>:<milliseconds>": how long it took to write
	// that revision, up to its commit.
	annotationRecord = v1alpha1.Group + "/record-ms"

	// labelFunction is on everything that belongs to one function: its name.
	labelFunction = v1alpha1.Group + "/function"

	// maxRequests bounds annotationRequests. A change is forgotten there after
	// so many later ones; by then its answer is stored, unless the process that
	// made it died.
	maxRequests = 32
)

// change is a line of annotationRequests.
type change struct {
	key      string
	revision int
	created  bool
}

// record is what the annotations of a Function say.
type record struct {
	wanted    int
	of        string
	revisions []revisionRef // ascending
	changes   uint64
	updatedAt time.Time
	requests  []change // oldest first
	recordMS  float64  // of the wanted revision; 0: not known
	recordOf  int
}

// revisionRef names a ControllerRevision.
type revisionRef struct {
	number int
	suffix string // "<number>-<hash>"
}

func (r record) newest() int {
	if len(r.revisions) == 0 {
		return 0
	}
	return r.revisions[len(r.revisions)-1].number
}

func (r record) has(number int) bool {
	return slices.ContainsFunc(r.revisions, func(v revisionRef) bool { return v.number == number })
}

func (r record) request(key string) (change, bool) {
	i := slices.IndexFunc(r.requests, func(c change) bool { return c.key == key })
	if key == "" || i < 0 {
		return change{}, false
	}
	return r.requests[i], true
}

// readRecord reads annotations; ok is false when they record no revision, or
// were written by a hand that did not know what they mean.
func readRecord(annotations map[string]string) (r record, ok bool) {
	var err error
	if r.wanted, err = strconv.Atoi(annotations[AnnotationRevision]); err != nil || r.wanted < 1 {
		return record{}, false
	}
	r.of = annotations[AnnotationRevisionOf]
	for _, suffix := range strings.Fields(annotations[annotationRevisions]) {
		digits, hash, _ := strings.Cut(suffix, "-")
		n, err := strconv.Atoi(digits)
		if err != nil || n <= r.newest() || hash == "" || len(r.revisions) >= 2*function.MaxRevisions {
			return record{}, false
		}
		r.revisions = append(r.revisions, revisionRef{n, suffix})
	}
	if !r.has(r.wanted) {
		return record{}, false
	}
	r.changes, _ = strconv.ParseUint(annotations[annotationChanges], 10, 64)
	r.updatedAt, _ = time.Parse(time.RFC3339Nano, annotations[annotationUpdatedAt])
	for _, line := range strings.Fields(annotations[annotationRequests]) {
		parts := strings.Split(line, ":")
		if len(parts) < 2 || len(r.requests) >= maxRequests {
			continue
		}
		n, _ := strconv.Atoi(parts[1])
		r.requests = append(r.requests, change{parts[0], n, len(parts) > 2})
	}
	if number, ms, found := strings.Cut(annotations[annotationRecord], ":"); found {
		r.recordOf, _ = strconv.Atoi(number)
		r.recordMS, _ = strconv.ParseFloat(ms, 64)
	}
	return r, true
}

// write puts the record into annotations.
func (r record) write(annotations map[string]string) {
	annotations[AnnotationRevision] = strconv.Itoa(r.wanted)
	annotations[AnnotationRevisionOf] = r.of
	suffixes := make([]string, len(r.revisions))
	for i, v := range r.revisions {
		suffixes[i] = v.suffix
	}
	annotations[annotationRevisions] = strings.Join(suffixes, " ")
	annotations[annotationChanges] = strconv.FormatUint(r.changes, 10)
	annotations[annotationUpdatedAt] = r.updatedAt.Format(time.RFC3339Nano)
	delete(annotations, annotationRequests)
	if len(r.requests) > 0 {
		lines := make([]string, len(r.requests))
		for i, c := range r.requests {
			lines[i] = c.key + ":" + strconv.Itoa(c.revision)
			if c.created {
				lines[i] += ":created"
			}
		}
		annotations[annotationRequests] = strings.Join(lines, " ")
	}
	delete(annotations, annotationRecord)
	if r.recordOf != 0 {
		annotations[annotationRecord] = fmt.Sprintf("%d:%.3f", r.recordOf, r.recordMS)
	}
}

// prune forgets the oldest revisions beyond function.MaxRevisions, but none
// of those in use.
func (r *record) prune(inUse ...int) {
	for i := 0; len(r.revisions) > function.MaxRevisions && i < len(r.revisions); {
		if n := r.revisions[i].number; n == r.wanted || slices.Contains(inUse, n) {
			i++
			continue
		}
		r.revisions = slices.Delete(r.revisions, i, i+1)
	}
}

func (r *record) remember(c change) {
	if c.key == "" {
		return
	}
	r.requests = append(r.requests, c)
	if n := len(r.requests) - maxRequests; n > 0 {
		r.requests = slices.Delete(r.requests, 0, n)
	}
}

// revisionData is what a ControllerRevision holds: a revision's immutable
// part. The values of secrets are in the Secret.
type revisionData struct {
	Number         int                   `json:"number"`
	ModuleDigest   string                `json:"moduleDigest,omitempty"`
	SizeBytes      int64                 `json:"sizeBytes,omitempty"`
	MemoryMinPages uint32                `json:"memoryMinPages,omitempty"`
	Artifact       v1alpha1.Artifact     `json:"artifact"`
	Spec           v1alpha1.FunctionSpec `json:"spec"`
	// ValuesIn names the Secret with the values of the spec's secret variables;
	// its keys are the variables' names.
	ValuesIn  string           `json:"valuesIn,omitempty"`
	CreatedAt time.Time        `json:"createdAt"`
	Phases    []v1alpha1.Phase `json:"phases,omitempty"`
}

// pinned is the spec with its secret variables taken from the values that were
// copied for the revision: the Secret that somebody who applied it named may have
// others by now, or be gone.
func (d revisionData) pinned() v1alpha1.FunctionSpec {
	spec := d.Spec
	if d.ValuesIn == "" {
		return spec
	}
	spec.Env = slices.Clone(spec.Env)
	for i := range spec.Env {
		if spec.Env[i].SecretKeyRef != nil {
			spec.Env[i].SecretKeyRef = &v1alpha1.SecretKeyRef{Name: d.ValuesIn, Key: spec.Env[i].Name}
		}
	}
	return spec
}

// settings are those of the revision, given the values of its secrets.
func (d revisionData) settings(secrets map[string]string) function.Settings {
	s := function.Settings{
		MemoryMiB: v1alpha1.DefaultMemoryMiB, TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency,
		Host: d.Spec.Host, Routes: d.Spec.Routes, Placement: d.Spec.Placement, Autoscaling: d.Spec.Autoscaling,
	}
	if l := d.Spec.Limits; l != nil {
		s.MemoryMiB = cmp.Or(l.MemoryMiB, s.MemoryMiB)
		s.TimeoutMS = cmp.Or(l.TimeoutMS, s.TimeoutMS)
		s.Concurrency = cmp.Or(l.Concurrency, s.Concurrency)
	}
	if d.Spec.Runtime == v1alpha1.RuntimeSpin {
		s.Runtime = v1alpha1.RuntimeSpin
	}
	for _, e := range d.Spec.Env {
		if e.SecretKeyRef != nil {
			if s.Secrets == nil {
				s.Secrets = function.Secrets{}
			}
			s.Secrets[e.Name] = secrets[e.Name]
			continue
		}
		if s.Env == nil {
			s.Env = map[string]string{}
		}
		s.Env[e.Name] = e.Value
	}
	return s
}

// specOf writes settings as a Function's spec. secret names the Secret that
// has the values of the secret ones.
func specOf(a v1alpha1.Artifact, s function.Settings, secret string) v1alpha1.FunctionSpec {
	spec := v1alpha1.FunctionSpec{
		Image:   a.Registry + "/" + a.Repository + "@" + a.Digest,
		Runtime: v1alpha1.RuntimeResident,
		Host:    s.Host, Routes: s.Routes,
		Limits:    &v1alpha1.FunctionLimits{MemoryMiB: s.MemoryMiB, TimeoutMS: s.TimeoutMS, Concurrency: s.Concurrency},
		Placement: s.Placement, Autoscaling: s.Autoscaling,
	}
	if s.Spin() {
		spec.Runtime = v1alpha1.RuntimeSpin
	}
	for _, name := range slices.Sorted(maps.Keys(s.Env)) {
		spec.Env = append(spec.Env, v1alpha1.EnvVar{Name: name, Value: s.Env[name]})
	}
	for _, name := range s.Secrets.Names() {
		spec.Env = append(spec.Env, v1alpha1.EnvVar{Name: name, SecretKeyRef: &v1alpha1.SecretKeyRef{Name: secret, Key: name}})
	}
	return spec
}

// specHash identifies a spec, whoever wrote its defaults out and in whatever
// order its variables stand.
func specHash(spec v1alpha1.FunctionSpec) string {
	limits := v1alpha1.FunctionLimits{MemoryMiB: v1alpha1.DefaultMemoryMiB, TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency}
	if l := spec.Limits; l != nil {
		limits.MemoryMiB = cmp.Or(l.MemoryMiB, limits.MemoryMiB)
		limits.TimeoutMS = cmp.Or(l.TimeoutMS, limits.TimeoutMS)
		limits.Concurrency = cmp.Or(l.Concurrency, limits.Concurrency)
	}
	spec.Limits = &limits
	spec.Runtime = cmp.Or(spec.Runtime, v1alpha1.RuntimeResident)
	spec.Env = slices.Clone(spec.Env)
	slices.SortFunc(spec.Env, func(a, b v1alpha1.EnvVar) int { return strings.Compare(a.Name, b.Name) })
	if p := spec.Placement; p != nil && len(p.NodeSelector) == 0 {
		spec.Placement = nil
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return "" // strings, numbers and maps of strings: cannot happen
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:16])
}

// artifactOf reads an image by digest, as the schema admits it. A tag before
// the digest means nothing.
func artifactOf(image string) (v1alpha1.Artifact, error) {
	name, digest, ok := strings.Cut(image, "@")
	registry, repository, hasPath := strings.Cut(name, "/")
	if !ok || !hasPath || !strings.HasPrefix(digest, "sha256:") {
		return v1alpha1.Artifact{}, &function.ValidationError{Field: "image", Reason: "must be registry/repository@sha256:<digest>"}
	}
	repository, _, _ = strings.Cut(repository, ":")
	return v1alpha1.Artifact{Registry: registry, Repository: repository, Digest: digest}, nil
}

// token is n random bytes in hexadecimal.
func token(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// newControllerRevision writes a revision down under a name that is used only
// once, whatever becomes of the attempt.
func newControllerRevision(namespace, name string, d revisionData, owner *kube.Function) (*appsv1.ControllerRevision, revisionRef, error) {
	data, err := json.Marshal(d)
	if err != nil {
		return nil, revisionRef{}, fmt.Errorf("encode revision %d of %s: %w", d.Number, name, err)
	}
	sum := sha256.Sum256(append([]byte(token(8)), data...))
	ref := revisionRef{d.Number, fmt.Sprintf("%d-%x", d.Number, sum[:5])}
	return &appsv1.ControllerRevision{
		ObjectMeta: belonging(namespace, name, name+"-"+ref.suffix, owner),
		Data:       runtime.RawExtension{Raw: data},
		Revision:   int64(d.Number),
	}, ref, nil
}

func newSecret(namespace, name string, values map[string]string, owner *kube.Function) *corev1.Secret {
	immutable := true
	s := &corev1.Secret{
		// The name says nothing of the values: a hash of them would let who may
		// read functions, but not secrets, try out guesses.
		ObjectMeta: belonging(namespace, name, name+"-"+token(5), owner),
		Immutable:  &immutable,
		Type:       corev1.SecretTypeOpaque,
		Data:       map[string][]byte{},
	}
	for k, v := range values {
		s.Data[k] = []byte(v)
	}
	return s
}

func belonging(namespace, function, name string, owner *kube.Function) metav1.ObjectMeta {
	m := metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{labelFunction: function}}
	if owner != nil {
		m.OwnerReferences = []metav1.OwnerReference{ownerReference(owner)}
	}
	return m
}

func ownerReference(f *kube.Function) metav1.OwnerReference {
	controller := true
	return metav1.OwnerReference{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind, Name: f.Name, UID: f.UID, Controller: &controller}
}

func readRevision(cr *appsv1.ControllerRevision) (revisionData, error) {
	var d revisionData
	if err := json.Unmarshal(cr.Data.Raw, &d); err != nil {
		return d, fmt.Errorf("read ControllerRevision %s/%s: %w", cr.Namespace, cr.Name, err)
	}
	if d.Number < 1 || int64(d.Number) != cr.Revision {
		return d, errors.New("read ControllerRevision " + cr.Namespace + "/" + cr.Name + ": its number is not its revision")
	}
	return d, nil
}
