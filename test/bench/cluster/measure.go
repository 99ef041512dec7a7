package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
)

// kubernetesNamespace is containerd's for what the CRI plugin runs.
const kubernetesNamespace = "k8s.io"

// maxEvents bounds what is kept of one node's events; a run has a few thousand.
const maxEvents = 100_000

// event is one of containerd's, with its own time.
type event struct {
	at    time.Time
	topic string
	id    string // of the container
}

// events follows containerd of one node.
type events struct {
	client *containerd.Client
	cancel context.CancelFunc
	done   chan struct{}

	mu  sync.Mutex
	all []event
	err error
}

// listen follows the events of what the CRI plugin runs on a node.
func listen(ctx context.Context, m *cluster.Machine) (*events, error) {
	client, err := m.Containerd()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, kubernetesNamespace))
	e := &events{client: client, cancel: cancel, done: make(chan struct{})}
	stream, failed := client.Subscribe(ctx, "namespace=="+kubernetesNamespace)
	go func() {
		defer close(e.done)
		for {
			select {
			case envelope := <-stream:
				if envelope == nil {
					return
				}
				id := ""
				if decoded, err := typeurl.UnmarshalAny(envelope.Event); err == nil {
					switch v := decoded.(type) {
					case *eventtypes.ContainerCreate:
						id = v.ID
					case *eventtypes.TaskCreate:
						id = v.ContainerID
					case *eventtypes.TaskStart:
						id = v.ContainerID
					}
				}
				e.mu.Lock()
				if id != "" && len(e.all) < maxEvents {
					e.all = append(e.all, event{envelope.Timestamp, envelope.Topic, id})
				}
				e.mu.Unlock()
			case err := <-failed:
				e.mu.Lock()
				e.err = err
				e.mu.Unlock()
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return e, nil
}

func (e *events) close() error {
	e.cancel()
	<-e.done
	return e.client.Close()
}

// of returns when something first happened to a container.
func (e *events) of(topic, id string) (time.Time, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, v := range e.all {
		if v.topic == topic && v.id == id {
			return v.at, nil
		}
	}
	return time.Time{}, errors.Join(fmt.Errorf("containerd told of no %s for container %s", topic, id), e.err)
}

// sandboxOf returns the container whose task was started last before a
// container was created: on a node where one pod starts at a time, its sandbox.
func (e *events) sandboxOf(created, after time.Time) (time.Time, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, v := range slices.Backward(e.all) {
		if v.topic == topicStarted && v.at.Before(created) && v.at.After(after) {
			return v.at, nil
		}
	}
	return time.Time{}, errors.Join(errors.New("containerd told of no started sandbox"), e.err)
}

// containerd's topics (api/events and core/runtime/events.go).
const (
	topicContainer = "/containers/create"
	topicCreated   = "/tasks/create"
	topicStarted   = "/tasks/start"
)

// nodeCPU is the processor time that all processes of a node have used,
// ended ones included: containerd, kubelet, shims and pods.
func (b *bench) nodeCPU(node string) (time.Duration, error) {
	// 198.18.S.1 is the address of the cluster in slot S, whose cgroup is
	// /hearthS.
	parts := strings.Split(b.cluster.HostIP(), ".")
	if len(parts) != 4 {
		return 0, fmt.Errorf("the cluster's address %s is not IPv4", b.cluster.HostIP())
	}
	group := filepath.Join("hearth"+parts[2], node)
	if text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/cpuacct", group, "cpuacct.usage")); err == nil {
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return time.Duration(n), err
	}
	text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", group, "cpu.stat"))
	if err != nil {
		return 0, fmt.Errorf("read the processor time of node %s: %w", node, err)
	}
	n, err := field(string(text), "usage_usec")
	return time.Duration(n) * time.Microsecond, err
}

// field finds "name 123" or "name: 123 kB" in a file of /proc or cgroups.
func field(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) >= 2 && strings.TrimSuffix(words[0], ":") == name {
			return strconv.ParseInt(words[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s is not there", name)
}

// agentPod returns the running agent's pod.
func (b *bench) agentPod(ctx context.Context) (*corev1.Pod, error) {
	pods, err := b.cluster.Client().CoreV1().Pods(chart.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentPods})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil && len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].State.Running != nil {
			return &p, nil
		}
	}
	return nil, errors.New("the agent's pod does not run")
}

// agentPID returns the agent's process id on this machine.
func (b *bench) agentPID(ctx context.Context) (int, error) {
	pod, err := b.agentPod(ctx)
	if err != nil {
		return 0, err
	}
	ctx = namespaces.WithNamespace(ctx, kubernetesNamespace)
	container, err := b.events[agentNode].client.LoadContainer(ctx, containerID(pod))
	if err != nil {
		return 0, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return 0, err
	}
	return int(task.Pid()), nil
}

func containerID(pod *corev1.Pod) string {
	if len(pod.Status.ContainerStatuses) == 0 {
		return ""
	}
	return strings.TrimPrefix(pod.Status.ContainerStatuses[0].ContainerID, "containerd://")
}

// memory is what a process takes, in bytes; smaps_rollup in proc_pid_smaps(5).
type memory struct {
	rss, pss  int64
	anonymous int64 // of rss: what is the process's own
	peak      int64 // of rss, since clearPeak
}

func memoryOf(pid int) (memory, error) {
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return memory{}, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return memory{}, err
	}
	var m memory
	for _, v := range []struct {
		to   *int64
		text []byte
		name string
	}{{&m.rss, rollup, "Rss"}, {&m.pss, rollup, "Pss"}, {&m.anonymous, rollup, "Anonymous"}, {&m.peak, status, "VmHWM"}} {
		n, err := field(string(v.text), v.name)
		if err != nil {
			return m, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		*v.to = n << 10
	}
	return m, nil
}

// clearPeak begins the peak of a process anew; clear_refs in proc(5).
func clearPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// ticksPerSecond is sysconf(_SC_CLK_TCK), 100 on every Linux that Go runs on.
const ticksPerSecond = 100

// processCPU is the processor time of a process, and that of its children that
// have ended: fields 14 to 17 of /proc/<pid>/stat.
func processCPU(pid int) (own, children time.Duration, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name, field 2, is in parentheses and may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 15 {
		return 0, 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	var ticks [4]int64
	for i := range ticks {
		if ticks[i], err = strconv.ParseInt(fields[11+i], 10, 64); err != nil {
			return 0, 0, err
		}
	}
	const tick = time.Second / ticksPerSecond
	return time.Duration(ticks[0]+ticks[1]) * tick, time.Duration(ticks[2]+ticks[3]) * tick, nil
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// show rounds a duration to what can be told apart.
func show(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
