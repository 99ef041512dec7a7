package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"

	"github.com/hearth-sh/hearth/test/bench/report"
)

// settle is between two pods: what the last one left to clean up must not be
// measured with the next.
const settle = 2 * time.Second

// warmEach is time for the agent to warm one large image, which is compiled
// twice, by the shim and for the store: half a minute of a processor, on a
// machine that may have eight times as much to do.
const warmEach = 4 * time.Minute

// phases are the parts of a pod's way, each from the end of the one before.
type phases struct {
	scheduled time.Duration // from the request until the scheduler chose the node
	sandbox   time.Duration // until the pod's sandbox runs
	pulled    time.Duration // until the container is on record: its image is here
	created   time.Duration // until the shim has created the task: Wasm is compiled
	started   time.Duration // until the task is started
	said      time.Duration // until the module itself has written its first line
	seen      time.Duration // from the task's start until the API says Running
	cpu       time.Duration // of all processes of the node, over the whole way
}

// running is the whole way after scheduling, until the module runs. A started
// task alone does not say so: where runwasi could not keep what it compiled, it
// goes on with the original module, which is then compiled after the start.
func (p phases) running() time.Duration {
	return p.sandbox + p.pulled + p.created + p.started + p.said
}

// how is one warmth of a node for an image.
type how struct {
	name, node string
	prepare    func(context.Context, *bench, string) error
}

var warmths = []how{
	{"cold", bareNode, nil},
	{"image pulled", bareNode, pullOnly},
	{"warm by the agent", agentNode, nil}, // all at once, beforehand
}

// pullOnly has containerd pull as a kubelet would, and nothing more.
func pullOnly(ctx context.Context, b *bench, reference string) error {
	_, service, connection, err := b.cluster.Node(bareNode).CRI()
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = service.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reference}})
	return err
}

// warmth measures a pod's way to running on a node that knows nothing of its
// image, on one that has it, and on one whose agent was told of it before.
func warmth(ctx context.Context, b *bench) error {
	module, err := b.largeModule(ctx)
	if err != nil {
		return err
	}
	var references [3][]string
	for round := range b.rounds {
		for i := range warmths {
			// The same code under another digest each time: nobody has it.
			reference, err := b.push(ctx, "bench/large", variant(module, round*len(warmths)+i))
			if err != nil {
				return err
			}
			references[i] = append(references[i], reference)
		}
	}
	pid, err := b.agentPID(ctx)
	if err != nil {
		return err
	}
	var lines []string
	for _, r := range references[2] {
		lines = append(lines, r+" handler="+handler)
	}
	ownBefore, childrenBefore, err := processCPU(pid)
	if err != nil {
		return err
	}
	nodeBefore, err := b.nodeCPU(agentNode)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := b.want(ctx, soon+time.Duration(b.rounds)*warmEach, lines); err != nil {
		return err
	}
	took := time.Since(begin)
	own, children, err := processCPU(pid)
	if err != nil {
		return err
	}
	nodeAfter, err := b.nodeCPU(agentNode)
	if err != nil {
		return err
	}

	var measured [3][]phases
	for round := range b.rounds {
		for i, h := range warmths {
			reference := references[i][round]
			if h.prepare != nil {
				if err := h.prepare(ctx, b, reference); err != nil {
					return fmt.Errorf("%s: %w", h.name, err)
				}
			}
			p, err := b.startPod(ctx, fmt.Sprintf("pod-%d-%d", round, i), h.node, reference)
			if err != nil {
				return fmt.Errorf("a pod whose image is %s: %w", h.name, err)
			}
			if b.verbose {
				fmt.Fprintf(os.Stderr, "  %s: %+v\n", h.name, p)
			}
			measured[i] = append(measured[i], p)
		}
	}

	b.table.Title(fmt.Sprintf("Pod with a Wasm image of %.1f MB (medians of %d pods of each kind, in turns)", float64(len(module))/1e6, b.rounds))
	of := func(i int, part func(phases) time.Duration) time.Duration {
		var values []time.Duration
		for _, p := range measured[i] {
			values = append(values, part(p))
		}
		return report.Median(values)
	}
	for i, h := range warmths {
		relation := ""
		if i > 0 {
			relation = fmt.Sprintf("%.1f× faster than cold", float64(of(0, phases.running))/float64(of(i, phases.running)))
		}
		b.table.Add(h.name+": scheduled to running", show(of(i, phases.running)), relation)
		for _, part := range []struct {
			name string
			get  func(phases) time.Duration
		}{
			{"scheduled (before that)", func(p phases) time.Duration { return p.scheduled }},
			{"sandbox runs", func(p phases) time.Duration { return p.sandbox }},
			{"image here, container on record", func(p phases) time.Duration { return p.pulled }},
			{"task created: Wasm compiled", func(p phases) time.Duration { return p.created }},
			{"task started", func(p phases) time.Duration { return p.started }},
			{"first line of the module's output", func(p phases) time.Duration { return p.said }},
			{"task started to seen Running in the API", func(p phases) time.Duration { return p.seen }},
			{"processor time of the node meanwhile", func(p phases) time.Duration { return p.cpu }},
		} {
			b.table.Add("   "+part.name, show(of(i, part.get)), "")
		}
	}
	create := func(p phases) time.Duration { return p.created + p.started + p.said }
	ratio := float64(of(1, create)) / float64(max(of(2, create), time.Microsecond))
	b.table.Hold("container on record to the module's output, when warm", show(of(2, create)), fmt.Sprintf("%.0f× less than unwarmed", ratio), "≥ 4×", ratio >= 4)
	n := time.Duration(b.rounds)
	b.table.Add("the agent warms such an image in", show(took/n), fmt.Sprintf("processor: shim and containerd %s, agent %s, its precompile children %s",
		show((nodeAfter-nodeBefore-(own-ownBefore)-(children-childrenBefore))/n), show((own-ownBefore)/n), show((children-childrenBefore)/n)))
	return nil
}

