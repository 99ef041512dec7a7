package node_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/test/cluster"
)

// imageBehindAPullSecretIsLeftToKubelet has the secret at the ServiceAccount,
// which is where it is least visible: the workload does not name it.
func imageBehindAPullSecretIsLeftToKubelet(t *testing.T) {
	ctx := t.Context()
	const user, password, tenant = "tenant", "of their own", "private"
	registry, err := bench.Registry(ctx, cluster.RegistryOptions{User: user, Password: password})
	if err != nil {
		t.Fatal(err)
	}
	text := "behind a secret " + rand.Text()
	module := marked(t, text)
	repository := earlyRepository(wasmNode, registry.Host, "private")
	pushAs(t, registry.Host, user, password, repository, wasmImage(t, module))

	client := bench.Client()
	if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: tenant}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.AppsV1().Deployments(tenant).Delete(context.Background(), "app", metav1.DeleteOptions{})
		_ = client.CoreV1().Namespaces().Delete(context.Background(), tenant, metav1.DeleteOptions{})
	})
	config, err := json.Marshal(map[string]any{"auths": map[string]any{registry.Host: map[string]string{"username": user, "password": password}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Secrets(tenant).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: config},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().ServiceAccounts(tenant).Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: "app"}, ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	class, labels, none := "hearth-wasmtime", map[string]string{"app": "app"}, int32(0)
	if _, err := client.AppsV1().Deployments(tenant).Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "app"},
		Spec: appsv1.DeploymentSpec{Replicas: &none, Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels},
			Spec: corev1.PodSpec{RuntimeClassName: &class, ServiceAccountName: "app", TerminationGracePeriodSeconds: new(int64(1)),
				Containers: []corev1.Container{{Name: "main", Image: registry.Host + "/" + repository + ":1", ImagePullPolicy: corev1.PullIfNotPresent}}},
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	s := waitStatus(t, wasmNode, "the image to be left to kubelet", func(s v1alpha1.NodeStatus) bool {
		return s.Images != nil && len(s.Images.Images) == 1 && s.Images.Images[0].State == string(images.StateDeferred)
	})
	i := s.Images.Images[0]
	t.Logf("a person reads: %s", s.Images.Summary)
	if i.Error == nil || i.Error.Code != images.CodePullSecret || strings.Contains(i.Error.Detail, "401") || !strings.Contains(i.Error.Detail, fmt.Sprintf("pull secret %s/pull", tenant)) {
		t.Errorf("%+v", i)
	}
	if s.Images.Failed != 0 || check(s, "images").State != v1alpha1.CheckOK {
		t.Errorf("what is so by design is called a fault: %+v", check(s, "images"))
	}

	if _, err := client.AppsV1().Deployments(tenant).UpdateScale(ctx, "app", &autoscalingv1.Scale{
		ObjectMeta: metav1.ObjectMeta{Name: "app", Namespace: tenant}, Spec: autoscalingv1.ScaleSpec{Replicas: 1},
	}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := bench.WaitFor(ctx, "the module's line in the pod's log", soon, func(ctx context.Context) (bool, error) {
		pods, err := client.CoreV1().Pods(tenant).List(ctx, metav1.ListOptions{LabelSelector: "app=app"})
		if err != nil || len(pods.Items) == 0 {
			return false, err
		}
		said, err := bench.PodLogs(ctx, tenant, pods.Items[0].Name, "")
		return err == nil && strings.Contains(said, text), nil
	}); err != nil {
		t.Fatal(err)
	}
	allWarm(t, 1)
	if !compiled(wasmNode, module) {
		t.Error("the store has no object of the module that kubelet brought")
	}
}
