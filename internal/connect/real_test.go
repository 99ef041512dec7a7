package connect

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/test/cluster"
)

const apiImage = "hearth.test/api:1"

// shared is the one real cluster of this package's tests, with a small server
// in the place of the API.
var shared = cluster.Shared{
	Start: startBench,
	// client-go keeps a few for the life of the process.
	Leaks: []goleak.Option{goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1")},
}

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

func realCluster(t *testing.T) *cluster.Cluster { t.Helper(); return shared.Need(t) }

func startBench(ctx context.Context) (*cluster.Cluster, error) {
	c, err := cluster.New(ctx, cluster.Options{})
	if err != nil {
		return nil, err
	}
	binary, err := cluster.GoBinary(ctx, "./internal/connect/testdata/api")
	if err != nil {
		return c, err
	}
	if err := c.LoadBinaryImage(ctx, apiImage, map[string]string{"/api": binary}); err != nil {
		return c, err
	}
	return c, install(ctx, c)
}

// install makes what the chart makes, as far as this package sees it.
func install(ctx context.Context, c *cluster.Cluster) error {
	certificate, key, err := keyPair(Service + "." + DefaultNamespace + ".svc")
	if err != nil {
		return err
	}
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: DefaultNamespace}
	}
	labels := map[string]string{"app": Service}
	one := int32(1)
	core := c.Client().CoreV1()
	var errs []error
	_, err = core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: DefaultNamespace}}, metav1.CreateOptions{})
	errs = append(errs, err)
	_, err = core.ServiceAccounts(DefaultNamespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta(DefaultServiceAccount)}, metav1.CreateOptions{})
	errs = append(errs, err)
	_, err = core.ConfigMaps(DefaultNamespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: meta(Service), Data: map[string]string{"ca.crt": string(certificate)}}, metav1.CreateOptions{})
	errs = append(errs, err)
	_, err = core.Secrets(DefaultNamespace).Create(ctx, &corev1.Secret{ObjectMeta: meta("hearth-api-tls"), Data: map[string][]byte{"tls.crt": certificate, "tls.key": key}}, metav1.CreateOptions{})
	errs = append(errs, err)
	_, err = core.Services(DefaultNamespace).Create(ctx, &corev1.Service{ObjectMeta: meta(Service), Spec: corev1.ServiceSpec{
		Selector: labels,
		Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}, {Name: "https", Port: 443, TargetPort: intstr.FromInt32(8443)}},
	}}, metav1.CreateOptions{})
	errs = append(errs, err)
	none := int64(0)
	_, err = c.Client().AppsV1().Deployments(DefaultNamespace).Create(ctx, &appsv1.Deployment{ObjectMeta: meta(Service), Spec: appsv1.DeploymentSpec{
		Replicas: &one,
		Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &none,
			Containers: []corev1.Container{{
				Name: "api", Image: apiImage, ImagePullPolicy: corev1.PullIfNotPresent, Args: []string{":8443", "/tls"},
				VolumeMounts:   []corev1.VolumeMount{{Name: "tls", MountPath: "/tls"}},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8443)}}},
			}},
			Volumes: []corev1.Volume{{Name: "tls", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "hearth-api-tls"}}}},
		}},
	}}, metav1.CreateOptions{})
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return waitReady(ctx, c, 1)
}

// waitReady waits until that many endpoints are ready, and no more.
func waitReady(ctx context.Context, c *cluster.Cluster, want int) error {
	look, err := Load(Options{Kubeconfig: c.Kubeconfig()})
	if err != nil {
		return err
	}
	defer look.Close()
	return c.WaitFor(ctx, fmt.Sprintf("%d ready pods of the API", want), time.Minute, func(ctx context.Context) (bool, error) {
		ready, err := look.backends(ctx, "https")
		return len(ready) == want, err
	})
}

// keyPair makes a certificate that is its own authority.
func keyPair(name string) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), err
}

