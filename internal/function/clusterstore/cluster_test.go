package clusterstore_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/function/clusterstore"
	"github.com/hearth-sh/hearth/internal/kube"
)

func TestTwoStoresAreOne(t *testing.T) {
	fresh(t)
	a, b := open(t, nil), open(t, nil)
	ctx := t.Context()
	add(t, a, "hello", 1, nil)
	if v, err := b.Get(ctx, "hello"); err != nil || v.Wanted != 1 {
		t.Fatalf("a function that the other made a moment ago: %+v %v", v, err)
	}
	const writers = 10
	var wg sync.WaitGroup
	var mu sync.Mutex
	var numbers []int
	for i := range writers {
		s := []*clusterstore.Store{a, b}[i%2]
		wg.Go(func() {
			r, err := s.AddRevision(ctx, "hello", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
				nr := revision(1)
				nr.Settings = c.Revision.Settings
				nr.Settings.Env = map[string]string{fmt.Sprintf("V%d", i): "1"}
				for k, v := range c.Revision.Settings.Env {
					nr.Settings.Env[k] = v
				}
				return nr, nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			numbers = append(numbers, r.Function.Wanted)
			mu.Unlock()
		})
	}
	wg.Wait()
	slices.Sort(numbers)
	if want := []int{2, 3, 4, 5, 6, 7, 8, 9, 10, 11}; !slices.Equal(numbers, want) {
		t.Fatalf("numbers %v", numbers)
	}
	for _, s := range []*clusterstore.Store{a, b} {
		eventually(t, "both stores show all settings", func() bool {
			v, err := s.Get(ctx, "hello")
			return err == nil && v.Wanted == writers+1 && len(v.Revision.Settings.Env) == writers
		})
	}
	va, _ := a.Get(ctx, "hello")
	vb, _ := b.Get(ctx, "hello")
	if diff := cmp.Diff(va, vb); diff != "" {
		t.Error("the stores differ", diff)
	}
	ra, _ := a.Revisions(ctx, "hello")
	if len(ra) != writers+1 {
		t.Errorf("%d revisions", len(ra))
	}
	// A name is whoever's came first, whichever store was asked.
	results := make(chan error, 2)
	for i, tenant := range []string{"ann", "bob"} {
		s := []*clusterstore.Store{a, b}[i]
		go func() {
			_, err := s.AddRevision(ctx, "race", function.Change{Tenant: tenant}, constant(revision(1)))
			results <- err
		}()
	}
	first, second := <-results, <-results
	if (first == nil) == (second == nil) || !errors.Is(errors.Join(first, second), function.ErrTaken) {
		t.Errorf("two tenants, one name: %v and %v", first, second)
	}
}

// mortal is a process's way to the API server, which ends after so many
// requests: the last one reaches the server, its answer nobody.
type mortal struct {
	next  http.RoundTripper
	armed atomic.Bool
	left  atomic.Int64
	dead  atomic.Bool
}

func (m *mortal) RoundTrip(r *http.Request) (*http.Response, error) {
	if !m.armed.Load() || r.URL.Query().Get("watch") != "" {
		return m.next.RoundTrip(r)
	}
	if m.dead.Load() {
		return nil, errors.New("dead")
	}
	if m.left.Add(-1) > 0 {
		return m.next.RoundTrip(r)
	}
	m.dead.Store(true)
	answer, err := m.next.RoundTrip(r)
	if err == nil {
		_ = answer.Body.Close()
	}
	return nil, errors.New("died before the answer")
}

func TestAProcessThatDiesInTheMiddleLosesAndDoublesNothing(t *testing.T) {
	fresh(t)
	healthy := open(t, nil)
	ctx := t.Context()
	content := func(name string) function.NewRevision {
		nr := revision(7)
		nr.Settings.Secrets = function.Secrets{"TOKEN": "s3cret"}
		nr.Settings.Host = name + ".example.com"
		return nr
	}
	for kind, do := range map[string]func(s function.Store, name, key string) error{
		"new": func(s function.Store, name, key string) error {
			_, err := s.AddRevision(ctx, name, function.Change{IdempotencyKey: key}, constant(content(name)))
			return err
		},
		"next": func(s function.Store, name, key string) error {
			_, err := s.AddRevision(ctx, name, function.Change{IdempotencyKey: key}, constant(content(name)))
			return err
		},
		"rollback": func(s function.Store, name, key string) error {
			_, err := s.Rollback(ctx, name, 1, function.Change{IdempotencyKey: key})
			return err
		},
		"delete": func(s function.Store, name, key string) error {
			return s.Delete(ctx, name, function.Change{IdempotencyKey: key})
		},
	} {
		t.Run(kind, func(t *testing.T) {
			for n := int64(1); ; n++ {
				name := fmt.Sprintf("%s-%d", kind, n)
				had := 0
				if kind != "new" {
					had = add(t, healthy, name, 1, nil).Function.Wanted
				}
				if kind == "rollback" {
					had = add(t, healthy, name, 2, nil).Function.Wanted
				}
				var m mortal
				o := options(t)
				o.Config.Wrap(func(next http.RoundTripper) http.RoundTripper { m.next = next; return &m })
				// Every client has a transport of its own: one death for all.
				o.Config.Transport, o.Config.WrapTransport = sharedTransport(t, o.Config, &m), nil
				o.Config.TLSClientConfig = rest.TLSClientConfig{}
				s, err := clusterstore.New(ctx, o)
				if err != nil {
					t.Fatal(err)
				}
				idempotencyKey := "key of " + name
				if b, err := s.Begin(ctx, idempotencyKey, "p"); err != nil || b.State != function.IdempotencyNew {
					t.Fatalf("begin: %+v %v", b, err)
				}
				m.left.Store(n)
				m.armed.Store(true)
				died := do(s, name, idempotencyKey)
				whole := !m.dead.Load()
				if died != nil && !errors.Is(died, function.ErrUnavailable) {
					t.Errorf("after request %d it died of %v", n, died)
				}
				m.armed.Store(true)
				m.dead.Store(true)
				_ = s.Close()
				if whole && died != nil {
					t.Fatalf("nothing was in the way: %v", died)
				}
				if err := apiServer(t).Client().CoordinationV1().Leases(system).Delete(ctx, "hearth-api-"+o.Instance, metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}

				b, err := healthy.Begin(ctx, idempotencyKey, "p")
				if err != nil {
					t.Fatal(err)
				}
				switch b.State {
				case function.IdempotencyNew:
					if whole {
						eventually(t, "the other's commit is seen", func() bool { _, err := healthy.Get(ctx, name); return err == nil })
					}
					if err := do(healthy, name, idempotencyKey); err != nil {
						t.Fatalf("after request %d: %v", n, err)
					}
				case function.IdempotencyResume:
					if b.Outcome.Name != name || b.Outcome.Deleted != (kind == "delete") {
						t.Fatalf("after request %d: outcome %+v", n, b.Outcome)
					}
				default:
					t.Fatalf("after request %d: state %d", n, b.State)
				}
				if err := healthy.Complete(ctx, idempotencyKey, function.Response{Status: 200}); err != nil {
					t.Fatal(err)
				}
				if kind == "delete" {
					if _, err := healthy.Get(ctx, name); !errors.Is(err, function.ErrNotFound) {
						eventually(t, "it is gone", func() bool { _, err := healthy.Get(ctx, name); return errors.Is(err, function.ErrNotFound) })
					}
				} else {
					wantLen := had + 1
					if kind == "rollback" {
						wantLen = had
					}
					eventually(t, "the change is there once", func() bool {
						v, err := healthy.Get(ctx, name)
						if err != nil {
							return false
						}
						revs, err := healthy.Revisions(ctx, name)
						if kind == "rollback" {
							return err == nil && v.Wanted == 1 && len(revs) == wantLen
						}
						return err == nil && len(revs) == wantLen && v.Revision.Settings.Secrets["TOKEN"] == "s3cret" && v.Wanted == revs[0].Number
					})
				}
				if whole {
					t.Logf("a change makes %d requests", n-1)
					if n < 4 {
						t.Error("too few to believe")
					}
					return
				}
			}
		})
	}
}

// A container that is killed and started again is the same instance, and
// renews the same Lease.
func TestAnInstanceHoldsNothingOfItsFormerLife(t *testing.T) {
	fresh(t)
	ctx := t.Context()
	other := open(t, nil)
	var o clusterstore.Options
	former := open(t, func(f *clusterstore.Options) { f.LeaseDuration = time.Minute; o = *f })
	if b, err := former.Begin(ctx, "k", "p"); err != nil || b.State != function.IdempotencyNew {
		t.Fatalf("%+v %v", b, err)
	}
	if b, err := other.Begin(ctx, "k", "p"); err != nil || b.State != function.IdempotencyInFlight {
		t.Fatalf("while it lives: %+v %v", b, err)
	}
	open(t, func(now *clusterstore.Options) { *now = o })
	if b, err := other.Begin(ctx, "k", "p"); err != nil || b.State != function.IdempotencyNew {
		t.Errorf("after it was started again: %+v %v", b, err)
	}
}

// sharedTransport is one transport for all clients of a store.
func sharedTransport(t *testing.T, config *rest.Config, m *mortal) http.RoundTripper {
	t.Helper()
	plain := rest.CopyConfig(config)
	plain.WrapTransport, plain.Transport = nil, nil
	next, err := rest.TransportFor(plain)
	if err != nil {
		t.Fatal(err)
	}
	m.next = next
	return m
}

// apply makes or replaces a Function as kubectl would.
func apply(t *testing.T, namespace, name string, spec v1alpha1.FunctionSpec) *kube.Function {
	t.Helper()
	if spec.Image == "" {
		spec.Image = "registry.test/team/hello@sha256:" + strings.Repeat("0f", 32)
	}
	f := &kube.Function{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec,
	}
	client, made := clientOf(t), new(kube.Function)
	err := client.Post().Namespace(namespace).Resource("functions").Body(f).Do(t.Context()).Into(made)
	for apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) {
		was := read(t, namespace, name)
		was.Spec, was.TypeMeta = spec, f.TypeMeta
		err = client.Put().Namespace(namespace).Resource("functions").Name(name).Body(was).Do(t.Context()).Into(made)
	}
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func ready(f *kube.Function) v1alpha1.Condition {
	for _, c := range f.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c
		}
	}
	return v1alpha1.Condition{}
}

