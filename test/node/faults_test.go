package node_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/guests"
)

// labelWatch notes every change of a node's runtime labels. Watch it from
// before a fault until after: a label that was wrong for a second counts.
type labelWatch struct {
	mu  sync.Mutex
	bad []string
}

// watchLabels expects a node to have labelWasmtime and no other runtime's
// label all the time, until the test ends.
func watchLabels(t *testing.T, node string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &labelWatch{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			w.follow(ctx, node)
			select { // the API server may be what is faulty
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.bad) > 0 {
			t.Errorf("labels were wrong meanwhile: %s", strings.Join(w.bad, "; "))
		}
	})
}

func (w *labelWatch) follow(ctx context.Context, node string) {
	changes, err := bench.Client().CoreV1().Nodes().Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", node).String(),
	})
	if err != nil {
		return
	}
	defer changes.Stop()
	for change := range changes.ResultChan() {
		n, ok := change.Object.(*corev1.Node)
		if !ok {
			return
		}
		var has []string
		for key := range n.Labels {
			if strings.HasPrefix(key, v1alpha1.RuntimeLabelPrefix) {
				has = append(has, key)
			}
		}
		if len(has) != 1 || has[0] != labelWasmtime {
			w.mu.Lock()
			if len(w.bad) < 10 {
				w.bad = append(w.bad, fmt.Sprintf("at %s: %v", time.Now().Format(time.TimeOnly), has))
			}
			w.mu.Unlock()
		}
	}
}

// agentPod returns the running agent's pod on a node.
func agentPod(ctx context.Context, node string) (corev1.Pod, error) {
	pods, err := bench.Client().CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{
		FieldSelector: "spec.nodeName=" + node, LabelSelector: "app.kubernetes.io/component=agent",
	})
	if err != nil {
		return corev1.Pod{}, err
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			return p, nil
		}
	}
	return corev1.Pod{}, fmt.Errorf("there is no agent on %s", node)
}

