package clusternode

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/hearth-sh/hearth/internal/kube"
)

func TestAuthorityOfTheAPIIsWhatItsConfigMapSays(t *testing.T) {
	configMap := func(namespace, name, key string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Data: map[string]string{key: "PEM of " + name}}
	}
	client := fake.NewClientset(configMap("hearth-system", "other", "ca.crt"), configMap("elsewhere", "hearth-api", "ca.crt"))
	c := &cluster{o: Options{Clients: &kube.Clients{Tainter: client}, Namespace: "hearth-system"}}
	name, certificates, address := c.APIAuthority()
	if name != "hearth-api.hearth-system.svc" {
		t.Errorf("server name %s", name)
	}
	if _, err := certificates(t.Context()); err == nil || !strings.Contains(err.Error(), "hearth-system/hearth-api") {
		t.Errorf("without the ConfigMap: %v", err)
	}
	if address() != "" {
		t.Errorf("an address out of nothing: %s", address())
	}
	ours := configMap("hearth-system", "hearth-api", "ca.crt")
	ours.Data["address"] = "10.96.1.2:443"
	if _, err := client.CoreV1().ConfigMaps("hearth-system").Create(t.Context(), ours, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if pem, err := certificates(t.Context()); err != nil || string(pem) != "PEM of hearth-api" {
		t.Errorf("%q, %v", pem, err)
	}
	if address() != "10.96.1.2:443" {
		t.Errorf("address %q", address())
	}
}
