package api

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"slices"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1apply "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// certificateSecret holds the authority and the certificate all replicas
	// serve with; trustConfigMap what clients need to trust it.
	certificateSecret = "hearth-api-tls" //nolint:gosec // a name
	trustConfigMap    = "hearth-api"
	// caCertKey and caKeyKey are keys of the Secret beside those of its type;
	// caCertKey is the key of the ConfigMap as well.
	caCertKey = "ca.crt"
	caKeyKey  = "ca.key"
	// addressKey of the ConfigMap is where the Service answers, host:port, for
	// nodes, where the cluster's names need not resolve.
	addressKey = "address"

	authorityLife   = 10 * 365 * 24 * time.Hour
	certificateLife = 365 * 24 * time.Hour
	// renewBefore is how long before its end a certificate is replaced: longer
	// than anybody's holidays.
	renewBefore = 60 * 24 * time.Hour
	// backdate allows for clients whose clock is behind.
	backdate = time.Hour
	// refreshEvery is how often a replica looks whether another renewed.
	refreshEvery = time.Hour
	// ensureAttempts bounds how often replicas that start together may get in
	// each other's way.
	ensureAttempts = 10
)

// certificate is what the replicas' TLS listeners show.
type certificate struct {
	client    kubernetes.Interface
	namespace string
	now       func() time.Time
	log       *slog.Logger
	current   atomic.Pointer[tls.Certificate]
}

// names are what clients may call the API by, inside the cluster.
func (c *certificate) names() []string {
	short := serviceName + "." + c.namespace
	return []string{short + ".svc", serviceName, short, short + ".svc.cluster.local"}
}

// Get is for tls.Config.GetCertificate.
func (c *certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if current := c.current.Load(); current != nil {
		return current, nil
	}
	return nil, errors.New("no certificate yet")
}

// Run takes over what another replica renewed, and renews, until ctx ends.
func (c *certificate) Run(ctx context.Context) {
	ticker := time.NewTicker(refreshEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := c.Ensure(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("the certificate was not looked after", "error", err)
		}
	}
}

// Ensure reads the certificate, makes it when there is none or it ends soon,
// and publishes its authority. Replicas that do so at once agree: creation and
// replacement are conditional.
func (c *certificate) Ensure(ctx context.Context) error {
	for range ensureAttempts {
		secret, err := c.client.CoreV1().Secrets(c.namespace).Get(ctx, certificateSecret, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			secret = &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Name: certificateSecret, Namespace: c.namespace, Labels: ownLabels()},
				Type:       corev1.SecretTypeTLS,
			}
			if err := c.issue(secret); err != nil {
				return err
			}
			_, err = c.client.CoreV1().Secrets(c.namespace).Create(ctx, secret, metav1.CreateOptions{FieldManager: fieldManager})
			if apierrors.IsAlreadyExists(err) {
				continue
			}
			if err != nil {
				return fmt.Errorf("create the API's certificate (Secret %s): %w", certificateSecret, err)
			}
		case err != nil:
			return fmt.Errorf("read the API's certificate (Secret %s): %w", certificateSecret, err)
		case !c.good(secret):
			if err := c.issue(secret); err != nil {
				return err
			}
			_, err = c.client.CoreV1().Secrets(c.namespace).Update(ctx, secret, metav1.UpdateOptions{FieldManager: fieldManager})
			if apierrors.IsConflict(err) {
				continue
			}
			if err != nil {
				return fmt.Errorf("renew the API's certificate (Secret %s): %w", certificateSecret, err)
			}
		}
		pair, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
		if err != nil {
			return fmt.Errorf("read the API's certificate (Secret %s): %w", certificateSecret, err)
		}
		if err := c.publish(ctx, secret.Data[caCertKey]); err != nil {
			return err
		}
		c.current.Store(&pair)
		return nil
	}
	return fmt.Errorf("the API's certificate (Secret %s) is being changed by others all the time", certificateSecret)
}