// rights are those of the package's doc comment, by what they are for.
func rights() map[string]rbacv1.PolicyRule {
	return map[string]rbacv1.PolicyRule{
		"services":              {Verbs: []string{"get"}, APIGroups: []string{""}, Resources: []string{"services"}, ResourceNames: []string{Service}},
		"endpointslices":        {Verbs: []string{"list"}, APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}},
		"configmaps":            {Verbs: []string{"get"}, APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{Service}},
		"serviceaccounts/token": {Verbs: []string{"create"}, APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, ResourceNames: []string{DefaultServiceAccount}},
		"pods/portforward":      {Verbs: []string{"get", "create"}, APIGroups: []string{""}, Resources: []string{"pods/portforward"}},
	}
}

// grant gives a subject all rights but those left out, and waits until the
// API server knows.
func grant(t *testing.T, c *cluster.Cluster, name string, subject rbacv1.Subject, without ...string) {
	t.Helper()
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: DefaultNamespace}}
	for right, rule := range rights() {
		if !strings.Contains(strings.Join(without, " "), right) {
			role.Rules = append(role.Rules, rule)
		}
	}
	ctx := t.Context()
	if _, err := c.Client().RbacV1().Roles(DefaultNamespace).Create(ctx, role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client().RbacV1().RoleBindings(DefaultNamespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: role.ObjectMeta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name}, Subjects: []rbacv1.Subject{subject},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// kubeconfig is one with a client certificate for the user.
func kubeconfig(t *testing.T, c *cluster.Cluster, user string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), user+".kubeconfig")
	if err := c.IssueKubeconfig(path, user); err != nil {
		t.Fatal(err)
	}
	return path
}

