package clusterstore

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

func TestARecordSurvivesItsAnnotations(t *testing.T) {
	r := record{
		wanted: 3, of: "ab", changes: 9, updatedAt: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), recordMS: 1.5, recordOf: 3,
		revisions: []revisionRef{{1, "1-aa"}, {3, "3-bb"}}, requests: []change{{"k", 1, true}, {"l", 3, false}},
	}
	annotations := map[string]string{"other": "kept"}
	r.write(annotations)
	got, ok := readRecord(annotations)
	if diff := cmp.Diff(r, got, cmp.AllowUnexported(record{}, revisionRef{}, change{})); !ok || diff != "" || annotations["other"] != "kept" {
		t.Fatal(ok, diff)
	}
}

func TestARecordIsBounded(t *testing.T) {
	r := record{wanted: 2}
	for i := range 3 * function.MaxRevisions {
		r.revisions = append(r.revisions, revisionRef{i + 1, fmt.Sprintf("%d-aa", i+1)})
		r.remember(change{key: fmt.Sprint(i), revision: i + 1})
	}
	r.prune(7, 0)
	if len(r.revisions) != function.MaxRevisions || !r.has(2) || !r.has(7) || r.has(1) || r.newest() != 3*function.MaxRevisions {
		t.Errorf("%d revisions from %d", len(r.revisions), r.revisions[0].number)
	}
	if len(r.requests) != maxRequests || r.requests[maxRequests-1].revision != 3*function.MaxRevisions {
		t.Errorf("%d requests", len(r.requests))
	}
}

func FuzzRecord(f *testing.F) {
	f.Add("1", "1-aa", "k:1:created", "1:2.5")
	f.Add("0", "1-aa 1-bb", "::", "x")
	f.Add("9999999999999999999", "-", "", ":")
	f.Fuzz(func(t *testing.T, wanted, revisions, requests, ms string) {
		r, ok := readRecord(map[string]string{AnnotationRevision: wanted, annotationRevisions: revisions, annotationRequests: requests, annotationRecord: ms})
		if !ok {
			return
		}
		if !r.has(r.wanted) || len(r.revisions) > 2*function.MaxRevisions || len(r.requests) > maxRequests {
			t.Fatalf("%+v", r)
		}
		again := map[string]string{}
		r.write(again)
		if second, ok := readRecord(again); !ok || second.wanted != r.wanted || len(second.revisions) != len(r.revisions) {
			t.Fatalf("%+v became %+v", r, second)
		}
	})
}

func TestOneSpecHasOneHash(t *testing.T) {
	base := v1alpha1.FunctionSpec{Image: "r.test/a@sha256:1", Env: []v1alpha1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "2"}}}
	same := base
	same.Runtime = v1alpha1.RuntimeResident
	same.Limits = &v1alpha1.FunctionLimits{MemoryMiB: v1alpha1.DefaultMemoryMiB}
	same.Env = []v1alpha1.EnvVar{base.Env[1], base.Env[0]}
	same.Placement = &v1alpha1.FunctionPlacement{}
	if specHash(base) != specHash(same) {
		t.Error("defaults written out, or the order of variables, make another spec")
	}
	other := base
	other.Host = "a.example.com"
	if specHash(base) == specHash(other) {
		t.Error("another host is the same spec")
	}
	if base.Env[0].Name != "A" {
		t.Error("the spec was changed")
	}
}

func FuzzArtifact(f *testing.F) {
	f.Add("r.test:5000/a/b:v1@sha256:00")
	f.Add("a@sha256:")
	f.Fuzz(func(t *testing.T, image string) {
		a, err := artifactOf(image)
		if err == nil && (strings.Contains(a.Registry, "/") || strings.Contains(a.Repository, ":") || !strings.HasPrefix(a.Digest, "sha256:")) {
			t.Errorf("%q became %+v", image, a)
		}
	})
}

