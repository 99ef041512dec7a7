package cluster_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/needs"
)

const toolboxImage = "hearth.test/toolbox:1"

// shared has two nodes and serves every test that leaves them as they were.
var (
	shared  *cluster.Cluster
	toolbox string // on this machine
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if err := cluster.Check(); err != nil {
		if os.Getenv("CI") != "" {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Fprintln(os.Stderr, "skipping:", err)
		return 0
	}
	if os.Getenv(killMe) != "" {
		return beKilled()
	}
	ctx := context.Background()
	options := cluster.Options{Progress: os.Stderr, Nodes: []cluster.Node{
		{Name: "node-a", Labels: map[string]string{"pool": "wasm"}, ProviderID: "aws:///eu-central-1a/i-0123456789abcdef0"},
		{Name: "node-b"},
	}}
	var err error
	if shared, err = cluster.New(ctx, options); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if toolbox, err = cluster.GoBinary(ctx, "./test/cluster/images/toolbox"); err == nil {
		err = shared.LoadBinaryImage(ctx, toolboxImage, map[string]string{"/toolbox": toolbox})
	}
	code := 1
	if err == nil {
		code = m.Run()
	}
	if code != 0 {
		shared.DumpLogs(os.Stderr)
	}
	if err := errors.Join(err, shared.Close(), gone(shared), goleak.Find()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// gone returns an error that names whatever a closed cluster left behind. Its
// names start with the last part of its directory, the slot.
func gone(c *cluster.Cluster) error {
	slot := filepath.Base(c.Dir())
	var left []string
	find := func(what string, pattern string) {
		found, _ := filepath.Glob(pattern)
		for _, path := range found {
			left = append(left, what+" "+path)
		}
	}
	find("file", c.Dir())
	find("network namespace", "/run/netns/hearth"+slot+"-*")
	find("link", "/sys/class/net/hearth"+slot)
	find("cgroup", "/sys/fs/cgroup/hearth"+slot)
	find("cgroup", "/sys/fs/cgroup/*/hearth"+slot)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, c.Dir()+"/") {
			left = append(left, "mount "+line)
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, path := range processes {
		line, err := os.ReadFile(path)
		if err == nil && bytes.Contains(line, []byte(c.Dir()+"/")) {
			left = append(left, "process "+string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("the closed cluster left behind: %s", strings.Join(left, "; "))
	}
	return nil
}

// pod runs toolbox on a node of the shared cluster; it goes with the test.
func pod(t *testing.T, node, name string, args ...string) *corev1.Pod {
	t.Helper()
	return create(t, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}},
		Spec: corev1.PodSpec{
			NodeName: node, RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{Name: "main", Image: toolboxImage, Args: args, ImagePullPolicy: corev1.PullIfNotPresent}},
		},
	})
}

func create(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pods := shared.Client().CoreV1().Pods(metav1.NamespaceDefault)
	made, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := pods.Delete(ctx, made.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	return made
}

// logOf waits for the pod to succeed and returns its log.
func logOf(t *testing.T, name string) string {
	t.Helper()
	if _, err := shared.WaitPodSucceeded(t.Context(), metav1.NamespaceDefault, name); err != nil {
		t.Fatal(err)
	}
	text, err := shared.PodLogs(t.Context(), metav1.NamespaceDefault, name, "")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(text)
}

func TestNodesAreRegisteredAsAsked(t *testing.T) {
	node, err := shared.Client().CoreV1().Nodes().Get(t.Context(), "node-a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if node.Spec.ProviderID != "aws:///eu-central-1a/i-0123456789abcdef0" || node.Labels["pool"] != "wasm" {
		t.Errorf("provider ID %q, labels %v", node.Spec.ProviderID, node.Labels)
	}
	var address string
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			address = a.Address
		}
	}
	if address != shared.Node("node-a").IP {
		t.Errorf("the node's address is %s, want %s", address, shared.Node("node-a").IP)
	}
}

func TestAPodRunsToCompletionAndItsLogIsReadable(t *testing.T) {
	pod(t, "", "completes", "echo", "hello", "from", "a", "pod") // the scheduler picks
	if got := logOf(t, "completes"); got != "hello from a pod" {
		t.Errorf("the log is %q", got)
	}
}

