package clusterstore

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// NodeIngress is the name under which Observe is told that a host does not lead
// to a function. It is no node: it counts for nothing, serves nothing and is
// collected by nobody; condition Ready repeats its error.
const NodeIngress = "ingress"

// NodeSpin is the name under which Observe is told of pods that run a function.
// It is no node either; whoever takes the pods away says so with Unobserve, and
// until then they may answer for a function that is resident by now.
const NodeSpin = "spin"

// derive is the status of a function, given what its nodes say. It depends on
// nothing but its arguments, so that whoever writes it writes the same, and
// whoever reads an object whose status is not written yet sees what will be.
// It leaves times, conditions and the number of wanted nodes as they are.
// phases are those that the report behind it came with, if it is ready or failed.
func derive(f *kube.Function, rec record, nodes []v1alpha1.FunctionNode, phases []v1alpha1.Phase) v1alpha1.FunctionStatus {
	prev := f.Status
	st := kube.CopyStatus(prev)
	st.Nodes, st.Revision, st.ObservedGeneration = nodes, rec.wanted, f.Generation

	var wanted v1alpha1.RevisionStatus
	st.History = st.History[:0]
	for _, h := range prev.History {
		switch {
		case h.Revision == rec.wanted:
			wanted = h
		case rec.has(h.Revision):
			st.History = append(st.History, h)
		}
	}
	if prev.Revision != rec.wanted || prev.ObservedGeneration != f.Generation {
		// What was said of this revision was said before it was wanted (again).
		wanted = v1alpha1.RevisionStatus{ActivatedAt: wanted.ActivatedAt}
	}
	wanted.Revision = rec.wanted
	if wanted.State == "" {
		wanted.State = v1alpha1.StatePending
	}

	var reports, working, serving int
	var failure, obstacle *v1alpha1.FunctionError
	st.WarmNodes = 0
	for i := range nodes {
		n := &nodes[i]
		if n.Name == NodeIngress {
			continue
		}
		if n.Serving == rec.wanted {
			serving++
		}
		if n.Revision != rec.wanted {
			continue
		}
		reports++
		switch {
		case n.Progress != v1alpha1.ProgressFailed:
			working++
			if n.Retrying && obstacle == nil { // it waits for what is in its way
				obstacle = n.Error
			}
		case n.Retrying:
			working++
			if obstacle == nil {
				obstacle = n.Error
			}
		case failure == nil:
			failure = n.Error
		}
	}
	st.WarmNodes = serving
	was := wanted.State
	switch {
	case serving > 0:
		wanted.State, wanted.Error, wanted.Retrying = v1alpha1.StateReady, nil, false
	case reports == 0:
		// Nobody speaks of it: what failed stays failed until it is wanted anew.
		if wanted.State == v1alpha1.StateReady {
			wanted.State = v1alpha1.StatePending
		}
	case working > 0:
		wanted.State, wanted.Error, wanted.Retrying = v1alpha1.StatePending, obstacle, obstacle != nil
	default:
		wanted.State, wanted.Error, wanted.Retrying = v1alpha1.StateFailed, failure, false
	}
	// A node that loads a revision again reports fewer steps than the one that
	// was ready first.
	if len(phases) > 0 && (len(wanted.Phases) == 0 || was != v1alpha1.StateReady && len(phases) >= len(wanted.Phases)) {
		wanted.Phases = slices.Clone(phases)
	}
	st.History = append(st.History, wanted)
	slices.SortFunc(st.History, func(a, b v1alpha1.RevisionStatus) int { return cmp.Compare(a.Revision, b.Revision) })

	st.ActiveRevision = active(st, rec)
	if st.WantedNodes = max(st.WantedNodes, 0); st.WantedNodes > 0 {
		st.Warm = fmt.Sprintf("%d/%d", st.WarmNodes, max(st.WantedNodes, st.WarmNodes))
	}
	return st
}

// active is the revision that answers requests: the wanted one where any node
// has it, else the one that answered last, else the newest that answers.
func active(st v1alpha1.FunctionStatus, rec record) int {
	newest, last := 0, lastActivated(st)
	var hasLast bool
	for _, n := range st.Nodes {
		if n.Name == NodeIngress {
			continue
		}
		switch n.Serving {
		case 0:
		case rec.wanted:
			return rec.wanted
		case last:
			hasLast = true
		}
		newest = max(newest, n.Serving)
	}
	if hasLast {
		return last
	}
	return newest
}

