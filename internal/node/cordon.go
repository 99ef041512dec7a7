package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"

	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// cordon marks the Node unschedulable and writes down, in the same request,
// for what notice and, if it was not so before, that it was us.
func (d *Drainer) cordon(ctx context.Context, notice Notice) error {
	written := notice
	written.At, written.Deadline = notice.At.UTC(), notice.Deadline.UTC() // whatever this machine's zone
	record, err := json.Marshal(written)
	if err != nil {
		return fmt.Errorf("encode the notice: %w", err)
	}
	return retryOnConflict(ctx, d.o.Clock, func(ctx context.Context) error {
		n, err := get(ctx, d.clients.Node, d.clients.NodeName)
		if err != nil {
			return err
		}
		annotations := map[string]any{}
		if n.Annotations[v1alpha1.AnnotationInterruption] != string(record) {
			annotations[v1alpha1.AnnotationInterruption] = string(record)
		}
		owner := n.Annotations[v1alpha1.AnnotationCordonedBy]
		body := map[string]any{}
		switch {
		case !n.Spec.Unschedulable:
			body["spec"] = map[string]any{"unschedulable": true}
			annotations[v1alpha1.AnnotationCordonedBy] = string(notice.Kind)
		case owner != "" && owner != string(notice.Kind):
			annotations[v1alpha1.AnnotationCordonedBy] = string(notice.Kind)
		}
		if len(annotations) == 0 && len(body) == 0 {
			return nil
		}
		metadata := version(n)
		metadata["annotations"] = annotations
		body["metadata"] = metadata
		if _, err = patch(ctx, d.clients.Node, n.Name, types.MergePatchType, body); err != nil {
			return err
		}
		if body["spec"] != nil {
			d.o.Logger.Warn("node cordoned", "node", n.Name, "notice", notice.Kind)
			d.o.Events.Node(n, Warning, "Cordoned", fmt.Sprintf("No new pods because of a notice of %s%s.", notice.Kind, until(notice.Deadline)))
		}
		return nil
	})
}

// uncordon takes back what cordon did. A cordon of somebody else stays.
func (d *Drainer) uncordon(ctx context.Context, why string) error {
	return retryOnConflict(ctx, d.o.Clock, func(ctx context.Context) error {
		n, err := get(ctx, d.clients.Node, d.clients.NodeName)
		if err != nil {
			return err
		}
		annotations := map[string]any{}
		for _, key := range []string{v1alpha1.AnnotationInterruption, v1alpha1.AnnotationCordonedBy} {
			if _, there := n.Annotations[key]; there {
				annotations[key] = nil
			}
		}
		if len(annotations) == 0 {
			return nil
		}
		metadata := version(n)
		metadata["annotations"] = annotations
		body := map[string]any{"metadata": metadata}
		_, ours := n.Annotations[v1alpha1.AnnotationCordonedBy]
		if ours && n.Spec.Unschedulable {
			body["spec"] = map[string]any{"unschedulable": nil}
		}
		if _, err = patch(ctx, d.clients.Node, n.Name, types.MergePatchType, body); err != nil {
			return err
		}
		d.o.Logger.Info("node given back", "node", n.Name, "uncordoned", body["spec"] != nil, "reason", why)
		d.o.Events.Node(n, Normal, "Uncordoned", why)
		return nil
	})
}

// giveBack undoes what a notice led to and says whether that was done before
// ctx ended.
func (d *Drainer) giveBack(ctx context.Context, notice Notice, expired bool) bool {
	why := fmt.Sprintf("The notice of %s was withdrawn.", notice.Kind)
	if expired {
		why = fmt.Sprintf("The notice of %s was followed by nothing.", notice.Kind)
	}
	d.keepTrying(ctx, "remove the taint", func(ctx context.Context) error {
		err := d.taints.Interrupted(ctx, false)
		if errors.Is(err, ErrNoTaintAuthority) {
			d.o.Logger.Warn("interruption taint not removed", "reason", err)
			return nil
		}
		return err
	})
	d.keepTrying(ctx, "uncordon", func(ctx context.Context) error { return d.uncordon(ctx, why) })
	if ctx.Err() != nil {
		return false
	}
	d.report(func(s *DrainStatus) { *s = DrainStatus{Phase: DrainIdle, Since: s.Since} })
	return true
}

// resume returns the notice that an earlier process was acting upon. One that
// has expired meanwhile (the instance was stopped and started again) is
// returned too: Run gives the node back at once.
func (d *Drainer) resume(ctx context.Context) (Notice, bool) {
	for {
		n, err := get(ctx, d.clients.Node, d.clients.NodeName)
		if err == nil {
			record, there := n.Annotations[v1alpha1.AnnotationInterruption]
			if !there {
				return Notice{}, false
			}
			notice, err := parseNotice(record)
			if err != nil {
				d.o.Logger.Warn("the notice on the node is not understood and is ignored", "node", n.Name, "error", err)
				return Notice{}, false
			}
			d.o.Logger.Info("going on with a notice that an earlier process acted upon", "node", n.Name, "notice", notice.Kind, "deadline", notice.Deadline)
			return notice.anchored(d.o.Clock.Now()), true
		}
		// A notice that comes meanwhile is more urgent than an old one.
		select {
		case <-ctx.Done():
			return Notice{}, false
		case notice := <-d.notices:
			return notice, true
		case <-d.o.Clock.After(d.o.PollEvery/2 + rand.N(d.o.PollEvery)):
		}
	}
}
