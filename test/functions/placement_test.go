package functions_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/guests"
)

// submitGuest is submit for one of the guests.
func submitGuest(t *testing.T, tenant, name, guest string, args ...string) v1alpha1.Function {
	t.Helper()
	out := must(t, append([]string{"submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", name, "-o", "json", guests.Build(t, guest)}, args...)...)
	var f v1alpha1.Function
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return f
}

// onNode is the pod of a component on a node.
func onNode(ctx context.Context, component, node string) (corev1.Pod, error) {
	pods, err := podsOf(ctx, component)
	if err != nil {
		return corev1.Pod{}, err
	}
	for _, p := range pods {
		if p.Spec.NodeName == node && p.DeletionTimestamp == nil {
			return p, nil
		}
	}
	return corev1.Pod{}, fmt.Errorf("%s has no pod of %s", node, component)
}

// process is the main process of a pod's only container, as this machine
// counts processes.
func process(ctx context.Context, pod corev1.Pod) (int, error) {
	if len(pod.Status.ContainerStatuses) != 1 || pod.Status.ContainerStatuses[0].State.Running == nil {
		return 0, fmt.Errorf("the container of %s does not run", pod.Name)
	}
	client, err := bench.Node(pod.Spec.NodeName).Containerd()
	if err != nil {
		return 0, err
	}
	defer client.Close()
	container, err := client.LoadContainer(ctx, strings.TrimPrefix(pod.Status.ContainerStatuses[0].ContainerID, "containerd://"))
	if err != nil {
		return 0, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return 0, err
	}
	return int(task.Pid()), nil
}

// ask sends a request for a function to one node's engine, past the ingress.
func ask(ctx context.Context, engine corev1.Pod, function, query string) (*http.Response, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+engine.Status.PodIP+":8080/?"+query, nil)
	if err != nil {
		return nil, "", err
	}
	request.Host, request.Close = function+"."+base, true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return response, string(body), err
}

// served counts the requests that guests of one node's engine answered.
func served(t *testing.T, engine corev1.Pod) (n float64) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+engine.Status.PodIP+":9641/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families["hearth_requests_total"].GetMetric() {
		n += m.GetCounter().GetValue()
	}
	return n
}

// label sets a label of a node until the test ends.
func label(t *testing.T, node, key, value string) {
	t.Helper()
	set := func(ctx context.Context, value any) error {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{key: value}}})
		if err != nil {
			return err
		}
		_, err = bench.Client().CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	}
	if err := set(t.Context(), value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set(context.Background(), nil) })
}

// warmOn says whether exactly so many of so many nodes serve the newest revision.
func warmOn(warm string) func(*kube.Function) bool {
	return func(f *kube.Function) bool {
		return f.Status.Warm == warm && f.Status.ActiveRevision == f.Status.Revision && f.Status.ObservedGeneration == f.Generation
	}
}

func TestASecretReachesTheGuestAndNobodyElse(t *testing.T) {
	tenant := newTenant(t)
	secret := "sesame-" + rand.Text()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := submitGuest(t, tenant, "sealed", "echo", "--secret", "API_KEY=@"+path)
	answers(t, f.URL, "API_KEY="+secret+"\n")
	if shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "-o", "json", "sealed"); strings.Contains(shown, secret) || !strings.Contains(shown, "API_KEY") {
		t.Errorf("the API shows %s", shown)
	}
	// A new revision keeps it, and a rotated value is a new revision's.
	rotated := "changed-" + rand.Text()
	if err := os.WriteFile(path, []byte(rotated), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "sealed", "--secret", "API_KEY=@"+path)
	answers(t, f.URL, "API_KEY="+rotated+"\n")
	must(t, "functions", "rollback", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "sealed")
	answers(t, f.URL, "API_KEY="+secret+"\n")

	for _, value := range []string{secret, rotated} {
		untold(t, tenant, value)
	}
}

