// Package functions_test installs the shipped chart on a real cluster of three
// nodes and uses it as tenants do: they submit Wasm, get a URL, and it answers,
// whatever happens to nodes, replicas and the registry meanwhile.
package functions_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/packaging/spinkube"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/cluster/ingress"
	"github.com/hearth-sh/hearth/test/ecr"
	"github.com/hearth-sh/hearth/test/guests"
)

const (
	// class is the one the chart uses by default.
	class = "traefik"
	// soon bounds waits for what takes seconds: the machine may be busy.
	soon = 2 * time.Minute
	// heartbeatSeconds is short, so that an agent's end is soon noticed: the
	// chart has the API wait for three and half a minute.
	heartbeatSeconds = 5
)

// nodes have an engine each; zone tells them apart for placement.
var nodes = []string{"node-a", "node-b", "node-c"}

var (
	bench    *cluster.Cluster
	agent    string // the binary, for the command line
	front    *ingress.Controller
	registry *cluster.Registry
	hello    []byte         // a guest that can be marked
	base     string         // domain of functions
	trusted  *ecr.Authority // by nodeagent's image
	noMore   func() error   // ends what tells nodes of their instances
	visitor  *http.Client
)

func TestMain(m *testing.M) {
	// By default as many at a time as there are processors, but these wait.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	shared := cluster.Shared{
		First: true, Dump: chart.Dump,
		Start: func(ctx context.Context) (*cluster.Cluster, error) {
			err := setUp(ctx)
			return bench, err
		},
		Close: func() {
			if visitor != nil {
				visitor.CloseIdleConnections()
			}
			if front != nil {
				front.Close()
			}
			if noMore != nil {
				if err := noMore(); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
			}
		},
	}
	os.Exit(shared.Main(m))
}

func setUp(ctx context.Context) (err error) {
	path, err := guests.Compile(ctx, "hello")
	if err != nil {
		return err
	}
	if hello, err = os.ReadFile(path); err != nil {
		return err
	}
	// An autoscaler looks every 15 s by default.
	options := cluster.Options{ControllerManagerArgs: []string{"--horizontal-pod-autoscaler-sync-period=2s"}}
	for _, name := range nodes {
		options.Nodes = append(options.Nodes, cluster.Node{Name: name, KubeletConfig: map[string]any{
			// Tests kill the same containers again and again; the pause before
			// the next start would grow to minutes.
			"crashLoopBackOff": map[string]any{"maxContainerRestartPeriod": "2s"},
		}})
	}
	if bench, err = cluster.New(ctx, options); err != nil {
		return err
	}
	if trusted, err = ecr.NewAuthority(); err != nil {
		return err
	}
	if agent, err = chart.LoadImage(ctx, bench, trusted.PEM); err != nil {
		return err
	}
	if registry, err = bench.Registry(ctx, cluster.RegistryOptions{User: login.Username, Password: login.Password}); err != nil {
		return err
	}
	if err := credentials(ctx); err != nil {
		return err
	}
	if noMore, err = instances(ctx); err != nil {
		return err
	}
	if _, err := bench.ApplyManifest(ctx, spinkube.CRDs()); err != nil {
		return err
	}
	// As a load balancer would: one address that reaches every node.
	if front, err = ingress.Start(ctx, bench.Client(), ingress.Options{Class: class, Listen: net.JoinHostPort(bench.HostIP(), "80")}); err != nil {
		return err
	}
	base = bench.HostIP() + ".nip.io"
	// What nip.io's name servers answer, without asking them.
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	visitor = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, net.JoinHostPort(bench.HostIP(), "80"))
		},
	}}
	if err := install(ctx); err != nil {
		return err
	}
	return ready(ctx)
}

func install(ctx context.Context, values ...string) error {
	return chart.Install(ctx, bench, append([]string{
		"api.registry=" + registry.Host + "/hearth", "api.registryPlainHTTP=true", "registrySecret=" + registrySecret,
		"agent.extraArgs[0]=--registry=" + registry.Host, "agent.extraArgs[1]=--registry-plain-http",
		"agent.imds=on", "agent.heartbeatSeconds=" + strconv.Itoa(heartbeatSeconds),
		"api.quotas.changesPerSecond=1000", "api.quotas.functions=" + strconv.Itoa(quota),
	}, values...)...)
}