// mainProcess returns the process of a pod's only container, as this machine
// counts processes.
func mainProcess(ctx context.Context, node string, pod corev1.Pod) (int, error) {
	if len(pod.Status.ContainerStatuses) != 1 || pod.Status.ContainerStatuses[0].State.Running == nil {
		return 0, errors.New("the container does not run")
	}
	client, err := bench.Node(node).Containerd()
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

func waitProved(t *testing.T) v1alpha1.NodeStatus {
	t.Helper()
	waitNode(t, wasmNode, "the label and the condition", func(n *corev1.Node) bool {
		return n.Labels[labelWasmtime] == "true" && condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionTrue
	})
	return waitStatus(t, wasmNode, "a proof", func(s v1alpha1.NodeStatus) bool { return !provedAt(s).IsZero() })
}

func TestAgentOutlivesTheAPIServersAbsence(t *testing.T) {
	ctx := t.Context()
	before := waitProved(t)
	pod, err := agentPod(ctx, wasmNode)
	if err != nil {
		t.Fatal(err)
	}
	watchLabels(t, wasmNode)
	from := time.Now()
	if err := bench.StopAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	stopped := true
	restart := func(ctx context.Context) error {
		if !stopped {
			return nil
		}
		stopped = false
		return bench.StartAPIServer(ctx)
	}
	t.Cleanup(func() { _ = restart(context.Background()) })
	s := waitStatus(t, wasmNode, "the status to say that Kubernetes is away", func(s v1alpha1.NodeStatus) bool {
		return check(s, "kubernetes").State == v1alpha1.CheckFailing
	})
	c := check(s, "kubernetes")
	t.Logf("after %s a person reads: %s; %s", time.Since(from).Round(time.Second), c.Message, c.Remedy)
	if s.State != v1alpha1.NodeDegraded {
		t.Errorf("without an API server the node is %s: %s", s.State, s.Summary)
	}
	// Longer than probes are patient; in a soak longer than leases, tokens' caches
	// and every back-off.
	time.Sleep(time.Until(from.Add(soaked(25*time.Second, 10*time.Minute))))
	s, err = status(ctx, wasmNode)
	if err != nil || !s.StartedAt.Equal(before.StartedAt) || provedAt(s).IsZero() {
		t.Errorf("the agent of %s is now one of %s (%v): %s", before.StartedAt, s.StartedAt, err, s.Summary)
	}
	if err := restart(ctx); err != nil {
		t.Fatal(err)
	}
	s = waitStatus(t, wasmNode, "Kubernetes to be well", func(s v1alpha1.NodeStatus) bool {
		return check(s, "kubernetes").State == v1alpha1.CheckOK && !provedAt(s).IsZero()
	})
	if !s.StartedAt.Equal(before.StartedAt) {
		t.Errorf("the agent of %s is now one of %s", before.StartedAt, s.StartedAt)
	}
	waitNode(t, wasmNode, "the label and the condition", func(n *corev1.Node) bool {
		return n.Labels[labelWasmtime] == "true" && condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionTrue &&
			condition(n, v1alpha1.NodeConditionWasmReady).LastHeartbeatTime.After(from) && cluster.NodeReady(n)
	})
	after, err := agentPod(ctx, wasmNode)
	if err != nil || after.UID != pod.UID || after.Status.ContainerStatuses[0].RestartCount != pod.Status.ContainerStatuses[0].RestartCount {
		t.Errorf("the agent's pod was restarted: %v, %v", after.Status.ContainerStatuses, err)
	}
	for _, at := range writesOfLabels(t) {
		if at.After(from) {
			t.Errorf("labels were written at %s although the proof held", at)
		}
	}
}

func TestAgentThatStartsWithoutTheAPIServerKeepsWhatWasProved(t *testing.T) {
	ctx := t.Context()
	before := waitProved(t)
	old := condition(waitNode(t, wasmNode, "the condition", func(n *corev1.Node) bool {
		return condition(n, v1alpha1.NodeConditionWasmReady).Status == corev1.ConditionTrue
	}), v1alpha1.NodeConditionWasmReady)
	pod, err := agentPod(ctx, wasmNode)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := mainProcess(ctx, wasmNode, pod)
	if err != nil {
		t.Fatal(err)
	}
	watchLabels(t, wasmNode)
	if err := bench.StopAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	stopped := true
	t.Cleanup(func() {
		if stopped {
			_ = bench.StartAPIServer(context.Background())
		}
	})
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, wasmNode, "a new agent's own proof", func(s v1alpha1.NodeStatus) bool {
		return s.StartedAt.After(before.StartedAt) && !provedAt(s).IsZero()
	})
	from := time.Now()
	if err := bench.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	stopped = false
	now := condition(waitNode(t, wasmNode, "a heartbeat of the new agent", func(n *corev1.Node) bool {
		return condition(n, v1alpha1.NodeConditionWasmReady).LastHeartbeatTime.After(from)
	}), v1alpha1.NodeConditionWasmReady)
	if now.Status != corev1.ConditionTrue || !now.LastTransitionTime.Equal(&old.LastTransitionTime) {
		t.Errorf("the condition was %+v and is %+v, although nothing changed", old, now)
	}
}

// slowRegistry is a registry on this machine whose large blobs stop in the
// middle while it holds them.
type slowRegistry struct {
	host string
	mu   sync.Mutex
	held chan struct{} // nil: nothing is held
	got  chan struct{} // one token once a blob hangs
}

const largeBlob = 8 << 20

func startSlowRegistry(t *testing.T) *slowRegistry {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(bench.HostIP(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	r := &slowRegistry{host: listener.Addr().String(), held: make(chan struct{}), got: make(chan struct{}, 1)}
	storage := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") {
			w = &slowWriter{ResponseWriter: w, registry: r, request: q}
		}
		storage.ServeHTTP(w, q)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() {
		r.release()
		_ = server.Close()
		<-done
	})
	for _, m := range bench.Nodes() {
		dir := filepath.Join(m.ContainerdConfigDir, "certs.d", r.host)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		hosts := fmt.Sprintf("server = \"http://%s\"\n\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", r.host, r.host)
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (r *slowRegistry) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held != nil {
		close(r.held)
		r.held = nil
	}
}

func (r *slowRegistry) gate() chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}

type slowWriter struct {
	http.ResponseWriter
	registry *slowRegistry
	request  *http.Request
	written  int
}

