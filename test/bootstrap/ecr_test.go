package bootstrap_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/ecr"
	"github.com/hearth-sh/hearth/test/machine"
)

const (
	// pullerKey is the access key of the role of the node that pulls from ECR.
	pullerKey = "ASIATHEROLEOFTHENODE"
	// ecrImage is in a private registry.
	ecrImage = ecr.Host + "/team/pause:1"
	// trustStore of the machines.
	trustStore = "/etc/ssl/certs/ca-certificates.crt"
)

// startECR makes ECR with an image in it, which denies the puller its token
// until undone.
func (l *lab) startECR() (service *ecr.Service, undo func()) {
	l.t.Helper()
	ctx := l.t.Context()
	service = ecr.Start(l.t, ecr.Options{IP: l.network.HostIP(), Moto: l.aws})
	pause, err := cluster.GoBinary(ctx, "./test/cluster/images/pause")
	if err != nil {
		l.t.Fatal(err)
	}
	image, err := cluster.BinaryImage(map[string]string{"/pause": pause})
	if err != nil {
		l.t.Fatal(err)
	}
	// Not what a node has under another name.
	if image, err = mutate.Config(image, v1.Config{Entrypoint: []string{"/pause"}, Labels: map[string]string{"from": ecr.Host}}); err != nil {
		l.t.Fatal(err)
	}
	_, repository, _ := strings.Cut(ecrImage, "/")
	reference, err := name.ParseReference(service.Registry+"/"+repository, name.Insecure)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := remote.Write(reference, image, remote.WithContext(ctx), remote.WithTransport(&http.Transport{DisableKeepAlives: true})); err != nil {
		l.t.Fatal(err)
	}
	return service, service.Deny(pullerKey, "GetAuthorizationToken")
}

// provider publishes the real credential provider of ECR and returns its entry
// for spec.artifacts.
func (l *lab) provider() string {
	l.t.Helper()
	program, err := ecr.BuildProvider(l.t.Context(), l.t.TempDir())
	if err != nil {
		l.t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := l.put(l.t.Context(), filesBucket, k3s.ECRProvider, content); err != nil {
		l.t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	return fmt.Sprintf("    files:\n    - name: %s\n      sha256: %s\n      urls: [\"s3://%s/%s\"]\n", k3s.ECRProvider, hex.EncodeToString(sum[:]), filesBucket, k3s.ECRProvider)
}

// asRole is the role of a machine whose credentials have the key.
func asRole(key string) machine.Spec {
	return machine.Spec{Configure: func(c *imdstest.Config) { c.Credentials.AccessKeyID = key }}
}

// reaches makes ECR's names lead to the service on a machine that is switched
// off, and trusted there, as they are on every machine that can reach AWS.
func reaches(t *testing.T, m *machine.Machine, service *ecr.Service) {
	t.Helper()
	for path, more := range map[string]string{"/etc/hosts": service.Hosts(), trustStore: string(service.Authority.PEM)} {
		before, err := os.ReadFile(m.Path(path))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if err := m.WriteFile(path, fmt.Appendf(before, "\n%s", more), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// pullOn makes a pod of the private image on a node and returns its name.
func pullOn(t *testing.T, kube kubernetes.Interface, node string) string {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "from-ecr-" + node},
		Spec: corev1.PodSpec{
			NodeName: node, HostNetwork: true, AutomountServiceAccountToken: new(bool), TerminationGracePeriodSeconds: new(int64),
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers:  []corev1.Container{{Name: "pause", Image: ecrImage}},
		},
	}
	if _, err := kube.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return pod.Name
}

// waitPod waits until a pod runs, or its image cannot be had.
func waitPod(t *testing.T, on *machine.Machine, kube kubernetes.Interface, pod string, running bool) {
	t.Helper()
	var last corev1.PodStatus
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := on.WaitFor(ctx, fmt.Sprintf("%s to run (%t)", pod, running), func(ctx context.Context) (bool, error) {
		p, err := kube.CoreV1().Pods(metav1.NamespaceDefault).Get(ctx, pod, metav1.GetOptions{})
		if err != nil || len(p.Status.ContainerStatuses) == 0 {
			return false, nil // looked at again
		}
		last = p.Status
		state := p.Status.ContainerStatuses[0].State
		return running && state.Running != nil || !running && state.Waiting != nil && (state.Waiting.Reason == "ErrImagePull" || state.Waiting.Reason == "ImagePullBackOff"), nil
	}); err != nil {
		t.Fatalf("%v; it is %+v", err, last)
	}
}

// nodesPullFromECR has a pod of a private image on two nodes. Only one of them
// has the credential provider of ECR; what it is denied for now, undo allows. The
// kubelet then waits before it tries again, for which the returned rest need not
// be waited.
func nodesPullFromECR(t *testing.T, kube kubernetes.Interface, service *ecr.Service, undo func(), puller, without *machine.Machine) (rest func()) {
	t.Helper()
	pods := map[*machine.Machine]string{puller: pullOn(t, kube, puller.InstanceID), without: pullOn(t, kube, without.InstanceID)}
	for m, pod := range pods {
		waitPod(t, m, kube, pod, false)
	}
	if n := len(service.Tokens()); n != 0 {
		t.Errorf("%d tokens were issued to roles that may have none", n)
	}
	undo()
	return func() {
		t.Helper()
		waitPod(t, puller, kube, pods[puller], true)
		tokens := map[string]bool{}
		for _, token := range service.Tokens() {
			tokens[token.Password] = true
			if token.Key != pullerKey {
				t.Errorf("a token was asked for with the access key %s, the puller's role has %s", token.Key, pullerKey)
			}
		}
		if len(tokens) != 1 {
			t.Errorf("%d tokens were issued for one pull", len(tokens))
		}
		let := service.Requests()
		if len(let) == 0 {
			t.Error("the registry let nobody in: where is the image from?")
		}
		for _, r := range let {
			if !tokens[r.Password] {
				t.Errorf("%s of %s came with the password %q", r.Method, r.Repository, r.Password)
			}
		}
		waitPod(t, without, kube, pods[without], false)
		if _, err := os.Lstat(without.Path(k3s.CredentialProviderConfig)); err == nil {
			t.Errorf("%s is on a node that has no provider", k3s.CredentialProviderConfig)
		}
		for _, pod := range pods {
			if err := kube.CoreV1().Pods(metav1.NamespaceDefault).Delete(t.Context(), pod, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		}
	}
}
