package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/test/cluster"
)

// shared is one cluster for all tests of the package, without nodes.
var shared = cluster.Shared{Start: func(ctx context.Context) (*cluster.Cluster, error) {
	return cluster.New(ctx, cluster.Options{ControlPlaneOnly: true})
}}

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

func realCluster(t *testing.T) *cluster.Cluster { t.Helper(); return shared.Need(t) }

// newNamespace makes one for the test.
func newNamespace(t *testing.T, c *cluster.Cluster) string {
	t.Helper()
	n, err := c.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n.Name
}

func trusts(t *testing.T, c *cluster.Cluster, namespace string) *x509.CertPool {
	t.Helper()
	m, err := c.Client().CoreV1().ConfigMaps(namespace).Get(t.Context(), trustConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(m.Data[caCertKey])) {
		t.Fatalf("no certificate in %q", m.Data)
	}
	return pool
}

func (c *certificate) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	pair, err := c.Get(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func TestReplicasThatStartTogetherServeOneCertificateThatClientsTrust(t *testing.T) {
	c := realCluster(t)
	namespace := newNamespace(t, c)
	replicas := make([]*certificate, 4)
	var all sync.WaitGroup
	for i := range replicas {
		replicas[i] = &certificate{client: c.Client(), namespace: namespace, now: time.Now, log: slog.New(slog.DiscardHandler)}
		all.Go(func() {
			if err := replicas[i].Ensure(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	pool := trusts(t, c, namespace)
	for _, r := range replicas {
		if !r.leaf(t).Equal(replicas[0].leaf(t)) {
			t.Error("two replicas serve different certificates")
		}
		for _, name := range r.names() {
			if _, err := r.leaf(t).Verify(x509.VerifyOptions{DNSName: name, Roots: pool}); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestACertificateIsRenewedBeforeItsEndUnderTheSameAuthority(t *testing.T) {
	c := realCluster(t)
	namespace := newNamespace(t, c)
	now := time.Now()
	r := &certificate{client: c.Client(), namespace: namespace, now: func() time.Time { return now }, log: slog.New(slog.DiscardHandler)}
	ensure := func() *x509.Certificate {
		t.Helper()
		if err := r.Ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
		return r.leaf(t)
	}
	first := ensure()
	old := trusts(t, c, namespace)
	if !ensure().Equal(first) {
		t.Error("a good certificate was replaced")
	}
	now = first.NotAfter.Add(-renewBefore + time.Hour)
	second := ensure()
	if second.Equal(first) {
		t.Fatal("a certificate about to end was kept")
	}
	if _, err := second.Verify(x509.VerifyOptions{DNSName: r.names()[0], Roots: old, CurrentTime: now}); err != nil {
		t.Errorf("who trusted the old one does not trust the new one: %v", err)
	}
	// The authority ends one day, too; the one before stays trusted beside it.
	now = now.Add(authorityLife - certificateLife)
	third := ensure()
	pool := trusts(t, c, namespace)
	if _, err := third.Verify(x509.VerifyOptions{DNSName: r.names()[0], Roots: pool, CurrentTime: now}); err != nil {
		t.Error(err)
	}
	if _, err := third.Verify(x509.VerifyOptions{DNSName: r.names()[0], Roots: old, CurrentTime: now}); err == nil {
		t.Error("the authority was not replaced")
	}
}

func TestADamagedCertificateIsReplaced(t *testing.T) {
	c := realCluster(t)
	namespace := newNamespace(t, c)
	r := &certificate{client: c.Client(), namespace: namespace, now: time.Now, log: slog.New(slog.DiscardHandler)}
	if err := r.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := r.leaf(t)
	secret, err := c.Client().CoreV1().Secrets(namespace).Get(t.Context(), certificateSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.Data[caCertKey] = []byte("nonsense")
	if _, err := c.Client().CoreV1().Secrets(namespace).Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.leaf(t).Equal(first) {
		t.Error("it was kept")
	}
	if _, err := r.leaf(t).Verify(x509.VerifyOptions{DNSName: r.names()[0], Roots: trusts(t, c, namespace)}); err != nil {
		t.Error(err)
	}
}
