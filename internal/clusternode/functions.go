package clusternode

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/prefetch"
)

const (
	// functionsPause is between attempts to hear of functions; an API server
	// that is away costs one request each.
	functionsPause = 5 * time.Second
	// expiredPause is the same when the API server only wants a new list.
	expiredPause = 200 * time.Millisecond
	// resourceMissingPause is the same while the cluster does not know the
	// kind: installing it is a person's work.
	resourceMissingPause = 30 * time.Second
)

// functionSource makes the cluster's resident functions what this node's
// engine should serve. It follows the custom resource; what the API server
// said last counts on while it does not answer.
//
// A function with secrets is served without them being readable here: the
// agent of a node may read no tenant's Secret. Such functions are left out
// until somebody with that right places them.
type functionSource struct {
	functions *kube.Functions
	log       *slog.Logger

	mu      sync.Mutex
	objects map[string]*kube.Function // by namespace/name
	synced  bool
	err     error
	gen     uint64
	changed chan struct{} // closed and replaced at every change
}

var _ prefetch.Source = (*functionSource)(nil)

func newFunctionSource(functions *kube.Functions, log *slog.Logger) *functionSource {
	return &functionSource{functions: functions, log: log, objects: map[string]*kube.Function{}, changed: make(chan struct{})}
}

// Run follows the functions until ctx ends.
func (s *functionSource) Run(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.follow(ctx)
		pause := functionsPause
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, kube.ErrExpired):
			pause = expiredPause
		case apierrors.IsNotFound(err):
			// No such kind: nobody can have made a function.
			s.replace(nil)
			pause = resourceMissingPause
		default:
			s.fail(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow lists and watches until something ends it; its error is never nil.
func (s *functionSource) follow(ctx context.Context) error {
	list, err := s.functions.List(ctx, "")
	if err != nil {
		return err
	}
	s.replace(list.Items)
	version := list.ResourceVersion
	for {
		err := s.functions.Watch(ctx, "", version, func(e kube.Event) error {
			version = e.ResourceVersion
			if e.Function != nil {
				s.put(e.Type, e.Function)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

func (s *functionSource) replace(items []kube.Function) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects = make(map[string]*kube.Function, len(items))
	for i := range items {
		s.objects[items[i].Namespace+"/"+items[i].Name] = &items[i]
	}
	s.changeLocked(nil)
}

func (s *functionSource) put(kind watch.EventType, f *kube.Function) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := f.Namespace + "/" + f.Name
	if kind == watch.Deleted {
		delete(s.objects, key)
	} else {
		if old := s.objects[key]; old != nil && old.Generation == f.Generation && old.UID == f.UID {
			s.objects[key] = f
			return // only its status or labels changed
		}
		s.objects[key] = f
	}
	s.changeLocked(nil)
}

func (s *functionSource) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changeLocked(err)
}

// changeLocked counts generations from the clock, so that those of an agent
// before this one are older.
func (s *functionSource) changeLocked(err error) {
	if s.err = err; err == nil {
		s.synced = true
		s.gen = max(s.gen+1, uint64(time.Now().UnixMilli()))
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// Desired implements prefetch.Source.
func (s *functionSource) Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error) {
	for {
		s.mu.Lock()
		synced, err, gen, changed := s.synced, s.err, s.gen, s.changed
		if err != nil {
			// Before what is known: an answer from memory would look as if
			// the API server were back, at every other question.
			s.mu.Unlock()
			return v1alpha1.Desired{}, err
		}
		if synced && gen != after {
			d := s.desiredLocked()
			s.mu.Unlock()
			return d, nil
		}
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			if synced {
				return v1alpha1.Desired{Generation: after}, nil
			}
			return v1alpha1.Desired{}, errors.New("the API server has not said yet which functions there are")
		case <-changed:
		}
	}
}

func (s *functionSource) desiredLocked() v1alpha1.Desired {
	// The oldest of a name has it: hosts are first come, first served.
	all := make([]*kube.Function, 0, len(s.objects))
	for _, f := range s.objects {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *kube.Function) int {
		return cmp.Or(a.CreationTimestamp.Time.Compare(b.CreationTimestamp.Time), cmp.Compare(a.UID, b.UID))
	})
	d := v1alpha1.Desired{Generation: s.gen, Functions: []v1alpha1.DesiredFunction{}}
	taken := map[string]string{}
	for _, f := range all {
		if f.Spec.Runtime != "" && f.Spec.Runtime != v1alpha1.RuntimeResident || f.DeletionTimestamp != nil {
			continue
		}
		if owner, ok := taken[f.Name]; ok {
			s.log.Warn("a function is left out: its name is taken", "namespace", f.Namespace, "function", f.Name, "by", owner)
			continue
		}
		desired, err := desiredFunction(f)
		if err != nil {
			s.log.Warn("a function is left out", "namespace", f.Namespace, "function", f.Name, "err", err)
			continue
		}
		taken[f.Name] = f.Namespace
		d.Functions = append(d.Functions, desired)
	}
	slices.SortFunc(d.Functions, func(a, b v1alpha1.DesiredFunction) int { return strings.Compare(a.Name, b.Name) })
	return d
}

// desiredFunction puts a function of the cluster into the engine's terms. Its
// tenant is its namespace.
func desiredFunction(f *kube.Function) (v1alpha1.DesiredFunction, error) {
	ref, err := name.NewDigest(stripTag(f.Spec.Image))
	if err != nil {
		return v1alpha1.DesiredFunction{}, fmt.Errorf("its image %q is not a reference by digest: %w", f.Spec.Image, err)
	}
	revision := v1alpha1.DesiredRevision{
		// Generations of the object are revisions of its spec.
		Revision: int(f.Generation),
		Artifact: v1alpha1.Artifact{
			Registry: ref.RegistryStr(), Repository: ref.RepositoryStr(), Digest: ref.DigestStr(),
		},
		MemoryMiB: v1alpha1.DefaultMemoryMiB, TimeoutMS: v1alpha1.DefaultTimeoutMS, Concurrency: v1alpha1.DefaultConcurrency,
	}
	if l := f.Spec.Limits; l != nil {
		revision.MemoryMiB = cmp.Or(l.MemoryMiB, revision.MemoryMiB)
		revision.TimeoutMS = cmp.Or(l.TimeoutMS, revision.TimeoutMS)
		revision.Concurrency = cmp.Or(l.Concurrency, revision.Concurrency)
	}
	for _, e := range f.Spec.Env {
		if e.SecretKeyRef != nil {
			return v1alpha1.DesiredFunction{}, fmt.Errorf("its variable %s is a secret, which this agent may not read", e.Name)
		}
		if revision.Env == nil {
			revision.Env = map[string]string{}
		}
		revision.Env[e.Name] = e.Value
	}
	return v1alpha1.DesiredFunction{Name: f.Name, Tenant: f.Namespace, Candidates: []v1alpha1.DesiredRevision{revision}}, nil
}

// stripTag takes the tag out of name:tag@digest; the digest says it all.
func stripTag(image string) string {
	name, digest, ok := strings.Cut(image, "@")
	if !ok {
		return image
	}
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		name = name[:colon]
	}
	return name + "@" + digest
}
