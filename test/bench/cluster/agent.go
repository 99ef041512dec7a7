package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/test/bench/report"
	"github.com/hearth-sh/hearth/test/chart"
)

const (
	// targetLabel is from the start of the agent's container to the label.
	targetLabel = 3 * time.Second
	// targetRSS and targetCPU are of an idle agent.
	targetRSS = 60 << 20
	targetCPU = 0.01
	// targetPeak is of an agent that is told of 500 images at once. The issue
	// asks for a bound only; the chart's limit is eight times this.
	targetPeak = 128 << 20
	// targetRate is of one node's requests to a registry. The agent starts a
	// pull every half second on average, jittered by half of that; one takes
	// about five requests.
	targetRate = 30
	// quiet is how long an agent may go on with what it was told last.
	quiet = 10 * time.Second
)

// starts measures from the start of the agent's container until a watch of the
// Node shows the label, on a node that has none.
func starts(ctx context.Context, b *bench) error {
	var took, cpu []time.Duration
	for range b.restarts {
		d, c, err := b.restart(ctx)
		if err != nil {
			return err
		}
		if b.verbose {
			fmt.Fprintf(os.Stderr, "  label after %s, processor %s\n", d, c)
		}
		took, cpu = append(took, d), append(cpu, c)
	}
	b.table.Title("Start of the agent")
	b.table.Hold("container started to label seen, median", show(report.Median(took)), fmt.Sprintf("worst of %d: %s; node's processor meanwhile %s", b.restarts, show(slices.Max(took)), show(report.Median(cpu))),
		"≤ "+show(targetLabel), report.Median(took) <= targetLabel)
	return nil
}

// restart takes the agent from the node, and the label, and lets it come back.
func (b *bench) restart(ctx context.Context) (took, cpu time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	nodes := b.cluster.Client().CoreV1().Nodes()
	patch := func(value any) error {
		body, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"nodeSelector": map[string]any{"nowhere": value}}}}})
		if err != nil {
			return err
		}
		_, err = b.cluster.Client().AppsV1().DaemonSets(chart.Namespace).Patch(ctx, "hearth-nodeagent", types.StrategicMergePatchType, body, metav1.PatchOptions{})
		return err
	}
	if err := patch("true"); err != nil {
		return 0, 0, err
	}
	if err := b.cluster.WaitFor(ctx, "the agent to be gone", soon, func(ctx context.Context) (bool, error) {
		pods, err := b.cluster.Client().CoreV1().Pods(chart.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentPods})
		return err == nil && len(pods.Items) == 0, nil
	}); err != nil {
		return 0, 0, err
	}
	unlabel := fmt.Sprintf(`{"metadata":{"labels":{%q:null}}}`, runtimeLabel)
	node, err := nodes.Patch(ctx, agentNode, types.MergePatchType, []byte(unlabel), metav1.PatchOptions{})
	if err != nil {
		return 0, 0, err
	}
	watcher, err := nodes.Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", agentNode).String(), ResourceVersion: node.ResourceVersion,
	})
	if err != nil {
		return 0, 0, err
	}
	defer watcher.Stop()
	before, err := b.nodeCPU(agentNode)
	if err != nil {
		return 0, 0, err
	}
	if err := patch(nil); err != nil {
		return 0, 0, err
	}
	if _, err := follow(ctx, watcher, func(n *corev1.Node) (bool, error) { return n.Labels[runtimeLabel] == "true", nil }); err != nil {
		return 0, 0, err
	}
	seen := time.Now()
	after, err := b.nodeCPU(agentNode)
	if err != nil {
		return 0, 0, err
	}
	var pod *corev1.Pod
	if err := b.cluster.WaitFor(ctx, "the agent's pod to be seen running", soon, func(ctx context.Context) (bool, error) {
		pod, err = b.agentPod(ctx)
		return err == nil, nil
	}); err != nil {
		return 0, 0, err
	}
	started, err := b.events[agentNode].of(topicStarted, containerID(pod))
	return seen.Sub(started), after - before, err
}