func (w *slowWriter) Write(b []byte) (int, error) {
	if gate := w.registry.gate(); gate != nil && w.written+len(b) > largeBlob/2 {
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		select {
		case w.registry.got <- struct{}{}:
		default:
		}
		select {
		case <-gate:
		case <-w.request.Context().Done():
			return 0, io.ErrClosedPipe
		}
	}
	w.written += len(b)
	return w.ResponseWriter.Write(b)
}

func TestPullGoesOnAfterContainerdWasAway(t *testing.T) {
	ctx := t.Context()
	waitProved(t)
	slow := startSlowRegistry(t)
	module := marked(t, "pulled in two lives")
	noise := make([]byte, largeBlob)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(noise)
	reference, err := name.ParseReference(slow.host+"/"+earlyRepository(wasmNode, slow.host, "slow")+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(reference, wasmImage(t, module, static.NewLayer(noise, "application/vnd.hearth.noise")), remote.WithContext(ctx)); err != nil {
		t.Fatal(err)
	}
	deploy(t, "slow", reference.Name(), 0)
	select {
	case <-slow.got:
	case <-time.After(soon):
		s, err := status(ctx, wasmNode)
		t.Fatalf("nobody pulls the image: %+v, %v", s.Images, err)
	}
	watchLabels(t, wasmNode)
	node := bench.Node(wasmNode)
	if err := node.StopContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	stopped := true
	t.Cleanup(func() {
		if stopped {
			_ = node.StartContainerd(context.Background())
		}
	})
	s := waitStatus(t, wasmNode, "the status to say that containerd is away", func(s v1alpha1.NodeStatus) bool {
		return check(s, "containerd").State == v1alpha1.CheckFailing && s.State == v1alpha1.NodeFailed
	})
	t.Logf("a person reads: %s", s.Summary)
	slow.release()
	if err := node.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	stopped = false
	waitStatus(t, wasmNode, "the image to be warm", func(s v1alpha1.NodeStatus) bool {
		return check(s, "containerd").State == v1alpha1.CheckOK && s.Images != nil && s.Images.Total == 1 && s.Images.Warm == 1
	})
	if !compiled(wasmNode, module) {
		t.Error("the store has no object of the module")
	}
	waitProved(t)
}

// verifyStore holds every file of every object to the digests that the
// store's format promises.
func verifyStore(t *testing.T, node string) (objects int) {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(bench.Node(node).Path(agentData), "store", "objects", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		text, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
		if err != nil {
			t.Errorf("an object without a manifest: %v", err)
			continue
		}
		var wrapped struct {
			Content json.RawMessage `json:"content"`
			SHA256  string          `json:"sha256"`
		}
		var manifest precompile.Manifest
		if err := json.Unmarshal(text, &wrapped); err != nil {
			t.Errorf("%s: %v", dir, err)
			continue
		}
		if sum := sha256.Sum256(wrapped.Content); hex.EncodeToString(sum[:]) != wrapped.SHA256 {
			t.Errorf("%s: the manifest is damaged", dir)
		}
		if err := json.Unmarshal(wrapped.Content, &manifest); err != nil || manifest.Source.SHA256 != filepath.Base(dir) {
			t.Errorf("%s: %v, source %s", dir, err, manifest.Source.SHA256)
		}
		for _, f := range manifest.Files {
			content, err := os.ReadFile(filepath.Join(dir, f.Path))
			if sum := sha256.Sum256(content); err != nil || hex.EncodeToString(sum[:]) != f.SHA256 {
				t.Errorf("%s of %s is not what was published: %v", f.Path, dir, err)
			}
		}
		objects++
	}
	return objects
}

// withNote returns a module with a custom section of at most 100 bytes at its
// end: the same program under another digest.
func withNote(module []byte, note string) []byte {
	const name = "note"
	section := append([]byte{0, byte(1 + len(name) + len(note)), byte(len(name))}, name+note...)
	return slices.Concat(module, section)
}

// TestKilledAgentLeavesNothingHalfDone kills the agent four times (40 in a soak) while it
// pulls and compiles, at moments that differ from run to run.
func TestKilledAgentLeavesNothingHalfDone(t *testing.T) {
	ctx := t.Context()
	waitProved(t)
	registry, err := bench.Registry(ctx, cluster.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	watchLabels(t, wasmNode)
	rounds := soaked(2, 20)
	// A Go program takes seconds to compile, so that kills fall into that.
	large := guests.Read(t, "hello-go")
	modules := make([][]byte, rounds)
	kill := func() {
		t.Helper()
		var pid int
		var pod corev1.Pod
		if err := bench.WaitFor(ctx, "an agent to kill", soon, func(ctx context.Context) (bool, error) {
			var err error
			if pod, err = agentPod(ctx, wasmNode); err == nil {
				pid, err = mainProcess(ctx, wasmNode, pod)
			}
			return err == nil && pid > 0, nil
		}); err != nil {
			t.Fatal(err)
		}
		pause := rand.N(4 * time.Second)
		time.Sleep(pause)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		t.Logf("killed process %d of %s %s after it was found", pid, pod.Name, pause.Round(time.Millisecond))
		if err := bench.WaitFor(ctx, "kubelet to see the agent's end", soon, func(ctx context.Context) (bool, error) {
			p, err := bench.Client().CoreV1().Pods(namespace).Get(ctx, pod.Name, metav1.GetOptions{})
			return err == nil && len(p.Status.ContainerStatuses) == 1 &&
				(p.Status.ContainerStatuses[0].RestartCount > pod.Status.ContainerStatuses[0].RestartCount || p.Status.ContainerStatuses[0].State.Running == nil), nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for round := range rounds {
		app := fmt.Sprintf("killed-%d", round)
		modules[round] = withNote(large, fmt.Sprintf("compiled under fire, round %d", round))
		reference, _ := push(t, registry, earlyRepository(wasmNode, registry.Host, app), wasmImage(t, modules[round]))
		deploy(t, app, reference, 0)
		kill() // kubelet starts it again at once
		kill() // and now waits ten seconds and more, unless there is another pod
		pod, err := agentPod(ctx, wasmNode)
		if err != nil {
			t.Fatal(err)
		}
		var now int64
		if err := bench.Client().CoreV1().Pods(namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			t.Fatal(err)
		}
	}
	s := waitStatus(t, wasmNode, "all images to be warm", func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && s.Images.Total == rounds && s.Images.Warm == rounds && s.Store != nil
	})
	if s.Store.Quarantined != 0 {
		t.Errorf("%d objects were set aside as damaged", s.Store.Quarantined)
	}
	if n := verifyStore(t, wasmNode); n != s.Store.Objects || n < rounds {
		t.Errorf("%d objects on disk, %d known, at least %d wanted", n, s.Store.Objects, rounds)
	}
	for i, m := range modules {
		if !compiled(wasmNode, m) {
			t.Errorf("the store has no object of module %d", i)
		}
	}
	left, err := os.ReadDir(filepath.Join(bench.Node(wasmNode).Path(agentData), "store", "tmp"))
	if err == nil && len(left) > 0 {
		t.Errorf("killed agents left %d unfinished entries in the store, such as %s", len(left), left[0].Name())
	}
	waitProved(t)
}

func TestSecondAgentOnANodeIsRefused(t *testing.T) {
	before := waitProved(t)
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"with the first one's socket":            {[]string{"--socket=/run/hearth/agent.sock", "--store-dir=/var/lib/hearth-second/store"}, "another process listens on it"},
		"with a socket of its own, on its store": {[]string{"--socket=/run/hearth-second/agent.sock", "--store-dir=" + agentData + "/store"}, "another process uses this store; stop the other nodeagent"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			defer cancel()
			args := append([]string{"run", "--kubernetes=off", "--engine-socket=", "--state-dir=/var/lib/hearth-second/agent"}, tt.args...)
			out, err := bench.Node(wasmNode).Command(ctx, agent, args...).CombinedOutput()
			t.Logf("a person reads: %s", out)
			if err == nil || ctx.Err() != nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("a second agent: %v, %v", err, ctx.Err())
			}
		})
	}
	s, err := status(t.Context(), wasmNode)
	if err != nil || !s.StartedAt.Equal(before.StartedAt) || s.Store == nil || s.Store.Quarantined != 0 {
		t.Errorf("the first agent after that: %+v, %v", s, err)
	}
	verifyStore(t, wasmNode)
}
