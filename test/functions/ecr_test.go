package functions_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	awsecr "github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/ecr"
)

// shortLife of ECR's tokens: they are renewed before they end, so a test sees
// several.
const shortLife = 15 * time.Second

// roleKey is the access key of the role of a node's instance.
func roleKey(node int) string { return fmt.Sprintf("ASIATHISNODESROLE%03d", node) }

// instances makes every node an instance of EC2, with metadata at the one
// address and for one hop, until done is called. ECR's names lead to this machine
// from the start: a pod has them from when it was made.
func instances(ctx context.Context) (done func() error, err error) {
	listener, err := bench.ListenMetadata(ctx)
	if err != nil {
		return nil, err
	}
	byIP := map[string]*imdstest.Server{}
	for i, name := range nodes {
		hosts, err := os.OpenFile(bench.Node(name).Path("/etc/hosts"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return nil, errors.Join(err, listener.Close())
		}
		if _, err := hosts.WriteString("\n" + ecr.Hosts(bench.HostIP())); err != nil {
			return nil, errors.Join(err, hosts.Close(), listener.Close())
		}
		if err := hosts.Close(); err != nil {
			return nil, errors.Join(err, listener.Close())
		}
		config := imdstest.Default()
		config.InstanceID, config.LifeCycle, config.Region = fmt.Sprintf("i-0123456789abcde%02d", i), "on-demand", ecr.Region
		config.Credentials.AccessKeyID = roleKey(i)
		byIP[bench.Node(name).IP] = imdstest.New(config)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		if s := byIP[host]; s != nil {
			s.ServeHTTP(w, r)
			return
		}
		http.Error(w, "no instance has the address "+host, http.StatusNotFound)
	})
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() {
		served <- imdstest.Serve(serving, listener, handler, func() {
			for _, s := range byIP {
				s.Close()
			}
		})
	}()
	return func() error { cancel(); return <-served }, nil
}

// rolledOut waits until all replicas and agents are of the last revision, and
// those before are gone.
func rolledOut(ctx context.Context) error {
	return bench.WaitFor(ctx, "the chart's last revision to be everywhere", 2*soon, func(ctx context.Context) (bool, error) {
		api, err := bench.Client().AppsV1().Deployments(chart.Namespace).Get(ctx, "hearth-api", metav1.GetOptions{})
		if err != nil || api.Status.ObservedGeneration != api.Generation || api.Status.UpdatedReplicas != *api.Spec.Replicas ||
			api.Status.AvailableReplicas != *api.Spec.Replicas || api.Status.Replicas != *api.Spec.Replicas {
			return false, nil // looked at again
		}
		agents, err := bench.Client().AppsV1().DaemonSets(chart.Namespace).Get(ctx, "hearth-nodeagent", metav1.GetOptions{})
		if err != nil || agents.Status.ObservedGeneration != agents.Generation || agents.Status.UpdatedNumberScheduled != agents.Status.DesiredNumberScheduled ||
			agents.Status.NumberReady != agents.Status.DesiredNumberScheduled {
			return false, nil // looked at again
		}
		pods, err := podsOf(ctx, "api")
		return err == nil && len(pods) == int(*api.Spec.Replicas), nil
	})
}