// startPod creates a pod on a node, waits until the API says that it runs,
// removes it and returns how long each part took.
func (b *bench) startPod(ctx context.Context, name, node, reference string) (phases, error) {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	pods := b.cluster.Client().CoreV1().Pods(metav1.NamespaceDefault)
	// "0" begins with what the API server's cache has; without it a busy API
	// server refuses when its cache is not up to date within 3 s.
	watcher, err := pods.Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(), ResourceVersion: "0",
	})
	if err != nil {
		return phases{}, err
	}
	defer watcher.Stop()
	cpu, err := b.nodeCPU(node)
	if err != nil {
		return phases{}, err
	}
	begin := time.Now()
	if _, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			RuntimeClassName: ptr.To(runtimeClass), RestartPolicy: corev1.RestartPolicyNever,
			NodeSelector:                 map[string]string{corev1.LabelHostname: node},
			AutomountServiceAccountToken: ptr.To(false), TerminationGracePeriodSeconds: ptr.To[int64](0),
			Containers: []corev1.Container{{Name: "main", Image: reference, ImagePullPolicy: corev1.PullIfNotPresent}},
		},
	}, metav1.CreateOptions{}); err != nil {
		return phases{}, err
	}
	var scheduled, seen time.Time
	pod, err := follow(ctx, watcher, func(pod *corev1.Pod) (bool, error) {
		if scheduled.IsZero() && pod.Spec.NodeName != "" {
			scheduled = time.Now()
		}
		if pod.Status.Phase == corev1.PodFailed {
			return false, fmt.Errorf("it failed: %+v", pod.Status.ContainerStatuses)
		}
		return pod.Status.Phase == corev1.PodRunning, nil
	})
	if err != nil {
		return phases{}, err
	}
	seen = time.Now()
	said, err := b.firstLine(ctx, node, pod)
	if err != nil {
		return phases{}, err
	}
	after, err := b.nodeCPU(node)
	if err != nil {
		return phases{}, err
	}
	id, log := containerID(pod), b.events[node]
	container, err1 := log.of(topicContainer, id)
	created, err2 := log.of(topicCreated, id)
	started, err3 := log.of(topicStarted, id)
	sandbox, err4 := log.sandboxOf(container, begin)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return phases{}, err
	}
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: ptr.To[int64](0)}); err != nil {
		return phases{}, err
	}
	select {
	case <-ctx.Done():
		return phases{}, ctx.Err()
	case <-time.After(settle):
	}
	return phases{
		scheduled: scheduled.Sub(begin), sandbox: sandbox.Sub(scheduled), pulled: container.Sub(sandbox),
		created: created.Sub(container), started: started.Sub(created), said: said.Sub(started), seen: seen.Sub(started), cpu: after - cpu,
	}, nil
}

// firstLine waits for the first line of a pod's only container and returns the
// time that containerd gave it in the container's log (CRI's log format:
// "2026-11-22T04:10:02.445291912Z stdout F running").
func (b *bench) firstLine(ctx context.Context, node string, pod *corev1.Pod) (time.Time, error) {
	path := b.cluster.Node(node).Path(fmt.Sprintf("/var/log/pods/%s_%s_%s/main/0.log", pod.Namespace, pod.Name, pod.UID))
	for {
		content, err := os.ReadFile(path)
		if stamp, _, ok := strings.Cut(string(content), " "); err == nil && ok {
			return time.Parse(time.RFC3339Nano, stamp)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return time.Time{}, fmt.Errorf("waiting for output in %s: %w", path, err)
		}
	}
}

// follow hands every state of an object to ok until it says yes.
func follow[T any](ctx context.Context, watcher watch.Interface, ok func(*T) (bool, error)) (*T, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case change, open := <-watcher.ResultChan():
			if !open {
				return nil, errors.New("the API server ended the watch")
			}
			object, is := change.Object.(any).(*T)
			if !is {
				return nil, fmt.Errorf("the watch says %+v", change.Object)
			}
			if done, err := ok(object); done || err != nil {
				return object, err
			}
		}
	}
}