// ready waits until two replicas answer and every node has an engine.
func ready(ctx context.Context) error {
	return bench.WaitFor(ctx, "the API and the engines to be ready", 3*time.Minute, func(ctx context.Context) (bool, error) {
		for component, want := range map[string]int{"api": 2, "engine": len(nodes), "agent": len(nodes)} {
			pods, err := podsOf(ctx, component)
			if err != nil || len(pods) < want {
				return false, err
			}
			for _, p := range pods {
				if !chart.Ready(p) {
					return false, nil
				}
			}
		}
		return true, nil
	})
}

func podsOf(ctx context.Context, component string) ([]corev1.Pod, error) {
	list, err := bench.Client().CoreV1().Pods(chart.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// newTenant makes a namespace.
func newTenant(t *testing.T) string {
	t.Helper()
	n, err := bench.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "tenant-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bench.Client().CoreV1().Namespaces().Delete(context.Background(), n.Name, metav1.DeleteOptions{})
	})
	return n.Name
}

// module is a guest that answers with text.
func module(t *testing.T, text string) []byte {
	t.Helper()
	m, err := guests.Mark(hello, text)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// wasmFile is module in a file.
func wasmFile(t *testing.T, text string) string {
	t.Helper()
	path := t.TempDir() + "/function.wasm"
	if err := os.WriteFile(path, module(t, text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// nodeagent runs the command line as somebody with the administrator's
// kubeconfig, which holds a client certificate as k3s's does.
func nodeagent(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	command := exec.CommandContext(ctx, agent, args...)
	command.Env = append(os.Environ(), "KUBECONFIG="+bench.Kubeconfig(), "HOME=/nonexistent")
	var out, errs bytes.Buffer
	command.Stdout, command.Stderr = &out, &errs
	err = command.Run()
	return out.String(), errs.String(), err
}

// must is nodeagent that has to succeed.
func must(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	stdout, stderr, err := nodeagent(ctx, args...)
	if err != nil {
		t.Fatalf("nodeagent %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}

// submit submits a function that answers with text, and waits until it does.
func submit(t *testing.T, tenant, name, text string, args ...string) v1alpha1.Function {
	t.Helper()
	out := must(t, append([]string{"submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", name, "-o", "json", wasmFile(t, text)}, args...)...)
	var f v1alpha1.Function
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return f
}

// get asks for a URL as a visitor would.
func get(ctx context.Context, url string) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := visitor.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return response.StatusCode, string(body), err
}

// answers waits until url answers with text.
func answers(t *testing.T, url, text string) {
	t.Helper()
	var last string
	if err := bench.WaitFor(t.Context(), url+" to answer "+text, soon, func(ctx context.Context) (bool, error) {
		status, body, err := get(ctx, url)
		last = fmt.Sprintf("%d %s %v", status, body, err)
		return err == nil && status == http.StatusOK && strings.Contains(body, text), nil
	}); err != nil {
		t.Fatalf("%v; the last answer was %s", err, last)
	}
}

// waitObject waits until the Function object is as wanted.
func waitObject(t *testing.T, tenant, name, what string, ok func(*kube.Function) bool) *kube.Function {
	t.Helper()
	var last *kube.Function
	if err := bench.WaitFor(t.Context(), what, soon, func(ctx context.Context) (bool, error) {
		f, err := kube.NewFunctions(bench.Dynamic()).Get(ctx, tenant, name)
		if err != nil {
			return false, nil
		}
		last = f
		return ok(f), nil
	}); err != nil {
		shown, _ := json.MarshalIndent(last, "", "  ")
		t.Fatalf("%v\n%s", err, shown)
	}
	return last
}

// apply is what `kubectl apply` does with a Function.
func apply(t *testing.T, tenant, name string, spec map[string]any) {
	t.Helper()
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": kube.FunctionKind,
		"metadata": map[string]any{"name": name, "namespace": tenant}, "spec": spec,
	}}
	if _, err := bench.Dynamic().Resource(kube.FunctionGVR()).Namespace(tenant).Apply(t.Context(), name, u,
		metav1.ApplyOptions{FieldManager: "kubectl", Force: true}); err != nil {
		t.Fatal(err)
	}
}

// allWarm says whether every node serves the newest revision.
func allWarm(f *kube.Function) bool {
	return f.Status.Warm == fmt.Sprintf("%d/%d", len(nodes), len(nodes)) && f.Status.ActiveRevision == f.Status.Revision
}