// publish writes the authority, and the Service's address, where clients look
// for them.
func (c *certificate) publish(ctx context.Context, bundle []byte) error {
	data := map[string]string{caCertKey: string(bundle)}
	service, err := c.client.CoreV1().Services(c.namespace).Get(ctx, serviceName, metav1.GetOptions{})
	switch {
	case err == nil:
		if ip := service.Spec.ClusterIP; ip != "" && ip != corev1.ClusterIPNone {
			data[addressKey] = net.JoinHostPort(ip, "443")
		}
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("look for the API's Service: %w", err)
	}
	configMaps := c.client.CoreV1().ConfigMaps(c.namespace)
	if have, err := configMaps.Get(ctx, trustConfigMap, metav1.GetOptions{}); err == nil && maps.Equal(have.Data, data) {
		return nil
	}
	_, err = configMaps.Apply(ctx, corev1apply.ConfigMap(trustConfigMap, c.namespace).WithLabels(ownLabels()).
		WithData(data), metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("publish the API's authority (ConfigMap %s): %w", trustConfigMap, err)
	}
	return nil
}

// good says whether the certificate can be used for a while yet, under the
// names it should have and the authority beside it.
func (c *certificate) good(secret *corev1.Secret) bool {
	leaf, err := parseCertificate(secret.Data[corev1.TLSCertKey])
	if err != nil || c.now().Add(renewBefore).After(leaf.NotAfter) {
		return false
	}
	if _, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey]); err != nil {
		return false
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(secret.Data[caCertKey])
	for _, name := range c.names() {
		if _, err := leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: c.now()}); err != nil {
			return false
		}
	}
	return true
}

// issue fills in a new certificate under the authority that is there, or under
// a new one beside which the old one stays trusted.
func (c *certificate) issue(secret *corev1.Secret) error {
	authority, key := c.authority(secret)
	bundle := secret.Data[caCertKey]
	if authority == nil {
		var certPEM, keyPEM []byte
		var err error
		if authority, key, certPEM, keyPEM, err = c.newAuthority(); err != nil {
			return err
		}
		bundle = slices.Concat(certPEM, firstCertificate(bundle))
		secret.Data = map[string][]byte{caKeyKey: keyPEM}
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	names := c.names()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: names[0]},
		DNSNames:    names,
		NotBefore:   c.now().Add(-backdate),
		NotAfter:    c.now().Add(certificateLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if secret.Data[corev1.TLSCertKey], err = sign(template, authority, leafKey.Public(), key); err != nil {
		return err
	}
	if secret.Data[corev1.TLSPrivateKeyKey], err = encodeKey(leafKey); err != nil {
		return err
	}
	secret.Data[caCertKey] = bundle
	return nil
}

// authority returns the one in the Secret, or nil when there is none that
// outlives a certificate.
func (c *certificate) authority(secret *corev1.Secret) (*x509.Certificate, crypto.Signer) {
	pair, err := tls.X509KeyPair(secret.Data[caCertKey], secret.Data[caKeyKey])
	if err != nil {
		return nil, nil
	}
	authority, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil || !authority.IsCA || c.now().Add(certificateLife).After(authority.NotAfter) {
		return nil, nil
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil
	}
	return authority, signer
}

func (c *certificate) newAuthority() (authority *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, nil, nil, fmt.Errorf("make a key: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "Hearth API of " + c.namespace},
		NotBefore:             c.now().Add(-backdate),
		NotAfter:              c.now().Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	if certPEM, err = sign(template, template, key.Public(), key); err != nil {
		return nil, nil, nil, nil, err
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, nil, nil, err
	}
	authority, err = parseCertificate(certPEM)
	return authority, key, certPEM, keyPEM, err
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	return x509.ParseCertificate(block.Bytes)
}

// firstCertificate is the authority before: one is enough, its certificates
// were all replaced before the one before that ended.
func firstCertificate(bundle []byte) []byte {
	block, _ := pem.Decode(bytes.Clone(bundle))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil
	}
	return pem.EncodeToMemory(block)
}