func TestAFailedPodIsReportedWithItsExitCode(t *testing.T) {
	pod(t, "node-a", "fails", "exit", "3")
	_, err := shared.WaitPodSucceeded(t.Context(), metav1.NamespaceDefault, "fails")
	if err == nil || !strings.Contains(err.Error(), "ended with 3") {
		t.Errorf("the error does not say what happened: %v", err)
	}
}

func TestPodsOfDifferentNodesReachEachOther(t *testing.T) {
	for _, way := range []struct{ from, to string }{{"node-a", "node-b"}, {"node-b", "node-a"}, {"node-a", "node-a"}} {
		t.Run(way.from+" to "+way.to, func(t *testing.T) {
			suffix := way.from[5:] + way.to[5:]
			pod(t, way.to, "server-"+suffix, "serve", ":8080", "reached "+way.to)
			server, err := shared.WaitPodReady(t.Context(), metav1.NamespaceDefault, "server-"+suffix)
			if err != nil {
				t.Fatal(err)
			}
			pod(t, way.from, "client-"+suffix, "get", "http://"+server.Status.PodIP+":8080/")
			if got := logOf(t, "client-"+suffix); got != "reached "+way.to {
				t.Errorf("got %q", got)
			}
			// Tests of ours reach pods as well.
			response, err := http.Get("http://" + server.Status.PodIP + ":8080/")
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			http.DefaultClient.CloseIdleConnections()
		})
	}
}

func TestAServiceAnswersThroughKubeProxy(t *testing.T) {
	pod(t, "node-a", "backend", "serve", ":8080", "served")
	services := shared.Client().CoreV1().Services(metav1.NamespaceDefault)
	service, err := services.Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "backend"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: map[string]string{"name": "backend"},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { services.Delete(context.Background(), "backend", metav1.DeleteOptions{}) })
	// From the backend's own node and from another.
	for _, node := range []string{"node-a", "node-b"} {
		pod(t, node, "client-on-"+node, "get", "http://"+service.Spec.ClusterIP+"/")
	}
	for _, node := range []string{"node-a", "node-b"} {
		if got := logOf(t, "client-on-"+node); got != "served" {
			t.Errorf("from %s: %q", node, got)
		}
	}
	// The node port answers on this machine, as a load balancer would reach it.
	command := exec.CommandContext(t.Context(), toolbox, "get", fmt.Sprintf("http://%s:%d/", shared.Node("node-b").IP, service.Spec.Ports[0].NodePort))
	if out, err := command.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "served" {
		t.Errorf("the node port: %v: %s", err, out)
	}
}

func TestAPodCanUseItsServiceAccount(t *testing.T) {
	const tokenPath = "/var/run/secrets/kubernetes.io/serviceaccount/token"
	running := pod(t, "node-b", "with-token", "cat", tokenPath)
	token := logOf(t, "with-token")
	config := rest.AnonymousClientConfig(shared.RESTConfig())
	config.BearerToken = token
	client := clientFor(t, config)
	review, err := client.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	user := review.Status.UserInfo
	if user.Username != "system:serviceaccount:default:default" {
		t.Errorf("the token is of %s", user.Username)
	}
	// Bound to pod and node: what policies on node identity rely on.
	if got := user.Extra["authentication.kubernetes.io/pod-name"]; len(got) != 1 || got[0] != running.Name {
		t.Errorf("the token is bound to pod %v", got)
	}
	if got := user.Extra["authentication.kubernetes.io/node-name"]; len(got) != 1 || got[0] != "node-b" {
		t.Errorf("the token is bound to node %v", got)
	}
}

func TestAPodReachesTheAPIServerByItsServiceAddress(t *testing.T) {
	pod(t, "node-a", "asks-api", "api", "/version")
	if got := logOf(t, "asks-api"); !strings.Contains(got, "\"gitVersion\"") {
		t.Errorf("the API server answered %q", got)
	}
}

func TestTokenRequest(t *testing.T) {
	seconds := int64(600)
	answer, err := shared.Client().CoreV1().ServiceAccounts(metav1.NamespaceDefault).CreateToken(t.Context(), "default",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	review, err := shared.Client().AuthenticationV1().TokenReviews().Create(t.Context(),
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: answer.Status.Token}}, metav1.CreateOptions{})
	if err != nil || !review.Status.Authenticated {
		t.Errorf("the token is not accepted: %v %+v", err, review)
	}
}

