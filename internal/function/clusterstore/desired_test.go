package clusterstore

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// filled is a store that no API server is behind, with n functions, each with an
// environment and a secret, that are warm on nodes.
func filled(tb testing.TB, n int, nodes ...string) (s *Store, function func(i int) *kube.Function) {
	tb.Helper()
	s = &Store{mem: newMemory(), told: map[string]v1alpha1.Desired{}, o: Options{
		Host:       func(_, name string) string { return name + ".functions.test" },
		BaseDomain: func() string { return "functions.test" },
	}}
	version := uint64(1)
	next := func(name string) meta { version++; return meta{types.UID(name), version} }
	gateways := map[string]string{}
	for i, node := range nodes {
		gateways[node] = fmt.Sprintf("10.0.0.%d:8080", i+1)
	}
	s.mem.putLabels(&s.mem.slices, key{Namespace: "hearth-system", Name: "x"}, next("slice"), gateways)
	spec := func(i int) v1alpha1.FunctionSpec {
		spec := v1alpha1.FunctionSpec{Image: "registry.test/functions/team/f@sha256:" + strings.Repeat("0f", 32)}
		for v := range 4 {
			spec.Env = append(spec.Env, v1alpha1.EnvVar{Name: fmt.Sprintf("VARIABLE_%d", v), Value: fmt.Sprintf("value %d of %d", v, i)})
		}
		spec.Env = append(spec.Env, v1alpha1.EnvVar{Name: "TOKEN", SecretKeyRef: &v1alpha1.SecretKeyRef{Name: "s", Key: "TOKEN"}})
		return spec
	}
	name := func(i int) string { return fmt.Sprintf("function-%d", i) }
	warm := make([]v1alpha1.FunctionNode, len(nodes))
	for i, node := range nodes {
		warm[i] = v1alpha1.FunctionNode{Name: node, Revision: 1, Serving: 1, Progress: v1alpha1.ProgressReady}
	}
	function = func(i int) *kube.Function {
		version++
		f := &kube.Function{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name(i), UID: types.UID(name(i)), ResourceVersion: strconv.FormatUint(version, 10), Generation: 1},
			Spec:       spec(i),
		}
		f.Annotations = map[string]string{}
		record{wanted: 1, of: specHash(f.Spec), revisions: []revisionRef{{1, "1-a"}}, changes: 1}.write(f.Annotations)
		f.Status.Nodes, f.Status.Revision, f.Status.ObservedGeneration = warm, 1, 1
		return f
	}
	for i := range n {
		k := key{Namespace: "team", Name: name(i)}
		s.mem.putHost(k.Name, next("host-"+k.Name), v1alpha1.HostSpec{Namespace: k.Namespace, Function: k.Name, LastRevision: 1})
		secret := key{Namespace: k.Namespace, Name: k.Name + "-s"}
		s.mem.putSecret(secret, next(secret.Name), &secretObject{function: k, values: map[string]string{"TOKEN": "secret of " + k.Name}})
		artifact, err := artifactOf(spec(i).Image)
		if err != nil {
			tb.Fatal(err)
		}
		s.mem.putRevision(key{Namespace: k.Namespace, Name: k.Name + "-1-a"}, next(k.Name+"-1-a"), &revisionObject{
			function: k, name: k.Name + "-1-a", data: revisionData{Number: 1, Artifact: artifact, Spec: spec(i), ValuesIn: secret.Name},
		})
		s.mem.putFunction(function(i))
	}
	return s, function
}

// What a node is told after a change is what it would be told if it asked anew.
func TestANodeIsToldTheSameHoweverMuchChanged(t *testing.T) {
	const n = 12
	nodes := []string{"node-a", "node-b", "node-c"}
	s, function := filled(t, n, nodes...)
	anew := func(node string) v1alpha1.Desired {
		other := &Store{mem: s.mem, o: s.o, told: map[string]v1alpha1.Desired{}}
		d, err := other.DesiredFor(t.Context(), node, 0)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	known := map[string]v1alpha1.Desired{}
	for _, node := range nodes {
		var err error
		if known[node], err = s.DesiredFor(t.Context(), node, 0); err != nil {
			t.Fatal(err)
		}
	}
	base := "functions.test"
	s.o.BaseDomain = func() string { return base }
	random := rand.New(rand.NewPCG(1, 2)) // the same in each run
	version := uint64(1 << 20)
	told := 0
	for step := range 2000 {
		for range 1 + random.IntN(3) {
			i := random.IntN(n)
			f := function(i)
			switch random.IntN(8) {
			case 0:
				version++
				s.mem.removeFunction(key{Namespace: f.Namespace, Name: f.Name}, f.UID, version)
				// It comes back as another object.
				s.mem.mu.Lock()
				clear(s.mem.functions.gone)
				s.mem.mu.Unlock()
			case 1:
				version++
				s.mem.putLabels(&s.mem.slices, key{Namespace: "hearth-system", Name: "x"}, meta{"slice", version},
					map[string]string{"node-a": "10.0.0.1:8080", "node-b": fmt.Sprintf("10.0.1.%d:8080", random.IntN(3))})
			case 2:
				base = fmt.Sprintf("%d.test", random.IntN(2))
				s.BaseDomainChanged()
			default:
				f.Status.Nodes = f.Status.Nodes[random.IntN(2) : 1+random.IntN(3)][:1]
				s.mem.putFunction(f)
			}
		}
		for _, node := range nodes {
			want, have := anew(node), known[node]
			if have.BaseDomain == want.BaseDomain && slices.Equal(have.Gateways, want.Gateways) && reflect.DeepEqual(have.Functions, want.Functions) {
				continue // it would wait
			}
			got, err := s.DesiredFor(t.Context(), node, have.Generation)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("step %d: %s is told\n%+v\nand anew\n%+v", step, node, got, want)
			}
			known[node] = got
			told++
		}
	}
	if told < 1000 {
		t.Errorf("only %d changes were told", told)
	}
}

// BenchmarkOneChangeAmong is what one change of one function costs a replica for
// one node that waits to be told: until the answer is there, and until it is
// written out.
func BenchmarkOneChangeAmong(b *testing.B) {
	for _, n := range []int{10, 1000} {
		for _, write := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d/written=%t", n, write), func(b *testing.B) {
				s, function := filled(b, n, "node-a", "node-b", "node-c")
				ctx := context.Background()
				d, err := s.DesiredFor(ctx, "node-a", 0)
				if err != nil {
					b.Fatal(err)
				}
				written := 0
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					f := function(i % n)
					f.Status.Nodes = f.Status.Nodes[:2+i/n%2] // a peer is warm, or no longer
					s.mem.putFunction(f)
					if d, err = s.DesiredFor(ctx, "node-a", d.Generation); err != nil {
						b.Fatal(err)
					}
					if write {
						data, err := json.Marshal(d)
						if err != nil {
							b.Fatal(err)
						}
						written = len(data)
					}
				}
				if write {
					b.ReportMetric(float64(written), "bytes/change")
				}
			})
		}
	}
}
