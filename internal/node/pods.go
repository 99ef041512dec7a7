package node

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// systemNodeCritical is the value of the priority class of that name; whatever
// is at least as important is part of the node itself.
const systemNodeCritical = 2_000_001_000

// systemClusterCritical is the value of that class (CoreDNS and the like).
const systemClusterCritical = 2_000_000_000

// wave is when a pod leaves during a drain.
type wave int

const (
	// stays: part of the node (mirror, DaemonSet, node-critical), finished, or
	// not ours to end.
	stays wave = iota
	// ordinary pods leave first.
	ordinary
	// critical pods (cluster-critical) leave once the ordinary ones are gone:
	// those may need them to end well.
	critical
	// own is this very process's pod, where it is not part of a DaemonSet.
	own
)

// waveOf says when a pod leaves. unmanaged says whether pods leave that nothing
// will start again elsewhere.
func waveOf(p *corev1.Pod, self podName, unmanaged bool) wave {
	controller := metav1.GetControllerOfNoCopy(p)
	switch {
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		return stays
	case p.Annotations[corev1.MirrorPodAnnotationKey] != "":
		return stays
	case controller != nil && controller.Kind == "DaemonSet":
		// It would be started again here at once: it tolerates the cordon.
		return stays
	case p.Spec.PriorityClassName == "system-node-critical" || priority(p) >= systemNodeCritical:
		return stays
	case self == nameOf(p):
		return own
	case controller == nil && !unmanaged:
		return stays
	case priority(p) >= systemClusterCritical:
		return critical
	}
	return ordinary
}

type podName struct{ namespace, name string }

func nameOf(p *corev1.Pod) podName { return podName{p.Namespace, p.Name} }

func (n podName) String() string { return n.namespace + "/" + n.name }

func priority(p *corev1.Pod) int32 {
	if p.Spec.Priority == nil {
		return 0
	}
	return *p.Spec.Priority
}

// graceFor returns the grace period in seconds for ending p when the machine
// stops after left (negative: no deadline is known), or nil for the pod's own.
// It never lengthens a pod's own, and is never 0, which would mean to forget
// the pod while it still runs.
func graceFor(p *corev1.Pod, left, margin time.Duration, hasDeadline bool) *int64 {
	if !hasDeadline {
		return nil
	}
	own := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if p.Spec.TerminationGracePeriodSeconds != nil {
		own = *p.Spec.TerminationGracePeriodSeconds
	}
	grace := max(1, int64((left-margin)/time.Second))
	if grace >= own {
		return nil
	}
	return &grace
}