// untold shows that a secret's value is in no object but Secrets and in no log.
func untold(t *testing.T, tenant, value string) {
	t.Helper()
	for _, gvr := range []schema.GroupVersionResource{
		kube.FunctionGVR(),
		{Group: "apps", Version: "v1", Resource: "controllerrevisions"},
		{Group: v1alpha1.Group, Version: "v1alpha1", Resource: v1alpha1.HostsResource},
		{Version: "v1", Resource: "configmaps"},
		{Version: "v1", Resource: "events"},
	} {
		list, err := bench.Dynamic().Resource(gvr).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Items {
			b, err := o.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(b, []byte(value)) || bytes.Contains(b, []byte(base64.StdEncoding.EncodeToString([]byte(value)))) {
				t.Errorf("%s %s/%s of tenant %s holds the secret's value", o.GetKind(), o.GetNamespace(), o.GetName(), tenant)
			}
		}
	}
	pods, err := bench.Client().CoreV1().Pods(chart.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if log, err := bench.PodLogs(t.Context(), p.Namespace, p.Name, ""); err == nil && strings.Contains(log, value) {
			t.Errorf("the log of %s holds the secret's value", p.Name)
		}
	}
}

func TestASecretIsOnTheNodesItsFunctionIsPlacedOnOnly(t *testing.T) {
	tenant := newTenant(t)
	label(t, "node-a", "hearth.test/vault", "yes")
	byHand, byAPI := "hand-"+rand.Text(), "api-"+rand.Text()
	if _, err := bench.Client().CoreV1().Secrets(tenant).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "ours"}, StringData: map[string]string{"key": byHand},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	image := submitGuest(t, tenant, "echo-image", "echo").Image
	apply(t, tenant, "vaulted", map[string]any{
		"image":     image,
		"placement": map[string]any{"nodeSelector": map[string]any{"hearth.test/vault": "yes"}},
		"env":       []any{map[string]any{"name": "BY_HAND", "secretKeyRef": map[string]any{"name": "ours", "key": "key"}}},
	})
	waitObject(t, tenant, "vaulted", "the placed function to be warm on its node", warmOn("1/1"))
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(byAPI), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "functions", "set", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "vaulted", "--secret", "BY_API=@"+path)
	waitObject(t, tenant, "vaulted", "revision 2 to be warm on its node", func(f *kube.Function) bool {
		return f.Status.Revision == 2 && warmOn("1/1")(f)
	})
	// The agent follows what the API says of the other nodes as it does of
	// this one; nothing was asked for yet, so nothing was forwarded either.
	for _, value := range []string{byHand, byAPI} {
		untold(t, tenant, value)
		for _, node := range nodes {
			files := filesWith(t, bench.Node(node).Path("/var/lib/hearth"), value)
			files = append(files, filesWith(t, bench.Node(node).Path("/run/hearth"), value)...)
			if node != "node-a" && len(files) > 0 {
				t.Errorf("%s has the secret's value in %v", node, files)
			}
			for _, component := range []string{"agent", "engine"} {
				pod, err := onNode(t.Context(), component, node)
				if err != nil {
					t.Fatal(err)
				}
				pid, err := process(t.Context(), pod)
				if err != nil {
					t.Fatal(err)
				}
				has, err := remembers(pid, value)
				if err != nil {
					t.Fatal(err)
				}
				if has != (node == "node-a") {
					t.Errorf("the %s of %s has the secret's value in memory: %t", component, node, has)
				}
			}
		}
	}
	url := "http://vaulted." + base + "/"
	answers(t, url, "BY_HAND="+byHand+"\n")
	answers(t, url, "BY_API="+byAPI+"\n")
}