// withUser rewrites the credentials of an administrator's kubeconfig.
func withUser(t *testing.T, c *cluster.Cluster, user *clientcmdapi.AuthInfo) string {
	t.Helper()
	config, err := clientcmd.LoadFromFile(c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	for name := range config.AuthInfos {
		config.AuthInfos[name] = user
	}
	for _, chosen := range config.Contexts {
		chosen.Namespace = "team-a"
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string) *Connection {
	t.Helper()
	loaded, err := Load(Options{Kubeconfig: path, UserAgent: "connect-test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(loaded.Close)
	// RBAC rules reach the API server's authorizer a moment after their objects.
	var k *Connection
	for end := time.Now().Add(20 * time.Second); ; {
		if k, err = loaded.Connect(t.Context(), ConnectOptions{}); err == nil {
			break
		}
		var known *Error
		if !errors.As(err, &known) || !known.Denied || time.Now().After(end) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

func clientOf(t *testing.T, k *Connection) *client.Client {
	t.Helper()
	cl, err := client.New(client.Options{URL: k.URL(), Name: k.String(), Transport: k.RoundTripper(), Token: k.Token,
		OnRetry: func(err error, delay time.Duration) { t.Logf("again in %v: %v", delay, err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	return cl
}

// ask returns which pod answered, the token it got and the protocol.
func ask(t *testing.T, cl *client.Client) v1alpha1.Function {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	f, _, err := cl.Get(ctx, "hello")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestAPIIsReachedWithEveryKindOfCredential(t *testing.T) {
	c := realCluster(t)
	ctx := t.Context()
	if _, err := c.Client().CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	grant(t, c, "robot", rbacv1.Subject{Kind: "ServiceAccount", Namespace: "default", Name: "robot"})
	made, err := c.Client().CoreV1().ServiceAccounts("default").CreateToken(ctx, "robot", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	grant(t, c, "jane", rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: "User", Name: "jane"})
	plugin := filepath.Join(t.TempDir(), "plugin")
	credential, err := json.Marshal(map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": map[string]string{"token": made.Status.Token}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(plugin, fmt.Appendf(nil, "#!/bin/sh\ncat <<'END'\n%s\nEND\n", credential), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"an administrator's client certificate":           c.Kubeconfig(),
		"a client certificate with the documented rights": kubeconfig(t, c, "jane"),
		"a token": withUser(t, c, &clientcmdapi.AuthInfo{Token: made.Status.Token}),
		"a credential plugin": withUser(t, c, &clientcmdapi.AuthInfo{Exec: &clientcmdapi.ExecConfig{
			APIVersion: "client.authentication.k8s.io/v1", Command: plugin, InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
		}}),
	} {
		t.Run(name, func(t *testing.T) {
			k := open(t, path)
			f := ask(t, clientOf(t, k))
			if f.URL != "HTTP/2.0" {
				t.Errorf("the API was asked by %s", f.URL)
			}
			review, err := c.Client().AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{
				Spec: authenticationv1.TokenReviewSpec{Token: f.Image, Audiences: []string{v1alpha1.Group}},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if want := "system:serviceaccount:hearth-system:hearth-cli"; !review.Status.Authenticated || review.Status.User.Username != want {
				t.Errorf("the token is of %+v", review.Status)
			}
			want := "default"
			if strings.Contains(name, "token") || strings.Contains(name, "plugin") {
				want = "team-a"
			}
			if got := k.cluster.Tenant(); got != want {
				t.Errorf("the tenant is %q, want %q", got, want)
			}
		})
	}
}

func TestMissingRightIsNamed(t *testing.T) {
	c := realCluster(t)
	n := 0
	for right := range rights() {
		n++
		user := fmt.Sprintf("user-%d", n)
		t.Run(right, func(t *testing.T) {
			grant(t, c, user, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}, right)
			loaded, err := Load(Options{Kubeconfig: kubeconfig(t, c, user)})
			if err != nil {
				t.Fatal(err)
			}
			defer loaded.Close()
			var last error
			err = c.WaitFor(t.Context(), "the other rights to be known", 20*time.Second, func(ctx context.Context) (bool, error) {
				k, err := loaded.Connect(ctx, ConnectOptions{})
				if err == nil {
					return false, errors.Join(errors.New("it connected"), k.Close())
				}
				last = err
				var known *Error
				return errors.As(err, &known) && known.Denied && strings.Contains(known.Remedy, right), nil
			})
			if err != nil {
				t.Fatalf("%v; last: %v", err, last)
			}
			if !strings.Contains(last.Error(), `"`+user+`"`) {
				t.Errorf("the user is not named: %v", last)
			}
			t.Log(last, "|", last.(*Error).Remedy)
		})
	}
}

func TestWhatIsNotInTheClusterIsNamed(t *testing.T) {
	c := realCluster(t)
	down := withUser(t, c, &clientcmdapi.AuthInfo{Token: "nobody's"})
	for name, tt := range map[string]struct {
		o    Options
		want string
	}{
		"no chart":              {Options{Kubeconfig: c.Kubeconfig(), Namespace: "default"}, "there is no Service hearth-api in the namespace default"},
		"no ServiceAccount":     {Options{Kubeconfig: c.Kubeconfig(), ServiceAccount: "team-b/deployer"}, "there is no ServiceAccount team-b/deployer"},
		"credentials not known": {Options{Kubeconfig: down}, "does not accept the credentials"},
	} {
		t.Run(name, func(t *testing.T) {
			loaded, err := Load(tt.o)
			if err != nil {
				t.Fatal(err)
			}
			defer loaded.Close()
			_, err = loaded.Connect(t.Context(), ConnectOptions{})
			var known *Error
			if !errors.As(err, &known) || !strings.Contains(known.Message, tt.want) || known.Remedy == "" {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestBothWaysToForwardCarryRequests(t *testing.T) {
	c := realCluster(t)
	loaded, err := Load(Options{Kubeconfig: c.Kubeconfig()})
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.Close()
	ready, err := loaded.backends(t.Context(), "https")
	if err != nil || len(ready) != 1 {
		t.Fatal(ready, err)
	}
	target := loaded.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(DefaultNamespace).Name(ready[0].pod).SubResource("portforward").URL()
	for name, forward := range map[string]func() (*session, error){
		"websocket": func() (*session, error) {
			streams, err := loaded.forwardWebSocket(t.Context(), target)
			return &session{backend: ready[0], streams: streams}, err
		},
		"spdy": func() (*session, error) {
			streams, err := loaded.forwardSPDY(t.Context(), target)
			return &session{backend: ready[0], streams: streams}, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := open(t, c.Kubeconfig())
			s, err := forward()
			if err != nil {
				t.Fatal(err)
			}
			k.mu.Lock()
			k.current.close()
			k.current = s
			k.mu.Unlock()
			cl := clientOf(t, k)
			if f := ask(t, cl); f.Name != ready[0].pod {
				t.Errorf("%s answered, not %s", f.Name, ready[0].pod)
			}
			// More than one window of either protocol.
			const size = 5 << 20
			f, err := cl.Put(t.Context(), "hello", client.Source{Size: size, Module: func() (io.ReadCloser, error) {
				return io.NopCloser(io.LimitReader(zeros{}, size)), nil
			}}, client.Change{})
			if err != nil || f.Revision != size {
				t.Errorf("%d bytes arrived: %v", f.Revision, err)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestPortThatNobodyServesIsSaid(t *testing.T) {
	c := realCluster(t)
	k := open(t, c.Kubeconfig())
	k.mu.Lock()
	k.current.backend.port = 9
	k.mu.Unlock()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, k.URL(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := k.RoundTripper().RoundTrip(req)
	if err == nil {
		resp.Body.Close()
		t.Fatal("somebody answered")
	}
	if !strings.Contains(err.Error(), "refused") {
		t.Error(err)
	}
	// What failed is replaced by what is true.
	if f := ask(t, clientOf(t, k)); f.Name == "" {
		t.Errorf("%+v", f)
	}
}

func TestReplacedPodIsFollowed(t *testing.T) {
	c := realCluster(t)
	cl := clientOf(t, open(t, c.Kubeconfig()))
	before := ask(t, cl).Name

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var deleted sync.Once
	after := ""
	err := cl.Logs(ctx, "hello", client.LogOptions{Follow: true, Tail: 0}, func(l v1alpha1.LogLine) error {
		if l.Line == before {
			deleted.Do(func() {
				none := int64(0)
				err := c.Client().CoreV1().Pods(DefaultNamespace).Delete(ctx, before, metav1.DeleteOptions{GracePeriodSeconds: &none})
				if err != nil && !apierrors.IsNotFound(err) {
					t.Error(err)
				}
			})
			return nil
		}
		after = l.Line
		cancel()
		return nil
	})
	if err != nil || after == "" || after == before {
		t.Errorf("%q followed %q: %v", after, before, err)
	}
	if f := ask(t, cl); f.Name != after {
		t.Errorf("%s answers, not %s", f.Name, after)
	}
}

func TestRestartedAPIServerIsSurvived(t *testing.T) {
	c := realCluster(t)
	cl := clientOf(t, open(t, c.Kubeconfig()))
	ask(t, cl)
	if err := c.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	ask(t, cl)
}

func TestNobodyReadyIsSaidAtOnceAndWaitedForLater(t *testing.T) {
	c := realCluster(t)
	scale := func(replicas int32) {
		t.Helper()
		deployments := c.Client().AppsV1().Deployments(DefaultNamespace)
		s, err := deployments.GetScale(t.Context(), Service, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s.Spec.Replicas = replicas
		if _, err := deployments.UpdateScale(t.Context(), Service, s, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	cl := clientOf(t, open(t, c.Kubeconfig()))
	ask(t, cl)
	scale(0)
	if err := waitReady(t.Context(), c, 0); err != nil {
		t.Fatal(err)
	}
	loaded, err := Load(Options{Kubeconfig: c.Kubeconfig()})
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.Close()
	_, err = loaded.Connect(t.Context(), ConnectOptions{})
	var known *Error
	if !errors.As(err, &known) || !strings.Contains(known.Message, "no pod of the Service hearth-api") {
		t.Errorf("%v", err)
	}
	scale(1)
	ask(t, cl)
}

func TestRenewedTokenIsAnother(t *testing.T) {
	c := realCluster(t)
	k := open(t, c.Kubeconfig())
	first, err := k.Token(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if same, err := k.Token(t.Context(), ""); err != nil || same != first {
		t.Errorf("a good token was replaced (%v)", err)
	}
	if other, err := k.Token(t.Context(), first); err != nil || other == first {
		t.Errorf("a rejected token was given again (%v)", err)
	}
	loaded := k.cluster
	made, err := loaded.NewToken(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(made.ExpiresAt); left < 50*time.Minute || left > 70*time.Minute || strings.Contains(fmt.Sprint(made), made.Value) {
		t.Errorf("good for %v; printed as %v", left, made)
	}
}
