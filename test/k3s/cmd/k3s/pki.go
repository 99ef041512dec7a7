package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	caValidity   = 10 * 365 * 24 * time.Hour
	certValidity = 365 * 24 * time.Hour
)

// authorities of a server, below server/tls; a file that is there already is
// used, which is how a cluster gets an authority of its owner's.
var authorities = []struct{ file, name string }{
	{"client-ca", "k3s-client-ca"}, {"server-ca", "k3s-server-ca"}, {"request-header-ca", "k3s-request-header-ca"},
	{"etcd/server-ca", "etcd-server-ca"}, {"etcd/peer-ca", "etcd-peer-ca"},
}

// pki is server/tls.
type pki struct{ dir string }

func (p pki) path(name string) string { return filepath.Join(p.dir, name) }

type authority struct {
	chain []*x509.Certificate // from its own upwards
	pem   []byte
	key   crypto.Signer
}

func (p pki) authority(name string) (*authority, error) {
	content, err := os.ReadFile(p.path(name + ".crt"))
	if err != nil {
		return nil, err
	}
	chain, err := parseCerts(content)
	if err != nil {
		return nil, fmt.Errorf("%s.crt: %w", name, err)
	}
	key, err := readKey(p.path(name + ".key"))
	if err != nil {
		return nil, err
	}
	public, ok := chain[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("%s.key does not belong to %s.crt", name, name)
	}
	if !chain[0].IsCA {
		return nil, fmt.Errorf("%s.crt is no authority", name)
	}
	return &authority{chain: chain, pem: content, key: key}, nil
}

// generate makes what is missing of the authorities and the service account
// key. A certificate without its key, or the reverse, is an error.
func (p pki) generate() error {
	for _, a := range authorities {
		haveCert, haveKey := exists(p.path(a.file+".crt")), exists(p.path(a.file+".key"))
		if haveCert != haveKey {
			return fmt.Errorf("%s: certificate and key must both be there, or neither", p.path(a.file))
		}
		if haveCert {
			if _, err := p.authority(a.file); err != nil {
				return err
			}
			continue
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		now := time.Now()
		template := &x509.Certificate{
			SerialNumber: big.NewInt(0), Subject: pkix.Name{CommonName: fmt.Sprintf("%s@%d", a.name, now.Unix())},
			NotBefore: now.Add(-time.Minute), NotAfter: now.Add(caValidity), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			return err
		}
		if err := writeKey(p.path(a.file+".key"), key); err != nil {
			return err
		}
		if err := writeFile(p.path(a.file+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
			return err
		}
	}
	if !exists(p.path("service.key")) {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return err
		}
		if err := writeFile(p.path("service.key"), pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600); err != nil {
			return err
		}
	}
	// The file may hold several keys: the first signs, all verify.
	current, err := readKey(p.path("service.key"))
	if err != nil {
		return err
	}
	return writeKey(p.path("service.current.key"), current)
}

type subject struct {
	name   string
	groups []string
	dns    []string
	ips    []net.IP
	server bool
	client bool
}

func (a *authority) sign(public crypto.PublicKey, s subject) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 62))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: s.name, Organization: s.groups}, DNSNames: s.dns, IPAddresses: s.ips,
		NotBefore: a.chain[0].NotBefore, NotAfter: time.Now().Add(certValidity), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
	if s.server {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if s.client {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.chain[0], public, a.key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.pem...), nil
}

// issue writes <name>.crt and .key, signed by an authority, anew at every start.
func (p pki) issue(by, name string, s subject) error {
	a, err := p.authority(by)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert, err := a.sign(key.Public(), s)
	if err != nil {
		return err
	}
	if err := writeKey(p.path(name+".key"), key); err != nil {
		return err
	}
	return writeFile(p.path(name+".crt"), cert, 0o644)
}

// issueAll makes every certificate that a server's programs need.
func (p pki) issueAll(n node, sans []string, serviceIP net.IP, domain string) error {
	dns := []string{"localhost", n.name, "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + domain}
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(127, 0, 0, 2), net.IPv6loopback, n.ip, serviceIP}
	for _, san := range sans {
		if ip := net.ParseIP(san); ip != nil {
			ips = append(ips, ip)
		} else {
			dns = append(dns, san)
		}
	}
	if host, err := os.Hostname(); err == nil && !slices.Contains(dns, host) {
		dns = append(dns, host)
	}
	masters := []string{"system:masters"}
	local := []net.IP{net.IPv4(127, 0, 0, 1), n.ip}
	for _, c := range []struct {
		by, name string
		subject
	}{
		{"client-ca", "client-admin", subject{name: "system:admin", groups: masters, client: true}},
		{"client-ca", "client-supervisor", subject{name: "system:k3s-supervisor", groups: masters, client: true}},
		{"client-ca", "client-controller", subject{name: "system:kube-controller-manager", client: true}},
		{"client-ca", "client-scheduler", subject{name: "system:kube-scheduler", client: true}},
		{"client-ca", "client-kube-apiserver", subject{name: "system:apiserver", groups: masters, client: true}},
		{"server-ca", "serving-kube-apiserver", subject{name: "kube-apiserver", dns: dns, ips: ips, server: true}},
		{"server-ca", "serving-supervisor", subject{name: "k3s", groups: []string{"k3s"}, dns: dns, ips: ips, server: true}},
		{"request-header-ca", "client-auth-proxy", subject{name: "system:auth-proxy", client: true}},
		{"etcd/server-ca", "etcd/client", subject{name: "etcd-client", client: true}},
		{"etcd/server-ca", "etcd/server-client", subject{name: "etcd-server", dns: []string{"localhost"}, ips: local, server: true, client: true}},
		{"etcd/peer-ca", "etcd/peer-server-client", subject{name: "etcd-peer", dns: []string{"localhost"}, ips: local, server: true, client: true}},
	} {
		if err := p.issue(c.by, c.name, c.subject); err != nil {
			return fmt.Errorf("issuing %s: %w", c.name, err)
		}
	}
	return nil
}

func writeKey(path string, key crypto.Signer) error {
	var block *pem.Block
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return err
		}
		block = &pem.Block{Type: "EC PRIVATE KEY", Bytes: der}
	case *rsa.PrivateKey:
		block = &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	default:
		return fmt.Errorf("a key of type %T cannot be written", key)
	}
	return writeFile(path, pem.EncodeToMemory(block), 0o600)
}

func readKey(path string) (crypto.Signer, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(content); block != nil; block, rest = pem.Decode(rest) {
		if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
			return key, nil
		}
		if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
			return key, nil
		}
		if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
			if signer, ok := key.(crypto.Signer); ok {
				return signer, nil
			}
		}
	}
	return nil, fmt.Errorf("%s: %w", path, errors.New("data does not contain a valid RSA or ECDSA private key"))
}

// kubeconfig in the form of k3s's: files by reference, mode 0600.
func kubeconfig(path, server, ca, cert, key string) error {
	return writeFile(path, fmt.Appendf(nil, `apiVersion: v1
clusters:
- cluster:
    server: %s
    certificate-authority: %s
  name: local
contexts:
- context:
    cluster: local
    namespace: default
    user: user
  name: Default
current-context: Default
kind: Config
preferences: {}
users:
- name: user
  user:
    client-certificate: %s
    client-key: %s
`, server, ca, cert, key), 0o600)
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }
