package functions_test

import (
	"context"
	"errors"
	"net"
	"os/exec"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/packaging/spinkube"
	"github.com/hearth-sh/hearth/test/cluster/ingress"
)

// behind has the ingress controller say this name, and no address, in the
// status of every Ingress; "": its address, as for all tests.
func behind(ctx context.Context, name string) error {
	front.Close()
	o := ingress.Options{Class: class, Listen: net.JoinHostPort(bench.HostIP(), "80"), Hostname: name}
	started, err := ingress.Start(ctx, bench.Client(), o)
	if err != nil {
		return err
	}
	front = started
	return nil
}

func TestALoadBalancerWithOnlyANameIsToldOf(t *testing.T) {
	const (
		name   = "lb-1234.elb.example.net"
		custom = "named.example.test"
	)
	tenant := newTenant(t)
	words := []string{name, "engine.baseDomain", "*.fn.example.com CNAME " + name}
	if err := behind(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	restored := false
	t.Cleanup(func() {
		if !restored {
			if err := behind(context.Background(), ""); err != nil {
				t.Error(err)
			}
		}
	})
	if err := bench.WaitFor(t.Context(), "the name to be the load balancer's", soon, func(ctx context.Context) (bool, error) {
		i, err := bench.Client().NetworkingV1().Ingresses("hearth-system").Get(ctx, "hearth-functions", metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		l := i.Status.LoadBalancer.Ingress
		return len(l) == 1 && l[0].Hostname == name && l[0].IP == "", nil
	}); err != nil {
		t.Fatal(err)
	}
	// Each replica sees it in its own time.
	var out, told string
	if err := bench.WaitFor(t.Context(), "who submits to be told", soon, func(ctx context.Context) (_ bool, err error) {
		out, told, err = nodeagent(ctx, "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "unreachable", wasmFile(t, "nobody comes"))
		if err != nil {
			return false, errors.New(out + told)
		}
		return strings.Contains(told, "warning: "), nil
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("the author reads:\n%s%s", out, told)
	for _, word := range words {
		if !strings.Contains(told, word) {
			t.Errorf("the warning lacks %q", word)
		}
	}
	if strings.Contains(out, "curl") || !strings.Contains(out, "no URL leads to it yet") {
		t.Errorf("a URL is shown that is none:\n%s", out)
	}
	waitObject(t, tenant, "unreachable", "the status to say why there is no URL", func(f *kube.Function) bool {
		message := readyOf(f).Message
		return f.Status.URL == "" && strings.Contains(message, words[0]) && strings.Contains(message, words[1])
	})
	for _, command := range [][]string{{"open"}, {"invoke"}} {
		var exit *exec.ExitError
		out, told, err := nodeagent(t.Context(), append(command, "--kubeconfig", bench.Kubeconfig(), "unreachable")...)
		if !errors.As(err, &exit) || exit.ExitCode() != 7 || out != "" || !strings.Contains(told, words[1]) {
			t.Errorf("%v: %v %q %s", command, err, out, told)
		}
	}
	if shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "unreachable"); !strings.Contains(shown, words[1]) || !strings.Contains(shown, "none yet") {
		t.Errorf("shown is\n%s", shown)
	}
	// A host of its own needs no domain.
	out = must(t, "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "named", "--host", custom, wasmFile(t, "by its own name"))
	if !strings.Contains(out, "curl http://"+custom+"/") {
		t.Errorf("the custom host is not offered:\n%s", out)
	}
	answers(t, "http://"+custom+"/", "by its own name")

	// A leader takes back what one before it said.
	pods := replicas(t)
	for _, p := range pods {
		killer(t, p)()
	}
	waitRestarted(t, pods...)
	if err := behind(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	restored = true
	f := waitObject(t, tenant, "unreachable", "the status to have a URL and no complaint", func(f *kube.Function) bool {
		return f.Status.URL != "" && !strings.Contains(readyOf(f).Message, name)
	})
	answers(t, f.Status.URL, "nobody comes")
	if _, told, err := nodeagent(t.Context(), "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "unreachable", wasmFile(t, "everybody comes")); err != nil || strings.Contains(told, "warning") {
		t.Errorf("%v: %s", err, told)
	}
	answers(t, f.Status.URL, "everybody comes")
}

func TestWithoutSpinKubeTheAuthorIsToldWhatToInstall(t *testing.T) {
	tenant := newTenant(t)
	definitions := bench.Dynamic().Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	const missing = "spinapps.core.spinkube.dev"
	if err := definitions.Delete(t.Context(), missing, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	restored := false
	restore := func(ctx context.Context) error {
		_, err := bench.ApplyManifest(ctx, spinkube.CRDs())
		return err
	}
	t.Cleanup(func() {
		if !restored {
			if err := restore(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	if err := bench.WaitFor(t.Context(), "the cluster to have forgotten SpinApps", soon, func(ctx context.Context) (bool, error) {
		_, err := bench.Dynamic().Resource(spinApps).Namespace(tenant).List(ctx, metav1.ListOptions{})
		return err != nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	words := []string{missing, "install SpinKube", "spin-operator.crds.yaml"}
	_, told, err := nodeagent(t.Context(), "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "no-spin",
		"--runtime", "spin", "--timeout", "5s", "--wait", "15s", wasmFile(t, "not yet"))
	if err == nil {
		t.Error("a function without pods is called ready")
	}
	t.Logf("the author reads:\n%s", told)
	for _, word := range append(words, "5000 ms is not kept") {
		if !strings.Contains(told, word) {
			t.Errorf("the command line does not say %q", word)
		}
	}
	waitObject(t, tenant, "no-spin", "the status to say what is missing", func(f *kube.Function) bool {
		c := readyOf(f)
		return c.Status == v1alpha1.ConditionFalse && strings.Contains(c.Message, words[0]) && strings.Contains(c.Message, words[2]) && strings.Contains(c.Message, "5000 ms is not kept")
	})
	if err := restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	restored = true
	if err := bench.WaitFor(t.Context(), "the SpinApp to be made by itself", soon, func(ctx context.Context) (bool, error) {
		there, err := made(ctx, tenant, "no-spin")
		return err == nil && there["SpinApp"], nil
	}); err != nil {
		t.Error(err)
	}
}