func TestWhatKubectlWritesIsAdopted(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	adopt := func(namespace, name string) {
		t.Helper()
		if err := s.Adopt(ctx, namespace, name); err != nil {
			t.Fatal(err)
		}
	}
	apply(t, "ann", "hello", v1alpha1.FunctionSpec{Host: "hello.example.com", Env: []v1alpha1.EnvVar{{Name: "A", Value: "1"}}})
	adopt("ann", "hello")
	v, err := s.Get(ctx, "hello")
	if err != nil || v.Wanted != 1 || v.Tenant != "ann" || v.Revision.Settings.Env["A"] != "1" || v.Revision.Artifact.Repository != "team/hello" {
		t.Fatalf("%+v %v", v, err)
	}
	f := read(t, "ann", "hello")
	if c := ready(f); c.Status != v1alpha1.ConditionFalse || c.Reason != clusterstore.ReasonPending || f.Status.URL != "http://hello.functions.test/" || f.Status.Revision != 1 {
		t.Errorf("status %+v", f.Status)
	}
	adopt("ann", "hello")
	if again := read(t, "ann", "hello"); again.ResourceVersion != f.ResourceVersion {
		t.Error("adopting again wrote something")
	}

	apply(t, "ann", "hello", v1alpha1.FunctionSpec{Env: []v1alpha1.EnvVar{{Name: "A", Value: "2"}}})
	// The submit API comes before the leader: kubectl's change is not lost.
	r, err := s.AddRevision(ctx, "hello", function.Change{}, func(c *function.Function) (function.NewRevision, error) {
		nr := revision(3)
		nr.Settings = c.Revision.Settings
		nr.Settings.MemoryMiB = 64
		return nr, nil
	})
	if err != nil || r.Function.Wanted != 3 || r.Function.Revision.Settings.Env["A"] != "2" {
		t.Fatalf("%+v %v", r.Function, err)
	}

	for _, c := range []struct {
		name, namespace, function string
		spec                      v1alpha1.FunctionSpec
		reason, message           string
	}{
		{"a name of another namespace", "bob", "hello", v1alpha1.FunctionSpec{}, clusterstore.ReasonNameTaken, "choose another name"},
		{"a place below the base domain", "bob", "thief", v1alpha1.FunctionSpec{Host: "hello.functions.test"}, clusterstore.ReasonHostTaken, "choose a name outside of functions.test"},
		{"a bad label", "bob", "odd", v1alpha1.FunctionSpec{Placement: &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"a b": ""}}}, clusterstore.ReasonInvalidSpec, "node label"},
	} {
		t.Run(c.name, func(t *testing.T) {
			was := apply(t, c.namespace, c.function, c.spec)
			adopt(c.namespace, c.function)
			f := read(t, c.namespace, c.function)
			if got := ready(f); got.Status != v1alpha1.ConditionFalse || got.Reason != c.reason || !strings.Contains(got.Message, c.message) {
				t.Errorf("condition %+v", got)
			}
			if diff := cmp.Diff(was.Spec, f.Spec); diff != "" {
				t.Error("the spec was touched", diff)
			}
		})
	}
	if v, err := s.Get(ctx, "hello"); err != nil || v.Tenant != "ann" {
		t.Errorf("%+v %v", v, err)
	}

	t.Run("a host of another namespace", func(t *testing.T) {
		apply(t, "ann", "first", v1alpha1.FunctionSpec{Host: "shared.example.com", Routes: []string{"/a"}})
		adopt("ann", "first")
		apply(t, "bob", "second", v1alpha1.FunctionSpec{Host: "shared.example.com", Routes: []string{"/b"}})
		adopt("bob", "second")
		if got := ready(read(t, "bob", "second")); got.Reason != clusterstore.ReasonHostTaken {
			t.Errorf("condition %+v", got)
		}
		apply(t, "ann", "third", v1alpha1.FunctionSpec{Host: "shared.example.com", Routes: []string{"/b"}})
		adopt("ann", "third")
		if v, err := s.Get(ctx, "third"); err != nil {
			t.Errorf("another path in the same namespace: %+v %v", v, err)
		}
		apply(t, "ann", "fourth", v1alpha1.FunctionSpec{Host: "shared.example.com", Routes: []string{"/b"}})
		adopt("ann", "fourth")
		if got := ready(read(t, "ann", "fourth")); got.Reason != clusterstore.ReasonHostTaken {
			t.Errorf("the same path: %+v", got)
		}
		nr := revision(1)
		nr.Settings.Host = "shared.example.com"
		if _, err := s.AddRevision(ctx, "fifth", function.Change{Tenant: "bob"}, constant(nr)); !errors.Is(err, function.ErrHostTaken) {
			t.Errorf("by the API: %v", err)
		}
	})

	t.Run("secrets of the tenant's own", func(t *testing.T) {
		env := []v1alpha1.EnvVar{{Name: "PASSWORD", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "database", Key: "pw"}}}
		apply(t, "ann", "secretive", v1alpha1.FunctionSpec{Env: env})
		if err := s.Adopt(ctx, "ann", "secretive"); err == nil || !strings.Contains(err.Error(), "Secret database") {
			t.Errorf("a Secret that is missing: %v", err)
		}
		if got := ready(read(t, "ann", "secretive")); got.Reason != clusterstore.ReasonInvalidSpec {
			t.Errorf("condition %+v", got)
		}
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "database"}, Data: map[string][]byte{"pw": []byte("one")}}
		secrets := apiServer(t).Client().CoreV1().Secrets("ann")
		if _, err := secrets.Create(ctx, secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		adopt("ann", "secretive")
		if err := secrets.Delete(ctx, "database", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		v, err := s.Get(ctx, "secretive")
		if err != nil || v.Revision.Settings.Secrets["PASSWORD"] != "one" {
			t.Errorf("the value went with the Secret: %v %v", v.Revision.Settings.Secrets.Names(), err)
		}
	})

	t.Run("a copied manifest", func(t *testing.T) {
		was := read(t, "ann", "hello")
		clone := &kube.Function{
			TypeMeta:   was.TypeMeta,
			ObjectMeta: metav1.ObjectMeta{Namespace: "bob", Name: "copy", Annotations: was.Annotations}, Spec: was.Spec,
		}
		clone.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: kube.FunctionKind}
		if err := clientOf(t).Post().Namespace("bob").Resource("functions").Body(clone).Do(ctx).Error(); err != nil {
			t.Fatal(err)
		}
		adopt("bob", "copy")
		if v, err := s.Get(ctx, "copy"); err != nil || v.Wanted != 1 {
			t.Errorf("%+v %v", v, err)
		}
	})
}