func clientFor(t *testing.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.CloseIdleConnections)
	set, err := kubernetes.NewForConfigAndClient(config, client)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func kubelet(t *testing.T, node string) *kubernetes.Clientset {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", shared.Node(node).KubeletKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	return clientFor(t, config)
}

func TestANodeMayLabelItselfAndNoOther(t *testing.T) {
	nodes := kubelet(t, "node-a").CoreV1().Nodes()
	patch := []byte(`{"metadata":{"labels":{"hearth.sh/test":"true"}}}`)
	if _, err := nodes.Patch(t.Context(), "node-a", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Errorf("itself: %v", err)
	}
	if _, err := nodes.Patch(t.Context(), "node-b", types.MergePatchType, patch, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("another node: %v", err)
	}
	entries, err := shared.AuditEntries()
	if err != nil {
		t.Fatal(err)
	}
	codes := map[int]int{}
	for _, e := range entries {
		if e.Write() && e.User.Username == "system:node:node-a" && e.ObjectRef.Resource == "nodes" && e.ObjectRef.Subresource == "" && e.Verb == "patch" {
			codes[e.ResponseStatus.Code]++
		}
	}
	if codes[http.StatusOK] == 0 || codes[http.StatusForbidden] == 0 {
		t.Errorf("the audit log has these patches by node-a: %v", codes)
	}
}

func TestConstrainedImpersonationIsOn(t *testing.T) {
	metrics, err := shared.Client().Discovery().RESTClient().Get().AbsPath("/metrics").Do(t.Context()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(metrics)) {
		if strings.HasPrefix(line, "kubernetes_feature_enabled{name=\"ConstrainedImpersonation\"") {
			if !strings.HasSuffix(strings.TrimSpace(line), " 1") {
				t.Errorf("the feature is off: %s", line)
			}
			return
		}
	}
	t.Error("the API server does not know the feature")
}

func TestCustomResourcesAndTheirObjectsInOneManifest(t *testing.T) {
	_, err := shared.ApplyManifest(t.Context(), []byte(`# a comment
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: kettles.test.hearth.sh}
spec:
  group: test.hearth.sh
  scope: Namespaced
  names: {kind: Kettle, plural: kettles}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
---
apiVersion: test.hearth.sh/v1
kind: Kettle
metadata: {name: black}
spec: {litres: 2}
`))
	if err != nil {
		t.Error(err)
	}
}

func TestAPodWithAPullSecretPullsByDigest(t *testing.T) {
	ctx := t.Context()
	registry, err := shared.Registry(ctx, cluster.RegistryOptions{User: "node", Password: "sesame"})
	if err != nil {
		if errors.Is(err, cluster.ErrCannotRun) {
			needs.Missing(t, "%v", err)
		}
		t.Fatal(err)
	}
	image, err := cluster.BinaryImage(map[string]string{"/bin/toolbox": toolbox, "/etc/greeting": "/etc/hostname"}, "/bin/toolbox")
	if err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewDigest(registry.Host+"/private/toolbox@"+digest.String(), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	transport := remote.DefaultTransport.(*http.Transport).Clone()
	defer transport.CloseIdleConnections()
	if err := remote.Write(ref, image, remote.WithContext(ctx), remote.WithTransport(transport), remote.WithAuth(&authn.Basic{Username: "node", Password: "sesame"})); err != nil {
		t.Fatal(err)
	}
	login, err := json.Marshal(map[string]any{"auths": map[string]any{registry.Host: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("node:sesame"))}}})
	if err != nil {
		t.Fatal(err)
	}
	secrets := shared.Client().CoreV1().Secrets(metav1.NamespaceDefault)
	if _, err := secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: login},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { secrets.Delete(context.Background(), "pull", metav1.DeleteOptions{}) })
	private := func(name string, pull ...corev1.LocalObjectReference) {
		create(t, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PodSpec{
				NodeName: "node-b", RestartPolicy: corev1.RestartPolicyNever, ImagePullSecrets: pull,
				Containers: []corev1.Container{{Name: "main", Image: ref.Name(), Args: []string{"echo", "pulled"}}},
			},
		})
	}
	private("without-secret")
	if _, err := shared.WaitPod(ctx, metav1.NamespaceDefault, "without-secret", "to be refused its image", func(pod *corev1.Pod) bool {
		for _, status := range pod.Status.ContainerStatuses {
			if w := status.State.Waiting; w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff") {
				return true
			}
		}
		return false
	}); err != nil {
		t.Error(err)
	}
	private("with-secret", corev1.LocalObjectReference{Name: "pull"})
	if got := logOf(t, "with-secret"); got != "pulled" {
		t.Errorf("got %q", got)
	}
}