func TestDeriveStatus(t *testing.T) {
	rec := record{wanted: 2, revisions: []revisionRef{{1, "1-a"}, {2, "2-b"}}}
	failure := &v1alpha1.FunctionError{Code: "invalid-module"}
	at := func(name string, revision int, p v1alpha1.RevisionProgress, serving int) v1alpha1.FunctionNode {
		n := v1alpha1.FunctionNode{Name: name, Revision: revision, Progress: p, Serving: serving}
		if p == v1alpha1.ProgressFailed {
			n.Error = failure
		}
		return n
	}
	retrying := at("a", 2, v1alpha1.ProgressFailed, 1)
	retrying.Retrying = true
	activated := metav1.NewTime(time.Unix(1, 0)).Time
	for _, c := range []struct {
		name   string
		before v1alpha1.FunctionState
		nodes  []v1alpha1.FunctionNode
		state  v1alpha1.FunctionState
		active int
	}{
		{"nobody speaks", "", nil, v1alpha1.StatePending, 0},
		{"one serves, one failed", "", []v1alpha1.FunctionNode{at("a", 2, v1alpha1.ProgressFailed, 1), at("b", 2, v1alpha1.ProgressReady, 2)}, v1alpha1.StateReady, 2},
		{"one failed, one works", "", []v1alpha1.FunctionNode{at("a", 2, v1alpha1.ProgressFailed, 1), at("b", 2, v1alpha1.ProgressLoading, 0)}, v1alpha1.StatePending, 1},
		{"all failed", "", []v1alpha1.FunctionNode{at("a", 2, v1alpha1.ProgressFailed, 1), at("b", 1, v1alpha1.ProgressReady, 1)}, v1alpha1.StateFailed, 1},
		{"one tries again", "", []v1alpha1.FunctionNode{retrying}, v1alpha1.StatePending, 1},
		{"stepped back", v1alpha1.StateFailed, []v1alpha1.FunctionNode{at("a", 1, v1alpha1.ProgressReady, 1)}, v1alpha1.StateFailed, 1},
		{"a host that leads nowhere", "", []v1alpha1.FunctionNode{at("a", 2, v1alpha1.ProgressReady, 2), at(NodeIngress, 2, v1alpha1.ProgressQueued, 0)}, v1alpha1.StateReady, 2},
		{"failed, and a host that leads nowhere", "", []v1alpha1.FunctionNode{at("a", 2, v1alpha1.ProgressFailed, 1), at(NodeIngress, 2, v1alpha1.ProgressQueued, 0)}, v1alpha1.StateFailed, 1},
		{"ready and lost", v1alpha1.StateReady, nil, v1alpha1.StatePending, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &kube.Function{Status: v1alpha1.FunctionStatus{Revision: 2, History: []v1alpha1.RevisionStatus{{Revision: 1, State: v1alpha1.StateReady, ActivatedAt: &activated}}}}
			if c.before != "" {
				f.Status.History = append(f.Status.History, v1alpha1.RevisionStatus{Revision: 2, State: c.before})
			}
			before := f.DeepCopy()
			st := derive(f, rec, c.nodes, nil)
			if got := st.History[1]; got.State != c.state || st.ActiveRevision != c.active || lastActive(st) != max(c.active, 1) {
				t.Errorf("state %s active %d last %d", got.State, st.ActiveRevision, lastActive(st))
			}
			if diff := cmp.Diff(before, f); diff != "" {
				t.Error("derive changed its input", diff)
			}
			if condition := readyCondition(st); (condition.Status == v1alpha1.ConditionTrue) != (c.state == v1alpha1.StateReady) || condition.Message == "" {
				t.Errorf("condition %+v", condition)
			}
		})
	}
}

func TestOlderNewsIsNoNews(t *testing.T) {
	tab := newTable[int]()
	k := key{Name: "a"}
	steps := []struct {
		what string
		news bool
	}{
		{"own write", tab.put(k, meta{"u", 5}, 5)},
		{"the watch is behind", tab.put(k, meta{"u", 4}, 4)},
		{"the watch has it too", tab.put(k, meta{"u", 5}, 5)},
		{"own deletion", tab.remove(k, "u", time.Now())},
		{"a late event of what is gone", tab.put(k, meta{"u", 6}, 6)},
		{"the watch's deletion", tab.remove(k, "u", time.Now())},
		{"made anew", tab.put(k, meta{"v", 7}, 7)},
		{"a late deletion of the former", tab.remove(k, "u", time.Now())},
	}
	want := []bool{true, false, false, true, false, false, true, false}
	for i, s := range steps {
		if s.news != want[i] {
			t.Errorf("%s: %v", s.what, s.news)
		}
	}
	if !maps.Equal(map[key]int{k: tab.rows[k].value}, map[key]int{k: 7}) {
		t.Error(tab.rows)
	}
	if missing := tab.missing(map[key]bool{}, 6); len(missing) != 0 {
		t.Error("a list from before a write removed it")
	}
}