// TestFunctionsGoToECRAndComeFromItByTheNodesRoleAlone installs the chart as on
// EC2: with a registry of ECR and no credentials for it. Pods reach ECR's names
// over TLS, and the role by instance metadata.
func TestFunctionsGoToECRAndComeFromItByTheNodesRoleAlone(t *testing.T) {
	ctx := t.Context()
	service := ecr.Start(t, ecr.Options{IP: bench.HostIP(), Authority: trusted})
	service.SetLife(shortLife)
	for _, name := range nodes {
		service.On(t, bench.Node(name))
	}
	t.Cleanup(func() {
		restore, stop := context.WithTimeout(context.Background(), 2*soon)
		defer stop()
		if err := install(restore); err != nil {
			t.Errorf("install the chart as it was: %v", err)
		} else if err := rolledOut(restore); err != nil {
			t.Error(err)
		}
	})
	values := []string{"api.imds=auto", "api.registryPlainHTTP=false", "api.registry=" + ecr.Host + "/hearth"}

	// One hop is too few for a pod with a network of its own, and it says so;
	// the replicas before it go on.
	if err := install(ctx, values...); err != nil {
		t.Fatal(err)
	}
	const said = "instance metadata does not answer this pod: raise the instance's hop limit to 2, or set api.hostNetwork"
	if err := bench.WaitFor(ctx, "a replica to say that metadata is out of reach", soon, func(ctx context.Context) (bool, error) {
		pods, err := podsOf(ctx, "api")
		if err != nil {
			return false, err
		}
		for _, p := range pods {
			if log, err := bench.PodLogs(ctx, p.Namespace, p.Name, ""); err == nil && strings.Contains(log, said) {
				return true, nil
			}
		}
		return false, nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := install(ctx, append(values, "api.hostNetwork=true")...); err != nil {
		t.Fatal(err)
	}
	if err := rolledOut(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(service.Tokens()); n != 0 {
		t.Errorf("%d tokens were asked for before anything was to be pushed or pulled", n)
	}

	tenant := newTenant(t)
	f := submit(t, tenant, "in-ecr", "out of ECR")
	repository := "hearth/" + tenant + "/in-ecr"
	if !strings.HasPrefix(f.Image, ecr.Host+"/"+repository+"@sha256:") {
		t.Errorf("the function's image is %s", f.Image)
	}
	answers(t, f.URL, "out of ECR")
	waitObject(t, tenant, "in-ecr", "every node to be warm", allWarm)
	made, err := service.API.DescribeRepositories(ctx, &awsecr.DescribeRepositoriesInput{RepositoryNames: []string{repository}})
	if err != nil {
		t.Fatal(err)
	}
	if r := made.Repositories[0]; r.ImageTagMutability != types.ImageTagMutabilityImmutable {
		t.Errorf("the repository was made with %s tags", r.ImageTagMutability)
	}
	policy, err := service.API.GetLifecyclePolicy(ctx, &awsecr.GetLifecyclePolicyInput{RepositoryName: &repository})
	if err != nil || !strings.Contains(*policy.LifecyclePolicyText, `"untagged"`) {
		t.Errorf("its lifecycle policy: %v, %+v", err, policy)
	}
	asked := map[string]bool{}
	for _, token := range service.Tokens() {
		asked[token.Key] = true
	}
	for i, name := range nodes {
		if !asked[roleKey(i)] {
			t.Errorf("no token was asked for with the role of %s", name)
		}
		delete(asked, roleKey(i))
	}
	if len(asked) != 0 {
		t.Errorf("tokens were asked for with the access keys of nobody: %v", asked)
	}

	// Who submits is told what the role lacks.
	for i := range nodes {
		service.Deny(roleKey(i), "CreateRepository")
	}
	_, stderr, err := nodeagent(ctx, "submit", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, "--name", "not-in-ecr", wasmFile(t, "never"))
	if err == nil || !strings.Contains(stderr, "allow ecr:CreateRepository on it to the role hearth-node") {
		t.Errorf("without the permission: %v: %s", err, stderr)
	}

	// The pushes' token ends, and the next push has another.
	last := pushedWith(t, service, repository)
	if err := bench.WaitFor(ctx, "the token of the push to expire", soon, func(context.Context) (bool, error) {
		return time.Now().After(last.Expires), nil
	}); err != nil {
		t.Fatal(err)
	}
	if again := submit(t, tenant, "in-ecr", "out of ECR once more"); again.Revision != 2 {
		t.Errorf("%+v", again)
	}
	answers(t, f.URL, "out of ECR once more")
	if next := pushedWith(t, service, repository); next.Password == last.Password || !next.Expires.After(last.Expires) {
		t.Errorf("the second push had the token of the first, until %s", last.Expires)
	}
	t.Logf("%d tokens were issued, %d requests refused", len(service.Tokens()), service.Refusals())
}

// pushedWith is the token of the last push to a repository.
func pushedWith(t *testing.T, service *ecr.Service, repository string) ecr.Token {
	t.Helper()
	for _, r := range slices.Backward(service.Requests()) {
		if !r.Push() || r.Repository != repository {
			continue
		}
		for _, token := range service.Tokens() {
			if token.Password == r.Password {
				return token
			}
		}
	}
	t.Fatalf("nothing was pushed to %s", repository)
	return ecr.Token{}
}