func TestPodsSurviveRestartsOfKubeletContainerdAndAPIServer(t *testing.T) {
	ctx := t.Context()
	node := shared.Node("node-b")
	pod(t, node.Name, "survivor", "sleep", "10m")
	before, err := shared.WaitPodReady(ctx, metav1.NamespaceDefault, "survivor")
	if err != nil {
		t.Fatal(err)
	}
	pid := processOf(t, node, "survivor")
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"kubelet", node.RestartKubelet}, {"containerd", node.RestartContainerd},
		{"stop API server", shared.StopAPIServer}, {"start API server", shared.StartAPIServer},
	} {
		began := time.Now()
		if err := step.do(ctx); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		t.Logf("%s: %s", step.what, time.Since(began).Round(time.Millisecond))
	}
	// A kubelet that is back posts a status newer than the restart.
	restarted := metav1.Now()
	if err := shared.WaitNode(ctx, node.Name, "to be heard of after the restarts", time.Minute, func(n *corev1.Node) bool {
		for _, condition := range n.Status.Conditions {
			if condition.Type == corev1.NodeReady {
				return condition.Status == corev1.ConditionTrue && restarted.Before(&condition.LastHeartbeatTime)
			}
		}
		return false
	}); err != nil {
		t.Fatal(err)
	}
	after, err := shared.WaitPodReady(ctx, metav1.NamespaceDefault, "survivor")
	if err != nil {
		t.Fatal(err)
	}
	if after.UID != before.UID || after.Status.ContainerStatuses[0].RestartCount != 0 || processOf(t, node, "survivor") != pid {
		t.Errorf("the pod was restarted: %d restarts", after.Status.ContainerStatuses[0].RestartCount)
	}
}