func TestDesiredIsForOneNode(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	c := apiServer(t).Client()
	var endpoints []discoveryv1.Endpoint
	for i, name := range []string{"node-a", "node-b", "node-c"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pool": []string{"wasm", "wasm", "other"}[i]}}}
		if _, err := c.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		endpoints = append(endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.0.0.%d", i+1)}, NodeName: &name})
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "hearth-engine-x", Labels: map[string]string{discoveryv1.LabelServiceName: "hearth-engine"}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: endpoints,
	}
	if _, err := c.DiscoveryV1().EndpointSlices(system).Create(ctx, slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	add(t, s, "placed", 1, func(nr *function.NewRevision) {
		nr.Settings.Secrets = function.Secrets{"TOKEN": "s3cret"}
		nr.Settings.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": "wasm"}}
		nr.Settings.Host, nr.Settings.Routes = "placed.example.com", []string{"/x"}
	})
	add(t, s, "everywhere", 1, nil)
	add(t, s, "pods", 1, func(nr *function.NewRevision) { nr.Settings.Runtime = v1alpha1.RuntimeSpin })
	of := func(node, name string) (v1alpha1.DesiredFunction, v1alpha1.Desired) {
		t.Helper()
		d, err := s.DesiredFor(ctx, node, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range d.Functions {
			if f.Name == "pods" {
				t.Fatal("a spin function is in a node's view")
			}
			if f.Name == name {
				return f, d
			}
		}
		t.Fatalf("%s is not in the view of %s", name, node)
		return v1alpha1.DesiredFunction{}, d
	}
	var got v1alpha1.DesiredFunction
	eventually(t, "the nodes are known", func() bool { got, _ = of("node-a", "placed"); return len(got.Candidates) == 1 })
	if got.Candidates[0].Secrets["TOKEN"] != "s3cret" || len(got.Routes) != 1 || got.Routes[0] != (v1alpha1.HostRoute{Host: "placed.example.com", Path: "/x"}) || len(got.Peers) != 0 {
		t.Errorf("where it is placed: %d candidates, routes %v, peers %v", len(got.Candidates), got.Routes, got.Peers)
	}
	got, d := of("node-c", "placed")
	if len(got.Candidates) != 0 || len(got.Keep) != 0 || len(got.Routes) != 1 || got.TimeoutMS != v1alpha1.DefaultTimeoutMS || d.BaseDomain != "functions.test" {
		t.Errorf("where it is not placed: %+v", got)
	}
	// Whatever is placed where, each node knows of the others' gateways.
	if d.Gateways == nil || slices.Contains(d.Gateways, "10.0.0.3:8080") || !slices.Contains(d.Gateways, "10.0.0.1:8080") || !slices.Contains(d.Gateways, "10.0.0.2:8080") {
		t.Errorf("gateways %v", d.Gateways)
	}
	if text := fmt.Sprintf("%+v", d); strings.Contains(text, "s3cret") {
		t.Error("a secret reached a node that does not need it")
	}

	// A node becomes warm: the others hear of it, and the object says so.
	waits := make(chan v1alpha1.Desired, 1)
	go func() {
		next, err := s.DesiredFor(ctx, "node-c", d.Generation)
		if err != nil {
			t.Error(err)
		}
		waits <- next
	}()
	report := func(node string, fs ...v1alpha1.FunctionReport) {
		t.Helper()
		if err := s.SetProgress(ctx, v1alpha1.NodeReport{Node: node, Generation: 1, Functions: fs}); err != nil {
			t.Fatal(err)
		}
	}
	at := func(p v1alpha1.RevisionProgress, serving int) v1alpha1.FunctionReport {
		return v1alpha1.FunctionReport{Name: "placed", Revision: 1, Progress: p, Serving: serving}
	}
	own, err := s.DesiredFor(ctx, "node-a", 0)
	if err != nil {
		t.Fatal(err)
	}
	report("node-a", at(v1alpha1.ProgressReady, 1))
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	if d, err := s.DesiredFor(short, "node-a", own.Generation); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a node is told of itself: generation %d after %d, %v", d.Generation, own.Generation, err)
	}
	cancel()
	next := <-waits
	if next.Generation <= d.Generation {
		t.Errorf("generation %d after %d", next.Generation, d.Generation)
	}
	if got, _ := of("node-c", "placed"); !slices.Equal(got.Peers, []string{"10.0.0.1:8080"}) {
		t.Errorf("peers %v", got.Peers)
	}
	if f := read(t, "default", "placed"); f.Status.Warm != "1/2" || f.Status.ActiveRevision != 1 || ready(f).Status != v1alpha1.ConditionTrue {
		t.Errorf("status %+v", f.Status)
	}
	report("node-b", at(v1alpha1.ProgressQueued, 0))
	version := read(t, "default", "placed").ResourceVersion
	for _, p := range []v1alpha1.RevisionProgress{v1alpha1.ProgressPulling, v1alpha1.ProgressCompiling, v1alpha1.ProgressLoading} {
		report("node-b", at(p, 0))
	}
	if read(t, "default", "placed").ResourceVersion != version {
		t.Error("a step in between was written")
	}
	report("node-b", at(v1alpha1.ProgressReady, 1))
	if v, err := s.Get(ctx, "placed"); err != nil || v.Warm != "2/2" {
		t.Errorf("warm %s %v", v.Warm, err)
	}

	// One node that cannot does not fail a revision that another serves.
	add(t, s, "placed", 2, nil)
	fail := v1alpha1.FunctionReport{Name: "placed", Revision: 2, Progress: v1alpha1.ProgressFailed, Serving: 1, Error: &v1alpha1.FunctionError{Code: "no-space", Detail: "x"}}
	report("node-a", v1alpha1.FunctionReport{Name: "placed", Revision: 2, Progress: v1alpha1.ProgressQueued, Serving: 1})
	report("node-b", fail)
	if v, _ := s.Get(ctx, "placed"); v.Revision.State != v1alpha1.StatePending || v.Active != 1 {
		t.Errorf("state %s, active %d", v.Revision.State, v.Active)
	}
	report("node-a", v1alpha1.FunctionReport{Name: "placed", Revision: 2, Progress: v1alpha1.ProgressReady, Serving: 2})
	if v, _ := s.Get(ctx, "placed"); v.Revision.State != v1alpha1.StateReady || v.Active != 2 {
		t.Errorf("state %s, active %d", v.Revision.State, v.Active)
	}

	// A revision that answers stays where it is until the next one answers on the
	// nodes that it is placed on, and reaches no other node, nor do its secrets.
	pool := func(name string) func(*function.NewRevision) {
		return func(nr *function.NewRevision) {
			nr.Settings.Secrets = function.Secrets{"TOKEN": "of-" + name}
			if name != "" {
				nr.Settings.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": name}}
			}
		}
	}
	answer := func(revision int, nodes ...string) {
		t.Helper()
		for _, node := range nodes {
			report(node, v1alpha1.FunctionReport{Name: "moves", Revision: revision, Progress: v1alpha1.ProgressReady, Serving: revision})
		}
	}
	views := func(when string, want map[string][]int) {
		t.Helper()
		for _, node := range []string{"node-a", "node-b", "node-c"} {
			f, _ := of(node, "moves")
			var have []int
			for _, c := range f.Candidates {
				have = append(have, c.Revision)
			}
			if !slices.Equal(have, want[node]) {
				t.Errorf("%s: %s has revisions %v, want %v", when, node, have, want[node])
			}
		}
	}
	add(t, s, "moves", 1, pool("wasm"))
	answer(1, "node-a", "node-b")
	views("at first", map[string][]int{"node-a": {1}, "node-b": {1}})
	add(t, s, "moves", 2, pool("other"))
	views("while the new node warms", map[string][]int{"node-a": {1}, "node-b": {1}, "node-c": {2}})
	if text := fmt.Sprintf("%+v", func() v1alpha1.DesiredFunction { f, _ := of("node-c", "moves"); return f }()); strings.Contains(text, "of-wasm") {
		t.Errorf("a secret of the old revision is on a node that it was never placed on: %s", text)
	}
	answer(2, "node-c")
	views("when it answers", map[string][]int{"node-c": {2}})
	report("node-a")
	report("node-b")
	if f := read(t, "default", "moves"); f.Status.Warm != "1/1" || f.Status.ActiveRevision != 2 {
		t.Errorf("status %+v", f.Status)
	}
	add(t, s, "moves", 3, pool("nowhere"))
	views("placed nowhere", map[string][]int{"node-c": {2}})
	if v, _ := s.Get(ctx, "moves"); v.Active != 2 {
		t.Errorf("a selector that no node matches switched it off: active %d", v.Active)
	}
	add(t, s, "moves", 4, pool(""))
	views("everywhere", map[string][]int{"node-a": {4}, "node-b": {4}, "node-c": {4, 2}})
	report("node-a", at(v1alpha1.ProgressReady, 2)) // what else is there stays as it was
	answer(4, "node-b")
	views("everywhere, and one answers", map[string][]int{"node-a": {4}, "node-b": {4}, "node-c": {4}})

	// A second store comes to another generation; a node that asks both is not
	// answered at once by each in turn.
	other := open(t, nil)
	theirs, err := other.DesiredFor(ctx, "node-a", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, store := range []*clusterstore.Store{s, other} {
		short, cancel := context.WithTimeout(ctx, 2500*time.Millisecond)
		again, err := store.DesiredFor(short, "node-a", theirs.Generation)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an answer at once: generation %d after %d, %v", again.Generation, theirs.Generation, err)
		}
	}
}

func TestASpinRolloutIsObserved(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	var mu sync.Mutex
	seen := map[string]int{}
	cancel := s.Subscribe(func(namespace, name string) { mu.Lock(); defer mu.Unlock(); seen[namespace+"/"+name]++ })
	defer cancel()
	add(t, s, "pods", 1, func(nr *function.NewRevision) { nr.Settings.Runtime = v1alpha1.RuntimeSpin })
	eventually(t, "the change is heard of", func() bool { mu.Lock(); defer mu.Unlock(); return seen["default/pods"] > 0 })
	f, revs, err := s.Function("default", "pods")
	if err != nil || f.Spec.Runtime != v1alpha1.RuntimeSpin || len(revs) != 1 || revs[0].Number != 1 {
		t.Fatalf("%+v %v %v", f, revs, err)
	}
	phases := []v1alpha1.Phase{{Name: "deploy", Milliseconds: 3}}
	if err := s.Observe(ctx, "default", "pods", v1alpha1.FunctionNode{Name: "spin", Revision: 1, Progress: v1alpha1.ProgressReady, Serving: 1}, phases); err != nil {
		t.Fatal(err)
	}
	v, err := s.Get(ctx, "pods")
	if err != nil || v.Active != 1 || v.Revision.State != v1alpha1.StateReady || v.Warm != "1/1" || len(v.Revision.NodePhases) != 1 {
		t.Errorf("%+v %v", v, err)
	}
	// The agents' reports do not speak of it, and that says nothing.
	if err := s.SetProgress(ctx, v1alpha1.NodeReport{Node: "node-a"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if v, _ := s.Get(ctx, "pods"); v.Active != 1 {
		t.Error("the rollout was forgotten")
	}
	// Its pods answer until whoever takes them away says so, whatever runs it next.
	add(t, s, "pods", 2, nil)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if v, _ := s.Get(ctx, "pods"); v.Active != 1 || v.Wanted != 2 {
		t.Errorf("pods that still answer were forgotten: %+v", v)
	}
	if err := s.Unobserve(ctx, "default", "pods", "spin"); err != nil {
		t.Fatal(err)
	}
	if v, _ := s.Get(ctx, "pods"); v.Active != 0 {
		t.Errorf("pods that were taken away answer: %+v", v)
	}
	if err := s.Observe(ctx, "default", "nobody", v1alpha1.FunctionNode{Name: "spin"}, nil); !errors.Is(err, function.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

func TestEnginesAnswerUntilPodsDo(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	add(t, s, "mover", 1, nil)
	serves := v1alpha1.NodeReport{Node: "node-a", Functions: []v1alpha1.FunctionReport{{Name: "mover", Revision: 1, Progress: v1alpha1.ProgressReady, Serving: 1}}}
	if err := s.SetProgress(ctx, serves); err != nil {
		t.Fatal(err)
	}
	add(t, s, "mover", 2, func(nr *function.NewRevision) { nr.Settings.Runtime = v1alpha1.RuntimeSpin })
	engines := func() []v1alpha1.DesiredRevision {
		t.Helper()
		d, err := s.DesiredFor(ctx, "node-a", 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range d.Functions {
			if f.Name == "mover" {
				return f.Candidates
			}
		}
		return nil
	}
	if c := engines(); len(c) != 1 || c[0].Revision != 1 {
		t.Fatalf("while its pods start, engines have %+v, want revision 1", c)
	}
	if err := s.SetProgress(ctx, serves); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		what    string
		pods    v1alpha1.FunctionNode
		active  int
		engines int
	}{
		{"pods that start", v1alpha1.FunctionNode{Name: "spin", Revision: 2, Progress: v1alpha1.ProgressLoading}, 1, 1},
		{"pods that failed", v1alpha1.FunctionNode{Name: "spin", Revision: 2, Progress: v1alpha1.ProgressFailed, Error: &v1alpha1.FunctionError{Code: "crashed"}}, 1, 1},
		{"pods that answer", v1alpha1.FunctionNode{Name: "spin", Revision: 2, Progress: v1alpha1.ProgressReady, Serving: 2}, 2, 0},
	} {
		if err := s.Observe(ctx, "default", "mover", step.pods, nil); err != nil {
			t.Fatal(err)
		}
		if c := engines(); len(c) != step.engines {
			t.Errorf("with %s, engines have %+v", step.what, c)
		}
		if f, err := s.Get(ctx, "mover"); err != nil || f.Active != step.active {
			t.Errorf("with %s, revision %d answers, want %d (%v)", step.what, f.Active, step.active, err)
		}
	}
	if err := s.SetProgress(ctx, v1alpha1.NodeReport{Node: "node-a"}); err != nil {
		t.Fatal(err)
	}
	if f, _, err := s.Function("default", "mover"); err != nil || len(f.Status.Nodes) != 1 {
		t.Errorf("%+v %v", f.Status.Nodes, err)
	}
}

func TestCustomHostMovesWithWhatAnswers(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	at := func(host string, routes ...string) func(*function.NewRevision) {
		return func(nr *function.NewRevision) { nr.Settings.Host, nr.Settings.Routes = host, routes }
	}
	spin := func(nr *function.NewRevision) {
		at("site.example.com", "/new")(nr)
		nr.Settings.Runtime = v1alpha1.RuntimeSpin
	}
	node := func(name string, revision int, p v1alpha1.RevisionProgress, serving int) {
		t.Helper()
		if err := s.Observe(ctx, "default", "site", v1alpha1.FunctionNode{Name: name, Revision: revision, Progress: p, Serving: serving}, nil); err != nil {
			t.Fatal(err)
		}
	}
	want := func(when string, want ...clusterstore.AtEngines) {
		t.Helper()
		got, err := s.AtEngines()
		if err != nil || !cmp.Equal(got, want, cmpopts.EquateEmpty()) {
			t.Errorf("%s: engines answer for %+v, want %+v (%v)", when, got, want, err)
		}
	}
	old := clusterstore.AtEngines{Namespace: "default", Name: "site", Host: "site.example.com", Routes: []string{"/old"}}
	add(t, s, "site", 1, at("site.example.com", "/old"))
	want("resident", old)
	node("node-a", 1, v1alpha1.ProgressReady, 1)
	add(t, s, "site", 2, spin)
	leaving := old
	leaving.Leaving = true
	want("pods are wanted", leaving)
	node(clusterstore.NodeSpin, 2, v1alpha1.ProgressLoading, 0)
	want("pods start", leaving)
	node(clusterstore.NodeSpin, 2, v1alpha1.ProgressReady, 2)
	want("pods answer")

	node("node-a", 2, v1alpha1.ProgressQueued, 0)
	add(t, s, "site", 3, at("site.example.com", "/back"))
	want("pods answer, and no engine yet", clusterstore.AtEngines{Namespace: "default", Name: "site"})
	node("node-a", 3, v1alpha1.ProgressLoading, 0)
	want("an engine loads it", clusterstore.AtEngines{Namespace: "default", Name: "site"})
	back := clusterstore.AtEngines{Namespace: "default", Name: "site", Host: "site.example.com", Routes: []string{"/back"}}
	node("node-a", 3, v1alpha1.ProgressReady, 3)
	want("an engine has it beside the pods", back)
	if err := s.Unobserve(ctx, "default", "site", clusterstore.NodeSpin); err != nil {
		t.Fatal(err)
	}
	want("the pods are gone", back)
}

func TestCollectLeavesNothingAndTakesNothingInUse(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	c := apiServer(t).Client()
	add(t, s, "kept", 1, func(nr *function.NewRevision) {
		nr.Settings.Secrets, nr.Settings.Host = function.Secrets{"A": "1"}, "kept.example.com"
	})
	add(t, s, "moved", 1, func(nr *function.NewRevision) { nr.Settings.Host = "old.example.com" })
	add(t, s, "moved", 2, nil)
	add(t, s, "gone", 1, nil)
	add(t, s, "gone", 2, nil)
	if err := s.SetProgress(ctx, v1alpha1.NodeReport{Node: "lost", Functions: []v1alpha1.FunctionReport{{Name: "kept", Revision: 1, Progress: v1alpha1.ProgressReady, Serving: 1}}}); err != nil {
		t.Fatal(err)
	}
	// By other means than a store.
	if err := clientOf(t).Delete().Namespace("default").Resource("functions").Name("gone").Do(ctx).Error(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the deletion is seen", func() bool { _, err := s.Get(ctx, "gone"); return errors.Is(err, function.ErrNotFound) })
	lost := v1alpha1.FunctionNode{Name: clusterstore.NodeIngress, Revision: 1, Progress: v1alpha1.ProgressQueued, Retrying: true, Error: &v1alpha1.FunctionError{Code: "host-taken", Detail: "the host is somebody else's"}}
	if err := s.Observe(ctx, "default", "kept", lost, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if f := read(t, "default", "kept"); len(f.Status.Nodes) != 1 || !strings.Contains(ready(f).Message, lost.Error.Detail) || f.Status.WantedNodes != 0 {
		t.Errorf("status %+v", f.Status)
	}
	if v, err := s.Get(ctx, "kept"); err != nil || v.Active != 0 || v.Revision.Settings.Secrets["A"] != "1" {
		t.Errorf("%+v %v", v, err)
	}
	if secrets, err := c.CoreV1().Secrets("default").List(ctx, metav1.ListOptions{}); err != nil || len(secrets.Items) != 1 || metav1.GetControllerOf(&secrets.Items[0]) == nil {
		t.Errorf("%d secrets, %v", len(secrets.Items), err)
	}
	if r := add(t, s, "gone", 3, nil); r.Function.Wanted != 3 {
		t.Errorf("a number was used again: %d", r.Function.Wanted)
	}
	var hosts kube.HostList
	if err := clientOf(t).Get().Resource("hosts").Do(ctx).Into(&hosts); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range hosts.Items {
		names = append(names, h.Name)
	}
	slices.Sort(names)
	// old.example.com is in its grace.
	if want := []string{"gone", "kept", "kept.example.com", "moved", "old.example.com"}; !slices.Equal(names, want) {
		t.Errorf("claims %v, want %v", names, want)
	}
}

func TestNamesOfDeletedFunctionsAreNotAskedForAtEachCollection(t *testing.T) {
	fresh(t)
	var asked atomic.Int64
	s := open(t, func(o *clusterstore.Options) {
		o.Config.Wrap(func(next http.RoundTripper) http.RoundTripper {
			return roundTripper(func(r *http.Request) (*http.Response, error) {
				if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/hosts/") {
					asked.Add(1)
				}
				return next.RoundTrip(r)
			})
		})
	})
	for i := range 5 {
		name := fmt.Sprintf("deleted-%d", i)
		add(t, s, name, 1, nil)
		if err := s.Delete(t.Context(), name, function.Change{}); err != nil {
			t.Fatal(err)
		}
	}
	before := asked.Load()
	if before == 0 {
		t.Fatal("no request for a claim was seen")
	}
	if err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := asked.Load() - before; n != 0 {
		t.Errorf("%d claims were asked for, none can be at its end", n)
	}
}

func TestWhatIsInTheWayIsSaid(t *testing.T) {
	fresh(t)
	s := open(t, nil)
	ctx := t.Context()
	if _, err := s.AddRevision(ctx, "hello", function.Change{Tenant: "nobody"}, constant(revision(1))); !errors.Is(err, function.ErrTenantNotFound) {
		t.Errorf("no namespace: %v", err)
	}
	var hosts kube.HostList
	if err := clientOf(t).Get().Resource("hosts").Do(ctx).Into(&hosts); err != nil || len(hosts.Items) != 0 {
		t.Errorf("a tenant that does not exist claimed a name: %v %v", hosts.Items, err)
	}
	o := options(t)
	o.Config.Host = "https://127.0.0.1:1"
	if _, err := clusterstore.New(ctx, o); !errors.Is(err, function.ErrUnavailable) {
		t.Errorf("no API server: %v", err)
	}
	o = options(t)
	o.Config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			r = r.Clone(r.Context())
			r.URL.Path = strings.Replace(r.URL.Path, "/apis/hearth.sh/v1alpha1/hosts", "/apis/hearth.sh/v1alpha1/missing", 1)
			return next.RoundTrip(r)
		})
	})
	if _, err := clusterstore.New(ctx, o); !errors.Is(err, function.ErrCRDMissing) || !strings.Contains(fmt.Sprint(err), "chart") {
		t.Errorf("no custom resource: %v", err)
	}
	nr := revision(1)
	nr.Artifact.Registry = ""
	var ve *function.ValidationError
	if _, err := s.AddRevision(ctx, "hello", function.Change{}, constant(nr)); !errors.As(err, &ve) {
		t.Errorf("no registry: %v", err)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