// idle watches an agent that has nothing to do.
func idle(ctx context.Context, b *bench) error {
	pid, err := b.agentPID(ctx)
	if err != nil {
		return err
	}
	if err := pause(ctx, quiet); err != nil {
		return err
	}
	ownBefore, childrenBefore, err := processCPU(pid)
	if err != nil {
		return err
	}
	from := time.Now()
	if err := pause(ctx, b.idle); err != nil {
		return err
	}
	took := time.Since(from)
	own, children, err := processCPU(pid)
	if err != nil {
		return err
	}
	m, err := memoryOf(pid)
	if err != nil {
		return err
	}
	entries, err := b.cluster.AuditEntries()
	if err != nil {
		return err
	}
	var heartbeats, reads int
	var others []string
	for _, e := range entries {
		if !e.RequestReceivedTimestamp.After(from) || !strings.Contains(e.UserAgent, "hearth-nodeagent") {
			continue
		}
		switch {
		case !e.Write():
			reads++
		case e.ObjectRef.Resource == "nodes" && e.ObjectRef.Subresource == "status":
			heartbeats++
		default:
			others = append(others, e.Verb+" "+e.ObjectRef.Resource+"/"+e.ObjectRef.Subresource)
		}
	}
	// A heartbeat a minute for each of two conditions, and one that was due.
	allowed := 2*int(took/time.Minute) + 2
	share := (own - ownBefore + children - childrenBefore).Seconds() / took.Seconds()
	b.table.Title(fmt.Sprintf("Idle agent, watched for %s after the work above", took.Round(time.Second)))
	b.table.Hold("memory (RSS)", mib(m.rss), fmt.Sprintf("its own %s, of files %s; PSS %s; most ever %s", mib(m.anonymous), mib(m.rss-m.anonymous), mib(m.pss), mib(m.peak)),
		"< "+mib(targetRSS), m.rss < targetRSS)
	b.table.Hold("processor", fmt.Sprintf("%.2f %%", 100*share), "of one core; 10 ms is the least that is counted", fmt.Sprintf("< %.0f %%", 100*targetCPU), share < targetCPU)
	b.table.Hold("API writes besides heartbeats", fmt.Sprint(len(others)), strings.Join(append(others, fmt.Sprintf("%d heartbeats, %d reads", heartbeats, reads)), ", "),
		"0", len(others) == 0 && heartbeats <= allowed)
	return nil
}

// manyImages tells the agent of many small images at once.
func manyImages(ctx context.Context, b *bench) error {
	var lines []string
	for i := range b.images {
		reference, err := b.push(ctx, fmt.Sprintf("bench/small%d", i%10), variant(smallModule, i))
		if err != nil {
			return err
		}
		lines = append(lines, reference)
	}
	pid, err := b.agentPID(ctx)
	if err != nil {
		return err
	}
	before, err := memoryOf(pid)
	if err != nil {
		return err
	}
	ownBefore, childrenBefore, err := processCPU(pid)
	if err != nil {
		return err
	}
	if err := clearPeak(pid); err != nil {
		return err
	}
	begin := time.Now()
	if err := b.want(ctx, soon+time.Duration(b.images)*2*time.Second, lines); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := memoryOf(pid)
	if err != nil {
		return err
	}
	own, children, err := processCPU(pid)
	if err != nil {
		return err
	}
	requests, busiest, err := requestsSince(b.registry.Log, b.cluster.Node(agentNode).IP, begin)
	if err != nil {
		return err
	}
	b.table.Title(fmt.Sprintf("%d small images wanted at once", b.images))
	b.table.Add("all warm after", show(took), fmt.Sprintf("processor: agent %s, its precompile children %s", show(own-ownBefore), show(children-childrenBefore)))
	b.table.Hold("memory at most (RSS)", mib(after.peak), fmt.Sprintf("before %s, after %s", mib(before.rss), mib(after.rss)), "< "+mib(targetPeak), after.peak < targetPeak)
	b.table.Hold("requests to the registry in the busiest second", fmt.Sprint(busiest),
		fmt.Sprintf("%.1f a second on average, %.1f an image", float64(requests)/took.Seconds(), float64(requests)/float64(b.images)), fmt.Sprintf("≤ %d", targetRate), busiest <= targetRate)
	return nil
}

// accessLine is a line of the registry's access log, in Apache's common format:
//
//	198.18.0.10 - - [22/Nov/2026:03:59:01 +0000] "GET /v2/ HTTP/1.1" 200 2 "" "containerd/..."
var accessLine = regexp.MustCompile(`^(\S+) \S+ \S+ \[([^\]]+)\] "(?:GET|HEAD) /v2/`)

// requestsSince counts what one address asked of the registry.
func requestsSince(log, address string, from time.Time) (all, busiest int, err error) {
	file, err := os.Open(log)
	if err != nil {
		return 0, 0, err
	}
	defer file.Close()
	perSecond := map[int64]int{}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		match := accessLine.FindStringSubmatch(lines.Text())
		if match == nil || match[1] != address {
			continue
		}
		at, err := time.Parse("02/Jan/2006:15:04:05 -0700", match[2])
		if err != nil || at.Before(from.Truncate(time.Second)) {
			continue
		}
		all++
		perSecond[at.Unix()]++
		busiest = max(busiest, perSecond[at.Unix()])
	}
	if all == 0 {
		return 0, 0, errors.Join(errors.New("the registry's log has no request of the node"), lines.Err())
	}
	return all, busiest, lines.Err()
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