// filesWith are the files below a directory that hold a value.
func filesWith(t *testing.T, directory, value string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(directory, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if bytes.Contains(b, []byte(value)) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// remembers says whether a process has a value in its memory.
func remembers(pid int, value string) (bool, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return false, err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return false, err
	}
	defer memory.Close()
	piece := make([]byte, 1<<20)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			return false, fmt.Errorf("read %q: %w", line, err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		for at := from; at < to; at += uint64(len(piece) - len(value)) {
			// What cannot be read (a guard, a region that is gone) is skipped.
			n, _ := memory.ReadAt(piece[:min(uint64(len(piece)), to-at)], int64(at))
			if bytes.Contains(piece[:n], []byte(value)) {
				return true, nil
			}
		}
	}
	return false, nil
}

func TestAPlacedFunctionAnswersThroughEveryNode(t *testing.T) {
	tenant := newTenant(t)
	label(t, "node-a", "hearth.test/pool", "wasm")
	image := submit(t, tenant, "placed-image", "from its own place").Image
	apply(t, tenant, "placed", map[string]any{
		"image": image, "placement": map[string]any{"nodeSelector": map[string]any{"hearth.test/pool": "wasm"}},
	})
	f := waitObject(t, tenant, "placed", "the placed function to be warm on its node", warmOn("1/1"))
	for _, n := range f.Status.Nodes {
		if n.Name != "node-a" {
			t.Errorf("%s says %+v of a function that is placed elsewhere", n.Name, n)
		}
	}
	answers(t, f.Status.URL, "from its own place")
	for _, node := range nodes {
		engine, err := onNode(t.Context(), "engine", node)
		if err != nil {
			t.Fatal(err)
		}
		var last string
		if err := bench.WaitFor(t.Context(), "the engine of "+node+" to answer", soon, func(ctx context.Context) (bool, error) {
			response, body, err := ask(ctx, engine, "placed", "")
			if err != nil {
				last = err.Error()
				return false, nil
			}
			timing := strings.Join(response.Header["Server-Timing"], ", ")
			last = response.Status + " " + body + timing
			if response.StatusCode != http.StatusOK || !strings.Contains(body, "from its own place") {
				return false, nil
			}
			if forwarded := strings.Contains(timing, "forward;"); forwarded != (node != "node-a") {
				t.Errorf("the engine of %s forwarded: %t (%s)", node, forwarded, timing)
			}
			return true, nil
		}); err != nil {
			t.Fatalf("%v; the last answer was %s", err, last)
		}
	}

	// With a second node of the pool, the first one's engine may go at once.
	label(t, "node-b", "hearth.test/pool", "wasm")
	waitObject(t, tenant, "placed", "both nodes of the pool to be warm", warmOn("2/2"))
	outside, err := onNode(t.Context(), "engine", "node-c")
	if err != nil {
		t.Fatal(err)
	}
	second, err := onNode(t.Context(), "engine", "node-b")
	if err != nil {
		t.Fatal(err)
	}
	// That a node is warm is known before every other engine was told of it.
	before := served(t, second)
	if err := bench.WaitFor(t.Context(), "the engine of node-c to know of node-b", soon, func(ctx context.Context) (bool, error) {
		if _, _, err := ask(ctx, outside, "placed", ""); err != nil {
			return false, err
		}
		return served(t, second) > before, nil
	}); err != nil {
		t.Fatal(err)
	}
	victim, err := onNode(t.Context(), "engine", "node-a")
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	polling, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for polling.Err() == nil {
			response, body, err := ask(polling, outside, "placed", "")
			switch {
			case polling.Err() != nil:
			case err != nil:
				done <- err
				return
			// What is in the very process that is killed may be lost, and says so.
			case response.StatusCode == http.StatusBadGateway && strings.Contains(body, "peer-lost"):
			case response.StatusCode != http.StatusOK:
				done <- fmt.Errorf("%s: %s", response.Status, body)
				return
			}
			asked.Add(1)
			select {
			case <-polling.Done():
			case <-time.After(20 * time.Millisecond): // the machine has other work
			}
		}
		done <- nil
	}()
	if err := bench.Client().CoreV1().Pods(chart.Namespace).Delete(t.Context(), victim.Name, metav1.DeleteOptions{GracePeriodSeconds: ptr.To[int64](0)}); err != nil {
		t.Fatal(err)
	}
	err = bench.WaitFor(t.Context(), "node-a to have an engine again", soon, func(ctx context.Context) (bool, error) {
		p, err := onNode(ctx, "engine", "node-a")
		return err == nil && p.UID != victim.UID && chart.Ready(p), nil
	})
	stop()
	if err := errors.Join(err, <-done); err != nil {
		t.Error(err)
	}
	t.Logf("%d requests through node-c while the engine of node-a was replaced", asked.Load())
	waitObject(t, tenant, "placed", "both nodes of the pool to be warm again", warmOn("2/2"))
}

