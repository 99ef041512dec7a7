// Package clusterstore keeps functions as objects of a Kubernetes API server.
// It is function.Store for a cluster: what package function's database file is
// for one machine.
//
// It owns how a function is written down: the Function object (what is wanted,
// and the list of its revisions), one ControllerRevision per revision, a Secret
// per set of secret values, Host objects as claims of names, ConfigMaps for
// idempotency keys and a Lease per process. It has no state of its own that
// another process would need: any number of stores on one API server are one.
// It makes no pods, Services or Ingresses (internal/deploy), authorizes nobody
// (internal/access), and never logs the value of a secret.
//
// A change is committed by one write of the Function object, conditional on the
// resource version it was decided on. Everything that the commit refers to is
// written before it under names that nothing refers to yet; what a process that
// died left behind is found and deleted by Collect.
package clusterstore

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	// DefaultLeaseDuration is how long a process that stopped renewing its
	// Lease is still thought to work on the requests it holds.
	DefaultLeaseDuration = 30 * time.Second
	// syncTimeout bounds the first reading of everything.
	syncTimeout = 60 * time.Second
	// An API replica serves many tenants at once; the API server's own priority
	// and fairness is what bounds it.
	clientQPS   = 200
	clientBurst = 400

	// fieldManager is who the API server remembers as the writer.
	fieldManager = "hearth-api"
	// engineService is the Service whose endpoints are the nodes' gateways.
	engineService = "hearth-engine"
	gatewayPort   = 8080
)

// Options of a Store.
type Options struct {
	// Config reaches the API server. Its rate limits are replaced when unset.
	Config *rest.Config
	// Namespace is Hearth's own: idempotency keys, Leases and the engine's
	// Service are there.
	Namespace string
	// Instance names this process among all that share the API server; a DNS
	// label, such as the pod's name. It must never be used by two at once; one
	// after the other, as by a container that is started again, is fine.
	Instance string
	// Host is the DNS name that a function has by itself; nil or an empty
	// answer: status.url is left out.
	Host func(namespace, name string) string
	// BaseDomain is the domain below which functions have their own names; nil
	// or empty: there is none.
	BaseDomain func() string
	// LeaseDuration is DefaultLeaseDuration when 0.
	LeaseDuration time.Duration
	// Now is the clock of what is recorded; nil means time.Now.
	Now func() time.Time
	// Admission decides about specs that somebody wrote by other means than a
	// Store; nil: all that are valid become revisions.
	Admission Admission
	// Audit gets a line for every change that somebody made by such means, as the
	// submit API's has for those that come its way; nil: none is written.
	Audit *slog.Logger
	// Logger gets what goes wrong without failing a call; nil discards it.
	Logger *slog.Logger
}

// Store is a function.Store in a cluster.
type Store struct {
	o    Options
	log  *slog.Logger
	api  *rest.RESTClient
	kube kubernetes.Interface
	meta metadata.Interface
	mem  *memory
	// holder is Instance in this life of it: what an earlier one held when it
	// died, nobody works on, although the Lease of that name is renewed.
	holder string

	writers  keyed // by function name
	statuses keyed // by function name; taken after writers
	stop     context.CancelFunc
	running  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	// held are the idempotency keys of requests in progress in this process,
	// by the hash that names their object.
	held map[string]*requestObject
	// told is what each node was told last.
	told map[string]v1alpha1.Desired
}

var _ function.Store = (*Store)(nil)

