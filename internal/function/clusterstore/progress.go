package clusterstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

const (
	// statusWriters bounds how many functions one report writes at once.
	statusWriters = 8
	// maxDetailBytes bounds what a node may say of a failure.
	maxDetailBytes = 4096
	// maxPhases bounds the steps that are recorded of one revision.
	maxPhases = 32
)

// SetProgress implements function.NodeSource. Only functions of which the node
// says something new are written, each with one request.
func (s *Store) SetProgress(ctx context.Context, r v1alpha1.NodeReport) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	if r.Node == "" {
		return &function.ValidationError{Field: "node", Reason: "must name the node that reports"}
	}
	reported := make(map[string]*v1alpha1.FunctionReport, len(r.Functions))
	for i := range r.Functions {
		reported[r.Functions[i].Name] = &r.Functions[i]
	}
	var concerned []key
	s.mem.mu.RLock()
	for name, e := range s.mem.entries {
		// Spin functions are rolled out by others: no node's agent has them.
		if before := nodeOf(e.object.Status.Nodes, r.Node); before != nil || reported[name] != nil {
			concerned = append(concerned, e.key)
		}
	}
	s.mem.mu.RUnlock()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(statusWriters)
	for _, k := range concerned {
		g.Go(func() error {
			return s.writeNode(gctx, k, r.Node, func(rec record, before *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase) {
				return reportedNode(r.Node, reported[k.Name], rec, before)
			})
		})
	}
	return g.Wait()
}

// Observe takes in one node's word on one function; n.Name may be that of
// anything that runs functions, such as "spin". phases say where the time
// went, once n is ready or failed. A revision that is not recorded (any more)
// is passed over. The error is function.ErrNotFound for no such function.
func (s *Store) Observe(ctx context.Context, namespace, name string, n v1alpha1.FunctionNode, phases []v1alpha1.Phase) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	k := key{Namespace: namespace, Name: name}
	e, _, err := s.find(ctx, name)
	if err != nil {
		return err
	}
	if e.key != k {
		return fmt.Errorf("%w: %s", function.ErrNotFound, k)
	}
	r := &v1alpha1.FunctionReport{
		Name: name, Revision: n.Revision, Progress: n.Progress, Serving: n.Serving, Phases: phases, Error: n.Error, Retrying: n.Retrying,
	}
	return s.writeNode(ctx, k, n.Name, func(rec record, before *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase) {
		return reportedNode(n.Name, r, rec, before)
	})
}

func nodeOf(nodes []v1alpha1.FunctionNode, name string) *v1alpha1.FunctionNode {
	i, found := slices.BinarySearchFunc(nodes, name, func(n v1alpha1.FunctionNode, name string) int { return strings.Compare(n.Name, name) })
	if !found {
		return nil
	}
	return &nodes[i]
}

// reportedNode is what a report makes of a node's part of the status: nil for
// none. A report that does not name the function says that the node has not
// got it. That needs no look at the report's generation: a node that has a
// part here has known of the function, and it sends its reports in order.
func reportedNode(node string, r *v1alpha1.FunctionReport, rec record, before *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase) {
	if r == nil {
		return nil, nil
	}
	settled := false
	switch r.Progress {
	case v1alpha1.ProgressReady, v1alpha1.ProgressFailed:
		settled = true
	case v1alpha1.ProgressQueued, v1alpha1.ProgressPulling, v1alpha1.ProgressCompiling, v1alpha1.ProgressLoading:
	default:
		return before, nil
	}
	if !rec.has(r.Revision) {
		return before, nil // it speaks of what is forgotten, or of an earlier function of that name
	}
	n := v1alpha1.FunctionNode{Name: node, Revision: r.Revision, Progress: r.Progress, Serving: r.Serving, Retrying: r.Retrying}
	if n.Serving != 0 && !rec.has(n.Serving) {
		n.Serving = 0
		if before != nil {
			n.Serving = before.Serving
		}
	}
	if r.Error != nil {
		n.Error = &v1alpha1.FunctionError{Code: cut(r.Error.Code, 64), Detail: cut(r.Error.Detail, maxDetailBytes)}
	}
	if n.Progress == v1alpha1.ProgressFailed && n.Error == nil {
		n.Error = &v1alpha1.FunctionError{Code: "internal", Detail: "the node gave no reason"}
	}
	if before != nil && !settled && before.Revision == n.Revision &&
		before.Progress != v1alpha1.ProgressReady && before.Progress != v1alpha1.ProgressFailed {
		n.Progress = before.Progress // steps in between are not written
	}
	if !settled {
		return &n, nil
	}
	phases := r.Phases
	if r.Revision != rec.wanted {
		phases = nil
	}
	return &n, slices.Clone(phases[:min(len(phases), maxPhases)])
}

func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	for len(s) > n {
		s = strings.ToValidUTF8(s[:n-3], "") + "…"
	}
	return s
}