func TestAFunctionThatIsPlacedElsewhereGoesOnAnswering(t *testing.T) {
	tenant := newTenant(t)
	label(t, "node-a", "hearth.test/row", "a")
	label(t, "node-b", "hearth.test/row", "b")
	image := submit(t, tenant, "moves-image", "wherever it is").Image
	row := func(value string) map[string]any {
		spec := map[string]any{"image": image}
		if value != "" {
			spec["placement"] = map[string]any{"nodeSelector": map[string]any{"hearth.test/row": value}}
		}
		return spec
	}
	at := func(revision int, warm string, nodes ...string) func(*kube.Function) bool {
		return func(f *kube.Function) bool {
			var serving []string
			for _, n := range f.Status.Nodes {
				if n.Serving == revision {
					serving = append(serving, n.Name)
				}
			}
			return f.Status.Revision == revision && warmOn(warm)(f) && slices.Equal(serving, nodes)
		}
	}
	apply(t, tenant, "moves", row("a"))
	f := waitObject(t, tenant, "moves", "it to be warm on its node", at(1, "1/1", "node-a"))
	var stops []func()
	for _, node := range nodes {
		engine, err := onNode(t.Context(), "engine", node)
		if err != nil {
			t.Fatal(err)
		}
		// Whoever answers knows it by now.
		if err := bench.WaitFor(t.Context(), "the engine of "+node+" to know it", soon, func(ctx context.Context) (bool, error) {
			response, _, err := ask(ctx, engine, "moves", "")
			return err == nil && response.StatusCode == http.StatusOK, nil
		}); err != nil {
			t.Fatal(err)
		}
		stops = append(stops, visitEngine(t, engine, "moves"))
	}
	stops = append(stops, visit(t, f.Status.URL, "wherever it is"))
	apply(t, tenant, "moves", row("b"))
	waitObject(t, tenant, "moves", "it to be warm on the other node alone", at(2, "1/1", "node-b"))
	// A selector that no node matches switches nothing off.
	apply(t, tenant, "moves", row("nowhere"))
	waitObject(t, tenant, "moves", "it to be wanted nowhere", func(f *kube.Function) bool {
		return f.Status.Revision == 3 && f.Status.ActiveRevision == 2 && f.Status.ObservedGeneration == f.Generation
	})
	apply(t, tenant, "moves", row(""))
	waitObject(t, tenant, "moves", "it to be warm everywhere", at(4, "3/3", nodes...))
	apply(t, tenant, "moves", row("a"))
	waitObject(t, tenant, "moves", "it to be back on the first node alone", at(5, "1/1", "node-a"))
	// The engines of the others have it for a moment yet.
	for _, node := range []string{"node-b", "node-c"} {
		engine, err := onNode(t.Context(), "engine", node)
		if err != nil {
			t.Fatal(err)
		}
		if err := bench.WaitFor(t.Context(), "the engine of "+node+" to let go of it", soon, func(ctx context.Context) (bool, error) {
			response, _, err := ask(ctx, engine, "moves", "")
			return err == nil && strings.Contains(strings.Join(response.Header["Server-Timing"], ", "), "forward;"), nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, stop := range stops {
		stop()
	}
}

// visitEngine is visit by way of one node's engine.
func visitEngine(t *testing.T, engine corev1.Pod, function string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var asked int
	var bad []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			response, body, err := ask(ctx, engine, function, "")
			if ctx.Err() != nil {
				return
			}
			if asked++; err != nil || response.StatusCode != http.StatusOK {
				if err == nil {
					err = errors.New(response.Status + " " + body)
				}
				bad = append(bad, time.Now().Format(time.TimeOnly)+" "+err.Error())
			}
			select {
			case <-ctx.Done():
			case <-time.After(askEvery):
			}
		}
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
		if t.Logf("the engine of %s was asked %d times meanwhile", engine.Spec.NodeName, asked); asked == 0 || len(bad) > 0 {
			t.Errorf("of %d requests by way of %s these failed: %s", asked, engine.Spec.NodeName, strings.Join(bad[:min(len(bad), 10)], "; "))
		}
	})
	t.Cleanup(stop)
	return stop
}
