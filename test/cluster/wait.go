package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
)

const (
	// pollInterval is between two looks of WaitFor.
	pollInterval = 100 * time.Millisecond
	// nodeTimeout is for a node to be Ready.
	nodeTimeout = 90 * time.Second
	// podTimeout is for a pod to get where a test wants it.
	podTimeout = 60 * time.Second
	// maxLogBytes bounds the log of a pod.
	maxLogBytes = 4 << 20
)

// WaitFor asks ok until it says yes, returns an error, timeout has passed or
// ctx ends. what completes the sentence "timed out waiting for ...".
func (c *Cluster) WaitFor(ctx context.Context, what string, timeout time.Duration, ok func(context.Context) (bool, error)) error {
	err := wait.PollUntilContextTimeout(ctx, pollInterval, timeout, true, ok)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		return fmt.Errorf("timed out after %s waiting for %s", timeout, what)
	default:
		return fmt.Errorf("waiting for %s: %w", what, err)
	}
}

// WaitNode waits until the node is as ok wants it. A node that is not there
// yet, or an API server that does not answer, is waited for as well; a kubelet
// that ended for good is not.
func (c *Cluster) WaitNode(ctx context.Context, name, what string, timeout time.Duration, ok func(*corev1.Node) bool) error {
	return c.WaitFor(ctx, fmt.Sprintf("node %s %s", name, what), timeout, func(ctx context.Context) (bool, error) {
		if m := c.machines[name]; m != nil {
			if err := m.kubelet.exited(); err != nil {
				return false, err
			}
		}
		node, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		return err == nil && ok(node), nil
	})
}

// WaitNodeReady waits until the node is Ready and takes pods.
func (c *Cluster) WaitNodeReady(ctx context.Context, name string) error {
	return c.WaitNode(ctx, name, "to be Ready", nodeTimeout, func(node *corev1.Node) bool {
		for _, taint := range node.Spec.Taints {
			if taint.Key == corev1.TaintNodeNotReady {
				return false
			}
		}
		return NodeReady(node)
	})
}

// NodeReady says whether the node's condition Ready is True.
func NodeReady(node *corev1.Node) bool {
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// WaitPod waits at most a minute until the pod is as ok wants it and returns
// it. It gives up early when the pod failed and ok did not want that.
func (c *Cluster) WaitPod(ctx context.Context, namespace, name, what string, ok func(*corev1.Pod) bool) (*corev1.Pod, error) {
	var last *corev1.Pod
	err := c.WaitFor(ctx, fmt.Sprintf("pod %s/%s %s", namespace, name, what), podTimeout, func(ctx context.Context) (bool, error) {
		pod, err := c.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, nil
		}
		last = pod
		if ok(pod) {
			return true, nil
		}
		if pod.Status.Phase == corev1.PodFailed {
			return false, errors.New("the pod failed")
		}
		return false, nil
	})
	if err != nil {
		return last, fmt.Errorf("%w; %s", err, c.describe(namespace, name, last))
	}
	return last, nil
}

// WaitPodSucceeded waits until every container of the pod ended with status 0.
func (c *Cluster) WaitPodSucceeded(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return c.WaitPod(ctx, namespace, name, "to succeed", func(pod *corev1.Pod) bool { return pod.Status.Phase == corev1.PodSucceeded })
}

// WaitPodReady waits until the pod's condition Ready is True.
func (c *Cluster) WaitPodReady(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return c.WaitPod(ctx, namespace, name, "to be ready", func(pod *corev1.Pod) bool {
		for _, condition := range pod.Status.Conditions {
			if condition.Type == corev1.PodReady {
				return condition.Status == corev1.ConditionTrue
			}
		}
		return false
	})
}

// describe says why a pod is not where it should be.
func (c *Cluster) describe(namespace, name string, pod *corev1.Pod) string {
	if pod == nil {
		return "there is no such pod"
	}
	text := fmt.Sprintf("phase %s", pod.Status.Phase)
	for _, status := range pod.Status.ContainerStatuses {
		switch state := status.State; {
		case state.Waiting != nil:
			text += fmt.Sprintf("; container %s waits: %s %s", status.Name, state.Waiting.Reason, state.Waiting.Message)
		case state.Terminated != nil:
			text += fmt.Sprintf("; container %s ended with %d %s %s", status.Name, state.Terminated.ExitCode, state.Terminated.Reason, state.Terminated.Message)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	events, err := c.client.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + name, Limit: 50})
	if err != nil {
		return text
	}
	for _, event := range events.Items {
		text += fmt.Sprintf("\n  event %s (%d): %s", event.Reason, event.Count, event.Message)
	}
	return text
}

// PodLogs returns what the container has written, 4 MiB of it at most; an
// empty container name means the only one.
func (c *Cluster) PodLogs(ctx context.Context, namespace, name, container string) (string, error) {
	stream, err := c.client.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{Container: container}).Stream(ctx)
	if err != nil {
		return "", fmt.Errorf("reading the log of pod %s/%s: %w", namespace, name, err)
	}
	defer stream.Close()
	text, err := io.ReadAll(io.LimitReader(stream, maxLogBytes))
	return string(text), err
}

// waitDefaultServiceAccount waits until pods can be made in namespace default.
func (c *Cluster) waitDefaultServiceAccount(ctx context.Context) error {
	return c.WaitFor(ctx, "the controller manager to make the default service account", nodeTimeout, func(ctx context.Context) (bool, error) {
		if err := errors.Join(c.manager.exited(), c.sched.exited()); err != nil {
			return false, err
		}
		_, err := c.client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return false, err
		}
		return err == nil, nil
	})
}