func lastActivated(st v1alpha1.FunctionStatus) int {
	number, at := 0, time.Time{}
	for _, h := range st.History {
		if h.ActivatedAt != nil && h.ActivatedAt.After(at) {
			number, at = h.Revision, *h.ActivatedAt
		}
	}
	return number
}

// lastActive is the revision that answers, or did last.
func lastActive(st v1alpha1.FunctionStatus) int {
	return cmp.Or(st.ActiveRevision, lastActivated(st))
}

// activate notes the time when another revision began to answer.
func activate(st *v1alpha1.FunctionStatus, before int, now time.Time) {
	if st.ActiveRevision == 0 || st.ActiveRevision == before {
		return
	}
	for i := range st.History {
		if st.History[i].Revision == st.ActiveRevision {
			st.History[i].ActivatedAt = &now
			return
		}
	}
	st.History = append(st.History, v1alpha1.RevisionStatus{Revision: st.ActiveRevision, State: v1alpha1.StatePending, ActivatedAt: &now})
	slices.SortFunc(st.History, func(a, b v1alpha1.RevisionStatus) int { return cmp.Compare(a.Revision, b.Revision) })
}

// Reasons of the condition Ready. Those of a refused spec that an Admission has
// stand beside them.
const (
	ReasonReady       = "Ready"
	ReasonPending     = "Pending"
	ReasonRetrying    = "Retrying"
	ReasonFailed      = "Failed"
	ReasonNameTaken   = "NameTaken"
	ReasonHostTaken   = "HostTaken"
	ReasonInvalidSpec = "InvalidSpec"
)

// readyCondition sums a status up.
func readyCondition(st v1alpha1.FunctionStatus) v1alpha1.Condition {
	c := v1alpha1.Condition{Type: v1alpha1.ConditionReady, Status: v1alpha1.ConditionFalse, Reason: ReasonPending}
	i := slices.IndexFunc(st.History, func(h v1alpha1.RevisionStatus) bool { return h.Revision == st.Revision })
	if i < 0 {
		return c
	}
	h := st.History[i]
	detail := ""
	if h.Error != nil {
		detail = strings.TrimRight(h.Error.Code+": "+h.Error.Detail, ": ")
	}
	instead := ""
	if st.ActiveRevision != 0 && st.ActiveRevision != st.Revision {
		instead = fmt.Sprintf("; revision %d answers meanwhile", st.ActiveRevision)
	}
	switch {
	case h.State == v1alpha1.StateReady:
		c.Status, c.Reason = v1alpha1.ConditionTrue, ReasonReady
		c.Message = fmt.Sprintf("revision %d answers requests", st.Revision)
		for _, n := range st.Nodes {
			if n.Revision == st.Revision && n.Progress == v1alpha1.ProgressReady && n.Error != nil {
				c.Message += "; " + n.Error.Detail // such as of an autoscaler
				break
			}
		}
	case h.State == v1alpha1.StateFailed:
		c.Reason, c.Message = ReasonFailed, fmt.Sprintf("revision %d cannot be served: %s%s", st.Revision, detail, instead)
	case h.Retrying:
		c.Reason, c.Message = ReasonRetrying, fmt.Sprintf("revision %d is tried again: %s%s", st.Revision, detail, instead)
	default:
		c.Message = fmt.Sprintf("revision %d is on its way to the nodes%s", st.Revision, instead)
	}
	if n := nodeOf(st.Nodes, NodeIngress); n != nil && n.Error != nil {
		c.Message += "; " + n.Error.Detail
	}
	return c
}

// setCondition replaces the condition of that type; the time of its last
// transition stays while the status does.
func setCondition(st *v1alpha1.FunctionStatus, c v1alpha1.Condition, generation int64, now time.Time) {
	c.ObservedGeneration = generation
	c.LastTransitionTime = now.UTC().Truncate(time.Second)
	for i, old := range st.Conditions {
		if old.Type != c.Type {
			continue
		}
		if old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
		st.Conditions[i] = c
		return
	}
	st.Conditions = append(st.Conditions, c)
}