// writeNode replaces one node's part of a function's status.
func (s *Store) writeNode(ctx context.Context, k key, node string,
	change func(rec record, before *v1alpha1.FunctionNode) (*v1alpha1.FunctionNode, []v1alpha1.Phase),
) error {
	// Within a process nodes take turns; conflicts are with others.
	unlock, err := s.statuses.lock(ctx, k.Name)
	if err != nil {
		return err
	}
	defer unlock()
	fresh := false
	for range maxAttempts {
		var f *kube.Function
		if fresh {
			var err error
			if f, err = s.getFunction(ctx, k); err != nil {
				return err
			}
		} else {
			s.mem.mu.RLock()
			f = s.mem.functions.rows[k].value
			s.mem.mu.RUnlock()
		}
		if f == nil {
			return nil // deleted
		}
		rec, ok := readRecord(f.Annotations)
		if !ok {
			return nil
		}
		before := nodeOf(f.Status.Nodes, node)
		after, phases := change(rec, before)
		nodes := slices.DeleteFunc(slices.Clone(f.Status.Nodes), func(n v1alpha1.FunctionNode) bool { return n.Name == node })
		if after != nil {
			nodes = append(nodes, *after)
			slices.SortFunc(nodes, func(a, b v1alpha1.FunctionNode) int { return strings.Compare(a.Name, b.Name) })
		}
		// Once this holds, nothing else in the status can be news.
		if reflect.DeepEqual(before, after) && f.Status.Revision == rec.wanted && f.Status.ObservedGeneration == f.Generation {
			return nil
		}
		err := s.writeStatus(ctx, f, s.statusOf(f, rec, nodes, phases))
		if !errors.Is(err, errConflict) {
			return err
		}
		fresh = true
	}
	return fmt.Errorf("write what %s says of %s: %w: others changed it at each of %d attempts", node, k, function.ErrUnavailable, maxAttempts)
}

// statusOf is the whole status of a function, as it is written.
func (s *Store) statusOf(f *kube.Function, rec record, nodes []v1alpha1.FunctionNode, phases []v1alpha1.Phase) v1alpha1.FunctionStatus {
	st := derive(f, rec, nodes, phases)
	now := s.o.Now().UTC()
	activate(&st, f.Status.ActiveRevision, now)
	st.WantedNodes, st.Warm = 0, ""
	if f.Spec.Runtime == v1alpha1.RuntimeSpin {
		st.WantedNodes = 1
	} else {
		var placement map[string]string
		if p := f.Spec.Placement; p != nil {
			placement = p.NodeSelector
		}
		s.mem.mu.RLock()
		wanted := s.mem.wantedNodes(placement)
		s.mem.mu.RUnlock()
		for _, n := range nodes {
			if n.Name != NodeIngress && !slices.Contains(wanted, n.Name) {
				wanted = append(wanted, n.Name)
			}
		}
		st.WantedNodes = len(wanted)
	}
	if st.WantedNodes > 0 {
		st.Warm = fmt.Sprintf("%d/%d", st.WarmNodes, st.WantedNodes)
	}
	st.URL = ""
	if s.o.Host != nil {
		if host := s.o.Host(f.Namespace, f.Name); host != "" {
			st.URL = "http://" + host + "/"
		}
	}
	c := readyCondition(st)
	if l := f.Spec.Limits; l != nil {
		if w := function.TimeoutIgnored(f.Spec.Runtime, l.TimeoutMS); w != nil {
			c.Message += "; " + w.Detail
		}
	}
	if i := slices.IndexFunc(st.Conditions, func(c v1alpha1.Condition) bool { return c.Type == v1alpha1.ConditionReady }); i >= 0 && rec.of != specHash(f.Spec) {
		switch st.Conditions[i].Reason {
		case ReasonReady, ReasonPending, ReasonRetrying, ReasonFailed:
		default:
			c = st.Conditions[i] // what is refused stays so until it is recorded
		}
	}
	setCondition(&st, c, f.Generation, now)
	return st
}

// writeStatus replaces the status of f, which must be as it was read; else it
// returns errConflict. It writes nothing where nothing changes.
func (s *Store) writeStatus(ctx context.Context, f *kube.Function, st v1alpha1.FunctionStatus) error {
	before, err := json.Marshal(f.Status)
	if err != nil {
		return fmt.Errorf("encode the status of function %s: %w", f.Name, err)
	}
	after, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode the status of function %s: %w", f.Name, err)
	}
	if string(before) == string(after) {
		return nil
	}
	// A merge patch would leave behind members that the new status leaves out.
	patch, err := json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/resourceVersion", "value": f.ResourceVersion},
		{"op": "add", "path": "/status", "value": json.RawMessage(after)},
	})
	if err != nil {
		return fmt.Errorf("encode the status of function %s: %w", f.Name, err)
	}
	ctx, cancel := call(ctx)
	defer cancel()
	made := new(kube.Function)
	err = s.api.Patch(types.JSONPatchType).Namespace(f.Namespace).Resource(v1alpha1.FunctionsResource).Name(f.Name).SubResource("status").
		Param("fieldManager", fieldManager).Body(patch).Do(ctx).Into(made)
	switch {
	case apierrors.IsConflict(err):
		return errConflict
	case apierrors.IsNotFound(err) && !notServed(err):
		return nil // deleted meanwhile
	case err != nil:
		return storeError("write the status of function "+f.Namespace+"/"+f.Name, err)
	}
	s.mem.putFunction(slim(made))
	return nil
}