// New connects to the API server and reads everything once. Errors match
// function.ErrCRDMissing, function.ErrUnavailable or ctx's. The Store goes on
// until Close; ctx bounds only the start.
func New(ctx context.Context, o Options) (*Store, error) {
	if o.Config == nil || o.Namespace == "" || o.Instance == "" {
		return nil, errors.New("a cluster store needs Config, Namespace and Instance")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.LeaseDuration = cmp.Or(o.LeaseDuration, DefaultLeaseDuration)
	config := rest.CopyConfig(o.Config)
	if config.QPS == 0 {
		config.QPS, config.Burst = clientQPS, clientBurst
	}
	s := &Store{o: o, log: o.Logger, mem: newMemory(), holder: o.Instance + holderSeparator + rand.Text(), held: map[string]*requestObject{}, told: map[string]v1alpha1.Desired{}}
	var err error
	if s.api, err = kube.NewRESTClient(config); err != nil {
		return nil, err
	}
	if s.kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make the client of the function store: %w", err)
	}
	if s.meta, err = metadata.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("make the metadata client of the function store: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	if err := s.checkServed(ctx); err != nil {
		return nil, err
	}
	if err := s.renew(ctx); err != nil {
		return nil, err
	}
	background, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.running.Go(func() { s.keepLease(background) })
	if err := s.follow(ctx, background); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// checkServed asks for one object of each kind of ours.
func (s *Store) checkServed(ctx context.Context) error {
	for _, resource := range []string{v1alpha1.FunctionsResource, v1alpha1.HostsResource} {
		call, cancel := context.WithTimeout(ctx, kube.CallTimeout)
		err := s.api.Get().Resource(resource).VersionedParams(&metav1.ListOptions{Limit: 1}, metav1.ParameterCodec).Do(call).Error()
		cancel()
		if err != nil {
			return storeError("look for "+resource+"."+v1alpha1.Group, err)
		}
	}
	return nil
}

// Close ends all waits with function.ErrClosed and lets go of the keys that
// this process held. It does not wait for changes in progress; their callers
// hear how they end.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.mem.close()
	if s.stop != nil {
		s.stop()
	}
	s.running.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), kube.CallTimeout)
	defer cancel()
	// Without it others wait until it expires; that is all.
	if err := s.kube.CoordinationV1().Leases(s.o.Namespace).Delete(ctx, s.leaseName(s.o.Instance), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		s.log.Warn("the store's lease could not be released", "err", err)
	}
	return nil
}

func (s *Store) begin(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return function.ErrClosed
	}
	return ctx.Err()
}

// storeError puts what was being done and the typed cause in front of what the
// API server said.
func storeError(doing string, err error) error {
	if err == nil {
		return nil
	}
	var kind error
	var status apierrors.APIStatus
	switch {
	case errors.Is(err, context.Canceled):
	case errors.Is(err, function.ErrUnavailable), errors.Is(err, function.ErrTenantNotFound), errors.Is(err, function.ErrCRDMissing):
	case apierrors.IsNotFound(err) && notServed(err):
		return fmt.Errorf("%s: %w: install or upgrade the hearth chart, whose crds directory has functions.hearth.sh and hosts.hearth.sh: %w", doing, function.ErrCRDMissing, err)
	case apierrors.HasStatusCause(err, "NamespaceTerminating"), apierrors.IsNotFound(err) && kindOf(err) == "namespaces":
		kind = function.ErrTenantNotFound
	case errors.As(err, &status):
		switch code := status.Status().Code; {
		case code == http.StatusTooManyRequests, code >= 500:
			kind = function.ErrUnavailable
		}
	default:
		// No answer of the API server: a broken connection or a deadline.
		kind = function.ErrUnavailable
	}
	if kind == nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w: %w", doing, kind, err)
}

// notServed tells a missing resource from a missing object: only the latter
// has a name.
func notServed(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	d := status.Status().Details
	return d == nil || d.Name == "" || strings.Contains(status.Status().Message, "could not find the requested resource")
}

func kindOf(err error) string {
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Details != nil {
		return status.Status().Details.Kind
	}
	return ""
}

// call bounds one request.
func call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, kube.CallTimeout)
}

// keyed is one lock per name, for as long as somebody wants it.
type keyed struct {
	mu sync.Mutex
	m  map[string]*keyedLock
}

type keyedLock struct {
	ch    chan struct{}
	users int
}

// lock waits for the name's lock, or for ctx.
func (k *keyed) lock(ctx context.Context, name string) (unlock func(), err error) {
	k.mu.Lock()
	l := k.m[name]
	if k.m == nil {
		k.m = map[string]*keyedLock{}
	}
	if l == nil {
		l = &keyedLock{ch: make(chan struct{}, 1)}
		k.m[name] = l
	}
	l.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.m, name)
		}
	}
	select {
	case l.ch <- struct{}{}:
		return func() { <-l.ch; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