// processOf returns the process id of the pod's only container.
func processOf(t *testing.T, node *cluster.Machine, podName string) uint32 {
	t.Helper()
	client, err := node.Containerd()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := t.Context()
	containers, err := client.Containers(ctx, `labels."io.kubernetes.pod.name"==`+podName+`,labels."io.cri-containerd.kind"==container`)
	if err != nil || len(containers) == 0 {
		t.Fatalf("no container of pod %s: %v", podName, err)
	}
	for _, container := range containers {
		if labels, err := container.Labels(ctx); err != nil || labels["io.kubernetes.container.name"] != "main" {
			continue
		}
		task, err := container.Task(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		return task.Pid()
	}
	t.Fatalf("pod %s has no container called main", podName)
	return 0
}

func TestCommandsAndFunctionsRunOnTheNode(t *testing.T) {
	node := shared.Node("node-b")
	out, err := node.Command(t.Context(), "sh", "-c", "hostname; ip -4 -o address show eth0; ls -S /run/containerd/containerd.sock").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"node-b", node.IP, "/run/containerd/containerd.sock"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in %s", want, out)
		}
	}
	err = node.InNetNS(func() error {
		routes, err := os.ReadFile("/proc/thread-self/net/route")
		if err == nil && !strings.Contains(string(routes), "eth0") {
			err = fmt.Errorf("these are not the node's routes:\n%s", routes)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(node.Path("/etc/hostname")); err != nil || string(content) != "node-b\n" {
		t.Errorf("/etc/hostname of the node: %q, %v", content, err)
	}
}

// A runtime with a shim of its own: runc's under another name.
func TestARuntimeClassRunsPodsUnderItsOwnShim(t *testing.T) {
	ctx := t.Context()
	tools, err := cluster.Tools(ctx, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	c := cluster.Start(t, cluster.Options{Nodes: []cluster.Node{{
		Name:   "lone",
		Taints: []corev1.Taint{{Key: "hearth.sh/unproven", Effect: corev1.TaintEffectNoSchedule}},
		Runtimes: []cluster.Runtime{{
			Name: "odd", Type: "io.containerd.odd.v2", BinaryPath: filepath.Join(tools, "containerd-shim-runc-v2"),
			// No Options: for a type it does not know, containerd wraps them in
			// a message that runc's shim does not.
		}},
	}}})
	if err := c.LoadBinaryImage(ctx, toolboxImage, map[string]string{"/toolbox": toolbox}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ApplyManifest(ctx, []byte(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: odd}
handler: odd
---
apiVersion: v1
kind: Pod
metadata: {name: odd}
spec:
  runtimeClassName: odd
  restartPolicy: Never
  tolerations: [{key: hearth.sh/unproven, operator: Exists}]
  containers: [{name: main, image: "hearth.test/toolbox:1", args: [sleep, 10m]}]
`)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitPodReady(ctx, metav1.NamespaceDefault, "odd"); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("pgrep", "-f", "containerd-shim-odd-v2").Output(); err != nil || len(out) == 0 {
		t.Errorf("the shim does not run: %v", err)
	}
	// Closed with a pod running; twice is as good as once.
	if err := errors.Join(c.Close(), c.Close(), gone(c)); err != nil {
		t.Error(err)
	}
}

// killMe makes this test binary start a cluster and wait to be killed.
const killMe = "HEARTH_TEST_KILL_ME"

func TestAKilledTestLeavesNoProcessAndTheNextClusterRemovesTheRest(t *testing.T) {
	command := exec.CommandContext(t.Context(), os.Args[0])
	command.Env = append(os.Environ(), killMe+"=1")
	command.Stderr = os.Stderr
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	command.Process.Kill()
	command.Wait()
	if err != nil {
		t.Fatalf("the other cluster did not start: %v", err)
	}
	left := strings.Fields(line)
	if len(left) < 2 {
		t.Fatalf("the other cluster said %q, not where it is and what runs in it", line)
	}
	dir, processes := left[0], left[1:]
	// The directory's name and the cgroups may have a new owner at any moment:
	// clusters of other packages run at the same time. What is looked for are
	// the very processes and the very directory that were left.
	marker := filepath.Join(dir, marker)
	if err := shared.WaitFor(t.Context(), "the processes of the killed test to end", time.Minute, func(context.Context) (bool, error) {
		for _, id := range processes {
			pid, _, _ := strings.Cut(id, "@")
			if processID(pid) == id {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	// What ended them holds the slot until it is done; then it is the next
	// cluster's to clean, this one or that of another package.
	if err := shared.WaitFor(t.Context(), "the slot of the killed test to be free", time.Minute, func(context.Context) (bool, error) {
		lock, err := os.Open(dir + ".lock")
		if err != nil {
			return false, err
		}
		defer lock.Close()
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			return true, nil
		}
		_, err = os.Stat(marker)
		return errors.Is(err, fs.ErrNotExist), nil // another took it, and has cleaned it
	}); err != nil {
		t.Fatal(err)
	}
	cluster.Start(t, cluster.Options{ControlPlaneOnly: true})
	if _, err := os.Stat(marker); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the files of the killed test are still there: %v", err)
	}
}

const marker = "left-by-a-killed-test"

// processID tells a process from a later one with its number: both, and when
// it began, in ticks since boot (proc(5), field 22 of stat).
func processID(pid string) string {
	stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return pid + "@" + fields[19]
}

// beKilled is that other process.
func beKilled() int {
	c, err := cluster.New(context.Background(), cluster.Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := os.WriteFile(filepath.Join(c.Dir(), marker), nil, 0o600); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	said := []string{c.Dir()}
	for _, pattern := range []string{"/sys/fs/cgroup/hearth", "/sys/fs/cgroup/*/hearth"} {
		roots, _ := filepath.Glob(pattern + filepath.Base(c.Dir()))
		for _, root := range roots {
			_ = filepath.WalkDir(root, func(path string, _ fs.DirEntry, _ error) error {
				content, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
				for pid := range strings.FieldsSeq(string(content)) {
					said = append(said, processID(pid))
				}
				return nil
			})
		}
	}
	fmt.Println(strings.Join(said, " "))
	time.Sleep(5 * time.Minute) // a bound, should nobody kill it
	return 1
}
